//! A disk that is full, or is read-only from one moment to the next, under mounts that are read.

use super::{
    matrix::{READ, digests},
    *,
};
use crate::store::Mounted;

fn read(file: &str, body: &[u8]) {
    let out = Done::of(&mut python(READ, &[file])).ok();
    assert_eq!(out, digests(body), "{file}");
}

/// Takes what is free on a file system.
fn take_all(dir: &Path) -> PathBuf {
    let ballast = dir.join("ballast");
    let file = fs::File::create(&ballast).unwrap();
    let space = nix::sys::statvfs::statvfs(dir).unwrap();
    let free = space.blocks_available() * space.fragment_size();
    let flags = nix::fcntl::FallocateFlags::empty();
    // What the file needs for its own extents, it finds in the rest.
    nix::fcntl::fallocate(&file, flags, 0, (free - (64 << 10)) as i64).unwrap();
    let more = fs::File::options().append(true).open(&ballast).unwrap();
    while std::io::Write::write(&mut &more, &[0; 4096]).is_ok() {}
    ballast
}

#[test]
fn a_disk_that_fills_up_under_a_mount_and_empties_again() {
    let bed = Bed::new();
    let web = Web::new();
    let (lazy, pinned) = (web.model("lazy", 24, 2), web.model("pinned", 8, 1));
    let image = bed.path("image");
    let disk = Mounted::ext4(&image, 128);
    let config = bed.path("config.toml");
    fs::write(&config, "[store]\nmin_free = 0\n").unwrap();
    let store = disk.dir.path().join("store");
    let flags = format!("--store {} --config {}", store.display(), config.display());
    bed.ok(&format!("{flags} warm --pin {pinned}"));
    let (dir, other) = (bed.mount_dir("lazy-mnt"), bed.mount_dir("pinned-mnt"));
    bed.ok(&format!("{flags} mount --no-fill {lazy} {dir}"));
    let shard = |n: usize| format!("model-{n:05}-of-00002.safetensors");
    let bodies = [1, 2].map(|n| fs::read(web.path("lazy").join(shard(n))).unwrap());
    let peek = "import os, sys; f = os.open(sys.argv[1], 0); os.posix_fadvise(f, 0, 0, 1); \
                os.pread(f, 4096, 3 << 20)";
    Done::of(&mut python(peek, &[&format!("{dir}/{}", shard(1))])).ok();
    let status = || bed.json(&format!("{flags} status {dir} --json"));
    let before = status();
    assert!(before["present_bytes"].as_u64().unwrap() > 0);

    let ballast = take_all(disk.dir.path());
    for (n, body) in [1, 2].into_iter().zip(&bodies) {
        read(&format!("{dir}/{}", shard(n)), body);
    }
    let tokenizer = web.path("lazy").join("tokenizer.json");
    let both = [
        &format!("{dir}/tokenizer.json"),
        tokenizer.to_str().unwrap(),
    ];
    Done::of(&mut tool("cmp", &both)).ok();
    let full = status();
    assert!(
        full["metrics"]["hearth_fetch_streamed_bytes_total"]
            .as_u64()
            .unwrap()
            > 40 << 20,
        "{full}"
    );
    assert_eq!(full["mount"]["errors"], 0);
    let log = fs::read_to_string(full["log"].as_str().unwrap()).unwrap();
    // Unless the log had no room either.
    assert!(log.is_empty() || log.contains("No space left"), "{log}");
    // What is warm is mounted and read on a disk that takes nothing.
    bed.ok(&format!("{flags} mount {pinned} {other}"));
    assert_same(&other, &web.path("pinned"));
    assert!(
        bed.ok(&format!("{flags} verify --all"))
            .contains("0 damaged")
    );
    // Neither what is pinned nor what is open makes room.
    bed.ok(&format!("{flags} gc --target-bytes 0"));
    let list = bed.json(&format!("{flags} list --json"));
    assert_eq!(list.as_array().unwrap().len(), 2, "{list}");
    assert_same(&other, &web.path("pinned"));

    fs::remove_file(ballast).unwrap();
    let file = format!("{dir}/{}", shard(1));
    let begun = Instant::now();
    let whole = 2 * (24 << 20);
    while status()["present_bytes"].as_u64().unwrap() < whole {
        assert!(begun.elapsed() < HANG, "{}", status());
        read(&file, &bodies[0]);
        read(&format!("{dir}/{}", shard(2)), &bodies[1]);
        std::thread::sleep(Duration::from_millis(200));
    }
    let after = status();
    assert_eq!(after["pid"], before["pid"], "without a restart");
    assert_eq!(after["mount"]["errors"], 0);
    for mounted in [&dir, &other] {
        bed.ok(&format!("{flags} umount {mounted}"));
    }
    assert!(
        bed.ok(&format!("{flags} verify --all"))
            .contains("0 damaged")
    );
}

