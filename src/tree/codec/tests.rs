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

/// As [`full`], with a slice.
fn with_slice() -> Artifact {
    let mut artifact = full();
    artifact.objects.push(slice(1, 10, 500));
    artifact
}

#[test]
fn every_cut_and_every_changed_byte_is_refused_or_another_artifact() {
    let full = with_slice();
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

fn slice(of: u32, offset: u64, size: u64) -> Object {
    Object {
        id: ObjectId::located("a slice", "", size),
        size,
        git_sha1: None,
        recipe: Recipe::Slice { object: of, offset },
    }
}

#[test]
fn slices_round_trip_and_lie_in_what_they_are_cut_from() {
    let with = |objects: Vec<Object>| Artifact { objects, ..full() };
    let artifact = with(vec![slice(1, 900, 100), object(1), slice(1, 1000, 0)]);
    assert_eq!(artifact.size(), 1000, "stored once");
    assert_eq!(artifact.stored().count(), 1);
    assert_eq!(artifact.place(0), Some((1, 900)));
    assert_eq!(artifact.place(1), Some((1, 0)));
    assert_eq!(artifact.place(3), None);
    assert_eq!(Artifact::decode(&artifact.encode()), Ok(artifact));
    for bad in [
        slice(0, 0, 1),
        slice(2, 0, 1),
        slice(3, 0, 1),
        slice(1, 901, 100),
        slice(1, u64::MAX, 1),
        slice(1, 1001, 0),
    ] {
        let artifact = with(vec![bad, object(1), slice(1, 0, 10)]);
        assert_eq!(artifact.place(0), None);
        let error = Artifact::decode(&artifact.encode()).unwrap_err();
        assert!(error.to_string().contains("slice"), "{error}");
    }
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
        let mut bytes = with_slice().encode();
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
