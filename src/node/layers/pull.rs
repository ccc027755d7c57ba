//! Layers from their registry to files and indexes in the store.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::{Known, Maker, blob_of, blobs_of, fetch_failed, indexes::refuted};
use crate::{
    digest::{Digest, ObjectId},
    fetch::{Class, Engine, FetchError, Handle},
    image::{ImageError, LayerIndex},
    node::{
        Node, NodeError, Progress, blocking,
        unpack::{UnpackError, unpack},
    },
    source::{Layer, Source},
    store::{Import, IndexSeal, StoreError},
    telemetry::{self, span},
};

/// Layers of an image that are unpacked at the same time: decoding is what takes long, and each has several
/// threads.
const LAYERS_AT_ONCE: usize = 2;
/// Layers of all images together: each takes up to 25 MiB, besides a window that is larger than usual.
const ALL_LAYERS_AT_ONCE: usize = 6;
/// Of these, in the background: behind those who read the image, and of what is warmed for later, which may be held back
/// to a few bytes a second. Each leaves the other one, and both leave one to whoever waits for a pull.
const BACKGROUND_AT_ONCE: usize = 5;
const AHEAD_AT_ONCE: usize = 4;
const BEHIND_AT_ONCE: usize = 3;
/// Layers beside these, whose windows were not there at once: others have their turns meanwhile.
const WIDE_AT_ONCE: usize = 4;
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

/// Turns to unpack a layer, of all images: what bounds the memory that this takes. A layer has one while it is fetched: so
/// each registry leaves one of each kind to the others, however slow it is.
pub(in crate::node) struct Slots {
    common: Turns,
    wide: Arc<Semaphore>,
    registries: Mutex<HashMap<String, Weak<Turns>>>,
}

struct Turns {
    all: Arc<Semaphore>,
    background: Arc<Semaphore>,
    ahead: Arc<Semaphore>,
    behind: Arc<Semaphore>,
}

/// A turn, until it is dropped.
struct Turn {
    _permits: Vec<OwnedSemaphorePermit>,
    _registry: Option<Arc<Turns>>,
}

impl Turns {
    fn but(left: usize) -> Self {
        let [all, background, ahead, behind] = [
            ALL_LAYERS_AT_ONCE,
            BACKGROUND_AT_ONCE,
            AHEAD_AT_ONCE,
            BEHIND_AT_ONCE,
        ]
        .map(|turns| Arc::new(Semaphore::new(turns - left)));
        Self {
            all,
            background,
            ahead,
            behind,
        }
    }

    /// Nothing that others wait for may be held by who waits for it.
    async fn take(&self, pace: Pace, is_ahead: bool, permits: &mut Vec<OwnedSemaphorePermit>) {
        let Self {
            all,
            background,
            ahead,
            behind,
        } = self;
        let ways: &[_] = match pace {
            Pace::Behind(_) => &[behind, background, all],
            Pace::Full if is_ahead => &[ahead, background, all],
            Pace::Full => &[all],
        };
        for way in ways {
            permits.extend(Arc::clone(way).acquire_owned().await.ok());
        }
    }
}

impl Default for Slots {
    fn default() -> Self {
        Self {
            common: Turns::but(0),
            wide: Arc::new(Semaphore::new(WIDE_AT_ONCE)),
            registries: Mutex::default(),
        }
    }
}

impl Slots {
    /// A turn for a layer from `origin`.
    async fn turn(&self, origin: &str, pace: Pace, is_ahead: bool) -> Turn {
        let registry = self.registry(origin);
        let mut permits = Vec::new();
        registry.take(pace, is_ahead, &mut permits).await;
        self.common.take(pace, is_ahead, &mut permits).await;
        Turn {
            _permits: permits,
            _registry: Some(registry),
        }
    }

    /// What a layer that has to wait for its window takes for its turn, if there is one: it keeps that to its end, since who
    /// has a window may wait for nothing that is held by those who wait for one.
    fn wide(&self) -> Option<Turn> {
        let permit = Arc::clone(&self.wide).try_acquire_owned().ok()?;
        Some(Turn {
            _permits: vec![permit],
            _registry: None,
        })
    }

    /// Those of the registry that `origin`, `<scheme>://<registry>/…`, is in.
    fn registry(&self, origin: &str) -> Arc<Turns> {
        let host = origin.split('/').nth(2).unwrap_or(origin);
        let mut registries = self.registries.lock();
        if let Some(turns) = registries.get(host).and_then(Weak::upgrade) {
            return turns;
        }
        registries.retain(|_, turns| turns.strong_count() > 0);
        let turns = Arc::new(Turns::but(1));
        registries.insert(host.to_owned(), Arc::downgrade(&turns));
        turns
    }
}

