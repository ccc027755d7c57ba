//! What containerd's way of asking for an image layer by layer costs its registry.

use hearth::{
    daemon::ImageRoots,
    fetch::{self, Engine},
    mount,
    node::Node,
    snapshotter::{Hints, Roots as _},
    store::{self, Store},
};

use super::*;

fn roots(dir: &std::path::Path, settings: &Settings) -> Arc<ImageRoots> {
    let config = store::Config {
        min_free: store::ByteSize(0),
        ..Default::default()
    };
    let store = Store::open(dir, &config).unwrap();
    let engine = Engine::new(store, fetch::Config::default());
    let node = Node::new(engine, Sources::new(settings.config()));
    ImageRoots::new(node, mount::Config::default(), None)
}

/// An image that cannot be read lazily is looked at once, not for each of its layers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_without_an_index_is_asked_for_once() {
    let mut held = Held::default();
    let layers: Vec<_> = (0..20).map(|n| data(1000 + n)).collect();
    let manifest = held.image("1", "amd64", &layers);
    let server = Scripted::start(move |seen| held.answer(seen)).await;
    let (dir, settings) = (tempfile::tempdir().unwrap(), Settings::new());
    let roots = roots(dir.path(), &settings);
    let hints = |image: &str, manifest: Option<Digest>| Hints {
        image: Some(format!("{}/team/{image}", server.address)),
        manifest,
        ..Hints::default()
    };
    let digest: Digest = manifest["digest"].as_str().unwrap().parse().unwrap();
    let mut asked = Vec::new();
    for layer in 0..20u8 {
        let (chain, hints) = (Digest::of(&[layer]), hints("app:1", Some(digest)));
        assert!(!roots.knows(&chain, &hints).await.unwrap());
        asked.push(server.take_log().len());
    }
    assert!(
        asked[0] > 0 && asked[1..].iter().all(|&n| n == 0),
        "{asked:?}"
    );
    // Another manifest is another image.
    let other = hints("app:1", Some(Digest::of(b"other")));
    assert!(!roots.knows(&Digest::of(b"x"), &other).await.unwrap());
    assert!(!server.take_log().is_empty());
    // So it is with one that cannot be asked for at all.
    for layer in 0..20u8 {
        let (chain, hints) = (Digest::of(&[layer]), hints("none:1", None));
        assert_eq!(roots.knows(&chain, &hints).await.is_err(), layer == 0);
    }
    let tags = targets(&server)
        .into_iter()
        .filter(|target| target.ends_with("/manifests/1"));
    assert_eq!(tags.count(), 1);
}

/// A registry that is briefly overloaded costs no image its lazy start, whatever it is asked first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_is_lazy_though_its_registry_refuses_each_request_once() {
    let content = data(20_000);
    let tar = super::removed::archive("file", &content);
    let frame = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
    let (header, rest) = tar.split_at(512);
    let mut layer = frame(header);
    let of_content = digest(&content);
    let table = json!({ "version": 1, "entries": [{
        "type": "reg", "name": "file", "mode": 0o644, "size": content.len(), "modtime": "1970-01-01T00:00:00Z",
        "digest": of_content, "chunkDigest": of_content, "offset": layer.len(),
    }] });
    layer.extend(frame(&rest[..content.len()]));
    layer.extend(frame(&rest[content.len()..]));
    let (plain, table) = (table.to_string(), frame(table.to_string().as_bytes()));
    layer.extend(b"\x50\x2a\x4d\x18");
    layer.extend((table.len() as u32).to_le_bytes());
    let position = format!("{}:{}:{}:1", layer.len(), table.len(), plain.len());
    layer.extend(&table);

    let mut held = Held::default();
    let chain = Digest::of(&tar);
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": [chain.to_string()] },
    });
    let mut config = held.blob(&serde_json::to_vec(&config).unwrap());
    config["mediaType"] = OCI_CONFIG.into();
    let mut layer = held.blob(&layer);
    layer["mediaType"] = "application/vnd.oci.image.layer.v1.tar+zstd".into();
    layer["annotations"] = json!({
        "io.github.containers.zstd-chunked.manifest-checksum": digest(&table),
        "io.github.containers.zstd-chunked.manifest-position": position,
    });
    let document = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [layer],
    });
    held.manifest("1", &document);
    let refused = std::sync::Mutex::new(std::collections::HashSet::new());
    let server = Scripted::start(move |seen| {
        let is_first = refused.lock().unwrap().insert(seen.target.clone());
        match is_first {
            true => Reply::new("503 Service Unavailable", ""),
            false => held.answer(seen),
        }
    })
    .await;
    let (dir, settings) = (tempfile::tempdir().unwrap(), Settings::new());
    let hints = Hints {
        image: Some(format!("{}/team/app:1", server.address)),
        ..Hints::default()
    };
    let roots = roots(dir.path(), &settings);
    assert!(roots.knows(&chain, &hints).await.unwrap());
}
