//! Indexes from the table of contents that some layers carry: eStargz and zstd:chunked.
//!
//! Both are JSON lists of entries with attributes, digests, and where in the blob each chunk of each
//! file can be entered (stargz-snapshotter, docs/estargz.md; containers/storage,
//! pkg/chunked/internal). Neither says where things are in the decoded layer, nor does it matter:
//! the index that is made here is of a layer that has nothing but the contents of the files, one
//! after the other, one span for each chunk. It is not the index that decoding the whole layer
//! gives, and its locations are not those ([`LayerIndex::location`]).
//!
//! A table is believed only if the manifest has its digest in an annotation, and until the whole
//! layer was unpacked: then both have to tell of the same files ([`difference`]). What cannot be used
//! is no error for whoever asks: such a layer is one without a table. Called by whoever mounts an
//! image before it is here.

mod json;

use std::collections::BTreeMap;

use futures_util::StreamExt as _;

use super::{
    Compression, Decoder, EntryKind, FileContent, ImageError, LayerEntry, LayerIndex, Span,
    SpanDigest,
    tar::{Event, Member, MemberKind, Parser},
    unpack,
};
use crate::{
    digest::Digest,
    source::{Source, SourceError, SourceErrorKind},
    tree::{Location, Meta},
};

/// The digest of the table of an eStargz layer.
const STARGZ_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Of zstd:chunked, as containers/storage and as stargz-snapshotter write it: the digest of the
/// compressed table, and `<offset>:<length>:<uncompressed length>:<type>`.
const CHUNKED_DIGEST: [&str; 2] = [
    "io.github.containers.zstd-chunked.manifest-checksum",
    "io.containers.zstd-chunked.manifest-checksum",
];
const CHUNKED_POSITION: [&str; 2] = [
    "io.github.containers.zstd-chunked.manifest-position",
    "io.containers.zstd-chunked.manifest-position",
];
/// The one type of table there is.
const CHUNKED_TYPE: u64 = 1;
/// Bytes of a skippable frame before its content.
const SKIPPABLE: u64 = 8;
/// The file of an eStargz layer that is its table.
const STARGZ_FILE: &[u8] = b"stargz.index.json";
/// What is read first after the start of the container comes before it in the blob.
const LANDMARK: &[u8] = b".prefetch.landmark";
const NO_LANDMARK: &[u8] = b".no.prefetch.landmark";
/// Bytes at the end of an eStargz layer that say where its table is.
pub const FOOTER: usize = 51;
/// Most bytes of a table, compressed or not.
const MAX_TABLE: u64 = 64 << 20;
/// What is read first of an eStargz layer: most tables are in it.
const TAIL: u64 = 256 << 10;

/// A layer that may have a table, as its manifest describes it.
#[derive(Debug, Clone, Copy)]
pub struct TocLayer<'a> {
    pub blob: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// The digest of the decoded layer, from the configuration of the image.
    pub diff_id: Digest,
    pub annotations: &'a BTreeMap<String, String>,
}

/// A table of contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toc {
    pub index: LayerIndex,
    /// How many spans, from the first on, whoever made the layer expects to be read at once.
    pub prefetch: usize,
}

/// Where a table is, and how it is known to be right.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Stargz {
        digest: Digest,
    },
    Chunked {
        digest: Digest,
        start: u64,
        len: u64,
    },
}

