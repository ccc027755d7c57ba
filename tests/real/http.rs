//! Plain HTTP against nginx and Python's `http.server`.

use std::{fs, path::Path};

use hearth::source::{Config, Sources};

use crate::{
    servers::{self, Server, free_port, python, set_env},
    sources::{Origin, bytes, conformance, locate, read, resolve},
};

/// A directory that a web server serves.
struct Site<'s> {
    root: &'s Path,
    server: &'s Server,
}

#[async_trait::async_trait]
impl Origin for Site<'_> {
    fn reference(&self, path: &str) -> String {
        format!("{}/models/my%20model/{path}", self.server.url())
    }

    async fn put(&self, path: &str, body: &[u8]) {
        let file = self.root.join("models/my model").join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, body).unwrap();
    }

    async fn delete(&self, path: &str) {
        fs::remove_file(self.root.join("models/my model").join(path)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nginx_conforms() {
    let root = tempfile::tempdir().unwrap();
    let server = servers::nginx(root.path(), "");
    let root = root.path();
    conformance(&Site {
        root,
        server: &server,
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nginx_with_json_listings_conforms() {
    let root = tempfile::tempdir().unwrap();
    let server = servers::nginx(root.path(), "autoindex_format json;");
    let root = root.path();
    conformance(&Site {
        root,
        server: &server,
    })
    .await;
}

/// It lists, but knows no ranges: small files can be read whole, parts of large ones not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn python_lists_and_gives_whole_files() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("d ir")).unwrap();
    fs::write(root.path().join("d ir/ü #1%.bin"), bytes(1, 5000)).unwrap();
    fs::write(root.path().join("a"), "").unwrap();
    let server = python(|port, _| {
        let root = root.path().display();
        let line = format!("-m http.server {port} --bind 127.0.0.1 --directory {root}");
        line.split(' ').map(str::to_owned).collect()
    });
    let sources = Sources::new(Config::default());
    let (source, artifact) = resolve(&sources, &format!("{}/", server.url()))
        .await
        .unwrap();
    let paths: Vec<_> = artifact.tree.files().into_iter().map(|f| f.0).collect();
    assert_eq!(paths, ["a", "d ir/ü #1%.bin"]);
    let (place, size) = locate(&artifact, "d ir/ü #1%.bin");
    assert_eq!(
        read(&source, &place, 0..size).await.unwrap(),
        bytes(1, 5000)
    );
    let error = read(&source, &place, 0..10).await.unwrap_err();
    assert!(
        error.to_string().contains("does not support byte ranges"),
        "{error}"
    );
}

/// A directory password in the URL opens it, and only it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nginx_asks_for_a_password() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("m")).unwrap();
    fs::write(root.path().join("m/x.bin"), bytes(1, 5000)).unwrap();
    let passwords = root.path().join("passwords");
    fs::write(&passwords, "user:{PLAIN}geheim\n").unwrap();
    let guard = format!(
        "auth_basic closed; auth_basic_user_file {};",
        passwords.display()
    );
    let server = servers::nginx(root.path(), &guard);
    let sources = Sources::new(Config::default());
    let host = format!("127.0.0.1:{}", server.port);
    let (source, artifact) = resolve(&sources, &format!("http://user:geheim@{host}/m/"))
        .await
        .unwrap();
    let (place, size) = locate(&artifact, "x.bin");
    assert_eq!(
        read(&source, &place, 0..size).await.unwrap(),
        bytes(1, 5000)
    );
    assert!(!format!("{artifact:?}{source:?}").contains("geheim"));
    for reference in [
        format!("http://{host}/m/"),
        format!("http://user:falsch@{host}/m/"),
    ] {
        let error = resolve(&sources, &reference).await.unwrap_err();
        assert_eq!(
            error.kind(),
            hearth::source::SourceErrorKind::Denied,
            "{error}"
        );
        assert!(!error.to_string().contains("falsch"), "{error}");
    }
}

/// A private authority is trusted where a bundle names it, and https is never left.
#[test]
fn nginx_over_tls() {
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name).display().to_string();
    fs::write(path("x.bin"), bytes(1, 5000)).unwrap();
    servers::make_certificates(root.path());
    let port = free_port();
    let server = servers::nginx(
        root.path(),
        &format!(
            "listen 127.0.0.1:{port} ssl; ssl_certificate {}; ssl_certificate_key {};
             location = /plain {{ return 302 http://127.0.0.1/x.bin; }}",
            path("cert.pem"),
            path("key.pem")
        ),
    );
    let run = |reference: String| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let sources = Sources::new(Config::default());
            let (source, artifact) = resolve(&sources, &reference).await?;
            let (place, size) = locate(&artifact, "x.bin");
            read(&source, &place, 0..size).await
        })
    };
    let reference = format!("https://localhost:{port}/x.bin");
    let error = run(reference.clone()).unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    for name in ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"] {
        set_env(&[(name, path("ca.pem"))]);
        assert_eq!(run(reference.clone()).unwrap(), bytes(1, 5000), "{name}");
        set_env(&[(name, "")]);
    }
    set_env(&[("REQUESTS_CA_BUNDLE", path("ca.pem"))]);
    let error = run(format!("https://localhost:{port}/plain")).unwrap_err();
    assert!(error.to_string().contains("from https to http"), "{error}");
    set_env(&[("REQUESTS_CA_BUNDLE", path("x.bin"))]);
    let error = run(reference).unwrap_err();
    assert!(error.to_string().contains("REQUESTS_CA_BUNDLE"), "{error}");
    drop(server);
}
