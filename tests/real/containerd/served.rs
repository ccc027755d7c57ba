//! Images that hearth serves: warmed before, or never seen and indexed; and through the mirror.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use super::{
    bed::{Bed, Cri},
    image::{Image, run},
    kubelet::{Kubelet, reads, registry},
    large::{assert_same, walk},
};
use crate::servers::Server;

/// `hearth` with the store of a bed.
pub(super) fn hearth(store: &Path, line: &str) -> Command {
    let mut command = Command::new("timeout");
    command
        .args(["-k", "5", "150", env!("CARGO_BIN_EXE_hearth"), "--store"])
        .arg(store)
        .args(line.split(' '))
        .env_remove("HEARTH_CONFIG")
        .stdin(Stdio::null());
    command
}

/// Reads of all layers of the image, as app and as pause.
pub(super) fn all_reads(registry: &Server, image: &Image) -> usize {
    let layers = image.layers.iter();
    layers
        .map(|l| reads(registry, "app", &l.blob) + reads(registry, "pause", &l.blob))
        .sum()
}

/// What is mounted below `dir`: (mount point, type).
pub(super) fn mounts(dir: &Path) -> Vec<(String, String)> {
    let text = fs::read_to_string("/proc/self/mounts").unwrap();
    let fields = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields
        .filter(|f| Path::new(f[1]).starts_with(dir))
        .map(|f| (f[1].to_owned(), f[2].to_owned()))
        .collect()
}

/// Those of them that a process serves. Once all of an image is here, there is a native root beside it.
fn served_mounts(dir: &Path) -> Vec<(String, String)> {
    let mut found = mounts(dir);
    found.retain(|(_, kind)| kind.starts_with("fuse"));
    found
}

pub(super) const LOOK: &str =
    "ls /data /opaque; cat /data/salt /data/two-too; stat -c %a /data/mode";
pub(super) const SEEN: &str = "/data:\nmode\none\nsalt\ntwo\ntwo-too\n\n/opaque:\nabove\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_warmed_image_runs_without_its_registry_and_without_fuse() {
    let source = tempfile::tempdir().unwrap();
    let image = Image::make(source.path(), "warmed");
    let registry = registry(&image);
    let host = format!("127.0.0.1:{}", registry.port);
    let (app, pause) = (format!("{host}/app:1"), format!("{host}/pause:1"));
    let mut bed = Bed::new(Some(Cri {
        sandbox_image: &pause,
        labels: false,
    }));
    let store = bed.path("store");
    let warmed = run(&mut hearth(
        &store,
        &format!("warm oci://{app} oci://{pause}"),
    ));
    assert!(String::from_utf8_lossy(&warmed).contains("warm: oci://"));
    let before = all_reads(&registry, &image);
    bed.start_snapshotter();
    bed.start_containerd();
    let mut kubelet = Kubelet::new(&bed).await;
    kubelet.pull(&app).await;
    let pod = kubelet.run_pod().await;
    let one = kubelet.run(&pod, "one", &app).await;
    assert_eq!(all_reads(&registry, &image), before, "{}", registry.log());
    let seen = kubelet.exec(&one, LOOK).await;
    assert_eq!(seen, format!("{SEEN}warmedtwo4711\n"));
    let found = mounts(&store.join("run"));
    assert!(!found.is_empty());
    assert!(found.iter().all(|(_, kind)| kind == "erofs"), "{found:?}");
    kubelet
        .exec(&one, "echo more >> /data/two; rm /data/one")
        .await;

    // What containerd was told is not evicted, nor what is mounted.
    let listed = run(&mut hearth(&store, "list --json"));
    let listed: serde_json::Value = serde_json::from_slice(&listed).unwrap();
    assert!(listed.as_array().unwrap().iter().any(|a| {
        let pins = a["pins"].as_array().unwrap();
        pins.iter()
            .any(|pin| pin.as_str().unwrap().starts_with("containerd-"))
    }));
    run(&mut hearth(&store, "gc --target-bytes 0"));
    bed.kill_snapshotter();
    assert_eq!(kubelet.exec(&one, "cat /data/salt").await, "warmed");
    bed.start_snapshotter();
    bed.wait_connected();
    let two = kubelet.run(&pod, "two", &app).await;
    let seen = kubelet.exec(&two, LOOK).await;
    assert_eq!(seen, format!("{SEEN}warmedtwo4711\n"));
    assert_eq!(all_reads(&registry, &image), before);

    // Somebody unmounts the root: who runs on it goes on, and the next one has one again.
    unmount_below(&store.join("run"));
    assert_eq!(kubelet.exec(&two, "cat /data/salt").await, "warmed");
    let three = kubelet.run(&pod, "three", &app).await;
    let seen = kubelet.exec(&three, LOOK).await;
    assert_eq!(seen, format!("{SEEN}warmedtwo4711\n"));

    // What is claimed is said to take what it does where containerd unpacks it.
    bed.ctr(&format!(
        "--namespace plain images pull --plain-http --snapshotter overlayfs {app}"
    ));
    for chain in image.chain_ids() {
        let ours = bed.usage("k8s.io", "hearth", &chain.to_string());
        let theirs = bed.usage("plain", "overlayfs", &chain.to_string());
        assert_eq!(ours, theirs);
    }
    kubelet.remove_pod(&pod).await;
    kubelet.remove_image(&app).await;
    kubelet.remove_image(&pause).await;
    bed.wait_for("collection", |bed| bed.records() == 0 && bed.dirs() == 0);
    bed.wait_for("unmounting", |_| mounts(&store.join("run")).is_empty());
    run(&mut hearth(&store, "verify --all"));
    run(&mut hearth(&store, "gc --target-bytes 0"));
    let listed = run(&mut hearth(&store, "list --json"));
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(&listed).unwrap(),
        serde_json::json!([])
    );

    // Killed with the last snapshot gone, and what belongs to it not: the next process sees to that.
    run(&mut hearth(
        &store,
        &format!("warm oci://{app} oci://{pause}"),
    ));
    kubelet.pull(&app).await;
    let pod = kubelet.run_pod().await;
    kubelet.run(&pod, "four", &app).await;
    assert!(!mounts(&store.join("run")).is_empty());
    bed.kill_snapshotter();
    for record in fs::read_dir(bed.path("hearth/m")).unwrap() {
        fs::remove_file(record.unwrap().path()).unwrap();
    }
    bed.start_snapshotter();
    assert_eq!(mounts(&store.join("run")), []);
    let listed = run(&mut hearth(&store, "list --json"));
    let listed: serde_json::Value = serde_json::from_slice(&listed).unwrap();
    for image in listed.as_array().unwrap() {
        assert_eq!(image["pins"], serde_json::json!([]));
    }
}

