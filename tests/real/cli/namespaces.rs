//! Servers in PID namespaces of their own, as containers have them: such a one ends with its first process, however
//! that ends, while the kernel waits for answers before it drops pages. Who makes it drop them cannot be killed.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    csi::{Pods, wait_for},
    *,
};

/// Reads a page, and then another one, for which it has to wait; prints what that is.
const READER: &str = r"
import hashlib, os, sys
f = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(f, 0, 0, os.POSIX_FADV_RANDOM)
first = os.pread(f, 4096, 0)
print('begun', flush=True)
print(hashlib.sha256(first + os.pread(f, 4096, 1000 << 10)).hexdigest())
";

/// A server, and the first process of its namespace.
struct Server {
    outer: Running,
    first: Pid,
}

impl Server {
    fn start(bed: &Bed, line: &str) -> Self {
        let mut command = Command::new("unshare");
        command
            .args(["--fork", "--pid", "--kill-child", "--mount-proc"])
            .args(["--propagation", "slave", env!("CARGO_BIN_EXE_hearth")])
            .args(line.split(' '))
            .env("HEARTH_STORE", bed.store())
            .env("HOME", bed.dir.path());
        let outer = Running::of(&mut command);
        let id = outer.child.as_ref().unwrap().id();
        let children = format!("/proc/{id}/task/{id}/children");
        let first = || {
            let text = fs::read_to_string(&children).unwrap_or_default();
            text.trim().parse::<i32>().ok()
        };
        wait_for("the first process", || first().is_some());
        let first = Pid::from_raw(first().unwrap());
        Self { outer, first }
    }

    /// Ends its first process, and so all of them.
    fn end(mut self, signal: Signal) {
        kill(self.first, signal).unwrap();
        let begun = Instant::now();
        while self.outer.runs() {
            let late = begun.elapsed() > HANG;
            assert!(!late, "{signal}: the namespace does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Processes of hearth, with `word` in their command line, that cannot be killed now.
pub(super) fn unkillable(word: &str) -> usize {
    let is_one = |dir: &Path| -> std::io::Result<bool> {
        let stat = fs::read_to_string(dir.join("stat"))?;
        let line = fs::read(dir.join("cmdline"))?;
        Ok(stat.contains("(hearth") && stat.contains(") D ") && contains(&line, word))
    };
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter(|process| is_one(&process.path()).unwrap_or(false))
        .count()
}

fn contains(line: &[u8], word: &str) -> bool {
    line.windows(word.len()).any(|part| part == word.as_bytes())
}

#[test]
fn a_namespace_ends_while_pages_are_to_be_dropped() {
    let bed = Bed::new();
    let mut web = Web::new();
    let origin = web.gate();
    let model = web.model("m", 2, 1);
    // What is unmounted there is so in all namespaces.
    let shared = Pods::new(bed.path("shared"));
    let dir = shared.0.join("mnt").display().to_string();
    fs::create_dir(&dir).unwrap();
    let socket = bed.path("keeper.sock").display().to_string();
    let keeper = bed.start(&format!("keeper --socket {socket}"));
    wait_for("keeper", || Path::new(&socket).exists());
    let line = format!("mount --foreground --no-fill --keeper {socket} {model} {dir}");
    let serve = || Server::start(&bed, &line);
    let shard = "model-00001-of-00001.safetensors";
    let body = fs::read(web.path("m").join(shard)).unwrap();
    let right = [&body[..4096], &body[1000 << 10..][..4096]].concat();
    let right = hearth::digest::Digest::of(&right).hex();
    let status = || bed.run(&format!("status {dir} --json"));
    let served = || {
        let said = status();
        said.code == Some(0) && said.out.contains("\"waited_reads\"")
    };
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        // The last bytes of a chunk come late.
        origin.hold_after(512 << 10);
        let server = serve();
        wait_for("mounted", served);
        let mut reader = python(READER, &[&format!("{dir}/{shard}")]);
        reader.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut reader = reader.spawn().unwrap();
        let mut word = [0; 6];
        std::io::Read::read_exact(reader.stdout.as_mut().unwrap(), &mut word).unwrap();
        server.end(Signal::SIGKILL);
        // What the first one served nobody has verified, and the second one has the kernel drop it; for that, the
        // kernel waits until the second page is there.
        let server = serve();
        wait_for("pages are to be dropped", || unkillable(&socket) > 0);
        server.end(signal);
        let server = serve();
        origin.release();
        let done = Done::from("reader".into(), reader.wait_with_output().unwrap());
        assert_eq!(done.ok().trim(), right, "{signal}");
        wait_for("pages are dropped", || unkillable(&socket) == 0);
        bed.ok(&format!("umount {dir}"));
        let Server { outer, .. } = server;
        assert_eq!(outer.done().code, Some(0));
        fs::remove_dir_all(bed.store().join("partial")).unwrap();
        fs::create_dir(bed.store().join("partial")).unwrap();
    }
    let id = keeper.child.as_ref().unwrap().id();
    let children = || fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    wait_for("those who dropped them are gone", || children().is_empty());
    keeper.signal(Signal::SIGTERM);
    assert_eq!(keeper.done().code, Some(0));
}
