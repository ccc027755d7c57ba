//! The CSI driver as the kubelet and the sidecars see it: gRPC over its socket, with models and mounts made up.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use hearth::{
    csi::{
        Config, CsiError, Driver, Flags, Listener, Model, ModelError, ModelErrorKind, Models,
        Settings, Status, Targets, User, Want, serve,
    },
    digest::Digest,
    disk::{Disk, RealDisk},
    r#gen::csi::v1::{
        self as api,
        controller_client::ControllerClient,
        identity_client::IdentityClient,
        node_client::NodeClient,
        volume_capability::{
            AccessMode, AccessType, BlockVolume, MountVolume, access_mode::Mode as Access,
        },
    },
};
use tempfile::TempDir;
use tonic::{Code, transport::Channel};

mod crash;
mod fields;
mod volumes;

/// Models without content.
#[derive(Default)]
struct Made {
    state: Mutex<MadeState>,
    /// Holds `open` back while it is taken.
    gate: tokio::sync::RwLock<()>,
    /// Holds the next `open` back until it is told, and no other.
    hold: Mutex<Option<Arc<tokio::sync::Notify>>>,
    complete: tokio::sync::Notify,
}

#[derive(Default)]
struct MadeState {
    /// Users by model.
    users: BTreeMap<String, BTreeSet<String>>,
    /// (reference, owner)
    pins: BTreeSet<(String, String)>,
    /// What `open` fails with.
    fails: Option<ModelErrorKind>,
    /// How often it did.
    failed: u32,
    /// What `complete` says.
    complete: Option<Result<(), ModelErrorKind>>,
    trouble: Option<String>,
    /// Goes up: what references mean from now on.
    generation: u64,
    /// Generations that cannot be had any more.
    gone: BTreeSet<Digest>,
    opened: Vec<String>,
    /// The token that `open` saw last.
    token: Option<String>,
    swept: Option<(BTreeSet<String>, BTreeSet<String>)>,
}

impl Made {
    fn state(&self) -> std::sync::MutexGuard<'_, MadeState> {
        self.state.lock().unwrap()
    }

    fn model(id: &str, reference: String, generation: Digest) -> Model {
        Model {
            id: id.to_owned(),
            reference,
            generation,
            dir: PathBuf::from("/nowhere"),
            connection: 7,
        }
    }
}

#[async_trait::async_trait]
impl Models for Made {
    fn ready(&self) -> Result<(), ModelError> {
        match self.state().fails {
            Some(kind) => Err(ModelError::new(kind, "made to fail")),
            None => Ok(()),
        }
    }

    async fn open(
        &self,
        want: &Want,
        generation: Option<Digest>,
        user: &User,
    ) -> Result<Model, ModelError> {
        let _gate = self.gate.read().await;
        let hold = self.hold.lock().unwrap().take();
        if let Some(hold) = hold {
            hold.notified().await;
        }
        let mut state = self.state();
        if let Some(kind) = state.fails {
            state.failed += 1;
            return Err(ModelError::new(kind, "made to fail"));
        }
        let now = Digest::of(format!("{} {}", want.reference, state.generation).as_bytes());
        let generation = generation.unwrap_or(now);
        if state.gone.contains(&generation) {
            return Err(ModelError::new(ModelErrorKind::Gone, "collected"));
        }
        let id = format!("{}-{}", generation.hex(), want.layout);
        state.token = want
            .keys
            .as_ref()
            .and_then(|keys| Some(keys.hub_token.as_ref()?.expose().to_owned()));
        let reference = want.reference.to_string();
        state.pins.insert((reference.clone(), user.owner.clone()));
        let users = state.users.entry(id.clone()).or_default();
        users.insert(user.id.clone());
        state.opened.push(id.clone());
        Ok(Self::model(&id, reference, generation))
    }

    async fn complete(&self, _: &str) -> Result<(), ModelError> {
        loop {
            let told = self.complete.notified();
            if let Some(done) = self.state().complete {
                return done.map_err(|kind| ModelError::new(kind, "made to fail"));
            }
            told.await;
        }
    }

    async fn close(&self, model: &str, user: &str) {
        let mut state = self.state();
        let users = state.users.get_mut(model).unwrap();
        users.remove(user);
        if users.is_empty() {
            state.users.remove(model);
        }
    }

    async fn unpin(&self, reference: &str, owner: &str) {
        let pin = (reference.to_owned(), owner.to_owned());
        assert!(self.state().pins.remove(&pin), "{pin:?}");
    }

