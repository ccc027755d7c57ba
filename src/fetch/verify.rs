//! Hashes an object in order while its chunks arrive out of order.
//!
//! The frontier is the first chunk not hashed yet. A chunk that arrives at the frontier is hashed
//! from memory; one that arrives ahead of it waits in memory while the backlog is small, and is
//! read back from the store when the frontier gets there otherwise. One thread hashes at a time;
//! the others leave their chunk with it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::buffer::ChunkBuf;
use crate::{
    chunk,
    digest::{Digest, ObjectId},
    store::{Partial, StoreError},
    tree::Object,
};

/// Chunks of one object that may wait to be hashed before no more are fetched.
const BACKLOG: u64 = 24;
/// The same while the chunk at the frontier has not arrived: one connection is slower than the
/// others, which should not stand still for it.
const BACKLOG_OF_GAP: u64 = 128;

pub(super) struct Verifier {
    frontier: Mutex<Frontier>,
    /// Chunks that were committed and not hashed.
    waiting: Mutex<BTreeMap<u64, Waiting>>,
    /// The frontier's chunk, for those who only look.
    hashed: AtomicU64,
}

/// A chunk that was committed to a generation, and its content if that is still in memory.
type Waiting = (u32, Option<Arc<ChunkBuf>>);

/// What waits to be hashed.
struct Backlog {
    first: u64,
    chunks: u64,
    /// A chunk before the first has not arrived.
    has_gap: bool,
}

struct Frontier {
    /// What was hashed belongs to this generation of the partial object.
    generation: u32,
    next: u64,
    sha256: Sha256,
    sha1: Option<Sha1>,
}

/// What the content turned out to be.
pub(super) enum Verdict {
    /// The digest, and the generation of the partial object that has it.
    Good(Digest, u32),
    /// What was expected, and what was found in a generation.
    Bad {
        expected: String,
        found: String,
        generation: u32,
    },
}

impl Verifier {
    pub(super) fn new(object: &Object) -> Self {
        Self {
            frontier: Mutex::new(Frontier::new(object, 0)),
            waiting: Mutex::new(BTreeMap::new()),
            hashed: AtomicU64::new(0),
        }
    }

    /// Whether chunks arrive faster than they are hashed.
    pub(super) fn is_behind(&self) -> bool {
        self.backlog().is_some_and(|backlog| {
            let most = match backlog.has_gap {
                true => BACKLOG_OF_GAP,
                false => BACKLOG,
            };
            backlog.chunks > most
        })
    }

    /// The first chunk that waits, where many wait for one before it that has not arrived: more of these, and no more
    /// are fetched.
    pub(super) fn after_gap(&self) -> Option<u64> {
        let backlog = self.backlog()?;
        (backlog.has_gap && backlog.chunks > BACKLOG).then_some(backlog.first)
    }

    /// What waits, unless the frontier is far away: what was here before is being hashed then.
    fn backlog(&self) -> Option<Backlog> {
        let waiting = self.waiting.lock();
        let &first = waiting.keys().next()?;
        // The last one that was hashed, or the one that is.
        let hashed = self.hashed.load(Ordering::Relaxed);
        (first <= hashed + 2 * BACKLOG).then_some(Backlog {
            first,
            chunks: waiting.len() as u64,
            has_gap: first > hashed + 1,
        })
    }

    /// Notes a chunk that was committed to `generation`; its content is kept for a while if there
    /// is one.
    pub(super) fn offer(&self, index: u64, generation: u32, data: Option<&Arc<ChunkBuf>>) {
        self.waiting
            .lock()
            .insert(index, (generation, data.map(Arc::clone)));
    }

    /// Lets go of the content of a chunk that waits: its memory may be needed for the chunk at the
    /// frontier to arrive.
    pub(super) fn withdraw(&self, index: u64) {
        if let Some((_, data)) = self.waiting.lock().get_mut(&index) {
            *data = None;
        }
    }

    /// Hashes as far as the chunks that are here go, unless another thread is at it, which then
    /// does so. Blocking.
    pub(super) fn advance(
        &self,
        object: &Object,
        partial: &Partial,
        cached: bool,
    ) -> Result<(), StoreError> {
        // Look again after letting go: a chunk may have come between the last look and that.
        while let Some(mut frontier) = self.frontier.try_lock() {
            let before = frontier.next;
            self.hash_on(&mut frontier, object, partial, cached)?;
            if frontier.next <= before {
                break;
            }
        }
        Ok(())
    }

