//! What of an artifact is here.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::Arc,
    time::UNIX_EPOCH,
};

use serde::Serialize;

use super::{Node, NodeError, layers::waits_for_a_check};
use crate::{
    digest::ObjectId,
    store::{Record, Store, StoreError, TierStatus, Whereabouts},
    tree::{Artifact, Object},
};

/// What of one artifact is here.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ArtifactStatus {
    pub reference: String,
    pub digest: String,
    pub revision: String,
    pub files: usize,
    pub bytes: u64,
    pub present_bytes: u64,
    /// Whether every object is complete; of an image, its tree too.
    pub complete: bool,
    /// Whether all of that was verified on this node: what lies on a tier only once that was read through here.
    pub verified: bool,
    /// Where what is complete lies: in the store, on tiers.
    pub places: Vec<Place>,
    /// Who pins it.
    pub pins: Vec<String>,
    /// Seconds since the epoch.
    pub resolved_at: u64,
    /// Seconds since the epoch.
    pub last_used: u64,
}

/// A directory that has complete objects of an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    pub path: PathBuf,
    /// Whether it is a read-only tier.
    pub tier: bool,
    pub bytes: u64,
}

/// What of an artifact is here, in short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Presence {
    pub bytes: u64,
    /// As in [`ArtifactStatus`].
    pub complete: bool,
    /// As in [`ArtifactStatus`].
    pub verified: bool,
}

/// What of one file is here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileStatus {
    pub path: String,
    pub bytes: u64,
    pub present_bytes: u64,
    pub complete: bool,
    /// The content digest or, until that is known, the name of its place at the origin. A file
    /// inside a tar: that of the tar, `@` and where the file starts in it.
    pub object: String,
}

impl Node {
    /// Every artifact the store knows, by reference. What a tier was sealed with counts as there, without a look at
    /// each object. Blocking.
    ///
    /// # Errors
    /// What the store says.
    pub fn list(&self) -> Result<Vec<ArtifactStatus>, NodeError> {
        let mut all = Vec::new();
        let tiers = self.store().tiers();
        for record in self.store().records()? {
            if let Some((record, artifact)) = self.store().artifact(&record.reference)? {
                let finder = self.store().finder_of(&artifact, &record.digest)?;
                let find = |object: &Object| finder.find(object);
                all.push(artifact_status(
                    self.store(),
                    record,
                    &artifact,
                    find,
                    &tiers,
                )?);
            }
        }
        all.sort_by(|a, b| a.reference.cmp(&b.reference));
        Ok(all)
    }

    /// Whether every object of an artifact is complete and verified, and so is its tree. Blocking.
    ///
    /// # Errors
    /// What the store says.
    pub fn is_complete(&self, artifact: &Artifact) -> Result<bool, NodeError> {
        let finder = self.store().finder()?;
        for object in artifact.stored() {
            if finder.find(object)?.is_none() {
                return Ok(false);
            }
        }
        Ok(!waits_for_a_check(self.store(), artifact)?)
    }

    /// What of an artifact is here; what cannot be looked at is not. Blocking.
    pub fn presence(&self, artifact: &Artifact) -> Presence {
        let store = self.store();
        let found = store.finder().and_then(|finder| {
            find_all(store, artifact, |object| {
                Ok(finder.find(object).unwrap_or(None))
            })
        });
        let (bytes, is_whole, places) = found.unwrap_or_default();
        let complete = is_whole && !waits_for_a_check(store, artifact).unwrap_or(true);
        let verified = complete && are_verified(places.keys(), &store.tiers());
        Presence {
            bytes,
            complete,
            verified,
        }
    }

