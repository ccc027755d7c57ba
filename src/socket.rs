//! socket: what faces listen on. gRPC over a unix socket (containerd, the kubelet), HTTP on a port (`web`).
//!
//! A unix socket is of mode 0600 before anybody can connect, replaces one on which nobody listens, and never one on which
//! somebody does. Serving ends with what is under way, within bounds. Nothing here survives a crash but the name of the
//! socket, which the next process replaces. Called by the faces.

mod authority;
mod held;
mod name;
pub mod packet;
pub mod service;
pub mod web;

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::StreamExt as _;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::server::Router;

pub use self::{
    held::{Passed, Sockets, address_id},
    name::Name,
};

/// Longest path of a socket, in bytes (unix(7), `sun_path`).
const MAX_PATH: usize = 107;
/// How long requests under way may take once it is to stop.
const DRAIN: Duration = Duration::from_secs(10);
/// How long a client has to speak up that connected just before no more were taken.
const GREETING: Duration = Duration::from_millis(50);

/// Why a socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A path that no socket can have, or that is something else already.
    #[error("cannot listen on {}: {message}", path.display())]
    Address { path: PathBuf, message: String },
    /// Another process listens there.
    #[error("cannot listen on {}: another process does", .0.display())]
    Busy(PathBuf),
    /// The system refused.
    #[error("cannot listen on {}: {source}", path.display())]
    System { path: PathBuf, source: io::Error },
    /// Serving ended.
    #[error("serving ended: {0}")]
    Ended(String),
}

/// A listening socket, mode 0600; gone when dropped.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// `None` where somebody else has it.
    name: Option<Name>,
}

impl Listener {
    /// Listens on `address`: a path, or `unix://` and one. Makes the directory (mode 0711) where it
    /// is not there, and replaces a socket on which nobody listens. Must be called within a runtime.
    ///
    /// # Errors
    /// A socket on which somebody listens, a path that is too long or something else, no right to.
    pub fn bind(address: &Path) -> Result<Self, ServeError> {
        let path = path_of(address)?;
        let refuse = |message: String| ServeError::Address {
            path: path.clone(),
            message,
        };
        let bound = Name::take(&path, |path| UnixListener::bind(path));
        let (listener, name) = bound.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => refuse("something that is no socket is there".into()),
            io::ErrorKind::AddrInUse => ServeError::Busy(path.clone()),
            _ => ServeError::System {
                path: path.clone(),
                source,
            },
        })?;
        Ok(Self {
            listener,
            path,
            name: Some(name),
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves `router` until `stop`; then finishes what is under way.
    ///
    /// # Errors
    /// A transport that fails.
    pub async fn serve(
        self,
        router: Router,
        stop: impl Future<Output = ()> + Send,
    ) -> Result<(), ServeError> {
        let Self { listener, name, .. } = self;
        let (stopped, drained) = tokio::sync::oneshot::channel();
        let (tell, mut told) = tokio::sync::watch::channel(false);
        let stop = async {
            stop.await;
            tell.send_replace(true);
            // One that was taken just now is closed unheard, once it is told to end.
            tokio::time::sleep(GREETING).await;
            let _ = stopped.send(());
        };
        let until = async move {
            let _ = told.wait_for(|stopped| *stopped).await;
        };
        let trusted = UnixListenerStream::new(listener)
            .filter(|stream| std::future::ready(stream.as_ref().map_or(true, is_trusted)))
            .map(|stream| stream.map(authority::Named::new))
            .take_until(until)
            .chain(futures_util::stream::pending());
        let serving = router.serve_with_incoming_shutdown(trusted, stop);
        let late = async {
            match drained.await {
                Ok(()) => tokio::time::sleep(DRAIN).await,
                Err(_) => std::future::pending().await,
            }
        };
        let done = tokio::select! {
            done = serving => done.map_err(|e| ServeError::Ended(e.to_string())),
            () = late => {
                tracing::warn!("requests under way are given up");
                Ok(())
            }
        };
        drop(name);
        done
    }
}

/// The path that `address` means.
fn path_of(address: &Path) -> Result<PathBuf, ServeError> {
    let path = match address.to_str().and_then(|a| a.strip_prefix("unix://")) {
        Some(path) => PathBuf::from(path),
        None => address.to_owned(),
    };
    let path = std::path::absolute(&path).unwrap_or(path);
    let refuse = |message: String| ServeError::Address {
        path: path.clone(),
        message,
    };
    if let Some((scheme, _)) = address.to_str().and_then(|a| a.split_once("://"))
        && scheme != "unix"
    {
        return Err(refuse(format!(
            "{} is no path, nor unix:// and one",
            address.display()
        )));
    }
    if path.as_os_str().len() > MAX_PATH {
        return Err(refuse(format!("longer than {MAX_PATH} bytes")));
    }
    if path.file_name().is_none() {
        return Err(refuse("not the path of a file".into()));
    }
    Ok(path)
}

/// Whether who connected is root or runs as this process does. The mode of the socket says the same;
/// this holds as well where somebody has changed it.
pub fn is_trusted(stream: &tokio::net::UnixStream) -> bool {
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 || peer.uid() == nix::unistd::geteuid().as_raw() => true,
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), pid = ?peer.pid(), "a connection was refused");
            false
        }
        Err(error) => {
            tracing::warn!(%error, "a connection was refused");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::{fs::MetadataExt as _, net::UnixStream},
    };

    use super::*;

    #[tokio::test]
    async fn stale_sockets_are_replaced_and_live_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/hearth.sock");
        let first = Listener::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let again = Listener::bind(&PathBuf::from(format!("unix://{}", path.display())));
        assert!(matches!(again, Err(ServeError::Busy(_))));
        drop(first);
        assert!(!path.exists());

        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a stale one");
        let second = Listener::bind(&path).unwrap();
        assert!(UnixStream::connect(second.path()).is_ok());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        drop(second);
        assert!(path.exists(), "what others put there stays");
        let file = Listener::bind(&path).unwrap_err().to_string();
        assert!(file.contains("no socket"), "{file}");
        let other = Listener::bind(Path::new("tcp://127.0.0.1:1")).unwrap_err();
        assert!(other.to_string().contains("unix://"), "{other}");
        let long = dir.path().join("x".repeat(120));
        let long = Listener::bind(&long).unwrap_err().to_string();
        assert!(long.contains("longer than"), "{long}");
    }
}
