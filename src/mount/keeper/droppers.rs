//! Children that drop pages for servers.

use std::{
    ops::RangeInclusive,
    os::fd::{AsFd as _, BorrowedFd},
};

use nix::{
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::Pid,
};

use super::super::{
    MountError, MountErrorKind, pages,
    session::{Id, Session},
};

/// Of one session at a time; at least as many as a server asks for at once (`super::super::stale`).
const MAX: usize = 32;

/// What is under way, with the session that each is of.
#[derive(Debug, Default)]
pub(super) struct Droppers(Vec<(Pid, Id)>);

impl Droppers {
    /// Starts one, which says to `report` what came of it.
    ///
    /// # Errors
    /// [`MountErrorKind::Busy`] where there are many; what the system says.
    pub(super) fn start(
        &mut self,
        session: &Session,
        inodes: RangeInclusive<u64>,
        report: BorrowedFd<'_>,
    ) -> Result<(), MountError> {
        let Session { dir, device, .. } = session;
        if self.count(session.id()) >= MAX {
            let message = "many of its pages are being dropped already";
            return Err(MountError::new(MountErrorKind::Busy, dir, message));
        }
        let child = pages::start(device.as_fd(), inodes, report).map_err(|error| {
            // Too many processes, or no memory: for now.
            let message = format!("pages cannot be dropped: {error}");
            MountError::new(MountErrorKind::Busy, dir, message)
        })?;
        self.0.push((child, session.id()));
        Ok(())
    }

    /// How many drop pages of a session.
    pub(super) fn count(&self, session: Id) -> usize {
        self.0.iter().filter(|(_, of)| *of == session).count()
    }

    /// Forgets those that have ended.
    pub(super) fn reap(&mut self) {
        let state = |child| waitpid(child, Some(WaitPidFlag::WNOHANG));
        self.0
            .retain(|(child, _)| matches!(state(*child), Ok(WaitStatus::StillAlive)));
    }
}
