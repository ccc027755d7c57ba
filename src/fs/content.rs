//! Where the bytes of a view come from: the fetch engine, or a stand-in in tests.

use std::{fs::File, sync::Arc};

use bytes::Bytes;

use super::FsError;
use crate::{
    fetch::{Class, Engine, FetchError, Handle},
    source::Source,
    store::Complete,
    tree::Artifact,
};

/// The objects of one artifact.
pub trait Contents: Send + Sync {
    /// Object `object` (index into the artifact's objects); waits for no network.
    ///
    /// # Errors
    /// A store that cannot be read or written.
    fn open(&self, object: u32) -> Result<Arc<dyn Body>, FsError>;
}

/// The bytes of one object, here or still to come.
#[async_trait::async_trait]
pub trait Body: Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;

    /// The complete file, once all is here and verified.
    fn complete(&self) -> Option<Arc<dyn Whole>>;

    /// Fills `buf` from `offset` (within the size) and says true, or says false where bytes are
    /// missing. Never waits for the network.
    ///
    /// # Errors
    /// A disk error, or content known to be wrong.
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool, FsError>;

    /// Reads `len` bytes from `offset` (within the size), fetching what is missing.
    ///
    /// # Errors
    /// Bytes that could not be had.
    async fn read(self: Arc<Self>, offset: u64, len: usize) -> Result<Bytes, FsError>;

    /// Fetches the whole, verified.
    ///
    /// # Errors
    /// Bytes that could not be had or kept.
    async fn whole(self: Arc<Self>) -> Result<Arc<dyn Whole>, FsError>;

    /// Has `call` run each time what was read may have been wrong; from then on until it is
    /// complete nothing unverified is read. `call` must not wait for content.
    fn on_wrong(&self, call: Box<dyn Fn() + Send + Sync>);
}

/// A complete file; stays readable while this is held.
pub trait Whole: Send + Sync {
    /// The file, open for reading.
    fn file(&self) -> &File;
}

/// Content from the fetch engine.
pub struct Fetched {
    engine: Engine,
    source: Arc<dyn Source>,
    artifact: Arc<Artifact>,
}

impl Fetched {
    /// The objects of `artifact`, fetched from `source` by `engine`.
    pub fn new(engine: Engine, source: Arc<dyn Source>, artifact: Arc<Artifact>) -> Self {
        Self {
            engine,
            source,
            artifact,
        }
    }
}

impl Contents for Fetched {
    fn open(&self, object: u32) -> Result<Arc<dyn Body>, FsError> {
        let object = self
            .artifact
            .objects
            .get(object as usize)
            .ok_or(FsError::Damaged("a file names no object"))?;
        let handle: Arc<Handle> = self.engine.open(object, &self.source)?;
        handle.expect_reads();
        Ok(handle)
    }
}

#[async_trait::async_trait]
impl Body for Handle {
    fn size(&self) -> u64 {
        Handle::size(self)
    }

    fn complete(&self) -> Option<Arc<dyn Whole>> {
        Some(Handle::complete(self)?)
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool, FsError> {
        Ok(Handle::try_read(self, offset, buf)?)
    }

    async fn read(self: Arc<Self>, offset: u64, len: usize) -> Result<Bytes, FsError> {
        Ok(Handle::read(&self, offset, len).await?)
    }

    async fn whole(self: Arc<Self>) -> Result<Arc<dyn Whole>, FsError> {
        Ok(self.ensure(Class::Demand).await?)
    }

    fn on_wrong(&self, call: Box<dyn Fn() + Send + Sync>) {
        Handle::on_wrong(self, call);
    }
}

impl Whole for Complete {
    fn file(&self) -> &File {
        Complete::file(self)
    }
}

impl Whole for File {
    fn file(&self) -> &File {
        self
    }
}

impl From<FetchError> for FsError {
    fn from(error: FetchError) -> Self {
        Self::Content {
            kind: error.kind(),
            message: error.to_string(),
        }
    }
}
