//! One object being read or fetched: who brings which chunk, and who waits for what.

mod read;
mod through;
mod whole;

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

use super::{
    Class, FetchError, FetchErrorKind, Inner, VerifyPolicy,
    buffer::ChunkBuf,
    flight::{self, Flight},
    retry::{LastTrouble, Trouble},
    safetensors::Sections,
    stream::Streams,
    verify::Verifier,
};
use crate::{
    chunk::{self, CHUNK_SIZE},
    digest::{ObjectId, PartialId},
    source::Source,
    store::{Complete, Lease, Partial, StoreError, StoreErrorKind},
    tree::{Location, Object},
};

/// Origins of equal content that are remembered.
const MAX_ROUTES: usize = 4;
/// Present chunks are made durable after this many new bytes.
const CHECKPOINT_BYTES: u64 = 256 << 20;
/// Longest read answered at once, in bytes; FUSE asks for far less.
const LONGEST_READ: usize = 16 << 20;

/// One object being read or fetched; shared by all its users in this process.
pub struct Handle {
    object: Object,
    /// What it is called in the store until it is verified.
    part: PartialId,
    name: String,
    /// Where its bytes can be had; the one in use first.
    routes: Mutex<VecDeque<Arc<Route>>>,
    engine: Weak<Inner>,
    me: Weak<Handle>,
    state: RwLock<State>,
    flights: Mutex<Vec<Arc<Flight>>>,
    /// Chunks that are arriving, or have just arrived,
    /// each with the generation of the partial object that it began in.
    in_memory: Mutex<HashMap<u64, (u32, Arc<ChunkBuf>)>>,
    changed: Notify,
    waiting: AtomicUsize,
    verifier: Verifier,
    streams: Mutex<Streams>,
    /// Files in it that may be safetensors, as far as anyone reads them.
    sections: Mutex<Sections>,
    /// Called when content turned out wrong.
    on_wrong: Mutex<Vec<Box<dyn Fn() + Send + Sync>>>,
    /// Chunks below this were all here, as of a generation.
    prefix: Mutex<(u32, u64)>,
    /// The generation of the partial object that readers were served from first.
    served: AtomicU64,
    trouble: LastTrouble,
    /// The last time the content was wrong, and until when that is taken for granted.
    wrong: Mutex<Option<Wrong>>,
    /// Somebody reads it while it arrives: write through the page cache.
    read: AtomicBool,
    /// Bytes that came, because somebody waited for them and otherwise.
    received: [AtomicU64; 2],
    first_read: OnceLock<Instant>,
    /// Content was wrong once: from now on nothing unverified is served.
    poisoned: AtomicBool,
    /// A chunk broke off of which readers may have been served a part.
    torn: AtomicBool,
    /// Readers were served bytes that never were in the store.
    streamed: AtomicBool,
    /// Since when the disk is avoided, and what it said: it is full, or fails.
    no_disk: Mutex<Option<(Instant, FetchError)>>,
    since_checkpoint: AtomicU64,
    /// When another process that has claimed chunks was found to be slow.
    slow_holder: Mutex<Option<Instant>>,
    /// What the disk said last of a chunk that it did not give back.
    lost: Mutex<Option<FetchError>>,
    /// Single flight of small objects and of the final check.
    finishing: tokio::sync::Mutex<()>,
}

/// What came of an object, and who read it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Bytes that came because somebody waited for them.
    pub demanded: u64,
    /// Bytes that came otherwise.
    pub ahead: u64,
    /// When it was first read, but for reads that the kernel answers from a complete object.
    pub first_read: Option<Instant>,
}

impl Tally {
    /// Adds another object.
    pub fn add(&mut self, other: &Self) {
        self.demanded += other.demanded;
        self.ahead += other.ahead;
        let both = self.first_read.into_iter().chain(other.first_read);
        self.first_read = both.min();
    }
}

/// An origin that has the content.
pub(super) struct Route {
    pub(super) source: Arc<dyn Source>,
    pub(super) location: Location,
}

/// Where the content is.
#[derive(Clone)]
enum State {
    Complete(Arc<Complete>),
    Partial(Arc<Partial>),
    /// At most one chunk: fetched whole, stored in batches.
    Small,
    /// As small, verified, on its way into the store.
    Held(Bytes),
    /// The store could not make a place for it: reads go to the origin, until there is one.
    Streamed,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle")
            .field("id", &self.object.id)
            .finish_non_exhaustive()
    }
}

