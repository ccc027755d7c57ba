//! What is kept on the disk.
//!
//! ```text
//! lock          locked by the one process that serves this directory
//! m/<id>        one snapshot: a line with a digest, then JSON under that digest
//! s/<id>/fs     its content; the upper directory while it is active
//! s/<id>/work   the work directory of overlayfs, of one that is or was active
//! ```
//!
//! A record is replaced by a rename and removed by an unlink, and that is the whole transaction: the
//! directories of a snapshot are made and durable before its record, and are swept after it is gone
//! (at the next [`Records::orphans`], which is at start and at Cleanup). An id is never used twice.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{Kind, SnapshotError, Usage};
use crate::{
    digest::Digest,
    disk::{self, Disk, DiskError, Open},
};

/// Of the records below; it is in their first word. A process understands those of exactly this.
pub const FORMAT: u32 = 1;
const HEAD: &str = "hearth-snapshot-1";
/// Longest record that is read, in bytes; containerd's messages are limited to 4 MiB.
const MAX_RECORD: u64 = 16 << 20;

/// A snapshot as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    pub(super) id: u64,
    /// The key of an active one or a view, the name of a committed one.
    pub(super) name: String,
    /// The name of the parent; empty where there is none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) parent: String,
    pub(super) kind: Kind,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) labels: BTreeMap<String, String>,
    pub(super) created: Time,
    pub(super) updated: Time,
    /// Of a committed one with content of its own: what that takes.
    #[serde(default)]
    pub(super) usage: Usage,
    /// Of a committed one that the node serves: the chain id up to it.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "digest_text")]
    pub(super) remote: Option<Digest>,
    /// containerd's namespace at the time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) namespace: Option<String>,
}

/// Seconds and nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Time(pub(super) u64, pub(super) u32);

impl Time {
    pub(super) fn now() -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let since = since.unwrap_or(Duration::ZERO);
        Self(since.as_secs(), since.subsec_nanos())
    }
}

mod digest_text {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use super::Digest;

