//! A real image: Debian, Python and TensorFlow in eleven gzip layers, which `tests/image.py` makes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use hearth::digest::Digest;
use serde_json::Value;

use super::{
    bed::{Bed, Cri},
    image::{Image, run},
    kubelet::{Kubelet, reads, registry},
    served::{hearth, mounts},
};
use crate::{
    layers::{Walk, differences, walk_files},
    servers::{self, Server},
};

struct Large {
    dir: PathBuf,
    layers: Vec<Digest>,
    /// The chain id up to each of them (OCI image-spec, config.md).
    chains: Vec<Digest>,
}

impl Large {
    fn open() -> Self {
        let dir = servers::bed().join("image");
        let read = |name: &str| -> Value {
            let path = dir.join(name);
            let text = fs::read(&path).unwrap_or_else(|e| panic!("{path:?}: {e}; run tests/run"));
            serde_json::from_slice(&text).unwrap()
        };
        let digest = |value: &Value| -> Digest { value.as_str().unwrap().parse().unwrap() };
        let blob = |of: &Value| read(&format!("blobs/sha256/{}", digest(&of["digest"]).hex()));
        let manifest = blob(&read("index.json")["manifests"][0]);
        let layers = manifest["layers"].as_array().unwrap().iter();
        let layers: Vec<Digest> = layers.map(|layer| digest(&layer["digest"])).collect();
        assert!(layers.len() >= 10);
        let config = blob(&manifest["config"]);
        let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap().iter();
        let mut chains: Vec<Digest> = Vec::new();
        for diff_id in diff_ids.map(digest) {
            let below = chains.last();
            let chain = below.map(|below| Digest::of(format!("{below} {diff_id}").as_bytes()));
            chains.push(chain.unwrap_or(diff_id));
        }
        Self {
            dir,
            layers,
            chains,
        }
    }

    /// Pushes it; its name there.
    fn push(&self, registry: &Server) -> String {
        let name = format!("127.0.0.1:{}/large:1", registry.port);
        run(Command::new("skopeo")
            .args(["--insecure-policy", "copy", "-q", "--preserve-digests"])
            .arg("--dest-tls-verify=false")
            .arg(format!("oci:{}:large", self.dir.display()))
            .arg(format!("docker://{name}")));
        name
    }

    fn reads(&self, registry: &Server) -> usize {
        let layers = self.layers.iter();
        layers.map(|blob| reads(registry, "large", blob)).sum()
    }
}

/// What a snapshotter makes of the layers up to a chain id.
pub(super) fn walk(bed: &Bed, namespace: &str, snapshotter: &str, chain: &Digest) -> Walk {
    let at = bed.path(&format!("look-{snapshotter}"));
    fs::create_dir(&at).unwrap();
    // `ctr images mount` knows only the snapshotter of the daemon's configuration.
    let snapshots = format!("--namespace {namespace} snapshots --snapshotter {snapshotter}");
    bed.wait_for("a view that is not collected", |bed| {
        bed.ctr_succeeds(&format!("{snapshots} view look {chain}"))
            && bed.ctr_succeeds(&format!("{snapshots} label look containerd.io/gc.root=1"))
    });
    let mount = bed.ctr(&format!("{snapshots} mounts {} look", at.display()));
    run(Command::new("sh").args(["-c", &mount]));
    let walk = walk_files(&at);
    run(Command::new("umount").arg(&at));
    bed.ctr(&format!("{snapshots} rm look"));
    walk
}

pub(super) fn assert_same(ours: &Walk, theirs: &Walk) {
    // containerd leaves the root the time of the unpacking.
    let wrong = differences(ours, theirs, |path, _| path.is_empty());
    let first = &wrong[..wrong.len().min(10)];
    assert!(wrong.is_empty(), "{}: {}", wrong.len(), first.join("\n"));
}

/// As a node that has pulled it before, as containerd without hearth, and as a node that has never
/// seen it.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_image_is_the_same_pulled_before_and_while_it_arrives() {
    let source = tempfile::tempdir().unwrap();
    let pause = Image::make(source.path(), "large");
    let registry = registry(&pause);
    let pause = format!("127.0.0.1:{}/pause:1", registry.port);
    let large = Large::open();
    let app = large.push(&registry);

    let mut bed = Bed::new(Some(Cri {
        sandbox_image: &pause,
        labels: false,
    }));
    let store = bed.path("store");
    run(&mut hearth(&store, &format!("index push oci://{app}")));
    run(&mut hearth(&store, &format!("warm oci://{app}")));
    let before = large.reads(&registry);
    bed.start_snapshotter();
    bed.start_containerd();
    let mut kubelet = Kubelet::new(&bed).await;
    kubelet.pull(&app).await;
    let pod = kubelet.run_pod().await;
    let warm = kubelet.run_to_end(&pod, "warm", &app).await;
    assert_eq!(large.reads(&registry), before);
    let found = mounts(&store.join("run"));
    let native = found.iter().all(|(_, kind)| kind == "erofs");
    assert!(native && !found.is_empty(), "{found:?}");

    bed.ctr(&format!(
        "--namespace plain images pull --plain-http --snapshotter overlayfs {app}"
    ));
    let plain = bed.ctr(&format!(
        "--namespace plain run --rm --snapshotter overlayfs {app} plain"
    ));
    assert!(plain.starts_with("tensorflow 2."), "{plain}");
    assert_eq!(warm, plain);
    let top = large.chains.last().unwrap();
    let theirs = walk(&bed, "plain", "overlayfs", top);
    let size = |(seen, _): &(crate::layers::Seen, u64)| {
        let size = seen.what.strip_prefix("file of ")?.split(' ').next()?;
        size.parse::<u64>().ok()
    };
    let size: u64 = theirs.values().filter_map(size).sum();
    assert!(size > 1_000_000_000 && theirs.len() > 10_000, "{size}");
    assert_same(&walk(&bed, "k8s.io", "hearth", top), &theirs);
    for chain in &large.chains {
        let (bytes, inodes) = bed.usage("k8s.io", "hearth", &chain.to_string());
        let (true_bytes, true_inodes) = bed.usage("plain", "overlayfs", &chain.to_string());
        let error = (bytes - true_bytes).abs() / true_bytes;
        assert!(error < 0.01, "{chain}: {bytes}, and not {true_bytes}");
        assert_eq!(inodes, true_inodes, "{chain}");
    }
    kubelet.remove_pod(&pod).await;
    drop(bed);

    let mut bed = Bed::new(Some(Cri {
        sandbox_image: &pause,
        labels: true,
    }));
    bed.start_snapshotter();
    bed.start_containerd();
    let mut kubelet = Kubelet::new(&bed).await;
    let before = large.reads(&registry);
    kubelet.pull(&app).await;
    assert_eq!(large.reads(&registry), before, "a pull reads nothing");
    let pod = kubelet.run_pod().await;
    let cold = kubelet.run_to_end(&pod, "cold", &app).await;
    assert_eq!(cold, plain);
    let found = mounts(&bed.path("store/run"));
    let lazy = found.iter().filter(|(_, kind)| kind.starts_with("fuse"));
    let lazy: Vec<_> = lazy.map(|(at, _)| walk_files(Path::new(at))).collect();
    let lazy = lazy.iter().max_by_key(|walk| walk.len()).unwrap();
    assert_same(lazy, &theirs);
    kubelet.remove_pod(&pod).await;
}
