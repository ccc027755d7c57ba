//! Decodes a layer in one pass, as it arrives, and notes where it can be entered again.
//!
//! The layer is fed in pieces of any size and comes out in order. On the way it is hashed (its
//! diff id) and cut into [`Span`]s, each with a digest: about every [`STEP`] decoded bytes, where
//! its format allows it. That is any block of gzip, with the 32 KiB before it, of which only what
//! the span refers to is kept; the start of a member or frame, which needs nothing; any byte of
//! a plain tar. Where the cuts are depends on the layer only. Hashing is as much work as decoding,
//! so it has a thread of its own.
//!
//! Bounded: decoded bytes by what the caller allows, memory by a few blocks and the window of zstd ([`Memory`] bounds those
//! of all decoders). What was fed is trusted by nobody until [`Decoder::finish`]. Called by whoever pulls a layer.

mod frames;

use std::{collections::VecDeque, sync::Arc};

use bytes::{Bytes, BytesMut};
use sha2::{Digest as _, Sha256};

use self::frames::Frames;
pub(super) use self::frames::{run_zstd, zstd_decoder};
use super::{
    Compression, ImageError, LayerEntry, LayerIndex, Memory, Span, SpanDigest,
    hashing::Hasher,
    inflate::{Inflate, Stop, WINDOW},
};
use crate::digest::Digest;

/// Decoded bytes after which a span ends at the next place that allows it.
const STEP: u64 = 1 << 20;
/// Compressed bytes that a gzip span has at least, so that its window of a few KiB stays small
/// beside it...
const LEAST: u64 = 256 << 10;
/// ...unless it has so many decoded bytes.
const LARGE: u64 = 2 << 20;
/// Bytes in a block of output: as many as stay in the cache of a core until they are hashed.
const BLOCK: usize = 256 << 10;
/// Most blocks that are kept to be used again.
const BLOCKS: usize = 8;
/// Compressed bytes in which the first [`WINDOW`] decoded ones are found, as a rule.
const PROBE: usize = 64 << 10;

/// Takes decoded bytes, in order; its errors pass through the decoder. It may keep them, which
/// keeps all of their block of 256 KiB; one that is let go of soon is used again.
pub(super) type Out<'s, E> = dyn FnMut(Bytes) -> Result<(), E> + 's;

/// A layer while it is decoded.
pub struct Decoder {
    format: Format,
    /// Of the layer as it lies in the registry, where nobody else hashes it.
    blob: Option<Sha256>,
    track: Track,
}

enum Format {
    Plain,
    Gzip(Gzip),
    Zstd(Frames),
}

struct Gzip {
    inflate: Inflate,
    phase: Phase,
    /// Decoded bytes of this member.
    member: u64,
    /// The last byte read.
    last: u8,
    /// What follows the last cut, until there is enough to see what it refers to.
    probe: Option<Probe>,
}

#[derive(PartialEq, Eq)]
enum Phase {
    Member,
    /// After a member: another may follow.
    Between,
    /// After the last member: only zeros may follow (as gzip itself has it).
    Padding,
}

/// The start of a span inside a member: tells which bytes of its window matter.
pub(super) struct Probe {
    /// The span.
    pub(super) span: usize,
    pub(super) window: Vec<u8>,
    pub(super) bits: u8,
    pub(super) byte: u8,
    /// Compressed bytes of the span, as many as are needed.
    pub(super) input: Vec<u8>,
}

/// A layer that was decoded to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// The digest of the layer as it lies in the registry, if it was asked for.
    pub blob: Option<Digest>,
    /// Bytes of the layer as it lies in the registry.
    pub blob_size: u64,
    pub compression: Compression,
    /// The digest of the decoded layer.
    pub diff_id: Digest,
    /// Bytes of the decoded layer.
    pub size: u64,
    pub spans: Vec<Span>,
}

impl Decoded {
    /// The index of the layer with these `entries`; `blob` is its digest in the registry.
    pub fn into_index(self, blob: Digest, entries: Vec<LayerEntry>) -> LayerIndex {
        LayerIndex {
            blob,
            blob_size: self.blob_size,
            compression: self.compression,
            diff_id: self.diff_id,
            size: self.size,
            entries,
            spans: self.spans,
        }
    }
}

