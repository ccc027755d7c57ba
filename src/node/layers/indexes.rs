//! Indexes of layers: in the store, beside the image in the registry, in the layers themselves.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt as _;

use crate::{
    digest::Digest,
    fetch::VerifyPolicy,
    image::{
        ImageError, LayerIndex,
        toc::{self, TocLayer},
    },
    node::{Node, NodeError, blocking, joined},
    reference::{Locator, Reference},
    source::{Layer, Layered, Source, SourceError, SourceErrorKind, asked, patiently},
    store::{ImageLayer, Import, Store, StoreError, StoreErrorKind, layers_of},
    tree::{Artifact, Location},
};

/// What refers to an image and holds the indexes of its layers.
pub(in crate::node) const ARTIFACT_TYPE: &str = "application/vnd.hearth.index.v1";
/// One index: as [`LayerIndex::encode`] makes it.
pub(in crate::node) const INDEX_MEDIA_TYPE: &str = "application/vnd.hearth.layer-index.v1";
/// The digest of the layer that an index belongs to.
pub(in crate::node) const LAYER_ANNOTATION: &str = "dev.hearth.layer";

/// How long a registry is asked what is beside an image: mostly nothing, and with a mirror that is down it cannot say so.
const BESIDE: Duration = Duration::from_secs(1);
/// Largest index taken from a registry, in bytes.
const MAX_INDEX: u64 = 256 << 20;

/// The index of a layer.
#[derive(Debug, Clone)]
pub(super) struct Known {
    pub(super) index: Arc<LayerIndex>,
    pub(super) maker: Maker,
}

/// Who made an index. In the store it stands before the index, as one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Maker {
    /// It came of unpacking the layer here.
    Own = b'o' as isize,
    /// The layer carries it, and the image's manifest has its digest: nobody here has checked it.
    Table = b't' as isize,
    /// The layer carries it, and was unpacked here to the same.
    CheckedTable = b'c' as isize,
    /// It was found beside the image: nobody here has checked it. The SHA-256 of the repository's
    /// name stands before the index, too: who may write there says nothing of other repositories.
    Found = b'f' as isize,
}

/// Stands before a diff id in place of an index: what the layer unpacks to, which an image says
/// something else of.
const REFUTED: u8 = b'x';

impl Maker {
    pub(super) const fn of(mark: u8) -> Option<Self> {
        Some(match mark {
            b'o' => Self::Own,
            b't' => Self::Table,
            b'c' => Self::CheckedTable,
            b'f' => Self::Found,
            _ => return None,
        })
    }

    /// What it is once unpacking the layer has shown that the index says the truth.
    pub(super) const fn checked(self) -> Self {
        match self {
            Self::Own | Self::Found => Self::Own,
            Self::Table | Self::CheckedTable => Self::CheckedTable,
        }
    }

    /// Whether the layer is known to be what the index says.
    pub(super) const fn is_checked(self) -> bool {
        matches!(self, Self::Own | Self::CheckedTable)
    }
}

impl Known {
    /// What is kept of the layer `blob`, whoever it is good for; `None` where that is no index of it.
    fn kept(store: &Store, blob: &Digest) -> Result<Option<Self>, StoreError> {
        let bytes = store.index(blob)?.unwrap_or_default();
        let Some((&mark, encoded)) = bytes.split_first() else {
            return Ok(None);
        };
        let Some(maker) = Maker::of(mark) else {
            return Ok(None);
        };
        let encoded = match maker {
            Maker::Found => encoded.get(32..).unwrap_or_default(),
            _ => encoded,
        };
        let index = LayerIndex::decode(encoded).ok();
        let index = index.filter(|index| index.blob == *blob);
        Ok(index.map(|index| Self {
            index: Arc::new(index),
            maker,
        }))
    }

    /// What stands before it in the store, where it was found for `reference`.
    pub(super) fn mark(&self, reference: &str) -> Vec<u8> {
        let mut mark = vec![self.maker as u8];
        if self.maker == Maker::Found {
            mark.extend_from_slice(repository(reference).as_bytes());
        }
        mark
    }

    /// Whether both cannot be true.
    pub(super) fn contradicts(&self, other: &Self) -> bool {
        let is_table = |known: &Self| matches!(known.maker, Maker::Table | Maker::CheckedTable);
        match (is_table(self), is_table(other)) {
            (true, _) => toc::difference(&self.index, &other.index).is_some(),
            (false, true) => toc::difference(&other.index, &self.index).is_some(),
            (false, false) => !self.index.agrees_with(&other.index),
        }
    }

