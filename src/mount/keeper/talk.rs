//! A server's conversation with its keeper.

use std::{
    io,
    ops::RangeInclusive,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    time::Duration,
};

use nix::sys::socket::{Shutdown, shutdown};
use parking_lot::Mutex;
use tokio::sync::mpsc::Sender;

use super::{
    super::{
        MountError, MountErrorKind, device,
        session::{Device, Id, Session},
        state::State,
    },
    wire::{Answer, Dir, Kept, PROTOCOL, Request},
};
use crate::{
    metrics,
    socket::packet::{self, MsgFlags},
};

/// How long a keeper may take to answer: it mounts, and waits for a server to leave.
const PATIENCE: Duration = Duration::from_secs(30);
/// Sessions that may be asked back before anybody has looked.
const LEAVES: usize = 1024;

/// A connection to a keeper. The keeper takes its end for the death of this server.
#[derive(Debug)]
pub(super) struct Talk {
    socket: Arc<OwnedFd>,
    answers: Mutex<Receiver<(Answer, Vec<OwnedFd>)>>,
    leaves: Arc<Mutex<Leaves>>,
    lost: Arc<AtomicBool>,
    keeper: u32,
    takes: bool,
    drops: bool,
}

/// Who is told of sessions that a successor asks for, by what their mount points begin with.
pub(super) type Leaves = Vec<(PathBuf, Sender<PathBuf>)>;

impl Talk {
    /// Connects to the keeper that listens on `path`.
    ///
    /// # Errors
    /// None is there, or it does not speak with this version.
    pub(super) fn connect(path: &Path, leaves: Arc<Mutex<Leaves>>) -> Result<Self, MountError> {
        let socket = packet::dial(path).map_err(|e| MountError::system(path, "keeper", e))?;
        Self::over(socket, path, leaves)
    }

