//! Artifacts: records, holds, pins, space, collection, verification.

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use super::*;
use hearth::{
    disk::{Disk as _, RealDisk},
    store::{CollectOptions, StoreErrorKind, VerifyScope},
};

/// Records an artifact and stores its contents.
pub(super) fn warm(
    store: &Arc<Store>,
    reference: &str,
    contents: &[&[u8]],
    located: bool,
) -> Artifact {
    let artifact = artifact(reference, contents, located);
    store.record(&artifact).unwrap();
    let objects = artifact.objects.iter().zip(contents);
    let batch: Vec<_> = objects
        .map(|(object, bytes)| (object.id, bytes.to_vec().into()))
        .collect();
    store.put(&batch).unwrap();
    artifact
}

/// Makes a reference look as if it was used `seconds` ago.
fn age(store: &Store, reference: &str, seconds: u64) {
    let file = fs::File::open(record_path(store, reference)).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(seconds))
        .unwrap();
}

fn record_path(store: &Store, reference: &str) -> PathBuf {
    let name = Digest::of(reference.as_bytes()).hex();
    store.root().join(format!("artifacts/{name}.json"))
}

fn object_path(store: &Store, bytes: &[u8]) -> PathBuf {
    let hex = Digest::of(bytes).hex();
    store
        .root()
        .join("objects/sha256")
        .join(&hex[..2])
        .join(hex)
}

pub(super) fn is_complete(store: &Store, object: &Object) -> bool {
    store.complete(&object.id).unwrap().is_some()
}

pub(super) fn collect_to(store: &Store, target: u64) -> hearth::store::CollectReport {
    let options = CollectOptions {
        target_bytes: Some(target),
        dry_run: false,
    };
    store.collect(&options).unwrap()
}

#[test]
fn artifacts_are_recorded_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let reference = "hf://org/name@main?include=*.safetensors";
    assert!(store.artifact(reference).unwrap().is_none());
    assert_eq!(
        store.hold(reference).unwrap_err().kind(),
        StoreErrorKind::NotFound
    );
    let (a, b) = (content(1, 10), content(2, 20));
    let artifact = artifact(reference, &[&a, &b], false);
    let digest = store.record(&artifact).unwrap();
    assert_eq!(store.record(&artifact).unwrap(), digest);
    let (record, found) = store.artifact(reference).unwrap().unwrap();
    assert_eq!(found, artifact);
    assert_eq!(
        (record.digest, record.objects, record.bytes),
        (digest, 2, 30)
    );
    store.pin(reference, "pod/../x y").unwrap();
    store.pin(reference, "a").unwrap();
    let records = store.records().unwrap();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].pins, ["a", "pod/../x y"]);
    let error = store.remove(reference).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::InUse);
    assert!(error.to_string().contains("pod/../x y"), "{error}");
    assert!(store.unpin(reference, "a").unwrap());
    assert!(!store.unpin(reference, "a").unwrap());
    assert!(store.unpin(reference, "pod/../x y").unwrap());
    age(&store, reference, 1000);
    let hold = open(dir.path()).hold(reference).unwrap();
    assert!(store.records().unwrap()[0].used.elapsed().unwrap() < Duration::from_secs(500));
    let error = store.remove(reference).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::InUse);
    drop(hold);
    assert!(store.remove(reference).unwrap());
    assert!(!store.remove(reference).unwrap());
    for bad in ["", &"x".repeat(300)] {
        let error = store.pin(reference, bad).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Invalid);
    }
}

#[test]
fn damaged_records_and_trees_count_as_absent() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let bytes = content(3, 100);
    let artifact = warm(&store, "s3://b/p/", &[&bytes], false);
    let tree = store.root().join("trees").join(artifact.digest().hex());
    for path in [tree, record_path(&store, "s3://b/p/")] {
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(&path, &bad).unwrap();
            // Some bits of a zstd frame mean nothing; then the content is right all the same.
            if let Some((_, found)) = store.artifact("s3://b/p/").unwrap() {
                assert_eq!(found, artifact, "{} byte {at}", path.display());
            }
            fs::write(&path, &good[..at]).unwrap();
            assert!(store.artifact("s3://b/p/").unwrap().is_none());
        }
        let report = store.verify(VerifyScope::All, true, |_| true).unwrap();
        assert_eq!(report.damaged.len(), 1);
        // The tree says what the record was.
        let is_record = path == record_path(&store, "s3://b/p/");
        assert_eq!(store.artifact("s3://b/p/").unwrap().is_some(), is_record);
        store.record(&artifact).unwrap();
        assert!(store.artifact("s3://b/p/").unwrap().is_some());
    }
}

