//! What keeps classes out of each other's way: demand first, and a cap on warm bandwidth.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Longest time that background work stands still for demand before it may move a little: long
/// enough to be out of the way, short enough that no origin drops the connection.
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// How often to look whether somebody has come.
const LOOK: Duration = Duration::from_millis(20);

/// Counts demand under way; background work waits while there is any.
#[derive(Default)]
pub(super) struct DemandGate {
    active: AtomicUsize,
    idle: Notify,
    /// When the last demand was over, or something was used.
    last: Mutex<Option<Instant>>,
}

impl DemandGate {
    /// Notes a demand fetch until the guard is dropped.
    pub(super) fn enter(self: &std::sync::Arc<Self>) -> DemandGuard {
        self.active.fetch_add(1, Ordering::AcqRel);
        DemandGuard(std::sync::Arc::clone(self))
    }

    /// Notes that somebody uses what is here.
    pub(super) fn touch(&self) {
        *self.last.lock() = Some(Instant::now());
    }

    /// Whether demand is under way.
    pub(super) fn busy(&self) -> bool {
        self.active.load(Ordering::Acquire) > 0
    }

    /// Waits until there was no demand, and no use, for `quiet`; at most until `deadline`.
    pub(super) async fn quiet(&self, quiet: Duration, deadline: Instant) {
        loop {
            let now = Instant::now();
            if now >= deadline {
                return;
            }
            let since = self.last.lock().map(|last| now.duration_since(last));
            let left = match since {
                _ if self.busy() => quiet,
                Some(since) if since < quiet => quiet - since,
                _ => return,
            };
            tokio::time::sleep(left.min(deadline - now)).await;
        }
    }

    /// Waits until there is demand, or use, from now on.
    pub(super) async fn used(&self) {
        let now = Instant::now();
        while !self.busy() && self.last.lock().is_none_or(|last| last <= now) {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until no demand is under way, but not for ever.
    pub(super) async fn yield_to_demand(&self) {
        if !self.busy() {
            return;
        }
        let until = tokio::time::Instant::now() + LONGEST_PAUSE;
        loop {
            let idle = self.idle.notified();
            if !self.busy() || tokio::time::timeout_at(until, idle).await.is_err() {
                return;
            }
        }
    }
}

/// One demand fetch under way.
pub(super) struct DemandGuard(std::sync::Arc<DemandGate>);

impl Drop for DemandGuard {
    fn drop(&mut self) {
        if self.0.active.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.touch();
            self.0.idle.notify_waiters();
        }
    }
}

/// A token bucket of bytes.
pub(super) struct Bandwidth {
    per_second: Option<f64>,
    /// When the bytes handed out so far will have been earned.
    paid_until: Mutex<Instant>,
}

/// What may be spent at once after a quiet time.
const BURST: Duration = Duration::from_millis(100);

impl Bandwidth {
    /// At most `per_second` bytes a second; unlimited where `None`.
    pub(super) fn new(per_second: Option<u64>) -> Self {
        Self {
            per_second: per_second.map(|b| b.max(1) as f64),
            paid_until: Mutex::new(Instant::now()),
        }
    }

    pub(super) const fn is_capped(&self) -> bool {
        self.per_second.is_some()
    }

    /// Waits until `bytes` may be spent.
    pub(super) async fn spend(&self, bytes: usize) {
        let Some(per_second) = self.per_second else {
            return;
        };
        let until = {
            let mut paid = self.paid_until.lock();
            let now = Instant::now();
            let start = (*paid).max(now.checked_sub(BURST).unwrap_or(now));
            *paid = start + Duration::from_secs_f64(bytes as f64 / per_second);
            *paid
        };
        tokio::time::sleep_until(until.into()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn bandwidth_is_kept() {
        let bandwidth = Bandwidth::new(Some(10 << 20));
        let start = Instant::now();
        for _ in 0..5 {
            bandwidth.spend(1 << 20).await;
        }
        assert!(start.elapsed() >= Duration::from_millis(350));
        Bandwidth::new(None).spend(usize::MAX).await;
    }

    #[tokio::test]
    async fn quiet_is_waited_for_but_not_for_ever() {
        let gate = Arc::new(DemandGate::default());
        let soon = || Instant::now() + Duration::from_millis(80);
        let (quiet, started) = (Duration::from_millis(20), Instant::now());
        gate.quiet(quiet, soon()).await;
        drop(gate.enter());
        gate.quiet(quiet, soon()).await;
        assert!(started.elapsed() >= quiet);
        let _demand = gate.enter();
        let until = soon();
        gate.quiet(quiet, until).await;
        assert!(Instant::now() >= until);
    }

    #[tokio::test]
    async fn use_is_noticed_from_now_on() {
        let gate = Arc::new(DemandGate::default());
        drop(gate.enter());
        let mut used = Box::pin(gate.used());
        let early = tokio::time::timeout(LOOK * 3, &mut used).await;
        assert!(early.is_err(), "what was before does not count");
        gate.touch();
        used.await;
        let _demand = gate.enter();
        gate.used().await;
    }

    #[tokio::test]
    async fn background_waits_for_demand_but_not_for_ever() {
        let gate = Arc::new(DemandGate::default());
        gate.yield_to_demand().await;
        let guard = gate.enter();
        let start = tokio::time::Instant::now();
        gate.yield_to_demand().await;
        assert!(start.elapsed() >= LONGEST_PAUSE);
        let waiting = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { gate.yield_to_demand().await }
        });
        tokio::task::yield_now().await;
        drop(guard);
        waiting.await.unwrap();
    }
}
