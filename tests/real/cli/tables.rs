//! Layers that carry a table of their contents (eStargz, zstd:chunked): it is believed until they were unpacked.

use hearth::{digest::Digest, store::Store};
use serde_json::json;

use crate::{
    layers::{differences, walk_files},
    pushed::{MANIFEST, Registry, gzip, tar},
};

use super::{
    forged::{read, wait_error},
    *,
};

/// What [`tar`] is told: the times of all files are [`MTIME`].
const FORMAT: [&str; 3] = ["--sort=name", "--format=ustar", "--mtime=@1700000000"];
const MTIME: &str = "2023-11-14T22:13:20Z";
pub(super) const TABLE: &str = "stargz.index.json";

/// A layer as stargz-snapshotter makes it (docs/estargz.md).
pub(super) struct Layer {
    pub(super) blob: Vec<u8>,
    table: Digest,
    pub(super) diff_id: Digest,
}

/// A gzip member for the content of each file and what follows it.
struct Members {
    blob: Vec<u8>,
    plain: Vec<u8>,
    open: Vec<u8>,
}

impl Members {
    fn end(&mut self) {
        self.blob.extend(gzip(&self.open));
        self.plain.append(&mut self.open);
    }
}

impl Layer {
    /// Of a tar of short names; `change` is made to the rows of its table.
    fn of(tar: &[u8], change: impl FnOnce(&mut Vec<Value>)) -> Self {
        let mut members = Members {
            blob: Vec::new(),
            plain: Vec::new(),
            open: Vec::new(),
        };
        let (mut rows, mut rest) = (Vec::new(), tar);
        while rest[0] != 0 {
            let (header, behind) = rest.split_at(512);
            let text = |at: usize, len: usize| {
                let field = header[at..at + len].split(|&b| b == 0).next().unwrap();
                std::str::from_utf8(field).unwrap().trim().to_owned()
            };
            let number = |at, len| u64::from_str_radix(&text(at, len), 8).unwrap();
            let size = number(124, 12) as usize;
            members.open.extend(header);
            let mut row = json!({
                "name": text(0, 100), "mode": number(100, 8), "uid": number(108, 8), "gid": number(116, 8),
                "modtime": MTIME,
            });
            let (content, padded) = (&behind[..size], size.next_multiple_of(512));
            match header[156] {
                b'5' => row["type"] = "dir".into(),
                b'2' => {
                    row["type"] = "symlink".into();
                    row["linkName"] = text(157, 100).into();
                }
                b'0' => {
                    row["type"] = "reg".into();
                    row["size"] = size.into();
                    row["digest"] = Digest::of(content).to_string().into();
                    row["chunkDigest"] = row["digest"].clone();
                    members.end();
                    row["offset"] = members.blob.len().into();
                }
                other => panic!("{other}"),
            }
            members.open.extend(&behind[..padded]);
            rows.push(row);
            rest = &behind[padded..];
        }
        change(&mut rows);
        members.end();
        let start = members.blob.len();
        let table = json!({"version": 1, "entries": rows}).to_string();
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(TABLE), &table).unwrap();
        members.open = crate::pushed::tar(dir.path(), &FORMAT, &[TABLE]);
        members.end();
        let footer = format!("{start:016x}STARGZ");
        let extra = [31, 139, 8, 4, 0, 0, 0, 0, 0, 255, 26, 0, b'S', b'G', 22, 0];
        members.blob.extend(extra);
        members.blob.extend(footer.as_bytes());
        let empty = [1, 0, 0, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0];
        members.blob.extend(empty);
        Self {
            blob: members.blob,
            table: Digest::of(table.as_bytes()),
            diff_id: Digest::of(&members.plain),
        }
    }

    pub(super) fn digest(&self) -> Digest {
        Digest::of(&self.blob)
    }
}

/// Images of the same tree.
pub(super) struct Images {
    pub(super) registry: Registry,
    pub(super) dir: TempDir,
}

