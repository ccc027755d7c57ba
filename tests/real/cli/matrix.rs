//! Every fault of an origin, made by a TCP proxy before real servers, while a real mount is read:
//! no error where a retry within the patience works, no wrong byte, and the cause is told.

use super::*;
use crate::{
    oci_models::{Model, layouts},
    proxy::{Proxy, Spoil},
    pushed::Registry,
    sources,
};

/// Reads pieces of the file in an order of their own, then all of it; prints the digests.
pub(super) const READ: &str = "
import hashlib, os, random, sys
f = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(f).st_size
os.posix_fadvise(f, 0, 0, os.POSIX_FADV_RANDOM)
h = hashlib.sha256()
order = [(size * at // 8, 60000) for at in (5, 1, 6, 3, 0, 7, 2, 4)]
for at, n in order: h.update(os.pread(f, n, at))
print(h.hexdigest())
h = hashlib.sha256()
os.posix_fadvise(f, 0, 0, os.POSIX_FADV_DONTNEED)
at = 0
while True:
    piece = os.pread(f, 1 << 20, at)
    if not piece: break
    h.update(piece)
    at += len(piece)
print(h.hexdigest())
";

/// What [`READ`] prints of these bytes.
pub(super) fn digests(bytes: &[u8]) -> String {
    let size = bytes.len();
    let pieces: Vec<u8> = [5, 1, 6, 3, 0, 7, 2, 4]
        .iter()
        .flat_map(|at| {
            let start = size * at / 8;
            &bytes[start..(start + 60000).min(size)]
        })
        .copied()
        .collect();
    let hex = |bytes: &[u8]| hearth::digest::Digest::of(bytes).hex();
    format!("{}\n{}\n", hex(&pieces), hex(bytes))
}

/// A mount of `reference` whose content comes through a proxy.
struct Tried {
    bed: Bed,
    dir: String,
    flags: String,
}

impl Tried {
    fn mount(reference: &str, config: &str) -> Self {
        let bed = Bed::new();
        let file = bed.path("config.toml");
        let base = "[fetch]\npatience_seconds = 60\nstall_seconds = 2\n";
        fs::write(
            &file,
            format!(
                "{base}{config}\n[source]\nrequest_timeout_seconds = 3\nstall_timeout_seconds = 2\n"
            ),
        )
        .unwrap();
        let flags = format!("--config {}", file.display());
        let dir = bed.mount_dir("mnt");
        bed.ok(&format!("{flags} mount --no-fill {reference} {dir}"));
        Self { bed, dir, flags }
    }

    fn start(&self, path: &str) -> Running {
        Running::of(&mut python(READ, &[&format!("{}/{path}", self.dir)]))
    }

    /// A counter of the process that serves the mount.
    fn metric(&self, name: &str) -> u64 {
        let status = self.bed.json(&format!("status {} --json", self.dir));
        status["metrics"][name]
            .as_u64()
            .unwrap_or_else(|| panic!("{name}: {status}"))
    }

    /// What the process that serves the mount has logged.
    fn log(&self) -> String {
        let status = self.bed.json(&format!("status {} --json", self.dir));
        fs::read_to_string(status["log"].as_str().unwrap()).unwrap()
    }

    fn end(self) {
        self.bed.ok(&format!("{} umount {}", self.flags, self.dir));
        self.bed.ok("verify --all");
    }
}

/// What is tried: how it is spoiled, what the log says, which counter counts it.
struct Case {
    name: &'static str,
    spoils: Vec<Spoil>,
    /// One of these.
    says: &'static [&'static str],
    counts: &'static str,
}

const UNAVAILABLE: &str = "hearth_fetch_failed_unavailable_total";
const DENIED: &str = "hearth_fetch_failed_denied_total";
const THROTTLED: &str = "hearth_fetch_failed_throttled_total";

fn cases() -> Vec<Case> {
    let case = |name, spoils: &[Spoil], says: &'static [&'static str], counts| Case {
        name,
        spoils: spoils.to_vec(),
        says,
        counts,
    };
    let answer = Spoil::Answer;
    vec![
        case(
            "reset",
            &[Spoil::Reset(0), Spoil::Reset(700_000), Spoil::Reset(3)],
            &["ended after", "broke off", "reset"],
            UNAVAILABLE,
        ),
        case(
            "stall",
            &[Spoil::Stall(100_000), Spoil::Stall(0)],
            &[
                "stalled",
                "no bytes arrived",
                "timed out",
                "in time",
                "too slowly",
            ],
            UNAVAILABLE,
        ),
        case(
            "truncated",
            &[Spoil::Truncate(1), Spoil::Truncate(900_000)],
            &["ended after", "broke off", "ended early"],
            UNAVAILABLE,
        ),
        case(
            "closed",
            &[Spoil::Hang, Spoil::Hang, Spoil::Hang],
            &["broke", "gave no answer", "closed", "request failed"],
            UNAVAILABLE,
        ),
        case(
            "503 bursts",
            &vec![answer("503 Service Unavailable"); 5],
            &["503"],
            UNAVAILABLE,
        ),
        case(
            "500",
            &[answer("500 Internal Server Error")],
            &["500"],
            UNAVAILABLE,
        ),
        case(
            "429",
            &vec![answer("429 Too Many Requests\nretry-after: 1"); 2],
            &["429"],
            THROTTLED,
        ),
        case(
            "503 with a wait",
            &[answer("503 Service Unavailable\nretry-after: 1")],
            &["503"],
            THROTTLED,
        ),
        case("slow", &[Spoil::Slow(20_000)], &[], ""),
    ]
}

