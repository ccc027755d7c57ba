//! What the store knows of references: records, trees, holds, pins.

use std::{
    collections::HashSet,
    fs::File,
    path::{Path, PathBuf},
    time::SystemTime,
};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Serialize};

use super::{Result, Store, StoreError, StoreErrorKind, layout, layout::FileLock};
use crate::{
    digest::Digest,
    disk::{Open, Span, lock_file},
    tree::Artifact,
};

/// Most bytes of an encoded artifact that is read back.
const MAX_TREE: u64 = 2 << 30;
/// Most bytes of a record.
const MAX_RECORD: u64 = 1 << 20;
/// Trees are written once per resolve and read often: the default level of zstd.
const ZSTD_LEVEL: i32 = 3;
/// What of an owner stands in a file name as it is.
const OWNER: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_');

/// What the store knows of a reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The reference, canonical, without secrets.
    pub reference: String,
    /// The digest of the artifact that it resolved to.
    pub digest: Digest,
    /// The generation that stays while not all of that is here.
    pub previous: Option<Digest>,
    /// What the origin calls this generation; may be empty.
    pub revision: String,
    /// When it was resolved.
    pub resolved: SystemTime,
    /// When it was last held or recorded.
    pub used: SystemTime,
    /// Owners of pins, sorted.
    pub pins: Vec<String>,
    /// Number of distinct objects.
    pub objects: u64,
    /// Bytes of all distinct objects.
    pub bytes: u64,
}

/// Keeps an artifact from eviction while it lives, in any process.
#[derive(Debug)]
#[must_use = "dropped at once, it holds nothing"]
pub struct Hold {
    locks: Vec<FileLock>,
    generation: Option<Digest>,
}

impl Hold {
    /// The locked files: whoever has a copy of their descriptors holds it, too.
    pub fn files(&self) -> impl Iterator<Item = &File> {
        self.locks.iter().map(FileLock::file)
    }

    /// The generation that it keeps; `None` where nothing of it can be evicted.
    pub const fn generation(&self) -> Option<&Digest> {
        self.generation.as_ref()
    }

