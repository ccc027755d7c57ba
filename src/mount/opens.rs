//! Which files are open, and how the kernel reads them.
//!
//! The kernel (`fs/fuse/iomode.c`) reads an inode either through its page cache and READ requests or
//! by passthrough to one backing file, never both at once: a second way answered to an open is EIO
//! there. So the first open of an inode decides, and holds until its last release. RELEASE comes after
//! the kernel has let go, so counting answers and releases never runs ahead of it.

use std::{collections::HashMap, fs::File, sync::Arc};

use parking_lot::Mutex;

use crate::fs::{Body, Whole};

/// The open files of a mount, by inode; `B` is the kernel's backing id.
pub(super) struct Opens<B> {
    files: Mutex<HashMap<u64, Open<B>>>,
}

struct Open<B> {
    handles: u64,
    mode: Mode<B>,
}

enum Mode<B> {
    Cached(Arc<dyn Body>),
    Passthrough {
        backing: Arc<B>,
        /// Keeps the file from eviction while the kernel reads it.
        _whole: Arc<dyn Whole>,
    },
}

/// How an open is to be answered.
pub(super) enum Answer<B> {
    Cached,
    Passthrough(Arc<B>),
}

impl<B> Opens<B> {
    pub(super) fn new() -> Self {
        Self {
            files: Mutex::new(HashMap::new()),
        }
    }

    /// Counts one more handle of `ino`. `register` is asked for a backing id where the content is
    /// complete and nobody has the inode open.
    pub(super) fn open(
        &self,
        ino: u64,
        body: Arc<dyn Body>,
        register: impl FnOnce(&File) -> Option<B>,
    ) -> Answer<B> {
        let mut files = self.files.lock();
        let open = files.entry(ino).or_insert_with(|| {
            let passthrough = body.complete().and_then(|whole| {
                let backing = Arc::new(register(whole.file())?);
                Some(Mode::Passthrough {
                    backing,
                    _whole: whole,
                })
            });
            Open {
                handles: 0,
                mode: passthrough.unwrap_or(Mode::Cached(body)),
            }
        });
        open.handles += 1;
        match &open.mode {
            Mode::Cached(_) => Answer::Cached,
            Mode::Passthrough { backing, .. } => Answer::Passthrough(backing.clone()),
        }
    }

    /// The content of `ino`, where it is open and read through this process.
    pub(super) fn body(&self, ino: u64) -> Option<Arc<dyn Body>> {
        match &self.files.lock().get(&ino)?.mode {
            Mode::Cached(body) => Some(body.clone()),
            Mode::Passthrough { .. } => None,
        }
    }

    /// One handle of `ino` is gone.
    pub(super) fn release(&self, ino: u64) {
        let mut files = self.files.lock();
        let last = files.get_mut(&ino).is_some_and(|open| {
            open.handles -= 1;
            open.handles == 0
        });
        let gone = if last { files.remove(&ino) } else { None };
        drop(files);
        // Closes the backing id, outside the lock.
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::fs::FsError;

    struct Fake(Mutex<Option<Arc<File>>>);

    #[async_trait::async_trait]
    impl Body for Fake {
        fn size(&self) -> u64 {
            0
        }
        fn complete(&self) -> Option<Arc<dyn Whole>> {
            Some(self.0.lock().clone()?)
        }
        fn try_read(&self, _: u64, _: &mut [u8]) -> Result<bool, FsError> {
            Ok(false)
        }
        async fn read(self: Arc<Self>, _: u64, _: usize) -> Result<Bytes, FsError> {
            Err(FsError::Invalid)
        }
        async fn whole(self: Arc<Self>) -> Result<Arc<dyn Whole>, FsError> {
            Err(FsError::Invalid)
        }
    }

    fn mode(answer: &Answer<u32>) -> Option<u32> {
        match answer {
            Answer::Cached => None,
            Answer::Passthrough(id) => Some(**id),
        }
    }

    #[test]
    fn the_first_open_decides_until_the_last_release() {
        let opens = Opens::new();
        let body = Arc::new(Fake(Mutex::new(None)));
        let open = |id: u32| mode(&opens.open(7, body.clone(), |_| Some(id)));
        assert_eq!(open(1), None);
        *body.0.lock() = Some(Arc::new(tempfile::tempfile().unwrap()));
        assert_eq!(open(2), None, "a reader through the page cache is left");
        assert!(opens.body(7).is_some());
        opens.release(7);
        assert_eq!(open(3), None);
        opens.release(7);
        opens.release(7);
        assert_eq!(open(4), Some(4));
        assert_eq!(open(5), Some(4), "one backing for all handles");
        assert!(opens.body(7).is_none());
        opens.release(7);
        assert_eq!(open(6), Some(4));
        opens.release(7);
        opens.release(7);
        opens.release(7);
        assert!(opens.files.lock().is_empty());
        assert_eq!(mode(&opens.open(7, body.clone(), |_| None)), None);
    }
}
