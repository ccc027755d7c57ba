//! The disk: the only way by which the store changes files.
//!
//! [`Disk`] is a seam: [`RealDisk`] makes system calls; the crash tests wrap it and keep, beside
//! the live files, an image of what a power failure would leave. So everything that changes a file
//! or a directory, or makes it durable, goes through the trait. Reading, locking and mapping need
//! no seam: they go to the `std` file in [`DiskFile::file`].
//!
//! Called by the store alone. What survives a crash: data after [`DiskFile::sync_data`], names
//! after [`Disk::sync_dir`], both after [`DiskFile::sync_fs`]; a rename is atomic. Nothing else.

mod buf;
mod lock;
mod map;

pub use buf::AlignedBuf;
pub use lock::{Span, conflict, lock_file, lock_span, unlock_span};
pub use map::SharedMap;

use std::{
    ffi::OsString,
    fmt,
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsFd as _,
        unix::fs::{
            DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _,
            PermissionsExt as _,
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

/// What offset, length and address of a direct write must be multiples of, in bytes.
pub const DIRECT_ALIGN: usize = 4096;

/// Of complete objects: nobody writes them.
const COMPLETE_MODE: u32 = 0o444;

/// A failed operation on a file. Keeps the errno of the system.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {source}", path.display())]
pub struct DiskError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl DiskError {
    /// The failure of doing `what` (as in "cannot `what` the path").
    pub fn new(what: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> Self {
        Self {
            what,
            path: path.into(),
            source: source.into(),
        }
    }

    /// The errno, where the system gave one.
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// The file or directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn is(&self, errno: i32) -> bool {
        self.errno() == Some(errno)
    }
}

/// Whether it is the error of a disk that is full, or cannot be written any more: what it holds can
/// still be served.
pub fn takes_nothing(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(
        error.kind(),
        QuotaExceeded | ReadOnlyFilesystem | StorageFull
    )
}

/// The result of an operation on a file.
pub type Result<T> = std::result::Result<T, DiskError>;

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// To read; it must be there, a plain file: whoever brought a disk may have put a pipe there, which
    /// would never be opened, or a link to what is not on it.
    Read,
    /// As `Read`, but whoever opens it sees whether it is a plain file, with all else that there is to see of it
    /// ([`Stat::plain`]).
    Unseen,
    /// A directory, to sync what is below it.
    Dir,
    /// To read and write; it must be there.
    Write,
    /// To read and write; made, mode 0600, where it is not there.
    Create,
    /// To read and write; made, mode 0444 whatever the umask, and must not be there.
    New,
    /// To write past the page cache (`O_DIRECT`); it must be there.
    Direct,
}

/// What a path leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Length in bytes.
    pub len: u64,
    /// Bytes that its blocks take on the disk.
    pub disk: u64,
    /// Last modification.
    pub modified: SystemTime,
    /// Inode number.
    pub inode: u64,
    /// How many names it has.
    pub links: u64,
    /// Whether it is a plain file.
    pub plain: bool,
}

impl Stat {
    /// What is known of `file`.
    fn of(meta: &fs::Metadata) -> Self {
        Self {
            len: meta.len(),
            disk: meta.blocks() * 512,
            modified: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            inode: meta.ino(),
            links: meta.nlink(),
            plain: meta.is_file(),
        }
    }

    /// Refuses what is no plain file.
    ///
    /// # Errors
    /// As opening it to read.
    pub fn need_plain(&self, path: &Path) -> Result<()> {
        match self.plain {
            true => Ok(()),
            false => Err(DiskError::new(
                "open",
                path,
                io::Error::other("it is no plain file"),
            )),
        }
    }
}

/// Size of a file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// All of it.
    pub total: u64,
    /// What this user may still write.
    pub free: u64,
}

