//! What is no model, or says of itself what is not so.

use super::*;

/// Name, media type, content and annotations of a layer, and why it is refused.
type Case<'c> = (&'c str, String, Vec<u8>, &'c [(&'c str, &'c str)], &'c str);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_a_model_is_refused_by_name() {
    let registry = Registry::start();
    let bed = Bed::new();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("a"), b"a").unwrap();
    std::os::unix::fs::symlink("../../etc/passwd", path("out")).unwrap();
    let status = std::process::Command::new("mkfifo")
        .arg(path("pipe"))
        .status();
    assert!(status.unwrap().success());
    let tar = |options: &[&str], names: &[&str]| tar(dir.path(), options, names);
    let up = tar(&["-P", "--transform=s,^,../,"], &["a"]);
    let absolute = tar(&["-P", "--transform=s,^,/etc/,"], &["a"]);
    let twice = tar(&[], &["a", "a"]);
    let cut = tar(&[], &["a"])[..512].to_vec();
    let weight = |encoding: &str| format!("{CNCF}.weight.v1.{encoding}");
    let file = "two layers";
    let none: &[(&str, &str)] = &[];
    let cases: [Case<'_>; 14] = [
        ("up", weight("tar"), up, none, "\"..\""),
        ("absolute", weight("tar"), absolute, none, "absolute"),
        ("twice", weight("tar"), twice, none, "is there twice"),
        ("cut", weight("tar"), cut, none, "ends beyond"),
        (
            "link",
            weight("tar"),
            tar(&[], &["out"]),
            none,
            "out of the model",
        ),
        (
            "fifo",
            weight("tar"),
            tar(&[], &["pipe"]),
            none,
            "device or pipe",
        ),
        (
            "gzipped",
            weight("tar"),
            gzip(&tar(&[], &["a"])),
            none,
            "compressed",
        ),
        (
            "unnamed",
            weight("raw"),
            b"x".to_vec(),
            none,
            "no annotation that says its path",
        ),
        (
            "climbs",
            weight("raw"),
            b"x".to_vec(),
            &[(FILEPATH, "a/../../b")],
            "\"..\"",
        ),
        (
            "rooted",
            weight("raw"),
            b"x".to_vec(),
            &[(FILEPATH, "/etc/passwd")],
            "absolute",
        ),
        (
            "below",
            weight("raw"),
            b"x".to_vec(),
            &[(FILEPATH, "first/x")],
            "no directory",
        ),
        (
            file,
            weight("raw"),
            b"x".to_vec(),
            &[(FILEPATH, "first")],
            "is there twice",
        ),
        (
            "unknown",
            "application/x-secret".into(),
            b"x".to_vec(),
            none,
            "unsupported media type",
        ),
        (
            "new",
            weight("tar+lz4"),
            b"x".to_vec(),
            none,
            "unsupported media type",
        ),
    ];
    for (name, media_type, content, annotations, why) in cases {
        let repository = name.replace(' ', "-");
        let mut push = Push::new(&registry, &repository, &format!("{CNCF}.config.v1+json"));
        push.layer(&weight("raw"), b"first", &[(FILEPATH, "first")]);
        push.layer(&media_type, &content, annotations);
        let reference = push.done();
        let error = bed.refused(&reference).await;
        let layer = format!("layer 2 ({}, {media_type})", Digest::of(&content));
        for part in [why, &*reference, &*layer] {
            assert!(error.contains(part), "{name}: {part:?} is not in {error}");
        }
    }
    // No model at all.
    let mut push = Push::new(
        &registry,
        "helm",
        "application/vnd.cncf.helm.config.v1+json",
    );
    push.layer(
        "application/vnd.cncf.helm.chart.content.v1.tar+gzip",
        b"x",
        &[],
    );
    let error = bed.refused(&push.done()).await;
    assert!(
        error.contains("neither") && error.contains("helm"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_are_not_where_the_headers_said_are_found_out() {
    let (registry, model) = (Registry::start(), Model::new());
    let bed = Bed::new();
    let mut push = Push::new(&registry, "kit", &format!("{KITOPS}.config.v1+json"));
    let tar = model.tar(&[], &["model.safetensors", "config.json"]);
    push.layer(&format!("{KITOPS}.model.v1.tar"), &tar, &[]);
    let (_, digest) = push.with_digest();
    let reference = format!("oci://{}/kit@{digest}", registry.host());
    let right = bed.resolve(&reference).await;
    let mut wrong = right.clone();
    for object in &mut wrong.objects {
        if let Recipe::Slice { offset, .. } = &mut object.recipe {
            *offset += 512;
        }
        if object.size > 1000 && object.id.sha256().is_none() {
            object.size -= 1024;
            object.id = ObjectId::located("other", "", object.size);
        }
    }
    bed.store.record(&wrong).unwrap();
    bed.store.pin(&reference, "me").unwrap();
    let error = bed.warm(&reference).await.unwrap_err();
    assert!(matches!(error, NodeError::Misled { .. }), "{error}");
    assert!(error.to_string().contains("not where"), "{error}");
    let found = bed.warm(&reference).await.unwrap();
    assert_eq!(found, right, "it was asked for again");
    assert_eq!(
        bed.contents(&found)["model.safetensors"],
        model.files["model.safetensors"]
    );
    let (record, _) = bed.store.artifact(&reference).unwrap().unwrap();
    assert_eq!(record.pins, ["me"]);
}
