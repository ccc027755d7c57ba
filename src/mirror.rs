//! The registry mirror: what a container runtime pulls through when it has no snapshotter of ours.
//!
//! The pull half of the OCI distribution-spec (1.1) over plain HTTP, for `hosts.toml`: `GET` and
//! `HEAD` of `/v2/`, manifests and blobs, blobs by ranges, too. Which registry is meant is in the
//! query `ns=`, as containerd sends it. What is in the store is served from there, also when the
//! registry is down; the rest is pulled through the engine, so that every byte is fetched once,
//! verified, and kept. A blob whose bytes turn out wrong is cut off before its end.
//!
//! What this node may read, it serves to everybody: it listens on loopback only, unless the configuration says otherwise.
//! What came by credentials of others, it serves to those whose own `Authorization` the registry accepts (`node` decides
//! and remembers). On loopback it asks for them, as a registry does; elsewhere they would cross the network in the clear.
//! Called by `daemon`; keeps nothing itself.

mod answer;
mod range;

use std::{net::SocketAddr, sync::Arc};

use hyper::{Method, Request, body::Incoming};
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, task::JoinSet};
use tracing::{Instrument as _, Span};

use self::answer::{Answer, answer};
pub(crate) use self::range::parse_range;
use crate::{metrics, node::Node, socket::web, telemetry};

/// Settings of the mirror: `[mirror]` in the configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Whether the agent has this face.
    pub enabled: bool,
    /// Where it listens.
    pub address: SocketAddr,
    /// Connections at a time; more wait.
    pub max_connections: usize,
    /// The registry that is meant where a client does not say.
    pub default_registry: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            enabled: false,
            address: SocketAddr::from(([127, 0, 0, 1], 5700)),
            max_connections: 256,
            default_registry: None,
        }
    }
}

/// Serves what `node` has and can get, until `stop`; answers under way then are in what is returned.
pub async fn serve(
    listener: TcpListener,
    node: Node,
    config: &Config,
    stop: impl Future<Output = ()>,
) -> JoinSet<()> {
    let shared = Arc::new(Mirror {
        node,
        default_registry: config.default_registry.clone(),
        invites: config.address.ip().is_loopback(),
    });
    let answer = move |request| respond(Arc::clone(&shared), request);
    let most = (config.max_connections, web::Full::Waits);
    web::serve(listener, most, stop, answer).await
}

/// What all requests share.
struct Mirror {
    node: Node,
    default_registry: Option<String>,
    /// Whether it asks for credentials.
    invites: bool,
}

/// The span of a request for content, until its answer begins.
fn span(request: &Request<Incoming>) -> Span {
    let path = request.uri().path();
    let route = [
        ("/manifests/", "/v2/{name}/manifests/{reference}"),
        ("/blobs/", "/v2/{name}/blobs/{digest}"),
    ];
    let Some((_, route)) = route.into_iter().find(|(part, _)| path.contains(part)) else {
        return Span::none();
    };
    let method = match *request.method() {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        _ => return Span::none(),
    };
    let span = telemetry::span!(
        "mirror",
        otel.name = format_args!("{method} {route}"),
        otel.kind = "server",
        http.request.method = method,
        http.route = route,
        url.scheme = "http"
    );
    telemetry::text(&span, "url.path", path);
    telemetry::below(&span, request);
    span
}

async fn respond(shared: Arc<Mirror>, request: Request<Incoming>) -> Answer {
    let asked = std::time::Instant::now();
    let (method, target) = (request.method().clone(), request.uri().to_string());
    let span = span(&request);
    let answering = answer(&shared, &request);
    let answer = answering.instrument(span.clone()).await;
    let status = answer.status().as_u16();
    telemetry::responded(&span, status);
    let metrics = metrics::global();
    metrics.mirror_answer.observe(asked.elapsed());
    match status {
        ..400 => metrics.mirror_ok.add(1),
        400..500 => metrics.mirror_refused.add(1),
        _ => metrics.mirror_failed.add(1),
    }
    tracing::debug!(%method, target, status, took = ?asked.elapsed(), "answered");
    answer
}
