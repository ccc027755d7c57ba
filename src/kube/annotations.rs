//! What the annotations of a pod, or of the template of one, ask for. Pure.
//!
//! | annotation | value |
//! |---|---|
//! | `hearth.dev/prefetch` | references, separated by commas or white space |
//! | `hearth.dev/prefetch-images` | `"true"`: the images of the pod's own containers |
//! | `hearth.dev/prefetch-priority` | `low`, `normal`, `high`, or a number from -100 to 100; by default as the pod's priority |
//! | `hearth.dev/pin` | `"false"`: what was prefetched may be evicted though the pod lives |
//! | `hearth.dev/credentials` | a Secret in the pod's namespace, with what opens the references |
//!
//! A comma separates only where a reference (`scheme://`) follows it, or nothing: what follows else belongs to the
//! reference, as in `hf://org/model?include=*.{json,txt}`. White space always separates. What is right is asked for
//! whatever else is wrong; every mistake is told with the words that it is in.

use std::{collections::BTreeMap, fmt};

use crate::reference::{Locator, Reference, redact};

/// What is to be on the node.
pub const PREFETCH: &str = "hearth.dev/prefetch";
/// Whether the images are, too.
pub const IMAGES: &str = "hearth.dev/prefetch-images";
/// What goes first.
pub const PRIORITY: &str = "hearth.dev/prefetch-priority";
/// Whether it stays while the pod lives.
pub const PIN: &str = "hearth.dev/pin";
/// What opens it.
pub const CREDENTIALS: &str = "hearth.dev/credentials";

const ALL: &[&str] = &[PREFETCH, IMAGES, PRIORITY, PIN, CREDENTIALS];
const DOMAIN: &str = "hearth.dev/";
/// Most references of one pod.
pub const MAX_REFERENCES: usize = 64;
/// Most mistakes that are told of one pod.
const MAX_MISTAKES: usize = 8;
/// Most characters of what is quoted.
const MAX_QUOTE: usize = 120;
/// Longest name of a Secret.
const MAX_NAME: usize = 253;

/// What a pod asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    /// Without repetitions, in the order given.
    pub references: Vec<Reference>,
    /// The images of its containers, too.
    pub images: bool,
    /// From -100 to 100, the higher first; `None` where nothing is said.
    pub priority: Option<i8>,
    /// May be evicted though the pod lives.
    pub unpinned: bool,
    /// The name of a Secret.
    pub credentials: Option<String>,
}

impl Asked {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.references.is_empty() && !self.images
    }
}

/// What is wrong in an annotation. Shows no secret.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mistake {
    /// The annotation.
    pub annotation: String,
    /// Quotes it.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "annotation {}: {}", self.annotation, self.message)
    }
}

/// Reads annotations; those of others are left alone.
pub fn read(annotations: &BTreeMap<String, String>) -> (Asked, Vec<Mistake>) {
    let mut asked = Asked::default();
    let mut mistakes = Vec::new();
    let mut wrong = |annotation: &str, message: String| {
        if mistakes.len() < MAX_MISTAKES {
            mistakes.push(Mistake {
                annotation: quoted(annotation),
                message,
            });
        }
    };
    for (key, value) in annotations {
        let text = value.trim();
        match key.as_str() {
            PREFETCH => {
                for part in split(value) {
                    match reference(part) {
                        Err(message) => wrong(key, message),
                        Ok(reference) if asked.references.contains(&reference) => {}
                        Ok(_) if asked.references.len() >= MAX_REFERENCES => {
                            let part = quoted(&redact(part));
                            wrong(key, format!("{part:?} and what follows: more than {MAX_REFERENCES} references"));
                            break;
                        }
                        Ok(reference) => asked.references.push(reference),
                    }
                }
            }
            IMAGES => match flag(text) {
                Ok(flag) => asked.images = flag,
                Err(message) => wrong(key, message),
            },
            PIN => match flag(text) {
                Ok(flag) => asked.unpinned = !flag,
                Err(message) => wrong(key, message),
            },
            PRIORITY => match priority(text) {
                Some(priority) => asked.priority = Some(priority),
                None => wrong(
                    key,
                    format!(
                        "{:?} is none of low, normal, high, and no number from -100 to 100",
                        quoted(text)
                    ),
                ),
            },
            CREDENTIALS => match is_name(text) {
                true => asked.credentials = Some(text.to_owned()),
                false => wrong(key, format!("{:?} is not the name of a Secret", quoted(text))),
            },
            key if key.starts_with(DOMAIN) => {
                let known = ALL.join(", ");
                wrong(key, format!("is not known; there are {known}"));
            }
            _ => {}
        }
    }
    (asked, mistakes)
}

