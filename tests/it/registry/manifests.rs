//! Images and indexes: found, or refused.

use super::*;

#[tokio::test]
async fn an_image_is_its_layers() {
    let mut held = Held::default();
    let layers = [data(100), data(5000)];
    let manifest = held.image("1", "amd64", &layers);
    let answers = held.clone();
    let server = Scripted::start(move |seen| answers.answer(seen)).await;
    let settings = Settings::new();
    let reference = format!("oci://{}/team/app:1", server.address);
    let source = settings.open(&reference);
    let found = layered(&source, &reference).await.unwrap();
    assert_eq!(found.reference, reference);
    assert_eq!(
        found.manifest.to_string(),
        manifest["digest"].as_str().unwrap()
    );
    assert_eq!(found.platform.as_ref().unwrap().to_string(), "linux/amd64");
    assert_eq!(found.root, "");
    let sizes: Vec<_> = found.layers.iter().map(|layer| layer.size).collect();
    assert_eq!(sizes, [100, 5000]);
    assert_eq!(found.layers[1].blob, Digest::of(&layers[1]));
    assert_eq!(found.layers[1].media_type, GZIP);
    let diff = Digest::of(&[&layers[1], &b"decoded"[..]].concat());
    assert_eq!(found.layers[1].diff_id, Some(diff));
    let log = server.take_log();
    assert!(
        log[0].header("accept").unwrap().contains(OCI_INDEX),
        "{log:?}"
    );

    let blob = digest(&layers[1]);
    for range in [0..5000, 0..1, 4999..5000, 17..4000] {
        let wanted = &layers[1][range.start as usize..range.end as usize];
        assert_eq!(read(&source, &blob, range).await.unwrap(), wanted);
    }
    let error = read(&source, &blob, 4000..5001).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Changed, "{error}");
    let error = read(&source, &digest(b"none"), 0..1).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{error}");
    assert_eq!(
        read(&source, "../x", 0..1).await.unwrap_err().kind(),
        Kind::Invalid
    );

    // The documents themselves, for whoever passes them on.
    for wanted in ["1", manifest["digest"].as_str().unwrap()] {
        let found = source.manifest(wanted).await.unwrap();
        assert_eq!(
            found.digest.to_string(),
            manifest["digest"].as_str().unwrap()
        );
        assert_eq!(found.media_type, OCI_MANIFEST);
    }
    assert_eq!(
        source.manifest("../x").await.unwrap_err().kind(),
        Kind::Invalid
    );
    let config = source.small_blob(&found.config, 1000).await.unwrap();
    assert_eq!(Digest::of(&config), found.config);
    let fresh = settings.open(&reference);
    let error = fresh.small_blob(&found.config, 10).await.unwrap_err();
    assert!(
        error.to_string().contains("longer than 10 bytes"),
        "{error}"
    );

    // By digest, with a tag that says nothing.
    let pinned = format!("{reference}@{}", manifest["digest"].as_str().unwrap());
    assert_eq!(
        layered(&source, &pinned).await.unwrap().layers,
        found.layers
    );
    let error = source
        .resolve(&reference.parse().unwrap())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.to_string().contains("container image"), "{error}");
    let other = format!("oci://{}/team/other:1", server.address);
    assert_eq!(
        layered(&source, &other).await.unwrap_err().kind(),
        Kind::Invalid
    );
}

