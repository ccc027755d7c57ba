//! Registries: what `oci://registry/repository:tag` means, and its bytes.
//!
//! Everything is asked through [`Web`], manifests as well as blobs: one way for the data, with
//! pinned ranges on many HTTP/1.1 connections, remembered signed redirects and strict answers,
//! which the client of `oci-distribution` does not have. That crate gives what is hard to get right
//! alone: the types and media types of manifests and indexes. Invariants: every manifest, index
//! and small blob is verified against its digest before it is looked at, and bounded in size; an
//! index is followed a few levels deep only; a blob range is exactly the range asked for (its
//! digest is verified by whoever has all of it). Where `hosts.toml` names mirrors, each is tried in
//! its order and the registry last. Made by [`super::Sources`]; keeps nothing on disk.

mod auth;
mod credentials;
mod host;
mod hosts;
mod manifest;
mod models;
mod referrers;
pub(crate) mod tarwalk;

use std::{collections::HashMap, ops::Range, path::Path, sync::Arc};

use oci_distribution::manifest::OciImageManifest;
use parking_lot::Mutex;
use reqwest::header;
use url::Url;

pub(super) use self::credentials::Keychain;
pub(crate) use self::models::model_of;
use self::{
    host::{Got, Host, Want},
    manifest::{Document, ImageConfig, check_platform, choose, descriptor},
};
use super::{
    Attached, Attachment, ByteStream, Config, Layered, ManifestBytes, Source, SourceError,
    SourceErrorKind as Kind, listing::short, retry::asked, web::text,
};
use crate::{
    digest::Digest,
    reference::{Locator, OciRef, Reference},
    tree::{Artifact, Location},
};

/// Largest manifest or index, in bytes (the limit that registries have).
const MAX_MANIFEST: u64 = 4 << 20;
/// Largest image configuration, in bytes.
const MAX_CONFIG: u64 = 8 << 20;
/// Most indexes on the way from a tag to an image.
const MAX_INDEXES: usize = 3;
/// Bytes of verified documents remembered.
const MAX_REMEMBERED: usize = 16 << 20;

/// One repository as a source.
#[derive(Debug)]
pub(super) struct OciSource {
    registry: Registry,
    max_entries: usize,
}

/// One repository of one registry.
#[derive(Debug)]
pub(crate) struct Registry {
    /// `registry/repository`.
    name: String,
    registry: String,
    repository: String,
    config: Config,
    hosts: Vec<Arc<Host>>,
    documents: Mutex<Documents>,
}

/// Verified documents by digest: the same manifest and configuration are wanted several times.
#[derive(Debug, Default)]
struct Documents {
    bytes: usize,
    known: HashMap<Digest, ManifestBytes>,
}

/// The manifest of one image or model.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub(crate) digest: Digest,
    pub(crate) image: OciImageManifest,
    /// The index that named it as that of the platform; of several, the first.
    index: Option<Digest>,
}

impl Registry {
    /// The repository of `oci`, opened with what `keychain` has.
    ///
    /// # Errors
    /// Settings that cannot be used.
    pub(crate) fn new(
        oci: &OciRef,
        config: &Config,
        keychain: &Keychain,
    ) -> Result<Self, SourceError> {
        let path = config.registry_config_path.as_deref();
        let path = path.unwrap_or(Path::new(hosts::DEFAULT_PATH));
        let own = config.asker.as_ref().and_then(|asker| asker.mirror);
        let endpoints = hosts::endpoints_but(own, path, &oci.registry)?;
        let make = |endpoint| {
            Host::new(endpoint, &oci.registry, &oci.repository, keychain, config).map(Arc::new)
        };
        Ok(Self {
            name: format!("{}/{}", oci.registry, oci.repository),
            registry: oci.registry.clone(),
            repository: oci.repository.clone(),
            config: config.clone(),
            hosts: endpoints.into_iter().map(make).collect::<Result<_, _>>()?,
            documents: Mutex::default(),
        })
    }

    /// The same without mirrors, which may be behind.
    fn itself(&self) -> Self {
        let itself = self.hosts.iter().filter(|host| !host.endpoint.is_mirror);
        Self {
            name: self.name.clone(),
            registry: self.registry.clone(),
            repository: self.repository.clone(),
            config: self.config.clone(),
            hosts: itself.cloned().collect(),
            documents: Mutex::default(),
        }
    }

