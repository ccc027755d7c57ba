//! Damage, full and foreign disks, and origins that change, refuse or lie.

use std::os::unix::fs::{FileExt as _, PermissionsExt as _};

use super::*;
use crate::{hub::Stub, store::Mounted};

/// Flips one bit in the middle of a file that nobody may write.
pub(super) fn flip(file: &Path) {
    fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
    let open = fs::File::options()
        .read(true)
        .write(true)
        .open(file)
        .unwrap();
    let middle = open.metadata().unwrap().len() / 2;
    let mut byte = [0];
    open.read_exact_at(&mut byte, middle).unwrap();
    open.write_all_at(&[byte[0] ^ 4], middle).unwrap();
    fs::set_permissions(file, fs::Permissions::from_mode(0o444)).unwrap();
}

#[test]
fn a_flipped_bit_is_found_and_repaired_a_lost_file_fetched_again() {
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 8, 2);
    let other = web.model("other", 8, 1); // shares the first shard
    bed.ok(&format!("warm {model} {other}"));
    let shard = "model-00001-of-00002.safetensors";
    let body = fs::read(web.path("m").join(shard)).unwrap();
    let object = bed.object(&body);
    flip(&object);
    let unknown = bed.fails(&format!("verify {model}?include=*.json"));
    assert!(unknown.contains("is not in the store\nhint: "), "{unknown}");
    let done = bed.run("verify --all");
    assert_eq!(done.code, Some(1), "{done:?}");
    let name = object.file_name().unwrap().to_str().unwrap();
    for part in [
        name,
        &format!("  part of {model}\n"),
        &format!("  part of {other}\n"),
        "1 damaged",
    ] {
        assert!(done.out.contains(part), "{part}: {}", done.out);
    }
    let done = bed.run(&format!("verify --json {model}"));
    assert_eq!(done.code, Some(1));
    let report: Value = serde_json::from_str(&done.out).unwrap();
    assert!(report["damaged"][0].to_string().contains(name), "{report}");
    web.forget();
    let repaired = bed.ok("verify --all --repair");
    assert!(repaired.contains("1 damaged, repaired"), "{repaired}");
    let content = web.content();
    assert!(
        content.iter().all(|a| a.path.contains("model-00001")),
        "{content:?}"
    );
    assert!(web.sent() <= body.len() as u64 + 8192, "{content:?}");
    assert!(fs::read(&object).unwrap() == body);
    assert!(bed.ok("verify --all").contains("0 damaged"));
    assert_eq!(bed.json("list --json")[0]["complete"], true);

    fs::remove_file(&object).unwrap();
    let list = bed.json("list --json");
    assert_eq!(
        (&list[0]["complete"], &list[1]["complete"]),
        (&false.into(), &false.into())
    );
    let missing = bed.run(&format!("verify {model}"));
    assert_eq!(missing.code, Some(1), "{missing:?}");
    assert!(
        missing.out.contains(&format!("not all here: {model}")),
        "{missing:?}"
    );
    web.forget();
    bed.ok(&format!("warm {model}"));
    assert!(
        web.sent() <= body.len() as u64 + 8192,
        "{:?}",
        web.content()
    );
    assert!(fs::read(&object).unwrap() == body);

    // The origin is gone and so cannot repair: that is said, and it is not called good.
    flip(&object);
    drop(web.server);
    let config = bed.path("config.toml");
    fs::write(&config, "[fetch]\npatience_seconds = 1\n").unwrap();
    let done = bed.run(&format!(
        "--config {} verify {model} --repair",
        config.display()
    ));
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(
        done.err.contains("error: cannot fetch") && !done.out.contains("repaired"),
        "{done:?}"
    );
    assert!(!object.exists(), "nothing damaged is served");
}

#[test]
fn damaged_records_and_trees_are_named_and_repaired() {
    let (bed, web) = (Bed::new(), Web::new());
    let model = web.model("m", 1, 1);
    bed.ok(&format!("warm {model}"));
    for (dir, end) in [("artifacts", ".json"), ("trees", "")] {
        let files = files_below(&bed.store().join(dir));
        let name = |file: &Path| file.file_name().unwrap().to_str().unwrap().to_owned();
        let file = files.iter().find(|file| name(file).ends_with(end)).unwrap();
        flip(file);
        let done = bed.run(&format!("verify {model}"));
        assert_eq!(done.code, Some(1), "{done:?}");
        assert!(done.out.contains(&name(file)), "{done:?}");
        assert!(done.out.contains("1 damaged"), "{done:?}");
        let repaired = bed.ok(&format!("verify --repair {model}"));
        assert!(repaired.contains("1 damaged, repaired"), "{repaired}");
        assert!(bed.ok(&format!("verify {model}")).contains(" 0 damaged"));
        assert_eq!(bed.json("list --json")[0]["complete"], true);
    }
}

