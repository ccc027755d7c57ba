//! What a node does for warm-ups, over the node.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use parking_lot::Mutex;

use super::models::of_node;
use crate::{
    csi::ModelErrorKind,
    digest::Digest,
    kube::{
        cache::Inventory,
        crd::CachedArtifact,
        warmups::{OWNER, Order, WarmError, Warmer},
    },
    node::{ArtifactStatus, Node, NodeError, OverQuota, Progress, Tenancy},
    reference::Reference,
    source::Credentials,
    store::{Record, StoreErrorKind},
    telemetry::{self, span},
    tree::Artifact,
};

/// How long what was found complete, and what the store takes, is believed.
const FRESH: Duration = Duration::from_secs(600);

/// Warms what a cluster asks for on this node.
pub struct NodeWarmer {
    node: Node,
    /// Nodes with a bandwidth of their own, by the owner of pins.
    limited: Mutex<HashMap<String, (u64, Node)>>,
    seen: Arc<Mutex<Seen>>,
}

/// What was seen in the store, so that not all of it is read for every report.
#[derive(Default)]
struct Seen {
    used: Option<(Instant, u64)>,
    /// Complete artifacts, by reference.
    complete: HashMap<String, (Digest, Instant, CachedArtifact)>,
}

impl NodeWarmer {
    /// Warms on `node`.
    pub fn new(node: Node) -> Self {
        Self {
            node,
            limited: Mutex::default(),
            seen: Arc::default(),
        }
    }

    /// The node with the bandwidth of the order, one for each `Warmup`.
    fn node(&self, order: &Order) -> Node {
        let Some(bandwidth) = order.bandwidth else {
            return self.node.clone();
        };
        let mut limited = self.limited.lock();
        let known = limited.entry(order.warmup.clone());
        let (known, node) =
            known.or_insert_with(|| (bandwidth, self.node.with_bandwidth(bandwidth)));
        if *known != bandwidth {
            (*known, *node) = (bandwidth, self.node.with_bandwidth(bandwidth));
        }
        node.clone()
    }

    /// As [`Warmer::warm`].
    async fn bring(&self, order: &Order, progress: &Progress) -> Result<(), WarmError> {
        let (reference, tenancy) = (&order.reference, self.node.tenancy());
        let rank = i8::try_from(order.priority.clamp(-100, 100)).unwrap_or_default();
        let mut node = self.node(order).with_rank(rank);
        let keys = tenancy.keys(&order.namespace, order.keys.clone());
        if let Some(keys) = &keys {
            node = node.with_credentials(Credentials::new(keys.clone()));
        }
        let keys = keys.as_ref();
        let warmed = async {
            node.guard(reference, keys).await?;
            let resolved = node.resolve_showing(reference, progress).await?;
            node.prove(reference, keys, &resolved).await?;
            Ok(resolved)
        };
        let resolved = warmed.await.map_err(|error| failed(&error))?;
        let pin = order.owner.as_deref();
        let (namespace, artifact) = (&*order.namespace, &*resolved.artifact);
        let _passing = match pin {
            Some(owner) => {
                charge(tenancy, namespace, owner, artifact, false)?;
                None
            }
            None => {
                let charged = tenancy.charge_passing(namespace, &order.warmup, what(artifact));
                Some(charged.map_err(|error| over_quota(&error))?)
            }
        };
        let warmed = node.warm_known(&resolved, pin, progress).await;
        warmed.map(drop).map_err(|error| failed(&error))
    }
}

#[async_trait]
impl Warmer for NodeWarmer {
    async fn warm(&self, order: &Order, progress: &Progress) -> Result<(), WarmError> {
        let span = span!(
            "warmup",
            hearth.warmup.uid = order.warmup,
            k8s.namespace.name = order.namespace,
            hearth.reference = %order.reference
        );
        let about = |error: &WarmError| error.reason.to_owned();
        telemetry::within(span, about, self.bring(order, progress)).await
    }

    async fn keep(
        &self,
        reference: &Reference,
        owner: &str,
        namespace: &str,
    ) -> Result<bool, WarmError> {
        let (node, name, pin) = (self.node.clone(), reference.to_string(), owner.to_owned());
        let kept = blocking(move || {
            let Some((_, artifact)) = node.store().artifact(&name)? else {
                return Ok(None);
            };
            if !node.is_complete(&artifact)? {
                return Ok(None);
            }
            match node.store().pin(&name, &pin) {
                // Nothing can be evicted either.
                Err(error) if error.kind() == StoreErrorKind::ReadOnly => Ok(Some(artifact)),
                pinned => Ok(pinned.map(|()| Some(artifact))?),
            }
        })
        .await?;
        if let Some(artifact) = &kept {
            charge(self.node.tenancy(), namespace, owner, artifact, true)?;
        }
        Ok(kept.is_some())
    }

