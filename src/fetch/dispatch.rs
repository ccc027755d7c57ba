//! Background work: which segment of which object is fetched next, and over how many connections.
//!
//! Read-ahead goes before warm work. Objects come in the order in which they were asked for;
//! several are under way at once so that each arrives (and is hashed) in order. Where nothing is left to ask
//! for, or all wait for one flight, a connection that is idle takes a part of the slowest. The number of
//! connections grows while that makes the whole faster, and shrinks when the origin says it is
//! asked too much.

use std::{
    cmp::Reverse,
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Class, FetchError, Inner, handle::Handle};
use crate::{
    chunk, metrics,
    store::{Lease, Partial, StoreErrorKind},
};

/// Chunks in a segment where one object has several connections: short, so that what arrives
/// ahead of the hash fits in memory.
const SHORT_SEGMENT: u64 = 4;
/// Chunks in a segment where each object has one connection.
const LONG_SEGMENT: u64 = 32;
/// Chunks in a read-ahead segment.
const READAHEAD_SEGMENT: u64 = 4;
/// Read-ahead wishes remembered; older ones are forgotten.
const MAX_READAHEAD: usize = 256;
/// Objects fetched at the same time in the background, at most.
const MAX_OBJECTS: usize = 4;
/// How many times as many are looked at where nothing of the first can be claimed.
const MAX_PASSED_OVER: usize = 64;
/// How often to look again for chunks that another process had claimed.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How long memory is kept after the last work.
const LINGER: Duration = Duration::from_secs(2);
/// How long a segment has to take before others help it.
const SLOW_FOR: Duration = Duration::from_secs(1);
/// The same where all that comes after it waits for it. A connection that is new gets little of a link that is full.
const SLOW_FOR_ALL: Duration = Duration::from_millis(200);
/// How long one number of connections is measured.
const MEASURE: Duration = Duration::from_millis(500);
/// How long a number of connections that was found good is kept.
const SETTLED: Duration = Duration::from_secs(10);

/// The background queue of an engine.
pub(super) struct Queue {
    jobs: Mutex<Vec<Arc<Job>>>,
    ahead: Mutex<VecDeque<Ahead>>,
    running: AtomicUsize,
    /// Of these, read-ahead: it has as many connections again, so that it never waits for warm
    /// work that stands still.
    running_ahead: AtomicUsize,
    wake: Arc<Notify>,
    sequence: AtomicU64,
    connections: Mutex<Connections>,
}

/// One whole object to bring.
struct Job {
    handle: Arc<Handle>,
    partial: Arc<Partial>,
    class: Class,
    /// Within its class; the higher goes first.
    rank: Reverse<i8>,
    sequence: u64,
    cursor: AtomicU64,
    running: AtomicUsize,
    /// When nothing of it could be claimed, though nothing was under way.
    passed_over: Mutex<Option<Instant>>,
    failed: OnceLock<FetchError>,
}

/// What came of a look at the first objects.
enum Started {
    Segment,
    Nothing,
    /// Nothing, but some of them will not be looked at for a while.
    PassedOver,
}

struct Ahead {
    handle: Weak<Handle>,
    partial: Arc<Partial>,
    chunks: Range<u64>,
}

/// How many connections are good.
struct Connections {
    limit: usize,
    max: usize,
    /// Rate measured before the last step up, where one was made.
    before: Option<f64>,
    since: Instant,
    bytes: u64,
    settled_until: Option<Instant>,
}

impl Connections {
    fn new(max: usize) -> Self {
        Self {
            limit: max.clamp(1, 4),
            max: max.max(1),
            before: None,
            since: Instant::now(),
            bytes: 0,
            settled_until: None,
        }
    }

    /// Looks at what arrived since the last look, and steps up, back, or stays.
    fn measure(&mut self, received: u64, saturated: bool) {
        let elapsed = self.since.elapsed();
        if elapsed < MEASURE {
            return;
        }
        let rate = received.saturating_sub(self.bytes) as f64 / elapsed.as_secs_f64();
        (self.since, self.bytes) = (Instant::now(), received);
        if self
            .settled_until
            .is_some_and(|until| Instant::now() < until)
            || !saturated
        {
            return;
        }
        match self.before {
            Some(before) if rate < before * 1.08 => {
                self.limit = self.limit.saturating_sub(2).max(1);
                self.before = None;
                self.settled_until = Some(Instant::now() + SETTLED);
            }
            _ if self.limit < self.max => {
                self.before = Some(rate);
                self.limit = (self.limit + 2).min(self.max);
            }
            _ => self.settled_until = Some(Instant::now() + SETTLED),
        }
    }

    /// The origin said that it is asked too much.
    fn back_off(&mut self) {
        self.limit = (self.limit / 2).max(1);
        self.before = None;
        self.settled_until = Some(Instant::now() + SETTLED);
    }
}

