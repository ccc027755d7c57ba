//! Nodes and controllers around `Warmup`s, over a real connection to an API server that misbehaves. What they ask of it
//! is compared with the rules that `daemonset/base/rbac.yaml` gives them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use hearth::{
    kube::{
        cache::Inventory,
        controller,
        crd::{self, CachedArtifact, Window},
        warmups::{self, Order, WarmError, Warmer},
    },
    node::Progress,
    reference::Reference,
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{sync::oneshot, task::JoinHandle};

use super::{
    fake::{Fake, Key},
    schema,
};

mod controllers;

const GROUP: &str = crd::GROUP;
const PATIENCE: Duration = Duration::from_secs(60);

/// A node's store, in words.
#[derive(Default)]
struct Store {
    id: String,
    /// References that are here, with who pins them.
    here: Mutex<BTreeMap<String, BTreeSet<String>>>,
    orders: Mutex<Vec<Order>>,
    /// What fails, and why.
    broken: Mutex<BTreeMap<String, WarmError>>,
    /// So many releases fail.
    stuck: AtomicUsize,
    takes: Duration,
    /// Nodes at work now, and at most; shared by all.
    at_work: Arc<(AtomicUsize, AtomicUsize)>,
}

impl Store {
    fn pins(&self, reference: &str) -> Option<BTreeSet<String>> {
        self.here.lock().get(reference).cloned()
    }
}

#[async_trait]
impl Warmer for Store {
    async fn warm(&self, order: &Order, _progress: &Progress) -> Result<(), WarmError> {
        let name = order.reference.to_string();
        self.orders.lock().push(order.clone());
        let (now, most) = (&self.at_work.0, &self.at_work.1);
        most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
        tokio::time::sleep(self.takes).await;
        now.fetch_sub(1, SeqCst);
        if let Some(error) = self.broken.lock().get(&name) {
            return Err(error.clone());
        }
        let mut here = self.here.lock();
        here.entry(name).or_default().extend(order.owner.clone());
        Ok(())
    }

    async fn keep(&self, reference: &Reference, owner: &str, _: &str) -> Result<bool, WarmError> {
        let mut here = self.here.lock();
        Ok(here
            .get_mut(&reference.to_string())
            .map(|pins| pins.insert(owner.into()))
            .is_some())
    }

    async fn release(&self, owner: &str, keep: &[Reference]) -> Result<(), WarmError> {
        let less = |left: usize| left.checked_sub(1);
        if self.stuck.fetch_update(SeqCst, SeqCst, less).is_ok() {
            let message = "the disk says no".into();
            return Err(WarmError {
                reason: "Failed",
                message,
            });
        }
        let keep: Vec<String> = keep.iter().map(ToString::to_string).collect();
        for (name, pins) in self.here.lock().iter_mut() {
            if !keep.contains(name) {
                pins.remove(owner);
            }
        }
        Ok(())
    }

    async fn owners(&self) -> Result<Vec<String>, WarmError> {
        Ok(self.here.lock().values().flatten().cloned().collect())
    }

    async fn inventory(&self) -> Result<Inventory, WarmError> {
        let artifact = |(reference, pins): (&String, &BTreeSet<String>)| CachedArtifact {
            reference: reference.clone(),
            warm: true,
            pinned: !pins.is_empty(),
            ..CachedArtifact::default()
        };
        Ok(Inventory {
            store_id: self.id.clone(),
            artifacts: self.here.lock().iter().map(artifact).collect(),
            ..Inventory::default()
        })
    }
}

fn node(fake: &Fake, name: &str, tainted: bool) {
    let taints = match tainted {
        true => json!([{ "key": crd::NOT_WARM_TAINT, "effect": "NoSchedule" }]),
        false => json!([]),
    };
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": name, "labels": { "pool": "gpu" } },
        "spec": { "taints": taints },
        "status": { "conditions": [{ "type": "Ready", "status": "True" }] },
    });
    fake.put("", "nodes", node);
}

