//! What can go wrong with a snapshot.

use std::path::PathBuf;

use super::{RootsError, RootsErrorKind};
use crate::{digest::Digest, disk::DiskError};

/// Why something about a snapshot cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// No snapshot of that name.
    #[error("snapshot {0} does not exist")]
    NotFound(String),
    /// The parent is not there.
    #[error("parent snapshot {0} does not exist")]
    NoParent(String),
    /// The name is taken.
    #[error("snapshot {0} exists already")]
    Exists(String),
    /// Nothing to unpack: the layers up to this chain id are here, as a committed snapshot.
    #[error("target snapshot {0} exists already")]
    Claimed(Digest),
    /// Not in the state that it would have to be in.
    #[error("{0}")]
    State(String),
    /// Something is wrong with what was asked.
    #[error("{0}")]
    Invalid(String),
    /// The node cannot serve layers that were claimed.
    #[error("snapshot {name} (image {image}): the layers up to {chain} cannot be served")]
    Roots {
        /// Whose mounts were asked for.
        name: String,
        /// The image, where containerd said it.
        image: String,
        /// The topmost claimed layer.
        chain: Digest,
        /// Why.
        source: RootsError,
    },
    /// Another process serves this directory.
    #[error("{} is served by another process", .0.display())]
    Served(PathBuf),
    /// Snapshots cannot be kept there.
    #[error("cannot mount an overlay that can be written to in {}: {source}", dir.display())]
    Overlay {
        /// The directory of snapshots.
        dir: PathBuf,
        /// What mount(2) said, or the write to the mount.
        source: std::io::Error,
    },
    /// A file operation failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// What an error is about; as containerd's package `errdefs` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotErrorKind {
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    Unavailable,
    Internal,
}

impl SnapshotError {
    /// What it is about.
    pub const fn kind(&self) -> SnapshotErrorKind {
        match self {
            Self::NotFound(_) | Self::NoParent(_) => SnapshotErrorKind::NotFound,
            Self::Exists(_) | Self::Claimed(_) => SnapshotErrorKind::AlreadyExists,
            Self::State(_) => SnapshotErrorKind::FailedPrecondition,
            Self::Invalid(_) => SnapshotErrorKind::InvalidArgument,
            // Not NOT_FOUND: containerd would take that for a missing snapshot.
            Self::Roots { source, .. } => match source.kind() {
                RootsErrorKind::Unavailable => SnapshotErrorKind::Unavailable,
                RootsErrorKind::Unknown => SnapshotErrorKind::FailedPrecondition,
                RootsErrorKind::Failed => SnapshotErrorKind::Internal,
            },
            Self::Served(_) | Self::Overlay { .. } | Self::Disk(_) => SnapshotErrorKind::Internal,
        }
    }

    /// What to try, for a person.
    pub const fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Served(_) => Some("stop it first, or give another directory (--root)"),
            Self::Overlay { .. } => Some(
                "run as root, with a directory (--root) on ext4, xfs (ftype=1) or btrfs, and not \
                 inside a container's own overlay",
            ),
            _ => None,
        }
    }
}
