//! The memory that hearth takes where there is little: a cgroup of 512 MiB.

use std::io::Write as _;

use hearth::digest::Digest;
use serde_json::json;

use super::*;
use crate::pushed::{MANIFEST, Registry, tar};

const LIMIT_BYTES: u64 = 512 << 20;

/// A memory cgroup (v1 or v2), removed when dropped.
pub(super) struct Group(PathBuf);

impl Group {
    /// One whose processes may take `bytes` that cannot be taken back, as what is cached of files can.
    pub(super) fn of(bytes: u64) -> Self {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let name = format!("hearth-test-{}", std::process::id());
        let (dir, limit) = match v1.join("memory.limit_in_bytes").exists() {
            true => (v1.join(name), "memory.limit_in_bytes"),
            false => (Path::new("/sys/fs/cgroup").join(name), "memory.max"),
        };
        fs::create_dir(&dir).unwrap();
        let group = Self(dir);
        fs::write(group.0.join(limit), bytes.to_string()).unwrap();
        // No swap, where the kernel can say so.
        for swap in ["memory.memsw.limit_in_bytes", "memory.swap.max"] {
            if group.0.join(swap).exists() {
                let bytes = if swap.ends_with("max") { 0 } else { bytes };
                fs::write(group.0.join(swap), bytes.to_string()).unwrap();
            }
        }
        group
    }

    /// `command` in this group, with all that it starts.
    pub(super) fn put(&self, command: &Command) -> Command {
        let mut inner = Command::new("bash");
        let enter = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.0.display());
        inner
            .args(["-c", &enter, "bash"])
            .arg(command.get_program());
        inner.args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => inner.env(key, value),
                None => inner.env_remove(key),
            };
        }
        inner
    }

    /// Processes that were killed for memory.
    pub(super) fn killed(&self) -> u64 {
        let files = ["memory.oom_control", "memory.events"].map(|name| self.0.join(name));
        let text: String = files.iter().flat_map(fs::read_to_string).collect();
        let line = text.lines().find(|line| line.starts_with("oom_kill "));
        line.unwrap_or_else(|| panic!("{text}"))[9..]
            .trim()
            .parse()
            .unwrap()
    }

    fn most(&self) -> u64 {
        let files = ["memory.max_usage_in_bytes", "memory.peak"].map(|name| self.0.join(name));
        let text: String = files.iter().flat_map(fs::read_to_string).collect();
        text.trim().parse().unwrap_or(0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The processes have ended, but the kernel may not know yet.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Fifty threads that each read pieces here and there, and compare them with the origin's.
const READERS: &str = "
import os, random, sys, threading
here, there, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
names = sorted(n for n in os.listdir(there) if n.endswith('safetensors'))
wrong = []
def read(seed):
    r = random.Random(seed)
    try:
        for _ in range(12):
            name = r.choice(names)
            f, g = os.open(here + '/' + name, 0), os.open(there + '/' + name, 0)
            n = r.choice([4096, 65536, 1 << 20])
            at = r.randrange(os.fstat(g).st_size - n)
            if os.pread(f, n, at) != os.pread(g, n, at): wrong.append((name, at, n))
            os.close(f); os.close(g)
    except OSError as e: wrong.append(e)
threads = [threading.Thread(target=read, args=(seed * 1000 + n,)) for n in range(50)]
for t in threads: t.start()
for t in threads: t.join()
if wrong: sys.exit(str(wrong[:5]))
";

#[test]
fn four_pulls_and_two_hundred_readers_fit_into_512_mib() {
    let bed = Bed::new();
    let web = Web::new();
    web.model("m", 64, 3);
    let group = Group::of(LIMIT_BYTES);
    let dir = bed.mount_dir("mnt");
    let mount = bed.command(&format!("mount {} {dir}", web.url("m")));
    Done::of(&mut group.put(&mount)).ok();
    let pulls: Vec<Running> = (0..4)
        .map(|n| {
            // Not the same content: each has to be fetched, hashed and stored.
            let name = format!("pull-{n}");
            write_model(&web.path(&name), 96, 1, 100 + n);
            Running::of(&mut group.put(&bed.command(&format!("warm {}", web.url(&name)))))
        })
        .collect();
    let there = web.path("m");
    let readers: Vec<Running> = (0..4)
        .map(|n| {
            Running::of(&mut python(
                READERS,
                &[&dir, there.to_str().unwrap(), &n.to_string()],
            ))
        })
        .collect();
    for running in pulls.into_iter().chain(readers) {
        running.done().ok();
    }
    let status = bed.wait_complete(&dir);
    assert_eq!(status["mount"]["errors"], 0, "{status}");
    bed.ok(&format!("umount {dir}"));
    assert_eq!(group.killed(), 0);
    println!(
        "at most {} MiB of {} MiB",
        group.most() >> 20,
        LIMIT_BYTES >> 20
    );
}

/// Pushes an image of two layers that decode to a little more than the window of 128 MiB that they ask for, as
/// `zstd --long=27` makes them. Each layer is another one.
fn push_with_long_windows(bed: &Bed, registry: &Registry, number: u64) -> String {
    let kind = "application/vnd.oci.image";
    let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
    for layer in 0..2 {
        let file = fs::File::create(bed.path("zeros")).unwrap();
        file.set_len((130 << 20) + 512 * (2 * number + layer))
            .unwrap();
        let plain = tar(&bed.path(""), &[], &["zeros"]);
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(27).unwrap();
        encoder.write_all(&plain).unwrap();
        let blob = encoder.finish().unwrap();
        layers.push(registry.blob("long", &format!("{kind}.layer.v1.tar+zstd"), &blob));
        diff_ids.push(Digest::of(&plain).to_string());
    }
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = config.to_string();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "layers": layers,
        "config": registry.blob("long", &format!("{kind}.config.v1+json"), config.as_bytes()),
    });
    let tag = format!("t{number}");
    registry.manifest("long", &tag, &manifest);
    registry.reference("long", &tag)
}

/// A few KiB that want a GiB of windows.
#[test]
fn four_images_with_long_windows_at_once_fit_into_512_mib() {
    let (bed, registry) = (Bed::new(), Registry::start());
    let images: Vec<String> = (0..4)
        .map(|number| push_with_long_windows(&bed, &registry, number))
        .collect();
    let group = Group::of(LIMIT_BYTES);
    let warm = bed.command(&format!("warm {}", images.join(" ")));
    Done::of(&mut group.put(&warm)).ok();
    assert_eq!(group.killed(), 0);
    bed.ok("verify --all");
    println!("at most {} MiB", group.most() >> 20);
}
