//! What a collector sees of requests of the kubelet and of containerd, and of an upgrade.

use hearth::r#gen::containerd::services::snapshots::v1::{
    PrepareSnapshotRequest, StatSnapshotRequest, UsageRequest, snapshots_client::SnapshotsClient,
};
use tonic::{Code, Request, transport::Endpoint};

use super::*;
use crate::collector::{Collector, Mode};

const PUBLISH: &str = "csi.v1.Node/NodePublishVolume";
const PREPARE: &str = "containerd.services.snapshots.v1.Snapshots/Prepare";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT: &str = "00f067aa0ba902b7";

/// A request of a client that has a span of its own.
fn traced<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let parent = format!("00-{TRACE}-{CLIENT}-01");
    let metadata = request.metadata_mut();
    metadata.insert("traceparent", parent.parse().unwrap());
    request
}

#[test]
fn requests_and_upgrades_have_spans() {
    let web = Web::slow("1m");
    let model = web.model("m", 8, 1);
    let collector = Collector::start(Mode::Takes);
    let mut agent = Agent::with(&format!("[trace]\nendpoint = '{}'\n", collector.url()));
    // One that runs by itself: clients are to hear that the server ends.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();

    let mut node = agent.csi.try_node().unwrap();
    let mut asked = agent.csi.asked("v", &[("source", &model)]);
    let pod = [
        ("pod.name", "p"),
        ("pod.namespace", "ns"),
        ("pod.uid", "u-1"),
    ];
    let pod = pod.map(|(key, value)| (format!("csi.storage.k8s.io/{key}"), value.to_owned()));
    asked.volume_context.extend(pod);
    let published = runtime.block_on(node.node_publish_volume(traced(asked)));
    published.unwrap();
    let missing = agent.csi.asked("w", &[("source", &web.url("none"))]);
    let failed = runtime.block_on(node.node_publish_volume(missing));
    assert_eq!(failed.unwrap_err().code(), Code::NotFound);

    runtime.block_on(async {
        let socket = agent.csi.bed.path("snapshotter.sock");
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        let mut snapshots = SnapshotsClient::new(endpoint.connect().await.unwrap());
        let asked = PrepareSnapshotRequest {
            snapshotter: "hearth".into(),
            key: "k".into(),
            ..Default::default()
        };
        snapshots.prepare(traced(asked.clone())).await.unwrap();
        let again = snapshots.prepare(asked).await;
        assert_eq!(again.unwrap_err().code(), Code::AlreadyExists);
        // What is asked again and again has none.
        let (snapshotter, key) = ("hearth".to_owned(), "k".to_owned());
        let stat = StatSnapshotRequest {
            snapshotter: snapshotter.clone(),
            key: key.clone(),
        };
        snapshots.stat(traced(stat)).await.unwrap();
        let usage = UsageRequest { snapshotter, key };
        snapshots.usage(traced(usage)).await.unwrap();
    });

    agent.upgrade();
    // Their spans come with the next batch, or with their end.
    let taken = collector.wait("take over", |_| true);
    let given = collector.wait("hand over", |_| true);
    let adopted = collector.wait("adopt mount", |_| true);
    let version = env!("HEARTH_VERSION");
    for span in [&taken, &given] {
        assert_eq!(
            (span.get("hearth.other.version"), span.status),
            (version, 0),
            "{span:?}"
        );
    }
    assert_eq!(taken.get("hearth.other.pid"), given.resource["process.pid"]);
    assert_eq!(given.get("hearth.other.pid"), taken.resource["process.pid"]);
    assert_eq!(taken.get("hearth.mounts"), "1");
    assert_eq!(adopted.get("hearth.reference"), model);
    assert_eq!(adopted.resource, taken.resource);

    let publish = collector.wait(PUBLISH, |span| span.trace == TRACE);
    assert_eq!(
        (&*publish.parent, publish.kind, publish.status),
        (CLIENT, 2, 0)
    );
    for (key, value) in [
        ("rpc.system.name", "grpc"),
        ("rpc.method", PUBLISH),
        ("rpc.response.status_code", "OK"),
        ("hearth.volume.id", "v"),
        ("hearth.reference", &model),
        ("k8s.pod.name", "p"),
        ("k8s.namespace.name", "ns"),
        ("k8s.pod.uid", "u-1"),
    ] {
        assert_eq!(publish.get(key), value, "{key}");
    }
    let resolve = collector.wait("resolve", |span| span.trace == TRACE);
    assert_eq!(resolve.parent, publish.id);

    let failed = collector.wait(PUBLISH, |span| span.trace != TRACE);
    assert_eq!(failed.get("rpc.response.status_code"), "NOT_FOUND");
    // Who asks for what is not there has made the mistake; what failed says so.
    assert_eq!((&*failed.parent, failed.status), ("", 0));
    let resolve = collector.wait("resolve", |span| span.parent == failed.id);
    assert_eq!((resolve.get("error.type"), resolve.status), ("NotFound", 2));
    assert!(resolve.message.contains(&web.url("none")), "{resolve:?}");

    let prepare = collector.wait(PREPARE, |span| span.trace == TRACE);
    assert_eq!(prepare.get("hearth.snapshot.key"), "k");
    let again = collector.wait(PREPARE, |span| span.trace != TRACE);
    assert_eq!(again.get("rpc.response.status_code"), "ALREADY_EXISTS");

    let names: Vec<String> = collector
        .spans()
        .into_iter()
        .map(|span| span.name)
        .collect();
    let unwanted = ["Stat", "Usage", "NodeGetInfo"];
    let found = names
        .iter()
        .find(|name| unwanted.iter().any(|end| name.ends_with(end)));
    assert_eq!(found, None);
}
