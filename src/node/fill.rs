//! Brings all of an artifact: to warm it, or behind those who read it.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};

use super::{
    Node, NodeError, Progress, Resolved, blocking, is_of_disk,
    layers::{Coming, Pace},
    slices,
};
use crate::{
    fetch::{Class, FetchError, FetchErrorKind},
    store::{Complete, StoreErrorKind, Whereabouts},
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
    /// has to do something about, and of nothing once it is tried again. Where it is an image, a container is
    /// starting from it: that goes first.
    ///
    /// # Errors
    /// The first error that waiting does not mend.
    pub async fn fill(
        &self,
        resolved: &Resolved,
        progress: &Progress,
        waits: impl Fn(Option<&NodeError>) + Send,
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
        waits: impl Fn(Option<&NodeError>) + Send,
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
                Some(Passing::Mended) => waits(Some(&error)),
            }
            warn(&resolved.artifact.reference, &error, pause);
            tokio::time::sleep(pause).await;
            waits(None);
            pause = (pause * 2).min(LONGEST_FILL_PAUSE);
        }
    }

    async fn fill_once(
        &self,
        resolved: &Resolved,
        progress: &Progress,
        pace: Pace,
    ) -> Result<(), NodeError> {
        let coming = self.make_room(resolved).await?;
        progress.begin(&resolved.artifact);
        self.bring(resolved, coming, progress, Some(pace)).await
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
        coming: Coming<'_>,
        progress: &Progress,
        beside: Option<Pace>,
    ) -> Result<(), NodeError> {
        let artifact = &resolved.artifact;
        let failed = |source| NodeError::Fetch {
            reference: artifact.reference.clone(),
            source,
        };
        let pace = beside.unwrap_or(Pace::Full);
        let unpacked = self.bring_layers(resolved, coming, progress, pace).await?;
        if resolved.layers.is_some() {
            progress.begin(artifact);
        }
        if unpacked.brought_all(artifact) {
            progress.here(artifact.stored().count(), artifact.size());
            return Ok(());
        }
        let mut cut = slices::by_container(artifact);
        let missing = self.missing(artifact, &cut, progress).await?;
        let mut under_way = stream::iter(missing)
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

    /// What has to be looked at: all objects but those that lie in the store itself, which show as complete. Of an image
    /// that was unpacked just now these are tens of thousands, and a look costs a tenth of an open.
    async fn missing(
        &self,
        artifact: &Arc<Artifact>,
        cut: &HashMap<usize, Vec<slices::Slice>>,
        progress: &Progress,
    ) -> Result<Vec<usize>, NodeError> {
        let (store, shared) = (Arc::clone(self.store()), Arc::clone(artifact));
        let found = blocking(move || {
            let finder = store.finder()?;
            let is_here = |&index: &usize| match finder.look(&shared.objects[index]) {
                Ok(Some((Whereabouts::Store, _))) => true,
                // What the disk refuses to say is told by whoever reads it.
                Ok(_) | Err(_) => false,
            };
            Ok(order(&shared).into_iter().partition(is_here))
        });
        let (here, mut missing): (Vec<usize>, Vec<usize>) = found.await?;
        let mut objects = 0;
        let mut bytes = 0;
        for index in here {
            if cut.contains_key(&index) {
                missing.push(index);
                continue;
            }
            objects += 1;
            bytes += artifact.objects[index].size;
        }
        progress.here(objects, bytes);
        Ok(missing)
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
