//! A connection to a keeper, made anew when it is lost.
//!
//! A keeper that is started again knows nothing; a server goes on without one, and gives it all it needs to keep what is
//! mounted. One that was too slow to answer takes the server for dead, and is told that it is not.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use super::{
    super::{
        MountError, MountErrorKind,
        session::{Device, Session},
        state::State,
    },
    talk::Talk,
};

/// A way to the keeper.
#[derive(Debug)]
pub(super) struct Line {
    /// None: the keeper has started this process, and has no successor.
    path: Option<PathBuf>,
    talk: Mutex<Arc<Talk>>,
    /// By connection.
    served: Mutex<BTreeMap<u32, Served>>,
}

/// What this process serves, and its keeper has.
#[derive(Debug, Clone)]
struct Served {
    dir: PathBuf,
    device: Weak<Device>,
    state: Arc<State>,
    holds: Arc<Vec<OwnedFd>>,
}

impl Line {
    pub(super) fn connect(path: &Path) -> Result<Self, MountError> {
        let talk = Talk::connect(path, Arc::default())?;
        Ok(Self::new(Some(path.to_owned()), talk))
    }

    pub(super) fn inherited() -> Result<Self, MountError> {
        Talk::inherited().map(|talk| Self::new(None, talk))
    }

    fn new(path: Option<PathBuf>, talk: Talk) -> Self {
        Self {
            path,
            talk: Mutex::new(Arc::new(talk)),
            served: Mutex::default(),
        }
    }

    /// The connection as it is.
    pub(super) fn talk(&self) -> Arc<Talk> {
        Arc::clone(&self.talk.lock())
    }

    pub(super) fn take(&self, session: &Session) -> Result<(), MountError> {
        self.talk().take(&session.dir)?;
        let served = Served {
            dir: session.dir.clone(),
            device: Arc::downgrade(&session.device),
            state: Arc::clone(&session.state),
            holds: Arc::default(),
        };
        self.served.lock().insert(session.connection, served);
        Ok(())
    }

    pub(super) fn hold(&self, dir: &Path, fds: &[BorrowedFd<'_>]) -> Result<(), MountError> {
        self.talk().hold(dir, fds)?;
        let copies = fds.iter().map(|fd| fd.try_clone_to_owned());
        let copies = copies.collect::<Result<Vec<_>, _>>();
        let copies = copies.map_err(|e| MountError::system(dir, "keeper", e))?;
        // The newest there: those before it are detached.
        let mut served = self.served.lock();
        if let Some(served) = served.values_mut().rfind(|served| served.dir == dir) {
            served.holds = Arc::new(copies);
        }
        Ok(())
    }

    pub(super) fn left(&self, dir: &Path, connection: u32) -> Result<(), MountError> {
        self.served.lock().remove(&connection);
        self.talk().left(dir, connection)
    }

    pub(super) fn end(&self, dir: &Path, connection: u32) -> Result<(), MountError> {
        self.served.lock().remove(&connection);
        self.talk().end(dir, connection)
    }

    pub(super) fn revive(&self) -> Result<(), MountError> {
        let before = self.talk();
        if !before.is_lost() {
            return Ok(());
        }
        let gone = || MountError::new(MountErrorKind::Keeper, Path::new("keeper"), "it is gone");
        let path = self.path.as_deref().ok_or_else(gone)?;
        let talk = Talk::connect(path, before.leaves())?;
        let kept = talk.sessions()?;
        let served = self.served.lock().clone();
        for (connection, served) in served {
            let dir = &served.dir;
            let has = match kept.iter().find(|kept| kept.dir() == dir) {
                Some(kept) => Some((kept, talk.show(dir)?.connection == connection)),
                None => None,
            };
            let done = match has {
                Some((kept, true)) if kept.server.is_none() => talk.take(dir),
                Some((_, true)) => Err(MountError::new(
                    MountErrorKind::Busy,
                    dir,
                    "another process serves it",
                )),
                _ => give(&talk, connection, &served),
            };
            match done {
                Ok(()) => tracing::info!(dir = %dir.display(), "goes on being kept"),
                Err(error) => tracing::error!(%error, "it ends with this process"),
            }
        }
        *self.talk.lock() = Arc::new(talk);
        Ok(())
    }
}

fn give(talk: &Talk, connection: u32, served: &Served) -> Result<(), MountError> {
    // It has ended.
    let Some(device) = served.device.upgrade() else {
        return Ok(());
    };
    let state = served.state.fd();
    let state = state.map_err(|e| MountError::system(&served.dir, "session", e))?;
    talk.give(&served.dir, connection, device.as_fd(), state.as_fd())?;
    let holds: Vec<_> = served.holds.iter().map(|fd| fd.as_fd()).collect();
    talk.hold(&served.dir, &holds)
}
