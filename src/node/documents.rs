//! Manifests, indexes and configurations of registries as they lie there, kept as objects.

use std::sync::Arc;

use bytes::Bytes;

use super::{Node, NodeError, blocking, tenancy::is_the_nodes};
use crate::{
    digest::{Digest, ObjectId},
    reference::{Locator, Platform, Reference},
    source::{ManifestBytes, Source},
    store::{ImageRecord, Store, StoreError, StoreErrorKind},
    tree::Artifact,
};

/// Largest document kept, in bytes (the limit that registries have for manifests, twice).
const MAX_DOCUMENT: u64 = 8 << 20;

impl Node {
    /// Keeps the documents of an image, so that it can be run with its registry down.
    pub(super) async fn keep_documents(
        &self,
        image: &ImageRecord,
        origin: &Arc<dyn Source>,
    ) -> Result<(), NodeError> {
        for digest in image.documents() {
            if self.stored_document(&digest).await?.is_some() {
                continue;
            }
            let found = match digest == image.config {
                true => origin.small_blob(&digest, MAX_DOCUMENT).await,
                false => origin.manifest(&digest.to_string()).await.map(|m| m.bytes),
            };
            match found {
                Ok(bytes) => {
                    self.keep_document(digest, Bytes::copy_from_slice(&bytes))
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
        let (store, reference) = (Arc::clone(self.store()), reference.clone());
        let found = blocking(move || match store.image(&reference.to_string())? {
            None => baked_for_here(&store, &reference),
            image => Ok(image),
        });
        let Some(image) = found.await? else {
            return Ok(None);
        };
        let bytes = self.stored_document(&image.manifest).await?;
        Ok(bytes.map(|bytes| document(bytes, image.manifest)))
    }

    /// What an image is recorded as under the name of this machine's platform, or under a tag.
    pub(super) async fn recorded_for_here(
        &self,
        reference: &Reference,
    ) -> Result<Option<Arc<Artifact>>, NodeError> {
        let (store, reference) = (Arc::clone(self.store()), reference.clone());
        let image = blocking(move || baked_for_here(&store, &reference)).await?;
        match image {
            Some(image) => self.recorded(&image.reference).await,
            None => Ok(None),
        }
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

/// What is recorded of an image of the node's under another name: that of this machine's platform, which had to be said
/// where it was baked on a machine of another kind, or a tag that meant what is named by digest.
fn baked_for_here(store: &Store, reference: &Reference) -> Result<Option<ImageRecord>, StoreError> {
    let mut here = reference.clone();
    let Locator::Oci(oci) = &mut here.locator else {
        return Ok(None);
    };
    if oci.platform.is_none() {
        oci.platform = Some(Platform::here());
        let name = here.to_string();
        if let Some(image) = store.image(&name)?
            && is_the_nodes(store, &name)?
        {
            return Ok(Some(image));
        }
    }
    baked_by_tag(store, &here)
}

/// What is recorded of an image of the node's by a tag, and is named by the digest of its manifest or of its index.
fn baked_by_tag(store: &Store, reference: &Reference) -> Result<Option<ImageRecord>, StoreError> {
    let Locator::Oci(oci) = &reference.locator else {
        return Ok(None);
    };
    let wanted = oci.digest.as_ref().and_then(|digest| digest.parse().ok());
    let Some(wanted) = wanted.filter(|_: &Digest| oci.path.is_empty()) else {
        return Ok(None);
    };
    for image in store.images()? {
        let Ok(known) = image.reference.parse::<Reference>() else {
            continue;
        };
        let Locator::Oci(of) = &known.locator else {
            continue;
        };
        let is_meant = image.manifest == wanted
            || (image.index == Some(wanted) && is_for(&image, oci.platform.as_ref()));
        if is_meant
            && (&of.registry, &of.repository) == (&oci.registry, &oci.repository)
            && known.filter == reference.filter
            && is_the_nodes(store, &image.reference)?
        {
            return Ok(Some(image));
        }
    }
    Ok(None)
}

fn is_for(image: &ImageRecord, platform: Option<&Platform>) -> bool {
    let its = Platform::parse(&image.platform);
    platform.is_some_and(|wanted| {
        its.is_ok_and(|its| {
            let variant = wanted.variant.is_none() || wanted.variant == its.variant;
            variant && (&its.os, &its.arch) == (&wanted.os, &wanted.arch)
        })
    })
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
