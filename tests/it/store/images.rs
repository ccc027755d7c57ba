//! Indexes of layers and records of images.

use std::{fs, path::PathBuf, time::UNIX_EPOCH};

use super::*;
use hearth::store::{
    CollectOptions, ImageLayer, ImageRecord, MAX_INDEX, StoreErrorKind, VerifyScope,
};

/// An image over layers with these names.
pub(super) fn image(reference: &str, layers: &[&str]) -> ImageRecord {
    let layers = layers.iter().map(|name| ImageLayer {
        blob: Digest::of(format!("blob {name}").as_bytes()),
        size: name.len() as u64,
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
        diff_id: Digest::of(name.as_bytes()),
    });
    ImageRecord {
        reference: reference.into(),
        manifest: Digest::of(format!("manifest {reference}").as_bytes()),
        index: Some(Digest::of(format!("index {reference}").as_bytes())),
        config: Digest::of(format!("config {reference}").as_bytes()),
        platform: "linux/amd64".into(),
        layers: layers.collect(),
        made: UNIX_EPOCH + std::time::Duration::from_millis(1_700_000_000_123),
    }
}

/// An artifact whose file lies in `layer`.
pub(super) fn layered(reference: &str, bytes: &[u8], layer: &Digest) -> Artifact {
    let mut artifact = artifact(reference, &[bytes], false);
    let Recipe::Raw(location) = &mut artifact.objects[0].recipe else {
        unreachable!()
    };
    location.path = format!("{layer}#gzip");
    artifact
}

fn image_path(store: &Store, reference: &str) -> PathBuf {
    let name = Digest::of(reference.as_bytes()).hex();
    store.root().join(format!("images/{name}.json"))
}

#[test]
fn an_index_is_stored_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let layer = Digest::of(b"layer");
    assert_eq!(store.index(&layer).unwrap(), None);
    assert!(!store.remove_index(&layer).unwrap());
    for bytes in [&b""[..], b"one", &content(1, 3 * MIB)] {
        store.put_index(&layer, bytes).unwrap();
        assert_eq!(store.index(&layer).unwrap().unwrap(), bytes);
    }
    let long = vec![0; MAX_INDEX as usize + 1];
    let error = store.put_index(&layer, &long).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Invalid);
    assert!(error.to_string().contains(&layer.to_string()), "{error}");
    store.put_index(&layer, b"short").unwrap();
    let path = store.root().join("indexes").join(layer.hex());
    let good = fs::read(&path).unwrap();
    // Not that of another layer.
    let other = Digest::of(b"other");
    fs::copy(&path, path.with_file_name(other.hex())).unwrap();
    assert_eq!(store.index(&other).unwrap(), None);
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(&path, &bad).unwrap();
        assert_eq!(store.index(&layer).unwrap(), None, "byte {at}");
        fs::write(&path, &good[..at]).unwrap();
        assert_eq!(store.index(&layer).unwrap(), None, "length {at}");
    }
    let report = store.verify(VerifyScope::All, true, |_| true).unwrap();
    assert_eq!(report.damaged.len(), 2);
    assert!(!path.exists());
    store.put_index(&layer, b"short").unwrap();
    assert!(store.remove_index(&layer).unwrap());
}

