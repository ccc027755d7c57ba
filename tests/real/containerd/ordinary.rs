//! As an ordinary snapshotter, by way of `ctr`: compared with containerd's own.

use super::{
    bed::Bed,
    image::{Image, run},
};

const NAME: &str = "example.com/app:test";

struct Test {
    bed: Bed,
    image: Image,
    namespace: String,
}

impl Drop for Test {
    fn drop(&mut self) {
        // runc leaves the directories of its state and of the cgroups.
        for namespace in [self.namespace.clone(), format!("{}-other", self.namespace)] {
            let _ = std::fs::remove_dir(format!("/run/containerd/runc/{namespace}"));
            for hierarchy in std::fs::read_dir("/sys/fs/cgroup")
                .into_iter()
                .flatten()
                .flatten()
            {
                let _ = std::fs::remove_dir(hierarchy.path().join(&namespace));
            }
        }
    }
}

impl Test {
    fn new() -> Self {
        let mut bed = Bed::new(None);
        let image = Image::make(&bed.path("image"), "salt");
        bed.start_snapshotter();
        bed.start_containerd();
        // runc's state is shared by all containerds of the machine.
        let namespace = format!("hearth-test-{}", std::process::id());
        Self {
            bed,
            image,
            namespace,
        }
    }

    fn ctr(&self, line: &str) -> String {
        self.bed
            .ctr(&format!("--namespace {} {line}", self.namespace))
    }

    fn import(&self, snapshotter: &str) {
        let archive = self.image.archive();
        let base = "--base-name example.com/app";
        let archive = archive.display();
        self.ctr(&format!(
            "images import {base} --snapshotter {snapshotter} {archive}"
        ));
    }

    /// What `sh -c` prints in a new container, which is removed.
    fn sh(&self, id: &str, script: &str) -> String {
        let script = script.replace(' ', "\u{a0}");
        self.ctr(&format!(
            "run --rm --snapshotter hearth {NAME} {id} /bin/sh -c {script}"
        ))
    }

    /// (bytes, inodes) of a snapshot.
    fn usage(&self, snapshotter: &str, key: &str) -> (f64, u64) {
        self.bed.usage(&self.namespace, snapshotter, key)
    }

    /// Every attribute of every file of the image as a snapshotter shows it.
    fn listing(&self, snapshotter: &str) -> String {
        let dir = self.bed.path(&format!("mnt-{snapshotter}"));
        std::fs::create_dir_all(&dir).unwrap();
        let at = dir.display();
        self.ctr(&format!(
            "images mount --snapshotter {snapshotter} {NAME} {at}"
        ));
        let find = run(std::process::Command::new("sh").current_dir(&dir).args([
            "-c",
            "find . -printf '%p %y %m %U %G %n %T@ %l\\n' | sort; find . -type f | sort | xargs sha256sum",
        ]));
        self.ctr(&format!(
            "images unmount --rm --snapshotter {snapshotter} {at}"
        ));
        String::from_utf8(find).unwrap()
    }
}

