//! The HTTP side of `object_store`: what its errors do not tell, bounds on what it collects, and
//! further root certificates.

use std::{
    error::Error as _,
    io,
    sync::{Arc, OnceLock},
    time::Duration,
};

use http_body_util::{BodyExt, Limited};
use object_store::{
    Certificate, ClientConfigKey, ClientOptions, Extensions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
        HttpResponseBody, HttpService, ReqwestConnector,
    },
};
use parking_lot::Mutex;
use reqwest::{
    StatusCode,
    header::{ACCEPT_ENCODING, CONTENT_RANGE, HeaderValue, RANGE, RETRY_AFTER},
};

use super::super::{retry_after, tls_to_proxies};

/// Longest page of a listing that is read, in bytes. S3 sends 1000 keys of at most 1 KiB, Azure
/// 5000.
const MAX_PAGE: usize = 64 << 20;
/// Longest explanation of an error that is read, in bytes.
const MAX_ERROR: usize = 64 << 10;

/// Rides on one request and remembers what was answered.
#[derive(Debug, Clone)]
pub(super) struct Probe(Arc<Mutex<Answer>>);

/// What is known of the answer to a request.
#[derive(Debug, Clone, Default)]
pub(super) struct Answer {
    /// Whether the request was sent, that is: credentials were there to sign it.
    pub(super) sent: bool,
    pub(super) status: Option<StatusCode>,
    pub(super) retry_after: Option<Duration>,
}

impl Probe {
    pub(super) fn new() -> Self {
        Self(Arc::default())
    }

    /// The request's extensions that carry it.
    pub(super) fn extensions(&self) -> Extensions {
        let mut extensions = Extensions::new();
        extensions.insert(self.clone());
        extensions
    }

    pub(super) fn answer(&self) -> Answer {
        self.0.lock().clone()
    }
}

/// Makes clients that report to [`Probe`]s.
#[derive(Debug)]
pub(super) struct Connector {
    pub(super) roots: Vec<Certificate>,
    /// Whether ranges are asked for as they are stored: unasked, Google Cloud Storage unpacks
    /// objects stored with gzip, and then knows no ranges.
    pub(super) as_stored: bool,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let mut options = options.clone().with_timeout_disabled();
        let proxy = options.get_config_value(&ClientConfigKey::ProxyUrl);
        let plain = match proxy.is_some() || tls_to_proxies() {
            true => None,
            false => {
                let options = options.clone().with_no_system_certificates(true);
                Some(ReqwestConnector::default().connect(&options)?)
            }
        };
        for root in &self.roots {
            options = options.with_root_certificate(root.clone());
        }
        Ok(HttpClient::new(Watched {
            plain,
            secure: OnceLock::new(),
            options,
            as_stored: self.as_stored,
        }))
    }
}

#[derive(Debug)]
struct Watched {
    /// For what needs no TLS: reading the root certificates takes longer than many a request.
    plain: Option<HttpClient>,
    /// For all else; made when first needed.
    secure: OnceLock<HttpClient>,
    options: ClientOptions,
    as_stored: bool,
}

impl Watched {
    async fn execute(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if let Some(plain) = &self.plain
            && request.uri().scheme_str() == Some("http")
        {
            match plain.execute(request.clone()).await {
                // It was redirected to https.
                Err(error) if is_about_certificates(&error) => {}
                answer => return answer,
            }
        }
        if let Some(secure) = self.secure.get() {
            return secure.execute(request).await;
        }
        let made = ReqwestConnector::default()
            .connect(&self.options)
            .map_err(|e| HttpError::new(HttpErrorKind::Unknown, e))?;
        self.secure.get_or_init(|| made).execute(request).await
    }
}

fn is_about_certificates(error: &HttpError) -> bool {
    let mut next = error.source();
    while let Some(cause) = next {
        if cause.to_string().contains("certificate") {
            return true;
        }
        next = cause.source();
    }
    false
}

#[async_trait::async_trait]
impl HttpService for Watched {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let probe = request.extensions().get::<Probe>().cloned();
        let is_range = request.headers().contains_key(RANGE);
        if is_range && self.as_stored {
            let gzip = HeaderValue::from_static("gzip");
            request.headers_mut().insert(ACCEPT_ENCODING, gzip);
        }
        if let Some(probe) = &probe {
            probe.0.lock().sent = true;
        }
        let response = self.execute(request).await?;
        let status = response.status();
        let ends_nowhere = is_range
            && response
                .headers()
                .get(CONTENT_RANGE)
                .and_then(|value| value.to_str().ok())
                .is_some_and(|value| value.contains(&u64::MAX.to_string()));
        if let Some(probe) = &probe {
            let mut answer = probe.0.lock();
            answer.status = Some(status);
            answer.retry_after = response
                .headers()
                .get(RETRY_AFTER)
                .and_then(|value| value.to_str().ok())
                .and_then(retry_after);
        }
        if ends_nowhere {
            // `object_store` would add one to the end of the range.
            let error = io::Error::other("a range that ends nowhere");
            return Err(HttpError::new(HttpErrorKind::Decode, error));
        }
        // Bodies of ranges are streamed to whoever asked; all others are collected.
        let limit = match status.is_success() {
            true if is_range => return Ok(response),
            true => MAX_PAGE,
            false => MAX_ERROR,
        };
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, limit).map_err(|e| match e.downcast::<HttpError>() {
            Ok(error) => *error,
            Err(other) => HttpError::new_boxed(HttpErrorKind::Decode, other),
        });
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(body)))
    }
}
