//! What is damaged on a tier, or cannot be read there, and who finds it.

use super::*;

#[test]
fn a_damaged_object_is_never_trusted_again() {
    let dir = tempfile::tempdir().unwrap();
    let contents: [&[u8]; 3] = [b"good", b"flipped", b"truncated"];
    bake(dir.path(), "tier", &[("s3://b/a", &contents)]);
    let tier = dir.path().join("tier");
    fs::write(object_path(&tier, b"flipped"), b"flopped").unwrap();
    fs::write(object_path(&tier, b"truncated"), b"trunc").unwrap();
    let [store, other] = [0; 2].map(|_| over(dir.path(), &["tier"]));
    let ids = artifact("s3://b/a", &contents, false).objects;
    // Of a wrong length: seen where the length is known.
    assert!(store.complete_sized(&ids[2].id, 9).unwrap().is_none());
    assert!(store.complete_sized(&ids[1].id, 7).unwrap().is_some());
    for scope in [
        VerifyScope::References(&["s3://b/a".into()]),
        VerifyScope::All,
    ] {
        let found = store.verify(scope, false, |_| true).unwrap();
        let mut bad: Vec<_> = found.damaged.iter().map(|d| d.path.clone()).collect();
        bad.sort();
        let mut expected = [
            object_path(&tier, b"flipped"),
            object_path(&tier, b"truncated"),
        ];
        expected.sort();
        if let VerifyScope::All = scope {
            assert_eq!(bad, expected);
        } else {
            assert_eq!(bad, expected, "{found:?}");
        }
        assert!(
            (found.damaged.iter()).all(|d| d.tier && d.distrusted && !d.removed),
            "{found:?}"
        );
    }
    drop(store);
    for store in [&other, &over(dir.path(), &["tier"])] {
        assert_eq!(read(store, &ids[0].id).unwrap(), b"good");
        assert!(store.complete(&ids[1].id).unwrap().is_none());
        assert!(!store.has(&Digest::of(b"truncated")).unwrap());
    }
    // From elsewhere.
    other
        .put(&[(ids[1].id, Bytes::from_static(b"flipped"))])
        .unwrap();
    assert_eq!(read(&other, &ids[1].id).unwrap(), b"flipped");
}

#[test]
fn unreadable_content_counts_as_absent() {
    let dir = tempfile::tempdir().unwrap();
    bake(dir.path(), "tier", &[("s3://b/a", &[b"a", b"b"])]);
    let tier = dir.path().join("tier");
    // What cannot be read, whoever asks: a directory in place of a file.
    for path in [object_path(&tier, b"a"), tier.join("artifacts")] {
        match path.is_dir() {
            true => fs::remove_dir_all(&path).unwrap(),
            false => fs::remove_file(&path).unwrap(),
        }
        match path.ends_with("artifacts") {
            true => fs::write(&path, b"").unwrap(),
            false => fs::create_dir(&path).unwrap(),
        }
    }
    let store = over(dir.path(), &["tier"]);
    let a = ObjectId::Sha256(Digest::of(b"a"));
    assert!(store.complete_sized(&a, 1).unwrap().is_none());
    assert!(store.complete(&a).unwrap().is_none());
    // Nor is what a link leads to.
    fs::write(dir.path().join("secret"), b"a").unwrap();
    fs::remove_dir(object_path(&tier, b"a")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("secret"), object_path(&tier, b"a")).unwrap();
    assert!(store.complete(&a).unwrap().is_none());
    assert_eq!(
        read(&store, &ObjectId::Sha256(Digest::of(b"b"))).unwrap(),
        b"b"
    );
    assert!(store.artifact("s3://b/a").unwrap().is_none());
    assert!(store.records().unwrap().is_empty());
    store.collect(&CollectOptions::default()).unwrap();
}

#[test]
fn a_tier_that_was_read_through_on_demand_is_verified() {
    let dir = tempfile::tempdir().unwrap();
    bake(dir.path(), "tier", &[("s3://b/a", &[b"one", b"two"])]);
    let store = over(dir.path(), &["tier"]);
    let at = || store.tiers()[0].verified_at;
    let some = store.verify(VerifyScope::All, false, |_| false).unwrap();
    assert!(some.damaged.is_empty() && at().is_none(), "it was stopped");
    let gone = object_path(&dir.path().join("tier"), b"two");
    fs::remove_file(&gone).unwrap();
    assert_eq!(verify(&store).damaged.len(), 1);
    assert!(at().is_none(), "not all of it was there");
    fs::write(&gone, b"two").unwrap();
    assert!(verify(&store).damaged.is_empty());
    assert!(at().is_some());
}

