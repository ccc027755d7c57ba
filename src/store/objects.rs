//! Complete objects: opening them, and storing small ones in batches.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::Path,
    sync::Arc,
};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use sha2::{Digest as _, Sha256};

use super::{Result, Store, StoreError, StoreErrorKind, batch::Batch};
use crate::{
    digest::{Digest, ObjectId},
    disk::{DiskFile, Open, Span, Stat, lock_file},
};

/// A complete, verified object: immutable. Holding it keeps it from eviction (shared flock).
#[derive(Debug)]
pub struct Complete {
    /// The SHA-256 of its bytes.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// The directory of the tier that it lies on; none for the store itself.
    pub tier: Option<Arc<Path>>,
    /// Names of the file.
    links: u64,
    handle: Arc<dyn DiskFile>,
}

impl Complete {
    /// The file, open for reading.
    pub fn file(&self) -> &File {
        self.handle.file()
    }

    /// Whether the store itself still has it as it was when it was opened: one look. What lies on a tier may be
    /// distrusted since, and has to be opened again.
    pub fn is_there(&self) -> bool {
        let same = |stat: Stat| (stat.links, stat.len) == (self.links, self.size);
        self.tier.is_none() && self.handle.stat().is_ok_and(same)
    }
}

impl Store {
    /// The complete object with this id; follows located -> sha256. Looks at one or two files,
    /// whatever the store holds.
    ///
    /// # Errors
    /// What the disk says. A missing object is none.
    pub fn complete(&self, id: &ObjectId) -> Result<Option<Arc<Complete>>> {
        match id {
            ObjectId::Sha256(digest) => self.open_object(digest, None),
            ObjectId::Located(_) => {
                let Some((digest, size)) = self.located(id)? else {
                    return Ok(None);
                };
                let found = self.open_object(&digest, Some(size))?;
                Ok(found.filter(|object| object.size == size))
            }
        }
    }

    /// As [`Store::complete`], of an object that should be `size` bytes long: one of another length
    /// on a tier is damaged, and counts as absent.
    ///
    /// # Errors
    /// As [`Store::complete`].
    pub fn complete_sized(&self, id: &ObjectId, size: u64) -> Result<Option<Arc<Complete>>> {
        match id {
            ObjectId::Sha256(digest) => self.open_object(digest, Some(size)),
            ObjectId::Located(_) => self.complete(id),
        }
    }

    /// Whether the object with this content is complete. One look at the disk; holds nothing: to
    /// rely on it, record an artifact that leads to it first, or [`Import::keep`](super::Import::keep) it.
    ///
    /// # Errors
    /// What the disk says.
    pub fn has(&self, digest: &Digest) -> Result<bool> {
        Ok(self.stat_content(digest)?.is_some())
    }

    /// As [`Store::has`], of what an id of this size leads to.
    pub(super) fn has_sized(&self, id: &ObjectId, size: u64) -> Result<bool> {
        let Some(digest) = self.content_of(id)? else {
            return Ok(false);
        };
        let stat = self.stat_content(&digest)?;
        Ok(stat.is_some_and(|stat| stat.len == size))
    }

    /// As [`Store::has`], of the store itself, without its tiers: whether the file lies in
    /// [`Store::objects_dir`].
    ///
    /// # Errors
    /// As [`Store::has`].
    pub fn has_itself(&self, digest: &Digest) -> Result<bool> {
        Ok(self.disk.stat(&self.object_path(digest))?.is_some())
    }

    /// What the object with this content is: in the store, else on a tier.
    pub(super) fn stat_content(&self, digest: &Digest) -> Result<Option<Stat>> {
        let own = self.disk.stat(&self.object_path(digest))?;
        Ok(own.or_else(|| self.stat_on_tiers(digest)))
    }

