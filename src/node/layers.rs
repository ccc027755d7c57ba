//! What lies in layers: container images, and models that come as compressed tars.
//!
//! An image is the merge of its layers' indexes. An index comes from the store, else from the
//! registry, where somebody has pushed it beside the image or the layer carries its own, else it
//! falls out of unpacking the layer, which is a full pull. With all indexes at hand an image is an
//! artifact like any other: its files are fetched when they are read, by ranges of the layers. Who
//! wants all of it unpacks the layers instead, since that decodes every byte once.
//!
//! An index that somebody else made, be it the table that a layer carries, is believed until its
//! layer was unpacked here: then it has to say the same, or what it said is thrown away (`verify =
//! "strict"` believes none).
//!
//! Order on disk: files, then the index, then the artifact's record, then the image's record. An
//! [`Import`] keeps each from collection until the record that leads there is written.

mod blobs;
mod chains;
mod indexes;
mod kept;
mod profile;
mod proof;
mod pull;
mod push;
mod usage;

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use parking_lot::Mutex;

use self::{
    blobs::Blobs,
    indexes::{Known, Maker},
    pull::Pulled,
};
pub(super) use self::{
    blobs::blob_of,
    indexes::waits_for_a_check,
    pull::{Pace, Slots},
};
pub use self::{profile::Start, push::PushedIndexes};
use super::{Node, NodeError, Progress, Purpose, Resolved, blocking, joined};
use crate::{
    digest::Digest,
    fetch::FetchError,
    image::{ImageError, LayerIndex, LayerSource, merge},
    reference::{Filter, Reference},
    source::{Layer, Layered, Source, SourceError, SourceErrorKind, model_of, patiently},
    store::{ImageLayer, ImageRecord, Import, IndexSeal, Reservation, Store, StoreError},
    tree::{Artifact, Meta, Object, Tree},
};

/// A layer is unpacked once more if one part in so many of its files' bytes is missing; else they
/// are fetched one by one.
const FEW: u64 = 8;

/// The layers of an artifact.
#[derive(Debug)]
pub(super) struct Layers {
    /// As the registry has them, lowest first.
    layers: Vec<Layer>,
    known: Vec<Known>,
    /// Where they are read.
    origin: Arc<dyn Source>,
    /// What was made sure of before it was recorded, until [`Node::make_room`].
    room: Mutex<Option<Reservation>>,
    /// Those that were unpacked to bring this, and are what was said of them; with the index that each has since then.
    unpacked: Mutex<HashMap<Digest, IndexSeal>>,
}

/// All of what is about to be brought.
pub(super) struct Coming<'r> {
    /// The layers to unpack before the rest is fetched file by file: of which much is missing, or that
    /// can only be unpacked, or whose index nobody has checked.
    first: Vec<(&'r Layer, Option<&'r Known>)>,
    room: Reservation,
}

/// What came of unpacking layers first.
#[derive(Default)]
pub(super) struct Unpacked {
    /// As the locations of their files call them; none where some of these stay on a tier.
    layers: BTreeSet<String>,
    _room: Option<Reservation>,
}

impl Unpacked {
    fn of(room: Reservation) -> Self {
        Self {
            layers: BTreeSet::new(),
            _room: Some(room),
        }
    }

    /// Whether an object is in the store itself since its layer was unpacked; others may be there, too.
    pub(super) fn brought(&self, object: &Object) -> bool {
        let path = object.recipe.location().map(|location| &location.path);
        let layer = path.and_then(|path| path.split_once('#'));
        layer.is_some_and(|(layer, _)| self.layers.contains(layer))
    }

    /// Whether that holds for all of an artifact.
    pub(super) fn brought_all(&self, artifact: &Artifact) -> bool {
        artifact.stored().all(|object| self.brought(object))
    }
}

impl Layers {
    fn new(layers: Vec<Layer>, known: Vec<Known>, origin: &Arc<dyn Source>) -> Self {
        Self {
            layers,
            known,
            origin: Arc::clone(origin),
            room: Mutex::default(),
            unpacked: Mutex::default(),
        }
    }

    /// Whether no index waits to be checked.
    pub(super) fn are_trusted(&self) -> bool {
        self.known.iter().all(|known| known.maker.is_checked())
    }
}

