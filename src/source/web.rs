//! The one HTTP client for plain HTTP and the Hub: pinned byte ranges and small documents.
//!
//! Invariants: a body that ends without an error is exactly the range asked for, of the generation
//! asked for, unencoded; credentials go to the origin they were made for and nowhere else, not even
//! after a redirect and back; a redirect never leaves `https`; every document has a size limit; no
//! error shows a query, user info or a token. Retries are not made here, with two exceptions: a
//! remembered redirect that no longer works is asked for again once, and so is what was sent on a
//! connection that broke before the answer began. Called by
//! [`super::http`] and [`super::hub`]; keeps nothing on disk.

mod answer;
mod auth;
mod headers;
mod routes;

use std::{ops::Range, sync::OnceLock, time::Duration};

use reqwest::{
    Method, StatusCode,
    header::{self, HeaderMap, HeaderValue},
};
use tokio::time::timeout;
use url::Url;

use self::{
    answer::{
        Answer, encoded_error, is_broken, is_encoded, is_stale, ranged, redirect, refusal,
        root_cause, transport,
    },
    auth::{Credentials, strip_user_info},
    routes::{Route, Routes},
};
pub(crate) use self::{
    auth::{Auth, Exposed, Tls, extra_roots},
    headers::{last_modified, link_next, text, total_of},
};
use super::{ByteStream, Config, SourceError, SourceErrorKind as Kind};

/// Most redirects followed for one request.
const MAX_REDIRECTS: usize = 10;
/// How long an idle connection is kept: less than the 60 to 75 s after which servers close it.
const IDLE: Duration = Duration::from_secs(50);

/// The client: many connections of its own per host, HTTP/1.1, so that parallel ranges use
/// parallel TCP streams.
#[derive(Debug)]
pub(crate) struct Web {
    /// For what needs no TLS: reading the root certificates takes longer than many a request.
    plain: Option<reqwest::Client>,
    /// For all else; made when first needed.
    secure: OnceLock<reqwest::Client>,
    config: Config,
    tls: Tls,
    /// Longest time until an answer begins.
    request: Duration,
    /// Longest time without a byte of a body.
    stall: Duration,
    routes: Routes,
}

/// What is asked of whom. Not `Debug`: the URL may hold a secret, as may those below.
#[derive(Clone)]
pub(crate) struct Ask<'a> {
    /// The object and the host, for errors.
    pub(crate) what: &'a str,
    /// Where; may carry a secret query, never user info.
    pub(crate) url: Url,
    /// Sent as long as the request stays at the origin of these credentials.
    pub(crate) auth: Option<&'a Auth>,
    /// Sent as long as the request stays at the origin of `url`; may hold secrets too.
    pub(crate) headers: Option<&'a HeaderMap>,
}

