//! Indexes of layers: opaque bytes, named by the digest of the layer as it lies in the registry. The
//! access profile of an image is one more, named by the digest of its manifest.
//!
//! An index stands behind a header of its own: magic, SHA-256 over name and bytes. One that does
//! not fit it counts as absent. It lives as long as an artifact whose objects are made from its
//! layer, an image with that layer, or an import that keeps it.
//!
//! Of a layer that several images have, the index of one takes the place of that of another. So a
//! mounted generation of an image has those by which it is read kept beside its root, with the
//! image's record: `roots/<generation>.<layer>.index` and `roots/<generation>.image`, hard links as a
//! rule. They go with the generation, and need not survive a power failure: no mount does.

use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::{Result, Store, StoreError, StoreErrorKind};
use crate::{
    digest::Digest,
    disk::{Open, Span},
    tree::Object,
};

/// Most bytes of an index.
pub const MAX_INDEX: u64 = 256 << 20;

const MAGIC: &[u8; 8] = b"hrthindx";
const HEADER: usize = MAGIC.len() + 32;

/// The header of a stored index, which has a digest of it, and its first byte, which says who made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexSeal {
    header: [u8; HEADER],
    pub mark: u8,
}

impl Store {
    pub(super) fn index_path(&self, layer: &Digest) -> PathBuf {
        self.root.join("indexes").join(layer.hex())
    }

    /// Durably stores the index of a layer, in place of one that is there.
    ///
    /// # Errors
    /// [`StoreErrorKind::Invalid`] for more than [`MAX_INDEX`] bytes, [`StoreErrorKind::NoSpace`],
    /// [`StoreErrorKind::ReadOnly`], and what the disk says.
    pub fn put_index(&self, layer: &Digest, bytes: &[u8]) -> Result<()> {
        self.write_index(self.index_path(layer), layer, bytes)
    }

    fn write_index(&self, path: PathBuf, layer: &Digest, bytes: &[u8]) -> Result<()> {
        self.need_writable()?;
        if bytes.len() as u64 > MAX_INDEX {
            let message = format!(
                "the index of layer {layer} takes {} bytes: too many",
                bytes.len()
            );
            return Err(StoreError::new(StoreErrorKind::Invalid, message));
        }
        let mut file = Vec::with_capacity(HEADER + bytes.len());
        file.extend_from_slice(MAGIC);
        file.extend_from_slice(checksum(layer, bytes).as_bytes());
        file.extend_from_slice(bytes);
        let _records = self.lock_records(Span::Shared)?;
        self.make_parent(&path)?;
        self.write_durably(&path, &file)
    }

    /// The index of a layer. A damaged one counts as absent.
    ///
    /// # Errors
    /// What the disk says.
    pub fn index(&self, layer: &Digest) -> Result<Option<Vec<u8>>> {
        match self.own_index(layer)? {
            Some(own) => Ok(Some(own)),
            None => Ok(self.on_tiers(|tier| tier.store.own_index(layer))),
        }
    }

    /// The index of a layer in the store itself.
    pub(super) fn own_index(&self, layer: &Digest) -> Result<Option<Vec<u8>>> {
        self.read_index(self.index_path(layer), layer)
    }

