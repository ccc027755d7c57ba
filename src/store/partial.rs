//! An object on its way: sparse data, the chunks that are here, who may write which.
//!
//! Locks, in the order in which they are taken: the records lock (to finish), the partials lock of the store (files come and go),
//! then the state lock of one object (map, generation, finished), then the claims of this process.
//! Between processes the locks of an object are spans of its data file: byte `i` is chunk `i`,
//! `STATE` and `USED` lie beyond any file. Each process has the data open once, and shares `USED`
//! while it does.

mod claims;
mod files;
mod read;

pub(super) use files::Paths;
use files::{open_live, read_map, rebuild_live};

use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering, fence},
    },
};

use parking_lot::{Mutex, MutexGuard};

use super::{
    Complete, Result, Store, StoreError, StoreErrorKind,
    layout::FileLock,
    objects::check_digest,
    presence::{Bits, Live, Scope},
};
use crate::{
    chunk,
    digest::{Digest, ObjectId, PartialId},
    disk::{DiskFile, Open, Span, lock_span, unlock_span},
};

/// Most bytes of an object: what ext4 allows for a file.
pub const MAX_OBJECT: u64 = 16 << 40;

/// Held while the map, the generation or the state changes.
const STATE: Range<u64> = 1 << 60..(1 << 60) + 1;
/// Shared by every process that has the object open; exclusive for the only one.
const USED: Range<u64> = (1 << 60) + 1..(1 << 60) + 2;

/// An object that is not complete yet: sparse data, and a map of present chunks.
#[derive(Debug)]
pub struct Partial {
    store: Arc<Store>,
    id: ObjectId,
    size: u64,
    paths: Paths,
    data: Arc<dyn DiskFile>,
    /// The data again, past the page cache, where the file system can.
    direct: Option<Arc<dyn DiskFile>>,
    direct_works: AtomicBool,
    live: Live,
    state: Mutex<()>,
    /// Runs that leases of this process hold: start -> end.
    claims: Mutex<BTreeMap<u64, u64>>,
}

/// The state lock of an object, against threads and processes.
struct StateLock<'p> {
    data: &'p File,
    _threads: MutexGuard<'p, ()>,
}

impl Drop for StateLock<'_> {
    fn drop(&mut self) {
        // Unlocking a span that we hold cannot fail in a way that leaves it locked for long: the
        // lock goes with the file.
        let _ = unlock_span(self.data, &STATE);
    }
}

impl Store {
    /// The partial object, made if absent; one per id in a process. Where another process has just
    /// completed it, it is empty: look for [`Store::complete`] once more after a `partial` whose
    /// chunks are all absent.
    ///
    /// # Errors
    /// [`StoreErrorKind::Invalid`] for a size that is not the one in use or larger than
    /// [`MAX_OBJECT`], [`StoreErrorKind::ReadOnly`], [`StoreErrorKind::NoSpace`], and what the disk says.
    pub fn partial(self: &Arc<Self>, id: impl Into<PartialId>, size: u64) -> Result<Arc<Partial>> {
        let id = id.into();
        let missing = || {
            let message = format!("partial object {} was not made", id.id);
            StoreError::new(StoreErrorKind::NotFound, message)
        };
        self.open_partial(&id, size, true)?.ok_or_else(missing)
    }

    /// As [`Store::partial`], but `None` for one that is absent and not to be made: what was completed
    /// a moment ago gets no files again.
    fn open_partial(
        self: &Arc<Self>,
        id: &PartialId,
        size: u64,
        make: bool,
    ) -> Result<Option<Arc<Partial>>> {
        self.need_writable()?;
        let mut partials = self.partials.lock();
        if let Some(open) = partials.get(id).and_then(std::sync::Weak::upgrade)
            && !open.live.finished()
        {
            return match open.size == size {
                true => Ok(Some(open)),
                false => Err(other_size(&id.id, size)),
            };
        }
        let Some(partial) = Partial::open(self, id, size, make)? else {
            return Ok(None);
        };
        let partial = Arc::new(partial);
        if partials.len() % 64 == 63 {
            partials.retain(|_, open| open.strong_count() > 0);
        }
        partials.insert(*id, Arc::downgrade(&partial));
        Ok(Some(partial))
    }

