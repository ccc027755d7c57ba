//! Read-only tiers below a store, and bakes that make them.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{
    images::{image, layered},
    *,
};
use bytes::Bytes;
use hearth::{
    disk::{Disk, DiskFile, Open, RealDisk, Result as DiskResult, Space, Stat},
    store::{
        Bake, CollectOptions, StoreErrorKind, TierConfig, TierVerify, VerifyReport, VerifyScope,
        Whereabouts,
    },
};

mod bakes;
mod damage;
mod places;

/// A store with the tiers `names` of `dir`.
fn over(dir: &Path, names: &[&str]) -> Arc<Store> {
    let tiers = tiers(dir, names);
    Store::open_with_tiers(&dir.join("store"), &config(), &tiers).unwrap()
}

fn tiers(dir: &Path, names: &[&str]) -> Vec<TierConfig> {
    names
        .iter()
        .map(|name| TierConfig::at(dir.join(name)))
        .collect()
}

/// Records an artifact of these contents, and stores them.
fn fill_with(store: &Arc<Store>, reference: &str, contents: &[&[u8]], located: bool) -> Artifact {
    let made = artifact(reference, contents, located);
    store.record(&made).unwrap();
    let objects: Vec<_> = (made.objects.iter().zip(contents))
        .map(|(object, content)| (object.id, Bytes::copy_from_slice(content)))
        .collect();
    store.put(&objects).unwrap();
    made
}

/// Bakes references with their contents into `dir/name`.
fn bake(dir: &Path, name: &str, artifacts: &[(&str, &[&[u8]])]) {
    let bake = Bake::begin(&dir.join(name), &config(), &[]).unwrap();
    for (reference, contents) in artifacts {
        fill_with(bake.store(), reference, contents, false);
    }
    let names: Vec<String> = artifacts.iter().map(|(name, _)| name.to_string()).collect();
    bake.seal(&names, None, false).unwrap();
}

/// All files below a directory: length and content.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => {
                let content = fs::read(&path).unwrap();
                found.insert(path, content);
            }
        }
    }
    found
}

/// The names of files that say something: not of locks.
fn content_files(dir: &Path) -> Vec<PathBuf> {
    let mut names: Vec<PathBuf> = files(dir).into_keys().collect();
    names.retain(|path| !path.to_string_lossy().ends_with("lock"));
    names
}

fn object_path(root: &Path, content: &[u8]) -> PathBuf {
    let hex = Digest::of(content).hex();
    root.join("objects/sha256").join(&hex[..2]).join(hex)
}

fn read(store: &Store, id: &ObjectId) -> Option<Vec<u8>> {
    let found = store.complete(id).unwrap()?;
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut found.file(), &mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, found.size);
    Some(bytes)
}

fn verify(store: &Store) -> VerifyReport {
    store.verify(VerifyScope::All, false, |_| true).unwrap()
}

fn problem(store: &Store, at: usize) -> String {
    store.tiers()[at].problem.clone().unwrap_or_default()
}

