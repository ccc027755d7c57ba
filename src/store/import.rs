//! Imports: many files whose digests are known only at their end.
//!
//! ```text
//! <root>/imports/<salt>-<n>/kept      flock: held while the import lives; digests it relies on
//! <root>/imports/<salt>-<n>/<number>  content that has no name yet
//! ```
//!
//! Nothing leads to what an import brings until its caller records an artifact. So it lists what
//! it relies on, and a collection in any process keeps what is listed as if it were recorded.
//! Digests are listed, and looked for, under the shared records lock: a collection, which holds it
//! exclusively, sees the list before it removes, or is over before the import looks.
//! What a dead import left is removed by the next collection.

mod file;

pub use file::ImportFile;

use std::{
    collections::HashMap,
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use parking_lot::Mutex;

use super::{Reservation, Result, Store, StoreError, batch::Names, space::Wanted};
use crate::{
    digest::Digest,
    disk::{DiskFile, Open, Span, lock_file},
    metrics,
};

/// Content up to this many bytes waits in memory for its digest: if it is there already, nothing
/// is written.
const IN_MEMORY: u64 = 1 << 20;
/// After this many bytes a sync starts in the background, so that the last one is short.
const SYNC_EVERY: u64 = 256 << 20;
/// What a file costs a sync beside its bytes.
const FILE_COST: u64 = 16 << 10;
/// Files that may wait for their names; more are committed on the way.
const MAX_PENDING: usize = 1 << 16;

/// Stores files whose digests come out as they are written; durable in batches. What it has
/// stored or found stays in the store while it lives: drop it after an artifact that leads there
/// is recorded. What is not committed is gone with it.
#[derive(Debug)]
#[must_use = "dropped at once, it keeps nothing"]
pub struct Import {
    inner: Arc<Inner>,
}

/// What an import has brought so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Imported {
    /// Files finished.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Files among them whose content was not in the store.
    pub new_files: u64,
    /// Their bytes.
    pub new_bytes: u64,
    /// Files that stay on a tier.
    pub on_tiers: u64,
}

struct Inner {
    store: Arc<Store>,
    dir: PathBuf,
    /// Open since before the first write, to see every error of writing back.
    fs: Arc<dyn DiskFile>,
    temps: AtomicU64,
    room: Option<Arc<Wanted>>,
    state: Mutex<State>,
}

struct State {
    kept: Arc<dyn DiskFile>,
    kept_len: u64,
    /// Content under temporary names.
    pending: HashMap<Digest, Pending>,
    /// Relies on names that others gave, which may not be durable yet.
    found: bool,
    unsynced: u64,
    sync: Option<thread::JoinHandle<crate::disk::Result<()>>>,
    /// Why content under temporary names may be lost: nothing is committed any more.
    failed: Option<StoreError>,
    /// Memory for the next file.
    spare: Vec<u8>,
    done: Imported,
}

#[derive(Debug, Clone, Copy)]
struct Pending {
    temp: u64,
    size: u64,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Import")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Begins an import. Any number at a time; each is best used by one thread.
    ///
    /// # Errors
    /// [`ReadOnly`](super::StoreErrorKind::ReadOnly), [`NoSpace`](super::StoreErrorKind::NoSpace), and what the disk says.
    pub fn import(self: &Arc<Self>) -> Result<Import> {
        self.begin_import(None)
    }

    /// As [`Store::import`], on account of a reservation by [`Store::admit_bytes`]: bytes that
    /// arrive are not reserved any more.
    ///
    /// # Errors
    /// As [`Store::import`].
    pub fn import_within(self: &Arc<Self>, room: &Reservation) -> Result<Import> {
        self.begin_import(Some(room.wanted()))
    }

    fn begin_import(self: &Arc<Self>, room: Option<Arc<Wanted>>) -> Result<Import> {
        self.need_writable()?;
        let fs = self.open_root()?;
        let dir = self.import_dir();
        // A collection takes an import without a lock for dead.
        let _records = self.lock_records(Span::Shared)?;
        self.make_parent(&dir)?;
        self.disk.create_dir(&dir)?;
        let path = dir.join("kept");
        let kept = self.disk.open(&path, Open::Create)?;
        lock_file(kept.file(), Span::Exclusive, true)
            .map_err(|error| StoreError::io(path.display(), &error))?;
        let inner = Inner {
            store: Arc::clone(self),
            dir,
            fs,
            temps: AtomicU64::new(0),
            room,
            state: Mutex::new(State {
                kept,
                kept_len: 0,
                pending: HashMap::new(),
                found: false,
                unsynced: 0,
                sync: None,
                failed: None,
                spare: Vec::new(),
                done: Imported::default(),
            }),
        };
        Ok(Import {
            inner: Arc::new(inner),
        })
    }
}

impl Import {
    /// Keeps objects, and layer indexes, of these names from collection while the import lives;
    /// says for each whether the object is here. For what is taken over instead of imported.
    ///
    /// # Errors
    /// What the disk says.
    pub fn keep(&self, digests: &[Digest]) -> Result<Vec<bool>> {
        let store = &self.inner.store;
        let mut state = self.inner.state.lock();
        let _records = store.lock_records(Span::Shared)?;
        state.list(digests.iter())?;
        state.found = true;
        digests.iter().map(|digest| store.has(digest)).collect()
    }

    /// What it has brought so far.
    pub fn imported(&self) -> Imported {
        self.inner.state.lock().done
    }

