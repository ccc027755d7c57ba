//! `hearth demo`: what a newcomer runs first.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

fn rows(text: &str) -> [(f64, f64); 3] {
    let rows: Vec<Value> = serde_json::from_str(text).unwrap();
    let ways: Vec<_> = rows.iter().map(|r| r["way"].as_str().unwrap()).collect();
    assert!(
        ways[0].starts_with("eager") && ways[1].contains("mount") && ways[2].contains("warm"),
        "{ways:?}"
    );
    let time = |row: &Value, what: &str| row[what].as_f64().unwrap();
    [0, 1, 2].map(|n| {
        (
            time(&rows[n], "first_tensor_seconds"),
            time(&rows[n], "whole_model_seconds"),
        )
    })
}

fn leaves_nothing(temp: &Path) {
    assert_eq!(
        fs::read_dir(temp).unwrap().count(),
        0,
        "{:?}",
        files_below(temp)
    );
    let list = hearth::mount::mounted().unwrap();
    assert!(list.iter().all(|m| !m.mountpoint.starts_with(temp)));
}

#[test]
fn the_demo_shows_its_table_and_cleans_up() {
    let bed = Bed::new();
    let temp = bed.path("tmp");
    fs::create_dir(&temp).unwrap();
    let demo = |line: &str| {
        let mut command = bed.command(line);
        command.env("TMPDIR", &temp);
        command
    };
    // A link so slow that no load on this machine turns the order round.
    let [eager, cold, warm] = rows(&Done::of(&mut demo("demo --size 16 --mbit 25 --json")).ok());
    assert!(cold.0 < eager.1 / 2.0, "cold {cold:?}, eager {eager:?}");
    assert!(warm.1 < eager.1 / 2.0, "warm {warm:?}, eager {eager:?}");
    leaves_nothing(&temp);
    assert!(!bed.store().exists(), "it has its own store");

    // It needs no network, so no proxy either.
    let mut command = demo("demo --size 8 --mbit 400");
    command
        .env("http_proxy", "http://127.0.0.1:1")
        .env_remove("no_proxy")
        .env_remove("NO_PROXY");
    let table = Done::of(&mut command).ok();
    for part in [
        "FIRST TENSOR",
        "WHOLE MODEL",
        "eager: download, then load",
        "8 MiB model over 400 Mbit/s",
    ] {
        assert!(table.contains(part), "{part}: {table}");
    }
    Done::of(&mut demo("demo --size 1")).failed(2);
    // Interrupted half way.
    let mut command = demo("demo --size 64 --mbit 50");
    let mut direct = Command::new(env!("CARGO_BIN_EXE_hearth"));
    direct.args(command.get_args().skip(2)).env("TMPDIR", &temp);
    let running = Running::of(&mut direct);
    let is_of = |file: &PathBuf| file.to_str().unwrap().contains("/download/");
    mounts::wait_until("half way", || files_below(&temp).iter().any(is_of));
    running.signal(nix::sys::signal::Signal::SIGTERM);
    let done = running.done();
    assert_eq!(done.code, Some(143), "{done:?}");
    leaves_nothing(&temp);
    command.env("PATH", "/usr/bin:/bin");

    // As a user; and where there is no FUSE.
    fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
    for dir in [bed.dir.path(), &temp] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let program = bed.path("hearth");
    fs::copy(env!("CARGO_BIN_EXE_hearth"), &program).unwrap();
    let mut user = tool(
        "setpriv",
        &["--reuid=65534", "--regid=65534", "--clear-groups"],
    );
    user.arg(&program)
        .args(["demo", "--size", "16", "--mbit", "25", "--json"]);
    user.env("TMPDIR", &temp)
        .env("HOME", bed.dir.path())
        .current_dir("/");
    let [eager, cold, _] = rows(&Done::of(&mut user).ok());
    assert!(cold.0 < eager.1 / 2.0, "cold {cold:?}, eager {eager:?}");
    leaves_nothing(&temp);
    let hide = format!(
        "mount -t tmpfs none /dev && exec {} demo",
        program.display()
    );
    let none = Done::of(&mut tool("unshare", &["-m", "bash", "-c", &hide])).failed(1);
    assert!(
        none.contains("error: the demo mounts a model, which needs FUSE"),
        "{none}"
    );
    assert!(
        none.contains("/dev/fuse") && none.contains("\nhint: load the kernel module"),
        "{none}"
    );
}
