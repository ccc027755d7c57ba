//! What pods of a node ask for is brought and pinned, whatever happens on the way.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use hearth::kube::{
    Config, Content, ContentError, ContentErrorKind, Pods, Wish, coldstart::Fetched, owner,
};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::fake::{Fake, Key};

const PREFETCH: &str = "hearth.dev/prefetch";

/// A node that brings things in no time, unless it is told otherwise.
#[derive(Default)]
struct Made {
    state: Mutex<MadeState>,
}

#[derive(Default)]
struct MadeState {
    /// References by owner.
    pins: BTreeMap<String, BTreeSet<String>>,
    wishes: Vec<(Wish, Instant)>,
    failures: VecDeque<ContentError>,
    /// Nothing is ever here.
    slow: bool,
    /// The next pins to be taken away are not, until it is told.
    hold: Option<Arc<tokio::sync::Notify>>,
    under_way: usize,
    most: usize,
}

impl Made {
    fn pinned(&self, uid: &str) -> Vec<String> {
        let state = self.state.lock();
        let pins = state.pins.get(&owner(uid));
        pins.into_iter().flatten().cloned().collect()
    }

    fn wishes(&self) -> Vec<Wish> {
        let state = self.state.lock();
        state.wishes.iter().map(|(wish, _)| wish.clone()).collect()
    }
}

#[async_trait]
impl Content for Made {
    async fn bring(&self, wish: &Wish) -> Result<Fetched, ContentError> {
        let slow = {
            let mut state = self.state.lock();
            state.wishes.push((wish.clone(), Instant::now()));
            if let Some(error) = state.failures.pop_front() {
                return Err(error);
            }
            if wish.pin {
                let pins = state.pins.entry(wish.owner.clone()).or_default();
                pins.insert(wish.reference.to_string());
            }
            state.under_way += 1;
            state.most = state.most.max(state.under_way);
            state.slow
        };
        if slow {
            std::future::pending::<()>().await;
        }
        self.state.lock().under_way -= 1;
        Ok(Fetched {
            total: 10,
            before: 4,
            prefetched: 6,
            ..Fetched::default()
        })
    }

    async fn unpin(&self, owner: &str, keep: &BTreeSet<String>) {
        let hold = self.state.lock().hold.take();
        if let Some(hold) = hold {
            hold.notified().await;
        }
        let mut state = self.state.lock();
        if let Some(pins) = state.pins.get_mut(owner) {
            pins.retain(|reference| keep.contains(reference));
        }
        state.pins.retain(|_, pins| !pins.is_empty());
    }

    async fn owners(&self) -> BTreeSet<String> {
        self.state.lock().pins.keys().cloned().collect()
    }
}

struct Bed {
    fake: Fake,
    made: Arc<Made>,
    pods: Arc<Pods>,
    task: tokio::task::JoinHandle<()>,
}

impl Bed {
    async fn new() -> Self {
        let (fake, made) = (Fake::start().await, Arc::default());
        Self::on(fake, made).await
    }

    async fn on(fake: Fake, made: Arc<Made>) -> Self {
        Self::with(fake, made, 60).await
    }

    async fn with(fake: Fake, made: Arc<Made>, grace_seconds: u64) -> Self {
        let config = Config {
            grace_seconds,
            ..Config::default()
        };
        let pods = Pods::new(fake.client(), "n1".to_owned(), &config, made.clone());
        let task = tokio::spawn(Arc::clone(&pods).run());
        let bed = Self {
            fake,
            made,
            pods,
            task,
        };
        tokio::time::timeout(Duration::from_secs(120), bed.pods.listed())
            .await
            .unwrap();
        bed
    }

    async fn restart(self) -> Self {
        let Self {
            fake, made, task, ..
        } = self;
        task.abort();
        let _ = task.await;
        Self::on(fake, made).await
    }

    /// Events on a pod, by reason.
    fn events(&self, reason: &str) -> Vec<Value> {
        let mut events = self.fake.all("events.k8s.io", "events");
        events.retain(|event| event["reason"] == reason);
        events
    }
}

fn pod(name: &str, annotations: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "default", "name": name, "annotations": annotations},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "r.example/i:1"}]},
    })
}

