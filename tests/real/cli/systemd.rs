//! The units of `daemonset/systemd` under a real systemd, which keeps the mounts and sockets of the agent.
//!
//! It is process 1 of a PID namespace and has a mount namespace of its own, where its mounts are; so what looks
//! at them is started there.

use std::os::unix::net::UnixStream;

use super::{
    agent::{Client, get},
    csi::{Csi, wait_for},
    namespaces::unkillable,
    survive::Reader,
    *,
};

const UNITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/daemonset/systemd");

/// Boots systemd with the unit of the agent and what is in `$1` besides.
const BOOT: &str = r#"
mount --make-rprivate /
# What other tests have mounted would go on here after they have unmounted it.
tac /proc/self/mountinfo | while read -r _ _ _ _ dir _; do
  case $dir in "$3"/*) ;; "$4"/*) umount -l "$dir" ;; esac
done
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /etc/systemd/system
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir -p /run/systemd/system/hearth.service.d /run/systemd/system/test.target.wants /sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd || mount -t cgroup2 cgroup2 /sys/fs/cgroup
cp "$2/hearth.service" /run/systemd/system/
cp "$1" /run/systemd/system/hearth.service.d/test.conf
echo '[Unit]' > /run/systemd/system/test.target
ln -s ../hearth.service /run/systemd/system/test.target.wants/
exec env -i PATH="$PATH" container=test /lib/systemd/systemd --system --unit=test.target --log-target=console
"#;

/// A systemd under way; killed with all its processes when dropped.
struct Systemd {
    outer: Child,
    first: String,
}

impl Systemd {
    fn boot(bed: &Bed, options: &str) -> Self {
        let conf = bed.path("test.conf");
        let (program, home) = (env!("CARGO_BIN_EXE_hearth"), bed.dir.path().display());
        let text = format!(
            "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=\nExecStart={program} {options}\n\
             Environment=HOME={home} HEARTH_STORE={}\nStandardError=append:{home}/log\n",
            bed.store().display()
        );
        fs::write(&conf, text).unwrap();
        let mut command = Command::new("unshare");
        command
            .args([
                "--fork",
                "--pid",
                "--mount",
                "--cgroup",
                "--mount-proc",
                "--kill-child",
            ])
            .args(["bash", "-c", BOOT, "boot"])
            .args([
                conf.to_str().unwrap(),
                UNITS,
                bed.dir.path().to_str().unwrap(),
            ])
            .arg(std::env::temp_dir())
            .stdin(Stdio::null())
            .stdout(fs::File::create(bed.path("boot")).unwrap())
            .stderr(fs::File::create(bed.path("boot.err")).unwrap());
        let outer = command.spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", outer.id());
        let first = || {
            fs::read_to_string(&children)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        wait_for("process 1", || !first().is_empty());
        let first = first();
        Self { outer, first }
    }

    /// How a program is started in its namespaces.
    fn inside(&self) -> [&str; 6] {
        ["nsenter", "-t", &self.first, "-m", "-p", "--"]
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Done {
        let tool = tool(program, arguments);
        let [enter, own @ ..] = self.inside();
        let mut command = Command::new(enter);
        command
            .args(own)
            .arg(tool.get_program())
            .args(tool.get_args());
        Done::of(&mut command)
    }

    fn show(&self, property: &str) -> String {
        let shown = self.run("systemctl", &["show", "hearth", "--value", "-p", property]);
        shown.ok().trim().to_owned()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = self.outer.kill();
        let _ = self.outer.wait();
    }
}

#[test]
fn the_units_are_valid() {
    let dir = tempfile::tempdir().unwrap();
    let program = env!("CARGO_BIN_EXE_hearth");
    for unit in ["hearth.service", "hearth-keeper.service"] {
        let text = fs::read_to_string(format!("{UNITS}/{unit}")).unwrap();
        assert!(text.contains("ExecStart=/usr/local/bin/hearth "), "{text}");
        let text = text.replace("/usr/local/bin/hearth", program);
        fs::write(dir.path().join(unit), text).unwrap();
        let at = dir.path().join(unit).display().to_string();
        let done = Done::of(&mut tool("systemd-analyze", &["verify", "--man=no", &at]));
        assert_eq!((done.code, &*done.err), (Some(0), ""), "{done:?}");
    }
    let bed = Bed::new();
    bed.ok(&format!("--config {UNITS}/config.toml config --check"));
}

/// An agent as a service of a systemd.
struct Service {
    systemd: Systemd,
    csi: Csi,
    admin: u16,
    config: String,
}

impl Service {
    fn start(more: &str) -> Self {
        let bed = Bed::new();
        let admin = servers::free_port();
        let at = |name: &str| bed.path(name).display().to_string();
        let config = format!(
            "[agent]\nfdstore = true\nnode_name = 'n'\nsocket = '{}'\n[admin]\n\
             address = '127.0.0.1:{admin}'\n[csi]\nenabled = true\nendpoint = '{}'\n{more}",
            at("agent.sock"),
            at("csi.sock"),
        );
        fs::write(bed.path("config.toml"), &config).unwrap();
        let options = format!("--config {} agent", at("config.toml"));
        let csi = Csi::client(bed, false, String::new());
        let systemd = Systemd::boot(&csi.bed, &options);
        let service = Self {
            systemd,
            csi,
            admin,
            config,
        };
        service.wait_ready();
        service
    }

    fn log(&self) -> String {
        fs::read_to_string(self.csi.bed.path("log")).unwrap_or_default()
    }

    fn is_ready(&self) -> bool {
        matches!(get(self.admin, "/readyz"), Ok((200, _)))
    }

    fn wait_ready(&self) {
        let begun = Instant::now();
        while !self.is_ready() {
            let boot = || fs::read_to_string(self.csi.bed.path("boot")).unwrap_or_default();
            let late = begun.elapsed() > HANG;
            assert!(!late, "{}\n{}", boot(), self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn kill(&self) {
        let kill = ["kill", "--kill-who=main", "-s", "KILL", "hearth"];
        self.systemd.run("systemctl", &kill).ok();
    }

    /// Runs `script` in its namespaces.
    fn python(&self, script: &str, arguments: &[&str]) -> Command {
        let [enter, own @ ..] = self.systemd.inside();
        let inner = python(script, arguments);
        let mut command = Command::new(enter);
        command.args(own).arg(inner.get_program());
        command.args(inner.get_args());
        command
    }
}

#[test]
fn mounts_and_sockets_outlive_the_agent_as_a_service() {
    let web = Web::slow("1m");
    let model = web.model("m", 12, 2);
    let service = Service::start("");
    let Service { systemd, csi, .. } = &service;
    let socket = csi.bed.path("csi.sock");
    let sockets = systemd.show("NFileDescriptorStore");
    assert_eq!(sockets, "4", "the port, the socket, and a pipe");
    let target = csi.publish("v", &model);
    let hows = ["sequential", "random_reads", "mapped", "metadata"];
    let readers: Vec<_> = (1..)
        .zip(hows)
        .map(|(seed, how)| Reader::by(&systemd.inside(), &target, &web.path("m"), how, seed))
        .collect();
    let connects = Client::start(move || {
        let connected = UnixStream::connect(&socket).map(drop);
        std::thread::sleep(Duration::from_millis(1));
        connected.map_err(|e| e.to_string())
    });
    let mut pid = systemd.show("MainPID");
    for round in 0..5 {
        std::thread::sleep(Duration::from_millis(400));
        match round {
            3 => drop(systemd.run("systemctl", &["restart", "hearth"]).ok()),
            _ => service.kill(),
        }
        let next = || systemd.show("MainPID");
        wait_for("another process", || ![&*pid, "0"].contains(&&*next()));
        pid = next();
        wait_for("ready", || service.is_ready());
        assert_eq!(csi.publish("v", &model), target);
    }
    for reader in readers {
        assert!(reader.done() > 0, "{}", service.log());
    }
    assert!(connects.done() > 0);
    let truth = web.path("m").display().to_string();
    systemd.run("diff", &["-r", &target, &truth]).ok();
    csi.unpublish("v");
    wait_for("all of the mount is forgotten", || {
        systemd.show("NFileDescriptorStore") == sockets
    });
    // Listening elsewhere: the manager does not keep a port on which nobody answers.
    let config = csi.bed.path("config.toml");
    let other = servers::free_port();
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        text.replace(&service.admin.to_string(), &other.to_string()),
    )
    .unwrap();
    systemd.run("systemctl", &["restart", "hearth"]).ok();
    wait_for("ready", || matches!(get(other, "/readyz"), Ok((200, _))));
    wait_for("the old port is forgotten", || {
        systemd.show("NFileDescriptorStore") == sockets
    });
    assert!(get(service.admin, "/readyz").is_err());
    systemd.run("systemctl", &["stop", "hearth"]).ok();
    assert_eq!(systemd.show("Result"), "success", "{}", service.log());
}

/// A service that is started again and again, and never serves: who waits is refused after a time, until it does.
#[test]
fn a_service_that_does_not_come_back_refuses_who_waits() {
    const SCRIPT: &str = r"
import errno, os, sys
try: os.statvfs(sys.argv[1]); print('fine')
except OSError as error: print(errno.errorcode[error.errno])
";
    let web = Web::slow("2m");
    let model = web.model("m", 8, 1);
    let service = Service::start("[mount]\norphan_timeout_seconds = 2\n");
    let csi = &service.csi;
    let target = csi.publish("v", &model);
    let config = csi.bed.path("config.toml");
    fs::write(&config, "nonsense").unwrap();
    let ask = || Done::of(&mut service.python(SCRIPT, &[&target])).ok();
    assert_eq!(ask().trim(), "fine");
    let killed = Instant::now();
    service.kill();
    assert_eq!(ask().trim(), "ETIMEDOUT", "{}", service.log());
    // It is counted in whole seconds.
    let waited = killed.elapsed();
    assert!(waited > Duration::from_secs(1), "it waits: {waited:?}");
    assert_eq!(ask().trim(), "ETIMEDOUT");
    fs::write(&config, &service.config).unwrap();
    service.wait_ready();
    let truth = web.path("m").display().to_string();
    service.systemd.run("diff", &["-r", &target, &truth]).ok();
    csi.unpublish("v");
}

/// A service that is stopped while the kernel waits for answers before it drops pages: its mounts end, and who reads
/// is told so.
#[test]
fn a_service_that_is_stopped_leaves_nobody_waiting() {
    const SCRIPT: &str = r"
import errno, os, sys
f = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(f, 0, 0, os.POSIX_FADV_RANDOM)
os.pread(f, 4096, 0)
print('begun', flush=True)
try: print(len(os.pread(f, 4096, 1000 << 10)))
except OSError as error: print(errno.errorcode[error.errno])
";
    let mut web = Web::new();
    let origin = web.gate();
    // The last bytes of a chunk do not come.
    origin.hold_after(512 << 10);
    let model = web.model("m", 2, 1);
    let service = Service::start("");
    let csi = &service.csi;
    let target = csi.publish("v", &model);
    let shard = format!("{target}/model-00001-of-00001.safetensors");
    let mut reader = service.python(SCRIPT, &[&shard]);
    reader.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut reader = reader.spawn().unwrap();
    let mut word = [0; 6];
    std::io::Read::read_exact(reader.stdout.as_mut().unwrap(), &mut word).unwrap();
    service.kill();
    let config = csi.bed.path("config.toml").display().to_string();
    wait_for("pages are to be dropped", || unkillable(&config) > 0);
    service.systemd.run("systemctl", &["stop", "hearth"]).ok();
    let done = Done::from("reader".into(), reader.wait_with_output().unwrap());
    let said = done.ok();
    assert!(["ENOTCONN\n", "ECONNABORTED\n"].contains(&&*said), "{said}");
    wait_for("nobody waits any more", || unkillable(&config) == 0);
}
