//! Where the tensors of a safetensors file lie, so that read-ahead knows how far a reader goes.
//!
//! Format: <https://huggingface.co/docs/safetensors/index#format>: a little-endian `u64` header
//! length, a JSON header of `{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, the data.
//! Only a hint is derived from it, so whatever is odd just gives none.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::Arc,
};

/// Longest header looked at, in bytes; real ones are below 1 MiB.
const MAX_HEADER: u64 = 16 << 20;

/// Most files of one object that are looked at.
const MAX_SECTIONS: usize = 4096;

/// Byte ranges of the tensors within the object that holds the file, sorted by start.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tensors(Vec<Range<u64>>);

/// The files within one object: where each is, and its tensors once it was looked at (`None`
/// inside where it is no safetensors file).
#[derive(Debug, Default)]
pub(super) struct Sections(BTreeMap<u64, (u64, Known)>);

type Known = Option<Option<Arc<Tensors>>>;

impl Sections {
    /// Bytes `file` may be a safetensors file.
    pub(super) fn add(&mut self, file: Range<u64>) {
        if self.0.len() < MAX_SECTIONS {
            self.0.entry(file.start).or_insert((file.end, None));
        }
    }

    /// The file around byte `at`, and what is known of it.
    pub(super) fn at(&self, at: u64) -> Option<(Range<u64>, Known)> {
        let (&start, (end, known)) = self.0.range(..=at).next_back()?;
        (at < *end).then(|| (start..*end, known.clone()))
    }

    /// The file at `start` was looked at.
    pub(super) fn found(&mut self, start: u64, tensors: Option<Arc<Tensors>>) {
        if let Some((_, known)) = self.0.get_mut(&start) {
            *known = Some(tensors);
        }
    }
}

#[derive(serde::Deserialize)]
struct Tensor {
    data_offsets: Option<[u64; 2]>,
}

impl Tensors {
    /// Parses the header of the file at bytes `file` of an object; `read` fills a buffer from an
    /// offset in the object, where the bytes are here.
    pub(super) fn read(file: &Range<u64>, read: impl Fn(u64, &mut [u8]) -> bool) -> Option<Self> {
        // The length and the brace that a header starts with.
        let mut start = [0; 9];
        if file.end - file.start < 9 || !read(file.start, &mut start) || start[8] != b'{' {
            return None;
        }
        let [length @ .., _] = start;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER || length > file.end - file.start - 8 {
            return None;
        }
        let mut header = vec![0; length as usize];
        if !read(file.start + 8, &mut header) {
            return None;
        }
        let tensors: HashMap<String, Tensor> = serde_json::from_slice(&header).ok()?;
        let base = file.start + 8 + length;
        let mut ranges: Vec<_> = tensors
            .into_values()
            .filter_map(|t| t.data_offsets)
            .filter_map(|[begin, end]| {
                let range = base.checked_add(begin)?..base.checked_add(end)?;
                (range.start < range.end && range.end <= file.end).then_some(range)
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
        parse_at(0, file)
    }

    /// Parses `file` as it lies at `base` of its object.
    fn parse_at(base: u64, file: &[u8]) -> Option<Tensors> {
        Tensors::read(&(base..base + file.len() as u64), |at, buf| {
            let at = (at - base) as usize;
            buf.copy_from_slice(&file[at..at + buf.len()]);
            true
        })
    }

    #[test]
    fn the_corpus() {
        crate::corpus::replay("corpus/safetensors", |input| {
            if let Some(tensors) = parse(input) {
                for at in [0, 1, input.len() as u64] {
                    let _ = tensors.end_of_start_in(&(at..at + 100));
                }
            }
        });
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
        let inside = parse_at(1000, &file).unwrap();
        let start = 1000 + base;
        assert_eq!(inside.0, [start..start + 16, start + 16..start + 32]);
        let mut sections = Sections::default();
        sections.add(1000..2000);
        sections.add(512..600);
        sections.found(1000, Some(Arc::new(inside)));
        assert_eq!(sections.at(600), None);
        assert_eq!(sections.at(599), Some((512..600, None)));
        assert!(matches!(sections.at(1999), Some((file, Some(Some(_)))) if file == (1000..2000)));
        assert_eq!(sections.at(2000), None);
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
