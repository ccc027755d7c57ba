//! The Hub: tokens, redirects, changes, hostile trees.

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A Hub with one LFS file `m.bin` and one small file `c.json`, the former on `cdn`.
fn hub(cdn: String, lfs: Vec<u8>) -> impl Fn(&Seen) -> Reply + Send + Sync {
    let sha256 = Digest::of(&lfs).hex();
    let sha1 = to_hex(&[7; 20]);
    let size = lfs.len();
    move |seen| match seen.path() {
        "/api/models/o/n/revision/main" => {
            Reply::new("200 OK", format!(r#"{{"sha":"{COMMIT}","unknown":1}}"#))
        }
        path if path == format!("/api/models/o/n/tree/{COMMIT}") => Reply::new(
            "200 OK",
            format!(
                r#"[{{"type":"file","path":"m.bin","oid":"x","size":{size},
                    "lfs":{{"oid":"{sha256}","size":{size},"pointerSize":134}}}},
                    {{"type":"file","path":"c.json","oid":"{sha1}","size":2}}]"#
            ),
        ),
        path if path == format!("/o/n/resolve/{COMMIT}/m.bin") => Reply::new(
            &format!(
                "302 Found\nx-repo-commit: {COMMIT}\nx-linked-size: {size}\n\
                 x-linked-etag: \"{sha256}\"\nlocation: {cdn}/m?Signature={SECRET}"
            ),
            "",
        ),
        path if path == format!("/o/n/resolve/{COMMIT}/c.json") => Reply::new(
            &format!("307 Temporary Redirect\nx-repo-commit: {COMMIT}\nlocation: /cache/c.json"),
            "",
        ),
        "/cache/c.json" => Reply::good(seen, b"{}", &format!("\"{sha1}\"")),
        _ => Reply::new("404 Not Found\nx-error-code: EntryNotFound", ""),
    }
}

struct HubBed {
    hub: Scripted,
    cdn: Scripted,
    source: Arc<dyn Source>,
    artifact: Artifact,
    content: Vec<u8>,
    token: tempfile::NamedTempFile,
}

impl HubBed {
    async fn start() -> Self {
        let content = data(1000);
        let served = content.clone();
        let cdn = Scripted::start(move |seen| Reply::good(seen, &served, "\"cdn\"")).await;
        let server = Scripted::start(hub(cdn.url(""), content.clone())).await;
        let token = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(token.path(), SECRET).unwrap();
        let config = Config {
            hub_endpoint: Some(server.url("")),
            hub_token_file: Some(token.path().to_owned()),
            ..Config::default()
        };
        let source = open_with("hf://o/n", config);
        let artifact = source.resolve(&"hf://o/n".parse().unwrap()).await.unwrap();
        Self {
            hub: server,
            cdn,
            source,
            artifact,
            content,
            token,
        }
    }

    async fn read(&self, path: &str, range: Range<u64>) -> Result<Vec<u8>, SourceError> {
        let files = self.artifact.tree.files();
        let (_, _, object) = files.iter().find(|(name, ..)| name == path).unwrap();
        let recipe = &self.artifact.objects[*object as usize].recipe;
        let location = recipe.location().unwrap();
        read(&self.source, location, range).await
    }

    async fn resolve(&self) -> Result<Artifact, SourceError> {
        self.source.resolve(&"hf://o/n".parse().unwrap()).await
    }
}

