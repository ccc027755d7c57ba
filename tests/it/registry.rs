//! Registries that want tokens, redirect, fail, lie or have mirrors, by script: the right bytes, or an
//! error of the right kind that shows no secret; and no more requests than needed.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::{
    collections::HashMap,
    fs,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, future::join_all};
use hearth::{
    digest::Digest,
    reference::Reference,
    source::{Config, Layered, Source, SourceError, SourceErrorKind as Kind, Sources},
    tree::Location,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::scripted::{Reply, Scripted, Seen};

const SECRET: &str = "geheim";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

fn data(size: usize) -> Vec<u8> {
    (0..size).map(|i| (i * 31 % 251) as u8).collect()
}

fn digest(bytes: &[u8]) -> String {
    Digest::of(bytes).to_string()
}

/// What a registry holds, by path below `/v2/<repository>/`.
#[derive(Clone, Default)]
struct Held(HashMap<String, (String, Vec<u8>)>);

impl Held {
    fn blob(&mut self, bytes: &[u8]) -> Value {
        let kind = "application/octet-stream".to_owned();
        let digest = digest(bytes);
        self.0
            .insert(format!("blobs/{digest}"), (kind, bytes.to_vec()));
        json!({ "digest": digest, "size": bytes.len() })
    }

    /// Puts a manifest under its digest, and under `tag` where it is not empty.
    fn manifest(&mut self, tag: &str, document: &Value) -> Value {
        let bytes = serde_json::to_vec(document).unwrap();
        let kind = document["mediaType"]
            .as_str()
            .unwrap_or(OCI_MANIFEST)
            .to_owned();
        let digest = digest(&bytes);
        if !tag.is_empty() {
            self.0
                .insert(format!("manifests/{tag}"), (kind.clone(), bytes.clone()));
        }
        let size = bytes.len();
        self.0
            .insert(format!("manifests/{digest}"), (kind.clone(), bytes));
        json!({ "digest": digest, "size": size, "mediaType": kind })
    }

    /// An image of these layers.
    fn image(&mut self, tag: &str, arch: &str, layers: &[Vec<u8>]) -> Value {
        let document = self.document(arch, layers);
        self.manifest(tag, &document)
    }

    fn document(&mut self, arch: &str, layers: &[Vec<u8>]) -> Value {
        let diff_ids: Vec<_> = layers
            .iter()
            .map(|l| digest(&[l, &b"decoded"[..]].concat()))
            .collect();
        let config = json!({
            "architecture": arch, "os": "linux", "created": "",
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let mut config = self.blob(&serde_json::to_vec(&config).unwrap());
        config["mediaType"] = OCI_CONFIG.into();
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| {
                let mut layer = self.blob(layer);
                layer["mediaType"] = GZIP.into();
                layer
            })
            .collect();
        json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers })
    }

    /// Answers as a registry does that wants nothing.
    fn answer(&self, seen: &Seen) -> Reply {
        self.below("/v2/team/app/", seen)
    }

    fn below(&self, base: &str, seen: &Seen) -> Reply {
        let Some((kind, bytes)) = seen.path().strip_prefix(base).and_then(|p| self.0.get(p)) else {
            let body = r#"{"errors": [{"code": "MANIFEST_UNKNOWN"}]}"#;
            return Reply::new("404 Not Found\ncontent-type: application/json", body);
        };
        match seen.range() {
            Some(_) => Reply::good(seen, bytes, "\"x\""),
            None => Reply::new(&format!("200 OK\ncontent-type: {kind}"), bytes.clone()),
        }
    }
}

/// A place for settings: `auth.json`, `certs.d`.
struct Settings(TempDir);

impl Settings {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn login(self, host: &str, entry: Value) -> Self {
        let file = json!({ "auths": { host: entry } });
        fs::write(self.0.path().join("auth.json"), file.to_string()).unwrap();
        self
    }

    fn hosts(self, host: &str, text: &str) -> Self {
        let dir = self.0.path().join("certs.d").join(host);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("hosts.toml"), text).unwrap();
        self
    }

    fn config(&self) -> Config {
        let mut config = Config {
            registry_config_path: Some(self.0.path().join("certs.d")),
            ..Config::default()
        };
        config.oci.auth_files = vec![self.0.path().join("auth.json")];
        config
    }

    fn open(&self, reference: &str) -> Arc<dyn Source> {
        Sources::new(self.config())
            .open(&reference.parse().unwrap())
            .unwrap()
    }
}

