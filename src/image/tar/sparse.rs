//! The maps of sparse files: old GNU (in headers), PAX 0.0 and 0.1 (in records), 1.0 (before the data).

use super::{BLOCK, MAX_PIECES, header, pax::decimal};
use crate::image::ImageError;

/// Where a PAX sparse file has its map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    Header,
    Data,
}

/// The `GNU.sparse.*` records.
#[derive(Debug, Default)]
pub(super) struct PaxSparse {
    major: Option<Vec<u8>>,
    minor: Option<Vec<u8>>,
    pub(super) name: Option<Vec<u8>>,
    /// Bytes of the file.
    pub(super) size: Option<u64>,
    pub(super) map: PaxMap,
}

/// A map in records, not looked at yet.
#[derive(Debug, Default)]
pub(super) struct PaxMap {
    /// 0.0: a record for each number, in order.
    numbers: Vec<u64>,
    /// 0.1: all numbers, with commas.
    text: Option<Vec<u8>>,
    count: Option<u64>,
}

impl PaxSparse {
    pub(super) fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let text = || (!value.is_empty()).then(|| value.to_vec());
        let number = || decimal::<u64>(value).ok_or("an extended header has a bad sparse map");
        match key {
            b"major" => self.major = text(),
            b"minor" => self.minor = text(),
            b"name" => {
                if value.contains(&0) {
                    return Err("an extended header has a NUL byte in a path");
                }
                self.name = text();
            }
            b"size" | b"realsize" => self.size = Some(number()?),
            b"numblocks" => self.map.count = Some(number()?),
            b"map" => self.map.text = text(),
            b"offset" | b"numbytes" => {
                if (key == b"offset") != self.map.numbers.len().is_multiple_of(2) {
                    return Err("an extended header has a bad sparse map");
                }
                self.map.numbers.push(number()?);
            }
            _ => {}
        }
        Ok(())
    }

    /// Where the map is; `None` if the records describe no sparse file that is known.
    pub(super) fn layout(&self) -> Option<Layout> {
        match (self.major.as_deref(), self.minor.as_deref()) {
            (Some(b"0"), Some(b"0" | b"1")) => Some(Layout::Header),
            (Some(b"1"), Some(b"0")) => Some(Layout::Data),
            (None, None) if self.map.text.is_some() || !self.map.numbers.is_empty() => {
                Some(Layout::Header)
            }
            _ => None,
        }
    }
}

impl PaxMap {
    /// The pieces.
    pub(super) fn parse(self) -> Result<Vec<(u64, u64)>, ImageError> {
        let bad = || ImageError::invalid("its sparse map is malformed");
        let numbers = match self.text {
            Some(text) if self.numbers.is_empty() => text
                .split(|&b| b == b',')
                .map(|number| decimal::<u64>(number).ok_or_else(bad))
                .collect::<Result<_, _>>()?,
            _ => self.numbers,
        };
        if self.count != Some(numbers.len() as u64 / 2) || !numbers.len().is_multiple_of(2) {
            return Err(bad());
        }
        Ok(numbers
            .chunks_exact(2)
            .map(|pair| (pair[0], pair[1]))
            .collect())
    }
}

/// Reads the entries of one header of an old GNU sparse file.
pub(super) fn read_old(entries: &[u8], map: &mut Vec<(u64, u64)>) -> Result<(), ImageError> {
    for entry in entries.as_chunks::<24>().0 {
        if entry[0] == 0 {
            break;
        }
        let number = |field: &[u8]| {
            header::number(field)
                .and_then(|number| u64::try_from(number).ok())
                .ok_or_else(|| ImageError::invalid("its sparse map is malformed"))
        };
        push(map, (number(&entry[..12])?, number(&entry[12..])?))?;
    }
    Ok(())
}

fn push(map: &mut Vec<(u64, u64)>, piece: (u64, u64)) -> Result<(), ImageError> {
    if map.len() >= MAX_PIECES {
        let why = format!("it is a sparse file of more than {MAX_PIECES} pieces");
        return Err(ImageError::too_large(why));
    }
    map.push(piece);
    Ok(())
}

