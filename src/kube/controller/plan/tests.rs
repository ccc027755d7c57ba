use k8s_openapi::api::core::v1::Taint;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::kube::crd::{CachedArtifact, NodeCacheStatus};

const OWN: &str = "hearth-system";

/// A cluster whose nodes do what their `Warmup` says.
struct Cluster {
    world: World,
    memory: Memory,
    start: Instant,
    seconds: u64,
}

impl Cluster {
    fn new() -> Self {
        Self {
            world: World::default(),
            memory: Memory::default(),
            start: Instant::now(),
            seconds: 0,
        }
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_secs(self.seconds)
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + self.seconds)
    }

    fn node(&mut self, name: &str, labels: Value) {
        let node = NodeView {
            name: name.into(),
            uid: format!("uid-{name}"),
            resource_version: "1".into(),
            labels: serde_json::from_value(labels).unwrap(),
            taints: Vec::new(),
            ready: true,
        };
        self.world.nodes.insert(name.into(), node);
        self.says(name, &[], &[]);
    }

    fn warmup(&mut self, namespace: &str, name: &str, spec: Value) -> Key {
        let warmup = json!({
            "metadata": { "name": name, "namespace": namespace, "uid": name, "generation": 1,
                          "creationTimestamp": "2027-01-15T08:00:00Z" },
            "spec": spec,
        });
        let key = (namespace.to_owned(), name.to_owned());
        self.world
            .warmups
            .insert(key.clone(), serde_json::from_value(warmup).unwrap());
        key
    }

    /// A node reports states of `Warmup`s (generation 1) and what is warm.
    fn says(&mut self, node: &str, states: &[(&str, WarmState)], warm: &[&str]) {
        let entry = |(uid, state): &(&str, WarmState)| WarmupOnNode {
            uid: (*uid).to_owned(),
            generation: 1,
            state: *state,
            bytes: 10,
            present_bytes: if *state == WarmState::Warm { 10 } else { 1 },
            message: if *state == WarmState::Failed {
                "no such model".into()
            } else {
                String::new()
            },
            reason: if *state == WarmState::Failed {
                "NotFound".into()
            } else {
                String::new()
            },
            ..WarmupOnNode::default()
        };
        let artifact = |reference: &&str| CachedArtifact {
            reference: (*reference).to_owned(),
            warm: true,
            ..CachedArtifact::default()
        };
        let cache = NodeCache {
            status: Some(NodeCacheStatus {
                warmups: states.iter().map(entry).collect(),
                artifacts: warm.iter().map(artifact).collect(),
                ..NodeCacheStatus::default()
            }),
            ..NodeCache::default()
        };
        let view = CacheView::new(cache, self.now());
        self.world.caches.insert(node.to_owned(), view);
    }

    /// What is to be done; statuses are taken over as the server would.
    fn reconcile(&mut self) -> Vec<Action> {
        let (now, wall) = (self.now(), self.wall());
        let actions = reconcile(&self.world, &mut self.memory, OWN, now, wall);
        for action in &actions {
            if let Action::Status { key, status } = action {
                self.world.warmups.get_mut(key).unwrap().status = Some((**status).clone());
            }
        }
        actions
    }

    fn status(&self, key: &Key) -> WarmupStatus {
        self.world.warmups[key].status.clone().unwrap_or_default()
    }

    fn admitted(&self, key: &Key) -> Vec<String> {
        let spec = &self.world.warmups[key].spec;
        let window = self.status(key).window;
        let admits = |node: &&NodeView| {
            let place = place(&key.1, &node.name);
            spec.selects(node) && window.as_ref().is_some_and(|w| w.admits(&place))
        };
        let admitted = self.world.nodes.values().filter(admits);
        admitted.map(|node| node.name.clone()).collect()
    }
}

fn condition<'a>(status: &'a WarmupStatus, kind: &str) -> &'a Condition {
    status.conditions.iter().find(|c| c.type_ == kind).unwrap()
}

fn held() -> Taint {
    Taint {
        key: NOT_WARM_TAINT.into(),
        effect: "NoSchedule".into(),
        ..Taint::default()
    }
}

