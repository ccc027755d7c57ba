//! The engine, the node and the snapshotter on a disk that fails at any call: readers get the right
//! bytes from the origin, nothing torn becomes visible, and all is well once the disk is.

use std::{path::Path, sync::Arc, time::Duration};

use hearth::{
    digest::{Digest, ObjectId},
    fetch::{Class, Config, Engine, FetchErrorKind},
    metrics,
    node::{Node, Progress},
    snapshotter::{Kind, NoRoots, Settings, SnapshotError, Snapshotter},
    source::{self, SourceErrorKind, Sources},
    store::{self, Store},
};

use crate::{
    scripted_source::{Fault, Scripted},
    store::failing::FailingDisk,
};

const MIB: usize = 1 << 20;

fn open(disk: &FailingDisk, dir: &Path) -> Arc<Store> {
    let config = store::Config {
        min_free: store::ByteSize(0),
        ..Default::default()
    };
    Store::open_on(Arc::new(disk.clone()), dir, &config).unwrap()
}

fn config() -> Config {
    Config {
        patience: Duration::from_secs(5),
        ..Config::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_get_the_bytes_whatever_the_disk_does() {
    for errno in [libc::ENOSPC, libc::EIO, libc::EROFS] {
        for (size, located) in [(5000, false), (2 * MIB + 77, false), (2 * MIB + 77, true)] {
            for calls in 0u64.. {
                let dir = tempfile::tempdir().unwrap();
                let disk = FailingDisk::new();
                let engine = Engine::new(open(&disk, dir.path()), config());
                let source = Arc::new(Scripted::new(size));
                let object = match located {
                    true => source.object_as(ObjectId::located("x", "1", size as u64)),
                    false => source.object(),
                };
                disk.fail_after(calls, errno);
                let case = format!("errno {errno}, {size} bytes, after {calls} calls");
                let opened = engine.open(&object, &source.source());
                let handle = opened.unwrap_or_else(|error| panic!("{case}: {error}"));
                for start in (0..size).step_by(700_000) {
                    let read = handle.read(start as u64, 300_000).await;
                    let read = read.unwrap_or_else(|error| panic!("{case}: {error}"));
                    let end = (start + 300_000).min(size);
                    assert!(read == source.data.slice(start..end), "{case}: wrong bytes");
                }
                let warmed = handle.ensure(Class::Warm).await;
                let failed = disk.has_failed();
                disk.heal();
                if let Err(error) = warmed {
                    let kinds = [FetchErrorKind::NoSpace, FetchErrorKind::Disk];
                    assert!(failed && kinds.contains(&error.kind()), "{case}: {error}");
                    // Without a restart.
                    let again = handle.ensure(Class::Warm).await;
                    again.unwrap_or_else(|error| panic!("{case}: then {error}"));
                }
                let complete = handle.complete().unwrap();
                let found = store::hash_file(complete.file(), |_| true).unwrap();
                assert_eq!(found, Some(Digest::of(&source.data)), "{case}");
                if !failed {
                    assert!(calls > 5, "{calls}");
                    break;
                }
            }
        }
    }
    assert!(metrics::global().fetch_streamed_bytes.get() > 0);
}

/// A sector of what an earlier process brought cannot be read any more: it is fetched anew, also where
/// much comes after it; and where that does not help, the disk is named and nobody waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_that_the_disk_does_not_give_back_is_fetched_again() {
    for (size, heals) in [(9 * MIB, true), (210 * MIB, true), (210 * MIB, false)] {
        let dir = tempfile::tempdir().unwrap();
        let disk = FailingDisk::new();
        let source = Arc::new(Scripted::new(size));
        let object = source.object();
        let store = open(&disk, dir.path());
        let partial = store.partial(source.part(), object.size).unwrap();
        let lease = partial.claim(5..6).unwrap().unwrap();
        let chunk = &source.data[5 * MIB..6 * MIB];
        lease.commit(5, chunk, store::WriteMode::Cached).unwrap();
        partial.checkpoint().unwrap();
        drop((lease, partial));
        let at = 5 * MIB as u64 + 8192;
        disk.bad_sectors(at..at + 4096, heals);
        let engine = Engine::new(store, config());
        let handle = engine.open(&object, &source.source()).unwrap();
        let warm = tokio::time::timeout(Duration::from_secs(120), handle.ensure(Class::Warm));
        let warmed = warm.await.expect("it hangs");
        match heals {
            true => assert_eq!(warmed.unwrap().digest, Digest::of(&source.data)),
            false => assert_eq!(warmed.unwrap_err().kind(), FetchErrorKind::Disk),
        }
    }
}

/// The disk is full as the file is opened: it is streamed, until there is space again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_streamed_is_kept_once_there_is_space() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FailingDisk::new();
    let engine = Engine::new(open(&disk, dir.path()), config());
    let source = Arc::new(Scripted::new(3 * MIB));
    disk.fail_after(0, libc::ENOSPC);
    let handle = engine.open(&source.object(), &source.source()).unwrap();
    let read = async |at: u64| {
        let read = handle.read(at, 1000).await.unwrap();
        assert!(read == source.data.slice(at as usize..at as usize + 1000));
    };
    read(100).await;
    read(100).await;
    assert_eq!(handle.present_bytes(), 0);
    disk.heal();
    let begun = std::time::Instant::now();
    while handle.present_bytes() == 0 {
        read(MIB as u64).await;
        assert!(begun.elapsed() < Duration::from_secs(120), "still streamed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Whoever wants it kept is told what the disk says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_kept_has_a_cause() {
    for (errno, kind, cause) in [
        (libc::EIO, FetchErrorKind::Disk, "Input/output error"),
        (libc::ENOSPC, FetchErrorKind::NoSpace, "No space left"),
    ] {
        for size in [1000, 3 * MIB] {
            let dir = tempfile::tempdir().unwrap();
            let disk = FailingDisk::new();
            let engine = Engine::new(open(&disk, dir.path()), config());
            let source = Arc::new(Scripted::new(size));
            disk.fail_after(0, errno);
            let handle = engine.open(&source.object(), &source.source()).unwrap();
            for _ in 0..2 {
                let error = handle.ensure(Class::Warm).await.unwrap_err();
                assert_eq!(error.kind(), kind, "{error}");
                assert!(error.to_string().contains(cause), "{error}");
                assert!(error.hint().is_some(), "{error}");
            }
        }
    }
}

/// Credentials that expire while an object is fetched, and are renewed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_in_the_middle_is_waited_out() {
    let refused = Some(Fault::Refuse(SourceErrorKind::Denied));
    let faults = [None, refused, refused, None, refused];
    let source = Arc::new(Scripted::new(9 * MIB).script(faults));
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::new(open(&FailingDisk::new(), dir.path()), config());
    let handle = engine.open(&source.object(), &source.source()).unwrap();
    for at in [0, 5 * MIB, 8 * MIB] {
        let read = handle.read(at as u64, 1000).await.unwrap();
        assert!(read == source.data.slice(at..at + 1000));
    }
    handle.ensure(Class::Warm).await.unwrap();
}

/// A warm that meets a failing disk says so, and the next one of the same process succeeds; what is
/// warm already is resolved on a disk that takes nothing at all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_warm_goes_on_once_the_disk_is_well() {
    let origin = tempfile::tempdir().unwrap();
    for (name, size) in [("a.bin", 2 * MIB + 77), ("b.json", 300), ("c.txt", 9000)] {
        std::fs::write(
            origin.path().join(name),
            crate::scripted_source::content(size),
        )
        .unwrap();
    }
    let reference = format!("file://{}", origin.path().display())
        .parse()
        .unwrap();
    for errno in [libc::ENOSPC, libc::EIO] {
        for calls in 0u64.. {
            let dir = tempfile::tempdir().unwrap();
            let disk = FailingDisk::new();
            let engine = Engine::new(open(&disk, dir.path()), config());
            let node = Node::new(engine, Sources::new(source::Config::default()));
            disk.fail_after(calls, errno);
            let warm = || async {
                node.warm(&reference, Some("test"), &Progress::default())
                    .await
            };
            let done = warm().await;
            let failed = disk.has_failed();
            disk.heal();
            let case = format!("errno {errno} after {calls} calls: {done:?}");
            assert!(failed || done.is_ok(), "{case}");
            warm()
                .await
                .unwrap_or_else(|error| panic!("{case}: then {error:?}"));
            let report = node
                .store()
                .verify(store::VerifyScope::All, false, |_| true)
                .unwrap();
            assert_eq!((report.damaged.len(), report.objects), (0, 3), "{case}");
            disk.fail_after(0, libc::ENOSPC);
            let resolved = node.resolve(&reference).await.unwrap();
            assert_eq!(resolved.artifact.tree.files().len(), 3);
            if !failed {
                assert!(calls > 30, "{calls}");
                break;
            }
        }
    }
}

