//! The writable part of a view: a small file system in memory, bounded in bytes and inodes.
//!
//! Directories are either children of a shadow or a shadow itself, which adds names to a directory
//! of the tree and takes no others. One lock guards all: it is touched by lock files and references,
//! never by reads of content. Nothing survives the process, and nothing is meant to.

use std::{
    collections::{BTreeMap, HashMap},
    time::{SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;

use super::{Attr, DirEntry, FileKind, FsError, Shadow};
use crate::tree::MAX_NAME;

/// The first inode number of the upper; trees stay below.
pub const UPPER: u64 = 1 << 32;

/// Bounds of the upper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all files.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 16 << 20,
            inodes: 10_000,
        }
    }
}

/// Who makes a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// New attributes; `None` is left as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    pub mode: Option<u16>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub mtime: Option<(i64, u32)>,
}

pub(super) struct Upper {
    limits: Limits,
    state: Mutex<State>,
}

struct State {
    nodes: HashMap<u64, Node>,
    next: u64,
    bytes: u64,
}

struct Node {
    body: NodeBody,
    mode: u16,
    owner: Owner,
    mtime: (i64, u32),
}

enum NodeBody {
    Dir(Dir),
    File {
        data: Vec<u8>,
        opens: u32,
        linked: bool,
    },
}

#[derive(Default)]
struct Dir {
    /// What `..` shows.
    parent: u64,
    /// Name -> inode, cookie. A cookie is used once, so a reader's place survives changes.
    entries: BTreeMap<Box<[u8]>, (u64, u64)>,
    order: BTreeMap<u64, Box<[u8]>>,
    next_cookie: u64,
    /// Of a shadow: the only names it takes.
    only: Option<Vec<Box<[u8]>>>,
}