#[test]
fn a_status_counts_says_why_and_finishes() {
    let mut cluster = Cluster::new();
    for name in ["a", "b", "c"] {
        cluster.node(name, json!({ "gpu": "yes" }));
    }
    cluster.node("other", json!({}));
    let spec = json!({ "references": ["hf://o/m"], "images": ["nginx:1.27"], "nodeSelector": { "gpu": "yes" } });
    let key = cluster.warmup("d", "w", spec);
    let actions = cluster.reconcile();
    assert_eq!(actions.len(), 1);
    let status = cluster.status(&key);
    assert_eq!(status.observed_generation, Some(1));
    assert_eq!((status.nodes.desired, status.nodes.waiting), (3, 3));
    assert_eq!(condition(&status, "Complete").reason, "Waiting");
    assert_eq!(
        status.artifacts[1].reference,
        "oci://docker.io/library/nginx:1.27"
    );
    assert_eq!(
        status.artifacts[1].label,
        warm_label("oci://docker.io/library/nginx:1.27")
    );
    assert_eq!(cluster.admitted(&key), ["a", "b", "c"].map(String::from));
    // Nothing changed: nothing is written.
    cluster.seconds = 10;
    assert!(cluster.reconcile().is_empty());
    cluster.says("a", &[("w", WarmState::Warm)], &[]);
    cluster.says("b", &[("w", WarmState::Warming)], &[]);
    cluster.says("c", &[("w", WarmState::Failed)], &[]);
    cluster.reconcile();
    let status = cluster.status(&key);
    let message = "1 of 3 nodes are warm, 1 at it, 1 failed";
    assert_eq!(condition(&status, "Complete").message, message);
    assert_eq!(
        condition(&status, "Degraded").message,
        "1 nodes failed, such as c: no such model"
    );
    assert_eq!(
        (
            status.failures.len(),
            status.bytes.total,
            status.bytes.present
        ),
        (1, 30, 12)
    );
    // A change that comes too soon after the last one waits.
    for node in ["b", "c"] {
        cluster.says(node, &[("w", WarmState::Warm)], &[]);
    }
    cluster.seconds += 1;
    assert!(cluster.reconcile().is_empty());
    cluster.seconds += 2;
    cluster.reconcile();
    let status = cluster.status(&key);
    let complete = condition(&status, "Complete");
    assert_eq!(
        (complete.status.as_str(), complete.reason.as_str()),
        ("True", "Warm")
    );
    assert_eq!(complete.last_transition_time.0.as_second(), 1_800_000_013);
    let first = status.completion_time.clone().unwrap();
    assert!(status.window.is_none());
    // A node joins: not complete any more, but it was.
    cluster.node("d", json!({ "gpu": "yes" }));
    cluster.seconds += 60;
    cluster.reconcile();
    assert_eq!(condition(&cluster.status(&key), "Complete").status, "False");
    assert_eq!(cluster.status(&key).completion_time, Some(first));
    // Edited: all of it begins anew, at once.
    cluster
        .world
        .warmups
        .get_mut(&key)
        .unwrap()
        .metadata
        .generation = Some(2);
    assert_eq!(cluster.reconcile().len(), 1);
    let status = cluster.status(&key);
    assert_eq!((status.nodes.waiting, status.completion_time), (4, None));
}

#[test]
fn mistakes_no_nodes_and_foreign_gates_are_said() {
    let mut cluster = Cluster::new();
    cluster.node("a", json!({}));
    let wrong = cluster.warmup(
        "d",
        "wrong",
        json!({ "references": ["hf://o/m", "s3:///x"] }),
    );
    let none = cluster.warmup(
        "d",
        "none",
        json!({ "references": ["hf://o/m"], "nodeSelector": { "x": "y" }, "startupGate": true }),
    );
    cluster.reconcile();
    let status = cluster.status(&wrong);
    assert_eq!(condition(&status, "Accepted").status, "False");
    assert!(condition(&status, "Accepted").message.contains("s3:///x"));
    assert!(status.window.is_none());
    let status = cluster.status(&none);
    assert_eq!(condition(&status, "Complete").reason, "NoNodes");
    assert_eq!(condition(&status, "StartupGate").reason, "OtherNamespace");
}

#[test]
fn nodes_that_do_not_answer_do_not_stop_a_wave() {
    let mut cluster = Cluster::new();
    for n in 0..10 {
        cluster.node(&format!("n{n}"), json!({}));
    }
    let key = cluster.warmup(
        "d",
        "w",
        json!({ "references": ["hf://o/m"], "maxParallelNodes": 2 }),
    );
    cluster.reconcile();
    let dead = cluster.admitted(&key);
    assert_eq!(dead.len(), 2);
    // One is not ready, the other and who comes instead say nothing.
    cluster.world.nodes.get_mut(&dead[0]).unwrap().ready = false;
    cluster.seconds += 10;
    cluster.reconcile();
    assert_eq!(cluster.status(&key).nodes.unreachable, 1);
    let silent = cluster.admitted(&key);
    cluster.seconds += 120;
    cluster.reconcile();
    assert_eq!(cluster.status(&key).nodes.unreachable, 3);
    let is_new = |name: &String| !dead.contains(name) && !silent.contains(name);
    let others: Vec<String> = cluster.admitted(&key).into_iter().filter(is_new).collect();
    assert_eq!(others.len(), 2);
    // One that is at it and falls silent loses its place, too.
    cluster.says(&others[0], &[("w", WarmState::Warming)], &[]);
    cluster.says(&others[1], &[("w", WarmState::Warm)], &[]);
    cluster.seconds += 5;
    cluster.reconcile();
    let nodes = cluster.status(&key).nodes;
    assert_eq!((nodes.warming, nodes.unreachable), (1, 3));
    cluster.seconds += 200;
    cluster.reconcile();
    assert_eq!(cluster.status(&key).nodes.warming, 0);
    // It comes back.
    cluster.says(&dead[1], &[], &[]);
    cluster.seconds += 5;
    cluster.reconcile();
    assert!(cluster.admitted(&key).contains(&dead[1]));
}

