//! One request, one answer.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::Frame,
    header::{self, HeaderName, HeaderValue},
};
use sha2::{Digest as _, Sha256};

use super::{Mirror, parse_range};
use crate::{
    chunk::CHUNK_SIZE,
    digest::Digest,
    fetch::{Class, FetchError, FetchErrorKind, Handle},
    node::{Node, NodeError},
    reference::{Locator, OciRef, Reference},
    source::{Keys, SourceErrorKind, VIA},
    store::Reservation,
};

pub(super) type Answer = Response<UnsyncBoxBody<Bytes, std::io::Error>>;

/// What a path asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked<'p> {
    /// `/v2/`: whether this is a registry.
    Base,
    /// `/v2/<name>/manifests/<tag or digest>`
    Manifest { name: &'p str, reference: &'p str },
    /// `/v2/<name>/blobs/<digest>`
    Blob { name: &'p str, digest: &'p str },
}

/// An error of the distribution-spec ("Error Codes").
struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
        }
    }
}

/// Answers one request.
pub(super) async fn answer<B>(mirror: &Mirror, request: &Request<B>) -> Answer {
    let head = request.method() == Method::HEAD;
    let given = match request.method() {
        _ if asks_itself(&mirror.node, request.headers()) => Err(Refusal::new(
            StatusCode::NOT_FOUND,
            "NAME_UNKNOWN",
            "this is the mirror of the node that asks: it has nothing that the node has not",
        )),
        &Method::GET | &Method::HEAD => give(mirror, request, head).await,
        _ => Err(Refusal::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "UNSUPPORTED",
            "this mirror can only be read",
        )),
    };
    let mut answer = given.unwrap_or_else(|refusal| refuse(&refusal, head));
    let version = HeaderValue::from_static("registry/2.0");
    let name = HeaderName::from_static("docker-distribution-api-version");
    answer.headers_mut().insert(name, version);
    answer
}

/// Whether it is this node that asks, since its registries have this mirror.
fn asks_itself(node: &Node, headers: &HeaderMap) -> bool {
    let via = headers.get(VIA);
    via.is_some_and(|via| via.as_bytes() == node.store().id().as_bytes())
}

async fn give<B>(mirror: &Mirror, request: &Request<B>, head: bool) -> Result<Answer, Refusal> {
    let not_found = |what: &str| Refusal::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", what);
    let asked = parse(request.uri().path())
        .ok_or_else(|| not_found("only /v2/<name>/manifests/ and /v2/<name>/blobs/ are here"))?;
    let (name, wanted) = match asked {
        Asked::Base => return Ok(whole(HeaderMap::new(), Bytes::from_static(b"{}"), head)),
        Asked::Manifest { name, reference } => (name, reference),
        Asked::Blob { name, digest } => (name, digest),
    };
    let registry = namespace(request.uri().query())
        .or_else(|| mirror.default_registry.clone())
        .ok_or_else(|| {
            not_found("which registry is meant? say ?ns=REGISTRY, as containerd does, or set mirror.default_registry")
        })?;
    let separator = if wanted.contains(':') { '@' } else { ':' };
    let reference: Reference = format!("oci://{registry}/{name}{separator}{wanted}")
        .parse()
        .map_err(|error| {
            Refusal::new(StatusCode::BAD_REQUEST, "NAME_INVALID", format!("{error}"))
        })?;
    let Locator::Oci(oci) = &reference.locator else {
        return Err(not_found("is in no registry"));
    };
    let sent = request.headers().get(header::AUTHORIZATION);
    let visitor = sent
        .and_then(|sent| sent.to_str().ok())
        .and_then(|sent| Keys::of_header(&oci.registry, sent));
    let invites = mirror.invites && visitor.is_none();
    let given = match asked {
        Asked::Blob { .. } => blob(&mirror.node, oci, visitor, request.headers(), head).await,
        _ => manifest(&mirror.node, oci, visitor, head).await,
    };
    given.map_err(|refusal| match refusal.status {
        // "No matching credentials" of RFC 9110 (11.6.1); with some it is "not enough".
        StatusCode::FORBIDDEN if invites => Refusal {
            status: StatusCode::UNAUTHORIZED,
            code: "UNAUTHORIZED",
            ..refusal
        },
        _ => refusal,
    })
}

async fn manifest(
    node: &Node,
    oci: &OciRef,
    visitor: Option<Keys>,
    head: bool,
) -> Result<Answer, Refusal> {
    let found = node
        .manifest(oci, visitor)
        .await
        .map_err(|error| failed(&error, "MANIFEST_UNKNOWN"))?;
    let mut headers = HeaderMap::new();
    set(&mut headers, header::CONTENT_TYPE, &found.media_type);
    digest_headers(&mut headers, &found.digest);
    Ok(whole(headers, Bytes::copy_from_slice(&found.bytes), head))
}