#[test]
fn a_disk_that_turns_read_only_under_a_mount() {
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 12, 2);
    let image = bed.path("image");
    let disk = Mounted::ext4(&image, 128);
    let at = disk.dir.path().to_str().unwrap().to_owned();
    Done::of(&mut tool(
        "mount",
        &["-o", "remount,errors=remount-ro", &at],
    ))
    .ok();
    let config = bed.path("config.toml");
    fs::write(&config, "[store]\nmin_free = 0\n").unwrap();
    let flags = format!("--store {at}/store --config {}", config.display());
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("{flags} mount --no-fill {model} {dir}"));
    let shard = |n: usize| format!("model-{n:05}-of-00002.safetensors");
    let bodies = [1, 2].map(|n| fs::read(web.path("m").join(shard(n))).unwrap());
    // The first is complete, the second begun.
    read(&format!("{dir}/{}", shard(1)), &bodies[0]);
    let peek = "import os, sys; f = os.open(sys.argv[1], 0); os.posix_fadvise(f, 0, 0, 1); \
                os.pread(f, 4096, 3 << 20)";
    Done::of(&mut python(peek, &[&format!("{dir}/{}", shard(2))])).ok();
    // What the kernel does when the disk fails: from now on nothing can be written.
    let device = Done::of(&mut tool("findmnt", &["-no", "SOURCE", &at])).ok();
    let device = device.trim().rsplit('/').next().unwrap().to_owned();
    fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "test").unwrap();
    assert!(
        fs::write(format!("{at}/file"), "x").is_err(),
        "it is read-only now"
    );
    for (n, body) in [1, 2].into_iter().zip(&bodies) {
        read(&format!("{dir}/{}", shard(n)), body);
    }
    Done::of(&mut tool(
        "cmp",
        &[
            &format!("{dir}/tokenizer.json"),
            web.path("m").join("tokenizer.json").to_str().unwrap(),
        ],
    ))
    .ok();
    let status = bed.json(&format!("{flags} status {dir} --json"));
    assert_eq!(status["mount"]["errors"], 0, "{status}");
    assert!(
        status["metrics"]["hearth_fetch_streamed_bytes_total"]
            .as_u64()
            .unwrap()
            > 0
    );
    let error = bed.fails(&format!("{flags} rm {model}"));
    assert!(
        error.contains("cannot be written") || error.contains("Read-only"),
        "{error}"
    );
    // What is mounted now needs no place in the store, not even for sockets and logs.
    let other = bed.mount_dir("other");
    bed.ok(&format!("{flags} mount --no-fill {model} {other}"));
    for (n, body) in [1, 2].into_iter().zip(&bodies) {
        read(&format!("{other}/{}", shard(n)), body);
    }
    bed.ok(&format!("{flags} umount {other}"));
    bed.ok(&format!("{flags} umount --lazy {dir}"));
}

/// A disk that is mounted read-only: what is warm is served from it, the rest from the origin, and is
/// kept again once the disk can be written.
#[test]
fn a_store_on_a_disk_that_is_only_read_for_a_while() {
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 12, 2);
    let image = bed.path("image");
    let disk = Mounted::ext4(&image, 128);
    let at = disk.dir.path().to_str().unwrap().to_owned();
    let config = bed.path("config.toml");
    fs::write(&config, "[store]\nmin_free = 0\n").unwrap();
    let flags = format!("--store {at}/store --config {}", config.display());
    let dir = bed.mount_dir("mnt");
    let shard = |n: usize| format!("model-{n:05}-of-00002.safetensors");
    let bodies = [1, 2].map(|n| fs::read(web.path("m").join(shard(n))).unwrap());
    let remount = |how: &str| {
        let how = format!("remount,{how}");
        Done::of(&mut tool("mount", &["-o", &how, &at])).ok();
    };
    bed.ok(&format!("{flags} mount --no-fill {model} {dir}"));
    read(&format!("{dir}/{}", shard(1)), &bodies[0]);
    bed.ok(&format!("{flags} umount {dir}"));
    for how in ["ro", "rw"] {
        remount(how);
        let before = web.sent();
        bed.ok(&format!("{flags} mount --no-fill {model} {dir}"));
        for (n, body) in [1, 2].into_iter().zip(&bodies) {
            read(&format!("{dir}/{}", shard(n)), body);
        }
        bed.ok(&format!("{flags} umount {dir}"));
        let sent = web.sent() - before;
        let (one, two) = (
            bodies[1].len() as u64,
            (bodies[0].len() + bodies[1].len()) as u64,
        );
        assert!((one..two).contains(&sent), "{how}: {sent}");
    }
    let before = web.sent();
    bed.ok(&format!("{flags} warm {model}"));
    assert!(web.sent() - before < bodies[1].len() as u64);
    assert!(
        bed.ok(&format!("{flags} verify --all"))
            .contains("0 damaged")
    );
}