/// The rank of a pod that says nothing, from the value of its PriorityClass.
pub const fn default_priority(pod: Option<i32>) -> i8 {
    match pod {
        // system-cluster-critical and the like
        Some(1_000_000_000..) => 100,
        Some(1_000_000..) => 50,
        Some(1..) => 10,
        Some(..0) => -10,
        Some(0) | None => 0,
    }
}

/// The reference of an image, as a pod names it.
///
/// # Errors
/// Why it is none, quoting it.
pub fn image(name: &str) -> Result<Reference, String> {
    let wrong = |why: &dyn fmt::Display| format!("image {:?}: {why}", quoted(name));
    // As Docker reads them: what stands before the first slash is a registry if it looks like one.
    let is_host = |part: &str| part.contains(['.', ':']) || part == "localhost";
    let full = match name.split_once('/') {
        Some((first, _)) if is_host(first) => name.to_owned(),
        _ => format!("docker.io/{name}"),
    };
    let reference: Reference = format!("oci://{full}").parse().map_err(
        |e: crate::reference::ParseReferenceError| wrong(&e),
    )?;
    match &reference.locator {
        Locator::Oci(oci) if oci.path.is_empty() => Ok(reference),
        _ => Err(wrong(&"is not the name of an image")),
    }
}

fn reference(text: &str) -> Result<Reference, String> {
    let reference: Reference = text
        .parse()
        .map_err(|e: crate::reference::ParseReferenceError| e.to_string())?;
    let refused = |why: &str| Err(format!("{:?}: {why}", quoted(&redact(text))));
    if reference.secret().is_some() {
        return refused("holds a secret, and annotations are for all to see: put it into a Secret, and name that in hearth.dev/credentials");
    }
    if matches!(reference.locator, Locator::File(_)) {
        return refused("directories of the node are not for pods");
    }
    Ok(reference)
}

/// References, as they stand in the annotation.
fn split(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for word in text.split_whitespace() {
        let mut rest = word;
        let mut from = 0;
        while let Some(at) = rest[from..].find(',') {
            let (before, after) = (&rest[..from + at], &rest[from + at + 1..]);
            if after.trim_start_matches(',').is_empty() || is_begin(after) {
                found.push(before);
                (rest, from) = (after, 0);
            } else {
                from += at + 1;
            }
        }
        found.push(rest);
    }
    let found = found.into_iter().map(|part| part.trim_matches(','));
    found.filter(|part| !part.is_empty()).collect()
}

/// Whether a reference begins here.
fn is_begin(text: &str) -> bool {
    let text = text.trim_start_matches(',');
    text.split_once("://").is_some_and(|(scheme, _)| {
        !scheme.is_empty()
            && scheme
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"+.-".contains(&b))
    })
}

fn flag(text: &str) -> Result<bool, String> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        other => Err(format!(
            "{:?} is neither \"true\" nor \"false\"",
            quoted(other)
        )),
    }
}

fn priority(text: &str) -> Option<i8> {
    match text {
        "low" => Some(-10),
        "normal" => Some(0),
        "high" => Some(10),
        number => number.parse().ok().filter(|n| (-100..=100).contains(n)),
    }
}

