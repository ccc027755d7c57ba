//! Several processes on one store, and their deaths.
//!
//! The child is this test binary, running the ignored test `child` with its orders in the
//! environment.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use super::*;
use hearth::store::hash_file;

const LEN: usize = 24 * MIB + 999;

fn spawn(root: &Path, orders: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "store::processes::child",
            "--ignored",
            "--nocapture",
        ])
        .env("HEARTH_TEST_CHILD", orders)
        .env("HEARTH_TEST_ROOT", root)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap()
}

fn id() -> ObjectId {
    ObjectId::located("processes", "1", LEN as u64)
}

#[test]
#[ignore = "the code of the child processes of the other tests"]
fn child() {
    let Ok(orders) = std::env::var("HEARTH_TEST_CHILD") else {
        return;
    };
    let root = std::env::var_os("HEARTH_TEST_ROOT").unwrap();
    let bytes = content(11, LEN);
    let store = Store::open(Path::new(&root), &config()).unwrap();
    let partial = store.partial(&id(), LEN as u64).unwrap();
    // Who starts late, after the others have finished, has opened another partial object.
    if store.complete(&id()).unwrap().is_some() {
        partial.abandon().unwrap();
        return;
    }
    let mode = match orders.as_str() {
        "direct" => WriteMode::Direct,
        _ => WriteMode::Cached,
    };
    let mut buf = hearth::store::AlignedBuf::with_capacity(MIB);
    let mut filled = 0;
    while !partial.all_present() && partial.completed().unwrap().is_none() {
        let Some(mut lease) = partial.claim(0..partial.chunks()).unwrap() else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        drop(lease.split_off(lease.chunks().start + 3));
        // In any order.
        for index in lease.chunks().rev() {
            buf.clear();
            assert_eq!(
                buf.append(chunk_of(&bytes, index)),
                chunk_of(&bytes, index).len()
            );
            lease.commit(index, &buf, mode).unwrap();
            filled += 1;
            println!("\nfilled {index}");
            if orders == "pause" {
                std::thread::sleep(Duration::from_millis(30));
            }
        }
        if filled % 5 == 0 {
            partial.checkpoint().unwrap();
        }
    }
    let complete = partial
        .finish(Digest::of(&bytes), partial.generation())
        .unwrap();
    assert_eq!(complete.size, LEN as u64);
    println!("\nfinished");
}

/// The chunks that a child says it has filled, until it ends or has filled `limit`.
fn filled(child: &mut Child, limit: usize) -> Vec<u64> {
    let out = BufReader::new(child.stdout.as_mut().unwrap());
    let mut chunks = Vec::new();
    for line in out.lines() {
        let line = line.unwrap();
        if let Some(index) = line.strip_prefix("filled ") {
            chunks.push(index.parse().unwrap());
        }
        if chunks.len() >= limit {
            break;
        }
    }
    chunks
}

#[test]
fn processes_fill_one_object_together_and_each_chunk_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut children: Vec<_> = ["cached", "direct", "cached", "direct"]
        .iter()
        .map(|orders| spawn(store.root(), orders))
        .collect();
    let mut all = Vec::new();
    for child in &mut children {
        all.extend(filled(child, usize::MAX));
        assert!(child.wait().unwrap().success());
    }
    all.sort();
    assert_eq!(all, (0..25).collect::<Vec<_>>());
    let bytes = content(11, LEN);
    let complete = store.complete(&id()).unwrap().unwrap();
    let found = hash_file(complete.file(), |_| true).unwrap();
    assert_eq!(found, Some(Digest::of(&bytes)));
    assert_eq!(store.usage().unwrap().partials, 0);
}

#[test]
fn a_killed_process_loses_nothing_and_blocks_nobody() {
    let bytes = content(11, LEN);
    for limit in [1, 3, 7] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let mut child = spawn(store.root(), "pause");
        let before = filled(&mut child, limit);
        // Its lease is held while it lives.
        child.kill().unwrap();
        child.wait().unwrap();
        let partial = store.partial(&id(), LEN as u64).unwrap();
        for index in 0..partial.chunks() {
            assert!(
                partial.present(index) || !before.contains(&index),
                "lost {index}"
            );
            if partial.present(index) {
                let mut found = vec![0; chunk_of(&bytes, index).len()];
                partial.read_at(&mut found, index * CHUNK_SIZE).unwrap();
                assert!(found == chunk_of(&bytes, index), "wrong {index}");
            }
        }
        fill(&partial, &bytes, WriteMode::Cached);
        partial
            .finish(Digest::of(&bytes), partial.generation())
            .unwrap();
    }
}

#[test]
fn the_live_map_does_not_outlive_the_boot_or_its_own_damage() {
    use super::sim::SimDisk;
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let bytes = content(12, 4 * MIB);
    let id = ObjectId::located("boots", "1", bytes.len() as u64);
    let open = |boot| {
        let store = Store::open_on(Arc::new(SimDisk::quick(boot)), &root, &config()).unwrap();
        store.partial(&id, bytes.len() as u64).unwrap()
    };
    let partial = open(1);
    let lease = partial.claim(0..4).unwrap().unwrap();
    lease
        .commit(0, chunk_of(&bytes, 0), WriteMode::Cached)
        .unwrap();
    partial.checkpoint().unwrap();
    lease
        .commit(1, chunk_of(&bytes, 1), WriteMode::Cached)
        .unwrap();
    drop((lease, partial));
    assert_eq!(open(1).present_run(0), 0..2);
    let name = id.to_string().replace(':', "-");
    let live = root.join(format!("partial/{name}.live"));
    let map = root.join(format!("partial/{name}.map"));
    // Any flipped bit of a word makes one chunk absent, of the header all but the durable ones.
    let good = std::fs::read(&live).unwrap();
    for at in (0..good.len()).filter(|at| !(80..88).contains(at)) {
        let mut bad = good.clone();
        bad[at] ^= 0x04;
        std::fs::write(&live, &bad).unwrap();
        let partial = open(1);
        match at {
            0..128 => assert_eq!(partial.present_run(0), 0..1, "{at}"),
            128..132 => assert!(!partial.present(0) && partial.present(1)),
            132..136 => assert_eq!(partial.present_run(0), 0..1),
            _ => assert_eq!(partial.present_run(0), 0..2),
        }
    }
    assert_eq!(open(2).present_run(0), 0..1);
    // A damaged map holds nothing.
    let good = std::fs::read(&map).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x01;
        std::fs::write(&map, &bad).unwrap();
        assert_eq!(open(3 + at as u8 % 100).present_bytes(), 0, "{at}");
        std::fs::write(&map, &good[..at]).unwrap();
        assert_eq!(open(103 + at as u8 % 100).present_bytes(), 0, "{at}");
    }
    std::fs::write(&map, &good).unwrap();
    assert_eq!(open(250).present_run(0), 0..1);
    // Of a data file that was cut nothing counts.
    let data = root.join(format!("partial/{name}.data"));
    let file = std::fs::File::options().write(true).open(data).unwrap();
    file.set_len(CHUNK_SIZE).unwrap();
    assert_eq!(open(251).present_bytes(), 0);
}
