//! `hearth bake`, and nodes that have what was baked as a read-only tier.

use hearth::{digest::Digest, reference::Platform};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::pushed::{INDEX, MANIFEST, Registry, gzip, tar};

use super::*;

mod disks;
mod images;

const OCI: &str = "application/vnd.oci.image";

/// Has read the beginning of a file, and reads the rest when it is told.
struct HalfWay {
    child: Child,
    out: std::io::BufReader<std::process::ChildStdout>,
}

impl HalfWay {
    fn start(file: &str) -> Self {
        const SCRIPT: &str = r#"
import hashlib, sys
with open(sys.argv[1], "rb", buffering=0) as file:
    first = file.read(100000)
    print("open", flush=True)
    sys.stdin.readline()
    rest = b"".join(iter(lambda: file.read(1 << 20), b""))
    print(hashlib.sha256(first + rest).hexdigest())
"#;
        let mut child = tool("python3", &["-c", SCRIPT, file])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut reader = Self { child, out };
        assert_eq!(reader.line(), "open");
        reader
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut self.out, &mut line).unwrap();
        line.trim().to_owned()
    }

    /// The SHA-256 of all of it.
    fn digest(mut self) -> String {
        std::io::Write::write_all(&mut self.child.stdin.take().unwrap(), b"\n").unwrap();
        let digest = self.line();
        assert!(self.child.wait().unwrap().success());
        digest
    }
}

/// An image of one layer for each directory; its reference.
fn push(registry: &Registry, tag: &str, layers: &[&Path]) -> String {
    push_for(registry, tag, layers, "amd64")
}

fn push_for(registry: &Registry, tag: &str, layers: &[&Path], architecture: &str) -> String {
    let tars = layers.iter().map(|dir| tar(dir, &["--sort=name"], &["."]));
    let tars: Vec<Vec<u8>> = tars.collect();
    let diff_ids: Vec<String> = tars.iter().map(|tar| Digest::of(tar).to_string()).collect();
    let config = json!({
        "architecture": architecture, "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = config.to_string();
    let layers = tars
        .iter()
        .map(|tar| registry.blob("app", &format!("{OCI}.layer.v1.tar+gzip"), &gzip(tar)));
    let layers: Vec<Value> = layers.collect();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": registry.blob("app", &format!("{OCI}.config.v1+json"), config.as_bytes()),
        "layers": layers,
    });
    registry.manifest("app", tag, &manifest);
    registry.reference("app", tag)
}

/// A node whose store is empty, over these tiers.
fn node(tiers: &[&Path]) -> Bed {
    let bed = Bed::new();
    let tier = |path: &&Path| format!("[[tier]]\npath = \"{}\"\nmode = \"ro\"\n", path.display());
    let text: String = tiers.iter().map(tier).collect();
    fs::write(bed.path("config.toml"), text).unwrap();
    bed
}

fn config(bed: &Bed) -> String {
    format!("--config {}", bed.path("config.toml").display())
}

/// A read-only bind mount, gone when dropped.
struct Bind(PathBuf);

impl Bind {
    fn new(from: &Path, at: PathBuf) -> Self {
        fs::create_dir_all(&at).unwrap();
        let (from, to) = (from.to_str().unwrap(), at.to_str().unwrap().to_owned());
        Done::of(&mut tool("mount", &["--bind", from, &to])).ok();
        let bind = Self(at);
        Done::of(&mut tool("mount", &["-o", "remount,bind,ro", &to])).ok();
        bind
    }

    fn detach(&self) {
        let _ = tool("umount", &["-l", self.0.to_str().unwrap()]).status();
    }
}

impl Drop for Bind {
    fn drop(&mut self) {
        self.detach();
    }
}

/// Every file and directory below `dir`, with its time.
fn everything(dir: &Path) -> Vec<(PathBuf, std::time::SystemTime, Vec<u8>)> {
    let mut found = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        let meta = path.symlink_metadata().unwrap();
        let content = match meta.is_dir() {
            true => {
                left.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
                Vec::new()
            }
            false => fs::read(&path).unwrap(),
        };
        let name = path.strip_prefix(dir).unwrap().to_owned();
        found.push((name, meta.modified().unwrap(), content));
    }
    found.sort();
    found
}

