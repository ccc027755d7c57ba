//! Seeded bit flips in everything that the store keeps: none is taken for content, each is reported
//! by name, and what was lost comes back by storing it again.

use std::{collections::BTreeMap, fs, path::PathBuf};

use super::{
    images::{image, layered},
    sim::SimDisk,
    *,
};
use hearth::store::{ImageRecord, StoreErrorKind, VerifyScope, hash_file};

/// A small seeded generator (xorshift64).
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n
    }
}

/// Flips one bit of a file; says which.
fn flip(path: &std::path::Path, rng: &mut Rng) -> String {
    let mut bytes = fs::read(path).unwrap();
    let bit = rng.below(bytes.len() * 8);
    bytes[bit / 8] ^= 1 << (bit % 8);
    // As a disk does it: in place, though nobody may write it.
    fs::write(path, &bytes).unwrap();
    format!("bit {bit} of {}", path.display())
}

/// What is in the store.
struct Goods {
    artifacts: Vec<(Artifact, Vec<Vec<u8>>)>,
    image: ImageRecord,
    index: Vec<u8>,
    large: Vec<u8>,
    large_id: ObjectId,
}

/// Files, by what hides what: a damaged record hides its tree.
type Groups = BTreeMap<String, Vec<PathBuf>>;

impl Goods {
    fn new() -> Self {
        let contents = |seed: u64| -> Vec<Vec<u8>> {
            (0..3)
                .map(|at| content(seed + at, 200 + 977 * at as usize))
                .collect()
        };
        let made = |name: &str, seed, located| {
            let contents = contents(seed);
            let parts: Vec<&[u8]> = contents.iter().map(Vec::as_slice).collect();
            (artifact(name, &parts, located), contents)
        };
        let image = image("oci://r/one:1", &["base", "top"]);
        let own = content(90, 3000);
        let layer = layered("oci://r/one:1", &own, &image.layers[1].blob);
        let large = content(99, MIB + 77);
        Self {
            artifacts: vec![
                made("hf://a/b", 50, false),
                made("s3://c/", 60, true),
                (layer, vec![own]),
            ],
            image,
            index: content(91, 700),
            large_id: ObjectId::located("large", "1", large.len() as u64),
            large,
        }
    }

    /// Stores what is not there.
    fn store(&self, store: &Arc<Store>) {
        for (artifact, contents) in &self.artifacts {
            store.record(artifact).unwrap();
            let batch = artifact.objects.iter().zip(contents);
            let batch: Vec<_> = batch.map(|(o, b)| (o.id, b.clone().into())).collect();
            store.put(&batch).unwrap();
        }
        for layer in &self.image.layers {
            if store.index(&layer.blob).unwrap().is_none() {
                store.put_index(&layer.blob, &self.index).unwrap();
            }
        }
        if store.image(&self.image.reference).unwrap().is_none() {
            store.record_image(&self.image).unwrap();
        }
        if store.pins("hf://a/b").unwrap().is_empty() {
            store.pin("hf://a/b", "test").unwrap();
        }
        let partial = store
            .partial(&self.large_id, self.large.len() as u64)
            .unwrap();
        while let Some(mut lease) = partial.claim(0..1).unwrap() {
            let at = lease.chunks().start;
            drop(lease.split_off(at + 1));
            lease
                .commit(at, chunk_of(&self.large, at), WriteMode::Cached)
                .unwrap();
        }
        partial.checkpoint().unwrap();
    }

    fn groups(&self, store: &Store) -> Groups {
        let root = store.root();
        let mut groups = Groups::new();
        let mut add = |group: String, path: PathBuf| {
            assert!(path.exists(), "{}", path.display());
            groups.entry(group).or_default().push(path);
        };
        for (artifact, contents) in &self.artifacts {
            let name = Digest::of(artifact.reference.as_bytes()).hex();
            let group = || format!("record {}", artifact.reference);
            add(group(), root.join(format!("artifacts/{name}.json")));
            add(group(), root.join("trees").join(artifact.digest().hex()));
            for (object, content) in artifact.objects.iter().zip(contents) {
                let hex = Digest::of(content).hex();
                let path = root.join("objects/sha256").join(&hex[..2]).join(&hex);
                add(format!("object {hex}"), path);
                if let ObjectId::Located(key) = object.id {
                    let path = root.join("located").join(&key.hex()[..2]).join(key.hex());
                    add(format!("object {hex}"), path);
                }
            }
        }
        let name = Digest::of(self.image.reference.as_bytes()).hex();
        add(
            format!("record {}", self.image.reference),
            root.join(format!("images/{name}.json")),
        );
        for (layer, chain) in self.image.layers.iter().zip(self.image.chain_ids()) {
            add(
                format!("index {}", layer.blob),
                root.join("indexes").join(layer.blob.hex()),
            );
            add(
                format!("chain {chain}"),
                root.join("chains").join(chain.hex()),
            );
        }
        let pinned = Digest::of(b"hf://a/b").hex();
        add("pin".into(), root.join(format!("pins/{pinned}/test")));
        let stem = self.large_id.to_string().replace(':', "-");
        add("map".into(), root.join(format!("partial/{stem}.map")));
        groups
    }

