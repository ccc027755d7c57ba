//! Objects are followed whatever the API server does.

use std::{collections::BTreeMap, time::Duration};

use futures_util::{Stream, StreamExt as _};
use hearth::kube::watch::{Event, Selection, follow};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::fake::{Fake, Key};

const NODE: &str = "spec.nodeName=n1";

fn pod(name: &str, node: &str) -> serde_json::Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "default", "name": name},
        "spec": {"nodeName": node, "containers": []},
    })
}

fn key(name: &str) -> Key {
    Key::new("", "pods", "default", name)
}

/// What somebody who follows knows: name and a label.
struct Known<S> {
    events: std::pin::Pin<Box<S>>,
    pods: BTreeMap<String, String>,
    listed: Option<BTreeMap<String, String>>,
    lists: usize,
}

impl<S: Stream<Item = Event<Pod>>> Known<S> {
    fn new(events: S) -> Self {
        Self {
            events: Box::pin(events),
            pods: BTreeMap::new(),
            listed: None,
            lists: 0,
        }
    }

    async fn take(&mut self) {
        let text = |pod: &Pod| {
            let label = pod.labels().get("v").cloned().unwrap_or_default();
            (pod.name_any(), label)
        };
        match self.events.next().await.unwrap() {
            Event::Listing => self.listed = Some(BTreeMap::new()),
            Event::Found(pod) => self.listed.as_mut().unwrap().extend([text(&pod)]),
            Event::Listed => {
                self.pods = self.listed.take().unwrap();
                self.lists += 1;
            }
            Event::Changed(pod) => self.pods.extend([text(&pod)]),
            Event::Gone(pod) => drop(self.pods.remove(&pod.name_any())),
        }
    }

    /// Follows until it knows these.
    async fn until(&mut self, wanted: &[(&str, &str)]) {
        let wanted: BTreeMap<_, _> = wanted
            .iter()
            .map(|(name, v)| ((*name).to_owned(), (*v).to_owned()))
            .collect();
        let known = async {
            while self.pods != wanted || self.listed.is_some() || self.lists == 0 {
                self.take().await;
            }
        };
        let in_time = tokio::time::timeout(Duration::from_secs(120), known).await;
        assert!(in_time.is_ok(), "{:?} instead of {wanted:?}", self.pods);
    }
}

fn following(fake: &Fake) -> Known<impl Stream<Item = Event<Pod>>> {
    follow_with(fake, None)
}

