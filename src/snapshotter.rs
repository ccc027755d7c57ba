//! snapshotter: containerd's proxy snapshotter, `containerd.services.snapshots.v1.Snapshots` over a
//! unix socket.
//!
//! It is containerd's own overlay snapshotter, and one thing more: a layer that the node can serve
//! (see [`Roots`]) is *claimed*. containerd asks for a snapshot to unpack the layer into, and says
//! in the label `containerd.io/snapshot.ref` what the unpacked one would be called, which is the
//! chain id of the layers up to it. The answer is ALREADY_EXISTS and a committed snapshot without
//! content of its own; so containerd fetches and unpacks nothing. What stands on a claimed snapshot
//! gets the node's merged tree as its one lower directory, below ordinary layers if there are any.
//!
//! `service` speaks gRPC, `records` is what is on the disk, `held` counts who
//! needs which tree, `mounts`, `filter` and `usage` do what containerd's packages of that name do.
//! `pinned` is the other way round: it tells containerd which images are to stay.
//! Called by `daemon` and `cli`.
//!
//! Names are not split by namespace: containerd makes them unique (`namespace/n/key`) and its
//! garbage collection lists and removes without saying a namespace. Claimed snapshots are shared.
//!
//! Invariants: a snapshot exists from the rename of its record to the unlink of it, whenever the
//! process is killed or the power fails. A committed snapshot never changes but for its labels, and
//! is never removed while another stands on it. A change that was begun is finished though the
//! client goes away. What is written *into* a snapshot is containerd's business: as with its own
//! snapshotter it is durable when the kernel has written it back, unless [`Settings::sync`] is set.

mod error;
mod filter;
mod held;
mod mounts;
mod pinned;
mod records;
mod roots;
mod service;
mod table;
mod usage;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

pub use self::{
    error::{SnapshotError, SnapshotErrorKind},
    mounts::{Mount, check_overlay},
    pinned::keep_pinned,
    records::FORMAT,
    roots::{Hints, NoRoots, Root, Roots, RootsError, RootsErrorKind, Usage},
    service::serve,
};
use self::{
    filter::Filters,
    held::Held,
    records::{Record, Records, Time},
    table::{Line, Table},
};
pub use crate::socket::{Listener, ServeError};
use crate::{
    digest::Digest,
    disk::{Disk, DiskError, RealDisk},
    metrics,
};

/// The label by which containerd says what a snapshot will be called once it is committed.
const TARGET_LABEL: &str = "containerd.io/snapshot.ref";
/// The label by which people see that a snapshot is claimed; other remote snapshotters set it too.
const REMOTE_LABEL: &str = "containerd.io/snapshot/remote";
/// Longest label, key and value together, in bytes; containerd's limit.
const MAX_LABEL: usize = 4096;

/// Settings of this room: `[snapshotter]` in the configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Whether the agent has this face.
    pub enabled: bool,
    /// Where it listens: a unix socket, mode 0600.
    pub address: PathBuf,
    /// Where snapshots are kept: on a file system that overlayfs can write to; `snapshots` in the store by
    /// default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<PathBuf>,
    /// Write what containerd unpacks to the disk before it counts.
    pub sync: bool,
    /// containerd's own socket: what is pinned here is labelled there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub containerd: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            enabled: false,
            address: "/run/hearth/snapshotter.sock".into(),
            root: None,
            sync: false,
            containerd: None,
        }
    }
}

/// How a snapshotter works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Where snapshots are kept; made where it is not there.
    pub root: PathBuf,
    /// Write the content of a snapshot to the disk before it counts as committed.
    pub sync: bool,
}

/// What a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Can be written to, and committed.
    Active,
    /// A read-only look at its parent.
    View,
    /// What others can stand on.
    Committed,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::View => "view",
            Self::Committed => "committed",
        }
    }
}

/// What a snapshot stands on.
struct Below {
    line: Line,
    /// The directories, the topmost first.
    layers: Vec<PathBuf>,
    /// Data-only layers below them.
    contents: Vec<PathBuf>,
    /// The owner of the topmost one, where that is not to be looked at: it may be a mount of this
    /// very process.
    owner: Option<(u32, u32)>,
}

/// A name and an id that are taken for a snapshot in the making; dropped = given back, unless the
/// snapshot is made.
struct Making {
    of: Arc<Snapshotter>,
    name: String,
    id: u64,
}

