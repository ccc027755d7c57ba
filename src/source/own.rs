//! Credentials that come with a request, instead of being this node's.

use std::{
    collections::BTreeMap,
    fmt,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::watch;
use url::Url;
use zeroize::Zeroizing;

use super::{
    Attached, Attachment, ByteStream, Layered, ManifestBytes, Source, SourceError, SourceErrorKind,
    Sources,
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
    /// For registries: each a `config.json` of Docker, as in a Secret of type `kubernetes.io/dockerconfigjson`. What one
    /// has for a registry is tried where that refuses what those before it have. Helpers that they name are not run.
    pub registries: Vec<Secret>,
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
                keys.registries = take(".dockerconfigjson").into_iter().collect();
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
            registries: vec![Secret::new(file.to_string())],
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
        Digest::of(&self.encode())
    }

    /// The keys as bytes, for [`Keys::decode`].
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let exposed = self.exposed();
        let length = exposed.iter().map(|part| 8 + part.map_or(0, str::len));
        // As long as it gets: what grows leaves copies.
        let mut text = Zeroizing::new(Vec::with_capacity(9 + length.sum::<usize>()));
        text.push(u8::from(self.alone));
        text.extend((self.registries.len() as u64).to_le_bytes());
        for part in self.exposed() {
            match part {
                Some(part) => {
                    text.extend((part.len() as u64 + 1).to_le_bytes());
                    text.extend(part.as_bytes());
                }
                None => text.extend(0u64.to_le_bytes()),
            }
        }
        text
    }

    /// Keys that were [encoded](Self::encode); `None` for anything else.
    pub fn decode(text: &[u8]) -> Option<Self> {
        let (alone, rest) = text.split_first()?;
        let (registries, mut rest) = rest.split_first_chunk()?;
        let part = |rest: &mut &[u8]| {
            let (length, behind) = rest.split_first_chunk()?;
            let length = u64::from_le_bytes(*length);
            let part = usize::try_from(length.saturating_sub(1)).ok()?;
            let (part, behind) = behind.split_at_checked(part)?;
            *rest = behind;
            let part = str::from_utf8(part).ok()?;
            Some((length > 0).then(|| Secret::new(part)))
        };
        let mut keys = Self {
            hub_token: part(&mut rest)?,
            basic: match (part(&mut rest)?, part(&mut rest)?) {
                (Some(user), Some(password)) => Some((user, password)),
                _ => None,
            },
            aws: match (part(&mut rest)?, part(&mut rest)?, part(&mut rest)?) {
                (Some(access_key_id), Some(secret_access_key), session_token) => Some(AwsKeys {
                    access_key_id,
                    secret_access_key,
                    session_token,
                }),
                _ => None,
            },
            registries: Vec::new(),
            alone: *alone != 0,
        };
        for _ in 0..u64::from_le_bytes(*registries) {
            keys.registries.push(part(&mut rest)??);
        }
        rest.is_empty().then_some(keys)
    }

    fn exposed(&self) -> Vec<Option<&str>> {
        let (basic, aws) = (self.basic.as_ref(), self.aws.as_ref());
        let mut exposed = vec![
            self.hub_token.as_ref().map(Secret::expose),
            basic.map(|(user, _)| user.expose()),
            basic.map(|(_, password)| password.expose()),
            aws.map(|aws| aws.access_key_id.expose()),
            aws.map(|aws| aws.secret_access_key.expose()),
            aws.and_then(|aws| aws.session_token.as_ref().map(Secret::expose)),
        ];
        exposed.extend(self.registries.iter().map(|one| Some(one.expose())));
        exposed
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

/// How long a request waits for keys that are still to come; then whoever made it is told to ask again.
const MOMENT: Duration = Duration::from_secs(1);

/// Keys that newer ones can take the place of, while sources use them. Clones are the same.
#[derive(Clone)]
pub struct Credentials(Arc<watch::Sender<Held>>);

struct Held {
    version: u64,
    keys: Keys,
    /// Others are still to come, perhaps until then.
    awaited: Option<Instant>,
}

impl Credentials {
    /// These keys.
    pub fn new(keys: Keys) -> Self {
        Self::held(keys, None)
    }

    /// Keys that are still to come. Until then nobody is asked without; from then on with `keys`.
    pub fn awaited(keys: Keys, until: Instant) -> Self {
        Self::held(keys, Some(until))
    }

    fn held(keys: Keys, awaited: Option<Instant>) -> Self {
        Self(Arc::new(watch::Sender::new(Held {
            version: 0,
            keys,
            awaited,
        })))
    }

    /// Whether they have not come.
    pub fn are_awaited(&self) -> bool {
        self.0.borrow().awaited.is_some()
    }

    /// Whether it is these.
    pub fn are(&self, keys: &Keys) -> bool {
        self.0.borrow().keys == *keys
    }

    /// From now on it is these.
    pub fn replace(&self, keys: Keys) {
        self.0.send_modify(|held| {
            *held = Held {
                version: held.version + 1,
                keys,
                awaited: None,
            };
        });
    }

    /// What it is now, for who may need it in another process; `None` where that is nothing.
    pub fn encode(&self) -> Option<Zeroizing<Vec<u8>>> {
        let held = self.0.borrow();
        held.keys.has_own().then(|| held.keys.encode())
    }

    /// The keys and which they are; else until when they may come.
    async fn now(&self) -> Result<(u64, Keys), Instant> {
        let mut held = self.0.subscribe();
        let left = |held: &Held| {
            let until = held.awaited?;
            let left = until.saturating_duration_since(Instant::now());
            (!left.is_zero()).then_some(left)
        };
        let moment = left(&held.borrow()).map_or(MOMENT, |left| left.min(MOMENT));
        // Nobody says so when their time has come: whatever this gives, it is looked at again.
        let _ = tokio::time::timeout(moment, held.wait_for(|held| left(held).is_none())).await;
        let held = held.borrow();
        match (left(&held), held.awaited) {
            (Some(_), Some(until)) => Err(until),
            _ => Ok((held.version, held.keys.clone())),
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(***)")
    }
}

/// A source that is made when it is first asked, and anew when its credentials were replaced.
#[derive(Debug)]
pub(super) struct OwnSource {
    sources: Sources,
    locator: Locator,
    credentials: Credentials,
    made: Mutex<Option<(u64, Arc<dyn Source>)>>,
}

impl OwnSource {
    pub(super) fn new(sources: &Sources, locator: &Locator, credentials: &Credentials) -> Self {
        Self {
            sources: sources.clone(),
            locator: locator.clone(),
            credentials: credentials.clone(),
            made: Mutex::default(),
        }
    }

    async fn now(&self) -> Result<Arc<dyn Source>, SourceError> {
        let (version, keys) = self.credentials.now().await.map_err(|until| {
            let why = "the credentials that it was published with are not known until it is published again";
            SourceError::new(SourceErrorKind::Denied, self.locator.origin(), why).with_until(until)
        })?;
        let mut made = self.made.lock();
        if let Some((of, source)) = &*made
            && *of == version
        {
            return Ok(Arc::clone(source));
        }
        let source = self.sources.make(&self.locator, &keys)?;
        *made = Some((version, Arc::clone(&source)));
        Ok(source)
    }
}

#[async_trait::async_trait]
impl Source for OwnSource {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        self.now().await?.resolve(reference).await
    }

    fn origin(&self) -> String {
        self.locator.origin()
    }

    async fn read(
        &self,
        location: &Location,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        self.now().await?.read(location, range).await
    }

    async fn layered(&self, reference: &Reference) -> Result<Option<Layered>, SourceError> {
        self.now().await?.layered(reference).await
    }

    async fn layers(&self, reference: &Reference) -> Result<Option<Layered>, SourceError> {
        self.now().await?.layers(reference).await
    }

    async fn manifest(&self, wanted: &str) -> Result<ManifestBytes, SourceError> {
        self.now().await?.manifest(wanted).await
    }

    async fn small_blob(&self, digest: &Digest, limit: u64) -> Result<Arc<[u8]>, SourceError> {
        self.now().await?.small_blob(digest, limit).await
    }

    async fn blob_size(&self, digest: &Digest) -> Result<u64, SourceError> {
        self.now().await?.blob_size(digest).await
    }

    async fn attached(&self, subject: &Digest, kind: &str) -> Result<Vec<Attached>, SourceError> {
        self.now().await?.attached(subject, kind).await
    }

    async fn attach(&self, subject: &Digest, what: Attachment) -> Result<Digest, SourceError> {
        self.now().await?.attach(subject, what).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_told_to_the_next_process_and_nothing_else_is_taken_for_some() {
        let full = Keys {
            hub_token: Some(Secret::new("")),
            basic: Some((Secret::new("u"), Secret::new("ü"))),
            aws: Some(AwsKeys {
                access_key_id: Secret::new("id"),
                secret_access_key: Secret::new("key"),
                session_token: None,
            }),
            registries: vec![Secret::new("{}"), Secret::new("")],
            alone: true,
        };
        for keys in [Keys::default(), Keys::default().alone(), full.clone()] {
            assert_eq!(Keys::decode(&keys.encode()), Some(keys));
        }
        let text = full.encode();
        for at in 0..text.len() {
            assert_eq!(Keys::decode(&text[..at]), None, "cut at {at}");
        }
        assert_eq!(Keys::decode(&[&text[..], b"x"].concat()), None);
        assert_eq!(Keys::decode(&[255; 100]), None);
    }

    #[tokio::test]
    async fn nobody_is_asked_before_the_keys_have_come() {
        let reference: Reference = "s3://bucket/model".parse().unwrap();
        let until = Instant::now() + Duration::from_secs(3600);
        let credentials = Credentials::awaited(Keys::default().alone(), until);
        let sources = Sources::new(super::super::Config::default());
        let source = sources.with_credentials(credentials.clone());
        let source = source.open(&reference).unwrap();
        let error = source.resolve(&reference).await.unwrap_err();
        assert!(error.passes() && error.kind() == SourceErrorKind::Denied);
        // They turn out to be none.
        credentials.replace(Keys::default().alone());
        assert!(!credentials.are_awaited());
        let error = source.resolve(&reference).await.unwrap_err();
        assert!(!error.passes() && error.kind() == SourceErrorKind::Denied);
        assert!(error.to_string().contains("of its own"), "{error}");
    }

    #[tokio::test]
    async fn who_waits_while_the_time_of_keys_comes_is_served_without_them() {
        let reference: Reference = "s3://bucket/model".parse().unwrap();
        let until = Instant::now() + Duration::from_millis(100);
        let credentials = Credentials::awaited(Keys::default().alone(), until);
        let sources = Sources::new(super::super::Config::default());
        let source = sources.with_credentials(credentials);
        let source = source.open(&reference).unwrap();
        let error = source.resolve(&reference).await.unwrap_err();
        assert!(error.to_string().contains("of its own"), "{error}");
    }
}
