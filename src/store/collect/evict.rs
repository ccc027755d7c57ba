//! What goes where space is needed: artifacts that were not used for longest; last of all, generations
//! that wait for the next ones to be complete.

use std::sync::Arc;

use super::{Known, Leads, Sweep, last};
use crate::{
    digest::Digest,
    disk::Span,
    store::{Record, Result, space::Wanted},
    tree::Artifact,
};

impl Sweep<'_> {
    /// Evicts artifacts until `goal` bytes are freed in all.
    pub(super) fn evict(&mut self, goal: u64, keep: &[Arc<Wanted>]) -> Result<()> {
        if self.report.bytes < goal && !self.unreadable.is_empty() {
            self.evict_unreadable(keep)?;
        }
        let mut kept = Vec::new();
        while self.report.bytes < goal {
            let Some(known) = self.artifacts.pop() else {
                break;
            };
            let evictable = known.record.as_ref().filter(|record| {
                record.pins.is_empty() && !keep.iter().any(|k| k.keeps(&record.reference))
            });
            match evictable {
                Some(record) if self.forget(record)? => {
                    self.report.evicted.push(record.reference.clone());
                    self.release(&known)?;
                }
                _ => kept.push(known),
            }
        }
        self.artifacts.extend(kept.into_iter().rev());
        self.evict_previous(goal)
    }

    /// Gives up generations that stay until the next ones are complete: nothing else is left.
    fn evict_previous(&mut self, goal: u64) -> Result<()> {
        for at in (0..self.artifacts.len()).rev() {
            if self.report.bytes >= goal {
                break;
            }
            let known = &mut self.artifacts[at];
            let Some(record) = known.record.as_ref().filter(|r| r.pins.is_empty()) else {
                continue;
            };
            let Some((digest, leads)) = known.previous.take() else {
                continue;
            };
            if self.store.tree_is_held(&digest)? {
                continue;
            }
            if !self.dry_run {
                let reference = &record.reference;
                tracing::warn!(reference, %digest, "its generation before the last goes, though not all of that is here: the space is needed");
            }
            self.release_generation(&digest, &leads)?;
            let tree = self.store.tree_path(&digest);
            self.report.others += u64::from(self.remove_unlocked(&tree)?);
        }
        Ok(())
    }

    /// Forgets artifacts that nobody can open, since their trees cannot be read; where all can be read
    /// then, what nothing leads to is known again.
    fn evict_unreadable(&mut self, keep: &[Arc<Wanted>]) -> Result<()> {
        for known in std::mem::take(&mut self.artifacts) {
            let evictable = known.record.as_ref().filter(|record| {
                known.unreadable
                    && record.pins.is_empty()
                    && !keep.iter().any(|k| k.keeps(&record.reference))
            });
            match evictable {
                Some(record) if self.forget(record)? => {
                    self.unreadable
                        .remove(&self.store.tree_path(&record.digest));
                    self.report.evicted.push(record.reference.clone());
                    self.release(&known)?;
                }
                _ => self.artifacts.push(known),
            }
        }
        self.remove_unreferenced()
    }

    /// Removes a record unless it is pinned by now, or held.
    fn forget(&self, record: &Record) -> Result<bool> {
        if !self.store.pins(&record.reference)?.is_empty() {
            return Ok(false);
        }
        if self.store.tree_is_held(&record.digest)? {
            return Ok(false);
        }
        if !self.dry_run {
            return Ok(self.store.forget(&record.reference)?.is_some());
        }
        let path = self.store.hold_path(&record.reference);
        let lock = self.store.lock_removable(&path, Span::Exclusive, false)?;
        Ok(lock.is_some())
    }

    /// Removes what only `known` led to, whose record is gone.
    fn release(&mut self, known: &Known) -> Result<()> {
        if let Some(record) = &known.record {
            self.release_generation(&record.digest, &known.leads)?;
        }
        match &known.previous {
            Some((digest, leads)) if !self.store.tree_is_held(digest)? => {
                self.release_generation(digest, leads)
            }
            _ => Ok(()),
        }
    }

    /// No other record leads to this tree: its digest covers the reference.
    fn release_generation(&mut self, digest: &Digest, leads: &Leads) -> Result<()> {
        self.trees.remove(digest);
        for id in &leads.ids {
            if last(&mut self.ids, id) {
                self.remove_partial(id)?;
            }
        }
        for content in &leads.contents {
            if last(&mut self.contents, content) {
                self.remove_object(content)?;
            }
        }
        for layer in &leads.layers {
            if last(&mut self.layers, layer) {
                self.remove_index(layer)?;
            }
        }
        Ok(())
    }

    /// The generation before what is recorded, while not all of `artifact` is here. One that cannot be read is none:
    /// nobody can use it, nor will anybody write it anew.
    pub(super) fn previous(
        &mut self,
        record: &Record,
        artifact: Option<&Artifact>,
    ) -> Result<Option<(Digest, Leads)>> {
        let Some(digest) = record.previous else {
            return Ok(None);
        };
        if let Some(artifact) = artifact
            && self.store.has_all(artifact)?
        {
            return Ok(None);
        }
        match self.store.read_tree(&digest)? {
            Some(previous) => Ok(Some((digest, self.leads(&previous)?))),
            None => Ok(None),
        }
    }
}
