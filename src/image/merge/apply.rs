//! One layer, entry after entry, to a tree of its own.

use super::{Arena, ImageError, LayerEntry, LayerIndex, MAX_STEPS, Meta, What, root_meta};
use crate::{
    image::{EntryKind, unpack::split},
    tree::{Kind, MAX_PATH, check_inode, check_name},
};

/// Most symlinks in one path (as in containerd).
const MAX_LINKS: u32 = 255;

/// A path after all its symlinks: each component and its node, the root not counted. From the first
/// that is missing on, all are.
type Resolved<'l> = Vec<(&'l [u8], Option<u32>)>;

/// The state of applying one layer.
struct Layer<'l> {
    /// The root of its tree.
    root: u32,
    /// The root of the merged tree below.
    lower: u32,
    number: u32,
    /// The first node that is of this layer.
    first: u32,
    /// The path and node of the last directory: the next entry most often is in the same.
    last: Option<(&'l [u8], Place)>,
}

/// A directory of the layer.
#[derive(Clone, Copy)]
struct Place {
    node: u32,
    /// Bytes of the paths in it before the last name, which symlinks may have made longer.
    prefix: usize,
}

impl<'l> Arena<'l> {
    /// The tree of layer `number` above the merged tree `lower`. Hard links may share nodes with that.
    pub(super) fn apply(
        &mut self,
        lower: u32,
        number: u32,
        index: &'l LayerIndex,
    ) -> Result<u32, ImageError> {
        let first = self.nodes.len() as u32;
        let meta = self.nodes[lower as usize].meta.clone();
        let root = self.add(What::dir(), meta)?;
        let mut layer = Layer {
            root,
            lower,
            number,
            first,
            last: None,
        };
        for (at, entry) in index.entries.iter().enumerate() {
            self.entry(&mut layer, at as u32, entry)
                .map_err(|e| e.in_entry(&entry.path))?;
        }
        Ok(root)
    }

    fn entry(
        &mut self,
        layer: &mut Layer<'l>,
        index: u32,
        entry: &'l LayerEntry,
    ) -> Result<(), ImageError> {
        if matches!(entry.kind, EntryKind::Opaque) {
            let dir = self.directory(layer, &entry.path)?;
            self.make_opaque(dir.node);
            return Ok(());
        }
        if entry.path.is_empty() {
            if matches!(entry.kind, EntryKind::Dir) {
                self.nodes[layer.root as usize].meta.mtime = entry.meta.mtime;
            }
            return Ok(());
        }
        let (parent, name) = split(&entry.path);
        check(name, entry).map_err(|why| ImageError::invalid(format!("it {why}")))?;
        let Place { node: dir, prefix } = self.directory(layer, parent)?;
        if prefix + name.len() > MAX_PATH {
            return Err(too_long());
        }
        let there = self.child(dir, name);
        let what = match &entry.kind {
            EntryKind::Dir => {
                if let Some(there) = there
                    && let What::Dir { .. } = self.what(there)
                {
                    self.nodes[there as usize].meta = entry.meta.clone();
                    return Ok(());
                }
                What::dir()
            }
            EntryKind::Hardlink { target } => {
                let node = self.link_target(layer, target)?;
                self.linked(layer, node, &entry.meta);
                self.put(layer, dir, name, node);
                return Ok(());
            }
            EntryKind::Whiteout => match there {
                None => What::Whiteout,
                // It hides nothing of its own layer.
                Some(there) => {
                    self.make_opaque(there);
                    return Ok(());
                }
            },
            // To overlayfs this device is a whiteout.
            EntryKind::Char { major: 0, minor: 0 } => What::Whiteout,
            EntryKind::File(content) => What::File {
                layer: layer.number,
                index,
                content,
            },
            EntryKind::Symlink { target } => What::Symlink { target },
            &EntryKind::Char { major, minor } => What::Char { major, minor },
            &EntryKind::Block { major, minor } => What::Block { major, minor },
            EntryKind::Fifo => What::Fifo,
            EntryKind::Opaque => return Ok(()),
        };
        let node = self.add(what, entry.meta.clone())?;
        self.put(layer, dir, name, node);
        Ok(())
    }

    /// Sets an entry of the layer; whatever was there is gone.
    fn put(&mut self, layer: &mut Layer<'l>, dir: u32, name: &'l [u8], node: u32) {
        if self.set(dir, name, node).is_some() {
            layer.last = None;
        }
    }

    /// The directory at `path`, made where it is missing.
    fn directory(&mut self, layer: &mut Layer<'l>, path: &'l [u8]) -> Result<Place, ImageError> {
        if let Some((last, place)) = layer.last
            && last == path
        {
            return Ok(place);
        }
        let resolved = self.resolve(layer.root, path.split(|&b| b == b'/'))?;
        let mut dir = layer.root;
        for (at, &(name, node)) in resolved.iter().enumerate() {
            let found = node.map(|node| (node, self.what(node)));
            dir = match found {
                Some((node, What::Dir { .. })) => node,
                Some((_, What::Whiteout)) => {
                    let made = self.add(What::dir(), root_meta())?;
                    self.make_opaque(made);
                    self.put(layer, dir, name, made);
                    made
                }
                Some(_) => {
                    let why = "its path passes through what is no directory";
                    return Err(ImageError::invalid(why));
                }
                None => {
                    check_name(name)
                        .map_err(|why| ImageError::invalid(format!("a name in its path {why}")))?;
                    let meta = self.implied(layer.lower, &resolved[..=at])?;
                    let made = self.add(What::dir(), meta)?;
                    self.put(layer, dir, name, made);
                    made
                }
            };
        }
        let prefix = resolved.iter().map(|(name, _)| name.len() + 1).sum();
        let place = Place { node: dir, prefix };
        layer.last = Some((path, place));
        Ok(place)
    }

