//! Claims and writes: who fills which chunks.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use super::Partial;
use crate::{
    chunk::CHUNK_SIZE,
    disk::{Span, conflict, lock_span, unlock_span},
    store::{Lease, Result, StoreError, WriteMode},
};

impl Partial {
    /// Claims the first run of absent and unclaimed chunks within `want`, up to its first present
    /// or claimed chunk. `None` where there is no such chunk: all are here or on their way.
    ///
    /// # Errors
    /// Where the system cannot lock.
    pub fn claim(self: &Arc<Self>, want: Range<u64>) -> Result<Option<Lease>> {
        let file = self.data.file();
        let fail = |e| StoreError::io(self.paths.data.display(), &e);
        let end = want.end.min(self.chunks());
        let mut from = want.start;
        let mut claims = self.claims.lock();
        if self.live.finished() {
            return Ok(None);
        }
        while let Some(mut run) = self.first_free(&claims, from..end) {
            from = loop {
                if lock_span(file, &run, Span::Exclusive, false).map_err(fail)? {
                    // Another process may have filled some of it between the look and the lock.
                    let Some(start) = self.first_missing(run.clone()) else {
                        unlock_span(file, &run).map_err(fail)?;
                        break run.end;
                    };
                    let stop = (start..run.end).find(|&index| self.present(index));
                    let free = start..stop.unwrap_or(run.end);
                    for rest in [run.start..free.start, free.end..run.end] {
                        if !rest.is_empty() {
                            unlock_span(file, &rest).map_err(fail)?;
                        }
                    }
                    claims.insert(free.start, free.end);
                    return Ok(Some(Lease::new(Arc::clone(self), free)));
                }
                match conflict(file, &run).map_err(fail)? {
                    Some(theirs) if theirs.start > run.start => run.end = theirs.start,
                    Some(theirs) => break theirs.end,
                    // Given back meanwhile.
                    None => {}
                }
            };
        }
        Ok(None)
    }

    /// The first run within `range` that is absent and not claimed in this process.
    fn first_free(&self, claims: &BTreeMap<u64, u64>, range: Range<u64>) -> Option<Range<u64>> {
        let mut start = range.start;
        loop {
            start = self.first_missing(start..range.end)?;
            match claims.range(..=start).next_back() {
                Some((_, &end)) if end > start => start = end,
                _ => break,
            }
        }
        let claimed = claims.range(start..range.end).next().map(|(&at, _)| at);
        let limit = claimed.unwrap_or(range.end);
        let present = (start..limit).find(|&index| self.present(index));
        Some(start..present.unwrap_or(limit))
    }

    /// Writes the data of whole chunks, then says that they are here. Where the object was
    /// discarded or lost pages meanwhile, that may have been these: they are written again.
    pub(in crate::store) fn fill(
        &self,
        chunks: &Range<u64>,
        data: &[u8],
        mode: WriteMode,
    ) -> Result<()> {
        let offset = chunks.start * CHUNK_SIZE;
        loop {
            let generation = self.generation();
            let done = match mode {
                WriteMode::Direct => self.write_direct(data, offset)?,
                WriteMode::Cached => 0,
            };
            if done < data.len() {
                self.data.write_at(&data[done..], offset + done as u64)?;
            }
            chunks.clone().for_each(|index| self.live.set(index));
            // Either `make_absent` clears these after this, or its generation is seen here.
            fence(Ordering::SeqCst);
            if self.generation() == generation {
                return Ok(());
            }
            chunks.clone().for_each(|index| self.live.clear(index));
        }
    }

    /// Writes what it can of `data` past the page cache, from its front; how many bytes.
    fn write_direct(&self, data: &[u8], offset: u64) -> Result<usize> {
        let align = crate::disk::DIRECT_ALIGN;
        let len = data.len() / align * align;
        let aligned =
            data.as_ptr().addr().is_multiple_of(align) && offset.is_multiple_of(align as u64);
        let Some(direct) = &self.direct else {
            return Ok(0);
        };
        if len == 0 || !aligned || !self.direct_works.load(Ordering::Relaxed) {
            return Ok(0);
        }
        match direct.write_at(&data[..len], offset) {
            Ok(()) => Ok(len),
            Err(error) if error.errno() == Some(libc::EINVAL) => {
                self.direct_works.store(false, Ordering::Relaxed);
                Ok(0)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Gives back the chunks of a lease.
    pub(in crate::store) fn release(&self, held: &Range<u64>) {
        if held.is_empty() {
            return;
        }
        let mut claims = self.claims.lock();
        claims.remove(&held.start);
        self.unlock_chunks(held);
    }

    /// Makes two claims of one.
    pub(in crate::store) fn split(&self, held: &Range<u64>, at: u64) {
        let mut claims = self.claims.lock();
        for part in [held.start..at, at..held.end] {
            if !part.is_empty() {
                claims.insert(part.start, part.end);
            }
        }
    }

    fn unlock_chunks(&self, chunks: &Range<u64>) {
        if let Err(error) = unlock_span(self.data.file(), chunks) {
            // Other processes will wait for these chunks until this one closes the file.
            tracing::warn!(object = %self.id, %error, "cannot give chunks back");
        }
    }
}
