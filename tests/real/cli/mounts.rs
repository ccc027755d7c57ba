//! `mount` and `umount`: the process in the background, its traces, and what goes wrong.

use std::os::unix::fs::PermissionsExt as _;

use nix::sys::signal::Signal;

use super::*;

/// What is in `<store>/run`, and what it says.
fn traces(bed: &Bed) -> Vec<(PathBuf, String)> {
    let files = files_below(&bed.store().join("run"));
    let read = |file: PathBuf| (file.clone(), fs::read_to_string(file).unwrap_or_default());
    files.into_iter().map(read).collect()
}

fn is_mounted(dir: &str) -> bool {
    let list = hearth::mount::mounted().unwrap();
    list.iter().any(|m| m.mountpoint == Path::new(dir))
}

pub(super) fn wait_until(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < HANG, "not {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_mount_lives_in_the_background_and_leaves_nothing() {
    let bed = Bed::new();
    let web = Web::slow("4m");
    let model = web.model("m", 8, 2);
    let dir = bed.mount_dir("mnt");

    // Some script holds a lock while it mounts: neither that nor the pipes here live on.
    let lock = bed.path("lock");
    let mut script = bed.command("");
    script.args([
        "--store",
        bed.store().to_str().unwrap(),
        "mount",
        &model,
        &dir,
    ]);
    let inner: Vec<_> = script
        .get_args()
        .map(|a| a.to_str().unwrap().to_owned())
        .collect();
    let line = format!(
        "exec 9> {}; flock 9; timeout {}",
        lock.display(),
        inner.join(" ")
    );
    let begun = Instant::now();
    assert_eq!(Done::of(&mut tool("bash", &["-c", &line])).ok(), "");
    assert!(begun.elapsed() < HANG, "{:?}", begun.elapsed());
    Done::of(&mut tool("flock", &["-n", lock.to_str().unwrap(), "true"])).ok();

    let status = bed.json(&format!("status {dir} --json"));
    assert_eq!(status["mountpoint"], dir.as_str());
    assert_eq!(status["reference"], model.as_str());
    assert_eq!(
        (&status["layout"], &status["error"]),
        (&"tree".into(), &Value::Null)
    );
    assert_eq!(status["total_bytes"], total_size(&web.path("m")));
    let pid = status["pid"].as_u64().unwrap();
    let log = status["log"].as_str().unwrap();
    assert!(Path::new(log).starts_with(bed.store().join("run")), "{log}");
    assert!(bed.ok("status").contains(&format!("mounted on {dir}\n")));
    assert!(!Bed::new().ok("status").contains("mounted on"));
    assert!(bed.ok(&format!("status {dir}")).contains("here ("));
    assert_same(&dir, &web.path("m"));
    assert_eq!(
        bed.wait_complete(&dir)["present_bytes"],
        total_size(&web.path("m"))
    );
    assert!(
        bed.ok(&format!("status {dir}"))
            .contains("complete and verified")
    );
    assert_eq!(bed.json("list --json")[0]["complete"], true);

    let twice = bed.fails(&format!("mount {model} {dir}"));
    assert!(
        twice.contains("hearth is mounted here already\nhint: unmount it"),
        "{twice}"
    );
    let used = bed.fails(&format!("rm {model}"));
    assert!(used.contains("hint: unmount or unpin it first"), "{used}");
    bed.ok("gc --target-bytes 0");
    assert_eq!(bed.objects().len(), 5, "what is mounted is not collected");

    let hold = "import sys; f = open(sys.argv[1]); print('open', flush=True); input()";
    let mut holder = python(hold, &[&format!("{dir}/config.json")]);
    holder.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut holder = holder.spawn().unwrap();
    let mut word = [0; 4];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut word).unwrap();
    let busy = bed.fails(&format!("umount {dir}"));
    assert!(
        busy.contains("files are open below it\nhint: close the files"),
        "{busy}"
    );
    drop(holder.stdin.take());
    holder.wait().unwrap();
    assert_eq!(bed.ok(&format!("umount {dir}")), "");
    assert!(!is_mounted(&dir));
    assert_ended(pid);
    assert!(traces(&bed).is_empty(), "{:?}", traces(&bed));
    let nothing = bed.fails(&format!("umount {dir}"));
    assert!(
        nothing.contains("nothing of hearth is mounted here\nhint: `hearth status`"),
        "{nothing}"
    );
    assert!(
        bed.fails(&format!("status {dir}"))
            .contains("nothing of hearth is mounted on")
    );

    // Without its origin, what is warm is mounted all the same.
    drop(web.server);
    bed.ok(&format!("mount {model} {dir}"));
    assert_same(&dir, &web.root.path().join("m"));
    assert_eq!(
        bed.json(&format!("status {dir} --json"))["mount"]["reads"],
        0
    );
    bed.ok(&format!("umount --lazy {dir}"));
    let log = traces(&bed);
    assert_eq!(log.len(), 1);
    assert!(log[0].1.contains("cannot be reached"), "{log:?}");
}

