//! Mounts outlive their server: it is killed, stopped, replaced or gone while children read.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{mounts::wait_until, *};

/// Reads below `mnt` in the manner it is told, compares every byte with `truth`, and prints how often
/// it came round; ends when its standard input does.
const READER: &str = r"
import mmap, os, random, select, sys
mnt, truth, how, seed = sys.argv[1:]
rng = random.Random(int(seed))
names = sorted(os.path.relpath(os.path.join(d, f), truth) for d, _, fs in os.walk(truth) for f in fs)
data = {n: open(os.path.join(truth, n), 'rb').read() for n in names}
def same(name, at, got, want):
    if got != data[name][at:at + want]: sys.exit(f'{how}: wrong bytes of {name} at {at}, {len(got)} of {want}')
def sequential(name, step=131072):
    with open(os.path.join(mnt, name), 'rb', buffering=0) as f:
        at = 0
        while at < len(data[name]):
            got = f.read(step)
            if not got: sys.exit(f'{how}: {name} ends at {at}')
            same(name, at, got, len(got)); at += len(got)
def random_reads(name):
    fd = os.open(os.path.join(mnt, name), os.O_RDONLY)
    for _ in range(50):
        want = rng.choice([1, 4096, 70000]); at = rng.randrange(len(data[name]))
        same(name, at, os.pread(fd, want, at), want)
    os.close(fd)
def mapped(name):
    with open(os.path.join(mnt, name), 'rb') as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:
        for _ in range(100):
            at = rng.randrange(len(data[name])); same(name, at, m[at:at + 5000], 5000)
def metadata(_):
    for d, ds, fs in os.walk(mnt):
        for f in fs: os.stat(os.path.join(d, f))
    found = sorted(os.path.relpath(os.path.join(d, f), mnt) for d, _, fs in os.walk(mnt) for f in fs)
    if found != names: sys.exit(f'{how}: {found}')
    for n in names:
        if os.stat(os.path.join(mnt, n)).st_size != len(data[n]): sys.exit(f'size of {n}')
