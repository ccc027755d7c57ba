//! A stream of zstd, frame by frame: what window a frame asks for is known, and there is room for it, before it is decoded.

use std::sync::Arc;

use zstd::stream::raw::{self as zstd_raw, Operation as _};

use super::{BLOCK, Out, STEP, Track};
use crate::image::{
    ImageError,
    memory::{Memory, USUAL_WINDOW, Window},
};

/// Largest window that a frame may ask for, as a power of two: what `zstd` itself grants.
const WINDOW_LOG: u32 = 27;

/// Called before it is waited for a window.
type Waits = Box<dyn FnMut() + Send>;

pub(super) struct Frames {
    decoder: zstd_raw::Decoder<'static>,
    /// Whether a frame has begun and not ended.
    inside: bool,
    /// Frames that have ended.
    count: u64,
    /// The start of the next frame, as long as that does not tell its window.
    head: Vec<u8>,
    /// Where room for windows comes from; without it they are only limited one by one.
    memory: Option<(Arc<Memory>, Waits)>,
    /// Room for the window that the decoder has, where that is larger than usual.
    room: Option<Window>,
    /// The largest window that there is room for.
    granted: u64,
}

impl Frames {
    pub(super) fn new() -> Result<Self, ImageError> {
        Ok(Self {
            decoder: zstd_decoder()?,
            inside: false,
            count: 0,
            head: Vec::new(),
            memory: None,
            room: None,
            granted: USUAL_WINDOW,
        })
    }

    pub(super) fn take_room_from(&mut self, memory: Arc<Memory>, waits: Waits) {
        self.memory = Some((memory, waits));
    }

    /// Whether whole frames were fed, and at least one.
    pub(super) fn is_whole(&self) -> bool {
        !self.inside && self.head.is_empty() && self.count > 0
    }

    pub(super) fn feed<E: From<ImageError>>(
        &mut self,
        track: &mut Track,
        compressed: &[u8],
        out: &mut Out<'_, E>,
    ) -> Result<(), E> {
        let mut rest = compressed;
        // Decoded bytes may wait inside after all input was taken, but only if the output was full.
        let mut full = self.inside;
        while !rest.is_empty() || full {
            if !self.inside {
                if track.decoded() >= STEP {
                    track.cut(0)?;
                }
                if !self.begin(&mut rest)? {
                    return Ok(());
                }
                let head = std::mem::take(&mut self.head);
                let mut head = &head[..];
                while !head.is_empty() {
                    self.step(track, &mut head, out)?;
                }
            }
            let Some(is_full) = self.step(track, &mut rest, out)? else {
                break;
            };
            full = is_full;
        }
        Ok(())
    }

    /// Takes from `input` what tells the window of the next frame, and makes sure that there is room for it; false where
    /// that has not all come.
    fn begin(&mut self, input: &mut &[u8]) -> Result<bool, ImageError> {
        let window = loop {
            if let Some(window) = window_of(&self.head) {
                break window;
            }
            let Some((byte, rest)) = input.split_first() else {
                return Ok(false);
            };
            self.head.push(*byte);
            *input = rest;
        };
        if window > self.granted
            && let Some((memory, waits)) = &mut self.memory
        {
            // What it had goes first: who waits here holds nothing that others wait for.
            self.decoder = zstd_decoder()?;
            self.room = None;
            self.room = memory.window(window, waits);
            self.granted = window;
        }
        Ok(true)
    }

    /// Decodes some of `input`; whether there is more to come without more of it. `None` where there is nothing to do.
    fn step<E: From<ImageError>>(
        &mut self,
        track: &mut Track,
        input: &mut &[u8],
        out: &mut Out<'_, E>,
    ) -> Result<Option<bool>, E> {
        let step = run_zstd(&mut self.decoder, input, track.room())?;
        if step.bytes_read == 0 && step.bytes_written == 0 {
            if input.is_empty() {
                return Ok(None);
            }
            return Err(ImageError::invalid("its zstd stream is broken").into());
        }
        *input = &input[step.bytes_read..];
        self.inside = step.remaining > 0;
        self.count += u64::from(!self.inside);
        track.blob_size += step.bytes_read as u64;
        track.emit(step.bytes_written, out)?;
        Ok(Some(step.bytes_written == BLOCK && step.remaining > 0))
    }
}

