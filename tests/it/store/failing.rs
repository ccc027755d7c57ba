//! A disk that fails from a given call on, until it is well again; and the store on it.

use std::{
    ffi::OsString,
    fs::File,
    ops::Range,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::SeqCst},
    },
};

use super::*;
use hearth::{
    disk::{self, Disk, DiskError, DiskFile, Open, RealDisk, Space, Stat},
    store::{CollectOptions, StoreError, StoreErrorKind, VerifyScope, hash_file},
};

#[derive(Debug)]
struct Plan {
    calls: AtomicU64,
    from: AtomicU64,
    errno: AtomicI32,
    failed: AtomicBool,
    /// A complete object was removed.
    removed: AtomicBool,
    /// Where objects on their way cannot be read, and whether they can be once that is written anew.
    bad: Mutex<Option<(Range<u64>, bool)>>,
    /// A file that cannot be read until another takes its place.
    bad_file: Mutex<Option<std::path::PathBuf>>,
    /// What is free: at first, how often that is said after something was removed, and then.
    free: Mutex<Option<(u64, u32, u64)>>,
}

/// Wraps the real disk; never syncs.
#[derive(Debug, Clone)]
pub(crate) struct FailingDisk(Arc<Plan>);

/// What a call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    /// Takes space, or makes it durable: fails on a full disk.
    Write,
    /// Gives space back.
    Remove,
    Read,
}

impl FailingDisk {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Plan {
            calls: AtomicU64::new(0),
            from: AtomicU64::new(u64::MAX),
            errno: AtomicI32::new(0),
            failed: AtomicBool::new(false),
            removed: AtomicBool::new(false),
            bad: Mutex::default(),
            bad_file: Mutex::default(),
            free: Mutex::default(),
        }))
    }

    /// Fails with `errno` after `calls` more calls that may fail so.
    pub(crate) fn fail_after(&self, calls: u64, errno: i32) {
        self.0.errno.store(errno, SeqCst);
        self.0.failed.store(false, SeqCst);
        self.0.from.store(self.0.calls.load(SeqCst) + calls, SeqCst);
    }

    /// Bytes of objects on their way that cannot be read, nor written; `until_written`: the disk has
    /// other sectors to put in their place.
    pub(crate) fn bad_sectors(&self, bytes: Range<u64>, until_written: bool) {
        *self.0.bad.lock().unwrap() = Some((bytes, until_written));
    }

    /// A file that cannot be read until another takes its place.
    pub(crate) fn bad_file(&self, path: &Path) {
        *self.0.bad_file.lock().unwrap() = Some(path.to_owned());
    }

    /// A file system that shows what was freed only when it was asked some times since.
    pub(crate) fn frees_late(&self, free: u64, asked: u32, then: u64) {
        *self.0.free.lock().unwrap() = Some((free, asked, then));
    }

    pub(crate) fn heal(&self) {
        self.0.from.store(u64::MAX, SeqCst);
        self.0.errno.store(0, SeqCst);
    }

    /// Whether a call has failed since `fail_after`.
    pub(crate) fn has_failed(&self) -> bool {
        self.0.failed.load(SeqCst)
    }

    fn call(&self, call: Call, what: &Path) -> disk::Result<()> {
        let errno = self.0.errno.load(SeqCst);
        let may_fail = match call {
            Call::Write => true,
            // A file system that cannot be read any more.
            Call::Read | Call::Remove => errno == libc::EIO,
        };
        if !may_fail || self.0.calls.fetch_add(1, SeqCst) < self.0.from.load(SeqCst) {
            return Ok(());
        }
        self.0.failed.store(true, SeqCst);
        let error = std::io::Error::from_raw_os_error(errno);
        Err(DiskError::new("use", what, error))
    }
}

#[derive(Debug)]
struct FailingFile {
    disk: FailingDisk,
    path: std::path::PathBuf,
    inner: Arc<dyn DiskFile>,
}

impl FailingFile {
    fn call(&self, call: Call) -> disk::Result<()> {
        self.disk.call(call, &self.path)
    }

    fn unusable(&self, what: &'static str) -> DiskError {
        DiskError::new(
            what,
            &self.path,
            std::io::Error::from_raw_os_error(libc::EIO),
        )
    }

    fn is_bad(&self, bad: &Option<(Range<u64>, bool)>, offset: u64, len: usize) -> bool {
        let within = |bytes: &Range<u64>| offset < bytes.end && offset + len as u64 > bytes.start;
        let is_data = self.path.extension().is_some_and(|e| e == "data");
        is_data && bad.as_ref().is_some_and(|(bytes, _)| within(bytes))
    }
}

