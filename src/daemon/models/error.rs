//! What errors of other rooms mean for a volume.

use crate::{
    csi::{ModelError, ModelErrorKind},
    daemon::describe,
    fetch::FetchErrorKind,
    mount::MountError,
    node::NodeError,
    source::SourceErrorKind,
    store::{StoreError, StoreErrorKind},
};

pub(super) fn failed(why: String) -> ModelError {
    ModelError::new(ModelErrorKind::Failed, why)
}

impl From<MountError> for ModelError {
    fn from(error: MountError) -> Self {
        failed(error.to_string())
    }
}

impl From<StoreError> for ModelError {
    fn from(error: StoreError) -> Self {
        of_node(&error.into())
    }
}

pub(in crate::daemon) fn of_node(error: &NodeError) -> ModelError {
    let kind = match error {
        NodeError::Resolve { source, .. } => match source.kind() {
            SourceErrorKind::NotFound => ModelErrorKind::NotFound,
            SourceErrorKind::Denied => ModelErrorKind::Denied,
            SourceErrorKind::Invalid => ModelErrorKind::Invalid,
            SourceErrorKind::Throttled
            | SourceErrorKind::Unavailable
            | SourceErrorKind::Changed
            | SourceErrorKind::Corrupt => ModelErrorKind::Unavailable,
        },
        NodeError::Fetch { source, .. } => match source.kind() {
            FetchErrorKind::NoSpace => ModelErrorKind::NoSpace,
            FetchErrorKind::Denied => ModelErrorKind::Denied,
            FetchErrorKind::NotFound => ModelErrorKind::NotFound,
            FetchErrorKind::Unavailable | FetchErrorKind::Changed => ModelErrorKind::Unavailable,
            _ => ModelErrorKind::Failed,
        },
        NodeError::Store(error) if error.kind() == StoreErrorKind::NoSpace => {
            ModelErrorKind::NoSpace
        }
        _ => ModelErrorKind::Failed,
    };
    ModelError::new(kind, describe(error))
}
