use proptest::prelude::*;

use self::wants::wants;
use super::{
    write::{Put, Writer, number, sum},
    *,
};
use crate::image::ImageErrorKind;

/// A member with its content, holes filled in.
type Read = (Member, Vec<u8>);

/// Parses `tar` in pieces of the given sizes, over and over.
fn read(tar: &[u8], cuts: &[usize]) -> Result<Vec<Read>, ImageError> {
    let mut parser = Parser::new();
    let mut found: Vec<Read> = Vec::new();
    let mut open = false;
    let mut cuts = cuts.iter().cycle();
    let mut rest = tar;
    while !rest.is_empty() {
        let cut = cuts
            .next()
            .map_or(rest.len(), |cut| (*cut).clamp(1, rest.len()));
        let (mut piece, after) = rest.split_at(cut);
        rest = after;
        while let Some(event) = parser.event(&mut piece)? {
            match event {
                Event::Member(member) => {
                    assert!(!open);
                    open = member.kind == MemberKind::File;
                    found.push((*member, Vec::new()));
                }
                Event::Data(data) => {
                    assert!(open && !data.is_empty());
                    found.last_mut().unwrap().1.extend_from_slice(data);
                }
                Event::Hole(len) => {
                    assert!(open && len > 0);
                    let content = &mut found.last_mut().unwrap().1;
                    content.resize(content.len() + len as usize, 0);
                }
                Event::End => {
                    assert!(open);
                    open = false;
                    let (member, content) = found.last().unwrap();
                    assert_eq!(member.size, content.len() as u64);
                }
            }
        }
        assert!(piece.is_empty());
        assert_eq!(parser.offset(), (tar.len() - rest.len()) as u64);
    }
    parser.finish()?;
    Ok(found)
}

fn one(tar: &[u8]) -> Read {
    let mut found = read(tar, &[]).unwrap();
    assert_eq!(found.len(), 1);
    found.remove(0)
}

fn error(tar: &[u8]) -> ImageError {
    read(tar, &[]).unwrap_err()
}

mod wants;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn what_was_written_is_read_in_pieces_of_any_size(
        mut wants in wants(),
        cuts in proptest::collection::vec(prop_oneof![1usize..20, 1usize..2000], 1..8),
    ) {
        let mut out = Writer::default();
        let mut expected = Vec::new();
        for want in &mut wants {
            want.settle();
            expected.push((want.write(&mut out), want.content().0));
        }
        let tar = out.end();
        prop_assert_eq!(&read(&tar, &[]).unwrap(), &expected);
        prop_assert_eq!(&read(&tar, &cuts).unwrap(), &expected);
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(
        bytes in proptest::collection::vec(any::<u8>(), 0..3000),
        cuts in proptest::collection::vec(1usize..700, 1..4),
    ) {
        let _ = read(&bytes, &cuts);
    }

    /// Damage that a checksum does not show.
    #[test]
    fn damaged_archives_do_no_harm(
        mut wants in wants(),
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..12),
        cut in any::<proptest::sample::Index>(),
    ) {
        let mut out = Writer::default();
        for want in &mut wants {
            want.settle();
            want.write(&mut out);
        }
        let mut tar = out.end();
        for (at, byte) in damage {
            let at = at.index(tar.len());
            tar[at] = byte;
            let block = at / BLOCK * BLOCK;
            if let Some(block) = tar[block..].first_chunk_mut::<BLOCK>() {
                sum(block);
            }
        }
        tar.truncate(cut.index(tar.len() + 1));
        // Holes can be of any size: follow the events, but fill in nothing.
        let mut parser = Parser::new();
        let mut rest = &tar[..];
        while let Ok(Some(_)) = parser.event(&mut rest) {}
    }
}

#[test]
fn an_archive_may_end_in_many_ways() {
    let mut out = Writer::default();
    out.file("a", b"content");
    let bare = out.0.clone();
    let expected = read(&bare, &[]).unwrap();
    assert_eq!(expected.len(), 1);
    let zeros = |blocks: usize| [&bare[..], &vec![0; blocks * BLOCK]].concat();
    for blocks in 0..5 {
        assert_eq!(read(&zeros(blocks), &[]).unwrap(), expected);
    }
    let trailing = [&zeros(2)[..], b"whatever follows the end"].concat();
    assert_eq!(read(&trailing, &[]).unwrap(), expected);
    assert_eq!(
        read(&bare[..BLOCK + 7], &[]).unwrap(),
        expected,
        "in the padding"
    );
    assert_eq!(read(b"", &[]).unwrap(), []);
    assert!(
        error(&bare[..BLOCK + 6])
            .to_string()
            .contains("ends within a file")
    );
    assert!(
        error(&bare[..BLOCK - 1])
            .to_string()
            .contains("ends within a header")
    );
    assert!(
        error(&[&zeros(1)[..], &bare].concat())
            .to_string()
            .contains("block of zeros")
    );
}

