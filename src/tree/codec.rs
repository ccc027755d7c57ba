//! The binary encoding of an [`Artifact`].
//!
//! ```text
//! "hrthtree" version
//! reference revision
//! count { kind(0 sha256, 1 located) id[32] size git(0 | 1 sha1[20]) recipe }*
//!     recipe: 0 path generation(0 | 1 text) offset
//! count { kind mode uid gid seconds nanos  count { name value }*  body }*
//!     body: 0 dir      count { name inode }*      1 file     object
//!           2 symlink  target                     3 char, 4 block  major minor
//!           5 fifo     6 socket
//! ```
//!
//! Numbers are LEB128 varints of minimal length (`seconds` in zigzag), texts and names are a length
//! and bytes. One artifact has one encoding, so its digest names it. The parent of a directory is
//! not written: the entry that names it says it. Decoding allocates in proportion to its input, does not
//! recurse, and checks every invariant of [`super`].

use std::collections::VecDeque;

use super::{
    Artifact, Entry, Inode, Kind, Location, MAX_INODES, MAX_PATH, Meta, Object, Recipe, Tree,
    TreeError, check_inode, check_name,
};
use crate::digest::{Digest, ObjectId};

const MAGIC: &[u8; 8] = b"hrthtree";
const VERSION: u32 = 1;

/// Fewest bytes of an encoded object: kind, id, size, git, recipe, path, generation, offset.
const MIN_OBJECT: usize = 1 + 32 + 1 + 1 + 1 + 1 + 1 + 1;
/// Fewest bytes of an encoded inode: kind, mode, uid, gid, seconds, nanos, xattrs.
const MIN_INODE: usize = 7;
/// Fewest bytes of an encoded directory entry: length, one byte of name, inode.
const MIN_ENTRY: usize = 3;
/// Fewest bytes of an encoded extended attribute: two lengths and one byte of name.
const MIN_XATTR: usize = 3;

impl Artifact {
    /// The binary encoding.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(Vec::with_capacity(
            256 + self.objects.len() * 128 + self.tree.inodes.len() * 32,
        ));
        out.0.extend_from_slice(MAGIC);
        out.number(VERSION.into());
        out.bytes(self.reference.as_bytes());
        out.bytes(self.revision.as_bytes());
        out.number(self.objects.len() as u64);
        for object in &self.objects {
            out.object(object);
        }
        out.number(self.tree.inodes.len() as u64);
        for inode in &self.tree.inodes {
            out.inode(inode);
        }
        out.0
    }

    /// Decodes what [`Artifact::encode`] wrote.
    ///
    /// # Errors
    /// [`TreeError::Version`] for another format; [`TreeError::Damaged`] for anything that
    /// `encode` could not have written from a tree with its invariants.
    pub fn decode(bytes: &[u8]) -> Result<Artifact, TreeError> {
        let mut input = Reader(bytes);
        if input.take(MAGIC.len())? != MAGIC {
            return Err(TreeError::Damaged("it does not start as a tree does"));
        }
        let found = input.small()?;
        if found != VERSION {
            let known = VERSION;
            return Err(TreeError::Version { found, known });
        }
        let reference = input.text()?;
        let revision = input.text()?;
        let count = input.count(MIN_OBJECT)?;
        let mut objects = Vec::with_capacity(count);
        for _ in 0..count {
            objects.push(input.object()?);
        }
        let count = input.count(MIN_INODE)?;
        if count > MAX_INODES {
            return Err(TreeError::TooMany);
        }
        let mut inodes = Vec::with_capacity(count);
        for _ in 0..count {
            inodes.push(input.inode()?);
        }
        if !input.0.is_empty() {
            return Err(TreeError::Damaged("bytes follow its end"));
        }
        connect(&mut inodes, objects.len())?;
        Ok(Artifact {
            reference,
            revision,
            tree: Tree { inodes },
            objects,
        })
    }
}

