//! Models in every layout of registries, pushed to a real one: the same files are the same tree.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

use hearth::{
    digest::{Digest, ObjectId},
    fetch::{self, Engine},
    node::{Node, NodeError, Progress},
    reference::Reference,
    source::{self, Layered, Source, SourceErrorKind, Sources},
    store::{self, Store},
    tree::{Artifact, Kind, Recipe},
};
use serde_json::{Value, json};

use crate::{
    pushed::{MANIFEST, Registry, gzip, tar},
    servers,
    sources::bytes,
};

const CNCF: &str = "application/vnd.cncf.model";
const KITOPS: &str = "application/vnd.kitops.modelkit";
const DOCKER: &str = "application/vnd.docker.ai";
const OLLAMA: &str = "application/vnd.ollama.image";
const FILEPATH: &str = "org.cncf.model.filepath";
const TITLE: &str = "org.opencontainers.image.title";

/// The files of the model that every layout holds.
pub(crate) struct Model {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) files: BTreeMap<&'static str, Vec<u8>>,
}

impl Model {
    pub(crate) fn new() -> Self {
        let files = BTreeMap::from([
            ("config.json", br#"{"model_type": "test"}"#.to_vec()),
            ("model.safetensors", bytes(1, (5 << 20) + 77)),
            ("nested/weights-2.safetensors", bytes(2, (2 << 20) + 1)),
            ("tokenizer/vocab.txt", bytes(3, 70_000)),
        ]);
        let dir = tempfile::tempdir().unwrap();
        for (path, content) in &files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        Self { dir, files }
    }

    fn tar(&self, options: &[&str], paths: &[&str]) -> Vec<u8> {
        tar(self.dir.path(), options, paths)
    }
}

/// A manifest in the making.
pub(crate) struct Push<'r> {
    registry: &'r Registry,
    repository: String,
    config: Value,
    layers: Vec<Value>,
    artifact_type: Option<&'static str>,
    media_type: &'static str,
}

impl<'r> Push<'r> {
    pub(crate) fn new(registry: &'r Registry, repository: &str, config: &str) -> Self {
        let repository = repository.to_owned();
        Self {
            config: registry.blob(&repository, config, b"{}"),
            registry,
            repository,
            layers: Vec::new(),
            artifact_type: None,
            media_type: MANIFEST,
        }
    }

    pub(crate) fn layer(&mut self, media_type: &str, content: &[u8], annotations: &[(&str, &str)]) {
        let mut layer = self.registry.blob(&self.repository, media_type, content);
        for (key, value) in annotations {
            layer["annotations"][key] = json!(value);
        }
        self.layers.push(layer);
    }

    /// A layer with a `name` of its own, as Ollama has them.
    fn named(&mut self, media_type: &str, content: &[u8], name: &str) {
        self.layer(media_type, content, &[]);
        self.layers.last_mut().unwrap()["name"] = json!(name);
    }

    /// Pushes the manifest; the reference.
    pub(crate) fn done(self) -> String {
        self.with_digest().0
    }

    fn with_digest(self) -> (String, Digest) {
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": self.media_type,
            "config": self.config,
            "layers": self.layers,
        });
        if let Some(artifact_type) = self.artifact_type {
            manifest["artifactType"] = json!(artifact_type);
        }
        let digest = self.registry.manifest(&self.repository, "v1", &manifest);
        (self.registry.reference(&self.repository, "v1"), digest)
    }
}

