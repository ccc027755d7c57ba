//! Native roots on the real kernel: compared, attribute by attribute and byte by byte, with a plain
//! directory made from the same tree; under a container's overlay; with programs run in them.

use std::{
    ffi::{CString, OsStr},
    fs::{self, File},
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use hearth::{
    digest::{Digest, ObjectId},
    image::erofs,
    mount::{MountErrorKind, native},
    store::{self, CollectOptions, Store},
    tree::{Artifact, Kind, Location, Meta, Object, Recipe, Tree, TreeBuilder},
};
use proptest::prelude::*;

mod programs;
mod roots;
mod trees;

const PYTHON: &str = "/usr/bin/python3";

/// Prints all there is to know of the tree in argv[1], a line for each path.
const LIST: &str = r#"
import hashlib, os, stat, sys
root = os.fsencode(sys.argv[1])
seen = {}
def line(path, shown):
    s = os.lstat(path)
    kind = stat.S_IFMT(s.st_mode)
    what = b""
    if kind == stat.S_IFREG:
        with open(path, "rb") as f: what = hashlib.sha256(f.read()).hexdigest().encode()
    if kind == stat.S_IFLNK: what = os.readlink(path)
    if kind in (stat.S_IFCHR, stat.S_IFBLK): what = b"%d" % s.st_rdev
    # Hard links: the first path of the same file.
    same = seen.setdefault((s.st_dev, s.st_ino), shown) if kind != stat.S_IFDIR else b""
    size = 0 if kind == stat.S_IFDIR else s.st_size
    xattrs = sorted((n, os.getxattr(path, n, follow_symlinks=False)) for n in os.listxattr(path, follow_symlinks=False))
    print(shown, oct(s.st_mode), s.st_uid, s.st_gid, size, s.st_mtime_ns, s.st_nlink, what, same, xattrs)
def walk(path, shown):
    line(path, shown)
    for entry in sorted(os.scandir(path), key=lambda e: e.name):
        below = shown + b"/" + entry.name
        if entry.is_dir(follow_symlinks=False): walk(entry.path, below)
        else: line(entry.path, below)
sys.setrecursionlimit(10000)
walk(root, b"")
"#;

/// A tree in the making, and what is in its files.
struct Maker {
    tree: TreeBuilder,
    objects: Vec<Object>,
    contents: Vec<Bytes>,
}

impl Maker {
    fn new() -> Self {
        Self {
            tree: TreeBuilder::new(meta(0o755)),
            objects: Vec::new(),
            contents: Vec::new(),
        }
    }

    fn file(&mut self, path: &str, content: impl Into<Bytes>, meta: Meta) -> u32 {
        let content = content.into();
        let object = self.objects.len() as u32;
        self.objects.push(Object {
            id: ObjectId::Sha256(Digest::of(&content)),
            size: content.len() as u64,
            git_sha1: None,
            recipe: Recipe::Raw(Location {
                path: path.into(),
                generation: None,
                offset: 0,
            }),
        });
        self.contents.push(content);
        self.tree.add_file(path.as_bytes(), object, meta).unwrap()
    }

    fn add(&mut self, path: &str, kind: Kind, meta: Meta) -> u32 {
        self.tree.add(path.as_bytes(), kind, meta).unwrap()
    }

    fn dir(&mut self, path: &str, meta: Meta) -> u32 {
        let (parent, entries) = (0, Vec::new());
        self.add(path, Kind::Dir { parent, entries }, meta)
    }

    fn symlink(&mut self, path: &str, target: &str) -> u32 {
        let target = target.as_bytes().into();
        self.add(path, Kind::Symlink { target }, meta(0o777))
    }

    /// Stores the contents, writes the image, and makes a directory to mount on.
    fn finish(self) -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let pairs = self.objects.iter().zip(&self.contents);
        let batch: Vec<_> = pairs.map(|(o, content)| (o.id, content.clone())).collect();
        store.put(&batch).unwrap();
        let bed = Bed {
            dir,
            tree: self.tree.build(),
            objects: self.objects,
            contents: self.contents,
        };
        let image = File::create(bed.image()).unwrap();
        let len = erofs::write(&bed.tree, &bed.objects, &image).unwrap();
        assert_eq!(image.metadata().unwrap().len(), len);
        fs::create_dir(bed.path("root")).unwrap();
        bed
    }
}

/// A store with the objects of a tree, its image, and places to mount on.
struct Bed {
    dir: tempfile::TempDir,
    tree: Tree,
    objects: Vec<Object>,
    contents: Vec<Bytes>,
}

impl Bed {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn open(&self) -> Arc<Store> {
        open(self.dir.path())
    }

    fn image(&self) -> PathBuf {
        self.path("image.erofs")
    }

    fn objects(&self) -> PathBuf {
        self.path("store/objects")
    }

    fn mount(&self) -> native::Root {
        native::mount(&self.image(), &[&self.objects()], &self.path("root")).unwrap()
    }

    /// The tree as a plain directory, made by the system calls that anybody would use.
    fn plain(&self) -> PathBuf {
        let root = self.path("plain");
        fs::create_dir(&root).unwrap();
        let mut first: Vec<Option<PathBuf>> = vec![None; self.tree.inodes().len()];
        self.unpack(0, &root, &mut first);
        root
    }

