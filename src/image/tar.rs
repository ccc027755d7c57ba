//! A parser of a tar stream that is fed pieces of any size and keeps none of the content.
//!
//! Reads ustar, PAX, GNU, star and v7 archives (POSIX.1-2024 pax, "ustar Interchange Format" and
//! "pax Interchange Format"; GNU tar manual, "Tar Internals"), with all sparse formats of GNU tar.
//! What is lenient and what is not follows Go's `archive/tar`, with which containerd unpacks:
//! either checksum, an end without zero blocks, bytes after the end, global PAX headers (ignored).
//!
//! Content is given as slices of what was fed. What is allocated is bounded by [`MAX_SPECIAL`] and
//! [`MAX_PIECES`], whatever the archive says.

mod header;
mod pax;
mod sparse;

use self::{header::Raw, pax::Pax, sparse::MapReader};
use super::ImageError;
use crate::tree::Xattr;

/// Bytes of a block: everything in a tar is aligned to it.
pub const BLOCK: usize = 512;
/// Most bytes of an extended header, a long name or a long link target.
pub const MAX_SPECIAL: usize = 1 << 20;
/// Most pieces of data of one sparse file.
pub const MAX_PIECES: usize = 1 << 18;

/// What a member is. Contiguous files are files; a v7 file whose name ends with `/` is a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberKind {
    File,
    Dir,
    Symlink,
    Hardlink,
    Char,
    Block,
    Fifo,
}

/// A member of the archive, names as they are written there: not cleaned, not checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub kind: MemberKind,
    pub path: Vec<u8>,
    /// What a symlink or hard link points to.
    pub target: Vec<u8>,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since the epoch, and nanoseconds below 1e9 that are added to them.
    pub mtime: (i64, u32),
    /// Of a device.
    pub major: u32,
    pub minor: u32,
    /// From `SCHILY.xattr.*`, sorted by name, names unique.
    pub xattrs: Vec<Xattr>,
    /// Bytes of a file, holes included; 0 for anything else.
    pub size: u64,
    /// Where the data of a file starts in the stream.
    pub offset: u64,
    /// As in [`super::FileContent::pieces`].
    pub pieces: Vec<(u64, u64)>,
}

/// What comes next in the archive.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'d> {
    /// A member begins. Only after a file follow `Data`, `Hole` and one `End`.
    Member(Box<Member>),
    /// The next bytes of the file; never empty.
    Data(&'d [u8]),
    /// The next so many bytes of the file are zeros that are not stored; never 0.
    Hole(u64),
    /// The file is complete.
    End,
}

/// The parser; see the module.
#[derive(Debug)]
pub struct Parser {
    state: State,
    /// Bytes taken so far.
    offset: u64,
    /// Part of a block that came in several pieces.
    block: Box<[u8; BLOCK]>,
    filled: usize,
    /// What extended headers said of the next member.
    pax: Pax,
    long_name: Option<Vec<u8>>,
    long_target: Option<Vec<u8>>,
}

#[derive(Debug)]
enum State {
    /// A header comes; `zero`: after one block of zeros.
    Header {
        zero: bool,
    },
    /// An extended header or long name, and the padding after it.
    Special {
        /// Where its header is.
        at: u64,
        flag: u8,
        data: Vec<u8>,
        left: usize,
        pad: u64,
    },
    /// More of the map of an old GNU sparse file.
    SparseBlock(Box<Sparse>),
    /// The map of a PAX 1.0 sparse file, which precedes its data.
    SparseMap(Box<Sparse>, MapReader),
    Content(Content),
    /// Bytes that nobody needs. An archive may end in `padding`.
    Skip {
        left: u64,
        padding: bool,
    },
    /// After the end: whatever comes is ignored.
    End,
}

/// A sparse file whose map is not complete yet.
#[derive(Debug)]
struct Sparse {
    member: Box<Member>,
    map: Vec<(u64, u64)>,
    /// Bytes of the member in the archive, without what was read of the map.
    stored: u64,
}

/// The content of the file that passes.
#[derive(Debug)]
struct Content {
    /// The pieces that did not come yet, last first.
    pieces: Vec<(u64, u64)>,
    /// Bytes left of the piece that is coming.
    left: u64,
    /// How much of the file is known, with the piece that is coming.
    known: u64,
    size: u64,
    pad: u64,
}

