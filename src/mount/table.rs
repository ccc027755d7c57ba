//! The kernel's list of mounts, from `/proc/self/mountinfo` (proc_pid_mountinfo(5)). Reading it touches no mount.

use std::{
    ffi::OsString,
    io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// The type under which hearth mounts.
pub(super) const FSTYPE: &str = "fuse.hearth";

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountInfo {
    pub mountpoint: PathBuf,
    /// What it says it mounts.
    pub fsname: String,
    /// Number of the FUSE connection (`/sys/fs/fuse/connections/<n>`): the minor device number.
    pub connection: u32,
    fstype: String,
}

impl MountInfo {
    pub(super) fn is_hearth(&self) -> bool {
        self.fstype == FSTYPE
    }

    /// The type of its file system.
    pub(super) fn fstype(&self) -> &str {
        &self.fstype
    }
}

/// What hearth has mounted, in all processes that share this mount namespace.
///
/// # Errors
/// `/proc` that cannot be read.
pub fn mounted() -> io::Result<Vec<MountInfo>> {
    let mut list = all()?;
    list.retain(MountInfo::is_hearth);
    Ok(list)
}

/// The topmost mount on exactly `mountpoint`.
pub(super) fn find(mountpoint: &Path) -> io::Result<Option<MountInfo>> {
    Ok(all()?
        .into_iter()
        .rfind(|info| info.mountpoint == mountpoint))
}

/// Whether what is seen on `mountpoint` is this connection; also where that cannot be found out.
pub(super) fn shows(mountpoint: &Path, connection: u32) -> bool {
    find(mountpoint).map_or(true, |found| {
        found.is_some_and(|info| info.is_hearth() && info.connection == connection)
    })
}

/// All mounts.
pub(super) fn all() -> io::Result<Vec<MountInfo>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(text.split(|&b| b == b'\n').filter_map(parse).collect())
}

/// `36 35 0:42 / /mnt rw,noatime shared:1 - fuse.hearth hearth rw,user_id=0`
fn parse(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|&b| b == b' ');
    let device = fields.nth(2)?;
    let mountpoint = fields.nth(1)?;
    let mut tail = fields.skip_while(|f| *f != b"-").skip(1);
    let fstype = String::from_utf8_lossy(&unescape(tail.next()?)).into_owned();
    let fsname = String::from_utf8_lossy(&unescape(tail.next()?)).into_owned();
    let (_, minor) = std::str::from_utf8(device).ok()?.split_once(':')?;
    Some(MountInfo {
        mountpoint: OsString::from_vec(unescape(mountpoint)).into(),
        fsname,
        connection: minor.parse().ok()?,
        fstype,
    })
}

/// Undoes the kernel's `\040` for blanks, tabs, newlines and backslashes.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|digits| byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        if let Some(digits) = octal {
            let value = digits.iter().fold(0u32, |v, d| v * 8 + u32::from(d - b'0'));
            plain.push(value as u8);
            rest = &after[3..];
        } else {
            plain.push(byte);
            rest = after;
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_with_and_without_optional_fields() {
        let line = b"36 35 0:42 / /mnt/a\\040b\\134 ro,nosuid shared:1 master:2 - fuse.hearth hearth ro,user_id=0";
        let info = parse(line).unwrap();
        assert_eq!(info.mountpoint, Path::new("/mnt/a b\\"));
        assert_eq!((info.connection, &*info.fsname), (42, "hearth"));
        assert!(info.is_hearth());
        let info = parse(b"1 0 254:0 / / rw - ext4 /dev/vda rw").unwrap();
        assert!(!info.is_hearth());
        for bad in [
            &b""[..],
            b"1 2 3",
            b"1 0 254 / / rw - ext4 x",
            b"1 0 0:1 / /",
        ] {
            assert_eq!(parse(bad), None);
        }
    }
}
