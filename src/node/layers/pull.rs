//! Layers from their registry to files and indexes in the store.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::mpsc;

use super::{Known, Maker, blob_of, fetch_failed, indexes::refuted};
use crate::{
    digest::{Digest, ObjectId},
    fetch::{Class, Engine, FetchError, Handle},
    image::{ImageError, LayerIndex},
    node::{
        Node, NodeError, Progress, blocking,
        unpack::{UnpackError, unpack},
    },
    source::{Layer, Source},
    store::{Import, StoreError},
    telemetry::{self, span},
    tree::{Artifact, Tree},
};

/// Layers that are unpacked at the same time: decoding is what takes long, and each has several
/// threads.
const LAYERS_AT_ONCE: usize = 2;
/// How long whoever reads an image after it was mounted has the machine first: that is when a
/// container starts, and every file is read for the first time.
const STARTING: Duration = Duration::from_secs(30);
/// No opens and reads for so long leave time for unpacking meanwhile.
const QUIET: Duration = Duration::from_secs(3);
/// Pieces of a layer between fetching and unpacking, of up to a chunk each.
const PIECES_AHEAD: usize = 4;

/// How hard layers are unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::node) enum Pace {
    Full,
    /// Somebody reads the image meanwhile, and has the processors first. Until the given time nothing
    /// is done but while nobody reads.
    Behind(Instant),
}

impl Pace {
    /// The pace beside a container that starts now.
    pub(in crate::node) fn behind() -> Self {
        Self::Behind(Instant::now() + STARTING)
    }

    /// Waits while those who read have the machine for themselves.
    pub(in crate::node) async fn wait(self, engine: &Engine) {
        if let Self::Behind(until) = self {
            engine.quiet(QUIET, until).await;
        }
    }

    /// Waits until those who read need the machine again, while it is theirs.
    async fn disturbed(self, engine: &Engine) {
        if let Self::Behind(until) = self
            && tokio::time::timeout_at(until.into(), engine.used())
                .await
                .is_ok()
        {
            return;
        }
        std::future::pending().await
    }

    /// Sets the priority of this thread, and of those that it starts.
    fn set(self) {
        if let Self::Behind(_) = self {
            // SAFETY: a system call that takes numbers; 0 is the calling thread (setpriority(2), NOTES).
            // It cannot fail for a lower priority, and nothing depends on it.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
        }
    }
}

/// A layer that was unpacked.
struct Pulled {
    index: Arc<LayerIndex>,
    /// What an index that was believed says otherwise.
    refuted: Option<String>,
}

impl Node {
    /// Fetches and unpacks layers; their files and indexes are in the store on return, and kept
    /// by `import`.
    pub(super) async fn pull(
        &self,
        reference: &str,
        layers: &[(&Layer, Option<&Known>)],
        origin: &Arc<dyn Source>,
        import: &Arc<Import>,
        progress: &Progress,
        pace: Pace,
    ) -> Result<Vec<Arc<LayerIndex>>, NodeError> {
        let blobs = Artifact {
            reference: reference.to_owned(),
            revision: String::new(),
            tree: Tree::empty(),
            objects: layers.iter().map(|(layer, _)| blob_of(layer)).collect(),
        };
        let names = layers
            .iter()
            .map(|(layer, _)| layer.blob.to_string())
            .collect();
        progress.begin_named(&Arc::new(blobs), names, self.store());
        let mut pulls = Vec::with_capacity(layers.len());
        for (at, &layer) in layers.iter().enumerate() {
            let pull = self.pull_shown(reference, at, layer, (origin, import), progress, pace);
            // Made when it begins: not all of them do at once.
            pulls.push(async move {
                let (layer, _) = layer;
                let span = span!(
                    "pull layer",
                    hearth.reference = reference,
                    hearth.layer.digest = %layer.blob,
                    hearth.layer.bytes = layer.size,
                    hearth.layer.media_type = layer.media_type
                );
                telemetry::within(span, NodeError::about, pull).await
            });
        }
        let pulled: Vec<Pulled> = stream::iter(pulls)
            .buffered(LAYERS_AT_ONCE)
            .try_collect()
            .await?;
        // Only now: each layer has its true index, and who asks again is not told of the next one.
        for Pulled { index, refuted } in &pulled {
            if let Some(why) = refuted {
                return Err(NodeError::Misled {
                    reference: reference.to_owned(),
                    layer: index.blob.to_string(),
                    why: format!("{why}; a true index has taken its place"),
                });
            }
        }
        Ok(pulled.into_iter().map(|pulled| pulled.index).collect())
    }

