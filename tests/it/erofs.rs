//! The writer of EROFS images against a reader that knows nothing but the format
//! (fs/erofs/erofs_fs.h); the kernel's own view is in `tests/real/native.rs`.

use std::collections::BTreeMap;

use hearth::{
    digest::{Digest, ObjectId},
    image::erofs::{self, ErofsError},
    tree::{Inode, Kind, Location, Meta, Object, Recipe, Tree, TreeBuilder},
};
use proptest::prelude::*;

const BLOCK: usize = 4096;

fn object(id: ObjectId, size: u64) -> Object {
    Object {
        id,
        size,
        git_sha1: None,
        recipe: Recipe::Raw(Location {
            path: "layer".into(),
            generation: None,
            offset: 0,
        }),
    }
}

fn digest(number: u32) -> Digest {
    Digest::of(&number.to_le_bytes())
}

fn write(tree: &Tree, objects: &[Object]) -> Vec<u8> {
    let mut image = Vec::new();
    let len = erofs::write(tree, objects, &mut image).unwrap();
    assert_eq!(image.len() as u64, len);
    assert_eq!(image.len() % BLOCK, 0);
    image
}

/// An inode as the image has it.
#[derive(Debug, PartialEq)]
struct Found {
    slot: u64,
    mode: u16,
    size: u64,
    owner: (u32, u32),
    mtime: (i64, u32),
    links: u32,
    device: u32,
    xattrs: Vec<(u8, Vec<u8>, Vec<u8>)>,
    /// Of a symlink its target, of a directory its entries.
    data: Vec<u8>,
}

struct Reader<'i>(&'i [u8]);

