//! keeper: mounts that outlive their server.
//!
//! The keeper opens `/dev/fuse`, mounts, and holds the connection and its state (`super::state`) while
//! servers come and go; it knows nothing of stores, networks and files. A server connects over a
//! unix socket (`wire`, `talk`), has the fds sent over it, and serves. When its connection ends, it
//! is dead; what it had not answered waits, and the next one takes over (`session`). A keeper that was
//! given a server to run starts it again. While there is none, whoever reads through it waits, for at
//! most the time that is configured, and is then answered ETIMEDOUT (`refuse`); what the kernel
//! reads by itself goes on without anybody.
//! It drops pages for its servers (`super::pages`), by children of its own, since who does so cannot be killed.
//!
//! Invariants: one thread; every queue and message is bounded; a peer that does not read is dropped. No
//! file on a mount is ever opened here: to close it would be a request to a server that may not be there.
//! Every fd is closed on exec. Called by `cli`, in a process of its own. Where the keeper dies, its
//! servers go on, and a mount dies with its server as it would without. A service of systemd needs none: the
//! service manager keeps the same fds (`fdstore`).

mod child;
mod droppers;
mod fdstore;
mod held;
mod line;
mod link;
mod refuse;
mod talk;
mod wire;

use std::{
    collections::BTreeMap,
    io,
    ops::RangeInclusive,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

use self::{
    child::Child,
    droppers::Droppers,
    held::{Answered, Held, is_alive, take_away, unknown},
    refuse::Refuser,
    wire::{Answer, Dir, Request, Which},
};
pub use self::{
    child::SUCCESSOR,
    fdstore::refuse_overdue,
    link::{Link, Orphan},
    wire::{Kept, PROTOCOL},
};
use super::{
    MountError, MountErrorKind, device,
    session::{Device, Id, Session},
    state::State,
    table,
};
use crate::{
    disk::takes_nothing,
    socket::packet::{self, Listener, MsgFlags},
};

/// Most connections at a time.
const MAX_PEERS: usize = 256;
/// Most sessions.
const MAX_SESSIONS: usize = 4096;
/// How long a server may take to let a session go that its successor asks for.
const LEAVE: Duration = Duration::from_secs(10);

/// What a keeper is to do.
pub struct Settings {
    /// Where it listens, mode 0600.
    pub socket: Option<PathBuf>,
    /// Whether it takes the place of a keeper that listens there.
    pub replace: bool,
    /// How long readers wait for a server.
    pub orphan_timeout: Duration,
    /// Makes the server it runs; the keeper ends when its mount is gone.
    pub server: Option<Box<dyn FnMut() -> Command>>,
}

/// A keeper.
pub struct Keeper {
    orphan_timeout: Duration,
    listener: Option<Listener>,
    signals: SignalFd,
    peers: BTreeMap<u64, Peer>,
    last_peer: u64,
    sessions: Vec<Held>,
    child: Option<Child>,
    droppers: Droppers,
    stopping: bool,
}

struct Peer {
    socket: OwnedFd,
    process: u32,
    greeted: bool,
}

/// Something that [`poll`] reports.
enum Source {
    Signals,
    Listener,
    Peer(u64),
    Orphan(Id),
    Refused(Id),
}

impl Keeper {
    /// A keeper that listens. Signals that end a process are from now on for [`Keeper::run`].
    ///
    /// # Errors
    /// A socket on which somebody listens, or that cannot be made.
    pub fn new(settings: Settings) -> Result<Self, MountError> {
        let path = settings.socket.as_deref();
        let failed = |e: io::Error| MountError::system(path.unwrap_or(Path::new("")), "keeper", e);
        let listen = match settings.replace {
            true => Listener::replace,
            false => Listener::bind,
        };
        let listener = match path.map(listen).transpose() {
            // The server that it runs is connected already; others find no way in.
            Err(error) if settings.server.is_some() && takes_nothing(&error) => {
                tracing::warn!(%error, "the keeper has no socket");
                None
            }
            listener => listener.map_err(failed)?,
        };
        let mut ending = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            ending.add(signal);
        }
        // Not an end of its own, but of a child: one that drops pages, or its server.
        ending.add(Signal::SIGCHLD);
        ending.thread_block().map_err(|e| failed(e.into()))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&ending, flags).map_err(|e| failed(e.into()))?;
        Ok(Self {
            orphan_timeout: settings.orphan_timeout,
            listener,
            signals,
            peers: BTreeMap::new(),
            last_peer: 0,
            sessions: Vec::new(),
            child: settings.server.map(Child::new),
            droppers: Droppers::default(),
            stopping: false,
        })
    }

    /// Works until it is told to stop, or, where it runs a server, until that has ended for good.
    ///
    /// # Errors
    /// What the system says.
    pub fn run(mut self) -> io::Result<()> {
        while !self.is_done() {
            let next = self.tend();
            for (source, hung_up) in self.wait(next)? {
                self.handle(source, hung_up);
            }
        }
        for held in self.sessions.drain(..) {
            // It would end with this process, but for a child that drops pages.
            let lasts = held.server.is_none() && self.droppers.count(held.session.id()) > 0;
            // Where the server was run by this process, nobody will serve what is left.
            if self.child.is_some() || lasts {
                take_away(held);
            }
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        match &self.child {
            None => self.stopping,
            Some(child) => {
                !child.is_running()
                    && child.has_begun()
                    && (self.stopping || self.sessions.is_empty())
            }
        }
    }

    /// Does what is due, and says when there is something to do next.
    fn tend(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let mut next = None;
        let mut at = |when: Instant| next = Some(next.map_or(when, |next: Instant| next.min(when)));
        let lonely = |held: &Held| held.server.is_none() && held.successor.is_none();
        if let Some(child) = &mut self.child {
            if !self.stopping && self.sessions.iter().any(lonely) {
                child.revive(now);
            }
            if let Some(started) = child.tend(now, self.stopping) {
                self.last_peer += 1;
                let peer = Peer {
                    socket: started.socket,
                    process: started.process,
                    greeted: false,
                };
                self.peers.insert(self.last_peer, peer);
                child.connected(self.last_peer);
            }
            child.due().into_iter().for_each(&mut at);
        }
        let mut refused = Vec::new();
        for held in &mut self.sessions {
            let dir = held.session.dir.display();
            if let Some((peer, until)) = held.successor {
                match now >= until {
                    true => {
                        held.successor = None;
                        refused.push((peer, held.session.dir.clone()));
                    }
                    false => at(until),
                }
            }
            if held.server.is_some() || held.refuser.is_some() {
                continue;
            }
            // So far away that it never comes.
            let Some(until) = held.orphan.checked_add(self.orphan_timeout) else {
                continue;
            };
            if now < until {
                at(until);
                continue;
            }
            tracing::error!(%dir, "no server came back in time: what is asked of it is refused until one does");
            match Refuser::new(&held.session) {
                Ok(refuser) => held.refuser = Some(refuser),
                Err(error) => {
                    tracing::error!(%dir, %error, "requests cannot be refused: the mount is given up");
                    // Else its number may be of another mount by now.
                    if is_alive(&held.session)
                        && let Err(error) = device::end(&held.session.dir, held.session.connection)
                    {
                        tracing::warn!(%error, "it could not be ended");
                    }
                    // Looked at again when that has no effect.
                    held.orphan = now;
                }
            }
        }
        for (peer, dir) in refused {
            let message = "the server that has it does not let go";
            let error = MountError::new(MountErrorKind::Busy, &dir, message);
            self.answer(peer, &error.into(), &[]);
        }
        next
    }

    /// Waits until something happens, or the time has come; what hung up is marked.
    fn wait(&self, until: Option<Instant>) -> io::Result<Vec<(Source, bool)>> {
        let mut watched = vec![(Source::Signals, self.signals.as_fd(), PollFlags::POLLIN)];
        if let Some(listener) = &self.listener
            && self.peers.len() < MAX_PEERS
        {
            watched.push((Source::Listener, listener.as_fd(), PollFlags::POLLIN));
        }
        for (&id, peer) in &self.peers {
            watched.push((Source::Peer(id), peer.socket.as_fd(), PollFlags::POLLIN));
        }
        for held in &self.sessions {
            let id = held.session.id();
            match (&held.refuser, held.server) {
                (Some(refuser), _) => {
                    watched.push((Source::Refused(id), refuser.fd(), PollFlags::POLLIN));
                }
                // Only for its end: to look at it while it is served would be woken by each request.
                (None, None) => {
                    let fd = held.session.device.as_fd();
                    watched.push((Source::Orphan(id), fd, PollFlags::empty()));
                }
                (None, Some(_)) => {}
            }
        }
        let fds = watched
            .iter()
            .map(|&(_, fd, events)| PollFd::new(fd, events));
        let mut fds: Vec<_> = fds.collect();
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        // Rounded up: what is due must not be found a moment too early again and again.
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let events: Vec<_> = fds.iter().map(PollFd::revents).collect();
        let watched = watched.into_iter().map(|(source, ..)| source);
        let happened = watched.zip(events).filter_map(|(source, events)| {
            let events = events.filter(|events| !events.is_empty())?;
            let ends = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
            Some((
                source,
                events.intersects(ends) && !events.contains(PollFlags::POLLIN),
            ))
        });
        Ok(happened.collect())
    }

    fn handle(&mut self, source: Source, hung_up: bool) {
        match source {
            Source::Signals => {
                while let Ok(Some(signal)) = self.signals.read_signal() {
                    if signal.ssi_signo == Signal::SIGCHLD as u32 {
                        self.droppers.reap();
                        self.child.iter_mut().for_each(Child::bury);
                        continue;
                    }
                    self.stopping = true;
                    if let Some(child) = &mut self.child {
                        child.stop();
                    }
                }
            }
            Source::Listener => self.accept(),
            Source::Peer(id) => self.hear(id, hung_up),
            Source::Orphan(id) | Source::Refused(id) => {
                let found = |held: &Held| held.session.id() == id;
                let Some(at) = self.sessions.iter().position(found) else {
                    return;
                };
                let held = &mut self.sessions[at];
                let gone = match &mut held.refuser {
                    Some(refuser) => hung_up || refuser.refuse(&held.session.state).is_err(),
                    None => held.server.is_none() && hung_up,
                };
                if gone {
                    let gone = self.remove(at);
                    take_away(gone);
                }
            }
        }
    }

    fn accept(&mut self) {
        let Some(accepted) = self.listener.as_ref().map(Listener::accept) else {
            return;
        };
        let peer = accepted.and_then(|socket| {
            let process = packet::peer(&socket)?;
            Ok(Peer {
                socket,
                process,
                greeted: false,
            })
        });
        match peer {
            Ok(peer) => {
                self.last_peer += 1;
                self.peers.insert(self.last_peer, peer);
            }
            Err(error) => tracing::warn!(%error, "a connection was refused"),
        }
    }

    /// Hears what a peer says, or that it is gone.
    fn hear(&mut self, id: u64, hung_up: bool) {
        let Some(peer) = self.peers.get(&id) else {
            return;
        };
        let heard = match hung_up {
            true => Ok(None),
            false => packet::receive(peer.socket.as_fd(), MsgFlags::MSG_DONTWAIT),
        };
        match heard {
            Ok(Some((request, fds))) => self.serve(id, request, fds),
            Ok(None) => self.gone(id),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(process = peer.process, %error, "a peer is not understood");
                self.gone(id);
            }
        }
    }

    /// A peer is dead: its sessions wait for another.
    fn gone(&mut self, id: u64) {
        let Some(peer) = self.peers.remove(&id) else {
            return;
        };
        for held in &mut self.sessions {
            if held.successor.is_some_and(|(successor, _)| successor == id) {
                held.successor = None;
            }
            if held.server == Some(id) {
                held.server = None;
                held.orphan = Instant::now();
            }
        }
        match &mut self.child {
            Some(child) if child.is(id) => {
                // What it served to its end, or not at all, is not served again.
                let again = |held: &Held| held.servers > 0 && is_alive(&held.session);
                let (again, gone): (Vec<_>, Vec<_>) = self.sessions.drain(..).partition(again);
                self.sessions = again;
                child.died();
                for held in gone {
                    self.refuse_successor(&held);
                    take_away(held);
                }
            }
            _ => tracing::debug!(process = peer.process, "a peer is gone"),
        }
        self.hand_over();
    }

    fn serve(&mut self, id: u64, request: Request, fds: Vec<OwnedFd>) {
        let greeted = self.peers.get(&id).is_some_and(|peer| peer.greeted);
        let answered = match request {
            Request::Hello { protocol, version } => self.welcome(id, protocol, &version),
            _ if !greeted => Err(MountError::new(
                MountErrorKind::Keeper,
                Path::new("keeper"),
                "speak up first: hello",
            )),
            Request::Open {
                dir,
                read_only,
                allow_other,
                about,
            } => {
                let options = device::Options {
                    read_only,
                    allow_other,
                };
                self.open(id, &dir.0, options, about.as_bytes())
            }
            Request::Next { after } => {
                Ok((self.next(after.as_ref().map(|dir| &*dir.0)), Vec::new()))
            }
            Request::Show { dir } => self.find(&dir.0).and_then(|held| held.show()),
            Request::Take { dir } => match self.take(id, &dir.0) {
                Ok(true) => Ok((Answer::Done, Vec::new())),
                // Answered when the other has left.
                Ok(false) => return,
                Err(error) => Err(error),
            },
            Request::Hold { dir } => self.find(&dir.0).map(|held| {
                // Those of the server before have had their time.
                held._holds = fds;
                (Answer::Done, Vec::new())
            }),
            Request::Left { dir, which } => self.find_this(&dir.0, which).map(|held| {
                if held.server == Some(id) {
                    held.server = None;
                    held.orphan = Instant::now();
                }
                (Answer::Done, Vec::new())
            }),
            Request::End { dir, which } => {
                let ended = |held: &Held| held.server == Some(id) && held.is(&dir.0, which);
                if let Some(at) = self.sessions.iter().position(ended) {
                    self.remove(at);
                }
                Ok((Answer::Done, Vec::new()))
            }
            Request::Abort { dir } => self.abort(&dir.0),
            Request::Give { dir, connection } => self.accept_session(id, &dir.0, connection, fds),
            Request::Drop {
                dir,
                which,
                first,
                last,
            } => self.drop_pages(id, (&dir.0, which), first..=last, fds),
        };
        match answered {
            Ok((answer, fds)) => {
                let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
                self.answer(id, &answer, &fds);
            }
            Err(error) => self.answer(id, &error.into(), &[]),
        }
        self.hand_over();
    }

    fn welcome(&mut self, id: u64, protocol: u32, version: &str) -> Answered {
        if protocol != PROTOCOL {
            let message = format!(
                "hearth {version} speaks protocol {protocol} and the keeper, hearth {}, {PROTOCOL}",
                env!("HEARTH_VERSION")
            );
            return Err(MountError::new(
                MountErrorKind::Keeper,
                Path::new("keeper"),
                message,
            ));
        }
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.greeted = true;
        }
        let answer = Answer::Welcome {
            keeper: std::process::id(),
            version: env!("HEARTH_VERSION").into(),
            takes: true,
            drops: true,
        };
        Ok((answer, Vec::new()))
    }

    /// The first session behind `after`, in the order of mount points.
    fn next(&self, after: Option<&Path>) -> Answer {
        let behind =
            |held: &&Held| !held.detached && after.is_none_or(|after| *held.session.dir > *after);
        let next = self
            .sessions
            .iter()
            .filter(behind)
            .min_by_key(|held| &held.session.dir);
        let process = |id| self.peers.get(&id).map(|peer| peer.process);
        Answer::Next(next.map(|held| {
            let server = held.server.and_then(process);
            Kept::new(&held.session.dir, server, held.servers)
        }))
    }

    /// Makes sure that a session on `dir` may begin.
    fn make_room(&mut self, dir: &Path) -> Result<(), MountError> {
        if self.sessions.len() >= MAX_SESSIONS {
            let message = format!("the keeper has {MAX_SESSIONS} mounts already");
            return Err(MountError::new(MountErrorKind::Keeper, dir, message));
        }
        if let Ok(held) = self.find(dir) {
            if table::shows(dir, held.session.connection) {
                let message = "the keeper has mounted here already";
                return Err(MountError::new(MountErrorKind::Mounted, dir, message));
            }
            // Else its server is about to say that it ended.
            if is_alive(&held.session) {
                tracing::warn!(dir = %dir.display(), connection = held.session.connection, "what was mounted here was detached");
            }
            held.detached = true;
        }
        Ok(())
    }

    /// Keeps what `id` serves, as the keeper before this one did.
    fn accept_session(
        &mut self,
        id: u64,
        dir: &Path,
        connection: u32,
        fds: Vec<OwnedFd>,
    ) -> Answered {
        self.make_room(dir)?;
        let failed = |e| MountError::system(dir, "session", e);
        let Ok([fuse, state]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Err(failed(io::Error::from(io::ErrorKind::InvalidData)));
        };
        let session = Session {
            dir: dir.to_owned(),
            connection,
            device: Arc::new(Device::new(fuse)),
            state: Arc::new(State::open(state).map_err(failed)?),
        };
        tracing::info!(dir = %dir.display(), connection, "kept from now on");
        let mut held = Held::new(session, id);
        held.servers = 1;
        self.sessions.push(held);
        Ok((Answer::Done, Vec::new()))
    }

    fn open(&mut self, id: u64, dir: &Path, options: device::Options, about: &[u8]) -> Answered {
        self.make_room(dir)?;
        let session = Session::mount(dir, options, about)?;
        tracing::info!(dir = %dir.display(), connection = session.connection, "mounted");
        let held = Held::new(session, id);
        let shown = held.show();
        self.sessions.push(held);
        shown
    }

    /// Whether `id` serves it from now on; else it has to wait until another has left.
    fn take(&mut self, id: u64, dir: &Path) -> Result<bool, MountError> {
        let held = self.find(dir)?;
        if let Some(other) = held.server.filter(|&server| server != id) {
            if held.successor.is_some() {
                let message = "another server is taking it over";
                return Err(MountError::new(MountErrorKind::Busy, dir, message));
            }
            held.successor = Some((id, Instant::now() + LEAVE));
            let dir = Dir(dir.to_owned());
            self.answer(other, &Answer::Leave { dir }, &[]);
            return Ok(false);
        }
        held.give(id);
        if let Some(child) = &mut self.child {
            child.serves();
        }
        Ok(true)
    }

    /// Gives sessions that have become free to who waits for them.
    fn hand_over(&mut self) {
        let mut taken = Vec::new();
        for held in &mut self.sessions {
            if held.server.is_none()
                && let Some((id, _)) = held.successor.take()
            {
                held.give(id);
                taken.push(id);
            }
        }
        for id in taken {
            self.answer(id, &Answer::Done, &[]);
        }
    }

    /// Starts a child that drops pages and says so to the one fd of `fds`.
    fn drop_pages(
        &mut self,
        id: u64,
        (dir, which): (&Path, Which),
        inodes: RangeInclusive<u64>,
        fds: Vec<OwnedFd>,
    ) -> Answered {
        let mut sessions = self.sessions.iter();
        let held = sessions.find(|held| held.is(dir, which));
        let held = held.ok_or_else(|| unknown(dir))?;
        let refused = |kind, why: &str| Err(MountError::new(kind, dir, why));
        if held.server != Some(id) {
            return refused(MountErrorKind::Keeper, "another process serves it");
        }
        let Ok([report]) = <[OwnedFd; 1]>::try_from(fds) else {
            return refused(
                MountErrorKind::Keeper,
                "nobody would be told that pages were dropped",
            );
        };
        self.droppers.start(&held.session, inodes, report.as_fd())?;
        Ok((Answer::Done, Vec::new()))
    }

    fn abort(&mut self, dir: &Path) -> Answered {
        let found = |held: &Held| held.is(dir, Which::default());
        let at = self.sessions.iter().position(found);
        let held = self.remove(at.ok_or_else(|| unknown(dir))?);
        take_away(held);
        if let Some(child) = &mut self.child {
            self.stopping = true;
            child.kill();
        }
        Ok((Answer::Done, Vec::new()))
    }

    fn find(&mut self, dir: &Path) -> Result<&mut Held, MountError> {
        self.find_this(dir, Which::default())
    }

    fn find_this(&mut self, dir: &Path, which: Which) -> Result<&mut Held, MountError> {
        let mut sessions = self.sessions.iter_mut();
        sessions
            .find(|held| held.is(dir, which))
            .ok_or_else(|| unknown(dir))
    }

    /// Forgets a session; who waits to serve it is told.
    fn remove(&mut self, at: usize) -> Held {
        let held = self.sessions.remove(at);
        self.refuse_successor(&held);
        held
    }

    fn refuse_successor(&mut self, gone: &Held) {
        if let Some((peer, _)) = gone.successor {
            self.answer(peer, &unknown(&gone.session.dir).into(), &[]);
        }
    }

    fn answer(&mut self, id: u64, answer: &Answer, fds: &[BorrowedFd<'_>]) {
        let Some(peer) = self.peers.get(&id) else {
            return;
        };
        let sent = packet::send(peer.socket.as_fd(), answer, fds, MsgFlags::MSG_DONTWAIT);
        if let Err(error) = sent {
            tracing::warn!(process = peer.process, %error, "a peer does not listen");
            self.gone(id);
        }
    }
}
