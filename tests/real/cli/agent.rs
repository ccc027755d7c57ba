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
    csi::{Csi, closed, connections, password, wait_for},
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

/// A volume with a secret goes on before the secret is told again, also for a namespace that may use nothing of the node's.
#[test]
fn keys_of_volumes_outlive_the_process() {
    let (_passwords, mut web) = closed();
    let origin = web.gate();
    let mut agent = Agent::with("[tenancy]\nnode_credentials = []\n");
    for name in ["killed", "upgraded"] {
        let model = web.model(name, 8, 1);
        let namespace = ("csi.storage.k8s.io/pod.namespace", "theirs");
        let mut asked = agent.csi.asked(name, &[("source", &model), namespace]);
        asked.secrets = password();
        // Hardly anything of it is here.
        origin.hold_after(1 << 20);
        agent.csi.try_publish(asked.clone()).unwrap();
        match name {
            "killed" => {
                agent.csi.stop(Signal::SIGKILL);
                agent.csi.start();
            }
            _ => agent.upgrade(),
        }
        origin.release();
        assert_same(&asked.target_path, &web.path(name));
    }
    for name in ["killed", "upgraded"] {
        agent.csi.unpublish(name);
    }
    agent.csi.assert_empty();
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

/// A container of a pod with nothing but its volumes to write to: the agent in it, until it serves everything and can be
/// asked to hand over.
const POD: &str = r"
import json, os, signal, subprocess, sys, time, urllib.request
root, hearth, volumes, line = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
mount = lambda *how: subprocess.run(['mount', *how], check=True)
subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)
mount('--bind', root, root)
for there in ['usr', 'etc/ssl', 'proc', 'dev']:
    mount('--rbind', '/' + there, root + '/' + there)
mount('--bind', hearth, root + '/hearth')
mount('-o', 'remount,bind,ro', root)
for volume in volumes:
    mount('-t', 'tmpfs', '-o', 'mode=2777,gid=65532', 'none', root + volume)
nobody = ['setpriv', '--reuid=65532', '--regid=65532', '--groups=65532', '--inh-caps=-all', '--bounding-set=-all', '--no-new-privs']
said = {'PATH': '/usr/sbin:/usr/bin', 'POD_NAME': 'p', 'POD_NAMESPACE': 'hearth-system'}
agent = subprocess.Popen(['chroot', root, *nobody, '/hearth', *line], env=said)
def ready():
    try:
        with urllib.request.urlopen('http://127.0.0.1:5701/readyz') as answer:
            return answer.status == 200
    except OSError:
        return False
while not (ready() and os.path.exists(root + '/var/lib/hearth/run/agent.sock')):
    assert agent.poll() is None, agent.returncode
    time.sleep(0.02)
agent.send_signal(signal.SIGTERM)
sys.exit(agent.wait())
";

#[test]
fn pods_without_rights_run_as_their_manifests_say() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset/base");
    for name in ["controller", "provisioner"] {
        let text = fs::read_to_string(base.join(format!("{name}.yaml"))).unwrap();
        let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
        let pod = &documents[0]["spec"]["template"]["spec"];
        assert_eq!(pod["securityContext"]["runAsUser"], 65532);
        let container = &pod["containers"][0];
        let mounts = container["volumeMounts"].as_array().unwrap();
        let mounts = mounts.iter().filter(|mount| mount["readOnly"] != true);
        let volumes: Vec<&str> = mounts.map(|m| m["mountPath"].as_str().unwrap()).collect();
        let bed = Bed::new();
        let root = bed.path("root");
        for dir in ["usr", "etc/ssl", "proc", "dev", "etc/hearth"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        for volume in &volumes {
            fs::create_dir_all(root.join(&volume[1..])).unwrap();
        }
        for link in ["bin", "lib", "lib64"] {
            std::os::unix::fs::symlink(format!("usr/{link}"), root.join(link)).unwrap();
        }
        fs::write(root.join("hearth"), "").unwrap();
        let mut config = fs::read_to_string(base.join(format!("config/{name}.toml"))).unwrap();
        config += "\n[kube.api]\nkubeconfig = '/etc/hearth/kubeconfig'\n";
        fs::write(root.join("etc/hearth/config.toml"), config).unwrap();
        // Nobody answers there: it waits.
        let kubeconfig = serde_json::json!({
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}],
            "users": [{"name": "c", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        });
        fs::write(root.join("etc/hearth/kubeconfig"), kubeconfig.to_string()).unwrap();
        let volumes = serde_json::to_string(&volumes).unwrap();
        let line = container["args"].to_string();
        let hearth = env!("CARGO_BIN_EXE_hearth");
        let inner = python(POD, &[root.to_str().unwrap(), hearth, &volumes, &line]);
        let mut command = Command::new("unshare");
        command.args(["--mount", "--net", "--propagation", "private"]);
        command.arg(inner.get_program()).args(inner.get_args());
        Done::of(&mut command).ok();
    }
}

#[test]
fn an_agent_that_nobody_can_ask_to_hand_over_serves() {
    let bed = Bed::new();
    let path = bed.path("config.toml");
    let (admin, mirror) = (servers::free_port(), servers::free_port());
    let text = config(&bed, admin, mirror);
    let door = bed.path("agent.sock").display().to_string();
    // Nobody can make a directory there.
    fs::write(&path, text.replace(&door, "/proc/none/agent.sock")).unwrap();
    let agent = bed.start(&format!("--config {} agent", path.display()));
    let ready = || get(admin, "/readyz").is_ok_and(|(status, _)| status == 200);
    wait_for("ready", ready);
    agent.signal(Signal::SIGTERM);
    let done = agent.done();
    assert!(
        done.err
            .contains("no other agent can take over from this one"),
        "{done:?}"
    );
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
    let mut web = Web::new();
    let origin = web.gate();
    origin.hold_after(1 << 20);
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
    origin.release();
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
    // An agent of a later version, which leaves what this one does not know; then one of an earlier version, which leaves
    // less than this one would.
    const OTHERS: &str = r#"
import json, os, socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.bind(sys.argv[1]); s.listen(1)
print('listens', flush=True)
for states in ({'session': 2}, {'session': 1, 'dreams': 1}):
    c, _ = s.accept()
    assert 'Hello' in json.loads(c.recv(1 << 20))
    c.send(json.dumps({'Welcome': {'version': '9.9', 'process': 1, 'states': states, 'kept': True, 'network': 1}}).encode())
    assert c.recv(1 << 20) == b'', 'asked for more'
c, _ = s.accept()
assert 'Hello' in json.loads(c.recv(1 << 20))
c.send(json.dumps({'Welcome': {'version': '0.0.1', 'process': 1, 'states': {'store': 1, 'session': 1}, 'kept': True, 'network': 1}}).encode())
assert json.loads(c.recv(1 << 20)) == 'HandOver'
c.send(json.dumps({'Yours': []}).encode())
assert json.loads(c.recv(1 << 20)) == 'Serving'
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

    let mut others = python(OTHERS, &[door.to_str().unwrap()]);
    let mut others = others.stdout(Stdio::piped()).spawn().unwrap();
    let mut word = [0; 8];
    others
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
    agent.csi.start();
    assert!(others.wait().unwrap().success());
    assert_eq!(agent.get("/readyz").0, 200);
    agent.upgrade();
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
