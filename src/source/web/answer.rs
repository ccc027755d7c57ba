//! Whether an answer is what was asked for, and the errors where it is not.

use std::{error::Error as _, ops::Range, time::Duration};

use futures_util::{StreamExt as _, stream};
use reqwest::{
    Response, StatusCode,
    header::{self, HeaderMap},
};
use tokio::time::timeout;
use url::Url;

use super::{
    Pin,
    headers::{content_range, retry_after, text, total_of},
    host_of, strip_user_info,
};
use crate::source::{ByteStream, SourceError, SourceErrorKind as Kind};

/// An answer, its status not yet judged.
pub(super) struct Answer {
    pub(super) response: Response,
    /// Where it came from after redirects.
    pub(super) url: Url,
    /// Whether every hop stayed at the origin first asked.
    pub(super) at_origin: bool,
    /// The size of the whole object, as `inspect` found it.
    pub(super) size: Option<u64>,
}

/// The body of an answer to a range request, if it is what was asked for.
pub(super) fn ranged(
    what: &str,
    answer: Answer,
    pin: Pin<'_>,
    range: &Range<u64>,
    size: Option<u64>,
    stall: Duration,
) -> Result<ByteStream, SourceError> {
    let host = host_of(&answer.url);
    let fail = |kind, message: String| Err(SourceError::new(kind, what, message));
    let length = range.end - range.start;
    let headers = answer.response.headers();
    let total = match answer.response.status() {
        StatusCode::PARTIAL_CONTENT => match content_range(headers) {
            Some((found, total)) if found == *range => total,
            found => {
                let found = match found {
                    Some((found, _)) => format!("{}-{}", found.start, found.end - 1),
                    None => "no usable content-range".to_owned(),
                };
                let asked = format!("bytes {}-{}", range.start, range.end - 1);
                // A shorter object is another object.
                let kind = match total_of(headers) {
                    Some(total) if total < range.end => Kind::Changed,
                    _ => Kind::Corrupt,
                };
                return fail(kind, format!("{host} answered {asked} with {found}"));
            }
        },
        StatusCode::OK => answer.response.content_length(),
        _ => return Err(refusal(what, &answer)),
    };
    check_pin(what, &host, headers, pin, total)?;
    if let (Some(size), Some(total)) = (size, total)
        && size != total
    {
        let message = format!("{host} holds {total} bytes now, not {size}");
        return fail(Kind::Changed, message);
    }
    if is_encoded(headers) {
        return Err(encoded_error(what, headers));
    }
    let whole = range.start == 0 && total == Some(length);
    if answer.response.status() == StatusCode::OK && !whole {
        let message = format!("{host} does not support byte ranges (200 instead of 206)");
        return fail(Kind::Corrupt, message);
    }
    match answer.response.content_length() {
        Some(found) if found != length => fail(
            Kind::Corrupt,
            format!("{host} sends {found} bytes for a range of {length}"),
        ),
        _ => Ok(body(what, &host, answer.response, length, stall)),
    }
}

/// The body as a stream that ends without error only after exactly `length` bytes.
fn body(what: &str, host: &str, response: Response, length: u64, stall: Duration) -> ByteStream {
    struct State {
        response: Response,
        what: String,
        host: String,
        done: u64,
    }
    let state = State {
        response,
        what: what.to_owned(),
        host: host.to_owned(),
        done: 0,
    };
    let step = move |mut state: State| async move {
        let chunk = loop {
            match timeout(stall, state.response.chunk()).await {
                Ok(Ok(Some(chunk))) if chunk.is_empty() => {}
                other => break other,
            }
        };
        let (host, done) = (&state.host, state.done);
        let fail = |kind, message: String| Err(SourceError::new(kind, &*state.what, message));
        let ended = || format!("body from {host} ended after {done} of {length} bytes");
        match chunk {
            Ok(Ok(Some(chunk))) if chunk.len() as u64 > length - done => fail(
                Kind::Corrupt,
                format!("body from {host} is longer than {length} bytes"),
            ),
            Ok(Ok(Some(chunk))) => {
                state.done += chunk.len() as u64;
                Ok(Some((chunk, state)))
            }
            Ok(Ok(None)) if done == length => Ok(None),
            Ok(Ok(None)) => fail(Kind::Unavailable, ended()),
            Ok(Err(error)) => {
                let why = root_cause(&error.without_url());
                fail(Kind::Unavailable, format!("{}: {why}", ended()))
            }
            Err(_) => fail(
                Kind::Unavailable,
                format!("{host} stalled: no byte for {stall:?} after {done} of {length} bytes"),
            ),
        }
    };
    stream::try_unfold(state, step).boxed()
}

