//! Every command but those that mount, on every kind of place.

use super::*;
use crate::{
    hub::Stub,
    sources::{Origin as _, azure, gcs, run, s3},
};

/// Every small thing that needs no server.
#[test]
fn help_version_config_and_nonsense() {
    let bed = Bed::new();
    let bare = bed.run("").failed(2);
    assert!(
        bare.contains("Usage: hearth") && bare.contains("  warm "),
        "{bare}"
    );
    assert!(!bare.contains("demo-load"), "{bare}");
    assert_golden("help", &bed.ok("help"));
    let version = bed.ok("--version");
    let commit = version.trim().strip_prefix("hearth 0.1.0 (").unwrap();
    let commit = commit.strip_suffix(')').unwrap();
    assert!(
        commit.len() >= 12 && commit.bytes().all(|b| b.is_ascii_hexdigit()),
        "{version}"
    );

    let bash = bed.ok("completions bash");
    let mut check = tool("bash", &["-c", &format!("{bash}\ncomplete -p hearth")]);
    assert!(Done::of(&mut check).ok().contains("hearth"));
    for shell in ["zsh", "fish"] {
        assert!(bed.ok(&format!("completions {shell}")).contains("umount"));
    }

    let config = bed.path("config.toml");
    fs::write(
        &config,
        "[store]\nmax_bytes = \"3GiB\"\n\n[fetch]\nmax_conections = 3\n",
    )
    .unwrap();
    let flag = format!("--config {}", config.display());
    for line in ["config --check", "config", "list", "status"] {
        let error = bed.fails(&format!("{flag} {line}"));
        for part in [
            "error: the configuration",
            "config.toml",
            "line 5",
            "max_conections",
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
    fs::write(&config, "[store]\nmax_bytes = \"3GiB\"\n").unwrap();
    assert!(
        bed.ok(&format!("{flag} config --check"))
            .contains("is valid")
    );
    let printed = bed.ok(&format!("{flag} config"));
    assert!(
        printed.contains("max_bytes = \"3GiB\"") && printed.contains("[mount]"),
        "{printed}"
    );
    // What is printed is a configuration again, and the same.
    fs::write(&config, &printed).unwrap();
    assert_eq!(bed.ok(&format!("{flag} config")), printed);
    let missing = bed.fails("--config /nonexistent/c.toml config");
    assert!(
        missing.contains("cannot read the configuration /nonexistent/c.toml"),
        "{missing}"
    );

    for (reference, part) in [
        ("nonsense", "expected hf://org/name"),
        ("s4://bucket/x", "expected hf://"),
        ("hf://only-a-name", "org/name"),
        ("s3://", "bucket"),
        ("http://host/a?include=[", "["),
        ("file://relative", "file:///"),
        ("https://host/../../etc", ".."),
    ] {
        for command in ["inspect", "warm", "pin", "verify", "rm"] {
            let error = bed.run(&format!("{command} {reference}")).failed(2);
            assert!(error.contains(part), "{command} {reference}: {error}");
            assert!(
                error.contains("'[REF]...'") || error.contains("<REF>"),
                "{error}"
            );
        }
    }
    for line in [
        "gc --target-bytes lots",
        "mount hf://a/b",
        "warm",
        "verify",
        "frobnicate",
    ] {
        bed.run(line).failed(2);
    }
    let unknown = bed.fails("status s3://bucket/unknown/");
    assert!(
        unknown.contains("is not in the store\nhint: `hearth list`"),
        "{unknown}"
    );
    for command in ["rm", "pin"] {
        assert_eq!(
            bed.fails(&format!("{command} s3://bucket/unknown/")),
            unknown
        );
    }
    let list = bed.path("list");
    fs::write(&list, "# ok\n\nhf://a/b\nbroken\n").unwrap();
    let error = bed.fails(&format!("warm --from {}", list.display()));
    assert!(error.contains("list:4: \"broken\": expected"), "{error}");
}

/// Compares with `tests/golden/NAME`, which HEARTH_BLESS=1 writes anew.
fn assert_golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("HEARTH_BLESS").is_some() {
        fs::write(&path, text).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap_or_default();
    assert!(text == golden, "tests/golden/{name} is not:\n{text}");
}

/// The life of an artifact, and how it looks on the way.
#[test]
fn from_inspect_to_rm() {
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 8, 2);
    let other = web.model("other", 8, 1);
    let size = total_size(&web.path("m"));
    let mut seen = String::new();
    let host = web.server.url();
    let mut step = |line: &str| {
        let line = line.replace("MODEL", &model).replace("OTHER", &other);
        let done = bed.run(&line);
        let store = bed.store().display().to_string();
        let replace = [(host.as_str(), "http://origin"), (store.as_str(), "STORE")];
        let text = stable(
            &format!("$ hearth {line}\n{}{}\n", done.out, done.err),
            &replace,
        );
        seen.push_str(&without_times(&text));
        done.ok()
    };

    step("inspect MODEL");
    assert_eq!(web.sent(), 0, "inspect fetches no content");
    step("warm MODEL");
    assert_eq!(web.sent(), size, "everything once");
    web.forget();
    step("warm MODEL");
    assert!(
        web.content().is_empty(),
        "what is warm is not fetched: {:?}",
        web.content()
    );
    step("list");
    step("status MODEL");
    step("warm --pin OTHER");
    step("gc --target-bytes 0 --dry-run");
    assert_eq!(bed.json("list --json").as_array().unwrap().len(), 2);
    step("verify MODEL OTHER");
    step("gc --target-bytes 0");
    step("list");
    step("unpin OTHER");
    step("unpin OTHER");
    step("pin OTHER");
    let pinned = bed.fails(&format!("rm {other}"));
    assert!(
        pinned.contains("pinned") && pinned.contains("hint: "),
        "{pinned}"
    );
    step("rm --force OTHER");
    step("list");
    assert!(bed.objects().is_empty());
    assert_golden("life", &seen);
}

/// Blanks what no two runs have in common.
fn without_times(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let line = match line.split_once(" new in ") {
            Some((before, _)) => format!("{before} new in TIME)"),
            // Of the places and times of the files.
            None if line.starts_with("artifact sha256:") => "artifact DIGEST".to_owned(),
            None => line.to_owned(),
        };
        out.push_str(&line);
        out.push('\n');
    }
    out
}