/// Counts, cuts and hands on what was decoded.
struct Track {
    size: u64,
    /// Most decoded bytes.
    limit: u64,
    blob_size: u64,
    spans: Vec<Span>,
    /// What is being filled.
    block: BytesMut,
    /// What was filled; used again when nobody else has it any more.
    filled: VecDeque<Bytes>,
    hasher: Hasher,
}

impl Decoder {
    /// Decodes a layer that has at most `limit` bytes when decoded.
    ///
    /// # Errors
    /// No memory.
    pub fn new(compression: Compression, limit: u64) -> Result<Self, ImageError> {
        let format = match compression {
            Compression::None => Format::Plain,
            Compression::Gzip => Format::Gzip(Gzip {
                inflate: Inflate::gzip()?,
                phase: Phase::Member,
                member: 0,
                last: 0,
                probe: None,
            }),
            Compression::Zstd => Format::Zstd(Frames::new()?),
        };
        Ok(Self {
            format,
            blob: None,
            track: Track {
                size: 0,
                limit,
                blob_size: 0,
                spans: vec![Span::at(0, 0)],
                block: BytesMut::zeroed(BLOCK),
                filled: VecDeque::new(),
                hasher: Hasher::new(),
            },
        })
    }

    /// Waits for room in `memory` where a frame asks for a large window: [`Decoder::feed`] blocks for that long, after it has
    /// called `waits`.
    #[must_use]
    pub fn within(mut self, memory: &Arc<Memory>, waits: impl FnMut() + Send + 'static) -> Self {
        if let Format::Zstd(frames) = &mut self.format {
            frames.take_room_from(Arc::clone(memory), Box::new(waits));
        }
        self
    }

    /// Hashes the layer as it is fed, too: [`Decoded::blob`].
    #[must_use]
    pub fn hashing_blob(mut self) -> Self {
        self.blob = Some(Sha256::new());
        self
    }

    /// Decoded bytes so far.
    pub const fn decoded(&self) -> u64 {
        self.track.size
    }

    /// Takes the next bytes of the layer, and gives what they decode to.
    ///
    /// # Errors
    /// A stream that is broken or decodes to more than is allowed, and what `out` says. After an
    /// error there is no more to come.
    pub fn feed<E: From<ImageError>>(
        &mut self,
        compressed: &[u8],
        out: &mut Out<'_, E>,
    ) -> Result<(), E> {
        if let Some(blob) = &mut self.blob {
            blob.update(compressed);
        }
        match &mut self.format {
            Format::Plain => feed_plain(&mut self.track, compressed, out),
            Format::Gzip(gzip) => gzip.feed(&mut self.track, compressed, out),
            Format::Zstd(frames) => frames.feed(&mut self.track, compressed, out),
        }
    }

    /// Says that all of the layer was fed.
    ///
    /// # Errors
    /// A layer that is cut short.
    pub fn finish(mut self) -> Result<Decoded, ImageError> {
        let cut_short = || Err(ImageError::invalid("its compressed stream is cut short"));
        let compression = match &mut self.format {
            Format::Plain => Compression::None,
            Format::Gzip(gzip) => {
                if gzip.phase == Phase::Member {
                    return cut_short();
                }
                gzip.end_probe(&mut self.track)?;
                Compression::Gzip
            }
            Format::Zstd(frames) if frames.is_whole() => Compression::Zstd,
            Format::Zstd(_) => return cut_short(),
        };
        let Track {
            size,
            blob_size,
            mut spans,
            hasher,
            ..
        } = self.track;
        let hashes = hasher.finish()?;
        for (span, digest) in spans.iter_mut().zip(&hashes.spans) {
            span.digest = *digest;
        }
        for (span, window) in hashes.windows {
            spans[span].window = window;
        }
        // What follows the last decoded byte, trailers and padding, belongs to the last span.
        while spans.last().is_some_and(|span| span.start == size) {
            spans.pop();
        }
        let finish = |hash: Sha256| Digest::from_bytes(hash.finalize().into());
        Ok(Decoded {
            blob: self.blob.map(finish),
            blob_size,
            compression,
            diff_id: hashes.whole,
            size,
            spans,
        })
    }
}

