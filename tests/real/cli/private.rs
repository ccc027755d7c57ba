//! What other users of the machine are kept from, and with what rights hearth makes do.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use super::{csi::wait_for, *};

/// Connects to a unix socket, of streams or of packets, sends argv[2], and prints how many bytes came back.
const CONNECT: &str = r#"
import errno, socket, sys
def connect(kind):
    s = socket.socket(socket.AF_UNIX, kind)
    s.settimeout(20)
    s.connect(sys.argv[1])
    return s
try:
    s = connect(socket.SOCK_STREAM)
except OSError as error:
    if error.errno != errno.EPROTOTYPE: raise
    s = connect(socket.SOCK_SEQPACKET)
try:
    if sys.argv[2]: # who answers without being asked may have closed by now
        s.sendall(bytes.fromhex(sys.argv[2]))
    came = s.recv(1000)
    # Who is asked nothing answers in as many pieces as it likes, and closes.
    while not sys.argv[2] and (more := s.recv(1000)):
        came += more
    print(len(came))
except (BrokenPipeError, ConnectionResetError):
    print(0)
"#;

/// Bytes that a socket answers to user `uid`.
fn answered(socket: &Path, said: &str, uid: u32) -> u64 {
    let user = [format!("--reuid={uid}"), format!("--regid={uid}")];
    let python = ["/usr/bin/python3", "-c", CONNECT];
    let socket = socket.to_str().unwrap();
    let arguments = [&user[0], &user[1], "--clear-groups", "--"];
    let arguments: Vec<&str> = (arguments.into_iter().chain(python))
        .chain([socket, said])
        .collect();
    let out = Done::of(&mut tool("setpriv", &arguments)).ok();
    out.trim().parse().unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// Lets everybody at a path: as if somebody had meant well.
fn open_up(path: &Path, up_to: &Path) {
    let all = fs::Permissions::from_mode(0o777);
    for path in path.ancestors().take_while(|path| path.starts_with(up_to)) {
        fs::set_permissions(path, all.clone()).unwrap();
    }
}

#[test]
fn stores_and_sockets_are_private() {
    let web = Web::new();
    let url = web.model("model", 1, 1);
    let bed = Bed::new();
    // A directory that somebody else has made; and one that an older version may have.
    fs::create_dir_all(bed.store().join("run")).unwrap();
    open_up(&bed.store().join("run"), &bed.store());
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount {url} {dir}"));
    bed.wait_complete(&dir);
    let mut dirs = 0;
    for entry in fs::read_dir(bed.store()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            assert_eq!(mode(&path), 0o700, "{}", path.display());
            dirs += 1;
        }
    }
    assert!(dirs > 4, "the parts of a store were seen");
    let run = files_in(&bed.store().join("run"));
    let socket = run
        .iter()
        .find(|path| path.extension() == Some("sock".as_ref()));
    let socket = socket.expect("a control socket");
    assert_eq!(mode(socket), 0o600);

    open_up(socket, bed.dir.path());
    let here = answered(socket, "", 0);
    assert!(here > 100, "{here} bytes");
    assert_eq!(answered(socket, "", 65534), 0, "only root and the owner");
    bed.ok(&format!("umount {dir}"));
}

fn files_in(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn the_snapshotter_answers_nobody_but_root() {
    /// The preface of HTTP/2 and empty settings (RFC 9113, 3.4).
    const HELLO: &str = "505249202a20485454502f322e300d0a0d0a534d0d0a0d0a000000040000000000";
    let bed = Bed::new();
    let (socket, root) = (bed.path("run/h.sock"), bed.path("snapshots"));
    let (at, root_at) = (socket.display(), root.display());
    let _running = bed.start(&format!("snapshotter --address {at} --root {root_at}"));
    let begun = Instant::now();
    while !socket.exists() {
        assert!(begun.elapsed() < HANG);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(mode(&socket), 0o600);
    // As with containerd's own: who is in a container may have to pass through.
    assert_eq!(mode(&root), 0o711);
    assert_eq!(mode(&root.join("s")), 0o711);
    assert_eq!(mode(&root.join("m")), 0o700);
    open_up(&socket, bed.dir.path());
    assert!(answered(&socket, HELLO, 0) > 0);
    assert_eq!(answered(&socket, HELLO, 65534), 0);
}

#[test]
fn keeper_and_agent_hand_nothing_to_others() {
    let bed = Bed::new();
    let (keeper, agent) = (bed.path("run/keeper.sock"), bed.path("run/agent.sock"));
    let _keeper = bed.start(&format!("keeper --socket {}", keeper.display()));
    let config = bed.path("config.toml");
    let text = format!(
        "[agent]\nsocket = '{}'\nnode_name = 'n'\n[admin]\nenabled = false\n\
         [mirror]\nenabled = true\naddress = '127.0.0.1:{}'\n",
        agent.display(),
        servers::free_port()
    );
    fs::write(&config, text).unwrap();
    let _agent = bed.start(&format!("--config {} agent", config.display()));
    let hello = r#"{"Hello":{"protocol":1,"version":"x","store":"y"}}"#;
    let hello: String = hello.bytes().map(|byte| format!("{byte:02x}")).collect();
    for socket in [keeper, agent] {
        wait_for("listens", || socket.exists());
        assert_eq!(mode(&socket), 0o600);
        open_up(&socket, bed.dir.path());
        assert!(answered(&socket, &hello, 0) > 0, "{}", socket.display());
        assert_eq!(answered(&socket, &hello, 65534), 0, "{}", socket.display());
    }
}

/// `SECURITY.md` says which capability is for what.
#[test]
fn a_mount_needs_one_capability_and_a_pull_none() {
    let web = Web::new();
    let url = web.model("model", 1, 1);
    let bed = Bed::new();
    let with = |capabilities: &str, line: &str| {
        let plain = bed.command(line);
        let mut command = Command::new("setpriv");
        let sets = format!("-all{capabilities}");
        command
            .arg(format!("--inh-caps={sets}"))
            .arg(format!("--bounding-set={sets}"))
            .args(["--no-new-privs", "--"])
            .arg(plain.get_program())
            .args(plain.get_args());
        for (key, value) in plain.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        Done::of(&mut command)
    };
    for line in [
        format!("warm {url}"),
        "list".into(),
        "verify --all".into(),
        "gc --target-bytes 0".into(),
    ] {
        with("", &line).ok();
    }
    let dir = bed.mount_dir("mnt");
    with(",+sys_admin", &format!("mount {url} {dir}")).ok();
    let status = bed.wait_complete(&dir);
    assert_same(&dir, &web.path("model"));
    assert!(
        bed.json(&format!("status {dir} --json"))["mount"]["passthrough_opens"]
            .as_u64()
            .unwrap()
            > 0,
        "{status}"
    );
    with(",+sys_admin", &format!("umount {dir}")).ok();
}