impl Handle {
    pub(super) fn new(
        engine: &Arc<Inner>,
        object: &Object,
        part: PartialId,
        source: &Arc<dyn Source>,
    ) -> Result<Arc<Self>, FetchError> {
        let location = object.recipe.location();
        let location = location.ok_or_else(|| FetchError::no_place(object))?;
        let name = location.path.clone();
        let failed = |e| FetchError::store_named(&name, &e);
        let complete = || {
            let found = engine.store.complete_sized(&object.id, object.size);
            found.map_err(failed)
        };
        let mut no_disk = None;
        let mut streamed = |error: FetchError| {
            if engine.store.writable() {
                tracing::warn!(object = %object.id, path = name, %error, "no place in the store: reads go to the origin");
            }
            no_disk = Some((Instant::now(), error));
            State::Streamed
        };
        let state = match complete() {
            Ok(Some(complete)) => State::Complete(complete),
            Ok(None) if object.size <= CHUNK_SIZE => State::Small,
            Ok(None) => match engine.store.partial(part, object.size) {
                // Another process may have completed it in between.
                Ok(partial) => match complete() {
                    Ok(Some(complete)) => {
                        partial.abandon().map_err(failed)?;
                        State::Complete(complete)
                    }
                    Ok(None) => State::Partial(partial),
                    Err(e) if e.kind() == FetchErrorKind::Disk => streamed(e),
                    Err(e) => return Err(e),
                },
                Err(e) if cannot_keep(e.kind()) => streamed(failed(e)),
                Err(e) => return Err(failed(e)),
            },
            Err(e) if e.kind() == FetchErrorKind::Disk => streamed(e),
            Err(e) => return Err(e),
        };
        let gave = match &state {
            State::Partial(partial) => (0..partial.chunks()).any(|chunk| partial.present(chunk)),
            _ => false,
        };
        if let State::Complete(complete) = &state
            && complete.size != object.size
        {
            return Err(FetchError::other_size(&name, object.size, complete.size));
        }
        let mut sections = Sections::default();
        // Whatever its name: registries name by digest.
        sections.add(0..object.size);
        Ok(Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            name,
            verifier: Verifier::new(object),
            object: object.clone(),
            part,
            routes: Mutex::new(VecDeque::from([route(location, source)])),
            engine: Arc::downgrade(engine),
            state: RwLock::new(state),
            flights: Mutex::default(),
            in_memory: Mutex::default(),
            changed: Notify::new(),
            waiting: AtomicUsize::new(0),
            streams: Mutex::default(),
            sections: Mutex::new(sections),
            on_wrong: Mutex::default(),
            prefix: Mutex::default(),
            trouble: LastTrouble::new(gave),
            wrong: Mutex::default(),
            served: AtomicU64::new(NOTHING_SERVED),
            read: AtomicBool::new(false),
            received: Default::default(),
            first_read: OnceLock::new(),
            poisoned: AtomicBool::new(false),
            torn: AtomicBool::new(false),
            streamed: AtomicBool::new(false),
            no_disk: Mutex::new(no_disk),
            since_checkpoint: AtomicU64::new(0),
            slow_holder: Mutex::default(),
            lost: Mutex::default(),
            finishing: tokio::sync::Mutex::default(),
        }))
    }

    /// Its name in the store.
    pub fn id(&self) -> &ObjectId {
        &self.object.id
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.object.size
    }

    /// Key or path at the origin, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is.
    pub fn object(&self) -> &Object {
        &self.object
    }

    /// Bytes that are here, verified or not.
    pub fn present_bytes(&self) -> u64 {
        match &*self.state.read() {
            State::Complete(_) | State::Held(_) => self.size(),
            State::Partial(partial) => partial.present_bytes(),
            State::Small | State::Streamed => 0,
        }
    }

    /// Whether it is made from other objects.
    pub(super) fn is_made(&self) -> bool {
        self.route().source.waits_for_objects()
    }

    /// Whether all is here and verified, be it that the store is still to have it.
    pub fn is_verified(&self) -> bool {
        matches!(&*self.state.read(), State::Complete(_) | State::Held(_))
    }

    /// The complete file, once all is here and verified.
    pub fn complete(&self) -> Option<Arc<Complete>> {
        match &*self.state.read() {
            State::Complete(complete) => Some(Arc::clone(complete)),
            _ => None,
        }
    }

    /// Why nothing arrives, where the origin fails and is asked again.
    pub fn trouble(&self) -> Option<Trouble> {
        self.trouble.get()
    }

    /// Has `call` run, from a thread that may block, each time the content turned out wrong after
    /// some of it may have been served.
    pub fn on_wrong(&self, call: impl Fn() + Send + Sync + 'static) {
        self.on_wrong.lock().push(Box::new(call));
    }

    /// Tells that somebody reads the object while it arrives: what comes in goes through the page
    /// cache from now on.
    pub fn expect_reads(&self) {
        self.read.store(true, Ordering::Relaxed);
    }

    /// What came, and who read, since it was opened in this process.
    pub fn tally(&self) -> Tally {
        let [demanded, ahead] = &self.received;
        Tally {
            demanded: demanded.load(Ordering::Relaxed),
            ahead: ahead.load(Ordering::Relaxed),
            first_read: self.first_read.get().copied(),
        }
    }

    /// Bytes have come.
    pub(super) fn count(&self, class: Class, bytes: u64) {
        class.received().add(bytes);
        let of = &self.received[usize::from(class != Class::Demand)];
        of.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Tells that `bytes` are a file of their own, read as such: if it is a safetensors file,
    /// read-ahead knows its tensors.
    pub fn expect_file(&self, bytes: Range<u64>) {
        self.sections.lock().add(bytes);
    }

    /// Reads what is here now: fills `buf` from `offset` and says true, or says false where bytes
    /// are missing. The caller has clipped the range to the object. Never waits for the network.
    ///
    /// # Errors
    /// Where the store is damaged. What the disk does not give counts as missing: [`Handle::read`]
    /// gets it elsewhere.
    pub fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool, FetchError> {
        self.first_read.get_or_init(Instant::now);
        if let Some(engine) = self.engine.upgrade() {
            engine.gate.touch();
        }
        match self.read_here(offset, buf) {
            Err(error) if error.kind() == FetchErrorKind::Disk => Ok(false),
            other => other,
        }
    }

    /// As [`Handle::try_read`], but says what the disk says.
    fn read_here(&self, offset: u64, buf: &mut [u8]) -> Result<bool, FetchError> {
        let state = self.state.read().clone();
        match state {
            State::Complete(complete) => {
                use std::os::unix::fs::FileExt as _;
                complete
                    .file()
                    .read_exact_at(buf, offset)
                    .map_err(|e| FetchError::new(self, FetchErrorKind::Disk, &e))?;
                Ok(true)
            }
            State::Partial(partial) => {
                if self.strict() {
                    return Ok(false);
                }
                let bytes = offset..offset + buf.len() as u64;
                if !self.copy_present(&partial, &bytes, buf)? {
                    return Ok(false);
                }
                // Who finds out that it is wrong, or that what is complete has other bytes, tells of
                // what was served before, not of this.
                if self.strict() || self.complete().is_some() {
                    return Ok(false);
                }
                self.note(&bytes, &partial);
                Ok(true)
            }
            State::Held(data) => match data.get(offset as usize..offset as usize + buf.len()) {
                Some(part) => {
                    buf.copy_from_slice(part);
                    Ok(true)
                }
                None => Ok(false),
            },
            State::Small | State::Streamed => Ok(false),
        }
    }

    /// Reads at demand priority, fetching what is missing; clipped to the object's size and to
    /// 16 MiB.
    ///
    /// # Errors
    /// What the origin, the disk or the verification says, after the configured patience.
    pub async fn read(self: &Arc<Self>, offset: u64, len: usize) -> Result<Bytes, FetchError> {
        let left = self.size().saturating_sub(offset);
        let len = len
            .min(LONGEST_READ)
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(Bytes::new());
        }
        self.expect_reads();
        self.first_read.get_or_init(Instant::now);
        let state = self.state.read().clone();
        let bytes = offset..offset + len as u64;
        let partial = match state {
            State::Complete(_) => {
                let read = self.read_complete(offset, len);
                return self.or_through(read, bytes).await;
            }
            State::Held(data) => return Ok(data.slice(offset as usize..offset as usize + len)),
            State::Small => {
                let data = self.small(Class::Demand).await;
                let read = data.map(|data| data.slice(offset as usize..offset as usize + len));
                return self.or_through(read, bytes).await;
            }
            State::Streamed if self.avoids_disk() => return self.read_through(bytes).await,
            State::Streamed => match self.find_place().await {
                Some(partial) => partial,
                None => return self.read_through(bytes).await,
            },
            State::Partial(partial) => partial,
        };
        if self.strict() {
            self.ensure(Class::Demand).await?;
            return self.read_complete(offset, len);
        }
        let mut data = vec![0; len];
        let filled = self.fill(&partial, &bytes, &mut data).await;
        // Became complete meanwhile, perhaps with other bytes than those that were arriving; or was
        // found wrong.
        let filled = match filled {
            Ok(()) if self.complete().is_some() => self.read_complete(offset, len),
            Ok(()) if self.strict() => {
                let complete = self.ensure(Class::Demand).await;
                complete.and_then(|_| self.read_complete(offset, len))
            }
            filled => filled.map(|()| data.into()),
        };
        self.or_through(filled, bytes).await
    }

    // --- what the engine, flights and the dispatcher need ---

    pub(super) fn part(&self) -> &PartialId {
        &self.part
    }

    /// The origin in use.
    pub(super) fn route(&self) -> Arc<Route> {
        Arc::clone(&self.routes.lock()[0])
    }

    /// How many origins there are.
    pub(super) fn routes(&self) -> usize {
        self.routes.lock().len()
    }

    /// Uses another origin than `failed` from now on; where that is so already, nothing changes.
    pub(super) fn leave(&self, failed: &Arc<Route>) {
        let mut routes = self.routes.lock();
        if routes.front().is_some_and(|r| Arc::ptr_eq(r, failed)) {
            routes.rotate_left(1);
        }
    }

    /// Another user has the object from the same origin, perhaps by other credentials: what is asked
    /// for next comes by those.
    pub(super) fn also_from(&self, object: &Object, source: &Arc<dyn Source>) {
        let Some(location) = object.recipe.location() else {
            return;
        };
        let mut routes = self.routes.lock();
        let same = |r: &Arc<Route>| Arc::ptr_eq(&r.source, source) && r.location == *location;
        if routes.front().is_some_and(same) {
            return;
        }
        routes.retain(|r| !same(r));
        routes.push_front(route(location, source));
        routes.truncate(MAX_ROUTES);
    }

    /// Whether all chunks are here.
    pub(super) fn all_present(&self, partial: &Partial) -> bool {
        self.first_missing(partial).is_none()
    }

    /// The first chunk that is not here; remembers how far they were.
    pub(super) fn first_missing(&self, partial: &Partial) -> Option<u64> {
        let mut prefix = self.prefix.lock();
        let generation = partial.generation();
        if prefix.0 != generation {
            *prefix = (generation, 0);
        }
        let missing = partial.first_missing(prefix.1..partial.chunks());
        prefix.1 = missing.unwrap_or(partial.chunks());
        missing
    }

    pub(super) fn verifier(&self) -> &Verifier {
        &self.verifier
    }

    pub(super) fn last_trouble(&self) -> &LastTrouble {
        &self.trouble
    }

    pub(super) fn is_read(&self) -> bool {
        self.read.load(Ordering::Relaxed)
    }

    /// Chunk `index` of `generation` has begun to arrive in `buf`.
    pub(super) fn arriving(&self, index: u64, generation: u32, buf: &Arc<ChunkBuf>) {
        self.in_memory
            .lock()
            .insert(index, (generation, Arc::clone(buf)));
    }

    /// Lets go of the buffer of a chunk that is in the store.
    pub(super) fn forget(&self, index: u64) {
        self.in_memory.lock().remove(&index);
    }

    /// Chunk `index` is present. The last one has the object verified, whoever asked for it.
    pub(super) fn arrived(&self, partial: &Arc<Partial>, index: u64) {
        if self.is_read()
            && self.all_present(partial)
            && let (Some(engine), Some(me)) = (self.engine.upgrade(), self.me.upgrade())
        {
            engine.runtime.spawn(async move {
                if let Err(error) = me.ensure(Class::Warm).await {
                    tracing::debug!(%error, "could not be completed");
                }
            });
        }
        self.wake();
        let bytes = chunk::bytes(index, self.size());
        let new = bytes.end - bytes.start;
        let since = self.since_checkpoint.fetch_add(new, Ordering::Relaxed) + new;
        if since >= CHECKPOINT_BYTES
            && self
                .since_checkpoint
                .compare_exchange(since, 0, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            checkpoint(partial);
        }
    }

    /// The disk did not give back a chunk.
    pub(super) fn lost(&self, error: &StoreError) {
        *self.lost.lock() = Some(FetchError::store(self, error));
        self.wake();
    }

    /// A flight is over.
    pub(super) fn landed(&self, flight: &Arc<Flight>) {
        self.flights.lock().retain(|f| !Arc::ptr_eq(f, flight));
        if flight.failure().is_some() {
            self.torn.store(true, Ordering::Relaxed);
            // What had begun to arrive and was not committed will arrive in another buffer.
            self.in_memory
                .lock()
                .retain(|_, (_, buf)| Arc::strong_count(buf) > 1);
        }
        self.wake();
        if let Some(engine) = self.engine.upgrade() {
            engine.queue.wake();
        }
    }

    /// Wakes whoever waits for bytes.
    pub(super) fn wake(&self) {
        if self.waiting.load(Ordering::Acquire) > 0 {
            self.changed.notify_waiters();
        }
    }

    /// Somebody waits for all that is on its way.
    pub(super) fn hurry(&self) {
        self.flights.lock().iter().for_each(|flight| flight.hurry());
    }

    /// A part of the flight that takes longest, where one is slow, and has been for a while.
    pub(super) fn relieve(&self, usual: Duration, since: Duration) -> Option<Lease> {
        let flights = self.flights.lock();
        let slow = (flights.iter()).filter_map(|f| Some((f.is_slow(usual, since)?, f)));
        slow.max_by_key(|(takes, _)| *takes)?.1.relieve()
    }

    /// Makes a flight of a lease and lets readers see it.
    pub(super) fn prepare(&self, lease: Lease, class: Class) -> Arc<Flight> {
        let flight = Flight::new(lease, class);
        self.flights.lock().push(Arc::clone(&flight));
        flight
    }

    /// Waits for news of this object, for at most `limit`. Enabled at once: nothing that happens
    /// between this call and the first poll is missed.
    pub(super) fn changed_within(&self, limit: Duration) -> impl Future<Output = ()> {
        let waiting = Waiting::new(&self.waiting);
        let mut changed = Box::pin(self.changed.notified());
        changed.as_mut().enable();
        async move {
            let _waiting = waiting;
            let _ = tokio::time::timeout(limit, changed).await;
        }
    }

    /// Starts a flight for a lease.
    fn launch(self: &Arc<Self>, engine: &Arc<Inner>, lease: Lease, class: Class) -> Arc<Flight> {
        let flight = self.prepare(lease, class);
        let run = flight::run(Arc::clone(engine), Arc::clone(self), Arc::clone(&flight));
        engine.runtime.spawn(run);
        flight
    }

    fn strict(&self) -> bool {
        self.poisoned.load(Ordering::Relaxed)
            || self
                .engine
                .upgrade()
                .is_none_or(|e| e.config.verify == VerifyPolicy::Strict)
    }

    fn engine(&self) -> Result<Arc<Inner>, FetchError> {
        self.engine
            .upgrade()
            .ok_or_else(|| FetchError::cancelled(self))
    }

    fn read_complete(&self, offset: u64, len: usize) -> Result<Bytes, FetchError> {
        let mut data = vec![0; len];
        if self.read_here(offset, &mut data)? {
            return Ok(data.into());
        }
        Err(FetchError::cancelled(self))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.since_checkpoint.load(Ordering::Relaxed) == 0 {
            return;
        }
        // Syncing takes time that whoever lets go last may not have.
        match (self.engine.upgrade(), self.state.get_mut()) {
            (Some(engine), State::Partial(partial)) => {
                let partial = Arc::clone(partial);
                engine.runtime.spawn_blocking(move || checkpoint(&partial));
            }
            (None, State::Partial(partial)) => checkpoint(partial),
            _ => {}
        }
    }
}

/// Makes what is present durable. Blocking.
fn checkpoint(partial: &Partial) {
    if let Err(error) = partial.checkpoint() {
        tracing::warn!(object = %partial.id(), %error, "progress could not be made durable");
    }
}

fn route(location: &Location, source: &Arc<dyn Source>) -> Arc<Route> {
    Arc::new(Route {
        source: Arc::clone(source),
        location: location.clone(),
    })
}

/// Whether content can still be served, just not kept.
fn cannot_keep(kind: StoreErrorKind) -> bool {
    matches!(
        kind,
        StoreErrorKind::NoSpace | StoreErrorKind::ReadOnly | StoreErrorKind::Io
    )
}

/// No reader was served from the partial object yet.
const NOTHING_SERVED: u64 = u64::MAX;

/// Content that was wrong.
struct Wrong {
    error: FetchError,
    times: u32,
    until: Instant,
}

/// Counts those who wait, so that nobody is woken in vain.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
