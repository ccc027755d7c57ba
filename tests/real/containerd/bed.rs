//! A containerd with all its files in one directory, and a snapshotter for it.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(150);

/// How the CRI is configured; all else is as containerd has it.
pub(crate) struct Cri<'a> {
    pub(crate) sandbox_image: &'a str,
    /// Whether it says in labels which image a layer is of.
    pub(crate) labels: bool,
}

pub(crate) struct Bed {
    pub(crate) dir: TempDir,
    /// The network namespace in which everything is started, if not that of the test.
    pub(crate) netns: Option<String>,
    containerd: Option<Child>,
    snapshotter: Option<Child>,
}

impl Bed {
    /// Nothing runs yet. Without `cri` there is no CRI.
    pub(crate) fn new(cri: Option<Cri<'_>>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bed = Self {
            dir,
            netns: None,
            containerd: None,
            snapshotter: None,
        };
        let at = |name: &str| bed.path(name).display().to_string();
        let mut config = format!(
            "version = 2\nroot = '{}'\nstate = '{}'\ndisabled_plugins = [{}'io.containerd.internal.v1.opt']\n\
             [grpc]\naddress = '{}'\n[ttrpc]\naddress = '{}'\n\
             [plugins.'io.containerd.gc.v1.scheduler']\nstartup_delay = '10s'\n\
             [proxy_plugins.hearth]\ntype = 'snapshot'\naddress = '{}'\n\
             [proxy_plugins.hearth.exports]\nroot = '{}'\n",
            at("root"),
            at("state"),
            if cri.is_none() {
                "'io.containerd.grpc.v1.cri', "
            } else {
                ""
            },
            at("c.sock"),
            at("t.sock"),
            at("h.sock"),
            at("hearth"),
        );
        if let Some(cri) = cri {
            let plugin = "plugins.'io.containerd.grpc.v1.cri'";
            config.push_str(&format!(
                "[{plugin}]\nrestrict_oom_score_adj = true\ndisable_apparmor = true\n\
                 sandbox_image = '{}'\n\
                 [{plugin}.cni]\nconf_dir = '{}'\nbin_dir = '{}'\n\
                 [{plugin}.containerd]\nsnapshotter = 'hearth'\n\
                 disable_snapshot_annotations = {}\n\
                 [{plugin}.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n\
                 [{plugin}.containerd.runtimes.runc.options]\nRoot = '{}'\n",
                cri.sandbox_image,
                at("cni"),
                at("cni"),
                !cri.labels,
                at("runc"),
            ));
        }
        fs::write(bed.path("config.toml"), config).unwrap();
        bed
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `hearth snapshotter`, which knows no images yet.
    pub(crate) fn start_snapshotter(&mut self) {
        self.start_snapshotter_with(&[]);
    }

    pub(crate) fn start_snapshotter_with(&mut self, arguments: &[&OsStr]) {
        // What SECURITY.md says that it needs, and nothing else.
        let needs = "-all,+sys_admin,+chown,+fowner,+dac_override";
        let mut command = Command::new("setpriv");
        command
            .arg(format!("--inh-caps={needs}"))
            .arg(format!("--bounding-set={needs}"))
            .args(["--no-new-privs", "--", env!("CARGO_BIN_EXE_hearth")])
            .args(["-v", "snapshotter", "--address"])
            .arg(self.path("h.sock"))
            .arg("--root")
            .arg(self.path("hearth"))
            .args(arguments)
            .env("HEARTH_STORE", self.path("store"))
            .env("HOME", self.dir.path())
            .env_remove("HEARTH_CONFIG")
            .env_remove("HEARTH_LOG");
        self.snapshotter = Some(self.spawn(command, "hearth.log"));
        self.wait_for("the snapshotter", |bed| bed.path("h.sock").exists());
    }

