//! An API server that keeps whatever it is given as JSON: a real HTTP server on the loopback.
//!
//! Lists, watches with bookmarks, conflicts, patches (merge, server-side apply, JSON), subresource `status`, selectors
//! and finalizers are as in the real one; its faults are scripted by [`Faults`]. It records what was asked of it.

mod answer;
mod apply;
mod changes;
mod select;
mod watching;

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;

/// How many changes are remembered for those who watch.
const WINDOW: usize = 10_000;

/// A group and a resource, such as `""` and `pods`, `hearth.dev` and `warmups`.
pub(crate) type Resource = (String, String);

/// Where an object is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) resource: Resource,
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    /// `group` is empty for what is in `/api/v1`, `namespace` for what has none.
    pub(crate) fn new(group: &str, resource: &str, namespace: &str, name: &str) -> Self {
        Self {
            resource: (group.to_owned(), resource.to_owned()),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }
}

/// A request that was made.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Asked {
    /// As in RBAC: get, list, watch, create, update, patch, delete, deletecollection.
    pub(crate) verb: &'static str,
    pub(crate) group: String,
    /// With its subresource: `pods/status`.
    pub(crate) resource: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) query: BTreeMap<String, String>,
}

/// What goes wrong.
#[derive(Debug, Clone, Default)]
pub(crate) struct Faults {
    /// Before each answer.
    pub(crate) latency: Duration,
    /// Answers that are given instead of the true ones: the first that fits is used up.
    pub(crate) answers: VecDeque<Refusal>,
    /// Watches end after so many events, without a word.
    pub(crate) cut_after: Option<usize>,
    /// So many of the next changes are told to nobody.
    pub(crate) lose: usize,
    /// Everything is told twice.
    pub(crate) duplicate: bool,
    /// No progress requests of etcd: whoever wants the newest state is refused, and so is a streaming list.
    pub(crate) no_progress: bool,
    /// A version that is too old is refused with status 410, and not by an event of the watch.
    pub(crate) gone_by_status: bool,
    /// No bookmarks, whoever asks for them.
    pub(crate) no_bookmarks: bool,
    /// Lists at resource version 0 give what was there so many changes ago.
    pub(crate) stale: u64,
}

/// An answer instead of the true one.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    /// Any where empty.
    pub(crate) verb: &'static str,
    /// Any where empty; with subresource.
    pub(crate) resource: &'static str,
    pub(crate) code: u16,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
    /// Seconds, in the header and in the details.
    pub(crate) retry_after: Option<u32>,
    /// How often; it is gone after that.
    pub(crate) times: usize,
}

/// A change as those who watch are told of it.
#[derive(Debug, Clone)]
struct Change {
    version: u64,
    key: Key,
    before: Option<Value>,
    after: Option<Value>,
    lost: bool,
}

#[derive(Default)]
struct State {
    version: u64,
    uids: u64,
    objects: BTreeMap<Key, Value>,
    managed: BTreeMap<Key, apply::Managed>,
    log: VecDeque<Change>,
    /// Older changes are forgotten.
    oldest: u64,
    faults: Faults,
    asked: Vec<Asked>,
    bytes_in: u64,
    bytes_out: u64,
    /// Now, as the server sees it, less the true time: skew in seconds.
    skew: i64,
}

/// The server.
#[derive(Clone)]
pub(crate) struct Fake {
    state: Arc<Mutex<State>>,
    /// The version, for those who watch.
    changed: watch::Sender<u64>,
    /// Incremented to cut all connections.
    cut: watch::Sender<u64>,
    address: SocketAddr,
}

