//! The `hearth` binary as its users have it: every command, on real servers and real mounts.
//!
//! Whoever touches a mount is a child with a time limit; a [`Bed`] frees what a failed test left.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    proxy::Proxy,
    servers::{self, Server},
    sources::bytes,
};

mod agent;
mod chaos;
mod commands;
mod consumers;
mod csi;
mod demo;
mod disk;
mod faults;
mod forged;
mod hostile;
mod interrupted;
mod matrix;
mod memory;
mod models;
mod mounts;
mod namespaces;
mod offline;
mod private;
mod replaced;
mod sanity;
mod secrets;
mod survive;
mod systemd;
mod tables;
mod tiers;

/// Longest time that anything but a server may take.
const LIMIT: &str = "120";

/// How long to wait for what is to come: only to end what hangs.
const HANG: Duration = Duration::from_secs(120);

/// A store and a place for mounts.
struct Bed {
    dir: TempDir,
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn store(&self) -> PathBuf {
        self.path("store")
    }

    /// A directory to mount on.
    fn mount_dir(&self, name: &str) -> String {
        let dir = self.path(name);
        fs::create_dir_all(&dir).unwrap();
        dir.to_str().unwrap().to_owned()
    }

    /// `hearth` with the arguments of `line`, separated by spaces, with nothing of the environment
    /// that could matter but what the test has set.
    fn command(&self, line: &str) -> Command {
        let mut command = Command::new("timeout");
        command.arg(LIMIT).arg(env!("CARGO_BIN_EXE_hearth"));
        command.args(line.split(' ').filter(|a| !a.is_empty()));
        command
            .env("HEARTH_STORE", self.store())
            .env("HOME", self.dir.path())
            .env_remove("HEARTH_CONFIG")
            .env_remove("HEARTH_LOG")
            .stdin(Stdio::null());
        command
    }

    fn run(&self, line: &str) -> Done {
        Done::of(&mut self.command(line))
    }

    /// Runs what must succeed; its standard output.
    fn ok(&self, line: &str) -> String {
        self.run(line).ok()
    }

    /// Runs what must fail with status 1; its standard error.
    fn fails(&self, line: &str) -> String {
        self.run(line).failed(1)
    }

    fn json(&self, line: &str) -> Value {
        let text = self.ok(line);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{line}: {e}\n{text}"))
    }

