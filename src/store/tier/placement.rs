//! Where the files of an artifact lie that somebody else than this process is to read: a native root is
//! given directories of objects, and the kernel takes of each file what the first of them has.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Tier, listing::Listing};
use crate::{
    store::{Result, Store},
    tree::{Artifact, Object},
};

/// Directories that together have every object of an artifact, in the order in which they are looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    dirs: Vec<PathBuf>,
    tiers: Vec<Stamp>,
}

/// A tier, and when an object of it was last found damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    path: Arc<Path>,
    id: String,
    distrusted: Option<(i64, i64)>,
    bad: usize,
}

impl Placement {
    /// The directories of objects, `sha256/<2 digits>/<64 digits>` below them; that of the store first.
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// Whether all of it is in the store itself.
    pub fn is_in_store(&self) -> bool {
        self.tiers.is_empty()
    }
}

impl Store {
    /// Where every object of an artifact is found, in the store and on tiers; none where one is missing, or
    /// would be taken from a tier on which it is damaged. What lies on a tier goes by its name here, whatever
    /// its length: an inode of each would have to be read. [`Store::check_lengths`] does that.
    ///
    /// # Errors
    /// What the disk says.
    pub fn placement(&self, artifact: &Artifact) -> Result<Option<Placement>> {
        let tiers = self.usable_tiers();
        let mut needed = Vec::new();
        let mut used = vec![false; tiers.len()];
        // Before it is looked: what is found damaged meanwhile shows.
        let stamps: Vec<_> = tiers.iter().map(|tier| self.stamp(tier)).collect();
        let mut own = Listing::new(self);
        let mut on_tiers = Vec::new();
        for tier in &tiers {
            on_tiers.push((Listing::new(&tier.store), self.damaged_on(tier)?));
        }
        for object in &artifact.objects {
            let Some(digest) = object.id.sha256() else {
                return Ok(None);
            };
            if own.has(&digest)? {
                continue;
            }
            let at = (tiers.iter().zip(&mut on_tiers)).position(|(tier, (names, damaged))| {
                !damaged.contains(&digest) && tier.or_nothing(names.has(&digest))
            });
            let Some(at) = at else {
                return Ok(None);
            };
            used[at] = true;
            needed.push((digest, at));
        }
        let mut shadowed = |(digest, at): &(_, usize)| {
            (on_tiers.iter_mut().zip(&used).take(*at))
                .any(|(names, used)| *used && names.0.has(digest).unwrap_or(true))
        };
        if needed.iter().any(&mut shadowed) {
            return Ok(None);
        }
        let mut dirs = vec![self.objects_dir()];
        let mut taken = Vec::new();
        for ((tier, used), stamp) in tiers.iter().zip(used).zip(stamps) {
            let (true, stamp) = (used, stamp) else {
                continue;
            };
            let Some(stamp) = stamp else {
                return Ok(None);
            };
            dirs.push(tier.store.objects_dir());
            taken.push(stamp);
        }
        Ok(Some(Placement { dirs, tiers: taken }))
    }

    /// Looks at the lengths that objects have on tiers. What has another is not read from there again, and placements
    /// that were made before do not hold any more. A cold disk takes milliseconds for each.
    ///
    /// # Errors
    /// What the disk of the store says.
    pub fn check_lengths<'o>(&self, objects: impl Iterator<Item = &'o Object>) -> Result<()> {
        let tiers = self.usable_tiers();
        for object in objects {
            for tier in &tiers {
                let Some(digest) = object.id.sha256() else {
                    continue;
                };
                let found = tier.or_nothing(self.stat_on_tier(tier, &digest));
                if let Some(stat) = found.filter(|stat| stat.len != object.size) {
                    let (path, size) = (tier.store.object_path(&digest), object.size);
                    tracing::error!(path = %path.display(), found = stat.len, size, "an object on a tier is damaged: it is not read from there again");
                    self.distrust(tier, &digest)?;
                }
            }
        }
        Ok(())
    }

    /// Whether a placement is as it was: its tiers are there, and nothing more was found damaged on them.
    pub fn still_holds(&self, placement: &Placement) -> bool {
        if placement.is_in_store() {
            return true;
        }
        let tiers = self.usable_tiers();
        placement.tiers.iter().all(|stamp| {
            let tier = tiers.iter().find(|tier| tier.path == stamp.path);
            tier.is_some_and(|tier| self.stamp(tier).as_ref() == Some(stamp))
        })
    }

    fn stamp(&self, tier: &Tier) -> Option<Stamp> {
        let dir = self.distrusted_dir(tier)?;
        let changed = dir.metadata().ok();
        Some(Stamp {
            path: Arc::clone(&tier.path),
            id: tier.id()?,
            distrusted: changed.map(|meta| (meta.mtime(), meta.mtime_nsec())),
            bad: tier.bad.lock().len(),
        })
    }
}