#[tokio::test]
async fn an_index_is_followed_to_the_platform() {
    let mut held = Held::default();
    let entry = |mut image: Value, platform: Value| {
        image["platform"] = platform;
        image
    };
    let platform = |os: &str, arch: &str, variant: Option<&str>| match variant {
        Some(variant) => json!({ "os": os, "architecture": arch, "variant": variant }),
        None => json!({ "os": os, "architecture": arch }),
    };
    let images: Vec<Value> = [
        ("amd64", None),
        ("amd64", Some("v3")),
        ("arm64", Some("v8")),
        ("arm", Some("v5")),
        ("arm", Some("v7")),
    ]
    .into_iter()
    .enumerate()
    .map(|(n, (arch, variant))| {
        let image = held.image("", arch, &[data(n + 1)]);
        entry(image, platform("linux", arch, variant))
    })
    .collect();
    let attestation = held.image("", "unknown", &[data(50)]);
    let attestation = entry(attestation, platform("unknown", "unknown", None));
    let inner = held.manifest(
        "",
        &json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": images }),
    );
    let index =
        json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [attestation, inner] });
    held.manifest("1", &index);
    let mut deep = index;
    for _ in 0..3 {
        let inner = held.manifest("", &deep);
        deep = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [inner] });
    }
    held.manifest("deep", &deep);
    let nothing = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [attestation] });
    held.manifest("nothing", &nothing);
    let server = Scripted::start(move |seen| held.answer(seen)).await;
    let settings = Settings::new();
    let at = format!("oci://{}/team/app", server.address);
    let source = settings.open(&at);
    for (platform, size) in [
        ("linux/amd64", 1),
        ("linux/amd64/v3", 2),
        ("linux/amd64/v2", 1),
        ("linux/arm64", 3),
        ("linux/arm/v6", 4),
        ("linux/arm", 5),
    ] {
        let reference = format!("{at}:1?platform={platform}");
        let found = layered(&source, &reference).await.unwrap();
        assert_eq!(found.layers[0].size, size, "{platform}");
        let canonical: Reference = reference.parse().unwrap();
        assert_eq!(found.reference, canonical.to_string());
    }
    let wanted = format!("{at}:1?platform=linux/riscv64");
    let error = layered(&source, &wanted).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(
        error.to_string().contains("linux/arm64") && error.hint().is_some(),
        "{error}"
    );
    for (tag, word) in [("deep", "too deep"), ("nothing", "no image")] {
        let error = layered(&source, &format!("{at}:{tag}")).await.unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[tokio::test]
async fn hostile_manifests_are_refused() {
    let mut held = Held::default();
    let good = held.document("amd64", &[data(10), data(20)]);
    let mut cases: Vec<(String, Vec<u8>, &str)> = Vec::new();
    let mut case = |document: &Value, word: &'static str| {
        let tag = format!("t{}", cases.len());
        cases.push((tag, serde_json::to_vec(document).unwrap(), word));
    };
    let with = |path: &str, value: Value| {
        let mut document = good.clone();
        *document.pointer_mut(path).unwrap() = value;
        document
    };
    case(&with("/layers/0/size", json!(-1)), "-1 bytes");
    case(&with("/layers/0/size", json!(1_i64 << 61)), "bytes");
    case(&with("/layers/0/size", json!(1e30)), "malformed");
    case(
        &with("/layers/0/digest", json!("sha512:ab")),
        "no sha256 digest",
    );
    case(
        &with("/layers/0/digest", json!("../../etc/passwd")),
        "no sha256 digest",
    );
    case(&with("/layers/1", good["layers"][0].clone()), "");
    case(&with("/layers", json!([good["layers"][0]])), "diff ids");
    case(&with("/layers", json!(null)), "malformed");
    case(&with("/config/size", json!(9 << 20)), "configuration");
    case(&with("/config/size", json!(7)), "configuration has 7 bytes");
    case(&with("/config/digest", json!("x")), "no sha256 digest");
    case(&with("/config/mediaType", json!("application/x")), "");
    case(&with("/schemaVersion", json!(1)), "schema 1");
    case(&with("/schemaVersion", json!("2")), "malformed");
    case(&with("/mediaType", json!(OCI_INDEX)), "media type");
    case(
        &with(
            "/mediaType",
            json!("application/vnd.docker.distribution.manifest.v1+prettyjws"),
        ),
        "schema 1",
    );
    let mut both = good.clone();
    both["manifests"] = json!([]);
    case(&both, "could be an index");
    case(
        &json!({ "schemaVersion": 2, "fsLayers": [], "name": "x" }),
        "schema 1",
    );
    case(
        &json!({ "schemaVersion": 2, "blobs": [], "mediaType": "application/vnd.oci.artifact.manifest.v1+json" }),
        "unsupported media type",
    );
    case(&json!({ "schemaVersion": 2 }), "media type");
    case(&json!([]), "malformed");
    case(
        &json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [{ "mediaType": OCI_MANIFEST, "digest": digest(b"x"), "size": -5 }] }),
        "-5 bytes",
    );
    case(
        &json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [{ "mediaType": OCI_MANIFEST, "digest": digest(b"x"), "size": 5_000_000 }] }),
        "4 MiB",
    );
    let inner = held.manifest("", &good);
    let lying = json!({ "mediaType": OCI_MANIFEST, "digest": inner["digest"], "size": 7 });
    case(
        &json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [lying] }),
        "has 7 bytes",
    );
    case(
        &json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": "x".repeat(3_000_000) }),
        "malformed",
    );
    let whole = serde_json::to_vec(&good).unwrap();
    for (tag, bytes, word) in [
        ("truncated", whole[..whole.len() - 9].to_vec(), "malformed"),
        ("empty", Vec::new(), "malformed"),
        ("noise", data(1000), "malformed"),
        ("deep", "[".repeat(100_000).into_bytes(), "malformed"),
        (
            "huge",
            vec![b' '; (4 << 20) + 1],
            "longer than 4194304 bytes",
        ),
    ] {
        cases.push((tag.to_owned(), bytes, word));
    }
    for (tag, bytes, _) in &cases {
        let kind = OCI_MANIFEST.to_owned();
        held.0
            .insert(format!("manifests/{tag}"), (kind, bytes.clone()));
    }
    let server = Scripted::start(move |seen| held.answer(seen)).await;
    let settings = Settings::new();
    let at = format!("oci://{}/team/app", server.address);
    let source = settings.open(&at);
    for (tag, _, word) in cases.iter().filter(|(.., word)| !word.is_empty()) {
        let reference = format!("{at}:{tag}");
        let error = match source.layered(&reference.parse().unwrap()).await {
            Err(error) => error,
            Ok(found) => panic!("{tag} ({word}): {found:?}"),
        };
        assert!(
            error.to_string().contains(word),
            "{tag}: wanted {word}: {error}"
        );
        assert!(error.to_string().contains("team/app"), "{error}");
        assert!(error.to_string().len() < 1000);
    }
}

