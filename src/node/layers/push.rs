//! Indexes, and what a start reads, from the store to the registry.

use super::{Known, Maker, Pace, indexes, profile::PROFILE_MEDIA_TYPE};
use crate::{
    digest::Digest,
    node::{
        Node, NodeError, Progress,
        meaning::{Purpose, is_in_layers},
    },
    reference::Reference,
    source::{AttachedBlob, Attachment, Layer, SourceError, SourceErrorKind},
};

/// What was pushed beside an image.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PushedIndexes {
    /// The digest of the manifest that refers to the image.
    pub manifest: String,
    pub layers: usize,
    /// Bytes of all indexes.
    pub bytes: u64,
    /// Bytes of all layers, as they lie in the registry.
    pub image_bytes: u64,
    /// Reads in the access profile that went with them; 0 where no start was recorded here.
    pub profiled_reads: usize,
}

impl Node {
    /// Pushes the indexes of an image's layers beside it, and its access profile where a start was
    /// recorded. Layers of which this node has made none
    /// are pulled and unpacked for it.
    ///
    /// # Errors
    /// What the source or the store says; a reference that is no image.
    pub async fn push_indexes(
        &self,
        reference: &Reference,
        progress: &Progress,
    ) -> Result<PushedIndexes, NodeError> {
        let failed = |source| NodeError::Resolve {
            reference: reference.to_string(),
            source,
        };
        let purpose = Purpose::Read(progress);
        let mut resolved = self.resolve_for(reference, purpose).await?;
        // Of a model that is here nothing but its files is looked at.
        if resolved.layers.is_none() && is_in_layers(&resolved.artifact) {
            let source = self.sources.open(reference).map_err(failed)?;
            if let Some(layered) = source.layers(reference).await.map_err(failed)? {
                let again = self.resolve_layered(reference, layered, &source, purpose);
                resolved = again.await?.unwrap_or(resolved);
            }
        }
        let Some(layers) = &resolved.layers else {
            let why = "it does not lie in layers: nothing to index";
            return Err(failed(SourceError::new(
                SourceErrorKind::Invalid,
                reference.to_string(),
                why,
            )));
        };
        // A layer that carries its own table needs no index.
        let unmade: Vec<(&Layer, Option<&Known>)> = (layers.layers.iter().zip(&layers.known))
            .filter(|(_, known)| known.maker == Maker::Found)
            .map(|(layer, known)| (layer, Some(known)))
            .collect();
        if !unmade.is_empty() {
            let name = reference.to_string();
            let pulled = self.pull_within(&name, &unmade, &layers.origin, progress, Pace::Full);
            drop(pulled.await?);
        }
        let mut report = PushedIndexes {
            manifest: String::new(),
            layers: layers.layers.len(),
            bytes: 0,
            image_bytes: layers.layers.iter().map(|layer| layer.size).sum(),
            profiled_reads: 0,
        };
        let mut blobs = Vec::with_capacity(layers.layers.len());
        for layer in &layers.layers {
            // A file as it is needs none.
            if layer.as_file.is_some() {
                report.layers -= 1;
                continue;
            }
            let Some(known) = self.index_of(&reference.to_string(), layer).await? else {
                return Err(NodeError::Unknown(format!(
                    "the index of layer {}",
                    layer.blob
                )));
            };
            if known.maker != Maker::Own {
                report.layers -= 1;
                continue;
            }
            let bytes = known.index.encode().map_err(|source| NodeError::Image {
                reference: reference.to_string(),
                source,
            })?;
            report.bytes += bytes.len() as u64;
            blobs.push(AttachedBlob {
                media_type: indexes::INDEX_MEDIA_TYPE.to_owned(),
                annotations: [(indexes::LAYER_ANNOTATION.to_owned(), layer.blob.to_string())]
                    .into(),
                bytes: bytes.into(),
            });
        }
        let subject: Digest = match resolved.artifact.revision.parse() {
            Ok(subject) => subject,
            Err(_) => return Err(NodeError::Unknown(format!("the manifest of {reference}"))),
        };
        if let Some(profile) = self.profile(&subject).await? {
            let bytes = profile.encode().map_err(|source| NodeError::Image {
                reference: reference.to_string(),
                source,
            })?;
            report.profiled_reads = profile.reads.len();
            blobs.push(AttachedBlob {
                media_type: PROFILE_MEDIA_TYPE.to_owned(),
                annotations: Default::default(),
                bytes: bytes.into(),
            });
        }
        let what = Attachment {
            kind: indexes::ARTIFACT_TYPE.to_owned(),
            blobs,
            annotations: Default::default(),
        };
        let pushed = layers.origin.attach(&subject, what).await.map_err(failed)?;
        report.manifest = pushed.to_string();
        Ok(report)
    }
}
