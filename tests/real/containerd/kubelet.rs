//! By way of the CRI, as the kubelet does, with images from a real registry.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use hearth::{
    digest::Digest,
    snapshotter::{
        Hints, Listener, Root, Roots, RootsError, ServeError, Settings, Snapshotter, Usage, serve,
    },
};
use parking_lot::Mutex;
use tonic::transport::{Channel, Endpoint};

use super::{
    bed::{Bed, Cri},
    cri::{
        self, image_service_client::ImageServiceClient,
        runtime_service_client::RuntimeServiceClient,
    },
    image::{Image, run},
};
use crate::servers::Server;

/// A registry with the image as `app:1` and `pause:1`; it logs every request.
pub(super) fn registry(image: &Image) -> Server {
    let registry = Server::start("docker-registry", |port, dir| {
        let config = format!(
            "version: 0.1\nlog:\n  level: debug\nstorage:\n  filesystem:\n    rootdirectory: '{}'\nhttp:\n  addr: 127.0.0.1:{port}\n",
            dir.join("data").display()
        );
        fs::write(dir.join("config.yml"), config).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(dir.join("config.yml"));
        command
    });
    for name in ["app", "pause"] {
        run(Command::new("skopeo")
            .args(["--insecure-policy", "copy", "-q", "--preserve-digests"])
            .args([
                "--dest-tls-verify=false",
                &format!("oci:{}:test", image.dir.display()),
            ])
            .arg(format!("docker://127.0.0.1:{}/{name}:1", registry.port)));
    }
    registry
}

/// How often a blob was read from the registry.
pub(super) fn reads(registry: &Server, name: &str, blob: &Digest) -> usize {
    let log = registry.log();
    let asked = format!("http.request.uri=\"/v2/{name}/blobs/{blob}");
    // What it logs before it answers; the access log may come after somebody has looked.
    let parts = ["\"authorizing request\"", "http.request.method=GET", &asked];
    log.lines()
        .filter(|line| parts.iter().all(|part| line.contains(part)))
        .count()
}

/// A node that has the image unpacked already.
#[derive(Default)]
struct Unpacked {
    roots: HashMap<Digest, PathBuf>,
    held: Mutex<BTreeSet<Digest>>,
    hints: Mutex<Vec<Hints>>,
}

#[async_trait]
impl Roots for Unpacked {
    async fn knows(&self, chain: &Digest, hints: &Hints) -> Result<bool, RootsError> {
        self.hints.lock().push(hints.clone());
        Ok(self.roots.contains_key(chain))
    }

    async fn root(&self, chain: &Digest, _: &Hints) -> Result<Root, RootsError> {
        self.held.lock().insert(*chain);
        let dir = self.roots[chain].clone();
        Ok(Root {
            dir,
            contents: Vec::new(),
            uid: 0,
            gid: 0,
        })
    }

    async fn release(&self, chain: &Digest) {
        assert!(self.held.lock().remove(chain));
    }

    async fn forget(&self, _: &Digest) {}

    async fn sweep(&self, _: &BTreeSet<Digest>, _: &BTreeSet<Digest>) {}

    async fn usage(&self, _: &Digest) -> Result<Usage, RootsError> {
        Ok(Usage {
            bytes: 4096,
            inodes: 1,
        })
    }
}

pub(super) struct Kubelet {
    images: ImageServiceClient<Channel>,
    runtime: RuntimeServiceClient<Channel>,
    logs: String,
}

