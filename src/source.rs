//! Sources: where references resolve and bytes come from. Knows no disk.
//!
//! A [`Source`] resolves a reference to an [`Artifact`] and reads pinned byte ranges. It caches no content, and
//! a range that fails is asked for again in the room above; what resolving asks, here, where whoever resolves
//! has the patience (`retry`). Every error carries a
//! [`SourceErrorKind`], which decides about retries, and names the object and the host; no error
//! carries a secret. Nothing here survives a crash or needs to. [`Sources`] is how the rooms above
//! come by a source.

mod file;
mod http;
mod hub;
mod listing;
mod object;
mod oci;
mod own;
mod retry;
mod web;

pub use self::own::{AwsKeys, Credentials, Keys};
pub(crate) use self::{
    oci::{model_of, tarwalk},
    retry::{Retry, asked, patiently},
};

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::SocketAddr,
    num::{NonZeroU64, NonZeroUsize},
    ops::Range,
    path::PathBuf,
    sync::{Arc, Once, Weak},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::stream::BoxStream;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::{
    digest::Digest,
    reference::{Locator, Platform, Reference, Secret},
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

    /// Who answers for what is read here, as [`Locator::origin`] says it: content that nobody has
    /// verified is for nobody who asked another.
    fn origin(&self) -> String;

    /// Whether what is read here waits for other objects of the same engine, as files in a layer do for
    /// the layer: such reads must not hold what those need.
    fn waits_for_objects(&self) -> bool {
        false
    }

    /// Reads bytes `range` (absolute at the location: the caller has added `location.offset`) of
    /// the generation that `location` is pinned to. The range is never empty.
    ///
    /// # Errors
    /// [`SourceErrorKind::Changed`] where the origin holds another generation now;
    /// [`SourceErrorKind::Corrupt`] where the answer is not the range asked for.
    async fn read(&self, location: &Location, range: Range<u64>)
    -> Result<ByteStream, SourceError>;

    /// The layers of `reference`, where what it means lies in layers that have to be unpacked
    /// first; `resolve` refuses such a reference. A layer is read as `sha256:<hex>`. `None`: call
    /// [`Source::resolve`].
    ///
    /// # Errors
    /// As [`Source::resolve`].
    async fn layered(&self, _reference: &Reference) -> Result<Option<Layered>, SourceError> {
        Ok(None)
    }

    /// As [`Source::layered`], and of a model whose layers need no unpacking, too: for one that
    /// [`Source::resolve`] cannot read in place ([`SourceError::needs_unpacking`]).
    ///
    /// # Errors
    /// As [`Source::resolve`].
    async fn layers(&self, reference: &Reference) -> Result<Option<Layered>, SourceError> {
        self.layered(reference).await
    }

    /// A manifest or index of the repository, by tag or digest, as its registry holds it; its digest
    /// is computed, and the one that was asked for.
    ///
    /// # Errors
    /// What the registry says; a source that is no registry.
    async fn manifest(&self, wanted: &str) -> Result<ManifestBytes, SourceError> {
        Err(SourceError::no_registry(wanted))
    }

    /// A blob of at most `limit` bytes, such as the configuration of an image, verified.
    ///
    /// # Errors
    /// What the registry says; a blob that is longer, or another; a source that is no registry.
    async fn small_blob(&self, digest: &Digest, _limit: u64) -> Result<Arc<[u8]>, SourceError> {
        Err(SourceError::no_registry(&digest.to_string()))
    }

    /// Bytes of a blob, as its registry says it.
    ///
    /// # Errors
    /// What the registry says; a source that is no registry.
    async fn blob_size(&self, digest: &Digest) -> Result<u64, SourceError> {
        Err(SourceError::no_registry(&digest.to_string()))
    }

    /// What others have attached to the manifest `subject` under the artifact type `kind` (OCI
    /// referrers), the newest first where the registry keeps an order. A blob of it is read as
    /// `sha256:<hex>`; who has the whole of it must verify it.
    ///
    /// # Errors
    /// What the registry says.
    async fn attached(&self, _subject: &Digest, _kind: &str) -> Result<Vec<Attached>, SourceError> {
        Ok(Vec::new())
    }

    /// Attaches something to the manifest `subject`; gives the digest of its own manifest.
    ///
    /// # Errors
    /// What the registry says; a source to which nothing can be attached.
    async fn attach(&self, subject: &Digest, _what: Attachment) -> Result<Digest, SourceError> {
        Err(SourceError::no_registry(&subject.to_string()))
    }
}

/// A manifest or index as its registry holds it.
#[derive(Debug, Clone)]
pub struct ManifestBytes {
    pub bytes: Arc<[u8]>,
    /// Computed over `bytes`.
    pub digest: Digest,
    /// What the registry says it is.
    pub media_type: String,
}

