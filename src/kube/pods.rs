//! The pods of this node: what they ask for is brought from the moment they are bound, and pinned while they live.
//!
//! A pod that asks for nothing is not remembered. Work begins in the task that sees the event, so within milliseconds of
//! it. A pod that a list lacks may only be missing from an old list: its pins stay for a while (`kube.grace_seconds`), and so do pins of pods
//! that nobody knows after a restart. Of one namespace at most [`AT_ONCE_EACH`] references are brought at a time, so that
//! one with many does not keep others waiting; what readers wait for goes before all of it (`fetch`).

mod leaving;
mod start;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use futures_util::{StreamExt as _, future::join_all};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, Semaphore},
    task::JoinHandle,
    time::Instant,
};
use tracing::Span;

use self::start::Start;
use super::{
    Config,
    annotations::{self, Asked, Mistake},
    coldstart::{self, ColdStart, Fetched},
    events::{AGENT, Notice, PodRef, Recorder},
    secrets::{self, Names},
    watch::{Event, Selection, follow},
};
use crate::{
    metrics,
    reference::Reference,
    source::Keys,
    telemetry::{self, span},
};

/// How pins of pods begin.
pub const PINS: &str = "pod-";
/// How often it is looked at what is missing.
const TICK: Duration = Duration::from_secs(5);
/// How often all pods are listed though nothing failed.
const RELIST: Duration = Duration::from_secs(1800);
/// Most pods that ask for something; the kubelet's own limit is far below.
const MAX_PODS: usize = 2048;
/// References under way, of all and of one namespace.
const AT_ONCE: usize = 32;
const AT_ONCE_EACH: usize = 8;
/// Pauses before what failed is tried again.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Starts that are remembered.
const STARTS: usize = 64;

/// Brings content onto the node.
#[async_trait]
pub trait Content: Send + Sync {
    /// Brings all of it, verified; returns when it is here. It is pinned from when its tree is known on.
    ///
    /// # Errors
    /// Why it cannot be had now.
    async fn bring(&self, wish: &Wish) -> Result<Fetched, ContentError>;

    /// Removes the pins of `owner`, but those of the references `keep`.
    async fn unpin(&self, owner: &str, keep: &BTreeSet<String>);

    /// All owners of pins that begin with [`PINS`].
    async fn owners(&self) -> BTreeSet<String>;

    /// Keeps the last starts where people look for them.
    async fn show(&self, _starts: &[ColdStart]) {}
}

/// What is to be brought.
#[derive(Debug, Clone)]
pub struct Wish {
    pub reference: Reference,
    /// Of the pod that asks.
    pub namespace: String,
    /// Owner of the pin.
    pub owner: String,
    /// Whether it is pinned.
    pub pin: bool,
    /// From -100 to 100, the higher first.
    pub priority: i8,
    /// What opens the origin, where it is not what the node has.
    pub keys: Option<Keys>,
}

/// Why something cannot be had. Shows no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ContentError {
    kind: ContentErrorKind,
    message: String,
}

/// What a [`ContentError`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContentErrorKind {
    /// The origin does not have it, or it cannot be.
    NotFound,
    /// The origin wants other credentials.
    Denied,
    /// It does not fit: the disk, or what the namespace may have.
    NoSpace,
    /// It may go well later.
    Unavailable,
    /// Anything else.
    Failed,
}

impl ContentError {
    /// An error that says `message`.
    pub fn new(kind: ContentErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// What it is about.
    pub const fn kind(&self) -> ContentErrorKind {
        self.kind
    }

    const fn reason(&self) -> &'static str {
        match self.kind {
            ContentErrorKind::NotFound => "PrefetchNotFound",
            ContentErrorKind::Denied => "PrefetchDenied",
            ContentErrorKind::NoSpace => "PrefetchNoSpace",
            ContentErrorKind::Unavailable => "PrefetchDelayed",
            ContentErrorKind::Failed => "PrefetchFailed",
        }
    }
}

/// The owner of the pins of a pod.
pub fn owner(uid: &str) -> String {
    format!("{PINS}{uid}")
}

