//! References: what a user writes to name content. Plain values, no I/O.

use std::{fmt, str::FromStr};

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
}

/// A bucket (or container) and a prefix or key in it, without leading slash.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Bucket {
    pub bucket: String,
    pub prefix: String,
}

/// An HTTP URL whose secret parts are kept apart.
#[derive(Debug, Clone)]
pub struct HttpUrl {
    /// The URL with secret query values and user info removed.
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

/// A value that is never shown.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// Wraps `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
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
