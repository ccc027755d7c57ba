//! The listening sockets of a process, which it can have from the process before it, and give to the next: so
//! that a client finds somebody at any time.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use parking_lot::Mutex;

use super::{Listener, Name, ServeError};
use crate::digest::Digest;

/// What this process listens on, by face.
#[derive(Debug, Default)]
pub struct Sockets(Mutex<BTreeMap<String, Held>>);

/// A listening socket that is given to another process.
#[derive(Debug)]
pub struct Passed {
    pub face: String,
    /// As the configuration has it; or [`address_id`] of that.
    pub address: String,
    pub socket: OwnedFd,
}

#[derive(Debug)]
struct Held {
    address: String,
    socket: OwnedFd,
    /// Of a unix socket that is listened on.
    name: Option<Name>,
    /// Another process has bound it.
    passed: bool,
    used: bool,
}

/// Stands for an address where there is no room for it.
pub fn address_id(address: &str) -> String {
    Digest::of(address.as_bytes()).hex()[..16].to_owned()
}

impl Held {
    fn is_at(&self, address: &str) -> bool {
        self.address == address || self.address == address_id(address)
    }
}

impl Sockets {
    /// With what another process listened on.
    pub fn with(passed: Vec<Passed>) -> Self {
        let held = passed.into_iter().map(|passed| {
            let held = Held {
                address: passed.address,
                socket: passed.socket,
                name: None,
                passed: true,
                used: false,
            };
            (passed.face, held)
        });
        Self(Mutex::new(held.collect()))
    }

    /// Listens on `address` for `face`, as [`Listener::bind`], or goes on with what is listened on there. Must
    /// be called within a runtime.
    ///
    /// # Errors
    /// As [`Listener::bind`].
    pub fn unix(&self, face: &str, address: &Path) -> Result<Listener, ServeError> {
        let mut all = self.0.lock();
        let text = address.to_string_lossy().into_owned();
        let system = |path: &Path, source| ServeError::System {
            path: path.to_owned(),
            source,
        };
        if let Some(held) = all.get_mut(face).filter(|held| held.is_at(&text)) {
            let path = super::path_of(address)?;
            let named = held.name.take().or_else(|| Name::adopt(&path).ok());
            // One whose name somebody has taken away is of no use.
            if let Some(name) = named.filter(Name::is_there) {
                held.name = Some(name);
                held.address.clone_from(&text);
                held.used = true;
                let socket = held.socket.try_clone();
                let listener = socket.and_then(|fd| tokio_listener(fd.into()));
                return Ok(Listener {
                    listener: listener.map_err(|e| system(&path, e))?,
                    path,
                    name: None,
                });
            }
        }
        let mut listener = Listener::bind(address)?;
        let socket = listener.listener.as_fd().try_clone_to_owned();
        let held = Held {
            address: text,
            socket: socket.map_err(|e| system(&listener.path, e))?,
            name: listener.name.take(),
            passed: false,
            used: true,
        };
        all.insert(face.to_owned(), held);
        Ok(listener)
    }

    /// As [`Sockets::unix`], on a port.
    ///
    /// # Errors
    /// A port that cannot be listened on.
    pub async fn tcp(
        &self,
        face: &str,
        address: SocketAddr,
    ) -> io::Result<tokio::net::TcpListener> {
        let text = address.to_string();
        if let Some(held) = self.0.lock().get_mut(face)
            && held.is_at(&text)
        {
            held.used = true;
            held.address.clone_from(&text);
            let listener = std::net::TcpListener::from(held.socket.try_clone()?);
            listener.set_nonblocking(true)?;
            return tokio::net::TcpListener::from_std(listener);
        }
        let listener = tokio::net::TcpListener::bind(address).await?;
        let held = Held {
            address: text,
            socket: listener.as_fd().try_clone_to_owned()?,
            name: None,
            passed: false,
            used: true,
        };
        self.0.lock().insert(face.to_owned(), held);
        Ok(listener)
    }