async fn layered(source: &Arc<dyn Source>, reference: &str) -> Result<Layered, SourceError> {
    let found = source.layered(&reference.parse().unwrap()).await?;
    Ok(found.expect("an image"))
}

async fn read(
    source: &Arc<dyn Source>,
    blob: &str,
    range: Range<u64>,
) -> Result<Vec<u8>, SourceError> {
    let location = Location {
        path: blob.to_owned(),
        generation: None,
        offset: 0,
    };
    let mut stream = source.read(&location, range).await?;
    let mut found = Vec::new();
    while let Some(chunk) = stream.next().await {
        found.extend_from_slice(&chunk?);
    }
    Ok(found)
}

/// Everything a person or a log could come to see of an error.
fn shown(error: &SourceError) -> String {
    format!("{error} {error:?} {:?}", error.hint())
}

fn targets(server: &Scripted) -> Vec<String> {
    server
        .take_log()
        .into_iter()
        .map(|seen| seen.target)
        .collect()
}

#[tokio::test]
async fn an_image_is_its_layers() {
    let mut held = Held::default();
    let layers = [data(100), data(5000)];
    let manifest = held.image("1", "amd64", &layers);
    let answers = held.clone();
    let server = Scripted::start(move |seen| answers.answer(seen)).await;
    let settings = Settings::new();
    let reference = format!("oci://{}/team/app:1", server.address);
    let source = settings.open(&reference);
    let found = layered(&source, &reference).await.unwrap();
    assert_eq!(found.reference, reference);
    assert_eq!(
        found.manifest.to_string(),
        manifest["digest"].as_str().unwrap()
    );
    assert_eq!(found.platform.as_ref().unwrap().to_string(), "linux/amd64");
    assert_eq!(found.root, "");
    let sizes: Vec<_> = found.layers.iter().map(|layer| layer.size).collect();
    assert_eq!(sizes, [100, 5000]);
    assert_eq!(found.layers[1].blob, Digest::of(&layers[1]));
    assert_eq!(found.layers[1].media_type, GZIP);
    let diff = Digest::of(&[&layers[1], &b"decoded"[..]].concat());
    assert_eq!(found.layers[1].diff_id, Some(diff));
    let log = server.take_log();
    assert!(
        log[0].header("accept").unwrap().contains(OCI_INDEX),
        "{log:?}"
    );

    let blob = digest(&layers[1]);
    for range in [0..5000, 0..1, 4999..5000, 17..4000] {
        let wanted = &layers[1][range.start as usize..range.end as usize];
        assert_eq!(read(&source, &blob, range).await.unwrap(), wanted);
    }
    let error = read(&source, &blob, 4000..5001).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Changed, "{error}");
    let error = read(&source, &digest(b"none"), 0..1).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{error}");
    assert_eq!(
        read(&source, "../x", 0..1).await.unwrap_err().kind(),
        Kind::Invalid
    );

    // The documents themselves, for whoever passes them on.
    for wanted in ["1", manifest["digest"].as_str().unwrap()] {
        let found = source.manifest(wanted).await.unwrap();
        assert_eq!(
            found.digest.to_string(),
            manifest["digest"].as_str().unwrap()
        );
        assert_eq!(found.media_type, OCI_MANIFEST);
    }
    assert_eq!(
        source.manifest("../x").await.unwrap_err().kind(),
        Kind::Invalid
    );
    let config = source.small_blob(&found.config, 1000).await.unwrap();
    assert_eq!(Digest::of(&config), found.config);
    let fresh = settings.open(&reference);
    let error = fresh.small_blob(&found.config, 10).await.unwrap_err();
    assert!(
        error.to_string().contains("longer than 10 bytes"),
        "{error}"
    );

    // By digest, with a tag that says nothing.
    let pinned = format!("{reference}@{}", manifest["digest"].as_str().unwrap());
    assert_eq!(
        layered(&source, &pinned).await.unwrap().layers,
        found.layers
    );
    let error = source
        .resolve(&reference.parse().unwrap())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.to_string().contains("container image"), "{error}");
    let other = format!("oci://{}/team/other:1", server.address);
    assert_eq!(
        layered(&source, &other).await.unwrap_err().kind(),
        Kind::Invalid
    );
}

