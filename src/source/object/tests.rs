//! An S3 server that does what it should not, in this process.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    sync::mpsc,
    thread,
};

use futures_util::TryStreamExt;
use object_store::{
    ClientConfigKey, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
};

use super::{super::install_tls, transport::Connector, *};

const SECRET: &str = "wJalrXUtnFEMI-SECRET";

/// Answers each connection with what `answer` makes of the request's head; an answer is the whole
/// text sent. The source talks to it as the bucket `b`.
fn origin(answer: impl Fn(&str) -> String + Send + 'static) -> ObjectSource {
    origin_opened(answer, |builder, _| {
        builder
            .with_access_key_id("AKIDSECRET")
            .with_secret_access_key(SECRET)
    })
}

/// As [`origin`]; `keys` says which keys open it, given its URL.
fn origin_opened(
    answer: impl Fn(&str) -> String + Send + 'static,
    keys: impl FnOnce(AmazonS3Builder, &str) -> AmazonS3Builder,
) -> ObjectSource {
    install_tls();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head).unwrap() > 0 {}
            let _ = stream.write_all(answer(&head).as_bytes());
        }
    });
    let config: Config =
        toml::from_str("request_timeout_seconds = 2\nstall_timeout_seconds = 1").unwrap();
    let url = format!("http://{host}");
    let store = keys(AmazonS3Builder::new(), &url)
        .with_endpoint(&url)
        .with_bucket_name("b")
        .with_config(
            AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp),
            "true",
        )
        .with_config(
            AmazonS3ConfigKey::Client(ClientConfigKey::ReadTimeout),
            "1 second",
        )
        .with_retry(RetryConfig {
            max_retries: 0,
            ..RetryConfig::default()
        })
        .with_http_connector(Connector {
            roots: Vec::new(),
            as_stored: false,
        })
        .build()
        .unwrap();
    ObjectSource::over(store, "s3://b".into(), host, &config)
}

fn response(status: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n{body}"
    )
}

fn pinned(generation: &str) -> Location {
    Location {
        path: "dir/key".into(),
        generation: Some(generation.into()),
        offset: 0,
    }
}

async fn read(source: &ObjectSource, range: Range<u64>) -> Result<String, SourceError> {
    let body = source.read(&pinned("\"e1\""), range).await?;
    let pieces: Vec<Bytes> = body.try_collect().await?;
    Ok(String::from_utf8(pieces.concat()).unwrap())
}

async fn error_of(answer: String, range: Range<u64>) -> SourceError {
    let source = origin(move |_| answer.clone());
    let error = read(&source, range).await.expect_err("must fail");
    let text = format!("{error} {error:?} {source:?}");
    assert!(!text.contains("SECRET"), "{text}");
    assert!(text.contains("s3://b/dir/key at 127.0.0.1:"), "{text}");
    error
}

#[tokio::test]
async fn a_good_answer_is_read_and_asked_for_by_its_etag() {
    let (sent, seen) = mpsc::channel();
    let source = origin(move |head| {
        sent.send(head.to_owned()).unwrap();
        let headers = "Content-Range: bytes 2-5/10\r\nETag: \"e1\"\r\n";
        response("206 Partial Content", headers, "2345")
    });
    assert_eq!(read(&source, 2..6).await.unwrap(), "2345");
    let head = seen.recv().unwrap().to_ascii_lowercase();
    assert!(head.contains("\r\nif-match: \"e1\"\r\n"), "{head}");
    assert!(head.contains("\r\nrange: bytes=2-5\r\n"), "{head}");
}