#[test]
fn a_killed_server_can_be_replaced() {
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 8, 1);
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount {model} {dir}"));
    let pid = bed.wait_complete(&dir)["pid"].as_u64().unwrap();
    let pid = nix::unistd::Pid::from_raw(pid as i32);
    nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    assert_ended(pid.as_raw() as u64);
    assert_same(&dir, &web.path("m"));
    let next = bed.json(&format!("status {dir} --json"));
    assert_eq!(next["restarts"], 1);
    // Without its keeper there is nobody to do that.
    for process in ["keeper_pid", "pid"] {
        let pid = next[process].as_u64().unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
        assert_ended(pid);
    }
    let orphan = bed.fails(&format!("status {dir}"));
    assert!(
        orphan.contains("is mounted, but no process of the store"),
        "{orphan}"
    );
    assert!(orphan.contains("hint: `hearth umount DIR`"), "{orphan}");
    bed.ok(&format!("umount {dir}"));
    bed.ok(&format!("mount {model} {dir}"));
    assert_same(&dir, &web.path("m"));
    // Asked to end, it unmounts by itself.
    let pid = bed.json(&format!("status {dir} --json"))["pid"]
        .as_u64()
        .unwrap();
    let pid = nix::unistd::Pid::from_raw(pid as i32);
    nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
    assert_ended(pid.as_raw() as u64);
    assert!(!is_mounted(&dir));
    wait_until("cleaned", || traces(&bed).is_empty());
}

#[test]
fn places_that_cannot_be_mounted_on() {
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 8, 1);
    let missing = bed.path("missing");
    let file = bed.path("file");
    fs::write(&file, "").unwrap();
    for (place, why) in [(missing, "No such file"), (file, "not a directory")] {
        let error = bed.fails(&format!("mount {model} {}", place.display()));
        assert!(
            error.contains(why) && error.contains("hint: give an existing directory"),
            "{error}"
        );
        assert_eq!(error.lines().count(), 2, "{error}");
    }
    assert!(
        web.asked().is_empty(),
        "nobody is asked before that is known"
    );
    let dir = bed.mount_dir("mnt");
    let error = bed.fails(&format!("mount {} {dir}", web.url("nothing")));
    assert!(
        error.contains("error: cannot resolve") && error.contains("404"),
        "{error}"
    );
    assert!(error.starts_with("error: "), "{error}");
    let error = bed.fails(&format!("mount --layout hub {model} {dir}"));
    assert!(
        error.contains("--layout hub is for hf:// references"),
        "{error}"
    );
    assert!(!is_mounted(&dir));
    assert!(traces(&bed).is_empty(), "{:?}", traces(&bed));
    // A path with blanks, relative, through a link.
    let odd = bed.path("a dir with ünicode");
    fs::create_dir(&odd).unwrap();
    let link = bed.path("link");
    std::os::unix::fs::symlink(&odd, &link).unwrap();
    let here = |line: &str| {
        let mut command = bed.command(line);
        command.current_dir(bed.dir.path());
        command
    };
    Done::of(here(&format!("mount {model}")).arg("a dir with ünicode")).ok();
    assert_same(odd.to_str().unwrap(), &web.path("m"));
    Done::of(here("umount").arg("./a dir with ünicode/")).ok();
    Done::of(&mut here(&format!("mount {model} link"))).ok();
    assert!(Done::of(&mut here("status link")).ok().contains("here ("));
    Done::of(&mut here("umount link")).ok();
    assert!(traces(&bed).is_empty(), "{:?}", traces(&bed));
}

#[test]
fn without_fill_only_what_is_read_is_fetched() {
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 24, 2);
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount --no-fill {model} {dir}"));
    let shard = "model-00002-of-00002.safetensors";
    let read = "import os, sys; f = os.open(sys.argv[1], 0); os.posix_fadvise(f, 0, 0, 1); \
                sys.stdout.buffer.write(os.pread(f, 4096, 9 << 20))";
    let output = python(read, &[&format!("{dir}/{shard}")]).output().unwrap();
    let body = fs::read(web.path("m").join(shard)).unwrap();
    assert!(output.status.success() && output.stdout == body[9 << 20..][..4096]);
    std::thread::sleep(Duration::from_millis(500));
    let content = web.content();
    assert!(
        content.iter().all(|a| a.path.ends_with(shard)),
        "{content:?}"
    );
    assert!(web.sent() <= 2 << 20, "{content:?}");
    let status = bed.json(&format!("status {dir} --json"));
    assert_eq!(status["complete"], false);
    assert!(status["present_bytes"].as_u64().unwrap() <= 2 << 20);
    bed.ok(&format!("umount {dir}"));
}

