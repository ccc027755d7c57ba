//! Images on read-only tiers: nothing is pulled, copied, or served by a process.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use hearth::digest::Digest;

use super::{
    bed::{Bed, Cri},
    image::{Image, run},
    kubelet::{Kubelet, registry},
    served::{LOOK, SEEN, all_reads, hearth, mounts},
};

/// A network namespace in which there is nothing but its own loopback.
struct Nowhere(String);

impl Nowhere {
    fn new() -> Self {
        let name = format!("hearth-tier-{}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &name]));
        run(Command::new("ip").args(["-n", &name, "link", "set", "lo", "up"]));
        Self(name)
    }
}

impl Drop for Nowhere {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// A disk image that is mounted, until this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(image: &Path, at: PathBuf) -> Self {
        fs::create_dir_all(&at).unwrap();
        run(Command::new("mount")
            .args(["-o", "loop,ro"])
            .arg(image)
            .arg(&at));
        Self(at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn bed(pause: &str) -> Bed {
    Bed::new(Some(Cri {
        sandbox_image: pause,
        labels: false,
    }))
}

/// What was baked is a tier of a node whose store is empty: no layer is pulled, and nothing is copied. What
/// is damaged there, or is there no more, is fetched for the next container.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_on_a_tier_runs_without_its_layers_being_pulled() {
    let source = tempfile::tempdir().unwrap();
    let image = Image::make(source.path(), "baked");
    let registry = registry(&image);
    let host = format!("127.0.0.1:{}", registry.port);
    let (app, pause) = (format!("{host}/app:1"), format!("{host}/pause:1"));
    let tier = source.path().join("tier");
    let path = tier.display();
    run(&mut hearth(
        &source.path().join("unused"),
        &format!("bake oci://{app} oci://{pause} --output {path}"),
    ));
    let before = all_reads(&registry, &image);
    let config = source.path().join("config.toml");
    fs::write(&config, format!("[[tier]]\npath = \"{path}\"\n")).unwrap();
    let mut bed = bed(&pause);
    let store = bed.path("store");
    bed.start_snapshotter_with(&["--config".as_ref(), config.as_os_str()]);
    bed.start_containerd();
    let mut kubelet = Kubelet::new(&bed).await;
    kubelet.pull(&app).await;
    let pod = kubelet.run_pod().await;
    let one = kubelet.run(&pod, "one", &app).await;
    let seen = kubelet.exec(&one, LOOK).await;
    assert_eq!(seen, format!("{SEEN}bakedtwo4711\n"));
    assert_eq!(all_reads(&registry, &image), before, "{}", registry.log());
    let copied = fs::read_dir(store.join("objects/sha256")).unwrap().count();
    assert_eq!(copied, 0);
    let kinds = || {
        let found = mounts(&store.join("run")).into_iter();
        found.map(|(_, kind)| kind).collect::<Vec<_>>()
    };
    assert!(kinds().iter().all(|kind| kind == "erofs"), "{:?}", kinds());
    // The next process finds the same.
    bed.kill_snapshotter();
    bed.start_snapshotter_with(&["--config".as_ref(), config.as_os_str()]);
    bed.wait_connected();
    let two = kubelet.run(&pod, "two", &app).await;
    assert_eq!(kubelet.exec(&two, LOOK).await, seen);
    assert!(kinds().iter().all(|kind| kind == "erofs"), "{:?}", kinds());
    assert_eq!(all_reads(&registry, &image), before);

    // Damaged there, and found so by another process.
    let hex = Digest::of(b"baked").hex();
    let object = tier.join("objects/sha256").join(&hex[..2]).join(&hex);
    fs::write(&object, "bakes").unwrap();
    let flags = format!("--config {}", config.display());
    let verified = hearth(&store, &format!("{flags} verify --all"))
        .output()
        .unwrap();
    assert_eq!(verified.status.code(), Some(1));
    let three = kubelet.run(&pod, "three", &app).await;
    assert_eq!(kubelet.exec(&three, LOOK).await, seen);
    assert!(
        kinds().iter().any(|kind| kind.starts_with("fuse")),
        "{:?}",
        kinds()
    );
    // As soon as the store has what is damaged, the kernel reads that.
    bed.wait_for("the one object", |_| {
        store
            .join("objects/sha256")
            .join(&hex[..2])
            .join(&hex)
            .exists()
    });
    bed.wait_for("the whole image", |_| {
        let listed = run(&mut hearth(&store, &format!("{flags} list --json")));
        let listed: serde_json::Value = serde_json::from_slice(&listed).unwrap();
        listed
            .as_array()
            .unwrap()
            .iter()
            .all(|image| image["complete"] == true)
    });
    let four = kubelet.run(&pod, "four", &app).await;
    assert_eq!(kubelet.exec(&four, LOOK).await, seen);

    // Gone.
    fs::rename(&tier, source.path().join("away")).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    let five = kubelet.run(&pod, "five", &app).await;
    assert_eq!(kubelet.exec(&five, LOOK).await, seen, "{}", bed.logs());
    kubelet.remove_pod(&pod).await;
    kubelet.remove_image(&app).await;
    kubelet.remove_image(&pause).await;
    bed.wait_for("collection", |bed| bed.records() == 0 && bed.dirs() == 0);
    bed.wait_for("unmounting", |_| mounts(&store.join("run")).is_empty());
}

/// containerd, its snapshotter and its mirror in a network namespace without any route, on a baked disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_a_network_runs_an_image_from_a_disk() {
    let source = tempfile::tempdir().unwrap();
    let image = Image::make(source.path(), "offline");
    let registry = registry(&image);
    let host = format!("127.0.0.1:{}", registry.port);
    let (app, pause) = (format!("{host}/app:1"), format!("{host}/pause:1"));
    let disk = source.path().join("disk");
    run(&mut hearth(
        &source.path().join("unused"),
        &format!(
            "bake oci://{app} oci://{pause} --format erofs --output {}",
            disk.display()
        ),
    ));
    drop(registry);
    let mounted = Mounted::new(&disk, source.path().join("mounted"));
    let config = source.path().join("config.toml");
    let text = format!("[[tier]]\npath = \"{}\"\n", mounted.0.display());
    fs::write(&config, text).unwrap();
    let nowhere = Nowhere::new();
    let mut bed = bed(&pause);
    bed.netns = Some(nowhere.0.clone());
    let certs = bed.path("certs").join(&host);
    fs::create_dir_all(&certs).unwrap();
    let hosts = format!(
        "server = \"http://{host}\"\n[host.\"http://127.0.0.1:5700\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
    );
    fs::write(certs.join("hosts.toml"), hosts).unwrap();
    let toml = bed.path("config.toml");
    let more = format!(
        "[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '{}'\n",
        bed.path("certs").display()
    );
    fs::write(&toml, fs::read_to_string(&toml).unwrap() + &more).unwrap();
    let store = bed.path("store");
    bed.start_snapshotter_with(&["--config".as_ref(), config.as_os_str()]);
    let mut mirror = Command::new(env!("CARGO_BIN_EXE_hearth"));
    mirror
        .arg("--store")
        .arg(&store)
        .arg("--config")
        .arg(&config)
        .arg("mirror");
    let mut mirror = bed.spawn(mirror, "mirror.log");
    bed.start_containerd();
    let mut kubelet = Kubelet::new(&bed).await;
    kubelet.pull(&app).await;
    let pod = kubelet.run_pod().await;
    let one = kubelet.run(&pod, "one", &app).await;
    let seen = kubelet.exec(&one, LOOK).await;
    assert_eq!(seen, format!("{SEEN}offlinetwo4711\n"));
    let found = mounts(&store.join("run"));
    assert!(!found.is_empty());
    assert!(found.iter().all(|(_, kind)| kind == "erofs"), "{found:?}");
    let copied = fs::read_dir(store.join("objects/sha256")).unwrap().count();
    assert_eq!(copied, 0);
    kubelet.remove_pod(&pod).await;
    kubelet.remove_image(&app).await;
    kubelet.remove_image(&pause).await;
    bed.wait_for("collection", |bed| bed.records() == 0 && bed.dirs() == 0);
    mirror.kill().unwrap();
    mirror.wait().unwrap();
}
