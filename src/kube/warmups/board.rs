//! What a node does about the `Warmup`s that select it, as a function: what there is in, steps out. No I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use super::super::crd::{
    CachedArtifact, MAX_WARMUPS, NodeView, WarmState, Warmup, WarmupOnNode, WarmupSpec, place,
};
use crate::{node::Progress, reference::Reference};

/// Warm-ups that a node works on at the same time.
const AT_ONCE: usize = 4;
/// Pauses after a failure.
const FIRST_PAUSE: Duration = Duration::from_secs(30);
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// The warm-ups of a node.
#[derive(Default)]
pub(super) struct Board {
    jobs: BTreeMap<String, Job>,
    /// What an earlier process said of these has been made use of.
    resumed: BTreeSet<String>,
    /// Warm-ups that have no place in the report.
    omitted: usize,
}

/// A `Warmup` on this node.
struct Job {
    warmup: Arc<Warmup>,
    /// The one that the state is about.
    generation: i64,
    /// The one that asked for the same first: what is under way was begun for that.
    began: i64,
    state: State,
    failures: u32,
    /// What it fetches, in the order of its references; kept to tell how much that was.
    progress: Vec<Arc<Progress>>,
}

enum State {
    Waiting,
    /// It had begun, or was done, before this process: it needs no turn.
    Resumed(WarmState),
    /// Whether all of it is here is being looked at.
    Checking,
    Warming,
    Warm,
    Failed {
        error: WarmError,
        retry: Option<Instant>,
    },
}

/// Why a warm-up failed on this node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct WarmError {
    /// One word, such as `NotFound`.
    pub reason: &'static str,
    pub message: String,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Step {
    /// See whether all of it is here, without asking anybody.
    Check(Work),
    /// Bring it.
    Start(Work),
    /// Stop what is under way.
    Cancel(String),
    /// Let go of everything that was pinned for it, but for these.
    Release { uid: String, keep: Vec<Reference> },
}

/// What is to be brought.
#[derive(Clone)]
pub(super) struct Work {
    pub(super) uid: String,
    pub(super) generation: i64,
    pub(super) warmup: Arc<Warmup>,
    /// With where each is to show how far it is.
    pub(super) references: Vec<(Reference, Arc<Progress>)>,
}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of generation {}", self.uid, self.generation)
    }
}

impl PartialEq for Work {
    fn eq(&self, other: &Self) -> bool {
        (&self.uid, self.generation) == (&other.uid, other.generation)
    }
}

/// Whether it is this node's turn.
fn is_turn(warmup: &Warmup, node: &str) -> bool {
    if warmup.spec.parallel().is_none() && warmup.spec.max_nodes.is_none() {
        return true;
    }
    let Some(status) = &warmup.status else {
        return false;
    };
    let (uid, window) = (warmup.metadata.uid.as_deref(), status.window.as_ref());
    status.observed_generation == warmup.metadata.generation
        && window.is_some_and(|window| window.admits(&place(uid.unwrap_or_default(), node)))
}

impl Job {
    fn uid(&self) -> &str {
        self.warmup.metadata.uid.as_deref().unwrap_or_default()
    }

    fn is_under_way(&self) -> bool {
        matches!(self.state, State::Warming | State::Checking)
    }

    fn work(&mut self) -> Work {
        let wanted = self.warmup.spec.wanted().unwrap_or_default();
        self.progress = wanted.iter().map(|_| Arc::default()).collect();
        Work {
            uid: self.uid().to_owned(),
            generation: self.began,
            warmup: Arc::clone(&self.warmup),
            references: wanted
                .into_iter()
                .zip(self.progress.iter().cloned())
                .collect(),
        }
    }

