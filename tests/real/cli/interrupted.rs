//! A warm that is stopped goes on where it was, and several at once share the work.

use nix::sys::signal::Signal;

use super::*;

/// Bytes of the only artifact that are in the store.
fn present(bed: &Bed) -> u64 {
    let list = bed.json("list --json");
    list[0]["present_bytes"].as_u64().unwrap_or(0)
}

/// Every file of the model is in the store, with the bytes of the origin.
fn assert_warm(bed: &Bed, web: &Web, model: &str) {
    bed.ok("verify --all");
    let status = bed.json(&format!("status --json {model}"));
    assert_eq!(status["complete"], true);
    for file in status["file"].as_array().unwrap() {
        let body = fs::read(web.path("m").join(file["path"].as_str().unwrap())).unwrap();
        assert_eq!(
            file["object"],
            hearth::digest::Digest::of(&body).to_string()
        );
        assert!(fs::read(bed.object(&body)).unwrap() == body);
    }
}

#[test]
fn signals_keep_what_has_arrived() {
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let bed = Bed::new();
        let mut web = Web::slow("500k");
        let origin = web.gate();
        let model = web.model("m", 12, 2);
        let size = total_size(&web.path("m"));
        // More than is waited for and a part of a chunk on each connection, and less than all.
        origin.hold_after(41 << 19);
        let warm = bed.start(&format!("warm {model}"));
        while present(&bed) < 4 << 20 {
            std::thread::sleep(Duration::from_millis(20));
        }
        warm.signal(signal);
        let done = warm.done();
        assert_eq!(done.code, Some(code), "{done:?}");
        assert!(done.err.ends_with("run it again to go on\n"), "{done:?}");
        let kept = present(&bed);
        assert!((4 << 20..size).contains(&kept), "{kept} of {size}");
        origin.settle();
        origin.release();
        let before = origin.passed();
        let report = bed.json(&format!("warm --json {model}"));
        assert_eq!(report[0]["bytes_before"], kept);
        // Once more only what the headers of the files say about their tensors.
        let again = origin.passed() - before;
        assert!(
            again <= size - kept + 8192,
            "{again} of {}: {:?}",
            size - kept,
            web.content()
        );
        assert_warm(&bed, &web, &model);
    }
}

#[test]
fn kill_9_loses_only_what_was_in_flight() {
    const KILLS: u64 = 5;
    const CONNECTIONS: u64 = 2;
    let bed = Bed::new();
    let mut web = Web::slow("8m");
    let origin = web.gate();
    let model = web.model("m", 40, 3);
    let size = total_size(&web.path("m"));
    let config = bed.path("config.toml");
    fs::write(
        &config,
        format!("[fetch]\nmax_connections = {CONNECTIONS}\n"),
    )
    .unwrap();
    let line = format!("--config {} warm {model}", config.display());
    let mut kept = 0;
    for _ in 0..KILLS {
        // What is waited for, and a part of a chunk on each connection; not all of it, however late it is killed.
        origin.settle();
        origin.hold_after(33 << 19);
        let warm = bed.start(&line);
        // No multiple of what is fetched at once.
        while present(&bed) < kept + (27 << 19) {
            std::thread::sleep(Duration::from_millis(20));
        }
        warm.signal(Signal::SIGKILL);
        assert_eq!(warm.done().code, None);
        let now = present(&bed);
        assert!(
            now >= kept,
            "{now} after {kept}: nothing that was kept is lost"
        );
        kept = now;
    }
    assert!(kept < size, "{kept} of {size}");
    origin.settle();
    origin.release();
    let sent = origin.passed();
    bed.ok(&format!("warm {model}"));
    let rest = origin.passed() - sent;
    assert!(rest <= size - kept + 8192, "{rest} of {}", size - kept);
    // On each connection a part of a chunk, and what was on its way to the disk or from the server.
    let most = KILLS * CONNECTIONS * (2 << 20);
    assert!(sent >= 3 * most, "{sent}: too little to tell");
    let wasted = sent.saturating_sub(kept);
    assert!(wasted <= most, "{wasted} bytes fetched twice");
    println!("{kept} of {size} kept, {wasted} wasted");
    assert_warm(&bed, &web, &model);
    let mut left = files_below(&bed.store().join("partial"));
    left.retain(|f| !f.ends_with("lock"));
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn processes_on_one_store_fetch_everything_once() {
    for reads in [false, true] {
        let bed = Bed::new();
        let web = Web::slow("4m");
        let model = web.model("m", 16, 2);
        let size = total_size(&web.path("m"));
        let dir = bed.mount_dir("mnt");
        let both = [0, 1].map(|_| bed.start(&format!("warm {model}")));
        bed.ok(&format!("mount {model} {dir}"));
        // Small files are nobody's alone.
        let mut most = size + size / 50;
        if reads {
            let file = format!("if={dir}/model-00002-of-00002.safetensors");
            let read = tool("dd", &[&file, "bs=4k", "skip=3000", "count=1"]).output();
            assert_eq!(read.unwrap().stdout.len(), 4096);
            // Who waits for bytes that another process is to bring may fetch them itself, and a little more.
            most += 4 << 20;
        }
        for warm in both {
            warm.done().ok();
        }
        assert_same(&dir, &web.path("m"));
        bed.wait_complete(&dir);
        bed.ok(&format!("umount {dir}"));
        let sent = web.sent();
        assert!(sent <= most, "{sent} of {size}: {:?}", web.content());
        assert_warm(&bed, &web, &model);
    }
}
