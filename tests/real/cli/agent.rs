//! `hearth agent`: all faces in one process; probes; a new one that takes over from an old one while readers and
//! clients go on; refusals that leave the old one serving; the service manager as keeper.

mod spans;

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
};

use nix::sys::signal::Signal;

use super::{
    csi::{Csi, connections, wait_for},
    survive::Reader,
    *,
};

/// An agent with all faces, and where they are.
struct Agent {
    csi: Csi,
    admin: u16,
    mirror: u16,
}

/// A configuration with all faces, below `bed`.
fn config(bed: &Bed, admin: u16, mirror: u16) -> String {
    let at = |name: &str| bed.path(name).display().to_string();
    format!(
        "[agent]\nnode_name = 'n'\nsocket = '{}'\n[admin]\naddress = '127.0.0.1:{admin}'\n\
         [csi]\nenabled = true\nendpoint = 'unix://{}'\n\
         [snapshotter]\nenabled = true\naddress = '{}'\n\
         [mirror]\nenabled = true\naddress = '127.0.0.1:{mirror}'\n",
        at("agent.sock"),
        at("csi.sock"),
        at("snapshotter.sock"),
    )
}

impl Agent {
    fn new() -> Self {
        Self::with("")
    }

    /// With `more` in the configuration.
    fn with(more: &str) -> Self {
        let bed = Bed::new();
        let (admin, mirror) = (servers::free_port(), servers::free_port());
        let path = bed.path("config.toml");
        fs::write(&path, config(&bed, admin, mirror) + more).unwrap();
        bed.ok(&format!("--config {} config --check", path.display()));
        let options = format!("--config {} -v agent", path.display());
        let csi = Csi::by(bed, true, options);
        let agent = Self { csi, admin, mirror };
        wait_for("ready", || agent.get("/readyz").0 == 200);
        agent
    }

    fn get(&self, path: &str) -> (u16, String) {
        get(self.admin, path).unwrap()
    }

    /// Another agent, which is to take the place of this one.
    fn next(&self) -> Running {
        self.csi.bed.start(&self.csi.options)
    }

    /// Starts another one and waits until the old one has ended.
    fn upgrade(&mut self) {
        let next = self.next();
        let old = self.csi.server.replace(next).unwrap();
        let done = old.done();
        assert_eq!(done.code, Some(0), "{done:?}");
        assert!(done.err.contains("handed over"), "{done:?}");
    }

    /// One that is to fail, and does.
    fn refused(&mut self) -> String {
        let before = self.csi.pid();
        let refused = self.next().done().failed(1);
        assert!(self.csi.server.as_mut().unwrap().runs());
        assert_eq!(self.csi.pid(), before);
        wait_for("ready again", || self.get("/readyz").0 == 200);
        assert!(self.csi.try_node().is_some());
        refused
    }
}

/// What an HTTP server of this machine answers.
pub(super) fn get(port: u16, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| std::io::Error::other(format!("no answer: {head:?}")))?;
    Ok((status, body.to_owned()))
}

/// Does something again and again, and counts; any failure is for [`Client::done`].
pub(super) struct Client(Arc<AtomicBool>, JoinHandle<Result<u64, String>>);

impl Client {
    pub(super) fn start(act: impl Fn() -> Result<(), String> + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut times = 0;
            while !stopped.load(Relaxed) {
                act()?;
                times += 1;
            }
            Ok(times)
        });
        Self(stop, thread)
    }

    pub(super) fn done(self) -> u64 {
        self.0.store(true, Relaxed);
        self.1.join().unwrap().unwrap()
    }
}

#[test]
fn one_process_has_all_faces() {
    let web = Web::slow("4m");
    let model = web.model("m", 4, 1);
    let mut agent = Agent::new();
    let (status, text) = agent.get("/readyz");
    let ready = "admin: serving\ncsi: serving\nmirror: serving\nsnapshotter: serving\n";
    assert_eq!((status, &*text), (200, ready));
    assert_eq!(agent.get("/healthz"), (200, "ok\n".into()));
    assert_eq!(get(agent.mirror, "/v2/").unwrap().0, 200);
    UnixStream::connect(agent.csi.bed.path("snapshotter.sock")).unwrap();
    let target = agent.csi.publish("v", &model);
    assert_same(&target, &web.path("m"));
    let (_, metrics) = agent.get("/metrics");
    assert!(metrics.contains("\nhearth_csi_volumes 1\n"), "{metrics}");

    // Told to end, it leaves the mount to the keeper, and nothing else.
    agent.csi.stop(Signal::SIGTERM);
    for gone in ["csi.sock", "snapshotter.sock", "agent.sock"] {
        assert!(!agent.csi.bed.path(gone).exists(), "{gone}");
    }
    assert!(get(agent.admin, "/healthz").is_err());
    assert_eq!(connections(&target).len(), 1);
    agent.csi.start();
    assert_same(&target, &web.path("m"));
    agent.csi.unpublish("v");
    agent.csi.stop(Signal::SIGTERM);
}