#[tokio::test]
async fn bad_answers_are_told_apart() {
    use SourceErrorKind as Kind;
    let range = "Content-Range: bytes 0-3/10\r\nETag: \"e1\"\r\n";
    let part = "206 Partial Content";
    let leak = "<Error><Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>AKIDSECRET</AWSAccessKeyId></Error>";
    let code = |code: &str| format!("<Error><Code>{code}</Code><Message>m</Message></Error>");
    let big = "x".repeat(1 << 20);
    for (kind, answer) in [
        // The server ignores the condition, or the range.
        (
            Kind::Changed,
            response(
                part,
                "Content-Range: bytes 0-3/10\r\nETag: \"e2\"\r\n",
                "0123",
            ),
        ),
        (
            Kind::Corrupt,
            response("200 OK", "ETag: \"e1\"\r\n", "0123456789"),
        ),
        (
            Kind::Corrupt,
            response(
                part,
                "Content-Range: bytes 1-4/10\r\nETag: \"e1\"\r\n",
                "1234",
            ),
        ),
        (Kind::Corrupt, response(part, "ETag: \"e1\"\r\n", "0123")),
        (
            Kind::Corrupt,
            response(
                part,
                "Content-Range: bytes x-y/z\r\nETag: \"e1\"\r\n",
                "0123",
            ),
        ),
        (
            Kind::Changed,
            response(
                part,
                "Content-Range: bytes 0-2/3\r\nETag: \"e1\"\r\n",
                "012",
            ),
        ),
        (
            Kind::Corrupt,
            response(
                part,
                "Content-Range: bytes 0-18446744073709551615/10\r\nETag: \"e1\"\r\n",
                "0123",
            ),
        ),
        (Kind::Corrupt, response(part, range, "012")),
        (Kind::Corrupt, response(part, range, "01234")),
        // Announced, but not sent.
        (
            Kind::Unavailable,
            response(part, range, "0123").replace("\r\n\r\n0123", "\r\n\r\n01"),
        ),
        (Kind::Unavailable, String::new()),
        (
            Kind::NotFound,
            response("404 Not Found", "", &code("NoSuchKey")),
        ),
        (Kind::Denied, response("403 Forbidden", "", leak)),
        (
            Kind::Denied,
            response("400 Bad Request", "", &code("ExpiredToken")),
        ),
        (
            Kind::Invalid,
            response("403 Forbidden", "", &code("InvalidObjectState")),
        ),
        (
            Kind::Invalid,
            response("301 Moved Permanently", "", &code("PermanentRedirect")),
        ),
        (Kind::Changed, response("412 Precondition Failed", "", "")),
        (Kind::Changed, response("416 Range Not Satisfiable", "", "")),
        (
            Kind::Throttled,
            response("503 Slow Down", "", &code("SlowDown")),
        ),
        (Kind::Throttled, response("429 Too Many Requests", "", "")),
        (
            Kind::Unavailable,
            response("503 Service Unavailable", "", ""),
        ),
        (
            Kind::Unavailable,
            response("500 Internal Server Error", "", &big),
        ),
    ] {
        let first = answer.lines().next().unwrap_or_default().to_owned();
        let error = error_of(answer, 0..4).await;
        assert_eq!(error.kind(), kind, "{first}: {error}");
        assert!(error.to_string().len() < 400, "{error}");
    }
}

#[tokio::test]
async fn the_wait_asked_for_is_passed_on() {
    for (value, wait) in [
        ("7", 7),
        ("999999", 3600),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
    ] {
        let answer = response("503 x", &format!("Retry-After: {value}\r\n"), "");
        let error = error_of(answer, 0..4).await;
        assert_eq!(error.kind(), SourceErrorKind::Throttled);
        assert_eq!(error.retry_after().map(|wait| wait.as_secs()), Some(wait));
    }
}

#[tokio::test]
async fn a_server_that_hangs_is_unavailable() {
    let source = origin(|_| {
        thread::sleep(std::time::Duration::from_secs(5));
        String::new()
    });
    let error = read(&source, 0..4).await.unwrap_err();
    assert_eq!(error.kind(), SourceErrorKind::Unavailable, "{error}");
}

