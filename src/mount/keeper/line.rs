//! A connection to a keeper, made anew when it is lost.
//!
//! A keeper that is started again knows nothing; a server goes on without one, and gives it all it needs to keep what is
//! mounted. One that was too slow to answer takes the server for dead, and is told that it is not.

use std::{
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use super::{
    super::{
        MountError, MountErrorKind,
        session::{Device, Id, Session},
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
    served: Mutex<Serving>,
}

/// What this process serves, in the order in which it began.
#[derive(Debug, Default)]
struct Serving(Vec<(Id, Served)>);

impl Serving {
    fn begin(&mut self, session: &Session) {
        self.end(session.id());
        let served = Served {
            dir: session.dir.clone(),
            device: Arc::downgrade(&session.device),
            state: Arc::clone(&session.state),
            holds: Arc::default(),
        };
        self.0.push((session.id(), served));
    }

    /// The newest on `dir`: those before it are detached.
    fn newest(&mut self, dir: &Path) -> Option<&mut Served> {
        let mut all = self.0.iter_mut().rev();
        all.find_map(|(_, served)| (served.dir == dir).then_some(served))
    }

    fn end(&mut self, id: Id) {
        self.0.retain(|(one, _)| *one != id);
    }
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
        self.served.lock().begin(session);
        Ok(())
    }

    pub(super) fn hold(&self, dir: &Path, fds: &[BorrowedFd<'_>]) -> Result<(), MountError> {
        self.talk().hold(dir, fds)?;
        let copies = fds.iter().map(|fd| fd.try_clone_to_owned());
        let copies = copies.collect::<Result<Vec<_>, _>>();
        let copies = copies.map_err(|e| MountError::system(dir, "keeper", e))?;
        if let Some(served) = self.served.lock().newest(dir) {
            served.holds = Arc::new(copies);
        }
        Ok(())
    }

    pub(super) fn left(&self, dir: &Path, id: Id) -> Result<(), MountError> {
        self.served.lock().end(id);
        self.talk().left(dir, id)
    }

    pub(super) fn end(&self, dir: &Path, id: Id) -> Result<(), MountError> {
        self.served.lock().end(id);
        self.talk().end(dir, id)
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
        let served = self.served.lock().0.clone();
        for (id, served) in served {
            let dir = &served.dir;
            let has = match kept.iter().find(|kept| kept.dir() == dir) {
                Some(kept) => Some((kept, talk.show(dir)?.id() == id)),
                None => None,
            };
            let done = match has {
                Some((kept, true)) if kept.server.is_none() => talk.take(dir),
                Some((_, true)) => Err(MountError::new(
                    MountErrorKind::Busy,
                    dir,
                    "another process serves it",
                )),
                _ => give(&talk, id.connection, &served),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn session(dir: &str, connection: u32) -> Session {
        let fd = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        Session {
            dir: dir.into(),
            connection,
            device: Arc::new(Device::new(fd)),
            state: Arc::new(State::create(b"", b"", Path::new(dir)).unwrap()),
        }
    }

    #[test]
    fn the_end_of_a_session_is_not_that_of_another_with_its_number() {
        let (old, new) = (session("/a", 50), session("/b", 50));
        let mut serving = Serving::default();
        serving.begin(&old);
        serving.begin(&new);
        serving.end(old.id());
        assert!(serving.newest(Path::new("/a")).is_none());
        assert!(serving.newest(Path::new("/b")).is_some());
        // What was mounted last has the lower number here.
        let newest = session("/b", 49);
        serving.begin(&newest);
        let found = serving.newest(Path::new("/b")).unwrap();
        assert_eq!(found.state.number(), newest.state.number());
        // The same one once more.
        let again = State::open(new.state.fd().unwrap()).unwrap();
        let state = Arc::new(again);
        let again = Session { state, ..new };
        serving.begin(&again);
        assert_eq!(serving.0.len(), 2);
    }
}
