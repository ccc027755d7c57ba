//! What people load models with, on a mount whose content is still arriving, and on one that is
//! complete.

use super::*;
use crate::hub::Stub;

/// Reads everything through `safetensors`, and prints the digests of all tensors.
const SAFE_OPEN: &str = r#"
import glob, hashlib, sys
from safetensors import safe_open
for path in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    with safe_open(path, framework="np") as f:
        for key in sorted(f.keys()):
            print(key, hashlib.sha256(f.get_tensor(key).tobytes()).hexdigest())
"#;
const LOAD_FILE: &str = r#"
import glob, hashlib, sys
from safetensors.numpy import load_file
for path in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    for key, tensor in sorted(load_file(path).items()):
        print(key, hashlib.sha256(tensor.tobytes()).hexdigest())
"#;
/// Maps whole files, in the order of a seed, and hashes them from a random place on.
const MMAP: &str = r#"
import glob, hashlib, mmap, random, sys
random.seed(int(sys.argv[2]))
out = []
paths = glob.glob(sys.argv[1] + "/*.safetensors")
random.shuffle(paths)
for path in paths:
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:
        for _ in range(20):
            m[random.randrange(len(m))]
        out.append((path.rsplit("/", 1)[1], hashlib.sha256(m).hexdigest()))
print(sorted(out))
"#;
const FIO: &[&str] = &[
    "--name=verify",
    "--size=8m",
    "--bs=4k",
    "--ioengine=psync",
    "--verify=crc32c",
    "--verify_fatal=1",
    "--verify_state_save=0",
    "--randrepeat=1",
    "--thread",
    "--output-format=terse",
];

/// Everything that reads `dir`, started at once; what each said.
fn consume(dir: &str, scratch: &Path) -> Vec<String> {
    let copy = scratch.join("copy");
    let _ = fs::remove_dir_all(&copy);
    let mut commands = vec![python(SAFE_OPEN, &[dir]), python(LOAD_FILE, &[dir])];
    commands.extend(["1", "2", "3"].map(|seed| python(MMAP, &[dir, seed])));
    commands.push(tool("cp", &["-r", dir, copy.to_str().unwrap()]));
    let mut fio = tool("fio", FIO);
    fio.args([
        "--readonly",
        "--rw=randread",
        &format!("--filename={dir}/fio.dat"),
    ]);
    commands.push(fio);
    let running: Vec<_> = commands.iter_mut().map(Running::of).collect();
    let mut said: Vec<_> = running.into_iter().map(|r| r.done().ok()).collect();
    said.pop(); // fio says how fast it was; its status is what counts
    said
}

#[test]
fn everyone_reads_the_right_bytes_while_they_arrive_and_after() {
    let bed = Bed::new();
    let mut web = Web::with("location ~ (safetensors|dat)$ { limit_rate 1m; }");
    let origin = web.gate();
    let model = web.model("m", 16, 2);
    let mut fio = tool("fio", FIO);
    fio.args(["--rw=write", "--do_verify=0"]);
    fio.arg(format!("--filename={}", web.path("m/fio.dat").display()));
    Done::of(&mut fio).ok();
    let wanted = consume(web.path("m").to_str().unwrap(), bed.dir.path());

    let dir = bed.mount_dir("mnt");
    origin.hold_after(4 << 20);
    bed.ok(&format!("mount {model} {dir}"));
    assert_eq!(bed.json(&format!("status {dir} --json"))["complete"], false);
    origin.release();
    assert!(consume(&dir, bed.dir.path()) == wanted);
    assert_same(bed.path("copy").to_str().unwrap(), &web.path("m"));
    let status = bed.wait_complete(&dir);
    assert!(
        status["mount"]["reads"].as_u64().unwrap() > 0,
        "it did arrive while it was read"
    );
    assert_eq!(status["mount"]["errors"], 0, "{status}");
    let size = total_size(&web.path("m"));
    let sent = origin.passed();
    assert!(sent <= size + size / 4, "{sent} of {size}");

    // Complete: who opens now reads without this process.
    assert!(consume(&dir, bed.dir.path()) == wanted);
    let after = bed.json(&format!("status {dir} --json"));
    assert_eq!(after["mount"]["reads"], status["mount"]["reads"], "{after}");
    assert!(
        after["mount"]["passthrough_opens"].as_u64()
            > status["mount"]["passthrough_opens"].as_u64()
    );
    bed.ok(&format!("umount {dir}"));
    // And so it is for a mount of what is warm already.
    bed.ok(&format!("mount {model} {dir}"));
    assert!(consume(&dir, bed.dir.path()) == wanted);
    assert_eq!(
        bed.json(&format!("status {dir} --json"))["mount"]["reads"],
        0
    );
    bed.ok(&format!("umount {dir}"));
}

