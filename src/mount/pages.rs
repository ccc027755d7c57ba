//! Has the kernel drop pages that turned out wrong (FUSE_NOTIFY_INVAL_INODE).
//!
//! To drop pages the kernel waits for those that are being read, so for answers of a server, and who
//! waits so cannot be killed. Were it the server, or a child of it, it would be neither dead nor alive when it is
//! killed, and would keep its PID namespace, so its container, from ending: no successor would start,
//! whose answers it waits for. So a child of the keeper does the waiting; where there is none, or one that
//! is older than this, a child of the server.
//!
//! Who waits so has the connection open. Where no successor can come, that would keep it from ending, and readers
//! waiting for ever: so a second child, which can be killed, watches over the first, and aborts the
//! connection once nobody has the mount any more.

use std::{
    ffi::CString,
    fs::{File, OpenOptions},
    io,
    ops::RangeInclusive,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    sync::OnceLock,
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::wait::waitpid,
    unistd::{ForkResult, Pid, fork, pipe2},
};

use super::{
    MountErrorKind, device,
    keeper::Link,
    session::{Device, Id, OUT_HEADER, read_on},
};

const NOTIFY_INVAL_INODE: i32 = 2;
const MESSAGE: usize = OUT_HEADER + 24;
/// How long to wait where the keeper has too much of it in hand.
const PAUSE: Duration = Duration::from_millis(50);

/// The mount of which pages are to be dropped.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) device: &'a Device,
    pub(super) id: Id,
    pub(super) dir: &'a Path,
    pub(super) keeper: Option<&'a Link>,
}

/// Has the kernel drop its pages of `inodes`; waits for those that are being read. False where that is not for
/// this process any more.
pub(super) fn drop_pages(place: Place<'_>, inodes: RangeInclusive<u64>) -> io::Result<bool> {
    let Some(keeper) = place.keeper else {
        return drop_here(place, inodes, life());
    };
    let (said, report) = pipe2(OFlag::O_CLOEXEC)?;
    let at = (place.dir, place.id);
    loop {
        match keeper.drop_pages(at, inodes.clone(), report.as_fd()) {
            Ok(true) => break,
            Ok(false) => return drop_here(place, inodes, keeper.life()),
            Err(_) if place.device.has_left() => return Ok(false),
            Err(error) if error.kind() == MountErrorKind::Busy => thread::sleep(PAUSE),
            Err(error) if error.kind() == MountErrorKind::System => {
                tracing::debug!(%error, "the keeper does not drop pages");
                // If it lives, and only this process is lost to it, another one may serve the mount.
                return drop_here(place, inodes, None);
            }
            // Another has it by now, or it is gone.
            Err(_) => return Ok(false),
        }
    }
    drop(report);
    outcome(&said)
}

/// As [`drop_pages`], by a child of this process. Once `life` ends, nobody has the mount any more.
fn drop_here(
    place: Place<'_>,
    inodes: RangeInclusive<u64>,
    life: Option<BorrowedFd<'_>>,
) -> io::Result<bool> {
    let (said, report) = pipe2(OFlag::O_CLOEXEC)?;
    let child = match life {
        Some(life) => watched(place, inodes, report.as_fd(), life),
        None => start(place.device.as_fd(), inodes, report.as_fd()),
    }?;
    drop(report);
    let done = outcome(&said);
    while waitpid(child, None) == Err(Errno::EINTR) {}
    done
}

/// What the child of [`start`] says at its end.
fn outcome(said: &OwnedFd) -> io::Result<bool> {
    let mut errno = [0];
    match read_on(said.as_fd(), &mut errno)? {
        0 => Err(io::Error::other("nobody says whether it was done")),
        _ if errno[0] == 0 => Ok(true),
        _ => Err(io::Error::from_raw_os_error(errno[0].into())),
    }
}

/// A pipe that ends with this process, and says nothing before.
fn life() -> Option<BorrowedFd<'static>> {
    static LIFE: OnceLock<Option<(OwnedFd, OwnedFd)>> = OnceLock::new();
    let pipe = LIFE.get_or_init(|| pipe2(OFlag::O_CLOEXEC).ok());
    pipe.as_ref().map(|(end, _)| end.as_fd())
}

