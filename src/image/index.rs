//! The encoding of a [`LayerIndex`], and what must hold in one.
//!
//! ```text
//! "hrthlidx" version
//! sha256[32] of all that follows
//! length, zstd of:
//!     blob[32] blob_size compression(0 none, 1 gzip, 2 zstd) diff_id[32] size
//!     count { start blob_start bits digest(0 sha256, 1 blake3) window }*  the first two as what is
//!                                               added to those of the span before, window a length
//!     count { path kind meta body }*            path: bytes shared with the one before, and the rest
//!         body: 0 dir     1 file  size offset count { start length }*
//!               2 symlink target              3 hard link target
//!               4 char, 5 block  major minor  6 fifo  7 whiteout  8 opaque
//! the digests of the spans, their windows, the digests of the files: nothing that compresses
//! ```
//!
//! Numbers, texts and meta as in the encoding of trees. An index is of 1 % of its layer or less: most
//! are windows and digests. It may come from a stranger: decoding allocates in proportion to what
//! is there, and checks all that one index can be checked for. That its digests are those of the
//! layer shows when a span is decoded.

use super::{
    Compression, EntryKind, FileContent, ImageError, LayerEntry, LayerIndex, Limits, Span,
    SpanDigest, merge::check_content, unpack::cost,
};
use crate::{
    digest::Digest,
    tree::{Kind, MAX_INODES, MAX_PATH, Reader, TreeError, Writer, check_inode, check_name},
};

const MAGIC: &[u8; 8] = b"hrthlidx";
const VERSION: u32 = 1;
/// An index is written once and read often, but by whom the layer is pulled first, too.
const ZSTD_LEVEL: i32 = 7;
/// Most bytes of an index, and of what it expands to.
const MAX_INDEX: usize = 256 << 20;
/// Most bytes of a compressed window: one of noise, and what zstd adds.
const MAX_WINDOW: usize = 33 << 10;
/// Fewest bytes of an encoded span.
const MIN_SPAN: usize = 5;
/// Fewest bytes of an encoded entry: path, kind and meta.
const MIN_ENTRY: usize = 2 + 1 + 6;
/// Most bytes, decoded or compressed, of a span that is decoded by itself: it is in memory until it
/// is verified.
pub const MAX_SPAN: u64 = 64 << 20;

impl LayerIndex {
    /// The encoding.
    ///
    /// # Errors
    /// An index that could not be read back: what must hold does not, or it is too large.
    pub fn encode(&self) -> Result<Vec<u8>, ImageError> {
        self.check()?;
        let mut head = Writer(Vec::with_capacity(self.entries.len() * 64));
        let mut tail = Vec::with_capacity(self.entries.len() * 32 + self.spans.len() * 3000);
        self.encode_head(&mut head, &mut tail);
        if head.0.len().max(tail.len()) > MAX_INDEX {
            return Err(ImageError::too_large("its index would be too large").in_layer(self.blob));
        }
        let head = zstd::bulk::compress(&head.0, ZSTD_LEVEL).map_err(|error| {
            ImageError::invalid(format!("its index cannot be compressed: {error}"))
        })?;
        let mut body = Writer(Vec::with_capacity(head.len() + tail.len() + 8));
        body.bytes(&head);
        body.0.extend_from_slice(&tail);
        let mut out = Writer(Vec::with_capacity(body.0.len() + 64));
        out.0.extend_from_slice(MAGIC);
        out.number(VERSION.into());
        out.0.extend_from_slice(Digest::of(&body.0).as_bytes());
        out.0.extend_from_slice(&body.0);
        Ok(out.0)
    }

    fn encode_head(&self, head: &mut Writer, tail: &mut Vec<u8>) {
        head.0.extend_from_slice(self.blob.as_bytes());
        head.number(self.blob_size);
        head.0.push(match self.compression {
            Compression::None => 0,
            Compression::Gzip => 1,
            Compression::Zstd => 2,
        });
        head.0.extend_from_slice(self.diff_id.as_bytes());
        head.number(self.size);
        head.number(self.spans.len() as u64);
        let (mut start, mut blob_start) = (0, 0);
        for span in &self.spans {
            head.number(span.start - start);
            head.number(span.blob_start - blob_start);
            (start, blob_start) = (span.start, span.blob_start);
            head.0.push(span.bits);
            let (kind, digest) = match &span.digest {
                SpanDigest::Sha256(digest) => (0, digest.as_bytes()),
                SpanDigest::Blake3(digest) => (1, digest),
            };
            head.0.push(kind);
            tail.extend_from_slice(digest);
            head.number(span.window.len() as u64);
        }
        for span in &self.spans {
            tail.extend_from_slice(&span.window);
        }
        head.number(self.entries.len() as u64);
        let mut before: &[u8] = &[];
        for entry in &self.entries {
            let pairs = before.iter().zip(&entry.path);
            let shared = pairs.take_while(|(a, b)| a == b).count();
            head.number(shared as u64);
            head.bytes(&entry.path[shared..]);
            before = &entry.path;
            encode_entry(entry, head);
            if let EntryKind::File(content) = &entry.kind {
                tail.extend_from_slice(content.digest.as_bytes());
            }
        }
    }

