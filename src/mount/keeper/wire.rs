//! Messages between a keeper and servers: one JSON document in a packet of a `SOCK_SEQPACKET` socket, with
//! the file descriptors that belong to it.
//!
//! A server begins with [`Request::Hello`]. Every request has one answer, in order; [`Answer::Leave`] comes
//! by itself. A peer that sends what is too long, or not understood, is dropped.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            fs::DirBuilderExt as _,
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag,
            SockType, UnixAddr, accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg,
            socket, sockopt::PeerCredentials,
        },
        stat::{Mode, umask},
    },
    unistd::geteuid,
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::super::{MountError, MountErrorKind, state::MAX_ABOUT};

/// Of the messages below. A keeper speaks with servers of exactly this.
pub(super) const PROTOCOL: u32 = 1;
/// Longest packet, in bytes; less than the system's bound on what a socket buffers.
const MAX_PACKET: usize = 2 * MAX_ABOUT + 16384;
/// Most file descriptors in one packet.
const MAX_FDS: usize = 4;

/// What a server, or a command, asks.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    Hello {
        protocol: u32,
        version: String,
    },
    /// Mount on `dir`. Answered with a session, which the asking server is to serve.
    Open {
        dir: Dir,
        read_only: bool,
        allow_other: bool,
        about: String,
    },
    /// Name the first session whose mount point comes behind this.
    Next {
        after: Option<Dir>,
    },
    /// Show the session on `dir`, whoever serves it.
    Show {
        dir: Dir,
    },
    /// Let this server serve the session on `dir`; whoever does so now is asked to leave first.
    Take {
        dir: Dir,
    },
    /// These descriptors are to stay open as long as the session on `dir`: locks on what it needs.
    Hold {
        dir: Dir,
    },
    /// This server serves the session on `dir` no more; another will.
    Left {
        dir: Dir,
    },
    /// The mount on `dir` is gone, and nobody is to serve it again.
    End {
        dir: Dir,
    },
    /// Take the mount on `dir` away, whatever its server does.
    Abort {
        dir: Dir,
    },
}

/// What a keeper answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Welcome {
        /// Process id.
        keeper: u32,
        version: String,
    },
    Next(Option<Kept>),
    /// With the fds of the connection and of the state.
    Session {
        connection: u32,
    },
    Done,
    Failed {
        kind: MountErrorKind,
        dir: Dir,
        message: String,
    },
    /// A successor wants the session on `dir`: answer what is in hand and let go.
    Leave {
        dir: Dir,
    },
}

/// A session that a keeper has.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    dir: Dir,
    /// The process that serves it, where there is one.
    pub server: Option<u32>,
    /// How many servers it has had.
    pub servers: u32,
}

impl Kept {
    pub(super) fn new(dir: &Path, server: Option<u32>, servers: u32) -> Self {
        let dir = Dir(dir.to_owned());
        Self {
            dir,
            server,
            servers,
        }
    }

    /// The mount point.
    pub fn dir(&self) -> &Path {
        &self.dir.0
    }
}

/// A path, whatever its bytes; what is not plain is written as `%xx`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub(super) struct Dir(pub(super) PathBuf);

/// What stands for itself.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'_')
    .remove(b'.');

impl From<String> for Dir {
    fn from(text: String) -> Self {
        let bytes = percent_decode_str(&text).collect();
        Self(std::ffi::OsString::from_vec(bytes).into())
    }
}

impl From<Dir> for String {
    fn from(dir: Dir) -> Self {
        percent_encode(dir.0.as_os_str().as_bytes(), PLAIN).to_string()
    }
}

impl From<MountError> for Answer {
    fn from(error: MountError) -> Self {
        Self::Failed {
            kind: error.kind,
            dir: Dir(error.dir),
            message: error.message,
        }
    }
}

/// Sends one message; does not wait where `flags` say so.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    message: &impl Serialize,
    fds: &[BorrowedFd<'_>],
    flags: MsgFlags,
) -> io::Result<()> {
    let text = serde_json::to_vec(message).map_err(io::Error::other)?;
    if text.len() > MAX_PACKET || fds.len() > MAX_FDS {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights };
    let flags = flags | MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(&text)],
            control,
            flags,
            None,
        ) {
            Err(Errno::EINTR) => {}
            sent => return Ok(sent.map(drop)?),
        }
    }
}

/// Receives one message; `None` where the peer is gone.
pub(super) fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
    flags: MsgFlags,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut text = vec![0; MAX_PACKET];
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let (length, cut, fds) = loop {
        let mut parts = [IoSliceMut::new(&mut text)];
        let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags);
        let message = match received {
            Err(Errno::EINTR) => continue,
            Err(Errno::ECONNRESET) => return Ok(None),
            other => other?,
        };
        let mut fds = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just made these fds for us, and nobody else knows of them.
                fds.extend(
                    raw.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        let cut = message
            .flags
            .intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        break (message.bytes, cut, fds);
    };
    if length == 0 {
        return Ok(None);
    }
    if cut {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    let message = serde_json::from_slice(&text[..length]).map_err(io::Error::other)?;
    Ok(Some((message, fds)))
}

