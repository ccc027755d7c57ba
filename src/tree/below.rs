//! A part of an artifact as an artifact of its own.

use std::collections::HashMap;

use super::{Artifact, Entry, Inode, Kind, Meta, Recipe, Tree, TreeBuilder};

impl Tree {
    /// A root directory without entries.
    pub fn empty() -> Self {
        TreeBuilder::new(Meta::dir(0)).build()
    }
}

impl Artifact {
    /// What is below the directory at `path` (components separated by `/`; symlinks are not
    /// followed), of its files and symlinks those whose path there `keep` wants, with the objects of the
    /// files; `None` where there is no such directory.
    pub fn below(&self, path: &str, keep: &dyn Fn(&str) -> bool) -> Option<Self> {
        let root = self.tree.find(path)?;
        self.tree.entries(root)?;
        let mut numbers = HashMap::from([(root, 0u32)]);
        // Old numbers in the new order, and where directories are.
        let mut order = vec![(root, String::new())];
        let mut objects = Objects {
            all: self,
            numbers: HashMap::new(),
            kept: Vec::new(),
        };
        let mut inodes: Vec<Inode> = Vec::new();
        while let Some((old, at)) = order.get(inodes.len()).cloned() {
            let mut inode = self.tree.get(old)?.clone();
            match &mut inode.kind {
                Kind::Dir { entries, .. } => {
                    let mut kept = Vec::with_capacity(entries.len());
                    for Entry { name, inode } in entries.drain(..) {
                        let path = match at.as_str() {
                            "" => String::from_utf8_lossy(&name).into_owned(),
                            at => format!("{at}/{}", String::from_utf8_lossy(&name)),
                        };
                        let is_dir = self.tree.entries(inode).is_some();
                        if !is_dir && !keep(&path) {
                            continue;
                        }
                        let next = order.len() as u32;
                        let number = *numbers.entry(inode).or_insert_with(|| {
                            order.push((inode, if is_dir { path } else { String::new() }));
                            next
                        });
                        kept.push(Entry {
                            name,
                            inode: number,
                        });
                    }
                    *entries = kept;
                }
                Kind::File { object } => *object = objects.keep(*object)?,
                _ => {}
            }
            inodes.push(inode);
        }
        let objects = objects.kept;
        Some(Self {
            reference: self.reference.clone(),
            revision: self.revision.clone(),
            tree: Tree::from_inodes(inodes, objects.len()).ok()?,
            objects,
        })
    }
}

/// Objects that the part needs, under their new numbers.
struct Objects<'a> {
    all: &'a Artifact,
    numbers: HashMap<u32, u32>,
    kept: Vec<super::Object>,
}

impl Objects<'_> {
    fn keep(&mut self, old: u32) -> Option<u32> {
        if let Some(&number) = self.numbers.get(&old) {
            return Some(number);
        }
        let mut object = self.all.objects.get(old as usize)?.clone();
        if let Recipe::Slice { object: within, .. } = &mut object.recipe {
            // What it is cut from is no slice: this goes no deeper.
            self.all.place(old)?;
            *within = self.keep(*within)?;
        }
        let number = self.kept.len() as u32;
        self.kept.push(object);
        self.numbers.insert(old, number);
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        digest::{Digest, ObjectId},
        tree::{Location, Object},
    };

    #[test]
    fn a_part_has_only_its_own() {
        let object = |n: u8| Object {
            id: ObjectId::Sha256(Digest::of(&[n])),
            size: 1,
            git_sha1: None,
            recipe: Recipe::Raw(Location {
                path: n.to_string(),
                generation: None,
                offset: 0,
            }),
        };
        let mut builder = TreeBuilder::new(Meta::dir(1));
        for (path, object) in [
            ("etc/x", 0),
            ("models/a", 1),
            ("models/sub/b", 2),
            ("models/sub/c", 1),
        ] {
            builder
                .add_file(path.as_bytes(), object, Meta::file(3))
                .unwrap();
        }
        let whole = Artifact {
            reference: "r".into(),
            revision: "v".into(),
            tree: builder.build(),
            objects: (0..3).map(object).collect(),
        };
        let part = whole.below("models", &|_| true).unwrap();
        let files: Vec<_> = part
            .tree
            .files()
            .into_iter()
            .map(|(path, _, o)| (path, part.objects[o as usize].id))
            .collect();
        let id = |n| object(n).id;
        assert_eq!(
            files,
            [
                ("a".to_owned(), id(1)),
                ("sub/b".to_owned(), id(2)),
                ("sub/c".to_owned(), id(1))
            ]
        );
        assert_eq!(part.objects.len(), 2);
        let less = whole.below("models", &|path| path != "sub/b").unwrap();
        assert_eq!(less.tree.files().len(), 2);
        assert_eq!(less.objects.len(), 1);
        assert_eq!(Artifact::decode(&part.encode()).unwrap(), part);
        assert_eq!(whole.below("", &|_| true).unwrap().tree.files().len(), 4);
        assert!(whole.below("etc/x", &|_| true).is_none());
        assert!(whole.below("none", &|_| true).is_none());
    }
}
