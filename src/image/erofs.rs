//! A tree as an EROFS image: all of its metadata and none of its data.
//!
//! Mounted, and laid over the objects of a store as a data-only layer of overlayfs, it is the tree
//! with no process behind it (Documentation/filesystems/overlayfs.rst, "Data-only lower layers"):
//! each file with content carries `trusted.overlay.metacopy` and, in `trusted.overlay.redirect`,
//! the path of its object below `objects/`. Its own data is one hole of the right size.
//!
//! Format: fs/erofs/erofs_fs.h of Linux; uncompressed, blocks of 4 KiB, inodes of 64 bytes,
//! attributes inline. Inodes lie in the order in which a walk meets them, each directory before
//! what is in it, so that a walk reads the image from front to back. The same tree and objects
//! give the same bytes. Pure: called by whoever mounts roots; nothing here touches a file.

use std::{
    borrow::Cow,
    io::{self, BufWriter, Write},
    ops::Range,
};

use crate::{
    digest::ObjectId,
    tree::{Inode, Kind, Object, Tree},
};

/// Bytes of a block.
const BLOCK: u64 = 4096;
/// Inodes start at multiples of it; an inode is named by which one.
const SLOT: u64 = 32;
const SUPER_OFFSET: u64 = 1024;
const SUPER_SIZE: u64 = 128;
const MAGIC: u32 = 0xE0F5_E1E2;
/// Files are made of chunks: `EROFS_FEATURE_INCOMPAT_CHUNKED_FILE`.
const FEATURE_CHUNKED_FILE: u32 = 0x4;
const INODE_SIZE: u64 = 64;
const DIRENT_SIZE: usize = 12;
const XATTR_HEADER: u64 = 12;
/// Most bytes of a directory that are kept beside its inode; more has a block of its own.
const MAX_INLINE_DIR: u64 = BLOCK / 2;
/// Largest file that one chunk holds: 4 KiB times two to the 31st.
const MAX_FILE: u64 = 1 << MAX_CHUNK_BITS;
const MAX_CHUNK_BITS: u32 = 12 + 31;
/// A chunk that is a hole.
const NULL_ADDRESS: u32 = u32::MAX;
/// Most bytes of an image: far more than a tree within its bounds needs.
const MAX_IMAGE: u64 = 16 << 30;

const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
const CHUNK_BASED: u16 = 4;

/// Namespaces of attributes and their numbers; of the first two the whole name.
const NAMESPACES: [(&[u8], u8); 5] = [
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
];
/// What overlayfs keeps to itself, without `trusted.`, and what is put before it to have it shown.
const OVERLAY: &[u8] = b"overlay.";

/// Why a tree cannot be an EROFS image. Other ways to mount it may do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErofsError {
    /// One file cannot be told in the format, or not without its digest.
    #[error("file {path:?} cannot be in a native root: {why}")]
    File { path: String, why: &'static str },
    /// The metadata alone is too much.
    #[error("the tree cannot be a native root: its metadata takes more than {MAX_IMAGE} bytes")]
    TooLarge,
    /// What the writer said.
    #[error("cannot write the image of a native root: {0}")]
    Io(#[from] io::Error),
}

/// Writes `tree` as an image to `out`, front to back; returns its length in bytes, a multiple of
/// 4096.
///
/// Left out is what no mount could show: names that lead to a character device 0:0, which
/// overlayfs takes for "deleted", and attributes outside of `user`, `trusted`, `security` and the
/// access control lists of `system`.
///
/// # Errors
/// A file of an object that is not in `objects`, whose digest is not known or that is larger than
/// 8 TiB; attributes that take more than 256 KiB on one file; a device number that Linux does not
/// have; a tree that needs more than 16 GiB; what `out` says.
pub fn write(tree: &Tree, objects: &[Object], out: impl Write) -> Result<u64, ErofsError> {
    let image = Image { tree, objects };
    let plan = image.plan()?;
    let mut out = Out {
        to: BufWriter::with_capacity(1 << 18, out),
        at: 0,
    };
    out.pad_to(SUPER_OFFSET)?;
    out.put(&plan.superblock())?;
    for &number in &plan.order {
        image.write_inode(&plan, number, &mut out)?;
    }
    out.pad_to(plan.end)?;
    out.to.flush()?;
    Ok(plan.end)
}

struct Image<'t> {
    tree: &'t Tree,
    objects: &'t [Object],
}

