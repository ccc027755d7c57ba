//! Trees as they are shown.

use super::*;

/// A bit of everything that is odd, 12,000 files in all.
fn odd() -> Maker {
    let mut maker = Maker::new();
    for n in 0..10_000u32 {
        let path = format!("many/{}/file-{n}", n % 37);
        maker.file(&path, format!("content {}", n % 5000), meta(0o644));
    }
    for n in 0..2000 {
        let path = format!("wide/{n:04}-{}", "x".repeat(n % 240));
        maker.file(&path, Vec::new(), meta(0o600));
    }
    let deep: String = (0..60).map(|n| format!("d{n}/")).collect();
    maker.file(&format!("{deep}leaf"), "deep", meta(0o400));
    for name in [
        "!first", "-", "..data", "...", ".hidden", "~", "\n", "a b", "é",
    ] {
        maker.file(&format!("names/{name}"), name.to_owned(), meta(0o644));
    }
    maker.dir("names/+dir", meta(0o1777));
    maker.file(&format!("names/{}", "n".repeat(255)), "long", meta(0o644));
    for size in [1, 4095, 4096, 4097, 8192, 100_000, 3_000_000] {
        let content: Vec<u8> = (0..size).map(|n: u32| (n * 31 / 7) as u8).collect();
        maker.file(&format!("sizes/{size}"), content, meta(0o644));
    }
    maker.dir("empty", meta(0o700));
    let linked = maker.file("links/first", "linked", meta(0o644));
    for name in ["links/second", "names/third", "zz"] {
        maker.tree.link(name.as_bytes(), linked).unwrap();
    }
    let empty = maker.file("links/empty", "", meta(0o644));
    maker.tree.link(b"links/empty2", empty).unwrap();
    for len in [1, 59, 60, 1000, 2000, 4000, 4031, 4032, 4033, 4095] {
        maker.symlink(&format!("symlinks/{len}"), &"t".repeat(len));
    }
    maker.symlink("symlinks/dangling", "../../nowhere");
    let link = maker.symlink("symlinks/one", "target");
    maker.tree.link(b"symlinks/two", link).unwrap();
    let owned = |mode| Meta {
        uid: 4_000_000_000,
        gid: 70_000,
        mtime: (-5, 999_999_999),
        ..meta(mode)
    };
    maker.file("owned/suid", "x", owned(0o6755));
    maker.dir("owned/dir", owned(0o2775));
    let null = Kind::Char { major: 1, minor: 3 };
    maker.add("dev/null", null, owned(0o666));
    let (major, minor) = (300, 70_001);
    maker.add("dev/block", Kind::Block { major, minor }, meta(0o660));
    maker.add("dev/fifo", Kind::Fifo, meta(0o622));
    maker.add("dev/socket", Kind::Socket, meta(0o755));
    let acl = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0\x04\0\x04\0\xff\xff\xff\xff\x10\0\x06\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
    let capability = b"\x01\0\0\x02\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let xattrs = |list: &[(&str, &[u8])]| Meta {
        xattrs: list.iter().map(|(key, value)| xattr(key, value)).collect(),
        ..meta(0o664)
    };
    maker.file(
        "xattrs/user",
        "x",
        xattrs(&[("user.a", b"1"), ("user.b", b"")]),
    );
    maker.file(
        "xattrs/cap",
        "x",
        xattrs(&[("security.capability", capability)]),
    );
    maker.file(
        "xattrs/acl",
        "x",
        xattrs(&[("system.posix_acl_access", acl)]),
    );
    maker.file("xattrs/big", "", xattrs(&[("user.big", &[7; 3000])]));
    maker.file("xattrs/trusted", "x", xattrs(&[("trusted.t", b"t")]));
    maker.dir(
        "xattrs/dir",
        xattrs(&[("user.dir", &[1; 700]), ("trusted.d", b"")]),
    );
    maker
}

#[test]
fn a_root_is_its_tree() {
    let bed = odd().finish();
    let root = bed.mount();
    let plain = bed.plain();
    assert_same(&list(&bed.path("root")), &list(&plain));
    // The tools of the format have nothing to say against it.
    run(Command::new("fsck.erofs").arg(bed.image()));
    let said = run(Command::new("dump.erofs").arg("-s").arg(bed.image()));
    assert!(said.contains("0xE0F5E1E2"), "{said}");
    drop(root);
    assert_eq!(fs::read_dir(bed.path("root")).unwrap().count(), 0);
    assert_freed(&bed.image());
}

