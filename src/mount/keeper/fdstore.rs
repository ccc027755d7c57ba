//! Mounts that the service manager keeps (`FDSTORE=1`), where there is no keeper: the connection and the state of
//! each under the name `hearth-<connection>`, what it relies on under `hearth-<connection>-hold`; and, under
//! `hearth-life`, a pipe that ends when the manager lets go of all that (see `super::super::pages`).
//!
//! It keeps them however this process ends, and passes them to the next one. It does nothing else: while no
//! server is there, who reads waits until the manager has started one. One that is started again and again, and never
//! comes to serve, refuses them after a time ([`refuse_overdue`]); when the service is stopped, the manager lets go
//! of the mounts, and they end.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::pipe2,
};
use parking_lot::Mutex;

use super::{
    super::{
        MountError, MountErrorKind, device,
        session::{Device, Id, Session},
        state::State,
        table,
    },
    refuse::Refuser,
    unknown,
    wire::Kept,
};
use crate::socket::service;

/// Requests are refused in so many bursts; who asks on and on is not to hold up whoever comes to serve.
const ROUNDS: usize = 64;

/// What the pipe is called.
const LIFE: &str = "hearth-life";

/// What the manager keeps of this process's mounts.
#[derive(Debug)]
pub(super) struct FdStore {
    held: Mutex<BTreeMap<PathBuf, Held>>,
    orphan_timeout: Duration,
    /// The end that is read, and the other one.
    life: Option<[OwnedFd; 2]>,
}

#[derive(Debug)]
struct Held {
    id: Id,
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
    pub(super) fn new(passed: &mut Vec<(String, OwnedFd)>, orphan_timeout: Duration) -> Self {
        let mut held = BTreeMap::new();
        for (connection, parts) in sort(passed) {
            match recover(connection, parts) {
                Ok(Some((dir, found))) => {
                    held.insert(dir, found);
                }
                // Unmounted since.
                Ok(None) => forget(connection),
                Err(error) => {
                    tracing::error!(connection, %error, "what the service manager kept is of no use");
                    forget(connection);
                }
            }
        }
        let life = match inherited_life(passed) {
            Some(life) => Ok(life),
            None => new_life(),
        };
        if let Err(error) = &life {
            tracing::warn!(%error, "the service manager may not end the mounts when the service is stopped");
        }
        Self {
            held: Mutex::new(held),
            orphan_timeout,
            life: life.ok(),
        }
    }