#[test]
fn labels_follow_what_is_warm_and_stay_within_bounds() {
    let mut cluster = Cluster::new();
    cluster.node(
        "a",
        json!({ "zone": "z", "warm.hearth.dev/0000000000000000": "true" }),
    );
    let many: Vec<String> = (0..50).map(|n| format!("hf://o/m{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    cluster.says("a", &[], &many);
    let actions = cluster.reconcile();
    let [Action::Node(change)] = &actions[..] else {
        panic!("{actions:?}");
    };
    assert_eq!(change.remove.len(), 1);
    assert_eq!(change.add.len(), MAX_LABELS);
    assert!(change.add.contains(&warm_label("hf://o/m0")) && change.taints.is_none());
    let node = cluster.world.nodes.get_mut("a").unwrap();
    node.labels.retain(|label, _| label == "zone");
    node.labels.extend(
        change
            .add
            .iter()
            .map(|label| (label.clone(), "true".to_owned())),
    );
    assert!(cluster.reconcile().is_empty());
    // Used in another order: what has a label keeps it.
    let mut other = many.clone();
    other.reverse();
    cluster.says("a", &[], &other);
    assert!(cluster.reconcile().is_empty());
    // Without a report nothing is known to be warm.
    cluster.world.caches.clear();
    let actions = cluster.reconcile();
    assert!(matches!(&actions[..], [Action::Node(change)] if change.remove.len() == MAX_LABELS));
}

#[test]
fn a_held_node_is_let_in_when_all_gates_are_warm_there() {
    let mut cluster = Cluster::new();
    let other = Taint {
        key: "gpu".into(),
        effect: "NoSchedule".into(),
        ..Taint::default()
    };
    cluster.node("a", json!({}));
    cluster.world.nodes.get_mut("a").unwrap().taints = vec![held(), other.clone()];
    let tolerating = json!([{ "key": "gpu", "operator": "Exists" }]);
    let gate =
        json!({ "references": ["hf://o/m"], "startupGate": true, "tolerations": tolerating });
    cluster.warmup(OWN, "gate", gate.clone());
    cluster.warmup("tenant", "foreign", gate.clone());
    // The API server takes none such any more; all nodes but one would wait for ever.
    let mut bounded = gate;
    bounded["maxNodes"] = json!(1);
    let bounded = cluster.warmup(OWN, "bounded", bounded);
    cluster.warmup(
        OWN,
        "elsewhere",
        json!({ "references": ["hf://o/m"], "startupGate": true, "nodeSelector": { "x": "y" } }),
    );
    let released = |actions: Vec<Action>| {
        actions.into_iter().find_map(|action| match action {
            Action::Node(change) => Some(change.taints.unwrap()),
            _ => None,
        })
    };
    for state in [WarmState::Waiting, WarmState::Warming, WarmState::Failed] {
        cluster.says("a", &[("gate", state)], &[]);
        assert_eq!(released(cluster.reconcile()), None, "{state:?}");
    }
    cluster.says("a", &[("gate", WarmState::Warm)], &[]);
    assert_eq!(released(cluster.reconcile()), Some(vec![other]));
    let status = cluster.status(&bounded);
    assert_eq!(condition(&status, "StartupGate").reason, "MaxNodes");
    // What was reported for a node of the same name that is gone does not count.
    cluster.world.caches.get_mut("a").unwrap().owner = Some("uid-of-an-older-a".into());
    assert_eq!(released(cluster.reconcile()), None);
}

#[test]
fn it_can_be_for_a_few_nodes_which_stay_the_same() {
    let mut cluster = Cluster::new();
    for n in 0..20 {
        cluster.node(&format!("n{n}"), json!({}));
    }
    cluster.world.nodes.get_mut("n3").unwrap().ready = false;
    cluster.world.caches.remove("n4");
    let spec = json!({ "references": ["hf://o/m"], "maxNodes": 3, "maxParallelNodes": 0 });
    let key = cluster.warmup("d", "w", spec);
    cluster.reconcile();
    let admitted: Vec<String> = (cluster.admitted(&key).into_iter())
        .filter(|n| n != "n3" && n != "n4")
        .collect();
    assert_eq!((admitted.len(), cluster.status(&key).nodes.desired), (3, 3));
    for name in &admitted {
        cluster.says(name, &[("w", WarmState::Warm)], &[]);
    }
    // More nodes come, some of which would be before them.
    for n in 20..60 {
        cluster.node(&format!("n{n}"), json!({}));
    }
    cluster.seconds += 10;
    cluster.reconcile();
    let status = cluster.status(&key);
    assert_eq!((status.nodes.desired, status.nodes.warm), (3, 3));
    assert_eq!(condition(&status, "Complete").status, "True");
}

#[test]
fn what_is_over_is_deleted() {
    let mut cluster = Cluster::new();
    let key = cluster.warmup(
        "d",
        "w",
        json!({ "references": ["hf://o/m"], "ttlSeconds": 60 }),
    );
    let made = cluster.world.warmups[&key]
        .metadata
        .creation_timestamp
        .clone()
        .unwrap();
    let age = 1_800_000_000 - made.0.as_second();
    cluster
        .world
        .warmups
        .get_mut(&key)
        .unwrap()
        .spec
        .ttl_seconds = Some(age + 60);
    assert!(matches!(&cluster.reconcile()[..], [Action::Status { .. }]));
    cluster.seconds = 60;
    let uid = "w".to_owned();
    assert_eq!(
        cluster.reconcile(),
        [Action::Delete {
            key,
            uid,
            owner: None
        }]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever nodes do, and however late they say it, no more than `maxParallelNodes` are at work, and all get their turn.
    #[test]
    fn waves_are_no_larger_than_asked_and_reach_everybody(
        nodes in 1usize..40,
        parallel in 1u32..8,
        seed in proptest::collection::vec(0u32..1000, 64),
    ) {
        let mut cluster = Cluster::new();
        let names: Vec<String> = (0..nodes).map(|n| format!("n{n}")).collect();
        for name in &names {
            cluster.node(name, json!({}));
        }
        let key = cluster.warmup("d", "w", json!({ "references": ["hf://o/m"], "maxParallelNodes": parallel }));
        // What a node does, and what it has said so far.
        let mut truth: BTreeMap<String, WarmState> = names.iter().map(|n| (n.clone(), WarmState::Waiting)).collect();
        let mut said = truth.clone();
        let mut random = seed.into_iter().cycle();
        for round in 0..4000 {
            cluster.seconds += 2;
            cluster.reconcile();
            let admitted = cluster.admitted(&key);
            for name in &names {
                let state = truth.get_mut(name).unwrap();
                match *state {
                    WarmState::Waiting if admitted.contains(name) => *state = WarmState::Warming,
                    WarmState::Warming if round % 7 == 0 || random.next().unwrap() % 3 == 0 => *state = WarmState::Warm,
                    _ => {}
                }
                if round % 10 == 0
                    || random.next().unwrap() % 4 == 0 || said[name] == *state && *state == WarmState::Warming {
                    said.insert(name.clone(), *state);
                    cluster.says(name, &[("w", *state)], &[]);
                }
            }
            let at_work = truth.values().filter(|state| **state == WarmState::Warming).count();
            prop_assert!(at_work <= parallel as usize, "{at_work} of {parallel} in round {round}");
            if said.values().all(|state| *state == WarmState::Warm) {
                cluster.seconds += 60;
                cluster.reconcile();
                let status = cluster.status(&key);
                prop_assert_eq!(&condition(&status, "Complete").reason, "Warm");
                return Ok(());
            }
        }
        prop_assert!(false, "not all were warmed: {said:?}");
    }

    /// However many take part, the rates of events and reports stay below their bounds.
    #[test]
    fn rates_do_not_grow_with_the_cluster(nodes in 1usize..100_000, warmups in 1usize..100, at_work in 0u64..100_000) {
        let interval = status_interval(nodes, warmups).as_secs_f64();
        let events = nodes as f64 * warmups as f64 / interval;
        prop_assert!(events <= EVENTS_PER_SECOND as f64 * 1.01, "{events}");
        let reports = at_work as f64 / f64::from(report_seconds(at_work));
        prop_assert!(reports <= REPORTS_PER_SECOND as f64, "{reports}");
    }
}
