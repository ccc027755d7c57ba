//! Trees: directories, files, symlinks, hard links, xattrs as pure data, and their codec.
//!
//! Invariants, kept by [`TreeBuilder`] and checked again by [`Artifact::decode`]: inode 0 is the root
//! directory; every other inode is reachable from it; names are 1..=255 bytes without `/` or NUL
//! and never `.` or `..`; entries of a directory are sorted and unique; directories have one parent; no path is longer than [`MAX_PATH`].
//! A path from an artifact therefore never escapes. Called by sources (to build), the store (to
//! keep), `fs` (to serve). Nothing here does I/O.

mod below;
mod codec;

use std::collections::HashMap;

pub(crate) use codec::{Reader, Writer};

use crate::{
    digest::{Digest, ObjectId, PartialId},
    reference::Reference,
};

/// Most inodes a tree may have.
pub const MAX_INODES: usize = 12_000_000;
/// Longest name of one path component, in bytes (`NAME_MAX`).
pub const MAX_NAME: usize = 255;
/// Longest path, in bytes (`PATH_MAX`).
pub const MAX_PATH: usize = 4096;

/// Why a tree could not be built or decoded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TreeError {
    #[error("path {path:?}: {why}")]
    Path { path: String, why: &'static str },
    #[error("too many entries: more than {MAX_INODES}")]
    TooMany,
    #[error("stored tree is damaged: {0}")]
    Damaged(&'static str),
    #[error("stored tree has format {found}, this version reads {known}")]
    Version { found: u32, known: u32 },
}

/// One resolved reference: immutable, named by the digest of its encoding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// The reference as the user meant it, canonical, without secrets.
    pub reference: String,
    /// What the origin calls this generation (commit, etag, digest); empty where it has no word.
    pub revision: String,
    /// The files.
    pub tree: Tree,
    /// Contents of the files; [`Kind::File`] indexes into this. What slices are cut from is in here
    /// too, without a file of its own.
    pub objects: Vec<Object>,
}

/// The content of one or more regular files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Its name in the store.
    pub id: ObjectId,
    /// Bytes.
    pub size: u64,
    /// The git blob SHA-1 (over `blob <size>\0` + content), where the origin names it.
    pub git_sha1: Option<[u8; 20]>,
    /// How its bytes are made from remote bytes.
    pub recipe: Recipe,
}

impl Object {
    /// Its name in the store until it is verified, where it comes from `origin` (see
    /// [`Locator::origin`](crate::reference::Locator::origin)).
    pub fn partial_id(&self, origin: &str) -> PartialId {
        let path = self.recipe.location().map_or("", |at| at.path.as_str());
        let claimed = |by: &str| PartialId::claimed(self.id, self.size, by);
        match origin.split_once("://") {
            // Of one host, who could write one file could not write others.
            Some(("http" | "https", _)) => claimed(path),
            // A registry takes no blob that is not what its digest says, in whichever repository; what
            // lies in a layer is as its owner says.
            Some(("oci", name)) if path == self.id.to_string() => {
                let registry = name.split('/').next().unwrap_or(name);
                claimed(&format!("oci://{registry}"))
            }
            _ => claimed(origin),
        }
    }
}

/// How the bytes of an object are made from remote bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recipe {
    /// Bytes `a..b` of the object are bytes `offset + a..offset + b` at the location.
    Raw(Location),
    /// Bytes `a..b` of the object are bytes `offset + a..offset + b` of `objects[object]` of the same
    /// artifact, which is no slice: a file inside a tar. Only the container is fetched, stored
    /// and verified.
    Slice { object: u32, offset: u64 },
}

impl Recipe {
    /// Where the bytes are at the origin; `None` for a slice, which has no place of its own.
    pub const fn location(&self) -> Option<&Location> {
        match self {
            Self::Raw(location) => Some(location),
            Self::Slice { .. } => None,
        }
    }
}

/// A byte range at an origin, pinned to one generation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Location {
    /// Key, URL path or file name; the source that made it understands it.
    pub path: String,
    /// Etag, version or commit that every range request must match.
    pub generation: Option<String>,
    /// Where the object starts there, in bytes.
    pub offset: u64,
}

/// A directory tree; inode 0 is the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    inodes: Vec<Inode>,
}

/// One inode: what it is and its attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    pub kind: Kind,
    pub meta: Meta,
}

/// An extended attribute: name, value.
pub type Xattr = (Box<[u8]>, Box<[u8]>);