/// A DNS subdomain (RFC 1123), as names of Secrets are.
pub(super) fn is_name(text: &str) -> bool {
    let label = |label: &str| {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !label.is_empty()
            && label.bytes().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= MAX_NAME && text.split('.').all(label)
}

fn quoted(text: &str) -> String {
    let mut short: String = text.chars().take(MAX_QUOTE).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(pairs: &[(&str, &str)]) -> (Asked, Vec<Mistake>) {
        read(
            &pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
        )
    }

    fn shown(text: &str) -> Vec<String> {
        let (asked, mistakes) = of(&[(PREFETCH, text)]);
        assert_eq!(mistakes, []);
        asked.references.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn references_are_separated_by_commas_and_white_space() {
        let both = ["hf://o/m", "s3://b/p/"];
        for text in [
            "hf://o/m,s3://b/p/",
            "hf://o/m, s3://b/p/",
            "  hf://o/m\n  s3://b/p/\n",
            "hf://o/m ,, s3://b/p/,",
            ",hf://o/m,,s3://b/p/,hf://o/m",
        ] {
            assert_eq!(shown(text), both, "{text:?}");
        }
        assert_eq!(shown(" , "), [""; 0]);
    }

    #[test]
    fn commas_in_a_query_belong_to_it() {
        assert_eq!(
            shown("hf://o/m?include=*.{json,txt}&exclude=a,b,oci://r.example/x:1"),
            ["hf://o/m?include=*.{json,txt}&exclude=a,b", "oci://r.example/x:1"]
        );
    }

    #[test]
    fn what_is_right_counts_and_mistakes_are_quoted() {
        let (asked, mistakes) = of(&[
            (PREFETCH, "hf://o/m, hf:/x/y https://u:geheim@h/x file:///etc nonsense"),
            (IMAGES, "yes"),
            (PIN, "false"),
            (PRIORITY, "101"),
            (CREDENTIALS, "Not_A_Name"),
            ("hearth.dev/prefecth", "x"),
            ("other.dev/prefetch", "?"),
        ]);
        assert_eq!(asked.references.len(), 1);
        assert!(asked.unpinned && !asked.images);
        let all: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
        for words in [
            "annotation hearth.dev/prefetch: \"hf:/x/y\"",
            "holds a secret",
            "\"file:///etc\": directories",
            "annotation hearth.dev/prefetch: \"nonsense\"",
            "annotation hearth.dev/prefetch-images: \"yes\" is neither",
            "hearth.dev/prefetch-priority: \"101\" is none of",
            "hearth.dev/credentials: \"Not_A_Name\" is not the name of a Secret",
            "annotation hearth.dev/prefecth: is not known",
        ] {
            assert!(all.iter().any(|m| m.contains(words)), "{words}: {all:#?}");
        }
        assert!(!format!("{all:?}").contains("geheim"));
    }

    #[test]
    fn bounds() {
        let many: Vec<String> = (0..100).map(|n| format!("hf://o/m{n}")).collect();
        let (asked, mistakes) = of(&[(PREFETCH, &many.join(","))]);
        assert_eq!(asked.references.len(), MAX_REFERENCES);
        assert!(mistakes[0].message.contains("\"hf://o/m64\""), "{mistakes:?}");
        let (_, mistakes) = of(&[(PREFETCH, &"x ".repeat(10_000))]);
        assert_eq!(mistakes.len(), MAX_MISTAKES);
    }

    #[test]
    fn images_are_named_as_docker_does() {
        for (name, full) in [
            ("nginx", "oci://docker.io/library/nginx:latest"),
            ("nginx:1.27", "oci://docker.io/library/nginx:1.27"),
            ("org/x:1", "oci://docker.io/org/x:1"),
            ("localhost/x:1", "oci://localhost/x:1"),
            ("r.example:5000/a/b:1", "oci://r.example:5000/a/b:1"),
        ] {
            assert_eq!(image(name).unwrap().to_string(), full);
        }
        for wrong in ["", "UPPER/x y", "a b", "x?include=y"] {
            let error = image(wrong).unwrap_err();
            assert!(error.starts_with("image "), "{error}");
        }
    }

    proptest! {
        #[test]
        fn anything_is_read_within_bounds(
            prefetch in "\\PC{0,400}",
            other in "\\PC{0,80}",
            which in 0..ALL.len(),
        ) {
            let (asked, mistakes) = of(&[(PREFETCH, &prefetch), (ALL[which], &other)]);
            prop_assert!(asked.references.len() <= MAX_REFERENCES);
            prop_assert!(mistakes.len() <= MAX_MISTAKES);
            for mistake in &mistakes {
                prop_assert!(mistake.to_string().len() < 3000);
            }
        }

        #[test]
        fn every_word_is_a_reference_or_a_mistake(words in prop::collection::vec("[a-z]{1,8}", 1..6)) {
            let (asked, mistakes) = of(&[(PREFETCH, &words.join(" "))]);
            prop_assert!(asked.references.is_empty());
            for word in &words {
                prop_assert!(mistakes.iter().any(|m| m.message.contains(word.as_str())));
            }
        }

        #[test]
        fn what_was_joined_is_taken_apart(
            names in prop::collection::btree_set("[a-z]{1,8}", 1..20),
            comma in any::<bool>(),
        ) {
            let all: Vec<String> = names.iter().map(|n| format!("hf://o/{n}?include={n},*.json")).collect();
            let (asked, mistakes) = of(&[(PREFETCH, &all.join(if comma { "," } else { "\n" }))]);
            prop_assert_eq!(mistakes, vec![]);
            let found: Vec<String> = asked.references.iter().map(ToString::to_string).collect();
            prop_assert_eq!(found, all);
        }
    }
}