/// One bad block, and nobody knows any more what a pinned artifact consists of.
#[test]
fn a_collection_keeps_what_a_damaged_record_may_lead_to() {
    let (mine, other) = (content(1, 9000), content(2, 5000));
    for located in [false, true] {
        for victim in 0..if located { 3 } else { 2 } {
            let dir = tempfile::tempdir().unwrap();
            let store = open(dir.path());
            let artifact = warm(&store, "hf://a/pinned@main", &[&mine], located);
            store.pin("hf://a/pinned@main", "pod/a").unwrap();
            let gone = warm(&store, "hf://a/gone@main", &[&other], false);
            store.remove("hf://a/gone@main").unwrap();
            let path = match victim {
                0 => store.root().join("trees").join(artifact.digest().hex()),
                1 => record_path(&store, "hf://a/pinned@main"),
                _ => {
                    let hex = artifact.objects[0].id.to_string().replace("located:", "");
                    store.root().join("located").join(&hex[..2]).join(hex)
                }
            };
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
            let case = path.display();
            for target in [None, Some(0)] {
                let options = CollectOptions {
                    target_bytes: target,
                    dry_run: false,
                };
                let report = store.collect(&options).unwrap();
                assert_eq!(report.objects, 0, "{case}");
                assert!(object_path(&store, &mine).exists(), "{case}");
            }
            // Nor between the repair and the fetch that follows it.
            store.verify(VerifyScope::All, true, |_| true).unwrap();
            if victim < 2 {
                store.collect(&CollectOptions::default()).unwrap();
                assert!(object_path(&store, &mine).exists(), "{case}");
                assert_eq!(
                    store.artifact("hf://a/pinned@main").unwrap().is_some(),
                    victim == 1,
                    "{case}"
                );
            }
            store.record(&artifact).unwrap();
            let batch = [(artifact.objects[0].id, mine.clone().into())];
            store.put(&batch).unwrap();
            collect_to(&store, u64::MAX);
            assert!(is_complete(&store, &artifact.objects[0]), "{case}");
            assert!(!is_complete(&store, &gone.objects[0]), "{case}");
        }
    }
}

/// What is not pinned and cannot be opened goes first, and does not keep the disk full.
#[test]
fn what_cannot_be_read_is_evicted_where_space_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (bad, good) = (content(1, 9000), content(2, 9000));
    let artifact = warm(&store, "hf://a/bad@main", &[&bad], false);
    warm(&store, "hf://a/good@main", &[&good], false);
    age(&store, "hf://a/good@main", 1000);
    fs::write(
        store.root().join("trees").join(artifact.digest().hex()),
        b"?",
    )
    .unwrap();
    let used = store.usage().unwrap().bytes();
    let report = collect_to(&store, used - 1);
    assert_eq!(report.evicted, ["hf://a/bad@main"]);
    assert!(!object_path(&store, &bad).exists());
    assert!(object_path(&store, &good).exists());
}

#[test]
fn a_collection_removes_what_nothing_leads_to() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (shared, a, b) = (content(1, 9000), content(2, 9000), content(3, 9000));
    let one = warm(&store, "one", &[&shared, &a], true);
    let two = warm(&store, "two", &[&shared, &b], false);
    let id = ObjectId::located("orphan", "1", 2 * CHUNK_SIZE);
    let partial = store.partial(&id, 2 * CHUNK_SIZE).unwrap();
    fill(&partial, &content(9, 2 * MIB), WriteMode::Cached);
    assert_eq!(
        store.collect(&CollectOptions::default()).unwrap().objects,
        0
    );
    assert!(store.remove("one").unwrap());
    let held = store.complete(&one.objects[1].id).unwrap().unwrap();
    // What is open stays: an object by its flock, a partial by its span.
    let report = open(dir.path())
        .collect(&CollectOptions::default())
        .unwrap();
    assert_eq!((report.objects, report.partials), (0, 0));
    drop((held, partial));
    let dry = CollectOptions {
        dry_run: true,
        ..CollectOptions::default()
    };
    let foreseen = store.collect(&dry).unwrap();
    let report = store.collect(&CollectOptions::default()).unwrap();
    assert_eq!((report.objects, report.partials), (1, 1));
    assert_eq!((foreseen.objects, foreseen.bytes), (1, report.bytes));
    assert!(report.bytes >= 9000 + 2 * CHUNK_SIZE);
    assert!(!is_complete(&store, &one.objects[1]));
    assert!(two.objects.iter().all(|object| is_complete(&store, object)));
    assert!(
        is_complete(&store, &one.objects[0]),
        "still known by its other name"
    );
    assert_eq!(fs::read_dir(store.root().join("trees")).unwrap().count(), 1);
}

