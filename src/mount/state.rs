//! What a session remembers beyond its server, in a memfd that the keeper and every server of the
//! session hold: what was said when it was mounted, and which files are open.
//!
//! ```text
//!     0 "hrthsess"   8 format u32   12 slots u32   16 slots ever used u32   20 servers so far u32
//!    24 length of the kernel's INIT u32   28 length of our answer u32 (0: none yet)
//!    32 length of `about` u32   36 length of the mount point u32
//!    40 found without a server, in seconds since the boot, u32 (0: not)   44 how long readers wait then, in seconds, u32
//!    48 length of the secret u32 (0: none)
//!  1024 INIT request   2048 INIT answer   4096 about: what is served, opaque here
//! 32768 what is for servers alone, where `about` leaves the room   61440 the mount point
//! 65536 slots of 32 bytes: kind u32, backing id u32, inode u64, handle u64, zero [8]
//! ```
//!
//! Words in the order of the machine: it never leaves it. A slot counts once its kind is written, which
//! comes last, so a process that is killed leaves no half of one. It is written before the kernel is
//! answered. A file handle is the number of the request that opened it; so an OPEN or RELEASE that the
//! kernel sends again, because nobody knows whether it was answered, changes nothing the second time.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            fs::{FileExt as _, MetadataExt as _},
        },
    },
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use parking_lot::Mutex;
use zeroize::Zeroizing;

use crate::disk::SharedMap;

/// Of the layout above. A server refuses any other.
pub const FORMAT: u32 = 1;
const MAGIC: [u8; 8] = *b"hrthsess";
/// Most files open in one mount. What no file ever needed takes no memory.
const SLOTS: u32 = 1 << 20;

const HIGH: usize = 16 / 4;
const SERVERS: usize = 20 / 4;
const ORPHAN: usize = 40 / 4;
const PATIENCE: usize = 44 / 4;
const INIT: Field = Field {
    length: 24,
    at: 1024,
    max: 1024,
};
const ANSWER: Field = Field {
    length: 28,
    at: 2048,
    max: 1024,
};
const ABOUT: Field = Field {
    length: 32,
    at: 4096,
    max: MAX_ABOUT,
};
const DIR: Field = Field {
    length: 36,
    at: PLACE,
    max: TABLE - PLACE,
};
/// Of earlier versions only `about` may reach so far.
const SECRET: Field = Field {
    length: 48,
    at: 32768,
    max: PLACE - 32768,
};
const PLACE: usize = 61440;
const TABLE: usize = 65536;
const SLOT: usize = 32;
const LENGTH: u64 = (TABLE + SLOTS as usize * SLOT) as u64;

/// Most bytes that [`State::about`] may have.
pub(super) const MAX_ABOUT: usize = PLACE - 4096;

struct Field {
    length: usize,
    at: usize,
    max: usize,
}

/// The memory of a session.
#[derive(Debug)]
pub(super) struct State {
    file: File,
    map: SharedMap,
    /// Of the inode.
    number: u64,
    /// Held while the secret is written.
    secret: Mutex<()>,
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    slots: Vec<u32>,
    high: u32,
    /// Another process writes now.
    frozen: bool,
    /// Whether requests are answered is for the next server to find out.
    leaving: bool,
}

/// Something the kernel holds, or waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    pub(super) ino: u64,
    /// The number of the request, which is the handle of the file it opened.
    pub(super) handle: u64,
}

/// What an [`Entry`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A file read through the server.
    Cached,
    /// A file read by the kernel itself, from this backing id.
    Passthrough(u32),
    /// A backing id that is being closed.
    Closing(u32),
    /// A request in a server's hands; noted where the kernel cannot send it again.
    Working,
}

/// The place of an entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Slot(u32);