    /// Decodes what [`LayerIndex::encode`] wrote.
    ///
    /// # Errors
    /// Anything else; [`super::ImageErrorKind::Unsupported`] for another version.
    pub fn decode(bytes: &[u8]) -> Result<Self, ImageError> {
        if bytes.len() > MAX_INDEX {
            let why = format!("its index has {} bytes, which is too many", bytes.len());
            return Err(ImageError::too_large(why));
        }
        let mut input = Reader(bytes);
        if input.take(MAGIC.len()).map_err(damaged)? != MAGIC {
            return Err(ImageError::invalid("this is no index of a layer"));
        }
        let version = input.small().map_err(damaged)?;
        if version != VERSION {
            let why = format!("its index has format {version}, this version reads {VERSION}");
            return Err(ImageError::unsupported(why));
        }
        let checksum = Digest::from_bytes(input.array().map_err(damaged)?);
        if Digest::of(input.0) != checksum {
            return Err(ImageError::corrupt(
                "its index is damaged: its checksum is wrong",
            ));
        }
        let head = expand(input.bytes().map_err(damaged)?)?;
        let index = decode_body(&head, input.0, Limits::default().names).map_err(damaged)?;
        index.check()?;
        Ok(index)
    }

    /// Whether it is the index of this layer.
    ///
    /// # Errors
    /// The index of another layer.
    pub fn belongs_to(&self, blob: &Digest, size: u64) -> Result<(), ImageError> {
        if self.blob == *blob && self.blob_size == size {
            return Ok(());
        }
        let why = format!(
            "this index is of another layer: {}, {} bytes, and not of {size} bytes",
            self.blob, self.blob_size
        );
        Err(ImageError::corrupt(why).in_layer(*blob))
    }

    /// Whether each span can be decoded by itself, in memory. A layer in one frame of zstd, or in one
    /// huge block of deflate, is too much for that: it can only be decoded from its start.
    pub fn is_seekable(&self) -> bool {
        (0..self.spans.len()).all(|at| {
            let (bytes, of_blob) = (self.span_bytes(at), self.span_blob_bytes(at));
            bytes.end - bytes.start <= MAX_SPAN && of_blob.end - of_blob.start <= MAX_SPAN
        })
    }

    /// Whether it can be the index of any layer.
    pub(super) fn check(&self) -> Result<(), ImageError> {
        let spans = self.check_spans();
        spans.map_err(|why| wrong(why).in_layer(self.blob))?;
        let names = self.entries.iter().map(cost);
        if names.fold(0, u64::saturating_add) > Limits::default().names {
            let why = "its paths, attributes and sparse maps are too many";
            return Err(ImageError::too_large(why).in_layer(self.blob));
        }
        for entry in &self.entries {
            let check = self.check_entry(entry);
            check.map_err(|why| wrong(why).in_entry(&entry.path).in_layer(self.blob))?;
        }
        Ok(())
    }

