//! Files that the kernel read by itself and of which the last handle is gone: they stay open, and registered, for a
//! moment. Programs open the same ones again and again, each of their workers all of its libraries.
//!
//! Bounded in number, for all mounts of a process, and in time. A successor closes what it finds here.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::{Slot, State, Whole};
use crate::limits;

/// How long they stay.
pub(super) const STAY: Duration = Duration::from_secs(10);
/// Most of them in this process, and which part of the files that it may have open.
pub(super) const MOST: usize = 8192;
const SHARE: u64 = 4;

/// The idle files of a mount, by inode.
pub(super) struct Idle<B> {
    files: HashMap<u64, (u64, File<B>)>,
    /// Their inodes, and when they were let go, in that order.
    order: BTreeMap<u64, (u64, Instant)>,
    next: u64,
    /// Somebody closes them when their time has come.
    pub(super) swept: bool,
}

/// An open file without handles.
pub(super) struct File<B> {
    pub(super) backing: Arc<B>,
    pub(super) whole: Arc<dyn Whole>,
    /// Of a backing id that is being closed.
    pub(super) slot: Slot,
}

impl<B> File<B> {
    pub(super) fn close(self, state: &State) {
        drop((self.backing, self.whole));
        state.done(self.slot);
    }
}

impl<B> Default for Idle<B> {
    fn default() -> Self {
        Self {
            files: HashMap::new(),
            order: BTreeMap::new(),
            next: 0,
            swept: false,
        }
    }
}

impl<B> Idle<B> {
    /// Keeps a file; what must be closed for it, which is itself where there is no room: of more files than that, read one
    /// after the other again and again, those that came first are worth most.
    pub(super) fn put(&mut self, ino: u64, file: File<B>) -> [Option<File<B>>; 2] {
        let before = self.take(ino);
        if !place() {
            return [before, Some(file)];
        }
        self.order.insert(self.next, (ino, Instant::now()));
        self.files.insert(ino, (self.next, file));
        self.next += 1;
        [before, None]
    }

    pub(super) fn take(&mut self, ino: u64) -> Option<File<B>> {
        let (at, file) = self.files.remove(&ino)?;
        self.order.remove(&at);
        TAKEN.fetch_sub(1, Relaxed);
        Some(file)
    }

    /// One that was let go before `time`.
    pub(super) fn expired(&mut self, time: Instant) -> Option<File<B>> {
        let (_, &(ino, since)) = self.order.first_key_value()?;
        (since <= time).then(|| self.take(ino)).flatten()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }
}

impl<B> Drop for Idle<B> {
    fn drop(&mut self) {
        TAKEN.fetch_sub(self.files.len(), Relaxed);
    }
}

/// Idle files in this process.
static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// Takes a place for one more, where there is one.
fn place() -> bool {
    static MOST_HERE: OnceLock<usize> = OnceLock::new();
    let most = *MOST_HERE.get_or_init(|| {
        let share = limits::open_files() / SHARE;
        usize::try_from(share).map_or(MOST, |share| share.min(MOST))
    });
    let more = |taken: usize| (taken < most).then_some(taken + 1);
    TAKEN.fetch_update(Relaxed, Relaxed, more).is_ok()
}
