//! Redirects and mirrors.

use hearth::{fetch::Engine, metrics, mirror, node::Node, source::Asker, store::Store};

use super::*;

#[tokio::test]
async fn what_is_not_there_and_who_asks_too_often() {
    let server = Scripted::start(|seen| Held::default().answer(seen)).await;
    let reference = format!("oci://{}/team/app:v9", server.address);
    let source = Settings::new().open(&reference);
    let error = layered(&source, &reference).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    let wanted = format!("no tag v9 in repository team/app at {}", server.address);
    assert!(error.to_string().contains(&wanted), "{error}");
    server.now(|_| Reply::new("429 Too Many Requests\nretry-after: 7", ""));
    let error = layered(&source, &reference).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Throttled);
    assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
    server.now(|_| Reply::new("403 Forbidden", ""));
    let error = layered(&source, &reference).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
}

/// Blobs are redirected to signed URLs of another host, which stop working.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signed_redirects_are_remembered_and_renewed_without_the_token() {
    let mut held = Held::default();
    let layer = data(64 << 10);
    held.image("1", "amd64", std::slice::from_ref(&layer));
    let signature = Arc::new(AtomicUsize::new(1));
    let (now, content) = (Arc::clone(&signature), layer.clone());
    let storage = Scripted::start(move |seen| {
        let good = format!("/data?sig={}", now.load(Ordering::SeqCst));
        match seen.target == good {
            true => Reply::good(seen, &content, "\"s\""),
            false => Reply::new("403 Forbidden", ""),
        }
    })
    .await;
    let guarded = Guarded::new(held, 300);
    let (now, answers) = (Arc::clone(&signature), guarded.clone());
    let (blob, address) = (digest(&layer), storage.address);
    let redirected = blob.clone();
    let server = Scripted::start(move |seen| {
        let reply = answers.answer(seen);
        let is_in =
            seen.header("authorization").is_some() && !answers.expired.load(Ordering::SeqCst);
        match seen.path().ends_with(&redirected) && is_in {
            true => {
                let sig = now.load(Ordering::SeqCst);
                let to = format!("http://{address}/data?sig={sig}");
                Reply::new(&format!("307 Temporary Redirect\nlocation: {to}"), "")
            }
            false => reply,
        }
    })
    .await;
    let settings = Settings::new();
    let source = settings.open(&format!("oci://{}/team/app:1", server.address));
    let ranges = async || {
        let reads = (0..16_u64).map(|n| read(&source, &blob, n * 4096..(n + 1) * 4096));
        for (n, found) in join_all(reads).await.into_iter().enumerate() {
            assert_eq!(found.unwrap(), layer[n * 4096..(n + 1) * 4096]);
        }
    };
    ranges().await;
    let asked = targets(&server);
    assert!(asked.len() <= 4, "the redirect is remembered: {asked:?}");
    for seen in storage.take_log() {
        assert_eq!(
            seen.header("authorization"),
            None,
            "the token stays at the registry"
        );
    }
    // The signature ends, and so has the token meanwhile.
    signature.store(2, Ordering::SeqCst);
    guarded.expired.store(true, Ordering::SeqCst);
    ranges().await;
    assert_eq!(guarded.granted.load(Ordering::SeqCst), 2);
    let asked = targets(&server).len();
    assert!(asked <= 40, "{asked}");
    for seen in storage.take_log() {
        assert_eq!(seen.header("authorization"), None);
    }
}

