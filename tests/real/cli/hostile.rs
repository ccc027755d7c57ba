//! Images that lie, are broken, or lead elsewhere: refused with a message that names image and layer,
//! and nothing of them counts as here.

use hearth::digest::Digest;
use serde_json::json;

use crate::pushed::{INDEX, MANIFEST, Registry, gzip, tar};

use super::*;

const OCI: &str = "application/vnd.oci.image";
/// Most memory that a pull of something small may take.
const MEMORY: u64 = 256 << 20;

/// A bed and a registry, and what was refused so far.
struct Court {
    bed: Bed,
    registry: Registry,
    number: usize,
}

impl Court {
    fn new() -> Self {
        Self {
            bed: Bed::new(),
            registry: Registry::start(),
            number: 0,
        }
    }

    /// Pushes an image of one layer, changed by `change`; its reference and the layer's digest.
    fn push(
        &mut self,
        media_type: &str,
        blob: &[u8],
        diff_id: &Digest,
        change: impl FnOnce(&mut Value),
    ) -> (String, String) {
        let registry = &self.registry;
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [diff_id.to_string()]},
        });
        let config = config.to_string();
        let mut manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": registry.blob("bad", &format!("{OCI}.config.v1+json"), config.as_bytes()),
            "layers": [registry.blob("bad", media_type, blob)],
        });
        change(&mut manifest);
        self.number += 1;
        let tag = format!("t{}", self.number);
        registry.manifest("bad", &tag, &manifest);
        let layer = manifest["layers"][0]["digest"].as_str().unwrap().to_owned();
        (registry.reference("bad", &tag), layer)
    }

    /// A layer of `tar`, plain, that must be refused because of `why`.
    fn refuse_tar(&mut self, tar: &[u8], why: &str) {
        self.refuse_layer(&format!("{OCI}.layer.v1.tar"), tar, &Digest::of(tar), why);
    }

    fn refuse_layer(&mut self, media_type: &str, blob: &[u8], diff_id: &Digest, why: &str) {
        let (reference, layer) = self.push(media_type, blob, diff_id, |_| {});
        self.refuse(&reference, &[&layer, why]);
    }

    /// It cannot be warmed, nor mounted, and nobody is told that anything of it is here.
    fn refuse(&self, reference: &str, parts: &[&str]) {
        let bed = &self.bed;
        let dir = bed.mount_dir("mnt");
        for line in [
            format!("warm {reference}"),
            format!("mount {reference} {dir}"),
        ] {
            let said = bed.fails(&line);
            for part in [&[reference], parts].concat() {
                assert!(said.contains(part), "{line}: {part:?} is not in:\n{said}");
            }
        }
        let mounted = hearth::mount::mounted().unwrap();
        assert!(mounted.iter().all(|m| m.mountpoint != Path::new(&dir)));
        let listed = bed.json("list --json");
        for artifact in listed.as_array().unwrap() {
            assert_ne!(artifact["complete"], true, "{reference}: {listed}");
        }
    }
}

fn fixtures(dir: &str) -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(dir);
    files_below(&dir)
        .into_iter()
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(path).unwrap())
        })
        .collect()
}

#[test]
fn tars_that_escape_lie_or_are_broken_are_refused() {
    let mut court = Court::new();
    let expected =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tar/expected"))
            .unwrap();
    let mut tried = 0;
    for (name, tar) in fixtures("tar") {
        if !name.starts_with("bad-") {
            continue;
        }
        let why = expected
            .split(&format!("{name}\n  error: "))
            .nth(1)
            .unwrap();
        let why = why.lines().next().unwrap();
        court.refuse_tar(&tar, why);
        tried += 1;
    }
    assert!(tried > 10);
    // Objects of good files that came before the bad entry are for nobody.
    court.bed.ok("gc --target-bytes 0");
    assert!(court.bed.objects().is_empty());
}