impl Upper {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            state: Mutex::new(State {
                nodes: HashMap::new(),
                next: UPPER,
                bytes: 0,
            }),
        }
    }

    /// Makes the shadow of directory `parent` of the tree and what is in it from the start.
    pub(super) fn shadow(&self, parent: u64, shadow: &Shadow) -> Result<u64, FsError> {
        let root = Owner { uid: 0, gid: 0 };
        let mut state = self.state.lock();
        let top = state.add(Node::new(
            NodeBody::Dir(Dir {
                parent,
                only: Some(shadow.names.clone()),
                ..Dir::default()
            }),
            0o777,
            root,
        ));
        let files = shadow.files.iter().map(|(path, data)| (path, Some(data)));
        for (path, data) in shadow.dirs.iter().map(|path| (path, None)).chain(files) {
            let (mut dir, mut shown) = (top, parent);
            let mut names = path.split('/').peekable();
            while let Some(name) = names.next() {
                if matches!(name, "" | "." | "..") || name.contains('\0') {
                    return Err(FsError::Invalid);
                }
                let name = name.as_bytes();
                let body = match data {
                    Some(data) if names.peek().is_none() => NodeBody::File {
                        data: data.clone(),
                        opens: 0,
                        linked: true,
                    },
                    _ => NodeBody::Dir(Dir {
                        parent: shown,
                        ..Dir::default()
                    }),
                };
                let made = match (&body, state.dir(dir)?.entries.get(name)) {
                    (NodeBody::Dir(_), Some((found, _))) => *found,
                    _ => {
                        let mode = match body {
                            NodeBody::Dir(_) => 0o777,
                            NodeBody::File { .. } => 0o666,
                        };
                        state.bytes += data.map_or(0, |d| d.len() as u64);
                        self.link(&mut state, dir, name, Node::new(body, mode, root))?
                    }
                };
                (dir, shown) = (made, made);
            }
        }
        Ok(top)
    }

    /// Makes room for the numbers that views before this one have given.
    pub(super) fn succeed(&self, before: u32) {
        let mut state = self.state.lock();
        state.next = state.next.max(UPPER + (u64::from(before) << 32));
    }

    pub(super) fn attr(&self, ino: u64) -> Result<Attr, FsError> {
        self.state.lock().attr(ino)
    }

    pub(super) fn parent(&self, ino: u64) -> Result<u64, FsError> {
        Ok(self.state.lock().dir(ino)?.parent)
    }

    pub(super) fn lookup(&self, dir: u64, name: &[u8]) -> Result<Attr, FsError> {
        let state = self.state.lock();
        let (ino, _) = *state.dir(dir)?.entries.get(name).ok_or(FsError::NotFound)?;
        state.attr(ino)
    }

    /// Entries from `offset`, which counts `.` and `..` as done.
    pub(super) fn readdir(
        &self,
        dir: u64,
        offset: u64,
        each: &mut dyn FnMut(DirEntry<'_>) -> bool,
    ) -> Result<(), FsError> {
        let state = self.state.lock();
        let dir = state.dir(dir)?;
        for (cookie, name) in dir.order.range(offset..) {
            let attr = state.attr(dir.entries.get(name).ok_or(FsError::Stale)?.0)?;
            let next = cookie + 1;
            if !each(DirEntry { name, attr, next }) {
                break;
            }
        }
        Ok(())
    }

    pub(super) fn open(&self, ino: u64) -> Result<(), FsError> {
        match &mut self.state.lock().node(ino)?.body {
            NodeBody::File { opens, .. } => *opens += 1,
            NodeBody::Dir(_) => return Err(FsError::IsDir),
        }
        Ok(())
    }

    pub(super) fn release(&self, ino: u64) {
        let mut state = self.state.lock();
        if let Some(Node {
            body: NodeBody::File { opens, .. },
            ..
        }) = state.nodes.get_mut(&ino)
        {
            *opens = opens.saturating_sub(1);
            state.collect(ino);
        }
    }

    pub(super) fn read(&self, ino: u64, offset: u64, len: usize) -> Result<Vec<u8>, FsError> {
        let mut state = self.state.lock();
        let data = state.file(ino)?;
        let start = usize::try_from(offset).map_or(data.len(), |o| o.min(data.len()));
        let end = start.saturating_add(len).min(data.len());
        Ok(data[start..end].to_vec())
    }

    pub(super) fn write(&self, ino: u64, offset: u64, data: &[u8]) -> Result<(), FsError> {
        let mut state = self.state.lock();
        let size = state.file(ino)?.len() as u64;
        let end = offset.checked_add(data.len() as u64).ok_or(FsError::Full)?;
        if end > size {
            self.resize(&mut state, ino, end)?;
        }
        // Within memory: `resize` bounds it.
        let start = offset as usize;
        state.file(ino)?[start..start + data.len()].copy_from_slice(data);
        state.node(ino)?.mtime = now();
        Ok(())
    }

    pub(super) fn setattr(&self, ino: u64, change: &Change) -> Result<Attr, FsError> {
        let mut state = self.state.lock();
        if let Some(size) = change.size {
            self.resize(&mut state, ino, size)?;
        }
        let node = state.node(ino)?;
        if change.size.is_some() {
            node.mtime = now();
        }
        node.mode = change.mode.map_or(node.mode, |mode| mode & 0o7777);
        node.owner.uid = change.uid.unwrap_or(node.owner.uid);
        node.owner.gid = change.gid.unwrap_or(node.owner.gid);
        node.mtime = change.mtime.unwrap_or(node.mtime);
        state.attr(ino)
    }

    pub(super) fn create(
        &self,
        dir: u64,
        name: &[u8],
        mode: u16,
        owner: Owner,
    ) -> Result<Attr, FsError> {
        let body = NodeBody::File {
            data: Vec::new(),
            opens: 1,
            linked: true,
        };
        let mut state = self.state.lock();
        let ino = self.link(&mut state, dir, name, Node::new(body, mode, owner))?;
        state.attr(ino)
    }

    /// `parent` is what `..` in it shows.
    pub(super) fn mkdir(
        &self,
        dir: u64,
        parent: u64,
        name: &[u8],
        mode: u16,
        owner: Owner,
    ) -> Result<Attr, FsError> {
        let body = NodeBody::Dir(Dir {
            parent,
            ..Dir::default()
        });
        let mut state = self.state.lock();
        let ino = self.link(&mut state, dir, name, Node::new(body, mode, owner))?;
        state.attr(ino)
    }

    pub(super) fn unlink(&self, dir: u64, name: &[u8]) -> Result<(), FsError> {
        let mut state = self.state.lock();
        let ino = state.find(dir, name)?;
        match &mut state.node(ino)?.body {
            NodeBody::Dir(_) => return Err(FsError::IsDir),
            NodeBody::File { linked, .. } => *linked = false,
        }
        state.forget_name(dir, name)?;
        state.collect(ino);
        Ok(())
    }

    pub(super) fn rmdir(&self, dir: u64, name: &[u8]) -> Result<(), FsError> {
        let mut state = self.state.lock();
        let ino = state.find(dir, name)?;
        match &state.node(ino)?.body {
            NodeBody::File { .. } => return Err(FsError::NotDir),
            NodeBody::Dir(inner) if !inner.entries.is_empty() => return Err(FsError::NotEmpty),
            NodeBody::Dir(_) => {}
        }
        state.forget_name(dir, name)?;
        state.nodes.remove(&ino);
        Ok(())
    }

    /// `shown` is what `..` shows in a directory that moved to `to`.
    pub(super) fn rename(
        &self,
        from: (u64, &[u8]),
        to: (u64, &[u8]),
        shown: u64,
        keep: bool,
    ) -> Result<(), FsError> {
        let mut state = self.state.lock();
        let ino = state.find(from.0, from.1)?;
        state.dir(to.0)?.takes(to.1)?;
        let is_dir = state.dir(ino).is_ok();
        match state.find(to.0, to.1) {
            Ok(_) if keep => return Err(FsError::Exists),
            Ok(over) if over == ino => return Ok(()),
            Ok(over) => match (&mut state.node(over)?.body, is_dir) {
                (NodeBody::Dir(_), false) => return Err(FsError::IsDir),
                (NodeBody::File { .. }, true) => return Err(FsError::NotDir),
                (NodeBody::Dir(inner), true) if !inner.entries.is_empty() => {
                    return Err(FsError::NotEmpty);
                }
                (NodeBody::Dir(_), true) => {
                    state.forget_name(to.0, to.1)?;
                    state.nodes.remove(&over);
                }
                (NodeBody::File { linked, .. }, false) => {
                    *linked = false;
                    state.forget_name(to.0, to.1)?;
                    state.collect(over);
                }
            },
            Err(FsError::NotFound) => {}
            Err(other) => return Err(other),
        }
        state.forget_name(from.0, from.1)?;
        state.dir_mut(to.0)?.insert(to.1, ino);
        if let Ok(dir) = state.dir_mut(ino) {
            dir.parent = shown;
        }
        Ok(())
    }

    /// Bytes used and free, inodes used and free.
    pub(super) fn statfs(&self) -> (u64, u64, u64, u64) {
        let state = self.state.lock();
        let inodes = state.nodes.len() as u64;
        (
            state.bytes,
            self.limits.bytes.saturating_sub(state.bytes),
            inodes,
            self.limits.inodes.saturating_sub(inodes),
        )
    }

    /// Adds `node` as `name` of `dir`.
    fn link(&self, state: &mut State, dir: u64, name: &[u8], node: Node) -> Result<u64, FsError> {
        let found = state.dir(dir)?;
        found.takes(name)?;
        if found.entries.contains_key(name) {
            return Err(FsError::Exists);
        }
        if state.nodes.len() as u64 >= self.limits.inodes || state.bytes > self.limits.bytes {
            return Err(FsError::Full);
        }
        let ino = state.add(node);
        state.dir_mut(dir)?.insert(name, ino);
        state.node(dir)?.mtime = now();
        Ok(ino)
    }

    fn resize(&self, state: &mut State, ino: u64, size: u64) -> Result<(), FsError> {
        let old = state.file(ino)?.len() as u64;
        let others = state.bytes - old;
        if size > old && size > self.limits.bytes.saturating_sub(others) {
            return Err(FsError::Full);
        }
        let data = state.file(ino)?;
        data.resize(size as usize, 0);
        data.shrink_to(size as usize * 2);
        state.bytes = others + size;
        Ok(())
    }
}

