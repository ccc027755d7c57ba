//! A source that gave content before, and may now refuse it: credentials expire and are renewed.

use std::{ops::Range, sync::Arc};

use crate::{
    digest::Digest,
    reference::Reference,
    source::{
        Attached, Attachment, ByteStream, Layered, ManifestBytes, Source, SourceError,
        SourceErrorKind,
    },
    tree::{Artifact, Location},
};

/// Says of content that is refused that it cannot be had just now, so that it is asked for again
/// within the configured patience.
#[derive(Debug)]
pub(super) struct Patient(Arc<dyn Source>);

impl Patient {
    pub(super) fn of(source: &Arc<dyn Source>) -> Arc<dyn Source> {
        Arc::new(Self(Arc::clone(source)))
    }
}

fn later<T>(answer: Result<T, SourceError>) -> Result<T, SourceError> {
    answer.map_err(|error| match error.kind() {
        SourceErrorKind::Denied => error.with_kind(SourceErrorKind::Unavailable),
        _ => error,
    })
}

#[async_trait::async_trait]
impl Source for Patient {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        self.0.resolve(reference).await
    }

    fn origin(&self) -> String {
        self.0.origin()
    }

    fn waits_for_objects(&self) -> bool {
        self.0.waits_for_objects()
    }

    async fn read(
        &self,
        location: &Location,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        later(self.0.read(location, range).await)
    }

    async fn layered(&self, reference: &Reference) -> Result<Option<Layered>, SourceError> {
        self.0.layered(reference).await
    }

    async fn layers(&self, reference: &Reference) -> Result<Option<Layered>, SourceError> {
        self.0.layers(reference).await
    }

    async fn manifest(&self, wanted: &str) -> Result<ManifestBytes, SourceError> {
        self.0.manifest(wanted).await
    }

    async fn small_blob(&self, digest: &Digest, limit: u64) -> Result<Arc<[u8]>, SourceError> {
        self.0.small_blob(digest, limit).await
    }

    async fn blob_size(&self, digest: &Digest) -> Result<u64, SourceError> {
        self.0.blob_size(digest).await
    }

    async fn attached(&self, subject: &Digest, kind: &str) -> Result<Vec<Attached>, SourceError> {
        self.0.attached(subject, kind).await
    }

    async fn attach(&self, subject: &Digest, what: Attachment) -> Result<Digest, SourceError> {
        self.0.attach(subject, what).await
    }
}
