//! A flight: one claimed run of chunks on its way from the origin into the store.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use parking_lot::RwLock;
use tokio::sync::Notify;

use super::{
    Class, FetchError, Inner,
    buffer::{ChunkBuf, ChunkWriter},
    handle::{Handle, Route},
    retry::{Retry, is_of_origin},
};
use crate::{
    chunk, metrics,
    source::{ByteStream, SourceError, SourceErrorKind},
    store::{Lease, StoreError, WriteMode},
};

/// Chunks of one flight that may wait for the disk.
const WRITES_AHEAD: usize = 4;
/// A demand fetch without an answer for this long gets a second request, at the least.
const SHORTEST_HEDGE: Duration = Duration::from_millis(500);

/// Bytes per second, at the least, of a body.
pub(super) const LEAST_RATE: u64 = 4 << 10;
/// For how many times the time of a stall a body may be slower, where nobody waits for it.
const SLOW_WINDOWS: u32 = 2;
/// A background flight is slow that takes so many times as long as others do for a chunk.
const SLOW: u32 = 4;

/// What others see of a flight.
pub(super) struct Flight {
    first: u64,
    /// Chunks `next..end` are still to come; `end` may be lowered by whoever needs the tail sooner.
    next: AtomicU64,
    end: AtomicU64,
    lease: RwLock<Lease>,
    pub(super) class: Class,
    /// A reader waits for it, whatever its class: it stands back for nobody.
    urgent: AtomicBool,
    hurried: Notify,
    began: Instant,
    /// Asks for the rest once more: what comes is slow, and cannot be shared with another connection.
    again: Notify,
    asked_again: AtomicBool,
    failed: OnceLock<FetchError>,
    done: AtomicBool,
}

impl Flight {
    pub(super) fn new(lease: Lease, class: Class) -> Arc<Self> {
        let chunks = lease.chunks();
        Arc::new(Self {
            first: chunks.start,
            next: AtomicU64::new(chunks.start),
            end: AtomicU64::new(chunks.end),
            lease: RwLock::new(lease),
            class,
            urgent: AtomicBool::new(class == Class::Demand),
            hurried: Notify::new(),
            began: Instant::now(),
            again: Notify::new(),
            asked_again: AtomicBool::new(false),
            failed: OnceLock::new(),
            done: AtomicBool::new(false),
        })
    }

    /// Whether this flight will bring (or is bringing) `chunk`.
    pub(super) fn brings(&self, chunk: u64) -> bool {
        !self.done.load(Ordering::Acquire)
            && chunk < self.end.load(Ordering::Acquire)
            && chunk >= self.next.load(Ordering::Acquire)
    }

    /// A reader waits for it now.
    pub(super) fn hurry(&self) {
        if !self.urgent.swap(true, Ordering::Relaxed) {
            self.hurried.notify_one();
        }
    }

    fn is_urgent(&self) -> bool {
        self.urgent.load(Ordering::Relaxed)
    }

    /// Takes chunk `index` on, unless it was given away.
    fn take_on(&self, index: u64) -> bool {
        // Whoever gives the tail away holds the lease for itself.
        let _lease = self.lease.read();
        self.next.store(index, Ordering::Release);
        index < self.end.load(Ordering::Acquire)
    }

    /// Whether `chunk` is one that this flight is to bring, or has brought.
    pub(super) fn covers(&self, chunk: u64) -> bool {
        (self.first..self.end.load(Ordering::Acquire)).contains(&chunk)
    }

    pub(super) fn failure(&self) -> Option<&FetchError> {
        self.failed.get()
    }

    /// The chunk after its last.
    pub(super) fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    pub(super) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Gives up the chunks from `chunk` on, where they are not about to arrive, so that a reader
    /// who waits for them can fetch them at once.
    pub(super) fn yield_from(&self, chunk: u64) -> Option<Lease> {
        // Chunks are being written: no time to wait for that here. It is near, then.
        let mut lease = self.lease.try_write()?;
        if self.class == Class::Demand
            || !self.brings(chunk)
            || chunk < self.next.load(Ordering::Acquire) + 2
        {
            return None;
        }
        self.end.store(chunk, Ordering::Release);
        Some(lease.split_off(chunk))
    }

