//! What a bake needs of the node: what it will bring, room for all of it, and references as they
//! were when a lock was written.

use std::sync::Arc;

use super::{Node, NodeError, Progress, Resolved, blocking};
use crate::{
    reference::{Locator, Platform, Reference},
    source::{Layered, SourceError, SourceErrorKind},
    store::{Reservation, Store},
    tree::Artifact,
};

/// How much larger files are than the layers that they come in, at most, usually.
const UNPACKED: u64 = 3;

/// What a bake will bring of one reference.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Planned {
    pub reference: String,
    pub revision: String,
    /// Of what lies in layers, not known before it is unpacked.
    pub files: Option<u64>,
    /// Bytes of all distinct objects, or of the layers.
    pub bytes: u64,
    #[serde(skip)]
    artifact: Option<Arc<Artifact>>,
    /// Layers: digest and size.
    #[serde(skip)]
    layers: Vec<(crate::digest::Digest, u64)>,
}

impl Planned {
    /// Bytes that it will take at most, usually.
    pub fn space(&self) -> u64 {
        match self.artifact {
            Some(_) => self.bytes,
            None => self.bytes.saturating_mul(UNPACKED),
        }
    }

    /// Bytes that it will take at least: of layers none, since nothing says what they unpack to.
    pub fn at_least(&self) -> u64 {
        match self.artifact {
            Some(_) => self.bytes,
            None => 0,
        }
    }

    /// What it is, where that is known, perhaps from a record of the same generation in the store. Blocking.
    ///
    /// # Errors
    /// What the store says.
    pub fn recorded(&self, store: &Store) -> Result<Option<Arc<Artifact>>, NodeError> {
        if let Some(artifact) = &self.artifact {
            return Ok(Some(Arc::clone(artifact)));
        }
        let known = store.artifact(&self.reference)?;
        let same = known.filter(|(record, _)| record.revision == self.revision);
        Ok(same.map(|(_, artifact)| Arc::new(artifact)))
    }

    /// Bytes, at most, usually, of the files in its layers whose indexes the store has. Blocking.
    ///
    /// # Errors
    /// What the store says.
    pub fn known_layers(&self, store: &Store) -> Result<u64, NodeError> {
        let mut bytes = 0u64;
        for (layer, size) in &self.layers {
            if store.has_index(layer)? {
                bytes = bytes.saturating_add(size.saturating_mul(UNPACKED));
            }
        }
        Ok(bytes)
    }
}

impl Node {
    /// Asks the origin what a bake of `reference`, at `revision` where one is given, will bring;
    /// keeps nothing.
    ///
    /// # Errors
    /// What the source says.
    pub async fn plan(
        &self,
        reference: &Reference,
        revision: Option<&str>,
    ) -> Result<Planned, NodeError> {
        let at = revision.and_then(|revision| pinned(reference, revision));
        let at = at.as_ref().unwrap_or(reference);
        let name = reference.to_string();
        if let Some(layered) = self.layers(at).await? {
            for_this_machine(reference, &layered)?;
            let sizes = layered.layers.iter().map(|layer| layer.size);
            return Ok(Planned {
                reference: name,
                revision: layered.manifest.to_string(),
                files: None,
                bytes: sizes.fold(0, u64::saturating_add),
                artifact: None,
                layers: (layered.layers.iter())
                    .map(|layer| (layer.blob, layer.size))
                    .collect(),
            });
        }
        let mut artifact = self.inspect(at).await?;
        artifact.reference.clone_from(&name);
        same(&name, revision, &artifact.revision)?;
        Ok(Planned {
            reference: name,
            revision: artifact.revision.clone(),
            files: Some(artifact.tree.files().len() as u64),
            bytes: artifact.size(),
            artifact: Some(Arc::new(artifact)),
            layers: Vec::new(),
        })
    }