impl TocLayer<'_> {
    /// Where the annotations say the table is; `None` where they say nothing of one.
    fn place(&self) -> Result<Option<Place>, ImageError> {
        let find = |keys: &[&str]| keys.iter().find_map(|key| self.annotations.get(*key));
        let digest = |text: &String| {
            let digest = text.parse::<Digest>();
            digest.map_err(|_| ImageError::unsupported("its table has no SHA-256 digest"))
        };
        if let (Some(checksum), Some(position)) = (find(&CHUNKED_DIGEST), find(&CHUNKED_POSITION)) {
            let wrong = || ImageError::invalid("the annotations of its table make no sense");
            let numbers: Vec<u64> = (position.split(':').map(str::parse))
                .collect::<Result<_, _>>()
                .map_err(|_| wrong())?;
            let [start, len, expanded, kind] = numbers[..] else {
                return Err(wrong());
            };
            let end = start.checked_add(len).filter(|end| *end <= self.size);
            if kind != CHUNKED_TYPE || len == 0 || start < SKIPPABLE || end.is_none() {
                return Err(wrong());
            }
            if len > MAX_TABLE || expanded > MAX_TABLE {
                return Err(ImageError::too_large("its table of contents is too large"));
            }
            let digest = digest(checksum)?;
            return Ok(Some(Place::Chunked { digest, start, len }));
        }
        match find(&[STARGZ_DIGEST]) {
            Some(text) if self.size > FOOTER as u64 => {
                let digest = digest(text)?;
                Ok(Some(Place::Stargz { digest }))
            }
            _ => Ok(None),
        }
    }

    /// The index of a zstd:chunked layer, whose table, compressed, is `table`.
    ///
    /// # Errors
    /// A table that is not what the manifest has the digest of, or cannot be used.
    pub fn from_zstd_chunked(&self, table: &[u8]) -> Result<Toc, ImageError> {
        let Some(Place::Chunked { digest, start, .. }) = self.place()? else {
            return Err(ImageError::unsupported("it is no zstd:chunked layer"));
        };
        self.chunked(digest, start, table)
    }

    fn chunked(&self, digest: Digest, start: u64, table: &[u8]) -> Result<Toc, ImageError> {
        use std::io::Read as _;
        check_digest(&digest, table)?;
        let mut text = Vec::new();
        zstd::Decoder::with_buffer(table)
            .and_then(|decoder| decoder.take(MAX_TABLE + 1).read_to_end(&mut text))
            .map_err(|error| ImageError::invalid(format!("its table is broken: {error}")))?;
        if text.len() as u64 > MAX_TABLE {
            return Err(ImageError::too_large("its table of contents is too large"));
        }
        self.build(Compression::Zstd, start - SKIPPABLE, &text)
    }

    /// The index of an eStargz layer: `footer` is the last [`FOOTER`] bytes of the blob, `table` what
    /// is between the offset that it says ([`stargz_offset`]) and itself.
    ///
    /// # Errors
    /// A table that is not what the manifest has the digest of, or cannot be used.
    pub fn from_stargz(&self, footer: &[u8], table: &[u8]) -> Result<Toc, ImageError> {
        let Some(Place::Stargz { digest }) = self.place()? else {
            return Err(ImageError::unsupported("it is no eStargz layer"));
        };
        let start = stargz_offset(footer, self.size)?;
        let text = stargz_text(table)?;
        check_digest(&digest, &text)?;
        self.build(Compression::Gzip, start, &text)
    }

    /// Reads the table of the layer, if it has one that can be used.
    ///
    /// # Errors
    /// What the source says.
    pub async fn fetch(&self, source: &dyn Source) -> Result<Option<Toc>, SourceError> {
        let toc = match self.place() {
            Ok(None) => return Ok(None),
            Ok(Some(Place::Chunked { digest, start, len })) => {
                let table = self.read(source, start, len).await?;
                self.chunked(digest, start, &table)
            }
            Ok(Some(Place::Stargz { .. })) => {
                let len = TAIL.min(self.size);
                let mut tail = self.read(source, self.size - len, len).await?;
                let footer = tail.split_off(tail.len().saturating_sub(FOOTER));
                match stargz_offset(&footer, self.size) {
                    Err(error) => Err(error),
                    Ok(start) => {
                        let len = self.size - FOOTER as u64 - start;
                        let table = match tail.len().checked_sub(len as usize) {
                            Some(at) => tail.split_off(at),
                            None => self.read(source, start, len).await?,
                        };
                        self.from_stargz(&footer, &table)
                    }
                }
            }
            Err(error) => Err(error),
        };
        match toc {
            Ok(toc) => Ok(Some(toc)),
            Err(error) => {
                let layer = self.blob;
                tracing::warn!(%layer, %error, "the table of contents of a layer cannot be used: it is pulled as if it had none");
                Ok(None)
            }
        }
    }

    async fn read(
        &self,
        source: &dyn Source,
        start: u64,
        len: u64,
    ) -> Result<Vec<u8>, SourceError> {
        let location = Location {
            path: self.blob.to_string(),
            generation: None,
            offset: 0,
        };
        let mut body = source.read(&location, start..start + len).await?;
        let mut bytes = Vec::new();
        while let Some(more) = body.next().await {
            bytes.extend_from_slice(&more?);
        }
        if bytes.len() as u64 != len {
            let what = format!("layer {}", self.blob);
            let why = "the body is not as long as the range that was asked for";
            return Err(SourceError::new(SourceErrorKind::Corrupt, what, why));
        }
        Ok(bytes)
    }

    /// The index from the text of a table before which the contents end at `end`.
    fn build(&self, compression: Compression, end: u64, text: &[u8]) -> Result<Toc, ImageError> {
        let mut build = Build {
            entries: Vec::new(),
            spans: Vec::new(),
            size: 0,
            file: None,
            landmark: None,
        };
        json::parse(text, |row| {
            let name = row.name.clone();
            let row = build.row(row);
            row.map_err(|error| error.in_entry(name.as_bytes()).in_layer(self.blob))
        })?;
        build
            .end_file()
            .map_err(|error| error.in_layer(self.blob))?;
        let Build {
            entries,
            mut spans,
            size,
            landmark,
            ..
        } = build;
        let landmark = landmark.unwrap_or(0);
        let prefetch = spans.partition_point(|span| span.blob_start < landmark);
        if let Some(last) = spans.last() {
            if last.blob_start >= end {
                return Err(wrong("a chunk begins behind it").in_layer(self.blob));
            }
            spans.push(Span {
                digest: SpanDigest::Sha256(Digest::of(b"")),
                ..Span::at(size, end)
            });
        }
        let index = LayerIndex {
            blob: self.blob,
            blob_size: self.size,
            compression,
            diff_id: self.diff_id,
            size,
            entries,
            spans,
        };
        index.check()?;
        if !index.is_seekable() {
            let why = "its table has chunks that are too large";
            return Err(ImageError::unsupported(why).in_layer(self.blob));
        }
        Ok(Toc { index, prefetch })
    }
}

