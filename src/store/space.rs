//! Space: what the store takes, what it may take, and who may start to fill it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{ByteSize, Result, Store, StoreError, StoreErrorKind, partial::Paths};
use crate::{
    digest::{Digest, PartialId},
    disk::{Space, Stat},
    tree::{Artifact, Object},
};

/// How long a file system may take to show what was freed.
const SHOWS_LATE: Duration = Duration::from_secs(10);
/// How often it is asked meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// What the store takes on its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Complete objects.
    pub objects: u64,
    /// Their bytes on the disk.
    pub object_bytes: u64,
    /// Objects on their way.
    pub partials: u64,
    /// Their bytes on the disk.
    pub partial_bytes: u64,
    /// All the rest: trees, records, temporary files.
    pub other_bytes: u64,
}

impl Usage {
    /// All bytes.
    pub const fn bytes(&self) -> u64 {
        self.object_bytes + self.partial_bytes + self.other_bytes
    }
}

/// Disk space promised by [`Store::admit`] or [`Store::admit_bytes`] until dropped. What has arrived
/// already does not count twice.
#[derive(Debug)]
#[must_use = "dropped at once, it reserves nothing"]
pub struct Reservation {
    wanted: Arc<Wanted>,
}

impl Reservation {
    /// The artifact it is for.
    pub fn reference(&self) -> &str {
        &self.wanted.reference
    }

    /// Of [`Store::admit_bytes`]: that many bytes have arrived, and need not be reserved any more.
    pub fn arrived(&self, bytes: u64) {
        self.wanted.arrived(bytes);
    }

    pub(super) fn wanted(&self) -> Arc<Wanted> {
        Arc::clone(&self.wanted)
    }
}

/// What a reservation is for.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) reference: String,
    objects: BTreeMap<PartialId, u64>,
    /// Beside the objects: bytes that have not arrived.
    bytes: AtomicU64,
    /// It takes the place of what the reference means, which need not stay.
    replaces: bool,
}

impl Wanted {
    fn of(artifact: &Artifact, more: &[Object], bytes: u64) -> Self {
        let origin = artifact.origin();
        let all = artifact.stored().chain(more);
        Self {
            reference: artifact.reference.clone(),
            objects: all.map(|o| (o.partial_id(&origin), o.size)).collect(),
            bytes: AtomicU64::new(bytes),
            replaces: false,
        }
    }

