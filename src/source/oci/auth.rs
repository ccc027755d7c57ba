//! Getting in: from what a registry wants (`WWW-Authenticate`) and the credentials there are to what
//! is sent with each request.
//!
//! Invariants: one token serves all requests to a repository; it is fetched by one of them while the
//! others wait (or go on with the old one as long as that lives), shortly before it expires or once
//! it is refused; credentials go to the registry they are for, or to the token server it names, over
//! https (plain http only on this machine, or where a registry elsewhere is reached so because the
//! configuration says it); nothing of them is shown. In memory only.

mod challenge;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use reqwest::{StatusCode, header::HeaderMap};
use serde::Deserialize;
use tokio::{
    sync::{Mutex as Turnstile, MutexGuard as Turn},
    time::timeout,
};
use url::Url;
use zeroize::Zeroizing;

pub(super) use self::challenge::Challenge;
use super::{
    credentials::{Credential, Found, Keychain, Place},
    is_loopback,
};
use crate::{
    reference::Secret,
    source::{
        SourceError, SourceErrorKind as Kind,
        web::{Ask, Auth, Body, Web, accept, host_of},
    },
};

/// Largest answer of a token server, in bytes.
const MAX_ANSWER: u64 = 1 << 20;
/// How long a token lives that does not say (distribution, docs/spec/auth/token.md).
const DEFAULT_LIFE: u64 = 60;
/// Longest use of a token, in seconds.
const MAX_LIFE: u64 = 24 * 3600;
/// Longest wait for the first request of another.
const MAX_TURN: Duration = Duration::from_secs(2);
/// From this age on, what was granted may have been taken back where a registry says 403.
const OLD: Duration = Duration::from_secs(60);
/// What a person can do about a refusal.
const HINT: &str = "log in with docker login or podman login, or name a file with credentials in source.oci.auth_files";

/// What is known of how to get in at one host, for one repository.
#[derive(Debug, Default)]
pub(super) struct Session {
    now: Mutex<Option<Arc<Grant>>>,
    turn: Turnstile<()>,
    /// The last failure to get in: who waited meanwhile shares it, and does not wait for another.
    failure: Mutex<Option<(Instant, SourceError)>>,
}

/// What opens a host.
#[derive(Debug)]
pub(super) struct Grant {
    /// `None`: nothing is needed.
    auth: Option<Auth>,
    challenge: Option<Challenge>,
    /// Where the credentials are from, for people.
    origin: String,
    made: Instant,
    /// When it should be renewed, and when it ends.
    life: Option<(Instant, Instant)>,
    /// Which of several credentials it came by, and whether there is another after that.
    nth: usize,
    more: bool,
    /// It has opened something.
    is_good: AtomicBool,
}

impl Grant {
    /// Whether other credentials may do better.
    fn is_one_of_several(&self) -> bool {
        self.more && !self.is_good.load(Ordering::Relaxed)
    }
}

/// How to send the next request.
pub(super) struct Pass<'a> {
    grant: Option<Arc<Grant>>,
    /// Held by the first request, which finds out what the host wants.
    turn: Option<Turn<'a, ()>>,
}

/// That a host has refused a request (401, 403).
#[derive(Debug)]
pub(super) struct Refused {
    status: StatusCode,
    challenge: Option<Challenge>,
}

/// Who is asked, and for what.
#[derive(Clone, Copy)]
pub(super) struct Gate<'a> {
    pub(super) web: &'a Web,
    /// Where the registry is.
    pub(super) base: &'a Url,
    /// For which credentials are looked up.
    pub(super) place: &'a Place,
    pub(super) keychain: &'a Keychain,
    /// `pull` or `pull,push`.
    pub(super) actions: &'a str,
}

#[derive(Deserialize)]
struct Token {
    token: Option<Zeroizing<String>>,
    access_token: Option<Zeroizing<String>>,
    expires_in: Option<f64>,
}

impl Refused {
    /// What the answer says, if it is one.
    pub(super) fn of(status: StatusCode, headers: &HeaderMap) -> Option<Self> {
        let refused = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
        refused.then(|| Self {
            status,
            challenge: Challenge::of(headers),
        })
    }