#[test]
fn a_face_that_cannot_start_is_named() {
    let bed = Bed::new();
    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (admin, mirror) = (servers::free_port(), busy.local_addr().unwrap().port());
    let path = bed.path("config.toml");
    fs::write(&path, config(&bed, admin, mirror)).unwrap();
    let said = bed.fails(&format!("--config {} agent", path.display()));
    assert!(
        said.contains("face mirror\n  caused by: cannot listen on 127.0.0.1:")
            && said.contains("Address already in use"),
        "{said}"
    );
    for gone in ["csi.sock", "snapshotter.sock", "agent.sock"] {
        assert!(!bed.path(gone).exists(), "{gone}");
    }
    fs::write(&path, "[admin]\nenabled = false\n").unwrap();
    let said = bed.fails(&format!("--config {} agent", path.display()));
    assert!(said.contains("no face is enabled"), "{said}");
}

#[test]
fn a_new_agent_takes_over_while_readers_and_clients_go_on() {
    let web = Web::slow("1m");
    let model = web.model("m", 12, 2);
    let mut agent = Agent::new();
    let target = agent.csi.publish("v", &model);
    let connection = connections(&target);
    let hows = ["sequential", "random_reads", "mapped", "metadata"];
    let readers: Vec<_> = (1..)
        .zip(hows)
        .map(|(seed, how)| Reader::start(&target, &web.path("m"), how, seed))
        .collect();
    let (admin, mirror) = (agent.admin, agent.mirror);
    let ask = |port: u16, path: &'static str| {
        Client::start(move || match get(port, path) {
            Ok((200, _)) => Ok(()),
            other => Err(format!("{path}: {other:?}")),
        })
    };
    let socket = agent.csi.bed.path("snapshotter.sock");
    let connects = move || {
        let connected = UnixStream::connect(&socket).map(drop);
        std::thread::sleep(Duration::from_millis(1));
        connected.map_err(|e| format!("snapshotter: {e}"))
    };
    let clients = [
        ask(admin, "/healthz"),
        ask(mirror, "/v2/"),
        Client::start(connects),
    ];
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(300));
        agent.upgrade();
        // The driver that answers now knows the volume.
        assert_eq!(agent.csi.publish("v", &model), target);
    }
    for reader in readers {
        assert!(reader.done() > 0);
    }
    for client in clients {
        assert!(client.done() > 0);
    }
    assert_eq!(connections(&target), connection, "mounted once");
    assert_same(&target, &web.path("m"));
    assert_eq!(agent.get("/readyz").0, 200);
    agent.csi.unpublish("v");
    agent.csi.assert_empty();
    agent.csi.stop(Signal::SIGTERM);
}

#[test]
fn one_that_cannot_take_over_leaves_the_old_one_serving() {
    let web = Web::slow("1m");
    let model = web.model("m", 12, 1);
    let mut agent = Agent::new();
    let target = agent.csi.publish("v", &model);
    let readers =
        ["random_reads", "metadata"].map(|how| Reader::start(&target, &web.path("m"), how, 1));

    // A session of another version.
    let pid = agent.csi.pid();
    let memory = session_memory(pid);
    let format = |number: u32| {
        use std::os::unix::fs::FileExt as _;
        let file = fs::OpenOptions::new().write(true).open(&memory).unwrap();
        file.write_all_at(&number.to_ne_bytes(), 8).unwrap();
    };
    format(9);
    let said = agent.refused();
    assert!(
        said.contains("a mount that this version cannot serve") && said.contains("of format 9"),
        "{said}"
    );
    format(1);

    // One that gets everything handed over, and fails then.
    let config_at = agent.csi.bed.path("config.toml");
    let good = fs::read_to_string(&config_at).unwrap();
    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let bad = config(
        &agent.csi.bed,
        agent.admin,
        busy.local_addr().unwrap().port(),
    );
    fs::write(&config_at, bad).unwrap();
    let said = agent.refused();
    assert!(said.contains("face mirror\n"), "{said}");
    assert_eq!(get(agent.mirror, "/v2/").unwrap().0, 200);
    fs::write(&config_at, good).unwrap();

    for reader in readers {
        assert!(reader.done() > 0);
    }
    assert_same(&target, &web.path("m"));
    agent.upgrade();
    assert_same(&target, &web.path("m"));
    agent.csi.unpublish("v");
    agent.csi.stop(Signal::SIGTERM);
}

/// A volume that is to be complete is waited for at the old agent, and then at the new one.
#[test]
fn who_waits_for_a_whole_volume_asks_the_new_agent_again() {
    let web = Web::slow("512k");
    let model = web.model("m", 4, 1);
    let mut agent = Agent::new();
    let asked = agent
        .csi
        .asked("v", &[("source", &model), ("mode", "complete")]);
    let target = asked.target_path.clone();
    let waiting = agent.csi.start_publishing(asked);
    wait_for("begun", || {
        let (_, metrics) = agent.get("/metrics");
        metrics.contains("\nhearth_mount_mounts 1\n")
    });
    agent.upgrade();
    let told = waiting.join().unwrap().unwrap_err();
    assert_eq!(told.code(), tonic::Code::Unavailable, "{told}");
    let asked = agent
        .csi
        .asked("v", &[("source", &model), ("mode", "complete")]);
    agent.csi.start_publishing(asked).join().unwrap().unwrap();
    drop(web.server);
    assert_same(&target, &web.root.path().join("m"));
    agent.csi.unpublish("v");
    agent.csi.stop(Signal::SIGTERM);
}

