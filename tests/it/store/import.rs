//! Imports: content whose digest is known at its end.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    sync::LazyLock,
};

use proptest::prelude::*;

use super::{sim::SimDisk, *};
use hearth::store::{CollectOptions, Import, ImportFile, Imported, StoreErrorKind, hash_file};

/// Writes `bytes` in pieces of `piece`; runs of zeros as holes where asked.
fn write(mut file: ImportFile, bytes: &[u8], piece: usize, holes: bool) -> (Digest, u64) {
    for part in bytes.chunks(piece) {
        match holes && part.iter().all(|&b| b == 0) {
            true => file.hole(part.len() as u64).unwrap(),
            false => file.write(part).unwrap(),
        }
    }
    file.finish().unwrap()
}

fn bring(import: &Import, bytes: &[u8]) -> Digest {
    let file = import.begin(bytes.len() as u64).unwrap();
    write(file, bytes, 100_000, false).0
}

fn object(store: &Store, digest: &Digest) -> std::path::PathBuf {
    let hex = digest.hex();
    store
        .root()
        .join(format!("objects/sha256/{}/{hex}", &hex[..2]))
}

fn left(store: &Store) -> usize {
    let imports = fs::read_dir(store.root().join("imports")).unwrap();
    imports.count()
}

/// Data, a hole of two and a half MiB, data, and zeros to the end.
fn sparse() -> Vec<u8> {
    let mut bytes = vec![0; 5 * MIB + 77];
    bytes[..MIB].copy_from_slice(&content(70, MIB));
    bytes[7 * MIB / 2..4 * MIB].copy_from_slice(&content(71, MIB / 2));
    bytes
}

#[test]
fn what_is_imported_is_complete_after_the_commit() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let import = store.import().unwrap();
    let contents = [
        Vec::new(),
        content(1, 1),
        content(2, 5000),
        content(3, MIB),
        content(4, MIB + 1),
        content(5, 3 * MIB + 5),
        vec![0; 3 * MIB],
        sparse(),
    ];
    let mut digests = Vec::new();
    for bytes in &contents {
        let size = bytes.len() as u64;
        for (piece, holes) in [(1000, false), (MIB / 2, true), (5 * MIB, true)] {
            let file = import.begin(size).unwrap();
            let found = write(file, bytes, piece, holes);
            assert_eq!(found, (Digest::of(bytes), size));
        }
        digests.push(Digest::of(bytes));
        assert!(
            !store.has(&Digest::of(bytes)).unwrap(),
            "before it is durable"
        );
    }
    let done = import.commit().unwrap();
    let total: usize = contents.iter().map(Vec::len).sum();
    let expected = Imported {
        files: 24,
        bytes: 3 * total as u64,
        new_files: 8,
        new_bytes: total as u64,
        on_tiers: 0,
    };
    assert_eq!(done, expected);
    for (digest, bytes) in digests.iter().zip(&contents) {
        assert!(store.has(digest).unwrap());
        let complete = store.complete(&ObjectId::Sha256(*digest)).unwrap().unwrap();
        assert_eq!(complete.size, bytes.len() as u64);
        assert_eq!(hash_file(complete.file(), |_| true).unwrap(), Some(*digest));
        let mode = complete.file().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o444);
    }
    let damaged = store.verify(hearth::store::VerifyScope::All, false, |_| true);
    let damaged = damaged.unwrap();
    assert_eq!((damaged.objects, damaged.damaged), (8, vec![]));
    assert_eq!(import.commit().unwrap(), expected);
    drop(import);
    assert_eq!(left(&store), 0);
}

#[test]
fn a_hole_takes_no_space() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let import = store.import().unwrap();
    let mut file = import.begin(64 << 20).unwrap();
    file.write(b"start").unwrap();
    file.hole((64 << 20) - 8).unwrap();
    file.write(b"end").unwrap();
    let (digest, size) = file.finish().unwrap();
    import.commit().unwrap();
    let meta = fs::metadata(object(&store, &digest)).unwrap();
    assert_eq!((meta.len(), size), (64 << 20, 64 << 20));
    assert!(meta.blocks() * 512 < 1 << 20);
    assert!(store.usage().unwrap().object_bytes < 1 << 20);
}

