//! Which snapshots stand on which mounted trees: the first that needs one has it mounted, the last
//! that goes lets it go.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use parking_lot::Mutex;

use super::roots::{Hints, Root, Roots, RootsError};
use crate::digest::Digest;

/// The ids of the snapshots that stand on one tree. The lock is held while the tree is mounted or
/// let go, so that these follow each other.
type Users = Arc<tokio::sync::Mutex<HashSet<u64>>>;

pub(super) struct Held {
    roots: Arc<dyn Roots>,
    chains: Mutex<HashMap<Digest, Users>>,
}

impl Held {
    /// `users` stand on these trees since before this process: whoever mounts one, and when, it is theirs.
    pub(super) fn new(
        roots: Arc<dyn Roots>,
        users: impl IntoIterator<Item = (Digest, u64)>,
    ) -> Self {
        let mut ids: HashMap<Digest, HashSet<u64>> = HashMap::new();
        for (chain, id) in users {
            ids.entry(chain).or_default().insert(id);
        }
        let chains = ids.into_iter();
        let chains = chains.map(|(chain, ids)| (chain, Arc::new(tokio::sync::Mutex::new(ids))));
        Self {
            roots,
            chains: Mutex::new(chains.collect()),
        }
    }

    pub(super) fn roots(&self) -> &dyn Roots {
        &*self.roots
    }

    /// The tree of `chain`, mounted until snapshot `id` lets it go.
    ///
    /// # Errors
    /// What the node says; then it is not held, unless it was before.
    pub(super) async fn hold(
        &self,
        chain: &Digest,
        hints: &Hints,
        id: u64,
    ) -> Result<Root, RootsError> {
        let users = Arc::clone(self.chains.lock().entry(*chain).or_default());
        let mut ids = users.lock().await;
        let root = self.roots.root(chain, hints).await;
        if root.is_ok() {
            ids.insert(id);
        }
        drop(ids);
        self.forget(chain, users);
        root
    }

    /// Snapshot `id` is gone.
    pub(super) async fn let_go(&self, chain: &Digest, id: u64) {
        let Some(users) = self.chains.lock().get(chain).map(Arc::clone) else {
            return;
        };
        let mut ids = users.lock().await;
        if ids.remove(&id) && ids.is_empty() {
            self.roots.release(chain).await;
        }
        drop(ids);
        self.forget(chain, users);
    }

    /// Does `work` while no snapshot's need of the tree of `chain` begins or ends, nor other work of this kind is done.
    pub(super) async fn alone<T>(&self, chain: &Digest, work: impl Future<Output = T>) -> T {
        let users = Arc::clone(self.chains.lock().entry(*chain).or_default());
        let ids = users.lock().await;
        let done = work.await;
        drop(ids);
        self.forget(chain, users);
        done
    }

    /// Drops the entry of a chain that nobody uses and nobody is about to use.
    fn forget(&self, chain: &Digest, users: Users) {
        let mut chains = self.chains.lock();
        // The map's own and this one: whoever wants another needs the lock of the map.
        let last = Arc::strong_count(&users) == 2;
        if last && users.try_lock().is_ok_and(|ids| ids.is_empty()) {
            chains.remove(chain);
        }
    }
}
