//! Where things are, and how a small file is written durably.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Serialize, de::DeserializeOwned};

use super::{Result, Store, StoreError, StoreErrorKind};
use crate::{
    digest::{Digest, PartialId},
    disk::{DiskFile, Open, Span, lock_file},
};

/// Directories of a store, parents first.
pub(super) const DIRECTORIES: [&str; 9] = [
    "objects",
    "objects/sha256",
    "objects/tmp",
    "located",
    "partial",
    "trees",
    "roots",
    "artifacts",
    "pins",
];

/// A lock on a whole file, gone when dropped or when the process dies.
#[derive(Debug)]
#[must_use]
pub(super) struct FileLock {
    file: Arc<dyn DiskFile>,
}

impl FileLock {
    /// The lock that `file` holds on itself.
    pub(super) fn new(file: Arc<dyn DiskFile>) -> Self {
        Self { file }
    }

    pub(super) fn file(&self) -> &std::fs::File {
        self.file.file()
    }
}

/// Text that no other process and no earlier process of this number uses.
pub(super) fn temp_salt() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanos = now.map_or(0, |since| since.as_nanos());
    format!("{}-{nanos:x}", std::process::id())
}

/// JSON of one of our own values.
pub(super) fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value)
        .map_err(|error| StoreError::new(StoreErrorKind::Invalid, error.to_string()))
}

/// A record that holds its own checksum: the SHA-256 of its JSON with an empty one.
pub(super) trait Sealed: Serialize + DeserializeOwned {
    /// Where the checksum stands.
    fn checksum(&mut self) -> &mut String;
}

/// The JSON of a record, with its checksum.
pub(super) fn seal<T: Sealed>(mut record: T) -> Result<Vec<u8>> {
    record.checksum().clear();
    let checksum = Digest::of(&json(&record)?).hex();
    *record.checksum() = checksum;
    json(&record)
}

/// Reads a record; none where its checksum does not fit.
pub(super) fn unseal<T: Sealed>(bytes: &[u8]) -> Result<Option<T>> {
    let Ok(mut record) = serde_json::from_slice::<T>(bytes) else {
        return Ok(None);
    };
    let found = std::mem::take(record.checksum());
    let fits = Digest::of(&json(&record)?).hex() == found;
    Ok(fits.then_some(record))
}

impl Store {
    pub(super) fn object_path(&self, digest: &Digest) -> PathBuf {
        sharded(&self.root.join("objects/sha256"), digest)
    }

    pub(super) fn located_path(&self, digest: &Digest) -> PathBuf {
        sharded(&self.root.join("located"), digest)
    }

    pub(super) fn partial_dir(&self) -> PathBuf {
        self.root.join("partial")
    }

    /// The path of a partial object without its extension.
    pub(super) fn partial_stem(&self, id: &PartialId) -> PathBuf {
        let mut name = id.id.to_string().replace(':', "-");
        if let Some(claim) = id.claim() {
            name = format!("{name}-{claim}");
        }
        self.partial_dir().join(name)
    }

    pub(super) fn temp_dir(&self) -> PathBuf {
        self.root.join("objects/tmp")
    }

    /// The path of a new temporary file.
    pub(super) fn temp_path(&self) -> PathBuf {
        let number = self.temps.fetch_add(1, Ordering::Relaxed);
        self.temp_dir().join(format!("{}-{number}", self.temp_salt))
    }

    /// The path of the directory of a new import.
    pub(super) fn import_dir(&self) -> PathBuf {
        let number = self.temps.fetch_add(1, Ordering::Relaxed);
        self.root
            .join(format!("imports/{}-{number}", self.temp_salt))
    }

    /// The directories of all imports, alive or dead.
    pub(super) fn import_dirs(&self) -> Result<Vec<PathBuf>> {
        let dir = self.root.join("imports");
        let names = self.disk.list(&dir)?;
        Ok(names.into_iter().map(|name| dir.join(name)).collect())
    }

    /// Fails where the store cannot be written.
    pub(super) fn need_writable(&self) -> Result<()> {
        if self.writable() {
            return Ok(());
        }
        let message = format!("store {} cannot be written", self.root.display());
        Err(StoreError::new(StoreErrorKind::ReadOnly, message))
    }

    /// Makes a directory; its own name is durable when this returns.
    pub(super) fn make_dir(&self, path: &Path) -> Result<()> {
        if self.disk.create_dir(path)?
            && let Some(parent) = path.parent()
        {
            self.disk.sync_dir(parent)?;
        }
        Ok(())
    }

