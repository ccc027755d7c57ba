//! The fetch engine: brings objects from sources into the store, and answers readers meanwhile.
//!
//! Three classes: a reader who waits ([`Class::Demand`]) goes before what a reader will want next
//! ([`Class::Readahead`]), which goes before background work ([`Class::Warm`]). Every chunk is
//! fetched by exactly one flight, which holds its lease; all who want it wait for that one.
//! Memory is one fixed budget of chunk buffers. When a range is asked for again, `source::Retry` decides.
//! Nothing becomes complete before its digest was checked.
//!
//! Called by `fs` (reads) and `node` (warm). What survives a crash is in the store; the engine
//! itself keeps nothing.

mod buffer;
mod dispatch;
mod flight;
mod handle;
mod limits;
mod recent;
mod retry;
mod safetensors;
mod small;
mod stream;
mod verify;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, SemaphorePermit};

use self::{
    buffer::Pool,
    dispatch::Queue,
    limits::{Bandwidth, DemandGate},
    recent::Recent,
    small::SmallObjects,
};
pub use self::{
    handle::{Handle, Tally},
    retry::Trouble,
};
use crate::{
    chunk::CHUNK_SIZE,
    digest::ObjectId,
    metrics::{self, Metric},
    source::{Source, SourceError, SourceErrorKind},
    store::{Store, StoreError, StoreErrorKind},
    tree::Object,
};

/// Who waits for the bytes; the first goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// A reader waits.
    Demand,
    /// A sequential reader will be there soon.
    Readahead,
    /// Nobody waits.
    Warm,
}

impl Class {
    fn received(self) -> &'static Metric {
        let metrics = metrics::global();
        match self {
            Self::Demand => &metrics.fetch_demand_bytes,
            Self::Readahead => &metrics.fetch_readahead_bytes,
            Self::Warm => &metrics.fetch_warm_bytes,
        }
    }
}

/// What may be served before the whole object is verified (see `ARCHITECTURE.md`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum VerifyPolicy {
    /// Bytes are served as they arrive; the whole is verified when it is complete.
    #[default]
    Complete,
    /// Nothing is served before the whole object is verified.
    Strict,
}

/// Settings of the engine: `[fetch]` in the configuration file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Connections for background work, at most; the engine finds out how many are good.
    pub max_connections: usize,
    /// Memory for bytes in flight.
    pub memory: crate::store::ByteSize,
    /// Bytes per second for background work; unlimited where not set.
    pub warm_bandwidth: Option<crate::store::ByteSize>,
    /// What may be served before the whole object is verified.
    pub verify: VerifyPolicy,
    /// How long to try again without progress before giving up, in seconds.
    #[serde(rename = "patience_seconds", with = "seconds")]
    pub patience: Duration,
    /// How long a request may stay without a byte, in seconds.
    #[serde(rename = "stall_seconds", with = "seconds")]
    pub stall_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_connections: 16,
            memory: crate::store::ByteSize(128 << 20),
            warm_bandwidth: None,
            verify: VerifyPolicy::Complete,
            patience: Duration::from_secs(60),
            stall_timeout: Duration::from_secs(15),
        }
    }
}

impl Config {
    /// Whether something can be fetched with these settings.
    ///
    /// # Errors
    /// Names the setting, and says what was expected.
    pub fn check(&self) -> Result<(), String> {
        let wrong = |what: String| Err(format!("fetch.{what}"));
        let stall = self.stall_timeout.as_secs_f64();
        if stall < 1.0 {
            return wrong(format!("stall_seconds = {stall}: expected at least 1"));
        }
        if self.max_connections == 0 {
            return wrong("max_connections = 0: expected at least 1".into());
        }
        if self.memory.0 < Pool::LEAST {
            let (found, least) = (self.memory, crate::store::ByteSize(Pool::LEAST));
            return wrong(format!("memory = {found}: expected at least {least}"));
        }
        if self.warm_bandwidth.is_some_and(|bytes| bytes.0 == 0) {
            return wrong("warm_bandwidth = 0: expected bytes a second, or nothing".into());
        }
        Ok(())
    }
}

mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_f64(d.as_secs_f64())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        let seconds = f64::deserialize(d)?;
        if !(0.0..=86_400.0).contains(&seconds) {
            return Err(D::Error::custom("expected seconds between 0 and 86400"));
        }
        Ok(Duration::from_secs_f64(seconds))
    }
}

/// Told what is read: the object, and which bytes of it. It must not block.
pub type OnRead = Arc<dyn Fn(&ObjectId, std::ops::Range<u64>) + Send + Sync>;

/// The engine; one per process. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

/// What flights, handles and the dispatcher share.
struct Inner {
    store: Arc<Store>,
    config: Config,
    runtime: tokio::runtime::Handle,
    pool: Arc<Pool>,
    recent: Recent,
    gate: Arc<DemandGate>,
    bandwidth: Bandwidth,
    queue: Queue,
    small: SmallObjects,
    small_slots: Semaphore,
    /// By id: one for each who claims to have it.
    handles: Mutex<HashMap<ObjectId, Vec<Weak<Handle>>>>,
    /// Smoothed time to the first answer, in microseconds.
    answer_micros: AtomicU64,
    /// Smoothed time that a chunk takes in the background, in microseconds; 0 until one came.
    chunk_micros: AtomicU64,
}

impl Engine {
    /// An engine that runs on the current tokio runtime.
    pub fn new(store: Arc<Store>, config: Config) -> Self {
        Self::with_gate(store, config, Arc::default())
    }

    /// Another one over the same store, with memory and bandwidth of its own: its background work stands back for the
    /// demand of both. Where both fetch the same, the store lets one of them.
    #[must_use]
    pub fn beside(&self, config: Config) -> Self {
        let gate = Arc::clone(&self.inner.gate);
        Self::with_gate(Arc::clone(self.store()), config, gate)
    }

    fn with_gate(store: Arc<Store>, config: Config, gate: Arc<DemandGate>) -> Self {
        let runtime = tokio::runtime::Handle::current();
        let inner = Arc::new(Inner {
            small: SmallObjects::new(Arc::clone(&store), &runtime),
            small_slots: Semaphore::new(config.max_connections.max(1)),
            store,
            pool: Pool::new(config.memory.0),
            recent: Recent::new((config.memory.0 / CHUNK_SIZE / 4) as usize),
            gate,
            bandwidth: Bandwidth::new(config.warm_bandwidth.map(|b| b.0)),
            queue: Queue::new(config.max_connections),
            handles: Mutex::default(),
            answer_micros: AtomicU64::new(50_000),
            chunk_micros: AtomicU64::new(0),
            runtime: runtime.clone(),
            config,
        });
        runtime.spawn(Queue::dispatch(Arc::downgrade(&inner), inner.queue.waker()));
        Self { inner }
    }

    /// The handle of `object`; while somebody holds it the same one for equal ids from the same origin:
    /// what is not verified is for nobody else.
    ///
    /// # Errors
    /// Where the store cannot be read or written.
    pub fn open(
        &self,
        object: &Object,
        source: &Arc<dyn Source>,
    ) -> Result<Arc<Handle>, FetchError> {
        let part = object.partial_id(&source.origin());
        let known = |handles: &HashMap<ObjectId, Vec<Weak<Handle>>>| {
            let mut open = handles.get(&object.id)?.iter().filter_map(Weak::upgrade);
            open.find(|handle| *handle.part() == part)
        };
        let shared = |handle: Arc<Handle>| match handle.size() == object.size {
            true => {
                handle.also_from(object, source);
                Ok(handle)
            }
            false => Err(FetchError::other_size(
                handle.name(),
                object.size,
                handle.size(),
            )),
        };
        if let Some(handle) = known(&self.inner.handles.lock()) {
            return shared(handle);
        }
        // Not under the lock: the store may have to wait for another process.
        let handle = Handle::new(&self.inner, object, part, source)?;
        let mut handles = self.inner.handles.lock();
        if let Some(handle) = known(&handles) {
            return shared(handle);
        }
        if handles.len() > 64 && handles.len().is_power_of_two() {
            handles.retain(|_, open| open.iter().any(|handle| handle.strong_count() > 0));
        }
        let open = handles.entry(object.id).or_default();
        open.retain(|handle| handle.strong_count() > 0);
        open.push(Arc::downgrade(&handle));
        Ok(handle)
    }