#[test]
fn images_are_found_by_reference_and_by_chain() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (one, two) = (
        image("oci://r/one:1", &["base", "python", "one"]),
        image("oci://r/two:1", &["base", "python", "two"]),
    );
    let error = store.record_image(&one).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::NotFound);
    assert!(error.to_string().contains("oci://r/one:1"), "{error}");
    for image in [&one, &two] {
        let artifact = artifact(&image.reference, &[b"x"], false);
        store.record(&artifact).unwrap();
        store.record_image(image).unwrap();
        store.record_image(image).unwrap();
    }
    assert_eq!(store.image("oci://r/one:1").unwrap().unwrap(), one);
    assert_eq!(store.image("oci://r/none:1").unwrap(), None);
    assert_eq!(store.images().unwrap(), [one.clone(), two.clone()]);
    let chains = one.chain_ids();
    assert_eq!(chains[0], Digest::of(b"base"));
    // OCI image-spec, config.md: sha256 over "ChainID(below) DiffID(layer)".
    let text = format!("{} {}", chains[0], Digest::of(b"python"));
    assert_eq!(chains[1], Digest::of(text.as_bytes()));
    assert_eq!(store.image_by_chain(&chains[0]).unwrap().unwrap().1, 1);
    assert_eq!(
        store.image_by_chain(&chains[2]).unwrap(),
        Some((one.clone(), 3))
    );
    assert_eq!(store.image_by_chain(&Digest::of(b"python")).unwrap(), None);
    // One of the two goes: what they share is found by the other, at once and after a collection.
    for removed in ["oci://r/two:1", "oci://r/one:1"] {
        let shared = store.image_by_chain(&chains[1]).unwrap();
        assert_eq!(shared.unwrap().1, 2);
        assert!(store.remove(removed).unwrap());
        assert_eq!(store.image(removed).unwrap(), None);
        let shared = store.image_by_chain(&chains[1]).unwrap();
        assert_eq!(shared.is_some(), removed == "oci://r/two:1");
        store.collect(&CollectOptions::default()).unwrap();
        let after = store.image_by_chain(&chains[1]).unwrap();
        assert_eq!(after, shared);
    }
    let left = fs::read_dir(store.root().join("chains")).unwrap();
    assert_eq!(left.count(), 0);
    assert_eq!(store.images().unwrap(), []);
}

#[test]
fn very_many_images_of_one_base_are_fine() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let images: Vec<_> = (0..20)
        .map(|n| image(&format!("oci://r/{n:02}:1"), &["base", &n.to_string()]))
        .collect();
    for image in &images {
        store
            .record(&artifact(&image.reference, &[b"x"], false))
            .unwrap();
        store.record_image(image).unwrap();
    }
    // The file names sixteen of them; a collection finds the others again.
    for image in &images[1..] {
        store.remove(&image.reference).unwrap();
    }
    store.collect(&CollectOptions::default()).unwrap();
    let found = store.image_by_chain(&Digest::of(b"base")).unwrap();
    assert_eq!(found, Some((images[0].clone(), 1)));
}

#[test]
fn a_damaged_image_record_counts_as_absent() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let image = image("oci://r/one:1", &["base"]);
    let record = artifact(&image.reference, &[b"x"], false);
    store.record(&record).unwrap();
    store.record_image(&image).unwrap();
    let path = image_path(&store, &image.reference);
    let good = fs::read(&path).unwrap();
    let chain = image.chain_ids()[0];
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(&path, &bad).unwrap();
        assert_eq!(store.image(&image.reference).unwrap(), None, "byte {at}");
        assert_eq!(store.image_by_chain(&chain).unwrap(), None);
    }
    // A good record under the name of another.
    let other = image_path(&store, "oci://r/other:1");
    fs::write(&other, &good).unwrap();
    assert_eq!(store.images().unwrap(), []);
    let report = store.verify(VerifyScope::All, true, |_| true).unwrap();
    assert_eq!(report.damaged.len(), 2);
    assert!(!path.exists() && !other.exists());
    store.record_image(&image).unwrap();
    let references = [image.reference.clone()];
    fs::write(&path, b"{}").unwrap();
    let scope = VerifyScope::References(&references);
    let report = store.verify(scope, true, |_| true).unwrap();
    assert_eq!(report.damaged.len(), 1);
    // Chain files say what they like: the image decides.
    store.record_image(&image).unwrap();
    let chains = store.root().join("chains");
    fs::write(chains.join(chain.hex()), "nonsense\n").unwrap();
    assert_eq!(store.image_by_chain(&chain).unwrap(), None);
    let own = Digest::of(image.reference.as_bytes()).hex();
    let wrong = Digest::of(b"wrong");
    fs::write(chains.join(wrong.hex()), own + "\n").unwrap();
    assert_eq!(store.image_by_chain(&wrong).unwrap(), None);
    store.collect(&CollectOptions::default()).unwrap();
    assert!(store.image_by_chain(&chain).unwrap().is_some());
    assert!(!chains.join(wrong.hex()).exists());
}