#[test]
fn the_least_recently_used_goes_first_but_never_what_is_pinned_or_held() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let contents: Vec<_> = (0..5).map(|seed| content(seed, 50_000)).collect();
    let names = ["pinned", "held", "old", "older", "new"];
    let artifacts: Vec<_> = names
        .iter()
        .zip(&contents)
        .map(|(name, bytes)| warm(&store, name, &[bytes], false))
        .collect();
    for (name, seconds) in [("pinned", 900), ("held", 800), ("old", 500), ("older", 600)] {
        age(&store, name, seconds);
    }
    store.pin("pinned", "test").unwrap();
    let hold = open(dir.path()).hold("held").unwrap();
    age(&store, "held", 800);
    let used = store.usage().unwrap().bytes();
    let report = collect_to(&store, used - 60_000);
    assert_eq!(report.evicted, ["older", "old"]);
    let report = collect_to(&store, 0);
    assert_eq!(report.evicted, ["new"]);
    assert!(is_complete(&store, &artifacts[0].objects[0]));
    // Recorded anew, the generation that is held stays.
    warm(&store, "held", &[&content(77, 10)], false);
    collect_to(&store, 0);
    assert!(is_complete(&store, &artifacts[1].objects[0]));
    drop(hold);
    store.unpin("pinned", "test").unwrap();
    let report = collect_to(&store, 0);
    assert_eq!(report.evicted.len(), 2);
    assert_eq!(store.usage().unwrap().objects, 0);
}

#[test]
fn what_cannot_fit_is_refused_with_the_arithmetic() {
    let dir = tempfile::tempdir().unwrap();
    let limited = Config {
        max_bytes: Some(ByteSize(5 << 20)),
        ..config()
    };
    let store = Store::open(&dir.path().join("store"), &limited).unwrap();
    let one = content(1, 2 * MIB);
    warm(&store, "one", &[&one], false);
    let big = artifact("big", &[&content(2, 4 * MIB), &one], false);
    store.record(&big).unwrap();
    store.pin("one", "test").unwrap();
    let error = store.admit(&big).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::NoSpace);
    for part in [
        "big does not fit: needs 4.0 MiB",
        "could evict 0 B",
        "pinned: one",
        "max_bytes 5.0 MiB",
    ] {
        assert!(error.to_string().contains(part), "{error}");
    }
    // `one` goes as an artifact, but its object belongs to `big` too.
    store.unpin("one", "test").unwrap();
    assert!(store.admit(&big).is_err());
    assert!(store.artifact("one").unwrap().is_some(), "evicted in vain");
    let big = artifact("big", &[&content(2, 4 * MIB)], false);
    store.record(&big).unwrap();
    let reservation = store.admit(&big).unwrap();
    assert!(store.artifact("one").unwrap().is_none());
    // What is promised is promised; what has arrived does not count twice.
    let small = artifact("small", &[&content(3, MIB)], false);
    store.record(&small).unwrap();
    let error = store.admit(&small).unwrap_err();
    assert!(error.to_string().contains("4.0 MiB promised"), "{error}");
    let bytes = content(2, 4 * MIB);
    let partial = store
        .partial(&big.objects[0].id, bytes.len() as u64)
        .unwrap();
    fill(&partial, &bytes, WriteMode::Cached);
    assert!(store.admit(&small).is_err());
    drop((reservation, partial));
    store.remove("big").unwrap();
    let _small = store.admit(&small).unwrap();
    // On the free space of the file system.
    let full = Config {
        min_free: ByteSize(u64::MAX / 2),
        ..config()
    };
    let store = Store::open(&dir.path().join("store"), &full).unwrap();
    assert_eq!(
        store.admit(&small).unwrap_err().kind(),
        StoreErrorKind::NoSpace
    );
}

