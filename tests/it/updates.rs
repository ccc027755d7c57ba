//! A model that is warm, and changes at its origin: until the new one is here, the old one is.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use hearth::{
    fetch::{self, Class, Engine},
    node::{Node, NodeError, Progress},
    reference::Reference,
    source::{self, Sources},
    store::{self, CollectOptions, Store, StoreErrorKind},
};

use crate::{
    scripted::{Reply, Scripted},
    scripted_source::content,
};

const MIB: usize = 1 << 20;

/// What the origin has, and up to which byte it gives that; nothing at all where there is no such byte.
struct Origin {
    etag: &'static str,
    data: Vec<u8>,
    gives: usize,
}

/// A node over the store in `dir`, as another process sees that.
pub(crate) fn node(
    dir: &Path,
    max_bytes: usize,
    patience: Duration,
    sources: source::Config,
) -> Node {
    let config = store::Config {
        min_free: store::ByteSize(0),
        max_bytes: Some(store::ByteSize(max_bytes as u64)),
        ..Default::default()
    };
    let store = Store::open(&dir.join("store"), &config).unwrap();
    let config = fetch::Config {
        patience,
        ..Default::default()
    };
    Node::new(Engine::new(store, config), Sources::new(sources))
}

struct Bed {
    dir: tempfile::TempDir,
    origin: Arc<Mutex<Origin>>,
    reference: Reference,
    server: Scripted,
}

impl Bed {
    async fn new(size: usize) -> Self {
        let origin = Arc::new(Mutex::new(Origin {
            etag: "\"1\"",
            data: content(size).to_vec(),
            gives: usize::MAX,
        }));
        let asked = Arc::clone(&origin);
        let server = Scripted::start(move |seen| {
            let origin = asked.lock().unwrap();
            let end = seen
                .range()
                .map_or(0, |(_, end)| end.min(origin.data.len()));
            match origin.gives > 0 && end <= origin.gives {
                true => Reply::good(seen, &origin.data, origin.etag),
                false => Reply::new("503 Service Unavailable", ""),
            }
        });
        let server = server.await;
        Self {
            dir: tempfile::tempdir().unwrap(),
            origin,
            reference: server.url("/model.bin").parse().unwrap(),
            server,
        }
    }

    fn update(&self, size: usize, gives: usize) {
        let mut data = content(size).to_vec();
        data.reverse();
        *self.origin.lock().unwrap() = Origin {
            etag: "\"2\"",
            data,
            gives,
        };
    }

    fn gives(&self, gives: usize) {
        self.origin.lock().unwrap().gives = gives;
    }

    fn node(&self, max_bytes: usize) -> Node {
        let patience = Duration::from_millis(500);
        node(
            self.dir.path(),
            max_bytes,
            patience,
            source::Config::default(),
        )
    }

    async fn warm(&self, node: &Node) -> Result<String, NodeError> {
        let progress = Progress::default();
        let report = node.warm(&self.reference, None, &progress).await?;
        Ok(report.revision)
    }

    /// What a mount has while the origin cannot be reached; read without asking for anything.
    async fn offline(&self, node: &Node) -> String {
        let (resolved, hold) = node.resolve_held(&self.reference).await.unwrap();
        assert!(!resolved.fresh);
        // Whatever else needs the room meanwhile.
        let everything = CollectOptions {
            target_bytes: Some(0),
            dry_run: false,
        };
        node.store().collect(&everything).unwrap();
        drop(hold);
        let object = &resolved.artifact.objects[0];
        let handle = node.engine().open(object, &resolved.source).unwrap();
        handle.ensure(Class::Warm).await.unwrap();
        resolved.artifact.revision.clone()
    }
}

fn tidy(node: &Node) {
    node.store().collect(&CollectOptions::default()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_that_is_refused_costs_nothing() {
    let bed = Bed::new(3 * MIB).await;
    let node = bed.node(7 * MIB);
    let first = bed.warm(&node).await.unwrap();
    let name = bed.reference.to_string();
    node.store().pin(&name, "test").unwrap();
    bed.update(5 * MIB, usize::MAX);
    match bed.warm(&node).await {
        Err(NodeError::Store(error)) => assert_eq!(error.kind(), StoreErrorKind::NoSpace),
        other => panic!("{other:?}"),
    }
    tidy(&node);
    let (status, _) = node.status(&name).unwrap();
    assert_eq!((&status.revision, status.complete), (&first, true));
    // With room for both.
    let node = bed.node(9 * MIB);
    let second = bed.warm(&node).await.unwrap();
    assert_ne!(first, second);
    tidy(&node);
    assert!(node.store().usage().unwrap().bytes() < 6 << 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_that_breaks_off_leaves_the_last_one_in_use() {
    let bed = Bed::new(3 * MIB).await;
    let node = bed.node(100 * MIB);
    let first = bed.warm(&node).await.unwrap();
    bed.update(9 * MIB, 4 * MIB);
    bed.warm(&node).await.unwrap_err();
    drop(node);
    let node = bed.node(100 * MIB);
    tidy(&node);
    // It is not pinned, and goes with its reference, but not while it is in use.
    bed.gives(0);
    assert_eq!(bed.warm(&node).await.unwrap(), first);
    assert_eq!(bed.offline(&node).await, first);
    bed.gives(usize::MAX);
    assert_ne!(bed.warm(&node).await.unwrap(), first);
}

/// Mounted and unmounted, with nothing read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_that_is_only_looked_at_leaves_the_last_one_in_use() {
    let bed = Bed::new(3 * MIB).await;
    let node = bed.node(100 * MIB);
    let first = bed.warm(&node).await.unwrap();
    bed.update(9 * MIB, usize::MAX);
    let (resolved, hold) = node.resolve_held(&bed.reference).await.unwrap();
    assert_ne!(resolved.artifact.revision, first);
    drop((resolved, hold));
    tidy(&node);
    bed.gives(0);
    assert_eq!(bed.offline(&node).await, first);
}

/// A portal that sends everybody round in circles, say.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_that_answers_nonsense_is_as_good_as_none() {
    let bed = Bed::new(MIB).await;
    let node = bed.node(100 * MIB);
    let first = bed.warm(&node).await.unwrap();
    bed.server.now(|seen| {
        let location = format!("302 Found\nlocation: {}", seen.target);
        Reply::new(&location, "")
    });
    assert_eq!(bed.warm(&node).await.unwrap(), first);
    assert_eq!(bed.offline(&node).await, first);
}