/// Detaches whatever is mounted below `dir`.
fn unmount_below(dir: &Path) {
    let found = mounts(dir);
    assert!(!found.is_empty());
    for (dir, _) in found {
        run(Command::new("umount").args(["-l", &dir]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_never_seen_runs_before_it_is_pulled() {
    let source = tempfile::tempdir().unwrap();
    let image = Image::make(source.path(), "indexed");
    let registry = registry(&image);
    let host = format!("127.0.0.1:{}", registry.port);
    let app = format!("{host}/app:1");
    // Some other node has made the index.
    let other = source.path().join("other");
    let pushed = run(&mut hearth(
        &other,
        &format!("index push oci://{app} --json"),
    ));
    let pushed: serde_json::Value = serde_json::from_slice(&pushed).unwrap();
    assert_eq!(pushed["layers"], 3);
    let before = all_reads(&registry, &image);
    let mut bed = Bed::new(Some(Cri {
        sandbox_image: &app,
        labels: true,
    }));
    let store = bed.path("store");
    bed.start_snapshotter();
    bed.start_containerd();
    let mut kubelet = Kubelet::new(&bed).await;
    kubelet.pull(&app).await;
    assert_eq!(
        all_reads(&registry, &image),
        before,
        "nothing is read by a pull"
    );
    let pod = kubelet.run_pod().await;
    let one = kubelet.run(&pod, "one", &app).await;
    let seen = kubelet.exec(&one, LOOK).await;
    assert_eq!(seen, format!("{SEEN}indexedtwo4711\n"));
    let found = mounts(&store.join("run"));
    assert!(
        found.iter().any(|(_, kind)| kind.starts_with("fuse")),
        "{found:?}"
    );
    // A view of it, as image volumes are, looks as overlayfs's does.
    bed.ctr(&format!(
        "--namespace plain images pull --plain-http --snapshotter overlayfs {app}"
    ));
    let chain = image.chain_ids().pop().unwrap();
    let theirs = walk(&bed, "plain", "overlayfs", &chain);
    assert_same(&walk(&bed, "k8s.io", "hearth", &chain), &theirs);
    // What containerd has and has not unpacked it unpacks by way of us.
    let salt = format!("run --rm --snapshotter hearth {app} fetched /bin/cat /data/salt");
    assert_eq!(bed.ctr(&format!("--namespace plain {salt}")), "indexed");
    bed.ctr(&format!("--namespace plain images rm --sync {app}"));
    // Once all is here, the next container has no FUSE below it.
    let complete = |_: &Bed| {
        let listed = run(&mut hearth(&store, "list --json"));
        let listed: serde_json::Value = serde_json::from_slice(&listed).unwrap();
        listed[0]["complete"] == true
    };
    bed.wait_for("the whole image", complete);
    let two = kubelet.run(&pod, "two", &app).await;
    let seen = kubelet.exec(&two, LOOK).await;
    assert_eq!(seen, format!("{SEEN}indexedtwo4711\n"));
    let found = mounts(&store.join("run"));
    assert!(found.iter().any(|(_, kind)| kind == "erofs"), "{found:?}");
    kubelet.remove_pod(&pod).await;
    kubelet.remove_image(&app).await;
    bed.wait_for("collection", |bed| bed.records() == 0 && bed.dirs() == 0);
}

/// With a keeper a container on an image that is still arriving sees nothing of a snapshotter that is
/// killed, but a pause.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_on_an_arriving_image_outlives_the_snapshotter() {
    outlives(false).await;
}

/// Nor does it of an agent from which another takes over; nor does containerd.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_on_an_arriving_image_outlives_an_upgrade() {
    outlives(true).await;
}

/// A keeper, and where it listens.
fn keeper(bed: &Bed) -> (Child, PathBuf) {
    let socket = bed.path("keeper.sock");
    let keeper = Command::new(env!("CARGO_BIN_EXE_hearth"))
        .arg("--store")
        .arg(bed.path("store"))
        .args(["keeper", "--socket"])
        .arg(&socket)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    bed.wait_for("the keeper", |_| socket.exists());
    (keeper, socket)
}

/// Nor does it where the node knows only the lower layers of its image, from another that stands on the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_on_layers_of_another_image_outlives_the_snapshotter() {
    let source = tempfile::tempdir().unwrap();
    let known = Image::make(&source.path().join("known"), "known");
    let other = known.make_beside(&source.path().join("other"), "other");
    let (known_at, other_at) = (registry(&known), registry(&other));
    let name = |registry: &Server, what: &str| format!("127.0.0.1:{}/{what}:1", registry.port);
    let (app, pause) = (name(&known_at, "app"), name(&known_at, "pause"));
    let mut bed = Bed::new(Some(Cri {
        sandbox_image: &pause,
        labels: false,
    }));
    let store = bed.path("store");
    run(&mut hearth(
        &store,
        &format!("warm oci://{app} oci://{pause}"),
    ));
    let (mut keeper, socket) = keeper(&bed);
    let arguments = [OsStr::new("--keeper"), socket.as_os_str()];
    bed.start_snapshotter_with(&arguments);
    bed.start_containerd();
    let mut kubelet = Kubelet::new(&bed).await;
    let app = name(&other_at, "app");
    kubelet.pull(&app).await;
    for layer in &other.layers[..2] {
        let read = ["app", "pause"].map(|name| reads(&other_at, name, &layer.blob));
        assert_eq!(read, [0, 0], "only the layer of its own");
    }
    let pod = kubelet.run_pod().await;
    let one = kubelet.run(&pod, "one", &app).await;
    assert_eq!(kubelet.exec(&one, "cat /data/salt").await, "other");
    let found = served_mounts(&store.join("run"));
    assert!(!found.is_empty());
    bed.kill_snapshotter();
    bed.start_snapshotter_with(&arguments);
    bed.wait_connected();
    let seen = kubelet.exec(&one, LOOK).await;
    assert_eq!(seen, format!("{SEEN}othertwo4711\n"));
    assert_eq!(
        served_mounts(&store.join("run")),
        found,
        "the mounts are still the same"
    );
    kubelet.remove_pod(&pod).await;
    for image in [&app, &pause] {
        kubelet.remove_image(image).await;
    }
    bed.wait_for("collection", |bed| bed.records() == 0 && bed.dirs() == 0);
    bed.wait_for("unmounting", |_| mounts(&store.join("run")).is_empty());
    keeper.kill().unwrap();
    keeper.wait().unwrap();
}

async fn outlives(upgrade: bool) {
    let source = tempfile::tempdir().unwrap();
    let image = Image::make(source.path(), "outlived");
    let registry = registry(&image);
    let app = format!("127.0.0.1:{}/app:1", registry.port);
    let other = source.path().join("other");
    run(&mut hearth(&other, &format!("index push oci://{app}")));
    let mut bed = Bed::new(Some(Cri {
        sandbox_image: &app,
        labels: true,
    }));
    let store = bed.path("store");
    let (mut keeper, socket) = keeper(&bed);
    let arguments = [OsStr::new("--keeper"), socket.as_os_str()];
    match upgrade {
        true => bed.start_agent(&socket),
        false => bed.start_snapshotter_with(&arguments),
    }
    bed.start_containerd();
    let mut kubelet = Kubelet::new(&bed).await;
    kubelet.pull(&app).await;
    let pod = kubelet.run_pod().await;
    let one = kubelet.run(&pod, "one", &app).await;
    assert_eq!(kubelet.exec(&one, "cat /data/salt").await, "outlived");
    let found = served_mounts(&store.join("run"));
    assert!(!found.is_empty());
    match upgrade {
        true => bed.start_agent(&socket),
        false => {
            bed.kill_snapshotter();
            bed.start_snapshotter_with(&arguments);
            bed.wait_connected();
        }
    }
    // Never read before, so it takes the new process.
    let seen = kubelet.exec(&one, LOOK).await;
    assert_eq!(seen, format!("{SEEN}outlivedtwo4711\n"));
    assert_eq!(
        served_mounts(&store.join("run")),
        found,
        "the mount is still the same"
    );
    kubelet.remove_pod(&pod).await;
    kubelet.remove_image(&app).await;
    bed.wait_for("collection", |bed| bed.records() == 0 && bed.dirs() == 0);
    bed.wait_for("unmounting", |_| mounts(&store.join("run")).is_empty());
    keeper.kill().unwrap();
    keeper.wait().unwrap();
}

#[test]
fn the_mirror_serves_what_it_has_without_the_registry() {
    let source = tempfile::tempdir().unwrap();
    let image = Image::make(source.path(), "mirrored");
    let registry = registry(&image);
    let store = source.path().join("store");
    let config = source.path().join("config.toml");
    let host = format!("127.0.0.1:{}", registry.port);
    fs::write(
        &config,
        format!("[mirror]\ndefault_registry = \"{host}\"\n"),
    )
    .unwrap();
    let mirror = Server::start(env!("CARGO_BIN_EXE_hearth"), |port, _| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
        command
            .arg("--store")
            .arg(&store)
            .arg("--config")
            .arg(&config);
        command.args(["mirror", "--address", &format!("127.0.0.1:{port}")]);
        command
    });
    let copy = |to: &str| {
        let mut command = Command::new("skopeo");
        command
            .args([
                "--insecure-policy",
                "copy",
                "-q",
                "--preserve-digests",
                "--src-tls-verify=false",
            ])
            .arg(format!("docker://127.0.0.1:{}/app:1", mirror.port))
            .arg(format!("oci:{}:x", source.path().join(to).display()));
        command
    };
    run(&mut copy("first"));
    for layer in &image.layers {
        assert!(reads(&registry, "app", &layer.blob) >= 1);
        let blob = format!("first/blobs/sha256/{}", layer.blob.hex());
        assert_eq!(
            hearth::digest::Digest::of(&fs::read(source.path().join(blob)).unwrap()),
            layer.blob
        );
    }
    let before = all_reads(&registry, &image);
    run(&mut copy("second"));
    assert_eq!(all_reads(&registry, &image), before);
    // By tag it needs an image that is recorded.
    run(&mut hearth(&store, &format!("warm oci://{host}/app:1")));
    drop(registry);
    run(&mut copy("third"));
    let get = |path: &str| {
        let url = format!("http://127.0.0.1:{}{path}", mirror.port);
        let done =
            run(Command::new("curl").args(["-s", "-o", "/dev/null", "-w", "%{http_code}", &url]));
        String::from_utf8(done).unwrap()
    };
    assert_eq!(get("/v2/"), "200");
    assert_eq!(get("/v2/app/tags/list"), "404");
    assert_eq!(get("/v2/../x/manifests/y"), "404");
    assert_eq!(get("/v2/app/blobs/sha256:00"), "400");
}