/// Reads the map of a PAX 1.0 file: decimal numbers, each with a newline: how many pieces, then offset
/// and length of each; then zeros up to the next block.
#[derive(Debug, Default)]
pub(super) struct MapReader {
    /// Bytes taken.
    taken: u64,
    /// The number that is coming, and its digits so far.
    number: u64,
    digits: u8,
    /// Numbers still to come, once that is known.
    left: Option<u64>,
    /// The first half of the piece that is coming.
    start: Option<u64>,
}

impl MapReader {
    /// Takes from `input`, and from the `stored` bytes of the member; true when it is complete.
    pub(super) fn read(
        &mut self,
        input: &mut &[u8],
        stored: &mut u64,
        map: &mut Vec<(u64, u64)>,
    ) -> Result<bool, ImageError> {
        loop {
            let in_padding = self.left == Some(0);
            if in_padding && self.taken.is_multiple_of(BLOCK as u64) {
                return Ok(true);
            }
            let Some((&byte, rest)) = input.split_first() else {
                return Ok(false);
            };
            *input = rest;
            self.taken += 1;
            *stored = stored
                .checked_sub(1)
                .ok_or_else(|| ImageError::invalid("its sparse map is cut short"))?;
            if !in_padding {
                self.byte(byte, map)?;
            }
        }
    }

    fn byte(&mut self, byte: u8, map: &mut Vec<(u64, u64)>) -> Result<(), ImageError> {
        let bad = || ImageError::invalid("its sparse map is malformed");
        if byte != b'\n' {
            if !byte.is_ascii_digit() || self.digits >= 20 {
                return Err(bad());
            }
            self.digits += 1;
            let number = self.number.checked_mul(10);
            self.number = number
                .and_then(|number| number.checked_add(u64::from(byte - b'0')))
                .ok_or_else(bad)?;
            return Ok(());
        }
        if self.digits == 0 {
            return Err(bad());
        }
        let number = std::mem::take(&mut self.number);
        self.digits = 0;
        let Some(left) = &mut self.left else {
            self.left = Some(number.checked_mul(2).ok_or_else(bad)?);
            return Ok(());
        };
        *left -= 1;
        match self.start.take() {
            None => self.start = Some(number),
            Some(start) => push(map, (start, number))?,
        }
        Ok(())
    }
}

/// Checks a map against the `size` of the file and the `stored` bytes, and brings it to the form
/// of [`crate::image::FileContent::pieces`].
pub(super) fn check(
    map: Vec<(u64, u64)>,
    size: u64,
    stored: u64,
) -> Result<Vec<(u64, u64)>, &'static str> {
    if size > i64::MAX as u64 {
        return Err("its size is no size of a file");
    }
    let mut pieces: Vec<(u64, u64)> = Vec::with_capacity(map.len());
    let (mut end, mut data) = (0, 0);
    for (start, len) in map {
        if start < end {
            return Err("the pieces of its sparse map overlap or are not in order");
        }
        end = match start.checked_add(len) {
            Some(end) if end <= size => end,
            _ => return Err("its sparse map goes beyond its end"),
        };
        data += len;
        match pieces.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.0 + last.1 == start => last.1 += len,
            _ => pieces.push((start, len)),
        }
    }
    if data != stored {
        return Err("its sparse map does not fit to its data");
    }
    if pieces == [(0, size)] || size == 0 {
        pieces.clear();
    } else if pieces.is_empty() {
        pieces.push((size, 0));
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_checked_and_brought_to_one_form() {
        assert_eq!(
            check(vec![(0, 5), (5, 5), (20, 5)], 30, 15),
            Ok(vec![(0, 10), (20, 5)])
        );
        assert_eq!(check(vec![(0, 10), (10, 0)], 10, 10), Ok(vec![]));
        assert_eq!(check(vec![(10, 0)], 10, 0), Ok(vec![(10, 0)]));
        assert_eq!(check(vec![], 10, 0), Ok(vec![(10, 0)]));
        assert_eq!(check(vec![], 0, 0), Ok(vec![]));
        assert!(check(vec![(0, 5), (4, 5)], 30, 10).is_err());
        assert!(check(vec![(0, 5)], 30, 6).is_err());
        assert!(check(vec![(20, 11)], 30, 11).is_err());
        assert!(check(vec![(1, u64::MAX)], 30, 0).is_err());
        assert!(check(vec![], u64::MAX, 0).is_err());
    }
}