#[test]
fn a_wrong_checksum_is_an_error_and_signed_sums_are_not() {
    let mut out = Writer::default();
    out.put(&Put {
        name: b"\xe4\xf6",
        ..Put::default()
    });
    let mut tar = out.end();
    let unsigned: i64 = tar[..BLOCK].iter().map(|&b| i64::from(b)).sum();
    let signed: i64 = tar[..BLOCK].iter().map(|&b| i64::from(b as i8)).sum();
    let difference = unsigned - signed;
    let written = i64::from_str_radix(str::from_utf8(&tar[148..154]).unwrap(), 8).unwrap();
    tar[148..154].copy_from_slice(format!("{:06o}", written - difference).as_bytes());
    assert_eq!(one(&tar).0.path, b"\xe4\xf6");
    tar[148..154].copy_from_slice(format!("{:06o}", written - 1).as_bytes());
    assert!(
        error(&tar)
            .to_string()
            .starts_with("header at byte 0: its checksum is wrong")
    );
}

#[test]
fn names_of_old_archivers() {
    // A prefix, of ustar and of Go's broken GNU headers.
    for gnu in [false, true] {
        let mut out = Writer::default();
        let put = Put {
            name: b"name",
            gnu,
            ..Put::default()
        };
        out.put_with(&put, |block| block[345..351].copy_from_slice(b"prefix"));
        assert_eq!(one(&out.end()).0.path, b"prefix/name", "gnu: {gnu}");
    }
    // GNU headers with times where the prefix would be.
    let mut out = Writer::default();
    let put = Put {
        name: b"name",
        gnu: true,
        ..Put::default()
    };
    out.put_with(&put, |block| {
        block[345..357].copy_from_slice(b"12345670123\0")
    });
    assert_eq!(one(&out.end()).0.path, b"name");
    // A directory of v7 is a file with a slash; its size means nothing.
    for (flag, kind) in [(0, MemberKind::Dir), (b'0', MemberKind::File)] {
        let mut out = Writer::default();
        let put = Put {
            name: b"dir/",
            flag,
            ..Put::default()
        };
        out.put_with(&put, |block| block[257..265].fill(0));
        assert_eq!(one(&out.end()).0.kind, kind);
    }
    // An empty PAX value means that of the header; a later record counts.
    let mut out = Writer::default();
    out.pax(&[
        (b"path", b"long"),
        (b"path", b""),
        (b"uid", b""),
        (b"gid", b"1"),
        (b"gid", b"2"),
    ]);
    out.file("short", b"");
    let member = one(&out.end()).0;
    assert_eq!(
        (&member.path[..], member.uid, member.gid),
        (&b"short"[..], 0, 2)
    );
}

#[test]
fn global_headers_are_ignored() {
    let mut out = Writer::default();
    out.pax(&[(b"path", b"global"), (b"size", b"99")]);
    let at = 156;
    out.0[at] = b'g';
    let block = out.0.first_chunk_mut().unwrap();
    sum(block);
    out.file("a", b"content");
    let (member, content) = one(&out.end());
    assert_eq!(
        (&member.path[..], &content[..]),
        (&b"a"[..], &b"content"[..])
    );
}

#[test]
fn links_and_directories_have_no_data_whatever_their_size_says() {
    for flag in *b"123456" {
        let mut out = Writer::default();
        let put = Put {
            flag,
            name: b"a",
            target: b"b",
            ..Put::default()
        };
        out.put_with(&put, |block| number(&mut block[124..136], 5000));
        out.file("after", b"x");
        assert_eq!(read(&out.end(), &[]).unwrap().len(), 2);
    }
}

