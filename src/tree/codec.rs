//! The binary encoding of an [`Artifact`].
//!
//! ```text
//! "hrthtree" version
//! reference revision
//! count { kind(0 sha256, 1 located) id[32] size git(0 | 1 sha1[20]) recipe }*
//!     recipe: 0 path generation(0 | 1 text) offset     1 object offset
//! count { kind mode uid gid seconds nanos  count { name value }*  body }*
//!     body: 0 dir      count { name inode }*      1 file     object
//!           2 symlink  target                     3 char, 4 block  major minor
//!           5 fifo     6 socket
//! ```
//!
//! Numbers are LEB128 varints of minimal length (`seconds` in zigzag), texts and names are a length
//! and bytes. One artifact has one encoding, so its digest names it. The parent of a directory is
//! not written: the entry that names it says it. Decoding allocates in proportion to its input, does not
//! recurse, and checks every invariant of [`super`].

use std::collections::VecDeque;

use super::{
    Artifact, Entry, Inode, Kind, Location, MAX_INODES, MAX_PATH, Meta, Object, Recipe, Tree,
    TreeError, check_inode, check_name, place,
};
use crate::digest::{Digest, ObjectId};

const MAGIC: &[u8; 8] = b"hrthtree";
const VERSION: u32 = 1;

/// Fewest bytes of an encoded object: kind, id, size, git, recipe (a slice), object, offset.
const MIN_OBJECT: usize = 1 + 32 + 1 + 1 + 1 + 1 + 1;
/// Fewest bytes of an encoded inode: kind, mode, uid, gid, seconds, nanos, xattrs.
const MIN_INODE: usize = 7;
/// Fewest bytes of an encoded directory entry: length, one byte of name, inode.
const MIN_ENTRY: usize = 3;
/// Fewest bytes of an encoded extended attribute: two lengths and one byte of name.
const MIN_XATTR: usize = 3;

impl Artifact {
    /// The binary encoding.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(Vec::with_capacity(
            256 + self.objects.len() * 128 + self.tree.inodes.len() * 32,
        ));
        out.0.extend_from_slice(MAGIC);
        out.number(VERSION.into());
        out.bytes(self.reference.as_bytes());
        out.bytes(self.revision.as_bytes());
        out.number(self.objects.len() as u64);
        for object in &self.objects {
            out.object(object);
        }
        out.number(self.tree.inodes.len() as u64);
        for inode in &self.tree.inodes {
            out.inode(inode);
        }
        out.0
    }

    /// Decodes what [`Artifact::encode`] wrote.
    ///
    /// # Errors
    /// [`TreeError::Version`] for another format; [`TreeError::Damaged`] for anything that
    /// `encode` could not have written from a tree with its invariants.
    pub fn decode(bytes: &[u8]) -> Result<Artifact, TreeError> {
        let mut input = Reader(bytes);
        if input.take(MAGIC.len())? != MAGIC {
            return Err(TreeError::Damaged("it does not start as a tree does"));
        }
        let found = input.small()?;
        if found != VERSION {
            let known = VERSION;
            return Err(TreeError::Version { found, known });
        }
        let reference = input.text()?;
        let revision = input.text()?;
        let count = input.count(MIN_OBJECT)?;
        let mut objects = Vec::with_capacity(count);
        for _ in 0..count {
            objects.push(input.object()?);
        }
        if (0..objects.len()).any(|at| place(&objects, at as u32).is_none()) {
            return Err(TreeError::Damaged(
                "a slice lies outside of what it is cut from",
            ));
        }
        let count = input.count(MIN_INODE)?;
        if count > MAX_INODES {
            return Err(TreeError::TooMany);
        }
        let mut inodes = Vec::with_capacity(count);
        for _ in 0..count {
            inodes.push(input.inode()?);
        }
        if !input.0.is_empty() {
            return Err(TreeError::Damaged("bytes follow its end"));
        }
        connect(&mut inodes, objects.len())?;
        Ok(Artifact {
            reference,
            revision,
            tree: Tree { inodes },
            objects,
        })
    }
}

