//! Layers that carry a table of their contents (eStargz): it is believed until they were unpacked.

use hearth::{digest::Digest, store::Store};
use serde_json::json;

use crate::pushed::{MANIFEST, Registry, gzip, tar};

use super::{
    forged::{read, wait_error},
    *,
};

/// What [`tar`] is told: the times of all files are [`MTIME`].
const FORMAT: [&str; 3] = ["--sort=name", "--format=ustar", "--mtime=@1700000000"];
const MTIME: &str = "2023-11-14T22:13:20Z";
const TABLE: &str = "stargz.index.json";

/// A layer as stargz-snapshotter makes it (docs/estargz.md).
struct Layer {
    blob: Vec<u8>,
    table: Digest,
    diff_id: Digest,
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

    fn digest(&self) -> Digest {
        Digest::of(&self.blob)
    }
}

/// Images of the same tree.
struct Images {
    registry: Registry,
    dir: TempDir,
}

impl Images {
    fn new() -> Self {
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
    fn push(&self, name: &str, change: impl FnOnce(&mut Vec<Value>)) -> (String, Layer) {
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
    let store = Store::open(&bed.store(), &Default::default()).unwrap();
    store.index_mark(&layer.digest()).unwrap().unwrap().into()
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
