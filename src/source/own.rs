//! Credentials that come with a request, instead of being this node's.

use std::{collections::BTreeMap, fmt, ops::Range, sync::Arc};

use parking_lot::Mutex;
use url::Url;
use zeroize::Zeroize as _;

use super::{
    Attached, Attachment, ByteStream, Layered, ManifestBytes, Source, SourceError, Sources,
};
use crate::{
    digest::Digest,
    reference::{HttpUrl, Locator, Reference, Secret},
    tree::{Artifact, Location},
};

/// What opens origins. What is missing is taken from the environment, as without.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    /// A token for the Hub.
    pub hub_token: Option<Secret>,
    /// A user name and a password, for http(s).
    pub basic: Option<(Secret, Secret)>,
    /// For S3.
    pub aws: Option<AwsKeys>,
    /// For registries: a `config.json` of Docker, as in a Secret of type `kubernetes.io/dockerconfigjson`. The helpers
    /// that it names are not run.
    pub registries: Option<Secret>,
    /// What is missing is not taken from the environment.
    pub alone: bool,
}

impl Keys {
    /// What of the data of a Secret opens `reference`, and the names that were looked for; what is used is taken out.
    ///
    /// # Errors
    /// Which value is missing beside another.
    pub fn take(
        reference: &Reference,
        data: &mut BTreeMap<String, String>,
    ) -> Result<(Option<Self>, &'static str), String> {
        let mut take = |name: &str| {
            let value = data.remove(name)?;
            let value = value.trim_end_matches(['\n', '\r']);
            (!value.is_empty()).then(|| Secret::new(value))
        };
        let pair = |one: Option<Secret>, other: Option<Secret>, names: &str| match (one, other) {
            (Some(one), Some(other)) => Ok(Some((one, other))),
            (None, None) => Ok(None),
            _ => Err(format!("one of {names} is missing")),
        };
        let mut keys = Self::default();
        let names = match &reference.locator {
            Locator::Hub(_) => {
                keys.hub_token = take("token");
                "token"
            }
            Locator::Http(_) => {
                let (user, password) = (take("username"), take("password"));
                keys.basic = pair(user, password, "username and password")?;
                "username, password"
            }
            Locator::S3(_) => {
                let (id, secret) = (take("accessKeyId"), take("secretAccessKey"));
                let session_token = take("sessionToken");
                let both = pair(id, secret, "accessKeyId and secretAccessKey")?;
                keys.aws = both.map(|(access_key_id, secret_access_key)| AwsKeys {
                    access_key_id,
                    secret_access_key,
                    session_token,
                });
                "accessKeyId, secretAccessKey, sessionToken"
            }
            Locator::Oci(_) => {
                keys.registries = take(".dockerconfigjson");
                ".dockerconfigjson"
            }
            Locator::Gcs(_) | Locator::Azure(_) | Locator::File(_) => "",
        };
        Ok(((keys != Self::default()).then_some(keys), names))
    }

    /// What an `Authorization` header opens at `registry`, and nothing of this node's beside it; `None` for a scheme other
    /// than Basic and Bearer. What it holds is not looked at here.
    pub fn of_header(registry: &str, header: &str) -> Option<Self> {
        let (scheme, value) = header.trim().split_once(' ')?;
        let field = match scheme.to_ascii_lowercase().as_str() {
            "basic" => "auth",
            "bearer" => "registrytoken",
            _ => return None,
        };
        let file = serde_json::json!({ "auths": { registry: { field: value.trim() } } });
        Some(Self {
            registries: Some(Secret::new(file.to_string())),
            alone: true,
            ..Self::default()
        })
    }

    /// Whether there are any.
    pub fn has_own(&self) -> bool {
        self.exposed().iter().any(Option::is_some)
    }

    /// Tells keys apart. It is not kept on the disk, nor shown.
    pub fn fingerprint(&self) -> Digest {
        let mut text = vec![u8::from(self.alone)];
        for part in self.exposed() {
            match part {
                Some(part) => {
                    text.extend((part.len() as u64 + 1).to_le_bytes());
                    text.extend(part.as_bytes());
                }
                None => text.extend(0u64.to_le_bytes()),
            }
        }
        let digest = Digest::of(&text);
        text.zeroize();
        digest
    }

