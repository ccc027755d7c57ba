//! Models, mounted for the CSI driver: each once, in `<store>/run/csi/mounts/<model>`, however many volumes are of it.
//!
//! A model is a generation in a layout; its name is made of these, so the next process finds the same one in the same
//! place. With a keeper the mounts outlive this process, and are taken over by the next one; without, they end with it,
//! and are made anew. Many volumes at once share what they ask of an origin and of the disk: no lock is held while either
//! is waited for, but for a model that nobody has mounted yet.

mod error;
mod fill;
mod renew;
mod together;

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::sync::watch;

pub(super) use self::error::of_node;
use self::{
    error::failed,
    fill::{Fill, Filling},
    together::Together,
};
use super::describe;
use crate::{
    csi::{Layout, Model, ModelError, ModelErrorKind, Models, Status, User, Want},
    digest::Digest,
    fetch::VerifyPolicy,
    fs::{Fetched, View, hub},
    mount::{self, Mount, keeper::Link},
    node::{Node, NodeError, Resolved},
    reference::Locator,
    source::{Credentials, Keys},
    store::{Hold, StoreErrorKind},
};

/// How pins of volumes begin.
const PINS: &str = "csi-";

/// Serves the models that volumes are of.
pub struct SharedModels {
    node: Node,
    /// The same, serving only what is verified as a whole; made when it is first needed.
    strict: OnceLock<Node>,
    config: mount::Config,
    dir: PathBuf,
    keeper: Option<Arc<Link>>,
    slots: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Slot>>>>,
    finds: Together<Question, Result<Found, ModelError>>,
    /// Nobody waits for an origin any more: whoever asks is to ask the next process.
    ending: watch::Sender<bool>,
    /// Nothing is mounted any more: the next process does.
    left: AtomicBool,
}

/// A model and who needs it.
#[derive(Default)]
struct Slot {
    users: BTreeSet<String>,
    served: Option<Served>,
}

/// What is asked of an origin.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Question {
    reference: String,
    generation: Option<Digest>,
    strict: bool,
    /// Of the keys.
    keys: Option<Digest>,
    /// There were others.
    is_lost: bool,
}

/// What came of it. Whoever asked the same has the same credentials.
#[derive(Clone)]
struct Found {
    node: Node,
    resolved: Resolved,
    /// Of the artifact.
    digest: Digest,
    credentials: Option<Credentials>,
    /// Until it is served, which holds it, too.
    _hold: Option<Arc<Hold>>,
}

/// A mounted model and what belongs to it.
struct Served {
    model: Model,
    mount: Arc<Mount>,
    node: Node,
    resolved: Resolved,
    credentials: Option<Credentials>,
    fill: Fill,
    _holds: Vec<Hold>,
}

impl SharedModels {
    /// Models of `node`, kept by `keeper` where there is one. Must be called within a runtime.
    pub fn new(node: Node, config: mount::Config, keeper: Option<Arc<Link>>) -> Arc<Self> {
        let dir = super::run_dir(&node).join("csi/mounts");
        let leaves = keeper.as_ref().map(|keeper| keeper.leaves_below(&dir));
        let this = Arc::new(Self {
            node,
            strict: OnceLock::new(),
            config,
            dir,
            keeper,
            slots: Mutex::default(),
            finds: Together::default(),
            ending: watch::Sender::new(false),
            left: AtomicBool::new(false),
        });
        if let Some(mut leaves) = leaves {
            // A successor asks for them, one by one.
            let models = Arc::downgrade(&this);
            tokio::spawn(async move {
                while let Some(dir) = leaves.recv().await {
                    let Some(this) = models.upgrade() else { return };
                    this.leave(&dir).await;
                }
            });
        }
        this
    }

    /// Has everybody who waits for an origin ask again, so that what is under way can be finished.
    pub fn stop(&self) {
        self.ending.send_replace(true);
    }

