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
mod indexes;
mod profile;
mod pull;
mod push;

use std::{collections::HashSet, sync::Arc};

use self::{
    blobs::Blobs,
    indexes::{Known, Maker, were_unpacked},
};
pub(super) use self::{blobs::blob_of, indexes::waits_for_a_check, pull::Pace};
pub use self::{profile::Start, push::PushedIndexes};
use super::{Node, NodeError, Progress, Resolved, blocking, joined};
use crate::{
    digest::Digest,
    fetch::FetchError,
    image::{EntryKind, ImageError, LayerIndex, LayerSource, merge},
    reference::{Filter, Reference},
    source::{Layer, Layered, Source, SourceError, SourceErrorKind},
    store::{ImageLayer, ImageRecord, Import, Reservation, Store, StoreError},
    tree::{Artifact, Recipe},
};

/// Decoded bytes of layers that are kept in memory, for each image that is read.
const DECODED_CACHE: usize = 32 << 20;
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
}

impl Layers {
    /// Whether no index waits to be checked.
    pub(super) fn are_trusted(&self) -> bool {
        self.known.iter().all(|known| known.maker.is_checked())
    }
}

impl Node {
    /// Resolves what lies in layers. Those of which no index is to be had are unpacked; without
    /// `pull` the answer is `None` then.
    pub(super) async fn resolve_layered(
        &self,
        reference: &Reference,
        layered: Layered,
        origin: &Arc<dyn Source>,
        pull: Option<&Progress>,
    ) -> Result<Option<Resolved>, NodeError> {
        let import = self.begin_import().await?;
        let mut known = self.known_indexes(&layered, &import).await?;
        self.find_indexes(&layered, origin, &mut known).await?;
        let mut missing = Vec::new();
        for (at, layer) in layered.layers.iter().enumerate() {
            if let Some(path) = &layer.as_file {
                let index = LayerIndex::of_file(layer.blob, layer.size, path);
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
            let Some(progress) = pull else {
                return Ok(None);
            };
            let layers: Vec<(&Layer, Option<&Known>)> = (missing.iter())
                .map(|&at| (&layered.layers[at], known[at].as_ref()))
                .collect();
            let room = self.admit_layers(&layered.reference, &layers).await?;
            let store = Arc::clone(self.store());
            let within = blocking(move || Ok(Arc::new(store.import_within(&room)?))).await?;
            let pulled = self
                .pull(
                    &layered.reference,
                    &layers,
                    origin,
                    &within,
                    progress,
                    Pace::Full,
                )
                .await?;
            for (at, index) in missing.into_iter().zip(pulled) {
                known[at] = Some(Known {
                    index,
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
        let matcher = reference
            .filter
            .matcher()
            .map_err(|error| NodeError::Resolve {
                reference: layered.reference.clone(),
                source: SourceError::new(
                    SourceErrorKind::Invalid,
                    &layered.reference,
                    error.to_string(),
                ),
            })?;
        let is_whole = is_whole_image(reference, &layered);
        if !is_whole {
            let wanted = |path: &str| matcher.matches(path);
            let part = part_of(&artifact, &layered.root, &layered.layers, &wanted);
            artifact = part.map_err(|source| NodeError::Image {
                reference: layered.reference.clone(),
                source,
            })?;
        }
        if self.store().writable() {
            self.record(&artifact).await?;
            if is_whole {
                self.keep_documents(&layered.manifest, &layered.config, origin)
                    .await?;
                self.record_image(&layered, &known).await?;
            }
        }
        drop((import, pulled_by));
        let mut resolved = self.lazy(artifact, layered.layers, known, origin);
        resolved.fresh = true;
        resolved.brought = brought;
        Ok(Some(resolved))
    }

    /// The image whose first layers have the chain id `chain`, brought down to just these layers;
    /// `None` where none is known, or its indexes are not here. As [`Node::knows_chain`] otherwise.
    ///
    /// # Errors
    /// What the source or the store says.
    pub async fn image_by_chain(
        &self,
        chain: &Digest,
        named: Option<&Reference>,
    ) -> Result<Option<Resolved>, NodeError> {
        match self.image_of_chain(chain, named).await? {
            Some((image, count)) => self.lowest_layers(image, count).await,
            None => Ok(None),
        }
    }

    /// As [`Node::image_by_chain`], of the image called `reference`, and no other.
    ///
    /// # Errors
    /// What the source or the store says.
    pub async fn image_up_to(
        &self,
        reference: &Reference,
        chain: &Digest,
    ) -> Result<Option<Resolved>, NodeError> {
        let (store, name) = (Arc::clone(self.store()), reference.to_string());
        let Some(image) = blocking(move || store.image(&name)).await? else {
            return Ok(None);
        };
        match image.layers_of(chain) {
            Some(count) => self.lowest_layers(image, count).await,
            None => Ok(None),
        }
    }

    /// The lowest `count` layers of an image; `None` where their indexes are not here.
    async fn lowest_layers(
        &self,
        mut image: ImageRecord,
        count: usize,
    ) -> Result<Option<Resolved>, NodeError> {
        let Ok(reference) = image.reference.parse::<Reference>() else {
            return Ok(None);
        };
        let origin = self
            .sources
            .open(&reference)
            .map_err(|source| NodeError::Resolve {
                reference: image.reference.clone(),
                source,
            })?;
        image.layers.truncate(count);
        let Some((layers, known)) = self.recorded_indexes(&image).await? else {
            return Ok(None);
        };
        let artifact = self
            .merged(&image.reference, &image.manifest, &known)
            .await?;
        Ok(Some(self.lazy(artifact, layers, known, &origin)))
    }

    /// The recorded artifact with what is needed to read it; `None` where that is not all here, or
    /// where the artifact is not what the indexes say: an index that was believed has been replaced.
    pub(super) async fn recorded_layers(
        &self,
        artifact: &Arc<Artifact>,
        origin: &Arc<dyn Source>,
    ) -> Result<Option<Resolved>, NodeError> {
        let (store, reference) = (Arc::clone(self.store()), artifact.reference.clone());
        let Some(image) = blocking(move || store.image(&reference)).await? else {
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
        let Some((layers, known)) = self.recorded_indexes(&image).await? else {
            return Ok(None);
        };
        let merged = self
            .merged(&image.reference, &image.manifest, &known)
            .await?;
        if merged != *artifact {
            return Ok(None);
        }
        Ok(Some(self.lazy(merged, layers, known, origin)))
    }

    /// The layers of a recorded image and their indexes; `None` where one is missing.
    async fn recorded_indexes(
        &self,
        image: &ImageRecord,
    ) -> Result<Option<(Vec<Layer>, Vec<Known>)>, NodeError> {
        let layers: Vec<Layer> = image.layers.iter().map(recorded_layer).collect();
        let mut known = Vec::with_capacity(layers.len());
        for layer in &layers {
            match self.index_of(&image.reference, layer).await {
                Ok(Some(index)) if !self.needs_unpacking(Some(&index)).await? => known.push(index),
                Err(error) if !error.is_refuted() => return Err(error),
                _ => return Ok(None),
            }
        }
        Ok(Some((layers, known)))
    }

    /// The record of an image whose first layers have the chain id `chain`, and how many: one whose
    /// layers were unpacked here, which shows that they are those layers. Else the image called
    /// `named`: what another says of its own layers must not stand in for it.
    async fn image_of_chain(
        &self,
        chain: &Digest,
        named: Option<&Reference>,
    ) -> Result<Option<(ImageRecord, usize)>, NodeError> {
        let (store, chain) = (Arc::clone(self.store()), *chain);
        let named = named.map(ToString::to_string);
        let found = blocking(move || {
            for (image, count) in store.images_by_chain(&chain)? {
                if were_unpacked(&store, &image.layers[..count])? {
                    return Ok(Some((image, count)));
                }
            }
            let image = match named {
                Some(name) => store.image(&name)?,
                None => None,
            };
            Ok(image.and_then(|image| {
                let count = image.layers_of(&chain)?;
                Some((image, count))
            }))
        });
        Ok(found.await?)
    }

    /// Whether a layer cannot be read before it is unpacked.
    async fn needs_unpacking(&self, known: Option<&Known>) -> Result<bool, NodeError> {
        match known {
            None => Ok(true),
            Some(known) if known.index.is_seekable() => Ok(false),
            Some(known) => {
                let (store, index) = (Arc::clone(self.store()), Arc::clone(&known.index));
                Ok(blocking(move || much_is_missing(&store, &index)).await?)
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
        let source = LayerSource::new(Arc::new(blobs), DECODED_CACHE);
        for (known, layer) in known.iter().zip(&layers) {
            if layer.as_file.is_some() {
                continue;
            }
            if let Err(error) = source.add(Arc::clone(&known.index)) {
                // Its files came when it was unpacked.
                tracing::debug!(%error, "a layer is not read at random");
            }
        }
        let layers = Layers {
            layers,
            known,
            origin: Arc::clone(origin),
        };
        Resolved {
            artifact,
            source: Arc::new(source),
            fresh: false,
            new: false,
            brought: 0,
            layers: Some(Arc::new(layers)),
        }
    }

    /// Unpacks the layers of which much is missing, or whose index nobody has checked; the rest is
    /// for the caller to fetch file by file.
    pub(super) async fn bring_layers(
        &self,
        reference: &str,
        layers: &Layers,
        progress: &Progress,
        pace: Pace,
    ) -> Result<(), NodeError> {
        let mut wanted: Vec<(&Layer, Option<&Known>)> = Vec::new();
        for (layer, known) in layers.layers.iter().zip(&layers.known) {
            if layer.as_file.is_some() {
                continue;
            }
            let (store, index) = (Arc::clone(self.store()), Arc::clone(&known.index));
            let missing = blocking(move || much_is_missing(&store, &index)).await?;
            if missing || !self.is_trusted(reference, layer, known).await? {
                wanted.push((layer, Some(known)));
            }
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let import = self.begin_import().await?;
        self.pull(reference, &wanted, &layers.origin, &import, progress, pace)
            .await?;
        Ok(())
    }

    /// The reference of an image whose first layers have the chain id `chain` and can be read, now or
    /// while they arrive: any whose layers were unpacked here, else the one called `named`. Looks at
    /// few small files.
    ///
    /// # Errors
    /// What the store says.
    pub async fn knows_chain(
        &self,
        chain: &Digest,
        named: Option<&Reference>,
    ) -> Result<Option<String>, NodeError> {
        let Some((image, count)) = self.image_of_chain(chain, named).await? else {
            return Ok(None);
        };
        let store = Arc::clone(self.store());
        let known = blocking(move || {
            for layer in image.layers.iter().take(count) {
                if !store.has_index(&layer.blob)? {
                    return Ok(None);
                }
            }
            Ok(Some(image.reference))
        });
        Ok(known.await?)
    }

    /// What the topmost layer of a chain takes on the disk: bytes in blocks, and inodes. `None` where
    /// the chain is not known.
    ///
    /// # Errors
    /// What the store says.
    pub async fn layer_usage(&self, chain: &Digest) -> Result<Option<(u64, u64)>, NodeError> {
        let (store, chain) = (Arc::clone(self.store()), *chain);
        let found = blocking(move || store.image_by_chain(&chain)).await?;
        let Some((image, count)) = found else {
            return Ok(None);
        };
        let Some(layer) = count.checked_sub(1).and_then(|at| image.layers.get(at)) else {
            return Ok(None);
        };
        Ok(self
            .index_of(&image.reference, &recorded_layer(layer))
            .await?
            .map(|known| usage(&known.index)))
    }

    /// Room for layers and what they unpack to. That is not known before: three times as much is
    /// usual. What does not fit in the end fails then.
    async fn admit_layers(
        &self,
        reference: &str,
        layers: &[(&Layer, Option<&Known>)],
    ) -> Result<Reservation, NodeError> {
        let bytes = layers
            .iter()
            .fold(0u64, |sum, (layer, _)| sum.saturating_add(layer.size));
        let (store, reference) = (Arc::clone(self.store()), reference.to_owned());
        let admitted = blocking(move || store.admit_bytes(&reference, bytes.saturating_mul(3)));
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

    async fn record_image(&self, layered: &Layered, known: &[Known]) -> Result<(), NodeError> {
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
        let record = ImageRecord {
            reference: layered.reference.clone(),
            manifest: layered.manifest,
            config: layered.config,
            platform: layered
                .platform
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            layers: layers.collect(),
            made: std::time::SystemTime::now(),
        };
        let store = Arc::clone(self.store());
        Ok(blocking(move || store.record_image(&record)).await?)
    }
}

/// The part of an image that a reference means: below a directory, and only what is wanted there.
/// Layers that are files as they are lose the mark of what is decoded.
fn part_of(
    artifact: &Artifact,
    root: &str,
    layers: &[Layer],
    wanted: &dyn Fn(&str) -> bool,
) -> Result<Arc<Artifact>, ImageError> {
    let mut part = artifact
        .below(root, wanted)
        .ok_or_else(|| ImageError::invalid(format!("it has no directory /{root}")))?;
    let files: HashSet<String> = (layers.iter())
        .filter(|layer| layer.as_file.is_some())
        .map(|layer| layer.blob.to_string())
        .collect();
    for object in &mut part.objects {
        if let Recipe::Raw(location) = &mut object.recipe
            && let Some((blob, _)) = location.path.split_once('#')
            && files.contains(blob)
        {
            location.path = blob.to_owned();
            location.generation = None;
        }
    }
    Ok(Arc::new(part))
}

fn fetch_failed(reference: &str) -> impl Fn(FetchError) -> NodeError {
    |source| NodeError::Fetch {
        reference: reference.to_owned(),
        source,
    }
}

/// Whether this is an image that can be run: all of it, and no model, which has files among its
/// layers, or layers of which nothing says what they unpack to.
fn is_whole_image(reference: &Reference, layered: &Layered) -> bool {
    let is_of_image = |layer: &Layer| layer.as_file.is_none() && layer.diff_id.is_some();
    layered.root.is_empty()
        && reference.filter == Filter::default()
        && layered.layers.iter().all(is_of_image)
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

/// Bytes in blocks of 4 KiB, and inodes.
fn usage(index: &LayerIndex) -> (u64, u64) {
    const BLOCK: u64 = 4096;
    let mut sum = (0u64, 0u64);
    for entry in &index.entries {
        let bytes = match &entry.kind {
            EntryKind::File(content) => content.size.div_ceil(BLOCK) * BLOCK,
            EntryKind::Dir => BLOCK,
            EntryKind::Hardlink { .. } | EntryKind::Opaque => continue,
            _ => 0,
        };
        sum = (sum.0.saturating_add(bytes), sum.1 + 1);
    }
    sum
}

/// Whether so much of a layer's files is missing that it is better unpacked again.
fn much_is_missing(store: &Store, index: &LayerIndex) -> Result<bool, StoreError> {
    let (mut all, mut missing) = (0u64, 0u64);
    for content in index.files() {
        all = all.saturating_add(content.size);
        if !store.has(&content.digest)? {
            missing = missing.saturating_add(content.size.max(1));
        }
    }
    Ok(missing > all / FEW)
}
