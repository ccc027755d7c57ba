//! Mounts that the service manager keeps (`FDSTORE=1`), where there is no keeper: the connection and the state of
//! each under the name `hearth-<connection>`, what it relies on under `hearth-<connection>-hold`.
//!
//! It keeps them however this process ends, and passes them to the next one. It does nothing else: while no
//! server is there, who reads waits until the manager has started one.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;

use super::{
    super::{
        MountError, MountErrorKind, device,
        session::{Device, Session},
        state::State,
        table,
    },
    abort, unknown,
    wire::Kept,
};
use crate::socket::service;

/// What the manager keeps of this process's mounts.
#[derive(Debug, Default)]
pub(super) struct FdStore(Mutex<BTreeMap<PathBuf, Held>>);

#[derive(Debug)]
struct Held {
    connection: u32,
    fuse: OwnedFd,
    state: OwnedFd,
    /// A process before this one served it.
    inherited: bool,
    _holds: Vec<OwnedFd>,
}

/// What was passed of one connection.
#[derive(Default)]
struct Parts {
    fds: Vec<OwnedFd>,
    holds: Vec<OwnedFd>,
}

fn name(connection: u32) -> String {
    format!("hearth-{connection}")
}

fn hold_name(connection: u32) -> String {
    format!("hearth-{connection}-hold")
}

impl FdStore {
    /// Takes what is ours of `passed`, and leaves the rest there.
    pub(super) fn new(passed: &mut Vec<(String, OwnedFd)>) -> Self {
        let mut found = BTreeMap::<u32, Parts>::new();
        let mut others = Vec::new();
        for (name, fd) in passed.drain(..) {
            let words = name.strip_prefix("hearth-").map(|rest| {
                let hold = rest.strip_suffix("-hold");
                (hold.unwrap_or(rest).parse::<u32>(), hold.is_some())
            });
            match words {
                Some((Ok(connection), true)) => {
                    found.entry(connection).or_default().holds.push(fd);
                }
                Some((Ok(connection), false)) => {
                    found.entry(connection).or_default().fds.push(fd);
                }
                _ => others.push((name, fd)),
            }
        }
        *passed = others;
        let this = Self::default();
        for (connection, parts) in found {
            match recover(connection, parts) {
                Ok(Some((dir, held))) => {
                    this.0.lock().insert(dir, held);
                }
                // Unmounted since.
                Ok(None) => forget(connection),
                Err(error) => {
                    tracing::error!(connection, %error, "what the service manager kept is of no use");
                    forget(connection);
                }
            }
        }
        this
    }

    pub(super) fn sessions(&self) -> Vec<Kept> {
        let all = self.0.lock();
        let kept = all
            .iter()
            .map(|(dir, held)| Kept::new(dir, None, held.inherited.into()));
        kept.collect()
    }

    pub(super) fn open(
        &self,
        dir: &Path,
        options: device::Options,
        about: &str,
    ) -> Result<Session, MountError> {
        let session = Session::mount(dir, options, about.as_bytes())?;
        let connection = session.connection;
        let stored = || -> io::Result<Held> {
            let (fuse, state) = (session.device.fd()?, session.state.fd()?);
            service::store(&name(connection), &[fuse.as_fd(), state.as_fd()])?;
            Ok(Held {
                connection,
                fuse,
                state,
                inherited: false,
                _holds: Vec::new(),
            })
        };
        match stored() {
            Ok(held) => {
                self.0.lock().insert(dir.to_owned(), held);
                Ok(session)
            }
            Err(error) => {
                if let Err(error) = device::unmount(dir, true) {
                    tracing::warn!(%error, "could not unmount");
                }
                Err(MountError::system(dir, "service manager", error))
            }
        }
    }

    pub(super) fn show(&self, dir: &Path) -> Result<Session, MountError> {
        let all = self.0.lock();
        let held = all.get(dir).ok_or_else(|| unknown(dir))?;
        let failed = |e| MountError::system(dir, "session", e);
        let fuse = held.fuse.try_clone().map_err(failed)?;
        let state = held.state.try_clone().map_err(failed)?;
        Ok(Session {
            dir: dir.to_owned(),
            connection: held.connection,
            device: Arc::new(Device::new(fuse)),
            state: Arc::new(State::open(state).map_err(failed)?),
        })
    }

    pub(super) fn hold(&self, dir: &Path, fds: &[BorrowedFd<'_>]) -> Result<(), MountError> {
        let mut all = self.0.lock();
        let held = all.get_mut(dir).ok_or_else(|| unknown(dir))?;
        let failed = |e| MountError::system(dir, "service manager", e);
        let name = hold_name(held.connection);
        if !held._holds.is_empty() {
            // Those of the process before have had their time.
            service::forget(&name).map_err(failed)?;
        }
        if !fds.is_empty() {
            service::store(&name, fds).map_err(failed)?;
        }
        let copies = fds.iter().map(|fd| fd.try_clone_to_owned());
        held._holds = copies.collect::<io::Result<_>>().map_err(failed)?;
        Ok(())
    }

    pub(super) fn end(&self, dir: &Path, connection: u32) {
        let mut all = self.0.lock();
        // Another may have been mounted there since.
        if all
            .get(dir)
            .is_some_and(|held| held.connection == connection)
        {
            all.remove(dir);
        }
        drop(all);
        forget(connection);
    }

    pub(super) fn abort(&self, dir: &Path) -> Result<(), MountError> {
        let held = self.0.lock().remove(dir).ok_or_else(|| unknown(dir))?;
        abort(held.connection);
        forget(held.connection);
        device::unmount(dir, true)
    }
}

/// The mount of a connection, if there still is one.
fn recover(connection: u32, parts: Parts) -> io::Result<Option<(PathBuf, Held)>> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let mut fuse = None;
    let mut state = None;
    for fd in parts.fds {
        // Which is which: the manager need not keep an order.
        let copy = fd.try_clone()?;
        match State::open(copy) {
            Ok(opened) => state = Some((fd, opened)),
            Err(error) if state.is_none() && fuse.is_some() => return Err(error),
            Err(_) => fuse = Some(fd),
        }
    }
    let Some((state, opened)) = state else {
        // The manager drops a connection that has ended.
        return Ok(None);
    };
    let Some(fuse) = fuse else { return Ok(None) };
    let dir = opened.dir()?;
    if !dir.is_absolute() {
        return Err(invalid());
    }
    let mounted = table::find(&dir)?.is_some_and(|found| found.connection == connection);
    let held = Held {
        connection,
        fuse,
        state,
        inherited: true,
        _holds: parts.holds,
    };
    Ok(mounted.then_some((dir, held)))
}

fn forget(connection: u32) {
    for name in [name(connection), hold_name(connection)] {
        if let Err(error) = service::forget(&name) {
            tracing::warn!(name, %error, "the service manager keeps what is gone");
        }
    }
}

/// Why mounts cannot be kept so, if they cannot.
pub(super) fn available() -> Result<(), MountError> {
    match service::is_managed() {
        true => Ok(()),
        false => Err(MountError::new(
            MountErrorKind::Keeper,
            Path::new("service manager"),
            "NOTIFY_SOCKET is not set: agent.fdstore is for a service of systemd, with Type=notify and \
             FileDescriptorStoreMax=",
        )),
    }
}