    /// How long a chunk takes, on average.
    fn pace(&self) -> Duration {
        let brought = self.next.load(Ordering::Acquire).saturating_sub(self.first);
        self.began.elapsed().div_f64((brought as f64).max(0.5))
    }

    /// How long it still takes, where that and what it took so far is long beside what is `usual` for a chunk and at least
    /// `since`, and can be helped.
    pub(super) fn is_slow(&self, usual: Duration, since: Duration) -> Option<Duration> {
        let left = self.end().saturating_sub(self.next.load(Ordering::Acquire));
        let can_help = left > 1 || (left == 1 && !self.asked_again.load(Ordering::Relaxed));
        if self.class == Class::Demand || self.is_done() || !can_help {
            return None;
        }
        let (pace, age) = (self.pace(), self.began.elapsed());
        let takes = pace.mul_f64(left as f64);
        (pace >= usual * SLOW && age.min(takes) >= since).then_some(takes)
    }

    /// Gives up half of what is still to come, for another connection to bring. Where that is but the chunk that is
    /// arriving, asks for the rest of it again.
    pub(super) fn relieve(&self) -> Option<Lease> {
        let mut lease = self.lease.try_write()?;
        let arriving = self.next.load(Ordering::Acquire);
        let left = self.end().saturating_sub(arriving + 1);
        if left == 0 {
            self.again.notify_waiters();
            return None;
        }
        let at = arriving + 1 + left / 2;
        self.end.store(at, Ordering::Release);
        metrics::global().fetch_hedges.add(1);
        Some(lease.split_off(at))
    }
}

/// Marks a flight as over, however it ends.
struct Landing(Arc<Flight>, Arc<Handle>);

impl Drop for Landing {
    fn drop(&mut self) {
        self.0.done.store(true, Ordering::Release);
        self.1.landed(&self.0);
    }
}

/// Runs the flight to its end. An error is kept in the flight for whoever waits for its chunks.
pub(super) async fn run(engine: Arc<Inner>, handle: Arc<Handle>, flight: Arc<Flight>) {
    let landing = Landing(Arc::clone(&flight), Arc::clone(&handle));
    let brought = Run::new(&engine, &handle, &flight).bring().await;
    if brought.is_ok() && flight.class != Class::Demand {
        engine.brought_at(flight.pace());
    }
    if let Err(error) = brought {
        if matches!(error.kind(), super::FetchErrorKind::NoSpace) {
            // Who reads got it from memory as it arrived; what he reads next need not be fetched in vain.
            if handle.is_read() {
                handle.avoid_disk(&error);
            }
        } else {
            tracing::debug!(object = %handle.id(), %error, "fetch failed");
        }
        let _ = flight.failed.set(error);
    }
    drop(landing);
}

struct Run<'a> {
    engine: &'a Arc<Inner>,
    handle: &'a Arc<Handle>,
    flight: &'a Arc<Flight>,
    /// Writes under way, oldest first.
    writes: std::collections::VecDeque<tokio::task::JoinHandle<Result<(), StoreError>>>,
    routes_tried: usize,
}

impl<'a> Run<'a> {
    fn new(engine: &'a Arc<Inner>, handle: &'a Arc<Handle>, flight: &'a Arc<Flight>) -> Self {
        Self {
            engine,
            handle,
            flight,
            writes: Default::default(),
            routes_tried: 0,
        }
    }

    async fn bring(mut self) -> Result<(), FetchError> {
        let demand = (self.flight.class == Class::Demand).then(|| self.engine.gate.enter());
        let result = self.receive().await;
        drop(demand);
        // What was received is worth writing, also after an error.
        let mut first = Ok(());
        while let Some(write) = self.writes.pop_front() {
            let written = finish_write(write, self.handle).await;
            if first.is_ok() {
                first = written;
            }
        }
        result.and(first)
    }