    /// Hashes from the frontier on, from memory or from the store; from there through the page
    /// cache, if the bytes are `cached`. What the disk does not give back is absent from then on, in
    /// another generation.
    fn hash_on(
        &self,
        frontier: &mut Frontier,
        object: &Object,
        partial: &Partial,
        cached: bool,
    ) -> Result<(), StoreError> {
        let generation = partial.generation();
        if frontier.generation != generation {
            *frontier = Frontier::new(object, generation);
        }
        while frontier.next < partial.chunks() && partial.present(frontier.next) {
            let index = frontier.next;
            self.hashed.store(index, Ordering::Relaxed);
            if let Some(data) = self.take(index, generation) {
                frontier.update(data.filled());
                continue;
            }
            // It did not fit into the backlog, or was here before.
            let bytes = chunk::bytes(index, partial.size());
            let mut buffer = vec![0; (bytes.end - bytes.start) as usize];
            let read = match cached {
                true => partial.read_at(&mut buffer, bytes.start),
                false => partial.read_past_cache(&mut buffer, bytes.start),
            };
            if let Err(error) = read {
                tracing::warn!(object = %partial.id(), chunk = index, %error, "the disk does not give back a chunk");
                partial.lose(index, generation)?;
                return Err(error);
            }
            frontier.update(&buffer);
        }
        Ok(())
    }

    /// Hashes the rest, reading it back from the store, and judges; `None` where a chunk is absent, as
    /// after another process has discarded it. Blocking.
    pub(super) fn judge(
        &self,
        object: &Object,
        partial: &Partial,
        cached: bool,
    ) -> Result<Option<Verdict>, StoreError> {
        let mut frontier = self.frontier.lock();
        self.hash_on(&mut frontier, object, partial, cached)?;
        if frontier.next < partial.chunks() {
            return Ok(None);
        }
        let sha256 = Digest::from_bytes(frontier.sha256.clone().finalize().into());
        let sha1 = frontier.sha1.clone().map(|h| h.finalize().into());
        Ok(Some(verdict(object, sha256, sha1, frontier.generation)))
    }

    fn take(&self, index: u64, generation: u32) -> Option<Arc<ChunkBuf>> {
        let mut waiting = self.waiting.lock();
        while waiting.keys().next().is_some_and(|&first| first < index) {
            waiting.pop_first();
        }
        let (committed, data) = waiting.remove(&index)?;
        data.filter(|_| committed == generation)
    }
}

impl Frontier {
    fn new(object: &Object, generation: u32) -> Self {
        Self {
            generation,
            next: 0,
            sha256: Sha256::new(),
            sha1: object.git_sha1.map(|_| git_hasher(object.size)),
        }
    }

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
    verdict(object, Digest::of(data), sha1, 0)
}

fn verdict(object: &Object, sha256: Digest, sha1: Option<[u8; 20]>, generation: u32) -> Verdict {
    if let ObjectId::Sha256(expected) = object.id
        && expected != sha256
    {
        return Verdict::Bad {
            expected: expected.to_string(),
            found: sha256.to_string(),
            generation,
        };
    }
    match (object.git_sha1, sha1) {
        (Some(expected), Some(found)) if expected != found => Verdict::Bad {
            expected: format!("git:{}", crate::digest::to_hex(&expected)),
            found: format!("git:{}", crate::digest::to_hex(&found)),
            generation,
        },
        _ => Verdict::Good(sha256, generation),
    }
}

/// A git blob is hashed as `blob <size>\0<content>` (gitformat-pack, "Object names").
fn git_hasher(size: u64) -> Sha1 {
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {size}\0"));
    hasher
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Location, Recipe};

    #[test]
    fn a_gap_holds_fetching_back_later_than_hashing_does_and_is_looked_after_before() {
        let object = || Object {
            id: ObjectId::Sha256(Digest::of(b"x")),
            size: 1 << 30,
            git_sha1: None,
            recipe: Recipe::Raw(Location {
                path: "x".into(),
                generation: None,
                offset: 0,
            }),
        };
        let offered_until = |first: u64, is_so: fn(&Verifier) -> bool| {
            let verifier = Verifier::new(&object());
            let mut chunks = first..1000;
            while !is_so(&verifier) {
                verifier.offer(chunks.next()?, 0, None);
            }
            Some(chunks.start - first)
        };
        let is_behind = |verifier: &Verifier| verifier.is_behind();
        let has_gap = |verifier: &Verifier| verifier.after_gap().is_some();
        let at = [1, 4].map(|first| {
            (
                offered_until(first, is_behind),
                offered_until(first, has_gap),
            )
        });
        assert_eq!(at[0], (Some(BACKLOG + 1), None), "the hasher is at work");
        let (most, some) = (BACKLOG_OF_GAP + 1, BACKLOG + 1);
        assert_eq!(at[1], (Some(most), Some(some)), "a chunk is missing");
    }
}
