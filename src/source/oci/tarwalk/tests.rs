use proptest::prelude::*;

use super::*;

pub(super) fn header(path: &str, kind: u8, size: u64, target: &str) -> [u8; 512] {
    let mut block = [0; 512];
    let mut set = |at: usize, text: &[u8]| block[at..at + text.len()].copy_from_slice(text);
    set(0, path.as_bytes());
    set(100, b"0000755\0");
    set(124, format!("{size:011o}\0").as_bytes());
    set(136, format!("{:011o} ", 1_700_000_000).as_bytes());
    set(156, &[kind]);
    set(157, target.as_bytes());
    set(257, b"ustar\x0000");
    sum(block)
}

fn sum(mut block: [u8; 512]) -> [u8; 512] {
    block[148..156].copy_from_slice(b"        ");
    let sum: u64 = block.iter().map(|&b| u64::from(b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

fn extension(kind: u8, data: &[u8]) -> Vec<u8> {
    let mut out = header("x", kind, data.len() as u64, "").to_vec();
    out.extend(data);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn pax(key: &str, value: &str) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    format!("{len} {key}={value}\n").into_bytes()
}

/// Walks a tar, and counts the reads.
fn walk(tar: &[u8], most: usize) -> Result<(Vec<Member>, usize), TarError> {
    let mut walk = TarWalk::new(tar.len() as u64, most);
    let mut reads = 0;
    while let Some(range) = walk.wants()? {
        assert!(!range.is_empty() && range.end <= tar.len() as u64);
        walk.take(&tar[range.start as usize..range.end as usize])?;
        reads += 1;
    }
    Ok((walk.members(), reads))
}

fn paths(tar: &[u8]) -> Vec<String> {
    let (members, _) = walk(tar, 100).unwrap();
    members.into_iter().map(|m| m.path).collect()
}

#[test]
fn the_corpus() {
    crate::corpus::replay("tar", |input| {
        let _ = walk(input, 1000);
    });
}

#[test]
fn members_are_found_by_a_few_reads() {
    let big = vec![7; 3 << 20];
    let tar = tar(&[
        ("a", b"1"),
        ("./d//b", &big),
        ("c", b""),
        ("e", &big),
        ("f", b"xy"),
    ]);
    let (members, reads) = walk(&tar, 100).unwrap();
    assert!(reads <= 3, "{reads}");
    let found: Vec<_> = members.iter().map(|m| (&*m.path, &m.kind)).collect();
    let file = |offset, size| MemberKind::File { offset, size };
    assert_eq!(found[0], ("a", &file(512, 1)));
    assert_eq!(found[1], ("d/b", &file(1536, 3 << 20)));
    assert_eq!(found[2].0, "c");
    assert_eq!(members[0].mode, 0o755);
    assert_eq!(members[0].mtime, 1_700_000_000);
    for member in &members {
        let MemberKind::File { offset, size } = member.kind else {
            panic!("a file");
        };
        let data = &tar[offset as usize..(offset + size) as usize];
        assert!(data.iter().all(|&b| b != 0), "{}", member.path);
    }
    // Without the zeros at the end, and without the last padding.
    for cut in [tar.len() - 1024, tar.len() - 1024 - 510] {
        assert_eq!(walk(&tar[..cut], 100).unwrap().0, members);
    }
    assert_eq!(walk(&tar, 4), Err(TarError::TooMany(4)));
    let many: Vec<_> = (0..20_000).map(|n| format!("{n:05}")).collect();
    let many: Vec<_> = many.iter().map(|name| (&**name, &b"content"[..])).collect();
    let (members, reads) = walk(&super::tar(&many), 20_000).unwrap();
    assert_eq!(members.len(), 20_000);
    assert!(reads < 20, "{reads}");
}

#[test]
fn long_names_sizes_and_links_are_read() {
    let long = "l/".repeat(200) + "end";
    let mut tar = extension(b'L', format!("{long}\0").as_bytes());
    tar.extend(header("cut", b'0', 0, ""));
    tar.extend(extension(
        b'x',
        &[
            pax("path", "p\u{e4}th"),
            pax("size", "3"),
            pax("mtime", "-5.25"),
        ]
        .concat(),
    ));
    tar.extend(header("ignored", b'0', 0, ""));
    tar.extend(b"abc".iter().chain(&[0; 509]));
    tar.extend(extension(b'g', &pax("comment", "hello")));
    tar.extend(header("dir/", b'5', 0, ""));
    tar.extend(header("old/", 0, 0, ""));
    tar.extend(extension(b'K', b"far/away\0"));
    tar.extend(header("link", b'2', 0, "near"));
    tar.extend(header("hard", b'1', 9, "./p\u{e4}th"));
    let (members, _) = walk(&tar, 100).unwrap();
    let short: Vec<_> = members.iter().map(|m| (&*m.path, &m.kind)).collect();
    assert_eq!(
        short[0],
        (
            long.as_str(),
            &MemberKind::File {
                offset: 512 * 3,
                size: 0
            }
        )
    );
    assert_eq!(
        short[1],
        (
            "p\u{e4}th",
            &MemberKind::File {
                offset: 512 * 6,
                size: 3
            }
        )
    );
    assert_eq!(members[1].mtime, -5);
    assert_eq!(short[2], ("dir", &MemberKind::Dir));
    assert_eq!(short[3], ("old", &MemberKind::Dir));
    let target = |text: &str| text.to_owned();
    assert_eq!(
        short[4].1,
        &MemberKind::Symlink {
            target: target("far/away")
        }
    );
    assert_eq!(
        short[5].1,
        &MemberKind::Hardlink {
            target: target("p\u{e4}th")
        }
    );
    // The prefix of ustar, and a size in base 256.
    let mut block = header("name", b'0', 0, "");
    block[345..348].copy_from_slice(b"pre");
    block[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1]);
    let mut tar = sum(block).to_vec();
    tar.resize(512 + 1024, 1);
    let (members, _) = walk(&tar, 1).unwrap();
    assert_eq!(members[0].path, "pre/name");
    assert_eq!(
        members[0].kind,
        MemberKind::File {
            offset: 512,
            size: 513
        }
    );
    assert_eq!(paths(&[0; 1024]), Vec::<String>::new());
    assert_eq!(paths(b""), Vec::<String>::new());
}

#[test]
fn who_reads_all_of_it_has_what_is_too_scattered_to_be_read_in_place() {
    const MEMBER: u64 = 200 << 10;
    let mut walk = TarWalk::new(10_000 * (512 + MEMBER), 20_000);
    let refused = loop {
        match walk.wants() {
            Ok(Some(range)) => {
                let mut bytes = header("a", b'0', MEMBER, "").to_vec();
                bytes.resize((range.end - range.start) as usize, 1);
                walk.take(&bytes).unwrap();
            }
            Ok(None) => panic!("it was walked"),
            Err(error) => break error,
        }
    };
    assert_eq!(refused, TarError::TooScattered);
    assert!(refused.is_of_place() && TarError::TooMany(1).is_of_place());
}

#[test]
fn what_cannot_be_read_in_place_is_refused() {
    let sparse = extension(b'x', &pax("GNU.sparse.major", "1"));
    let global = extension(b'g', &pax("path", "all"));
    let mut wrong_sum = header("a", b'0', 0, "");
    wrong_sum[0] = b'b';
    for (tar, why) in [
        (header("/a", b'0', 0, "").to_vec(), "absolute"),
        (header("a", b'S', 0, "").to_vec(), "sparse"),
        (header("a", b'3', 0, "").to_vec(), "device"),
        (header("a", b'6', 0, "").to_vec(), "device"),
        (header("a", b'Z', 0, "").to_vec(), "unknown"),
        (header("a", b'0', 1, "").to_vec(), "beyond the end"),
        (
            header("a", b'0', 0o777_7777_7777, "").to_vec(),
            "beyond the end",
        ),
        (header("a", b'x', 0, "").to_vec(), "empty or too long"),
        (header("a", b'L', 2 << 20, "").to_vec(), "empty or too long"),
        ([sparse, vec![0; 512]].concat(), "sparse"),
        ([global, vec![0; 512]].concat(), "global"),
        (
            [&extension(b'L', &[b'n'; 5000])[..], &[b'x'; 512]].concat(),
            "checksum",
        ),
        (
            [
                &extension(b'L', &[b'n'; 5000])[..],
                &header("a", b'0', 0, ""),
            ]
            .concat(),
            "longer than 4096",
        ),
        (
            [
                &extension(b'K', &[b'n'; 5000])[..],
                &header("a", b'2', 0, ""),
            ]
            .concat(),
            "longer than 4095",
        ),
        (extension(b'x', b"nonsense"), "malformed"),
        (extension(b'x', b"5 a=b\n"), "malformed"),
        (extension(b'x', &pax("path", "a")), "after an extension"),
        (wrong_sum.to_vec(), "checksum"),
        (vec![b'x'; 700], "checksum"),
        (header("a", b'0', 0, "")[..300].to_vec(), "cut short"),
        (
            [&header("a", b'0', 0, "")[..], b"more"].concat(),
            "cut short",
        ),
    ] {
        let error = walk(&tar, 100).unwrap_err().to_string();
        assert!(error.contains(why), "{error} ({why})");
    }
}

proptest! {
    #[test]
    fn nonsense_is_refused_without_panic(
        blocks in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
        tail in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let mut tar = super::tar(&[("a", b"hello"), ("b/c", &[1; 2000])]);
        tar.splice(512..512, extension(b'x', &pax("path", "other")));
        for (at, byte) in blocks {
            let at = at.index(tar.len());
            tar[at] = byte;
        }
        tar.truncate(cut.index(tar.len()));
        tar.extend(tail);
        if let Ok((members, _)) = walk(&tar, 100) {
            for member in members {
                if let MemberKind::File { offset, size } = member.kind {
                    prop_assert!(offset + size <= tar.len() as u64);
                }
            }
        }
    }

    #[test]
    fn numbers_do_not_panic(field in prop::collection::vec(any::<u8>(), 0..13)) {
        let _ = number(&field);
        let _ = pax_record(&field);
    }
}