impl Disk for FailingDisk {
    fn open(&self, path: &Path, how: Open) -> disk::Result<Arc<dyn DiskFile>> {
        let makes = matches!(how, Open::Create | Open::New) && !path.exists();
        self.call(if makes { Call::Write } else { Call::Read }, path)?;
        Ok(Arc::new(FailingFile {
            disk: self.clone(),
            path: path.to_owned(),
            inner: RealDisk.open(path, how)?,
        }))
    }
    fn rename(&self, from: &Path, to: &Path) -> disk::Result<()> {
        self.call(Call::Write, to)?;
        let mut bad = self.0.bad_file.lock().unwrap();
        *bad = bad.take().filter(|bad| bad != to);
        drop(bad);
        RealDisk.rename(from, to)
    }
    fn rename_new(&self, from: &Path, to: &Path) -> disk::Result<bool> {
        self.call(Call::Write, to)?;
        RealDisk.rename_new(from, to)
    }
    fn link(&self, from: &Path, to: &Path) -> disk::Result<bool> {
        self.call(Call::Write, to)?;
        RealDisk.link(from, to)
    }
    fn unlink(&self, path: &Path) -> disk::Result<bool> {
        self.call(Call::Remove, path)?;
        if path.to_string_lossy().contains("objects/sha256") {
            self.0.removed.store(true, SeqCst);
        }
        RealDisk.unlink(path)
    }
    fn create_dir(&self, path: &Path) -> disk::Result<bool> {
        self.call(Call::Write, path)?;
        RealDisk.create_dir(path)
    }
    fn remove_dir(&self, path: &Path) -> disk::Result<bool> {
        self.call(Call::Remove, path)?;
        RealDisk.remove_dir(path)
    }
    fn sync_dir(&self, path: &Path) -> disk::Result<()> {
        self.call(Call::Write, path)
    }
    fn list(&self, path: &Path) -> disk::Result<Vec<OsString>> {
        self.call(Call::Read, path)?;
        RealDisk.list(path)
    }
    fn stat(&self, path: &Path) -> disk::Result<Option<Stat>> {
        self.call(Call::Read, path)?;
        RealDisk.stat(path)
    }
    fn touch(&self, path: &Path) -> disk::Result<()> {
        self.call(Call::Remove, path)?;
        RealDisk.touch(path)
    }
    fn space(&self, path: &Path) -> disk::Result<Space> {
        let real = RealDisk.space(path)?;
        let mut late = self.0.free.lock().unwrap();
        let free = match &mut *late {
            None => real.free,
            Some((_, 0, then)) => *then,
            Some((free, asked, _)) => {
                if self.0.removed.load(SeqCst) {
                    *asked -= 1;
                }
                *free
            }
        };
        Ok(Space { free, ..real })
    }
    fn writable(&self, path: &Path) -> bool {
        RealDisk.writable(path)
    }
    fn boot_id(&self) -> disk::Result<[u8; 16]> {
        RealDisk.boot_id()
    }
}

impl DiskFile for FailingFile {
    fn file(&self) -> &File {
        self.inner.file()
    }
    fn write_at(&self, data: &[u8], offset: u64) -> disk::Result<()> {
        let failed = self.call(Call::Write);
        let mut bad = self.disk.0.bad.lock().unwrap();
        if self.is_bad(&bad, offset, data.len()) {
            *bad = bad.take().filter(|(_, until_written)| !until_written);
            if bad.is_some() {
                return Err(self.unusable("write"));
            }
        }
        drop(bad);
        // What fails has written a part, of whole blocks where it went past the page cache.
        let part = match failed {
            Ok(()) => data,
            Err(_) => &data[..data.len() / 8192 * 4096],
        };
        self.inner.write_at(part, offset)?;
        failed
    }
    fn sync_data(&self) -> disk::Result<()> {
        self.call(Call::Write)
    }
    fn sync_fs(&self) -> disk::Result<()> {
        self.call(Call::Write)
    }
    fn set_len(&self, len: u64) -> disk::Result<()> {
        self.call(Call::Write)?;
        self.inner.set_len(len)
    }
    fn allocate(&self, len: u64) -> disk::Result<()> {
        self.call(Call::Write)?;
        self.inner.allocate(len)
    }
    fn set_mode(&self, mode: u32) -> disk::Result<()> {
        self.call(Call::Remove)?;
        self.inner.set_mode(mode)
    }
    fn stat(&self) -> disk::Result<Stat> {
        self.call(Call::Read)?;
        self.inner.stat()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> disk::Result<()> {
        self.call(Call::Read)?;
        if self.disk.0.bad_file.lock().unwrap().as_ref() == Some(&self.path) {
            return Err(self.unusable("read"));
        }
        if self.is_bad(&self.disk.0.bad.lock().unwrap(), offset, buf.len()) {
            return Err(self.unusable("read"));
        }
        self.inner.read_at(buf, offset)
    }
}

/// What the scenario stores.
struct Goods {
    large: Vec<u8>,
    small: Vec<Vec<u8>>,
    files: Vec<Vec<u8>>,
    known: Artifact,
    image: hearth::store::ImageRecord,
}

impl Goods {
    fn new() -> Self {
        let large = content(1, MIB + 5000);
        let small = vec![content(2, 5000), content(3, 10)];
        let files = (10..22).map(|seed| content(seed, 700)).collect();
        let known = artifact("hf://a/b", &[&large, &small[0], &small[1]], true);
        let image = images::image("hf://a/b", &["base", "top"]);
        Self {
            large,
            small,
            files,
            known,
            image,
        }
    }

