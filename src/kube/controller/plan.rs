//! What the controller does, as a function: the state of the cluster in, actions out. No I/O, no clock of its own.
//!
//! Waves: nodes stand in an order of their own for each `Warmup` ([`place`]). The status names the window of places
//! whose nodes may start: so many that with those at work they are not more than `maxParallelNodes`. A node that has
//! started goes on wherever the window is. One object of constant size thus steers any number of nodes, and nobody but
//! the node writes of the node. Nodes that are admitted and do not start lose their place after a while, so that dead
//! ones do not stop a wave; should they come back together, there are more at work for a while.
//!
//! Rates: every change of a `Warmup` goes to all nodes, every report of a node to the controller. Both intervals grow
//! with the number of those that take part, so that the API server's load does not grow with the cluster.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    time::{Duration, Instant, SystemTime},
};

use k8s_openapi::{
    api::core::v1::Taint,
    apimachinery::pkg::apis::meta::v1::{Condition, OwnerReference, Time},
    jiff::Timestamp,
};

use super::super::crd::{
    Failure, MAX_FAILURES, MAX_MESSAGE, NOT_WARM_TAINT, NodeCache, NodeCounts, NodeView,
    WARM_LABELS, WarmArtifact, WarmState, Warmup, WarmupOnNode, WarmupStatus, Window, cut, place,
    warm_label,
};
use crate::reference::Reference;

/// Most labels of warm artifacts that a node gets.
pub const MAX_LABELS: usize = 32;
/// Events a second that changes of all `Warmup`s may cause, all nodes together.
pub const EVENTS_PER_SECOND: u64 = 2000;
/// Reports a second that all nodes together may write.
pub const REPORTS_PER_SECOND: u64 = 200;
/// Least time between two writes of a status.
const MIN_STATUS_INTERVAL: Duration = Duration::from_secs(2);
/// Intervals between reports that nodes are told: few, so that they seldom change. In seconds.
const REPORT_SECONDS: [u32; 8] = [2, 5, 10, 30, 60, 120, 300, 600];
/// How long a node that is admitted may take to start, beside the time of its reports.
const START_GRACE: Duration = Duration::from_secs(60);
/// How long a node that is at it may be silent, in intervals of reports and beside them.
const SILENT_REPORTS: u32 = 5;

/// Namespace and name.
pub type Key = (String, String);

/// What the controller knows of the cluster.
#[derive(Debug, Default)]
pub struct World {
    pub warmups: BTreeMap<Key, Warmup>,
    pub nodes: BTreeMap<String, NodeView>,
    pub caches: HashMap<String, CacheView>,
}

/// What matters of a `NodeCache`.
#[derive(Debug, Clone)]
pub struct CacheView {
    /// Its name: that of the node.
    pub name: String,
    /// The node it belongs to: one of the same name may have been there before.
    owner: Option<String>,
    /// By uid: looked up for each `Warmup` on each node.
    warmups: HashMap<String, WarmupOnNode>,
    /// Labels of what is warm, in the node's order.
    labels: Vec<String>,
    /// When it last changed, by the controller's clock.
    changed: Instant,
}

impl CacheView {
    /// Of a `NodeCache` that was seen to change now.
    pub fn new(cache: NodeCache, now: Instant) -> Self {
        let status = cache.status.unwrap_or_default();
        let owners = cache.metadata.owner_references.into_iter().flatten();
        let name = cache.metadata.name.unwrap_or_default();
        let warm = status.artifacts.iter().filter(|artifact| artifact.warm);
        Self {
            name,
            owner: owners
                .into_iter()
                .find(|owner| owner.kind == "Node")
                .map(|owner| owner.uid),
            labels: warm
                .map(|artifact| warm_label(&artifact.reference))
                .collect(),
            warmups: (status.warmups.into_iter())
                .map(|entry| (entry.uid.clone(), entry))
                .collect(),
            changed: now,
        }
    }

    /// What it says of a `Warmup` as it is now.
    fn of(&self, uid: &str, generation: i64) -> Option<&WarmupOnNode> {
        let entry = self.warmups.get(uid);
        entry.filter(|entry| entry.generation == generation)
    }
}

impl World {
    /// The cache of a node, unless it is that of another node that had its name.
    fn cache(&self, node: &NodeView) -> Option<&CacheView> {
        let cache = self.caches.get(&node.name)?;
        match &cache.owner {
            Some(owner) if *owner != node.uid => None,
            _ => Some(cache),
        }
    }
}