    /// Receives chunk after chunk, over as many requests as it takes.
    async fn receive(&mut self) -> Result<(), FetchError> {
        let gave = self.handle.last_trouble().gave();
        let mut retry = Retry::new(self.engine.config.patience, gave);
        let mut partly: Option<ChunkWriter> = None;
        loop {
            let route = self.handle.route();
            let error = match self.request(&route, &mut partly, &mut retry).await {
                Ok(()) => return Ok(()),
                Err(Stop::Final(error)) => return Err(error),
                Err(Stop::Slow) => continue,
                Err(Stop::Source(error)) => error,
            };
            self.engine.throttled(&error);
            // The same content may be had elsewhere.
            let has_others = self.routes_tried + 1 < self.handle.routes();
            let at_once = has_others && is_of_origin(error.kind());
            let Some(pause) = retry.pause(&error).filter(|_| !at_once) else {
                if has_others {
                    self.routes_tried += 1;
                    self.handle.leave(&route);
                    tracing::debug!(%error, "trying another origin");
                    retry = Retry::new(self.engine.config.patience, gave);
                    continue;
                }
                return Err(FetchError::source(self.handle, &error));
            };
            let is_read = self.handle.is_read();
            self.handle
                .last_trouble()
                .note(&retry, &error, pause, is_read);
            metrics::global().fetch_retries.add(1);
            tokio::time::sleep(pause).await;
        }
    }

    /// Sends one request for all that is still to come and takes in its body.
    async fn request(
        &mut self,
        route: &Route,
        partly: &mut Option<ChunkWriter>,
        retry: &mut Retry,
    ) -> Result<(), Stop> {
        let size = self.handle.size();
        let mut index = self.flight.next.load(Ordering::Acquire);
        let end = self.flight.end.load(Ordering::Acquire);
        if index >= end {
            return Ok(());
        }
        let arrived = partly.as_ref().map_or(0, ChunkWriter::filled_len) as u64;
        let start = chunk::bytes(index, size).start + arrived;
        let mut body = self
            .open(route, start..chunk::run_bytes(&(index..end), size).end)
            .await?;
        let _open = OpenRequest::new(self.engine);
        let mut expected = chunk::run_bytes(&(index..end), size).end - start;
        let mut flow = Flow::new(self.engine.config.stall_timeout, expected);
        while expected > 0 {
            // Between chunks only: what has begun to arrive is finished.
            if partly.is_none() {
                if self.flight.class == Class::Warm && !self.flight.is_urgent() {
                    self.engine.gate.yield_to_demand().await;
                }
                if !self.flight.take_on(index) {
                    return Ok(()); // the tail was given away
                }
            }
            let asked = Instant::now();
            let next = tokio::time::timeout(self.engine.config.stall_timeout, body.next());
            let next = tokio::select! {
                next = next => next,
                () = self.flight.again.notified() => {
                    self.flight.asked_again.store(true, Ordering::Relaxed);
                    metrics::global().fetch_hedges.add(1);
                    return Err(Stop::Slow);
                }
            };
            let mut frame = match next {
                Ok(Some(frame)) => frame?,
                Ok(None) => return Err(self.broken("the body ended early").into()),
                Err(_) => return Err(self.broken("no bytes arrived for too long").into()),
            };
            // Only the time that the origin takes counts, not that of the disk.
            let windows = match self.flight.is_urgent() {
                true => 1,
                false => SLOW_WINDOWS,
            };
            if !flow.goes_on(frame.len(), asked.elapsed(), windows) {
                return Err(self.broken("bytes arrive too slowly").into());
            }
            if frame.is_empty() {
                continue;
            }
            if frame.len() as u64 > expected {
                return Err(self.corrupt("the body is longer than asked for").into());
            }
            expected -= frame.len() as u64;
            self.handle.count(self.flight.class, frame.len() as u64);
            if self.flight.class == Class::Warm && !self.flight.is_urgent() {
                tokio::select! {
                    () = self.engine.bandwidth.spend(frame.len()) => {}
                    () = self.flight.hurried.notified() => {}
                }
            }
            if flow.is_worth_it() {
                retry.progress();
                self.handle.last_trouble().is_over();
            }
            while !frame.is_empty() {
                let mut writer = match partly.take() {
                    Some(writer) => writer,
                    None => {
                        if !self.flight.take_on(index) {
                            return Ok(());
                        }
                        self.buffer(route, index).await?
                    }
                };
                let n = writer.append(&frame);
                frame = frame.slice(n..);
                if writer.is_full() {
                    self.write(index, writer).await?;
                    index += 1;
                    self.flight.next.store(index, Ordering::Release);
                } else {
                    *partly = Some(writer);
                }
                self.handle.wake();
            }
        }
        Ok(())
    }