/// Attributes of an inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits with setuid, setgid and sticky: `mode & 0o7777`.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Modification time: seconds since the epoch, and nanoseconds below 1e9.
    pub mtime: (i64, u32),
    /// Extended attributes.
    pub xattrs: Vec<Xattr>,
}

impl Meta {
    /// A plain file: 0444, root, `mtime` seconds since the epoch.
    pub const fn file(mtime: i64) -> Self {
        Self {
            mode: 0o444,
            uid: 0,
            gid: 0,
            mtime: (mtime, 0),
            xattrs: Vec::new(),
        }
    }

    /// A plain directory: 0555, root, `mtime` seconds since the epoch.
    pub const fn dir(mtime: i64) -> Self {
        Self {
            mode: 0o555,
            uid: 0,
            gid: 0,
            mtime: (mtime, 0),
            xattrs: Vec::new(),
        }
    }
}

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory: its parent (itself for the root) and its entries, sorted by name.
    Dir { parent: u32, entries: Vec<Entry> },
    /// A regular file with the content `objects[object]` of the artifact.
    File { object: u32 },
    /// A symbolic link and its target, as written.
    Symlink { target: Box<[u8]> },
    /// A character device.
    Char { major: u32, minor: u32 },
    /// A block device.
    Block { major: u32, minor: u32 },
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: Box<[u8]>,
    pub inode: u32,
}

impl Tree {
    /// A tree from a finished graph of inodes, whose directories are sorted by name; their parents
    /// need not be set. Files may name objects below `objects`.
    ///
    /// # Errors
    /// [`TreeError::Damaged`] if an invariant does not hold, [`TreeError::TooMany`].
    pub fn from_inodes(mut inodes: Vec<Inode>, objects: usize) -> Result<Self, TreeError> {
        if inodes.len() > MAX_INODES {
            return Err(TreeError::TooMany);
        }
        for inode in &inodes {
            check_inode(&inode.kind, &inode.meta).map_err(TreeError::Damaged)?;
        }
        codec::connect(&mut inodes, objects)?;
        Ok(Self { inodes })
    }

    /// All inodes; the index is the inode number, 0 the root.
    pub fn inodes(&self) -> &[Inode] {
        &self.inodes
    }

    /// The inode, if there is one.
    pub fn get(&self, inode: u32) -> Option<&Inode> {
        self.inodes.get(inode as usize)
    }

    /// The entries of directory `inode`; `None` where it is no directory.
    pub fn entries(&self, inode: u32) -> Option<&[Entry]> {
        match &self.get(inode)?.kind {
            Kind::Dir { entries, .. } => Some(entries),
            _ => None,
        }
    }

    /// The inode called `name` in directory `dir`.
    pub fn lookup(&self, dir: u32, name: &[u8]) -> Option<u32> {
        let entries = self.entries(dir)?;
        let at = entries.binary_search_by(|e| (*e.name).cmp(name)).ok()?;
        Some(entries[at].inode)
    }

    /// The inode at `path` (components separated by `/`); follows no symlinks.
    pub fn find(&self, path: &str) -> Option<u32> {
        path.split('/')
            .filter(|c| !c.is_empty())
            .try_fold(0, |dir, name| self.lookup(dir, name.as_bytes()))
    }

    /// Every regular file: (path without leading slash, inode, object), in path order. A file with
    /// several hard links is given once for each.
    pub fn files(&self) -> Vec<(String, u32, u32)> {
        let mut found = Vec::new();
        // (inode, its path, next entry): an explicit stack, since depth comes from the artifact.
        let mut stack = vec![(0u32, 0usize)];
        let mut path: Vec<&[u8]> = Vec::new();
        while let Some((dir, next)) = stack.pop() {
            let Some(entry) = self.entries(dir).and_then(|entries| entries.get(next)) else {
                path.pop();
                continue;
            };
            stack.push((dir, next + 1));
            match &self.inodes[entry.inode as usize].kind {
                Kind::Dir { .. } => {
                    path.push(&entry.name);
                    stack.push((entry.inode, 0));
                }
                Kind::File { object } => {
                    let mut text = String::new();
                    for part in path.iter().copied().chain([&*entry.name]) {
                        if !text.is_empty() {
                            text.push('/');
                        }
                        text.push_str(&String::from_utf8_lossy(part));
                    }
                    found.push((text, entry.inode, *object));
                }
                _ => {}
            }
        }
        found
    }
}

