//! What is published and what was provisioned, on the disk: one file of JSON each, replaced at once, without secrets.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read as _},
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

/// What is asked for at one target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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

type Found = (Records, Vec<Published>, Vec<Created>);

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
        let mut published: Vec<Published> = this.load(PUBLISHED)?;
        published.retain(|record| {
            let known = record.want().is_ok();
            if !known {
                tracing::warn!(volume = record.claim.volume, "its record is not understood");
            }
            known
        });
        let created = this.load(CREATED)?;
        Ok((this, published, created))
    }

    fn load<T: DeserializeOwned>(&self, kind: &str) -> Result<Vec<T>, CsiError> {
        let dir = self.dir.join(kind);
        let mut found = Vec::new();
        for name in self.disk.list(&dir)? {
            let path = dir.join(&name);
            if path.extension().is_none_or(|e| e != "json") {
                // Of a process that was killed while it wrote.
                let _ = self.disk.unlink(&path);
                continue;
            }
            match self.read(&path) {
                Ok(record) => found.push(record),
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "a record cannot be read, and is left alone");
                }
            }
        }
        Ok(found)
    }

    fn read<T: DeserializeOwned>(&self, path: &Path) -> io::Result<T> {
        let file = self.disk.open(path, Open::Read).map_err(io::Error::other)?;
        let mut bytes = Vec::new();
        file.file().take(MAX_RECORD).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// Writes a record; durable when it returns.
    fn write(&self, kind: &str, name: &str, record: &impl Serialize) -> Result<(), CsiError> {
        let dir = self.dir.join(kind);
        let (path, new) = (
            dir.join(format!("{name}.json")),
            dir.join(format!("{name}.new")),
        );
        let text = serde_json::to_vec(record).map_err(|e| DiskError::new("write", &path, e))?;
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
