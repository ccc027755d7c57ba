//! Buckets.
use std::ops::Range;

use super::{ByteStream, Config, Source, SourceError, SourceErrorKind};
use crate::{
    reference::Reference,
    tree::{Artifact, Location},
};

#[derive(Debug)]
pub(super) struct ObjectSource;

impl ObjectSource {
    pub(super) fn s3(_: &str, _: &Config) -> Result<Self, SourceError> {
        Ok(Self)
    }
    pub(super) fn gcs(_: &str, _: &Config) -> Result<Self, SourceError> {
        Ok(Self)
    }
    pub(super) fn azure(_: &str, _: &Config) -> Result<Self, SourceError> {
        Ok(Self)
    }
}

#[async_trait::async_trait]
impl Source for ObjectSource {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        Err(SourceError::new(
            SourceErrorKind::Invalid,
            reference.to_string(),
            "not yet",
        ))
    }
    async fn read(&self, location: &Location, _: Range<u64>) -> Result<ByteStream, SourceError> {
        Err(SourceError::new(
            SourceErrorKind::Invalid,
            &location.path,
            "not yet",
        ))
    }
}