rounds = 0
print('begun', flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    globals()[how](rng.choice(names)); rounds += 1
print(rounds)
";

/// A reader under way.
pub(super) struct Reader(Option<Child>, String);

impl Reader {
    pub(super) fn start(dir: &str, truth: &Path, how: &str, seed: u64) -> Self {
        Self::by(&[], dir, truth, how, seed)
    }

    /// Started by `program` with its arguments.
    pub(super) fn by(program: &[&str], dir: &str, truth: &Path, how: &str, seed: u64) -> Self {
        let arguments = [dir, truth.to_str().unwrap(), how, &seed.to_string()];
        let mut command = python(READER, &arguments);
        if let [program, own @ ..] = program {
            let mut outer = Command::new(program);
            outer.args(own).arg(command.get_program());
            outer.args(command.get_args());
            command = outer;
        }
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut word = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut word).unwrap();
        Self(Some(child), how.to_owned())
    }

    /// How often it came round.
    pub(super) fn done(mut self) -> u64 {
        let mut child = self.0.take().unwrap();
        drop(child.stdin.take());
        let done = Done::from(self.1.clone(), child.wait_with_output().unwrap());
        assert_eq!(done.err, "", "{done:?}");
        done.ok().trim().parse().unwrap()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn signal(process: &Value, signal: Signal) {
    kill(Pid::from_raw(process.as_i64().unwrap() as i32), signal).unwrap();
}

fn is_mounted(dir: &str) -> bool {
    let list = hearth::mount::mounted().unwrap();
    list.iter().any(|m| m.mountpoint == Path::new(dir))
}

fn status(bed: &Bed, dir: &str) -> Value {
    bed.json(&format!("status {dir} --json"))
}

/// Kills the server and waits for the next one.
pub(super) fn replace_server(bed: &Bed, dir: &str) -> Value {
    let before = status(bed, dir);
    signal(&before["pid"], Signal::SIGKILL);
    let begun = Instant::now();
    loop {
        let now = status(bed, dir);
        if now["restarts"] != before["restarts"] {
            assert_ne!(now["pid"], before["pid"]);
            assert_eq!(now["keeper_pid"], before["keeper_pid"]);
            return now;
        }
        assert!(begun.elapsed() < HANG, "{now}");
    }
}

/// Unmounts and looks that nothing is left of it.
fn end(bed: &Bed, dir: &str) {
    let last = status(bed, dir);
    bed.ok(&format!("umount {dir}"));
    assert!(!is_mounted(dir));
    assert_ended(last["pid"].as_u64().unwrap());
    assert_ended(last["keeper_pid"].as_u64().unwrap());
    let mut left = files_below(&bed.store().join("run"));
    left.retain(|file| file.extension().is_none_or(|e| e != "log"));
    assert!(left.is_empty(), "{left:?}");
}

fn open_files(process: &Value) -> usize {
    fs::read_dir(format!("/proc/{process}/fd")).unwrap().count()
}

#[test]
fn readers_do_not_notice_that_their_server_is_killed() {
    let bed = Bed::new();
    // What is complete soon, and what is not before the end.
    let web = Web::slow("1m");
    let model = web.model("m", 12, 3);
    let (dir, truth) = (bed.mount_dir("mnt"), web.path("m"));
    bed.ok(&format!("mount {model} {dir}"));
    let first = status(&bed, &dir);
    assert_eq!(first["restarts"], 0);
    let fds = open_files(&replace_server(&bed, &dir)["keeper_pid"]);
    let hows = [
        "sequential",
        "random_reads",
        "mapped",
        "metadata",
        "random_reads",
    ];
    let readers = hows.iter().enumerate();
    let readers: Vec<_> = readers
        .map(|(seed, how)| Reader::start(&dir, &truth, how, seed as u64))
        .collect();
    let mut random = 0x5eed_u64;
    for kills in 2..=12 {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        std::thread::sleep(Duration::from_millis(random >> 33 & 0x1ff));
        assert_eq!(replace_server(&bed, &dir)["restarts"], kills);
    }
    for reader in readers {
        assert!(reader.done() > 0);
    }
    assert_same(&dir, &truth);
    bed.wait_complete(&dir);
    let last = replace_server(&bed, &dir);
    assert_same(&dir, &truth);
    // Whoever asked it something may not be done yet.
    let begun = Instant::now();
    while open_files(&last["keeper_pid"]) > fds {
        assert!(begun.elapsed() < HANG, "the keeper leaks fds");
        std::thread::sleep(Duration::from_millis(10));
    }
    let log = fs::read_to_string(last["log"].as_str().unwrap()).unwrap();
    assert_eq!(
        log.matches("the server died and is started again").count(),
        13,
        "{log}"
    );
    end(&bed, &dir);
    bed.ok("verify --all");
}

#[test]
fn what_is_open_stays_open_across_servers() {
    const SCRIPT: &str = r"
import os, sys
root = sys.argv[1]
def step(word): print(word, flush=True); input()
names = ['config.json', 'model-00001-of-00001.safetensors']
before = [open(os.path.join(root, n), 'rb', buffering=0) for n in names]
inodes = [os.fstat(f.fileno()).st_ino for f in before]
step('open')
after = [open(os.path.join(root, n), 'rb', buffering=0) for n in names]
assert inodes == [os.fstat(f.fileno()).st_ino for f in after]
for old, new in zip(before, after):
    assert old.read(100000) == new.read(100000)
    old.close()
step('read')
for f in after: assert len(f.read(70000)) in (0, 70000), f; f.close()
print('done')
";
    let bed = Bed::new();
    let web = Web::slow("2m");
    let model = web.model("m", 8, 1);
    let dir = bed.mount_dir("mnt");
    let config = bed.path("config.toml");
    fs::write(&config, "[mount]\npassthrough = false\n").unwrap();
    let older = format!("--config {}", config.display());
    // While it is arriving, complete from the start, and so on a kernel that cannot read it by itself.
    for (round, options) in ["", "", &older].into_iter().enumerate() {
        bed.ok(&format!("{options} mount {model} {dir}"));
        let mut child = python(SCRIPT, &[&dir]);
        child.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = child.spawn().unwrap();
        let mut said = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut input = child.stdin.take().unwrap();
        for expected in ["open\n", "read\n"] {
            let mut word = String::new();
            std::io::BufRead::read_line(&mut said, &mut word).unwrap();
            assert_eq!(word, expected, "round {round}");
            replace_server(&bed, &dir);
            std::io::Write::write_all(&mut input, b"\n").unwrap();
        }
        assert!(child.wait().unwrap().success());
        let passed = bed.wait_complete(&dir)["mount"]["passthrough_opens"].as_u64();
        assert!(options.is_empty() || passed == Some(0), "{passed:?}");
        end(&bed, &dir);
    }
}

#[test]
fn complete_files_need_no_server() {
    const SCRIPT: &str = r"
import hashlib, sys
f = open(sys.argv[1], 'rb', buffering=0)
print('open', flush=True); input()
print(hashlib.sha256(f.read()).hexdigest())
";
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 8, 1);
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount {model} {dir}"));
    let before = bed.wait_complete(&dir);
    let shard = "model-00001-of-00001.safetensors";
    let mut child = python(SCRIPT, &[&format!("{dir}/{shard}")]);
    child.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = child.spawn().unwrap();
    let mut word = [0; 5];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut word).unwrap();
    signal(&before["pid"], Signal::SIGSTOP);
    let mut input = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, b"\n").unwrap();
    let sum = child.wait_with_output().unwrap();
    let body = fs::read(web.path("m").join(shard)).unwrap();
    let expected = hearth::digest::Digest::of(&body).hex();
    assert_eq!(String::from_utf8(sum.stdout).unwrap().trim(), expected);
    // It does not answer, and nothing is said to be dead: only force helps.
    let mut waiting = tool("ls", &["-l", &dir])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    bed.ok(&format!("umount --force {dir}"));
    waiting.wait().unwrap();
    assert!(!is_mounted(&dir));
    assert_ended(before["pid"].as_u64().unwrap());
    assert_ended(before["keeper_pid"].as_u64().unwrap());
    bed.ok(&format!("mount {model} {dir}"));
    assert_same(&dir, &web.path("m"));
    end(&bed, &dir);
}

