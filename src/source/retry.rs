//! When a request that failed is sent again: the one place that decides, for ranges (in the engine) and
//! for what is asked to resolve a reference (here).

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use super::{SourceError, SourceErrorKind};
use crate::metrics;

/// First pause between tries; doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause that is not asked for by the origin.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// A broken answer is worth this many tries without progress.
const CORRUPT_TRIES: u32 = 4;
/// Longest patience of a resolve with an origin that is down: a person may wait, and the name may be wrong.
const BRIEF: Duration = Duration::from_secs(15);

/// Tries at one request: how many failed since the last progress, and for how long.
pub(crate) struct Retry {
    patience: Duration,
    since: Instant,
    failures: u32,
    /// The origin gave some of it before: a refusal is one that may pass, such as of credentials
    /// that are being renewed.
    gave: bool,
}

impl Retry {
    /// Gives up after `patience` without progress. `gave`: the origin gave some of it before.
    pub(crate) fn new(patience: Duration, gave: bool) -> Self {
        Self {
            patience,
            since: Instant::now(),
            failures: 0,
            gave,
        }
    }

    /// When the tries began that have brought nothing yet.
    pub(crate) const fn since(&self) -> Instant {
        self.since
    }

    /// How long tries go on that bring nothing.
    pub(crate) const fn patience(&self) -> Duration {
        self.patience
    }

    /// Bytes arrived: the count starts again.
    pub(crate) fn progress(&mut self) {
        self.since = Instant::now();
        self.failures = 0;
        self.gave = true;
    }

    /// The pause before the next try, or `None` where another try is no use.
    pub(crate) fn pause(&mut self, error: &SourceError) -> Option<Duration> {
        if error.passes() {
            // Nobody was asked yet, so no patience is lost.
            self.since = Instant::now();
            return Some(jitter(FIRST_PAUSE));
        }
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

tokio::task_local! {
    /// Of the resolve that this task is at.
    static RESOLVING: Resolving;
}

struct Resolving {
    patience: Duration,
    /// Whether it was said that something is tried again.
    said: AtomicBool,
}

/// Does `resolve`, in which each request that fails for a while is sent again: for `patience` where the origin
/// says that it was asked too often, else at most for 15 seconds. Sources that are asked outside of this
/// send each request once.
pub(crate) async fn patiently<F: Future>(patience: Duration, resolve: F) -> F::Output {
    let said = AtomicBool::new(false);
    RESOLVING.scope(Resolving { patience, said }, resolve).await
}

/// Sends one request of a resolve, as often as whoever resolves has the patience for.
pub(crate) async fn asked<T, F>(mut ask: impl FnMut() -> F) -> Result<T, SourceError>
where
    F: Future<Output = Result<T, SourceError>>,
{
    let Ok(patience) = RESOLVING.try_with(|resolving| resolving.patience) else {
        return ask().await;
    };
    let mut retry = Retry::new(patience, false);
    loop {
        let error = match ask().await {
            Err(error) => error,
            answer => return answer,
        };
        retry.patience = match error.kind() {
            SourceErrorKind::Throttled => patience,
            SourceErrorKind::Unavailable | SourceErrorKind::Corrupt => patience.min(BRIEF),
            // Not what went wrong, but the answer: that there is no index, for one.
            _ => return Err(error),
        };
        let Some(pause) = retry.pause(&error) else {
            return Err(error);
        };
        metrics::global().fetch_retries.add(1);
        match RESOLVING.with(|resolving| resolving.said.swap(true, Ordering::Relaxed)) {
            false => tracing::warn!(%error, ?pause, patience = ?retry.patience, "trying again"),
            true => tracing::info!(%error, ?pause, "trying again"),
        }
        tokio::time::sleep(pause).await;
    }
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
        let mut without = Retry::new(Duration::ZERO, false);
        let later = Instant::now() + patience;
        let awaited = error(SourceErrorKind::Denied).with_until(later);
        assert!(without.pause(&awaited).unwrap() <= FIRST_PAUSE);
        let too_late = error(SourceErrorKind::Denied).with_until(Instant::now());
        assert_eq!(without.pause(&too_late), None);
        let asked = error(SourceErrorKind::Throttled).with_retry_after(Some(patience / 2));
        assert!(retry.pause(&asked).unwrap() >= patience / 2);
        assert_eq!(
            Retry::new(Duration::ZERO, true).pause(&error(SourceErrorKind::Unavailable)),
            None
        );
    }

    /// How often an origin is asked that fails so many times, and whether that is the end of it.
    async fn ask(patience: Option<Duration>, kind: SourceErrorKind, failures: u32) -> (u32, bool) {
        let asks = std::cell::Cell::new(0);
        let request = asked(|| {
            asks.set(asks.get() + 1);
            let answer = match asks.get() > failures {
                true => Ok(()),
                false => Err(error(kind)),
            };
            std::future::ready(answer)
        });
        let answer = match patience {
            Some(patience) => patiently(patience, request).await,
            None => request.await,
        };
        (asks.get(), answer.is_ok())
    }

    #[tokio::test]
    async fn requests_of_a_resolve_are_sent_again() {
        use SourceErrorKind as Kind;
        let patient = Some(Duration::from_secs(60));
        for kind in [Kind::Unavailable, Kind::Throttled, Kind::Corrupt] {
            assert_eq!(ask(patient, kind, 2).await, (3, true), "{kind:?}");
            assert_eq!(ask(None, kind, 1).await, (1, false), "{kind:?}");
            assert_eq!(ask(Some(Duration::ZERO), kind, 1).await, (1, false));
        }
        for kind in [Kind::NotFound, Kind::Denied, Kind::Invalid] {
            assert_eq!(ask(patient, kind, 1).await, (1, false), "{kind:?}");
        }
        let little = Some(Duration::from_millis(300));
        let (asks, answered) = ask(little, Kind::Unavailable, u32::MAX).await;
        assert!(asks > 1 && !answered, "{asks}");
    }
}
