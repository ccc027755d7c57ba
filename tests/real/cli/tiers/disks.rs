//! Disk images as tiers: of every format, found by glob and label, attached and detached while somebody reads.

use super::*;

/// A label that no other test has: all loop devices of the machine are looked at.
fn label(name: &str) -> String {
    format!("{name}{}", std::process::id())
}

/// A read-only loop device, gone when dropped.
struct Loop(String);

impl Loop {
    fn new(image: &Path) -> Self {
        let image = image.to_str().unwrap();
        let done = Done::of(&mut tool("losetup", &["-r", "-f", "--show", image]));
        Self(done.ok().trim().to_owned())
    }

    fn name(&self) -> &str {
        self.0.strip_prefix("/dev/").unwrap()
    }

    /// Whoever has files of it open keeps them.
    fn detach(&self, mounted: &Path) {
        let _ = tool("losetup", &["-d", &self.0]).status();
        let _ = tool("umount", &["-l", mounted.to_str().unwrap()]).status();
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = tool("losetup", &["-d", &self.0]).status();
    }
}

/// A disk image that is mounted, until this is dropped.
fn mount(image: &Path, at: PathBuf) -> Bind {
    fs::create_dir_all(&at).unwrap();
    let (from, to) = (image.to_str().unwrap(), at.to_str().unwrap());
    Done::of(&mut tool("mount", &["-o", "loop,ro", from, to])).ok();
    Bind(at)
}

/// The test bed's mkfs.erofs first.
fn with_newer_erofs(command: &mut Command) -> &mut Command {
    let path = std::env::var("PATH").unwrap();
    let newer = servers::bed().join("erofs/newer");
    assert!(newer.join("mkfs.erofs").exists(), "run tests/run install");
    command.env("PATH", format!("{}:{path}", newer.display()))
}

fn tier_status(node: &Bed) -> Vec<Value> {
    let with = config(node);
    let status = node.json(&format!("{with} status --json"));
    status["tiers"].as_array().unwrap().clone()
}

fn problem(tier: &Value) -> &str {
    tier["problem"].as_str().unwrap_or_default()
}

