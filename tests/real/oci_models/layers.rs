//! Layers that are tars, and images that hold a model.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compressed_tars_are_layers_that_are_unpacked_to_the_same_files() {
    let (registry, model) = (Registry::start(), Model::new());
    let bed = Bed::new();
    fs::hard_link(
        model.dir.path().join("nested/weights-2.safetensors"),
        model.dir.path().join("tokenizer/again"),
    )
    .unwrap();
    std::os::unix::fs::symlink("vocab.txt", model.dir.path().join("tokenizer/link")).unwrap();
    fs::create_dir(model.dir.path().join("nested/hollow")).unwrap();
    // As somebody has packed it for himself.
    let options = [
        "--format=pax",
        "--owner=1000",
        "--group=1000",
        "--mode=0700",
        "--mtime=2024-02-29T23:59:59.5Z",
    ];
    let all = model.tar(&options, &["model.safetensors", "nested", "tokenizer"]);
    let config = &model.files["config.json"];
    let zstd = zstd::encode_all(&all[..], 1).unwrap();
    let cncf = format!("{CNCF}.config.v1+json");
    let oras = "application/vnd.oci.empty.v1+json".to_owned();
    let cases = [
        ("cncf", &cncf, format!("{CNCF}.weight.v1.tar"), "+gzip"),
        ("cncf-zstd", &cncf, format!("{CNCF}.weight.v1.tar"), "+zstd"),
        (
            "kitops",
            &format!("{KITOPS}.config.v1+json"),
            format!("{KITOPS}.model.v1.tar"),
            "+gzip",
        ),
        ("oras", &oras, "application/x-mine".into(), ""),
    ];
    for (repository, config_type, media_type, suffix) in cases {
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
        let raw = match repository {
            "cncf" | "cncf-zstd" => format!("{CNCF}.weight.config.v1.raw"),
            _ => "application/json".to_owned(),
        };
        let push = |repository: &str, media_type: &str, content: &[u8]| {
            let mut push = Push::new(&registry, repository, config_type);
            push.layer(media_type, content, annotations);
            let metadata = r#"{"mode":493,"mtime":"2021-01-02T03:04:05Z"}"#;
            let metadata = ("org.cncf.model.file.metadata+json", metadata);
            push.layer(&raw, config, &[(TITLE, "./config.json"), metadata]);
            push.with_digest()
        };
        let plain = format!("{repository}/plain");
        let (plain, _) = push(&plain, &media_type, &all);
        let plain = bed.warm(&plain).await.unwrap();
        let media_type = format!("{media_type}{suffix}");
        let content = match suffix {
            "+zstd" => zstd.clone(),
            _ => gzip(&all),
        };
        let (reference, manifest) = push(repository, &media_type, &content);
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
        assert_eq!(file.as_file.as_ref().unwrap().path, "config.json");
        assert_eq!(file.blob, Digest::of(config));
        let artifact = bed.warm(&reference).await.unwrap();
        assert_eq!(full_shape(&artifact), full_shape(&plain), "{repository}");
        assert_eq!(
            bed.contents(&artifact),
            bed.contents(&plain),
            "{repository}"
        );
        let nested = bed.warm(&format!("{reference}?path=nested")).await.unwrap();
        let [only] = &full_shape(&nested)[..] else {
            panic!("{nested:?}");
        };
        assert!(only.ends_with(" 555 0:0 [] 1709251199.0"), "{only}");
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
async fn a_plain_tar_that_cannot_be_read_in_place_is_unpacked() {
    let registry = Registry::start();
    let (bed, dir) = (Bed::new(), tempfile::tempdir().unwrap());
    let holes = fs::File::create(dir.path().join("holes")).unwrap();
    holes.set_len(3 << 20).unwrap();
    fs::write(dir.path().join("more"), b"more").unwrap();
    for format in ["gnu", "pax"] {
        let mut push = Push::new(&registry, format, &format!("{KITOPS}.config.v1+json"));
        let option = format!("--format={format}");
        let tar = tar(dir.path(), &["-S", &option], &["holes", "more"]);
        assert!(tar.len() < 1 << 20, "it is sparse");
        push.layer(&format!("{KITOPS}.model.v1.tar"), &tar, &[]);
        let reference = push.done();
        let artifact = bed.warm(&reference).await.unwrap();
        let contents = bed.contents(&artifact);
        assert!(contents["holes"] == vec![0; 3 << 20] && contents["more"] == b"more");
        // What is known to lie in layers is not looked into again.
        let named = reference.parse().unwrap();
        let again = bed.node.resolve(&named).await.unwrap();
        assert!(again.fresh && *again.artifact == artifact);
        // It has an index, as any that is unpacked.
        let progress = Progress::default();
        let pushed = bed.node.push_indexes(&named, &progress).await.unwrap();
        assert_eq!(pushed.layers, 1);
        let other = Bed::new();
        assert_eq!(other.warm(&reference).await.unwrap(), artifact);
    }
}

/// Of a layer that can only be unpacked from its start no file can be had by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_in_one_frame_is_unpacked_again_for_one_file() {
    let (registry, dir) = (Registry::start(), tempfile::tempdir().unwrap());
    let large = fs::File::create(dir.path().join("large")).unwrap();
    large.set_len(65 << 20).unwrap();
    let image = |repository: &str, small: &[u8]| {
        fs::write(dir.path().join("small"), small).unwrap();
        let tar = tar(dir.path(), &[], &["large", "small"]);
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(&tar).to_string()]},
        });
        let config_type = "application/vnd.oci.image.config.v1+json";
        let mut push = Push::new(&registry, repository, config_type);
        push.config = registry.blob(repository, config_type, config.to_string().as_bytes());
        let content = zstd::encode_all(&tar[..], 1).unwrap();
        push.layer("application/vnd.oci.image.layer.v1.tar+zstd", &content, &[]);
        (push.done(), Digest::of(&tar))
    };
    let ((one, chain), (two, _)) = (image("one", b"first"), image("two", b"second"));
    let other = Bed::new();
    for reference in [&one, &two] {
        let (named, progress) = (reference.parse().unwrap(), Progress::default());
        let pushed = other.node.push_indexes(&named, &progress).await.unwrap();
        assert_eq!(pushed.layers, 1);
    }
    let bed = Bed::new();
    let artifact = bed.warm(&one).await.unwrap();
    let resolved = bed.node.resolve(&one.parse().unwrap()).await.unwrap();
    // It was complete when it was resolved; it is not when it is.
    for lost in 0..3 {
        bed.lose(b"first");
        match lost {
            0 => {
                let progress = Progress::default();
                let warmed = bed.node.warm_known(&resolved, None, &progress);
                warmed.await.unwrap();
            }
            1 => assert_eq!(bed.warm(&one).await.unwrap(), artifact),
            _ => {
                // As the snapshotter has it that has claimed the layer.
                let found = bed.node.image_by_chain(&chain, None).await.unwrap();
                assert!(found.is_none());
                let mended = bed.node.mend_chain(&chain, None).await.unwrap();
                assert_eq!(*mended.unwrap().artifact, artifact);
                let found = bed.node.image_by_chain(&chain, None).await.unwrap();
                assert_eq!(*found.unwrap().artifact, artifact);
            }
        }
        assert_eq!(bed.contents(&artifact)["small"], b"first");
    }
    // Most of it is here, and an index: the rest cannot be read before it is unpacked.
    let named: Reference = two.parse().unwrap();
    let lazy = bed.node.resolve_lazily(&named).await.unwrap();
    assert!(lazy.is_none(), "{lazy:?}");
    let artifact = bed.warm(&two).await.unwrap();
    assert_eq!(bed.contents(&artifact)["small"], b"second");
}