    /// Begins with the spec as it is now.
    fn begin(&mut self, state: State) {
        self.generation = self.warmup.metadata.generation.unwrap_or_default();
        self.began = self.generation;
        self.failures = 0;
        self.progress = Vec::new();
        let wrong =
            (self.warmup.spec.wanted().err()).or_else(|| self.warmup.spec.bandwidth().err());
        self.state = match wrong {
            None => state,
            // Only an edit mends it.
            Some(error) => State::Failed {
                error: WarmError {
                    reason: "InvalidReference",
                    message: error.to_string(),
                },
                retry: None,
            },
        };
    }

    /// What comes first in reports, and is begun first: what holds the node back, then what there is to do.
    fn order(&self) -> impl Ord + use<> {
        let is_gate = self.warmup.spec.startup_gate == Some(true);
        let is_done = matches!(self.state, State::Warm | State::Checking);
        (!is_gate, is_done, rank(&self.warmup))
    }

    /// What stays pinned.
    fn kept(&self) -> Vec<Reference> {
        match self.warmup.spec.pins() {
            true => self.warmup.spec.wanted().unwrap_or_default(),
            false => Vec::new(),
        }
    }
}

impl Board {
    /// What is to be done, now that there are these. `before` says how far an earlier process was.
    pub(super) fn sync<'a>(
        &mut self,
        node: &NodeView,
        warmups: impl Iterator<Item = &'a Arc<Warmup>>,
        before: &[WarmupOnNode],
        now: Instant,
    ) -> Vec<Step> {
        let mut steps = Vec::new();
        let selected: Vec<&Arc<Warmup>> = warmups
            .filter(|w| w.metadata.uid.is_some() && w.metadata.deletion_timestamp.is_none())
            .filter(|w| w.spec.selects(node))
            // What this node has nothing to do with yet is not even reported: there may be many.
            .filter(|w| {
                let uid = w.metadata.uid.as_deref().unwrap_or_default();
                let is_known = self.jobs.contains_key(uid) || self.was(before, uid).is_some();
                is_known || is_turn(w, &node.name)
            })
            .collect();
        let omitted = selected.len().saturating_sub(MAX_WARMUPS);
        if omitted > self.omitted {
            tracing::warn!(
                warmups = selected.len(),
                limit = MAX_WARMUPS,
                "not all of them are warmed and reported here at the same time"
            );
        }
        self.omitted = omitted;
        let uid = |warmup: &Warmup| warmup.metadata.uid.clone().unwrap_or_default();
        let uids: BTreeSet<String> = selected.iter().map(|w| uid(w)).collect();
        let gone: Vec<String> = (self.jobs.keys())
            .filter(|uid| !uids.contains(*uid))
            .cloned()
            .collect();
        for uid in gone {
            if self.jobs.remove(&uid).is_some_and(|job| job.is_under_way()) {
                steps.push(Step::Cancel(uid.clone()));
            }
            steps.push(Step::Release {
                uid,
                keep: Vec::new(),
            });
        }
        for warmup in selected {
            self.take(warmup, uid(warmup), before, &mut steps);
        }
        self.start(node, now, &mut steps);
        steps
    }

    /// What an earlier process said of a `Warmup`, unless this one has had it since.
    fn was<'a>(&self, before: &'a [WarmupOnNode], uid: &str) -> Option<&'a WarmupOnNode> {
        let mut before = before.iter().filter(|_| !self.resumed.contains(uid));
        before.find(|was| was.uid == uid)
    }

    /// Takes a `Warmup` as it is now.
    fn take(
        &mut self,
        warmup: &Arc<Warmup>,
        uid: String,
        before: &[WarmupOnNode],
        steps: &mut Vec<Step>,
    ) {
        let generation = warmup.metadata.generation.unwrap_or_default();
        let Some(job) = self.jobs.get_mut(&uid) else {
            let was = self.was(before, &uid);
            let state = match was.filter(|was| was.generation == generation) {
                Some(was) if matches!(was.state, WarmState::Warming | WarmState::Warm) => {
                    State::Resumed(was.state)
                }
                _ => State::Waiting,
            };
            if was.is_some() {
                self.resumed.insert(uid.clone());
            }
            let mut job = Job {
                warmup: Arc::clone(warmup),
                generation,
                began: generation,
                state: State::Waiting,
                failures: 0,
                progress: Vec::new(),
            };
            job.begin(state);
            self.jobs.insert(uid, job);
            return;
        };
        let is_same = asks_the_same(&job.warmup, warmup);
        job.warmup = Arc::clone(warmup);
        if is_same {
            job.generation = generation;
        } else if job.generation != generation {
            if job.is_under_way() {
                steps.push(Step::Cancel(uid.clone()));
            }
            job.begin(State::Waiting);
            let keep = job.kept();
            steps.push(Step::Release { uid, keep });
        }
    }

    /// Starts what may, the most important first.
    fn start(&mut self, node: &NodeView, now: Instant, steps: &mut Vec<Step>) {
        let mut under_way = self.jobs.values().filter(|job| job.is_under_way()).count();
        let mut jobs: Vec<&mut Job> = self.jobs.values_mut().collect();
        for job in &mut jobs {
            if let State::Failed {
                retry: Some(at), ..
            } = job.state
                && at <= now
            {
                job.state = State::Waiting;
            }
        }
        jobs.sort_by_cached_key(|job| job.order());
        // What is not reported is not begun either: nobody would see it. It keeps its pins.
        for job in jobs.into_iter().take(MAX_WARMUPS) {
            if !matches!(job.state, State::Waiting | State::Resumed(_))
                || under_way == AT_ONCE
                || !(matches!(job.state, State::Resumed(_)) || is_turn(&job.warmup, &node.name))
            {
                continue;
            }
            under_way += 1;
            let was_warm = matches!(job.state, State::Resumed(WarmState::Warm));
            (job.state, under_way) = match was_warm {
                // What is not pinned is fetched once, and then it may go.
                true if !job.warmup.spec.pins() => (State::Warm, under_way - 1),
                true => (State::Checking, under_way),
                false => (State::Warming, under_way),
            };
            match job.state {
                State::Checking => steps.push(Step::Check(job.work())),
                State::Warming => steps.push(Step::Start(job.work())),
                _ => {}
            }
        }
    }

    /// All of it was here, or not.
    pub(super) fn checked(&mut self, uid: &str, generation: i64, is_here: bool) {
        if let Some(job) = self.job(uid, generation)
            && matches!(job.state, State::Checking)
        {
            job.state = match is_here {
                true => State::Warm,
                false => State::Waiting,
            };
        }
    }

    /// It was brought, or not.
    pub(super) fn finished(
        &mut self,
        uid: &str,
        generation: i64,
        done: Result<(), WarmError>,
        now: Instant,
    ) {
        let Some(job) = self.job(uid, generation) else {
            return;
        };
        if !matches!(job.state, State::Warming) {
            return;
        }
        job.state = match done {
            Ok(()) => State::Warm,
            Err(error) => {
                let pause = FIRST_PAUSE
                    .saturating_mul(1 << job.failures.min(16))
                    .min(LONGEST_PAUSE);
                job.failures += 1;
                let retry = Some(now + pause);
                State::Failed { error, retry }
            }
        };
    }

    fn job(&mut self, uid: &str, generation: i64) -> Option<&mut Job> {
        self.jobs.get_mut(uid).filter(|job| job.began == generation)
    }

    /// What of it is not here any more is brought again.
    pub(super) fn compare(&mut self, artifacts: &[CachedArtifact]) {
        for job in self.jobs.values_mut() {
            let is_here = |reference: &Reference| {
                let name = reference.to_string();
                artifacts.iter().any(|a| a.reference == name && a.warm)
            };
            if matches!(job.state, State::Warm) && !job.kept().iter().all(is_here) {
                job.state = State::Waiting;
            }
        }
    }

    /// What stays pinned for a `Warmup`; nothing for one that has nothing to do here.
    pub(super) fn kept(&self, uid: &str) -> Vec<Reference> {
        self.jobs.get(uid).map(Job::kept).unwrap_or_default()
    }

    /// When something that failed is tried again.
    pub(super) fn next_try(&self) -> Option<Instant> {
        let retries = self.jobs.values().filter_map(|job| match job.state {
            State::Failed { retry, .. } => retry,
            _ => None,
        });
        retries.min()
    }

    /// Whether something is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.jobs.values().any(Job::is_under_way)
    }

    /// Least time between two reports, as the controller says for what is not done yet; `None` where nothing is.
    pub(super) fn report_interval(&self) -> Option<Duration> {
        let unsettled = self.jobs.values().filter(|job| {
            let status = job.warmup.status.as_ref();
            let is_over = status.is_some_and(|status| status.completion_time.is_some());
            !(is_over && matches!(job.state, State::Warm))
        });
        let seconds = unsettled.filter_map(|job| job.warmup.status.as_ref()?.report_seconds);
        seconds
            .max()
            .map(|seconds| Duration::from_secs(seconds.into()))
    }

    /// Whether a `Warmup` asks for this (canonical) reference.
    pub(super) fn wants(&self) -> std::collections::HashSet<String> {
        let wanted = self
            .jobs
            .values()
            .filter_map(|job| job.warmup.spec.wanted().ok());
        wanted
            .flatten()
            .map(|reference| reference.to_string())
            .collect()
    }

    /// How far each is; what matters most first.
    pub(super) fn entries(&self) -> Vec<WarmupOnNode> {
        let entry = |job: &Job| {
            let metadata = &job.warmup.metadata;
            let amounts = job
                .progress
                .iter()
                .filter_map(|progress| progress.snapshot());
            let (total, present) = amounts.fold((0u64, 0u64), |(total, present), now| {
                (
                    total.saturating_add(now.total_bytes),
                    present.saturating_add(now.present_bytes),
                )
            });
            let (state, error) = match &job.state {
                State::Waiting => (WarmState::Waiting, None),
                State::Resumed(state) => (*state, None),
                State::Checking | State::Warm => (WarmState::Warm, None),
                State::Warming => (WarmState::Warming, None),
                State::Failed { error, .. } => (WarmState::Failed, Some(error)),
            };
            let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
            WarmupOnNode {
                namespace: metadata.namespace.clone().unwrap_or_default(),
                name: metadata.name.clone().unwrap_or_default(),
                uid: job.uid().to_owned(),
                generation: job.generation,
                state,
                bytes: bytes(total),
                present_bytes: bytes(match job.state {
                    State::Warm => total,
                    _ => present,
                }),
                reason: error.map_or_else(String::new, |error| error.reason.to_owned()),
                message: error.map_or_else(String::new, |error| error.message.clone()),
            }
        };
        let mut jobs: Vec<&Job> = self.jobs.values().collect();
        jobs.sort_by_cached_key(|job| job.order());
        jobs.into_iter().map(entry).collect()
    }
}

/// Whether a node has nothing else to do for the one than for the other: how many nodes there are to be is not its
/// business.
fn asks_the_same(one: &Warmup, other: &Warmup) -> bool {
    let of_node = |warmup: &Warmup| WarmupSpec {
        max_nodes: None,
        max_parallel_nodes: None,
        ..warmup.spec.clone()
    };
    of_node(one) == of_node(other)
}

/// The most important first, then the oldest.
fn rank(warmup: &Warmup) -> (i32, Option<i64>, Option<String>, Option<String>) {
    let metadata = &warmup.metadata;
    (
        -warmup.spec.priority.unwrap_or_default(),
        metadata
            .creation_timestamp
            .as_ref()
            .map(|time| time.0.as_second()),
        metadata.namespace.clone(),
        metadata.name.clone(),
    )
}

#[cfg(test)]
mod tests;