    /// Bytes of an object that are in present chunks; 0 where nothing of it is on its way.
    pub fn present_bytes(self: &Arc<Self>, id: impl Into<PartialId>, size: u64) -> u64 {
        self.present_within(id, size, &(0..size))
    }

    /// As [`Store::present_bytes`], of a part of it.
    pub fn present_within(
        self: &Arc<Self>,
        id: impl Into<PartialId>,
        size: u64,
        part: &Range<u64>,
    ) -> u64 {
        let id = id.into();
        // Most have none: not worth the locks.
        let paths = Paths::of(&self.partial_stem(&id));
        match self.disk.stat(&paths.data) {
            Ok(Some(_)) => match self.open_partial(&id, size, false) {
                Ok(Some(partial)) => partial.present_within(part),
                _ => 0,
            },
            _ => 0,
        }
    }

    /// Removes the files of a partial object that nobody has open; bytes freed, or `None` where
    /// someone has.
    pub(super) fn remove_partial(&self, stem: &Path, dry_run: bool) -> Result<Option<u64>> {
        let paths = Paths::of(stem);
        let _structure = self.lock_partials()?;
        let mut freed = 0;
        if let Some(stat) = self.disk.stat(&paths.data)? {
            let data = self.disk.open(&paths.data, Open::Write)?;
            let fail = |e| StoreError::io(paths.data.display(), &e);
            if !lock_span(data.file(), &USED, Span::Exclusive, false).map_err(fail)? {
                return Ok(None);
            }
            freed = stat.disk;
        }
        if !dry_run {
            for path in [&paths.map, &paths.live, &paths.data] {
                self.disk.unlink(path)?;
            }
        }
        Ok(Some(freed))
    }
}

impl Partial {
    fn open(store: &Arc<Store>, name: &PartialId, size: u64, make: bool) -> Result<Option<Self>> {
        let id = &name.id;
        if size > MAX_OBJECT {
            let message = format!("object {id} of {size} bytes is larger than a file can be");
            return Err(StoreError::new(StoreErrorKind::Invalid, message));
        }
        let disk = &store.disk;
        let paths = Paths::of(&store.partial_stem(name));
        // Until this is done no other process opens, finishes or removes a partial object.
        let _structure = store.lock_partials()?;
        if disk.stat(&paths.data)?.is_none() {
            if !make {
                return Ok(None);
            }
            // What an earlier object of this name left: it says nothing about the new file.
            store.forget_presence(&paths)?;
        }
        let data = disk.open(&paths.data, Open::Create)?;
        let fail = |e| StoreError::io(paths.data.display(), &e);
        let sole = lock_span(data.file(), &USED, Span::Exclusive, false).map_err(fail)?;
        let stat = data.stat()?;
        if stat.len != size {
            if !sole {
                return Err(other_size(id, size));
            }
            store.forget_presence(&paths)?;
            data.set_len(size)?;
        }
        let scope = Scope {
            id: *id,
            size,
            boot: store.boot,
            inode: stat.inode,
        };
        let live = match open_live(store, &paths, &scope) {
            // Nobody else has it: as good as none.
            Err(error) if sole => {
                tracing::warn!(object = %id, %error, "the chunk words cannot be read: made anew");
                None
            }
            live => live?,
        };
        let live = match live {
            Some(live) => live,
            None if sole => rebuild_live(store, &paths, &scope)?,
            None => {
                let path = paths.live.display();
                let message =
                    format!("{path} is damaged while another process fetches object {id}");
                return Err(StoreError::new(StoreErrorKind::Damaged, message));
            }
        };
        if sole {
            // Set by a process that died between saying so and doing it.
            live.set_finished(false);
        }
        lock_span(data.file(), &USED, Span::Shared, true).map_err(fail)?;
        let direct = disk.open(&paths.data, Open::Direct).ok();
        Ok(Some(Self {
            store: Arc::clone(store),
            id: *id,
            size,
            paths,
            data,
            direct_works: AtomicBool::new(direct.is_some()),
            direct,
            live,
            state: Mutex::default(),
            claims: Mutex::default(),
        }))
    }