    /// Does everything that changes a store; may be done again.
    fn store(&self, store: &Arc<Store>) -> Result<(), StoreError> {
        store.guard("hf://a/b", || Ok("own".into()))?;
        store.record(&self.known)?;
        let _hold = store.hold("hf://a/b")?;
        store.pin("hf://a/b", "test")?;
        store.pin("hf://a/b", "passing")?;
        store.unpin("hf://a/b", "passing")?;
        let ids: Vec<_> = self.known.objects.iter().map(|o| o.id).collect();
        let small = ids[1..].iter().zip(&self.small);
        let small: Vec<_> = small.map(|(id, b)| (*id, b.clone().into())).collect();
        store.put(&small)?;
        if store.complete(&ids[0])?.is_none() {
            let partial = store.partial(&ids[0], self.large.len() as u64)?;
            partial.allocate()?;
            while let Some(lease) = partial.claim(0..partial.chunks())? {
                for at in lease.chunks() {
                    lease.commit(at, chunk_of(&self.large, at), WriteMode::Cached)?;
                }
                partial.checkpoint()?;
            }
            partial.finish(Digest::of(&self.large), partial.generation())?;
        }
        let import = store.import()?;
        for bytes in &self.files {
            let mut file = import.begin(bytes.len() as u64)?;
            file.write(bytes)?;
            file.finish()?;
        }
        import.commit()?;
        store.put_index(&self.image.layers[0].blob, &self.small[0])?;
        store.record_image(&self.image)?;
        let root = self.known.digest();
        store.write_root_image(&root, |to| to.write_all(&self.small[0]))?;
        drop(import);
        store.remove("old")?;
        store.collect(&CollectOptions::default())?;
        Ok(())
    }

    /// Nothing in the store is torn, whatever is there.
    fn check_sound(&self, store: &Arc<Store>, case: &str) {
        let report = store.verify(VerifyScope::All, false, |_| true).unwrap();
        assert_eq!(report.damaged, [], "{case}");
        let root = std::fs::read(store.root_image(&self.known.digest())).ok();
        assert!(root.is_none_or(|found| found == self.small[0]), "{case}");
        let guard = store.guarded("hf://a/b").unwrap();
        let is_recorded = store.artifact("hf://a/b").unwrap().is_some();
        assert!(guard.is_some() || !is_recorded, "{case}");
        assert!(guard.is_none_or(|note| note == "own"), "{case}");
        let id = self.known.objects[0].id;
        if store.complete(&id).unwrap().is_none() {
            let partial = store.partial(&id, self.large.len() as u64).unwrap();
            for at in (0..partial.chunks()).filter(|at| partial.present(*at)) {
                let mut found = vec![0; chunk_of(&self.large, at).len()];
                partial.read_at(&mut found, at * CHUNK_SIZE).unwrap();
                assert!(found == chunk_of(&self.large, at), "{case}: chunk {at}");
            }
        }
    }

