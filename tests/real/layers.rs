//! Layers merged by us and unpacked by containerd are the same tree, in every attribute.

use std::{
    collections::BTreeMap,
    ffi::{CString, OsStr},
    fs,
    io::Read as _,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output},
    thread,
    time::{Duration, Instant},
};

use hearth::{
    digest::Digest,
    image::{Compression, ImageError, LayerIndex, Limits, Unpacker, merge},
    tree::{Kind, Meta, Object, Tree},
};

use sha2::{Digest as _, Sha256};

use crate::digests::Digests;

/// Everything that can be seen of one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The kind, with what belongs to it: content, target, device.
    pub(crate) what: String,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Other names of the same inode.
    links: Vec<String>,
}

pub(crate) type Walk = BTreeMap<String, (Seen, u64)>;

fn show(path: &[u8]) -> String {
    path.escape_ascii().to_string()
}

/// Fills in the names that each inode has.
fn link(walk: &mut Walk) {
    let mut names: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for (path, (_, inode)) in &*walk {
        names.entry(*inode).or_default().push(path.clone());
    }
    for (seen, inode) in walk.values_mut() {
        seen.links.clone_from(&names[inode]);
    }
}

// ---- ours

fn index(tar: &[u8]) -> LayerIndex {
    let blob = Digest::of(tar);
    let mut sink = Digests::default();
    let mut unpacker = Unpacker::new(blob, Limits::default());
    for piece in tar.chunks(100_003) {
        unpacker.feed(piece, &mut sink).unwrap();
    }
    LayerIndex {
        blob,
        blob_size: tar.len() as u64,
        compression: Compression::None,
        diff_id: blob,
        size: tar.len() as u64,
        entries: unpacker.finish(&mut sink).unwrap(),
        spans: Vec::new(),
    }
}

fn merged(layers: &[Vec<u8>]) -> Result<Walk, ImageError> {
    let indexes: Vec<_> = layers.iter().map(|layer| index(layer)).collect();
    let (tree, objects) = merge(&indexes.iter().collect::<Vec<_>>())?;
    Ok(walk_tree(&tree, &objects))
}

fn walk_tree(tree: &Tree, objects: &[Object]) -> Walk {
    let mut walk = Walk::new();
    let mut stack = vec![(Vec::new(), 0u32)];
    while let Some((path, number)) = stack.pop() {
        let inode = tree.get(number).unwrap();
        let what = match &inode.kind {
            Kind::Dir { entries, .. } => {
                for entry in entries {
                    stack.push(([&path, &b"/"[..], &entry.name].concat(), entry.inode));
                }
                "dir".to_owned()
            }
            Kind::File { object } => {
                let object = &objects[*object as usize];
                format!("file of {} {}", object.size, object.id)
            }
            Kind::Symlink { target } => format!("symlink to {}", show(target)),
            Kind::Char { major, minor } => format!("char {major} {minor}"),
            Kind::Block { major, minor } => format!("block {major} {minor}"),
            Kind::Fifo => "fifo".to_owned(),
            Kind::Socket => "socket".to_owned(),
        };
        let Meta {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        } = inode.meta.clone();
        let seen = Seen {
            what,
            mode: mode.into(),
            uid,
            gid,
            mtime,
            xattrs: xattrs
                .into_iter()
                .map(|(name, value)| (name.into(), value.into()))
                .collect(),
            links: Vec::new(),
        };
        walk.insert(show(&path), (seen, number.into()));
    }
    link(&mut walk);
    walk
}

// ---- theirs

/// A private containerd; ended, and its mounts undone, when dropped.
struct Containerd {
    child: Child,
    dir: tempfile::TempDir,
    mounted: Vec<PathBuf>,
}

