//! The blobs of layers as one reads them at random: through the engine, so that what one reader
//! brought is there for all readers, and for the unpacking of the whole.

use std::{collections::HashMap, fmt, ops::Range, sync::Arc};

use futures_util::{StreamExt as _, stream};

use crate::{
    chunk::CHUNK_SIZE,
    digest::ObjectId,
    fetch::Engine,
    reference::Reference,
    source::{ByteStream, Layer, Source, SourceError},
    tree::{Artifact, Location, Object, Recipe},
};

/// Reads the blobs of some layers through the engine, and everything else from the origin.
pub(super) struct Blobs {
    engine: Engine,
    origin: Arc<dyn Source>,
    blobs: HashMap<String, Object>,
}

impl fmt::Debug for Blobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blobs({})", self.blobs.len())
    }
}

/// A layer as it lies in the registry.
pub(in crate::node) fn blob_of(layer: &Layer) -> Object {
    Object {
        id: ObjectId::Sha256(layer.blob),
        size: layer.size,
        git_sha1: None,
        recipe: Recipe::Raw(Location {
            path: layer.blob.to_string(),
            generation: None,
            offset: 0,
        }),
    }
}

impl Blobs {
    pub(super) fn new(engine: Engine, origin: Arc<dyn Source>, layers: &[Layer]) -> Self {
        let tars = layers.iter().filter(|layer| layer.as_file.is_none());
        let blobs = tars.map(|layer| (layer.blob.to_string(), blob_of(layer)));
        Self {
            blobs: blobs.collect(),
            engine,
            origin,
        }
    }
}

#[async_trait::async_trait]
impl Source for Blobs {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        self.origin.resolve(reference).await
    }

    fn origin(&self) -> String {
        self.origin.origin()
    }

    fn waits_for_objects(&self) -> bool {
        true
    }

    async fn read(
        &self,
        location: &Location,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        let Some(blob) = self.blobs.get(&location.path) else {
            return self.origin.read(location, range).await;
        };
        let handle = self
            .engine
            .open(blob, &self.origin)
            .map_err(|e| e.as_source())?;
        let end = range.end.min(blob.size);
        let pieces = stream::try_unfold(range.start, move |at| {
            let handle = Arc::clone(&handle);
            async move {
                if at >= end {
                    return Ok(None);
                }
                let len = (end - at).min(CHUNK_SIZE) as usize;
                let piece = handle.read(at, len).await.map_err(|e| e.as_source())?;
                let next = at + piece.len() as u64;
                Ok((!piece.is_empty()).then_some((piece, next)))
            }
        });
        Ok(pieces.boxed())
    }
}
