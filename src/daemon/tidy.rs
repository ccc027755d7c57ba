//! Keeps the store within its watermarks while the agent runs.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::store::{CollectOptions, CollectReport, Store, StoreError};

/// How often the free space is looked at: one system call.
const LOOK: Duration = Duration::from_secs(60);
/// The least time between two collections, which walk the store, where it is not as full as it may be:
/// what could go may be in use.
const PAUSE: Duration = Duration::from_secs(300);

/// Collects when there is little space, until it is dropped.
pub(super) async fn tidy(store: Arc<Store>) {
    let mut last: Option<Instant> = None;
    loop {
        tokio::time::sleep(LOOK).await;
        let recently = last.is_some_and(|last| last.elapsed() < PAUSE);
        let store = Arc::clone(&store);
        let tidied = tokio::task::spawn_blocking(move || collect(&store, recently)).await;
        match tidied {
            Ok(Ok(None)) => continue,
            Ok(Ok(Some(report))) if report.bytes > 0 => {
                let evicted = report.evicted.len();
                tracing::info!(bytes = report.bytes, evicted, "made space in the store");
            }
            Ok(Ok(Some(_))) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the store cannot be tidied"),
            // The runtime is shutting down.
            Err(_) => return,
        }
        last = Some(Instant::now());
    }
}

/// Collects by the watermarks where that may free something; `recently`: only where less is free than is to
/// stay free.
fn collect(store: &Store, recently: bool) -> Result<Option<CollectReport>, StoreError> {
    let is_due = store.writable() && store.may_be_full()? && (!recently || store.is_short()?);
    match is_due {
        true => store.collect(&CollectOptions::default()).map(Some),
        false => Ok(None),
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
        if !roomy.may_be_full().unwrap() {
            assert_eq!(collect(&roomy, false).unwrap(), None);
        }
        let full = open(u64::MAX / 2);
        assert!(full.may_be_full().unwrap());
        for recently in [false, true] {
            let report = collect(&full, recently).unwrap().unwrap();
            assert_eq!(report.objects, u64::from(!recently));
        }
        assert!(full.complete(&id).unwrap().is_none());
    }
}