async fn blob(
    node: &Node,
    oci: &OciRef,
    visitor: Option<Keys>,
    asked: &HeaderMap,
    head: bool,
) -> Result<Answer, Refusal> {
    let digest: Digest = oci.wanted().parse().map_err(|_| {
        Refusal::new(
            StatusCode::BAD_REQUEST,
            "DIGEST_INVALID",
            "a blob is named by its sha256 digest",
        )
    })?;
    let handle = node
        .blob(oci, &digest, visitor)
        .await
        .map_err(|error| failed(&error, "BLOB_UNKNOWN"))?;
    let size = handle.size();
    let mut headers = HeaderMap::new();
    set(
        &mut headers,
        header::CONTENT_TYPE,
        "application/octet-stream",
    );
    set(&mut headers, header::ACCEPT_RANGES, "bytes");
    digest_headers(&mut headers, &digest);
    let range = match asked.get(header::RANGE).and_then(|r| r.to_str().ok()) {
        None => None,
        Some(text) => parse_range(text, size).map_err(|()| {
            let message = format!("the blob has {size} bytes");
            Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID", message)
        })?,
    };
    let mut status = StatusCode::OK;
    if let Some(range) = &range {
        status = StatusCode::PARTIAL_CONTENT;
        let text = format!("bytes {}-{}/{size}", range.start, range.end - 1);
        set(&mut headers, header::CONTENT_RANGE, &text);
    }
    let range = range.unwrap_or(0..size);
    set(
        &mut headers,
        header::CONTENT_LENGTH,
        &(range.end - range.start).to_string(),
    );
    let body = match head {
        true => Full::default().map_err(|e| match e {}).boxed_unsync(),
        false => {
            let room = node.room_for(oci, &handle).await;
            let room = room.map_err(|error| failed(&error, "BLOB_UNKNOWN"))?;
            stream_of(Passed::new(handle, digest, room, range))
        }
    };
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    *answer.headers_mut() = headers;
    Ok(answer)
}

/// A blob on its way to a client. The last bytes of a whole one are held back until it is verified, so that
/// nobody takes a wrong one for complete.
struct Passed {
    handle: Arc<Handle>,
    digest: Digest,
    /// `None`: the store has no room for it.
    room: Option<Reservation>,
    range: Range<u64>,
    /// Of all that was passed on, in case the store cannot verify it; none where it has, or where it is not
    /// the whole that was asked for.
    hash: Option<Sha256>,
}

