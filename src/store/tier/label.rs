//! Disks by the label of their file system, and where they are mounted.
//!
//! The label is read from the superblocks of all block devices: no daemon has to have seen the disk
//! before. One that is mounted nowhere is mounted in `<store>/run/tiers/<device>`, read-only and without
//! replaying a journal: nothing is written to it. What has lost its disk is unmounted there.

use std::{
    fs::{self, File},
    io,
    os::unix::{ffi::OsStringExt as _, fs::FileExt as _},
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{
    disk::{Span, lock_file},
    store::run_dir,
};

const DEVICES: &str = "/sys/class/block";
/// As much of a device as all superblocks lie in, in bytes.
const HEAD: usize = 2048;

/// A disk, or a partition of one.
#[derive(Debug, PartialEq, Eq)]
struct Device {
    /// As the kernel calls it.
    name: String,
    /// As in `8:1`.
    number: String,
    kind: Kind,
}

/// File systems that tiers are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ext4,
    Xfs,
    Erofs,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Erofs => "erofs",
        }
    }

    /// A journal is not replayed; two disks of one image are two disks.
    const fn options(self) -> &'static str {
        match self {
            Self::Ext4 => "noload",
            Self::Xfs => "norecovery,nouuid",
            Self::Erofs => "",
        }
    }
}

/// Where file systems with this label are mounted, in the order of their devices. Those that are mounted
/// nowhere are mounted for the store `root`, where there is one.
///
/// # Errors
/// Says why there may be such a disk that is of no use.
pub(super) fn mounted(label: &str, root: Option<&Path>) -> Result<Vec<PathBuf>, String> {
    if let Some(root) = root {
        release(&root.join("run/tiers"));
    }
    let (devices, unreadable) = devices(label).map_err(|error| format!("{DEVICES}: {error}"))?;
    let mut places = Vec::new();
    let mut failed = unreadable.filter(|_| devices.is_empty());
    for device in devices {
        let mut mounts = mounts().map_err(|error| format!("the list of mounts: {error}"))?;
        mounts.retain(|(number, _)| *number == device.number);
        let place = match (mounts.into_iter().next(), root) {
            (Some((_, place)), _) => Ok(place),
            (None, Some(root)) => attach(&device, root),
            (None, None) => Err("only a store that can be written mounts it".into()),
        };
        match place {
            Ok(place) => places.push(place),
            Err(why) => {
                let Device { name, kind, .. } = device;
                let kind = kind.name();
                failed = Some(format!("/dev/{name} ({kind}) cannot be mounted: {why}"));
            }
        }
    }
    match failed {
        Some(why) if places.is_empty() => Err(why),
        _ => Ok(places),
    }
}

/// The devices with this label; and why one could not be looked at, if so.
fn devices(label: &str) -> io::Result<(Vec<Device>, Option<String>)> {
    let mut found = Vec::new();
    let mut unreadable = None;
    let mut names: Vec<_> = fs::read_dir(DEVICES)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<_>>()?;
    names.sort();
    for name in names {
        let about = Path::new(DEVICES).join(&name);
        let read = |what: &str| fs::read_to_string(about.join(what)).unwrap_or_default();
        // Nothing in it; or a part of another device, which has the same label.
        let is_part =
            fs::read_dir(about.join("holders")).is_ok_and(|mut list| list.next().is_some());
        if read("size").trim() == "0" || is_part {
            continue;
        }
        let Some(name) = name.to_str().map(|name| name.replace('!', "/")) else {
            continue;
        };
        let mut head = [0; HEAD];
        let looked = File::open(Path::new("/dev").join(&name))
            .and_then(|device| device.read_exact_at(&mut head, 0));
        match looked {
            Ok(()) => {
                if let Some((kind, has)) = probe(&head)
                    && has == label.as_bytes()
                {
                    let number = read("dev").trim().to_owned();
                    found.push(Device { name, number, kind });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                unreadable = Some(format!(
                    "no disk has it that this user may look at (/dev/{name}: {error}): mount it, and name its directory by path"
                ));
            }
            // No medium, or failing: it has no tier.
            Err(_) => {}
        }
    }
    Ok((found, unreadable))
}

/// The file system that begins with these bytes, and its label.
fn probe(head: &[u8; HEAD]) -> Option<(Kind, &[u8])> {
    let label = |at: usize, len: usize| {
        let bytes = &head[at..at + len];
        bytes.split(|byte| *byte == 0).next().unwrap_or_default()
    };
    // Documentation/filesystems/{ext4/super.rst, xfs} and fs/erofs/erofs_fs.h of Linux.
    if head.starts_with(b"XFSB") {
        Some((Kind::Xfs, label(108, 12)))
    } else if head[1024 + 56..].starts_with(&[0x53, 0xef]) {
        Some((Kind::Ext4, label(1024 + 120, 16)))
    } else if head[1024..].starts_with(&[0xe2, 0xe1, 0xf5, 0xe0]) {
        Some((Kind::Erofs, label(1024 + 64, 16)))
    } else {
        None
    }
}

/// Number of the device and directory of every mount of a whole file system.
fn mounts() -> io::Result<Vec<(String, PathBuf)>> {
    let text = fs::read("/proc/self/mountinfo")?;
    let lines = text.split(|byte| *byte == b'\n');
    Ok(lines.filter_map(parse_mount).collect())
}

/// proc(5), "/proc/[pid]/mountinfo"
fn parse_mount(line: &[u8]) -> Option<(String, PathBuf)> {
    let mut fields = line.split(|byte| *byte == b' ').skip(2);
    let (number, root, place) = (fields.next()?, fields.next()?, fields.next()?);
    let number = std::str::from_utf8(number).ok()?.to_owned();
    (root == b"/").then(|| {
        (
            number,
            PathBuf::from(std::ffi::OsString::from_vec(unescape(place))),
        )
    })
}

/// Spaces and the like are three octal digits after a backslash.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let escaped = (text[at] == b'\\')
            .then(|| text.get(at + 1..at + 4))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.push(escaped.unwrap_or(text[at]));
        at += if escaped.is_some() { 4 } else { 1 };
    }
    plain
}

