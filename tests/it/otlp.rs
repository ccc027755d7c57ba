//! Spans of a real process, at a collector that takes them, refuses them, answers nothing, or is not there.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    collector::{Collector, Mode},
    kube::fake::Fake,
    scripted::{Reply, Scripted},
};

const SECRET: &str = "hunter2hunter2";
/// The thread of the exporter, as far as the kernel shows its name.
const THREAD: &str = "OpenTelemetry.T";

/// An agent; ended with the test.
struct Agent {
    child: Child,
    dir: TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Agent {
    /// With the configuration `config` besides, and these variables. All that can be said is logged.
    fn start(config: &str, variables: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let config = format!(
            "[agent]\nsocket = {:?}\n[admin]\naddress = '127.0.0.1:0'\n{config}",
            path("agent.sock")
        );
        fs::write(path("config.toml"), config).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
        for (name, _) in std::env::vars() {
            if name.starts_with("OTEL_") {
                command.env_remove(name);
            }
        }
        let child = command
            .arg("--config")
            .arg(path("config.toml"))
            .arg("--store")
            .arg(path("store"))
            .args(["agent", "--node-name", "n1"])
            .env("HEARTH_LOG", "trace")
            // Batches are sent soon.
            .env("OTEL_BSP_SCHEDULE_DELAY", "50")
            .envs(variables.iter().copied())
            .stdout(Stdio::null())
            .stderr(fs::File::create(path("log")).unwrap())
            .spawn()
            .unwrap();
        let mut agent = Self { child, dir };
        until("it serves", || {
            assert!(agent.child.try_wait().unwrap().is_none(), "{}", agent.log());
            agent.log().contains("admin on http://")
        });
        agent
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.path("log")).unwrap()).into_owned()
    }

    /// Where `face` listens.
    fn address(&self, face: &str) -> String {
        let start = format!("{face} on http://");
        let mut found = None;
        until("it listens", || {
            let log = self.log();
            let mut lines = log.lines().filter_map(|line| line.strip_prefix(&start));
            found = lines.next().map(str::to_owned);
            found.is_some()
        });
        found.unwrap()
    }

    fn get(&self, face: &str, path: &str, headers: &str) -> String {
        Connection::to(&self.address(face)).get(path, headers).1
    }

    fn metric(&self, name: &str) -> u64 {
        let text = self.get("admin", "/metrics", "");
        let mut samples = text.lines().filter_map(|line| line.rsplit_once(' '));
        let found = samples.find(|(found, _)| *found == name);
        found
            .unwrap_or_else(|| panic!("{name}: {text}"))
            .1
            .parse()
            .unwrap()
    }

    fn threads(&self) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let names =
            tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
        names.map(|name| name.trim().to_owned()).collect()
    }

    /// Ends it; what it has logged.
    fn end(mut self) -> String {
        let pid = i32::try_from(self.child.id()).unwrap();
        kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
        let mut status = None;
        until("it ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        assert!(status.unwrap().success(), "{}", self.log());
        let log = self.log();
        assert!(!log.contains(SECRET) && !log.contains("panicked"), "{log}");
        log
    }
}

/// A connection to a face.
struct Connection(TcpStream);

impl Connection {
    fn to(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        Self(stream)
    }

    /// The status and body of an answer.
    fn get(&mut self, path: &str, headers: &str) -> (u16, String) {
        let request = format!("GET {path} HTTP/1.1\r\nhost: h\r\n{headers}\r\n");
        self.0.write_all(request.as_bytes()).unwrap();
        let mut bytes = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let mut lines = head.lines().filter_map(|line| line.split_once(": "));
                let length = lines.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
                if body.len() >= length.unwrap().1.parse().unwrap() {
                    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
                    return (status, body.to_owned());
                }
            }
            let mut piece = [0; 65536];
            let count = self.0.read(&mut piece).unwrap();
            assert!(count > 0, "{text}");
            bytes.extend_from_slice(&piece[..count]);
        }
    }
}

