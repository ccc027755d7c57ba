//! A file mapped into memory, shared with every process that maps it, as 32-bit words.

use std::{fs::File, io, sync::atomic::AtomicU32};

/// Longest map that is kept in memory: a disk that goes bad under it is a SIGBUS otherwise.
const LOCKED: usize = 1 << 20;

/// A shared mapping of whole words. The file must never be shortened while mapped: the store makes
/// such files whole under another name, renames them, and from then on only stores to the words.
/// Before it maps one it has read it.
#[derive(Debug)]
pub struct SharedMap {
    map: memmap2::MmapRaw,
    words: usize,
}

impl SharedMap {
    /// Maps `file`, which must be opened for reading and writing and `len` bytes long, a non-zero
    /// multiple of four.
    pub fn new(file: &File, len: u64) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let bytes = usize::try_from(len).map_err(|_| invalid())?;
        if bytes == 0 || bytes % 4 != 0 || file.metadata()?.len() != len {
            return Err(invalid());
        }
        let mut options = memmap2::MmapOptions::new();
        options.len(bytes);
        if bytes <= LOCKED {
            // All of it now, while a page that cannot be read is just one that is not mapped.
            options.populate();
        }
        let map = options.map_raw(file)?;
        if bytes <= LOCKED {
            // Where it may not be locked it is as safe as the disk.
            let _ = map.lock();
        }
        let words = bytes / 4;
        Ok(Self { map, words })
    }

    /// The words.
    #[inline]
    pub fn words(&self) -> &[AtomicU32] {
        // SAFETY: the mapping is readable and writable, page-aligned, `words * 4` bytes long and
        // lives as long as `self`; all access in this and other processes is atomic.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast::<AtomicU32>(), self.words) }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn what_is_large_takes_memory_as_it_is_used() {
        let file = tempfile::tempfile().unwrap();
        let len = 32 * LOCKED as u64;
        file.set_len(len).unwrap();
        let map = SharedMap::new(&file, len).unwrap();
        assert_eq!(map.words().len() as u64, len / 4);
        assert_eq!(file.metadata().unwrap().blocks(), 0);
    }
}