/// Mounts a device read-only below the store, unless another process has just done that.
fn attach(device: &Device, root: &Path) -> Result<PathBuf, String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("only root can; or mount it, and it is found there".into());
    }
    let io = |error: io::Error| error.to_string();
    let tiers = run_dir(root).map_err(io)?.join("tiers");
    let dir = tiers.join(device.name.replace('/', "!"));
    fs::create_dir_all(&dir).map_err(io)?;
    let dir = dir.canonicalize().map_err(io)?;
    let lock = File::create(tiers.join("lock")).map_err(io)?;
    lock_file(&lock, Span::Exclusive, true).map_err(io)?;
    for (number, place) in mounts().map_err(io)? {
        if number == device.number {
            return Ok(place);
        }
        if place == dir {
            umount2(&dir, MntFlags::MNT_DETACH).map_err(|error| error.to_string())?;
        }
    }
    let (flags, kind) = (
        MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        device.kind,
    );
    let source = Path::new("/dev").join(&device.name);
    mount(
        Some(&source),
        &dir,
        Some(kind.name()),
        flags,
        Some(kind.options()),
    )
    .map_err(|error| format!("{error}: is it whole, and does this kernel know what is in it?"))?;
    tracing::info!(device = %source.display(), dir = %dir.display(), "mounted for its label");
    Ok(dir)
}

/// Unmounts what is mounted below `tiers` and has lost its disk. Who has files of it open keeps them.
fn release(tiers: &Path) {
    let known = Path::new("/sys/dev/block");
    // As the kernel names it.
    let (Ok(tiers), Ok(mounts), true) = (tiers.canonicalize(), mounts(), known.exists()) else {
        return;
    };
    for (number, place) in mounts {
        if place.parent() == Some(&*tiers) && !known.join(&number).exists() {
            match umount2(&place, MntFlags::MNT_DETACH) {
                Ok(()) => {
                    // Where it is not empty, somebody mounts the next one there.
                    let _ = fs::remove_dir(&place);
                }
                Err(error) => {
                    tracing::warn!(dir = %place.display(), %error, "a tier that has lost its disk stays mounted");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_found_in_superblocks() {
        let blank = [0; HEAD];
        assert_eq!(probe(&blank), None);
        let mut xfs = blank;
        xfs[..4].copy_from_slice(b"XFSB");
        xfs[108..120].copy_from_slice(b"twelve bytes");
        assert_eq!(probe(&xfs), Some((Kind::Xfs, &b"twelve bytes"[..])));
        let mut ext4 = blank;
        ext4[1080..1082].copy_from_slice(&[0x53, 0xef]);
        ext4[1144..1150].copy_from_slice(b"hearth");
        assert_eq!(probe(&ext4), Some((Kind::Ext4, &b"hearth"[..])));
        let mut erofs = blank;
        erofs[1024..1028].copy_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
        assert_eq!(probe(&erofs), Some((Kind::Erofs, &b""[..])));
    }

    #[test]
    fn mounts_are_read_as_the_kernel_writes_them() {
        let line = br"36 35 98:0 / /mnt/a\040b\134c rw,noatime master:1 - ext3 /dev/root rw";
        let found = parse_mount(line).unwrap();
        assert_eq!(found, ("98:0".to_owned(), PathBuf::from(r"/mnt/a b\c")));
        assert_eq!(
            parse_mount(b"36 35 98:0 /sub /mnt rw - ext3 /dev/root rw"),
            None
        );
        assert_eq!(parse_mount(b"36 35"), None);
    }
}
