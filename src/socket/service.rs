//! What a service says to its service manager, and has from it: sd_notify(3), sd_listen_fds(3).
//!
//! A datagram of lines `NAME=value` to the socket that the environment names. With `FDSTORE=1` file descriptors
//! come along, which the manager keeps however this process ends, and passes to the next one from number 3 on.

use std::{
    io::{self, IoSlice},
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socket,
    },
};

/// The first descriptor that is passed (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;
/// More are not looked at.
const MAX_PASSED: usize = 65536;

/// Whether there is a manager that listens.
pub fn is_managed() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Sends `state`, such as `READY=1`, with copies of `fds`; false where no manager listens.
///
/// # Errors
/// An address that is none; a manager that is gone.
pub fn notify(state: &str, fds: &[BorrowedFd<'_>]) -> io::Result<bool> {
    let Some(address) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(false);
    };
    let address = match address.as_bytes() {
        path @ [b'/', ..] => UnixAddr::new(path)?,
        [b'@', name @ ..] => UnixAddr::new_abstract(name)?,
        _ => return Err(io::Error::from(io::ErrorKind::Unsupported)),
    };
    let (family, flags) = (AddressFamily::Unix, SockFlag::SOCK_CLOEXEC);
    let socket = socket(family, SockType::Datagram, flags, None)?;
    let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights };
    let text = [IoSlice::new(state.as_bytes())];
    loop {
        let flags = MsgFlags::MSG_NOSIGNAL;
        match sendmsg(socket.as_raw_fd(), &text, control, flags, Some(&address)) {
            Err(Errno::EINTR) => {}
            sent => return Ok(sent.map(|_| true)?),
        }
    }
}

/// Has the manager keep copies of `fds` under `name` (at most 255 printable characters without colon).
///
/// # Errors
/// As [`notify`]; there is no manager.
pub fn store(name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    match notify(&format!("FDSTORE=1\nFDNAME={name}"), fds)? {
        true => Ok(()),
        false => Err(io::Error::from(io::ErrorKind::NotConnected)),
    }
}

/// Has the manager forget what it keeps under `name`.
///
/// # Errors
/// As [`notify`].
pub fn forget(name: &str) -> io::Result<()> {
    notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]).map(drop)
}

/// The descriptors that the manager has passed to this process, with their names; the first time that this is
/// called, and nothing after that.
pub fn passed() -> Vec<(String, OwnedFd)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Relaxed) {
        return Vec::new();
    }
    let own = |number: BorrowedFd<'_>| {
        // SAFETY: it is open, passed to this process and to nobody else in it, and taken once.
        Ok(unsafe { OwnedFd::from_raw_fd(number.as_raw_fd()) })
    };
    listed(own)
}

/// Copies of what [`passed`] gives; to be called before that.
pub fn peek() -> Vec<(String, OwnedFd)> {
    listed(|number| number.try_clone_to_owned())
}

fn listed(take: impl Fn(BorrowedFd<'_>) -> io::Result<OwnedFd>) -> Vec<(String, OwnedFd)> {
    let word = |name| std::env::var(name).unwrap_or_default();
    let count = word("LISTEN_FDS").parse::<usize>().unwrap_or(0);
    // They may be meant for a parent of this process.
    if word("LISTEN_PID").parse() != Ok(std::process::id()) {
        return Vec::new();
    }
    let names = word("LISTEN_FDNAMES");
    let mut names = names.split(':');
    let mut found = Vec::new();
    for number in FIRST..FIRST + count.min(MAX_PASSED) as RawFd {
        let name = names.next().filter(|name| !name.is_empty());
        // SAFETY: only looked at; where it is not open that is an error.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        if fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).is_ok()
            && let Ok(fd) = take(fd)
        {
            found.push((name.unwrap_or("unknown").to_owned(), fd));
        }
    }
    found
}