/// Sets the parents and checks what concerns several inodes: indices, names, one parent for every
/// directory, everything reachable from the root (so no cycles), no path too long.
pub(super) fn connect(inodes: &mut [Inode], objects: usize) -> Result<(), TreeError> {
    const UNSEEN: u32 = u32::MAX;
    if !matches!(inodes.first().map(|i| &i.kind), Some(Kind::Dir { .. })) {
        return Err(TreeError::Damaged("its root is no directory"));
    }
    let mut seen = 1usize;
    // Parent of each inode found so far (one of them, for a file with several names).
    let mut parents = vec![UNSEEN; inodes.len()];
    parents[0] = 0;
    // Directories to visit, with the length of their path and its slash.
    let mut queue = VecDeque::from([(0u32, 0usize)]);
    while let Some((dir, prefix)) = queue.pop_front() {
        let Kind::Dir { entries, .. } = &inodes[dir as usize].kind else {
            continue;
        };
        for (at, entry) in entries.iter().enumerate() {
            check_name(&entry.name).map_err(TreeError::Damaged)?;
            if at > 0 && entries[at - 1].name >= entry.name {
                return Err(TreeError::Damaged("the names of a directory are unsorted"));
            }
            if prefix + entry.name.len() > MAX_PATH {
                return Err(TreeError::Damaged("a path is longer than 4096 bytes"));
            }
            let Some(child) = inodes.get(entry.inode as usize) else {
                return Err(TreeError::Damaged(
                    "an entry names an inode that is not there",
                ));
            };
            let first = parents[entry.inode as usize] == UNSEEN;
            if first {
                parents[entry.inode as usize] = dir;
                seen += 1;
            }
            match &child.kind {
                Kind::Dir { .. } if !first => {
                    return Err(TreeError::Damaged("a directory has two names"));
                }
                Kind::Dir { .. } => queue.push_back((entry.inode, prefix + entry.name.len() + 1)),
                Kind::File { object } if *object as usize >= objects => {
                    return Err(TreeError::Damaged("a file has an object that is not there"));
                }
                _ => {}
            }
        }
    }
    if seen != inodes.len() {
        return Err(TreeError::Damaged(
            "an inode is not reachable from its root",
        ));
    }
    for (inode, above) in inodes.iter_mut().zip(parents) {
        if let Kind::Dir { parent, .. } = &mut inode.kind {
            *parent = above;
        }
    }
    Ok(())
}

struct Writer(Vec<u8>);

impl Writer {
    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn object(&mut self, object: &Object) {
        let (kind, digest) = match &object.id {
            ObjectId::Sha256(digest) => (0, digest),
            ObjectId::Located(digest) => (1, digest),
        };
        self.0.push(kind);
        self.0.extend_from_slice(digest.as_bytes());
        self.number(object.size);
        match &object.git_sha1 {
            None => self.0.push(0),
            Some(sha1) => {
                self.0.push(1);
                self.0.extend_from_slice(sha1);
            }
        }
        let Recipe::Raw(location) = &object.recipe;
        self.0.push(0);
        self.bytes(location.path.as_bytes());
        match &location.generation {
            None => self.0.push(0),
            Some(generation) => {
                self.0.push(1);
                self.bytes(generation.as_bytes());
            }
        }
        self.number(location.offset);
    }

    fn inode(&mut self, inode: &Inode) {
        self.0.push(match &inode.kind {
            Kind::Dir { .. } => 0,
            Kind::File { .. } => 1,
            Kind::Symlink { .. } => 2,
            Kind::Char { .. } => 3,
            Kind::Block { .. } => 4,
            Kind::Fifo => 5,
            Kind::Socket => 6,
        });
        let meta = &inode.meta;
        self.number(meta.mode.into());
        self.number(meta.uid.into());
        self.number(meta.gid.into());
        let (seconds, nanos) = meta.mtime;
        self.number((seconds << 1 ^ seconds >> 63) as u64);
        self.number(nanos.into());
        self.number(meta.xattrs.len() as u64);
        for (name, value) in &meta.xattrs {
            self.bytes(name);
            self.bytes(value);
        }
        match &inode.kind {
            Kind::Dir { entries, .. } => {
                self.number(entries.len() as u64);
                for entry in entries {
                    self.bytes(&entry.name);
                    self.number(entry.inode.into());
                }
            }
            Kind::File { object } => self.number((*object).into()),
            Kind::Symlink { target } => self.bytes(target),
            Kind::Char { major, minor } | Kind::Block { major, minor } => {
                self.number((*major).into());
                self.number((*minor).into());
            }
            Kind::Fifo | Kind::Socket => {}
        }
    }
}