    fn check_spans(&self) -> Result<(), &'static str> {
        if self.size > i64::MAX as u64 || self.blob_size > i64::MAX as u64 {
            return Err("no layer is so large");
        }
        let mut spans = self.spans.iter();
        let Some(mut before) = spans.next() else {
            return match self.size {
                0 => Ok(()),
                _ => Err("it has no spans"),
            };
        };
        if before.start != 0 || before.bits != 0 || !before.window.is_empty() {
            return Err("its first span does not begin at the start of the layer");
        }
        for span in spans {
            if span.start <= before.start || span.blob_start <= before.blob_start {
                return Err("its spans are not in order");
            }
            if span.bits > 7 || span.bits > 0 && span.window.is_empty() {
                return Err("a span begins where no block can");
            }
            if !span.window.is_empty() && self.compression != Compression::Gzip {
                return Err("a span has a window for which there is no use");
            }
            before = span;
        }
        // An empty span at the end says where the bytes of the one before it end.
        if before.start > self.size || before.start == 0 && self.size == 0 {
            return Err("its spans go beyond its end");
        }
        if before.blob_start > self.blob_size {
            return Err("its spans go beyond the end of the blob");
        }
        let moved = |span: &Span| span.start != span.blob_start;
        if self.compression == Compression::None
            && (self.size != self.blob_size || self.spans.iter().any(moved))
        {
            return Err("it is not compressed, and yet its spans are not where they were");
        }
        Ok(())
    }

    fn check_entry(&self, entry: &LayerEntry) -> Result<(), &'static str> {
        check_path(&entry.path)?;
        let at_root = entry.path.is_empty();
        let kind = match &entry.kind {
            EntryKind::Dir | EntryKind::Opaque => Kind::Fifo,
            _ if at_root => return Err("the root is no directory"),
            // As unpacking the layer has it, with the holes.
            EntryKind::File(content) if content.size > Limits::default().bytes => {
                return Err("is larger than a layer may be");
            }
            EntryKind::File(content) => {
                check_content(self, content)?;
                Kind::Fifo
            }
            EntryKind::Symlink { target } => {
                let target = target.clone();
                Kind::Symlink { target }
            }
            EntryKind::Hardlink { target } if target.is_empty() => {
                return Err("is a hard link to the root");
            }
            EntryKind::Hardlink { target } => {
                check_path(target)?;
                Kind::Fifo
            }
            _ => Kind::Fifo,
        };
        check_inode(&kind, &entry.meta)
    }
}

/// A path like [`LayerEntry::path`].
fn check_path(path: &[u8]) -> Result<(), &'static str> {
    if path.len() > MAX_PATH {
        return Err("has a path longer than 4096 bytes");
    }
    match path.is_empty() {
        true => Ok(()),
        false => path.split(|&byte| byte == b'/').try_for_each(check_name),
    }
}

fn wrong(why: &str) -> ImageError {
    ImageError::invalid(format!("its index is wrong: {why}"))
}

fn damaged(error: TreeError) -> ImageError {
    match error {
        TreeError::Damaged(why) => wrong(why),
        other => wrong(&other.to_string()),
    }
}

/// Expands the head, which says how long it is, but is not believed.
fn expand(head: &[u8]) -> Result<Vec<u8>, ImageError> {
    use std::io::Read as _;
    let mut out = Vec::new();
    let read = zstd::Decoder::with_buffer(head)
        .and_then(|decoder| decoder.take(MAX_INDEX as u64 + 1).read_to_end(&mut out));
    match read {
        Ok(_) if out.len() > MAX_INDEX => Err(ImageError::too_large("its index is too large")),
        Ok(_) => Ok(out),
        Err(error) => Err(wrong(&error.to_string())),
    }
}

fn encode_entry(entry: &LayerEntry, out: &mut Writer) {
    out.0.push(match &entry.kind {
        EntryKind::Dir => 0,
        EntryKind::File(_) => 1,
        EntryKind::Symlink { .. } => 2,
        EntryKind::Hardlink { .. } => 3,
        EntryKind::Char { .. } => 4,
        EntryKind::Block { .. } => 5,
        EntryKind::Fifo => 6,
        EntryKind::Whiteout => 7,
        EntryKind::Opaque => 8,
    });
    out.meta(&entry.meta);
    match &entry.kind {
        EntryKind::File(content) => {
            out.number(content.size);
            out.number(content.offset);
            out.number(content.pieces.len() as u64);
            for (start, len) in &content.pieces {
                out.number(*start);
                out.number(*len);
            }
        }
        EntryKind::Symlink { target } | EntryKind::Hardlink { target } => out.bytes(target),
        EntryKind::Char { major, minor } | EntryKind::Block { major, minor } => {
            out.number((*major).into());
            out.number((*minor).into());
        }
        EntryKind::Dir | EntryKind::Fifo | EntryKind::Whiteout | EntryKind::Opaque => {}
    }
}