    async fn release(&self, owner: &str, keep: &[Reference]) -> Result<(), WarmError> {
        if keep.is_empty() {
            self.limited
                .lock()
                .remove(owner.strip_prefix(OWNER).unwrap_or(owner));
        }
        let keep: Vec<String> = keep.iter().map(ToString::to_string).collect();
        let is_kept = |reference: &str| keep.iter().any(|kept| kept == reference);
        self.node.tenancy().release(owner, is_kept);
        let (node, owner) = (self.node.clone(), owner.to_owned());
        blocking(move || {
            for record in node.store().records()? {
                if record.pins.contains(&owner) && !keep.contains(&record.reference) {
                    node.store().unpin(&record.reference, &owner)?;
                }
            }
            Ok(())
        })
        .await
    }

    async fn owners(&self) -> Result<Vec<String>, WarmError> {
        let node = self.node.clone();
        blocking(move || {
            let records = node.store().records()?;
            let pins = records.into_iter().flat_map(|record| record.pins);
            let mut owners: Vec<String> = pins.filter(|pin| pin.starts_with(OWNER)).collect();
            owners.sort();
            owners.dedup();
            Ok(owners)
        })
        .await
    }

    async fn inventory(&self) -> Result<Inventory, WarmError> {
        let (node, seen) = (self.node.clone(), Arc::clone(&self.seen));
        blocking(move || {
            let mut seen = seen.lock();
            let records = node.store().records()?;
            let space = node.store().space()?;
            Ok(Inventory {
                store_id: node.store().id().to_owned(),
                capacity_bytes: space.total,
                free_bytes: space.free,
                used_bytes: seen.used(&node)?,
                artifacts: seen.artifacts(&node, records)?,
            })
        })
        .await
    }
}

impl Seen {
    fn used(&mut self, node: &Node) -> Result<u64, NodeError> {
        match self.used {
            Some((at, bytes)) if at.elapsed() < FRESH => Ok(bytes),
            _ => {
                let bytes = node.store().usage()?.bytes();
                self.used = Some((Instant::now(), bytes));
                Ok(bytes)
            }
        }
    }

    /// The artifacts of `records`, the last used first.
    fn artifacts(
        &mut self,
        node: &Node,
        mut records: Vec<Record>,
    ) -> Result<Vec<CachedArtifact>, NodeError> {
        records.sort_by_key(|record| std::cmp::Reverse(record.used));
        let mut complete = std::mem::take(&mut self.complete);
        let mut artifacts = Vec::with_capacity(records.len());
        for record in records {
            let is_pinned = !record.pins.is_empty();
            if let Some((digest, at, artifact)) = complete.remove(&record.reference)
                && digest == record.digest
                && at.elapsed() < FRESH
            {
                artifacts.push(CachedArtifact {
                    pinned: is_pinned,
                    ..artifact.clone()
                });
                self.complete
                    .insert(record.reference, (digest, at, artifact));
                continue;
            }
            let (status, _) = match node.status(&record.reference) {
                Ok(status) => status,
                // It went meanwhile.
                Err(NodeError::Unknown(_)) => continue,
                Err(error) => return Err(error),
            };
            let artifact = CachedArtifact::from(status);
            if artifact.warm {
                let seen = (record.digest, Instant::now(), artifact.clone());
                self.complete.insert(record.reference, seen);
                // What has come has changed what the store takes.
                self.used = None;
            }
            artifacts.push(artifact);
        }
        Ok(artifacts)
    }
}

impl From<ArtifactStatus> for CachedArtifact {
    fn from(status: ArtifactStatus) -> Self {
        let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        Self {
            reference: status.reference,
            digest: status.digest,
            bytes: bytes(status.bytes),
            present_bytes: bytes(status.present_bytes),
            warm: status.complete,
            pinned: !status.pins.is_empty(),
        }
    }
}

/// Has a namespace pay for what it pins; `known`: it did before.
fn charge(
    tenancy: &Tenancy,
    namespace: &str,
    owner: &str,
    artifact: &Artifact,
    known: bool,
) -> Result<(), WarmError> {
    let charged = tenancy.charge(namespace, owner, what(artifact), known);
    charged.map(drop).map_err(|error| over_quota(&error))
}

/// What is counted of it.
fn what(artifact: &Artifact) -> (&str, Digest, u64) {
    (&artifact.reference, artifact.digest(), artifact.size())
}

fn over_quota(error: &OverQuota) -> WarmError {
    WarmError {
        reason: "OverQuota",
        message: error.to_string(),
    }
}

fn failed(error: &NodeError) -> WarmError {
    let error = of_node(error);
    let reason = match error.kind() {
        ModelErrorKind::NotFound => "NotFound",
        ModelErrorKind::Denied => "Denied",
        ModelErrorKind::Invalid => "Invalid",
        ModelErrorKind::Unavailable => "Unavailable",
        ModelErrorKind::NoSpace => "NoSpace",
        _ => "Failed",
    };
    WarmError {
        reason,
        message: error.to_string(),
    }
}

/// Runs what waits for the disk off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NodeError> + Send + 'static,
) -> Result<T, WarmError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| failed(&error)),
        Err(error) => Err(WarmError {
            reason: "Failed",
            message: error.to_string(),
        }),
    }
}
