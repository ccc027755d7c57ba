//! Models from a real registry: looked at, warmed, mounted while they arrive.

use hearth::digest::Digest;
use serde_json::json;

use crate::{
    oci_models::{Model, Push, layouts},
    pushed::{INDEX, MANIFEST, Registry, gzip, tar},
};

use super::*;

#[test]
fn models_of_a_registry_are_inspected_warmed_and_mounted() {
    let (registry, model) = (Registry::start(), Model::new());
    let total: u64 = model.files.values().map(|f| f.len() as u64).sum();
    for (layout, reference) in layouts(&registry, &model) {
        let bed = Bed::new();
        let report = bed.json(&format!("inspect {reference} --json"));
        assert_eq!(report["kind"], "registry", "{layout}");
        let files = report["files"].as_array().unwrap();
        let is_tar = layout.ends_with("tar");
        for (file, (path, content)) in files.iter().zip(&model.files) {
            assert_eq!(file["path"], *path, "{layout}");
            assert_eq!(file["bytes"], content.len());
            let digest = hearth::digest::Digest::of(content).to_string();
            match is_tar {
                // Nobody knows the digest of a file inside a tar before it is here.
                true => assert_eq!(file["digest"], Value::Null, "{layout}"),
                false if layout.ends_with("v0.1") => {}
                false => assert_eq!(file["digest"], digest, "{layout}"),
            }
        }
        assert_eq!(files.len(), model.files.len());
        let bytes = report["bytes"].as_u64().unwrap();
        assert!(bytes >= total && (is_tar || layout.ends_with("v0.1") || bytes == total));
        assert!(bed.objects().is_empty(), "{layout}");

        let dir = bed.mount_dir("mnt");
        bed.ok(&format!("mount {reference} {dir}"));
        assert_same(&dir, model.dir.path());
        let status = bed.wait_complete(&dir);
        assert_eq!(status["total_bytes"], bytes, "{layout}");
        assert_eq!(status["error"], Value::Null, "{layout}");
        assert_same(&dir, model.dir.path());
        bed.ok(&format!("umount {dir}"));

        let warm = &bed.json(&format!("warm {reference} --json"))[0];
        assert_eq!(
            (&warm["bytes"], &warm["bytes_before"]),
            (&bytes.into(), &bytes.into())
        );
        assert_eq!(
            total_size(&bed.store().join("objects")),
            bytes,
            "stored once"
        );
        let status = bed.json(&format!("status {reference} --json"));
        assert_eq!(status["complete"], true, "{layout}: {status}");
        for file in status["file"].as_array().unwrap() {
            assert_eq!(file["present_bytes"], file["bytes"], "{layout}");
            let object = file["object"].as_str().unwrap();
            assert!(object.starts_with("sha256:"), "{object}");
            assert!(!is_tar || object.contains('@'), "{object}");
        }
        bed.ok(&format!("verify {reference}"));
        bed.ok(&format!("rm {reference}"));
        assert!(bed.objects().is_empty(), "{layout}");
    }
}

#[test]
fn a_file_inside_a_tar_is_read_before_the_tar_is_here() {
    let registry = Registry::start();
    let bed = Bed::new();
    let model = bed.path("model");
    write_model(&model, 40, 2, 7);
    let layer = tar(&model, &["--sort=name", "--format=gnu"], &["."]);
    let mut push = Push::new(
        &registry,
        "slow/kit",
        "application/vnd.kitops.modelkit.config.v1+json",
    );
    push.layer("application/vnd.kitops.modelkit.model.v1.tar", &layer, &[]);
    push.done();
    let reference = format!("oci://{}/slow/kit:v1", registry.host());
    let dir = bed.mount_dir("mnt");
    // Nobody else brings anything: what is read first is not all, however long that takes.
    bed.ok(&format!("mount --no-fill {reference} {dir}"));
    let script = r#"
import hashlib, mmap, os, sys
root, name = sys.argv[1:]
tail = open(os.path.join(root, "tokenizer.json"), "rb").read()
with open(os.path.join(root, name), "rb") as f:
    data = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
    last = data[-5000:]
print(hashlib.sha256(tail + last).hexdigest())
"#;
    let shard = "model-00002-of-00002.safetensors";
    let read = || Done::of(&mut python(script, &[&dir, shard])).ok();
    let weights = fs::read(model.join(shard)).unwrap();
    let tail = fs::read(model.join("tokenizer.json")).unwrap();
    let right = [&tail[..], &weights[weights.len() - 5000..]].concat();
    let right = hearth::digest::Digest::of(&right).hex();
    assert_eq!(read().trim(), right);
    let status = bed.json(&format!("status {dir} --json"));
    assert_eq!(status["complete"], false, "{status}");
    let file = bed.json(&format!("status {reference} --json"));
    assert_eq!(file["complete"], false);
    assert_same(&dir, &model);
    bed.wait_complete(&dir);
    assert_eq!(bed.objects().len(), 1, "the tar, once");
    assert_eq!(read().trim(), right);
    bed.ok(&format!("umount {dir}"));
}