    /// Writes `bytes` to a new temporary file, synced if asked.
    pub(super) fn write_temp(&self, bytes: &[u8], sync: bool) -> Result<PathBuf> {
        let path = self.temp_path();
        let write = || {
            let file = self.disk.open(&path, Open::Create)?;
            file.write_at(bytes, 0)?;
            if sync { file.sync_data() } else { Ok(()) }
        };
        match write() {
            Ok(()) => Ok(path),
            Err(error) => {
                // The first error says what is wrong; the rest goes with the next collection.
                let _ = self.disk.unlink(&path);
                Err(error.into())
            }
        }
    }

    /// Writes the content of an object to the new file `path`.
    pub(super) fn write_object(&self, path: &Path, content: &[u8]) -> Result<()> {
        let write = || self.disk.open(path, Open::New)?.write_at(content, 0);
        write().map_err(|error| {
            // The first error says what is wrong; the rest goes with the next collection.
            let _ = self.disk.unlink(path);
            error.into()
        })
    }

    /// Replaces the small file `path`: after this, and after a crash, it is old or new, never between.
    pub(super) fn write_durably(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let temp = self.write_temp(bytes, true)?;
        if let Err(error) = self.disk.rename(&temp, path) {
            let _ = self.disk.unlink(&temp);
            return Err(error.into());
        }
        self.sync_parent(path)
    }

    /// Makes the name of a file durable.
    pub(super) fn sync_parent(&self, path: &Path) -> Result<()> {
        match path.parent() {
            Some(parent) => Ok(self.disk.sync_dir(parent)?),
            None => Ok(()),
        }
    }

    /// Reads a small file; `None` where there is none.
    ///
    /// # Errors
    /// [`StoreErrorKind::Damaged`] where it is longer than `limit` bytes.
    pub(super) fn read_small(&self, path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
        let file = match self.disk.open(path, Open::Unseen) {
            Ok(file) => file,
            Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let stat = file.stat()?;
        stat.need_plain(path)?;
        let len = stat.len;
        if len > limit {
            let message = format!("{} is {len} bytes long: too long", path.display());
            return Err(StoreError::new(StoreErrorKind::Damaged, message));
        }
        let mut bytes = vec![0; len as usize];
        file.read_at(&mut bytes, 0)?;
        Ok(Some(bytes))
    }

    /// Locks a file of the store, waiting for whoever holds it.
    pub(super) fn lock(&self, path: &Path, how: Span) -> Result<FileLock> {
        let file = self.disk.open(path, Open::Create)?;
        lock_file(file.file(), how, true).map_err(|e| StoreError::io(path.display(), &e))?;
        Ok(FileLock::new(file))
    }

    /// Locks a file of the store that others may remove under the exclusive lock; `None` where
    /// another process has it and `wait` is false.
    pub(super) fn lock_removable(
        &self,
        path: &Path,
        how: Span,
        wait: bool,
    ) -> Result<Option<FileLock>> {
        loop {
            let file = self.disk.open(path, Open::Create)?;
            let fail = |e| StoreError::io(path.display(), &e);
            if !lock_file(file.file(), how, wait).map_err(fail)? {
                return Ok(None);
            }
            if linked(file.file()).map_err(fail)? {
                return Ok(Some(FileLock::new(file)));
            }
        }
    }

    /// The lock under which partial objects come and go.
    pub(super) fn lock_partials(&self) -> Result<FileLock> {
        self.lock(&self.root.join("partial/lock"), Span::Exclusive)
    }

    /// The lock between recording and collecting.
    pub(super) fn lock_records(&self, how: Span) -> Result<FileLock> {
        self.lock(&self.root.join("gc.lock"), how)
    }
}

/// Whether an open file still has a name.
pub(super) fn linked(file: &fs::File) -> std::io::Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(file.metadata()?.nlink() > 0)
}

/// A time as it stands in records: milliseconds since the epoch.
pub(super) fn to_millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// The inverse of [`to_millis`].
pub(super) fn from_millis(millis: u64) -> SystemTime {
    UNIX_EPOCH
        .checked_add(Duration::from_millis(millis))
        .unwrap_or(UNIX_EPOCH)
}

fn sharded(dir: &Path, digest: &Digest) -> PathBuf {
    let hex = digest.hex();
    dir.join(&hex[..2]).join(hex)
}