/// The memory of the one session that process `pid` serves.
fn session_memory(pid: u32) -> PathBuf {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let mut files = files.map(|file| file.unwrap().path());
    let is_memory = |file: &PathBuf| {
        fs::read_link(file).is_ok_and(|to| to.to_string_lossy().contains("hearth-session"))
    };
    files.find(is_memory).unwrap()
}

#[test]
fn other_versions_are_refused_on_both_sides() {
    const ASK: &str = r#"
import json, socket, sys
def ask(*messages):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.settimeout(20)
    s.connect(sys.argv[1])
    for m in messages: s.send(m if isinstance(m, bytes) else json.dumps(m).encode())
    return s.recv(1 << 20).decode()
print(ask({'Hello': {'protocol': 99, 'version': '9.9', 'store': 's'}}))
print(ask({'Hello': {'protocol': 1, 'version': '0.1', 'store': 's'}}))
print(ask('HandOver'))
print(repr(ask(b'nonsense')))
"#;
    // An agent of a later version, which leaves what this one does not know.
    const LATER: &str = r#"
import json, os, socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.bind(sys.argv[1]); s.listen(1)
print('listens', flush=True)
for states in ({'session': 2}, {'session': 1, 'dreams': 1}):
    c, _ = s.accept()
    assert 'Hello' in json.loads(c.recv(1 << 20))
    c.send(json.dumps({'Welcome': {'version': '9.9', 'process': 1, 'states': states, 'kept': True, 'network': 1}}).encode())
    assert c.recv(1 << 20) == b'', 'asked for more'
print('done')
"#;
    let mut agent = Agent::new();
    let door = agent.csi.bed.path("agent.sock");
    let said = Done::of(&mut python(ASK, &[door.to_str().unwrap()])).ok();
    let lines: Vec<_> = said.lines().collect();
    assert!(lines[0].contains("hearth 9.9 speaks protocol 99"), "{said}");
    assert!(lines[1].contains("has another store"), "{said}");
    assert!(lines[2].contains("speak up first"), "{said}");
    assert_eq!(lines[3], "''", "who is not understood is dropped");
    assert_eq!(agent.get("/readyz").0, 200);
    agent.upgrade();
    agent.csi.stop(Signal::SIGTERM);

    let mut later = python(LATER, &[door.to_str().unwrap()]);
    let mut later = later.stdout(Stdio::piped()).spawn().unwrap();
    let mut word = [0; 8];
    later
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut word)
        .unwrap();
    let said = agent.next().done().failed(1);
    assert!(
        said.contains("state (session) of format 2, this version knows 1"),
        "{said}"
    );
    let said = agent.next().done().failed(1);
    assert!(
        said.contains("state (dreams) of format 1, this version knows none"),
        "{said}"
    );
    assert!(later.wait().unwrap().success());
}

/// The keeper is killed: the agent goes on and says that it is not ready; the next keeper has all of its mounts, and so has
/// the next agent.
#[test]
fn another_keeper_gets_what_the_agent_serves() {
    let web = Web::slow("1m");
    let model = web.model("m", 8, 2);
    let mut agent = Agent::new();
    let target = agent.csi.publish("v", &model);
    let readers =
        ["random_reads", "sequential"].map(|how| Reader::start(&target, &web.path("m"), how, 1));
    for round in 0..2 {
        let keeper = agent.csi.keeper.take().unwrap();
        keeper.signal(Signal::SIGKILL);
        keeper.done();
        wait_for("not ready", || agent.get("/readyz").0 == 503);
        let (_, said) = agent.get("/readyz");
        assert!(said.contains("keeper: starting: "), "{said}");
        let socket = agent.csi.bed.path("keeper.sock");
        let keeper = agent
            .csi
            .bed
            .start(&format!("keeper --socket {}", socket.display()));
        agent.csi.keeper = Some(keeper);
        wait_for("ready again", || agent.get("/readyz").0 == 200);
        let connection = connections(&target);
        match round {
            0 => agent.upgrade(),
            _ => {
                agent.csi.stop(Signal::SIGKILL);
                agent.csi.start();
            }
        }
        assert_eq!(agent.csi.publish("v", &model), target);
        assert_eq!(connections(&target), connection, "it is the same mount");
        let other = agent.csi.publish("w", &model);
        assert_same(&other, &web.path("m"));
        agent.csi.unpublish("w");
    }
    for reader in readers {
        assert!(reader.done() > 0);
    }
    agent.csi.unpublish("v");
    agent.csi.assert_empty();
    agent.csi.stop(Signal::SIGTERM);
}
