//! The connection to the API server.

use std::{path::PathBuf, time::Duration};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::{Deserialize, Serialize};

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);
/// How long any request but a watch may take.
pub const REQUEST: Duration = Duration::from_secs(15);

/// Where the API server is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApiConfig {
    /// A kubeconfig; without one the service account of the pod that this runs in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<PathBuf>,
    /// The address of the API server (`https://host:port`), where it is not the one that the kubeconfig or the pod
    /// names: nodes on which the service address is not reachable yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
}

/// No client could be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig.
    #[error("the kubeconfig {path} cannot be used")]
    Kubeconfig {
        path: PathBuf,
        #[source]
        source: Box<kube::config::KubeconfigError>,
    },
    /// The environment of a pod.
    #[error(
        "this is not a pod with a service account, and no kubeconfig is configured (kube.api.kubeconfig)"
    )]
    NotInCluster(#[source] Box<kube::config::InClusterError>),
    /// The address.
    #[error("kube.api.server {0:?} is no address such as https://host:6443")]
    Server(String),
    /// Certificates, credentials.
    #[error("no connection to the API server can be set up")]
    Client(#[source] Box<kube::Error>),
}

/// A client; nothing is asked yet. Must be called within a runtime.
///
/// # Errors
/// What is wrong with the configuration; it does not fail where the server cannot be reached.
pub async fn connect(config: &ApiConfig) -> Result<Client, ConnectError> {
    let mut found = match &config.kubeconfig {
        Some(path) => {
            let wrong = |source| ConnectError::Kubeconfig {
                path: path.clone(),
                source: Box::new(source),
            };
            let file = Kubeconfig::read_from(path).map_err(wrong)?;
            let options = KubeConfigOptions::default();
            let found = Config::from_custom_kubeconfig(file, &options).await;
            found.map_err(wrong)?
        }
        None => Config::incluster().map_err(|e| ConnectError::NotInCluster(Box::new(e)))?,
    };
    if let Some(server) = &config.server {
        let wrong = || ConnectError::Server(server.clone());
        found.cluster_url = server.parse().map_err(|_| wrong())?;
        if found.cluster_url.host().is_none() || found.cluster_url.scheme().is_none() {
            return Err(wrong());
        }
    }
    found.connect_timeout = Some(CONNECT);
    // What is tried again, and when, is decided where the request is made.
    found.default_retry = false;
    Client::try_from(found).map_err(|e| ConnectError::Client(Box::new(e)))
}

/// The answer to a request that is no watch, within [`REQUEST`].
///
/// # Errors
/// What the server says; that it says nothing.
pub async fn within<T>(request: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    match tokio::time::timeout(REQUEST, request).await {
        Ok(done) => done,
        Err(_) => Err(kube::Error::Service(
            format!("no answer within {} seconds", REQUEST.as_secs()).into(),
        )),
    }
}
