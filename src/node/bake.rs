//! What a bake needs of the node: what it will bring, room for all of it, and references as they
//! were when a lock was written.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{Meaning, Node, NodeError, Purpose, Resolved, blocking, meaning::meaning};
use crate::{
    digest::Digest,
    reference::{Locator, Platform, Reference},
    source::{Layered, SourceError, SourceErrorKind, patiently},
    store::{ImageRecord, Reservation, Store},
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
    layers: Vec<(Digest, u64)>,
}

impl Planned {
    /// Objects and layers of several references, each once: what is in layers, and what is not, in bytes.
    fn distinct(all: &[Self]) -> (u64, u64) {
        let artifacts = all.iter().filter_map(|planned| planned.artifact.as_ref());
        let objects: HashMap<_, u64> = artifacts
            .flat_map(|artifact| artifact.stored().map(|object| (object.id, object.size)))
            .collect();
        let layers: HashMap<_, u64> = (all.iter())
            .flat_map(|planned| planned.layers.iter().copied())
            .collect();
        let sum = |bytes: &mut dyn Iterator<Item = u64>| bytes.fold(0, u64::saturating_add);
        (
            sum(&mut layers.into_values()),
            sum(&mut objects.into_values()),
        )
    }

    /// Bytes that these will take at most, usually.
    pub fn space(all: &[Self]) -> u64 {
        let (layers, others) = Self::distinct(all);
        layers.saturating_mul(UNPACKED).saturating_add(others)
    }

    /// Bytes that these will take at least, usually: layers get no smaller when they are unpacked.
    pub fn at_least(all: &[Self]) -> u64 {
        let (layers, others) = Self::distinct(all);
        layers.saturating_add(others)
    }

    /// The places in `all` of those that have layers in common, and so on: what they share is not there yet for
    /// any of them as long as they are brought at the same time.
    pub fn related(all: &[Self]) -> Vec<Vec<usize>> {
        let mut groups: Vec<usize> = (0..all.len()).collect();
        let mut first = HashMap::new();
        for (at, planned) in all.iter().enumerate() {
            for (layer, _) in &planned.layers {
                let (from, to) = (groups[at], groups[*first.entry(*layer).or_insert(at)]);
                for group in groups.iter_mut().filter(|group| **group == from) {
                    *group = to;
                }
            }
        }
        let mut related = vec![Vec::new(); all.len()];
        for (at, group) in groups.into_iter().enumerate() {
            related[group].push(at);
        }
        related.retain(|group| !group.is_empty());
        related
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

    /// Bytes, at most, usually, of the files in its layers but those that were `seen`: those whose indexes the
    /// store has, or has not. Blocking.
    ///
    /// # Errors
    /// What the store says.
    pub fn unpacked(
        &self,
        store: &Store,
        is_known: bool,
        seen: &mut HashSet<Digest>,
    ) -> Result<u64, NodeError> {
        let mut bytes = 0u64;
        for (layer, size) in &self.layers {
            if seen.insert(*layer) && store.has_index(layer)? == is_known {
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
        let mut artifact = match self.inspect(at).await? {
            Meaning::Files(artifact) => artifact,
            Meaning::Layers(layered) => {
                if revision.is_none() {
                    for_this_machine(reference, &layered)?;
                }
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
        };
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

    /// Makes sure that all that is planned fits beside what else is reserved. Layers take up to three
    /// times their size: that is usual. Blocking.
    ///
    /// # Errors
    /// Does not fit: the arithmetic is in the error.
    pub fn reserve(&self, all: &[Planned]) -> Result<Vec<Reservation>, NodeError> {
        let store = self.store();
        let mut seen = HashSet::new();
        let mut room = Vec::new();
        for planned in all {
            room.push(match &planned.artifact {
                Some(artifact) => store.admit(artifact)?,
                None => {
                    let bytes = planned.unpacked(store, false, &mut seen)?;
                    store.admit_bytes(&planned.reference, bytes)?
                }
            });
        }
        Ok(room)
    }

    /// As [`Node::resolve`], of `reference` as it was at `revision`.
    pub(super) async fn resolve_at(
        &self,
        reference: &Reference,
        revision: &str,
        purpose: Purpose<'_>,
    ) -> Result<Resolved, NodeError> {
        let name = reference.to_string();
        let failed = |source| NodeError::Resolve {
            reference: name.clone(),
            source,
        };
        let Some(at) = pinned(reference, revision) else {
            let resolved = self.resolve_for(reference, purpose).await?;
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
        let meant = patiently(self.patience(), meaning(&source, &at, false)).await;
        let mut artifact = match meant.map_err(failed)? {
            Meaning::Files(artifact) => artifact,
            Meaning::Layers(mut layered) => {
                layered.reference.clone_from(&name);
                let resolved = self
                    .resolve_layered(reference, layered, &source, purpose)
                    .await?;
                return resolved.ok_or(NodeError::Unknown(name));
            }
        };
        artifact.reference.clone_from(&name);
        let artifact = Arc::new(artifact);
        self.record(&artifact).await?;
        Ok(Resolved::plain(artifact, source, true))
    }
}

impl Node {
    /// Notes of an image, which was brought by the digest of its manifest, that `index` named that, and keeps
    /// the index: pods may name the image by it.
    ///
    /// # Errors
    /// What the source or the store says.
    pub async fn note_index(&self, reference: &Reference, index: Digest) -> Result<(), NodeError> {
        let (store, name) = (Arc::clone(self.store()), reference.to_string());
        let Some(image) = blocking(move || store.image(&name)).await? else {
            return Ok(());
        };
        if image.index == Some(index) {
            return Ok(());
        }
        let source = (self.sources.open(reference)).map_err(|source| NodeError::Resolve {
            reference: reference.to_string(),
            source,
        })?;
        let index = Some(index);
        let image = ImageRecord { index, ..image };
        self.keep_documents(&image, &source).await?;
        let store = Arc::clone(self.store());
        Ok(blocking(move || store.record_image(&image)).await?)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shared_counts_once_and_is_brought_by_one() {
        let planned = |layers: &[&str]| Planned {
            reference: String::new(),
            revision: String::new(),
            files: None,
            bytes: 10 * layers.len() as u64,
            artifact: None,
            layers: (layers.iter())
                .map(|name| (Digest::of(name.as_bytes()), 10))
                .collect(),
        };
        let all = [
            planned(&["a", "b"]),
            planned(&["x"]),
            planned(&["c", "d"]),
            planned(&["b", "c"]),
            planned(&[]),
            planned(&[]),
        ];
        assert_eq!(Planned::at_least(&all), 50);
        assert_eq!(Planned::space(&all), 150);
        let mut related = Planned::related(&all);
        related.sort();
        assert_eq!(related, [vec![0, 2, 3], vec![1], vec![4], vec![5]]);
    }
}
