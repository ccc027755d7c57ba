//! Who we are for a host, and which hosts we trust.

use reqwest::header::HeaderValue;
use url::Url;
use zeroize::Zeroizing;

use super::root_cause;
use crate::{
    reference::Secret,
    source::{SourceError, SourceErrorKind as Kind},
};

/// How a host is trusted, and how it may trust us, beyond what the system says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tls {
    /// More certificate authorities.
    pub(crate) roots: Vec<reqwest::Certificate>,
    /// The same as text.
    pub(crate) pem: Vec<Vec<u8>>,
    /// The client's certificate and key.
    pub(crate) identity: Option<reqwest::Identity>,
    /// Whether any certificate will do.
    pub(crate) skip_verify: bool,
}

/// Credentials for one origin (scheme, host, port).
#[derive(Debug)]
pub(crate) struct Auth {
    pub(super) origin: url::Origin,
    pub(super) credentials: Credentials,
}

#[derive(Debug)]
pub(super) enum Credentials {
    Bearer(HeaderValue),
    Basic { user: Secret, password: Secret },
}

impl Tls {
    /// Trusts these certificates, too.
    pub(crate) fn trust(&mut self, (roots, pem): (Vec<reqwest::Certificate>, String)) {
        self.roots.extend(roots);
        self.pem.push(pem.into_bytes());
    }
}

/// What credentials are, for another client.
pub(crate) enum Exposed<'a> {
    Bearer(&'a str),
    Basic(&'a str, &'a str),
}

impl Auth {
    /// The credentials themselves.
    pub(crate) fn exposed(&self) -> Exposed<'_> {
        match &self.credentials {
            Credentials::Bearer(value) => {
                let value = value.to_str().unwrap_or_default();
                Exposed::Bearer(value.strip_prefix("Bearer ").unwrap_or(value))
            }
            Credentials::Basic { user, password } => {
                Exposed::Basic(user.expose(), password.expose())
            }
        }
    }

    /// `Authorization: Bearer token` for the origin of `url`; `None` where the token has bytes that
    /// no header can hold.
    pub(crate) fn bearer(url: &Url, token: &Secret) -> Option<Self> {
        let text = Zeroizing::new(format!("Bearer {}", token.expose()));
        let mut value = HeaderValue::from_str(&text).ok()?;
        value.set_sensitive(true);
        Some(Self {
            origin: url.origin(),
            credentials: Credentials::Bearer(value),
        })
    }

    /// Whether these are the same credentials.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let is_same = match (self.exposed(), other.exposed()) {
            (Exposed::Bearer(one), Exposed::Bearer(other)) => one == other,
            (Exposed::Basic(user, password), Exposed::Basic(other, its)) => {
                (user, password) == (other, its)
            }
            _ => false,
        };
        self.origin == other.origin && is_same
    }

    /// Basic credentials for the origin of `url`.
    pub(crate) fn basic(url: &Url, user: Secret, password: Secret) -> Self {
        Self {
            origin: url.origin(),
            credentials: Credentials::Basic { user, password },
        }
    }

    /// Takes the user info out of `url`, as basic credentials for its origin.
    pub(crate) fn take_from(url: &mut Url) -> Option<Self> {
        let decode = |text: &str| {
            Secret::new(percent_encoding::percent_decode_str(text).decode_utf8_lossy())
        };
        if url.username().is_empty() && url.password().is_none() {
            return None;
        }
        let credentials = Credentials::Basic {
            user: decode(url.username()),
            password: decode(url.password().unwrap_or_default()),
        };
        strip_user_info(url);
        Some(Self {
            origin: url.origin(),
            credentials,
        })
    }
}

pub(super) fn strip_user_info(url: &mut Url) {
    // Both fail only for URLs without host, which have no user info either.
    let _ = url.set_username("");
    let _ = url.set_password(None);
}

/// The certificates in the bundles that Python's `requests` and curl would use. `SSL_CERT_FILE`
/// and `SSL_CERT_DIR` are read by the platform verifier itself.
///
/// # Errors
/// A bundle that cannot be read.
pub(crate) fn extra_roots() -> Result<Tls, SourceError> {
    let mut tls = Tls::default();
    for name in ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"] {
        let Some(path) = std::env::var_os(name).filter(|path| !path.is_empty()) else {
            continue;
        };
        let what = format!("CA bundle {} ({name})", path.display());
        let fail = |why: String| SourceError::new(Kind::Invalid, what.as_str(), why);
        let pem = std::fs::read(&path).map_err(|error| fail(error.to_string()))?;
        let found = reqwest::Certificate::from_pem_bundle(&pem)
            .map_err(|error| fail(root_cause(&error)))?;
        if found.is_empty() {
            return Err(fail("holds no PEM certificate".to_owned()));
        }
        tls.roots.extend(found);
        tls.pem.push(pem);
    }
    Ok(tls)
}