#[test]
fn reads_through_tiers_are_reads_of_one_store() {
    for seed in 0..6 {
        let dir = tempfile::tempdir().unwrap();
        let all = Store::open(&dir.path().join("all"), &config()).unwrap();
        // Filled as stores, used as tiers.
        let places = ["one", "two", "store"]
            .map(|name| Store::open(&dir.path().join(name), &config()).unwrap());
        let mut ids = Vec::new();
        let mut references = Vec::new();
        let mut chains = Vec::new();
        let mut blobs = Vec::new();
        let dice = content(seed + 1, 64);
        for at in 0..6usize {
            let bytes = [
                content(at as u64, 100 + at),
                content(seed, 7),
                content(at as u64 + 50, at),
            ];
            let contents: Vec<&[u8]> = bytes.iter().map(|b| &b[..]).collect();
            let reference = format!("s3://b/{at}");
            // In one place or several.
            let mask = usize::from(dice[at]) % 7 + 1;
            for store in (places.iter().enumerate())
                .filter(|(place, _)| mask >> place & 1 == 1)
                .map(|(_, store)| store)
                .chain([&all])
            {
                if at < 3 {
                    let made = fill_with(store, &reference, &contents, at == 1);
                    ids.extend(made.objects.iter().map(|object| object.id));
                } else {
                    let record = image(&reference, &["base", &reference][..at - 3]);
                    let layer = Digest::of(reference.as_bytes());
                    store
                        .record(&layered(&reference, &bytes[0], &layer))
                        .unwrap();
                    store.record_image(&record).unwrap();
                    store.put_index(&layer, &bytes[0]).unwrap();
                    chains.extend(record.chain_ids());
                    blobs.push(layer);
                }
            }
            references.push(reference);
        }
        drop(places);
        let store = over(dir.path(), &["one", "two"]);
        for id in &ids {
            assert_eq!(read(&store, id), read(&all, id), "{seed} {id}");
            let digest = store.complete(id).unwrap().unwrap().digest;
            assert!(store.has(&digest).unwrap());
        }
        for reference in &references {
            let of = |store: &Store| {
                store
                    .artifact(reference)
                    .unwrap()
                    .map(|(_, artifact)| artifact)
            };
            assert_eq!(of(&store), of(&all), "{seed} {reference}");
            assert_eq!(
                store.image(reference).unwrap(),
                all.image(reference).unwrap()
            );
            drop(store.hold(reference).unwrap());
        }
        for blob in &blobs {
            assert_eq!(store.index(blob).unwrap(), all.index(blob).unwrap());
            assert_eq!(
                store.index_mark(blob).unwrap(),
                all.index_mark(blob).unwrap()
            );
            assert!(store.has_index(blob).unwrap());
        }
        for chain in &chains {
            let found = store.image_by_chain(chain).unwrap().unwrap();
            assert_eq!(found.0.chain_ids()[found.1 - 1], *chain);
        }
        let names = |store: &Store| -> Vec<_> {
            let records = store.records().unwrap();
            records
                .into_iter()
                .map(|r| (r.reference, r.digest, r.bytes))
                .collect()
        };
        assert_eq!(names(&store), names(&all));
        assert_eq!(store.images().unwrap(), all.images().unwrap());
        // Of the images nothing but indexes was stored.
        assert!(
            verify(&store)
                .damaged
                .iter()
                .all(|d| d.what == "it is missing")
        );
    }
}

#[test]
fn what_is_on_a_tier_is_neither_written_again_nor_removed() {
    let dir = tempfile::tempdir().unwrap();
    let big = content(1, 3 * MIB);
    let contents: [&[u8]; 2] = [b"small", &big];
    bake(dir.path(), "tier", &[("s3://b/a", &contents)]);
    let before = files(&dir.path().join("tier"));
    let store = over(dir.path(), &["tier"]);
    let empty = content_files(store.root());

    let made = artifact("s3://b/a", &contents, false);
    let digest = store.record(&made).unwrap();
    assert_eq!(digest, made.digest());
    assert!(store.admit(&made).is_ok());
    fill_with(&store, "s3://b/a", &contents, false);
    let import = store.import().unwrap();
    for content in contents {
        let mut file = import.begin(content.len() as u64).unwrap();
        file.write(content).unwrap();
        file.finish().unwrap();
    }
    let imported = import.commit().unwrap();
    assert_eq!((imported.new_files, imported.on_tiers), (0, 2));
    assert_eq!(import.imported(), imported);
    drop(import);
    assert_eq!(content_files(store.root()), empty, "nothing is written");

    // Another reference to the same content: only its record.
    let second = fill_with(&store, "s3://b/second", &contents, false);
    assert!(
        !store
            .has_itself(second.objects[0].id.sha256().as_ref().unwrap())
            .unwrap()
    );
    let error = store.remove("s3://b/a").unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::OnTier);
    assert!(error.to_string().contains("tier"), "{error}");
    assert_eq!(
        store.remove_forced("s3://b/a").unwrap_err().kind(),
        StoreErrorKind::OnTier
    );
    store.pin("s3://b/a", "me").unwrap();
    assert_eq!(store.records().unwrap()[0].pins, ["me"]);
    assert!(store.remove("s3://b/second").unwrap());
    let all = CollectOptions {
        target_bytes: Some(0),
        dry_run: false,
    };
    let report = store.collect(&all).unwrap();
    assert_eq!((report.objects, &report.evicted[..]), (0, &[][..]));
    assert_eq!(files(&dir.path().join("tier")), before);
    assert_eq!(read(&store, &made.objects[1].id).unwrap(), big);
}

