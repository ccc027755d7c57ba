//! What a chain id means, and where the files of that are.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use super::ImageRoots;
use crate::{
    digest::Digest,
    node::{NodeError, Resolved},
    reference::Reference,
    snapshotter::Hints,
    store::Placement,
};

/// How long the registry of an image that cannot be read lazily is not asked again.
const REFUSED_FOR: Duration = Duration::from_secs(60);
/// How long a container has the disk to itself before the lengths of its files are looked at.
const CHECK_AFTER: Duration = Duration::from_secs(5);
/// Objects that are looked at while the process waits to end.
const CHECKED_AT_ONCE: usize = 256;
/// Most such images that are remembered.
const MAX_REFUSED: usize = 1024;

/// Images that could not be read lazily when their registry was last asked: by name and, where
/// containerd said it, manifest.
#[derive(Default)]
pub(super) struct Refused(HashMap<(String, Option<Digest>), Instant>);

impl Refused {
    pub(super) fn has(&self, of: &(String, Option<Digest>), now: Instant) -> bool {
        let at = self.0.get(of);
        at.is_some_and(|at| now.saturating_duration_since(*at) < REFUSED_FOR)
    }

    pub(super) fn add(&mut self, of: (String, Option<Digest>), now: Instant) {
        if self.0.len() >= MAX_REFUSED {
            self.0
                .retain(|_, at| now.saturating_duration_since(*at) < REFUSED_FOR);
        }
        if self.0.len() < MAX_REFUSED {
            self.0.insert(of, now);
        }
    }
}

impl ImageRoots {
    /// The image of a chain id, from the store, else by the name that the CRI gave. It was claimed for
    /// good: what can be read no more without unpacking it is unpacked now.
    pub(super) async fn find(
        &self,
        chain: &Digest,
        hints: &Hints,
    ) -> Result<Option<Resolved>, NodeError> {
        let named = named(hints);
        let named = named.as_ref();
        if let Some(found) = self.node.image_by_chain(chain, named).await? {
            return Ok(Some(found));
        }
        if let Some(mended) = self.node.mend_chain(chain, named).await? {
            return Ok(Some(mended));
        }
        match self.learn(named).await? {
            true => self.node.image_by_chain(chain, named).await,
            false => Ok(None),
        }
    }

    /// Looks whether the image that the CRI named can be read before it is pulled.
    async fn learn(&self, named: Option<&Reference>) -> Result<bool, NodeError> {
        let Some(named) = named else { return Ok(false) };
        Ok(self.node.resolve_lazily(named).await?.is_some())
    }

    /// As [`Self::learn`], for a layer that containerd will pull otherwise: it asks for each of an image.
    pub(super) async fn learn_once(
        &self,
        named: Option<&Reference>,
        hints: &Hints,
    ) -> Result<bool, NodeError> {
        let Some(name) = &hints.image else {
            return Ok(false);
        };
        let of = (name.clone(), hints.manifest);
        if self.refused.lock().has(&of, Instant::now()) {
            return Ok(false);
        }
        let learned = self.learn(named).await;
        if !matches!(learned, Ok(true)) {
            self.refused.lock().add(of, Instant::now());
        }
        learned
    }

    /// Where every file of the image lies, so that its root needs nobody; none where some are missing, or
    /// lie where the options of a mount cannot say.
    pub(super) async fn placement(&self, resolved: &Resolved) -> Option<Placement> {
        if !resolved.is_verified() {
            return None;
        }
        let (store, artifact) = (
            Arc::clone(self.node.store()),
            Arc::clone(&resolved.artifact),
        );
        let placed = tokio::task::spawn_blocking(move || store.placement(&artifact));
        let placement = match placed.await {
            Ok(Ok(placement)) => placement?,
            Ok(Err(error)) => {
                tracing::warn!(%error, "it cannot be seen whether an image is complete");
                return None;
            }
            Err(_) => return None,
        };
        let fits = |dir: &PathBuf| {
            let text = dir.to_str();
            text.is_some_and(|text| !text.contains([':', ',', '\\', '"']))
        };
        match placement.dirs().iter().all(fits) {
            true => Some(placement),
            false => {
                tracing::warn!(
                    "the path of a tier has a colon, comma, quote or backslash: images on it are served by FUSE"
                );
                None
            }
        }
    }

    /// Looks in the background whether what a root takes from tiers has the lengths that it should: the kernel does not.
    /// The next container has another root then.
    pub(super) fn check(&self, resolved: &Resolved, placement: &Placement) {
        if placement.is_in_store() {
            return;
        }
        let (node, turn) = (self.node.clone(), Arc::clone(&self.checks));
        let artifact = Arc::clone(&resolved.artifact);
        tokio::spawn(async move {
            tokio::time::sleep(CHECK_AFTER).await;
            let _turn = turn.lock().await;
            for from in (0..artifact.objects.len()).step_by(CHECKED_AT_ONCE) {
                let (store, artifact) = (Arc::clone(node.store()), Arc::clone(&artifact));
                let checked = tokio::task::spawn_blocking(move || {
                    let objects = artifact.objects.iter().skip(from).take(CHECKED_AT_ONCE);
                    store.check_lengths(objects)
                });
                match checked.await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        tracing::warn!(%error, "what lies on tiers goes by its names");
                        return;
                    }
                    Err(_) => return,
                }
            }
        });
    }
}

/// The image that the CRI named.
pub(super) fn named(hints: &Hints) -> Option<Reference> {
    // As containerd writes it: without scheme.
    format!("oci://{}", hints.image.as_ref()?).parse().ok()
}
