//! The conformance suite that every source passes, and the buckets and files that run it.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    ops::Range,
    path::PathBuf,
    sync::Arc,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use hearth::{
    source::{Config, Source, SourceError, SourceErrorKind, Sources},
    tree::{Artifact, Location},
};
use object_store::{
    ObjectStore, ObjectStoreExt, PutPayload, aws::AmazonS3Builder, azure::MicrosoftAzureBuilder,
    path::Path as Key,
};

use crate::servers::{self, Server, set_env};

mod s3;

/// A directory at an origin that a test may change.
#[async_trait::async_trait]
pub(crate) trait Origin: Send + Sync {
    /// The reference of what is at `path`; of the whole directory where it is empty.
    fn reference(&self, path: &str) -> String;
    /// Creates or replaces the file at `path`.
    async fn put(&self, path: &str, body: &[u8]);
    /// Removes the file at `path`.
    async fn delete(&self, path: &str);
    /// Whether what a location is pinned to can still be read after a change.
    fn keeps_history(&self) -> bool {
        false
    }
}

/// `size` bytes that repeat nowhere near.
pub(crate) fn bytes(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

const BIG: &str = "deep/er/down/model.safetensors";

/// Small and large, nested, empty, and with names that need encoding somewhere.
pub(crate) fn fixtures() -> BTreeMap<String, Vec<u8>> {
    let files: [(&str, usize); 13] = [
        ("config.json", 613),
        ("empty", 0),
        (BIG, (3 << 20) + 7),
        ("deep/er/one-byte", 1),
        ("deep/tokenizer.json", 70_000),
        ("a name with spaces.bin", 10),
        ("plus+and=equals&.bin", 11),
        ("percent%41%.bin", 12),
        ("hash#tag.bin", 13),
        ("ünïcödé-模型.bin", 14),
        ("tilde~(paren)'quote'!,;@$.bin", 15),
        ("dir with space/ü+%#/x", 16),
        ("[1]{2}.bin", 17),
    ];
    files
        .into_iter()
        .enumerate()
        .map(|(seed, (path, size))| (path.to_owned(), bytes(seed as u64, size)))
        .collect()
}

/// What `reference` resolves to.
pub(crate) async fn resolve(
    sources: &Sources,
    reference: &str,
) -> Result<(Arc<dyn Source>, Artifact), SourceError> {
    let reference = reference.parse().unwrap_or_else(|e| panic!("{e}"));
    let source = sources.open(&reference)?;
    let artifact = source.resolve(&reference).await?;
    Ok((source, artifact))
}

async fn kind_of(sources: &Sources, reference: &str) -> SourceErrorKind {
    match resolve(sources, reference).await {
        Ok((_, artifact)) => panic!("{reference} has {} objects", artifact.objects.len()),
        Err(error) => error.kind(),
    }
}

/// Where the file at `path` is, and its size.
pub(crate) fn locate(artifact: &Artifact, path: &str) -> (Location, u64) {
    let files = artifact.tree.files();
    let (_, _, object) = files.iter().find(|(p, ..)| p == path).unwrap_or_else(|| {
        panic!(
            "no {path} in {:?}",
            files.iter().map(|f| &f.0).collect::<Vec<_>>()
        )
    });
    let object = &artifact.objects[*object as usize];
    let location = object.recipe.location().unwrap();
    (location.clone(), object.size)
}

/// Reads a range, as the fetch room does.
pub(crate) async fn read(
    source: &Arc<dyn Source>,
    location: &Location,
    range: Range<u64>,
) -> Result<Vec<u8>, SourceError> {
    let absolute = location.offset + range.start..location.offset + range.end;
    let mut body = source.read(location, absolute).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = body.try_next().await? {
        bytes.extend_from_slice(&piece);
        assert!(
            bytes.len() as u64 <= range.end - range.start,
            "more bytes than asked for"
        );
    }
    assert_eq!(
        bytes.len() as u64,
        range.end - range.start,
        "a short body without an error"
    );
    Ok(bytes)
}

/// What every source must do.
pub(crate) async fn conformance(origin: &dyn Origin) {
    let files = fixtures();
    stream::iter(&files)
        .for_each_concurrent(8, |(path, body)| origin.put(path, body))
        .await;
    let sources = Sources::new(Config::default());
    resolves(&sources, origin, &files).await;
    reads(&sources, origin, &files).await;
    filters(&sources, origin).await;
    refuses_what_is_not_there(&sources, origin).await;
    notices_changes(&sources, origin, &files).await;
}

async fn resolves(sources: &Sources, origin: &dyn Origin, files: &BTreeMap<String, Vec<u8>>) {
    let whole = origin.reference("");
    let (_, artifact) = resolve(sources, &whole).await.unwrap();
    let listed: BTreeMap<String, u64> = artifact
        .tree
        .files()
        .into_iter()
        .map(|(path, _, object)| (path, artifact.objects[object as usize].size))
        .collect();
    let wanted: BTreeMap<String, u64> = files
        .iter()
        .map(|(path, body)| (path.clone(), body.len() as u64))
        .collect();
    assert_eq!(listed, wanted);
    let again = resolve(&Sources::new(Config::default()), &whole)
        .await
        .unwrap()
        .1;
    assert_eq!(artifact, again, "resolving twice gives the same");
    assert_eq!(
        artifact.reference,
        whole
            .parse::<hearth::reference::Reference>()
            .unwrap()
            .to_string()
    );

    let (source, one) = resolve(sources, &origin.reference(BIG)).await.unwrap();
    let (location, size) = locate(&one, "model.safetensors");
    assert_eq!(one.objects.len(), 1);
    assert_eq!(read(&source, &location, 0..size).await.unwrap(), files[BIG]);
    let (_, below) = resolve(sources, &origin.reference("deep/er/"))
        .await
        .unwrap();
    let below: Vec<_> = below.tree.files().into_iter().map(|f| f.0).collect();
    assert_eq!(below, ["down/model.safetensors", "one-byte"]);
}

async fn reads(sources: &Sources, origin: &dyn Origin, files: &BTreeMap<String, Vec<u8>>) {
    let (source, artifact) = resolve(sources, &origin.reference("")).await.unwrap();
    for (path, body) in files.iter().filter(|(_, body)| !body.is_empty()) {
        let (location, size) = locate(&artifact, path);
        assert_eq!(
            read(&source, &location, 0..size).await.unwrap(),
            *body,
            "{path}"
        );
    }
    let (location, size) = locate(&artifact, BIG);
    let body = &files[BIG];
    let ranges = [
        0..1,
        size - 1..size,
        1..2,
        0..1 << 20,
        (1 << 20) - 1..(1 << 20) + 1,
        7..3 << 20,
        size / 2..size,
    ];
    let parallel = stream::iter(ranges.iter().cycle().take(28))
        .map(|range| {
            let (source, location, range) = (&source, &location, range.clone());
            async move {
                let got = read(source, location, range.clone()).await.unwrap();
                assert!(
                    got == body[range.start as usize..range.end as usize],
                    "{range:?}"
                );
            }
        })
        .buffer_unordered(14);
    parallel.collect::<Vec<_>>().await;
    for range in [size..size + 1, size - 1..size + 1, size + 9..size + 10] {
        let error = read(&source, &location, range.clone())
            .await
            .expect_err("beyond the end");
        assert!(
            matches!(
                error.kind(),
                SourceErrorKind::Changed | SourceErrorKind::Corrupt | SourceErrorKind::Invalid
            ),
            "{range:?}: {error}"
        );
    }
}

async fn filters(sources: &Sources, origin: &dyn Origin) {
    let whole = origin.reference("");
    let filtered = format!("{whole}?include=*.json&include=deep%2F*&exclude=tokenizer*");
    let (_, artifact) = resolve(sources, &filtered).await.unwrap();
    let paths: Vec<_> = artifact.tree.files().into_iter().map(|f| f.0).collect();
    assert_eq!(paths, ["config.json", BIG, "deep/er/one-byte"]);
    let none = resolve(sources, &format!("{whole}?include=*.gguf"))
        .await
        .unwrap_err();
    assert_eq!(none.kind(), SourceErrorKind::NotFound);
    assert!(
        none.hint().is_some_and(|hint| hint.contains("globs")),
        "{none}"
    );
}

async fn refuses_what_is_not_there(sources: &Sources, origin: &dyn Origin) {
    for path in ["nothing/here/", "nothing-here.bin", "deep/er/nothing"] {
        let kind = kind_of(sources, &origin.reference(path)).await;
        assert_eq!(kind, SourceErrorKind::NotFound, "{path}");
    }
}

async fn notices_changes(
    sources: &Sources,
    origin: &dyn Origin,
    files: &BTreeMap<String, Vec<u8>>,
) {
    let (source, before) = resolve(sources, &origin.reference("")).await.unwrap();
    let (location, size) = locate(&before, "deep/tokenizer.json");
    origin
        .put("deep/tokenizer.json", &bytes(99, size as usize + 5))
        .await;
    if origin.keeps_history() {
        let pinned = read(&source, &location, 0..size).await.unwrap();
        assert!(pinned == files["deep/tokenizer.json"], "the pinned bytes");
    } else {
        for range in [0..size, 5..6] {
            let error = read(&source, &location, range)
                .await
                .expect_err("it has changed");
            assert_eq!(error.kind(), SourceErrorKind::Changed, "{error}");
            assert!(error.to_string().contains("tokenizer.json"), "{error}");
        }
    }
    let (source, after) = resolve(sources, &origin.reference("")).await.unwrap();
    assert_ne!(after, before);
    let (new, new_size) = locate(&after, "deep/tokenizer.json");
    assert_eq!(new_size, size + 5);
    assert_eq!(
        read(&source, &new, 0..new_size).await.unwrap(),
        bytes(99, size as usize + 5)
    );
    let ids = |artifact: &Artifact| artifact.objects.iter().map(|o| o.id).collect::<Vec<_>>();
    let kept = ids(&before)
        .into_iter()
        .filter(|id| ids(&after).contains(id))
        .count();
    assert_eq!(kept, files.len() - 1, "the other files kept their ids");

    origin.delete("config.json").await;
    let (gone, size) = locate(&before, "config.json");
    if origin.keeps_history() {
        return;
    }
    let error = read(&source, &gone, 0..size).await.expect_err("it is gone");
    assert_eq!(error.kind(), SourceErrorKind::NotFound, "{error}");
    origin.put("config.json", &files["config.json"]).await;
}

/// A bucket, written through `object_store`.
pub(crate) struct Store {
    scheme: &'static str,
    store: Box<dyn ObjectStore>,
}

const PREFIX: &str = "models/my model+1";

#[async_trait::async_trait]
impl Origin for Store {
    fn reference(&self, path: &str) -> String {
        format!("{}://bucket/{PREFIX}/{path}", self.scheme)
    }

    async fn put(&self, path: &str, body: &[u8]) {
        let key = Key::parse(format!("{PREFIX}/{path}")).unwrap();
        self.store
            .put(&key, PutPayload::from(body.to_vec()))
            .await
            .unwrap();
    }

    async fn delete(&self, path: &str) {
        let key = Key::parse(format!("{PREFIX}/{path}")).unwrap();
        self.store.delete(&key).await.unwrap();
    }
}

/// The environment for the S3 server, and a store to fill its bucket.
pub(crate) fn s3(server: &Server) -> Store {
    set_env(&[
        ("AWS_ENDPOINT_URL", server.url().as_str()),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "secret-of-the-test"),
        ("AWS_REGION", "us-east-1"),
    ]);
    assert!(raw(server, "PUT", "/bucket", "").starts_with("HTTP/1.1 200"));
    store("s3", || {
        AmazonS3Builder::from_env()
            .with_bucket_name("bucket")
            .with_allow_http(true)
            .build()
    })
}