/// Where everything goes.
struct Plan {
    /// By inode number: its slot; 0 for what is left out.
    slots: Vec<u32>,
    /// By inode number: names that lead to it.
    links: Vec<u32>,
    /// Inode numbers in the order of their slots.
    order: Vec<u32>,
    /// Bytes of the image.
    end: u64,
}

/// How an inode is laid down: itself, its attributes, what is inline, then, on the next border of
/// a block, its blocks.
struct Shape {
    layout: u16,
    size: u64,
    /// `i_u`, unless it has blocks: then it says where they are.
    union: u32,
    xattrs: u64,
    inline: u64,
    blocks: u64,
    /// All of it, not only what is inline, has to lie in one block.
    together: bool,
}

/// An attribute: number of the namespace, rest of the name, value.
type Attribute<'t> = (u8, Cow<'t, [u8]>, Cow<'t, [u8]>);

impl Shape {
    /// Where the inode starts if nothing before `at` is free.
    fn start(&self, at: u64) -> u64 {
        let start = at.next_multiple_of(SLOT);
        let (from, len) = match self.together {
            true => (start, self.head() + self.inline),
            false => (start + self.head(), self.inline),
        };
        if len == 0 || from / BLOCK == (from + len - 1) / BLOCK {
            return start;
        }
        let border = from.next_multiple_of(BLOCK);
        match self.together {
            true => border,
            false => (border - self.head()).next_multiple_of(SLOT),
        }
    }

    /// Bytes of the inode and its attributes.
    fn head(&self) -> u64 {
        INODE_SIZE + self.xattrs
    }

    /// Where its blocks start if it starts at `start`.
    fn data(&self, start: u64) -> u64 {
        (start + self.head() + self.inline).next_multiple_of(BLOCK)
    }

    /// The first byte behind it.
    fn end(&self, start: u64) -> u64 {
        match self.blocks {
            0 => start + self.head() + self.inline,
            blocks => self.data(start) + blocks * BLOCK,
        }
    }
}

impl Plan {
    /// `struct erofs_super_block`.
    fn superblock(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(SUPER_SIZE as usize);
        bytes.extend(MAGIC.to_le_bytes());
        // No checksum, no compatible features.
        bytes.extend([0; 8]);
        // Bits of a block; no extension slots.
        bytes.extend([BLOCK.trailing_zeros() as u8, 0]);
        // The root is the first inode, so its slot is small.
        bytes.extend((self.slots[0] as u16).to_le_bytes());
        bytes.extend((self.order.len() as u64).to_le_bytes());
        // Times of compact inodes, of which there are none.
        bytes.extend([0; 12]);
        bytes.extend(((self.end / BLOCK) as u32).to_le_bytes());
        // Slots count from block 0; no shared attributes, no id and no name.
        bytes.extend([0; 4 + 4 + 16 + 16]);
        bytes.extend(FEATURE_CHUNKED_FILE.to_le_bytes());
        bytes.resize(SUPER_SIZE as usize, 0);
        bytes
    }
}

