//! The server that a keeper runs: started again when it dies, slower and slower where it does so at once.

use std::{
    os::{
        fd::OwnedFd,
        unix::process::{CommandExt as _, ExitStatusExt as _},
    },
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{SigSet, Signal, kill},
        socket::{AddressFamily, SockFlag, SockType, socketpair},
    },
    unistd::Pid,
};

use crate::limits;

/// A server that served for so long before it died is no failure.
const SETTLED: Duration = Duration::from_millis(100);
/// Failures in a row after which it is started again without a pause.
const PATIENT: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long it may take to end when it is asked to.
const GRACE: Duration = Duration::from_secs(10);
/// How long a process whose connection has ended may take to be dead.
const DYING: Duration = Duration::from_secs(5);

/// A server and what becomes of it.
pub(super) struct Child {
    make: Box<dyn FnMut() -> Command>,
    process: Option<std::process::Child>,
    dying: Option<Dying>,
    peer: Option<u64>,
    started: bool,
    failures: u32,
    serving: Option<Instant>,
    /// One has served: what is not mounted any more was unmounted since.
    has_served: bool,
    /// Process, signal and status of the last one.
    ended: Option<(u32, Option<i32>, Option<i32>)>,
    /// When it is to be started.
    start: Option<Instant>,
    /// When it is to be killed.
    kill: Option<Instant>,
}

/// A server whose connection has ended. Nothing else is started before it is dead, and nobody waits for that: it may be
/// stuck in the kernel.
struct Dying {
    process: std::process::Child,
    /// When it is to be killed: it has lost us, and cannot be let serve beside another.
    kill: Option<Instant>,
}

/// Set for a server that is to go on with a mount, and never to make one.
pub const SUCCESSOR: &str = "HEARTH_SUCCESSOR";

/// A server just started.
pub(super) struct Started {
    pub(super) socket: OwnedFd,
    pub(super) process: u32,
}

impl Child {
    pub(super) fn new(make: Box<dyn FnMut() -> Command>) -> Self {
        Self {
            make,
            process: None,
            dying: None,
            peer: None,
            started: false,
            failures: 0,
            serving: None,
            has_served: false,
            ended: None,
            start: Some(Instant::now()),
            kill: None,
        }
    }

    /// Whether it runs or is going to.
    pub(super) fn is_running(&self) -> bool {
        self.process.is_some() || self.dying.is_some() || self.start.is_some()
    }

    pub(super) fn has_begun(&self) -> bool {
        self.started
    }

    pub(super) fn is(&self, peer: u64) -> bool {
        self.peer == Some(peer)
    }

    pub(super) fn connected(&mut self, peer: u64) {
        self.peer = Some(peer);
    }

    /// When there is something to do.
    pub(super) fn due(&self) -> Option<Instant> {
        let dying = self.dying.as_ref().and_then(|dying| dying.kill);
        [self.start, self.kill, dying].into_iter().flatten().min()
    }

    /// Starts or kills it, where it is time.
    pub(super) fn tend(&mut self, now: Instant, stopping: bool) -> Option<Started> {
        if self.kill.is_some_and(|at| now >= at) {
            self.signal(Signal::SIGKILL);
            self.kill = None;
        }
        if let Some(dying) = &mut self.dying
            && dying.kill.take_if(|at| now >= *at).is_some()
        {
            let _ = dying.process.kill();
        }
        if stopping {
            self.start = None;
            self.started = true;
        }
        self.start.take_if(|at| now >= *at)?;
        self.started = true;
        match self.spawn() {
            Ok(started) => Some(started),
            Err(error) => {
                tracing::error!(%error, "the server cannot be started");
                self.failures += 1;
                self.start = Some(now + self.pause());
                None
            }
        }
    }