#[tokio::test]
async fn objects_without_etags_are_pinned_by_their_time() {
    let source = origin(|head| {
        if head.contains("list-type") {
            page(&[("p/a", 4)], None).replace("<ETag>\"e\"</ETag>", "<Note>222</Note>")
        } else {
            let day = if head.contains("bytes=0-") { 1 } else { 2 };
            let (range, body) = if day == 1 {
                ("0-3", "0123")
            } else {
                ("1-3", "123")
            };
            let headers = format!(
                "Content-Range: bytes {range}/4\r\nLast-Modified: 0{day} Jan 2026 00:00:00 GMT\r\n"
            );
            response("206 Partial Content", &headers, body)
        }
    });
    let artifact = resolve(&source).await.unwrap();
    let location = artifact.objects[0].recipe.location().unwrap();
    assert_eq!(location.generation.as_deref(), Some("modified:1767225600"));
    assert!(source.read(location, 0..4).await.is_ok());
    let error = source.read(location, 1..4).await.err().unwrap();
    assert_eq!(error.kind(), SourceErrorKind::Changed, "{error}");
}

fn page(keys: &[(&str, u64)], token: Option<&str>) -> String {
    let mut body = String::from("<ListBucketResult>");
    for (key, size) in keys {
        body.push_str(&format!(
            "<Contents><Key>{key}</Key><Size>{size}</Size><ETag>\"e\"</ETag>\
             <LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        ));
    }
    if let Some(token) = token {
        body.push_str(&format!(
            "<NextContinuationToken>{token}</NextContinuationToken>"
        ));
    }
    body.push_str("</ListBucketResult>");
    response("200 OK", "", &body)
}

async fn resolve(source: &ObjectSource) -> Result<Artifact, SourceError> {
    source.resolve(&"s3://b/p/".parse().unwrap()).await
}

#[tokio::test]
async fn credentials_that_cannot_be_had_just_now_are_not_refused() {
    use SourceErrorKind as Kind;
    for (kind, status) in [
        (Kind::Unavailable, "503 Service Unavailable"),
        (Kind::Throttled, "429 Too Many Requests"),
        (Kind::Denied, "404 Not Found"),
    ] {
        // The metadata service of a machine in the cloud.
        let source = origin_opened(
            move |_| response(status, "", ""),
            |builder, url| builder.with_metadata_endpoint(url),
        );
        let error = resolve(&source).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(&status[..3]), "{error}");
        assert!(
            error.to_string().contains("cannot get credentials"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn listings_without_end_are_given_up() {
    for source in [
        origin(|_| page(&[("p/a", 1)], Some("same"))),
        origin(|head| page(&[], Some(&format!("{}", head.len() + 1)))),
    ] {
        let error = resolve(&source).await.unwrap_err();
        // The first repeats a key, too.
        assert!(
            matches!(
                error.kind(),
                SourceErrorKind::Corrupt | SourceErrorKind::Invalid
            ),
            "{error}"
        );
    }
}

#[tokio::test]
async fn listings_that_make_no_sense_are_refused() {
    for (kind, answer) in [
        (
            SourceErrorKind::Corrupt,
            response("200 OK", "", "<Nonsense"),
        ),
        (SourceErrorKind::Corrupt, response("200 OK", "", "SECRET?")),
        (
            SourceErrorKind::Invalid,
            page(&[("p/../../etc/passwd", 1)], None),
        ),
        (SourceErrorKind::Invalid, page(&[("p/a\u{7f}b", 1)], None)),
        (SourceErrorKind::Invalid, page(&[("p/a", u64::MAX)], None)),
        (
            SourceErrorKind::Invalid,
            page(&[("p/a", 1), ("p/a/b", 1)], None),
        ),
        (SourceErrorKind::NotFound, page(&[], None)),
        (SourceErrorKind::NotFound, page(&[("p", 0)], None)),
        // Outside of what was asked for.
        (SourceErrorKind::Corrupt, page(&[("q/a", 1)], None)),
    ] {
        let source = origin(move |_| answer.clone());
        let error = resolve(&source).await.expect_err("must fail");
        assert_eq!(error.kind(), kind, "{error}");
        assert!(!error.to_string().contains("SECRET"), "{error}");
    }
}
