//! `hearth csi`: a real process on its socket, a real gRPC client, real mounts of what a web server has.

use std::collections::HashMap;

use hearth::r#gen::csi::v1::{
    self as api,
    node_client::NodeClient,
    volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode as Access},
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::Signal,
};
use tokio::runtime::Runtime;
use tonic::{Code, Status, transport::Channel};

use super::*;
use crate::hub::Stub;

mod restarts;

/// The directory of the kubelet: a mount of its own, whose mounts are seen elsewhere.
pub(super) struct Pods(pub(super) PathBuf);

impl Pods {
    pub(super) fn new(dir: PathBuf) -> Self {
        fs::create_dir_all(&dir).unwrap();
        let none = None::<&str>;
        mount(Some(&dir), &dir, none, MsFlags::MS_BIND, none).unwrap();
        let pods = Self(dir);
        let shared = MsFlags::MS_SHARED | MsFlags::MS_REC;
        mount(none, &pods.0, none, shared, none).unwrap();
        pods
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        for info in hearth::mount::mounted().unwrap_or_default() {
            if info.mountpoint.starts_with(&self.0) {
                let _ = umount2(&info.mountpoint, MntFlags::MNT_DETACH);
            }
        }
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A driver under way, and a client of it.
pub(super) struct Csi {
    pub(super) server: Option<Running>,
    pub(super) keeper: Option<Running>,
    /// How it is started.
    pub(super) options: String,
    pub(super) runtime: Runtime,
    pub(super) pods: Pods,
    pub(super) bed: Bed,
}

impl Csi {
    pub(super) fn new() -> Self {
        Self::on(Bed::new(), false)
    }

    fn on(bed: Bed, kept: bool) -> Self {
        let socket = bed.path("csi.sock");
        let options = format!("csi --node-id n --endpoint unix://{}", socket.display());
        Self::by(bed, kept, options)
    }

    /// By the command line `options`, which listens on `csi.sock`.
    pub(super) fn by(bed: Bed, kept: bool, options: String) -> Self {
        let mut csi = Self::client(bed, kept, options);
        csi.start();
        csi
    }

    /// Of a server that something else starts.
    pub(super) fn client(bed: Bed, kept: bool, mut options: String) -> Self {
        let pods = Pods::new(bed.path("pods"));
        let keeper = kept.then(|| {
            let socket = bed.path("keeper.sock");
            let keeper = bed.start(&format!("keeper --socket {}", socket.display()));
            wait_for("keeper", || socket.exists());
            options += &format!(" --keeper {}", socket.display());
            keeper
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        Self {
            server: None,
            keeper,
            options,
            runtime,
            pods,
            bed,
        }
    }

    pub(super) fn start(&mut self) {
        let mut server = self.bed.start(&self.options);
        let begun = Instant::now();
        while self.try_node().is_none() {
            assert!(server.runs(), "{:?}", server.done());
            assert!(begun.elapsed() < HANG, "does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.server = Some(server);
    }

    pub(super) fn stop(&mut self, signal: Signal) {
        let server = self.server.take().unwrap();
        server.signal(signal);
        let done = server.done();
        if signal == Signal::SIGTERM {
            assert_eq!(done.code, Some(0), "{done:?}");
        }
    }

    pub(super) fn pid(&self) -> u32 {
        let server = self.server.as_ref().unwrap();
        server.child.as_ref().unwrap().id()
    }

    fn connect(&self) -> Option<Channel> {
        let address = format!("unix://{}", self.bed.path("csi.sock").display());
        let endpoint = tonic::transport::Endpoint::from_shared(address).unwrap();
        self.runtime.block_on(endpoint.connect()).ok()
    }

    pub(super) fn channel(&self) -> Channel {
        self.connect().unwrap()
    }

    pub(super) fn try_node(&self) -> Option<NodeClient<Channel>> {
        let mut node = NodeClient::new(self.connect()?);
        // It listens before it serves.
        let info = node.node_get_info(api::NodeGetInfoRequest {});
        self.runtime.block_on(info).ok()?;
        Some(node)
    }

    fn node(&self) -> NodeClient<Channel> {
        self.try_node().unwrap()
    }

    pub(super) fn target(&self, volume: &str) -> String {
        let dir = self.pods.0.join(volume);
        fs::create_dir_all(&dir).unwrap();
        dir.join("mount").to_str().unwrap().to_owned()
    }

    /// A request as the kubelet makes it for a volume of a pod.
    pub(super) fn asked(
        &self,
        volume: &str,
        attributes: &[(&str, &str)],
    ) -> api::NodePublishVolumeRequest {
        api::NodePublishVolumeRequest {
            volume_id: volume.into(),
            target_path: self.target(volume),
            volume_capability: Some(api::VolumeCapability {
                access_type: Some(AccessType::Mount(MountVolume::default())),
                access_mode: Some(AccessMode {
                    mode: Access::SingleNodeWriter.into(),
                }),
            }),
            readonly: true,
            volume_context: map(attributes),
            ..Default::default()
        }
    }

    pub(super) fn try_publish(&self, asked: api::NodePublishVolumeRequest) -> Result<(), Status> {
        let mut node = self.node();
        let done = self.runtime.block_on(node.node_publish_volume(asked));
        done.map(drop)
    }

    /// As [`Csi::try_publish`], on a thread of its own.
    pub(super) fn start_publishing(
        &self,
        asked: api::NodePublishVolumeRequest,
    ) -> std::thread::JoinHandle<Result<(), Status>> {
        let (mut node, runtime) = (self.node(), self.runtime.handle().clone());
        std::thread::spawn(move || runtime.block_on(node.node_publish_volume(asked)).map(drop))
    }

    /// Publishes `source` as `volume`; where.
    pub(super) fn publish(&self, volume: &str, source: &str) -> String {
        let asked = self.asked(volume, &[("source", source)]);
        let target = asked.target_path.clone();
        self.try_publish(asked).unwrap();
        target
    }

    pub(super) fn unpublish(&self, volume: &str) {
        let asked = api::NodeUnpublishVolumeRequest {
            volume_id: volume.into(),
            target_path: self.target(volume),
        };
        let mut node = self.node();
        self.runtime
            .block_on(node.node_unpublish_volume(asked))
            .unwrap();
        assert!(!Path::new(&self.target(volume)).exists());
    }

    pub(super) fn stats(&self, volume: &str) -> api::NodeGetVolumeStatsResponse {
        let asked = api::NodeGetVolumeStatsRequest {
            volume_id: volume.into(),
            volume_path: self.target(volume),
            ..Default::default()
        };
        let mut node = self.node();
        let stats = self.runtime.block_on(node.node_get_volume_stats(asked));
        stats.unwrap().into_inner()
    }

    /// Mounts of hearth in this bed.
    pub(super) fn mounts(&self) -> Vec<PathBuf> {
        let mut list = hearth::mount::mounted().unwrap();
        list.retain(|info| info.mountpoint.starts_with(self.bed.dir.path()));
        list.into_iter().map(|info| info.mountpoint).collect()
    }

    /// Nothing is mounted, pinned or recorded.
    pub(super) fn assert_empty(&self) {
        assert_eq!(self.mounts(), Vec::<PathBuf>::new());
        let run = self.bed.store().join("run/csi");
        assert_eq!(files_below(&run), [run.join("lock")]);
        assert_eq!(files_below(&self.bed.store().join("pins")).len(), 0);
        for dir in ["mounts", "published"] {
            let left = fs::read_dir(run.join(dir)).map_or(0, Iterator::count);
            assert_eq!(left, 0, "{dir}");
        }
    }
}

pub(super) fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let pairs = pairs.iter();
    pairs
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect()
}

/// The FUSE connections that are mounted on `target`.
pub(super) fn connections(target: &str) -> Vec<u32> {
    let mut list = hearth::mount::mounted().unwrap();
    list.retain(|info| info.mountpoint == Path::new(target));
    list.into_iter().map(|info| info.connection).collect()
}

/// What a process has of its own, in KiB: its memory, not the code, of which the kernel keeps as much mapped as it likes.
fn own_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let kib = |line: &str| line.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
    let parts = ["RssAnon:", "RssShmem:"].map(|name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        kib(line.unwrap())
    });
    parts.iter().sum()
}

pub(super) fn wait_for(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < HANG, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_model_is_a_volume() {
    let web = Web::slow("8m");
    let model = web.model("m", 8, 2);
    let csi = Csi::new();
    // A container runtime's own view of the kubelet's directory.
    let pods = csi.pods.0.display();
    let script = format!(
        "echo begun; read line; cmp {pods}/v/mount/config.json {}; read line; \
         find {pods}/v/mount; read line",
        web.path("m").join("config.json").display()
    );
    let mut elsewhere = tool(
        "unshare",
        &["-m", "--propagation", "slave", "bash", "-c", &script],
    );
    elsewhere.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut elsewhere = elsewhere.stderr(Stdio::piped()).spawn().unwrap();
    let mut begun = [0; 6];
    std::io::Read::read_exact(elsewhere.stdout.as_mut().unwrap(), &mut begun).unwrap();

    let target = csi.publish("v", &model);
    assert_eq!(csi.publish("v", &model), target, "twice is once");
    assert_eq!(csi.mounts().len(), 2);
    let mut lines = elsewhere.stdin.take().unwrap();
    std::io::Write::write_all(&mut lines, b"\n").unwrap();
    assert_same(&target, &web.path("m"));
    let touch = Done::of(&mut tool("touch", &[&format!("{target}/x")])).failed(1);
    assert!(touch.contains("Read-only file system"), "{touch}");
    let info = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = info.lines().find(|line| line.contains(&target)).unwrap();
    assert!(line.contains("ro,nosuid,nodev"), "{line}");
    let record = &csi.bed.json("list --json")[0];
    assert_eq!(record["pins"].as_array().unwrap().len(), 1, "{record}");
    csi.bed.ok("gc --target-bytes 0");

    wait_for("complete", || {
        let stats = csi.stats("v");
        let condition = stats.volume_condition.unwrap();
        assert!(!condition.abnormal, "{condition:?}");
        stats.usage[0].used == stats.usage[0].total
    });
    assert_eq!(
        csi.stats("v").usage[0].total as u64,
        total_size(&web.path("m"))
    );
    csi.unpublish("v");
    csi.unpublish("v");
    std::io::Write::write_all(&mut lines, b"\n\n").unwrap();
    drop(lines);
    let seen = Done::from("elsewhere".into(), elsewhere.wait_with_output().unwrap());
    assert!(seen.out.is_empty(), "{seen:?}");
    assert!(
        seen.err.contains("No such file") && !seen.err.contains("cmp"),
        "gone there too, and was the same before: {seen:?}"
    );
    csi.assert_empty();
}

/// Another library of gRPC, which names a socket by its path, as it is or percent-encoded.
#[test]
fn clients_name_the_socket_as_they_like() {
    let csi = Csi::new();
    let script = "
import sys, grpc
for authority in (None, sys.argv[1], 'localhost'):
    options = [('grpc.default_authority', authority)] if authority else []
    with grpc.insecure_channel('unix://' + sys.argv[1], options=options) as channel:
        for _ in range(3):  # the later ones refer to the headers of the first
            said = channel.unary_unary('/csi.v1.Identity/GetPluginInfo')(b'', timeout=20)
            assert b'csi.hearth.dev' in said, said
            try: channel.unary_unary('/csi.v1.Node/NodeUnpublishVolume')(b'', timeout=20)
            except grpc.RpcError as e: assert e.code() == grpc.StatusCode.INVALID_ARGUMENT, e
            else: assert False, 'was not refused'
";
    let socket = csi.bed.path("csi.sock");
    Done::of(&mut python(script, &[socket.to_str().unwrap()])).ok();
}

#[test]
fn lazy_volumes_do_not_wait_and_complete_ones_do() {
    let mut web = Web::new();
    let origin = web.gate();
    origin.hold_after(0);
    let model = web.model("m", 4, 1);
    let csi = Csi::new();
    let target = csi.publish("lazy", &model);
    let stats = csi.stats("lazy");
    assert!(stats.usage[0].used < stats.usage[0].total, "{stats:?}");
    let listed = tool("ls", &[&target]).output().unwrap();
    assert_eq!(listed.stdout.split(|&b| b == b'\n').count(), 5);

    origin.release();
    let asked = csi.asked("whole", &[("source", &model), ("mode", "complete")]);
    let whole = asked.target_path.clone();
    csi.try_publish(asked).unwrap();
    let stats = csi.stats("whole");
    assert_eq!(stats.usage[0].used, stats.usage[0].total);
    drop(web.server);
    assert_same(&whole, &web.root.path().join("m"));
    csi.unpublish("lazy");
    assert_same(&whole, &web.root.path().join("m"));
    csi.unpublish("whole");
    csi.assert_empty();
}

#[test]
fn strict_volumes_are_mounts_of_their_own() {
    let web = Web::slow("4m");
    let model = web.model("m", 4, 2);
    let csi = Csi::new();
    let plain = csi.publish("plain", &model);
    let asked = csi.asked("strict", &[("source", &model), ("verify", "strict")]);
    let strict = asked.target_path.clone();
    csi.try_publish(asked).unwrap();
    assert_ne!(connections(&plain), connections(&strict));
    assert_same(&strict, &web.path("m"));
    assert_same(&plain, &web.path("m"));
    csi.unpublish("plain");
    assert_same(&strict, &web.path("m"));
    csi.unpublish("strict");
    csi.assert_empty();
}

#[test]
fn an_origin_that_is_down_shows() {
    let mut web = Web::new();
    let origin = web.gate();
    // However late it goes, not all is here.
    origin.hold_after(1 << 20);
    let model = web.model("m", 8, 1);
    let csi = Csi::new();
    csi.publish("v", &model);
    origin.set_down(true);
    origin.release();
    wait_for("abnormal", || {
        let condition = csi.stats("v").volume_condition.unwrap();
        condition.abnormal && !condition.message.is_empty()
    });
    csi.unpublish("v");
    let down = csi.try_publish(csi.asked("w", &[("source", "http://127.0.0.1:1/x/")]));
    assert_eq!(down.unwrap_err().code(), Code::Unavailable);
    csi.assert_empty();
}

#[test]
fn a_baked_model_is_a_volume_without_its_origin() {
    let (web, baker) = (Web::new(), Bed::new());
    let model = web.model("m", 3, 2);
    let tier = baker.path("tier");
    baker.ok(&format!("bake {model} --output {}", tier.display()));
    let origin = baker.path("origin");
    let files = web.path("m");
    Done::of(&mut tool(
        "cp",
        &["-r", files.to_str().unwrap(), origin.to_str().unwrap()],
    ))
    .ok();
    drop(web);
    let bed = Bed::new();
    let config = bed.path("config.toml");
    fs::write(
        &config,
        format!("[[tier]]\npath = \"{}\"\n", tier.display()),
    )
    .unwrap();
    let mut csi = Csi::on(bed, false);
    csi.stop(Signal::SIGTERM);
    csi.options = format!("--config {} {}", config.display(), csi.options);
    csi.start();
    let dir = csi.publish("volume", &model);
    assert_same(&dir, &origin);
    assert!(csi.bed.objects().is_empty());
    csi.unpublish("volume");
    csi.assert_empty();
}

#[test]
fn a_hundred_volumes_are_one_download_and_one_mount() {
    let web = Web::slow("8m");
    let model = web.model("m", 8, 1);
    let csi = Csi::new();
    let node = csi.node();
    let names: Vec<_> = (0..100).map(|n| format!("v{n}")).collect();
    let calls: Vec<_> = names
        .iter()
        .map(|name| {
            let (mut node, asked) = (node.clone(), csi.asked(name, &[("source", &model)]));
            csi.runtime
                .spawn(async move { node.node_publish_volume(asked).await })
        })
        .collect();
    for call in calls {
        csi.runtime.block_on(call).unwrap().unwrap();
    }
    let mut list = hearth::mount::mounted().unwrap();
    list.retain(|info| info.mountpoint.starts_with(csi.bed.dir.path()));
    assert_eq!(list.len(), 101);
    assert!(list.iter().all(|m| m.connection == list[0].connection));
    for name in ["v0", "v50", "v99"] {
        assert_same(&csi.target(name), &web.path("m"));
    }
    assert_eq!(web.sent(), total_size(&web.path("m")));
    let record = &csi.bed.json("list --json")[0];
    assert_eq!(record["pins"].as_array().unwrap().len(), 100);
    let calls: Vec<_> = names
        .iter()
        .map(|name| {
            let mut node = node.clone();
            let asked = api::NodeUnpublishVolumeRequest {
                volume_id: name.clone(),
                target_path: csi.target(name),
            };
            csi.runtime
                .spawn(async move { node.node_unpublish_volume(asked).await })
        })
        .collect();
    for call in calls {
        csi.runtime.block_on(call).unwrap().unwrap();
    }
    csi.assert_empty();
}

#[test]
fn a_thousand_cycles_leak_nothing() {
    let web = Web::new();
    let one = web.model("one", 1, 1);
    write_model(&web.path("two"), 1, 1, 50);
    let two = web.url("two");
    let csi = Csi::new();
    let cycle = |n: usize| {
        let source = if n.is_multiple_of(2) { &one } else { &two };
        let target = csi.publish("v", source);
        if n.is_multiple_of(9) {
            let file = tool("cat", &[&format!("{target}/config.json")]).output();
            assert!(!file.unwrap().stdout.is_empty());
        }
        csi.unpublish("v");
    };
    let proc = PathBuf::from(format!("/proc/{}", csi.pid()));
    let count = |what: &str| fs::read_dir(proc.join(what)).unwrap().count();
    (0..200).for_each(cycle);
    let (fds, threads, kibibytes) = (count("fd"), count("task"), own_memory(csi.pid()));
    (0..800).for_each(cycle);
    // What is kept for a moment, such as connections, may differ by a few.
    wait_for("fds", || count("fd") <= fds + 8);
    wait_for("threads", || count("task") <= threads + 8);
    // As buffers, which go when nothing was fetched for a while.
    let before = format!("memory: {kibibytes} KiB before");
    wait_for(&before, || own_memory(csi.pid()) <= kibibytes + (8 << 10));
    // Each connection of FUSE is one of these.
    let is_fuse = |fd: std::io::Result<fs::DirEntry>| {
        let to = fs::read_link(fd.unwrap().path()).unwrap_or_default();
        to == Path::new("/dev/fuse")
    };
    wait_for("connections", || {
        let mut fds = fs::read_dir(proc.join("fd")).unwrap();
        !fds.any(is_fuse)
    });
    csi.assert_empty();
}

#[test]
fn secrets_open_what_is_closed_and_stay_secret() {
    let stub = Stub::start(100);
    stub.write("model.safetensors", &bytes(5, 300_000));
    stub.write("config.json", b"{}");
    stub.control("POST", "commit", "");
    stub.set(&serde_json::json!({"token": "hf_geheim", "private": ["models/org/my-model"]}));
    let bed = Bed::new();
    let config = bed.path("config.toml");
    let text = format!("[source]\nhub_endpoint = \"{}\"\n", stub.server.url());
    fs::write(&config, text).unwrap();
    let mut csi = Csi::on(bed, false);
    csi.stop(Signal::SIGTERM);
    csi.options = format!("--config {} -v {}", config.display(), csi.options);
    csi.start();

    let mut asked = csi.asked("v", &[("source", "hf://org/my-model"), ("layout", "hub")]);
    let closed = csi.try_publish(asked.clone()).unwrap_err();
    assert_eq!(closed.code(), Code::Unauthenticated, "{closed:?}");
    asked.secrets = map(&[("token", "hf_falsch")]);
    let wrong = csi.try_publish(asked.clone()).unwrap_err();
    assert!(!wrong.message().contains("hf_"), "{wrong:?}");
    csi.assert_empty();
    asked.secrets = map(&[("token", "hf_geheim")]);
    csi.try_publish(asked.clone()).unwrap();
    let find = format!(
        "cat {}/models--org--my-model/snapshots/*/*",
        asked.target_path
    );
    let read = tool("bash", &["-c", &find]).output().unwrap();
    assert!(read.status.success(), "{read:?}");
    assert_eq!(read.stdout.len(), 300_002);

    // Another pod without it does not get in because this one is.
    let other = csi.asked(
        "other",
        &[("source", "hf://org/my-model"), ("layout", "hub")],
    );
    let closed = csi.try_publish(other).unwrap_err();
    assert_eq!(closed.code(), Code::Unauthenticated, "{closed:?}");
    let store = files_below(&csi.bed.store());
    for file in store
        .iter()
        .filter(|f| f.metadata().unwrap().len() < 1 << 20)
    {
        let bytes = fs::read(file).unwrap();
        let leaks = bytes
            .windows(9)
            .any(|w| w == b"hf_geheim" || w == b"hf_falsch");
        assert!(!leaks, "{}", file.display());
    }
    csi.unpublish("v");
    csi.assert_empty();
    let server = csi.server.take().unwrap();
    server.signal(Signal::SIGTERM);
    let done = server.done();
    assert!(!done.err.contains("hf_geheim") && !done.err.contains("hf_falsch"));
}

/// A web server that wants a password.
pub(super) fn closed() -> (TempDir, Web) {
    let passwords = tempfile::tempdir().unwrap();
    let file = passwords.path().join("passwords");
    fs::write(&file, "user:{PLAIN}geheim\n").unwrap();
    let web = Web::with(&format!(
        "auth_basic closed; auth_basic_user_file {};",
        file.display()
    ));
    (passwords, web)
}

pub(super) fn password() -> HashMap<String, String> {
    map(&[("username", "user"), ("password", "geheim")])
}

/// Without a keeper nobody remembers the keys of a volume: who reads waits until the kubelet says them again.
#[test]
fn who_reads_waits_for_keys_that_are_lost() {
    let (_passwords, mut web) = closed();
    let origin = web.gate();
    origin.hold_after(0);
    let model = web.model("m", 8, 1);
    let mut csi = Csi::new();
    let mut asked = csi.asked("v", &[("source", &model)]);
    asked.secrets = password();
    csi.try_publish(asked.clone()).unwrap();
    let target = asked.target_path.clone();
    csi.stop(Signal::SIGKILL);
    origin.release();
    let dead = connections(&target);
    csi.start();
    wait_for("mounted again", || {
        let now = connections(&target);
        !now.is_empty() && now != dead
    });
    let truth = web.path("m").display().to_string();
    let mut reader = tool("diff", &["-r", &target, &truth]);
    let mut reader = reader.stdout(Stdio::piped()).spawn().unwrap();
    // Time enough to be told that it is denied.
    std::thread::sleep(Duration::from_secs(2));
    assert!(reader.try_wait().unwrap().is_none());
    csi.try_publish(asked).unwrap();
    let read = Done::from("reader".into(), reader.wait_with_output().unwrap());
    assert_eq!(read.ok(), "");
    csi.unpublish("v");
    csi.assert_empty();
}

/// Who needs no keys is kept waiting by nobody else's that are lost.
#[test]
fn who_needs_no_keys_waits_for_nobodys() {
    let mut web = Web::new();
    let origin = web.gate();
    origin.hold_after(0);
    let model = web.model("m", 8, 1);
    let mut csi = Csi::new();
    let mut asked = csi.asked("v", &[("source", &model)]);
    asked.secrets = password();
    csi.try_publish(asked.clone()).unwrap();
    csi.stop(Signal::SIGKILL);
    origin.release();
    let dead = connections(&asked.target_path);
    csi.start();
    wait_for("mounted again", || {
        let now = connections(&asked.target_path);
        !now.is_empty() && now != dead
    });
    let target = csi.publish("w", &model);
    assert_same(&target, &web.path("m"));
    assert_same(&asked.target_path, &web.path("m"));
    csi.unpublish("w");
    csi.unpublish("v");
    csi.assert_empty();
}

#[test]
fn passwords_open_web_servers() {
    let (_passwords, web) = closed();
    let model = web.model("m", 1, 1);
    let csi = Csi::new();
    let mut asked = csi.asked("v", &[("source", &model), ("mode", "complete")]);
    let closed = csi.try_publish(asked.clone()).unwrap_err();
    assert_eq!(closed.code(), Code::Unauthenticated, "{closed:?}");
    asked.secrets = password();
    csi.try_publish(asked.clone()).unwrap();
    assert_same(&asked.target_path, &web.path("m"));

    // That it is here is nothing to other namespaces, before the origin has said yes to them.
    let namespace = "csi.storage.k8s.io/pod.namespace";
    let mut other = csi.asked("w", &[("source", &model), (namespace, "theirs")]);
    let closed = csi.try_publish(other.clone()).unwrap_err();
    assert_eq!(closed.code(), Code::Unauthenticated, "{closed:?}");
    other.secrets = map(&[("username", "user"), ("password", "falsch")]);
    let wrong = csi.try_publish(other.clone()).unwrap_err();
    assert_eq!(wrong.code(), Code::Unauthenticated, "{wrong:?}");
    other.secrets = password();
    csi.try_publish(other.clone()).unwrap();
    assert_same(&other.target_path, &web.path("m"));
    csi.unpublish("w");
    csi.unpublish("v");
    csi.assert_empty();
}