#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(
            begun.elapsed() < Duration::from_secs(120),
            "not in time: {what}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A blob that no registry is asked for.
const BLOB: &str = "/v2/a/blobs/none?ns=127.0.0.1:1";
const MIRROR: &str = "[mirror]\nenabled = true\naddress = '127.0.0.1:0'\n";

fn pod(annotations: &Value, ready: bool) -> Value {
    let ready = if ready { "True" } else { "False" };
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "default", "name": "a", "annotations": annotations},
        "spec": {"nodeName": "n1", "containers": []},
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_start_of_a_pod_is_a_trace() {
    let fake = Fake::start().await;
    let origin = Scripted::start(|seen| Reply::good(seen, b"weights", "\"1\"")).await;
    let collector = Collector::start(Mode::Takes);
    let kubeconfig = tempfile::NamedTempFile::new().unwrap();
    let context = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": fake.url()}}],
        "users": [{"name": "c", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
    });
    fs::write(kubeconfig.path(), context.to_string()).unwrap();
    let config = format!(
        "[kube]\nenabled = true\n[kube.api]\nkubeconfig = {:?}\n[trace]\nendpoint = 'http://127.0.0.1:1'\n",
        kubeconfig.path()
    );
    let reference = origin.url("/model");
    let url = collector.url();
    let headers = format!("authorization=Bearer%20{SECRET},x-tenant=t");
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &*url),
        ("OTEL_EXPORTER_OTLP_HEADERS", &*headers),
        (
            "OTEL_RESOURCE_ATTRIBUTES",
            "deployment.environment.name=test,service.version=9",
        ),
        ("KUBE_NODE_NAME", "n1"),
    ];
    let put = |ready| {
        let annotations = json!({"hearth.dev/prefetch": reference});
        fake.put("", "pods", pod(&annotations, ready));
    };
    let (start, log) = tokio::task::block_in_place(|| {
        let agent = Agent::start(&config, &variables);
        until("it knows the pods", || {
            agent.get("admin", "/readyz", "").contains("kube: serving")
        });
        put(false);
        until("it is here", || {
            agent.metric("hearth_store_objects_completed_total") > 0
        });
        put(true);
        (collector.wait("pod start", |_| true), agent.end())
    });

    assert_eq!((start.kind, start.status, &*start.parent), (1, 0, ""));
    for (key, value) in [
        ("k8s.namespace.name", "default"),
        ("k8s.pod.name", "a"),
        ("hearth.late", "false"),
        ("hearth.failed", "0"),
        ("hearth.bytes.total", "7"),
        ("hearth.bytes.from_origin", "7"),
        ("hearth.bytes.before", "0"),
    ] {
        assert_eq!(start.get(key), value, "{key}");
    }
    assert!(!start.get("k8s.pod.uid").is_empty());
    let mut events: Vec<&str> = start.events.iter().map(|(name, _)| &**name).collect();
    assert_eq!(events.remove(0), "prefetch started");
    assert!(
        events.contains(&"ready") && events.contains(&"complete"),
        "{events:?}"
    );
    let times = start.events.iter().map(|(_, at)| *at);
    assert!(times.clone().all(|at| at <= start.ended), "{start:?}");
    // The clocks of the machine and of the process are read one after the other.
    let slack = 1_000_000_000;
    assert!(
        times.clone().all(|at| at + slack >= start.began),
        "{start:?}"
    );

    let below = |name: &str, parent: &str| {
        let found = collector.wait(name, |span| span.trace == start.trace);
        assert_eq!(found.parent, parent, "{found:?}");
        assert_eq!((found.kind, found.status), (1, 0), "{found:?}");
        assert!(found.began <= found.ended);
        found
    };
    let prefetch = below("prefetch", &start.id);
    assert_eq!(prefetch.get("hearth.bytes.prefetched"), "7");
    assert_eq!(prefetch.get("hearth.pin"), "true");
    let resolve = below("resolve", &prefetch.id);
    assert_eq!(resolve.get("hearth.fresh"), "true");
    let warm = below("warm", &prefetch.id);
    assert_eq!(warm.get("hearth.bytes.from_origin"), "7");
    assert!(warm.get("hearth.digest").starts_with("sha256:"));
    for span in [&prefetch, &resolve, &warm] {
        assert_eq!(span.get("hearth.reference"), reference);
    }
    assert!(!format!("{:?}", collector.spans()).contains(SECRET));

    for (key, value) in [
        ("service.name", "hearth"),
        ("service.version", "9"),
        ("deployment.environment.name", "test"),
        ("hearth.command", "agent"),
        ("k8s.node.name", "n1"),
    ] {
        assert_eq!(start.resource[key], value, "{key}");
    }
    let head = collector.heads().remove(0).to_ascii_lowercase();
    assert!(head.starts_with("post /v1/traces http/1.1\r\n"), "{head}");
    assert!(
        head.contains(&format!("authorization: bearer {SECRET}")),
        "{head}"
    );
    assert!(
        head.contains("x-tenant: t") && head.contains("application/x-protobuf"),
        "{head}"
    );
    assert!(
        !log.contains("pod start"),
        "spans are for the collector: {log}"
    );
}