/// Files and directories. Every method names the path in its error.
pub trait Disk: Send + Sync + fmt::Debug {
    /// Opens a file.
    fn open(&self, path: &Path, how: Open) -> Result<Arc<dyn DiskFile>>;
    /// Atomically gives `from` the name `to`, replacing what is there.
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;
    /// Gives `from` the name `to`; false, and nothing changes, where `to` is there already.
    fn rename_new(&self, from: &Path, to: &Path) -> Result<bool>;
    /// Gives `from` the second name `to`; false where `to` is there already.
    fn link(&self, from: &Path, to: &Path) -> Result<bool>;
    /// Removes a file; false where there is none.
    fn unlink(&self, path: &Path) -> Result<bool>;
    /// Makes a directory, mode 0700; false where it is there already.
    fn create_dir(&self, path: &Path) -> Result<bool>;
    /// Removes an empty directory; false where there is none.
    fn remove_dir(&self, path: &Path) -> Result<bool>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> Result<()>;
    /// The names in a directory; none where it is not there.
    fn list(&self, path: &Path) -> Result<Vec<OsString>>;
    /// What `path` is; `None` where there is nothing.
    fn stat(&self, path: &Path) -> Result<Option<Stat>>;
    /// Sets the modification time of a file to now.
    fn touch(&self, path: &Path) -> Result<()>;
    /// Size of the file system of `path`.
    fn space(&self, path: &Path) -> Result<Space>;
    /// Whether files can be made in the directory `path`.
    fn writable(&self, path: &Path) -> bool;
    /// The id of this boot of the kernel: page cache survives until it changes.
    fn boot_id(&self) -> Result<[u8; 16]>;
}

/// An open file.
pub trait DiskFile: Send + Sync + fmt::Debug {
    /// The file, to read, lock or map it; never to change it.
    fn file(&self) -> &File;
    /// Writes all of `data` at `offset`.
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()>;
    /// Makes data and length durable.
    fn sync_data(&self) -> Result<()>;
    /// Makes everything on its file system durable, names too. Fails where anything could not be
    /// written since this file was opened or since the last call, so it is opened before what it
    /// is to sync is written (syncfs(2)).
    fn sync_fs(&self) -> Result<()>;
    /// Sets the length, in bytes; what is added is a hole.
    fn set_len(&self, len: u64) -> Result<()>;
    /// Reserves disk space for `len` bytes; nothing where the file system cannot.
    fn allocate(&self, len: u64) -> Result<()>;
    /// Sets the permission bits.
    fn set_mode(&self, mode: u32) -> Result<()>;
    /// What is known of it.
    fn stat(&self) -> Result<Stat>;
    /// Fills `buf` from `offset`.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;
}

/// Makes a directory, mode 0700, and those above it; their names are durable when this returns. False where it was
/// there.
///
/// # Errors
/// What the disk says.
pub fn make_all(disk: &dyn Disk, dir: &Path) -> Result<bool> {
    let Some(above) = dir.parent() else {
        return Ok(false);
    };
    if disk.stat(dir)?.is_some() {
        return Ok(false);
    }
    make_all(disk, above)?;
    let made = disk.create_dir(dir)?;
    disk.sync_dir(above)?;
    Ok(made)
}

/// The disk of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

#[derive(Debug)]
struct RealFile {
    file: File,
    path: PathBuf,
}

