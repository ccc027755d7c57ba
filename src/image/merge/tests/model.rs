//! A naive model: each layer unpacked into a map from paths, looked at through all layers as the
//! kernel's overlayfs does it: from the top down, at each path anew.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::{Seen, root_meta};
use crate::{
    digest::Digest,
    image::{EntryKind, FileContent, LayerEntry, LayerIndex},
    tree::Meta,
};

type Path = Vec<u8>;

#[derive(Debug, Clone)]
struct Node {
    kind: EntryKind,
    meta: Meta,
    opaque: bool,
}

/// Nodes of all layers; a layer maps its paths to them. The root has the empty path.
#[derive(Default)]
struct Model {
    nodes: Vec<Node>,
}

type Layer = BTreeMap<Path, usize>;

fn join(dir: &[u8], name: &[u8]) -> Path {
    match dir.is_empty() {
        true => name.to_vec(),
        false => [dir, b"/", name].concat(),
    }
}

fn parent(path: &[u8]) -> (&[u8], &[u8]) {
    let at = path.iter().rposition(|&b| b == b'/');
    at.map_or((&b""[..], path), |at| (&path[..at], &path[at + 1..]))
}

fn remove(layer: &mut Layer, path: &[u8]) {
    let below = join(path, b"");
    layer.retain(|p, _| p != path && !p.starts_with(&below));
}

impl Model {
    fn add(&mut self, kind: EntryKind, meta: Meta) -> usize {
        self.nodes.push(Node {
            kind,
            meta,
            opaque: false,
        });
        self.nodes.len() - 1
    }

    /// `path` with every symlink in it resolved.
    fn real(&self, layer: &Layer, path: &[u8]) -> Result<Path, String> {
        let mut done = Path::new();
        let mut rest: Vec<Path> = path
            .split(|&b| b == b'/')
            .rev()
            .map(<[u8]>::to_vec)
            .collect();
        let mut links = 0;
        while let Some(name) = rest.pop() {
            match &name[..] {
                b"" | b"." => continue,
                b".." => {
                    done = parent(&done).0.to_vec();
                    continue;
                }
                _ => {}
            }
            let path = join(&done, &name);
            match layer.get(&path).map(|&node| &self.nodes[node].kind) {
                Some(EntryKind::Symlink { target }) => {
                    links += 1;
                    if links > 255 {
                        return Err("loop".into());
                    }
                    if target.starts_with(b"/") {
                        done.clear();
                    }
                    rest.extend(target.split(|&b| b == b'/').rev().map(<[u8]>::to_vec));
                }
                _ => done = path,
            }
        }
        Ok(done)
    }

    /// Makes `path`, which is real, a directory.
    fn make(&mut self, layer: &mut Layer, lower: &Layer, path: &[u8]) -> Result<(), String> {
        let kind = layer.get(path).map(|&node| self.nodes[node].kind.clone());
        match kind {
            Some(EntryKind::Dir) => return Ok(()),
            None | Some(EntryKind::Whiteout) => {}
            Some(_) => return Err("no directory".into()),
        }
        self.make(layer, lower, parent(path).0)?;
        let meta = match kind {
            Some(_) => root_meta(),
            None => {
                let below = lower.get(&self.real(lower, path)?);
                below
                    .map(|&node| &self.nodes[node])
                    .filter(|node| node.kind == EntryKind::Dir)
                    .map_or_else(root_meta, |node| node.meta.clone())
            }
        };
        let node = self.add(EntryKind::Dir, meta);
        self.nodes[node].opaque = kind.is_some();
        layer.insert(path.to_vec(), node);
        Ok(())
    }

    fn unpack(&mut self, lower: &Layer, entries: &[LayerEntry]) -> Result<Layer, String> {
        let first = self.nodes.len();
        let meta = self.nodes[lower[&b""[..]]].meta.clone();
        let root = self.add(EntryKind::Dir, meta);
        let mut layer = Layer::from([(Path::new(), root)]);
        for entry in entries {
            if entry.kind == EntryKind::Opaque {
                let path = self.real(&layer, &entry.path)?;
                self.make(&mut layer, lower, &path)?;
                self.nodes[layer[&path]].opaque = true;
                continue;
            }
            if entry.path.is_empty() {
                self.nodes[root].meta.mtime = entry.meta.mtime;
                continue;
            }
            let (dir, name) = parent(&entry.path);
            let dir = self.real(&layer, dir)?;
            self.make(&mut layer, lower, &dir)?;
            let path = join(&dir, name);
            let there = layer.get(&path).copied();
            let node = match &entry.kind {
                EntryKind::Whiteout if there.is_some() => {
                    self.nodes[there.unwrap()].opaque = true;
                    continue;
                }
                EntryKind::Dir if there.is_some_and(|n| self.nodes[n].kind == EntryKind::Dir) => {
                    self.nodes[there.unwrap()].meta = entry.meta.clone();
                    continue;
                }
                EntryKind::Hardlink { target } => {
                    let (dir, name) = parent(target);
                    let own = join(&self.real(&layer, dir)?, name);
                    let node = match layer.get(&own) {
                        Some(&node) => node,
                        None => {
                            let below = join(&self.real(lower, dir)?, name);
                            *lower.get(&below).ok_or("no target")?
                        }
                    };
                    if matches!(self.nodes[node].kind, EntryKind::Dir | EntryKind::Whiteout) {
                        return Err("bad target".into());
                    }
                    if node >= first {
                        let is_link = matches!(self.nodes[node].kind, EntryKind::Symlink { .. });
                        let meta = &mut self.nodes[node].meta;
                        let mode = if is_link { meta.mode } else { entry.meta.mode };
                        *meta = Meta {
                            mode,
                            ..entry.meta.clone()
                        };
                    }
                    node
                }
                EntryKind::Char { major: 0, minor: 0 } => {
                    self.add(EntryKind::Whiteout, entry.meta.clone())
                }
                kind => self.add(kind.clone(), entry.meta.clone()),
            };
            remove(&mut layer, &path);
            layer.insert(path, node);
        }
        Ok(layer)
    }