/// What a script reads.
#[test]
fn json_of_everything() {
    let bed = Bed::new();
    let web = Web::new();
    let model = web.model("m", 8, 1);
    let size = total_size(&web.path("m"));
    let inspect = bed.json(&format!("inspect --json {model}"));
    assert_eq!(inspect["kind"], "http");
    assert_eq!(inspect["bytes"], size);
    assert_eq!(inspect["files"].as_array().unwrap().len(), 4);
    assert_eq!(inspect["files"][0]["path"], "config.json");
    let warm = bed.json(&format!("warm --json {model}"));
    assert_eq!(warm[0]["bytes"], size);
    assert_eq!(warm[0]["bytes_before"], 0);
    assert_eq!(warm[0]["digest"], inspect["digest"]);
    let again = bed.json(&format!("warm --json {model}"));
    assert_eq!(again[0]["bytes_before"], size);
    let list = bed.json("list --json");
    assert_eq!(list[0]["complete"], true);
    assert_eq!(list[0]["present_bytes"], size);
    let status = bed.json(&format!("status --json {model}"));
    for file in status["file"].as_array().unwrap() {
        assert_eq!(file["present_bytes"], file["bytes"]);
        let body = fs::read(web.path("m").join(file["path"].as_str().unwrap())).unwrap();
        assert_eq!(
            file["object"],
            hearth::digest::Digest::of(&body).to_string()
        );
    }
    let store = bed.json("status --json");
    assert_eq!(store["artifacts"], 1);
    assert!(store["used_bytes"].as_u64().unwrap() >= size);
    let verify = bed.json("verify --all --json");
    assert_eq!(
        (verify["objects"].as_u64(), verify["bytes"].as_u64()),
        (Some(4), Some(size))
    );
    let gc = bed.json("gc --target-bytes 0 --json");
    assert_eq!(gc["evicted"][0], model);
    // As a list on standard input; the more it is asked, the more it says.
    let list = bed.path("list");
    fs::write(&list, format!("# from elsewhere\n{model}\n")).unwrap();
    let list = fs::File::open(list).unwrap();
    let done = Done::of(bed.command("-v warm --from -").stdin(list));
    assert!(
        done.err.contains("INFO") && done.err.contains("resolved"),
        "{}",
        done.err
    );
    let loud = bed.run(&format!("-vv warm {model}"));
    assert!(
        loud.err.contains("DEBUG") && loud.err.contains("status=200"),
        "{}",
        loud.err
    );
    // One of two fails: the other is reported, the error said, the exit status 1.
    let done = bed.run(&format!("warm --json {model} {}", web.url("nothing")));
    assert_eq!(done.code, Some(1));
    let reports: Value = serde_json::from_str(&done.out).unwrap();
    assert_eq!(reports.as_array().unwrap().len(), 1);
    assert!(
        done.err.contains("error: ") && done.err.contains("404"),
        "{}",
        done.err
    );
}