#[test]
fn what_a_tier_lacks_is_fetched_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let contents: [&[u8]; 2] = [b"here", b"gone"];
    bake(dir.path(), "tier", &[("s3://b/a", &contents)]);
    let tier = dir.path().join("tier");
    fs::remove_file(object_path(&tier, b"gone")).unwrap();
    let store = over(dir.path(), &["tier"]);
    let made = artifact("s3://b/a", &contents, false);
    let found = verify(&store);
    assert_eq!(found.damaged.len(), 1, "{found:?}");
    assert_eq!(found.damaged[0].what, "it is missing");
    assert_eq!(found.damaged[0].references, ["s3://b/a"]);
    assert!(!found.damaged[0].distrusted, "a disk may come back");
    assert!(!found.damaged[0].is_mended());
    let gone = made.objects[1].id;
    assert!(store.complete(&gone).unwrap().is_none());
    // By whom it is brought back without a record of its own.
    store.put(&[(gone, Bytes::from_static(b"gone"))]).unwrap();
    let all = CollectOptions {
        target_bytes: Some(0),
        dry_run: false,
    };
    store.collect(&all).unwrap();
    assert_eq!(read(&store, &gone).unwrap(), b"gone");
    // With a record, since the tier does not have all of it, it is evicted like any other.
    store.record(&made).unwrap();
    let report = store.collect(&all).unwrap();
    assert_eq!(report.evicted, ["s3://b/a"]);
    assert!(
        store.artifact("s3://b/a").unwrap().is_some(),
        "the tier still knows it"
    );
}

