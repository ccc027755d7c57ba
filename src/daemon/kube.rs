//! What pods ask for by annotation, over the node.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use async_trait::async_trait;

use crate::{
    fetch::FetchErrorKind,
    kube::{
        Content, ContentError, ContentErrorKind, PINS, Wish,
        coldstart::{ColdStart, Fetched},
    },
    node::{Node, NodeError, OverQuota, Progress},
    source::{Credentials, SourceErrorKind},
    store::StoreErrorKind,
};

/// Where the starts of pods are, below the directory of the store.
const STARTS: &str = "run/starts.json";

/// The last starts of pods on the node that has its store in `root`, the newest last.
pub fn starts(root: &Path) -> Vec<ColdStart> {
    let text = std::fs::read(root.join(STARTS)).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

/// Brings what pods ask for onto the node.
pub struct PodContent {
    node: Node,
}

impl PodContent {
    /// Content of `node`.
    pub fn new(node: Node) -> Arc<Self> {
        Arc::new(Self { node })
    }
}

#[async_trait]
impl Content for PodContent {
    async fn bring(&self, wish: &Wish) -> Result<Fetched, ContentError> {
        let tenancy = self.node.tenancy();
        let keys = tenancy.keys(&wish.namespace, wish.keys.clone());
        let node = self.node.with_rank(wish.priority);
        let node = match &keys {
            Some(keys) => node.with_credentials(Credentials::new(keys.clone())),
            None => node,
        };
        let failed = |error: NodeError| of_node(&error);
        let guarded = node.guard(&wish.reference, keys.as_ref()).await;
        guarded.map_err(failed)?;
        let held = node.resolve_held_whole(&wish.reference).await;
        let (resolved, _hold) = held.map_err(failed)?;
        // Before it is pinned or told how large it is: the content may be another namespace's.
        let proved = node.prove(&wish.reference, keys.as_ref(), &resolved).await;
        proved.map_err(failed)?;
        let artifact = &resolved.artifact;
        let reference = &artifact.reference;
        let what = (reference.as_str(), artifact.digest(), artifact.size());
        let (namespace, owner) = (&*wish.namespace, &*wish.owner);
        let charged = match wish.pin {
            true => tenancy.charge(namespace, owner, what, false).map(|_| None),
            false => tenancy.charge_passing(namespace, owner, what).map(Some),
        };
        let too_much = |e: OverQuota| ContentError::new(ContentErrorKind::NoSpace, e.to_string());
        let _passing = charged.map_err(too_much)?;
        let pin = wish.pin.then_some(wish.owner.as_str());
        let progress = Progress::default();
        let warmed = node.warm_known(&resolved, pin, &progress).await;
        let report = warmed.map_err(failed)?;
        let (came, tally) = (
            report.bytes.saturating_sub(report.bytes_before),
            progress.tally(),
        );
        Ok(Fetched {
            total: report.bytes,
            before: report.bytes_before.min(report.bytes),
            demanded: tally.demanded.min(came),
            prefetched: came.saturating_sub(tally.demanded),
            from_peers: 0,
            first_read: tally.first_read,
        })
    }

    async fn unpin(&self, owner: &str, keep: &BTreeSet<String>) {
        self.node
            .tenancy()
            .release(owner, |kept| keep.contains(kept));
        let (store, owner, keep) = (
            Arc::clone(self.node.store()),
            owner.to_owned(),
            keep.clone(),
        );
        let unpinned = tokio::task::spawn_blocking(move || {
            for record in store.records()? {
                if record.pins.contains(&owner) && !keep.contains(&record.reference) {
                    store.unpin(&record.reference, &owner)?;
                }
            }
            Ok::<_, crate::store::StoreError>(())
        });
        match unpinned.await {
            Ok(Err(error)) if error.kind() != StoreErrorKind::ReadOnly => {
                tracing::warn!(%error, "what a pod had pinned stays pinned");
            }
            _ => {}
        }
    }

    async fn owners(&self) -> BTreeSet<String> {
        let store = Arc::clone(self.node.store());
        let records = tokio::task::spawn_blocking(move || store.records()).await;
        let pins = match records {
            Ok(Ok(records)) => records.into_iter().flat_map(|record| record.pins),
            failed => {
                tracing::warn!(?failed, "pins cannot be listed");
                return BTreeSet::new();
            }
        };
        pins.filter(|owner| owner.starts_with(PINS)).collect()
    }

    async fn show(&self, starts: &[ColdStart]) {
        let store = Arc::clone(self.node.store());
        let Ok(text) = serde_json::to_vec(starts) else {
            return;
        };
        // For people; whoever loses it misses a line of `hearth status`.
        let written = tokio::task::spawn_blocking(move || {
            crate::store::run_dir(store.root())?;
            let path = store.root().join(STARTS);
            let new = path.with_extension("new");
            std::fs::write(&new, text)?;
            std::fs::rename(new, path)
        });
        if let Ok(Err(error)) = written.await {
            tracing::debug!(%error, "the starts of pods are not shown");
        }
    }
}

fn of_node(error: &NodeError) -> ContentError {
    let kind = match error {
        NodeError::Resolve { source, .. } => match source.kind() {
            SourceErrorKind::NotFound | SourceErrorKind::Invalid => ContentErrorKind::NotFound,
            SourceErrorKind::Denied => ContentErrorKind::Denied,
            _ => ContentErrorKind::Unavailable,
        },
        NodeError::Fetch { source, .. } => match source.kind() {
            FetchErrorKind::NotFound => ContentErrorKind::NotFound,
            FetchErrorKind::Denied => ContentErrorKind::Denied,
            FetchErrorKind::NoSpace => ContentErrorKind::NoSpace,
            FetchErrorKind::Unavailable | FetchErrorKind::Changed => ContentErrorKind::Unavailable,
            _ => ContentErrorKind::Failed,
        },
        NodeError::Store(error) if error.kind() == StoreErrorKind::NoSpace => {
            ContentErrorKind::NoSpace
        }
        _ => ContentErrorKind::Failed,
    };
    ContentError::new(kind, super::describe(error))
}
