//! Images by chain id, which is how a snapshotter names their lowest layers.

use std::sync::Arc;

use super::{indexes::were_unpacked, recorded_layer, usage};
use crate::{
    digest::Digest,
    node::{Node, NodeError, Progress, Purpose, Resolved, blocking},
    reference::Reference,
    store::ImageRecord,
};

impl Node {
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
        for (image, count) in self.images_of_chain(chain, named).await? {
            if let Some(found) = self.lowest_layers(image, count).await? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// As [`Node::image_by_chain`], of one that has to be fetched and unpacked first as far as it cannot be read
    /// otherwise any more, as it was when it was recorded.
    ///
    /// # Errors
    /// What the source or the store says.
    pub async fn mend_chain(
        &self,
        chain: &Digest,
        named: Option<&Reference>,
    ) -> Result<Option<Resolved>, NodeError> {
        let mut failed = None;
        for (image, count) in self.images_of_chain(chain, named).await? {
            let Ok(reference) = image.reference.parse() else {
                continue;
            };
            let (manifest, progress) = (image.manifest.to_string(), Progress::default());
            let purpose = Purpose::Read(&progress);
            if let Err(error) = self.resolve_at(&reference, &manifest, purpose).await {
                failed = failed.or(Some(error));
            } else if let Some(found) = self.lowest_layers(image, count).await? {
                return Ok(Some(found));
            }
        }
        failed.map_or(Ok(None), Err)
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
        let (store, name) = (Arc::clone(self.store()), image.reference.clone());
        let recorded = blocking(move || store.recorded_digest(&name)).await?;
        let indexes = self.recorded_indexes(&image, recorded.as_ref());
        let Some((layers, known)) = indexes.await? else {
            return Ok(None);
        };
        let artifact = self
            .merged(&image.reference, &image.manifest, &known)
            .await?;
        Ok(Some(self.lazy(artifact, layers, known, &origin)))
    }

    /// The records of images whose first layers have the chain id `chain`, and how many: those whose
    /// layers were unpacked here, which shows that they are those layers. After them the image called
    /// `named`, for itself: what another says of its own layers must not stand in for it.
    async fn images_of_chain(
        &self,
        chain: &Digest,
        named: Option<&Reference>,
    ) -> Result<Vec<(ImageRecord, usize)>, NodeError> {
        let (store, chain) = (Arc::clone(self.store()), *chain);
        let named = named.map(ToString::to_string);
        let found = blocking(move || {
            let mut found = Vec::new();
            for (image, count) in store.images_by_chain(&chain)? {
                if were_unpacked(&store, &image.layers[..count])? {
                    found.push((image, count));
                }
            }
            if let Some(name) = named
                && found.iter().all(|(image, _)| image.reference != name)
                && let Some(image) = store.image(&name)?
                && let Some(count) = image.layers_of(&chain)
            {
                found.push((image, count));
            }
            Ok(found)
        });
        Ok(found.await?)
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
        let images = self.images_of_chain(chain, named).await?;
        let store = Arc::clone(self.store());
        let known = blocking(move || {
            for (image, count) in images {
                let mut has_all = true;
                for layer in image.layers.iter().take(count) {
                    has_all = has_all && store.has_index(&layer.blob)?;
                }
                if has_all {
                    return Ok(Some(image.reference));
                }
            }
            Ok(None)
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
            .map(|known| usage::of(&known.index)))
    }
}