#[test]
fn tiers_are_read_through_in_the_background() {
    let dir = tempfile::tempdir().unwrap();
    // In the last parts of the objects, by its digest.
    let mut some = (0u32..).map(u32::to_le_bytes);
    let last = some.find(|bytes| Digest::of(bytes).hex().starts_with('f'));
    let last = last.unwrap();
    bake(dir.path(), "tier", &[("s3://b/a", &[b"good", &last])]);
    bake(dir.path(), "part", &[("s3://b/b", &[b"linked", b"b"])]);
    let [tier, part, away] = ["tier", "part", "away"].map(|name| dir.path().join(name));
    fs::write(object_path(&tier, &last), b"wrong").unwrap();
    let linked = object_path(&part, b"linked");
    fs::rename(&linked, dir.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), &linked).unwrap();
    let mut tiers = tiers(dir.path(), &["tier", "part"]);
    tiers
        .iter_mut()
        .for_each(|tier| tier.verify = TierVerify::Once);
    let disk = Arc::new(Counting::default());
    let half_way = tier.join("objects/sha256/80");
    *disk.detach.lock().unwrap() = Some([half_way, tier.clone(), away.clone()]);
    let open = |disk: Arc<dyn Disk>| {
        Store::open_tiered_on(disk, &dir.path().join("store"), &config(), &tiers).unwrap()
    };
    let store = open(disk);
    let wait_for = |what: &dyn Fn() -> bool| {
        let begun = std::time::Instant::now();
        while !what() {
            assert!(begun.elapsed().as_secs() < 60);
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    wait_for(&|| away.exists() && !problem(&store, 0).is_empty());
    // What went on with nothing there would be done by then.
    wait_for(&|| store.tiers()[1].unreadable == 1);
    fs::rename(&away, &tier).unwrap();
    wait_for(&|| store.tiers()[0].verified_at.is_some());
    let found = store.tiers();
    assert_eq!((found[0].distrusted, found[0].unreadable), (1, 0));
    // What could not be read was not verified.
    assert_eq!((found[1].distrusted, found[1].verified_at), (0, None));
    let id = |content: &[u8]| ObjectId::Sha256(Digest::of(content));
    assert_eq!(read(&store, &id(&last)), None);
    assert_eq!(read(&store, &id(b"good")).unwrap(), b"good");
    drop(store);
    // Whoever comes after knows it.
    let store = open(Arc::new(RealDisk));
    assert!(store.tiers()[0].verified_at.is_some());
    assert_eq!(read(&store, &id(&last)), None);
}

#[test]
fn what_cannot_be_read_hides_nothing_that_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let contents: [&[u8]; 4] = [b"good", b"flipped", b"linked", b"more"];
    bake(dir.path(), "tier", &[("s3://b/a", &contents)]);
    let [tier, away] = ["tier", "away"].map(|name| dir.path().join(name));
    fs::write(object_path(&tier, b"flipped"), b"flopped").unwrap();
    let linked = object_path(&tier, b"linked");
    fs::remove_file(&linked).unwrap();
    std::os::unix::fs::symlink("nowhere", &linked).unwrap();
    let store = over(dir.path(), &["tier"]);
    let found = verify(&store).damaged;
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found.iter().all(|damage| damage.tier));
    let wrong: Vec<_> = found.iter().filter(|damage| damage.distrusted).collect();
    assert_eq!(wrong.len(), 1);
    assert_eq!(wrong[0].path, object_path(&tier, b"flipped"));
    // A directory that cannot be listed.
    fs::rename(tier.join("artifacts"), tier.join("kept")).unwrap();
    fs::write(tier.join("artifacts"), b"").unwrap();
    let found = verify(&store).damaged;
    assert!(found.iter().any(|damage| damage.path == tier), "{found:?}");
    assert!(found.iter().any(|damage| damage.distrusted), "{found:?}");
    fs::remove_file(tier.join("artifacts")).unwrap();
    fs::rename(tier.join("kept"), tier.join("artifacts")).unwrap();
    // Detached meanwhile: the rest was not verified.
    let detach = |_| {
        let _ = fs::rename(&tier, &away);
        true
    };
    let found = store.verify(VerifyScope::All, false, detach).unwrap();
    let last = found.damaged.last().unwrap();
    assert!(
        last.path == tier && last.what.contains("no hearth.json"),
        "{found:?}"
    );
    assert!(!last.distrusted && !last.is_mended());
}

#[test]
fn what_is_damaged_on_a_disk_says_nothing_of_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tier", "better"] {
        bake(dir.path(), name, &[("s3://b/a", &[b"content"])]);
    }
    let [tier, better] = ["tier", "better"].map(|name| dir.path().join(name));
    fs::write(object_path(&tier, b"content"), b"contend").unwrap();
    let store = over(dir.path(), &["tier"]);
    assert_eq!(verify(&store).damaged.len(), 1);
    let id = ObjectId::Sha256(Digest::of(b"content"));
    assert_eq!(read(&store, &id), None);
    fs::rename(&tier, dir.path().join("away")).unwrap();
    fs::rename(&better, &tier).unwrap();
    assert_eq!(
        (problem(&store, 0), store.tiers()[0].distrusted),
        (String::new(), 0)
    );
    assert_eq!(read(&store, &id).unwrap(), b"content");
}

/// Pipes where files should be: opening one waits for whoever writes, for good.
#[test]
fn pipes_on_a_tier_hold_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    bake(dir.path(), "tier", &[("s3://b/a", &[b"a"])]);
    bake(dir.path(), "other", &[("s3://b/b", &[b"b"])]);
    let tier = dir.path().join("tier");
    let mut paths = vec![
        dir.path().join("other/hearth.json"),
        object_path(&tier, b"a"),
    ];
    for below in ["artifacts", "trees"] {
        let names = fs::read_dir(tier.join(below)).unwrap();
        paths.extend(names.map(|name| name.unwrap().path()));
    }
    assert!(paths.len() >= 4, "{paths:?}");
    let places = dir.path().to_owned();
    let (done, finished) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for path in paths {
            fs::remove_file(&path).unwrap();
            let made = std::process::Command::new("mkfifo").arg(&path).status();
            assert!(made.unwrap().success());
            let store = over(&places, &["tier", "other"]);
            let a = ObjectId::Sha256(Digest::of(b"a"));
            assert!(read(&store, &a).is_none_or(|read| read == b"a"));
            store.artifact("s3://b/a").unwrap();
            store.artifact("s3://b/b").unwrap();
            store.records().unwrap();
            store.collect(&CollectOptions::default()).unwrap();
        }
        done.send(()).unwrap();
    });
    let waited = finished.recv_timeout(std::time::Duration::from_secs(60));
    assert!(waited.is_ok(), "somebody waits for a pipe");
}