/// Waits for what a process finds out by itself.
fn wait_for(what: &str, ready: impl Fn() -> bool) {
    let begun = Instant::now();
    while !ready() {
        assert!(begun.elapsed() < HANG, "{what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn disk_images_are_tiers_when_they_are_mounted() {
    let (web, registry, baker) = (Web::new(), Registry::start(), Bed::new());
    let model = web.model("m", 5, 2);
    let root = baker.path("root");
    write_model(&root, 2, 1, 40);
    for at in 0..300 {
        fs::write(root.join(format!("file-{at}")), bytes(at, at as usize)).unwrap();
    }
    fs::write(root.join("zeros"), vec![0; 3 << 20]).unwrap();
    let image = push(&registry, "1", &[&root]);
    let formats = [
        "ext4 --size 400MiB",
        "ext4",
        "xfs",
        "erofs --size 64MiB",
        "erofs",
        "erofs --compress zstd",
    ];
    let mut images = Vec::new();
    for (at, format) in formats.into_iter().enumerate() {
        let output = baker.path(&format!("disk{at}"));
        let path = output.display();
        let label = label("fmt");
        let line =
            format!("bake {model} {image} --output {path} --label {label} --format {format}");
        Done::of(with_newer_erofs(&mut baker.command(&line))).ok();
        let error = baker.fails(&format!("bake {model} --output {path} --format ext4"));
        assert!(error.contains("is there already"), "{error}");
        let disk = output.to_str().unwrap();
        let found = Done::of(&mut tool("blkid", &["-o", "value", "-s", "TYPE", disk])).ok();
        assert_eq!(found.trim(), format.split(' ').next().unwrap());
        if found.trim() != "erofs" {
            // This blkid reads no labels of erofs.
            let found = Done::of(&mut tool("blkid", &["-o", "value", "-s", "LABEL", disk])).ok();
            assert_eq!(found.trim(), label);
        }
        images.push((format, output));
    }
    // Nothing but images is left, and they are sparse.
    let others = files_below(baker.dir.path());
    assert_eq!(
        others.iter().filter(|p| !p.starts_with(&root)).count(),
        formats.len()
    );
    use std::os::unix::fs::MetadataExt as _;
    let size = |at: usize| images[at].1.metadata().unwrap();
    assert_eq!((size(0).len(), size(3).len()), (400 << 20, 64 << 20));
    assert!(size(0).blocks() * 512 < 100 << 20);
    assert!(size(5).len() < size(4).len(), "tokenizers and zeros shrink");
    let check = |program: &str, arguments: &[&str], at: usize| {
        let disk = images[at].1.to_str().unwrap();
        Done::of(&mut tool(program, &[arguments, &[disk]].concat())).ok();
    };
    check("e2fsck", &["-fn"], 1);
    check("xfs_repair", &["-n", "-f"], 2);
    check("fsck.erofs", &[], 4);
    // Grown, as cloud-init does it with a disk that is larger than its image.
    let grow = |at: usize| {
        let file = fs::File::options().write(true).open(&images[at].1).unwrap();
        file.set_len(1 << 30).unwrap();
    };
    grow(1);
    check("resize2fs", &[], 1);
    grow(2);
    let place = Bed::new();
    {
        let at = Bind(place.path("grown"));
        fs::create_dir_all(&at.0).unwrap();
        let (from, to) = (images[2].1.to_str().unwrap(), at.0.to_str().unwrap());
        Done::of(&mut tool("mount", &["-o", "loop", from, to])).ok();
        Done::of(&mut tool("xfs_growfs", &[to])).ok();
        let total = nix::sys::statvfs::statvfs(&at.0).unwrap();
        assert!(total.blocks() * total.fragment_size() > 900 << 20);
        at.detach();
    }
    drop((web, registry));
    for (format, disk) in &images {
        let at = mount(
            disk,
            place.path(disk.file_name().unwrap().to_str().unwrap()),
        );
        let node = node(&[&at.0]);
        let with = config(&node);
        let dir = node.mount_dir("mnt");
        node.ok(&format!("{with} mount {image} {dir}"));
        assert_same(&dir, &root);
        node.ok(&format!("{with} umount {dir}"));
        node.ok(&format!("{with} warm {model}"));
        node.ok(&format!("{with} verify --all"));
        assert!(node.objects().is_empty(), "{format}");
    }
}

#[test]
fn disk_images_that_cannot_be_made_are_refused_before_the_first_byte() {
    let (web, baker) = (Web::new(), Bed::new());
    let model = web.model("m", 8, 1);
    let disk = baker.path("disk");
    let refused = |options: &str, why: &str| {
        let line = format!("bake {model} --output {} {options}", disk.display());
        let done = baker.run(&line);
        assert!(done.code != Some(0) && done.err.contains(why), "{done:?}");
        assert_eq!(web.sent(), 0, "{options}");
    };
    for format in ["ext4", "xfs", "erofs"] {
        refused(
            &format!("--format {format} --size 6MiB"),
            "--size says 6.0 MiB",
        );
    }
    refused("--format ext4 --compress zstd", "does not compress");
    refused("--format xfs --label more-than-twelve", "1 to 12 bytes");
    refused("--format ext4 --label a/b", "without slashes");
    refused("--format ext4 --size 4097", "multiple of 4096");
    refused("--format ext4 --reproducible", "random ids");
    refused("--label x", "--format");
    // The mkfs.erofs of Debian 12.
    refused("--format erofs --compress zstd", "erofs-utils 1.8");
    let mut command = baker.command(&format!(
        "bake {model} --output {} --format erofs",
        disk.display()
    ));
    let tools = baker.path("no-tools");
    fs::create_dir(&tools).unwrap();
    let fake = tools.join("mkfs.erofs");
    fs::write(
        &fake,
        "#!/bin/sh\n[ \"$1\" = --help ] || { echo 'no space' >&2; exit 1; }\n",
    )
    .unwrap();
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", tools.display()));
    // A tool that fails: the bake is kept, and goes on with one that works.
    let error = Done::of(&mut command).failed(1);
    assert!(
        error.contains("mkfs.erofs failed") && error.contains("no space"),
        "{error}"
    );
    assert!(!disk.exists());
    let error = baker.fails(&format!(
        "bake {model} --output {} --format erofs --reproducible",
        disk.display()
    ));
    assert!(error.contains("without --reproducible"), "{error}");
    web.forget();
    baker.ok(&format!(
        "bake {model} --output {} --format erofs",
        disk.display()
    ));
    assert_eq!(web.sent(), 0);
    assert!(disk.exists());
}

#[test]
fn a_bake_that_is_killed_while_its_disk_image_is_made_goes_on() {
    let (web, baker) = (Web::new(), Bed::new());
    let model = web.model("m", 2, 1);
    let disk = baker.path("disk");
    let tools = baker.path("tools");
    fs::create_dir(&tools).unwrap();
    // It says when it begins, and waits until it may.
    let slow = tools.join("mkfs.erofs");
    let script = "#!/bin/sh\n[ \"$1\" != --help ] || exec /usr/bin/mkfs.erofs --help\n\
                  touch \"$HOME/begun\"\nwhile [ ! -e \"$HOME/go\" ]; do sleep 0.1; done\n\
                  exec /usr/bin/mkfs.erofs \"$@\"\n";
    fs::write(&slow, script).unwrap();
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(&slow, fs::Permissions::from_mode(0o755)).unwrap();
    let line = format!("bake {model} --output {} --format erofs", disk.display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
    command.args(line.split(' ')).env_remove("HEARTH_CONFIG");
    command
        .env("HOME", baker.dir.path())
        .env("HEARTH_STORE", baker.store());
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", tools.display()));
    let mut bake = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the tool", || baker.path("begun").exists());
    // Who is told to end takes the tool along, and leaves nothing half.
    let pid = nix::unistd::Pid::from_raw(bake.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(bake.wait().unwrap().code(), Some(143));
    let left: Vec<_> = fs::read_dir(baker.dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.to_str().unwrap().starts_with("disk"))
        .collect();
    assert_eq!(left, ["disk.baking"]);
    fs::remove_file(baker.path("begun")).unwrap();
    let mut bake = command.spawn().unwrap();
    wait_for("the tool", || baker.path("begun").exists());
    bake.kill().unwrap();
    bake.wait().unwrap();
    assert!(!disk.exists());
    // The tool that it has left is still there.
    let error = baker.fails(&line);
    assert!(error.contains("another process makes an image"), "{error}");
    fs::write(baker.path("go"), "").unwrap();
    web.forget();
    wait_for("the tool to end", || baker.run(&line).code == Some(0));
    assert_eq!(web.sent(), 0);
    let place = Bed::new();
    let at = mount(&disk, place.path("disk"));
    let node = node(&[&at.0]);
    node.ok(&format!("{} verify --all", config(&node)));
}

#[test]
fn erofs_images_of_the_same_content_are_the_same() {
    let web = Web::new();
    let model = web.model("m", 2, 2);
    let [one, two] = [0; 2].map(|_| {
        let baker = Bed::new();
        let disk = baker.path("disk");
        let disk = disk.display();
        baker.ok(&format!(
            "bake {model} --output {disk} --format erofs --reproducible"
        ));
        fs::read(baker.path("disk")).unwrap()
    });
    assert!(one == two);
}

#[test]
fn root_is_not_needed() {
    let (web, baker) = (Web::new(), Bed::new());
    let model = web.model("m", 2, 1);
    let nobody = 65534;
    std::os::unix::fs::chown(baker.dir.path(), Some(nobody), Some(nobody)).unwrap();
    let program = baker.path("hearth");
    fs::copy(env!("CARGO_BIN_EXE_hearth"), &program).unwrap();
    let bake = |format: &str| {
        let mut command = tool(
            "setpriv",
            &["--reuid", "65534", "--regid", "65534", "--clear-groups"],
        );
        command.arg(&program).args(["bake", &model, "--output"]);
        command.arg(baker.path(format)).args(["--format", format]);
        command
            .env("HEARTH_STORE", baker.store())
            .env("HOME", baker.dir.path());
        Done::of(command.env_remove("HEARTH_CONFIG"))
    };
    let error = bake("xfs").failed(1);
    assert!(
        error.contains("only root") && error.contains("ext4"),
        "{error}"
    );
    let place = Bed::new();
    for format in ["ext4", "erofs"] {
        bake(format).ok();
        let at = mount(&baker.path(format), place.path(format));
        let node = node(&[&at.0]);
        node.ok(&format!("{} verify --all", config(&node)));
    }
}

#[test]
fn disks_come_and_go_while_a_mount_is_read() {
    let (web, baker, place) = (Web::new(), Bed::new(), Bed::new());
    let model = web.model("m", 6, 3);
    let disk = baker.path("disk");
    baker.ok(&format!(
        "bake {model} --output {} --format ext4",
        disk.display()
    ));
    let disks = place.path("disks");
    fs::create_dir_all(disks.join("empty")).unwrap();
    fs::write(disks.join("file"), "").unwrap();
    let node = node(&[&disks.join("*")]);
    let with = config(&node);
    let dir = node.mount_dir("mnt");
    assert!(problem(&tier_status(&node)[0]).contains("no disk with a tier is attached"));
    web.forget();
    node.ok(&format!("{with} mount --no-fill {model} {dir}"));
    let at = mount(&disk, disks.join("one"));
    let log = || {
        let run = files_below(&node.store().join("run"));
        let logs = run
            .iter()
            .filter(|path| path.extension().is_some_and(|e| e == "log"));
        logs.map(|path| fs::read_to_string(path).unwrap())
            .collect::<String>()
    };
    // Nobody reads, and it is seen.
    wait_for("the attached disk", || {
        log().contains("a tier can be used now")
    });
    let shard = |n: usize| format!("model-0000{n}-of-00003.safetensors");
    let digest = |n: usize| Digest::of(&fs::read(web.path("m").join(shard(n))).unwrap()).hex();
    let reader = HalfWay::start(&format!("{dir}/{}", shard(1)));
    assert!(web.content().is_empty(), "{:?}", web.content());
    // Who has a file open keeps the disk from being unmounted, and is told so.
    let busy = Done::of(&mut tool("umount", &[at.0.to_str().unwrap()]));
    assert!(busy.err.contains("busy"), "{busy:?}");
    at.detach();
    wait_for("the detached disk", || log().contains("a tier is gone"));
    let sum = Done::of(&mut tool("sha256sum", &[&format!("{dir}/{}", shard(2))])).ok();
    assert!(sum.starts_with(&digest(2)), "{sum}");
    assert!(web.sent() > 5 << 20, "a new open fetches");
    assert_eq!(reader.digest(), digest(1), "who has it open reads on");
    // And again, under another name.
    let again = mount(&disk, disks.join("two"));
    wait_for("the disk again", || {
        log().matches("a tier can be used now").count() == 2
    });
    web.forget();
    let sum = Done::of(&mut tool("sha256sum", &[&format!("{dir}/{}", shard(3))])).ok();
    assert!(
        sum.starts_with(&digest(3)) && web.content().is_empty(),
        "{sum}"
    );
    node.ok(&format!("{with} umount {dir}"));
    drop(again);
}

#[test]
fn a_disk_that_fails_is_fetched_instead() {
    let (web, baker, place) = (Web::new(), Bed::new(), Bed::new());
    let model = web.model("m", 6, 2);
    let disk = baker.path("disk");
    baker.ok(&format!(
        "bake {model} --output {} --format ext4",
        disk.display()
    ));
    let at = mount(&disk, place.path("disk"));
    let node = node(&[&at.0]);
    let with = config(&node);
    let dir = node.mount_dir("mnt");
    node.ok(&format!("{with} mount --no-fill {model} {dir}"));
    // From now on every read of it is EIO.
    fs::File::options()
        .write(true)
        .open(&disk)
        .unwrap()
        .set_len(0)
        .unwrap();
    wait_for("the failing disk", || {
        !problem(&tier_status(&node)[0]).is_empty()
    });
    std::thread::sleep(Duration::from_secs(3));
    web.forget();
    assert_same(&dir, &web.path("m"));
    assert!(web.sent() > 11 << 20);
    node.ok(&format!("{with} umount {dir}"));
}

#[test]
fn disks_are_found_by_their_label() {
    let (web, baker) = (Web::new(), Bed::new());
    let model = web.model("m", 3, 1);
    let label = label("lab");
    for format in ["ext4", "xfs", "erofs"] {
        let disk = baker.path(format);
        let path = disk.display();
        baker.ok(&format!(
            "bake {model} --output {path} --format {format} --label {label}"
        ));
        let node = Bed::new();
        fs::write(
            node.path("config.toml"),
            format!("[[tier]]\nlabel = \"{label}\"\n"),
        )
        .unwrap();
        let with = config(&node);
        let none = tier_status(&node);
        assert_eq!(none[0]["path"], format!("LABEL={label}"));
        assert!(problem(&none[0]).contains("no disk"), "{none:?}");
        let attached = Loop::new(&disk);
        let place = node.store().join("run/tiers").join(attached.name());
        let found = tier_status(&node);
        assert_eq!((found.len(), problem(&found[0])), (1, ""), "{found:?}");
        assert_eq!(found[0]["path"], place.to_str().unwrap());
        web.forget();
        node.ok(&format!("{with} warm {model}"));
        assert!(web.content().is_empty() && node.objects().is_empty());
        // The same image once more, and one that is no tier.
        let copy = baker.path("copy");
        Done::of(&mut tool(
            "cp",
            &[
                "--sparse=always",
                disk.to_str().unwrap(),
                copy.to_str().unwrap(),
            ],
        ))
        .ok();
        let twice = Loop::new(&copy);
        let twin_place = node.store().join("run/tiers").join(twice.name());
        let other = baker.path("other");
        fs::File::create(&other).unwrap().set_len(16 << 20).unwrap();
        let other_path = other.to_str().unwrap();
        Done::of(&mut tool(
            "mke2fs",
            &["-q", "-t", "ext4", "-L", &label, other_path],
        ))
        .ok();
        let stranger = Loop::new(&other);
        let stranger_place = node.store().join("run/tiers").join(stranger.name());
        let found = tier_status(&node);
        assert_eq!(found.len(), 3, "{found:?}");
        let why: Vec<&str> = found.iter().map(problem).collect();
        assert_eq!(
            why.iter().filter(|why| why.is_empty()).count(),
            1,
            "{why:?}"
        );
        assert!(
            why.iter().any(|why| why.contains("the same content twice")),
            "{why:?}"
        );
        assert!(
            why.iter().any(|why| why.contains("no hearth.json")),
            "{why:?}"
        );
        twice.detach(&twin_place);
        stranger.detach(&stranger_place);
        // One that only says that it is one.
        fs::write(&copy, {
            let mut head = vec![0; 1 << 20];
            head[1080..1082].copy_from_slice(&[0x53, 0xef]);
            head[1144..1144 + label.len()].copy_from_slice(label.as_bytes());
            head
        })
        .unwrap();
        let broken = Loop::new(&copy);
        attached.detach(&place);
        wait_for("nothing but a broken disk", || {
            let found = tier_status(&node);
            found.len() == 1 && problem(&found[0]).contains("cannot be mounted")
        });
        drop(broken);
        let gone = tier_status(&node);
        assert!(problem(&gone[0]).contains("no disk"), "{gone:?}");
        fs::remove_file(&copy).unwrap();
        fs::remove_file(&other).unwrap();
    }
}

#[test]
fn a_node_without_a_network_has_what_was_baked() {
    let (web, registry, baker) = (Web::new(), Registry::start(), Bed::new());
    let model = web.model("m", 5, 2);
    let root = baker.path("root");
    write_model(&root, 2, 1, 40);
    let image = push(&registry, "1", &[&root]);
    let disk = baker.path("disk");
    baker.ok(&format!(
        "bake {model} {image} --output {} --format erofs",
        disk.display()
    ));
    let place = Bed::new();
    let at = mount(&disk, place.path("disk"));
    let node = node(&[&at.0]);
    let with = config(&node);
    // In a network namespace in which there is nothing, not even a loopback that is up.
    let offline = |line: &str| {
        let inner = node.command(line);
        let mut command = Command::new("unshare");
        command
            .arg("--net")
            .arg(inner.get_program())
            .args(inner.get_args());
        for (key, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        Done::of(&mut command)
    };
    for (reference, files) in [(&model, web.path("m")), (&image, root.clone())] {
        let dir = node.mount_dir("mnt");
        offline(&format!("{with} warm {reference}")).ok();
        offline(&format!("{with} mount {reference} {dir}")).ok();
        assert_same(&dir, &files);
        let status = node.json(&format!("{with} status {dir} --json"));
        assert_eq!(status["complete"], true, "{status}");
        node.ok(&format!("{with} umount {dir}"));
    }
    assert!(node.objects().is_empty());
}

#[test]
fn an_update_that_has_to_copy_too_much_is_refused() {
    let (web, baker) = (Web::new(), Bed::new());
    let model = web.model("m", 8, 1);
    let old = baker.path("old");
    baker.ok(&format!("bake {model} --output {}", old.display()));
    web.forget();
    let disk = baker.mount_dir("disk");
    Done::of(&mut tool(
        "mount",
        &["-t", "tmpfs", "-o", "size=6m", "tmpfs", &disk],
    ))
    .ok();
    let error = baker.fails(&format!(
        "bake {model} --output {disk} --update {}",
        old.display()
    ));
    let copied = files_below(&Path::new(&disk).join("objects/sha256"));
    let unmounted = Done::of(&mut tool("umount", &[&disk]));
    assert!(
        error.contains("what is copied from the older tier does not fit: needs 8."),
        "{error}"
    );
    assert!(copied.is_empty() && web.sent() == 0);
    unmounted.ok();
    let error = baker.fails(&format!(
        "bake {model} --output {} --update {}",
        baker.path("new").display(),
        old.join("hearth.lock").display()
    ));
    assert!(error.contains("mount the older disk image"), "{error}");
}

#[test]
fn what_was_baked_of_a_tag_that_has_moved_is_no_disk_image_of_it() {
    let (registry, baker) = (Registry::start(), Bed::new());
    let [one, two] = ["one", "two"].map(|name| baker.path(name));
    write_model(&one, 1, 1, 1);
    write_model(&two, 1, 1, 2);
    let image = push(&registry, "1", &[&one]);
    let patience = baker.path("config.toml");
    fs::write(&patience, "[fetch]\npatience_seconds = 1\n").unwrap();
    let with = format!("--config {}", patience.display());
    let [disk, other] = ["disk", "other"].map(|name| baker.path(name));
    for disk in [&disk, &other] {
        baker.ok(&format!("bake {image} --output {}.baking", disk.display()));
    }
    push(&registry, "1", &[&two]);
    let rest = format!("--output {} --format erofs", disk.display());
    let error = baker.fails(&format!("{with} bake {image} {rest}"));
    assert!(
        error.contains(&format!("was baked when {image} was")) && error.contains("hint: "),
        "{error}"
    );
    let lock = format!("{}.baking/hearth.lock", disk.display());
    baker.ok(&format!("{with} bake --from {lock} {rest}"));
    drop(registry);
    let line = format!(
        "{with} bake {image} --output {} --format erofs",
        other.display()
    );
    let done = baker.run(&line);
    assert!(done.err.contains("cannot be said"), "{done:?}");
    done.ok();
    assert!(disk.exists() && other.exists());
}
