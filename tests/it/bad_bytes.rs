//! Bits that flip on the way from an origin, in what an earlier process left half done, and in
//! the records of the snapshotter: the right bytes are served, or none.

use std::{
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hearth::{
    digest::Digest,
    fetch::{Class, Config, Engine, VerifyPolicy},
    metrics,
    snapshotter::{Kind, NoRoots, Settings, SnapshotError, SnapshotErrorKind, Snapshotter},
    store::{self, Store},
};

use crate::{
    scripted_source::{Fault, Scripted},
    store::{integrity::Rng, sim::SimDisk},
};

const MIB: usize = 1 << 20;

fn open(dir: &Path, boot: u8) -> Arc<Store> {
    let config = store::Config {
        min_free: store::ByteSize(0),
        ..Default::default()
    };
    Store::open_on(Arc::new(SimDisk::quick(boot)), dir, &config).unwrap()
}

fn strict() -> Config {
    Config {
        verify: VerifyPolicy::Strict,
        ..Config::default()
    }
}

/// 1,950 bodies with a flipped bit, of objects with a digest: none is served where nothing unverified is, nor, of small
/// ones, where large ones may be; those are dropped, fetched again, and right from then on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_on_the_wire_is_never_served() {
    for config in [strict(), Config::default()] {
        let dir = tempfile::tempdir().unwrap();
        let is_strict = config.verify == VerifyPolicy::Strict;
        let engine = Engine::new(open(dir.path(), 1), config);
        let mut rng = Rng::new(11);
        let before = metrics::global().fetch_corrupt_objects.get();
        // Small ones are checked in memory; large ones on the disk, so there are fewer of them.
        let small = if is_strict { 500..2250 } else { 500..600 };
        let sizes = small.chain(MIB + 1000..MIB + 1050);
        let mut flips = 0;
        for size in sizes {
            let bit = rng.below(size.min(MIB) * 8);
            let source = Arc::new(Scripted::new(size).script([Some(Fault::FlipBit(bit))]));
            let handle = engine.open(&source.object(), &source.source()).unwrap();
            let first = handle.read(0, size).await.unwrap();
            let is_right = first == source.data;
            assert!(
                is_right || !is_strict && size > MIB,
                "bit {bit} of {size} bytes was served"
            );
            let complete = handle.ensure(Class::Warm).await.unwrap();
            assert_eq!(complete.digest, Digest::of(&source.data));
            assert!(handle.read(0, size).await.unwrap() == source.data);
            assert!(source.requests().len() > 1, "not fetched again");
            flips += 1;
        }
        // Each was counted; and each was logged, by the same lines.
        assert_eq!(
            metrics::global().fetch_corrupt_objects.get() - before,
            flips
        );
    }
}

/// 200 flips in the data of an object that a process has left half done: half of them where it may be served before it is
/// verified.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_in_what_is_half_done_never_becomes_complete() {
    let mut rng = Rng::new(12);
    let dir = tempfile::tempdir().unwrap();
    for pass in 0..100u8 {
        let source = Arc::new(Scripted::new(2 * MIB + 10 + pass as usize));
        let object = source.object();
        {
            let store = open(dir.path(), pass + 1);
            let partial = store.partial(source.part(), object.size).unwrap();
            let lease = partial.claim(0..2).unwrap().unwrap();
            let data = &source.data[..2 * MIB];
            lease.commit(0, data, store::WriteMode::Cached).unwrap();
            partial.checkpoint().unwrap();
        }
        let mut parts = std::fs::read_dir(dir.path().join("partial")).unwrap();
        let is_data = |path: &PathBuf| path.extension().is_some_and(|e| e == "data");
        let data = parts.find_map(|part| Some(part.unwrap().path()).filter(is_data));
        let data = data.unwrap();
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(data)
            .unwrap();
        for _ in 0..2 {
            let bit = rng.below(2 * MIB * 8);
            let mut byte = [0];
            file.read_exact_at(&mut byte, bit as u64 / 8).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], bit as u64 / 8)
                .unwrap();
        }
        drop(file);
        // The next process believes the map, but not for long.
        let config = match pass % 2 {
            0 => strict(),
            _ => Config::default(),
        };
        let is_strict = config.verify == VerifyPolicy::Strict;
        let engine = Engine::new(open(dir.path(), pass + 101), config);
        let handle = engine.open(&object, &source.source()).unwrap();
        assert_eq!(handle.present_bytes(), 2 * MIB as u64);
        let read = handle.read(0, 3 * MIB).await.unwrap();
        assert!(read == source.data || !is_strict, "pass {pass}");
        let complete = handle.ensure(Class::Warm).await.unwrap();
        assert!(handle.read(0, 3 * MIB).await.unwrap() == source.data);
        assert_eq!(source.requests().iter().map(|r| r.start).min(), Some(0));
        std::fs::remove_file(object_path(dir.path(), &complete.digest)).unwrap();
    }
}

/// Opens a snapshotter as soon as the last one has let go of its directory.
pub(crate) async fn reopen(settings: &impl Fn() -> Settings) -> Arc<Snapshotter> {
    for _ in 0..1000 {
        match Snapshotter::open(settings(), Arc::new(NoRoots)) {
            Err(SnapshotError::Served(_)) => tokio::time::sleep(Duration::from_millis(5)).await,
            opened => return opened.unwrap(),
        }
    }
    panic!("the last one does not let go");
}

fn object_path(root: &Path, digest: &Digest) -> PathBuf {
    let hex = digest.hex();
    root.join("objects/sha256").join(&hex[..2]).join(hex)
}

/// 400 flips in the records of snapshots.
#[tokio::test]
async fn a_flipped_bit_in_a_snapshot_record_takes_that_one_alone() {
    let dir = tempfile::tempdir().unwrap();
    let settings = || Settings {
        root: dir.path().join("snapshots"),
        sync: false,
    };
    let open = || reopen(&settings);
    let names = ["a", "b", "c", "d"];
    {
        let snapshotter = open().await;
        for name in names {
            let made = snapshotter.create(Kind::Active, name, "", Default::default(), None);
            made.await.unwrap();
        }
    }
    let mut records: Vec<PathBuf> = std::fs::read_dir(settings().root.join("m"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    records.sort();
    assert_eq!(records.len(), names.len());
    let good: Vec<Vec<u8>> = records
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect();
    let mut rng = Rng::new(13);
    for pass in 0..200 {
        let one = rng.below(records.len());
        let other = (one + 1 + rng.below(records.len() - 1)) % records.len();
        for at in [one, other] {
            let mut bad = good[at].clone();
            let bit = rng.below(bad.len() * 8);
            bad[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&records[at], &bad).unwrap();
        }
        {
            let snapshotter = open().await;
            for (at, name) in names.iter().enumerate() {
                match snapshotter.usage(name).await {
                    Ok(_) => assert!(at != one && at != other, "pass {pass}: {name}"),
                    Err(error) => {
                        assert!(at == one || at == other, "pass {pass}: {name}: {error}");
                        assert_eq!(error.kind(), SnapshotErrorKind::NotFound, "{error}");
                    }
                }
            }
            // What it cannot tell apart from somebody's files is left alone.
            snapshotter.cleanup().await.unwrap();
        }
        for at in [one, other] {
            std::fs::write(&records[at], &good[at]).unwrap();
        }
        let snapshotter = open().await;
        for name in names {
            assert!(
                snapshotter.usage(name).await.unwrap().inodes > 0,
                "pass {pass}: {name}"
            );
        }
    }
}