    /// Both.
    pub fn and(mut self, other: Self) -> Self {
        self.locks.extend(other.locks);
        self
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OnDisk {
    reference: String,
    digest: String,
    /// Versions that do not know it take the record for damaged, and collect nothing meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    previous: Option<String>,
    revision: String,
    /// Milliseconds since the epoch.
    resolved_at: u64,
    objects: u64,
    bytes: u64,
    checksum: String,
}

impl layout::Sealed for OnDisk {
    fn checksum(&mut self) -> &mut String {
        &mut self.checksum
    }
}

impl Store {
    pub(super) fn record_path(&self, reference: &str) -> PathBuf {
        let name = Digest::of(reference.as_bytes()).hex();
        self.root.join(format!("artifacts/{name}.json"))
    }

    pub(super) fn hold_path(&self, reference: &str) -> PathBuf {
        self.record_path(reference).with_extension("lock")
    }

    pub(super) fn tree_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("trees").join(digest.hex())
    }

    fn pin_dir(&self, reference: &str) -> PathBuf {
        let name = Digest::of(reference.as_bytes()).hex();
        self.root.join("pins").join(name)
    }

    /// Durably records the artifact (tree first, then reference -> digest). Must come before
    /// looking at its objects: gc keeps what is recorded. What the reference meant before stays until all of
    /// this is here, or the room is needed and nothing else can be evicted.
    ///
    /// # Errors
    /// [`StoreErrorKind::Invalid`] where the artifact breaks the invariants of trees,
    /// [`StoreErrorKind::NoSpace`], [`StoreErrorKind::ReadOnly`], and what the disk says.
    pub fn record(&self, artifact: &Artifact) -> Result<Digest> {
        self.need_writable()?;
        let reference = &artifact.reference;
        let invalid = |why: String| {
            let message = format!("artifact {reference} cannot be recorded: {why}");
            StoreError::new(StoreErrorKind::Invalid, message)
        };
        let encoded = artifact.encode();
        // What could not be read back must not be written.
        Artifact::decode(&encoded).map_err(|error| invalid(error.to_string()))?;
        if encoded.len() as u64 > MAX_TREE {
            return Err(invalid(format!("its tree takes {} bytes", encoded.len())));
        }
        let digest = Digest::of(&encoded);
        if self.is_recorded_below(artifact, &digest)? {
            return Ok(digest);
        }
        let _records = self.lock_records(Span::Shared)?;
        if self.own_tree(&digest)?.is_none() {
            self.write_tree(&digest, &encoded)?;
        }
        let previous = self.previous_of(artifact, &digest)?;
        self.write_record(artifact, &digest, previous)?;
        Ok(digest)
    }

    pub(super) fn write_record(
        &self,
        artifact: &Artifact,
        digest: &Digest,
        previous: Option<Digest>,
    ) -> Result<()> {
        let reference = &artifact.reference;
        let record = OnDisk {
            reference: reference.clone(),
            digest: digest.to_string(),
            previous: previous.map(|previous| previous.to_string()),
            revision: artifact.revision.clone(),
            resolved_at: layout::to_millis(SystemTime::now()),
            objects: artifact.stored().count() as u64,
            bytes: artifact.size(),
            checksum: String::new(),
        };
        let json = layout::seal(record)?;
        if json.len() as u64 > MAX_RECORD {
            let message = format!(
                "artifact {reference} cannot be recorded: its reference and revision are too long"
            );
            return Err(StoreError::new(StoreErrorKind::Invalid, message));
        }
        self.write_durably(&self.record_path(reference), &json)
    }

    /// Durably writes an encoded artifact.
    pub(super) fn write_tree(&self, digest: &Digest, encoded: &[u8]) -> Result<()> {
        let compressed = zstd::encode_all(encoded, ZSTD_LEVEL)
            .map_err(|error| StoreError::io(format_args!("tree {digest}"), &error))?;
        self.write_durably(&self.tree_path(digest), &compressed)
    }

    /// Writes a record anew without its time.
    pub(super) fn forget_times(&self, reference: &str) -> Result<()> {
        let path = self.record_path(reference);
        let bytes = self.read_small(&path, MAX_RECORD)?.unwrap_or_default();
        let Some(mut record) = layout::unseal::<OnDisk>(&bytes)? else {
            return Ok(());
        };
        record.resolved_at = 0;
        record.previous = None;
        self.write_durably(&path, &layout::seal(record)?)?;
        match self.own_image(reference)? {
            Some(image) => self.record_image(&super::ImageRecord {
                made: SystemTime::UNIX_EPOCH,
                ..image
            }),
            None => Ok(()),
        }
    }

    /// Whether a tier has all of this artifact, and the store nothing else of that reference: then
    /// there is nothing to write.
    fn is_recorded_below(&self, artifact: &Artifact, digest: &Digest) -> Result<bool> {
        let reference = &artifact.reference;
        if self.disk.stat(&self.record_path(reference))?.is_some() {
            return Ok(false);
        }
        let below = self.on_tiers(|tier| tier.store.artifact(reference));
        match below {
            Some((record, _)) if record.digest == *digest => self.tiers_have(artifact),
            _ => Ok(false),
        }
    }

    /// Copies the record of a tier into the store; false where there is none.
    pub(super) fn adopt_record(&self, reference: &str) -> Result<bool> {
        let read = |store: &Store| store.read_small(&store.record_path(reference), MAX_RECORD);
        match self.on_tiers(|tier| read(&tier.store)) {
            Some(record) => {
                self.write_durably(&self.record_path(reference), &record)?;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// What a reference was recorded as: in the store, else on a tier. A damaged record or tree
    /// counts as absent.
    ///
    /// # Errors
    /// What the disk says.
    pub fn artifact(&self, reference: &str) -> Result<Option<(Record, Artifact)>> {
        if let Some(own) = self.own_artifact(reference)? {
            return Ok(Some(own));
        }
        let Some((mut record, artifact)) = self.on_tiers(|tier| tier.store.artifact(reference))
        else {
            return Ok(None);
        };
        record.pins = self.pins(reference)?;
        Ok(Some((record, artifact)))
    }

    /// The digest of what a reference was recorded as in the store itself; its tree is not looked at.
    ///
    /// # Errors
    /// What the disk says.
    pub fn recorded_digest(&self, reference: &str) -> Result<Option<Digest>> {
        let record = self.read_record(&self.record_path(reference))?;
        Ok(record.map(|record| record.digest))
    }

    /// Whether there is a record of `reference`, here or on a tier; it may be damaged, or its tree.
    ///
    /// # Errors
    /// What the disk says.
    pub fn has_record(&self, reference: &str) -> Result<bool> {
        let own = self.disk.stat(&self.record_path(reference))?.is_some();
        Ok(own
            || self
                .on_tiers(|tier| tier.store.artifact(reference))
                .is_some())
    }

    fn own_artifact(&self, reference: &str) -> Result<Option<(Record, Artifact)>> {
        let Some(record) = self.read_record(&self.record_path(reference))? else {
            return Ok(None);
        };
        if record.reference != reference {
            return Ok(None);
        }
        let artifact = self.read_tree(&record.digest)?;
        if artifact.is_none() {
            tracing::warn!(reference, digest = %record.digest, "the tree of this artifact is damaged or missing: it counts as absent");
        }
        Ok(artifact.map(|artifact| (record, artifact)))
    }

    /// An artifact by its digest, whatever references mean by now. A damaged tree counts as absent.
    ///
    /// # Errors
    /// What the disk says.
    pub fn generation(&self, digest: &Digest) -> Result<Option<Artifact>> {
        self.read_tree(digest)
    }

    /// All records, by reference: of the store, and of tiers what it does not know. Damaged ones
    /// are left out.
    ///
    /// # Errors
    /// What the disk says.
    pub fn records(&self) -> Result<Vec<Record>> {
        let mut records = self.own_records()?;
        let mut known: HashSet<String> = records.iter().map(|r| r.reference.clone()).collect();
        for mut record in self.tier_records() {
            if known.insert(record.reference.clone()) {
                record.pins = self.pins(&record.reference)?;
                records.push(record);
            }
        }
        records.sort_by(|a, b| a.reference.cmp(&b.reference));
        Ok(records)
    }

    /// The records of all tiers, in their order.
    pub(super) fn tier_records(&self) -> Vec<Record> {
        (self.usable_tiers().iter())
            .flat_map(|tier| tier.or_nothing(tier.store.own_records()))
            .collect()
    }

    /// The records of the store itself.
    pub(super) fn own_records(&self) -> Result<Vec<Record>> {
        let dir = self.root.join("artifacts");
        let mut records = Vec::new();
        for name in self.disk.list(&dir)? {
            let path = dir.join(name);
            if path.extension().is_some_and(|e| e == "json") {
                records.extend(self.read_record(&path)?);
            }
        }
        records.sort_by(|a, b| a.reference.cmp(&b.reference));
        Ok(records)
    }

    /// Reads a record; none where it is missing or damaged.
    pub(super) fn read_record(&self, path: &Path) -> Result<Option<Record>> {
        let bytes = match self.read_small(path, MAX_RECORD) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == StoreErrorKind::Damaged => Vec::new(),
            Err(error) => return Err(error),
        };
        let on_disk = layout::unseal::<OnDisk>(&bytes)?;
        let digest = on_disk.as_ref().and_then(|r| r.digest.parse().ok());
        let (Some(on_disk), Some(digest)) = (on_disk, digest) else {
            tracing::warn!(path = %path.display(), "damaged artifact record: it counts as absent");
            return Ok(None);
        };
        let Some(stat) = self.disk.stat(path)? else {
            return Ok(None);
        };
        Ok(Some(Record {
            pins: self.pins(&on_disk.reference)?,
            digest,
            previous: on_disk.previous.and_then(|digest| digest.parse().ok()),
            revision: on_disk.revision,
            resolved: layout::from_millis(on_disk.resolved_at),
            used: stat.modified,
            objects: on_disk.objects,
            bytes: on_disk.bytes,
            reference: on_disk.reference,
        }))
    }

    /// Reads a tree, from the store or a tier; none where it is missing or damaged.
    pub(super) fn read_tree(&self, digest: &Digest) -> Result<Option<Artifact>> {
        match self.own_tree(digest)? {
            Some(own) => Ok(Some(own)),
            None => Ok(self.on_tiers(|tier| tier.store.own_tree(digest))),
        }
    }

    /// Reads a tree of the store itself.
    pub(super) fn own_tree(&self, digest: &Digest) -> Result<Option<Artifact>> {
        use std::io::Read as _;
        let path = self.tree_path(digest);
        let compressed = match self.read_small(&path, MAX_TREE) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == StoreErrorKind::Damaged => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut encoded = Vec::new();
        let read = zstd::Decoder::new(&compressed[..])
            .and_then(|decoder| decoder.take(MAX_TREE + 1).read_to_end(&mut encoded));
        if read.is_err() || Digest::of(&encoded) != *digest {
            return Ok(None);
        }
        match Artifact::decode(&encoded) {
            Ok(artifact) => Ok(Some(artifact)),
            Err(error) => {
                tracing::warn!(%digest, %error, "a tree cannot be read");
                Ok(None)
            }
        }
    }

    /// Marks used now and keeps it from eviction while the guard lives (in any process). A
    /// generation stays even if the reference is recorded anew meanwhile.
    ///
    /// # Errors
    /// [`StoreErrorKind::NotFound`] where it is not recorded, and what the disk says.
    pub fn hold(&self, reference: &str) -> Result<Hold> {
        let path = self.record_path(reference);
        let missing = || {
            let message = format!("{reference} is not in store {}", self.root.display());
            StoreError::new(StoreErrorKind::NotFound, message)
        };
        if self.is_only_below(reference)? {
            return Ok(Hold {
                locks: Vec::new(),
                generation: None,
            });
        }
        // The disk may be one that only is read, or become so, and be mended while this is held.
        let lock_path = self.hold_path(reference);
        let (lock, written) = match self.writable() {
            true => match self.lock_removable(&lock_path, Span::Shared, true) {
                Err(error) if error.errno() == Some(libc::EROFS) => {
                    (self.lock_there(&lock_path, Span::Shared, true)?, false)
                }
                lock => (lock?, true),
            },
            false => (self.lock_where_allowed(&lock_path), false),
        };
        let Some(record) = self.read_record(&path)? else {
            return Err(missing());
        };
        let tree = self.hold_tree(&record.digest)?;
        if written {
            self.disk.touch(&path)?;
        }
        Ok(Hold {
            locks: lock.into_iter().chain(tree).collect(),
            generation: Some(record.digest),
        })
    }

    /// Keeps a generation from eviction while the guard lives, in any process.
    ///
    /// # Errors
    /// What the disk says.
    pub fn hold_generation(&self, digest: &Digest) -> Result<Hold> {
        let tree = self.hold_tree(digest)?;
        if tree.is_none() && self.writable() && self.read_tree(digest)?.is_none() {
            // Whoever serves it goes on, and fetches what is collected once more.
            tracing::warn!(%digest, "the tree of what is held is missing: its content may be collected");
        }
        Ok(Hold {
            locks: tree.into_iter().collect(),
            generation: Some(*digest),
        })
    }

    fn hold_tree(&self, digest: &Digest) -> Result<Option<FileLock>> {
        match self.writable() {
            true => self.lock_tree(digest, Span::Shared, true),
            false => Ok(self.lock_where_allowed(&self.tree_path(digest))),
        }
    }

    /// The shared lock of a file in a store that cannot be written; none where the user may not even do that, and so
    /// will not evict anything either.
    fn lock_where_allowed(&self, path: &Path) -> Option<FileLock> {
        self.lock_there(path, Span::Shared, true).ok().flatten()
    }

    /// Whether only a tier knows a reference: nothing of it can be evicted, or removed.
    pub(super) fn is_only_below(&self, reference: &str) -> Result<bool> {
        let known = self.disk.stat(&self.record_path(reference))?.is_some();
        Ok(!known && self.below(reference).is_some())
    }

    /// The directory of the first tier that knows a reference.
    fn below(&self, reference: &str) -> Option<PathBuf> {
        self.on_tiers(|tier| {
            let record = tier.store.read_record(&tier.store.record_path(reference))?;
            Ok(record.map(|_| tier.store.root.clone()))
        })
    }

    /// Locks a tree; `None` where it is missing, or taken and `wait` is false.
    pub(super) fn lock_tree(
        &self,
        digest: &Digest,
        how: Span,
        wait: bool,
    ) -> Result<Option<FileLock>> {
        self.lock_there(&self.tree_path(digest), how, wait)
    }

    /// Locks a file that is only read; `None` where it is missing, or taken and `wait` is false.
    fn lock_there(&self, path: &Path, how: Span, wait: bool) -> Result<Option<FileLock>> {
        let fail = |error| StoreError::io(path.display(), &error);
        loop {
            let file = match self.disk.open(path, Open::Read) {
                Ok(file) => file,
                Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            if !lock_file(file.file(), how, wait).map_err(fail)? {
                return Ok(None);
            }
            // A lock on what was removed, or replaced, while it was waited for holds nothing.
            if layout::linked(file.file()).map_err(fail)? {
                return Ok(Some(FileLock::new(file)));
            }
        }
    }

    /// Keeps a reference, recorded or not, from eviction until [`Store::unpin`]. Durable. A pin that is there needs no
    /// room on the disk.
    ///
    /// # Errors
    /// [`StoreErrorKind::Invalid`] for an owner that is empty or too long, and what the disk says.
    pub fn pin(&self, reference: &str, owner: &str) -> Result<()> {
        self.need_writable()?;
        let path = self.pin_path(reference, owner)?;
        // A collection under way has looked at the pins already.
        let _records = self.lock_records(Span::Shared)?;
        if self.disk.stat(&path)?.is_some() {
            // Whoever made it may have been killed before it was durable.
            return Ok(self.disk.sync_dir(&self.pin_dir(reference))?);
        }
        self.make_parent(&path)?;
        self.write_durably(&path, reference.as_bytes())
    }

    /// Removes the pin of an owner; false where there was none.
    ///
    /// # Errors
    /// As [`Store::pin`].
    pub fn unpin(&self, reference: &str, owner: &str) -> Result<bool> {
        self.need_writable()?;
        let removed = self.disk.unlink(&self.pin_path(reference, owner)?)?;
        if removed {
            self.disk.sync_dir(&self.pin_dir(reference))?;
        }
        Ok(removed)
    }

    /// Owners of pins of a reference, sorted.
    ///
    /// # Errors
    /// What the disk says.
    pub fn pins(&self, reference: &str) -> Result<Vec<String>> {
        let names = self.disk.list(&self.pin_dir(reference))?;
        let decode = |name: &std::ffi::OsString| {
            let name = name.to_string_lossy();
            percent_decode_str(&name).decode_utf8_lossy().into_owned()
        };
        let mut owners: Vec<String> = names.iter().map(decode).collect();
        owners.sort();
        Ok(owners)
    }

    fn pin_path(&self, reference: &str, owner: &str) -> Result<PathBuf> {
        let name = utf8_percent_encode(owner, OWNER).to_string();
        if name.is_empty() || name.len() > 255 {
            let shown: String = owner.chars().take(80).collect();
            let message = format!("{shown:?} cannot own a pin of {reference}: it is empty or long");
            return Err(StoreError::new(StoreErrorKind::Invalid, message));
        }
        Ok(self.pin_dir(reference).join(name))
    }

    /// Forgets a reference; its content goes with the next collection. False where it was not
    /// recorded.
    ///
    /// # Errors
    /// [`StoreErrorKind::InUse`] where it is held (mounted, being warmed) or pinned, and what the disk says.
    pub fn remove(&self, reference: &str) -> Result<bool> {
        let pins = self.pins(reference)?;
        if !pins.is_empty() {
            let message = format!("{reference} is pinned by {}", pins.join(", "));
            return Err(StoreError::new(StoreErrorKind::InUse, message));
        }
        self.need_above(reference)?;
        match self.forget(reference)? {
            Some(removed) => Ok(removed),
            None => {
                let message = format!("{reference} is in use: mounted, or being warmed");
                Err(StoreError::new(StoreErrorKind::InUse, message))
            }
        }
    }

    /// Forgets a reference and its pins, even while it is held: who holds it keeps the content.
    ///
    /// # Errors
    /// What the disk says.
    pub fn remove_forced(&self, reference: &str) -> Result<bool> {
        self.need_writable()?;
        self.need_above(reference)?;
        for owner in self.pins(reference)? {
            self.unpin(reference, &owner)?;
        }
        self.unlink_record(reference)
    }

    /// Refuses to remove what only a tier has.
    fn need_above(&self, reference: &str) -> Result<()> {
        match self.below(reference) {
            Some(tier) if self.is_only_below(reference)? => {
                let tier = tier.display();
                let message = format!("{reference} is on tier {tier}, which is only read");
                Err(StoreError::new(StoreErrorKind::OnTier, message))
            }
            _ => Ok(()),
        }
    }

    /// Forgets what a reference was resolved to, even while it is held, since that turned out false: its generation is
    /// not there any more either. Its pins stay.
    ///
    /// # Errors
    /// What the disk says.
    pub fn forget_resolution(&self, reference: &str) -> Result<bool> {
        self.need_writable()?;
        let record = self.read_record(&self.record_path(reference))?;
        let removed = self.unlink_record(reference)?;
        if let Some(record) = record {
            // Whoever had it published would go on with it: all of its files may be here.
            self.disk.unlink(&self.tree_path(&record.digest))?;
        }
        Ok(removed)
    }

    /// Removes the record of a reference that nobody holds; whether there was one, or `None`
    /// where it is held.
    pub(super) fn forget(&self, reference: &str) -> Result<Option<bool>> {
        self.need_writable()?;
        let path = self.hold_path(reference);
        let Some(_lock) = self.lock_removable(&path, Span::Exclusive, false)? else {
            return Ok(None);
        };
        let removed = self.unlink_record(reference)?;
        self.disk.unlink(&path)?;
        Ok(Some(removed))
    }

    fn unlink_record(&self, reference: &str) -> Result<bool> {
        // First: an image record without an artifact would say of nothing that it is here.
        self.disk.unlink(&self.image_path(reference))?;
        let removed = self.disk.unlink(&self.record_path(reference))?;
        if removed {
            self.disk.sync_dir(&self.root.join("artifacts"))?;
        }
        Ok(removed)
    }
}