/// The same model in every kind of place is stored once.
#[test]
fn every_scheme_stores_equal_content_once() {
    let bed = Bed::new();
    let web = Web::new();
    let http = web.model("m", 4, 2);
    let moto = servers::moto(false);
    let azurite = servers::azurite();
    let (s3, az, gs) = (s3(&moto), azure(&azurite), gcs(servers::fake_gcs()));
    let stub = Stub::start(1000);
    let mut files = 0;
    for file in files_below(&web.path("m")) {
        let name = file.file_name().unwrap().to_str().unwrap().to_owned();
        let body = fs::read(&file).unwrap();
        run(async {
            s3.put(&name, &body).await;
            az.put(&name, &body).await;
            gs.put(&name, &body).await;
        });
        stub.write(&name, &body);
        files += 1;
    }
    stub.control("POST", "commit", "");
    crate::servers::set_env(&[("HF_ENDPOINT", stub.server.url())]);
    let references = [
        s3.reference(""),
        format!("file://{}", web.path("m").display()),
        az.reference(""),
        gs.reference(""),
        "hf://org/my-model".to_owned(),
        http,
    ];
    let kinds = ["s3", "file", "azure", "gcs", "hub model", "http"];
    for (reference, kind) in references.iter().zip(kinds) {
        let mut command = bed.command("inspect --json");
        let report: Value = serde_json::from_str(&Done::of(command.arg(reference)).ok()).unwrap();
        assert_eq!(report["kind"], kind);
        assert_eq!(report["files"].as_array().unwrap().len(), files, "{report}");
        if kind == "hub model" {
            assert_eq!(report["revision"].as_str().unwrap().len(), 40);
            assert!(
                report["files"][1]["digest"]
                    .as_str()
                    .unwrap()
                    .starts_with("sha256:")
            );
            assert!(
                report["files"][0]["digest"]
                    .as_str()
                    .unwrap()
                    .starts_with("git:")
            );
        }
    }
    let list = bed.path("list");
    let text = format!("# models\n\n{}\n  # more\n", references[1..].join("\n"));
    fs::write(&list, text).unwrap();
    let mut warm = bed.command(&format!("warm --json --from {}", list.display()));
    let reports: Value = serde_json::from_str(&Done::of(warm.arg(&references[0])).ok()).unwrap();
    assert_eq!(reports.as_array().unwrap().len(), references.len());
    assert_eq!(bed.objects().len(), files, "stored once");
    assert_eq!(
        bed.json("list --json").as_array().unwrap().len(),
        references.len()
    );
    let mut left = files_below(&bed.store().join("partial"));
    left.retain(|f| !f.ends_with("lock"));
    assert!(left.is_empty(), "{left:?}");
    for file in files_below(&web.path("m")) {
        bed.object(&fs::read(file).unwrap());
    }

    // Globs pick files, and are part of the reference.
    let some = format!("{}?include=*.json&exclude=tok*", references[0]);
    let mut command = bed.command("inspect --json");
    let report: Value = serde_json::from_str(&Done::of(command.arg(&some)).ok()).unwrap();
    let paths: Vec<_> = report["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| &f["path"])
        .collect();
    assert_eq!(paths, ["config.json", "model.safetensors.index.json"]);

    // Every origin goes away: what is warm stays warm, with a warning; a commit asks nobody.
    let commit = bed
        .json("list --json")
        .as_array()
        .unwrap()
        .iter()
        .find_map(|a| {
            let hub = a["reference"].as_str().unwrap().starts_with("hf://");
            hub.then(|| a["revision"].as_str().unwrap().to_owned())
        });
    bed.ok(&format!(
        "warm hf://org/my-model@{}",
        commit.as_ref().unwrap()
    ));
    drop((moto, azurite, gs, stub, web.server));
    for reference in &references[2..] {
        let done = Done::of(bed.command("warm").arg(reference));
        assert_eq!(done.code, Some(0), "{done:?}");
        assert!(done.err.contains("cannot be reached"), "{done:?}");
    }
    let done = bed.run(&format!("warm hf://org/my-model@{}", commit.unwrap()));
    assert_eq!((done.code, done.err.as_str()), (Some(0), ""));
    let config = bed.path("config.toml");
    fs::write(&config, "[fetch]\npatience_seconds = 1\n").unwrap();
    let error = bed.fails(&format!(
        "--config {} warm hf://org/other",
        config.display()
    ));
    assert!(
        error.contains("error: cannot resolve hf://org/other") && error.contains("127.0.0.1"),
        "{error}"
    );
    let mut offline = bed.command("warm hf://org/my-model");
    let done = Done::of(offline.env("HF_HUB_OFFLINE", "1"));
    assert_eq!(done.code, Some(0), "{done:?}");
    let mut offline = bed.command("warm hf://org/other");
    let error = Done::of(offline.env("HF_HUB_OFFLINE", "1")).failed(1);
    assert!(
        error.contains("HF_HUB_OFFLINE") && error.contains("hint:"),
        "{error}"
    );
}

/// A person sees bars, a log sees lines, a pipe that closes is no error.
#[test]
fn progress_fits_its_reader() {
    let bed = Bed::new();
    let web = Web::slow("350k");
    let model = web.model("m", 4, 1);
    // A chunk in two seconds, all of it in ten.
    let config = bed.path("config.toml");
    fs::write(&config, "[fetch]\nmax_connections = 1\n").unwrap();
    let done = bed.run(&format!("--config {} warm {model}", config.display()));
    let lines: Vec<_> = done.err.lines().collect();
    assert!(!lines.is_empty(), "a plain line every five seconds");
    for line in &lines {
        assert!(
            line.starts_with(&model) && line.ends_with(" s left"),
            "{line}"
        );
        assert!(
            line.contains(" MiB of 4.2 MiB (") && line.contains("/s, "),
            "{line}"
        );
    }
    done.ok();
    bed.ok(&format!("rm {model}"));
    let out = bed.path("tty");
    let mut script = tool("script", &["-qec"]);
    script.arg(format!(
        "stty cols 120; {} warm {model}",
        env!("CARGO_BIN_EXE_hearth")
    ));
    script
        .arg(&out)
        .env("HEARTH_STORE", bed.store())
        .env("TERM", "xterm");
    Done::of(script.stdin(Stdio::null())).ok();
    let shown = fs::read_to_string(out).unwrap();
    for part in [
        "model-00001-of-00001.safe",
        "/4.19 MiB",
        "ETA",
        "files",
        "=>",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert!(
        shown.contains("\rwarm: ") || shown.contains("\nwarm: ") || shown.contains("Kwarm: "),
        "{shown:?}"
    );
    let mut pipe = tool("bash", &["-c"]);
    pipe.arg(format!(
        "set -o pipefail; {} completions bash | head -1",
        env!("CARGO_BIN_EXE_hearth")
    ));
    assert_eq!(Done::of(&mut pipe).err, "");
}

/// What does not fit makes room by what was not used for longest, and never by what is needed.
#[test]
fn the_store_keeps_its_size() {
    let bed = Bed::new();
    let mut web = Web::new();
    let origin = web.gate();
    let [a, b, c] = [1, 2, 3].map(|seed| {
        let name = format!("m{seed}");
        write_model(&web.path(&name), 8, 1, seed);
        web.url(&name)
    });
    let config = bed.path("config.toml");
    fs::write(&config, "[store]\nmax_bytes = \"20MiB\"\n").unwrap();
    let flag = format!("--config {}", config.display());
    let known = || -> Vec<String> {
        let list = bed.json("list --json");
        let names = list
            .as_array()
            .unwrap()
            .iter()
            .map(|a| a["reference"].as_str().unwrap().into());
        names.collect()
    };
    bed.ok(&format!("{flag} warm {a}"));
    std::thread::sleep(Duration::from_millis(1100));
    bed.ok(&format!("{flag} warm {b}"));
    std::thread::sleep(Duration::from_millis(1100));
    bed.ok(&format!("{flag} warm {a}"));
    bed.ok(&format!("{flag} warm {c}"));
    assert_eq!(
        known(),
        [a.as_str(), c.as_str()],
        "the one that was not used for longest went"
    );
    bed.ok(&format!("pin {a} {c}"));
    web.forget();
    let error = bed.fails(&format!("{flag} warm {b}"));
    for part in [
        " does not fit: needs 8.2 MiB",
        "20.0 MiB",
        &format!("pinned: {a}"),
        "\nhint: ",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(web.sent(), 0);
    assert_eq!(
        known(),
        [a.as_str(), c.as_str()],
        "what was refused is not listed"
    );
    bed.ok(&format!("unpin {c}"));
    let before = origin.passed();
    origin.hold_after(1 << 20);
    let warm = bed.start(&format!("{flag} warm {b}"));
    mounts::wait_until("fetched", || origin.passed() > before);
    let error = bed.fails(&format!("rm {b}"));
    assert!(
        error.contains("is in use") && error.contains("\nhint: "),
        "{error}"
    );
    origin.release();
    warm.done().ok();
    assert_eq!(known(), [a.as_str(), b.as_str()]);
    bed.ok(&format!("unpin {a}"));

    // However full it is, only what is named goes: all of that, although another name is wrong.
    fs::write(&config, "[store]\nmax_bytes = \"4MiB\"\n").unwrap();
    let before = bed.objects().len();
    let unknown = web.url("unknown");
    let done = bed.run(&format!("{flag} rm {b} {unknown}"));
    assert_eq!(done.code, Some(1), "{done:?}");
    let error = format!("error: {unknown} is not in the store");
    assert!(done.err.contains(&error), "{done:?}");
    assert!(done.out.contains(&format!("removed: {b}\n")), "{done:?}");
    assert_eq!(known(), [a]);
    assert!(bed.objects().len() < before, "its content is gone");
}