impl Node {
    /// Resolves what lies in layers. Those of which no index is to be had are unpacked, or the answer is
    /// `None`, as `purpose` says.
    pub(super) async fn resolve_layered(
        &self,
        reference: &Reference,
        layered: Layered,
        origin: &Arc<dyn Source>,
        purpose: Purpose<'_>,
    ) -> Result<Option<Resolved>, NodeError> {
        let import = self.begin_import().await?;
        let mut known = self.known_indexes(&layered, &import).await?;
        // Without them all of it has to be unpacked.
        let looking = self.find_indexes(&layered, origin, &mut known);
        patiently(self.patience(), looking).await?;
        let mut missing = Vec::new();
        for (at, layer) in layered.layers.iter().enumerate() {
            if let Some(file) = &layer.as_file {
                let mut meta = Meta::file(file.mtime);
                if file.executable {
                    meta.mode = 0o555;
                }
                let index = LayerIndex::of_file(layer.blob, layer.size, &file.path, meta);
                known[at] = Some(Known {
                    index: Arc::new(index.map_err(|source| NodeError::Image {
                        reference: layered.reference.clone(),
                        source,
                    })?),
                    maker: Maker::Own,
                });
            } else if self.needs_unpacking(known[at].as_ref()).await? {
                missing.push(at);
            }
        }
        let mut brought = 0;
        let mut pulled_by = None;
        if !missing.is_empty() {
            let (Purpose::Read(progress) | Purpose::Bring(progress)) = purpose else {
                return Ok(None);
            };
            let layers: Vec<(&Layer, Option<&Known>)> = (missing.iter())
                .map(|&at| (&layered.layers[at], known[at].as_ref()))
                .collect();
            let (pulled, within) = self
                .pull_within(&layered.reference, &layers, origin, progress, Pace::Full)
                .await?;
            for (at, pulled) in missing.into_iter().zip(pulled) {
                known[at] = Some(Known {
                    index: pulled.index,
                    maker: Maker::Own,
                });
            }
            let done = Arc::clone(&within);
            brought = blocking(move || done.commit()).await?.new_bytes;
            // Until it is recorded what came is kept by both.
            pulled_by = Some(within);
        }
        let known: Vec<Known> = known.into_iter().flatten().collect();
        let mut artifact = self
            .merged(&layered.reference, &layered.manifest, &known)
            .await?;
        let is_whole = is_whole_image(reference, &layered);
        if layered.is_model {
            let model = model_of(reference, &layered, &artifact);
            artifact = Arc::new(model.map_err(|source| NodeError::Resolve {
                reference: layered.reference.clone(),
                source,
            })?);
        } else if !is_whole {
            artifact = part_of(reference, &layered.root, &artifact)?;
        }
        let image = is_whole.then(|| image_of(&layered, &known));
        let mut resolved = self.lazy(artifact, layered.layers, known, origin);
        resolved.fresh = true;
        resolved.brought = brought;
        if self.store().writable() {
            if let (Some(_), Purpose::Bring(_)) = (&image, purpose) {
                self.make_room_before(&resolved, &import).await?;
            }
            self.record(&resolved.artifact).await?;
            if let Some(image) = image {
                self.keep_documents(&image, origin).await?;
                let store = Arc::clone(self.store());
                blocking(move || store.record_image(&image)).await?;
            }
        }
        drop((import, pulled_by));
        Ok(Some(resolved))
    }

    /// The recorded artifact with what is needed to read it; `None` where that is not all here, or
    /// where the artifact is not what the indexes say: an index that was believed has been replaced. One that
    /// says the same may give other places in its layer.
    pub(super) async fn recorded_layers(
        &self,
        artifact: &Arc<Artifact>,
        origin: &Arc<dyn Source>,
    ) -> Result<Option<Resolved>, NodeError> {
        let digest = artifact.digest();
        let image = self.image_of(&artifact.reference, &digest, &artifact.revision);
        let Some(image) = image.await? else {
            // A model, or a part of an image: nothing can be read but what is here. Where the reference
            // has no record, that was forgotten, perhaps since it is not true.
            let (store, this) = (Arc::clone(self.store()), Arc::clone(artifact));
            let is_good = blocking(move || {
                let recorded = store.artifact(&this.reference)?.is_some();
                Ok(recorded && !waits_for_a_check(&store, &this)?)
            });
            let whole = is_good.await? && self.has_all(artifact).await?;
            let plain = || Resolved::plain(Arc::clone(artifact), Arc::clone(origin), false);
            return Ok(whole.then(plain));
        };
        let mut found = None;
        // What the store has of the layers by now, else what was kept when it was mounted.
        for of in [None, Some(&digest)] {
            let Some((layers, known)) = self.recorded_indexes(&image, of).await? else {
                continue;
            };
            let merged = self.merged(&image.reference, &image.manifest, &known);
            let merged = merged.await?;
            if merged.shows_the_same(artifact) {
                found = Some((layers, known, merged));
                break;
            }
        }
        let Some((layers, known, merged)) = found else {
            return Ok(None);
        };
        let is_checked = known.iter().all(|known| known.maker.is_checked());
        if merged != *artifact && is_checked && self.store().writable() {
            let recording = self.record_instead(Arc::clone(artifact), Arc::clone(&merged));
            if let Err(error) = recording.await {
                tracing::warn!(reference = artifact.reference, %error, "its record stays as it was");
            }
        }
        Ok(Some(self.lazy(merged, layers, known, origin)))
    }