    /// Its id.
    pub fn id(&self) -> &ObjectId {
        &self.id
    }

    /// Its size when complete, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.live.count()
    }

    /// The data, open for reading: bytes of absent chunks read as anything.
    pub fn file(&self) -> &File {
        self.data.file()
    }

    /// Whether the chunk is here. Cheap: one load.
    #[inline]
    pub fn present(&self, chunk: u64) -> bool {
        self.live.present(chunk)
    }

    /// Changes whenever chunks that were here are absent again: then what was read before says
    /// nothing of what is here now.
    pub fn generation(&self) -> u32 {
        self.live.generation()
    }

    /// Whether all of `chunks` are here.
    pub fn all_of(&self, chunks: Range<u64>) -> bool {
        self.first_missing(chunks).is_none()
    }

    /// Whether all chunks are here.
    pub fn all_present(&self) -> bool {
        self.all_of(0..self.chunks())
    }

    /// The first chunk within `chunks` that is not here.
    pub fn first_missing(&self, chunks: Range<u64>) -> Option<u64> {
        let end = chunks.end.min(self.chunks());
        (chunks.start..end).find(|&index| !self.present(index))
    }

    /// The chunks within `chunks` that are not here.
    pub fn missing(&self, chunks: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let end = chunks.end.min(self.chunks());
        (chunks.start..end).filter(|&index| !self.present(index))
    }

    /// The run of present chunks that starts at `from`; empty where that one is absent.
    pub fn present_run(&self, from: u64) -> Range<u64> {
        let end = self.first_missing(from..self.chunks());
        from..end.unwrap_or(self.chunks().max(from))
    }

    /// Bytes in present chunks. Looks at every chunk.
    pub fn present_bytes(&self) -> u64 {
        self.present_within(&(0..self.size))
    }

    /// As [`Partial::present_bytes`], of a part of it.
    pub fn present_within(&self, part: &Range<u64>) -> u64 {
        let present = chunk::covering(part).filter(|&index| self.present(index));
        present
            .map(|index| chunk::bytes(index, self.size))
            .map(|bytes| bytes.end.min(part.end) - bytes.start.max(part.start))
            .sum()
    }

    /// The complete object, once this or another process has finished it; the data file of this
    /// partial stays readable. One load while it is unfinished.
    ///
    /// # Errors
    /// As [`Store::complete`]; [`StoreErrorKind::NotFound`] where it was finished and removed since.
    pub fn completed(&self) -> Result<Option<Arc<Complete>>> {
        match self.live.finished() {
            true => self.done().map(Some),
            false => Ok(None),
        }
    }

    /// The complete object of what is finished.
    fn done(&self) -> Result<Arc<Complete>> {
        let complete = self.store.complete_sized(&self.id, self.size)?;
        complete.ok_or_else(|| {
            let message = format!("object {} was completed and removed since", self.id);
            StoreError::new(StoreErrorKind::NotFound, message)
        })
    }

    /// Reserves disk space for the whole object (fallocate).
    ///
    /// # Errors
    /// [`StoreErrorKind::NoSpace`], and what the disk says.
    pub fn allocate(&self) -> Result<()> {
        Ok(self.data.allocate(self.size)?)
    }

    /// Makes all present chunks durable: data sync, then map by temp + rename. Chunks committed
    /// meanwhile may or may not be among them.
    ///
    /// # Errors
    /// What the disk says. Where the sync failed, every chunk that was not durable before is
    /// absent again: the kernel has dropped its pages.
    pub fn checkpoint(&self) -> Result<()> {
        loop {
            let generation = self.live.generation();
            let here = self.live.snapshot();
            if self.durable()?.holds_all_of(&here) {
                return Ok(());
            }
            self.sync()?;
            let _state = self.lock_state()?;
            if self.live.finished() {
                return Ok(());
            }
            if self.live.generation() != generation {
                continue;
            }
            let mut map = self.durable()?;
            map.merge(&here);
            let bytes = map.map_file(&self.id, self.size);
            return self.store.write_durably(&self.paths.map, &bytes);
        }
    }

    /// All chunks present and the content of `generation` verified to be `digest` by the caller:
    /// becomes complete.
    /// Where equal content is stored already, that is kept and this dropped. Idempotent across
    /// processes.
    ///
    /// # Errors
    /// [`StoreErrorKind::Damaged`] where the id promises another digest: nothing changes, the caller
    /// should [`Partial::discard`]. [`StoreErrorKind::Invalid`] where chunks are absent or the
    /// generation is another by now, and what the disk says.
    pub fn finish(&self, digest: Digest, generation: u32) -> Result<Arc<Complete>> {
        check_digest(&self.id, &digest)?;
        if let Some(done) = self.completed()? {
            return Ok(done);
        }
        self.need_all()?;
        self.sync()?;
        // A collection must not take equal content away before our record leads to it.
        let _records = self.store.lock_records(Span::Shared)?;
        let structure = self.store.lock_partials()?;
        let state = self.lock_state()?;
        if self.live.finished() {
            drop((state, structure));
            return self.done();
        }
        if self.live.generation() != generation {
            let message = format!("object {} changed while it was verified", self.id);
            return Err(StoreError::new(StoreErrorKind::Invalid, message));
        }
        self.need_all()?;
        self.publish(digest, &structure, &state)
    }

    /// Gives the synced data its name among the objects. No lease is left, since all chunks are
    /// present; no other process opens it, since the partials are locked.
    fn publish(&self, digest: Digest, _: &FileLock, _: &StateLock<'_>) -> Result<Arc<Complete>> {
        let disk = &self.store.disk;
        let len = self.data.stat()?.len;
        if len != self.size {
            let path = self.paths.data.display();
            let message = format!("{path} is {len} bytes long, not {}", self.size);
            return Err(StoreError::new(StoreErrorKind::Damaged, message));
        }
        // First, so that a crash in between costs nothing: the record of a missing object is none.
        self.store.write_located(&self.id, &digest, self.size)?;
        let path = self.store.object_path(&digest);
        let kept = self.store.open_object(&digest, Some(self.size))?;
        let complete = match kept.filter(|object| object.size == self.size) {
            Some(object) => {
                // It may have been renamed here, by an attempt that failed since; or be on a tier.
                if disk.stat(&path)?.is_some() {
                    self.store.sync_parent(&path)?;
                }
                disk.unlink(&self.paths.data)?;
                Some(object)
            }
            None => {
                self.store.make_parent(&path)?;
                disk.rename(&self.paths.data, &path)?;
                self.data.set_mode(0o444)?;
                self.store.sync_parent(&path)?;
                self.store.open_object(&digest, None)?
            }
        };
        self.live.set_finished(true);
        disk.unlink(&self.paths.map)?;
        disk.unlink(&self.paths.live)?;
        complete.ok_or_else(|| {
            let message = format!("object {digest} was removed as soon as it was complete");
            StoreError::new(StoreErrorKind::NotFound, message)
        })
    }

    fn need_all(&self) -> Result<()> {
        let Some(first) = self.first_missing(0..self.chunks()) else {
            return Ok(());
        };
        let message = format!(
            "object {} cannot be completed: chunk {first} of {} is not here",
            self.id,
            self.chunks()
        );
        Err(StoreError::new(StoreErrorKind::Invalid, message))
    }

    /// The object is complete by another way: what is here of it is not needed. Does nothing where
    /// it is not complete.
    ///
    /// # Errors
    /// What the disk says.
    pub fn abandon(&self) -> Result<()> {
        let _structure = self.store.lock_partials()?;
        let _state = self.lock_state()?;
        let complete = || self.store.complete_sized(&self.id, self.size);
        if self.live.finished() || complete()?.is_none() {
            return Ok(());
        }
        self.live.set_finished(true);
        for path in [&self.paths.map, &self.paths.live, &self.paths.data] {
            self.store.disk.unlink(path)?;
        }
        Ok(())
    }

    /// The content of `generation` turned out wrong: all chunks absent again, durably. Does nothing
    /// where the generation is another by now: what was wrong is gone.
    ///
    /// # Errors
    /// [`StoreErrorKind::InUse`] where it is complete already, and what the disk says.
    pub fn discard(&self, generation: u32) -> Result<()> {
        let _state = self.lock_state()?;
        if self.live.finished() {
            let message = format!("object {} is complete: it cannot be discarded", self.id);
            return Err(StoreError::new(StoreErrorKind::InUse, message));
        }
        if self.live.generation() != generation {
            return Ok(());
        }
        // Before any chunk is written anew: the map must not speak of what will be half written.
        if self.store.disk.unlink(&self.paths.map)? {
            self.store.disk.sync_dir(&self.store.partial_dir())?;
        }
        self.make_absent(0..self.chunks());
        Ok(())
    }

    /// The disk does not give back a chunk of `generation`: it is absent again, durably. Does nothing
    /// where the generation is another by now, or the object complete.
    ///
    /// # Errors
    /// What the disk says.
    pub fn lose(&self, chunk: u64, generation: u32) -> Result<()> {
        let _state = self.lock_state()?;
        if self.live.finished() || self.live.generation() != generation {
            return Ok(());
        }
        let mut map = self.durable()?;
        if map.get(chunk) {
            map.clear(chunk);
            let bytes = map.map_file(&self.id, self.size);
            self.store.write_durably(&self.paths.map, &bytes)?;
        }
        self.make_absent(std::iter::once(chunk));
        Ok(())
    }

    /// The chunks that the map file says are durable.
    fn durable(&self) -> Result<Bits> {
        read_map(&self.store, &self.paths.map, &self.id, self.size)
    }

    /// Syncs the data. If that fails, what was not durable before is absent again.
    fn sync(&self) -> Result<()> {
        let Err(error) = self.data.sync_data() else {
            return Ok(());
        };
        let _state = self.lock_state()?;
        if !self.live.finished() {
            let durable = self.durable()?;
            self.make_absent((0..self.chunks()).filter(|&index| !durable.get(index)));
        }
        Err(error.into())
    }

    /// Makes chunks absent, in a generation of its own, which is odd. Before: whoever finds some of them
    /// gone sees another generation. After: nobody takes those that were still there for chunks of the
    /// generation that stays.
    fn make_absent(&self, chunks: impl Iterator<Item = u64>) {
        if self.live.generation().is_multiple_of(2) {
            self.live.next_generation();
        }
        // As in `fill`: who says of a chunk after this that it is here sees the generation.
        fence(Ordering::SeqCst);
        chunks.for_each(|index| self.live.clear(index));
        self.live.next_generation();
    }

    fn lock_state(&self) -> Result<StateLock<'_>> {
        let threads = self.state.lock();
        let data = self.data.file();
        lock_span(data, &STATE, Span::Exclusive, true)
            .map_err(|e| StoreError::io(self.paths.data.display(), &e))?;
        let lock = StateLock {
            data,
            _threads: threads,
        };
        // Whoever was making chunks absent died over it.
        if !self.live.generation().is_multiple_of(2) && !self.live.finished() {
            let durable = self.durable()?;
            self.make_absent((0..self.chunks()).filter(|&index| !durable.get(index)));
        }
        Ok(lock)
    }
}

fn other_size(id: &ObjectId, size: u64) -> StoreError {
    let message = format!("object {id} is being fetched with a size other than {size} bytes");
    StoreError::new(StoreErrorKind::Invalid, message)
}
