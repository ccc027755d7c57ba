//! Verification: reads everything again and compares it with its name.

mod records;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use parking_lot::Mutex;

use super::{
    Result, Store, StoreError,
    collect::partial_id,
    hash_file,
    partial::Paths,
    presence::{Bits, map_len},
    tier::Tier,
};
use crate::{
    digest::{Digest, ObjectId},
    disk::Open,
};

/// Objects read at once: a disk is rarely faster with more, and a busy node keeps its cores.
const READERS: usize = 2;

/// References that need something.
type Users = BTreeMap<Digest, BTreeSet<String>>;

/// What to verify.
#[derive(Debug, Clone, Copy)]
pub enum VerifyScope<'r> {
    /// The artifacts with these references.
    References(&'r [String]),
    /// Everything in the store.
    All,
}

/// Something that is not what its name promises.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Damage {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub what: String,
    /// References of the artifacts that need it.
    pub references: Vec<String>,
    /// Whether it was removed, so that it is fetched again.
    pub removed: bool,
    /// Whether it lies on a tier, of which nothing can be removed.
    pub tier: bool,
    /// Whether it is an object with wrong content on a tier: it is never read from there again.
    pub distrusted: bool,
}

impl Damage {
    /// Whether it is not read any more, so that it is fetched again. What cannot be read on a tier, or
    /// is missing there, may be there when the disk is attached again.
    pub const fn is_mended(&self) -> bool {
        self.removed || self.distrusted
    }
}

/// What a verification found.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct VerifyReport {
    /// Complete objects read.
    pub objects: u64,
    /// Bytes read.
    pub bytes: u64,
    /// References asked for that are not in the store, or only in part.
    pub missing: Vec<String>,
    /// What is damaged.
    pub damaged: Vec<Damage>,
}

/// How far a verification is; given to the callback after each read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VerifyProgress {
    /// Bytes read now.
    pub bytes: u64,
    /// Bytes to read in all.
    pub total: u64,
}

/// An object to read.
struct Check {
    digest: Digest,
    path: PathBuf,
    len: u64,
    /// Where it lies on one.
    tier: Option<Arc<Tier>>,
}

/// What is wrong with an object.
struct Bad {
    what: String,
    /// Whether it was read, and is something else.
    is_wrong: bool,
}

impl VerifyReport {
    /// Adds something that is damaged, and may be removed by now.
    fn add(&mut self, path: PathBuf, what: &str, references: Vec<String>, removed: bool) {
        self.damaged.push(Damage {
            path,
            what: what.to_owned(),
            references,
            removed,
            tier: false,
            distrusted: false,
        });
    }

    /// Adds something that cannot be read, which is not known to be wrong.
    fn unreadable(&mut self, path: PathBuf, why: &dyn std::fmt::Display) {
        self.damaged.push(Damage {
            path,
            what: format!("it cannot be read: {why}"),
            references: Vec::new(),
            removed: false,
            tier: false,
            distrusted: false,
        });
    }
}

impl Store {
    /// Hashes complete objects from the disk (not from the page cache, where it can be dropped),
    /// and checks trees, records, chunk maps, located ids and indexes; of tiers, too. With `repair`, what is
    /// damaged is removed; who wants it fetches it again. Objects that are damaged on a tier are not read from
    /// there any more. `progress` stops the run by saying false.
    ///
    /// # Errors
    /// What the disk says, except that a file which cannot be read is damaged.
    pub fn verify(
        &self,
        scope: VerifyScope<'_>,
        repair: bool,
        progress: impl Fn(VerifyProgress) -> bool + Sync,
    ) -> Result<VerifyReport> {
        if repair {
            self.need_writable()?;
        }
        let stopped = AtomicBool::new(false);
        let progress = |now| {
            let goes_on = progress(now);
            stopped.fetch_or(!goes_on, Ordering::Relaxed);
            goes_on
        };
        let mut report = self.verify_itself(scope, repair, false, progress)?;
        if let VerifyScope::All = scope {
            for tier in &self.usable_tiers() {
                let id = tier.id();
                let mut found = tier.store.verify_itself(scope, false, true, progress)?;
                // Of a disk that is detached nothing is found, which says nothing of it.
                self.look_at_tiers(true);
                if tier.id() != id {
                    let why = tier.problem();
                    let why = why.unwrap_or_else(|| "another disk has taken its place".into());
                    found.unreadable(tier.store.root.clone(), &why);
                }
                let was_read = found.damaged.iter().all(|damage| damage.distrusted);
                self.add_tier(tier, found, &mut report)?;
                if was_read && !stopped.load(Ordering::Relaxed) && self.writable() {
                    self.note_verified(tier)?;
                }
            }
        }
        Ok(report)
    }

