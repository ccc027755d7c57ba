//! The root trees of images, mounted for the snapshotter.
//!
//! A complete image is mounted natively where the machine can do that: then no process is behind it. What is
//! mounted is only metadata, if a container's overlay can take that and the store's objects itself. Any other is a
//! FUSE mount, readable at once, while the rest arrives in the background, also once nobody has it mounted any
//! more; a container that starts after that gets the native root. One chain id may so have several mounts at a
//! time, in `<store>/run/roots/<chain>/{lazy…,native}`; all go when nobody needs the chain. That of an image which
//! is not unpacked yet is for none but itself: nobody knows whether it has the layers that it says. A native root stays
//! for a while when its last container is gone (`parked`): the next start finds it.
//!
//! Native roots outlive this process and are taken over by the next one. So are FUSE mounts where a keeper
//! has them; else they die with it, and are made anew when the snapshotter asks for them again.
//!
//! A claimed image is pinned until containerd has removed its snapshots: the claim was for good.

mod fill;
mod find;
mod left;
mod parked;
mod pinned;
mod whole;

pub use pinned::pinned_images;

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures_util::future::join_all;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use self::{
    fill::Fills,
    find::{Refused, named},
    left::{CLAIMED, owner},
};
use crate::{
    digest::Digest,
    fs::{Fetched, View},
    mount::{
        self, Mount, MountError,
        keeper::{Link, Orphan},
        native::{self, Support},
    },
    node::{Node, NodeError, Resolved, Start},
    reference::Reference,
    snapshotter::{Hints, Root, Roots, RootsError, RootsErrorKind, Usage},
    store::{self, Hold, Placement, StoreError, StoreErrorKind},
    tree::{Inode, Kind},
};

/// Until what could not be taken over is tried once more; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Serves the images that a node knows.
pub struct ImageRoots {
    node: Node,
    config: mount::Config,
    dir: PathBuf,
    keeper: Option<Arc<Link>>,
    /// How complete images are mounted natively, or why they are not.
    native: Result<Support, String>,
    /// Dropped before the mounts that it serves.
    fills: Fills,
    chains: Mutex<HashMap<Digest, Slot>>,
    refused: Mutex<Refused>,
    me: Weak<Self>,
    /// One after the other.
    checks: Arc<tokio::sync::Mutex<()>>,
}

type Slot = Arc<tokio::sync::Mutex<Chain>>;

/// What the keeper remembers of a mount.
#[derive(PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct About {
    chain: String,
    reference: String,
    /// Of the artifact: it fixes all inode numbers.
    digest: String,
}

/// The mounts of one chain id.
#[derive(Default)]
struct Chain {
    lazy: Vec<Lazy>,
    native: Option<Native>,
    /// Since when nobody has the native root.
    parked: Option<Instant>,
}

impl Chain {
    const fn is_empty(&self) -> bool {
        self.lazy.is_empty() && self.native.is_none()
    }
}

/// A native root, and where its objects were when it was looked.
struct Native {
    reference: String,
    root: Root,
    placement: Placement,
}

impl Native {
    /// Where that cannot be seen it is taken for granted.
    fn is_mounted(&self) -> bool {
        native::find(&self.root.dir).map_or(true, |found| found.is_some())
    }
}

/// A FUSE mount and what belongs to it.
struct Lazy {
    reference: String,
    /// Whether the image is known to have the layers that it says.
    is_verified: bool,
    mount: Arc<Mount>,
    _start: Option<Start>,
    _hold: Arc<Hold>,
}

impl Lazy {
    /// Leaves it to the next process.
    async fn leave(self) {
        let mount = Arc::clone(&self.mount);
        // The background fetch goes on meanwhile: who reads what it fetches would be told that it was given up.
        let left = tokio::task::spawn_blocking(move || mount.leave()).await;
        if let Ok(Err(error)) = left {
            tracing::warn!(%error, "a mount was left without a word");
        }
    }
}

