//! One place that is asked for a repository: a mirror, or the registry itself.

use std::{
    collections::HashMap,
    fmt,
    ops::Range,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use reqwest::{
    StatusCode,
    header::{self, HeaderMap, HeaderValue},
};
use url::Url;

use super::{
    auth::{Gate, Refused, Session},
    credentials::{Keychain, Place},
    hosts::Endpoint,
    manifest,
};
use crate::digest::Digest;
use crate::source::{
    ByteStream, Config, SourceError, SourceErrorKind as Kind, VIA,
    listing::short,
    web::{Ask, Auth, Document, Pin, Web, host_of, text},
};

/// How long a mirror that failed is asked last.
const PENALTY: Duration = Duration::from_secs(15);
/// How long a mirror is asked last for what it did not have.
const ABSENCE: Duration = Duration::from_secs(60);
const SLOWER: &str =
    "wait, or log in (docker login): registries allow less to those they do not know";
/// Longest answer to whether it is a registry, in bytes.
const MAX_GREETING: u64 = 1 << 20;
/// Most credentials tried for one request.
const MAX_RENEWALS: usize = 16;
/// Most failures remembered.
const MAX_FAILURES: usize = 1024;

/// One place, for one repository.
pub(super) struct Host {
    web: Web,
    pub(super) endpoint: Endpoint,
    /// What credentials are looked up for.
    place: Place,
    /// What a mirror is told it stands for.
    namespace: Option<String>,
    keychain: Keychain,
    session: Session,
    /// Until when it is asked last; for everything, or for one path.
    failures: Mutex<HashMap<String, Instant>>,
}

/// What is wanted of a host.
#[derive(Clone)]
pub(super) enum Want {
    /// A manifest of at most so many bytes, with this digest.
    Manifest(u64, Option<Digest>),
    /// A blob of at most so many bytes, with this digest.
    Blob(u64, Digest),
    /// A range of a blob.
    Range(Range<u64>),
    /// How long a blob is.
    Size,
}

/// What came.
pub(super) enum Got {
    Document(Document),
    Stream(ByteStream),
    Size(u64),
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Host({})", self.name())
    }
}

impl Host {
    /// `repository` of `registry` at `endpoint`.
    pub(super) fn new(
        mut endpoint: Endpoint,
        registry: &str,
        repository: &str,
        keychain: &Keychain,
        config: &Config,
    ) -> Result<Self, SourceError> {
        // No registry far away needs to know one node from another.
        if let Some(asker) = &config.asker
            && (endpoint.is_mirror || super::is_loopback(registry))
            && let Ok(id) = HeaderValue::from_str(&asker.store)
        {
            endpoint.headers.insert(VIA, id);
        }
        let place = Place {
            registry: match endpoint.is_mirror {
                true => host_of(&endpoint.base),
                false => registry.to_owned(),
            },
            repository: repository.to_owned(),
        };
        Ok(Self {
            web: Web::with_tls(config, endpoint.tls.clone())?,
            place,
            namespace: endpoint.is_mirror.then(|| registry.to_owned()),
            keychain: keychain.clone(),
            session: Session::default(),
            failures: Mutex::default(),
            endpoint,
        })
    }

    /// `host` or `host:port`.
    pub(super) fn name(&self) -> String {
        host_of(&self.endpoint.base)
    }

    /// Whether it failed lately, or did not have `path`.
    pub(super) fn is_last_choice(&self, path: &str) -> bool {
        let failures = self.failures.lock();
        let now = Instant::now();
        let failed = |key| failures.get(key).is_some_and(|until| *until > now);
        failed("") || failed(path)
    }

    /// Takes note of an error, so that the other hosts are asked first.
    pub(super) fn failed(&self, path: &str, error: &SourceError) {
        let (key, time) = match error.kind() {
            Kind::NotFound | Kind::Invalid | Kind::Changed => (path, ABSENCE),
            _ => ("", PENALTY),
        };
        let mut failures = self.failures.lock();
        if failures.len() >= MAX_FAILURES {
            failures.clear();
        }
        failures.insert(key.to_owned(), Instant::now() + time);
    }

