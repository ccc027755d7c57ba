//! The controller: of several processes one leads; it says in each `Warmup` how far it is, labels nodes for what they
//! have, and lets nodes in that have what they are to have.
//!
//! What to do is decided by [`plan`], who leads by [`lease`]; here is only the I/O. Nothing is queued: what could not be
//! done this time, for the rate or a failure, is found out anew the next time. Every write names the version that it is
//! about, where it could undo what somebody else wrote. Nothing is kept that a crash could lose.

mod ahead;
mod bucket;
mod candidate;
pub mod lease;
pub mod plan;
#[cfg(test)]
mod scale;

use std::{
    collections::{BTreeSet, HashMap},
    mem::take,
    time::{Duration, Instant, SystemTime},
};

use futures_util::{Stream, StreamExt as _, stream};
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client, Resource,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::{
    sync::{oneshot, watch},
    task::JoinSet,
};

use self::{
    ahead::{Ahead, Seen},
    bucket::Bucket,
    candidate::{Candidate, is_ahead, lost, nonce},
    lease::Terms,
    plan::{Action, CacheView, Key, Memory, NodeChange, World, reconcile},
};
use super::{
    client::within,
    crd::{NodeCache, NodeView, Warmup},
    events::{CONTROLLER, Recorder},
    watch::{Event, Selection, follow, follow_as},
};
use crate::metrics;

/// Requests that are under way at the same time.
const AT_ONCE: usize = 16;
/// Changes that come together are looked at together.
const SETTLE: Duration = Duration::from_millis(200);
/// How often it is looked at, though nothing is known to have changed.
const LOOK: Duration = Duration::from_secs(5);
/// What failed is left alone for so long.
const PAUSE: Duration = Duration::from_secs(5);
/// How often everything is listed anew.
const RELIST: Duration = Duration::from_secs(3600);

/// Settings of the controller: `[kube.controller]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Whether this process is a candidate.
    pub enabled: bool,
    /// The namespace of the lease, and of the `Warmup`s that may hold nodes back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The name of the lease.
    pub lease: String,
    /// How long the lease lasts without being renewed, in seconds.
    pub lease_seconds: u64,
    /// Changes of nodes per second, at most: everybody who watches nodes is told of each.
    pub node_changes_per_second: u32,
    /// Whether pod templates of workloads that ask for something become `Warmup`s.
    pub templates: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            enabled: false,
            namespace: None,
            lease: "hearth-controller".into(),
            lease_seconds: 15,
            node_changes_per_second: 20,
            templates: true,
        }
    }
}

/// Statuses written per second, at most.
const STATUSES_PER_SECOND: u32 = 10;

impl Config {
    /// The namespace: that of the configuration, else of the environment (`POD_NAMESPACE`), else `hearth-system`.
    pub fn namespace(&self) -> String {
        let said = self
            .namespace
            .clone()
            .or_else(|| std::env::var("POD_NAMESPACE").ok());
        said.unwrap_or_else(|| "hearth-system".into())
    }
}

/// Is a candidate, and does the work while it leads; until `stop`. Gives the lease back then.
pub async fn run(client: Client, config: Config, identity: String, stop: impl Future<Output = ()>) {
    let (tell, mut leads) = watch::channel(None);
    let name = identity.clone();
    let candidate = Candidate {
        leases: Api::namespaced(client.clone(), &config.namespace()),
        name: config.lease.clone(),
        terms: Terms {
            // Of an earlier process of the same name nothing is known.
            identity: format!("{identity}_{}", nonce()),
            duration: Duration::from_secs(config.lease_seconds.clamp(6, 600)),
        },
        tell,
    };
    let (leave, told) = oneshot::channel();
    // By itself: however much there is to do, the lease is renewed.
    let candidate = tokio::spawn(candidate.run(told));
    let work = async {
        while leads.wait_for(|until| is_ahead(*until)).await.is_ok() {
            let _leading = Leading::new();
            tokio::select! {
                () = lead(client.clone(), &config, &name, leads.clone()) => {}
                () = lost(leads.clone()) => tracing::info!("this process leads no more"),
            }
        }
    };
    tokio::select! {
        () = work => {}
        () = stop => {}
    }
    // Nothing is under way any more.
    drop(leave);
    if let Err(error) = candidate.await {
        tracing::error!(%error, "the candidate ended");
    }
}

