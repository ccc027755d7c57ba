//! The agent as a process, with this face alone.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use super::fake::{Fake, Key};
use crate::scripted::{Reply, Scripted};

/// Ended with the test.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn until(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "not in time: {what}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_starts_a_prefetch_and_its_end_unpins() {
    let fake = Fake::start().await;
    let origin = Scripted::start(|seen| Reply::good(seen, b"weights", "\"1\"")).await;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": fake.url()}}],
        "users": [{"name": "c", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
    });
    let config = format!(
        "[agent]\nsocket = {:?}\n[admin]\nenabled = false\n[kube]\nenabled = true\n[kube.api]\nkubeconfig = {:?}\n",
        path("agent.sock"),
        path("kubeconfig"),
    );
    std::fs::write(path("config.toml"), config).unwrap();
    let reference = origin.url("/model");
    fake.put(
        "",
        "pods",
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "namespace": "default", "name": "a",
                "annotations": {"hearth.dev/prefetch": reference},
            },
            "spec": {"nodeName": "n1", "containers": []},
        }),
    );
    let mut agent = Agent(
        Command::new(env!("CARGO_BIN_EXE_hearth"))
            .arg("--config")
            .arg(path("config.toml"))
            .arg("--store")
            .arg(path("store"))
            .args(["agent", "--node-name", "n1"])
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(path("log")).unwrap())
            .spawn()
            .unwrap(),
    );
    let log = || std::fs::read_to_string(path("log")).unwrap();
    // The kubelet has not joined the cluster yet, and then its certificate has not come.
    until("it waits", || log().contains("cannot be used")).await;
    let mut early = kubeconfig.clone();
    for field in ["client-certificate", "client-key"] {
        early["users"][0]["user"][field] = json!(path("none.pem"));
    }
    // Never half of one.
    let write = |config: &serde_json::Value| {
        std::fs::write(path("new"), config.to_string()).unwrap();
        std::fs::rename(path("new"), path("kubeconfig")).unwrap();
    };
    write(&early);
    until("it waits on", || log().contains("none.pem")).await;
    write(&kubeconfig);
    let pinned = || {
        let out = Command::new(env!("CARGO_BIN_EXE_hearth"))
            .arg("--store")
            .arg(path("store"))
            .args(["status", &reference])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        text.contains("complete and verified") && text.contains("pinned by pod-")
    };
    until("pinned", pinned).await;
    fake.remove(&Key::new("", "pods", "default", "a"));
    until("unpinned", || !pinned()).await;
    let pid = i32::try_from(agent.0.id()).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    let done = tokio::task::spawn_blocking(move || agent.0.wait().unwrap());
    assert!(done.await.unwrap().success());
}
