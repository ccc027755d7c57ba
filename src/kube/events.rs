//! Events on pods, and on workloads: told once, and then counted.
//!
//! The name of an Event is made of what it says, so one that is told again, also by the next process, is the same one: it
//! gets a series (events.k8s.io/v1). Telling never waits: what goes beyond the rate waits in a short queue, and what does
//! not fit into that is dropped and counted.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::{sync::mpsc, time::Instant};

use super::client::within;
use crate::{digest::Digest, metrics};

/// Who tells.
pub const AGENT: &str = "hearth.dev/agent";
pub const CONTROLLER: &str = "hearth.dev/controller";
/// Longest note, in bytes (events.k8s.io/v1).
const MAX_NOTE: usize = 1024;
/// Longest name of an object.
const MAX_NAME: usize = 253;
/// What waits to be told.
const QUEUE: usize = 256;
/// Told Events that are remembered.
const REMEMBERED: usize = 1024;
/// Events at once, and then one in so much time.
const BURST: u32 = 25;
const EVERY: Duration = Duration::from_secs(2);
/// One that is repeated is counted at most so often.
const COUNTED_EVERY: Duration = Duration::from_secs(300);

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PodRef {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

/// What something is told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    pub api_version: String,
    pub kind: String,
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

impl From<&PodRef> for Subject {
    fn from(pod: &PodRef) -> Self {
        Self {
            api_version: "v1".to_owned(),
            kind: "Pod".to_owned(),
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
        }
    }
}

/// What is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    pub about: Subject,
    /// Whether it is about something wrong.
    pub warning: bool,
    /// CamelCase, one of a few.
    pub reason: &'static str,
    /// What was done, or was to be.
    pub action: &'static str,
    /// For a person; no secret.
    pub note: String,
}

/// Tells Events. Clones tell through the same queue.
#[derive(Debug, Clone)]
pub struct Recorder(mpsc::Sender<Notice>);

impl Recorder {
    /// Tells by `client`, as `controller` ([`AGENT`], [`CONTROLLER`]) of this name, until all clones are gone. Must be
    /// called within a runtime.
    pub fn start(client: Client, controller: &'static str, instance: String) -> Self {
        let (tell, mut told) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            let mut teller = Teller {
                client,
                controller,
                instance,
                known: HashMap::new(),
                order: VecDeque::new(),
                allowance: Allowance::new(Instant::now()),
            };
            while let Some(notice) = told.recv().await {
                teller.tell(&notice).await;
            }
        });
        Self(tell)
    }

    /// Tells it soon, unless there is too much to tell.
    pub fn tell(&self, notice: Notice) {
        if self.0.try_send(notice).is_err() {
            metrics::global().kube_events_dropped.add(1);
        }
    }
}

struct Teller {
    client: Client,
    controller: &'static str,
    instance: String,
    /// By name.
    known: HashMap<String, Told>,
    order: VecDeque<String>,
    allowance: Allowance,
}

struct Told {
    count: i32,
    /// When the count was last written.
    written: Instant,
}

impl Teller {
    async fn tell(&mut self, notice: &Notice) {
        let name = name_of(notice);
        let now = Instant::now();
        let again = match self.known.get_mut(&name) {
            Some(told) => {
                told.count = told.count.saturating_add(1);
                // The second time at once, so that it is seen that it is repeated.
                if told.count > 2 && now - told.written < COUNTED_EVERY {
                    return;
                }
                Some(told.count)
            }
            None => None,
        };
        while !self.allowance.take(Instant::now()) {
            tokio::time::sleep(EVERY / 4).await;
        }
        let api = Api::<Event>::namespaced(self.client.clone(), &notice.about.namespace);
        let is = |code, done: &kube::Result<()>| matches!(done, Err(kube::Error::Api(status)) if status.code == code);
        let (mut is_new, mut done) = match again {
            Some(count) => (false, self.count(&api, &name, count).await),
            None => (true, self.create(&api, &name, notice).await),
        };
        if is_new && is(409, &done) {
            // Of the process before this one.
            (is_new, done) = (false, self.count(&api, &name, 2).await);
        } else if !is_new && is(404, &done) {
            // The server keeps them for an hour.
            (is_new, done) = (true, self.create(&api, &name, notice).await);
        }
        match done {
            Ok(()) => self.remember(name, is_new),
            Err(error) => {
                metrics::global().kube_events_dropped.add(1);
                let Subject {
                    kind,
                    namespace,
                    name,
                    ..
                } = &notice.about;
                tracing::debug!(kind, namespace, name, %error, note = notice.note, "an event was not told");
            }
        }
    }