    /// Nothing is taken for what it is not; what of it is there.
    fn check(&self, store: &Arc<Store>, case: &str) -> usize {
        let mut there = 0;
        for (artifact, contents) in &self.artifacts {
            let found = store.artifact(&artifact.reference).unwrap();
            there += usize::from(found.is_some());
            assert!(found.is_none_or(|(_, found)| found == *artifact), "{case}");
            for (object, right) in artifact.objects.iter().zip(contents) {
                let Some(complete) = store.complete(&object.id).unwrap() else {
                    continue;
                };
                let found = hash_file(complete.file(), |_| true).unwrap();
                let good = found == Some(Digest::of(right));
                // An object that the disk has damaged is found by its digest: before `verify` has
                // looked, that is what tells.
                assert!(good || complete.digest == Digest::of(right), "{case}");
                there += usize::from(good);
            }
        }
        let image = store.image(&self.image.reference).unwrap();
        there += usize::from(image.is_some());
        assert!(image.is_none_or(|found| found == self.image), "{case}");
        for (at, chain) in self.image.chain_ids().iter().enumerate() {
            let found = store.image_by_chain(chain).unwrap();
            there += usize::from(found.is_some());
            assert!(
                found.is_none_or(|f| f == (self.image.clone(), at + 1)),
                "{case}"
            );
            let index = store.index(&self.image.layers[at].blob).unwrap();
            there += usize::from(index.is_some());
            assert!(index.is_none_or(|found| found == self.index), "{case}");
        }
        assert_eq!(store.pins("hf://a/b").unwrap(), ["test"], "{case}");
        let partial = store
            .partial(&self.large_id, self.large.len() as u64)
            .unwrap();
        for at in (0..partial.chunks()).filter(|at| partial.present(*at)) {
            there += 1;
            let mut found = vec![0; chunk_of(&self.large, at).len()];
            partial.read_at(&mut found, at * CHUNK_SIZE).unwrap();
            assert!(found == chunk_of(&self.large, at), "{case}: chunk {at}");
        }
        there
    }
}

/// What a flip in a file of this kind does, where `verify` need not name it.
fn may_be_silent(path: &std::path::Path) -> bool {
    let path = path.to_str().unwrap();
    // A hint that the image confirms or not; a mark whose content means nothing; and some bits of a
    // zstd frame mean nothing.
    ["/chains/", "/pins/", "/trees/"]
        .iter()
        .any(|dir| path.contains(dir))
}

#[test]
fn flipped_bits_in_the_store_are_found_named_and_mended() {
    let goods = Goods::new();
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let mut rng = Rng::new(4);
    let mut flips = 0;
    for pass in 0u64.. {
        if flips >= 7600 {
            break;
        }
        // Another boot each time: the live maps of the last one count for nothing.
        let open = || {
            let disk = Arc::new(SimDisk::quick((pass % 200) as u8 + 1));
            Store::open_on(disk, &root, &config()).unwrap()
        };
        let store = open();
        goods.store(&store);
        let whole = goods.check(&store, "before");
        let groups = goods.groups(&store);
        drop(store);
        // One flip in each of most groups.
        let mut flipped = Vec::new();
        for files in groups.into_values() {
            if rng.below(8) > 0 {
                let path = files[rng.below(files.len())].clone();
                flipped.push((flip(&path, &mut rng), path));
            }
        }
        flips += flipped.len();
        let what: Vec<&str> = flipped.iter().map(|(what, _)| what.as_str()).collect();
        let case = format!("pass {pass}: {what:#?}");
        let disk = Arc::new(SimDisk::quick((pass % 200) as u8 + 51));
        let store = Store::open_on(disk, &root, &config()).unwrap();
        goods.check(&store, &case);
        let report = store.verify(VerifyScope::All, true, |_| true).unwrap();
        for (what, path) in &flipped {
            let named = report.damaged.iter().any(|d| d.path == *path && d.removed);
            assert!(
                named || may_be_silent(path),
                "{what} was not found in pass {pass}"
            );
            assert!(
                // The tree says what a record was.
                !named || !path.exists() || path.parent() == Some(&root.join("artifacts")),
                "{what} was not removed in pass {pass}"
            );
        }
        for damage in &report.damaged {
            let flipped = flipped.iter().any(|(_, path)| *path == damage.path);
            assert!(
                flipped,
                "{}: {}, in {case}",
                damage.path.display(),
                damage.what
            );
        }
        goods.check(&store, &case);
        store.collect(&Default::default()).unwrap();
        goods.store(&store);
        assert_eq!(goods.check(&store, &case), whole, "{case}");
        let report = store.verify(VerifyScope::All, false, |_| true).unwrap();
        assert_eq!(report.damaged, [], "{case}");
    }
}

#[test]
fn a_flipped_bit_in_the_marker_is_refused_by_name_or_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let path = store.root().join("hearth.json");
    let good = fs::read(&path).unwrap();
    let id = store.id().to_owned();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bad).unwrap();
        match Store::open(store.root(), &config()) {
            // Another id in its place says nothing of any content.
            Ok(found) => assert!(
                found.id() != id || bad.trim_ascii() == good.trim_ascii(),
                "{bit}"
            ),
            Err(error) => {
                let kinds = [StoreErrorKind::Damaged, StoreErrorKind::NewerFormat];
                assert!(kinds.contains(&error.kind()), "{bit}: {error}");
                assert!(
                    error.to_string().contains(store.root().to_str().unwrap()),
                    "{error}"
                );
            }
        }
    }
    // As the error says: made anew, with all that is there.
    let bytes = content(1, 100);
    let id = ObjectId::Sha256(Digest::of(&bytes));
    store.put(&[(id, bytes.into())]).unwrap();
    fs::write(&path, "{").unwrap();
    let error = Store::open(store.root(), &config())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("hearth.json") && error.contains("remove that file"),
        "{error}"
    );
    fs::remove_file(&path).unwrap();
    assert!(open(dir.path()).complete(&id).unwrap().is_some());
}