#[tokio::test]
async fn the_hub_keeps_its_token_and_its_redirects() {
    let bed = HubBed::start().await;
    assert_eq!(bed.artifact.revision, COMMIT);
    let digest = Digest::of(&bed.content);
    assert!(
        bed.artifact
            .objects
            .iter()
            .any(|o| o.id == ObjectId::Sha256(digest))
    );
    assert!(
        bed.artifact
            .objects
            .iter()
            .any(|o| o.git_sha1 == Some([7; 20]))
    );
    bed.hub.take_log();
    // Many readers, one question.
    let ranges = (0..20).map(|i| bed.read("m.bin", i * 50..i * 50 + 50));
    let parts = futures_util::future::join_all(ranges).await;
    let whole: Vec<u8> = parts.into_iter().flat_map(Result::unwrap).collect();
    assert_eq!(whole, bed.content);
    assert_eq!(bed.hub.take_log().len(), 1);
    assert_eq!(bed.read("c.json", 0..2).await.unwrap(), b"{}");
    let bearer = format!("Bearer {SECRET}");
    for seen in bed.hub.take_log() {
        assert_eq!(seen.header("authorization"), Some(bearer.as_str()));
    }
    for seen in bed.cdn.take_log() {
        assert_eq!(seen.header("authorization"), None);
    }
    // The signature expires: one renewal, for all readers.
    let expired = Arc::new(AtomicBool::new(true));
    let (served, once) = (bed.content.clone(), Arc::clone(&expired));
    bed.cdn
        .now(move |seen| match once.swap(false, Ordering::SeqCst) {
            true => Reply::new("403 Forbidden", ""),
            false => Reply::good(seen, &served, "\"cdn\""),
        });
    assert_eq!(bed.read("m.bin", 5..9).await.unwrap(), bed.content[5..9]);
    assert_eq!(bed.hub.take_log().len(), 1);
}

#[tokio::test]
async fn a_token_that_was_replaced_is_read_anew() {
    let bed = HubBed::start().await;
    let good = hub(bed.cdn.url(""), bed.content.clone());
    bed.hub.now(move |seen| match seen.header("authorization") {
        Some("Bearer neu") => good(seen),
        _ => Reply::new("401 Unauthorized\nx-error-code: RepoNotFound", ""),
    });
    bed.hub.take_log();
    // As long as it is the same token it is not tried twice.
    let error = bed.read("c.json", 0..2).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
    assert_eq!(bed.hub.take_log().len(), 1);
    std::fs::write(bed.token.path(), "neu").unwrap();
    let reads = (0..10).map(|i| bed.read("m.bin", i * 100..i * 100 + 100));
    let parts = futures_util::future::join_all(reads).await;
    let whole: Vec<u8> = parts.into_iter().flat_map(Result::unwrap).collect();
    assert_eq!(whole, bed.content);
    bed.hub.take_log();
    assert_eq!(bed.read("c.json", 0..2).await.unwrap(), b"{}");
    let asked = bed.hub.take_log();
    assert_eq!(asked[0].header("authorization"), Some("Bearer neu"));
}

#[tokio::test]
async fn what_the_hub_changes_or_refuses_is_noticed() {
    let bed = HubBed::start().await;
    for (head, kind, says) in [
        ("200 OK\nx-repo-commit: beef", Kind::Changed, "commit beef"),
        (
            "302 Found\nx-linked-etag: \"beef\"\nlocation: /x",
            Kind::Changed,
            "etag beef",
        ),
        (
            "401 Unauthorized\nx-error-code: RepoNotFound",
            Kind::Denied,
            "or is private",
        ),
        (
            "404 Not Found\nx-error-code: RepoNotFound",
            Kind::NotFound,
            "or is private",
        ),
        (
            "403 Forbidden\nx-error-code: GatedRepo",
            Kind::Denied,
            "terms",
        ),
        (
            "404 Not Found\nx-error-code: EntryNotFound",
            Kind::NotFound,
            "no such file",
        ),
        ("401 Unauthorized", Kind::Denied, "HF_TOKEN"),
        (
            "429 Too Many Requests\nratelimit: \"api\";r=0;t=7",
            Kind::Throttled,
            "429",
        ),
        ("500 Oops", Kind::Unavailable, "500"),
    ] {
        bed.hub.now(move |_| Reply::new(head, "0123"));
        let error = bed.read("m.bin", 0..4).await.unwrap_err();
        let text = shown(&error);
        assert_eq!(error.kind(), kind, "{head}: {text}");
        assert!(
            text.contains(says) && text.contains("m.bin"),
            "{head}: {text}"
        );
        assert!(!text.contains(SECRET), "{text}");
        let wait = error.retry_after().map(|wait| wait.as_secs());
        assert_eq!(wait, (kind == Kind::Throttled).then_some(7), "{head}");
    }
    // Another size behind the redirect than the Hub said.
    let served = bed.content.clone();
    bed.hub.now(hub(bed.cdn.url(""), bed.content.clone()));
    bed.cdn
        .now(move |seen| Reply::good(seen, &served[..500], "\"cdn\""));
    let error = bed.read("m.bin", 0..4).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Changed, "{error}");
    assert!(!shown(&error).contains(SECRET));
}

