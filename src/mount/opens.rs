//! Which files are open, and how the kernel reads them.
//!
//! The kernel (`fs/fuse/iomode.c`) reads an inode either through its page cache and READ requests or
//! by passthrough to one backing file, never both at once: a second way answered to an open is EIO
//! there. So the first open of an inode decides, and holds until its last release. RELEASE comes after
//! the kernel has let go, so counting answers and releases never runs ahead of it.
//!
//! What the kernel holds in its page cache outlives the last release. It is as good as the body it
//! came from: one that was complete, or one that says if it turns out wrong. Anything else is dropped
//! at the next open. That waits for whoever reads there meanwhile, so it is not asked for where there is nothing to
//! drop: another open may be answered, and wait for bytes, before the kernel has seen the answer to the first.
//!
//! What the kernel reads by itself stays registered for a moment after the last release ([`idle`]): the next open
//! costs one look at whether it is still there.
//!
//! What is open is noted in the session's [`State`] before the kernel is told, so that a successor of
//! this process answers the same.

mod idle;

use std::{
    collections::{HashMap, hash_map},
    fs::File,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use self::idle::Idle;
use super::state::{Entry, Kind, Slot, State};
use crate::fs::{Body, Whole};

/// How long a file stays registered that nobody has open.
pub(super) const STAY: Duration = idle::STAY;

/// What is registered with the kernel as a backing file.
pub(super) trait Registered {
    fn id(&self) -> u32;
}

/// The open files of a mount, by inode; `B` is the kernel's backing id.
pub(super) struct Opens<B> {
    files: Mutex<Files<B>>,
    state: Arc<State>,
}

struct Files<B> {
    open: HashMap<u64, Open<B>>,
    /// At most one for each inode of the tree.
    cached: HashMap<u64, Cached>,
    idle: Idle<B>,
    /// The kernel has nothing of what is not in `cached`: no predecessor has served it.
    fresh: bool,
}

struct Open<B> {
    handles: HashMap<u64, Slot>,
    mode: Mode<B>,
}

enum Mode<B> {
    /// No body: one that a predecessor had, and that could not be opened again yet.
    Cached(Option<Arc<dyn Body>>),
    Passthrough {
        backing: Arc<B>,
        /// Keeps the file from eviction while the kernel reads it.
        whole: Option<Arc<dyn Whole>>,
        /// This process registered `whole`; what a predecessor did may be another file.
        own: bool,
    },
}

/// What the kernel's page cache may hold of an inode.
enum Cached {
    Verified,
    /// Bytes of this body, which is watched.
    Watched(Weak<dyn Body>),
    Unknown,
}

/// How an open is to be answered.
pub(super) enum Answer<B> {
    /// Read through this process; `keep` where what the kernel holds already is good.
    Cached {
        keep: bool,
    },
    Passthrough(Arc<B>),
}

impl<B: Registered> Opens<B> {
    /// Those of a session, whose kernel has read nothing yet where it is `fresh`.
    pub(super) fn new(state: Arc<State>, fresh: bool) -> Self {
        Self {
            files: Mutex::new(Files {
                open: HashMap::new(),
                cached: HashMap::new(),
                idle: Idle::default(),
                fresh,
            }),
            state,
        }
    }

    /// Notes one more handle of `ino`, unless it is known, where the kernel reads it by itself or did so a moment ago,
    /// and opening it would lead to the same file; else it is to be opened.
    pub(super) fn reopen(&self, ino: u64, handle: u64) -> Option<Arc<B>> {
        let mut files = self.files.lock();
        if let Some(Open { handles, mode }) = files.open.get_mut(&ino) {
            let Mode::Passthrough { backing, whole, .. } = mode else {
                return None;
            };
            whole.as_ref().filter(|whole| whole.is_there())?;
            if let hash_map::Entry::Vacant(place) = handles.entry(handle) {
                let kind = Kind::Passthrough(backing.id());
                place.insert(self.state.add(Entry { kind, ino, handle })?);
            }
            return Some(backing.clone());
        }
        let file = files.idle.take(ino)?;
        if !file.whole.is_there() || !self.state.reopen(&file.slot, handle) {
            drop(files);
            file.close(&self.state);
            return None;
        }
        let backing = file.backing.clone();
        let open = Open {
            handles: HashMap::from([(handle, file.slot)]),
            mode: Mode::Passthrough {
                backing: file.backing,
                whole: Some(file.whole),
                own: true,
            },
        };
        files.open.insert(ino, open);
        Some(backing)
    }

    /// Notes one more handle of `ino`, unless it is known. `register` is asked for a backing id where the
    /// content is complete and nobody has the inode open. `watch` is called once for each body whose bytes
    /// come into the page cache unverified. `None` where too many files are open.
    pub(super) fn open(
        &self,
        (ino, handle): (u64, u64),
        body: Arc<dyn Body>,
        register: impl FnOnce(&File) -> Option<B>,
        watch: impl FnOnce(&dyn Body),
    ) -> Option<Answer<B>> {
        let Files {
            open,
            cached,
            fresh,
            ..
        } = &mut *self.files.lock();
        let mut open = match open.entry(ino) {
            hash_map::Entry::Occupied(open) => open,
            hash_map::Entry::Vacant(place) => {
                let passthrough = body.complete().and_then(|whole| {
                    let backing = Arc::new(register(whole.file())?);
                    Some(Mode::Passthrough {
                        backing,
                        whole: Some(whole),
                        own: true,
                    })
                });
                place.insert_entry(Open {
                    handles: HashMap::new(),
                    mode: passthrough.unwrap_or_else(|| Mode::Cached(Some(body.clone()))),
                })
            }
        };
        let Open { handles, mode } = open.get_mut();
        if let hash_map::Entry::Vacant(place) = handles.entry(handle) {
            let kind = match mode {
                Mode::Cached(_) => Kind::Cached,
                Mode::Passthrough { backing, .. } => Kind::Passthrough(backing.id()),
            };
            let Some(slot) = self.state.add(Entry { kind, ino, handle }) else {
                if handles.is_empty() {
                    open.remove();
                }
                return None;
            };
            place.insert(slot);
        }
        let others = handles.len() > 1;
        Some(match mode {
            // Under the lock: no other open may be answered before the body is watched.
            Mode::Cached(known) => {
                let watched = others && known.is_some();
                let body = known.get_or_insert(body);
                Answer::Cached {
                    keep: watched || note((cached, *fresh), ino, body, watch),
                }
            }
            Mode::Passthrough { backing, .. } => Answer::Passthrough(backing.clone()),
        })
    }

    /// A handle that a predecessor of this process has answered, or was about to. `body` opens the
    /// content, where that can be done; `wrap` takes its backing id over.
    pub(super) fn restore(
        &self,
        slot: Slot,
        entry: Entry,
        body: impl FnOnce() -> Option<Arc<dyn Body>>,
        wrap: impl FnOnce(u32) -> B,
        watch: impl FnOnce(&dyn Body),
    ) {
        let Files {
            open,
            cached,
            fresh,
            ..
        } = &mut *self.files.lock();
        let open = open.entry(entry.ino).or_insert_with(|| {
            let body = body();
            let mode = match entry.kind {
                Kind::Passthrough(id) => Mode::Passthrough {
                    backing: Arc::new(wrap(id)),
                    whole: body.and_then(|body| body.complete()),
                    own: false,
                },
                _ => {
                    if let Some(body) = &body {
                        // What the kernel holds came from the predecessor.
                        note((cached, *fresh), entry.ino, body, watch);
                    }
                    Mode::Cached(body)
                }
            };
            let handles = HashMap::new();
            Open { handles, mode }
        });
        open.handles.insert(entry.handle, slot);
    }

    /// The content of `ino`, where it is open and read through this process.
    pub(super) fn body(&self, ino: u64) -> Option<Arc<dyn Body>> {
        match &self.files.lock().open.get(&ino)?.mode {
            Mode::Cached(body) => body.clone(),
            Mode::Passthrough { .. } => None,
        }
    }

    /// `ino` is read without being known as open: the next open must not trust what the kernel
    /// holds.
    pub(super) fn distrust(&self, ino: u64) {
        self.files.lock().cached.insert(ino, Cached::Unknown);
    }

    /// A handle of `ino` is gone; one that is not known was let go before. Whether somebody is to [`Opens::sweep`] from
    /// now on.
    pub(super) fn release(&self, ino: u64, handle: u64) -> bool {
        let mut files = self.files.lock();
        let Files {
            open, cached, idle, ..
        } = &mut *files;
        let hash_map::Entry::Occupied(mut found) = open.entry(ino) else {
            return false;
        };
        let Some(slot) = found.get_mut().handles.remove(&handle) else {
            return false;
        };
        if !found.get().handles.is_empty() {
            self.state.remove(slot);
            return false;
        }
        match found.remove().mode {
            Mode::Cached(body) => {
                if body.is_some_and(|body| body.is_verified()) {
                    cached.insert(ino, Cached::Verified);
                }
                self.state.remove(slot);
                false
            }
            Mode::Passthrough {
                backing,
                whole: Some(whole),
                own: true,
            } if whole.may_stay() => {
                self.state.closing(&slot);
                let file = idle::File {
                    backing,
                    whole,
                    slot,
                };
                let gone = idle.put(ino, file);
                let first = !idle.is_empty() && !std::mem::replace(&mut idle.swept, true);
                drop(files);
                for file in gone.into_iter().flatten() {
                    file.close(&self.state);
                }
                first
            }
            mode @ Mode::Passthrough { .. } => {
                self.state.closing(&slot);
                drop(files);
                // Closes the backing id, outside the lock.
                drop(mode);
                self.state.done(slot);
                false
            }
        }
    }

    /// Closes what nobody has open: nothing more will be opened.
    pub(super) fn end(&self) {
        self.sweep(Instant::now() + STAY);
    }

    /// Closes what nobody has opened again for [`STAY`] before `now`; whether there is more, for later.
    pub(super) fn sweep(&self, now: Instant) -> bool {
        loop {
            let mut files = self.files.lock();
            let time = now.checked_sub(STAY);
            let Some(file) = time.and_then(|time| files.idle.expired(time)) else {
                files.idle.swept = !files.idle.is_empty();
                return files.idle.swept;
            };
            drop(files);
            file.close(&self.state);
        }
    }
}

/// Notes that bytes of `body` come into the page cache of `ino`, and says whether what is there
/// already is good.
fn note(
    (cached, fresh): (&mut HashMap<u64, Cached>, bool),
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
        Some(Cached::Watched(_) | Cached::Unknown) => false,
        None => fresh,
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
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

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

    impl Registered for u32 {
        fn id(&self) -> u32 {
            *self
        }
    }

    fn opens() -> Opens<u32> {
        opens_of(true)
    }

    fn opens_of(fresh: bool) -> Opens<u32> {
        let state = State::create(b"", b"", std::path::Path::new("")).unwrap();
        Opens::new(Arc::new(state), fresh)
    }

    fn mode(answer: Option<Answer<u32>>) -> Option<u32> {
        match answer.unwrap() {
            Answer::Cached { .. } => None,
            Answer::Passthrough(id) => Some(*id),
        }
    }

    #[test]
    fn the_first_open_decides_until_the_last_release() {
        let opens = opens();
        let body = Arc::new(Fake(Mutex::new(None)));
        let open = |id: u32| {
            let at = (7, id.into());
            mode(opens.open(at, body.clone(), |_| Some(id), |_| {}))
        };
        assert_eq!(open(1), None);
        *body.0.lock() = Some(Arc::new(tempfile::tempfile().unwrap()));
        assert_eq!(open(2), None, "a reader through the page cache is left");
        assert!(opens.body(7).is_some());
        opens.release(7, 1);
        assert_eq!(open(3), None);
        opens.release(7, 2);
        opens.release(7, 2);
        assert_eq!(open(4), None, "a handle is let go once");
        opens.release(7, 3);
        opens.release(7, 4);
        assert_eq!(open(4), Some(4));
        assert_eq!(open(5), Some(4), "one backing for all handles");
        assert!(opens.body(7).is_none());
        opens.release(7, 4);
        assert_eq!(open(6), Some(4));
        assert_eq!(open(6), Some(4), "asked again");
        opens.release(7, 5);
        opens.release(7, 6);
        assert!(opens.files.lock().open.is_empty());
        assert!(opens.state.entries().is_empty());
        assert_eq!(
            mode(opens.open((7, 9), body.clone(), |_| None, |_| {})),
            None
        );
    }

    #[test]
    fn a_successor_opens_as_before() {
        let first = opens();
        let body = Arc::new(Fake(Mutex::new(None)));
        let complete = || Some(Arc::new(tempfile::tempfile().unwrap()));
        let open = |opens: &Opens<u32>, ino, handle, id| {
            mode(opens.open((ino, handle), body.clone(), |_| Some(id), |_| {}))
        };
        assert_eq!(open(&first, 1, 10, 0), None);
        assert_eq!(open(&first, 2, 11, 0), None);
        *body.0.lock() = complete();
        assert_eq!(open(&first, 3, 12, 31), Some(31));
        assert_eq!(open(&first, 3, 13, 32), Some(31));

        let state = Arc::new(State::open(first.state.fd().unwrap()).unwrap());
        let next = Opens::new(state.clone(), false);
        for (slot, entry) in state.entries() {
            // The content of 2 cannot be opened yet.
            let found = || (entry.ino != 2).then(|| body.clone() as Arc<dyn Body>);
            next.restore(slot, entry, found, |id| id, |_| {});
        }
        assert_eq!(open(&next, 1, 20, 0), None, "it is in the page cache");
        assert!(next.body(2).is_none());
        assert_eq!(open(&next, 2, 21, 0), None);
        assert!(next.body(2).is_some());
        assert_eq!(open(&next, 3, 22, 33), Some(31));
        for (ino, handles) in [(1, [10, 20].as_slice()), (2, &[11, 21]), (3, &[12, 13, 22])] {
            let stays = handles.iter().any(|&handle| next.release(ino, handle));
            assert!(!stays);
        }
        assert!(state.entries().is_empty());
        assert_eq!(open(&next, 3, 23, 34), Some(34));
    }

    /// Opens without passthrough: whether pages are kept, and whether the body was to be watched.
    fn open(opens: &Opens<u32>, handle: u64, body: &Arc<Fake>) -> (bool, bool) {
        let mut watched = false;
        let answer = opens.open((7, handle), body.clone(), |_| None, |_| watched = true);
        match answer.unwrap() {
            Answer::Cached { keep } => (keep, watched),
            Answer::Passthrough(_) => panic!("nothing was registered"),
        }
    }

    #[test]
    fn pages_are_kept_that_are_verified_or_watched() {
        let opens = opens_of(false);
        let absent = || Arc::new(Fake(Mutex::new(None)));
        let finish = |body: &Fake| {
            *body.0.lock() = Some(Arc::new(tempfile::tempfile().unwrap()));
        };
        let first = absent();
        assert_eq!(open(&opens, 1, &first), (false, true), "nothing is known");
        assert_eq!(open(&opens, 2, &first), (true, false), "watched once");
        opens.release(7, 1);
        opens.release(7, 2);
        assert_eq!(open(&opens, 1, &first), (true, false), "still watched");
        opens.release(7, 1);
        drop(first);
        let second = absent();
        assert_eq!(open(&opens, 1, &second), (false, true), "nobody told");
        finish(&second);
        opens.release(7, 1);
        let third = absent();
        let verified = open(&opens, 1, &third);
        assert_eq!(verified, (true, true), "verified pages are good");
        opens.release(7, 1);
        let fourth = absent();
        finish(&fourth);
        assert_eq!(
            open(&opens, 1, &fourth),
            (false, false),
            "not those between"
        );
        opens.release(7, 1);
        assert_eq!(open(&opens, 1, &fourth), (true, false));
        opens.release(7, 1);
        opens.distrust(7);
        assert_eq!(open(&opens, 1, &fourth), (false, false));
    }

    /// Dropping pages waits for whoever reads there: no first open may, since another reads before the kernel sees it.
    #[test]
    fn nothing_is_dropped_where_nobody_has_read() {
        let opens = opens();
        let body = Arc::new(Fake(Mutex::new(None)));
        assert_eq!(open(&opens, 1, &body), (true, true), "nothing is there");
        assert_eq!(open(&opens, 2, &body), (true, false), "watched once");
        opens.release(7, 1);
        opens.release(7, 2);
        drop(body);
        let other = Arc::new(Fake(Mutex::new(None)));
        assert_eq!(open(&opens, 1, &other), (false, true), "nobody told");
        opens.release(7, 1);
        assert_eq!(open(&opens, 1, &other), (true, false));
        opens.release(7, 1);
        opens.distrust(8);
        let answer = opens.open((8, 1), other.clone(), |_| None, |_| {});
        let keep = matches!(answer.unwrap(), Answer::Cached { keep: true });
        assert!(!keep, "it was read without being open");
    }

    /// A file that stays, as long as it is there.
    struct Stays(File, AtomicBool);

    impl Whole for Stays {
        fn file(&self) -> &File {
            &self.0
        }
        fn may_stay(&self) -> bool {
            true
        }
        fn is_there(&self) -> bool {
            self.1.load(Relaxed)
        }
    }

    /// Opens `ino` by a backing id of its own, and lets it go; whether it is to be swept.
    fn open_once(opens: &Opens<u32>, ino: u64, whole: &Arc<Stays>) -> bool {
        struct Of(Arc<Stays>);
        #[async_trait::async_trait]
        impl Body for Of {
            fn size(&self) -> u64 {
                0
            }
            fn complete(&self) -> Option<Arc<dyn Whole>> {
                Some(self.0.clone())
            }
            fn try_read(&self, _: u64, _: &mut [u8]) -> Result<bool, FsError> {
                Ok(false)
            }
            async fn read(self: Arc<Self>, _: u64, _: usize) -> Result<Bytes, FsError> {
                Err(FsError::Invalid)
            }
            async fn whole(self: Arc<Self>) -> Result<(), FsError> {
                Ok(())
            }
            fn on_wrong(&self, _: Box<dyn Fn() + Send + Sync>) {}
        }
        let register = |_: &File| Some(ino as u32);
        let answer = opens.open((ino, 1), Arc::new(Of(whole.clone())), register, |_| {});
        assert_eq!(mode(answer), Some(ino as u32));
        opens.release(ino, 1)
    }

    fn stays() -> Arc<Stays> {
        let file = tempfile::tempfile().unwrap();
        Arc::new(Stays(file, AtomicBool::new(true)))
    }

    fn noted(opens: &Opens<u32>) -> Vec<Kind> {
        let entries = opens.state.entries().into_iter();
        entries.map(|(_, entry)| entry.kind).collect()
    }

    #[test]
    fn what_was_let_go_is_opened_again_without_a_look_at_its_content() {
        let (opens, whole) = (opens(), stays());
        assert!(open_once(&opens, 7, &whole));
        assert_eq!(noted(&opens), [Kind::Closing(7)], "for a successor");
        for handle in [2, 3, 3] {
            assert_eq!(opens.reopen(7, handle).as_deref(), Some(&7));
        }
        assert_eq!(noted(&opens), [Kind::Passthrough(7); 2]);
        assert!(!opens.sweep(Instant::now() + STAY), "it is open");
        assert!(!opens.release(7, 2));
        assert!(opens.release(7, 3));
        assert!(opens.sweep(Instant::now()));
        assert!(!opens.sweep(Instant::now() + STAY));
        assert!(noted(&opens).is_empty());
        assert_eq!(Arc::strong_count(&whole), 1);
        assert!(opens.reopen(7, 4).is_none());
    }

    #[test]
    fn what_is_not_there_any_more_is_not_opened_again() {
        let (opens, whole) = (opens(), stays());
        assert!(open_once(&opens, 7, &whole));
        assert!(opens.reopen(7, 2).is_some());
        whole.1.store(false, Relaxed);
        assert!(opens.reopen(7, 3).is_none());
        opens.release(7, 2);
        assert!(opens.reopen(7, 4).is_none());
        assert!(noted(&opens).is_empty());
        assert_eq!(Arc::strong_count(&whole), 1);
        // What a predecessor registered may be another file than is there now.
        whole.1.store(true, Relaxed);
        let body = Arc::new(Fake(Mutex::new(None)));
        *body.0.lock() = Some(Arc::new(tempfile::tempfile().unwrap()));
        let kind = Kind::Passthrough(5);
        let (ino, handle) = (8, 1);
        let entry = Entry { kind, ino, handle };
        let slot = opens.state.add(entry).unwrap();
        opens.restore(slot, entry, || Some(body), |id| id, |_| {});
        assert!(!opens.release(8, 1));
        assert!(noted(&opens).is_empty());
    }

    #[test]
    fn few_files_stay_and_a_successor_closes_them() {
        let (opens, whole) = (opens(), stays());
        let many = idle::MOST as u64 + 2;
        for ino in 1..=many {
            open_once(&opens, ino, &whole);
        }
        assert!(noted(&opens).len() <= idle::MOST);
        assert!(opens.reopen(1, 2).is_some());
        assert!(opens.reopen(many, 2).is_none());
        opens.state.keep_working();
        let left = noted(&opens).len();
        assert!(!opens.sweep(Instant::now() + STAY));
        assert_eq!(noted(&opens).len(), left, "the ids were not closed");
    }
}