#[test]
fn a_container_on_top_sees_and_does_what_it_does_on_a_plain_directory() {
    // What overlayfs keeps in user space's names, and what it copies up, is the same.
    const DEEDS: &str = r#"
        cd "$1"
        echo more >> sizes/4096; : > sizes/8192; chmod 4711 owned/suid; chown 5:6 many/3/file-3
        rm -r many/5 zz; rm links/second; mkdir many/5; echo new > many/5/new
        mv many/7 moved; mv names/..data wide/; ln links/first links/again
        ln -s x symlinks/new; rmdir empty; mv dev/fifo dev/pipe
        touch -h -d @1000000000 symlinks/1; cp --preserve=all xattrs/cap xattrs/copy; rm -r wide/000*
        find . -newermt @1750000000 -exec touch -h -d @1500000000 {} +
    "#;
    let bed = odd().finish();
    let _root = bed.mount();
    let plain = bed.plain();
    let on_plain = bed.container(&plain, "over-plain");
    let on_root = bed.container(&bed.path("root"), "stacked");
    // Names that would have to be escaped.
    let (metadata, objects) = (bed.path("meta:data, \\"), bed.path("the: objects"));
    fs::create_dir(&metadata).unwrap();
    std::os::unix::fs::symlink(bed.objects(), &objects).unwrap();
    let _metadata = native::mount_metadata(&bed.image(), &metadata).unwrap();
    let support = native::available(&bed.path("store")).unwrap();
    let mut containers = vec![&on_root, &on_plain];
    let on_metadata;
    if support == native::Support::Direct {
        let lower = native::lowerdir(&metadata, &objects);
        on_metadata = bed.container_over(&lower, "direct");
        containers.push(&on_metadata);
    }
    let untouched = list(&on_plain.root);
    for container in &containers {
        assert_same(&list(&container.root), &untouched);
        shell(DEEDS, &container.root);
    }
    for container in &containers {
        assert_same(&list(&container.root), &list(&on_plain.root));
    }
    // Below, nothing has changed.
    assert_same(&list(&bed.path("root")), &list(&plain));
    let error = fs::write(bed.path("root/new"), "x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
}

fn any_meta() -> impl Strategy<Value = Meta> {
    // What ext4 can store.
    let time = (-2_147_483_648i64..8_000_000_000, 0u32..1_000_000_000);
    let attribute = ("[a-z.]{1,20}", prop::collection::vec(any::<u8>(), 0..120));
    let xattrs = prop::collection::btree_map(attribute.0, attribute.1, 0..4);
    (0u16..0o10000, any::<u16>(), any::<u32>(), time, xattrs).prop_map(
        |(mode, uid, gid, mtime, list)| Meta {
            mode,
            uid: uid.into(),
            gid: gid.min(u32::MAX - 1),
            mtime,
            xattrs: list
                .iter()
                .map(|(key, value)| xattr(&format!("trusted.{key}"), value))
                .collect(),
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn random_trees_are_shown_as_they_are(
        entries in prop::collection::vec(
            (prop::collection::vec("[a-d.+~]{1,3}|[a-z]{250}", 1..5), 0u8..7, any::<u32>(), any_meta()), 0..60)
    ) {
        let mut maker = Maker::new();
        let mut files = Vec::new();
        for (path, kind, number, mut meta) in entries {
            let path = path.join("/");
            let kind = match kind {
                0 => Kind::Dir { parent: 0, entries: Vec::new() },
                1 => Kind::Symlink { target: path.repeat(1 + number as usize % 12).into_bytes().into() },
                2 => Kind::Char { major: 1 + number % 4095, minor: number >> 12 },
                3 => Kind::Fifo,
                4 => {
                    if let Some(&file) = files.get(number as usize % files.len().max(1)) {
                        let _ = maker.tree.link(path.as_bytes(), file);
                    }
                    continue;
                }
                _ => Kind::File { object: maker.objects.len() as u32 },
            };
            let is_file = matches!(kind, Kind::File { .. });
            if matches!(kind, Kind::Symlink { .. }) {
                meta.mode = 0o777;
            }
            if let Ok(inode) = maker.tree.add(path.as_bytes(), kind.clone(), meta) {
                if !matches!(kind, Kind::Dir { .. }) {
                    files.push(inode);
                }
                if is_file {
                    let content = number.to_le_bytes().repeat(number as usize % 3000);
                    maker.objects.push(Object {
                        id: ObjectId::Sha256(Digest::of(&content)),
                        size: content.len() as u64,
                        git_sha1: None,
                        recipe: Recipe::Raw(Location { path, generation: None, offset: 0 }),
                    });
                    maker.contents.push(content.into());
                }
            }
        }
        let bed = maker.finish();
        let _root = bed.mount();
        assert_same(&list(&bed.path("root")), &list(&bed.plain()));
    }
}

#[test]
fn what_overlayfs_would_take_for_its_own_is_shown_or_left_out() {
    let mut maker = Maker::new();
    let own = Meta {
        xattrs: vec![
            xattr("trusted.overlay.opaque", b"y"),
            xattr("trusted.overlay.redirect", b"/etc"),
            xattr("system.unknown", b"x"),
        ],
        ..meta(0o755)
    };
    maker.dir("dir", own.clone());
    maker.file("dir/file", "content", own);
    let gone = Kind::Char { major: 0, minor: 0 };
    maker.add("dir/gone", gone, meta(0o600));
    let bed = maker.finish();
    let _root = bed.mount();
    let found = list(&bed.path("root"));
    assert_eq!(found.lines().count(), 3, "{found}");
    for line in found.lines().skip(1) {
        assert!(line.contains("'trusted.overlay.opaque', b'y'"), "{line}");
        assert!(
            line.contains("'trusted.overlay.redirect', b'/etc'"),
            "{line}"
        );
        assert!(!line.contains("unknown"), "{line}");
    }
}