#[test]
fn reproducible_bakes_are_the_same() {
    let (registry, web) = (Registry::start(), Web::new());
    let model = web.model("m", 2, 1);
    let root = tempfile::tempdir().unwrap();
    write_model(root.path(), 1, 1, 9);
    let image = push(&registry, "1", &[root.path()]);
    let [one, two] = [0; 2].map(|_| {
        let baker = Bed::new();
        let tier = baker.path("tier");
        let output = tier.display();
        baker.ok(&format!(
            "bake {model} {image} --output {output} --reproducible"
        ));
        let node = node(&[&tier]);
        node.ok(&format!("{} verify --all", config(&node)));
        (everything(&tier), baker)
    });
    for (one, two) in one.0.iter().zip(&two.0) {
        let text = String::from_utf8_lossy(&two.2);
        assert!(one == two, "{}: {text:.500}", one.0.display());
    }
    assert_eq!(one.0.len(), two.0.len());
}

/// What is in the objects of a store.
fn stored(bed: &Bed) -> u64 {
    bed.objects()
        .iter()
        .map(|path| path.metadata().unwrap().len())
        .sum()
}

#[test]
fn what_was_baked_is_warm_without_its_origins() {
    let (web, registry, baker) = (Web::new(), Registry::start(), Bed::new());
    let model = web.model("m", 6, 2);
    let root = baker.path("root");
    write_model(&root, 3, 1, 40);
    let image = push(&registry, "1", &[&root]);
    let tier = baker.path("tier");
    let plan = baker.json(&format!(
        "bake {model} {image} --output {} --dry-run --json",
        tier.display()
    ));
    assert_eq!(plan["artifacts"].as_array().unwrap().len(), 2);
    assert!(!tier.exists() && web.sent() == 0, "{plan}");
    let report = baker.json(&format!(
        "bake {model} {image} --output {} --json",
        tier.display()
    ));
    assert_eq!(report["artifacts"], 2);
    let lock = fs::read_to_string(tier.join("hearth.lock")).unwrap();
    for text in [&model, &image] {
        assert!(lock.contains(&format!("reference = \"{text}\"")), "{lock}");
    }
    // Compressed layers are not part of it.
    let unpacked = total_size(&root);
    let objects = total_size(&tier.join("objects/sha256"));
    assert!(
        objects < total_size(&web.path("m")) + unpacked + 8192,
        "{objects}"
    );

    let origin = tempfile::tempdir().unwrap();
    Done::of(&mut tool(
        "cp",
        &[
            "-r",
            web.path("m").to_str().unwrap(),
            origin.path().to_str().unwrap(),
        ],
    ))
    .ok();
    drop((web, registry));
    let place = Bed::new();
    let bind = Bind::new(&tier, place.path("tier"));
    let node = node(&[&bind.0]);
    let with = config(&node);
    let list = node.json(&format!("{with} list --json"));
    for artifact in list.as_array().unwrap() {
        assert_eq!(artifact["complete"], true, "{list}");
        assert_eq!(artifact["places"][0]["tier"], true, "{list}");
        assert_eq!(artifact["places"][0]["path"], bind.0.to_str().unwrap());
    }
    let shown = node.ok(&format!("{with} list --tiers"));
    assert!(
        shown.contains("WHERE") && shown.contains(bind.0.to_str().unwrap()),
        "{shown}"
    );
    let status = node.ok(&format!("{with} status"));
    assert!(
        status.contains("2 artifacts") && status.contains(": in use"),
        "{status}"
    );
    for reference in [&model, &image] {
        node.ok(&format!("{with} warm {reference}"));
    }
    for (reference, files) in [(&model, origin.path().join("m")), (&image, root.clone())] {
        let dir = node.mount_dir("mnt");
        node.ok(&format!("{with} mount {reference} {dir}"));
        assert_same(&dir, &files);
        let status = node.json(&format!("{with} status {dir} --json"));
        assert_eq!(status["complete"], true, "{status}");
        assert_eq!(status["verified"], false, "{status}");
        for what in [&dir, reference] {
            let shown = node.ok(&format!("{with} status {what}"));
            assert!(shown.contains("that this node has not verified"), "{shown}");
        }
        node.ok(&format!("{with} umount {dir}"));
    }
    assert_eq!(
        node.objects(),
        Vec::<PathBuf>::new(),
        "nothing is written twice"
    );
    let report = node.json(&format!("{with} verify --all --json"));
    assert_eq!(report["damaged"], json!([]));
    assert!(report["objects"].as_u64().unwrap() > 4, "{report}");
    let shown = node.ok(&format!("{with} status {model}"));
    assert!(shown.contains("complete and verified"), "{shown}");
    // What was known of it as long as it was mounted.
    node.ok(&format!("{with} gc --target-bytes 0"));
    assert!(!node.store().join("trees").read_dir().unwrap().any(|_| true));
    let error = node.fails(&format!("{with} rm {model}"));
    assert!(
        error.contains("only read") && error.contains("hint: "),
        "{error}"
    );
    node.ok(&format!("{with} verify --all"));

    // Without it, nothing is here.
    bind.detach();
    let gone = node.run(&format!("{with} list --json"));
    assert!(
        gone.err.contains("is the disk attached?") && gone.err.contains(bind.0.to_str().unwrap()),
        "{gone:?}"
    );
    assert_eq!(gone.ok().trim(), "[]");
}

