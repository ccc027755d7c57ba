//! Plain HTTP and the Hub against servers that fail, lie or change: every answer gets the right
//! bytes or an error of the right kind, and no error shows a secret.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use futures_util::StreamExt as _;
use hearth::{
    digest::{Digest, ObjectId, to_hex},
    source::{Config, Source, SourceError, SourceErrorKind as Kind, Sources},
    tree::{Artifact, Location},
};

use crate::scripted::{Reply, Scripted, Seen, Then};

mod directories;
mod hub;

const SECRET: &str = "geheim";
const ETAG: &str = "\"v1\"";

fn data(size: usize) -> Vec<u8> {
    (0..size).map(|i| (i * 31 % 251) as u8).collect()
}

/// For servers that stall; all others may be slow on a loaded machine.
fn impatient() -> Config {
    toml::from_str("request_timeout_seconds = 1\nstall_timeout_seconds = 1").unwrap()
}

fn open_with(reference: &str, config: Config) -> Arc<dyn Source> {
    Sources::new(config)
        .open(&reference.parse().unwrap())
        .unwrap()
}

fn open(reference: &str) -> Arc<dyn Source> {
    open_with(reference, Config::default())
}

async fn resolve(reference: &str) -> Result<Artifact, SourceError> {
    open(reference).resolve(&reference.parse().unwrap()).await
}

async fn read(
    source: &Arc<dyn Source>,
    location: &Location,
    range: Range<u64>,
) -> Result<Vec<u8>, SourceError> {
    let mut stream = source.read(location, range).await?;
    let mut found = Vec::new();
    while let Some(chunk) = stream.next().await {
        found.extend_from_slice(&chunk?);
    }
    Ok(found)
}

fn location(path: String, generation: &str) -> Location {
    Location {
        path,
        generation: Some(generation.to_owned()),
        offset: 0,
    }
}

fn only_location(artifact: &Artifact) -> Location {
    assert_eq!(artifact.objects.len(), 1);
    let location = artifact.objects[0].recipe.location().unwrap();
    location.clone()
}

fn paths(artifact: &Artifact) -> Vec<String> {
    artifact
        .tree
        .files()
        .into_iter()
        .map(|(path, ..)| path)
        .collect()
}

/// Everything a person or a log could come to see of an error.
fn shown(error: &SourceError) -> String {
    format!("{error} {error:?} {:?}", error.hint())
}

#[tokio::test]
async fn a_file_is_pinned_and_its_secrets_stay_here() {
    let content = data(1000);
    let served = content.clone();
    let server = Scripted::start(move |seen| Reply::good(seen, &served, ETAG)).await;
    let host = server.address;
    let reference = format!("http://u:{SECRET}@{host}/m/model%20a.bin?token={SECRET}&v=2");
    let source = open(&reference);
    let artifact = source.resolve(&reference.parse().unwrap()).await.unwrap();
    assert_eq!(paths(&artifact), ["model a.bin"]);
    assert_eq!(artifact.revision, ETAG);
    assert_eq!(artifact.size(), 1000);
    assert!(!format!("{artifact:?}{source:?}").contains(SECRET));
    let inode = artifact.tree.find("model a.bin").unwrap();
    assert_eq!(
        artifact.tree.get(inode).unwrap().meta.mtime.0,
        1_795_255_200
    );
    let place = only_location(&artifact);
    assert_eq!(
        read(&source, &place, 10..20).await.unwrap(),
        content[10..20]
    );
    assert_eq!(
        read(&source, &place, 999..1000).await.unwrap(),
        content[999..]
    );
    assert_eq!(read(&source, &place, 0..1000).await.unwrap(), content);
    for seen in server.take_log() {
        assert_eq!(seen.target, format!("/m/model%20a.bin?token={SECRET}&v=2"));
        assert_eq!(seen.header("authorization"), Some("Basic dTpnZWhlaW0="));
        assert_eq!(seen.header("accept-encoding"), Some("identity"));
        if seen.method == "GET" {
            assert_eq!(seen.header("if-match"), Some(ETAG));
        }
    }
    // The id does not depend on who asks.
    let plain = format!("http://{host}/m/model%20a.bin?v=2");
    assert_eq!(
        resolve(&plain).await.unwrap().objects[0].id,
        artifact.objects[0].id
    );
    // A location elsewhere gets nothing of ours, nor is it read at all.
    let other = Scripted::start(move |seen| Reply::good(seen, b"x", ETAG)).await;
    let error = read(
        &source,
        &location(other.url("/m/model%20a.bin"), ETAG),
        0..1,
    )
    .await;
    assert_eq!(error.unwrap_err().kind(), Kind::Invalid);
    assert!(other.take_log().is_empty());
}