#[test]
fn containers_run_and_images_look_as_with_overlayfs() {
    let mut test = Test::new();
    test.import("hearth");
    test.import("overlayfs");
    assert_eq!(test.listing("hearth"), test.listing("overlayfs"));
    for chain in test.image.chain_ids() {
        let (bytes, inodes) = test.usage("hearth", &chain.to_string());
        let (theirs, their_inodes) = test.usage("overlayfs", &chain.to_string());
        assert!((bytes - theirs).abs() <= theirs * 0.01, "{bytes} {theirs}");
        assert_eq!(inodes, their_inodes);
    }
    let listed = test.ctr("snapshots --snapshotter hearth ls");
    let chains: Vec<String> = test
        .image
        .chain_ids()
        .iter()
        .map(ToString::to_string)
        .collect();
    for chain in &chains {
        assert!(listed.contains(chain), "{listed}");
    }
    let tree = test.ctr("snapshots --snapshotter hearth tree");
    assert!(tree.contains(&chains[2]), "{tree}");
    let info = test.ctr(&format!(
        "snapshots --snapshotter hearth info {}",
        chains[2]
    ));
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["Kind"], "Committed");
    assert_eq!(info["Parent"], chains[1].as_str());

    // Several containers of one image: each has what it writes for itself.
    for id in ["one", "two"] {
        let run = format!("run -d --snapshotter hearth {NAME} {id}");
        test.ctr(&run);
    }
    let exec = |id: &str, line: &str| test.ctr(&format!("tasks exec --exec-id x {id} {line}"));
    exec("one", "/bin/rm /data/one");
    exec("one", "/bin/mkdir /data/new");
    assert_eq!(
        exec("one", "/bin/ls /data"),
        "mode\nnew\nsalt\ntwo\ntwo-too\n"
    );
    assert_eq!(
        exec("two", "/bin/ls /data"),
        "mode\none\nsalt\ntwo\ntwo-too\n"
    );
    assert_eq!(exec("two", "/bin/ls /opaque"), "above\n");
    assert_eq!(test.sh("three", "cat /data/salt"), "salt");
    let (bytes, _) = test.usage("hearth", "two");
    exec(
        "two",
        "/bin/busybox dd if=/dev/zero of=/data/big bs=65536 count=16",
    );
    let (more, _) = test.usage("hearth", "two");
    assert!(
        (more - bytes - 1_048_576.0).abs() < 20_000.0,
        "{bytes} {more}"
    );

    // What a container wrote becomes a layer.
    let commit = "snapshots --snapshotter hearth commit mine one";
    let in_use = test.ctr("tasks kill -s 9 one");
    assert_eq!(in_use, "");
    test.bed.wait_for("the end of one", |_| {
        test.ctr("tasks ls").contains("STOPPED")
    });
    test.ctr("tasks rm one");
    test.ctr(commit);
    // What `ctr` prepares it keeps from collection.
    test.ctr("snapshots --snapshotter hearth prepare look mine");
    let mounts = test.ctr("snapshots --snapshotter hearth mounts /target look");
    assert!(
        mounts.contains("mount -t overlay overlay /target -o"),
        "{mounts}"
    );

    // containerd and then hearth are restarted under a running container.
    test.bed.stop_containerd();
    test.bed.start_containerd();
    test.bed.stop_snapshotter();
    test.bed.start_snapshotter();
    test.bed.wait_connected();
    let exec = |id: &str, line: &str| test.ctr(&format!("tasks exec --exec-id x {id} {line}"));
    assert_eq!(exec("two", "/bin/cat /data/two"), "two");
    assert_eq!(test.sh("four", "echo four > /four; cat /four"), "four\n");
    test.bed.kill_snapshotter();
    assert_eq!(
        test.ctr("tasks exec --exec-id x two /bin/cat /data/two"),
        "two",
        "the container does not need the snapshotter"
    );
    let down = format!(
        "--namespace {} run --rm --snapshotter hearth {NAME} five",
        test.namespace
    );
    let down = test.bed.ctr_fails(&down);
    assert!(down.to_lowercase().contains("connect"), "{down}");
    test.bed.start_snapshotter();
    test.bed.wait_connected();
    assert_eq!(test.sh("six", "cat /data/two"), "two");

    // Another namespace has snapshots of its own, of the same content.
    let other = format!("{}-other", test.namespace);
    let records = || {
        let line = format!("--namespace {other} snapshots --snapshotter hearth ls");
        test.bed.ctr(&line).lines().count() - 1
    };
    let archive = test.image.archive();
    test.bed.ctr(&format!(
        "--namespace {other} images import --base-name example.com/app --snapshotter hearth {}",
        archive.display()
    ));
    assert_eq!(records(), 3);
    let seen = test.bed.ctr(&format!(
        "--namespace {other} run --rm --snapshotter hearth {NAME} one /bin/cat /data/salt"
    ));
    assert_eq!(seen, "salt");
    test.bed
        .ctr(&format!("--namespace {other} images rm --sync {NAME}"));
    test.bed.wait_for("collection", |_| records() == 0);

    // All is removed, and the disk is free again.
    test.ctr("tasks kill -s 9 two");
    test.bed.wait_for("the end of two", |_| {
        test.ctr("tasks ls").contains("STOPPED")
    });
    test.ctr("tasks rm two");
    test.ctr("containers rm one two");
    test.ctr("snapshots --snapshotter hearth rm look");
    test.ctr("snapshots --snapshotter hearth rm mine");
    test.ctr(&format!("images rm --sync {NAME}"));
    test.bed
        .wait_for("collection", |bed| bed.records() == 0 && bed.dirs() == 0);
}

/// One directory has one server, and so has one socket.
#[test]
fn a_second_instance_is_refused() {
    let mut bed = Bed::new(None);
    bed.start_snapshotter();
    let fails = |address: &str, root: &str| {
        let mut command = std::process::Command::new("timeout");
        command.args(["20", env!("CARGO_BIN_EXE_hearth"), "snapshotter"]);
        command.arg("--address").arg(bed.path(address));
        command.arg("--root").arg(bed.path(root));
        command.env("HEARTH_STORE", bed.path("store"));
        let done = command.output().unwrap();
        assert_eq!(done.status.code(), Some(1), "{done:?}");
        String::from_utf8(done.stderr).unwrap()
    };
    let error = fails("other.sock", "hearth");
    assert!(error.contains("is served by another process"), "{error}");
    let error = fails("h.sock", "other");
    assert!(error.contains("h.sock: another process does"), "{error}");
    let error = fails("other.sock", "a:b");
    assert!(error.contains("cannot stand in mount options"), "{error}");
    // overlayfs cannot write to an overlay.
    let at = |name: &str| {
        let path = bed.path(name);
        std::fs::create_dir_all(&path).unwrap();
        path.display().to_string()
    };
    let (lower, upper, work) = (at("lower"), at("upper"), at("work"));
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let mount = ["-t", "overlay", "overlay", "-o", &options, &at("merged")];
    run(std::process::Command::new("mount").args(mount));
    let error = fails("other.sock", "merged/root");
    assert!(error.contains("cannot mount an overlay"), "{error}");
    assert!(error.contains("hint: "), "{error}");
    assert!(bed.path("h.sock").exists());
    bed.stop_snapshotter();
}