    /// Makes sure that what is planned fits beside what else is reserved. Layers take up to three
    /// times their size: that is usual.
    ///
    /// # Errors
    /// Does not fit: the arithmetic is in the error.
    pub async fn reserve(&self, planned: &Planned) -> Result<Reservation, NodeError> {
        if let Some(artifact) = &planned.artifact {
            return self.admit(artifact).await;
        }
        let (store, planned) = (Arc::clone(self.store()), planned.clone());
        let reserved = blocking(move || {
            let mut bytes = 0u64;
            for (layer, size) in &planned.layers {
                if !store.has_index(layer)? {
                    bytes = bytes.saturating_add(size.saturating_mul(UNPACKED));
                }
            }
            store.admit_bytes(&planned.reference, bytes)
        });
        Ok(reserved.await?)
    }

    /// As [`Node::resolve_showing`], of `reference` as it was at `revision`.
    pub(super) async fn resolve_at(
        &self,
        reference: &Reference,
        revision: &str,
        progress: &Progress,
    ) -> Result<Resolved, NodeError> {
        let name = reference.to_string();
        let failed = |source| NodeError::Resolve {
            reference: name.clone(),
            source,
        };
        let Some(at) = pinned(reference, revision) else {
            let resolved = self.resolve_showing(reference, progress).await?;
            same(&name, Some(revision), &resolved.artifact.revision)?;
            return Ok(resolved);
        };
        let source = self.sources.open(&at).map_err(failed)?;
        if let Some(artifact) = self.recorded(&name).await?
            && artifact.revision == revision
            && let Some(resolved) = self.as_recorded(reference, &artifact, &source).await?
        {
            return Ok(resolved);
        }
        if let Some(mut layered) = source.layered(&at).await.map_err(failed)? {
            layered.reference.clone_from(&name);
            let resolved = self
                .resolve_layered(reference, layered, &source, Some(progress))
                .await?;
            return resolved.ok_or(NodeError::Unknown(name));
        }
        let mut artifact = source.resolve(&at).await.map_err(failed)?;
        artifact.reference.clone_from(&name);
        let artifact = Arc::new(artifact);
        self.record(&artifact).await?;
        Ok(Resolved::plain(artifact, source, true))
    }
}

/// The reference that means `revision` for ever, where the origin has such.
fn pinned(reference: &Reference, revision: &str) -> Option<Reference> {
    let mut pinned = reference.clone();
    match &mut pinned.locator {
        Locator::Oci(oci) => oci.digest = Some(revision.to_owned()),
        Locator::Hub(repo) => repo.revision = Some(revision.to_owned()),
        _ => return None,
    }
    Some(pinned)
}

/// Fails where an image, which is for one platform only, is for another one than this machine, and nobody
/// has said that this is meant: containerd would not run it.
fn for_this_machine(reference: &Reference, layered: &Layered) -> Result<(), NodeError> {
    let host = Platform::here();
    let (Locator::Oci(oci), Some(found)) = (&reference.locator, &layered.platform) else {
        return Ok(());
    };
    let fits = found.os == host.os && found.arch == host.arch;
    if fits || oci.platform.is_some() || !layered.root.is_empty() {
        return Ok(());
    }
    let name = reference.to_string();
    let why = format!("has an image for {found}, and none for {host}, which this machine is");
    let hint = "to bake it for other machines say ?platform=os/arch";
    Err(NodeError::Resolve {
        source: SourceError::new(SourceErrorKind::NotFound, &name, why).with_hint(hint),
        reference: name,
    })
}

/// Fails where an origin that keeps no generations has another one now.
fn same(name: &str, wanted: Option<&str>, found: &str) -> Result<(), NodeError> {
    match wanted {
        Some(wanted) if wanted != found => {
            let why = format!("it is {found:?} now, the lock says {wanted:?}");
            Err(NodeError::Resolve {
                reference: name.to_owned(),
                source: SourceError::new(SourceErrorKind::Changed, name, why),
            })
        }
        _ => Ok(()),
    }
}
