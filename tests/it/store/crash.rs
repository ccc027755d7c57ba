//! Power failure at every operation on the disk, with every kind of torn state.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    sync::Mutex,
};

use super::{
    sim::{Left, SimDisk},
    *,
};
use hearth::{
    disk::Disk,
    store::{CollectOptions, VerifyScope},
};

/// What the store has acknowledged, and what may be there.
#[derive(Default)]
struct Expected {
    /// Objects and their content.
    objects: Vec<(ObjectId, Digest, Vec<u8>)>,
    /// Chunks that a checkpoint acknowledged.
    chunks: Vec<(ObjectId, u64)>,
    /// Objects that were acknowledged as complete.
    complete: Vec<ObjectId>,
    /// Artifacts that may be recorded, oldest first, and how many are acknowledged.
    artifacts: Vec<Artifact>,
    recorded: usize,
    /// Whether the store itself was acknowledged.
    made: bool,
}

/// Runs `scenario`; at each operation checks what a power failure would leave.
fn at_every_crash(scenario: impl FnOnce(Arc<dyn Disk>, &Path, &Arc<Mutex<Expected>>)) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("live");
    std::fs::create_dir(&root).unwrap();
    let expected: Arc<Mutex<Expected>> = Arc::default();
    let sim = Arc::new(SimDisk::new(1));
    let (from, shared, scratch) = (root.clone(), Arc::clone(&expected), dir.path().join("left"));
    let mut points = 0u64;
    sim.before_each(move |image, what| {
        points += 1;
        let kinds = [
            (Left::Nothing, Left::Nothing),
            (Left::All, Left::Nothing),
            (Left::Nothing, Left::All),
            (Left::All, Left::All),
            (Left::Some(points), Left::Some(points)),
            (Left::Some(points + 7777), Left::All),
        ];
        for (names, data) in kinds {
            image.build(&from, &scratch, names, data);
            let case = format!("point {points}, before {what}, left {names:?} {data:?}");
            check(&scratch, &shared.lock().unwrap(), &case);
            std::fs::remove_dir_all(&scratch).unwrap();
        }
    });
    scenario(sim.clone(), &root, &expected);
    sim.end();
}

fn check(root: &Path, expected: &Expected, case: &str) {
    let path = root.join("store");
    if expected.made {
        assert!(path.join("hearth.json").exists(), "{case}");
    }
    // After a power failure the boot is another one.
    let store = Store::open_on(Arc::new(SimDisk::quick(2)), &path, &config())
        .unwrap_or_else(|error| panic!("{case}: {error}"));
    for (id, digest, bytes) in &expected.objects {
        let complete = store.complete(id).unwrap();
        if let Some(complete) = &complete {
            let mut found = Vec::new();
            complete.file().read_to_end(&mut found).unwrap();
            assert!(found == *bytes, "{case}: {id} has wrong content");
        }
        let must = expected.complete.contains(id);
        assert!(complete.is_some() || !must, "{case}: {id} is lost");
        if complete.is_some() {
            continue;
        }
        let partial = store.partial(id, bytes.len() as u64).unwrap();
        for index in 0..partial.chunks() {
            let must = expected.chunks.contains(&(*id, index));
            assert!(
                partial.present(index) || !must,
                "{case}: {id} lost chunk {index}"
            );
            if partial.present(index) {
                let right = chunk_of(bytes, index);
                let mut found = vec![0; right.len()];
                partial.read_at(&mut found, index * CHUNK_SIZE).unwrap();
                assert!(found == right, "{case}: {id} has a wrong chunk {index}");
            }
        }
        fill(&partial, bytes, WriteMode::Cached);
        assert_eq!(
            partial
                .finish(*digest, partial.generation())
                .unwrap()
                .digest,
            *digest,
            "{case}"
        );
        assert!(store.complete(id).unwrap().is_some(), "{case}");
    }
    let Some(first) = expected.artifacts.first() else {
        return;
    };
    let found = store.artifact(&first.reference).unwrap();
    let found = found.map(|(_, artifact)| artifact);
    let at = found.map_or(0, |found| {
        let known = expected.artifacts.iter().position(|a| *a == found);
        known.unwrap_or_else(|| panic!("{case}: an artifact that never was")) + 1
    });
    assert!(at >= expected.recorded, "{case}: the record is lost");
    store.collect(&CollectOptions::default()).unwrap();
    for artifact in &expected.artifacts[at.saturating_sub(1)..at] {
        for object in &artifact.objects {
            let (id, ..) = expected
                .objects
                .iter()
                .find(|(id, ..)| *id == object.id)
                .unwrap();
            assert!(
                store.complete(id).unwrap().is_some(),
                "{case}: collected {id}"
            );
        }
    }
    let report = store.verify(VerifyScope::All, false, |_| true).unwrap();
    assert_eq!(report.damaged, [], "{case}");
}

