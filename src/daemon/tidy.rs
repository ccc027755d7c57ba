//! Keeps the store within its watermarks while the agent runs.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::store::{CollectOptions, CollectReport, Store, StoreError};

/// How often the free space is looked at: one system call.
const LOOK: Duration = Duration::from_secs(60);
/// The least time between two looks at the store itself, which walk it, where it is not as full as it may be: what
/// could go may be in use. Grows up to the longest while they find nothing.
const PAUSE: Duration = Duration::from_secs(300);
const LONGEST: Duration = Duration::from_secs(3600);

/// When the store itself is looked at.
struct Pace {
    last: Option<Instant>,
    pause: Duration,
}

/// Collects when there is little space, until it is dropped.
pub(super) async fn tidy(store: Arc<Store>) {
    let mut pace = Pace::new();
    loop {
        tokio::time::sleep(LOOK).await;
        let store = Arc::clone(&store);
        let rest = pace.rest(Instant::now());
        let tidied = tokio::task::spawn_blocking(move || collect(&store, rest)).await;
        let freed = match tidied {
            Ok(Ok(None)) => continue,
            Ok(Ok(Some(report))) => {
                if report.bytes > 0 {
                    let evicted = report.evicted.len();
                    tracing::info!(bytes = report.bytes, evicted, "made space in the store");
                }
                report.bytes
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "the store cannot be tidied");
                0
            }
            // The runtime is shutting down.
            Err(_) => return,
        };
        pace.looked(Instant::now(), freed);
    }
}

/// Whether it is too early for a look at the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    No,
    /// Unless less is free than is to stay free.
    UnlessShort,
    Yes,
}

impl Pace {
    fn new() -> Self {
        Self {
            last: None,
            pause: PAUSE,
        }
    }

    fn rest(&self, now: Instant) -> Rest {
        let Some(last) = self.last else {
            return Rest::No;
        };
        match now.saturating_duration_since(last) {
            since if since >= self.pause => Rest::No,
            // What freed something may free more.
            since if since >= PAUSE || self.pause == PAUSE => Rest::UnlessShort,
            _ => Rest::Yes,
        }
    }

    fn looked(&mut self, now: Instant, freed: u64) {
        self.last = Some(now);
        self.pause = match freed {
            0 => (self.pause * 2).min(LONGEST),
            _ => PAUSE,
        };
    }
}

/// Collects by the watermarks where that may free something; `None` where nothing but the free space was looked at.
fn collect(store: &Store, rest: Rest) -> Result<Option<CollectReport>, StoreError> {
    let is_due = match rest {
        Rest::No => true,
        Rest::UnlessShort => store.is_short()?,
        Rest::Yes => false,
    };
    if !(is_due && store.writable() && store.may_be_full()?) {
        return Ok(None);
    }
    // Under no lock, other than a collection. What fills the disk may not be the store's own.
    match store.is_over()? {
        true => store.collect(&CollectOptions::default()).map(Some),
        false => Ok(Some(CollectReport::default())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        digest::{Digest, ObjectId},
        store::{ByteSize, Config},
    };

    #[test]
    fn a_store_is_collected_when_there_is_little_space() {
        let dir = tempfile::tempdir().unwrap();
        let open = |min_free| {
            let config = Config {
                min_free: ByteSize(min_free),
                ..Config::default()
            };
            Store::open(dir.path(), &config).unwrap()
        };
        let id = ObjectId::Sha256(Digest::of(b"nobody leads to it"));
        let content = (id, bytes::Bytes::from_static(b"nobody leads to it"));
        let roomy = open(0);
        drop(roomy.put(&[content]).unwrap());
        // However full the disk is of what others have.
        let report = collect(&roomy, Rest::No).unwrap().unwrap_or_default();
        assert_eq!(report.objects, 0);
        let full = open(u64::MAX / 2);
        assert!(full.may_be_full().unwrap());
        assert_eq!(collect(&full, Rest::Yes).unwrap(), None);
        for (rest, objects) in [(Rest::No, 1), (Rest::UnlessShort, 0)] {
            let report = collect(&full, rest).unwrap().unwrap();
            assert_eq!(report.objects, objects);
        }
        assert!(full.complete(&id).unwrap().is_none());
    }

    #[test]
    fn looks_that_find_nothing_become_rare() {
        let begun = Instant::now();
        let after = |minutes: u64| begun + Duration::from_secs(minutes * 60);
        let mut pace = Pace::new();
        assert_eq!(pace.rest(begun), Rest::No);
        pace.looked(begun, 1);
        assert_eq!(pace.rest(after(1)), Rest::UnlessShort);
        assert_eq!(pace.rest(after(5)), Rest::No);
        pace.looked(begun, 0);
        assert_eq!(pace.rest(after(4)), Rest::Yes);
        assert_eq!(pace.rest(after(5)), Rest::UnlessShort);
        assert_eq!(pace.rest(after(10)), Rest::No);
        (0..9).for_each(|_| pace.looked(begun, 0));
        assert_eq!(pace.rest(after(59)), Rest::UnlessShort);
        assert_eq!(pace.rest(after(60)), Rest::No);
        pace.looked(begun, 1);
        assert_eq!(pace.rest(after(5)), Rest::No);
    }
}
