//! Pins that are being taken away, in the background.

use std::{collections::BTreeSet, sync::Arc};

use super::{Pods, owner};

/// The pins of a pod are being taken away.
struct Leaving {
    pods: Arc<Pods>,
    uid: String,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        let mut state = self.pods.state.lock();
        if let Some(times) = state.leaving.get_mut(&self.uid) {
            *times -= 1;
            if *times == 0 {
                state.leaving.remove(&self.uid);
            }
        }
        self.pods.left.notify_waiters();
    }
}

impl Pods {
    /// Takes the pins of a pod away. Nobody waits for it but the same pod, where that comes back.
    pub(super) fn let_go(self: &Arc<Self>, uid: &str) {
        let (pods, uid) = (Arc::clone(self), uid.to_owned());
        *self.state.lock().leaving.entry(uid.clone()).or_default() += 1;
        let leaving = Leaving { pods, uid };
        tokio::spawn(async move {
            let owner = owner(&leaving.uid);
            leaving.pods.content.unpin(&owner, &BTreeSet::new()).await;
        });
    }

    /// Returns once nobody takes pins of a pod away.
    pub(super) async fn has_left(&self, uid: &str) {
        loop {
            let told = self.left.notified();
            if !self.state.lock().leaving.contains_key(uid) {
                return;
            }
            told.await;
        }
    }
}