#[test]
fn a_tier_that_is_detached_or_damaged_is_fetched_instead() {
    let (web, baker) = (Web::new(), Bed::new());
    let model = web.model("m", 6, 2);
    let tier = baker.path("tier");
    baker.ok(&format!("bake {model} --output {}", tier.display()));
    let place = Bed::new();
    let bind = Bind::new(&tier, place.path("tier"));
    let node = node(&[&bind.0]);
    let with = config(&node);
    let dir = node.mount_dir("mnt");
    web.forget();
    node.ok(&format!("{with} mount {model} {dir}"));
    let shard = |n: usize| format!("model-0000{n}-of-00002.safetensors");
    let reader = HalfWay::start(&format!("{dir}/{}", shard(1)));
    assert!(web.content().is_empty(), "{:?}", web.content());
    bind.detach();
    // Longer than it is believed to be there.
    std::thread::sleep(Duration::from_secs(3));
    let digest = |n: usize| Digest::of(&fs::read(web.path("m").join(shard(n))).unwrap()).hex();
    let sum = Done::of(&mut tool("sha256sum", &[&format!("{dir}/{}", shard(2))])).ok();
    assert!(sum.starts_with(&digest(2)), "{sum}");
    assert!(web.sent() > 5 << 20, "a new open fetches");
    assert_eq!(reader.digest(), digest(1), "who has it open reads on");
    node.ok(&format!("{with} umount {dir}"));

    // Damaged there: found, reported, and fetched.
    let bytes = fs::read(web.path("m").join(shard(1))).unwrap();
    let hex = Digest::of(&bytes).hex();
    let object = tier.join("objects/sha256").join(&hex[..2]).join(&hex);
    let mut flipped = bytes.clone();
    flipped[77] ^= 1;
    fs::write(&object, flipped).unwrap();
    let fresh = Bed::new();
    fs::copy(node.path("config.toml"), fresh.path("config.toml")).unwrap();
    let bind = Bind::new(&tier, place.path("tier"));
    let with = config(&fresh);
    let done = fresh.run(&format!("{with} verify --all"));
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(
        done.out.contains(&hex) && done.out.contains("on a tier, and not used any more"),
        "{done:?}"
    );
    web.forget();
    fresh.ok(&format!("{with} warm {model}"));
    assert_eq!(stored(&fresh), bytes.len() as u64, "only what is damaged");
    assert!(fs::read(fresh.object(&bytes)).unwrap() == bytes);
    let list = fresh.json(&format!("{with} list --json"));
    assert_eq!(list[0]["complete"], true, "{list}");
    assert_eq!(list[0]["places"].as_array().unwrap().len(), 2, "{list}");
    let done = fresh.run(&format!("{with} verify --all --repair"));
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.out.contains("1 damaged, repaired"), "{done:?}");

    // What is missing there may be there when the disk is attached again: it stays as it is.
    let hex = digest(2);
    let object = tier.join("objects/sha256").join(&hex[..2]).join(&hex);
    fs::remove_file(&object).unwrap();
    let done = fresh.run(&format!("{with} verify --all --repair"));
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(
        done.out.contains("2 damaged") && !done.out.contains("repaired"),
        "{done:?}"
    );
    drop(bind);
}