impl Artifact {
    /// The digest that names this artifact: over its encoding.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.encode())
    }

    /// Whether both show the same files with the same content, wherever that is read.
    pub fn shows_the_same(&self, other: &Self) -> bool {
        let content = |object: &Object| (object.id, object.size, object.git_sha1);
        self.reference == other.reference
            && self.revision == other.revision
            && self.tree == other.tree
            && (self.objects.iter().map(content)).eq(other.objects.iter().map(content))
    }

    /// Bytes of all distinct objects, each byte once: slices count as what they are cut from.
    pub fn size(&self) -> u64 {
        self.stored()
            .fold(0, |sum, object| sum.saturating_add(object.size))
    }

    /// Who answers for its content (see [`Locator::origin`](crate::reference::Locator::origin)).
    pub fn origin(&self) -> String {
        match self.reference.parse::<Reference>() {
            Ok(reference) => reference.locator.origin(),
            Err(_) => self.reference.clone(),
        }
    }

    /// The objects that are fetched and stored: all but slices.
    pub fn stored(&self) -> impl Iterator<Item = &Object> {
        let stored = |object: &&Object| object.recipe.location().is_some();
        self.objects.iter().filter(stored)
    }

    /// Where the bytes of `objects[object]` are stored: the index of that object (itself, unless it
    /// is a slice) and the offset in it. `None` where the objects contradict each other.
    pub fn place(&self, object: u32) -> Option<(u32, u64)> {
        place(&self.objects, object)
    }
}

fn place(objects: &[Object], object: u32) -> Option<(u32, u64)> {
    let this = objects.get(object as usize)?;
    let &Recipe::Slice {
        object: container,
        offset,
    } = &this.recipe
    else {
        return Some((object, 0));
    };
    let within = objects.get(container as usize)?;
    let end = offset.checked_add(this.size)?;
    (within.recipe.location().is_some() && end <= within.size).then_some((container, offset))
}

/// Builds a [`Tree`] from paths, in any order. Missing parents are made with the default meta.
pub struct TreeBuilder {
    inodes: Vec<BuildInode>,
    default_dir: Meta,
}

struct BuildInode {
    inode: Inode,
    /// A directory that only stands in the paths of others so far.
    implied: bool,
    children: HashMap<Box<[u8]>, u32>,
}

impl TreeBuilder {
    /// An empty tree whose root and implied directories have `default_dir`.
    pub fn new(default_dir: Meta) -> Self {
        let root = BuildInode {
            implied: true,
            inode: Inode {
                kind: Kind::Dir {
                    parent: 0,
                    entries: Vec::new(),
                },
                meta: default_dir.clone(),
            },
            children: HashMap::new(),
        };
        Self {
            inodes: vec![root],
            default_dir,
        }
    }

    /// Adds an inode at `path` (relative, `/`-separated) and returns its number.
    ///
    /// # Errors
    /// A path that is absolute, empty, too long, holds `.`, `..`, NUL or an empty component, that
    /// is there already, or that passes through something that is no directory; attributes that no
    /// file can have. A directory that was only implied so far is not there already.
    pub fn add(&mut self, path: &[u8], kind: Kind, meta: Meta) -> Result<u32, TreeError> {
        check_inode(&kind, &meta).map_err(|why| path_error(path, why))?;
        let (parent, name) = self.parent_of(path)?;
        if let Some(&there) = self.inodes[parent as usize].children.get(name) {
            let found = &mut self.inodes[there as usize];
            if !found.implied || !matches!(kind, Kind::Dir { .. }) {
                return Err(path_error(path, "is there twice"));
            }
            found.implied = false;
            found.inode.meta = meta;
            return Ok(there);
        }
        let kind = match kind {
            Kind::Dir { .. } => Kind::Dir {
                parent,
                entries: Vec::new(),
            },
            other => other,
        };
        self.push(parent, name, Inode { kind, meta }, false)
    }

    /// Adds a file with content `objects[object]`.
    ///
    /// # Errors
    /// As [`TreeBuilder::add`].
    pub fn add_file(&mut self, path: &[u8], object: u32, meta: Meta) -> Result<u32, TreeError> {
        self.add(path, Kind::File { object }, meta)
    }