/// Makes every change once.
async fn live(snapshotter: &Arc<Snapshotter>) -> Result<(), SnapshotError> {
    let none = std::collections::BTreeMap::new;
    snapshotter
        .create(Kind::Active, "a", "", none(), None)
        .await?;
    snapshotter.commit("c", "a", none()).await?;
    snapshotter
        .create(Kind::Active, "b", "c", none(), None)
        .await?;
    snapshotter.remove("b").await?;
    snapshotter.cleanup().await?;
    Ok(())
}

#[tokio::test]
async fn the_snapshotter_bears_a_disk_that_fails_at_any_call() {
    for errno in [libc::ENOSPC, libc::EIO] {
        for calls in 0u64.. {
            let dir = tempfile::tempdir().unwrap();
            let disk = FailingDisk::new();
            let settings = || Settings {
                root: dir.path().join("snapshots"),
                sync: false,
            };
            let snapshotter =
                Snapshotter::open_on(Arc::new(disk.clone()), settings(), Arc::new(NoRoots))
                    .unwrap();
            disk.fail_after(calls, errno);
            let done = live(&snapshotter).await;
            let failed = disk.has_failed();
            disk.heal();
            let case = format!("errno {errno} after {calls} calls: {done:?}");
            assert!(failed || done.is_ok(), "{case}");
            // It works on, and so does the next one: whatever is listed has its files.
            snapshotter
                .cleanup()
                .await
                .unwrap_or_else(|e| panic!("{case}: then {e}"));
            for name in ["a", "b", "c"] {
                let _ = snapshotter.usage(name).await;
            }
            let made = snapshotter.create(Kind::Active, "new", "", Default::default(), None);
            made.await.unwrap_or_else(|e| panic!("{case}: then {e}"));
            drop(snapshotter);
            let after = crate::bad_bytes::reopen(&settings).await;
            after.cleanup().await.unwrap();
            for name in ["a", "b", "c", "new"] {
                match after.usage(name).await {
                    Ok(usage) => assert!(usage.inodes > 0, "{case}: {name} lost its files"),
                    Err(_) => assert_ne!(name, "new", "{case}"),
                }
            }
            if !failed {
                assert!(calls > 20, "{calls}");
                break;
            }
        }
    }
}

/// A small object that the disk has no room for is verified all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_object_is_verified_past_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FailingDisk::new();
    let engine = Engine::new(open(&disk, dir.path()), config());
    let source = Arc::new(Scripted::new(9000).script([Some(Fault::Flip)]));
    let handle = engine.open(&source.object(), &source.source()).unwrap();
    disk.fail_after(0, libc::EIO);
    let read = handle.read(0, 100).await.unwrap();
    assert!(read == source.data.slice(0..100), "wrong bytes were served");
    let wrong = Arc::new(Scripted::new(9001));
    wrong.serve_wrong_bytes(true);
    let handle = engine.open(&wrong.object(), &wrong.source());
    let error = handle.unwrap().read(0, 100).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Corrupt);
}