#[test]
fn a_bake_that_is_killed_goes_on() {
    let (mut web, baker) = (Web::slow("1m"), Bed::new());
    let origin = web.gate();
    let model = web.model("m", 8, 3);
    let small = web.model("small", 1, 1);
    let tier = baker.path("tier");
    let few = baker.path("few.toml");
    fs::write(&few, "[fetch]\nmax_connections = 2\n").unwrap();
    let line = format!(
        "--config {} bake {model} {small} --output {}",
        few.display(),
        tier.display()
    );
    let node = node(&[&tier]);
    let mut kept = 0;
    for signal in [Signal::SIGKILL, Signal::SIGINT, Signal::SIGKILL] {
        // What is waited for, and a part of a chunk on each connection; not all of it, however late it is ended.
        origin.settle();
        origin.hold_after(5 << 20);
        let mut bake = baker.start(&line);
        let present = |bed: &Bed| -> u64 {
            let Some(list) = Some(bed.run(&format!("list --json --store {}", tier.display())))
                .filter(|done| done.code == Some(0) && tier.join("hearth.json").exists())
            else {
                return 0;
            };
            let list: Value = serde_json::from_str(&list.out).unwrap();
            list.as_array()
                .unwrap()
                .iter()
                .map(|a| a["present_bytes"].as_u64().unwrap())
                .sum()
        };
        while !tier.join("hearth.json").exists() || present(&baker) < kept + (2 << 20) {
            assert!(bake.runs());
            std::thread::sleep(Duration::from_millis(50));
        }
        bake.signal(signal);
        bake.done();
        kept = present(&baker);
        let said = node.run(&format!("{} list --json", config(&node)));
        assert!(
            said.err.contains("half baked") && said.out.trim() == "[]",
            "{said:?}"
        );
    }
    origin.settle();
    origin.release();
    let before = origin.passed();
    baker.ok(&line);
    let all = total_size(&web.path("m")) + total_size(&web.path("small"));
    let sent = origin.passed() - before;
    assert!(
        sent <= all - kept + (4 << 20),
        "{sent} of {all}, {kept} were here"
    );
    let with = config(&node);
    node.ok(&format!("{with} verify --all"));
    let list = node.json(&format!("{with} list --json"));
    assert!(
        list.as_array()
            .unwrap()
            .iter()
            .all(|a| a["complete"] == true),
        "{list}"
    );
}

#[test]
fn locks_bake_the_same_and_updates_link_what_is_there() {
    let (registry, web, baker) = (Registry::start(), Web::new(), Bed::new());
    let [one, two] = ["one", "two"].map(|name| baker.path(name));
    write_model(&one, 2, 1, 1);
    write_model(&two, 2, 1, 2);
    let image = push(&registry, "1", &[&one]);
    let model = web.model("m", 2, 1);
    let list = baker.path("list");
    fs::write(
        &list,
        format!("# what we need\n{image}\n{model}\n{image}\n"),
    )
    .unwrap();
    let [old, new, same] = ["old", "new", "same"].map(|name| baker.path(name));
    let line = |from: &Path, output: &Path, more: &str| {
        format!(
            "bake --from {} --output {} {more}",
            from.display(),
            output.display()
        )
    };
    baker.ok(&line(&list, &old, ""));
    let lock = old.join("hearth.lock");

    // The tag moves on; the lock does not.
    assert_eq!(push(&registry, "1", &[&one, &two]), image);
    baker.ok(&line(&lock, &same, ""));
    assert_eq!(
        fs::read_to_string(&lock).unwrap(),
        fs::read_to_string(same.join("hearth.lock")).unwrap()
    );
    let objects = |root: &Path| -> Vec<PathBuf> {
        let root = root.join("objects/sha256");
        let found = files_below(&root).into_iter();
        found
            .map(|path| path.strip_prefix(&root).unwrap().to_owned())
            .collect()
    };
    assert_eq!(objects(&old), objects(&same));

    web.forget();
    let update = format!("--update {}", old.display());
    baker.ok(&line(&list, &new, &update));
    assert_eq!(web.sent(), 0, "nothing of the model has changed");
    use std::os::unix::fs::MetadataExt as _;
    let shared = objects(&old).into_iter().filter(|path| {
        let inode = |root: &Path| {
            root.join("objects/sha256")
                .join(path)
                .metadata()
                .map(|m| m.ino())
                .ok()
        };
        inode(&old) == inode(&new)
    });
    assert!(shared.count() > 3);
    let node = node(&[&new]);
    let with = config(&node);
    node.ok(&format!("{with} verify --all"));
    drop((registry, web));
    let dir = node.mount_dir("mnt");
    node.ok(&format!("{with} mount {image} {dir}"));
    assert_same(&dir, &two);
    node.ok(&format!("{with} umount {dir}"));

    // Mistakes.
    let error = baker.fails(&line(&list, &new, ""));
    assert!(error.contains("finished tier"), "{error}");
    let file = baker.path("file");
    fs::write(&file, "mine").unwrap();
    let error = baker.fails(&format!("bake {model} --output {}", file.display()));
    assert!(
        error.contains("is no directory") && error.contains("hint: "),
        "{error}"
    );
    let broken = baker.path("broken");
    fs::write(&broken, "# hearth.lock\nversion = 7\n").unwrap();
    let error = baker.fails(&line(&broken, &baker.path("no"), ""));
    assert!(error.contains("version 7"), "{error}");
    assert!(!baker.path("no").exists());
}

