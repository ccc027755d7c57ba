//! fs: read-only POSIX over a [`Tree`](crate::tree::Tree), without FUSE.
//!
//! A [`View`] answers what a file system is asked (attributes, lookup, directories, links, extended
//! attributes, open) from an artifact, and leaves bytes to its [`Contents`]. Everything of the tree is
//! immutable; only directories named by [`Shadow`]s take writes, into a bounded `upper` in memory
//! that dies with the view. Called by `mount`; `hub` makes the tree of the Hub's cache layout.
//!
//! Invariants: inode numbers are tree inode + 1 (the root is 1), the same in every process that serves
//! the artifact; hard links share an inode; upper inodes start at [`UPPER`], those that are there from
//! the start being the same in every process, and are never used twice, not even by the next one. Offsets of directories are stable while they are read, whatever is written meanwhile.

pub mod content;
pub mod hub;
mod upper;

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use self::upper::Upper;
pub use self::{
    content::{Body, Contents, Fetched, Whole},
    upper::{Change, Limits, Owner, UPPER},
};
use crate::{
    fetch::FetchErrorKind,
    tree::{Artifact, Kind, MAX_NAME},
};

/// Inode number of the root directory.
pub const ROOT: u64 = 1;

/// Bytes in a block of [`Statfs`].
pub const BLOCK: u32 = 4096;

/// Why the file system could not do what was asked. The variants are the kinds; `mount` has the
/// table to errno.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FsError {
    #[error("no such file or directory")]
    NotFound,
    #[error("not a directory")]
    NotDir,
    #[error("is a directory")]
    IsDir,
    #[error("read-only file system")]
    ReadOnly,
    #[error("file exists")]
    Exists,
    #[error("directory is not empty")]
    NotEmpty,
    #[error("the writable part of this mount is full")]
    Full,
    #[error("file name too long")]
    TooLong,
    #[error("no such extended attribute")]
    NoAttribute,
    #[error("not meant for this kind of file")]
    Invalid,
    #[error("operation not permitted")]
    NotPermitted,
    /// An inode that is gone or never was.
    #[error("no such inode")]
    Stale,
    /// The artifact contradicts itself.
    #[error("artifact is damaged: {0}")]
    Damaged(&'static str),
    /// The bytes could not be had.
    #[error("{message}")]
    Content {
        kind: FetchErrorKind,
        message: String,
    },
}

/// Name and value of an extended attribute.
type Xattr = (Box<[u8]>, Box<[u8]>);

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    Dir,
    File,
    Symlink,
    Char,
    Block,
    Fifo,
    Socket,
}

/// Attributes of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    pub ino: u64,
    pub kind: FileKind,
    /// Bytes of a file, length of a link's target.
    pub size: u64,
    /// Permission bits: `mode & 0o7777`.
    pub mode: u16,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since the epoch, and nanoseconds below 1e9.
    pub mtime: (i64, u32),
    /// Major and minor number of a device.
    pub device: (u32, u32),
}

/// One name met by [`View::readdir`].
#[derive(Debug)]
pub struct DirEntry<'a> {
    pub name: &'a [u8],
    pub attr: Attr,
    /// Offset to continue after this entry.
    pub next: u64,
}

/// What [`View::open`] found.
pub enum Opened {
    /// A file of the artifact.
    Body(Arc<dyn Body>),
    /// A file of the upper: read and written through the view, let go by [`View::release`].
    Upper,
}

/// Sizes, in blocks of [`BLOCK`] bytes and in inodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statfs {
    pub blocks: u64,
    pub free_blocks: u64,
    pub files: u64,
    pub free_files: u64,
}

/// A directory of the tree in which some names may be made, written and removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shadow {
    /// Inode of the directory in the tree.
    pub dir: u32,
    /// The names; none of them is in the tree.
    pub names: Vec<Box<[u8]>>,
    /// Files there from the start: path below `dir`, content.
    pub files: Vec<(String, Vec<u8>)>,
    /// Directories there from the start.
    pub dirs: Vec<String>,
}

