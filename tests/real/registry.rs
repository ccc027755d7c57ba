//! Registries against Debian's `docker-registry` (distribution 2.8), filled by `skopeo`.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use futures_util::future::join_all;
use hearth::{
    digest::Digest,
    source::{
        AttachedBlob, Attachment, Config, Layered, Source, SourceError, SourceErrorKind as Kind,
        Sources,
    },
    tree::Location,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    servers::{Server, bed, make_certificates, set_env},
    sources::{bytes, read},
};

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// `me` and `geheim` as htpasswd has them (bcrypt).
const HTPASSWD: &str = "me:$2b$05$LvBPwEtSM17p8jrdQl3Oye2ETizFR8eaMEe8WDAWimAEYXL.TdCOW\n";
const SECRET: &str = "geheim";
const KIND: &str = "application/vnd.hearth.test.v1";

/// `docker-registry` with the settings that `more` makes for a directory (YAML).
pub(crate) fn docker_registry(more: impl Fn(&Path) -> String) -> Server {
    Server::start("docker-registry", |port, dir| {
        let own = dir.display();
        let config = format!(
            "version: 0.1\nlog: {{level: info}}\n\
             storage: {{filesystem: {{rootdirectory: {own}/data}}, maintenance: {{uploadpurging: {{enabled: false}}}}}}\n\
             {}\n",
            more(dir).replace("ADDRESS", &format!("127.0.0.1:{port}"))
        );
        let file = dir.join("config.yml");
        fs::write(&file, config).unwrap();
        let mut command = Command::new("docker-registry");
        command
            .arg("serve")
            .arg(file)
            .env("OTEL_TRACES_EXPORTER", "none");
        command
    })
}

fn plain(_: &Path) -> String {
    "http: {addr: ADDRESS}".into()
}

/// An image in a directory: an OCI layout of two layers for two platforms.
struct Image {
    dir: TempDir,
    layers: Vec<Vec<u8>>,
}

impl Image {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        fs::write(
            dir.path().join("oci-layout"),
            r#"{"imageLayoutVersion": "1.0.0"}"#,
        )
        .unwrap();
        let contents = [bytes(1, (3 << 20) + 7), bytes(2, 5000)];
        let mut image = Self {
            layers: contents
                .iter()
                .map(|content| gzip(dir.path(), content))
                .collect(),
            dir,
        };
        let platforms = ["amd64", "arm64"].map(|arch| {
            let diff_ids: Vec<_> = contents.iter().map(|c| Digest::of(c).to_string()).collect();
            let config = json!({
                "architecture": arch, "os": "linux", "config": {},
                "rootfs": { "type": "layers", "diff_ids": diff_ids },
            });
            let mut config = image.blob(config.to_string().as_bytes());
            config["mediaType"] = "application/vnd.oci.image.config.v1+json".into();
            let layers: Vec<_> = image
                .layers
                .clone()
                .iter()
                .map(|layer| {
                    let mut layer = image.blob(layer);
                    layer["mediaType"] = GZIP.into();
                    layer
                })
                .collect();
            let kind = "application/vnd.oci.image.manifest.v1+json";
            let manifest = json!({
                "schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers,
            });
            let mut manifest = image.blob(manifest.to_string().as_bytes());
            manifest["mediaType"] = kind.into();
            manifest["platform"] = json!({ "os": "linux", "architecture": arch });
            manifest
        });
        let kind = "application/vnd.oci.image.index.v1+json";
        let index = json!({ "schemaVersion": 2, "mediaType": kind, "manifests": platforms });
        let mut index = image.blob(index.to_string().as_bytes());
        index["mediaType"] = kind.into();
        index["annotations"] = json!({ "org.opencontainers.image.ref.name": "1" });
        let top = json!({ "schemaVersion": 2, "manifests": [index] });
        fs::write(image.dir.path().join("index.json"), top.to_string()).unwrap();
        image
    }

    fn blob(&mut self, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        fs::write(
            self.dir.path().join("blobs/sha256").join(digest.hex()),
            bytes,
        )
        .unwrap();
        json!({ "digest": digest.to_string(), "size": bytes.len() })
    }

    /// Pushes it to `to` (`host:port/repository:tag`).
    fn push(&self, to: &str, more: &[&str]) {
        let output = Command::new("timeout")
            .args([
                "60",
                "skopeo",
                "--insecure-policy",
                "copy",
                "--all",
                "--preserve-digests",
            ])
            .args(more)
            .arg(format!("oci:{}:1", self.dir.path().display()))
            .arg(format!("docker://{to}"))
            .env("HOME", self.dir.path())
            .env_remove("REGISTRY_AUTH_FILE")
            .output()
            .unwrap_or_else(|e| panic!("skopeo: {e}; run tests/run"));
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

fn gzip(dir: &Path, content: &[u8]) -> Vec<u8> {
    let file = dir.join("content");
    fs::write(&file, content).unwrap();
    let output = Command::new("gzip").arg("-nc").arg(file).output().unwrap();
    assert!(output.status.success());
    output.stdout
}

/// Settings in a directory of their own.
struct Settings(TempDir);

impl Settings {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn login(self, host: &str, user: &str, password: &str) -> Self {
        let file = json!({ "auths": { host: { "username": user, "password": password } } });
        fs::write(self.0.path().join("auth.json"), file.to_string()).unwrap();
        self
    }

    fn hosts(self, host: &str, text: &str) -> Self {
        let dir = self.0.path().join("certs.d").join(host);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("hosts.toml"), text).unwrap();
        self
    }

    fn open(&self, reference: &str) -> Arc<dyn Source> {
        let mut config = Config {
            registry_config_path: Some(self.0.path().join("certs.d")),
            ..Config::default()
        };
        config.oci.auth_files = vec![self.0.path().join("auth.json")];
        Sources::new(config)
            .open(&reference.parse().unwrap())
            .unwrap()
    }
}