    fn exposed(&self) -> [Option<&str>; 7] {
        let (basic, aws) = (self.basic.as_ref(), self.aws.as_ref());
        [
            self.hub_token.as_ref().map(Secret::expose),
            basic.map(|(user, _)| user.expose()),
            basic.map(|(_, password)| password.expose()),
            aws.map(|aws| aws.access_key_id.expose()),
            aws.map(|aws| aws.secret_access_key.expose()),
            aws.and_then(|aws| aws.session_token.as_ref().map(Secret::expose)),
            self.registries.as_ref().map(Secret::expose),
        ]
    }

    /// These keys, without any of the environment beside them.
    #[must_use]
    pub fn alone(self) -> Self {
        Self {
            alone: true,
            ..self
        }
    }

    /// `url` with the user and password, where there are some.
    pub(super) fn open(&self, url: &HttpUrl) -> HttpUrl {
        let mut url = url.clone();
        if let Some((user, password)) = &self.basic {
            let full = url.secret.as_ref().map(Secret::expose).map(Url::parse);
            let mut full = full.and_then(Result::ok).unwrap_or(url.public.clone());
            // Both fail only for URLs without host.
            let _ = full.set_username(user.expose());
            let _ = full.set_password(Some(password.expose()));
            url.secret = Some(Secret::new(full));
        }
        url
    }
}

impl PartialEq for Keys {
    fn eq(&self, other: &Self) -> bool {
        self.exposed() == other.exposed() && self.alone == other.alone
    }
}

/// An access key for S3.
#[derive(Debug, Clone)]
pub struct AwsKeys {
    pub access_key_id: Secret,
    pub secret_access_key: Secret,
    pub session_token: Option<Secret>,
}

/// Keys that newer ones can take the place of, while sources use them. Clones are the same.
#[derive(Clone, Default)]
pub struct Credentials(Arc<Mutex<(u64, Keys)>>);

impl Credentials {
    /// These keys.
    pub fn new(keys: Keys) -> Self {
        Self(Arc::new(Mutex::new((0, keys))))
    }

    /// Whether it is these.
    pub fn are(&self, keys: &Keys) -> bool {
        self.0.lock().1 == *keys
    }

    /// From now on it is these.
    pub fn replace(&self, keys: Keys) {
        let mut held = self.0.lock();
        *held = (held.0 + 1, keys);
    }

    fn now(&self) -> (u64, Keys) {
        self.0.lock().clone()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(***)")
    }
}

/// A source that is made anew when its credentials were replaced.
#[derive(Debug)]
pub(super) struct OwnSource {
    sources: Sources,
    locator: Locator,
    credentials: Credentials,
    made: Mutex<(u64, Arc<dyn Source>)>,
}

impl OwnSource {
    pub(super) fn new(
        sources: &Sources,
        locator: &Locator,
        credentials: &Credentials,
    ) -> Result<Self, SourceError> {
        let (version, keys) = credentials.now();
        let made = sources.make(locator, &keys)?;
        Ok(Self {
            sources: sources.clone(),
            locator: locator.clone(),
            credentials: credentials.clone(),
            made: Mutex::new((version, made)),
        })
    }

    fn now(&self) -> Result<Arc<dyn Source>, SourceError> {
        let (version, keys) = self.credentials.now();
        let mut made = self.made.lock();
        if made.0 != version {
            *made = (version, self.sources.make(&self.locator, &keys)?);
        }
        Ok(Arc::clone(&made.1))
    }
}

#[async_trait::async_trait]
impl Source for OwnSource {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        self.now()?.resolve(reference).await
    }

    fn origin(&self) -> String {
        self.locator.origin()
    }

    async fn read(
        &self,
        location: &Location,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        self.now()?.read(location, range).await
    }

    async fn layered(&self, reference: &Reference) -> Result<Option<Layered>, SourceError> {
        self.now()?.layered(reference).await
    }

    async fn manifest(&self, wanted: &str) -> Result<ManifestBytes, SourceError> {
        self.now()?.manifest(wanted).await
    }

    async fn small_blob(&self, digest: &Digest, limit: u64) -> Result<Arc<[u8]>, SourceError> {
        self.now()?.small_blob(digest, limit).await
    }

    async fn blob_size(&self, digest: &Digest) -> Result<u64, SourceError> {
        self.now()?.blob_size(digest).await
    }

    async fn attached(&self, subject: &Digest, kind: &str) -> Result<Vec<Attached>, SourceError> {
        self.now()?.attached(subject, kind).await
    }

    async fn attach(&self, subject: &Digest, what: Attachment) -> Result<Digest, SourceError> {
        self.now()?.attach(subject, what).await
    }
}
