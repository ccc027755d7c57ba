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
        let deadline = Instant::now() + Duration::from_secs(20);
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
        let deadline = Instant::now() + Duration::from_secs(5);
        while let Err(error) = mount.unmount(false) {
            assert_eq!(error.kind(), MountErrorKind::Busy);
            assert!(Instant::now() < deadline, "stays busy");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(5), mount.ended())
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
            deadline: Instant::now() + Duration::from_secs(60),
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
    std::thread::sleep(Duration::from_millis(700));
    let other = fixture.run("print(open(os.path.join(root, 'other')).read())");
    assert_eq!(other, "here");
    assert!(readers.iter_mut().all(Child::is_running));
    fixture.bodies[0].mode.send_replace(Mode::Present);
    for reader in readers {
        assert_eq!(reader.finish(), sha256(&data));
    }
    assert!(fixture.get().stats().waited_reads > 0);
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

/// A script that prints what it reads of `big`, says so by removing `told`, waits until `told` is
/// there again, and prints what it reads by the same descriptor, the same mapping and a new open.
fn read_twice(told: &Path) -> String {
    format!(
        "{READ_ALL}
import time
h = lambda data: hashlib.sha256(data).hexdigest()
f = os.open(os.path.join(root, 'big'), os.O_RDONLY)
m = mmap.mmap(f, 0, prot=mmap.PROT_READ)
print(h(os.pread(f, len(m), 0)), h(m))
os.unlink('{0}')
while not os.path.exists('{0}'): time.sleep(0.01)
print(h(os.pread(f, len(m), 0)), h(m), sha('big'))",
        told.display()
    )
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn wrong_bytes_are_dropped_by_the_kernel() {
    let right = noise((8 << 20) + 77, 31);
    let wrong = noise(right.len(), 33);
    let mut maker = Maker::new();
    maker.file("big", &right, Mode::Present);
    let fixture = Fixture::new(maker);
    let body = &fixture.bodies[0];
    assert!(right != wrong);
    body.write(&wrong);
    let told = tempfile::NamedTempFile::new().unwrap();
    let reader = fixture.start(&read_twice(told.path()));
    wait_until("the first read", || !told.path().exists());
    body.write(&right);
    assert_eq!(body.tell_wrong(), 1);
    fixture.wait_invalidated(1);
    std::fs::write(told.path(), "").unwrap();
    let (right, wrong) = (sha256(&right), sha256(&wrong));
    assert_eq!(
        reader.finish(),
        format!("{wrong} {wrong}\n{right} {right} {right}")
    );
    // Watched once, however often it is opened, and kept again.
    let again = format!("{READ_ALL}\nprint(sha('big'))");
    assert_cached(
        || assert_eq!(fixture.run(&again), right),
        || fixture.get().stats().reads,
    );
    assert_eq!(body.tell_wrong(), 1);
    fixture.wait_invalidated(2);
    let body = body.clone();
    fixture.end();
    assert_eq!(body.tell_wrong(), 1, "fine after the mount is gone");
}

#[test]
fn dropping_wrong_bytes_waits_for_reads_and_holds_nobody_up() {
    let right = noise(16 << 20, 35);
    let wrong = noise(right.len(), 37);
    let mut maker = Maker::new();
    maker.file("big", &right, Mode::Present);
    maker.file("other", b"here", Mode::Present);
    let fixture = Fixture::new(maker);
    let body = &fixture.bodies[0];
    assert!(right != wrong);
    body.write(&wrong);
    let told = tempfile::NamedTempFile::new().unwrap();
    let mut first = fixture.start(&format!(
        "{READ_ALL}
import time
f = open(os.path.join(root, 'big'), 'rb', buffering=0)
f.read(4096)
os.unlink('{0}')
while not os.path.exists('{0}'): time.sleep(0.01)
f.seek(0)
print(hashlib.sha256(f.read(4096)).hexdigest())",
        told.path().display()
    ));
    wait_until("the first read", || !told.path().exists());
    // Found wrong: whoever reads what is not in the kernel waits.
    body.mode.send_replace(Mode::Absent);
    let before = fixture.get().stats().waited_reads;
    let mut waiting =
        fixture.start("os.pread(os.open(os.path.join(root, 'big'), os.O_RDONLY), 9, 15 << 20)");
    wait_until("a read that waits", || {
        fixture.get().stats().waited_reads > before
    });
    for _ in 0..100 {
        assert_eq!(body.tell_wrong(), 1);
    }
    // A new open may not see what is not dropped yet.
    let mut new = fixture.start(&format!("{READ_ALL}\nprint(sha('big'))"));
    let other = fixture.run("print(open(os.path.join(root, 'other')).read())");
    assert_eq!(other, "here");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(fixture.get().stats().invalidations, 0);
    assert!(waiting.is_running() && new.is_running() && first.is_running());
    body.write(&right);
    body.mode.send_replace(Mode::Present);
    waiting.finish();
    assert_eq!(new.finish(), sha256(&right));
    fixture.wait_invalidated(1);
    std::fs::write(told.path(), "").unwrap();
    assert_eq!(first.finish(), sha256(&right[..4096]));
    assert!(
        fixture.get().stats().invalidations <= 2,
        "those not begun are one"
    );
    fixture.end();
}

#[test]
fn what_an_origin_sent_wrong_is_repaired_in_open_files() {
    // Slow enough that the wrong byte is read before all is here and the engine looks at it.
    let source = Scripted::new(8 << 20).paced(64 << 10, Duration::from_millis(4));
    let source = Arc::new(source.script([Some(Fault::Flip)]));
    let object = source.object();
    let mut tree = TreeBuilder::new(Meta::dir(0));
    tree.add_file(b"big", 0, Meta::file(0)).unwrap();
    let artifact = Arc::new(Artifact {
        reference: "hf://org/name@main".into(),
        revision: "5".repeat(40),
        tree: tree.build(),
        objects: vec![object.clone()],
    });
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
    let fixture = Fixture::mount(view, Vec::new(), &Config::default());
    let told = tempfile::NamedTempFile::new().unwrap();
    let reader = fixture.start(&read_twice(told.path()));
    wait_until("the first read", || !told.path().exists());
    let handle = engine.open(&object, &source.source()).unwrap();
    runtime.block_on(handle.ensure(Class::Warm)).unwrap();
    fixture.wait_invalidated(1);
    std::fs::write(told.path(), "").unwrap();
    let out = reader.finish();
    let (right, lines) = (sha256(&source.data), out.split_once('\n').unwrap());
    // The mapping may be right by then.
    assert!(!lines.0.starts_with(&right), "{out}");
    assert_eq!(lines.1, format!("{right} {right} {right}"));
    assert_eq!(fixture.get().stats().errors, 0);
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

#[test]
fn a_busy_mount_is_refused_or_detached() {
    let mut maker = Maker::new();
    maker.file("big", &noise(2 << 20, 4), Mode::Absent);
    maker.file("open", &noise(2 << 20, 5), Mode::Present);
    let fixture = Fixture::new(maker);
    let script = "
f = open(os.path.join(root, 'open'), 'rb')
print(len(open(os.path.join(root, 'big'), 'rb').read()), len(f.read()))";
    let mut reader = fixture.start(script);
    while fixture.get().stats().waited_reads == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    let dir = fixture.dir.path();
    let busy = mount::unmount(dir, false).unwrap_err();
    assert_eq!(busy.kind(), MountErrorKind::Busy);
    let again = Mount::new(
        Arc::new(View::new(Arc::new(Maker::new().finish().0), Arc::new(Bodies(vec![]))).unwrap()),
        dir,
        &Config::default(),
        fixture.runtime.handle().clone(),
    );
    assert_eq!(again.unwrap_err().kind(), MountErrorKind::Mounted);
    assert!(
        mount::mounted()
            .unwrap()
            .iter()
            .any(|m| m.mountpoint == dir && m.fsname == "hearth")
    );
    mount::unmount(dir, true).unwrap();
    assert_eq!(
        mount::unmount(dir, true).unwrap_err().kind(),
        MountErrorKind::NotMounted
    );
    assert!(reader.is_running(), "what is open stays");
    fixture.bodies[0].mode.send_replace(Mode::Present);
    assert_eq!(reader.finish(), "2097152 2097152");
    fixture.end();
}

#[test]
fn a_mount_needs_a_directory() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (artifact, _) = Maker::new().finish();
    let view = Arc::new(View::new(Arc::new(artifact), Arc::new(Bodies(vec![]))).unwrap());
    let file = tempfile::NamedTempFile::new().unwrap();
    for path in [file.path(), Path::new("/nonexistent/dir")] {
        let result = Mount::new(
            view.clone(),
            path,
            &Config::default(),
            runtime.handle().clone(),
        );
        let error = result.unwrap_err();
        assert_eq!(error.kind(), MountErrorKind::Directory);
        assert!(error.hint().is_some());
    }
    let dir = tempfile::tempdir().unwrap();
    let error = mount::unmount(dir.path(), false).unwrap_err();
    assert_eq!(error.kind(), MountErrorKind::NotMounted);
}

#[test]
fn dropping_a_mount_takes_it_away() {
    let mut maker = Maker::new();
    maker.file("a", b"x", Mode::Complete);
    let mut fixture = Fixture::new(maker);
    let dir = fixture.dir.path().to_owned();
    fixture.mount = None;
    assert!(
        mount::mounted()
            .unwrap()
            .iter()
            .all(|m| m.mountpoint != dir)
    );
}

/// The served side of `without_root_files_are_read_through_the_process`.
#[test]
#[ignore = "started by another test"]
fn serve_without_root() {
    let dir = PathBuf::from(std::env::var_os("HEARTH_TEST_DIR").unwrap());
    let mut maker = Maker::new();
    maker.file("big", &noise(3 << 20, 7), Mode::Complete);
    let (artifact, bodies) = maker.finish();
    let view = View::new(Arc::new(artifact), Arc::new(Bodies(bodies))).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let handle = runtime.handle().clone();
    let mount = Mount::new(Arc::new(view), &dir, &Config::default(), handle).unwrap();
    runtime.block_on(mount.ended());
    let stats = mount.stats();
    assert!(stats.reads > 0 && stats.passthrough_opens == 0, "{stats:?}");
    mount.join().unwrap();
}

#[test]
fn without_root_files_are_read_through_the_process() {
    // As udev has it wherever it runs.
    std::fs::set_permissions("/dev/fuse", Permissions::from_mode(0o666)).unwrap();
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), Permissions::from_mode(0o777)).unwrap();
    let program = home.path().join("tests");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let as_nobody = |program: &Path| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.arg(program);
        command.env("TMPDIR", home.path()).current_dir("/");
        command
    };
    let dir = home.path().join("mnt");
    let mut make = as_nobody(Path::new("mkdir"));
    assert!(make.arg(&dir).status().unwrap().success());
    let mut serve = as_nobody(&program);
    serve
        .args(["--exact", "mount::serve_without_root", "--ignored"])
        .env("HEARTH_TEST_DIR", &dir);
    let mut server = Child::start(serve, 0);
    let connection = loop {
        let list = mount::mounted().unwrap();
        match list.iter().find(|m| m.mountpoint == dir) {
            Some(info) => break info.connection,
            None if server.is_running() => std::thread::sleep(Duration::from_millis(5)),
            None => panic!("{}", server.finish()),
        }
    };
    server.connection = connection;
    let script =
        "import sys, hashlib; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())";
    let mut read = as_nobody(Path::new(PYTHON));
    read.args(["-c", script]).arg(dir.join("big"));
    assert_eq!(
        Child::start(read, connection).finish(),
        sha256(&noise(3 << 20, 7))
    );
    // As the owner would: by the helper.
    let mut unmount = as_nobody(Path::new("fusermount3"));
    unmount.arg("-u").arg(&dir);
    Child::start(unmount, connection).finish();
    server.finish();
}

