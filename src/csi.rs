//! csi: the driver `csi.hearth.dev` of the Container Storage Interface, over a unix socket.
//!
//! A volume is a reference ([`Want`]); it is the same tree for everybody, and read-only. The node has one mount of each
//! model (see [`Models`]); what is published is a read-only bind mount of that. `service` speaks gRPC, `request` reads
//! what is asked, `records` is what is on the disk, `target` binds. Called by `daemon` and `cli`.
//!
//! Invariants: what is published has a record, which is durable before the target is mounted and goes after it is
//! unmounted; a record keeps its model mounted and pinned. One change of a target at a time, however many targets a volume
//! has: only its pin is theirs together. A change that was begun is finished though the client goes away. A volume keeps
//! the generation that it was first published with. Secrets are in memory only.
//!
//! What survives a crash: the records. The next process opens the models again, taking the mounts over where they are
//! kept, and binds again what lost its mount. While a record cannot be read, nothing that an earlier process left is
//! taken away: it may be of that volume.

mod changes;
mod error;
mod models;
mod records;
mod request;
mod service;
mod target;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tracing::Instrument as _;

use self::{
    changes::{Of, Opens},
    records::{Claim, Created, Published, Records},
    request::{Create, Publish},
};
pub use self::{
    error::{CsiError, CsiErrorKind},
    models::{Layout, Mode, Model, ModelError, ModelErrorKind, Models, Status, User, Want},
    records::FORMAT,
    service::serve,
    target::{Binds, Flags, Targets},
};
pub use crate::socket::{Listener, ServeError};
use crate::{
    disk::{Disk, RealDisk},
    metrics,
};

/// The name of the driver.
pub const NAME: &str = "csi.hearth.dev";
/// How long a call waits for another one about the same target.
const PATIENCE: Duration = Duration::from_secs(30);
/// Until a volume that could not be served again is tried once more; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Settings of this room (`[csi]`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Whether the agent has this face.
    pub enabled: bool,
    /// Where it listens: a unix socket, mode 0600; a path, or `unix://` and one.
    pub endpoint: PathBuf,
    /// Whether volumes can be published here. Not beside the external-provisioner: nothing is mounted there.
    pub node: bool,
    /// Let volumes be directories of this node (`file://`): whoever may make a pod can then read them.
    pub allow_files: bool,
    /// Answer a request for a volume to write to with an error. Else it gets the volume, read-only as ever, and an error
    /// (EROFS) when it writes: for workloads that cannot say `readOnly: true`, and for suites that never do (csi-sanity).
    pub refuse_writable: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            enabled: false,
            endpoint: "unix:///run/hearth/csi.sock".into(),
            node: true,
            allow_files: false,
            refuse_writable: true,
        }
    }
}

/// How a driver works.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The store; records are in its `run/csi`. Nothing is published inside it.
    pub store: PathBuf,
    /// What the cluster calls this node.
    pub node_id: String,
    /// The configuration.
    pub config: Config,
}

type Result<T> = std::result::Result<T, CsiError>;

/// The volumes of this node.
pub struct Driver {
    settings: Settings,
    models: Arc<dyn Models>,
    targets: Arc<dyn Targets>,
    records: Records,
    state: Mutex<State>,
    /// One change at a time of a target, and of what all targets of a volume have together.
    changes: Mutex<HashMap<Of, Arc<tokio::sync::Mutex<()>>>>,
}

#[derive(Default)]
struct State {
    /// By [`Published::id`].
    published: BTreeMap<String, Published>,
    /// The same of records that cannot be read: they are there until their volumes are published or unpublished again.
    unreadable: BTreeSet<String>,
    /// By volume.
    created: BTreeMap<String, Created>,
    /// By volume.
    opening: BTreeMap<String, Opens>,
}

/// A volume whose model is open and recorded.
struct Begun {
    model: Model,
    record: Published,
}

impl Drop for Driver {
    fn drop(&mut self) {
        let published = self.state.get_mut().published.len() as u64;
        metrics::global().csi_volumes.sub(published);
    }
}