/// What a table says otherwise than its layer: `table` is the index made of the one, `unpacked` that
/// of the other. `None` where both tell of the same files in the same order.
///
/// A table leaves out where the content is in the tar; itself and the landmarks, which are in the
/// tar; and parts of seconds (stargz-snapshotter, estargz, `formatModtime`). Where it has the chunks
/// of a file is not compared: a file that was put together of wrong ones has not its digest.
pub fn difference(table: &LayerIndex, unpacked: &LayerIndex) -> Option<String> {
    let is_told = |entry: &&LayerEntry| {
        let is_own = match table.compression {
            Compression::Gzip => *entry.path == *STARGZ_FILE,
            _ => false,
        };
        !is_own && !is_mark(&entry.path)
    };
    let mut told = table.entries.iter().filter(is_told);
    let mut found = unpacked.entries.iter().filter(is_told);
    loop {
        let show = |entry: &LayerEntry| format!("\"{}\"", entry.path.escape_ascii());
        return Some(match (told.next(), found.next()) {
            (None, None) => return None,
            (Some(told), None) => format!("it has {}, the layer does not", show(told)),
            (None, Some(found)) => format!("it does not have {}", show(found)),
            (Some(told), Some(found)) if told.path != found.path => {
                format!("it has {} where the layer has {}", show(told), show(found))
            }
            (Some(told), Some(found)) => match differs(told, found) {
                None => continue,
                Some(what) => format!("{} has another {what} there", show(told)),
            },
        });
    }
}

/// What of one entry a table says otherwise than the layer.
fn differs(told: &LayerEntry, found: &LayerEntry) -> Option<&'static str> {
    let same = match (&told.kind, &found.kind) {
        (EntryKind::File(told), EntryKind::File(found)) => {
            (told.size, told.digest) == (found.size, found.digest)
        }
        (told, found) => told == found,
    };
    if !same {
        return Some("kind, content or target");
    }
    let (told, found) = (&told.meta, &found.meta);
    if told.mode != found.mode {
        return Some("mode");
    }
    if (told.uid, told.gid) != (found.uid, found.gid) {
        return Some("owner");
    }
    let (seconds, nanos) = found.mtime;
    let in_seconds =
        told.mtime.1 == 0 && (seconds..=seconds + i64::from(nanos > 0)).contains(&told.mtime.0);
    if told.mtime != found.mtime && !in_seconds {
        return Some("time");
    }
    let sorted = |meta: &Meta| {
        let mut xattrs = meta.xattrs.clone();
        xattrs.sort();
        xattrs
    };
    (sorted(told) != sorted(found)).then_some("extended attribute")
}

