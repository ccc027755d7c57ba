//! Files that are parts of a larger object: engine, view, store and node.

use std::{sync::Arc, time::Duration};

use hearth::{
    digest::ObjectId,
    fetch::{Class, Config, Engine, FetchErrorKind},
    fs::{Body, Contents as _, Fetched, FsError, View},
    node::Node,
    source::{self, Sources},
    store::{self, CollectOptions, Store, VerifyScope},
    tree::{Artifact, Meta, Object, Recipe, TreeBuilder},
};

use crate::scripted_source::Scripted;

const MIB: u64 = 1 << 20;

struct Bed {
    source: Arc<Scripted>,
    artifact: Arc<Artifact>,
    engine: Engine,
    store: Arc<Store>,
    _home: tempfile::TempDir,
}

/// Slices of the content of `source`: path, offset, size.
fn bed(source: Scripted, files: &[(&str, u64, u64)]) -> Bed {
    let source = Arc::new(source.at("oci://127.0.0.1:1/m"));
    let mut tree = TreeBuilder::new(Meta::dir(0));
    let mut objects = Vec::new();
    for (path, offset, size) in files {
        tree.add_file(path.as_bytes(), objects.len() as u32, Meta::file(0))
            .unwrap();
        objects.push(Object {
            id: ObjectId::located("slice", path, *size),
            size: *size,
            git_sha1: None,
            recipe: Recipe::Slice {
                object: files.len() as u32,
                offset: *offset,
            },
        });
    }
    objects.push(source.object());
    let artifact = Arc::new(Artifact {
        reference: "oci://127.0.0.1:1/m:1".into(),
        revision: "1".into(),
        tree: tree.build(),
        objects,
    });
    let home = tempfile::tempdir().unwrap();
    let config = store::Config {
        min_free: store::ByteSize(0),
        ..Default::default()
    };
    let store = Store::open(home.path(), &config).unwrap();
    let config = Config {
        patience: Duration::from_secs(5),
        stall_timeout: Duration::from_millis(400),
        ..Config::default()
    };
    Bed {
        engine: Engine::new(store.clone(), config),
        store,
        source,
        artifact,
        _home: home,
    }
}

impl Bed {
    fn contents(&self) -> Fetched {
        let source = self.source.source();
        Fetched::new(self.engine.clone(), source, self.artifact.clone())
    }

    fn body(&self, object: u32) -> Arc<dyn Body> {
        self.contents().open(object).unwrap()
    }

    fn asked(&self) -> u64 {
        self.source.requests().iter().map(|r| r.end - r.start).sum()
    }

