//! A small image, made here: busybox in three layers with what makes layers interesting.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use hearth::digest::Digest;
use serde_json::json;

/// A layer: its tar, and as it lies in the registry.
#[derive(Clone)]
pub(crate) struct Layer {
    pub(crate) diff_id: Digest,
    pub(crate) blob: Digest,
    tar: Vec<u8>,
    gzip: Vec<u8>,
}

/// An image in an OCI layout.
pub(crate) struct Image {
    pub(crate) layers: Vec<Layer>,
    /// The layout.
    pub(crate) dir: PathBuf,
}

impl Layer {
    fn of(dir: &Path) -> Self {
        let tar = run(Command::new("tar")
            .args(["--sort=name", "--mtime=@1700000000", "--numeric-owner"])
            .args(["--xattrs", "-cf", "-", "-C"])
            .arg(dir)
            .arg("."));
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), &tar).unwrap();
        let gzip = run(Command::new("gzip").args(["-nc1"]).arg(file.path()));
        Self {
            diff_id: Digest::of(&tar),
            blob: Digest::of(&gzip),
            tar,
            gzip,
        }
    }
}

impl Image {
    /// Makes the image below `dir`; `salt` makes its top layer its own.
    pub(crate) fn make(dir: &Path, salt: &str) -> Self {
        let at = |layer: u32, name: &str| {
            let path = dir.join(format!("layer-{layer}")).join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            path
        };
        let bin = at(1, "bin/busybox");
        fs::copy("/bin/busybox", &bin).expect("busybox-static; run tests/run");
        for name in [
            "sh", "cat", "sleep", "echo", "ls", "rm", "mkdir", "stat", "touch", "true",
        ] {
            symlink("busybox", at(1, &format!("bin/{name}"))).unwrap();
        }
        fs::write(at(1, "etc/passwd"), "root:x:0:0:root:/:/bin/sh\n").unwrap();
        fs::write(at(1, "data/one"), crate::sources::bytes(1, 300_000)).unwrap();
        fs::write(at(1, "data/gone"), "gone").unwrap();
        fs::write(at(1, "opaque/below"), "below").unwrap();
        fs::write(at(1, "data/mode"), "mode").unwrap();
        fs::set_permissions(at(1, "data/mode"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::create_dir_all(at(1, "tmp")).unwrap();
        fs::set_permissions(at(1, "tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        for name in ["proc", "sys", "dev"] {
            fs::create_dir_all(at(1, name)).unwrap();
        }

        fs::write(at(2, "data/two"), "two").unwrap();
        fs::hard_link(at(2, "data/two"), at(2, "data/two-too")).unwrap();
        fs::write(at(2, "data/.wh.gone"), "").unwrap();
        fs::write(at(2, "opaque/.wh..wh..opq"), "").unwrap();
        fs::write(at(2, "opaque/above"), "above").unwrap();

        fs::write(at(3, "data/salt"), salt).unwrap();
        std::os::unix::fs::chown(at(3, "data/salt"), Some(1234), Some(4321)).unwrap();
        let layers: Vec<Layer> = (1..=3)
            .map(|n| Layer::of(&dir.join(format!("layer-{n}"))))
            .collect();
        let image = Self {
            dir: dir.join("layout"),
            layers,
        };
        image.write();
        image
    }

    /// Makes another image, upon the first two layers of this one.
    pub(crate) fn make_beside(&self, dir: &Path, salt: &str) -> Self {
        let mut other = Self::make(dir, salt);
        other.layers[..2].clone_from_slice(&self.layers[..2]);
        other.write();
        other
    }

    fn write(&self) {
        let blobs = self.dir.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        let put = |bytes: &[u8]| {
            let digest = Digest::of(bytes);
            fs::write(blobs.join(digest.hex()), bytes).unwrap();
            digest
        };
        let described = |kind: &str, digest: Digest, size: usize| {
            json!({
                "mediaType": format!("application/vnd.oci.image.{kind}"),
                "digest": digest.to_string(),
                "size": size,
            })
        };
        let diff_ids: Vec<String> = self.layers.iter().map(|l| l.diff_id.to_string()).collect();
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sleep", "1000"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = config.to_string();
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|l| described("layer.v1.tar+gzip", put(&l.gzip), l.gzip.len()))
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": described("config.v1+json", put(config.as_bytes()), config.len()),
            "layers": layers,
        })
        .to_string();
        let mut top = described("manifest.v1+json", put(manifest.as_bytes()), manifest.len());
        top["annotations"] = json!({"org.opencontainers.image.ref.name": "test"});
        let index = json!({"schemaVersion": 2, "manifests": [top]});
        fs::write(self.dir.join("index.json"), index.to_string()).unwrap();
        let version = json!({"imageLayoutVersion": "1.0.0"});
        fs::write(self.dir.join("oci-layout"), version.to_string()).unwrap();
    }

    /// The chain id up to each layer (OCI image-spec, config.md).
    pub(crate) fn chain_ids(&self) -> Vec<Digest> {
        let mut chains: Vec<Digest> = Vec::new();
        for layer in &self.layers {
            let chain = match chains.last() {
                None => layer.diff_id,
                Some(below) => Digest::of(format!("{below} {}", layer.diff_id).as_bytes()),
            };
            chains.push(chain);
        }
        chains
    }

    /// Puts the merged tree of the first `count` layers into `dir`.
    pub(crate) fn unpack(&self, count: usize, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        for (n, layer) in self.layers[..count].iter().enumerate() {
            if n == 1 {
                // What the whiteouts of this layer hide.
                fs::remove_file(dir.join("data/gone")).unwrap();
                fs::remove_file(dir.join("opaque/below")).unwrap();
            }
            let mut tar = Command::new("tar")
                .args(["-xpf", "-", "--numeric-owner", "--exclude=.wh.*", "-C"])
                .arg(dir)
                .stdin(Stdio::piped())
                .spawn()
                .unwrap();
            let mut stdin = tar.stdin.take().unwrap();
            std::io::Write::write_all(&mut stdin, &layer.tar).unwrap();
            drop(stdin);
            assert!(tar.wait().unwrap().success());
        }
    }

    /// One file of it all, for `ctr images import`.
    pub(crate) fn archive(&self) -> PathBuf {
        let path = self.dir.with_extension("tar");
        run(Command::new("tar")
            .arg("-cf")
            .arg(&path)
            .arg("-C")
            .arg(&self.dir)
            .arg("."));
        path
    }
}

/// The standard output of what must succeed.
pub(crate) fn run(command: &mut Command) -> Vec<u8> {
    let done = command.stdin(Stdio::null()).output();
    let done = done.unwrap_or_else(|e| panic!("{command:?}: {e}; run tests/run"));
    let error = String::from_utf8_lossy(&done.stderr);
    assert!(
        done.status.success(),
        "{command:?}: {}\n{error}",
        done.status
    );
    done.stdout
}