/// Shows that this process leads.
struct Leading;

impl Leading {
    fn new() -> Self {
        tracing::info!("this process leads");
        metrics::global().kube_leads.add(1);
        Self
    }
}

impl Drop for Leading {
    fn drop(&mut self) {
        metrics::global().kube_leads.sub(1);
    }
}

/// Something that was seen to change.
enum Change {
    Warmup(Box<Event<Warmup>>),
    Node(Event<NodeView>),
    Cache(Event<CacheView>),
    Workload(Seen),
}

/// Does the work; does not end.
async fn lead(
    client: Client,
    config: &Config,
    name: &str,
    leads: watch::Receiver<Option<Instant>>,
) {
    let mut changes = changes(&client, config.templates);
    let mut state = State::new(client, config, name, leads);
    let mut look = Instant::now() + LOOK;
    // Nine tenths of the time are for others, however large the cluster.
    let mut earliest = Instant::now();
    loop {
        tokio::select! {
            Some(change) = changes.next() => {
                state.see(change);
                look = look.min((Instant::now() + SETTLE).max(earliest));
            }
            Some(done) = state.running.join_next() => {
                if let Ok(done) = done {
                    state.done(done);
                }
            }
            () = tokio::time::sleep_until(look.into()) => {
                let began = Instant::now();
                let has_more = state.act().await;
                let pause = if has_more { SETTLE * 5 } else { LOOK };
                earliest = Instant::now() + began.elapsed() * 9;
                look = (Instant::now() + pause).max(earliest);
            }
        }
    }
}

fn changes(client: &Client, templates: bool) -> impl Stream<Item = Change> + Unpin + use<> {
    let all = || Selection {
        relist: Some(RELIST),
        ..Selection::default()
    };
    let warmups = follow(Api::<Warmup>::all(client.clone()), all())
        .map(|event| Change::Warmup(Box::new(event)));
    // Only what matters is kept of each.
    let read = |node| Ok(NodeView::from(serde_json::from_value::<Node>(node)?));
    let nodes = follow_as(Api::<Node>::all(client.clone()), all(), read).map(Change::Node);
    let read = |cache| {
        Ok(CacheView::new(
            serde_json::from_value(cache)?,
            Instant::now(),
        ))
    };
    let caches = follow_as(Api::<NodeCache>::all(client.clone()), all(), read).map(Change::Cache);
    let mut all = stream::select_all([warmups.boxed(), nodes.boxed(), caches.boxed()]);
    if templates {
        all.push(ahead::follow_all(client).map(Change::Workload).boxed());
    }
    all
}

/// Names that a list had so far; that all three were listed once.
#[derive(Default)]
struct Listings {
    warmups: Listing<Key>,
    nodes: Listing<String>,
    caches: Listing<String>,
}

struct Listing<K> {
    found: Option<BTreeSet<K>>,
    is_known: bool,
}

impl<K> Default for Listing<K> {
    fn default() -> Self {
        Self {
            found: None,
            is_known: false,
        }
    }
}

impl<K: Ord> Listing<K> {
    fn begin(&mut self) {
        self.found = Some(BTreeSet::new());
    }

    fn found(&mut self, key: K) {
        if let Some(found) = &mut self.found {
            found.insert(key);
        }
    }

    /// The list ended; what it had.
    fn end(&mut self) -> BTreeSet<K> {
        self.is_known = true;
        self.found.take().unwrap_or_default()
    }
}

/// What an action is about: one at a time for each.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Subject {
    Node(String),
    Warmup(Key),
}