/// Something that is attached to a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// The digest of its own manifest.
    pub manifest: Digest,
    pub blobs: Vec<Layer>,
    pub annotations: BTreeMap<String, String>,
}

/// Something to attach to a manifest.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// Its artifact type.
    pub kind: String,
    pub blobs: Vec<AttachedBlob>,
    pub annotations: BTreeMap<String, String>,
}

/// A blob to attach.
#[derive(Debug, Clone)]
pub struct AttachedBlob {
    pub media_type: String,
    pub bytes: Bytes,
    pub annotations: BTreeMap<String, String>,
}

/// What lies in the layers of a container image, before any of them was looked into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layered {
    /// Canonical.
    pub reference: String,
    /// The digest of the manifest of the chosen platform.
    pub manifest: Digest,
    /// The digest of the index that the reference names, which named the manifest; of several, the first.
    pub index: Option<Digest>,
    /// The digest of the image's configuration.
    pub config: Digest,
    /// The platform of the image, where it says one.
    pub platform: Option<Platform>,
    /// The directory that is the content, without slashes at its ends; empty for all.
    pub root: String,
    /// The lowest first.
    pub layers: Vec<Layer>,
    /// It is a model: whatever its layers say of owners, modes and devices, its tree is made as that of any other model.
    pub is_model: bool,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The digest of the layer as it lies in the registry.
    pub blob: Digest,
    /// Bytes of the layer as it lies in the registry; what the manifest says.
    pub size: u64,
    pub media_type: String,
    /// The digest of the decoded layer, where the configuration says it.
    pub diff_id: Option<Digest>,
    pub annotations: BTreeMap<String, String>,
    /// The layer is no tar but one file, as it is. A tar is compressed as its media type ends: `gzip`,
    /// `zstd`, else not at all.
    pub as_file: Option<LayerFile>,
}

/// The file that a layer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerFile {
    /// Untrusted, relative to the root of all layers.
    pub path: String,
    /// Seconds since the epoch.
    pub mtime: i64,
    pub executable: bool,
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
#[derive(Debug, Clone, thiserror::Error)]
#[error("{what}: {message}")]
pub struct SourceError {
    kind: SourceErrorKind,
    /// The object and the host.
    what: String,
    message: String,
    retry_after: Option<Duration>,
    /// Boxed: it is rare, and errors are to be small.
    until: Option<Box<Instant>>,
    hint: Option<&'static str>,
    needs_unpacking: bool,
}

impl SourceError {
    /// An error about `what` (object and host, no secrets).
    pub fn new(kind: SourceErrorKind, what: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            kind,
            what: what.into(),
            message: message.into(),
            retry_after: None,
            until: None,
            hint: None,
            needs_unpacking: false,
        }
    }

    /// Of a model that lies in layers which can only be unpacked.
    #[must_use]
    fn in_layers(mut self) -> Self {
        self.needs_unpacking = true;
        self
    }

    /// Whether [`Source::layers`] says where it lies: it can be had by unpacking it.
    pub const fn needs_unpacking(&self) -> bool {
        self.needs_unpacking
    }

    fn no_registry(what: &str) -> Self {
        Self::new(SourceErrorKind::Invalid, what, "is not in a registry")
    }

    /// With the wait that the origin asked for.
    #[must_use]
    pub fn with_retry_after(mut self, wait: Option<Duration>) -> Self {
        self.retry_after = wait;
        self
    }

    /// Of what is known to pass, until then at the latest.
    #[must_use]
    pub fn with_until(mut self, until: Instant) -> Self {
        self.until = Some(Box::new(until));
        self
    }

    /// With what to try.
    #[must_use]
    pub fn with_hint(mut self, hint: &'static str) -> Self {
        self.hint = Some(hint);
        self
    }

    /// With another meaning.
    #[must_use]
    pub fn with_kind(mut self, kind: SourceErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// With `cause` (no secrets) at the end of the message.
    #[must_use]
    pub fn because(mut self, cause: impl fmt::Display) -> Self {
        self.message = format!("{}: {cause}", self.message);
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

    /// Whether it is known to pass, and no time has run out for that.
    pub fn passes(&self) -> bool {
        self.until
            .as_ref()
            .is_some_and(|until| Instant::now() < **until)
    }

    /// What to try, for a person; `None` where the message says it all.
    pub fn hint(&self) -> Option<&'static str> {
        self.hint.or(match self.kind {
            SourceErrorKind::Denied => {
                Some("check that credentials for this origin are set and may read it")
            }
            SourceErrorKind::Changed => {
                Some("resolve the reference again to get what is there now")
            }
            _ => None,
        })
    }
}