    /// Adds what was found on a tier. What is damaged there is not used again.
    fn add_tier(&self, tier: &Tier, found: VerifyReport, report: &mut VerifyReport) -> Result<()> {
        report.objects += found.objects;
        report.bytes += found.bytes;
        report.missing.extend(found.missing);
        for mut damage in found.damaged {
            let name = damage.path.file_name().and_then(|name| name.to_str());
            let object = name.and_then(|name| Digest::from_hex(name).ok());
            // What is missing, or cannot be read, may be there when the disk is attached again.
            if let Some(digest) = object.filter(|_| damage.distrusted) {
                self.distrust(tier, &digest)?;
            }
            damage.tier = true;
            report.damaged.push(damage);
        }
        Ok(())
    }

    /// Verifies the store without its tiers, but for objects of single references. What is `whole`, a tier,
    /// has every object that its records lead to; what cannot be read there is damaged, and the rest is
    /// looked at.
    fn verify_itself(
        &self,
        scope: VerifyScope<'_>,
        repair: bool,
        whole: bool,
        progress: impl Fn(VerifyProgress) -> bool + Sync,
    ) -> Result<VerifyReport> {
        let mut report = VerifyReport::default();
        let mut users = Users::new();
        let mut layers = Users::new();
        let read = self.verify_records(scope, repair, &mut report, &mut users, &mut layers);
        self.or_damaged(read, whole, &mut report)?;
        if whole {
            let read = self.verify_wholeness(&users, &mut report);
            self.or_damaged(read, whole, &mut report)?;
        }
        let mut checks = Vec::new();
        match scope {
            VerifyScope::All => {
                self.all_objects(whole, &mut checks, &mut report)?;
                let read = self.verify_maps(repair, &mut report);
                self.or_damaged(read, whole, &mut report)?;
                let read = self.verify_located(repair, &mut report);
                self.or_damaged(read, whole, &mut report)?;
                let read = self.verify_images(repair, &mut report, &mut layers);
                self.or_damaged(read, whole, &mut report)?;
            }
            VerifyScope::References(references) => {
                for reference in references {
                    let path = self.image_path(reference);
                    self.verify_image(path, repair, &mut report, &mut layers)?;
                }
                for digest in users.keys() {
                    checks.extend(self.check_of(digest)?);
                }
            }
        }
        let read = self.verify_indexes(repair, &mut report, layers);
        self.or_damaged(read, whole, &mut report)?;
        let bad = self.hash_all(&checks, whole, progress, &mut report)?;
        for (check, Bad { what, is_wrong }) in bad {
            let removed = repair && check.tier.is_none();
            if removed {
                self.disk.unlink(&check.path)?;
            }
            if let Some(tier) = check.tier.as_ref().filter(|_| is_wrong) {
                self.distrust(tier, &check.digest)?;
            }
            let references = users.get(&check.digest);
            report.damaged.push(Damage {
                path: check.path.clone(),
                what,
                references: references.into_iter().flatten().cloned().collect(),
                removed,
                tier: check.tier.is_some(),
                distrusted: is_wrong && (whole || check.tier.is_some()),
            });
        }
        Ok(report)
    }

    /// What was read; of a tier, what cannot be read is part of the report.
    fn or_damaged<T: Default>(
        &self,
        read: Result<T>,
        whole: bool,
        report: &mut VerifyReport,
    ) -> Result<T> {
        match read {
            Err(error) if whole => {
                report.unreadable(self.root.clone(), &error);
                Ok(T::default())
            }
            read => read,
        }
    }

