use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use proptest::prelude::*;

use super::*;
use crate::{
    digest::{Digest, ObjectId},
    image::{
        Compression, EntryKind, ImageErrorKind,
        tar::write::{Put, Writer},
        unpack::tests::unpack,
    },
    tree::{Artifact, Kind},
};

fn index(number: usize, entries: Vec<LayerEntry>) -> LayerIndex {
    let blob = Digest::of(&[number as u8]);
    LayerIndex {
        blob,
        blob_size: 1 << 20,
        compression: Compression::Gzip,
        diff_id: blob,
        size: 1 << 20,
        entries,
        spans: Vec::new(),
    }
}

/// Merges archives, lowest first, and shows the tree: a line for each path, hard links by the first.
fn show(tars: Vec<Writer>) -> Result<String, ImageError> {
    let layers: Vec<_> = tars
        .into_iter()
        .enumerate()
        .map(|(number, tar)| index(number, unpack(&tar.end()).unwrap()))
        .collect();
    let (tree, objects) = merge(&layers.iter().collect::<Vec<_>>())?;
    let mut text = String::new();
    for (path, seen) in seen(&tree, &objects) {
        let first = &seen.links[0];
        let link = match *first == path {
            true => String::new(),
            false => format!(" = {}", String::from_utf8_lossy(first)),
        };
        let path = String::from_utf8_lossy(&path).into_owned();
        writeln!(text, "{path} {} {:o}{link}", seen.what, seen.meta.mode).unwrap();
    }
    Ok(text)
}

fn shows(tars: Vec<Writer>, wanted: &[&str]) {
    let shown = show(tars).unwrap();
    let lines: Vec<_> = shown.lines().skip(1).collect();
    assert_eq!(lines, wanted);
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    what: String,
    meta: Meta,
    links: Vec<Vec<u8>>,
}

/// Everything that can be seen of a tree, which is also checked as the store will check it.
fn seen(tree: &Tree, objects: &[Object]) -> BTreeMap<Vec<u8>, Seen> {
    let artifact = Artifact {
        reference: String::new(),
        revision: String::new(),
        tree: tree.clone(),
        objects: objects.to_vec(),
    };
    assert_eq!(Artifact::decode(&artifact.encode()).unwrap(), artifact);
    let files = tree.inodes().iter().filter_map(|i| match i.kind {
        Kind::File { object } => Some(object),
        _ => None,
    });
    let used: BTreeSet<_> = files.collect();
    assert_eq!(used.len(), objects.len(), "no object is without a file");
    let ids: BTreeSet<_> = objects.iter().map(|object| object.id).collect();
    assert_eq!(ids.len(), objects.len(), "no content is there twice");

    let mut paths: BTreeMap<Vec<u8>, u32> = BTreeMap::new();
    let mut stack = vec![(Vec::new(), 0)];
    while let Some((path, inode)) = stack.pop() {
        for entry in tree.entries(inode).unwrap_or_default() {
            let path: Vec<u8> = match path.is_empty() {
                true => entry.name.to_vec(),
                false => [&path, &b"/"[..], &entry.name].concat(),
            };
            stack.push((path, entry.inode));
        }
        paths.insert(path, inode);
    }
    let mut links: BTreeMap<u32, Vec<Vec<u8>>> = BTreeMap::new();
    for (path, inode) in &paths {
        links.entry(*inode).or_default().push(path.clone());
    }
    let see = |inode: u32| {
        let found = tree.get(inode).unwrap();
        let what = match &found.kind {
            Kind::Dir { .. } => "dir".to_owned(),
            Kind::File { object } => format!("file:{}", objects[*object as usize].size),
            Kind::Symlink { target } => format!("-> {}", String::from_utf8_lossy(target)),
            Kind::Char { major, minor } => format!("char:{major}:{minor}"),
            other => format!("{other:?}").to_lowercase(),
        };
        Seen {
            what,
            meta: found.meta.clone(),
            links: links[&inode].clone(),
        }
    };
    paths
        .into_iter()
        .map(|(path, inode)| (path, see(inode)))
        .collect()
}

fn tar(build: impl FnOnce(&mut Writer)) -> Writer {
    let mut out = Writer::default();
    build(&mut out);
    out
}