/// One artifact as a file system.
pub struct View {
    artifact: Arc<Artifact>,
    contents: Arc<dyn Contents>,
    /// Link counts by tree inode.
    nlink: Box<[u32]>,
    /// Whether any inode has extended attributes.
    xattrs: bool,
    blocks: u64,
    upper: Option<Upper>,
    /// Tree directory (inode number) -> upper directory that adds names to it.
    shadows: HashMap<u64, u64>,
    /// Why nothing of the tree is shown any more.
    refused: OnceLock<String>,
}

impl View {
    /// A read-only view of `artifact` whose bytes come from `contents`.
    ///
    /// # Errors
    /// [`FsError::Damaged`] where the tree names content that the artifact does not have.
    pub fn new(artifact: Arc<Artifact>, contents: Arc<dyn Contents>) -> Result<Self, FsError> {
        Self::build(artifact, contents, &[], Limits::default())
    }

    /// A view in which the names given by `shadows` are writable.
    ///
    /// # Errors
    /// As [`View::new`]; and where a shadow is on no directory, hides a name, or has a bad path.
    pub fn with_upper(
        artifact: Arc<Artifact>,
        contents: Arc<dyn Contents>,
        shadows: &[Shadow],
        limits: Limits,
    ) -> Result<Self, FsError> {
        Self::build(artifact, contents, shadows, limits)
    }

    fn build(
        artifact: Arc<Artifact>,
        contents: Arc<dyn Contents>,
        shadows: &[Shadow],
        limits: Limits,
    ) -> Result<Self, FsError> {
        let inodes = artifact.tree.inodes();
        let mut nlink = vec![0u32; inodes.len()].into_boxed_slice();
        let mut xattrs = false;
        for (number, inode) in inodes.iter().enumerate() {
            xattrs |= !inode.meta.xattrs.is_empty();
            match &inode.kind {
                Kind::Dir { entries, .. } => {
                    // "." and the name in the parent; ".." of each child.
                    nlink[number] = nlink[number].saturating_add(2);
                    for entry in entries {
                        let child = entry.inode as usize;
                        let target = match inodes.get(child).map(|i| &i.kind) {
                            Some(Kind::Dir { .. }) => number,
                            Some(_) => child,
                            None => return Err(FsError::Damaged("an entry names no inode")),
                        };
                        nlink[target] = nlink[target].saturating_add(1);
                    }
                }
                Kind::File { object } if *object as usize >= artifact.objects.len() => {
                    return Err(FsError::Damaged("a file names no object"));
                }
                _ => {}
            }
        }
        let blocks = artifact
            .stored()
            .map(|o| o.size.div_ceil(u64::from(BLOCK)))
            .fold(0, u64::saturating_add);
        let mut view = Self {
            artifact,
            contents,
            nlink,
            xattrs,
            blocks,
            upper: None,
            shadows: HashMap::new(),
            refused: OnceLock::new(),
        };
        if !shadows.is_empty() {
            let upper = Upper::new(limits);
            for shadow in shadows {
                let ino = u64::from(shadow.dir) + 1;
                if view.attr(ino)?.kind != FileKind::Dir {
                    return Err(FsError::NotDir);
                }
                if shadow
                    .names
                    .iter()
                    .any(|n| view.artifact.tree.lookup(shadow.dir, n).is_some())
                {
                    return Err(FsError::Exists);
                }
                view.shadows.insert(ino, upper.shadow(ino, shadow)?);
            }
            view.upper = Some(upper);
        }
        Ok(view)
    }

    /// The artifact.
    pub fn artifact(&self) -> &Arc<Artifact> {
        &self.artifact
    }

    /// The artifact turned out not to be what it was said to be: from now on whatever is asked of its
    /// tree fails, and says `why`.
    pub fn refuse(&self, why: String) {
        // Whoever refused it first has said why.
        let _ = self.refused.set(why);
    }

    /// Whether the tree may still be shown.
    ///
    /// # Errors
    /// [`FsError::Content`], Corrupt, once it was refused.
    pub fn check(&self) -> Result<(), FsError> {
        match self.refused.get() {
            None => Ok(()),
            Some(why) => Err(FsError::Content {
                kind: FetchErrorKind::Corrupt,
                message: why.clone(),
            }),
        }
    }

