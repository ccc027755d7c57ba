//! Decoded spans: those that are here, the least recently used of which goes first, and those that
//! are on their way, each of them once. When no span was asked for in a while, all that are here go.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    limits,
    source::{SourceError, SourceErrorKind},
};

/// How long no span has to be asked for, so that none is kept.
const IDLE: Duration = Duration::from_secs(20);

/// The number of a layer, and the span.
type Key = (u64, usize);
type Arrival = Option<Result<Bytes, SourceError>>;

#[derive(Clone)]
pub(in crate::image) struct Cache(Arc<Inner>);

struct Inner {
    /// Most bytes that are kept.
    limit: usize,
    /// How long nobody has to ask for any, so that they go.
    idle: Duration,
    numbers: AtomicU64,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    slots: HashMap<Key, Slot>,
    /// Those that are here by their last use.
    order: BTreeMap<u64, Key>,
    clock: u64,
    bytes: usize,
    /// Whether somebody sees to it that they go.
    is_watched: bool,
}

enum Slot {
    Here { bytes: Bytes, used: u64 },
    Flying(watch::Sender<Arrival>),
}

/// A span that is here or on its way.
pub(super) enum Flight {
    Here(Bytes),
    Flying(watch::Receiver<Arrival>),
}

/// The promise that a span comes; one that is dropped tells those who wait that it does not.
pub(super) struct Landing {
    cache: Cache,
    key: Key,
    waiters: watch::Sender<Arrival>,
    landed: bool,
}

impl Cache {
    pub(in crate::image) fn new(limit: usize) -> Self {
        Self::idle_after(limit, IDLE)
    }

    fn idle_after(limit: usize, idle: Duration) -> Self {
        Self(Arc::new(Inner {
            limit,
            idle,
            numbers: AtomicU64::new(0),
            slots: Mutex::default(),
        }))
    }

    /// A number for a layer.
    pub(super) fn number(&self) -> u64 {
        self.0.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Lets go of what is kept, once it has not been used in a while.
    fn watch(&self, slots: &mut Slots) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        if std::mem::replace(&mut slots.is_watched, true) {
            return;
        }
        let (cache, mut seen) = (Arc::downgrade(&self.0), slots.clock);
        let idle = self.0.idle;
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(idle).await;
                let Some(cache) = cache.upgrade() else { return };
                let mut slots = cache.slots.lock();
                if slots.clock == seen {
                    let gone = slots.clear();
                    slots.is_watched = false;
                    drop(slots);
                    drop(gone);
                    limits::give_memory_back();
                    return;
                }
                seen = slots.clock;
            }
        });
    }

    /// All of `spans`, and the promises that the caller makes for those that are neither here nor
    /// on their way.
    pub(super) fn start(
        &self,
        layer: u64,
        spans: Range<usize>,
    ) -> (VecDeque<Flight>, Vec<Landing>) {
        let mut slots = self.0.slots.lock();
        let mut missing = Vec::new();
        let flights = spans.map(|span| {
            let key = (layer, span);
            if let Some(bytes) = slots.touch(key) {
                return Flight::Here(bytes);
            }
            if let Some(Slot::Flying(waiters)) = slots.slots.get(&key) {
                return Flight::Flying(waiters.subscribe());
            }
            let (waiters, receiver) = watch::channel(None);
            let slot = Slot::Flying(waiters.clone());
            slots.slots.insert(key, slot);
            missing.push(Landing {
                cache: self.clone(),
                key,
                waiters,
                landed: false,
            });
            Flight::Flying(receiver)
        });
        (flights.collect(), missing)
    }
}

impl Slots {
    /// Takes out all that are here.
    fn clear(&mut self) -> Vec<Slot> {
        self.bytes = 0;
        let here = std::mem::take(&mut self.order).into_values();
        here.filter_map(|key| self.slots.remove(&key)).collect()
    }

    /// A span that is here; it was used now.
    fn touch(&mut self, key: Key) -> Option<Bytes> {
        let Some(Slot::Here { bytes, used }) = self.slots.get_mut(&key) else {
            return None;
        };
        self.order.remove(used);
        self.clock += 1;
        *used = self.clock;
        self.order.insert(self.clock, key);
        Some(bytes.clone())
    }