    /// Takes note that `id` may have become complete by another way: it came with something else.
    /// Who reads it goes on with the complete object. Blocks on the disk.
    pub fn came(&self, id: &ObjectId) {
        self.inner.came(id);
    }

    /// Waits until what was served before it was stored is stored: to be called when serving ends.
    /// Gives up after a few seconds.
    pub async fn settle(&self) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        self.inner.small.settle(deadline).await;
    }

    /// Notes that somebody uses content, be it complete: background work that can wait does.
    pub fn touch(&self) {
        self.inner.gate.touch();
    }

    /// Waits until nobody has waited for bytes, or used content, for as long as `quiet`; at most
    /// until `deadline`.
    pub async fn quiet(&self, quiet: Duration, deadline: std::time::Instant) {
        self.inner.gate.quiet(quiet, deadline).await;
    }

    /// Waits until somebody waits for bytes, or uses content, from now on.
    pub async fn used(&self) {
        self.inner.gate.used().await;
    }

    /// Its settings.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// The store that the engine fills.
    pub fn store(&self) -> &Arc<Store> {
        &self.inner.store
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.queue.wake(); // the dispatcher sees that the engine is gone
    }
}

impl Inner {
    async fn small_slot(&self) -> Option<SemaphorePermit<'_>> {
        self.small_slots.acquire().await.ok()
    }

    fn came(&self, id: &ObjectId) {
        let open = self.handles.lock().get(id).cloned().unwrap_or_default();
        for handle in open.iter().filter_map(Weak::upgrade) {
            if let Err(error) = handle.look() {
                tracing::debug!(%error, "could not look at what came");
            }
        }
    }

    fn throttled(&self, error: &SourceError) {
        if error.kind() == SourceErrorKind::Throttled {
            self.queue.back_off();
        }
    }

    fn answer_time(&self) -> Duration {
        Duration::from_micros(self.answer_micros.load(Ordering::Relaxed))
    }

    fn answered(&self, took: Duration) {
        let old = self.answer_micros.load(Ordering::Relaxed);
        let new = (old * 7 + took.as_micros().min(10_000_000) as u64) / 8;
        self.answer_micros.store(new, Ordering::Relaxed);
    }

    /// What a chunk usually takes in the background; `None` where that is not known, or background work is held back.
    fn usual_pace(&self) -> Option<Duration> {
        let micros = self.chunk_micros.load(Ordering::Relaxed);
        let held_back = self.gate.busy() || self.bandwidth.is_capped();
        (micros > 0 && !held_back).then(|| Duration::from_micros(micros))
    }

    /// A chunk took so long in the background. A single slow one does not make that usual.
    fn brought_at(&self, pace: Duration) {
        let new = (pace.as_micros() as u64).max(1);
        let old = self.chunk_micros.load(Ordering::Relaxed);
        let smoothed = match old {
            0 => new,
            old => (old * 7 + new.min(old * 2)).div_ceil(8),
        };
        self.chunk_micros.store(smoothed, Ordering::Relaxed);
    }
}

/// What a failed fetch means to whoever asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FetchErrorKind {
    /// The origin does not have it.
    NotFound,
    /// The origin does not give it to us.
    Denied,
    /// The origin holds another generation now.
    Changed,
    /// The content does not match its digest.
    Corrupt,
    /// The origin could not be reached within the configured patience.
    Unavailable,
    /// The disk is full, or cannot be written.
    NoSpace,
    /// The disk or the store failed.
    Disk,
    /// The process is shutting down.
    Cancelled,
}