/// What became of an action.
struct Done {
    subject: Subject,
    /// What was to be made.
    made: Option<Value>,
    result: kube::Result<Written>,
}

/// What the server has now.
enum Written {
    Node(NodeView),
    Warmup(Box<Warmup>),
    /// Nothing: a workload asks for something else than was known.
    Not(Seen),
    Nothing,
}

struct State {
    client: Client,
    namespace: String,
    leads: watch::Receiver<Option<Instant>>,
    events: Recorder,
    world: World,
    ahead: Ahead,
    memory: Memory,
    listings: Listings,
    nodes: Bucket,
    statuses: Bucket,
    /// What is under way (`None`), or failed and is left alone until then.
    busy: HashMap<Subject, Option<Instant>>,
    running: JoinSet<Done>,
}

impl State {
    fn new(
        client: Client,
        config: &Config,
        name: &str,
        leads: watch::Receiver<Option<Instant>>,
    ) -> Self {
        Self {
            events: Recorder::start(client.clone(), CONTROLLER, name.to_owned()),
            namespace: config.namespace(),
            nodes: Bucket::new(config.node_changes_per_second.max(1)),
            statuses: Bucket::new(STATUSES_PER_SECOND),
            client,
            leads,
            world: World::default(),
            ahead: Ahead::default(),
            memory: Memory::default(),
            listings: Listings::default(),
            busy: HashMap::new(),
            running: JoinSet::new(),
        }
    }

    fn see(&mut self, change: Change) {
        let world = &mut self.world;
        match change {
            Change::Warmup(event) => match *event {
                Event::Listing => self.listings.warmups.begin(),
                Event::Found(warmup) => {
                    self.listings.warmups.found(key(&warmup));
                    world.warmups.insert(key(&warmup), warmup);
                }
                Event::Listed => {
                    let found = self.listings.warmups.end();
                    world.warmups.retain(|key, _| found.contains(key));
                }
                Event::Changed(warmup) => drop(world.warmups.insert(key(&warmup), warmup)),
                Event::Gone(warmup) => drop(world.warmups.remove(&key(&warmup))),
            },
            Change::Node(event) => match event {
                Event::Listing => self.listings.nodes.begin(),
                Event::Found(node) => {
                    self.listings.nodes.found(node.name.clone());
                    world.nodes.insert(node.name.clone(), node);
                }
                Event::Listed => {
                    let found = self.listings.nodes.end();
                    world.nodes.retain(|name, _| found.contains(name));
                }
                Event::Changed(node) => drop(world.nodes.insert(node.name.clone(), node)),
                Event::Gone(node) => drop(world.nodes.remove(&node.name)),
            },
            Change::Cache(event) => match event {
                Event::Listing => self.listings.caches.begin(),
                Event::Found(cache) => {
                    self.listings.caches.found(cache.name.clone());
                    world.caches.insert(cache.name.clone(), cache);
                }
                Event::Listed => {
                    let found = self.listings.caches.end();
                    world.caches.retain(|name, _| found.contains(name));
                }
                Event::Changed(cache) => drop(world.caches.insert(cache.name.clone(), cache)),
                Event::Gone(cache) => drop(world.caches.remove(&cache.name)),
            },
            Change::Workload(seen) => self.ahead.see(seen),
        }
    }