/// The pods of this node.
pub struct Pods {
    client: Client,
    node: String,
    content: Arc<dyn Content>,
    events: Recorder,
    state: Mutex<State>,
    slots: Arc<Semaphore>,
    /// How long a pod may be missing before it is gone.
    grace: Duration,
    /// Told whenever the pods are listed.
    listed: tokio::sync::watch::Sender<bool>,
    /// Told whenever something was let go.
    left: Notify,
}

#[derive(Default)]
struct State {
    /// By uid; those that ask for something.
    pods: HashMap<String, Tracked>,
    /// While they are listed: who was there.
    listing: Option<BTreeSet<String>>,
    /// Owners of pins whose pod is not known, and since when.
    orphans: BTreeMap<String, Instant>,
    /// By uid: how often its pins are being taken away.
    leaving: HashMap<String, usize>,
    each: HashMap<String, Arc<Semaphore>>,
    starts: Vec<ColdStart>,
}

/// A pod that asks for something.
struct Tracked {
    pod: PodRef,
    /// What it was started with.
    wants: Wants,
    /// Since when lists do not have it.
    missing: Option<Instant>,
    start: Arc<Mutex<Start>>,
    task: JoinHandle<()>,
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a pod wants of this node.
#[derive(Debug, Clone, PartialEq)]
struct Wants {
    asked: Asked,
    mistakes: Vec<Mistake>,
    images: Vec<Reference>,
    /// An image that the kubelet must not pull.
    never: Option<String>,
    names: Names,
}

impl Pods {
    /// The pods of `node`, as the API server that `client` reaches knows it. Must be called within a runtime.
    pub fn new(
        client: Client,
        node: String,
        config: &Config,
        content: Arc<dyn Content>,
    ) -> Arc<Self> {
        Arc::new(Self {
            events: Recorder::start(client.clone(), AGENT, node.clone()),
            client,
            node,
            content,
            state: Mutex::default(),
            slots: Arc::new(Semaphore::new(AT_ONCE)),
            grace: Duration::from_secs(config.grace_seconds),
            listed: tokio::sync::watch::Sender::new(false),
            left: Notify::new(),
        })
    }

    /// Returns once the pods of the node are known.
    pub async fn listed(&self) {
        let mut listed = self.listed.subscribe();
        // The sender is here.
        let _ = listed.wait_for(|listed| *listed).await;
    }

    /// The last starts of pods, the newest last.
    pub fn starts(&self) -> Vec<ColdStart> {
        self.state.lock().starts.clone()
    }

    /// Sees to the pods until it is dropped. What is under way then is broken off; pins stay.
    pub async fn run(self: Arc<Self>) {
        let _end = End(Arc::clone(&self));
        let selection = Selection {
            fields: Some(format!("spec.nodeName={}", self.node)),
            labels: None,
            relist: Some(RELIST),
        };
        let mut events = std::pin::pin!(follow(Api::<Pod>::all(self.client.clone()), selection));
        let mut tick = tokio::time::interval(TICK.min(self.grace.max(TICK / 5)));
        loop {
            tokio::select! {
                Some(event) = events.next() => self.take(event).await,
                _ = tick.tick() => self.look().await,
            }
        }
    }

    async fn take(self: &Arc<Self>, event: Event<Pod>) {
        match event {
            Event::Listing => self.state.lock().listing = Some(BTreeSet::new()),
            Event::Found(pod) => self.see(&pod, true).await,
            Event::Changed(pod) => self.see(&pod, false).await,
            Event::Gone(pod) => {
                if let Some(uid) = pod.metadata.uid {
                    self.release(&uid);
                }
            }
            Event::Listed => self.compare().await,
        }
    }

