//! The fetch engine: brings objects from sources into the store.

use std::sync::Arc;

use bytes::Bytes;

use crate::{
    digest::ObjectId,
    source::Source,
    store::{Complete, Store},
    tree::Object,
};

pub struct Engine;
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    Demand,
    Readahead,
    Warm,
}
#[derive(Debug, Clone, thiserror::Error)]
#[error("fetch")]
pub struct FetchError;
impl FetchError {
    pub fn kind(&self) -> FetchErrorKind {
        unimplemented!()
    }
}
/// What a failed read means to whoever reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchErrorKind {
    NotFound,
    Denied,
    Changed,
    Corrupt,
    Unavailable,
    NoSpace,
    Disk,
    Cancelled,
}

/// One object being read or fetched; shared by all its users in this process.
pub struct Handle;
impl Engine {
    /// The handle of `object`; the same one for equal ids.
    pub fn open(
        &self,
        _object: &Object,
        _source: &Arc<dyn Source>,
    ) -> Result<Arc<Handle>, FetchError> {
        unimplemented!()
    }
}
impl Handle {
    pub fn id(&self) -> &ObjectId {
        unimplemented!()
    }
    pub fn size(&self) -> u64 {
        unimplemented!()
    }
    /// The complete file, once all is here and verified.
    pub fn complete(&self) -> Option<Arc<Complete>> {
        unimplemented!()
    }
    /// Reads what is here now: fills `buf` from `offset` (the caller has clipped to size) and says true, or false where bytes are missing. Never waits for the network.
    pub fn try_read(&self, _offset: u64, _buf: &mut [u8]) -> Result<bool, FetchError> {
        unimplemented!()
    }
    /// Reads at demand priority, fetching what is missing; clipped to the object's size.
    pub async fn read(self: &Arc<Self>, _offset: u64, _len: usize) -> Result<Bytes, FetchError> {
        unimplemented!()
    }
    /// The whole object, verified.
    pub async fn ensure(self: &Arc<Self>, _class: Class) -> Result<Arc<Complete>, FetchError> {
        unimplemented!()
    }
}
