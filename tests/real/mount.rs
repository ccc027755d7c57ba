//! Real mounts over made-up content that arrives, stays away or fails when told to.
//!
//! All access happens in child processes with a time limit; a child that is stuck is freed by
//! aborting the FUSE connection.

mod slices;

use std::{
    fs::{File, Permissions},
    io::Read as _,
    os::unix::{
        fs::{FileExt as _, PermissionsExt as _},
        process::ExitStatusExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use hearth::{
    digest::ObjectId,
    fetch::{Class, Engine, FetchErrorKind},
    fs::{Body, Contents, Fetched, FsError, Limits, View, Whole, hub},
    mount::{self, Config, Mount, MountErrorKind},
    reference::{HubKind, HubRepo},
    store::{self, Store},
    tree::{Artifact, Kind, Location, Meta, Object, Recipe, TreeBuilder},
};
use tokio::sync::watch;

use crate::scripted_source::{Fault, Scripted};

mod places;
mod wrong;

const PYTHON: &str = "/usr/bin/python3";

/// What a made-up object does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Readers wait.
    Absent,
    /// All bytes are here, unverified.
    Present,
    Complete,
    Fails(FetchErrorKind),
}

struct Made {
    file: Arc<File>,
    size: u64,
    mode: watch::Sender<Mode>,
    on_wrong: Mutex<Vec<Box<dyn Fn() + Send + Sync>>>,
}

impl Made {
    fn error(kind: FetchErrorKind) -> FsError {
        FsError::Content {
            kind,
            message: "made to fail".into(),
        }
    }

    /// Takes `data` for its content from now on.
    fn write(&self, data: &[u8]) {
        self.file.write_all_at(data, 0).unwrap();
    }

    /// Tells whoever wants to know that the content was wrong, and how many that are.
    fn tell_wrong(&self) -> usize {
        let calls = self.on_wrong.lock().unwrap();
        calls.iter().for_each(|call| call());
        calls.len()
    }

    async fn arrived(&self) -> Result<(), FsError> {
        let mut mode = self.mode.subscribe();
        let mode = *mode.wait_for(|m| *m != Mode::Absent).await.unwrap();
        match mode {
            Mode::Fails(kind) => Err(Self::error(kind)),
            _ => Ok(()),
        }
    }
}

#[async_trait::async_trait]
impl Body for Made {
    fn size(&self) -> u64 {
        self.size
    }
    fn complete(&self) -> Option<Arc<dyn Whole>> {
        (*self.mode.borrow() == Mode::Complete).then(|| self.file.clone() as Arc<dyn Whole>)
    }
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool, FsError> {
        match *self.mode.borrow() {
            Mode::Absent => return Ok(false),
            Mode::Fails(kind) => return Err(Self::error(kind)),
            Mode::Present | Mode::Complete => {}
        }
        self.file.read_exact_at(buf, offset).unwrap();
        Ok(true)
    }
    async fn read(self: Arc<Self>, offset: u64, len: usize) -> Result<Bytes, FsError> {
        self.arrived().await?;
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        Ok(bytes.into())
    }
    async fn whole(self: Arc<Self>) -> Result<(), FsError> {
        self.arrived().await?;
        self.mode.send_replace(Mode::Complete);
        Ok(())
    }
    fn on_wrong(&self, call: Box<dyn Fn() + Send + Sync>) {
        self.on_wrong.lock().unwrap().push(call);
    }
}

struct Bodies(Vec<Arc<Made>>);

impl Contents for Bodies {
    fn open(&self, object: u32) -> Result<Arc<dyn Body>, FsError> {
        Ok(self.0[object as usize].clone())
    }
}

/// An artifact in the making, with its bodies.
struct Maker {
    tree: TreeBuilder,
    objects: Vec<Object>,
    bodies: Vec<Arc<Made>>,
}

impl Maker {
    fn new() -> Self {
        Self {
            tree: TreeBuilder::new(Meta::dir(1_600_000_000)),
            objects: Vec::new(),
            bodies: Vec::new(),
        }
    }

    /// Adds a file and returns its inode.
    fn file(&mut self, path: &str, data: &[u8], mode: Mode) -> u32 {
        self.file_with(path, data, mode, Meta::file(1_700_000_000))
    }

    fn file_with(&mut self, path: &str, data: &[u8], mode: Mode, meta: Meta) -> u32 {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(data, 0).unwrap();
        let object = self.objects.len() as u32;
        self.objects.push(Object {
            id: ObjectId::Sha256(hearth::digest::Digest::of(data)),
            size: data.len() as u64,
            git_sha1: None,
            recipe: Recipe::Raw(Location {
                path: path.into(),
                generation: None,
                offset: 0,
            }),
        });
        self.bodies.push(Arc::new(Made {
            file: Arc::new(file),
            size: data.len() as u64,
            mode: watch::channel(mode).0,
            on_wrong: Mutex::default(),
        }));
        self.tree.add_file(path.as_bytes(), object, meta).unwrap()
    }

    fn finish(self) -> (Artifact, Vec<Arc<Made>>) {
        let artifact = Artifact {
            reference: "hf://org/name@main".into(),
            revision: "5".repeat(40),
            tree: self.tree.build(),
            objects: self.objects,
        };
        (artifact, self.bodies)
    }
}

/// A mount, its runtime, and where it is.
struct Fixture {
    mount: Option<Mount>,
    bodies: Vec<Arc<Made>>,
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Fixture {
    fn new(maker: Maker) -> Self {
        let (artifact, bodies) = maker.finish();
        let contents = Arc::new(Bodies(bodies.clone()));
        let view = View::new(Arc::new(artifact), contents).unwrap();
        Self::mount(view, bodies, &Config::default())
    }

    fn hub(maker: Maker) -> Self {
        let (artifact, bodies) = maker.finish();
        let repo = HubRepo {
            kind: HubKind::Model,
            id: "org/name".into(),
            revision: None,
            path: String::new(),
        };
        let layout = hub::layout(&artifact, &repo, "").unwrap();
        let contents = Arc::new(Bodies(bodies.clone()));
        let limits = Limits {
            bytes: 1 << 20,
            inodes: 100,
        };
        let artifact = Arc::new(layout.artifact);
        let view = View::with_upper(artifact, contents, &layout.shadows, limits).unwrap();
        Self::mount(view, bodies, &Config::default())
    }

    fn mount(view: View, bodies: Vec<Arc<Made>>, config: &Config) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let handle = runtime.handle().clone();
        let mount = Mount::new(Arc::new(view), dir.path(), config, handle).unwrap();
        Self {
            mount: Some(mount),
            bodies,
            dir,
            runtime,
        }
    }

    fn get(&self) -> &Mount {
        self.mount.as_ref().unwrap()
    }

    /// Starts a Python script that finds the mount in `root`.
    fn start(&self, script: &str) -> Child {
        let program = format!("import os, sys, mmap, errno\nroot = sys.argv[1]\n{script}");
        let mut command = Command::new(PYTHON);
        command.args(["-c", &program]).arg(self.dir.path());
        Child::start(command, self.get().connection())
    }

    /// Waits until the kernel has dropped what turned out wrong `times` times.
    fn wait_invalidated(&self, times: u64) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while self.get().stats().invalidations < times {
            assert!(Instant::now() < deadline, "{:?}", self.get().stats());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn run(&self, script: &str) -> String {
        self.start(script).finish()
    }

    /// Unmounts cleanly and waits for the session to end.
    fn end(mut self) {
        let mount = self.mount.take().unwrap();
        // RELEASE of the last file may still be on its way.
        let deadline = Instant::now() + Duration::from_secs(120);
        while let Err(error) = mount.unmount(false) {
            assert_eq!(error.kind(), MountErrorKind::Busy);
            assert!(Instant::now() < deadline, "stays busy");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(120), mount.ended())
                .await
                .expect("the session ends");
        });
        mount.join().unwrap();
    }
}

