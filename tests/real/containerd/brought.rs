//! What is brought of an image behind those who read it, and after them.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use hearth::{
    daemon::ImageRoots,
    digest::Digest,
    fetch::{self, Engine},
    mount,
    node::Node,
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