impl Containerd {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display();
        let config = format!(
            "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
             [grpc]\n  address = \"{at}/sock\"\n"
        );
        fs::write(dir.path().join("config.toml"), config).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new("containerd");
        command
            .arg("-c")
            .arg(dir.path().join("config.toml"))
            .current_dir(dir.path());
        let child = crate::servers::spawn(&mut command, log);
        let containerd = Self {
            child,
            dir,
            mounted: Vec::new(),
        };
        let begun = Instant::now();
        while !containerd.ctr(&["version"]).status.success() {
            let log = fs::read_to_string(containerd.dir.path().join("log")).unwrap();
            assert!(begun.elapsed() < Duration::from_secs(60), "{log}");
            thread::sleep(Duration::from_millis(100));
        }
        containerd
    }

    fn ctr(&self, args: &[&str]) -> Output {
        Command::new("ctr")
            .arg("--address")
            .arg(self.dir.path().join("sock"))
            .args(args)
            .output()
            .unwrap()
    }

    /// Imports images, each of its layers, lowest first.
    fn import(&self, images: &[Vec<Vec<u8>>]) {
        let layout = self.dir.path().join("layout");
        write_layout(&layout, images);
        let archive = self.dir.path().join("image.tar");
        run(Command::new("tar")
            .arg("-C")
            .arg(&layout)
            .arg("-cf")
            .arg(&archive)
            .arg("."));
        let archive = archive.to_str().unwrap();
        let output = self.ctr(&["images", "import", "--no-unpack", archive]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
    }

    /// Unpacks and mounts one of the imported images; `None` where containerd refuses to.
    fn mount(&mut self, number: usize) -> Option<PathBuf> {
        let at = self.dir.path().join(format!("mounted-{number}"));
        fs::create_dir(&at).unwrap();
        let name = format!("test.invalid/layers:{number}");
        let output = self.ctr(&["images", "mount", &name, at.to_str().unwrap()]);
        if !output.status.success() {
            return None;
        }
        self.mounted.push(at.clone());
        Some(at)
    }

    fn unmount(&mut self, at: &Path) {
        run(Command::new("umount").arg(at));
        self.mounted.retain(|mounted| mounted != at);
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        for at in &self.mounted {
            let _ = Command::new("umount").arg("-l").arg(at).status();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
}

fn write_layout(at: &Path, images: &[Vec<Vec<u8>>]) {
    let blobs = at.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |kind: &str, data: &[u8]| {
        let digest = Digest::of(data);
        fs::write(blobs.join(digest.hex()), data).unwrap();
        let media_type = format!("application/vnd.oci.image.{kind}");
        serde_json::json!({"mediaType": media_type, "digest": digest.to_string(), "size": data.len()})
    };
    let architecture = match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "amd64",
    };
    let manifest = |(number, layers): (usize, &Vec<Vec<u8>>)| {
        let diff_ids: Vec<_> = layers.iter().map(|l| Digest::of(l).to_string()).collect();
        let config = serde_json::json!({
            "architecture": architecture, "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = put("config.v1+json", config.to_string().as_bytes());
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| put("layer.v1.tar", layer))
            .collect();
        let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers,
            "mediaType": "application/vnd.oci.image.manifest.v1+json"});
        let mut manifest = put("manifest.v1+json", manifest.to_string().as_bytes());
        let name = format!("test.invalid/layers:{number}");
        manifest["annotations"] = serde_json::json!({"io.containerd.image.name": name});
        manifest
    };
    let manifests: Vec<_> = images.iter().enumerate().map(manifest).collect();
    let index = serde_json::json!({"schemaVersion": 2, "manifests": manifests});
    fs::write(at.join("index.json"), index.to_string()).unwrap();
    fs::write(at.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// What a file system shows below `root`.
pub(crate) fn walk_files(root: &Path) -> Walk {
    let mut walk = Walk::new();
    let mut stack = vec![root.to_owned()];
    while let Some(path) = stack.pop() {
        // A whiteout that nothing is below of is listed all the same, and the only layer of an
        // image is mounted without overlayfs: then even the mark itself can be seen.
        let Ok(meta) = fs::symlink_metadata(&path) else {
            continue;
        };
        let kind = meta.file_type();
        if kind.is_char_device() && meta.rdev() == 0 {
            continue;
        }
        let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
        let what = if kind.is_dir() {
            stack.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            "dir".to_owned()
        } else if kind.is_file() {
            let (size, digest) = read(&path);
            assert_eq!(size, meta.size());
            format!("file of {size} {digest}")
        } else if kind.is_symlink() {
            let target = fs::read_link(&path).unwrap().into_os_string().into_vec();
            format!("symlink to {}", show(&target))
        } else if kind.is_char_device() {
            format!("char {major} {minor}")
        } else if kind.is_block_device() {
            format!("block {major} {minor}")
        } else {
            assert!(kind.is_fifo(), "{path:?}");
            "fifo".to_owned()
        };
        let seen = Seen {
            what,
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: (meta.mtime(), meta.mtime_nsec() as u32),
            xattrs: xattrs(&path),
            links: Vec::new(),
        };
        let relative = path.strip_prefix(root).unwrap().as_os_str().as_bytes();
        let name = match relative {
            b"" => String::new(),
            _ => show(&[b"/", relative].concat()),
        };
        walk.insert(name, (seen, meta.ino()));
    }
    link(&mut walk);
    walk
}

fn read(path: &Path) -> (u64, Digest) {
    let (mut hasher, mut buffer, mut size) = (Sha256::new(), vec![0; 1 << 20], 0);
    let mut file = fs::File::open(path).unwrap();
    loop {
        let count = file.read(&mut buffer).unwrap();
        if count == 0 {
            return (size, Digest::from_bytes(hasher.finalize().into()));
        }
        hasher.update(&buffer[..count]);
        size += count as u64;
    }
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let at = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut list = vec![0u8; 1 << 16];
    // SAFETY: the path is NUL-terminated and the buffer as long as said.
    let len = unsafe { libc::llistxattr(at.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    // A mounted tree that has none anywhere says that it knows of none.
    let error = std::io::Error::last_os_error().raw_os_error();
    if len < 0 && error == Some(libc::EOPNOTSUPP) {
        return BTreeMap::new();
    }
    list.truncate(usize::try_from(len).unwrap_or_else(|_| panic!("xattrs of {path:?}")));
    let names = list
        .split(|&b| b == 0)
        .filter(|name| !name.is_empty() && !name.starts_with(b"trusted.overlay."));
    names
        .map(|name| {
            let name_at = CString::new(name).unwrap();
            let mut value = vec![0u8; 1 << 16];
            // SAFETY: path and name are NUL-terminated and the buffer as long as said.
            let len = unsafe {
                libc::lgetxattr(
                    at.as_ptr(),
                    name_at.as_ptr(),
                    value.as_mut_ptr().cast(),
                    value.len(),
                )
            };
            value.truncate(usize::try_from(len).unwrap());
            (name.to_vec(), value)
        })
        .collect()
}

fn script(dir: &Path) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real/layers.sh");
    run(Command::new("bash")
        .arg(script)
        .arg(dir)
        .env("LC_ALL", OsStr::new("C.UTF-8")));
}

/// What is not the same, unless it is the time of a path that `untimed` says.
pub(crate) fn differences(
    ours: &Walk,
    theirs: &Walk,
    untimed: impl Fn(&str, &Seen) -> bool,
) -> Vec<String> {
    let mut wrong = Vec::new();
    let more = theirs.keys().filter(|path| !ours.contains_key(*path));
    for path in ours.keys().chain(more) {
        let (mut ours, theirs) = (ours.get(path).cloned(), theirs.get(path));
        if let (Some((ours, _)), Some((theirs, _))) = (&mut ours, theirs) {
            if untimed(path, ours) {
                ours.mtime = theirs.mtime;
            }
            if ours == theirs {
                continue;
            }
        }
        wrong.push(format!("{path}:\n  ours:   {ours:?}\n  theirs: {theirs:?}"));
    }
    wrong
}

#[test]
fn a_merged_tree_is_what_containerd_unpacks() {
    let made = tempfile::tempdir().unwrap();
    script(made.path());
    let layers: Vec<Vec<u8>> = (0..3)
        .map(|n| fs::read(made.path().join(format!("{n}.tar"))).unwrap())
        .collect();

    let mut containerd = Containerd::start();
    containerd.import(std::slice::from_ref(&layers));
    let theirs = walk_files(&containerd.mount(0).unwrap());
    let ours = merged(&layers).unwrap();

    // Directories that no entry describes have the time of the unpacking.
    let untimed = [
        "",
        "/implied",
        "/implied/odd",
        "/implied/odd/sub",
        "/lib",
        "/.wh..wh.plnk",
    ];
    let wrong = differences(&ours, &theirs, |path, _| untimed.contains(&path));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(ours.len() > 70, "{}", ours.len());
}

/// A small generator, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % most
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len() as u64) as usize]
    }

    fn path(&mut self) -> String {
        let depth = self.below(3) + 1;
        let names: Vec<_> = (0..depth)
            .map(|_| self.one(&["a", "a", "a", "b", "b", "c"]))
            .collect();
        names.join("/")
    }

    /// A layer of few names, so that much happens to each; most of them containerd can unpack.
    fn layer(&mut self, lowest: bool) -> Vec<u8> {
        let mut tar = Vec::new();
        // What is at each path, symlinks not followed.
        let mut there: BTreeMap<String, u8> = BTreeMap::new();
        for _ in 0..self.below(9) {
            let mode = self.below(0o1000) as u32;
            let content = "x".repeat(self.below(3) as usize);
            let path = self.path();
            // What is below nothing hides nothing: there containerd does not follow the image-spec.
            let flag = match self.below(if lowest { 18 } else { 23 }) {
                0..7 => b'5',
                7..14 => b'0',
                14 | 15 => b'2',
                16 | 17 => b'1',
                18 | 19 => b'w',
                20 | 21 => b'o',
                _ => b'3',
            };
            let parents: Vec<&str> = path.match_indices('/').map(|(at, _)| &path[..at]).collect();
            let blocks = |p: &&str| there.get(*p).is_some_and(|flag| !b"52".contains(flag));
            if parents.iter().any(blocks) || flag == b'w' && there.contains_key(&path) {
                continue;
            }
            let below = format!("{path}/");
            let files: Vec<_> = there
                .iter()
                .filter(|(p, flag)| **flag == b'0' && **p != path && !p.starts_with(&below))
                .map(|(p, _)| p.as_str())
                .collect();
            match flag {
                b'2' => {
                    let target = [self.one(&["", "/", "../", "./"]), &self.path()].concat();
                    put(&mut tar, flag, &path, &target, mode, "");
                }
                b'1' if files.is_empty() => continue,
                b'1' => {
                    let target = self.one(&files);
                    put(&mut tar, flag, &path, target, mode, "");
                }
                b'w' => {
                    let (dir, name) = path.rsplit_once('/').unwrap_or((".", &path));
                    put(&mut tar, b'0', &format!("{dir}/.wh.{name}"), "", mode, "");
                }
                b'o' if blocks(&path.as_str()) => continue,
                b'o' => put(
                    &mut tar,
                    b'0',
                    &format!("{path}/.wh..wh..opq"),
                    "",
                    mode,
                    "",
                ),
                b'0' => put(&mut tar, flag, &path, "", mode, &content),
                _ => put(&mut tar, flag, &path, "", mode, ""),
            }
            for parent in parents {
                there.entry(parent.to_owned()).or_insert(b'5');
            }
            match flag {
                b'5' if there.get(&path) == Some(&b'5') => {}
                b'o' => _ = there.entry(path).or_insert(b'5'),
                flag => {
                    there.retain(|p, _| !p.starts_with(&below));
                    there.insert(path, flag);
                }
            }
        }
        tar.extend_from_slice(&[0; 1024]);
        tar
    }
}