    /// Records `merged` for what is recorded as `before`, unless it is something else by now.
    async fn record_instead(
        &self,
        before: Arc<Artifact>,
        merged: Arc<Artifact>,
    ) -> Result<(), NodeError> {
        let store = Arc::clone(self.store());
        let recording = blocking(move || {
            let recorded = store.artifact(&before.reference)?;
            if recorded.is_some_and(|(_, recorded)| recorded == *before) {
                store.record(&merged)?;
            }
            Ok(())
        });
        Ok(recording.await?)
    }

    /// The layers of a recorded image and their indexes, as generation `of` has them; `None` where one is missing.
    async fn recorded_indexes(
        &self,
        image: &ImageRecord,
        of: Option<&Digest>,
    ) -> Result<Option<(Vec<Layer>, Vec<Known>)>, NodeError> {
        let layers: Vec<Layer> = image.layers.iter().map(recorded_layer).collect();
        let mut known = Vec::with_capacity(layers.len());
        for layer in &layers {
            let index = match of {
                Some(of) => self.index_for(&image.reference, layer, of).await,
                None => self.index_of(&image.reference, layer).await,
            };
            match index {
                Ok(Some(index)) if !self.needs_unpacking(Some(&index)).await? => known.push(index),
                Err(error) if !error.is_refuted() => return Err(error),
                _ => return Ok(None),
            }
        }
        Ok(Some((layers, known)))
    }

    /// Whether a layer cannot be read before it is unpacked.
    async fn needs_unpacking(&self, known: Option<&Known>) -> Result<bool, NodeError> {
        match known {
            None => Ok(true),
            Some(known) if known.index.is_seekable() => Ok(false),
            Some(known) => {
                let (store, index) = (Arc::clone(self.store()), Arc::clone(&known.index));
                Ok(blocking(move || is_better_unpacked(&store, &index)).await?)
            }
        }
    }

    fn lazy(
        &self,
        artifact: Arc<Artifact>,
        layers: Vec<Layer>,
        known: Vec<Known>,
        origin: &Arc<dyn Source>,
    ) -> Resolved {
        let blobs = Blobs::new(self.engine.clone(), Arc::clone(origin), &layers);
        let source = LayerSource::new(Arc::new(blobs), Arc::clone(&self.memory));
        for (known, layer) in known.iter().zip(&layers) {
            if layer.as_file.is_some() {
                continue;
            }
            if let Err(error) = source.add(Arc::clone(&known.index)) {
                // Its files came when it was unpacked.
                tracing::debug!(%error, "a layer is not read at random");
            }
        }
        let layers = Layers::new(layers, known, origin);
        Resolved {
            artifact,
            source: Arc::new(source),
            fresh: false,
            new: false,
            brought: 0,
            layers: Some(Arc::new(layers)),
        }
    }

