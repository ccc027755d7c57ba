//! The tree of one layer over the merged tree below, and the finished tree.

use std::collections::HashMap;

use super::{Arena, Children, FileContent, ImageError, LayerIndex, What};
use crate::{
    digest::{Digest, ObjectId},
    tree::{Entry, Inode, Kind, Object, Recipe, Tree},
};

impl<'l> Arena<'l> {
    /// Lays the directory `upper` over the directory `lower`, which becomes what is seen then.
    pub(super) fn overlay(&mut self, lower: u32, upper: u32) {
        let mut stack = vec![(lower, upper)];
        while let Some((lower, upper)) = stack.pop() {
            self.nodes[lower as usize].meta = self.nodes[upper as usize].meta.clone();
            let (above, opaque) = self.take_children(upper);
            let (mut merged, _) = self.take_children(lower);
            if opaque {
                merged.clear();
            }
            for (name, node) in above {
                let is_opaque = match self.what(node) {
                    What::Whiteout => {
                        merged.remove(name);
                        continue;
                    }
                    What::Dir { opaque, .. } => Some(*opaque),
                    _ => None,
                };
                let below = merged.get(name).copied();
                match (is_opaque, below.map(|below| (below, self.what(below)))) {
                    (Some(false), Some((below, What::Dir { .. }))) => stack.push((below, node)),
                    (Some(_), _) => {
                        // Nothing below: but there may be whiteouts in it, which must not stay.
                        stack.push((node, node));
                        merged.insert(name, node);
                    }
                    (None, _) => {
                        merged.insert(name, node);
                    }
                }
            }
            if let What::Dir { children, .. } = &mut self.nodes[lower as usize].what {
                *children = merged;
            }
        }
    }

    /// Empties a directory; tells if it was opaque.
    fn take_children(&mut self, dir: u32) -> (Children<'l>, bool) {
        match &mut self.nodes[dir as usize].what {
            What::Dir { children, opaque } => (std::mem::take(children), std::mem::take(opaque)),
            _ => (Children::new(), false),
        }
    }

    /// The tree below `root`, inodes numbered in the order of their paths, and its objects.
    pub(super) fn finish(
        mut self,
        root: u32,
        layers: &[&'l LayerIndex],
    ) -> Result<(Tree, Vec<Object>), ImageError> {
        const UNSEEN: u32 = u32::MAX;
        let mut numbers = vec![UNSEEN; self.nodes.len()];
        let mut order = Vec::new();
        let mut stack = vec![root];
        while let Some(node) = stack.pop() {
            if numbers[node as usize] != UNSEEN {
                continue;
            }
            numbers[node as usize] = order.len() as u32;
            order.push(node);
            if let What::Dir { children, .. } = self.what(node) {
                stack.extend(children.values().rev());
            }
        }
        let mut objects = Objects::default();
        let mut inodes = Vec::with_capacity(order.len());
        for node in order {
            let (children, _) = self.take_children(node);
            let node = &mut self.nodes[node as usize];
            let kind = match &node.what {
                What::Dir { .. } => Kind::Dir {
                    parent: 0,
                    entries: children
                        .into_iter()
                        .map(|(name, node)| Entry {
                            name: name.into(),
                            inode: numbers[node as usize],
                        })
                        .collect(),
                },
                &What::File {
                    layer,
                    index,
                    content,
                } => {
                    let layer = layers[layer as usize];
                    let object = objects.find(layer, index as usize, content);
                    let object = object.map_err(|why| {
                        let path = &layer.entries[index as usize].path;
                        ImageError::invalid(why).in_entry(path).in_layer(layer.blob)
                    })?;
                    Kind::File { object }
                }
                &What::Symlink { target } => Kind::Symlink {
                    target: target.into(),
                },
                &What::Char { major, minor } => Kind::Char { major, minor },
                &What::Block { major, minor } => Kind::Block { major, minor },
                What::Fifo | What::Whiteout => Kind::Fifo,
            };
            let meta = std::mem::replace(&mut node.meta, super::root_meta());
            inodes.push(Inode { kind, meta });
        }
        let tree = Tree::from_inodes(inodes, objects.found.len());
        let tree = tree.map_err(|e| ImageError::invalid(format!("the merged layers: {e}")))?;
        Ok((tree, objects.found))
    }
}

/// One object for each distinct content.
#[derive(Default)]
struct Objects {
    found: Vec<Object>,
    numbers: HashMap<Digest, u32>,
}

impl Objects {
    /// The object with this content, of entry `index` of the layer.
    fn find(
        &mut self,
        layer: &LayerIndex,
        index: usize,
        content: &FileContent,
    ) -> Result<u32, &'static str> {
        check(layer, content)?;
        if let Some(&number) = self.numbers.get(&content.digest) {
            return match self.found[number as usize].size == content.size {
                true => Ok(number),
                false => Err("its digest is that of a file of another size"),
            };
        }
        let number = self.found.len() as u32;
        self.numbers.insert(content.digest, number);
        self.found.push(Object {
            id: ObjectId::Sha256(content.digest),
            size: content.size,
            git_sha1: None,
            recipe: Recipe::Raw(layer.location(index, content)),
        });
        Ok(number)
    }
}

/// Whether the content can be where an index says.
fn check(layer: &LayerIndex, content: &FileContent) -> Result<(), &'static str> {
    if content.size > i64::MAX as u64 {
        return Err("its size is no size of a file");
    }
    let mut data = 0;
    let mut end = 0u64;
    for &(start, len) in &content.pieces {
        if start < end {
            return Err("the pieces of its sparse map overlap or are not in order");
        }
        end = start
            .checked_add(len)
            .filter(|end| *end <= content.size)
            .ok_or("its sparse map goes beyond its end")?;
        data += len;
    }
    if content.pieces.is_empty() {
        data = content.size;
    }
    let end = content.offset.checked_add(data);
    if end.is_none_or(|end| end > layer.size) {
        return Err("its content is beyond the end of the layer");
    }
    Ok(())
}