#[test]
fn the_last_entry_of_a_path_counts() {
    shows(
        vec![tar(|t| {
            t.file("a", b"1");
            t.file("./a", b"22");
            t.file("d/x", b"");
            t.other(b'5', "d/", "");
            t.file("e/x", b"");
            t.file("e", b"333");
            t.other(b'2', "f", "a");
            t.other(b'5', "f", "");
            t.file("f/x", b"4444");
        })],
        &[
            "a file:2 644",
            "d dir 755",
            "d/x file:0 644",
            "e file:3 644",
            "f dir 755",
            "f/x file:4 644",
        ],
    );
}

#[test]
fn whiteouts_hide_only_lower_layers() {
    let low = || {
        tar(|t| {
            t.file("a/x", b"1");
            t.file("a/y", b"1");
            t.file("b/x", b"1");
            t.file("c", b"1");
        })
    };
    shows(
        vec![
            low(),
            tar(|t| {
                t.file(".wh.c", b"");
                t.file("a/.wh.x", b"");
                t.file("a/.wh.never", b"");
                t.file(".wh.b", b"");
            }),
        ],
        &["a dir 755", "a/y file:1 644"],
    );
    // Before or after what the same layer has there, opaque or whiteout.
    for late in [false, true] {
        shows(
            vec![
                low(),
                tar(|t| {
                    let marks = |t: &mut Writer| {
                        t.file(".wh.c", b"");
                        t.file("a/.wh..wh..opq", b"");
                    };
                    if !late {
                        marks(t);
                    }
                    t.file("a/new", b"22");
                    t.file("c", b"22");
                    if late {
                        marks(t);
                        t.file(".wh.a", b"");
                    }
                    t.file("b/x", b"22");
                }),
            ],
            &[
                "a dir 755",
                "a/new file:2 644",
                "b dir 755",
                "b/x file:2 644",
                "c file:2 644",
            ],
        );
    }
    // What comes back does not bring its old content with it.
    shows(
        vec![
            low(),
            tar(|t| t.file(".wh.a", b"")),
            tar(|t| t.file("a/z", b"22")),
        ],
        &[
            "a dir 755",
            "a/z file:2 644",
            "b dir 755",
            "b/x file:1 644",
            "c file:1 644",
        ],
    );
    // Not so in containerd: overlayfs knows no opaque root.
    shows(
        vec![
            low(),
            tar(|t| {
                t.file("d/y", b"22");
                t.file(".wh..wh..opq", b"");
            }),
        ],
        &["d dir 755", "d/y file:2 644"],
    );
    // A path that the layer implies below its own whiteout.
    shows(
        vec![
            low(),
            tar(|t| {
                t.file(".wh.a", b"");
                t.file("a/z", b"22");
                t.file(".wh.b", b"");
                t.file(".wh.c", b"");
            }),
        ],
        &["a dir 755", "a/z file:2 644"],
    );
    // As overlayfs has it: the whiteout was replaced by a directory, and directories merge.
    shows(
        vec![
            low(),
            tar(|t| {
                t.file(".wh.a", b"");
                t.other(b'5', "a", "");
                t.file(".wh.b", b"");
                t.other(b'3', "c", "");
            }),
        ],
        &["a dir 755", "a/x file:1 644", "a/y file:1 644"],
    );
}

#[test]
fn kinds_replace_each_other_across_layers() {
    shows(
        vec![
            tar(|t| {
                t.file("a", b"1");
                t.file("b/x/y", b"1");
                t.other(b'2', "c", "b");
            }),
            tar(|t| {
                t.file("a/x", b"22");
                t.other(b'6', "b", "");
                t.other(b'5', "c", "");
            }),
            tar(|t| t.file("b/z", b"333")),
        ],
        &[
            "a dir 755",
            "a/x file:2 644",
            "b dir 755",
            "b/z file:3 644",
            "c dir 755",
        ],
    );
    assert!(show(vec![]).unwrap().starts_with(" dir 755"));
}