    async fn create(&self, api: &Api<Event>, name: &str, notice: &Notice) -> kube::Result<()> {
        let event = self.event(name, notice);
        within(api.create(&PostParams::default(), &event))
            .await
            .map(drop)
    }

    async fn count(&self, api: &Api<Event>, name: &str, count: i32) -> kube::Result<()> {
        let series = json!({
            "series": {"count": count, "lastObservedTime": MicroTime(Timestamp::now())},
        });
        let patch = Patch::Merge(&series);
        within(api.patch(name, &PatchParams::default(), &patch))
            .await
            .map(drop)
    }

    fn event(&self, name: &str, notice: &Notice) -> Event {
        let about = &notice.about;
        let kind = if notice.warning { "Warning" } else { "Normal" };
        Event {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                namespace: Some(about.namespace.clone()),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(Timestamp::now())),
            reporting_controller: Some(self.controller.to_owned()),
            reporting_instance: Some(cut(&self.instance, 128)),
            action: Some(notice.action.to_owned()),
            reason: Some(notice.reason.to_owned()),
            note: Some(cut(&notice.note, MAX_NOTE)),
            type_: Some(kind.to_owned()),
            regarding: Some(ObjectReference {
                api_version: Some(about.api_version.clone()),
                kind: Some(about.kind.clone()),
                namespace: Some(about.namespace.clone()),
                name: Some(about.name.clone()),
                uid: Some(about.uid.clone()),
                ..ObjectReference::default()
            }),
            ..Event::default()
        }
    }

    fn remember(&mut self, name: String, is_new: bool) {
        let now = Instant::now();
        match self.known.get_mut(&name) {
            Some(told) => {
                told.written = now;
                if is_new {
                    told.count = 1;
                }
            }
            None => {
                if self.order.len() >= REMEMBERED
                    && let Some(oldest) = self.order.pop_front()
                {
                    self.known.remove(&oldest);
                }
                self.order.push_back(name.clone());
                let told = Told {
                    count: 1,
                    written: now,
                };
                self.known.insert(name, told);
            }
        }
    }
}

/// How many may be told.
#[derive(Debug)]
struct Allowance {
    left: f64,
    since: Instant,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self {
            left: f64::from(BURST),
            since: now,
        }
    }

    fn take(&mut self, now: Instant) -> bool {
        let gained = (now - self.since).as_secs_f64() / EVERY.as_secs_f64();
        self.left = (self.left + gained).min(f64::from(BURST));
        self.since = now;
        let may = self.left >= 1.0;
        if may {
            self.left -= 1.0;
        }
        may
    }
}

/// The same for what is the same.
fn name_of(notice: &Notice) -> String {
    let about = &notice.about;
    let text = format!("{}\0{}\0{}", about.uid, notice.reason, notice.note);
    let hash = &Digest::of(text.as_bytes()).hex()[..16];
    // Names of objects are ASCII, and no part of one ends in a dash.
    let own: String = about.name.chars().take(MAX_NAME - 17).collect();
    format!("{}.{hash}", own.trim_end_matches(['-', '.']))
}

/// At most `limit` bytes of it.
fn cut(text: &str, limit: usize) -> String {
    if text.len() <= limit {
        return text.to_owned();
    }
    let mut end = limit.saturating_sub('…'.len_utf8());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_a_rate() {
        let start = Instant::now();
        let mut allowance = Allowance::new(start);
        let taken = (0..100).filter(|_| allowance.take(start)).count();
        assert_eq!(taken, BURST as usize);
        let later = start + EVERY * 3;
        assert_eq!((0..100).filter(|_| allowance.take(later)).count(), 3);
    }

    #[test]
    fn names_and_notes_fit() {
        let notice = |name: &str| Notice {
            about: (&PodRef {
                namespace: "n".into(),
                name: name.into(),
                uid: "u".into(),
            })
                .into(),
            warning: true,
            reason: "R",
            action: "A",
            note: "ä".repeat(2000),
        };
        let cut_at = |end: &str| format!("{}{end}{}", "p".repeat(236 - end.len()), "q".repeat(17));
        for name in ["p", &"p".repeat(253), &cut_at("-"), &cut_at(".--")] {
            let name = name_of(&notice(name));
            assert!(name.len() <= MAX_NAME, "{name}");
            // RFC 1123, as the API server has it.
            let is_part = |part: &str| {
                let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
                !part.is_empty() && part.chars().all(known) && part.trim_matches('-') == part
            };
            assert!(name.split('.').all(is_part), "{name}");
        }
        assert!(cut(&notice("p").note, MAX_NOTE).len() <= MAX_NOTE);
    }
}
