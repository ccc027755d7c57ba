//! Which files are open, and how the kernel reads them.
//!
//! The kernel (`fs/fuse/iomode.c`) reads an inode either through its page cache and READ requests or
//! by passthrough to one backing file, never both at once: a second way answered to an open is EIO
//! there. So the first open of an inode decides, and holds until its last release. RELEASE comes after
//! the kernel has let go, so counting answers and releases never runs ahead of it.
//!
//! What the kernel holds in its page cache outlives the last release. It is as good as the body it
//! came from: one that was complete, or one that says if it turns out wrong. Anything else is dropped
//! at the next open.

use std::{
    collections::HashMap,
    fs::File,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use crate::fs::{Body, Whole};

/// The open files of a mount, by inode; `B` is the kernel's backing id.
pub(super) struct Opens<B> {
    files: Mutex<Files<B>>,
}

struct Files<B> {
    open: HashMap<u64, Open<B>>,
    /// At most one for each inode of the tree.
    cached: HashMap<u64, Cached>,
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

/// What the kernel's page cache may hold of an inode.
enum Cached {
    Verified,
    /// Bytes of this body, which is watched.
    Watched(Weak<dyn Body>),
}

/// How an open is to be answered.
pub(super) enum Answer<B> {
    /// Read through this process; `keep` where what the kernel holds already is good.
    Cached {
        keep: bool,
    },
    Passthrough(Arc<B>),
}

impl<B> Opens<B> {
    pub(super) fn new() -> Self {
        Self {
            files: Mutex::new(Files {
                open: HashMap::new(),
                cached: HashMap::new(),
            }),
        }
    }

    /// Counts one more handle of `ino`. `register` is asked for a backing id where the content is
    /// complete and nobody has the inode open. `watch` is called once for each body whose bytes
    /// come into the page cache unverified.
    pub(super) fn open(
        &self,
        ino: u64,
        body: Arc<dyn Body>,
        register: impl FnOnce(&File) -> Option<B>,
        watch: impl FnOnce(&dyn Body),
    ) -> Answer<B> {
        let Files { open, cached } = &mut *self.files.lock();
        let open = open.entry(ino).or_insert_with(|| {
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
            // Under the lock: no other open may be answered before the body is watched.
            Mode::Cached(body) => Answer::Cached {
                keep: open.handles > 1 || note(cached, ino, body, watch),
            },
            Mode::Passthrough { backing, .. } => Answer::Passthrough(backing.clone()),
        }
    }

    /// The content of `ino`, where it is open and read through this process.
    pub(super) fn body(&self, ino: u64) -> Option<Arc<dyn Body>> {
        match &self.files.lock().open.get(&ino)?.mode {
            Mode::Cached(body) => Some(body.clone()),
            Mode::Passthrough { .. } => None,
        }
    }

    /// `ino` is read without being known as open: the next open must not trust what the kernel
    /// holds.
    pub(super) fn distrust(&self, ino: u64) {
        self.files.lock().cached.remove(&ino);
    }

    /// One handle of `ino` is gone.
    pub(super) fn release(&self, ino: u64) {
        let mut files = self.files.lock();
        let last = files.open.get_mut(&ino).is_some_and(|open| {
            open.handles -= 1;
            open.handles == 0
        });
        let gone = if last { files.open.remove(&ino) } else { None };
        if let Some(Mode::Cached(body)) = gone.as_ref().map(|open| &open.mode)
            && body.is_verified()
        {
            files.cached.insert(ino, Cached::Verified);
        }
        drop(files);
        // Closes the backing id, outside the lock.
        drop(gone);
    }
}

/// Notes that bytes of `body` come into the page cache of `ino`, and says whether what is there
/// already is good.
fn note(
    cached: &mut HashMap<u64, Cached>,
    ino: u64,
    body: &Arc<dyn Body>,
    watch: impl FnOnce(&dyn Body),
) -> bool {
    // A part lives no longer than it is open; what it is cut from may be watched already.
    let body = &body.within().unwrap_or_else(|| body.clone());
    let good = match cached.get(&ino) {
        Some(Cached::Verified) => true,
        Some(Cached::Watched(old)) if std::ptr::addr_eq(old.as_ptr(), Arc::as_ptr(body)) => {
            return true;
        }
        // Nobody would have said if it was wrong.
        Some(Cached::Watched(_)) | None => false,
    };
    let now = if body.is_verified() {
        Cached::Verified
    } else {
        watch(&**body);
        Cached::Watched(Arc::downgrade(body))
    };
    cached.insert(ino, now);
    good
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
        async fn whole(self: Arc<Self>) -> Result<(), FsError> {
            Err(FsError::Invalid)
        }
        fn on_wrong(&self, _: Box<dyn Fn() + Send + Sync>) {}
    }

    fn mode(answer: &Answer<u32>) -> Option<u32> {
        match answer {
            Answer::Cached { .. } => None,
            Answer::Passthrough(id) => Some(**id),
        }
    }

    #[test]
    fn the_first_open_decides_until_the_last_release() {
        let opens = Opens::new();
        let body = Arc::new(Fake(Mutex::new(None)));
        let open = |id: u32| mode(&opens.open(7, body.clone(), |_| Some(id), |_| {}));
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
        assert!(opens.files.lock().open.is_empty());
        assert_eq!(mode(&opens.open(7, body.clone(), |_| None, |_| {})), None);
    }

    /// Opens without passthrough: whether pages are kept, and whether the body was to be watched.
    fn open(opens: &Opens<u32>, body: &Arc<Fake>) -> (bool, bool) {
        let mut watched = false;
        match opens.open(7, body.clone(), |_| None, |_| watched = true) {
            Answer::Cached { keep } => (keep, watched),
            Answer::Passthrough(_) => panic!("nothing was registered"),
        }
    }

    #[test]
    fn pages_are_kept_that_are_verified_or_watched() {
        let opens = Opens::new();
        let absent = || Arc::new(Fake(Mutex::new(None)));
        let finish = |body: &Fake| {
            *body.0.lock() = Some(Arc::new(tempfile::tempfile().unwrap()));
        };
        let first = absent();
        assert_eq!(open(&opens, &first), (false, true), "nothing is known");
        assert_eq!(open(&opens, &first), (true, false), "watched once");
        opens.release(7);
        opens.release(7);
        assert_eq!(open(&opens, &first), (true, false), "still watched");
        opens.release(7);
        drop(first);
        let second = absent();
        assert_eq!(open(&opens, &second), (false, true), "nobody told");
        finish(&second);
        opens.release(7);
        let third = absent();
        assert_eq!(
            open(&opens, &third),
            (true, true),
            "verified pages are good"
        );
        opens.release(7);
        let fourth = absent();
        finish(&fourth);
        assert_eq!(open(&opens, &fourth), (false, false), "not those between");
        opens.release(7);
        assert_eq!(open(&opens, &fourth), (true, false));
        opens.release(7);
        opens.distrust(7);
        assert_eq!(open(&opens, &fourth), (false, false));
    }
}