/// One bad answer: its name, the reply to `bytes=10-19` of 1000, what it means, what is said.
type Case = (&'static str, Reply, Kind, &'static str);

fn cases() -> Vec<Case> {
    let ten = || data(1000)[10..20].to_vec();
    let good = format!("206 Partial Content\netag: {ETAG}\ncontent-range: bytes 10-19/1000");
    let status = |line: &str| Reply::new(line, "go away");
    let close = |reply: Reply| reply.then(Then::Close);
    let with = |range: &str| {
        let head = format!("206 Partial Content\netag: {ETAG}\ncontent-range: {range}");
        Reply::new(&head, ten())
    };
    let long = format!("{good}\ntransfer-encoding: chunked");
    vec![
        (
            "short body",
            close(Reply::raw(
                &format!("{good}\ncontent-length: 10"),
                &ten()[..4],
            )),
            Kind::Unavailable,
            "ended after 4 of 10 bytes",
        ),
        (
            "short body without length",
            close(Reply::raw(
                &format!("{good}\nconnection: close"),
                &ten()[..4],
            )),
            Kind::Unavailable,
            "ended after 4 of 10 bytes",
        ),
        (
            "reset",
            Reply::raw(&format!("{good}\ncontent-length: 10"), &ten()[..4]).then(Then::Reset),
            Kind::Unavailable,
            "ended after 4 of 10 bytes",
        ),
        (
            "stalled body",
            Reply::raw(&format!("{good}\ncontent-length: 10"), &ten()[..4]).then(Then::Stall),
            Kind::Unavailable,
            "stalled: no byte for 1s after 4 of 10 bytes",
        ),
        (
            "stalled head",
            Reply::silence(),
            Kind::Unavailable,
            "gave no answer for 1s",
        ),
        ("closed", Reply::bytes(b""), Kind::Unavailable, "broke"),
        (
            "garbage",
            Reply::bytes(b"SSH-2.0-x\r\n"),
            Kind::Unavailable,
            "broke",
        ),
        (
            "long body",
            Reply::raw(&long, "14\r\n01234567890123456789\r\n0\r\n\r\n"),
            Kind::Corrupt,
            "longer than 10 bytes",
        ),
        (
            "endless body",
            Reply::raw(&long, "5\r\n01234\r\n").then(Then::Repeat),
            Kind::Corrupt,
            "longer than 10 bytes",
        ),
        (
            "long length",
            Reply::new(&good, data(11)),
            Kind::Corrupt,
            "sends 11 bytes",
        ),
        (
            "short length",
            Reply::new(&good, data(9)),
            Kind::Corrupt,
            "sends 9 bytes",
        ),
        (
            "other range",
            with("bytes 20-29/1000"),
            Kind::Corrupt,
            "bytes 10-19 with 20-29",
        ),
        (
            "wider range",
            with("bytes 0-19/1000"),
            Kind::Corrupt,
            "with 0-19",
        ),
        (
            "odd range",
            with("bytes 19-10/1000"),
            Kind::Corrupt,
            "no usable content-range",
        ),
        (
            "shrunk object",
            with("bytes 10-14/15"),
            Kind::Changed,
            "with 10-14",
        ),
        (
            "no range",
            Reply::new(&format!("206 Partial Content\netag: {ETAG}"), ten()),
            Kind::Corrupt,
            "no usable content-range",
        ),
        (
            "multipart",
            Reply::new(
                &format!("206 Partial Content\netag: {ETAG}\ncontent-type: multipart/byteranges"),
                ten(),
            ),
            Kind::Corrupt,
            "no usable content-range",
        ),
        (
            "200 for 206",
            Reply::new(&format!("200 OK\netag: {ETAG}"), data(1000)),
            Kind::Corrupt,
            "does not support byte ranges",
        ),
        (
            "200 of the same length",
            Reply::new(&format!("200 OK\netag: {ETAG}"), ten()),
            Kind::Corrupt,
            "does not support byte ranges",
        ),
        (
            "200 of another generation",
            Reply::new("200 OK\netag: \"v2\"", data(1000)),
            Kind::Changed,
            "etag \"v2\", not \"v1\"",
        ),
        (
            "other etag",
            Reply::new(&good.replace("v1", "v2"), ten()),
            Kind::Changed,
            "another generation",
        ),
        (
            "weak etag",
            Reply::new(&good.replace(ETAG, "W/\"v1\""), ten()),
            Kind::Changed,
            "another generation",
        ),
        (
            "no etag",
            Reply::new(&good.replace("etag", "x-tag"), ten()),
            Kind::Corrupt,
            "without the etag",
        ),
        (
            "encoded",
            Reply::new(&format!("{good}\ncontent-encoding: gzip"), ten()),
            Kind::Corrupt,
            "gzip",
        ),
        (
            "204",
            Reply::raw("204 No Content", ""),
            Kind::Corrupt,
            "204",
        ),
        ("400", status("400 Bad Request"), Kind::Invalid, "400"),
        ("401", status("401 Unauthorized"), Kind::Denied, "401"),
        ("403", status("403 Forbidden"), Kind::Denied, "403"),
        ("404", status("404 Not Found"), Kind::NotFound, "404"),
        (
            "407",
            status("407 Proxy Authentication Required"),
            Kind::Denied,
            "proxy",
        ),
        (
            "408",
            close(status("408 Request Timeout")),
            Kind::Unavailable,
            "408",
        ),
        ("410", status("410 Gone"), Kind::NotFound, "410"),
        (
            "412",
            status("412 Precondition Failed"),
            Kind::Changed,
            "another generation",
        ),
        (
            "416",
            status("416 Range Not Satisfiable\ncontent-range: bytes */5"),
            Kind::Changed,
            "shorter",
        ),
        (
            "429",
            status("429 Too Many Requests\nretry-after: 7"),
            Kind::Throttled,
            "429",
        ),
        (
            "500",
            status("500 Internal Server Error"),
            Kind::Unavailable,
            "500",
        ),
        ("502", status("502 Bad Gateway"), Kind::Unavailable, "502"),
        (
            "503",
            status("503 Service Unavailable"),
            Kind::Unavailable,
            "503",
        ),
        (
            "503 with a wait",
            status("503 Service Unavailable\nretry-after: 7"),
            Kind::Throttled,
            "503",
        ),
        (
            "no location",
            status("302 Found"),
            Kind::Corrupt,
            "no usable location",
        ),
        (
            "other scheme",
            status("302 Found\nlocation: file:///etc/passwd"),
            Kind::Invalid,
            "redirects to a file url",
        ),
        (
            "loop",
            status(&format!("302 Found\nlocation: /m/f.bin?token={SECRET}")),
            Kind::Corrupt,
            "redirects in a loop",
        ),
    ]
}

