//! Sources: where references resolve and bytes come from. Knows no disk.
//!
//! A [`Source`] resolves a reference to an [`Artifact`] and reads pinned byte ranges. It neither
//! retries nor caches content: one room above does both. Every error carries a
//! [`SourceErrorKind`], which decides about retries, and names the object and the host; no error
//! carries a secret.

use std::{ops::Range, time::Duration};

use bytes::Bytes;
use futures_util::stream::BoxStream;

use crate::{
    reference::Reference,
    tree::{Artifact, Location},
};

/// The body of one range read: at most the bytes asked for, in order.
pub type ByteStream = BoxStream<'static, Result<Bytes, SourceError>>;

/// A place that resolves references and reads byte ranges.
#[async_trait::async_trait]
pub trait Source: Send + Sync + std::fmt::Debug {
    /// Resolves `reference` to an immutable artifact. Fetches no content beyond small metadata.
    ///
    /// # Errors
    /// What is not there, not allowed, not reachable, or malformed.
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError>;

    /// Reads bytes `range` (absolute at the location: the caller has added `location.offset`) of
    /// the generation that `location` is pinned to. The range is never empty.
    ///
    /// # Errors
    /// [`SourceErrorKind::Changed`] where the origin holds another generation now;
    /// [`SourceErrorKind::Corrupt`] where the answer is not the range asked for.
    async fn read(&self, location: &Location, range: Range<u64>)
    -> Result<ByteStream, SourceError>;
}

/// What a source error means for whoever asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceErrorKind {
    /// It is not there (404, no such revision). Final.
    NotFound,
    /// Credentials are missing, wrong or not enough (401, 403). Final once refreshed.
    Denied,
    /// Asked too often (429, 503 with `Retry-After`). Wait, then again.
    Throttled,
    /// Down, slow, reset, 5xx, DNS. Again.
    Unavailable,
    /// The origin holds another generation than the one pinned (412, other etag). Final.
    Changed,
    /// The answer breaks the protocol: short or long body, wrong range, not what was asked. Again.
    Corrupt,
    /// The reference, a listing or the settings cannot be used. Final.
    Invalid,
}

/// Why a source could not answer.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {message}")]
pub struct SourceError {
    kind: SourceErrorKind,
    /// The object and the host.
    what: String,
    message: String,
    retry_after: Option<Duration>,
}

impl SourceError {
    /// An error about `what` (object and host, no secrets).
    pub fn new(kind: SourceErrorKind, what: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            kind,
            what: what.into(),
            message: message.into(),
            retry_after: None,
        }
    }

    /// With the wait that the origin asked for.
    #[must_use]
    pub fn with_retry_after(mut self, wait: Option<Duration>) -> Self {
        self.retry_after = wait;
        self
    }

    /// What it means.
    pub const fn kind(&self) -> SourceErrorKind {
        self.kind
    }

    /// How long the origin asked to wait.
    pub const fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// What to try, for a person; `None` where the message says it all.
    pub fn hint(&self) -> Option<&'static str> {
        None
    }
}
