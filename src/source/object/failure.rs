//! From errors of `object_store` to [`SourceError`]s.
//!
//! Their texts are not shown: they quote whole answers, and an S3 answer about a bad signature
//! repeats the access key. Shown are the status, the provider's error code, and the innermost
//! cause of a failed connection.

use std::{error::Error as StdError, time::Duration};

use object_store::{
    Error,
    client::{HttpError, HttpErrorKind},
};
use reqwest::StatusCode;

use super::{
    super::{SourceError, SourceErrorKind},
    transport::{Answer, Probe},
};

const REGION: &str = "set AWS_REGION to the region of the bucket";
const CREDENTIALS: &str = "set credentials for it in the environment; for public content set \
                           AWS_SKIP_SIGNATURE, GOOGLE_SKIP_SIGNATURE or AZURE_SKIP_SIGNATURE=true";
const CERTIFICATES: &str =
    "name the certificate authority of this server in SSL_CERT_FILE or, for S3, AWS_CA_BUNDLE";
const ARCHIVED: &str = "restore the object from its archive tier first";

/// What `error` means for `what`. `resolving`: it is asked by a person or a plan, so that credentials which
/// are missing are final, while in the middle of a transfer their provider is likely to be down for a moment.
/// Nobody there to connect to means that there are none: the last resort is a service of the cloud's machines.
pub(super) fn explain(what: String, error: &Error, probe: &Probe, resolving: bool) -> SourceError {
    let answer = probe.answer();
    let http = cause::<HttpError>(error);
    let (kind, message, hint) = match (answer.status, http) {
        (Some(status), _) if !status.is_success() => status_means(status, error, &answer),
        (Some(_), Some(http)) if http.kind() != HttpErrorKind::Decode => (
            SourceErrorKind::Unavailable,
            format!("the answer broke off: {}", innermost(http)),
            None,
        ),
        (Some(_), _) => answer_cannot_be_used(error, !resolving),
        (None, Some(http)) if answer.sent => {
            let message = match http.kind() {
                HttpErrorKind::Connect => "cannot connect",
                HttpErrorKind::Timeout => "no answer in time",
                _ => "the request failed",
            };
            let cause = innermost(http);
            let hint = cause.contains("certificate").then_some(CERTIFICATES);
            (
                SourceErrorKind::Unavailable,
                format!("{message}: {cause}"),
                hint,
            )
        }
        (None, http) => {
            let status = provider_status(error);
            let kind = match (http, status) {
                (_, Some(429)) => SourceErrorKind::Throttled,
                (_, Some(500..)) => SourceErrorKind::Unavailable,
                (Some(http), _) if !resolving || http.kind() != HttpErrorKind::Connect => {
                    SourceErrorKind::Unavailable
                }
                _ => SourceErrorKind::Denied,
            };
            let cause = match (http, status) {
                (Some(http), _) => format!(": {}", innermost(http)),
                (None, Some(status)) => format!(": their provider answered {status}"),
                (None, None) => String::new(),
            };
            (
                kind,
                format!("cannot get credentials{cause}"),
                Some(CREDENTIALS),
            )
        }
    };
    let error = SourceError::new(kind, what, message).with_retry_after(answer.retry_after);
    match hint {
        Some(hint) => error.with_hint(hint),
        None => error,
    }
}

/// No answer began within `limit`.
pub(super) fn slow(what: String, limit: Duration) -> SourceError {
    SourceError::new(
        SourceErrorKind::Unavailable,
        what,
        format!("no answer within {} s", limit.as_secs()),
    )
}

type Meaning = (SourceErrorKind, String, Option<&'static str>);

/// The meaning of an error status; codes as in the error references of S3, GCS (XML) and Azure.
fn status_means(status: StatusCode, error: &Error, answer: &Answer) -> Meaning {
    use SourceErrorKind as Kind;
    let code = code(error);
    let code = code.as_deref().unwrap_or_default();
    let (kind, hint) = match (status.as_u16(), code) {
        (_, "SlowDown" | "ServerBusy" | "RequestLimitExceeded") => (Kind::Throttled, None),
        (_, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired")
        | (400, "InvalidAuthenticationInfo")
        | (409, "PublicAccessNotPermitted") => (Kind::Denied, None),
        (403, "InvalidObjectState") | (409, "BlobArchived") => (Kind::Invalid, Some(ARCHIVED)),
        (403, "RequestTimeTooSkewed") => (Kind::Denied, Some("set the clock of this machine")),
        (300..=399, _) | (400, "AuthorizationHeaderMalformed") => (Kind::Invalid, Some(REGION)),
        (404, _) => (Kind::NotFound, None),
        (401 | 403, _) => (Kind::Denied, None),
        (412 | 416, _) => (Kind::Changed, None),
        (429, _) => (Kind::Throttled, None),
        (503, _) if answer.retry_after.is_some() => (Kind::Throttled, None),
        (400, "RequestTimeout") | (408, _) | (500.., _) => (Kind::Unavailable, None),
        _ => (Kind::Invalid, None),
    };
    let reason = status.canonical_reason().unwrap_or("status");
    let mut message = format!("{} {reason}", status.as_u16());
    if !code.is_empty() {
        message = format!("{message} ({code})");
    }
    (kind, message, hint)
}

/// A good status, but not a good answer: names of keys, ranges, XML.
fn answer_cannot_be_used(error: &Error, is_range: bool) -> Meaning {
    if let Error::InvalidPath { source } = error {
        let source: String = source.to_string().chars().take(300).collect();
        return (
            SourceErrorKind::Invalid,
            format!("lists a key that cannot be a file name: {source}"),
            Some("name a smaller part of the bucket, without that key"),
        );
    }
    let mut message = "the answer breaks the protocol".to_owned();
    // What is said about a range comes from its headers; about a listing, it would quote the body.
    if is_range {
        let why: String = innermost(error).chars().take(200).collect();
        message = format!("{message}: {why}");
    }
    (SourceErrorKind::Corrupt, message, None)
}

/// The provider's error code from the XML that `error` quotes.
fn code(error: &Error) -> Option<String> {
    let text = error.to_string();
    let (_, rest) = text.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    let plain = code.len() <= 64 && code.bytes().all(|c| c.is_ascii_alphanumeric());
    plain.then(|| code.to_owned())
}

/// The status that a provider of credentials answered with, in the words of `object_store`.
fn provider_status(error: &Error) -> Option<u16> {
    let text = error.to_string();
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

fn cause<'e, E: StdError + 'static>(error: &'e (dyn StdError + 'static)) -> Option<&'e E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<E>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

fn innermost(error: &(dyn StdError + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
