//! What a failure of an origin means for an object, and how it is told.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

pub(super) use crate::source::Retry;
use crate::source::{SourceError, SourceErrorKind};

/// Whether an error says something of one origin, rather than of the way to it: another may do better.
pub(super) const fn is_of_origin(kind: SourceErrorKind) -> bool {
    matches!(
        kind,
        SourceErrorKind::Denied
            | SourceErrorKind::NotFound
            | SourceErrorKind::Changed
            | SourceErrorKind::Corrupt
    )
}

/// Why nothing arrives of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// What the origin, or the way to it, said last.
    pub error: String,
    /// Nothing has arrived since.
    pub since: Instant,
    /// When it will be given up.
    pub until: Instant,
}

/// The trouble of one object, for those who show how it does.
#[derive(Default)]
pub(super) struct LastTrouble {
    /// Bytes arrived, ever.
    gave: AtomicBool,
    any: AtomicBool,
    trouble: Mutex<Option<Trouble>>,
}

impl LastTrouble {
    /// `gave`: the origin gave some of it to an earlier process.
    pub(super) fn new(gave: bool) -> Self {
        let gave = AtomicBool::new(gave);
        Self {
            gave,
            ..Self::default()
        }
    }

    /// `error` is about to be waited out, for `pause` at first. The first of a trouble is worth a warning
    /// where somebody reads; whoever warms is told otherwise.
    pub(super) fn note(&self, retry: &Retry, error: &SourceError, pause: Duration, is_read: bool) {
        *self.trouble.lock() = Some(Trouble {
            error: error.to_string(),
            since: retry.since(),
            until: retry.since() + retry.patience(),
        });
        let is_first = !self.any.swap(true, Ordering::AcqRel);
        match is_first && is_read {
            true => tracing::warn!(%error, ?pause, patience = ?retry.patience(), "trying again"),
            false => tracing::info!(%error, ?pause, "trying again"),
        }
    }

    /// Whether the origin gave bytes of it before.
    pub(super) fn gave(&self) -> bool {
        self.gave.load(Ordering::Relaxed)
    }

    /// Bytes arrived.
    pub(super) fn is_over(&self) {
        self.gave.store(true, Ordering::Relaxed);
        if self.any.load(Ordering::Acquire) {
            self.any.store(false, Ordering::Release);
            *self.trouble.lock() = None;
        }
    }

    pub(super) fn get(&self) -> Option<Trouble> {
        self.trouble.lock().clone()
    }
}