#[test]
fn stores_that_cannot_be_used() {
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 8, 1);
    bed.ok("list");
    let marker = bed.store().join("hearth.json");
    let text = fs::read_to_string(&marker).unwrap();
    fs::write(&marker, text.replace("\"format\":1", "\"format\":2")).unwrap();
    for line in [
        "list",
        &format!("warm {model}"),
        "gc",
        &format!("mount {model} {}", bed.mount_dir("m")),
    ] {
        let error = bed.fails(line);
        assert!(
            error.contains("has format 2") && error.contains("hint: use the newer"),
            "{error}"
        );
    }
    fs::write(&marker, "{").unwrap();
    let error = bed.fails("list");
    assert!(error.contains("hearth.json"), "{error}");
    fs::write(&marker, text).unwrap();
    bed.ok(&format!("warm {model}"));

    // Read-only: what is warm can be looked at; what needs writing says why it cannot be done.
    let image = bed.path("image");
    let disk = Mounted::ext4(&image, 64);
    let config = bed.path("config.toml");
    fs::write(&config, "[store]\nmin_free = 0\n").unwrap();
    let store = disk.dir.path().join("store");
    let store = format!("--store {} --config {}", store.display(), config.display());
    bed.ok(&format!("{store} warm {model}"));
    let remount = |how: &str| {
        let how = format!("remount,{how}");
        Done::of(&mut tool(
            "mount",
            &["-o", &how, disk.dir.path().to_str().unwrap()],
        ))
        .ok();
    };
    remount("ro");
    let error = bed.fails(&format!("{store} rm {model}"));
    assert!(
        error.contains("cannot be written") && error.contains("hint: run as"),
        "{error}"
    );
    assert!(
        bed.ok(&format!("{store} status {model}"))
            .contains("complete and verified")
    );
    bed.ok(&format!("{store} verify --all"));
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("{store} mount {model} {dir}"));
    assert_same(&dir, &web.path("m"));
    bed.ok(&format!("{store} umount {dir}"));
    let begun = Instant::now();
    while Done::of(&mut tool(
        "mount",
        &["-o", "remount,rw", disk.dir.path().to_str().unwrap()],
    ))
    .code
        != Some(0)
    {
        assert!(begun.elapsed() < HANG);
        std::thread::sleep(Duration::from_millis(50));
    }
    let file = bed.path("file");
    fs::write(&file, "").unwrap();
    let error = bed.fails(&format!("--store {} list", file.display()));
    assert!(
        error.contains("Not a directory") || error.contains("File exists"),
        "{error}"
    );
}

#[test]
fn a_full_disk_refuses_to_warm_but_serves_by_streaming() {
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 20, 2);
    let image = bed.path("image");
    let disk = Mounted::ext4(&image, 24);
    let config = bed.path("config.toml");
    fs::write(&config, "[store]\nmin_free = \"1MiB\"\n").unwrap();
    let flags = format!(
        "--store {}/store --config {}",
        disk.dir.path().display(),
        config.display()
    );
    let error = bed.fails(&format!("{flags} warm {model}"));
    assert!(
        error.contains("40.2 MiB")
            && error.contains("1.0 MiB")
            && error.contains("hint: free space"),
        "{error}"
    );
    assert_eq!(web.sent(), 0, "refused before the first byte");
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("{flags} mount {model} {dir}"));
    let error = || {
        let status = bed.json(&format!("{flags} status {dir} --json"));
        status["error"].as_str().unwrap_or_default().to_owned()
    };
    mounts::wait_until("refused", || error().contains("40.2 MiB"));
    assert_same(&dir, &web.path("m"));
    assert_same(&dir, &web.path("m"));
    bed.ok(&format!("{flags} umount {dir}"));
}

#[test]
fn a_background_fetch_that_found_no_room_goes_on_when_there_is_some() {
    let (bed, web) = (Bed::new(), Web::new());
    let model = web.model("m", 20, 2);
    let image = bed.path("image");
    let disk = Mounted::ext4(&image, 80);
    let config = bed.path("config.toml");
    fs::write(&config, "[store]\nmin_free = \"1MiB\"\n").unwrap();
    let root = disk.dir.path();
    let flags = format!(
        "--store {}/store --config {}",
        root.display(),
        config.display()
    );
    let ballast = root.join("ballast");
    let flag = nix::fcntl::FallocateFlags::empty();
    let file = fs::File::create(&ballast).unwrap();
    nix::fcntl::fallocate(file, flag, 0, 45 << 20).unwrap();
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("{flags} mount {model} {dir}"));
    let status = || bed.json(&format!("{flags} status {dir} --json"));
    mounts::wait_until("refused", || {
        let status = status();
        let error = status["error"].as_str().unwrap_or_default();
        error.contains("40.2 MiB")
    });
    mounts::wait_until("said", || {
        let said = bed.ok(&format!("{flags} status {dir}"));
        said.contains("the background fetch waits: ")
    });
    fs::remove_file(&ballast).unwrap();
    mounts::wait_until("all of it", || status()["complete"] == true);
    mounts::wait_until("no error", || status()["error"] == Value::Null);
    bed.ok(&format!("{flags} umount {dir}"));
}

