//! Objects: partial, complete, claimed, put.

use std::{
    fs,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
};

use super::*;
use hearth::store::{AlignedBuf, StoreErrorKind, hash_file};

#[test]
fn an_object_is_filled_finished_and_found() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for (seed, mode) in [(1, WriteMode::Cached), (2, WriteMode::Direct)] {
        let bytes = content(seed, 3 * MIB + 5000);
        let digest = Digest::of(&bytes);
        let id = ObjectId::Sha256(digest);
        assert!(store.complete(&id).unwrap().is_none());
        let partial = store.partial(&id, bytes.len() as u64).unwrap();
        assert!(Arc::ptr_eq(
            &partial,
            &store.partial(&id, bytes.len() as u64).unwrap()
        ));
        assert_eq!(partial.chunks(), 4);
        partial.allocate().unwrap();
        let mut buf = AlignedBuf::with_capacity(2 * MIB);
        assert_eq!(buf.append(&bytes[..2 * MIB]), 2 * MIB);
        let lease = partial.claim(0..9).unwrap().unwrap();
        assert_eq!(lease.chunks(), 0..4);
        lease.commit(0, &buf, mode).unwrap();
        let twice = lease.commit(1, &buf, mode).unwrap_err();
        assert_eq!(twice.kind(), StoreErrorKind::Invalid);
        assert_eq!(partial.present_run(0), 0..2);
        assert_eq!(partial.missing(0..9).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(partial.present_bytes(), 2 * CHUNK_SIZE);
        assert_eq!(
            partial
                .finish(digest, partial.generation())
                .unwrap_err()
                .kind(),
            StoreErrorKind::Invalid
        );
        buf.clear();
        let rest = buf.append(&bytes[2 * MIB..]);
        lease.commit(2, &buf[..rest], mode).unwrap();
        let mut read = vec![0; 6000];
        partial.read_at(&mut read, 2 * CHUNK_SIZE - 3000).unwrap();
        assert_eq!(read, bytes[2 * MIB - 3000..][..6000]);
        let other = Digest::of(b"other");
        assert_eq!(
            partial
                .finish(other, partial.generation())
                .unwrap_err()
                .kind(),
            StoreErrorKind::Damaged
        );
        assert!(partial.completed().unwrap().is_none());
        let complete = partial.finish(digest, partial.generation()).unwrap();
        assert_eq!(complete.size, bytes.len() as u64);
        assert_eq!(hash_file(complete.file(), |_| true).unwrap(), Some(digest));
        let mode = complete.file().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o444);
        assert!(partial.completed().unwrap().is_some());
        assert!(partial.claim(0..4).unwrap().is_none());
        assert_eq!(
            partial.discard(0).unwrap_err().kind(),
            StoreErrorKind::InUse
        );
        assert!(partial.finish(digest, partial.generation()).is_ok());
    }
    let left: Vec<_> = fs::read_dir(store.root().join("partial"))
        .unwrap()
        .collect();
    assert_eq!(left.len(), 1, "only the lock: {left:?}");
    let left = fs::read_dir(store.root().join("objects/tmp")).unwrap();
    assert_eq!(left.count(), 0);
}

#[test]
fn equal_content_of_different_origins_is_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(dir.path()), open(dir.path()));
    let bytes = content(3, MIB + 1);
    let digest = Digest::of(&bytes);
    let size = bytes.len() as u64;
    let ids = [
        ObjectId::located("s3://a/b", "1", size),
        ObjectId::located("gs://c/d", "7", size),
        ObjectId::Sha256(digest),
    ];
    // All three fetched before the first is complete.
    let partials: Vec<_> = ids
        .iter()
        .map(|id| two.partial(id, size).unwrap())
        .collect();
    for partial in &partials {
        fill(partial, &bytes, WriteMode::Cached);
    }
    let inodes: Vec<_> = partials
        .iter()
        .map(|partial| {
            use std::os::unix::fs::MetadataExt as _;
            let complete = partial.finish(digest, partial.generation()).unwrap();
            complete.file().metadata().unwrap().ino()
        })
        .collect();
    assert!(inodes.iter().all(|inode| *inode == inodes[0]));
    for id in &ids {
        assert_eq!(one.complete(id).unwrap().unwrap().digest, digest);
    }
    assert_eq!(one.usage().unwrap().objects, 1);
    assert_eq!(one.usage().unwrap().partials, 0);
    // A record whose object has gone leads nowhere, and is good again when the object is back.
    let hex = digest.hex();
    fs::remove_file(one.root().join("objects/sha256").join(&hex[..2]).join(&hex)).unwrap();
    assert!(one.complete(&ids[0]).unwrap().is_none());
    one.put(&[(ids[2], bytes.into())]).unwrap();
    assert!(one.complete(&ids[0]).unwrap().is_some());
}

