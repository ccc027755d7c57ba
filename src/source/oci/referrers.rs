//! What is attached to a manifest: OCI referrers (distribution-spec, "Listing Referrers"), with the
//! tag schema for registries that do not list them. Reading goes the way of all reads; pushing is
//! done by the client of `oci-distribution`, with what opens the registry found here.

use bytes::Bytes;
use oci_distribution::{
    Client, Reference as OciReference,
    client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol},
    errors::OciDistributionError,
    manifest::{
        ImageIndexEntry, OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE, OciDescriptor,
        OciImageIndex, OciImageManifest, OciManifest,
    },
    secrets::RegistryAuth,
};

use super::{
    Got, Host, Registry, Want,
    manifest::{self, Document, descriptor},
};
use crate::{
    digest::Digest,
    source::{
        Attached, Attachment, Layer, SourceError, SourceErrorKind as Kind,
        listing::short,
        web::{Exposed, extra_roots},
    },
};

/// Largest list of referrers, in bytes.
const MAX_LIST: u64 = 4 << 20;
/// Most referrers of one kind looked into.
const MAX_ATTACHED: usize = 16;
/// The configuration of an artifact that has none (image-spec, manifest.md, "Guidance for an Empty
/// Descriptor").
const EMPTY: &[u8] = b"{}";
const EMPTY_MEDIA_TYPE: &str = "application/vnd.oci.empty.v1+json";

impl Registry {
    /// What is attached to `subject` under `kind`; nothing where the registry knows of none.
    ///
    /// # Errors
    /// What the registry says; malformed lists and manifests.
    pub(super) async fn attached(
        &self,
        subject: &Digest,
        kind: &str,
    ) -> Result<Vec<Attached>, SourceError> {
        let what = format!("what is attached to {subject} of {}", self.name);
        let Some((index, _)) = self.referrers(&what, subject, kind).await? else {
            return Ok(Vec::new());
        };
        let mut found = Vec::new();
        let wanted = |entry: &&ImageIndexEntry| entry.artifact_type.as_deref() == Some(kind);
        for entry in index.manifests.iter().filter(wanted).take(MAX_ATTACHED) {
            let (digest, _) = descriptor(&what, "a manifest", &entry.digest, entry.size)?;
            let bytes = self.manifest(&digest.to_string()).await?;
            let Document::Image(image) = manifest::parse(&what, &bytes)? else {
                continue;
            };
            // A list may say anything; the manifest itself counts.
            let is_of = image
                .subject
                .as_ref()
                .is_some_and(|s| s.digest == subject.to_string());
            let says = image
                .artifact_type
                .as_deref()
                .unwrap_or(&image.config.media_type);
            if !is_of || says != kind {
                continue;
            }
            let blobs = image.layers.iter().enumerate().map(|(number, layer)| {
                let name = format!("blob {}", number + 1);
                let (blob, size) = descriptor(&what, &name, &layer.digest, layer.size)?;
                Ok(Layer {
                    blob,
                    size,
                    media_type: layer.media_type.clone(),
                    diff_id: None,
                    annotations: layer.annotations.clone().unwrap_or_default(),
                    as_file: None,
                })
            });
            found.push(Attached {
                manifest: digest,
                blobs: blobs.collect::<Result<_, SourceError>>()?,
                annotations: image.annotations.unwrap_or_default(),
            });
        }
        Ok(found)
    }

