//! A disk that knows what a power failure would leave.
//!
//! [`SimDisk`] works on real files, and keeps beside them what is durable: the content of each
//! file as of its last sync, and the names as of the last sync of their directory. Before each
//! operation it calls a hook, which may build images of the disk after a power failure at that point.
//! What was not synced may be there or not: each name on its own, each page on its own. A rename is atomic.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    fs::{self, File},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use hearth::disk::{Disk, DiskError, DiskFile, Open, RealDisk, Result, Space, Stat};

/// What of the unsynced a power failure leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    Nothing,
    All,
    /// Chosen by this seed.
    Some(u64),
}

#[derive(Debug, Default)]
pub(crate) struct Image {
    inodes: HashMap<u64, Inode>,
    /// Durable names: `None` is a directory.
    names: BTreeMap<PathBuf, Option<u64>>,
    /// Changes of names that are not durable, in order.
    pending: Vec<Change>,
}

#[derive(Debug)]
struct Inode {
    /// Keeps the inode, so that its number is not used again.
    file: File,
    durable: Vec<u8>,
}

#[derive(Debug, Clone)]
struct Change {
    remove: Option<PathBuf>,
    set: Option<(PathBuf, Option<u64>)>,
}

impl Change {
    fn touches(&self, dir: &Path) -> bool {
        let paths = self.remove.iter().chain(self.set.iter().map(|(p, _)| p));
        paths.into_iter().any(|path| path.parent() == Some(dir))
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, Option<u64>>) {
        if let Some(path) = &self.remove
            && let Some(None) = names.remove(path)
        {
            // It was empty, whatever else of that is durable.
            names.retain(|name, _| !name.starts_with(path));
        }
        if let Some((path, node)) = &self.set {
            names.insert(path.clone(), *node);
        }
    }
}

impl Image {
    fn see(&mut self, file: &File) -> u64 {
        let inode = file.metadata().unwrap().ino();
        self.inodes.entry(inode).or_insert_with(|| {
            // Opened anew: a duplicate would share, and so keep, the locks of the store.
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
            Inode {
                file: File::open(path).unwrap(),
                durable: Vec::new(),
            }
        });
        inode
    }

    fn sync_names(&mut self, chosen: impl Fn(&Change) -> bool) {
        let (synced, pending) = std::mem::take(&mut self.pending)
            .into_iter()
            .partition(|change| chosen(change));
        self.pending = pending;
        let synced: Vec<Change> = synced;
        for change in synced {
            change.apply(&mut self.names);
        }
    }

    /// Builds in `to` what a power failure leaves of `from`.
    pub(crate) fn build(&self, from: &Path, to: &Path, names: Left, data: Left) {
        let mut left = self.names.clone();
        for (at, change) in self.pending.iter().enumerate() {
            let kept = match names {
                Left::Nothing => false,
                Left::All => true,
                Left::Some(seed) => coin(seed, at as u64),
            };
            // What was made in a directory that is lost is lost with it.
            let parent = change.set.as_ref().and_then(|(path, _)| path.parent());
            if kept && parent.is_none_or(|p| p == from || left.contains_key(p)) {
                change.apply(&mut left);
            }
        }
        fs::create_dir_all(to).unwrap();
        for (path, node) in &left {
            let path = to.join(path.strip_prefix(from).unwrap());
            match node {
                None => fs::create_dir_all(&path).unwrap(),
                Some(inode) => fs::write(&path, self.inodes[inode].content(data, *inode)).unwrap(),
            }
        }
    }
}

impl Inode {
    fn content(&self, left: Left, inode: u64) -> Vec<u8> {
        let mut live = vec![0; self.file.metadata().unwrap().len() as usize];
        self.file.read_exact_at(&mut live, 0).unwrap();
        match left {
            Left::Nothing => self.durable.clone(),
            Left::All => live,
            Left::Some(seed) => {
                let seed = seed ^ inode;
                let long = coin(seed, u64::MAX);
                let len = if long { live.len() } else { self.durable.len() };
                let mut mixed = vec![0; len];
                for (at, page) in mixed.chunks_mut(4096).enumerate() {
                    let source = match coin(seed, at as u64) {
                        true => &live,
                        false => &self.durable,
                    };
                    let start = (at * 4096).min(source.len());
                    let end = (start + page.len()).min(source.len());
                    page[..end - start].copy_from_slice(&source[start..end]);
                }
                mixed
            }
        }
    }
}

fn coin(seed: u64, at: u64) -> bool {
    let mut x = (seed ^ at.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(0x1234_5678);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ x >> 31) & 1 == 1
}

type Hook = Box<dyn FnMut(&Image, &str) + Send>;

pub(crate) struct SimDisk {
    image: Arc<Mutex<Image>>,
    hook: Arc<Mutex<Option<Hook>>>,
    /// Calls of `list`, which opening a store must not make.
    pub(crate) lists: std::sync::atomic::AtomicU64,
    pub(crate) boot: [u8; 16],
    /// Whether a sync of content fails.
    failing: Arc<AtomicBool>,
    /// Whether it keeps an image; else it is only a disk without syncs, after another boot.
    tracks: bool,
}

