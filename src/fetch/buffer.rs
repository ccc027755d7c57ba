//! Chunk buffers: where bytes in flight live, within a fixed budget.
//!
//! A buffer has one [`ChunkWriter`], which appends, and any number of readers, which see the
//! filled prefix while it grows. The memory is page aligned, so that it can be written past the
//! page cache; where the system has huge pages it is made of those, so that a chunk is one piece for the
//! disk, not 256. Dropping the last reference returns the memory and its share of the budget.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use memmap2::{Advice, MmapMut};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{chunk::CHUNK_SIZE, limits, metrics};

/// Buffers kept for reuse when idle; the rest goes back to the system.
const IDLE_BUFFERS: usize = 2;
/// What is taken from the system at a time, in bytes: two buffers, and a huge page of x86-64, and of arm64 with its
/// usual pages. Linux places a mapping of this size so that it can be one.
const SLAB: usize = 2 * CHUNK_SIZE as usize;

/// The budget of chunk buffers, in shares none of which waits for another.
pub(super) struct Pool {
    background: Arc<Semaphore>,
    demand: Arc<Semaphore>,
    /// Of objects that are made from other objects: who holds one waits for those.
    made: [Arc<Semaphore>; 2],
    idle: Mutex<Vec<Memory>>,
    /// Idle buffers to keep while work is under way.
    keep: usize,
}

impl Pool {
    /// Bytes of the smallest budget.
    pub(super) const LEAST: u64 = 8 * CHUNK_SIZE;

    /// A budget of `bytes`, or the smallest; a quarter is set aside for demand, an eighth for what is
    /// made from other objects.
    pub(super) fn new(bytes: u64) -> Arc<Self> {
        let chunks = (bytes.max(Self::LEAST) / CHUNK_SIZE) as usize;
        let (demand, made) = (chunks / 4, (chunks / 16).max(1));
        Arc::new(Self {
            background: Arc::new(Semaphore::new(chunks - demand - 2 * made)),
            demand: Arc::new(Semaphore::new(demand)),
            made: [made, made].map(|made| Arc::new(Semaphore::new(made))),
            idle: Mutex::new(Vec::new()),
            keep: chunks,
        })
    }

    /// A buffer for `len` bytes (at most one chunk) of an object that is, or is not, `made` from other
    /// objects; waits for its share of the budget.
    pub(super) async fn take(
        self: &Arc<Self>,
        len: usize,
        demand: bool,
        made: bool,
    ) -> std::io::Result<ChunkWriter> {
        let share = match (made, demand) {
            (true, demand) => &self.made[usize::from(demand)],
            (false, true) => &self.demand,
            (false, false) => &self.background,
        };
        let permit = Arc::clone(share)
            .acquire_owned()
            .await
            .map_err(|_| std::io::Error::other("the buffer pool is closed"))?;
        let reused = self.idle.lock().pop();
        let memory = match reused {
            Some(memory) => memory,
            None => self.grow()?,
        };
        metrics::global().fetch_buffers.add(CHUNK_SIZE);
        Ok(ChunkWriter {
            buf: Arc::new(ChunkBuf {
                base: memory.base,
                len: len.min(CHUNK_SIZE as usize),
                filled: AtomicUsize::new(0),
                memory: Some(memory),
                pool: Arc::clone(self),
                _permit: permit,
            }),
        })
    }

    /// Memory for a buffer, new from the system; that for a second one comes with it, and is idle.
    fn grow(&self) -> std::io::Result<Memory> {
        let mut map = MmapMut::map_anon(SLAB)?;
        // Without huge pages it is slower, no more.
        let _ = map.advise(Advice::HugePage);
        let base = map.as_mut_ptr();
        let slab = Arc::new(map);
        let [first, second] = [0, CHUNK_SIZE as usize].map(|at| Memory {
            // SAFETY: within the mapping, which `slab` keeps.
            base: unsafe { base.add(at) },
            slab: Arc::clone(&slab),
        });
        self.idle.lock().push(second);
        Ok(first)
    }

    /// Whether so much of the background share is free that some may be held for a while.
    pub(super) fn is_roomy(&self) -> bool {
        self.background.available_permits() > self.keep / 4
    }

    /// Gives idle memory back to the system.
    pub(super) fn shrink(&self) {
        let mut surplus = Vec::new();
        {
            let mut idle = self.idle.lock();
            idle.sort_unstable_by_key(|memory| memory.base.addr());
            let mut at = idle.len();
            // Half a slab gives nothing back while the other half is in use: it waits for its next use.
            while at >= 2 && idle.len() > IDLE_BUFFERS {
                match Arc::ptr_eq(&idle[at - 2].slab, &idle[at - 1].slab) {
                    true => {
                        surplus.extend(idle.drain(at - 2..at));
                        at -= 2;
                    }
                    false => at -= 1,
                }
            }
        }
        drop(surplus);
        // And what was freed elsewhere: bodies of the network.
        limits::give_memory_back();
    }
}

