//! What is mounted: the kernel's list, `/proc/self/mountinfo` (proc_pid_mountinfo(5)), and of one directory statx(2),
//! whatever else is mounted on the node. Neither asks a server.

use std::{
    ffi::{CString, OsString},
    io,
    mem::MaybeUninit,
    os::unix::ffi::{OsStrExt as _, OsStringExt},
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
pub fn shows(mountpoint: &Path, connection: u32) -> bool {
    let is_it = |info: &MountInfo| info.is_hearth() && info.connection == connection;
    match top(mountpoint) {
        Some(top) => top == Top::Device(0, connection),
        None => all_on(mountpoint).map_or(true, |on_it| on_it.last().is_some_and(is_it)),
    }
}

/// The FUSE connections that hearth has mounted on exactly `target`, the topmost last. The list of mounts, which may be
/// long, is read only where something is mounted there.
///
/// # Errors
/// As [`mounted`].
pub fn stack(target: &Path) -> io::Result<Vec<u32>> {
    if top(target) == Some(Top::Nothing) {
        return Ok(Vec::new());
    }
    let on_it = all_on(target)?.into_iter().filter(MountInfo::is_hearth);
    Ok(on_it.map(|info| info.connection).collect())
}

/// All mounts on exactly `target`, by whichever name of its parent; the topmost is the last.
fn all_on(target: &Path) -> io::Result<Vec<MountInfo>> {
    // Without a look at what is mounted on it.
    let real = target
        .parent()
        .and_then(|parent| parent.canonicalize().ok())
        .zip(target.file_name())
        .map(|(parent, name)| parent.join(name));
    let real = real.as_deref().unwrap_or(target);
    let mut list = all()?;
    list.retain(|info| info.mountpoint == real);
    Ok(list)
}

/// What is seen on a directory.
#[derive(Debug, PartialEq, Eq)]
enum Top {
    /// Nothing is mounted on it, or it is not there.
    Nothing,
    /// Major and minor number of what is mounted on it: 0 and the connection, of FUSE.
    Device(u32, u32),
}

/// What is seen on `path`; `None` where the kernel does not say (before 5.8).
fn top(path: &Path) -> Option<Top> {
    let name = CString::new(path.as_os_str().as_bytes()).ok()?;
    // What the kernel has at hand, and no attribute: a server that is dead or stuck is not asked.
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT | libc::AT_STATX_DONT_SYNC;
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: `name` ends with a zero byte, and `found` has room for what is written.
    let done = unsafe { libc::statx(libc::AT_FDCWD, name.as_ptr(), flags, 0, found.as_mut_ptr()) };
    if done != 0 {
        let is_missing = io::Error::last_os_error().kind() == io::ErrorKind::NotFound;
        return is_missing.then_some(Top::Nothing);
    }
    // SAFETY: all of its fields are numbers, and it was zeroed.
    let found = unsafe { found.assume_init() };
    let root = libc::STATX_ATTR_MOUNT_ROOT as u64;
    if found.stx_attributes_mask & root == 0 {
        return None;
    }
    Some(match found.stx_attributes & root {
        0 => Top::Nothing,
        _ => Top::Device(found.stx_dev_major, found.stx_dev_minor),
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
    fn what_is_seen_on_a_directory_is_what_the_list_says() {
        let device = |path: &str| top(Path::new(path));
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let proc = text.lines().rfind(|line| line.contains(" /proc ")).unwrap();
        let (major, minor) = proc.split(' ').nth(2).unwrap().split_once(':').unwrap();
        let expected = Top::Device(major.parse().unwrap(), minor.parse().unwrap());
        assert_eq!(device("/proc"), Some(expected));
        assert_eq!(device("/proc/self/.."), device("/proc"));
        assert_eq!(device("/proc/self"), Some(Top::Nothing));
        assert_eq!(device("/proc/self/status"), Some(Top::Nothing));
        assert_eq!(device("/no/such/directory"), Some(Top::Nothing));
        let on_it = all_on(Path::new("/proc/self/../../proc")).unwrap();
        assert_eq!(on_it.last().unwrap().fstype(), "proc");
        assert!(stack(Path::new("/proc")).unwrap().is_empty());
    }

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