    /// Everything is there.
    fn check_whole(&self, store: &Arc<Store>, case: &str) {
        self.check_sound(store, case);
        let (record, found) = store.artifact("hf://a/b").unwrap().unwrap();
        assert_eq!(
            (found, record.pins),
            (self.known.clone(), vec!["test".to_owned()]),
            "{case}"
        );
        let contents = [&self.large, &self.small[0], &self.small[1]];
        for (object, right) in self.known.objects.iter().zip(contents) {
            let complete = store.complete(&object.id).unwrap().unwrap();
            let found = hash_file(complete.file(), |_| true).unwrap();
            assert_eq!(found, Some(Digest::of(right)), "{case}");
        }
        assert_eq!(
            store.image("hf://a/b").unwrap().as_ref(),
            Some(&self.image),
            "{case}"
        );
        let index = store.index(&self.image.layers[0].blob).unwrap();
        assert!(index.as_ref() == Some(&self.small[0]), "{case}");
        // Nothing of the failed attempts is left, as far as a collection may know.
        assert_eq!(store.usage().unwrap().partials, 0, "{case}");
        let imports = std::fs::read_dir(store.root().join("imports")).unwrap();
        assert_eq!(imports.count(), 0, "{case}");
    }
}

#[test]
fn a_store_bears_a_disk_that_is_full_at_any_call() {
    at_calls(libc::ENOSPC, StoreErrorKind::NoSpace, 1);
}

/// Every third call: here reading fails too.
#[test]
fn a_store_bears_a_disk_that_breaks_at_any_call() {
    at_calls(libc::EIO, StoreErrorKind::Io, 3);
}

#[test]
fn a_store_bears_a_disk_that_turns_read_only() {
    at_calls(libc::EROFS, StoreErrorKind::ReadOnly, 4);
}

fn at_calls(errno: i32, kind: StoreErrorKind, step: usize) {
    let goods = Goods::new();
    for calls in (0u64..).step_by(step) {
        let dir = tempfile::tempdir().unwrap();
        let disk = FailingDisk::new();
        let root = dir.path().join("store");
        let store = Store::open_on(Arc::new(disk.clone()), &root, &config()).unwrap();
        store.record(&artifact("old", &[b"old"], false)).unwrap();
        disk.fail_after(calls, errno);
        let done = goods.store(&store);
        let case = format!("after {calls} calls: {done:?}");
        if !disk.has_failed() {
            done.unwrap();
            assert!(calls > 100, "{calls}");
            break;
        }
        if let Err(error) = done {
            assert_eq!(error.kind(), kind, "{case}");
            assert!(
                error.to_string().contains(dir.path().to_str().unwrap()),
                "{case}"
            );
            assert!(error.hint().is_some(), "{case}");
        }
        // Who looks meanwhile sees nothing torn, nor does who comes after a restart.
        goods.check_sound(&super::open(dir.path()), &case);
        disk.heal();
        goods.check_sound(&store, &case);
        goods
            .store(&store)
            .unwrap_or_else(|error| panic!("{case}: then {error}"));
        goods.check_whole(&store, &case);
    }
}

/// XFS and btrfs free in the background: what an admission has evicted for is not refused meanwhile.
#[test]
fn space_that_shows_late_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FailingDisk::new();
    let store = Store::open_on(Arc::new(disk.clone()), dir.path(), &config()).unwrap();
    let old = artifact("hf://a/old@main", &[&content(1, 3 * MIB)], false);
    store.record(&old).unwrap();
    let batch = [(old.objects[0].id, content(1, 3 * MIB).into())];
    drop(store.put(&batch).unwrap());
    disk.frees_late(MIB as u64, 4, 5 * MIB as u64);
    let new = artifact("hf://a/new@main", &[&content(2, 2 * MIB)], false);
    store.record(&new).unwrap();
    let room = store.admit(&new).unwrap();
    assert!(store.artifact("hf://a/old@main").unwrap().is_none());
    drop(room);
}

/// The words that say which chunks are here are mapped: what of them cannot be read must not be.
#[test]
fn chunk_words_that_cannot_be_read_are_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FailingDisk::new();
    let open = || Store::open_on(Arc::new(disk.clone()), dir.path(), &config()).unwrap();
    let bytes = content(1, 3 * MIB);
    let id = ObjectId::Sha256(Digest::of(&bytes));
    let store = open();
    let partial = store.partial(&id, bytes.len() as u64).unwrap();
    let lease = partial.claim(0..2).unwrap().unwrap();
    lease
        .commit(0, &bytes[..2 * MIB], WriteMode::Cached)
        .unwrap();
    partial.checkpoint().unwrap();
    let stem = dir
        .path()
        .join("partial")
        .join(id.to_string().replace(':', "-"));
    disk.bad_file(&stem.with_extension("live"));
    // Who has it open already goes on; another process does without.
    let error = open().partial(&id, bytes.len() as u64).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Io);
    drop((lease, partial));
    let again = open().partial(&id, bytes.len() as u64).unwrap();
    assert_eq!(
        again.present_bytes(),
        2 * MIB as u64,
        "from the durable map"
    );
}

#[test]
fn a_pin_that_is_there_needs_no_room() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FailingDisk::new();
    let root = dir.path().join("store");
    let store = Store::open_on(Arc::new(disk.clone()), &root, &config()).unwrap();
    store.pin("hf://a/b", "volume").unwrap();
    // Its directory may be made durable once more.
    disk.fail_after(1, libc::ENOSPC);
    store.pin("hf://a/b", "volume").unwrap();
    assert!(!disk.has_failed());
    let error = store.pin("hf://a/b", "another").unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::NoSpace);
    disk.heal();
    assert_eq!(store.pins("hf://a/b").unwrap(), ["volume"]);
}
