//! What came of a warm.

use super::Resolved;

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
        Self {
            reference: artifact.reference.clone(),
            digest: artifact.digest().to_string(),
            revision: artifact.revision.clone(),
            files: artifact.tree.files().len(),
            bytes: artifact.size(),
            bytes_before,
            seconds: started.elapsed().as_secs_f64(),
        }
    }
}
