//! Container images on tiers.

use super::*;

#[test]
fn images_for_other_machines_are_baked_only_when_that_is_said() {
    let (registry, baker) = (Registry::start(), Bed::new());
    let root = baker.path("root");
    write_model(&root, 1, 1, 1);
    let image = push_for(&registry, "1", &[&root], "s390x");
    let tier = baker.path("tier");
    let error = baker.fails(&format!("bake {image} --output {}", tier.display()));
    assert!(
        error.contains("an image for linux/s390x") && error.contains("?platform="),
        "{error}"
    );
    assert!(!tier.exists());
    baker.ok(&format!(
        "bake {image}?platform=linux/s390x --output {}",
        tier.display()
    ));
}

/// Pinned by the digest of an index, as pods do it; and baked elsewhere, for which its platform had to be said.
#[test]
fn images_on_a_tier_are_known_by_an_index_and_by_their_platform() {
    let (registry, baker) = (Registry::start(), Bed::new());
    let [one, two] = ["one", "two"].map(|name| baker.path(name));
    write_model(&one, 1, 1, 1);
    write_model(&two, 1, 1, 2);
    let here = Platform::here();
    push_for(&registry, "here", &[&one], &here.arch);
    push_for(&registry, "there", &[&two], "s390x");
    let entry = |tag: &str, architecture: &str| {
        let manifest = registry.get("app", &format!("manifests/{tag}"));
        json!({
            "mediaType": MANIFEST, "digest": Digest::of(&manifest).to_string(), "size": manifest.len(),
            "platform": {"os": "linux", "architecture": architecture},
        })
    };
    let index = json!({
        "schemaVersion": 2, "mediaType": INDEX,
        "manifests": [entry("there", "s390x"), entry("here", &here.arch)],
    });
    let index = registry.manifest("app", "both", &index);
    // Baked by its tag, and by nothing else.
    let both = registry.reference("app", "both");
    let pinned = format!("{both}@{index}");
    let only = format!("oci://{}/app@{index}", registry.host());
    let plain = registry.reference("app", "here");
    let [tier, again] = ["tier", "again"].map(|name| baker.path(name));
    baker.ok(&format!(
        "bake {both} {plain}?platform={here} --output {}",
        tier.display()
    ));
    let lock = tier.join("hearth.lock");
    baker.ok(&format!(
        "bake --from {} --output {}",
        lock.display(),
        again.display()
    ));
    // As one that was made on another machine.
    let other = format!(
        "{}?platform=linux/s390x",
        registry.reference("app", "there")
    );
    let foreign = baker.path("foreign");
    baker.ok(&format!("bake {other} --output {}", foreign.display()));
    let text = fs::read_to_string(foreign.join("hearth.lock")).unwrap();
    let list = baker.path("foreign.lock");
    fs::write(&list, text.replace("?platform=linux/s390x", "")).unwrap();
    baker.ok(&format!(
        "bake --from {} --dry-run --output {}",
        list.display(),
        baker.path("no").display()
    ));

    let host = registry.host();
    drop(registry);
    let node = node(&[&tier]);
    let with = config(&node);
    let dir = node.mount_dir("mnt");
    for reference in [&both, &pinned, &only, &plain] {
        node.ok(&format!("{with} mount {reference} {dir}"));
        assert_same(&dir, &one);
        node.ok(&format!("{with} umount {dir}"));
    }
    let port = servers::free_port();
    let mirror = node.start(&format!("{with} mirror --address 127.0.0.1:{port}"));
    for wanted in [&index.to_string(), "here"] {
        let url = format!("http://127.0.0.1:{port}/v2/app/manifests/{wanted}?ns={host}");
        let retry = ["--retry", "20", "--retry-connrefused", "--retry-delay", "1"];
        let mut curl = tool("curl", &["-sS", "--fail-with-body", "--noproxy", "*"]);
        let manifest = Done::of(curl.args(retry).arg(url)).ok();
        assert!(
            wanted == "here" || Digest::of(manifest.as_bytes()) == index,
            "{manifest}"
        );
    }
    mirror.signal(Signal::SIGTERM);
    mirror.done();
    assert!(node.objects().is_empty());
}

/// What several images share is needed once.
#[test]
fn what_fits_since_images_share_layers_is_baked() {
    let (registry, baker) = (Registry::start(), Bed::new());
    let base = baker.path("base");
    write_model(&base, 4, 1, 1);
    let references: Vec<String> = (0..4)
        .map(|at| {
            let top = baker.path(&format!("top{at}"));
            fs::create_dir(&top).unwrap();
            fs::write(top.join(format!("file{at}")), [at; 100]).unwrap();
            push(&registry, &at.to_string(), &[&base, &top])
        })
        .collect();
    let disk = baker.mount_dir("disk");
    Done::of(&mut tool(
        "mount",
        &["-t", "tmpfs", "-o", "size=32m", "tmpfs", &disk],
    ))
    .ok();
    let done = baker.run(&format!(
        "bake {} --output {disk}/tier",
        references.join(" ")
    ));
    let other = baker.run(&format!(
        "bake {} --output {disk}/image --format erofs --size 2MiB",
        references.join(" ")
    ));
    let staged = files_below(&Path::new(&disk).join("image.baking/objects/sha256"));
    let unmounted = Done::of(&mut tool("umount", &[&disk]));
    done.ok();
    // What it has at least is known from its layers.
    let error = other.failed(1);
    assert!(
        error.contains("--size says 2.0 MiB") && staged.is_empty(),
        "{error}"
    );
    unmounted.ok();
}