    async fn unless_ending<T>(&self, work: impl Future<Output = T>) -> Result<T, ModelError> {
        let mut ending = self.ending.subscribe();
        tokio::select! {
            done = work => Ok(done),
            _ = ending.wait_for(|ending| *ending) => Err(ModelError::new(
                ModelErrorKind::Unavailable,
                "this process is ending: ask again",
            )),
        }
    }

    /// Leaves all mounts to the next process, where a keeper has them. Nothing is mounted from now on.
    pub async fn leave_all(&self) {
        self.left.store(true, Relaxed);
        if self.keeper.is_some() {
            let slots: Vec<_> = self.slots.lock().keys().cloned().collect();
            // All at once: what is not left in time is left in haste.
            let leaving = slots.into_iter().map(|id| async move {
                self.leave(&self.dir.join(id)).await;
            });
            join_all(leaving).await;
        }
        self.node.engine().settle().await;
    }

    async fn leave(&self, dir: &Path) {
        let id = dir.file_name().unwrap_or_default().to_string_lossy();
        let Some(slot) = self.slots.lock().get(&*id).cloned() else {
            return;
        };
        let Some(served) = slot.lock().await.served.take() else {
            return;
        };
        let mount = served.mount;
        let left = tokio::task::spawn_blocking(move || mount.leave()).await;
        // Not before: who reads what it fetches would be told that it was given up.
        drop(served.fill);
        if let Ok(Err(error)) = left {
            tracing::warn!(%error, "a mount was not left in order");
        }
    }

    fn slot(&self, id: &str) -> Arc<tokio::sync::Mutex<Slot>> {
        Arc::clone(self.slots.lock().entry(id.to_owned()).or_default())
    }

    fn existing(&self, id: &str) -> Option<Arc<tokio::sync::Mutex<Slot>>> {
        self.slots.lock().get(id).cloned()
    }

    /// The node that serves as `want` says.
    fn node(&self, want: &Want, credentials: Option<&Credentials>) -> Node {
        let is_strict = self.node.engine().config().verify == VerifyPolicy::Strict;
        let node = match want.strict && !is_strict {
            true => self
                .strict
                .get_or_init(|| self.node.with_verify(VerifyPolicy::Strict)),
            false => &self.node,
        };
        match credentials {
            Some(credentials) => node.with_credentials(credentials.clone()),
            None => node.clone(),
        }
    }

    /// Mounts a model, or takes its mount over.
    async fn serve(&self, id: &str, want: &Want, found: Found) -> Result<Served, ModelError> {
        let Found {
            node,
            resolved,
            digest,
            credentials,
            _hold,
        } = found;
        let artifact = Arc::clone(&resolved.artifact);
        let mut holds = Vec::new();
        match node.hold(&artifact.reference).await {
            Ok(hold) => holds.push(hold),
            // The generation suffices.
            Err(error) => tracing::debug!(%error, "its reference is not recorded any more"),
        }
        let hold = node.hold_generation(&digest).await;
        holds.push(hold.map_err(|e| of_node(&e))?);
        let view = view(&node, &resolved, want)?;
        let (config, runtime) = (self.config.clone(), tokio::runtime::Handle::current());
        let (dir, keeper) = (self.dir.join(id), self.keeper.clone());
        let about = serde_json::json!({ "digest": digest.to_string() }).to_string();
        let files: Vec<_> = holds
            .iter()
            .flat_map(Hold::files)
            .filter_map(|file| file.try_clone().ok())
            .collect();
        let mounted = blocking(move || {
            let mount = mount_on(&dir, view, &config, runtime, keeper.as_ref(), &about)?;
            if let Some(keeper) = &keeper {
                // While no process is there, it must not be collected either.
                let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
                keeper.hold(mount.dir(), &files)?;
            }
            Ok(mount)
        });
        let mount = mounted.await?;
        let model = Model {
            id: id.to_owned(),
            reference: artifact.reference.clone(),
            generation: digest,
            dir: mount.dir().to_owned(),
            connection: mount.connection(),
        };
        let mount = Arc::new(mount);
        if let Some(credentials) = &credentials {
            remember(&mount, credentials);
        }
        Ok(Served {
            model,
            fill: Fill::start(node.clone(), resolved.clone(), Arc::downgrade(&mount)),
            mount,
            node,
            resolved,
            credentials,
            _holds: holds,
        })
    }

