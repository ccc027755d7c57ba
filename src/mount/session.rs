//! A FUSE connection and how a server takes it over: greeting, replay, asking again.
//!
//! Whoever mounts reads the kernel's INIT and keeps it in the [`State`]. Every server, the first one
//! too, then has its handshake on a socket pair that holds a copy; only the first answer ever goes to the
//! kernel, and a successor must come to the same one. After that the socket is replaced by the real
//! fd under the same number (`dup3`), and the kernel is asked to send again what the dead
//! server had read and not answered (FUSE_NOTIFY_RESEND, Linux 6.9). Older kernels cannot; there a
//! server notes what it has in its hands, and its successor answers that with EIO.
//!
//! Bytes as in the kernel's `include/uapi/linux/fuse.h`.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use fuser::BackingId;
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, socketpair},
    unistd::{read, write},
};

use super::{
    MountError, MountErrorKind, device,
    state::{Kind, State},
    table,
};

/// Of `fuse_in_header` and `fuse_out_header`.
pub(super) const IN_HEADER: usize = 40;
pub(super) const OUT_HEADER: usize = 16;
const INIT: u32 = 26;
/// `fuse_init_in` and `fuse_init_out` have their flags in two halves.
const ASKED_FLAGS: [usize; 2] = [IN_HEADER + 12, IN_HEADER + 16];
const ANSWERED_FLAGS: [usize; 2] = [OUT_HEADER + 12, OUT_HEADER + 32];
const INIT_EXT: u64 = 1 << 30;
const PASSTHROUGH: u64 = 1 << 37;
const HAS_RESEND: u64 = 1 << 39;
/// `FUSE_NOTIFY_RESEND`: the notification is its number where an error would stand.
const NOTIFY_RESEND: i32 = 7;
/// Set in the number of a request that the kernel sends again.
pub(super) const RESENT: u64 = 1 << 63;

nix::ioctl_write_ptr!(backing_close, 229, 2, u32);

/// A connection to the kernel.
#[derive(Debug)]
pub(super) struct Device {
    fd: OwnedFd,
    /// What is open belongs to the next server.
    left: AtomicBool,
}

/// A file that the kernel reads by itself, by its backing id; closed when dropped, unless the device
/// has been let go before.
#[derive(Debug)]
pub(super) struct Backing {
    id: u32,
    device: Weak<Device>,
}

/// Which session: numbers of connections are given again at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Id {
    pub(super) connection: u32,
    /// The number of the [`State`], the same in all processes.
    pub(super) memory: u64,
}

impl Id {
    pub(super) fn new(connection: u32, state: &State) -> Self {
        let memory = state.number();
        Self { connection, memory }
    }
}

/// A mounted connection with its memory: all that a server needs.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) dir: PathBuf,
    /// `/sys/fs/fuse/connections/<n>`
    pub(super) connection: u32,
    pub(super) device: Arc<Device>,
    pub(super) state: Arc<State>,
}

impl Device {
    pub(super) fn new(fd: OwnedFd) -> Self {
        let left = AtomicBool::new(false);
        Self { fd, left }
    }