#[tokio::test]
async fn every_bad_answer_has_its_error() {
    let content = data(1000);
    let served = content.clone();
    let server = Scripted::start(move |seen| Reply::good(seen, &served, ETAG)).await;
    let host = server.address;
    let reference = format!("http://u:{SECRET}@{host}/m/f.bin?token={SECRET}");
    let source = open(&reference);
    let artifact = source.resolve(&reference.parse().unwrap()).await.unwrap();
    let place = only_location(&artifact);
    let hasty = open_with(&reference, impatient());
    for (name, reply, kind, says) in cases() {
        server.now(move |_| reply.clone());
        let source = match name.starts_with("stalled") {
            true => &hasty,
            false => &source,
        };
        let error = read(source, &place, 10..20).await.expect_err(name);
        let text = shown(&error);
        assert_eq!(error.kind(), kind, "{name}: {text}");
        assert!(text.replace('\\', "").contains(says), "{name}: {text}");
        assert!(text.contains(&host.to_string()), "{name}: {text}");
        assert!(text.contains("/m/f.bin"), "{name}: {text}");
        assert!(!text.contains(SECRET), "{name}: {text}");
        let wait = error.retry_after().map(|wait| wait.as_secs());
        assert_eq!(wait, (kind == Kind::Throttled).then_some(7), "{name}");
    }
    // After all that the source is as good as new.
    let served = content.clone();
    server.now(move |seen| Reply::good(seen, &served, ETAG));
    assert_eq!(
        read(&source, &place, 10..20).await.unwrap(),
        content[10..20]
    );
}