    async fn buffer(&self, route: &Route, index: u64) -> Result<ChunkWriter, Stop> {
        let bytes = chunk::bytes(index, self.handle.size());
        let demand = self.flight.class == Class::Demand;
        let writer = self.engine.pool.take(
            (bytes.end - bytes.start) as usize,
            demand,
            route.source.waits_for_objects(),
        );
        let writer = writer.await.map_err(|e| {
            Stop::Final(FetchError::new(
                self.handle,
                super::FetchErrorKind::Disk,
                &e,
            ))
        })?;
        let generation = self.flight.lease.read().partial().generation();
        self.handle.arriving(index, generation, writer.buf());
        Ok(writer)
    }

    /// Writes a chunk behind the back of the network, a few at a time.
    async fn write(&mut self, index: u64, writer: ChunkWriter) -> Result<(), Stop> {
        while self.writes.len() >= WRITES_AHEAD {
            if let Some(oldest) = self.writes.pop_front() {
                finish_write(oldest, self.handle)
                    .await
                    .map_err(Stop::Final)?;
            }
        }
        let buf = Arc::clone(writer.buf());
        drop(writer);
        let handle = Arc::clone(self.handle);
        let flight = Arc::clone(self.flight);
        let engine = Arc::clone(self.engine);
        self.writes.push_back(
            self.engine
                .runtime
                .spawn_blocking(move || commit(&handle, &flight, index, &buf, &engine)),
        );
        Ok(())
    }

    /// Asks for the range; a demand request that stays without an answer is asked a second time.
    async fn open(&self, route: &Route, range: std::ops::Range<u64>) -> Result<ByteStream, Stop> {
        let location = &route.location;
        let range = range.start + location.offset..range.end + location.offset;
        let asked = Instant::now();
        let ask = || {
            metrics::global().fetch_requests.add(1);
            route.source.read(location, range.clone())
        };
        let first = ask();
        tokio::pin!(first);
        let hedge = if self.flight.class == Class::Warm && !self.flight.is_urgent() {
            self.engine.config.stall_timeout
        } else {
            (self.engine.answer_time() * 4).max(SHORTEST_HEDGE)
        };
        let body = match tokio::time::timeout(hedge, &mut first).await {
            Ok(answer) => answer,
            Err(_) => {
                metrics::global().fetch_hedges.add(1);
                let second = ask();
                tokio::pin!(second);
                let either = async {
                    // The first to answer well; an error counts only if both fail.
                    tokio::select! {
                        a = &mut first => match a {
                            Ok(body) => Ok(body),
                            Err(_) => second.await,
                        },
                        b = &mut second => match b {
                            Ok(body) => Ok(body),
                            Err(_) => first.await,
                        },
                    }
                };
                match tokio::time::timeout(self.engine.config.stall_timeout, either).await {
                    Ok(answer) => answer,
                    Err(_) => Err(self.broken("no answer for too long")),
                }
            }
        };
        if body.is_ok() {
            self.engine.answered(asked.elapsed());
        }
        Ok(body?)
    }

    fn broken(&self, message: &str) -> SourceError {
        SourceError::new(SourceErrorKind::Unavailable, self.handle.name(), message)
    }