#[test]
fn a_request_belongs_to_the_trace_of_its_client() {
    let collector = Collector::start(Mode::Takes);
    let config = format!(
        "{MIRROR}[trace]\nendpoint = '{}/'\nsample_ratio = 0\n",
        collector.url()
    );
    let agent = Agent::start(&config, &[("OTEL_SERVICE_NAME", "warmer")]);
    let parent =
        |trace: &str, flags: &str| format!("traceparent: 00-{trace}-00f067aa0ba902b7-{flags}\r\n");
    let (sampled, other) = (
        "4bf92f3577b34da6a3ce929d0e0e4736",
        "5bf92f3577b34da6a3ce929d0e0e4736",
    );
    // Begins here: none of these are wanted.
    agent.get("mirror", BLOB, "");
    agent.get("mirror", BLOB, "traceparent: 00-nonsense\r\n");
    agent.get("mirror", BLOB, &parent(other, "00"));
    agent.get("mirror", "/v2/", &parent(sampled, "01"));
    agent.get("mirror", BLOB, &parent(sampled, "01"));
    agent.end();
    let spans = collector.spans();
    let [span] = &*spans else {
        panic!("{spans:#?}");
    };
    assert_eq!(span.name, "GET /v2/{name}/blobs/{digest}");
    assert_eq!((&*span.trace, &*span.parent), (sampled, "00f067aa0ba902b7"));
    assert_eq!((span.kind, span.status), (2, 0));
    assert_eq!(span.get("http.response.status_code"), "400");
    assert_eq!(span.get("url.path"), "/v2/a/blobs/none");
    assert_eq!(span.resource["service.name"], "warmer");
}

#[test]
fn what_fails_says_why() {
    let collector = Collector::start(Mode::Takes);
    let agent = Agent::start(
        MIRROR,
        &[(
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            &format!("{}/x", collector.url()),
        )],
    );
    agent.get("mirror", "/v2/a/manifests/latest?ns=127.0.0.1:1", "");
    agent.end();
    assert!(collector.heads()[0].starts_with("POST /x HTTP/1.1\r\n"));
    let served = collector.wait("GET /v2/{name}/manifests/{reference}", |_| true);
    let status = served.get("http.response.status_code");
    assert!(status.starts_with('5'), "{served:?}");
    assert_eq!((served.get("error.type"), served.status), (status, 2));
    assert_eq!(served.message, "", "the status says it all");
}