#[test]
fn indexes_and_documents_live_as_long_as_their_artifacts() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let layers = ["a", "b", "c", "d"].map(|name| Digest::of(format!("blob {name}").as_bytes()));
    for layer in &layers {
        store.put_index(layer, b"index").unwrap();
    }
    // `a` by its files, `b` by the image alone (no file lies in it), `c` by the other artifact.
    let one = image("oci://r/one:1", &["a", "b"]);
    for (reference, seed, layer) in [("oci://r/one:1", 1, 0), ("oci://r/two:1", 2, 2)] {
        let bytes = content(seed, 9000);
        let artifact = layered(reference, &bytes, &layers[layer]);
        store.record(&artifact).unwrap();
        store
            .put(&[(artifact.objects[0].id, bytes.into())])
            .unwrap();
    }
    store.record_image(&one).unwrap();
    let documents = [&one.manifest, &one.config];
    let texts = ["manifest oci://r/one:1", "config oci://r/one:1"];
    for (digest, text) in documents.iter().zip(texts) {
        let id = ObjectId::Sha256(**digest);
        store.put(&[(id, text.into())]).unwrap();
    }
    let here = || layers.map(|layer| store.index(&layer).unwrap().is_some());
    store.collect(&CollectOptions::default()).unwrap();
    assert_eq!(here(), [true, true, true, false]);
    assert!(store.has(&one.manifest).unwrap() && store.has(&one.config).unwrap());
    // Held, a generation keeps its indexes though the reference is gone.
    let hold = store.hold("oci://r/two:1").unwrap();
    store.remove_forced("oci://r/two:1").unwrap();
    store.collect(&CollectOptions::default()).unwrap();
    assert_eq!(here(), [true, true, true, false]);
    drop(hold);
    store.collect(&CollectOptions::default()).unwrap();
    assert_eq!(here(), [true, true, false, false]);
    let all = CollectOptions {
        target_bytes: Some(0),
        dry_run: false,
    };
    let report = store.collect(&all).unwrap();
    assert_eq!(report.evicted, ["oci://r/one:1"]);
    assert_eq!(here(), [false; 4]);
    let usage = store.usage().unwrap();
    assert_eq!((usage.bytes(), store.images().unwrap().len()), (0, 0));
}

#[test]
fn a_chain_is_of_the_image_that_ends_with_it_whoever_stands_on_that() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let images = [
        image("oci://r/first", &["base", "middle", "first"]),
        image("oci://r/base", &["base", "middle"]),
        image("oci://r/last", &["base", "middle", "last"]),
    ];
    let [low, chain] = <[Digest; 2]>::try_from(images[1].chain_ids()).unwrap();
    for (image, expected) in images.iter().zip(["first", "base", "base"]) {
        store
            .record(&artifact(&image.reference, &[b"x"], false))
            .unwrap();
        store.record_image(image).unwrap();
        let (found, count) = store.image_by_chain(&chain).unwrap().unwrap();
        assert_eq!(
            (&*found.reference, count),
            (&*format!("oci://r/{expected}"), 2)
        );
    }
    assert_eq!(store.image_by_chain(&low).unwrap().unwrap().1, 1);
    // However many there are.
    for n in 0..40 {
        let image = image(
            &format!("oci://r/{n}"),
            &["base", "middle", &format!("{n}")],
        );
        store
            .record(&artifact(&image.reference, &[b"x"], false))
            .unwrap();
        store.record_image(&image).unwrap();
    }
    let (found, _) = store.image_by_chain(&chain).unwrap().unwrap();
    assert_eq!(found.reference, "oci://r/base");
}
