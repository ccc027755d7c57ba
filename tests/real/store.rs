//! The store on file systems that are full or cannot be written. Needs root, for the mounts.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use hearth::{
    chunk::CHUNK_SIZE,
    digest::{Digest, ObjectId},
    store::{ByteSize, Config, Store, StoreErrorKind, WriteMode},
};

/// A small file system, unmounted when dropped.
pub(crate) struct Mounted {
    pub(crate) dir: tempfile::TempDir,
}

impl Mounted {
    fn tmpfs(size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        run(
            "mount",
            &["-t", "tmpfs", "-o", &options, "tmpfs"],
            Some(dir.path()),
        );
        Self { dir }
    }

    /// ext4 on a loop device over `image`.
    pub(crate) fn ext4(image: &Path, mib: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::File::create(image)
            .unwrap()
            .set_len(mib << 20)
            .unwrap();
        run("mkfs.ext4", &["-q", "-m", "0"], Some(image));
        run(
            "mount",
            &["-o", "loop", image.to_str().unwrap()],
            Some(dir.path()),
        );
        Self { dir }
    }

    fn remount(&self, how: &str) {
        run(
            "mount",
            &["-o", &format!("remount,{how}")],
            Some(self.dir.path()),
        );
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("store")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &["-l"], Some(self.dir.path()));
    }
}

fn run(program: &str, args: &[&str], last: Option<&Path>) {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let status = Command::new(program)
        .args(args)
        .args(last)
        .env("PATH", path)
        .status();
    let status = status.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(status.success(), "{program} {args:?} {last:?}: {status}");
}

fn open(root: &Path) -> Arc<Store> {
    let config = Config {
        min_free: ByteSize(0),
        ..Config::default()
    };
    Store::open(root, &config).unwrap()
}

/// Fills an object until the disk is full; then frees space and goes on.
fn fill_a_full_disk(root: &Path, mode: WriteMode) {
    let store = open(root);
    // Everything but 6 MiB.
    let space = nix::sys::statvfs::statvfs(store.root()).unwrap();
    let free = space.blocks_available() * space.fragment_size();
    let ballast = store.root().join("../ballast");
    let file = std::fs::File::create(&ballast).unwrap();
    nix::fcntl::fallocate(
        &file,
        nix::fcntl::FallocateFlags::empty(),
        0,
        (free - (6 << 20)) as i64,
    )
    .unwrap();
    drop(file);
    let bytes = vec![7u8; 10 * CHUNK_SIZE as usize + 1];
    let digest = Digest::of(&bytes);
    let partial = store
        .partial(&ObjectId::Sha256(digest), bytes.len() as u64)
        .unwrap();
    let error = partial.allocate().unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::NoSpace, "{error}");
    let mut buf = hearth::store::AlignedBuf::with_capacity(CHUNK_SIZE as usize);
    let mut full = false;
    while let Some(mut lease) = partial.claim(0..partial.chunks()).unwrap() {
        let index = lease.chunks().start;
        drop(lease.split_off(index + 1));
        let range = hearth::chunk::bytes(index, bytes.len() as u64);
        buf.clear();
        let _ = buf.append(&bytes[range.start as usize..range.end as usize]);
        let Err(error) = lease.commit(index, &buf, mode) else {
            continue;
        };
        assert!(!full, "{error}");
        assert_eq!(error.kind(), StoreErrorKind::NoSpace, "{error}");
        assert!(error.to_string().contains("partial/sha256-"), "{error}");
        assert!(error.hint().is_some());
        assert!(!partial.present(index));
        full = true;
        std::fs::remove_file(&ballast).unwrap();
        // The file system frees the blocks in its own time.
        nix::unistd::syncfs(std::fs::File::open(store.root()).unwrap()).unwrap();
    }
    assert!(full);
    partial.checkpoint().unwrap();
    let complete = partial.finish(digest, partial.generation()).unwrap();
    let found = hearth::store::hash_file(complete.file(), |_| true).unwrap();
    assert_eq!(found, Some(digest));
}