    /// After a list: who is missing, and which pins nobody is known to have.
    async fn compare(&self) {
        let owners = self.content.owners().await;
        let now = Instant::now();
        {
            let mut state = self.state.lock();
            let there = state.listing.take().unwrap_or_default();
            for (uid, tracked) in &mut state.pods {
                if !there.contains(uid) {
                    tracked.missing.get_or_insert(now);
                }
            }
            let known: BTreeSet<String> = state.pods.keys().map(|uid| owner(uid)).collect();
            let mut orphans = owners;
            orphans.retain(|owner| !known.contains(owner));
            state.orphans.retain(|owner, _| orphans.contains(owner));
            for orphan in orphans {
                state.orphans.entry(orphan).or_insert(now);
            }
        }
        self.listed.send_replace(true);
    }

    /// Lets go of what was missing for long enough, and tells of starts that are over.
    async fn look(self: &Arc<Self>) {
        let now = Instant::now();
        let is_over = |since: Instant| now.saturating_duration_since(since) >= self.grace;
        let (gone, orphans, due) = {
            let mut state = self.state.lock();
            let missing = |t: &Tracked| t.missing.is_some_and(is_over);
            let gone: Vec<String> = state
                .pods
                .iter()
                .filter(|(_, tracked)| missing(tracked))
                .map(|(uid, _)| uid.clone())
                .collect();
            let known: BTreeSet<String> = state.pods.keys().map(|uid| owner(uid)).collect();
            state.orphans.retain(|owner, _| !known.contains(owner));
            let orphans: Vec<String> = state
                .orphans
                .iter()
                .filter(|(_, since)| is_over(**since))
                .map(|(owner, _)| owner.clone())
                .collect();
            for orphan in &orphans {
                state.orphans.remove(orphan);
            }
            let starts = state
                .pods
                .values()
                .map(|t| (t.pod.clone(), Arc::clone(&t.start)));
            (gone, orphans, starts.collect::<Vec<_>>())
        };
        for uid in gone {
            self.release(&uid);
        }
        for orphan in orphans {
            tracing::info!(owner = orphan, "its pod is gone: unpinned");
            self.let_go(orphan.strip_prefix(PINS).unwrap_or_default());
        }
        for (pod, start) in due {
            self.tell_start(&pod, &start).await;
        }
    }

    /// A pod is there.
    async fn see(self: &Arc<Self>, pod: &Pod, listed: bool) {
        let (Some(uid), Some(namespace), Some(name)) = (
            pod.metadata.uid.clone(),
            pod.metadata.namespace.clone(),
            pod.metadata.name.clone(),
        ) else {
            return;
        };
        if let Some(listing) = &mut self.state.lock().listing
            && listed
        {
            listing.insert(uid.clone());
        }
        let here = pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(&*self.node);
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
        if !here || matches!(phase, Some("Succeeded" | "Failed")) {
            return self.release(&uid);
        }
        let wants = wants(pod);
        if wants.asked.is_empty() && wants.mistakes.is_empty() {
            return self.release(&uid);
        }
        let pod_ref = PodRef {
            namespace,
            name,
            uid: uid.clone(),
        };
        let start = {
            let mut state = self.state.lock();
            let is_full = state.pods.len() >= MAX_PODS && !state.pods.contains_key(&uid);
            match state.pods.get_mut(&uid) {
                Some(known) if known.wants == wants => {
                    known.missing = None;
                    Arc::clone(&known.start)
                }
                _ if is_full => {
                    tracing::warn!(
                        pod = pod_ref.name,
                        "too many pods ask for something: this one is left alone"
                    );
                    return;
                }
                _ => {
                    // Of a later list it is new, and its event was lost.
                    let late = !*self.listed.borrow();
                    let start = Arc::new(Mutex::new(Start::new(&pod_ref, late)));
                    let work =
                        Arc::clone(self).work(pod_ref.clone(), wants.clone(), Arc::clone(&start));
                    let tracked = Tracked {
                        pod: pod_ref.clone(),
                        wants,
                        missing: None,
                        start: Arc::clone(&start),
                        task: tokio::spawn(work),
                    };
                    state.pods.insert(uid, tracked);
                    start
                }
            }
        };
        if is_ready(pod) {
            let mut start = start.lock();
            let since = start.since.elapsed();
            start.record.ready.get_or_insert(since);
        }
        self.tell_start(&pod_ref, &start).await;
    }