    pub(super) fn fd(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// From here on this process closes nothing that it had the kernel open: to the next server that
    /// would be an id that is not there, and each open of the file an error.
    pub(super) fn leave(&self) {
        self.left.store(true, Ordering::SeqCst);
    }

    /// Whether this process has let it go.
    pub(super) fn has_left(&self) -> bool {
        self.left.load(Ordering::SeqCst)
    }

    pub(super) fn open_backing(self: &Arc<Self>, file: &std::fs::File) -> io::Result<Backing> {
        let id = BackingId::create_raw(self, file)?;
        Ok(self.backing(id))
    }

    /// What was opened by a server before.
    pub(super) fn backing(self: &Arc<Self>, id: u32) -> Backing {
        let device = Arc::downgrade(self);
        Backing { id, device }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl super::opens::Registered for Backing {
    fn id(&self) -> u32 {
        self.id
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        let Some(device) = self.device.upgrade() else {
            return;
        };
        if device.has_left() {
            return;
        }
        // SAFETY: FUSE_DEV_IOC_BACKING_CLOSE reads one u32, which lives until it returns.
        let closed = unsafe { backing_close(device.fd.as_raw_fd(), &raw const self.id) };
        if let Err(error) = closed {
            tracing::debug!(%error, id = self.id, "a backing file could not be closed");
        }
    }
}

impl Session {
    /// Mounts on `dir`, which must have been checked. Nothing serves it yet.
    pub(super) fn mount(
        dir: &Path,
        options: device::Options,
        about: &[u8],
    ) -> Result<Self, MountError> {
        let fd = device::mount(dir, options)?;
        let mounted = || -> Result<Self, MountError> {
            let found = table::find(dir).map_err(|e| MountError::system(dir, "mountinfo", e))?;
            let connection = found
                .ok_or_else(|| MountError::new(MountErrorKind::System, dir, "is not in mountinfo"))?
                .connection;
            let failed = |e| MountError::system(dir, "FUSE handshake", e);
            let init = read_init(&fd).map_err(failed)?;
            let state = State::create(&init, about, dir).map_err(failed)?;
            Ok(Self {
                dir: dir.to_owned(),
                connection,
                device: Arc::new(Device::new(fd)),
                state: Arc::new(state),
            })
        };
        mounted().inspect_err(|_| {
            if let Err(error) = device::unmount(dir, true) {
                tracing::warn!(%error, "could not unmount");
            }
        })
    }

    pub(super) fn id(&self) -> Id {
        Id::new(self.connection, &self.state)
    }

    /// Whether a server has greeted the kernel before.
    pub(super) fn resumed(&self) -> io::Result<bool> {
        Ok(!self.state.answer()?.is_empty())
    }
}

/// What was agreed with the kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Agreed {
    pub(super) passthrough: bool,
    pub(super) resend: bool,
}

impl Agreed {
    /// From an answer to INIT; nothing, where there was none yet.
    pub(super) fn of(answer: &[u8]) -> Self {
        let flags = flags(answer, ANSWERED_FLAGS);
        Self {
            passthrough: flags & PASSTHROUGH != 0,
            resend: flags & HAS_RESEND != 0,
        }
    }
}

/// Has the handshake of `serve`, which makes a FUSE session on the socket it is given, and says what was
/// answered. Nothing reaches the kernel.
pub(super) fn greet<T: AsFd>(
    state: &State,
    serve: impl FnOnce(OwnedFd) -> io::Result<T>,
) -> io::Result<(T, Vec<u8>)> {
    let (theirs, ours) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    let answered = state.answer()?;
    let mut init = state.init()?;
    if !answered.is_empty() {
        // Offered what was agreed on and no more, it answers the same if it still can.
        let agreed = flags(&answered, ANSWERED_FLAGS) | INIT_EXT;
        let offered = flags(&init, ASKED_FLAGS) & agreed;
        for (half, at) in ASKED_FLAGS.into_iter().enumerate() {
            let word = (offered >> (32 * half)) as u32;
            if let Some(place) = init.get_mut(at..at + 4) {
                place.copy_from_slice(&word.to_ne_bytes());
            }
        }
    }
    write(&ours, &init)?;
    let session = serve(theirs)?;
    let mut answer = vec![0; 256];
    let length = read_on(ours.as_fd(), &mut answer)?;
    answer.truncate(length);
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    if length < OUT_HEADER + 24 || answer[4..8] != [0; 4] {
        return Err(invalid("the kernel's FUSE is not understood"));
    }
    if answered.is_empty() {
        return Ok((session, answer));
    }
    if flags(&answer, ANSWERED_FLAGS) != flags(&answered, ANSWERED_FLAGS) {
        return Err(invalid(
            "the mount was agreed on with the kernel in a way that this version does not know",
        ));
    }
    Ok((session, answered))
}

/// Puts the connection in place of the socket on which `session` had its handshake, and has the kernel
/// begin, or go on.
pub(super) fn connect<T: AsFd>(
    session: &T,
    device: &Device,
    state: &State,
    answer: &[u8],
    resumed: bool,
) -> io::Result<()> {
    if !resumed {
        state.set_answer(answer)?;
    }
    // A predecessor may have been killed before this; to an answer it has, the kernel says ENOENT.
    match write(device, answer) {
        Ok(_) | Err(Errno::ENOENT) => {}
        Err(error) => return Err(error.into()),
    }
    replace(session.as_fd(), device.as_fd())?;
    if !resumed {
        return Ok(());
    }
    ask_again(device.as_fd(), state, Agreed::of(answer))
}

/// Has the kernel send again what the last server read and did not answer; where it cannot, answers that
/// with an error.
pub(super) fn ask_again(device: BorrowedFd<'_>, state: &State, agreed: Agreed) -> io::Result<()> {
    for (slot, entry) in state.entries() {
        if entry.kind == Kind::Working {
            // One that was answered after all is unknown, which does no harm.
            let _ = tell(device, -libc::EIO, entry.handle);
            state.remove(slot);
        }
    }
    match agreed.resend {
        true => tell(device, NOTIFY_RESEND, 0),
        false => Ok(()),
    }
}

/// Has the number of `old` mean what `new` is.
pub(super) fn replace(old: BorrowedFd<'_>, new: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both are open; the number goes on being owned by whoever owns `old`.
    let done = unsafe { libc::dup3(new.as_raw_fd(), old.as_raw_fd(), libc::O_CLOEXEC) };
    Errno::result(done)?;
    Ok(())
}

/// Writes a header without a body: an answer that is an error, or a notification.
pub(super) fn tell(device: BorrowedFd<'_>, error: i32, request: u64) -> io::Result<()> {
    let mut header = [0; OUT_HEADER];
    header[..4].copy_from_slice(&(OUT_HEADER as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&request.to_ne_bytes());
    write(device, &header)?;
    Ok(())
}

/// Reads into `buffer`, whatever interrupts.
pub(super) fn read_on(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match read(fd, buffer) {
            Err(Errno::EINTR) => {}
            done => return Ok(done?),
        }
    }
}

/// The request with which the kernel begins; it is there as soon as it is mounted.
fn read_init(fd: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut init = vec![0; 64 << 10];
    let length = read_on(fd.as_fd(), &mut init)?;
    init.truncate(length);
    let opcode = init
        .get(4..8)
        .map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    if opcode != Some(INIT) || length < IN_HEADER + 16 {
        let message = "the kernel did not begin with INIT";
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(init)
}

/// Two halves of flags; what is not there is zero.
fn flags(message: &[u8], at: [usize; 2]) -> u64 {
    let half = |at: usize| match message.get(at..at + 4) {
        Some(b) => u64::from(u32::from_ne_bytes([b[0], b[1], b[2], b[3]])),
        None => 0,
    };
    half(at[0]) | half(at[1]) << 32
}