#[test]
fn broken_tiers_are_named_and_the_rest_works() {
    let dir = tempfile::tempdir().unwrap();
    bake(dir.path(), "good", &[("s3://b/a", &[b"a"])]);
    let json = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("hearth.json"), text).unwrap();
    };
    json("newer", r#"{"format": 99, "id": "n", "more": true}"#);
    json("older", r#"{"format": 0, "id": "o"}"#);
    json("torn", r#"{"format": 1, "i"#);
    fs::create_dir(dir.path().join("empty")).unwrap();
    fs::write(dir.path().join("file"), b"").unwrap();
    let half = Bake::begin(&dir.path().join("half"), &config(), &[]).unwrap();
    fill_with(half.store(), "s3://b/half", &[b"half"], false);
    let same = fs::read_to_string(dir.path().join("good/hearth.json")).unwrap();
    json("same", &same);
    let names = [
        "newer", "older", "torn", "empty", "file", "absent", "half", "good", "same", "store",
    ];
    let relative = TierConfig::at("tier");
    let refused = Store::open_with_tiers(&dir.path().join("store"), &config(), &[relative]);
    assert!(refused.unwrap_err().to_string().contains("absolute"));
    let store = over(dir.path(), &names);
    let why = [
        "has format 99",
        "has format 0",
        "cannot be read",
        "is the disk attached",
        "cannot open",
        "is the disk attached",
        "half baked",
        "",
        "good: the same content",
        "store: the same content",
    ];
    for (at, why) in why.iter().enumerate() {
        let said = problem(&store, at);
        assert!(
            said.contains(why) && said.is_empty() == why.is_empty(),
            "{}: {said}",
            names[at]
        );
    }
    assert_eq!(
        read(&store, &ObjectId::Sha256(Digest::of(b"a"))).unwrap(),
        b"a"
    );
    assert!(!store.has(&Digest::of(b"half")).unwrap());
    assert_eq!(store.records().unwrap().len(), 1);
    let mine = fill_with(&store, "s3://b/mine", &[b"mine"], false);
    assert_eq!(read(&store, &mine.objects[0].id).unwrap(), b"mine");
    assert!(verify(&store).damaged.is_empty());

    // Attached and detached while the store is open.
    half.seal(&["s3://b/half".into()], None, false).unwrap();
    fs::rename(dir.path().join("good"), dir.path().join("away")).unwrap();
    assert_eq!(problem(&store, 6), "");
    assert!(problem(&store, 7).contains("attached"));
    // The one with the same id takes its place, though there is nothing in it.
    assert_eq!(problem(&store, 8), "");
    assert!(store.has(&Digest::of(b"half")).unwrap());
    assert!(store.artifact("s3://b/a").unwrap().is_none());
}

/// The disk of this machine, and how often it was asked.
#[derive(Debug, Default)]
struct Counting {
    disk: RealDisk,
    calls: AtomicUsize,
    /// A directory that is renamed as soon as this one in it is listed.
    detach: Mutex<Option<[PathBuf; 3]>>,
}

impl Counting {
    fn counted(&self) -> &RealDisk {
        self.calls.fetch_add(1, Ordering::Relaxed);
        &self.disk
    }
}

impl Disk for Counting {
    fn open(&self, path: &Path, how: Open) -> DiskResult<Arc<dyn DiskFile>> {
        self.counted().open(path, how)
    }
    fn rename(&self, from: &Path, to: &Path) -> DiskResult<()> {
        self.counted().rename(from, to)
    }
    fn rename_new(&self, from: &Path, to: &Path) -> DiskResult<bool> {
        self.counted().rename_new(from, to)
    }
    fn link(&self, from: &Path, to: &Path) -> DiskResult<bool> {
        self.counted().link(from, to)
    }
    fn unlink(&self, path: &Path) -> DiskResult<bool> {
        self.counted().unlink(path)
    }
    fn create_dir(&self, path: &Path) -> DiskResult<bool> {
        self.counted().create_dir(path)
    }
    fn remove_dir(&self, path: &Path) -> DiskResult<bool> {
        self.counted().remove_dir(path)
    }
    fn sync_dir(&self, path: &Path) -> DiskResult<()> {
        self.counted().sync_dir(path)
    }
    fn list(&self, path: &Path) -> DiskResult<Vec<OsString>> {
        let mut detach = self.detach.lock().unwrap();
        if let Some([_, from, to]) = detach.take_if(|[at, ..]| at == path) {
            fs::rename(from, to).unwrap();
        }
        self.counted().list(path)
    }
    fn stat(&self, path: &Path) -> DiskResult<Option<Stat>> {
        self.counted().stat(path)
    }
    fn touch(&self, path: &Path) -> DiskResult<()> {
        self.counted().touch(path)
    }
    fn space(&self, path: &Path) -> DiskResult<Space> {
        self.counted().space(path)
    }
    fn writable(&self, path: &Path) -> bool {
        self.counted().writable(path)
    }
    fn boot_id(&self) -> DiskResult<[u8; 16]> {
        self.counted().boot_id()
    }
}

#[test]
fn what_is_adopted_is_known_when_the_tier_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let layer = Digest::of(b"layer");
    let bake = Bake::begin(&dir.path().join("tier"), &config(), &[]).unwrap();
    let made = layered("s3://b/i", b"in a layer", &layer);
    bake.store().record(&made).unwrap();
    let record = image("s3://b/i", &["base"]);
    bake.store().record_image(&record).unwrap();
    for blob in [layer, record.layers[0].blob] {
        bake.store().put_index(&blob, b"index").unwrap();
    }
    let id = made.objects[0].id;
    bake.store()
        .put(&[(id, Bytes::from_static(b"in a layer"))])
        .unwrap();
    bake.seal(&["s3://b/i".into()], None, false).unwrap();
    let store = over(dir.path(), &["tier"]);
    assert!(!store.has_adopted("s3://b/i").unwrap());
    for _ in 0..2 {
        store.adopt("s3://b/i").unwrap();
        assert!(store.has_adopted("s3://b/i").unwrap());
    }
    assert!(store.adopt("s3://b/none").unwrap_err().kind() == StoreErrorKind::NotFound);
    assert!(!store.has_itself(&Digest::of(b"in a layer")).unwrap());
    fs::rename(dir.path().join("tier"), dir.path().join("away")).unwrap();
    store.tiers();
    assert_eq!(store.image("s3://b/i").unwrap(), Some(record.clone()));
    assert_eq!(store.artifact("s3://b/i").unwrap().unwrap().1, made);
    assert_eq!(store.index(&layer).unwrap().unwrap(), b"index");
    let chain = record.chain_ids()[0];
    assert!(store.image_by_chain(&chain).unwrap().is_some());
    assert!(store.complete(&id).unwrap().is_none());
    // And goes like anything else.
    let all = CollectOptions {
        target_bytes: Some(0),
        dry_run: false,
    };
    assert_eq!(store.collect(&all).unwrap().evicted, ["s3://b/i"]);
}

#[test]
fn globs_find_what_is_a_tier() {
    let dir = tempfile::tempdir().unwrap();
    for (at, name) in ["a-2", "a-1", ".hidden", "b"].into_iter().enumerate() {
        let reference = format!("s3://b/{at}");
        bake(
            &dir.path().join("disks"),
            name,
            &[(&reference, &[name.as_bytes()])],
        );
    }
    let disks = dir.path().join("disks");
    fs::create_dir(disks.join("a-empty")).unwrap();
    fs::write(disks.join("a-file"), b"").unwrap();
    fs::create_dir(disks.join("a-torn")).unwrap();
    fs::write(disks.join("a-torn/hearth.json"), b"{").unwrap();
    let found = |tiers: &[TierConfig]| -> Vec<(String, String)> {
        let store = Store::open_with_tiers(&dir.path().join("store"), &config(), tiers).unwrap();
        let tiers = store.tiers().into_iter();
        let name = |path: &Path| path.strip_prefix(dir.path()).unwrap().display().to_string();
        tiers
            .map(|tier| (name(&tier.path), tier.problem.unwrap_or_default()))
            .collect()
    };
    let names = |tiers: &[TierConfig]| -> Vec<String> {
        found(tiers).into_iter().map(|(name, _)| name).collect()
    };
    let glob = |text: &str| TierConfig::at(dir.path().join(text));
    let shown = found(&[glob("disks/a-*")]);
    assert_eq!(shown[0].0, "disks/a-1");
    assert_eq!(shown[1].0, "disks/a-2");
    assert!(shown[2].1.contains("cannot be read"), "{shown:?}");
    assert_eq!(shown.len(), 3);
    assert_eq!(names(&[glob("d*/[b-c]")]), ["disks/b"]);
    assert_eq!(
        names(&[glob("disks/b"), glob("disks/{a-1,b}")]),
        ["disks/b", "disks/a-1"]
    );
    assert_eq!(names(&[glob("*")]), ["store"]);
    bake(dir.path(), "b[ac]{k}", &[("s3://b/k", &[b"k"])]);
    assert_eq!(
        found(&[glob("b[ac]{k}")]),
        [("b[ac]{k}".into(), String::new())]
    );
    let shown = found(&[glob("none/*")]);
    assert!(
        shown[0].0 == "none/*" && shown[0].1.contains("no disk"),
        "{shown:?}"
    );
    for at in 0..70 {
        let dir = disks.join(format!("c-{at}"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("hearth.json"), b"").unwrap();
    }
    let shown = found(&[glob("disks/c-*")]);
    assert!(
        shown[0].1.contains("70 directories, more than 64"),
        "{shown:?}"
    );
}