    /// Makes sure that all of it fits, evicting where that helps, with the layers that are fetched for it.
    ///
    /// # Errors
    /// Does not fit: the arithmetic is in the error.
    pub(super) async fn make_room<'r>(
        &self,
        resolved: &'r Resolved,
    ) -> Result<Coming<'r>, NodeError> {
        let coming = self.coming_for(resolved, false).await?;
        if let Some(layers) = &resolved.layers {
            drop(layers.room.lock().take());
        }
        Ok(coming)
    }

    /// Makes sure that all of an image fits before it is recorded in the place of another generation: of that nothing
    /// can be had from then on.
    async fn make_room_before(
        &self,
        resolved: &Resolved,
        import: &Arc<Import>,
    ) -> Result<(), NodeError> {
        let artifact = &resolved.artifact;
        let recorded = self.recorded(&artifact.reference).await?;
        let (Some(layers), true) = (
            &resolved.layers,
            recorded.is_some_and(|recorded| recorded != *artifact),
        ) else {
            return Ok(());
        };
        let (import, this) = (Arc::clone(import), Arc::clone(artifact));
        // What both have in common must not go with that.
        let keep = move || {
            let files: Vec<Digest> = this.stored().filter_map(|o| o.id.sha256()).collect();
            import.keep(&files)
        };
        blocking(keep).await?;
        let coming = self.coming_for(resolved, true).await?;
        *layers.room.lock() = Some(coming.room);
        Ok(())
    }

    /// As [`Node::make_room`]; `instead` of what is recorded, as in [`Store::admit_instead`].
    async fn coming_for<'r>(
        &self,
        resolved: &'r Resolved,
        instead: bool,
    ) -> Result<Coming<'r>, NodeError> {
        let artifact = Arc::clone(&resolved.artifact);
        let mut first = Vec::new();
        if let Some(Layers { layers, known, .. }) = resolved.layers.as_deref() {
            for (layer, known) in layers.iter().zip(known) {
                if layer.as_file.is_some() {
                    continue;
                }
                let (store, index) = (Arc::clone(self.store()), Arc::clone(&known.index));
                let is_better = blocking(move || is_better_unpacked(&store, &index)).await?;
                let reference = &artifact.reference;
                if is_better || !self.is_trusted(reference, layer, known).await? {
                    first.push((layer, Some(known)));
                }
            }
        }
        let blobs: Vec<Object> = first.iter().map(|(layer, _)| blob_of(layer)).collect();
        let store = Arc::clone(self.store());
        let admit = move || match instead {
            true => store.admit_instead(&artifact, &blobs),
            false => store.admit_with(&artifact, &blobs, 0),
        };
        let room = blocking(admit).await?;
        Ok(Coming { first, room })
    }

    /// Unpacks the layers that go before the rest, and makes room for that.
    pub(super) async fn bring_layers(
        &self,
        resolved: &Resolved,
        coming: Coming<'_>,
        progress: &Progress,
        pace: Pace,
    ) -> Result<Unpacked, NodeError> {
        let Coming { first, room } = coming;
        let Some(layers) = resolved.layers.as_ref().filter(|_| !first.is_empty()) else {
            return Ok(Unpacked::of(room));
        };
        // What is unpacked has room of its own.
        drop(room);
        let reference = &resolved.artifact.reference;
        let pulled = self.pull_within(reference, &first, &layers.origin, progress, pace);
        let (pulled, within) = pulled.await?;
        let seals = (pulled.iter()).filter_map(|layer| Some((layer.index.blob, layer.seal?)));
        layers.unpacked.lock().extend(seals);
        let mut unpacked = Unpacked::default();
        if within.imported().on_tiers == 0 {
            let names = pulled.iter().map(|layer| layer.index.blob.to_string());
            unpacked.layers = names.collect();
        }
        drop((pulled, within));
        // To look at each of tens of thousands takes a tenth of a second.
        if !unpacked.brought_all(&resolved.artifact) {
            unpacked._room = Some(self.admit(&resolved.artifact).await?);
        }
        Ok(unpacked)
    }

    /// Makes room for layers and what they unpack to, and pulls them; their files and indexes are kept
    /// by what it gives.
    async fn pull_within(
        &self,
        reference: &str,
        layers: &[(&Layer, Option<&Known>)],
        origin: &Arc<dyn Source>,
        progress: &Progress,
        pace: Pace,
    ) -> Result<(Vec<Pulled>, Arc<Import>), NodeError> {
        let room = self.admit_layers(reference, layers).await?;
        let store = Arc::clone(self.store());
        let within = blocking(move || Ok(Arc::new(store.import_within(&room)?))).await?;
        let pulled = self.pull(reference, layers, origin, &within, progress, pace);
        Ok((pulled.await?, within))
    }

    /// Room for layers and what they unpack to. Where no index says how much that is, twice as much is
    /// usual; where one lies, or it is more, what does not fit in the end fails then.
    async fn admit_layers(
        &self,
        reference: &str,
        layers: &[(&Layer, Option<&Known>)],
    ) -> Result<Reservation, NodeError> {
        let blobs = blobs_of(reference, layers);
        let expected: Vec<_> = (layers.iter())
            .map(|(layer, known)| (layer.size, known.map(|known| Arc::clone(&known.index))))
            .collect();
        let store = Arc::clone(self.store());
        let admitted = blocking(move || {
            let mut bytes = 0u64;
            for (size, index) in expected {
                bytes = bytes.saturating_add(match index {
                    Some(index) => missing(&store, &index)?.0,
                    None => size.saturating_mul(2),
                });
            }
            store.admit_with(&blobs, &[], bytes)
        });
        Ok(admitted.await?)
    }

    async fn begin_import(&self) -> Result<Arc<Import>, NodeError> {
        let store = Arc::clone(self.store());
        Ok(Arc::new(blocking(move || store.import()).await?))
    }

    async fn merged(
        &self,
        name: &str,
        manifest: &Digest,
        known: &[Known],
    ) -> Result<Arc<Artifact>, NodeError> {
        let reference = name.to_owned();
        let revision = manifest.to_string();
        let indexes: Vec<_> = known.iter().map(|known| Arc::clone(&known.index)).collect();
        let merged = joined(tokio::task::spawn_blocking(move || {
            let layers: Vec<&LayerIndex> = indexes.iter().map(|index| &**index).collect();
            let (tree, objects) = merge(&layers)?;
            Ok(Artifact {
                reference,
                revision,
                tree,
                objects,
            })
        }));
        merged
            .await
            .map(Arc::new)
            .map_err(|source| NodeError::Image {
                reference: name.to_owned(),
                source,
            })
    }
}

