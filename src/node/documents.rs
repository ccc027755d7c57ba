//! Manifests and blobs of registries as they lie there, for those who pull through this node.

use std::sync::Arc;

use bytes::Bytes;

use super::{Node, NodeError, blocking, layers::blob_of};
use crate::{
    digest::{Digest, ObjectId},
    fetch::Handle,
    reference::{Filter, Locator, OciRef, Reference},
    source::{Layer, ManifestBytes, Source, SourceErrorKind},
    store::{Reservation, StoreErrorKind},
    tree::{Artifact, Tree},
};

/// Largest document kept, in bytes (the limit that registries have for manifests, twice).
const MAX_DOCUMENT: u64 = 8 << 20;

impl Node {
    /// The manifest or index that `oci` means: a digest from the store if it is there, a tag from
    /// the registry, or from what is recorded of it where that cannot be reached.
    ///
    /// # Errors
    /// What the source or the store says.
    pub async fn manifest(&self, oci: &OciRef) -> Result<ManifestBytes, NodeError> {
        let wanted: Option<Digest> = oci.wanted().parse().ok();
        if let Some(digest) = wanted
            && let Some(bytes) = self.stored_document(&digest).await?
        {
            return Ok(document(bytes, digest));
        }
        let (reference, source) = self.open_registry(oci)?;
        let failed = |source| NodeError::Resolve {
            reference: reference.to_string(),
            source,
        };
        match source.manifest(oci.wanted()).await {
            Ok(found) => {
                self.keep_document(found.digest, Bytes::copy_from_slice(&found.bytes))
                    .await?;
                Ok(found)
            }
            Err(error) => {
                let passing = matches!(
                    error.kind(),
                    SourceErrorKind::Unavailable | SourceErrorKind::Throttled
                );
                if passing && let Some(found) = self.recorded_manifest(&reference).await? {
                    tracing::warn!(%error, "the registry cannot be reached: using what is recorded");
                    return Ok(found);
                }
                Err(failed(error))
            }
        }
    }

    /// A blob, to be read as it arrives.
    ///
    /// # Errors
    /// What the source or the store says.
    pub async fn blob(&self, oci: &OciRef, digest: &Digest) -> Result<Arc<Handle>, NodeError> {
        let (reference, source) = self.open_registry(oci)?;
        let (store, id) = (Arc::clone(self.store()), ObjectId::Sha256(*digest));
        let size = match blocking(move || store.complete(&id)).await? {
            Some(complete) => complete.size,
            None => {
                let failed = |source| NodeError::Resolve {
                    reference: format!("blob {digest} of {reference}"),
                    source,
                };
                source.blob_size(digest).await.map_err(failed)?
            }
        };
        let blob = Layer {
            blob: *digest,
            size,
            media_type: String::new(),
            diff_id: None,
            annotations: Default::default(),
            as_file: None,
        };
        self.engine
            .open(&blob_of(&blob), &source)
            .map_err(|source| NodeError::Fetch {
                reference: reference.to_string(),
                source,
            })
    }

    /// Makes room for a blob that is about to be brought. `None`: there is none, and it is to be read
    /// past the disk.
    ///
    /// # Errors
    /// What the store says.
    pub async fn room_for(
        &self,
        oci: &OciRef,
        blob: &Handle,
    ) -> Result<Option<Reservation>, NodeError> {
        let reference = Reference {
            locator: Locator::Oci(oci.clone()),
            filter: Filter::default(),
        };
        let wanted = Artifact {
            reference: reference.to_string(),
            revision: String::new(),
            tree: Tree::empty(),
            objects: vec![blob.object().clone()],
        };
        match self.admit(&Arc::new(wanted)).await {
            Ok(room) => Ok(Some(room)),
            Err(NodeError::Store(error))
                if matches!(
                    error.kind(),
                    StoreErrorKind::NoSpace | StoreErrorKind::ReadOnly
                ) =>
            {
                tracing::warn!(%error, "a blob is passed on, and not kept");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

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

    fn open_registry(&self, oci: &OciRef) -> Result<(Reference, Arc<dyn Source>), NodeError> {
        let reference = Reference {
            locator: Locator::Oci(oci.clone()),
            filter: Filter::default(),
        };
        let source = self
            .sources
            .open(&reference)
            .map_err(|source| NodeError::Resolve {
                reference: reference.to_string(),
                source,
            })?;
        Ok((reference, source))
    }

    async fn recorded_manifest(
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

    async fn stored_document(&self, digest: &Digest) -> Result<Option<Bytes>, NodeError> {
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

    async fn keep_document(&self, digest: Digest, bytes: Bytes) -> Result<(), NodeError> {
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
fn document(bytes: Bytes, digest: Digest) -> ManifestBytes {
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
