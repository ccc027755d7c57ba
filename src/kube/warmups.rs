//! The node's side of `Warmup`: what selects this node is brought, pinned, reported in its `NodeCache`, and let go when
//! the `Warmup` is.
//!
//! The node evaluates selectors on its own `Node` object and starts by itself, when the status of the `Warmup` says that
//! it is its turn. While the API server cannot be reached everything stays as it is. What survives a crash: pins are
//! the store's, by the uid of the `Warmup`; how far it was stands in the `NodeCache`.

mod board;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures_util::{StreamExt as _, stream};
use k8s_openapi::{api::core::v1::Node, apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams, PostParams},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{sync::mpsc, task::AbortHandle};

pub use self::board::WarmError;
use self::board::{Board, Step, Work};
use super::{
    cache::{Inventory, Pace},
    client::within,
    crd::{API_VERSION, NodeCache, NodeCacheStatus, NodeView, Warmup, WarmupOnNode},
    random, secrets,
    watch::{Event, Selection, follow},
};
use crate::{metrics, node::Progress, reference::Reference, source::Keys};

/// References of one `Warmup` that are brought at the same time; their objects share one engine.
const REFERENCES_AT_ONCE: usize = 2;
/// How often it is looked at what there is, where nothing is known to have happened.
const LOOK: Duration = Duration::from_secs(60);
/// How often everything is listed anew.
const RELIST: Duration = Duration::from_secs(3600);
/// Pause before a report, or a release, that failed is tried again, at least.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a node can do for warm-ups.
#[async_trait]
pub trait Warmer: Send + Sync + 'static {
    /// Brings a reference, verified, and pins it as the order says.
    async fn warm(&self, order: &Order, progress: &Progress) -> Result<(), WarmError>;
    /// Pins a reference for a namespace where all of it is here already; whether it is. Asks no origin.
    async fn keep(
        &self,
        reference: &Reference,
        owner: &str,
        namespace: &str,
    ) -> Result<bool, WarmError>;
    /// Takes the pins of an owner away, but for those of `keep`.
    async fn release(&self, owner: &str, keep: &[Reference]) -> Result<(), WarmError>;
    /// All owners of pins that begin with [`OWNER`].
    async fn owners(&self) -> Result<Vec<String>, WarmError>;
    /// What there is.
    async fn inventory(&self) -> Result<Inventory, WarmError>;
}

/// How the owners of pins begin; the uid of the `Warmup` follows.
pub const OWNER: &str = "warmup-";

/// A reference that is to be brought.
#[derive(Debug, Clone, PartialEq)]
pub struct Order {
    pub reference: Reference,
    /// The namespace of the `Warmup`: whose it is, and who pays for it.
    pub namespace: String,
    /// The uid of the `Warmup`.
    pub warmup: String,
    /// Who pins it; `None`: nobody.
    pub owner: Option<String>,
    /// What is more important goes first.
    pub priority: i32,
    /// Bytes per second, at most.
    pub bandwidth: Option<u64>,
    /// What opens the origin, where it is not what the node has.
    pub keys: Option<Keys>,
}

/// Settings of the node's side: `[kube.warmups]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Whether the agent has this face.
    pub enabled: bool,
    /// Seconds between two reports of this node, at least, where no `Warmup` says another.
    pub report_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            enabled: false,
            report_seconds: 60,
        }
    }
}

/// What the node's side works with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What the cluster calls this node.
    pub node: String,
    /// Least time between two reports where no `Warmup` says another.
    pub report: Duration,
}