#[tokio::test]
async fn an_index_is_followed_to_the_platform() {
    let mut held = Held::default();
    let entry = |mut image: Value, platform: Value| {
        image["platform"] = platform;
        image
    };
    let platform = |os: &str, arch: &str, variant: Option<&str>| match variant {
        Some(variant) => json!({ "os": os, "architecture": arch, "variant": variant }),
        None => json!({ "os": os, "architecture": arch }),
    };
    let images: Vec<Value> = [
        ("amd64", None),
        ("amd64", Some("v3")),
        ("arm64", Some("v8")),
        ("arm", Some("v5")),
        ("arm", Some("v7")),
    ]
    .into_iter()
    .enumerate()
    .map(|(n, (arch, variant))| {
        let image = held.image("", arch, &[data(n + 1)]);
        entry(image, platform("linux", arch, variant))
    })
    .collect();
    let attestation = held.image("", "unknown", &[data(50)]);
    let attestation = entry(attestation, platform("unknown", "unknown", None));
    let inner = held.manifest(
        "",
        &json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": images }),
    );
    let index =
        json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [attestation, inner] });
    held.manifest("1", &index);
    let mut deep = index;
    for _ in 0..3 {
        let inner = held.manifest("", &deep);
        deep = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [inner] });
    }
    held.manifest("deep", &deep);
    let nothing = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [attestation] });
    held.manifest("nothing", &nothing);
    let server = Scripted::start(move |seen| held.answer(seen)).await;
    let settings = Settings::new();
    let at = format!("oci://{}/team/app", server.address);
    let source = settings.open(&at);
    for (platform, size) in [
        ("linux/amd64", 1),
        ("linux/amd64/v3", 2),
        ("linux/amd64/v2", 1),
        ("linux/arm64", 3),
        ("linux/arm/v6", 4),
        ("linux/arm", 5),
    ] {
        let reference = format!("{at}:1?platform={platform}");
        let found = layered(&source, &reference).await.unwrap();
        assert_eq!(found.layers[0].size, size, "{platform}");
        let canonical: Reference = reference.parse().unwrap();
        assert_eq!(found.reference, canonical.to_string());
    }
    let wanted = format!("{at}:1?platform=linux/riscv64");
    let error = layered(&source, &wanted).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(
        error.to_string().contains("linux/arm64") && error.hint().is_some(),
        "{error}"
    );
    for (tag, word) in [("deep", "too deep"), ("nothing", "no image")] {
        let error = layered(&source, &format!("{at}:{tag}")).await.unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[tokio::test]
async fn hostile_manifests_are_refused() {
    let mut held = Held::default();
    let good = held.document("amd64", &[data(10), data(20)]);
    let mut cases: Vec<(String, Vec<u8>, &str)> = Vec::new();
    let mut case = |document: &Value, word: &'static str| {
        let tag = format!("t{}", cases.len());
        cases.push((tag, serde_json::to_vec(document).unwrap(), word));
    };
    let with = |path: &str, value: Value| {
        let mut document = good.clone();
        *document.pointer_mut(path).unwrap() = value;
        document
    };
    case(&with("/layers/0/size", json!(-1)), "-1 bytes");
    case(&with("/layers/0/size", json!(1_i64 << 61)), "bytes");
    case(&with("/layers/0/size", json!(1e30)), "malformed");
    case(
        &with("/layers/0/digest", json!("sha512:ab")),
        "no sha256 digest",
    );
    case(
        &with("/layers/0/digest", json!("../../etc/passwd")),
        "no sha256 digest",
    );
    case(&with("/layers/1", good["layers"][0].clone()), "");
    case(&with("/layers", json!([good["layers"][0]])), "diff ids");
    case(&with("/layers", json!(null)), "malformed");
    case(&with("/config/size", json!(9 << 20)), "configuration");
    case(&with("/config/size", json!(7)), "configuration has 7 bytes");
    case(&with("/config/digest", json!("x")), "no sha256 digest");
    case(&with("/config/mediaType", json!("application/x")), "");
    case(&with("/schemaVersion", json!(1)), "schema 1");
    case(&with("/schemaVersion", json!("2")), "malformed");
    case(&with("/mediaType", json!(OCI_INDEX)), "media type");
    case(
        &with(
            "/mediaType",
            json!("application/vnd.docker.distribution.manifest.v1+prettyjws"),
        ),
        "schema 1",
    );
    let mut both = good.clone();
    both["manifests"] = json!([]);
    case(&both, "could be an index");
    case(
        &json!({ "schemaVersion": 2, "fsLayers": [], "name": "x" }),
        "schema 1",
    );
    case(
        &json!({ "schemaVersion": 2, "blobs": [], "mediaType": "application/vnd.oci.artifact.manifest.v1+json" }),
        "unsupported media type",
    );
    case(&json!({ "schemaVersion": 2 }), "media type");
    case(&json!([]), "malformed");
    case(
        &json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [{ "mediaType": OCI_MANIFEST, "digest": digest(b"x"), "size": -5 }] }),
        "-5 bytes",
    );
    case(
        &json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [{ "mediaType": OCI_MANIFEST, "digest": digest(b"x"), "size": 5_000_000 }] }),
        "4 MiB",
    );
    let inner = held.manifest("", &good);
    let lying = json!({ "mediaType": OCI_MANIFEST, "digest": inner["digest"], "size": 7 });
    case(
        &json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [lying] }),
        "has 7 bytes",
    );
    case(
        &json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": "x".repeat(3_000_000) }),
        "malformed",
    );
    let whole = serde_json::to_vec(&good).unwrap();
    for (tag, bytes, word) in [
        ("truncated", whole[..whole.len() - 9].to_vec(), "malformed"),
        ("empty", Vec::new(), "malformed"),
        ("noise", data(1000), "malformed"),
        ("deep", "[".repeat(100_000).into_bytes(), "malformed"),
        (
            "huge",
            vec![b' '; (4 << 20) + 1],
            "longer than 4194304 bytes",
        ),
    ] {
        cases.push((tag.to_owned(), bytes, word));
    }
    for (tag, bytes, _) in &cases {
        let kind = OCI_MANIFEST.to_owned();
        held.0
            .insert(format!("manifests/{tag}"), (kind, bytes.clone()));
    }
    let server = Scripted::start(move |seen| held.answer(seen)).await;
    let settings = Settings::new();
    let at = format!("oci://{}/team/app", server.address);
    let source = settings.open(&at);
    for (tag, _, word) in cases.iter().filter(|(.., word)| !word.is_empty()) {
        let reference = format!("{at}:{tag}");
        let error = match source.layered(&reference.parse().unwrap()).await {
            Err(error) => error,
            Ok(found) => panic!("{tag} ({word}): {found:?}"),
        };
        assert!(
            error.to_string().contains(word),
            "{tag}: wanted {word}: {error}"
        );
        assert!(error.to_string().contains("team/app"), "{error}");
        assert!(error.to_string().len() < 1000);
    }
}