/// What the leader remembers from one time to the next; a new leader begins with nothing.
#[derive(Debug, Default)]
pub struct Memory {
    /// When each `Warmup`'s status was last written.
    written: HashMap<Key, Instant>,
    /// Nodes that may start, of each `Warmup` by uid and generation, since when.
    admitted: HashMap<(String, i64), HashMap<String, Instant>>,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Take a taint off a node, and set its labels.
    Node(NodeChange),
    /// Write the status of a `Warmup`.
    Status { key: Key, status: Box<WarmupStatus> },
    /// Make a `Warmup`, or change it to this.
    Make { key: Key, warmup: serde_json::Value },
    /// Delete a `Warmup` whose time is over, or unless this owner, when it is asked, asks for it.
    Delete {
        key: Key,
        uid: String,
        owner: Option<OwnerReference>,
    },
}

/// What is to change of a node.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeChange {
    pub name: String,
    /// Labels that are new.
    pub add: BTreeSet<String>,
    /// Labels of what is not warm any more.
    pub remove: BTreeSet<String>,
    /// The taints that stay, where one is taken off.
    pub taints: Option<Vec<Taint>>,
    /// The version that this is about.
    pub resource_version: String,
}

/// What to do now.
pub fn reconcile(
    world: &World,
    memory: &mut Memory,
    own_namespace: &str,
    now: Instant,
    wall: SystemTime,
) -> Vec<Action> {
    // Times in objects have no parts of seconds.
    let since = wall
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let seconds = i64::try_from(since).ok();
    let wall = seconds
        .and_then(|s| Timestamp::from_second(s).ok())
        .unwrap_or_default();
    let mut actions = Vec::new();
    let mut looked_at: Vec<(&Key, &Warmup, Tally)> = Vec::new();
    for (key, warmup) in &world.warmups {
        if warmup.metadata.deletion_timestamp.is_some() {
            continue;
        }
        if is_over(warmup, wall) {
            let uid = warmup.metadata.uid.clone().unwrap_or_default();
            actions.push(Action::Delete {
                key: key.clone(),
                uid,
                owner: None,
            });
            continue;
        }
        looked_at.push((key, warmup, Tally::new(world, memory, warmup, now)));
    }
    let at_work: u64 = looked_at.iter().map(|(_, _, tally)| tally.at_work()).sum();
    let report = report_seconds(at_work);
    let unsettled = looked_at
        .iter()
        .filter(|(_, _, tally)| !tally.is_settled())
        .count();
    let interval = status_interval(world.nodes.len(), unsettled);
    for (key, warmup, tally) in &looked_at {
        let status = tally.status(warmup, report, own_namespace, wall);
        tally.remember(memory, now);
        let old = warmup.status.clone().unwrap_or_default();
        if old == status {
            continue;
        }
        // A new generation waits for nobody.
        let is_new = old.observed_generation != status.observed_generation;
        let written = memory.written.get(*key);
        if is_new || written.is_none_or(|at| now.duration_since(*at) >= interval) {
            memory.written.insert((*key).clone(), now);
            let (key, status) = ((*key).clone(), Box::new(status));
            actions.push(Action::Status { key, status });
        }
    }
    memory.forget(world);
    let gates: Vec<&Warmup> = (looked_at.iter().map(|(_, warmup, _)| *warmup))
        // One that is not for all nodes would hold the others for ever.
        .filter(|w| is_gate(w) && w.spec.max_nodes.is_none())
        .filter(|w| w.metadata.namespace.as_deref() == Some(own_namespace))
        .collect();
    let mut changes: Vec<NodeChange> = (world.nodes.values())
        .filter_map(|node| node_change(node, world.cache(node), &gates))
        .collect();
    // Nodes that nothing can run on go first.
    changes.sort_by_key(|change| change.taints.is_none());
    actions.extend(changes.into_iter().map(Action::Node));
    actions
}

impl Memory {
    /// A status was not written after all: it may be tried again at once.
    pub fn not_written(&mut self, key: &Key) {
        self.written.remove(key);
    }

    /// Forgets what does not exist any more.
    fn forget(&mut self, world: &World) {
        self.written
            .retain(|key, _| world.warmups.contains_key(key));
        let live: HashSet<(&str, i64)> = (world.warmups.values()).map(identity).collect();
        self.admitted
            .retain(|(uid, generation), _| live.contains(&(uid.as_str(), *generation)));
    }
}