/// Does what `Warmup`s ask of this node. Ends only when it is dropped; what is under way ends with it.
pub async fn run(client: Client, settings: Settings, warmer: Arc<dyn Warmer>) {
    let (done, mut finished) = mpsc::channel(64);
    let mut this = Side {
        warmups: BTreeMap::new(),
        node: None,
        board: Board::default(),
        reported: None,
        before: Vec::new(),
        pace: Pace::new(settings.report),
        last: None,
        tasks: HashMap::new(),
        is_listed: false,
        is_swept: false,
        unreleased: BTreeSet::new(),
        again: None,
        done,
        client,
        settings,
        warmer,
    };
    this.reported = this.reported().await;
    let named = Selection {
        fields: Some(format!("metadata.name={}", this.settings.node)),
        relist: Some(RELIST),
        ..Selection::default()
    };
    let all = Selection {
        relist: Some(RELIST),
        ..Selection::default()
    };
    let nodes = follow(Api::<Node>::all(this.client.clone()), named);
    let warmups = follow(Api::<Warmup>::all(this.client.clone()), all);
    let (mut nodes, mut warmups) = (std::pin::pin!(nodes), std::pin::pin!(warmups));
    let mut listing: Option<BTreeSet<Key>> = None;
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let due = sleep_until(this.pace.due());
        let retry = sleep_until(this.board.next_try());
        let again = sleep_until(this.again);
        tokio::select! {
            Some(event) = nodes.next() => match event {
                Event::Found(node) | Event::Changed(node) => this.node = Some(node.into()),
                // The agent runs on it: it comes back, or this ends.
                Event::Listing | Event::Listed | Event::Gone(_) => continue,
            },
            Some(event) = warmups.next() => match event {
                Event::Listing => { listing = Some(BTreeSet::new()); continue }
                Event::Found(warmup) => {
                    if let Some(listing) = &mut listing {
                        listing.insert(key(&warmup));
                    }
                    this.warmups.insert(key(&warmup), Arc::new(warmup));
                    continue;
                }
                Event::Listed => {
                    this.listed(listing.take().unwrap_or_default()).await;
                    this.is_swept = false;
                }
                Event::Changed(warmup) => drop(this.warmups.insert(key(&warmup), Arc::new(warmup))),
                Event::Gone(warmup) => drop(this.warmups.remove(&key(&warmup))),
            },
            Some(finished) = finished.recv() => this.finished(finished),
            () = due => this.report().await,
            () = retry => {}
            () = again => this.let_go_again().await,
            _ = look.tick() => this.look().await,
        }
        this.sync().await;
    }
}

/// Namespace and name.
type Key = (String, String);