/// One request with a target that no client would send; the answer's head.
pub(crate) fn raw(server: &Server, method: &str, target: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    write!(
        stream,
        "{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        server.port,
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

pub(crate) fn run(test: impl Future<Output = ()>) {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(test);
}

/// A store to write with; the TLS implementation must be there before it is built.
fn store<S: ObjectStore>(
    scheme: &'static str,
    build: impl FnOnce() -> object_store::Result<S>,
) -> Store {
    drop(Sources::new(Config::default()));
    Store {
        scheme,
        store: Box::new(build().unwrap()),
    }
}

/// A bucket of the GCS server, written through the JSON API: it does not take XML uploads.
pub(crate) struct Gcs {
    server: Server,
    client: reqwest::Client,
}

impl Gcs {
    async fn send(&self, request: reqwest::RequestBuilder) {
        let answer = request.send().await.unwrap();
        assert!(answer.status().is_success(), "{answer:?}");
    }

    fn name(path: &str) -> String {
        let name = format!("{PREFIX}/{path}");
        percent_encoding::utf8_percent_encode(&name, percent_encoding::NON_ALPHANUMERIC).to_string()
    }
}

#[async_trait::async_trait]
impl Origin for Gcs {
    fn reference(&self, path: &str) -> String {
        format!("gs://bucket/{PREFIX}/{path}")
    }

    async fn put(&self, path: &str, body: &[u8]) {
        let url = format!(
            "{}/upload/storage/v1/b/bucket/o?uploadType=media&name={}",
            self.server.url(),
            Self::name(path)
        );
        self.send(self.client.post(url).body(body.to_vec())).await;
    }

    async fn delete(&self, path: &str) {
        let url = format!(
            "{}/storage/v1/b/bucket/o/{}",
            self.server.url(),
            Self::name(path)
        );
        self.send(self.client.delete(url)).await;
    }
}

#[test]
fn gcs_conforms() {
    run(conformance(&gcs(servers::fake_gcs())));
}

/// The environment for the GCS server, and its bucket to fill.
pub(crate) fn gcs(server: Server) -> Gcs {
    set_env(&[("STORAGE_EMULATOR_HOST", &server.url())]);
    let made = raw(
        &server,
        "POST",
        "/storage/v1/b?project=test",
        r#"{"name":"bucket"}"#,
    );
    assert!(made.starts_with("HTTP/1.1 200"), "{made}");
    drop(Sources::new(Config::default()));
    let client = reqwest::Client::new();
    Gcs { server, client }
}

/// The environment for the Azure server, and a store to fill its container.
pub(crate) fn azure(server: &Server) -> Store {
    set_env(&[
        ("AZURE_STORAGE_USE_EMULATOR", "true"),
        ("AZURITE_BLOB_STORAGE_URL", &server.url()),
    ]);
    let bed = servers::bed();
    let script = format!(
        "from azure.storage.blob import BlobServiceClient as B\n\
         B('{}/devstoreaccount1', credential='Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==').create_container('bucket')",
        server.url()
    );
    let made = std::process::Command::new(bed.join("venv/bin/python"))
        .args(["-c", &script])
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    store("az", || {
        MicrosoftAzureBuilder::from_env()
            .with_container_name("bucket")
            .build()
    })
}

#[test]
fn azure_conforms() {
    let server = servers::azurite();
    let store = azure(&server);
    run(conformance(&store));
}

#[test]
fn azure_denies_wrong_keys() {
    let server = servers::azurite();
    set_env(&[
        ("AZURE_STORAGE_USE_EMULATOR", "true"),
        ("AZURITE_BLOB_STORAGE_URL", server.url().as_str()),
        ("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmcga2V5"),
    ]);
    run(async {
        let error = resolve(&Sources::new(Config::default()), "az://bucket/x/")
            .await
            .unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::Denied, "{error}");
        assert!(!format!("{error:?}").contains("d3Jvbmcga2V5"));
    });
}

/// A directory of this machine.
struct Directory(PathBuf);

#[async_trait::async_trait]
impl Origin for Directory {
    fn reference(&self, path: &str) -> String {
        let path = self.0.join(path);
        let url = url::Url::from_file_path(&path).unwrap().to_string();
        // `Url` leaves these as they are, and they would end the path.
        url.replace('?', "%3F").replace('#', "%23")
    }

    async fn put(&self, path: &str, body: &[u8]) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, body).unwrap();
    }

    async fn delete(&self, path: &str) {
        fs::remove_file(self.0.join(path)).unwrap();
    }
}

#[test]
fn files_conform() {
    let temp = tempfile::tempdir().unwrap();
    run(conformance(&Directory(temp.path().join("a model+é"))));
}