/// Why an object could not be fetched or read. Cloned for everyone who waits.
#[derive(Debug, Clone)]
pub struct FetchError {
    kind: FetchErrorKind,
    message: Arc<str>,
    hint: Option<&'static str>,
}

impl std::error::Error for FetchError {}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl FetchError {
    /// What it means.
    pub const fn kind(&self) -> FetchErrorKind {
        self.kind
    }

    /// What to try, for a person, where the source or the store knows.
    pub const fn hint(&self) -> Option<&'static str> {
        self.hint
    }

    /// The same for whoever reads an object as a source of others. It was tried again for as long
    /// as is configured: no use in trying once more, and so none of the kinds are told that mean that.
    pub fn as_source(&self) -> SourceError {
        let kind = match self.kind {
            FetchErrorKind::NotFound => SourceErrorKind::NotFound,
            FetchErrorKind::Denied => SourceErrorKind::Denied,
            FetchErrorKind::Changed => SourceErrorKind::Changed,
            FetchErrorKind::Corrupt => SourceErrorKind::Corrupt,
            FetchErrorKind::Unavailable => SourceErrorKind::Unavailable,
            FetchErrorKind::NoSpace | FetchErrorKind::Disk | FetchErrorKind::Cancelled => {
                SourceErrorKind::Invalid
            }
        };
        let (what, why) = self.message.split_once(": ").unwrap_or(("", &self.message));
        let error = SourceError::new(kind, what, why);
        match self.hint {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }

    fn new(handle: &Handle, kind: FetchErrorKind, why: &dyn fmt::Display) -> Self {
        Self {
            kind,
            message: format!("{}: {why}", handle.name()).into(),
            hint: None,
        }
    }

    fn source(handle: &Handle, error: &SourceError) -> Self {
        let kind = match error.kind() {
            SourceErrorKind::NotFound => FetchErrorKind::NotFound,
            // It gave some of it before: credentials that have expired may be renewed.
            SourceErrorKind::Denied if handle.last_trouble().gave() => FetchErrorKind::Unavailable,
            SourceErrorKind::Denied => FetchErrorKind::Denied,
            SourceErrorKind::Changed => FetchErrorKind::Changed,
            SourceErrorKind::Corrupt => FetchErrorKind::Corrupt,
            SourceErrorKind::Throttled
            | SourceErrorKind::Unavailable
            | SourceErrorKind::Invalid => FetchErrorKind::Unavailable,
        };
        let mut message = error.to_string();
        // Over HTTP it names the URL already.
        if !message.contains(handle.name()) {
            message = format!("{}: {message}", handle.name());
        }
        Self {
            kind,
            message: message.into(),
            hint: error.hint(),
        }
    }

    fn store(handle: &Handle, error: &StoreError) -> Self {
        Self::store_named(handle.name(), error)
    }

    fn store_named(name: &str, error: &StoreError) -> Self {
        let kind = match error.kind() {
            StoreErrorKind::NoSpace | StoreErrorKind::ReadOnly => FetchErrorKind::NoSpace,
            StoreErrorKind::Damaged => FetchErrorKind::Corrupt,
            _ => FetchErrorKind::Disk,
        };
        Self {
            kind,
            message: format!("{name}: {error}").into(),
            hint: error.hint(),
        }
    }

    fn no_place(object: &Object) -> Self {
        let message = format!(
            "{}: it is a part of another object, and is read through that",
            object.id
        );
        Self {
            kind: FetchErrorKind::Corrupt,
            message: message.into(),
            hint: None,
        }
    }

    fn other_size(name: &str, claimed: u64, real: u64) -> Self {
        let message = format!("{name}: the origin claims {claimed} bytes, its digest has {real}");
        Self {
            kind: FetchErrorKind::Corrupt,
            message: message.into(),
            hint: None,
        }
    }

    fn cancelled(handle: &Handle) -> Self {
        Self::new(
            handle,
            FetchErrorKind::Cancelled,
            &"the fetch was cancelled",
        )
    }
}
