//! Leases: the right to fill chunks.

use std::{collections::BTreeSet, ops::Range, sync::Arc};

use parking_lot::Mutex;

use super::{Partial, Result, StoreError, StoreErrorKind};
use crate::chunk;

/// How [`Lease::commit`] writes: past the page cache (nobody reads it now) or through it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WriteMode {
    /// `O_DIRECT` where memory, offset and length are multiples of 4096 and the file system can;
    /// the rest through the page cache.
    Direct,
    /// Through the page cache.
    Cached,
}

/// The right to fill a run of chunks, held by nobody else in any process; dropped = given back.
#[derive(Debug)]
#[must_use = "dropped at once, it gives its chunks back"]
pub struct Lease {
    partial: Arc<Partial>,
    chunks: Range<u64>,
    /// Chunks that were or are being written: none is written twice. So a present chunk is never
    /// written, and an object whose chunks are all present has no writer.
    started: Mutex<BTreeSet<u64>>,
}

impl Lease {
    pub(super) fn new(partial: Arc<Partial>, chunks: Range<u64>) -> Self {
        let started = Mutex::default();
        Self {
            partial,
            chunks,
            started,
        }
    }

    /// The object.
    pub fn partial(&self) -> &Arc<Partial> {
        &self.partial
    }

    /// The chunks.
    pub fn chunks(&self) -> Range<u64> {
        self.chunks.clone()
    }

    /// Writes whole chunks from `first` on (`data` ends at a chunk boundary or at the object's
    /// end) and marks them present. In any order, from several threads; each chunk once. The lease
    /// stays until it is dropped.
    ///
    /// # Errors
    /// [`StoreErrorKind::NoSpace`] and what the disk says: the chunks stay absent and leased.
    /// [`StoreErrorKind::Invalid`] for data that is not whole chunks of this lease, or chunks that
    /// were committed before.
    pub fn commit(&self, first: u64, data: &[u8], mode: WriteMode) -> Result<()> {
        let size = self.partial.size();
        let len = data.len() as u64;
        let done = first..first.saturating_add(chunk::count(len));
        let bytes = chunk::run_bytes(&done, size);
        let within = self.chunks.start <= first && done.end <= self.chunks.end;
        if !within || bytes.end - bytes.start != len {
            let message = format!(
                "object {}: {len} bytes at chunk {first} are not whole chunks of the run {:?}",
                self.partial.id(),
                self.chunks
            );
            return Err(StoreError::new(StoreErrorKind::Invalid, message));
        }
        let mut started = self.started.lock();
        if started.range(done.clone()).next().is_some() {
            let message = format!(
                "object {}: chunks {done:?} are committed twice",
                self.partial.id()
            );
            return Err(StoreError::new(StoreErrorKind::Invalid, message));
        }
        started.extend(done.clone());
        drop(started);
        self.partial.fill(&done, data, mode).inspect_err(|_| {
            let mut started = self.started.lock();
            done.for_each(|index| {
                started.remove(&index);
            });
        })
    }

    /// Splits the chunks from `at` on off, into a lease of their own.
    pub fn split_off(&mut self, at: u64) -> Lease {
        let at = at.clamp(self.chunks.start, self.chunks.end);
        let tail = at..self.chunks.end;
        self.partial.split(&self.chunks, at);
        self.chunks.end = at;
        let started = self.started.get_mut().split_off(&at);
        Self {
            partial: Arc::clone(&self.partial),
            chunks: tail,
            started: Mutex::new(started),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.partial.release(&self.chunks);
    }
}
