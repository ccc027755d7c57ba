//! Locks between processes. All vanish with the process that holds them.
//!
//! A [`Span`] is an open-file-description lock (`F_OFD_SETLK`, fcntl(2)): it belongs to one open
//! file, so two opens exclude each other even inside one process, and two users of the same open
//! file do not. A file lock (`flock`) covers a whole file in the same manner.

use std::{fs::File, io, ops::Range};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
};

/// How a span is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    /// By any number of files.
    Shared,
    /// By one file.
    Exclusive,
}

fn request(kind: libc::c_int, span: &Range<u64>) -> io::Result<libc::flock> {
    let offset = |at: u64| libc::off_t::try_from(at).map_err(|_| Errno::EOVERFLOW);
    // SAFETY: `flock` is plain integers, for which zero is valid (`l_pid` must be zero).
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = offset(span.start)?;
    lock.l_len = offset(span.end - span.start)?;
    Ok(lock)
}

const fn kind(how: Span) -> libc::c_int {
    match how {
        Span::Shared => libc::F_RDLCK,
        Span::Exclusive => libc::F_WRLCK,
    }
}

/// Locks the bytes `span` (never empty); false where another file holds any of them and `wait` is
/// false. Replaces a lock that `file` has there.
pub fn lock_span(file: &File, span: &Range<u64>, how: Span, wait: bool) -> io::Result<bool> {
    let lock = request(kind(how), span)?;
    loop {
        let done = if wait {
            fcntl(file, FcntlArg::F_OFD_SETLKW(&lock))
        } else {
            fcntl(file, FcntlArg::F_OFD_SETLK(&lock))
        };
        match done {
            Ok(_) => return Ok(true),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Gives the bytes `span` (never empty) back.
pub fn unlock_span(file: &File, span: &Range<u64>) -> io::Result<()> {
    let lock = request(libc::F_UNLCK, span)?;
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock))?;
    Ok(())
}

/// A part of `span` that another file has locked, if any.
pub fn conflict(file: &File, span: &Range<u64>) -> io::Result<Option<Range<u64>>> {
    let mut lock = request(libc::F_WRLCK, span)?;
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    if libc::c_int::from(lock.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    let start = lock.l_start as u64;
    let end = match lock.l_len {
        0 => u64::MAX,
        len => start.saturating_add(len as u64),
    };
    Ok(Some(start.max(span.start)..end.min(span.end)))
}

/// Locks the whole file (`flock`); false where another file holds it and `wait` is false.
pub fn lock_file(file: &File, how: Span, wait: bool) -> io::Result<bool> {
    use std::fs::TryLockError;
    loop {
        let done = match (how, wait) {
            (Span::Shared, true) => file.lock_shared().map_err(TryLockError::Error),
            (Span::Exclusive, true) => file.lock().map_err(TryLockError::Error),
            (Span::Shared, false) => file.try_lock_shared(),
            (Span::Exclusive, false) => file.try_lock(),
        };
        match done {
            Ok(()) => return Ok(true),
            Err(TryLockError::WouldBlock) => return Ok(false),
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(TryLockError::Error(e)) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_exclude_other_opens_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let open = || {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            options.open(&path).unwrap()
        };
        let (a, b) = (open(), open());
        assert!(lock_span(&a, &(2..5), Span::Exclusive, false).unwrap());
        assert!(lock_span(&a, &(2..5), Span::Exclusive, false).unwrap());
        assert!(!lock_span(&b, &(4..9), Span::Exclusive, false).unwrap());
        assert_eq!(conflict(&b, &(0..9)).unwrap(), Some(2..5));
        unlock_span(&a, &(2..3)).unwrap();
        assert_eq!(conflict(&b, &(0..9)).unwrap(), Some(3..5));
        drop(a);
        assert_eq!(conflict(&b, &(0..9)).unwrap(), None);
        assert!(lock_span(&b, &(4..9), Span::Exclusive, false).unwrap());
    }
}
