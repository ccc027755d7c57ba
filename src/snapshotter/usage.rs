//! What a directory takes on the disk, counted as containerd does (continuity's `fs.DiskUsage`).

use std::{collections::HashSet, fs, io, os::unix::fs::MetadataExt as _, path::Path};

use super::Usage;

/// Bytes of the blocks, and inodes, of `dir` and all below it. What vanishes meanwhile is not
/// counted: a container may be running on it.
pub(super) fn disk_usage(dir: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    // Only files with several names can be met twice.
    let mut linked = HashSet::new();
    let mut left = vec![dir.to_owned()];
    count(&fs::symlink_metadata(dir)?, &mut usage, &mut linked);
    while let Some(dir) = left.pop() {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let meta = match entry.metadata() {
                Ok(meta) => meta,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            count(&meta, &mut usage, &mut linked);
            if meta.is_dir() {
                left.push(entry.path());
            }
        }
    }
    Ok(usage)
}

fn count(meta: &fs::Metadata, usage: &mut Usage, linked: &mut HashSet<(u64, u64)>) {
    if !meta.is_dir() && meta.nlink() > 1 && !linked.insert((meta.dev(), meta.ino())) {
        return;
    }
    usage.bytes += meta.blocks() * 512;
    usage.inodes += 1;
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn it_is_what_du_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("a/b")).unwrap();
        fs::write(path("a/big"), vec![1; 300_000]).unwrap();
        fs::write(path("a/b/small"), b"x").unwrap();
        fs::hard_link(path("a/big"), path("a/b/again")).unwrap();
        std::os::unix::fs::symlink("/nowhere", path("link")).unwrap();
        let sparse = fs::File::create(path("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        let usage = disk_usage(dir.path()).unwrap();
        assert_eq!(usage.inodes, 7);
        let mut command = Command::new("du");
        let du = command.args(["-s", "-B1"]).arg(dir.path()).output();
        let du = String::from_utf8(du.unwrap().stdout).unwrap();
        assert_eq!(du.split('\t').next(), Some(&*usage.bytes.to_string()));
        assert!(disk_usage(&path("none")).is_err());
    }
}