/// The bytes not read yet.
struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    fn take(&mut self, count: usize) -> Result<&'b [u8], TreeError> {
        let cut = self.0.split_at_checked(count);
        let (taken, rest) = cut.ok_or(TreeError::Damaged("it is cut short"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], TreeError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn byte(&mut self) -> Result<u8, TreeError> {
        Ok(self.array::<1>()?[0])
    }

    fn number(&mut self) -> Result<u64, TreeError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return Err(TreeError::Damaged("a number is too large"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(TreeError::Damaged("a number is longer than it need be"));
                }
                return Ok(value);
            }
        }
        Err(TreeError::Damaged("a number is too long"))
    }

    fn small(&mut self) -> Result<u32, TreeError> {
        u32::try_from(self.number()?).map_err(|_| TreeError::Damaged("a number is too large"))
    }

    /// A number of things that take at least `least` bytes each.
    fn count(&mut self, least: usize) -> Result<usize, TreeError> {
        let count = usize::try_from(self.number()?).unwrap_or(usize::MAX);
        if count > self.0.len() / least {
            return Err(TreeError::Damaged("it counts more than it holds"));
        }
        Ok(count)
    }

    fn bytes(&mut self) -> Result<&'b [u8], TreeError> {
        let len = self.count(1)?;
        self.take(len)
    }

    fn text(&mut self) -> Result<String, TreeError> {
        let text = std::str::from_utf8(self.bytes()?);
        text.map(str::to_owned)
            .map_err(|_| TreeError::Damaged("a text is not UTF-8"))
    }

    fn flag(&mut self) -> Result<bool, TreeError> {
        match self.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(TreeError::Damaged("a flag is neither 0 nor 1")),
        }
    }

    fn object(&mut self) -> Result<Object, TreeError> {
        let located = self.flag()?;
        let digest = Digest::from_bytes(self.array()?);
        let id = if located {
            ObjectId::Located(digest)
        } else {
            ObjectId::Sha256(digest)
        };
        let size = self.number()?;
        if size > i64::MAX as u64 {
            return Err(TreeError::Damaged("an object is larger than a file can be"));
        }
        let git_sha1 = if self.flag()? {
            Some(self.array()?)
        } else {
            None
        };
        if self.byte()? != 0 {
            return Err(TreeError::Damaged("an object has an unknown recipe"));
        }
        let path = self.text()?;
        let generation = if self.flag()? {
            Some(self.text()?)
        } else {
            None
        };
        let offset = self.number()?;
        if offset.checked_add(size).is_none() {
            return Err(TreeError::Damaged("an object ends beyond all offsets"));
        }
        let recipe = Recipe::Raw(Location {
            path,
            generation,
            offset,
        });
        Ok(Object {
            id,
            size,
            git_sha1,
            recipe,
        })
    }

    fn inode(&mut self) -> Result<Inode, TreeError> {
        let kind = self.byte()?;
        let mode = self.small()?;
        let mode = u16::try_from(mode).map_err(|_| TreeError::Damaged("a mode is too large"))?;
        let (uid, gid) = (self.small()?, self.small()?);
        let seconds = self.number()?;
        let seconds = (seconds >> 1) as i64 ^ -((seconds & 1) as i64);
        let mtime = (seconds, self.small()?);
        let count = self.count(MIN_XATTR)?;
        let mut xattrs = Vec::with_capacity(count);
        for _ in 0..count {
            xattrs.push((self.bytes()?.into(), self.bytes()?.into()));
        }
        let meta = Meta {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        };
        let kind = match kind {
            0 => {
                let count = self.count(MIN_ENTRY)?;
                let mut entries = Vec::with_capacity(count);
                for _ in 0..count {
                    let name = self.bytes()?.into();
                    let inode = self.small()?;
                    entries.push(Entry { name, inode });
                }
                // `connect` sets the parent.
                Kind::Dir { parent: 0, entries }
            }
            1 => Kind::File {
                object: self.small()?,
            },
            2 => Kind::Symlink {
                target: self.bytes()?.into(),
            },
            3 => Kind::Char {
                major: self.small()?,
                minor: self.small()?,
            },
            4 => Kind::Block {
                major: self.small()?,
                minor: self.small()?,
            },
            5 => Kind::Fifo,
            6 => Kind::Socket,
            _ => return Err(TreeError::Damaged("an inode has an unknown kind")),
        };
        check_inode(&kind, &meta).map_err(TreeError::Damaged)?;
        Ok(Inode { kind, meta })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::TreeBuilder, *};

    fn object(seed: u8) -> Object {
        let digest = Digest::of(&[seed]);
        Object {
            id: match seed % 2 {
                0 => ObjectId::Sha256(digest),
                _ => ObjectId::Located(digest),
            },
            size: u64::from(seed) * 1000,
            git_sha1: seed.is_multiple_of(3).then_some([seed; 20]),
            recipe: Recipe::Raw(Location {
                path: format!("key/{seed}"),
                generation: seed.is_multiple_of(2).then(|| format!("\"etag {seed}\"")),
                offset: u64::from(seed) << 40,
            }),
        }
    }

    /// Everything that a tree can hold.
    fn full() -> Artifact {
        let mut tree = TreeBuilder::new(Meta::dir(-5));
        let mut meta = Meta::file(1_700_000_000);
        meta.mode = 0o6755;
        (meta.uid, meta.gid, meta.mtime.1) = (1000, u32::MAX, 999_999_999);
        meta.xattrs = vec![(b"user.a"[..].into(), b"\0\xff"[..].into())];
        let a = tree.add_file(b"a/b/c", 0, meta.clone()).unwrap();
        tree.link(b"a/again", a).unwrap();
        tree.add_file(b"z", 1, Meta::file(0)).unwrap();
        let target = b"../a/b".as_slice().into();
        let kinds = [
            Kind::Symlink { target },
            Kind::Char { major: 1, minor: 3 },
            Kind::Block { major: 8, minor: 0 },
            Kind::Fifo,
            Kind::Socket,
            Kind::Dir {
                parent: 9,
                entries: Vec::new(),
            },
        ];
        for (at, kind) in kinds.into_iter().enumerate() {
            let path = format!("dev/{at}");
            tree.add(path.as_bytes(), kind, meta.clone()).unwrap();
        }
        tree.add(
            b"a",
            Kind::Dir {
                parent: 0,
                entries: Vec::new(),
            },
            meta,
        )
        .unwrap();
        Artifact {
            reference: "hf://org/näme@main".to_owned(),
            revision: "c0ffee".to_owned(),
            tree: tree.build(),
            objects: vec![object(0), object(1)],
        }
    }

    #[test]
    fn the_bytes_are_what_they_were() {
        let mut tree = TreeBuilder::new(Meta::dir(0));
        tree.add_file(b"d/f", 0, Meta::file(-1)).unwrap();
        let artifact = Artifact {
            reference: "r".to_owned(),
            revision: "v".to_owned(),
            tree: tree.build(),
            objects: vec![Object {
                id: ObjectId::Located(Digest::from_bytes([7; 32])),
                size: 300,
                git_sha1: None,
                recipe: Recipe::Raw(Location {
                    path: "p".to_owned(),
                    generation: Some("g".to_owned()),
                    offset: 0,
                }),
            }],
        };
        let mut golden = b"hrthtree\x01\x01r\x01v\x01\x01".to_vec();
        golden.extend([7; 32]);
        golden.extend(b"\xac\x02\x00\x00\x01p\x01\x01g\x00");
        golden.extend(b"\x03\x00\xed\x02\x00\x00\x00\x00\x00\x01\x01d\x01");
        golden.extend(b"\x00\xed\x02\x00\x00\x00\x00\x00\x01\x01f\x02");
        golden.extend(b"\x01\xa4\x02\x00\x00\x01\x00\x00\x00");
        assert_eq!(artifact.encode(), golden);
        assert_eq!(Artifact::decode(&golden), Ok(artifact));
        let full = full();
        assert_eq!(
            full.digest().to_string(),
            "sha256:5ed6403ab3cbf4158248c9fe06b2bc8d9e1db6ee8064931138d3839e6a297a09"
        );
        assert_eq!(Artifact::decode(&full.encode()), Ok(full));
    }

    #[test]
    fn every_cut_and_every_changed_byte_is_refused_or_another_artifact() {
        let full = full();
        let good = full.encode();
        for at in 0..good.len() {
            assert!(Artifact::decode(&good[..at]).is_err(), "cut at {at}");
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                if let Ok(other) = Artifact::decode(&bad) {
                    assert_ne!(other, full, "byte {at} bit {bit} means nothing");
                    assert_eq!(other.encode(), bad, "byte {at} bit {bit} has two encodings");
                }
            }
        }
        let longer = [&good[..], b"\0"].concat();
        assert!(Artifact::decode(&longer).is_err());
    }

    /// Encodes inodes that no builder makes.
    fn hostile(inodes: Vec<Inode>) -> Result<Artifact, TreeError> {
        let artifact = Artifact {
            reference: String::new(),
            revision: String::new(),
            tree: Tree { inodes },
            objects: vec![object(0)],
        };
        Artifact::decode(&artifact.encode())
    }

    fn dir(entries: &[(&str, u32)]) -> Inode {
        let entry = |&(name, inode): &(&str, u32)| Entry {
            name: name.as_bytes().into(),
            inode,
        };
        Inode {
            kind: Kind::Dir {
                parent: 0,
                entries: entries.iter().map(entry).collect(),
            },
            meta: Meta::dir(0),
        }
    }

    fn file(object: u32) -> Inode {
        Inode {
            kind: Kind::File { object },
            meta: Meta::file(0),
        }
    }

    #[test]
    fn trees_without_the_invariants_are_refused() {
        assert!(hostile(vec![dir(&[("a", 1), ("b", 1)]), file(0)]).is_ok());
        let mut late = file(0);
        late.meta.mtime.1 = 1_000_000_000;
        let mut wide = file(0);
        wide.meta.mode = 0o10000;
        let mut named = file(0);
        named.meta.xattrs = vec![(b""[..].into(), b"x"[..].into())];
        let long = "x".repeat(256);
        let mut cases = vec![
            vec![],
            vec![file(0)],
            vec![dir(&[]), file(0)],
            vec![dir(&[("a", 0)])],
            vec![dir(&[("a", 2)]), file(0)],
            vec![dir(&[("a", 1)]), file(1)],
            vec![dir(&[("b", 1), ("a", 1)]), file(0)],
            vec![dir(&[("a", 1), ("a", 1)]), file(0)],
            vec![dir(&[("a", 1), ("b", 1)]), dir(&[])],
            vec![dir(&[("a", 1)]), dir(&[("b", 1)])],
            vec![dir(&[("a", 1)]), dir(&[("b", 0)])],
            vec![dir(&[]), dir(&[("b", 2)]), dir(&[("a", 1)])],
            vec![dir(&[("a", 1)]), late],
            vec![dir(&[("a", 1)]), wide],
            vec![dir(&[("a", 1)]), named],
        ];
        for name in ["", ".", "..", "a/b", "a\0", &long] {
            cases.push(vec![dir(&[(name, 1)]), file(0)]);
        }
        for target in ["".to_owned(), "a\0b".to_owned(), "x".repeat(4096)] {
            let mut link = file(0);
            link.kind = Kind::Symlink {
                target: target.as_bytes().into(),
            };
            cases.push(vec![dir(&[("a", 1)]), link]);
        }
        for case in cases {
            let shown = format!("{case:?}");
            assert!(hostile(case).is_err(), "{shown}");
        }
        // A chain of directories deeper than any path: no recursion, and refused.
        let deep = (1..100_000).map(|at| dir(&[("d", at)]));
        let deep: Vec<Inode> = deep.chain([file(0)]).collect();
        assert!(matches!(hostile(deep), Err(TreeError::Damaged(why)) if why.contains("path")));
        let other = [MAGIC, &b"\x63"[..]].concat();
        let version = TreeError::Version {
            found: 99,
            known: 1,
        };
        assert_eq!(Artifact::decode(&other), Err(version));
    }

    proptest! {
        #[test]
        fn random_bytes_do_not_panic(tail in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Artifact::decode(&tail);
            let _ = Artifact::decode(&[MAGIC, &b"\x01"[..], &tail].concat());
        }

        #[test]
        fn mutations_do_not_panic_and_have_one_encoding(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = full().encode();
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok(artifact) = Artifact::decode(&bytes) {
                prop_assert_eq!(artifact.encode(), bytes.clone());
            }
            bytes.remove(cut.index(bytes.len()));
            let _ = Artifact::decode(&bytes);
        }

        #[test]
        fn trees_round_trip(paths in prop::collection::vec("[a-c]{1,2}(/[a-c]{1,2}){0,4}", 0..40)) {
            let mut tree = TreeBuilder::new(Meta::dir(3));
            for path in &paths {
                // Some are there already, or pass through files: then they are not added.
                let _ = tree.add_file(path.as_bytes(), 0, Meta::file(4));
            }
            let artifact = Artifact { tree: tree.build(), ..full() };
            prop_assert_eq!(Artifact::decode(&artifact.encode()), Ok(artifact));
        }
    }
}
