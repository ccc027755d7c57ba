//! Hashes an object in order while its chunks arrive out of order.
//!
//! The frontier is the first chunk not hashed yet. A chunk that arrives at the frontier is hashed
//! from memory; one that arrives ahead of it waits in memory while the backlog is small, and is
//! read back from the store when the frontier gets there otherwise. One thread hashes at a time;
//! the others leave their chunk with it.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::buffer::ChunkBuf;
use crate::{
    chunk,
    digest::{Digest, ObjectId},
    store::{Partial, StoreError, StoreErrorKind},
    tree::Object,
};

/// Chunks of one object that may wait in memory for the frontier.
const BACKLOG: usize = 48;

pub(super) struct Verifier {
    frontier: Mutex<Frontier>,
    backlog: Mutex<BTreeMap<u64, Arc<ChunkBuf>>>,
}

struct Frontier {
    next: u64,
    sha256: Sha256,
    sha1: Option<Sha1>,
}

/// What the content turned out to be.
pub(super) enum Verdict {
    Good(Digest),
    /// What was expected, and what was found.
    Bad {
        expected: String,
        found: String,
    },
}

impl Verifier {
    pub(super) fn new(object: &Object) -> Self {
        let sha1 = object.git_sha1.map(|_| git_hasher(object.size));
        Self {
            frontier: Mutex::new(Frontier {
                next: 0,
                sha256: Sha256::new(),
                sha1,
            }),
            backlog: Mutex::new(BTreeMap::new()),
        }
    }

    /// Notes that chunk `index` was committed with this content, and hashes as far as the chunks
    /// that are here go. Keeps the content for later only if `may_wait`: what waits takes memory
    /// that the chunk at the frontier may need to arrive. Blocking.
    pub(super) fn committed(
        &self,
        index: u64,
        data: &Arc<ChunkBuf>,
        partial: &Partial,
        may_wait: bool,
    ) {
        {
            let mut backlog = self.backlog.lock();
            backlog.insert(index, Arc::clone(data));
            if backlog.len() > BACKLOG {
                backlog.pop_last();
            }
        }
        // Whoever holds the frontier takes what is left here; look again after letting go, since
        // a chunk may have been left between its last look and that.
        while let Some(mut frontier) = self.frontier.try_lock() {
            if !self.advance(&mut frontier, partial) {
                break;
            }
        }
        if !may_wait {
            self.backlog.lock().remove(&index);
        }
    }

    /// Hashes from the frontier on, from memory or from the store; whether it got anywhere.
    fn advance(&self, frontier: &mut Frontier, partial: &Partial) -> bool {
        let from = frontier.next;
        loop {
            let index = frontier.next;
            if let Some(data) = self.take(index) {
                frontier.update(data.filled());
            } else if index < partial.chunks() && partial.present(index) {
                // It did not fit into the backlog, or was here before.
                let bytes = chunk::bytes(index, partial.size());
                let mut buffer = vec![0; (bytes.end - bytes.start) as usize];
                if partial.read_at(&mut buffer, bytes.start).is_err() {
                    break; // said by whoever needs it: the judge
                }
                frontier.update(&buffer);
            } else {
                break;
            }
        }
        frontier.next > from
    }

    /// Hashes the rest, reading it back from the store, and judges. All chunks must be present.
    /// Blocking.
    pub(super) fn judge(&self, object: &Object, partial: &Partial) -> Result<Verdict, StoreError> {
        let mut frontier = self.frontier.lock();
        self.advance(&mut frontier, partial);
        if frontier.next < partial.chunks() {
            // Says what is wrong with the chunk that could not be read.
            let bytes = chunk::bytes(frontier.next, partial.size());
            partial.read_at(
                &mut vec![0; (bytes.end - bytes.start) as usize],
                bytes.start,
            )?;
            let message = format!("object {}: chunk {} is missing", object.id, frontier.next);
            return Err(StoreError::new(StoreErrorKind::Damaged, message));
        }
        let sha256 = Digest::from_bytes(frontier.sha256.clone().finalize().into());
        let sha1 = frontier.sha1.clone().map(|h| h.finalize().into());
        Ok(verdict(object, sha256, sha1))
    }

    /// Starts again: the content was wrong.
    pub(super) fn reset(&self, object: &Object) {
        self.backlog.lock().clear();
        let fresh = Self::new(object);
        *self.frontier.lock() = fresh.frontier.into_inner();
    }

    fn take(&self, index: u64) -> Option<Arc<ChunkBuf>> {
        let mut backlog = self.backlog.lock();
        // What was hashed from the store meanwhile is of no use.
        while backlog.keys().next().is_some_and(|&first| first < index) {
            backlog.pop_first();
        }
        backlog.remove(&index)
    }
}

impl Frontier {
    fn update(&mut self, data: &[u8]) {
        self.sha256.update(data);
        if let Some(sha1) = &mut self.sha1 {
            sha1.update(data);
        }
        self.next += 1;
    }
}

/// Judges content that is wholly in memory.
pub(super) fn judge_bytes(object: &Object, data: &[u8]) -> Verdict {
    let sha1 = object.git_sha1.map(|_| {
        let mut hasher = git_hasher(object.size);
        hasher.update(data);
        hasher.finalize().into()
    });
    verdict(object, Digest::of(data), sha1)
}

fn verdict(object: &Object, sha256: Digest, sha1: Option<[u8; 20]>) -> Verdict {
    if let ObjectId::Sha256(expected) = object.id
        && expected != sha256
    {
        return Verdict::Bad {
            expected: expected.to_string(),
            found: sha256.to_string(),
        };
    }
    match (object.git_sha1, sha1) {
        (Some(expected), Some(found)) if expected != found => Verdict::Bad {
            expected: format!("git:{}", crate::digest::to_hex(&expected)),
            found: format!("git:{}", crate::digest::to_hex(&found)),
        },
        _ => Verdict::Good(sha256),
    }
}

/// A git blob is hashed as `blob <size>\0<content>` (gitformat-pack, "Object names").
fn git_hasher(size: u64) -> Sha1 {
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {size}\0"));
    hasher
}
