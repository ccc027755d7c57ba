//! Manifests, indexes and configurations of registries as they lie there, kept as objects.

use std::sync::Arc;

use bytes::Bytes;

use super::{Node, NodeError, blocking};
use crate::{
    digest::{Digest, ObjectId},
    reference::Reference,
    source::{ManifestBytes, Source},
    store::StoreErrorKind,
};

/// Largest document kept, in bytes (the limit that registries have for manifests, twice).
const MAX_DOCUMENT: u64 = 8 << 20;

impl Node {
    /// Keeps an image's manifest and configuration, so that it can be run with its registry down.
    pub(super) async fn keep_documents(
        &self,
        manifest: &Digest,
        config: &Digest,
        origin: &Arc<dyn Source>,
    ) -> Result<(), NodeError> {
        for digest in [manifest, config] {
            if self.stored_document(digest).await?.is_some() {
                continue;
            }
            let found = match digest == manifest {
                true => origin.manifest(&digest.to_string()).await.map(|m| m.bytes),
                false => origin.small_blob(digest, MAX_DOCUMENT).await,
            };
            match found {
                Ok(bytes) => {
                    self.keep_document(*digest, Bytes::copy_from_slice(&bytes))
                        .await?
                }
                Err(error) => tracing::warn!(%error, "a document of an image could not be kept"),
            }
        }
        Ok(())
    }

    /// What is recorded of an image, whatever its registry says by now.
    pub(super) async fn recorded_manifest(
        &self,
        reference: &Reference,
    ) -> Result<Option<ManifestBytes>, NodeError> {
        let (store, name) = (Arc::clone(self.store()), reference.to_string());
        let Some(image) = blocking(move || store.image(&name)).await? else {
            return Ok(None);
        };
        let bytes = self.stored_document(&image.manifest).await?;
        Ok(bytes.map(|bytes| document(bytes, image.manifest)))
    }

    /// A document that is kept.
    pub(super) async fn stored_document(
        &self,
        digest: &Digest,
    ) -> Result<Option<Bytes>, NodeError> {
        let (store, id) = (Arc::clone(self.store()), ObjectId::Sha256(*digest));
        let read = blocking(move || {
            use std::os::unix::fs::FileExt as _;
            let Some(complete) = store.complete(&id)? else {
                return Ok(None);
            };
            if complete.size > MAX_DOCUMENT {
                return Ok(None);
            }
            let mut bytes = vec![0; complete.size as usize];
            let read = complete.file().read_exact_at(&mut bytes, 0);
            Ok(read.is_ok().then(|| Bytes::from(bytes)))
        });
        // What was damaged on the disk is asked for again.
        Ok(read.await?.filter(|bytes| Digest::of(bytes) == *digest))
    }

    /// Keeps a document, unless the disk has no room.
    pub(super) async fn keep_document(
        &self,
        digest: Digest,
        bytes: Bytes,
    ) -> Result<(), NodeError> {
        let store = Arc::clone(self.store());
        let id = ObjectId::Sha256(digest);
        match blocking(move || store.put(&[(id, bytes)])).await {
            Err(error)
                if matches!(
                    error.kind(),
                    StoreErrorKind::NoSpace | StoreErrorKind::ReadOnly
                ) =>
            {
                Ok(())
            }
            other => Ok(other.map(drop)?),
        }
    }
}

/// The document says itself what it is; where it does not, it is of the OCI kind that it looks like
/// (OCI image-spec, manifest.md, `mediaType`).
pub(super) fn document(bytes: Bytes, digest: Digest) -> ManifestBytes {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Shape {
        media_type: Option<String>,
        manifests: Option<serde::de::IgnoredAny>,
    }
    let shape: Option<Shape> = serde_json::from_slice(&bytes).ok();
    let media_type = match shape {
        Some(Shape {
            media_type: Some(media_type),
            ..
        }) => media_type,
        Some(Shape {
            manifests: Some(_), ..
        }) => "application/vnd.oci.image.index.v1+json".into(),
        _ => "application/vnd.oci.image.manifest.v1+json".into(),
    };
    ManifestBytes {
        bytes: bytes.to_vec().into(),
        digest,
        media_type,
    }
}
