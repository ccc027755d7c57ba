//! The one place that decides about retries.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::{
    metrics,
    source::{SourceError, SourceErrorKind},
};

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
    /// The origin gave some of it before: a refusal is one that may pass, such as of credentials
    /// that are being renewed.
    gave: bool,
}

impl Retry {
    /// Gives up after `patience` without progress. `gave`: the origin gave some of it before.
    pub(super) fn new(patience: Duration, gave: bool) -> Self {
        Self {
            patience,
            since: Instant::now(),
            failures: 0,
            gave,
        }
    }

    /// Bytes arrived: the count starts again.
    pub(super) fn progress(&mut self) {
        self.since = Instant::now();
        self.failures = 0;
        self.gave = true;
    }

    /// The pause before the next try, or `None` where another try is no use.
    pub(super) fn pause(&mut self, error: &SourceError) -> Option<Duration> {
        self.failures += 1;
        count(error.kind());
        let worth_it = match error.kind() {
            SourceErrorKind::NotFound | SourceErrorKind::Changed | SourceErrorKind::Invalid => {
                false
            }
            SourceErrorKind::Denied => self.gave,
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

/// Whether an error says something of one origin, rather than of the way to it: another may do better.
pub(super) const fn is_of_origin(kind: SourceErrorKind) -> bool {
    matches!(
        kind,
        SourceErrorKind::Denied
            | SourceErrorKind::NotFound
            | SourceErrorKind::Changed
            | SourceErrorKind::Corrupt
    )
}

/// Counts a failure by what it means.
fn count(kind: SourceErrorKind) {
    let metrics = metrics::global();
    let counter = match kind {
        SourceErrorKind::Unavailable => &metrics.fetch_failed_unavailable,
        SourceErrorKind::Throttled => &metrics.fetch_failed_throttled,
        SourceErrorKind::Denied => &metrics.fetch_failed_denied,
        SourceErrorKind::NotFound
        | SourceErrorKind::Changed
        | SourceErrorKind::Corrupt
        | SourceErrorKind::Invalid => &metrics.fetch_failed_other,
    };
    counter.add(1);
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
    /// Bytes arrived, ever.
    gave: AtomicBool,
    any: AtomicBool,
    trouble: Mutex<Option<Trouble>>,
}

impl LastTrouble {
    /// `gave`: the origin gave some of it to an earlier process.
    pub(super) fn new(gave: bool) -> Self {
        let gave = AtomicBool::new(gave);
        Self {
            gave,
            ..Self::default()
        }
    }

    /// `error` is about to be waited out, for `pause` at first. The first of a trouble is worth a warning
    /// where somebody reads; whoever warms is told otherwise.
    pub(super) fn note(&self, retry: &Retry, error: &SourceError, pause: Duration, is_read: bool) {
        *self.trouble.lock() = Some(Trouble {
            error: error.to_string(),
            since: retry.since,
            until: retry.since + retry.patience,
        });
        let is_first = !self.any.swap(true, Ordering::AcqRel);
        match is_first && is_read {
            true => tracing::warn!(%error, ?pause, patience = ?retry.patience, "trying again"),
            false => tracing::info!(%error, ?pause, "trying again"),
        }
    }

    /// Whether the origin gave bytes of it before.
    pub(super) fn gave(&self) -> bool {
        self.gave.load(Ordering::Relaxed)
    }

    /// Bytes arrived.
    pub(super) fn is_over(&self) {
        self.gave.store(true, Ordering::Relaxed);
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
            assert_eq!(Retry::new(patience, false).pause(&error(kind)), None);
        }
        // Refused in the middle of what was given: credentials may be renewed.
        let mut given = Retry::new(patience, false);
        given.progress();
        for mut retry in [given, Retry::new(patience, true)] {
            assert!(retry.pause(&error(SourceErrorKind::Denied)).is_some());
            assert_eq!(retry.pause(&error(SourceErrorKind::NotFound)), None);
        }
        let mut retry = Retry::new(patience, false);
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
            Retry::new(Duration::ZERO, true).pause(&error(SourceErrorKind::Unavailable)),
            None
        );
    }
}
