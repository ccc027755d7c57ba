//! The Hub's stub against the real `huggingface_hub` client, and our source against the stub.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::Command,
};

use hearth::{
    digest::{Digest, ObjectId},
    source::{Config, SourceErrorKind as Kind, Sources},
};
use tempfile::TempDir;

use crate::{
    servers::{Server, bed, python, set_env},
    sources::{Origin, bytes, conformance, fixtures, locate, read, resolve},
};

/// The stub and its repositories.
pub(crate) struct Stub {
    pub(crate) root: TempDir,
    pub(crate) server: Server,
}

impl Stub {
    pub(crate) fn start(page: usize) -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("models/org/my-model")).unwrap();
        let stub = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/hub_stub.py");
        let server = python(|port, _| {
            let line = format!("--lfs-from 50000 --port {port} --page {page}");
            let paths = [&stub, root.path()].map(|path| path.to_str().unwrap().to_owned());
            paths
                .into_iter()
                .chain(line.split(' ').map(str::to_owned))
                .collect()
        });
        Self { root, server }
    }

    pub(crate) fn write(&self, path: &str, body: &[u8]) {
        let file = self.root.path().join("models/org/my-model").join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        // By rename: old commits keep their bytes.
        let new = self.root.path().join(".new");
        fs::write(&new, body).unwrap();
        fs::rename(new, file).unwrap();
    }

    fn fill(&self) {
        for (path, body) in fixtures() {
            self.write(&path, &body);
        }
        self.control("POST", "commit", "");
    }

    /// One request to the stub's own interface; the body of the answer.
    pub(crate) fn control(&self, method: &str, what: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.server.port)).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} /_stub/{what} HTTP/1.1\r\nconnection: close\r\n\
             content-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 200"),
            "{answer}\n{}",
            self.server.log()
        );
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    pub(crate) fn set(&self, knobs: &serde_json::Value) {
        self.control("POST", "set", &knobs.to_string());
    }

    /// The requests since the last call.
    pub(crate) fn log(&self) -> Vec<serde_json::Value> {
        serde_json::from_str(&self.control("GET", "log", "")).unwrap()
    }

    fn config(&self) -> Config {
        Config {
            hub_endpoint: Some(self.server.url()),
            ..Config::default()
        }
    }
}

#[async_trait::async_trait]
impl Origin for Stub {
    fn reference(&self, path: &str) -> String {
        match path {
            "" => "hf://org/my-model".to_owned(),
            path => format!("hf://org/my-model/{path}"),
        }
    }

    async fn put(&self, path: &str, body: &[u8]) {
        self.write(path, body);
        self.control("POST", "commit", "");
    }

    async fn delete(&self, path: &str) {
        fs::remove_file(self.root.path().join("models/org/my-model").join(path)).unwrap();
        self.control("POST", "commit", "");
    }

    fn keeps_history(&self) -> bool {
        true
    }
}