impl Default for Parser {
    fn default() -> Self {
        Self::new()
    }
}

impl Parser {
    /// A parser at the start of an archive.
    pub fn new() -> Self {
        Self {
            state: State::Header { zero: false },
            offset: 0,
            block: Box::new([0; BLOCK]),
            filled: 0,
            pax: Pax::default(),
            long_name: None,
            long_target: None,
        }
    }

    /// Bytes taken so far: where in the stream the parser is.
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// What comes next; takes from the front of `input`. `None` if more input is needed, which is
    /// only when all of `input` was taken.
    ///
    /// # Errors
    /// Invalid, TooLarge or Unsupported, with the offset of the header. The parser is then of no more use.
    pub fn event<'d>(&mut self, input: &mut &'d [u8]) -> Result<Option<Event<'d>>, ImageError> {
        loop {
            match &mut self.state {
                State::Header { .. } => {
                    let Some(block) = self.take_block(input) else {
                        return Ok(None);
                    };
                    if let Some(member) = self.header(&block)? {
                        return Ok(Some(Event::Member(member)));
                    }
                }
                State::Special {
                    at,
                    flag,
                    data,
                    left,
                    pad,
                } => {
                    let taken = split(input, *left as u64);
                    self.offset += taken.len() as u64;
                    *left -= taken.len();
                    data.extend_from_slice(taken);
                    if *left > 0 {
                        return Ok(None);
                    }
                    let (at, flag, data, pad) = (*at, *flag, std::mem::take(data), *pad);
                    self.special(at, flag, data)?;
                    self.skip(pad, true);
                }
                State::SparseBlock(_) => {
                    let Some(block) = self.take_block(input) else {
                        return Ok(None);
                    };
                    let State::SparseBlock(sparse) = self.take_state() else {
                        continue;
                    };
                    if let Some(member) = self.old_sparse(sparse, &block[..504], block[504] != 0)? {
                        return Ok(Some(Event::Member(member)));
                    }
                }
                State::SparseMap(sparse, reader) => {
                    let before = input.len();
                    let done = reader
                        .read(input, &mut sparse.stored, &mut sparse.map)
                        .map_err(|e| e.in_entry(&sparse.member.path))?;
                    self.offset += (before - input.len()) as u64;
                    if !done {
                        return Ok(None);
                    }
                    if let State::SparseMap(sparse, _) = self.take_state() {
                        return self.sparse_file(*sparse).map(|m| Some(Event::Member(m)));
                    }
                }
                State::Content(content) => {
                    let Some(event) = content.event(input) else {
                        return Ok(None);
                    };
                    match event {
                        Event::Data(data) => self.offset += data.len() as u64,
                        Event::End => {
                            let pad = content.pad;
                            self.skip(pad, true);
                        }
                        _ => {}
                    }
                    return Ok(Some(event));
                }
                State::Skip { left, .. } => {
                    let taken = split(input, *left);
                    self.offset += taken.len() as u64;
                    *left -= taken.len() as u64;
                    if *left > 0 {
                        return Ok(None);
                    }
                    self.state = State::Header { zero: false };
                }
                State::End => {
                    self.offset += input.len() as u64;
                    *input = &[];
                    return Ok(None);
                }
            }
        }
    }

    /// The stream has ended here.
    ///
    /// # Errors
    /// Invalid if it may not: in a header or in content.
    pub fn finish(&self) -> Result<(), ImageError> {
        match &self.state {
            State::End | State::Skip { padding: true, .. } => Ok(()),
            State::Header { .. } if self.filled == 0 => Ok(()),
            State::Content(_) => Err(ImageError::invalid("the archive ends within a file")),
            _ => Err(ImageError::invalid("the archive ends within a header")),
        }
    }

    /// A whole block, once it is there.
    fn take_block(&mut self, input: &mut &[u8]) -> Option<[u8; BLOCK]> {
        if self.filled == 0
            && let Some((block, rest)) = input.split_first_chunk::<BLOCK>()
        {
            *input = rest;
            self.offset += BLOCK as u64;
            return Some(*block);
        }
        let taken = split(input, (BLOCK - self.filled) as u64);
        self.block[self.filled..self.filled + taken.len()].copy_from_slice(taken);
        self.filled += taken.len();
        self.offset += taken.len() as u64;
        if self.filled < BLOCK {
            return None;
        }
        self.filled = 0;
        Some(*self.block)
    }

    fn take_state(&mut self) -> State {
        std::mem::replace(&mut self.state, State::Header { zero: false })
    }

    fn skip(&mut self, left: u64, padding: bool) {
        self.state = State::Skip { left, padding };
    }

    /// Takes a header; gives the member if that is complete with it.
    fn header(&mut self, block: &[u8; BLOCK]) -> Result<Option<Box<Member>>, ImageError> {
        let at = self.offset - BLOCK as u64;
        let after_zeros = matches!(self.state, State::Header { zero: true });
        if block.iter().all(|&b| b == 0) {
            self.state = match after_zeros {
                true => State::End,
                false => State::Header { zero: true },
            };
            return Ok(None);
        }
        if after_zeros {
            return Err(invalid_at(at, "it follows a block of zeros"));
        }
        let raw = Raw::parse(block).map_err(|why| invalid_at(at, why))?;
        match raw.flag {
            b'x' | b'L' | b'K' => {
                if raw.size > MAX_SPECIAL as u64 {
                    return Err(ImageError::too_large(format!(
                        "header at byte {at}: it extends the next by {} bytes, more than {MAX_SPECIAL}",
                        raw.size
                    )));
                }
                self.state = State::Special {
                    at,
                    flag: raw.flag,
                    data: Vec::new(),
                    left: raw.size as usize,
                    pad: padding(raw.size),
                };
                Ok(None)
            }
            // Go and containerd ignore what a global header says; so does whoever tested with them.
            b'g' => {
                self.skip(raw.size.saturating_add(padding(raw.size)), false);
                Ok(None)
            }
            _ => self.member(at, raw, block),
        }
    }

    fn special(&mut self, at: u64, flag: u8, mut data: Vec<u8>) -> Result<(), ImageError> {
        match flag {
            b'x' => self.pax = Pax::parse(&data).map_err(|why| invalid_at(at, why))?,
            _ => {
                data.truncate(data.iter().position(|&b| b == 0).unwrap_or(data.len()));
                let slot = match flag {
                    b'L' => &mut self.long_name,
                    _ => &mut self.long_target,
                };
                *slot = Some(data);
            }
        }
        Ok(())
    }

    fn member(
        &mut self,
        at: u64,
        raw: Raw,
        block: &[u8; BLOCK],
    ) -> Result<Option<Box<Member>>, ImageError> {
        let pax = std::mem::take(&mut self.pax);
        let path = or(self.long_name.take(), or(pax.path, raw.name));
        let target = or(self.long_target.take(), or(pax.target, raw.target));
        let invalid = |why: &'static str| invalid_at(at, why).in_entry(&path);
        let kind = match raw.flag {
            b'0' | b'7' | b'S' => MemberKind::File,
            0 if path.ends_with(b"/") => MemberKind::Dir,
            0 => MemberKind::File,
            b'1' => MemberKind::Hardlink,
            b'2' => MemberKind::Symlink,
            b'3' => MemberKind::Char,
            b'4' => MemberKind::Block,
            b'5' => MemberKind::Dir,
            b'6' => MemberKind::Fifo,
            flag => {
                let why = format!(
                    "header at byte {at}: members of type {:?} are not supported",
                    flag as char
                );
                return Err(ImageError::unsupported(why).in_entry(&path));
            }
        };
        let id =
            |id: i64| u32::try_from(id).map_err(|_| invalid("its owner is not a 32-bit number"));
        let device = |number: i64| {
            u32::try_from(number).map_err(|_| invalid("its device number is not a 32-bit number"))
        };
        let stored = match kind {
            MemberKind::File => pax.size.unwrap_or(raw.size),
            _ => 0,
        };
        if stored > i64::MAX as u64 {
            return Err(invalid("its size is no size of a file"));
        }
        let mut member = Box::new(Member {
            kind,
            mode: (raw.mode & 0o7777) as u16,
            uid: id(pax.uid.unwrap_or(raw.uid))?,
            gid: id(pax.gid.unwrap_or(raw.gid))?,
            mtime: pax.mtime.unwrap_or((raw.mtime, 0)),
            major: device(raw.major)?,
            minor: device(raw.minor)?,
            xattrs: pax.xattrs.into_iter().collect(),
            size: stored,
            offset: self.offset,
            pieces: Vec::new(),
            path,
            target,
        });
        let sparse = |member, map| {
            Box::new(Sparse {
                member,
                map,
                stored,
            })
        };
        if raw.flag == b'S' {
            if !raw.gnu {
                return Err(invalid_at(
                    at,
                    "it is a sparse file of GNU tar, but the header is not",
                ));
            }
            member.size = header::number(&block[483..495])
                .and_then(|size| u64::try_from(size).ok())
                .ok_or_else(|| invalid_at(at, "its size is not a number").in_entry(&member.path))?;
            return self.old_sparse(
                sparse(member, Vec::new()),
                &block[386..482],
                block[482] != 0,
            );
        }
        let Some(layout) = pax.sparse.layout() else {
            if kind == MemberKind::File {
                self.content(&member, stored);
            }
            return Ok(Some(member));
        };
        if let Some(name) = pax.sparse.name {
            member.path = name;
        }
        if kind != MemberKind::File {
            return Err(invalid_at(at, "only a file can be sparse").in_entry(&member.path));
        }
        member.size = pax.sparse.size.unwrap_or(stored);
        match layout {
            sparse::Layout::Header => {
                let map = pax
                    .sparse
                    .map
                    .parse()
                    .map_err(|e| e.in_entry(&member.path))?;
                self.sparse_file(*sparse(member, map)).map(Some)
            }
            sparse::Layout::Data => {
                self.state = State::SparseMap(sparse(member, Vec::new()), MapReader::default());
                Ok(None)
            }
        }
    }

    /// Takes the entries of an old GNU sparse map from one header.
    fn old_sparse(
        &mut self,
        mut sparse: Box<Sparse>,
        entries: &[u8],
        more: bool,
    ) -> Result<Option<Box<Member>>, ImageError> {
        sparse::read_old(entries, &mut sparse.map).map_err(|e| e.in_entry(&sparse.member.path))?;
        if more {
            self.state = State::SparseBlock(sparse);
            return Ok(None);
        }
        self.sparse_file(*sparse).map(Some)
    }

    /// The map of the sparse file is complete and its data comes.
    fn sparse_file(&mut self, sparse: Sparse) -> Result<Box<Member>, ImageError> {
        let Sparse {
            mut member,
            map,
            stored,
        } = sparse;
        member.pieces = sparse::check(map, member.size, stored)
            .map_err(|why| ImageError::invalid(why).in_entry(&member.path))?;
        member.offset = self.offset;
        self.content(&member, stored);
        Ok(member)
    }

    fn content(&mut self, member: &Member, stored: u64) {
        let pieces = match member.pieces.is_empty() {
            true => vec![(0, member.size)],
            false => member.pieces.iter().rev().copied().collect(),
        };
        self.state = State::Content(Content {
            pieces,
            left: 0,
            known: 0,
            size: member.size,
            pad: padding(stored),
        });
    }
}

