//! One file of an import: gathered, hashed, written, given to the import at its end.

use std::{fmt, sync::Arc};

use sha2::{Digest as _, Sha256};

use super::{FILE_COST, IN_MEMORY, Import, Inner, MAX_PENDING, Pending, State};
use crate::{
    digest::Digest,
    disk::{DiskFile, Open},
    metrics,
    store::{MAX_OBJECT, Result, StoreError, StoreErrorKind},
};

/// Content that is too large for memory is gathered to writes of this many bytes.
const WRITE: usize = 1 << 20;
/// Bytes that are reserved at once beyond what was: each time the store may be walked.
const RESERVE: u64 = 64 << 20;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

impl Import {
    /// Begins a file of `size` bytes.
    ///
    /// # Errors
    /// [`StoreErrorKind::Invalid`] for more than [`MAX_OBJECT`] bytes, [`StoreErrorKind::NoSpace`],
    /// and what the disk says.
    pub fn begin(&self, size: u64) -> Result<ImportFile> {
        self.begin_file(size, Some(Sha256::new()))
    }

    /// Begins a file of `size` bytes whose digest the caller makes, for [`ImportFile::finish_as`].
    ///
    /// # Errors
    /// As [`Import::begin`].
    pub fn begin_unhashed(&self, size: u64) -> Result<ImportFile> {
        self.begin_file(size, None)
    }

    fn begin_file(&self, size: u64, hasher: Option<Sha256>) -> Result<ImportFile> {
        if size > MAX_OBJECT {
            let message = format!("a file of {size} bytes is longer than a file can be");
            return Err(StoreError::new(StoreErrorKind::Invalid, message));
        }
        let inner = Arc::clone(&self.inner);
        let buffer = std::mem::take(&mut inner.state.lock().spare);
        let mut file = ImportFile {
            hasher,
            size,
            at: 0,
            buffer,
            buffer_at: 0,
            file: None,
            counted: 0,
            inner,
        };
        if size > IN_MEMORY {
            let inner = &file.inner;
            let temp = inner.next_temp();
            let open = inner.store.disk.open(&inner.temp_path(temp), Open::New);
            file.file = Some((temp, open?));
        }
        Ok(file)
    }
}

/// One file of an import, written from its start to its end; dropped before, it is forgotten.
#[must_use = "nothing is stored before it is finished"]
pub struct ImportFile {
    inner: Arc<Inner>,
    hasher: Option<Sha256>,
    size: u64,
    /// Bytes so far.
    at: u64,
    /// The last of them, that lie at `buffer_at` of the file.
    buffer: Vec<u8>,
    buffer_at: u64,
    /// The number of the temporary file, of content that is too large for memory.
    file: Option<(u64, Arc<dyn DiskFile>)>,
    /// Bytes that were taken off the reservation.
    counted: u64,
}

impl fmt::Debug for ImportFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImportFile")
            .field("size", &self.size)
            .field("at", &self.at)
            .finish_non_exhaustive()
    }
}

