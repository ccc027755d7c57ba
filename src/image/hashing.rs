//! The hashes of a layer while it is decoded, on a thread of their own.
//!
//! The thread starts when there is enough to do for it, has a short queue, and ends with the
//! decoder.

use std::{
    sync::mpsc::{SyncSender, sync_channel},
    thread::JoinHandle,
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::{ImageError, SpanDigest, decode::Probe, inflate::Inflate};
use crate::digest::Digest;

/// Pieces that may wait for the thread.
const QUEUE: usize = 4;
/// Bytes for which no thread is started.
const FEW: usize = 512 << 10;

/// What was found.
pub(super) struct Hashes {
    /// Of all data.
    pub(super) whole: Digest,
    /// Of the data before the first cut, between cuts, and after the last one.
    pub(super) spans: Vec<SpanDigest>,
    /// The windows of the spans that were probed.
    pub(super) windows: Vec<(usize, Box<[u8]>)>,
}

enum Work {
    Data(Bytes),
    Cut,
    Probe(Probe),
}

#[derive(Default)]
struct State {
    whole: Sha256,
    span: blake3::Hasher,
    spans: Vec<SpanDigest>,
    windows: Vec<(usize, Box<[u8]>)>,
    inflate: Option<Inflate>,
    failed: Option<ImageError>,
}

/// Hashes what it is given.
pub(super) struct Hasher {
    place: Place,
    /// Bytes so far, up to [`FEW`].
    bytes: usize,
}

enum Place {
    /// Here: there was not much so far, or no thread could be had.
    Here(Box<State>),
    Thread {
        work: SyncSender<Work>,
        thread: JoinHandle<Box<State>>,
    },
}

impl Hasher {
    pub(super) fn new() -> Self {
        Self {
            place: Place::Here(Box::default()),
            bytes: 0,
        }
    }

    /// Hashes `data`.
    pub(super) fn data(&mut self, data: Bytes) -> Result<(), ImageError> {
        if self.bytes < FEW {
            self.bytes += data.len();
            if self.bytes >= FEW {
                self.start_thread();
            }
        }
        self.send(Work::Data(data))
    }

    /// Ends a span.
    pub(super) fn cut(&mut self) -> Result<(), ImageError> {
        self.send(Work::Cut)
    }

    /// Finds what is needed of a window.
    pub(super) fn probe(&mut self, probe: Probe) -> Result<(), ImageError> {
        self.send(Work::Probe(probe))
    }

    /// All of it.
    pub(super) fn finish(self) -> Result<Hashes, ImageError> {
        let mut state = match self.place {
            Place::Here(state) => state,
            Place::Thread { work, thread } => {
                drop(work);
                thread.join().map_err(|_| gone())?
            }
        };
        if let Some(error) = state.failed.take() {
            return Err(error);
        }
        state.work(Work::Cut);
        Ok(Hashes {
            whole: Digest::from_bytes(state.whole.finalize().into()),
            spans: state.spans,
            windows: state.windows,
        })
    }

    fn send(&mut self, item: Work) -> Result<(), ImageError> {
        match &mut self.place {
            Place::Here(state) => {
                state.work(item);
                Ok(())
            }
            Place::Thread { work, .. } => work.send(item).map_err(|_| gone()),
        }
    }

    /// Moves to a thread, if one can be had.
    fn start_thread(&mut self) {
        let (work, queue) = sync_channel(QUEUE);
        let (hand_over, state) = sync_channel::<Box<State>>(1);
        let thread = std::thread::Builder::new().name("layer-hash".into());
        let thread = thread.spawn(move || {
            let mut state = state.recv().unwrap_or_default();
            for item in queue {
                state.work(item);
            }
            state
        });
        if let Ok(thread) = thread
            && let Place::Here(state) =
                std::mem::replace(&mut self.place, Place::Thread { work, thread })
        {
            // The thread waits for it.
            let _ = hand_over.send(state);
        }
    }
}

impl State {
    fn work(&mut self, work: Work) {
        match work {
            Work::Data(data) => {
                self.whole.update(&data);
                self.span.update(&data);
            }
            Work::Cut => {
                let digest = SpanDigest::Blake3(self.span.finalize().into());
                self.spans.push(digest);
                self.span.reset();
            }
            Work::Probe(probe) => {
                let span = probe.span;
                match self.window(probe) {
                    Ok(window) => self.windows.push((span, window)),
                    Err(error) => self.failed = Some(error),
                }
            }
        }
    }

    fn window(&mut self, probe: Probe) -> Result<Box<[u8]>, ImageError> {
        let inflate = match &mut self.inflate {
            Some(inflate) => inflate,
            none => none.insert(Inflate::gzip()?),
        };
        probe.into_window(inflate)
    }
}

fn gone() -> ImageError {
    ImageError::invalid("the thread that hashes it has ended")
}