#[tokio::test]
async fn other_bytes_than_asked_for_are_refused() {
    let mut held = Held::default();
    let layer = data(10);
    let manifest = held.image("1", "amd64", std::slice::from_ref(&layer));
    let reference = |server: &Scripted| format!("oci://{}/team/app:1", server.address);
    let settings = Settings::new();

    // A tag whose digest the registry itself says differently.
    let answers = held.clone();
    let server = Scripted::start(move |seen| {
        let (kind, bytes) = &answers.0["manifests/1"];
        let claimed = digest(b"other");
        let head = format!("200 OK\ncontent-type: {kind}\ndocker-content-digest: {claimed}");
        match seen.path().contains("manifests") {
            true => Reply::new(&head, bytes.clone()),
            false => answers.answer(seen),
        }
    })
    .await;
    let source = settings.open(&reference(&server));
    let error = layered(&source, &reference(&server)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");

    // Another manifest under a digest; another configuration.
    for wrong in ["manifests/sha256", "blobs/"] {
        let answers = held.clone();
        server.now(move |seen| match seen.path().contains(wrong) {
            true => Reply::new("200 OK", "{\"schemaVersion\": 2}"),
            false => answers.answer(seen),
        });
        let source = settings.open(&reference(&server));
        let pinned = format!(
            "{}@{}",
            reference(&server),
            manifest["digest"].as_str().unwrap()
        );
        let error = layered(&source, &pinned).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{wrong}: {error}");
    }
}