impl ImportFile {
    /// Appends `data`.
    ///
    /// # Errors
    /// [`StoreErrorKind::Invalid`] beyond the size that it began with, [`StoreErrorKind::NoSpace`],
    /// and what the disk says.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        let end = self.end(data.len() as u64)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(data);
        }
        self.make_room(data.len())?;
        match self.file.is_some() && data.len() >= WRITE {
            true => self.write_out(data)?,
            false => self.buffer.extend_from_slice(data),
        }
        self.at = end;
        Ok(())
    }

    /// Appends `len` zeros; they take no space on the disk where that is worth it.
    ///
    /// # Errors
    /// As [`ImportFile::write`].
    pub fn hole(&mut self, len: u64) -> Result<()> {
        let end = self.end(len)?;
        let zeros = |take: u64| &ZEROS[..take.min(ZEROS.len() as u64) as usize];
        if let Some(hasher) = &mut self.hasher {
            let mut left = len;
            while left > 0 {
                hasher.update(zeros(left));
                left -= zeros(left).len() as u64;
            }
        }
        match self.file.is_some() && len >= ZEROS.len() as u64 {
            true => {
                self.flush()?;
                self.buffer_at += len;
            }
            false => {
                self.make_room(len as usize)?;
                self.buffer.resize(self.buffer.len() + len as usize, 0);
            }
        }
        self.at = end;
        Ok(())
    }

    /// Ends the file: its digest and size. It is durable, and complete, after [`Import::commit`].
    ///
    /// # Errors
    /// [`StoreErrorKind::Invalid`] where it is shorter than it was to be or was begun unhashed,
    /// [`StoreErrorKind::NoSpace`], and what the disk says.
    pub fn finish(mut self) -> Result<(Digest, u64)> {
        let Some(hasher) = self.hasher.take() else {
            let message = "a file that was not hashed ends without a digest";
            return Err(StoreError::new(StoreErrorKind::Invalid, message));
        };
        let digest = Digest::from_bytes(hasher.finalize().into());
        self.end_as(digest)?;
        Ok((digest, self.size))
    }

    /// As [`ImportFile::finish`], for a file whose digest is known. Of one that was begun
    /// unhashed the caller knows that it is right.
    ///
    /// # Errors
    /// As [`ImportFile::finish`], and [`StoreErrorKind::Damaged`] where it is not the digest of
    /// what was hashed.
    pub fn finish_as(mut self, digest: Digest) -> Result<()> {
        if let Some(hasher) = self.hasher.take() {
            let found = Digest::from_bytes(hasher.finalize().into());
            if found != digest {
                let message = format!("content that should be {digest} is {found}");
                return Err(StoreError::new(StoreErrorKind::Damaged, message));
            }
        }
        self.end_as(digest)
    }

    /// The end after `more` bytes.
    fn end(&self, more: u64) -> Result<u64> {
        let end = self.at.checked_add(more).filter(|end| *end <= self.size);
        end.ok_or_else(|| {
            let message = format!("a file goes on after its {} bytes", self.size);
            StoreError::new(StoreErrorKind::Invalid, message)
        })
    }

    fn end_as(&mut self, digest: Digest) -> Result<()> {
        if self.at != self.size {
            let message = format!("a file of {} bytes ends after {}", self.size, self.at);
            return Err(StoreError::new(StoreErrorKind::Invalid, message));
        }
        if let Some((_, file)) = &self.file {
            let file = Arc::clone(file);
            self.flush()?;
            if file.stat()?.len != self.size {
                // It ends with a hole.
                file.set_len(self.size)?;
            }
        }
        if self.file.is_none() {
            self.reserve(self.size)?;
        }
        let inner = Arc::clone(&self.inner);
        let mut state = inner.state.lock();
        state.usable()?;
        if !inner.here(&mut state, &digest, self.size)? {
            self.give(&mut state, digest)?;
        }
        state.done.files += 1;
        state.done.bytes += self.size;
        self.count(self.size);
        self.counted = 0;
        self.buffer.clear();
        state.spare = std::mem::take(&mut self.buffer);
        if state.pending.len() >= MAX_PENDING {
            inner.commit(&mut state)?;
        }
        Ok(())
    }

    /// Gives the content to the import, which does not have it.
    fn give(&mut self, state: &mut State, digest: Digest) -> Result<()> {
        let (inner, size) = (&self.inner, self.size);
        let (temp, cost) = match self.file.take() {
            Some((temp, _)) => (temp, FILE_COST),
            None => {
                let temp = inner.next_temp();
                let path = inner.temp_path(temp);
                inner.store.write_object(&path, &self.buffer)?;
                metrics::global().store_written_bytes.add(size);
                (temp, FILE_COST + size)
            }
        };
        state.pending.insert(digest, Pending { temp, size });
        state.done.new_files += 1;
        state.done.new_bytes += size;
        inner.wrote(state, cost)
    }

    /// Writes the buffer to the file where `more` bytes would make it too long.
    fn make_room(&mut self, more: usize) -> Result<()> {
        match self.file.is_some() && self.buffer.len() + more > WRITE {
            true => self.flush(),
            false => Ok(()),
        }
    }

    /// Writes the buffer to the file.
    fn flush(&mut self) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let written = self.write_out(&buffer);
        buffer.clear();
        self.buffer = buffer;
        written
    }

    fn write_out(&mut self, data: &[u8]) -> Result<()> {
        let Some((_, file)) = self.file.as_ref().filter(|_| !data.is_empty()) else {
            return Ok(());
        };
        let bytes = data.len() as u64;
        self.reserve(bytes)?;
        file.write_at(data, self.buffer_at)?;
        metrics::global().store_written_bytes.add(bytes);
        self.buffer_at += bytes;
        self.count(self.counted + bytes);
        let mut state = self.inner.state.lock();
        self.inner.wrote(&mut state, bytes)
    }

    /// Reserves more where what was reserved is used up: what unpacks to far more than is usual must
    /// not fill the disk.
    fn reserve(&self, bytes: u64) -> Result<()> {
        let store = &self.inner.store;
        match &self.inner.room {
            Some(room) if room.bytes() < bytes => {
                match store.admit_more(room, bytes.max(RESERVE)) {
                    // Near the end, what is needed now.
                    Err(error) if error.kind() == StoreErrorKind::NoSpace => {
                        store.admit_more(room, bytes.saturating_sub(room.bytes()))
                    }
                    other => other,
                }
            }
            _ => Ok(()),
        }
    }

    /// Sees to it that `bytes` of this file are taken off the reservation.
    fn count(&mut self, bytes: u64) {
        if let Some(room) = &self.inner.room {
            room.arrived(bytes.saturating_sub(self.counted));
        }
        self.counted = bytes;
    }
}

impl Drop for ImportFile {
    fn drop(&mut self) {
        if let Some((temp, _)) = &self.file {
            // What cannot be removed goes with the next collection.
            let _ = self.inner.store.disk.unlink(&self.inner.temp_path(*temp));
        }
        if let Some(room) = &self.inner.room {
            room.gone(self.counted);
        }
    }
}