    /// One artifact and its files. Blocking.
    ///
    /// # Errors
    /// What the store says; [`NodeError::Unknown`] where it does not know the reference.
    pub fn status(&self, reference: &str) -> Result<(ArtifactStatus, Vec<FileStatus>), NodeError> {
        let (record, artifact) = self
            .store()
            .artifact(reference)?
            .ok_or_else(|| NodeError::Unknown(reference.to_owned()))?;
        let store = self.store();
        let origin = artifact.origin();
        let finder = store.finder()?;
        let mut found = HashMap::new();
        for object in artifact.stored() {
            found.insert(object.id, finder.look(object)?);
        }
        let mut files = Vec::new();
        for (path, _, object) in artifact.tree.files() {
            let bytes = artifact.objects[object as usize].size;
            let Some((stored, offset)) = artifact.place(object) else {
                continue; // the tree of a record keeps its invariants
            };
            let within = &artifact.objects[stored as usize];
            let content = found.get(&within.id).and_then(Option::as_ref);
            let is_complete = content.is_some();
            let mut name = content
                .map_or(within.id, |(_, digest)| ObjectId::Sha256(*digest))
                .to_string();
            if stored != object {
                name = format!("{name}@{offset}");
            }
            let part = offset..offset + bytes;
            files.push(FileStatus {
                path,
                bytes,
                present_bytes: match is_complete {
                    true => bytes,
                    false => store.present_within(within.partial_id(&origin), within.size, &part),
                },
                complete: is_complete,
                object: name,
            });
        }
        let find = |object: &Object| {
            let found = found.get(&object.id).and_then(Option::as_ref);
            Ok(found.map(|(place, _)| place.clone()))
        };
        let status = artifact_status(store, record, &artifact, find, &store.tiers())?;
        Ok((status, files))
    }
}

/// Bytes of an artifact that are here, whether those are all of it, and where what is complete lies.
fn find_all(
    store: &Arc<Store>,
    artifact: &Artifact,
    mut find: impl FnMut(&Object) -> Result<Option<Whereabouts>, StoreError>,
) -> Result<(u64, bool, BTreeMap<Whereabouts, u64>), StoreError> {
    let origin = artifact.origin();
    let (mut present, mut is_whole, mut places) = (0, true, BTreeMap::new());
    for object in artifact.stored() {
        match find(object)? {
            Some(place) => {
                *places.entry(place).or_insert(0) += object.size;
                present += object.size;
            }
            None => {
                is_whole = false;
                present += store.present_bytes(object.partial_id(&origin), object.size);
            }
        }
    }
    Ok((present, is_whole, places))
}

/// Whether these are the store, which verifies before it keeps, or tiers that were read through here.
fn are_verified<'p>(
    mut places: impl Iterator<Item = &'p Whereabouts>,
    tiers: &[TierStatus],
) -> bool {
    places.all(|place| match place {
        Whereabouts::Store => true,
        Whereabouts::Tier(path) => {
            (tiers.iter()).any(|tier| *tier.path == **path && tier.verified_at.is_some())
        }
    })
}

fn artifact_status(
    store: &Arc<Store>,
    record: Record,
    artifact: &Artifact,
    find: impl FnMut(&Object) -> Result<Option<Whereabouts>, StoreError>,
    tiers: &[TierStatus],
) -> Result<ArtifactStatus, NodeError> {
    let (present_bytes, is_whole, places) = find_all(store, artifact, find)?;
    let complete = is_whole && !waits_for_a_check(store, artifact)?;
    let seconds =
        |t: std::time::SystemTime| t.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    Ok(ArtifactStatus {
        reference: record.reference,
        digest: record.digest.to_string(),
        revision: record.revision,
        files: artifact.tree.files().len(),
        bytes: artifact.size(),
        present_bytes,
        complete,
        verified: complete && are_verified(places.keys(), tiers),
        places: (places.into_iter())
            .map(|(place, bytes)| match place {
                Whereabouts::Store => Place {
                    path: store.root().to_owned(),
                    tier: false,
                    bytes,
                },
                Whereabouts::Tier(path) => Place {
                    path: path.to_path_buf(),
                    tier: true,
                    bytes,
                },
            })
            .collect(),
        pins: record.pins,
        resolved_at: seconds(record.resolved),
        last_used: seconds(record.used),
    })
}
