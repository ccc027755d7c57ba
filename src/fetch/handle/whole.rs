//! Whole objects: small ones in memory, large ones chunk by chunk; verified, then complete.

use std::{
    fs::File,
    ops::Range,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::StreamExt as _;

use super::{Handle, NOTHING_SERVED, State, Wrong, cannot_keep};
use crate::{
    chunk,
    digest::Digest,
    fetch::{
        Class, FetchError, FetchErrorKind, Inner,
        flight::LEAST_RATE,
        retry::{Retry, is_of_origin},
        small::Urgency,
        verify::{Verdict, judge_bytes},
    },
    metrics,
    source::{SourceError, SourceErrorKind},
    store::{Complete, Partial, StoreErrorKind},
};

/// How long content that was wrong twice is not fetched again; doubles each time.
const HOLD_OFF: Duration = Duration::from_secs(1);
const LONGEST_HOLD_OFF: Duration = Duration::from_secs(300);
/// How often one who waits for the store looks again, should nothing wake him.
const KEPT: Duration = Duration::from_millis(100);

impl Handle {
    /// The whole object, complete and verified.
    ///
    /// # Errors
    /// As [`Handle::read`]; [`FetchErrorKind::Corrupt`] where the content is wrong twice.
    pub async fn ensure(self: &Arc<Self>, class: Class) -> Result<Arc<Complete>, FetchError> {
        self.ensure_ranked(class, 0).await
    }

    /// As [`Handle::ensure`]; of the same class, what has the higher rank goes first.
    ///
    /// # Errors
    /// As [`Handle::ensure`].
    pub async fn ensure_ranked(
        self: &Arc<Self>,
        class: Class,
        rank: i8,
    ) -> Result<Arc<Complete>, FetchError> {
        let state = self.state.read().clone();
        let partial = match state {
            State::Complete(complete) => return Ok(complete),
            State::Small | State::Held(_) => {
                self.small(class).await?;
                self.kept().await;
                return self.complete().ok_or_else(|| self.why_not_kept());
            }
            State::Streamed => match self.find_place().await {
                Some(partial) => partial,
                None => return Err(self.why_not_kept()),
            },
            State::Partial(partial) => partial,
        };
        let mut lost = false;
        loop {
            // Before the look at the hold-off: content that is found wrong after it is another
            // generation, which this turn does not fetch.
            let generation = partial.generation();
            self.held_off()?;
            let engine = self.engine()?;
            self.reserve(&partial).await?;
            engine
                .queue
                .bring_all(self, &partial, generation, (class, rank))
                .await?;
            match self.finish(&partial).await {
                Ok(Some(complete)) => return Ok(complete),
                // Somebody else has found it wrong, or a part of it was lost: once is an accident.
                Ok(None) => match self.lost.lock().take() {
                    Some(error) if lost => return Err(error),
                    Some(_) => lost = true,
                    None => {}
                },
                Err(error)
                    if error.kind() == FetchErrorKind::Corrupt && !self.was_wrong_twice() =>
                {
                    tracing::warn!(object = %self.id(), %error, "fetching again");
                }
                // The disk has lost pages: once is an accident.
                Err(error)
                    if error.kind() == FetchErrorKind::Disk
                        && partial.generation() != generation
                        && !lost =>
                {
                    tracing::warn!(object = %self.id(), %error, "fetching again what the disk lost");
                    lost = true;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// All of it, for a reader: as [`Handle::ensure`], but a small object may still be on its way
    /// into the store.
    ///
    /// # Errors
    /// As [`Handle::ensure`].
    pub async fn bring(self: &Arc<Self>) -> Result<(), FetchError> {
        let is_small = matches!(&*self.state.read(), State::Small | State::Held(_));
        match is_small {
            true => self.small(Class::Demand).await.map(drop),
            false => self.ensure(Class::Demand).await.map(drop),
        }
    }

    /// Waits while it is on its way into the store.
    async fn kept(&self) {
        loop {
            let changed = self.changed_within(KEPT);
            if !matches!(&*self.state.read(), State::Held(_)) {
                return;
            }
            if let Some(engine) = self.engine.upgrade() {
                engine.small.hurry();
            }
            changed.await;
        }
    }

    /// Looks whether the object has become complete by another way: it came with something else.
    /// Blocks on the disk.
    ///
    /// # Errors
    /// What the store says.
    pub(in crate::fetch) fn look(&self) -> Result<Option<Arc<Complete>>, FetchError> {
        let failed = |e| FetchError::store(self, &e);
        if let Some(complete) = self.complete() {
            return Ok(Some(complete));
        }
        let store = &self.engine()?.store;
        let found = store
            .complete_sized(self.id(), self.size())
            .map_err(failed)?;
        let Some(complete) = found.filter(|complete| complete.size == self.size()) else {
            return Ok(None);
        };
        let state = self.state.read().clone();
        match state {
            State::Partial(partial) => {
                partial.abandon().map_err(failed)?;
                self.completed(&complete, &partial);
            }
            _ => {
                *self.state.write() = State::Complete(Arc::clone(&complete));
                self.wake();
            }
        }
        Ok(Some(complete))
    }

    /// Whether all that readers can have been served is what `complete` has. Where that cannot be told
    /// it is not.
    fn served_as_in(&self, complete: &Complete, partial: &Partial) -> bool {
        // Past the store: nobody has verified that.
        if self.streamed.load(Ordering::Relaxed) {
            return false;
        }
        let served = self.served.load(Ordering::Relaxed);
        if served == NOTHING_SERVED {
            return true;
        }
        // Another process has found what was served wrong.
        if served != u64::from(partial.generation()) {
            return false;
        }
        // A chunk may have been served in part from a body that broke, and come from another since.
        if self.torn.load(Ordering::Relaxed) {
            return false;
        }
        let inode = |file: &File| file.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
        if inode(complete.file()).is_some_and(|one| inode(partial.file()) == Some(one)) {
            return true;
        }
        // It came by another way: nobody has verified what was served, and now nobody will.
        // Pieces of chunks that are not in the store may have been served, too.
        if !self.in_memory.lock().is_empty() {
            return false;
        }
        let (mut here, mut there) = (Vec::new(), Vec::new());
        (0..partial.chunks())
            .filter(|&index| partial.present(index))
            .all(|index| {
                let bytes = chunk::bytes(index, self.size());
                let len = (bytes.end - bytes.start) as usize;
                here.resize(len, 0);
                there.resize(len, 0);
                let read = complete.file().read_exact_at(&mut there, bytes.start);
                partial.read_at(&mut here, bytes.start).is_ok() && read.is_ok() && here == there
            })
    }

    /// Receives `bytes` of the object into memory, with retries.
    pub(super) async fn receive(
        &self,
        bytes: Range<u64>,
        class: Class,
    ) -> Result<Bytes, FetchError> {
        let engine = self.engine()?;
        let _demand = (class == Class::Demand).then(|| engine.gate.enter());
        let mut routes_tried = 0;
        let mut data = Vec::with_capacity((bytes.end - bytes.start) as usize);
        let mut retry = Retry::new(engine.config.patience, self.trouble.gave());
        // A small object or one FUSE request: short enough for one time limit.
        let limit = engine.config.stall_timeout * 2;
        // Less, and the origin is not worth its patience again.
        let least = (LEAST_RATE as f64 * limit.as_secs_f64()) as usize;
        let mut progress_at = 0;
        while (data.len() as u64) < bytes.end - bytes.start {
            let before = data.len();
            let route = self.route();
            let location = &route.location;
            let start = bytes.start + before as u64 + location.offset;
            let end = bytes.end + location.offset;
            let attempt = async {
                metrics::global().fetch_requests.add(1);
                let mut body = route.source.read(location, start..end).await?;
                while let Some(frame) = body.next().await {
                    let frame = frame?;
                    if data.len() + frame.len() > (bytes.end - bytes.start) as usize {
                        let message = "the body is longer than asked for";
                        return Err(SourceError::new(
                            SourceErrorKind::Corrupt,
                            &self.name,
                            message,
                        ));
                    }
                    data.extend_from_slice(&frame);
                }
                Ok(())
            };
            let failure = match tokio::time::timeout(limit, attempt).await {
                Ok(Ok(())) if data.len() as u64 == bytes.end - bytes.start => break,
                Ok(Ok(())) => SourceError::new(
                    SourceErrorKind::Unavailable,
                    &self.name,
                    "the body ended early",
                ),
                Ok(Err(error)) => error,
                Err(_) => SourceError::new(
                    SourceErrorKind::Unavailable,
                    &self.name,
                    match data.len() > before {
                        true => "bytes arrive too slowly",
                        false => "no answer for too long",
                    },
                ),
            };
            if data.len() - progress_at >= least.max(1) {
                progress_at = data.len();
                retry.progress();
                self.trouble.is_over();
            }
            let has_others = routes_tried + 1 < self.routes();
            let at_once = has_others && is_of_origin(failure.kind());
            let Some(pause) = retry.pause(&failure).filter(|_| !at_once) else {
                if has_others {
                    routes_tried += 1;
                    self.leave(&route);
                    retry = Retry::new(engine.config.patience, self.trouble.gave());
                    data.clear();
                    progress_at = 0;
                    continue;
                }
                return Err(FetchError::source(self, &failure));
            };
            self.trouble.note(&retry, &failure, pause, self.is_read());
            metrics::global().fetch_retries.add(1);
            tokio::time::sleep(pause).await;
        }
        self.trouble.is_over();
        self.count(class, data.len() as u64);
        Ok(data.into())
    }

    /// The whole content of a small object, verified, and not stored.
    pub(super) async fn receive_verified(&self) -> Result<Bytes, FetchError> {
        self.held_off()?;
        let mut wrong = None;
        for _ in 0..2 {
            let data = match self.size() {
                0 => Bytes::new(),
                size => self.receive(0..size, Class::Demand).await?,
            };
            match judge_bytes(&self.object, &data) {
                Verdict::Good(..) => return Ok(data),
                Verdict::Bad {
                    expected, found, ..
                } => wrong = Some(self.poison(&expected, &found)),
            }
        }
        Err(wrong.unwrap_or_else(|| FetchError::cancelled(self)))
    }

    /// The whole content of a small object, verified. On return it is complete, unless the disk is
    /// full; or, where somebody waits for the bytes, on its way into the store.
    pub(super) async fn small(self: &Arc<Self>, class: Class) -> Result<Bytes, FetchError> {
        let _one = self.finishing.lock().await;
        if let State::Held(data) = &*self.state.read() {
            return Ok(data.clone());
        }
        if self.look()?.is_some() {
            return self.read_complete(0, self.size() as usize);
        }
        let engine = self.engine()?;
        self.held_off()?;
        let mut wrong = None;
        for _ in 0..2 {
            let slot = match class {
                Class::Demand => None,
                _ => engine.small_slot().await,
            };
            let data = if self.size() == 0 {
                Bytes::new()
            } else {
                self.receive(0..self.size(), class).await?
            };
            drop(slot);
            match judge_bytes(&self.object, &data) {
                Verdict::Bad {
                    expected, found, ..
                } => wrong = Some(self.poison(&expected, &found)),
                Verdict::Good(..) => {
                    // Who reads it need not wait for the disk; nor does memory fill up with what
                    // that is too slow for.
                    let room = match class {
                        Class::Demand | Class::Readahead => engine.small.room(data.len()),
                        Class::Warm => None,
                    };
                    let Some(room) = room else {
                        self.store_small(&engine, &data, Urgency::Waiting).await?;
                        return Ok(data);
                    };
                    *self.state.write() = State::Held(data.clone());
                    let (handle, held) = (Arc::clone(self), data.clone());
                    engine.clone().runtime.spawn(async move {
                        let stored = handle.store_small(&engine, &held, Urgency::Patient);
                        if let Err(error) = stored.await {
                            tracing::warn!(object = %handle.id(), %error, "served, but not stored");
                        }
                        drop(room);
                    });
                    return Ok(data);
                }
            }
        }
        Err(wrong.unwrap_or_else(|| FetchError::cancelled(self)))
    }

    /// Stores a verified small object; where that cannot keep it, it stays one to be fetched.
    async fn store_small(
        &self,
        engine: &Inner,
        data: &Bytes,
        urgency: Urgency,
    ) -> Result<(), FetchError> {
        let stored = engine
            .small
            .put(self.object.id, data.clone(), urgency)
            .await;
        {
            let mut state = self.state.write();
            match &stored {
                Ok(complete) => *state = State::Complete(Arc::clone(complete)),
                Err(_) if matches!(*state, State::Held(_)) => *state = State::Small,
                // It has come with something else meanwhile.
                Err(_) => {}
            }
        }
        self.wake();
        match stored {
            Ok(_) => Ok(()),
            Err(Some(e)) => {
                let error = FetchError::store(self, &e);
                match cannot_keep(e.kind()) && !self.strict() {
                    true => {
                        self.avoid_disk(&error);
                        Ok(())
                    }
                    false => Err(error),
                }
            }
            Err(None) => Err(FetchError::cancelled(self)),
        }
    }

    /// Verifies an object whose chunks are all present and makes it complete.
    async fn finish(
        self: &Arc<Self>,
        partial: &Arc<Partial>,
    ) -> Result<Option<Arc<Complete>>, FetchError> {
        let _one = self.finishing.lock().await;
        if let Some(complete) = self.complete() {
            return Ok(Some(complete));
        }
        let engine = self.engine()?;
        let (handle, partial) = (Arc::clone(self), Arc::clone(partial));
        let finished = engine
            .runtime
            .spawn_blocking(move || handle.finish_blocking(&partial));
        finished.await.map_err(|_| FetchError::cancelled(self))?
    }

    fn finish_blocking(&self, partial: &Arc<Partial>) -> Result<Option<Arc<Complete>>, FetchError> {
        let failed = |e| FetchError::store(self, &e);
        let engine = self.engine()?;
        // Another process may have finished it.
        let found = engine.store.complete_sized(self.id(), self.size());
        if let Some(complete) = found.map_err(failed)? {
            if complete.size != self.size() {
                return Err(FetchError::other_size(
                    self.name(),
                    self.size(),
                    complete.size,
                ));
            }
            partial.abandon().map_err(failed)?;
            self.completed(&complete, partial);
            engine.came(self.id());
            return Ok(Some(complete));
        }
        if !self.all_present(partial) {
            return Ok(None);
        }
        let verdict = self.verifier.judge(&self.object, partial, self.is_read());
        match verdict.map_err(failed)? {
            None => Ok(None),
            Some(Verdict::Good(digest, generation)) => {
                let complete = match partial.finish(digest, generation) {
                    Ok(complete) => complete,
                    Err(error)
                        if error.kind() == StoreErrorKind::Invalid
                            && partial.generation() != generation =>
                    {
                        return Ok(None);
                    }
                    Err(error) => return Err(failed(error)),
                };
                metrics::global().store_objects_completed.add(1);
                self.completed(&complete, partial);
                // What others claim to have is the same, or was never true.
                engine.came(self.id());
                Ok(Some(complete))
            }
            // What was hashed is gone: of what is here now it says nothing.
            Some(Verdict::Bad { generation, .. }) if generation != partial.generation() => Ok(None),
            Some(Verdict::Bad {
                expected,
                found,
                generation,
            }) => {
                let error = self.poison(&expected, &found);
                self.in_memory.lock().clear();
                let discarded = partial.discard(generation);
                // Also where that failed: what has been served was wrong.
                self.call_wrong();
                discarded.map_err(failed)?;
                Err(error)
            }
        }
    }

    /// Reserves the space for all of it: writes then need no new blocks, and cannot fail for want
    /// of space half-way.
    async fn reserve(&self, partial: &Arc<Partial>) -> Result<(), FetchError> {
        if self.all_present(partial) {
            return Ok(());
        }
        let partial = Arc::clone(partial);
        let reserved = self
            .engine()?
            .runtime
            .spawn_blocking(move || partial.allocate());
        match reserved.await {
            Ok(done) => done.map_err(|e| FetchError::store(self, &e)),
            Err(_) => Err(FetchError::cancelled(self)),
        }
    }

    /// The error of content that was wrong a short while ago: it is not fetched again for every
    /// read.
    fn held_off(&self) -> Result<(), FetchError> {
        match &*self.wrong.lock() {
            Some(wrong) if Instant::now() < wrong.until => Err(wrong.error.clone()),
            _ => Ok(()),
        }
    }

    /// Takes note that it is complete.
    fn completed(&self, complete: &Arc<Complete>, partial: &Partial) {
        *self.state.write() = State::Complete(Arc::clone(complete));
        self.poisoned.store(false, Ordering::Relaxed);
        self.wake();
        if !self.served_as_in(complete, partial) {
            tracing::warn!(object = %self.id(), path = %self.name, "what was read of it was not verified: the kernel drops that");
            self.call_wrong();
        }
    }

    fn call_wrong(&self) {
        for call in self.on_wrong.lock().iter() {
            call();
        }
    }

    fn was_wrong_twice(&self) -> bool {
        self.wrong.lock().as_ref().is_some_and(|w| w.times >= 2)
    }

    /// The error of content that was passed on, and has another digest than it should.
    pub fn is_wrong(&self, expected: &Digest, found: &Digest) -> FetchError {
        self.poison(&expected.to_string(), &found.to_string())
    }

    fn poison(&self, expected: &str, found: &str) -> FetchError {
        self.poisoned.store(true, Ordering::Relaxed);
        // Another origin may have the true content.
        self.leave(&self.route());
        metrics::global().fetch_corrupt_objects.add(1);
        let message = format!("the content is wrong: expected {expected}, received {found}");
        tracing::error!(object = %self.id(), path = %self.name, expected, found, "wrong content");
        let error = FetchError::new(self, FetchErrorKind::Corrupt, &message);
        let mut wrong = self.wrong.lock();
        let times = wrong.as_ref().map_or(0, |w| w.times) + 1;
        // The first time it is fetched again at once.
        let hold = match times {
            1 => Duration::ZERO,
            n => (HOLD_OFF * 2u32.pow((n - 2).min(8))).min(LONGEST_HOLD_OFF),
        };
        let until = Instant::now() + hold;
        *wrong = Some(Wrong {
            error: error.clone(),
            times,
            until,
        });
        error
    }
}