/// Settings of this room (`[source]`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Longest time until a connection stands, in seconds.
    pub connect_timeout_seconds: NonZeroU64,
    /// Longest time until an answer begins, in seconds.
    pub request_timeout_seconds: NonZeroU64,
    /// Longest time without a byte while a body arrives, in seconds.
    pub stall_timeout_seconds: NonZeroU64,
    /// Idle connections kept per host.
    pub idle_connections: usize,
    /// Most files of one reference; a listing with more is refused. Each of them takes up to a KiB of memory.
    pub max_entries: NonZeroUsize,
    /// Where the Hub is; else `HF_ENDPOINT`, else <https://huggingface.co>.
    pub hub_endpoint: Option<String>,
    /// The file with the token for the Hub; else `HF_TOKEN`, else where `hf auth login` puts it.
    pub hub_token_file: Option<PathBuf>,
    /// Where the mirrors, certificates and schemes of registries are set, in containerd's layout
    /// (`<path>/<host>/hosts.toml`); else `/etc/containerd/certs.d`.
    pub registry_config_path: Option<PathBuf>,
    /// Settings for registries.
    pub oci: OciConfig,
    /// The node that asks; no setting.
    #[serde(skip)]
    pub asker: Option<Asker>,
    /// Whether the proxies that the environment names are left out for plain HTTP, the Hub and registries; no
    /// setting.
    #[serde(skip)]
    pub no_proxy: bool,
}

/// Who asks: registries may have the mirror of this very node as theirs, which would ask itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asker {
    /// The id of the store, which mirrors are told as [`VIA`].
    pub store: String,
    /// Where the mirror over that store listens, if it does.
    pub mirror: Option<SocketAddr>,
}

/// The header with the id of the store for which a mirror is asked.
pub const VIA: &str = "hearth-via";

/// Settings for registries (`[source.oci]`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OciConfig {
    /// Files with credentials in the format of Docker's `config.json`, looked at before those that
    /// Docker and Podman use; on a node perhaps `/var/lib/kubelet/config.json`.
    pub auth_files: Vec<PathBuf>,
    /// The kubelet's `CredentialProviderConfig` (`--image-credential-provider-config`), YAML or
    /// JSON.
    pub credential_provider_config: Option<PathBuf>,
    /// Where its plugins are (`--image-credential-provider-bin-dir`).
    pub credential_provider_bin_dir: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        const fn seconds(n: u64) -> NonZeroU64 {
            NonZeroU64::MIN.saturating_add(n - 1)
        }
        Self {
            connect_timeout_seconds: seconds(10),
            request_timeout_seconds: seconds(30),
            stall_timeout_seconds: seconds(20),
            idle_connections: 64,
            max_entries: NonZeroUsize::MIN.saturating_add(MAX_ENTRIES - 1),
            hub_endpoint: None,
            hub_token_file: None,
            registry_config_path: None,
            oci: OciConfig::default(),
            asker: None,
            no_proxy: false,
        }
    }
}

impl Config {
    /// Longest time until a connection stands.
    pub const fn connect_timeout(&self) -> Duration {
        Duration::from_secs(self.connect_timeout_seconds.get())
    }

    /// Longest time until an answer begins.
    pub const fn request_timeout(&self) -> Duration {
        Duration::from_secs(self.request_timeout_seconds.get())
    }

    /// Longest time without a byte while a body arrives.
    pub const fn stall_timeout(&self) -> Duration {
        Duration::from_secs(self.stall_timeout_seconds.get())
    }
}

/// Gives the source of a reference. Cheap to clone; clones share connections.
#[derive(Debug, Clone)]
pub struct Sources {
    config: Arc<Config>,
    /// One source per origin, as long as anyone uses it: settings and credentials come from the
    /// environment, so they are the same for all references to an origin.
    open: Arc<Mutex<HashMap<String, Weak<dyn Source>>>>,
    /// Where credentials for registries are, and what plugins have answered.
    keychain: oci::Keychain,
    /// What opens origins instead of what this node has.
    credentials: Option<Credentials>,
}

impl Sources {
    /// Sources with `config`.
    pub fn new(config: Config) -> Self {
        install_tls();
        Self {
            keychain: oci::Keychain::new(&config),
            config: Arc::new(config),
            open: Arc::default(),
            credentials: None,
        }
    }

    /// Sources that use `credentials` where they have some for an origin, and share nothing with others.
    #[must_use]
    pub fn with_credentials(&self, credentials: Credentials) -> Self {
        Self {
            credentials: Some(credentials),
            ..self.clone()
        }
    }