#[test]
fn an_implied_directory_looks_as_it_does_below() {
    let low = tar(|t| {
        t.pax(&[(b"SCHILY.xattr.user.a", b"b")]);
        t.put(&Put {
            flag: b'5',
            name: b"a",
            mode: 0o2750,
            uid: 5,
            gid: 6,
            mtime: 7,
            ..Put::default()
        });
        t.other(b'2', "link", "a");
    });
    let layers = [
        low,
        tar(|t| t.file("a/x/y", b"")),
        tar(|t| t.file("link/z", b"")),
    ];
    let layers = layers.map(|tar| index(0, unpack(&tar.end()).unwrap()));
    let (tree, objects) = merge(&layers.iter().collect::<Vec<_>>()).unwrap();
    let seen = seen(&tree, &objects);
    let a = &seen[&b"a"[..]].meta;
    assert_eq!(
        (a.mode, a.uid, a.gid, a.mtime, a.xattrs.len()),
        (0o2750, 5, 6, (7, 0), 1)
    );
    assert_eq!(seen[&b"a/x"[..]].meta, root_meta());
    // containerd looks through the symlink for attributes, and puts a directory in its place.
    assert_eq!(&seen[&b"link"[..]].meta, a);
    assert!(seen.contains_key(&b"link/z"[..]) && !seen.contains_key(&b"a/z"[..]));
    assert_eq!(objects.len(), 1);
}

#[test]
fn the_root_takes_only_its_time_from_layers() {
    let root = |mtime| {
        tar(|t| {
            t.put(&Put {
                flag: b'5',
                name: b"./",
                mode: 0o700,
                uid: 5,
                mtime,
                ..Put::default()
            });
        })
    };
    let layers = [root(3), root(9), tar(|t| t.file("a", b""))];
    let layers = layers.map(|tar| index(0, unpack(&tar.end()).unwrap()));
    let (tree, _) = merge(&layers.iter().collect::<Vec<_>>()).unwrap();
    let meta = &tree.get(0).unwrap().meta;
    assert_eq!((meta.mode, meta.uid, meta.mtime), (0o755, 0, (9, 0)));
}

#[test]
fn symlinks_of_the_same_layer_are_followed_within_the_root() {
    shows(
        vec![tar(|t| {
            t.other(b'5', "a/b", "");
            t.other(b'2', "a/up", "../../../c");
            t.other(b'2', "abs", "/a/b/.");
            t.other(b'2', "twice", "abs/../up/");
            t.file("a/up/1", b"");
            t.file("abs/2", b"");
            t.file("twice/3", b"");
            t.file("abs", b"");
        })],
        &[
            "a dir 755",
            "a/b dir 755",
            "a/b/2 file:0 644",
            "a/up -> ../../../c 777",
            "abs file:0 644",
            "c dir 755",
            "c/1 file:0 644",
            "c/3 file:0 644",
            "twice -> abs/../up/ 777",
        ],
    );
    // Those of a lower layer are not: the directory takes their place.
    shows(
        vec![
            tar(|t| {
                t.other(b'5', "usr/lib", "");
                t.other(b'2', "lib", "usr/lib");
            }),
            tar(|t| t.file("lib/x", b"")),
        ],
        &[
            "lib dir 755",
            "lib/x file:0 644",
            "usr dir 755",
            "usr/lib dir 755",
        ],
    );
}

#[test]
fn hard_links_share_an_inode() {
    shows(
        vec![
            tar(|t| {
                t.file("d/a", b"1");
                t.other(b'1', "b", "/./d/a");
                t.other(b'2', "l", "d");
                t.other(b'1', "c", "l/a");
                t.other(b'1', "m", "l");
                t.file("d/a", b"22");
            }),
            tar(|t| {
                t.file(".wh.b", b"");
                t.other(b'1', "e", "c");
                t.other(b'1', "e", "e");
                t.file("n", b"333");
                t.other(b'1', "o", "n");
            }),
        ],
        &[
            "c file:1 755",
            "d dir 755",
            "d/a file:2 644",
            "e file:1 755 = c",
            "l -> d 777",
            "m -> d 777 = l",
            "n file:3 755",
            "o file:3 755 = n",
        ],
    );
}

