//! Mounting and unmounting: mount(2) where allowed, else the set-user-id helper `fusermount3`.

use std::{
    fs::OpenOptions,
    io::{self, IoSliceMut},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags},
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg},
    unistd::{getgid, getuid},
};

use super::{
    MountError, MountErrorKind,
    table::{self, FSTYPE},
};
use crate::limits;

/// The source shown in the list of mounts.
const FSNAME: &str = "hearth";
const DEVICE: &str = "/dev/fuse";
const HELPERS: [&str; 2] = ["fusermount3", "fusermount"];

#[derive(Debug, Clone, Copy)]
pub(super) struct Options {
    pub(super) read_only: bool,
    pub(super) allow_other: bool,
}

/// Checks that there is a FUSE device and, for whoever may not mount, a helper.
pub(super) fn available() -> Result<(), MountError> {
    let device = Path::new(DEVICE);
    if !device.exists() {
        return Err(MountError::new(
            MountErrorKind::NoFuse,
            device,
            "is not there",
        ));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let helper = || {
        std::env::split_paths(&path).any(|dir| HELPERS.iter().any(|name| dir.join(name).exists()))
    };
    if !nix::unistd::geteuid().is_root() && !helper() {
        let message = "mounting as a user needs fusermount3";
        return Err(MountError::new(MountErrorKind::NoHelper, device, message));
    }
    Ok(())
}

/// Mounts on `dir` and returns the fd of the new connection. Nothing serves it yet: whoever touches
/// `dir` now waits.
pub(super) fn mount(dir: &Path, options: Options) -> Result<OwnedFd, MountError> {
    let device = match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(device) => OwnedFd::from(device),
        // ENODEV, ENXIO: a device node without a driver.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) =>
        {
            return Err(MountError::new(
                MountErrorKind::NoFuse,
                dir,
                format!("cannot mount: {DEVICE} is not there"),
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return mount_by_helper(dir, options);
        }
        Err(error) => {
            return Err(MountError::system(
                dir,
                &format!("cannot open {DEVICE}"),
                error,
            ));
        }
    };
    // MS_* as in mount(2); the rest as in Documentation/filesystems/fuse.rst.
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if options.read_only {
        flags |= MsFlags::MS_RDONLY;
    }
    let other = if options.allow_other {
        ",allow_other"
    } else {
        ""
    };
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions{other}",
        device.as_raw_fd(),
        getuid(),
        getgid()
    );
    match nix::mount::mount(Some(FSNAME), dir, Some(FSTYPE), flags, Some(data.as_str())) {
        Ok(()) => Ok(device),
        Err(Errno::EPERM | Errno::EACCES) => mount_by_helper(dir, options),
        Err(Errno::ENODEV) => Err(MountError::new(
            MountErrorKind::NoFuse,
            dir,
            "cannot mount: the kernel has no FUSE",
        )),
        Err(error) => Err(MountError::system(dir, "mount", error)),
    }
}

/// Unmounts `dir`, detaching it where `lazy`.
pub(super) fn unmount(dir: &Path, lazy: bool) -> Result<(), MountError> {
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    if lazy {
        flags |= MntFlags::MNT_DETACH;
    }
    match nix::mount::umount2(dir, flags) {
        Ok(()) => Ok(()),
        Err(Errno::EPERM) => unmount_by_helper(dir, lazy),
        Err(Errno::EBUSY) => Err(MountError::new(
            MountErrorKind::Busy,
            dir,
            "files are open below it",
        )),
        Err(Errno::EINVAL | Errno::ENOENT) => Err(MountError::new(
            MountErrorKind::NotMounted,
            dir,
            "nothing is mounted here",
        )),
        Err(error) => Err(MountError::system(dir, "umount", error)),
    }
}

/// Where a connection is ended, if that file system is mounted.
pub(super) fn control(connection: u32) -> PathBuf {
    format!("/sys/fs/fuse/connections/{connection}/abort").into()
}

/// Takes the mount of a connection that is alive away from `dir`, whatever its server does: whoever waits for an
/// answer gets ECONNABORTED, whoever asks later ENOTCONN. Fine where it is detached already.
pub(super) fn end(dir: &Path, connection: u32) -> Result<(), MountError> {
    let aborted = std::fs::write(control(connection), "1");
    let found = table::find(dir).map_err(|e| MountError::system(dir, "mountinfo", e))?;
    if !found.is_some_and(|found| found.is_hearth() && found.connection == connection) {
        return aborted.map_err(|e| MountError::system(dir, "abort", e));
    }
    if aborted.is_err() {
        // Aborts it, too; that files are open is not what was to be known.
        let _ = nix::mount::umount2(dir, MntFlags::MNT_FORCE | MntFlags::UMOUNT_NOFOLLOW);
    }
    match unmount(dir, true) {
        Err(error) if error.kind() == MountErrorKind::NotMounted => Ok(()),
        done => done,
    }
}

/// `fusermount3` mounts and sends the fd over the socket named by `_FUSE_COMMFD`.
fn mount_by_helper(dir: &Path, options: Options) -> Result<OwnedFd, MountError> {
    let (ours, theirs) = UnixStream::pair().map_err(|e| MountError::system(dir, "socket", e))?;
    let mut list = format!("fsname={FSNAME},subtype=hearth,nosuid,nodev,default_permissions");
    if options.read_only {
        list.push_str(",ro");
    }
    if options.allow_other {
        list.push_str(",allow_other");
    }
    // As its standard input, the socket needs no fd that other children could inherit.
    let theirs = OwnedFd::from(theirs);
    let child = helper(dir, |command| {
        let stdin = theirs.try_clone()?;
        command
            .args(["-o", &list, "--"])
            .arg(dir)
            .env("_FUSE_COMMFD", "0")
            .stdin(Stdio::from(stdin));
        Ok(())
    })?;
    drop(theirs);
    let received = receive_fd(&ours);
    let said = finish(dir, child)?;
    match (received, said) {
        (Ok(Some(fd)), None) => Ok(fd),
        (Ok(_), said) => {
            let said = said.unwrap_or_else(|| "sent no file descriptor".into());
            let kind = if said.contains("ermi") || said.contains("allow_other") {
                MountErrorKind::Denied
            } else {
                MountErrorKind::System
            };
            Err(MountError::new(kind, dir, format!("cannot mount: {said}")))
        }
        (Err(error), _) => Err(MountError::system(dir, "fusermount3", error)),
    }
}

fn unmount_by_helper(dir: &Path, lazy: bool) -> Result<(), MountError> {
    let child = helper(dir, |command| {
        command.arg("-u");
        if lazy {
            command.arg("-z");
        }
        command.arg("--").arg(dir).stdin(Stdio::null());
        Ok(())
    })?;
    match finish(dir, child)? {
        None => Ok(()),
        Some(said) => {
            let kind = if said.contains("busy") {
                MountErrorKind::Busy
            } else if said.contains("not found") {
                MountErrorKind::NotMounted
            } else {
                MountErrorKind::Denied
            };
            Err(MountError::new(kind, dir, said))
        }
    }
}

/// Starts the first helper there is.
fn helper(
    dir: &Path,
    arguments: impl Fn(&mut Command) -> io::Result<()>,
) -> Result<Child, MountError> {
    for name in HELPERS {
        let mut command = Command::new(name);
        arguments(&mut command).map_err(|e| MountError::system(dir, name, e))?;
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        limits::restore(&mut command);
        match command.spawn() {
            Ok(child) => return Ok(child),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(MountError::system(dir, name, error)),
        }
    }
    Err(MountError::new(
        MountErrorKind::NoHelper,
        dir,
        "only root can do this without fusermount3, which is not installed",
    ))
}

/// What the helper complained of, `None` where it succeeded.
fn finish(dir: &Path, child: Child) -> Result<Option<String>, MountError> {
    let output = child
        .wait_with_output()
        .map_err(|e| MountError::system(dir, "fusermount3", e))?;
    if output.status.success() {
        return Ok(None);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Ok(Some(said.trim().lines().collect::<Vec<_>>().join("; ")))
}

/// The fd sent over `socket`; `None` where it was closed without one.
fn receive_fd(socket: &UnixStream) -> nix::Result<Option<OwnedFd>> {
    let mut byte = [0u8];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(libc::c_int);
    let message = loop {
        match recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(&fd) = fds.first()
        {
            // SAFETY: the kernel has just made this fd for us, and nobody else knows of it.
            return Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(None)
}
