//! Leases: the right to fill chunks.

use std::{ops::Range, sync::Arc};

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
}

impl Lease {
    pub(super) fn new(partial: Arc<Partial>, chunks: Range<u64>) -> Self {
        Self { partial, chunks }
    }

    /// The object.
    pub fn partial(&self) -> &Arc<Partial> {
        &self.partial
    }

    /// Chunks not committed yet.
    pub fn chunks(&self) -> Range<u64> {
        self.chunks.clone()
    }

    /// Writes whole chunks at the front of the lease (`data` ends at a chunk boundary or at the
    /// object's end), marks them present and gives them back.
    ///
    /// # Errors
    /// [`StoreErrorKind::NoSpace`] and what the disk says: the chunks stay absent and leased.
    /// [`StoreErrorKind::Invalid`] for data that is not whole chunks of this lease.
    pub fn commit(&mut self, data: &[u8], mode: WriteMode) -> Result<()> {
        let size = self.partial.size();
        let len = data.len() as u64;
        let count = chunk::count(len);
        let done = self.chunks.start..self.chunks.start.saturating_add(count);
        let bytes = chunk::run_bytes(&done, size);
        if done.end > self.chunks.end || bytes.end - bytes.start != len {
            let message = format!(
                "object {}: {len} bytes are not whole chunks of the run {:?}",
                self.partial.id(),
                self.chunks
            );
            return Err(StoreError::new(StoreErrorKind::Invalid, message));
        }
        self.partial.fill(&done, data, mode)?;
        self.partial.release(&self.chunks, &done);
        self.chunks.start = done.end;
        Ok(())
    }

    /// Gives back the chunks from `at` on.
    pub fn truncate(&mut self, at: u64) {
        let at = at.clamp(self.chunks.start, self.chunks.end);
        self.partial.give_back(&self.chunks, at);
        self.chunks.end = at;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.partial.release(&self.chunks, &self.chunks);
    }
}
