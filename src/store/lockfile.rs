//! `hearth.lock`: what a baked tier holds, as text that people review, and bake the same from.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// How the file begins.
const HEADER: &str =
    "# hearth.lock: what this tier holds. `hearth bake --from` this file bakes the same content.\n";
const VERSION: u32 = 1;

/// What a baked tier holds; sorted, and without times: the same content gives the same text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    version: u32,
    /// By reference.
    #[serde(default, rename = "artifact")]
    pub artifacts: Vec<LockedArtifact>,
    /// Digest -> size in bytes.
    #[serde(default)]
    pub objects: BTreeMap<String, u64>,
}

/// One reference of a lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedArtifact {
    /// The reference, canonical.
    pub reference: String,
    /// What the origin calls this generation: a commit, the digest of a manifest.
    pub revision: String,
    /// Of an image: the index of several platforms that named the manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<String>,
    /// The digest of the artifact: of its tree and objects.
    pub digest: String,
    /// Number of files.
    pub files: u64,
    /// Bytes of all distinct objects.
    pub bytes: u64,
}

impl Lock {
    pub(super) fn new(mut artifacts: Vec<LockedArtifact>, objects: BTreeMap<Digest, u64>) -> Self {
        artifacts.sort_by(|a, b| a.reference.cmp(&b.reference));
        let objects = objects.into_iter();
        Self {
            version: VERSION,
            artifacts,
            objects: objects.map(|(id, size)| (id.to_string(), size)).collect(),
        }
    }

    /// Whether a text is a lock, or means to be one.
    pub fn is_lock(text: &str) -> bool {
        text.starts_with("# hearth.lock")
    }

    /// Reads the text of a lock.
    ///
    /// # Errors
    /// Says what is wrong with it, and in which line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let lock: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        if lock.version != VERSION {
            return Err(format!(
                "it has version {}, this version of hearth reads {VERSION}",
                lock.version
            ));
        }
        let digests = lock.artifacts.iter().map(|artifact| &artifact.digest);
        let indexes = lock.artifacts.iter().filter_map(|a| a.index.as_ref());
        for digest in digests.chain(indexes).chain(lock.objects.keys()) {
            if let Err(error) = digest.parse::<Digest>() {
                return Err(format!("{digest:?}: {error}"));
            }
        }
        Ok(lock)
    }

    /// The text.
    ///
    /// # Errors
    /// A size beyond what the format can say.
    pub fn text(&self) -> Result<String, String> {
        let body = toml::to_string(self).map_err(|error| error.to_string())?;
        Ok(format!("{HEADER}{body}"))
    }

    /// The first difference to `other`, in words; none where they are the same.
    pub fn difference(&self, other: &Self) -> Option<String> {
        for ours in &self.artifacts {
            let name = &ours.reference;
            match other.artifacts.iter().find(|a| a.reference == *name) {
                None => return Some(format!("{name} is missing")),
                Some(theirs) if ours.revision != theirs.revision => {
                    let (ours, theirs) = (&ours.revision, &theirs.revision);
                    return Some(format!("{name} is {theirs:?} now, not {ours:?}"));
                }
                Some(theirs) if ours.index != theirs.index => {
                    let (ours, theirs) = (&ours.index, &theirs.index);
                    return Some(format!("the index of {name} is {theirs:?}, not {ours:?}"));
                }
                Some(theirs) if ours != theirs => {
                    let (ours, theirs) = (&ours.digest, &theirs.digest);
                    return Some(format!("{name} has the digest {theirs}, not {ours}"));
                }
                Some(_) => {}
            }
        }
        let more =
            |name: &&LockedArtifact| self.artifacts.iter().all(|a| a.reference != name.reference);
        if let Some(more) = other.artifacts.iter().find(more) {
            return Some(format!("{} is not in the lock", more.reference));
        }
        (self.objects != other.objects).then(|| "the objects differ".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_round_trip_and_bad_ones_are_refused() {
        let artifact = |name: &str| LockedArtifact {
            reference: format!("s3://b/\"{name}\"\n"),
            revision: "r\\1".into(),
            index: (name == "b").then(|| Digest::of(b"i").to_string()),
            digest: Digest::of(name.as_bytes()).to_string(),
            files: 2,
            bytes: 7,
        };
        let objects = BTreeMap::from([(Digest::of(b"x"), 3), (Digest::of(b"y"), 4)]);
        let lock = Lock::new(vec![artifact("b"), artifact("a")], objects);
        let text = lock.text().unwrap();
        assert!(Lock::is_lock(&text));
        assert_eq!(Lock::parse(&text).as_ref(), Ok(&lock));
        let empty = Lock::new(Vec::new(), BTreeMap::new());
        assert_eq!(Lock::parse(&empty.text().unwrap()), Ok(empty));
        for (from, to) in [
            ("version = 1", "version = 2"),
            ("sha256:", "md5:"),
            ("files", "fils"),
            ("= 3", "= -3"),
        ] {
            assert!(Lock::parse(&text.replace(from, to)).is_err(), "{from}");
        }
    }

    #[test]
    fn differences_are_named() {
        let artifact = LockedArtifact {
            reference: "s3://b/a".into(),
            revision: "1".into(),
            index: None,
            digest: Digest::of(b"a").to_string(),
            files: 1,
            bytes: 1,
        };
        let lock = Lock::new(vec![artifact.clone()], BTreeMap::new());
        assert_eq!(lock.difference(&lock), None);
        let mut other = lock.clone();
        other.artifacts[0].revision = "2".into();
        let said = lock.difference(&other).unwrap();
        assert!(said.contains("s3://b/a is \"2\" now, not \"1\""), "{said}");
        other.artifacts.clear();
        assert!(lock.difference(&other).unwrap().contains("missing"));
        assert!(other.difference(&lock).unwrap().contains("not in the lock"));
        let mut other = lock.clone();
        other.objects.insert(Digest::of(b"o").to_string(), 1);
        assert!(lock.difference(&other).unwrap().contains("objects"));
    }
}