    /// The manifest or index with this tag or digest; verified where it is a digest.
    ///
    /// # Errors
    /// What the registry says; an answer that has another digest or is too long.
    pub(crate) async fn manifest(&self, reference: &str) -> Result<ManifestBytes, SourceError> {
        let wanted: Option<Digest> = reference.parse().ok();
        if let Some(known) = wanted.and_then(|digest| self.remembered(&digest)) {
            return Ok(known);
        }
        let what = match wanted {
            Some(_) => format!("oci://{}@{reference}", self.name),
            None => format!("oci://{}:{reference}", self.name),
        };
        let path = format!("manifests/{reference}");
        let document = match self
            .get(&what, &path, &Want::Manifest(MAX_MANIFEST, wanted))
            .await
        {
            Ok(Got::Document(document)) => document,
            Ok(_) => return Err(unexpected(&what)),
            Err(error) if error.kind() == Kind::NotFound => {
                let kind = if wanted.is_some() { "manifest" } else { "tag" };
                let (repository, host) = (&self.repository, &self.registry);
                let missing = format!("no {kind} {reference} in repository {repository} at {host}");
                return Err(SourceError::new(Kind::NotFound, what, missing)
                    .because(&error.message)
                    .with_hint("check the name and the tag; some registries say so too where they want credentials"));
            }
            Err(error) => return Err(error),
        };
        let media_type = text(&document.headers, header::CONTENT_TYPE).unwrap_or_default();
        let found = ManifestBytes {
            digest: Digest::of(&document.body),
            media_type: short(media_type),
            bytes: document.body.into(),
        };
        self.remember(&found);
        Ok(found)
    }

    /// A small blob of at most `limit` bytes, verified.
    ///
    /// # Errors
    /// What the registry says; a blob that has another digest or is too long.
    pub(crate) async fn blob(&self, digest: &Digest, limit: u64) -> Result<Arc<[u8]>, SourceError> {
        if let Some(known) = self.remembered(digest) {
            return Ok(known.bytes);
        }
        let what = self.blob_name(digest);
        let path = format!("blobs/{digest}");
        let Got::Document(document) = self.get(&what, &path, &Want::Blob(limit, *digest)).await?
        else {
            return Err(unexpected(&what));
        };
        let bytes: Arc<[u8]> = document.body.into();
        self.remember(&ManifestBytes {
            bytes: Arc::clone(&bytes),
            digest: *digest,
            media_type: String::new(),
        });
        Ok(bytes)
    }

    /// Bytes `range` of a blob, not verified.
    ///
    /// # Errors
    /// What the registry says; an answer that is not that range.
    pub(crate) async fn read_blob(
        &self,
        digest: &Digest,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        let what = self.blob_name(digest);
        let path = format!("blobs/{digest}");
        match self.get(&what, &path, &Want::Range(range)).await? {
            Got::Stream(stream) => Ok(stream),
            _ => Err(unexpected(&what)),
        }
    }

    /// Bytes of a blob, as the registry says it.
    async fn blob_size(&self, digest: &Digest) -> Result<u64, SourceError> {
        let what = self.blob_name(digest);
        match self
            .get(&what, &format!("blobs/{digest}"), &Want::Size)
            .await?
        {
            Got::Size(size) => Ok(size),
            _ => Err(unexpected(&what)),
        }
    }

    /// Asks for `path`; of a document, again where that may help and somebody resolves.
    async fn get(&self, what: &str, path: &str, want: &Want) -> Result<Got, SourceError> {
        match want {
            Want::Range(_) => self.get_once(what, path, want).await,
            _ => asked(|| self.get_once(what, path, want)).await,
        }
    }

    /// Asks one host after the other for `path`.
    async fn get_once(&self, what: &str, path: &str, want: &Want) -> Result<Got, SourceError> {
        let by_tag = path.starts_with("manifests/") && !path.starts_with("manifests/sha256:");
        let can = |host: &&Arc<Host>| match by_tag {
            true => host.endpoint.resolve,
            false => host.endpoint.pull,
        };
        let mut hosts: Vec<&Arc<Host>> = self.hosts.iter().filter(can).collect();
        // Stable: otherwise in the order of hosts.toml.
        hosts.sort_by_key(|host| host.is_last_choice(path));
        let mut failed: Option<SourceError> = None;
        let mut last = None;
        for host in hosts {
            match host.get(what, path, want).await {
                Ok(got) => return Ok(got),
                Err(error) => {
                    if self.hosts.len() > 1 {
                        tracing::debug!("{}: {error}", host.name());
                        host.failed(path, &error);
                    }
                    match host.endpoint.is_mirror {
                        true => failed = Some(failed.map_or(error.clone(), |first| first)),
                        false => last = Some(error),
                    }
                }
            }
        }
        Err(match (last, failed) {
            (Some(error), None) | (None, Some(error)) => error,
            (Some(error), Some(mirror)) => {
                let is_passing = |kind| matches!(kind, Kind::Unavailable | Kind::Throttled);
                let message = mirror.message.clone();
                // A mirror that is down may hold what the registry itself has not, or denies.
                let mut error = match is_passing(mirror.kind) && !is_passing(error.kind) {
                    true => SourceError::new(mirror.kind, what, error.message)
                        .with_retry_after(mirror.retry_after),
                    false => error,
                };
                error.message = format!("{} (and a mirror: {message})", error.message);
                error
            }
            (None, None) => {
                let verb = if by_tag { "resolve tags" } else { "pull" };
                let message = format!(
                    "hosts.toml of {} names no host that may {verb}",
                    self.registry
                );
                SourceError::new(Kind::Invalid, what, message)
            }
        })
    }

