//! Names of unix sockets: private before anybody can connect, replaced at once, removed by whoever has them.

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use nix::errno::Errno;

use super::packet;

/// The name of a socket; removed when dropped, unless somebody has replaced it.
#[derive(Debug)]
pub struct Name {
    path: PathBuf,
    inode: u64,
}

impl Name {
    /// Has `bind` make a listening socket, and calls it `path`, mode 0600, in place of whatever socket nobody
    /// listens on. Makes the directory, mode 0711.
    pub(super) fn take<T>(
        path: &Path,
        bind: impl FnOnce(&Path) -> io::Result<T>,
    ) -> io::Result<(T, Self)> {
        match fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(io::Error::from(io::ErrorKind::AlreadyExists));
            }
            Ok(_) if is_live(path) => return Err(io::Error::from(io::ErrorKind::AddrInUse)),
            _ => {}
        }
        Self::replace(path, bind)
    }

    /// As [`Name::take`], also from whoever listens there: clients that come now are ours, those that came
    /// before are theirs, and none is refused.
    pub(super) fn replace<T>(
        path: &Path,
        bind: impl FnOnce(&Path) -> io::Result<T>,
    ) -> io::Result<(T, Self)> {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let dir = dir.unwrap_or(Path::new("."));
        DirBuilder::new().recursive(true).mode(0o711).create(dir)?;
        // The other name may be longer than a socket's, so it is reached through the directory.
        let opened = File::open(dir)?;
        let (process, number) = (std::process::id(), LAST.fetch_add(1, Relaxed));
        let new = format!(
            "/proc/self/fd/{}/.hearth.{process}.{number}",
            opened.as_raw_fd()
        );
        let new = Path::new(&new);
        let _ = fs::remove_file(new);
        let bound = bind(new)?;
        let named = fs::set_permissions(new, Permissions::from_mode(0o600))
            .and_then(|()| fs::symlink_metadata(new))
            .and_then(|meta| fs::rename(new, path).map(|()| meta.ino()));
        match named {
            Ok(inode) => {
                let path = path.to_owned();
                Ok((bound, Self { path, inode }))
            }
            Err(error) => {
                let _ = fs::remove_file(new);
                Err(error)
            }
        }
    }

    /// The name of a socket that another process has bound, and does not remove.
    ///
    /// # Errors
    /// There is no socket.
    pub(super) fn adopt(path: &Path) -> io::Result<Self> {
        let meta = fs::symlink_metadata(path)?;
        match meta.file_type().is_socket() {
            true => Ok(Self {
                path: path.to_owned(),
                inode: meta.ino(),
            }),
            false => Err(io::Error::from(io::ErrorKind::AlreadyExists)),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it still names the socket.
    pub(super) fn is_there(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|meta| meta.ino() == self.inode)
    }

    /// Leaves it: another process has the socket.
    pub fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        // Not one that took its place.
        if self.is_there() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether somebody listens on `path`.
fn is_live(path: &Path) -> bool {
    match packet::dial(path) {
        Ok(_) => true,
        // A socket of another type is alive, too.
        Err(error) => error.raw_os_error() == Some(Errno::EPROTOTYPE as i32),
    }
}