/// Sets the parents and checks what concerns several inodes: indices, names, one parent for every
/// directory, everything reachable from the root (so no cycles), no path too long.
pub(super) fn connect(inodes: &mut [Inode], objects: usize) -> Result<(), TreeError> {
    const UNSEEN: u32 = u32::MAX;
    if !matches!(inodes.first().map(|i| &i.kind), Some(Kind::Dir { .. })) {
        return Err(TreeError::Damaged("its root is no directory"));
    }
    let mut seen = 1usize;
    // Parent of each inode found so far (one of them, for a file with several names).
    let mut parents = vec![UNSEEN; inodes.len()];
    parents[0] = 0;
    // Directories to visit, with the length of their path and its slash.
    let mut queue = VecDeque::from([(0u32, 0usize)]);
    while let Some((dir, prefix)) = queue.pop_front() {
        let Kind::Dir { entries, .. } = &inodes[dir as usize].kind else {
            continue;
        };
        for (at, entry) in entries.iter().enumerate() {
            check_name(&entry.name).map_err(TreeError::Damaged)?;
            if at > 0 && entries[at - 1].name >= entry.name {
                return Err(TreeError::Damaged("the names of a directory are unsorted"));
            }
            if prefix + entry.name.len() > MAX_PATH {
                return Err(TreeError::Damaged("a path is longer than 4096 bytes"));
            }
            let Some(child) = inodes.get(entry.inode as usize) else {
                return Err(TreeError::Damaged(
                    "an entry names an inode that is not there",
                ));
            };
            let first = parents[entry.inode as usize] == UNSEEN;
            if first {
                parents[entry.inode as usize] = dir;
                seen += 1;
            }
            match &child.kind {
                Kind::Dir { .. } if !first => {
                    return Err(TreeError::Damaged("a directory has two names"));
                }
                Kind::Dir { .. } => queue.push_back((entry.inode, prefix + entry.name.len() + 1)),
                Kind::File { object } if *object as usize >= objects => {
                    return Err(TreeError::Damaged("a file has an object that is not there"));
                }
                _ => {}
            }
        }
    }
    if seen != inodes.len() {
        return Err(TreeError::Damaged(
            "an inode is not reachable from its root",
        ));
    }
    for (inode, above) in inodes.iter_mut().zip(parents) {
        if let Kind::Dir { parent, .. } = &mut inode.kind {
            *parent = above;
        }
    }
    Ok(())
}

/// What was written so far.
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    pub(crate) fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn object(&mut self, object: &Object) {
        let (kind, digest) = match &object.id {
            ObjectId::Sha256(digest) => (0, digest),
            ObjectId::Located(digest) => (1, digest),
        };
        self.0.push(kind);
        self.0.extend_from_slice(digest.as_bytes());
        self.number(object.size);
        match &object.git_sha1 {
            None => self.0.push(0),
            Some(sha1) => {
                self.0.push(1);
                self.0.extend_from_slice(sha1);
            }
        }
        match &object.recipe {
            Recipe::Raw(location) => {
                self.0.push(0);
                self.bytes(location.path.as_bytes());
                match &location.generation {
                    None => self.0.push(0),
                    Some(generation) => {
                        self.0.push(1);
                        self.bytes(generation.as_bytes());
                    }
                }
                self.number(location.offset);
            }
            Recipe::Slice { object, offset } => {
                self.0.push(1);
                self.number((*object).into());
                self.number(*offset);
            }
        }
    }

    fn inode(&mut self, inode: &Inode) {
        self.0.push(match &inode.kind {
            Kind::Dir { .. } => 0,
            Kind::File { .. } => 1,
            Kind::Symlink { .. } => 2,
            Kind::Char { .. } => 3,
            Kind::Block { .. } => 4,
            Kind::Fifo => 5,
            Kind::Socket => 6,
        });
        self.meta(&inode.meta);
        match &inode.kind {
            Kind::Dir { entries, .. } => {
                self.number(entries.len() as u64);
                for entry in entries {
                    self.bytes(&entry.name);
                    self.number(entry.inode.into());
                }
            }
            Kind::File { object } => self.number((*object).into()),
            Kind::Symlink { target } => self.bytes(target),
            Kind::Char { major, minor } | Kind::Block { major, minor } => {
                self.number((*major).into());
                self.number((*minor).into());
            }
            Kind::Fifo | Kind::Socket => {}
        }
    }

    pub(crate) fn meta(&mut self, meta: &Meta) {
        self.number(meta.mode.into());
        self.number(meta.uid.into());
        self.number(meta.gid.into());
        let (seconds, nanos) = meta.mtime;
        self.number((seconds << 1 ^ seconds >> 63) as u64);
        self.number(nanos.into());
        self.number(meta.xattrs.len() as u64);
        for (name, value) in &meta.xattrs {
            self.bytes(name);
            self.bytes(value);
        }
    }
}

/// The bytes not read yet.
pub(crate) struct Reader<'b>(pub(crate) &'b [u8]);