    /// Makes everything that was finished durable, then complete. After a crash each file is
    /// complete or absent.
    ///
    /// # Errors
    /// [`NoSpace`](super::StoreErrorKind::NoSpace) and what the disk says. What could not be synced is dropped, and
    /// then the import is of no more use.
    pub fn commit(&self) -> Result<Imported> {
        let mut state = self.inner.state.lock();
        self.inner.commit(&mut state)?;
        Ok(state.done)
    }
}

impl State {
    /// Lists digests for collections to see; under the shared records lock.
    fn list<'d>(&mut self, digests: impl Iterator<Item = &'d Digest>) -> Result<()> {
        let bytes: Vec<u8> = digests.flat_map(Digest::as_bytes).copied().collect();
        self.kept.write_at(&bytes, self.kept_len)?;
        self.kept_len += bytes.len() as u64;
        Ok(())
    }

    fn usable(&self) -> Result<()> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// Waits for the sync in the background.
    fn end_sync(&mut self) -> Result<()> {
        let Some(sync) = self.sync.take() else {
            return Ok(());
        };
        let synced = sync
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        synced.map_err(|error| self.failed.insert(error.into()).clone())
    }
}

impl Inner {
    fn next_temp(&self) -> u64 {
        self.temps.fetch_add(1, Ordering::Relaxed)
    }

    fn temp_path(&self, temp: u64) -> PathBuf {
        self.dir.join(temp.to_string())
    }

    /// Something was written: starts a sync in the background where there is much to sync.
    fn wrote(&self, state: &mut State, cost: u64) -> Result<()> {
        state.usable()?;
        state.unsynced += cost;
        if state.unsynced < SYNC_EVERY {
            return Ok(());
        }
        match &state.sync {
            Some(sync) if !sync.is_finished() => return Ok(()),
            _ => state.end_sync()?,
        }
        state.unsynced = 0;
        let fs = Arc::clone(&self.fs);
        let sync = thread::Builder::new().name("hearth-sync".into());
        // Without it the last sync takes longer.
        state.sync = sync.spawn(move || fs.sync_fs()).ok();
        Ok(())
    }

    /// Whether the content is here already; it stays then.
    fn here(&self, state: &mut State, digest: &Digest, size: u64) -> Result<bool> {
        if state.pending.contains_key(digest) {
            return Ok(true);
        }
        let path = self.store.object_path(digest);
        let there = || {
            let stat = self.store.disk.stat(&path)?;
            Ok::<_, StoreError>(stat.is_some_and(|stat| stat.len == size))
        };
        if !there()? {
            // What is on a tier stays there.
            let found = self.store.stat_on_tiers(digest);
            let found = found.is_some_and(|stat| stat.len == size);
            state.done.on_tiers += u64::from(found);
            return Ok(found);
        }
        let _records = self.store.lock_records(Span::Shared)?;
        state.list([digest].into_iter())?;
        state.found = true;
        there()
    }

    fn commit(&self, state: &mut State) -> Result<()> {
        state.usable()?;
        let synced = state.end_sync().and_then(|()| {
            let temps = state.pending.values().map(|p| self.temp_path(p.temp));
            self.store.sync_contents(&*self.fs, temps)
        });
        if let Err(error) = synced {
            // The kernel has dropped what it could not write: a second sync would not say so.
            self.drop_pending(state);
            return Err(state.failed.insert(error).clone());
        }
        state.unsynced = 0;
        let relies_on_others = state.found;
        // Until the names are synced, whatever happens in between.
        state.found = true;
        let names = self.publish(state)?;
        match names.filter(|_| !relies_on_others) {
            Some(names) => names.sync(&*self.fs)?,
            None if relies_on_others => self.fs.sync_fs()?,
            None => {}
        }
        state.found = false;
        Ok(())
    }

    /// Gives synced content its names.
    fn publish(&self, state: &mut State) -> Result<Option<Names<'_>>> {
        let store = &self.store;
        let mut ready: Vec<(u64, Digest, u64)> = state
            .pending
            .iter()
            .map(|(digest, p)| (p.temp, *digest, p.size))
            .collect();
        if ready.is_empty() {
            return Ok(None);
        }
        ready.sort_unstable();
        let _records = store.lock_records(Span::Shared)?;
        state.list(ready.iter().map(|(_, digest, _)| digest))?;
        let paths = ready.iter().map(|(_, digest, _)| store.object_path(digest));
        let dirs = paths.filter_map(|path| path.parent().map(ToOwned::to_owned));
        let names = Names::new(store, dirs.collect())?;
        for (temp, digest, size) in &ready {
            names.object(&self.temp_path(*temp), &store.object_path(digest), *size)?;
            state.pending.remove(digest);
            metrics::global().store_objects_completed.add(1);
        }
        Ok(Some(names))
    }

    fn drop_pending(&self, state: &mut State) {
        for (_, pending) in state.pending.drain() {
            // What cannot be removed goes with the next collection.
            let _ = self.store.disk.unlink(&self.temp_path(pending.temp));
        }
    }
}

impl Drop for Inner {
    /// Removes what was not committed. Best effort: the rest goes with the next collection.
    fn drop(&mut self) {
        let mut state = self.state.lock();
        if let Some(sync) = state.sync.take() {
            let _ = sync.join();
        }
        self.drop_pending(&mut state);
        let disk = &self.store.disk;
        let _ = disk.unlink(&self.dir.join("kept"));
        let _ = disk.remove_dir(&self.dir);
    }
}
