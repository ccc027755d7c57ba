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
        native::mount(&self.image(), &self.objects(), &self.path("root")).unwrap()
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
    let deadline = Instant::now() + Duration::from_secs(20);
    while native::in_use(image).unwrap() {
        assert!(Instant::now() < deadline, "stays in use");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A bit of everything that is odd, 12,000 files in all.
fn odd() -> Maker {
    let mut maker = Maker::new();
    for n in 0..10_000u32 {
        let path = format!("many/{}/file-{n}", n % 37);
        maker.file(&path, format!("content {}", n % 5000), meta(0o644));
    }
    for n in 0..2000 {
        let path = format!("wide/{n:04}-{}", "x".repeat(n % 240));
        maker.file(&path, Vec::new(), meta(0o600));
    }
    let deep: String = (0..60).map(|n| format!("d{n}/")).collect();
    maker.file(&format!("{deep}leaf"), "deep", meta(0o400));
    for name in [
        "!first", "-", "..data", "...", ".hidden", "~", "\n", "a b", "é",
    ] {
        maker.file(&format!("names/{name}"), name.to_owned(), meta(0o644));
    }
    maker.dir("names/+dir", meta(0o1777));
    maker.file(&format!("names/{}", "n".repeat(255)), "long", meta(0o644));
    for size in [1, 4095, 4096, 4097, 8192, 100_000, 3_000_000] {
        let content: Vec<u8> = (0..size).map(|n: u32| (n * 31 / 7) as u8).collect();
        maker.file(&format!("sizes/{size}"), content, meta(0o644));
    }
    maker.dir("empty", meta(0o700));
    let linked = maker.file("links/first", "linked", meta(0o644));
    for name in ["links/second", "names/third", "zz"] {
        maker.tree.link(name.as_bytes(), linked).unwrap();
    }
    let empty = maker.file("links/empty", "", meta(0o644));
    maker.tree.link(b"links/empty2", empty).unwrap();
    for len in [1, 59, 60, 1000, 2000, 4000, 4031, 4032, 4033, 4095] {
        maker.symlink(&format!("symlinks/{len}"), &"t".repeat(len));
    }
    maker.symlink("symlinks/dangling", "../../nowhere");
    let link = maker.symlink("symlinks/one", "target");
    maker.tree.link(b"symlinks/two", link).unwrap();
    let owned = |mode| Meta {
        uid: 4_000_000_000,
        gid: 70_000,
        mtime: (-5, 999_999_999),
        ..meta(mode)
    };
    maker.file("owned/suid", "x", owned(0o6755));
    maker.dir("owned/dir", owned(0o2775));
    let null = Kind::Char { major: 1, minor: 3 };
    maker.add("dev/null", null, owned(0o666));
    let (major, minor) = (300, 70_001);
    maker.add("dev/block", Kind::Block { major, minor }, meta(0o660));
    maker.add("dev/fifo", Kind::Fifo, meta(0o622));
    maker.add("dev/socket", Kind::Socket, meta(0o755));
    let acl = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0\x04\0\x04\0\xff\xff\xff\xff\x10\0\x06\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
    let capability = b"\x01\0\0\x02\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let xattrs = |list: &[(&str, &[u8])]| Meta {
        xattrs: list.iter().map(|(key, value)| xattr(key, value)).collect(),
        ..meta(0o664)
    };
    maker.file(
        "xattrs/user",
        "x",
        xattrs(&[("user.a", b"1"), ("user.b", b"")]),
    );
    maker.file(
        "xattrs/cap",
        "x",
        xattrs(&[("security.capability", capability)]),
    );
    maker.file(
        "xattrs/acl",
        "x",
        xattrs(&[("system.posix_acl_access", acl)]),
    );
    maker.file("xattrs/big", "", xattrs(&[("user.big", &[7; 3000])]));
    maker.file("xattrs/trusted", "x", xattrs(&[("trusted.t", b"t")]));
    maker.dir(
        "xattrs/dir",
        xattrs(&[("user.dir", &[1; 700]), ("trusted.d", b"")]),
    );
    maker
}

#[test]
fn a_root_is_its_tree() {
    let bed = odd().finish();
    let root = bed.mount();
    let plain = bed.plain();
    assert_same(&list(&bed.path("root")), &list(&plain));
    // The tools of the format have nothing to say against it.
    run(Command::new("fsck.erofs").arg(bed.image()));
    let said = run(Command::new("dump.erofs").arg("-s").arg(bed.image()));
    assert!(said.contains("0xE0F5E1E2"), "{said}");
    drop(root);
    assert_eq!(fs::read_dir(bed.path("root")).unwrap().count(), 0);
    assert_freed(&bed.image());
}

