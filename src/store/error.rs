//! Why the store could not do something.

use crate::disk::DiskError;

/// What a store error means for whoever asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoreErrorKind {
    /// The disk, the quota or the configured limit is full.
    NoSpace,
    /// The store or its file system cannot be written.
    ReadOnly,
    /// A newer version of this program wrote the store.
    NewerFormat,
    /// The disk failed.
    Io,
    /// Content is not what its name promises.
    Damaged,
    /// It is not in the store.
    NotFound,
    /// Someone uses it.
    InUse,
    /// It lies on a tier, which is never written.
    OnTier,
    /// The request or the settings make no sense.
    Invalid,
}

/// A failed operation of the store; names the file or object.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    kind: StoreErrorKind,
    message: String,
    errno: Option<i32>,
}

impl StoreError {
    /// An error of `kind`; `message` names the object or file.
    pub(crate) fn new(kind: StoreErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            errno: None,
        }
    }

    /// An error of the system about `what`.
    pub(crate) fn io(what: impl std::fmt::Display, error: &std::io::Error) -> Self {
        Self::system(error.raw_os_error(), format!("{what}: {error}"))
    }

    fn system(errno: Option<i32>, message: String) -> Self {
        let kind = match errno {
            Some(libc::ENOSPC | libc::EDQUOT) => StoreErrorKind::NoSpace,
            Some(libc::EROFS | libc::EACCES | libc::EPERM) => StoreErrorKind::ReadOnly,
            Some(libc::ENOENT) => StoreErrorKind::NotFound,
            Some(libc::EFBIG) => StoreErrorKind::Invalid,
            _ => StoreErrorKind::Io,
        };
        Self {
            kind,
            message,
            errno,
        }
    }

    /// What it means.
    pub const fn kind(&self) -> StoreErrorKind {
        self.kind
    }

    /// The errno, where the system gave one.
    pub const fn errno(&self) -> Option<i32> {
        self.errno
    }

    /// What to try, for a person; `None` where the message says it all.
    pub const fn hint(&self) -> Option<&'static str> {
        match self.kind {
            StoreErrorKind::NoSpace => Some(
                "free space on the disk, run `hearth gc`, unpin or remove artifacts, or raise store.max_bytes",
            ),
            StoreErrorKind::ReadOnly => Some(
                "run as the user who owns the store, remount its file system read-write, or choose another with --store",
            ),
            StoreErrorKind::NewerFormat => {
                Some("use the newer version of hearth, or another store")
            }
            StoreErrorKind::Damaged => Some("run `hearth verify --repair`"),
            StoreErrorKind::OnTier => Some("remove it from the list that the tier is baked from"),
            StoreErrorKind::InUse => Some("unmount or unpin it first"),
            StoreErrorKind::Io => Some("look for disk errors in the kernel log"),
            StoreErrorKind::NotFound | StoreErrorKind::Invalid => None,
        }
    }
}

impl From<DiskError> for StoreError {
    fn from(error: DiskError) -> Self {
        Self::system(error.errno(), error.to_string())
    }
}