    /// Whether what is recorded of `reference` must stay for it.
    pub(super) fn keeps(&self, reference: &str) -> bool {
        !self.replaces && self.reference == reference
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(super) fn arrived(&self, bytes: u64) {
        let less = |left: u64| Some(left.saturating_sub(bytes));
        // It never refuses.
        let _ = self
            .bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// What had arrived was dropped.
    pub(super) fn gone(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// What may be written, in bytes, and why not more.
#[derive(Debug, Clone, Copy)]
struct Room {
    free: u64,
    used: Option<u64>,
    available: u64,
}

impl Store {
    /// What the store takes. Walks all of it.
    ///
    /// # Errors
    /// What the disk says.
    pub fn usage(&self) -> Result<Usage> {
        let mut usage = Usage::default();
        self.each_object(|_, _, stat| {
            usage.objects += 1;
            usage.object_bytes += stat.disk;
            Ok(())
        })?;
        for name in self.disk.list(&self.partial_dir())? {
            let path = self.partial_dir().join(name);
            let Some(stat) = self.disk.stat(&path)? else {
                continue;
            };
            match path.extension().is_some_and(|e| e == "data") {
                true => {
                    usage.partials += 1;
                    usage.partial_bytes += stat.disk;
                }
                false => usage.other_bytes += stat.disk,
            }
        }
        let imports = self.import_dirs()?;
        let dirs = [
            "objects/tmp",
            "trees",
            "roots",
            "artifacts",
            "indexes",
            "images",
            "chains",
        ];
        let dirs = dirs.map(|dir| self.root.join(dir)).into_iter();
        for dir in dirs.chain(imports) {
            for name in self.disk.list(&dir)? {
                let stat = self.disk.stat(&dir.join(name))?;
                usage.other_bytes += stat.map_or(0, |stat| stat.disk);
            }
        }
        Ok(usage)
    }

    /// Bytes that are free on the file system of the store.
    ///
    /// # Errors
    /// What the disk says.
    pub fn free_bytes(&self) -> Result<u64> {
        Ok(self.disk.space(&self.root)?.free)
    }

    /// Whether less is free there than is to stay free.
    ///
    /// # Errors
    /// What the disk says.
    pub fn is_short(&self) -> Result<bool> {
        Ok(self.free_bytes()? < self.config.min_free.0)
    }

    /// The space on the file system of the store.
    ///
    /// # Errors
    /// What the disk says.
    pub fn space(&self) -> Result<Space> {
        Ok(self.disk.space(&self.root)?)
    }

    /// Calls `each` for every complete object.
    pub(super) fn each_object(
        &self,
        each: impl FnMut(Digest, PathBuf, Stat) -> Result<()>,
    ) -> Result<()> {
        self.each_sharded(&self.root.join("objects/sha256"), each)
    }

    /// Calls `each` for every file `dir/ab/<hex>`; other names are not ours.
    pub(super) fn each_sharded(
        &self,
        dir: &Path,
        mut each: impl FnMut(Digest, PathBuf, Stat) -> Result<()>,
    ) -> Result<()> {
        for shard in self.disk.list(dir)? {
            for (digest, path) in self.sharded(&dir.join(shard))? {
                if let Some(stat) = self.disk.stat(&path)? {
                    each(digest, path, stat)?;
                }
            }
        }
        Ok(())
    }

    /// The files `<hex>` in `shard`, whose own name has two digits.
    pub(super) fn sharded(&self, shard: &Path) -> Result<Vec<(Digest, PathBuf)>> {
        // Other names are not ours, whatever they are.
        if shard.file_name().is_none_or(|name| name.len() != 2) {
            return Ok(Vec::new());
        }
        let names = match self.disk.list(shard) {
            Err(error) if error.errno() == Some(libc::ENOTDIR) => return Ok(Vec::new()),
            names => names?,
        };
        let ours = |name: std::ffi::OsString| {
            let digest = Digest::from_hex(name.to_str()?).ok()?;
            Some((digest, shard.join(name)))
        };
        Ok(names.into_iter().filter_map(ours).collect())
    }

    /// Refuses what cannot fit, evicting first where that helps; the guard holds the reservation.
    /// The artifact should be recorded, and held while it arrives. Reservations of this process
    /// count, those of others show as they fill the disk. The store is walked only where
    /// `max_bytes` is set or something must be evicted.
    ///
    /// # Errors
    /// [`StoreErrorKind::NoSpace`] with the arithmetic; nothing was evicted then.
    pub fn admit(self: &Arc<Self>, artifact: &Artifact) -> Result<Reservation> {
        self.admit_with(artifact, &[], 0)
    }

    /// As [`Store::admit`], with `more` objects of its origin, and `bytes` as in [`Store::admit_bytes`].
    ///
    /// # Errors
    /// As [`Store::admit`].
    pub fn admit_with(
        self: &Arc<Self>,
        artifact: &Artifact,
        more: &[Object],
        bytes: u64,
    ) -> Result<Reservation> {
        self.admit_wanted(Wanted::of(artifact, more, bytes))
    }

    /// As [`Store::admit_with`], before an artifact is recorded that takes the place of what its reference means. That
    /// goes only where nothing else makes room, and is neither pinned nor held. What both have in
    /// common should be [kept](super::Import::keep) meanwhile.
    ///
    /// # Errors
    /// As [`Store::admit`].
    pub fn admit_instead(
        self: &Arc<Self>,
        artifact: &Artifact,
        more: &[Object],
    ) -> Result<Reservation> {
        match self.admit_with(artifact, more, 0) {
            Err(error) if error.kind() == StoreErrorKind::NoSpace => self.admit_wanted(Wanted {
                replaces: true,
                ..Wanted::of(artifact, more, 0)
            }),
            admitted => admitted,
        }
    }

    /// As [`Store::admit`], for `bytes` of content that is not known yet. `what` is a reference;
    /// its artifact is not evicted. See [`Store::import_within`].
    ///
    /// # Errors
    /// As [`Store::admit`].
    pub fn admit_bytes(self: &Arc<Self>, what: &str, bytes: u64) -> Result<Reservation> {
        self.admit_wanted(Wanted {
            reference: what.to_owned(),
            objects: BTreeMap::new(),
            bytes: AtomicU64::new(bytes),
            replaces: false,
        })
    }

    /// Reserves `more` bytes for what turns out larger than was reserved.
    ///
    /// # Errors
    /// As [`Store::admit`].
    pub(super) fn admit_more(self: &Arc<Self>, wanted: &Wanted, more: u64) -> Result<()> {
        let reserved = self.admit_bytes(&wanted.reference, more)?;
        wanted.bytes.fetch_add(more, Ordering::Relaxed);
        drop(reserved);
        Ok(())
    }

    fn admit_wanted(self: &Arc<Self>, wanted: Wanted) -> Result<Reservation> {
        let wanted = Arc::new(wanted);
        let mut reservations = self.reservations.lock();
        reservations.retain(|other| other.strong_count() > 0);
        let mut admitted: Vec<Arc<Wanted>> = Vec::new();
        admitted.extend(reservations.iter().filter_map(std::sync::Weak::upgrade));
        let mut objects = BTreeMap::new();
        let mut bytes = 0u64;
        for other in &admitted {
            objects.extend(other.objects.iter().map(|(id, size)| (*id, *size)));
            bytes = bytes.saturating_add(other.bytes());
        }
        let reserved = self.outstanding(&objects)?.saturating_add(bytes);
        objects.extend(wanted.objects.iter().map(|(id, size)| (*id, *size)));
        bytes = bytes.saturating_add(wanted.bytes());
        let needed = self.outstanding(&objects)?.saturating_add(bytes);
        if needed > 0 {
            self.need_writable()?;
            let mut room = self.room()?;
            if needed > room.available {
                admitted.push(Arc::clone(&wanted));
                let missing = needed - room.available;
                let could = self.evict(missing, &admitted, true)?;
                if could >= missing {
                    self.evict(missing, &admitted, false)?;
                    room = self.room_for(needed)?;
                }
                if needed > room.available {
                    // What arrives, and what is discarded, between the two looks.
                    let own = needed.saturating_sub(reserved);
                    return Err(self.too_large(&wanted.reference, own, reserved, room, could));
                }
            }
        }
        reservations.push(Arc::downgrade(&wanted));
        Ok(Reservation { wanted })
    }

    /// Bytes of `objects` that are not on the disk yet.
    fn outstanding(&self, objects: &BTreeMap<PartialId, u64>) -> Result<u64> {
        let mut sum = 0u64;
        for (id, size) in objects {
            if self.has_sized(&id.id, *size)? {
                continue;
            }
            let data = Paths::of(&self.partial_stem(id)).data;
            let there = self.disk.stat(&data)?.map_or(0, |stat| stat.disk);
            sum = sum.saturating_add(size.saturating_sub(there));
        }
        Ok(sum)
    }

    /// The room after an eviction. Some file systems show what was freed only after a while (XFS and btrfs
    /// free in the background): waits for that.
    fn room_for(&self, needed: u64) -> Result<Room> {
        let deadline = Instant::now() + SHOWS_LATE;
        let mut synced = false;
        loop {
            let room = self.room()?;
            if needed <= room.available || Instant::now() > deadline {
                return Ok(room);
            }
            if !std::mem::replace(&mut synced, true) {
                self.open_root()?.sync_fs()?;
                continue;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    fn room(&self) -> Result<Room> {
        let free = self.disk.space(&self.root)?.free;
        let mut available = free.saturating_sub(self.config.min_free.0);
        let mut used = None;
        if let Some(ByteSize(limit)) = self.config.max_bytes {
            let bytes = self.usage()?.bytes();
            available = available.min(limit.saturating_sub(bytes));
            used = Some(bytes);
        }
        Ok(Room {
            free,
            used,
            available,
        })
    }

    fn too_large(
        &self,
        reference: &str,
        own: u64,
        reserved: u64,
        room: Room,
        could: u64,
    ) -> StoreError {
        let mut message = format!("{reference} does not fit: needs {}", ByteSize(own));
        if reserved > 0 {
            message += &format!(" beside {} promised to others", ByteSize(reserved));
        }
        message += &format!(
            ", {} available ({} free on the file system of {}, of which {} stay free",
            ByteSize(room.available),
            ByteSize(room.free),
            self.root.display(),
            self.config.min_free
        );
        if let (Some(limit), Some(used)) = (self.config.max_bytes, room.used) {
            message += &format!("; {} of store.max_bytes {limit} used", ByteSize(used));
        }
        message += &format!("), could evict {}", ByteSize(could));
        let own = self.read_record(&self.record_path(reference));
        if let Ok(Some(record)) = own
            && record.previous.is_some()
            && !record.pins.is_empty()
        {
            message += "; its last generation stays while it is pinned";
        }
        // What is pinned is most often the answer; a list that cannot be read is not.
        let mut pinned: Vec<String> = self
            .records()
            .unwrap_or_default()
            .into_iter()
            .filter(|r| !r.pins.is_empty())
            .map(|r| r.reference)
            .collect();
        if !pinned.is_empty() {
            let more = pinned.len().saturating_sub(5);
            pinned.truncate(5);
            message += &format!("; pinned: {}", pinned.join(", "));
            if more > 0 {
                message += &format!(" and {more} more");
            }
        }
        StoreError::new(StoreErrorKind::NoSpace, message)
    }
}
