//! Where the bytes of a view come from: the fetch engine, or a stand-in in tests.

use std::{fs::File, ops::Range, sync::Arc};

use bytes::Bytes;

use super::FsError;
use crate::{
    chunk::CHUNK_SIZE,
    fetch::{Engine, FetchError, Handle, OnRead},
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

    /// Notes that they are used, where nothing is opened for it.
    fn touch(&self) {}
}

/// The bytes of one object, here or still to come.
#[async_trait::async_trait]
pub trait Body: Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;

    /// The complete file, once all is here and verified; never one that holds more than this.
    fn complete(&self) -> Option<Arc<dyn Whole>>;

    /// The larger body that this one is a part of, and with which it is verified.
    fn within(&self) -> Option<Arc<dyn Body>> {
        None
    }

    /// Whether all of it is here and verified, in a file of its own or not.
    fn is_verified(&self) -> bool {
        match self.within() {
            Some(whole) => whole.is_verified(),
            None => self.complete().is_some(),
        }
    }

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

    /// Fetches all of it, verified where it is stored in a file of its own; a small one may still be
    /// on its way there.
    ///
    /// # Errors
    /// Bytes that could not be had or kept.
    async fn whole(self: Arc<Self>) -> Result<(), FsError>;

    /// Has `call` run each time what was read may have been wrong; from then on until it is
    /// complete nothing unverified is read. `call` must not wait for content.
    fn on_wrong(&self, call: Box<dyn Fn() + Send + Sync>);
}

/// A complete file; stays readable while this is held.
pub trait Whole: Send + Sync {
    /// The file, open for reading.
    fn file(&self) -> &File;

    /// Whether it may be held when nobody has it open any more, to be used again while [`Whole::is_there`].
    fn may_stay(&self) -> bool {
        false
    }

    /// Whether opening it anew would lead to the same file.
    fn is_there(&self) -> bool {
        false
    }
}

/// Content from the fetch engine.
pub struct Fetched {
    engine: Engine,
    source: Arc<dyn Source>,
    artifact: Arc<Artifact>,
    on_read: Option<OnRead>,
}

impl Fetched {
    /// The objects of `artifact`, fetched from `source` by `engine`.
    pub fn new(engine: Engine, source: Arc<dyn Source>, artifact: Arc<Artifact>) -> Self {
        Self {
            engine,
            source,
            artifact,
            on_read: None,
        }
    }

    /// Tells `hook` of what is read while it is not complete. A small file counts as read when it is
    /// opened.
    #[must_use]
    pub fn on_read(mut self, hook: Option<OnRead>) -> Self {
        self.on_read = hook;
        self
    }
}

impl Contents for Fetched {
    fn touch(&self) {
        self.engine.touch();
    }

    fn open(&self, object: u32) -> Result<Arc<dyn Body>, FsError> {
        let damaged = FsError::Damaged("a file names no object");
        let (stored, offset) = self.artifact.place(object).ok_or(damaged)?;
        let objects = &self.artifact.objects;
        self.engine.touch();
        let handle: Arc<Handle> = self.engine.open(&objects[stored as usize], &self.source)?;
        handle.expect_reads();
        if stored == object {
            return Ok(match &self.on_read {
                Some(on_read) => {
                    if handle.size() <= CHUNK_SIZE {
                        on_read(handle.id(), 0..handle.size());
                    }
                    let on_read = Arc::clone(on_read);
                    Arc::new(Told { handle, on_read })
                }
                None => handle,
            });
        }
        let end = offset + objects[object as usize].size;
        handle.expect_file(offset..end);
        Ok(Arc::new(Part {
            handle,
            bytes: offset..end,
        }))
    }
}

/// A file inside a larger object: read through that one, and never by passthrough, which knows no
/// offsets.
struct Part {
    handle: Arc<Handle>,
    /// Where it is in the object.
    bytes: Range<u64>,
}

#[async_trait::async_trait]
impl Body for Part {
    fn size(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }

    fn complete(&self) -> Option<Arc<dyn Whole>> {
        None
    }

    fn within(&self) -> Option<Arc<dyn Body>> {
        Some(self.handle.clone())
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool, FsError> {
        if offset.saturating_add(buf.len() as u64) > self.size() {
            return Err(FsError::Damaged("a read beyond the end"));
        }
        Ok(Handle::try_read(
            &self.handle,
            self.bytes.start + offset,
            buf,
        )?)
    }

    async fn read(self: Arc<Self>, offset: u64, len: usize) -> Result<Bytes, FsError> {
        let left = self.size().saturating_sub(offset);
        let len = len.min(usize::try_from(left).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(Bytes::new());
        }
        Ok(Handle::read(&self.handle, self.bytes.start + offset, len).await?)
    }

    /// Brings the bytes of this file, not of all that it lies in.
    async fn whole(self: Arc<Self>) -> Result<(), FsError> {
        let mut at = self.bytes.start;
        while at < self.bytes.end {
            let len = usize::try_from(self.bytes.end - at).unwrap_or(usize::MAX);
            let read = Handle::read(&self.handle, at, len).await?;
            at += read.len().max(1) as u64;
        }
        Ok(())
    }

    fn on_wrong(&self, call: Box<dyn Fn() + Send + Sync>) {
        Handle::on_wrong(&self.handle, call);
    }
}

/// A file whose reads are told.
struct Told {
    handle: Arc<Handle>,
    on_read: OnRead,
}

#[async_trait::async_trait]
impl Body for Told {
    fn size(&self) -> u64 {
        self.handle.size()
    }

    fn complete(&self) -> Option<Arc<dyn Whole>> {
        Body::complete(&*self.handle)
    }

    fn within(&self) -> Option<Arc<dyn Body>> {
        Some(self.handle.clone())
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool, FsError> {
        (self.on_read)(self.handle.id(), offset..offset + buf.len() as u64);
        Body::try_read(&*self.handle, offset, buf)
    }

    async fn read(self: Arc<Self>, offset: u64, len: usize) -> Result<Bytes, FsError> {
        Body::read(self.handle.clone(), offset, len).await
    }

    async fn whole(self: Arc<Self>) -> Result<(), FsError> {
        self.handle.clone().whole().await
    }

    fn on_wrong(&self, call: Box<dyn Fn() + Send + Sync>) {
        Body::on_wrong(&*self.handle, call);
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

    fn is_verified(&self) -> bool {
        Handle::is_verified(self)
    }

    async fn whole(self: Arc<Self>) -> Result<(), FsError> {
        self.bring().await?;
        Ok(())
    }

    fn on_wrong(&self, call: Box<dyn Fn() + Send + Sync>) {
        Handle::on_wrong(self, call);
    }
}

impl Whole for Complete {
    fn file(&self) -> &File {
        Complete::file(self)
    }

    /// A tier is a disk that somebody may want to detach.
    fn may_stay(&self) -> bool {
        self.tier.is_none()
    }

    fn is_there(&self) -> bool {
        Complete::is_there(self)
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