/// An index may say that there is little in a layer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_unpacks_to_more_than_its_index_says_stays_within_the_limits() {
    const LIMIT: u64 = 4 << 20;
    let (registry, dir) = (Registry::start(), tempfile::tempdir().unwrap());
    let large = fs::File::create(dir.path().join("large")).unwrap();
    large.set_len(64 << 20).unwrap();
    fs::write(dir.path().join("small"), b"small").unwrap();
    let tar = tar(dir.path(), &["--sort=name"], &["large", "small"]);
    let mut push = Push::new(&registry, "kit", &format!("{KITOPS}.config.v1+json"));
    let content = gzip(&tar);
    push.layer(&format!("{KITOPS}.model.v1.tar+gzip"), &content, &[]);
    let (reference, manifest) = push.with_digest();
    let honest = Bed::new();
    honest.warm(&reference).await.unwrap();
    let index = honest.store.index(&Digest::of(&content)).unwrap().unwrap();
    let mut index = LayerIndex::decode(&index[1..]).unwrap();
    index.entries.remove(0);
    let blob = AttachedBlob {
        media_type: "application/vnd.hearth.layer-index.v1".into(),
        annotations: [("dev.hearth.layer".to_owned(), index.blob.to_string())].into(),
        bytes: index.encode().unwrap().into(),
    };
    let forged = Attachment {
        kind: "application/vnd.hearth.index.v1".into(),
        blobs: vec![blob],
        annotations: BTreeMap::new(),
    };
    let (_, source) = honest.source(&reference);
    source.attach(&manifest, forged).await.unwrap();
    let bed = Bed::with(Some(LIMIT));
    let named = reference.parse().unwrap();
    let believed = bed.node.resolve(&named).await.unwrap();
    assert_eq!(believed.artifact.size(), 5);
    let error = bed.warm(&reference).await.unwrap_err();
    assert!(
        matches!(&error, NodeError::Store(e) if e.kind() == StoreErrorKind::NoSpace),
        "{error}"
    );
    let used = bed.store.usage().unwrap();
    assert!(used.bytes() < LIMIT, "{used:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_model_has_is_refused_in_compressed_tars_too() {
    let registry = Registry::start();
    let (bed, dir) = (Bed::new(), tempfile::tempdir().unwrap());
    fs::write(dir.path().join("a"), b"a").unwrap();
    std::os::unix::fs::symlink("../../etc/passwd", dir.path().join("out")).unwrap();
    nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (name, why) in [("out", "out of the model"), ("pipe", "device or pipe")] {
        let mut push = Push::new(&registry, name, &format!("{KITOPS}.config.v1+json"));
        let content = gzip(&tar(dir.path(), &[], &["a", name]));
        push.layer(&format!("{KITOPS}.model.v1.tar+gzip"), &content, &[]);
        let error = bed.warm(&push.done()).await.unwrap_err();
        let NodeError::Resolve { source, .. } = &error else {
            panic!("{error:?}");
        };
        assert_eq!(source.kind(), SourceErrorKind::Invalid);
        let text = source.to_string();
        assert!(text.contains(why) && text.contains(name), "{text}");
        let found = bed.store.artifact(&registry.reference(name, "v1"));
        assert!(found.unwrap().is_none());
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
    // An image as it is: the part is what the whole has there.
    let whole = bed.warm(&reference).await.unwrap();
    let part = bed.warm(&format!("{reference}?path=models")).await.unwrap();
    let below = whole.below("models", &|_| true).unwrap();
    assert_eq!((&part.tree, &part.objects), (&below.tree, &below.objects));
    let contents = bed.contents(&part);
    assert_eq!(contents.len(), 2);
    for (path, content) in contents {
        assert!(content == model.files[&*path], "{path}");
    }
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
    fs::create_dir(dir.path().join("part")).unwrap();
    fs::hard_link(dir.path().join("a/data"), dir.path().join("part/link")).unwrap();
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
        // A part of it may be a link to what is not in it.
        let part = format!("{}?path=part", registry.reference(format, "v1"));
        let part = bed.warm(&part).await.unwrap();
        assert_eq!(bed.contents(&part)["link"], b"shared");
    }
}