impl Images {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        put("bin/tool", b"#!/bin/sh\necho fine\n");
        put("etc/motd", b"good day\n");
        put("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n");
        put("large", &bytes(1, (3 << 20) + 77));
        std::os::unix::fs::symlink("motd", dir.path().join("etc/issue")).unwrap();
        Self {
            registry: Registry::start(),
            dir,
        }
    }

    /// Pushes the tree with a table in which `change` was made: its reference, and its layer.
    pub(super) fn push(&self, name: &str, change: impl FnOnce(&mut Vec<Value>)) -> (String, Layer) {
        let plain = tar(self.dir.path(), &FORMAT, &["bin", "etc", "large"]);
        let layer = Layer::of(&plain, change);
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id.to_string()]},
        });
        let config = config.to_string();
        let kind = |what: &str| format!("application/vnd.oci.image.{what}");
        let registry = &self.registry;
        let mut blob = registry.blob(name, &kind("layer.v1.tar+gzip"), &layer.blob);
        blob["annotations"]["containerd.io/snapshot/stargz/toc.digest"] =
            layer.table.to_string().into();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "layers": [blob],
            "config": registry.blob(name, &kind("config.v1+json"), config.as_bytes()),
        });
        registry.manifest(name, "1", &manifest);
        (registry.reference(name, "1"), layer)
    }

    /// That the tree is shown; who unpacks the layer finds the table there, too.
    fn assert_shown(&self, dir: &str) {
        let right = self.dir.path().to_str().unwrap();
        let done = Done::of(&mut tool("diff", &["-r", "-x", TABLE, dir, right]));
        assert_eq!(done.ok(), "");
        let mode = Done::of(&mut tool("stat", &["-c", "%a", &format!("{dir}/bin/tool")]));
        assert_eq!(mode.ok().trim(), "644");
    }
}

/// Who made the index of a layer, in the store of `bed`.
fn maker(bed: &Bed, layer: &Layer) -> char {
    maker_of(bed, &layer.digest())
}

fn maker_of(bed: &Bed, layer: &Digest) -> char {
    let store = Store::open(&bed.store(), &Default::default()).unwrap();
    store.index_mark(layer).unwrap().unwrap().into()
}

#[test]
fn a_true_table_serves_its_layer_and_is_confirmed() {
    let images = Images::new();
    let (reference, layer) = images.push("app", |_| {});
    let bed = Bed::new();
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount --no-fill {reference} {dir}"));
    let motd = Digest::of(b"good day\n").hex();
    assert_eq!(read(&dir, "etc/issue"), motd);
    let status = bed.json(&format!("status {dir} --json"));
    assert!(status["present_bytes"].as_u64() < status["total_bytes"].as_u64());
    assert_eq!(maker(&bed, &layer), 't');
    // All that was read is not all that was said.
    images.assert_shown(&dir);
    let status = bed.json(&format!("status {dir} --json"));
    assert_eq!(status["complete"], false, "{status}");
    bed.ok(&format!("umount {dir}"));

    bed.ok(&format!("mount {reference} {dir}"));
    let status = bed.wait_complete(&dir);
    assert_eq!(status["error"], Value::Null);
    images.assert_shown(&dir);
    assert_eq!(maker(&bed, &layer), 'c');
    bed.ok(&format!("umount {dir}"));
    // What is recorded is what the table says, with and without the registry.
    bed.ok(&format!("warm {reference}"));
    drop(images.registry);
    bed.ok(&format!("mount {reference} {dir}"));
    assert_eq!(read(&dir, "etc/motd"), motd);
    assert_eq!(read(&dir, TABLE), "ENOENT");
    bed.ok(&format!("umount {dir}"));
    bed.ok("verify --all");
}

#[test]
fn what_a_forged_table_says_is_found_out_and_refused() {
    type Change = fn(&mut Vec<Value>);
    fn row<'r>(rows: &'r mut [Value], name: &str) -> &'r mut Value {
        rows.iter_mut().find(|row| row["name"] == name).unwrap()
    }
    let images = Images::new();
    let changes: [(&str, &str, Change); 4] = [
        ("renamed", "\"etc/ld.so.preload\"", |rows| {
            row(rows, "etc/passwd")["name"] = "etc/ld.so.preload".into();
        }),
        ("setuid", "\"bin/tool\" has another mode", |rows| {
            row(rows, "bin/tool")["mode"] = 0o6755.into();
        }),
        ("elsewhere", "\"etc/issue\" has another", |rows| {
            row(rows, "etc/issue")["linkName"] = "/etc/passwd".into();
        }),
        ("less", "\"etc/passwd\"", |rows| {
            rows.retain(|row| row["name"] != "etc/passwd");
        }),
    ];
    for (name, what, change) in changes {
        let (reference, layer) = images.push(name, change);
        let bed = Bed::new();
        let dir = bed.mount_dir("mnt");
        bed.ok(&format!("mount {reference} {dir}"));
        let error = wait_error(&bed, &dir);
        let digest = layer.digest().to_string();
        for part in [&*reference, &digest, "table of contents", what] {
            assert!(error.contains(part), "{name}: {error}");
        }
        for path in ["etc/motd", "large", "bin/tool"] {
            assert_eq!(read(&dir, path), "EIO", "{name}: {path}");
        }
        bed.ok(&format!("umount {dir}"));

        bed.ok(&format!("mount {reference} {dir}"));
        images.assert_shown(&dir);
        let status = bed.wait_complete(&dir);
        assert_eq!(status["error"], Value::Null, "{name}");
        images.assert_shown(&dir);
        assert_eq!(maker(&bed, &layer), 'o', "{name}");
        bed.ok(&format!("umount {dir}"));
        bed.ok("verify --all");

        // Whoever wants all of it at once is told, and gets it.
        let bed = Bed::new();
        let done = bed.run(&format!("warm {reference}"));
        assert!(done.err.contains(what), "{name}: {done:?}");
        done.ok();
        assert_eq!(maker(&bed, &layer), 'o', "{name}");

        // And who believes nobody unpacks it before it is shown, also where it was believed before.
        for before in [false, true] {
            let bed = Bed::new();
            let dir = bed.mount_dir("mnt");
            if before {
                bed.ok(&format!("mount --no-fill {reference} {dir}"));
                bed.ok(&format!("umount {dir}"));
            }
            let config = bed.path("hearth.toml");
            fs::write(&config, "[fetch]\nverify = \"strict\"\n").unwrap();
            let mut command = bed.command(&format!("mount {reference} {dir}"));
            Done::of(command.env("HEARTH_CONFIG", &config)).ok();
            images.assert_shown(&dir);
            assert_eq!(maker(&bed, &layer), 'o', "{name}");
            bed.ok(&format!("umount {dir}"));
        }
    }
}

