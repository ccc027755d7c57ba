//! What the store knows of container images: which layers they are made of.
//!
//! ```text
//! <root>/images/<sha256 of reference>.json   the image of a reference, with a checksum
//! <root>/images/lock                         flock: held to write chains
//! <root>/chains/<hex of chain id>            names of records above, one that ends there first: a hint
//! ```
//!
//! The record of an image lives as long as the artifact record of its reference, whose name it
//! shares; without that it counts as absent. A chain file only says where to look: an image counts
//! if its layers give the chain id. So none of them can lie, and what is torn is absent. Which diff ids
//! its layers have, though, is what somebody has said of an image: `node` knows whom to believe.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use super::{Result, Store, StoreError, StoreErrorKind, batch::Batch, layout, layout::Sealed};
use crate::{
    digest::Digest,
    disk::Span,
    reference::{Locator, Reference},
};

/// Most bytes of an image record.
const MAX_RECORD: u64 = 1 << 20;
/// Images that a chain file names: base layers belong to very many, and any one is enough.
const MAX_NAMES: usize = 16;

/// An image that the store has, or is getting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRecord {
    /// The reference, as in its artifact record.
    pub reference: String,
    /// The digest of the manifest, of one platform. The document may be kept as an object.
    pub manifest: Digest,
    /// The digest of the index of several platforms that the reference named, likewise.
    pub index: Option<Digest>,
    /// The digest of the configuration, likewise.
    pub config: Digest,
    /// As in `linux/amd64`.
    pub platform: String,
    /// From the bottom up.
    pub layers: Vec<ImageLayer>,
    /// When this was found out; stored in milliseconds.
    pub made: SystemTime,
}

/// A layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLayer {
    /// The digest of the layer as it lies in the registry.
    pub blob: Digest,
    /// Bytes of the layer as it lies in the registry.
    pub size: u64,
    /// Its media type in the manifest.
    pub media_type: String,
    /// The digest of the decoded layer.
    pub diff_id: Digest,
}

impl ImageRecord {
    /// Whether this is the same image, whenever it was found out.
    fn is_the_same(&self, other: &Self) -> bool {
        let made = self.made;
        *self
            == Self {
                made,
                ..other.clone()
            }
    }

