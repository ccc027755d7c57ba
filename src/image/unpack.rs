//! From the bytes of a decoded layer to its entries; file content goes to a [`Sink`] as it passes.
//!
//! Paths are cleaned and special names understood as containerd's `archive.Apply` does it (OCI
//! image-spec, layer.md), except that a path that leads out of the image is an error here. Nothing of
//! a file is kept; what is kept of all entries together is bounded by [`Limits`].

use super::{
    EntryKind, FileContent, ImageError, LayerEntry,
    tar::{Event, Member, MemberKind, Parser},
};
use crate::{
    digest::Digest,
    tree::{MAX_INODES, MAX_NAME, MAX_PATH, Meta, Xattr},
};

/// Most bytes of the value of an extended attribute (`XATTR_SIZE_MAX`).
const MAX_XATTR: usize = 64 << 10;
const WHITEOUT: &[u8] = b".wh.";
/// What AUFS keeps for itself in layers, and the mark of an opaque directory. What is *in* such
/// a directory is ordinary, since hard links may point there.
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What a layer may cost. The defaults suffice for any image seen in the wild.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most decoded bytes of the layer, with the holes of its sparse files.
    pub bytes: u64,
    /// Most entries.
    pub entries: usize,
    /// Most bytes of paths, link targets, extended attributes and sparse maps.
    pub names: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 256 << 30,
            entries: MAX_INODES,
            names: 512 << 20,
        }
    }
}

/// What becomes of the content of the files of a layer.
///
/// The slices given are slices of what was fed: a sink that wants to keep them without a copy, to
/// hash or write them elsewhere, is told the buffer before it is fed and uses
/// [`bytes::Bytes::slice_ref`].
pub trait Sink {
    type Error: From<ImageError>;

    /// A file of `size` bytes begins: `data` and `hole` follow until it is full, then `end`.
    fn begin(&mut self, size: u64) -> Result<(), Self::Error>;

    /// The next bytes of the file; never empty.
    fn data(&mut self, data: &[u8]) -> Result<(), Self::Error>;

    /// The next `len` bytes of the file are zeros.
    fn hole(&mut self, len: u64) -> Result<(), Self::Error>;

    /// All of the file was given.
    fn end(&mut self) -> Result<(), Self::Error>;

    /// A file all of whose content is at hand, as it is for most small ones; may be empty.
    fn whole(&mut self, content: &[u8]) -> Result<(), Self::Error> {
        self.begin(content.len() as u64)?;
        if !content.is_empty() {
            self.data(content)?;
        }
        self.end()
    }

    /// After the last file: the digests of all files, in the order they came. (Not earlier, so
    /// that hashing and writing can go on beside the unpacking.)
    fn digests(&mut self) -> Result<Vec<Digest>, Self::Error>;
}

/// Unpacks one layer.
#[derive(Debug)]
pub struct Unpacker {
    parser: Parser,
    layer: Digest,
    limits: Limits,
    entries: Vec<LayerEntry>,
    /// Members so far, with those that gave no entry.
    members: usize,
    /// Bytes that count for [`Limits::names`].
    names: u64,
    /// Bytes of holes so far.
    holes: u64,
    file: File,
}

/// The file that passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum File {
    None,
    /// Nothing of its content came yet.
    New {
        size: u64,
    },
    Begun,
    /// Nobody wants it.
    Skipped,
}

impl Unpacker {
    /// For the layer whose blob has the digest `layer`, which errors will name.
    pub fn new(layer: Digest, limits: Limits) -> Self {
        Self {
            parser: Parser::new(),
            layer,
            limits,
            entries: Vec::new(),
            members: 0,
            names: 0,
            holes: 0,
            file: File::None,
        }
    }

    /// Decoded bytes taken so far.
    pub const fn offset(&self) -> u64 {
        self.parser.offset()
    }

    /// Entries found so far. The digests of files are not known yet: they are zeros.
    pub fn entries(&self) -> &[LayerEntry] {
        &self.entries
    }