    fn corrupt(&self, message: &str) -> SourceError {
        SourceError::new(SourceErrorKind::Corrupt, self.handle.name(), message)
    }
}

/// Writes one chunk, marks it present, hashes it. Blocking.
fn commit(
    handle: &Arc<Handle>,
    flight: &Flight,
    index: u64,
    buf: &Arc<ChunkBuf>,
    engine: &Inner,
) -> Result<(), StoreError> {
    // Through the page cache where a reader will come for it; what one follows closely is served
    // from memory.
    let mode = match (flight.class, handle.is_read()) {
        (Class::Demand | Class::Warm, true) => WriteMode::Cached,
        _ => WriteMode::Direct,
    };
    let data = buf.filled();
    let partial = Arc::clone(flight.lease.read().partial());
    let generation = partial.generation();
    flight.lease.read().commit(index, data, mode)?;
    metrics::global().store_written_bytes.add(data.len() as u64);
    // What demand holds is for demand alone.
    // Of what is made from other objects there are few buffers: whoever kept them would wait for himself.
    let is_roomy = || !handle.is_made() && engine.pool.is_roomy();
    let may_wait = flight.class != Class::Demand && is_roomy();
    handle
        .verifier()
        .offer(index, generation, may_wait.then_some(buf));
    if flight.class == Class::Readahead && handle.is_read() && is_roomy() {
        engine.recent.keep(handle, index);
    } else {
        handle.forget(index);
    }
    handle.arrived(&partial, index);
    let hashed = handle
        .verifier()
        .advance(handle.object(), &partial, handle.is_read());
    if let Err(error) = hashed {
        // Who wants the whole object fetches the chunk anew; where it cannot even be forgotten, nobody
        // would get on.
        handle.lost(&error);
        if partial.generation() == generation {
            return Err(error);
        }
    }
    if !is_roomy() {
        handle.verifier().withdraw(index);
    }
    Ok(())
}

async fn finish_write(
    write: tokio::task::JoinHandle<Result<(), StoreError>>,
    handle: &Handle,
) -> Result<(), FetchError> {
    match write.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(FetchError::store(handle, &error)),
        Err(_) => Err(FetchError::cancelled(handle)),
    }
}

/// How a body flows: one that trickles is as good as none.
struct Flow {
    window: Duration,
    /// Bytes that have to come within a window; a body may have fewer.
    least: u64,
    came: u64,
    /// In this window.
    bytes: u64,
    waited: Duration,
    /// Windows before this one in which too little came, one after the other.
    slow: u32,
}

impl Flow {
    fn new(window: Duration, expected: u64) -> Self {
        let least = (LEAST_RATE as f64 * window.as_secs_f64()) as u64;
        Self {
            window,
            least: least.clamp(1, expected.max(1)),
            came: 0,
            bytes: 0,
            waited: Duration::ZERO,
            slow: 0,
        }
    }

    /// Takes note of bytes that were waited for; false where too few have come for so many windows.
    fn goes_on(&mut self, bytes: usize, waited: Duration, windows: u32) -> bool {
        self.came += bytes as u64;
        self.bytes += bytes as u64;
        self.waited += waited;
        if self.waited < self.window {
            return true;
        }
        self.slow = match self.bytes >= self.least {
            true => 0,
            false => self.slow + 1,
        };
        (self.bytes, self.waited) = (0, Duration::ZERO);
        self.slow < windows
    }

    /// Whether so much has come that the origin is worth its patience again.
    fn is_worth_it(&self) -> bool {
        self.came >= self.least
    }
}

enum Stop {
    Source(SourceError),
    Final(FetchError),
    /// Another request may be faster.
    Slow,
}

impl From<SourceError> for Stop {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

/// Counts requests under way.
struct OpenRequest;

impl OpenRequest {
    fn new(_: &Inner) -> Self {
        metrics::global().fetch_connections.add(1);
        Self
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        metrics::global().fetch_connections.sub(1);
    }
}
