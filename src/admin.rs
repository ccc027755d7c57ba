//! admin: what probes, Prometheus and people ask of the agent, over HTTP.
//!
//! `/healthz` answers as long as the process works; `/readyz` says whether all faces serve, and which does
//! not; `/metrics` is the table of `metrics` in the Prometheus text format. Nothing can be changed here, and
//! nothing secret is shown; it listens on loopback only, unless the configuration says otherwise. Called by
//! `daemon`; keeps nothing.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    net::SocketAddr,
    sync::Arc,
};

use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, body::Bytes, header};
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};

use crate::{metrics, socket::web};

/// Connections at a time; for one more the one that was silent longest is closed.
const MAX_CONNECTIONS: usize = 64;

/// Settings of this room: `[admin]` in the configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Whether the agent has this face.
    pub enabled: bool,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            enabled: true,
            address: SocketAddr::from(([127, 0, 0, 1], 5701)),
        }
    }
}

/// How a face does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It does not serve yet; why, where that does not lie with this process.
    Starting(String),
    Serving,
    /// It was told to end: what is under way is finished.
    Ending,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting(why) if why.is_empty() => f.write_str("starting"),
            Self::Starting(why) => write!(f, "starting: {why}"),
            Self::Serving => f.write_str("serving"),
            Self::Ending => f.write_str("ending"),
        }
    }
}

/// How all faces do.
#[derive(Debug, Default)]
pub struct Health(watch::Sender<BTreeMap<&'static str, State>>);

impl Health {
    /// Notes how `face` does.
    pub fn set(&self, face: &'static str, state: State) {
        self.0.send_modify(|faces| {
            faces.insert(face, state);
        });
    }

    /// Whether every face serves.
    pub fn is_ready(&self) -> bool {
        let faces = self.0.borrow();
        faces.values().all(|state| *state == State::Serving)
    }

    /// Returns once every face serves, or waits for something else than this process.
    pub async fn started(&self) {
        let begins = |state: &State| matches!(state, State::Starting(why) if why.is_empty());
        let mut faces = self.0.subscribe();
        // The sender is here.
        let _ = faces.wait_for(|faces| !faces.values().any(begins)).await;
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let faces = self.0.borrow();
        faces
            .iter()
            .try_for_each(|(face, state)| writeln!(f, "{face}: {state}"))
    }
}

/// Answers on `listener` until `stop`; what is under way then is in what is returned.
pub async fn serve(
    listener: TcpListener,
    health: Arc<Health>,
    stop: impl Future<Output = ()>,
) -> JoinSet<()> {
    let answer = move |request: Request<_>| std::future::ready(answer(&health, &request));
    // Where it listens for all, any pod could stay on it until the kubelet's probes fail.
    let most = (MAX_CONNECTIONS, web::Full::ClosesOldest);
    web::serve(listener, most, stop, answer).await
}

/// Answers one request.
fn answer<B>(health: &Health, request: &Request<B>) -> Response<Full<Bytes>> {
    const PLAIN: &str = "text/plain; charset=utf-8";
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/healthz") => (StatusCode::OK, PLAIN, "ok\n".to_owned()),
        (&Method::GET | &Method::HEAD, "/readyz") => match health.is_ready() {
            true => (StatusCode::OK, PLAIN, health.to_string()),
            false => (StatusCode::SERVICE_UNAVAILABLE, PLAIN, health.to_string()),
        },
        (&Method::GET | &Method::HEAD, "/metrics") => {
            (StatusCode::OK, metrics::CONTENT_TYPE, metrics::render())
        }
        (&Method::GET | &Method::HEAD, _) => {
            let mut text = "not found; there are:\n".to_owned();
            for path in ["/healthz", "/readyz", "/metrics"] {
                let _ = writeln!(text, "{path}");
            }
            (StatusCode::NOT_FOUND, PLAIN, text)
        }
        _ => {
            let text = "only GET and HEAD\n".to_owned();
            (StatusCode::METHOD_NOT_ALLOWED, PLAIN, text)
        }
    };
    // hyper leaves the body of an answer to HEAD out, and keeps its length.
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    headers.insert(
        header::CACHE_CONTROL,
        header::HeaderValue::from_static("no-store"),
    );
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
    }
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    async fn ask(health: &Health, method: Method, path: &str) -> (u16, String) {
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = path.parse().unwrap();
        let answer = answer(health, &request);
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn it_is_ready_once_every_face_serves() {
        let health = Health::default();
        health.set("csi", State::Serving);
        health.set("kube", State::Starting("no answer of 10.0.0.1".into()));
        let (status, text) = ask(&health, Method::GET, "/readyz").await;
        assert_eq!(status, 503);
        assert_eq!(
            text,
            "csi: serving\nkube: starting: no answer of 10.0.0.1\n"
        );
        assert_eq!(ask(&health, Method::GET, "/healthz").await.0, 200);
        health.set("kube", State::Serving);
        assert_eq!(ask(&health, Method::HEAD, "/readyz?x=1").await.0, 200);
        health.set("csi", State::Ending);
        assert_eq!(ask(&health, Method::GET, "/readyz").await.0, 503);
    }

    #[tokio::test]
    async fn nothing_else_is_answered() {
        let health = Health::default();
        assert_eq!(ask(&health, Method::POST, "/readyz").await.0, 405);
        assert_eq!(ask(&health, Method::GET, "/../etc/passwd").await.0, 404);
        let (status, text) = ask(&health, Method::GET, "/metrics").await;
        assert!(status == 200 && text.contains("\n# TYPE hearth_"), "{text}");
    }
}
