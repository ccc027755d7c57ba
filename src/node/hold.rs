//! Keeps what was resolved from eviction.

use std::sync::Arc;

use super::{Node, NodeError, Progress, Purpose, Resolved, blocking, is_of_disk};
use crate::{
    digest::Digest,
    reference::Reference,
    store::{Hold, StoreErrorKind},
};

/// How often what is removed between being resolved and being held is resolved again.
pub(super) const MAX_REMOVALS: u32 = 5;

impl Node {
    /// Keeps an artifact from eviction while the guard lives.
    ///
    /// # Errors
    /// What the store says.
    pub async fn hold(&self, reference: &str) -> Result<Hold, NodeError> {
        let (store, reference) = (Arc::clone(self.store()), reference.to_owned());
        Ok(blocking(move || store.hold(&reference)).await?)
    }

    /// As [`Node::resolve`], and holds what it is, for a mount: also what it is of a tier, whose disk may be gone when
    /// the next process serves it. Resolves again where another process removes it in between.
    ///
    /// # Errors
    /// As [`Node::resolve`] and [`Node::hold`].
    pub async fn resolve_held(&self, reference: &Reference) -> Result<(Resolved, Hold), NodeError> {
        let progress = Progress::default();
        self.held_for(reference, Purpose::Read(&progress)).await
    }

    /// As [`Node::resolve_held`], for who brings all of it, as [`Node::resolve_showing`].
    ///
    /// # Errors
    /// As [`Node::resolve_held`].
    pub async fn resolve_held_whole(
        &self,
        reference: &Reference,
    ) -> Result<(Resolved, Hold), NodeError> {
        let progress = Progress::default();
        self.held_for(reference, Purpose::Bring(&progress)).await
    }

    async fn held_for(
        &self,
        reference: &Reference,
        purpose: Purpose<'_>,
    ) -> Result<(Resolved, Hold), NodeError> {
        let mut removals = 0;
        loop {
            let resolved = self.resolve_for(reference, purpose).await?;
            self.adopt_from_below(&resolved).await?;
            match self.hold_resolved(&resolved).await {
                Err(error) if self.was_removed(&error) && removals < MAX_REMOVALS => removals += 1,
                held => return held.map(|hold| (resolved, hold)),
            }
        }
    }

    async fn adopt_from_below(&self, resolved: &Resolved) -> Result<(), NodeError> {
        let (store, name) = (
            Arc::clone(self.store()),
            resolved.artifact.reference.clone(),
        );
        match blocking(move || store.adopt_from_below(&name)).await {
            Err(error) if is_of_disk(error.kind()) => {
                tracing::debug!(%error, "only a tier knows what is mounted");
                Ok(())
            }
            // Detached just now.
            Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(()),
            done => Ok(done?),
        }
    }

    /// Whether another process removed what was resolved before it could be held.
    pub(super) fn was_removed(&self, error: &NodeError) -> bool {
        matches!(error, NodeError::Store(error) if error.kind() == StoreErrorKind::NotFound)
            && self.store().writable()
    }

    /// As [`Node::hold`], of what has just been resolved: recorded once more where another process has
    /// removed it since. An image is more than its artifact, and is not: it has to be resolved again.
    pub(super) async fn hold_resolved(&self, resolved: &Resolved) -> Result<Hold, NodeError> {
        let name = &resolved.artifact.reference;
        let hold = match self.hold(name).await {
            Err(NodeError::Store(error))
                if error.kind() == StoreErrorKind::NotFound && resolved.layers.is_none() =>
            {
                self.record(&resolved.artifact).await?;
                self.hold(name).await
            }
            held => held,
        }?;
        // It may be the generation before, or another process may have recorded the next one by now.
        let digest = resolved.artifact.digest();
        if hold.generation().is_none_or(|held| *held == digest) {
            return Ok(hold);
        }
        Ok(hold.and(self.hold_generation(&digest).await?))
    }

    /// As [`Node::hold`], for the generation `digest` of `reference`.
    ///
    /// # Errors
    /// What the store says.
    pub async fn hold_generation(&self, digest: &Digest) -> Result<Hold, NodeError> {
        let (store, digest) = (Arc::clone(self.store()), *digest);
        Ok(blocking(move || store.hold_generation(&digest)).await?)
    }
}
