//! Layers of container images (and of models that come as tars): decoding, indexes, merging.
//!
//! A layer is a compressed tar (OCI image-spec, layer.md). One pass over it gives its entries, the
//! digests of its files and the points from which it can be decoded again: its [`LayerIndex`].
//! With that index any range of the decoded layer is made from a few compressed bytes, every span
//! of it verified. Layers are merged to the one tree that overlayfs would show.
//!
//! Everything here takes bytes, not paths, and bounds what it allocates: layers and indexes come
//! from strangers. Called by `fetch` and `node`; what survives a crash is kept by the store.

mod decode;
pub mod erofs;
mod error;
mod hashing;
mod index;
mod inflate;
mod memory;
mod merge;
pub mod profile;
#[cfg(test)]
mod samples;
mod seek;
mod span;
pub mod tar;
pub mod toc;
mod unpack;

pub use decode::{Decoded, Decoder};
pub use error::{ImageError, ImageErrorKind};
pub use index::MAX_SPAN;
pub use memory::Memory;
pub use merge::merge;
pub use span::LayerSource;
pub use unpack::{Limits, Sink, Unpacker};

use crate::{
    digest::Digest,
    tree::{self, Location, Meta},
};

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// A plain tar.
    None,
    /// One or more gzip members (RFC 1952).
    Gzip,
    /// One or more zstd frames (RFC 8878).
    Zstd,
}

/// What there is to know of one layer: its entries, and how to decode it from the middle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerIndex {
    /// The digest of the layer as it lies in the registry.
    pub blob: Digest,
    /// Bytes of the layer as it lies in the registry.
    pub blob_size: u64,
    pub compression: Compression,
    /// The digest of the decoded layer (OCI image-spec, config.md, `rootfs.diff_ids`).
    pub diff_id: Digest,
    /// Bytes of the decoded layer.
    pub size: u64,
    /// In the order of the tar. Of several entries of one path the last one counts.
    pub entries: Vec<LayerEntry>,
    /// Sorted and without gaps: together they are the decoded layer.
    pub spans: Vec<Span>,
}

/// One entry of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerEntry {
    /// Without leading and trailing slashes, without `.` and `..`; empty for the root.
    pub path: Box<[u8]>,
    pub kind: EntryKind,
    pub meta: Meta,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    Dir,
    File(FileContent),
    Symlink {
        target: Box<[u8]>,
    },
    /// Another name of the file at `target`, a path like [`LayerEntry::path`].
    Hardlink {
        target: Box<[u8]>,
    },
    Char {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    Fifo,
    /// Hides what lower layers have at this path (OCI image-spec, layer.md, "Whiteouts").
    Whiteout,
    /// The directory at this path hides all that lower layers have in it.
    Opaque,
}

/// The content of a regular file and where it is in the decoded layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileContent {
    /// Bytes of the file.
    pub size: u64,
    pub digest: Digest,
    /// Where its data starts in the decoded layer.
    pub offset: u64,
    /// Of a sparse file: (offset in the file, length) of each piece of data, which follow each
    /// other from `offset` on; the rest is zeros. Empty for a file that is stored in one piece.
    pub pieces: Vec<(u64, u64)>,
}

/// A run of the decoded layer that can be decoded by itself, and its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Where it starts in the decoded layer.
    pub start: u64,
    /// The first compressed byte that is needed.
    pub blob_start: u64,
    /// Of gzip: how many bits of the byte before `blob_start` belong to it (`inflatePrime`).
    pub bits: u8,
    /// Of gzip inside a member: the 32 KiB before it, with which decoding starts, with zeros where
    /// nothing refers to them, and compressed with zstd; empty at the start of a member or frame.
    pub window: Box<[u8]>,
    /// Of the decoded span.
    pub digest: SpanDigest,
}

/// The digest of a decoded span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanDigest {
    /// As layers that carry a table of contents have it.
    Sha256(Digest),
    /// As it is computed here: on a processor with AVX-512 three times as fast as SHA-256.
    Blake3([u8; 32]),
}

impl LayerIndex {
    /// The index of a layer that is no tar but one file, to be merged with others.
    ///
    /// # Errors
    /// A path that no file can have.
    pub fn of_file(blob: Digest, size: u64, path: &str, meta: Meta) -> Result<Self, ImageError> {
        let wrong = path
            .split('/')
            .any(|name| tree::check_name(name.as_bytes()).is_err());
        if wrong || path.len() > tree::MAX_PATH {
            let error = ImageError::invalid("it is a file whose path leads out of the image");
            return Err(error.in_layer(blob).in_entry(path.as_bytes()));
        }
        let content = FileContent {
            size,
            digest: blob,
            offset: 0,
            pieces: Vec::new(),
        };
        Ok(Self {
            blob,
            blob_size: size,
            compression: Compression::None,
            diff_id: blob,
            size,
            entries: vec![LayerEntry {
                path: path.as_bytes().into(),
                kind: EntryKind::File(content),
                meta,
            }],
            spans: vec![Span {
                start: 0,
                blob_start: 0,
                bits: 0,
                window: Box::default(),
                digest: SpanDigest::Sha256(blob),
            }],
        })
    }

    /// The contents of its files; of several entries of one path, of each.
    pub fn files(&self) -> impl Iterator<Item = &FileContent> {
        self.entries.iter().filter_map(|entry| match &entry.kind {
            EntryKind::File(content) => Some(content),
            _ => None,
        })
    }

    /// Whether it describes the same layer in the same way; the places where it can be entered
    /// may be others.
    pub fn agrees_with(&self, other: &Self) -> bool {
        self.blob == other.blob
            && self.diff_id == other.diff_id
            && self.size == other.size
            && self.entries == other.entries
    }

    /// Where the content of entry `index`, which is a file, is read: a location for a
    /// `LayerSource` over this index. Its path is `<blob digest>#<compression>`, its offset counts
    /// decoded bytes; a sparse file has a path of its own, `<blob digest>#<compression>@<index>`,
    /// whose offsets are those of the file. Its generation tells apart the index of a layer from
    /// one that was made from the layer's table of contents, whose offsets are others.
    pub fn location(&self, index: usize, content: &FileContent) -> Location {
        let compression = self.compression.name();
        let (path, offset) = match content.pieces.is_empty() {
            true => (format!("{}#{compression}", self.blob), content.offset),
            false => (format!("{}#{compression}@{index}", self.blob), 0),
        };
        Location {
            path,
            generation: Some(self.generation()),
            offset,
        }
    }
}

impl LayerIndex {
    /// What its locations are pinned to.
    fn generation(&self) -> String {
        format!("{}+{}", self.diff_id, self.size)
    }
}

impl Compression {
    /// That of a layer which begins with `bytes`, as containerd tells it: media types lie.
    pub fn of(bytes: &[u8]) -> Self {
        match bytes {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A frame, or a skippable one (RFC 8878, 3.1).
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// Its name: as in the media types of OCI layers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}
