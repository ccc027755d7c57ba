//! Directories: listing pages and index files, also hostile ones.

use super::*;

/// A server of a directory `/m/`: pages by path, files of ten bytes below.
fn site(pages: &[(&'static str, String)]) -> impl Fn(&Seen) -> Reply + Send + Sync + use<> {
    let pages: Vec<_> = pages.to_vec();
    move |seen| {
        let page = pages.iter().find(|(path, _)| *path == seen.path());
        match page {
            Some((path, body)) => {
                let kind = if path.ends_with(".json") {
                    "application/json"
                } else {
                    "text/html"
                };
                Reply::new(&format!("200 OK\ncontent-type: {kind}"), body.as_str())
            }
            None if seen.path().ends_with('/') || seen.path().ends_with("hearth.json") => {
                Reply::new("404 Not Found", "")
            }
            None => Reply::good(seen, b"0123456789", ETAG),
        }
    }
}

#[tokio::test]
async fn listing_pages_are_walked_and_never_left() {
    let root = r#"<a href="../">..</a><a href="a.bin">a</a><a href="a.bin">again</a>
        <a href="b%20c.txt">b</a><a href="d/">d</a><a href="/etc/passwd">x</a>
        <a href="http://elsewhere/x.bin">x</a><a href="?C=N">x</a><a href="../../up.bin">x</a>"#;
    let sub = r#"<a href="../">..</a><a href="e.bin">e</a><a href="%2e%2e/%2e%2e/up.bin">x</a>"#;
    let pages = [("/m/", root.to_owned()), ("/m/d/", sub.to_owned())];
    let server = Scripted::start(site(&pages)).await;
    let artifact = resolve(&server.url(&format!("/m/?token={SECRET}")))
        .await
        .unwrap();
    assert_eq!(paths(&artifact), ["a.bin", "b c.txt", "d/e.bin"]);
    for seen in server.take_log() {
        assert!(seen.path().starts_with("/m/"), "{}", seen.target);
        assert!(seen.target.ends_with(&format!("?token={SECRET}")));
    }
    // Files that the filter leaves out are not asked for.
    let artifact = resolve(&server.url("/m/?include=*.txt")).await.unwrap();
    assert_eq!(paths(&artifact), ["b c.txt"]);
    let heads = server.take_log();
    assert_eq!(heads.iter().filter(|seen| seen.method == "HEAD").count(), 1);
}

#[tokio::test]
async fn hostile_directories_are_refused() {
    let server = Scripted::start(|_| Reply::new("404", "")).await;
    // A directory that holds itself.
    server.now(|seen| match seen.path().ends_with("hearth.json") {
        true => Reply::new("404 Not Found", ""),
        false => Reply::new("200 OK\ncontent-type: text/html", r#"<a href="x/">x</a>"#),
    });
    let error = resolve(&server.url("/m/")).await.unwrap_err();
    assert!(error.to_string().contains("deeper than 32"), "{error}");
    // A page without end.
    server.now(|seen| match seen.path().ends_with("hearth.json") {
        true => Reply::new("404 Not Found", ""),
        false => {
            let head = "200 OK\ncontent-type: text/html\ntransfer-encoding: chunked";
            Reply::raw(head, format!("10000\r\n{}\r\n", " ".repeat(0x10000))).then(Then::Repeat)
        }
    });
    let error = resolve(&server.url("/m/")).await.unwrap_err();
    assert!(error.to_string().contains("longer than"), "{error}");
    // A page that says it is huge.
    server.now(|_| Reply::raw("200 OK\ncontent-length: 99999999999", "").then(Then::Stall));
    let error = resolve(&server.url("/m/")).await.unwrap_err();
    assert!(error.to_string().contains("longer than"), "{error}");
    // More entries than allowed.
    let many: String = (0..200).map(|i| format!("<a href=\"{i}\">x</a>")).collect();
    server.now(site(&[("/m/", many)]));
    let few = Config {
        max_entries: 100.try_into().unwrap(),
        ..Config::default()
    };
    let reference = server.url("/m/");
    let source = open_with(&reference, few);
    let error = source
        .resolve(&reference.parse().unwrap())
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("more than 100 entries"),
        "{error}"
    );
    // A directory that is taken for a file.
    let page = "<a href=\"x\">x</a>".to_owned();
    server.now(move |seen| match seen.path() {
        "/m" => Reply::new("301 Moved Permanently\nlocation: /m/", ""),
        _ => Reply::new("200 OK\ncontent-type: text/html", page.as_str()),
    });
    let error = resolve(&server.url("/m")).await.unwrap_err();
    assert!(error.to_string().contains("is a directory"), "{error}");
    // Names that are none; no name at all.
    for (page, says) in [
        (r#"<a href="a%2fb">x</a>"#, "cannot be a file name"),
        ("<p>welcome</p>", "no files"),
    ] {
        server.now(site(&[("/m/", page.to_owned())]));
        let error = resolve(&server.url("/m/")).await.unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[tokio::test]
async fn an_index_file_names_files_and_digests() {
    let server = Scripted::start(|_| Reply::new("404", "")).await;
    let digest = Digest::of(b"0123456789");
    let index = format!(
        r#"{{"files": [{{"path": "a b/x.bin", "size": 10, "sha256": "{}"}}, {{"path": "y", "size": 10}}]}}"#,
        digest.hex()
    );
    server.now(site(&[("/m/hearth.json", index)]));
    let artifact = resolve(&server.url("/m/")).await.unwrap();
    assert_eq!(paths(&artifact), ["a b/x.bin", "y"]);
    assert_eq!(artifact.objects[0].id, ObjectId::Sha256(digest));
    for (index, says) in [
        (
            r#"{"files": [{"path": "../x", "size": 10}]}"#,
            "leads elsewhere",
        ),
        (
            r#"{"files": [{"path": "/x", "size": 10}]}"#,
            "leads elsewhere",
        ),
        (r#"{"files": [{"path": "x", "size": 11}]}"#, "says 11"),
        (
            r#"{"files": [{"path": "x", "size": 10, "sha256": "00"}]}"#,
            "wrong sha256",
        ),
        (r#"{"files": [{"path": "x", "size": -1}]}"#, "is no index"),
        (
            r#"{"files": [{"path": "x", "size": 10}, {"path": "x", "size": 10}]}"#,
            "twice",
        ),
        ("[1,2", "is no index"),
        (r#"{"files": []}"#, "no files"),
    ] {
        server.now(site(&[("/m/hearth.json", index.to_owned())]));
        let error = resolve(&server.url("/m/")).await.unwrap_err();
        assert!(error.to_string().contains(says), "{index}: {error}");
    }
}
