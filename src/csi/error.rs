//! What can go wrong with a volume.

use super::{ModelError, ModelErrorKind};
use crate::disk::DiskError;

/// Why something about a volume cannot be done. No message carries a secret.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct CsiError {
    kind: CsiErrorKind,
    message: String,
}

/// What a [`CsiError`] is about; each is one status code of the CSI spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CsiErrorKind {
    /// A field is missing, wrong, too long, or asks for what a volume here cannot be.
    Invalid,
    /// No such volume, or no such content at its origin.
    NotFound,
    /// There is one that is not compatible.
    AlreadyExists,
    /// Something has to be done first.
    FailedPrecondition,
    /// Another call about the volume is under way.
    Aborted,
    /// The origin wants other credentials.
    Unauthenticated,
    /// It does not fit.
    Exhausted,
    /// A size that no volume can have.
    OutOfRange,
    /// It may go well later: an origin that cannot be reached.
    Unavailable,
    /// Anything else.
    Internal,
}

impl CsiErrorKind {
    /// Whether the same call may do later, with nothing changed by anybody. After any other error but `Exhausted` the
    /// kubelet takes it that nothing was mounted: it does not unpublish.
    pub(super) const fn may_pass(self) -> bool {
        matches!(self, Self::Unavailable | Self::Aborted)
    }
}

impl CsiError {
    /// An error that says `message`.
    pub fn new(kind: CsiErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(CsiErrorKind::Invalid, message)
    }

    /// What it is about.
    pub const fn kind(&self) -> CsiErrorKind {
        self.kind
    }

    pub(super) fn of_model(volume: &str, error: &ModelError) -> Self {
        let kind = match error.kind() {
            ModelErrorKind::Invalid => CsiErrorKind::Invalid,
            ModelErrorKind::NotFound | ModelErrorKind::Gone => CsiErrorKind::NotFound,
            ModelErrorKind::Denied => CsiErrorKind::Unauthenticated,
            ModelErrorKind::NoSpace => CsiErrorKind::Exhausted,
            ModelErrorKind::Unavailable => CsiErrorKind::Unavailable,
            ModelErrorKind::Failed => CsiErrorKind::Internal,
        };
        Self::new(kind, format!("volume {volume}: {error}"))
    }
}

impl From<DiskError> for CsiError {
    fn from(error: DiskError) -> Self {
        Self::new(CsiErrorKind::Internal, error.to_string())
    }
}