    /// What `want` means, at the origin or as that generation.
    async fn find(
        &self,
        want: &Want,
        generation: Option<Digest>,
        is_lost: bool,
    ) -> Result<Found, ModelError> {
        let credentials = match (&want.keys, generation) {
            (Some(keys), Some(digest)) if is_lost => {
                Some(self.keys_before(&model_id(&digest, want), keys).await)
            }
            (keys, _) => keys.clone().map(Credentials::new),
        };
        let node = self.node(want, credentials.as_ref());
        let guarded = node.guard(&want.reference, want.keys.as_ref());
        self.unless_ending(guarded)
            .await?
            .map_err(|e| of_node(&e))?;
        let resolved = self.unless_ending(async {
            match &generation {
                Some(digest) => {
                    let resolved = node.resume(&want.reference, digest).await;
                    resolved.map(|resolved| (resolved, None))
                }
                None => {
                    let held = node.resolve_held(&want.reference).await;
                    held.map(|(resolved, hold)| (resolved, Some(hold)))
                }
            }
        });
        let (resolved, hold) = resolved.await?.map_err(|e| match (&e, generation) {
            (NodeError::Unknown(_), Some(_)) => ModelError::new(ModelErrorKind::Gone, describe(&e)),
            _ => of_node(&e),
        })?;
        // As it is called where it is mounted.
        let digest = generation.unwrap_or_else(|| resolved.artifact.digest());
        Ok(Found {
            node,
            resolved,
            digest,
            credentials,
            _hold: hold.map(Arc::new),
        })
    }

    /// The keys that an earlier process served a model with, which may be in the memory of its mount; else those of the next
    /// publication. For them who reads is kept waiting as for a server. `keys`: what there is without.
    async fn keys_before(&self, id: &str, keys: &Keys) -> Credentials {
        let (keeper, dir) = (self.keeper.clone(), self.dir.join(id));
        let kept = tokio::task::spawn_blocking(move || {
            let orphan = keeper?.find(&dir).ok().flatten()?;
            Keys::decode(&orphan.secret()?)
        });
        match kept.await.ok().flatten() {
            Some(kept) if keys.alone => Credentials::new(kept.alone()),
            Some(kept) => Credentials::new(kept),
            None => {
                tracing::info!(
                    model = id,
                    "its keys are not known until it is published again"
                );
                let (now, patience) = (Instant::now(), self.config.orphan_timeout);
                let until = now.checked_add(Duration::from_secs(patience));
                Credentials::awaited(keys.clone(), until.unwrap_or(now))
            }
        }
    }

    async fn pin(&self, reference: &str, owner: &str) -> Result<(), ModelError> {
        let store = Arc::clone(self.node.store());
        let (reference, owner) = (reference.to_owned(), owner.to_owned());
        blocking(move || match store.pin(&reference, &owner) {
            // Nothing can be evicted either.
            Err(error) if error.kind() == StoreErrorKind::ReadOnly => Ok(()),
            done => Ok(done?),
        })
        .await
    }
}

#[async_trait]
impl Models for SharedModels {
    fn ready(&self) -> Result<(), ModelError> {
        mount::available().map_err(|e| ModelError::new(ModelErrorKind::Failed, e.to_string()))
    }

