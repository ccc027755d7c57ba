//! What goes on by itself in a process that has a store with tiers open: it sees disks come and go, and
//! reads those through whose configuration says so, no faster than that allows.
//!
//! One process at a time verifies a tier. How far it is, is written down at every 256th part of the
//! objects (`run/verified/<tier>.json`), and the next process goes on there.

use std::{
    fs::OpenOptions,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{Tier, TierVerify};
use crate::{
    digest::Digest,
    disk::{AlignedBuf, Open, Span, lock_file},
    store::{Result, Store, StoreError, hash_file, layout::FileLock, run_dir},
};

/// How often it is looked.
const WATCH: Duration = Duration::from_secs(5);
/// What is read at once, in bytes.
const PIECE: usize = 1 << 20;
/// Longest sleep between two looks whether to go on.
const NAP: Duration = Duration::from_millis(500);
/// How long a verification is good for, where that is not for ever; one that could not read everything, too.
const AGAIN: Duration = Duration::from_secs(24 * 60 * 60);
/// Parts that the objects of a store are in, by their first two digits.
const SHARDS: u16 = 256;

/// How far a tier was verified.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Verified {
    /// Parts of this pass that are done.
    shards: u16,
    /// When the last pass was over, in seconds since the epoch.
    finished_at: Option<u64>,
    /// Objects, and directories of them, that could not be read in this pass, or in the last one.
    #[serde(default)]
    unreadable: u64,
}

impl Verified {
    /// The pass goes on, or a new one begins. After one that could not read everything there is none that was over
    /// until that is.
    const fn begin(&mut self) {
        if self.shards == 0 && self.unreadable > 0 {
            (self.unreadable, self.finished_at) = (0, None);
        }
    }

    /// When all of it was last read.
    fn at(&self) -> Option<u64> {
        self.finished_at.filter(|_| self.unreadable == 0)
    }
}

/// Sleeps so that no more is read in a second than is allowed.
struct Pace {
    rate: u64,
    begun: Instant,
    read: u64,
}

impl Pace {
    fn new(rate: u64) -> Self {
        Self {
            rate,
            begun: Instant::now(),
            read: 0,
        }
    }

    /// Waits for `bytes` more, as long as `go_on` says so; false where it did not.
    fn take(&mut self, bytes: u64, go_on: impl Fn() -> bool) -> bool {
        let behind = Duration::from_secs_f64(self.read as f64 / self.rate as f64) + NAP;
        if self.begun.elapsed() > behind {
            // What a slow disk did not give is not made up for.
            *self = Self::new(self.rate);
        }
        self.read += bytes;
        let due = Duration::from_secs_f64(self.read as f64 / self.rate as f64);
        loop {
            if !go_on() {
                return false;
            }
            match due.checked_sub(self.begun.elapsed()) {
                Some(left) if !left.is_zero() => thread::sleep(left.min(NAP)),
                _ => return true,
            }
        }
    }
}

impl Store {
    /// Has a thread look at the tiers from time to time, as long as the store is open.
    pub(in crate::store) fn watch_tiers(self: &Arc<Self>) {
        if self.tiers.configs.is_empty() {
            return;
        }
        let store = Arc::downgrade(self);
        let watch = move || {
            loop {
                thread::sleep(WATCH);
                let Some(store) = store.upgrade() else {
                    return;
                };
                store.look_at_tiers(false);
                store.verify_tiers();
            }
        };
        let thread = thread::Builder::new().name("hearth-tiers".into());
        if let Err(error) = thread.spawn(watch) {
            tracing::warn!(%error, "tiers are looked at only when something is read");
        }
    }

    /// Reads tiers through whose configuration says so.
    fn verify_tiers(self: &Arc<Self>) {
        for tier in &self.usable_tiers() {
            if tier.config.verify != TierVerify::Never
                && self.writable()
                && let Err(error) = self.verify_slowly(tier)
            {
                tier.failed(&error);
            }
        }
    }

    fn verify_slowly(self: &Arc<Self>, tier: &Arc<Tier>) -> Result<()> {
        let Some(path) = self.verified_path(tier) else {
            return Ok(());
        };
        let mut known = self.verified(&path);
        if let Some(finished_at) = known.finished_at
            && known.shards == 0
            && ((tier.config.verify == TierVerify::Once && known.unreadable == 0)
                || now() < finished_at.saturating_add(AGAIN.as_secs()))
        {
            return Ok(());
        }
        known.begin();
        let Some(_lock) = self.lock_verified(&path)? else {
            return Ok(());
        };
        let mut pace = Pace::new(tier.config.verify_rate.0);
        // As long as somebody else has the store open, and this disk is there.
        let Some(id) = tier.id() else {
            return Ok(());
        };
        let go_on = || {
            self.look_at_tiers(false);
            Arc::strong_count(self) > 1 && tier.id().as_ref() == Some(&id)
        };
        while known.shards < SHARDS {
            let shard = format!("objects/sha256/{:02x}", known.shards);
            let shard = tier.store.root.join(shard);
            let mut names = self.disk.list(&shard).unwrap_or_else(|error| {
                tier.failed(&error.into());
                known.unreadable += 1;
                Vec::new()
            });
            names.sort();
            for name in names {
                let digest = name.to_str().and_then(|name| Digest::from_hex(name).ok());
                let Some(digest) = digest else { continue };
                if !go_on() {
                    return Ok(());
                }
                let path = shard.join(name);
                let found = match self.trusts(tier, &digest) {
                    Ok(false) => continue,
                    Ok(true) => hash_direct(&path, |bytes| pace.take(bytes, go_on))
                        .map_err(|error| StoreError::io(path.display(), &error)),
                    Err(error) => Err(error),
                };
                match found {
                    Ok(None) => return Ok(()),
                    Ok(Some(found)) if found != digest => {
                        tracing::error!(path = %path.display(), %found, "an object on a tier is damaged: it is not read from there again");
                        self.distrust(tier, &digest)?;
                    }
                    Ok(Some(_)) => {}
                    Err(error) => {
                        tier.failed(&error);
                        known.unreadable += 1;
                    }
                }
            }
            // Of a disk that is detached nothing is found, which says nothing of it.
            self.look_at_tiers(true);
            if !go_on() {
                return Ok(());
            }
            known.shards += 1;
            self.write_durably(&path, &crate::store::layout::json(&known)?)?;
        }
        known.shards = 0;
        known.finished_at = Some(now());
        self.write_durably(&path, &crate::store::layout::json(&known)?)
    }

