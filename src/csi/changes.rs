//! Who may change what: one change of a target at a time, and of what all targets of a volume have together, its pin.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{CsiError, CsiErrorKind, Driver, PATIENCE, Result, records::Claim};

/// A volume that is about to be published: its pin is not taken away.
#[derive(Default)]
pub(super) struct Opens {
    /// At how many targets.
    targets: usize,
    /// Claims that needed the pin no more meanwhile, one of each reference.
    gone: BTreeMap<String, Claim>,
}

/// What is changed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Of {
    Target(PathBuf),
    Volume(String),
}

/// The right to change something.
pub(super) struct Change<'a> {
    driver: &'a Driver,
    of: Of,
    held: Option<tokio::sync::OwnedMutexGuard<()>>,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.held = None;
        let mut changes = self.driver.changes.lock();
        if changes
            .get(&self.of)
            .is_some_and(|lock| Arc::strong_count(lock) == 1)
        {
            changes.remove(&self.of);
        }
    }
}

/// One target of [`Opens`].
pub(super) struct Opening<'a> {
    driver: &'a Driver,
    volume: Option<&'a str>,
}

impl Opening<'_> {
    /// It is published, or will not be. Claims whose pins are to be looked at, where it was the last one.
    pub(super) fn end(mut self) -> BTreeMap<String, Claim> {
        self.leave()
    }

    fn leave(&mut self) -> BTreeMap<String, Claim> {
        let mut state = self.driver.state.lock();
        let volume = self.volume.take().unwrap_or_default();
        if let Some(opens) = state.opening.get_mut(volume) {
            opens.targets -= 1;
            if opens.targets == 0 {
                return state.opening.remove(volume).unwrap_or_default().gone;
            }
        }
        BTreeMap::new()
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        if self.volume.is_some() {
            drop(self.leave());
        }
    }
}

impl Driver {
    pub(super) async fn change_target(&self, target: &Path) -> Result<Change<'_>> {
        self.change(Of::Target(target.to_owned())).await
    }

    /// Never held while an origin is waited for: it is every target's.
    pub(super) async fn change_volume(&self, volume: &str) -> Result<Change<'_>> {
        self.change(Of::Volume(volume.to_owned())).await
    }

    /// Waits until this call is the only one to change it.
    async fn change(&self, of: Of) -> Result<Change<'_>> {
        let mut change = Change {
            driver: self,
            of,
            held: None,
        };
        let lock = {
            let mut changes = self.changes.lock();
            Arc::clone(changes.entry(change.of.clone()).or_default())
        };
        match tokio::time::timeout(PATIENCE, lock.lock_owned()).await {
            Ok(held) => {
                change.held = Some(held);
                Ok(change)
            }
            Err(_) => {
                let of = match &change.of {
                    Of::Target(path) => path.display().to_string(),
                    Of::Volume(volume) => volume.clone(),
                };
                let message = format!("another call about {of} is under way");
                Err(CsiError::new(CsiErrorKind::Aborted, message))
            }
        }
    }

    /// Keeps the pin of a volume that is about to be published at a target.
    pub(super) async fn opening<'a>(&'a self, volume: &'a str) -> Result<Opening<'a>> {
        // Nor is it being taken away.
        let _change = self.change_volume(volume).await?;
        let mut state = self.state.lock();
        state.opening.entry(volume.to_owned()).or_default().targets += 1;
        Ok(Opening {
            driver: self,
            volume: Some(volume),
        })
    }

    /// Takes the pin away that a claim has no more, unless another target of the volume needs it.
    pub(super) async fn unpin(&self, claim: &Claim) {
        let _change = match self.change_volume(&claim.volume).await {
            Ok(change) => change,
            Err(error) => {
                tracing::warn!(volume = claim.volume, %error, "it stays pinned until the next start");
                return;
            }
        };
        {
            let mut state = self.state.lock();
            let is_needed = state.published.values().any(|other| {
                let other = &other.claim;
                other.volume == claim.volume && other.reference == claim.reference
            });
            if is_needed {
                return;
            }
            // Whoever needs it, or does not after all, is not known yet.
            if let Some(opens) = state.opening.get_mut(&claim.volume) {
                opens.gone.insert(claim.reference.clone(), claim.clone());
                return;
            }
        }
        self.models.unpin(&claim.reference, &claim.owner()).await;
    }
}