#[tokio::test]
async fn generations_are_compared_by_what_there_is() {
    let server = Scripted::start(|_| Reply::new("404", "")).await;
    let date = "Sat, 21 Nov 2026 10:00:00 GMT";
    let later = "Sat, 21 Nov 2026 11:00:00 GMT";
    for (headers, after, generation, kind) in [
        ("etag: W/\"w\"", "etag: W/\"x\"", "W/\"w\"", Kind::Changed),
        ("x: y", "x: y", "size:10", Kind::Changed),
        ("last-modified: D", "last-modified: L", date, Kind::Changed),
        (
            "last-modified: D\netag: W/\"w\"",
            "etag: W/\"w\"",
            date,
            Kind::Corrupt,
        ),
    ] {
        let fill = |text: &str| text.replace('D', date).replace('L', later);
        let (before, after) = (fill(headers), fill(after));
        let answer = |headers: &str, size: usize| {
            let head = format!("206 Partial Content\n{headers}\ncontent-range: bytes 0-3/{size}");
            Reply::new(&head, "abcd")
        };
        let ranged = answer(&before, 10);
        let whole = Reply::raw(&format!("200 OK\n{before}\ncontent-length: 10"), "");
        server.now(move |seen| match seen.method.as_str() {
            "HEAD" => whole.clone(),
            _ => ranged.clone(),
        });
        let reference = server.url("/f");
        let source = open(&reference);
        let artifact = source.resolve(&reference.parse().unwrap()).await.unwrap();
        let place = only_location(&artifact);
        assert_eq!(place.generation.as_deref(), Some(generation));
        assert_eq!(read(&source, &place, 0..4).await.unwrap(), b"abcd");
        let changed = answer(&after, 11);
        server.now(move |_| changed.clone());
        let error = read(&source, &place, 0..4).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
}

#[tokio::test]
async fn the_whole_of_a_server_without_ranges_can_be_read() {
    let server = Scripted::start(|seen| match seen.method.as_str() {
        "HEAD" => Reply::raw("200 OK\ncontent-length: 10", ""),
        _ => Reply::new("200 OK", "0123456789"),
    })
    .await;
    let reference = server.url("/f");
    let source = open(&reference);
    let artifact = source.resolve(&reference.parse().unwrap()).await.unwrap();
    let place = only_location(&artifact);
    assert_eq!(read(&source, &place, 0..10).await.unwrap(), b"0123456789");
    let error = read(&source, &place, 0..9).await.unwrap_err();
    assert!(
        error.to_string().contains("does not support byte ranges"),
        "{error}"
    );
}

#[tokio::test]
async fn sizes_are_found_without_head() {
    let server = Scripted::start(|_| Reply::new("404", "")).await;
    for refused in [
        "403 Forbidden",
        "405 Method Not Allowed",
        "501 Not Implemented",
        "200 OK",
    ] {
        for size in [0usize, 7] {
            server.now(move |seen| match seen.method.as_str() {
                "HEAD" => Reply::raw(refused, ""),
                _ => Reply::good(seen, &data(size), ETAG),
            });
            let artifact = resolve(&server.url("/f")).await.unwrap();
            assert_eq!(artifact.size(), size as u64, "{refused}");
        }
    }
    server.now(|_| Reply::raw("200 OK\ntransfer-encoding: chunked", "1\r\nx\r\n0\r\n\r\n"));
    let error = resolve(&server.url("/f")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.to_string().contains("size"), "{error}");
}

#[tokio::test]
async fn nobody_there_is_unavailable() {
    for reference in [
        "http://127.0.0.1:1/f".to_owned(),
        "http://hearth.invalid/f".to_owned(),
    ] {
        let error = resolve(&reference).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{error}");
        assert!(error.to_string().contains("cannot connect"), "{error}");
    }
}

#[tokio::test]
async fn a_connection_that_was_closed_meanwhile_is_replaced() {
    let content = data(100);
    let asked = AtomicUsize::new(0);
    let served = content.clone();
    // Every second request finds its connection closed, as when the server tired of waiting.
    let server = Scripted::start(
        move |seen| match asked.fetch_add(1, Ordering::Relaxed) % 2 {
            0 => Reply::good(seen, &served, ETAG),
            _ => Reply::bytes(b""),
        },
    )
    .await;
    let reference = server.url("/f.bin");
    let source = open(&reference);
    let artifact = source.resolve(&reference.parse().unwrap()).await.unwrap();
    let place = only_location(&artifact);
    for _ in 0..4 {
        assert_eq!(read(&source, &place, 0..100).await.unwrap(), content);
    }
    assert!(server.take_log().len() >= 8);
}

/// An origin that redirects all to `/signed/N` of another port, for which it counts N up.
async fn origin_and_cdn(content: Vec<u8>) -> (Scripted, Scripted, Arc<AtomicUsize>) {
    let current = Arc::new(AtomicUsize::new(0));
    let valid = Arc::clone(&current);
    let cdn = Scripted::start(move |seen| {
        let fresh = format!("/signed/{}", valid.load(Ordering::SeqCst));
        match seen.path() == fresh {
            true => Reply::good(seen, &content, ETAG),
            false => Reply::new("403 Forbidden", "expired"),
        }
    })
    .await;
    let base = cdn.url("/signed");
    let valid = Arc::clone(&current);
    let origin = Scripted::start(move |_| {
        let n = valid.load(Ordering::SeqCst);
        Reply::new(&format!("302 Found\nlocation: {base}/{n}?sig={SECRET}"), "")
    })
    .await;
    (origin, cdn, current)
}

#[tokio::test]
async fn redirects_are_remembered_renewed_and_told_no_password() {
    let content = data(1000);
    let (origin, cdn, current) = origin_and_cdn(content.clone()).await;
    let reference = format!("http://u:{SECRET}@{}/f?token={SECRET}", origin.address);
    let source = open(&reference);
    let artifact = source.resolve(&reference.parse().unwrap()).await.unwrap();
    let place = only_location(&artifact);
    origin.take_log();
    for _ in 0..3 {
        assert_eq!(
            read(&source, &place, 10..20).await.unwrap(),
            content[10..20]
        );
    }
    assert_eq!(origin.take_log().len(), 1);
    current.fetch_add(1, Ordering::SeqCst);
    assert_eq!(
        read(&source, &place, 20..30).await.unwrap(),
        content[20..30]
    );
    assert_eq!(origin.take_log().len(), 1);
    for seen in cdn.take_log() {
        assert_eq!(seen.header("authorization"), None);
        assert_eq!(seen.target.matches(SECRET).count(), 1, "only its own");
    }
    // Broken for good: one renewal, then the error, without the signature.
    cdn.now(|_| Reply::new("403 Forbidden", ""));
    let error = read(&source, &place, 0..10).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Denied);
    assert!(!shown(&error).contains(SECRET), "{}", shown(&error));
    assert!(shown(&error).contains(&cdn.address.to_string()));
    assert_eq!(origin.take_log().len(), 1);
}