/// Removes the job when whoever asked for it is gone.
struct Wanted<'a>(&'a Queue, Arc<Job>);

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        self.0.jobs.lock().retain(|job| !Arc::ptr_eq(job, &self.1));
    }
}

impl Queue {
    /// A queue that uses at most `max` connections.
    pub(super) fn new(max: usize) -> Self {
        Self {
            jobs: Mutex::default(),
            ahead: Mutex::default(),
            running: AtomicUsize::new(0),
            running_ahead: AtomicUsize::new(0),
            wake: Arc::default(),
            sequence: AtomicU64::new(0),
            connections: Mutex::new(Connections::new(max)),
        }
    }

    /// The origin said that it is asked too much.
    pub(super) fn back_off(&self) {
        self.connections.lock().back_off();
    }

    /// Brings all chunks of an object, as long as it is of this generation.
    pub(super) async fn bring_all(
        &self,
        handle: &Arc<Handle>,
        partial: &Arc<Partial>,
        generation: u32,
        (class, rank): (Class, i8),
    ) -> Result<(), FetchError> {
        if handle.all_present(partial) || partial.generation() != generation {
            return Ok(());
        }
        let job = Arc::new(Job {
            handle: Arc::clone(handle),
            partial: Arc::clone(partial),
            class,
            rank: Reverse(rank),
            sequence: self.sequence.fetch_add(1, Ordering::Relaxed),
            cursor: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            passed_over: Mutex::default(),
            failed: OnceLock::new(),
        });
        {
            let mut jobs = self.jobs.lock();
            let order = |job: &Job| (job.class, job.rank, job.sequence);
            let at = jobs.partition_point(|other| order(other) < order(&job));
            jobs.insert(at, Arc::clone(&job));
        }
        let _wanted = Wanted(self, Arc::clone(&job));
        self.wake();
        loop {
            let look_again = handle.changed_within(LOOK_AGAIN * 5);
            // A reader who may only see what is verified waits for all of it, whoever brings it.
            if class == Class::Demand {
                handle.hurry();
            }
            if handle.all_present(partial) || partial.generation() != generation {
                return Ok(());
            }
            // By another way, in another process.
            match partial.completed() {
                Ok(Some(_)) => return Ok(()),
                Err(error) if error.kind() == StoreErrorKind::NotFound => {
                    return Err(FetchError::store(handle, &error));
                }
                _ => {}
            }
            if let Some(error) = job.failed.get() {
                return Err(error.clone());
            }
            look_again.await;
        }
    }

    /// Asks for chunks ahead of a reader. What can begin does so here: a reader who outruns the
    /// dispatcher asks for each chunk alone.
    pub(super) fn read_ahead(
        &self,
        engine: &Arc<Inner>,
        handle: &Arc<Handle>,
        partial: &Arc<Partial>,
        chunks: Range<u64>,
    ) {
        {
            let mut ahead = self.ahead.lock();
            if ahead.len() >= MAX_READAHEAD {
                ahead.pop_front();
            }
            ahead.push_back(Ahead {
                handle: Arc::downgrade(handle),
                partial: Arc::clone(partial),
                chunks,
            });
        }
        self.fill_ahead(engine);
        self.wake();
    }

    /// What wakes the dispatcher.
    pub(super) fn waker(&self) -> Arc<Notify> {
        Arc::clone(&self.wake)
    }