/// `most`: see [`Limits::names`].
fn decode_body(head: &[u8], tail: &[u8], most: u64) -> Result<LayerIndex, TreeError> {
    let (mut head, mut tail) = (Reader(head), Reader(tail));
    let blob = Digest::from_bytes(head.array()?);
    let blob_size = head.number()?;
    let compression = match head.byte()? {
        0 => Compression::None,
        1 => Compression::Gzip,
        2 => Compression::Zstd,
        _ => return Err(TreeError::Damaged("its compression is unknown")),
    };
    let diff_id = Digest::from_bytes(head.array()?);
    let size = head.number()?;
    let count = head.count(MIN_SPAN)?;
    let mut spans = Vec::new();
    let mut windows = Vec::new();
    let (mut start, mut blob_start) = (0u64, 0u64);
    let add = |sum: u64, more: u64| {
        let too_large = TreeError::Damaged("a span is beyond all offsets");
        sum.checked_add(more).ok_or(too_large)
    };
    for _ in 0..count {
        start = add(start, head.number()?)?;
        blob_start = add(blob_start, head.number()?)?;
        let mut span = Span::at(start, blob_start);
        span.bits = head.byte()?;
        span.digest = match head.byte()? {
            0 => SpanDigest::Sha256(Digest::from_bytes(tail.array()?)),
            1 => SpanDigest::Blake3(tail.array()?),
            _ => {
                return Err(TreeError::Damaged(
                    "the digest of a span is of an unknown kind",
                ));
            }
        };
        windows.push(head.number()? as usize);
        spans.push(span);
    }
    for (span, len) in spans.iter_mut().zip(windows) {
        if len > MAX_WINDOW {
            return Err(TreeError::Damaged("a window is too large"));
        }
        span.window = tail.take(len)?.into();
    }
    let count = head.count(MIN_ENTRY)?;
    if count > MAX_INODES {
        return Err(TreeError::TooMany);
    }
    let mut entries: Vec<LayerEntry> = Vec::new();
    let mut names = 0u64;
    for _ in 0..count {
        let shared = head.number()? as usize;
        let before = entries.last().map_or(&[][..], |entry| &*entry.path);
        let shared = before.get(..shared);
        let shared = shared.ok_or(TreeError::Damaged("a path shares more than there is"))?;
        let rest = head.bytes()?;
        if shared.len() + rest.len() > MAX_PATH {
            return Err(TreeError::Damaged("a path is longer than 4096 bytes"));
        }
        let path = [shared, rest].concat().into();
        let (kind, meta) = decode_entry(&mut head, &mut tail)?;
        let entry = LayerEntry { path, kind, meta };
        names = names.saturating_add(cost(&entry));
        if names > most {
            return Err(TreeError::TooMany);
        }
        entries.push(entry);
    }
    if !head.0.is_empty() || !tail.0.is_empty() {
        return Err(TreeError::Damaged("bytes follow its end"));
    }
    Ok(LayerIndex {
        blob,
        blob_size,
        compression,
        diff_id,
        size,
        entries,
        spans,
    })
}