/// Every layout that needs no unpacking: what it is called, its reference.
pub(crate) fn layouts(registry: &Registry, model: &Model) -> Vec<(&'static str, String)> {
    let files = || model.files.iter();
    let cncf_kind = |path: &str| match path.ends_with("safetensors") {
        true => "weight",
        false => "weight.config",
    };
    let mut made = Vec::new();

    let mut push = Push::new(registry, "cncf/raw", &format!("{CNCF}.config.v1+json"));
    push.artifact_type = Some("application/vnd.cncf.model.manifest.v1+json");
    for (path, content) in files() {
        let media_type = format!("{CNCF}.{}.v1.raw", cncf_kind(path));
        let metadata = r#"{"name":"x","mode":420,"uid":0,"gid":0,"size":1,"mtime":"2024-02-29T23:59:59Z","typeflag":48}"#;
        let metadata = ("org.cncf.model.file.metadata+json", metadata);
        push.layer(&media_type, content, &[(FILEPATH, path), metadata]);
    }
    made.push(("modelpack raw", push.done()));

    let mut push = Push::new(registry, "cncf/tar", &format!("{CNCF}.config.v1+json"));
    for (path, _) in files() {
        let media_type = format!("{CNCF}.{}.v1.tar", cncf_kind(path));
        let options = ["--format=pax", "--mtime=2024-02-29T23:59:59.5Z"];
        push.layer(
            &media_type,
            &model.tar(&options, &[path]),
            &[(FILEPATH, path)],
        );
    }
    made.push(("modelpack tar", push.done()));

    let mut push = Push::new(registry, "kitops/tar", &format!("{KITOPS}.config.v1+json"));
    let weights = ["./model.safetensors", "./nested"];
    let tar = model.tar(&["--format=gnu"], &weights);
    push.layer(&format!("{KITOPS}.model.v1.tar"), &tar, &[]);
    let tar = model.tar(&["--format=ustar"], &["tokenizer", "config.json"]);
    push.layer(&format!("{KITOPS}.modelpart.v1.tar"), &tar, &[]);
    made.push(("kitops tar", push.done()));

    let config = format!("{DOCKER}.model.config.v0.1+json");
    let mut push = Push::new(registry, "docker/v1", &config);
    let weights = &model.files["model.safetensors"];
    push.layer(&format!("{DOCKER}.safetensors"), weights, &[]);
    let tar = model.tar(&[], &["config.json"]);
    push.layer(&format!("{DOCKER}.vllm.config.tar"), &tar, &[]);
    let tar = model.tar(&[], &["nested", "tokenizer"]);
    push.layer(&format!("{DOCKER}.dir.tar"), &tar, &[]);
    made.push(("docker model runner v0.1", push.done()));

    let config = format!("{DOCKER}.model.config.v0.2+json");
    let mut push = Push::new(registry, "docker/v2", &config);
    for (path, content) in files() {
        let kind = match path.ends_with("safetensors") {
            true => "safetensors",
            false => "model.file",
        };
        push.layer(&format!("{DOCKER}.{kind}"), content, &[(FILEPATH, path)]);
    }
    made.push(("docker model runner v0.2", push.done()));

    let config = "application/vnd.docker.container.image.v1+json";
    let mut push = Push::new(registry, "ollama/tensors", config);
    push.media_type = "application/vnd.docker.distribution.manifest.v2+json";
    for (path, content) in files() {
        match path.strip_suffix(".safetensors") {
            Some(name) => push.named(&format!("{OLLAMA}.tensor"), content, name),
            None => push.named(&format!("{OLLAMA}.json"), content, path),
        }
    }
    made.push(("ollama", push.done()));

    let mut push = Push::new(registry, "oras/files", "application/vnd.oci.empty.v1+json");
    push.artifact_type = Some("application/vnd.unknown.artifact.v1");
    for (at, (path, content)) in files().enumerate() {
        // What ORAS calls files of which nobody says what they are.
        let types = ["application/vnd.oci.image.layer.v1.tar", "text/plain"];
        push.layer(types[at % 2], content, &[(TITLE, path)]);
    }
    made.push(("oras files", push.done()));
    made
}

