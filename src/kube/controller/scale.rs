//! What the API server has to do for clusters of several sizes: the plan, the pace of reports and the bucket of changes,
//! as they are, on a simulated clock. `daemonset/SCALE.md` has the figures of the last line that each run prints.

use serde_json::json;

use super::{plan::*, *};
use crate::kube::{
    cache::{Inventory, Pace},
    crd::{CachedArtifact, NodeCacheStatus, WarmState, WarmupOnNode, place},
};

/// Seconds that a node takes for the `Warmup`.
const WARMS: u64 = 60;
/// Artifacts that each node has besides.
const OTHERS: usize = 10;
/// Seconds between two looks of the controller.
const LOOKS: u64 = 5;

struct Sim {
    name: String,
    state: WarmState,
    since: u64,
    pace: Pace,
    place: String,
}

/// Counts per second.
#[derive(Default)]
struct Rate {
    total: u64,
    second: u64,
    most: u64,
}

impl Rate {
    fn add(&mut self, n: u64) {
        self.total += n;
        self.second += n;
    }

    fn tick(&mut self) {
        self.most = self.most.max(self.second);
        self.second = 0;
    }
}

struct Load {
    reports: Rate,
    report_bytes: Rate,
    statuses: Rate,
    events: Rate,
    event_bytes: Rate,
    patches: Rate,
    most_at_work: usize,
    warm: usize,
    largest_cache: usize,
    largest_status: usize,
}

fn report(node: &Sim, reference: &str) -> NodeCacheStatus {
    let artifact = |reference: String, warm| CachedArtifact {
        reference,
        digest: format!("sha256:{}", "0".repeat(64)),
        bytes: 16_000_000_000,
        present_bytes: 8_000_000_000,
        warm,
        pinned: warm,
    };
    let mut artifacts = vec![artifact(
        reference.to_owned(),
        node.state == WarmState::Warm,
    )];
    artifacts.extend(
        (0..OTHERS).map(|n| artifact(format!("hf://organisation/model-number-{n}@main"), true)),
    );
    let entry = WarmupOnNode {
        namespace: "models".into(),
        name: "w".into(),
        uid: "w".into(),
        generation: 1,
        state: node.state,
        ..WarmupOnNode::default()
    };
    let inventory = Inventory {
        artifacts,
        ..Inventory::default()
    };
    NodeCacheStatus::new(inventory, vec![entry], |r| r == reference)
}