    fn keep(&mut self, key: Key, bytes: Bytes, limit: usize) {
        self.bytes += bytes.len();
        self.clock += 1;
        let used = self.clock;
        self.order.insert(used, key);
        self.slots.insert(key, Slot::Here { bytes, used });
        while self.bytes > limit
            && let Some((_, oldest)) = self.order.pop_first()
        {
            if let Some(Slot::Here { bytes, .. }) = self.slots.remove(&oldest) {
                self.bytes -= bytes.len();
            }
        }
    }
}

impl Flight {
    /// Waits for it.
    pub(super) async fn land(self) -> Result<Bytes, SourceError> {
        let mut receiver = match self {
            Self::Here(bytes) => return Ok(bytes),
            Self::Flying(receiver) => receiver,
        };
        match receiver.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(arrival)) => arrival.clone(),
            _ => Err(given_up()),
        }
    }
}

impl Landing {
    pub(super) const fn span(&self) -> usize {
        self.key.1
    }

    /// Whether anybody waits for it.
    pub(super) fn is_awaited(&self) -> bool {
        self.waiters.receiver_count() > 0
    }

    /// Returns once nobody waits for it.
    pub(super) async fn given_up(&self) {
        self.waiters.closed().await;
    }

    pub(super) fn land(mut self, arrival: Result<Bytes, SourceError>) {
        self.arrive(arrival);
    }

    pub(super) fn fail(mut self, error: &SourceError) {
        self.arrive(Err(error.clone()));
    }

    fn arrive(&mut self, arrival: Result<Bytes, SourceError>) {
        self.landed = true;
        let mut slots = self.cache.0.slots.lock();
        slots.slots.remove(&self.key);
        if let Ok(bytes) = &arrival {
            slots.keep(self.key, bytes.clone(), self.cache.0.limit);
            self.cache.watch(&mut slots);
        }
        drop(slots);
        self.waiters.send_replace(Some(arrival));
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if !self.landed {
            self.arrive(Err(given_up()));
        }
    }
}

/// Kind Unavailable: whoever still wants it asks again.
fn given_up() -> SourceError {
    let why = "the read of this part was given up";
    SourceError::new(SourceErrorKind::Unavailable, "a layer", why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_flight_and_a_bounded_cache() {
        let cache = Cache::new(10);
        let (first, mut missing) = cache.start(1, 0..2);
        assert_eq!(missing.len(), 2);
        let (mut second, none) = cache.start(1, 1..2);
        assert!(none.is_empty());
        let one = missing.pop().unwrap();
        assert_eq!(one.span(), 1);
        one.land(Ok(Bytes::from_static(b"12345678")));
        let second = second.pop_front().unwrap().land().await;
        assert_eq!(&second.unwrap()[..], b"12345678");
        // A promise that is not kept is told, and made again.
        assert!(missing[0].is_awaited());
        missing.clear();
        for (at, flight) in first.into_iter().enumerate() {
            assert_eq!(flight.land().await.is_ok(), at == 1);
        }
        let (flights, mut missing) = cache.start(1, 0..2);
        assert_eq!(missing.len(), 1);
        drop(flights);
        assert!(!missing[0].is_awaited());
        // The oldest goes.
        missing.pop().unwrap().land(Ok(Bytes::from_static(b"abcd")));
        let (_, missing) = cache.start(1, 0..2);
        assert_eq!(missing.len(), 1);
        assert_eq!(missing[0].span(), 1);
        assert_eq!(cache.0.slots.lock().bytes, 4);
    }

    #[tokio::test]
    async fn what_is_not_used_is_not_kept_for_long() {
        let cache = Cache::idle_after(100, Duration::from_millis(10));
        let (_flights, mut missing) = cache.start(1, 0..3);
        let promised = missing.pop().unwrap();
        for landing in missing {
            landing.land(Ok(Bytes::from_static(b"12345678")));
        }
        let empty = async || {
            while cache.0.slots.lock().bytes > 0 {
                tokio::task::yield_now().await;
            }
            assert_eq!(cache.0.slots.lock().order.len(), 0);
        };
        empty().await;
        // What is on its way comes, and goes in its turn.
        promised.land(Ok(Bytes::from_static(b"abcd")));
        assert_eq!(cache.start(1, 0..3).1.len(), 2);
        empty().await;
    }
}