impl State {
    /// The memory of a new session on `dir`, for which the kernel has sent `init`.
    ///
    /// # Errors
    /// `about` is too long; what the system says.
    pub(super) fn create(init: &[u8], about: &[u8], dir: &Path) -> io::Result<Self> {
        let fd = memfd_create(
            c"hearth-session",
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )?;
        let file = File::from(fd);
        file.set_len(LENGTH)?;
        // Whoever maps it must not be surprised.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
        let mut head = MAGIC.to_vec();
        head.extend_from_slice(&FORMAT.to_ne_bytes());
        head.extend_from_slice(&SLOTS.to_ne_bytes());
        file.write_all_at(&head, 0)?;
        let map = SharedMap::new(&file, LENGTH)?;
        let number = file.metadata()?.ino();
        let state = Self {
            file,
            map,
            number,
            secret: Mutex::default(),
            free: Mutex::default(),
        };
        state.set(&INIT, init)?;
        state.set(&ABOUT, about)?;
        state.set(&DIR, dir.as_os_str().as_bytes())?;
        Ok(state)
    }

    /// The memory of a session that has had servers before. No other may be using it now.
    ///
    /// # Errors
    /// It is not of the format that this version knows.
    pub(super) fn open(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let refuse = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        let seals = fcntl(file.as_fd(), FcntlArg::F_GET_SEALS)?;
        if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
            return Err(refuse("it is no memory of a session"));
        }
        let mut head = [0; 16];
        file.read_exact_at(&mut head, 0)?;
        let word =
            |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        if head[..8] != MAGIC || word(8) != FORMAT || word(12) != SLOTS {
            return Err(refuse(&format!(
                "the session is of format {}, this version knows {FORMAT}",
                word(8)
            )));
        }
        let map = SharedMap::new(&file, LENGTH)?;
        let number = file.metadata()?.ino();
        let state = Self {
            file,
            map,
            number,
            secret: Mutex::default(),
            free: Mutex::default(),
        };
        state.reload();
        Ok(state)
    }

    /// Looks again what is free, once a server before this one has let go.
    pub(super) fn reload(&self) {
        let high = self.word(HIGH).min(SLOTS);
        let free = (0..high).rev().filter(|&slot| self.read(slot).is_none());
        *self.free.lock() = Free {
            slots: free.collect(),
            high,
            ..Free::default()
        };
    }

    /// Another fd of the memory.
    pub(super) fn fd(&self) -> io::Result<OwnedFd> {
        self.file.try_clone().map(OwnedFd::from)
    }

    /// Tells it from every other that there is at the same time, in whatever process.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// The kernel's INIT request.
    pub(super) fn init(&self) -> io::Result<Vec<u8>> {
        self.get(&INIT)
    }

    /// What was answered to it; empty before that.
    pub(super) fn answer(&self) -> io::Result<Vec<u8>> {
        self.get(&ANSWER)
    }

    pub(super) fn set_answer(&self, answer: &[u8]) -> io::Result<()> {
        self.set(&ANSWER, answer)
    }

    /// What is served, for the next server.
    pub(super) fn about(&self) -> io::Result<Vec<u8>> {
        self.get(&ABOUT)
    }

    /// What servers alone are to know.
    pub(super) fn secret(&self) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
        let secret = Zeroizing::new(self.get(&SECRET)?);
        Ok(Some(secret).filter(|secret| !secret.is_empty()))
    }

    /// Has `secret` take the place of the one before, of which nothing stays.
    pub(super) fn set_secret(&self, secret: &[u8]) -> io::Result<()> {
        if self.word(ABOUT.length / 4) as usize > SECRET.at - ABOUT.at {
            return Err(io::Error::other("there is no room for a secret"));
        }
        let _one = self.secret.lock();
        let before = self.word(SECRET.length / 4) as usize;
        // A process that is killed here leaves none.
        self.set(&SECRET, b"")?;
        let zeros = vec![0; before.min(SECRET.max)];
        self.file.write_all_at(&zeros, SECRET.at as u64)?;
        self.set(&SECRET, secret)
    }

    /// Where it is mounted; empty where that was not noted.
    pub(super) fn dir(&self) -> io::Result<PathBuf> {
        Ok(OsString::from_vec(self.get(&DIR)?).into())
    }

    /// How long readers are to wait for a server, in seconds.
    pub(super) fn set_patience(&self, seconds: u64) {
        let seconds = u32::try_from(seconds).unwrap_or(u32::MAX).max(1);
        self.map.words()[PATIENCE].store(seconds, Ordering::Release);
    }

    /// Nobody serves it, `now` seconds after the boot; whether that has been so for longer than readers are to
    /// wait.
    pub(super) fn is_overdue(&self, now: u32) -> bool {
        let (now, none) = (now.max(1), Ordering::AcqRel);
        let since = self.map.words()[ORPHAN].compare_exchange(0, now, none, Ordering::Acquire);
        let since = since.map_or_else(|since| since, |_| now);
        // Earlier versions did not note any.
        let patience = self.word(PATIENCE);
        patience > 0 && now.saturating_sub(since) >= patience
    }

    /// One more server begins; how many there were before.
    pub(super) fn next_server(&self) -> u32 {
        self.map.words()[ORPHAN].store(0, Ordering::Release);
        self.map.words()[SERVERS].fetch_add(1, Ordering::AcqRel)
    }

    /// Notes `entry`; `None` where too much is open.
    pub(super) fn add(&self, entry: Entry) -> Option<Slot> {
        let mut free = self.free.lock();
        if free.frozen {
            return None;
        }
        let slot = match free.slots.pop() {
            Some(slot) => slot,
            None if free.high < SLOTS => {
                let slot = free.high;
                free.high += 1;
                self.map.words()[HIGH].store(free.high, Ordering::Release);
                slot
            }
            None => return None,
        };
        let (kind, backing) = match entry.kind {
            Kind::Cached => (1, 0),
            Kind::Passthrough(id) => (2, id),
            Kind::Closing(id) => (3, id),
            Kind::Working => (4, 0),
        };
        let (ino, handle) = (entry.ino, entry.handle);
        let words = self.slot(slot);
        let halves = [
            ino as u32,
            (ino >> 32) as u32,
            handle as u32,
            (handle >> 32) as u32,
        ];
        words[1].store(backing, Ordering::Relaxed);
        for (word, value) in words[2..6].iter().zip(halves) {
            word.store(value, Ordering::Relaxed);
        }
        words[0].store(kind, Ordering::Release);
        Some(Slot(slot))
    }

    /// The backing id of a passthrough entry is about to be closed.
    pub(super) fn closing(&self, slot: &Slot) {
        let free = self.free.lock();
        if !free.frozen {
            self.slot(slot.0)[0].store(3, Ordering::Release);
        }
    }

    /// An entry that was closing is a passthrough file once more, by this handle; false where another process
    /// writes now.
    pub(super) fn reopen(&self, slot: &Slot, handle: u64) -> bool {
        let free = self.free.lock();
        if free.frozen {
            return false;
        }
        // Of what is closing nobody asks for the handle.
        let words = self.slot(slot.0);
        words[4].store(handle as u32, Ordering::Relaxed);
        words[5].store((handle >> 32) as u32, Ordering::Relaxed);
        words[0].store(2, Ordering::Release);
        true
    }

    /// Forgets an entry.
    pub(super) fn remove(&self, slot: Slot) {
        self.forget(slot, |free| !free.frozen);
    }

    /// Forgets what was in hand, or closing. From [`State::keep_working`] on that is left to the next server.
    pub(super) fn done(&self, slot: Slot) {
        self.forget(slot, |free| !free.frozen && !free.leaving);
    }

    fn forget(&self, slot: Slot, may: impl FnOnce(&Free) -> bool) {
        let mut free = self.free.lock();
        if may(&free) {
            self.slot(slot.0)[0].store(0, Ordering::Release);
            free.slots.push(slot.0);
        }
    }

    /// From now on what is in hand stays noted: the answer may not arrive. The next server answers it with
    /// an error, of which the kernel takes no notice where it has an answer.
    pub(super) fn keep_working(&self) {
        self.free.lock().leaving = true;
    }

    /// Lets go: nothing is noted or forgotten here any more.
    pub(super) fn freeze(&self) {
        self.free.lock().frozen = true;
    }

    /// All that is noted.
    pub(super) fn entries(&self) -> Vec<(Slot, Entry)> {
        let high = self.word(HIGH).min(SLOTS);
        (0..high)
            .filter_map(|slot| Some((Slot(slot), self.read(slot)?)))
            .collect()
    }

    fn read(&self, slot: u32) -> Option<Entry> {
        let words = self.slot(slot);
        let kind = words[0].load(Ordering::Acquire);
        let word = |at: usize| words[at].load(Ordering::Relaxed);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 1)) << 32;
        let kind = match kind {
            1 => Kind::Cached,
            2 => Kind::Passthrough(word(1)),
            3 => Kind::Closing(word(1)),
            4 => Kind::Working,
            _ => return None,
        };
        Some(Entry {
            kind,
            ino: long(2),
            handle: long(4),
        })
    }

    fn slot(&self, slot: u32) -> &[std::sync::atomic::AtomicU32] {
        let at = (TABLE + slot as usize * SLOT) / 4;
        &self.map.words()[at..at + SLOT / 4]
    }

    fn word(&self, at: usize) -> u32 {
        self.map.words()[at].load(Ordering::Acquire)
    }

    fn set(&self, field: &Field, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() > field.max {
            let message = format!("{} bytes are too many for a session", bytes.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        self.file.write_all_at(bytes, field.at as u64)?;
        let length = &self.map.words()[field.length / 4];
        length.store(bytes.len() as u32, Ordering::Release);
        Ok(())
    }

    fn get(&self, field: &Field) -> io::Result<Vec<u8>> {
        let length = self.word(field.length / 4) as usize;
        let mut bytes = vec![0; length.min(field.max)];
        self.file.read_exact_at(&mut bytes, field.at as u64)?;
        Ok(bytes)
    }
}

/// A request in hand; none any more when dropped.
pub(super) struct Working(Option<(Arc<State>, Slot)>);

impl Working {
    /// Nothing has to be noted.
    pub(super) const UNNOTED: Self = Self(None);

    pub(super) fn on(state: &Arc<State>, request: u64) -> Self {
        let slot = state.add(Entry {
            kind: Kind::Working,
            ino: 0,
            handle: request,
        });
        Self(slot.map(|slot| (state.clone(), slot)))
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        if let Some((state, slot)) = self.0.take() {
            state.done(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: Kind, ino: u64) -> Entry {
        let handle = ino << 33 | 2;
        Entry { kind, ino, handle }
    }

    #[test]
    fn a_successor_finds_what_was_noted() {
        let state = State::create(b"init", b"about", Path::new("/mnt")).unwrap();
        assert!(state.answer().unwrap().is_empty());
        state.set_answer(b"answer").unwrap();
        let kinds = [Kind::Cached, Kind::Passthrough(9), Kind::Working];
        let slots = kinds.map(|kind| state.add(entry(kind, 7)).unwrap());
        let [cached, passthrough, _] = slots;
        state.closing(&passthrough);
        state.remove(cached);
        let wide = entry(Kind::Passthrough(u32::MAX), u64::from(u32::MAX) + 3);
        assert_eq!(state.add(wide).unwrap(), Slot(0), "places are used again");
        assert_eq!(state.next_server(), 0);

        let next = State::open(state.fd().unwrap()).unwrap();
        assert_eq!(next.init().unwrap(), b"init");
        assert_eq!(next.answer().unwrap(), b"answer");
        assert_eq!(next.about().unwrap(), b"about");
        assert_eq!(next.dir().unwrap(), Path::new("/mnt"));
        assert_eq!(next.next_server(), 1);
        let found: Vec<_> = next.entries().into_iter().map(|(_, entry)| entry).collect();
        let expected = [wide, entry(Kind::Closing(9), 7), entry(Kind::Working, 7)];
        assert_eq!(found, expected);
        assert_eq!(next.add(entry(Kind::Cached, 1)).unwrap(), Slot(3));
    }

    #[test]
    fn a_secret_is_the_last_one_and_nothing_of_those_before() {
        let state = State::create(b"", b"about", Path::new("/mnt")).unwrap();
        assert!(state.secret().unwrap().is_none());
        state.set_secret(b"long secret").unwrap();
        state.set_secret(b"short").unwrap();
        let next = State::open(state.fd().unwrap()).unwrap();
        assert_eq!(&**next.secret().unwrap().unwrap(), b"short");
        let mut bytes = [0; 16];
        let at = SECRET.at as u64;
        state.file.read_exact_at(&mut bytes, at).unwrap();
        assert_eq!(&bytes, b"short\0\0\0\0\0\0\0\0\0\0\0");
        state.set_secret(&vec![1; SECRET.max + 1]).unwrap_err();
        assert!(state.secret().unwrap().is_none());
        assert_eq!(state.about().unwrap(), b"about");
        assert_eq!(state.dir().unwrap(), Path::new("/mnt"));
        let state = State::create(b"", &vec![7; MAX_ABOUT], Path::new("")).unwrap();
        state.set_secret(b"x").unwrap_err();
        assert_eq!(state.about().unwrap(), vec![7; MAX_ABOUT]);
    }

    #[test]
    fn without_a_server_patience_ends() {
        let state = State::create(b"", b"", Path::new("")).unwrap();
        assert!(!state.is_overdue(1) && !state.is_overdue(1000));
        state.next_server();
        state.set_patience(10);
        assert!(![0, 3, 10].map(|now| state.is_overdue(now)).contains(&true));
        assert!(state.is_overdue(11));
        state.next_server();
        assert!(!state.is_overdue(100) && !state.is_overdue(109) && state.is_overdue(110));
        // A clock that is wrong.
        assert!(!state.is_overdue(5));
    }

    #[test]
    fn anything_else_is_no_session() {
        let file = tempfile::tempfile().unwrap();
        State::open(file.into()).unwrap_err();
        let state = State::create(b"", b"", Path::new("")).unwrap();
        state.file.write_all_at(&9u32.to_ne_bytes(), 8).unwrap();
        let error = State::open(state.fd().unwrap()).unwrap_err().to_string();
        assert!(
            error.contains("format 9") && error.contains("knows 1"),
            "{error}"
        );
        State::create(b"", &vec![0; MAX_ABOUT + 1], Path::new("")).unwrap_err();
        // Nobody can shorten what others have mapped.
        state.file.set_len(0).unwrap_err();
    }

    #[test]
    fn what_is_open_is_bounded() {
        let state = Arc::new(State::create(b"", b"", Path::new("")).unwrap());
        let slot = state.add(entry(Kind::Passthrough(9), 7)).unwrap();
        state.closing(&slot);
        assert!(state.reopen(&slot, 8 << 33 | 5));
        let found = state.entries().remove(0).1;
        assert_eq!((found.kind, found.ino), (Kind::Passthrough(9), 7));
        assert_eq!(found.handle, 8 << 33 | 5);
        state.remove(slot);
        for ino in 0..u64::from(SLOTS) {
            assert!(state.add(entry(Kind::Cached, ino)).is_some());
        }
        assert!(state.add(entry(Kind::Cached, 1)).is_none());
        state.remove(Slot(5));
        drop(Working::on(&state, 3));
        assert_eq!(state.add(entry(Kind::Cached, 1)), Some(Slot(5)));
        // Whoever lets go does not know what arrives.
        let in_hand = Working::on(&state, 4);
        assert!(in_hand.0.is_none(), "there is no room");
        state.remove(Slot(6));
        let in_hand = Working::on(&state, 4);
        state.keep_working();
        drop(in_hand);
        assert!(state.add(entry(Kind::Cached, 1)).is_none());
        // What is in other hands is left alone.
        state.freeze();
        state.remove(Slot(5));
        assert!(state.add(entry(Kind::Cached, 1)).is_none());
        assert_eq!(state.entries().len(), SLOTS as usize);
    }
}