    pub(super) fn life(&self) -> Option<BorrowedFd<'_>> {
        self.life.as_ref().map(|[end, _]| end.as_fd())
    }

    pub(super) fn sessions(&self) -> Vec<Kept> {
        let all = self.held.lock();
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
        session.state.set_patience(self.orphan_timeout.as_secs());
        let mut all = self.held.lock();
        make_room(&mut all, dir, connection);
        let stored = || -> io::Result<Held> {
            let (fuse, state) = (session.device.fd()?, session.state.fd()?);
            service::store(&name(connection), &[fuse.as_fd(), state.as_fd()])?;
            Ok(Held {
                id: session.id(),
                fuse,
                state,
                inherited: false,
                _holds: Vec::new(),
            })
        };
        match stored() {
            Ok(held) => {
                all.insert(dir.to_owned(), held);
                Ok(session)
            }
            Err(error) => {
                drop(all);
                if let Err(error) = device::unmount(dir, true) {
                    tracing::warn!(%error, "could not unmount");
                }
                Err(MountError::system(dir, "service manager", error))
            }
        }
    }

    pub(super) fn show(&self, dir: &Path) -> Result<Session, MountError> {
        let all = self.held.lock();
        let held = all.get(dir).ok_or_else(|| unknown(dir))?;
        let session = held.session(dir);
        let session = session.map_err(|e| MountError::system(dir, "session", e))?;
        session.state.set_patience(self.orphan_timeout.as_secs());
        Ok(session)
    }

    pub(super) fn hold(&self, dir: &Path, fds: &[BorrowedFd<'_>]) -> Result<(), MountError> {
        let mut all = self.held.lock();
        let held = all.get_mut(dir).ok_or_else(|| unknown(dir))?;
        let failed = |e| MountError::system(dir, "service manager", e);
        let name = hold_name(held.id.connection);
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

    pub(super) fn end(&self, dir: &Path, id: Id) {
        let mut all = self.held.lock();
        // Another may have been mounted there since, or elsewhere with the same number.
        if all.get(dir).is_some_and(|held| held.id == id) {
            all.remove(dir);
            forget(id.connection);
        }
    }

    pub(super) fn abort(&self, dir: &Path) -> Result<(), MountError> {
        let mut all = self.held.lock();
        let held = all.remove(dir).ok_or_else(|| unknown(dir))?;
        forget(held.id.connection);
        drop(all);
        device::end(dir, held.id.connection)
    }
}

/// Forgets what a new session takes the place of, or has the number of, since that one has ended: what is said of its end
/// later is not to be taken for the new one's, which is kept under the same name.
fn make_room(all: &mut BTreeMap<PathBuf, Held>, dir: &Path, connection: u32) {
    all.retain(|there, held| {
        let stays = there != dir && held.id.connection != connection;
        if !stays {
            forget(held.id.connection);
        }
        stays
    });
}

impl Held {
    fn session(&self, dir: &Path) -> io::Result<Session> {
        Ok(Session {
            dir: dir.to_owned(),
            connection: self.id.connection,
            device: Arc::new(Device::new(self.fuse.try_clone()?)),
            state: Arc::new(State::open(self.state.try_clone()?)?),
        })
    }
}

/// What a process that the manager has started does before anything else: where mounts have been passed to it that
/// nobody has come to serve for so long as readers are to wait, it answers ETIMEDOUT to all of them. So do its
/// successors, until one serves.
pub fn refuse_overdue() {
    for (connection, parts) in sort(&mut service::peek()) {
        let Some(now) = uptime() else { return };
        // What is not understood, whoever comes to serve says.
        let Ok(Some((dir, held))) = recover(connection, parts) else {
            continue;
        };
        let refused = held.session(&dir).and_then(|session| {
            if session.state.is_overdue(now) {
                tracing::error!(dir = %dir.display(), "no server came back in time: what is asked of it is refused until one does");
                let mut refuser = Refuser::new(&session)?;
                for _ in 0..ROUNDS {
                    if !refuser.refuse(&session.state)? {
                        break;
                    }
                }
            }
            Ok(())
        });
        if let Err(error) = refused {
            tracing::error!(dir = %dir.display(), %error, "requests cannot be refused");
        }
    }
}

/// Makes a pipe of which the manager has both ends.
fn new_life() -> io::Result<[OwnedFd; 2]> {
    let (end, other) = pipe2(OFlag::O_CLOEXEC)?;
    service::store(LIFE, &[end.as_fd(), other.as_fd()])?;
    Ok([end, other])
}

/// The pipe that a process before this one has made, taken from what was `passed`.
fn inherited_life(passed: &mut Vec<(String, OwnedFd)>) -> Option<[OwnedFd; 2]> {
    let ends: Vec<_> = passed.extract_if(.., |(name, _)| name == LIFE).collect();
    let mut ends: Vec<OwnedFd> = ends.into_iter().map(|(_, fd)| fd).collect();
    // The manager need not keep an order.
    ends.sort_by_key(|fd| {
        let flags = fcntl(fd, FcntlArg::F_GETFL).unwrap_or_default();
        flags & libc::O_ACCMODE != libc::O_RDONLY
    });
    ends.try_into().ok()
}

/// Seconds since the boot.
fn uptime() -> Option<u32> {
    let text = std::fs::read_to_string("/proc/uptime").ok()?;
    text.split('.').next()?.parse().ok()
}

/// Takes what is ours of `passed`, by connection.
fn sort(passed: &mut Vec<(String, OwnedFd)>) -> BTreeMap<u32, Parts> {
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
    found
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
        id: Id::new(connection, &opened),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn held(connection: u32) -> Held {
        let state = State::create(b"", b"", Path::new("/")).unwrap();
        Held {
            id: Id::new(connection, &state),
            fuse: std::fs::File::open("/dev/null").unwrap().into(),
            state: state.fd().unwrap(),
            inherited: false,
            _holds: Vec::new(),
        }
    }

    #[test]
    fn the_end_of_a_session_is_not_that_of_another_with_its_number() {
        let (a, b) = (Path::new("/a"), Path::new("/b"));
        let (old, new) = (held(50), held(50));
        let (ended, lives) = (old.id, new.id);
        let mut all = BTreeMap::from([(a.to_owned(), old), (b.to_owned(), held(51))]);
        make_room(&mut all, Path::new("/c"), 52);
        assert_eq!(all.len(), 2);
        make_room(&mut all, b, 50);
        assert!(all.is_empty(), "{all:?}");
        all.insert(b.to_owned(), new);
        let store = FdStore {
            held: Mutex::new(all),
            orphan_timeout: Duration::ZERO,
            life: None,
        };
        for dir in [a, b] {
            store.end(dir, ended);
            assert_eq!(store.sessions().len(), 1);
        }
        store.end(b, lives);
        assert!(store.sessions().is_empty());
    }
}
