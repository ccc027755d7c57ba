//! Where the objects of an artifact lie, for who shows that and reads none of them: nothing is opened.
//!
//! A sealed tier is believed about the artifacts that are recorded on it: it was sealed with all of their
//! objects. So it costs the same, however many there are. What was lost there since shows where the
//! objects are looked at, and where they are read.

use std::{collections::HashSet, path::Path, sync::Arc};

use super::Tier;
use crate::{
    digest::Digest,
    store::{Result, Store, StoreError},
    tree::{Artifact, Object},
};

/// Where a complete object lies; the store itself comes first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Whereabouts {
    /// In the store itself.
    Store,
    /// On the tier in this directory.
    Tier(Arc<Path>),
}

/// Answers where the objects of an artifact lie.
#[derive(Debug)]
pub struct Finder<'s> {
    store: &'s Store,
    /// The tiers, with what is damaged there.
    tiers: Vec<(Arc<Tier>, HashSet<Digest>)>,
    /// The place in `tiers` of one that was sealed with the artifact.
    sealed: Option<usize>,
}

impl Store {
    /// Finds objects by looking at each.
    ///
    /// # Errors
    /// What the disk says.
    pub fn finder(&self) -> Result<Finder<'_>> {
        let mut tiers = Vec::new();
        for tier in self.usable_tiers() {
            let damaged = self.damaged_on(&tier)?;
            tiers.push((tier, damaged));
        }
        Ok(Finder {
            store: self,
            tiers,
            sealed: None,
        })
    }

    /// Finds the objects of an artifact, whose digest is given. A tier that was sealed with it is only asked
    /// for the largest of them.
    ///
    /// # Errors
    /// What the disk says.
    pub fn finder_of(&self, artifact: &Artifact, digest: &Digest) -> Result<Finder<'_>> {
        let mut finder = self.finder()?;
        let largest = artifact.stored().max_by_key(|object| object.size);
        for (at, (tier, damaged)) in finder.tiers.iter().enumerate() {
            let path = tier.store.record_path(&artifact.reference);
            let record = match tier.is_sealed() {
                true => tier.or_nothing(tier.store.read_record(&path)),
                false => None,
            };
            if record.is_some_and(|record| record.digest == *digest)
                && match largest {
                    Some(object) => (self.content_of(&object.id)?)
                        .is_some_and(|content| lies_on(tier, damaged, &content, object.size)),
                    None => true,
                }
            {
                finder.sealed = Some(at);
                break;
            }
        }
        Ok(finder)
    }
}

impl Finder<'_> {
    /// Where an object lies, if it is complete.
    ///
    /// # Errors
    /// What the disk says.
    pub fn find(&self, object: &Object) -> Result<Option<Whereabouts>> {
        if let Some((tier, damaged)) = self.sealed.and_then(|at| self.tiers.get(at)) {
            let is_damaged = match damaged.is_empty() {
                true => Some(false),
                false => object.id.sha256().map(|digest| damaged.contains(&digest)),
            };
            if is_damaged == Some(false) {
                return Ok(Some(Whereabouts::Tier(Arc::clone(&tier.path))));
            }
        }
        Ok(self.look(object)?.map(|(place, _)| place))
    }

    /// Where an object lies, if it is complete, and its digest; believes nobody.
    ///
    /// # Errors
    /// What the disk says.
    pub fn look(&self, object: &Object) -> Result<Option<(Whereabouts, Digest)>> {
        let Some(digest) = self.store.content_of(&object.id)? else {
            return Ok(None);
        };
        if let Some(own) = self.store.disk.stat(&self.store.object_path(&digest))? {
            // Of another length it is damaged, and nothing else is read in its place.
            return Ok((own.len == object.size).then_some((Whereabouts::Store, digest)));
        }
        let mut tiers = self.tiers.iter();
        let tier = tiers.find(|(tier, damaged)| lies_on(tier, damaged, &digest, object.size));
        Ok(tier.map(|(tier, _)| (Whereabouts::Tier(Arc::clone(&tier.path)), digest)))
    }
}

/// Whether a tier has an object of this length that is not known to be damaged there.
fn lies_on(tier: &Tier, damaged: &HashSet<Digest>, digest: &Digest, size: u64) -> bool {
    if damaged.contains(digest) {
        return false;
    }
    let path = tier.store.object_path(digest);
    match path.symlink_metadata() {
        Ok(meta) => meta.is_file() && meta.len() == size,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => {
            tier.failed(&StoreError::io(path.display(), &error));
            false
        }
    }
}