    /// Starts what goes on by itself.
    fn start(&self, line: &str) -> Running {
        let program = Command::new(env!("CARGO_BIN_EXE_hearth"));
        let mut command = self.command(line);
        let arguments: Vec<_> = command.get_args().skip(2).map(Into::into).collect();
        let environment: Vec<_> = command
            .get_envs()
            .map(|(key, value)| (key.to_owned(), value.map(ToOwned::to_owned)))
            .collect();
        // Without `timeout`: signals are for hearth itself.
        command = program;
        command.args::<_, std::ffi::OsString>(arguments);
        for (key, value) in environment {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        Running::of(&mut command)
    }

    /// Waits until the mount on `dir` is complete; what it says then.
    fn wait_complete(&self, dir: &str) -> Value {
        let begun = Instant::now();
        loop {
            let status = self.json(&format!("status {dir} --json"));
            if status["complete"] == true {
                return status;
            }
            assert!(begun.elapsed() < HANG, "{status}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Files of complete objects.
    fn objects(&self) -> Vec<PathBuf> {
        files_below(&self.store().join("objects/sha256"))
    }

    /// The object that holds `content`.
    fn object(&self, content: &[u8]) -> PathBuf {
        let name = hearth::digest::Digest::of(content).hex();
        let found = self.objects().into_iter().find(|p| p.ends_with(&name));
        found.unwrap_or_else(|| panic!("no object {name}"))
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        for info in hearth::mount::mounted().unwrap_or_default() {
            if info.mountpoint.starts_with(self.dir.path()) {
                let connection = info.connection;
                let abort = format!("/sys/fs/fuse/connections/{connection}/abort");
                let _ = fs::write(abort, "1");
                let _ = Command::new("umount")
                    .arg("-l")
                    .arg(&info.mountpoint)
                    .status();
            }
        }
    }
}

/// What a command did.
#[derive(Debug)]
struct Done {
    line: String,
    code: Option<i32>,
    out: String,
    err: String,
}

impl Done {
    fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        Self::from(format!("{command:?}"), output)
    }

    fn from(line: String, output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let done = Self {
            line,
            code: output.status.code(),
            out: text(output.stdout),
            err: text(output.stderr),
        };
        assert!(!done.err.contains("panicked"), "{done:?}");
        done
    }

    #[track_caller]
    fn ok(self) -> String {
        assert_eq!(
            self.code,
            Some(0),
            "{}\n{}\n{}",
            self.line,
            self.out,
            self.err
        );
        self.out
    }

    #[track_caller]
    fn failed(self, code: i32) -> String {
        let Self { line, out, err, .. } = self;
        assert_eq!(self.code, Some(code), "{line}\n{out}\n{err}");
        err
    }
}

/// A process under way; killed when dropped.
struct Running {
    child: Option<Child>,
    line: String,
}

impl Running {
    fn of(command: &mut Command) -> Self {
        let line = format!("{command:?}");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = Some(command.spawn().unwrap());
        Self { child, line }
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = self.child.as_ref().unwrap().id() as i32;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
    }

    fn runs(&mut self) -> bool {
        self.child.as_mut().unwrap().try_wait().unwrap().is_none()
    }

    fn done(mut self) -> Done {
        let deadline = Instant::now() + Duration::from_secs(120);
        while self.runs() {
            assert!(Instant::now() < deadline, "does not end: {}", self.line);
            std::thread::sleep(Duration::from_millis(5));
        }
        let child = self.child.take().unwrap();
        Done::from(
            std::mem::take(&mut self.line),
            child.wait_with_output().unwrap(),
        )
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// nginx before a directory, with a log of what it was asked.
struct Web {
    root: TempDir,
    logs: TempDir,
    server: Server,
    /// Where clients ask.
    port: u16,
}

/// One request as nginx logged it.
#[derive(Debug)]
struct Asked {
    method: String,
    path: String,
    /// Bytes of the body that were sent.
    bytes: u64,
}

impl Web {
    fn new() -> Self {
        Self::with("")
    }

    /// Every connection for a safetensors file gets so many bytes a second, such as `2m`.
    fn slow(rate: &str) -> Self {
        Self::with(&format!("location ~ safetensors$ {{ limit_rate {rate}; }}"))
    }

    fn with(more: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let logs = tempfile::tempdir().unwrap();
        let log = logs.path().join("access");
        let more = format!(
            "access_log {}; location = /logged {{ access_log off; return 204; }} {more}",
            log.display()
        );
        let server = servers::nginx(root.path(), &more);
        let port = server.port;
        Self {
            root,
            logs,
            server,
            port,
        }
    }

    /// Has clients come through a proxy from now on, which can hold content back.
    fn gate(&mut self) -> Proxy {
        let gate = Proxy::before(self.server.port);
        self.port = gate.port;
        gate
    }

    /// The reference of the directory `name`.
    fn url(&self, name: &str) -> String {
        format!("http://127.0.0.1:{}/{name}/", self.port)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Puts a model of `shards` x `mib` MiB into the directory `name`.
    fn model(&self, name: &str, mib: usize, shards: usize) -> String {
        write_model(&self.path(name), mib, shards, 1);
        self.url(name)
    }

    /// Waits until what it has answered is logged: it is one process, which logs an answer before it takes another request.
    fn wait_logged(&self) {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.server.port)) else {
            return;
        };
        stream.write_all(b"GET /logged HTTP/1.0\r\n\r\n").unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
    }

    fn asked(&self) -> Vec<Asked> {
        self.wait_logged();
        let text = fs::read_to_string(self.logs.path().join("access")).unwrap();
        // A line may be under way.
        let lines = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
        lines
            .map(|line| {
                let parts: Vec<_> = line.split('"').collect();
                let mut request = parts[1].split(' ');
                let answer = parts[2].trim().split(' ').nth(1).unwrap();
                Asked {
                    method: request.next().unwrap().into(),
                    path: request.next().unwrap_or_default().into(),
                    bytes: answer.parse().unwrap(),
                }
            })
            .collect()
    }

    /// Requests for content, not for listings.
    fn content(&self) -> Vec<Asked> {
        let mut asked = self.asked();
        asked.retain(|a| {
            a.method == "GET" && !a.path.ends_with('/') && !a.path.ends_with("hearth.json")
        });
        asked
    }

    /// Bytes of content that it has sent.
    fn sent(&self) -> u64 {
        self.content().iter().map(|a| a.bytes).sum()
    }

    fn forget(&self) {
        self.wait_logged();
        fs::write(self.logs.path().join("access"), "").unwrap();
    }
}

/// A valid safetensors model of `shards` x `mib` MiB, with what belongs to it.
fn write_model(dir: &Path, mib: usize, shards: usize, seed: u64) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), r#"{"model_type": "test"}"#).unwrap();
    fs::write(dir.join("tokenizer.json"), bytes(seed + 1000, 200_000)).unwrap();
    let mut map = serde_json::Map::new();
    for shard in 0..shards {
        let name = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
        let rows = mib * 64;
        let mut header = serde_json::Map::new();
        for (tensor, first) in [0, rows / 4, rows / 2].into_iter().enumerate() {
            let last = [rows / 4, rows / 2, rows][tensor];
            let key = format!("layers.{shard}.{tensor}");
            header.insert(
                key.clone(),
                serde_json::json!({"dtype": "I32", "shape": [last - first, 4096],
                    "data_offsets": [first * 16384, last * 16384]}),
            );
            map.insert(key, name.clone().into());
        }
        let mut header = Value::from(header).to_string();
        while header.len() % 8 != 0 {
            header.push(' ');
        }
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.extend(bytes(seed + shard as u64, rows * 16384));
        fs::write(dir.join(name), file).unwrap();
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Every regular file below `dir`.
fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(files_below(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found.sort();
    found
}

fn total_size(dir: &Path) -> u64 {
    let files = files_below(dir);
    files.iter().map(|f| f.metadata().unwrap().len()).sum()
}

/// `program` with arguments, as a child with a time limit.
fn tool(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", LIMIT, program]).args(arguments);
    command
}

/// The test bed's Python running `script`.
fn python(script: &str, arguments: &[&str]) -> Command {
    let python = servers::bed().join("venv/bin/python");
    let mut command = tool(python.to_str().unwrap(), &["-c", script]);
    command.args(arguments);
    command
}

/// Two directories hold the same.
fn assert_same(one: &str, other: &Path) {
    let other = other.to_str().unwrap();
    let done = Done::of(&mut tool("diff", &["-r", one, other]));
    assert_eq!(done.ok(), "");
}

/// Waits until a background process has ended, with all its threads (a zombie has, whoever its parent is).
fn assert_ended(pid: u64) {
    let begun = Instant::now();
    let runs = |thread: fs::DirEntry| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        !(stat.is_empty() || stat.contains(") Z ") || stat.contains(") X "))
    };
    loop {
        let threads = fs::read_dir(format!("/proc/{pid}/task"));
        if !threads.into_iter().flatten().flatten().any(runs) {
            return;
        }
        assert!(begun.elapsed() < HANG, "{pid} still runs");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Text with what differs from run to run replaced: the origin's address, the bed, times, speeds.
fn stable(text: &str, replace: &[(&str, &str)]) -> String {
    let mut text = text.to_owned();
    for (from, to) in replace {
        text = text.replace(from, to);
    }
    text
}
