//! Buckets of S3: listings, keys, credentials, certificates, proxies.

use hearth::{
    reference::Secret,
    source::{AwsKeys, Credentials, Keys},
};

use super::*;

#[test]
fn s3_conforms() {
    let server = servers::moto(false);
    let store = s3(&server);
    run(conformance(&store));
}

#[test]
fn s3_lists_many_pages_and_knows_directory_markers() {
    let server = servers::moto(false);
    let store = s3(&server);
    for key in ["m/", "m/sub/", "m/hollow/", "m/sub/deeper/", "m/full/"] {
        assert!(raw(&server, "PUT", &format!("/bucket/{key}"), "").starts_with("HTTP/1.1 200"));
    }
    run(async {
        stream::iter(0..1_105)
            .for_each_concurrent(16, |n| {
                let key = Key::from(format!("m/sub/deeper/{n:05}"));
                let store = &store.store;
                async move { drop(store.put(&key, PutPayload::from("x")).await.unwrap()) }
            })
            .await;
        for key in ["m/sub/empty", "m/full/file"] {
            store
                .store
                .put(&Key::from(key), PutPayload::new())
                .await
                .unwrap();
        }
        let sources = Sources::new(Config::default());
        let (_, artifact) = resolve(&sources, "s3://bucket/m/").await.unwrap();
        let files = artifact.tree.files();
        assert_eq!(files.len(), 1_107);
        assert!(files.iter().any(|f| f.0 == "sub/empty"));
        assert!(files.iter().all(|f| f.0 != "hollow" && f.0 != "full"));
        // Without its slash it is no key, so it is a prefix.
        let (_, same) = resolve(&sources, "s3://bucket/m").await.unwrap();
        assert_eq!(same.objects, artifact.objects);
        let few: Config = toml::from_str("max_entries = 1000").unwrap();
        let error = resolve(&Sources::new(few), "s3://bucket/m/")
            .await
            .unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::Invalid);
        assert!(
            error.to_string().contains("more than 1000 files"),
            "{error}"
        );
    });
}

#[test]
fn s3_refuses_keys_that_are_no_file_names() {
    let server = servers::moto(false);
    let _store = s3(&server);
    run(async {
        let sources = Sources::new(Config::default());
        for key in ["up/../../etc/passwd", "slashes//file", "dot/./file"] {
            let (directory, _) = key.split_once('/').unwrap();
            let put = raw(&server, "PUT", &format!("/bucket/{key}"), "x");
            assert!(put.starts_with("HTTP/1.1 200"), "{put}");
            let error = resolve(&sources, &format!("s3://bucket/{directory}/"))
                .await
                .unwrap_err();
            assert_eq!(error.kind(), SourceErrorKind::Invalid, "{key}: {error}");
            assert!(error.to_string().contains(key), "{error}");
        }
        let long = "n".repeat(300);
        raw(&server, "PUT", &format!("/bucket/long/{long}"), "x");
        let error = resolve(&sources, "s3://bucket/long/").await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::Invalid);
        assert!(error.to_string().contains("nnnn"), "{error}");
    });
}

#[test]
fn s3_denies_wrong_credentials_and_shows_none() {
    let server = servers::moto(true);
    set_env(&[
        ("AWS_ENDPOINT_URL", server.url().as_str()),
        ("AWS_ACCESS_KEY_ID", "AKIDOFTHETEST"),
        ("AWS_SECRET_ACCESS_KEY", "secret-of-the-test"),
        ("AWS_REGION", "us-east-1"),
    ]);
    run(async {
        let sources = Sources::new(Config::default());
        for reference in ["s3://bucket/m/", "s3://bucket/key"] {
            let error = resolve(&sources, reference).await.unwrap_err();
            assert_eq!(error.kind(), SourceErrorKind::Denied, "{error}");
            let text = format!("{error} {error:?}");
            assert!(
                !text.contains("AKIDOFTHETEST") && !text.contains("secret-of"),
                "{text}"
            );
            assert!(
                text.contains("s3://bucket/") && text.contains("127.0.0.1"),
                "{text}"
            );
        }
    });
}

#[test]
fn s3_without_credentials_says_so() {
    set_env(&[
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("HOME", "/nonexistent"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9"),
    ]);
    let sources = Sources::new(Config::default());
    let error = sources.open(&"s3://bucket/x".parse().unwrap()).unwrap_err();
    assert_eq!(error.kind(), SourceErrorKind::Denied);
    assert!(error.hint().unwrap().contains("AWS_ACCESS_KEY_ID"));
}

#[test]
fn s3_reads_keys_from_profile_files() {
    let server = servers::moto(false);
    let home = tempfile::tempdir().unwrap();
    fs::create_dir(home.path().join(".aws")).unwrap();
    let write =
        |name: &str, text: &str| fs::write(home.path().join(".aws").join(name), text).unwrap();
    write(
        "credentials",
        "[work]\naws_access_key_id = test\naws_secret_access_key = x\n",
    );
    write(
        "config",
        &format!(
            "[profile work]\nregion = us-east-1\nendpoint_url = {}\n",
            server.url()
        ),
    );
    set_env(&[
        ("HOME", home.path().to_str().unwrap()),
        ("AWS_PROFILE", "work"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ]);
    raw(&server, "PUT", "/bucket", "");
    raw(&server, "PUT", "/bucket/key", "content");
    run(async {
        let sources = Sources::new(Config::default());
        let (source, artifact) = resolve(&sources, "s3://bucket/key").await.unwrap();
        let (location, size) = locate(&artifact, "key");
        assert_eq!(read(&source, &location, 0..size).await.unwrap(), b"content");
    });
}

#[test]
fn a_server_that_is_not_there_is_unavailable() {
    let port = servers::free_port();
    set_env(&[
        ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
        ("AWS_ACCESS_KEY_ID", "test".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "secret-of-the-test".to_owned()),
    ]);
    run(async {
        let error = resolve(&Sources::new(Config::default()), "s3://bucket/x/")
            .await
            .unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::Unavailable);
        assert!(error.to_string().contains("Connection refused"), "{error}");
    });
}

/// An S3 server behind TLS, with an object, and the certificate of its authority.
fn s3_with_tls() -> (Server, PathBuf) {
    let server = servers::moto_with_tls();
    let authority = server.dir.path().join("ca.pem");
    set_env(&[
        (
            "AWS_ENDPOINT_URL",
            format!("https://localhost:{}", server.port).as_str(),
        ),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "secret-of-the-test"),
    ]);
    (server, authority)
}

