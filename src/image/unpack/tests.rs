use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::image::{
    ImageErrorKind,
    tar::{
        BLOCK,
        write::{Put, Writer, number},
    },
};

/// Keeps all content; checks that the calls come in order.
#[derive(Debug, Default)]
pub(in crate::image) struct Keep {
    pub(in crate::image) files: Vec<Vec<u8>>,
    /// How the last file came: its size, and what is missing of it.
    open: Option<u64>,
    calls: VecDeque<&'static str>,
}

impl Sink for Keep {
    type Error = ImageError;

    fn begin(&mut self, size: u64) -> Result<(), ImageError> {
        assert_eq!(self.open, None);
        self.open = Some(size);
        self.files.push(Vec::new());
        self.calls.push_back("begin");
        Ok(())
    }

    fn data(&mut self, data: &[u8]) -> Result<(), ImageError> {
        assert!(!data.is_empty());
        *self.open.as_mut().unwrap() -= data.len() as u64;
        self.files.last_mut().unwrap().extend_from_slice(data);
        self.calls.push_back("data");
        Ok(())
    }

    fn hole(&mut self, len: u64) -> Result<(), ImageError> {
        assert!(len > 0);
        *self.open.as_mut().unwrap() -= len;
        let file = self.files.last_mut().unwrap();
        file.resize(file.len() + len as usize, 0);
        self.calls.push_back("hole");
        Ok(())
    }

    fn end(&mut self) -> Result<(), ImageError> {
        assert_eq!(self.open.take(), Some(0));
        self.calls.push_back("end");
        Ok(())
    }

    fn whole(&mut self, content: &[u8]) -> Result<(), ImageError> {
        assert_eq!(self.open, None);
        self.files.push(content.to_vec());
        self.calls.push_back("whole");
        Ok(())
    }

    fn digests(&mut self) -> Result<Vec<Digest>, ImageError> {
        assert_eq!(self.open, None);
        Ok(self.files.iter().map(|file| Digest::of(file)).collect())
    }
}

fn layer() -> Digest {
    Digest::of(b"layer")
}

fn unpack_with(
    tar: &[u8],
    cut: usize,
    limits: Limits,
) -> Result<(Vec<LayerEntry>, Keep), ImageError> {
    let mut sink = Keep::default();
    let mut unpacker = Unpacker::new(layer(), limits);
    for piece in tar.chunks(cut) {
        unpacker.feed(piece, &mut sink)?;
    }
    let entries = unpacker.finish(&mut sink)?;
    Ok((entries, sink))
}

pub(in crate::image) fn unpack(tar: &[u8]) -> Result<Vec<LayerEntry>, ImageError> {
    Ok(unpack_with(tar, usize::MAX, Limits::default())?.0)
}

fn paths(out: Writer) -> Vec<(String, EntryKind)> {
    let entries = unpack(&out.end()).unwrap();
    entries
        .into_iter()
        .map(|e| (String::from_utf8(e.path.into()).unwrap(), e.kind))
        .collect()
}

#[test]
fn paths_are_cleaned() {
    for (path, clean) in [
        ("a", "a"),
        ("/a", "a"),
        ("./a//b/./c/", "a/b/c"),
        ("a/../b", "b"),
        ("/a/b/../../c", "c"),
        (".", ""),
        ("./", ""),
        ("/", ""),
        ("a/..", ""),
        ("...", "..."),
        ("..a/b..", "..a/b.."),
    ] {
        let mut out = Writer::default();
        out.other(b'5', path, "");
        assert_eq!(paths(out), [(clean.to_owned(), EntryKind::Dir)], "{path}");
    }
}