/// Mounts `reference`, of which nothing is known, while every request fails once or more.
fn resolve_through(proxy: &Proxy, reference: &str) {
    let before = proxy.spoiled();
    let spoils = [
        Spoil::Answer("503 Service Unavailable"),
        Spoil::Answer("429 Too Many Requests\nretry-after: 1"),
        Spoil::Answer("500 Internal Server Error"),
        Spoil::Reset(0),
        Spoil::Hang,
    ];
    let count = spoils.len();
    proxy.spoil_any(spoils);
    let tried = Tried::mount(reference, "");
    assert_eq!(proxy.spoiled() - before, count);
    assert!(tried.log().contains("trying again"), "{}", tried.log());
    tried.end();
}

/// Reads `path` of `reference` through each fault.
fn ride_out(proxy: &Proxy, reference: &str, path: &str, bytes: &[u8], cases: Vec<Case>) {
    resolve_through(proxy, reference);
    for case in cases {
        let name = case.name;
        let tried = Tried::mount(reference, "");
        // Something has come before: a refusal is then one that may pass.
        let peek = "import sys; open(sys.argv[1], 'rb', buffering=0).read(10)";
        Done::of(&mut python(peek, &[&format!("{}/{path}", tried.dir)])).ok();
        let (before, count) = (proxy.spoiled(), case.spoils.len());
        proxy.spoil(case.spoils);
        let out = tried.start(path).done().ok();
        assert_eq!(out, digests(bytes), "{name}: wrong bytes");
        assert_eq!(proxy.spoiled() - before, count, "{name}");
        if !case.counts.is_empty() {
            assert!(tried.metric(case.counts) > 0, "{name}");
            let log = tried.log();
            assert!(
                log.contains("127.0.0.1") && case.says.iter().any(|says| log.contains(says)),
                "{name}: {log}"
            );
        }
        tried.end();
    }
}