#[tokio::test]
async fn other_bytes_than_asked_for_are_refused() {
    let mut held = Held::default();
    let layer = data(10);
    let manifest = held.image("1", "amd64", std::slice::from_ref(&layer));
    let reference = |server: &Scripted| format!("oci://{}/team/app:1", server.address);
    let settings = Settings::new();

    // A tag whose digest the registry itself says differently.
    let answers = held.clone();
    let server = Scripted::start(move |seen| {
        let (kind, bytes) = &answers.0["manifests/1"];
        let claimed = digest(b"other");
        let head = format!("200 OK\ncontent-type: {kind}\ndocker-content-digest: {claimed}");
        match seen.path().contains("manifests") {
            true => Reply::new(&head, bytes.clone()),
            false => answers.answer(seen),
        }
    })
    .await;
    let source = settings.open(&reference(&server));
    let error = layered(&source, &reference(&server)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");

    // Another manifest under a digest; another configuration.
    for wrong in ["manifests/sha256", "blobs/"] {
        let answers = held.clone();
        server.now(move |seen| match seen.path().contains(wrong) {
            true => Reply::new("200 OK", "{\"schemaVersion\": 2}"),
            false => answers.answer(seen),
        });
        let source = settings.open(&reference(&server));
        let pinned = format!(
            "{}@{}",
            reference(&server),
            manifest["digest"].as_str().unwrap()
        );
        let error = layered(&source, &pinned).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{wrong}: {error}");
    }
}

/// A registry with a token server at the same address: tokens are numbered, and the registry takes
/// only the newest.
#[derive(Clone)]
struct Guarded {
    held: Held,
    granted: Arc<AtomicUsize>,
    /// Whether the newest token is not taken any more.
    expired: Arc<AtomicBool>,
    life: u64,
}

impl Guarded {
    fn new(held: Held, life: u64) -> Self {
        Self {
            held,
            granted: Arc::default(),
            expired: Arc::default(),
            life,
        }
    }

    fn answer(&self, seen: &Seen) -> Reply {
        let host = seen.header("host").unwrap();
        if seen.path() == "/token" {
            let number = self.granted.fetch_add(1, Ordering::SeqCst) + 1;
            self.expired.store(false, Ordering::SeqCst);
            let body = json!({ "token": format!("{SECRET}-{number}"), "expires_in": self.life });
            return Reply::new("200 OK\ncontent-type: application/json", body.to_string());
        }
        let newest = format!("Bearer {SECRET}-{}", self.granted.load(Ordering::SeqCst));
        let is_in = seen.header("authorization") == Some(&newest);
        if !is_in || self.expired.load(Ordering::SeqCst) {
            let challenge = format!(
                "Bearer realm=\"http://{host}/token\",service=\"reg\",scope=\"repository:team/app:pull\""
            );
            return Reply::new(
                &format!("401 Unauthorized\nwww-authenticate: {challenge}"),
                "",
            );
        }
        self.held.answer(seen)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_token_serves_all_and_is_renewed_in_flight() {
    let mut held = Held::default();
    let layer = data(64 << 10);
    held.image("1", "amd64", std::slice::from_ref(&layer));
    let guarded = Guarded::new(held, 300);
    let answers = guarded.clone();
    let server = Scripted::start(move |seen| answers.answer(seen)).await;
    let host = server.address.to_string();
    let entry = json!({ "username": "me", "password": SECRET });
    let settings = Settings::new().login(&host, entry);
    let reference = format!("oci://{host}/team/app:1");
    let blob = digest(&layer);
    let ranges = async |source: &Arc<dyn Source>| {
        let reads = (0..16_u64).map(|n| read(source, &blob, n * 4096..(n + 1) * 4096));
        for (n, found) in join_all(reads).await.into_iter().enumerate() {
            assert_eq!(found.unwrap(), layer[n * 4096..(n + 1) * 4096]);
        }
    };

    // Many ranges at once, first of all: one finds out, one token is fetched.
    let source = settings.open(&reference);
    ranges(&source).await;
    let log = server.take_log();
    let asked: Vec<_> = log.iter().filter(|seen| seen.path() == "/token").collect();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].method, "GET");
    assert_eq!(
        asked[0].target,
        "/token?service=reg&scope=repository%3Ateam%2Fapp%3Apull"
    );
    // me:geheim
    assert_eq!(asked[0].header("authorization"), Some("Basic bWU6Z2VoZWlt"));
    assert_eq!(log.len(), 18, "16 ranges, one of them twice, and a token");

    // It is taken back in the middle: one of the readers fetches another for all.
    guarded.expired.store(true, Ordering::SeqCst);
    ranges(&source).await;
    assert_eq!(guarded.granted.load(Ordering::SeqCst), 2);
    layered(&source, &reference).await.unwrap();
    assert_eq!(guarded.granted.load(Ordering::SeqCst), 2);
    assert!(!format!("{source:?}").contains(SECRET));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_renewed_before_it_ends() {
    let mut held = Held::default();
    let layer = data(100);
    held.blob(&layer);
    let guarded = Guarded::new(held, 1);
    let answers = guarded.clone();
    let server = Scripted::start(move |seen| answers.answer(seen)).await;
    let settings = Settings::new();
    let source = settings.open(&format!("oci://{}/team/app:1", server.address));
    let blob = digest(&layer);
    for round in 1..4 {
        let reads = (0..8_u64).map(|n| read(&source, &blob, n..n + 1));
        for found in join_all(reads).await {
            found.unwrap();
        }
        assert_eq!(guarded.granted.load(Ordering::SeqCst), round);
        tokio::time::sleep(Duration::from_millis(1050)).await;
    }
    let refused = server
        .take_log()
        .iter()
        .filter(|seen| seen.path() != "/token" && seen.header("authorization").is_none())
        .count();
    assert_eq!(
        refused, 1,
        "after the first, no request goes out without a token"
    );
}

/// Who waits for a token that cannot be had does not wait once more for itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_server_that_is_down_is_asked_once_for_all_who_wait() {
    let mut held = Held::default();
    let layer = data(100);
    held.blob(&layer);
    let guarded = Guarded::new(held, 300);
    let answers = guarded.clone();
    let server = Scripted::start(move |seen| answers.answer(seen)).await;
    let settings = Settings::new();
    let source = settings.open(&format!("oci://{}/team/app:1", server.address));
    let blob = digest(&layer);
    read(&source, &blob, 0..1).await.unwrap();
    server.take_log();
    guarded.expired.store(true, Ordering::SeqCst);
    let answers = guarded.clone();
    server.now(move |seen| match seen.path() {
        "/token" => {
            std::thread::sleep(Duration::from_millis(500));
            Reply::new("503 Service Unavailable", "")
        }
        _ => answers.answer(seen),
    });
    let reads = (0..8_u64).map(|n| read(&source, &blob, n..n + 1));
    for found in join_all(reads).await {
        assert_eq!(found.unwrap_err().kind(), Kind::Unavailable);
    }
    let asked = targets(&server);
    let tokens = asked
        .iter()
        .filter(|target| target.starts_with("/token"))
        .count();
    assert!(tokens <= 2, "{asked:?}");
    let answers = guarded.clone();
    server.now(move |seen| answers.answer(seen));
    read(&source, &blob, 0..1).await.unwrap();
}

#[tokio::test]
async fn an_identity_token_is_exchanged_by_post() {
    let mut held = Held::default();
    let layer = data(100);
    held.blob(&layer);
    let guarded = Guarded::new(held, 300);
    let server = Scripted::start(move |seen| guarded.answer(seen)).await;
    let host = server.address.to_string();
    let entry = json!({ "auth": "dTo=", "identitytoken": format!("{SECRET}+&") });
    let settings = Settings::new().login(&host, entry);
    let source = settings.open(&format!("oci://{host}/team/app:1"));
    read(&source, &digest(&layer), 0..1).await.unwrap();
    let log = server.take_log();
    let asked = log.iter().find(|seen| seen.path() == "/token").unwrap();
    assert_eq!((&*asked.method, &*asked.target), ("POST", "/token"));
    assert_eq!(
        String::from_utf8_lossy(&asked.body),
        format!(
            "grant_type=refresh_token&client_id=hearth&scope=repository%3Ateam%2Fapp%3Apull\
             &refresh_token={SECRET}%2B%26&service=reg"
        )
    );
}

#[tokio::test]
async fn basic_credentials_and_what_refusals_say() {
    let mut held = Held::default();
    let layer = data(100);
    held.blob(&layer);
    let answers = held.clone();
    let server = Scripted::start(move |seen| match seen.header("authorization") {
        Some("Basic bWU6Z2VoZWlt") => answers.answer(seen),
        _ => Reply::new("401 Unauthorized\nwww-authenticate: Basic realm=\"x\"", ""),
    })
    .await;
    let host = server.address.to_string();
    let reference = format!("oci://{host}/team/app:1");
    let good = Settings::new().login(&host, json!({ "auth": "bWU6Z2VoZWlt" }));
    let source = good.open(&reference);
    for _ in 0..3 {
        read(&source, &digest(&layer), 0..1).await.unwrap();
    }
    assert_eq!(
        server.take_log().len(),
        4,
        "asked without credentials once only"
    );

    let wrong = Settings::new().login(
        &host,
        json!({ "username": "me", "password": format!("{SECRET}2") }),
    );
    let error = read(&wrong.open(&reference), &digest(&layer), 0..1)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
    let text = shown(&error);
    assert!(
        text.contains("tried the credentials of") && text.contains("auth.json"),
        "{text}"
    );
    assert!(
        text.contains("docker login") && !text.contains(SECRET),
        "{text}"
    );

    let none = Settings::new();
    let error = layered(&none.open(&reference), &reference)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
    let text = shown(&error);
    assert!(
        text.contains("no credentials for") && text.contains("auth.json"),
        "{text}"
    );

    // A token server that refuses, is elsewhere without https, or answers nonsense.
    for (answer, kind, word) in [
        ("401 Unauthorized", Kind::Denied, "tried the credentials of"),
        ("200 OK", Kind::Corrupt, "no token"),
        ("503 Service Unavailable", Kind::Unavailable, "503"),
    ] {
        let host = server.address.to_string();
        server.now(move |seen| match seen.path() {
            "/token" => Reply::new(answer, format!("{{\"token\": [\"{SECRET}\"]}}")),
            _ => Reply::new(
                &format!(
                    "401 Unauthorized\nwww-authenticate: Bearer realm=\"http://{host}/token\""
                ),
                "",
            ),
        });
        let error = layered(&good.open(&reference), &reference)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(word), "{error}");
        assert!(!shown(&error).contains(SECRET));
    }
}