#[test]
fn a_flipped_bit_is_found_and_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (a, b) = (content(1, 3 * MIB), content(2, 100));
    let artifact = warm(&store, "ref", &[&a, &b], true);
    let total = (a.len() + b.len()) as u64;
    let clean = store.verify(VerifyScope::All, false, |p| p.total == total);
    let clean = clean.unwrap();
    assert_eq!(
        (clean.objects, clean.bytes, clean.damaged.len()),
        (2, total, 0)
    );
    let path = object_path(&store, &a);
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[!a[MIB]], MIB as u64).unwrap();
    for (repair, references) in [(false, ["ref".to_owned()]), (true, ["ref".to_owned()])] {
        let scope = VerifyScope::References(&references);
        let report = store.verify(scope, repair, |_| true).unwrap();
        assert_eq!(report.damaged.len(), 1);
        let damage = &report.damaged[0];
        assert_eq!((&damage.path, damage.removed), (&path, repair));
        assert_eq!(damage.references, references);
    }
    assert!(!is_complete(&store, &artifact.objects[0]));
    assert!(is_complete(&store, &artifact.objects[1]));
    let references = ["ref".to_owned(), "nothing".to_owned()];
    let scope = VerifyScope::References(&references);
    let report = store.verify(scope, false, |_| true).unwrap();
    assert_eq!(report.missing, references);
}

#[test]
fn an_object_that_cannot_be_opened_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (a, b) = (content(1, 100), content(2, 100));
    warm(&store, "ref", &[&a, &b], false);
    let path = object_path(&store, &a);
    fs::remove_file(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
    for repair in [false, true] {
        let report = store.verify(VerifyScope::All, repair, |_| true).unwrap();
        assert_eq!((report.objects, report.damaged.len()), (2, 1));
        let damage = &report.damaged[0];
        assert_eq!((&damage.path, damage.removed), (&path, repair));
        assert!(damage.what.contains("cannot be read"), "{damage:?}");
        assert_eq!(damage.references, ["ref"]);
    }
    let report = store.verify(VerifyScope::All, false, |_| true).unwrap();
    assert_eq!((report.objects, report.damaged.len()), (1, 0));
}

#[test]
fn a_newer_or_damaged_store_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let path = store.root().join("hearth.json");
    for (text, kind) in [
        (
            "{\"format\":99,\"id\":\"x\",\"more\":1}",
            StoreErrorKind::NewerFormat,
        ),
        ("{", StoreErrorKind::Damaged),
    ] {
        fs::write(&path, text).unwrap();
        let error = Store::open(store.root(), &config()).unwrap_err();
        assert_eq!(error.kind(), kind);
        assert!(error.to_string().contains("store"), "{error}");
    }
}

#[test]
fn stores_made_at_once_are_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b/store");
    let ids: Vec<String> = std::thread::scope(|scope| {
        let open = || Store::open(&path, &config()).unwrap().id().to_owned();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(ids.iter().all(|id| *id == ids[0] && id.len() == 32));
    let mode = fs::metadata(&path).unwrap();
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(mode.permissions().mode() & 0o7777, 0o700);
    assert!(RealDisk.boot_id().unwrap() != [0; 16]);
}

/// Warms again and again while another process collects without end: what was recorded and seen
/// complete stays.
#[test]
fn a_collection_never_takes_what_a_warm_has_seen() {
    let dir = tempfile::tempdir().unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let store = open(dir.path());
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                store.collect(&CollectOptions::default()).unwrap();
            }
        });
        let warmers: Vec<_> = (0..3u64)
            .map(|who| {
                let path = dir.path();
                scope.spawn(move || {
                    let store = open(path);
                    for round in 0..60 {
                        let large = content(round % 3, MIB + 10);
                        let small = content(round % 5, 100);
                        let reference = format!("ref-{who}");
                        // Located: equal content arrives under names that differ.
                        let artifact = artifact(&reference, &[&large, &small], true);
                        store.record(&artifact).unwrap();
                        let ids: Vec<_> = artifact.objects.iter().map(|o| o.id).collect();
                        if store.complete(&ids[0]).unwrap().is_none() {
                            let partial = store.partial(&ids[0], large.len() as u64).unwrap();
                            fill(&partial, &large, WriteMode::Cached);
                            partial
                                .finish(Digest::of(&large), partial.generation())
                                .unwrap();
                        }
                        store.put(&[(ids[1], small.into())]).unwrap();
                        for id in &ids {
                            assert!(store.complete(id).unwrap().is_some(), "{who} lost {id}");
                        }
                        assert!(store.remove(&reference).unwrap());
                    }
                })
            })
            .collect();
        let done: Vec<_> = warmers.into_iter().map(|w| w.join()).collect();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(done.iter().all(Result::is_ok));
    });
    let store = open(dir.path());
    store.collect(&CollectOptions::default()).unwrap();
    let usage = store.usage().unwrap();
    assert_eq!((usage.objects, usage.partials), (0, 0));
}