    /// Asks for `path` (such as `blobs/sha256:...`) of the repository.
    ///
    /// # Errors
    /// What the host says, what the token server says, or that neither can be reached.
    pub(super) async fn get(
        &self,
        what: &str,
        path: &str,
        want: &Want,
    ) -> Result<Got, SourceError> {
        let gate = self.gate("pull");
        let mut pass = self.session.pass(gate).await?;
        let mut renewals = 0;
        loop {
            let refused = Mutex::new(None);
            let inspect = |status: StatusCode, headers: &HeaderMap| {
                *refused.lock() = Refused::of(status, headers);
                Ok(None)
            };
            let mut headers = self.endpoint.headers.clone();
            if matches!(want, Want::Manifest(..)) {
                headers.insert(header::ACCEPT, HeaderValue::from_static(manifest::ACCEPT));
            }
            let ask = Ask {
                what,
                url: self.url(path),
                auth: pass.auth(),
                headers: Some(&headers),
            };
            let got = match want {
                Want::Manifest(limit, _) | Want::Blob(limit, _) => {
                    let document = self.web.document(&ask, None, *limit, &inspect).await;
                    document.map(Got::Document)
                }
                // A blob is read in parallel ranges: one request finds out where it really is.
                Want::Range(range) => {
                    let range = range.clone();
                    let stream = self
                        .web
                        .read_range(&ask, Pin::Free, range, true, &inspect)
                        .await;
                    stream.map(Got::Stream)
                }
                Want::Size => {
                    let probe = self.web.probe(&ask, &inspect).await;
                    probe.map(|probe| Got::Size(probe.size))
                }
            };
            let error = match got {
                Ok(got) => {
                    self.session.entered(&pass);
                    return match (&got, want) {
                        (Got::Document(found), Want::Manifest(_, wanted)) => {
                            verify(what, found, *wanted).map(|()| got)
                        }
                        (Got::Document(found), Want::Blob(_, wanted)) => {
                            verify(what, found, Some(*wanted)).map(|()| got)
                        }
                        _ => Ok(got),
                    };
                }
                Err(error) => error,
            };
            if error.kind() == Kind::Throttled {
                return Err(error.with_hint(SLOWER));
            }
            let Some(refused) = refused
                .into_inner()
                .filter(|_| error.kind() == Kind::Denied)
            else {
                return Err(error);
            };
            if renewals > 0 && (renewals >= MAX_RENEWALS || !pass.is_one_of_several()) {
                return Err(self.session.denied(gate, error));
            }
            renewals += 1;
            pass = match self.session.renew(gate, pass, &refused).await? {
                Some(pass) => pass,
                None => return Err(self.session.denied(gate, error)),
            };
        }
    }

    /// What getting in here needs.
    fn gate<'a>(&'a self, actions: &'a str) -> Gate<'a> {
        Gate {
            web: &self.web,
            base: &self.endpoint.base,
            place: &self.place,
            keychain: &self.keychain,
            actions,
        }
    }

    /// What opens this host for `actions`, such as `pull,push`; `None` where nothing is needed.
    ///
    /// # Errors
    /// As [`Host::get`].
    pub(super) async fn login(
        &self,
        what: &str,
        actions: &str,
    ) -> Result<Option<Auth>, SourceError> {
        let refused = Mutex::new(None);
        let inspect = |status: StatusCode, headers: &HeaderMap| {
            *refused.lock() = Refused::of(status, headers);
            Ok(None)
        };
        let mut url = self.endpoint.base.clone();
        let base = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{base}/"));
        let ask = Ask {
            what,
            url,
            auth: None,
            headers: Some(&self.endpoint.headers),
        };
        match self.web.document(&ask, None, MAX_GREETING, &inspect).await {
            Ok(_) => Ok(None),
            Err(error) => match refused.into_inner().and_then(Refused::into_challenge) {
                Some(challenge) => self.gate(actions).enter(challenge).await,
                None => Err(error),
            },
        }
    }

    /// `path` may have a query.
    fn url(&self, path: &str) -> Url {
        let (path, query) = path
            .split_once('?')
            .map_or((path, None), |(p, q)| (p, Some(q)));
        let mut url = self.endpoint.base.clone();
        let base = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{base}/{}/{path}", self.place.repository));
        url.set_query(query);
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        url
    }
}

/// Whether a document has the digest that was asked for, and that its host says it has.
fn verify(what: &str, found: &Document, wanted: Option<Digest>) -> Result<(), SourceError> {
    let digest = Digest::of(&found.body);
    let corrupt = |claimed: &str| {
        let host = host_of(&found.url);
        let message = format!("{host} answered with other bytes ({digest}), not {claimed}");
        Err(SourceError::new(Kind::Corrupt, what, message))
    };
    if let Some(wanted) = wanted {
        return match wanted == digest {
            true => Ok(()),
            false => corrupt(&wanted.to_string()),
        };
    }
    let claimed = text(&found.headers, "docker-content-digest");
    match claimed.filter(|claimed| claimed.starts_with("sha256:")) {
        Some(claimed) if claimed != digest.to_string() => corrupt(&short(claimed)),
        _ => Ok(()),
    }
}
