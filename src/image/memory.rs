//! [`Memory`]: what decoding may take, of a whole process, however many layers and images there are.
//!
//! Shares, none of which waits for another: windows of zstd that are larger than usual, which layers hold while they are
//! unpacked; large spans, from before they are fetched; other spans, while they are decoded; decoded spans that are kept.
//! Who waits for one holds nothing of it, and what does not fit into one takes all of it. What else a layer takes while it
//! is unpacked is bounded by how many are: `node` sees to that. Called by [`super::Decoder`] and [`super::LayerSource`].

use std::sync::Arc;

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::span::Cache;

/// A window that every decoder of zstd may have, in bytes: what RFC 8878 (3.1.1.1.2) has all decoders support.
pub(super) const USUAL_WINDOW: u64 = 8 << 20;
/// All larger windows together; one of `zstd --long` or `--ultra -22` takes as much.
const WINDOWS: u64 = 128 << 20;
/// Spans that take more than this to decode are large: each waits for its memory before it is fetched.
const LARGE_SPAN: u64 = 12 << 20;
/// All large spans together.
const LARGE_SPANS: u32 = 128 << 20;
/// All other spans that are being decoded.
const SPANS: u32 = 64 << 20;

/// Memory for decoding: one for a process.
pub struct Memory {
    pub(super) cache: Cache,
    windows: Arc<Windows>,
    spans: Arc<Semaphore>,
    large_spans: Arc<Semaphore>,
    /// What a span takes at least, so that no more are decoded at once than there are processors.
    least: u32,
}

impl Memory {
    /// Keeps up to `cache` bytes of decoded spans.
    pub fn new(cache: usize) -> Arc<Self> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Self {
            cache: Cache::new(cache),
            windows: Arc::new(Windows::new(WINDOWS)),
            spans: Arc::new(Semaphore::new(SPANS as usize)),
            large_spans: Arc::new(Semaphore::new(LARGE_SPANS as usize)),
            least: SPANS / (processors as u32).clamp(1, 1024),
        })
    }

    /// For a window of `bytes`, where it is larger than usual. Blocks until other decoders have ended; `waits` is called
    /// before that, if it is not there at once.
    pub(super) fn window(&self, bytes: u64, waits: &mut dyn FnMut()) -> Option<Window> {
        (bytes > USUAL_WINDOW).then(|| Windows::take(&self.windows, bytes, waits))
    }

    /// How many windows were asked for.
    #[cfg(test)]
    pub(super) fn asked(&self) -> u64 {
        self.windows.state.lock().next
    }

    /// For decoding a span that takes `bytes`: before it is fetched, if it is a large one.
    pub(super) async fn large_span(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        if bytes <= LARGE_SPAN {
            return None;
        }
        let share = u32::try_from(bytes).map_or(LARGE_SPANS, |bytes| bytes.min(LARGE_SPANS));
        let permit = Arc::clone(&self.large_spans).acquire_many_owned(share);
        permit.await.ok()
    }

    /// For decoding a span that takes `bytes` and is not large, when its compressed bytes are here.
    pub(super) async fn span(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let bytes = u32::try_from(bytes).unwrap_or(SPANS);
        let share = bytes.clamp(self.least, SPANS);
        let permit = Arc::clone(&self.spans).acquire_many_owned(share);
        permit.await.ok()
    }
}

/// Bytes for windows, given in the order in which they are asked for, so that small ones do not keep a large one waiting
/// for ever.
struct Windows {
    all: u64,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    free: u64,
    /// Who asks next is this one.
    next: u64,
    /// Whose turn it is.
    turn: u64,
}

/// Bytes of [`Windows`], given back when dropped.
pub(super) struct Window {
    of: Arc<Windows>,
    bytes: u64,
}

impl Windows {
    fn new(all: u64) -> Self {
        Self {
            all,
            state: Mutex::new(State {
                free: all,
                next: 0,
                turn: 0,
            }),
            changed: Condvar::new(),
        }
    }

    fn take(this: &Arc<Self>, bytes: u64, waits: &mut dyn FnMut()) -> Window {
        let bytes = bytes.min(this.all);
        let mut state = this.state.lock();
        let mine = state.next;
        state.next += 1;
        if state.turn != mine || state.free < bytes {
            MutexGuard::unlocked(&mut state, waits);
        }
        while state.turn != mine || state.free < bytes {
            this.changed.wait(&mut state);
        }
        state.turn += 1;
        state.free -= bytes;
        this.changed.notify_all();
        Window {
            of: Arc::clone(this),
            bytes,
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.of.state.lock().free += self.bytes;
        self.of.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn windows_are_bounded_for_all_together_and_come_in_turn() {
        let memory = Memory::new(0);
        let at_once: &mut dyn FnMut() = &mut || panic!("it is free");
        assert!(memory.window(USUAL_WINDOW, at_once).is_none());
        let half = memory.window(WINDOWS / 2, at_once).unwrap();
        std::thread::scope(|scope| {
            let (send, got) = mpsc::channel();
            // The second one would fit, and the first one never came, if it did not wait for its turn.
            for (at, bytes) in [u64::MAX, 2 * USUAL_WINDOW].into_iter().enumerate() {
                let (memory, send) = (&memory, send.clone());
                scope.spawn(move || {
                    let mut waited = 0;
                    let window = memory.window(bytes, &mut || waited += 1).unwrap();
                    assert_eq!(waited, 1);
                    send.send(window.bytes).unwrap();
                });
                while memory.asked() < at as u64 + 2 {
                    std::thread::yield_now();
                }
            }
            assert!(got.try_recv().is_err());
            drop(half);
            assert_eq!(got.recv().unwrap(), WINDOWS);
            assert_eq!(got.recv().unwrap(), 2 * USUAL_WINDOW);
        });
        assert_eq!(memory.windows.state.lock().free, WINDOWS);
    }

    #[tokio::test]
    async fn spans_are_bounded_for_all_together() {
        let memory = Memory::new(0);
        assert!(memory.large_span(LARGE_SPAN).await.is_none());
        let large = memory.large_span(u64::MAX).await.unwrap();
        assert_eq!(memory.large_spans.available_permits(), 0);
        // The others do not wait for it.
        let small = memory.span(1).await.unwrap();
        let taken = SPANS as usize - memory.spans.available_permits();
        assert_eq!(taken, memory.least as usize);
        drop((large, small));
        assert_eq!(memory.large_spans.available_permits(), LARGE_SPANS as usize);
        assert_eq!(memory.spans.available_permits(), SPANS as usize);
    }
}