/// Files of the store that a process has open.
fn open_objects(process: &Value) -> Vec<PathBuf> {
    let fds = fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let files = fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    files
        .filter(|file| file.to_string_lossy().contains("/objects/sha256/"))
        .collect()
}

/// What was open a moment ago is opened again without being looked for, unless it is gone.
#[test]
fn what_was_let_go_is_kept_for_a_moment() {
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 8, 2);
    let (dir, truth) = (bed.mount_dir("mnt"), web.path("m"));
    bed.ok(&format!("mount {model} {dir}"));
    let first = bed.wait_complete(&dir);
    assert_same(&dir, &truth);
    assert_same(&dir, &truth);
    let kept = open_objects(&first["pid"]);
    for object in bed.objects() {
        assert!(kept.contains(&object), "{object:?}");
    }

    let body = fs::read(truth.join("config.json")).unwrap();
    let object = bed.object(&body);
    fs::remove_file(&object).unwrap();
    assert_same(&dir, &truth);
    wait_until("fetched again", || object.exists());
    assert_same(&dir, &truth);
    // A successor closes them, and has its own.
    assert_same(&dir, &truth);
    let next = replace_server(&bed, &dir);
    assert_same(&dir, &truth);
    assert!(!open_objects(&next["pid"]).is_empty());
    wait_until("closed", || open_objects(&next["pid"]).is_empty());
    assert_same(&dir, &truth);
    assert_eq!(status(&bed, &dir)["mount"]["errors"], 0);
    end(&bed, &dir);
}