/// What a first start reads is recorded and pushed with the index; on the next node it comes without
/// being asked for, and nothing else does.
#[test]
fn what_a_start_reads_is_foreseen_on_the_next_node() {
    let source = tempfile::tempdir().unwrap();
    let image = Image::make(source.path(), "profiled");
    let registry = registry(&image);
    let app = format!("oci://127.0.0.1:{}/app:1", registry.port);
    let push = |store: &str| {
        let store = source.path().join(store);
        let pushed = run(&mut hearth(&store, &format!("index push {app} --json")));
        serde_json::from_slice::<serde_json::Value>(&pushed).unwrap()
    };
    assert_eq!(push("maker")["profiled_reads"], 0);
    let mount = |store: &str| {
        let (store, dir) = (source.path().join(store), source.path().join("root"));
        fs::create_dir_all(&dir).unwrap();
        run(&mut hearth(
            &store,
            &format!("mount --no-fill {app} {}", dir.display()),
        ));
        (store, dir)
    };
    let status = |store: &Path, dir: &Path| {
        let status = run(&mut hearth(
            store,
            &format!("status {} --json", dir.display()),
        ));
        serde_json::from_slice::<serde_json::Value>(&status).unwrap()
    };
    let umount = |store: &Path, dir: &Path| {
        run(&mut hearth(store, &format!("umount {}", dir.display())));
    };

    let (store, dir) = mount("first");
    let one = dir.join("data/one").display().to_string();
    let salt = dir.join("data/salt").display().to_string();
    let first = run(Command::new("timeout").args(["100", "cat", &salt, &one, &salt]));
    umount(&store, &dir);
    assert_eq!(push("first")["profiled_reads"], 2);

    let (store, dir) = mount("second");
    let read = || status(&store, &dir)["mount"]["opens"].as_u64().unwrap();
    let before = read();
    let started = std::time::Instant::now();
    // Two files of the image, and no other.
    let wanted = (first.len() - 2 * "profiled".len() + "profiled".len()) as u64;
    while status(&store, &dir)["present_bytes"] != wanted {
        assert!(
            started.elapsed().as_secs() < 100,
            "{}",
            status(&store, &dir)
        );
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(read(), before, "nobody has opened anything");
    let again = run(Command::new("timeout").args(["100", "cat", &salt, &one, &salt]));
    assert!(first == again);
    umount(&store, &dir);
    // It is there as long as the image is.
    run(&mut hearth(&store, "gc --target-bytes 0"));
    let left = fs::read_dir(store.join("indexes")).unwrap().count();
    assert_eq!(left, 0);
}

/// Who starts from an image has the machine: the rest of it comes when nothing is read.
#[test]
fn the_rest_of_an_image_waits_while_somebody_reads() {
    let source = tempfile::tempdir().unwrap();
    let image = Image::make(source.path(), "read");
    let registry = registry(&image);
    let app = format!("oci://127.0.0.1:{}/app:1", registry.port);
    let maker = source.path().join("maker");
    run(&mut hearth(&maker, &format!("index push {app}")));

    let (store, dir) = (source.path().join("store"), source.path().join("root"));
    fs::create_dir(&dir).unwrap();
    let unread = || {
        let layers = image.layers[..2].iter();
        let gets = layers.map(|layer| reads(&registry, "app", &layer.blob));
        gets.sum::<usize>()
    };
    let before = unread();
    let started = std::time::Instant::now();
    let now = || std::time::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    let asked = now().to_string();
    run(&mut hearth(
        &store,
        &format!("mount {app} {}", dir.display()),
    ));
    // Prints the longest time that nobody has read, and when the last read was.
    let script = r#"
import sys, time
last = float(sys.argv[2])
longest, end = 0, time.time() + 8
while last < end:
    open(sys.argv[1], "rb").read()
    longest, last = max(longest, time.time() - last), time.time()
    time.sleep(0.05)
print(longest, last)
"#;
    let salt = dir.join("data/salt").display().to_string();
    let mut reader = Command::new("timeout");
    let said = run(reader.args(["60", "python3", "-c", script, &salt, &asked]));
    let said = String::from_utf8(said).unwrap();
    let (longest, last) = said.trim().split_once(' ').unwrap();
    let (longest, last): (f64, f64) = (longest.parse().unwrap(), last.parse().unwrap());
    let fetched = unread() - before;
    // On a machine so busy that the reader stood still for long, be it before its first read, nobody has read.
    if longest.max(now() - last) < 2.0 && started.elapsed().as_secs() < 20 {
        assert_eq!(fetched, 0, "fetched beside the reader");
    }
    let status = || {
        let status = run(&mut hearth(
            &store,
            &format!("status {} --json", dir.display()),
        ));
        serde_json::from_slice::<serde_json::Value>(&status).unwrap()
    };
    while status()["complete"] != true {
        assert!(started.elapsed().as_secs() < 100, "{}", status());
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(unread() > before);
    run(&mut hearth(&store, &format!("umount {}", dir.display())));
}