    /// A pod is gone, or asks for nothing any more.
    fn release(self: &Arc<Self>, uid: &str) {
        let tracked = self.state.lock().pods.remove(uid);
        if tracked.is_some() {
            drop(tracked);
            self.let_go(uid);
        }
    }

    /// Sees to one pod.
    async fn work(self: Arc<Self>, pod: PodRef, wants: Wants, start: Arc<Mutex<Start>>) {
        for mistake in &wants.mistakes {
            tracing::warn!(namespace = pod.namespace, pod = pod.name, %mistake, "a wrong annotation");
            metrics::global().kube_wrong_annotations.add(1);
            self.events.tell(Notice {
                about: (&pod).into(),
                warning: true,
                reason: "WrongAnnotation",
                action: "Prefetch",
                note: mistake.to_string(),
            });
        }
        if let Some(image) = &wants.never {
            self.events.tell(Notice {
                about: (&pod).into(),
                warning: false,
                reason: "ImageNeverPulled",
                action: "Prefetch",
                note: format!(
                    "image {image}: its content is brought, but only a pull by the kubelet under this very name makes it \
                     present, and imagePullPolicy Never forbids that: have it pulled once with IfNotPresent"
                ),
            });
        }
        let wishes: Vec<&Reference> = wants.asked.references.iter().chain(&wants.images).collect();
        {
            let mut start = start.lock();
            let since = start.since.elapsed();
            start.record.started = Some(since);
            start.record.failed = 0;
        }
        // What it asked for before, and does not any more.
        let keep = match wants.asked.unpinned {
            true => BTreeSet::new(),
            false => wishes.iter().map(ToString::to_string).collect(),
        };
        self.has_left(&pod.uid).await;
        let owner = owner(&pod.uid);
        let each = {
            let mut state = self.state.lock();
            state.each.retain(|_, each| Arc::strong_count(each) > 1);
            let each = state.each.entry(pod.namespace.clone());
            Arc::clone(each.or_insert_with(|| Arc::new(Semaphore::new(AT_ONCE_EACH))))
        };
        let all = wishes.iter();
        let all = all.map(|reference| self.bring(&pod, &wants, reference, &each, &start));
        // What it does not wait for to begin.
        tokio::join!(self.content.unpin(&owner, &keep), join_all(all));
        {
            let mut start = start.lock();
            let since = start.since.elapsed();
            start.record.complete = Some(since);
        }
        self.tell_start(&pod, &start).await;
    }

