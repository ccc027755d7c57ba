//! Power failure at every operation on the disk, with every kind of torn state.

use std::{
    collections::BTreeMap,
    io::Read as _,
    path::{Path, PathBuf},
    sync::Mutex,
};

use super::{
    images::image,
    sim::{SimDisk, kinds},
    *,
};
use hearth::{
    disk::Disk,
    store::{CollectOptions, ImageRecord, VerifyScope, hash_file},
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
    /// Indexes that may be there, by layer, oldest first, and how many are acknowledged.
    indexes: BTreeMap<Digest, (Vec<Vec<u8>>, usize)>,
    /// Images that may be recorded, and whether they are acknowledged.
    images: Vec<(ImageRecord, bool)>,
    /// Pins, and whether they must be there; `None` while they are being made or removed.
    pins: BTreeMap<(String, &'static str), Option<bool>>,
    /// Images of roots that may be there, and whether they are acknowledged.
    roots: Vec<(Digest, Vec<u8>, bool)>,
    /// Artifacts that are there with all their content; or, if they need not be there, that are not
    /// there or are so with all their content.
    kept: Vec<(Artifact, [Vec<u8>; 2], bool)>,
    /// What guards may note, by reference, and whether they are acknowledged.
    guards: Vec<(&'static str, &'static str, bool)>,
    /// Whether the store itself was acknowledged.
    made: bool,
    /// Whether the scenario is at work on what other tests look at.
    preparing: bool,
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
        if shared.lock().unwrap().preparing {
            return;
        }
        points += 1;
        for (names, data) in kinds(points) {
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
    check_images(&store, expected, case);
    check_kept(&store, expected, case);
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

fn check_images(store: &Store, expected: &Expected, case: &str) {
    for (layer, (versions, acknowledged)) in &expected.indexes {
        let at = store.index(layer).unwrap().map_or(0, |found| {
            let known = versions.iter().position(|known| *known == found);
            known.unwrap_or_else(|| panic!("{case}: an index that never was")) + 1
        });
        assert!(at >= *acknowledged, "{case}: an index is lost");
    }
    for (image, acknowledged) in &expected.images {
        let found = store.image(&image.reference).unwrap();
        assert!(found.is_some() || !acknowledged, "{case}: an image is lost");
        assert!(found.is_none_or(|found| found == *image), "{case}");
        for (at, chain) in image.chain_ids().iter().enumerate() {
            let found = store.image_by_chain(chain).unwrap();
            assert!(
                found.is_some() || !acknowledged,
                "{case}: layer {at} is lost"
            );
            if let Some((found, layers)) = found {
                assert!(
                    expected.images.iter().any(|(known, _)| *known == found),
                    "{case}"
                );
                assert_eq!((found.chain_ids()[at], layers), (*chain, at + 1), "{case}");
            }
        }
    }
}

fn check_kept(store: &Arc<Store>, expected: &Expected, case: &str) {
    for ((reference, owner), must) in &expected.pins {
        let pinned = store.pins(reference).unwrap().iter().any(|o| o == owner);
        let fits = must.is_none_or(|must| must == pinned);
        assert!(
            fits,
            "{case}: {owner} pins {reference}: {pinned}, not {must:?}"
        );
    }
    for (digest, image, acknowledged) in &expected.roots {
        let found = std::fs::read(store.root_image(digest)).ok();
        assert!(found.is_some() || !acknowledged, "{case}: a root is lost");
        assert!(
            found.is_none_or(|found| found == *image),
            "{case}: a torn root"
        );
    }
    for (reference, note, acknowledged) in &expected.guards {
        let found = store.guarded(reference).unwrap();
        assert!(found.is_some() || !acknowledged, "{case}: a guard is lost");
        assert!(found.is_none_or(|found| found == *note), "{case}: torn");
    }
    if expected.kept.is_empty() {
        return;
    }
    for round in ["at once", "after a collection"] {
        for (artifact, contents, must) in &expected.kept {
            let name = &artifact.reference;
            let found = store.artifact(name).unwrap();
            assert!(found.is_some() || !must, "{case}: {name} is lost {round}");
            let Some((_, found)) = found else { continue };
            assert_eq!(found, *artifact, "{case}");
            for (object, right) in found.objects.iter().zip(contents) {
                let complete = store.complete(&object.id).unwrap();
                let found = complete.and_then(|c| hash_file(c.file(), |_| true).unwrap());
                assert_eq!(found, Some(Digest::of(right)), "{case}: {name} {round}");
            }
        }
        store.collect(&CollectOptions::default()).unwrap();
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
        partial.discard(partial.generation()).unwrap();
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

/// Two imports of few files and of many, some of them equal, some large, some sparse.
#[test]
fn imports_survive_power_failures() {
    for many in [false, true] {
        at_every_crash(|disk, root, expected| {
            let store = make(disk, root, expected);
            let mut contents = vec![content(40, 5000), Vec::new()];
            if many {
                contents.extend((41..49).map(|seed| content(seed, 10)));
            } else {
                let mut sparse = content(50, MIB + 100_000);
                sparse[300_000..MIB].fill(0);
                contents.push(sparse);
            }
            let objects = contents.iter().map(|bytes| {
                let digest = Digest::of(bytes);
                (ObjectId::Sha256(digest), digest, bytes.clone())
            });
            expected.lock().unwrap().objects.extend(objects);
            let imports = [store.import().unwrap(), store.import().unwrap()];
            let (half, all) = (contents.len() - 1, contents.len());
            for (import, part) in imports.iter().zip([0..half, 1..all]) {
                for bytes in &contents[part.clone()] {
                    let mut file = import.begin(bytes.len() as u64).unwrap();
                    for piece in bytes.chunks(MIB / 4) {
                        match piece.iter().all(|&b| b == 0) {
                            true => file.hole(piece.len() as u64).unwrap(),
                            false => file.write(piece).unwrap(),
                        }
                    }
                    file.finish().unwrap();
                }
                import.commit().unwrap();
                let done = contents[part]
                    .iter()
                    .map(|bytes| ObjectId::Sha256(Digest::of(bytes)));
                expected.lock().unwrap().complete.extend(done);
            }
            // What another has published is durable for who found it.
            let third = store.import().unwrap();
            let mut file = third.begin(5000).unwrap();
            file.write(&contents[0]).unwrap();
            file.finish().unwrap();
            third.commit().unwrap();
            let parts: Vec<&[u8]> = contents.iter().map(Vec::as_slice).collect();
            let artifact = artifact("oci://r/a:1", &parts, false);
            expected.lock().unwrap().artifacts.push(artifact.clone());
            store.record(&artifact).unwrap();
            expected.lock().unwrap().recorded = 1;
        });
    }
}

#[test]
fn indexes_and_images_survive_power_failures() {
    at_every_crash(|disk, root, expected| {
        let store = make(disk, root, expected);
        let layer = Digest::of(b"layer");
        for version in [content(60, 9000), content(61, 100)] {
            let mut shared = expected.lock().unwrap();
            let (versions, _) = shared.indexes.entry(layer).or_default();
            versions.push(version.clone());
            drop(shared);
            store.put_index(&layer, &version).unwrap();
            let mut shared = expected.lock().unwrap();
            shared.indexes.get_mut(&layer).unwrap().1 += 1;
        }
        for image in [
            image("oci://r/one:1", &["base", "one"]),
            image(
                "oci://r/two:1",
                &["base", "a", "b", "c", "d", "e", "f", "g", "h", "i"],
            ),
        ] {
            let artifact = artifact(&image.reference, &[b""], false);
            store.record(&artifact).unwrap();
            expected.lock().unwrap().images.push((image.clone(), false));
            store.record_image(&image).unwrap();
            expected.lock().unwrap().images.last_mut().unwrap().1 = true;
        }
    });
}

#[test]
fn pins_and_roots_survive_power_failures() {
    at_every_crash(|disk, root, expected| {
        let store = make(disk, root, expected);
        let pin = |reference: &str, owner, now: Option<bool>| {
            let pin = (reference.to_owned(), owner);
            expected.lock().unwrap().pins.insert(pin, now);
        };
        for (reference, owner) in [
            ("hf://a/b", "pod/1"),
            ("hf://a/b", "user"),
            ("s3://c", "pod/1"),
        ] {
            pin(reference, owner, None);
            store.pin(reference, owner).unwrap();
            pin(reference, owner, Some(true));
        }
        pin("hf://a/b", "pod/1", None);
        assert!(store.unpin("hf://a/b", "pod/1").unwrap());
        pin("hf://a/b", "pod/1", Some(false));
        for seed in [70, 71] {
            let (digest, image) = (Digest::of(&[seed]), content(seed.into(), 10_000));
            expected
                .lock()
                .unwrap()
                .roots
                .push((digest, image.clone(), false));
            let written = store.write_root_image(&digest, |to| {
                image.chunks(3000).try_for_each(|part| to.write_all(part))
            });
            written.unwrap();
            expected.lock().unwrap().roots.last_mut().unwrap().2 = true;
        }
    });
}

/// In directories that are made for the first of them.
#[test]
fn guards_survive_power_failures() {
    at_every_crash(|disk, root, expected| {
        let store = make(disk, root, expected);
        for (reference, note) in [("hf://a/b", "sha256:of the node"), ("s3://c", "")] {
            let guards = || expected.lock().unwrap();
            guards().guards.push((reference, note, false));
            store.guard(reference, || Ok(note.to_owned())).unwrap();
            guards().guards.last_mut().unwrap().2 = true;
        }
    });
}

/// By the watermarks, and by name: what goes goes as a whole, what is pinned or held stays.
#[test]
fn evictions_survive_power_failures() {
    at_every_crash(|disk, root, expected| {
        expected.lock().unwrap().preparing = true;
        let store = make(Arc::clone(&disk), root, expected);
        let shared = content(80, 6000);
        for (at, name) in ["pinned", "held", "old", "older", "new"]
            .into_iter()
            .enumerate()
        {
            let own = content(81 + at as u64, 30_000);
            let artifact = artifact(name, &[&shared, &own], at % 2 == 1);
            store.record(&artifact).unwrap();
            let contents = artifact.objects.iter().map(|o| o.id).zip([&shared, &own]);
            let batch: Vec<_> = contents.map(|(id, b)| (id, b.clone().into())).collect();
            store.put(&batch).unwrap();
            let must = !name.starts_with("old");
            let mut expected = expected.lock().unwrap();
            expected.kept.push((artifact, [shared.clone(), own], must));
        }
        let old = image("old", &["base", "old"]);
        store.record_image(&old).unwrap();
        store
            .put_index(&old.layers[1].blob, &content(90, 500))
            .unwrap();
        store.pin("pinned", "test").unwrap();
        let _hold = store.hold("held").unwrap();
        for (name, seconds) in [("pinned", 900), ("held", 800), ("older", 700), ("old", 600)] {
            let name = Digest::of(name.as_bytes()).hex();
            let record = store.root().join(format!("artifacts/{name}.json"));
            let used = std::time::SystemTime::now() - std::time::Duration::from_secs(seconds);
            std::fs::File::open(record)
                .unwrap()
                .set_modified(used)
                .unwrap();
        }
        {
            let mut expected = expected.lock().unwrap();
            expected.pins.insert(("pinned".into(), "test"), Some(true));
            expected.preparing = false;
        }
        let used = store.usage().unwrap().bytes();
        let limited = hearth::store::Config {
            max_bytes: Some(ByteSize(used - 5000)),
            high_watermark: 0.9,
            low_watermark: 0.8,
            ..config()
        };
        let small = Store::open_on(disk, store.root(), &limited).unwrap();
        let report = small.collect(&CollectOptions::default()).unwrap();
        assert_eq!(report.evicted, ["older", "old"]);
        expected.lock().unwrap().kept.last_mut().unwrap().2 = false;
        assert!(store.remove("new").unwrap());
        store.collect(&CollectOptions::default()).unwrap();
        let left: Vec<_> = store
            .records()
            .unwrap()
            .into_iter()
            .map(|r| r.reference)
            .collect();
        assert_eq!(left, ["held", "pinned"]);
    });
}

/// The whole of a warm with a pin: engine, dispatcher, batches of small files, verification.
#[test]
fn a_warm_survives_power_failures() {
    use hearth::{
        fetch::{self, Engine},
        node::{Meaning, Node, Progress},
        source::{self, Sources},
    };
    let origin = tempfile::tempdir().unwrap();
    for (name, seed, size) in [
        ("a.bin", 100, MIB + 77),
        ("b.json", 101, 300),
        ("c.txt", 102, 9000),
    ] {
        std::fs::write(origin.path().join(name), content(seed, size)).unwrap();
    }
    let name = format!("file://{}", origin.path().display());
    let reference = name.parse().unwrap();
    at_every_crash(|disk, root, expected| {
        let store = make(disk, root, expected);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let engine = Engine::new(Arc::clone(&store), fetch::Config::default());
            let node = Node::new(engine, Sources::new(source::Config::default()));
            let Meaning::Files(artifact) = node.inspect(&reference).await.unwrap() else {
                panic!("files");
            };
            let ids: Vec<_> = artifact.objects.iter().map(|o| o.id).collect();
            {
                let mut expected = expected.lock().unwrap();
                for object in &artifact.objects {
                    let location = object.recipe.location().unwrap();
                    let bytes = std::fs::read(&location.path).unwrap();
                    expected
                        .objects
                        .push((object.id, Digest::of(&bytes), bytes));
                }
                expected.artifacts.push(artifact);
                expected.pins.insert((name.clone(), "test"), None);
            }
            let progress = Progress::default();
            node.warm(&reference, Some("test"), &progress)
                .await
                .unwrap();
            let mut expected = expected.lock().unwrap();
            expected.complete.extend(ids);
            expected.recorded = 1;
            expected.pins.insert((name.clone(), "test"), Some(true));
        });
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