/// Whether the generation that answered is the one pinned.
fn check_pin(
    what: &str,
    host: &str,
    headers: &HeaderMap,
    pin: Pin<'_>,
    total: Option<u64>,
) -> Result<(), SourceError> {
    let compare = |name: &str, pinned: &str, found: Option<&str>| match found {
        Some(found) if found == pinned => Ok(()),
        Some(found) => {
            let found: String = found.chars().take(80).collect();
            let message =
                format!("{host} holds another generation now: {name} {found}, not {pinned}");
            Err(SourceError::new(Kind::Changed, what, message))
        }
        None => {
            let message = format!("{host} answered without the {name} it had before");
            Err(SourceError::new(Kind::Corrupt, what, message))
        }
    };
    match pin {
        Pin::Etag(pinned) => compare("etag", pinned, text(headers, header::ETAG)),
        Pin::Modified(pinned) => compare(
            "last-modified",
            pinned,
            text(headers, header::LAST_MODIFIED),
        ),
        Pin::Size(size) if total.is_some_and(|total| total != size) => {
            let message = format!("{host} holds {} bytes now, not {size}", total.unwrap_or(0));
            Err(SourceError::new(Kind::Changed, what, message))
        }
        Pin::Size(_) | Pin::Free => Ok(()),
    }
}

/// Where the answer redirects to, if it does.
pub(super) fn redirect(what: &str, answer: &Answer) -> Result<Option<Url>, SourceError> {
    if !matches!(
        answer.response.status().as_u16(),
        301 | 302 | 303 | 307 | 308
    ) {
        return Ok(None);
    }
    let host = host_of(&answer.url);
    let target = text(answer.response.headers(), header::LOCATION);
    let Some(mut next) = target.and_then(|target| answer.url.join(target).ok()) else {
        let message = format!("{host} redirects to no usable location");
        return Err(SourceError::new(Kind::Corrupt, what, message));
    };
    if !matches!(next.scheme(), "http" | "https") || next.host_str().is_none() {
        let message = format!("{host} redirects to a {} url", next.scheme());
        return Err(SourceError::new(Kind::Invalid, what, message));
    }
    if answer.url.scheme() == "https" && next.scheme() != "https" {
        let message = format!("{host} redirects from https to http, which is not followed");
        return Err(SourceError::new(Kind::Invalid, what, message));
    }
    strip_user_info(&mut next);
    next.set_fragment(None);
    Ok(Some(next))
}

/// The error for a status that is not the one hoped for.
pub(super) fn refusal(what: &str, answer: &Answer) -> SourceError {
    let status = answer.response.status();
    let wait = retry_after(status, answer.response.headers());
    let host = host_of(&answer.url);
    let (kind, why) = match status.as_u16() {
        401 | 403 => (Kind::Denied, ""),
        407 => (Kind::Denied, " (the proxy wants credentials)"),
        404 | 410 => (Kind::NotFound, ""),
        412 => (Kind::Changed, " (it holds another generation now)"),
        416 => (Kind::Changed, " (it is shorter now)"),
        429 => (Kind::Throttled, ""),
        503 if wait.is_some() => (Kind::Throttled, ""),
        408 | 425 | 500..=599 => (Kind::Unavailable, ""),
        400..=499 => (Kind::Invalid, ""),
        _ => (Kind::Corrupt, ", which was not asked for"),
    };
    SourceError::new(kind, what, format!("{host} answered {status}{why}")).with_retry_after(wait)
}

/// The error for a request without an answer.
pub(super) fn transport(what: &str, host: &str, error: reqwest::Error) -> SourceError {
    let error = error.without_url();
    let why = root_cause(&error);
    let message = match () {
        () if error.is_connect() && error.is_timeout() => {
            format!("cannot connect to {host}: timed out")
        }
        () if error.is_connect() => format!("cannot connect to {host}: {why}"),
        () => format!("connection to {host} broke: {why}"),
    };
    SourceError::new(Kind::Unavailable, what, message)
}

/// Whether the connection broke before an answer began, after it had stood.
pub(super) fn is_broken(error: &reqwest::Error) -> bool {
    error.is_request() && !error.is_connect() && !error.is_timeout() && !error.is_builder()
}

/// The innermost error, which says what happened; the outer ones say where in the client.
pub(super) fn root_cause(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(inner) = next {
        text = inner.to_string();
        next = inner.source();
    }
    text
}

/// Whether an error from a remembered redirect may only mean that it has expired.
pub(super) const fn is_stale(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Denied | Kind::NotFound | Kind::Changed | Kind::Invalid
    )
}

pub(super) fn is_encoded(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_ENCODING)
        .is_some_and(|value| !value.as_bytes().eq_ignore_ascii_case(b"identity"))
}

pub(super) fn encoded_error(what: &str, headers: &HeaderMap) -> SourceError {
    let how: String = text(headers, header::CONTENT_ENCODING)
        .unwrap_or("an unknown encoding")
        .chars()
        .take(40)
        .collect();
    let message = format!("the origin sends it encoded ({how}), though asked not to");
    SourceError::new(Kind::Corrupt, what, message)
}