/// The window that a frame asks for which begins with `head` (RFC 8878, 3.1.1.1); 0 for what is no frame with content.
/// `None` where it takes more to tell.
fn window_of(head: &[u8]) -> Option<u64> {
    const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
    const SINGLE_SEGMENT: u8 = 0x20;
    let (magic, rest) = head.split_at_checked(MAGIC.len())?;
    if magic != MAGIC {
        return Some(0);
    }
    let (&descriptor, rest) = rest.split_first()?;
    if descriptor & SINGLE_SEGMENT == 0 {
        let &window = rest.first()?;
        let base = 1u64 << (10 + (window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    // It has no window of its own: that is all of its content.
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let len = 1 << (descriptor >> 6);
    let size = rest.get(dictionary..dictionary + len)?;
    let size = size
        .iter()
        .rev()
        .fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    Some(size.saturating_add(if len == 2 { 256 } else { 0 }))
}

pub(in crate::image) fn zstd_decoder() -> Result<zstd_raw::Decoder<'static>, ImageError> {
    let decoder = zstd_raw::Decoder::new().and_then(|mut decoder| {
        let most = zstd_raw::DParameter::WindowLogMax(WINDOW_LOG);
        decoder.set_parameter(most).map(|()| decoder)
    });
    decoder.map_err(|error| broken(&error))
}

pub(in crate::image) fn run_zstd(
    decoder: &mut zstd_raw::Decoder<'static>,
    input: &[u8],
    output: &mut [u8],
) -> Result<zstd_raw::Status, ImageError> {
    let step = decoder.run_on_buffers(input, output);
    step.map_err(|error| broken(&error))
}

fn broken(error: &std::io::Error) -> ImageError {
    ImageError::invalid(format!("its zstd stream is broken: {error}"))
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::*;
    use crate::image::{Compression, Decoder};

    /// A frame with a window of `1 << log` bytes.
    fn frame(content: &[u8], log: u32) -> Vec<u8> {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(log).unwrap();
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn windows_are_told_by_the_first_bytes_of_a_frame() {
        let single = |len| (zstd::bulk::compress(&vec![7; len], 1).unwrap(), len as u64);
        let mut frames = vec![(vec![0x5e, 0x2a, 0x4d, 0x18, 0, 0, 0, 0], 0)];
        frames.extend([5, 255, 256, 300, 65_791, 65_792, 200_000].map(single));
        frames.extend([10, 20, 23, 27].map(|log| (frame(b"some", log), 1 << log)));
        for (bytes, window) in frames {
            let told: Vec<_> = (0..bytes.len())
                .filter_map(|len| window_of(&bytes[..len]))
                .collect();
            assert!(!told.is_empty(), "{bytes:?}");
            assert!(told.iter().all(|told| *told == window), "{told:?} {window}");
        }
    }

    #[test]
    fn a_large_window_waits_for_others() {
        let memory = Memory::new(0);
        let others = memory.window(u64::MAX, &mut || ());
        let data = [b"usual".repeat(1000), b"large".repeat(1000)];
        let blob = [
            frame(&data[0], 20),
            vec![0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 9],
            frame(&data[1], 27),
            zstd::bulk::compress(&data[0], 1).unwrap(),
        ]
        .concat();
        let decode = |piece: usize| {
            let mut decoder = Decoder::new(Compression::Zstd, 1 << 20).unwrap();
            let waited = Arc::new(AtomicUsize::new(0));
            let waits = Arc::clone(&waited);
            decoder = decoder.within(&memory, move || {
                waits.fetch_add(1, Ordering::Relaxed);
            });
            let mut out = Vec::new();
            for piece in blob.chunks(piece) {
                let mut take = |bytes: bytes::Bytes| {
                    out.extend_from_slice(&bytes);
                    Ok::<_, ImageError>(())
                };
                decoder.feed(piece, &mut take).unwrap();
            }
            assert_eq!(decoder.finish().unwrap().blob_size, blob.len() as u64);
            (out, waited.load(Ordering::Relaxed))
        };
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| decode(1));
            while memory.asked() < 2 {
                std::thread::yield_now();
            }
            assert!(!waiting.is_finished());
            drop(others);
            let all = [&data[0][..], &data[1], &data[0]].concat();
            assert!(waiting.join().unwrap() == (all.clone(), 1));
            // And gives back what it had.
            assert!([7, 1 << 20].map(decode) == [(all.clone(), 0), (all, 0)]);
        });
    }
}