    /// The image that `oci` means: of an index, the one for its platform.
    ///
    /// # Errors
    /// As [`Registry::manifest`]; malformed, recursive or too deep indexes; no such platform.
    pub(crate) async fn image(&self, oci: &OciRef) -> Result<Manifest, SourceError> {
        let what = oci.to_string();
        let invalid = |message: &str| SourceError::new(Kind::Invalid, &what, message);
        let mut found = self.manifest(oci.wanted()).await?;
        let mut seen = vec![found.digest];
        loop {
            let index = match manifest::parse(&what, &found)? {
                Document::Index(index) => index,
                Document::Image(image) => {
                    return Ok(Manifest {
                        digest: found.digest,
                        image: *image,
                        index: seen.first().filter(|_| seen.len() > 1).copied(),
                    });
                }
            };
            if seen.len() > MAX_INDEXES {
                return Err(invalid("its indexes are nested too deep"));
            }
            let entry = choose(&what, &index, oci.platform.as_ref())?;
            let (digest, size) = descriptor(&what, "a manifest", &entry.digest, entry.size)?;
            if seen.contains(&digest) {
                return Err(invalid("its index leads back to itself"));
            }
            if size > MAX_MANIFEST {
                return Err(invalid("its index names a manifest of more than 4 MiB"));
            }
            seen.push(digest);
            found = self.manifest(&digest.to_string()).await?;
            if found.bytes.len() as u64 != size {
                let message = format!(
                    "its index says that {digest} has {size} bytes; it has {}",
                    found.bytes.len()
                );
                return Err(invalid(&message));
            }
        }
    }

    fn blob_name(&self, digest: &Digest) -> String {
        format!("blob {digest} of {}", self.name)
    }

    fn remembered(&self, digest: &Digest) -> Option<ManifestBytes> {
        self.documents.lock().known.get(digest).cloned()
    }

    fn remember(&self, found: &ManifestBytes) {
        let mut documents = self.documents.lock();
        if documents.bytes + found.bytes.len() > MAX_REMEMBERED {
            *documents = Documents::default();
        }
        if documents
            .known
            .insert(found.digest, found.clone())
            .is_none()
        {
            documents.bytes += found.bytes.len();
        }
    }
}

impl OciSource {
    pub(super) fn new(
        oci: &OciRef,
        config: &Config,
        keychain: &Keychain,
    ) -> Result<Self, SourceError> {
        Ok(Self {
            registry: Registry::new(oci, config, keychain)?,
            max_entries: config.max_entries.get(),
        })
    }

    /// The part of `reference` that is here.
    fn here<'r>(&self, reference: &'r Reference) -> Result<&'r OciRef, SourceError> {
        match &reference.locator {
            Locator::Oci(oci)
                if oci.registry == self.registry.registry
                    && oci.repository == self.registry.repository =>
            {
                Ok(oci)
            }
            _ => {
                let message = format!("is not in {}", self.registry.name);
                Err(SourceError::new(
                    Kind::Invalid,
                    reference.to_string(),
                    message,
                ))
            }
        }
    }

    /// The layers of a container image whose content is the directory `root`.
    async fn image_layers(
        &self,
        reference: &Reference,
        oci: &OciRef,
        manifest: &Manifest,
        root: String,
    ) -> Result<Option<Layered>, SourceError> {
        let what = oci.to_string();
        let invalid = |message: String| SourceError::new(Kind::Invalid, &what, message);
        let image = &manifest.image;
        let (digest, size) = descriptor(
            &what,
            "its configuration",
            &image.config.digest,
            image.config.size,
        )?;
        if size > MAX_CONFIG {
            return Err(invalid(format!(
                "its configuration is said to have {size} bytes"
            )));
        }
        let bytes = self.registry.blob(&digest, MAX_CONFIG).await?;
        if bytes.len() as u64 != size {
            let found = bytes.len();
            let message = format!(
                "its manifest says that its configuration has {size} bytes; it has {found}"
            );
            return Err(invalid(message));
        }
        let config = ImageConfig::parse(&what, &bytes)?;
        let platform = config.platform();
        // What an index says counts more: many configurations leave the variant out.
        if manifest.index.is_none() {
            check_platform(&what, oci.platform.as_ref(), platform.as_ref())?;
        }
        Ok(Some(Layered {
            reference: reference.to_string(),
            manifest: manifest.digest,
            index: manifest.index,
            config: digest,
            layers: manifest::layers(&what, &image.layers, &config)?,
            platform,
            root,
            is_model: false,
        }))
    }
}

