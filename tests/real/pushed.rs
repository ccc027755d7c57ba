//! A registry, and pushing to it whatever a manifest may say.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use hearth::digest::Digest;
use serde_json::{Value, json};

use crate::{registry::docker_registry, servers::Server};

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A registry that is empty at first.
pub(crate) struct Registry {
    server: Server,
}

impl Registry {
    pub(crate) fn start() -> Self {
        let server = docker_registry(|_| "http: {addr: ADDRESS}".into());
        Self { server }
    }

    /// `127.0.0.1:port`.
    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.server.port)
    }

    /// Where it keeps what it has.
    pub(crate) fn files(&self) -> std::path::PathBuf {
        self.server.dir.path().join("data/docker/registry/v2")
    }

    /// `oci://host/repository:tag`.
    pub(crate) fn reference(&self, repository: &str, tag: &str) -> String {
        format!("oci://{}/{repository}:{tag}", self.host())
    }

    /// Pushes a blob; its descriptor with `media_type`.
    pub(crate) fn blob(&self, repository: &str, media_type: &str, content: &[u8]) -> Value {
        let digest = Digest::of(content).to_string();
        let url = format!("{}/v2/{repository}/blobs/uploads/", self.server.url());
        let answer = curl(&["-X", "POST", "-D", "-", &url], b"");
        let location = answer
            .lines()
            .find_map(|line| line.strip_prefix("Location: "))
            .unwrap_or_else(|| panic!("{answer}"));
        let url = format!("{}&digest={digest}", location.trim());
        curl(&["-X", "PUT", "-T", "-", &url], content);
        json!({"mediaType": media_type, "digest": digest, "size": content.len()})
    }

    /// What is at `path` of a repository: `manifests/…`, `blobs/…`.
    pub(crate) fn get(&self, repository: &str, path: &str) -> Vec<u8> {
        let url = format!("{}/v2/{repository}/{path}", self.server.url());
        let accept = [MANIFEST, INDEX].map(|kind| format!("Accept: {kind}"));
        let output = Command::new("curl")
            .args(["-sS", "--fail", "--noproxy", "*", "-m", "60"])
            .args(["-H", &accept[0], "-H", &accept[1], &url])
            .output()
            .unwrap();
        assert!(output.status.success(), "{url}: {output:?}");
        output.stdout
    }

    /// Pushes a manifest under a tag; its digest.
    pub(crate) fn manifest(&self, repository: &str, tag: &str, manifest: &Value) -> Digest {
        let content = serde_json::to_vec(manifest).unwrap();
        let media_type = manifest["mediaType"].as_str().unwrap_or(MANIFEST);
        let header = format!("Content-Type: {media_type}");
        let url = format!("{}/v2/{repository}/manifests/{tag}", self.server.url());
        curl(&["-X", "PUT", "-H", &header, "-T", "-", &url], &content);
        Digest::of(&content)
    }
}

fn curl(arguments: &[&str], body: &[u8]) -> String {
    let mut child = Command::new("curl")
        .args([
            "-sS",
            "--fail-with-body",
            "--noproxy",
            "*",
            "-m",
            "60",
            "-H",
            "Expect:",
        ])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let body = body.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&body));
    let output = child.wait_with_output().unwrap();
    let _ = writer.join().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text} {error}");
    text
}

/// A tar of `paths` below `dir`, made by GNU tar with more `options`.
pub(crate) fn tar(dir: &Path, options: &[&str], paths: &[&str]) -> Vec<u8> {
    let output = Command::new("tar")
        .arg("-C")
        .arg(dir)
        .args(["--owner=0", "--group=0"])
        .args(options)
        .args(["-cf", "-"])
        .args(paths)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

/// What `gzip` makes of it.
pub(crate) fn gzip(content: &[u8]) -> Vec<u8> {
    let mut child = Command::new("gzip")
        .args(["-nc"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let content = content.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&content));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success());
    output.stdout
}