fn make(disk: Arc<dyn Disk>, root: &Path, expected: &Mutex<Expected>) -> Arc<Store> {
    let path: PathBuf = root.join("store");
    let store = Store::open_on(disk, &path, &config()).unwrap();
    expected.lock().unwrap().made = true;
    store
}

#[test]
fn a_large_object_survives_power_failures() {
    for located in [false, true] {
        at_every_crash(|disk, root, expected| {
            let store = make(disk, root, expected);
            let bytes = content(1, 2 * MIB + 77);
            let digest = Digest::of(&bytes);
            let id = match located {
                true => ObjectId::located("there", "1", bytes.len() as u64),
                false => ObjectId::Sha256(digest),
            };
            expected
                .lock()
                .unwrap()
                .objects
                .push((id, Digest::of(&bytes), bytes.clone()));
            let partial = store.partial(&id, bytes.len() as u64).unwrap();
            let lease = partial.claim(0..3).unwrap().unwrap();
            for index in 0..3 {
                lease
                    .commit(index, chunk_of(&bytes, index), WriteMode::Direct)
                    .unwrap();
                if index < 2 {
                    partial.checkpoint().unwrap();
                    expected.lock().unwrap().chunks.push((id, index));
                }
            }
            partial.finish(digest, partial.generation()).unwrap();
            expected.lock().unwrap().complete.push(id);
        });
    }
}

#[test]
fn a_discarded_object_never_comes_back() {
    at_every_crash(|disk, root, expected| {
        let store = make(disk, root, expected);
        let bytes = content(2, MIB + 5000);
        let id = ObjectId::Sha256(Digest::of(&bytes));
        let partial = store.partial(&id, bytes.len() as u64).unwrap();
        fill(&partial, &content(3, MIB + 5000), WriteMode::Cached);
        partial.checkpoint().unwrap();
        partial.discard().unwrap();
        expected
            .lock()
            .unwrap()
            .objects
            .push((id, Digest::of(&bytes), bytes.clone()));
        let lease = partial.claim(0..1).unwrap().unwrap();
        lease
            .commit(0, chunk_of(&bytes, 0), WriteMode::Cached)
            .unwrap();
        partial.checkpoint().unwrap();
        expected.lock().unwrap().chunks.push((id, 0));
    });
}

#[test]
fn a_batch_and_its_record_survive_power_failures() {
    at_every_crash(|disk, root, expected| {
        let store = make(disk, root, expected);
        let contents = [
            content(4, 10),
            content(5, 5000),
            content(6, 0),
            content(4, 10),
        ];
        let contents: Vec<&[u8]> = contents.iter().map(Vec::as_slice).collect();
        let old = artifact("hf://a/b", &contents[..1], false);
        let new = artifact("hf://a/b", &contents, true);
        for (at, artifact) in [old, new].into_iter().enumerate() {
            let batch: Vec<_> = artifact
                .objects
                .iter()
                .zip(&contents)
                .map(|(object, bytes)| (object.id, bytes.to_vec().into()))
                .collect();
            {
                let mut expected = expected.lock().unwrap();
                let objects = artifact.objects.iter().zip(&contents);
                let objects =
                    objects.map(|(object, bytes)| (object.id, Digest::of(bytes), bytes.to_vec()));
                expected.objects.extend(objects);
                expected.artifacts.push(artifact.clone());
            }
            store.record(&artifact).unwrap();
            expected.lock().unwrap().recorded = at + 1;
            store.put(&batch).unwrap();
            expected
                .lock()
                .unwrap()
                .complete
                .extend(batch.iter().map(|(id, _)| *id));
        }
    });
}

#[test]
fn opening_a_store_lists_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = bytes::Bytes::from_static(b"here");
    let id = ObjectId::Sha256(Digest::of(&bytes));
    let sim = Arc::new(SimDisk::new(1));
    let path = dir.path().join("store");
    Store::open_on(sim.clone(), &path, &config())
        .unwrap()
        .put(&[(id, bytes)])
        .unwrap();
    let store = Store::open_on(sim.clone(), &path, &config()).unwrap();
    assert!(store.complete(&id).unwrap().is_some());
    store.partial(&ObjectId::located("p", "1", 5), 5).unwrap();
    assert_eq!(sim.lists.load(std::sync::atomic::Ordering::Relaxed), 0);
}