impl Drop for Making {
    fn drop(&mut self) {
        self.of.table.write().give_back(&self.name, self.id);
    }
}

type Result<T> = std::result::Result<T, SnapshotError>;

/// The snapshots of one directory.
pub struct Snapshotter {
    settings: Settings,
    records: Records,
    table: RwLock<Table>,
    /// Held while something is changed that is there already, or claimed; never across an await.
    changes: Mutex<()>,
    held: Held,
    has_index: bool,
}

impl Snapshotter {
    /// Opens a directory of snapshots, and asks the node for the trees that active ones stand on,
    /// in the background. Must be called within a runtime.
    ///
    /// # Errors
    /// A directory that another process serves, that cannot be written, or whose path cannot stand
    /// in mount options.
    pub fn open(settings: Settings, roots: Arc<dyn Roots>) -> Result<Arc<Self>> {
        Self::open_on(Arc::new(RealDisk), settings, roots)
    }

    /// As [`Snapshotter::open`], with records kept by way of `disk`.
    ///
    /// # Errors
    /// As [`Snapshotter::open`].
    pub fn open_on(
        disk: Arc<dyn Disk>,
        settings: Settings,
        roots: Arc<dyn Roots>,
    ) -> Result<Arc<Self>> {
        mounts::text(&settings.root)?;
        let (records, found) = Records::open(disk, &settings.root)?;
        let table = Table::new(found);
        let this = Arc::new(Self {
            settings,
            records,
            held: Held::new(roots, table.users()),
            table: RwLock::new(table),
            changes: Mutex::new(()),
            has_index: Path::new("/sys/module/overlay/parameters/index").exists(),
        });
        this.bring_back();
        Ok(this)
    }

    /// Has the trees mounted again that snapshots stand on: mounts end with the process.
    fn bring_back(self: &Arc<Self>) {
        let table = self.table.read();
        for record in table.all().filter(|r| r.kind != Kind::Committed) {
            let (this, record) = (Arc::clone(self), record.clone());
            tokio::spawn(async move {
                if let Err(error) = this.below_existing(&record).await {
                    // What a keeper has of it waits there, and stays for it.
                    tracing::warn!(snapshot = record.name, %error, "the root of a running container is not back");
                }
            });
        }
    }

    /// Has the node take away what a process left that was killed half way: mounts that no snapshot stands on, and
    /// claims without one. To be called before anything is served.
    pub async fn sweep(&self) {
        let chains = self.table.read().chains();
        match chains {
            Some((claimed, used)) => self.held.roots().sweep(&claimed, &used).await,
            None => tracing::warn!("not all snapshots can be read: what nobody may need stays"),
        }
    }

    /// Makes an active snapshot, or a view, of `parent` (empty: of nothing).
    ///
    /// # Errors
    /// [`SnapshotError::Claimed`] where the label `containerd.io/snapshot.ref` names layers that the
    /// node serves; a name that is taken; a parent that is missing or not committed.
    pub async fn create(
        self: &Arc<Self>,
        kind: Kind,
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
        namespace: Option<&str>,
    ) -> Result<Vec<Mount>> {
        check_name(key)?;
        check_labels(&labels)?;
        self.table.read().check_new(key, parent)?;
        let hints = Hints::new(namespace, &labels);
        if kind == Kind::Active
            && let Some(target) = labels.get(TARGET_LABEL).and_then(|t| t.parse().ok())
        {
            // Else the claim of one that is being removed could go with it.
            let claim = self.claim(target, parent, &labels, &hints);
            self.held.alone(&target, claim).await?;
        }
        let making = self.reserve(key, parent)?;
        let id = making.id;
        let mut record = Record::new(id, key, parent, kind);
        record.labels = labels;
        record.namespace = hints.namespace;
        let below = self.below(&record).await?;
        let chain = below.line.chain();
        // Not under the lock of changes: containers that start together share the disk's syncs.
        let made = self.clone().blocking(move |this| {
            let owner = match (below.owner, below.layers.first()) {
                (None, Some(layer)) => Some(owner_of(layer)?),
                (owner, _) => owner,
            };
            let mounts = this.mounts_of(&record, &below)?;
            this.records.make_dirs(id, kind, owner)?;
            if let Err(error) = this.records.write(&record) {
                // It may be there nevertheless: when the last step of it failed.
                let _ = this.records.remove(id);
                return Err(error);
            }
            this.table.write().insert(record);
            Ok((mounts, making))
        });
        match made.await {
            Ok((mounts, _)) => Ok(mounts),
            Err(error) => {
                self.let_go(chain, id).await;
                Err(error)
            }
        }
    }

