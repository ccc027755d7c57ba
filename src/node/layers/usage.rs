//! What a layer takes where it is unpacked by itself, as containerd would say it of a snapshot on ext4.

use std::collections::HashMap;

use crate::image::{EntryKind, LayerIndex};

const BLOCK: u64 = 4096;
/// Shorter targets of symlinks lie in the inode.
const INLINE: usize = 60;

/// What is at one path.
enum Taken {
    /// With so many bytes of entries.
    Dir(u64),
    Bytes(u64),
    /// Another name of an inode that is counted where it is.
    Nothing,
}

/// An empty directory, which has two entries.
const DIR: Taken = Taken::Dir(24);

/// Bytes of the blocks, and inodes.
pub(super) fn of(index: &LayerIndex) -> (u64, u64) {
    let mut paths = HashMap::from([(&[][..], DIR)]);
    for entry in &index.entries {
        let taken = match &entry.kind {
            EntryKind::Dir | EntryKind::Opaque => DIR,
            EntryKind::File(content) => Taken::Bytes(content.size.div_ceil(BLOCK) * BLOCK),
            EntryKind::Symlink { target } if target.len() >= INLINE => Taken::Bytes(BLOCK),
            EntryKind::Hardlink { .. } => Taken::Nothing,
            _ => Taken::Bytes(0),
        };
        put(&mut paths, &entry.path, taken);
    }
    let mut sum = (0u64, 0u64);
    for taken in paths.values() {
        let bytes = match taken {
            Taken::Nothing => continue,
            Taken::Bytes(bytes) => *bytes,
            Taken::Dir(names) if *names <= BLOCK - 12 => BLOCK,
            // Its blocks are split in halves when they are full, and a root is above them.
            Taken::Dir(names) => BLOCK + (names * 3 / 2).div_ceil(BLOCK) * BLOCK,
        };
        sum = (sum.0.saturating_add(bytes), sum.1 + 1);
    }
    sum
}

/// Puts something at `path`, instead of what is there, and the directories above it, which a layer may
/// only imply.
fn put<'l>(paths: &mut HashMap<&'l [u8], Taken>, path: &'l [u8], taken: Taken) {
    let (mut path, mut taken) = (path, taken);
    loop {
        match (paths.get_mut(path), &taken) {
            (Some(Taken::Dir(_)), Taken::Dir(_)) => return,
            (Some(before), _) => {
                *before = taken;
                return;
            }
            (None, _) => paths.insert(path, taken),
        };
        let (above, name) = match path.iter().rposition(|&b| b == b'/') {
            Some(at) => (&path[..at], path.len() - at - 1),
            None => (&path[..0], path.len()),
        };
        let entry = (8 + name as u64).next_multiple_of(4);
        if let Some(above) = paths.get_mut(above) {
            if let Taken::Dir(names) = above {
                *names += entry;
            }
            return;
        }
        (path, taken) = (above, Taken::Dir(24 + entry));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        digest::Digest, image::Compression, image::FileContent, image::LayerEntry, tree::Meta,
    };

    fn usage(entries: &[(&str, EntryKind)]) -> (u64, u64) {
        let entries = entries.iter().map(|(path, kind)| LayerEntry {
            path: path.as_bytes().into(),
            kind: kind.clone(),
            meta: Meta::file(0),
        });
        of(&LayerIndex {
            blob: Digest::of(b""),
            blob_size: 0,
            compression: Compression::None,
            diff_id: Digest::of(b""),
            size: 0,
            entries: entries.collect(),
            spans: Vec::new(),
        })
    }

    fn file(size: u64) -> EntryKind {
        EntryKind::File(FileContent {
            size,
            digest: Digest::of(b""),
            offset: 0,
            pieces: Vec::new(),
        })
    }

    #[test]
    fn the_root_and_what_is_implied_count_and_nothing_counts_twice() {
        assert_eq!(usage(&[]), (4096, 1));
        let app = [("etc", EntryKind::Dir), ("etc/app/c", file(1))];
        assert_eq!(usage(&app), (4 * 4096, 4));
        let link = |len: usize| EntryKind::Symlink {
            target: vec![b'x'; len].into(),
        };
        let target = || EntryKind::Hardlink {
            target: b"a"[..].into(),
        };
        let twice = [
            ("a", file(9000)),
            ("a", file(5000)),
            ("d/same", target()),
            ("d", EntryKind::Dir),
            ("short", link(59)),
            ("long", link(60)),
            ("gone", EntryKind::Whiteout),
        ];
        // The root, a, d and long; short and the whiteout have no blocks.
        assert_eq!(usage(&twice), (4096 + 8192 + 4096 + 4096, 6));
        let names: Vec<_> = (0..300).map(|n| format!("{n:023}")).collect();
        let many: Vec<_> = names.iter().map(|name| (name.as_str(), file(0))).collect();
        assert_eq!(usage(&many), (5 * 4096, 301));
    }
}