#[test]
fn what_is_there_is_not_stored_again() {
    let dir = tempfile::tempdir().unwrap();
    let (store, other) = (open(dir.path()), open(dir.path()));
    let (small, large) = (content(1, 100), content(2, 2 * MIB));
    let put = [(ObjectId::Sha256(Digest::of(&small)), small.clone().into())];
    store.put(&put).unwrap();
    let (one, two) = (store.import().unwrap(), other.import().unwrap());
    for import in [&one, &two] {
        bring(import, &small);
        bring(import, &large);
    }
    assert_eq!(one.commit().unwrap().new_files, 1);
    let inode = |bytes: &[u8]| {
        let meta = fs::metadata(object(&store, &Digest::of(bytes))).unwrap();
        meta.ino()
    };
    let before = (inode(&small), inode(&large));
    // It was on its way twice: the first to arrive stays.
    two.commit().unwrap();
    assert_eq!(before, (inode(&small), inode(&large)));
    assert_eq!(store.usage().unwrap().objects, 2);
    // What has the right name and the wrong length is replaced.
    let path = object(&store, &Digest::of(&small));
    fs::remove_file(&path).unwrap();
    fs::write(&path, b"torn").unwrap();
    bring(&one, &small);
    one.commit().unwrap();
    assert_eq!(fs::read(&path).unwrap(), small);
}

#[test]
fn a_file_that_is_not_what_it_says_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let import = store.import().unwrap();
    for size in [10, 2 * CHUNK_SIZE] {
        let mut file = import.begin(size).unwrap();
        file.write(b"123456").unwrap();
        let error = file.write(&vec![0; size as usize]).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Invalid);
        assert!(file.hole(u64::MAX).is_err());
        let error = file.finish().unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Invalid);
        assert!(error.to_string().contains("ends after 6"), "{error}");
    }
    let error = import.begin(u64::MAX).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Invalid);
    let mut file = import.begin(3).unwrap();
    file.write(b"abc").unwrap();
    let error = file.finish_as(Digest::of(b"abd")).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Damaged);
    let mut file = import.begin_unhashed(3).unwrap();
    file.write(b"abc").unwrap();
    file.finish_as(Digest::of(b"abc")).unwrap();
    let file = import.begin_unhashed(0).unwrap();
    assert_eq!(file.finish().unwrap_err().kind(), StoreErrorKind::Invalid);
    let done = import.commit().unwrap();
    assert_eq!((done.files, done.bytes), (1, 3));
    assert_eq!(store.usage().unwrap().objects, 1);
}

#[test]
fn what_is_not_committed_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let import = store.import().unwrap();
    bring(&import, &content(1, 100));
    bring(&import, &content(2, 2 * MIB));
    let mut unfinished = import.begin(5 * CHUNK_SIZE).unwrap();
    unfinished.write(&content(3, 4 * MIB)).unwrap();
    assert!(store.usage().unwrap().other_bytes > 6 << 20);
    drop(import);
    assert_eq!(left(&store), 1, "the file that is not finished holds it");
    drop(unfinished);
    assert_eq!(left(&store), 0);
    let usage = store.usage().unwrap();
    assert_eq!((usage.objects, usage.bytes()), (0, 0));
}