    /// How a directory looks that the layer has no entry for.
    fn implied(
        &mut self,
        lower: u32,
        path: &[(&'l [u8], Option<u32>)],
    ) -> Result<Meta, ImageError> {
        let names = path.iter().map(|(name, _)| *name);
        let below = self.resolve(lower, names)?;
        let meta = match below.last() {
            None => Some(lower),
            Some((_, node)) => *node,
        }
        .map(|node| &self.nodes[node as usize])
        .filter(|node| matches!(node.what, What::Dir { .. }))
        .map(|node| node.meta.clone());
        Ok(meta.unwrap_or_else(root_meta))
    }

    /// What a hard link to `target` links to: in this layer, else in those below.
    fn link_target(&mut self, layer: &Layer<'l>, target: &'l [u8]) -> Result<u32, ImageError> {
        let (parent, name) = split(target);
        for root in [layer.root, layer.lower] {
            let resolved = self.resolve(root, parent.split(|&b| b == b'/'))?;
            let dir = match resolved.last() {
                None => Some(root),
                Some((_, node)) => *node,
            };
            let Some(node) = dir.and_then(|dir| self.child(dir, name)) else {
                continue;
            };
            match self.what(node) {
                What::Dir { .. } => {
                    return Err(ImageError::invalid("it is a hard link to a directory"));
                }
                What::Whiteout => break,
                _ => return Ok(node),
            }
        }
        let target = String::from_utf8_lossy(&target[..target.len().min(200)]);
        let why = format!("it is a hard link to {target:?}, which is not there");
        Err(ImageError::invalid(why))
    }

    /// A hard link sets the attributes of what it links to, as when it is unpacked.
    fn linked(&mut self, layer: &Layer<'l>, node: u32, meta: &Meta) {
        // A file of a lower layer is not changed by this one.
        if node < layer.first {
            return;
        }
        let node = &mut self.nodes[node as usize];
        if !matches!(node.what, What::Symlink { .. }) {
            node.meta.mode = meta.mode;
        }
        (node.meta.uid, node.meta.gid) = (meta.uid, meta.gid);
        node.meta.mtime = meta.mtime;
        // To change the owner takes the capabilities away.
        let replaced = |name: &[u8]| {
            name == b"security.capability" || meta.xattrs.iter().any(|(new, _)| **new == *name)
        };
        node.meta.xattrs.retain(|(name, _)| !replaced(name));
        node.meta.xattrs.extend(meta.xattrs.iter().cloned());
        node.meta.xattrs.sort();
    }

    /// Follows `path` from `root`, with all symlinks in it, none of which leads above `root`.
    fn resolve(
        &mut self,
        root: u32,
        path: impl DoubleEndedIterator<Item = &'l [u8]>,
    ) -> Result<Resolved<'l>, ImageError> {
        let mut found: Resolved<'l> = Vec::new();
        let mut rest: Vec<&'l [u8]> = path.rev().collect();
        let (mut links, mut length) = (0, 0);
        while let Some(name) = rest.pop() {
            self.steps += 1;
            if self.steps > MAX_STEPS {
                let why = "the paths of the image lead through too many directories and symlinks";
                return Err(ImageError::too_large(why));
            }
            match name {
                b"" | b"." => continue,
                b".." => {
                    length -= found.pop().map_or(0, |(name, _)| name.len() + 1);
                    continue;
                }
                _ => {}
            }
            let dir = match found.last() {
                None => Some(root),
                Some((_, node)) => *node,
            };
            let node = dir.and_then(|dir| self.child(dir, name));
            if let Some(What::Symlink { target }) = node.map(|node| self.what(node)) {
                links += 1;
                if links > MAX_LINKS {
                    return Err(ImageError::invalid("its path has too many symlinks"));
                }
                if target.starts_with(b"/") {
                    found.clear();
                    length = 0;
                }
                rest.extend(target.split(|&b| b == b'/').rev());
                continue;
            }
            length += name.len() + 1;
            if length > MAX_PATH {
                return Err(too_long());
            }
            found.push((name, node));
        }
        Ok(found)
    }
}

/// Whether an inode may be so; the answer goes on after "it".
fn check(name: &[u8], entry: &LayerEntry) -> Result<(), &'static str> {
    check_name(name)?;
    let kind = match &entry.kind {
        EntryKind::Symlink { target } => Kind::Symlink {
            target: target.clone(),
        },
        _ => Kind::Fifo,
    };
    check_inode(&kind, &entry.meta)
}

fn too_long() -> ImageError {
    ImageError::invalid("its path is longer than 4096 bytes")
}