impl std::fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SimDisk")
    }
}

struct SimFile {
    failing: Arc<AtomicBool>,
    inner: Arc<dyn DiskFile>,
    inode: u64,
    image: Arc<Mutex<Image>>,
    hook: Arc<Mutex<Option<Hook>>>,
}

impl std::fmt::Debug for SimFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

fn before(hook: &Mutex<Option<Hook>>, image: &Mutex<Image>, what: &str) {
    if let Some(hook) = &mut *hook.lock().unwrap() {
        hook(&image.lock().unwrap(), what);
    }
}

impl SimDisk {
    pub(crate) fn new(boot: u8) -> Self {
        Self {
            image: Arc::default(),
            hook: Arc::default(),
            lists: Default::default(),
            failing: Arc::default(),
            boot: [boot; 16],
            tracks: true,
        }
    }

    /// A disk that never syncs and keeps no image.
    pub(crate) fn quick(boot: u8) -> Self {
        Self {
            tracks: false,
            ..Self::new(boot)
        }
    }

    /// Calls `hook` before each operation that changes or syncs something.
    pub(crate) fn before_each(&self, hook: impl FnMut(&Image, &str) + Send + 'static) {
        *self.hook.lock().unwrap() = Some(Box::new(hook));
    }

    /// Whether syncs of content fail from now on.
    pub(crate) fn fail_syncs(&self, fail: bool) {
        self.failing.store(fail, Ordering::Relaxed);
    }

    /// Calls the hook once more and drops it.
    pub(crate) fn end(&self) {
        self.before("the end");
        *self.hook.lock().unwrap() = None;
    }

    fn before(&self, what: &str) {
        before(&self.hook, &self.image, what);
    }

    fn change(&self, remove: Option<&Path>, set: Option<(&Path, Option<u64>)>) {
        if !self.tracks {
            return;
        }
        self.image.lock().unwrap().pending.push(Change {
            remove: remove.map(Path::to_owned),
            set: set.map(|(path, node)| (path.to_owned(), node)),
        });
    }

    fn inode(&self, path: &Path) -> u64 {
        if !self.tracks {
            return 0;
        }
        let file = File::open(path).unwrap();
        self.image.lock().unwrap().see(&file)
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, how: Open) -> Result<Arc<dyn DiskFile>> {
        let made = matches!(how, Open::Create | Open::New) && !path.exists();
        if made {
            self.before(&format!("create {}", path.display()));
        }
        let inner = RealDisk.open(path, how)?;
        let directory = inner.file().metadata().unwrap().is_dir();
        if directory || !self.tracks {
            return Ok(Arc::new(SimFile {
                failing: Arc::clone(&self.failing),
                inner,
                inode: 0,
                image: Arc::clone(&self.image),
                hook: Arc::clone(&self.hook),
            }));
        }
        let inode = self.image.lock().unwrap().see(inner.file());
        if made {
            self.change(None, Some((path, Some(inode))));
        }
        Ok(Arc::new(SimFile {
            failing: Arc::clone(&self.failing),
            inner,
            inode,
            image: Arc::clone(&self.image),
            hook: Arc::clone(&self.hook),
        }))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.before(&format!("rename to {}", to.display()));
        let inode = self.inode(from);
        RealDisk.rename(from, to)?;
        self.change(Some(from), Some((to, Some(inode))));
        Ok(())
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<bool> {
        self.before(&format!("rename to new {}", to.display()));
        let inode = self.inode(from);
        let renamed = RealDisk.rename_new(from, to)?;
        if renamed {
            self.change(Some(from), Some((to, Some(inode))));
        }
        Ok(renamed)
    }

    fn link(&self, from: &Path, to: &Path) -> Result<bool> {
        self.before(&format!("link {}", to.display()));
        let inode = self.inode(from);
        let linked = RealDisk.link(from, to)?;
        if linked {
            self.change(None, Some((to, Some(inode))));
        }
        Ok(linked)
    }

    fn unlink(&self, path: &Path) -> Result<bool> {
        self.before(&format!("unlink {}", path.display()));
        let removed = RealDisk.unlink(path)?;
        if removed {
            self.change(Some(path), None);
        }
        Ok(removed)
    }

    fn create_dir(&self, path: &Path) -> Result<bool> {
        self.before(&format!("mkdir {}", path.display()));
        let made = RealDisk.create_dir(path)?;
        if made {
            self.change(None, Some((path, None)));
        }
        Ok(made)
    }

    fn remove_dir(&self, path: &Path) -> Result<bool> {
        self.before(&format!("rmdir {}", path.display()));
        let removed = RealDisk.remove_dir(path)?;
        if removed {
            self.change(Some(path), None);
        }
        Ok(removed)
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        self.before(&format!("sync dir {}", path.display()));
        self.image.lock().unwrap().sync_names(|c| c.touches(path));
        Ok(())
    }

    fn list(&self, path: &Path) -> Result<Vec<OsString>> {
        self.lists
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        RealDisk.list(path)
    }

    fn stat(&self, path: &Path) -> Result<Option<Stat>> {
        RealDisk.stat(path)
    }

    fn touch(&self, path: &Path) -> Result<()> {
        RealDisk.touch(path)
    }

    fn space(&self, path: &Path) -> Result<Space> {
        RealDisk.space(path)
    }

    fn writable(&self, path: &Path) -> bool {
        RealDisk.writable(path)
    }

    fn boot_id(&self) -> Result<[u8; 16]> {
        Ok(self.boot)
    }
}

impl SimFile {
    fn before(&self, what: &str) {
        before(&self.hook, &self.image, &format!("{what} {:?}", self.inner));
    }
}

impl SimFile {
    fn check_sync(&self) -> Result<()> {
        match self.failing.load(Ordering::Relaxed) {
            true => Err(DiskError::new("sync", "the disk", nix::errno::Errno::EIO)),
            false => Ok(()),
        }
    }
}

impl DiskFile for SimFile {
    fn file(&self) -> &File {
        self.inner.file()
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.before("write");
        self.inner.write_at(data, offset)
    }

