//! What is brought of an image behind those who read it, and after them.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use hearth::{
    daemon::ImageRoots,
    digest::Digest,
    fetch::{self, Engine},
    image::LayerIndex,
    mount,
    node::{Node, Progress},
    reference::Reference,
    snapshotter::{Hints, Roots as _},
    source::{self, Sources},
    store::Store,
};

use super::{
    image::{Image, run},
    kubelet::registry,
    served::{hearth, mounts},
};
use crate::servers::Server;

/// An image with an index beside it, in a registry of its own.
struct Indexed {
    _registry: Server,
    reference: String,
    chain: Digest,
    hints: Hints,
}

impl Indexed {
    fn new(dir: &Path, salt: &str) -> Self {
        let image = Image::make(&dir.join(salt), salt);
        let registry = registry(&image);
        let name = format!("127.0.0.1:{}/app:1", registry.port);
        let reference = format!("oci://{name}");
        run(&mut hearth(
            &dir.join("maker"),
            &format!("index push {reference}"),
        ));
        Self {
            _registry: registry,
            reference,
            chain: *image.chain_ids().last().unwrap(),
            hints: Hints {
                image: Some(name),
                ..Hints::default()
            },
        }
    }
}

async fn wait_for(what: &str, ready: impl Fn() -> bool) {
    let begun = Instant::now();
    while !ready() {
        assert!(begun.elapsed() < Duration::from_secs(100), "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_is_brought_to_its_end_though_nobody_has_it_mounted() {
    let dir = tempfile::tempdir().unwrap();
    let [removed, left, kept] =
        &["removed", "left", "kept"].map(|salt| Indexed::new(dir.path(), salt));
    let root = dir.path().join("store");
    let store = Store::open(&root, &Default::default()).unwrap();
    let engine = Engine::new(store.clone(), fetch::Config::default());
    let node = Node::new(engine, Sources::new(source::Config::default()));
    let roots = ImageRoots::new(node, mount::Config::default(), None);
    let is_complete = |image: &Indexed| {
        let name: hearth::reference::Reference = image.reference.parse().unwrap();
        let (_, artifact) = store.artifact(&name.to_string()).unwrap().unwrap();
        let mut objects = artifact.objects.iter();
        objects.all(|object| store.has(&object.id.sha256().unwrap()).unwrap())
    };
    let kinds = || -> Vec<String> {
        let found = mounts(&root.join("run"));
        found.into_iter().map(|(_, kind)| kind).collect()
    };
    let count = |kind: &str| kinds().iter().filter(|k| k.starts_with(kind)).count();
    let start = async |image: &Indexed| {
        assert!(roots.knows(&image.chain, &image.hints).await.unwrap());
        let root = roots.root(&image.chain, &image.hints).await.unwrap();
        assert_eq!(count("fuse"), 1);
        root.dir
    };
    // Let go before anything of it is fetched, since it was used just now.
    start(removed).await;
    roots.release(&removed.chain).await;
    roots.forget(&removed.chain).await;
    start(left).await;
    roots.release(&left.chain).await;
    let lazy = start(kept).await;
    wait_for("the image that is mounted", || is_complete(kept)).await;
    wait_for("the image that is not", || is_complete(left)).await;

    // The next container need not wait for its native root.
    wait_for("native roots", || count("erofs") == 2).await;
    let is_metadata = |path: &Path| path.extension().is_some_and(|e| e == "erofs");
    let metadata = || {
        let found = std::fs::read_dir(root.join("roots")).unwrap();
        (found.flatten())
            .filter(|entry| is_metadata(&entry.path()))
            .count()
    };
    wait_for("what native roots are made of", || metadata() == 2).await;
    let native = roots.root(&kept.chain, &kept.hints).await.unwrap().dir;
    assert!(native != lazy && native.ends_with("native"));
    // The other one was removed, with what was to come of it.
    assert!(!is_complete(removed));
    // Nor has one that comes soon after it; whatever containerd has removed is gone.
    roots.release(&kept.chain).await;
    assert_eq!(kinds(), ["erofs"; 2]);
    let again = roots.root(&kept.chain, &kept.hints).await.unwrap().dir;
    assert_eq!(again, native);
    roots.forget(&kept.chain).await;
    assert_eq!(count("erofs"), 2, "somebody has it");
    roots.release(&kept.chain).await;
    assert_eq!(count("erofs"), 1);
    roots.forget(&left.chain).await;
    assert_eq!(kinds(), [""; 0]);
    // Nor does one stay when this process ends.
    assert!(roots.knows(&kept.chain, &kept.hints).await.unwrap());
    roots.root(&kept.chain, &kept.hints).await.unwrap();
    roots.release(&kept.chain).await;
    assert_eq!(count("erofs"), 1);
    roots.leave().await;
    assert_eq!(kinds(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_brought_is_proved_while_the_store_says_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let image = Indexed::new(dir.path(), "proved");
    let store = Store::open(&dir.path().join("store"), &Default::default()).unwrap();
    let engine = Engine::new(store.clone(), fetch::Config::default());
    let node = Node::new(engine, Sources::new(source::Config::default()));
    let reference: Reference = image.reference.parse().unwrap();
    let resolved = node.resolve_lazily(&reference).await.unwrap().unwrap();
    let proved = async || node.brought(&resolved, &image.chain).await.unwrap();
    assert!(!resolved.is_verified() && proved().await.is_none());
    let _hold = node.hold(&resolved.artifact.reference).await.unwrap();
    let progress = Progress::default();
    node.fill(&resolved, &progress, |_| ()).await.unwrap();
    assert!(!resolved.is_verified());
    let shown = progress.snapshot().unwrap();
    assert_eq!(shown.done_files, shown.total_files);
    assert_eq!(shown.present_bytes, shown.total_bytes);
    assert!(node.is_complete(&resolved.artifact).unwrap());

    let now = node.image_up_to(&reference, &image.chain).await;
    let (found, now) = (proved().await.unwrap(), now.unwrap().unwrap());
    assert!(found.is_verified() && now.is_verified());
    assert_eq!(
        (&found.artifact, &now.artifact),
        (&resolved.artifact, &found.artifact)
    );
    let other = Digest::of(b"the chain id of other layers");
    assert!(node.brought(&resolved, &other).await.unwrap().is_none());

    // By who unpacked the layers, and by who found them unpacked.
    let proved = async || {
        let [one, other] = [&resolved, &now].map(|brought| node.brought(brought, &image.chain));
        let (one, other) = (one.await.unwrap(), other.await.unwrap());
        assert_eq!(one.is_some(), other.is_some());
        one.is_some()
    };
    let record = store.image(&reference.to_string()).unwrap().unwrap();
    for layer in &record.layers {
        let own = store.index(&layer.blob).unwrap().unwrap();
        let index = LayerIndex::decode(&own[1..]).unwrap();
        let mut another = index.clone();
        another.entries[0].meta.mode ^= 0o111;
        let put = |mark: &[u8], index: &LayerIndex| {
            let bytes = [mark, &index.encode().unwrap()].concat();
            store.put_index(&layer.blob, &bytes).unwrap();
        };
        // Checked, and of something else.
        for mark in [b"o", b"c"] {
            put(mark, &another);
            assert!(!proved().await);
        }
        // The same, and nobody has checked it.
        for mark in [&b"t"[..], &[&b"f"[..], &[0; 32]].concat()] {
            put(mark, &index);
            assert!(!proved().await);
        }
        // The same, by another way.
        put(b"c", &index);
        assert!(proved().await);
        store.remove_index(&layer.blob).unwrap();
        assert!(!proved().await);
        store.put_index(&layer.blob, &own).unwrap();
        assert!(proved().await);
    }
    store.forget_resolution(&reference.to_string()).unwrap();
    assert!(!proved().await);
}