impl Fake {
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fake = Self {
            state: Arc::default(),
            changed: watch::Sender::new(0),
            cut: watch::Sender::new(0),
            address: listener.local_addr().unwrap(),
        };
        fake.state.lock().version = 100;
        let served = fake.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                served.connection(stream);
            }
        });
        fake
    }

    /// `http://127.0.0.1:…`
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A client of it.
    pub(crate) fn client(&self) -> kube::Client {
        let mut config = kube::Config::new(self.url().parse().unwrap());
        config.default_retry = false;
        kube::Client::try_from(config).unwrap()
    }

    /// Changes what goes wrong.
    pub(crate) fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.state.lock().faults);
    }

    /// Has the next request of `verb` for `resource` refused.
    pub(crate) fn refuse(
        &self,
        verb: &'static str,
        resource: &'static str,
        code: u16,
        reason: &'static str,
    ) {
        self.faults(|faults| {
            faults.answers.push_back(Refusal {
                verb,
                resource,
                code,
                reason,
                message: format!("scripted: {reason}"),
                retry_after: None,
                times: 1,
            });
        });
    }

    /// The clock of the server goes wrong by this many seconds.
    pub(crate) fn skew(&self, seconds: i64) {
        self.state.lock().skew = seconds;
    }

    /// Cuts all connections, in the middle of what they carry.
    pub(crate) fn cut(&self) {
        self.cut.send_modify(|n| *n += 1);
    }

    /// Forgets all changes so far: whoever wants to go on from an older version must list again.
    pub(crate) fn compact(&self) {
        let mut state = self.state.lock();
        state.log.clear();
        state.oldest = state.version;
    }

    /// Everything that was asked so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.state.lock().asked.clone()
    }

    /// How often `verb` was asked of `resource`.
    pub(crate) fn count(&self, verb: &str, resource: &str) -> usize {
        let state = self.state.lock();
        let is = |a: &&Asked| a.verb == verb && a.resource == resource;
        state.asked.iter().filter(is).count()
    }

    /// Bytes of bodies that came and that went.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.bytes_in, state.bytes_out)
    }

    /// Makes or replaces an object, as some other client would.
    pub(crate) fn put(&self, group: &str, resource: &str, object: Value) -> Value {
        let meta = &object["metadata"];
        let text = |field: &str| meta[field].as_str().unwrap_or_default().to_owned();
        let key = Key::new(group, resource, &text("namespace"), &text("name"));
        let mut state = self.state.lock();
        let mut object = object;
        let before = state.objects.get(&key).cloned();
        match &before {
            Some(before) => {
                for field in ["uid", "creationTimestamp"] {
                    object["metadata"][field] = before["metadata"][field].clone();
                }
            }
            None => state.birth(&mut object),
        }
        let stored = state.store(key, Some(object));
        self.tell(&state);
        stored.unwrap()
    }

    /// Changes an object, as some other client would.
    pub(crate) fn edit(&self, key: &Key, change: impl FnOnce(&mut Value)) -> Value {
        let mut state = self.state.lock();
        let mut object = state.objects[key].clone();
        change(&mut object);
        let stored = state.store(key.clone(), Some(object));
        self.tell(&state);
        stored.unwrap()
    }

    pub(crate) fn get(&self, key: &Key) -> Option<Value> {
        self.state.lock().objects.get(key).cloned()
    }

    /// All objects of a resource.
    pub(crate) fn all(&self, group: &str, resource: &str) -> Vec<Value> {
        let state = self.state.lock();
        let of = |(key, value): (&Key, &Value)| {
            (key.resource.0 == group && key.resource.1 == resource).then(|| value.clone())
        };
        state.objects.iter().filter_map(of).collect()
    }

    /// Removes an object, whatever its finalizers say.
    pub(crate) fn remove(&self, key: &Key) {
        let mut state = self.state.lock();
        state.store(key.clone(), None);
        self.tell(&state);
    }

    fn tell(&self, state: &State) {
        self.changed.send_replace(state.version);
    }
}

impl State {
    fn now(&self) -> String {
        let now = k8s_openapi::jiff::Timestamp::now();
        let now = now + k8s_openapi::jiff::SignedDuration::from_secs(self.skew);
        now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    }

    /// What a new object is given.
    fn birth(&mut self, object: &mut Value) {
        self.uids += 1;
        let uid = format!("00000000-0000-4000-8000-{:012x}", self.uids);
        let now = self.now();
        let meta = &mut object["metadata"];
        if meta["uid"].is_null() {
            meta["uid"] = json!(uid);
        }
        if meta["creationTimestamp"].is_null() {
            meta["creationTimestamp"] = json!(now);
        }
        meta["generation"] = json!(1);
    }

    /// Puts an object there, or removes it, and notes the change. Nothing happens where nothing changes.
    fn store(&mut self, key: Key, object: Option<Value>) -> Option<Value> {
        let before = self.objects.get(&key).cloned();
        let mut after = object;
        if let (Some(before), Some(after)) = (&before, &mut after) {
            if before["spec"] != after["spec"] {
                let generation = before["metadata"]["generation"].as_u64().unwrap_or(1);
                after["metadata"]["generation"] = json!(generation + 1);
            }
            after["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"].clone();
            if before == after {
                return Some(after.clone());
            }
        }
        if before.is_none() && after.is_none() {
            return None;
        }
        self.version += 1;
        let version = self.version;
        for object in after.iter_mut() {
            object["metadata"]["resourceVersion"] = json!(version.to_string());
        }
        match &after {
            Some(after) => {
                self.objects.insert(key.clone(), after.clone());
            }
            None => {
                self.objects.remove(&key);
                self.managed.remove(&key);
            }
        }
        let lost = self.faults.lose > 0;
        self.faults.lose = self.faults.lose.saturating_sub(1);
        self.log.push_back(Change {
            version,
            key,
            before,
            after: after.clone(),
            lost,
        });
        while self.log.len() > WINDOW {
            let forgotten = self.log.pop_front();
            self.oldest = forgotten.map_or(self.oldest, |c| c.version);
        }
        after
    }

    /// The objects of some changes ago.
    fn as_of(&self, ago: u64) -> BTreeMap<Key, Value> {
        let mut objects = self.objects.clone();
        for change in self.log.iter().rev().take(ago as usize) {
            match &change.before {
                Some(before) => objects.insert(change.key.clone(), before.clone()),
                None => objects.remove(&change.key),
            };
        }
        objects
    }
}