    /// The chain ids of its layers, from the bottom up (OCI image-spec, config.md, "Layer ChainID").
    pub fn chain_ids(&self) -> Vec<Digest> {
        let mut chains: Vec<Digest> = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            chains.push(match chains.last() {
                None => layer.diff_id,
                Some(below) => Digest::of(format!("{below} {}", layer.diff_id).as_bytes()),
            });
        }
        chains
    }

    /// The documents of its registry that say what it is: its manifest, its configuration, and the index of
    /// several platforms that its reference named.
    pub fn documents(&self) -> impl Iterator<Item = Digest> + use<> {
        let manifest = self.manifest;
        let reference: Option<Reference> = self.reference.parse().ok();
        let named: Option<Digest> = reference.and_then(|reference| match reference.locator {
            Locator::Oci(oci) => oci.digest?.parse().ok(),
            _ => None,
        });
        let named = self.index.or(named).filter(|named| *named != manifest);
        [manifest, self.config].into_iter().chain(named)
    }

    /// How many of its lowest layers have this chain id together.
    pub fn layers_of(&self, chain: &Digest) -> Option<usize> {
        let at = self.chain_ids().iter().position(|id| id == chain);
        at.map(|at| at + 1)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OnDisk {
    reference: String,
    manifest: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    index: Option<String>,
    config: String,
    platform: String,
    layers: Vec<LayerOnDisk>,
    /// Milliseconds since the epoch.
    made_at: u64,
    checksum: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayerOnDisk {
    blob: String,
    size: u64,
    media_type: String,
    diff_id: String,
}

/// What was found where an image record may be.
pub(super) enum ImageState {
    Here(ImageRecord),
    /// There is none, or no artifact of its reference.
    Absent,
    Damaged,
}

impl ImageState {
    fn here(self) -> Option<ImageRecord> {
        match self {
            Self::Here(image) => Some(image),
            Self::Absent | Self::Damaged => None,
        }
    }
}

impl Sealed for OnDisk {
    fn checksum(&mut self) -> &mut String {
        &mut self.checksum
    }
}

impl OnDisk {
    fn of(image: &ImageRecord) -> Self {
        let layers = image.layers.iter().map(|layer| LayerOnDisk {
            blob: layer.blob.to_string(),
            size: layer.size,
            media_type: layer.media_type.clone(),
            diff_id: layer.diff_id.to_string(),
        });
        Self {
            reference: image.reference.clone(),
            manifest: image.manifest.to_string(),
            index: image.index.map(|index| index.to_string()),
            config: image.config.to_string(),
            platform: image.platform.clone(),
            layers: layers.collect(),
            made_at: layout::to_millis(image.made),
            checksum: String::new(),
        }
    }

    fn image(self) -> Option<ImageRecord> {
        let layers = self.layers.into_iter().map(|layer| {
            Some(ImageLayer {
                blob: layer.blob.parse().ok()?,
                size: layer.size,
                media_type: layer.media_type,
                diff_id: layer.diff_id.parse().ok()?,
            })
        });
        Some(ImageRecord {
            layers: layers.collect::<Option<_>>()?,
            reference: self.reference,
            manifest: self.manifest.parse().ok()?,
            index: match self.index {
                Some(index) => Some(index.parse().ok()?),
                None => None,
            },
            config: self.config.parse().ok()?,
            platform: self.platform,
            made: layout::from_millis(self.made_at),
        })
    }
}

impl Store {
    pub(super) fn image_path(&self, reference: &str) -> PathBuf {
        let name = Digest::of(reference.as_bytes()).hex();
        self.root.join(format!("images/{name}.json"))
    }

    pub(super) fn chain_path(&self, chain: &Digest) -> PathBuf {
        self.root.join("chains").join(chain.hex())
    }

    /// Durably records the image of a reference, in place of an earlier one, so that it is found
    /// by the reference and by the chain id of each of its layers. Its artifact comes first.
    ///
    /// # Errors
    /// [`StoreErrorKind::NotFound`] where the reference is not recorded as an artifact,
    /// [`StoreErrorKind::Invalid`] for a record that is too long, [`StoreErrorKind::NoSpace`],
    /// [`StoreErrorKind::ReadOnly`], and what the disk says.
    pub fn record_image(&self, image: &ImageRecord) -> Result<()> {
        self.need_writable()?;
        let reference = &image.reference;
        let json = layout::seal(OnDisk::of(image))?;
        if json.len() as u64 > MAX_RECORD {
            let message = format!("the record of image {reference} is too long");
            return Err(StoreError::new(StoreErrorKind::Invalid, message));
        }
        let path = self.image_path(reference);
        let lock = path.with_file_name("lock");
        let _records = self.lock_records(Span::Shared)?;
        if self.disk.stat(&self.record_path(reference))?.is_none() {
            // What a tier has is recorded there.
            let there = self.on_tiers(|tier| tier.store.image(reference));
            if there.is_some_and(|there| there.is_the_same(image)) {
                return Ok(());
            }
            if !self.adopt_record(reference)? {
                let message = format!("image {reference} has no artifact in the store");
                return Err(StoreError::new(StoreErrorKind::NotFound, message));
            }
        }
        self.make_parent(&lock)?;
        let _chains = self.lock(&lock, Span::Exclusive)?;
        let mut batch = Batch::new(self);
        let own = Digest::of(reference.as_bytes());
        let chains = image.chain_ids();
        for chain in &chains {
            let path = self.chain_path(chain);
            let mut names = self.read_chain(&path)?.unwrap_or_default();
            if !names.contains(&own) {
                // An image that ends here is not displaced by those that stand on it.
                let at = usize::from(chains.last() != Some(chain));
                names.insert(at.min(names.len()), own);
                batch.add_record(chain_text(&names).as_bytes(), path)?;
            }
        }
        // Last in is first out: the image is there before anything leads to it.
        batch.add_record(&json, path)?;
        batch.publish()
    }

    /// The image of a reference. A damaged record counts as absent.
    ///
    /// # Errors
    /// What the disk says.
    pub fn image(&self, reference: &str) -> Result<Option<ImageRecord>> {
        match self.own_image(reference)? {
            Some(own) => Ok(Some(own)),
            None => Ok(self.on_tiers(|tier| tier.store.own_image(reference))),
        }
    }

    pub(super) fn own_image(&self, reference: &str) -> Result<Option<ImageRecord>> {
        Ok(self.read_image(&self.image_path(reference))?.here())
    }

    /// All images, by reference. Damaged records are left out.
    ///
    /// # Errors
    /// What the disk says.
    pub fn images(&self) -> Result<Vec<ImageRecord>> {
        let mut images = Vec::new();
        for path in self.image_paths()? {
            images.extend(self.read_image(&path)?.here());
        }
        for tier in &self.usable_tiers() {
            for image in tier.or_nothing(tier.store.images()) {
                if images
                    .iter()
                    .all(|known| known.reference != image.reference)
                {
                    images.push(image);
                }
            }
        }
        images.sort_by(|a, b| a.reference.cmp(&b.reference));
        Ok(images)
    }

    /// An image whose lowest `n` layers have this chain id, and `n`: one that has no more layers, if there is one, since
    /// only that is recorded as it is to be shown. Reads a few small files, however many images there are.
    ///
    /// # Errors
    /// What the disk says.
    pub fn image_by_chain(&self, chain: &Digest) -> Result<Option<(ImageRecord, usize)>> {
        Ok(self.images_by_chain(chain)?.into_iter().next())
    }

    /// As [`Store::image_by_chain`], several of them, those of tiers last. Whether
    /// an image has layers of these diff ids is for the caller to know: its configuration says so.
    ///
    /// # Errors
    /// What the disk says.
    pub fn images_by_chain(&self, chain: &Digest) -> Result<Vec<(ImageRecord, usize)>> {
        let names = self.read_chain(&self.chain_path(chain))?;
        let mut images = Vec::new();
        for name in names.into_iter().flatten().take(MAX_NAMES) {
            let path = self.root.join(format!("images/{}.json", name.hex()));
            if let Some(image) = self.read_image(&path)?.here()
                && let Some(count) = image.layers_of(chain)
            {
                images.push((image, count));
            }
        }
        images.sort_by_key(|(image, count)| *count != image.layers.len());
        for tier in &self.usable_tiers() {
            images.extend(tier.or_nothing(tier.store.images_by_chain(chain)));
        }
        Ok(images)
    }

    /// The paths of all image records.
    pub(super) fn image_paths(&self) -> Result<Vec<PathBuf>> {
        let dir = self.root.join("images");
        let names = self.disk.list(&dir)?.into_iter();
        let paths = names.map(|name| dir.join(name));
        Ok(paths
            .filter(|path| path.extension().is_some_and(|e| e == "json"))
            .collect())
    }

    fn kept_image_path(&self, generation: &Digest) -> PathBuf {
        self.root.join(format!("roots/{}.image", generation.hex()))
    }

    /// Keeps what is recorded of the image `reference` for a generation of it that is held, of the manifest
    /// `revision`, whatever the reference means later; false where it means something else already.
    ///
    /// # Errors
    /// What the disk says.
    pub fn keep_image(&self, generation: &Digest, reference: &str, revision: &str) -> Result<bool> {
        let kept = self.kept_image_path(generation);
        let _records = self.lock_records(Span::Shared)?;
        let recorded = self.own_image(reference)?;
        if recorded.is_none_or(|image| image.manifest.to_string() != revision) {
            return Ok(self.disk.stat(&kept)?.is_some());
        }
        self.disk.unlink(&kept)?;
        self.disk.link(&self.image_path(reference), &kept)?;
        Ok(true)
    }

    /// The image that is kept for a generation. A damaged record counts as absent.
    ///
    /// # Errors
    /// What the disk says.
    pub fn kept_image(&self, generation: &Digest) -> Result<Option<ImageRecord>> {
        match self.read_small(&self.kept_image_path(generation), MAX_RECORD) {
            Ok(bytes) => {
                let kept = layout::unseal::<OnDisk>(&bytes.unwrap_or_default())?;
                Ok(kept.and_then(OnDisk::image))
            }
            Err(error) if error.kind() == StoreErrorKind::Damaged => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads an image record.
    pub(super) fn read_image(&self, path: &Path) -> Result<ImageState> {
        let bytes = match self.read_small(path, MAX_RECORD) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(ImageState::Absent),
            Err(error) if error.kind() == StoreErrorKind::Damaged => Vec::new(),
            Err(error) => return Err(error),
        };
        let image = layout::unseal::<OnDisk>(&bytes)?.and_then(OnDisk::image);
        let Some(image) = image.filter(|image| self.image_path(&image.reference) == path) else {
            tracing::warn!(path = %path.display(), "damaged image record: it counts as absent");
            return Ok(ImageState::Damaged);
        };
        Ok(match self.disk.stat(&self.record_path(&image.reference))? {
            Some(_) => ImageState::Here(image),
            None => ImageState::Absent,
        })
    }

    /// Reads a chain file: names of image records; none where it is missing. What is torn in it
    /// is left out.
    pub(super) fn read_chain(&self, path: &Path) -> Result<Option<Vec<Digest>>> {
        let bytes = match self.read_small(path, 1 << 16) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == StoreErrorKind::Damaged => Vec::new(),
            Err(error) => return Err(error),
        };
        let text = String::from_utf8_lossy(&bytes);
        Ok(Some(
            text.lines()
                .filter_map(|line| Digest::from_hex(line).ok())
                .collect(),
        ))
    }

    /// The names of the records of images in the store by the chains that lead there, in an order that is
    /// always the same: those that end there come first.
    pub(super) fn images_of_chains(&self) -> Result<HashMap<Digest, Vec<Digest>>> {
        let mut chains: HashMap<Digest, Vec<(bool, Digest)>> = HashMap::new();
        for path in self.image_paths()? {
            if let Some(image) = self.read_image(&path)?.here() {
                let name = Digest::of(image.reference.as_bytes());
                let ids = image.chain_ids();
                for chain in &ids {
                    let goes_on = ids.last() != Some(chain);
                    chains.entry(*chain).or_default().push((goes_on, name));
                }
            }
        }
        let in_order = |mut names: Vec<(bool, Digest)>| {
            names.sort_by_key(|(goes_on, name)| (*goes_on, name.hex()));
            names.into_iter().map(|(_, name)| name).collect()
        };
        Ok(chains
            .into_iter()
            .map(|(chain, names)| (chain, in_order(names)))
            .collect())
    }

    /// Writes all chain files anew: in which order images were recorded does not show in them.
    pub(super) fn sort_chains(&self) -> Result<()> {
        for (chain, names) in self.images_of_chains()? {
            let path = self.chain_path(&chain);
            let text = chain_text(&names);
            if self.read_small(&path, 1 << 16)?.as_deref() != Some(text.as_bytes()) {
                self.write_durably(&path, text.as_bytes())?;
            }
        }
        Ok(())
    }

    /// Leaves in a chain file only names of `images`; removes it where there are none.
    pub(super) fn prune_chain(
        &self,
        path: &Path,
        images: &[Digest],
        dry_run: bool,
    ) -> Result<bool> {
        if images.is_empty() {
            return Ok(dry_run || self.disk.unlink(path)?);
        }
        let names = self.read_chain(path)?.unwrap_or_default();
        let stale = names.iter().any(|name| !images.contains(name));
        if (stale || names.is_empty()) && !dry_run {
            self.write_durably(path, chain_text(images).as_bytes())?;
        }
        Ok(false)
    }
}

fn chain_text(names: &[Digest]) -> String {
    let lines = names.iter().take(MAX_NAMES).map(|name| name.hex() + "\n");
    lines.collect()
}
