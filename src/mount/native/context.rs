//! The system calls that mount in steps: fsopen(2), fsconfig(2), fsmount(2), move_mount(2).

use std::{
    ffi::{CStr, CString},
    fs::File,
    io::{self, Read as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr::null,
};

/// A file system that is being configured.
pub(super) struct Context(File);

/// A file system that is mounted nowhere; dropped = gone, unless it was attached.
pub(super) struct Detached(OwnedFd);

impl Context {
    /// Begins with a type of file system; the kernel loads its module where it can.
    pub(super) fn new(fstype: &CStr) -> io::Result<Self> {
        // SAFETY: takes a string that ends in NUL and a flag; gives an fd that nobody else has.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, fstype.as_ptr(), libc::FSOPEN_CLOEXEC) };
        Ok(Self(File::from(owned(fd)?)))
    }

    /// Sets an option; `value` has at most 255 bytes.
    pub(super) fn set(&self, key: &CStr, value: &str) -> io::Result<()> {
        let value = CString::new(value)?;
        self.config(libc::FSCONFIG_SET_STRING, Some(key), Some(&value))
    }

    /// Sets a flag.
    pub(super) fn flag(&self, key: &CStr) -> io::Result<()> {
        self.config(libc::FSCONFIG_SET_FLAG, Some(key), None)
    }

    /// Makes the file system, read-only.
    pub(super) fn create(&self) -> io::Result<Detached> {
        self.flag(c"ro")?;
        self.config(libc::FSCONFIG_CMD_CREATE, None, None)?;
        let fd = self.0.as_raw_fd();
        // A container's overlay has flags of its own: this is for whoever comes by here.
        let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
        let flags = libc::FSMOUNT_CLOEXEC;
        // SAFETY: takes numbers only; gives an fd that nobody else has.
        let fd = unsafe { libc::syscall(libc::SYS_fsmount, fd, flags, attributes) };
        owned(fd).map(Detached)
    }

    fn config(
        &self,
        command: libc::fsconfig_command,
        key: Option<&CStr>,
        value: Option<&CStr>,
    ) -> io::Result<()> {
        let pointer = |text: Option<&CStr>| text.map_or(null(), CStr::as_ptr);
        // SAFETY: the strings end in NUL and live until the call is over; it keeps copies.
        let done = unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                command,
                pointer(key),
                pointer(value),
                0,
            )
        };
        match done {
            0 => Ok(()),
            _ => Err(self.explain(io::Error::last_os_error())),
        }
    }

    /// The error, with what the kernel has to say of it: each read is one message, after `e `, `w `
    /// or `i `.
    fn explain(&self, error: io::Error) -> io::Error {
        let mut said = String::new();
        let mut buf = [0; 1024];
        while let Ok(len @ 1..) = (&self.0).read(&mut buf) {
            let line = String::from_utf8_lossy(&buf[..len]);
            if let Some(text) = line.strip_prefix("e ") {
                said.push_str(": ");
                said.push_str(text.trim_end());
            }
        }
        match said.is_empty() {
            true => error,
            false => io::Error::new(error.kind(), format!("{error}{said}")),
        }
    }
}

impl Detached {
    /// Mounts it on a directory.
    pub(super) fn attach(self, dir: &Path) -> io::Result<()> {
        let dir = CString::new(dir.as_os_str().as_bytes())?;
        // SAFETY: the strings end in NUL and live until the call is over.
        let done = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                dir.as_ptr(),
                libc::MOVE_MOUNT_F_EMPTY_PATH,
            )
        };
        match done {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this fd for us, and nobody else knows of it.
        Ok(fd @ 0..) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