fn key(warmup: &Warmup) -> Key {
    let metadata = &warmup.metadata;
    let (namespace, name) = (metadata.namespace.clone(), metadata.name.clone());
    (namespace.unwrap_or_default(), name.unwrap_or_default())
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// What became of a piece of work.
struct Finished {
    uid: String,
    generation: i64,
    what: Outcome,
}

enum Outcome {
    Checked(bool),
    Warmed(Result<(), WarmError>),
}

/// What work is done with.
struct Means {
    client: Client,
    warmer: Arc<dyn Warmer>,
}

/// A task that ends when nobody wants it any more.
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Side {
    client: Client,
    settings: Settings,
    warmer: Arc<dyn Warmer>,
    warmups: BTreeMap<Key, Arc<Warmup>>,
    node: Option<NodeView>,
    board: Board,
    /// What was reported under the name of this node before this process.
    reported: Option<NodeCache>,
    /// What of it counts.
    before: Vec<WarmupOnNode>,
    pace: Pace,
    /// What was written last, and when.
    last: Option<(Instant, NodeCacheStatus)>,
    tasks: HashMap<String, Task>,
    /// All `Warmup`s are known.
    is_listed: bool,
    /// What is pinned was looked at since the last list.
    is_swept: bool,
    /// Uids of `Warmup`s for which something stayed pinned that was to be let go.
    unreleased: BTreeSet<String>,
    /// When what stayed pinned is looked at again.
    again: Option<Instant>,
    done: mpsc::Sender<Finished>,
}

impl Side {
    fn caches(&self) -> Api<NodeCache> {
        Api::all(self.client.clone())
    }

    /// What was reported before; waits for the server to say so.
    async fn reported(&self) -> Option<NodeCache> {
        loop {
            match within(self.caches().get_opt(&self.settings.node)).await {
                Ok(cache) => return cache,
                Err(error) => {
                    tracing::warn!(%error, "what this node reported before cannot be read yet");
                    tokio::time::sleep(PATIENCE).await;
                }
            }
        }
    }

    /// Goes on with what was reported before, unless that was another node of this name, or another store: a disk that was
    /// emptied has nothing.
    async fn resume(&mut self) {
        let (Some(cache), Some(node)) = (self.reported.take(), &self.node) else {
            return;
        };
        let mut owners = cache.metadata.owner_references.into_iter().flatten();
        let is_other = owners.any(|owner| owner.kind == "Node" && owner.uid != node.uid);
        let status = cache.status.unwrap_or_default();
        match self.warmer.inventory().await {
            // Earlier versions did not say which store.
            Ok(now) if status.store_id.is_empty() || status.store_id == now.store_id => {
                if !is_other {
                    self.before = status.warmups;
                }
            }
            Ok(_) => tracing::info!("what this node reported before was of another store"),
            Err(error) => tracing::warn!(%error, "what is in the store cannot be read"),
        }
    }

    /// All were listed. The list may be old: what is not in it is asked for.
    async fn listed(&mut self, found: BTreeSet<Key>) {
        let missing: Vec<Key> = (self.warmups.keys())
            .filter(|key| !found.contains(key))
            .cloned()
            .collect();
        for key in missing {
            let api = Api::<Warmup>::namespaced(self.client.clone(), &key.0);
            match within(api.get_opt(&key.1)).await {
                Ok(None) => drop(self.warmups.remove(&key)),
                Ok(Some(warmup)) => drop(self.warmups.insert(key, Arc::new(warmup))),
                // The next list comes.
                Err(error) => tracing::debug!(%error, "whether a Warmup is gone is not known yet"),
            }
        }
        if !self.is_listed {
            self.is_listed = true;
            self.pace.changed(Instant::now(), random());
        }
    }

    /// Lets go of what was pinned for `Warmup`s that went, or do not select this node any more, since when no process was
    /// here.
    async fn sweep(&mut self) {
        let swept = async {
            let owners = self.warmer.owners().await?;
            let is_of = |warmup: &Warmup, uid: &str| {
                let selects = self
                    .node
                    .as_ref()
                    .is_none_or(|node| warmup.spec.selects(node));
                warmup.metadata.uid.as_deref() == Some(uid) && selects
            };
            let known = |owner: &String| {
                let uid = owner.strip_prefix(OWNER).unwrap_or_default();
                self.warmups.values().any(|w| is_of(w, uid))
            };
            let owners = owners.into_iter().filter(|owner| owner.starts_with(OWNER));
            let unknown: Vec<String> = owners.filter(|owner| !known(owner)).collect();
            if unknown.is_empty() {
                return Ok::<(), WarmError>(());
            }
            // This time the newest list: pins are not taken away because of an old one.
            let warmups = Api::<Warmup>::all(self.client.clone());
            let listed = match within(warmups.list(&ListParams::default())).await {
                // One that cannot tell how new its own state is: nor does anybody else know better.
                Err(kube::Error::Api(answer)) if matches!(answer.code, 500 | 504) => {
                    within(warmups.list(&ListParams::default().at("0"))).await
                }
                listed => listed,
            };
            let listed = listed.map_err(|error| WarmError {
                reason: "Unavailable",
                message: error.to_string(),
            })?;
            for owner in unknown {
                let uid = owner.strip_prefix(OWNER).unwrap_or_default();
                if !listed.items.iter().any(|w| is_of(w, uid)) {
                    self.warmer.release(&owner, &[]).await?;
                }
            }
            Ok(())
        };
        if let Err(error) = swept.await {
            tracing::warn!(%error, "what was pinned for Warmups that are gone stays pinned for now");
            self.again = Some(Instant::now() + PATIENCE);
        }
    }

    fn finished(&mut self, finished: Finished) {
        let Finished {
            uid,
            generation,
            what,
        } = finished;
        match what {
            Outcome::Checked(is_here) => self.board.checked(&uid, generation, is_here),
            Outcome::Warmed(done) => {
                match &done {
                    Ok(()) => metrics::global().kube_warmups_done.add(1),
                    Err(error) => {
                        metrics::global().kube_warmups_failed.add(1);
                        let mut known = self.warmups.values();
                        let warmup = known.find(|w| w.metadata.uid.as_ref() == Some(&uid));
                        let (namespace, name) = warmup.map(|w| key(w)).unwrap_or_default();
                        tracing::warn!(namespace, name, %error, "a Warmup failed here");
                    }
                }
                self.board.finished(&uid, generation, done, Instant::now());
            }
        }
        self.pace.changed(Instant::now(), random());
    }

    /// Does what there is to do.
    async fn sync(&mut self) {
        if self.is_listed && self.node.is_some() && !self.is_swept {
            self.is_swept = true;
            self.resume().await;
            self.sweep().await;
        }
        let Some(node) = self.node.as_ref().filter(|_| self.is_listed) else {
            return;
        };
        let steps = self
            .board
            .sync(node, self.warmups.values(), &self.before, Instant::now());
        self.pace
            .set(self.board.report_interval().unwrap_or(self.settings.report));
        if steps.is_empty() {
            return;
        }
        self.pace.changed(Instant::now(), random());
        for step in steps {
            match step {
                Step::Cancel(uid) => drop(self.tasks.remove(&uid)),
                Step::Release { uid, keep } => self.release(uid, &keep).await,
                Step::Check(work) => self.spawn(work, check),
                Step::Start(work) => self.spawn(work, warm),
            }
        }
    }

    /// Lets go of what could not be let go.
    async fn let_go_again(&mut self) {
        self.again = None;
        self.is_swept = false;
        for uid in self.unreleased.clone() {
            // As it is now.
            let keep = self.board.kept(&uid);
            self.release(uid, &keep).await;
        }
    }

    /// Lets go of what was pinned for a `Warmup`, but for these; where that fails, again soon.
    async fn release(&mut self, uid: String, keep: &[Reference]) {
        match self.warmer.release(&format!("{OWNER}{uid}"), keep).await {
            Ok(()) => drop(self.unreleased.remove(&uid)),
            Err(error) => {
                tracing::warn!(uid, %error, "something stays pinned for a Warmup for now");
                self.unreleased.insert(uid);
                self.again = Some(Instant::now() + PATIENCE);
            }
        }
    }

    fn spawn<F>(&mut self, work: Work, what: fn(Means, Work) -> F)
    where
        F: Future<Output = Outcome> + Send + 'static,
    {
        let (uid, generation) = (work.uid.clone(), work.generation);
        let (done, named) = (self.done.clone(), uid.clone());
        let means = Means {
            client: self.client.clone(),
            warmer: Arc::clone(&self.warmer),
        };
        let task = tokio::spawn(async move {
            let what = what(means, work).await;
            let finished = Finished {
                uid,
                generation,
                what,
            };
            // Whoever does not listen any more does not care.
            let _ = done.send(finished).await;
        });
        self.tasks.insert(named, Task(task.abort_handle()));
    }

    /// Sees whether something changed that is worth a report.
    async fn look(&mut self) {
        match self.warmer.inventory().await {
            Ok(inventory) => {
                self.board.compare(&inventory.artifacts);
                self.pace.changed(Instant::now(), random());
            }
            Err(error) => tracing::warn!(%error, "what is in the store cannot be read"),
        }
    }

    async fn report(&mut self) {
        let began = Instant::now();
        if let Err(error) = self.write().await {
            tracing::warn!(error, "the NodeCache was not written");
            self.pace.wrote(began + PATIENCE);
            self.pace.changed(began + PATIENCE, random());
            return;
        }
        self.pace.wrote(began);
        // So that the controller sees that somebody is at it.
        if self.board.is_busy() {
            self.pace.changed(Instant::now(), random());
        }
    }

    async fn write(&mut self) -> Result<(), String> {
        let inventory = self.warmer.inventory().await.map_err(|e| e.to_string())?;
        let wanted = self.board.wants();
        let mut status =
            NodeCacheStatus::new(inventory, self.board.entries(), |r| wanted.contains(r));
        let is_news = |(at, last): &(Instant, NodeCacheStatus)| {
            at.elapsed() > RELIST || !last.says_the_same(&status)
        };
        if !self.board.is_busy() && !self.last.as_ref().is_none_or(is_news) {
            return Ok(());
        }
        let Some(node) = &self.node else {
            return Err("the Node object of this node is not known yet".into());
        };
        status.reported = Some(Time(Timestamp::now()));
        // With the node it goes, too.
        let owners =
            json!([{ "apiVersion": "v1", "kind": "Node", "name": node.name, "uid": node.uid }]);
        put(
            &self.client,
            &self.settings.node,
            &node.uid,
            owners,
            &status,
        )
        .await
        .map_err(|error| error.to_string())?;
        metrics::global().kube_reports.add(1);
        self.last = Some((Instant::now(), status));
        Ok(())
    }
}

/// Writes a status; makes the object where there is none, and takes it over from a node that had the name before.
async fn put(
    client: &Client,
    name: &str,
    uid: &str,
    owners: Value,
    status: &NodeCacheStatus,
) -> kube::Result<()> {
    let caches = Api::<NodeCache>::all(client.clone());
    let patch = Patch::Merge(json!({ "status": status }));
    let params = PatchParams::default();
    let found = match within(caches.patch_status(name, &params, &patch)).await {
        Ok(cache) => cache,
        Err(kube::Error::Api(answer)) if answer.code == 404 => {
            let cache = json!({
                "apiVersion": API_VERSION,
                "kind": "NodeCache",
                "metadata": { "name": name, "ownerReferences": owners },
            });
            let cache = serde_json::from_value(cache).map_err(kube::Error::SerdeError)?;
            let resource = ApiResource::erase::<NodeCache>(&());
            let api = Api::<DynamicObject>::all_with(client.clone(), &resource);
            within(api.create(&PostParams::default(), &cache)).await?;
            within(caches.patch_status(name, &params, &patch)).await?;
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let mut owned = found.metadata.owner_references.into_iter().flatten();
    if !owned.any(|owner| owner.uid == uid) {
        let patch = Patch::Merge(json!({ "metadata": { "ownerReferences": owners } }));
        within(caches.patch(name, &params, &patch)).await?;
    }
    Ok(())
}

/// Sees whether all of it is here.
async fn check(side: Means, work: Work) -> Outcome {
    let owner = format!("{OWNER}{}", work.uid);
    let namespace = work.warmup.metadata.namespace.as_deref();
    let namespace = namespace.unwrap_or_default();
    for (reference, _) in &work.references {
        match side.warmer.keep(reference, &owner, namespace).await {
            Ok(true) => {}
            Ok(false) => return Outcome::Checked(false),
            Err(error) => {
                tracing::warn!(%reference, %error, "whether it is here is not known");
                return Outcome::Checked(false);
            }
        }
    }
    Outcome::Checked(true)
}

/// Brings all of it; the first of what failed, once all were tried.
async fn warm(side: Means, work: Work) -> Outcome {
    let mut results: Vec<(usize, Result<(), WarmError>)> = stream::iter(0..work.references.len())
        .map(|index| {
            let (side, work) = (&side, &work);
            async move { (index, warm_one(side, work, index).await) }
        })
        .buffer_unordered(REFERENCES_AT_ONCE)
        .collect()
        .await;
    results.sort_by_key(|(index, _)| *index);
    Outcome::Warmed(results.into_iter().try_for_each(|(_, result)| result))
}

async fn warm_one(side: &Means, work: &Work, index: usize) -> Result<(), WarmError> {
    let (reference, progress) = &work.references[index];
    let (spec, metadata) = (&work.warmup.spec, &work.warmup.metadata);
    let namespace = metadata.namespace.as_deref().unwrap_or_default();
    let names = secrets::Names {
        named: spec.credentials.as_ref().map(|secret| secret.name.clone()),
        pull: spec
            .image_pull_secrets
            .iter()
            .map(|secret| secret.name.clone())
            .collect(),
    };
    let keys = secrets::keys(&side.client, namespace, &names, reference).await;
    let keys = keys.map_err(|error| WarmError {
        reason: if error.passes {
            "Unavailable"
        } else {
            "Denied"
        },
        message: error.to_string(),
    })?;
    let order = Order {
        reference: reference.clone(),
        namespace: namespace.to_owned(),
        warmup: work.uid.clone(),
        owner: spec.pins().then(|| format!("{OWNER}{}", work.uid)),
        priority: spec.priority.unwrap_or_default(),
        bandwidth: spec.bandwidth().unwrap_or_default(),
        keys,
    };
    side.warmer.warm(&order, progress).await
}
