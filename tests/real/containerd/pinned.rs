//! What is pinned on the node is kept from the kubelet's collection.

use std::{
    ffi::OsStr,
    path::Path,
    time::{Duration, Instant},
};

use super::{
    bed::{Bed, Cri},
    image::{Image, run},
    kubelet::{Kubelet, registry},
    served::hearth,
};
use crate::servers;

const LABEL: &str = "io.cri-containerd.pinned=pinned";

/// An image that is pinned here, and one that somebody else has pinned in containerd.
struct Test {
    bed: Bed,
    kubelet: Kubelet,
    ours: String,
    theirs: String,
    _registry: servers::Server,
    _source: tempfile::TempDir,
}

impl Test {
    async fn new(containerd: &Path) -> Self {
        let source = tempfile::tempdir().unwrap();
        let image = Image::make(source.path(), "pinned");
        let registry = registry(&image);
        let host = format!("127.0.0.1:{}", registry.port);
        let (ours, theirs) = (format!("{host}/app:1"), format!("{host}/pause:1"));
        let mut bed = Bed::new(Some(Cri {
            sandbox_image: &theirs,
            labels: false,
        }));
        let store = bed.path("store");
        run(&mut hearth(&store, &format!("warm --pin oci://{ours}")));
        run(&mut hearth(&store, &format!("warm oci://{theirs}")));
        let socket = bed.path("c.sock");
        bed.start_snapshotter_with(&[OsStr::new("--containerd"), socket.as_os_str()]);
        bed.start_this_containerd(containerd);
        let kubelet = Kubelet::new(&bed).await;
        Self {
            bed,
            kubelet,
            ours,
            theirs,
            _registry: registry,
            _source: source,
        }
    }

    fn wait_labelled(&self, name: &str, expected: bool) {
        let what = format!("the label of {name}: {expected}");
        self.bed.wait_for(&what, |bed| {
            let listed = bed.ctr(&format!("--namespace k8s.io images ls name=={name}"));
            listed.contains(name) && listed.contains(LABEL) == expected
        });
    }

    async fn wait_pinned(&mut self, expected: &[&str]) {
        let begun = Instant::now();
        while self.kubelet.pinned().await != expected {
            let logs = || self.bed.logs();
            assert!(begun.elapsed() < Duration::from_secs(60), "{}", logs());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn hearth(&self, line: &str) {
        run(&mut hearth(&self.bed.path("store"), line));
    }
}

/// The label is there, whether containerd knows it or not: 1.6.20 keeps it, and says of no image that
/// it is pinned.
#[tokio::test(flavor = "multi_thread")]
async fn pinned_images_are_labelled() {
    let mut test = Test::new(Path::new("containerd")).await;
    let (ours, theirs) = (test.ours.clone(), test.theirs.clone());
    test.kubelet.pull(&ours).await;
    test.kubelet.pull(&theirs).await;
    let label = format!("--namespace k8s.io images label {theirs} {LABEL}");
    test.bed.ctr(&label);
    test.wait_labelled(&ours, true);
    // A pull forgets it.
    test.kubelet.pull(&ours).await;
    test.wait_labelled(&ours, true);
    test.hearth(&format!("unpin oci://{ours}"));
    test.wait_labelled(&ours, false);
    test.wait_labelled(&theirs, true);
    // What somebody else has pinned stays so when our pin comes and goes.
    test.hearth(&format!("pin oci://{theirs} oci://{ours}"));
    test.wait_labelled(&ours, true);
    test.hearth(&format!("unpin oci://{theirs} oci://{ours}"));
    test.wait_labelled(&ours, false);
    test.wait_labelled(&theirs, true);
    // containerd goes and comes.
    test.hearth(&format!("pin oci://{ours}"));
    test.bed.stop_containerd();
    test.bed.start_containerd();
    test.wait_labelled(&ours, true);
}

/// With a containerd that knows the label (1.7 of Debian 13), the kubelet sees it.
#[tokio::test(flavor = "multi_thread")]
async fn the_kubelet_sees_that_an_image_is_pinned() {
    let newer = servers::bed().join("bin/containerd-1.7");
    assert!(newer.exists(), "no {newer:?}; run tests/run");
    let mut test = Test::new(&newer).await;
    let ours = test.ours.clone();
    test.kubelet.pull(&ours).await;
    test.wait_pinned(&[&ours]).await;
    test.hearth(&format!("unpin oci://{ours}"));
    test.wait_pinned(&[]).await;
}
