//! Brings all of an artifact: to warm it, or behind those who read it.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};

use super::{Node, NodeError, Progress, Resolved, blocking, is_of_disk, layers::Pace, slices};
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

/// How an error passes.
enum Passing {
    /// By itself, as a rule.
    Alone,
    /// When somebody does something.
    Mended,
}

impl Node {
    /// Fetches every object of an artifact that is being read, in the background. The caller holds
    /// it. What may pass is tried again, at longer and longer intervals: an origin that cannot be
    /// reached, or refuses, and a disk that is full, fails, or only is read. `waits` is told of what somebody
    /// has to do something about. Where it is an image, a container is starting from it: that goes first.
    ///
    /// # Errors
    /// The first error that waiting does not mend.
    pub async fn fill(
        &self,
        resolved: &Resolved,
        progress: &Progress,
        waits: impl Fn(&NodeError) + Send,
    ) -> Result<(), NodeError> {
        let artifact = &resolved.artifact;
        let span = span!("fill", hearth.reference = artifact.reference);
        telemetry::count(&span, "hearth.bytes.total", artifact.size());
        let filling = self.fill_now(resolved, progress, waits);
        telemetry::within(span, NodeError::about, filling).await
    }

    async fn fill_now(
        &self,
        resolved: &Resolved,
        progress: &Progress,
        waits: impl Fn(&NodeError) + Send,
    ) -> Result<(), NodeError> {
        let mut pace = Pace::Full;
        if resolved.layers.is_some() {
            pace = Pace::behind();
            // It has not read anything yet.
            self.engine.touch();
            pace.wait(&self.engine).await;
        }
        let mut pause = FIRST_FILL_PAUSE;
        loop {
            let error = match self.fill_once(resolved, progress, pace).await {
                Err(error) => error,
                Ok(()) => return Ok(()),
            };
            match self.passing(&error) {
                None => return Err(error),
                Some(Passing::Alone) => {}
                Some(Passing::Mended) => waits(&error),
            }
            warn(&resolved.artifact.reference, &error, pause);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_FILL_PAUSE);
        }
    }

    async fn fill_once(
        &self,
        resolved: &Resolved,
        progress: &Progress,
        pace: Pace,
    ) -> Result<(), NodeError> {
        let _room = self.admit(&resolved.artifact).await?;
        progress.begin(&resolved.artifact, self.store());
        self.bring(resolved, progress, Some(pace)).await
    }

    /// How an error may pass, if it may.
    fn passing(&self, error: &NodeError) -> Option<Passing> {
        match error {
            NodeError::Fetch { source, .. } => match source.kind() {
                FetchErrorKind::Unavailable | FetchErrorKind::NoSpace | FetchErrorKind::Disk => {
                    Some(Passing::Alone)
                }
                // Credentials expire, and are renewed.
                FetchErrorKind::Denied => Some(Passing::Mended),
                _ => None,
            },
            NodeError::Store(error) if !self.store().is_sealed() => {
                let kind = error.kind();
                let passes = kind == StoreErrorKind::ReadOnly || is_of_disk(kind);
                passes.then_some(Passing::Mended)
            }
            _ => None,
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

fn warn(reference: &str, error: &(dyn std::error::Error + 'static), pause: Duration) {
    tracing::warn!(reference, error, ?pause, "the background fetch waits");
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