    /// What is listened on, for another process.
    ///
    /// # Errors
    /// No file descriptor is free.
    pub fn pass(&self) -> io::Result<Vec<Passed>> {
        let all = self.0.lock();
        let passed = all.iter().map(|(face, held)| {
            Ok(Passed {
                face: face.clone(),
                address: held.address.clone(),
                socket: held.socket.try_clone()?,
            })
        });
        passed.collect()
    }

    /// Closes what was passed to this process and is not asked for.
    pub fn close_unused(&self) {
        self.0.lock().retain(|_, held| {
            let is_port = held.address.parse::<SocketAddr>().is_ok();
            if !held.used
                && !is_port
                && let Ok(path) = super::path_of(Path::new(&held.address))
            {
                drop(Name::adopt(&path));
            }
            held.used
        });
    }

    /// Closes all; the names of unix sockets go with them.
    pub fn close(&self) {
        self.0.lock().clear();
    }

    /// As [`Sockets::close`], but what was passed to this process is left to the one that did so.
    pub fn give_back(&self) {
        for (_, held) in std::mem::take(&mut *self.0.lock()) {
            if held.passed {
                held.name.into_iter().for_each(Name::leave);
            }
        }
    }

    /// Closes all for this process; another listens there.
    pub fn leave(&self) {
        for (_, held) in std::mem::take(&mut *self.0.lock()) {
            held.name.into_iter().for_each(Name::leave);
        }
    }
}

fn tokio_listener(
    listener: std::os::unix::net::UnixListener,
) -> io::Result<tokio::net::UnixListener> {
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[tokio::test]
    async fn clients_find_somebody_while_sockets_change_hands() {
        let dir = tempfile::tempdir().unwrap();
        let (path, gone) = (dir.path().join("a.sock"), dir.path().join("b.sock"));
        let port = SocketAddr::from(([127, 0, 0, 1], 0));
        let old = Sockets::default();
        let (unix, _) = (old.unix("a", &path).unwrap(), old.unix("b", &gone).unwrap());
        let tcp = old.tcp("c", port).await.unwrap();
        let at = tcp.local_addr().unwrap();
        drop((unix, tcp));
        // Nobody takes them now, and nobody is refused.
        let mut one = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let two = std::net::TcpStream::connect(at).unwrap();
        one.write_all(b"x").unwrap();

        let new = Sockets::with(old.pass().unwrap());
        old.leave();
        let unix = new.unix("a", &path).unwrap();
        let (taken, _) = unix.listener.accept().await.unwrap();
        let mut taken = taken.into_std().unwrap();
        taken.set_nonblocking(false).unwrap();
        let mut byte = [0];
        taken.read_exact(&mut byte).unwrap();
        let tcp = new.tcp("c", port).await.unwrap();
        assert_eq!(tcp.local_addr().unwrap(), at);
        assert_eq!(tcp.accept().await.unwrap().1, two.local_addr().unwrap());
        new.close_unused();
        assert!(path.exists() && !gone.exists());
        // One that fails gives back what it got, and only that.
        let failed = Sockets::with(new.pass().unwrap());
        let own = dir.path().join("c.sock");
        let (_, _) = (
            failed.unix("a", &path).unwrap(),
            failed.unix("d", &own).unwrap(),
        );
        failed.give_back();
        assert!(path.exists() && !own.exists());
        drop(unix);
        new.unix("a", &path).unwrap();
        new.close();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn another_address_is_bound_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a.sock"), dir.path().join("b.sock"));
        let old = Sockets::default();
        old.unix("a", &path).unwrap();
        let new = Sockets::with(old.pass().unwrap());
        let listener = new.unix("a", &other).unwrap();
        assert_eq!(listener.path(), other);
        // Nor is one of use whose name is gone.
        std::fs::remove_file(&other).unwrap();
        drop(listener);
        let third = Sockets::with(new.pass().unwrap());
        third.unix("a", &other).unwrap();
        assert!(std::os::unix::net::UnixStream::connect(&other).is_ok());
    }
}
