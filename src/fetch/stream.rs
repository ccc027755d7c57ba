//! Finds sequential streams among the reads of one object, whoever makes them.
//!
//! A read that goes on where an earlier one ended is a stream; its window doubles with every
//! extension, from [`FIRST_WINDOW`] to [`MAX_WINDOW`]. A reader that jumps never gets more than
//! the chunks it touches.

use std::ops::Range;

use crate::chunk::CHUNK_SIZE;

/// Read ahead of a stream that has just been recognised, in bytes.
const FIRST_WINDOW: u64 = 2 * CHUNK_SIZE;
/// Read ahead of a long stream, in bytes.
const MAX_WINDOW: u64 = 32 * CHUNK_SIZE;
/// Streams remembered per object.
const MAX_STREAMS: usize = 16;
/// A stream is recognised once this much was read in order.
const RECOGNISED: u64 = 256 << 10;
/// How far a read may be from where the stream is expected: the kernel reads ahead in parallel, so
/// requests of one stream overtake each other.
const SLACK: u64 = 2 * CHUNK_SIZE;

#[derive(Debug)]
struct Stream {
    /// Where the next read is expected.
    next: u64,
    /// Bytes read in order so far.
    length: u64,
    /// Up to where read-ahead has been asked for.
    ahead: u64,
    window: u64,
    used: u64,
}

/// The streams of one object.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: Vec<Stream>,
    clock: u64,
}

impl Streams {
    /// Notes a read of `bytes` and returns what to read ahead, if anything. `hint` is how far the
    /// reader can be expected to go on from here (a tensor's end), where that is known.
    pub(super) fn note(
        &mut self,
        bytes: &Range<u64>,
        size: u64,
        hint: Option<u64>,
    ) -> Option<Range<u64>> {
        self.clock += 1;
        let found = self
            .streams
            .iter_mut()
            .find(|s| bytes.start <= s.next + SLACK && bytes.start + SLACK.min(s.length) >= s.next);
        let Some(stream) = found else {
            let ahead = hint.map(|end| end.min(bytes.end + MAX_WINDOW / 2).min(size));
            self.remember(Stream {
                next: bytes.end,
                length: bytes.end - bytes.start,
                ahead: ahead.unwrap_or(0),
                window: FIRST_WINDOW,
                used: self.clock,
            });
            return ahead
                .filter(|&end| end > bytes.end)
                .map(|end| bytes.end..end);
        };
        stream.used = self.clock;
        stream.length += bytes.end.saturating_sub(stream.next.max(bytes.start));
        stream.next = stream.next.max(bytes.end);
        if stream.length < RECOGNISED {
            return None;
        }
        let from = stream.ahead.max(stream.next).min(size);
        if from >= size || from - stream.next > stream.window / 2 {
            return None;
        }
        let to = (stream.next + stream.window).max(from).min(size);
        stream.window = (stream.window * 2).min(MAX_WINDOW);
        stream.ahead = to;
        (from < to).then_some(from..to)
    }

    fn remember(&mut self, stream: Stream) {
        if self.streams.len() >= MAX_STREAMS
            && let Some(oldest) = (0..self.streams.len()).min_by_key(|&i| self.streams[i].used)
        {
            self.streams.swap_remove(oldest);
        }
        self.streams.push(stream);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    const MIB: u64 = 1 << 20;

    #[test]
    fn a_sequential_reader_gets_a_growing_window() {
        let mut streams = Streams::default();
        let size = 1 << 30;
        let (mut ahead, mut requests) = (0, 0);
        for i in 0..1024 {
            let bytes = i * MIB / 8..(i + 1) * MIB / 8;
            if let Some(range) = streams.note(&bytes, size, None) {
                assert!(range.start >= ahead, "never asks twice");
                assert!(range.end <= bytes.end + MAX_WINDOW);
                (ahead, requests) = (range.end, requests + 1);
            }
        }
        assert!(ahead >= 128 * MIB + MAX_WINDOW / 2, "{ahead}");
        assert!(requests < 30, "{requests}");
    }

    #[test]
    fn a_random_reader_gets_nothing() {
        let mut streams = Streams::default();
        let mut x = 12345u64;
        for _ in 0..10_000 {
            x = x
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let at = ((x >> 20) % (1 << 40)) & !4095;
            assert_eq!(streams.note(&(at..at + 4096), 1 << 40, None), None);
        }
        assert!(streams.streams.len() <= MAX_STREAMS);
    }

    #[test]
    fn two_readers_of_one_object_are_two_streams() {
        let mut streams = Streams::default();
        let mut asked = [0, 0];
        for i in 0..64 {
            for (reader, base) in [0, 1 << 35].into_iter().enumerate() {
                let at = base + i * MIB;
                if streams.note(&(at..at + MIB), 1 << 40, None).is_some() {
                    asked[reader] += 1;
                }
            }
        }
        assert!(asked[0] > 3 && asked[1] > 3, "{asked:?}");
    }

    #[test]
    fn a_hint_opens_the_window_at_once() {
        let mut streams = Streams::default();
        let ahead = streams.note(&(0..MIB), 1 << 40, Some(12 * MIB));
        assert_eq!(ahead, Some(MIB..12 * MIB));
        let ahead = streams.note(&(1 << 30..(1 << 30) + MIB), 1 << 40, Some(2 << 30));
        let limit = (1 << 30) + MIB + MAX_WINDOW / 2;
        assert_eq!(ahead, Some((1 << 30) + MIB..limit), "but not for ever");
    }
}