#[test]
fn an_import_keeps_what_it_brought_and_found() {
    let dir = tempfile::tempdir().unwrap();
    let (store, other) = (open(dir.path()), open(dir.path()));
    let contents: Vec<_> = (0..4).map(|seed| content(seed, 9000)).collect();
    let digests: Vec<_> = contents.iter().map(|bytes| Digest::of(bytes)).collect();
    for bytes in &contents[..3] {
        let id = ObjectId::Sha256(Digest::of(bytes));
        store.put(&[(id, bytes.clone().into())]).unwrap();
    }
    let layers = [Digest::of(b"a"), Digest::of(b"b")];
    for layer in &layers {
        store.put_index(layer, b"index").unwrap();
    }
    let import = store.import().unwrap();
    bring(&import, &contents[0]);
    bring(&import, &contents[3]);
    let asked = [digests[1], Digest::of(b"nothing"), layers[0]];
    assert_eq!(import.keep(&asked).unwrap(), [true, false, false]);
    import.commit().unwrap();
    // A dead one: nobody holds its lock.
    let dead = store.root().join("imports/9-9");
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join("kept"), digests[2].as_bytes()).unwrap();
    fs::write(dead.join("0"), vec![1; 100_000]).unwrap();
    let dry = CollectOptions {
        dry_run: true,
        ..Default::default()
    };
    let foreseen = other.collect(&dry).unwrap();
    let report = other.collect(&CollectOptions::default()).unwrap();
    assert_eq!((report.objects, report.others), (1, 3));
    assert_eq!(foreseen.bytes, report.bytes);
    assert!(report.bytes >= 109_000);
    assert!(!dead.exists());
    let has = |digest: &Digest| store.has(digest).unwrap();
    let here: Vec<bool> = digests.iter().map(has).collect();
    assert_eq!(here, [true, true, false, true]);
    assert!(store.index(&layers[0]).unwrap().is_some());
    assert!(store.index(&layers[1]).unwrap().is_none());
    drop(import);
    assert_eq!(
        other.collect(&CollectOptions::default()).unwrap().objects,
        3
    );
    assert!(store.index(&layers[0]).unwrap().is_none());
}

#[test]
fn what_cannot_be_synced_is_never_complete() {
    let dir = tempfile::tempdir().unwrap();
    let sim = Arc::new(SimDisk::quick(1));
    let store = Store::open_on(sim.clone(), &dir.path().join("store"), &config()).unwrap();
    for files in [3, 30] {
        let import = store.import().unwrap();
        let digests: Vec<_> = (0..files)
            .map(|seed| bring(&import, &content(seed, 100)))
            .collect();
        sim.fail_syncs(true);
        let error = import.commit().unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Io, "{error}");
        sim.fail_syncs(false);
        // The kernel says it only once; the import does not forget it.
        assert!(import.commit().is_err());
        let mut file = import.begin(1).unwrap();
        file.write(b"x").unwrap();
        assert!(file.finish().is_err());
        assert!(digests.iter().all(|digest| !store.has(digest).unwrap()));
        drop(import);
        assert_eq!(left(&store), 0);
        let import = store.import().unwrap();
        for seed in 0..files {
            bring(&import, &content(seed, 100));
        }
        import.commit().unwrap();
        assert!(digests.iter().all(|digest| store.has(digest).unwrap()));
        drop(import);
        store.collect(&CollectOptions::default()).unwrap();
    }
}

#[test]
fn space_is_reserved_for_what_will_be_imported() {
    let dir = tempfile::tempdir().unwrap();
    let limited = Config {
        max_bytes: Some(ByteSize(5 << 20)),
        ..config()
    };
    let store = Store::open(&dir.path().join("store"), &limited).unwrap();
    let error = store.admit_bytes("oci://r/big:1", 6 << 20).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::NoSpace);
    assert!(
        error.to_string().starts_with("oci://r/big:1 does not fit"),
        "{error}"
    );
    let room = store.admit_bytes("oci://r/a:1", 3 << 20).unwrap();
    let error = store.admit_bytes("oci://r/b:1", 3 << 20).unwrap_err();
    assert!(error.to_string().contains("3.0 MiB promised"), "{error}");
    let import = store.import_within(&room).unwrap();
    let mut dropped = import.begin(2 * CHUNK_SIZE).unwrap();
    dropped.write(&content(1, 2 * MIB)).unwrap();
    // What has arrived is on the disk, and not reserved as well.
    drop(store.admit_bytes("oci://r/c:1", 3 << 19).unwrap());
    drop(dropped);
    assert!(store.admit_bytes("oci://r/c:1", 5 << 19).is_err());
    bring(&import, &content(2, 2 * MIB));
    bring(&import, &content(2, 2 * MIB));
    import.commit().unwrap();
    drop(store.admit_bytes("oci://r/c:1", 5 << 19).unwrap());
    drop((import, room));
    // Nothing leads to what was imported: it makes room.
    drop(store.admit_bytes("oci://r/d:1", 5 << 20).unwrap());
    assert_eq!(store.usage().unwrap().objects, 0);
}

