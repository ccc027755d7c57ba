//! Inodes whose pages in the kernel turned out wrong.
//!
//! To drop pages the kernel waits for those that are being read, so for answers of this process,
//! which may themselves wait until the content has been fetched again. So whoever finds content wrong
//! only notes it here; threads of their own do the waiting, and until they are done no open may keep
//! what the kernel holds.

use std::collections::{HashMap, VecDeque};

use parking_lot::Mutex;

/// Threads at once. One would do, but then one slow origin would hold up the others.
const WORKERS: usize = 16;

/// The inodes whose pages are to be dropped.
#[derive(Default)]
pub(super) struct Stale(Mutex<State>);

#[derive(Default)]
struct State {
    /// Not begun; no inode twice.
    queue: VecDeque<u64>,
    /// Queued or begun, and how often.
    pending: HashMap<u64, usize>,
    workers: usize,
}

impl Stale {
    /// Notes `ino`; true where the caller has to start a thread for [`Stale::drain`].
    #[must_use]
    pub(super) fn add(&self, ino: u64) -> bool {
        let mut state = self.0.lock();
        // What has begun may have passed pages that have come since.
        if state.queue.contains(&ino) {
            return false;
        }
        state.queue.push_back(ino);
        *state.pending.entry(ino).or_default() += 1;
        let start = state.workers < WORKERS;
        state.workers += usize::from(start);
        start
    }

    /// Whether the kernel may hold wrong pages of `ino`.
    pub(super) fn has(&self, ino: u64) -> bool {
        self.0.lock().pending.contains_key(&ino)
    }

    /// Calls `drop_pages` for what is noted, until nothing is left.
    pub(super) fn drain(&self, drop_pages: impl Fn(u64)) {
        while let Some(ino) = self.next() {
            drop_pages(ino);
            let mut state = self.0.lock();
            if let Some(times) = state.pending.get_mut(&ino) {
                *times -= 1;
                if *times == 0 {
                    state.pending.remove(&ino);
                }
            }
        }
    }

    fn next(&self) -> Option<u64> {
        let mut state = self.0.lock();
        let next = state.queue.pop_front();
        if next.is_none() {
            state.workers -= 1;
        }
        next
    }

    /// The thread that was asked for could not be started; what is noted stays so.
    pub(super) fn no_thread(&self) {
        self.0.lock().workers -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_while_pages_are_dropped_is_done_again() {
        let stale = Stale::default();
        assert!(stale.add(7));
        assert!(!stale.add(7), "queued already");
        let done = Mutex::new(Vec::new());
        stale.drain(|ino| {
            if done.lock().is_empty() {
                assert!(stale.add(7), "another thread would help");
                stale.no_thread();
            }
            assert!(stale.has(7) && !stale.has(8));
            done.lock().push(ino);
        });
        assert_eq!(*done.lock(), [7, 7]);
        assert!(!stale.has(7));
        let state = stale.0.lock();
        assert!(state.workers == 0 && state.pending.is_empty() && state.queue.is_empty());
    }

    #[test]
    fn threads_are_bounded() {
        let stale = Stale::default();
        let started = (0..100).filter(|&ino| stale.add(ino)).count();
        assert_eq!(started, WORKERS);
    }
}