    /// Takes a name for a snapshot upon `parent`, which stays as long.
    fn reserve(self: &Arc<Self>, name: &str, parent: &str) -> Result<Making> {
        let id = self.table.write().reserve(name, parent)?;
        Ok(Making {
            of: Arc::clone(self),
            name: name.to_owned(),
            id,
        })
    }

    /// Makes a committed snapshot for layers that the node serves.
    ///
    /// # Errors
    /// [`SnapshotError::Claimed`] once there is one.
    async fn claim(
        self: &Arc<Self>,
        target: Digest,
        parent: &str,
        labels: &BTreeMap<String, String>,
        hints: &Hints,
    ) -> Result<()> {
        if self.table.read().is_claimed(&target, parent) {
            return Err(SnapshotError::Claimed(target));
        }
        let known = self.held.roots().knows(&target, hints).await;
        if let Err(error) = &known {
            // The image works without hearth as well.
            tracing::warn!(chain = %target, image = image(hints), %error, "containerd unpacks this layer itself");
        }
        if !known.unwrap_or(false) {
            metrics::global().snapshotter_unclaimed.add(1);
            return Ok(());
        }
        let (parent, mut labels) = (parent.to_owned(), labels.clone());
        labels.insert(REMOTE_LABEL.to_owned(), "remote snapshot".to_owned());
        let namespace = hints.namespace.clone();
        let claimed = self.clone().blocking(move |this| {
            let _change = this.changes.lock();
            if this.table.read().is_claimed(&target, &parent) {
                return Ok(());
            }
            let mut name = target.to_string();
            for number in 2.. {
                if this.table.read().is_free(&name) {
                    break;
                }
                // The same layers upon another parent: one that containerd unpacked itself.
                name = format!("{target}#{number}");
            }
            let making = this.reserve(&name, &parent)?;
            let mut record = Record::new(making.id, &name, &parent, Kind::Committed);
            record.labels = labels;
            record.remote = Some(target);
            record.namespace = namespace;
            this.records.write(&record)?;
            this.table.write().insert(record);
            Ok(())
        });
        claimed.await?;
        metrics::global().snapshotter_claimed.add(1);
        tracing::info!(chain = %target, image = image(hints), "claimed: containerd neither fetches nor unpacks this layer");
        Err(SnapshotError::Claimed(target))
    }

    /// The mounts of an active snapshot or a view.
    ///
    /// # Errors
    /// One that is missing or committed; a tree that the node cannot serve.
    pub async fn mounts(self: &Arc<Self>, key: &str) -> Result<Vec<Mount>> {
        let record = self.table.read().get(key)?.clone();
        if record.kind == Kind::Committed {
            return Err(SnapshotError::State(format!(
                "snapshot {key} is committed: only active ones and views can be mounted"
            )));
        }
        let below = self.below_existing(&record).await?;
        self.mounts_of(&record, &below)
    }