/// A server that is stopped, for 2 seconds, or as many as `HEARTH_TEST_STOP` says: complete files that are
/// open are read as ever, from the disk and from maps; the rest goes on when the server does.
#[test]
fn a_stopped_server_holds_up_nobody_who_reads_complete_files() {
    const SCRIPT: &str = r"
import mmap, os, random, sys, time
path, truth, seconds = sys.argv[1:]
f, body = os.open(path, os.O_RDONLY), open(truth, 'rb').read()
m = mmap.mmap(f, 0, prot=mmap.PROT_READ)
print('open', flush=True); input()
rounds, longest, end = 0, 0, time.time() + float(seconds)
while time.time() < end:
    os.posix_fadvise(f, 0, 0, os.POSIX_FADV_DONTNEED)
    begun = time.time()
    at = random.randrange(len(body)); assert os.pread(f, 70000, at) == body[at:at + 70000]
    at = random.randrange(len(body)); assert m[at:at + 5000] == body[at:at + 5000]
    rounds, longest = rounds + 1, max(longest, time.time() - begun)
print(rounds, round(1000 * longest))
";
    let seconds = std::env::var("HEARTH_TEST_STOP").unwrap_or("2".into());
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 12, 2);
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount --no-fill {model} {dir}"));
    let shards = [1, 2].map(|n| format!("model-{n:05}-of-00002.safetensors"));
    let [here, lazy] = [0, 1].map(|n| format!("{dir}/{}", shards[n]));
    let [truth, other] = [0, 1].map(|n| web.path("m").join(&shards[n]));
    Done::of(&mut tool("cmp", &[&here, truth.to_str().unwrap()])).ok();
    let begun = Instant::now();
    while status(&bed, &dir)["mount"]["passthrough_opens"] == 0 {
        assert!(begun.elapsed() < HANG);
        Done::of(&mut tool("cmp", &[&here, truth.to_str().unwrap()])).ok();
    }
    let mut reader = python(SCRIPT, &[&here, truth.to_str().unwrap(), &seconds]);
    reader.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut reader = reader.spawn().unwrap();
    let mut word = [0; 5];
    std::io::Read::read_exact(reader.stdout.as_mut().unwrap(), &mut word).unwrap();
    let before = status(&bed, &dir);
    signal(&before["pid"], Signal::SIGSTOP);
    let waiting = Running::of(&mut tool("cmp", &[&lazy, other.to_str().unwrap()]));
    let mut input = reader.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, b"\n").unwrap();
    let said = reader.wait_with_output().unwrap();
    assert!(said.status.success());
    let said = String::from_utf8(said.stdout).unwrap();
    println!("reads and the longest, in ms, in {seconds} s without a server: {said}");
    signal(&before["pid"], Signal::SIGCONT);
    waiting.done().ok();
    let after = status(&bed, &dir);
    assert_eq!(
        (&after["pid"], &after["restarts"]),
        (&before["pid"], &0.into())
    );
    assert_eq!(after["mount"]["errors"], 0);
    end(&bed, &dir);
}

