//! What is published and what was provisioned, on the disk: one file of JSON each, replaced at once, without secrets.
//!
//! A record ends with the digest of what it is without it. Earlier versions wrote none, and read over it.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    CsiError, CsiErrorKind, Flags, Layout, Mode, Model, User, Want,
    request::{Create, Publish},
};
use crate::{
    digest::Digest,
    disk::{Disk, DiskError, Open, Span, lock_file, make_all},
    source::Keys,
};

/// Of the records below. A process understands those of exactly this.
pub const FORMAT: u32 = 1;
/// Longest record, in bytes.
const MAX_RECORD: u64 = 64 << 10;
const PUBLISHED: &str = "published";
const CREATED: &str = "created";
/// What is before the digest of a record; `"}` is behind it.
const SEAL: &str = ",\"digest\":\"";

/// What is asked for at one target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Claim {
    pub(super) volume: String,
    pub(super) target: PathBuf,
    /// Canonical.
    pub(super) reference: String,
    pub(super) layout: Layout,
    pub(super) mode: Mode,
    pub(super) strict: bool,
    pub(super) flags: Flags,
    /// Of the pod; empty where it is not known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) namespace: String,
}

/// A claim and what serves it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Published {
    pub(super) claim: Claim,
    /// Whether it came with keys, which are not kept.
    keys: bool,
    /// [`Model::id`].
    pub(super) model: String,
    #[serde(with = "text")]
    pub(super) generation: Digest,
}

/// A volume that was made of a class.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Created {
    pub(crate) name: String,
    /// Bytes; 0 where nobody asked.
    pub(crate) capacity: i64,
    pub(crate) parameters: BTreeMap<String, String>,
}

/// The name of what is published of `volume` at `target`.
pub(super) fn id(volume: &str, target: &Path) -> String {
    let target = target.as_os_str().as_encoded_bytes();
    hash(&[volume.as_bytes(), b"\0", target].concat())
}

fn hash(bytes: &[u8]) -> String {
    Digest::of(bytes).hex()[..32].to_owned()
}

impl Claim {
    pub(super) fn new(asked: &Publish) -> Self {
        let want = &asked.want;
        Self {
            volume: asked.volume.clone(),
            target: asked.target.clone(),
            reference: want.reference.to_string(),
            layout: want.layout,
            mode: want.mode,
            strict: want.strict,
            flags: asked.flags,
            namespace: asked.namespace.clone(),
        }
    }

    pub(super) fn id(&self) -> String {
        id(&self.volume, &self.target)
    }

    /// The owner of the volume's pin.
    pub(super) fn owner(&self) -> String {
        format!("csi-{}", hash(self.volume.as_bytes()))
    }

    pub(super) fn user(&self) -> User {
        User {
            id: self.id(),
            owner: self.owner(),
            namespace: self.namespace.clone(),
        }
    }

    /// Whether it asks for the same as `other`. Earlier versions did not record the namespace.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let mut this = self.clone();
        if this.namespace.is_empty() {
            this.namespace.clone_from(&other.namespace);
        }
        this == *other
    }
}

impl Published {
    pub(super) fn new(claim: Claim, want: &Want, model: &Model) -> Self {
        Self {
            claim,
            keys: want.keys.is_some(),
            model: model.id.clone(),
            generation: model.generation,
        }
    }

    /// What was asked for, but for the keys.
    pub(super) fn want(&self) -> Result<Want, CsiError> {
        let claim = &self.claim;
        let reference = claim.reference.parse();
        Ok(Want {
            reference: reference
                .map_err(|e| CsiError::new(CsiErrorKind::Internal, format!("its record: {e}")))?,
            layout: claim.layout,
            mode: claim.mode,
            strict: claim.strict,
            keys: self.keys.then(Keys::default),
        })
    }
}

impl Created {
    pub(super) fn new(asked: &Create) -> Self {
        Self {
            name: asked.name.clone(),
            capacity: asked.required,
            parameters: asked.parameters.clone(),
        }
    }

    /// The id of the volume, the same for a name wherever it is asked for.
    pub(crate) fn volume(&self) -> String {
        format!("hearth-{}", hash(self.name.as_bytes()))
    }