impl Span {
    pub(super) fn at(start: u64, blob_start: u64) -> Self {
        Self {
            start,
            blob_start,
            bits: 0,
            window: Box::default(),
            digest: SpanDigest::Blake3([0; 32]),
        }
    }
}

impl Track {
    /// Decoded bytes of the span so far.
    fn decoded(&self) -> u64 {
        self.size - self.spans.last().map_or(0, |span| span.start)
    }

    /// Compressed bytes of the span so far.
    fn compressed(&self) -> u64 {
        self.blob_size - self.spans.last().map_or(0, |span| span.blob_start)
    }

    /// Room for decoded bytes.
    fn room(&mut self) -> &mut [u8] {
        &mut self.block
    }

    /// Hands on what was decoded into the room.
    fn emit<E: From<ImageError>>(&mut self, len: usize, out: &mut Out<'_, E>) -> Result<(), E> {
        if len == 0 {
            return Ok(());
        }
        self.size += len as u64;
        if self.size > self.limit {
            let why = format!("it decodes to more than {} bytes", self.limit);
            return Err(ImageError::too_large(why).into());
        }
        let block = std::mem::take(&mut self.block).freeze();
        let data = block.slice(..len);
        self.filled.push_back(block);
        let hashed = self.hasher.data(data.clone());
        let taken = hashed.map_err(E::from).and_then(|()| out(data));
        self.block = self.fresh();
        taken
    }

    /// A block to fill.
    fn fresh(&mut self) -> BytesMut {
        if let Some(at) = self.filled.iter().position(Bytes::is_unique)
            && let Some(block) = self.filled.remove(at)
            && let Ok(block) = block.try_into_mut()
        {
            return block;
        }
        if self.filled.len() >= BLOCKS {
            self.filled.pop_front();
        }
        BytesMut::zeroed(BLOCK)
    }

    /// Ends the span; another begins here.
    fn cut(&mut self, bits: u8) -> Result<(), ImageError> {
        let mut span = Span::at(self.size, self.blob_size);
        span.bits = bits;
        self.spans.push(span);
        self.hasher.cut()
    }
}

fn feed_plain<E: From<ImageError>>(
    track: &mut Track,
    data: &[u8],
    out: &mut Out<'_, E>,
) -> Result<(), E> {
    let mut rest = data;
    while !rest.is_empty() {
        if track.decoded() == STEP {
            track.cut(0)?;
        }
        let most = BLOCK.min((STEP - track.decoded()) as usize);
        let (piece, after) = rest.split_at(rest.len().min(most));
        track.room()[..piece.len()].copy_from_slice(piece);
        track.blob_size += piece.len() as u64;
        track.emit(piece.len(), out)?;
        rest = after;
    }
    Ok(())
}

impl Gzip {
    fn feed<E: From<ImageError>>(
        &mut self,
        track: &mut Track,
        compressed: &[u8],
        out: &mut Out<'_, E>,
    ) -> Result<(), E> {
        let mut rest = compressed;
        loop {
            match self.phase {
                Phase::Member => {}
                _ if rest.is_empty() => return Ok(()),
                Phase::Between if rest[0] != 0 => self.next_member(track)?,
                Phase::Between | Phase::Padding => {
                    self.phase = Phase::Padding;
                    if rest.iter().any(|&byte| byte != 0) {
                        let why = "bytes that are no gzip follow its last member";
                        return Err(ImageError::invalid(why).into());
                    }
                    track.blob_size += rest.len() as u64;
                    return Ok(());
                }
            }
            let decoded = track.decoded();
            // A stop at every block costs speed, so only where a cut is wanted.
            let cut_here = decoded >= LARGE || decoded >= STEP && track.compressed() >= LEAST;
            let most = match decoded {
                _ if cut_here => BLOCK,
                0..STEP => BLOCK.min((STEP - decoded) as usize),
                _ => BLOCK,
            };
            let step = self
                .inflate
                .run(rest, &mut track.room()[..most], cut_here)?;
            let (taken, after) = rest.split_at(step.read);
            rest = after;
            if let Some(&last) = taken.last() {
                self.last = last;
            }
            track.blob_size += taken.len() as u64;
            self.member += step.written as u64;
            track.emit(step.written, out)?;
            if let Some(probe) = &mut self.probe {
                let missing = PROBE - probe.input.len();
                probe
                    .input
                    .extend_from_slice(&taken[..taken.len().min(missing)]);
                if probe.input.len() == PROBE {
                    self.end_probe(track)?;
                }
            }
            match step.stop {
                Stop::End => {
                    self.end_probe(track)?;
                    self.phase = Phase::Between;
                }
                Stop::Block { bits } if cut_here && self.member > 0 => {
                    self.end_probe(track)?;
                    self.cut(track, bits)?;
                }
                _ if step.read == 0 && step.written == 0 => return Ok(()),
                _ => {}
            }
        }
    }