impl<'t> Image<'t> {
    fn inode(&self, number: u32) -> &'t Inode {
        &self.tree.inodes()[number as usize]
    }

    /// The names in a directory that are shown, sorted, with `.` and `..`.
    fn names(&self, number: u32) -> Vec<(&'t [u8], u32)> {
        let Kind::Dir { parent, entries } = &self.inode(number).kind else {
            return Vec::new();
        };
        let mut names: Vec<(&[u8], u32)> = vec![(b".", number), (b"..", *parent)];
        names.extend(
            entries
                .iter()
                .filter(|entry| !is_whiteout(self.inode(entry.inode)))
                .map(|entry| (&*entry.name, entry.inode)),
        );
        names.sort_unstable();
        names
    }

    fn plan(&self) -> Result<Plan, ErofsError> {
        let count = self.tree.inodes().len();
        let mut plan = Plan {
            slots: vec![0; count],
            links: vec![0; count],
            order: Vec::with_capacity(count),
            end: SUPER_OFFSET + SUPER_SIZE,
        };
        // Directories to come, the next one last: an explicit stack, since depth comes from outside.
        let mut stack = vec![0u32];
        while let Some(dir) = stack.pop() {
            self.place(&mut plan, dir)?;
            let first = stack.len();
            for (name, inode) in self.names(dir) {
                plan.links[inode as usize] += 1;
                if matches!(name, b"." | b"..") {
                    continue;
                }
                match self.inode(inode).kind {
                    Kind::Dir { .. } => stack.push(inode),
                    _ if plan.slots[inode as usize] == 0 => self.place(&mut plan, inode)?,
                    _ => {}
                }
            }
            stack[first..].reverse();
        }
        plan.end = plan.end.next_multiple_of(BLOCK);
        Ok(plan)
    }

    fn place(&self, plan: &mut Plan, number: u32) -> Result<(), ErofsError> {
        let shape = self.shape(number)?;
        let start = shape.start(plan.end);
        plan.slots[number as usize] = (start / SLOT) as u32;
        plan.order.push(number);
        plan.end = shape.end(start);
        match plan.end > MAX_IMAGE {
            true => Err(ErofsError::TooLarge),
            false => Ok(()),
        }
    }

    fn shape(&self, number: u32) -> Result<Shape, ErofsError> {
        let inode = self.inode(number);
        let attributes = self.attributes(number)?;
        let xattrs = match attributes.is_empty() {
            true => 0,
            false => XATTR_HEADER + attributes.iter().map(attribute_size).sum::<u64>(),
        };
        if xattrs > XATTR_HEADER + 4 * u64::from(u16::MAX - 1) {
            return Err(self.error(number, "its extended attributes take too much space"));
        }
        let mut shape = Shape {
            layout: FLAT_PLAIN,
            size: 0,
            union: 0,
            xattrs,
            inline: 0,
            blocks: 0,
            together: false,
        };
        match &inode.kind {
            Kind::Dir { .. } => {
                let names = self.names(number);
                let blocks = dir_blocks(&names);
                let last = blocks
                    .last()
                    .map_or(0, |last| block_size(&names[last.clone()]));
                shape.size = (blocks.len() as u64 - 1) * BLOCK + last;
                shape.blocks = blocks.len() as u64;
                if last <= MAX_INLINE_DIR {
                    shape.layout = FLAT_INLINE;
                    shape.inline = last;
                    shape.blocks -= 1;
                }
            }
            Kind::Symlink { target } => {
                shape.size = target.len() as u64;
                // The kernel looks for an inline target in the block of the inode.
                shape.together = shape.head() + shape.size <= BLOCK;
                match shape.together {
                    true => (shape.layout, shape.inline) = (FLAT_INLINE, shape.size),
                    false => shape.blocks = 1,
                }
            }
            Kind::File { object } => {
                shape.size = self.object(number, *object)?.size;
                if shape.size > MAX_FILE {
                    return Err(self.error(number, "it is larger than 8 TiB"));
                }
                if shape.size > 0 {
                    let bits = (shape.size - 1).checked_ilog2().map_or(0, |log| log + 1);
                    let bits = bits.clamp(BLOCK.trailing_zeros(), MAX_CHUNK_BITS);
                    shape.layout = CHUNK_BASED;
                    shape.union = bits - BLOCK.trailing_zeros();
                    shape.inline = 4;
                }
            }
            Kind::Char { major, minor } | Kind::Block { major, minor } => {
                shape.union = device(*major, *minor).ok_or_else(|| {
                    self.error(number, "it is a device with an impossible number")
                })?;
            }
            Kind::Fifo | Kind::Socket => {}
        }
        Ok(shape)
    }

    fn object(&self, number: u32, object: u32) -> Result<&'t Object, ErofsError> {
        self.objects
            .get(object as usize)
            .ok_or_else(|| self.error(number, "its content is not among the objects"))
    }

    /// The attributes as they are stored, those first that overlayfs looks for.
    fn attributes(&self, number: u32) -> Result<Vec<Attribute<'t>>, ErofsError> {
        let inode = self.inode(number);
        let mut list: Vec<Attribute<'_>> = Vec::with_capacity(inode.meta.xattrs.len() + 2);
        if let Kind::File { object } = inode.kind {
            let object = self.object(number, object)?;
            if object.size > 0 {
                let ObjectId::Sha256(digest) = object.id else {
                    return Err(self.error(number, "the digest of its content is not known yet"));
                };
                let hex = digest.hex();
                let path = format!("/sha256/{}/{hex}", &hex[..2]);
                list.push((4, b"overlay.metacopy"[..].into(), b""[..].into()));
                list.push((4, b"overlay.redirect"[..].into(), path.into_bytes().into()));
            }
        }
        for (name, value) in &inode.meta.xattrs {
            let Some((namespace, rest)) = NAMESPACES.iter().find_map(|&(prefix, namespace)| {
                let rest = name.strip_prefix(prefix)?;
                (rest.is_empty() != prefix.ends_with(b".")).then_some((namespace, rest))
            }) else {
                continue;
            };
            let rest = match namespace == 4 && rest.starts_with(OVERLAY) {
                true => Cow::Owned([OVERLAY, rest].concat()),
                false => Cow::Borrowed(rest),
            };
            if rest.len() > 255 || value.len() > usize::from(u16::MAX) {
                return Err(self.error(number, "an extended attribute is too long"));
            }
            list.push((namespace, rest, Cow::Borrowed(value)));
        }
        Ok(list)
    }

    fn write_inode(
        &self,
        plan: &Plan,
        number: u32,
        out: &mut Out<impl Write>,
    ) -> Result<(), ErofsError> {
        let inode = self.inode(number);
        let shape = self.shape(number)?;
        let start = u64::from(plan.slots[number as usize]) * SLOT;
        let union = match shape.blocks {
            0 => shape.union,
            _ => (shape.data(start) / BLOCK) as u32,
        };
        let xattr_count = match shape.xattrs {
            0 => 0,
            size => ((size - XATTR_HEADER) / 4 + 1) as u16,
        };
        out.pad_to(start)?;
        // struct erofs_inode_extended
        out.put(&(1 | shape.layout << 1).to_le_bytes())?;
        out.put(&xattr_count.to_le_bytes())?;
        let permissions = match inode.kind {
            // Linux gives no other to symbolic links.
            Kind::Symlink { .. } => 0o777,
            _ => inode.meta.mode,
        };
        out.put(&(file_type(&inode.kind).mode | permissions).to_le_bytes())?;
        out.put(&[0; 2])?;
        out.put(&shape.size.to_le_bytes())?;
        out.put(&union.to_le_bytes())?;
        // Only for 32 bits; there the slot would be cut off.
        out.put(&(number.wrapping_add(1)).to_le_bytes())?;
        out.put(&inode.meta.uid.to_le_bytes())?;
        out.put(&inode.meta.gid.to_le_bytes())?;
        out.put(&inode.meta.mtime.0.to_le_bytes())?;
        out.put(&inode.meta.mtime.1.to_le_bytes())?;
        out.put(&plan.links[number as usize].to_le_bytes())?;
        out.put(&[0; 16])?;
        if shape.xattrs > 0 {
            // struct erofs_xattr_ibody_header: no filter, nothing shared
            out.put(&[0; XATTR_HEADER as usize])?;
            for (namespace, name, value) in self.attributes(number)? {
                out.put(&[name.len() as u8, namespace])?;
                out.put(&(value.len() as u16).to_le_bytes())?;
                out.put(&name)?;
                out.put(&value)?;
                out.pad_to(out.at.next_multiple_of(4))?;
            }
        }
        match &inode.kind {
            Kind::Dir { .. } => {
                let names = self.names(number);
                let mut blocks = dir_blocks(&names);
                let inline = blocks.split_off(shape.blocks as usize);
                for block in inline {
                    self.write_names(plan, &names[block], out)?;
                }
                for block in blocks {
                    out.pad_to(out.at.next_multiple_of(BLOCK))?;
                    self.write_names(plan, &names[block], out)?;
                }
            }
            Kind::Symlink { target } => {
                if shape.blocks > 0 {
                    out.pad_to(shape.data(start))?;
                }
                out.put(target)?;
            }
            Kind::File { .. } if shape.inline > 0 => out.put(&NULL_ADDRESS.to_le_bytes())?,
            _ => {}
        }
        out.pad_to(shape.end(start))?;
        Ok(())
    }

    /// One block of a directory: `struct erofs_dirent`s, then the names.
    fn write_names(
        &self,
        plan: &Plan,
        names: &[(&[u8], u32)],
        out: &mut Out<impl Write>,
    ) -> io::Result<()> {
        let mut offset = names.len() * DIRENT_SIZE;
        for (name, inode) in names {
            out.put(&u64::from(plan.slots[*inode as usize]).to_le_bytes())?;
            out.put(&(offset as u16).to_le_bytes())?;
            out.put(&[file_type(&self.inode(*inode).kind).entry, 0])?;
            offset += name.len();
        }
        names.iter().try_for_each(|(name, _)| out.put(name))
    }

    /// The error that names the first path that leads to an inode.
    fn error(&self, number: u32, why: &'static str) -> ErofsError {
        let inodes = self.tree.inodes();
        let entry = |dir: u32| {
            let found = self.tree.entries(dir)?.iter().find(|e| e.inode == number);
            found.map(|entry| String::from_utf8_lossy(&entry.name))
        };
        let mut parts = Vec::new();
        let mut at = number;
        if !matches!(self.inode(number).kind, Kind::Dir { .. })
            && let Some((dir, name)) =
                (0..inodes.len() as u32).find_map(|dir| Some((dir, entry(dir)?)))
        {
            parts.push(name);
            at = dir;
        }
        while let Kind::Dir { parent, .. } = self.inode(at).kind
            && at != parent
        {
            let entries = self.tree.entries(parent).unwrap_or_default();
            let entry = entries.iter().find(|entry| entry.inode == at);
            parts.extend(entry.map(|entry| String::from_utf8_lossy(&entry.name)));
            at = parent;
        }
        parts.reverse();
        let path = format!("/{}", parts.join("/"));
        let path = path.chars().take(200).collect();
        ErofsError::File { path, why }
    }
}