/// A collector that is none costs one line of the log, and counted spans; and nothing waits for it.
#[test]
fn without_an_answer_spans_are_dropped_and_counted() {
    const REQUESTS: u64 = 3000;
    let refusing = Collector::start(Mode::Refuses(401));
    let hanging = Collector::start(Mode::Hangs);
    // Nobody listens there, nor will while this goes on.
    let nobody = "http://127.0.0.1:1".to_owned();
    for (endpoint, why) in [
        (refusing.url(), Some("401")),
        (nobody, Some("refused")),
        (hanging.url(), None),
    ] {
        let variables = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &*endpoint),
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=hunter2hunter2"),
            // Not of every request.
            ("HEARTH_LOG", "info"),
            // Longer than this test has patience.
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "60000"),
        ];
        let agent = Agent::start(MIRROR, &variables);
        assert!(
            agent.threads().contains(&THREAD.to_owned()),
            "{:?}",
            agent.threads()
        );
        let mut client = Connection::to(&agent.address("mirror"));
        for _ in 0..REQUESTS {
            assert_eq!(client.get(BLOB, "").0, 400);
        }
        let dropped = |why: &str| {
            agent.metric(&format!(
                "hearth_telemetry_dropped_spans_total{{reason=\"{why}\"}}"
            ))
        };
        match why {
            Some(_) => until("they are dropped", || {
                dropped("collector") + dropped("queue") > REQUESTS / 2
            }),
            // A batch is under way, and the queue is full.
            None => assert!(dropped("queue") > 0),
        }
        assert_eq!(agent.metric("hearth_telemetry_exported_spans_total"), 0);
        let log = agent.end();
        if let Some(why) = why {
            let said: Vec<_> = log
                .lines()
                .filter(|line| line.contains("spans are not taken"))
                .collect();
            assert_eq!(said.len(), 1, "{said:?}");
            assert!(
                said[0].contains(why) && said[0].contains("WARN"),
                "{said:?}"
            );
        }
    }
}

#[test]
fn a_collector_that_comes_back_gets_what_is_new() {
    let collector = Collector::start(Mode::Refuses(503));
    let agent = Agent::start(MIRROR, &[("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url())]);
    agent.get("mirror", BLOB, "");
    until("it is said", || agent.log().contains("spans are not taken"));
    collector.now(Mode::Takes);
    agent.get("mirror", BLOB, "");
    collector.wait("GET /v2/{name}/blobs/{digest}", |_| true);
    until("it is counted", || {
        agent.metric("hearth_telemetry_exported_spans_total") > 0
    });
    assert!(agent.end().contains("spans are taken again"));
}

#[test]
fn without_being_told_to_nothing_is_exported() {
    let collector = Collector::start(Mode::Takes);
    let url = collector.url();
    for (variables, said) in [
        (vec![], None),
        (vec![("OTEL_SDK_DISABLED", "true")], None),
        (vec![("OTEL_TRACES_EXPORTER", "none")], None),
        (
            vec![("OTEL_TRACES_EXPORTER", "zipkin")],
            Some("OTEL_TRACES_EXPORTER"),
        ),
        (
            vec![("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
            Some("http/protobuf"),
        ),
        (
            vec![("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere")],
            Some("/nowhere"),
        ),
    ] {
        let mut all = variables.clone();
        if !all.is_empty() {
            all.push(("OTEL_EXPORTER_OTLP_ENDPOINT", &url));
        }
        let agent = Agent::start(MIRROR, &all);
        agent.get("mirror", BLOB, "");
        assert!(
            !agent.threads().contains(&THREAD.to_owned()),
            "{variables:?}"
        );
        let log = agent.end();
        if let Some(said) = said {
            let lines = log
                .lines()
                .filter(|line| line.contains("no spans are exported") && line.contains(said));
            assert_eq!(lines.count(), 1, "{variables:?}: {log}");
        }
    }
    assert!(collector.heads().is_empty());
}