    /// Whether it is what is asked for.
    pub(super) fn suits(&self, asked: &Create) -> bool {
        self.parameters == asked.parameters
            && asked.required <= self.capacity
            && (asked.limit == 0 || self.capacity <= asked.limit)
    }
}

/// The directory of records.
#[derive(Debug)]
pub(super) struct Records {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    /// Holds the lock.
    _lock: File,
}

/// What was found at start.
pub(super) struct Found {
    pub(super) records: Records,
    pub(super) published: Vec<Published>,
    /// By [`Claim::id`]: what is published and nobody knows how. What it may stand for is left alone.
    pub(super) unreadable: BTreeSet<String>,
    pub(super) created: Vec<Created>,
}

impl Records {
    pub(super) fn open(disk: Arc<dyn Disk>, dir: &Path) -> Result<Found, CsiError> {
        for kind in [PUBLISHED, CREATED] {
            make_all(&*disk, &dir.join(kind))?;
        }
        // `run/csi` and what is above it may be of others, or of a process that was killed before it could do this.
        for dir in dir.ancestors().take(3) {
            disk.sync_dir(dir)?;
        }
        let fail = |e: io::Error| DiskError::new("lock", dir, e);
        let lock = disk.open(&dir.join("lock"), Open::Create)?;
        let lock = lock.file().try_clone().map_err(fail)?;
        if !lock_file(&lock, Span::Exclusive, false).map_err(fail)? {
            let message = format!("volumes of {} are served by another process", dir.display());
            return Err(CsiError::new(CsiErrorKind::FailedPrecondition, message));
        }
        let this = Self {
            disk,
            dir: dir.to_owned(),
            _lock: lock,
        };
        let name = |record: &Published| record.want().map(|_| record.claim.id());
        let (published, unreadable) = this.load(PUBLISHED, name)?;
        let (created, _) = this.load(CREATED, |record: &Created| Ok(record.volume()))?;
        Ok(Found {
            records: this,
            published,
            unreadable,
            created,
        })
    }

    /// The records of a kind, and the names of those that cannot be read. `name`: of the file that a record is in.
    fn load<T: DeserializeOwned>(
        &self,
        kind: &str,
        name: impl Fn(&T) -> Result<String, CsiError>,
    ) -> Result<(Vec<T>, BTreeSet<String>), CsiError> {
        let dir = self.dir.join(kind);
        let (mut found, mut unreadable) = (Vec::new(), BTreeSet::new());
        for file in self.disk.list(&dir)? {
            let path = dir.join(&file);
            if path.extension().is_none_or(|e| e != "json") {
                // Of a process that was killed while it wrote.
                let _ = self.disk.unlink(&path);
                continue;
            }
            let of = path.file_stem().unwrap_or_default().to_string_lossy();
            let read = self.read(&path).map_err(|e| e.to_string());
            let read = read.and_then(|record| match name(&record) {
                Ok(name) if name == of => Ok(record),
                Ok(_) => Err("it is of another volume".to_owned()),
                Err(error) => Err(error.to_string()),
            });
            match read {
                Ok(record) => found.push(record),
                Err(error) => {
                    tracing::error!(path = %path.display(), error, "a record cannot be read, and is left alone");
                    unreadable.insert(of.into_owned());
                }
            }
        }
        Ok((found, unreadable))
    }

    fn read<T: DeserializeOwned>(&self, path: &Path) -> io::Result<T> {
        let file = self.disk.open(path, Open::Read).map_err(io::Error::other)?;
        let size = file.stat().map_err(io::Error::other)?.len;
        if size > MAX_RECORD {
            return Err(io::Error::other("it is too long"));
        }
        let mut bytes = vec![0; size as usize];
        file.read_at(&mut bytes, 0).map_err(io::Error::other)?;
        Ok(serde_json::from_slice(&unsealed(&bytes)?)?)
    }