/// Whether a file is for the reader of the table, and holds nothing but a mark.
fn is_mark(name: &[u8]) -> bool {
    name == LANDMARK || name == NO_LANDMARK
}

fn wrong(why: &str) -> ImageError {
    ImageError::invalid(format!("its table of contents is wrong: {why}"))
}

fn check_digest(digest: &Digest, table: &[u8]) -> Result<(), ImageError> {
    match Digest::of(table) == *digest {
        true => Ok(()),
        false => Err(ImageError::corrupt(
            "its table of contents does not have the digest that the manifest says",
        )),
    }
}

/// Where the table of an eStargz layer of `size` bytes begins, from the last [`FOOTER`] of them.
///
/// # Errors
/// A layer that does not end so.
pub fn stargz_offset(footer: &[u8], size: u64) -> Result<u64, ImageError> {
    let none = || ImageError::unsupported("it has no footer of eStargz");
    let start = [31, 139, 8, 4];
    // An empty gzip member with an extra field "SG" of 22 bytes (RFC 1952, 2.3.1.1).
    if footer.len() != FOOTER
        || footer[..4] != start
        || footer[10..16] != [26, 0, b'S', b'G', 22, 0]
        || footer[32..38] != *b"STARGZ"
    {
        return Err(none());
    }
    let digits = std::str::from_utf8(&footer[16..32]).ok();
    let offset = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
    let offset = offset.ok_or_else(none)?;
    match (size - (FOOTER as u64).min(size)).checked_sub(offset) {
        Some(1..=MAX_TABLE) => Ok(offset),
        _ => Err(wrong("it is not where the footer says")),
    }
}

/// The text of a table that is a tar of one file in a gzip member.
fn stargz_text(table: &[u8]) -> Result<Vec<u8>, ImageError> {
    let mut tar = Vec::new();
    let mut decoder = Decoder::new(Compression::Gzip, MAX_TABLE)?;
    decoder.feed(table, &mut |data| {
        tar.extend_from_slice(&data);
        Ok::<_, ImageError>(())
    })?;
    decoder.finish()?;
    let mut parser = Parser::new();
    let (mut rest, mut text, mut found) = (&tar[..], Vec::new(), false);
    while let Some(event) = parser.event(&mut rest)? {
        match event {
            Event::Member(member) => found = member.path == STARGZ_FILE,
            Event::Data(data) if found => text.extend_from_slice(data),
            Event::End if found => return Ok(text),
            _ => {}
        }
    }
    Err(wrong("it has no stargz.index.json"))
}

/// An index that is being made.
struct Build {
    entries: Vec<LayerEntry>,
    spans: Vec<Span>,
    /// Bytes of all contents so far.
    size: u64,
    /// The file whose chunks come.
    file: Option<File>,
    /// Where the content of the landmark begins.
    landmark: Option<u64>,
}

struct File {
    member: Member,
    digest: Option<Digest>,
    chunks: Vec<Chunk>,
    /// Bytes of the file that the chunks so far are of.
    filled: u64,
}

struct Chunk {
    len: u64,
    /// Where in the blob; `None` for zeros.
    blob_start: Option<u64>,
    digest: Option<Digest>,
}