    /// Starts the next member; and a span with it if that one is worth it, since it needs no
    /// window here.
    fn next_member(&mut self, track: &mut Track) -> Result<(), ImageError> {
        if track.decoded() >= STEP / 2 {
            track.cut(0)?;
        }
        self.inflate.reset_to_gzip()?;
        self.phase = Phase::Member;
        self.member = 0;
        Ok(())
    }

    /// Starts a span inside the member.
    fn cut(&mut self, track: &mut Track, bits: u8) -> Result<(), ImageError> {
        track.cut(bits)?;
        self.probe = Some(Probe {
            span: track.spans.len() - 1,
            window: self.inflate.window()?,
            bits,
            byte: self.last,
            input: Vec::with_capacity(PROBE),
        });
        Ok(())
    }

    fn end_probe(&mut self, track: &mut Track) -> Result<(), ImageError> {
        match self.probe.take() {
            Some(probe) => track.hasher.probe(probe),
            None => Ok(()),
        }
    }
}

impl Probe {
    /// The window, compressed, with zeros where nothing refers to it. For that the start of the
    /// span is decoded after two windows that hold the low and the high half of their own
    /// offsets: a decoded byte that comes from the window tells from where. A literal tells the
    /// same value twice, and so stands for one offset that is kept for nothing.
    pub(super) fn into_window(mut self, inflate: &mut Inflate) -> Result<Box<[u8]>, ImageError> {
        let offsets = 0..self.window.len();
        let low: Vec<u8> = offsets.clone().map(|at| at as u8).collect();
        let high: Vec<u8> = offsets.map(|at| (at >> 8) as u8).collect();
        let low = self.decode(inflate, &low)?;
        let high = self.decode(inflate, &high)?;
        if let (Some(low), Some(high)) = (low, high) {
            let mut kept = vec![false; 1 << 16];
            for (low, high) in low.iter().zip(&high) {
                kept[usize::from(u16::from_le_bytes([*low, *high]))] = true;
            }
            for (byte, kept) in self.window.iter_mut().zip(kept) {
                if !kept {
                    *byte = 0;
                }
            }
        }
        compress_window(&self.window)
    }

    /// The first bytes of the span if `window` came before it; `None` if they are not all here.
    fn decode(&self, inflate: &mut Inflate, window: &[u8]) -> Result<Option<Vec<u8>>, ImageError> {
        inflate.reset_to_block(window, self.bits, self.byte)?;
        let mut out = vec![0; WINDOW];
        let (mut read, mut written) = (0, 0);
        loop {
            let step = inflate.run(&self.input[read..], &mut out[written..], false)?;
            (read, written) = (read + step.read, written + step.written);
            if written == WINDOW || step.stop == Stop::End {
                out.truncate(written);
                return Ok(Some(out));
            }
            if step.read == 0 && step.written == 0 {
                return Ok(None);
            }
        }
    }
}

fn compress_window(window: &[u8]) -> Result<Box<[u8]>, ImageError> {
    const LEVEL: i32 = 3;
    let compressed = zstd::bulk::compress(window, LEVEL);
    compressed
        .map(Into::into)
        .map_err(|error| ImageError::invalid(format!("a window cannot be compressed: {error}")))
}

#[cfg(test)]
mod tests;
