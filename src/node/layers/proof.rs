//! What a fill has shown of an image.

use std::sync::Arc;

use super::{Known, Layers, Maker};
use crate::{
    digest::Digest,
    node::{Node, NodeError, Resolved, blocking},
    source::Layer,
};

impl Node {
    /// An image, or its lowest layers up to `chain`, of which [`Node::fill`] has brought all, as one of which nothing waits
    /// to be checked; `None` where the store says something else by now, be it of one layer. Cheap: no index that came of
    /// the fill is read, and none are merged.
    ///
    /// # Errors
    /// What the store says.
    pub async fn brought(
        &self,
        resolved: &Resolved,
        chain: &Digest,
    ) -> Result<Option<Resolved>, NodeError> {
        let (artifact, Some(layers)) = (&resolved.artifact, &resolved.layers) else {
            return Ok(None);
        };
        let (store, name) = (Arc::clone(self.store()), artifact.reference.clone());
        let image = blocking(move || store.image(&name)).await?;
        let is_it = image.is_some_and(|image| {
            image.manifest.to_string() == artifact.revision
                && image.layers_of(chain) == Some(layers.layers.len())
        });
        if !is_it {
            return Ok(None);
        }
        for (layer, known) in layers.layers.iter().zip(&layers.known) {
            if !self
                .is_proved(&artifact.reference, layers, layer, known)
                .await?
            {
                return Ok(None);
            }
        }
        let known = layers.known.iter().map(|known| Known {
            index: Arc::clone(&known.index),
            maker: known.maker.checked(),
        });
        Ok(Some(Resolved {
            layers: Some(Arc::new(Layers::new(
                layers.layers.clone(),
                known.collect(),
                &layers.origin,
            ))),
            ..resolved.clone()
        }))
    }

    /// Whether a layer of `reference` is what is known of it, and the store says so, too.
    async fn is_proved(
        &self,
        reference: &str,
        layers: &Layers,
        layer: &Layer,
        known: &Known,
    ) -> Result<bool, NodeError> {
        if layer.as_file.is_some() {
            return Ok(true);
        }
        let unpacked = layers.unpacked.lock().get(&layer.blob).copied();
        if unpacked.is_some() {
            let (store, blob) = (Arc::clone(self.store()), layer.blob);
            let seal = blocking(move || store.index_seal(&blob)).await?;
            let is_checked = |mark| Maker::of(mark).is_some_and(Maker::is_checked);
            if seal == unpacked && seal.is_some_and(|seal| is_checked(seal.mark)) {
                return Ok(true);
            }
        }
        if !known.maker.is_checked() {
            return self.is_trusted(reference, layer, known).await;
        }
        let now = self.index_of(reference, layer).await?;
        Ok(now.is_some_and(|now| now.maker.is_checked() && now.index.agrees_with(&known.index)))
    }
}