    /// Every object of the store itself.
    fn all_objects(
        &self,
        whole: bool,
        checks: &mut Vec<Check>,
        report: &mut VerifyReport,
    ) -> Result<()> {
        let dir = self.root.join("objects/sha256");
        let listed = self.disk.list(&dir).map_err(StoreError::from);
        for shard in self.or_damaged(listed, whole, report)? {
            let listed = self.sharded(&dir.join(shard));
            for (digest, path) in self.or_damaged(listed, whole, report)? {
                let len = match self.disk.stat(&path) {
                    Ok(Some(stat)) => stat.len,
                    // Opening it shows what is wrong.
                    _ if whole => 0,
                    Ok(None) => continue,
                    Err(error) => return Err(error.into()),
                };
                checks.push(Check {
                    digest,
                    path,
                    len,
                    tier: None,
                });
            }
        }
        Ok(())
    }

    /// The object to read for this content: in the store, else on a tier.
    fn check_of(&self, digest: &Digest) -> Result<Option<Check>> {
        let path = self.object_path(digest);
        let own = self.disk.stat(&path)?.map(|stat| (path, stat.len, None));
        let found = own.or_else(|| {
            self.usable_tiers().into_iter().find_map(|tier| {
                let stat = tier.or_nothing(self.stat_on_tier(&tier, digest))?;
                Some((tier.store.object_path(digest), stat.len, Some(tier)))
            })
        });
        Ok(found.map(|(path, len, tier)| Check {
            digest: *digest,
            path,
            len,
            tier,
        }))
    }

    /// Checks that everything is there, as the lock of a baked tier says.
    fn verify_wholeness(&self, users: &Users, report: &mut VerifyReport) -> Result<()> {
        for (digest, references) in users {
            let path = self.object_path(digest);
            if self.disk.stat(&path)?.is_none() {
                let references = references.iter().cloned().collect();
                self.damaged(path, "it is missing", references, false, report)?;
            }
        }
        let promised = self.identity()?.and_then(|identity| identity.lock);
        let path = self.lock_path();
        if let Some(promised) = promised
            && self.lock_digest()?.map(|digest| digest.to_string()) != Some(promised)
        {
            let what = "its digest is not the one in hearth.json";
            self.damaged(path, what, Vec::new(), false, report)?;
        }
        Ok(())
    }

