//! What of an artifact is here.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::UNIX_EPOCH};

use serde::Serialize;

use super::{Node, NodeError, layers::waits_for_a_check};
use crate::{
    digest::ObjectId,
    store::{Record, Store},
    tree::Artifact,
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
    /// Whether every object is complete and was verified; of an image, its tree too.
    pub complete: bool,
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
    /// Every artifact the store knows, by reference. Blocking.
    ///
    /// # Errors
    /// What the store says.
    pub fn list(&self) -> Result<Vec<ArtifactStatus>, NodeError> {
        let mut all = Vec::new();
        for record in self.store().records()? {
            if let Some((record, artifact)) = self.store().artifact(&record.reference)? {
                all.push(artifact_status(self.store(), record, &artifact)?);
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
        for object in artifact.stored() {
            let complete = self.store().complete_sized(&object.id, object.size)?;
            if complete.is_none() {
                return Ok(false);
            }
        }
        Ok(!waits_for_a_check(self.store(), artifact)?)
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
        let mut files = Vec::new();
        for (path, _, object) in artifact.tree.files() {
            let bytes = artifact.objects[object as usize].size;
            let Some((stored, offset)) = artifact.place(object) else {
                continue; // the tree of a record keeps its invariants
            };
            let within = &artifact.objects[stored as usize];
            let complete = store.complete_sized(&within.id, within.size)?;
            let is_complete = complete.is_some();
            let mut name = complete
                .map_or(within.id, |c| ObjectId::Sha256(c.digest))
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
        Ok((artifact_status(store, record, &artifact)?, files))
    }
}

fn artifact_status(
    store: &Arc<Store>,
    record: Record,
    artifact: &Artifact,
) -> Result<ArtifactStatus, NodeError> {
    let origin = artifact.origin();
    let mut present_bytes = 0;
    let mut complete = true;
    // The store itself comes first.
    let mut places: BTreeMap<Option<Arc<std::path::Path>>, u64> = BTreeMap::new();
    for object in artifact.stored() {
        match store.complete_sized(&object.id, object.size)? {
            Some(found) => {
                let bytes = places.entry(found.tier.clone()).or_insert(0);
                *bytes += object.size;
                present_bytes += object.size;
            }
            None => {
                complete = false;
                present_bytes += store.present_bytes(object.partial_id(&origin), object.size);
            }
        }
    }
    let seconds =
        |t: std::time::SystemTime| t.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    complete &= !waits_for_a_check(store, artifact)?;
    Ok(ArtifactStatus {
        reference: record.reference,
        digest: record.digest.to_string(),
        revision: record.revision,
        files: artifact.tree.files().len(),
        bytes: artifact.size(),
        present_bytes,
        complete,
        places: (places.into_iter())
            .map(|(tier, bytes)| Place {
                tier: tier.is_some(),
                path: tier.map_or_else(|| store.root().to_owned(), |tier| tier.to_path_buf()),
                bytes,
            })
            .collect(),
        pins: record.pins,
        resolved_at: seconds(record.resolved),
        last_used: seconds(record.used),
    })
}