async fn layered(source: &Arc<dyn Source>, reference: &str) -> Result<Layered, SourceError> {
    let found = source.layered(&reference.parse().unwrap()).await?;
    Ok(found.expect("an image"))
}

fn blob(digest: &Digest) -> Location {
    Location {
        path: digest.to_string(),
        generation: None,
        offset: 0,
    }
}

/// What every source must do, for blobs.
async fn conforms(source: &Arc<dyn Source>, reference: &str, image: &Image) {
    let found = layered(source, reference).await.unwrap();
    let again = layered(source, reference).await.unwrap();
    assert_eq!(found, again, "asking twice gives the same");
    assert_eq!(found.layers.len(), image.layers.len());
    for (layer, content) in found.layers.iter().zip(&image.layers) {
        let (place, size) = (blob(&layer.blob), layer.size);
        assert_eq!(size, content.len() as u64);
        assert_eq!(layer.media_type, GZIP);
        let ranges = [
            0..size,
            0..1,
            size - 1..size,
            17..size / 2,
            size / 3..size / 3 + 1000,
        ];
        for range in ranges {
            let wanted = &content[range.start as usize..range.end as usize];
            assert_eq!(read(source, &place, range).await.unwrap(), wanted);
        }
        let parts = (0..32).map(|n| size * n / 32..size * (n + 1) / 32);
        let reads = parts.map(|range| read(source, &place, range));
        let parts: Vec<Vec<u8>> = join_all(reads)
            .await
            .into_iter()
            .map(Result::unwrap)
            .collect();
        assert!(parts.concat() == *content);
        let error = source.read(&place, size - 1..size + 1).await.err().unwrap();
        assert_eq!(error.kind(), Kind::Changed, "{error}");
    }
    let error = source
        .read(&blob(&Digest::of(b"none")), 0..1)
        .await
        .err()
        .unwrap();
    assert_eq!(error.kind(), Kind::NotFound, "{error}");
    let missing = format!("{}x", reference);
    let error = layered(source, &missing).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{error}");
    assert!(
        error
            .to_string()
            .contains("no tag 1x in repository team/app"),
        "{error}"
    );
}