#[tokio::test]
async fn mirrors_are_asked_in_order_and_the_registry_last() {
    let mut held = Held::default();
    let layer = data(1000);
    held.image("1", "amd64", std::slice::from_ref(&layer));
    let nothing = Scripted::start(|seen| Held::default().answer(seen)).await;
    let answers = held.clone();
    let mirror = Scripted::start(move |seen| answers.below("/prefix/team/app/", seen)).await;
    let answers = held.clone();
    let registry = Scripted::start(move |seen| answers.answer(seen)).await;
    let text = |capabilities: &str| {
        format!(
            r#"server = "http://{}"
        [host."http://{}"]
          capabilities = ["pull", "resolve"]
        [host."http://{}/prefix"]
          capabilities = {capabilities}
          override_path = true
          [host."http://{}/prefix".header]
            x-extra = "{SECRET}"
        "#,
            registry.address, nothing.address, mirror.address, mirror.address
        )
    };
    let both = r#"["pull", "resolve"]"#;
    let settings = Settings::new().hosts("reg.example_5000_", &text(both));
    let reference = "oci://reg.example:5000/team/app:1";
    let source = settings.open(reference);
    let found = layered(&source, reference).await.unwrap();
    assert_eq!(found.reference, reference);
    assert_eq!(
        targets(&nothing)[0],
        "/v2/team/app/manifests/1?ns=reg.example%3A5000"
    );
    let log = mirror.take_log();
    assert_eq!(
        log[0].target,
        "/prefix/team/app/manifests/1?ns=reg.example%3A5000"
    );
    assert_eq!(log[0].header("x-extra"), Some(SECRET));
    assert!(registry.take_log().is_empty());
    for n in 0..5 {
        read(&source, &digest(&layer), n..n + 1).await.unwrap();
    }
    assert_eq!(targets(&nothing).len(), 1, "for the layer it is asked once");
    assert!(!format!("{source:?}").contains(SECRET));

    // One that may not resolve tags is left out of that, but has the blobs.
    let settings = Settings::new().hosts("_default", &text(r#"["pull"]"#));
    let source = settings.open(reference);
    mirror.take_log();
    layered(&source, reference).await.unwrap();
    let asked = mirror.take_log();
    assert!(
        asked.iter().all(|seen| seen.path().contains("/blobs/")),
        "{asked:?}"
    );
    let log = registry.take_log();
    assert_eq!(
        log[0].target,
        "/v2/team/app/manifests/1?ns=reg.example%3A5000"
    );
    assert_eq!(log[0].header("x-extra"), None, "headers are for one host");
}

#[tokio::test]
async fn a_mirror_that_fails_is_left_out_for_a_while() {
    let mut held = Held::default();
    let layer = data(1000);
    held.image("1", "amd64", std::slice::from_ref(&layer));
    let mirror = Scripted::start(|_| Reply::new("500 Internal Server Error", "")).await;
    let answers = held.clone();
    let registry = Scripted::start(move |seen| answers.answer(seen)).await;
    let host = registry.address.to_string();
    let text = format!("[host.\"http://{}\"]", mirror.address);
    let name = host.replace(':', "_") + "_";
    let settings = Settings::new().hosts(&name, &text);
    let reference = format!("oci://{host}/team/app:1");
    let source = settings.open(&reference);
    layered(&source, &reference).await.unwrap();
    for n in 0..5 {
        read(&source, &digest(&layer), n..n + 1).await.unwrap();
    }
    assert_eq!(mirror.take_log().len(), 1);
    assert!(
        registry
            .take_log()
            .iter()
            .all(|seen| !seen.target.contains("ns="))
    );

    // What the registry has not may be at the mirror that is down: that passes.
    let gone = format!("oci://{host}/team/app:gone");
    let error = layered(&settings.open(&gone), &gone).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    let text = error.to_string();
    assert!(
        text.contains("404") && text.contains("mirror") && text.contains("500"),
        "{text}"
    );
}

/// An index is found under its tag, whatever a mirror that is down might have said of the list.
#[tokio::test]
async fn a_mirror_that_is_down_hides_nothing_that_is_attached() {
    const KIND: &str = "application/vnd.example";
    let mut held = Held::default();
    let image = held.image("1", "amd64", &[data(1000)]);
    let mut blob = held.blob(b"attached");
    blob["mediaType"] = "text/plain".into();
    let mut attached = held.manifest(
        "",
        &json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": KIND,
            "config": blob, "layers": [blob], "subject": image,
        }),
    );
    attached["artifactType"] = KIND.into();
    let subject = image["digest"].as_str().unwrap();
    let list = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [attached] });
    held.manifest(&subject.replace(':', "-"), &list);
    let mirror = Scripted::start(|_| Reply::new("503 Service Unavailable", "")).await;
    let registry = Scripted::start(move |seen| held.answer(seen)).await;
    let host = registry.address.to_string();
    let text = format!("[host.\"http://{}\"]", mirror.address);
    let settings = Settings::new().hosts(&(host.replace(':', "_") + "_"), &text);
    let source = settings.open(&format!("oci://{host}/team/app:1"));
    let subject = subject.parse().unwrap();
    let found = source.attached(&subject, KIND).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].blobs[0].blob, Digest::of(b"attached"));
    // Of what has none it is not known then.
    let error = source.attached(&Digest::of(b"other"), KIND).await;
    assert_eq!(error.unwrap_err().kind(), Kind::Unavailable);
}