/// Who is told that something is pinned finds its content afterwards, or finds that it was gone before.
#[test]
fn a_pin_that_is_told_during_a_collection_counts() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let contents: Vec<Vec<u8>> = (0..60).map(|seed| content(seed, 3000)).collect();
    for round in 0..20 {
        let name = |at: usize| format!("hf://a/b@{at}");
        for (at, bytes) in contents.iter().enumerate() {
            warm(&store, &name(at), &[bytes], false);
        }
        let collecting = std::thread::spawn({
            let store = Arc::clone(&store);
            move || collect_to(&store, 0)
        });
        std::thread::sleep(Duration::from_micros(300 * round));
        let wanted: Vec<usize> = (0..contents.len()).step_by(7).collect();
        let mut kept = Vec::new();
        for &at in &wanted {
            store.pin(&name(at), "pod/a").unwrap();
            if store.artifact(&name(at)).unwrap().is_some() {
                kept.push(at);
            }
        }
        collecting.join().unwrap();
        for at in kept {
            assert!(
                store.artifact(&name(at)).unwrap().is_some(),
                "{round}: {at}"
            );
            assert!(object_path(&store, &contents[at]).exists(), "{round}: {at}");
        }
        for at in wanted {
            store.unpin(&name(at), "pod/a").unwrap();
        }
    }
}

/// A part of something was here when the whole came by another way.
#[test]
fn what_is_left_of_a_complete_object_is_collected() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let bytes = content(1, 2 * MIB + 5);
    for located in [false, true] {
        let reference = format!("hf://a/b@{located}");
        let artifact = artifact(&reference, &[&bytes], located);
        store.record(&artifact).unwrap();
        let id = artifact.objects[0].id;
        for part in [
            artifact.objects[0].partial_id("hf://models/a/b"),
            artifact.objects[0].partial_id("hf://models/c/d"),
        ] {
            let partial = store.partial(part, bytes.len() as u64).unwrap();
            if let Some(lease) = partial.claim(0..1).unwrap() {
                lease.commit(0, &bytes[..MIB], WriteMode::Cached).unwrap();
            }
            store.collect(&CollectOptions::default()).unwrap();
            drop(partial);
        }
        store.collect(&CollectOptions::default()).unwrap();
        let parts = if located { 1 } else { 2 };
        assert_eq!(store.usage().unwrap().partials, parts);
        store.put(&[(id, bytes.clone().into())]).unwrap();
        let report = store.collect(&CollectOptions::default()).unwrap();
        assert_eq!((report.partials, report.objects), (parts, 0));
        assert_eq!(store.usage().unwrap().partials, 0);
        assert!(is_complete(&store, &artifact.objects[0]));
    }
}

#[test]
fn what_is_not_ours_among_the_objects_stands_in_nobodys_way() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let bytes = content(1, 100);
    let artifact = warm(&store, "hf://a/b@main", &[&bytes], false);
    for stray in ["README", "zz"] {
        fs::write(store.root().join("objects/sha256").join(stray), b"stray").unwrap();
    }
    assert_eq!(store.usage().unwrap().objects, 1);
    store.pin("hf://a/b@main", "a").unwrap();
    store.collect(&CollectOptions::default()).unwrap();
    assert!(
        store
            .verify(VerifyScope::All, true, |_| true)
            .unwrap()
            .damaged
            .is_empty()
    );
    assert!(is_complete(&store, &artifact.objects[0]));
    // Nor do the places of pins stay that are gone.
    let pins = || fs::read_dir(store.root().join("pins")).unwrap().count();
    assert_eq!(pins(), 1);
    store.unpin("hf://a/b@main", "a").unwrap();
    store.collect(&CollectOptions::default()).unwrap();
    assert_eq!(pins(), 0);
    store.pin("hf://a/b@main", "a").unwrap();
    assert_eq!(store.pins("hf://a/b@main").unwrap(), ["a"]);
}
