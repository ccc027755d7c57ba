//! Layers that are tars, and images that hold a model.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compressed_tars_are_layers_that_are_unpacked_to_the_same_files() {
    let (registry, model) = (Registry::start(), Model::new());
    let bed = Bed::new();
    // Without modes: a compressed tar keeps its own.
    let names = |artifact: &Artifact| -> Vec<String> {
        let lines = shape(artifact);
        let names = lines.iter().filter_map(|line| line.rsplitn(3, ' ').nth(2));
        names.map(ToOwned::to_owned).collect()
    };
    let (_, raw) = &layouts(&registry, &model)[0];
    let expected = names(&bed.resolve(raw).await);
    let all = model.tar(&[], &["model.safetensors", "nested", "tokenizer"]);
    let config = &model.files["config.json"];
    let zstd = zstd::encode_all(&all[..], 1).unwrap();
    let cases = [
        (
            "cncf",
            format!("{CNCF}.config.v1+json"),
            format!("{CNCF}.weight.v1.tar+gzip"),
            gzip(&all),
        ),
        (
            "cncf-zstd",
            format!("{CNCF}.config.v1+json"),
            format!("{CNCF}.weight.v1.tar+zstd"),
            zstd,
        ),
        (
            "kitops",
            format!("{KITOPS}.config.v1+json"),
            format!("{KITOPS}.model.v1.tar+gzip"),
            gzip(&all),
        ),
        (
            "oras",
            "application/vnd.oci.empty.v1+json".into(),
            "application/x-mine".into(),
            gzip(&all),
        ),
    ];
    for (repository, config_type, media_type, content) in cases {
        let mut push = Push::new(&registry, repository, &config_type);
        let digest = Digest::of(&all).to_string();
        let unpack = [
            (TITLE, "all"),
            ("io.deis.oras.content.unpack", "true"),
            ("io.deis.oras.content.digest", &*digest),
        ];
        let annotations = if repository == "oras" {
            &unpack[..]
        } else {
            &[]
        };
        push.layer(&media_type, &content, annotations);
        let raw = match repository {
            "cncf" | "cncf-zstd" => format!("{CNCF}.weight.config.v1.raw"),
            _ => "application/json".to_owned(),
        };
        push.layer(&raw, config, &[(TITLE, "./config.json")]);
        let (reference, manifest) = push.with_digest();
        let layered = bed.layered(&format!("{reference}?path=nested")).await;
        assert_eq!((layered.manifest, &*layered.root), (manifest, "nested"));
        let [tar, file] = &layered.layers[..] else {
            panic!("{layered:?}");
        };
        assert_eq!(
            (tar.blob, tar.size),
            (Digest::of(&content), content.len() as u64)
        );
        assert_eq!((&tar.media_type, &tar.as_file), (&media_type, &None));
        assert_eq!(tar.diff_id.is_some(), repository == "oras");
        assert_eq!(file.as_file.as_deref(), Some("config.json"));
        assert_eq!(file.blob, Digest::of(config));
        let artifact = bed.warm(&reference).await.unwrap();
        assert_eq!(names(&artifact), expected, "{repository}");
        for (path, content) in bed.contents(&artifact) {
            assert!(content == model.files[&*path], "{repository}: {path}");
        }
        // A file as it is needs no index.
        let (named, progress) = (reference.parse().unwrap(), Progress::default());
        let pushed = bed.node.push_indexes(&named, &progress).await.unwrap();
        assert_eq!(pushed.layers, 1, "{repository}");
        // Another node reads it before it is unpacked, and believes that until it was.
        let other = Bed::new();
        let lazy = other.node.resolve(&named).await.unwrap();
        assert!(!lazy.is_verified(), "{repository}");
        assert_eq!(*lazy.artifact, artifact, "{repository}");
        assert_eq!(other.store.images().unwrap(), [], "it is no image");
        other.warm(&reference).await.unwrap();
        assert!(other.node.resolve(&named).await.unwrap().is_verified());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_modelcar_is_an_image_of_which_a_directory_is_the_model() {
    let (registry, model) = (Registry::start(), Model::new());
    let bed = Bed::new();
    let layer = tar(
        model.dir.path(),
        &["--transform=s,^,models/,"],
        &["config.json", "nested"],
    );
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer).to_string()]},
    });
    let config_type = "application/vnd.oci.image.config.v1+json";
    let mut push = Push::new(&registry, "modelcar", config_type);
    push.config = registry.blob("modelcar", config_type, config.to_string().as_bytes());
    let content = gzip(&layer);
    push.layer("application/vnd.oci.image.layer.v1.tar+gzip", &content, &[]);
    let reference = push.done();
    let layered = bed.layered(&reference).await;
    assert_eq!((&*layered.root, layered.layers.len()), ("", 1));
    assert_eq!(layered.layers[0].as_file, None);
    let layered = bed.layered(&format!("{reference}?path=/models/")).await;
    assert_eq!(layered.root, "models");
    assert_eq!(layered.reference, format!("{reference}?path=models"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_and_directories_of_a_tar_are_kept() {
    let registry = Registry::start();
    let bed = Bed::new();
    let dir = tempfile::tempdir().unwrap();
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(200));
    let make = |path: &str, content: &[u8]| {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    make("a/data", b"shared");
    make(&long, b"long");
    make("none", b"");
    make("run.sh", b"#!/bin/sh\n");
    let set = |path: &Path, mode| {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    set(&dir.path().join("run.sh"), 0o700);
    fs::create_dir(dir.path().join("hollow")).unwrap();
    fs::hard_link(dir.path().join("a/data"), dir.path().join("z")).unwrap();
    std::os::unix::fs::symlink("../z", dir.path().join("a/link")).unwrap();
    for format in ["gnu", "pax"] {
        let mut push = Push::new(&registry, format, &format!("{KITOPS}.config.v1+json"));
        let option = format!("--format={format}");
        let tar = tar(dir.path(), &[&option, "--sort=name"], &["."]);
        push.layer(&format!("{KITOPS}.model.v1.tar"), &tar, &[]);
        let artifact = bed.warm(&push.done()).await.unwrap();
        let contents = bed.contents(&artifact);
        assert_eq!(contents["a/data"], b"shared");
        assert_eq!(contents["z"], b"shared");
        assert_eq!(contents[&long], b"long");
        assert_eq!(contents["none"], b"");
        let get = |path: &str| {
            let inode = artifact.tree.find(path).unwrap_or_else(|| panic!("{path}"));
            artifact.tree.get(inode).unwrap().clone()
        };
        assert!(matches!(get("hollow").kind, Kind::Dir { .. }));
        assert_eq!(get("run.sh").meta.mode, 0o555);
        assert_eq!(get("z").meta.mode, 0o444);
        let Kind::Symlink { target } = get("a/link").kind else {
            panic!("a link");
        };
        assert_eq!(&*target, b"../z");
    }
}