    pub(super) fn serialize<S: Serializer>(
        digest: &Option<Digest>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        match digest {
            Some(digest) => s.collect_str(digest),
            None => s.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Digest>, D::Error> {
        let text = Option::<String>::deserialize(d)?;
        text.map(|t| t.parse().map_err(D::Error::custom))
            .transpose()
    }
}

impl Record {
    pub(super) fn new(id: u64, name: &str, parent: &str, kind: Kind) -> Self {
        let now = Time::now();
        Self {
            id,
            name: name.to_owned(),
            parent: parent.to_owned(),
            kind,
            labels: BTreeMap::new(),
            created: now,
            updated: now,
            usage: Usage::default(),
            remote: None,
            namespace: None,
        }
    }

    fn encode(&self) -> io::Result<Vec<u8>> {
        let json = serde_json::to_vec(self)?;
        let mut text = format!("{HEAD} {}\n", Digest::of(&json)).into_bytes();
        text.extend_from_slice(&json);
        Ok(text)
    }

    fn decode(text: &[u8]) -> Result<Self, String> {
        let at = text.iter().position(|&b| b == b'\n').ok_or("cut short")?;
        let head = str::from_utf8(&text[..at]).map_err(|_| "no record of a snapshot")?;
        let json = &text[at + 1..];
        match head.split_once(' ') {
            Some((HEAD, digest)) if digest == Digest::of(json).to_string() => {
                serde_json::from_slice(json).map_err(|e| e.to_string())
            }
            Some((HEAD, _)) => Err("its digest does not match".into()),
            _ => Err("not written by this version of hearth".into()),
        }
    }
}

/// The directory of a snapshotter.
#[derive(Debug)]
pub(super) struct Records {
    disk: Arc<dyn Disk>,
    root: PathBuf,
    /// Holds the lock.
    _lock: File,
}

/// What was found at start.
pub(super) struct Found {
    pub(super) records: Vec<Record>,
    /// Ids whose records cannot be read; what they may stand for is left alone.
    pub(super) unreadable: HashSet<u64>,
    /// No id from here on has been used.
    pub(super) next_id: u64,
}

impl Records {
    /// Opens, or makes, the directory `root`, whose parents are made as well.
    ///
    /// # Errors
    /// One that another process serves, or that cannot be written.
    pub(super) fn open(disk: Arc<dyn Disk>, root: &Path) -> Result<(Self, Found), SnapshotError> {
        if disk::make_all(&*disk, root)? {
            // Who is in a container may have to pass through, as with containerd's own.
            set_mode(root, 0o711)?;
        }
        let lock = disk.open(&root.join("lock"), Open::Create)?;
        let lock = lock.file().try_clone();
        let lock = lock.map_err(|e| DiskError::new("lock", root, e))?;
        let locked = disk::lock_file(&lock, disk::Span::Exclusive, false);
        if !locked.map_err(|e| DiskError::new("lock", root, e))? {
            return Err(SnapshotError::Served(root.to_owned()));
        }
        for (name, mode) in [("s", 0o711), ("m", 0o700)] {
            disk.create_dir(&root.join(name))?;
            set_mode(&root.join(name), mode)?;
        }
        disk.sync_dir(root)?;
        let this = Self {
            disk,
            root: root.to_owned(),
            _lock: lock,
        };
        let found = this.load()?;
        Ok((this, found))
    }

    fn load(&self) -> Result<Found, SnapshotError> {
        let dir = self.root.join("m");
        let mut found = Found {
            records: Vec::new(),
            unreadable: HashSet::new(),
            next_id: 1,
        };
        for name in self.disk.list(&dir)? {
            let path = dir.join(&name);
            let Some(id) = name.to_str().and_then(|name| name.parse::<u64>().ok()) else {
                // One that was being written when the process ended.
                self.disk.unlink(&path)?;
                continue;
            };
            found.next_id = found.next_id.max(id + 1);
            match self.read(&path) {
                Ok(record) if record.id == id => found.records.push(record),
                Ok(_) => unreadable(&mut found, &path, id, "it is of another snapshot"),
                Err(error) => unreadable(&mut found, &path, id, &error),
            }
        }
        for name in self.disk.list(&self.root.join("s"))? {
            if let Some(id) = name.to_str().and_then(|name| name.parse::<u64>().ok()) {
                found.next_id = found.next_id.max(id + 1);
            }
        }
        Ok(found)
    }

    fn read(&self, path: &Path) -> Result<Record, String> {
        let file = self.disk.open(path, Open::Read);
        let file = file.map_err(|e| e.to_string())?;
        let mut text = Vec::new();
        let read = file.file().take(MAX_RECORD).read_to_end(&mut text);
        read.map_err(|e| e.to_string())?;
        Record::decode(&text)
    }

    /// Writes a new record, or replaces the one of the same id; durable when it returns.
    pub(super) fn write(&self, record: &Record) -> Result<(), SnapshotError> {
        let dir = self.root.join("m");
        let path = dir.join(record.id.to_string());
        let new = dir.join(format!("{}.new", record.id));
        let fail = |e| DiskError::new("write", &path, e);
        let text = record.encode().map_err(fail)?;
        if text.len() as u64 > MAX_RECORD {
            return Err(SnapshotError::Invalid(format!(
                "the labels of snapshot {} are too long",
                record.name
            )));
        }
        self.disk.unlink(&new)?;
        let file = self.disk.open(&new, Open::Create)?;
        file.write_at(&text, 0)?;
        file.sync_data()?;
        self.disk.rename(&new, &path)?;
        self.disk.sync_dir(&dir)?;
        Ok(())
    }

    /// Removes a record; durable when it returns. The directories stay for [`Records::orphans`].
    pub(super) fn remove(&self, id: u64) -> Result<(), SnapshotError> {
        let dir = self.root.join("m");
        self.disk.unlink(&dir.join(id.to_string()))?;
        self.disk.sync_dir(&dir)?;
        Ok(())
    }

    /// Makes the directories of a snapshot that is active or a view; durable when it returns.
    pub(super) fn make_dirs(
        &self,
        id: u64,
        kind: Kind,
        owner: Option<(u32, u32)>,
    ) -> Result<(), SnapshotError> {
        let dir = self.dir(id);
        self.disk.create_dir(&dir)?;
        let content = self.content(id);
        self.disk.create_dir(&content)?;
        set_mode(&content, 0o755)?;
        if let Some((uid, gid)) = owner {
            std::os::unix::fs::lchown(&content, Some(uid), Some(gid))
                .map_err(|e| DiskError::new("set the owner of", &content, e))?;
        }
        if kind == Kind::Active {
            self.disk.create_dir(&self.work(id))?;
            set_mode(&self.work(id), 0o711)?;
        }
        set_mode(&dir, 0o711)?;
        self.disk.sync_dir(&dir)?;
        self.disk.sync_dir(&self.root.join("s"))?;
        Ok(())
    }

    /// Makes what was written to the content of a snapshot durable.
    pub(super) fn sync(&self) -> Result<(), SnapshotError> {
        Ok(self.disk.open(&self.root, Open::Dir)?.sync_fs()?)
    }

    /// The directories of snapshots that `is_known` does not know. No directory may be in the making.
    pub(super) fn orphans(
        &self,
        is_known: impl Fn(u64) -> bool,
    ) -> Result<Vec<PathBuf>, SnapshotError> {
        let dir = self.root.join("s");
        let names = self.disk.list(&dir)?;
        let orphans = names.into_iter().filter(|name| {
            let id = name.to_str().and_then(|name| name.parse().ok());
            !id.is_some_and(&is_known)
        });
        Ok(orphans.map(|name| dir.join(name)).collect())
    }

    fn dir(&self, id: u64) -> PathBuf {
        self.root.join("s").join(id.to_string())
    }

    /// Where the content of a snapshot is.
    pub(super) fn content(&self, id: u64) -> PathBuf {
        self.dir(id).join("fs")
    }

    /// The work directory of an active snapshot.
    pub(super) fn work(&self, id: u64) -> PathBuf {
        self.dir(id).join("work")
    }
}

fn unreadable(found: &mut Found, path: &Path, id: u64, error: &str) {
    tracing::error!(path = %path.display(), error, "the record of a snapshot cannot be read; its files are left alone");
    found.unreadable.insert(id);
}

fn set_mode(path: &Path, mode: u32) -> Result<(), DiskError> {
    let set = fs::set_permissions(path, fs::Permissions::from_mode(mode));
    set.map_err(|e| DiskError::new("set the mode of", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(root: &Path) -> (Records, Found) {
        Records::open(Arc::new(disk::RealDisk), root).unwrap()
    }

    #[test]
    fn records_come_back_and_damage_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/b");
        let (records, found) = open(&root);
        assert!(found.records.is_empty() && found.next_id == 1);
        let busy = Records::open(Arc::new(disk::RealDisk), &root);
        assert!(matches!(busy, Err(SnapshotError::Served(_))));
        let mut one = Record::new(7, "k8s.io/1/sha256:ab", "", Kind::Committed);
        one.remote = Some(Digest::of(b"x"));
        one.labels.insert("a".into(), "ü\n".into());
        one.usage = Usage {
            bytes: 5,
            inodes: 6,
        };
        records.write(&one).unwrap();
        records
            .write(&Record::new(8, "two", &one.name, Kind::View))
            .unwrap();
        one.updated = Time(9, 1);
        records.write(&one).unwrap();
        records
            .write(&Record::new(9, "three", "", Kind::Active))
            .unwrap();
        records.make_dirs(12, Kind::Active, None).unwrap();
        records.remove(8).unwrap();
        drop(records);

        fs::write(root.join("m/10.new"), "half").unwrap();
        let mut text = fs::read(root.join("m/9")).unwrap();
        *text.last_mut().unwrap() ^= 1;
        fs::write(root.join("m/9"), &text).unwrap();
        fs::copy(root.join("m/7"), root.join("m/11")).unwrap();
        let (records, found) = open(&root);
        assert_eq!(found.records, [one]);
        assert_eq!(found.unreadable, HashSet::from([9, 11]));
        assert_eq!(found.next_id, 13);
        assert!(!root.join("m/10.new").exists());
        assert_eq!(records.orphans(|id| id == 7).unwrap(), [root.join("s/12")]);
    }

    proptest::proptest! {
        /// Whichever byte of a record is flipped, and wherever it is cut, it is refused.
        #[test]
        fn damage_is_noticed(at: proptest::sample::Index, bit in 0..8u32, cut: bool) {
            let text = Record::new(7, "name", "parent", Kind::Active).encode().unwrap();
            assert!(Record::decode(&text).is_ok());
            let at = at.index(text.len());
            let mut damaged = text;
            match cut {
                true => damaged.truncate(at),
                false => damaged[at] ^= 1 << bit,
            }
            assert!(Record::decode(&damaged).is_err());
        }
    }

    #[test]
    fn what_is_no_record_is_refused() {
        for wrong in [
            "",
            "\n",
            "hearth-snapshot-1 sha256:00\n{}",
            "hearth-snapshot-2 x\n{}",
            "\u{ff}\n",
        ] {
            assert!(Record::decode(wrong.as_bytes()).is_err(), "{wrong:?}");
        }
        let json = b"{\"id\":1,\"unknown\":2}";
        let text = format!("{HEAD} {}\n", Digest::of(json));
        let error = Record::decode(&[text.as_bytes(), json].concat()).unwrap_err();
        assert!(error.contains("unknown"), "{error}");
    }
}