    /// Hashes objects with a few threads; those that are not what they should be, and why.
    fn hash_all<'c>(
        &self,
        checks: &'c [Check],
        whole: bool,
        progress: impl Fn(VerifyProgress) -> bool + Sync,
        report: &mut VerifyReport,
    ) -> Result<Vec<(&'c Check, Bad)>> {
        let total = checks.iter().map(|check| check.len).sum();
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let bad = Mutex::new(Vec::new());
        let counts = Mutex::new((0, 0));
        let seen = |bytes| {
            counts.lock().1 += bytes;
            if !progress(VerifyProgress { bytes, total }) {
                stop.store(true, Ordering::Relaxed);
            }
            !stop.load(Ordering::Relaxed)
        };
        let read = || {
            while !stop.load(Ordering::Relaxed)
                && let Some(check) = checks.get(next.fetch_add(1, Ordering::Relaxed))
            {
                let found = self.check_object(check, whole, seen)?;
                counts.lock().0 += 1;
                if let Some(what) = found {
                    bad.lock().push((check, what));
                }
            }
            Ok::<(), StoreError>(())
        };
        thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(read)).collect();
            readers.into_iter().try_for_each(|reader| {
                reader
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })?;
        (report.objects, report.bytes) = counts.into_inner();
        Ok(bad.into_inner())
    }

    /// What is wrong with an object, if anything.
    fn check_object(
        &self,
        check: &Check,
        whole: bool,
        seen: impl FnMut(u64) -> bool,
    ) -> Result<Option<Bad>> {
        let unreadable = |error: &dyn std::fmt::Display| Bad {
            what: format!("it cannot be read: {error}"),
            is_wrong: false,
        };
        let handle = match self.disk.open(&check.path, Open::Read) {
            Ok(handle) => handle,
            // Nothing is collected there.
            Err(error) if whole => return Ok(Some(unreadable(&error))),
            // Collected meanwhile.
            Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(None),
            // What this process lacks says nothing of the object.
            Err(error) if check.tier.is_none() && is_of_process(error.errno()) => {
                return Err(error.into());
            }
            Err(error) => return Ok(Some(unreadable(&error))),
        };
        // Advice: what stays cached is verified as it would be read.
        let _ = posix_fadvise(handle.file(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        Ok(match hash_file(handle.file(), seen) {
            Ok(Some(digest)) if digest != check.digest => Some(Bad {
                what: format!("its content has the digest {digest}"),
                is_wrong: true,
            }),
            Ok(_) => None,
            Err(error) => Some(unreadable(&error)),
        })
    }

    /// Checks the indexes of layers.
    fn verify_indexes(&self, repair: bool, report: &mut VerifyReport, layers: Users) -> Result<()> {
        for (layer, references) in layers {
            let path = self.index_path(&layer);
            if self.own_index(&layer)?.is_none() && self.disk.stat(&path)?.is_some() {
                let references = references.into_iter().collect();
                let what = "its checksum does not fit";
                self.damaged(path, what, references, repair, report)?;
            }
        }
        Ok(())
    }

    /// Checks the chunk maps of partial objects. Their size is that of the data file.
    fn verify_maps(&self, repair: bool, report: &mut VerifyReport) -> Result<()> {
        for name in self.disk.list(&self.partial_dir())? {
            let Some(id) = partial_id(&name) else {
                continue;
            };
            let paths = Paths::of(&self.partial_dir().join(&name).with_extension(""));
            if self.partial_dir().join(&name) == paths.map && !self.map_is_good(&id, &paths)? {
                // Under the lock that opening takes: nobody reads it between check and removal.
                let _structure = match repair {
                    true => Some(self.lock_partials()?),
                    false => None,
                };
                if !self.map_is_good(&id, &paths)? {
                    self.damaged(
                        paths.map,
                        "its checksum does not fit",
                        Vec::new(),
                        repair,
                        report,
                    )?;
                }
            }
        }
        Ok(())
    }

    /// Checks the records that say which content a located id has.
    fn verify_located(&self, repair: bool, report: &mut VerifyReport) -> Result<()> {
        let mut bad = Vec::new();
        self.each_sharded(&self.root.join("located"), |key, path, _| {
            if self.located(&ObjectId::Located(key))?.is_none() {
                bad.push(path);
            }
            Ok(())
        })?;
        for path in bad {
            // Unless it was collected meanwhile.
            if self.disk.stat(&path)?.is_some() {
                let what = "its checksum does not fit";
                self.damaged(path, what, Vec::new(), repair, report)?;
            }
        }
        Ok(())
    }

    fn map_is_good(&self, id: &ObjectId, paths: &Paths) -> Result<bool> {
        let Some(data) = self.disk.stat(&paths.data)? else {
            // Left over: it is removed before anyone could believe it.
            return Ok(true);
        };
        match self.read_small(&paths.map, map_len(id, data.len)) {
            Ok(Some(bytes)) => Ok(Bits::from_map_file(&bytes, id, data.len).is_some()),
            Ok(None) => Ok(true),
            Err(error) if error.kind() == super::StoreErrorKind::Damaged => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn damaged(
        &self,
        path: PathBuf,
        what: &str,
        references: Vec<String>,
        repair: bool,
        report: &mut VerifyReport,
    ) -> Result<()> {
        if repair {
            self.disk.unlink(&path)?;
        }
        report.add(path, what, references, repair);
        Ok(())
    }
}

/// Whether it is files, memory or rights that this process lacks.
const fn is_of_process(errno: Option<i32>) -> bool {
    matches!(
        errno,
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EACCES | libc::EPERM)
    )
}