    /// Brings one reference, however long it takes.
    async fn bring(
        &self,
        pod: &PodRef,
        wants: &Wants,
        reference: &Reference,
        each: &Semaphore,
        start: &Mutex<Start>,
    ) {
        let mut pause = FIRST_PAUSE;
        let mut failed = false;
        loop {
            let done = {
                // None is ever closed.
                let (_own, _slot) = (each.acquire().await, self.slots.acquire().await);
                let span = {
                    let start = start.lock();
                    span!(
                        parent: &start.span,
                        "prefetch",
                        hearth.reference = %reference,
                        hearth.pin = !wants.asked.unpinned
                    )
                };
                let about = |error: &ContentError| format!("{:?}", error.kind());
                let bringing = async {
                    let fetched = self.bring_once(pod, wants, reference).await;
                    fetched.inspect(|fetched| fetched.tell(&Span::current()))
                };
                telemetry::within(span, about, bringing).await
            };
            let error = match done {
                Ok(fetched) => {
                    let mut start = start.lock();
                    start.record.fetched.add(&fetched);
                    let since = start.since.into_std();
                    let first = start.record.fetched.first_read;
                    start.record.first_byte = first.map(|at| at.saturating_duration_since(since));
                    start.record.failed -= usize::from(failed);
                    return;
                }
                Err(error) => error,
            };
            if !std::mem::replace(&mut failed, true) {
                start.lock().record.failed += 1;
            }
            metrics::global().kube_prefetch_failures.add(1);
            tracing::warn!(namespace = pod.namespace, pod = pod.name, %reference, %error, ?pause, "a prefetch failed");
            self.events.tell(Notice {
                about: pod.into(),
                warning: true,
                reason: error.reason(),
                action: "Prefetch",
                note: error.to_string(),
            });
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn bring_once(
        &self,
        pod: &PodRef,
        wants: &Wants,
        reference: &Reference,
    ) -> Result<Fetched, ContentError> {
        let keys = secrets::keys(&self.client, &pod.namespace, &wants.names, reference).await;
        let keys = keys.map_err(|error| {
            let kind = match error.passes {
                true => ContentErrorKind::Unavailable,
                false => ContentErrorKind::Denied,
            };
            ContentError::new(kind, error.to_string())
        })?;
        let wish = Wish {
            reference: reference.clone(),
            namespace: pod.namespace.clone(),
            owner: owner(&pod.uid),
            pin: !wants.asked.unpinned,
            priority: wants.asked.priority.unwrap_or(0),
            keys,
        };
        self.content.bring(&wish).await
    }

    /// Tells of a start that is over, once.
    async fn tell_start(&self, pod: &PodRef, start: &Mutex<Start>) {
        let record = {
            let mut start = start.lock();
            let now = start.since.elapsed();
            let over = match (start.record.complete, start.record.ready) {
                (Some(_), Some(_)) => true,
                (Some(complete), None) => now.saturating_sub(complete) >= coldstart::PATIENCE,
                _ => false,
            };
            if start.told || !over {
                return;
            }
            start.told = true;
            start.end_span();
            start.record.clone()
        };
        let Fetched {
            total,
            before,
            demanded,
            prefetched,
            from_peers,
            ..
        } = record.fetched;
        tracing::info!(
            namespace = record.namespace,
            pod = record.pod,
            late = record.late,
            started = ?record.started,
            first_byte = ?record.first_byte,
            ready = ?record.ready,
            complete = ?record.complete,
            total,
            before,
            demanded,
            prefetched,
            from_peers,
            from_origin = record.fetched.from_origin(),
            "a pod has started"
        );
        // What was started before this process is not told again.
        if !record.late {
            self.events.tell(Notice {
                about: pod.into(),
                warning: false,
                reason: "ColdStart",
                action: "Prefetch",
                note: record.to_string(),
            });
        }
        let starts = {
            let mut state = self.state.lock();
            if state.starts.len() >= STARTS {
                state.starts.remove(0);
            }
            state.starts.push(record);
            state.starts.clone()
        };
        self.content.show(&starts).await;
    }
}

/// Breaks off what is under way.
struct End(Arc<Pods>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.state.lock().pods.clear();
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let mut conditions = conditions.into_iter().flatten();
    conditions.any(|c| c.type_ == "Ready" && c.status == "True")
}

fn wants(pod: &Pod) -> Wants {
    let none = BTreeMap::new();
    let annotations = pod.metadata.annotations.as_ref().unwrap_or(&none);
    let (mut asked, mut mistakes) = annotations::read(annotations);
    let spec = pod.spec.as_ref();
    asked.priority = asked
        .priority
        .or_else(|| Some(annotations::default_priority(spec?.priority)));
    let mut images = Vec::new();
    let mut pull = Vec::new();
    let mut never = None;
    if let Some(spec) = spec {
        let init = spec.init_containers.iter().flatten();
        for container in init.chain(&spec.containers).filter(|_| asked.images) {
            let Some(name) = &container.image else {
                continue;
            };
            if container.image_pull_policy.as_deref() == Some("Never") {
                never.get_or_insert_with(|| name.chars().take(255).collect());
            }
            match annotations::image(name) {
                Ok(image) if images.contains(&image) => {}
                Ok(image) => images.push(image),
                Err(message) => mistakes.push(Mistake {
                    annotation: annotations::IMAGES.to_owned(),
                    message,
                }),
            }
        }
        let secrets = spec.image_pull_secrets.iter().flatten();
        pull = secrets.map(|s| s.name.clone()).collect();
    }
    Wants {
        names: Names {
            named: asked.credentials.clone(),
            pull,
        },
        asked,
        mistakes,
        images,
        never,
    }
}
