//! What came of a warm.

use super::Resolved;
use crate::telemetry;

/// What a warm did.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct WarmReport {
    pub reference: String,
    pub digest: String,
    pub revision: String,
    pub files: usize,
    /// Bytes of all distinct objects.
    pub bytes: u64,
    /// Bytes that were here before.
    pub bytes_before: u64,
    /// Wall time.
    pub seconds: f64,
}

impl WarmReport {
    pub(super) fn new(resolved: &Resolved, bytes_before: u64, started: std::time::Instant) -> Self {
        let artifact = &resolved.artifact;
        let report = Self {
            reference: artifact.reference.clone(),
            digest: artifact.digest().to_string(),
            revision: artifact.revision.clone(),
            files: artifact.tree.files().len(),
            bytes: artifact.size(),
            bytes_before,
            seconds: started.elapsed().as_secs_f64(),
        };
        report.tell();
        report
    }

    /// Tells the span that this is part of.
    fn tell(&self) {
        let span = tracing::Span::current();
        if span.is_disabled() {
            return;
        }
        telemetry::text(&span, "hearth.revision", &self.revision);
        telemetry::text(&span, "hearth.digest", &self.digest);
        telemetry::count(&span, "hearth.files", self.files as u64);
        telemetry::count(&span, "hearth.bytes.total", self.bytes);
        telemetry::count(&span, "hearth.bytes.before", self.bytes_before);
        let came = self.bytes.saturating_sub(self.bytes_before);
        telemetry::count(&span, "hearth.bytes.from_origin", came);
    }
}
