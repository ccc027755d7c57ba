//! A warm that is stopped goes on where it was, and several at once share the work.

use nix::sys::signal::Signal;

use super::*;

/// Bytes of the only artifact that are in the store.
fn present(bed: &Bed) -> u64 {
    let list = bed.json("list --json");
    list[0]["present_bytes"].as_u64().unwrap_or(0)
}

/// Waits until nginx has logged the requests that were broken off.
fn settle(web: &Web) {
    let mut before = usize::MAX;
    while before != web.asked().len() {
        before = web.asked().len();
        std::thread::sleep(Duration::from_millis(200));
    }
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
        let web = Web::slow("500k");
        let model = web.model("m", 12, 2);
        let size = total_size(&web.path("m"));
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
        settle(&web);
        web.forget();
        let report = bed.json(&format!("warm --json {model}"));
        assert_eq!(report[0]["bytes_before"], kept);
        // Once more only what the headers of the files say about their tensors.
        let again = web.sent();
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
    let bed = Bed::new();
    let web = Web::slow("1m");
    let model = web.model("m", 20, 3);
    let size = total_size(&web.path("m"));
    let config = bed.path("config.toml");
    fs::write(&config, "[fetch]\nmax_connections = 4\n").unwrap();
    let line = format!("--config {} warm {model}", config.display());
    let mut kept = 0;
    for moment in [150, 700, 420, 930, 260] {
        let warm = bed.start(&line);
        std::thread::sleep(Duration::from_millis(moment));
        warm.signal(Signal::SIGKILL);
        assert_eq!(warm.done().code, None);
        let now = present(&bed);
        assert!(
            now >= kept,
            "{now} after {kept}: nothing that was kept is lost"
        );
        kept = now;
    }
    assert!(kept > 0 && kept < size, "{kept} of {size}");
    settle(&web);
    let wasted = web.sent().saturating_sub(kept);
    web.forget();
    bed.ok(&format!("warm {model}"));
    assert!(
        web.sent() <= size - kept + 8192,
        "{} of {}",
        web.sent(),
        size - kept
    );
    // At each of five kills, a part of a chunk on each of four connections, and what was written
    // but not yet noted as durable.
    assert!(wasted <= 5 * (8 << 20), "{wasted} bytes fetched twice");
    println!("{kept} of {size} kept, {wasted} wasted");
    assert_warm(&bed, &web, &model);
    let mut left = files_below(&bed.store().join("partial"));
    left.retain(|f| !f.ends_with("lock"));
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn processes_on_one_store_fetch_everything_once() {
    let bed = Bed::new();
    let web = Web::slow("4m");
    let model = web.model("m", 16, 2);
    let size = total_size(&web.path("m"));
    let dir = bed.mount_dir("mnt");
    let both = [0, 1].map(|_| bed.start(&format!("warm {model}")));
    bed.ok(&format!("mount {model} {dir}"));
    assert_same(&dir, &web.path("m"));
    for warm in both {
        warm.done().ok();
    }
    bed.wait_complete(&dir);
    bed.ok(&format!("umount {dir}"));
    let sent = web.sent();
    assert!(
        sent * 100 <= size * 115,
        "{sent} of {size}: {:?}",
        web.content()
    );
    assert_warm(&bed, &web, &model);
}
