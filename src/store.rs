//! The store: objects, trees and artifact records on disk. Knows no network.

use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use crate::{
    digest::{Digest, ObjectId},
    tree::Artifact,
};

pub struct Store;
pub struct Config {}
#[derive(Debug, thiserror::Error)]
#[error("store")]
pub struct StoreError;
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ByteSize(pub u64);
impl StoreError {
    pub fn closed() -> Self {
        StoreError
    }
    pub fn kind(&self) -> StoreErrorKind {
        unimplemented!()
    }
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreErrorKind {
    NoSpace,
    ReadOnly,
    NewerFormat,
    Io,
    Damaged,
    NotFound,
    InUse,
    Invalid,
}

/// A complete, verified object: immutable. Holding it keeps it from eviction (shared flock).
pub struct Complete {
    pub digest: Digest,
    pub size: u64,
    file: File,
}
impl Complete {
    pub fn file(&self) -> &File {
        &self.file
    }
}

/// How `Lease::commit` writes: past the page cache (nobody reads it now) or through it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteMode {
    Direct,
    Cached,
}

impl Store {
    pub fn open(_root: &Path, _config: &Config) -> Result<Arc<Store>, StoreError> {
        unimplemented!()
    }
    pub fn root(&self) -> &Path {
        unimplemented!()
    }
    /// The complete object with this id; follows located -> sha256.
    pub fn complete(&self, _id: &ObjectId) -> Result<Option<Arc<Complete>>, StoreError> {
        unimplemented!()
    }
    /// The partial object, made if absent; one per id in a process.
    pub fn partial(
        self: &Arc<Self>,
        _id: &ObjectId,
        _size: u64,
    ) -> Result<Arc<Partial>, StoreError> {
        unimplemented!()
    }
    /// Durably stores small objects: one syncfs for all. Content of `Sha256` ids is checked.
    pub fn put(
        &self,
        _objects: &[(ObjectId, bytes::Bytes)],
    ) -> Result<Vec<Arc<Complete>>, StoreError> {
        unimplemented!()
    }
    /// Refuses what cannot fit, evicting first where that helps; the guard holds the reservation.
    pub fn admit(self: &Arc<Self>, _artifact: &Artifact) -> Result<Reservation, StoreError> {
        unimplemented!()
    }
}
pub struct Reservation;

/// An object that is not complete yet: sparse data, and a map of present chunks.
pub struct Partial;
impl Partial {
    pub fn id(&self) -> &ObjectId {
        unimplemented!()
    }
    pub fn size(&self) -> u64 {
        unimplemented!()
    }
    pub fn present(&self, _chunk: u64) -> bool {
        unimplemented!()
    }
    pub fn all_present(&self) -> bool {
        unimplemented!()
    }
    /// Bytes in present chunks.
    pub fn present_bytes(&self) -> u64 {
        unimplemented!()
    }
    /// Claims the first run of absent and unclaimed chunks within `want`, up to its first present or claimed chunk.
    pub fn claim(self: &Arc<Self>, _want: Range<u64>) -> Result<Option<Lease>, StoreError> {
        unimplemented!()
    }
    /// pread from present chunks; the caller has checked `present`.
    pub fn read_at(&self, _buf: &mut [u8], _offset: u64) -> Result<(), StoreError> {
        unimplemented!()
    }
    /// Reserves disk space for the whole object (fallocate).
    pub fn allocate(&self) -> Result<(), StoreError> {
        unimplemented!()
    }
    /// Makes all present chunks durable: data sync, then map by temp + rename.
    pub fn checkpoint(&self) -> Result<(), StoreError> {
        unimplemented!()
    }
    /// All chunks present and content verified to be `digest` by the caller: becomes complete. Idempotent across processes.
    pub fn finish(&self, _digest: Digest) -> Result<Arc<Complete>, StoreError> {
        unimplemented!()
    }
    /// Content turned out wrong: all chunks absent again.
    pub fn discard(&self) -> Result<(), StoreError> {
        unimplemented!()
    }
}

/// The right to fill a run of chunks; dropped = given back.
pub struct Lease;
impl Lease {
    pub fn split_off(&mut self, _at: u64) -> Lease {
        unimplemented!()
    }
    /// Chunks not committed yet.
    pub fn chunks(&self) -> Range<u64> {
        unimplemented!()
    }
    /// Writes whole chunks at the front of the lease (`data` ends at a chunk boundary or at the object's end) and marks them present.
    pub fn commit(&self, _index: u64, _data: &[u8], _mode: WriteMode) -> Result<(), StoreError> {
        unimplemented!()
    }
}

/// What the store knows of a reference.
pub struct Record {
    pub reference: String,
    pub digest: Digest,
    pub revision: String,
    pub resolved: SystemTime,
    pub used: SystemTime,
    pub pins: Vec<String>,
}
impl Store {
    /// Durably records the artifact (tree first, then reference -> digest). Must come before looking at its objects: gc keeps what is recorded.
    pub fn record(&self, _artifact: &Artifact) -> Result<Digest, StoreError> {
        unimplemented!()
    }
    pub fn artifact(&self, _reference: &str) -> Result<Option<(Record, Artifact)>, StoreError> {
        unimplemented!()
    }
    pub fn records(&self) -> Result<Vec<Record>, StoreError> {
        unimplemented!()
    }
    /// Marks used now and keeps it from eviction while the guard lives (in any process).
    pub fn hold(&self, _reference: &str) -> Result<Hold, StoreError> {
        unimplemented!()
    }
    pub fn pin(&self, _reference: &str, _owner: &str) -> Result<(), StoreError> {
        unimplemented!()
    }
    pub fn unpin(&self, _reference: &str, _owner: &str) -> Result<bool, StoreError> {
        unimplemented!()
    }
    pub fn remove(&self, _reference: &str) -> Result<bool, StoreError> {
        unimplemented!()
    }
}
pub struct Hold;