    async fn open(
        &self,
        want: &Want,
        generation: Option<Digest>,
        user: &User,
    ) -> Result<Model, ModelError> {
        let tenancy = self.node.tenancy();
        let keys = match user.namespace.as_str() {
            "" => want.keys.clone(),
            namespace => tenancy.keys(namespace, want.keys.clone()),
        };
        // An earlier process had some, and nobody has told them to this one.
        let is_lost = generation.is_some() && want.keys.as_ref().is_some_and(|k| !k.has_own());
        let want = &Want {
            keys,
            ..want.clone()
        };
        if let Some(digest) = generation {
            let id = model_id(&digest, want);
            if let Some(renewal) = self.renewal(&id, Some(&user.id)).await {
                self.renew(renewal, want, digest, is_lost).await?;
                let slot = self.slot(&id);
                let mut slot = slot.lock().await;
                let is_user = slot.users.contains(&user.id);
                if let Some(served) = &mut slot.served
                    && is_user
                    && served.is_alive()
                {
                    served.go_on();
                    return Ok(served.model.clone());
                }
            }
        }
        let question = Question {
            reference: want.reference.to_string(),
            generation,
            strict: want.strict,
            keys: want.keys.as_ref().map(Keys::fingerprint),
            is_lost,
        };
        let found = self
            .finds
            .run(question, self.find(want, generation, is_lost))
            .await?;
        let artifact = Arc::clone(&found.resolved.artifact);
        let (reference, digest) = (artifact.reference.clone(), found.digest);
        // What was published once was proved then.
        if generation.is_none() {
            let keys = want.keys.as_ref();
            let proved = found.node.prove(&want.reference, keys, &found.resolved);
            self.unless_ending(proved).await?.map_err(|e| of_node(&e))?;
        }
        let size = artifact.size();
        let id = model_id(&digest, want);
        if let Some(renewal) = self.renewal(&id, None).await {
            self.renew(renewal, want, digest, is_lost).await?;
        }
        let slot = self.slot(&id);
        let mut slot = slot.lock_owned().await;
        if self.left.load(Relaxed) {
            let message = "this process is ending";
            return Err(ModelError::new(ModelErrorKind::Unavailable, message));
        }
        match &mut slot.served {
            Some(served) if served.is_alive() => served.go_on(),
            served => {
                if let Some(before) = served.take() {
                    before.give_up().await;
                }
                match self.serve(&id, want, found).await {
                    Ok(new) => *served = Some(new),
                    Err(error) => {
                        self.tidy(&id, slot);
                        return Err(error);
                    }
                }
            }
        }
        let model = slot.served.as_ref().map(|served| served.model.clone());
        let gone = || ModelError::new(ModelErrorKind::Failed, "it is served no more");
        let model = model.ok_or_else(gone)?;
        // Before the lock goes: whoever closes the model for another leaves it to this one. It is held by now, so it cannot
        // be evicted before it is pinned.
        slot.users.insert(user.id.clone());
        drop(slot);
        let charged = match user.namespace.as_str() {
            "" => Ok(false),
            namespace => {
                let what = (reference.as_str(), digest, size);
                tenancy.charge(namespace, &user.owner, what, generation.is_some())
            }
        };
        let kept = match charged {
            Ok(new) => match self.pin(&reference, &user.owner).await {
                // Somebody uses it: to take it away would be worse.
                Err(error) if generation.is_some() => {
                    tracing::error!(reference, owner = user.owner, %error, "it may be evicted once it is not mounted");
                    Ok(())
                }
                Err(error) => {
                    if new {
                        tenancy.release(&user.owner, |kept| kept != reference);
                    }
                    Err(error)
                }
                done => done,
            },
            Err(error) => Err(ModelError::new(ModelErrorKind::NoSpace, error.to_string())),
        };
        match kept {
            Ok(()) => Ok(model),
            Err(error) => {
                self.close(&id, &user.id).await;
                Err(error)
            }
        }
    }