/// What is attached can be found again, the newest first, beside what was there.
async fn attaches(source: &Arc<dyn Source>, reference: &str) {
    let subject = layered(source, reference).await.unwrap().manifest;
    assert!(source.attached(&subject, KIND).await.unwrap().is_empty());
    let attachment = |kind: &str, content: Vec<u8>| Attachment {
        kind: kind.to_owned(),
        blobs: vec![AttachedBlob {
            media_type: "application/octet-stream".into(),
            bytes: content.into(),
            annotations: [("layer".to_owned(), "1".to_owned())].into(),
        }],
        annotations: [("by".to_owned(), "test".to_owned())].into(),
    };
    // More than the client sends in one piece.
    let large = bytes(9, 6 << 20);
    let first = source
        .attach(&subject, attachment(KIND, large.clone()))
        .await
        .unwrap();
    source
        .attach(&subject, attachment("application/other", bytes(8, 10)))
        .await
        .unwrap();
    let second = source
        .attach(&subject, attachment(KIND, bytes(7, 10)))
        .await
        .unwrap();
    let again = source
        .attach(&subject, attachment(KIND, bytes(7, 10)))
        .await
        .unwrap();
    assert_eq!(second, again);
    let found = source.attached(&subject, KIND).await.unwrap();
    let manifests: Vec<_> = found.iter().map(|found| found.manifest).collect();
    assert_eq!(manifests, [second, first]);
    let one = &found[1].blobs[0];
    assert_eq!(
        (one.size, one.annotations["layer"].as_str()),
        (6 << 20, "1")
    );
    assert_eq!(found[1].annotations["by"], "test");
    assert!(read(source, &blob(&one.blob), 0..6 << 20).await.unwrap() == large);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_registry_conforms() {
    let server = docker_registry(plain);
    let image = Image::new();
    let at = format!("127.0.0.1:{}/team/app:1", server.port);
    image.push(&at, &["--dest-tls-verify=false"]);
    let (settings, reference) = (Settings::new(), format!("oci://{at}"));
    let source = settings.open(&reference);
    conforms(&source, &reference, &image).await;
    attaches(&source, &reference).await;
    let other = format!("{reference}?platform=linux/arm64");
    let found = layered(&source, &other).await.unwrap();
    assert_eq!(found.platform.unwrap().to_string(), "linux/arm64");
    let absent = format!("{reference}?platform=linux/s390x");
    let error = layered(&source, &absent).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("only for linux/amd64, linux/arm64"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_with_passwords_conforms() {
    let server = docker_registry(|dir| {
        fs::write(dir.join("htpasswd"), HTPASSWD).unwrap();
        let own = dir.display();
        format!(
            "http: {{addr: ADDRESS}}\nauth: {{htpasswd: {{realm: test, path: {own}/htpasswd}}}}"
        )
    });
    let image = Image::new();
    let host = format!("127.0.0.1:{}", server.port);
    let at = format!("{host}/team/app:1");
    let login = format!("--dest-creds=me:{SECRET}");
    image.push(&at, &["--dest-tls-verify=false", &login]);
    let reference = format!("oci://{at}");
    let settings = Settings::new().login(&host, "me", SECRET);
    let source = settings.open(&reference);
    conforms(&source, &reference, &image).await;
    attaches(&source, &reference).await;
    for settings in [Settings::new(), Settings::new().login(&host, "me", "wrong")] {
        let error = layered(&settings.open(&reference), &reference)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Denied);
        let text = format!("{error} {error:?}");
        assert!(
            text.contains("auth.json") && !text.contains("wrong"),
            "{text}"
        );
    }
}

/// The password comes from a helper that a file names, or from a plugin of the kubelet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn helpers_and_plugins_open_a_registry() {
    let server = docker_registry(|dir| {
        fs::write(dir.join("htpasswd"), HTPASSWD).unwrap();
        let own = dir.display();
        format!(
            "http: {{addr: ADDRESS}}\nauth: {{htpasswd: {{realm: test, path: {own}/htpasswd}}}}"
        )
    });
    let image = Image::new();
    let host = format!("127.0.0.1:{}", server.port);
    let at = format!("{host}/team/app:1");
    let login = format!("--dest-creds=me:{SECRET}");
    image.push(&at, &["--dest-tls-verify=false", &login]);
    let reference = format!("oci://{at}");
    let programs = tempfile::tempdir().unwrap();
    let program = |name: &str, script: &str| {
        let path = programs.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    let path = std::env::var("PATH").unwrap();
    set_env(&[("PATH", format!("{}:{path}", programs.path().display()))]);

    let settings = Settings::new();
    let file = json!({ "credHelpers": { &host: "of-the-test" } });
    fs::write(settings.0.path().join("auth.json"), file.to_string()).unwrap();
    let helper = format!(
        "read server; [ \"$1 $server\" = \"get {host}\" ] || exit 1\n\
         echo '{{\"ServerURL\": \"x\", \"Username\": \"me\", \"Secret\": \"{SECRET}\"}}'"
    );
    program("docker-credential-of-the-test", &helper);
    layered(&settings.open(&reference), &reference)
        .await
        .unwrap();
    program(
        "docker-credential-of-the-test",
        "echo credentials not found in native keychain; exit 1",
    );
    let error = layered(&settings.open(&reference), &reference)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Denied, "{error}");

    let answer = json!({
        "kind": "CredentialProviderResponse",
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "cacheKeyType": "Registry", "cacheDuration": "1h",
        "auth": { &host: { "username": "me", "password": SECRET } },
    });
    program("plugin", &format!("cat > /dev/null; echo '{answer}'"));
    let providers = format!(
        "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n\
         - name: plugin\n  matchImages: [\"{host}\"]\n  defaultCacheDuration: 0s\n  \
         apiVersion: credentialprovider.kubelet.k8s.io/v1\n"
    );
    let file = programs.path().join("providers.yaml");
    fs::write(&file, providers).unwrap();
    let mut config = Config::default();
    config.oci.credential_provider_config = Some(file);
    config.oci.credential_provider_bin_dir = Some(programs.path().to_owned());
    let source = Sources::new(config)
        .open(&reference.parse().unwrap())
        .unwrap();
    layered(&source, &reference).await.unwrap();
}

/// A token server for `me`, whose tokens the registry takes for `seconds`, though it says that they
/// live longer. It writes the certificate of its key to `cert.pem`, and logs each token.
fn token_server(seconds: u64) -> Server {
    const SERVE: &str = r#"
import base64, datetime, http.server, json, sys, time, urllib.parse
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
port, folder, seconds = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
now = datetime.datetime.now(datetime.timezone.utc)
key = ec.generate_private_key(ec.SECP256R1())
name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tokens")])
cert = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    .serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
    .not_valid_after(now + datetime.timedelta(days=9))
    .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    .sign(key, hashes.SHA256()))
open(folder + "/cert.pem", "wb").write(cert.public_bytes(serialization.Encoding.PEM))
x5c = base64.b64encode(cert.public_bytes(serialization.Encoding.DER)).decode()
def part(value):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        query = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
        sent = self.headers.get("Authorization")
        status, body = 200, {}
        if sent and base64.b64decode(sent.split()[1]) != b"me:geheim":
            status = 401
        else:
            access = []
            for scope in " ".join(query.get("scope", [])).split() if sent else []:
                kind, rest = scope.split(":", 1)
                repository, actions = rest.rsplit(":", 1)
                access.append({"type": kind, "name": repository, "actions": actions.split(",")})
            t = int(time.time())
            # The registry allows for a minute of difference between clocks.
            claims = {"iss": "test", "sub": "me", "aud": query["service"][0], "exp": t - 60 + seconds,
                "nbf": t - 120, "iat": t, "jti": str(time.time()), "access": access}
            text = part({"typ": "JWT", "alg": "ES256", "x5c": [x5c]}) + "." + part(claims)
            r, s = decode_dss_signature(key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
            text += "." + part(r.to_bytes(32, "big") + s.to_bytes(32, "big"))
            body = {"token": text, "expires_in": 3600}
            print("granted", access, flush=True)
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"#;
    Server::start("token server", |port, dir| {
        let mut command = Command::new(bed().join("venv/bin/python"));
        command
            .args(["-u", "-c", SERVE, &port.to_string()])
            .arg(dir)
            .arg(seconds.to_string());
        command
    })
}

fn with_tokens(tokens: &Server) -> Server {
    let (port, certificate) = (tokens.port, tokens.dir.path().join("cert.pem"));
    docker_registry(|_| {
        format!(
            "http: {{addr: ADDRESS}}\nauth: {{token: {{realm: \"http://127.0.0.1:{port}/token\", \
             service: test-registry, issuer: test, rootcertbundle: {}}}}}",
            certificate.display()
        )
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_with_tokens_conforms() {
    let tokens = token_server(300);
    let server = with_tokens(&tokens);
    let image = Image::new();
    let host = format!("127.0.0.1:{}", server.port);
    let at = format!("{host}/team/app:1");
    let login = format!("--dest-creds=me:{SECRET}");
    image.push(&at, &["--dest-tls-verify=false", &login]);
    let reference = format!("oci://{at}");
    let before = tokens.log().lines().count();
    let settings = Settings::new().login(&host, "me", SECRET);
    let source = settings.open(&reference);
    conforms(&source, &reference, &image).await;
    let granted = tokens.log().lines().count() - before;
    assert_eq!(granted, 1, "one token for everything: {}", tokens.log());
    attaches(&source, &reference).await;

    let anonymous = layered(&Settings::new().open(&reference), &reference)
        .await
        .unwrap_err();
    assert_eq!(anonymous.kind(), Kind::Denied, "{anonymous}");
    assert!(
        anonymous.to_string().contains("no credentials for"),
        "{anonymous}"
    );
    let wrong = Settings::new().login(&host, "me", "wrong");
    let error = layered(&wrong.open(&reference), &reference)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Denied, "{error}");
    assert!(
        error.to_string().contains("tried the credentials"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_ends_in_the_middle_is_replaced() {
    let tokens = token_server(3);
    let server = with_tokens(&tokens);
    let image = Image::new();
    let host = format!("127.0.0.1:{}", server.port);
    let at = format!("{host}/team/app:1");
    let login = format!("--dest-creds=me:{SECRET}");
    image.push(&at, &["--dest-tls-verify=false", &login]);
    let reference = format!("oci://{at}");
    let settings = Settings::new().login(&host, "me", SECRET);
    let source = settings.open(&reference);
    let found = layered(&source, &reference).await.unwrap();
    let before = tokens.log().lines().count();
    let (layer, content) = (&found.layers[0], &image.layers[0]);
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(3500)).await;
        let parts = (0..16).map(|n| layer.size * n / 16..layer.size * (n + 1) / 16);
        let place = blob(&layer.blob);
        let reads = parts.map(|range| read(&source, &place, range));
        let parts: Vec<Vec<u8>> = join_all(reads)
            .await
            .into_iter()
            .map(Result::unwrap)
            .collect();
        assert!(parts.concat() == *content);
    }
    let granted = tokens.log().lines().count() - before;
    assert!(
        (3..=6).contains(&granted),
        "one token for each round: {granted}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_of_its_own_is_trusted_where_hosts_toml_says_so() {
    let server = docker_registry(|dir| {
        make_certificates(dir);
        let own = dir.display();
        format!("http: {{addr: ADDRESS, tls: {{certificate: {own}/cert.pem, key: {own}/key.pem}}}}")
    });
    let image = Image::new();
    let host = format!("localhost:{}", server.port);
    let at = format!("{host}/team/app:1");
    let trusted = server.dir.path().join("trusted");
    fs::create_dir(&trusted).unwrap();
    fs::copy(server.dir.path().join("ca.pem"), trusted.join("ca.crt")).unwrap();
    image.push(&at, &[&format!("--dest-cert-dir={}", trusted.display())]);
    let reference = format!("oci://{at}");
    let name = format!("localhost_{}_", server.port);
    let ca: PathBuf = server.dir.path().join("ca.pem");
    let text = format!("server = \"https://{host}\"\nca = {ca:?}\n");
    let source = Settings::new().hosts(&name, &text).open(&reference);
    conforms(&source, &reference, &image).await;
    attaches(&source, &reference).await;

    // As Docker has it: only certificates beside each other.
    let settings = Settings::new();
    let dir = settings.0.path().join("certs.d").join(&host);
    fs::create_dir_all(&dir).unwrap();
    fs::copy(&ca, dir.join("ca.crt")).unwrap();
    layered(&settings.open(&reference), &reference)
        .await
        .unwrap();

    let skip = format!("server = \"https://{host}\"\nskip_verify = true\n");
    layered(
        &Settings::new().hosts(&name, &skip).open(&reference),
        &reference,
    )
    .await
    .unwrap();
    let distrusted = format!("server = \"https://{host}\"\n");
    let source = Settings::new().hosts(&name, &distrusted).open(&reference);
    let error = layered(&source, &reference).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_serves_for_a_registry_that_is_not_there() {
    let server = docker_registry(plain);
    let image = Image::new();
    image.push(
        &format!("127.0.0.1:{}/team/app:1", server.port),
        &["--dest-tls-verify=false"],
    );
    let reference = "oci://registry.invalid/team/app:1";
    let text = format!(
        "[host.\"{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
        server.url()
    );
    let source = Settings::new()
        .hosts("registry.invalid", &text)
        .open(reference);
    let found = layered(&source, reference).await.unwrap();
    assert_eq!(found.reference, reference);
    let layer = &found.layers[0];
    let content = read(&source, &blob(&layer.blob), 0..layer.size)
        .await
        .unwrap();
    assert!(content == image.layers[0]);
    assert!(
        server.log().contains("ns=registry.invalid"),
        "{}",
        server.log()
    );
}

#[test]
fn an_image_is_inspected() {
    let server = docker_registry(plain);
    let image = Image::new();
    let at = format!("127.0.0.1:{}/team/app:1", server.port);
    image.push(&at, &["--dest-tls-verify=false"]);
    let home = tempfile::tempdir().unwrap();
    let hearth = |arguments: &[&str]| {
        let output = Command::new("timeout")
            .arg("60")
            .arg(env!("CARGO_BIN_EXE_hearth"))
            .arg("inspect")
            .args(arguments)
            .env("HEARTH_STORE", home.path().join("store"))
            .env("HOME", home.path())
            .env_remove("HEARTH_CONFIG")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (
            output.status.success(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    let reference = format!("oci://{at}?platform=linux/arm64");
    let (ok, out, error) = hearth(&[&reference]);
    assert!(ok, "{error}");
    for word in [
        "(image)",
        "platform linux/arm64",
        "manifest sha256:",
        "2 layers",
        GZIP,
    ] {
        assert!(out.contains(word), "{word}: {out}");
    }
    let (ok, out, error) = hearth(&["--json", &reference]);
    assert!(ok, "{error}");
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["layers"][0]["bytes"], image.layers[0].len());
    assert_eq!(
        json["layers"][1]["digest"],
        Digest::of(&image.layers[1]).to_string()
    );
    let (ok, _, error) = hearth(&[&format!("oci://{at}x")]);
    assert!(
        !ok && error.contains("no tag 1x") && error.contains("hint:"),
        "{error}"
    );
}