#[test]
fn a_hard_link_sets_attributes_as_unpacking_it_does() {
    let tar = tar(|t| {
        t.pax(&[
            (b"SCHILY.xattr.security.capability", b"c"),
            (b"SCHILY.xattr.user.a", b"1"),
            (b"SCHILY.xattr.user.b", b"1"),
        ]);
        t.file("a", b"1");
        t.pax(&[(b"SCHILY.xattr.user.b", b"2")]);
        t.put(&Put {
            flag: b'1',
            name: b"b",
            target: b"a",
            mode: 0o4711,
            uid: 5,
            mtime: 6,
            ..Put::default()
        });
    });
    let layer = index(0, unpack(&tar.end()).unwrap());
    let (tree, _) = merge(&[&layer]).unwrap();
    let meta = &tree.get(tree.find("a").unwrap()).unwrap().meta;
    assert_eq!((meta.mode, meta.uid, meta.mtime), (0o4711, 5, (6, 0)));
    let xattr = |name: &[u8], value: &[u8]| (name.into(), value.into());
    assert_eq!(
        meta.xattrs,
        [xattr(b"user.a", b"1"), xattr(b"user.b", b"2")]
    );
}

#[test]
fn equal_content_is_one_object() {
    let layers = [
        tar(|t| {
            t.file("a", b"same");
            t.file("empty", b"");
        }),
        tar(|t| {
            t.file("b", b"other");
            t.file("c", b"same");
            t.file("void", b"");
        }),
    ];
    let mut number = 0;
    let layers = layers.map(|tar| {
        number += 1;
        index(number, unpack(&tar.end()).unwrap())
    });
    let (_, objects) = merge(&[&layers[0], &layers[1]]).unwrap();
    let found: Vec<_> = objects
        .iter()
        .map(|object| {
            let location = object.recipe.location().unwrap();
            (object.id, location.path.clone(), location.offset)
        })
        .collect();
    let id = |content: &[u8]| ObjectId::Sha256(Digest::of(content));
    let path = |n: usize| format!("{}#gzip", layers[n].blob);
    assert_eq!(
        found,
        [
            (id(b"same"), path(0), 512),
            (id(b"other"), path(1), 512),
            (id(b""), path(0), 1536)
        ]
    );
}

#[test]
fn what_cannot_be_unpacked_is_an_error_that_names_layer_and_entry() {
    type Build = fn(&mut Writer);
    let cases: [(Build, &str, &str); 6] = [
        (
            |t| {
                t.file("a", b"");
                t.file("a/b", b"");
            },
            "a/b",
            "passes through what is no directory",
        ),
        (
            |t| {
                t.other(b'2', "a", "b");
                t.other(b'2', "b", "a");
                t.file("a/x", b"");
            },
            "a/x",
            "too many symlinks",
        ),
        (
            |t| t.other(b'1', "a", "low/../gone"),
            "a",
            "hard link to \"gone\", which is not there",
        ),
        (
            |t| t.other(b'1', "a", "low"),
            "a",
            "hard link to a directory",
        ),
        (
            |t| {
                t.file("low/.wh.x", b"");
                t.other(b'1', "a", "low/x");
            },
            "a",
            "not there",
        ),
        (
            |t| {
                let part = "p".repeat(250);
                t.long(b'K', vec![&part[..]; 15].join("/").as_bytes());
                t.other(b'2', "a", "");
                t.long(b'L', format!("a/{part}/{part}/x").as_bytes());
                t.file("", b"");
            },
            "a/pppp",
            "longer than 4096 bytes",
        ),
    ];
    for (build, entry, why) in cases {
        let error = show(vec![tar(|t| t.file("low/x", b"")), tar(build)]).unwrap_err();
        assert_eq!(error.kind(), ImageErrorKind::Invalid);
        let message = error.to_string();
        let start = format!("layer {}: entry \"{entry}", Digest::of(&[1]));
        assert!(
            message.starts_with(&start) && message.contains(why),
            "{message}"
        );
    }
}

/// An entry as an index may hold it, which no tar would give.
fn entry(path: &[u8], kind: EntryKind) -> LayerEntry {
    LayerEntry {
        path: path.into(),
        kind,
        meta: root_meta(),
    }
}