/// What is recorded of an image.
fn image_of(layered: &Layered, known: &[Known]) -> ImageRecord {
    let layers = layered
        .layers
        .iter()
        .zip(known)
        .map(|(layer, known)| ImageLayer {
            blob: layer.blob,
            size: layer.size,
            media_type: layer.media_type.clone(),
            diff_id: known.index.diff_id,
        });
    ImageRecord {
        reference: layered.reference.clone(),
        manifest: layered.manifest,
        index: layered.index,
        config: layered.config,
        platform: layered
            .platform
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        layers: layers.collect(),
        made: std::time::SystemTime::now(),
    }
}

/// The part of an image that a reference means: below a directory, and only what is wanted there.
fn part_of(
    reference: &Reference,
    root: &str,
    image: &Artifact,
) -> Result<Arc<Artifact>, NodeError> {
    let name = &image.reference;
    let matcher = reference
        .filter
        .matcher()
        .map_err(|error| NodeError::Resolve {
            reference: name.clone(),
            source: SourceError::new(SourceErrorKind::Invalid, name, error.to_string()),
        })?;
    let part = image.below(root, &|path| matcher.matches(path));
    let part = part.ok_or_else(|| NodeError::Image {
        reference: name.clone(),
        source: ImageError::invalid(format!("it has no directory /{root}")),
    })?;
    Ok(Arc::new(part))
}

fn fetch_failed(reference: &str) -> impl Fn(FetchError) -> NodeError {
    |source| NodeError::Fetch {
        reference: reference.to_owned(),
        source,
    }
}

/// Whether this is an image that can be run: all of it, and no model.
fn is_whole_image(reference: &Reference, layered: &Layered) -> bool {
    !layered.is_model && layered.root.is_empty() && reference.filter == Filter::default()
}

fn recorded_layer(layer: &ImageLayer) -> Layer {
    Layer {
        blob: layer.blob,
        size: layer.size,
        media_type: layer.media_type.clone(),
        diff_id: Some(layer.diff_id),
        annotations: Default::default(),
        as_file: None,
    }
}

/// Whether a layer is to be unpacked again: so much of its files is missing that it is better, or it
/// is the only way to have one of them.
fn is_better_unpacked(store: &Store, index: &LayerIndex) -> Result<bool, StoreError> {
    let (missing, all) = missing(store, index)?;
    Ok(match index.is_seekable() {
        true => missing > all / FEW,
        false => missing > 0,
    })
}

/// Bytes of a layer's files that are not here, each at least one, and of all of them.
fn missing(store: &Store, index: &LayerIndex) -> Result<(u64, u64), StoreError> {
    let (mut all, mut missing) = (0u64, 0u64);
    for content in index.files() {
        all = all.saturating_add(content.size);
        if !store.has(&content.digest)? {
            missing = missing.saturating_add(content.size.max(1));
        }
    }
    Ok((missing, all))
}

/// Layers as they lie in the registry.
fn blobs_of(reference: &str, layers: &[(&Layer, Option<&Known>)]) -> Artifact {
    Artifact {
        reference: reference.to_owned(),
        revision: String::new(),
        tree: Tree::empty(),
        objects: layers.iter().map(|(layer, _)| blob_of(layer)).collect(),
    }
}
