//! The generation before: what a reference meant until it was recorded anew stays, objects and all, while
//! not all of the new one is here. So an update that is refused, or breaks off, costs nothing.
//!
//! A record names it; collection takes it for a root until the new one is complete, and gives it up last
//! of all that it may evict. A pinned one stays.

use super::{Result, Store};
use crate::{digest::Digest, disk::Span, tree::Artifact};

impl Store {
    /// The generation that stays while not all of `artifact` is here: the last one of which all is, else the one that
    /// was recorded until now.
    pub(super) fn previous_of(
        &self,
        artifact: &Artifact,
        digest: &Digest,
    ) -> Result<Option<Digest>> {
        let reference = &artifact.reference;
        // An image is more than its tree: of an earlier one nobody can make a root.
        if self.own_image(reference)?.is_some() {
            return Ok(None);
        }
        let read = |store: &Self| store.read_record(&store.record_path(reference));
        let own = read(self)?;
        let Some(known) = own.or_else(|| self.on_tiers(|tier| read(&tier.store))) else {
            return Ok(None);
        };
        if known.digest == *digest {
            let is_here = known.previous.is_none() || self.has_all(artifact)?;
            return Ok(known.previous.filter(|_| !is_here));
        }
        let earlier = known.previous.filter(|earlier| earlier != digest);
        let is_whole = match earlier {
            Some(_) => self.has_generation(&known.digest)?.is_some(),
            None => true,
        };
        Ok(earlier.filter(|_| !is_whole).or(Some(known.digest)))
    }

    /// Whether every object of an artifact is complete.
    pub(super) fn has_all(&self, artifact: &Artifact) -> Result<bool> {
        for object in artifact.stored() {
            if !self.has_sized(&object.id, object.size)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A generation of which all is here.
    fn has_generation(&self, digest: &Digest) -> Result<Option<Artifact>> {
        match self.read_tree(digest)? {
            Some(artifact) if self.has_all(&artifact)? => Ok(Some(artifact)),
            _ => Ok(None),
        }
    }

    /// What a reference meant before it was recorded last, where all of that is here, and not all of what it
    /// means since.
    ///
    /// # Errors
    /// What the disk says.
    pub fn last_whole(&self, reference: &str) -> Result<Option<Artifact>> {
        let record = self.read_record(&self.record_path(reference))?;
        match record.and_then(|record| Some((record.digest, record.previous?))) {
            Some((newest, previous)) if self.has_generation(&newest)?.is_none() => {
                self.has_generation(&previous)
            }
            _ => Ok(None),
        }
    }

    /// Has a reference mean again what it meant before the generation `refused` was recorded, which will not be
    /// fetched; false where somebody holds that all the same, or not all of the one before is here.
    ///
    /// # Errors
    /// What the disk says.
    pub fn take_back(&self, reference: &str, refused: &Digest) -> Result<bool> {
        self.need_writable()?;
        let _records = self.lock_records(Span::Shared)?;
        let record = self.read_record(&self.record_path(reference))?;
        let previous = record.filter(|record| record.digest == *refused);
        let Some(previous) = previous.and_then(|record| record.previous) else {
            return Ok(false);
        };
        let Some(artifact) = self.has_generation(&previous)? else {
            return Ok(false);
        };
        let Some(_free) = self.lock_tree(refused, Span::Exclusive, false)? else {
            return Ok(false);
        };
        if self.own_tree(&previous)?.is_none() {
            // A tier has it, whose disk may go.
            self.write_tree(&previous, &artifact.encode())?;
        }
        self.write_record(&artifact, &previous, None)?;
        Ok(true)
    }
}
