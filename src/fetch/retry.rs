//! The one place that decides about retries.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::source::{SourceError, SourceErrorKind};

/// First pause between tries; doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause that is not asked for by the origin.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// A broken answer is worth this many tries without progress.
const CORRUPT_TRIES: u32 = 4;

/// Tries at one range: how many failed since the last progress, and for how long.
pub(super) struct Retry {
    patience: Duration,
    since: Instant,
    failures: u32,
}

impl Retry {
    /// Gives up after `patience` without progress.
    pub(super) fn new(patience: Duration) -> Self {
        Self {
            patience,
            since: Instant::now(),
            failures: 0,
        }
    }

    /// Bytes arrived: the count starts again.
    pub(super) fn progress(&mut self) {
        self.since = Instant::now();
        self.failures = 0;
    }

    /// The pause before the next try, or `None` where another try is no use.
    pub(super) fn pause(&mut self, error: &SourceError) -> Option<Duration> {
        self.failures += 1;
        let worth_it = match error.kind() {
            SourceErrorKind::NotFound
            | SourceErrorKind::Denied
            | SourceErrorKind::Changed
            | SourceErrorKind::Invalid => false,
            SourceErrorKind::Corrupt => self.failures < CORRUPT_TRIES,
            SourceErrorKind::Throttled | SourceErrorKind::Unavailable => true,
        };
        let left = self.patience.checked_sub(self.since.elapsed())?;
        if !worth_it {
            return None;
        }
        let doubled = FIRST_PAUSE * 2u32.pow((self.failures - 1).min(8));
        let backoff = jitter(doubled.min(MAX_PAUSE));
        Some(match error.retry_after() {
            // The origin's word counts, as far as patience goes; then one last try.
            Some(asked) => asked.max(backoff).min(left),
            None => backoff,
        })
    }
}

/// Why nothing arrives of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// What the origin, or the way to it, said last.
    pub error: String,
    /// Nothing has arrived since.
    pub since: Instant,
    /// When it will be given up.
    pub until: Instant,
}

/// The trouble of one object, for those who show how it does.
#[derive(Default)]
pub(super) struct LastTrouble {
    any: AtomicBool,
    trouble: Mutex<Option<Trouble>>,
}

impl LastTrouble {
    /// `error` is about to be waited out.
    pub(super) fn note(&self, retry: &Retry, error: &SourceError) {
        *self.trouble.lock() = Some(Trouble {
            error: error.to_string(),
            since: retry.since,
            until: retry.since + retry.patience,
        });
        self.any.store(true, Ordering::Release);
    }

    /// Bytes arrived.
    pub(super) fn is_over(&self) {
        if self.any.load(Ordering::Acquire) {
            self.any.store(false, Ordering::Release);
            *self.trouble.lock() = None;
        }
    }

    pub(super) fn get(&self) -> Option<Trouble> {
        self.trouble.lock().clone()
    }
}

/// Between half of `pause` and all of it, so that many waiting do not come back at once.
fn jitter(pause: Duration) -> Duration {
    use std::hash::{BuildHasher, RandomState};
    let random = RandomState::new().hash_one(0u8) % 1000;
    pause / 2 + pause.mul_f64(random as f64 / 2000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(kind: SourceErrorKind) -> SourceError {
        SourceError::new(kind, "x", "y")
    }

    #[test]
    fn kinds_decide() {
        let patience = Duration::from_secs(60);
        for kind in [
            SourceErrorKind::NotFound,
            SourceErrorKind::Denied,
            SourceErrorKind::Changed,
            SourceErrorKind::Invalid,
        ] {
            assert_eq!(Retry::new(patience).pause(&error(kind)), None);
        }
        let mut retry = Retry::new(patience);
        for _ in 0..CORRUPT_TRIES - 1 {
            assert!(retry.pause(&error(SourceErrorKind::Corrupt)).is_some());
        }
        assert_eq!(retry.pause(&error(SourceErrorKind::Corrupt)), None);
        for _ in 0..100 {
            let pause = retry.pause(&error(SourceErrorKind::Unavailable)).unwrap();
            assert!(pause <= MAX_PAUSE);
        }
        let asked = error(SourceErrorKind::Throttled).with_retry_after(Some(patience / 2));
        assert!(retry.pause(&asked).unwrap() >= patience / 2);
        assert_eq!(
            Retry::new(Duration::ZERO).pause(&error(SourceErrorKind::Unavailable)),
            None
        );
    }
}