static POOL: LazyLock<Vec<(Vec<u8>, Digest)>> = LazyLock::new(|| {
    let mut sparse = vec![0; MIB + 300_000];
    sparse[600_000..600_003].copy_from_slice(b"xyz");
    let mut pool = vec![Vec::new(), content(1, 10), content(2, MIB + 5), sparse];
    pool.extend((3..14).map(|seed| content(seed, 50)));
    let digests = pool.into_iter().map(|bytes| {
        let digest = Digest::of(&bytes);
        (bytes, digest)
    });
    digests.collect()
});

#[derive(Debug, Clone)]
enum Op {
    Bring { who: usize, what: usize },
    Forget { who: usize, what: usize },
    Commit { who: usize },
    Again { who: usize },
    Put { what: usize },
    Collect { who: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let who = 0..2usize;
    let what = 0..POOL.len();
    prop_oneof![
        10 => (who.clone(), what.clone()).prop_map(|(who, what)| Op::Bring { who, what }),
        1 => (who.clone(), what.clone()).prop_map(|(who, what)| Op::Forget { who, what }),
        2 => who.clone().prop_map(|who| Op::Commit { who }),
        1 => who.clone().prop_map(|who| Op::Again { who }),
        1 => what.prop_map(|what| Op::Put { what }),
        1 => who.prop_map(|who| Op::Collect { who }),
    ]
}

#[derive(Default)]
struct Model {
    pending: [BTreeSet<usize>; 2],
    kept: [BTreeSet<usize>; 2],
    complete: BTreeSet<usize>,
}

fn run(ops: Vec<Op>) {
    let dir = tempfile::tempdir().unwrap();
    let stores = [open(dir.path()), open(dir.path())];
    let mut imports = [0, 1].map(|who| stores[who].import().unwrap());
    let mut model = Model::default();
    for op in ops {
        match op {
            Op::Bring { who, what } => {
                let (bytes, digest) = &POOL[what];
                let file = imports[who].begin(bytes.len() as u64).unwrap();
                let found = write(file, bytes, 300_000, what % 2 == 1);
                assert_eq!(found.0, *digest);
                match model.complete.contains(&what) {
                    true if model.pending[who].contains(&what) => {}
                    true => {
                        model.kept[who].insert(what);
                    }
                    false => {
                        model.pending[who].insert(what);
                    }
                }
            }
            Op::Forget { who, what } => {
                let bytes = &POOL[what].0;
                let mut file = imports[who].begin(bytes.len() as u64).unwrap();
                file.write(&bytes[..bytes.len() / 2]).unwrap();
            }
            Op::Commit { who } => {
                imports[who].commit().unwrap();
                let pending = std::mem::take(&mut model.pending[who]);
                model.kept[who].extend(&pending);
                model.complete.extend(pending);
            }
            Op::Again { who } => {
                imports[who] = stores[who].import().unwrap();
                model.pending[who].clear();
                model.kept[who].clear();
            }
            Op::Put { what } => {
                let (bytes, digest) = &POOL[what];
                let id = ObjectId::Sha256(*digest);
                stores[0].put(&[(id, bytes.clone().into())]).unwrap();
                model.complete.insert(what);
            }
            Op::Collect { who } => {
                stores[who].collect(&CollectOptions::default()).unwrap();
                let kept = &model.kept;
                model
                    .complete
                    .retain(|what| kept.iter().any(|k| k.contains(what)));
            }
        }
        for (what, (_, digest)) in POOL.iter().enumerate() {
            let has = stores[1].has(digest).unwrap();
            assert_eq!(has, model.complete.contains(&what), "content {what}");
        }
    }
    let report = stores[0].verify(hearth::store::VerifyScope::All, false, |_| true);
    let report = report.unwrap();
    assert_eq!(report.damaged, []);
    assert_eq!(report.objects as usize, model.complete.len());
    drop(imports);
    assert_eq!(left(&stores[0]), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn imports_behave_as_their_model(ops in prop::collection::vec(op(), 1..60)) {
        run(ops);
    }
}