impl Driver {
    /// Opens the records of a directory, and what they say is published, in the background. Must be called within a
    /// runtime.
    ///
    /// # Errors
    /// A node id that is none; a directory that cannot be written, or that another process serves.
    pub async fn open(
        settings: Settings,
        models: Arc<dyn Models>,
        targets: Arc<dyn Targets>,
    ) -> Result<Arc<Self>> {
        Self::open_on(Arc::new(RealDisk), settings, models, targets).await
    }

    /// As [`Driver::open`], with records kept by way of `disk`.
    ///
    /// # Errors
    /// As [`Driver::open`].
    pub async fn open_on(
        disk: Arc<dyn Disk>,
        settings: Settings,
        models: Arc<dyn Models>,
        targets: Arc<dyn Targets>,
    ) -> Result<Arc<Self>> {
        request::check_node_id(&settings.node_id)?;
        let dir = settings.store.join("run/csi");
        let found = blocking(move || Records::open(disk, &dir)).await??;
        let (records, published, created) = (found.records, found.published, found.created);
        match found.unreadable.is_empty() {
            true => {
                let owners: BTreeSet<_> = published.iter().map(|p| p.claim.owner()).collect();
                let in_use: BTreeSet<_> = published.iter().map(|p| p.model.clone()).collect();
                models.sweep(&owners, &in_use).await;
            }
            false => tracing::warn!("not all volumes can be read: what nobody may need stays"),
        }
        metrics::global().csi_volumes.add(published.len() as u64);
        let state = State {
            published: published.into_iter().map(|p| (p.claim.id(), p)).collect(),
            unreadable: found.unreadable,
            created: created.into_iter().map(|c| (c.volume(), c)).collect(),
            ..State::default()
        };
        let this = Arc::new(Self {
            settings,
            models,
            targets,
            records,
            state: Mutex::new(state),
            changes: Mutex::default(),
        });
        this.bring_back();
        Ok(this)
    }

