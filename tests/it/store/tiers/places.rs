//! Where objects lie, for who shows them and for the kernel.

use super::*;

#[test]
fn opening_costs_the_same_whatever_is_in_a_tier() {
    let mut costs = Vec::new();
    for count in [1u32, 1000] {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<[u8; 4]> = (0..count).map(u32::to_le_bytes).collect();
        let contents: Vec<&[u8]> = bytes.iter().map(|b| &b[..]).collect();
        bake(dir.path(), "tier", &[("s3://b/a", &contents)]);
        drop(over(dir.path(), &[]));
        let disk = Arc::new(Counting::default());
        let store = Store::open_tiered_on(
            Arc::clone(&disk) as Arc<dyn Disk>,
            &dir.path().join("store"),
            &config(),
            &tiers(dir.path(), &["tier"]),
        );
        let store = store.unwrap();
        let opening = disk.calls.swap(0, Ordering::Relaxed);
        assert!(
            store
                .complete(&ObjectId::Sha256(Digest::of(&bytes[0])))
                .unwrap()
                .is_some()
        );
        let one = disk.calls.swap(0, Ordering::Relaxed);
        let (record, made) = store.artifact("s3://b/a").unwrap().unwrap();
        let finder = store.finder_of(&made, &record.digest).unwrap();
        for object in &made.objects {
            let there = Whereabouts::Tier(dir.path().join("tier").into());
            assert_eq!(finder.find(object).unwrap(), Some(there));
        }
        costs.push((opening, one, disk.calls.load(Ordering::Relaxed)));
    }
    assert_eq!(costs[0], costs[1]);
    let (opening, one, all) = costs[0];
    assert!(opening < 10 && one < 10 && all < 20, "{costs:?}");
}

/// Where objects are found; by looking, and by asking a tier what it was sealed with.
fn found(store: &Store, made: &Artifact) -> [Vec<Option<Whereabouts>>; 2] {
    let finders = [
        store.finder().unwrap(),
        store.finder_of(made, &made.digest()).unwrap(),
    ];
    finders.map(|finder| {
        let find = |object| finder.find(object).unwrap();
        made.objects.iter().map(find).collect()
    })
}

#[test]
fn objects_are_found_where_they_lie() {
    let dir = tempfile::tempdir().unwrap();
    let contents: [&[u8]; 4] = [b"the largest of them", b"good", b"flipped", b"lost"];
    bake(dir.path(), "tier", &[("s3://b/a", &contents)]);
    let tier = dir.path().join("tier");
    let store = over(dir.path(), &["tier"]);
    let made = artifact("s3://b/a", &contents, false);
    let there = Some(Whereabouts::Tier(tier.as_path().into()));
    assert_eq!(found(&store, &made), [0; 2].map(|_| vec![there.clone(); 4]));
    // What was found damaged is nowhere, and then where it was brought again.
    fs::write(object_path(&tier, b"flipped"), b"flopped").unwrap();
    fs::remove_file(object_path(&tier, b"lost")).unwrap();
    assert_eq!(verify(&store).damaged.len(), 2);
    let [looked, sealed] = found(&store, &made);
    assert_eq!(looked, [there.clone(), there.clone(), None, None]);
    assert_eq!(sealed, [there.clone(), there.clone(), None, there.clone()]);
    let flipped = (made.objects[2].id, Bytes::from_static(b"flipped"));
    store.put(&[flipped]).unwrap();
    assert_eq!(found(&store, &made)[1][2], Some(Whereabouts::Store));
    // Of another generation it says nothing; of one whose largest object is not there, nothing either.
    let other = artifact("s3://b/a", &[b"flipped", b"elsewhere"], false);
    for found in found(&store, &other) {
        assert_eq!(found, [Some(Whereabouts::Store), None]);
    }
    fs::remove_file(object_path(&tier, contents[0])).unwrap();
    for found in found(&store, &made) {
        let stored = Some(Whereabouts::Store);
        assert_eq!(found, [None, there.clone(), stored, None]);
    }
}