#[test]
fn without_a_server_for_long_requests_are_refused_until_one_is_back() {
    const SCRIPT: &str = r"
import errno, os, sys
try: os.statvfs(sys.argv[1]); print('fine')
except OSError as error: print(errno.errorcode[error.errno])
";
    // Opens what is here and what is not, and reads both when told to.
    const READER: &str = r"
import errno, os, sys
here, coming = (os.open(f'{sys.argv[1]}/{name}', os.O_RDONLY) for name in sys.argv[2:])
os.read(here, 1)
print('open', flush=True)
input()
try: os.pread(coming, 1, os.fstat(coming).st_size - 1); print('read')
except OSError as error: print(errno.errorcode[error.errno])
sys.stdout.flush()
sys.stdout.buffer.write(os.pread(here, 1 << 20, 0))
";
    let bed = Bed::new();
    let mut web = Web::new();
    let origin = web.gate();
    origin.hold_after(0);
    let model = web.model("m", 8, 1);
    let dir = bed.mount_dir("mnt");
    let config = bed.path("config.toml");
    let good = "[mount]\norphan_timeout_seconds = 1\n";
    fs::write(&config, good).unwrap();
    let config_arg = format!("--config {}", config.display());
    bed.ok(&format!("{config_arg} mount {model} {dir}"));
    let before = status(&bed, &dir);
    let (here, coming) = ("config.json", "model-00001-of-00001.safetensors");
    let mut reader = python(READER, &[&dir, here, coming]);
    reader.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut reader = reader.stderr(Stdio::piped()).spawn().unwrap();
    let mut word = [0; 5];
    std::io::Read::read_exact(reader.stdout.as_mut().unwrap(), &mut word).unwrap();
    // No server can be started any more.
    fs::write(&config, "nonsense").unwrap();
    let killed = Instant::now();
    signal(&before["pid"], Signal::SIGKILL);
    assert_eq!(
        Done::of(&mut python(SCRIPT, &[&dir])).ok().trim(),
        "ETIMEDOUT"
    );
    let waited = killed.elapsed();
    assert!(waited >= Duration::from_secs(1), "it waits: {waited:?}");
    // What is complete and open is read as ever, and nothing else.
    std::io::Write::write_all(reader.stdin.as_mut().unwrap(), b"\n").unwrap();
    let read = Done::from("reader".into(), reader.wait_with_output().unwrap());
    let truth = fs::read_to_string(web.path("m").join(here)).unwrap();
    assert_eq!(read.ok(), format!("ETIMEDOUT\n{truth}"));
    let gone = bed.fails(&format!("status {dir}"));
    assert!(
        gone.contains("its server does not come back") && gone.contains("umount --force"),
        "{gone}"
    );
    fs::write(&config, good).unwrap();
    origin.release();
    let begun = Instant::now();
    while Done::of(&mut python(SCRIPT, &[&dir])).ok().trim() != "fine" {
        assert!(begun.elapsed() < HANG);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_same(&dir, &web.path("m"));
    end(&bed, &dir);
}

#[test]
fn what_is_left_of_the_dead_is_cleaned() {
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 4, 1);
    let dir = bed.mount_dir("mnt");
    for forced in [false, true] {
        bed.ok(&format!("mount {model} {dir}"));
        let dead = status(&bed, &dir);
        signal(&dead["keeper_pid"], Signal::SIGKILL);
        assert_ended(dead["keeper_pid"].as_u64().unwrap());
        // Without its keeper it goes on, and is the last.
        assert_same(&dir, &web.path("m"));
        assert_eq!(status(&bed, &dir)["pid"], dead["pid"]);
        signal(&dead["pid"], Signal::SIGKILL);
        assert_ended(dead["pid"].as_u64().unwrap());
        assert!(is_mounted(&dir));
        if forced {
            bed.ok(&format!("umount --force {dir}"));
            assert!(!is_mounted(&dir));
        }
    }
    bed.ok(&format!("mount {model} {dir}"));
    let dead = status(&bed, &dir);
    for process in ["keeper_pid", "pid"] {
        signal(&dead[process], Signal::SIGKILL);
        assert_ended(dead[process].as_u64().unwrap());
    }
    bed.ok(&format!("mount {model} {dir}"));
    assert_same(&dir, &web.path("m"));
    end(&bed, &dir);
}

#[test]
fn without_resending_what_was_in_flight_fails_and_nothing_hangs() {
    const SCRIPT: &str = r"
import errno, mmap, os, sys
f = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
try: print(os.preadv(f, [mmap.mmap(-1, 4096)], (8 << 20) - 8192))
except OSError as error: print(errno.errorcode[error.errno])
";
    let bed = Bed::new();
    let mut web = Web::new();
    let origin = web.gate();
    origin.hold_after(0);
    let model = web.model("m", 8, 1);
    let dir = bed.mount_dir("mnt");
    let config = bed.path("config.toml");
    fs::write(&config, "[mount]\nresend = false\n").unwrap();
    bed.ok(&format!(
        "--config {} mount --no-fill {model} {dir}",
        config.display()
    ));
    let shard = format!("{dir}/model-00001-of-00001.safetensors");
    let mut reader = python(SCRIPT, &[&shard]);
    reader.stdout(Stdio::piped());
    let reader = reader.spawn().unwrap();
    let begun = Instant::now();
    while status(&bed, &dir)["mount"]["waited_reads"] == 0 {
        assert!(begun.elapsed() < HANG);
    }
    replace_server(&bed, &dir);
    let said = reader.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(said.stdout).unwrap(), "EIO\n");
    origin.release();
    // What comes after is answered.
    let config = tool("cat", &[&format!("{dir}/config.json")])
        .output()
        .unwrap();
    assert_eq!(config.stdout, fs::read(web.path("m/config.json")).unwrap());
    end(&bed, &dir);
}