struct Bed {
    node: Node,
    sources: Sources,
    store: Arc<Store>,
    _home: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let config = store::Config {
            min_free: store::ByteSize(0),
            ..Default::default()
        };
        let store = Store::open(home.path(), &config).unwrap();
        let engine = Engine::new(store.clone(), fetch::Config::default());
        let sources = Sources::new(source::Config::default());
        Self {
            node: Node::new(engine, sources.clone()),
            sources,
            store,
            _home: home,
        }
    }

    fn source(&self, reference: &str) -> (Reference, Arc<dyn Source>) {
        let reference: Reference = reference.parse().unwrap();
        let source = self.sources.open(&reference).unwrap();
        (reference, source)
    }

    async fn resolve(&self, reference: &str) -> Artifact {
        let (reference, source) = self.source(reference);
        assert_eq!(source.layered(&reference).await.unwrap(), None);
        source.resolve(&reference).await.unwrap()
    }

    async fn refused(&self, reference: &str) -> String {
        let (reference, source) = self.source(reference);
        let error = source.resolve(&reference).await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::Invalid, "{error}");
        format!("{error}; {}", error.hint().unwrap_or_default())
    }

    async fn layered(&self, reference: &str) -> Layered {
        let (reference, source) = self.source(reference);
        let error = source.resolve(&reference).await.unwrap_err();
        assert!(error.to_string().contains("unpacked"), "{error}");
        source.layered(&reference).await.unwrap().unwrap()
    }

    async fn warm(&self, reference: &str) -> Result<Artifact, NodeError> {
        let reference: Reference = reference.parse().unwrap();
        self.node
            .warm(&reference, None, &Progress::default())
            .await?;
        let found = self.store.artifact(&reference.to_string()).unwrap();
        Ok(found.unwrap().1)
    }

    /// The content of every file, from the store.
    fn contents(&self, artifact: &Artifact) -> BTreeMap<String, Vec<u8>> {
        use std::os::unix::fs::FileExt as _;
        let files = artifact.tree.files().into_iter();
        files
            .map(|(path, _, object)| {
                let (stored, offset) = artifact.place(object).unwrap();
                let id = artifact.objects[stored as usize].id;
                let complete = self.store.complete(&id).unwrap().expect("complete");
                let mut data = vec![0; artifact.objects[object as usize].size as usize];
                complete.file().read_exact_at(&mut data, offset).unwrap();
                (path, data)
            })
            .collect()
    }
}

