//! Images of native roots, `roots/<digest of the artifact>.erofs`: what `mount::native` mounts.
//!
//! An image is made from its artifact alone, always the same, and never changed: before it is mounted it is
//! made once more and compared, since nothing else says whether the disk still has it as it was. The
//! kernel keeps it locked (shared flock) as long as its root is mounted anywhere, by whichever
//! process; that counts as holding the artifact. An image goes with its artifact.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::{Result, Store, StoreError, StoreErrorKind};
use crate::{
    digest::Digest,
    disk::{DiskFile, Open, Span, lock_file},
};

/// Appends to a file.
struct Appender<'f> {
    file: &'f dyn DiskFile,
    at: u64,
}

impl Write for Appender<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file
            .write_at(bytes, self.at)
            .map_err(|error| match error.errno() {
                Some(errno) => io::Error::from_raw_os_error(errno),
                None => io::Error::other(error),
            })?;
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Compares a file with what is written.
struct Comparer<'f> {
    file: &'f dyn DiskFile,
    at: u64,
    is_equal: bool,
    buf: Vec<u8>,
}

impl Write for Comparer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buf.resize(bytes.len(), 0);
        // What cannot be read is not equal.
        let read = self.file.read_at(&mut self.buf, self.at);
        self.is_equal &= read.is_ok() && self.buf == bytes;
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Store {
    /// The directory of complete objects, `sha256/<2 digits>/<64 digits>` below it.
    pub fn objects_dir(&self) -> PathBuf {
        self.root.join("objects")
    }

    /// Where the image of the root of artifact `digest` is or would be.
    pub fn root_image(&self, digest: &Digest) -> PathBuf {
        self.root.join(format!("roots/{}.erofs", digest.hex()))
    }

    /// The image of the root of artifact `digest`, made durable by `write` if it is not there yet, or is not
    /// what `write` writes any more. The caller holds the artifact, else the next collection may remove it.
    ///
    /// # Errors
    /// What `write` says, [`StoreErrorKind::Damaged`] where two of it are damaged and mounted,
    /// [`StoreErrorKind::ReadOnly`], and what the disk says.
    pub fn write_root_image(
        &self,
        digest: &Digest,
        write: impl Fn(&mut dyn Write) -> io::Result<()>,
    ) -> Result<PathBuf> {
        let path = self.root_image(digest);
        if self.disk.stat(&path)?.is_some() {
            if self.image_is_good(&path, &write)? {
                return Ok(path);
            }
            tracing::warn!(path = %path.display(), "the metadata of a root is damaged, or of another version: made anew");
            let (old, used) = (self.old_root_image(digest), self.is_locked(&path)?);
            if used && self.is_locked(&old)? {
                let message = format!(
                    "{} and an older one are damaged, and mounted",
                    path.display()
                );
                return Err(StoreError::new(StoreErrorKind::Damaged, message));
            }
            // Who runs on it keeps it, and its lock is still to be found.
            match used {
                true => self.disk.rename(&path, &old)?,
                false => drop(self.disk.unlink(&path)?),
            }
        }
        self.need_writable()?;
        self.make_parent(&path)?;
        let temp = self.temp_path();
        let make = || {
            let file = self.disk.open(&temp, Open::Create)?;
            let mut appender = Appender {
                file: &*file,
                at: 0,
            };
            write(&mut appender).map_err(|error| StoreError::io(path.display(), &error))?;
            file.sync_data()?;
            // Never over one that is there: it may be mounted, and its lock must stay to be found.
            self.disk.link(&temp, &path)?;
            self.disk.unlink(&temp)?;
            match path.parent() {
                Some(parent) => Ok(self.disk.sync_dir(parent)?),
                None => Ok(()),
            }
        };
        if let Err(error) = make() {
            // The first error says what is wrong; the rest goes with the next collection.
            let _ = self.disk.unlink(&temp);
            return Err(error);
        }
        Ok(path)
    }

    /// Whether an image is what `write` writes.
    fn image_is_good(
        &self,
        path: &Path,
        write: impl Fn(&mut dyn Write) -> io::Result<()>,
    ) -> Result<bool> {
        let file = self.disk.open(path, Open::Read)?;
        let mut comparer = Comparer {
            file: &*file,
            at: 0,
            is_equal: true,
            buf: Vec::new(),
        };
        write(&mut comparer).map_err(|error| StoreError::io(path.display(), &error))?;
        Ok(comparer.is_equal && file.stat()?.len == comparer.at)
    }

    /// Whether the root of artifact `digest` is mounted anywhere.
    pub(super) fn root_is_used(&self, digest: &Digest) -> Result<bool> {
        Ok(self.is_locked(&self.root_image(digest))?
            || self.is_locked(&self.old_root_image(digest))?)
    }

    /// Where an image is that was damaged while it was mounted.
    fn old_root_image(&self, digest: &Digest) -> PathBuf {
        self.root_image(digest).with_extension("old.erofs")
    }

    fn is_locked(&self, path: &Path) -> Result<bool> {
        let file = match self.disk.open(path, Open::Read) {
            Ok(file) => file,
            Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let free = lock_file(file.file(), Span::Exclusive, false);
        Ok(!free.map_err(|error| StoreError::io(path.display(), &error))?)
    }
}