#[test]
fn faults_before_nginx() {
    let web = Web::new();
    web.model("m", 12, 1);
    let proxy = Proxy::before(web.server.port);
    let reference = format!("http://127.0.0.1:{}/m/", proxy.port);
    let shard = "model-00001-of-00001.safetensors";
    let body = fs::read(web.path("m").join(shard)).unwrap();
    let mut cases = cases();
    cases.push(Case {
        name: "401, then ok",
        spoils: vec![
            Spoil::Answer("401 Unauthorized"),
            Spoil::Answer("403 Forbidden"),
        ],
        says: &["40"],
        counts: DENIED,
    });
    ride_out(&proxy, &reference, shard, &body, cases);

    // A redirect that expires again and again, between requests and within one.
    proxy.sign_anew();
    let tried = Tried::mount(&reference, "");
    let peek = "import sys; open(sys.argv[1], 'rb', buffering=0).read(10)";
    Done::of(&mut python(peek, &[&format!("{}/{shard}", tried.dir)])).ok();
    proxy.sign_anew();
    let reader = tried.start(shard);
    let stop = Instant::now() + Duration::from_secs(2);
    while Instant::now() < stop {
        proxy.sign_anew();
        proxy.spoil([Spoil::Truncate(300_000)]);
        std::thread::sleep(Duration::from_millis(200));
    }
    let out = reader.done().ok();
    assert_eq!(out, digests(&body));
    proxy.sign_anew();
    let tokenizer = web.path("m").join("tokenizer.json");
    let both = [
        &format!("{}/tokenizer.json", tried.dir),
        tokenizer.to_str().unwrap(),
    ];
    Done::of(&mut tool("cmp", &both)).ok();
    assert!(proxy.refused() > 0);
    tried.end();
}

#[test]
fn faults_before_a_registry() {
    let (registry, model) = (Registry::start(), Model::new());
    let (_, reference) = layouts(&registry, &model).swap_remove(0);
    let port: u16 = registry.host().rsplit_once(':').unwrap().1.parse().unwrap();
    let proxy = Proxy::before(port);
    let reference = reference.replace(&format!(":{port}/"), &format!(":{}/", proxy.port));
    let path = "model.safetensors";
    let body = &model.files[path];
    ride_out(&proxy, &reference, path, body, cases());

    // Wrong bytes of the right length: not one is served where nothing unverified is.
    let tried = Tried::mount(&reference, "verify = \"strict\"");
    let before = proxy.spoiled();
    proxy.spoil([Spoil::Corrupt(1000)]);
    let out = tried.start(path).done().ok();
    assert_eq!(out, digests(body));
    assert_eq!(proxy.spoiled() - before, 1);
    assert_eq!(tried.metric("hearth_fetch_corrupt_objects_total"), 1);
    let log = tried.log();
    assert!(
        log.contains("wrong content") && log.contains("fetching again"),
        "{log}"
    );
    tried.end();
}

#[test]
fn faults_before_s3() {
    let server = servers::moto(false);
    let _bucket = sources::s3(&server);
    let body = bytes(21, (9 << 20) + 11);
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, &body).unwrap();
    let to = format!("{}/bucket/m/model.bin", server.url());
    let put = ["-sS", "--fail", "-T", file.path().to_str().unwrap(), &to];
    Done::of(&mut tool("curl", &put)).ok();
    let proxy = Proxy::before(server.port);
    let url = format!("http://127.0.0.1:{}", proxy.port);
    servers::set_env(&[("AWS_ENDPOINT_URL", url.as_str())]);
    ride_out(&proxy, "s3://bucket/m/", "model.bin", &body, cases());
}