#[test]
fn names_through_links_stay_inside() {
    let mut court = Court::new();
    let outside = court.bed.path("outside");
    fs::create_dir(&outside).unwrap();
    // A symlink to the machine's own directory, then a file through it, as GNU tar packs it.
    let made = court.bed.path("made");
    fs::create_dir_all(made.join("through")).unwrap();
    fs::write(made.join("through/evil"), "evil").unwrap();
    let second = tar(&made, &["--format=gnu"], &["through/evil"]);
    fs::remove_dir_all(made.join("through")).unwrap();
    std::os::unix::fs::symlink(&outside, made.join("through")).unwrap();
    let mut both = tar(&made, &["--format=gnu"], &["through"]);
    let end = both.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    both.truncate(end.next_multiple_of(512));
    both.extend(second);
    // And by a name that is absolute.
    let absolute = court.bed.path("outside/absolute");
    fs::write(&absolute, "absolute").unwrap();
    let third = tar(&made, &["-P"], &[absolute.to_str().unwrap()]);
    fs::remove_file(&absolute).unwrap();
    for layer in [both, third] {
        let media_type = format!("{OCI}.layer.v1.tar+gzip");
        let (reference, _) = court.push(&media_type, &gzip(&layer), &Digest::of(&layer), |_| {});
        let bed = &court.bed;
        let dir = bed.mount_dir("mnt");
        if bed.run(&format!("mount {reference} {dir}")).code == Some(0) {
            bed.wait_complete(&dir);
            bed.ok(&format!("umount {dir}"));
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{reference}");
    }
}

#[test]
fn broken_streams_and_wrong_digests_are_refused() {
    let mut court = Court::new();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), bytes(3, 3_000_000)).unwrap();
    fs::write(dir.path().join("text"), "some text\n".repeat(100_000)).unwrap();
    let plain = tar(dir.path(), &["--sort=name"], &["file", "text"]);
    let (good, diff_id) = (gzip(&plain), Digest::of(&plain));
    let (gzipped, zstd) = (
        format!("{OCI}.layer.v1.tar+gzip"),
        format!("{OCI}.layer.v1.tar+zstd"),
    );
    let mut broken = good.clone();
    let middle = broken.len() / 2;
    broken[middle..middle + 4000].fill(0xff);
    court.refuse_layer(&gzipped, &broken, &diff_id, "its gzip stream is broken");
    court.refuse_layer(&gzipped, &good[..middle], &diff_id, "cut short");
    let mut tail = good.clone();
    let end = tail.len() - 6;
    tail[end] ^= 1;
    court.refuse_layer(&gzipped, &tail, &diff_id, "its gzip stream is broken");
    let compressed = zstd::bulk::compress(&plain, 3).unwrap();
    let half = &compressed[..compressed.len() / 2];
    court.refuse_layer(&zstd, half, &diff_id, "cut short");
    let other = Digest::of(b"other");
    let why = format!("it unpacks to {diff_id}, the image's configuration says {other}");
    court.refuse_layer(&gzipped, &good, &other, &why);
    // What the manifest says of its size.
    for size in [good.len() + 1, good.len() - 1] {
        let lie = |manifest: &mut Value| manifest["layers"][0]["size"] = size.into();
        let (reference, layer) = court.push(&gzipped, &good, &diff_id, lie);
        court.refuse(&reference, &[&layer]);
    }
    // A registry that serves other bytes of a layer that is not here yet.
    fs::write(dir.path().join("file"), bytes(4, 3_000_000)).unwrap();
    let plain = tar(dir.path(), &["--sort=name"], &["file", "text"]);
    let (good, diff_id) = (gzip(&plain), Digest::of(&plain));
    let (reference, layer) = court.push(&gzipped, &good, &diff_id, |_| {});
    let hex = layer.strip_prefix("sha256:").unwrap();
    let stored = court.registry.files();
    let stored = stored.join(format!("blobs/sha256/{}/{hex}/data", &hex[..2]));
    let mut swapped = good.clone();
    swapped[middle] ^= 0x10;
    fs::write(&stored, &swapped).unwrap();
    court.refuse(&reference, &[&layer, "the content is wrong"]);
    assert!(court.bed.objects().iter().all(|path| !path.ends_with(hex)));
    // With the right ones again it is pulled.
    fs::write(&stored, &good).unwrap();
    court.bed.ok(&format!("warm {reference}"));
    court.bed.ok("verify --all");
}

