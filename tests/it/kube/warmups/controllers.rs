//! What the controller does about `Warmup`s.

use super::*;

fn candidate(fake: &Fake, name: &str) -> (oneshot::Sender<()>, JoinHandle<()>) {
    let config = controller::Config {
        enabled: true,
        namespace: Some("hearth-system".into()),
        lease_seconds: 6,
        ..controller::Config::default()
    };
    let (stop, stopped) = oneshot::channel();
    let stopped = async { drop(stopped.await) };
    let run = controller::run(fake.client(), config, name.into(), stopped);
    (stop, tokio::spawn(run))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_says_labels_lets_in_and_deletes() {
    let fake = Fake::start().await;
    node(&fake, "n1", true);
    node(&fake, "n2", false);
    let gate = warmup(
        &fake,
        "hearth-system",
        "gate",
        json!({ "references": ["hf://o/a"], "startupGate": true }),
    );
    let over = json!({
        "apiVersion": crd::API_VERSION, "kind": "Warmup",
        "metadata": { "name": "over", "namespace": "d", "creationTimestamp": "2020-01-01T00:00:00Z" },
        "spec": { "references": ["hf://o/a"], "ttlSeconds": 60 },
    });
    fake.put(GROUP, "warmups", over);
    let over = Key::new(GROUP, "warmups", "d", "over");
    // Pods that are to come: what their template asks for is warmed ahead, on a few nodes.
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": { "name": "serve", "namespace": "d" },
        "spec": { "replicas": 3, "template": {
            "metadata": { "annotations": {
                "hearth.dev/prefetch": "hf://o/t, oci://r.example/i:1",
                "hearth.dev/prefetch-images": "true", "hearth.dev/credentials": "hub",
            } },
            "spec": { "containers": [{ "image": "r.example/i:1" }], "tolerations": [{ "operator": "Exists" }] },
        } },
    });
    fake.put("apps", "deployments", deployment);
    let serve = Key::new("apps", "deployments", "d", "serve");
    // More than a Warmup can hold.
    let labels: BTreeMap<String, &str> = (0..17).map(|n| (format!("l{n}"), "x")).collect();
    let picky = json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet",
        "metadata": { "name": "picky", "namespace": "d" },
        "spec": { "template": {
            "metadata": { "annotations": { "hearth.dev/prefetch": "hf://o/t" } },
            "spec": { "containers": [], "nodeSelector": labels },
        } },
    });
    fake.put("apps", "statefulsets", picky);
    // Of a kind that the cluster gets to know later.
    fake.refuse("list", "leaderworkersets", 404, "NotFound");
    let ahead = || {
        let mut warmups = fake.all(GROUP, "warmups").into_iter();
        warmups.find(|w| w["metadata"]["ownerReferences"][0]["kind"] == "Deployment")
    };
    let (stop, first) = candidate(&fake, "one");
    let (stop_second, second) = candidate(&fake, "two");
    until("what is over is deleted", || fake.get(&over).is_none()).await;
    until("what a template asks for", || ahead().is_some()).await;
    let made = ahead().unwrap();
    assert_eq!(made["spec"]["maxNodes"], 4);
    let once = json!(["hf://o/t", "oci://r.example/i:1"]);
    assert_eq!(made["spec"]["references"], once);
    let told = || fake.all("events.k8s.io", "events");
    until("what cannot be made is told", || told().len() == 1).await;
    let event = &told()[0];
    assert_eq!(event["regarding"]["kind"], "StatefulSet");
    assert_eq!(event["reason"], "WarmupRefused");
    let note = event["note"].as_str().unwrap();
    assert!(note.contains("nodeSelector: 17 entries"), "{note}");
    assert_eq!(made["spec"]["credentials"]["name"], "hub");
    assert_eq!(
        made["metadata"]["ownerReferences"][0]["uid"],
        fake.get(&serve).unwrap()["metadata"]["uid"]
    );
    let mut wrong = Vec::new();
    schema::check(
        &schema::of("Warmup"),
        &schema::without_nulls(made),
        "",
        &mut wrong,
    );
    assert_eq!(wrong, [""; 0]);
    let annotation = "/spec/template/metadata/annotations/hearth.dev~1prefetch";
    fake.edit(&serve, |d| {
        *d.pointer_mut(annotation).unwrap() = json!("hf://o/t2")
    });
    until("an edit of the template", || {
        ahead().unwrap()["spec"]["references"] == json!(["hf://o/t2", "oci://r.example/i:1"])
    })
    .await;
    fake.edit(&serve, |d| {
        d["spec"]["template"]["metadata"]["annotations"] = json!({})
    });
    until("nothing is asked for any more", || ahead().is_none()).await;
    let template = json!({ "metadata": { "annotations": { "hearth.dev/prefetch": "hf://o/l" } }, "spec": { "containers": [] } });
    let late = json!({
        "apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet",
        "metadata": { "name": "late", "namespace": "d" },
        "spec": { "leaderWorkerTemplate": { "size": 2, "workerTemplate": template } },
    });
    fake.put("leaderworkerset.x-k8s.io", "leaderworkersets", late);
    until("what a kind of an operator asks for", || {
        let warmups = fake.all(GROUP, "warmups");
        (warmups
            .iter()
            .filter(|w| w["metadata"]["ownerReferences"][0]["kind"] == "LeaderWorkerSet"))
        .count()
            == 2
    })
    .await;
    let status = || fake.get(&gate).unwrap()["status"].clone();
    until("the status", || status()["nodes"]["desired"] == 2).await;
    assert_eq!(status()["nodes"]["unreachable"], 2, "no agent has reported");
    let uid = fake.get(&gate).unwrap()["metadata"]["uid"].clone();
    let report = |name: &str| {
        let owner = fake.get(&Key::new("", "nodes", "", name)).unwrap()["metadata"]["uid"].clone();
        let cache = json!({
            "apiVersion": crd::API_VERSION, "kind": "NodeCache",
            "metadata": { "name": name, "ownerReferences": [{ "apiVersion": "v1", "kind": "Node", "name": name, "uid": owner }] },
            "status": {
                "warmups": [{ "namespace": "hearth-system", "name": "gate", "uid": uid, "generation": 1, "state": "Warm", "bytes": 5, "presentBytes": 5 }],
                "artifacts": [{ "reference": "hf://o/a", "digest": "d", "warm": true }],
            },
        });
        fake.put(GROUP, "nodecaches", cache);
    };
    // The first attempt meets a conflict, and the connection is cut.
    fake.refuse("patch", "nodes", 409, "Conflict");
    report("n1");
    fake.cut();
    let label = crd::warm_label("hf://o/a");
    let n1 = || fake.get(&Key::new("", "nodes", "", "n1")).unwrap();
    until("it is let in", || {
        n1()["spec"]["taints"].as_array().is_none_or(Vec::is_empty)
    })
    .await;
    assert_eq!(n1()["metadata"]["labels"][&label], "true");
    assert_eq!(n1()["metadata"]["labels"]["pool"], "gpu");
    // The leader goes; the other one goes on without waiting for the lease to be over.
    let lease = || fake.all("coordination.k8s.io", "leases")[0]["spec"].clone();
    let holder = lease()["holderIdentity"].as_str().unwrap().to_owned();
    let (mine, other) = match holder.starts_with("one_") {
        true => ((stop, first), (stop_second, second)),
        false => ((stop_second, second), (stop, first)),
    };
    mine.0.send(()).unwrap();
    mine.1.await.unwrap();
    report("n2");
    until("all are warm", || {
        let conditions = status()["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        conditions
            .iter()
            .any(|c| c["type"] == "Complete" && c["status"] == "True")
    })
    .await;
    assert_ne!(lease()["holderIdentity"], holder.as_str());
    assert_eq!(status()["bytes"], json!({ "total": 10, "present": 10 }));
    let mut wrong = Vec::new();
    schema::check(
        &schema::of("Warmup"),
        &schema::without_nulls(fake.get(&gate).unwrap()),
        "",
        &mut wrong,
    );
    assert_eq!(wrong, [""; 0]);
    // What a node does not say any more is not believed.
    fake.remove(&cache_key("n1"));
    until("its label goes", || {
        n1()["metadata"]["labels"][&label].is_null()
    })
    .await;
    other.0.send(()).unwrap();
    other.1.await.unwrap();
    assert_eq!(lease()["holderIdentity"], "");
    // Each leader has tried it once, and the second one told it again.
    let is_counted = || told()[0]["series"]["count"] == 2;
    until("it is told again", is_counted).await;
    let is_picky = |a: &super::super::fake::Asked| a.name.starts_with("statefulset-picky");
    assert_eq!(fake.asked().iter().filter(|a| is_picky(a)).count(), 2);
    let mut asked = asked(&fake);
    // A patch that makes an object needs this, too.
    asked.insert(("create".into(), GROUP.into(), "warmups".into()));
    // As of deployments, before what was made for them goes.
    assert!(asked.contains(&("get".into(), "apps".into(), "deployments".into())));
    for (group, _, plural) in hearth::kube::templates::KINDS {
        asked.insert(("get".into(), (*group).into(), (*plural).into()));
    }
    assert_eq!(asked, allowed(&["hearth-controller", "hearth-events"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_list_is_too_old_to_have_keeps_its_warmup() {
    let fake = Fake::start().await;
    // Nobody who watches hears of it.
    fake.faults(|faults| faults.lose = 1);
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": { "name": "serve", "namespace": "d" },
        "spec": { "template": {
            "metadata": { "annotations": { "hearth.dev/prefetch": "hf://o/t" } },
            "spec": { "containers": [] },
        } },
    });
    let version = |object: &Value| -> u64 {
        let version = object["metadata"]["resourceVersion"].as_str().unwrap();
        version.parse().unwrap()
    };
    let began = version(&fake.put("apps", "deployments", deployment));
    let made = || fake.all(GROUP, "warmups").pop();
    let (stop, controller) = candidate(&fake, "one");
    until("what a template asks for", || made().is_some()).await;
    stop.send(()).unwrap();
    controller.await.unwrap();
    let now = version(&fake.put("", "configmaps", json!({ "metadata": { "name": "x" } })));
    // The next one takes the lease before it lists.
    fake.faults(|faults| faults.stale = now - began + 10);
    let (stop, controller) = candidate(&fake, "two");
    let asked = || fake.count("get", "deployments") > 0;
    until("the workload itself is looked at", asked).await;
    let serve = Key::new("apps", "deployments", "d", "serve");
    fake.remove(&serve);
    until("it goes with its workload", || made().is_none()).await;
    assert_eq!(fake.count("delete", "warmups"), 1);
    stop.send(()).unwrap();
    controller.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn waves_pass_through_a_cluster_that_misbehaves() {
    let fake = Fake::start().await;
    fake.skew(-86_400);
    fake.faults(|faults| {
        faults.duplicate = true;
        faults.no_progress = true;
        faults.cut_after = Some(20);
    });
    let at_work = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let mut agents = Vec::new();
    for n in 0..4 {
        let name = format!("n{n}");
        node(&fake, &name, n == 0);
        let store = Store {
            takes: Duration::from_millis(500),
            at_work: Arc::clone(&at_work),
            ..Store::default()
        };
        agents.push(agent(&fake, &name, Arc::new(store)));
    }
    let key = warmup(
        &fake,
        "hearth-system",
        "w",
        json!({ "references": ["hf://o/a"], "maxParallelNodes": 2, "startupGate": true }),
    );
    let (stop, controller) = candidate(&fake, "c");
    until("all are warm", || {
        let status = fake.get(&key).unwrap()["status"].clone();
        status["nodes"]["warm"] == 4
    })
    .await;
    assert!(at_work.1.load(SeqCst) <= 2, "{at_work:?}");
    let n0 = || fake.get(&Key::new("", "nodes", "", "n0")).unwrap();
    until("the held one is let in", || {
        n0()["spec"]["taints"].as_array().is_none_or(Vec::is_empty)
    })
    .await;
    let label = crd::warm_label("hf://o/a");
    until("all are labelled", || {
        fake.all("", "nodes")
            .iter()
            .all(|n| n["metadata"]["labels"][&label] == "true")
    })
    .await;
    stop.send(()).unwrap();
    controller.await.unwrap();
    for agent in agents {
        agent.abort();
    }
}