    async fn complete(&self, model: &str) -> Result<(), ModelError> {
        let gone = || ModelError::new(ModelErrorKind::Unavailable, "it is not served any more");
        let slot = self.existing(model).ok_or_else(gone)?;
        let mut state = match &slot.lock().await.served {
            Some(served) => served.fill.state.clone(),
            None => return Err(gone()),
        };
        drop(slot);
        let done = state.wait_for(|state| !matches!(state, Filling::Going));
        match &*self.unless_ending(done).await?.map_err(|_| gone())? {
            Filling::Failed(error) => Err(error.clone()),
            _ => Ok(()),
        }
    }

    async fn close(&self, model: &str, user: &str) {
        let Some(slot) = self.existing(model) else {
            return;
        };
        let mut slot = slot.lock_owned().await;
        slot.users.remove(user);
        if !slot.users.is_empty() {
            return;
        }
        if let Some(served) = slot.served.take() {
            let mount = Arc::clone(&served.mount);
            let unmounted = tokio::task::spawn_blocking(move || {
                mount.unmount(false).or_else(|_| mount.unmount(true))
            });
            if let Ok(Err(error)) = unmounted.await {
                tracing::warn!(%error, "a model stays mounted");
            }
            drop(served);
        }
        self.tidy(model, slot);
    }

    async fn unpin(&self, reference: &str, owner: &str) {
        self.node.tenancy().release(owner, |kept| kept != reference);
        let store = Arc::clone(self.node.store());
        let (name, owner) = (reference.to_owned(), owner.to_owned());
        let unpinned = tokio::task::spawn_blocking(move || store.unpin(&name, &owner)).await;
        match unpinned {
            Ok(Err(error)) if error.kind() != StoreErrorKind::ReadOnly => {
                tracing::warn!(reference, %error, "it stays pinned");
            }
            _ => {}
        }
    }

    async fn status(&self, model: &str) -> Option<(Model, Status)> {
        let slot = self.existing(model)?;
        let slot = slot.lock().await;
        let served = slot.served.as_ref()?;
        let artifact = &served.resolved.artifact;
        let shown = served.fill.progress.snapshot();
        let bytes = artifact.size();
        let filling = served.fill.state.borrow().clone();
        let trouble = match &filling {
            Filling::Failed(error) => Some(error.to_string()),
            _ if !served.is_alive() => Some("its mount is gone".to_owned()),
            Filling::Done => None,
            Filling::Going => shown
                .as_ref()
                .and_then(|s| Some(s.trouble.as_ref()?.error.clone())),
        };
        let present = match filling {
            Filling::Done => bytes,
            _ => shown.map_or(0, |s| s.present_bytes),
        };
        let status = Status {
            bytes,
            present,
            inodes: artifact.tree.inodes().len() as u64,
            trouble,
        };
        Some((served.model.clone(), status))
    }

    async fn sweep(&self, owners: &BTreeSet<String>, models: &BTreeSet<String>) {
        let (store, owners) = (Arc::clone(self.node.store()), owners.clone());
        let (dir, models, keeper) = (self.dir.clone(), models.clone(), self.keeper.clone());
        let swept = blocking(move || {
            for info in mount::mounted().map_err(|e| failed(e.to_string()))? {
                let name = info.mountpoint.strip_prefix(&dir).ok();
                if let Some(id) = name.and_then(Path::to_str)
                    && !models.contains(id)
                {
                    let kept = keeper.as_ref().map(|k| k.abort(&info.mountpoint));
                    if !matches!(kept, Some(Ok(()))) {
                        mount::unmount(&info.mountpoint, true)?;
                    }
                    let _ = fs::remove_dir(&info.mountpoint);
                }
            }
            for record in store.records()? {
                for pin in record.pins {
                    if pin.starts_with(PINS) && !owners.contains(&pin) {
                        store.unpin(&record.reference, &pin)?;
                    }
                }
            }
            Ok(())
        });
        if let Err(error) = swept.await {
            tracing::warn!(%error, "what an earlier process left stays");
        }
    }
}