    /// Takes the next bytes of the decoded layer, any number.
    ///
    /// # Errors
    /// Invalid, TooLarge, Unsupported, with layer and entry; whatever the sink said. The layer cannot be
    /// unpacked then.
    pub fn feed<S: Sink>(&mut self, mut data: &[u8], sink: &mut S) -> Result<(), S::Error> {
        let layer = self.layer;
        let total = self.parser.offset().saturating_add(data.len() as u64);
        self.check_bytes(total).map_err(|e| e.in_layer(layer))?;
        loop {
            let event = self.parser.event(&mut data);
            match event.map_err(|e| e.in_layer(layer))? {
                None => return Ok(()),
                Some(Event::Member(member)) => {
                    let path = member.path.clone();
                    let result = self.member(*member);
                    result.map_err(|e| e.in_entry(&path).in_layer(layer))?;
                }
                Some(Event::Data(data)) => match self.file {
                    File::Skipped | File::None => {}
                    File::New { size } if data.len() as u64 == size => {
                        sink.whole(data)?;
                        self.file = File::None;
                    }
                    _ => {
                        self.begin(sink)?;
                        sink.data(data)?;
                    }
                },
                Some(Event::Hole(len)) => {
                    if self.file != File::Skipped {
                        self.begin(sink)?;
                        sink.hole(len)?;
                    }
                }
                Some(Event::End) => match std::mem::replace(&mut self.file, File::None) {
                    File::New { .. } => sink.whole(&[])?,
                    File::Begun => sink.end()?,
                    File::None | File::Skipped => {}
                },
            }
        }
    }

    /// The layer has ended: its entries, in the order of the tar.
    ///
    /// # Errors
    /// Invalid if it may not end here; whatever the sink says.
    pub fn finish<S: Sink>(mut self, sink: &mut S) -> Result<Vec<LayerEntry>, S::Error> {
        let layer = self.layer;
        self.parser.finish().map_err(|e| e.in_layer(layer))?;
        let mut digests = sink.digests()?.into_iter();
        let files = self.entries.iter_mut().filter_map(|e| match &mut e.kind {
            EntryKind::File(content) => Some(content),
            _ => None,
        });
        let wrong = || ImageError::invalid("its files and their digests do not match");
        for file in files {
            file.digest = digests.next().ok_or_else(|| wrong().in_layer(layer))?;
        }
        match digests.next() {
            None => Ok(self.entries),
            Some(_) => Err(wrong().in_layer(layer).into()),
        }
    }

    fn begin<S: Sink>(&mut self, sink: &mut S) -> Result<(), S::Error> {
        if let File::New { size } = self.file {
            sink.begin(size)?;
            self.file = File::Begun;
        }
        Ok(())
    }

    fn check_bytes(&self, stream: u64) -> Result<(), ImageError> {
        let limit = self.limits.bytes;
        if stream.saturating_add(self.holes) > limit {
            let why = format!("it decodes to more than {limit} bytes, the limit for one layer");
            return Err(ImageError::too_large(why));
        }
        Ok(())
    }

    /// Takes a member and what of it is an entry.
    fn member(&mut self, member: Member) -> Result<(), ImageError> {
        self.members += 1;
        if self.members > self.limits.entries {
            let why = format!("it is beyond the limit of {} entries", self.limits.entries);
            return Err(ImageError::too_large(why));
        }
        let is_file = member.kind == MemberKind::File;
        if is_file {
            let data: u64 = match member.pieces.is_empty() {
                true => member.size,
                false => member.pieces.iter().map(|piece| piece.1).sum(),
            };
            self.holes = self.holes.saturating_add(member.size - data);
            self.check_bytes(member.offset.saturating_add(data))?;
            self.file = File::Skipped;
        }
        let size = member.size;
        let Some(entry) = entry(member)? else {
            return Ok(());
        };
        self.names = self.names.saturating_add(cost(&entry));
        if self.names > self.limits.names {
            let why = format!(
                "its paths, attributes and sparse maps are more than {} bytes",
                self.limits.names
            );
            return Err(ImageError::too_large(why));
        }
        if matches!(entry.kind, EntryKind::File(_)) {
            self.file = File::New { size };
        }
        self.entries.push(entry);
        Ok(())
    }
}

/// Bytes of the heap that an entry takes: what counts for [`Limits::names`].
pub(super) fn cost(entry: &LayerEntry) -> u64 {
    let kind = match &entry.kind {
        EntryKind::Symlink { target } | EntryKind::Hardlink { target } => target.len(),
        EntryKind::File(content) => size_of_val(&content.pieces[..]),
        _ => 0,
    };
    let xattrs = entry.meta.xattrs.iter();
    let xattrs: usize = xattrs
        .map(|(name, value)| size_of::<Xattr>() + name.len() + value.len())
        .sum();
    (entry.path.len() + kind + xattrs) as u64
}