    /// Makes the active snapshot `key` the committed one `name`, with these labels only.
    ///
    /// # Errors
    /// A name that is taken; a snapshot that is missing or not active.
    pub async fn commit(
        self: &Arc<Self>,
        name: &str,
        key: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<()> {
        check_name(name)?;
        check_labels(&labels)?;
        let (name, key) = (name.to_owned(), key.to_owned());
        let committed = self.clone().blocking(move |this| {
            let id = this.table.read().check_commit(&name, &key)?;
            if this.settings.sync {
                this.records.sync()?;
            }
            let usage = this.usage_on_disk(id)?;
            let _change = this.changes.lock();
            this.table.read().check_commit(&name, &key)?;
            let before = this.table.read().get(&key)?.clone();
            let chain = this.table.read().line(&before)?.chain();
            let _making = this.reserve(&name, &before.parent)?;
            let mut record = Record::new(id, &name, &before.parent, Kind::Committed);
            record.labels = labels;
            record.usage = usage;
            record.namespace = before.namespace.clone();
            this.records.write(&record)?;
            let mut table = this.table.write();
            table.remove(&key);
            table.insert(record);
            Ok((chain, id))
        });
        let (chain, id) = committed.await?;
        self.let_go(chain, id).await;
        Ok(())
    }

    /// Removes a snapshot; its files go with the next [`Snapshotter::cleanup`].
    ///
    /// # Errors
    /// One that is missing, or on which another stands.
    pub async fn remove(self: &Arc<Self>, key: &str) -> Result<()> {
        let key = key.to_owned();
        let removed = self.clone().blocking(move |this| {
            let _change = this.changes.lock();
            let (id, chain, claimed) = {
                let table = this.table.read();
                let record = table.check_remove(&key)?;
                let is_user = record.kind != Kind::Committed;
                // One whose parent was lost can be removed nevertheless.
                let chain = table.line(record).ok().filter(|_| is_user);
                (
                    record.id,
                    chain.and_then(|line| line.chain()),
                    record.remote,
                )
            };
            this.records.remove(id)?;
            this.table.write().remove(&key);
            Ok((chain, id, claimed))
        });
        let (chain, id, claimed) = removed.await?;
        self.let_go(chain, id).await;
        if let Some(claimed) = claimed {
            let forget = async {
                // Another namespace, or another parent, may have it claimed as well.
                if !self.table.read().claims(&claimed) {
                    self.held.roots().forget(&claimed).await;
                }
            };
            self.held.alone(&claimed, forget).await;
        }
        Ok(())
    }

    /// Replaces labels: those that `paths` name (`labels.<name>`), or all (`labels`, or no path).
    /// An empty value removes a label.
    ///
    /// # Errors
    /// A snapshot that is missing; a path that is not of labels.
    async fn update(
        self: &Arc<Self>,
        name: &str,
        mut labels: BTreeMap<String, String>,
        paths: Vec<String>,
    ) -> Result<Record> {
        let name = name.to_owned();
        self.clone()
            .blocking(move |this| {
                let _change = this.changes.lock();
                let mut record = this.table.read().get(&name)?.clone();
                if paths.is_empty() {
                    record.labels = std::mem::take(&mut labels);
                }
                for path in &paths {
                    if path == "labels" {
                        record.labels = labels.clone();
                    } else if let Some(label) = path.strip_prefix("labels.") {
                        let value = labels.get(label).cloned().unwrap_or_default();
                        record.labels.insert(label.to_owned(), value);
                    } else {
                        return Err(SnapshotError::Invalid(format!(
                            "cannot update {path:?} of snapshot {name}: only labels can change"
                        )));
                    }
                }
                record.labels.retain(|_, value| !value.is_empty());
                check_labels(&record.labels)?;
                record.updated = Time::now();
                this.records.write(&record)?;
                this.table.write().insert(record.clone());
                Ok(record)
            })
            .await
    }

    /// What a snapshot takes on the disk, without what it stands on.
    ///
    /// # Errors
    /// One that is missing; files that cannot be looked at.
    pub async fn usage(self: &Arc<Self>, key: &str) -> Result<Usage> {
        let record = self.table.read().get(key)?.clone();
        match (record.kind, record.remote) {
            (Kind::Active, _) => {
                let usage = self.clone().blocking(move |this| {
                    let found = this.usage_on_disk(record.id);
                    // Removed meanwhile: then that is the answer.
                    this.table.read().get(&record.name)?;
                    found
                });
                usage.await
            }
            (_, Some(chain)) => {
                let usage = self.held.roots().usage(&chain).await;
                usage.map_err(|e| roots_error(&record, &record, chain, e))
            }
            _ => Ok(record.usage),
        }
    }

    /// Frees the files of removed snapshots.
    ///
    /// # Errors
    /// The directory cannot be read. What cannot be freed is logged, and tried again the next time.
    pub async fn cleanup(self: &Arc<Self>) -> Result<()> {
        self.clone()
            .blocking(|this| {
                let orphans = {
                    let _change = this.changes.lock();
                    let table = this.table.read();
                    this.records.orphans(|id| table.knows_id(id))?
                };
                for dir in orphans {
                    if let Err(error) = remove_all(&dir) {
                        tracing::warn!(dir = %dir.display(), %error, "cannot free the files of a removed snapshot");
                    }
                }
                Ok(())
            })
            .await
    }

    fn stat(&self, key: &str) -> Result<Record> {
        self.table.read().get(key).cloned()
    }

    fn list(&self, filters: &Filters) -> Vec<Record> {
        let table = self.table.read();
        table
            .all()
            .filter(|r| filters.matches(r))
            .cloned()
            .collect()
    }

    /// What a snapshot stands on, with the node's tree mounted for it.
    async fn below(&self, record: &Record) -> Result<Below> {
        let line = self.table.read().line(record)?;
        let content = |id: &u64| self.records.content(*id);
        let mut below = Below {
            layers: line.own.iter().map(content).collect(),
            contents: Vec::new(),
            owner: None,
            line,
        };
        if let Some(remote) = &below.line.remote
            && let Some(chain) = remote.remote
        {
            let hints = Hints::new(remote.namespace.as_deref(), &remote.labels);
            let root = self.held.hold(&chain, &hints, record.id).await;
            let root = root.map_err(|e| roots_error(record, remote, chain, e))?;
            below.owner = below.layers.is_empty().then_some((root.uid, root.gid));
            below.layers.push(root.dir);
            below.contents = root.contents;
        }
        Ok(below)
    }

    /// As [`Self::below`] for a snapshot that is there, and may be committed or removed meanwhile.
    async fn below_existing(&self, record: &Record) -> Result<Below> {
        let below = self.below(record).await?;
        let is_there = |now: &Record| now.id == record.id && now.kind != Kind::Committed;
        if !self.table.read().get(&record.name).is_ok_and(is_there) {
            self.let_go(below.line.chain(), record.id).await;
            return Err(SnapshotError::NotFound(record.name.clone()));
        }
        Ok(below)
    }

    /// Snapshot `id` does not need the tree any more.
    async fn let_go(&self, chain: Option<Digest>, id: u64) {
        if let Some(chain) = chain {
            self.held.let_go(&chain, id).await;
        }
    }

    fn mounts_of(&self, record: &Record, below: &Below) -> Result<Vec<Mount>> {
        mounts::mounts(&mounts::Parts {
            kind: record.kind,
            content: &self.records.content(record.id),
            work: &self.records.work(record.id),
            layers: &below.layers,
            contents: &below.contents,
            has_index: self.has_index,
        })
    }

    fn usage_on_disk(&self, id: u64) -> Result<Usage> {
        let dir = self.records.content(id);
        usage::disk_usage(&dir).map_err(|e| DiskError::new("count the blocks of", dir, e).into())
    }

    /// Runs work that touches the disk off the async threads.
    async fn blocking<T: Send + 'static>(
        self: Arc<Self>,
        work: impl FnOnce(&Arc<Self>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        match tokio::task::spawn_blocking(move || work(&self)).await {
            Ok(done) => done,
            Err(failed) => match failed.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is going down, and so is whoever waits here.
                Err(_) => std::future::pending().await,
            },
        }
    }
}