    /// Makes `path` another name of `inode`, which must not be a directory.
    ///
    /// # Errors
    /// As [`TreeBuilder::add`], and for an inode that is a directory or not there.
    pub fn link(&mut self, path: &[u8], inode: u32) -> Result<(), TreeError> {
        match self.inodes.get(inode as usize).map(|i| &i.inode.kind) {
            None | Some(Kind::Dir { .. }) => {
                return Err(path_error(path, "links to what is no file"));
            }
            Some(_) => {}
        }
        let (parent, name) = self.parent_of(path)?;
        let children = &mut self.inodes[parent as usize].children;
        if children.contains_key(name) {
            return Err(path_error(path, "is there twice"));
        }
        children.insert(name.into(), inode);
        Ok(())
    }

    /// The finished tree.
    pub fn build(self) -> Tree {
        let inodes = self
            .inodes
            .into_iter()
            .map(
                |BuildInode {
                     mut inode,
                     children,
                     ..
                 }| {
                    if let Kind::Dir { entries, .. } = &mut inode.kind {
                        *entries = children
                            .into_iter()
                            .map(|(name, inode)| Entry { name, inode })
                            .collect();
                        entries.sort_by(|a, b| a.name.cmp(&b.name));
                    }
                    inode
                },
            )
            .collect();
        Tree { inodes }
    }

    fn push(
        &mut self,
        parent: u32,
        name: &[u8],
        inode: Inode,
        implied: bool,
    ) -> Result<u32, TreeError> {
        if self.inodes.len() >= MAX_INODES {
            return Err(TreeError::TooMany);
        }
        let number = self.inodes.len() as u32;
        self.inodes.push(BuildInode {
            inode,
            implied,
            children: HashMap::new(),
        });
        self.inodes[parent as usize]
            .children
            .insert(name.into(), number);
        Ok(number)
    }

    fn parent_of<'p>(&mut self, path: &'p [u8]) -> Result<(u32, &'p [u8]), TreeError> {
        if path.len() > MAX_PATH {
            return Err(path_error(path, "is longer than 4096 bytes"));
        }
        let mut components = path.split(|&b| b == b'/').peekable();
        let mut dir = 0u32;
        loop {
            let Some(name) = components.next() else {
                return Err(path_error(path, "is empty"));
            };
            check_name(name).map_err(|why| path_error(path, why))?;
            if components.peek().is_none() {
                return Ok((dir, name));
            }
            dir = match self.inodes[dir as usize].children.get(name) {
                Some(&child) => match self.inodes[child as usize].inode.kind {
                    Kind::Dir { .. } => child,
                    _ => return Err(path_error(path, "passes through what is no directory")),
                },
                None => {
                    let kind = Kind::Dir {
                        parent: dir,
                        entries: Vec::new(),
                    };
                    let meta = self.default_dir.clone();
                    self.push(dir, name, Inode { kind, meta }, true)?
                }
            };
        }
    }
}

fn path_error(path: &[u8], why: &'static str) -> TreeError {
    let path = String::from_utf8_lossy(path).chars().take(200).collect();
    TreeError::Path { path, why }
}

/// Whether `name` may stand in a directory.
pub(crate) fn check_name(name: &[u8]) -> Result<(), &'static str> {
    match name {
        b"" => Err("is absolute or has an empty component"),
        b"." => Err("has the component \".\""),
        b".." => Err("has the component \"..\""),
        _ if name.len() > MAX_NAME => Err("has a component longer than 255 bytes"),
        _ if name.contains(&0) => Err("has a NUL byte"),
        _ if name.contains(&b'/') => Err("has a slash in a component"),
        _ => Ok(()),
    }
}

/// Whether an inode may be so.
pub(crate) fn check_inode(kind: &Kind, meta: &Meta) -> Result<(), &'static str> {
    if meta.mode > 0o7777 {
        return Err("has a mode beyond 07777");
    }
    if meta.mtime.1 >= 1_000_000_000 {
        return Err("has a modification time with a second or more of nanoseconds");
    }
    for (name, _) in &meta.xattrs {
        if name.is_empty() || name.len() > MAX_NAME || name.contains(&0) {
            return Err("has an extended attribute with an unusable name");
        }
    }
    match kind {
        Kind::Symlink { target } if target.is_empty() => Err("is a symlink to nothing"),
        Kind::Symlink { target } if target.len() >= MAX_PATH => {
            Err("is a symlink to a path longer than 4095 bytes")
        }
        Kind::Symlink { target } if target.contains(&0) => Err("is a symlink to a NUL byte"),
        _ => Ok(()),
    }
}