    /// What it says otherwise than the layer, of which unpacking gave `own`.
    pub(super) fn refuted_by(&self, own: &LayerIndex) -> Option<String> {
        match self.maker {
            Maker::Own | Maker::CheckedTable => None,
            Maker::Table => toc::difference(&self.index, own)
                .map(|what| format!("its table of contents describes something else: {what}")),
            Maker::Found => (!self.index.agrees_with(own)).then(|| {
                "the index that was found beside the image describes something else".to_owned()
            }),
        }
    }
}

/// Whether an artifact is known by an index that nobody here has checked yet.
///
/// # Errors
/// What the store says.
pub(in crate::node) fn waits_for_a_check(
    store: &Store,
    artifact: &Artifact,
) -> Result<bool, StoreError> {
    let mut blobs = layers_of(&artifact.objects);
    // Some have no files.
    if let Some(image) = store.image(&artifact.reference)? {
        blobs.extend(image.layers.iter().map(|layer| layer.blob));
    }
    for blob in blobs {
        let mark = store.index_mark(&blob)?;
        if mark.is_some_and(|mark| !Maker::of(mark).is_some_and(Maker::is_checked)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether these layers were unpacked here.
///
/// # Errors
/// What the store says.
pub(super) fn were_unpacked(store: &Store, layers: &[ImageLayer]) -> Result<bool, StoreError> {
    for layer in layers {
        let mark = store.index_mark(&layer.blob)?.and_then(Maker::of);
        if !mark.is_some_and(Maker::is_checked) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What an index that was found beside an image is good for: images of the same repository.
pub(super) fn repository(reference: &str) -> Digest {
    let name = match reference.parse() {
        Ok(Reference {
            locator: Locator::Oci(oci),
            ..
        }) => format!("{}/{}", oci.registry, oci.repository),
        _ => reference.to_owned(),
    };
    Digest::of(name.as_bytes())
}

/// A layer that unpacks to something else than the image says.
pub(super) fn refuted(reference: &str, layer: &Layer, found: &Digest) -> NodeError {
    let why = match layer.diff_id {
        Some(said) => format!("it unpacks to {found}, the image's configuration says {said}"),
        None => format!("it unpacks to {found}"),
    };
    NodeError::Image {
        reference: reference.to_owned(),
        source: ImageError::corrupt(why).in_layer(layer.blob),
    }
}

impl Node {
    /// The indexes that the store has, kept from collection by `import`.
    pub(super) async fn known_indexes(
        &self,
        layered: &Layered,
        import: &Arc<Import>,
    ) -> Result<Vec<Option<Known>>, NodeError> {
        let blobs: Vec<Digest> = layered.layers.iter().map(|layer| layer.blob).collect();
        let import = Arc::clone(import);
        blocking(move || import.keep(&blobs)).await?;
        let mut known = Vec::with_capacity(layered.layers.len());
        for layer in &layered.layers {
            known.push(self.index_of(&layered.reference, layer).await?);
        }
        Ok(known)
    }

    /// The index of a layer of `reference` from the store; one that is damaged, or of another layer,
    /// or was found beside another image, counts as absent.
    ///
    /// # Errors
    /// What the store says; a layer that is known to have another diff id.
    pub(super) async fn index_of(
        &self,
        reference: &str,
        layer: &Layer,
    ) -> Result<Option<Known>, NodeError> {
        let (store, this) = (Arc::clone(self.store()), layer.clone());
        let (strict, home) = (self.believes_none(), repository(reference));
        let found = blocking(move || {
            let Some(bytes) = store.index(&this.blob)? else {
                return Ok(Ok(None));
            };
            Ok(read_kept(&bytes, &this, &home, strict))
        });
        found
            .await?
            .map_err(|found| refuted(reference, layer, &found))
    }

    /// Whether the index of `layer` needs no checking, or was checked by now.
    pub(super) async fn is_trusted(
        &self,
        reference: &str,
        layer: &Layer,
        known: &Known,
    ) -> Result<bool, NodeError> {
        if known.maker.is_checked() {
            return Ok(true);
        }
        let now = self.index_of(reference, layer).await?;
        Ok(now.is_some_and(|now| match now.maker {
            Maker::Own => known.refuted_by(&now.index).is_none(),
            Maker::CheckedTable => now.index.agrees_with(&known.index),
            Maker::Table | Maker::Found => false,
        }))
    }

    /// What `layer` of `reference` unpacks to is `found`, and not what was said: forgets all that was
    /// built on that, and writes it down. An index that says so stays.
    pub(super) async fn keep_refuted(
        &self,
        reference: &str,
        layer: &Layer,
        found: Digest,
    ) -> Result<(), NodeError> {
        let (store, reference, blob) = (Arc::clone(self.store()), reference.to_owned(), layer.blob);
        if !store.writable() {
            return Ok(());
        }
        let kept = blocking(move || {
            forget_liars(&store, &blob, &found)?;
            // A part of an image has no record of its layers.
            if store.image(&reference)?.is_none() {
                store.forget_resolution(&reference)?;
            }
            match Known::kept(&store, &blob)? {
                Some(kept) if kept.index.diff_id == found => Ok(()),
                _ => store.put_index(&blob, &[&[REFUTED][..], found.as_bytes()].concat()),
            }
        });
        Ok(kept.await?)
    }

    /// Puts an index of a layer of `reference` into the store that unpacking it gave, or has shown to be true.
    pub(super) async fn keep_checked_index(
        &self,
        reference: &str,
        known: &Known,
    ) -> Result<(), NodeError> {
        let (store, known_here) = (Arc::clone(self.store()), known.clone());
        if store.writable() {
            blocking(move || {
                let LayerIndex { blob, diff_id, .. } = &*known_here.index;
                let mark = store.index_mark(blob)?.and_then(Maker::of);
                if mark.is_none_or(Maker::is_checked) {
                    return Ok(());
                }
                forget_liars(&store, blob, diff_id)?;
                match Known::kept(&store, blob)? {
                    Some(kept) if !kept.contradicts(&known_here) => Ok(()),
                    _ => forget_parts(&store, blob),
                }
            })
            .await?;
        }
        self.keep_index(reference, known).await
    }

    /// Puts an index of a layer of `reference` into the store.
    async fn keep_index(&self, reference: &str, known: &Known) -> Result<(), NodeError> {
        let (store, index) = (Arc::clone(self.store()), Arc::clone(&known.index));
        let mut bytes = known.mark(reference);
        bytes.extend(known.index.encode().map_err(|source| NodeError::Image {
            reference: format!("the index of layer {}", index.blob),
            source,
        })?);
        let kept = blocking(move || store.put_index(&index.blob, &bytes));
        match kept.await {
            // It serves this process all the same.
            Err(error)
                if matches!(
                    error.kind(),
                    StoreErrorKind::NoSpace | StoreErrorKind::ReadOnly
                ) =>
            {
                tracing::warn!(%error, "the index of a layer could not be kept");
                Ok(())
            }
            other => Ok(other?),
        }
    }

    /// Looks for the missing indexes in the registry. What cannot be found, or used, is left out.
    pub(super) async fn find_indexes(
        &self,
        layered: &Layered,
        origin: &Arc<dyn Source>,
        known: &mut [Option<Known>],
    ) -> Result<(), NodeError> {
        if self.believes_none() || known.iter().all(Option::is_some) {
            return Ok(());
        }
        let attached = origin.attached(&layered.manifest, ARTIFACT_TYPE);
        let attached = patiently(self.patience().min(BESIDE), attached);
        let beside: Vec<Layer> = match attached.await {
            Ok(beside) => beside.into_iter().flat_map(|one| one.blobs).collect(),
            Err(error) => {
                tracing::warn!(%error, "could not look for an index beside the image");
                Vec::new()
            }
        };
        for (layer, known) in layered.layers.iter().zip(known) {
            if known.is_some() || layer.as_file.is_some() {
                continue;
            }
            let (store, blob) = (Arc::clone(self.store()), layer.blob);
            let kept = blocking(move || Known::kept(&store, &blob)).await?;
            if let (Some(kept), Some(said)) = (&kept, layer.diff_id)
                && kept.index.diff_id != said
            {
                // One of the two images lies: unpacking the layer shows which.
                let image = &layered.reference;
                tracing::warn!(image, layer = %layer.blob, "what it unpacks to is disputed: no index of it is used");
                continue;
            }
            let blob = beside.iter().find(|blob| {
                let of = blob.annotations.get(LAYER_ANNOTATION);
                blob.media_type == INDEX_MEDIA_TYPE
                    && of.is_some_and(|of| *of == layer.blob.to_string())
            });
            let found = match (blob, layer.diff_id) {
                (Some(blob), _) => {
                    let index = asked(|| read_index(origin, blob, layer)).await;
                    index.map(|index| Some((index, Maker::Found)))
                }
                (None, Some(diff_id)) => {
                    let layer = TocLayer {
                        blob: layer.blob,
                        size: layer.size,
                        diff_id,
                        annotations: &layer.annotations,
                    };
                    let toc = asked(|| layer.fetch(&**origin)).await;
                    toc.map(|toc| toc.map(|toc| (toc.index, Maker::Table)))
                }
                (None, None) => Ok(None),
            };
            match found {
                Ok(Some((index, maker))) => {
                    let found = Known {
                        index: Arc::new(index),
                        maker,
                    };
                    if kept.is_some_and(|kept| kept.contradicts(&found)) {
                        let (store, blob) = (Arc::clone(self.store()), layer.blob);
                        if store.writable() {
                            blocking(move || forget_parts(&store, &blob)).await?;
                        }
                    }
                    self.keep_index(&layered.reference, &found).await?;
                    *known = Some(found);
                }
                Ok(None) => {}
                Err(error) => {
                    let image = &layered.reference;
                    tracing::warn!(image, layer = %layer.blob, %error, "an index cannot be used");
                }
            }
        }
        self.keep_found_profile(&layered.manifest, &beside, origin)
            .await
    }

    pub(super) fn believes_none(&self) -> bool {
        self.engine.config().verify == VerifyPolicy::Strict
    }
}

/// Reads the index of `layer` from the registry.
async fn read_index(
    origin: &Arc<dyn Source>,
    blob: &Layer,
    layer: &Layer,
) -> Result<LayerIndex, SourceError> {
    let invalid = |why: String| {
        let what = format!("index {} of layer {}", blob.blob, layer.blob);
        SourceError::new(SourceErrorKind::Invalid, what, why)
    };
    if blob.size > MAX_INDEX {
        return Err(invalid(format!("it has {} bytes", blob.size)));
    }
    let location = Location {
        path: blob.blob.to_string(),
        generation: None,
        offset: 0,
    };
    let mut body = origin.read(&location, 0..blob.size).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = body.next().await {
        bytes.extend_from_slice(&piece?);
    }
    if Digest::of(&bytes) != blob.blob {
        return Err(invalid("it has another digest".into()));
    }
    let layer = layer.clone();
    joined(tokio::task::spawn_blocking(move || usable(&bytes, &layer)))
        .await
        .map_err(|error| invalid(error.to_string()))
}

/// The index of `layer` from what is kept of it, for an image of the repository `home`; the error
/// is its diff id, where that is known to be another.
pub(super) fn read_kept(
    bytes: &[u8],
    layer: &Layer,
    home: &Digest,
    strict: bool,
) -> Result<Option<Known>, Digest> {
    let Some((&mark, encoded)) = bytes.split_first() else {
        return Ok(None);
    };
    if mark == REFUTED {
        let found = <[u8; 32]>::try_from(encoded).map(Digest::from_bytes);
        return match (found, layer.diff_id) {
            (Ok(found), Some(said)) if found != said => Err(found),
            _ => Ok(None),
        };
    }
    let maker = Maker::of(mark).filter(|maker| maker.is_checked() || !strict);
    let (maker, encoded) = match (maker, encoded.split_at_checked(32)) {
        (Some(Maker::Found), Some((of, encoded))) if of == home.as_bytes() => {
            (Maker::Found, encoded)
        }
        (Some(Maker::Found) | None, _) => return Ok(None),
        (Some(maker), _) => (maker, encoded),
    };
    let index = LayerIndex::decode(encoded).and_then(|index| {
        index.belongs_to(&layer.blob, layer.size)?;
        Ok(index)
    });
    match (index, layer.diff_id) {
        (Ok(index), Some(said)) if index.diff_id != said => match maker.is_checked() {
            true => Err(index.diff_id),
            false => Ok(None),
        },
        (Ok(index), _) => Ok(Some(Known {
            index: Arc::new(index),
            maker,
        })),
        (Err(error), _) => {
            tracing::warn!(%error, "the stored index counts as absent");
            Ok(None)
        }
    }
}

/// Forgets the images that say of a layer that it unpacks to something else than `diff_id`.
fn forget_liars(store: &Store, blob: &Digest, diff_id: &Digest) -> Result<(), StoreError> {
    for image in store.images()? {
        let lies =
            (image.layers.iter()).any(|layer| layer.blob == *blob && layer.diff_id != *diff_id);
        if lies {
            store.forget_resolution(&image.reference)?;
        }
    }
    Ok(())
}

/// Forgets what was made of the index of a layer that another contradicts, but for whole images: a look at the record of
/// one shows whether it is what the indexes say by now.
fn forget_parts(store: &Store, blob: &Digest) -> Result<(), StoreError> {
    for record in store.records()? {
        let reference = &record.reference;
        if store.image(reference)?.is_none()
            && let Some((_, artifact)) = store.artifact(reference)?
            && layers_of(&artifact.objects).contains(blob)
        {
            store.forget_resolution(reference)?;
        }
    }
    Ok(())
}

fn usable(encoded: &[u8], layer: &Layer) -> Result<LayerIndex, ImageError> {
    let index = LayerIndex::decode(encoded)?;
    index.belongs_to(&layer.blob, layer.size)?;
    // Chain ids are made of it: a wrong one would stand in for the layers of another image.
    match layer.diff_id {
        Some(diff_id) if diff_id != index.diff_id => {
            let found = index.diff_id;
            let why = format!("its index is of {found}, the image's configuration says {diff_id}");
            Err(ImageError::corrupt(why).in_layer(layer.blob))
        }
        _ => Ok(index),
    }
}