/// Seconds between two reports of a node, where so many have something to say.
pub fn report_seconds(at_work: u64) -> u32 {
    let wanted = at_work.div_ceil(REPORTS_PER_SECOND);
    let mut steps = REPORT_SECONDS.into_iter();
    steps
        .find(|step| u64::from(*step) >= wanted)
        .unwrap_or(REPORT_SECONDS[REPORT_SECONDS.len() - 1])
}

/// Time between two writes of a status, where so many nodes see each of them.
pub fn status_interval(nodes: usize, warmups: usize) -> Duration {
    let events = nodes as u64 * warmups.max(1) as u64;
    Duration::from_millis(events * 1000 / EVENTS_PER_SECOND).max(MIN_STATUS_INTERVAL)
}

fn identity(warmup: &Warmup) -> (&str, i64) {
    let uid = warmup.metadata.uid.as_deref().unwrap_or_default();
    (uid, warmup.metadata.generation.unwrap_or_default())
}

fn is_gate(warmup: &Warmup) -> bool {
    warmup.spec.startup_gate == Some(true)
}

fn is_over(warmup: &Warmup, wall: Timestamp) -> bool {
    let (Some(ttl), Some(made)) = (warmup.spec.ttl_seconds, &warmup.metadata.creation_timestamp)
    else {
        return false;
    };
    wall.as_second().saturating_sub(made.0.as_second()) >= ttl
}

/// What nodes say of one `Warmup`.
struct Tally {
    identity: (String, i64),
    counts: NodeCounts,
    bytes: super::super::crd::ByteCounts,
    failures: Vec<Failure>,
    window: Option<Window>,
    /// Nodes in the window.
    admitted: Vec<String>,
    /// Nodes that were admitted and did not start; they keep the time of it.
    stalled: Vec<String>,
    accepted: Result<Vec<WarmArtifact>, String>,
    parallel: Option<usize>,
    /// Not for all that it selects.
    is_bounded: bool,
}

impl Tally {
    fn new(world: &World, memory: &Memory, warmup: &Warmup, now: Instant) -> Self {
        let (uid, generation) = identity(warmup);
        let identity = (uid.to_owned(), generation);
        let reports = (warmup.status.as_ref()).and_then(|status| status.report_seconds);
        let reports = Duration::from_secs(reports.unwrap_or(REPORT_SECONDS[0]).into());
        let silent = START_GRACE + reports * SILENT_REPORTS;
        let admitted = memory.admitted.get(&identity);
        let mut this = Self {
            counts: NodeCounts::default(),
            bytes: Default::default(),
            failures: Vec::new(),
            window: None,
            admitted: Vec::new(),
            stalled: Vec::new(),
            accepted: artifacts(warmup),
            parallel: warmup.spec.parallel(),
            is_bounded: warmup.spec.max_nodes.is_some(),
            identity,
        };
        let mut waiting = Vec::new();
        for node in this.meant(world, warmup) {
            this.counts.desired += 1;
            let cache = world.cache(node);
            let entry = cache.and_then(|cache| cache.of(uid, generation));
            if let Some(entry) = entry {
                this.bytes.total = this.bytes.total.saturating_add(entry.bytes.max(0));
                this.bytes.present = this
                    .bytes
                    .present
                    .saturating_add(entry.present_bytes.max(0));
            }
            let is_silent = cache.is_none_or(|cache| now.duration_since(cache.changed) > silent);
            match entry.map_or(WarmState::Waiting, |entry| entry.state) {
                WarmState::Warm => this.counts.warm += 1,
                WarmState::Failed => {
                    this.counts.failed += 1;
                    if let Some(entry) = entry
                        && this.failures.len() < MAX_FAILURES
                    {
                        this.failures.push(Failure {
                            node: node.name.clone(),
                            reason: entry.reason.clone(),
                            message: entry.message.clone(),
                        });
                    }
                }
                WarmState::Warming if node.ready && !is_silent => this.counts.warming += 1,
                WarmState::Warming => this.counts.unreachable += 1,
                // It has no agent that could start.
                WarmState::Waiting if !node.ready || cache.is_none() => {
                    this.counts.unreachable += 1
                }
                WarmState::Waiting => {
                    let since = admitted.and_then(|admitted| admitted.get(&node.name));
                    // Its agent may have come back since.
                    match since.map(|since| cache.map_or(*since, |cache| cache.changed.max(*since)))
                    {
                        Some(since) if now.duration_since(since) > silent => {
                            this.counts.unreachable += 1;
                            this.stalled.push(node.name.clone());
                        }
                        _ => {
                            this.counts.waiting += 1;
                            waiting.push((place(uid, &node.name), node.name.as_str()));
                        }
                    }
                }
            }
        }
        this.admit(waiting);
        this
    }