fn simulate(count: usize, parallel: usize, span: u64) -> Load {
    let start = Instant::now();
    let at = |seconds: u64| start + Duration::from_secs(seconds);
    let reference = "hf://organisation/model@main";
    let key: Key = ("models".to_owned(), "w".to_owned());
    let warmup = json!({
        "metadata": { "name": "w", "namespace": "models", "uid": "w", "generation": 1 },
        "spec": { "references": [reference], "maxParallelNodes": parallel },
    });
    let mut world = World::default();
    world
        .warmups
        .insert(key.clone(), serde_json::from_value(warmup).unwrap());
    let mut nodes: Vec<Sim> = Vec::new();
    for n in 0..count {
        let name = format!("node-{n:05}");
        let labels = (0..OTHERS).map(|n| {
            (
                crate::kube::crd::warm_label(&format!("hf://organisation/model-number-{n}@main")),
                "true".to_owned(),
            )
        });
        let view = NodeView {
            name: name.clone(),
            uid: name.clone(),
            labels: labels.collect(),
            ready: true,
            ..NodeView::default()
        };
        world.nodes.insert(name.clone(), view);
        let node = Sim {
            place: place("w", &name),
            state: WarmState::Waiting,
            since: 0,
            pace: Pace::new(Duration::from_secs(60)),
            name,
        };
        let cache = NodeCache {
            status: Some(report(&node, reference)),
            ..NodeCache::default()
        };
        world
            .caches
            .insert(node.name.clone(), CacheView::new(cache, at(0)));
        nodes.push(node);
    }
    let mut memory = Memory::default();
    let mut bucket = Bucket::new(Config::default().node_changes_per_second);
    let mut load = Load {
        reports: Rate::default(),
        report_bytes: Rate::default(),
        statuses: Rate::default(),
        events: Rate::default(),
        event_bytes: Rate::default(),
        patches: Rate::default(),
        most_at_work: 0,
        warm: 0,
        largest_cache: 0,
        largest_status: 0,
    };
    let mut random = 1u64;
    let mut chance = move || {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as f64 / (1u64 << 31) as f64
    };
    for second in 0..span {
        let now = at(second);
        if second % LOOKS == 0 {
            let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + second);
            for action in reconcile(&world, &mut memory, "hearth-system", now, wall) {
                match action {
                    Action::Status { key, status } => {
                        let warmup = world.warmups.get_mut(&key).unwrap();
                        warmup.status = Some(*status);
                        let bytes = serde_json::to_vec(warmup).unwrap().len();
                        load.largest_status = load.largest_status.max(bytes);
                        load.statuses.add(1);
                        // All nodes watch it.
                        load.events.add(count as u64);
                        load.event_bytes.add((count * bytes) as u64);
                    }
                    Action::Node(change) if bucket.take(now) => {
                        let node = world.nodes.get_mut(&change.name).unwrap();
                        node.labels.extend(
                            change
                                .add
                                .into_iter()
                                .map(|label| (label, "true".to_owned())),
                        );
                        node.labels
                            .retain(|label, _| !change.remove.contains(label));
                        load.patches.add(1);
                    }
                    Action::Node(_) => {}
                    Action::Delete { .. } | Action::Make { .. } => unreachable!(),
                }
            }
        }
        let status = world.warmups[&key].status.clone().unwrap_or_default();
        let mut at_work = 0;
        for node in &mut nodes {
            let window = status.window.as_ref();
            let before = node.state;
            match node.state {
                WarmState::Waiting if window.is_some_and(|w| w.admits(&node.place)) => {
                    (node.state, node.since) = (WarmState::Warming, second);
                }
                WarmState::Warming if second - node.since >= WARMS => node.state = WarmState::Warm,
                _ => {}
            }
            if let Some(seconds) = status.report_seconds {
                node.pace.set(Duration::from_secs(seconds.into()));
            }
            let is_at_work = node.state == WarmState::Warming;
            at_work += usize::from(is_at_work);
            if before != node.state || is_at_work {
                node.pace.changed(now, chance());
            }
            if node.pace.due().is_some_and(|due| due <= now) {
                node.pace.wrote(now);
                let status = report(node, reference);
                let bytes = serde_json::to_vec(&status).unwrap().len();
                load.largest_cache = load.largest_cache.max(bytes);
                load.reports.add(1);
                load.report_bytes.add(bytes as u64);
                let cache = NodeCache {
                    status: Some(status),
                    ..NodeCache::default()
                };
                world
                    .caches
                    .insert(node.name.clone(), CacheView::new(cache, now));
            }
        }
        load.most_at_work = load.most_at_work.max(at_work);
        for rate in [
            &mut load.reports,
            &mut load.report_bytes,
            &mut load.statuses,
            &mut load.events,
            &mut load.event_bytes,
            &mut load.patches,
        ] {
            rate.tick();
        }
    }
    load.warm = nodes
        .iter()
        .filter(|node| node.state == WarmState::Warm)
        .count();
    load
}

#[test]
fn the_load_of_the_api_server_does_not_grow_with_the_cluster() {
    println!(
        "nodes parallel seconds | reports/s mean most KB/s | status writes/s | events/s mean KB/s | node patches/s | warm"
    );
    for (count, parallel, span) in [
        (10, 10, 600),
        (1000, 100, 600),
        (5000, 500, 600),
        (65_000, 2000, 150),
    ] {
        let load = simulate(count, parallel, span);
        let mean = |rate: &Rate| rate.total as f64 / span as f64;
        println!(
            "{count} {parallel} {span} | {:.1} {} {:.0} | {:.2} | {:.0} {:.0} | {:.1} | {}",
            mean(&load.reports),
            load.reports.most,
            mean(&load.report_bytes) / 1e3,
            mean(&load.statuses),
            mean(&load.events),
            mean(&load.event_bytes) / 1e3,
            mean(&load.patches),
            load.warm,
        );
        assert!(
            mean(&load.reports) <= REPORTS_PER_SECOND as f64 * 1.2,
            "{}",
            mean(&load.reports)
        );
        assert!(
            mean(&load.events) <= EVENTS_PER_SECOND as f64 * 1.2 + count as f64 / span as f64 * 2.0
        );
        assert!(mean(&load.patches) <= 21.0);
        assert!(load.largest_cache <= 100 << 10 && load.largest_status <= 64 << 10);
        assert!(load.most_at_work <= parallel, "{}", load.most_at_work);
        if span > 300 && count / parallel <= 4 {
            assert_eq!(load.warm, count);
        }
        assert!(load.warm > 0);
    }
}