    async fn status(&self, model: &str) -> Option<(Model, Status)> {
        let state = self.state();
        state.users.get(model)?;
        let status = Status {
            bytes: 1000,
            present: 10,
            inodes: 3,
            trouble: state.trouble.clone(),
        };
        let generation = Digest::of(b"");
        Some((Self::model(model, String::new(), generation), status))
    }

    async fn sweep(&self, owners: &BTreeSet<String>, models: &BTreeSet<String>) {
        self.state().swept = Some((owners.clone(), models.clone()));
    }
}

/// Mounts that are only remembered.
#[derive(Default)]
struct Marks {
    mounted: Mutex<BTreeMap<PathBuf, (String, Flags)>>,
    fails: Mutex<bool>,
}

impl Marks {
    fn get(&self) -> BTreeMap<PathBuf, (String, Flags)> {
        self.mounted.lock().unwrap().clone()
    }
}

impl Targets for Marks {
    fn check(&self, target: &Path) -> Result<(), CsiError> {
        // What the real one says of directories needs no mounts.
        hearth::csi::Binds.check(target)
    }

    fn attach(&self, model: &Model, target: &Path, flags: Flags) -> Result<(), CsiError> {
        if *self.fails.lock().unwrap() {
            let kind = hearth::csi::CsiErrorKind::Internal;
            return Err(CsiError::new(kind, "made to fail"));
        }
        let mark = (model.id.clone(), flags);
        self.mounted.lock().unwrap().insert(target.to_owned(), mark);
        Ok(())
    }

    fn is_attached(&self, model: &Model, target: &Path) -> bool {
        self.get()
            .get(target)
            .is_some_and(|(id, _)| *id == model.id)
    }

    fn is_mounted(&self, target: &Path) -> bool {
        self.get().contains_key(target)
    }

    fn is_gone(&self, target: &Path) -> bool {
        hearth::csi::Binds.is_gone(target)
    }

    fn detach(&self, target: &Path, _: bool) -> Result<(), CsiError> {
        self.mounted.lock().unwrap().remove(target);
        Ok(())
    }
}

/// A driver that is served, and clients of it.
struct Bed {
    dir: TempDir,
    models: Arc<Made>,
    marks: Arc<Marks>,
    config: Config,
    disk: Arc<dyn Disk>,
    served: Option<Served>,
}

struct Served {
    channel: Channel,
    stop: tokio::sync::oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

impl Bed {
    async fn new() -> Self {
        Self::with(Config::default()).await
    }

    async fn with(config: Config) -> Self {
        let mut bed = Self::on(Arc::new(RealDisk));
        bed.config = config;
        bed.start().await;
        bed
    }

