//! Roots of images that are mounted while an index of another image takes the place of theirs.

use std::{path::Path, sync::Arc};

use hearth::{
    daemon::ImageRoots,
    digest::Digest,
    fetch::Engine,
    mount::keeper::Link,
    node::{Node, Progress},
    reference::Reference,
    snapshotter::{Hints, Roots as _},
    source::Sources,
    store::Store,
};
use serde_json::json;

use super::{
    csi::wait_for,
    forged::{Pushed, read},
    tables::{Images, TABLE},
    *,
};

/// An agent's roots on the store of a bed, with a keeper that outlives them.
struct Host {
    bed: Bed,
    socket: PathBuf,
    _keeper: Running,
}

/// What an agent is made of.
struct Agent {
    store: Arc<Store>,
    node: Node,
    roots: Arc<ImageRoots>,
}

impl Host {
    fn new() -> Self {
        let bed = Bed::new();
        let socket = bed.path("keeper.sock");
        let keeper = bed.start(&format!("keeper --socket {}", socket.display()));
        wait_for("keeper", || socket.exists());
        Self {
            bed,
            socket,
            _keeper: keeper,
        }
    }

    /// Must be called within a runtime.
    fn agent(&self) -> Agent {
        let store = Store::open(&self.bed.store(), &Default::default()).unwrap();
        let engine = Engine::new(Arc::clone(&store), Default::default());
        let node = Node::new(engine, Sources::new(Default::default()));
        let link = Arc::new(Link::connect(&self.socket).unwrap());
        let roots = ImageRoots::new(node.clone(), Default::default(), Some(link));
        Agent { store, node, roots }
    }
}

impl Drop for Host {
    /// Native roots that are left; the bed knows only what is of FUSE.
    fn drop(&mut self) {
        let list = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for at in list.lines().rev().filter_map(|line| line.split(' ').nth(4)) {
            if Path::new(at).starts_with(self.bed.store()) {
                let _ = Command::new("umount").args(["-l", at]).status();
            }
        }
    }
}

impl Agent {
    /// The root of an image, as a container gets it.
    async fn root(&self, reference: &str, chain: &Digest) -> String {
        let hints = hints(reference);
        assert!(self.roots.knows(chain, &hints).await.unwrap());
        let root = self.roots.root(chain, &hints).await.unwrap();
        root.dir.to_str().unwrap().to_owned()
    }

    /// Leaves what is mounted to the next one.
    async fn end(self) {
        self.roots.leave().await;
    }

    fn mark(&self, layer: &Digest) -> Option<u8> {
        self.store.index_mark(layer).unwrap()
    }
}

fn hints(reference: &str) -> Hints {
    Hints {
        image: reference.strip_prefix("oci://").map(ToOwned::to_owned),
        ..Hints::default()
    }
}

/// All files below `dir`: inode numbers, attributes and names.
fn list(dir: &str) -> String {
    let format = "%i %y %m %s %T@ %P %l\\n";
    let mut found = tool("find", &[dir, "-mindepth", "1", "-printf", format]);
    let mut lines: Vec<String> = Done::of(&mut found)
        .ok()
        .lines()
        .map(str::to_owned)
        .collect();
    lines.sort();
    lines.join("\n")
}