    /// What is seen of `layers`, the uppermost first.
    fn look(&self, layers: &[&Layer]) -> Layer {
        let mut seen = Layer::new();
        let mut todo = vec![(Path::new(), layers.to_vec())];
        while let Some((dir, layers)) = todo.pop() {
            seen.insert(dir.clone(), layers[0][&dir]);
            let names: BTreeSet<_> = layers.iter().flat_map(|layer| layer.keys()).collect();
            for path in names {
                if path.is_empty() || parent(path).0 != dir {
                    continue;
                }
                let mut dirs: Vec<&Layer> = Vec::new();
                for &layer in &layers {
                    let Some(&node) = layer.get(path) else {
                        continue;
                    };
                    match (&self.nodes[node].kind, dirs.is_empty()) {
                        (EntryKind::Dir, _) => dirs.push(layer),
                        (EntryKind::Whiteout, _) | (_, false) => {}
                        (_, true) => {
                            seen.insert(path.clone(), node);
                        }
                    }
                    if self.nodes[node].kind != EntryKind::Dir || self.nodes[node].opaque {
                        break;
                    }
                }
                if !dirs.is_empty() {
                    todo.push((path.clone(), dirs));
                }
            }
        }
        seen
    }
}

/// What a container would see.
pub(super) fn merge(layers: &[LayerIndex]) -> Result<BTreeMap<Path, Seen>, String> {
    let mut model = Model::default();
    let root = model.add(EntryKind::Dir, root_meta());
    let mut unpacked = vec![Layer::from([(Path::new(), root)])];
    let mut merged = unpacked[0].clone();
    for layer in layers {
        let layer = model.unpack(&merged, &layer.entries)?;
        // An opaque root hides all.
        if model.nodes[layer[&b""[..]]].opaque {
            unpacked.clear();
        }
        unpacked.push(layer);
        merged = model.look(&unpacked.iter().rev().collect::<Vec<_>>());
    }
    let mut links: BTreeMap<usize, Vec<Path>> = BTreeMap::new();
    for (path, node) in &merged {
        links.entry(*node).or_default().push(path.clone());
    }
    let see = |number: usize| {
        let node = &model.nodes[number];
        let what = match &node.kind {
            EntryKind::Dir => "dir".to_owned(),
            EntryKind::File(content) => format!("file:{}", content.size),
            EntryKind::Symlink { target } => format!("-> {}", String::from_utf8_lossy(target)),
            EntryKind::Char { major, minor } => format!("char:{major}:{minor}"),
            other => format!("{other:?}").to_lowercase(),
        };
        Seen {
            what,
            meta: node.meta.clone(),
            links: links[&number].clone(),
        }
    };
    let path = |(path, node): (&Path, &usize)| (path.clone(), see(*node));
    Ok(merged.iter().map(path).collect())
}

/// Layers of few names, so that much happens to each.
pub(super) fn layers() -> impl Strategy<Value = Vec<Vec<LayerEntry>>> {
    let path = || {
        proptest::collection::vec(
            prop_oneof![3 => Just("a"), 2 => Just("b"), 1 => Just("c")],
            1..4,
        )
    };
    let target = proptest::collection::vec(
        prop_oneof![3 => Just("a"), 2 => Just("b"), 2 => Just(".."), 1 => Just("."), 1 => Just("")],
        1..4,
    );
    let bytes = |parts: Vec<&str>| -> Box<[u8]> { parts.join("/").as_bytes().into() };
    let kind = prop_oneof![
        6 => Just(EntryKind::Dir),
        6 => (0u64..3).prop_map(|size| EntryKind::File(FileContent {
            size, digest: Digest::of(&[size as u8]), offset: 512, pieces: Vec::new(),
        })),
        3 => target.prop_filter_map("a symlink to nothing", move |t| match &*bytes(t) {
            b"" => None,
            target => Some(EntryKind::Symlink { target: target.into() }),
        }),
        2 => path().prop_map(move |t| EntryKind::Hardlink { target: bytes(t) }),
        3 => Just(EntryKind::Whiteout),
        2 => Just(EntryKind::Opaque),
        1 => (0u32..2).prop_map(|minor| EntryKind::Char { major: 0, minor }),
    ];
    let entry = (path(), kind, 0u16..0o1000, 0i64..5).prop_map(move |(path, kind, mode, mtime)| {
        let mode = match kind {
            EntryKind::Symlink { .. } => 0o777,
            _ => mode,
        };
        let path = match kind {
            EntryKind::Opaque | EntryKind::Dir if mtime == 0 => Box::default(),
            _ => bytes(path),
        };
        LayerEntry {
            path,
            kind,
            meta: Meta {
                mode,
                ..Meta::file(mtime)
            },
        }
    });
    proptest::collection::vec(proptest::collection::vec(entry, 0..8), 0..4)
}