/// What a POST request carries. Not `Debug`: may hold a secret.
#[derive(Clone, Copy)]
pub(crate) enum Body<'a> {
    Json(&'a serde_json::Value),
    Form(&'a [(&'a str, &'a str)]),
}

/// What the answer to a range request must match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pin<'a> {
    /// This entity tag, quotes and all.
    Etag(&'a str),
    /// This `Last-Modified` date, to the letter.
    Modified(&'a str),
    /// This size of the whole, where the origin says nothing better.
    Size(u64),
    /// Nothing: the caller's `inspect` or a digest decides.
    Free,
}

/// Looks at the status and headers of an answer from the asked origin (redirects too) and may
/// refuse it. May give the size that the whole object must have.
pub(crate) type Inspect<'a> =
    dyn Fn(StatusCode, &HeaderMap) -> Result<Option<u64>, SourceError> + Send + Sync + 'a;

/// Accepts every answer.
pub(crate) fn accept(_: StatusCode, _: &HeaderMap) -> Result<Option<u64>, SourceError> {
    Ok(None)
}

/// What an object is, without its content.
pub(crate) struct Probe {
    /// Where the answer came from after redirects.
    pub(crate) url: Url,
    /// Bytes of the whole.
    pub(crate) size: u64,
    /// The headers of the answer.
    pub(crate) headers: HeaderMap,
}

/// A small document.
pub(crate) struct Document {
    /// Where it came from after redirects.
    pub(crate) url: Url,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Web {
    /// A client with the timeouts of `config`. Trusts the roots of the system (or `SSL_CERT_FILE`,
    /// `SSL_CERT_DIR`) and those in the PEM files that `REQUESTS_CA_BUNDLE` and `CURL_CA_BUNDLE`
    /// name, which it reads when it first needs them; uses the proxies that `HTTP_PROXY`,
    /// `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` name.
    ///
    /// # Errors
    /// A proxy that cannot be used.
    pub(crate) fn new(config: &Config) -> Result<Self, SourceError> {
        Self::with_tls(config, Tls::default())
    }

    /// As [`Web::new`], with `tls` besides.
    ///
    /// # Errors
    /// As [`Web::new`].
    pub(crate) fn with_tls(config: &Config, tls: Tls) -> Result<Self, SourceError> {
        super::install_tls();
        let plain = match super::tls_to_proxies() {
            true => None,
            false => Some(builder(config).tls_certs_only([]).build()),
        };
        Ok(Self {
            plain: plain.transpose().map_err(unusable)?,
            secure: OnceLock::new(),
            request: config.request_timeout(),
            stall: config.stall_timeout(),
            config: config.clone(),
            tls,
            routes: Routes::default(),
        })
    }

    fn builder(&self) -> reqwest::ClientBuilder {
        let builder = builder(&self.config).tls_danger_accept_invalid_certs(self.tls.skip_verify);
        match &self.tls.identity {
            Some(identity) => builder.identity(identity.clone()),
            None => builder,
        }
    }

    /// The client for `url`.
    ///
    /// # Errors
    /// A CA bundle that cannot be read; a proxy that cannot be used.
    fn client(&self, url: &Url) -> Result<&reqwest::Client, SourceError> {
        if let Some(plain) = self.plain.as_ref().filter(|_| url.scheme() == "http") {
            return Ok(plain);
        }
        if let Some(client) = self.secure.get() {
            return Ok(client);
        }
        let mut roots = extra_roots()?.roots;
        roots.extend(self.tls.roots.iter().cloned());
        let made = self.builder().tls_certs_merge(roots.clone()).build();
        let made = made.or_else(|error| {
            // A machine without any root certificate can still ask a proxy over plain http.
            tracing::warn!("https will not work: {}", root_cause(&error.without_url()));
            self.builder().tls_certs_only(roots).build()
        });
        let made = made.map_err(unusable)?;
        Ok(self.secure.get_or_init(|| made))
    }

    /// Reads bytes `range` of the object at `ask.url`, of the generation `pin`. Where another host
    /// serves it behind a redirect, that answer is remembered until it expires; with
    /// `one_at_a_time`, parallel reads of a new object wait for the first one's redirect.
    pub(crate) async fn read_range(
        &self,
        ask: &Ask<'_>,
        pin: Pin<'_>,
        range: Range<u64>,
        one_at_a_time: bool,
        inspect: &Inspect<'_>,
    ) -> Result<ByteStream, SourceError> {
        let key = ask.url.as_str();
        let headers = range_headers(ask.what, pin, &range)?;
        let mut renewed = false;
        loop {
            let mut turn = None;
            if one_at_a_time && self.routes.get(key).is_none() {
                turn = self.routes.turn(key).await;
            }
            let route = self.routes.get(key);
            if route.is_some() {
                turn = None;
            }
            if let Some((url, size)) = route.and_then(|route| Some((route.url?, route.size))) {
                let direct = Ask {
                    what: ask.what,
                    url: url.clone(),
                    auth: None,
                    headers: None,
                };
                let answer = self.send(Method::GET, &direct, &headers, &accept).await;
                match answer
                    .and_then(|answer| ranged(ask.what, answer, pin, &range, size, self.stall))
                {
                    // It may only have expired. One of its readers renews it for all, once.
                    Err(error) if is_stale(error.kind()) && !renewed => {
                        self.routes.forget(key, &url);
                        renewed = true;
                        continue;
                    }
                    answer => return answer,
                }
            }
            let answer = self.send(Method::GET, ask, &headers, inspect).await?;
            if answer.response.status().is_success() {
                match answer.at_origin {
                    false => {
                        let route = Route::new(answer.url.clone(), answer.size);
                        self.routes.put(key.to_owned(), route);
                    }
                    true if one_at_a_time => self.routes.put(key.to_owned(), Route::none()),
                    true => {}
                }
            }
            drop(turn);
            let size = answer.size;
            return ranged(ask.what, answer, pin, &range, size, self.stall);
        }
    }

    /// Finds size and headers of the object at `ask.url`: by HEAD, or where that is refused or
    /// tells no size, by asking for the first byte.
    pub(crate) async fn probe(
        &self,
        ask: &Ask<'_>,
        inspect: &Inspect<'_>,
    ) -> Result<Probe, SourceError> {
        let headers = plain_headers();
        let answer = self.send(Method::HEAD, ask, &headers, inspect).await?;
        let status = answer.response.status();
        let encoded = is_encoded(answer.response.headers());
        // Signed URLs are made for one method (403); simple servers know no HEAD (400, 405, 501).
        match status.as_u16() {
            200 if !encoded => {
                let headers = answer.response.headers();
                // Not `content_length()`: that is of the body, and the body of HEAD is empty.
                let length = text(headers, header::CONTENT_LENGTH).and_then(|t| t.parse().ok());
                if let Some(size) = length {
                    let (url, headers) = (answer.url, headers.clone());
                    return Ok(Probe { url, size, headers });
                }
            }
            200 | 400 | 403 | 405 | 501 => {}
            _ => return Err(refusal(ask.what, &answer)),
        }
        let headers = range_headers(ask.what, Pin::Free, &(0..1))?;
        let answer = self.send(Method::GET, ask, &headers, inspect).await?;
        let headers = answer.response.headers().clone();
        let size = match answer.response.status() {
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => total_of(&headers),
            StatusCode::OK => answer.response.content_length(),
            _ => return Err(refusal(ask.what, &answer)),
        };
        if is_encoded(&headers) {
            return Err(encoded_error(ask.what, &headers));
        }
        match size {
            Some(size) => Ok(Probe {
                url: answer.url,
                size,
                headers,
            }),
            None => Err(SourceError::new(
                Kind::Invalid,
                ask.what,
                format!("{} does not tell its size", host_of(&answer.url)),
            )),
        }
    }

    /// Gets the document at `ask.url`, of at most `limit` bytes. A `body` is posted.
    pub(crate) async fn document(
        &self,
        ask: &Ask<'_>,
        body: Option<Body<'_>>,
        limit: u64,
        inspect: &Inspect<'_>,
    ) -> Result<Document, SourceError> {
        let headers = plain_headers();
        let answer = match body {
            None => self.send(Method::GET, ask, &headers, inspect).await?,
            Some(_) => {
                self.follow(Method::POST, ask, &headers, inspect, body)
                    .await?
            }
        };
        if answer.response.status() != StatusCode::OK {
            return Err(refusal(ask.what, &answer));
        }
        let host = host_of(&answer.url);
        let too_long = || {
            let message = format!("the answer of {host} is longer than {limit} bytes");
            SourceError::new(Kind::Invalid, ask.what, message)
        };
        let headers = answer.response.headers().clone();
        if is_encoded(&headers) {
            return Err(encoded_error(ask.what, &headers));
        }
        let mut response = answer.response;
        if response
            .content_length()
            .is_some_and(|length| length > limit)
        {
            return Err(too_long());
        }
        let mut body = Vec::new();
        loop {
            let Ok(chunk) = timeout(self.stall, response.chunk()).await else {
                let message = format!("{host} stalled: no byte for {:?}", self.stall);
                return Err(SourceError::new(Kind::Unavailable, ask.what, message));
            };
            match chunk.map_err(|error| transport(ask.what, &host, error))? {
                None => break,
                Some(chunk) if (body.len() + chunk.len()) as u64 > limit => return Err(too_long()),
                Some(chunk) => body.extend_from_slice(&chunk),
            }
        }
        Ok(Document {
            url: answer.url,
            headers,
            body,
        })
    }

    /// Sends without a body, and follows redirects.
    async fn send(
        &self,
        method: Method,
        ask: &Ask<'_>,
        headers: &HeaderMap,
        inspect: &Inspect<'_>,
    ) -> Result<Answer, SourceError> {
        self.follow(method, ask, headers, inspect, None).await
    }

    /// Sends, and follows redirects with the same method and body.
    async fn follow(
        &self,
        method: Method,
        ask: &Ask<'_>,
        headers: &HeaderMap,
        inspect: &Inspect<'_>,
        body: Option<Body<'_>>,
    ) -> Result<Answer, SourceError> {
        let origin = ask.url.origin();
        let mut seen = vec![ask.url.clone()];
        let mut at_origin = true;
        let mut size = None;
        loop {
            let url = seen[seen.len() - 1].clone();
            // Once it has left the origin, the request is never trusted again.
            at_origin &= url.origin() == origin;
            let hop = Ask {
                what: ask.what,
                url,
                auth: ask.auth.filter(|_| at_origin),
                headers: ask.headers.filter(|_| at_origin),
            };
            let check: &Inspect<'_> = if at_origin { inspect } else { &accept };
            let mut answer = self.hop(method.clone(), &hop, headers, check, body).await?;
            size = answer.size.or(size);
            answer.size = size;
            answer.at_origin = at_origin;
            let Some(next) = redirect(ask.what, &answer)? else {
                return Ok(answer);
            };
            if seen.contains(&next) {
                let message = format!("{} redirects in a loop", host_of(&next));
                return Err(SourceError::new(Kind::Corrupt, ask.what, message));
            }
            if matches!(body, Some(Body::Form(_))) && next.origin() != origin {
                let host = host_of(&next);
                let message = format!("redirects credentials to {host}, which is not followed");
                return Err(SourceError::new(Kind::Invalid, ask.what, message));
            }
            if seen.len() > MAX_REDIRECTS {
                let message = format!("more than {MAX_REDIRECTS} redirects");
                return Err(SourceError::new(Kind::Corrupt, ask.what, message));
            }
            seen.push(next);
        }
    }

    /// One request, one answer.
    async fn hop(
        &self,
        method: Method,
        ask: &Ask<'_>,
        headers: &HeaderMap,
        inspect: &Inspect<'_>,
        body: Option<Body<'_>>,
    ) -> Result<Answer, SourceError> {
        let begun = std::time::Instant::now();
        let host = host_of(&ask.url);
        let client = self.client(&ask.url)?;
        let request = || {
            let request = client.request(method.clone(), ask.url.clone());
            let request = request.headers(ask.headers.cloned().unwrap_or_default());
            let request = request.headers(headers.clone());
            let auth = ask.auth.filter(|auth| auth.origin == ask.url.origin());
            let request = match auth.map(|auth| &auth.credentials) {
                Some(Credentials::Bearer(value)) => request.header(header::AUTHORIZATION, value),
                Some(Credentials::Basic { user, password }) => {
                    request.basic_auth(user.expose(), Some(password.expose()))
                }
                None => request,
            };
            match body {
                Some(Body::Json(value)) => request.json(value),
                Some(Body::Form(pairs)) => {
                    let mut form = url::form_urlencoded::Serializer::new(String::new());
                    let form = form.extend_pairs(pairs).finish();
                    let kind = "application/x-www-form-urlencoded";
                    request.header(header::CONTENT_TYPE, kind).body(form)
                }
                None => request,
            }
        };
        let send = async {
            match request().send().await {
                // A server may close an idle connection just as it is used again (RFC 9112, 9.3.1).
                Err(error) if method.is_safe() && is_broken(&error) => request().send().await,
                answer => answer,
            }
        };
        let Ok(response) = timeout(self.request, send).await else {
            let message = format!("{host} gave no answer for {:?}", self.request);
            return Err(SourceError::new(Kind::Unavailable, ask.what, message));
        };
        let response = response.map_err(|error| transport(ask.what, &host, error))?;
        tracing::debug!(
            %method,
            status = response.status().as_u16(),
            what = ask.what,
            range = headers.get(header::RANGE).and_then(|r| r.to_str().ok()),
            host,
            took = ?begun.elapsed(),
            "asked"
        );
        let size = inspect(response.status(), response.headers())?;
        Ok(Answer {
            response,
            url: ask.url.clone(),
            at_origin: true,
            size,
        })
    }
}

fn builder(config: &Config) -> reqwest::ClientBuilder {
    let builder = reqwest::Client::builder();
    let builder = match config.no_proxy {
        true => builder.no_proxy(),
        false => builder,
    };
    builder
        .user_agent(concat!("hearth/", env!("CARGO_PKG_VERSION")))
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .connect_timeout(config.connect_timeout())
        .pool_max_idle_per_host(config.idle_connections)
        .pool_idle_timeout(IDLE)
        .tcp_keepalive(Duration::from_secs(30))
}

fn unusable(error: reqwest::Error) -> SourceError {
    let why = root_cause(&error.without_url());
    SourceError::new(Kind::Invalid, "http client", why)
}

fn plain_headers() -> HeaderMap {
    let identity = HeaderValue::from_static("identity");
    HeaderMap::from_iter([(header::ACCEPT_ENCODING, identity)])
}

fn range_headers(what: &str, pin: Pin<'_>, range: &Range<u64>) -> Result<HeaderMap, SourceError> {
    let value = |text: &str| {
        HeaderValue::from_str(text)
            .map_err(|_| SourceError::new(Kind::Invalid, what, "its generation fits no header"))
    };
    let Some(last) = range.end.checked_sub(1).filter(|&last| last >= range.start) else {
        return Err(SourceError::new(Kind::Invalid, what, "the range is empty"));
    };
    let mut headers = plain_headers();
    headers.insert(
        header::RANGE,
        value(&format!("bytes={}-{last}", range.start))?,
    );
    match pin {
        // If-Match compares strongly: it would never match a weak tag (RFC 9110, 13.1.1).
        Pin::Etag(etag) if etag.starts_with('"') => {
            headers.insert(header::IF_MATCH, value(etag)?);
        }
        Pin::Modified(date) => {
            headers.insert(header::IF_UNMODIFIED_SINCE, value(date)?);
        }
        Pin::Etag(_) | Pin::Size(_) | Pin::Free => {}
    }
    Ok(headers)
}

/// `host` or `host:port`, for errors.
pub(crate) fn host_of(url: &Url) -> String {
    match (url.host_str().unwrap_or("no host"), url.port()) {
        (host, None) => host.to_owned(),
        (host, Some(port)) => format!("{host}:{port}"),
    }
}
