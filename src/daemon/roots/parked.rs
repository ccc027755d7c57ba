//! Native roots that nobody has any more: they stay mounted for a while. To make one takes a third of a second of an image
//! of 50,000 files, and the next container of an image is often started soon, at the latest when one that failed is
//! started again. It costs a mount and nothing else: what containerd has claimed is not evicted anyway.

use std::{
    fs,
    path::Path,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use super::{Chain, ImageRoots, left::owner};
use crate::{
    digest::Digest,
    mount::{MountErrorKind, native},
};

/// How long they stay.
const STAY: Duration = Duration::from_secs(300);

impl ImageRoots {
    /// Keeps the native root of a chain that nobody has, while its image is claimed; false where there is none, or it goes
    /// at once: that of a tier would keep the tier's disk from being detached.
    pub(super) async fn park(&self, id: &Digest, chain: &mut Chain) -> bool {
        chain.parked = None;
        let Some(native) = chain.native.take() else {
            return false;
        };
        let (store, reference) = (Arc::clone(self.node.store()), native.reference.clone());
        let is_in_store = native.placement.is_in_store();
        let owner = owner(id);
        let stays = tokio::task::spawn_blocking(move || {
            let claimed = || {
                store
                    .pins(&reference)
                    .is_ok_and(|pins| pins.contains(&owner))
            };
            is_in_store && claimed()
        });
        if !stays.await.unwrap_or(false) {
            return false;
        }
        chain.native = Some(native);
        chain.parked = Some(Instant::now());
        let (roots, id) = (Weak::clone(&self.me), *id);
        tokio::spawn(async move {
            tokio::time::sleep(STAY).await;
            if let Some(roots) = roots.upgrade() {
                roots.unpark(&id, |since| since.elapsed() >= STAY).await;
            }
        });
        true
    }

    /// Unmounts the native root of a chain that nobody has, if it `is_due`.
    pub(super) async fn unpark(&self, id: &Digest, is_due: impl Fn(Instant) -> bool) {
        let slot = self.chain(id);
        let mut chain = slot.lock().await;
        if chain.parked.is_some_and(is_due) {
            (chain.parked, chain.native) = (None, None);
            let dir = self.dir(id, "");
            let _ = tokio::task::spawn_blocking(move || unmount(&dir)).await;
        }
        drop(chain);
        self.forget_chain(id, slot);
    }

    /// Unmounts all of them.
    pub(super) async fn unpark_all(&self) {
        let chains: Vec<_> = self.chains.lock().keys().copied().collect();
        for id in chains {
            self.unpark(&id, |_| true).await;
        }
    }
}

/// Unmounts the native root of the chain in `dir`, if there is one, and removes what is empty then. Blocking.
pub(super) fn unmount(dir: &Path) {
    let native = dir.join("native");
    match native::unmount(&native, true) {
        Err(error) if error.kind() != MountErrorKind::NotMounted => {
            tracing::warn!(%error, "a root stays mounted");
        }
        _ => {}
    }
    let _ = fs::remove_dir(native);
    let _ = fs::remove_dir(dir);
}