impl Reader<'_> {
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.0[at..at + 2].try_into().unwrap())
    }
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().unwrap())
    }
    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    fn inode(&self, slot: u64) -> Found {
        let at = slot as usize * 32;
        let format = self.u16(at);
        assert_eq!(format & 1, 1, "64 bytes");
        let mode = self.u16(at + 4);
        let size = self.u64(at + 8);
        let union = self.u32(at + 16);
        let body = match self.u16(at + 2) {
            0 => 0,
            count => 12 + 4 * (usize::from(count) - 1),
        };
        let (mut xattr, end) = (at + 64 + 12, at + 64 + body);
        let mut xattrs = Vec::new();
        while body > 0 && xattr < end {
            let (len, namespace) = (usize::from(self.0[xattr]), self.0[xattr + 1]);
            let value = xattr + 4 + len;
            let value_end = value + usize::from(self.u16(xattr + 2));
            let name = self.0[xattr + 4..value].to_vec();
            xattrs.push((namespace, name, self.0[value..value_end].to_vec()));
            xattr = value_end.next_multiple_of(4);
        }
        assert!(body == 0 || xattr == end, "the attributes fill their space");
        let data = match (format >> 1, mode & 0o170_000) {
            (4, 0o100_000) => {
                assert_eq!(self.u32(end), u32::MAX, "one chunk, a hole");
                assert!(size <= (BLOCK as u64) << (union & 0x1f), "one is enough");
                Vec::new()
            }
            (0, 0o040_000 | 0o120_000) => {
                let from = union as usize * BLOCK;
                self.0[from..from + size as usize].to_vec()
            }
            (2, kind @ (0o040_000 | 0o120_000)) => {
                let size = size as usize;
                let inline = match size % BLOCK {
                    0 => BLOCK,
                    rest => rest,
                };
                let from = union as usize * BLOCK;
                let blocks = &self.0[from..from + size - inline];
                let first = if kind == 0o120_000 { at } else { end };
                assert_eq!(first / BLOCK, (end + inline - 1) / BLOCK, "in one block");
                [blocks, &self.0[end..end + inline]].concat()
            }
            (0, _) => Vec::new(),
            other => panic!("layout {other:?}"),
        };
        Found {
            slot,
            mode,
            size,
            owner: (self.u32(at + 24), self.u32(at + 28)),
            mtime: (self.u64(at + 32) as i64, self.u32(at + 40)),
            links: self.u32(at + 44),
            device: union,
            xattrs,
            data,
        }
    }

    /// The entries of a directory: name, slot, type.
    fn entries(data: &[u8]) -> Vec<(Vec<u8>, u64, u8)> {
        let mut found = Vec::new();
        for block in data.chunks(BLOCK) {
            let reader = Reader(block);
            let count = usize::from(reader.u16(8)) / 12;
            for n in 0..count {
                let from = usize::from(reader.u16(n * 12 + 8));
                let to = match n + 1 < count {
                    true => usize::from(reader.u16((n + 1) * 12 + 8)),
                    false => {
                        let rest = &block[from..];
                        from + rest.iter().position(|b| *b == 0).unwrap_or(rest.len())
                    }
                };
                let name = block[from..to].to_vec();
                found.push((name, reader.u64(n * 12), block[n * 12 + 10]));
            }
        }
        assert!(found.is_sorted_by(|a, b| a.0 < b.0), "sorted, each once");
        found
    }

    /// Compares a directory and all below with the tree.
    fn compare(
        &self,
        tree: &Tree,
        objects: &[Object],
        (dir, slot, parent): (u32, u64, u64),
        slots: &mut BTreeMap<u32, u64>,
    ) {
        let found = self.inode(slot);
        let mut entries = Self::entries(&found.data);
        let mut take = |name: &[u8]| {
            let at = entries.iter().position(|(found, ..)| found == name);
            let (_, slot, kind) = entries.remove(at.unwrap());
            (slot, kind)
        };
        assert_eq!(take(b"."), (slot, 2));
        assert_eq!(take(b".."), (parent, 2));
        let mut dirs = 0;
        for entry in tree.entries(dir).unwrap() {
            let inode = tree.get(entry.inode).unwrap();
            let (below, kind) = take(&entry.name);
            let is_dir = matches!(inode.kind, Kind::Dir { .. });
            assert_eq!(is_dir, kind == 2);
            assert_eq!(*slots.entry(entry.inode).or_insert(below), below);
            match is_dir {
                true => self.compare(tree, objects, (entry.inode, below, slot), slots),
                false => self.check(inode, objects, &self.inode(below)),
            }
            dirs += u32::from(is_dir);
        }
        assert!(entries.is_empty());
        assert_eq!(found.links, 2 + dirs);
        self.check(tree.get(dir).unwrap(), objects, &found);
    }

    fn check(&self, inode: &Inode, objects: &[Object], found: &Found) {
        let meta = &inode.meta;
        let mut xattrs = Vec::new();
        let (kind, permissions) = match &inode.kind {
            Kind::Dir { .. } => (0o040_000, meta.mode),
            Kind::File { object } => {
                let object = &objects[*object as usize];
                assert_eq!(found.size, object.size);
                if let (1.., ObjectId::Sha256(digest)) = (object.size, object.id) {
                    let hex = digest.hex();
                    let path = format!("/sha256/{}/{hex}", &hex[..2]);
                    xattrs.push((4, b"overlay.metacopy".to_vec(), Vec::new()));
                    xattrs.push((4, b"overlay.redirect".to_vec(), path.into_bytes()));
                }
                (0o100_000, meta.mode)
            }
            Kind::Symlink { target } => {
                assert_eq!(found.data, **target);
                (0o120_000, 0o777)
            }
            Kind::Char { major, minor } => {
                let encoded = (minor & 0xff) | (major << 8) | ((minor >> 8) << 20);
                assert_eq!(found.device, encoded);
                (0o020_000, meta.mode)
            }
            _ => (0o010_000, meta.mode),
        };
        for (name, value) in &meta.xattrs {
            let name = name.strip_prefix(b"user.").unwrap().to_vec();
            xattrs.push((1, name, value.to_vec()));
        }
        assert_eq!(found.mode, kind | permissions);
        assert_eq!(found.owner, (meta.uid, meta.gid));
        assert_eq!(found.mtime, meta.mtime);
        assert_eq!(found.xattrs, xattrs);
    }
}