impl Disk for RealDisk {
    fn open(&self, path: &Path, how: Open) -> Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true).mode(0o600);
        match how {
            Open::Read | Open::Unseen => options.custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW),
            Open::Dir => options.custom_flags(libc::O_DIRECTORY),
            Open::Write => options.write(true),
            Open::Create => options.write(true).create(true),
            Open::New => options.write(true).create_new(true).mode(COMPLETE_MODE),
            Open::Direct => options.write(true).custom_flags(libc::O_DIRECT),
        };
        let file = options
            .open(path)
            .map_err(|e| DiskError::new("open", path, e))?;
        let path = path.to_owned();
        let file = RealFile { file, path };
        if how == Open::Read {
            file.stat()?.need_plain(&file.path)?;
        }
        if how == Open::New {
            let meta = file.file.metadata().map_err(file.fail("stat"))?;
            if meta.mode() & 0o7777 != COMPLETE_MODE {
                file.set_mode(COMPLETE_MODE)?;
            }
        }
        Ok(Arc::new(file))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        fs::rename(from, to).map_err(|e| DiskError::new("rename a file to", to, e))
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<bool> {
        let renamed = match rename_noreplace(from, to) {
            // The file system does not know how.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => match self.stat(to)? {
                Some(_) => return Ok(false),
                None => fs::rename(from, to),
            },
            other => other,
        };
        absent_ok(
            renamed.map_err(|e| DiskError::new("rename a file to", to, e)),
            libc::EEXIST,
        )
    }

    fn link(&self, from: &Path, to: &Path) -> Result<bool> {
        absent_ok(
            fs::hard_link(from, to).map_err(|e| DiskError::new("link", to, e)),
            libc::EEXIST,
        )
    }

    fn unlink(&self, path: &Path) -> Result<bool> {
        absent_ok(
            fs::remove_file(path).map_err(|e| DiskError::new("remove", path, e)),
            libc::ENOENT,
        )
    }

    fn create_dir(&self, path: &Path) -> Result<bool> {
        let made = fs::DirBuilder::new().mode(0o700).create(path);
        absent_ok(
            made.map_err(|e| DiskError::new("make directory", path, e)),
            libc::EEXIST,
        )
    }

    fn remove_dir(&self, path: &Path) -> Result<bool> {
        absent_ok(
            fs::remove_dir(path).map_err(|e| DiskError::new("remove directory", path, e)),
            libc::ENOENT,
        )
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        let synced = File::open(path).and_then(|dir| dir.sync_all());
        synced.map_err(|e| DiskError::new("sync directory", path, e))
    }

    fn list(&self, path: &Path) -> Result<Vec<OsString>> {
        let fail = |e| DiskError::new("list", path, e);
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(fail(e)),
        };
        entries
            .map(|entry| entry.map(|e| e.file_name()).map_err(fail))
            .collect()
    }

    fn stat(&self, path: &Path) -> Result<Option<Stat>> {
        match fs::symlink_metadata(path) {
            Ok(meta) => Ok(Some(Stat::of(&meta))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(DiskError::new("stat", path, e)),
        }
    }

    fn touch(&self, path: &Path) -> Result<()> {
        let touched = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
        touched.map_err(|e| DiskError::new("touch", path, e))
    }

    fn space(&self, path: &Path) -> Result<Space> {
        let stat = nix::sys::statvfs::statvfs(path)
            .map_err(|e| DiskError::new("ask for the free space of", path, e))?;
        Ok(Space {
            total: stat.blocks().saturating_mul(stat.fragment_size()),
            free: stat.blocks_available().saturating_mul(stat.fragment_size()),
        })
    }

    fn writable(&self, path: &Path) -> bool {
        nix::unistd::access(path, nix::unistd::AccessFlags::W_OK).is_ok()
    }

    fn boot_id(&self) -> Result<[u8; 16]> {
        let path = Path::new("/proc/sys/kernel/random/boot_id");
        let text = fs::read_to_string(path).map_err(|e| DiskError::new("read", path, e))?;
        let hex: String = text.trim().chars().filter(|&c| c != '-').collect();
        crate::digest::from_hex(&hex)
            .ok_or_else(|| DiskError::new("parse", path, io::ErrorKind::InvalidData))
    }
}

impl RealFile {
    fn fail(&self, what: &'static str) -> impl Fn(io::Error) -> DiskError + '_ {
        move |error| DiskError::new(what, &self.path, error)
    }
}

impl DiskFile for RealFile {
    fn file(&self) -> &File {
        &self.file
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.file
            .write_all_at(data, offset)
            .map_err(self.fail("write"))
    }

    fn sync_data(&self) -> Result<()> {
        self.file.sync_data().map_err(self.fail("sync"))
    }

    fn sync_fs(&self) -> Result<()> {
        let fail = self.fail("sync the file system of");
        nix::unistd::syncfs(&self.file).map_err(|e| fail(e.into()))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.file
            .set_len(len)
            .map_err(self.fail("set the length of"))
    }

    fn allocate(&self, len: u64) -> Result<()> {
        use nix::{
            errno::Errno,
            fcntl::{FallocateFlags, fallocate},
        };
        let fail = self.fail("reserve space for");
        let len = libc::off_t::try_from(len).map_err(|_| fail(Errno::EFBIG.into()))?;
        if len == 0 {
            return Ok(());
        }
        loop {
            match fallocate(self.file.as_fd(), FallocateFlags::empty(), 0, len) {
                Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(fail(e.into())),
            }
        }
    }

    fn set_mode(&self, mode: u32) -> Result<()> {
        self.file
            .set_permissions(fs::Permissions::from_mode(mode))
            .map_err(self.fail("change the mode of"))
    }

    fn stat(&self) -> Result<Stat> {
        let meta = self.file.metadata().map_err(self.fail("stat"))?;
        Ok(Stat::of(&meta))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file
            .read_exact_at(buf, offset)
            .map_err(self.fail("read"))
    }
}

/// `renameat2` with `RENAME_NOREPLACE`.
#[cfg(target_env = "gnu")]
fn rename_noreplace(from: &Path, to: &Path) -> io::Result<()> {
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE)?;
    Ok(())
}

/// Other C libraries may not have it.
#[cfg(not(target_env = "gnu"))]
fn rename_noreplace(_from: &Path, _to: &Path) -> io::Result<()> {
    Err(io::Error::from_raw_os_error(libc::EINVAL))
}

/// True for success, false for the one errno that says it was so already.
fn absent_ok(result: Result<()>, errno: i32) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(e) if e.is(errno) => Ok(false),
        Err(e) => Err(e),
    }
}