    fn unpack(&self, number: u32, path: &Path, first: &mut [Option<PathBuf>]) {
        if let Some(first) = &first[number as usize] {
            fs::hard_link(first, path).unwrap();
            return;
        }
        first[number as usize] = Some(path.to_owned());
        let inode = self.tree.get(number).unwrap();
        let name = c_string(path.as_os_str().as_bytes());
        let node = |kind: u32, major: u32, minor: u32| {
            let done =
                // SAFETY: the path ends in NUL.
                unsafe { libc::mknod(name.as_ptr(), kind | 0o600, libc::makedev(major, minor)) };
            assert_eq!(done, 0, "mknod {}", path.display());
        };
        match &inode.kind {
            Kind::Dir { entries, .. } => {
                if number != 0 {
                    fs::create_dir(path).unwrap();
                }
                for entry in entries {
                    let name = OsStr::from_bytes(&entry.name);
                    self.unpack(entry.inode, &path.join(name), first);
                }
            }
            Kind::File { object } => {
                fs::write(path, &self.contents[*object as usize]).unwrap();
            }
            Kind::Symlink { target } => {
                let target = OsStr::from_bytes(target);
                std::os::unix::fs::symlink(target, path).unwrap();
            }
            Kind::Char { major, minor } => node(libc::S_IFCHR, *major, *minor),
            Kind::Block { major, minor } => node(libc::S_IFBLK, *major, *minor),
            Kind::Fifo => node(libc::S_IFIFO, 0, 0),
            Kind::Socket => node(libc::S_IFSOCK, 0, 0),
        }
        let meta = &inode.meta;
        std::os::unix::fs::lchown(path, Some(meta.uid), Some(meta.gid)).unwrap();
        if !matches!(inode.kind, Kind::Symlink { .. }) {
            fs::set_permissions(path, fs::Permissions::from_mode(meta.mode.into())).unwrap();
        }
        for (key, value) in &meta.xattrs {
            let key = c_string(key);
            // SAFETY: both strings end in NUL, and the value has the length that is given.
            let done = unsafe {
                let (data, len) = (value.as_ptr().cast(), value.len());
                libc::lsetxattr(name.as_ptr(), key.as_ptr(), data, len, 0)
            };
            assert_eq!(done, 0, "{key:?} on {}", path.display());
        }
        let time = libc::timespec {
            tv_sec: meta.mtime.0,
            tv_nsec: meta.mtime.1.into(),
        };
        // SAFETY: the path ends in NUL, and there are two times.
        let done = unsafe {
            let flags = libc::AT_SYMLINK_NOFOLLOW;
            libc::utimensat(libc::AT_FDCWD, name.as_ptr(), [time; 2].as_ptr(), flags)
        };
        assert_eq!(done, 0, "times of {}", path.display());
    }

    /// A container's overlay, writable, over a directory.
    fn container(&self, lower: &Path, name: &str) -> Container {
        self.container_over(lower.as_os_str(), name)
    }

    /// A container's overlay, writable, over what `lowerdir` says.
    fn container_over(&self, lower: &OsStr, name: &str) -> Container {
        let dir = self.path(name);
        for part in ["upper", "work", "root"] {
            fs::create_dir_all(dir.join(part)).unwrap();
        }
        // The root of the container is this directory.
        let upper = File::open(dir.join("upper")).unwrap();
        upper.set_modified(std::time::UNIX_EPOCH).unwrap();
        let data = format!(
            "lowerdir={},upperdir={},workdir={},volatile",
            lower.to_str().unwrap(),
            dir.join("upper").display(),
            dir.join("work").display()
        );
        let root = dir.join("root");
        let flags = nix::mount::MsFlags::empty();
        let data = Some(data.as_str());
        nix::mount::mount(Some("overlay"), &root, Some("overlay"), flags, data).unwrap();
        Container { root }
    }
}

/// The store of a bed.
fn open(dir: &Path) -> Arc<Store> {
    let config = store::Config {
        min_free: store::ByteSize(0),
        ..store::Config::default()
    };
    Store::open(&dir.join("store"), &config).unwrap()
}

struct Container {
    root: PathBuf,
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.root, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn c_string(bytes: &[u8]) -> CString {
    CString::new(bytes).unwrap()
}

fn meta(mode: u16) -> Meta {
    Meta {
        mode,
        uid: 0,
        gid: 0,
        mtime: (1_700_000_000, 123_456_789),
        xattrs: Vec::new(),
    }
}

fn xattr(key: &str, value: &[u8]) -> (Box<[u8]>, Box<[u8]>) {
    (key.as_bytes().into(), value.into())
}

/// What a program says, which may take two minutes.
fn run(command: &mut Command) -> String {
    let mut out = tempfile::tempfile().unwrap();
    let mut err = tempfile::tempfile().unwrap();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out.try_clone().unwrap())
        .stderr(err.try_clone().unwrap())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("{command:?} is stuck");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let read = |file: &mut File| {
        use std::io::{Read as _, Seek as _};
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (out, err) = (read(&mut out), read(&mut err));
    assert!(status.success(), "{command:?}: {status}\n{out}\n{err}");
    out
}

fn list(root: &Path) -> String {
    run(Command::new(PYTHON).args(["-c", LIST]).arg(root))
}

fn shell(script: &str, dir: &Path) -> String {
    let mut command = Command::new("/bin/sh");
    run(command
        .args(["-ec", script, "sh"])
        .arg(dir)
        .current_dir("/"))
}

#[track_caller]
fn assert_same(found: &str, expected: &str) {
    let differ = found.lines().zip(expected.lines()).find(|(a, b)| a != b);
    if let Some((found, expected)) = differ {
        panic!("\n   found {found}\nexpected {expected}");
    }
    assert_eq!(found.lines().count(), expected.lines().count());
}

/// The kernel gives files back a little after the last use.
#[track_caller]
fn assert_freed(image: &Path) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while native::in_use(image).unwrap() {
        assert!(Instant::now() < deadline, "stays in use");
        std::thread::sleep(Duration::from_millis(5));
    }
}