/// A tree with what makes layers interesting, in an image that skopeo makes a zstd:chunked one of.
struct Chunked {
    registry: Registry,
    dir: TempDir,
    /// What skopeo made: its blobs by digest, and its manifest.
    layout: PathBuf,
    manifest: Value,
}

const CHECKSUM: &str = "io.containers.zstd-chunked.manifest-checksum";
const POSITION: &str = "io.containers.zstd-chunked.manifest-position";

impl Chunked {
    fn new() -> Self {
        let (registry, dir) = (Registry::start(), tempfile::tempdir().unwrap());
        let script = r#"
set -e
mkdir -p made/bin made/etc made/data unpacked; cd made
cp /bin/true bin/tool; chmod 4755 bin/tool; cp /bin/true bin/able
echo good day > etc/motd; ln -s motd etc/issue; ln bin/tool bin/same
echo root:x:0:0:root:/:/bin/sh > etc/passwd; chown 12:34 etc/passwd
head -c 5000077 /dev/urandom > data/large; : > data/empty
truncate -s 3000000 data/holes; echo end >> data/holes; truncate -s 500000 data/zeros
mkfifo data/pipe; mknod data/null c 1 3
setfattr -n user.note -v kept etc/motd
setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 bin/able
long=data/$(printf 'n%.0s' $(seq 200)); mkdir $long; echo deep > $long/$(printf 'm%.0s' $(seq 120))
cd ..
find made -exec touch -h -d @1700000000 {} +
# Of more padding at its end this skopeo would leave some out.
tar -b1 --xattrs --xattrs-include='*' --sort=name --format=pax --numeric-owner -C made -cf made.tar .
tar --xattrs --xattrs-include='*' -xpf made.tar -C unpacked
"#;
        let mut make = tool("sh", &["-c", script]);
        Done::of(make.current_dir(dir.path())).ok();
        let plain = fs::read(dir.path().join("made.tar")).unwrap();
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(&plain).to_string()]},
        });
        let config = config.to_string();
        let kind = |what: &str| format!("application/vnd.oci.image.{what}");
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "layers": [registry.blob("plain", &kind("layer.v1.tar"), &plain)],
            "config": registry.blob("plain", &kind("config.v1+json"), config.as_bytes()),
        });
        registry.manifest("plain", "1", &manifest);
        let layout = dir.path().join("layout");
        let from = format!("docker://{}/plain:1", registry.host());
        let to = format!("oci:{}:x", layout.display());
        let copy = ["--insecure-policy", "copy", "-q", "--src-tls-verify=false"];
        let format = ["--dest-compress-format", "zstd:chunked", &from, &to];
        Done::of(&mut tool("skopeo", &[copy, format].concat())).ok();
        let read = |path: &str| fs::read(layout.join(path)).unwrap();
        let index: Value = serde_json::from_slice(&read("index.json")).unwrap();
        let top = index["manifests"][0]["digest"].as_str().unwrap();
        let top = read(&format!("blobs/{}", top.replace(':', "/")));
        let mut manifest: Value = serde_json::from_slice(&top).unwrap();
        manifest["mediaType"] = MANIFEST.into();
        Self {
            registry,
            dir,
            layout,
            manifest,
        }
    }

    fn blob(&self, descriptor: &Value) -> Vec<u8> {
        let digest = descriptor["digest"].as_str().unwrap();
        fs::read(self.layout.join("blobs").join(digest.replace(':', "/"))).unwrap()
    }

    /// Pushes it; with `change` made to its table, if there is one: its reference, and its layer.
    fn push(&self, name: &str, change: Option<fn(&mut Vec<Value>)>) -> (String, Digest) {
        let mut manifest = self.manifest.clone();
        let mut layer = self.blob(&manifest["layers"][0]);
        let mut annotations = manifest["layers"][0]["annotations"].clone();
        if let Some(change) = change {
            let position = annotations[POSITION].as_str().unwrap();
            let numbers: Vec<usize> = position.split(':').map(|n| n.parse().unwrap()).collect();
            let (start, end) = (numbers[0], numbers[0] + numbers[1]);
            let table = zstd::decode_all(&layer[start..end]).unwrap();
            let mut table: Value = serde_json::from_slice(&table).unwrap();
            change(table["entries"].as_array_mut().unwrap());
            let text = table.to_string();
            let table = zstd::encode_all(text.as_bytes(), 3).unwrap();
            layer.splice(start..end, table.iter().copied());
            layer[start - 4..start].copy_from_slice(&(table.len() as u32).to_le_bytes());
            annotations[CHECKSUM] = Digest::of(&table).to_string().into();
            annotations[POSITION] = format!("{start}:{}:{}:1", table.len(), text.len()).into();
        }
        let kind = |of: &Value| of["mediaType"].as_str().unwrap().to_owned();
        let mut blob = self
            .registry
            .blob(name, &kind(&manifest["layers"][0]), &layer);
        blob["annotations"] = annotations;
        let config = self.blob(&manifest["config"]);
        let config = self
            .registry
            .blob(name, &kind(&manifest["config"]), &config);
        (manifest["layers"][0], manifest["config"]) = (blob, config);
        self.registry.manifest(name, "1", &manifest);
        (self.registry.reference(name, "1"), Digest::of(&layer))
    }

    /// That the tree is shown, in every attribute.
    fn assert_shown(&self, dir: &str) {
        let theirs = walk_files(&self.dir.path().join("unpacked"));
        assert_eq!(theirs.len(), 18);
        let wrong = differences(&walk_files(Path::new(dir)), &theirs, |_, _| false);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

/// As containers/image makes it, lazily by its own table, and once all of it is here.
#[test]
fn a_zstd_chunked_image_is_served_by_its_own_table() {
    let image = Chunked::new();
    let (reference, layer) = image.push("app", None);
    let bed = Bed::new();
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount --no-fill {reference} {dir}"));
    assert_eq!(read(&dir, "etc/issue"), Digest::of(b"good day\n").hex());
    let status = bed.json(&format!("status {dir} --json"));
    assert!(
        status["present_bytes"].as_u64().unwrap() < 100_000,
        "{status}"
    );
    assert_eq!(maker_of(&bed, &layer), 't');
    image.assert_shown(&dir);
    bed.ok(&format!("umount {dir}"));

    bed.ok(&format!("mount {reference} {dir}"));
    let status = bed.wait_complete(&dir);
    assert_eq!(status["error"], Value::Null);
    image.assert_shown(&dir);
    assert_eq!(maker_of(&bed, &layer), 'c');
    bed.ok(&format!("umount {dir}"));
    bed.ok("verify --all");
}

#[test]
fn a_zstd_chunked_table_that_lies_is_found_out() {
    fn row<'r>(rows: &'r mut [Value], name: &str) -> &'r mut Value {
        rows.iter_mut().find(|row| row["name"] == name).unwrap()
    }
    let image = Chunked::new();
    let (reference, layer) = image.push(
        "setuid",
        Some(|rows| row(rows, "./etc/passwd")["mode"] = 0o6755.into()),
    );
    let bed = Bed::new();
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount {reference} {dir}"));
    let error = wait_error(&bed, &dir);
    for part in [
        &*reference,
        &layer.to_string(),
        "\"etc/passwd\" has another mode",
    ] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(read(&dir, "etc/motd"), "EIO");
    bed.ok(&format!("umount {dir}"));
    bed.ok(&format!("mount {reference} {dir}"));
    image.assert_shown(&dir);
    assert_eq!(maker_of(&bed, &layer), 'o');
    bed.ok(&format!("umount {dir}"));

    // What a file is said to hold, and does not, is not shown for a moment.
    let (reference, _) = image.push(
        "content",
        Some(|rows| {
            row(rows, "./etc/passwd")["digest"] = Digest::of(b"x").to_string().into();
        }),
    );
    let bed = Bed::new();
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount --no-fill {reference} {dir}"));
    assert_eq!(read(&dir, "etc/passwd"), "EIO");
    bed.ok(&format!("umount {dir}"));
}