    /// This view goes on where others of the same artifact stopped, which were `before` in number: what
    /// was written to them is gone, and what is written from now on is not taken for it.
    pub fn succeed(&self, before: u32) {
        if let Some(upper) = &self.upper {
            upper.succeed(before);
        }
    }

    /// Whether anything may be written.
    pub fn writable(&self) -> bool {
        self.upper.is_some()
    }

    /// Whether any inode has extended attributes.
    pub fn has_xattrs(&self) -> bool {
        self.xattrs
    }

    /// Attributes of `ino`.
    ///
    /// # Errors
    /// [`FsError::Stale`] where there is no such inode.
    pub fn attr(&self, ino: u64) -> Result<Attr, FsError> {
        if ino >= UPPER {
            return self.upper()?.attr(ino);
        }
        let (number, inode) = self.inode(ino)?;
        let (kind, size, device) = match &inode.kind {
            Kind::Dir { entries, .. } => (FileKind::Dir, entries.len() as u64, (0, 0)),
            Kind::File { object } => (
                FileKind::File,
                self.artifact.objects[*object as usize].size,
                (0, 0),
            ),
            Kind::Symlink { target } => (FileKind::Symlink, target.len() as u64, (0, 0)),
            Kind::Char { major, minor } => (FileKind::Char, 0, (*major, *minor)),
            Kind::Block { major, minor } => (FileKind::Block, 0, (*major, *minor)),
            Kind::Fifo => (FileKind::Fifo, 0, (0, 0)),
            Kind::Socket => (FileKind::Socket, 0, (0, 0)),
        };
        Ok(Attr {
            ino,
            kind,
            size,
            mode: inode.meta.mode & 0o7777,
            nlink: self.nlink[number as usize],
            uid: inode.meta.uid,
            gid: inode.meta.gid,
            mtime: inode.meta.mtime,
            device,
        })
    }

    /// The inode called `name` in directory `parent`.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NotDir`], [`FsError::TooLong`].
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Result<Attr, FsError> {
        if name.len() > MAX_NAME {
            return Err(FsError::TooLong);
        }
        if parent < UPPER {
            let (number, inode) = self.inode(parent)?;
            if !matches!(inode.kind, Kind::Dir { .. }) {
                return Err(FsError::NotDir);
            }
            if let Some(found) = self.artifact.tree.lookup(number, name) {
                return self.attr(u64::from(found) + 1);
            }
        }
        match self.upper_dir(parent) {
            Ok((upper, dir)) => upper.lookup(dir, name),
            Err(_) => Err(FsError::NotFound),
        }
    }

