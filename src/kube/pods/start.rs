//! The start of one pod, as it goes: what is recorded of it, and its span.

use std::time::SystemTime;

use tokio::time::Instant;
use tracing::Span;

use crate::{
    kube::{coldstart::ColdStart, events::PodRef},
    telemetry::span,
};

/// A start, and when it began.
pub(super) struct Start {
    pub(super) since: Instant,
    pub(super) record: ColdStart,
    pub(super) told: bool,
    /// Of all of it; none once it is told.
    pub(super) span: Span,
}

impl Start {
    pub(super) fn new(pod: &PodRef, late: bool) -> Self {
        Self {
            since: Instant::now(),
            record: ColdStart {
                namespace: pod.namespace.clone(),
                pod: pod.name.clone(),
                uid: pod.uid.clone(),
                late,
                ..ColdStart::default()
            },
            told: false,
            span: span!(
                parent: None,
                "pod start",
                k8s.namespace.name = pod.namespace,
                k8s.pod.name = pod.name,
                k8s.pod.uid = pod.uid,
                hearth.late = late
            ),
        }
    }

    /// Ends the span; what is not known by now will not be.
    pub(super) fn end_span(&mut self) {
        let span = std::mem::replace(&mut self.span, Span::none());
        let since = SystemTime::now() - self.since.elapsed();
        self.record.tell(&span, since);
    }
}

impl Drop for Start {
    fn drop(&mut self) {
        self.end_span();
    }
}