fn warmup(fake: &Fake, namespace: &str, name: &str, spec: Value) -> Key {
    let object = json!({
        "apiVersion": crd::API_VERSION, "kind": "Warmup",
        "metadata": { "name": name, "namespace": namespace },
        "spec": spec,
    });
    let mut wrong = Vec::new();
    schema::check(&schema::of("Warmup"), &object, "", &mut wrong);
    assert_eq!(wrong, [""; 0]);
    fake.put(GROUP, "warmups", object);
    Key::new(GROUP, "warmups", namespace, name)
}

fn cache_key(node: &str) -> Key {
    Key::new(GROUP, "nodecaches", "", node)
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn agent(fake: &Fake, name: &str, store: Arc<Store>) -> JoinHandle<()> {
    let settings = warmups::Settings {
        node: name.into(),
        report: Duration::from_secs(2),
    };
    tokio::spawn(warmups::run(fake.client(), settings, store))
}

/// Verb, group and resource.
type Rule = (String, String, String);

/// What was asked of the server.
fn asked(fake: &Fake) -> BTreeSet<Rule> {
    let rule = |asked: super::fake::Asked| (asked.verb.to_owned(), asked.group, asked.resource);
    fake.asked().into_iter().map(rule).collect()
}

/// What roles of these names allow.
fn allowed(names: &[&str]) -> BTreeSet<Rule> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset/base/rbac.yaml");
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(&fs::read_to_string(file).unwrap()).unwrap();
    let is_meant = |role: &&Value| {
        let kind = role["kind"].as_str().unwrap();
        matches!(kind, "Role" | "ClusterRole")
            && names.contains(&role["metadata"]["name"].as_str().unwrap())
    };
    let list = |rule: &Value, field: &str| -> Vec<String> {
        let items = rule[field].as_array().unwrap().iter();
        items
            .map(|item| item.as_str().unwrap().to_owned())
            .collect()
    };
    let mut rules = BTreeSet::new();
    for role in documents.iter().filter(is_meant) {
        for rule in role["rules"].as_array().unwrap() {
            for group in list(rule, "apiGroups") {
                for resource in list(rule, "resources") {
                    for verb in list(rule, "verbs") {
                        rules.insert((verb, group.clone(), resource.clone()));
                    }
                }
            }
        }
    }
    rules
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_does_what_is_asked_and_no_more() {
    let fake = Fake::start().await;
    node(&fake, "n1", false);
    let store = Arc::new(Store::default());
    // Of a Warmup that went while no agent was here, and of a person.
    let pins = ["warmup-gone".to_owned(), "user".to_owned()].into();
    store.here.lock().insert("hf://o/old".into(), pins);
    store.broken.lock().insert(
        "hf://o/none".into(),
        WarmError {
            reason: "NotFound",
            message: "no such model".into(),
        },
    );
    // Of a node that had the name before.
    let old = json!({
        "apiVersion": crd::API_VERSION, "kind": "NodeCache",
        "metadata": { "name": "n1", "ownerReferences": [{ "apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "old" }] },
    });
    fake.put(GROUP, "nodecaches", old);
    let running = agent(&fake, "n1", Arc::clone(&store));
    let at_once = json!({ "references": ["hf://o/a"], "maxParallelNodes": 0, "priority": 7, "bandwidthPerNode": "1Mi" });
    let a = warmup(&fake, "d", "a", at_once);
    let waiting = warmup(
        &fake,
        "d",
        "b",
        json!({ "references": ["hf://o/b"], "pin": false }),
    );
    warmup(
        &fake,
        "d",
        "elsewhere",
        json!({ "references": ["hf://o/c"], "maxParallelNodes": 0, "nodeSelector": { "pool": "cpu" } }),
    );
    warmup(
        &fake,
        "d",
        "failing",
        json!({ "references": ["hf://o/none"], "maxParallelNodes": 0 }),
    );
    until("it warms", || store.pins("hf://o/a").is_some()).await;
    until("what nobody asks for is let go", || {
        store.pins("hf://o/old") == Some(["user".to_owned()].into())
    })
    .await;
    let order = store
        .orders
        .lock()
        .iter()
        .find(|o| o.reference.to_string() == "hf://o/a")
        .cloned()
        .unwrap();
    assert_eq!((order.priority, order.bandwidth), (7, Some(1 << 20)));
    assert_eq!(order.namespace, "d");
    let reported = |name: &str, state: &str| {
        let cache = fake.get(&cache_key("n1")).unwrap_or_default();
        let entries = cache["status"]["warmups"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        entries
            .iter()
            .any(|entry| entry["name"] == name && entry["state"] == state)
    };
    until("it says so", || {
        reported("a", "Warm") && reported("failing", "Failed")
    })
    .await;
    let own = fake.get(&Key::new("", "nodes", "", "n1")).unwrap();
    let owner =
        || fake.get(&cache_key("n1")).unwrap()["metadata"]["ownerReferences"][0]["uid"].clone();
    until("it is this node's", || owner() == own["metadata"]["uid"]).await;
    let cache = fake.get(&cache_key("n1")).unwrap();
    let mut wrong = Vec::new();
    schema::check(&schema::of("NodeCache"), &cache, "", &mut wrong);
    assert_eq!(wrong, [""; 0]);
    assert!(store.pins("hf://o/b").is_none(), "it is not its turn");
    fake.edit(&waiting, |w| {
        w["status"] =
            json!({ "observedGeneration": 1, "window": Window::all(), "reportSeconds": 2 });
    });
    until("its turn", || {
        store.pins("hf://o/b") == Some(BTreeSet::new())
    })
    .await;
    // Edited: what it asked for before is not pinned for it any more.
    fake.edit(&a, |w| w["spec"]["references"] = json!(["hf://o/a2"]));
    until("the edit", || {
        store.pins("hf://o/a2").is_some_and(|pins| pins.len() == 1)
    })
    .await;
    assert_eq!(store.pins("hf://o/a"), Some(BTreeSet::new()));
    // Deleted, and nobody says so.
    fake.faults(|faults| faults.lose = 1);
    fake.remove(&a);
    fake.compact();
    fake.cut();
    until("the deletion", || {
        store.pins("hf://o/a2") == Some(BTreeSet::new())
    })
    .await;
    until("it is reported", || {
        !reported("a", "Warm") && reported("b", "Warm")
    })
    .await;
    // A new process asks for nothing that is here.
    running.abort();
    let orders = store.orders.lock().len();
    let running = agent(&fake, "n1", Arc::clone(&store));
    let reports = || fake.count("patch", "nodecaches/status");
    let before = reports();
    until("another report", || reports() > before).await;
    let again: Vec<String> = store.orders.lock()[orders..]
        .iter()
        .map(|o| o.reference.to_string())
        .collect();
    assert!(!again.contains(&"hf://o/b".to_owned()), "{again:?}");
    // Somebody deletes the report.
    fake.remove(&cache_key("n1"));
    warmup(
        &fake,
        "d",
        "late",
        json!({ "references": ["hf://o/late"], "maxParallelNodes": 0 }),
    );
    until("it is made anew", || reported("late", "Warm")).await;
    running.abort();
    assert_eq!(asked(&fake), allowed(&["hearth-warmups", "hearth-nodes"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_store_or_node_had_is_brought_again() {
    let fake = Fake::start().await;
    let mut nodes = Vec::new();
    let key = warmup(
        &fake,
        "d",
        "w",
        json!({ "references": ["hf://o/a"], "maxParallelNodes": 0, "pin": false }),
    );
    let uid = fake.get(&key).unwrap()["metadata"]["uid"].clone();
    for (name, store_id, owner) in [
        ("same", "1", None),
        ("emptied", "0", None),
        ("renewed", "1", Some("an-older-one")),
    ] {
        node(&fake, name, false);
        let own = fake.get(&Key::new("", "nodes", "", name)).unwrap()["metadata"]["uid"].clone();
        let owner = owner.map_or(own, |owner| json!(owner));
        let cache = json!({
            "apiVersion": crd::API_VERSION, "kind": "NodeCache",
            "metadata": { "name": name, "ownerReferences": [{ "apiVersion": "v1", "kind": "Node", "name": name, "uid": owner }] },
            "status": {
                "storeId": store_id,
                "warmups": [{ "namespace": "d", "name": "w", "uid": uid, "generation": 1, "state": "Warm" }],
            },
        });
        fake.put(GROUP, "nodecaches", cache);
        let store = Arc::new(Store {
            id: "1".into(),
            ..Store::default()
        });
        let running = agent(&fake, name, Arc::clone(&store));
        until("a report", || {
            let status = fake.get(&cache_key(name)).unwrap()["status"].clone();
            status["storeId"] == "1"
                && status["warmups"][0]["state"] == "Warm"
                && !status["reported"].is_null()
        })
        .await;
        running.abort();
        nodes.push((name, store.orders.lock().len()));
    }
    // What is not pinned is brought once, and it was, but for those who have nothing of it.
    assert_eq!(nodes, [("same", 0), ("emptied", 1), ("renewed", 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_that_nobody_asked_for_goes_with_a_list() {
    let fake = Fake::start().await;
    node(&fake, "n1", false);
    let store = Arc::new(Store::default());
    let running = agent(&fake, "n1", Arc::clone(&store));
    warmup(
        &fake,
        "d",
        "a",
        json!({ "references": ["hf://o/a"], "maxParallelNodes": 0 }),
    );
    until("it warms", || store.pins("hf://o/a").is_some()).await;
    // It could not be let go when its Warmup went.
    let pins = ["warmup-gone".to_owned()].into();
    store.here.lock().insert("hf://o/old".into(), pins);
    fake.refuse("watch", "warmups", 410, "Gone");
    fake.cut();
    until("it is let go", || {
        store.pins("hf://o/old") == Some(BTreeSet::new())
    })
    .await;
    running.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_could_not_be_let_go_is_let_go_soon() {
    let fake = Fake::start().await;
    // It cannot say what is newest.
    fake.faults(|faults| faults.no_progress = true);
    node(&fake, "n1", false);
    let store = Arc::new(Store::default());
    let pins = ["warmup-gone".to_owned()].into();
    store.here.lock().insert("hf://o/old".into(), pins);
    store.stuck.store(1, SeqCst);
    let running = agent(&fake, "n1", Arc::clone(&store));
    let spec = json!({ "references": ["hf://o/a"], "maxParallelNodes": 0 });
    let a = warmup(&fake, "d", "a", spec);
    let is_free = |name: &str| store.pins(name) == Some(BTreeSet::new());
    until("what nobody has is let go", || is_free("hf://o/old")).await;
    until("it warms", || store.pins("hf://o/a").is_some()).await;
    store.stuck.store(1, SeqCst);
    fake.edit(&a, |w| w["spec"]["references"] = json!(["hf://o/b"]));
    until("what an edit left is let go", || is_free("hf://o/a")).await;
    assert!(!is_free("hf://o/b"));
    running.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_opens_the_model_and_its_public_image() {
    let fake = Fake::start().await;
    node(&fake, "n1", false);
    fake.edit(&Key::new("", "nodes", "", "n1"), |node| {
        node["metadata"]["labels"]["nvidia.com/gpu.product"] = json!("NVIDIA-H200");
    });
    fake.put("", "secrets", super::example_secret());
    let mut example = super::example("warmup.yaml").swap_remove(0);
    example["spec"]["maxParallelNodes"] = json!(0);
    fake.put(GROUP, "warmups", example);
    let store = Arc::new(Store::default());
    let running = agent(&fake, "n1", Arc::clone(&store));
    until("both are brought", || store.here.lock().len() == 2).await;
    for order in store.orders.lock().iter() {
        let is_image = order.reference.to_string().starts_with("oci://");
        let keys = order.keys.as_ref();
        assert_eq!(keys.is_some_and(|keys| keys.hub_token.is_some()), !is_image);
    }
    running.abort();
}