/// Python of the environment that `tests/run` makes.
fn venv_python() -> PathBuf {
    let home = std::env::var_os("HOME").unwrap();
    let python = Path::new(&home).join(".cache/hearth-test/venv/bin/python");
    assert!(
        python.exists(),
        "{} is missing: run tests/run",
        python.display()
    );
    python
}

#[test]
fn the_hub_layout_is_what_huggingface_hub_expects() {
    let weights = noise(2 << 20, 8);
    let mut maker = Maker::new();
    maker.file("config.json", b"{\"a\": 1}", Mode::Absent);
    maker.file("sub/dir/model.bin", &weights, Mode::Present);
    maker.file("again.json", b"{\"a\": 1}", Mode::Absent);
    let fixture = Fixture::hub(maker);
    for body in &fixture.bodies {
        body.mode.send_replace(Mode::Present);
    }
    let script = r"
import os, sys, hashlib, fcntl, json, errno
root = sys.argv[1]
os.environ.update(HF_HUB_CACHE=root, HF_HUB_OFFLINE='1', HF_HOME=sys.argv[2])
from huggingface_hub import snapshot_download, hf_hub_download, scan_cache_dir, try_to_load_from_cache
from huggingface_hub import file_download as fd
commit = '5' * 40
path = snapshot_download('org/name', local_files_only=True)
assert path == f'{root}/models--org--name/snapshots/{commit}', path
assert json.load(open(path + '/config.json')) == {'a': 1}
weights = hf_hub_download('org/name', 'sub/dir/model.bin')
assert os.readlink(weights).startswith('../../../../blobs/'), os.readlink(weights)
info = scan_cache_dir()
assert not info.warnings, info.warnings
(repo,) = info.repos
assert repo.repo_id == 'org/name' and repo.repo_type == 'model' and repo.nb_files == 2, repo
(revision,) = repo.revisions
assert revision.commit_hash == commit and revision.refs == {'main'} and len(revision.files) == 3
assert len(os.listdir(f'{root}/models--org--name/blobs')) == 2
# What online calls write.
folder = f'{root}/models--org--name'
fd._cache_commit_hash_for_specific_revision(folder, 'refs/pr/1', commit)
assert open(f'{folder}/refs/refs/pr/1').read() == commit
fd._cache_commit_hash_for_specific_revision(folder, 'main', '6' * 40)
assert open(f'{folder}/refs/main').read() == '6' * 40
fd._cache_commit_hash_for_specific_revision(folder, 'main', commit)
none = f'{folder}/.no_exist/{commit}/added_tokens.json'
assert not os.path.exists(none)
os.makedirs(os.path.dirname(none)); open(none, 'w').close()
assert try_to_load_from_cache('org/name', 'added_tokens.json') is fd._CACHED_NO_EXIST
from huggingface_hub.utils import WeakFileLock
lock = f'{root}/.locks/models--org--name/abc.lock'
os.makedirs(os.path.dirname(lock))
with WeakFileLock(lock):
    f = open(lock)
    try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB); assert False
    except BlockingIOError: pass
    pid = os.fork()
    if pid == 0:
        g = open(lock, 'r+')
        try: fcntl.lockf(g, fcntl.LOCK_EX | fcntl.LOCK_NB); os._exit(0)
        except OSError: os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