#[test]
fn claims_exclude_each_other_across_opens_and_die_with_their_owner() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(dir.path()), open(dir.path()));
    let id = ObjectId::located("x", "1", 10 * CHUNK_SIZE);
    let bytes = content(4, 10 * MIB);
    let ours = one.partial(&id, 10 * CHUNK_SIZE).unwrap();
    let theirs = two.partial(&id, 10 * CHUNK_SIZE).unwrap();
    let mut a = ours.claim(2..5).unwrap().unwrap();
    assert_eq!(theirs.claim(0..10).unwrap().unwrap().chunks(), 0..2);
    let b = theirs.claim(3..9).unwrap().unwrap();
    assert_eq!(b.chunks(), 5..9);
    assert_eq!(ours.claim(2..10).unwrap().unwrap().chunks(), 9..10);
    assert!(ours.claim(2..9).unwrap().is_none());
    assert!(theirs.claim(2..9).unwrap().is_none());
    a.commit(2, chunk_of(&bytes, 2), WriteMode::Cached).unwrap();
    assert!(theirs.present(2));
    drop(a.split_off(4));
    assert_eq!(a.chunks(), 2..4);
    assert_eq!(theirs.claim(2..5).unwrap().unwrap().chunks(), 4..5);
    drop(a);
    assert_eq!(theirs.claim(2..5).unwrap().unwrap().chunks(), 3..5);
    drop((b, theirs, two));
    assert_eq!(ours.claim(2..10).unwrap().unwrap().chunks(), 3..10);
    // Whole chunks only.
    let lease = ours.claim(9..10).unwrap().unwrap();
    for bad in [&bytes[..5], &bytes[..2 * MIB]] {
        let error = lease.commit(9, bad, WriteMode::Cached).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Invalid);
    }
    assert!(!ours.present(9));
}

#[test]
fn a_partial_open_elsewhere_notices_that_it_was_finished() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(dir.path()), open(dir.path()));
    let bytes = content(5, 2 * MIB);
    let digest = Digest::of(&bytes);
    let id = ObjectId::located("y", "1", bytes.len() as u64);
    let ours = one.partial(&id, bytes.len() as u64).unwrap();
    let theirs = two.partial(&id, bytes.len() as u64).unwrap();
    fill(&ours, &bytes, WriteMode::Cached);
    assert!(theirs.all_present());
    ours.finish(digest, ours.generation()).unwrap();
    assert_eq!(theirs.completed().unwrap().unwrap().digest, digest);
    assert_eq!(
        theirs.finish(digest, theirs.generation()).unwrap().digest,
        digest
    );
    assert_eq!(hash_file(theirs.file(), |_| true).unwrap(), Some(digest));
    assert!(theirs.claim(0..2).unwrap().is_none());
    theirs.checkpoint().unwrap();
    assert!(
        !one.root()
            .join("partial")
            .join(format!("{}.map", id.to_string().replace(':', "-")))
            .exists()
    );
    // The next partial of this id is a new one.
    assert!(!two.partial(&id, bytes.len() as u64).unwrap().present(0));
}

