//! Reads of objects that are not complete: from memory, from the store, or as the bytes arrive.

use std::{
    cell::Cell,
    ops::Range,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{Handle, NOTHING_SERVED, State, Waiting};
use crate::{
    chunk::{self, CHUNK_SIZE},
    fetch::{Class, FetchError, FetchErrorKind, Inner, flight::Flight, safetensors::Tensors},
    store::{Lease, Partial},
};

/// How often to look whether another process has brought what it claimed.
const OTHER_PROCESS: Duration = Duration::from_millis(5);
/// How long a reader waits for what another process has claimed.
const OTHER_PROCESS_PATIENCE: Duration = Duration::from_millis(200);

/// For how long one that was slow is taken to be slow.
const SLOW_HOLDER: Duration = Duration::from_secs(5);

/// How often one who follows looks again, should nothing wake him.
const FOLLOW: Duration = Duration::from_millis(50);

impl Handle {
    /// The bytes from `offset` on, up to the end of their chunk, as soon as they are here. Asks
    /// nobody to bring them: whoever follows runs [`Handle::ensure`] beside it. They need not be
    /// verified yet. Empty at the end.
    ///
    /// # Errors
    /// Where the disk cannot be read.
    pub async fn follow(&self, offset: u64) -> Result<Bytes, FetchError> {
        let index = offset / CHUNK_SIZE;
        let end = (index.saturating_add(1) * CHUNK_SIZE).min(self.size());
        if offset >= end {
            return Ok(Bytes::new());
        }
        let mut data = vec![0; (end - offset) as usize];
        loop {
            let changed = self.changed_within(FOLLOW);
            let state = self.state.read().clone();
            match state {
                State::Complete(_) => return self.read_complete(offset, data.len()),
                State::Partial(partial) => {
                    if self.copy_piece(&partial, index, &(offset..end), &mut data)? {
                        return Ok(data.into());
                    }
                }
                State::Held(whole) => return Ok(whole.slice(offset as usize..end as usize)),
                State::Small | State::Streamed => {}
            }
            changed.await;
        }
    }

    /// Brings bytes that are likely to be read soon, after what is being waited for. On return they
    /// are here, or on their way by somebody else's doing. All of a small object is brought.
    ///
    /// # Errors
    /// As [`Handle::read`].
    pub async fn prefetch(self: &Arc<Self>, bytes: Range<u64>) -> Result<(), FetchError> {
        self.expect_reads();
        let state = self.state.read().clone();
        let partial = match state {
            State::Small => return self.small(Class::Readahead).await.map(drop),
            State::Partial(partial) => partial,
            State::Complete(_) | State::Held(_) | State::Streamed => return Ok(()),
        };
        let engine = self.engine()?;
        let wanted = chunk::covering(&(bytes.start..bytes.end.min(self.size())));
        let mut from = wanted.start;
        while let Some(missing) = (from..wanted.end).find(|&c| !partial.present(c)) {
            let lease = partial.claim(missing..wanted.end);
            let Some(lease) = lease.map_err(|e| FetchError::store(self, &e))? else {
                return Ok(());
            };
            from = lease.chunks().end;
            let flight = self.launch(&engine, lease, Class::Readahead);
            while !flight.is_done() {
                let changed = self.changed_within(FOLLOW);
                if !flight.is_done() {
                    changed.await;
                }
            }
            if let Some(error) = flight.failure() {
                return Err(error.clone());
            }
        }
        Ok(())
    }

    /// Notes a read of what is present or on its way, and reads ahead of streams.
    pub(super) fn note(&self, bytes: &Range<u64>, partial: &Arc<Partial>) {
        let hint = self.tensor_hint(bytes, partial);
        let ahead = self.streams.lock().note(bytes, self.size(), hint);
        if let Some(ahead) = ahead
            && let (Some(engine), Some(me)) = (self.engine.upgrade(), self.me.upgrade())
        {
            engine
                .queue
                .read_ahead(&engine, &me, partial, chunk::covering(&ahead));
        }
    }

    /// Where the tensor ends whose beginning is read here, if it is in a safetensors file.
    fn tensor_hint(&self, bytes: &Range<u64>, partial: &Partial) -> Option<u64> {
        let (file, known) = self.sections.lock().at(bytes.start)?;
        let tensors = match known {
            Some(known) => known,
            None => {
                let here = Cell::new(true);
                let parsed = Tensors::read(&file, |at, buf| {
                    let range = at..at + buf.len() as u64;
                    here.set(chunk::covering(&range).all(|c| partial.present(c)));
                    here.get() && partial.read_at(buf, at).is_ok()
                });
                let tensors = parsed.map(Arc::new);
                if tensors.is_some() || here.get() {
                    self.sections.lock().found(file.start, tensors.clone());
                }
                tensors
            }
        };
        tensors?.end_of_start_in(bytes)
    }

    /// Fills `data` with `bytes`, chunk by chunk, as they arrive.
    pub(super) async fn fill(
        self: &Arc<Self>,
        partial: &Arc<Partial>,
        bytes: &Range<u64>,
        data: &mut [u8],
    ) -> Result<(), FetchError> {
        if self.avoids_disk() && !self.copy_present(partial, bytes, data).unwrap_or(false) {
            return Err(self.why_not_kept());
        }
        let mut carriers = self.demand(partial, chunk::covering(bytes))?;
        self.note(bytes, partial);
        let mut rest = data;
        for index in chunk::covering(bytes) {
            let whole = chunk::bytes(index, self.size());
            let piece = whole.start.max(bytes.start)..whole.end.min(bytes.end);
            let (now, later) = rest.split_at_mut((piece.end - piece.start) as usize);
            self.fill_piece(partial, index, piece, now, &mut carriers)
                .await?;
            rest = later;
        }
        Ok(())
    }

    /// Fills `out` with `piece` of chunk `index`: from the store, or from the buffer in which the
    /// chunk is arriving.
    async fn fill_piece(
        self: &Arc<Self>,
        partial: &Arc<Partial>,
        index: u64,
        piece: Range<u64>,
        out: &mut [u8],
        carriers: &mut Vec<Arc<Flight>>,
    ) -> Result<(), FetchError> {
        let _waiting = Waiting::new(&self.waiting);
        let mut elsewhere_since = None;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.strict() {
                // Found wrong meanwhile. A flight that is over has its chunks for as long as anybody knows
                // it: whoever fetches them again would wait for that.
                carriers.clear();
                let complete = self.ensure(Class::Demand).await?;
                use std::os::unix::fs::FileExt as _;
                let read = complete.file().read_exact_at(out, piece.start);
                return read.map_err(|e| FetchError::new(self, FetchErrorKind::Disk, &e));
            }
            if self.copy_piece(partial, index, &piece, out)? {
                return Ok(());
            }
            carriers.retain(|f| !f.is_done() || f.failure().is_some());
            let carrier = carriers.iter().find(|f| f.covers(index));
            if let Some(error) = carrier.and_then(|f| f.failure()) {
                return Err(error.clone());
            }
            if let Some(flight) = carrier {
                // Its chunks were being written when it was asked to give this one up: once more.
                if let Some(lease) = flight.yield_from(index) {
                    let flight = self.cover(&self.engine()?, partial, lease, index + 1);
                    carriers.push(flight);
                }
                changed.await;
                continue;
            }
            *carriers = self.demand(partial, index..index + 1)?;
            if carriers.is_empty() {
                // Claimed, but not in this process; or just now landed.
                let since = *elsewhere_since.get_or_insert_with(Instant::now);
                let slow_since = *self.slow_holder.lock();
                let is_slow = slow_since.is_some_and(|since| since.elapsed() < SLOW_HOLDER);
                let patience = match is_slow {
                    true => OTHER_PROCESS,
                    false => OTHER_PROCESS_PATIENCE,
                };
                if since.elapsed() > patience {
                    // It may be slow, or stopped: no reader waits for that, and none twice.
                    if !is_slow {
                        *self.slow_holder.lock() = Some(Instant::now());
                    }
                    self.streamed.store(true, Ordering::Relaxed);
                    let data = self.receive(piece.clone(), Class::Demand).await?;
                    out.copy_from_slice(&data);
                    return Ok(());
                }
                let _ = tokio::time::timeout(OTHER_PROCESS, changed).await;
            }
        }
    }

    /// Fills `data` with `bytes` from memory and from the store; false where some are missing.
    pub(super) fn copy_present(
        &self,
        partial: &Partial,
        bytes: &Range<u64>,
        data: &mut [u8],
    ) -> Result<bool, FetchError> {
        let mut rest = data;
        for index in chunk::covering(bytes) {
            let whole = chunk::bytes(index, self.size());
            let piece = whole.start.max(bytes.start)..whole.end.min(bytes.end);
            let (now, later) = rest.split_at_mut((piece.end - piece.start) as usize);
            if !self.copy_piece(partial, index, &piece, now)? {
                return Ok(false);
            }
            rest = later;
        }
        Ok(true)
    }

    /// Fills `out` with `piece` of chunk `index`, if it is in memory or in the store.
    fn copy_piece(
        &self,
        partial: &Partial,
        index: u64,
        piece: &Range<u64>,
        out: &mut [u8],
    ) -> Result<bool, FetchError> {
        if self.served.load(Ordering::Relaxed) == NOTHING_SERVED {
            let generation = u64::from(partial.generation());
            // The first stays: another reader may be about to copy bytes of that.
            let _ = self.served.compare_exchange(
                NOTHING_SERVED,
                generation,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
        let start = index * CHUNK_SIZE;
        let within = (piece.start - start) as usize..(piece.end - start) as usize;
        let in_memory = self.in_memory.lock().get(&index).cloned();
        // Another process may have discarded them.
        if let Some((generation, buf)) = in_memory
            && generation == partial.generation()
            && let Some(arrived) = buf.filled().get(within)
        {
            out.copy_from_slice(arrived);
            return Ok(true);
        }
        if !partial.present(index) {
            return Ok(false);
        }
        let read = partial.read_at(out, piece.start);
        read.map_err(|e| FetchError::store(self, &e))?;
        Ok(true)
    }

    /// Sees to it that the missing chunks of `wanted` are on their way at demand priority, and
    /// says which flights bring them.
    fn demand(
        self: &Arc<Self>,
        partial: &Arc<Partial>,
        wanted: Range<u64>,
    ) -> Result<Vec<Arc<Flight>>, FetchError> {
        let mut carriers = Vec::new();
        let mut from = wanted.start;
        while let Some(missing) = (from..wanted.end).find(|&c| !partial.present(c)) {
            let carrier = self
                .flights
                .lock()
                .iter()
                .find(|f| f.brings(missing))
                .cloned();
            let lease = match carrier {
                Some(flight) => {
                    let lease = flight.yield_from(missing);
                    if lease.is_none() {
                        flight.hurry();
                        carriers.push(flight);
                    }
                    lease
                }
                None => partial
                    .claim(missing..wanted.end)
                    .map_err(|e| FetchError::store(self, &e))?,
            };
            from = missing + 1;
            if let Some(lease) = lease {
                let flight = self.cover(&self.engine()?, partial, lease, wanted.end);
                from = flight.end().max(from);
                carriers.push(flight);
            }
        }
        Ok(carriers)
    }

    /// Launches the part of `lease` below `end` as demand; the rest is for read-ahead.
    fn cover(
        self: &Arc<Self>,
        engine: &Arc<Inner>,
        partial: &Arc<Partial>,
        mut lease: Lease,
        end: u64,
    ) -> Arc<Flight> {
        let chunks = lease.chunks();
        if chunks.end > end && end > chunks.start {
            drop(lease.split_off(end));
            let flight = self.launch(engine, lease, Class::Demand);
            engine
                .queue
                .read_ahead(engine, self, partial, end..chunks.end);
            return flight;
        }
        self.launch(engine, lease, Class::Demand)
    }
}
