//! Files.
use std::ops::Range;

use super::{ByteStream, Config, Source, SourceError, SourceErrorKind};
use crate::{
    reference::Reference,
    tree::{Artifact, Location},
};

#[derive(Debug)]
pub(super) struct FileSource;

impl FileSource {
    pub(super) fn new(_: &str, _: &Config) -> Self {
        Self
    }
}

#[async_trait::async_trait]
impl Source for FileSource {
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
