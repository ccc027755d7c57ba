//! Indexes that somebody has pushed beside an image, and that are not its own.

use std::sync::Arc;

use hearth::{
    digest::Digest,
    fetch::Engine,
    image::{EntryKind, FileContent, LayerEntry, LayerIndex, Span, SpanDigest, merge},
    node::Node,
    reference::Reference,
    source::Sources,
    store::Store,
};
use serde_json::json;

use crate::pushed::{INDEX, MANIFEST, Registry, gzip, tar};

use super::{
    csi::{Csi, wait_for},
    *,
};

mod images;

const KIND: &str = "application/vnd.hearth.index.v1";
const LAYER_INDEX: &str = "application/vnd.hearth.layer-index.v1";
const MIB: usize = 1 << 20;

/// An image of two layers in a registry, and their true indexes.
pub(super) struct Pushed {
    pub(super) registry: Registry,
    pub(super) reference: String,
    manifest: Digest,
    manifest_size: usize,
    pub(super) layers: [Vec<u8>; 2],
    pub(super) indexes: [LayerIndex; 2],
    /// Where the pieces of 1 MiB of the first layer begin in its blob.
    members: Vec<usize>,
    /// The tree that it is.
    pub(super) dir: TempDir,
}

impl Pushed {
    pub(super) fn new() -> Self {
        let (registry, dir) = (Registry::start(), tempfile::tempdir().unwrap());
        let put = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        put("a/large", &bytes(1, 2 * MIB + 77));
        put("b/more", &bytes(2, 4 * MIB));
        put("bin/tool", b"#!/bin/sh\necho fine\n");
        put("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n");
        put("etc/motd", b"mallory:x:0:0:root:/:/bin/sh\n");
        put("top/salt", b"salt");
        let format = ["--sort=name", "--format=gnu", "--mtime=@1700000000"];
        let lower = tar(dir.path(), &format, &["a", "b", "bin", "etc"]);
        let upper = tar(dir.path(), &format, &["top"]);
        // Members of 1 MiB each: a span can begin at each of them, without a window.
        let (mut blob, mut members) = (Vec::new(), Vec::new());
        for piece in lower.chunks(MIB) {
            members.push(blob.len());
            blob.extend(gzip(piece));
        }
        let layers = [blob, gzip(&upper)];
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(&lower).to_string(), Digest::of(&upper).to_string()]},
        });
        let config = config.to_string();
        let kind = |what: &str| format!("application/vnd.oci.image.{what}");
        let layer = |l: &Vec<u8>| registry.blob("app", &kind("layer.v1.tar+gzip"), l);
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": registry.blob("app", &kind("config.v1+json"), config.as_bytes()),
            "layers": layers.iter().map(layer).collect::<Vec<_>>(),
        });
        let digest = registry.manifest("app", "1", &manifest);
        let reference = registry.reference("app", "1");
        // Whoever unpacks the layers makes their true indexes.
        let bed = Bed::new();
        bed.ok(&format!("index push {reference}"));
        let list = format!("manifests/{}", digest.to_string().replace(':', "-"));
        let list: Value = serde_json::from_slice(&registry.get("app", &list)).unwrap();
        let found = list["manifests"][0]["digest"].as_str().unwrap();
        let found = registry.get("app", &format!("manifests/{found}"));
        let found: Value = serde_json::from_slice(&found).unwrap();
        let index = |number: usize| {
            let index = found["layers"][number]["digest"].as_str().unwrap();
            LayerIndex::decode(&registry.get("app", &format!("blobs/{index}"))).unwrap()
        };
        let indexes = [index(0), index(1)];
        Self {
            manifest: digest,
            manifest_size: serde_json::to_vec(&manifest).unwrap().len(),
            registry,
            reference,
            layers,
            indexes,
            members,
            dir,
        }
    }

    /// Puts these in the place of what is said of the layers.
    fn attach(&self, indexes: &[Vec<u8>]) {
        let layers = indexes.iter().zip(&self.layers);
        let blobs = layers.map(|(index, layer)| self.index_of("app", layer, index));
        self.attach_blobs(blobs.collect());
    }

    /// An index in a repository, as what is said of a layer.
    fn index_of(&self, repository: &str, layer: &[u8], index: &[u8]) -> Value {
        let mut blob = self.registry.blob(repository, LAYER_INDEX, index);
        blob["annotations"] = json!({"dev.hearth.layer": Digest::of(layer).to_string()});
        blob
    }

    fn attach_blobs(&self, blobs: Vec<Value>) {
        self.attach_to("app", &self.manifest, self.manifest_size, blobs);
    }

    fn attach_to(&self, repository: &str, subject: &Digest, size: usize, blobs: Vec<Value>) {
        let empty = self
            .registry
            .blob(repository, "application/vnd.oci.empty.v1+json", b"{}");
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": KIND,
            "config": empty, "layers": blobs,
            "subject": {"mediaType": MANIFEST, "digest": subject.to_string(), "size": size},
        });
        let bytes = serde_json::to_vec(&manifest).unwrap();
        let digest = Digest::of(&bytes).to_string();
        self.registry.manifest(repository, &digest, &manifest);
        let list = json!({
            "schemaVersion": 2, "mediaType": INDEX,
            "manifests": [{"mediaType": MANIFEST, "digest": digest, "size": bytes.len(), "artifactType": KIND}],
        });
        let tag = subject.to_string().replace(':', "-");
        self.registry.manifest(repository, &tag, &list);
    }

    /// Another image, in `repository`, that says it has the layers of this one: its first layer is `layer`,
    /// of which `index` is said, in its configuration too.
    pub(super) fn imitated(&self, repository: &str, layer: &[u8], index: &LayerIndex) -> String {
        let of_image = self.registry.get("app", "manifests/1");
        let mut manifest: Value = serde_json::from_slice(&of_image).unwrap();
        let indexes = [index, &self.indexes[1]];
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": indexes.map(|index| index.diff_id.to_string())},
        });
        let kind = |what: &str| format!("application/vnd.oci.image.{what}");
        let push = |kind: &str, bytes: &[u8]| self.registry.blob(repository, kind, bytes);
        manifest["config"] = push(&kind("config.v1+json"), config.to_string().as_bytes());
        let layers = [layer, &self.layers[1]];
        manifest["layers"] = (layers.iter())
            .map(|layer| push(&kind("layer.v1.tar+gzip"), layer))
            .collect();
        // Not the same image, even if all else is.
        manifest["annotations"] = json!({"of": repository});
        let digest = self.registry.manifest(repository, "1", &manifest);
        let size = serde_json::to_vec(&manifest).unwrap().len();
        let blobs = layers
            .iter()
            .zip(indexes)
            .map(|(layer, index)| self.index_of(repository, layer, &index.encode().unwrap()));
        self.attach_to(repository, &digest, size, blobs.collect());
        self.registry.reference(repository, "1")
    }

    /// Attaches an index of the first layer with a change, and the true one of the second.
    pub(super) fn forge(&self, change: impl FnOnce(&mut LayerIndex)) {
        let mut index = self.indexes[0].clone();
        change(&mut index);
        assert!(index != self.indexes[0], "nothing was changed");
        let encode = |index: &LayerIndex| index.encode().unwrap();
        self.attach(&[encode(&index), encode(&self.indexes[1])]);
    }

    /// What the store of `bed` says is the merge of its indexes, which were made here.
    fn assert_recorded_truly(&self, bed: &Bed) {
        let store = Store::open(&bed.store(), &Default::default()).unwrap();
        let kept: Vec<LayerIndex> = (self.layers.iter())
            .map(|layer| {
                let kept = store.index(&Digest::of(layer)).unwrap().unwrap();
                assert_eq!(kept[0], b'o', "made here");
                LayerIndex::decode(&kept[1..]).unwrap()
            })
            .collect();
        for (kept, right) in kept.iter().zip(&self.indexes) {
            assert!(kept.agrees_with(right));
        }
        let (tree, objects) = merge(&kept.iter().collect::<Vec<_>>()).unwrap();
        let (_, artifact) = store.artifact(&self.reference).unwrap().unwrap();
        assert_eq!((artifact.tree, artifact.objects), (tree, objects));
    }
}

