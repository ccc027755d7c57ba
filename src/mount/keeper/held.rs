//! A session that a keeper has, and the end of one.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    time::Instant,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    super::{MountError, MountErrorKind, clean, device, session::Session, table},
    refuse::Refuser,
    wire::{Answer, Which},
};

/// An answer with descriptors.
pub(super) type Answered = Result<(Answer, Vec<OwnedFd>), MountError>;

/// A session and who serves it.
pub(super) struct Held {
    pub(super) session: Session,
    pub(super) server: Option<u64>,
    /// Who wants to serve it, and until when.
    pub(super) successor: Option<(u64, Instant)>,
    pub(super) servers: u32,
    /// Without server since then.
    pub(super) orphan: Instant,
    pub(super) refuser: Option<Refuser>,
    /// Its directory shows it no more: it is for whoever has something of it open.
    pub(super) detached: bool,
    pub(super) _holds: Vec<OwnedFd>,
}

impl Held {
    pub(super) fn new(session: Session, server: u64) -> Self {
        Self {
            session,
            server: Some(server),
            successor: None,
            servers: 0,
            orphan: Instant::now(),
            refuser: None,
            detached: false,
            _holds: Vec::new(),
        }
    }

    pub(super) fn show(&self) -> Answered {
        let failed = |e| MountError::system(&self.session.dir, "session", e);
        let fuse = self.session.device.fd().map_err(failed)?;
        let state = self.session.state.fd().map_err(failed)?;
        let connection = self.session.connection;
        Ok((Answer::Session { connection }, vec![fuse, state]))
    }

    /// Whether it is this session, or where that is not said, the one that `dir` shows.
    pub(super) fn is(&self, dir: &Path, which: Which) -> bool {
        let meant = match which.connection {
            Some(_) => which.fits(self.session.id()),
            None => !self.detached,
        };
        meant && self.session.dir == dir
    }

    pub(super) fn give(&mut self, id: u64) {
        self.server = Some(id);
        self.servers += 1;
        self.refuser = None;
    }
}

/// The error of asking for what is not there.
pub(super) fn unknown(dir: &Path) -> MountError {
    MountError::new(
        MountErrorKind::NotMounted,
        dir,
        "the keeper has no mount here",
    )
}

/// Whether the kernel still has the connection.
pub(super) fn is_alive(session: &Session) -> bool {
    let mut fds = [PollFd::new(session.device.as_fd(), PollFlags::empty())];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => !fds[0].any().unwrap_or(false),
        Err(_) => true,
    }
}

/// Leaves nothing of a session that nobody will serve.
pub(super) fn take_away(held: Held) {
    let Held { session, .. } = held;
    let dir = &session.dir;
    let done = match is_alive(&session) {
        // Who drops pages of it waits for answers, and to unmount waits for that.
        true => device::end(dir, session.connection),
        // The number may be of another mount by now, unless that is as dead as this one.
        false if table::shows(dir, session.connection) => clean(dir),
        false => Ok(()),
    };
    if let Err(error) = done {
        tracing::warn!(%error, "could not unmount");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{
        super::super::{session::Device, state::State},
        *,
    };

    #[test]
    fn one_mounted_since_with_the_number_of_another_is_not_that() {
        let dir = Path::new("/a");
        let held = |connection| {
            let fd = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
            let session = Session {
                dir: dir.into(),
                connection,
                device: Arc::new(Device::new(fd)),
                state: Arc::new(State::create(b"", b"", dir).unwrap()),
            };
            Held::new(session, 1)
        };
        let (mut old, new) = (held(50), held(50));
        old.detached = true;
        let which = |held: &Held| Which::from(held.session.id());
        assert!(old.is(dir, which(&old)) && new.is(dir, which(&new)));
        assert!(!old.is(dir, which(&new)) && !new.is(dir, which(&old)));
        assert!(!new.is(Path::new("/b"), which(&new)));
        let unsaid = Which::default();
        assert!(new.is(dir, unsaid) && !old.is(dir, unsaid));
    }
}