    /// Does what may be done now; whether there is more.
    async fn act(&mut self) -> bool {
        let known = &self.listings;
        if !(known.warmups.is_known && known.nodes.is_known && known.caches.is_known) {
            return false;
        }
        let now = Instant::now();
        self.busy
            .retain(|_, until| until.is_none_or(|until| now < until));
        let wall = SystemTime::now();
        let (world, mut memory) = (take(&mut self.world), take(&mut self.memory));
        let namespace = self.namespace.clone();
        // It takes seconds in a large cluster.
        let work = tokio::task::spawn_blocking(move || {
            let actions = reconcile(&world, &mut memory, &namespace, now, wall);
            (world, memory, actions)
        });
        let actions;
        (self.world, self.memory, actions) = match work.await {
            Ok(done) => done,
            Err(failed) => match failed.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is going down, and so is this.
                Err(_) => std::future::pending().await,
            },
        };
        let mut has_more = false;
        let ahead = self.ahead.changes(&self.world.warmups);
        for action in actions.into_iter().chain(ahead) {
            let (subject, bucket) = match &action {
                Action::Node(change) => (Subject::Node(change.name.clone()), &mut self.nodes),
                Action::Status { key, .. }
                | Action::Delete { key, .. }
                | Action::Make { key, .. } => (Subject::Warmup(key.clone()), &mut self.statuses),
            };
            let is_free = !self.busy.contains_key(&subject) && self.running.len() < AT_ONCE;
            if !is_free || !bucket.take(now) {
                has_more = true;
                if let Action::Status { key, .. } = &action {
                    self.memory.not_written(key);
                }
                continue;
            }
            self.busy.insert(subject.clone(), None);
            let (client, leads) = (self.client.clone(), self.leads.clone());
            let version = |key: &Key| {
                self.world
                    .warmups
                    .get(key)?
                    .metadata
                    .resource_version
                    .clone()
            };
            let (version, made) = match &action {
                Action::Status { key, .. } => (version(key), None),
                Action::Make { warmup, .. } => (None, Some(warmup.clone())),
                _ => (None, None),
            };
            self.running.spawn(async move {
                let until = *leads.borrow();
                let result = match is_ahead(until) {
                    true => perform(&client, action, version).await,
                    false => Ok(Written::Nothing),
                };
                Done {
                    subject,
                    made,
                    result,
                }
            });
        }
        has_more
    }

    fn done(&mut self, done: Done) {
        let Done {
            subject,
            made,
            result,
        } = done;
        match result {
            Ok(written) => {
                self.busy.remove(&subject);
                match written {
                    Written::Node(node) => {
                        metrics::global().kube_node_changes.add(1);
                        drop(self.world.nodes.insert(node.name.clone(), node));
                    }
                    Written::Warmup(warmup) => {
                        metrics::global().kube_statuses.add(1);
                        let key = key(&warmup);
                        // It may be gone meanwhile.
                        if let Some(known) = self.world.warmups.get_mut(&key) {
                            *known = *warmup;
                        }
                    }
                    Written::Not(seen) => self.ahead.see(seen),
                    Written::Nothing => {}
                }
            }
            Err(error) => {
                if let Subject::Warmup(key) = &subject {
                    self.memory.not_written(key);
                }
                match (&error, &subject, made) {
                    // Nor will it be the next time.
                    (kube::Error::Api(answer), Subject::Warmup(key), Some(made))
                        if matches!(answer.code, 400 | 422) =>
                    {
                        tracing::warn!(?subject, %error, "what a template asks for is refused");
                        let notice = self.ahead.refused(key.clone(), made, &answer.message);
                        self.events.tell(notice);
                    }
                    // It has changed, or is gone: the news is on its way.
                    (kube::Error::Api(answer), ..) if matches!(answer.code, 404 | 409) => {
                        tracing::debug!(?subject, %error, "not written");
                    }
                    (error, ..) => tracing::warn!(?subject, %error, "not written"),
                }
                self.busy.insert(subject, Some(Instant::now() + PAUSE));
            }
        }
    }
}

fn key(warmup: &Warmup) -> Key {
    let metadata = warmup.meta();
    let (namespace, name) = (metadata.namespace.clone(), metadata.name.clone());
    (namespace.unwrap_or_default(), name.unwrap_or_default())
}