/// A modelcar whose layers have indexes is read as any image is: what is asked for comes, and the rest later.
#[test]
fn a_modelcar_with_an_index_is_read_before_it_is_pulled() {
    let registry = Registry::start();
    let maker = Bed::new();
    let (model, base) = (maker.path("model"), maker.path("base"));
    write_model(&model, 12, 2, 7);
    fs::create_dir_all(base.join("opt")).unwrap();
    fs::write(base.join("opt/server"), bytes(5, 3 << 20)).unwrap();
    let format = ["--sort=name", "--format=gnu"];
    let below = [&format[..], &["--transform=s,^\\.,models,"]].concat();
    let layers = [tar(&base, &format, &["opt"]), tar(&model, &below, &["."])];
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": layers.each_ref().map(|l| Digest::of(l).to_string())},
    });
    let kind = |what: &str| format!("application/vnd.oci.image.{what}");
    let blobs = layers.each_ref().map(|layer| gzip(layer));
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": registry.blob("car", &kind("config.v1+json"), config.to_string().as_bytes()),
        "layers": blobs.each_ref().map(|blob| registry.blob("car", &kind("layer.v1.tar+gzip"), blob)),
    });
    registry.manifest("car", "1", &manifest);
    let image = registry.reference("car", "1");
    maker.ok(&format!("index push {image}"));

    let bed = Bed::new();
    let reference = format!("{image}?path=models");
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount --no-fill {reference} {dir}"));
    let shard = "model-00002-of-00002.safetensors";
    let script = r#"
import hashlib, os, sys
f = os.open(os.path.join(*sys.argv[1:]), os.O_RDONLY)
print(hashlib.sha256(os.pread(f, 5000, os.fstat(f).st_size - 5000)).hexdigest())
"#;
    let read = || Done::of(&mut python(script, &[&dir, shard])).ok();
    let weights = fs::read(model.join(shard)).unwrap();
    let right = Digest::of(&weights[weights.len() - 5000..]).hex();
    assert_eq!(read().trim(), right);
    let status = bed.json(&format!("status {dir} --json"));
    let fetched: u64 = ["demand", "readahead", "warm"]
        .iter()
        .map(|class| {
            status["metrics"][format!("hearth_fetch_{class}_bytes_total")]
                .as_u64()
                .unwrap()
        })
        .sum();
    assert!(
        fetched > 0 && fetched < blobs[1].len() as u64 / 2,
        "{status}"
    );
    assert!(bed.objects().is_empty(), "nothing was unpacked");
    bed.ok(&format!("umount {dir}"));

    bed.ok(&format!("mount {reference} {dir}"));
    assert_same(&dir, &model);
    let status = bed.wait_complete(&dir);
    assert_eq!(status["error"], Value::Null);
    bed.ok(&format!("umount {dir}"));
    let warm = &bed.json(&format!("warm {reference} --json"))[0];
    assert_eq!(warm["bytes"], warm["bytes_before"]);
    // What is here needs no registry.
    drop(registry);
    bed.ok(&format!("mount {reference} {dir}"));
    assert_same(&dir, &model);
    assert_eq!(read().trim(), right);
    bed.ok(&format!("umount {dir}"));
}

#[test]
fn of_several_platforms_one_is_chosen() {
    let (registry, bed) = (Registry::start(), Bed::new());
    let mut manifests = Vec::new();
    for arch in ["amd64", "arm64"] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("arch"), arch).unwrap();
        let layer = tar(dir.path(), &[], &["arch"]);
        let config = json!({"architecture": arch, "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer).to_string()]}});
        let config = config.to_string();
        let kind = |what: &str| format!("application/vnd.oci.image.{what}");
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": registry.blob("many", &kind("config.v1+json"), config.as_bytes()),
            "layers": [registry.blob("many", &kind("layer.v1.tar"), &layer)],
        });
        let digest = registry.manifest("many", arch, &manifest).to_string();
        let size = serde_json::to_vec(&manifest).unwrap().len();
        manifests.push(
            json!({"mediaType": MANIFEST, "digest": digest, "size": size,
            "platform": {"os": "linux", "architecture": arch}}),
        );
    }
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
    registry.manifest("many", "v1", &index);
    let reference = registry.reference("many", "v1");
    for arch in ["amd64", "arm64"] {
        let chosen = format!("{reference}?platform=linux/{arch}");
        let flag = format!("--platform linux/{arch}");
        let image = bed.json(&format!("inspect {flag} {reference} --json"));
        assert_eq!(image["platform"], format!("linux/{arch}"));
        assert_eq!(image["reference"], chosen);
        bed.ok(&format!("warm {flag} {reference} {chosen}"));
        let dir = bed.mount_dir(arch);
        bed.ok(&format!("mount {flag} {reference} {dir}"));
        let found = Done::of(&mut tool("cat", &[&format!("{dir}/arch")])).ok();
        assert_eq!(found, arch);
        bed.ok(&format!("umount {dir}"));
    }
    let error = bed.fails(&format!(
        "warm --platform linux/arm64 {reference}?platform=linux/386"
    ));
    assert!(error.contains("contradict each other"), "{error}");
    let error = bed.fails("inspect --platform linux/arm64 file:///none");
    assert!(error.contains("is for oci:// references"), "{error}");
}
