//! Layers to the one tree that overlayfs shows of them.
//!
//! As containerd does it, each layer is first unpacked by itself, entry after entry, to a tree of its
//! own (`apply`): symlinks in its paths are those of the same layer, and they cannot lead out of the
//! root. That tree is then laid over what the lower layers gave (`overlay`): directories merge,
//! everything else replaces. A directory that a layer only implies looks as it does in the layers
//! below. The root has mode 0755 and belongs to root, whatever layers say.
//!
//! Where containerd refuses a layer that the image-spec allows, or contradicts it, the spec is
//! followed: a hard link may point to a file of a lower layer; a whiteout after what it names, or
//! above a path that the layer implies, hides only what is below, and so nothing in the lowest
//! layer; an opaque root hides all.
//!
//! Entries may come from an index that a stranger wrote: nothing in them is trusted.

mod apply;
mod overlay;

use std::collections::BTreeMap;

pub(super) use overlay::check as check_content;

use super::{FileContent, ImageError, LayerEntry, LayerIndex};
use crate::tree::{MAX_INODES, Meta, Object, Tree};

/// Most path components that are walked for all entries together, symlinks included: a bound for
/// images whose only purpose is to cost time.
const MAX_STEPS: u64 = 1 << 28;

/// Merges `layers`, lowest first, to the tree that a container would see, and the contents of its
/// files: one object for each distinct digest, in the order of the paths that first have it.
///
/// # Errors
/// Invalid or TooLarge, with layer and entry.
pub fn merge(layers: &[&LayerIndex]) -> Result<(Tree, Vec<Object>), ImageError> {
    let mut arena = Arena::new();
    let root = arena.add(What::dir(), root_meta())?;
    for (number, layer) in layers.iter().enumerate() {
        let upper = arena
            .apply(root, number as u32, layer)
            .map_err(|e| e.in_layer(layer.blob))?;
        arena.overlay(root, upper);
    }
    arena.finish(root, layers)
}

/// All nodes: of the merged tree, of the layer that is being applied, and dead ones.
struct Arena<'l> {
    nodes: Vec<Node<'l>>,
    steps: u64,
}

struct Node<'l> {
    what: What<'l>,
    meta: Meta,
}

type Children<'l> = BTreeMap<&'l [u8], u32>;

enum What<'l> {
    Dir {
        children: Children<'l>,
        /// Hides what lower layers have there.
        opaque: bool,
    },
    File {
        layer: u32,
        index: u32,
        content: &'l FileContent,
    },
    Symlink {
        target: &'l [u8],
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
    /// Hides what lower layers have there; never in the merged tree.
    Whiteout,
}

impl What<'_> {
    const fn dir() -> Self {
        Self::Dir {
            children: BTreeMap::new(),
            opaque: false,
        }
    }
}

fn root_meta() -> Meta {
    Meta {
        mode: 0o755,
        ..Meta::dir(0)
    }
}

impl<'l> Arena<'l> {
    const fn new() -> Self {
        Self {
            nodes: Vec::new(),
            steps: 0,
        }
    }

    fn add(&mut self, what: What<'l>, meta: Meta) -> Result<u32, ImageError> {
        if self.nodes.len() >= MAX_INODES {
            let why = format!("the image has more than {MAX_INODES} entries");
            return Err(ImageError::too_large(why));
        }
        self.nodes.push(Node { what, meta });
        Ok(self.nodes.len() as u32 - 1)
    }

    fn what(&self, node: u32) -> &What<'l> {
        &self.nodes[node as usize].what
    }

    fn child(&self, dir: u32, name: &[u8]) -> Option<u32> {
        match self.what(dir) {
            What::Dir { children, .. } => children.get(name).copied(),
            _ => None,
        }
    }

    /// Sets an entry of a directory; gives what it was.
    fn set(&mut self, dir: u32, name: &'l [u8], node: u32) -> Option<u32> {
        match &mut self.nodes[dir as usize].what {
            What::Dir { children, .. } => children.insert(name, node),
            _ => None,
        }
    }

    fn make_opaque(&mut self, dir: u32) {
        if let What::Dir { opaque, .. } = &mut self.nodes[dir as usize].what {
            *opaque = true;
        }
    }
}

#[cfg(test)]
mod tests;