impl<'b> Reader<'b> {
    pub(crate) fn take(&mut self, count: usize) -> Result<&'b [u8], TreeError> {
        let cut = self.0.split_at_checked(count);
        let (taken, rest) = cut.ok_or(TreeError::Damaged("it is cut short"))?;
        self.0 = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], TreeError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(crate) fn byte(&mut self) -> Result<u8, TreeError> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn number(&mut self) -> Result<u64, TreeError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return Err(TreeError::Damaged("a number is too large"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(TreeError::Damaged("a number is longer than it need be"));
                }
                return Ok(value);
            }
        }
        Err(TreeError::Damaged("a number is too long"))
    }

    pub(crate) fn small(&mut self) -> Result<u32, TreeError> {
        u32::try_from(self.number()?).map_err(|_| TreeError::Damaged("a number is too large"))
    }

    /// A number of things that take at least `least` bytes each.
    pub(crate) fn count(&mut self, least: usize) -> Result<usize, TreeError> {
        let count = usize::try_from(self.number()?).unwrap_or(usize::MAX);
        if count > self.0.len() / least {
            return Err(TreeError::Damaged("it counts more than it holds"));
        }
        Ok(count)
    }

    pub(crate) fn bytes(&mut self) -> Result<&'b [u8], TreeError> {
        let len = self.count(1)?;
        self.take(len)
    }

    fn text(&mut self) -> Result<String, TreeError> {
        let text = std::str::from_utf8(self.bytes()?);
        text.map(str::to_owned)
            .map_err(|_| TreeError::Damaged("a text is not UTF-8"))
    }

    fn flag(&mut self) -> Result<bool, TreeError> {
        match self.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(TreeError::Damaged("a flag is neither 0 nor 1")),
        }
    }

    fn object(&mut self) -> Result<Object, TreeError> {
        let located = self.flag()?;
        let digest = Digest::from_bytes(self.array()?);
        let id = if located {
            ObjectId::Located(digest)
        } else {
            ObjectId::Sha256(digest)
        };
        let size = self.number()?;
        if size > i64::MAX as u64 {
            return Err(TreeError::Damaged("an object is larger than a file can be"));
        }
        let git_sha1 = if self.flag()? {
            Some(self.array()?)
        } else {
            None
        };
        let recipe = match self.byte()? {
            0 => {
                let path = self.text()?;
                let generation = if self.flag()? {
                    Some(self.text()?)
                } else {
                    None
                };
                let offset = self.number()?;
                if offset.checked_add(size).is_none() {
                    return Err(TreeError::Damaged("an object ends beyond all offsets"));
                }
                Recipe::Raw(Location {
                    path,
                    generation,
                    offset,
                })
            }
            1 => Recipe::Slice {
                object: self.small()?,
                offset: self.number()?,
            },
            _ => return Err(TreeError::Damaged("an object has an unknown recipe")),
        };
        Ok(Object {
            id,
            size,
            git_sha1,
            recipe,
        })
    }

    pub(crate) fn meta(&mut self) -> Result<Meta, TreeError> {
        let mode = self.small()?;
        let mode = u16::try_from(mode).map_err(|_| TreeError::Damaged("a mode is too large"))?;
        let (uid, gid) = (self.small()?, self.small()?);
        let seconds = self.number()?;
        let seconds = (seconds >> 1) as i64 ^ -((seconds & 1) as i64);
        let mtime = (seconds, self.small()?);
        let count = self.count(MIN_XATTR)?;
        let mut xattrs = Vec::with_capacity(count);
        for _ in 0..count {
            xattrs.push((self.bytes()?.into(), self.bytes()?.into()));
        }
        Ok(Meta {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        })
    }

    fn inode(&mut self) -> Result<Inode, TreeError> {
        let kind = self.byte()?;
        let meta = self.meta()?;
        let kind = match kind {
            0 => {
                let count = self.count(MIN_ENTRY)?;
                let mut entries = Vec::with_capacity(count);
                for _ in 0..count {
                    let name = self.bytes()?.into();
                    let inode = self.small()?;
                    entries.push(Entry { name, inode });
                }
                // `connect` sets the parent.
                Kind::Dir { parent: 0, entries }
            }
            1 => Kind::File {
                object: self.small()?,
            },
            2 => Kind::Symlink {
                target: self.bytes()?.into(),
            },
            3 => Kind::Char {
                major: self.small()?,
                minor: self.small()?,
            },
            4 => Kind::Block {
                major: self.small()?,
                minor: self.small()?,
            },
            5 => Kind::Fifo,
            6 => Kind::Socket,
            _ => return Err(TreeError::Damaged("an inode has an unknown kind")),
        };
        check_inode(&kind, &meta).map_err(TreeError::Damaged)?;
        Ok(Inode { kind, meta })
    }
}

#[cfg(test)]
mod tests;