/// The bucket is not there: the server has answered, so it was trusted.
async fn reaches_the_server() {
    let error = resolve(&Sources::new(Config::default()), "s3://none/x/")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), SourceErrorKind::NotFound, "{error}");
    assert!(error.to_string().contains("NoSuchBucket"), "{error}");
}

#[test]
fn a_server_with_an_unknown_certificate_is_not_trusted() {
    let (_server, _) = s3_with_tls();
    run(async {
        let error = resolve(&Sources::new(Config::default()), "s3://none/x/")
            .await
            .unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::Unavailable);
        assert!(error.to_string().contains("UnknownIssuer"), "{error}");
        assert!(error.hint().unwrap().contains("SSL_CERT_FILE"));
    });
}

#[test]
fn aws_ca_bundle_is_trusted() {
    let (_server, authority) = s3_with_tls();
    set_env(&[("AWS_CA_BUNDLE", authority.to_str().unwrap())]);
    run(reaches_the_server());
}

#[test]
fn ssl_cert_file_is_trusted() {
    let (_server, authority) = s3_with_tls();
    set_env(&[("SSL_CERT_FILE", authority.to_str().unwrap())]);
    run(reaches_the_server());
}

#[test]
fn proxies_of_the_environment_are_used() {
    let server = servers::moto(false);
    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    set_env(&[
        (
            "http_proxy",
            format!("http://user:SECRET@{}", proxy.local_addr().unwrap()).as_str(),
        ),
        ("NO_PROXY", "127.0.0.1"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "secret-of-the-test"),
        ("AWS_ENDPOINT_URL", "http://s3.example.test"),
    ]);
    let through = Sources::new(Config::default());
    let reference = "s3://none/x/".parse().unwrap();
    let proxied = through.open(&reference).unwrap();
    set_env(&[("AWS_ENDPOINT_URL", server.url())]);
    let direct = Sources::new(Config::default()).open(&reference).unwrap();
    let asked = std::thread::spawn(move || {
        let (mut stream, _) = proxy.accept().unwrap();
        let mut head = [0; 4096];
        let length = stream.read(&mut head).unwrap();
        let answer = "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        stream.write_all(answer.as_bytes()).unwrap();
        String::from_utf8_lossy(&head[..length]).into_owned()
    });
    run(async {
        let error = proxied.resolve(&reference).await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::Unavailable);
        assert!(!format!("{error:?}").contains("SECRET"));
        let head = asked.join().unwrap();
        assert!(
            head.starts_with("GET http://s3.example.test/none?"),
            "{head}"
        );
        assert!(
            head.to_ascii_lowercase().contains("proxy-authorization"),
            "{head}"
        );
        let error = direct.resolve(&reference).await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::NotFound, "{error}");
    });
}

/// Keys of a request go before those of the node, and newer ones before older.
#[test]
fn s3_uses_keys_that_come_with_a_request() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    set_env(&[
        ("AWS_ENDPOINT_URL", url.as_str()),
        ("AWS_ACCESS_KEY_ID", "NODE"),
        ("AWS_SECRET_ACCESS_KEY", "secret-of-the-node"),
        ("AWS_SESSION_TOKEN", "session-of-the-node"),
        ("AWS_REGION", "us-east-1"),
    ]);
    let (tell, heads) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = Vec::new();
            let mut part = [0; 4096];
            while !head.windows(4).any(|w| w == b"\r\n\r\n") {
                let read = stream.read(&mut part).unwrap();
                assert_ne!(read, 0);
                head.extend_from_slice(&part[..read]);
            }
            let answer = "HTTP/1.1 403 Forbidden\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
            // Before the answer: who has that looks at what was asked.
            tell.send(String::from_utf8(head).unwrap()).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    let keys = |id: &str, token: Option<&str>| Keys {
        aws: Some(AwsKeys {
            access_key_id: Secret::new(id),
            secret_access_key: Secret::new("geheim"),
            session_token: token.map(Secret::new),
        }),
        ..Keys::default()
    };
    let credentials = Credentials::new(keys("FIRST", None));
    let sources = Sources::new(Config::default()).with_credentials(credentials.clone());
    let reference = "s3://bucket/m/".parse().unwrap();
    let source = sources.open(&reference).unwrap();
    run(async {
        for (id, token) in [("FIRST", None), ("SECOND", Some("session-of-the-pod"))] {
            credentials.replace(keys(id, token));
            let error = source.resolve(&reference).await.unwrap_err();
            assert_eq!(error.kind(), SourceErrorKind::Denied);
            assert!(!format!("{error} {source:?}").contains("geheim"));
            let head = heads.try_iter().last().unwrap();
            assert!(head.contains(&format!("Credential={id}/")), "{head}");
            assert!(!head.contains("of-the-node"), "{head}");
            assert_eq!(
                head.contains("session-of-the-pod"),
                token.is_some(),
                "{head}"
            );
        }
    });
}