/// A server that begins on a disk that only is read, keeps what comes once the disk can be written: what is read, and
/// what is fetched in the background.
#[test]
fn a_server_that_began_on_a_disk_that_is_only_read() {
    let bed = Bed::new();
    let web = Web::new();
    let names = ["read", "filled"];
    let models = names.map(|name| web.model(name, 12, 2));
    // Of other content: what one of them brings is not what the other waits for.
    write_model(&web.path("filled"), 12, 2, 2);
    let image = bed.path("image");
    let disk = Mounted::ext4(&image, 192);
    let at = disk.dir.path().to_str().unwrap().to_owned();
    let config = bed.path("config.toml");
    fs::write(&config, "[store]\nmin_free = 0\n").unwrap();
    let flags = format!("--store {at}/store --config {}", config.display());
    let dirs = names.map(|name| bed.mount_dir(name));
    let shards = [1, 2].map(|n| format!("model-{n:05}-of-00002.safetensors"));
    let body = |name: &str, shard: &str| fs::read(web.path(name).join(shard)).unwrap();
    let remount = |how: &str| {
        let how = format!("remount,{how}");
        Done::of(&mut tool("mount", &["-o", &how, &at])).ok();
    };
    for ((model, dir), name) in models.iter().zip(&dirs).zip(names) {
        bed.ok(&format!("{flags} mount --no-fill {model} {dir}"));
        read(&format!("{dir}/{}", shards[0]), &body(name, &shards[0]));
        bed.ok(&format!("{flags} umount {dir}"));
    }
    remount("ro");
    let serve = |how: &str, n: usize| {
        let (model, dir) = (&models[n], &dirs[n]);
        let server = bed.start(&format!("{flags} mount --foreground {how} {model} {dir}"));
        let begun = Instant::now();
        while hearth::mount::find(Path::new(dir)).unwrap().is_none() {
            assert!(begun.elapsed() < HANG);
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    };
    let mut servers = [serve("--no-fill", 0), serve("", 1)];
    let read_all = || {
        for (dir, name) in dirs.iter().zip(names) {
            for shard in &shards {
                read(&format!("{dir}/{shard}"), &body(name, shard));
            }
        }
    };
    read_all();
    let object = |name: &str| {
        let hex = hearth::digest::Digest::of(&body(name, &shards[1])).hex();
        Path::new(&at).join(format!("store/objects/sha256/{}/{hex}", &hex[..2]))
    };
    let objects = names.map(object);
    assert!(!objects.iter().any(|object| object.exists()));
    remount("rw");
    let begun = Instant::now();
    while !objects.iter().all(|object| object.exists()) {
        assert!(begun.elapsed() < HANG, "{objects:?}");
        read(
            &format!("{}/{}", dirs[0], shards[1]),
            &body("read", &shards[1]),
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(servers.iter_mut().all(Running::runs), "without a restart");
    // What they serve is held, though that could not be written down when they began.
    bed.ok(&format!("{flags} gc --target-bytes 0"));
    assert!(objects.iter().all(|object| object.exists()));
    let before = web.sent();
    read_all();
    assert_eq!(web.sent(), before);
    assert!(
        bed.ok(&format!("{flags} verify --all"))
            .contains("0 damaged")
    );
    for (dir, server) in dirs.iter().zip(servers) {
        bed.ok(&format!("{flags} umount {dir}"));
        assert_eq!(server.done().code, Some(0));
    }
}
