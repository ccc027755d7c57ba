//! Images that change in their registry, or that it does not answer for.

use hearth::{
    node::{Node, NodeError, Progress, WarmReport},
    store::{CollectOptions, StoreErrorKind},
};

use super::{removed::plain_image, *};
use crate::updates;

const MIB: usize = 1 << 20;

struct Bed {
    dir: TempDir,
    settings: Settings,
    server: Scripted,
}

impl Bed {
    async fn new(held: Held) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            settings: Settings::new(),
            server: Scripted::start(move |seen| held.answer(seen)).await,
        }
    }

    fn node(&self, max_bytes: usize) -> Node {
        let patience = Duration::from_secs(10);
        updates::node(self.dir.path(), max_bytes, patience, self.settings.config())
    }

    fn reference(&self, tag: &str) -> Reference {
        let address = self.server.address;
        let reference = format!("oci://{address}/team/app:{tag}?platform=linux/amd64");
        reference.parse().unwrap()
    }

    async fn warm(&self, node: &Node, tag: &str) -> Result<WarmReport, NodeError> {
        let progress = Progress::default();
        node.warm(&self.reference(tag), None, &progress).await
    }

    async fn is_refused(&self, node: &Node, tag: &str) {
        match self.warm(node, tag).await {
            Err(NodeError::Store(error)) => assert_eq!(error.kind(), StoreErrorKind::NoSpace),
            other => panic!("{other:?}"),
        }
        node.store().collect(&CollectOptions::default()).unwrap();
    }

    fn down(&self) {
        (self.server).now(|_| Reply::new("500 Internal Server Error", ""));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_whose_update_is_refused_stays() {
    let mut held = Held::default();
    plain_image(&mut held, "1", &data(3 * MIB));
    plain_image(&mut held, "2", &data(5 * MIB));
    let bed = Bed::new(held.clone()).await;
    let node = bed.node(100 * MIB);
    let first = bed.warm(&node, "1").await.unwrap().revision;
    let second = bed.warm(&node, "2").await.unwrap().revision;
    let name = bed.reference("1").to_string();
    node.store().pin(&name, "test").unwrap();
    // How the next one looks is known, but nothing of it is here.
    let (_, artifact) = (node.store().artifact(&bed.reference("2").to_string()))
        .unwrap()
        .unwrap();
    let hex = artifact.objects[0].id.sha256().unwrap().hex();
    let object = node.store().root().join("objects/sha256").join(&hex[..2]);
    fs::remove_file(object.join(hex)).unwrap();
    let moved = held.0["manifests/2"].clone();
    held.0.insert("manifests/1".into(), moved);
    bed.server.now(move |seen| held.answer(seen));
    // The layer, and what it unpacks to, beside what is pinned.
    bed.is_refused(&bed.node(12 * MIB), "1").await;
    assert!(node.store().unpin(&name, "test").unwrap());
    // And without that.
    let small = bed.node(9 * MIB);
    bed.is_refused(&small, "1").await;
    let (status, _) = small.status(&name).unwrap();
    assert_eq!((&status.revision, status.complete), (&first, true));
    // For room it goes.
    let node = bed.node(12 * MIB);
    assert_eq!(bed.warm(&node, "1").await.unwrap().revision, second);
    bed.down();
    assert_eq!(bed.warm(&node, "1").await.unwrap().revision, second);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_is_waited_for_where_what_is_recorded_will_not_do() {
    let mut held = Held::default();
    plain_image(&mut held, "1", &data(1000));
    let bed = Bed::new(held.clone()).await;
    let node = bed.node(100 * MIB);
    let first = bed.warm(&node, "1").await.unwrap().revision;
    for index in fs::read_dir(node.store().root().join("indexes")).unwrap() {
        fs::remove_file(index.unwrap().path()).unwrap();
    }
    let failures = AtomicUsize::new(2);
    bed.server.now(move |seen| {
        let left = failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        match left {
            Ok(_) => Reply::new("500 Internal Server Error", ""),
            Err(_) => held.answer(seen),
        }
    });
    assert_eq!(bed.warm(&node, "1").await.unwrap().revision, first);
}