    /// Lets the dispatcher look at the queue.
    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Runs until the engine is gone; holds it only while awake.
    pub(super) async fn dispatch(engine: Weak<Inner>, wake: Arc<Notify>) {
        loop {
            let idle = {
                let Some(engine) = engine.upgrade() else {
                    return;
                };
                engine.queue.fill(&engine);
                engine.queue.is_idle()
            };
            let limit = if idle { LINGER } else { LOOK_AGAIN };
            let woken = tokio::time::timeout(limit, wake.notified()).await.is_ok();
            if idle && !woken {
                if let Some(engine) = engine.upgrade() {
                    engine.recent.clear();
                    engine.pool.shrink();
                }
                wake.notified().await;
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.running.load(Ordering::Relaxed) == 0
            && self.jobs.lock().is_empty()
            && self.ahead.lock().is_empty()
    }

    /// Starts segments until every connection is busy or nothing is left to claim.
    fn fill(&self, engine: &Arc<Inner>) {
        loop {
            let running = self.running.load(Ordering::Relaxed);
            let limit = {
                let mut connections = self.connections.lock();
                let saturated = running >= connections.limit;
                connections.measure(received(), saturated);
                connections.limit
            };
            let started = self.start_ahead(engine, limit)
                || (running < limit && self.start_job(engine, limit));
            if !started {
                return;
            }
        }
    }

    /// Starts read-ahead until its connections are busy or nothing is left to claim.
    fn fill_ahead(&self, engine: &Arc<Inner>) {
        let limit = self.connections.lock().limit;
        while self.start_ahead(engine, limit) {}
    }

    fn start_ahead(&self, engine: &Arc<Inner>, limit: usize) -> bool {
        let mut queue = self.ahead.lock();
        if self.running_ahead.load(Ordering::Relaxed) >= limit {
            return false;
        }
        while let Some(wish) = queue.front_mut() {
            let Some(handle) = wish.handle.upgrade() else {
                queue.pop_front();
                continue;
            };
            let from = wish.chunks.start;
            let missing = (from..wish.chunks.end).find(|&c| !wish.partial.present(c));
            let Some(first) = missing else {
                queue.pop_front();
                continue;
            };
            let want = first..(first + READAHEAD_SEGMENT).min(wish.chunks.end);
            wish.chunks.start = want.end;
            match wish.partial.claim(want) {
                Ok(Some(lease)) => {
                    wish.chunks.start = lease.chunks().end;
                    self.start(engine, &handle, None, lease, Class::Readahead);
                    return true;
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(%error, "read-ahead could not claim");
                    queue.pop_front();
                }
            }
        }
        false
    }

    fn start_job(&self, engine: &Arc<Inner>, limit: usize) -> bool {
        // Others' turn where nothing of the first ones can be claimed: another process has it.
        for _ in 0..MAX_PASSED_OVER {
            match self.start_of_first(engine, limit) {
                Started::Segment => return true,
                Started::Nothing => return false,
                Started::PassedOver => {}
            }
        }
        false
    }

    /// Starts a segment of one of the objects whose turn it is.
    fn start_of_first(&self, engine: &Arc<Inner>, limit: usize) -> Started {
        let jobs: Vec<_> = self
            .jobs
            .lock()
            .iter()
            .filter(|job| job.failed.get().is_none() && !job.handle.all_present(&job.partial))
            .filter(|job| !job.is_passed_over())
            .take(MAX_OBJECTS)
            .cloned()
            .collect();
        // What is being read comes one after the other, as readers want it; else several at once,
        // so that several cores hash.
        let in_order = jobs.first().is_some_and(|job| job.handle.is_read());
        let share = match in_order {
            true => limit,
            false => limit.div_ceil(jobs.len().max(1)),
        };
        let segment = if share > 1 {
            SHORT_SEGMENT
        } else {
            LONG_SEGMENT
        };
        let usual = engine.usual_pace();
        for job in &jobs {
            match job.gap(usual) {
                Ok(Some(lease)) => {
                    self.start(engine, &job.handle, Some(Arc::clone(job)), lease, job.class);
                    return Started::Segment;
                }
                Ok(None) => {}
                Err(error) => job.fail(error),
            }
        }
        // The first must be through before the next begins, not wait for its turn behind it.
        if in_order && jobs.iter().any(|job| job.handle.verifier().is_behind()) {
            return Started::Nothing;
        }
        let mut passed_over = false;
        // A fair share for each first; then whoever can use more.
        for cap in [share, limit] {
            for job in turns(&jobs, in_order) {
                if job.running.load(Ordering::Relaxed) >= cap || job.handle.verifier().is_behind() {
                    continue;
                }
                match job.next_segment(segment, share) {
                    Ok(Some(lease)) => {
                        self.start(engine, &job.handle, Some(Arc::clone(job)), lease, job.class);
                        return Started::Segment;
                    }
                    Ok(None) => passed_over |= job.pass_over(),
                    Err(error) => job.fail(error),
                }
            }
        }
        // Nothing is left to claim, and a connection has nothing to do.
        for job in jobs.iter().filter(|job| !job.handle.verifier().is_behind()) {
            if let Some(lease) = usual.and_then(|usual| job.handle.relieve(usual, SLOW_FOR)) {
                self.start(engine, &job.handle, Some(Arc::clone(job)), lease, job.class);
                return Started::Segment;
            }
        }
        match passed_over {
            true => Started::PassedOver,
            false => Started::Nothing,
        }
    }

    fn start(
        &self,
        engine: &Arc<Inner>,
        handle: &Arc<Handle>,
        job: Option<Arc<Job>>,
        lease: Lease,
        class: Class,
    ) {
        // A job at demand priority still goes in order; only readers jump the queue.
        let class = if class == Class::Demand {
            Class::Readahead
        } else {
            class
        };
        self.running.fetch_add(1, Ordering::Relaxed);
        if class == Class::Readahead {
            self.running_ahead.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(job) = &job {
            job.running.fetch_add(1, Ordering::Relaxed);
        }
        let flight = handle.prepare(lease, class);
        let (engine, handle) = (Arc::clone(engine), Arc::clone(handle));
        engine.runtime.clone().spawn(async move {
            super::flight::run(Arc::clone(&engine), handle, Arc::clone(&flight)).await;
            engine.queue.running.fetch_sub(1, Ordering::Relaxed);
            if class == Class::Readahead {
                engine.queue.running_ahead.fetch_sub(1, Ordering::Relaxed);
                engine.queue.fill_ahead(&engine);
            }
            if let Some(job) = job {
                job.running.fetch_sub(1, Ordering::Relaxed);
                if let Some(error) = flight.failure() {
                    job.fail(error.clone());
                }
            }
            engine.queue.wake();
        });
    }
}

impl Job {
    /// Claims the next segment, from the cursor on, and once more from the beginning. Where
    /// `connections` share the object, segments get shorter towards its end, so that all are busy
    /// until then.
    fn next_segment(&self, length: u64, connections: usize) -> Result<Option<Lease>, FetchError> {
        let count = chunk::count(self.handle.size());
        let cursor = self.cursor.load(Ordering::Relaxed);
        let length = match connections as u64 {
            n if n > 1 && cursor > 0 => ((count - cursor) / (2 * n)).clamp(2, length),
            _ => length,
        };
        for range in [cursor..count, 0..cursor] {
            let mut from = range.start;
            while let Some(first) = (from..range.end).find(|&c| !self.partial.present(c)) {
                let want = first..(first + length).min(range.end);
                let lease = self.partial.claim(want.clone());
                match lease.map_err(|e| FetchError::store(&self.handle, &e))? {
                    Some(lease) => {
                        self.cursor.store(lease.chunks().end, Ordering::Relaxed);
                        return Ok(Some(lease));
                    }
                    None => from = want.end,
                }
            }
        }
        Ok(None)
    }

    /// Chunks that nobody was asked for yet, about.
    fn left(&self) -> u64 {
        chunk::count(self.handle.size()).saturating_sub(self.cursor.load(Ordering::Relaxed))
    }

    /// Claims what the hasher waits for while much has come after it, where nobody brings it any
    /// more: a reader whose fetch failed, another process that was killed. Or takes over a part of what is slow.
    fn gap(&self, usual: Option<Duration>) -> Result<Option<Lease>, FetchError> {
        let Some(waiting) = self.handle.verifier().after_gap() else {
            return Ok(None);
        };
        match self.handle.first_missing(&self.partial) {
            Some(missing) if missing < waiting => {
                let end = waiting.min(missing + SHORT_SEGMENT);
                let lease = self.partial.claim(missing..end);
                let lease = lease.map_err(|e| FetchError::store(&self.handle, &e))?;
                Ok(lease.or_else(|| self.handle.relieve(usual?, SLOW_FOR_ALL)))
            }
            _ => Ok(None),
        }
    }

    /// Lets others go first for a while, where another process has all that is missing; whether that is new.
    fn pass_over(&self) -> bool {
        let elsewhere = self.running.load(Ordering::Relaxed) == 0;
        if elsewhere {
            *self.passed_over.lock() = Some(Instant::now());
        }
        elsewhere
    }

    fn is_passed_over(&self) -> bool {
        let since = *self.passed_over.lock();
        since.is_some_and(|since| since.elapsed() < LOOK_AGAIN * 5)
    }

    fn fail(&self, error: FetchError) {
        let _ = self.failed.set(error);
        self.handle.wake();
    }
}

/// The order in which jobs of the same rank are offered a connection. Those that are not being read are to end
/// together: the last one alone is fetched no faster than one core hashes.
fn turns(jobs: &[Arc<Job>], in_order: bool) -> Vec<&Arc<Job>> {
    let mut turns: Vec<_> = jobs.iter().collect();
    if !in_order {
        turns.sort_by_cached_key(|job| {
            let running = job.running.load(Ordering::Relaxed);
            let left = match running {
                0 => 0,
                _ => job.left(),
            };
            (job.class, job.rank, running, Reverse(left))
        });
    }
    turns
}

fn received() -> u64 {
    let metrics = metrics::global();
    metrics.fetch_warm_bytes.get() + metrics.fetch_readahead_bytes.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(connections: &mut Connections, rate: f64) -> usize {
        connections.since = Instant::now() - Duration::from_secs(1);
        let bytes = connections.bytes + rate as u64;
        connections.measure(bytes, true);
        connections.limit
    }

    #[test]
    fn connections_grow_while_it_helps() {
        let mut connections = Connections::new(16);
        assert_eq!(connections.limit, 4);
        assert_eq!(step(&mut connections, 100e6), 6);
        assert_eq!(step(&mut connections, 150e6), 8);
        assert_eq!(step(&mut connections, 152e6), 6, "no gain: one step back");
        assert_eq!(step(&mut connections, 900e6), 6, "and settled");
        connections.back_off();
        assert_eq!(connections.limit, 3);
    }
}
