//! How a server lets a session go on purpose, for a successor or because it was told to end: it takes no
//! more requests, answers what it has, and leaves the connection as it is.
//!
//! fuser has no such thing, but reads and writes one fd number, which is given another meaning: one end of
//! a socket pair. From the other end its threads get a DESTROY each, on which they end; answers that are
//! still to come are passed on to the kernel. When all who could answer have let go of the fd,
//! the pair says so: nothing is in hand any more. A long answer may not fit into the pair (unix(7), EMSGSIZE): whoever
//! may not raise its bound loses that, so what is in hand stays noted for the next server. A thread that waits in a read of the connection is woken
//! by a signal, and its read begins anew, at the socket.

use std::{
    fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd, RawFd},
    sync::{Arc, atomic::Ordering::Relaxed, mpsc},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
        socket::{
            AddressFamily, Shutdown, SockFlag, SockType, setsockopt, shutdown, socketpair, sockopt,
        },
    },
    unistd::write,
};
use tokio::sync::watch;

use super::{
    server::Server,
    session::{Device, IN_HEADER, read_on, replace},
};

/// How long what is in hand may take to be answered, where it would be lost else.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same where the kernel sends it again to the next server: others wait meanwhile.
const SHORT_PATIENCE: Duration = Duration::from_millis(20);
/// Ignored by default, and of no other use here (signal(7)).
const WAKE: Signal = Signal::SIGURG;
const DESTROY: u32 = 38;
/// Marks our own requests: the kernel's numbers are far below.
const OURS: u64 = 1 << 62;
/// Room for the longest answer.
const BUFFER: usize = (1 << 20) + 65536;

/// Whether what is in hand is waited for where it would be lost else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Haste {
    None,
    /// Nobody works on it any more.
    Great,
}

/// Ends the `threads` threads that read number `channel`, and waits until all that they took is answered, or
/// for long enough. What is answered after that is lost; where it can, the kernel sends it again to the next server.
pub(super) fn retire(
    server: &Server,
    device: &Arc<Device>,
    (channel, threads): (RawFd, usize),
    ended: &watch::Receiver<bool>,
    haste: Haste,
) -> io::Result<()> {
    // As long as this is held, the number means what it meant when the session began.
    let Some(notifier) = server.notifier.lock().take() else {
        return Ok(());
    };
    let (theirs, ours) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    make_room(&theirs);
    listen_to_wake()?;
    for thread in 0..threads as u64 {
        write(&ours, &destroy(OURS | thread))?;
    }
    let ours = Arc::new(ours);
    let (relay, kernel) = (ours.clone(), device.clone());
    let (done, answered) = mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name("hearth-retire".into())
        .spawn(move || {
            pass_on(&relay, &kernel);
            done.send(())
        })?;
    // Whether an answer arrives is not known from here on.
    server.state.keep_working();
    // SAFETY: the number is open, see above.
    let channel = unsafe { BorrowedFd::borrow_raw(channel) };
    replace(channel, theirs.as_fd())?;
    drop((theirs, notifier));
    let begun = Instant::now();
    while !*ended.borrow() && begun.elapsed() < PATIENCE {
        wake_readers();
        std::thread::sleep(Duration::from_millis(2));
    }
    let patience = match server.resend.load(Relaxed) || haste == Haste::Great {
        true => SHORT_PATIENCE,
        false => PATIENCE.saturating_sub(begun.elapsed()),
    };
    let all = answered.recv_timeout(patience).is_ok();
    // What the kernel reads by itself stays open for the next server.
    device.leave();
    // From here on nothing that this process answers reaches the kernel, and after that nothing that it notes the
    // next server; what it notes in between is of requests that are sent again.
    let _ = shutdown(std::os::fd::AsRawFd::as_raw_fd(&*ours), Shutdown::Both);
    if !all {
        tracing::debug!("requests that wait for content are left to the next server");
        let _ = answered.recv_timeout(PATIENCE);
    }
    server.state.freeze();
    Ok(())
}

/// Has the longest answer fit into a packet, as far as this process may say so.
fn make_room(socket: &OwnedFd) {
    // What a packet needs beside its bytes is counted, too.
    let room = 2 * BUFFER;
    let made = setsockopt(socket, sockopt::SndBufForce, &room)
        .or_else(|_| setsockopt(socket, sockopt::SndBuf, &room));
    if let Err(error) = made {
        tracing::debug!(%error, "long answers are lost");
    }
}

/// Passes answers on to the kernel until there can be no more.
fn pass_on(socket: &OwnedFd, device: &Device) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let answer = match read_on(socket.as_fd(), &mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(length) => &buffer[..length],
        };
        let number = answer.get(8..16).and_then(|bytes| bytes.first_chunk());
        if number.is_some_and(|number| u64::from_ne_bytes(*number) & OURS != 0) {
            continue;
        }
        match write(device, answer) {
            // Nobody waits for it any more.
            Ok(_) | Err(Errno::ENOENT) => {}
            Err(error) => tracing::debug!(%error, "an answer was not taken"),
        }
    }
}

/// A request that ends a thread of fuser (`fuse_in_header`).
fn destroy(number: u64) -> [u8; IN_HEADER] {
    let mut request = [0; IN_HEADER];
    request[..4].copy_from_slice(&(IN_HEADER as u32).to_ne_bytes());
    request[4..8].copy_from_slice(&DESTROY.to_ne_bytes());
    request[8..16].copy_from_slice(&number.to_ne_bytes());
    request
}

/// Has [`WAKE`] interrupt what waits, and do nothing else.
fn listen_to_wake() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    // SAFETY: the handler does nothing, which is safe in any context.
    unsafe { sigaction(WAKE, &action) }?;
    Ok(())
}

/// Interrupts the threads of fuser; those of other sessions read on.
fn wake_readers() {
    for task in fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        let thread = task.file_name().to_str().and_then(|id| id.parse().ok());
        if let Some(thread) = thread.filter(|_| name.starts_with("fuser-")) {
            let thread: libc::pid_t = thread;
            // SAFETY: three integers; a thread that is gone is no more than an error.
            unsafe {
                libc::syscall(
                    libc::SYS_tgkill,
                    libc::getpid(),
                    thread,
                    WAKE as libc::c_int,
                )
            };
        }
    }
}