#[test]
fn many_objects_are_found_by_the_names_of_their_directories() {
    let dir = tempfile::tempdir().unwrap();
    let store = over(dir.path(), &[]);
    // More of one directory than are asked for one by one.
    let bytes: Vec<[u8; 4]> = (0..20_000u32)
        .map(u32::to_le_bytes)
        .filter(|bytes| Digest::of(bytes).hex().starts_with("ab"))
        .collect();
    let contents: Vec<&[u8]> = bytes.iter().map(|b| &b[..]).collect();
    assert!(contents.len() > 40, "{}", contents.len());
    fill_with(&store, "s3://b/a", &contents[1..], false);
    let more = artifact("s3://b/a", &contents, false);
    let finder = store.finder().unwrap();
    for (at, object) in more.objects.iter().enumerate().rev() {
        let there = (at > 0).then_some(Whereabouts::Store);
        assert_eq!(finder.find(object).unwrap(), there, "{at}");
    }
}

/// The directories of a placement, below `dir`.
fn placed(store: &Store, made: &Artifact, dir: &Path) -> Option<Vec<String>> {
    let placement = store.placement(made).unwrap()?;
    let name = |path: &PathBuf| path.strip_prefix(dir).unwrap().display().to_string();
    assert!(store.still_holds(&placement));
    Some(placement.dirs().iter().map(name).collect())
}

#[test]
fn the_kernel_is_given_no_directory_with_damaged_objects_before_a_good_one() {
    let dir = tempfile::tempdir().unwrap();
    let contents: [&[u8]; 3] = [b"first", b"second", b"both"];
    bake(dir.path(), "one", &[("s3://b/a", &[b"first", b"both"])]);
    bake(dir.path(), "two", &[("s3://b/b", &[b"second", b"both"])]);
    let store = over(dir.path(), &["one", "two"]);
    let made = artifact("s3://b/all", &contents, false);
    let all = ["store/objects", "one/objects", "two/objects"];
    let place = |made: &Artifact| placed(&store, made, dir.path());
    assert_eq!(place(&made).unwrap(), all);
    let only = artifact("s3://b/only", &[b"second"], false);
    assert_eq!(place(&only).unwrap(), ["store/objects", "two/objects"]);
    let missing = artifact("s3://b/missing", &[b"first", b"nowhere"], false);
    assert_eq!(place(&missing), None);
    let located = artifact("s3://b/located", &[b"first"], true);
    assert_eq!(place(&located), None);

    // Names are believed until the lengths were looked at.
    let first = object_path(&dir.path().join("one"), b"first");
    fs::write(&first, b"fir").unwrap();
    let before = store.placement(&made).unwrap().unwrap();
    store.check_lengths(only.objects.iter()).unwrap();
    assert!(store.still_holds(&before));
    store.check_lengths(made.objects.iter()).unwrap();
    assert!(!store.still_holds(&before));
    assert_eq!(place(&made), None);
    fs::write(&first, b"first").unwrap();
    fs::remove_dir_all(store.root().join("distrusted")).unwrap();
    drop(store);
    let store = over(dir.path(), &["one", "two"]);
    let place = |made: &Artifact| placed(&store, made, dir.path());

    // The first has a damaged one of what the second has, too: whoever looks there first must not.
    let before = store.placement(&made).unwrap().unwrap();
    fs::write(object_path(&dir.path().join("one"), b"both"), b"bath").unwrap();
    let other = over(dir.path(), &["one", "two"]);
    assert_eq!(verify(&other).damaged.len(), 1);
    assert!(!store.still_holds(&before), "another process has found it");
    assert_eq!(place(&made), None);
    let both = artifact("s3://b/both", &[b"second", b"both"], false);
    assert_eq!(place(&both).unwrap(), ["store/objects", "two/objects"]);
    let object = ObjectId::Sha256(Digest::of(b"both"));
    // In the store, which comes first: what was fetched although a tier has it.
    let root = store.root().to_owned();
    drop((store, other));
    let alone = Store::open(&root, &config()).unwrap();
    alone.put(&[(object, Bytes::from_static(b"both"))]).unwrap();
    drop(alone);
    let store = over(dir.path(), &["one", "two"]);
    assert_eq!(placed(&store, &made, dir.path()).unwrap(), all);
    let mine = artifact("s3://b/mine", &[b"both"], false);
    let placement = store.placement(&mine).unwrap().unwrap();
    assert!(placement.is_in_store());
    let before = store.placement(&made).unwrap().unwrap();
    fs::rename(dir.path().join("two"), dir.path().join("away")).unwrap();
    store.tiers();
    assert!(!store.still_holds(&before) && store.still_holds(&placement));
}