#[test]
fn a_server_of_another_version_is_refused() {
    const SCRIPT: &str = r#"
import json, socket, sys
def ask(*messages):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.connect(sys.argv[1])
    for m in messages: s.send(json.dumps(m).encode() if not isinstance(m, bytes) else m)
    return s.recv(1 << 20).decode()
print(ask({'Hello': {'protocol': 99, 'version': '9.9'}}))
print(ask({'Take': {'dir': sys.argv[2]}}))
print(repr(ask(b'nonsense')))
print(repr(ask(b'x' * 200000)))
"#;
    let bed = Bed::new();
    let web = Web::slow("4m");
    let model = web.model("m", 4, 1);
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount {model} {dir}"));
    let before = status(&bed, &dir);
    let sockets = files_below(&bed.store().join("run"));
    let socket = sockets
        .iter()
        .find(|path| path.extension().is_some_and(|e| e == "keeper"));
    let socket = socket.unwrap().to_str().unwrap();
    let said = Done::of(&mut python(SCRIPT, &[socket, &dir])).ok();
    let lines: Vec<_> = said.lines().collect();
    assert!(lines[0].contains("hearth 9.9 speaks protocol 99"), "{said}");
    assert!(lines[1].contains("speak up first"), "{said}");
    assert_eq!(lines[2..], ["''", "''"], "who is not understood is dropped");
    assert_same(&dir, &web.path("m"));
    assert_eq!(
        status(&bed, &dir)["pid"],
        before["pid"],
        "the one that was there goes on"
    );
    end(&bed, &dir);
}

#[test]
fn a_new_server_takes_over_while_the_old_one_serves() {
    let bed = Bed::new();
    let web = Web::slow("1m");
    let model = web.model("m", 12, 2);
    let (dir, truth) = (bed.mount_dir("mnt"), web.path("m"));
    let socket = bed.path("keeper.sock");
    let keeper = bed.start(&format!("keeper --socket {}", socket.display()));
    let begun = Instant::now();
    while !socket.exists() {
        assert!(begun.elapsed() < HANG);
        std::thread::sleep(Duration::from_millis(10));
    }
    let serve = || {
        bed.start(&format!(
            "mount --foreground --keeper {} {model} {dir}",
            socket.display()
        ))
    };
    let mut server = serve();
    while !is_mounted(&dir) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let hows = ["sequential", "random_reads", "mapped", "metadata"];
    let readers: Vec<_> = (1..)
        .zip(hows)
        .map(|(seed, how)| Reader::start(&dir, &truth, how, seed))
        .collect();
    for generation in 1..=6 {
        std::thread::sleep(Duration::from_millis(300));
        let next = serve();
        // It has been asked to leave, and did.
        assert_eq!(server.done().code, Some(0));
        // Which the next one says once it listens.
        let begun = Instant::now();
        while bed.run(&format!("status {dir} --json")).code != Some(0) {
            assert!(begun.elapsed() < HANG);
        }
        assert_eq!(status(&bed, &dir)["restarts"], generation);
        server = next;
    }
    // Told to end, it leaves the mount to the keeper, and another goes on.
    server.signal(Signal::SIGTERM);
    assert_eq!(server.done().code, Some(0));
    assert!(is_mounted(&dir));
    let server = serve();
    for reader in readers {
        assert!(reader.done() > 0);
    }
    assert_same(&dir, &truth);
    bed.ok(&format!("umount {dir}"));
    assert_eq!(server.done().code, Some(0));
    keeper.signal(Signal::SIGTERM);
    assert_eq!(keeper.done().code, Some(0));
    assert!(!socket.exists() && !is_mounted(&dir));
}