#[test]
fn asking_how_much_is_here_leaves_no_file_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(dir.path()), open(dir.path()));
    let done = AtomicBool::new(false);
    let turn = AtomicU32::new(0);
    let named = |turn: u32| ObjectId::located("z", &turn.to_string(), MIB as u64);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Relaxed) {
                two.present_bytes(&named(turn.load(Relaxed)), MIB as u64);
            }
        });
        let bytes = content(8, MIB);
        for now in 0..300 {
            turn.store(now, Relaxed);
            let partial = one.partial(&named(now), MIB as u64).unwrap();
            fill(&partial, &bytes, WriteMode::Cached);
            partial
                .finish(Digest::of(&bytes), partial.generation())
                .unwrap();
        }
        done.store(true, Relaxed);
    });
    let left: Vec<_> = fs::read_dir(one.root().join("partial"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| !name.to_string_lossy().ends_with("lock"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn discarded_chunks_are_absent_for_all() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(dir.path()), open(dir.path()));
    let bytes = content(6, 3 * MIB);
    let id = ObjectId::Sha256(Digest::of(&bytes));
    let ours = one.partial(&id, bytes.len() as u64).unwrap();
    let theirs = two.partial(&id, bytes.len() as u64).unwrap();
    fill(&ours, &content(7, 3 * MIB), WriteMode::Cached);
    ours.checkpoint().unwrap();
    theirs.discard(theirs.generation()).unwrap();
    assert_eq!(ours.present_bytes(), 0);
    drop((ours, theirs));
    let again = one.partial(&id, bytes.len() as u64).unwrap();
    assert_eq!(again.present_bytes(), 0);
    fill(&again, &bytes, WriteMode::Direct);
    again
        .finish(Digest::of(&bytes), again.generation())
        .unwrap();
}

/// Who has hashed a generation that another process has discarded since says nothing of what is here.
#[test]
fn a_verdict_on_what_is_gone_discards_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(dir.path()), open(dir.path()));
    let bytes = content(5, 3 * MIB);
    let id = ObjectId::located("late", "1", bytes.len() as u64);
    let [ours, theirs] = [&one, &two].map(|s| s.partial(&id, bytes.len() as u64).unwrap());
    fill(&ours, &content(6, bytes.len()), WriteMode::Cached);
    let hashed = theirs.generation();
    ours.discard(ours.generation()).unwrap();
    fill(&ours, &bytes, WriteMode::Cached);
    theirs.discard(hashed).unwrap();
    assert!(ours.all_present());
    let late = theirs.finish(Digest::of(&bytes), hashed).unwrap_err();
    assert_eq!(late.kind(), StoreErrorKind::Invalid);
    ours.finish(Digest::of(&bytes), ours.generation()).unwrap();
}

/// A process dies while it makes chunks absent: some are gone, others not yet.
#[test]
fn who_dies_while_chunks_are_made_absent_leaves_what_is_durable() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let bytes = content(7, 4 * MIB);
    let id = ObjectId::located("half", "1", bytes.len() as u64);
    let partial = store.partial(&id, bytes.len() as u64).unwrap();
    let commit = |index: u64| {
        let lease = partial.claim(index..index + 1).unwrap().unwrap();
        let data = chunk_of(&bytes, index);
        lease.commit(index, data, WriteMode::Cached).unwrap();
    };
    commit(0);
    partial.checkpoint().unwrap();
    (1..4).for_each(commit);
    let name = id.to_string().replace(':', "-");
    let live = store.root().join(format!("partial/{name}.live"));
    let live = fs::File::options().write(true).open(live).unwrap();
    // Of the header, the generation; and the word of chunk 2.
    let half = partial.generation() + 1;
    live.write_all_at(&half.to_ne_bytes(), 84).unwrap();
    live.write_all_at(&[0; 4], 128 + 4 * 2).unwrap();
    assert_eq!(partial.generation(), half);
    commit(2);
    let late = partial.finish(Digest::of(&bytes), half).unwrap_err();
    assert_eq!(late.kind(), StoreErrorKind::Invalid);
    assert_eq!(
        (partial.present_run(0), partial.generation()),
        (0..1, half + 1)
    );
    assert_eq!(partial.present_bytes(), CHUNK_SIZE);
    fill(&partial, &bytes, WriteMode::Cached);
    partial.finish(Digest::of(&bytes), half + 1).unwrap();
}