#[test]
fn a_change_at_the_origin_is_noticed_and_never_mixed() {
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 12, 1);
    let shard = "model-00001-of-00001.safetensors";
    let old = fs::read(web.path("m").join(shard)).unwrap();
    let new = bytes(77, old.len());
    let replace = |body: &[u8]| {
        // Another second, so another etag; by rename, as publishers do.
        std::thread::sleep(Duration::from_millis(1100));
        fs::write(web.path("new"), body).unwrap();
        fs::rename(web.path("new"), web.path("m").join(shard)).unwrap();
    };
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount --no-fill {model} {dir}"));
    let read = "import os, sys\nf = os.open(sys.argv[1], 0)\nos.posix_fadvise(f, 0, 0, 1)\ntry:\n \
                sys.stdout.buffer.write(os.pread(f, 65536, int(sys.argv[2]) << 20))\n\
                except OSError as e: sys.exit(e.errno)";
    let read = |mib: usize| {
        let output = python(read, &[&format!("{dir}/{shard}"), &mib.to_string()])
            .output()
            .unwrap();
        (output.status.code().unwrap(), output.stdout)
    };
    assert_eq!(read(2), (0, old[2 << 20..][..65536].to_vec()));
    replace(&new);
    assert_eq!(read(8), (libc::ESTALE, Vec::new()));
    let (code, again) = read(2);
    assert!(
        code == libc::ESTALE || again == old[2 << 20..][..65536],
        "{code}"
    );
    bed.ok(&format!("umount {dir}"));
    let logs = files_below(&bed.store().join("run"));
    let log = fs::read_to_string(&logs[0]).unwrap();
    assert!(log.contains(shard) && log.contains("412"), "{log}");
    assert_eq!(
        log.matches(&format!("{shard}: ")).count(),
        log.lines().count(),
        "{log}"
    );

    // A warm resolves again and has the new one.
    bed.ok(&format!("warm {model}"));
    assert!(fs::read(bed.object(&new)).unwrap() == new);

    // It changes while it is warmed.
    let mut web2 = Web::new();
    let origin = web2.gate();
    origin.hold_after(4 << 20);
    let model = web2.model("m", 24, 1);
    let bed = Bed::new();
    let config = bed.path("config.toml");
    fs::write(&config, "[fetch]\nmax_connections = 2\n").unwrap();
    let warm = bed.start(&format!("--config {} warm {model}", config.display()));
    mounts::wait_until("half way", || origin.passed() > 2 << 20);
    fs::write(web2.path("new"), &new).unwrap();
    fs::rename(web2.path("new"), web2.path("m").join(shard)).unwrap();
    origin.release();
    let done = warm.done();
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.err.contains("changed at the origin"), "{done:?}");
    assert!(fs::read(bed.object(&new)).unwrap() == new);
    bed.ok("verify --all");
}

/// Answers by path: `/STATUS/...` lists one file whose content gets that status, so often.
const SCRIPTED: &str = r#"
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
body = bytes(range(256)) * 8192
seen = {}
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in headers.items(): self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)
    def do_GET(self):
        _, how, *rest = self.path.split("/")
        status, _, times = how.partition("x")
        if rest == ["hearth.json"]: return self.answer(404)
        if rest == [""]: return self.answer(200, b'<a href="model.bin">model.bin</a>', Content_Type="text/html")
        tag = {"ETag": '"one"', "Accept-Ranges": "bytes"}
        if self.command == "HEAD": return self.answer(200, body, **tag)
        seen[how] = seen.get(how, 0) + 1
        if not times or seen[how] <= int(times):
            return self.answer(int(status), b"secret page <html>", Retry_After="1")
        first, last = self.headers["Range"][6:].split("-")
        part = body[int(first):int(last) + 1]
        self.answer(206, part, Content_Range=f"bytes {first}-{last}/{len(body)}", **tag)
    do_HEAD = do_GET
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"#;