impl Kubelet {
    pub(super) async fn new(bed: &Bed) -> Self {
        let address = format!("unix://{}", bed.path("c.sock").display());
        let channel = Endpoint::try_from(address)
            .unwrap()
            .connect()
            .await
            .unwrap();
        let mut images = ImageServiceClient::new(channel.clone());
        // containerd listens before this part of it is ready.
        for attempt in 0.. {
            let image = Some(spec("none"));
            match images.image_status(cri::ImageStatusRequest { image }).await {
                Ok(_) => break,
                Err(error) => assert!(attempt < 300, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Self {
            images,
            runtime: RuntimeServiceClient::new(channel),
            logs: bed.path("pods").display().to_string(),
        }
    }

    fn pod(&self) -> cri::PodSandboxConfig {
        let host = cri::NamespaceMode::Node.into();
        let options = cri::NamespaceOption {
            network: host,
            ..Default::default()
        };
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "pod".into(),
                uid: "uid".into(),
                namespace: "default".into(),
                attempt: 0,
            }),
            log_directory: self.logs.clone(),
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                }),
            }),
            ..Default::default()
        }
    }

    pub(super) async fn pull(&mut self, image: &str) {
        let request = cri::PullImageRequest {
            image: Some(spec(image)),
            sandbox_config: None,
        };
        self.images.pull_image(request).await.unwrap();
    }

    /// Tags of the images that the kubelet would not collect.
    pub(super) async fn pinned(&mut self) -> Vec<String> {
        let listed = self.images.list_images(cri::ListImagesRequest {}).await;
        let images = listed.unwrap().into_inner().images.into_iter();
        images
            .filter(|i| i.pinned)
            .flat_map(|i| i.repo_tags)
            .collect()
    }

    pub(super) async fn remove_image(&mut self, image: &str) {
        let request = cri::RemoveImageRequest {
            image: Some(spec(image)),
        };
        self.images.remove_image(request).await.unwrap();
    }

    pub(super) async fn run_pod(&mut self) -> String {
        let request = cri::RunPodSandboxRequest {
            config: Some(self.pod()),
        };
        let made = self.runtime.run_pod_sandbox(request).await.unwrap();
        made.into_inner().pod_sandbox_id
    }

    pub(super) async fn run(&mut self, pod: &str, name: &str, image: &str) -> String {
        self.start(pod, name, image, &["/bin/sleep", "1000"]).await
    }

    /// Starts a container; without a command, with what its image says.
    async fn start(&mut self, pod: &str, name: &str, image: &str, command: &[&str]) -> String {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(cri::ContainerConfig {
                metadata: Some(cri::ContainerMetadata { name: name.into() }),
                image: Some(spec(image)),
                command: command.iter().map(|&word| word.to_owned()).collect(),
                log_path: format!("{name}.log"),
            }),
            sandbox_config: Some(self.pod()),
        };
        let made = self.runtime.create_container(request).await.unwrap();
        let container_id = made.into_inner().container_id;
        let request = cri::StartContainerRequest {
            container_id: container_id.clone(),
        };
        self.runtime.start_container(request).await.unwrap();
        container_id
    }

    /// Runs what the image says to its end, which must be a good one; what it printed.
    pub(super) async fn run_to_end(&mut self, pod: &str, name: &str, image: &str) -> String {
        let container_id = self.start(pod, name, image, &[]).await;
        let status = loop {
            let container_id = container_id.clone();
            let request = cri::ContainerStatusRequest { container_id };
            let answer = self.runtime.container_status(request).await.unwrap();
            let status = answer.into_inner().status.unwrap();
            if status.state() == cri::ContainerState::ContainerExited {
                break status;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        // Each line: time, stream, whether the line is full.
        let log = fs::read_to_string(format!("{}/{name}.log", self.logs)).unwrap();
        assert_eq!(status.exit_code, 0, "{log}");
        let printed = log.lines().filter_map(|line| line.split_once(" stdout F "));
        printed.map(|(_, text)| format!("{text}\n")).collect()
    }

    pub(super) async fn exec(&mut self, container_id: &str, script: &str) -> String {
        let request = cri::ExecSyncRequest {
            container_id: container_id.into(),
            cmd: ["/bin/sh", "-c", script].map(str::to_owned).into(),
            timeout: 20,
        };
        let done = self.runtime.exec_sync(request).await.unwrap().into_inner();
        let error = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.exit_code, 0, "{script}: {error}");
        String::from_utf8(done.stdout).unwrap()
    }

    pub(super) async fn remove_pod(&mut self, pod: &str) {
        let pod_sandbox_id = pod.to_owned();
        let request = cri::StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        self.runtime.stop_pod_sandbox(request).await.unwrap();
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id };
        self.runtime.remove_pod_sandbox(request).await.unwrap();
    }
}