impl State {
    fn add(&mut self, node: Node) -> u64 {
        let ino = self.next;
        self.next += 1;
        self.nodes.insert(ino, node);
        ino
    }

    fn node(&mut self, ino: u64) -> Result<&mut Node, FsError> {
        self.nodes.get_mut(&ino).ok_or(FsError::Stale)
    }

    fn dir(&self, ino: u64) -> Result<&Dir, FsError> {
        match &self.nodes.get(&ino).ok_or(FsError::Stale)?.body {
            NodeBody::Dir(dir) => Ok(dir),
            NodeBody::File { .. } => Err(FsError::NotDir),
        }
    }

    fn dir_mut(&mut self, ino: u64) -> Result<&mut Dir, FsError> {
        match &mut self.node(ino)?.body {
            NodeBody::Dir(dir) => Ok(dir),
            NodeBody::File { .. } => Err(FsError::NotDir),
        }
    }

    fn file(&mut self, ino: u64) -> Result<&mut Vec<u8>, FsError> {
        match &mut self.node(ino)?.body {
            NodeBody::File { data, .. } => Ok(data),
            NodeBody::Dir(_) => Err(FsError::IsDir),
        }
    }

    fn find(&self, dir: u64, name: &[u8]) -> Result<u64, FsError> {
        let found = self.dir(dir)?.entries.get(name);
        found.map(|(ino, _)| *ino).ok_or(FsError::NotFound)
    }