/// Starts a child that has the kernel drop its pages of `inodes`, and then writes one byte to `report`: 0, or
/// the errno of the last that failed. The caller waits for its end.
pub(super) fn start(
    device: BorrowedFd<'_>,
    inodes: RangeInclusive<u64>,
    report: BorrowedFd<'_>,
) -> io::Result<Pid> {
    let fds = [device, report].map(|fd| fd.as_raw_fd());
    // SAFETY: the child makes system calls only, on numbers and on memory that are its own. It keeps no fd but
    // these two: no lock, and no connection to the keeper.
    match unsafe { fork() }? {
        // SAFETY: as above.
        ForkResult::Child => unsafe {
            keep_only(&fds);
            ask(inodes)
        },
        ForkResult::Parent { child } => Ok(child),
    }
}

/// As [`start`]; the child starts another one for it, and aborts the connection once `life` ends before that.
fn watched(
    place: Place<'_>,
    inodes: RangeInclusive<u64>,
    report: BorrowedFd<'_>,
    life: BorrowedFd<'_>,
) -> io::Result<Pid> {
    let dir = CString::new(place.dir.as_os_str().as_bytes())?;
    // Where that is not there, to unmount it by force does the same; for root.
    let control = OpenOptions::new()
        .write(true)
        .open(device::control(place.id.connection))
        .ok();
    let mut fds = vec![place.device.as_fd().as_raw_fd(), report.as_raw_fd()];
    fds.push(life.as_raw_fd());
    fds.extend(control.as_ref().map(File::as_raw_fd));
    // SAFETY: as in `start`, for both children.
    match unsafe { fork() }? {
        // SAFETY: as above. The second child is made by the system call itself, since what the library does for it
        // besides is not for a process whose other threads are gone.
        ForkResult::Child => unsafe {
            keep_only(&fds);
            let child = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0);
            if child == 0 {
                libc::close(2);
                libc::close(3);
                ask(inodes)
            }
            libc::close(0);
            libc::close(1);
            let ended = libc::syscall(libc::SYS_pidfd_open, child, 0) as RawFd;
            let mut ends = [2, ended].map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            });
            while ended >= 0 && libc::poll(ends.as_mut_ptr(), 2, -1) < 0 {}
            if ends[0].revents != 0 && libc::write(3, c"1".as_ptr().cast(), 1) < 0 {
                libc::umount2(dir.as_ptr(), libc::MNT_FORCE | libc::UMOUNT_NOFOLLOW);
            }
            libc::waitpid(child as libc::pid_t, std::ptr::null_mut(), 0);
            libc::_exit(0)
        },
        ForkResult::Parent { child } => Ok(child),
    }
}

/// Gives `fds`, of which there are at most four, the numbers from 0 on, and closes all others.
///
/// # Safety
/// For a process that was just forked, and whose other fds nobody uses.
unsafe fn keep_only(fds: &[RawFd]) {
    let mut moved = [-1; 4];
    // SAFETY: these system calls know numbers only.
    unsafe {
        for (new, old) in moved.iter_mut().zip(fds) {
            // Out of the way of the others.
            *new = libc::fcntl(*old, libc::F_DUPFD, 16);
        }
        let mut next = 0;
        for old in &moved[..fds.len().min(4)] {
            libc::dup2(*old, next);
            next += 1;
        }
        if libc::syscall(libc::SYS_close_range, next, libc::c_uint::MAX, 0) != 0 {
            for fd in next..65536 {
                libc::close(fd);
            }
        }
    }
}

/// Asks the connection 0 to drop the pages of `inodes`, writes to 1 what came of it, and ends.
///
/// # Safety
/// As [`keep_only`].
unsafe fn ask(inodes: RangeInclusive<u64>) -> ! {
    // fuse_out_header, fuse_notify_inval_inode_out: from 0, and no length, to the end.
    let mut message = [0u8; MESSAGE];
    message[..4].copy_from_slice(&(MESSAGE as u32).to_ne_bytes());
    message[4..8].copy_from_slice(&NOTIFY_INVAL_INODE.to_ne_bytes());
    let mut failed = 0u8;
    // SAFETY: what is pointed to lives on this stack.
    unsafe {
        for ino in inodes {
            message[16..24].copy_from_slice(&ino.to_ne_bytes());
            let written = libc::write(0, message.as_ptr().cast(), MESSAGE);
            // The kernel need not know every inode.
            if written < 0 && *libc::__errno_location() != libc::ENOENT {
                failed = *libc::__errno_location() as u8;
            }
        }
        libc::write(1, (&raw const failed).cast(), 1);
        libc::_exit(0)
    }
}