fn spec(image: &str) -> cri::ImageSpec {
    cri::ImageSpec {
        image: image.into(),
    }
}

/// Serves the snapshotter of `bed` from this process.
fn serve_in(
    bed: &Bed,
    node: Arc<Unpacked>,
) -> (
    tokio::sync::oneshot::Sender<()>,
    tokio::task::JoinHandle<Result<(), ServeError>>,
) {
    let settings = Settings {
        root: bed.path("hearth"),
        sync: true,
    };
    let snapshotter = Snapshotter::open(settings, node).unwrap();
    let listener = Listener::bind(&bed.path("h.sock")).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let serving = tokio::spawn(serve(snapshotter, listener, async {
        let _ = stopped.await;
    }));
    (stop, serving)
}

/// With containerd's own configuration but for the snapshotter: no labels of the CRI.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_runs_on_layers_that_containerd_unpacks() {
    let source = tempfile::tempdir().unwrap();
    let image = Image::make(source.path(), "ordinary");
    let registry = registry(&image);
    let host = format!("127.0.0.1:{}", registry.port);
    let mut bed = Bed::new(Some(Cri {
        sandbox_image: &format!("{host}/pause:1"),
        labels: false,
    }));
    bed.start_snapshotter();
    bed.start_containerd();
    let mut kubelet = Kubelet::new(&bed).await;
    let app = format!("{host}/app:1");
    kubelet.pull(&app).await;
    assert_eq!(bed.records(), 3);
    assert_eq!(reads(&registry, "app", &image.layers[0].blob), 1);
    let pod = kubelet.run_pod().await;
    let one = kubelet.run(&pod, "one", &app).await;
    let two = kubelet.run(&pod, "two", &app).await;
    assert_eq!(
        kubelet
            .exec(&one, "echo -n changed > /data/salt; cat /data/salt")
            .await,
        "changed"
    );
    assert_eq!(kubelet.exec(&two, "cat /data/salt").await, "ordinary");
    bed.stop_snapshotter();
    bed.start_snapshotter();
    bed.wait_connected();
    assert_eq!(kubelet.exec(&one, "cat /data/salt").await, "changed");
    let three = kubelet.run(&pod, "three", &app).await;
    assert_eq!(
        kubelet.exec(&three, "ls /data").await,
        "mode\none\nsalt\ntwo\ntwo-too\n"
    );
    kubelet.remove_pod(&pod).await;
    kubelet.remove_image(&app).await;
    kubelet.remove_image(&format!("{host}/pause:1")).await;
    bed.wait_for("collection", |bed| bed.records() == 0 && bed.dirs() == 0);
}