    fn sync_data(&self) -> Result<()> {
        self.before("sync");
        self.check_sync()?;
        let mut image = self.image.lock().unwrap();
        if let Some(inode) = image.inodes.get_mut(&self.inode) {
            inode.durable = inode.content(Left::All, 0);
        }
        Ok(())
    }

    fn sync_fs(&self) -> Result<()> {
        self.before("sync fs");
        self.check_sync()?;
        let mut image = self.image.lock().unwrap();
        image.sync_names(|_| true);
        for inode in image.inodes.values_mut() {
            inode.durable = inode.content(Left::All, 0);
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.before("set len");
        self.inner.set_len(len)
    }

    fn allocate(&self, len: u64) -> Result<()> {
        self.inner.allocate(len)
    }

    fn set_mode(&self, mode: u32) -> Result<()> {
        self.inner.set_mode(mode)
    }

    fn stat(&self) -> Result<Stat> {
        self.inner.stat()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inner.read_at(buf, offset)
    }
}

/// What a power failure may leave of names and of data.
pub(crate) fn kinds(point: u64) -> [(Left, Left); 6] {
    [
        (Left::Nothing, Left::Nothing),
        (Left::All, Left::Nothing),
        (Left::Nothing, Left::All),
        (Left::All, Left::All),
        (Left::Some(point), Left::Some(point)),
        (Left::Some(point + 7777), Left::All),
    ]
}

/// Names of which nothing else matters: those that must be there, and those that may or may not, since they are being
/// made or removed. Any other must not be there.
#[derive(Debug, Clone, Default)]
pub(crate) struct Names {
    pub(crate) there: Vec<&'static str>,
    pub(crate) changing: Vec<&'static str>,
}

impl Names {
    fn check(&self, found: &[&str], at: &str) {
        let at = format!("{found:?} {at}: {self:?}");
        assert!(self.there.iter().all(|n| found.contains(n)), "{at}");
        let may = |n: &&str| self.there.contains(n) || self.changing.contains(n);
        assert!(found.iter().all(may), "{at}");
    }
}

/// What a power failure at any operation would leave of a directory, with the names that are said to be there then.
#[derive(Default)]
pub(crate) struct Crashes {
    now: Arc<Mutex<Names>>,
    left: Arc<Mutex<Vec<(PathBuf, Names, String)>>>,
}

impl Crashes {
    /// Keeps what is left of `from` in `to`, from now on.
    pub(crate) fn of(disk: &SimDisk, from: &Path, to: &Path) -> Self {
        let this = Self::default();
        let (now, left) = (Arc::clone(&this.now), Arc::clone(&this.left));
        let (from, to) = (from.to_owned(), to.to_owned());
        let mut points = 0;
        disk.before_each(move |image, what| {
            points += 1;
            for (names, data) in kinds(points) {
                let mut left = left.lock().unwrap();
                let to = to.join(format!("image-{}", left.len()));
                image.build(&from, &to, names, data);
                let at = format!("after power failed before {what}, left {names:?} {data:?}");
                left.push((to, now.lock().unwrap().clone(), at));
            }
        });
        this
    }

    /// Says what must hold until it is said anew.
    pub(crate) fn say(&self, there: &[&'static str], changing: &[&'static str]) {
        *self.now.lock().unwrap() = Names {
            there: there.into(),
            changing: changing.into(),
        };
    }

    /// Checks the names that `found` finds in each.
    pub(crate) async fn check<'a>(self, mut found: impl AsyncFnMut(&Path, &Names) -> Vec<&'a str>) {
        let left = std::mem::take(&mut *self.left.lock().unwrap());
        assert!(left.len() > 120, "{}", left.len());
        for (image, names, at) in left {
            let found = found(&image, &names).await;
            names.check(&found, &format!("{at} in {}", image.display()));
            fs::remove_dir_all(&image).unwrap();
        }
    }
}