    async fn pull_shown(
        &self,
        reference: &str,
        at: usize,
        (layer, believed): (&Layer, Option<&Known>),
        (origin, import): (&Arc<dyn Source>, &Arc<Import>),
        progress: &Progress,
        pace: Pace,
    ) -> Result<Pulled, NodeError> {
        let handle = self
            .engine
            .open(&blob_of(layer), origin)
            .map_err(fetch_failed(reference))?;
        let shown = progress.watch(at, &handle);
        let index = self
            .pull_one(reference, layer, &handle, import, pace)
            .await?;
        let known = Known {
            index: Arc::new(index),
            maker: Maker::Own,
        };
        let refuted = believed.and_then(|believed| believed.refuted_by(&known.index));
        if refuted.is_some() {
            // First, so that nothing built on it is left when the true index is there.
            let (store, name) = (Arc::clone(self.store()), reference.to_owned());
            blocking(move || store.forget_resolution(&name)).await?;
        }
        match believed {
            Some(believed) if refuted.is_none() && believed.maker == Maker::CheckedTable => {}
            // What is recorded reads the layer at the places of its table, which is true.
            Some(believed) if refuted.is_none() && believed.maker == Maker::Table => {
                let checked = Known {
                    index: Arc::clone(&believed.index),
                    maker: Maker::CheckedTable,
                };
                self.keep_index(reference, &checked).await?;
            }
            _ => self.keep_own_index(reference, &known).await?,
        }
        shown.finished();
        Ok(Pulled {
            index: known.index,
            refuted,
        })
    }

    async fn pull_one(
        &self,
        reference: &str,
        layer: &Layer,
        handle: &Arc<Handle>,
        import: &Arc<Import>,
        pace: Pace,
    ) -> Result<LayerIndex, NodeError> {
        // Once beside the fetch; should that have brought wrong bytes, once more from what was
        // verified.
        let mut again = false;
        pace.wait(&self.engine).await;
        loop {
            let (send, pieces) = mpsc::channel(PIECES_AHEAD);
            let (this, import, engine) = (layer.clone(), Arc::clone(import), self.engine.clone());
            let (done, unpacked) = tokio::sync::oneshot::channel();
            // A thread of its own: it ends with its priority.
            let thread = std::thread::Builder::new().name("hearth-unpack".into());
            let unpacking = thread.spawn(move || {
                pace.set();
                let mut came = |digests: &[Digest]| {
                    digests
                        .iter()
                        .for_each(|&d| engine.came(&ObjectId::Sha256(d)));
                };
                // Nobody waits any more where the pull was given up.
                let _ = done.send(unpack(&this, &import, pieces, &mut came));
            });
            unpacking.map_err(|error| StoreError::io("a thread to unpack a layer", &error))?;
            let feeding = async move {
                let mut at = 0;
                loop {
                    pace.wait(&self.engine).await;
                    let piece = handle.follow(at).await?;
                    at += piece.len() as u64;
                    // Whoever does not take it has failed, and says why.
                    if piece.is_empty() || send.send(piece).await.is_err() {
                        return Ok::<_, FetchError>(());
                    }
                }
            };
            let fetched = tokio::try_join!(self.fetch(handle, pace), feeding);
            let unpacked = unpacked.await;
            fetched.map_err(fetch_failed(reference))?;
            let unpacked = unpacked.unwrap_or_else(|_| {
                Err(UnpackError::Image(ImageError::invalid(
                    "unpacking it broke off",
                )))
            });
            match unpacked {
                Ok(index) => return Ok(index),
                Err(UnpackError::Store(error)) => return Err(error.into()),
                Err(UnpackError::DiffId(found)) if again => {
                    if let Err(error) = self.keep_refuted(reference, layer, found).await {
                        tracing::warn!(%error, "what is refuted could not be forgotten");
                    }
                    return Err(refuted(reference, layer, &found));
                }
                Err(UnpackError::Image(error)) if again => {
                    return Err(NodeError::Image {
                        reference: reference.to_owned(),
                        source: error,
                    });
                }
                Err(UnpackError::DiffId(found)) => {
                    let layer = layer.blob;
                    tracing::info!(%layer, %found, "unpacking once more, from the verified layer");
                    again = true;
                }
                Err(UnpackError::Image(error)) => {
                    tracing::info!(%error, "unpacking once more, from the verified layer");
                    again = true;
                }
            }
        }
    }

    /// Fetches all of a layer. What is under way when a reader comes is brought to its end.
    async fn fetch(&self, handle: &Arc<Handle>, pace: Pace) -> Result<(), FetchError> {
        loop {
            pace.wait(&self.engine).await;
            tokio::select! {
                brought = handle.ensure(Class::Warm) => return brought.map(drop),
                () = pace.disturbed(&self.engine) => {}
            }
        }
    }
}