fn image(hints: &Hints) -> &str {
    hints.image.as_deref().unwrap_or("unknown")
}

fn roots_error(
    record: &Record,
    remote: &Record,
    chain: Digest,
    source: RootsError,
) -> SnapshotError {
    let hints = Hints::new(None, &remote.labels);
    SnapshotError::Roots {
        name: record.name.clone(),
        image: image(&hints).to_owned(),
        chain,
        source,
    }
}

fn owner_of(dir: &Path) -> Result<(u32, u32)> {
    use std::os::unix::fs::MetadataExt as _;
    let meta = std::fs::symlink_metadata(dir).map_err(|e| DiskError::new("stat", dir, e))?;
    Ok((meta.uid(), meta.gid()))
}

fn remove_all(path: &Path) -> std::io::Result<()> {
    match path.symlink_metadata()?.is_dir() {
        true => std::fs::remove_dir_all(path),
        false => std::fs::remove_file(path),
    }
}

fn check_name(name: &str) -> Result<()> {
    match name.is_empty() {
        true => Err(SnapshotError::Invalid("a snapshot needs a name".into())),
        false => Ok(()),
    }
}

fn check_labels(labels: &BTreeMap<String, String>) -> Result<()> {
    match labels.iter().find(|(k, v)| k.len() + v.len() > MAX_LABEL) {
        Some((key, _)) => {
            let start: String = key.chars().take(64).collect();
            Err(SnapshotError::Invalid(format!(
                "label {start:?} and its value are longer than {MAX_LABEL} bytes"
            )))
        }
        None => Ok(()),
    }
}