    /// The nodes that it is for. Where these are not all that it selects: those that have begun, then those that could.
    fn meant<'w>(&self, world: &'w World, warmup: &Warmup) -> Vec<&'w NodeView> {
        let (uid, generation) = (&self.identity.0, self.identity.1);
        let selected = world
            .nodes
            .values()
            .filter(|node| warmup.spec.selects(node));
        let Some(most) = warmup.spec.max_nodes else {
            return selected.collect();
        };
        let rank = |node: &NodeView| {
            let cache = world.cache(node);
            let entry = cache.and_then(|cache| cache.of(uid, generation));
            match entry.map(|entry| entry.state) {
                Some(WarmState::Warm | WarmState::Warming) => 0,
                _ if node.ready && cache.is_some() => 1,
                _ => 2,
            }
        };
        let mut ranked: Vec<_> = selected
            .map(|node| ((rank(node), place(uid, &node.name)), node))
            .collect();
        ranked.sort_by(|(one, _), (other, _)| one.cmp(other));
        ranked
            .into_iter()
            .map(|(_, node)| node)
            .take(most as usize)
            .collect()
    }

    /// Sets the window: the next of those who wait, as many as may be at work beside those who are.
    fn admit(&mut self, mut waiting: Vec<(String, &str)>) {
        if self.accepted.is_err() {
            return;
        }
        if self.parallel.is_none() && !self.is_bounded {
            self.window = Some(Window::all());
            self.admitted = waiting
                .into_iter()
                .map(|(_, name)| name.to_owned())
                .collect();
            return;
        }
        let parallel = self
            .parallel
            .unwrap_or(waiting.len() + self.counts.warming as usize);
        let free = parallel
            .saturating_sub(self.counts.warming as usize)
            .min(waiting.len());
        if free == 0 {
            return;
        }
        if free < waiting.len() {
            waiting.select_nth_unstable(free - 1);
            waiting.truncate(free);
        }
        let first = waiting.iter().min().map(|(place, _)| place.clone());
        let last = waiting.iter().max().map(|(place, _)| place.clone());
        self.window = first.zip(last).map(|(first, last)| Window { first, last });
        self.admitted = waiting
            .into_iter()
            .map(|(_, name)| name.to_owned())
            .collect();
    }

    fn remember(&self, memory: &mut Memory, now: Instant) {
        let old = memory.admitted.remove(&self.identity).unwrap_or_default();
        let all = self.admitted.iter().chain(&self.stalled);
        let new: HashMap<_, _> = all
            .map(|name| (name.clone(), old.get(name).copied().unwrap_or(now)))
            .collect();
        if !new.is_empty() {
            memory.admitted.insert(self.identity.clone(), new);
        }
    }

    /// Nodes that have something to report.
    fn at_work(&self) -> u64 {
        let unfinished = u64::from(self.counts.desired - self.counts.warm);
        match self.parallel {
            // A wave behind those who are at it reports that it is done.
            Some(parallel) => unfinished.min(2 * parallel as u64),
            None => unfinished,
        }
    }

    fn is_settled(&self) -> bool {
        self.counts.warming + self.counts.waiting == 0
    }

    fn status(
        &self,
        warmup: &Warmup,
        report: u32,
        own_namespace: &str,
        wall: Timestamp,
    ) -> WarmupStatus {
        let generation = self.identity.1;
        let old = warmup.status.clone().unwrap_or_default();
        let is_complete = self.accepted.is_ok()
            && self.counts.desired > 0
            && self.counts.warm == self.counts.desired;
        let completed = old
            .completion_time
            .filter(|_| old.observed_generation == Some(generation));
        let mut conditions = Vec::new();
        let mut say = |kind: &str, status: bool, reason: &str, message: String| {
            let status = if status { "True" } else { "False" };
            let before = old
                .conditions
                .iter()
                .find(|c| c.type_ == kind && c.status == status);
            conditions.push(Condition {
                type_: kind.to_owned(),
                status: status.to_owned(),
                reason: reason.to_owned(),
                message: cut(&message, MAX_MESSAGE),
                last_transition_time: before.map_or(Time(wall), |c| c.last_transition_time.clone()),
                observed_generation: Some(generation),
            });
        };
        match &self.accepted {
            Ok(_) => say("Accepted", true, "Valid", String::new()),
            Err(why) => say("Accepted", false, "InvalidReference", why.clone()),
        }
        let (reason, message) = self.progress();
        say("Complete", is_complete, reason, message);
        match self.failures.first() {
            Some(failure) => {
                let Failure { node, message, .. } = failure;
                say(
                    "Degraded",
                    true,
                    "NodesFailed",
                    format!(
                        "{} nodes failed, such as {node}: {message}",
                        self.counts.failed
                    ),
                );
            }
            None => say("Degraded", false, "AsExpected", String::new()),
        }
        if is_gate(warmup) && warmup.metadata.namespace.as_deref() != Some(own_namespace) {
            let message = format!("startupGate counts only in namespace {own_namespace}");
            say("StartupGate", false, "OtherNamespace", message);
        } else if is_gate(warmup) && self.is_bounded {
            let message = "startupGate does not count where there is maxNodes".to_owned();
            say("StartupGate", false, "MaxNodes", message);
        }
        WarmupStatus {
            observed_generation: Some(generation),
            nodes: self.counts,
            bytes: self.bytes,
            artifacts: self.accepted.clone().unwrap_or_default(),
            failures: self.failures.clone(),
            conditions,
            window: self.window.clone(),
            report_seconds: Some(report),
            completion_time: completed.or(is_complete.then_some(Time(wall))),
        }
    }

    /// What the condition Complete says: reason and message.
    fn progress(&self) -> (&'static str, String) {
        let NodeCounts {
            desired,
            warm,
            warming,
            waiting,
            failed,
            unreachable,
        } = self.counts;
        let reason = match () {
            () if self.accepted.is_err() => {
                return ("InvalidReference", "see the condition Accepted".into());
            }
            () if desired == 0 => return ("NoNodes", "no node matches".into()),
            () if warm == desired => "Warm",
            () if warming > 0 => "Warming",
            () if waiting > 0 => "Waiting",
            () if failed > 0 => "NodesFailed",
            () => "NodesUnreachable",
        };
        let mut message = format!("{warm} of {desired} nodes are warm");
        for (count, what) in [
            (warming, "at it"),
            (waiting, "wait"),
            (failed, "failed"),
            (unreachable, "do not answer"),
        ] {
            if count > 0 {
                message += &format!(", {count} {what}");
            }
        }
        (reason, message)
    }
}

