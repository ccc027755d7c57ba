//! Messages between processes of one machine: one JSON document in a packet of a `SOCK_SEQPACKET` socket, with
//! the file descriptors that belong to it (unix(7)).

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

pub use nix::sys::socket::MsgFlags;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{
        AddressFamily, Backlog, ControlMessage, ControlMessageOwned, SockFlag, SockType, UnixAddr,
        accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, socket,
        sockopt::PeerCredentials,
    },
    unistd::geteuid,
};
use serde::{Serialize, de::DeserializeOwned};

use super::name::Name;

/// Longest packet, in bytes; less than the system's bound on what a socket buffers.
pub const MAX_PACKET: usize = 136 << 10;
/// Most file descriptors in one packet.
pub const MAX_FDS: usize = 16;

/// Sends one message; does not wait where `flags` say so.
///
/// # Errors
/// It is too long; the peer does not take it.
pub fn send(
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
///
/// # Errors
/// A message that is too long, or not understood.
pub fn receive<T: DeserializeOwned>(
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
///
/// # Errors
/// It is neither root nor of this process's user.
pub fn peer(socket: &OwnedFd) -> io::Result<u32> {
    let peer = getsockopt(socket, PeerCredentials)?;
    if peer.uid() != 0 && peer.uid() != geteuid().as_raw() {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied));
    }
    Ok(peer.pid() as u32)
}

/// A listening socket; without its name when dropped.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    _name: Name,
}

impl Listener {
    /// Listens on `path`, mode 0600, in place of whatever socket nobody listens on. Makes the directory,
    /// mode 0711.
    ///
    /// # Errors
    /// `AddrInUse` where somebody listens; `AlreadyExists` where something else is.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let (socket, name) = Name::take(path, listener)?;
        let _name = name;
        Ok(Self { socket, _name })
    }

    /// As [`Listener::bind`], in place of whoever listens there.
    ///
    /// # Errors
    /// What the system says.
    pub fn replace(path: &Path) -> io::Result<Self> {
        let (socket, name) = Name::replace(path, listener)?;
        let _name = name;
        Ok(Self { socket, _name })
    }

    /// From now on [`Listener::accept`] does not wait: it says `WouldBlock`.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        fcntl(&self.socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(())
    }

    /// Takes a connection that waits.
    ///
    /// # Errors
    /// What the system says.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        let fd = accept4(self.socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: the kernel has just made this fd for us, and nobody else knows of it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

fn listener(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(64)?)?;
    Ok(socket)
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Connects to whoever listens on `path`.
///
/// # Errors
/// Nobody does.
pub fn dial(path: &Path) -> io::Result<OwnedFd> {
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
    use std::fs;

    use super::*;

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
        // Whoever takes its place is left alone by it.
        let old = Listener::bind(&path).unwrap();
        let new = Listener::replace(&path).unwrap();
        let waiting = dial(&path).unwrap();
        drop(old);
        new.accept().unwrap();
        drop((waiting, new));
        // Left by one that was killed.
        let dead = new_socket().unwrap();
        let (_dir, address) = address(&path).unwrap();
        bind(dead.as_raw_fd(), &address).unwrap();
        drop(dead);
        Listener::bind(&path).unwrap();
    }
}
