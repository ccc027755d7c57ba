//! Chunks that a sequential reader is about to read stay in memory for a moment after they were
//! stored: the reader gets them without the disk or the page cache in between.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use super::handle::Handle;

/// The newest chunks, oldest first; their buffers belong to their handles.
pub(super) struct Recent {
    queue: Mutex<VecDeque<(Weak<Handle>, u64)>>,
    most: usize,
}

impl Recent {
    /// Keeps at most `most` chunks.
    pub(super) fn new(most: usize) -> Self {
        Self {
            queue: Mutex::default(),
            most,
        }
    }

    /// Keeps a chunk that is in its handle's memory, in place of the oldest.
    pub(super) fn keep(&self, handle: &Arc<Handle>, index: u64) {
        let gone = {
            let mut queue = self.queue.lock();
            queue.push_back((Arc::downgrade(handle), index));
            (queue.len() > self.most)
                .then(|| queue.pop_front())
                .flatten()
        };
        forget(gone);
    }

    /// Lets go of everything.
    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.queue.lock());
        forget(all);
    }
}

fn forget(chunks: impl IntoIterator<Item = (Weak<Handle>, u64)>) {
    for (handle, index) in chunks {
        if let Some(handle) = handle.upgrade() {
            handle.forget(index);
        }
    }
}
