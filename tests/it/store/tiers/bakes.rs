//! Making tiers: what a bake leaves when it is broken off, and what the next one takes over.

use super::*;

#[test]
fn a_bake_is_sealed_by_its_last_step_and_goes_on_before() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("tier");
    let names = ["s3://b/a".to_owned(), "s3://b/i".to_owned()];
    let layer = Digest::of(b"layer");
    let first = Bake::begin(&root, &config(), &[]).unwrap();
    let busy = Bake::begin(&root, &config(), &[]).unwrap_err();
    assert_eq!(busy.kind(), StoreErrorKind::InUse);
    fill_with(first.store(), "s3://b/a", &[b"a", b"shared"], true);
    fill_with(
        first.store(),
        "s3://b/unwanted",
        &[b"unwanted", b"shared"],
        false,
    );
    first.store().pin("s3://b/a", "bake").unwrap();
    let error = first.seal(&names, None, false).unwrap_err();
    assert!(
        error.to_string().contains("s3://b/i is not whole"),
        "{error}"
    );
    let store = over(dir.path(), &["tier"]);
    assert!(problem(&store, 0).contains("half baked"));

    let again = Bake::begin(&root, &config(), &[]).unwrap();
    let made = layered("s3://b/i", b"in a layer", &layer);
    again.store().record(&made).unwrap();
    let record = image("s3://b/i", &["base"]);
    again.store().record_image(&record).unwrap();
    for blob in [layer, record.layers[0].blob] {
        again.store().put_index(&blob, b"index").unwrap();
    }
    let import = again.store().import().unwrap();
    let object = again
        .store()
        .partial(&ObjectId::Sha256(Digest::of(b"partial")), 9)
        .unwrap();
    drop((import, object));
    let id = made.objects[0].id;
    let error = again.seal(&names, None, false).unwrap_err();
    assert!(error.to_string().contains(&id.to_string()), "{error}");
    let last = Bake::begin(&root, &config(), &[]).unwrap();
    last.store()
        .put(&[(id, Bytes::from_static(b"in a layer"))])
        .unwrap();
    let lock = last.seal(&names, None, false).unwrap();
    assert_eq!(lock.artifacts.len(), 2);
    assert_eq!(lock.objects.len(), 3);
    let text = fs::read_to_string(root.join("hearth.lock")).unwrap();
    assert_eq!(lock.text().unwrap(), text);
    assert_eq!(hearth::store::Lock::parse(&text).unwrap(), lock);
    for name in files(&root).into_keys() {
        let name = name.strip_prefix(&root).unwrap().display().to_string();
        let living = [
            "partial",
            "imports",
            "pins",
            "gc.lock",
            "bake.lock",
            "images/lock",
            "objects/tmp",
        ];
        assert!(living.iter().all(|part| !name.starts_with(part)), "{name}");
    }

    assert_eq!(problem(&store, 0), "");
    assert_eq!(store.image("s3://b/i").unwrap().unwrap(), record);
    let located = artifact("s3://b/a", &[b"a", b"shared"], true).objects[0].id;
    assert_eq!(read(&store, &located).unwrap(), b"a");
    assert!(store.artifact("s3://b/unwanted").unwrap().is_none());
    assert!(verify(&store).damaged.is_empty());
    // As a store of its own it is read-only.
    let own = Store::open(&root, &config()).unwrap();
    assert!(!own.writable());
    assert_eq!(
        own.record(&made).unwrap_err().kind(),
        StoreErrorKind::ReadOnly
    );
    let error = Bake::begin(&root, &config(), &[]).unwrap_err();
    assert!(error.to_string().contains("finished tier"), "{error}");
    for (name, why) in [("store", "holds a store"), ("", "not empty")] {
        let error = Bake::begin(&dir.path().join(name), &config(), &[]).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
    // What somebody changed in the lock is found.
    fs::write(
        root.join("hearth.lock"),
        text.replace("s3://b/a", "s3://b/b"),
    )
    .unwrap();
    assert_eq!(verify(&store).damaged[0].path, root.join("hearth.lock"));
}

#[test]
fn a_bake_that_brought_nothing_leaves_nothing_that_it_made() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("new/tier");
    drop(Bake::begin(&root, &config(), &[]).unwrap());
    let older = [TierConfig::at(dir.path().join("none"))];
    Bake::begin(&root, &config(), &older).unwrap_err();
    assert!(!dir.path().join("new").exists());
    // What was there stays.
    fs::create_dir_all(root.join("lost+found")).unwrap();
    drop(Bake::begin(&root, &config(), &[]).unwrap());
    let names = fs::read_dir(&root).unwrap().map(|e| e.unwrap().file_name());
    assert_eq!(names.collect::<Vec<_>>(), ["lost+found"]);
    // What has arrived stays, and what somebody else has begun.
    let bake = Bake::begin(&root, &config(), &[]).unwrap();
    Bake::begin(&root, &config(), &[]).unwrap_err();
    fill_with(bake.store(), "s3://b/a", &[b"a"], true);
    drop(bake);
    drop(Bake::begin(&root, &config(), &[]).unwrap());
    let again = Bake::begin(&root, &config(), &[]).unwrap();
    again.seal(&["s3://b/a".into()], None, false).unwrap();
}