open(f'{root}/version.txt', 'w').write('1')
assert open(f'{root}/version.txt').read() == '1'
assert open(f'{root}/CACHEDIR.TAG').read().startswith('Signature: 8a477f597d28d172789f06886806bc55')
# A file of the upper is a file.
p = f'{folder}/.no_exist/data'
with open(p, 'w+b') as f:
    f.write(b'hello'); f.flush(); os.fsync(f.fileno())
    f.seek(2); f.truncate(); assert os.fstat(f.fileno()).st_size == 2
    f.seek(6); f.write(b'end'); f.flush(); f.seek(0)
    assert f.read() == b'he\0\0\0\0end', f.read()
    os.unlink(p); f.seek(0); assert f.read(2) == b'he' and os.fstat(f.fileno()).st_nlink == 0
assert not os.path.exists(p)
os.mkdir(f'{folder}/.no_exist/d1'); os.rename(f'{folder}/.no_exist/d1', f'{folder}/refs/d2')
assert sorted(os.listdir(f'{folder}/refs')) == ['d2', 'main', 'refs'], os.listdir(f'{folder}/refs')
os.rmdir(f'{folder}/refs/d2')
assert sorted(os.listdir(root)) == ['.locks', 'CACHEDIR.TAG', 'models--org--name', 'version.txt'], os.listdir(root)
def fails(number, op):
    try: op(); assert False
    except OSError as e: assert e.errno == number, e