#[test]
fn a_full_tmpfs_is_an_error_and_no_damage() {
    for mode in [WriteMode::Cached, WriteMode::Direct] {
        let mounted = Mounted::tmpfs("32m");
        fill_a_full_disk(&mounted.root(), mode);
    }
}

#[test]
fn a_full_ext4_is_an_error_and_no_damage() {
    let images = tempfile::tempdir().unwrap();
    for mode in [WriteMode::Cached, WriteMode::Direct] {
        let mounted = Mounted::ext4(&images.path().join("image"), 64);
        fill_a_full_disk(&mounted.root(), mode);
    }
}

/// Imports files of `size` bytes until the disk is full; then goes on where there is space again.
fn import_to_a_full_disk(root: &Path, size: usize) {
    let store = open(root);
    let bytes = |seed: usize| -> Vec<u8> {
        let mut bytes = vec![7u8; size];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes
    };
    let import = store.import().unwrap();
    let bring = |seed: usize| {
        let mut file = import.begin(size as u64)?;
        file.write(&bytes(seed))?;
        file.finish()
    };
    let committed = bring(0).unwrap().0;
    import.commit().unwrap();
    let error = (1..100_000).find_map(|seed| bring(seed).err()).unwrap();
    assert_eq!(error.kind(), StoreErrorKind::NoSpace, "{error}");
    assert!(error.to_string().contains("/imports/"), "{error}");
    let free = store.free_bytes().unwrap();
    drop(import);
    nix::unistd::syncfs(std::fs::File::open(store.root()).unwrap()).unwrap();
    assert!(store.free_bytes().unwrap() > free + (8 << 20));
    let left = std::fs::read_dir(store.root().join("imports")).unwrap();
    assert_eq!(left.count(), 0);
    assert!(store.has(&committed).unwrap());
    assert_eq!(store.usage().unwrap().objects, 1);
    let import = store.import().unwrap();
    let mut digests = Vec::new();
    for seed in 0..3 {
        let mut file = import.begin(size as u64).unwrap();
        file.write(&bytes(seed)).unwrap();
        digests.push(file.finish().unwrap().0);
    }
    import.commit().unwrap();
    assert!(digests.iter().all(|digest| store.has(digest).unwrap()));
}

#[test]
fn an_import_to_a_full_disk_leaves_nothing_behind() {
    let images = tempfile::tempdir().unwrap();
    for size in [20_000, 3 << 20] {
        let mounted = Mounted::tmpfs("32m");
        import_to_a_full_disk(&mounted.root(), size);
        drop(mounted);
        let mounted = Mounted::ext4(&images.path().join("image"), 64);
        import_to_a_full_disk(&mounted.root(), size);
    }
}

#[test]
fn a_read_only_store_can_be_read() {
    let mounted = Mounted::tmpfs("32m");
    let bytes = bytes::Bytes::from_static(b"still here");
    let id = ObjectId::located("x", "1", bytes.len() as u64);
    open(&mounted.root()).put(&[(id, bytes.clone())]).unwrap();
    mounted.remount("ro");
    let store = open(&mounted.root());
    assert!(!store.writable());
    assert_eq!(
        store.complete(&id).unwrap().unwrap().size,
        bytes.len() as u64
    );
    assert!(store.records().unwrap().is_empty());
    let other = ObjectId::Sha256(Digest::of(b"other"));
    let errors = [
        store.partial(&other, 5).unwrap_err(),
        store.put(&[(other, "other".into())]).unwrap_err(),
        store.pin("x", "y").unwrap_err(),
        store.collect(&Default::default()).unwrap_err(),
        store.import().unwrap_err(),
        store.put_index(&Digest::of(b"x"), b"y").unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), StoreErrorKind::ReadOnly, "{error}");
        assert!(error.hint().unwrap().contains("--store"));
    }
    // What is there is put without a write.
    store.put(&[(id, bytes)]).unwrap();
    let none = Store::open(&mounted.dir.path().join("none"), &Config::default());
    assert_eq!(none.unwrap_err().kind(), StoreErrorKind::ReadOnly);
    mounted.remount("rw");
}
