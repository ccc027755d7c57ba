//! The one table from errors to errno.

use fuser::Errno;

use crate::{fetch::FetchErrorKind, fs::FsError};

/// What the kernel is told.
pub(super) fn errno(error: &FsError) -> Errno {
    match error {
        FsError::NotFound => Errno::ENOENT,
        FsError::NotDir => Errno::ENOTDIR,
        FsError::IsDir => Errno::EISDIR,
        FsError::ReadOnly => Errno::EROFS,
        FsError::Exists => Errno::EEXIST,
        FsError::NotEmpty => Errno::ENOTEMPTY,
        FsError::Full => Errno::ENOSPC,
        FsError::TooLong => Errno::ENAMETOOLONG,
        FsError::NoAttribute => Errno::ENODATA,
        FsError::Invalid => Errno::EINVAL,
        FsError::NotPermitted => Errno::EPERM,
        FsError::Stale => Errno::ESTALE,
        FsError::Damaged(_) => Errno::EIO,
        FsError::Content { kind, .. } => match kind {
            // The origin has another generation now: what NFS says of a handle to what is gone.
            FetchErrorKind::Changed => Errno::ESTALE,
            FetchErrorKind::Denied => Errno::EACCES,
            // The name is there, its bytes are not: ENOENT would tell programs it was optional.
            FetchErrorKind::NotFound
            | FetchErrorKind::Corrupt
            | FetchErrorKind::Unavailable
            | FetchErrorKind::Disk
            | FetchErrorKind::Cancelled
            // A reader has no use for ENOSPC: it writes nothing.
            | FetchErrorKind::NoSpace => Errno::EIO,
        },
    }
}
