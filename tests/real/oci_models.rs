//! Models in every layout of registries, pushed to a real one: the same files are the same tree.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

use hearth::{
    digest::{Digest, ObjectId},
    fetch::{self, Engine},
    image::LayerIndex,
    node::{Node, NodeError, Progress},
    reference::Reference,
    source::{self, AttachedBlob, Attachment, Layered, Source, SourceErrorKind, Sources},
    store::{self, Store, StoreErrorKind},
    tree::{Artifact, Kind, Recipe},
};
use serde_json::{Value, json};

use crate::{
    pushed::{MANIFEST, Registry, gzip, tar},
    servers,
    sources::bytes,
};

mod layers;
mod refused;

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
    home: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        Self::with(None)
    }

    fn with(max_bytes: Option<u64>) -> Self {
        let home = tempfile::tempdir().unwrap();
        let config = store::Config {
            min_free: store::ByteSize(0),
            max_bytes: max_bytes.map(store::ByteSize),
            ..Default::default()
        };
        let store = Store::open(home.path(), &config).unwrap();
        let engine = Engine::new(store.clone(), fetch::Config::default());
        let sources = Sources::new(source::Config::default());
        Self {
            node: Node::new(engine, sources.clone()),
            sources,
            store,
            home,
        }
    }

    /// Removes content from the store, as `verify` does with what is damaged.
    fn lose(&self, content: &[u8]) {
        let hex = Digest::of(content).hex();
        let path = format!("objects/sha256/{}/{hex}", &hex[..2]);
        fs::remove_file(self.home.path().join(path)).unwrap();
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
    let lines = full_shape(artifact).into_iter();
    let without = lines.map(|line| line.rsplit_once(' ').unwrap().0.to_owned());
    without.collect()
}

/// The same, with times.
fn full_shape(artifact: &Artifact) -> Vec<String> {
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
                "{path} {kind} {:o} {}:{} {:?} {}.{}",
                meta.mode, meta.uid, meta.gid, meta.xattrs, meta.mtime.0, meta.mtime.1
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
