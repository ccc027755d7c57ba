//! Brings images to their end that were mounted before they were here: whoever has them mounted meanwhile, and if
//! nobody has, as long as containerd has them claimed. They do not outlive the process: the next one begins with
//! what is mounted then.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;

use super::{ImageRoots, parked};
use crate::{
    digest::Digest,
    mount::Mount,
    node::{Node, Progress, Resolved},
    reference::Reference,
    store::Hold,
};

/// How often to look whether an image that nobody has mounted was removed.
const LOOK: Duration = Duration::from_secs(5);

/// What is being brought.
#[derive(Default)]
pub(super) struct Fills(Mutex<HashMap<Of, Fill>>);

/// A chain, and what it was taken for: artifact and image.
type Of = (Digest, Digest, String);

/// The last mount of it, which is refused where it is not what it says; none once that is decided.
type Served = Option<Weak<Mount>>;

struct Fill {
    task: tokio::task::JoinHandle<()>,
    served: Arc<Mutex<Served>>,
}

impl Drop for Fill {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fills {
    /// Brings what `mount` shows of `chain`; goes on with it where that is under way.
    pub(super) fn begin(
        &self,
        roots: &Weak<ImageRoots>,
        node: &Node,
        (chain, digest, resolved): (Digest, Digest, Resolved),
        hold: Arc<Hold>,
        mount: &Arc<Mount>,
    ) {
        let name = resolved.artifact.reference.clone();
        let of = (chain, digest, name.clone());
        let served = Arc::downgrade(mount);
        let mut fills = self.0.lock();
        fills.retain(|_, fill| !fill.task.is_finished());
        if let Some(fill) = fills.get(&of)
            && let Some(before) = &mut *fill.served.lock()
        {
            *before = served;
            return;
        }
        let served = Arc::new(Mutex::new(Some(served)));
        let (roots, node, shown) = (Weak::clone(roots), node.clone(), Arc::clone(&served));
        let task = tokio::spawn(async move {
            let _hold = hold;
            let progress = Progress::default();
            let brought = tokio::select! {
                brought = node.fill(&resolved, &progress, |_| ()) => brought,
                () = abandoned(&node, &name, &shown) => return,
            };
            let last = shown.lock().take();
            match brought {
                Ok(()) => {
                    if let (Some(roots), Ok(reference)) = (roots.upgrade(), name.parse()) {
                        // It may be let go meanwhile: that waits for this, and must not break it off.
                        tokio::spawn(async move {
                            roots
                                .is_here((&chain, &digest), &reference, &resolved)
                                .await;
                        });
                    }
                }
                Err(error) if error.is_cancelled() => {}
                Err(error) => {
                    let refuted = error.is_refuted();
                    let text = format!("{:#}", anyhow::Error::from(error));
                    tracing::warn!(image = name, error = text, "only what is read is fetched");
                    let mount = last.and_then(|last| last.upgrade());
                    if let Some(mount) = mount.filter(|_| refuted) {
                        mount.refuse(text);
                    }
                }
            }
        });
        fills.insert(of, Fill { task, served });
    }

    /// Breaks off what is brought for `chain`.
    pub(super) fn stop(&self, chain: &Digest) {
        self.0.lock().retain(|of, _| of.0 != *chain);
    }

    /// Breaks off everything.
    pub(super) fn stop_all(&self) {
        self.0.lock().clear();
    }
}

/// Returns once an image that nobody has mounted is not in the store any more.
async fn abandoned(node: &Node, name: &str, served: &Mutex<Served>) {
    let is_served = |served: &Weak<Mount>| served.strong_count() > 0;
    loop {
        tokio::time::sleep(LOOK).await;
        if served.lock().as_ref().is_some_and(is_served) {
            continue;
        }
        let (store, name) = (Arc::clone(node.store()), name.to_owned());
        let record = tokio::task::spawn_blocking(move || store.artifact(&name)).await;
        if matches!(record, Ok(Ok(None))) {
            return;
        }
    }
}

impl ImageRoots {
    /// All of an image came behind those who read it: the next container finds its native root. `digest` is that of the
    /// artifact.
    async fn is_here(
        &self,
        (id, digest): (&Digest, &Digest),
        reference: &Reference,
        resolved: &Resolved,
    ) {
        let Ok(support) = self.native else { return };
        let slot = self.chain(id);
        // First: whoever asks for the root meanwhile would do all of this, too.
        let mut chain = slot.lock().await;
        if chain.native.is_none()
            && let Some((proved, digest)) = self.proved((id, digest), reference, resolved).await
        {
            let is_unused = chain.lazy.is_empty();
            let made = self.make_native(id, &mut chain, &proved, digest, support);
            let made = made.await;
            if let Err(error) = made {
                tracing::debug!(chain = %id, %error, "the native root is made when it is asked for");
            }
            if is_unused && !self.park(id, &mut chain).await {
                let dir = self.dir(id, "");
                let _ = tokio::task::spawn_blocking(move || parked::unmount(&dir)).await;
            }
        }
        drop(chain);
        self.forget_chain(id, slot);
    }

    /// What a fill has brought, as what waits for no check any more, with its digest where that is known.
    async fn proved(
        &self,
        (id, digest): (&Digest, &Digest),
        reference: &Reference,
        resolved: &Resolved,
    ) -> Option<(Resolved, Option<Digest>)> {
        if let Ok(Some(proved)) = self.node.brought(resolved, id).await {
            return Some((proved, Some(*digest)));
        }
        // Something has taken its place: what that is shows by itself.
        let now = self.node.image_up_to(reference, id).await;
        now.ok().flatten().map(|now| (now, None))
    }
}