/// Told to end while long reads are in hand, where the kernel sends nothing again: whoever reads gets bytes, or an
/// error from the next server, and is not forgotten. An answer is longer than a process without privileges may put
/// into a socket.
#[test]
fn without_resending_an_orderly_end_forgets_no_long_read() {
    const SCRIPT: &str = r"
import errno, mmap, os, sys, threading
path, truth = sys.argv[1:]
body = open(truth, 'rb').read()
f = os.open(path, os.O_RDONLY | os.O_DIRECT)
def read(at, said):
    page = mmap.mmap(-1, 1 << 20)
    try: n = os.preadv(f, [page], at)
    except OSError as error: said.append(errno.errorcode[error.errno])
    else: said.append('same' if n == 1 << 20 and page[:n] == body[at:at + n] else f'wrong: {n}')
said = []
threads = [threading.Thread(target=read, args=(n << 20, said)) for n in range(1, 5)]
for t in threads: t.start()
print('begun', flush=True)
for t in threads: t.join()
print(*sorted(set(said)))
";
    for unprivileged in [false, true] {
        let bed = Bed::new();
        let mut web = Web::new();
        let origin = web.gate();
        // None is answered before it is told to end, and all are before it gives up.
        origin.set_held(true);
        let model = web.model("m", 8, 1);
        let dir = bed.mount_dir("mnt");
        let config = bed.path("config.toml");
        fs::write(&config, "[mount]\nresend = false\n").unwrap();
        let socket = bed.path("keeper.sock");
        let keeper = bed.start(&format!("keeper --socket {}", socket.display()));
        let begun = Instant::now();
        while !socket.exists() {
            assert!(begun.elapsed() < HANG);
            std::thread::sleep(Duration::from_millis(10));
        }
        let line = format!(
            "--config {} mount --foreground --no-fill --keeper {} {model} {dir}",
            config.display(),
            socket.display()
        );
        let serve = || {
            if !unprivileged {
                return bed.start(&line);
            }
            let hearth = bed.command(&line);
            // Only root of the whole machine may have longer packets.
            let mut command = Command::new("setpriv");
            command.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin", "--"]);
            command.args(hearth.get_args().skip(1));
            command.env("HEARTH_STORE", bed.store());
            command.env("HOME", bed.dir.path());
            command.env_remove("HEARTH_CONFIG").env_remove("HEARTH_LOG");
            Running::of(&mut command)
        };
        let server = serve();
        let shard = "model-00001-of-00001.safetensors";
        let begun = Instant::now();
        while !is_mounted(&dir) || bed.run(&format!("status {dir} --json")).code != Some(0) {
            assert!(begun.elapsed() < HANG);
        }
        let truth = web.path("m").join(shard);
        let mut reader = python(
            SCRIPT,
            &[&format!("{dir}/{shard}"), truth.to_str().unwrap()],
        );
        let mut reader = Running::of(&mut reader);
        let begun = Instant::now();
        while status(&bed, &dir)["mount"]["waited_reads"].as_u64() < Some(4) {
            assert!(begun.elapsed() < HANG && reader.runs());
        }
        server.signal(Signal::SIGTERM);
        std::thread::sleep(Duration::from_millis(200));
        origin.set_held(false);
        assert_eq!(server.done().code, Some(0));
        let server = serve();
        let said = reader.done().ok();
        let said = said.lines().last().unwrap();
        match unprivileged {
            true => assert!(said.split(' ').all(|s| s == "same" || s == "EIO"), "{said}"),
            false => assert_eq!(said, "same"),
        }
        assert_same(&dir, &web.path("m"));
        bed.ok(&format!("umount {dir}"));
        assert_eq!(server.done().code, Some(0));
        keeper.signal(Signal::SIGTERM);
        assert_eq!(keeper.done().code, Some(0));
    }
}