/// Whether the process at the other end may speak with us, and which it is.
pub(super) fn peer(socket: &OwnedFd) -> io::Result<u32> {
    let peer = getsockopt(socket, PeerCredentials)?;
    if peer.uid() != 0 && peer.uid() != geteuid().as_raw() {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied));
    }
    Ok(peer.pid() as u32)
}

/// A socket with a name; without it when dropped.
#[derive(Debug)]
pub(super) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

impl Listener {
    /// Listens on `path`, mode 0600, in place of whatever socket nobody listens on. Makes the directory,
    /// mode 0711. Other threads of this process must not be making files.
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let dir = dir.unwrap_or(Path::new("."));
        DirBuilder::new().recursive(true).mode(0o711).create(dir)?;
        if fs::symlink_metadata(path).is_ok() {
            if !std::os::unix::fs::FileTypeExt::is_socket(&fs::symlink_metadata(path)?.file_type())
            {
                return Err(io::Error::from(io::ErrorKind::AlreadyExists));
            }
            if dial(path).is_ok() {
                return Err(io::Error::from(io::ErrorKind::AddrInUse));
            }
            fs::remove_file(path)?;
        }
        let socket = new_socket()?;
        let (_dir, address) = address(path)?;
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = bind(socket.as_raw_fd(), &address);
        umask(before);
        bound?;
        let listener = Self {
            socket,
            path: path.to_owned(),
        };
        listen(&listener.socket, Backlog::new(64)?)?;
        Ok(listener)
    }

    /// Takes a connection that waits.
    pub(super) fn accept(&self) -> io::Result<OwnedFd> {
        let fd = accept4(self.socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: the kernel has just made this fd for us, and nobody else knows of it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Connects to the keeper that listens on `path`.
pub(super) fn dial(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    let (_dir, address) = address(path)?;
    connect(socket.as_raw_fd(), &address)?;
    Ok(socket)
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    Ok(socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        flags,
        None,
    )?)
}

/// The address of `path`, which may be longer than the 108 bytes that `sun_path` has room for: it is
/// reached through the directory, open meanwhile.
fn address(path: &Path) -> io::Result<(Option<File>, UnixAddr)> {
    if path.as_os_str().as_bytes().len() < 108 {
        return Ok((None, UnixAddr::new(path)?));
    }
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let dir = File::open(path.parent().ok_or_else(invalid)?)?;
    let through = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    let address = UnixAddr::new(&through.join(path.file_name().ok_or_else(invalid)?))?;
    Ok((Some(dir), address))
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::socketpair;

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC;
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
    }

    #[test]
    fn messages_and_descriptors_arrive() {
        let (one, other) = pair();
        let odd = std::ffi::OsString::from_vec(b"/mnt/a b%\xff\n".to_vec());
        let request = Request::Hold {
            dir: Dir(PathBuf::from(&odd)),
        };
        let file = tempfile::tempfile().unwrap();
        send(one.as_fd(), &request, &[file.as_fd()], MsgFlags::empty()).unwrap();
        let received = receive::<Request>(other.as_fd(), MsgFlags::empty());
        let (received, fds) = received.unwrap().unwrap();
        assert!(matches!(received, Request::Hold { dir } if *dir.0 == *odd));
        assert_eq!(fds.len(), 1);
        drop(one);
        let gone = receive::<Request>(other.as_fd(), MsgFlags::empty());
        assert!(gone.unwrap().is_none());
    }

    #[test]
    fn what_is_long_or_foreign_is_refused() {
        let (one, other) = pair();
        for bad in [&b"{"[..], b"{\"Nothing\":1}", &vec![b'1'; MAX_PACKET + 1]] {
            nix::unistd::write(&one, bad).unwrap();
            receive::<Request>(other.as_fd(), MsgFlags::empty()).unwrap_err();
        }
        let long = Request::Open {
            dir: Dir("/".into()),
            read_only: true,
            allow_other: true,
            about: "x".repeat(MAX_PACKET),
        };
        send(one.as_fd(), &long, &[], MsgFlags::empty()).unwrap_err();
        // The longest that is allowed fits into the socket.
        let long = Request::Open {
            dir: Dir("/".into()),
            read_only: true,
            allow_other: true,
            about: "\"".repeat(MAX_ABOUT),
        };
        send(one.as_fd(), &long, &[], MsgFlags::MSG_DONTWAIT).unwrap();
    }

    #[test]
    fn a_listener_is_private_and_takes_the_place_of_a_dead_one() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d".repeat(120)).join("keeper.sock");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let error = Listener::bind(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let ours = dial(&path).unwrap();
        let accepted = listener.accept().unwrap();
        assert_eq!(peer(&accepted).unwrap(), std::process::id());
        drop(ours);
        drop(listener);
        assert!(!path.exists());
        // Left by one that was killed.
        let dead = new_socket().unwrap();
        let (_dir, address) = address(&path).unwrap();
        bind(dead.as_raw_fd(), &address).unwrap();
        drop(dead);
        Listener::bind(&path).unwrap();
    }
}