#[async_trait::async_trait]
impl Source for OciSource {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        let oci = self.here(reference)?;
        let manifest = self.registry.image(oci).await?;
        let fail = |message: String| SourceError::new(Kind::Invalid, oci.to_string(), message);
        if models::image_root(&manifest, oci).is_some() {
            return Err(fail(
                "is a container image: its files are known once its layers are unpacked".into(),
            ));
        }
        let most = self.max_entries;
        match models::resolve(&self.registry, reference, oci, &manifest, most).await? {
            Some(artifact) => Ok(artifact),
            None => {
                let found = &manifest.image;
                let mut layers = found.layers.iter().enumerate();
                if manifest::is_image_config(&found.config.media_type)
                    && let Some((number, layer)) =
                        layers.find(|(_, layer)| !manifest::is_image_layer(&layer.media_type))
                {
                    return Err(fail(format!(
                        "layer {} ({}) has the unsupported media type {:?}",
                        number + 1,
                        short(&layer.digest),
                        short(&layer.media_type)
                    )));
                }
                let kind = found
                    .artifact_type
                    .as_ref()
                    .unwrap_or(&found.config.media_type);
                let message = format!(
                    "is neither a container image nor a model of a known layout (its type is {:?})",
                    short(kind)
                );
                Err(fail(message))
            }
        }
    }

    fn origin(&self) -> String {
        format!("oci://{}", self.registry.name)
    }

    async fn read(
        &self,
        location: &Location,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        let digest = location.path.parse().map_err(|_| {
            let what = format!("{:?} of {}", short(&location.path), self.registry.name);
            SourceError::new(Kind::Invalid, what, "is no digest of a blob")
        })?;
        self.registry.read_blob(&digest, range).await
    }

    async fn layered(&self, reference: &Reference) -> Result<Option<Layered>, SourceError> {
        let oci = self.here(reference)?;
        let manifest = self.registry.image(oci).await?;
        match models::image_root(&manifest, oci) {
            Some(root) => self.image_layers(reference, oci, &manifest, root).await,
            None => models::layered(&self.registry, reference, oci, &manifest, false).await,
        }
    }

    async fn layers(&self, reference: &Reference) -> Result<Option<Layered>, SourceError> {
        let oci = self.here(reference)?;
        let manifest = self.registry.image(oci).await?;
        match models::image_root(&manifest, oci) {
            Some(root) => self.image_layers(reference, oci, &manifest, root).await,
            None => models::layered(&self.registry, reference, oci, &manifest, true).await,
        }
    }

    async fn manifest(&self, wanted: &str) -> Result<ManifestBytes, SourceError> {
        let parsed = wanted.parse::<Digest>().is_ok() || OciRef::is_tag(wanted);
        if !parsed {
            let what = format!("{:?} of {}", short(wanted), self.registry.name);
            return Err(SourceError::new(
                Kind::Invalid,
                what,
                "is no tag and no sha256 digest",
            ));
        }
        self.registry.manifest(wanted).await
    }

    async fn blob_size(&self, digest: &Digest) -> Result<u64, SourceError> {
        self.registry.blob_size(digest).await
    }

    async fn small_blob(&self, digest: &Digest, limit: u64) -> Result<Arc<[u8]>, SourceError> {
        self.registry.blob(digest, limit).await
    }

    async fn attached(&self, subject: &Digest, kind: &str) -> Result<Vec<Attached>, SourceError> {
        self.registry.attached(subject, kind).await
    }

    async fn attach(&self, subject: &Digest, what: Attachment) -> Result<Digest, SourceError> {
        self.registry.itself().attach(subject, what).await
    }
}

/// That the answer is not of the kind that was wanted, which cannot be.
fn unexpected(what: &str) -> SourceError {
    SourceError::new(Kind::Invalid, what, "was read the wrong way")
}

/// Whether the host of a registry is this machine.
fn is_loopback(host: &str) -> bool {
    let Ok(url) = Url::parse(&format!("http://{host}")) else {
        return false;
    };
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}