    /// All of a tier was read through just now, by somebody who was asked to.
    pub(in crate::store) fn note_verified(&self, tier: &Tier) -> Result<()> {
        if let Some(path) = self.verified_path(tier)
            && let Some(_lock) = self.lock_verified(&path)?
        {
            let known = Verified {
                finished_at: Some(now()),
                ..Verified::default()
            };
            self.write_durably(&path, &crate::store::layout::json(&known)?)?;
        }
        Ok(())
    }

    /// Held by who reads a tier through in the background; none where somebody else does.
    fn lock_verified(&self, path: &Path) -> Result<Option<FileLock>> {
        let dir = run_dir(&self.root).map(|run| run.join("verified"));
        let dir = dir.map_err(|error| StoreError::io(path.display(), &error))?;
        self.make_dir(&dir)?;
        let lock = self.disk.open(&path.with_extension("lock"), Open::Create)?;
        let mine = lock_file(lock.file(), Span::Exclusive, false)
            .map_err(|error| StoreError::io(path.display(), &error))?;
        Ok(mine.then(|| FileLock::new(lock)))
    }

    /// When all of a tier was last read through; and what of it could not be read since.
    pub(super) fn verified_at(&self, tier: &Tier) -> (Option<u64>, u64) {
        let Some(path) = self.verified_path(tier) else {
            return (None, 0);
        };
        let known = self.verified(&path);
        (known.at(), known.unreadable)
    }

    /// What cannot be read was never verified.
    fn verified(&self, path: &Path) -> Verified {
        let known = self.read_small(path, 4096).ok().flatten();
        let known = known.and_then(|json| serde_json::from_slice(&json).ok());
        known.unwrap_or_default()
    }

    fn verified_path(&self, tier: &Tier) -> Option<PathBuf> {
        let name = format!("run/verified/{}.json", tier.key()?);
        Some(self.root.join(name))
    }
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

/// The SHA-256 of a file, from the disk: neither what is cached nor what others want cached takes part.
/// `seen` is told the bytes of each read, and stops it by saying false.
fn hash_direct(path: &Path, mut seen: impl FnMut(u64) -> bool) -> std::io::Result<Option<Digest>> {
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT | libc::O_NOFOLLOW)
        .open(path);
    let file = match direct {
        Ok(file) => file,
        // The file system knows no such reads.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            return hash_file(&std::fs::File::open(path)?, seen);
        }
        Err(error) => return Err(error),
    };
    let mut hasher = Sha256::new();
    let mut buf = AlignedBuf::with_capacity(PIECE);
    let mut at = 0;
    loop {
        let read = match file.read_at(buf.spare_mut(), at) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&buf.spare_mut()[..read]);
        at += read as u64;
        if !seen(read as u64) {
            return Ok(None);
        }
        // Only the last read is no multiple of a block.
        if read % crate::disk::DIRECT_ALIGN != 0 {
            break;
        }
    }
    Ok(Some(Digest::from_bytes(hasher.finalize().into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_hashed_past_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for len in [0, 1, 4096, PIECE - 1, PIECE, PIECE + 4096, 2 * PIECE + 77] {
            let content: Vec<u8> = (0..len).map(|n| (n * 31 / 7) as u8).collect();
            std::fs::write(&path, &content).unwrap();
            let mut read = 0;
            let found = hash_direct(&path, |bytes| {
                read += bytes;
                true
            });
            assert_eq!(found.unwrap(), Some(Digest::of(&content)), "{len}");
            assert_eq!(read, len as u64);
        }
        assert_eq!(hash_direct(&path, |_| false).unwrap(), None);
    }

    #[test]
    fn what_could_not_be_read_is_not_verified_while_it_is_read_again() {
        let mut known = Verified {
            finished_at: Some(1),
            ..Verified::default()
        };
        known.begin();
        known.shards += 1;
        assert_eq!(known.at(), Some(1));
        (known.shards, known.unreadable) = (0, 1);
        assert_eq!(known.at(), None);
        known.begin();
        known.shards += 1;
        known.begin();
        assert_eq!((known.at(), known.unreadable), (None, 0));
    }

    #[test]
    fn no_more_is_read_than_allowed() {
        let mut pace = Pace::new(1 << 20);
        assert!(pace.take(100 << 10, || true));
        // Not before its time; how much later is the scheduler's affair.
        assert!(pace.begun.elapsed() >= Duration::from_millis(97));
        assert!(!pace.take(1 << 30, || false));
    }
}