#[test]
fn the_hub_conforms() {
    let stub = Stub::start(4);
    set_env(&[("HF_ENDPOINT", stub.server.url().as_str())]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(conformance(&stub));
}

#[test]
fn offline_asks_nobody() {
    let stub = Stub::start(4);
    set_env(&[
        ("HF_ENDPOINT", stub.server.url().as_str()),
        ("HF_HUB_OFFLINE", "1"),
    ]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let sources = Sources::new(Config::default());
    let error = runtime
        .block_on(resolve(&sources, "hf://org/my-model"))
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.to_string().contains("offline"), "{error}");
    assert!(stub.log().is_empty());
}

/// What the real client makes of the stub: all of what it and we rely on.
const CLIENT: &str = r#"
import hashlib, json, os, sys
from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, get_hf_file_metadata, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

endpoint, cache, wanted = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
api = HfApi(endpoint=endpoint)
info = api.model_info("org/my-model")
assert sorted(s.rfilename for s in info.siblings) == sorted(wanted), info.siblings
assert api.list_repo_refs("org/my-model").branches[0].target_commit == info.sha

files = {}
for entry in api.list_repo_tree("org/my-model", recursive=True):
    if hasattr(entry, "size"):
        files[entry.path] = entry
assert sorted(files) == sorted(wanted)
for path, (size, sha256) in wanted.items():
    assert files[path].size == size, path
    if files[path].lfs:
        assert files[path].lfs.sha256 == sha256, path
assert files["deep/er/down/model.safetensors"].lfs and not files["config.json"].lfs
top = {e.path for e in api.list_repo_tree("org/my-model", path_in_repo="deep")}
assert top == {"deep/er", "deep/tokenizer.json"}, top
found = api.get_paths_info("org/my-model", ["config.json", "deep", "nope"])
assert [e.path for e in found] == ["config.json", "deep"], found

folder = snapshot_download("org/my-model", endpoint=endpoint, cache_dir=cache)
assert os.path.basename(folder) == info.sha
for path, (size, sha256) in wanted.items():
    with open(os.path.join(folder, path), "rb") as f:
        assert hashlib.sha256(f.read()).hexdigest() == sha256, path
    blob = os.path.basename(os.path.realpath(os.path.join(folder, path)))
    assert blob == (sha256 if files[path].lfs else files[path].blob_id), (path, blob)

file = hf_hub_download("org/my-model", "config.json", revision=info.sha, endpoint=endpoint, cache_dir=cache)
assert os.path.getsize(file) == wanted["config.json"][0]
meta = get_hf_file_metadata(hf_hub_url("org/my-model", "deep/er/down/model.safetensors", endpoint=endpoint))
assert meta.commit_hash == info.sha and meta.etag == wanted["deep/er/down/model.safetensors"][1]
assert meta.size == wanted["deep/er/down/model.safetensors"][0]
assert not meta.location.startswith(endpoint)

def refused(kind, f):
    try:
        f()
    except kind:
        return
    raise AssertionError(f"no {kind}")

get = lambda repo, file, **more: hf_hub_download(repo, file, endpoint=endpoint, cache_dir=cache + "2", **more)
refused(RepositoryNotFoundError, lambda: get("org/nothing", "config.json"))
refused(RevisionNotFoundError, lambda: get("org/my-model", "config.json", revision="nope"))
refused(EntryNotFoundError, lambda: get("org/my-model", "nope.json"))
refused(GatedRepoError, lambda: get("org/gated", "config.json"))
assert open(get("org/gated", "config.json", token="hf_good")).read() == "{}"
print("passed")
"#;

#[test]
fn the_real_client_is_happy_with_the_stub() {
    let stub = Stub::start(3);
    let gated = stub.root.path().join("models/org/gated");
    fs::create_dir_all(&gated).unwrap();
    fs::write(gated.join("config.json"), "{}").unwrap();
    stub.fill();
    stub.set(&serde_json::json!({"token": "hf_good", "gated": ["models/org/gated"]}));
    let wanted: serde_json::Map<_, _> = fixtures()
        .into_iter()
        .map(|(path, body)| {
            (
                path,
                serde_json::json!([body.len(), Digest::of(&body).hex()]),
            )
        })
        .collect();
    let file = stub.root.path().join("wanted.json");
    fs::write(&file, serde_json::Value::from(wanted).to_string()).unwrap();
    let cache = stub.root.path().join("cache");
    let output = Command::new("timeout")
        .arg("120")
        .arg(bed().join("venv/bin/python"))
        .args(["-c", CLIENT, &stub.server.url()])
        .args([&cache, &file])
        .env("HF_HOME", stub.root.path().join("home"))
        .env("HF_HUB_DISABLE_XET", "1")
        .env("HF_HUB_DISABLE_TELEMETRY", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{}", stub.server.log());
    assert!(String::from_utf8_lossy(&output.stdout).contains("passed"));
    let log = stub.log();
    assert!(
        log.iter()
            .any(|seen| seen["server"] == "cdn" && seen["auth"] == false)
    );
    assert!(
        log.iter()
            .all(|seen| seen["server"] != "cdn" || seen["auth"] == false)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_tokens_and_signatures() {
    let stub = Stub::start(1000);
    stub.fill();
    let token = stub.root.path().join("token");
    fs::write(&token, "hf_good\n").unwrap();
    let config = Config {
        hub_token_file: Some(token.clone()),
        ..stub.config()
    };
    let repo = "models/org/my-model";
    stub.set(&serde_json::json!({
        "token": "hf_good", "private": [repo], "xet": true,
        "renamed": {"models/old/name": repo},
    }));
    // Private: it is not said to be there without the token, nor with a wrong one.
    let anonymous = Sources::new(stub.config());
    let error = resolve(&anonymous, "hf://org/my-model").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Denied, "{error}");
    assert!(error.to_string().contains("or is private"), "{error}");
    let sources = Sources::new(config);
    let (source, artifact) = resolve(&sources, "hf://org/my-model").await.unwrap();
    let big = "deep/er/down/model.safetensors";
    let body = &fixtures()[big];
    let (place, size) = locate(&artifact, big);
    let ids: Vec<_> = artifact.objects.iter().map(|o| o.id).collect();
    assert!(ids.contains(&ObjectId::Sha256(Digest::of(body))));

    // The renamed repository redirects at every step, and keeps the token.
    let (old, same) = resolve(&sources, "hf://old/name/deep").await.unwrap();
    let (old_place, _) = locate(&same, "er/down/model.safetensors");
    assert_eq!(read(&old, &old_place, 5..9).await.unwrap(), body[5..9]);
    let (old_place, _) = locate(&same, "tokenizer.json");
    assert_eq!(
        read(&old, &old_place, 5..9).await.unwrap(),
        fixtures()["deep/tokenizer.json"][5..9]
    );

    // One question for the signed URL serves all ranges; an expired one is renewed within the read.
    stub.log();
    for _ in 0..3 {
        assert_eq!(read(&source, &place, 0..size).await.unwrap(), *body);
    }
    stub.set(&serde_json::json!({"epoch": 1}));
    assert_eq!(read(&source, &place, 7..8).await.unwrap(), body[7..8]);
    let mut log = stub.log();
    let asked = |log: &[serde_json::Value], server: &str| {
        log.iter().filter(|seen| seen["server"] == server).count()
    };
    // The stub notes a request after it has answered.
    for _ in 0..3000 {
        if (asked(&log, "hub"), asked(&log, "cdn")) == (2, 5) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        log.extend(stub.log());
    }
    assert_eq!((asked(&log, "hub"), asked(&log, "cdn")), (2, 5), "{log:?}");

    // Faults of the CDN and limits of the Hub come through as what they are.
    stub.set(&serde_json::json!({"cdn_fail": 1}));
    let error = read(&source, &place, 0..size).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    stub.set(&serde_json::json!({"cdn_short": 1}));
    let error = read(&source, &place, 0..size).await.unwrap_err();
    assert!(error.to_string().contains("ended after"), "{error}");
    stub.set(&serde_json::json!({"throttle": 1}));
    let error = resolve(&sources, "hf://org/my-model").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Throttled);
    assert_eq!(error.retry_after().map(|wait| wait.as_secs()), Some(1));

    // Unchanged small files keep their ids across commits; ids do not depend on the token.
    stub.write("new.bin", &bytes(7, 100));
    stub.control("POST", "commit", "");
    stub.set(&serde_json::json!({"private": []}));
    let (_, newer) = resolve(&anonymous, "hf://org/my-model").await.unwrap();
    assert_ne!(newer.revision, artifact.revision);
    let newer_ids: Vec<_> = newer.objects.iter().map(|o| o.id).collect();
    assert!(ids.iter().all(|id| newer_ids.contains(id)));
    let pinned = format!("hf://org/my-model@{}", artifact.revision);
    assert_eq!(
        resolve(&anonymous, &pinned).await.unwrap().1.objects,
        artifact.objects
    );

    // The token is rotated on disk.
    stub.set(&serde_json::json!({"token": "hf_new", "gated": [repo]}));
    let error = resolve(&sources, "hf://org/my-model").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Denied, "{error}");
    assert!(!format!("{error:?}{source:?}").contains("hf_good"));
    fs::write(&token, "hf_new").unwrap();
    resolve(&sources, "hf://org/my-model").await.unwrap();
    let (place, size) = locate(&artifact, "config.json");
    assert_eq!(
        read(&source, &place, 0..size).await.unwrap(),
        fixtures()["config.json"]
    );

    // Gated: the tree is public, the content is not.
    let (source, _) = resolve(&anonymous, &pinned).await.unwrap();
    let error = read(&source, &place, 0..size).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Denied, "{error}");
    assert!(
        error.hint().is_some_and(|hint| hint.contains("terms")),
        "{error}"
    );
}