/// Reads an image back and compares it with what it was written from.
fn assert_holds(image: &[u8], tree: &Tree, objects: &[Object]) {
    let reader = Reader(image);
    assert_eq!(reader.u32(1024), 0xE0F5_E1E2);
    assert_eq!(reader.u64(1024 + 16), tree.inodes().len() as u64);
    assert_eq!(reader.u32(1024 + 36) as usize, image.len() / BLOCK);
    let root = u64::from(reader.u16(1024 + 14));
    let mut slots = BTreeMap::from([(0, root)]);
    reader.compare(tree, objects, (0, root, root), &mut slots);
    let mut distinct: Vec<u64> = slots.values().copied().collect();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), tree.inodes().len());
}

fn any_meta() -> impl Strategy<Value = Meta> {
    let bytes = prop::collection::vec(any::<u8>(), 0..60);
    let value = prop_oneof![9 => bytes, 1 => prop::collection::vec(any::<u8>(), 3000..9000)];
    let xattrs = prop::collection::btree_map("[a-z]{1,200}", value, 0..3);
    let time = (any::<i64>(), 0u32..1_000_000_000);
    (0u16..0o10000, any::<(u32, u32)>(), time, xattrs).prop_map(|(mode, owner, mtime, xattrs)| {
        Meta {
            mode,
            uid: owner.0,
            gid: owner.1,
            mtime,
            xattrs: xattrs
                .into_iter()
                .map(|(key, value)| (format!("user.{key}").into_bytes().into(), value.into()))
                .collect(),
        }
    })
}