/// Memory of one chunk: a part of a slab that nobody else uses.
struct Memory {
    base: *mut u8,
    slab: Arc<MmapMut>,
}

// SAFETY: `base` points into the slab, which lives as long, at bytes that belong to this alone.
unsafe impl Send for Memory {}

/// The content of one chunk as it arrives.
pub(super) struct ChunkBuf {
    base: *mut u8,
    len: usize,
    filled: AtomicUsize,
    memory: Option<Memory>,
    pool: Arc<Pool>,
    _permit: OwnedSemaphorePermit,
}

// SAFETY: `base` points into `memory`, which lives as long as the buffer. Bytes below `filled` are
// never written again; bytes from `filled` on are touched only by the one `ChunkWriter`.
unsafe impl Send for ChunkBuf {}
// SAFETY: as above; `filled` is atomic, and its Release store orders the bytes before it.
unsafe impl Sync for ChunkBuf {}

impl ChunkBuf {
    /// The bytes that have arrived.
    pub(super) fn filled(&self) -> &[u8] {
        let filled = self.filled.load(Ordering::Acquire);
        // SAFETY: `filled <= len`, which is at most a chunk; these bytes are initialised (anonymous memory is
        // zeroed) and are not written any more.
        unsafe { std::slice::from_raw_parts(self.base, filled) }
    }
}

impl Drop for ChunkBuf {
    fn drop(&mut self) {
        metrics::global().fetch_buffers.sub(CHUNK_SIZE);
        if let Some(memory) = self.memory.take() {
            let mut idle = self.pool.idle.lock();
            if idle.len() < self.pool.keep {
                idle.push(memory);
            }
        }
    }
}

/// The one writer of a [`ChunkBuf`].
pub(super) struct ChunkWriter {
    buf: Arc<ChunkBuf>,
}

impl ChunkWriter {
    /// Appends as much of `data` as fits and says how much that was.
    pub(super) fn append(&mut self, data: &[u8]) -> usize {
        let filled = self.buf.filled.load(Ordering::Relaxed);
        let n = data.len().min(self.buf.len - filled);
        // SAFETY: `filled + n <= len`, which is at most a chunk, and this is the only writer (`&mut self`, one
        // writer per buffer); readers look only below `filled`.
        unsafe {
            std::ptr::copy_nonoverlapping(data.as_ptr(), self.buf.base.add(filled), n);
        }
        self.buf.filled.store(filled + n, Ordering::Release);
        n
    }

    /// Whether all bytes have arrived.
    pub(super) fn is_full(&self) -> bool {
        self.buf.filled.load(Ordering::Relaxed) == self.buf.len
    }

    /// Bytes that have arrived.
    pub(super) fn filled_len(&self) -> usize {
        self.buf.filled.load(Ordering::Relaxed)
    }

    /// The buffer, to read from.
    pub(super) fn buf(&self) -> &Arc<ChunkBuf> {
        &self.buf
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn readers_see_the_prefix_and_memory_comes_back() {
        let pool = Pool::new(8 * CHUNK_SIZE);
        let mut writer = pool.take(10, false, false).await.unwrap();
        let reader = Arc::clone(writer.buf());
        assert_eq!(writer.append(b"hello, "), 7);
        assert_eq!(reader.filled(), b"hello, ");
        assert_eq!(writer.append(b"world"), 3);
        assert!(writer.is_full());
        assert_eq!(reader.filled(), b"hello, wor");
        drop((writer, reader));
        assert_eq!(pool.background.available_permits(), 4);
        assert_eq!(pool.idle.lock().len(), 2, "one slab");
    }

    #[tokio::test]
    async fn slabs_go_back_whole() {
        let pool = Pool::new(32 * CHUNK_SIZE);
        let (mut held, mut halves) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            held.push(pool.take(1, false, false).await.unwrap());
            halves.push(pool.take(1, false, false).await.unwrap());
        }
        drop(halves);
        pool.shrink();
        assert_eq!(pool.idle.lock().len(), 3, "the other halves are in use");
        drop(held);
        pool.shrink();
        let idle = pool.idle.lock();
        assert_eq!(idle.len(), 2);
        assert!(Arc::ptr_eq(&idle[0].slab, &idle[1].slab));
    }

    #[tokio::test]
    async fn demand_does_not_wait_for_background_buffers() {
        let pool = Pool::new(8 * CHUNK_SIZE);
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(pool.take(1, false, false).await.unwrap());
        }
        let full = tokio::time::timeout(
            std::time::Duration::from_millis(20),
            pool.take(1, false, false),
        );
        assert!(full.await.is_err());
        pool.take(1, true, false).await.unwrap();
    }
}