    /// One that is not started yet.
    fn on(disk: Arc<dyn Disk>) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            models: Arc::default(),
            marks: Arc::default(),
            config: Config::default(),
            disk,
            served: None,
        }
    }

    fn settings(&self) -> Settings {
        Settings {
            store: self.dir.path().join("store"),
            node_id: "node-1".into(),
            config: self.config.clone(),
        }
    }

    async fn start(&mut self) {
        let (disk, models, marks) = (self.disk.clone(), self.models.clone(), self.marks.clone());
        let driver = Driver::open_on(disk, self.settings(), models, marks);
        let driver = driver.await.unwrap();
        let path = self.dir.path().join("csi.sock");
        let address = format!("unix://{}", path.display());
        let listener = Listener::bind(Path::new(&address)).unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(async move {
            let stop = async { drop(stopped.await) };
            serve(driver, listener, stop).await.unwrap();
        });
        let endpoint = tonic::transport::Endpoint::from_shared(address).unwrap();
        let channel = endpoint.connect().await.unwrap();
        self.served = Some(Served {
            channel,
            stop,
            task,
        });
    }

    async fn restart(&mut self) {
        let Served { stop, task, .. } = self.served.take().unwrap();
        stop.send(()).unwrap();
        task.await.unwrap();
        self.start().await;
    }

    fn channel(&self) -> Channel {
        self.served.as_ref().unwrap().channel.clone()
    }

    fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel())
    }

    fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel())
    }

    fn target(&self, name: &str) -> String {
        let pods = self.dir.path().join("pods");
        std::fs::create_dir_all(&pods).unwrap();
        pods.join(name).to_str().unwrap().to_owned()
    }

    /// A request as the kubelet makes it for a volume of a pod.
    fn publish(&self, volume: &str, name: &str) -> api::NodePublishVolumeRequest {
        let context = [
            ("source", "hf://org/model"),
            ("csi.storage.k8s.io/pod.name", "pod"),
            ("csi.storage.k8s.io/ephemeral", "true"),
        ];
        api::NodePublishVolumeRequest {
            volume_id: volume.into(),
            target_path: self.target(name),
            volume_capability: Some(capability(Access::SingleNodeWriter)),
            readonly: true,
            volume_context: map(&context),
            ..Default::default()
        }
    }

    async fn published(&self, asked: api::NodePublishVolumeRequest) -> Result<(), (Code, String)> {
        let done = self.node().node_publish_volume(asked).await;
        done.map(drop).map_err(said)
    }

    async fn unpublished(&self, volume: &str, target: &str) -> Result<(), (Code, String)> {
        let asked = api::NodeUnpublishVolumeRequest {
            volume_id: volume.into(),
            target_path: target.into(),
        };
        let done = self.node().node_unpublish_volume(asked).await;
        done.map(drop).map_err(said)
    }

    async fn stats(
        &self,
        volume: &str,
        path: &str,
    ) -> Result<api::NodeGetVolumeStatsResponse, (Code, String)> {
        let asked = api::NodeGetVolumeStatsRequest {
            volume_id: volume.into(),
            volume_path: path.into(),
            ..Default::default()
        };
        let done = self.node().node_get_volume_stats(asked).await;
        done.map(tonic::Response::into_inner).map_err(said)
    }

    /// Nothing is mounted, used, pinned or recorded.
    fn assert_empty(&self) {
        assert_eq!(self.marks.get(), BTreeMap::new());
        let state = self.models.state();
        assert!(state.users.is_empty(), "{:?}", state.users);
        assert!(state.pins.is_empty(), "{:?}", state.pins);
        let records = std::fs::read_dir(self.records()).unwrap();
        assert_eq!(records.count(), 0);
    }

    fn records(&self) -> PathBuf {
        self.dir.path().join("store/run/csi/published")
    }

    /// The record of a volume that is published at a target.
    fn record_of(&self, volume: &str, target: &str) -> PathBuf {
        let id = Digest::of(format!("{volume}\0{}", self.target(target)).as_bytes());
        self.records().join(format!("{}.json", &id.hex()[..32]))
    }

    async fn wait_for(&self, is_so: impl Fn(&Self) -> bool) {
        for _ in 0..1000 {
            if is_so(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it does not come to that");
    }
}

fn said(status: tonic::Status) -> (Code, String) {
    assert!(status.details().is_empty(), "{status:?}");
    (status.code(), status.message().to_owned())
}

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let pairs = pairs.iter();
    pairs
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect()
}

fn capability(mode: Access) -> api::VolumeCapability {
    api::VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume::default())),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

#[tokio::test]
async fn it_says_what_it_is() {
    let bed = Bed::new().await;
    let mut identity = IdentityClient::new(bed.channel());
    let info = identity.get_plugin_info(api::GetPluginInfoRequest {}).await;
    let info = info.unwrap().into_inner();
    assert_eq!(info.name, "csi.hearth.dev");
    assert!(!info.vendor_version.is_empty());
    let can = identity
        .get_plugin_capabilities(api::GetPluginCapabilitiesRequest {})
        .await;
    assert_eq!(can.unwrap().into_inner().capabilities.len(), 1);
    let ready = identity.probe(api::ProbeRequest {}).await.unwrap();
    assert_eq!(ready.into_inner().ready, Some(true));
    bed.models.state().fails = Some(ModelErrorKind::Failed);
    let not_ready = identity.probe(api::ProbeRequest {}).await.unwrap_err();
    assert_eq!(not_ready.code(), Code::FailedPrecondition);

    let mut node = bed.node();
    let info = node
        .node_get_info(api::NodeGetInfoRequest {})
        .await
        .unwrap();
    assert_eq!(info.into_inner().node_id, "node-1");
    let can = node
        .node_get_capabilities(api::NodeGetCapabilitiesRequest {})
        .await;
    assert_eq!(can.unwrap().into_inner().capabilities.len(), 2);
    let can = bed
        .controller()
        .controller_get_capabilities(api::ControllerGetCapabilitiesRequest {})
        .await;
    assert_eq!(can.unwrap().into_inner().capabilities.len(), 1);
}