    /// The object with this content: in the store, else on a tier, if it has this size there.
    pub(super) fn open_object(
        &self,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<Option<Arc<Complete>>> {
        match self.open_own(digest)? {
            Some(own) => Ok(Some(Arc::new(own))),
            None => Ok(self.open_on_tiers(digest, size)),
        }
    }

    /// The object with this content in the store itself.
    pub(super) fn open_own(&self, digest: &Digest) -> Result<Option<Complete>> {
        let path = self.object_path(digest);
        let handle = match self.disk.open(&path, Open::Unseen) {
            Ok(handle) => handle,
            Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let fail = |e| StoreError::io(path.display(), &e);
        // Waits only for a collection that is about to remove it.
        lock_file(handle.file(), Span::Shared, true).map_err(fail)?;
        // Files are opened by the thousand: one look at each.
        let stat = handle.stat()?;
        stat.need_plain(&path)?;
        if stat.links == 0 {
            return Ok(None);
        }
        let digest = *digest;
        Ok(Some(Complete {
            digest,
            size: stat.len,
            tier: None,
            links: stat.links,
            handle,
        }))
    }

    /// The content and size behind an id, as far as store and tiers know; the object may be missing.
    pub(super) fn located(&self, id: &ObjectId) -> Result<Option<(Digest, u64)>> {
        match self.own_located(id)? {
            None if id.sha256().is_none() => Ok(self.on_tiers(|tier| tier.store.own_located(id))),
            own => Ok(own),
        }
    }

    fn own_located(&self, id: &ObjectId) -> Result<Option<(Digest, u64)>> {
        let ObjectId::Located(key) = id else {
            return Ok(None);
        };
        let path = self.located_path(key);
        let read = match self.read_small(&path, 256) {
            Ok(Some(bytes)) => parse_located(key, &bytes),
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == StoreErrorKind::Damaged => None,
            Err(error) => return Err(error),
        };
        if read.is_none() {
            tracing::warn!(path = %path.display(), "damaged record of a located object: it counts as absent");
        }
        Ok(read)
    }

    /// The name under which the content of `id` is or would be stored; `None` where it is unknown.
    pub(super) fn content_of(&self, id: &ObjectId) -> Result<Option<Digest>> {
        match id {
            ObjectId::Sha256(digest) => Ok(Some(*digest)),
            ObjectId::Located(_) => Ok(self.located(id)?.map(|(digest, _)| digest)),
        }
    }

    /// Durably writes the record that `id` has the content `digest`; nothing for a `Sha256` id.
    pub(super) fn write_located(&self, id: &ObjectId, digest: &Digest, size: u64) -> Result<()> {
        let ObjectId::Located(key) = id else {
            return Ok(());
        };
        if self.own_located(id)? == Some((*digest, size)) {
            return Ok(());
        }
        let path = self.located_path(key);
        self.make_parent(&path)?;
        self.write_durably(&path, located_record(key, digest, size).as_bytes())
    }

    /// Makes the directory that `path` lies in.
    pub(super) fn make_parent(&self, path: &std::path::Path) -> Result<()> {
        match path.parent() {
            Some(parent) if self.disk.stat(parent)?.is_none() => self.make_dir(parent),
            _ => Ok(()),
        }
    }

    /// Durably stores small objects, with one sync for all where they are many. Content of `Sha256` ids
    /// is checked. What is there already is kept.
    ///
    /// # Errors
    /// [`StoreErrorKind::Damaged`] where content is not what its id promises (nothing is stored
    /// then), [`StoreErrorKind::NoSpace`], [`StoreErrorKind::ReadOnly`], and what the disk says.
    pub fn put(&self, objects: &[(ObjectId, bytes::Bytes)]) -> Result<Vec<Arc<Complete>>> {
        let mut digests = Vec::with_capacity(objects.len());
        for (id, content) in objects {
            let digest = Digest::of(content);
            check_digest(id, &digest)?;
            digests.push(digest);
        }
        let mut done: BTreeMap<Digest, Arc<Complete>> = BTreeMap::new();
        let mut batch = Batch::new(self);
        let mut fresh = BTreeSet::new();
        for ((id, content), digest) in objects.iter().zip(&digests) {
            let size = content.len() as u64;
            if !done.contains_key(digest) && !fresh.contains(digest) {
                match self.open_object(digest, Some(size))? {
                    Some(object) if object.size == size => {
                        done.insert(*digest, object);
                    }
                    _ => {
                        self.need_writable()?;
                        batch.add_object(content, self.object_path(digest))?;
                        fresh.insert(*digest);
                    }
                }
            }
            if let ObjectId::Located(key) = id
                && self.located(id)? != Some((*digest, size))
            {
                self.need_writable()?;
                let record = located_record(key, digest, size);
                batch.add_record(record.as_bytes(), self.located_path(key))?;
            }
        }
        // A collection must not take content away before the record that leads to it is there.
        let _records = match batch.is_empty() {
            true => None,
            false => Some(self.lock_records(Span::Shared)?),
        };
        batch.publish()?;
        for digest in fresh {
            let object = self.open_object(&digest, None)?.ok_or_else(|| {
                let message = format!("object {digest} was removed as soon as it was stored");
                StoreError::new(StoreErrorKind::NotFound, message)
            })?;
            done.insert(digest, object);
        }
        let found = digests.iter().filter_map(|digest| done.get(digest));
        Ok(found.cloned().collect())
    }
}

/// Refuses content that breaks the promise of its id.
pub(super) fn check_digest(id: &ObjectId, digest: &Digest) -> Result<()> {
    match id.sha256() {
        Some(promised) if promised != *digest => {
            let message = format!("object {id} has the content {digest}: it is not what it says");
            Err(StoreError::new(StoreErrorKind::Damaged, message))
        }
        _ => Ok(()),
    }
}

/// What the file `located/ab/<key>` says: digest, size, and a checksum over key and both, so that
/// neither a flipped bit nor a misplaced file leads to other content.
fn located_record(key: &Digest, digest: &Digest, size: u64) -> String {
    let checksum = Digest::of(format!("{key} {digest} {size}").as_bytes());
    format!("{digest} {size} {}\n", &checksum.hex()[..32])
}

fn parse_located(key: &Digest, bytes: &[u8]) -> Option<(Digest, u64)> {
    let text = std::str::from_utf8(bytes).ok()?;
    let mut words = text.split(' ');
    let (digest, size) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    (located_record(key, &digest, size) == text).then_some((digest, size))
}

/// The SHA-256 of a file, read in order by 1 MiB. `seen` is told the bytes of each read, and stops
/// it by saying false: then the result is `None`.
///
/// # Errors
/// What the disk says.
pub fn hash_file(
    file: &File,
    mut seen: impl FnMut(u64) -> bool,
) -> std::io::Result<Option<Digest>> {
    use std::os::unix::fs::FileExt as _;
    // Advice: a file system that knows none is as good.
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL);
    let mut hasher = Sha256::new();
    let mut buf = vec![0; 1 << 20];
    let mut offset = 0;
    loop {
        let count = match file.read_at(&mut buf, offset) {
            Ok(0) => break,
            Ok(count) => count,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        hasher.update(&buf[..count]);
        offset += count as u64;
        if !seen(count as u64) {
            return Ok(None);
        }
    }
    Ok(Some(Digest::from_bytes(hasher.finalize().into())))
}