    /// Writes a record; durable when it returns.
    fn write(&self, kind: &str, name: &str, record: &impl Serialize) -> Result<(), CsiError> {
        let dir = self.dir.join(kind);
        let (path, new) = (
            dir.join(format!("{name}.json")),
            dir.join(format!("{name}.new")),
        );
        let json = serde_json::to_vec(record).map_err(|e| DiskError::new("write", &path, e))?;
        let text = sealed(json);
        self.disk.unlink(&new)?;
        let file = self.disk.open(&new, Open::Create)?;
        file.write_at(&text, 0)?;
        file.sync_data()?;
        self.disk.rename(&new, &path)?;
        self.disk.sync_dir(&dir)?;
        Ok(())
    }

    fn remove(&self, kind: &str, name: &str) -> Result<(), CsiError> {
        let dir = self.dir.join(kind);
        self.disk.unlink(&dir.join(format!("{name}.json")))?;
        self.disk.sync_dir(&dir)?;
        Ok(())
    }

    pub(super) fn write_published(&self, record: &Published) -> Result<(), CsiError> {
        self.write(PUBLISHED, &record.claim.id(), record)
    }

    pub(super) fn remove_published(&self, id: &str) -> Result<(), CsiError> {
        self.remove(PUBLISHED, id)
    }

    pub(super) fn write_created(&self, record: &Created) -> Result<(), CsiError> {
        self.write(CREATED, &record.volume(), record)
    }

    pub(super) fn remove_created(&self, volume: &str) -> Result<(), CsiError> {
        self.remove(CREATED, volume)
    }
}

/// `json`, an object that is not empty, with its digest.
fn sealed(mut json: Vec<u8>) -> Vec<u8> {
    let digest = Digest::of(&json);
    json.pop();
    json.extend_from_slice(format!("{SEAL}{digest}\"}}").as_bytes());
    json
}

/// A record without its digest, which must be its own, where it has one.
fn unsealed(text: &[u8]) -> io::Result<Cow<'_, [u8]>> {
    let length = SEAL.len() + Digest::of(b"").to_string().len() + "\"}".len();
    let at = text.len().saturating_sub(length);
    let Some(seal) = text[at..].strip_prefix(SEAL.as_bytes()) else {
        return Ok(text.into());
    };
    let json = [&text[..at], b"}"].concat();
    match *seal == *format!("{}\"}}", Digest::of(&json)).as_bytes() {
        true => Ok(json.into()),
        false => Err(io::Error::other("its digest does not match")),
    }
}

/// A digest as text.
mod text {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use crate::digest::Digest;

    pub(super) fn serialize<S: Serializer>(digest: &Digest, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(digest)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Digest, D::Error> {
        let text = String::deserialize(d)?;
        text.parse()
            .map_err(|_| D::Error::custom("expected sha256:…"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Published {
        let claim = Claim {
            volume: "v".into(),
            target: "/t".into(),
            reference: "hf://o/m".into(),
            layout: Layout::Tree,
            mode: Mode::Lazy,
            strict: false,
            flags: Flags::default(),
            namespace: "ns".into(),
        };
        Published {
            claim,
            keys: true,
            model: "m-tree".into(),
            generation: Digest::of(b"g"),
        }
    }

    fn read(text: &[u8]) -> io::Result<Published> {
        Ok(serde_json::from_slice(&unsealed(text)?)?)
    }

    #[test]
    fn what_an_earlier_version_wrote_is_read_and_it_reads_ours() {
        let plain = serde_json::to_vec(&record()).unwrap();
        assert_eq!(read(&plain).unwrap(), record());
        let text = sealed(plain.clone());
        assert_eq!(read(&text).unwrap(), record());
        let mut theirs: serde_json::Value = serde_json::from_slice(&text).unwrap();
        theirs.as_object_mut().unwrap().remove("digest").unwrap();
        assert_eq!(theirs, serde_json::to_value(record()).unwrap());
    }

    /// Whichever bit of a record is flipped, and wherever it is cut, it is refused.
    #[test]
    fn damage_is_noticed() {
        let text = sealed(serde_json::to_vec(&record()).unwrap());
        for at in 0..text.len() {
            assert!(read(&text[..at]).is_err(), "cut at {at}");
            for bit in 0..8 {
                let mut damaged = text.clone();
                damaged[at] ^= 1 << bit;
                assert!(read(&damaged).is_err(), "bit {bit} of byte {at}");
            }
        }
    }
}