    fn forget_name(&mut self, dir: u64, name: &[u8]) -> Result<(), FsError> {
        let dir_node = self.dir_mut(dir)?;
        if let Some((_, cookie)) = dir_node.entries.remove(name) {
            dir_node.order.remove(&cookie);
        }
        self.node(dir)?.mtime = now();
        Ok(())
    }

    /// Drops a file that has neither a name nor an open handle.
    fn collect(&mut self, ino: u64) {
        if let Some(Node {
            body:
                NodeBody::File {
                    data,
                    opens: 0,
                    linked: false,
                },
            ..
        }) = self.nodes.get(&ino)
        {
            self.bytes -= data.len() as u64;
            self.nodes.remove(&ino);
        }
    }

    fn attr(&self, ino: u64) -> Result<Attr, FsError> {
        let node = self.nodes.get(&ino).ok_or(FsError::Stale)?;
        let (kind, size, nlink) = match &node.body {
            NodeBody::File { data, linked, .. } => {
                (FileKind::File, data.len() as u64, u32::from(*linked))
            }
            NodeBody::Dir(dir) => {
                let inner = dir.entries.values();
                let dirs = inner.filter(|(ino, _)| self.dir(*ino).is_ok()).count();
                (FileKind::Dir, dir.entries.len() as u64, 2 + dirs as u32)
            }
        };
        Ok(Attr {
            ino,
            kind,
            size,
            mode: node.mode,
            nlink,
            uid: node.owner.uid,
            gid: node.owner.gid,
            mtime: node.mtime,
            device: (0, 0),
        })
    }
}

impl Dir {
    fn insert(&mut self, name: &[u8], ino: u64) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.order.insert(cookie, name.into());
        self.entries.insert(name.into(), (ino, cookie));
    }

    fn takes(&self, name: &[u8]) -> Result<(), FsError> {
        match &self.only {
            _ if name.len() > MAX_NAME => Err(FsError::TooLong),
            Some(only) if !only.iter().any(|n| **n == *name) => Err(FsError::ReadOnly),
            _ => Ok(()),
        }
    }
}

impl Node {
    fn new(body: NodeBody, mode: u16, owner: Owner) -> Self {
        Self {
            body,
            mode: mode & 0o7777,
            owner,
            mtime: now(),
        }
    }
}

fn now() -> (i64, u32) {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    (since.as_secs() as i64, since.subsec_nanos())
}