/// Paths, kinds and permissions: the shape of a tree, without times and objects.
fn shape(artifact: &Artifact) -> Vec<String> {
    fn walk(artifact: &Artifact, dir: u32, above: &str, found: &mut Vec<String>) {
        for entry in artifact.tree.entries(dir).unwrap() {
            let path = format!("{above}/{}", String::from_utf8_lossy(&entry.name));
            let inode = artifact.tree.get(entry.inode).unwrap();
            let kind = match &inode.kind {
                Kind::Dir { .. } => "dir".to_owned(),
                Kind::File { object } => artifact.objects[*object as usize].size.to_string(),
                other => format!("{other:?}"),
            };
            let meta = &inode.meta;
            found.push(format!(
                "{path} {kind} {:o} {}:{}",
                meta.mode, meta.uid, meta.gid
            ));
            if matches!(inode.kind, Kind::Dir { .. }) {
                walk(artifact, entry.inode, &path, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(artifact, 0, "", &mut found);
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_layout_of_the_same_files_is_the_same_tree() {
    let (registry, model) = (Registry::start(), Model::new());
    let bed = Bed::new();
    let expected: BTreeMap<String, Vec<u8>> = model
        .files
        .iter()
        .map(|(path, content)| ((*path).to_owned(), content.clone()))
        .collect();
    let mut shapes = BTreeMap::new();
    for (layout, reference) in layouts(&registry, &model) {
        let artifact = bed.warm(&reference).await.unwrap_or_else(|error| {
            let source = std::error::Error::source(&error);
            panic!("{layout}: {error}: {source:?}")
        });
        assert_eq!(artifact.reference, reference);
        assert_eq!(bed.contents(&artifact), expected, "{layout}");
        let own = artifact.objects.iter().filter(|o| o.id.sha256().is_some());
        assert_eq!(own.count(), artifact.stored().count(), "{layout}");
        shapes.insert(layout, shape(&artifact));
        if layout.starts_with("modelpack") {
            let file = artifact.tree.find("tokenizer/vocab.txt").unwrap();
            let mtime = artifact.tree.get(file).unwrap().meta.mtime;
            assert_eq!(mtime, (1_709_251_199, 0), "{layout}");
        }
    }
    let first = &shapes["modelpack raw"];
    assert_eq!(first.len(), 6, "{first:?}");
    for (layout, shape) in &shapes {
        assert_eq!(shape, first, "{layout}");
    }
    // Raw layers of five layouts are the same objects; each tar is one more.
    let tars = 4 + 2 + 2;
    assert_eq!(
        bed.store.usage().unwrap().objects,
        model.files.len() as u64 + tars
    );
    // And shared with the same files from elsewhere.
    let web = servers::nginx(model.dir.path(), "");
    let mut index = Vec::new();
    for (path, content) in &model.files {
        let sha256 = Digest::of(content).hex();
        index.push(json!({"path": path, "size": content.len(), "sha256": sha256}));
    }
    let index = json!({ "files": index }).to_string();
    fs::write(model.dir.path().join("hearth.json"), index).unwrap();
    let artifact = bed.warm(&format!("{}/", web.url())).await.unwrap();
    assert_eq!(bed.contents(&artifact), expected);
    assert_eq!(
        bed.store.usage().unwrap().objects,
        model.files.len() as u64 + tars
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_without_paths_are_called_by_what_they_are() {
    let registry = Registry::start();
    let bed = Bed::new();
    let mut push = Push::new(
        &registry,
        "library/ollama",
        "application/vnd.docker.container.image.v1+json",
    );
    push.media_type = "application/vnd.docker.distribution.manifest.v2+json";
    for (kind, content) in [
        ("model", &b"gguf"[..]),
        ("projector", b"projector"),
        ("adapter", b"adapter"),
        ("template", b"{{ .Prompt }}"),
        ("system", b"be brief"),
        ("license", b"MIT"),
        ("license", b"and more"),
        ("params", b"{}"),
        ("messages", b"[]"),
    ] {
        push.layer(&format!("{OLLAMA}.{kind}"), content, &[]);
    }
    let names = |artifact: &Artifact| {
        let files = artifact.tree.files().into_iter();
        files.map(|(path, ..)| path).collect::<Vec<_>>()
    };
    let artifact = bed.resolve(&push.done()).await;
    assert_eq!(
        names(&artifact),
        [
            "adapter.gguf",
            "license",
            "license-2",
            "messages.json",
            "model.gguf",
            "params.json",
            "projector.gguf",
            "system",
            "template"
        ]
    );
    let mut push = Push::new(
        &registry,
        "docker/gguf",
        &format!("{DOCKER}.model.config.v0.1+json"),
    );
    for (kind, content) in [
        ("gguf.v3", &b"one"[..]),
        ("gguf.v3", b"two"),
        ("gguf.v3.lora", b"lora"),
        ("mmproj", b"mmproj"),
        ("license", b"MIT"),
        ("chat.template.jinja", b"{{}}"),
    ] {
        push.layer(&format!("{DOCKER}.{kind}"), content, &[]);
    }
    let artifact = bed.resolve(&push.done()).await;
    assert_eq!(
        names(&artifact),
        [
            "LICENSE",
            "adapter.gguf",
            "model-00001-of-00002.gguf",
            "model-00002-of-00002.gguf",
            "model.mmproj",
            "template.jinja"
        ]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filters_and_paths_choose_files_of_a_model() {
    let (registry, model) = (Registry::start(), Model::new());
    let bed = Bed::new();
    for (layout, reference) in layouts(&registry, &model) {
        let names = async |reference: String| {
            let artifact = bed.resolve(&reference).await;
            let names: Vec<_> = artifact.tree.files().into_iter().map(|f| f.0).collect();
            (names, artifact.stored().count())
        };
        let (found, objects) = names(format!("{reference}?include=*.json")).await;
        assert_eq!(
            (&*found, objects),
            (&["config.json".to_owned()][..], 1),
            "{layout}"
        );
        let (found, objects) = names(format!("{reference}?path=nested/")).await;
        assert_eq!(
            (&*found, objects),
            (&["weights-2.safetensors".to_owned()][..], 1),
            "{layout}"
        );
        let (reference, source) = bed.source(&format!("{reference}?path=nest"));
        let error = source.resolve(&reference).await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::NotFound, "{layout}: {error}");
    }
    // What was chosen is checked as well as all of it.
    let artifact = bed
        .warm(&format!(
            "{}?path=nested",
            registry.reference("kitops/tar", "v1")
        ))
        .await
        .unwrap();
    let expected = &model.files["nested/weights-2.safetensors"];
    assert_eq!(&bed.contents(&artifact)["weights-2.safetensors"], expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compressed_tars_are_reported_as_layers() {
    let (registry, model) = (Registry::start(), Model::new());
    let bed = Bed::new();
    let all = model.tar(&[], &["model.safetensors", "nested", "tokenizer"]);
    let config = &model.files["config.json"];
    let zstd = zstd::encode_all(&all[..], 1).unwrap();
    let cases = [
        (
            "cncf",
            format!("{CNCF}.config.v1+json"),
            format!("{CNCF}.weight.v1.tar+gzip"),
            gzip(&all),
        ),
        (
            "cncf-zstd",
            format!("{CNCF}.config.v1+json"),
            format!("{CNCF}.weight.v1.tar+zstd"),
            zstd,
        ),
        (
            "kitops",
            format!("{KITOPS}.config.v1+json"),
            format!("{KITOPS}.model.v1.tar+gzip"),
            gzip(&all),
        ),
        (
            "oras",
            "application/vnd.oci.empty.v1+json".into(),
            "application/x-mine".into(),
            gzip(&all),
        ),
    ];
    for (repository, config_type, media_type, content) in cases {
        let mut push = Push::new(&registry, repository, &config_type);
        let digest = Digest::of(&all).to_string();
        let unpack = [
            (TITLE, "all"),
            ("io.deis.oras.content.unpack", "true"),
            ("io.deis.oras.content.digest", &*digest),
        ];
        let annotations = if repository == "oras" {
            &unpack[..]
        } else {
            &[]
        };
        push.layer(&media_type, &content, annotations);
        let raw = match repository {
            "cncf" | "cncf-zstd" => format!("{CNCF}.weight.config.v1.raw"),
            _ => "application/json".to_owned(),
        };
        push.layer(&raw, config, &[(TITLE, "./config.json")]);
        let (reference, manifest) = push.with_digest();
        let layered = bed.layered(&format!("{reference}?path=nested")).await;
        assert_eq!((layered.manifest, &*layered.root), (manifest, "nested"));
        let [tar, file] = &layered.layers[..] else {
            panic!("{layered:?}");
        };
        assert_eq!(
            (tar.blob, tar.size),
            (Digest::of(&content), content.len() as u64)
        );
        assert_eq!((&tar.media_type, &tar.as_file), (&media_type, &None));
        assert_eq!(tar.diff_id.is_some(), repository == "oras");
        assert_eq!(file.as_file.as_deref(), Some("config.json"));
        assert_eq!(file.blob, Digest::of(config));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_modelcar_is_an_image_of_which_a_directory_is_the_model() {
    let (registry, model) = (Registry::start(), Model::new());
    let bed = Bed::new();
    let layer = tar(
        model.dir.path(),
        &["--transform=s,^,models/,"],
        &["config.json", "nested"],
    );
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer).to_string()]},
    });
    let config_type = "application/vnd.oci.image.config.v1+json";
    let mut push = Push::new(&registry, "modelcar", config_type);
    push.config = registry.blob("modelcar", config_type, config.to_string().as_bytes());
    let content = gzip(&layer);
    push.layer("application/vnd.oci.image.layer.v1.tar+gzip", &content, &[]);
    let reference = push.done();
    let layered = bed.layered(&reference).await;
    assert_eq!((&*layered.root, layered.layers.len()), ("", 1));
    assert_eq!(layered.layers[0].as_file, None);
    let layered = bed.layered(&format!("{reference}?path=/models/")).await;
    assert_eq!(layered.root, "models");
    assert_eq!(layered.reference, format!("{reference}?path=models"));
}

/// Name, media type, content and annotations of a layer, and why it is refused.
type Case<'c> = (&'c str, String, Vec<u8>, &'c [(&'c str, &'c str)], &'c str);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_a_model_is_refused_by_name() {
    let registry = Registry::start();
    let bed = Bed::new();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("a"), b"a").unwrap();
    fs::write(path("sparse"), b"").unwrap();
    let sparse = fs::File::options()
        .write(true)
        .open(path("sparse"))
        .unwrap();
    sparse.set_len(10 << 20).unwrap();
    std::os::unix::fs::symlink("../../etc/passwd", path("out")).unwrap();
    let status = std::process::Command::new("mkfifo")
        .arg(path("pipe"))
        .status();
    assert!(status.unwrap().success());
    let tar = |options: &[&str], names: &[&str]| tar(dir.path(), options, names);
    let up = tar(&["-P", "--transform=s,^,../,"], &["a"]);
    let absolute = tar(&["-P", "--transform=s,^,/etc/,"], &["a"]);
    let twice = tar(&[], &["a", "a"]);
    let cut = tar(&[], &["a"])[..512].to_vec();
    let weight = |encoding: &str| format!("{CNCF}.weight.v1.{encoding}");
    let file = "two layers";
    let none: &[(&str, &str)] = &[];
    let cases: [Case<'_>; 15] = [
        ("up", weight("tar"), up, none, "\"..\""),
        ("absolute", weight("tar"), absolute, none, "absolute"),
        ("twice", weight("tar"), twice, none, "is there twice"),
        ("cut", weight("tar"), cut, none, "ends beyond"),
        (
            "link",
            weight("tar"),
            tar(&[], &["out"]),
            none,
            "out of the model",
        ),
        (
            "fifo",
            weight("tar"),
            tar(&[], &["pipe"]),
            none,
            "device or pipe",
        ),
        (
            "sparse",
            weight("tar"),
            tar(&["-S"], &["sparse"]),
            none,
            "sparse",
        ),
        (
            "gzipped",
            weight("tar"),
            gzip(&tar(&[], &["a"])),
            none,
            "compressed",
        ),
        (
            "unnamed",
            weight("raw"),
            b"x".to_vec(),
            none,
            "no annotation that says its path",
        ),
        (
            "climbs",
            weight("raw"),
            b"x".to_vec(),
            &[(FILEPATH, "a/../../b")],
            "\"..\"",
        ),
        (
            "rooted",
            weight("raw"),
            b"x".to_vec(),
            &[(FILEPATH, "/etc/passwd")],
            "absolute",
        ),
        (
            "below",
            weight("raw"),
            b"x".to_vec(),
            &[(FILEPATH, "first/x")],
            "no directory",
        ),
        (
            file,
            weight("raw"),
            b"x".to_vec(),
            &[(FILEPATH, "first")],
            "is there twice",
        ),
        (
            "unknown",
            "application/x-secret".into(),
            b"x".to_vec(),
            none,
            "unsupported media type",
        ),
        (
            "new",
            weight("tar+lz4"),
            b"x".to_vec(),
            none,
            "unsupported media type",
        ),
    ];
    for (name, media_type, content, annotations, why) in cases {
        let repository = name.replace(' ', "-");
        let mut push = Push::new(&registry, &repository, &format!("{CNCF}.config.v1+json"));
        push.layer(&weight("raw"), b"first", &[(FILEPATH, "first")]);
        push.layer(&media_type, &content, annotations);
        let reference = push.done();
        let error = bed.refused(&reference).await;
        let layer = format!("layer 2 ({}, {media_type})", Digest::of(&content));
        for part in [why, &*reference, &*layer] {
            assert!(error.contains(part), "{name}: {part:?} is not in {error}");
        }
    }
    // No model at all.
    let mut push = Push::new(
        &registry,
        "helm",
        "application/vnd.cncf.helm.config.v1+json",
    );
    push.layer(
        "application/vnd.cncf.helm.chart.content.v1.tar+gzip",
        b"x",
        &[],
    );
    let error = bed.refused(&push.done()).await;
    assert!(
        error.contains("neither") && error.contains("helm"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_are_not_where_the_headers_said_are_found_out() {
    let (registry, model) = (Registry::start(), Model::new());
    let bed = Bed::new();
    let mut push = Push::new(&registry, "kit", &format!("{KITOPS}.config.v1+json"));
    let tar = model.tar(&[], &["model.safetensors", "config.json"]);
    push.layer(&format!("{KITOPS}.model.v1.tar"), &tar, &[]);
    let (_, digest) = push.with_digest();
    let reference = format!("oci://{}/kit@{digest}", registry.host());
    let right = bed.resolve(&reference).await;
    let mut wrong = right.clone();
    for object in &mut wrong.objects {
        if let Recipe::Slice { offset, .. } = &mut object.recipe {
            *offset += 512;
        }
        if object.size > 1000 && object.id.sha256().is_none() {
            object.size -= 1024;
            object.id = ObjectId::located("other", "", object.size);
        }
    }
    bed.store.record(&wrong).unwrap();
    bed.store.pin(&reference, "me").unwrap();
    let error = bed.warm(&reference).await.unwrap_err();
    assert!(matches!(error, NodeError::Misled { .. }), "{error}");
    assert!(error.to_string().contains("not where"), "{error}");
    let found = bed.warm(&reference).await.unwrap();
    assert_eq!(found, right, "it was asked for again");
    assert_eq!(
        bed.contents(&found)["model.safetensors"],
        model.files["model.safetensors"]
    );
    let (record, _) = bed.store.artifact(&reference).unwrap().unwrap();
    assert_eq!(record.pins, ["me"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_and_directories_of_a_tar_are_kept() {
    let registry = Registry::start();
    let bed = Bed::new();
    let dir = tempfile::tempdir().unwrap();
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(200));
    let make = |path: &str, content: &[u8]| {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    make("a/data", b"shared");
    make(&long, b"long");
    make("none", b"");
    make("run.sh", b"#!/bin/sh\n");
    let set = |path: &Path, mode| {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    set(&dir.path().join("run.sh"), 0o700);
    fs::create_dir(dir.path().join("hollow")).unwrap();
    fs::hard_link(dir.path().join("a/data"), dir.path().join("z")).unwrap();
    std::os::unix::fs::symlink("../z", dir.path().join("a/link")).unwrap();
    for format in ["gnu", "pax"] {
        let mut push = Push::new(&registry, format, &format!("{KITOPS}.config.v1+json"));
        let option = format!("--format={format}");
        let tar = tar(dir.path(), &[&option, "--sort=name"], &["."]);
        push.layer(&format!("{KITOPS}.model.v1.tar"), &tar, &[]);
        let artifact = bed.warm(&push.done()).await.unwrap();
        let contents = bed.contents(&artifact);
        assert_eq!(contents["a/data"], b"shared");
        assert_eq!(contents["z"], b"shared");
        assert_eq!(contents[&long], b"long");
        assert_eq!(contents["none"], b"");
        let get = |path: &str| {
            let inode = artifact.tree.find(path).unwrap_or_else(|| panic!("{path}"));
            artifact.tree.get(inode).unwrap().clone()
        };
        assert!(matches!(get("hollow").kind, Kind::Dir { .. }));
        assert_eq!(get("run.sh").meta.mode, 0o555);
        assert_eq!(get("z").meta.mode, 0o444);
        let Kind::Symlink { target } = get("a/link").kind else {
            panic!("a link");
        };
        assert_eq!(&*target, b"../z");
    }
}