/// Layers are known by their chain ids alone; the top one is not known and is unpacked upon them.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_runs_on_layers_that_are_never_fetched() {
    let source = tempfile::tempdir().unwrap();
    let image = Image::make(source.path(), "claimed");
    let chains = image.chain_ids();
    let registry = registry(&image);
    let host = format!("127.0.0.1:{}", registry.port);
    let mut bed = Bed::new(Some(Cri {
        sandbox_image: &format!("{host}/pause:1"),
        labels: false,
    }));
    let mut node = Unpacked::default();
    for known in 1..=2 {
        let dir = bed.path(&format!("tree-{known}"));
        image.unpack(known, &dir);
        node.roots.insert(chains[known - 1], dir);
    }
    let node = Arc::new(node);
    let (stop, serving) = serve_in(&bed, node.clone());
    bed.start_containerd();
    let mut kubelet = Kubelet::new(&bed).await;
    let app = format!("{host}/app:1");
    kubelet.pull(&app).await;
    for layer in &image.layers[..2] {
        assert_eq!(
            reads(&registry, "app", &layer.blob),
            0,
            "{}",
            registry.log()
        );
    }
    assert_eq!(reads(&registry, "app", &image.layers[2].blob), 1);
    assert!(node.hints.lock().iter().all(|h| h.image.is_none()));
    assert_eq!(node.hints.lock()[0].namespace.as_deref(), Some("k8s.io"));
    let listed = bed.ctr("--namespace k8s.io snapshots --snapshotter hearth ls");
    for chain in &chains {
        assert!(listed.contains(&chain.to_string()), "{listed}");
    }
    let info = format!(
        "--namespace k8s.io snapshots --snapshotter hearth info {}",
        chains[1]
    );
    let info: serde_json::Value = serde_json::from_str(&bed.ctr(&info)).unwrap();
    assert_eq!(
        info["Labels"]["containerd.io/snapshot/remote"],
        "remote snapshot"
    );
    assert_eq!(info["Parent"], chains[0].to_string());

    let pod = kubelet.run_pod().await;
    let one = kubelet.run(&pod, "one", &app).await;
    assert_eq!(*node.held.lock(), BTreeSet::from([chains[1]]));
    let seen = kubelet.exec(&one, "ls /data /opaque; cat /data/salt").await;
    assert_eq!(
        seen,
        "/data:\nmode\none\nsalt\ntwo\ntwo-too\n\n/opaque:\nabove\nclaimed"
    );
    kubelet
        .exec(&one, "rm /data/one; echo more >> /data/two")
        .await;
    assert!(bed.path("tree-2/data/one").exists());

    // containerd is restarted, and still knows what was claimed.
    bed.stop_containerd();
    bed.start_containerd();
    let mut kubelet = Kubelet::new(&bed).await;
    let two = kubelet.run(&pod, "two", &app).await;
    assert_eq!(kubelet.exec(&two, "cat /data/two").await, "two");

    kubelet.remove_pod(&pod).await;
    assert!(
        !bed.ctr("--namespace k8s.io snapshots --snapshotter hearth ls")
            .contains(&one)
    );
    kubelet.remove_image(&app).await;
    kubelet.remove_image(&format!("{host}/pause:1")).await;
    bed.wait_for("collection", |bed| bed.records() == 0 && bed.dirs() == 0);
    // And once more: it is claimed again.
    kubelet.pull(&app).await;
    assert_eq!(bed.records(), 3);
    assert_eq!(reads(&registry, "app", &image.layers[0].blob), 0);
    kubelet.remove_image(&app).await;
    bed.wait_for("collection", |bed| bed.records() == 0 && bed.dirs() == 0);
    assert!(node.held.lock().is_empty());
    bed.stop_containerd();
    stop.send(()).unwrap();
    serving.await.unwrap().unwrap();
}

/// Where they are not switched off, labels say what an image never seen before is.
#[tokio::test(flavor = "multi_thread")]
async fn labels_of_the_cri_reach_the_node() {
    let source = tempfile::tempdir().unwrap();
    let image = Image::make(source.path(), "labels");
    let registry = registry(&image);
    let app = format!("127.0.0.1:{}/app:1", registry.port);
    let mut bed = Bed::new(Some(Cri {
        sandbox_image: &app,
        labels: true,
    }));
    let node = Arc::new(Unpacked::default());
    let (stop, serving) = serve_in(&bed, node.clone());
    bed.start_containerd();
    Kubelet::new(&bed).await.pull(&app).await;
    let manifest = fs::read(image.dir.join("index.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let manifest = manifest["manifests"][0]["digest"].as_str().unwrap();
    let blobs: Vec<Digest> = image.layers.iter().map(|layer| layer.blob).collect();
    for (n, hints) in node.hints.lock().iter().enumerate() {
        let expected = Hints {
            namespace: Some("k8s.io".into()),
            image: Some(app.clone()),
            manifest: Some(manifest.parse().unwrap()),
            layer: Some(blobs[n]),
            layers: blobs[n..].to_vec(),
        };
        assert_eq!(*hints, expected);
    }
    assert_eq!(node.hints.lock().len(), 3);
    bed.stop_containerd();
    stop.send(()).unwrap();
    serving.await.unwrap().unwrap();
}
