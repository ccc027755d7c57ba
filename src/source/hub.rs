//! Placeholder until the branch with this source is merged.

use std::ops::Range;

use super::{ByteStream, Config, Source, SourceError, SourceErrorKind};
use crate::{
    reference::{HubRepo, Reference},
    tree::{Artifact, Location},
};

#[derive(Debug)]
pub(super) struct HubSource;

impl HubSource {
    pub(super) fn new(_repo: &HubRepo, _config: &Config) -> Result<Self, SourceError> {
        Err(SourceError::new(
            SourceErrorKind::Invalid,
            "hub",
            "not built in",
        ))
    }
}

#[async_trait::async_trait]
impl Source for HubSource {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        Err(SourceError::new(
            SourceErrorKind::Invalid,
            reference.to_string(),
            "not built in",
        ))
    }

    async fn read(&self, location: &Location, _: Range<u64>) -> Result<ByteStream, SourceError> {
        Err(SourceError::new(
            SourceErrorKind::Invalid,
            &location.path,
            "not built in",
        ))
    }
}