/// The real client on a mount in the layout of its cache: first offline, then online.
const HUB: &str = r#"
import hashlib, json, os, sys
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download, try_to_load_from_cache
from safetensors.numpy import load_file
offline, wanted, commit = sys.argv[1] == "offline", json.loads(sys.argv[2]), sys.argv[3]
folder = snapshot_download("org/my-model", local_files_only=offline)
assert os.path.basename(folder) == commit, folder
for path, sha256 in wanted.items():
    for file in (os.path.join(folder, path), hf_hub_download("org/my-model", path)):
        with open(file, "rb") as f:
            assert hashlib.sha256(f.read()).hexdigest() == sha256, file
    if path.endswith(".safetensors"):
        assert len(load_file(os.path.join(folder, path))) == 3
assert try_to_load_from_cache("org/my-model", "config.json") == os.path.join(folder, "config.json")
info = scan_cache_dir()
assert not info.warnings, info.warnings
(repo,) = info.repos
assert repo.repo_id == "org/my-model" and repo.nb_files == len(wanted), repo
(revision,) = repo.revisions
assert revision.commit_hash == commit and revision.refs == {"main"}, revision
assert hf_hub_download("org/my-model", "config.json", revision=commit)
try:
    hf_hub_download("org/my-model", "not-there.json")
    raise SystemExit("found what is not there")
except Exception as error:
    assert type(error).__name__ in ("LocalEntryNotFoundError", "EntryNotFoundError", "RemoteEntryNotFoundError"), repr(error)
print("passed")
"#;

#[test]
fn the_hub_client_finds_its_cache() {
    let bed = Bed::new();
    let stub = Stub::start(1000);
    let source = bed.path("model");
    write_model(&source, 12, 2, 1);
    let mut wanted = serde_json::Map::new();
    for file in files_below(&source) {
        let body = fs::read(&file).unwrap();
        let name = file.file_name().unwrap().to_str().unwrap();
        stub.write(name, &body);
        wanted.insert(name.into(), hearth::digest::Digest::of(&body).hex().into());
    }
    stub.control("POST", "commit", "");
    crate::servers::set_env(&[("HF_ENDPOINT", stub.server.url())]);
    let wanted = Value::from(wanted).to_string();
    let dir = bed.mount_dir("cache");
    bed.ok(&format!("mount --layout hub hf://org/my-model {dir}"));
    let status = bed.json(&format!("status {dir} --json"));
    assert_eq!(status["layout"], "hub");
    let commit = status["revision"].as_str().unwrap();
    let client = |how: &str| {
        let mut command = python(HUB, &[how, &wanted, commit]);
        command
            .env("HF_HUB_CACHE", &dir)
            .env("HF_HOME", bed.path("home"))
            .env("HF_HUB_DISABLE_TELEMETRY", "1")
            .env("HF_HUB_OFFLINE", if how == "offline" { "1" } else { "0" });
        assert!(Done::of(&mut command).ok().contains("passed"));
    };
    client("offline");
    bed.wait_complete(&dir);
    client("offline");
    stub.log();
    client("online");
    let log = stub.log();
    assert!(!log.is_empty());
    for seen in &log {
        let content = seen["path"].as_str().unwrap().contains("/resolve/");
        let got = seen["status"].as_u64().unwrap() < 300 && seen["method"] == "GET" && content;
        assert!(!got && seen["server"] != "cdn", "it downloads: {seen}");
    }
    bed.ok(&format!("umount {dir}"));
}