pub(super) fn entry<'i>(index: &'i mut LayerIndex, path: &str) -> &'i mut LayerEntry {
    let entry = index
        .entries
        .iter_mut()
        .find(|e| *e.path == *path.as_bytes());
    entry.unwrap_or_else(|| panic!("no {path}"))
}

fn content<'i>(index: &'i mut LayerIndex, path: &str) -> &'i mut FileContent {
    match &mut entry(index, path).kind {
        EntryKind::File(content) => content,
        other => panic!("{path} is {other:?}"),
    }
}

/// What a read of `path` in the mount gives: the SHA-256, or the error's name.
pub(super) fn read(dir: &str, path: &str) -> String {
    let script = r#"
import errno, hashlib, os, sys
try: print(hashlib.sha256(open(os.path.join(sys.argv[1], sys.argv[2]), "rb").read()).hexdigest())
except OSError as e: print(errno.errorcode[e.errno])
"#;
    Done::of(&mut python(script, &[dir, path]))
        .ok()
        .trim()
        .to_owned()
}

/// Waits until the background fetch has stopped; its error.
pub(super) fn wait_error(bed: &Bed, dir: &str) -> String {
    let begun = Instant::now();
    loop {
        let status = bed.json(&format!("status {dir} --json"));
        if let Some(error) = status["error"].as_str() {
            return error.to_owned();
        }
        assert!(begun.elapsed() < HANG, "{status}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_a_forged_index_says_is_found_out_and_refused() {
    let image = Pushed::new();
    type Change = fn(&mut LayerIndex);
    let changes: &[(&str, Change)] = &[
        ("a digest", |index| {
            content(index, "etc/passwd").digest = Digest::of(b"evil");
        }),
        ("a digest of a large file", |index| {
            content(index, "b/more").digest = Digest::of(b"evil");
        }),
        ("the place of another file", |index| {
            let other = content(index, "etc/motd").clone();
            *content(index, "etc/passwd") = other;
        }),
        ("a file more", |index| {
            let mut more = entry(index, "etc/motd").clone();
            more.path = b"etc/ld.so.preload"[..].into();
            index.entries.push(more);
        }),
        ("a mode", |index| {
            entry(index, "bin/tool").meta.mode = 0o6755
        }),
        ("an owner", |index| {
            entry(index, "etc/passwd").meta.uid = 1000
        }),
        ("a file less", |index| {
            index.entries.retain(|e| *e.path != b"etc/passwd"[..]);
        }),
        ("a symlink", |index| {
            let target = b"/etc/motd"[..].into();
            entry(index, "etc/passwd").kind = EntryKind::Symlink { target };
        }),
    ];
    for (what, change) in changes {
        image.forge(change);
        let bed = Bed::new();
        let dir = bed.mount_dir("mnt");
        bed.ok(&format!("mount {} {dir}", image.reference));
        let error = wait_error(&bed, &dir);
        let layer = Digest::of(&image.layers[0]).to_string();
        for part in [&*image.reference, &layer, "describes something else"] {
            assert!(error.contains(part), "{what}: {error}");
        }
        // All of it is refused: what else it says is no better.
        for path in ["etc/passwd", "a/large", "top/salt"] {
            assert_eq!(read(&dir, path), "EIO", "{what}: {path}");
        }
        assert!(
            bed.run(&format!("status {dir}")).ok().contains(&layer),
            "{what}"
        );
        bed.ok(&format!("umount {dir}"));

        bed.ok(&format!("mount {} {dir}", image.reference));
        assert_same(&dir, image.dir.path());
        let status = bed.wait_complete(&dir);
        assert_eq!(status["error"], Value::Null, "{what}");
        assert_same(&dir, image.dir.path());
        image.assert_recorded_truly(&bed);
        bed.ok(&format!("umount {dir}"));
        bed.ok("verify --all");

        // Whoever wants all of it at once is told, and gets it.
        let bed = Bed::new();
        bed.ok(&format!("warm {}", image.reference));
        image.assert_recorded_truly(&bed);
    }
}

#[test]
fn an_index_that_can_be_of_no_use_is_refused_at_once() {
    let image = Pushed::new();
    let good = image.indexes[0].encode().unwrap();
    let forged = |change: fn(&mut LayerIndex)| {
        let mut index = image.indexes[0].clone();
        change(&mut index);
        index.encode().unwrap()
    };
    let layer = Digest::of(&image.layers[0]).to_string();
    let assert_refused = |why: &str| {
        let bed = Bed::new();
        let done = bed.run(&format!("warm {}", image.reference));
        for part in ["an index cannot be used", &*image.reference, &layer, why] {
            assert!(done.err.contains(part), "{why}: {done:?}");
        }
        done.ok();
        image.assert_recorded_truly(&bed);
    };
    for (why, index) in [
        ("is of another layer", image.indexes[1].encode().unwrap()),
        ("is of another layer", forged(|index| index.blob_size += 1)),
        // It would make a chain id of another image.
        (
            "configuration says",
            forged(|index| index.diff_id = Digest::of(b"other")),
        ),
        ("no index of a layer", b"garbage, and more of it".to_vec()),
        ("checksum", good[..good.len() - 1].to_vec()),
        ("is empty", Vec::new()),
    ] {
        image.attach(&[index]);
        assert_refused(why);
    }
    // Its size is enough; it need not be there.
    let mut blob = image.registry.blob("app", LAYER_INDEX, b"small");
    blob["size"] = ((256 << 20) + 1).into();
    blob["annotations"] = json!({"dev.hearth.layer": layer});
    image.attach_blobs(vec![blob]);
    assert_refused("it has 268435457 bytes");
}

#[test]
fn with_strict_verification_no_found_index_is_believed() {
    let image = Pushed::new();
    image.forge(|index| entry(index, "bin/tool").meta.mode = 0o6755);
    let bed = Bed::new();
    fs::write(bed.path("hearth.toml"), "[fetch]\nverify = \"strict\"\n").unwrap();
    let dir = bed.mount_dir("mnt");
    let config = bed.path("hearth.toml");
    let mut command = bed.command(&format!("-v mount {} {dir}", image.reference));
    Done::of(command.env("HEARTH_CONFIG", &config)).ok();
    assert_same(&dir, image.dir.path());
    let status = bed.wait_complete(&dir);
    assert_eq!(status["error"], Value::Null);
    image.assert_recorded_truly(&bed);
    bed.ok(&format!("umount {dir}"));

    // Nor one that was kept when that was allowed.
    let bed = Bed::new();
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount --no-fill {} {dir}", image.reference));
    bed.ok(&format!("umount {dir}"));
    let mut command = bed.command(&format!("mount {} {dir}", image.reference));
    Done::of(command.env("HEARTH_CONFIG", &config)).ok();
    assert_same(&dir, image.dir.path());
    image.assert_recorded_truly(&bed);
    bed.ok(&format!("umount {dir}"));
}

/// An index whose entries are true, but whose spans are of other bytes of the layer: what they give
/// cannot be told from the truth before the layer was unpacked.
#[test]
fn what_wrong_spans_gave_is_dropped_by_the_kernel() {
    let image = Pushed::new();
    let member = |at: usize| {
        let end = image.members.get(at + 1).copied();
        &image.layers[0][image.members[at]..end.unwrap_or(image.layers[0].len())]
    };
    let decoded = |at: usize| {
        use std::io::Read as _;
        let mut out = Vec::new();
        let mut gunzip = Command::new("gunzip")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut stdin, input) = (gunzip.stdin.take().unwrap(), member(at).to_vec());
        let feed = std::thread::spawn(move || std::io::Write::write_all(&mut stdin, &input));
        gunzip.stdout.take().unwrap().read_to_end(&mut out).unwrap();
        feed.join().unwrap().unwrap();
        assert!(gunzip.wait().unwrap().success());
        out
    };
    // Each but the first gives the MiB behind its own; the last cannot be decoded.
    image.forge(|index| {
        index.spans = (0..image.members.len() - 1)
            .map(|at| {
                let shown = if at == 0 { 0 } else { at + 1 };
                Span {
                    start: (at * MIB) as u64,
                    blob_start: image.members[shown] as u64,
                    bits: 0,
                    window: Box::default(),
                    digest: SpanDigest::Blake3(*blake3::hash(&decoded(shown)).as_bytes()),
                }
            })
            .collect();
    });
    let proxy = format!(
        "location /v2/ {{ proxy_pass http://{}; proxy_set_header Host $http_host;
           proxy_buffering off; limit_rate 300k; }}",
        image.registry.host()
    );
    let empty = tempfile::tempdir().unwrap();
    let slow = servers::nginx(empty.path(), &proxy);
    let bed = Bed::new();
    let dir = bed.mount_dir("mnt");
    let reference = format!("oci://127.0.0.1:{}/app:1", slow.port);
    bed.ok(&format!("-v mount {reference} {dir}"));
    let status = bed.json(&format!("status {dir} --json"));
    let log = || fs::read_to_string(status["log"].as_str().unwrap()).unwrap();
    // Before it is all here nobody can tell; then it fails, until the layer was unpacked.
    let script = r#"
