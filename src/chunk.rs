//! Chunk arithmetic: the unit of presence, fetch and verification of a large object.

use std::ops::Range;

/// Bytes in a chunk; the last chunk of an object may be shorter.
pub const CHUNK_SIZE: u64 = 1 << 20;

/// Number of chunks in an object of `size` bytes.
pub const fn count(size: u64) -> u64 {
    size.div_ceil(CHUNK_SIZE)
}

/// The bytes of chunk `index` in an object of `size` bytes.
pub const fn bytes(index: u64, size: u64) -> Range<u64> {
    let start = index * CHUNK_SIZE;
    let end = start + CHUNK_SIZE;
    start..if end < size { end } else { size }
}

/// The bytes of a run of chunks in an object of `size` bytes.
pub fn run_bytes(chunks: &Range<u64>, size: u64) -> Range<u64> {
    (chunks.start * CHUNK_SIZE).min(size)..(chunks.end * CHUNK_SIZE).min(size)
}

/// The chunks that hold any of `bytes`.
pub fn covering(bytes: &Range<u64>) -> Range<u64> {
    if bytes.is_empty() {
        return 0..0;
    }
    bytes.start / CHUNK_SIZE..bytes.end.div_ceil(CHUNK_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges() {
        assert_eq!(count(0), 0);
        assert_eq!(count(1), 1);
        assert_eq!(count(CHUNK_SIZE), 1);
        assert_eq!(count(CHUNK_SIZE + 1), 2);
        assert_eq!(bytes(1, CHUNK_SIZE + 5), CHUNK_SIZE..CHUNK_SIZE + 5);
        assert_eq!(covering(&(0..0)), 0..0);
        assert_eq!(covering(&(CHUNK_SIZE - 1..CHUNK_SIZE + 1)), 0..2);
        assert_eq!(run_bytes(&(0..2), CHUNK_SIZE + 5), 0..CHUNK_SIZE + 5);
    }
}
