//! Decodes one span of a layer by itself, and verifies it.

use super::{
    Compression, ImageError, LayerIndex, Span, SpanDigest,
    decode::{run_zstd, zstd_decoder},
    index::MAX_SPAN,
    inflate::{Inflate, Stop, WINDOW},
};
use crate::digest::Digest;

impl SpanDigest {
    /// Whether it is the digest of `data`.
    pub fn matches(&self, data: &[u8]) -> bool {
        match self {
            Self::Sha256(digest) => Digest::of(data) == *digest,
            Self::Blake3(digest) => blake3::hash(data) == *digest,
        }
    }
}

impl LayerIndex {
    /// Which decoded bytes span `at` has.
    ///
    /// # Panics
    /// Where there is no such span.
    pub fn span_bytes(&self, at: usize) -> std::ops::Range<u64> {
        let end = self.spans.get(at + 1).map_or(self.size, |next| next.start);
        self.spans[at].start..end
    }

    /// The bytes of the layer, as it lies in the registry, that are needed to decode span `at`.
    ///
    /// # Panics
    /// Where there is no such span.
    pub fn span_blob_bytes(&self, at: usize) -> std::ops::Range<u64> {
        let span = &self.spans[at];
        let next = self.spans.get(at + 1);
        let end = next.map_or(self.blob_size, |next| next.blob_start);
        span.blob_start - u64::from(span.bits > 0)..end
    }

    /// The bytes of the layer, as it lies in the registry, that are needed to decode `bytes` of its
    /// content; none where there is no such content.
    pub fn blob_bytes(&self, bytes: &std::ops::Range<u64>) -> std::ops::Range<u64> {
        if bytes.is_empty() || bytes.end > self.size || self.spans.is_empty() {
            return 0..0;
        }
        let of = |offset: u64| self.spans.partition_point(|span| span.start <= offset) - 1;
        let (first, last) = (of(bytes.start), of(bytes.end - 1));
        self.span_blob_bytes(first).start..self.span_blob_bytes(last).end
    }

    /// Decodes span `at` from its bytes ([`LayerIndex::span_blob_bytes`]) and verifies it.
    ///
    /// # Errors
    /// [`super::ImageErrorKind::Corrupt`] where they are not what the index promises.
    ///
    /// # Panics
    /// Where there is no such span.
    pub fn decode_span(&self, at: usize, compressed: &[u8]) -> Result<Vec<u8>, ImageError> {
        let range = self.span_bytes(at);
        let corrupt = |why: &str| {
            let (start, end) = (range.start, range.end);
            let why = format!("bytes {start} to {end} of its content: {why}");
            ImageError::corrupt(why).in_layer(self.blob)
        };
        let len = range.end - range.start;
        if len > MAX_SPAN {
            return Err(corrupt("too many for one span"));
        }
        let mut out = vec![0; len as usize];
        let span = &self.spans[at];
        let filled = match self.compression {
            Compression::None if compressed.len() == out.len() => {
                out.copy_from_slice(compressed);
                Ok(out.len())
            }
            Compression::None => Ok(0),
            Compression::Gzip => gzip_span(span, compressed, &mut out),
            Compression::Zstd => zstd_span(compressed, &mut out),
        };
        match filled {
            Err(error) => Err(corrupt(&error.to_string())),
            Ok(filled) if filled < out.len() => Err(corrupt("its compressed bytes end too soon")),
            Ok(_) if !span.digest.matches(&out) => {
                Err(corrupt("they do not have the digest that its index has"))
            }
            Ok(_) => Ok(out),
        }
    }
}

fn gzip_span(span: &Span, compressed: &[u8], out: &mut [u8]) -> Result<usize, ImageError> {
    let cut_short = || ImageError::invalid("its compressed bytes end too soon");
    let mut inflate = Inflate::gzip()?;
    let mut rest = compressed;
    let mut raw = !span.window.is_empty();
    if raw {
        let window = zstd::bulk::decompress(&span.window, WINDOW);
        let window = window.map_err(|_| ImageError::invalid("its window is broken"))?;
        let mut byte = 0;
        if span.bits > 0 {
            (byte, rest) = rest
                .split_first()
                .map(|(b, r)| (*b, r))
                .ok_or_else(cut_short)?;
        }
        inflate.reset_to_block(&window, span.bits, byte)?;
    }
    let mut filled = 0;
    while filled < out.len() {
        let step = inflate.run(rest, &mut out[filled..], false)?;
        filled += step.written;
        rest = &rest[step.read..];
        if step.stop == Stop::End {
            if raw {
                // Nobody has checked its trailer: this span did not begin with the member.
                rest = rest.get(8..).ok_or_else(cut_short)?;
                raw = false;
            }
            inflate.reset_to_gzip()?;
        } else if step.read == 0 && step.written == 0 {
            break;
        }
    }
    Ok(filled)
}

fn zstd_span(compressed: &[u8], out: &mut [u8]) -> Result<usize, ImageError> {
    let mut decoder = zstd_decoder()?;
    let (mut rest, mut filled) = (compressed, 0);
    while filled < out.len() {
        let step = run_zstd(&mut decoder, rest, &mut out[filled..])?;
        filled += step.bytes_written;
        rest = &rest[step.bytes_read..];
        if step.bytes_read == 0 && step.bytes_written == 0 {
            break;
        }
    }
    Ok(filled)
}
