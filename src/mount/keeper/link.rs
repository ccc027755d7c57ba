//! A server's connection to whoever keeps its mounts: a keeper, or the service manager.

use std::{
    ops::RangeInclusive,
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use zeroize::Zeroizing;

use super::{
    super::{
        MountError, MountErrorKind, device,
        session::{Id, Session},
        table,
    },
    fdstore::{self, FdStore},
    line::Line,
    wire::Kept,
};

/// A connection to whoever keeps the mounts of this process when it ends.
#[derive(Debug)]
pub struct Link(Way);

#[derive(Debug)]
enum Way {
    Keeper(Line),
    Manager(FdStore),
}

/// A session that is kept, before this process serves it.
#[derive(Debug)]
pub struct Orphan {
    pub(in super::super) session: Session,
    about: Vec<u8>,
}

impl Orphan {
    /// What it serves, as its first server said.
    pub fn about(&self) -> &[u8] {
        &self.about
    }

    /// What the server before told only the next one ([`Mount::remember`]).
    ///
    /// [`Mount::remember`]: super::super::Mount::remember
    pub fn secret(&self) -> Option<Zeroizing<Vec<u8>>> {
        self.session.state.secret().ok().flatten()
    }

    /// Whether it is what its directory shows. One that was detached may go on elsewhere, but whoever looks there sees
    /// nothing of it.
    pub fn is_mounted(&self) -> bool {
        table::shows(&self.session.dir, self.session.connection)
    }
}

impl Link {
    /// Connects to the keeper that listens on `path`.
    ///
    /// # Errors
    /// None is there, or it does not speak with this version.
    pub fn connect(path: &Path) -> Result<Self, MountError> {
        let line = Line::connect(path)?;
        Ok(Self(Way::Keeper(line)))
    }

    /// Takes the connection that the keeper gave this process as its standard input, and leaves nothing
    /// there.
    ///
    /// # Errors
    /// There is none.
    pub fn inherited() -> Result<Self, MountError> {
        let line = Line::inherited()?;
        Ok(Self(Way::Keeper(line)))
    }

    /// Has the service manager keep mounts. Takes those of the process before this one from what the manager
    /// has `passed`. Where no process comes to serve them for so long, [`refuse_overdue`] refuses who waits.
    ///
    /// # Errors
    /// There is no manager.
    ///
    /// [`refuse_overdue`]: super::refuse_overdue
    pub fn managed(
        passed: &mut Vec<(String, OwnedFd)>,
        orphan_timeout: Duration,
    ) -> Result<Self, MountError> {
        fdstore::available()?;
        let store = FdStore::new(passed, orphan_timeout);
        Ok(Self(Way::Manager(store)))
    }

    /// The process id of the keeper, where there is one.
    pub fn keeper(&self) -> Option<u32> {
        match &self.0 {
            Way::Keeper(line) => Some(line.talk().keeper()),
            Way::Manager(_) => None,
        }
    }

    /// The sessions that are kept.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn sessions(&self) -> Result<Vec<Kept>, MountError> {
        match &self.0 {
            Way::Keeper(line) => line.talk().sessions(),
            Way::Manager(store) => Ok(store.sessions()),
        }
    }

    /// Mount points at or below `dir`, which is named as the kernel does, that a successor of this server
    /// asks for, from now on, in place of whoever was told of those at `dir` before.
    pub fn leaves_below(&self, dir: &Path) -> tokio::sync::mpsc::Receiver<PathBuf> {
        match &self.0 {
            Way::Keeper(line) => line.talk().leaves_below(dir),
            // It starts no process while another runs.
            Way::Manager(_) => tokio::sync::mpsc::channel(1).1,
        }
    }

    /// Mounts on `dir`, and has that kept.
    pub(in super::super) fn open(
        &self,
        dir: &Path,
        options: device::Options,
        about: &str,
    ) -> Result<Session, MountError> {
        match &self.0 {
            Way::Keeper(line) => line.talk().open(dir, options, about),
            Way::Manager(store) => store.open(dir, options, about),
        }
    }

    /// The session on `dir`, for which a view is to be made before it is taken.
    ///
    /// # Errors
    /// There is none, or it is of a format that this version does not know.
    pub fn show(&self, dir: &Path) -> Result<Orphan, MountError> {
        let session = match &self.0 {
            Way::Keeper(line) => line.talk().show(dir),
            Way::Manager(store) => store.show(dir),
        }?;
        let failed = |e| MountError::system(dir, "session", e);
        if !session.resumed().map_err(failed)? {
            tracing::debug!(dir = %dir.display(), "nobody has served this session yet");
        }
        let about = session.state.about().map_err(failed)?;
        Ok(Orphan { session, about })
    }

    /// The session of what is mounted on `dir`, where there is one that is kept: to go on with.
    ///
    /// # Errors
    /// As [`Link::show`], but that there is none.
    pub fn find(&self, dir: &Path) -> Result<Option<Orphan>, MountError> {
        match self.show(dir) {
            Ok(orphan) => Ok(Some(orphan).filter(Orphan::is_mounted)),
            Err(error) if error.kind() == MountErrorKind::NotMounted => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the keeper is gone, or has not answered in time: what is mounted goes on, and nothing else is mounted.
    pub fn is_lost(&self) -> bool {
        match &self.0 {
            Way::Keeper(line) => line.talk().is_lost(),
            Way::Manager(_) => false,
        }
    }

    /// Connects once more where the connection was lost, and has the keeper keep what this process serves, as before. Blocks.
    ///
    /// # Errors
    /// No keeper is there.
    pub fn revive(&self) -> Result<(), MountError> {
        match &self.0 {
            Way::Keeper(line) => line.revive(),
            Way::Manager(_) => Ok(()),
        }
    }

    /// From now on this process serves `session`, and no other does.
    pub(in super::super) fn take(&self, session: &Session) -> Result<(), MountError> {
        match &self.0 {
            Way::Keeper(line) => line.take(session),
            Way::Manager(_) => Ok(()),
        }
    }

    /// Has copies of `fds` kept for as long as the session on `dir`.
    ///
    /// # Errors
    /// There is no such session, or no keeper any more.
    pub fn hold(&self, dir: &Path, fds: &[BorrowedFd<'_>]) -> Result<(), MountError> {
        match &self.0 {
            Way::Keeper(line) => line.hold(dir, fds),
            Way::Manager(store) => store.hold(dir, fds),
        }
    }

    /// Has another process than this one drop the kernel's pages of `inodes`, and say so to `report`; false where
    /// there is none that could.
    pub(in super::super) fn drop_pages(
        &self,
        at: (&Path, Id),
        inodes: RangeInclusive<u64>,
        report: BorrowedFd<'_>,
    ) -> Result<bool, MountError> {
        match &self.0 {
            Way::Keeper(line) => line.talk().drop_pages(at, inodes, report),
            Way::Manager(_) => Ok(false),
        }
    }

    /// What ends when nobody keeps the mounts any more; not known of a keeper.
    pub(in super::super) fn life(&self) -> Option<BorrowedFd<'_>> {
        match &self.0 {
            Way::Keeper(_) => None,
            Way::Manager(store) => store.life(),
        }
    }

    /// This process serves the session on `dir` no more; the next one may.
    pub(in super::super) fn left(&self, dir: &Path, id: Id) -> Result<(), MountError> {
        match &self.0 {
            Way::Keeper(line) => line.left(dir, id),
            Way::Manager(_) => Ok(()),
        }
    }

    /// The mount on `dir` is gone.
    pub(in super::super) fn end(&self, dir: &Path, id: Id) -> Result<(), MountError> {
        match &self.0 {
            Way::Keeper(line) => line.end(dir, id),
            Way::Manager(store) => {
                store.end(dir, id);
                Ok(())
            }
        }
    }

    /// Takes the mount on `dir` away, whatever its server does.
    ///
    /// # Errors
    /// There is no such mount.
    pub fn abort(&self, dir: &Path) -> Result<(), MountError> {
        match &self.0 {
            Way::Keeper(line) => line.talk().abort(dir),
            Way::Manager(store) => store.abort(dir),
        }
    }
}