/// A layer that was unpacked.
pub(super) struct Pulled {
    pub(super) index: Arc<LayerIndex>,
    /// Of the checked index that the store has.
    pub(super) seal: Option<IndexSeal>,
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
    ) -> Result<Vec<Pulled>, NodeError> {
        let blobs = blobs_of(reference, layers);
        let names = layers
            .iter()
            .map(|(layer, _)| layer.blob.to_string())
            .collect();
        progress.begin_named(&Arc::new(blobs), names);
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
        for Pulled { index, refuted, .. } in &pulled {
            if let Some(why) = refuted {
                return Err(NodeError::Misled {
                    reference: reference.to_owned(),
                    layer: index.blob.to_string(),
                    why: format!("{why}; a true index has taken its place"),
                });
            }
        }
        Ok(pulled)
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
            .pull_one(reference, layer, (&handle, &origin.origin()), import, pace)
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
                self.keep_checked_index(reference, &checked).await?;
            }
            _ => self.keep_checked_index(reference, &known).await?,
        }
        let (store, blob) = (Arc::clone(self.store()), layer.blob);
        let seal = blocking(move || store.index_seal(&blob)).await?;
        shown.finished();
        Ok(Pulled {
            index: known.index,
            seal,
            refuted,
        })
    }

    async fn pull_one(
        &self,
        reference: &str,
        layer: &Layer,
        (handle, origin): (&Arc<Handle>, &str),
        import: &Arc<Import>,
        pace: Pace,
    ) -> Result<LayerIndex, NodeError> {
        // Once beside the fetch; should that have brought wrong bytes, once more from what was
        // verified.
        let mut again = false;
        loop {
            pace.wait(&self.engine).await;
            let turn = self.slots.turn(origin, pace, self.is_ahead).await;
            let turn = Arc::new(Mutex::new(turn));
            let (slots, mine) = (Arc::clone(&self.slots), Arc::clone(&turn));
            let waits = move || {
                if let Some(wide) = slots.wide() {
                    *mine.lock() = wide;
                }
            };
            let (send, pieces) = mpsc::channel(PIECES_AHEAD);
            let (this, import, engine) = (layer.clone(), Arc::clone(import), self.engine.clone());
            let memory = Arc::clone(&self.memory);
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
                let _ = done.send(unpack(&this, &import, pieces, (&memory, waits), &mut came));
                drop(turn);
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
                brought = handle.ensure_ranked(Class::Warm, self.rank) => return brought.map(drop),
                () = pace.disturbed(&self.engine) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn turns_are_bounded_and_the_background_leaves_some() {
        let slots = Slots::default();
        let registries = Cell::new(0);
        // Of a registry each.
        let turn = |pace, is_ahead| {
            registries.set(registries.get() + 1);
            let origin = format!("oci://r{}/app", registries.get());
            slots.turn(&origin, pace, is_ahead).now_or_never()
        };
        let all =
            |pace, is_ahead| -> Vec<_> { std::iter::from_fn(|| turn(pace, is_ahead)).collect() };
        let mut behind = all(Pace::behind(), false);
        assert_eq!(behind.len(), BEHIND_AT_ONCE);
        let ahead = all(Pace::Full, true);
        assert_eq!(ahead.len(), BACKGROUND_AT_ONCE - BEHIND_AT_ONCE);
        let full = all(Pace::Full, false);
        assert_eq!(full.len(), ALL_LAYERS_AT_ONCE - BACKGROUND_AT_ONCE);
        behind.pop();
        assert!(turn(Pace::Full, false).is_some());
        drop((behind, ahead, full));
        // However much is warmed for later, and however slowly.
        let ahead = all(Pace::Full, true);
        assert_eq!(ahead.len(), AHEAD_AT_ONCE);
        let behind = turn(Pace::behind(), false);
        assert!(behind.is_some() && turn(Pace::Full, false).is_some());
        drop((behind, ahead));

        for (pace, is_ahead) in [
            (Pace::Full, false),
            (Pace::Full, true),
            (Pace::behind(), false),
        ] {
            let of = |origin| slots.turn(origin, pace, is_ahead).now_or_never();
            let slow: Vec<_> = std::iter::from_fn(|| of("oci://slow/app")).collect();
            assert!(slow.len() > 1 && of("oci://slow/other").is_none());
            assert!(of("oci://fast/app").is_some());
        }
        assert!(slots.registries.lock().len() <= 2);
    }

    #[test]
    fn who_waits_for_a_window_leaves_its_turn_to_others() {
        let slots = Slots::default();
        let turn = || slots.turn("oci://r/app", Pace::Full, false).now_or_never();
        let mut all: Vec<_> = std::iter::from_fn(turn).collect();
        for turn in &mut all {
            if let Some(wide) = slots.wide() {
                *turn = wide;
            }
        }
        let more: Vec<_> = std::iter::from_fn(turn).collect();
        assert_eq!(more.len(), WIDE_AT_ONCE, "it is bounded");
        drop(all);
        assert!(slots.wide().is_some());
    }
}