/// Another reader sees, at any time, a generation and the chunks that are here. What it sees of the
/// generation that stays is not what was discarded.
#[test]
fn what_is_discarded_does_not_count_for_the_next_generation() {
    const CHUNKS: u64 = 4096;
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let id = ObjectId::located("wrong", "1", (CHUNKS - 1) * CHUNK_SIZE + 1);
    let partial = store.partial(&id, (CHUNKS - 1) * CHUNK_SIZE + 1).unwrap();
    let last = CHUNKS - 1;
    let seen = AtomicU32::new(u32::MAX);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                let generation = partial.generation();
                if partial.present(last) {
                    seen.store(generation, Relaxed);
                }
            }
        });
        for round in 0..500 {
            let lease = partial.claim(last..CHUNKS).unwrap().unwrap();
            lease.commit(last, b"x", WriteMode::Cached).unwrap();
            drop(lease);
            let before = partial.generation();
            while seen.load(Relaxed) != before {
                std::thread::yield_now();
            }
            partial.discard(before).unwrap();
            let after = partial.generation();
            // Long enough for what was read before the end of `discard` to be noted.
            std::thread::sleep(std::time::Duration::from_micros(200));
            let seen = seen.load(Relaxed);
            if seen == after {
                stop.store(true, Relaxed);
            }
            assert_ne!(seen, after, "round {round}");
        }
        stop.store(true, Relaxed);
    });
}

#[test]
fn empty_objects_work() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let digest = Digest::of(b"");
    let id = ObjectId::located("empty", "1", 0);
    let partial = store.partial(&id, 0).unwrap();
    assert!(partial.all_present());
    assert!(partial.claim(0..1).unwrap().is_none());
    partial.checkpoint().unwrap();
    assert_eq!(
        partial.finish(digest, partial.generation()).unwrap().size,
        0
    );
    let put = store.put(&[(ObjectId::Sha256(digest), bytes::Bytes::new())]);
    assert_eq!(put.unwrap()[0].size, 0);
}

#[test]
fn small_objects_are_put_in_batches_and_checked() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut batch = Vec::new();
    for seed in 0..300u64 {
        let bytes = bytes::Bytes::from(content(seed / 2, seed as usize / 2 * 10));
        let id = match seed % 2 {
            0 => ObjectId::Sha256(Digest::of(&bytes)),
            _ => ObjectId::located("many", &seed.to_string(), bytes.len() as u64),
        };
        batch.push((id, bytes));
    }
    for _ in 0..2 {
        let put = store.put(&batch).unwrap();
        for ((id, bytes), complete) in batch.iter().zip(&put) {
            let mut read = vec![0; bytes.len()];
            complete.file().read_exact_at(&mut read, 0).unwrap();
            assert_eq!(read, *bytes);
            assert_eq!(complete.digest, Digest::of(bytes));
            assert!(store.complete(id).unwrap().is_some());
        }
    }
    assert_eq!(store.usage().unwrap().objects, 150);
    let bad = ObjectId::Sha256(Digest::of(b"promise"));
    let error = store
        .put(&[
            (ObjectId::located("z", "1", 1), "z".into()),
            (bad, "lie".into()),
        ])
        .unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Damaged);
    assert!(error.to_string().contains(&bad.to_string()));
    assert_eq!(store.usage().unwrap().objects, 150);
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(dir.path()), open(dir.path()));
    let id = ObjectId::Sha256(Digest::of(b"x"));
    for size in [u64::MAX, hearth::store::MAX_OBJECT + 1] {
        let error = one.partial(&id, size).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Invalid);
    }
    let held = one.partial(&id, 5).unwrap();
    for store in [&one, &two] {
        let error = store.partial(&id, 6).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Invalid);
    }
    drop(held);
    assert_eq!(two.partial(&id, 6).unwrap().size(), 6);
}