#[test]
fn bad_headers_are_errors() {
    type Change = fn(&mut [u8; BLOCK]);
    let cases: [(Change, &str); 8] = [
        (|b| number(&mut b[124..136], -1), "size is negative"),
        (
            |b| b[124..136].copy_from_slice(b"nonsense\0\0\0\0"),
            "size is not a number",
        ),
        (
            |b| number(&mut b[108..116], -1),
            "owner is not a 32-bit number",
        ),
        (
            |b| number(&mut b[116..124], 1 << 32),
            "owner is not a 32-bit number",
        ),
        (|b| b[100] = b'9', "mode is not a number"),
        (
            |b| b[124..136].copy_from_slice(b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff"),
            "size is not a number",
        ),
        (|b| b[156] = b'Z', "members of type 'Z' are not supported"),
        (|b| b[156] = b'S', "the header is not"),
    ];
    for (change, why) in cases {
        let mut out = Writer::default();
        out.put_with(
            &Put {
                name: b"a",
                ..Put::default()
            },
            change,
        );
        let error = error(&out.end()).to_string();
        assert!(error.contains(why), "{error}");
    }
    let mut out = Writer::default();
    let put = Put {
        flag: b'3',
        name: b"a",
        ..Put::default()
    };
    out.put_with(&put, |b| number(&mut b[329..337], -1));
    assert!(error(&out.end()).to_string().contains("device number"));
    for records in [
        (&b"size"[..], &b"-1"[..]),
        (b"size", b"99999999999999999999"),
        (b"uid", b"x"),
        (b"mtime", b"1.x"),
        (b"path", b"a\0b"),
        (b"a\0b", b"c"),
        (b"GNU.sparse.numbytes", b"1"),
    ] {
        let mut out = Writer::default();
        out.pax(&[records]);
        out.file("a", b"");
        assert_eq!(
            error(&out.end()).kind(),
            ImageErrorKind::Invalid,
            "{records:?}"
        );
    }
}

#[test]
fn a_header_of_any_size_is_not_kept() {
    for flag in *b"xLK" {
        let mut out = Writer::default();
        let put = Put {
            flag,
            ..Put::default()
        };
        out.put_with(&put, |block| number(&mut block[124..136], 1 << 40));
        assert_eq!(error(&out.end()).kind(), ImageErrorKind::TooLarge);
    }
    let mut out = Writer::default();
    out.pax(&[(b"size", b"9223372036854775807")]);
    out.file("a", b"");
    assert!(error(&out.end()).to_string().contains("ends within a file"));
}

#[test]
fn sparse_maps_that_lie_are_errors() {
    for (map, count, size, stored) in [
        ("0,5,3,5", "2", "10", 10),
        ("0,5", "2", "10", 5),
        ("0,5,7", "1", "10", 5),
        ("0,5", "1", "4", 5),
        ("0,5", "1", "10", 6),
        ("0,5", "1", "9999999999999999999", 5),
        ("18446744073709551615,5", "1", "10", 5),
        ("0,x", "1", "10", 5),
        ("", "1", "10", 0),
    ] {
        let mut out = Writer::default();
        out.pax(&[
            (b"GNU.sparse.major", b"0"),
            (b"GNU.sparse.minor", b"1"),
            (b"GNU.sparse.map", map.as_bytes()),
            (b"GNU.sparse.numblocks", count.as_bytes()),
            (b"GNU.sparse.size", size.as_bytes()),
        ]);
        out.file("a", &vec![1; stored]);
        let error = error(&out.end());
        assert_eq!(error.kind(), ImageErrorKind::Invalid, "{map}");
        assert!(error.to_string().starts_with("entry \"a\": "), "{error}");
    }
    for map in [
        "",
        "\n",
        "1\n0\n",
        "x\n",
        "99999999999999999999999\n",
        "18446744073709551615\n",
        "-1\n",
    ] {
        let mut out = Writer::default();
        out.pax(&[
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.realsize", b"10"),
        ]);
        out.file("a", map.as_bytes());
        let error = error(&out.end());
        assert!(
            error.to_string().starts_with("entry \"a\": its sparse map"),
            "{error}"
        );
    }
    // More pieces than anyone needs.
    let mut out = Writer::default();
    out.pax(&[
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.realsize", b"10"),
    ]);
    let mut map = format!("{}\n", MAX_PIECES + 1);
    map.push_str(&"0\n0\n".repeat(MAX_PIECES + 1));
    out.file("a", map.as_bytes());
    assert_eq!(error(&out.end()).kind(), ImageErrorKind::TooLarge);
}

#[test]
fn content_comes_as_slices_of_the_input() {
    let mut out = Writer::default();
    let content = vec![7; 100_000];
    out.file("a", &content);
    let tar = out.end();
    let mut parser = Parser::new();
    let mut rest = &tar[..];
    assert!(matches!(
        parser.event(&mut rest),
        Ok(Some(Event::Member(_)))
    ));
    let Ok(Some(Event::Data(data))) = parser.event(&mut rest) else {
        panic!("no data");
    };
    assert_eq!(
        data.as_ptr_range(),
        tar[BLOCK..BLOCK + content.len()].as_ptr_range()
    );
    assert_eq!(parser.event(&mut rest), Ok(Some(Event::End)));
    assert_eq!(parser.event(&mut rest), Ok(None));
}