fn content(size: u64, offset: u64, pieces: &[(u64, u64)]) -> EntryKind {
    EntryKind::File(FileContent {
        size,
        digest: Digest::of(b"x"),
        offset,
        pieces: pieces.into(),
    })
}

#[test]
fn an_index_that_lies_is_an_error() {
    let bad_meta = |change: fn(&mut Meta)| {
        let mut bad = entry(b"a", EntryKind::Fifo);
        change(&mut bad.meta);
        vec![bad]
    };
    let target = |target: &[u8]| EntryKind::Symlink {
        target: target.into(),
    };
    for entries in [
        vec![entry(b"a/", EntryKind::Fifo)],
        vec![entry(b"..", EntryKind::Fifo)],
        vec![entry(b"a/.", EntryKind::Dir)],
        vec![entry(b"a\0", EntryKind::Whiteout)],
        vec![entry(b"a\0/b", EntryKind::Fifo)],
        vec![entry(&[b'n'; 256], EntryKind::Fifo)],
        vec![entry(&b"n/".repeat(3000)[..5999], EntryKind::Fifo)],
        vec![entry(b"a", target(b""))],
        vec![entry(b"a", target(b"\0"))],
        vec![entry(b"a", target(&[b'a'; 5000]))],
        vec![entry(
            b"a",
            EntryKind::Hardlink {
                target: b"".as_slice().into(),
            },
        )],
        vec![entry(
            b"a",
            EntryKind::Hardlink {
                target: b"..".as_slice().into(),
            },
        )],
        bad_meta(|meta| meta.mode = 0o10000),
        bad_meta(|meta| meta.mtime.1 = 1_000_000_000),
        bad_meta(|meta| meta.xattrs.push((Box::default(), Box::default()))),
        vec![entry(b"a", content(2, (1 << 20) - 1, &[]))],
        vec![entry(b"a", content(2, u64::MAX, &[]))],
        vec![entry(b"a", content(u64::MAX, 0, &[]))],
        vec![entry(b"a", content(9, 0, &[(4, 2), (5, 2)]))],
        vec![entry(b"a", content(9, 0, &[(4, 6)]))],
        vec![entry(b"a", content(9, 0, &[(4, u64::MAX)]))],
        vec![entry(b"a", content(1 << 40, 5, &[(0, 1 << 20)]))],
        vec![
            entry(b"a", content(1, 0, &[])),
            entry(b"b", content(2, 0, &[])),
        ],
    ] {
        let error = merge(&[&index(0, entries.clone())]).unwrap_err();
        assert_eq!(error.kind(), ImageErrorKind::Invalid);
        assert!(error.layer().is_some(), "{entries:?}: {error}");
    }
    // Odd, but it never leads out of the root.
    for path in [&b"../../a"[..], b"/a", b"b/../a", b"./a"] {
        let (tree, _) = merge(&[&index(0, vec![entry(path, EntryKind::Fifo)])]).unwrap();
        assert_eq!(tree.find("a"), Some(1));
    }
    // A sparse file has a location of its own.
    let sparse = index(0, vec![entry(b"a", content(1 << 40, 5, &[(7, 2)]))]);
    let (_, objects) = merge(&[&sparse]).unwrap();
    let location = objects[0].recipe.location().unwrap();
    assert!(location.path.ends_with("#gzip@0") && location.offset == 0);
}

mod model;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn merging_is_what_the_model_says(layers in model::layers()) {
        let layers: Vec<_> = layers
            .into_iter()
            .enumerate()
            .map(|(number, entries)| index(number, entries))
            .collect();
        let merged = merge(&layers.iter().collect::<Vec<_>>());
        let wanted = model::merge(&layers);
        match (merged, wanted) {
            (Ok((tree, objects)), Ok(wanted)) => prop_assert_eq!(seen(&tree, &objects), wanted),
            (Err(_), Err(_)) => {}
            (Ok((tree, objects)), Err(why)) => {
                prop_assert!(false, "{} but got {:#?}", why, seen(&tree, &objects));
            }
            (Err(error), Ok(wanted)) => prop_assert!(false, "{} but wanted {:#?}", error, wanted),
        }
    }
}