impl Passed {
    fn new(
        handle: Arc<Handle>,
        digest: Digest,
        room: Option<Reservation>,
        range: Range<u64>,
    ) -> Self {
        let is_whole = range == (0..handle.size());
        let hash = (is_whole && !handle.is_verified()).then(Sha256::new);
        Self {
            handle,
            digest,
            room,
            range,
            hash,
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, FetchError> {
        let (at, end) = (self.range.start, self.range.end);
        if at >= end {
            return Ok(None);
        }
        let is_last = at + CHUNK_SIZE >= end;
        let mut kept = self.room.is_some();
        if kept && is_last && self.hash.is_some() {
            match self.handle.ensure(Class::Demand).await {
                Ok(_) => self.hash = None,
                // What has passed tells, too.
                Err(error)
                    if matches!(error.kind(), FetchErrorKind::NoSpace | FetchErrorKind::Disk) =>
                {
                    kept = false;
                }
                Err(error) => return Err(error),
            }
        }
        let len = (end - at).min(CHUNK_SIZE) as usize;
        let piece = match kept {
            true => self.handle.read(at, len).await?,
            false => self.handle.read_past_disk(at, len).await?,
        };
        if let Some(hash) = &mut self.hash {
            hash.update(&piece);
        }
        self.range.start += piece.len() as u64;
        if self.range.start >= end
            && let Some(hash) = self.hash.take()
        {
            let found = Digest::from_bytes(hash.finalize().into());
            if found != self.digest {
                return Err(self.handle.is_wrong(&self.digest, &found));
            }
        }
        Ok((!piece.is_empty()).then_some(piece))
    }
}

/// The bytes as they arrive.
fn stream_of(blob: Passed) -> UnsyncBoxBody<Bytes, std::io::Error> {
    let pieces = stream::try_unfold(blob, |mut blob| async move {
        let piece = blob.next().await.map_err(std::io::Error::other)?;
        Ok(piece.map(|piece| (Frame::data(piece), blob)))
    });
    StreamBody::new(pieces).boxed_unsync()
}

/// What an error of the node is to a client.
fn failed(error: &NodeError, unknown: &'static str) -> Refusal {
    let status = match error {
        NodeError::Resolve { source, .. } => match source.kind() {
            SourceErrorKind::NotFound | SourceErrorKind::Changed => StatusCode::NOT_FOUND,
            SourceErrorKind::Denied => StatusCode::FORBIDDEN,
            SourceErrorKind::Throttled => StatusCode::TOO_MANY_REQUESTS,
            SourceErrorKind::Unavailable | SourceErrorKind::Corrupt => StatusCode::BAD_GATEWAY,
            SourceErrorKind::Invalid => StatusCode::NOT_FOUND,
        },
        NodeError::Fetch { source, .. } => match source.kind() {
            FetchErrorKind::NotFound => StatusCode::NOT_FOUND,
            FetchErrorKind::Denied => StatusCode::FORBIDDEN,
            _ => StatusCode::BAD_GATEWAY,
        },
        NodeError::Unknown(_) => StatusCode::NOT_FOUND,
        NodeError::Image { .. } | NodeError::Store(_) | NodeError::Misled { .. } => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    };
    let code = match status {
        StatusCode::NOT_FOUND => unknown,
        StatusCode::FORBIDDEN => "DENIED",
        StatusCode::TOO_MANY_REQUESTS => "TOOMANYREQUESTS",
        _ => "UNKNOWN",
    };
    let mut message = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        message = format!("{message}: {cause}");
        next = cause.source();
    }
    if status.is_server_error() {
        tracing::warn!(error = message, "the mirror cannot answer");
    }
    Refusal::new(status, code, message)
}

fn refuse(refusal: &Refusal, head: bool) -> Answer {
    let body = serde_json::json!({
        "errors": [{ "code": refusal.code, "message": refusal.message }]
    });
    let mut headers = HeaderMap::new();
    set(&mut headers, header::CONTENT_TYPE, "application/json");
    match refusal.status {
        StatusCode::METHOD_NOT_ALLOWED => set(&mut headers, header::ALLOW, "GET, HEAD"),
        StatusCode::UNAUTHORIZED => set(
            &mut headers,
            header::WWW_AUTHENTICATE,
            "Basic realm=\"the registry behind this mirror\"",
        ),
        _ => {}
    }
    let mut answer = whole(headers, body.to_string().into(), head);
    *answer.status_mut() = refusal.status;
    answer
}

fn whole(mut headers: HeaderMap, bytes: Bytes, head: bool) -> Answer {
    set(
        &mut headers,
        header::CONTENT_LENGTH,
        &bytes.len().to_string(),
    );
    let bytes = if head { Bytes::new() } else { bytes };
    let mut answer = Response::new(Full::new(bytes).map_err(|e| match e {}).boxed_unsync());
    *answer.headers_mut() = headers;
    answer
}

fn digest_headers(headers: &mut HeaderMap, digest: &Digest) {
    let name = HeaderName::from_static("docker-content-digest");
    set(headers, name, &digest.to_string());
    set(headers, header::ETAG, &format!("\"{digest}\""));
}

/// What fits no header is left out.
fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = value.parse() {
        headers.insert(name, value);
    }
}

fn parse(path: &str) -> Option<Asked<'_>> {
    let rest = path.strip_prefix("/v2")?;
    let rest = rest.strip_prefix('/').unwrap_or(rest);
    if rest.is_empty() {
        return Some(Asked::Base);
    }
    // Names may hold the words themselves: the last ones count.
    if let Some((name, digest)) = rest.rsplit_once("/blobs/") {
        return Some(Asked::Blob { name, digest });
    }
    let (name, reference) = rest.rsplit_once("/manifests/")?;
    Some(Asked::Manifest { name, reference })
}

/// The registry in the query: `ns=`.
fn namespace(query: Option<&str>) -> Option<String> {
    let pairs = url::form_urlencoded::parse(query?.as_bytes());
    let found = pairs.into_iter().find(|(key, _)| key == "ns");
    found.map(|(_, value)| value.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_corpus() {
        crate::corpus::replay("corpus/mirror", |input| {
            for line in String::from_utf8_lossy(input).lines() {
                let (path, query) = line.split_once('?').unwrap_or((line, ""));
                parse(path);
                namespace(Some(query));
                if let Ok(Some(range)) = parse_range(line, 1000) {
                    assert!(range.start < range.end && range.end <= 1000, "{line}");
                }
            }
        });
    }

    #[test]
    fn paths() {
        let manifest = |name, reference| Some(Asked::Manifest { name, reference });
        let blob = |name, digest| Some(Asked::Blob { name, digest });
        assert_eq!(parse("/v2/"), Some(Asked::Base));
        assert_eq!(parse("/v2"), Some(Asked::Base));
        assert_eq!(parse("/v2/a/b/manifests/latest"), manifest("a/b", "latest"));
        assert_eq!(parse("/v2/a/blobs/sha256:00"), blob("a", "sha256:00"));
        assert_eq!(
            parse("/v2/a/manifests/b/manifests/c"),
            manifest("a/manifests/b", "c")
        );
        assert_eq!(parse("/v2/a/tags/list"), None);
        assert_eq!(parse("/v1/"), None);
        assert_eq!(namespace(Some("ns=docker.io")), Some("docker.io".into()));
        assert_eq!(namespace(Some("a=1&ns=h%3A5000")), Some("h:5000".into()));
        assert_eq!(namespace(Some("x=1")), None);
    }
}