#[test]
fn hostile_entries_are_errors_that_name_layer_and_entry() {
    let long = "n".repeat(256);
    let deep = "d/".repeat(2500);
    for path in ["..", "../a", "a/../../b", "/../a", "./..", &long, &deep] {
        for (flag, target) in [(b'0', ""), (b'5', ""), (b'2', "t"), (b'1', "t")] {
            let mut out = Writer::default();
            out.long(b'L', path.as_bytes());
            out.other(flag, "x", target);
            let error = unpack(&out.end()).unwrap_err();
            assert_eq!(error.kind(), ImageErrorKind::Invalid);
            let start = format!(
                "layer {}: entry {:?}",
                layer(),
                &path[..path.len().min(200)]
            );
            let start = start.trim_end_matches('"');
            assert!(error.to_string().starts_with(start), "{error}");
        }
    }
    for (flag, target, why) in [
        (b'1', "../a", "leads out of the image"),
        (b'1', "a/../../b", "leads out of the image"),
        (b'1', "", "hard link to the root"),
        (b'1', "/", "hard link to the root"),
        (b'2', "", "symlink to nothing"),
    ] {
        let mut out = Writer::default();
        out.other(flag, "x", target);
        let error = unpack(&out.end()).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    for name in [".wh.", ".wh..", "a/.wh...", "a/.wh."] {
        let mut out = Writer::default();
        out.file(name, b"");
        let error = unpack(&out.end()).unwrap_err().to_string();
        assert!(error.contains("whiteout of no name"), "{error}");
    }
    // Symlinks may point anywhere: they are not followed here.
    let mut out = Writer::default();
    out.other(b'2', "x", "/../../etc/shadow");
    assert_eq!(unpack(&out.end()).unwrap().len(), 1);
}

#[test]
fn special_names_are_understood() {
    let mut out = Writer::default();
    out.file(".wh.gone", b"ignored");
    out.file("a/b/.wh.gone", b"");
    out.other(b'5', "a/.wh.dir", "");
    out.file("a/.wh..wh..opq", b"");
    out.file("/.wh..wh..opq", b"");
    out.file(".wh..wh.aufs", b"");
    out.file("a/.wh..wh.orph", b"");
    out.file(".wh..wh.plnk/1.2", b"linked");
    out.file(".wh.d/kept", b"");
    out.file("/", b"a file cannot be the root");
    out.other(b'2', ".", "nor can a symlink");
    let names: Vec<_> = paths(out)
        .into_iter()
        .map(|(path, kind)| match kind {
            EntryKind::Whiteout => format!("whiteout {path}"),
            EntryKind::Opaque => format!("opaque {path}"),
            EntryKind::File(_) => format!("file {path}"),
            other => format!("{other:?}"),
        })
        .collect();
    assert_eq!(
        names,
        [
            "whiteout gone",
            "whiteout a/b/gone",
            "whiteout a/dir",
            "opaque a",
            "opaque ",
            "file .wh..wh.plnk/1.2",
            "file .wh.d/kept"
        ]
    );
}

#[test]
fn attributes_are_those_that_containerd_sets() {
    let mut out = Writer::default();
    out.pax(&[
        (b"SCHILY.xattr.security.capability", b"\x01\0\0\x02"),
        (b"SCHILY.xattr.user.empty", b""),
        (b"SCHILY.xattr.trusted.overlay.opaque", b"y"),
        (b"SCHILY.xattr.nonsense", b"y"),
        (b"LIBARCHIVE.xattr.user.b", b"eA=="),
        (b"mtime", b"-1.5"),
        (b"uid", b"4294967295"),
    ]);
    out.put(&Put {
        name: b"a",
        mode: 0o104_755,
        ..Put::default()
    });
    out.pax(&[(b"mtime", b"9223372037")]);
    out.other(b'2', "b", "a");
    out.pax(&[(b"mtime", b"9223372036.854775807")]);
    out.other(b'6', "c", "");
    let entries = unpack(&out.end()).unwrap();
    let meta = &entries[0].meta;
    assert_eq!(
        (meta.mode, meta.uid, meta.mtime),
        (0o4755, u32::MAX, (0, 0))
    );
    let xattr = |name: &[u8], value: &[u8]| (name.into(), value.into());
    assert_eq!(
        meta.xattrs,
        [
            xattr(b"security.capability", b"\x01\0\0\x02"),
            xattr(b"user.empty", b"")
        ]
    );
    assert_eq!(entries[1].meta.mode, 0o777);
    assert_eq!(entries[1].meta.mtime, (0, 0));
    assert_eq!(entries[2].meta.mtime, (9_223_372_036, 854_775_807));
    let mut out = Writer::default();
    out.pax(&[(b"SCHILY.xattr.user.large", &[0; MAX_XATTR + 1])]);
    out.file("a", b"");
    let error = unpack(&out.end()).unwrap_err().to_string();
    assert!(error.contains("extended attribute"), "{error}");
}

#[test]
fn small_files_come_whole() {
    let mut out = Writer::default();
    out.file("empty", b"");
    out.file("small", b"content");
    out.file("large", &[5; 3000]);
    let tar = out.end();
    let (entries, sink) = unpack_with(&tar, 4 * BLOCK, Limits::default()).unwrap();
    assert_eq!(
        sink.calls,
        ["whole", "whole", "begin", "data", "data", "end"]
    );
    for (entry, content) in entries.iter().zip([&b""[..], b"content", &[5; 3000]]) {
        let EntryKind::File(file) = &entry.kind else {
            panic!("{entry:?}");
        };
        assert_eq!(file.digest, Digest::of(content));
        assert_eq!(&tar[file.offset as usize..][..content.len()], content);
        assert!(file.pieces.is_empty());
    }
}

#[test]
fn limits_hold() {
    let mut out = Writer::default();
    for n in 0..10 {
        out.file(&format!("name-{n}"), &[1; 1000]);
    }
    let tar = out.end();
    let fits = Limits {
        bytes: tar.len() as u64,
        entries: 10,
        names: 60,
    };
    assert!(unpack_with(&tar, 777, fits).is_ok());
    for (limits, why) in [
        (
            Limits {
                bytes: fits.bytes - 1,
                ..fits
            },
            "more than 16383 bytes",
        ),
        (
            Limits { entries: 9, ..fits },
            "beyond the limit of 9 entries",
        ),
        (Limits { names: 59, ..fits }, "more than 59 bytes"),
    ] {
        let error = unpack_with(&tar, 777, limits).unwrap_err();
        assert_eq!(error.kind(), ImageErrorKind::TooLarge);
        assert!(error.to_string().contains(why), "{error}");
    }
    // Neither a size nor a hole need be waited for.
    let mut out = Writer::default();
    let put = Put {
        name: b"a",
        ..Put::default()
    };
    out.put_with(&put, |block| number(&mut block[124..136], 1 << 50));
    let error = unpack(&out.0).unwrap_err();
    assert_eq!(error.kind(), ImageErrorKind::TooLarge);
    let mut out = Writer::default();
    out.pax(&[
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.realsize", b"9000000000000000000"),
    ]);
    let mut map = [0; BLOCK];
    map[..2].copy_from_slice(b"0\n");
    out.file("a", &map);
    let error = unpack(&out.end()).unwrap_err();
    assert_eq!(error.kind(), ImageErrorKind::TooLarge);
}

#[test]
fn a_sink_that_counts_wrong_is_noticed() {
    struct Wrong(usize);
    impl Sink for Wrong {
        type Error = ImageError;
        fn begin(&mut self, _: u64) -> Result<(), ImageError> {
            Ok(())
        }
        fn data(&mut self, _: &[u8]) -> Result<(), ImageError> {
            Ok(())
        }
        fn hole(&mut self, _: u64) -> Result<(), ImageError> {
            Ok(())
        }
        fn end(&mut self) -> Result<(), ImageError> {
            Ok(())
        }
        fn digests(&mut self) -> Result<Vec<Digest>, ImageError> {
            Ok(vec![Digest::of(b""); self.0])
        }
    }
    let mut out = Writer::default();
    out.file("a", b"x");
    let tar = out.end();
    for (count, right) in [(0, false), (1, true), (2, false)] {
        let mut unpacker = Unpacker::new(layer(), Limits::default());
        unpacker.feed(&tar, &mut Wrong(0)).unwrap();
        assert_eq!(unpacker.finish(&mut Wrong(count)).is_ok(), right);
    }
}

proptest! {
    #[test]
    fn any_members_give_clean_entries_within_bounds(
        members in proptest::collection::vec(
            (prop_oneof![Just(b'0'), Just(b'1'), Just(b'2'), Just(b'5')], "[./awh]{0,12}", "[./a]{0,8}", 0usize..2000),
            0..20,
        ),
        cut in 1usize..3000,
    ) {
        let mut out = Writer::default();
        for (flag, name, target, size) in &members {
            let data = vec![3; if *flag == b'0' { *size } else { 0 }];
            out.put(&Put { flag: *flag, name: name.as_bytes(), target: target.as_bytes(), data: &data, ..Put::default() });
        }
        let tar = out.end();
        let whole = unpack_with(&tar, usize::MAX, Limits::default());
        let pieces = unpack_with(&tar, cut, Limits::default());
        match (whole, pieces) {
            (Ok((entries, sink)), Ok((same, same_sink))) => {
                prop_assert_eq!(&entries, &same);
                prop_assert_eq!(sink.files, same_sink.files);
                for entry in entries {
                    prop_assert!(entry.path.is_empty() || entry.path.split(|&b| b == b'/')
                        .all(|name| !matches!(name, b"" | b"." | b"..")));
                }
            }
            (Err(one), Err(other)) => prop_assert_eq!(one, other),
            (one, other) => prop_assert!(false, "{:?} and {:?}", one, other),
        }
    }
}