impl ImageRoots {
    /// Roots of what `node` knows; the FUSE mounts among them are had by `keeper`, where there is one. Must
    /// be called within a runtime.
    pub fn new(node: Node, config: mount::Config, keeper: Option<Arc<Link>>) -> Arc<Self> {
        let dir = super::run_dir(&node).join("roots");
        let leaves = keeper.as_ref().map(|keeper| keeper.leaves_below(&dir));
        let native = native::available(node.store().root());
        if let Err(why) = &native {
            tracing::warn!(error = %why, "complete images are served by FUSE, too");
        }
        let this = Arc::new_cyclic(|me| Self {
            node,
            config,
            dir,
            keeper,
            native: native.map_err(|why| why.to_string()),
            fills: Fills::default(),
            chains: Mutex::default(),
            refused: Mutex::default(),
            me: Weak::clone(me),
            checks: Arc::default(),
        });
        if let Some(mut leaves) = leaves {
            // A successor asks for them, one by one.
            let roots = Arc::downgrade(&this);
            tokio::spawn(async move {
                while let Some(dir) = leaves.recv().await {
                    let Some(this) = roots.upgrade() else { return };
                    this.leave_one(&dir).await;
                }
            });
        }
        this
    }

    /// Takes over what the keeper has of a process before this one; whether that is all of it. What cannot be served yet
    /// waits there: it is logged, and no error of this process.
    pub async fn adopt(&self) -> bool {
        let Some(keeper) = self.keeper.clone() else {
            return true;
        };
        let mut served = BTreeSet::new();
        let chains: Vec<_> = self.chains.lock().values().cloned().collect();
        for chain in chains {
            let chain = chain.lock().await;
            served.extend(chain.lazy.iter().map(|lazy| lazy.mount.dir().to_owned()));
        }
        let dir = self.dir.clone();
        let found = tokio::task::spawn_blocking(move || -> Result<_, MountError> {
            let (mut found, mut all) = (Vec::new(), true);
            let mut sessions = keeper.sessions()?;
            // Others have mounts there, too.
            sessions.retain(|kept| kept.dir().starts_with(&dir) && !served.contains(kept.dir()));
            for kept in sessions {
                match keeper.find(kept.dir()) {
                    Ok(Some(orphan)) => match serde_json::from_slice::<About>(orphan.about()) {
                        Ok(about) => found.push((kept.dir().to_owned(), orphan, about)),
                        // Nor will this process understand it later.
                        Err(error) => {
                            tracing::error!(dir = %kept.dir().display(), %error, "waits for a server");
                        }
                    },
                    // Ended meanwhile, or nothing that could be found by its name.
                    Ok(None) => {}
                    Err(error) => {
                        tracing::error!(%error, "waits for a server");
                        all = false;
                    }
                }
            }
            Ok((found, all))
        });
        let (found, mut all) = match found.await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                tracing::error!(%error, "what the keeper has is not taken over");
                return false;
            }
            Err(_) => return true,
        };
        for (dir, orphan, about) in found {
            let (chain, image) = (about.chain.clone(), about.reference.clone());
            match self.adopt_one(&dir, orphan, about).await {
                Ok(()) => tracing::info!(chain, image, "goes on being served"),
                Err(error) => {
                    tracing::error!(
                        chain,
                        image,
                        error = format!("{error:#}"),
                        "waits for a server"
                    );
                    all = false;
                }
            }
        }
        all
    }

    /// Tries to take over what waits for a server, until nothing does.
    pub async fn adopt_the_rest(&self) {
        let mut pause = FIRST_PAUSE;
        loop {
            tokio::time::sleep(pause).await;
            if self.adopt().await {
                return;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn adopt_one(&self, dir: &Path, orphan: Orphan, about: About) -> anyhow::Result<()> {
        let (id, digest) = (about.chain.parse()?, about.digest.parse()?);
        let reference: Reference = about.reference.parse()?;
        // It may be of the lowest layers only: then no record is of its digest.
        let resolved = match self.node.image_up_to(&reference, &id).await? {
            Some(resolved) if resolved.artifact.digest() == digest => resolved,
            _ => self.node.resume(&reference, &digest).await?,
        };
        let chain = self.chain(&id);
        let mut chain = chain.lock().await;
        // Somebody may have asked for it meanwhile.
        if chain.lazy.iter().all(|lazy| lazy.mount.dir() != dir) {
            let before = Some((orphan, digest));
            let lazy = self.serve_lazy(&id, dir.to_owned(), resolved, before);
            chain.lazy.push(lazy.await.map_err(anyhow::Error::new)?);
        }
        Ok(())
    }

    /// Leaves what the keeper has to the next process; the rest is unmounted when this is dropped.
    pub async fn leave(&self) {
        let chains: Vec<_> = match self.keeper {
            Some(_) => self.chains.lock().values().cloned().collect(),
            None => Vec::new(),
        };
        // All at once: what is not left in time is left in haste.
        let leaving = chains.into_iter().map(|chain| async move {
            let lazy = std::mem::take(&mut chain.lock().await.lazy);
            for lazy in lazy {
                lazy.leave().await;
            }
        });
        join_all(leaving).await;
        self.unpark_all().await;
        self.fills.stop_all();
        self.node.engine().settle().await;
    }

    async fn leave_one(&self, dir: &Path) {
        let chains: Vec<_> = {
            let chains = self.chains.lock();
            chains
                .iter()
                .map(|(id, slot)| (*id, slot.clone()))
                .collect()
        };
        for (id, chain) in chains {
            let mut chain = chain.lock().await;
            if let Some(at) = (chain.lazy.iter()).position(|lazy| lazy.mount.dir() == dir) {
                chain.lazy.swap_remove(at).leave().await;
                // The next process brings it.
                return self.fills.stop(&id);
            }
        }
    }

    fn chain(&self, id: &Digest) -> Slot {
        Arc::clone(self.chains.lock().entry(*id).or_default())
    }

    /// Drops the entry of a chain that has no mounts and that nobody is about to use.
    fn forget_chain(&self, id: &Digest, slot: Slot) {
        let mut chains = self.chains.lock();
        // The map's own and this one: whoever wants another needs the lock of the map.
        let last = Arc::strong_count(&slot) == 2;
        if last && slot.try_lock().is_ok_and(|chain| chain.is_empty()) {
            chains.remove(id);
        }
    }

    fn dir(&self, chain: &Digest, what: &str) -> PathBuf {
        self.dir.join(&chain.hex()[..32]).join(what)
    }

    /// Mounts an image that is still to come, or goes on serving what a process before this one has
    /// mounted of it, where that was, and as that generation.
    async fn serve_lazy(
        &self,
        id: &Digest,
        dir: PathBuf,
        resolved: Resolved,
        before: Option<(Orphan, Digest)>,
    ) -> Result<Lazy, RootsError> {
        let name = resolved.artifact.reference.clone();
        let (reference, is_verified) = (name.clone(), resolved.is_verified());
        let digest = resolved.artifact.digest();
        let hold = match &before {
            Some((_, served)) => self.node.hold_generation(served).await,
            None => self.node.hold(&name).await,
        };
        let hold = Arc::new(hold.map_err(|e| of_node(&e))?);
        self.node.keep_indexes(&resolved, &digest).await;
        let failed = |why: String| RootsError::new(RootsErrorKind::Failed, why);
        let start = self.node.start(&resolved).await.map_err(|e| of_node(&e))?;
        let contents = Fetched::new(
            self.node.engine().clone(),
            Arc::clone(&resolved.source),
            Arc::clone(&resolved.artifact),
        )
        .on_read(start.as_ref().and_then(Start::on_read));
        let view = View::new(Arc::clone(&resolved.artifact), Arc::new(contents))
            .map_err(|e| failed(e.to_string()))?;
        let (config, runtime) = (self.config.clone(), tokio::runtime::Handle::current());
        let store = Arc::clone(self.node.store());
        let keeper = self.keeper.clone();
        let about = About {
            chain: id.to_string(),
            reference: name.clone(),
            digest: digest.to_string(),
        };
        let mounting = tokio::task::spawn_blocking(move || -> anyhow::Result<Mount> {
            let view = Arc::new(view);
            let orphan = match (before, &keeper) {
                (None, Some(keeper)) => {
                    left::before(keeper, &dir, &about, &store, view.artifact())?
                }
                (before, _) => before.map(|(orphan, _)| orphan),
            };
            if let (Some(orphan), Some(keeper)) = (orphan, &keeper) {
                return Ok(Mount::adopt(view, orphan, &config, runtime, keeper)?);
            }
            // Left by a process that was killed.
            if dir.symlink_metadata().is_err() || mount::find(&dir)?.is_some() {
                let _ = mount::unmount(&dir, true);
            }
            store::run_dir(store.root())?;
            fs::create_dir_all(&dir)?;
            let Some(keeper) = keeper else {
                return Ok(Mount::new(view, &dir, &config, runtime)?);
            };
            let about = serde_json::to_string(&about)?;
            Ok(Mount::kept(view, &dir, &config, runtime, &keeper, &about)?)
        });
        let mount = match mounting.await {
            Ok(mount) => mount.map_err(|e| failed(format!("{e:#}")))?,
            Err(error) => return Err(failed(error.to_string())),
        };
        let mount = Arc::new(mount);
        if let Some(keeper) = &self.keeper {
            // While no server is there, it must not be collected either.
            let files: Vec<_> = hold.files().map(|file| file.as_fd()).collect();
            let held = keeper.hold(mount.dir(), &files);
            held.map_err(|e| failed(e.to_string()))?;
        }
        let (held, of) = (Arc::clone(&hold), (*id, digest, resolved));
        self.fills.begin(&self.me, &self.node, of, held, &mount);
        Ok(Lazy {
            reference,
            is_verified,
            mount,
            _start: start,
            _hold: hold,
        })
    }
}

#[async_trait]
impl Roots for ImageRoots {
    async fn knows(&self, chain_id: &Digest, hints: &Hints) -> Result<bool, RootsError> {
        let named = named(hints);
        let mut known = self.node.knows_chain(chain_id, named.as_ref()).await;
        if matches!(known, Ok(None)) {
            let learned = self.learn_once(named.as_ref(), hints).await;
            if !learned.map_err(|e| of_node(&e))? {
                return Ok(false);
            }
            known = self.node.knows_chain(chain_id, named.as_ref()).await;
        }
        let Some(reference) = known.map_err(|e| of_node(&e))? else {
            return Ok(false);
        };
        let store = Arc::clone(self.node.store());
        let owner = owner(chain_id);
        let claim = move || {
            // The claim is for good: it holds when the tier is gone that the image lies on.
            if !store.has_adopted(&reference)? {
                store.adopt(&reference)?;
            }
            store.pin(&reference, &owner)
        };
        let pinned = tokio::task::spawn_blocking(claim).await;
        match pinned {
            Ok(Ok(())) => Ok(true),
            Ok(Err(error)) if error.kind() == StoreErrorKind::ReadOnly => Ok(true),
            // Another process has removed it meanwhile.
            Ok(Err(error)) if error.kind() == StoreErrorKind::NotFound => Ok(false),
            Ok(Err(error)) => Err(of_node(&error.into())),
            Err(error) => Err(RootsError::new(RootsErrorKind::Failed, error.to_string())),
        }
    }

    async fn root(&self, chain_id: &Digest, hints: &Hints) -> Result<Root, RootsError> {
        let chain = self.chain(chain_id);
        let mut chain = chain.lock().await;
        // Somebody may have unmounted it: whoever gets it then gets an empty directory.
        chain.native.take_if(|native| !native.is_mounted());
        if let Some(native) = &chain.native
            && self.node.store().still_holds(&native.placement)
        {
            let root = native.root.clone();
            chain.parked = None;
            return Ok(root);
        }
        let resolved = self
            .find(chain_id, hints)
            .await
            .map_err(|e| of_node(&e))?
            .ok_or_else(|| {
                let message =
                    format!("the layers of chain id {chain_id} are not in the store any more");
                RootsError::new(RootsErrorKind::Unknown, message)
            })?;
        let (uid, gid) = owner_of(resolved.artifact.tree.inodes());
        let found = |dir: &Path| Root {
            dir: dir.to_owned(),
            contents: Vec::new(),
            uid,
            gid,
        };
        if let Ok(support) = self.native {
            match (self.make_native(chain_id, &mut chain, &resolved, None, support)).await {
                Ok(Some(root)) => return Ok(root),
                Ok(None) => {}
                Err(error) => tracing::warn!(chain = %chain_id, %error, "served by FUSE"),
            }
        }
        // One that was refused stays with the containers that have it.
        while let Some(at) = (chain.lazy.iter()).position(|lazy| lazy.mount.is_refused()) {
            let lazy = chain.lazy.swap_remove(at);
            let detached = tokio::task::spawn_blocking(move || lazy.mount.unmount(true)).await;
            if let Ok(Err(error)) = detached {
                tracing::warn!(%error, "what was refused stays mounted");
            }
        }
        chain.lazy.retain(|lazy| lazy.mount.is_mounted());
        let is_it =
            |lazy: &&Lazy| lazy.is_verified || lazy.reference == resolved.artifact.reference;
        if let Some(lazy) = chain.lazy.iter().find(is_it) {
            return Ok(found(lazy.mount.dir()));
        }
        let mut dir = self.dir(chain_id, "lazy");
        if chain.lazy.iter().any(|lazy| lazy.mount.dir() == dir) {
            let of = Digest::of(resolved.artifact.reference.as_bytes());
            dir = self.dir(chain_id, &format!("lazy-{}", &of.hex()[..16]));
        }
        let lazy = self.serve_lazy(chain_id, dir, resolved, None).await?;
        let dir = lazy.mount.dir().to_owned();
        chain.lazy.push(lazy);
        Ok(found(&dir))
    }

    async fn release(&self, chain_id: &Digest) {
        let slot = self.chain(chain_id);
        let mut chain = slot.lock().await;
        let lazy = std::mem::take(&mut chain.lazy);
        let stays = self.park(chain_id, &mut chain).await;
        let dir = self.dir(chain_id, "");
        let released = tokio::task::spawn_blocking(move || {
            for lazy in lazy {
                let _ = lazy
                    .mount
                    .unmount(false)
                    .or_else(|_| lazy.mount.unmount(true));
                let dir = lazy.mount.dir().to_owned();
                drop(lazy);
                let _ = fs::remove_dir(dir);
            }
            let _ = fs::remove_dir(dir.join("lazy"));
            // Also what a process before this one had mounted.
            if !stays {
                parked::unmount(&dir);
            }
        });
        let _ = released.await;
        drop(chain);
        self.forget_chain(chain_id, slot);
    }

    async fn forget(&self, chain_id: &Digest) {
        self.fills.stop(chain_id);
        let (store, owner) = (Arc::clone(self.node.store()), owner(chain_id));
        let unpinned = tokio::task::spawn_blocking(move || {
            for record in store.records()? {
                if record.pins.contains(&owner) {
                    store.unpin(&record.reference, &owner)?;
                }
            }
            Ok::<_, StoreError>(())
        });
        if let Ok(Err(error)) = unpinned.await {
            tracing::warn!(chain = %chain_id, %error, "an image stays pinned");
        }
        // Nothing more is parked from here on.
        self.unpark(chain_id, |_| true).await;
    }

    async fn sweep(&self, claimed: &BTreeSet<Digest>, used: &BTreeSet<Digest>) {
        // Taken over, for nobody.
        let adopted: Vec<_> = self.chains.lock().keys().copied().collect();
        for chain in adopted.iter().filter(|chain| !used.contains(chain)) {
            self.release(chain).await;
            if !claimed.contains(chain) {
                self.fills.stop(chain);
            }
        }
        let owners = claimed.iter().map(owner).collect();
        let used = used.iter().map(|chain| self.dir(chain, "")).collect();
        let (store, dir) = (Arc::clone(self.node.store()), self.dir.clone());
        let swept = tokio::task::spawn_blocking(move || {
            left::unmount(&dir, &used)?;
            left::unpin(&store, &owners)
        });
        if let Ok(Err(error)) = swept.await {
            let error = format!("{error:#}");
            tracing::warn!(error, "what an earlier process left stays");
        }
    }

    async fn usage(&self, chain_id: &Digest) -> Result<Usage, RootsError> {
        let (bytes, inodes) = self
            .node
            .layer_usage(chain_id)
            .await
            .map_err(|e| of_node(&e))?
            .ok_or_else(|| {
                let message =
                    format!("the layers of chain id {chain_id} are not in the store any more");
                RootsError::new(RootsErrorKind::Unknown, message)
            })?;
        Ok(Usage { bytes, inodes })
    }
}

fn owner_of(inodes: &[Inode]) -> (u32, u32) {
    match inodes.first() {
        Some(Inode {
            kind: Kind::Dir { .. },
            meta,
        }) => (meta.uid, meta.gid),
        _ => (0, 0),
    }
}

fn of_node(error: &NodeError) -> RootsError {
    let kind = match error {
        NodeError::Resolve { .. } | NodeError::Fetch { .. } => RootsErrorKind::Unavailable,
        NodeError::Unknown(_) => RootsErrorKind::Unknown,
        _ => RootsErrorKind::Failed,
    };
    let mut message = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        message = format!("{message}: {cause}");
        next = cause.source();
    }
    RootsError::new(kind, message)
}