    /// What it was opened with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Has everything that is published served again: what cannot be now is tried again, as long as it is published.
    fn bring_back(self: &Arc<Self>) {
        let published: Vec<_> = self.state.lock().published.keys().cloned().collect();
        for id in published {
            let driver = Arc::downgrade(self);
            tokio::spawn(async move {
                let mut pause = FIRST_PAUSE;
                loop {
                    // Not for longer: whoever ends waits until nobody has it.
                    let Some(this) = driver.upgrade() else { return };
                    let Some(record) = this.published(&id) else {
                        return;
                    };
                    let Err(error) = this.bring_one_back(&record).await else {
                        return;
                    };
                    drop(this);
                    let (volume, target) = (&record.claim.volume, record.claim.target.display());
                    match pause {
                        FIRST_PAUSE => {
                            tracing::warn!(volume, %target, %error, "a volume is not served yet");
                        }
                        _ => {
                            tracing::debug!(volume, %target, %error, "a volume is still not served")
                        }
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            });
        }
    }

    async fn bring_one_back(self: &Arc<Self>, record: &Published) -> Result<()> {
        let change = self.change_target(&record.claim.target).await?;
        // It may be gone, or be back, by now.
        if self.published(&record.claim.id()).as_ref() != Some(record) {
            return Ok(());
        }
        if self.is_gone(&record.claim.target).await {
            tracing::info!(volume = record.claim.volume, "its pod is gone");
            return self.remove(record).await;
        }
        let (model, record) = self.reopen(record, &record.want()?).await?;
        drop(change);
        if record.claim.mode == Mode::Complete {
            let complete = self.models.complete(&model.id).await;
            complete.map_err(|e| CsiError::of_model(&record.claim.volume, &e))?;
        }
        self.complete(&model, &record).await
    }

    fn published(&self, id: &str) -> Option<Published> {
        self.state.lock().published.get(id).cloned()
    }

    /// Has a volume mounted on its target; fine where it is.
    ///
    /// # Errors
    /// A target where something else is; what the origin or the system says.
    pub(crate) async fn publish(self: &Arc<Self>, asked: Publish) -> Result<()> {
        let asked = Arc::new(asked);
        let done = self.publish_all(&asked).await;
        if done.as_ref().is_err_and(|error| !error.kind().may_pass()) {
            let this = Arc::clone(self);
            let given_up = finish(async move { this.give_up(&Claim::new(&asked)).await });
            if let Err(error) = given_up.await {
                tracing::warn!(%error, "a failed publication is left");
            }
        }
        done
    }

    async fn publish_all(self: &Arc<Self>, asked: &Arc<Publish>) -> Result<()> {
        let (this, begun) = (Arc::clone(self), Arc::clone(asked));
        let Begun { model, record } = finish(async move { this.begin(&begun).await }).await?;
        if asked.want.mode == Mode::Complete {
            let complete = self.models.complete(&model.id).await;
            complete.map_err(|error| CsiError::of_model(&asked.volume, &error))?;
        }
        let this = Arc::clone(self);
        finish(async move { this.complete(&model, &record).await }).await
    }

    /// Opens the model of a volume and records that it is published.
    async fn begin(self: &Arc<Self>, asked: &Publish) -> Result<Begun> {
        let _change = self.change_target(&asked.target).await?;
        let claim = Claim::new(asked);
        if let Some(before) = self.published(&claim.id()) {
            if !before.claim.is_same(&claim) {
                return Err(CsiError::new(
                    CsiErrorKind::AlreadyExists,
                    format!(
                        "volume {} is published at {} already, with other attributes",
                        asked.volume,
                        asked.target.display()
                    ),
                ));
            }
            let (model, record) = self.reopen(&before, &asked.want).await?;
            return Ok(Begun { model, record });
        }
        self.check_outside(&asked.target)?;
        self.check_target(asked)?;
        self.prepare_target(&asked.target).await?;
        let opening = self.opening(&asked.volume).await?;
        let begun = self.begin_anew(asked, claim).await;
        for claim in opening.end().values() {
            self.unpin(claim).await;
        }
        begun
    }

    async fn begin_anew(self: &Arc<Self>, asked: &Publish, claim: Claim) -> Result<Begun> {
        let user = claim.user();
        let opened = self.models.open(&asked.want, None, &user).await;
        let model = opened.map_err(|e| CsiError::of_model(&asked.volume, &e))?;
        let record = Published::new(claim, &asked.want, &model);
        if let Err(error) = self.record(record.clone()).await {
            self.let_go(&record).await;
            return Err(error);
        }
        Ok(Begun { model, record })
    }

    /// The model of what is published, opened again where that is needed.
    async fn reopen(
        self: &Arc<Self>,
        record: &Published,
        want: &Want,
    ) -> Result<(Model, Published)> {
        let user = record.claim.user();
        let failed = |e: ModelError| CsiError::of_model(&record.claim.volume, &e);
        let opened = self.models.open(want, Some(record.generation), &user).await;
        match opened {
            Err(gone) if gone.kind() == ModelErrorKind::Gone => {
                // Collected while nobody had it open.
                tracing::warn!(volume = record.claim.volume, error = %gone, "published as it is now");
                let model = self.models.open(want, None, &user).await.map_err(failed)?;
                let now = Published::new(record.claim.clone(), want, &model);
                self.record(now.clone()).await?;
                if model.id != record.model {
                    self.models.close(&record.model, &user.id).await;
                }
                Ok((model, now))
            }
            Ok(model) => Ok((model, record.clone())),
            Err(error) => Err(failed(error)),
        }
    }

    /// Mounts the target of what was begun, unless it was unpublished meanwhile.
    async fn complete(self: &Arc<Self>, model: &Model, record: &Published) -> Result<()> {
        let _change = self.change_target(&record.claim.target).await?;
        if self.published(&record.claim.id()).as_ref() != Some(record) {
            return Err(CsiError::new(
                CsiErrorKind::Aborted,
                format!("volume {} was unpublished meanwhile", record.claim.volume),
            ));
        }
        self.attach(model, record).await
    }

    /// Takes back what was begun, by this call or an earlier one, and cannot be completed: after an error that is final
    /// the kubelet does not unpublish. What is mounted is left alone: a pod may use it.
    async fn give_up(self: &Arc<Self>, claim: &Claim) -> Result<()> {
        let _change = self.change_target(&claim.target).await?;
        match self.published(&claim.id()) {
            Some(record)
                if record.claim.is_same(claim) && !self.is_mounted(&claim.target).await =>
            {
                self.remove(&record).await
            }
            _ => Ok(()),
        }
    }

    /// What is mounted in the store is not for clients to move.
    fn check_outside(&self, target: &Path) -> Result<()> {
        match target.starts_with(&self.settings.store) {
            true => Err(CsiError::invalid(format!(
                "target_path {} is inside the store",
                target.display()
            ))),
            false => Ok(()),
        }
    }

    /// Nothing else is published at the target.
    fn check_target(&self, asked: &Publish) -> Result<()> {
        let state = self.state.lock();
        let other = state
            .published
            .values()
            .map(|other| &other.claim)
            .find(|other| other.target == asked.target && other.volume != asked.volume);
        match other {
            Some(other) => Err(CsiError::new(
                CsiErrorKind::AlreadyExists,
                format!(
                    "volume {} is published at {}",
                    other.volume,
                    asked.target.display()
                ),
            )),
            None => Ok(()),
        }
    }

    async fn prepare_target(&self, target: &Path) -> Result<()> {
        let (targets, path) = (Arc::clone(&self.targets), target.to_owned());
        blocking(move || targets.check(&path)).await?
    }

    async fn is_attached(&self, model: &Model, record: &Published) -> bool {
        let (targets, model, target) = (
            Arc::clone(&self.targets),
            model.clone(),
            record.claim.target.clone(),
        );
        blocking(move || targets.is_attached(&model, &target))
            .await
            .unwrap_or(false)
    }

    async fn is_mounted(&self, target: &Path) -> bool {
        let (targets, target) = (Arc::clone(&self.targets), target.to_owned());
        let mounted = blocking(move || targets.is_mounted(&target)).await;
        mounted.unwrap_or(true)
    }

    async fn is_gone(&self, target: &Path) -> bool {
        let (targets, target) = (Arc::clone(&self.targets), target.to_owned());
        let gone = blocking(move || targets.is_gone(&target)).await;
        gone.unwrap_or(false)
    }

    async fn attach(&self, model: &Model, record: &Published) -> Result<()> {
        let (targets, model) = (Arc::clone(&self.targets), model.clone());
        let (target, flags) = (record.claim.target.clone(), record.claim.flags);
        blocking(move || targets.attach(&model, &target, flags)).await?
    }

    async fn record(self: &Arc<Self>, record: Published) -> Result<()> {
        let this = Arc::clone(self);
        blocking(move || {
            this.records.write_published(&record)?;
            let id = record.claim.id();
            let mut state = this.state.lock();
            state.unreadable.remove(&id);
            if state.published.insert(id, record).is_none() {
                metrics::global().csi_volumes.add(1);
            }
            Ok(())
        })
        .await?
    }

    /// Has nothing of a volume mounted on its target; fine where nothing is.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) async fn unpublish(self: &Arc<Self>, volume: &str, target: &Path) -> Result<()> {
        self.check_outside(target)?;
        let _change = self.change_target(target).await?;
        let id = records::id(volume, target);
        if let Some(record) = self.published(&id) {
            return self.remove(&record).await;
        }
        // Its record was lost: what is mounted goes, unless it is another volume's.
        let is_unreadable = {
            let state = self.state.lock();
            let mut others = state.published.values();
            if others.any(|p| p.claim.target == target) {
                return Ok(());
            }
            state.unreadable.contains(&id)
        };
        self.detach(target, is_unreadable).await?;
        if is_unreadable {
            let this = Arc::clone(self);
            blocking(move || {
                this.records.remove_published(&id)?;
                this.state.lock().unreadable.remove(&id);
                Ok::<_, CsiError>(())
            })
            .await??;
        }
        Ok(())
    }

    /// Takes back what was published. The target is this call's to change.
    async fn remove(self: &Arc<Self>, record: &Published) -> Result<()> {
        self.detach(&record.claim.target, true).await?;
        let (this, id) = (Arc::clone(self), record.claim.id());
        blocking(move || {
            this.records.remove_published(&id)?;
            if this.state.lock().published.remove(&id).is_some() {
                metrics::global().csi_volumes.sub(1);
            }
            Ok::<_, CsiError>(())
        })
        .await??;
        self.let_go(record).await;
        Ok(())
    }

    async fn detach(&self, target: &Path, ours: bool) -> Result<()> {
        let (targets, target) = (Arc::clone(&self.targets), target.to_owned());
        blocking(move || targets.detach(&target, ours)).await?
    }

    /// Gives the model of a record back, and the pin where that was the last one.
    async fn let_go(&self, record: &Published) {
        self.models
            .close(&record.model, &record.claim.user().id)
            .await;
        self.unpin(&record.claim).await;
    }

    /// How what is published at `path` does.
    ///
    /// # Errors
    /// Nothing of this volume is published there.
    pub(crate) async fn stats(&self, volume: &str, path: &Path) -> Result<Status> {
        let id = records::id(volume, path);
        let abnormal = |why: &str| Status {
            trouble: Some(why.to_owned()),
            ..Status::default()
        };
        let Some(record) = self.published(&id) else {
            if self.state.lock().unreadable.contains(&id) {
                let why = "its record is damaged: it is served once it is published again";
                return Ok(abnormal(why));
            }
            return Err(CsiError::new(
                CsiErrorKind::NotFound,
                format!("volume {volume} is not published at {}", path.display()),
            ));
        };
        let Some((model, mut status)) = self.models.status(&record.model).await else {
            return Ok(abnormal("its model is not served"));
        };
        if !self.is_attached(&model, &record).await {
            status.trouble = Some(format!("nothing is mounted on {}", path.display()));
        }
        Ok(status)
    }

    /// Makes a volume of a class, or finds the one of that name.
    ///
    /// # Errors
    /// One of that name that is another.
    pub(crate) async fn create(self: &Arc<Self>, asked: Create) -> Result<Created> {
        let new = Created::new(&asked);
        let volume = new.volume();
        let _change = self.change_volume(&volume).await?;
        let before = self.state.lock().created.get(&volume).cloned();
        if let Some(before) = before {
            return match before.suits(&asked) {
                true => Ok(before),
                false => Err(CsiError::new(
                    CsiErrorKind::AlreadyExists,
                    format!(
                        "a volume {:?} exists with another size or other parameters",
                        new.name
                    ),
                )),
            };
        }
        let (this, made) = (Arc::clone(self), new.clone());
        blocking(move || {
            this.records.write_created(&made)?;
            this.state.lock().created.insert(made.volume(), made);
            Ok::<_, CsiError>(())
        })
        .await??;
        Ok(new)
    }

    /// The volume of this id, where this process's records have it.
    pub(crate) fn created(&self, volume: &str) -> Option<Created> {
        self.state.lock().created.get(volume).cloned()
    }

    /// Forgets a volume; fine where there is none. Content stays until the store needs the space.
    ///
    /// # Errors
    /// What the disk says.
    pub(crate) async fn delete(self: &Arc<Self>, volume: &str) -> Result<()> {
        let _change = self.change_volume(volume).await?;
        let (this, volume) = (Arc::clone(self), volume.to_owned());
        blocking(move || {
            let known = this.state.lock().created.contains_key(&volume);
            if known {
                this.records.remove_created(&volume)?;
                this.state.lock().created.remove(&volume);
            }
            Ok(())
        })
        .await?
    }

    /// Whether volumes can be published.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn ready(&self) -> Result<()> {
        let ready = match self.settings.config.node {
            true => self.models.ready(),
            false => Ok(()),
        };
        ready.map_err(|e| CsiError::new(CsiErrorKind::FailedPrecondition, e.to_string()))
    }
}

/// Runs `work` to its end, even if the client goes away meanwhile.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(work.in_current_span()).await {
        Ok(done) => done,
        Err(failed) => Err(CsiError::new(CsiErrorKind::Internal, failed.to_string())),
    }
}

/// Runs what may wait for the disk or the kernel off the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| CsiError::new(CsiErrorKind::Internal, e.to_string()))
}