fn put(tar: &mut Vec<u8>, flag: u8, path: &str, target: &str, mode: u32, content: &str) {
    let mut block = [0; 512];
    block[..path.len()].copy_from_slice(path.as_bytes());
    block[100..107].copy_from_slice(format!("{mode:07o}").as_bytes());
    block[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    block[136..147].copy_from_slice(b"00000001000");
    block[156] = flag;
    block[157..157 + target.len()].copy_from_slice(target.as_bytes());
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
    block[148..154].copy_from_slice(format!("{sum:06o}").as_bytes());
    tar.extend_from_slice(&block);
    tar.extend_from_slice(content.as_bytes());
    tar.resize(tar.len().next_multiple_of(512), 0);
}

/// Whatever containerd unpacks at all, we merge to the same.
#[test]
fn random_layers_are_merged_as_containerd_unpacks_them() {
    let seed = std::env::var("HEARTH_TEST_SEED").map_or(1, |seed| seed.parse().unwrap());
    let mut random = Random(seed);
    let images: Vec<Vec<Vec<u8>>> = (0..80)
        .map(|_| {
            (0..=random.below(3))
                .map(|n| random.layer(n == 0))
                .collect()
        })
        .collect();
    let mut containerd = Containerd::start();
    containerd.import(&images);
    let mut compared = 0;
    let mut wrong = Vec::new();
    for (number, layers) in images.iter().enumerate() {
        let Some(at) = containerd.mount(number) else {
            continue;
        };
        let theirs = walk_files(&at);
        containerd.unmount(&at);
        compared += 1;
        let what = match merged(layers) {
            Ok(ours) => differences(&ours, &theirs, |_, seen| seen.what == "dir").join("\n"),
            Err(error) => error.to_string(),
        };
        if !what.is_empty() {
            let entries: Vec<_> = layers
                .iter()
                .map(|layer| {
                    let listed = index(layer).entries;
                    let lines = listed
                        .iter()
                        .map(|e| format!("  {} {:?}", show(&e.path), e.kind));
                    lines.collect::<Vec<_>>().join("\n")
                })
                .collect();
            wrong.push(format!(
                "image {number}:\n{}\n{what}",
                entries.join("\n  --\n")
            ));
        }
    }
    assert!(wrong.is_empty(), "seed {seed}: {}", wrong.join("\n\n"));
    assert!(compared > 40, "containerd unpacked only {compared}");
}
