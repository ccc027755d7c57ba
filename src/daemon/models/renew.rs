//! Keys that change while a model is served.

use std::sync::Arc;

use super::{Filling, SharedModels, of_node, remember};
use crate::{
    csi::{ModelError, ModelErrorKind, Want},
    digest::Digest,
    mount::Mount,
    node::Meaning,
    source::Credentials,
};

/// The keys of a model that is served, to be replaced.
pub(super) struct Renewal {
    held: Option<Credentials>,
    mount: Arc<Mount>,
    /// The origin does not take them any more, or they are not known.
    denied: bool,
}

impl SharedModels {
    /// What is needed to use other keys for a model that is served to `user`, or where none is given, to anybody.
    pub(super) async fn renewal(&self, id: &str, user: Option<&str>) -> Option<Renewal> {
        let slot = self.existing(id)?;
        let slot = slot.lock().await;
        let is_user = user.is_none_or(|user| slot.users.contains(user));
        let served = slot.served.as_ref().filter(|s| is_user && s.is_alive())?;
        let denied = |error: &ModelError| error.kind() == ModelErrorKind::Denied;
        let held = served.credentials.clone();
        Some(Renewal {
            denied: held.as_ref().is_some_and(Credentials::are_awaited)
                || matches!(&*served.fill.state.borrow(), Filling::Failed(error) if denied(error)),
            held,
            mount: Arc::clone(&served.mount),
        })
    }

    /// Uses the keys of `want` for what is served, if the origin takes them. Under no lock: others need the model while
    /// the origin is asked. Keys that it took for the same `artifact` not long ago replace others only where it takes those no more: two
    /// tenants that renew theirs in turn do not have it asked each time. `is_lost`: `want` had some in an earlier process.
    pub(super) async fn renew(
        &self,
        renewal: Renewal,
        want: &Want,
        artifact: Digest,
        is_lost: bool,
    ) -> Result<(), ModelError> {
        let Some(held) = &renewal.held else {
            return Ok(());
        };
        let Some(keys) = want.keys.as_ref().filter(|keys| keys.has_own()) else {
            // What opens it for one who needs none does so for whoever waits for theirs.
            if held.are_awaited() && !is_lost {
                held.replace(want.keys.clone().unwrap_or_default());
            }
            return Ok(());
        };
        if held.are(keys) {
            return Ok(());
        }
        let tenancy = self.node.tenancy();
        if !renewal.denied && tenancy.has_accepted(&want.reference, artifact, keys) {
            return Ok(());
        }
        let node = self.node(want, Some(&Credentials::new(keys.clone())));
        let inspected = self.unless_ending(node.inspect(&want.reference));
        let found = inspected.await?.map_err(|e| of_node(&e))?;
        if let Meaning::Files(found) = found {
            tenancy.accept(&want.reference, found.digest(), keys);
        }
        held.replace(keys.clone());
        remember(&renewal.mount, held);
        Ok(())
    }
}