    /// Calls `each` for the entries of directory `ino` from `offset` (0 is the start) until it says
    /// false. `each` must not call the view.
    ///
    /// # Errors
    /// [`FsError::NotDir`], [`FsError::Stale`].
    pub fn readdir(
        &self,
        ino: u64,
        offset: u64,
        each: &mut dyn FnMut(DirEntry<'_>) -> bool,
    ) -> Result<(), FsError> {
        let dir = self.attr(ino)?;
        let (parent, entries) = if ino >= UPPER {
            (self.upper()?.parent(ino)?, &[][..])
        } else {
            match &self.inode(ino)?.1.kind {
                Kind::Dir { parent, entries } => (u64::from(*parent) + 1, &entries[..]),
                _ => return Err(FsError::NotDir),
            }
        };
        for (at, name, ino) in [(0, &b"."[..], ino), (1, b"..", parent)] {
            if offset <= at {
                let attr = if ino == dir.ino { dir } else { self.attr(ino)? };
                let next = at + 1;
                if !each(DirEntry { name, attr, next }) {
                    return Ok(());
                }
            }
        }
        let own = 2 + entries.len() as u64;
        for at in offset.max(2)..own {
            let entry = &entries[(at - 2) as usize];
            let attr = self.attr(u64::from(entry.inode) + 1)?;
            let next = at + 1;
            let name = &entry.name;
            if !each(DirEntry { name, attr, next }) {
                return Ok(());
            }
        }
        match self.upper_dir(ino) {
            Ok((upper, dir)) => upper.readdir(dir, offset.saturating_sub(own), &mut |mut entry| {
                entry.next += own;
                each(entry)
            }),
            Err(_) => Ok(()),
        }
    }

    /// The target of symbolic link `ino`.
    ///
    /// # Errors
    /// [`FsError::Invalid`] where it is none.
    pub fn readlink(&self, ino: u64) -> Result<&[u8], FsError> {
        if ino >= UPPER {
            return Err(FsError::Invalid);
        }
        match &self.inode(ino)?.1.kind {
            Kind::Symlink { target } => Ok(target),
            _ => Err(FsError::Invalid),
        }
    }

    /// The extended attribute `name` of `ino`.
    ///
    /// # Errors
    /// [`FsError::NoAttribute`].
    pub fn xattr(&self, ino: u64, name: &[u8]) -> Result<&[u8], FsError> {
        self.xattrs(ino)?
            .iter()
            .find(|(n, _)| **n == *name)
            .map(|(_, value)| &**value)
            .ok_or(FsError::NoAttribute)
    }

    /// The names of all extended attributes of `ino`, each with a NUL behind it.
    ///
    /// # Errors
    /// [`FsError::Stale`].
    pub fn xattr_names(&self, ino: u64) -> Result<Vec<u8>, FsError> {
        let mut names = Vec::new();
        for (name, _) in self.xattrs(ino)? {
            names.extend_from_slice(name);
            names.push(0);
        }
        Ok(names)
    }

    /// Opens file `ino`; `write` where it is to be written.
    ///
    /// # Errors
    /// [`FsError::ReadOnly`], [`FsError::IsDir`]; what its content says.
    pub fn open(&self, ino: u64, write: bool) -> Result<Opened, FsError> {
        if ino >= UPPER {
            self.upper()?.open(ino)?;
            return Ok(Opened::Upper);
        }
        match &self.inode(ino)?.1.kind {
            Kind::File { .. } if write => Err(FsError::ReadOnly),
            Kind::File { object } => self.contents.open(*object).map(Opened::Body),
            Kind::Dir { .. } => Err(FsError::IsDir),
            _ => Err(FsError::Invalid),
        }
    }

    /// Notes that a file is opened again for which nothing had to be asked here.
    pub fn touch(&self) {
        self.contents.touch();
    }

    /// Sizes of the whole view; free is what the upper may still take.
    pub fn statfs(&self) -> Statfs {
        let (used, free, files, free_files) =
            self.upper.as_ref().map_or((0, 0, 0, 0), Upper::statfs);
        let block = u64::from(BLOCK);
        Statfs {
            blocks: self
                .blocks
                .saturating_add(used.div_ceil(block) + free / block),
            free_blocks: free / block,
            files: self.nlink.len() as u64 + files + free_files,
            free_files,
        }
    }

    /// Lets go of an upper file opened by [`View::open`] or [`View::create`]; others need it not.
    pub fn release(&self, ino: u64) {
        if let Ok(upper) = self.upper() {
            upper.release(ino);
        }
    }

    /// Reads from upper file `ino`: at most `len` bytes from `offset`.
    ///
    /// # Errors
    /// [`FsError::Stale`], [`FsError::IsDir`].
    pub fn read_upper(&self, ino: u64, offset: u64, len: usize) -> Result<Vec<u8>, FsError> {
        self.upper()?.read(ino, offset, len)
    }

    /// Writes to upper file `ino`.
    ///
    /// # Errors
    /// [`FsError::ReadOnly`]; [`FsError::Full`] where it would not fit: then nothing is written.
    pub fn write(&self, ino: u64, offset: u64, data: &[u8]) -> Result<(), FsError> {
        self.writable_inode(ino)?.write(ino, offset, data)
    }

    /// Changes attributes of `ino`.
    ///
    /// # Errors
    /// As [`View::write`].
    pub fn setattr(&self, ino: u64, change: &Change) -> Result<Attr, FsError> {
        self.writable_inode(ino)?.setattr(ino, change)
    }

    /// Makes file `name` in `parent` and opens it.
    ///
    /// # Errors
    /// [`FsError::ReadOnly`] outside the writable names; [`FsError::Exists`], [`FsError::Full`].
    pub fn create(
        &self,
        parent: u64,
        name: &[u8],
        mode: u16,
        owner: Owner,
    ) -> Result<Attr, FsError> {
        let (upper, dir) = self.free_name(parent, name)?;
        upper.create(dir, name, mode, owner)
    }

    /// Makes directory `name` in `parent`.
    ///
    /// # Errors
    /// As [`View::create`].
    pub fn mkdir(
        &self,
        parent: u64,
        name: &[u8],
        mode: u16,
        owner: Owner,
    ) -> Result<Attr, FsError> {
        let (upper, dir) = self.free_name(parent, name)?;
        upper.mkdir(dir, parent, name, mode, owner)
    }

    /// Removes file `name` from `parent`; open handles keep its content.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::IsDir`], [`FsError::ReadOnly`].
    pub fn unlink(&self, parent: u64, name: &[u8]) -> Result<(), FsError> {
        let (upper, dir) = self.written_name(parent, name)?;
        upper.unlink(dir, name)
    }

    /// Removes empty directory `name` from `parent`.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NotDir`], [`FsError::NotEmpty`], [`FsError::ReadOnly`].
    pub fn rmdir(&self, parent: u64, name: &[u8]) -> Result<(), FsError> {
        let (upper, dir) = self.written_name(parent, name)?;
        upper.rmdir(dir, name)
    }

    /// Renames within the upper, over what is there unless `keep` is set. That a directory is not
    /// moved into itself, the kernel has made sure of.
    ///
    /// # Errors
    /// As [`View::create`] for the new and [`View::unlink`] for the old name.
    pub fn rename(&self, from: (u64, &[u8]), to: (u64, &[u8]), keep: bool) -> Result<(), FsError> {
        let (upper, from_dir) = self.written_name(from.0, from.1)?;
        let (_, to_dir) = self.written_name(to.0, to.1)?;
        upper.rename((from_dir, from.1), (to_dir, to.1), to.0, keep)
    }

    fn inode(&self, ino: u64) -> Result<(u32, &crate::tree::Inode), FsError> {
        self.check()?;
        let number = ino
            .checked_sub(1)
            .and_then(|n| u32::try_from(n).ok())
            .ok_or(FsError::Stale)?;
        let inode = self.artifact.tree.get(number).ok_or(FsError::Stale)?;
        Ok((number, inode))
    }

    fn xattrs(&self, ino: u64) -> Result<&[Xattr], FsError> {
        if ino >= UPPER {
            return Ok(&[]);
        }
        Ok(&self.inode(ino)?.1.meta.xattrs)
    }

    fn upper(&self) -> Result<&Upper, FsError> {
        self.upper.as_ref().ok_or(FsError::Stale)
    }

    /// The upper and the directory of it that holds what is written in `dir`.
    fn upper_dir(&self, dir: u64) -> Result<(&Upper, u64), FsError> {
        let upper = self.upper.as_ref().ok_or(FsError::ReadOnly)?;
        if dir >= UPPER {
            return Ok((upper, dir));
        }
        let shadow = self.shadows.get(&dir).ok_or(FsError::ReadOnly)?;
        Ok((upper, *shadow))
    }

    fn writable_inode(&self, ino: u64) -> Result<&Upper, FsError> {
        if ino < UPPER {
            self.inode(ino)?;
            return Err(FsError::ReadOnly);
        }
        self.upper()
    }

    /// As [`View::upper_dir`], for a name that is about to be made.
    fn free_name(&self, parent: u64, name: &[u8]) -> Result<(&Upper, u64), FsError> {
        match self.lookup(parent, name) {
            Ok(_) => Err(FsError::Exists),
            Err(FsError::NotFound) => self.upper_dir(parent),
            Err(other) => Err(other),
        }
    }

    /// As [`View::upper_dir`], for a name that is not the tree's.
    fn written_name(&self, parent: u64, name: &[u8]) -> Result<(&Upper, u64), FsError> {
        match self.lookup(parent, name) {
            Ok(attr) if attr.ino < UPPER => Err(FsError::ReadOnly),
            Ok(_) | Err(FsError::NotFound) => self.upper_dir(parent),
            Err(other) => Err(other),
        }
    }
}