    /// What the host wants, if it says so.
    pub(super) fn into_challenge(self) -> Option<Challenge> {
        self.challenge
    }
}

impl Pass<'_> {
    pub(super) fn auth(&self) -> Option<&Auth> {
        self.grant.as_ref()?.auth.as_ref()
    }

    /// Whether it was tried first of several.
    pub(super) fn is_one_of_several(&self) -> bool {
        let grant = self.grant.as_ref();
        grant.is_some_and(|grant| grant.is_one_of_several())
    }
}

impl Session {
    /// How to send a request now.
    ///
    /// # Errors
    /// As [`Session::renew`], where what there was has expired.
    pub(super) async fn pass(&self, gate: Gate<'_>) -> Result<Pass<'_>, SourceError> {
        let known = self.now.lock().clone();
        let Some(grant) = known else {
            // The first request finds out for all what the host wants.
            let turn = timeout(MAX_TURN, self.turn.lock()).await.ok();
            let grant = self.now.lock().clone();
            let turn = turn.filter(|_| grant.is_none());
            return Ok(Pass { grant, turn });
        };
        let now = Instant::now();
        let grant = match grant.life {
            Some((_, ends)) if ends <= now => self.exchange(gate, &grant, None, None).await?,
            Some((due, _)) if due <= now => match self.turn.try_lock() {
                // Someone does it already, and the old one still lives.
                Err(_) => grant,
                Ok(turn) => match self.exchange(gate, &grant, None, Some(turn)).await {
                    Ok(renewed) => renewed,
                    Err(error) => {
                        tracing::warn!("cannot renew a token before it expires: {error}");
                        grant
                    }
                },
            },
            _ => grant,
        };
        let grant = Some(grant);
        Ok(Pass { grant, turn: None })
    }

    /// Takes note that the request was let in.
    pub(super) fn entered(&self, pass: &Pass<'_>) {
        if let Some(grant) = &pass.grant {
            grant.is_good.store(true, Ordering::Relaxed);
        } else {
            let mut now = self.now.lock();
            if now.is_none() {
                *now = Some(Arc::new(Grant {
                    auth: None,
                    challenge: None,
                    origin: String::new(),
                    made: Instant::now(),
                    life: None,
                    nth: 0,
                    more: false,
                    is_good: AtomicBool::new(true),
                }));
            }
        }
    }

    /// A new pass after `pass` was refused; `None` where another could not do better.
    ///
    /// # Errors
    /// A token server that refuses or cannot be reached; credentials that cannot be read.
    pub(super) async fn renew<'a>(
        &'a self,
        gate: Gate<'_>,
        pass: Pass<'_>,
        refused: &Refused,
    ) -> Result<Option<Pass<'a>>, SourceError> {
        let known = pass.grant.as_ref();
        let challenge = match (&refused.challenge, known) {
            (Some(challenge), _) if refused.status == StatusCode::UNAUTHORIZED => challenge.clone(),
            (_, Some(known)) if known.made.elapsed() >= OLD || known.is_one_of_several() => {
                match &known.challenge {
                    Some(challenge) => challenge.clone(),
                    None => return Ok(None),
                }
            }
            _ => return Ok(None),
        };
        let grant = match known {
            Some(known) => self.exchange(gate, known, Some(challenge), None).await?,
            None => {
                let since = Instant::now();
                let _turn = match pass.turn {
                    Some(turn) => turn,
                    None => self.turn.lock().await,
                };
                let found = self.now.lock().clone();
                match found {
                    Some(found) => found,
                    None => self.get_in(gate, challenge, None, since).await?,
                }
            }
        };
        let grant = Some(grant);
        Ok(Some(Pass { grant, turn: None }))
    }

    /// What was granted after `old`; one caller asks for it. `challenge` is new if `old` was refused.
    async fn exchange(
        &self,
        gate: Gate<'_>,
        old: &Arc<Grant>,
        challenge: Option<Challenge>,
        turn: Option<Turn<'_, ()>>,
    ) -> Result<Arc<Grant>, SourceError> {
        let since = Instant::now();
        let _turn = match turn {
            Some(turn) => turn,
            None => self.turn.lock().await,
        };
        let found = self.now.lock().clone();
        if let Some(found) = found.filter(|found| !Arc::ptr_eq(found, old)) {
            return Ok(found);
        }
        let was_refused = challenge.is_some();
        match challenge.or_else(|| old.challenge.clone()) {
            Some(challenge) => {
                let before = Some((&**old, was_refused));
                self.get_in(gate, challenge, before, since).await
            }
            None => Ok(Arc::clone(old)),
        }
    }

    /// Gets in, unless another failed to since `since`. `before`: what was granted, and whether it was
    /// refused.
    async fn get_in(
        &self,
        gate: Gate<'_>,
        challenge: Challenge,
        before: Option<(&Grant, bool)>,
        since: Instant,
    ) -> Result<Arc<Grant>, SourceError> {
        let failure = self.failure.lock().clone();
        if let Some((_, error)) = failure.filter(|(when, _)| *when >= since) {
            return Err(error);
        }
        let (tried, afresh) = match before {
            None => (0, false),
            Some((before, true)) if before.is_one_of_several() => (before.nth + 1, true),
            Some((before, true)) if !before.is_good.load(Ordering::Relaxed) => (0, true),
            Some((before, refused)) => (before.nth, refused),
        };
        match gate.get_in(challenge, afresh, tried).await {
            Ok(grant) => {
                let grant = Arc::new(grant);
                *self.now.lock() = Some(Arc::clone(&grant));
                Ok(grant)
            }
            Err(error) => {
                *self.failure.lock() = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    /// The error for a request that stays refused: `error`, and what was tried.
    pub(super) fn denied(&self, gate: Gate<'_>, error: SourceError) -> SourceError {
        let known = self.now.lock().clone();
        let tried = match known {
            Some(known) if !known.origin.is_empty() => known.origin.clone(),
            _ => gate.keychain.places(),
        };
        error.because(tried).with_hint(HINT)
    }
}

impl Gate<'_> {
    /// What to send after `challenge`, outside of any session.
    ///
    /// # Errors
    /// As [`Session::renew`].
    pub(super) async fn enter(&self, challenge: Challenge) -> Result<Option<Auth>, SourceError> {
        Ok(self.get_in(challenge, false, 0).await?.auth)
    }

    /// Meets `challenge`, with the credentials after the first `tried`. `afresh`: what was remembered has
    /// just been refused.
    async fn get_in(
        &self,
        challenge: Challenge,
        afresh: bool,
        mut tried: usize,
    ) -> Result<Grant, SourceError> {
        loop {
            let found = self.keychain.find(self.place, afresh, tried).await;
            match self.get_in_with(&found, challenge.clone(), tried).await {
                Err(error) if found.more && error.kind() == Kind::Denied => tried += 1,
                got => return got,
            }
        }
    }

    async fn get_in_with(
        &self,
        found: &Found,
        challenge: Challenge,
        nth: usize,
    ) -> Result<Grant, SourceError> {
        let host = host_of(self.base);
        let what = format!("credentials for {host}");
        let denied = |why: String| SourceError::new(Kind::Denied, &what, why).with_hint(HINT);
        let grant = |auth: Option<Auth>, life: Option<Duration>| {
            let made = Instant::now();
            Grant {
                auth,
                challenge: Some(challenge.clone()),
                origin: found.origin.clone(),
                made,
                // Renewed with some time left, so that no request starts with a dying token.
                life: life.map(|life| {
                    let margin = (life / 10).min(Duration::from_secs(30));
                    (made + life - margin, made + life)
                }),
                nth,
                more: found.more,
                is_good: AtomicBool::new(false),
            }
        };
        let unusable = || {
            denied(format!(
                "{}: has characters that no token has",
                found.origin
            ))
        };
        if let Some(Credential::Token(token)) = &found.credential {
            let auth = Auth::bearer(self.base, token).ok_or_else(unusable)?;
            return Ok(grant(Some(auth), None));
        }
        let Challenge::Bearer {
            realm,
            service,
            scope,
        } = &challenge
        else {
            return match &found.credential {
                Some(Credential::Password { user, password }) => {
                    let auth = Auth::basic(self.base, user.clone(), password.clone());
                    Ok(grant(Some(auth), None))
                }
                Some(_) => Err(denied(format!(
                    "{host} wants a user name and password, not an identity token: {}",
                    found.origin
                ))),
                None => Err(denied(format!(
                    "{host} wants a user name and password: {}",
                    found.origin
                ))),
            };
        };
        let realm_host = host_of(realm);
        // That a registry on this machine is spoken to without TLS says nothing of the network.
        let is_meant =
            self.base.scheme() == "http" && !self.base.host_str().is_some_and(is_loopback);
        if realm.scheme() == "http" && !is_meant && !is_loopback(&realm_host) {
            return Err(SourceError::new(
                Kind::Invalid,
                what,
                format!("{host} names a token server without https ({realm_host})"),
            ));
        }
        let own_scope = format!("repository:{}:{}", self.place.repository, self.actions);
        let mut scopes: Vec<&str> = scope.iter().flat_map(|s| s.split(' ')).collect();
        // A registry names the scope of the request at hand, which may be less than what follows.
        let is_ours = |s: &&str| s.starts_with(&format!("repository:{}:", self.place.repository));
        if self.actions != "pull" || !scopes.iter().any(is_ours) {
            scopes.retain(|s| !is_ours(s));
            scopes.push(&own_scope);
        }
        let mut url = realm.clone();
        let _ = url.set_username("");
        let _ = url.set_password(None);
        let what = format!("token for {} from {realm_host}", self.place.name());
        let document = match &found.credential {
            Some(Credential::Identity(token)) => {
                let joined = scopes.join(" ");
                let mut form = vec![
                    ("grant_type", "refresh_token"),
                    ("client_id", "hearth"),
                    ("scope", &joined),
                    ("refresh_token", token.expose()),
                ];
                if let Some(service) = service {
                    form.push(("service", service));
                }
                let ask = Ask {
                    what: &what,
                    url,
                    auth: None,
                    headers: None,
                };
                let body = Some(Body::Form(&form));
                self.web.document(&ask, body, MAX_ANSWER, &accept).await
            }
            other => {
                let auth = match other {
                    Some(Credential::Password { user, password }) => {
                        Some(Auth::basic(&url, user.clone(), password.clone()))
                    }
                    _ => None,
                };
                {
                    let mut query = url.query_pairs_mut();
                    if let Some(service) = service {
                        query.append_pair("service", service);
                    }
                    for scope in scopes {
                        query.append_pair("scope", scope);
                    }
                }
                let ask = Ask {
                    what: &what,
                    url,
                    auth: auth.as_ref(),
                    headers: None,
                };
                self.web.document(&ask, None, MAX_ANSWER, &accept).await
            }
        };
        let document = document.map_err(|error| match error.kind() {
            Kind::Denied => error.because(&found.origin).with_hint(HINT),
            _ => error,
        })?;
        // The error of the parser could show the token.
        let body = Zeroizing::new(document.body);
        let answer: Option<Token> = serde_json::from_slice(&body).ok();
        let life = answer.as_ref().and_then(|answer| answer.expires_in);
        let token = answer.and_then(|answer| {
            let given = answer.token.filter(|token| !token.is_empty());
            given.or(answer.access_token.filter(|token| !token.is_empty()))
        });
        let Some(token) = token else {
            let message = format!("{realm_host} answered with no token");
            return Err(SourceError::new(Kind::Corrupt, what, message));
        };
        let life = match life {
            Some(life) if life.is_finite() && life > 0.0 => life.min(MAX_LIFE as f64),
            _ => DEFAULT_LIFE as f64,
        };
        let auth = Auth::bearer(self.base, &Secret::new(token.as_str())).ok_or_else(unusable)?;
        Ok(grant(Some(auth), Some(Duration::from_secs_f64(life))))
    }
}