    fn spawn(&mut self) -> std::io::Result<Started> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        // As its standard input it needs no fd that other children could inherit.
        let mut command = (self.make)();
        command.stdin(Stdio::from(theirs));
        if self.has_served {
            command.env(SUCCESSOR, "1");
        }
        // SAFETY: one system call, allowed between fork and exec. The signals that the keeper reads from a
        // descriptor are blocked, and would stay so.
        unsafe { command.pre_exec(|| Ok(SigSet::empty().thread_set_mask()?)) };
        limits::restore(&mut command);
        let process = command.spawn()?;
        let started = Started {
            socket: ours,
            process: process.id(),
        };
        self.process = Some(process);
        Ok(started)
    }

    /// It serves.
    pub(super) fn serves(&mut self) {
        self.serving.get_or_insert_with(Instant::now);
        self.has_served = true;
    }

    /// Its connection has ended.
    pub(super) fn died(&mut self) {
        self.peer = None;
        self.kill = None;
        if let Some(process) = self.process.take() {
            let kill = Some(Instant::now() + DYING);
            self.dying = Some(Dying { process, kill });
            self.bury();
        }
    }

    /// Sees whether what is dying is dead; SIGCHLD says when.
    pub(super) fn bury(&mut self) {
        let Some(Dying { process, .. }) = &mut self.dying else {
            return;
        };
        let status = match process.try_wait() {
            Ok(None) => return,
            Ok(status) => status,
            Err(_) => None,
        };
        let process = process.id();
        self.dying = None;
        let served = self.serving.take().map(|since| since.elapsed());
        match served.is_some_and(|served| served >= SETTLED) {
            true => self.failures = 0,
            false => self.failures += 1,
        }
        let signal = status.and_then(|status| status.signal());
        let code = status.and_then(|status| status.code());
        self.ended = Some((process, signal, code));
    }

    /// There is something to serve, and nobody does: starts it again, now or after a pause.
    pub(super) fn revive(&mut self, now: Instant) {
        if self.is_running() {
            return;
        }
        let pause = self.pause();
        self.start = Some(now + pause);
        if let Some((process, signal, code)) = self.ended.take() {
            tracing::warn!(
                process,
                signal,
                code,
                ?pause,
                "the server died and is started again"
            );
        }
    }

    fn pause(&self) -> Duration {
        let Some(doublings) = self.failures.checked_sub(PATIENT + 1) else {
            return Duration::ZERO;
        };
        let longer = FIRST_PAUSE.saturating_mul(1 << doublings.min(16));
        longer.min(LONGEST_PAUSE)
    }

    /// Asks it to end; kills it if it does not.
    pub(super) fn stop(&mut self) {
        self.signal(Signal::SIGTERM);
        self.kill.get_or_insert_with(|| Instant::now() + GRACE);
    }

    /// Ends it whatever it does: it may be stopped.
    pub(super) fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
    }

    fn signal(&self, signal: Signal) {
        let dying = self.dying.as_ref().map(|dying| &dying.process);
        for process in self.process.iter().chain(dying) {
            // Not waited for yet, so the number is still its own.
            let _ = kill(Pid::from_raw(process.id() as i32), signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_one_that_does_not_die() {
        let make = || {
            let mut command = Command::new("sleep");
            command.arg("1000");
            command
        };
        let mut child = Child::new(Box::new(make));
        let now = Instant::now();
        child.tend(now, false).unwrap();
        child.died();
        child.revive(now);
        assert!(child.is_running() && child.process.is_none());
        let due = child.due().unwrap();
        assert!(child.tend(due, false).is_none() && child.due().is_none());
        while child.dying.is_some() {
            child.bury();
        }
        assert!(!child.is_running());
        assert_eq!(child.ended.unwrap().1, Some(libc::SIGKILL));
        child.revive(now);
        assert!(child.is_running());
    }

    #[test]
    fn pauses_grow_and_are_bounded() {
        let mut child = Child::new(Box::new(|| Command::new("true")));
        let mut pauses = Vec::new();
        for _ in 0..40 {
            pauses.push(child.pause());
            child.failures += 1;
        }
        assert_eq!(pauses[..6], [Duration::ZERO; 6]);
        assert_eq!(pauses[6..9], [100, 200, 400].map(Duration::from_millis));
        assert!(pauses.is_sorted() && pauses[39] == LONGEST_PAUSE);
    }
}
