//! [`AccessProfile`]: what a container read when it started, in the order in which it did. A hint:
//! nothing is believed because of it.
//!
//! ```text
//! "hrthprof" version
//! length, zstd of:
//!     count { content[32] first_chunk chunks }*      numbers as in the encoding of trees
//! ```

use super::ImageError;
use crate::{
    digest::Digest,
    tree::{Reader, TreeError, Writer},
};

const MAGIC: &[u8; 8] = b"hrthprof";
const VERSION: u64 = 1;
const ZSTD_LEVEL: i32 = 3;
/// Most reads in a profile.
pub const MAX_READS: usize = 1 << 16;
/// Most chunks of all reads together: a container that starts reads far less.
pub const MAX_CHUNKS: u64 = 1 << 20;
/// Most bytes of an encoded profile.
pub const MAX_PROFILE: u64 = 4 << 20;
/// Most bytes of one read: a digest and two numbers of up to ten.
const MAX_READ: usize = 32 + 20;

/// Chunks of one file that were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProfiledRead {
    /// The content of the file.
    pub content: Digest,
    /// The first chunk (see [`crate::chunk`]).
    pub first: u64,
    /// Chunks; at least one.
    pub chunks: u64,
}

/// What was read, in order; no chunk twice, unless a stranger made it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AccessProfile {
    pub reads: Vec<ProfiledRead>,
}

impl AccessProfile {
    /// The encoding. Reads beyond [`MAX_READS`] and [`MAX_CHUNKS`] are left out.
    ///
    /// # Errors
    /// Where it cannot be compressed.
    pub fn encode(&self) -> Result<Vec<u8>, ImageError> {
        let mut chunks = 0u64;
        let fits = |read: &&ProfiledRead| {
            chunks = chunks.saturating_add(read.chunks);
            chunks <= MAX_CHUNKS
        };
        let reads: Vec<_> = (self.reads.iter().take(MAX_READS))
            .take_while(fits)
            .collect();
        let mut body = Writer(Vec::with_capacity(reads.len() * 36));
        body.number(reads.len() as u64);
        for read in reads {
            body.0.extend_from_slice(read.content.as_bytes());
            body.number(read.first);
            body.number(read.chunks);
        }
        let body = zstd::bulk::compress(&body.0, ZSTD_LEVEL)
            .map_err(|error| ImageError::invalid(format!("its profile: {error}")))?;
        let mut out = Writer(Vec::with_capacity(body.len() + 16));
        out.0.extend_from_slice(MAGIC);
        out.number(VERSION);
        out.bytes(&body);
        Ok(out.0)
    }

    /// Decodes what [`AccessProfile::encode`] wrote.
    ///
    /// # Errors
    /// Anything else; [`super::ImageErrorKind::Unsupported`] for another version.
    pub fn decode(bytes: &[u8]) -> Result<Self, ImageError> {
        if bytes.len() as u64 > MAX_PROFILE {
            return Err(ImageError::too_large("its access profile is too large"));
        }
        let mut input = Reader(bytes);
        if input.take(MAGIC.len()).map_err(damaged)? != MAGIC {
            return Err(ImageError::invalid("this is no access profile"));
        }
        if input.number().map_err(damaged)? != VERSION {
            let why = "its access profile is of another version of hearth";
            return Err(ImageError::unsupported(why));
        }
        let body = input.bytes().map_err(damaged)?;
        let body = zstd::bulk::decompress(body, MAX_READS * MAX_READ + 10)
            .map_err(|error| ImageError::invalid(format!("its access profile: {error}")))?;
        let mut input = Reader(&body);
        let count = input.count(32 + 2).map_err(damaged)?;
        if count > MAX_READS {
            return Err(ImageError::invalid("its access profile has too many reads"));
        }
        let mut reads = Vec::with_capacity(count);
        let mut chunks = 0u64;
        for _ in 0..count {
            let read = ProfiledRead {
                content: Digest::from_bytes(input.array().map_err(damaged)?),
                first: input.number().map_err(damaged)?,
                chunks: input.number().map_err(damaged)?,
            };
            if read.chunks == 0 || read.first.checked_add(read.chunks).is_none() {
                return Err(ImageError::invalid("its access profile has an empty read"));
            }
            chunks = chunks.saturating_add(read.chunks);
            if chunks > MAX_CHUNKS {
                let why = "its access profile has more chunks than a start reads";
                return Err(ImageError::too_large(why));
            }
            reads.push(read);
        }
        Ok(Self { reads })
    }
}

fn damaged(error: TreeError) -> ImageError {
    ImageError::invalid(format!("its access profile is damaged: {error}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn profile() -> impl Strategy<Value = AccessProfile> {
        let read = (any::<[u8; 32]>(), 0..1u64 << 40, 1..1u64 << 14);
        let reads = proptest::collection::vec(read, 0..50);
        reads.prop_map(|reads| AccessProfile {
            reads: (reads.into_iter())
                .map(|(content, first, chunks)| ProfiledRead {
                    content: Digest::from_bytes(content),
                    first,
                    chunks,
                })
                .collect(),
        })
    }

    proptest! {
        #[test]
        fn round_trips(profile in profile()) {
            let bytes = profile.encode().unwrap();
            prop_assert_eq!(AccessProfile::decode(&bytes).unwrap(), profile);
        }

        #[test]
        fn any_bytes_are_an_error_or_a_profile(
            profile in profile(),
            at in any::<prop::sample::Index>(),
            flip in 1..=255u8,
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = profile.encode().unwrap();
            let len = bytes.len();
            bytes[at.index(len)] ^= flip;
            let _ = AccessProfile::decode(&bytes);
            let _ = AccessProfile::decode(&bytes[..cut.index(len)]);
        }
    }

    #[test]
    fn a_bomb_is_refused() {
        let mut out = Writer(MAGIC.to_vec());
        out.number(VERSION);
        out.bytes(&zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap());
        assert!(AccessProfile::decode(&out.0).is_err());
    }

    #[test]
    fn more_than_a_start_reads_is_refused() {
        let read = |chunks| ProfiledRead {
            content: Digest::of(b""),
            first: 0,
            chunks,
        };
        let reads = vec![read(1), read(MAX_CHUNKS - 1), read(1)];
        let bytes = AccessProfile { reads }.encode().unwrap();
        let kept = AccessProfile::decode(&bytes).unwrap();
        assert_eq!(kept.reads, [read(1), read(MAX_CHUNKS - 1)]);

        let mut body = Writer(Vec::new());
        body.number(2);
        for chunks in [1, u64::MAX] {
            body.0.extend_from_slice(Digest::of(b"").as_bytes());
            body.number(0);
            body.number(chunks);
        }
        let mut out = Writer(MAGIC.to_vec());
        out.number(VERSION);
        out.bytes(&zstd::bulk::compress(&body.0, 1).unwrap());
        let error = AccessProfile::decode(&out.0).unwrap_err();
        assert_eq!(error.kind(), crate::image::ImageErrorKind::TooLarge);
    }
}