#[test]
fn an_update_takes_over_what_is_good() {
    let dir = tempfile::tempdir().unwrap();
    let big = content(3, 2 * MIB + 5);
    let contents: [&[u8]; 3] = [b"kept", b"damaged", &big];
    bake(dir.path(), "old", &[("s3://b/a", &contents)]);
    let old = dir.path().join("old");
    fs::write(object_path(&old, b"damaged"), b"demaged").unwrap();
    let older = tiers(dir.path(), &["old"]);
    let wrong = Bake::begin(
        &dir.path().join("x"),
        &config(),
        &tiers(dir.path(), &["none"]),
    );
    assert!(
        wrong
            .unwrap_err()
            .to_string()
            .contains("none cannot be used")
    );

    let new = dir.path().join("new");
    let bake = Bake::begin(&new, &config(), &older).unwrap();
    assert!(
        !bake.take_over("s3://b/a").unwrap(),
        "one of them is damaged"
    );
    let made = artifact("s3://b/a", &contents, false);
    assert!(
        bake.store()
            .complete(&made.objects[1].id)
            .unwrap()
            .is_none()
    );
    bake.store()
        .put(&[(made.objects[1].id, Bytes::from_static(b"damaged"))])
        .unwrap();
    assert!(bake.take_over("s3://b/a").unwrap());
    let lock = bake.seal(&["s3://b/a".into()], None, false).unwrap();
    assert_eq!(lock.objects.len(), 3);
    use std::os::unix::fs::MetadataExt as _;
    for content in [&b"kept"[..], &big] {
        let inode = |root| fs::metadata(object_path(root, content)).unwrap().ino();
        assert_eq!(inode(&old), inode(&new), "linked");
    }
    fs::remove_dir_all(&old).unwrap();
    let store = over(dir.path(), &["new"]);
    assert!(verify(&store).damaged.is_empty());
    for (object, content) in made.objects.iter().zip(contents) {
        assert_eq!(read(&store, &object.id).unwrap(), content);
    }
    // A lock that says something else.
    let mut expected = lock.clone();
    expected.artifacts[0].revision = "r0".into();
    let bake = Bake::begin(
        &dir.path().join("third"),
        &config(),
        &tiers(dir.path(), &["new"]),
    )
    .unwrap();
    assert!(bake.take_over("s3://b/a").unwrap());
    let error = bake
        .seal(&["s3://b/a".into()], Some(&expected), false)
        .unwrap_err();
    assert!(
        error.to_string().contains("\"r1\" now, not \"r0\""),
        "{error}"
    );
}

#[test]
fn in_which_order_images_were_recorded_does_not_show() {
    let dir = tempfile::tempdir().unwrap();
    let references: Vec<String> = (0..20).map(|n| format!("s3://b/{n:02}")).collect();
    let names = references.clone();
    let bake = |name: &str, references: &mut dyn Iterator<Item = &String>| {
        let root = dir.path().join(name);
        let bake = Bake::begin(&root, &config(), &[]).unwrap();
        for reference in references {
            let layers = match reference.as_str() {
                "s3://b/07" => &["base"][..],
                _ => &["base", reference],
            };
            let record = image(reference, layers);
            let blob = record.layers.last().unwrap().blob;
            let made = layered(reference, reference.as_bytes(), &blob);
            bake.store().record(&made).unwrap();
            bake.store().record_image(&record).unwrap();
            for layer in &record.layers {
                bake.store().put_index(&layer.blob, b"index").unwrap();
            }
            let content = Bytes::from(reference.clone());
            bake.store().put(&[(made.objects[0].id, content)]).unwrap();
        }
        bake.seal(&names, None, true).unwrap();
        files(&root)
            .into_iter()
            .map(|(path, content)| (path.strip_prefix(&root).unwrap().to_owned(), content))
            .collect::<BTreeMap<_, _>>()
    };
    let one = bake("one", &mut references.iter());
    let two = bake("two", &mut references.iter().rev());
    assert_eq!(
        one.keys().collect::<Vec<_>>(),
        two.keys().collect::<Vec<_>>()
    );
    for (path, content) in one {
        assert!(two[&path] == content, "{}", path.display());
    }
    let store = over(dir.path(), &["one"]);
    let base = image("s3://b/07", &["base"]);
    let found = store.image_by_chain(&base.chain_ids()[0]).unwrap();
    assert_eq!(found.unwrap().0.reference, base.reference);
}
