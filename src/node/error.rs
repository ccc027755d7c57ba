//! Why the node could not do what was asked, and what to try.

use crate::{
    fetch::{FetchError, FetchErrorKind},
    image::{ImageError, ImageErrorKind},
    source::{SourceError, SourceErrorKind},
    store::StoreError,
};

/// Why the node could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    #[error("cannot resolve {reference}")]
    Resolve {
        reference: String,
        source: SourceError,
    },
    #[error("cannot fetch {reference}")]
    Fetch {
        reference: String,
        source: FetchError,
    },
    #[error("cannot use {reference}")]
    Image {
        reference: String,
        source: ImageError,
    },
    #[error("cannot use the store")]
    Store(#[from] StoreError),
    #[error("{0} is not in the store")]
    Unknown(String),
    /// The registry said of a layer what its verified bytes do not: what was read meanwhile may have
    /// been wrong.
    #[error("{reference}: the content of {layer} is not what was said of it: {why}")]
    Misled {
        reference: String,
        layer: String,
        why: String,
    },
}

impl NodeError {
    /// What it is about: one of a few words.
    pub(crate) fn about(&self) -> String {
        match self {
            Self::Resolve { source, .. } => format!("{:?}", source.kind()),
            Self::Fetch { source, .. } => format!("{:?}", source.kind()),
            Self::Image { source, .. } => format!("{:?}", source.kind()),
            Self::Store(source) => format!("{:?}", source.kind()),
            Self::Unknown(_) => "Unknown".to_owned(),
            Self::Misled { .. } => "Misled".to_owned(),
        }
    }

    /// Whether nothing failed, but the process is ending.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Fetch { source, .. } if source.kind() == FetchErrorKind::Cancelled)
    }

    /// Whether what was served of it, while it was believed, may have been wrong.
    pub fn is_refuted(&self) -> bool {
        match self {
            Self::Misled { .. } => true,
            Self::Image { source, .. } => source.kind() == ImageErrorKind::Corrupt,
            _ => false,
        }
    }

    /// What to try, for a person.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Resolve { source, .. } => match (source.hint(), source.kind()) {
                (Some(hint), _) => Some(hint.into()),
                (None, SourceErrorKind::Unavailable) => Some(
                    "check the address, and that this machine reaches it (a proxy, an endpoint)".into(),
                ),
                (None, _) => None,
            },
            Self::Fetch { source, .. } => match source.kind() {
                FetchErrorKind::Changed => {
                    Some("it changed at the origin while it was fetched; run the command again".into())
                }
                FetchErrorKind::Corrupt => Some(
                    "the origin served content that does not match its digest twice; nothing of it was kept".into(),
                ),
                FetchErrorKind::NoSpace => {
                    let hint = source.hint();
                    Some(hint.unwrap_or("free space, or let `hearth gc` make some").into())
                }
                FetchErrorKind::Unavailable => {
                    Some("run the command again: it goes on where it stopped".into())
                }
                _ => source.hint().map(str::to_owned),
            },
            Self::Image { source, .. } => match source.kind() {
                ImageErrorKind::Invalid | ImageErrorKind::Corrupt => Some(
                    "the image is broken where it was pushed from, or in the registry: push it again".into(),
                ),
                ImageErrorKind::TooLarge | ImageErrorKind::Unsupported => None,
            },
            Self::Store(source) => source.hint().map(str::to_owned),
            Self::Unknown(_) => Some("`hearth list` shows what is".into()),
            Self::Misled { .. } => Some(
                "run the command again: what was recorded of it is forgotten; if that does not help, something on the way to the registry changes what it says".into(),
            ),
        }
    }
}