#[tokio::test]
async fn a_request_that_left_is_never_trusted_again() {
    let home = Scripted::start(|_| Reply::new("404", "")).await;
    let back = home.url("/steal");
    let other =
        Scripted::start(move |_| Reply::new(&format!("302 Found\nlocation: {back}"), "")).await;
    let away = other.url("/x");
    home.now(move |seen| match seen.path() {
        "/f" => Reply::new(&format!("302 Found\nlocation: {away}"), ""),
        _ => Reply::good(seen, b"x", ETAG),
    });
    resolve(&format!("http://u:{SECRET}@{}/f", home.address))
        .await
        .unwrap();
    let auth: Vec<_> = home
        .take_log()
        .iter()
        .map(|seen| {
            (
                seen.path().to_owned(),
                seen.header("authorization").is_some(),
            )
        })
        .collect();
    assert_eq!(
        auth,
        [("/f".to_owned(), true), ("/steal".to_owned(), false)]
    );
    assert!(other.take_log()[0].header("authorization").is_none());
    // Endless, yet never the same.
    let count = AtomicUsize::new(0);
    home.now(move |_| {
        let n = count.fetch_add(1, Ordering::SeqCst);
        Reply::new(&format!("302 Found\nlocation: /{n}"), "")
    });
    let error = resolve(&home.url("/f")).await.unwrap_err();
    assert!(
        error.to_string().contains("more than 10 redirects"),
        "{error}"
    );
}
