//! Keys that change while a model is served.

use super::{Filling, SharedModels, of_node};
use crate::{
    csi::{ModelError, ModelErrorKind, Want},
    digest::Digest,
    source::{Credentials, Keys},
};

/// The keys of a model that is served, to be replaced.
pub(super) struct Renewal {
    held: Option<Credentials>,
    /// The origin does not take them any more.
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
        Some(Renewal {
            held: served.credentials.clone(),
            denied: matches!(&*served.fill.state.borrow(), Filling::Failed(error) if denied(error)),
        })
    }

    /// Uses the keys of `want` for what is served, if the origin takes them. Under no lock: others need the model while
    /// the origin is asked. Keys that it took for the same `artifact` not long ago replace others only where it takes those no more: two
    /// tenants that renew theirs in turn do not have it asked each time.
    pub(super) async fn renew(
        &self,
        renewal: Renewal,
        want: &Want,
        artifact: Digest,
    ) -> Result<(), ModelError> {
        let (Some(held), Some(keys)) = (&renewal.held, &want.keys) else {
            return Ok(());
        };
        // Of a volume that another process had published they are not known.
        if held.are(keys) || *keys == Keys::default() {
            return Ok(());
        }
        let tenancy = self.node.tenancy();
        if !renewal.denied && tenancy.has_accepted(&want.reference, artifact, keys) {
            return Ok(());
        }
        let node = self.node(want, Some(&Credentials::new(keys.clone())));
        let inspected = self.unless_ending(node.inspect(&want.reference));
        let found = inspected.await?.map_err(|e| of_node(&e))?;
        tenancy.accept(&want.reference, found.digest(), keys);
        held.replace(keys.clone());
        Ok(())
    }
}