    /// The list of referrers of `subject`, and whether it is the registry that keeps it (and not a
    /// tag); `None` where there is neither.
    async fn referrers(
        &self,
        what: &str,
        subject: &Digest,
        kind: &str,
    ) -> Result<Option<(OciImageIndex, bool)>, SourceError> {
        let kind: String = url::form_urlencoded::byte_serialize(kind.as_bytes()).collect();
        let path = format!("referrers/{subject}?artifactType={kind}");
        let failed = match self.get(what, &path, &Want::Manifest(MAX_LIST, None)).await {
            Ok(Got::Document(document)) => return Ok(Some((list(what, &document.body)?, true))),
            Ok(_) => return Err(super::unexpected(what)),
            Err(error) if is_unknown(&error) => None,
            // It may be a mirror that is down, before a registry that knows no such lists.
            Err(error) if error.kind() == Kind::Unavailable => Some(error),
            Err(error) => return Err(error),
        };
        match (self.manifest(&fallback_tag(subject)).await, failed) {
            (Ok(bytes), _) => match manifest::parse(what, &bytes)? {
                Document::Index(index) => Ok(Some((index, false))),
                Document::Image(_) => Ok(None),
            },
            (Err(_), Some(failed)) => Err(failed),
            (Err(error), None) if error.kind() == Kind::NotFound => Ok(None),
            (Err(error), None) => Err(error),
        }
    }

    /// Attaches `attachment` to `subject`; gives the digest of what was attached.
    ///
    /// # Errors
    /// What the registry says; a registry that may not be pushed to.
    pub(super) async fn attach(
        &self,
        subject: &Digest,
        attachment: Attachment,
    ) -> Result<Digest, SourceError> {
        let what = format!("attachment to {subject} of {}", self.name);
        let to = self.manifest(&subject.to_string()).await?;
        let media_type = match manifest::parse(&what, &to)? {
            Document::Image(image) => image.media_type,
            Document::Index(index) => index.media_type,
        };
        let subject_descriptor = OciDescriptor {
            media_type: media_type.unwrap_or_else(|| to.media_type.clone()),
            digest: subject.to_string(),
            size: length(&what, to.bytes.len())?,
            ..OciDescriptor::default()
        };
        let mut layers = Vec::new();
        let pusher = self.pusher(&what).await?;
        for blob in attachment.blobs {
            layers.push(OciDescriptor {
                media_type: blob.media_type,
                digest: Digest::of(&blob.bytes).to_string(),
                size: length(&what, blob.bytes.len())?,
                annotations: (!blob.annotations.is_empty()).then_some(blob.annotations),
                ..OciDescriptor::default()
            });
            pusher.blob(blob.bytes).await?;
        }
        pusher.blob(Bytes::from_static(EMPTY)).await?;
        let manifest = OciImageManifest {
            media_type: Some(OCI_IMAGE_MEDIA_TYPE.to_owned()),
            config: OciDescriptor {
                media_type: EMPTY_MEDIA_TYPE.to_owned(),
                digest: Digest::of(EMPTY).to_string(),
                size: EMPTY.len() as i64,
                ..OciDescriptor::default()
            },
            layers,
            subject: Some(subject_descriptor),
            artifact_type: Some(attachment.kind.clone()),
            annotations: Some(attachment.annotations),
            ..OciImageManifest::default()
        };
        let (digest, size) = pusher.manifest(None, &manifest.into()).await?;
        let list = self.referrers(&what, subject, &attachment.kind).await?;
        let mut index = match list {
            // The registry has seen the subject and lists it itself.
            Some((_, true)) => return Ok(digest),
            Some((index, false)) => index,
            None => OciImageIndex {
                schema_version: 2,
                media_type: Some(OCI_IMAGE_INDEX_MEDIA_TYPE.to_owned()),
                manifests: Vec::new(),
                artifact_type: None,
                annotations: None,
            },
        };
        // The newest of a kind goes first: readers take it.
        index
            .manifests
            .retain(|entry| entry.digest != digest.to_string());
        let entry = ImageIndexEntry {
            media_type: OCI_IMAGE_MEDIA_TYPE.to_owned(),
            digest: digest.to_string(),
            size,
            platform: None,
            annotations: None,
            artifact_type: Some(attachment.kind),
        };
        index.manifests.insert(0, entry);
        pusher
            .manifest(Some(&fallback_tag(subject)), &index.into())
            .await?;
        Ok(digest)
    }

