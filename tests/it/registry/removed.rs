//! What another process removes between being resolved and being held.

use hearth::{
    fetch::Engine,
    node::{Node, Progress},
    store::{self, CollectOptions, Store, VerifyScope},
};

use super::*;
use crate::store::sim::SimDisk;

/// An archive of one file.
pub(super) fn archive(name: &str, content: &[u8]) -> Vec<u8> {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..107].copy_from_slice(b"0000644");
    block[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    block[156] = b'0';
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
    block[148..154].copy_from_slice(format!("{sum:06o}").as_bytes());
    let mut tar = [&block[..], content].concat();
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    tar
}

/// An image of one file, in a layer that is not compressed.
pub(super) fn plain_image(held: &mut Held, tag: &str, content: &[u8]) {
    let tar = archive("weights", content);
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": [digest(&tar)] },
    });
    let mut config = held.blob(&serde_json::to_vec(&config).unwrap());
    config["mediaType"] = OCI_CONFIG.into();
    let mut layer = held.blob(&tar);
    layer["mediaType"] = "application/vnd.oci.image.layer.v1.tar".into();
    let document = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [layer],
    });
    held.manifest(tag, &document);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_is_removed_before_it_is_held_is_resolved_again() {
    let content = data(200_000);
    let mut held = Held::default();
    plain_image(&mut held, "1", &content);
    let server = Scripted::start(move |seen| held.answer(seen)).await;
    let settings = Settings::new();
    let reference = format!("oci://{}/team/app:1?platform=linux/amd64", server.address);
    let reference: Reference = reference.parse().unwrap();
    let name = reference.to_string();

    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let options = store::Config {
        min_free: store::ByteSize(0),
        ..Default::default()
    };
    let disk = Arc::new(SimDisk::quick(1));
    let store = Store::open_on(disk.clone(), &root, &options).unwrap();
    let node = Node::new(
        Engine::new(store, Default::default()),
        Sources::new(settings.config()),
    );
    // When it is about to be held, another process removes it, and all that it consists of.
    let armed = Arc::new(AtomicBool::new(true));
    let is_armed = armed.clone();
    disk.before_each(move |_, what| {
        let holds = what.contains("/artifacts/") && what.ends_with(".lock");
        if !holds || !is_armed.swap(false, Ordering::SeqCst) {
            return;
        }
        let other = Store::open(&root, &options).unwrap();
        assert!(other.remove(&name).unwrap());
        other.collect(&CollectOptions::default()).unwrap();
        assert_eq!(other.usage().unwrap().bytes(), 0);
    });
    node.warm(&reference, None, &Progress::default())
        .await
        .unwrap();
    assert!(!armed.load(Ordering::SeqCst));
    assert!(node.store().remove(&reference.to_string()).unwrap());
    armed.store(true, Ordering::SeqCst);
    let (resolved, hold) = node.resolve_held(&reference).await.unwrap();
    assert!(!armed.load(Ordering::SeqCst));
    // And from then on it stays.
    let options = CollectOptions {
        target_bytes: Some(0),
        dry_run: false,
    };
    node.store().collect(&options).unwrap();
    assert!(node.is_complete(&resolved.artifact).unwrap());
    drop(hold);
    let report = node.store().verify(VerifyScope::All, false, |_| true);
    assert_eq!(report.unwrap().damaged.len(), 0);
}