#[test]
fn a_container_on_top_sees_and_does_what_it_does_on_a_plain_directory() {
    // What overlayfs keeps in user space's names, and what it copies up, is the same.
    const DEEDS: &str = r#"
        cd "$1"
        echo more >> sizes/4096; : > sizes/8192; chmod 4711 owned/suid; chown 5:6 many/3/file-3
        rm -r many/5 zz; rm links/second; mkdir many/5; echo new > many/5/new
        mv many/7 moved; mv names/..data wide/; ln links/first links/again
        ln -s x symlinks/new; rmdir empty; mv dev/fifo dev/pipe
        touch -h -d @1000000000 symlinks/1; cp --preserve=all xattrs/cap xattrs/copy; rm -r wide/000*
        find . -newermt @1750000000 -exec touch -h -d @1500000000 {} +
    "#;
    let bed = odd().finish();
    let _root = bed.mount();
    let plain = bed.plain();
    let on_plain = bed.container(&plain, "over-plain");
    let on_root = bed.container(&bed.path("root"), "stacked");
    // Names that would have to be escaped.
    let (metadata, objects) = (bed.path("meta:data, \\"), bed.path("the: objects"));
    fs::create_dir(&metadata).unwrap();
    std::os::unix::fs::symlink(bed.objects(), &objects).unwrap();
    let _metadata = native::mount_metadata(&bed.image(), &metadata).unwrap();
    let support = native::available(&bed.path("store")).unwrap();
    let mut containers = vec![&on_root, &on_plain];
    let on_metadata;
    if support == native::Support::Direct {
        let lower = native::lowerdir(&metadata, &objects);
        on_metadata = bed.container_over(&lower, "direct");
        containers.push(&on_metadata);
    }
    let untouched = list(&on_plain.root);
    for container in &containers {
        assert_same(&list(&container.root), &untouched);
        shell(DEEDS, &container.root);
    }
    for container in &containers {
        assert_same(&list(&container.root), &list(&on_plain.root));
    }
    // Below, nothing has changed.
    assert_same(&list(&bed.path("root")), &list(&plain));
    let error = fs::write(bed.path("root/new"), "x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
}

fn any_meta() -> impl Strategy<Value = Meta> {
    // What ext4 can store.
    let time = (-2_147_483_648i64..8_000_000_000, 0u32..1_000_000_000);
    let attribute = ("[a-z.]{1,20}", prop::collection::vec(any::<u8>(), 0..120));
    let xattrs = prop::collection::btree_map(attribute.0, attribute.1, 0..4);
    (0u16..0o10000, any::<u16>(), any::<u32>(), time, xattrs).prop_map(
        |(mode, uid, gid, mtime, list)| Meta {
            mode,
            uid: uid.into(),
            gid: gid.min(u32::MAX - 1),
            mtime,
            xattrs: list
                .iter()
                .map(|(key, value)| xattr(&format!("trusted.{key}"), value))
                .collect(),
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn random_trees_are_shown_as_they_are(
        entries in prop::collection::vec(
            (prop::collection::vec("[a-d.+~]{1,3}|[a-z]{250}", 1..5), 0u8..7, any::<u32>(), any_meta()), 0..60)
    ) {
        let mut maker = Maker::new();
        let mut files = Vec::new();
        for (path, kind, number, mut meta) in entries {
            let path = path.join("/");
            let kind = match kind {
                0 => Kind::Dir { parent: 0, entries: Vec::new() },
                1 => Kind::Symlink { target: path.repeat(1 + number as usize % 12).into_bytes().into() },
                2 => Kind::Char { major: 1 + number % 4095, minor: number >> 12 },
                3 => Kind::Fifo,
                4 => {
                    if let Some(&file) = files.get(number as usize % files.len().max(1)) {
                        let _ = maker.tree.link(path.as_bytes(), file);
                    }
                    continue;
                }
                _ => Kind::File { object: maker.objects.len() as u32 },
            };
            let is_file = matches!(kind, Kind::File { .. });
            if matches!(kind, Kind::Symlink { .. }) {
                meta.mode = 0o777;
            }
            if let Ok(inode) = maker.tree.add(path.as_bytes(), kind.clone(), meta) {
                if !matches!(kind, Kind::Dir { .. }) {
                    files.push(inode);
                }
                if is_file {
                    let content = number.to_le_bytes().repeat(number as usize % 3000);
                    maker.objects.push(Object {
                        id: ObjectId::Sha256(Digest::of(&content)),
                        size: content.len() as u64,
                        git_sha1: None,
                        recipe: Recipe::Raw(Location { path, generation: None, offset: 0 }),
                    });
                    maker.contents.push(content.into());
                }
            }
        }
        let bed = maker.finish();
        let _root = bed.mount();
        assert_same(&list(&bed.path("root")), &list(&bed.plain()));
    }
}

#[test]
fn what_overlayfs_would_take_for_its_own_is_shown_or_left_out() {
    let mut maker = Maker::new();
    let own = Meta {
        xattrs: vec![
            xattr("trusted.overlay.opaque", b"y"),
            xattr("trusted.overlay.redirect", b"/etc"),
            xattr("system.unknown", b"x"),
        ],
        ..meta(0o755)
    };
    maker.dir("dir", own.clone());
    maker.file("dir/file", "content", own);
    let gone = Kind::Char { major: 0, minor: 0 };
    maker.add("dir/gone", gone, meta(0o600));
    let bed = maker.finish();
    let _root = bed.mount();
    let found = list(&bed.path("root"));
    assert_eq!(found.lines().count(), 3, "{found}");
    for line in found.lines().skip(1) {
        assert!(line.contains("'trusted.overlay.opaque', b'y'"), "{line}");
        assert!(
            line.contains("'trusted.overlay.redirect', b'/etc'"),
            "{line}"
        );
        assert!(!line.contains("unknown"), "{line}");
    }
}

#[test]
fn a_root_holds_its_image_as_long_as_anything_uses_it() {
    let mut maker = Maker::new();
    maker.file("file", "content", meta(0o644));
    let bed = maker.finish();
    let dir = bed.path("root");
    assert!(!native::in_use(&bed.image()).unwrap());
    assert!(!native::in_use(&bed.path("missing")).unwrap());
    let kept = bed.mount().keep();
    assert_eq!(native::find(&dir).unwrap(), Some(kept.clone()));
    assert!(native::mounted().unwrap().contains(&kept));
    // Another process sees it too: here the locks of this one do not count.
    let locked = |wanted: i32| {
        let mut flock = Command::new("flock");
        let status = flock
            .args(["-n", "-x"])
            .arg(bed.image())
            .arg("true")
            .status();
        assert_eq!(status.unwrap().code(), Some(wanted));
    };
    locked(1);
    let twice = native::mount(&bed.image(), &bed.objects(), &dir).unwrap_err();
    assert_eq!(twice.kind(), MountErrorKind::Mounted);

    let file = File::open(dir.join("file")).unwrap();
    let busy = native::unmount(&dir, false).unwrap_err();
    assert_eq!(busy.kind(), MountErrorKind::Busy);
    drop(file);
    let container = bed.container(&dir, "container");
    native::unmount(&dir, false).unwrap();
    assert_eq!(native::find(&dir).unwrap(), None);
    locked(1);
    assert_eq!(fs::read(container.root.join("file")).unwrap(), b"content");
    drop(container);
    assert_freed(&bed.image());
    locked(0);
    let none = native::unmount(&dir, false).unwrap_err();
    assert_eq!(none.kind(), MountErrorKind::NotMounted);
}

#[test]
fn what_a_mounted_root_needs_is_not_evicted() {
    let mut maker = Maker::new();
    maker.file("file", "content", meta(0o644));
    let bed = maker.finish();
    let store = bed.open();
    let artifact = Artifact {
        reference: "oci://registry.test/image:1".into(),
        revision: String::new(),
        tree: bed.tree.clone(),
        objects: bed.objects.clone(),
    };
    let digest = store.record(&artifact).unwrap();
    let write = |out: &mut dyn std::io::Write| {
        let written = erofs::write(&artifact.tree, &artifact.objects, out);
        written.map(drop).map_err(std::io::Error::other)
    };
    let failed = store.write_root_image(&digest, |out| {
        out.write_all(b"half")?;
        Err(std::io::Error::other("made to fail"))
    });
    assert!(failed.unwrap_err().to_string().contains("made to fail"));
    assert!(!store.root_image(&digest).exists());
    let image = store.write_root_image(&digest, write).unwrap();
    assert_eq!(fs::read(&image).unwrap(), fs::read(bed.image()).unwrap());
    // What is there stays: it may be mounted.
    let again = store.write_root_image(&digest, |_| panic!("is there"));
    assert_eq!(again.unwrap(), image);

    let dir = bed.path("root");
    let root = native::mount(&image, &store.objects_dir(), &dir).unwrap();
    root.keep();
    let all = CollectOptions {
        target_bytes: Some(0),
        dry_run: false,
    };
    assert_eq!(store.collect(&all).unwrap().evicted, [""; 0]);
    // Even what was removed by name, and with a container on top only.
    assert!(store.remove_forced(&artifact.reference).unwrap());
    let container = bed.container(&dir, "container");
    native::unmount(&dir, false).unwrap();
    let report = store.collect(&all).unwrap();
    assert_eq!((report.objects, report.others), (0, 0));
    assert_eq!(fs::read(container.root.join("file")).unwrap(), b"content");
    drop(container);
    assert_freed(&image);
    let report = store.collect(&all).unwrap();
    // The object; the tree and the image.
    assert_eq!((report.objects, report.others), (1, 2));
    assert!(!image.exists());
}

#[test]
fn what_cannot_be_mounted_leaves_nothing_behind() {
    let mut maker = Maker::new();
    maker.file("file", "content", meta(0o644));
    let bed = maker.finish();
    let before = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let try_mount = |image: &Path, objects: &Path, dir: &str| {
        native::mount(image, objects, &bed.path(dir)).unwrap_err()
    };
    let error = try_mount(&bed.path("missing"), &bed.objects(), "root");
    assert!(error.to_string().contains("o such file"), "{error}");
    let garbage = bed.path("garbage");
    fs::write(&garbage, vec![7; 1 << 16]).unwrap();
    try_mount(&garbage, &bed.objects(), "root");
    assert_freed(&garbage);
    try_mount(&bed.image(), &bed.path("missing"), "root");
    assert_freed(&bed.image());
    let error = try_mount(&bed.image(), &bed.objects(), "missing");
    assert_eq!(error.kind(), MountErrorKind::Directory);
    let ours = |text: &str| {
        let lines = text.lines();
        lines
            .filter(|l| l.contains(bed.dir.path().to_str().unwrap()))
            .count()
    };
    let after = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert_eq!(ours(&after), ours(&before));

    native::available(&bed.path("store")).unwrap();
    let run = fs::read_dir(bed.path("store/run")).unwrap();
    assert_eq!(run.count(), 0, "trying it out leaves nothing");
    let error = native::available(Path::new("/proc")).unwrap_err();
    assert_eq!(error.kind(), MountErrorKind::NoNative);
    assert!(error.hint().is_some());
}

#[test]
fn an_object_that_is_missing_fails_its_file_only() {
    let mut maker = Maker::new();
    maker.file("gone", "gone", meta(0o644));
    maker.file("here", "here", meta(0o644));
    let bed = maker.finish();
    let hex = Digest::of(b"gone").hex();
    fs::remove_file(bed.objects().join("sha256").join(&hex[..2]).join(&hex)).unwrap();
    let _root = bed.mount();
    assert!(fs::read(bed.path("root/gone")).is_err());
    assert_eq!(fs::read(bed.path("root/here")).unwrap(), b"here");
}

#[test]
fn equal_files_of_two_roots_share_their_pages() {
    let content: Bytes = (0..4_000_000u32)
        .map(|n| (n * 37 / 11) as u8)
        .collect::<Vec<_>>()
        .into();
    let mut maker = Maker::new();
    maker.file("a/file", content.clone(), meta(0o644));
    let first = maker.finish();
    let mut maker = Maker::new();
    maker.file("other", content.clone(), meta(0o755));
    maker.file("more", "more", meta(0o644));
    let tree = maker.tree.build();
    let image = first.path("second.erofs");
    erofs::write(&tree, &maker.objects, File::create(&image).unwrap()).unwrap();
    fs::create_dir(first.path("second")).unwrap();
    let _first = first.mount();
    let _second = native::mount(&image, &first.objects(), &first.path("second")).unwrap();
    let hex = Digest::of(&content).hex();
    let object = first.objects().join("sha256").join(&hex[..2]).join(&hex);
    let resident = |path: &Path| {
        let said = run(Command::new("fincore")
            .args(["-n", "-b", "-o", "RES"])
            .arg(path));
        said.trim().parse::<u64>().unwrap()
    };
    let forget = "import os, sys\nf = os.open(sys.argv[1], os.O_RDONLY)\nos.fsync(f)\nos.posix_fadvise(f, 0, 0, os.POSIX_FADV_DONTNEED)";
    run(Command::new(PYTHON).args(["-c", forget]).arg(&object));
    assert_eq!(resident(&object), 0);
    assert_eq!(fs::read(first.path("root/a/file")).unwrap(), content);
    // What was read through one root is there for the other, and is the object itself.
    for path in [
        &object,
        &first.path("second/other"),
        &first.path("root/a/file"),
    ] {
        assert!(resident(path) >= content.len() as u64, "{}", path.display());
    }
}

/// Adds a file of this machine, with links followed, and the libraries it needs.
fn add_program(maker: &mut Maker, program: &str, path: &str, meta: Meta) {
    let content = fs::read(program).unwrap();
    maker.file(path, content, meta);
    let said = run(Command::new("ldd").arg(program));
    for library in said.split_whitespace().filter(|word| word.starts_with('/')) {
        let path = library.trim_start_matches('/');
        let content = fs::read(library).unwrap();
        let object = maker.objects.len() as u32;
        let meta = self::meta(0o755);
        if maker
            .tree
            .add_file(path.as_bytes(), object, meta.clone())
            .is_ok()
        {
            // Was not there yet: takes the number that `file` gives its object.
            maker.objects.push(Object {
                id: ObjectId::Sha256(Digest::of(&content)),
                size: content.len() as u64,
                git_sha1: None,
                recipe: Recipe::Raw(Location {
                    path: path.into(),
                    generation: None,
                    offset: 0,
                }),
            });
            maker.contents.push(content.into());
        }
    }
}

/// The standard library of this machine's Python, without what nothing imports.
fn add_python(maker: &mut Maker, dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        let path = entry.path();
        if path.is_dir() {
            if !matches!(
                name.to_str(),
                Some("__pycache__" | "test" | "idlelib" | "ensurepip")
            ) {
                add_python(maker, &path);
            }
        } else if path.is_file() {
            let inside = path.to_str().unwrap().trim_start_matches('/').to_owned();
            maker.file(&inside, fs::read(&path).unwrap(), meta(0o644));
        }
    }
}

#[test]
fn programs_run_in_a_container_on_a_root() {
    let mut maker = Maker::new();
    let python = fs::canonicalize(PYTHON).unwrap();
    let version = python.file_name().unwrap().to_str().unwrap().to_owned();
    let library = Path::new("/usr/lib").join(&version);
    add_program(
        &mut maker,
        python.to_str().unwrap(),
        "usr/bin/python3",
        meta(0o755),
    );
    add_python(&mut maker, &library);
    add_program(&mut maker, "/usr/bin/id", "usr/bin/id", meta(0o755));
    add_program(&mut maker, "/usr/bin/id", "usr/bin/suid", meta(0o4755));
    add_program(
        &mut maker,
        "/usr/bin/setpriv",
        "usr/bin/setpriv",
        meta(0o755),
    );
    add_program(&mut maker, "/usr/bin/cat", "usr/bin/cat", meta(0o755));
    // cap_dac_override, effective
    let capability = b"\x01\0\0\x02\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let able = Meta {
        xattrs: vec![xattr("security.capability", capability)],
        ..meta(0o755)
    };
    add_program(&mut maker, "/usr/bin/cat", "usr/bin/able", able);
    maker.file("secret", "for root\n", meta(0o400));
    maker.dir("tmp", meta(0o1777));
    let bed = maker.finish();
    let _root = bed.mount();
    let container = bed.container(&bed.path("root"), "container");
    let chroot =
        |arguments: &[&str]| run(Command::new("chroot").arg(&container.root).args(arguments));
    let python = |code: &str| chroot(&["/usr/bin/python3", "-c", code]);
    assert_eq!(python("print(1)"), "1\n");
    let mapped = "import mmap, os\nf = os.open('/usr/bin/python3', os.O_RDONLY)\nm = mmap.mmap(f, 0, prot=mmap.PROT_READ)\nprint(m[1:4].decode(), len(m) == os.fstat(f).st_size)";
    assert_eq!(python(mapped), "ELF True\n");
    let direct = "import mmap, os\nf = os.open('/usr/bin/python3', os.O_RDONLY | os.O_DIRECT)\nb = mmap.mmap(-1, 8192)\nprint(os.preadv(f, [b], 4096))\ng = open('/usr/bin/python3', 'rb')\ng.seek(4096)\nprint(g.read(8192) == b[:])";
    assert_eq!(python(direct), "8192\nTrue\n");
    let user = [
        "/usr/bin/setpriv",
        "--reuid=1000",
        "--regid=1000",
        "--clear-groups",
    ];
    let as_user = |arguments: &[&str]| chroot(&[&user, arguments].concat());
    assert_eq!(as_user(&["/usr/bin/id", "-u"]), "1000\n");
    assert_eq!(as_user(&["/usr/bin/suid", "-u"]), "0\n");
    assert_eq!(as_user(&["/usr/bin/able", "/secret"]), "for root\n");
    let mut denied = Command::new("chroot");
    let denied = denied
        .arg(&container.root)
        .args(user)
        .args(["/usr/bin/cat", "/secret"]);
    assert!(!denied.stderr(Stdio::null()).status().unwrap().success());
}