impl SharedModels {
    /// Removes what there is of a model that is not mounted.
    fn tidy(&self, id: &str, slot: tokio::sync::OwnedMutexGuard<Slot>) {
        if slot.served.is_some() {
            return;
        }
        let _ = fs::remove_dir(self.dir.join(id));
        let mut slots = self.slots.lock();
        drop(slot);
        // Whoever waits for this one has it, too, and makes the model anew in it.
        if slots.get(id).is_some_and(|s| Arc::strong_count(s) == 1) {
            slots.remove(id);
        }
    }
}

impl Served {
    /// Whether it is shown where it is to be, and is what it was said to be.
    fn is_alive(&self) -> bool {
        self.mount.is_mounted() && !self.mount.is_refused()
    }

    /// Makes room for another in its place. Who has it mounted elsewhere keeps it.
    async fn give_up(self) {
        let mount = Arc::clone(&self.mount);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || mount.unmount(true)).await {
            tracing::warn!(%error, "a model stays mounted");
        }
    }

    /// Has the background fetch tried again where it failed.
    fn go_on(&mut self) {
        let has_failed = matches!(*self.fill.state.borrow(), Filling::Failed(_));
        if has_failed {
            let mount = Arc::downgrade(&self.mount);
            self.fill = Fill::start(self.node.clone(), self.resolved.clone(), mount);
        }
    }
}

/// Has the next server know what opens the origin, too.
fn remember(mount: &Mount, credentials: &Credentials) {
    if let Some(keys) = credentials.encode()
        && let Err(error) = mount.remember(&keys)
    {
        tracing::warn!(%error, "the next process will not know its keys");
    }
}

/// The name of a model: the same in every process.
fn model_id(digest: &Digest, want: &Want) -> String {
    let strict = if want.strict { "-strict" } else { "" };
    format!("{}-{}{strict}", &digest.hex()[..32], want.layout)
}

fn view(node: &Node, resolved: &Resolved, want: &Want) -> Result<Arc<View>, ModelError> {
    let artifact = Arc::clone(&resolved.artifact);
    let contents = |artifact| {
        let source = Arc::clone(&resolved.source);
        Arc::new(Fetched::new(node.engine().clone(), source, artifact))
    };
    let view = match (&want.reference.locator, want.layout) {
        (Locator::Hub(repo), Layout::Hub) => {
            let layout =
                hub::layout(&artifact, repo, &repo.path).map_err(|e| failed(e.to_string()))?;
            let artifact = Arc::new(layout.artifact);
            let contents = contents(Arc::clone(&artifact));
            View::with_upper(artifact, contents, &layout.shadows, Default::default())
        }
        _ => View::new(Arc::clone(&artifact), contents(artifact)),
    };
    view.map(Arc::new).map_err(|e| failed(e.to_string()))
}

fn mount_on(
    dir: &Path,
    view: Arc<View>,
    config: &mount::Config,
    runtime: tokio::runtime::Handle,
    keeper: Option<&Arc<Link>>,
    about: &str,
) -> Result<Mount, ModelError> {
    if let Some(keeper) = keeper
        && let Some(orphan) = keeper.find(dir)?
    {
        return Ok(Mount::adopt(view, orphan, config, runtime, keeper)?);
    }
    // Of a process that is gone, and that no keeper has: whoever reads it reads nothing any more.
    while mount::find(dir)?.is_some() {
        mount::unmount(dir, true)?;
    }
    fs::create_dir_all(dir).map_err(|e| failed(format!("{}: {e}", dir.display())))?;
    Ok(match keeper {
        Some(keeper) => Mount::kept(view, dir, config, runtime, keeper, about)?,
        None => Mount::new(view, dir, config, runtime)?,
    })
}

/// Runs what may wait for the disk or the kernel off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ModelError> + Send + 'static,
) -> Result<T, ModelError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(failed(error.to_string())),
    }
}