    /// Takes the connection that the keeper gave this process as its standard input, and leaves nothing
    /// there.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn inherited() -> Result<Self, MountError> {
        let failed = |e: io::Error| MountError::system(Path::new("stdin"), "keeper", e);
        let stdin = io::stdin();
        let socket = stdin.as_fd().try_clone_to_owned().map_err(failed)?;
        let nothing = std::fs::File::open("/dev/null").map_err(failed)?;
        // Children must not inherit it: the keeper would take this process for alive.
        nix::unistd::dup2_stdin(&nothing).map_err(|e| failed(e.into()))?;
        Self::over(socket, Path::new("stdin"), Arc::default())
    }

    fn over(socket: OwnedFd, name: &Path, leaves: Arc<Mutex<Leaves>>) -> Result<Self, MountError> {
        let failed = |e: io::Error| MountError::system(name, "keeper", e);
        let socket = Arc::new(socket);
        let (answer, answers) = mpsc::sync_channel(4);
        let lost = Arc::new(AtomicBool::new(false));
        let (listening, told, ended) = (socket.clone(), leaves.clone(), lost.clone());
        std::thread::Builder::new()
            .name("hearth-keeper".into())
            .spawn(move || {
                loop {
                    let sent = match packet::receive(listening.as_fd(), MsgFlags::empty()) {
                        Ok(Some((Answer::Leave { dir }, _))) => tell(&told.lock(), dir.0),
                        Ok(Some(other)) => answer.send(other).is_ok(),
                        Ok(None) => false,
                        Err(error) => {
                            tracing::warn!(%error, "the keeper is not understood");
                            false
                        }
                    };
                    if !sent {
                        ended.store(true, Relaxed);
                        return;
                    }
                }
            })
            .map_err(failed)?;
        let mut talk = Self {
            socket,
            answers: Mutex::new(answers),
            leaves,
            lost,
            keeper: 0,
            takes: false,
            drops: false,
        };
        let hello = Request::Hello {
            protocol: PROTOCOL,
            version: env!("HEARTH_VERSION").into(),
        };
        match talk.ask(name, &hello, &[])?.0 {
            Answer::Welcome {
                keeper,
                takes,
                drops,
                ..
            } => {
                (talk.keeper, talk.takes, talk.drops) = (keeper, takes, drops);
                Ok(talk)
            }
            other => Err(unexpected(name, &other)),
        }
    }

    /// Whether the keeper is gone, or has not answered in time.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Relaxed)
    }

    /// Who is told of sessions that a successor asks for: also by another connection.
    pub(super) fn leaves(&self) -> Arc<Mutex<Leaves>> {
        Arc::clone(&self.leaves)
    }

    /// The process id of the keeper.
    pub(super) fn keeper(&self) -> u32 {
        self.keeper
    }

    /// The sessions that the keeper has.
    ///
    /// # Errors
    /// It is gone.
    pub(super) fn sessions(&self) -> Result<Vec<Kept>, MountError> {
        let name = Path::new("keeper");
        let mut sessions: Vec<Kept> = Vec::new();
        loop {
            let after = sessions.last().map(|kept| Dir(kept.dir().to_owned()));
            match self.ask(name, &Request::Next { after }, &[])?.0 {
                Answer::Next(Some(kept)) => sessions.push(kept),
                Answer::Next(None) => return Ok(sessions),
                other => return Err(unexpected(name, &other)),
            }
        }
    }

    /// Mount points at or below `dir`, which is named as the kernel does, that a successor of this server
    /// asks for, from now on. Ends with the keeper.
    pub(super) fn leaves_below(&self, dir: &Path) -> tokio::sync::mpsc::Receiver<PathBuf> {
        let (tell, told) = tokio::sync::mpsc::channel(LEAVES);
        let mut leaves = self.leaves.lock();
        leaves.retain(|(below, _)| below != dir);
        leaves.push((dir.to_owned(), tell));
        told
    }

    /// Has the keeper mount on `dir`.
    pub(super) fn open(
        &self,
        dir: &Path,
        options: device::Options,
        about: &str,
    ) -> Result<Session, MountError> {
        let request = Request::Open {
            dir: Dir(dir.to_owned()),
            read_only: options.read_only,
            allow_other: options.allow_other,
            about: about.to_owned(),
        };
        self.session(dir, &request)
    }

    pub(super) fn show(&self, dir: &Path) -> Result<Session, MountError> {
        let dir = dir.to_owned();
        self.session(&dir.clone(), &Request::Show { dir: Dir(dir) })
    }

    /// From now on this process serves the session on `dir`, and no other does.
    pub(super) fn take(&self, dir: &Path) -> Result<(), MountError> {
        self.tell(
            dir,
            &Request::Take {
                dir: Dir(dir.into()),
            },
            &[],
        )
    }

    /// Has the keeper hold copies of `fds` for as long as the session on `dir`.
    ///
    /// # Errors
    /// There is no such session, or no keeper any more.
    pub(super) fn hold(&self, dir: &Path, fds: &[BorrowedFd<'_>]) -> Result<(), MountError> {
        self.tell(
            dir,
            &Request::Hold {
                dir: Dir(dir.into()),
            },
            fds,
        )
    }

    /// This process serves the session on `dir` no more; the next one may.
    pub(super) fn left(&self, dir: &Path, id: Id) -> Result<(), MountError> {
        let request = Request::Left {
            dir: Dir(dir.into()),
            which: id.into(),
        };
        self.tell(dir, &request, &[])
    }

    /// The mount on `dir` is gone.
    pub(super) fn end(&self, dir: &Path, id: Id) -> Result<(), MountError> {
        let request = Request::End {
            dir: Dir(dir.into()),
            which: id.into(),
        };
        self.tell(dir, &request, &[])
    }

    /// Has the keeper have a session that this process serves.
    pub(super) fn give(
        &self,
        dir: &Path,
        connection: u32,
        device: BorrowedFd<'_>,
        state: BorrowedFd<'_>,
    ) -> Result<(), MountError> {
        if !self.takes {
            let message = "the keeper is of an earlier version, and takes no mount of another";
            return Err(MountError::new(MountErrorKind::Keeper, dir, message));
        }
        let request = Request::Give {
            dir: Dir(dir.into()),
            connection,
        };
        self.tell(dir, &request, &[device, state])
    }

    /// Has the keeper take the mount on `dir` away, whatever its server does.
    ///
    /// # Errors
    /// The keeper has no such mount.
    pub(super) fn abort(&self, dir: &Path) -> Result<(), MountError> {
        self.tell(
            dir,
            &Request::Abort {
                dir: Dir(dir.into()),
            },
            &[],
        )
    }

    /// Has a child of the keeper drop the kernel's pages of `inodes`, which says so to `report`; false where the keeper
    /// cannot.
    ///
    /// # Errors
    /// [`MountErrorKind::Busy`] where it has too much of that in hand; [`MountErrorKind::System`] where it is gone.
    pub(super) fn drop_pages(
        &self,
        (dir, id): (&Path, Id),
        inodes: RangeInclusive<u64>,
        report: BorrowedFd<'_>,
    ) -> Result<bool, MountError> {
        if !self.drops {
            return Ok(false);
        }
        let request = Request::Drop {
            dir: Dir(dir.into()),
            which: id.into(),
            first: *inodes.start(),
            last: *inodes.end(),
        };
        self.tell(dir, &request, &[report]).map(|()| true)
    }

    fn session(&self, dir: &Path, request: &Request) -> Result<Session, MountError> {
        let failed = |e| MountError::system(dir, "session", e);
        let (answer, fds) = self.ask(dir, request, &[])?;
        let Answer::Session { connection } = answer else {
            return Err(unexpected(dir, &answer));
        };
        let Ok([fuse, state]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Err(failed(io::Error::from(io::ErrorKind::InvalidData)));
        };
        Ok(Session {
            dir: dir.to_owned(),
            connection,
            device: Arc::new(Device::new(fuse)),
            state: Arc::new(State::open(state).map_err(failed)?),
        })
    }

    fn tell(
        &self,
        dir: &Path,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), MountError> {
        match self.ask(dir, request, fds)?.0 {
            Answer::Done => Ok(()),
            other => Err(unexpected(dir, &other)),
        }
    }

    fn ask(
        &self,
        name: &Path,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Answer, Vec<OwnedFd>), MountError> {
        let answers = self.answers.lock();
        packet::send(self.socket.as_fd(), request, fds, MsgFlags::empty())
            .map_err(|e| MountError::system(name, "keeper", e))?;
        match answers.recv_timeout(PATIENCE) {
            Ok((Answer::Failed { kind, dir, message }, _)) => {
                metrics::global().keeper_failures.add(1);
                Err(MountError::new(kind, &dir.0, message))
            }
            Ok(answer) => Ok(answer),
            Err(error) => {
                metrics::global().keeper_failures.add(1);
                // What it answers later would be taken for the answer to something else.
                let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
                let why = match error {
                    RecvTimeoutError::Timeout => "it does not answer",
                    RecvTimeoutError::Disconnected => "it is gone",
                };
                Err(MountError::new(
                    MountErrorKind::System,
                    name,
                    format!("keeper: {why}"),
                ))
            }
        }
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        // Ends the thread that listens.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
    }
}

/// Says that `dir` is to be left, to whoever has it; false where nobody can be told any more.
fn tell(leaves: &Leaves, dir: PathBuf) -> bool {
    match leaves.iter().find(|(below, _)| dir.starts_with(below)) {
        Some((_, tell)) if !tell.is_closed() => tell.try_send(dir).is_ok(),
        _ => {
            tracing::warn!(dir = %dir.display(), "a successor asks for what is not served here");
            true
        }
    }
}

fn unexpected(name: &Path, answer: &Answer) -> MountError {
    let message = format!("keeper: an unexpected answer: {answer:?}");
    MountError::new(MountErrorKind::System, name, message)
}