#[tokio::test]
async fn what_is_not_there_and_who_asks_too_often() {
    let server = Scripted::start(|seen| Held::default().answer(seen)).await;
    let reference = format!("oci://{}/team/app:v9", server.address);
    let source = Settings::new().open(&reference);
    let error = layered(&source, &reference).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    let wanted = format!("no tag v9 in repository team/app at {}", server.address);
    assert!(error.to_string().contains(&wanted), "{error}");
    server.now(|_| Reply::new("429 Too Many Requests\nretry-after: 7", ""));
    let error = layered(&source, &reference).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Throttled);
    assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
    server.now(|_| Reply::new("403 Forbidden", ""));
    let error = layered(&source, &reference).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
}

/// Blobs are redirected to signed URLs of another host, which stop working.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signed_redirects_are_remembered_and_renewed_without_the_token() {
    let mut held = Held::default();
    let layer = data(64 << 10);
    held.image("1", "amd64", std::slice::from_ref(&layer));
    let signature = Arc::new(AtomicUsize::new(1));
    let (now, content) = (Arc::clone(&signature), layer.clone());
    let storage = Scripted::start(move |seen| {
        let good = format!("/data?sig={}", now.load(Ordering::SeqCst));
        match seen.target == good {
            true => Reply::good(seen, &content, "\"s\""),
            false => Reply::new("403 Forbidden", ""),
        }
    })
    .await;
    let guarded = Guarded::new(held, 300);
    let (now, answers) = (Arc::clone(&signature), guarded.clone());
    let (blob, address) = (digest(&layer), storage.address);
    let redirected = blob.clone();
    let server = Scripted::start(move |seen| {
        let reply = answers.answer(seen);
        let is_in =
            seen.header("authorization").is_some() && !answers.expired.load(Ordering::SeqCst);
        match seen.path().ends_with(&redirected) && is_in {
            true => {
                let sig = now.load(Ordering::SeqCst);
                let to = format!("http://{address}/data?sig={sig}");
                Reply::new(&format!("307 Temporary Redirect\nlocation: {to}"), "")
            }
            false => reply,
        }
    })
    .await;
    let settings = Settings::new();
    let source = settings.open(&format!("oci://{}/team/app:1", server.address));
    let ranges = async || {
        let reads = (0..16_u64).map(|n| read(&source, &blob, n * 4096..(n + 1) * 4096));
        for (n, found) in join_all(reads).await.into_iter().enumerate() {
            assert_eq!(found.unwrap(), layer[n * 4096..(n + 1) * 4096]);
        }
    };
    ranges().await;
    let asked = targets(&server);
    assert!(asked.len() <= 4, "the redirect is remembered: {asked:?}");
    for seen in storage.take_log() {
        assert_eq!(
            seen.header("authorization"),
            None,
            "the token stays at the registry"
        );
    }
    // The signature ends, and so has the token meanwhile.
    signature.store(2, Ordering::SeqCst);
    guarded.expired.store(true, Ordering::SeqCst);
    ranges().await;
    assert_eq!(guarded.granted.load(Ordering::SeqCst), 2);
    let asked = targets(&server).len();
    assert!(asked <= 40, "{asked}");
    for seen in storage.take_log() {
        assert_eq!(seen.header("authorization"), None);
    }
}

