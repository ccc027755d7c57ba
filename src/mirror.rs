//! The registry mirror: what a container runtime pulls through when it has no snapshotter of ours.
//!
//! The pull half of the OCI distribution-spec (1.1) over plain HTTP, for `hosts.toml`: `GET` and
//! `HEAD` of `/v2/`, manifests and blobs, blobs by ranges, too. Which registry is meant is in the
//! query `ns=`, as containerd sends it. What is in the store is served from there, also when the
//! registry is down; the rest is pulled through the engine, so that every byte is fetched once,
//! verified, and kept. A blob whose bytes turn out wrong is cut off before its end.
//!
//! It asks for no credentials and serves what this node may read: it listens on loopback only, unless the
//! configuration says otherwise. Called by the agent; keeps nothing itself.

mod answer;
mod range;

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use hyper::{Request, body::Incoming, service::service_fn};
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, sync::Semaphore};

use self::answer::{Answer, answer};
pub(crate) use self::range::parse_range;
use crate::node::Node;

/// How long a client may take to send the head of a request.
const HEAD_PATIENCE: Duration = Duration::from_secs(30);

/// Settings of the mirror: `[mirror]` in the configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
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
            address: SocketAddr::from(([127, 0, 0, 1], 5700)),
            max_connections: 256,
            default_registry: None,
        }
    }
}

/// A mirror that serves; stops when dropped.
#[derive(Debug)]
pub struct Mirror {
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Mirror {
    /// Starts to serve what `node` has and can get.
    ///
    /// # Errors
    /// An address that cannot be listened on.
    pub async fn start(node: Node, config: &Config) -> std::io::Result<Self> {
        let listener = TcpListener::bind(config.address).await?;
        let address = listener.local_addr()?;
        let config = Arc::new(config.clone());
        let slots = Arc::new(Semaphore::new(config.max_connections.max(1)));
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                    return;
                };
                let stream = match listener.accept().await {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        // Out of file descriptors, mostly: it passes.
                        tracing::warn!(%error, "the mirror cannot accept");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                };
                let (node, config) = (node.clone(), Arc::clone(&config));
                connections.spawn(async move {
                    let service = service_fn(move |request| {
                        respond(node.clone(), Arc::clone(&config), request)
                    });
                    let served = hyper::server::conn::http1::Builder::new()
                        .timer(hyper_util::rt::TokioTimer::new())
                        .header_read_timeout(HEAD_PATIENCE)
                        .serve_connection(hyper_util::rt::TokioIo::new(stream), service)
                        .await;
                    if let Err(error) = served {
                        tracing::debug!(%error, "a client of the mirror went away");
                    }
                    drop(slot);
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self { address, task })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn respond(
    node: Node,
    config: Arc<Config>,
    request: Request<Incoming>,
) -> Result<Answer, Infallible> {
    let asked = std::time::Instant::now();
    let (method, target) = (request.method().clone(), request.uri().to_string());
    let answer = answer(&node, config.default_registry.as_deref(), &request).await;
    let status = answer.status().as_u16();
    tracing::debug!(%method, target, status, took = ?asked.elapsed(), "answered");
    Ok(answer)
}