#[tokio::test]
async fn a_mirror_with_other_bytes_does_not_stand_in_the_way() {
    let mut held = Held::default();
    let manifest = held.image("1", "amd64", &[data(1000)]);
    let wrong = Scripted::start(|seen| match seen.path().contains("sha256") {
        true => Reply::new("200 OK", "{\"schemaVersion\": 2}"),
        false => Reply::new("404 Not Found", ""),
    })
    .await;
    let registry = Scripted::start(move |seen| held.answer(seen)).await;
    let host = registry.address.to_string();
    let text = format!("[host.\"http://{}\"]", wrong.address);
    let settings = Settings::new().hosts("_default", &text);
    let digest = manifest["digest"].as_str().unwrap();
    let reference = format!("oci://{host}/team/app@{digest}");
    let source = settings.open(&reference);
    layered(&source, &reference).await.unwrap();
    assert_eq!(wrong.take_log().len(), 1, "then it is asked last");
}

#[tokio::test]
async fn credentials_of_a_registry_stay_away_from_its_mirror() {
    let mut held = Held::default();
    let layer = data(1000);
    held.image("1", "amd64", std::slice::from_ref(&layer));
    let guarded = Guarded::new(held, 300);
    let answers = guarded.clone();
    let registry = Scripted::start(move |seen| answers.answer(seen)).await;
    let mirror = Scripted::start(|seen| match seen.path() {
        "/token" => Reply::new(
            "200 OK",
            format!("{{\"token\": \"{SECRET}-of-the-mirror\"}}"),
        ),
        _ => {
            let host = seen.header("host").unwrap();
            let challenge = format!("Bearer realm=\"http://{host}/token\"");
            Reply::new(
                &format!("401 Unauthorized\nwww-authenticate: {challenge}"),
                "",
            )
        }
    })
    .await;
    let host = registry.address.to_string();
    let text = format!("[host.\"http://{}\"]", mirror.address);
    let name = host.replace(':', "_") + "_";
    let settings = Settings::new()
        .hosts(&name, &text)
        .login(&host, json!({ "username": "me", "password": SECRET }));
    let reference = format!("oci://{host}/team/app:1");
    layered(&settings.open(&reference), &reference)
        .await
        .unwrap();
    for seen in mirror.take_log() {
        let sent = seen.header("authorization").unwrap_or_default();
        assert!(!sent.contains("Basic") && !sent.ends_with("-1"), "{sent}");
    }
    assert_eq!(guarded.granted.load(Ordering::SeqCst), 1);
}

/// A mirror that is set up as its help says is also among the mirrors of the node that it serves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_does_not_ask_itself() {
    let mut held = Held::default();
    let layer = data(100_000);
    held.image("1", "amd64", std::slice::from_ref(&layer));
    let registry = Scripted::start(move |seen| held.answer(seen)).await;
    let host = registry.address.to_string();
    let reference = format!("oci://{host}/team/app:1");
    for told_where in [false, true] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let hosts = format!("server = \"http://{host}\"\n[host.\"http://{address}\"]\n");
        let settings = Settings::new().hosts(&(host.replace(':', "_") + "_"), &hosts);
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &Default::default()).unwrap();
        let config = Config {
            asker: Some(Asker {
                store: store.id().to_owned(),
                mirror: told_where.then_some(address),
            }),
            ..settings.config()
        };
        let sources = Sources::new(config);
        let node = Node::new(Engine::new(store, Default::default()), sources.clone());
        let serving = tokio::spawn(async move {
            let config = mirror::Config::default();
            mirror::serve(listener, node, &config, std::future::pending()).await
        });
        let counted = || {
            let metrics = metrics::global();
            (metrics.mirror_ok.get(), metrics.mirror_refused.get())
        };
        let before = counted();
        let all = async |source: &Arc<dyn Source>| {
            let found = layered(source, &reference).await.unwrap();
            let blob = found.layers[0].blob.to_string();
            read(source, &blob, 0..layer.len() as u64).await.unwrap()
        };
        // Another program on this node, which has the same hosts.
        let limit = Duration::from_secs(60);
        let asked = tokio::time::timeout(limit, async { all(&settings.open(&reference)).await });
        assert!(asked.await.expect("it asks itself") == layer);
        assert!(counted().0 > before.0);
        for seen in registry.take_log() {
            assert!(!seen.target.contains("ns="), "{seen:?}");
        }
        // The node, and whoever else works on its store.
        let before = counted();
        let source = sources.open(&reference.parse().unwrap()).unwrap();
        let asked = tokio::time::timeout(limit, async { all(&source).await });
        assert!(asked.await.expect("it asks itself") == layer);
        assert_eq!(counted().0, before.0, "of itself it takes nothing");
        if told_where {
            assert_eq!(counted(), before, "nor does it ask");
        }
        serving.abort();
    }
}