/// The entry that a member is; `None` for what containerd ignores.
pub(super) fn entry(member: Member) -> Result<Option<LayerEntry>, ImageError> {
    let path = clean(&member.path).map_err(ImageError::invalid)?;
    let (parent, name) = split(&path);
    let mark = |path: &[u8], kind| {
        Ok(Some(LayerEntry {
            path: path.into(),
            kind,
            meta: Meta {
                mode: 0,
                ..Meta::file(0)
            },
        }))
    };
    if name == OPAQUE {
        return mark(parent, EntryKind::Opaque);
    }
    if name.starts_with(WHITEOUT_META) {
        return Ok(None);
    }
    if let Some(hidden) = name.strip_prefix(WHITEOUT) {
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(ImageError::invalid("it is a whiteout of no name"));
        }
        let hidden = match parent {
            b"" => hidden.to_vec(),
            _ => [parent, b"/", hidden].concat(),
        };
        return mark(&hidden, EntryKind::Whiteout);
    }
    if path.is_empty() && member.kind != MemberKind::Dir {
        return Ok(None);
    }
    let (major, minor) = (member.major, member.minor);
    let mut mode = member.mode;
    let kind = match member.kind {
        MemberKind::Dir => EntryKind::Dir,
        MemberKind::File => EntryKind::File(FileContent {
            size: member.size,
            digest: Digest::from_bytes([0; 32]),
            offset: member.offset,
            pieces: member.pieces,
        }),
        MemberKind::Symlink => {
            check_target(&member.target).map_err(ImageError::invalid)?;
            // No file system keeps another mode for a symlink.
            mode = 0o777;
            EntryKind::Symlink {
                target: member.target.into(),
            }
        }
        MemberKind::Hardlink => {
            let target = clean(&member.target).map_err(|why| {
                ImageError::invalid(format!("the target of its hard link: {why}"))
            })?;
            if target.is_empty() {
                return Err(ImageError::invalid("it is a hard link to the root"));
            }
            EntryKind::Hardlink { target }
        }
        MemberKind::Char => EntryKind::Char { major, minor },
        MemberKind::Block => EntryKind::Block { major, minor },
        MemberKind::Fifo => EntryKind::Fifo,
    };
    let meta = Meta {
        mode,
        uid: member.uid,
        gid: member.gid,
        mtime: bound(member.mtime),
        xattrs: usable(member.xattrs)?,
    };
    Ok(Some(LayerEntry { path, kind, meta }))
}

fn check_target(target: &[u8]) -> Result<(), &'static str> {
    if target.is_empty() {
        return Err("it is a symlink to nothing");
    }
    if target.len() >= MAX_PATH {
        return Err("it is a symlink to a path longer than 4095 bytes");
    }
    if target.contains(&0) {
        return Err("it is a symlink to a path with a NUL byte");
    }
    Ok(())
}

/// A path without slashes around it, without empty components, `.` and `..`; empty for the root.
fn clean(path: &[u8]) -> Result<Box<[u8]>, &'static str> {
    if path.contains(&0) {
        return Err("its path has a NUL byte");
    }
    let mut clean: Vec<u8> = Vec::with_capacity(path.len());
    for name in path.split(|&b| b == b'/') {
        match name {
            b"" | b"." => {}
            b".." if clean.is_empty() => return Err("its path leads out of the image"),
            b".." => clean.truncate(clean.iter().rposition(|&b| b == b'/').unwrap_or(0)),
            _ if name.len() > MAX_NAME => return Err("its path has a name longer than 255 bytes"),
            _ => {
                if !clean.is_empty() {
                    clean.push(b'/');
                }
                clean.extend_from_slice(name);
            }
        }
    }
    if clean.len() > MAX_PATH {
        return Err("its path is longer than 4096 bytes");
    }
    Ok(clean.into())
}

/// The directory and the name of a clean path.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// containerd gives what is older than the epoch, or too young for 64 bits of nanoseconds, the epoch.
fn bound((seconds, nanos): (i64, u32)) -> (i64, u32) {
    let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
    match total {
        0..=0x7fff_ffff_ffff_ffff => (seconds, nanos),
        _ => (0, 0),
    }
}

/// The attributes that containerd sets: it never sets trusted ones, and the kernel has no others.
fn usable(xattrs: Vec<Xattr>) -> Result<Vec<Xattr>, ImageError> {
    let mut kept = Vec::with_capacity(xattrs.len());
    for (name, value) in xattrs {
        let known = [&b"user."[..], b"security.", b"system."];
        if !known.iter().any(|space| name.starts_with(space)) {
            continue;
        }
        if name.len() > MAX_NAME || value.len() > MAX_XATTR {
            let why = "it has an extended attribute that is too large for any file system";
            return Err(ImageError::invalid(why));
        }
        kept.push((name, value));
    }
    Ok(kept)
}

#[cfg(test)]
pub(super) mod tests;