impl Content {
    fn event<'d>(&mut self, input: &mut &'d [u8]) -> Option<Event<'d>> {
        while self.left == 0 {
            let (start, len) = self.pieces.last().copied().unwrap_or((self.size, 0));
            if start > self.known {
                let hole = start - self.known;
                self.known = start;
                return Some(Event::Hole(hole));
            }
            if self.pieces.pop().is_none() {
                return Some(Event::End);
            }
            self.left = len;
            self.known += len;
        }
        let data = split(input, self.left);
        self.left -= data.len() as u64;
        (!data.is_empty()).then_some(Event::Data(data))
    }
}

/// Takes at most `most` bytes from the front of `input`.
fn split<'d>(input: &mut &'d [u8], most: u64) -> &'d [u8] {
    let len = usize::try_from(most).map_or(input.len(), |most| most.min(input.len()));
    let (taken, rest) = input.split_at(len);
    *input = rest;
    taken
}

/// Bytes from the end of `size` bytes to the next block.
const fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

/// The first, unless it is missing or empty.
fn or(first: Option<Vec<u8>>, second: Vec<u8>) -> Vec<u8> {
    first.filter(|text| !text.is_empty()).unwrap_or(second)
}

fn invalid_at(at: u64, why: &str) -> ImageError {
    ImageError::invalid(format!("header at byte {at}: {why}"))
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(super) mod write;