/// A child that touches a mount.
struct Child {
    child: std::process::Child,
    connection: u32,
    deadline: Instant,
}

impl Child {
    fn start(mut command: Command, connection: u32) -> Self {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            child,
            connection,
            deadline: Instant::now() + Duration::from_secs(120),
        }
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn finish(mut self) -> String {
        while self.is_running() {
            if Instant::now() > self.deadline {
                abort(self.connection);
                let _ = self.child.kill();
                let _ = self.child.wait();
                panic!("a child was stuck on the mount");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let status = self.child.wait().unwrap();
        let (mut out, mut err) = (String::new(), String::new());
        let pipes = (self.child.stdout.take(), self.child.stderr.take());
        pipes.0.unwrap().read_to_string(&mut out).unwrap();
        pipes.1.unwrap().read_to_string(&mut err).unwrap();
        assert!(
            status.success(),
            "{status} {:?}\n{out}\n{err}",
            status.signal()
        );
        out.trim().to_owned()
    }
}

/// Checks that `act` asks this process for nothing, since the kernel holds it. Others on the machine
/// may drop its caches meanwhile; then it counts for nothing.
fn assert_cached(act: impl Fn(), asked: impl Fn() -> u64) {
    let drops = || {
        let text = std::fs::read_to_string("/proc/vmstat").unwrap();
        let found = text.lines().find(|l| l.starts_with("drop_pagecache"));
        found.unwrap().to_owned()
    };
    for _ in 0..20 {
        act();
        let before = (asked(), drops());
        act();
        let after = (asked(), drops());
        if before.1 == after.1 {
            assert_eq!(before.0, after.0, "the kernel holds it");
            return;
        }
    }
    panic!("somebody drops the page cache all the time");
}

/// Ends a FUSE connection: whoever waits for it gets an error.
fn abort(connection: u32) {
    let control = "/sys/fs/fuse/connections";
    let abort = format!("{control}/{connection}/abort");
    if !Path::new(&abort).exists() {
        let mut command = Command::new("mount");
        let _ = command.args(["-t", "fusectl", "none", control]).status();
    }
    let _ = std::fs::write(abort, "1");
}

/// Bytes without a period that a wrong offset could hide behind.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state >> 11).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn sha256(data: &[u8]) -> String {
    hearth::digest::Digest::of(data).hex()
}

const READ_ALL: &str = "
import hashlib
def sha(path): return hashlib.sha256(open(os.path.join(root, path), 'rb').read()).hexdigest()
";

#[test]
fn a_tree_looks_like_itself() {
    let mut maker = Maker::new();
    let inode = maker.file("dir/a", b"hello", Mode::Complete);
    maker.tree.link(b"dir/b", inode).unwrap();
    let mut meta = Meta::file(-5);
    meta.mode = 0o640;
    meta.mtime = (-5, 500_000_000);
    meta.xattrs = vec![(b"user.k"[..].into(), b"value"[..].into())];
    maker.file_with("x", b"", Mode::Complete, meta);
    let link = Kind::Symlink {
        target: b"dir/a"[..].into(),
    };
    maker.tree.add(b"link", link, Meta::file(0)).unwrap();
    let device = Kind::Char {
        major: 300,
        minor: 70_000,
    };
    maker.tree.add(b"null", device, Meta::file(0)).unwrap();
    maker.tree.add(b"fifo", Kind::Fifo, Meta::file(0)).unwrap();
    let fixture = Fixture::new(maker);
    fixture.run(
        r"
import stat
j = lambda p: os.path.join(root, p)
assert sorted(os.listdir(root)) == ['dir', 'fifo', 'link', 'null', 'x'], os.listdir(root)
a, b = os.stat(j('dir/a')), os.stat(j('dir/b'))
assert a.st_ino == b.st_ino and a.st_nlink == 2 and a.st_size == 5 and a.st_mtime == 1700000000
assert stat.S_IMODE(a.st_mode) == 0o444
assert os.stat(root).st_nlink == 3 and os.stat(root).st_ino == 1
assert os.readlink(j('link')) == 'dir/a' and open(j('link')).read() == 'hello'
x = os.stat(j('x'))
assert stat.S_IMODE(x.st_mode) == 0o640 and x.st_mtime_ns == -4_500_000_000, x.st_mtime_ns
assert os.getxattr(j('x'), 'user.k') == b'value' and os.listxattr(j('x')) == ['user.k']
for path, name in [('x', 'user.no'), ('dir/a', 'user.k')]:
    try: os.getxattr(j(path), name); assert False
    except OSError as e: assert e.errno == errno.ENODATA
n = os.stat(j('null'))
assert stat.S_ISCHR(n.st_mode) and (os.major(n.st_rdev), os.minor(n.st_rdev)) == (300, 70000)
assert stat.S_ISFIFO(os.stat(j('fifo')).st_mode)
for i in range(3):
    assert not os.path.exists(j('absent'))
for op in [lambda: open(j('dir/new'), 'w'), lambda: open(j('x'), 'a'), lambda: os.mkdir(j('d')),
           lambda: os.unlink(j('x')), lambda: os.chmod(j('x'), 0)]:
    try: op(); assert False
    except OSError as e: assert e.errno == errno.EROFS, e
s = os.statvfs(root)
assert s.f_files == 7 and s.f_bfree == 0, s
",
    );
    let lookups = fixture.get().stats().lookups;
    assert!(lookups <= 8, "negative answers are kept: {lookups} lookups");
    fixture.end();
}

#[test]
fn a_complete_file_is_never_read_through_the_process() {
    let data = noise(5 << 20, 1);
    let mut maker = Maker::new();
    maker.file("big", &data, Mode::Complete);
    let fixture = Fixture::new(maker);
    let got = fixture.run(&format!(
        "{READ_ALL}
first = open(os.path.join(root, 'big'), 'rb')
second = open(os.path.join(root, 'big'), 'rb')
first.close()
m = mmap.mmap(second.fileno(), 0, prot=mmap.PROT_READ)
assert hashlib.sha256(m).hexdigest() == sha('big')
second.close()
print(sha('big'))"
    ));
    assert_eq!(got, sha256(&data));
    let stats = fixture.get().stats();
    assert_eq!((stats.opens, stats.passthrough_opens), (4, 4));
    assert_eq!((stats.reads, stats.errors), (0, 0), "{stats:?}");
    fixture.end();
}

#[test]
fn absent_bytes_are_waited_for_and_then_kept_by_the_kernel() {
    let data = noise((9 << 20) + 123, 2);
    let mut maker = Maker::new();
    maker.file("big", &data, Mode::Absent);
    maker.file("other", b"here", Mode::Complete);
    let fixture = Fixture::new(maker);
    // More waiting readers than threads: none of them may keep others from being served.
    let mut readers: Vec<_> = (0..8)
        .map(|i| {
            fixture.start(&format!(
                "{READ_ALL}
f = os.open(os.path.join(root, 'big'), os.O_RDONLY)
os.pread(f, 10, {i} << 20)
if {i} % 2: print(hashlib.sha256(mmap.mmap(f, 0, prot=mmap.PROT_READ)).hexdigest())
else: print(sha('big'))"
            ))
        })
        .collect();
    wait_until("all wait", || fixture.get().stats().waited_reads >= 8);
    let other = fixture.run("print(open(os.path.join(root, 'other')).read())");
    assert_eq!(other, "here");
    assert!(readers.iter_mut().all(Child::is_running));
    fixture.bodies[0].mode.send_replace(Mode::Present);
    for reader in readers {
        assert_eq!(reader.finish(), sha256(&data));
    }
    let again = format!("{READ_ALL}\nprint(sha('big'))");
    assert_cached(
        || assert_eq!(fixture.run(&again), sha256(&data)),
        || fixture.get().stats().reads,
    );
    fixture.end();
}

#[test]
fn a_file_that_completes_while_open_stays_readable_and_is_passthrough_later() {
    let data = noise(3 << 20, 3);
    let mut maker = Maker::new();
    maker.file("big", &data, Mode::Present);
    let fixture = Fixture::new(maker);
    let flag = tempfile::tempdir().unwrap();
    let wait = flag.path().join("go");
    let reader = fixture.start(&format!(
        "{READ_ALL}
import time
f = open(os.path.join(root, 'big'), 'rb')
first = f.read(1 << 20)
print('open', flush=True)
while not os.path.exists('{0}'): time.sleep(0.01)
assert sha('big') == hashlib.sha256(first + f.read()).hexdigest()
m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
f.close()
assert hashlib.sha256(m).hexdigest() == sha('big')
m.close()",
        wait.display()
    ));
    while fixture.get().stats().reads == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    fixture.bodies[0].mode.send_replace(Mode::Complete);
    std::fs::write(&wait, "").unwrap();
    reader.finish();
    assert_eq!(fixture.get().stats().passthrough_opens, 0);
    while fixture.get().stats().releases < fixture.get().stats().opens {
        std::thread::sleep(Duration::from_millis(5));
    }
    let reads = fixture.get().stats().reads;
    let got = fixture.run(&format!("{READ_ALL}\nprint(sha('big'))"));
    assert_eq!(got, sha256(&data));
    let stats = fixture.get().stats();
    assert_eq!((stats.passthrough_opens, stats.reads), (1, reads));
    assert_eq!(stats.errors, 0);
    fixture.end();
}

#[test]
fn small_files_are_fetched_whole_when_opened() {
    let mut maker = Maker::new();
    maker.file("config.json", b"{}", Mode::Absent);
    let fixture = Fixture::new(maker);
    let mut reader = fixture.start("print(open(os.path.join(root, 'config.json')).read())");
    std::thread::sleep(Duration::from_millis(300));
    assert!(reader.is_running());
    fixture.bodies[0].mode.send_replace(Mode::Present);
    assert_eq!(reader.finish(), "{}");
    let stats = fixture.get().stats();
    assert_eq!((stats.small_fetches, stats.passthrough_opens), (1, 1));
    assert_eq!(stats.reads, 0);
    fixture.end();
}

#[test]
fn errors_have_their_errno() {
    let table = [
        (FetchErrorKind::Changed, "ESTALE"),
        (FetchErrorKind::Denied, "EACCES"),
        (FetchErrorKind::NotFound, "EIO"),
        (FetchErrorKind::Corrupt, "EIO"),
        (FetchErrorKind::Unavailable, "EIO"),
        (FetchErrorKind::NoSpace, "EIO"),
        (FetchErrorKind::Disk, "EIO"),
    ];
    let mut maker = Maker::new();
    for (at, (kind, _)) in table.iter().enumerate() {
        maker.file(&format!("big{at}"), &noise(2 << 20, 9), Mode::Fails(*kind));
        maker.file(&format!("small{at}"), b"small", Mode::Fails(*kind));
    }
    let fixture = Fixture::new(maker);
    for (at, (_, name)) in table.iter().enumerate() {
        for size in ["big", "small"] {
            fixture.run(&format!(
                "
try: open(os.path.join(root, '{size}{at}'), 'rb').read(); assert False
except OSError as e: assert e.errno == errno.{name}, (e, '{size}{at}')"
            ));
        }
    }
    assert!(fixture.get().stats().errors >= 14);
    fixture.end();
}

#[test]
fn a_large_directory_is_read_once() {
    let mut maker = Maker::new();
    let inode = maker.file("dir/000000", b"x", Mode::Complete);
    for i in 1..20_000 {
        maker
            .tree
            .link(format!("dir/{i:06}").as_bytes(), inode)
            .unwrap();
    }
    let fixture = Fixture::new(maker);
    fixture.run(
        "
d = os.path.join(root, 'dir')
want = ['%06d' % i for i in range(20000)]
assert sorted(os.listdir(d)) == want
assert sum(e.stat().st_size for e in os.scandir(d)) == 20000
",
    );
    assert_cached(
        || drop(fixture.run("assert len(os.listdir(os.path.join(root, 'dir'))) == 20000")),
        || fixture.get().stats().readdirs,
    );
    fixture.end();
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A mount whose content comes from a scripted source, through an engine.
struct Served {
    source: Arc<Scripted>,
    engine: Engine,
    fixture: Fixture,
    /// The engine lives on it.
    runtime: tokio::runtime::Runtime,
    _home: tempfile::TempDir,
}

impl Served {
    fn new(source: Arc<Scripted>, artifact: Artifact) -> Self {
        let artifact = Arc::new(artifact);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let home = tempfile::tempdir().unwrap();
        let config = store::Config {
            min_free: store::ByteSize(0),
            ..Default::default()
        };
        let store = Store::open(home.path(), &config).unwrap();
        let engine = {
            let _inside = runtime.enter();
            Engine::new(store, hearth::fetch::Config::default())
        };
        let contents = Fetched::new(engine.clone(), source.source(), artifact.clone());
        let view = View::new(artifact, Arc::new(contents)).unwrap();
        Self {
            source,
            engine,
            fixture: Fixture::mount(view, Vec::new(), &Config::default()),
            runtime,
            _home: home,
        }
    }
}