/// What counts bytes and fills gaps with zeros.
struct Out<W: Write> {
    to: BufWriter<W>,
    at: u64,
}

impl<W: Write> Out<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        self.to.write_all(bytes)
    }

    /// Fills up to `at`, which is less than a few blocks away.
    fn pad_to(&mut self, at: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];
        while self.at < at {
            let len = (at - self.at).min(BLOCK);
            self.put(&ZEROS[..len as usize])?;
        }
        Ok(())
    }
}

/// The type of an inode.
struct FileType {
    /// In `st_mode`.
    mode: u16,
    /// In entries of directories: `FT_*` of include/linux/fs_types.h.
    entry: u8,
}

fn file_type(kind: &Kind) -> FileType {
    let (mode, entry) = match kind {
        Kind::File { .. } => (0o100_000, 1),
        Kind::Dir { .. } => (0o040_000, 2),
        Kind::Char { .. } => (0o020_000, 3),
        Kind::Block { .. } => (0o060_000, 4),
        Kind::Fifo => (0o010_000, 5),
        Kind::Socket => (0o140_000, 6),
        Kind::Symlink { .. } => (0o120_000, 7),
    };
    FileType { mode, entry }
}

/// What overlayfs takes for a name that is deleted.
fn is_whiteout(inode: &Inode) -> bool {
    matches!(inode.kind, Kind::Char { major: 0, minor: 0 })
}

/// A device number as Linux stores it (`new_encode_dev`), where it fits in 12 and 20 bits.
fn device(major: u32, minor: u32) -> Option<u32> {
    let fits = major < 1 << 12 && minor < 1 << 20;
    fits.then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

fn attribute_size((_, name, value): &Attribute<'_>) -> u64 {
    (4 + name.len() + value.len()).next_multiple_of(4) as u64
}

fn entry_size((name, _): &(&[u8], u32)) -> u64 {
    (DIRENT_SIZE + name.len()) as u64
}

fn block_size(names: &[(&[u8], u32)]) -> u64 {
    names.iter().map(entry_size).sum()
}

/// Which names go into each block of a directory; never none, since there are `.` and `..`.
fn dir_blocks(names: &[(&[u8], u32)]) -> Vec<Range<usize>> {
    let mut blocks = Vec::new();
    let (mut first, mut size) = (0, 0);
    for (at, name) in names.iter().enumerate() {
        let more = entry_size(name);
        if size + more > BLOCK {
            blocks.push(first..at);
            (first, size) = (at, 0);
        }
        size += more;
    }
    blocks.push(first..names.len());
    blocks
}
