//! `WWW-Authenticate` (RFC 9110, 11.6.1): what a registry wants. Any bytes may come.

use reqwest::header::{self, HeaderMap};
use url::Url;

/// Longest parameter that is believed, in bytes.
const MAX_VALUE: usize = 4096;

/// What a registry wants before it answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// A token from `realm` (distribution, docs/spec/auth/token.md).
    Bearer {
        realm: Url,
        service: Option<String>,
        scope: Option<String>,
    },
    /// Name and password with each request.
    Basic,
}

impl Challenge {
    /// The challenge of an answer that we can meet; a token goes before a password.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut basic = None;
        for value in headers.get_all(header::WWW_AUTHENTICATE) {
            let Ok(value) = value.to_str() else {
                continue;
            };
            for (scheme, parameters) in schemes(value) {
                let parameter = |name: &str| {
                    let found = parameters
                        .iter()
                        .find(|(n, _)| n.eq_ignore_ascii_case(name));
                    let value = found.map(|(_, value)| value.clone());
                    value.filter(|v| !v.is_empty() && v.len() <= MAX_VALUE)
                };
                if scheme.eq_ignore_ascii_case("bearer") {
                    let realm = parameter("realm").and_then(|realm| Url::parse(&realm).ok());
                    let usable = |realm: &Url| {
                        matches!(realm.scheme(), "http" | "https") && realm.host_str().is_some()
                    };
                    if let Some(realm) = realm.filter(usable) {
                        return Some(Self::Bearer {
                            realm,
                            service: parameter("service"),
                            scope: parameter("scope"),
                        });
                    }
                } else if scheme.eq_ignore_ascii_case("basic") {
                    basic = Some(Self::Basic);
                }
            }
        }
        basic
    }
}

/// The schemes with their parameters.
fn schemes(text: &str) -> Vec<(&str, Vec<(&str, String)>)> {
    let mut found: Vec<(&str, Vec<(&str, String)>)> = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=', '"']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if rest.is_empty() {
            return found;
        }
        match after.trim_start_matches([' ', '\t']).strip_prefix('=') {
            Some(value) => {
                let (value, after) = parameter(value.trim_start_matches([' ', '\t']));
                if let Some((_, parameters)) = found.last_mut() {
                    parameters.push((word, value));
                }
                rest = after;
            }
            None if word.is_empty() => rest = &after[1..],
            None => {
                found.push((word, Vec::new()));
                rest = after;
            }
        }
    }
}

/// A token or quoted string, and what follows.
fn parameter(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            c => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(values: &[&str]) -> Option<Challenge> {
        let pairs = values.iter().map(|value| {
            let value = header::HeaderValue::from_bytes(value.as_bytes()).unwrap();
            (header::WWW_AUTHENTICATE, value)
        });
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name, value);
        }
        Challenge::of(&headers)
    }

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        Some(Challenge::Bearer {
            realm: Url::parse(realm).unwrap(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        })
    }

    #[test]
    fn the_corpus() {
        crate::corpus::replay("corpus/challenge", |input| {
            schemes(&String::from_utf8_lossy(input));
        });
    }

    #[test]
    fn challenges_as_registries_send_them() {
        assert_eq!(
            of(&[
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push",error="x""#
            ]),
            bearer(
                "https://auth.docker.io/token",
                Some("registry.docker.io"),
                Some("repository:a/b:pull,push")
            )
        );
        assert_eq!(
            of(&[r#"bearer  Realm = "https://a/t?x=1" , service=plain"#]),
            bearer("https://a/t?x=1", Some("plain"), None)
        );
        assert_eq!(
            of(&[r#"Basic realm="Registry Realm""#]),
            Some(Challenge::Basic)
        );
        let both = r#"Negotiate abc==, Basic realm="a, b=\"c\"", Bearer realm="https://a/""#;
        assert_eq!(of(&[both]), bearer("https://a/", None, None));
        assert_eq!(
            of(&["Basic", r#"Bearer realm="https://a/",scope="""#]),
            bearer("https://a/", None, None)
        );
        for none in [
            "",
            "Bearer",
            r#"Bearer realm="x""#,
            r#"Bearer realm="ftp://h/""#,
            "=\"",
            "é",
        ] {
            assert_eq!(of(&[none]), None, "{none}");
        }
        assert_eq!(of(&[r#"Bearer realm="x", Basic"#]), Some(Challenge::Basic));
    }

    proptest! {
        #[test]
        fn nothing_panics(text in r#"((Bearer|Basic|realm|scope|[ -~]{0,3}|é)[ =,"\\]{0,3}){0,8}"#) {
            let _ = schemes(&text);
        }
    }
}
