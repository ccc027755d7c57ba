//! What GNU tar writes, in each of its formats, is read as what lies on disk.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{MetadataExt, PermissionsExt},
    },
    path::Path,
    process::Command,
};

use hearth::{
    digest::Digest,
    image::{EntryKind, ImageError, LayerEntry, Limits, Unpacker},
};

use crate::digests::Digests;

/// A small generator, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % most
    }
}

fn unpack(tar: &[u8], random: &mut Random) -> Result<Vec<LayerEntry>, ImageError> {
    let mut sink = Digests::default();
    let mut unpacker = Unpacker::new(Digest::of(tar), Limits::default());
    let mut rest = tar;
    while !rest.is_empty() {
        let most = [3, 600, 70_000][random.below(3) as usize];
        let (piece, after) = rest.split_at((random.below(most) as usize + 1).min(rest.len()));
        unpacker.feed(piece, &mut sink)?;
        rest = after;
    }
    unpacker.finish(&mut sink)
}

fn make(root: &Path, random: &mut Random, longest: usize, with_holes: bool) {
    let mut dirs = vec![root.to_owned()];
    let mut files = Vec::new();
    for n in 0..120 {
        let dir = dirs[random.below(dirs.len() as u64) as usize].clone();
        let name = format!("{n}-{}", "x".repeat(random.below(longest as u64) as usize));
        let path = dir.join(name);
        match random.below(8) {
            0 | 1 => {
                fs::create_dir(&path).unwrap();
                dirs.push(path);
                continue;
            }
            2 => {
                let target = "t".repeat(random.below(longest as u64) as usize + 1);
                std::os::unix::fs::symlink(target, &path).unwrap();
                continue;
            }
            3 if !files.is_empty() => {
                let target: &std::path::PathBuf = &files[random.below(files.len() as u64) as usize];
                fs::hard_link(target, &path).unwrap();
                continue;
            }
            4 => nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap(),
            5 if with_holes => {
                let file = fs::File::create(&path).unwrap();
                let mut at = 0;
                for _ in 0..random.below(40) {
                    at += random.below(5) * 4096;
                    let data = vec![7; random.below(9000) as usize];
                    std::os::unix::fs::FileExt::write_all_at(&file, &data, at).unwrap();
                    at += data.len() as u64;
                }
                file.set_len(at + random.below(3) * 5000).unwrap();
            }
            _ => {
                let data: Vec<u8> = (0..random.below(5000))
                    .map(|_| random.below(256) as u8)
                    .collect();
                fs::write(&path, data).unwrap();
            }
        }
        let mode = fs::Permissions::from_mode(random.below(0o1000) as u32 | 0o600);
        fs::set_permissions(&path, mode).unwrap();
        files.push(path);
    }
}

fn check(root: &Path, tar: &[u8], entries: &[LayerEntry], nanoseconds: bool) {
    let mut inodes: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
    let mut seen = 0;
    for entry in entries {
        let path = root.join(std::ffi::OsStr::from_bytes(&entry.path));
        let found = fs::symlink_metadata(&path).unwrap();
        seen += 1;
        inodes.insert(entry.path.to_vec(), found.ino());
        let nanos = if nanoseconds {
            found.mtime_nsec() as u32
        } else {
            0
        };
        assert_eq!(entry.meta.mtime, (found.mtime(), nanos), "{path:?}");
        assert_eq!(
            u32::from(entry.meta.mode),
            found.mode() & 0o7777,
            "{path:?}"
        );
        assert_eq!((entry.meta.uid, entry.meta.gid), (found.uid(), found.gid()));
        match &entry.kind {
            EntryKind::Dir => assert!(found.is_dir()),
            EntryKind::File(content) => {
                let bytes = fs::read(&path).unwrap();
                assert_eq!(content.size, bytes.len() as u64);
                assert_eq!(content.digest, Digest::of(&bytes), "{path:?}");
                let whole = [(0, content.size)];
                let pieces = match content.pieces.is_empty() {
                    true => &whole,
                    false => &content.pieces[..],
                };
                let mut at = content.offset as usize;
                let mut rebuilt = vec![0; bytes.len()];
                for &(start, len) in pieces {
                    let (start, len) = (start as usize, len as usize);
                    rebuilt[start..start + len].copy_from_slice(&tar[at..at + len]);
                    at += len;
                }
                assert_eq!(rebuilt, bytes, "{path:?} by its offsets");
            }
            EntryKind::Symlink { target } => {
                assert_eq!(
                    fs::read_link(&path).unwrap().into_os_string().into_vec(),
                    **target
                );
            }
            EntryKind::Hardlink { target } => {
                assert_eq!(inodes[&**target], found.ino(), "{path:?}");
            }
            EntryKind::Fifo => assert_eq!(found.mode() & libc::S_IFMT, libc::S_IFIFO),
            other => panic!("{path:?}: {other:?}"),
        }
    }
    let found = Command::new("find")
        .arg(root)
        .arg("-printf")
        .arg("x")
        .output()
        .unwrap();
    assert_eq!(found.stdout.len(), seen, "nothing was left out");
}