fn key(name: &str) -> Key {
    Key::new("", "pods", "default", name)
}

fn uid(object: &Value) -> String {
    object["metadata"]["uid"].as_str().unwrap().to_owned()
}

async fn until(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(
            begun.elapsed() < Duration::from_secs(120),
            "not in time: {what}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bound_pod_has_its_content_pinned_until_it_is_gone() {
    let bed = Bed::new().await;
    let asked = json!({PREFETCH: "hf://o/m, s3://b/p/", "hearth.dev/prefetch-priority": "high"});
    let mut waiting = pod("a", &asked);
    waiting["spec"]["nodeName"] = Value::Null;
    let made = bed.fake.put("", "pods", waiting);
    bed.fake.put("", "pods", pod("silent", &json!({})));
    assert_eq!(bed.made.wishes().len(), 0, "it is not bound");
    bed.fake
        .edit(&key("a"), |pod| pod["spec"]["nodeName"] = json!("n1"));
    let uid = uid(&made);
    until("pinned", || {
        bed.made.pinned(&uid) == ["hf://o/m", "s3://b/p/"]
    })
    .await;
    let wishes = bed.made.wishes();
    assert!(
        wishes
            .iter()
            .all(|w| w.priority == 10 && w.namespace == "default" && w.keys.is_none())
    );
    bed.fake.edit(&key("a"), |pod| {
        pod["status"] =
            json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
    });
    until("its start was told", || bed.events("ColdStart").len() == 1).await;
    let event = &bed.events("ColdStart")[0];
    let note = event["note"].as_str().unwrap();
    for words in [
        "bound, prefetch started +",
        "ready +",
        "complete +",
        "20 bytes, 8 were here",
        "12 prefetched",
    ] {
        assert!(note.contains(words), "{note}");
    }
    assert_eq!(event["regarding"]["uid"], uid);
    assert_eq!(event["type"], "Normal");
    assert_eq!(bed.made.wishes().len(), 2, "once each");
    bed.fake.remove(&key("a"));
    until("unpinned", || bed.made.pinned(&uid).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn annotations_change_and_pods_end() {
    let bed = Bed::new().await;
    let a = uid(&bed.fake.put(
        "",
        "pods",
        pod("a", &json!({PREFETCH: "hf://o/m hf://o/n"})),
    ));
    until("pinned", || bed.made.pinned(&a).len() == 2).await;
    bed.fake.edit(&key("a"), |pod| {
        pod["metadata"]["annotations"][PREFETCH] = json!("hf://o/n hf://o/x");
    });
    until("changed", || {
        bed.made.pinned(&a) == ["hf://o/n", "hf://o/x"]
    })
    .await;
    bed.fake.edit(&key("a"), |pod| {
        pod["metadata"]["annotations"]["hearth.dev/pin"] = json!("false");
    });
    until("unpinned", || bed.made.pinned(&a).is_empty()).await;
    let b = uid(&bed
        .fake
        .put("", "pods", pod("b", &json!({PREFETCH: "hf://o/m"}))));
    until("pinned", || bed.made.pinned(&b).len() == 1).await;
    bed.fake.edit(&key("b"), |pod| {
        pod["status"] = json!({"phase": "Succeeded"})
    });
    until("it has ended", || bed.made.pinned(&b).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_a_pod_that_goes_but_itself() {
    let bed = Bed::new().await;
    let asked = json!({PREFETCH: "hf://o/m"});
    let a = uid(&bed.fake.put("", "pods", pod("a", &asked)));
    until("pinned", || bed.made.pinned(&a).len() == 1).await;
    let hold = Arc::new(tokio::sync::Notify::new());
    bed.made.state.lock().hold = Some(Arc::clone(&hold));
    bed.fake
        .edit(&key("a"), |pod| pod["metadata"]["annotations"] = json!({}));
    until("it is let go", || bed.made.state.lock().hold.is_none()).await;
    // It asks again, and another one comes.
    bed.fake.edit(&key("a"), |pod| {
        pod["metadata"]["annotations"] = asked.clone()
    });
    let b = uid(&bed.fake.put("", "pods", pod("b", &asked)));
    until("the other is pinned", || bed.made.pinned(&b).len() == 1).await;
    assert_eq!(bed.made.wishes().len(), 2, "it would lose it again");
    hold.notify_one();
    until("it is brought again", || bed.made.wishes().len() == 3).await;
    until("and pinned", || bed.made.pinned(&a).len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_events_at_once_and_old_ones_are_told() {
    let bed = Bed::new().await;
    // More than are told at once.
    for n in 0..27 {
        let wrong = json!({PREFETCH: "hf://o/m nonsense"});
        bed.fake.put("", "pods", pod(&format!("p{n}"), &wrong));
    }
    let told = || bed.events("WrongAnnotation");
    until("all are told", || told().len() == 27).await;
    // The server has forgotten one, which is told again.
    let name = told()[0]["metadata"]["name"].as_str().unwrap().to_owned();
    let pod = told()[0]["regarding"]["name"].as_str().unwrap().to_owned();
    bed.fake
        .remove(&Key::new("events.k8s.io", "events", "default", &name));
    bed.fake.edit(&key(&pod), |pod| {
        pod["metadata"]["annotations"][PREFETCH] = json!("hf://o/n nonsense");
    });
    until("it is told again", || told().len() == 27).await;
    assert!(told().iter().all(|event| event["series"].is_null()));
}

#[tokio::test(flavor = "multi_thread")]
async fn images_of_the_pod_and_their_secrets() {
    let bed = Bed::new().await;
    let config = json!({"auths": {"r.example": {"auth": "dTpn"}}}).to_string();
    let data = |name: &str, text: &str| {
        use base64::Engine as _;
        json!({name: base64::engine::general_purpose::STANDARD.encode(text)})
    };
    for (name, data) in [
        ("pull", data(".dockerconfigjson", &config)),
        ("hub", data("token", "geheim\n")),
    ] {
        bed.fake.put(
            "",
            "secrets",
            json!({
                "apiVersion": "v1", "kind": "Secret",
                "metadata": {"namespace": "default", "name": name}, "data": data,
            }),
        );
    }
    let mut object = pod(
        "a",
        &json!({
            PREFETCH: "hf://o/m", "hearth.dev/prefetch-images": "true", "hearth.dev/credentials": "hub",
        }),
    );
    object["spec"]["imagePullSecrets"] = json!([{"name": "missing"}, {"name": "pull"}]);
    let a = uid(&bed.fake.put("", "pods", object));
    until("pinned", || bed.made.pinned(&a).len() == 2).await;
    for wish in bed.made.wishes() {
        let keys = wish.keys.unwrap();
        match wish.reference.to_string().as_str() {
            "hf://o/m" => assert_eq!(keys.hub_token.unwrap().expose(), "geheim"),
            "oci://r.example/i:1" => assert!(keys.registries[0].expose().contains("dTpn")),
            other => panic!("{other}"),
        }
    }
    // Only those that are named, and only one by one.
    let asked = bed.fake.asked();
    let secrets: Vec<_> = asked.iter().filter(|a| a.resource == "secrets").collect();
    assert!(secrets.iter().all(|a| a.verb == "get"), "{secrets:?}");
    let events = bed.fake.all("events.k8s.io", "events");
    assert_eq!(events.len(), 0, "{events:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_opens_the_model_and_its_public_image() {
    let bed = Bed::new().await;
    bed.fake.put("", "secrets", super::example_secret());
    let template = super::example("vllm.yaml")[0]["spec"]["template"].clone();
    let mut pod = pod("vllm", &template["metadata"]["annotations"]);
    pod["metadata"]["namespace"] = json!("models");
    pod["spec"] = template["spec"].clone();
    pod["spec"]["nodeName"] = json!("n1");
    bed.fake.put("", "pods", pod);
    until("both are asked for", || bed.made.wishes().len() == 2).await;
    for wish in bed.made.wishes() {
        let is_image = wish.reference.to_string().starts_with("oci://");
        let keys = wish.keys;
        assert_eq!(keys.is_some_and(|keys| keys.hub_token.is_some()), !is_image);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_told_once_and_does_not_hinder_the_rest() {
    let bed = Bed::new().await;
    let wrong = json!({
        PREFETCH: "hf://o/m nonsense", "hearth.dev/pin": "yes", "hearth.dev/credentials": "gone",
    });
    bed.fake.put("", "pods", pod("a", &wrong));
    until("told", || bed.events("WrongAnnotation").len() == 2).await;
    until("denied", || bed.events("PrefetchDenied").len() == 1).await;
    let notes: Vec<String> = (bed.fake.all("events.k8s.io", "events").iter())
        .map(|e| e["note"].as_str().unwrap().to_owned())
        .collect();
    for words in [
        "annotation hearth.dev/prefetch: \"nonsense\"",
        "annotation hearth.dev/pin: \"yes\"",
        "Secret default/gone: does not exist",
    ] {
        assert!(
            notes.iter().any(|n| n.contains(words)),
            "{words}: {notes:?}"
        );
    }
    // The next process says the same, which is counted, and is not another Event.
    let bed = bed.restart().await;
    until("counted", || {
        bed.events("WrongAnnotation")
            .iter()
            .all(|e| e["series"]["count"] == 2)
    })
    .await;
    assert_eq!(bed.events("WrongAnnotation").len(), 2);
    let b = uid(&bed
        .fake
        .put("", "pods", pod("b", &json!({PREFETCH: "x, hf://o/m"}))));
    until("pinned", || bed.made.pinned(&b) == ["hf://o/m"]).await;
    assert_eq!(
        bed.fake.count("patch", "pods") + bed.fake.count("update", "pods"),
        0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_takes_no_events_hinders_nothing() {
    let bed = Bed::new().await;
    bed.fake.faults(|faults| {
        faults.answers.push_back(super::fake::Refusal {
            verb: "",
            resource: "events",
            code: 403,
            reason: "Forbidden",
            message: "events.k8s.io is forbidden".to_owned(),
            retry_after: None,
            times: 1000,
        });
    });
    let a = uid(&bed
        .fake
        .put("", "pods", pod("a", &json!({PREFETCH: "? hf://o/m"}))));
    until("pinned", || bed.made.pinned(&a).len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_is_told_and_tried_again() {
    let bed = Bed::new().await;
    let error = ContentError::new(ContentErrorKind::Unavailable, "the origin h is down");
    bed.made.state.lock().failures.push_back(error);
    let a = uid(&bed
        .fake
        .put("", "pods", pod("a", &json!({PREFETCH: "hf://o/m"}))));
    until("told", || bed.events("PrefetchDelayed").len() == 1).await;
    until("pinned", || bed.made.pinned(&a).len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pins_outlive_restarts_old_lists_and_cuts() {
    let bed = Bed::new().await;
    let a = uid(&bed
        .fake
        .put("", "pods", pod("a", &json!({PREFETCH: "hf://o/m"}))));
    let b = uid(&bed
        .fake
        .put("", "pods", pod("b", &json!({PREFETCH: "hf://o/n"}))));
    until("pinned", || bed.made.owners_now().len() == 2).await;
    // The next process is given a list from before both.
    bed.fake.faults(|faults| faults.stale = 2);
    let bed = bed.restart().await;
    assert_eq!(bed.made.pinned(&a), ["hf://o/m"]);
    until("both are known again", || bed.made.wishes().len() >= 4).await;
    bed.fake.faults(|faults| faults.stale = 0);
    bed.fake.cut();
    bed.fake.compact();
    bed.fake.remove(&key("b"));
    until("the other stays", || bed.made.pinned(&a) == ["hf://o/m"]).await;
    let _ = b;
}

impl Made {
    fn owners_now(&self) -> BTreeSet<String> {
        self.state.lock().pins.keys().cloned().collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pins_of_pods_that_went_unseen_go_after_a_while() {
    let bed = Bed::new().await;
    let a = uid(&bed
        .fake
        .put("", "pods", pod("a", &json!({PREFETCH: "hf://o/m"}))));
    until("pinned", || bed.made.pinned(&a).len() == 1).await;
    let Bed {
        fake, made, task, ..
    } = bed;
    task.abort();
    let _ = task.await;
    fake.remove(&key("a"));
    let bed = Bed::with(fake, made, 2).await;
    assert_eq!(bed.made.pinned(&a), ["hf://o/m"], "the list may be old");
    until("unpinned", || bed.made.pinned(&a).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_namespace_does_not_take_all_slots() {
    let bed = Bed::new().await;
    bed.made.state.lock().slow = true;
    let many: Vec<String> = (0..60).map(|n| format!("hf://o/m{n}")).collect();
    for name in ["a", "b"] {
        bed.fake
            .put("", "pods", pod(name, &json!({PREFETCH: many.join(" ")})));
    }
    until("as many as it may", || bed.made.state.lock().under_way >= 8).await;
    let mut other = pod("c", &json!({PREFETCH: "s3://b/p/"}));
    other["metadata"]["namespace"] = json!("other");
    bed.fake.put("", "pods", other);
    until("the other has its turn", || {
        bed.made.wishes().iter().any(|w| w.namespace == "other")
    })
    .await;
    let state = bed.made.state.lock();
    let own = state
        .wishes
        .iter()
        .filter(|(w, _)| w.namespace == "default");
    assert_eq!(own.count(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clock_of_the_server_does_not_matter() {
    let bed = Bed::new().await;
    for (skew, name) in [(-86_400, "a"), (86_400, "b")] {
        bed.fake.skew(skew);
        let made = bed
            .fake
            .put("", "pods", pod(name, &json!({PREFETCH: "hf://o/m"})));
        bed.fake.edit(&key(name), |pod| {
            pod["status"] = json!({"conditions": [{"type": "Ready", "status": "True"}]});
        });
        let uid = uid(&made);
        let start = || bed.pods.starts().into_iter().find(|s| s.uid == uid);
        until("it has started", || start().is_some()).await;
        let start = start().unwrap();
        for time in [start.started, start.ready, start.complete] {
            assert!(time.unwrap() < Duration::from_secs(3600), "{start:?}");
        }
    }
}

/// (verb, group, resource) of a ClusterRole of `daemonset/`.
fn granted(role: &str) -> BTreeSet<(String, String, String)> {
    let base = crate::manifests::base();
    let is_role = |d: &&Value| d["kind"] == "ClusterRole" && d["metadata"]["name"] == role;
    let role = base.iter().find(is_role).unwrap();
    let texts = |list: &Value| -> Vec<String> {
        let list = list.as_array().unwrap().iter();
        list.map(|text| text.as_str().unwrap().to_owned()).collect()
    };
    let mut granted = BTreeSet::new();
    for rule in role["rules"].as_array().unwrap() {
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                for verb in texts(&rule["verbs"]) {
                    granted.insert((verb, group.clone(), resource.clone()));
                }
            }
        }
    }
    granted
}

#[tokio::test(flavor = "multi_thread")]
async fn its_rights_are_what_it_asks_for_and_no_more() {
    let bed = Bed::new().await;
    let wrong = json!({PREFETCH: "hf://o/m, nonsense"});
    bed.fake.put("", "pods", pod("a", &wrong));
    let told = |bed: &Bed| bed.events("WrongAnnotation").len() == 1;
    until("an event was told", || told(&bed)).await;
    // The next process tells it again, and finds it there.
    let bed = bed.restart().await;
    until("it was counted", || bed.fake.count("patch", "events") > 0).await;
    // With credentials a third role comes in, which namespaces bind by themselves.
    let named = json!({PREFETCH: "hf://o/m", "hearth.dev/credentials": "s"});
    bed.fake.put("", "pods", pod("b", &named));
    until("the secret was asked for", || {
        bed.fake.count("get", "secrets") > 0
    })
    .await;
    let asked = bed.fake.asked().into_iter();
    let asked: BTreeSet<_> = asked
        .map(|a| (a.verb.to_owned(), a.group, a.resource))
        .collect();
    let mut rights = granted("hearth-pods");
    rights.append(&mut granted("hearth-events"));
    rights.append(&mut granted("hearth-secrets"));
    assert_eq!(asked, rights);
}