    fn read_index(&self, path: PathBuf, layer: &Digest) -> Result<Option<Vec<u8>>> {
        let mut bytes = match self.read_small(&path, MAX_INDEX + HEADER as u64) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == StoreErrorKind::Damaged => Vec::new(),
            Err(error) => return Err(error),
        };
        let good = bytes.split_at_checked(HEADER).is_some_and(|(head, body)| {
            head[..MAGIC.len()] == MAGIC[..]
                && head[MAGIC.len()..] == checksum(layer, body).as_bytes()[..]
        });
        if !good {
            tracing::warn!(path = %path.display(), "damaged index of a layer: it counts as absent");
            return Ok(None);
        }
        bytes.drain(..HEADER);
        Ok(Some(bytes))
    }

    /// Whether there is an index of this layer; it may be damaged.
    ///
    /// # Errors
    /// What the disk says.
    pub fn has_index(&self, layer: &Digest) -> Result<bool> {
        let has = |store: &Store| Ok(store.disk.stat(&store.index_path(layer))?.map(drop));
        Ok(has(self)?
            .or_else(|| self.on_tiers(|tier| has(&tier.store)))
            .is_some())
    }

    /// The first byte of the index of a layer, which says who made it; not checked.
    ///
    /// # Errors
    /// What the disk says.
    pub fn index_mark(&self, layer: &Digest) -> Result<Option<u8>> {
        Ok(self.index_seal(layer)?.map(|seal| seal.mark))
    }

    /// What tells the index of a layer from any other that takes its place; not checked.
    ///
    /// # Errors
    /// What the disk says.
    pub fn index_seal(&self, layer: &Digest) -> Result<Option<IndexSeal>> {
        match self.own_index_seal(layer)? {
            Some(own) => Ok(Some(own)),
            None => Ok(self.on_tiers(|tier| tier.store.own_index_seal(layer))),
        }
    }

    fn own_index_seal(&self, layer: &Digest) -> Result<Option<IndexSeal>> {
        let begin = self.begin_of_index(&self.index_path(layer), 1)?;
        Ok(begin.and_then(|(header, begin)| {
            let mark = *begin.first()?;
            Some(IndexSeal { header, mark })
        }))
    }

    /// The header of an index and its first `len` bytes, not checked; `None` where there are not so many.
    fn begin_of_index(&self, path: &Path, len: usize) -> Result<Option<([u8; HEADER], Vec<u8>)>> {
        let (mut header, mut begin) = ([0; HEADER], vec![0; len]);
        match self.disk.open(path, Open::Read) {
            Ok(file) if file.stat()?.len >= (HEADER + len) as u64 => {
                file.read_at(&mut header, 0)?;
                file.read_at(&mut begin, HEADER as u64)?;
                Ok(Some((header, begin)))
            }
            Ok(_) => Ok(None),
            Err(error) if error.errno() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn kept_index_path(&self, generation: &Digest, layer: &Digest) -> PathBuf {
        let (generation, layer) = (generation.hex(), layer.hex());
        self.root.join(format!("roots/{generation}.{layer}.index"))
    }

    /// Keeps the index of a layer for a generation that is held, whatever takes its place for the layer; false
    /// where what is stored does not begin with `mark`. One that only a tier has stays there.
    ///
    /// # Errors
    /// What the disk says.
    pub fn keep_index(&self, generation: &Digest, layer: &Digest, mark: &[u8]) -> Result<bool> {
        let kept = self.kept_index_path(generation, layer);
        let is_it = |path: &Path| {
            let begin = self.begin_of_index(path, mark.len())?;
            Ok::<_, StoreError>(begin.is_some_and(|(_, begin)| begin == mark))
        };
        let _records = self.lock_records(Span::Shared)?;
        if is_it(&kept)? {
            return Ok(true);
        }
        let stored = self.index_path(layer);
        if self.disk.stat(&stored)?.is_none() {
            return Ok(true);
        }
        self.disk.unlink(&kept)?;
        self.disk.link(&stored, &kept)?;
        is_it(&kept)
    }

    /// As [`Store::keep_index`], of one that is not stored.
    ///
    /// # Errors
    /// As [`Store::put_index`].
    pub fn put_kept_index(&self, generation: &Digest, layer: &Digest, bytes: &[u8]) -> Result<()> {
        self.write_index(self.kept_index_path(generation, layer), layer, bytes)
    }

    /// The index of a layer that is kept for a generation. A damaged one counts as absent.
    ///
    /// # Errors
    /// What the disk says.
    pub fn kept_index(&self, generation: &Digest, layer: &Digest) -> Result<Option<Vec<u8>>> {
        self.read_index(self.kept_index_path(generation, layer), layer)
    }

    /// Removes the index of a layer; false where there was none.
    ///
    /// # Errors
    /// [`StoreErrorKind::ReadOnly`] and what the disk says.
    pub fn remove_index(&self, layer: &Digest) -> Result<bool> {
        self.need_writable()?;
        let path = self.index_path(layer);
        let removed = self.disk.unlink(&path)?;
        if removed {
            self.disk.sync_dir(&self.root.join("indexes"))?;
        }
        Ok(removed)
    }
}

/// Over the name too: an index must not pass for that of another layer.
fn checksum(layer: &Digest, bytes: &[u8]) -> Digest {
    let mut hasher = Sha256::new();
    hasher.update(layer.as_bytes());
    hasher.update(bytes);
    Digest::from_bytes(hasher.finalize().into())
}

/// The layers that objects are made from: their locations are `<layer digest>#…`.
pub fn layers_of(objects: &[Object]) -> std::collections::BTreeSet<Digest> {
    let mut layers = std::collections::BTreeSet::new();
    // Objects of one layer mostly follow each other.
    let mut last = "";
    for object in objects {
        let location = object.recipe.location();
        let Some((layer, _)) = location.and_then(|location| location.path.split_once('#')) else {
            continue;
        };
        if layer != last {
            layers.extend(layer.parse::<Digest>());
            last = layer;
        }
    }
    layers
}