#[test]
fn archives_of_gnu_tar_are_read_as_what_lies_on_disk() {
    let formats: [(&[&str], usize, bool); 7] = [
        (&["--format=v7"], 9, false),
        (&["--format=ustar"], 14, false),
        (&["--format=oldgnu", "--sparse"], 190, true),
        (&["--format=gnu", "--sparse"], 190, true),
        (
            &["--format=pax", "--sparse", "--sparse-version=0.0"],
            190,
            true,
        ),
        (
            &["--format=pax", "--sparse", "--sparse-version=0.1"],
            190,
            true,
        ),
        (
            &["--format=pax", "--sparse", "--sparse-version=1.0"],
            190,
            true,
        ),
    ];
    for (seed, (format, longest, with_holes)) in formats.into_iter().enumerate() {
        let mut random = Random(seed as u64 + 1);
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir(&root).unwrap();
        make(&root, &mut random, longest, with_holes && longest > 14);
        // v7 has no FIFOs.
        if format == ["--format=v7"] {
            let status = Command::new("find")
                .arg(&root)
                .args(["-type", "p", "-delete"])
                .status();
            assert!(status.unwrap().success());
        }
        let output = Command::new("tar")
            .args(format)
            .arg("-C")
            .arg(&root)
            .args(["-cf", "-", "."])
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{format:?}: {error}");
        let entries = unpack(&output.stdout, &mut random).unwrap();
        let has_pieces = entries
            .iter()
            .any(|e| matches!(&e.kind, EntryKind::File(f) if !f.pieces.is_empty()));
        assert_eq!(has_pieces, with_holes, "{format:?}");
        check(&root, &output.stdout, &entries, format[0] == "--format=pax");
    }
}

/// One line for each entry, or the error.
fn list(tar: &[u8], random: &mut Random) -> String {
    let entries = match unpack(tar, random) {
        Ok(entries) => entries,
        Err(error) => {
            let layer = format!("layer {}: ", Digest::of(tar));
            let error = error.to_string();
            return format!("  error: {}\n", error.strip_prefix(&layer).unwrap());
        }
    };
    let line = |entry: &LayerEntry| {
        let path = entry.path.escape_ascii();
        let what = match &entry.kind {
            EntryKind::File(file) => {
                let digest = &file.digest.hex()[..8];
                format!(
                    "file {} at {} {digest} {:?}",
                    file.size, file.offset, file.pieces
                )
            }
            EntryKind::Symlink { target } => format!("symlink {}", target.escape_ascii()),
            EntryKind::Hardlink { target } => format!("hard link {}", target.escape_ascii()),
            other => format!("{other:?}").to_lowercase(),
        };
        let meta = &entry.meta;
        let owner = (meta.uid, meta.gid);
        format!(
            "  {path}: {what} {:o} {owner:?} {:?}\n",
            meta.mode, meta.mtime
        )
    };
    entries.iter().map(line).collect()
}

/// `fixtures/tar/expected` says what is in each archive there. It was compared with `tar -tv`.
#[test]
fn the_corpus_is_read_as_it_was() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tar");
    let archives = fs::read_dir(&corpus).unwrap().map(|e| e.unwrap().path());
    let mut archives: Vec<_> = archives.filter(|p| p.extension().is_some()).collect();
    archives.sort();
    let mut random = Random(1);
    let mut found = String::new();
    for path in archives {
        let tar = fs::read(&path).unwrap();
        let listed = list(&tar, &mut random);
        assert_eq!(list(&tar, &mut random), listed, "{path:?} in other pieces");
        let name = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(
            name.starts_with("bad-"),
            listed.starts_with("  error"),
            "{name}: {listed}"
        );
        found.push_str(&format!("{name}\n{listed}"));
    }
    let expected = fs::read_to_string(corpus.join("expected")).unwrap_or_default();
    assert!(found == expected, "found:\n{found}");
}