/// What a `Warmup` asks for, in canonical form; the first that nobody understands.
fn artifacts(warmup: &Warmup) -> Result<Vec<WarmArtifact>, String> {
    let references = warmup.spec.wanted();
    let references = references.map_err(|error| error.to_string())?;
    let artifact = |reference: &Reference| {
        let reference = reference.to_string();
        let label = warm_label(&reference);
        WarmArtifact { reference, label }
    };
    Ok(references.iter().map(artifact).collect())
}

/// What is to change of a node; `None` where nothing is.
fn node_change(
    node: &NodeView,
    cache: Option<&CacheView>,
    gates: &[&Warmup],
) -> Option<NodeChange> {
    let has = |label: &String| label.starts_with(WARM_LABELS);
    let have: BTreeSet<&String> = node.labels.keys().filter(|label| has(label)).collect();
    let warm: &[String] = cache.map_or(&[], |cache| &cache.labels);
    // What has a label keeps it, whatever was used since: labels are not to come and go.
    let (kept, new): (Vec<_>, Vec<_>) = warm.iter().partition(|label| have.contains(label));
    let wanted: BTreeSet<&String> = kept.into_iter().chain(new).take(MAX_LABELS).collect();
    let holds = |gate: &&Warmup| {
        let (uid, generation) = identity(gate);
        let entry = cache.and_then(|cache| cache.of(uid, generation));
        gate.spec.selects(node) && entry.is_none_or(|entry| entry.state != WarmState::Warm)
    };
    let is_released = node.is_held() && cache.is_some() && !gates.iter().any(holds);
    let add: BTreeSet<String> = wanted
        .difference(&have)
        .map(|label| (*label).clone())
        .collect();
    let remove: BTreeSet<String> = have
        .difference(&wanted)
        .map(|label| (*label).clone())
        .collect();
    if add.is_empty() && remove.is_empty() && !is_released {
        return None;
    }
    let others = node
        .taints
        .iter()
        .filter(|taint| taint.key != NOT_WARM_TAINT);
    Some(NodeChange {
        name: node.name.clone(),
        add,
        remove,
        taints: is_released.then(|| others.cloned().collect()),
        resource_version: node.resource_version.clone(),
    })
}

#[cfg(test)]
mod tests;