import hashlib, os, sys, time
root, right = sys.argv[1:]
path = os.path.join(root, "a/large")
f = os.open(path, os.O_RDONLY)
def look():
    try: return hashlib.sha256(os.pread(f, 3 << 19, 0)).hexdigest()
    except OSError: return "failed"
print(look(), flush=True)
deadline = time.time() + 60
while look() != right and time.time() < deadline: time.sleep(0.02)
print(look(), hashlib.sha256(open(path, "rb").read(3 << 19)).hexdigest())
"#;
    let right = fs::read(image.dir.path().join("a/large")).unwrap();
    let right = Digest::of(&right[..3 << 19]).hex();
    let out = Done::of(&mut python(script, &[&dir, &right])).ok();
    let shas: Vec<&str> = out.split_whitespace().collect();
    assert_ne!(shas[0], right, "the forged spans were not read");
    assert_eq!(shas[1..], [&right; 2], "{out}\n{}", log());
    bed.wait_complete(&dir);
    assert_same(&dir, image.dir.path());
    bed.ok(&format!("umount {dir}"));
    bed.ok("verify --all");
}

/// A volume shows nothing of it any more either, and is what it should be once it is published again.
#[test]
fn a_volume_that_was_forged_is_refused_until_it_is_published_again() {
    let image = Pushed::new();
    image.forge(|index| entry(index, "bin/tool").meta.mode = 0o6755);
    let bed = Bed::new();
    let config = bed.path("config.toml");
    // On a disk that is nearly full the true index may be collected before anything is recorded that needs it.
    fs::write(&config, "[store]\nmin_free = 0\n").unwrap();
    let options = format!(
        "--config {} csi --node-id n --endpoint unix://{}",
        config.display(),
        bed.path("csi.sock").display()
    );
    let csi = Csi::by(bed, false, options);
    let target = csi.publish("v", &image.reference);
    wait_for("found out", || read(&target, "top/salt") == "EIO");
    let condition = csi.stats("v").volume_condition.unwrap();
    let layer = Digest::of(&image.layers[0]).to_string();
    assert!(
        condition.abnormal && condition.message.contains(&layer),
        "{condition:?}"
    );
    assert_eq!(csi.publish("v", &image.reference), target);
    assert_same(&target, image.dir.path());
    let mode = Done::of(&mut tool(
        "stat",
        &["-c", "%a", &format!("{target}/bin/tool")],
    ))
    .ok();
    assert_ne!(mode.trim(), "6755", "the forged one is shown again");
    wait_for("whole", || {
        let stats = csi.stats("v");
        stats.usage[0].used == stats.usage[0].total
    });
    assert!(!csi.stats("v").volume_condition.unwrap().abnormal);
    assert_same(&target, image.dir.path());
    csi.unpublish("v");
    csi.assert_empty();
}