/// Removes what mounts of an earlier version do not have.
fn forget_kept(store: &Path) {
    for path in files_below(&store.join("roots")) {
        if path
            .extension()
            .is_some_and(|e| e == "index" || e == "image")
        {
            fs::remove_file(path).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_goes_on_where_another_repository_has_an_index_of_its_layers() {
    let image = Pushed::new();
    let other = image.imitated("other", &image.layers[0], &image.indexes[0]);
    let [lower, upper] = &image.indexes;
    let chain = Digest::of(format!("{} {}", lower.diff_id, upper.diff_id).as_bytes());
    let host = Host::new();
    let agent = host.agent();
    let dir = agent.root(&image.reference, &chain).await;
    let beside = agent.root(&other, &chain).await;
    assert!(beside != dir, "each its own until they are unpacked");
    assert_eq!(agent.mark(&lower.blob), Some(b'f'));
    let passwd = read(&dir, "etc/passwd");
    let before = list(&dir);
    let registry = image.registry;
    agent.end().await;

    // With the registry what an earlier version has mounted goes on, too.
    forget_kept(&host.bed.store());
    let agent = host.agent();
    assert!(agent.roots.adopt().await);
    assert_eq!(list(&dir), before);
    agent.end().await;

    drop(registry);
    let agent = host.agent();
    assert!(agent.roots.adopt().await, "all of it, by what is here");
    assert_eq!(list(&dir), before);
    assert_eq!(list(&beside), before);
    assert_eq!(read(&dir, "etc/passwd"), passwd);
    // So does the next container, and the next collection leaves them.
    agent.root(&image.reference, &chain).await;
    agent.root(&other, &chain).await;
    host.bed.ok("gc");
    agent.end().await;
    let agent = host.agent();
    assert!(agent.roots.adopt().await);
    assert_eq!(list(&dir), before);

    // What is kept goes with the images.
    agent.roots.release(&chain).await;
    agent.roots.forget(&chain).await;
    drop(agent);
    wait_for("collection", || {
        host.bed.ok("gc --target-bytes 0");
        files_below(&host.bed.store().join("roots")).is_empty()
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_that_turned_out_false_does_not_go_on_by_what_is_kept() {
    let image = Pushed::new();
    let other = image.imitated("other", &image.layers[0], &image.indexes[0]);
    image.forge(|index| super::forged::entry(index, "bin/tool").meta.mode = 0o6755);
    let [lower, upper] = &image.indexes;
    let chain = Digest::of(format!("{} {}", lower.diff_id, upper.diff_id).as_bytes());
    let host = Host::new();
    let agent = host.agent();
    let dir = agent.root(&image.reference, &chain).await;
    assert!(list(&dir).contains(" 6755 "));
    let warmed = other.parse::<Reference>().unwrap();
    let progress = Progress::default();
    let warming = agent.node.warm(&warmed, None, &progress);
    warming.await.unwrap();
    assert_eq!(agent.mark(&lower.blob), Some(b'o'));
    agent.end().await;
    drop(image.registry);
    let agent = host.agent();
    assert!(!agent.roots.adopt().await, "its index is known to be false");
    agent.end().await;
    let _ = Done::of(&mut tool("umount", &["-l", &dir]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_of_a_table_goes_on_where_unpacking_gave_another_index() {
    let images = Images::new();
    let (tabled, layer) = images.push("tabled", |_| {});
    // The same layer in an image that says nothing of its table, with an index beside it.
    let manifest = images.registry.get("tabled", "manifests/1");
    let mut manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let kind = manifest["layers"][0]["mediaType"].as_str().unwrap();
    let blob = images.registry.blob("plain", kind, &layer.blob);
    let config = &manifest["config"];
    let digest = config["digest"].as_str().unwrap();
    let bytes = images.registry.get("tabled", &format!("blobs/{digest}"));
    let kind = config["mediaType"].as_str().unwrap();
    let config = images.registry.blob("plain", kind, &bytes);
    manifest["layers"] = json!([blob]);
    manifest["config"] = config;
    images.registry.manifest("plain", "1", &manifest);
    let plain = images.registry.reference("plain", "1");
    Bed::new().ok(&format!("index push {plain}"));

    let host = Host::new();
    let agent = host.agent();
    let (blob, chain) = (layer.digest(), layer.diff_id);
    let found = plain.parse::<Reference>().unwrap();
    let found = agent.node.resolve_lazily(&found).await.unwrap().unwrap();
    assert_eq!(agent.mark(&blob), Some(b'f'));
    let dir = agent.root(&tabled, &chain).await;
    assert_eq!(agent.mark(&blob), Some(b't'));
    assert_eq!(read(&dir, "etc/motd"), Digest::of(b"good day\n").hex());
    let before = list(&dir);
    assert!(!before.contains(TABLE));
    // Who had its index before that unpacks the layer.
    let progress = Progress::default();
    let warming = agent.node.warm_known(&found, None, &progress);
    warming.await.unwrap();
    assert_ne!(agent.mark(&blob), Some(b't'));
    agent.end().await;
    drop(images.registry);

    let agent = host.agent();
    assert!(agent.roots.adopt().await, "all of it, by what is here");
    assert_eq!(list(&dir), before);
    images_shown(&images.dir, &dir);
    agent.roots.release(&chain).await;
    // All of it is here, of one image or the other.
    let root = agent.root(&tabled, &chain).await;
    assert!(root.ends_with("native"), "{root}");
    agent.roots.release(&chain).await;
    drop(agent);
    host.bed.ok("verify --all");
}

/// That `dir` shows all of the tree.
fn images_shown(tree: &TempDir, dir: &str) {
    let right = tree.path().to_str().unwrap();
    let done = Done::of(&mut tool("diff", &["-r", "-x", TABLE, dir, right]));
    assert_eq!(done.ok(), "");
}

/// A tag may be moved while a container runs on what it meant.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_goes_on_where_its_tag_was_moved() {
    let image = Pushed::new();
    let [lower, upper] = &image.indexes;
    let chain = Digest::of(format!("{} {}", lower.diff_id, upper.diff_id).as_bytes());
    let host = Host::new();
    let agent = host.agent();
    let dir = agent.root(&image.reference, &chain).await;
    let before = list(&dir);
    let passwd = read(&dir, "etc/passwd");
    // Of one layer less.
    let of_image = image.registry.get("app", "manifests/1");
    let mut manifest: Value = serde_json::from_slice(&of_image).unwrap();
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [upper.diff_id.to_string()]},
    });
    let kind = manifest["config"]["mediaType"].as_str().unwrap();
    let config = image
        .registry
        .blob("app", kind, config.to_string().as_bytes());
    manifest["config"] = config;
    manifest["layers"] = json!([manifest["layers"][1]]);
    image.registry.manifest("app", "1", &manifest);
    let moved = image.reference.parse::<Reference>().unwrap();
    let progress = Progress::default();
    let warming = agent.node.warm(&moved, None, &progress);
    warming.await.unwrap();
    agent.end().await;
    let agent = host.agent();
    assert!(agent.roots.adopt().await);
    assert_eq!(list(&dir), before);
    assert_eq!(read(&dir, "etc/passwd"), passwd);
    // What was not read yet comes, too.
    let large = fs::read(image.dir.path().join("a/large")).unwrap();
    assert_eq!(read(&dir, "a/large"), Digest::of(&large).hex());
    agent.roots.release(&chain).await;
}