    /// Waits until `bytes` of the container are in the store.
    async fn wait_present(&self, bytes: u64) {
        let container = self.source.object();
        let handle = self.engine.open(&container, &self.source.source()).unwrap();
        while handle.present_bytes() < bytes {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn whole(&self) {
        let container = self.artifact.objects.last().unwrap();
        let handle = self.engine.open(container, &self.source.source()).unwrap();
        handle.ensure(Class::Warm).await.unwrap();
    }

    async fn check(&self, object: u32) {
        let body = self.body(object);
        let (_, offset) = self.artifact.place(object).unwrap();
        let end = offset + body.size();
        let mut at = offset;
        while at < end {
            let read = body.clone().read(at - offset, 300_000).await.unwrap();
            let right = at as usize..at as usize + read.len();
            assert!(!read.is_empty() && read == self.source.data.slice(right));
            at += read.len() as u64;
        }
        assert!(body.read(end - offset, 10).await.unwrap().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_brings_what_it_needs_and_the_whole_serves_it() {
    let files = [
        ("a", 10 * MIB + 512, 100_000),
        ("b", 30 * MIB, 2 * MIB),
        ("c", 39 * MIB, 0),
    ];
    let bed = bed(Scripted::new(40 << 20), &files);
    let body = bed.body(0);
    let mut data = vec![0; 1000];
    assert_eq!(body.try_read(0, &mut data), Ok(false));
    body.clone().whole().await.unwrap();
    assert!(bed.asked() <= 4 * MIB, "{}", bed.asked());
    assert!(!body.is_verified());
    assert_eq!(body.try_read(99_000, &mut data), Ok(true));
    let end = (10 * MIB) as usize + 512 + 100_000;
    assert!(data == bed.source.data[end - 1000..end]);
    let beyond = body.try_read(99_001, &mut data);
    assert!(matches!(beyond, Err(FsError::Damaged(_))), "{beyond:?}");
    for object in 0..3 {
        bed.check(object).await;
    }
    bed.whole().await;
    let asked = bed.asked();
    assert!(body.is_verified() && body.complete().is_none());
    for object in 0..3 {
        bed.check(object).await;
    }
    assert_eq!(bed.asked(), asked, "all is here");
    // A slice is no object of its own.
    let error = bed
        .engine
        .open(&bed.artifact.objects[0], &bed.source.source());
    assert_eq!(error.unwrap_err().kind(), FetchErrorKind::Corrupt);
    assert!(bed.contents().open(4).is_err());
    let view = View::new(bed.artifact.clone(), Arc::new(bed.contents())).unwrap();
    assert_eq!(view.statfs().blocks, (40 << 20) / 4096, "stored once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn safetensors_files_are_read_ahead_by_their_tensors() {
    // A file that is an object, whatever its name, and one inside a tar.
    for (object, start) in [(1, 0), (0, 7 * MIB + 512)] {
        read_ahead_by_tensors(object, start as usize).await;
    }
}

async fn read_ahead_by_tensors(object: u32, start: usize) {
    let size = 20 * MIB;
    let header = format!(
        r#"{{"a":{{"dtype":"U8","shape":[1],"data_offsets":[0,{0}]}},"b":{{"dtype":"U8","shape":[1],"data_offsets":[{0},{1}]}}}}"#,
        4 * MIB,
        12 * MIB
    );
    let mut source = Scripted::new(64 << 20);
    let mut data = source.data.to_vec();
    data[start..start + 8].copy_from_slice(&(header.len() as u64).to_le_bytes());
    data[start + 8..start + 8 + header.len()].copy_from_slice(header.as_bytes());
    source.data = data.into();
    let bed = bed(source, &[("model.safetensors", start as u64, size)]);
    let body = bed.body(object);
    body.clone().read(0, 4096).await.unwrap();
    bed.wait_present(MIB).await;
    // The start of a tensor, and no more: the rest of it is read ahead.
    let tensor = 8 + header.len() as u64 + 4 * MIB;
    body.clone().read(tensor, 64 << 10).await.unwrap();
    let end = start as u64 + tensor + 8 * MIB;
    let ahead = || bed.source.requests().iter().any(|r| r.end >= end);
    for _ in 0..6000 {
        if ahead() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(ahead(), "{:?}", bed.source.requests());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_wrong_content_say_so() {
    let bed = bed(Scripted::new(4 << 20), &[("a", 512, 100_000)]);
    bed.source.serve_wrong_bytes(true);
    let body = bed.body(0);
    let wrong = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let seen = wrong.clone();
    body.on_wrong(Box::new(move || {
        seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }));
    body.clone().read(0, 1000).await.unwrap();
    let handle = bed.engine.open(&bed.source.object(), &bed.source.source());
    let error = handle.unwrap().ensure(Class::Demand).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Corrupt);
    assert!(wrong.load(std::sync::atomic::Ordering::Relaxed) > 0);
    assert!(body.clone().read(0, 1000).await.is_err());
    assert!(!body.is_verified());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_keeps_and_counts_the_whole() {
    let files = [
        ("x/a", 512, 3 * MIB),
        ("x/b", 4 * MIB, 0),
        ("c", 5 * MIB, 2 * MIB),
    ];
    let bed = bed(Scripted::new(8 << 20), &files);
    let artifact = &bed.artifact;
    assert_eq!(artifact.size(), 8 * MIB);
    bed.store.record(artifact).unwrap();
    let reservation = bed.store.admit(artifact).unwrap();
    let node = Node::new(bed.engine.clone(), Sources::new(source::Config::default()));
    bed.body(0).read(0, 1000).await.unwrap();
    bed.wait_present(MIB).await;
    let (status, files) = node.status(&artifact.reference).unwrap();
    assert_eq!(
        (status.files, status.bytes, status.complete),
        (3, 8 * MIB, false)
    );
    let found = files.iter().find(|f| f.path == "x/a").unwrap();
    assert!(
        found.present_bytes >= MIB - 512 && !found.complete,
        "{found:?}"
    );
    assert!(found.present_bytes <= found.bytes);
    bed.whole().await;
    drop(reservation);
    let (status, files) = node.status(&artifact.reference).unwrap();
    assert_eq!((status.present_bytes, status.complete), (8 * MIB, true));
    let container = bed.source.object().id;
    for (file, (path, offset, size)) in files.iter().zip([
        ("c", 5 * MIB, 2 * MIB),
        ("x/a", 512, 3 * MIB),
        ("x/b", 4 * MIB, 0),
    ]) {
        assert_eq!((&*file.path, file.bytes), (path, size));
        assert_eq!(file.object, format!("{container}@{offset}"));
        assert!(file.complete && file.present_bytes == size);
    }
    assert_eq!(bed.store.usage().unwrap().objects, 1);
    let options = CollectOptions::default();
    assert_eq!(bed.store.collect(&options).unwrap().objects, 0);
    let scope = [artifact.reference.clone()];
    let report = bed
        .store
        .verify(VerifyScope::References(&scope), false, |_| true)
        .unwrap();
    assert_eq!((report.objects, report.missing.len()), (1, 0));
    assert!(bed.store.remove(&artifact.reference).unwrap());
    assert_eq!(bed.store.collect(&options).unwrap().objects, 1);
}
