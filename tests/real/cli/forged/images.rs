//! What one image says, and another has.

use super::*;

/// What a node says of a chain id: the image that it would serve for it, with and without the name of
/// one, and how the tree of that looks at `etc/passwd`.
fn served(bed: &Bed, chain: &Digest, named: Option<&str>) -> Option<(String, Digest)> {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = Store::open(&bed.store(), &Default::default()).unwrap();
        let engine = Engine::new(store, Default::default());
        let node = Node::new(engine, Sources::new(Default::default()));
        let named = named.map(|name| name.parse::<Reference>().unwrap());
        let known = node.knows_chain(chain, named.as_ref()).await.unwrap();
        let found = node.image_by_chain(chain, named.as_ref()).await.unwrap();
        assert_eq!(known.is_some(), found.is_some());
        let artifact = found?.artifact;
        assert_eq!(known, Some(artifact.reference.clone()));
        let files = artifact.tree.files();
        let (_, _, passwd) = files.iter().find(|(path, ..)| path == "etc/passwd")?;
        let id = artifact.objects[*passwd as usize].id;
        Some((artifact.reference.clone(), id.sha256().unwrap()))
    })
}

#[test]
fn no_image_stands_in_for_the_layers_of_another() {
    let image = Pushed::new();
    let lower = image.indexes[0].clone();
    // Other bytes, of which it is said that they are those layers.
    fs::write(image.dir.path().join("evil"), "evil").unwrap();
    let evil_layer = gzip(&tar(image.dir.path(), &[], &["evil", "b"]));
    let mut evil_index = lower.clone();
    evil_index.blob = Digest::of(&evil_layer);
    evil_index.blob_size = evil_layer.len() as u64;
    evil_index.spans.truncate(1);
    content(&mut evil_index, "etc/passwd").digest = Digest::of(b"evil");
    let evil = image.imitated("evil", &evil_layer, &evil_index);
    let chain = Digest::of(format!("{} {}", lower.diff_id, image.indexes[1].diff_id).as_bytes());
    let right = content(&mut lower.clone(), "etc/passwd").digest;
    let good = Some((image.reference.clone(), right));
    let see = |bed: &Bed, reference: &str| {
        let dir = bed.mount_dir("mnt");
        bed.ok(&format!("mount --no-fill {reference} {dir}"));
        bed.ok(&format!("umount {dir}"));
    };

    // Whoever asks for just that image gets it, as long as nobody knows better.
    let bed = Bed::new();
    see(&bed, &evil);
    assert_eq!(served(&bed, &chain, None), None);
    assert_eq!(served(&bed, &chain, Some(&image.reference)), None);
    let lie = Some((evil.clone(), Digest::of(b"evil")));
    assert_eq!(served(&bed, &chain, Some(&evil)), lie);
    see(&bed, &image.reference);
    assert_eq!(served(&bed, &chain, None), None, "not unpacked either");
    assert_eq!(served(&bed, &chain, Some(&image.reference)), good);
    bed.ok(&format!("warm {}", image.reference));
    for named in [None, Some(&*evil), Some(&*image.reference)] {
        assert_eq!(served(&bed, &chain, named), good, "{named:?}");
    }

    // Once it is found out, nothing of it is left, nor does it begin anew.
    let bed = Bed::new();
    see(&bed, &evil);
    let error = bed.fails(&format!("warm {evil}"));
    let said = format!("the image's configuration says {}", lower.diff_id);
    let layer = evil_index.blob.to_string();
    assert!(error.contains(&said) && error.contains(&layer), "{error}");
    assert_eq!(served(&bed, &chain, Some(&evil)), None);
    let dir = bed.mount_dir("mnt");
    let error = bed.fails(&format!("mount {evil} {dir}"));
    assert!(error.contains(&said), "{error}");
    bed.ok("gc --target-bytes 0");
    assert!(files_below(&bed.store().join("indexes")).is_empty());

    // So it is where it is mounted: what was read of it is refused.
    let bed = Bed::new();
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount {evil} {dir}"));
    assert!(wait_error(&bed, &dir).contains(&said));
    assert_eq!(read(&dir, "top/salt"), "EIO");
    assert_eq!(served(&bed, &chain, Some(&evil)), None);
    bed.ok(&format!("umount {dir}"));
}

