//! Where the tensors of a safetensors file lie, so that read-ahead knows how far a reader goes.
//!
//! Format: <https://huggingface.co/docs/safetensors/index#format>: a little-endian `u64` header
//! length, a JSON header of `{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, the data.
//! Only a hint is derived from it, so whatever is odd just gives none.

use std::{collections::HashMap, ops::Range};

/// Longest header looked at, in bytes; real ones are below 1 MiB.
const MAX_HEADER: u64 = 16 << 20;

/// Byte ranges of the tensors within the file, sorted by start.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tensors(Vec<Range<u64>>);

#[derive(serde::Deserialize)]
struct Tensor {
    data_offsets: Option<[u64; 2]>,
}

impl Tensors {
    /// Parses the header of a file of `size` bytes; `read` fills a buffer from an offset, where
    /// the bytes are here.
    pub(super) fn read(size: u64, read: impl Fn(u64, &mut [u8]) -> bool) -> Option<Self> {
        let mut length = [0; 8];
        if size < 8 || !read(0, &mut length) {
            return None;
        }
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER || length > size - 8 {
            return None;
        }
        let mut header = vec![0; length as usize];
        if !read(8, &mut header) {
            return None;
        }
        let tensors: HashMap<String, Tensor> = serde_json::from_slice(&header).ok()?;
        let base = 8 + length;
        let mut ranges: Vec<_> = tensors
            .into_values()
            .filter_map(|t| t.data_offsets)
            .filter_map(|[begin, end]| {
                let range = base.checked_add(begin)?..base.checked_add(end)?;
                (range.start < range.end && range.end <= size).then_some(range)
            })
            .collect();
        ranges.sort_by_key(|r| r.start);
        Some(Self(ranges))
    }

    /// The end of the last tensor that begins within `bytes`.
    pub(super) fn end_of_start_in(&self, bytes: &Range<u64>) -> Option<u64> {
        let after = self.0.partition_point(|t| t.start < bytes.end);
        let last = self.0[..after].last()?;
        (last.start >= bytes.start).then_some(last.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(file: &[u8]) -> Option<Tensors> {
        Tensors::read(file.len() as u64, |at, buf| {
            buf.copy_from_slice(&file[at as usize..at as usize + buf.len()]);
            true
        })
    }

    #[test]
    fn hints_from_a_real_header() {
        let header = br#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[4],"data_offsets":[16,32]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header);
        let base = file.len() as u64;
        file.extend_from_slice(&[0; 32]);
        let tensors = parse(&file).unwrap();
        assert_eq!(tensors.0, [base..base + 16, base + 16..base + 32]);
        assert_eq!(tensors.end_of_start_in(&(base..base + 1)), Some(base + 16));
        assert_eq!(tensors.end_of_start_in(&(base + 1..base + 2)), None);
        assert_eq!(tensors.end_of_start_in(&(0..base + 32)), Some(base + 32));
    }

    proptest::proptest! {
        #[test]
        fn nonsense_gives_no_hint_and_no_panic(file: Vec<u8>, length in 0u64..64) {
            let _ = parse(&file);
            let mut file = file;
            file.splice(0..0, length.to_le_bytes());
            let _ = parse(&file);
        }
    }
}