#[test]
fn refusals_are_told_by_name_with_what_to_do() {
    let bed = Bed::new();
    let server = servers::python(|port, _| vec!["-c".into(), SCRIPTED.into(), port.to_string()]);
    let config = bed.path("config.toml");
    fs::write(&config, "[fetch]\npatience_seconds = 2\n").unwrap();
    let flag = format!("--config {}", config.display());
    let host = format!("127.0.0.1:{}", server.port);
    for (status, parts) in [
        ("404", &["answered 404 Not Found"][..]),
        (
            "403",
            &["answered 403 Forbidden", "\nhint: check that credentials"],
        ),
        ("500", &["answered 500", "\nhint: run the command again"]),
        ("429", &["answered 429", "\nhint: run the command again"]),
    ] {
        let url = format!("http://{host}/{status}/");
        let error = bed.fails(&format!("{flag} warm {url}"));
        assert!(
            error.contains(&format!("error: cannot fetch {url}\n  caused by: ")),
            "{error}"
        );
        for part in parts.iter().chain(&["model.bin", host.as_str()]) {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert_eq!(error.matches("model.bin").count(), 1, "said once: {error}");
        assert!(
            !error.contains("secret page") && error.lines().count() <= 3,
            "{error}"
        );
        assert_eq!(bed.json("list --json")[0]["complete"], false);
        bed.ok(&format!("rm {url}"));
    }
    // An origin that recovers: waited for as it asks.
    let begun = Instant::now();
    bed.ok(&format!("{flag} warm http://{host}/429x1/"));
    assert!(
        begun.elapsed() >= Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    bed.ok(&format!("warm http://{host}/503x2/"));
    let error = bed.fails(&format!("{flag} warm http://127.0.0.1:1/x/"));
    assert!(error.contains("trying again"), "{error}");
    assert!(
        error.contains("cannot connect to 127.0.0.1:1: Connection refused"),
        "{error}"
    );
    assert!(error.contains("hint: "), "{error}");
}

#[test]
fn content_that_is_not_what_its_digest_says_is_not_kept() {
    let bed = Bed::new();
    let stub = Stub::start(1000);
    let good = bytes(5, 6 << 20);
    stub.write("model.safetensors", &good);
    stub.write("config.json", b"{}");
    stub.control("POST", "commit", "");
    crate::servers::set_env(&[("HF_ENDPOINT", stub.server.url())]);
    let blob = stub
        .root
        .path()
        .join(".blobs")
        .join(hearth::digest::Digest::of(&good).hex());
    assert!(blob.exists());
    // By a copy: the file in the repository may be the same one.
    let mut bad = good.clone();
    bad[3 << 20] ^= 1;
    fs::remove_file(&blob).unwrap();
    fs::write(&blob, &bad).unwrap();
    let error = bed.fails("warm hf://org/my-model");
    for part in [
        "cannot fetch hf://org/my-model",
        "model.safetensors",
        "sha256",
        "\nhint: the origin served",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(bed.json("list --json")[0]["complete"], false);
    assert!(
        bed.objects()
            .iter()
            .all(|o| o.metadata().unwrap().len() < 1 << 20)
    );
    let dir = bed.mount_dir("mnt");
    let config = bed.path("config.toml");
    fs::write(&config, "[fetch]\nverify = \"strict\"\n").unwrap();
    bed.ok(&format!(
        "--config {} mount --no-fill hf://org/my-model {dir}",
        config.display()
    ));
    let file = format!("{dir}/model.safetensors");
    let done = Done::of(&mut tool("cat", &[&file]));
    assert!(done.err.contains("Input/output error"), "{}", done.err);
    // The origin is mended: the same mount serves it.
    fs::remove_file(&blob).unwrap();
    fs::write(&blob, &good).unwrap();
    bed.ok(&format!("umount {dir}"));
    bed.ok("warm hf://org/my-model");
    assert!(fs::read(bed.object(&good)).unwrap() == good);
}

/// Whoever waits for an origin that is gone is told so, once, before it is given up.
#[test]
fn an_outage_is_said_once() {
    let bed = Bed::new();
    let mut web = Web::new();
    let origin = web.gate();
    origin.hold_after(1 << 20);
    let model = web.model("m", 4, 1);
    let config = bed.path("config.toml");
    fs::write(&config, "[fetch]\npatience_seconds = 8\n").unwrap();
    let warm = bed.start(&format!("--config {} warm {model}", config.display()));
    mounts::wait_until("half way", || origin.passed() > 0);
    origin.set_down(true);
    let err = warm.done().failed(1);
    let said: Vec<_> = err.lines().filter(|l| l.starts_with("waiting: ")).collect();
    assert_eq!(said.len(), 1, "{err}");
    assert!(said[0].contains("127.0.0.1"), "{err}");
    assert!(said[0].contains("; trying for another "), "{err}");
    assert!(err.contains("hint: run the command again"), "{err}");
}