    /// The source of `reference`. Does no I/O but reading settings and credential files.
    ///
    /// # Errors
    /// Settings in the environment that cannot be used.
    pub fn open(&self, reference: &Reference) -> Result<Arc<dyn Source>, SourceError> {
        if let Some(credentials) = &self.credentials {
            let source = own::OwnSource::new(self, &reference.locator, credentials);
            return Ok(Arc::new(source));
        }
        if reference.secret().is_some() {
            return self.make(&reference.locator, &Keys::default());
        }
        // References to it share one source.
        let origin = reference.locator.origin();
        let mut open = self.open.lock();
        if let Some(source) = open.get(&origin).and_then(Weak::upgrade) {
            return Ok(source);
        }
        let source = self.make(&reference.locator, &Keys::default())?;
        open.retain(|_, source| source.strong_count() > 0);
        open.insert(origin, Arc::downgrade(&source));
        Ok(source)
    }

    fn make(&self, locator: &Locator, keys: &Keys) -> Result<Arc<dyn Source>, SourceError> {
        let config = &self.config;
        // Of these only the node's own identity is known.
        let lonely = match locator {
            Locator::S3(_) => keys.aws.is_none(),
            Locator::Gcs(_) | Locator::Azure(_) => true,
            _ => false,
        };
        if keys.alone && lonely {
            let what = format!("a {} source", locator.kind());
            let why = "no credentials of its own were given, and those of the node are not for it";
            return Err(SourceError::new(SourceErrorKind::Denied, what, why));
        }
        Ok(match locator {
            Locator::S3(bucket) => Arc::new(object::ObjectSource::s3(
                &bucket.bucket,
                config,
                keys.aws.as_ref(),
            )?),
            Locator::Gcs(bucket) => Arc::new(object::ObjectSource::gcs(&bucket.bucket, config)?),
            Locator::Azure(bucket) => {
                Arc::new(object::ObjectSource::azure(&bucket.bucket, config)?)
            }
            Locator::File(path) => Arc::new(file::FileSource::new(path, config)),
            Locator::Http(url) => Arc::new(http::HttpSource::new(&keys.open(url), config)?),
            Locator::Hub(repo) => {
                // An empty token is none.
                let token = keys.hub_token.clone();
                let token = token.or_else(|| keys.alone.then(|| Secret::new("")));
                Arc::new(hub::HubSource::new(repo, config, token)?)
            }
            Locator::Oci(oci) => {
                let keychain = self.keychain.with(keys);
                Arc::new(oci::OciSource::new(oci, config, &keychain)?)
            }
        })
    }
}

/// Makes `ring` the process's TLS implementation. Must run before the first HTTP client is built.
pub fn install_tls() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // An error means that the process has chosen one already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

/// Most files of one reference, where nothing is said: no model has as many, and anybody who may name a bucket
/// could have all of it listed.
const MAX_ENTRIES: usize = 1_000_000;

/// Longest wait that an origin may ask for.
const MAX_WAIT: Duration = Duration::from_secs(3600);

/// `Retry-After` (RFC 9110, 10.2.3): seconds, or a date.
fn retry_after(value: &str) -> Option<Duration> {
    let value = value.trim();
    let wait = match value.bytes().all(|b| b.is_ascii_digit()) {
        // More digits than a number has are a long wait, too.
        true if !value.is_empty() => Duration::from_secs(value.parse().unwrap_or(u64::MAX)),
        _ => {
            let until = httpdate::parse_http_date(value).ok()?;
            match until.duration_since(std::time::SystemTime::now()) {
                Ok(left) => Duration::from_secs(left.as_secs() + 1),
                Err(_) => Duration::ZERO,
            }
        }
    };
    Some(wait.min(MAX_WAIT))
}

/// Whether requests to `http://` URLs may need TLS all the same: their proxy is asked over it.
fn tls_to_proxies() -> bool {
    ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"]
        .iter()
        .filter_map(std::env::var_os)
        .any(|proxy| proxy.to_string_lossy().starts_with("https:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_shared_per_origin_while_used() {
        let sources = Sources::new(Config::default());
        let open = |text: &str| sources.open(&text.parse().unwrap()).unwrap();
        let first = open("file:///a");
        assert!(Arc::ptr_eq(&first, &open("file:///a?include=x")));
        assert!(!Arc::ptr_eq(&first, &open("file:///b")));
        drop(first);
        open("file:///c");
        assert_eq!(sources.open.lock().len(), 1);
    }

    #[test]
    fn settings_are_strict() {
        let parse = |text: &str| toml::from_str::<Config>(text);
        assert_eq!(parse("").unwrap(), Config::default());
        assert_eq!(parse("max_entries = 5").unwrap().max_entries.get(), 5);
        assert!(parse("stall_timeout_seconds = 0").is_err());
        assert!(parse("stal_timeout_seconds = 1").is_err());
    }
}