impl Build {
    fn row(&mut self, mut row: json::Row) -> Result<(), ImageError> {
        if row.kind == "chunk" {
            return self.chunk(&row);
        }
        self.end_file()?;
        let kind = match row.kind.as_str() {
            "dir" => MemberKind::Dir,
            "reg" => MemberKind::File,
            "symlink" => MemberKind::Symlink,
            "hardlink" => MemberKind::Hardlink,
            "char" => MemberKind::Char,
            "block" => MemberKind::Block,
            "fifo" => MemberKind::Fifo,
            other => {
                let why = format!("its table of contents has the unknown type {other:?}");
                return Err(ImageError::unsupported(why));
            }
        };
        let is_file = kind == MemberKind::File;
        if is_file {
            let name = row.name.as_bytes();
            let name = name.strip_prefix(b"./").unwrap_or(name);
            if name == LANDMARK {
                self.landmark = Some(row.offset);
            }
            if is_mark(name) {
                return Ok(());
            }
        }
        let mut member = row.member(kind)?;
        if !is_file {
            member.size = 0;
            return self.push(member, None);
        }
        let size = member.size;
        if size > 0 && row.inner_offset > 0 {
            let why = "its table has several chunks in one stream";
            return Err(ImageError::unsupported(why));
        }
        self.file = Some(File {
            member,
            digest: row.digest()?,
            chunks: Vec::new(),
            filled: 0,
        });
        match size {
            0 => Ok(()),
            _ => self.chunk(&row),
        }
    }

    /// A chunk of the file whose chunks come.
    fn chunk(&mut self, row: &json::Row) -> Result<(), ImageError> {
        let Some(file) = &mut self.file else {
            // That of a landmark is left out with it.
            return Ok(());
        };
        let left = file.member.size - file.filled;
        let len = match row.chunk_size {
            0 => left,
            len => len,
        };
        if row.chunk_offset != file.filled || len > left || len == 0 || row.inner_offset > 0 {
            return Err(wrong(
                "the chunks of a file are not all there, or not in order",
            ));
        }
        let blob_start = match row.chunk_type.as_str() {
            "" => Some(row.offset),
            "zeros" => None,
            other => {
                let why = format!("its table of contents has the unknown chunk type {other:?}");
                return Err(ImageError::unsupported(why));
            }
        };
        file.filled += len;
        file.chunks.push(Chunk {
            len,
            blob_start,
            digest: row.chunk_digest()?,
        });
        Ok(())
    }

    /// All chunks of the file have come.
    fn end_file(&mut self) -> Result<(), ImageError> {
        let Some(file) = self.file.take() else {
            return Ok(());
        };
        let path = file.member.path.clone();
        let ended = self.file(file);
        ended.map_err(|error| error.in_entry(&path))
    }

    fn file(&mut self, file: File) -> Result<(), ImageError> {
        let File {
            mut member,
            digest,
            chunks,
            filled,
        } = file;
        if filled != member.size {
            return Err(wrong(
                "the chunks of a file are not all there, or not in order",
            ));
        }
        let whole = chunks.len() == 1;
        let digest = match (digest, chunks.first()) {
            (None, None) => Digest::of(b""),
            (None, Some(chunk)) if whole => chunk.digest.ok_or_else(no_digest)?,
            (digest, _) => digest.ok_or_else(no_digest)?,
        };
        member.offset = self.size;
        let holes = chunks.iter().any(|chunk| chunk.blob_start.is_none());
        let mut at = 0;
        for chunk in chunks {
            if let Some(blob_start) = chunk.blob_start {
                let before = self.spans.last().map_or(0, |span| span.blob_start);
                if blob_start <= before {
                    let why = "its table has chunks in another order than its blob";
                    return Err(ImageError::unsupported(why));
                }
                let of_chunk = chunk.digest.or(whole.then_some(digest));
                let mut span = Span::at(self.size, blob_start);
                span.digest = SpanDigest::Sha256(of_chunk.ok_or_else(no_digest)?);
                self.spans.push(span);
                self.size += chunk.len;
                match member.pieces.last_mut() {
                    Some((start, len)) if *start + *len == at => *len += chunk.len,
                    _ => member.pieces.push((at, chunk.len)),
                }
            }
            at += chunk.len;
        }
        if !holes {
            member.pieces.clear();
        } else if member.pieces.is_empty() {
            member.pieces.push((member.size, 0));
        }
        self.push(member, Some(digest))
    }

    fn push(&mut self, member: Member, found: Option<Digest>) -> Result<(), ImageError> {
        let Some(mut entry) = unpack::entry(member)? else {
            return Ok(());
        };
        if let (EntryKind::File(FileContent { digest, .. }), Some(found)) = (&mut entry.kind, found)
        {
            *digest = found;
        }
        self.entries.push(entry);
        Ok(())
    }
}

fn no_digest() -> ImageError {
    ImageError::unsupported("its table of contents has no digest for all of a file")
}

#[cfg(test)]
mod tests;