#[test]
fn bombs_take_neither_memory_nor_disk() {
    let mut court = Court::new();
    fs::write(
        court.bed.path("small.toml"),
        "[store]\nmax_bytes = \"64MiB\"\nmin_free = \"0\"\n",
    )
    .unwrap();
    // 1 GiB of noise that repeats: a few hundred KiB as zstd.
    let block = bytes(9, 256 << 10);
    let mut layer = Vec::new();
    {
        let mut encoder = zstd::Encoder::new(&mut layer, 3).unwrap();
        encoder.long_distance_matching(true).unwrap();
        let mut header = [0; 512];
        header[..4].copy_from_slice(b"bomb");
        header[100..107].copy_from_slice(b"0000644");
        header[124..135].copy_from_slice(format!("{:011o}", 1u64 << 30).as_bytes());
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
        header[148..154].copy_from_slice(format!("{sum:06o}").as_bytes());
        std::io::Write::write_all(&mut encoder, &header).unwrap();
        for _ in 0..1 << 12 {
            std::io::Write::write_all(&mut encoder, &block).unwrap();
        }
        encoder.finish().unwrap();
    }
    assert!(layer.len() < 8 << 20, "{}", layer.len());
    let media_type = format!("{OCI}.layer.v1.tar+zstd");
    let (reference, _) = court.push(&media_type, &layer, &Digest::of(b"unknown"), |_| {});
    let config = court.bed.path("small.toml");
    let line = format!("--config {} warm {reference}", config.display());
    // Not its largest size: that counts its own code, as far as the kernel has it cached.
    let group = memory::Group::of(MEMORY);
    let done = Done::of(&mut group.put(&court.bed.command(&line)));
    assert_eq!(group.killed(), 0, "{done:?}");
    let said = done.failed(1);
    for part in [&*reference, "does not fit"] {
        assert!(said.contains(part), "{said}");
    }
    court.bed.ok("gc --target-bytes 0");
    assert!(total_size(&court.bed.store()) < 64 << 20);
}

#[test]
fn manifests_that_lie_or_are_unknown_are_refused() {
    let mut court = Court::new();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "x").unwrap();
    let plain = tar(dir.path(), &[], &["file"]);
    let diff_id = Digest::of(&plain);
    let type_ = |kind: &str| format!("{OCI}.{kind}");
    for kind in [
        "layer.v1.tar+gzip+encrypted",
        "layer.v9.tar",
        "config.v1+json",
    ] {
        let (reference, layer) = court.push(&type_(kind), &plain, &diff_id, |_| {});
        court.refuse(&reference, &[&type_(kind), &layer]);
    }
    // More diff ids than layers.
    let config = json!({"architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [diff_id.to_string(), diff_id.to_string()]}});
    let config = config.to_string();
    let config = court
        .registry
        .blob("bad", &type_("config.v1+json"), config.as_bytes());
    let lie = |manifest: &mut Value| manifest["config"] = config;
    let (reference, _) = court.push(&type_("layer.v1.tar"), &plain, &diff_id, lie);
    court.refuse(&reference, &["diff"]);
    // An index of indexes of indexes.
    let (_, layer) = court.push(&type_("layer.v1.tar"), &plain, &diff_id, |_| {});
    assert!(layer.starts_with("sha256:"));
    let tag = format!("t{}", court.number);
    let mut inner = court.registry.get("bad", &format!("manifests/{tag}"));
    let mut kind = MANIFEST;
    for depth in 0..6 {
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [{
            "mediaType": kind, "digest": Digest::of(&inner).to_string(), "size": inner.len(),
            "platform": {"os": "linux", "architecture": "amd64"}}]});
        court
            .registry
            .manifest("bad", &format!("deep{depth}"), &index);
        inner = serde_json::to_vec(&index).unwrap();
        kind = INDEX;
    }
    let reference = court.registry.reference("bad", "deep5");
    court.refuse(&reference, &["index"]);
}