fn follow_with(
    fake: &Fake,
    relist: Option<Duration>,
) -> Known<impl Stream<Item = Event<Pod>> + use<>> {
    let selection = Selection {
        fields: Some(NODE.to_owned()),
        relist,
        ..Selection::default()
    };
    Known::new(follow(Api::<Pod>::all(fake.client()), selection))
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_come_change_and_go() {
    let fake = Fake::start().await;
    fake.put("", "pods", pod("a", "n1"));
    fake.put("", "pods", pod("other", "n2"));
    let mut known = following(&fake);
    known.until(&[("a", "")]).await;
    fake.put("", "pods", pod("b", ""));
    fake.put("", "pods", pod("c", "n1"));
    known.until(&[("a", ""), ("c", "")]).await;
    // Bound: it is new to this node.
    fake.edit(&key("b"), |pod| pod["spec"]["nodeName"] = json!("n1"));
    fake.edit(&key("c"), |pod| {
        pod["metadata"]["labels"] = json!({"v": "2"})
    });
    fake.remove(&key("a"));
    known.until(&[("b", ""), ("c", "2")]).await;
    assert_eq!((fake.count("list", "pods"), known.lists), (1, 1));
    let asked = fake.asked();
    let list = asked.iter().find(|a| a.verb == "list").unwrap();
    assert_eq!(list.query["resourceVersion"], "0");
    assert!(!list.query.contains_key("limit"), "{list:?}");
    for one in &asked {
        assert_eq!(one.query["fieldSelector"], NODE);
        assert!(!one.query.contains_key("sendInitialEvents"), "{one:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_cut_goes_on_from_where_it_was() {
    let fake = Fake::start().await;
    let mut known = following(&fake);
    known.until(&[]).await;
    let mut wanted = Vec::new();
    let names: Vec<String> = (0..6).map(|n| format!("p{n}")).collect();
    for name in &names {
        fake.cut();
        fake.put("", "pods", pod(name, "n1"));
        wanted.push((name.as_str(), ""));
        known.until(&wanted).await;
    }
    assert!(fake.count("watch", "pods") > 1);
    assert_eq!(known.lists, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_that_end_after_an_event_or_at_once() {
    let fake = Fake::start().await;
    fake.faults(|f| f.cut_after = Some(1));
    let mut known = following(&fake);
    known.until(&[]).await;
    for name in ["a", "b", "c"] {
        fake.put("", "pods", pod(name, "n1"));
    }
    known.until(&[("a", ""), ("b", ""), ("c", "")]).await;
    // Not in a loop.
    fake.faults(|f| f.cut_after = Some(0));
    let before = fake.count("watch", "pods");
    let _ = tokio::time::timeout(Duration::from_secs(2), known.until(&[("x", "")])).await;
    let asked = fake.count("watch", "pods") - before;
    assert!(asked < 10, "{asked} watches in 2 seconds");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_is_too_old_begins_anew() {
    for by_status in [false, true] {
        let fake = Fake::start().await;
        fake.faults(|f| {
            f.gone_by_status = by_status;
            f.no_bookmarks = true;
        });
        fake.put("", "pods", pod("a", "n1"));
        let mut known = following(&fake);
        known.until(&[("a", "")]).await;
        fake.cut();
        fake.remove(&key("a"));
        fake.put("", "pods", pod("b", "n1"));
        fake.compact();
        known.until(&[("b", "")]).await;
        assert!(known.lists > 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_without_progress_and_a_server_that_is_behind() {
    let fake = Fake::start().await;
    fake.faults(|f| f.no_progress = true);
    fake.put("", "pods", pod("a", "n1"));
    let mut known = following(&fake);
    known.until(&[("a", "")]).await;
    assert_eq!(fake.count("list", "pods"), 1, "nothing was refused");
    // What a server says that has not seen yet what another one told.
    fake.faults(|f| {
        f.answers.push_back(super::fake::Refusal {
            verb: "watch",
            resource: "pods",
            code: 504,
            reason: "Timeout",
            message: "Timeout: Too large resource version: 999, current: 101".to_owned(),
            retry_after: Some(1),
            times: 2,
        });
    });
    fake.cut();
    fake.put("", "pods", pod("b", "n1"));
    known.until(&[("a", ""), ("b", "")]).await;
    assert!(known.lists > 1, "it was listed again");
    for asked in fake.asked().iter().filter(|a| a.verb == "list") {
        assert_eq!(asked.query["resourceVersion"], "0");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_waited_for() {
    let fake = Fake::start().await;
    fake.refuse("list", "pods", 403, "Forbidden");
    fake.refuse("list", "pods", 500, "InternalError");
    fake.refuse("watch", "pods", 403, "Forbidden");
    fake.faults(|f| {
        f.answers.push_back(super::fake::Refusal {
            verb: "watch",
            resource: "pods",
            code: 429,
            reason: "TooManyRequests",
            message: "too many requests, please try again later".to_owned(),
            retry_after: Some(1),
            times: 1,
        });
        f.latency = Duration::from_millis(20);
    });
    fake.put("", "pods", pod("a", "n1"));
    let mut known = following(&fake);
    known.until(&[("a", "")]).await;
    fake.put("", "pods", pod("b", "n1"));
    known.until(&[("a", ""), ("b", "")]).await;
    assert_eq!(known.lists, 1, "none of these makes a version useless");
}

#[tokio::test(flavor = "multi_thread")]
async fn duplicates_and_lost_events() {
    let fake = Fake::start().await;
    fake.faults(|f| f.duplicate = true);
    fake.put("", "pods", pod("a", "n1"));
    let mut known = follow_with(&fake, Some(Duration::from_secs(2)));
    known.until(&[("a", "")]).await;
    fake.put("", "pods", pod("b", "n1"));
    known.until(&[("a", ""), ("b", "")]).await;
    fake.faults(|f| f.lose = 2);
    fake.remove(&key("a"));
    fake.put("", "pods", pod("c", "n1"));
    known.until(&[("b", ""), ("c", "")]).await;
    assert!(known.lists > 1, "only a list can tell");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_is_not_understood_does_not_end_it() {
    let fake = Fake::start().await;
    let mut known = following(&fake);
    known.until(&[]).await;
    let mut strange = pod("strange", "n1");
    strange["spec"]["containers"] = json!("none");
    fake.put("", "pods", strange);
    fake.put("", "pods", pod("a", "n1"));
    known.until(&[("a", "")]).await;
    let mut other = following(&fake);
    other.until(&[("a", "")]).await;
}
