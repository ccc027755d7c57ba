//! Real servers for tests: on free loopback ports, in temp dirs, gone with the test.
//!
//! They are installed by `tests/run` into `HEARTH_TEST_BED` (default `~/.cache/hearth-test`); one
//! that is missing fails the test.

use std::{
    env, fs,
    fs::File,
    hash::{BuildHasher as _, RandomState},
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// How long a server may take to listen. Loaded machines are slow to start Python and Node.
const START: Duration = Duration::from_secs(60);

/// A running server; killed when dropped, and when the thread that started it ends.
pub(crate) struct Server {
    child: Child,
    /// Its port on 127.0.0.1.
    pub(crate) port: u16,
    /// Its files: `log` is what it printed.
    pub(crate) dir: TempDir,
}

impl Server {
    /// Starts what `command` makes for a port and an empty directory, and waits until it listens.
    pub(crate) fn start(name: &str, command: impl Fn(u16, &Path) -> Command) -> Self {
        // Another test may take the port in the moment between: then once more.
        for _ in 0..3 {
            if let Some(server) = Self::try_start(name, &command) {
                return server;
            }
        }
        panic!("{name} did not start in three attempts");
    }

    fn try_start(name: &str, command: &impl Fn(u16, &Path) -> Command) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        let log = File::create(dir.path().join("log")).unwrap();
        let child = spawn(&mut command(port, dir.path()), log);
        let mut server = Self { child, port, dir };
        let begun = Instant::now();
        loop {
            let exited = server.child.try_wait().unwrap();
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            if exited.is_none() && TcpStream::connect_timeout(&address, START).is_ok() {
                return Some(server);
            }
            if exited.is_some() || begun.elapsed() > START {
                eprintln!("{name} on port {port}: {exited:?}\n{}", server.log());
                return None;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// `http://127.0.0.1:port`.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// What it printed.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts what writes into `log` and ends with the thread that starts it.
pub(crate) fn spawn(command: &mut Command, log: File) -> Child {
    command
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

/// Where the servers are installed.
pub(crate) fn bed() -> PathBuf {
    match env::var_os("HEARTH_TEST_BED") {
        Some(bed) => bed.into(),
        None => PathBuf::from(env::var_os("HOME").unwrap()).join(".cache/hearth-test"),
    }
}

/// An S3 server that checks no credentials, or all of them.
pub(crate) fn moto(checks_credentials: bool) -> Server {
    Server::start("moto_server", |port, _| {
        let mut command = Command::new(bed().join("venv/bin/moto_server"));
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
        if checks_credentials {
            command.env("INITIAL_NO_AUTH_ACTION_COUNT", "0");
        }
        command
    })
}

/// Puts `cert.pem` and `key.pem` of `localhost` into `dir`, and `ca.pem`, the certificate of the
/// authority that vouches for it.
pub(crate) fn make_certificates(dir: &Path) {
    const MAKE: &str = r#"
import datetime, sys
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
now = datetime.datetime.now(datetime.timezone.utc)
def make(name, issuer, issuer_key, is_ca):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    cert = (x509.CertificateBuilder().subject_name(name).issuer_name(issuer or name)
        .public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(issuer_key or key, hashes.SHA256()))
    return name, key, cert
ca_name, ca_key, ca = make("test authority", None, None, True)
_, key, cert = make("localhost", ca_name, ca_key, False)
pem = serialization.Encoding.PEM
open(sys.argv[1] + "/ca.pem", "wb").write(ca.public_bytes(pem))
open(sys.argv[1] + "/cert.pem", "wb").write(cert.public_bytes(pem))
open(sys.argv[1] + "/key.pem", "wb").write(key.private_bytes(
    pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
"#;
    let made = Command::new(bed().join("venv/bin/python"))
        .args(["-c", MAKE])
        .arg(dir)
        .status();
    assert!(made.unwrap().success());
}

/// An S3 server that speaks TLS as `localhost`, by an authority whose certificate is in `ca.pem`.
pub(crate) fn moto_with_tls() -> Server {
    Server::start("moto_server", |port, dir| {
        make_certificates(dir);
        let mut command = Command::new(bed().join("venv/bin/moto_server"));
        command.args(["-H", "127.0.0.1", "-p", &port.to_string(), "-c"]);
        command
            .arg(dir.join("cert.pem"))
            .arg("-k")
            .arg(dir.join("key.pem"));
        command
    })
}

/// An Azure Blob Storage server; it checks the keys of the account `devstoreaccount1`.
pub(crate) fn azurite() -> Server {
    Server::start("azurite-blob", |port, dir| {
        let mut command = Command::new(bed().join("npm/node_modules/.bin/azurite-blob"));
        command
            .args(["--blobHost", "127.0.0.1", "--blobPort", &port.to_string()])
            .args([
                "--silent",
                "--skipApiVersionCheck",
                "--disableTelemetry",
                "--location",
            ])
            .arg(dir);
        command
    })
}

/// A Google Cloud Storage server that checks no credentials.
pub(crate) fn fake_gcs() -> Server {
    Server::start("fake-gcs-server", |port, dir| {
        let host = format!("127.0.0.1:{port}");
        let mut command = Command::new(bed().join("bin/fake-gcs-server"));
        command
            .args([
                "-scheme",
                "http",
                "-host",
                "127.0.0.1",
                "-port",
                &port.to_string(),
            ])
            .args([
                "-public-host",
                &host,
                "-external-url",
                &format!("http://{host}"),
            ])
            .args(["-backend", "filesystem", "-filesystem-root"])
            .arg(dir.join("data"));
        command
    })
}

/// nginx, one process, serving `root` with byte ranges and directory listings; `more` goes into its `server`.
pub(crate) fn nginx(root: &Path, more: &str) -> Server {
    Server::start("nginx", |port, dir| {
        let root = root.display();
        let own = dir.display();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {own}/{kind};"))
            .concat();
        let config = format!(
            "daemon off; master_process off; pid {own}/pid; error_log stderr;
             events {{ worker_connections 512; }}
             http {{ access_log off; sendfile on; types {{}} default_type application/octet-stream;
               {temporary}
               server {{ listen 127.0.0.1:{port}; root {root}; autoindex on; {more} }} }}"
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, config).unwrap();
        // Workers that drop root cannot read the temp dirs of a test.
        let user = if nix::unistd::geteuid().is_root() {
            "user root;"
        } else {
            ""
        };
        let mut command = Command::new("nginx");
        command
            .arg("-e")
            .arg("stderr")
            .arg("-g")
            .arg(user)
            .arg("-c")
            .arg(file);
        command
    })
}

/// Python with the arguments that `arguments` makes for a port and an empty directory.
pub(crate) fn python(arguments: impl Fn(u16, &Path) -> Vec<String>) -> Server {
    Server::start("python", |port, dir| {
        let mut command = Command::new(bed().join("venv/bin/python"));
        command.arg("-u").args(arguments(port, dir));
        command
    })
}

/// Sets variables of this process. Tests that do so must have the process to themselves.
pub(crate) fn set_env<V: AsRef<str>>(variables: &[(&str, V)]) {
    assert!(
        env::var_os("NEXTEST").is_some(),
        "run this test by cargo nextest, which gives it a process of its own"
    );
    for (name, value) in variables {
        // SAFETY: nextest runs this test alone in its process, and the tests call this before they
        // start other threads.
        unsafe { env::set_var(name, value.as_ref()) };
    }
}

/// A port that nothing listens on, and that the kernel gives to nobody who connects before somebody does.
pub(crate) fn free_port() -> u16 {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let first: u16 = range.split_whitespace().next().unwrap().parse().unwrap();
    let ports = match first {
        0..12_000 => 10_000..first.max(20_000),
        _ => 10_000..first,
    };
    // Other tests look for one at the same time.
    let mut random = RandomState::new().hash_one(std::process::id());
    loop {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
        let port = ports.start + ((random >> 33) % ports.len() as u64) as u16;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

#[test]
fn servers_serve_and_are_gone_when_dropped() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("file"), "content").unwrap();
    let python = python(|port, _| {
        let root = root.path().display();
        let line = format!("-m http.server {port} --bind 127.0.0.1 --directory {root}");
        line.split(' ').map(str::to_owned).collect()
    });
    for server in [nginx(root.path(), ""), python] {
        let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
        stream.write_all(b"GET /file HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.ends_with("\r\n\r\ncontent"), "{answer}");
        let port = server.port;
        drop(server);
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    }
}
