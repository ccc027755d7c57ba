//! Answers for a mount whose server does not come back: everything with ETIMEDOUT.
//!
//! What the kernel reads by itself goes on. On a clone of the connection, so that the fd which servers
//! read from stays one that blocks; the mount can be taken over at any time, as if nothing had been.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::fs::OpenOptionsExt as _,
    },
};

use nix::{errno::Errno, unistd::read};

use super::super::{
    session::{Agreed, IN_HEADER, Session, ask_again, tell},
    state::{Kind, State},
};

/// Room for the largest request; the kernel wants it even where nothing of the kind can come.
const BUFFER: usize = (1 << 20) + 4096;
/// Answered in one go, so that others are not forgotten.
const AT_ONCE: usize = 256;

// Numbers of `enum fuse_opcode`.
const FORGET: u32 = 2;
const RELEASE: u32 = 18;
const RELEASEDIR: u32 = 29;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;

nix::ioctl_read!(clone_connection, 229, 0, u32);

/// Says no to everybody who waits.
#[derive(Debug)]
pub(super) struct Refuser {
    device: File,
    buffer: Vec<u8>,
}

impl Refuser {
    /// Begins with what the last server had in its hands.
    pub(super) fn new(session: &Session) -> io::Result<Self> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/fuse")?;
        let mut source = session.device.as_fd().as_raw_fd() as u32;
        // SAFETY: FUSE_DEV_IOC_CLONE reads one u32, the fd to clone, which lives until it returns.
        unsafe { clone_connection(device.as_raw_fd(), &raw mut source) }?;
        let agreed = Agreed::of(&session.state.answer()?);
        ask_again(session.device.as_fd(), &session.state, agreed)?;
        let buffer = vec![0; BUFFER];
        Ok(Self { device, buffer })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Answers what is there; whether there may be more.
    pub(super) fn refuse(&mut self, state: &State) -> io::Result<bool> {
        for _ in 0..AT_ONCE {
            let length = match read(&self.device, &mut self.buffer) {
                Ok(length) => length,
                Err(Errno::EAGAIN) => return Ok(false),
                // It was taken back before it could be read.
                Err(Errno::EINTR | Errno::ENOENT) => continue,
                Err(error) => return Err(error.into()),
            };
            let Some((header, body)) = self.buffer[..length].split_at_checked(IN_HEADER) else {
                continue;
            };
            let opcode = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
            let request = long(&header[8..]);
            let error = match opcode {
                FORGET | BATCH_FORGET | INTERRUPT => continue,
                RELEASE => {
                    release(state, long(body));
                    0
                }
                RELEASEDIR | DESTROY => 0,
                _ => -libc::ETIMEDOUT,
            };
            match tell(self.device.as_fd(), error, request) {
                Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return Err(error),
                _ => {}
            }
        }
        Ok(true)
    }
}

/// A file is closed that the last server knew. The next server closes its backing id.
fn release(state: &State, handle: u64) {
    let found = state.entries().into_iter().find(|(_, entry)| {
        entry.handle == handle && matches!(entry.kind, Kind::Cached | Kind::Passthrough(_))
    });
    if let Some((slot, entry)) = found {
        let shared = state.entries().into_iter().any(|(_, other)| {
            other.handle != handle && other.kind == entry.kind && other.ino == entry.ino
        });
        match entry.kind {
            Kind::Passthrough(_) if !shared => state.closing(&slot),
            _ => state.remove(slot),
        }
    }
}

fn long(bytes: &[u8]) -> u64 {
    let bytes = bytes.first_chunk().copied().unwrap_or_default();
    u64::from_ne_bytes(bytes)
}