#[test]
fn in_the_foreground_a_signal_unmounts() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let bed = Bed::new();
        let web = Web::slow("2m");
        let model = web.model("m", 8, 1);
        let dir = bed.mount_dir("mnt");
        let mut server = bed.start(&format!("mount --foreground {model} {dir}"));
        wait_until("mounted", || is_mounted(&dir));
        Done::of(&mut tool(
            "head",
            &["-c", "100", &format!("{dir}/config.json")],
        ))
        .ok();
        assert!(server.runs());
        server.signal(signal);
        let done = server.done();
        assert_eq!(done.code, Some(0), "{done:?}");
        assert!(
            done.err.contains(&format!("mounted {model} on {dir}")),
            "{done:?}"
        );
        assert!(!is_mounted(&dir));
        assert!(traces(&bed).is_empty(), "{:?}", traces(&bed));
    }
}

#[test]
fn a_user_mounts_by_the_helper() {
    fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
    let bed = Bed::new();
    let web = Web::slow("4m");
    let model = web.model("m", 8, 1);
    fs::set_permissions(bed.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let program = bed.path("hearth");
    fs::copy(env!("CARGO_BIN_EXE_hearth"), &program).unwrap();
    let nobody = |arguments: &[&str]| {
        let mut command = tool(
            "setpriv",
            &["--reuid=65534", "--regid=65534", "--clear-groups"],
        );
        command
            .args(arguments)
            .env("HOME", bed.dir.path())
            .current_dir("/");
        command
            .env_remove("XDG_CACHE_HOME")
            .env_remove("HEARTH_STORE");
        Done::of(&mut command)
    };
    let hearth = program.to_str().unwrap();
    let dir = bed.path("mnt");
    let dir = dir.to_str().unwrap();
    nobody(&["mkdir", dir]).ok();
    nobody(&[hearth, "mount", &model, dir]).ok();
    assert!(
        bed.path(".cache/hearth/hearth.json").exists(),
        "the store of a user"
    );
    let shard = "model-00001-of-00001.safetensors";
    let sum = nobody(&["sha256sum", &format!("{dir}/{shard}")]).ok();
    let body = fs::read(web.path("m").join(shard)).unwrap();
    assert!(
        sum.starts_with(&hearth::digest::Digest::of(&body).hex()),
        "{sum}"
    );
    let status = nobody(&[hearth, "status", "--json", dir]).ok();
    let status: Value = serde_json::from_str(&status).unwrap();
    nobody(&[hearth, "umount", dir]).ok();
    assert!(!is_mounted(dir));
    assert_ended(status["pid"].as_u64().unwrap());
    // A store of root is not for them, and they are told.
    bed.ok("list");
    let store = bed.store();
    let denied = nobody(&[hearth, "--store", store.to_str().unwrap(), "list"]).failed(1);
    assert!(
        denied.contains("Permission denied") && denied.contains("hint: run as"),
        "{denied}"
    );
    // Without the device it is said what is missing.
    let hide = format!("mount -t tmpfs none /dev && exec {hearth} mount {model} {dir}");
    let none = Done::of(&mut tool("unshare", &["-m", "bash", "-c", &hide])).failed(1);
    assert!(
        none.contains("/dev/fuse") && none.contains("hint: load the kernel module"),
        "{none}"
    );
}

#[test]
fn who_is_interrupted_gets_no_mount() {
    // It says that it was asked, and answers when it may.
    const SLOW: &str = "import os, sys, time, http.server as h\n\
                        class S(h.SimpleHTTPRequestHandler):\n \
                        def do_GET(self):\n  open('../asked', 'w').close()\n  \
                        while not os.path.exists('../go'): time.sleep(0.01)\n  \
                        super().do_GET()\n\
                        h.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), S).serve_forever()";
    let bed = Bed::new();
    let root = bed.path("root");
    write_model(&root, 1, 1, 1);
    let slow = servers::python(|port, _| {
        vec![
            "-c".into(),
            format!("import os; os.chdir({root:?})\n{SLOW}"),
            port.to_string(),
        ]
    });
    let dir = bed.mount_dir("mnt");
    let mount = bed.start(&format!("mount {}/ {dir}", slow.url()));
    wait_until("asked", || bed.path("asked").exists());
    mount.signal(Signal::SIGINT);
    assert_ne!(mount.done().code, Some(0));
    // The process in the background notices when it has resolved: then it is gone.
    let pattern = format!("tell-parent.*{dir}");
    let serves = || {
        let found = Command::new("pgrep")
            .args(["-f", &pattern])
            .output()
            .unwrap();
        found.status.success()
    };
    assert!(serves(), "it was interrupted too late");
    fs::write(bed.path("go"), "").unwrap();
    wait_until("gone", || !serves());
    assert!(!is_mounted(&dir));
    wait_until("cleaned", || traces(&bed).is_empty());
}

#[test]
fn a_umount_half_way_keeps_what_has_arrived() {
    let bed = Bed::new();
    let mut web = Web::slow("400k");
    let origin = web.gate();
    let model = web.model("m", 12, 2);
    let size = total_size(&web.path("m"));
    let dir = bed.mount_dir("mnt");
    // More than that and a part of a chunk on each connection, and less than all.
    origin.hold_after(41 << 19);
    bed.ok(&format!("mount {model} {dir}"));
    let here = || {
        bed.json(&format!("status {dir} --json"))["present_bytes"]
            .as_u64()
            .unwrap()
    };
    wait_until("half way", || here() > 4 << 20);
    let pid = bed.json(&format!("status {dir} --json"))["pid"]
        .as_u64()
        .unwrap();
    bed.ok(&format!("umount {dir}"));
    assert_ended(pid);
    assert!(traces(&bed).is_empty(), "{:?}", traces(&bed));
    let kept = bed.json("list --json")[0]["present_bytes"]
        .as_u64()
        .unwrap();
    assert!(kept > 4 << 20 && kept < size, "{kept}");
    origin.settle();
    // Killed half way, it is no different.
    let before = origin.passed();
    origin.hold_after(1 << 20);
    bed.ok(&format!("mount {model} {dir}"));
    wait_until("on the way", || origin.passed() > before);
    let pid = bed.json(&format!("status {dir} --json"))["pid"]
        .as_u64()
        .unwrap();
    let pid = nix::unistd::Pid::from_raw(pid as i32);
    nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    assert_ended(pid.as_raw() as u64);
    bed.ok(&format!("umount {dir}"));
    origin.release();
    bed.ok(&format!("mount {model} {dir}"));
    assert_same(&dir, &web.path("m"));
    bed.wait_complete(&dir);
    bed.ok(&format!("umount {dir}"));
    let sent = origin.passed() - before;
    assert!(sent < size - kept + (10 << 20), "{sent} of {}", size - kept);
    bed.ok("verify --all");
}

/// Something of a mount is open when it is detached: it goes on for whoever has it open, and the directory is free for
/// another, which is not taken for it.
#[test]
fn a_detached_mount_and_another_in_its_place() {
    const SCRIPT: &str = r"
import sys
f = open(sys.argv[1], 'rb', buffering=0)
print('open', flush=True); sys.stdin.read()
assert f.readall() == open(sys.argv[2], 'rb').read()
print('same')
";
    let bed = Bed::new();
    let web = Web::slow("2m");
    let (one, two) = (web.model("one", 8, 1), web.model("two", 2, 2));
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount --no-fill {one} {dir}"));
    let before = bed.json(&format!("status {dir} --json"));
    let shard = "model-00001-of-00001.safetensors";
    let truth = web.path("one").join(shard);
    let mut reader = python(
        SCRIPT,
        &[&format!("{dir}/{shard}"), truth.to_str().unwrap()],
    );
    let mut reader = reader
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut word = [0; 5];
    std::io::Read::read_exact(reader.stdout.as_mut().unwrap(), &mut word).unwrap();
    bed.ok(&format!("umount --lazy {dir}"));
    assert!(!is_mounted(&dir));

    bed.ok(&format!("mount {two} {dir}"));
    assert_same(&dir, &web.path("two"));
    let after = bed.json(&format!("status {dir} --json"));
    assert_ne!(after["keeper_pid"], before["keeper_pid"]);
    drop(reader.stdin.take());
    let read = Done::from("reader".into(), reader.wait_with_output().unwrap());
    assert!(read.out.ends_with("same\n"), "{read:?}");
    // What the first one leaves behind is not what the second one needs.
    for process in ["keeper_pid", "pid"] {
        assert_ended(before[process].as_u64().unwrap());
    }
    assert_eq!(
        bed.json(&format!("status {dir} --json"))["pid"],
        after["pid"]
    );
    bed.ok(&format!("umount {dir}"));
    assert_ended(after["keeper_pid"].as_u64().unwrap());
    let traces = traces(&bed);
    assert!(
        traces
            .iter()
            .all(|(file, _)| file.extension().is_some_and(|e| e == "log")),
        "{traces:?}"
    );
}