/// Two images may say different things of a layer.
#[test]
fn what_is_said_of_a_layer_takes_nothing_from_an_image_that_has_it() {
    let image = Pushed::new();
    let bed = Bed::new();
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount --no-fill {} {dir}", image.reference));
    bed.ok(&format!("umount {dir}"));
    let [lower, upper] = &image.indexes;
    let store = Store::open(&bed.store(), &Default::default()).unwrap();
    // That one is not disputed.
    let kept = [b"o", &*upper.encode().unwrap()].concat();
    store.put_index(&upper.blob, &kept).unwrap();
    let chain = Digest::of(format!("{} {}", lower.diff_id, upper.diff_id).as_bytes());
    let good = served(&bed, &chain, Some(&image.reference));
    assert!(good.is_some());

    // Of one layer two images say what it unpacks to: that is looked at, and who was right stays as it was.
    let mut said = lower.clone();
    said.diff_id = Digest::of(b"other");
    let liar = image.imitated("liar", &image.layers[0], &said);
    for _ in 0..2 {
        let error = bed.fails(&format!("mount --no-fill {liar} {dir}"));
        let why = format!("the image's configuration says {}", said.diff_id);
        assert!(error.contains(&why), "{error}");
        assert_eq!(served(&bed, &chain, Some(&image.reference)), good);
    }

    // What says of a layer that was unpacked that it is another is passed over, and forgotten where that is seen.
    let (_, artifact) = store.artifact(&image.reference).unwrap().unwrap();
    let truth = store.image(&image.reference).unwrap().unwrap();
    let lie = |name: &str, blob: Digest| {
        let mut artifact = artifact.clone();
        artifact.reference = format!("oci://127.0.0.1:9/{name}:1");
        store.record(&artifact).unwrap();
        let mut lie = truth.clone();
        lie.reference = artifact.reference;
        lie.layers[0].blob = blob;
        lie.layers[0].diff_id = match name {
            "below" => said.diff_id,
            _ => lower.diff_id,
        };
        store.record_image(&lie).unwrap();
        lie
    };
    let kept = [b"t", &*lower.encode().unwrap()].concat();
    store.put_index(&lower.blob, &kept).unwrap();
    let below = lie("below", lower.blob);
    bed.ok(&format!("warm {}", image.reference));
    assert_eq!(store.index_mark(&lower.blob).unwrap(), Some(b'c'));
    assert_eq!(store.image(&below.reference).unwrap(), None);
    let mut other = said.clone();
    other.blob = Digest::of(b"a layer");
    let kept = [b"o", &*other.encode().unwrap()].concat();
    store.put_index(&other.blob, &kept).unwrap();
    let beside = lie("beside", other.blob);
    let first = store.image_by_chain(&chain).unwrap().unwrap().0;
    assert_eq!(first.reference, beside.reference);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let found = runtime.block_on(async {
        let engine = Engine::new(Arc::clone(&store), Default::default());
        let node = Node::new(engine, Sources::new(Default::default()));
        node.image_by_chain(&chain, None).await.unwrap()
    });
    assert_eq!(found.unwrap().artifact.reference, image.reference);
}

/// A part of an image has no record of its layers that would show what it was made of.
#[test]
fn parts_that_a_forged_index_gave_are_forgotten_once_another_image_is_unpacked() {
    let image = Pushed::new();
    let other = image.imitated("other", &image.layers[0], &image.indexes[0]);
    image.forge(|index| entry(index, "bin/tool").meta.mode = 0o6755);
    for strict in [true, false] {
        let bed = Bed::new();
        let dir = bed.mount_dir("mnt");
        let part = format!("{}?path=bin", image.reference);
        bed.ok(&format!("mount --no-fill {part} {dir}"));
        bed.ok(&format!("umount {dir}"));
        let store = Store::open(&bed.store(), &Default::default()).unwrap();
        let part = store.records().unwrap().remove(0).reference;
        let config = bed.path("hearth.toml");
        let verify = if strict { "strict" } else { "complete" };
        fs::write(&config, format!("[fetch]\nverify = \"{verify}\"\n")).unwrap();
        let mut command = bed.command(&format!("warm {other}"));
        Done::of(command.env("HEARTH_CONFIG", &config)).ok();
        assert!(store.artifact(&part).unwrap().is_none(), "{strict}");
    }
}

/// An index of another kind may have come for that by which something is mounted.
#[test]
fn what_was_served_by_an_index_goes_on_by_another_that_says_the_same() {
    let image = Pushed::new();
    let bed = Bed::new();
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount --no-fill {} {dir}", image.reference));
    bed.ok(&format!("umount {dir}"));
    let store = Store::open(&bed.store(), &Default::default()).unwrap();
    let (record, before) = store.artifact(&image.reference).unwrap().unwrap();
    // A table of contents leaves out what is not content.
    let mut moved = image.indexes[0].clone();
    moved.size -= 512;
    for entry in &mut moved.entries {
        if let EntryKind::File(content) = &mut entry.kind {
            content.offset -= 512;
        }
    }
    let kept = [b"c", &*moved.encode().unwrap()].concat();
    store.put_index(&moved.blob, &kept).unwrap();
    let upper = &image.indexes[1];
    let kept = [b"o", &*upper.encode().unwrap()].concat();
    store.put_index(&upper.blob, &kept).unwrap();
    let named: Reference = image.reference.parse().unwrap();
    let reference = image.reference.clone();
    drop(image);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let resumed = runtime.block_on(async {
        let engine = Engine::new(Arc::clone(&store), Default::default());
        let node = Node::new(engine, Sources::new(Default::default()));
        node.resume(&named, &record.digest).await.unwrap()
    });
    assert!(resumed.artifact.shows_the_same(&before) && *resumed.artifact != before);
    let (_, after) = store.artifact(&reference).unwrap().unwrap();
    assert_eq!(after, *resumed.artifact);
}

/// Who may write to one repository says nothing of the layers of others, even if they are the same.
#[test]
fn an_index_from_another_repository_is_not_believed() {
    let image = Pushed::new();
    let mut forged = image.indexes[0].clone();
    content(&mut forged, "etc/passwd").digest = Digest::of(b"evil");
    let evil = image.imitated("evil", &image.layers[0], &forged);
    let bed = Bed::new();
    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("mount --no-fill {evil} {dir}"));
    bed.ok(&format!("umount {dir}"));
    bed.ok(&format!("mount --no-fill {} {dir}", image.reference));
    assert_same(&dir, image.dir.path());
    bed.ok(&format!("umount {dir}"));
}