/// A tree and its objects.
fn any_tree() -> impl Strategy<Value = (Tree, Vec<Object>)> {
    let name = prop_oneof![4 => "[a-d!.~]{1,3}", 1 => "[a-z]{100,255}"];
    let path = prop::collection::vec(name, 1..5);
    let size = prop_oneof![1 => Just(0), 4 => 1u64..100_000, 1 => 1u64..1 << 43];
    let entry = (path, 0u8..8, any::<u32>(), size, any_meta());
    let wide = prop_oneof![5 => Just(0u32), 1 => 0u32..600];
    (prop::collection::vec(entry, 0..80), wide, any_meta()).prop_map(|(entries, wide, root)| {
        let mut builder = TreeBuilder::new(root);
        let (mut objects, mut files) = (Vec::new(), Vec::new());
        let names = |n: u32| format!("wide/{}{n}", "w".repeat(n as usize % 200));
        for n in 0..wide {
            let (path, kind) = (names(n), Kind::Fifo);
            builder.add(path.as_bytes(), kind, Meta::file(1)).unwrap();
        }
        for (path, kind, number, size, meta) in entries {
            let path = path.join("/");
            let kind = match kind {
                0 | 1 => {
                    let (parent, entries) = (0, Vec::new());
                    Kind::Dir { parent, entries }
                }
                2 => Kind::Symlink {
                    target: vec![b't'; 1 + number as usize % 4095].into(),
                },
                3 => Kind::Char {
                    major: 1 + number % 4095,
                    minor: number >> 12,
                },
                4 => {
                    if let Some(&file) = files.get(number as usize % files.len().max(1)) {
                        // A path that is taken is as good as none.
                        let _ = builder.link(path.as_bytes(), file);
                    }
                    continue;
                }
                _ => Kind::File {
                    object: objects.len() as u32,
                },
            };
            let (is_file, is_dir) = (
                matches!(kind, Kind::File { .. }),
                matches!(kind, Kind::Dir { .. }),
            );
            if let Ok(inode) = builder.add(path.as_bytes(), kind, meta) {
                if is_file {
                    objects.push(object(ObjectId::Sha256(digest(number)), size));
                }
                if !is_dir {
                    files.push(inode);
                }
            }
        }
        (builder.build(), objects)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn every_tree_is_read_back_as_it_was((tree, objects) in any_tree()) {
        let image = write(&tree, &objects);
        assert_holds(&image, &tree, &objects);
        prop_assert_eq!(image, write(&tree, &objects));
    }
}

#[test]
fn an_empty_tree_is_one_block() {
    let tree = TreeBuilder::new(Meta::dir(0)).build();
    let image = write(&tree, &[]);
    assert_eq!(image.len(), BLOCK);
    assert_holds(&image, &tree, &[]);
}

#[test]
fn a_wide_and_a_deep_tree_take_little_more_than_their_names() {
    let mut builder = TreeBuilder::new(Meta::dir(0));
    for n in 0..30_000 {
        let path = format!("wide/{n:06}");
        builder.add_file(path.as_bytes(), 0, Meta::file(0)).unwrap();
    }
    let deep = vec!["d"; 2000].join("/");
    builder
        .add(deep.as_bytes(), Kind::Fifo, Meta::file(0))
        .unwrap();
    let tree = builder.build();
    let objects = [object(ObjectId::Sha256(digest(1)), 5)];
    let image = write(&tree, &objects);
    assert!(image.len() < 32_000 * 250, "{}", image.len());
}

/// What is said of a tree with one odd file at `a/b`.
fn refused(kind: Kind, xattrs: &[(&str, usize)], objects: &[Object]) -> String {
    let mut builder = TreeBuilder::new(Meta::dir(0));
    let list = xattrs.iter();
    let xattrs = list.map(|(name, len)| (name.as_bytes().into(), vec![7; *len].into()));
    let meta = Meta {
        xattrs: xattrs.collect(),
        ..Meta::file(0)
    };
    builder.add(b"a/b", kind, meta).unwrap();
    let mut image = Vec::new();
    let error = erofs::write(&builder.build(), objects, &mut image).unwrap_err();
    assert!(matches!(error, ErofsError::File { .. }), "{error}");
    assert!(image.is_empty(), "nothing is written of what cannot be");
    let said = error.to_string();
    assert!(said.contains("\"/a/b\""), "{said}");
    said
}

#[test]
fn what_the_format_cannot_say_is_refused_by_name() {
    let file = || Kind::File { object: 0 };
    assert!(refused(file(), &[], &[]).contains("not among the objects"));
    let located = object(ObjectId::Located(digest(1)), 5);
    assert!(refused(file(), &[], &[located]).contains("digest"));
    let huge = object(ObjectId::Sha256(digest(1)), (1 << 43) + 1);
    assert!(refused(file(), &[], &[huge]).contains("8 TiB"));
    let most = object(ObjectId::Sha256(digest(1)), u64::MAX);
    assert!(refused(file(), &[], &[most]).contains("8 TiB"));
    let (major, minor) = (4096, 0);
    assert!(refused(Kind::Block { major, minor }, &[], &[]).contains("device"));
    let (major, minor) = (1, 1 << 20);
    assert!(refused(Kind::Char { major, minor }, &[], &[]).contains("device"));
    assert!(refused(Kind::Fifo, &[("user.a", 65_536)], &[]).contains("too long"));
    let many = [("user.a", 65_535); 5];
    assert!(refused(Kind::Fifo, &many, &[]).contains("too much space"));
    assert!(refused(Kind::Fifo, &many[..4], &[]).contains("too much space"));
}

#[test]
fn a_writer_that_fails_is_named() {
    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let tree = TreeBuilder::new(Meta::dir(0)).build();
    let error = erofs::write(&tree, &[], Full).unwrap_err();
    assert!(matches!(error, ErofsError::Io(_)), "{error}");
}
