//! The generation before: it stays until the next one is here, or nothing else makes room.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, SystemTime},
};

use super::{
    artifacts::{collect_to, is_complete, warm},
    images::image,
    sim::SimDisk,
    *,
};
use hearth::store::{CollectOptions, StoreErrorKind, TierConfig, VerifyScope};

/// A reference whose second generation is recorded, but not here.
fn updated(store: &Arc<Store>, old: &[u8], new: &[u8]) -> [Artifact; 2] {
    let before = warm(store, "m", &[old], false);
    let after = artifact("m", &[new], false);
    store.record(&after).unwrap();
    [before, after]
}

fn store_of(dir: &tempfile::TempDir, max: u64) -> Arc<Store> {
    let config = Config {
        max_bytes: Some(ByteSize(max)),
        ..config()
    };
    Store::open(&dir.path().join("store"), &config).unwrap()
}

fn digest_of(store: &Store) -> Digest {
    store.artifact("m").unwrap().unwrap().0.digest
}

#[test]
fn it_stays_until_the_next_is_here() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let new = content(2, 2 * MIB);
    let [before, after] = updated(&store, &content(1, 2 * MIB), &new);
    store.collect(&CollectOptions::default()).unwrap();
    assert!(is_complete(&store, &before.objects[0]));
    assert_eq!(store.last_whole("m").unwrap(), Some(before.clone()));
    // Another one comes before that was here, and is asked for twice.
    let third = artifact("m", &[&new, &content(3, 9)], false);
    for _ in 0..2 {
        store.record(&third).unwrap();
        store.collect(&CollectOptions::default()).unwrap();
    }
    assert_eq!(store.last_whole("m").unwrap(), Some(before.clone()));
    store.record(&after).unwrap();
    store.put(&[(after.objects[0].id, new.into())]).unwrap();
    assert_eq!(store.last_whole("m").unwrap(), None);
    store.collect(&CollectOptions::default()).unwrap();
    assert!(!is_complete(&store, &before.objects[0]));
    assert!(is_complete(&store, &after.objects[0]));
}

#[test]
fn what_was_refused_is_taken_back_unless_somebody_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let [before, after] = updated(&store, &content(1, MIB), &content(2, MIB));
    let refused = after.digest();
    let hold = open(dir.path()).hold_generation(&refused).unwrap();
    assert!(!store.take_back("m", &refused).unwrap());
    drop(hold);
    assert!(!store.take_back("m", &before.digest()).unwrap());
    assert!(store.take_back("m", &refused).unwrap());
    assert_eq!(digest_of(&store), before.digest());
    assert!(!store.take_back("m", &before.digest()).unwrap());
    store.collect(&CollectOptions::default()).unwrap();
    assert!(is_complete(&store, &before.objects[0]));
    // Of what is not all here there is nothing to go back to.
    store.remove("m").unwrap();
    store.collect(&CollectOptions::default()).unwrap();
    for artifact in [&before, &after] {
        store.record(artifact).unwrap();
    }
    assert!(!store.take_back("m", &refused).unwrap());
}

#[test]
fn it_goes_last_where_room_is_needed_and_never_while_it_is_pinned_or_held() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_of(&dir, 6 << 20);
    let other = warm(&store, "other", &[&content(9, 2 * MIB)], false);
    let [before, after] = updated(&store, &content(1, 2 * MIB), &content(2, 3 * MIB));
    let larger = artifact("m", &[&content(3, 5 * MIB)], false);
    // What is used more recently goes first all the same.
    drop(store.hold("other").unwrap());
    let room = store.admit(&after).unwrap();
    assert!(!is_complete(&store, &other.objects[0]));
    assert!(is_complete(&store, &before.objects[0]));
    drop(room);
    store.record(&larger).unwrap();
    store.pin("m", "test").unwrap();
    let error = store.admit(&larger).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::NoSpace);
    let said = "could evict 0 B; its last generation stays while it is pinned; pinned: m";
    assert!(error.to_string().contains(said), "{error}");
    store.unpin("m", "test").unwrap();
    let hold = store.hold_generation(&before.digest()).unwrap();
    store.admit(&larger).unwrap_err();
    drop(hold);
    assert!(is_complete(&store, &before.objects[0]));
    let _room = store.admit(&larger).unwrap();
    assert!(!is_complete(&store, &before.objects[0]));
    assert_eq!(digest_of(&store), larger.digest());
    assert_eq!(store.last_whole("m").unwrap(), None);
}