/// An outage while several processes read: 5 seconds, or as many as `HEARTH_TEST_OUTAGE` says.
#[test]
fn an_outage_while_a_mount_is_read() {
    let seconds = std::env::var("HEARTH_TEST_OUTAGE").map_or(5, |s| s.parse().unwrap());
    let web = Web::slow("3m");
    web.model("m", 24, 2);
    let proxy = Proxy::before(web.server.port);
    let reference = format!("http://127.0.0.1:{}/m/", proxy.port);
    proxy.hold_after(24 << 20);
    let bed = Bed::new();
    let config = bed.path("config.toml");
    fs::write(
        &config,
        format!("[fetch]\npatience_seconds = {}\n", seconds + 30),
    )
    .unwrap();
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!(
        "--config {} mount {reference} {dir}",
        config.display()
    ));
    let shards = [1, 2].map(|n| format!("model-{n:05}-of-00002.safetensors"));
    let readers: Vec<Running> = shards
        .iter()
        .chain(&shards)
        .map(|shard| Running::of(&mut python(READ, &[&format!("{dir}/{shard}")])))
        .collect();
    // Half way, however long that takes.
    mounts::wait_until("half way", || proxy.passed() > 12 << 20);
    proxy.set_down(true);
    proxy.release();
    std::thread::sleep(Duration::from_secs(seconds));
    // What is known needs no origin.
    Done::of(&mut tool("ls", &["-lR", &dir])).ok();
    proxy.set_down(false);
    for (reader, shard) in readers.into_iter().zip(shards.iter().chain(&shards)) {
        let body = fs::read(web.path("m").join(shard)).unwrap();
        assert_eq!(reader.done().ok(), digests(&body), "{shard}");
    }
    let status = bed.wait_complete(&dir);
    assert_eq!(status["error"], Value::Null);
    assert!(
        status["metrics"][UNAVAILABLE].as_u64().unwrap() > 0,
        "{status}"
    );
    assert_eq!(status["mount"]["errors"], 0, "{status}");
    let log = fs::read_to_string(status["log"].as_str().unwrap()).unwrap();
    assert!(log.contains(&proxy.port.to_string()), "{log}");
    bed.ok(&format!("umount {dir}"));
    bed.ok("verify --all");
}

/// The name of the origin is not known for a while.
#[test]
fn a_name_that_does_not_resolve_for_a_while() {
    let web = Web::new();
    web.model("m", 12, 1);
    let proxy = Proxy::before(web.server.port);
    let bed = Bed::new();
    let (hosts, resolver) = (bed.path("hosts"), bed.path("resolv.conf"));
    let known = "127.0.0.1 localhost origin.hearth-test\n";
    fs::write(&hosts, known).unwrap();
    // Nobody answers there, and says so at once.
    fs::write(
        &resolver,
        "nameserver 127.0.0.1\noptions attempts:1 timeout:1\n",
    )
    .unwrap();
    // What is mounted below it in another namespace shows here; nothing else does.
    let shared = Shared::new(bed.dir.path());
    let dir = bed.mount_dir("mnt");
    let mount = format!(
        "mount --make-private / && mount --bind {} /etc/hosts && mount --bind {} /etc/resolv.conf \
         && exec {} --store {} mount --no-fill http://origin.hearth-test:{}/m/ {dir}",
        hosts.display(),
        resolver.display(),
        env!("CARGO_BIN_EXE_hearth"),
        bed.store().display(),
        proxy.port,
    );
    let apart = ["-m", "--propagation", "unchanged", "bash", "-c", &mount];
    Done::of(&mut tool("unshare", &apart)).ok();
    let shard = "model-00001-of-00001.safetensors";
    let body = fs::read(web.path("m").join(shard)).unwrap();
    fs::write(&hosts, "127.0.0.1 localhost\n").unwrap();
    proxy.set_down(true);
    let reader = Running::of(&mut python(READ, &[&format!("{dir}/{shard}")]));
    // Nobody is asked any more whose address was known.
    mounts::wait_until("asked", || {
        let status = bed.json(&format!("status {dir} --json"));
        status["metrics"][UNAVAILABLE].as_u64().unwrap() > 0
    });
    proxy.set_down(false);
    std::thread::sleep(Duration::from_secs(3));
    fs::write(&hosts, known).unwrap();
    assert_eq!(reader.done().ok(), digests(&body));
    let status = bed.json(&format!("status {dir} --json"));
    assert!(
        status["metrics"][UNAVAILABLE].as_u64().unwrap() > 0,
        "{status}"
    );
    let log = fs::read_to_string(status["log"].as_str().unwrap()).unwrap();
    assert!(log.contains("origin.hearth-test"), "{log}");
    bed.ok(&format!("umount {dir}"));
    drop(shared);
}

/// A directory whose mounts are shared with other namespaces.
struct Shared(PathBuf);

impl Shared {
    fn new(dir: &Path) -> Self {
        let at = dir.to_str().unwrap();
        Done::of(&mut tool("mount", &["--bind", at, at])).ok();
        let shared = Self(dir.to_owned());
        Done::of(&mut tool("mount", &["--make-shared", at])).ok();
        shared
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