#[tokio::test]
async fn mirrors_are_asked_in_order_and_the_registry_last() {
    let mut held = Held::default();
    let layer = data(1000);
    held.image("1", "amd64", std::slice::from_ref(&layer));
    let nothing = Scripted::start(|seen| Held::default().answer(seen)).await;
    let answers = held.clone();
    let mirror = Scripted::start(move |seen| answers.below("/prefix/team/app/", seen)).await;
    let answers = held.clone();
    let registry = Scripted::start(move |seen| answers.answer(seen)).await;
    let text = |capabilities: &str| {
        format!(
            r#"server = "http://{}"
        [host."http://{}"]
          capabilities = ["pull", "resolve"]
        [host."http://{}/prefix"]
          capabilities = {capabilities}
          override_path = true
          [host."http://{}/prefix".header]
            x-extra = "{SECRET}"
        "#,
            registry.address, nothing.address, mirror.address, mirror.address
        )
    };
    let both = r#"["pull", "resolve"]"#;
    let settings = Settings::new().hosts("reg.example_5000_", &text(both));
    let reference = "oci://reg.example:5000/team/app:1";
    let source = settings.open(reference);
    let found = layered(&source, reference).await.unwrap();
    assert_eq!(found.reference, reference);
    assert_eq!(
        targets(&nothing)[0],
        "/v2/team/app/manifests/1?ns=reg.example%3A5000"
    );
    let log = mirror.take_log();
    assert_eq!(
        log[0].target,
        "/prefix/team/app/manifests/1?ns=reg.example%3A5000"
    );
    assert_eq!(log[0].header("x-extra"), Some(SECRET));
    assert!(registry.take_log().is_empty());
    for n in 0..5 {
        read(&source, &digest(&layer), n..n + 1).await.unwrap();
    }
    assert_eq!(targets(&nothing).len(), 1, "for the layer it is asked once");
    assert!(!format!("{source:?}").contains(SECRET));

    // One that may not resolve tags is left out of that, but has the blobs.
    let settings = Settings::new().hosts("_default", &text(r#"["pull"]"#));
    let source = settings.open(reference);
    mirror.take_log();
    layered(&source, reference).await.unwrap();
    let asked = mirror.take_log();
    assert!(
        asked.iter().all(|seen| seen.path().contains("/blobs/")),
        "{asked:?}"
    );
    let log = registry.take_log();
    assert_eq!(
        log[0].target,
        "/v2/team/app/manifests/1?ns=reg.example%3A5000"
    );
    assert_eq!(log[0].header("x-extra"), None, "headers are for one host");
}

#[tokio::test]
async fn a_mirror_that_fails_is_left_out_for_a_while() {
    let mut held = Held::default();
    let layer = data(1000);
    held.image("1", "amd64", std::slice::from_ref(&layer));
    let mirror = Scripted::start(|_| Reply::new("500 Internal Server Error", "")).await;
    let answers = held.clone();
    let registry = Scripted::start(move |seen| answers.answer(seen)).await;
    let host = registry.address.to_string();
    let text = format!("[host.\"http://{}\"]", mirror.address);
    let name = host.replace(':', "_") + "_";
    let settings = Settings::new().hosts(&name, &text);
    let reference = format!("oci://{host}/team/app:1");
    let source = settings.open(&reference);
    layered(&source, &reference).await.unwrap();
    for n in 0..5 {
        read(&source, &digest(&layer), n..n + 1).await.unwrap();
    }
    assert_eq!(mirror.take_log().len(), 1);
    assert!(
        registry
            .take_log()
            .iter()
            .all(|seen| !seen.target.contains("ns="))
    );

    // What the registry has not may be at the mirror that is down: that passes.
    let gone = format!("oci://{host}/team/app:gone");
    let error = layered(&settings.open(&gone), &gone).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    let text = error.to_string();
    assert!(
        text.contains("404") && text.contains("mirror") && text.contains("500"),
        "{text}"
    );
}

#[tokio::test]
async fn a_mirror_with_other_bytes_does_not_stand_in_the_way() {
    let mut held = Held::default();
    let manifest = held.image("1", "amd64", &[data(1000)]);
    let wrong = Scripted::start(|seen| match seen.path().contains("sha256") {
        true => Reply::new("200 OK", "{\"schemaVersion\": 2}"),
        false => Reply::new("404 Not Found", ""),
    })
    .await;
    let registry = Scripted::start(move |seen| held.answer(seen)).await;
    let host = registry.address.to_string();
    let text = format!("[host.\"http://{}\"]", wrong.address);
    let settings = Settings::new().hosts("_default", &text);
    let digest = manifest["digest"].as_str().unwrap();
    let reference = format!("oci://{host}/team/app@{digest}");
    let source = settings.open(&reference);
    layered(&source, &reference).await.unwrap();
    assert_eq!(wrong.take_log().len(), 1, "then it is asked last");
}

#[tokio::test]
async fn credentials_of_a_registry_stay_away_from_its_mirror() {
    let mut held = Held::default();
    let layer = data(1000);
    held.image("1", "amd64", std::slice::from_ref(&layer));
    let guarded = Guarded::new(held, 300);
    let answers = guarded.clone();
    let registry = Scripted::start(move |seen| answers.answer(seen)).await;
    let mirror = Scripted::start(|seen| match seen.path() {
        "/token" => Reply::new(
            "200 OK",
            format!("{{\"token\": \"{SECRET}-of-the-mirror\"}}"),
        ),
        _ => {
            let host = seen.header("host").unwrap();
            let challenge = format!("Bearer realm=\"http://{host}/token\"");
            Reply::new(
                &format!("401 Unauthorized\nwww-authenticate: {challenge}"),
                "",
            )
        }
    })
    .await;
    let host = registry.address.to_string();
    let text = format!("[host.\"http://{}\"]", mirror.address);
    let name = host.replace(':', "_") + "_";
    let settings = Settings::new()
        .hosts(&name, &text)
        .login(&host, json!({ "username": "me", "password": SECRET }));
    let reference = format!("oci://{host}/team/app:1");
    layered(&settings.open(&reference), &reference)
        .await
        .unwrap();
    for seen in mirror.take_log() {
        let sent = seen.header("authorization").unwrap_or_default();
        assert!(!sent.contains("Basic") && !sent.ends_with("-1"), "{sent}");
    }
    assert_eq!(guarded.granted.load(Ordering::SeqCst), 1);
}
