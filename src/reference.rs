//! References: what a user writes to name content. Plain values, no I/O.
//!
//! Invariants of a parsed [`Reference`]: no control characters, no `..` components, at most
//! [`MAX_REFERENCE`] bytes in its canonical form, globs that compile. `Display` is canonical: it
//! parses to an equal value and holds no secret. Called by everyone who takes a reference from a
//! user; sources read its fields.

mod filter;
mod oci;
mod parse;

use std::fmt;

use zeroize::Zeroizing;

pub use self::{
    filter::Matcher,
    oci::{OciRef, Platform},
    parse::{ParseReferenceError, redact},
};

/// Longest reference, in bytes.
pub const MAX_REFERENCE: usize = 4096;
/// Most globs of one reference.
pub const MAX_GLOBS: usize = 64;
/// Longest glob, in bytes.
pub const MAX_GLOB: usize = 1024;

/// A parsed reference. `Display` gives the canonical form, which parses to an equal value and
/// carries no secret.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Where the content is.
    pub locator: Locator,
    /// Which of its files are meant.
    pub filter: Filter,
}

/// Where content is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Locator {
    /// `s3://bucket/prefix/`: a prefix (ends in `/` or is empty) or one key.
    S3(Bucket),
    /// `gs://bucket/prefix/`.
    Gcs(Bucket),
    /// `az://container/prefix/`; the account comes from the environment.
    Azure(Bucket),
    /// `http(s)://host/path`: a file, or a directory where the path ends in `/`.
    Http(HttpUrl),
    /// `file:///dir`: a file or directory, absolute.
    File(String),
    /// `hf://[datasets/|spaces/]org/name[@revision][/subdir]`.
    Hub(HubRepo),
    /// `oci://registry/repository[:tag][@digest]`: a model or container image in a registry.
    Oci(OciRef),
}

/// A bucket (or container) and a prefix or key in it, without leading slash.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Bucket {
    /// Name of the bucket or container.
    pub bucket: String,
    /// A prefix (ends in `/` or is empty), or a key that may also turn out to be a prefix.
    pub prefix: String,
}

/// An HTTP URL whose secret parts are kept apart.
#[derive(Debug, Clone)]
pub struct HttpUrl {
    /// The URL without user info, secret-looking query parameters and fragment.
    pub public: url::Url,
    /// The URL as given, where it holds a secret. Never displayed, compared or stored.
    pub secret: Option<Secret>,
}

/// A repository on the Hugging Face Hub.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HubRepo {
    pub kind: HubKind,
    /// `org/name`.
    pub id: String,
    /// Branch, tag or commit; `None` is `main`.
    pub revision: Option<String>,
    /// Directory or file within the repository, without slashes at its ends; empty for all.
    pub path: String,
}

/// Kinds of repository on the Hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HubKind {
    Model,
    Dataset,
    Space,
}

/// Include and exclude globs (`?include=*.safetensors&exclude=*.bin`, each may be repeated).
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Filter {
    pub include: Vec<String>,
    pub exclude: Vec<String>,
}

/// A value that is never shown, and overwritten in memory when it is not needed any more.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Locator {
    /// What kind of place it is, in a word.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::S3(_) => "s3",
            Self::Gcs(_) => "gcs",
            Self::Azure(_) => "azure",
            Self::Http(_) => "http",
            Self::File(_) => "file",
            Self::Hub(repo) => match repo.kind {
                HubKind::Model => "hub model",
                HubKind::Dataset => "hub dataset",
                HubKind::Space => "hub space",
            },
            Self::Oci(_) => "registry",
        }
    }
}

impl Locator {
    /// Who answers for what is there: a bucket, a repository, a host, a directory.
    pub fn origin(&self) -> String {
        match self {
            Self::S3(bucket) => format!("s3://{}", bucket.bucket),
            Self::Gcs(bucket) => format!("gs://{}", bucket.bucket),
            Self::Azure(bucket) => format!("az://{}", bucket.bucket),
            Self::File(path) => format!("file://{path}"),
            Self::Http(url) => url.public.origin().ascii_serialization(),
            Self::Hub(repo) => format!("hf://{}/{}", repo.kind.plural(), repo.id),
            Self::Oci(oci) => format!("oci://{}/{}", oci.registry, oci.repository),
        }
    }
}

impl HubKind {
    /// As the Hub says it of many.
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
            Self::Space => "spaces",
        }
    }
}

impl Reference {
    /// The URL as it was given, where it holds a secret that `Display` leaves out.
    pub fn secret(&self) -> Option<&str> {
        match &self.locator {
            Locator::Http(HttpUrl { secret, .. }) => Some(secret.as_ref()?.expose()),
            _ => None,
        }
    }

    /// The same reference with the secret of a URL that is equal but for it.
    ///
    /// # Errors
    /// A URL that is none, or that means something else.
    pub fn with_secret(mut self, url: &str) -> Result<Self, ParseReferenceError> {
        let other: Self = url.parse()?;
        if let (Locator::Http(mine), Locator::Http(theirs)) = (&mut self.locator, other.locator)
            && mine == &theirs
        {
            mine.secret = theirs.secret;
        }
        Ok(self)
    }
}

impl Secret {
    /// Wraps `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(Zeroizing::new(text.into()))
    }

    /// The text, for use in a request.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl PartialEq for HttpUrl {
    fn eq(&self, other: &Self) -> bool {
        self.public == other.public
    }
}

impl Eq for HttpUrl {}

impl std::hash::Hash for HttpUrl {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.public.hash(state);
    }
}
