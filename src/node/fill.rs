//! Brings all of an artifact: to warm it, or behind those who read it.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};

use super::{Node, NodeError, Progress, Resolved, blocking, layers::Pace, slices};
use crate::{
    fetch::{Class, FetchError, FetchErrorKind},
    store::{Complete, StoreErrorKind},
    telemetry::{self, span},
    tree::{Artifact, Object},
};

/// Objects asked for at the same time; the engine orders and limits the fetching itself.
const OBJECTS_AT_ONCE: usize = 64;

/// Pauses of a background fetch whose origin cannot be reached.
const FIRST_FILL_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_FILL_PAUSE: Duration = Duration::from_secs(60);

impl Node {
    /// Fetches every object of an artifact that is being read, in the background. The caller holds
    /// it. An origin that cannot be reached is tried again, at longer and longer intervals; so is a
    /// disk that is full, fails, or only is read. Where it is an image, a container is starting from it: that goes
    /// first.
    ///
    /// # Errors
    /// The first error that waiting does not mend; where not all of it fits.
    pub async fn fill(&self, resolved: &Resolved, progress: &Progress) -> Result<(), NodeError> {
        let artifact = &resolved.artifact;
        let span = span!("fill", hearth.reference = artifact.reference);
        telemetry::count(&span, "hearth.bytes.total", artifact.size());
        telemetry::within(span, NodeError::about, self.fill_now(resolved, progress)).await
    }

    async fn fill_now(&self, resolved: &Resolved, progress: &Progress) -> Result<(), NodeError> {
        let mut pace = Pace::Full;
        if resolved.layers.is_some() {
            pace = Pace::behind();
            // It has not read anything yet.
            self.engine.touch();
            pace.wait(&self.engine).await;
        }
        let mut pause = FIRST_FILL_PAUSE;
        let mut wait = async |error: &(dyn std::error::Error + Sync)| {
            let reference = &resolved.artifact.reference;
            tracing::warn!(reference, %error, ?pause, "the background fetch waits");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_FILL_PAUSE);
        };
        let _room = loop {
            match self.admit(&resolved.artifact).await {
                // The disk is only read, for now.
                Err(NodeError::Store(error))
                    if error.kind() == StoreErrorKind::ReadOnly && !self.store().is_sealed() =>
                {
                    wait(&error).await;
                }
                admitted => break admitted?,
            }
        };
        loop {
            progress.begin(&resolved.artifact, self.store());
            match self.bring(resolved, progress, Some(pace)).await {
                Err(NodeError::Fetch { source, .. }) if may_pass(source.kind()) => {
                    wait(&source).await;
                }
                other => return other,
            }
        }
    }

    /// Brings all of it; `beside` readers, where there are some, at this pace.
    pub(super) async fn bring(
        &self,
        resolved: &Resolved,
        progress: &Progress,
        beside: Option<Pace>,
    ) -> Result<(), NodeError> {
        let artifact = &resolved.artifact;
        let failed = |source| NodeError::Fetch {
            reference: artifact.reference.clone(),
            source,
        };
        if let Some(layers) = &resolved.layers {
            let pace = beside.unwrap_or(Pace::Full);
            self.bring_layers(&artifact.reference, layers, progress, pace)
                .await?;
            progress.begin(artifact, self.store());
        }
        let mut cut = slices::by_container(artifact);
        let mut under_way = stream::iter(order(artifact))
            .map(|index| async move {
                let object = &artifact.objects[index];
                let handle = self.engine.open(object, &resolved.source)?;
                if beside.is_some() {
                    handle.expect_reads();
                }
                let shown = progress.watch(index, &handle);
                let complete = handle.ensure_ranked(Class::Warm, self.rank).await?;
                shown.finished();
                Ok::<_, FetchError>((index, complete))
            })
            .buffer_unordered(OBJECTS_AT_ONCE);
        while let Some(done) = under_way.next().await {
            let (index, complete) = done.map_err(failed)?;
            if let Some(slices) = cut.remove(&index) {
                self.check_slices(artifact, slices, complete).await?;
            }
        }
        Ok(())
    }

    /// Checks the files that were cut from an object before it could be verified.
    async fn check_slices(
        &self,
        artifact: &Arc<Artifact>,
        slices: Vec<slices::Slice>,
        complete: Arc<Complete>,
    ) -> Result<(), NodeError> {
        let (store, reference) = (Arc::clone(self.store()), artifact.reference.clone());
        let checked = blocking(move || {
            let Err(why) = slices::check(&slices, complete.file(), complete.size) else {
                return Ok(Ok(()));
            };
            if store.writable() {
                store.forget_resolution(&reference)?;
            }
            Ok(Err(NodeError::Misled {
                reference,
                layer: complete.digest.to_string(),
                why,
            }))
        });
        checked.await?
    }
}

/// Whether it is an origin that cannot be reached, or a disk that is full or fails.
const fn may_pass(kind: FetchErrorKind) -> bool {
    use FetchErrorKind::{Disk, NoSpace, Unavailable};
    matches!(kind, Unavailable | NoSpace | Disk)
}

/// The order in which objects are fetched: small ones (configuration, tokenizer, indexes) first,
/// then by path, as loaders read shards. For slices that is what they are cut from.
fn order(artifact: &Artifact) -> Vec<usize> {
    let mut seen = vec![false; artifact.objects.len()];
    let mut order = Vec::with_capacity(artifact.objects.len());
    for (_, _, object) in artifact.tree.files() {
        if let Some((stored, _)) = artifact.place(object)
            && let Some(seen) = seen.get_mut(stored as usize)
            && !std::mem::replace(seen, true)
        {
            order.push(stored as usize);
        }
    }
    let is_large = |o: &Object| o.size > crate::chunk::CHUNK_SIZE;
    order.sort_by_key(|&o| is_large(&artifact.objects[o]));
    order
}