async fn perform(
    client: &Client,
    action: Action,
    version: Option<String>,
) -> kube::Result<Written> {
    let params = PatchParams::default();
    match action {
        Action::Node(change) => {
            let patch = Patch::Merge(node_patch(&change));
            let nodes = Api::<Node>::all(client.clone());
            let node = within(nodes.patch(&change.name, &params, &patch)).await?;
            Ok(Written::Node(node.into()))
        }
        Action::Status { key, status } => {
            let patch = Patch::Merge(
                json!({ "metadata": { "resourceVersion": version }, "status": status }),
            );
            let warmups = Api::<Warmup>::namespaced(client.clone(), &key.0);
            let warmup = within(warmups.patch_status(&key.1, &params, &patch)).await?;
            Ok(Written::Warmup(Box::new(warmup)))
        }
        Action::Make { key, warmup } => {
            let params = PatchParams::apply("hearth-controller").force();
            let warmups = Api::<Warmup>::namespaced(client.clone(), &key.0);
            let warmup = within(warmups.patch(&key.1, &params, &Patch::Apply(warmup))).await?;
            Ok(Written::Warmup(Box::new(warmup)))
        }
        Action::Delete { key, uid, owner } => {
            if let Some(owner) = owner
                && let Some(seen) = ahead::ask(client, &key, &owner).await?
            {
                return Ok(Written::Not(seen));
            }
            let params = DeleteParams {
                preconditions: Some(Preconditions {
                    uid: Some(uid),
                    resource_version: None,
                }),
                ..DeleteParams::default()
            };
            let warmups = Api::<Warmup>::namespaced(client.clone(), &key.0);
            within(warmups.delete(&key.1, &params)).await?;
            Ok(Written::Nothing)
        }
    }
}

/// The merge patch of a change. Taints are a list, which a patch replaces: then it is for this version of the node only.
fn node_patch(change: &NodeChange) -> Value {
    let mut labels = Map::new();
    labels.extend(
        change
            .add
            .iter()
            .map(|label| (label.clone(), json!("true"))),
    );
    labels.extend(
        change
            .remove
            .iter()
            .map(|label| (label.clone(), Value::Null)),
    );
    let mut patch = json!({ "metadata": { "labels": labels } });
    if let Some(taints) = &change.taints {
        patch["metadata"]["resourceVersion"] = json!(change.resource_version);
        patch["spec"] = json!({ "taints": taints });
    }
    patch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nobody_waits_while_it_is_found_out_what_to_do() {
        let server = "http://127.0.0.1:9".parse().unwrap();
        let client = Client::try_from(kube::Config::new(server)).unwrap();
        let (_tell, leads) = watch::channel(None);
        let mut state = State::new(client, &Config::default(), "c", leads);
        for known in [
            &mut state.listings.nodes.is_known,
            &mut state.listings.caches.is_known,
            &mut state.listings.warmups.is_known,
        ] {
            *known = true;
        }
        let warmup: Warmup = serde_json::from_value(json!({
            "metadata": { "name": "w", "namespace": "d", "uid": "w" }, "spec": {},
        }))
        .unwrap();
        state.world.warmups.insert(key(&warmup), warmup);
        // There is one thread. Whoever renews the lease comes to it in between.
        let other = tokio::spawn(async {});
        state.act().await;
        assert!(other.is_finished());
        assert_eq!((state.world.warmups.len(), state.running.len()), (1, 1));
    }

    #[test]
    fn taints_are_only_replaced_in_the_version_that_was_seen() {
        let mut change = NodeChange {
            name: "n".into(),
            add: ["warm.hearth.dev/a".to_owned()].into(),
            remove: ["warm.hearth.dev/b".to_owned()].into(),
            taints: None,
            resource_version: "7".into(),
        };
        let labels = json!({ "warm.hearth.dev/a": "true", "warm.hearth.dev/b": null });
        assert_eq!(
            node_patch(&change),
            json!({ "metadata": { "labels": labels } })
        );
        change.taints = Some(Vec::new());
        let patch = json!({ "metadata": { "labels": labels, "resourceVersion": "7" }, "spec": { "taints": [] } });
        assert_eq!(node_patch(&change), patch);
    }
}