fn decode_entry(
    head: &mut Reader<'_>,
    tail: &mut Reader<'_>,
) -> Result<(EntryKind, crate::tree::Meta), TreeError> {
    let kind = head.byte()?;
    let meta = head.meta()?;
    let kind = match kind {
        0 => EntryKind::Dir,
        1 => {
            let (size, offset) = (head.number()?, head.number()?);
            let count = head.count(2)?;
            let mut pieces = Vec::new();
            for _ in 0..count {
                pieces.push((head.number()?, head.number()?));
            }
            EntryKind::File(FileContent {
                size,
                digest: Digest::from_bytes(tail.array()?),
                offset,
                pieces,
            })
        }
        2 | 3 => {
            let target = head.bytes()?.into();
            match kind {
                2 => EntryKind::Symlink { target },
                _ => EntryKind::Hardlink { target },
            }
        }
        4 | 5 => {
            let (major, minor) = (head.small()?, head.small()?);
            match kind {
                4 => EntryKind::Char { major, minor },
                _ => EntryKind::Block { major, minor },
            }
        }
        6 => EntryKind::Fifo,
        7 => EntryKind::Whiteout,
        8 => EntryKind::Opaque,
        _ => return Err(TreeError::Damaged("an entry has an unknown kind")),
    };
    Ok((kind, meta))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        image::{ImageErrorKind, samples},
        tree::Meta,
    };

    fn entry(path: &str, kind: EntryKind) -> LayerEntry {
        let mut meta = Meta::file(-7);
        meta.mode = 0o4755;
        meta.xattrs = vec![(b"user.a"[..].into(), b"\0\xff"[..].into())];
        LayerEntry {
            path: path.as_bytes().into(),
            kind,
            meta,
        }
    }

    fn file(size: u64, offset: u64, pieces: Vec<(u64, u64)>) -> EntryKind {
        EntryKind::File(FileContent {
            size,
            digest: Digest::of(&size.to_le_bytes()),
            offset,
            pieces,
        })
    }

    /// Everything that an index can hold.
    fn full() -> LayerIndex {
        let target = b"usr/bin".as_slice();
        let span = |start, blob_start, bits, window: &[u8], digest| Span {
            start,
            blob_start,
            bits,
            window: window.into(),
            digest,
        };
        LayerIndex {
            blob: Digest::of(b"blob"),
            blob_size: 5000,
            compression: Compression::Gzip,
            diff_id: Digest::of(b"diff"),
            size: 10_000,
            entries: vec![
                entry("", EntryKind::Dir),
                entry("usr", EntryKind::Dir),
                entry("usr/bin", EntryKind::Opaque),
                entry("usr/bin/a", file(100, 512, vec![])),
                entry(
                    "usr/bin/ab",
                    file(1 << 30, 1024, vec![(5, 7), (1 << 29, 8)]),
                ),
                entry(
                    "bin",
                    EntryKind::Symlink {
                        target: target.into(),
                    },
                ),
                entry(
                    "b",
                    EntryKind::Hardlink {
                        target: target.into(),
                    },
                ),
                entry("c", EntryKind::Char { major: 1, minor: 3 }),
                entry("d", EntryKind::Block { major: 8, minor: 0 }),
                entry("e", EntryKind::Fifo),
                entry("f", EntryKind::Whiteout),
            ],
            spans: vec![
                span(0, 0, 0, b"", SpanDigest::Blake3([1; 32])),
                span(4000, 2000, 3, b"window", SpanDigest::Blake3([2; 32])),
                span(8000, 3000, 0, b"", SpanDigest::Sha256(Digest::of(b"x"))),
                span(10_000, 4000, 0, b"", SpanDigest::Sha256(Digest::of(b""))),
            ],
        }
    }

    #[test]
    fn round_trip_and_every_damage_is_seen() {
        let full = full();
        let good = full.encode().unwrap();
        assert_eq!(LayerIndex::decode(&good), Ok(full.clone()));
        for at in 0..good.len() {
            assert!(LayerIndex::decode(&good[..at]).is_err(), "cut at {at}");
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(LayerIndex::decode(&bad).is_err(), "byte {at} bit {bit}");
            }
        }
        assert!(LayerIndex::decode(&[&good[..], b"\0"].concat()).is_err());
        let mut other = good;
        other[8] = 99;
        let error = LayerIndex::decode(&other).unwrap_err();
        assert_eq!(error.kind(), ImageErrorKind::Unsupported);
        let empty = LayerIndex {
            size: 0,
            entries: vec![],
            spans: vec![],
            ..full
        };
        assert_eq!(LayerIndex::decode(&empty.encode().unwrap()), Ok(empty));
    }

    #[test]
    fn what_was_written_is_still_read() {
        let golden = include_bytes!("../../fixtures/index/v1");
        assert_eq!(LayerIndex::decode(golden), Ok(full()));
    }

    /// As `encode`, but of anything.
    fn forge(head: &[u8], tail: &[u8]) -> Vec<u8> {
        let mut body = Writer(Vec::new());
        body.bytes(&zstd::bulk::compress(head, 1).unwrap());
        body.0.extend_from_slice(tail);
        let checksum = Digest::of(&body.0);
        [&MAGIC[..], b"\x01", checksum.as_bytes(), &body.0].concat()
    }

    #[test]
    fn an_index_that_cannot_be_is_refused() {
        type Change = fn(&mut LayerIndex);
        let changes: &[(&str, Change)] = &[
            ("order", |x| x.spans.swap(1, 2)),
            ("order", |x| x.spans[2].start = 4000),
            ("order", |x| x.spans[2].blob_start = 2000),
            ("first span", |x| x.spans[0].start = 1),
            ("first span", |x| x.spans[0].window = b"w"[..].into()),
            ("no block", |x| x.spans[1].bits = 8),
            ("no block", |x| x.spans[1].window = [].into()),
            ("no use", |x| x.compression = Compression::Zstd),
            ("beyond its end", |x| x.size = 9999),
            ("beyond the end of the blob", |x| x.blob_size = 3999),
            ("no spans", |x| x.spans.clear()),
            ("so large", |x| x.size = u64::MAX),
            ("\"..\"", |x| x.entries[3].path = b"a/../../b"[..].into()),
            ("absolute", |x| x.entries[3].path = b"/a"[..].into()),
            ("NUL", |x| x.entries[3].path = b"a\0"[..].into()),
            ("4096", |x| x.entries[3].path = vec![b'a'; 5000].into()),
            ("root", |x| x.entries[3].path = [].into()),
            ("beyond the end", |x| {
                x.entries[3].kind = file(9500, 512, vec![])
            }),
            ("beyond the end", |x| {
                x.entries[3].kind = file(1, u64::MAX, vec![])
            }),
            ("larger than", |x| {
                x.entries[3].kind = file(1 << 62, 512, vec![(5, 7)])
            }),
            ("overlap", |x| {
                x.entries[3].kind = file(90, 0, vec![(5, 9), (8, 1)])
            }),
            ("beyond its end", |x| {
                x.entries[3].kind = file(9, 0, vec![(5, 9)])
            }),
            ("to the root", |x| {
                x.entries[3].kind = EntryKind::Hardlink { target: [].into() };
            }),
            ("to nothing", |x| {
                x.entries[3].kind = EntryKind::Symlink { target: [].into() };
            }),
            ("mode", |x| x.entries[3].meta.mode = 0o10000),
        ];
        for (why, change) in changes {
            let mut index = full();
            change(&mut index);
            let error = index.encode().unwrap_err();
            assert!(error.to_string().contains(why), "{why}: {error}");
            if *why == "order" {
                continue; // differences cannot say so
            }
            let (mut head, mut tail) = (Writer(Vec::new()), Vec::new());
            index.encode_head(&mut head, &mut tail);
            let error = LayerIndex::decode(&forge(&head.0, &tail)).unwrap_err();
            assert!(
                error.to_string().contains("its index is wrong"),
                "{why}: {error}"
            );
        }
    }

    #[test]
    fn it_belongs_to_one_layer() {
        let index = full();
        assert!(index.belongs_to(&index.blob, index.blob_size).is_ok());
        assert!(index.belongs_to(&index.blob, 1).is_err());
        let other = Digest::of(b"other");
        let error = index.belongs_to(&other, index.blob_size).unwrap_err();
        assert_eq!(error.kind(), ImageErrorKind::Corrupt);
        assert!(error.to_string().contains(&other.to_string()));
    }

    #[test]
    fn claims_cost_nothing() {
        let mut head = Writer(full().blob.as_bytes().to_vec());
        head.number(1);
        head.0.push(1);
        head.0.extend([0; 32]);
        head.number(1);
        head.number(u64::MAX >> 8);
        assert!(LayerIndex::decode(&forge(&head.0, &[])).is_err());
        // Entries of few bytes each, whose paths are long: each is that of the one before.
        let mut index = full();
        index.entries = vec![entry(&"a".repeat(4000), EntryKind::Fifo); 300];
        let (mut head, mut tail) = (Writer(Vec::new()), Vec::new());
        index.encode_head(&mut head, &mut tail);
        let most = index.entries.iter().map(cost).sum();
        assert!(head.0.len() as u64 * 10 < most);
        assert_eq!(decode_body(&head.0, &tail, most), Ok(index));
        let refused = decode_body(&head.0, &tail, most - 1);
        assert!(matches!(refused, Err(TreeError::TooMany)));

        let bomb = vec![0; MAX_INDEX + 1];
        let error = LayerIndex::decode(&forge(&bomb, &[])).unwrap_err();
        assert_eq!(error.kind(), ImageErrorKind::TooLarge);
    }

    proptest! {
        #[test]
        fn random_heads_do_not_panic(
            head in prop::collection::vec(any::<u8>(), 0..300),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let _ = LayerIndex::decode(&forge(&head, &samples::noise(200, 1)));
            let (mut head, mut tail) = (Writer(Vec::new()), Vec::new());
            full().encode_head(&mut head, &mut tail);
            for (at, byte) in changes {
                let at = at.index(head.0.len());
                head.0[at] = byte;
            }
            if let Ok(index) = LayerIndex::decode(&forge(&head.0, &tail)) {
                prop_assert_eq!(LayerIndex::decode(&index.encode().unwrap()), Ok(index));
            }
        }
    }
}