#[test]
fn it_goes_with_its_reference() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let [before, _] = updated(&store, &content(1, MIB), &content(2, MIB));
    let hold = store.hold_generation(&before.digest()).unwrap();
    assert_eq!(collect_to(&store, 0).evicted, ["m"]);
    assert!(is_complete(&store, &before.objects[0]), "it is held");
    drop(hold);
    store.collect(&CollectOptions::default()).unwrap();
    assert!(!is_complete(&store, &before.objects[0]));
    let [before, _] = updated(&store, &content(1, MIB), &content(2, MIB));
    assert!(store.remove("m").unwrap());
    store.collect(&CollectOptions::default()).unwrap();
    assert!(!is_complete(&store, &before.objects[0]));
}

/// Its tree was on a disk that is gone by then.
#[test]
fn what_a_tier_had_is_taken_back_with_its_tree() {
    let dir = tempfile::tempdir().unwrap();
    let tier = Store::open(&dir.path().join("tier"), &config()).unwrap();
    let before = warm(&tier, "m", &[&content(1, 9)], false);
    drop(tier);
    let tiers = [TierConfig::at(dir.path().join("tier"))];
    let store = Store::open_with_tiers(&dir.path().join("store"), &config(), &tiers).unwrap();
    let refused = store
        .record(&artifact("m", &[&content(2, 9)], false))
        .unwrap();
    assert!(store.take_back("m", &refused).unwrap());
    drop(store);
    let (record, found) = open(dir.path()).artifact("m").unwrap().unwrap();
    assert_eq!((record.digest, found), (before.digest(), before));
}

/// What the record of a reference says after it was damaged and mended.
fn mended(dir: &tempfile::TempDir, recorded: [&Artifact; 2]) -> Digest {
    let root = dir.path().join("store");
    for (at, artifact) in recorded.into_iter().enumerate() {
        let tree = root.join("trees").join(artifact.digest().hex());
        let tree = fs::File::open(tree).unwrap();
        let at = SystemTime::now() - Duration::from_secs(10 - at as u64);
        tree.set_modified(at).unwrap();
    }
    let name = Digest::of(b"m").hex();
    let path = root.join(format!("artifacts/{name}.json"));
    fs::write(&path, "{}").unwrap();
    let disk = Arc::new(SimDisk::quick(1));
    let store = Store::open_on(disk.clone(), &root, &config()).unwrap();
    let gone = Arc::new(AtomicBool::new(false));
    let was_gone = Arc::clone(&gone);
    disk.before_each(move |_, _| {
        was_gone.fetch_or(!path.exists(), Ordering::Relaxed);
    });
    let report = store.verify(VerifyScope::All, true, |_| true).unwrap();
    assert!(report.damaged.len() == 1 && report.damaged[0].removed);
    assert!(
        !gone.load(Ordering::Relaxed),
        "anybody could have collected it"
    );
    digest_of(&store)
}

#[test]
fn a_record_that_is_mended_leads_to_what_is_here() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let new = content(2, 9);
    let [before, after] = updated(&store, &content(1, 9), &new);
    assert_eq!(mended(&dir, [&before, &after]), after.digest());
    assert_eq!(store.last_whole("m").unwrap(), Some(before.clone()));
    // Which of them an image is shows otherwise.
    store.put(&[(after.objects[0].id, new.into())]).unwrap();
    let mut image = image("m", &["base"]);
    image.manifest = Digest::of(b"manifest");
    let before = Artifact {
        revision: image.manifest.to_string(),
        ..before
    };
    store.record(&before).unwrap();
    store.record_image(&image).unwrap();
    assert_eq!(mended(&dir, [&before, &after]), before.digest());
}