    async fn pusher(&self, what: &str) -> Result<Pusher, SourceError> {
        let invalid = |why: &str| SourceError::new(Kind::Invalid, what, why);
        // To the registry itself: what is at a mirror comes from there.
        let host = self
            .hosts
            .iter()
            .rev()
            .find(|h| h.endpoint.push && !h.endpoint.is_mirror);
        let host = host.ok_or_else(|| invalid("hosts.toml names no host that may be pushed to"))?;
        if host.endpoint.base.path() != "/v2" || host.endpoint.tls.identity.is_some() {
            return Err(invalid(
                "a registry below a path, or with client certificates, cannot be pushed to",
            ));
        }
        let auth = match host.login(what, "pull,push").await? {
            None => RegistryAuth::Anonymous,
            Some(auth) => match auth.exposed() {
                Exposed::Bearer(token) => RegistryAuth::Bearer(token.to_owned()),
                Exposed::Basic(user, password) => {
                    RegistryAuth::Basic(user.to_owned(), password.to_owned())
                }
            },
        };
        let mut pem = extra_roots()?.pem;
        pem.extend(host.endpoint.tls.pem.iter().cloned());
        let roots = pem.into_iter().map(|data| Certificate {
            encoding: CertificateEncoding::Pem,
            data,
        });
        let client = Client::try_from(ClientConfig {
            protocol: match host.endpoint.base.scheme() {
                "http" => ClientProtocol::Http,
                _ => ClientProtocol::Https,
            },
            accept_invalid_certificates: host.endpoint.tls.skip_verify,
            extra_root_certificates: roots.collect(),
            connect_timeout: Some(self.config.connect_timeout()),
            read_timeout: Some(self.config.request_timeout()),
            user_agent: concat!("hearth/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        });
        let client = client.map_err(|error| failure(what, host, &error))?;
        client.store_auth_if_needed(&host.name(), &auth).await;
        Ok(Pusher {
            client,
            what: what.to_owned(),
            host: host.name(),
            repository: self.repository.clone(),
        })
    }
}

/// Puts things into one repository.
struct Pusher {
    client: Client,
    what: String,
    host: String,
    repository: String,
}

impl Pusher {
    fn at(&self, tag: &str) -> OciReference {
        OciReference::with_tag(self.host.clone(), self.repository.clone(), tag.to_owned())
    }

    async fn blob(&self, bytes: Bytes) -> Result<(), SourceError> {
        let (at, digest) = (self.at("latest"), Digest::of(&bytes).to_string());
        let there = self.client.blob_exists(&at, &digest).await;
        if !there.map_err(|error| self.failure(&error))? {
            let pushed = self.client.push_blob(&at, bytes, &digest).await;
            pushed.map_err(|error| self.failure(&error))?;
        }
        Ok(())
    }

    /// Digest and size of what was pushed, under `tag` or only its digest.
    async fn manifest(
        &self,
        tag: Option<&str>,
        manifest: &OciManifest,
    ) -> Result<(Digest, i64), SourceError> {
        let invalid = |why: String| SourceError::new(Kind::Invalid, &self.what, why);
        let bytes = serde_json::to_vec(manifest).map_err(|error| invalid(error.to_string()))?;
        let (digest, size) = (Digest::of(&bytes), length(&self.what, bytes.len())?);
        let content_type = manifest.content_type().parse();
        let content_type = content_type.map_err(|_| invalid("has no media type".into()))?;
        let at = match tag {
            Some(tag) => self.at(tag),
            None => OciReference::with_digest(
                self.host.clone(),
                self.repository.clone(),
                digest.to_string(),
            ),
        };
        let pushed = self
            .client
            .push_manifest_raw(&at, bytes, content_type)
            .await;
        pushed.map_err(|error| self.failure(&error))?;
        Ok((digest, size))
    }

    fn failure(&self, error: &OciDistributionError) -> SourceError {
        classify(&self.what, &self.host, error)
    }
}

fn failure(what: &str, host: &Host, error: &OciDistributionError) -> SourceError {
    classify(what, &host.name(), error)
}

/// An error of the client, without what its text may hold: URLs of uploads are signed.
fn classify(what: &str, host: &str, error: &OciDistributionError) -> SourceError {
    let fail = |kind, why: String| SourceError::new(kind, what, why);
    let status = |code: u16| {
        let kind = match code {
            401 | 403 => Kind::Denied,
            404 => Kind::NotFound,
            429 => Kind::Throttled,
            500..=599 => Kind::Unavailable,
            _ => Kind::Invalid,
        };
        fail(kind, format!("{host} answered a push with {code}"))
    };
    match error {
        OciDistributionError::ServerError { code, .. } => status(*code),
        OciDistributionError::UnauthorizedError { .. }
        | OciDistributionError::AuthenticationFailure(_) => {
            fail(Kind::Denied, format!("{host} refuses the push"))
                .with_hint("check that the credentials for this registry may push")
        }
        OciDistributionError::RequestError(error) => match error.status() {
            Some(code) => status(code.as_u16()),
            None => fail(Kind::Unavailable, format!("connection to {host} broke")),
        },
        OciDistributionError::RegistryError { envelope, .. } => {
            let codes: Vec<_> = envelope
                .errors
                .iter()
                .map(|e| format!("{:?}", e.code))
                .collect();
            fail(
                Kind::Invalid,
                format!("{host} refuses the push: {}", short(&codes.join(", "))),
            )
        }
        _ => fail(
            Kind::Invalid,
            format!("{host} does not take it as a registry should"),
        ),
    }
}

/// Whether the registry knows no lists of referrers: any error of a client, but for those that
/// another try or other credentials could change.
fn is_unknown(error: &SourceError) -> bool {
    matches!(error.kind(), Kind::NotFound | Kind::Invalid)
}

/// A list of referrers, as a registry gives it.
fn list(what: &str, body: &[u8]) -> Result<OciImageIndex, SourceError> {
    serde_json::from_slice(body).map_err(|error| {
        let why = short(&error.to_string());
        let message = format!("its list of referrers is malformed: {why}");
        SourceError::new(Kind::Invalid, what, message)
    })
}

/// Where the list is kept that the registry does not keep.
fn fallback_tag(subject: &Digest) -> String {
    subject.to_string().replace(':', "-")
}

fn length(what: &str, length: usize) -> Result<i64, SourceError> {
    i64::try_from(length).map_err(|_| SourceError::new(Kind::Invalid, what, "is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_a_push_show_no_url() {
        let server = |code| OciDistributionError::ServerError {
            code,
            url: "https://h/x?sig=geheim".into(),
            message: "geheim".into(),
        };
        for (error, kind) in [
            (server(403), Kind::Denied),
            (server(503), Kind::Unavailable),
            (server(400), Kind::Invalid),
            (
                OciDistributionError::AuthenticationFailure("geheim".into()),
                Kind::Denied,
            ),
            (
                OciDistributionError::SpecViolationError("geheim".into()),
                Kind::Invalid,
            ),
        ] {
            let error = classify("x", "h", &error);
            assert_eq!(error.kind(), kind);
            assert!(!format!("{error:?}").contains("geheim"), "{error}");
        }
    }

    #[test]
    fn the_corpus() {
        crate::corpus::replay("corpus/manifest", |input| {
            for entry in list("x", input)
                .into_iter()
                .flat_map(|index| index.manifests)
            {
                let _ = descriptor("x", "a manifest", &entry.digest, entry.size);
            }
        });
    }

    #[test]
    fn tags_of_lists() {
        let tag = fallback_tag(&Digest::of(b"x"));
        assert!(tag.starts_with("sha256-") && tag.len() == 71, "{tag}");
    }
}
