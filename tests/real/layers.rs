//! Layers merged by us and unpacked by containerd are the same tree, in every attribute.

use std::{
    collections::BTreeMap,
    ffi::{CString, OsStr},
    fs,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, MetadataExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use hearth::{
    digest::Digest,
    image::{Compression, ImageError, LayerIndex, Limits, Sink, Unpacker, merge},
    tree::{Kind, Meta, Object, Tree},
};
use sha2::{Digest as _, Sha256};

/// Everything that can be seen of one path.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    /// The kind, with what belongs to it: content, target, device.
    what: String,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Other names of the same inode.
    links: Vec<String>,
}

type Walk = BTreeMap<String, (Seen, u64)>;

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

#[derive(Default)]
struct Hashes {
    hasher: Sha256,
    done: Vec<Digest>,
}

impl Sink for Hashes {
    type Error = ImageError;
    fn begin(&mut self, _: u64) -> Result<(), ImageError> {
        Ok(())
    }
    fn data(&mut self, data: &[u8]) -> Result<(), ImageError> {
        self.hasher.update(data);
        Ok(())
    }
    fn hole(&mut self, len: u64) -> Result<(), ImageError> {
        self.hasher.update(vec![0; len as usize]);
        Ok(())
    }
    fn end(&mut self) -> Result<(), ImageError> {
        let digest = self.hasher.finalize_reset();
        self.done.push(Digest::from_bytes(digest.into()));
        Ok(())
    }
    fn digests(&mut self) -> Result<Vec<Digest>, ImageError> {
        Ok(std::mem::take(&mut self.done))
    }
}

fn index(tar: &[u8]) -> LayerIndex {
    let blob = Digest::of(tar);
    let mut sink = Hashes::default();
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
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        // SAFETY: prctl is async-signal-safe, and the closure touches no memory of the parent.
        unsafe {
            command.pre_exec(|| {
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
                Ok(())
            });
        }
        let child = command
            .spawn()
            .unwrap_or_else(|e| panic!("containerd: {e}; run tests/run"));
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

    fn must(&self, args: &[&str]) {
        let output = self.ctr(args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ctr {args:?}: {error}");
    }

    /// Imports an image of `layers` and mounts it.
    fn mount(&mut self, layers: &[Vec<u8>]) -> PathBuf {
        let layout = self.dir.path().join("layout");
        write_layout(&layout, layers);
        let archive = self.dir.path().join("image.tar");
        run(Command::new("tar")
            .arg("-C")
            .arg(&layout)
            .arg("-cf")
            .arg(&archive)
            .arg("."));
        self.must(&["images", "import", archive.to_str().unwrap()]);
        let at = self.dir.path().join("mounted");
        fs::create_dir(&at).unwrap();
        self.mounted.push(at.clone());
        self.must(&[
            "images",
            "mount",
            "test.invalid/layers:1",
            at.to_str().unwrap(),
        ]);
        at
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

fn write_layout(at: &Path, layers: &[Vec<u8>]) {
    let blobs = at.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |media_type: &str, data: &[u8]| {
        let digest = Digest::of(data);
        fs::write(blobs.join(digest.hex()), data).unwrap();
        serde_json::json!({"mediaType": media_type, "digest": digest.to_string(), "size": data.len()})
    };
    let architecture = match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "amd64",
    };
    let diff_ids: Vec<_> = layers.iter().map(|l| Digest::of(l).to_string()).collect();
    let config = serde_json::json!({
        "architecture": architecture, "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = put(
        "application/vnd.oci.image.config.v1+json",
        config.to_string().as_bytes(),
    );
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| put("application/vnd.oci.image.layer.v1.tar", layer))
        .collect();
    let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers,
        "mediaType": "application/vnd.oci.image.manifest.v1+json"});
    let mut manifest = put(
        "application/vnd.oci.image.manifest.v1+json",
        manifest.to_string().as_bytes(),
    );
    manifest["annotations"] =
        serde_json::json!({"io.containerd.image.name": "test.invalid/layers:1"});
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(at.join("index.json"), index.to_string()).unwrap();
    fs::write(at.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

fn walk_files(root: &Path) -> Walk {
    let mut walk = Walk::new();
    let mut stack = vec![root.to_owned()];
    while let Some(path) = stack.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
        let what = if kind.is_dir() {
            stack.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            "dir".to_owned()
        } else if kind.is_file() {
            let content = fs::read(&path).unwrap();
            assert_eq!(content.len() as u64, meta.size());
            format!("file of {} {}", content.len(), Digest::of(&content))
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

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let at = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut list = vec![0u8; 1 << 16];
    // SAFETY: the path is NUL-terminated and the buffer as long as said.
    let len = unsafe { libc::llistxattr(at.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    list.truncate(usize::try_from(len).unwrap_or_else(|_| panic!("xattrs of {path:?}")));
    let names = list.split(|&b| b == 0).filter(|name| !name.is_empty());
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

#[test]
fn a_merged_tree_is_what_containerd_unpacks() {
    let made = tempfile::tempdir().unwrap();
    script(made.path());
    let layers: Vec<Vec<u8>> = (0..3)
        .map(|n| fs::read(made.path().join(format!("{n}.tar"))).unwrap())
        .collect();

    let mut containerd = Containerd::start();
    let theirs = walk_files(&containerd.mount(&layers));

    let indexes: Vec<_> = layers.iter().map(|layer| index(layer)).collect();
    let (tree, objects) = merge(&indexes.iter().collect::<Vec<_>>()).unwrap();
    let ours = walk_tree(&tree, &objects);

    // Directories that no entry describes have the time of the unpacking.
    let untimed = ["", "/implied", "/implied/odd", "/implied/odd/sub", "/lib"];
    let mut wrong = Vec::new();
    for path in ours
        .keys()
        .chain(theirs.keys().filter(|p| !ours.contains_key(*p)))
    {
        let mut pair = (ours.get(path).cloned(), theirs.get(path).cloned());
        if let (Some((ours, _)), Some((theirs, _))) = &mut pair {
            if untimed.contains(&path.as_str()) {
                ours.mtime = theirs.mtime;
            }
            if ours == theirs {
                continue;
            }
        }
        wrong.push(format!(
            "{path}:\n  ours:   {:?}\n  theirs: {:?}",
            pair.0, pair.1
        ));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(ours.len() > 70, "{}", ours.len());
}