    /// `hearth agent` with that face, and the keeper on `keeper`. Takes over from the one that runs, if one does.
    pub(crate) fn start_agent(&mut self, keeper: &Path) {
        let at = |name: &str| self.path(name).display().to_string();
        let config = format!(
            "[agent]\nkeeper = '{}'\nsocket = '{}'\n[admin]\nenabled = false\n\
             [snapshotter]\nenabled = true\naddress = '{}'\nroot = '{}'\n",
            keeper.display(),
            at("agent.sock"),
            at("h.sock"),
            at("hearth"),
        );
        fs::write(self.path("agent.toml"), config).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
        command
            .args(["-v", "--config"])
            .arg(self.path("agent.toml"))
            .arg("agent")
            .env("HEARTH_STORE", self.path("store"))
            .env("HOME", self.dir.path())
            .env_remove("HEARTH_CONFIG")
            .env_remove("HEARTH_LOG");
        let new = self.spawn(command, "hearth.log");
        if let Some(mut old) = self.snapshotter.replace(new) {
            let begun = Instant::now();
            let status = loop {
                assert!(begun.elapsed() < LIMIT, "no end\n{}", self.logs());
                if let Some(status) = old.try_wait().unwrap() {
                    break status;
                }
                std::thread::sleep(Duration::from_millis(5));
            };
            assert!(status.success(), "{}", self.log("hearth.log"));
        }
        self.wait_for("the agent", |bed| bed.path("agent.sock").exists());
    }

    /// Ends it as a service manager does.
    pub(crate) fn stop_snapshotter(&mut self) {
        let mut child = self.snapshotter.take().unwrap();
        let code = end(&mut child, nix::sys::signal::Signal::SIGTERM);
        assert_eq!(code, Some(0), "{}", self.log("hearth.log"));
        assert!(!self.path("h.sock").exists());
    }

    /// Ends it as a crash does.
    pub(crate) fn kill_snapshotter(&mut self) {
        let mut child = self.snapshotter.take().unwrap();
        end(&mut child, nix::sys::signal::Signal::SIGKILL);
        fs::remove_file(self.path("h.sock")).unwrap();
    }

    pub(crate) fn start_containerd(&mut self) {
        self.start_this_containerd(Path::new("containerd"));
    }

    /// Starts a program that is some version of containerd.
    pub(crate) fn start_this_containerd(&mut self, program: &Path) {
        let mut command = Command::new(program);
        command.arg("-c").arg(self.path("config.toml"));
        self.containerd = Some(self.spawn(command, "containerd.log"));
        self.wait_for("containerd", |bed| {
            let mut version = bed.ctr_command("version");
            version.output().is_ok_and(|done| done.status.success())
        });
    }

    pub(crate) fn stop_containerd(&mut self) {
        let mut child = self.containerd.take().unwrap();
        end(&mut child, nix::sys::signal::Signal::SIGTERM);
    }