fails(errno.EROFS, lambda: open(f'{root}/other', 'w'))
fails(errno.EROFS, lambda: os.mkdir(f'{root}/models--x--y'))
fails(errno.EROFS, lambda: open(f'{folder}/blobs/x', 'w'))
fails(errno.EROFS, lambda: os.unlink(path + '/config.json'))
fails(errno.EROFS, lambda: os.rename(f'{folder}/refs/main', f'{folder}/snapshots/x'))
fails(errno.EROFS, lambda: open(os.path.realpath(weights), 'r+b'))
fails(errno.ENOTEMPTY, lambda: os.rmdir(f'{folder}/refs'))
def fill():
    with open(f'{folder}/.no_exist/full', 'wb', buffering=0) as f:
        for i in range(100): f.write(b'x' * 65536)
fails(errno.ENOSPC, fill)
os.unlink(f'{folder}/.no_exist/full')
fails(errno.ENOSPC, lambda: [open(f'{folder}/.no_exist/{i}', 'w').close() for i in range(200)])
for i in os.listdir(f'{folder}/.no_exist'):
    if len(i) < 9: os.unlink(f'{folder}/.no_exist/{i}')
print(hashlib.sha256(open(weights, 'rb').read()).hexdigest())
";
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(venv_python());
    command
        .args(["-c", script])
        .arg(fixture.dir.path())
        .arg(home.path());
    let got = Child::start(command, fixture.get().connection()).finish();
    assert_eq!(got, sha256(&weights));
    // Another user may take locks too.
    let mut other = Command::new("setpriv");
    other
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            PYTHON,
            "-c",
        ])
        .arg(
            "import sys, os\nd = sys.argv[1] + '/.locks/other'\nos.mkdir(d)\nos.rmdir(d)\n\
             assert os.access(sys.argv[1], os.R_OK)\n\
             try: os.rmdir(sys.argv[1] + '/models--org--name')\nexcept OSError: pass",
        )
        .arg(fixture.dir.path())
        .current_dir("/");
    assert_eq!(fixture.get().stats().errors, 0);
    Child::start(other, fixture.get().connection()).finish();
    fixture.end();
}