#[tokio::test]
async fn hostile_trees_of_the_hub_are_refused() {
    let bed = HubBed::start().await;
    let sha1 = "a".repeat(40);
    let file = |path: &str| format!(r#"{{"type":"file","path":"{path}","oid":"{sha1}","size":1}}"#);
    let next = |target: &str| format!("200 OK\nlink: <{target}>; rel=\"next\"");
    let tree = format!("/api/models/o/n/tree/{COMMIT}");
    let bad_lfs = file("a").replace("\"size\"", "\"lfs\":{\"oid\":\"zz\",\"size\":1},\"size\"");
    for (head, body, says) in [
        ("200 OK".into(), format!("[{}]", file("../a")), "component"),
        ("200 OK".into(), format!("[{}]", file("/a")), "absolute"),
        (
            "200 OK".into(),
            format!("[{},{}]", file("a"), file("a")),
            "twice",
        ),
        (
            "200 OK".into(),
            format!("[{}]", file("a").replace(":1", ":18446744073709551615")),
            "bytes",
        ),
        (
            "200 OK".into(),
            format!("[{}]", file("a").replace(&sha1, "zz")),
            "blob id",
        ),
        ("200 OK".into(), format!("[{bad_lfs}]"), "lfs id"),
        ("200 OK".into(), "{".into(), "no JSON"),
        ("200 OK".into(), "[]".into(), "no files"),
        (
            next("http://elsewhere.invalid/x"),
            format!("[{}]", file("a")),
            "next page",
        ),
        (
            next(&format!("{tree}?recursive=true&expand=false")),
            format!("[{}]", file("a")),
            "next page",
        ),
        (next(&format!("{tree}?cursor=1")), "[]".into(), "empty"),
        // Never ends, but repeats itself.
        (
            next(&format!("{tree}?cursor=1")),
            format!("[{}]", file("a")),
            "next page",
        ),
    ] {
        let path = tree.clone();
        let reply = Reply::new(&head, body.clone());
        bed.hub.now(move |seen| match seen.path() == path {
            true => reply.clone(),
            false => Reply::new("200 OK", format!(r#"{{"sha":"{COMMIT}"}}"#)),
        });
        let error = bed.resolve().await.unwrap_err();
        assert!(error.to_string().contains(says), "{body}: {error}");
        assert!(!shown(&error).contains(SECRET));
    }
    // Endless directories.
    let count = AtomicUsize::new(0);
    let path = tree.clone();
    bed.hub.now(move |seen| {
        let n = count.fetch_add(1, Ordering::SeqCst);
        match seen.path() == path {
            true => Reply::new(
                &format!("200 OK\nlink: <{path}?cursor={n}>; rel=\"next\""),
                r#"[{"type":"directory","path":"d","oid":"","size":0}]"#,
            ),
            false => Reply::new("200 OK", format!(r#"{{"sha":"{COMMIT}"}}"#)),
        }
    });
    let config = Config {
        hub_endpoint: Some(bed.hub.url("")),
        max_entries: 100.try_into().unwrap(),
        ..Config::default()
    };
    let source = open_with("hf://o/n", config);
    let error = source
        .resolve(&"hf://o/n".parse().unwrap())
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("more than 100 directories"),
        "{error}"
    );
    bed.hub.now(|_| Reply::new("200 OK", r#"{"sha":"main"}"#));
    let error = bed.resolve().await.unwrap_err();
    assert!(error.to_string().contains("names no commit"), "{error}");
}