    pub(crate) fn spawn(&self, mut command: Command, log: &str) -> Child {
        if let Some(netns) = &self.netns {
            let mut inside = Command::new("nsenter");
            inside.arg(format!("--net=/run/netns/{netns}"));
            inside.arg(command.get_program()).args(command.get_args());
            for (key, value) in command.get_envs() {
                match value {
                    Some(value) => inside.env(key, value),
                    None => inside.env_remove(key),
                };
            }
            command = inside;
        }
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path(log));
        let log = log.unwrap();
        command
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        // SAFETY: prctl is async-signal-safe, and the closure touches no memory of the parent.
        unsafe {
            command.pre_exec(|| {
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
                Ok(())
            });
        }
        let child = command.spawn();
        child.unwrap_or_else(|e| panic!("{command:?}: {e}; run tests/run"))
    }

    pub(crate) fn wait_for(&self, what: &str, ready: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !ready(self) {
            assert!(begun.elapsed() < LIMIT, "{what}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    pub(crate) fn logs(&self) -> String {
        let text = self.log("containerd.log");
        let lines: Vec<&str> = text.lines().collect();
        let last = lines[lines.len().saturating_sub(40)..].join("\n");
        let mut records = String::new();
        for entry in fs::read_dir(self.path("hearth/m")).into_iter().flatten() {
            records += &fs::read_to_string(entry.unwrap().path()).unwrap_or_default();
            records.push('\n');
        }
        format!("{last}\n{}{records}", self.log("hearth.log"))
    }

    fn ctr_command(&self, line: &str) -> Command {
        let mut command = Command::new("timeout");
        let limit = LIMIT.as_secs().to_string();
        command.args(["-k", "5", &limit, "ctr", "--address"]);
        command.arg(self.path("c.sock"));
        // A no-break space stands for one within an argument.
        let words = line.split(' ').filter(|word| !word.is_empty());
        command.args(words.map(|word| word.replace('\u{a0}', " ")));
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    /// Runs `ctr` with the arguments of `line`; what it printed.
    pub(crate) fn ctr(&self, line: &str) -> String {
        let done = self.ctr_command(line).output().unwrap();
        let out = String::from_utf8_lossy(&done.stdout).into_owned();
        let error = String::from_utf8_lossy(&done.stderr);
        assert!(
            done.status.success(),
            "ctr {line}: {}\n{out}{error}\n{}",
            done.status,
            self.logs()
        );
        out
    }

    pub(crate) fn ctr_succeeds(&self, line: &str) -> bool {
        self.ctr_command(line).output().unwrap().status.success()
    }

    /// What a snapshot takes: bytes and inodes.
    pub(crate) fn usage(&self, namespace: &str, snapshotter: &str, key: &str) -> (f64, u64) {
        let line = format!("snapshots --snapshotter {snapshotter} usage -b {key}");
        let text = self.ctr(&format!("--namespace {namespace} {line}"));
        let row = text.lines().nth(1).unwrap_or_else(|| panic!("{text}"));
        let mut cells = row.split_whitespace().skip(1);
        let bytes = cells.next().unwrap().parse().unwrap();
        (bytes, cells.next().unwrap().parse().unwrap())
    }

    /// Runs `ctr`, which must fail; its message.
    pub(crate) fn ctr_fails(&self, line: &str) -> String {
        let done = self.ctr_command(line).output().unwrap();
        assert!(!done.status.success(), "ctr {line} did not fail");
        String::from_utf8_lossy(&done.stderr).into_owned()
    }

    /// Waits until containerd, which waits longer and longer between attempts, has connected to a
    /// new snapshotter.
    pub(crate) fn wait_connected(&self) {
        let probe = "--namespace probe snapshots --snapshotter hearth";
        self.wait_for("containerd to connect", |bed| {
            let mut prepare = bed.ctr_command(&format!("{probe} prepare probe"));
            prepare.output().is_ok_and(|done| done.status.success())
        });
        self.ctr(&format!("{probe} rm probe"));
    }

    /// Directories of snapshots, whatever their state.
    pub(crate) fn dirs(&self) -> usize {
        fs::read_dir(self.path("hearth/s")).unwrap().count()
    }

    /// Records of snapshots.
    pub(crate) fn records(&self) -> usize {
        fs::read_dir(self.path("hearth/m")).unwrap().count()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // Shims outlive containerd: they are known by the socket they report to.
        let socket = self.path("c.sock");
        for pid in shims(&socket) {
            for child in children(pid) {
                kill(child);
            }
            kill(pid);
        }
        for child in [&mut self.containerd, &mut self.snapshotter] {
            if let Some(mut child) = child.take() {
                end(&mut child, nix::sys::signal::Signal::SIGKILL);
            }
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let below = |line: &&str| {
            let dir = line.split(' ').nth(1).unwrap_or_default();
            Path::new(dir).starts_with(self.dir.path())
        };
        for line in mounts.lines().rev().filter(below) {
            let dir = line.split(' ').nth(1).unwrap_or_default();
            let _ = Command::new("umount").args(["-l", dir]).status();
        }
    }
}

/// Sends a signal and waits; the exit status.
fn end(child: &mut Child, signal: nix::sys::signal::Signal) -> Option<i32> {
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    let _ = nix::sys::signal::kill(pid, signal);
    let begun = Instant::now();
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return status.code();
        }
        if begun.elapsed() > Duration::from_secs(20) {
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn kill(pid: i32) {
    let pid = nix::unistd::Pid::from_raw(pid);
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
}

/// Processes whose command line names `socket`, but for this bed's own children.
fn shims(socket: &Path) -> Vec<i32> {
    let socket = socket.display().to_string();
    let is_shim = |pid: &i32| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.starts_with("/usr/bin/containerd-shim") && line.contains(&socket)
    };
    pids().into_iter().filter(is_shim).collect()
}

fn children(parent: i32) -> Vec<i32> {
    let is_child = |pid: &i32| {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after = text.rsplit(')').next().unwrap_or_default();
        after.split_whitespace().nth(1) == Some(&*parent.to_string())
    };
    pids().into_iter().filter(is_child).collect()
}

fn pids() -> Vec<i32> {
    let names = fs::read_dir("/proc").unwrap();
    let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter_map(|name| name.parse().ok()).collect()
}