#[test]
fn what_does_not_fit_is_refused_before_the_first_byte() {
    let (web, baker) = (Web::new(), Bed::new());
    let model = web.model("m", 8, 1);
    let small = web.model("small", 1, 1);
    let disk = baker.mount_dir("disk");
    Done::of(&mut tool(
        "mount",
        &["-t", "tmpfs", "-o", "size=6m", "tmpfs", &disk],
    ))
    .ok();
    let line = format!("bake {small} {model} --output {disk}");
    let error = baker.fails(&line);
    let sent = web.sent();
    let left = fs::read_dir(&disk).unwrap().count();
    let unmounted = Done::of(&mut tool("umount", &[&disk]));
    assert!(
        error.contains("does not fit") && error.contains(&model),
        "{error}"
    );
    assert_eq!((sent, left), (0, 0));
    unmounted.ok();
}

#[test]
fn a_bake_whose_disk_somebody_else_fills_goes_on_when_there_is_room() {
    let (mut web, baker) = (Web::new(), Bed::new());
    let origin = web.gate();
    origin.hold_after(4 << 20);
    let model = web.model("m", 10, 2);
    let disk = baker.mount_dir("disk");
    Done::of(&mut tool(
        "mount",
        &["-t", "tmpfs", "-o", "size=32m", "tmpfs", &disk],
    ))
    .ok();
    let tier = Path::new(&disk).join("tier");
    let line = format!("bake {model} --output {}", tier.display());
    let mut bake = baker.start(&line);
    while files_below(&tier.join("partial")).is_empty() {
        assert!(bake.runs());
        std::thread::sleep(Duration::from_millis(50));
    }
    let filler = Path::new(&disk).join("filler");
    let full = fs::write(&filler, vec![1; 64 << 20]);
    origin.release();
    let done = bake.done();
    let said = baker.run(&format!("list --json --store {}", tier.display()));
    fs::remove_file(&filler).unwrap();
    let again = baker.run(&line);
    let node = node(&[&tier]);
    let verified = node.run(&format!("{} verify --all", config(&node)));
    let unmounted = Done::of(&mut tool("umount", &[&disk]));
    assert_eq!(full.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    let error = done.failed(1);
    assert!(
        error.contains("space") && error.contains(&*tier.to_string_lossy()),
        "{error}"
    );
    let list: Value = serde_json::from_str(&said.ok()).unwrap();
    assert_eq!(list[0]["complete"], false, "{list}");
    again.ok();
    verified.ok();
    unmounted.ok();
}

#[test]
fn a_mount_outlives_its_disk_its_server_and_its_tag() {
    let (registry, baker) = (Registry::start(), Bed::new());
    let [one, two] = ["one", "two"].map(|name| baker.path(name));
    write_model(&one, 2, 1, 1);
    write_model(&two, 2, 1, 2);
    let image = push(&registry, "1", &[&one]);
    let tier = baker.path("tier");
    baker.ok(&format!("bake {image} --output {}", tier.display()));
    let place = Bed::new();
    let bind = Bind::new(&tier, place.path("tier"));
    let node = node(&[&bind.0]);
    let with = config(&node);
    let dir = node.mount_dir("mnt");
    node.ok(&format!("{with} mount {image} {dir}"));
    push(&registry, "1", &[&two]);
    bind.detach();
    super::survive::replace_server(&node, &dir);
    assert_same(&dir, &one);
    node.ok(&format!("{with} umount {dir}"));
}
