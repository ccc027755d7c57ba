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
    reference::{Reference, Secret},
    source::{
        Config, Credentials, Keys, Layered, Source, SourceError, SourceErrorKind as Kind, Sources,
    },
    tree::Location,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::scripted::{Reply, Scripted, Seen};

mod asked;
mod auth;
mod manifests;
mod mirror;
mod passing;
mod removed;
mod updates;
mod ways;

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
