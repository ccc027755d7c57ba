//! Bakes: a directory that is filled as a store, and then sealed as a read-only tier.
//!
//! While it is filled, `hearth.json` says so, and no store takes it for a tier. Sealing checks that
//! everything is there, removes what only a living store needs, writes `hearth.lock`, and then, as the
//! last step, replaces `hearth.json` by one with the digest of the lock. A bake that was killed goes
//! on where it stopped; after a power failure, too. One that ends before anything has arrived leaves nothing that
//! it made.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ffi::{OsStr, OsString},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::UNIX_EPOCH,
};

use sha2::{Digest as _, Sha256};

use super::{
    CollectOptions, Config, FORMAT, Identity, Lock, LockedArtifact, Result, Store, StoreError,
    StoreErrorKind, TierConfig,
    batch::Batch,
    hash_file,
    layout::{self, FileLock},
    tier::Tier,
};
use crate::{
    digest::Digest,
    disk::{Open, RealDisk, Span},
    tree::Artifact,
};

/// What an object is copied in.
const PIECE: usize = 1 << 20;
/// Objects that get their names together.
const BATCH: usize = 1024;
/// Directories whose files mean nothing in a sealed tier.
const LIVING: [&str; 3] = ["objects/tmp", "partial", "distrusted"];
/// Files that are there before anything is.
const FIRST: [&str; 4] = ["hearth.json", "bake.lock", "gc.lock", "lock"];

/// A directory on its way to a tier, held by this process alone.
#[derive(Debug)]
pub struct Bake {
    store: Arc<Store>,
    /// Where this process has begun it.
    made: Option<Made>,
    _lock: FileLock,
}

/// How a bake found its directory.
#[derive(Debug)]
struct Made {
    /// That, where it was not there, and those above it that were not.
    dirs: Vec<PathBuf>,
    /// What was in it.
    before: Vec<OsString>,
}

impl Bake {
    /// Begins a bake in the directory `root`, or goes on with one. `older` are tiers whose content is
    /// taken over.
    ///
    /// # Errors
    /// [`StoreErrorKind::Invalid`] where something else is in the directory, or an older tier cannot be
    /// used; [`StoreErrorKind::InUse`] where another process bakes there; and what the disk says.
    pub fn begin(root: &Path, config: &Config, older: &[TierConfig]) -> Result<Self> {
        config.check()?;
        let mut store = Store::unopened(Arc::new(RealDisk), root, config, older)?;
        let invalid = |why: &str| {
            let message = format!("cannot bake to {}: {why}", root.display());
            StoreError::new(StoreErrorKind::Invalid, message)
        };
        let mut made = None;
        let identity = match store.identity()? {
            Some(identity) if identity.lock.is_some() => {
                return Err(invalid(
                    "it holds a finished tier; bake to another directory, with --update for what is the same",
                ));
            }
            Some(identity) if !identity.baking => return Err(invalid("it holds a store")),
            Some(identity) => identity,
            None => {
                let ours = |name: &OsStr| {
                    name == "lost+found" || layout::DIRECTORIES.iter().any(|dir| name == *dir)
                };
                let names = store.disk.list(root)?;
                if !names.iter().all(|name| ours(name)) {
                    return Err(invalid("it is not empty"));
                }
                made = Some(Made::found(root, names));
                store.make(true)?
            }
        };
        store.begin(identity);
        store.need_writable()?;
        let lock = store.lock_removable(&store.bake_lock(), Span::Exclusive, false)?;
        // Who had the lock before may have finished, or given up.
        let baking = store.identity()?.is_some_and(|identity| identity.baking);
        let Some(lock) = lock.filter(|_| baking) else {
            let message = format!("another process bakes to {}", root.display());
            return Err(StoreError::new(StoreErrorKind::InUse, message));
        };
        let bake = Self {
            store: Arc::new(store),
            made,
            _lock: lock,
        };
        if let Some((path, why)) = (bake.store.tiers().into_iter())
            .find_map(|tier| tier.problem.map(|why| (tier.path, why)))
        {
            let message = format!("tier {} cannot be used: {why}", path.display());
            return Err(StoreError::new(StoreErrorKind::Invalid, message));
        }
        Ok(bake)
    }

    /// Whether a bake of this directory is finished.
    ///
    /// # Errors
    /// [`StoreErrorKind::Damaged`] where that cannot be said, and what the disk says.
    pub fn is_sealed(root: &Path) -> Result<bool> {
        let store = Store::unopened(Arc::new(RealDisk), root, &Config::default(), &[])?;
        Ok(store
            .identity()?
            .is_some_and(|identity| identity.lock.is_some()))
    }

    /// The store that is filled.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Links or copies what of a recorded artifact only an older tier has. False where not all of
    /// it is here then: something is damaged there, and has to be fetched.
    ///
    /// # Errors
    /// [`StoreErrorKind::NotFound`] where it is not recorded, and what the disk says.
    pub fn take_over(&self, reference: &str) -> Result<bool> {
        let store = &self.store;
        let (artifact, image) = store.adopt(reference)?;
        let mut contents: Vec<(Digest, Option<u64>)> = Vec::new();
        if let Some(image) = image {
            contents.extend(image.documents().map(|document| (document, None)));
        }
        let mut whole = true;
        for object in artifact.stored() {
            match store.content_of(&object.id)? {
                Some(digest) => {
                    store.write_located(&object.id, &digest, object.size)?;
                    contents.push((digest, Some(object.size)));
                }
                None => whole = false,
            }
        }
        for part in contents.chunks(BATCH) {
            let mut batch = Batch::new(store);
            let mut taken = HashSet::new();
            for (digest, size) in part {
                if !store.has_itself(digest)? && taken.insert(*digest) {
                    // A document of an image may be missing: it was never kept.
                    whole &= self.take(&mut batch, digest, *size)? || size.is_none();
                }
            }
            batch.publish()?;
        }
        Ok(whole)
    }

    /// How many bytes [`Bake::take_over`] of these will copy, since an older tier lies on another disk; and
    /// `more`, which would be copied from there, too.
    ///
    /// # Errors
    /// What the disk says.
    pub fn copies(&self, artifacts: &[Arc<Artifact>], more: u64) -> Result<u64> {
        let store = &self.store;
        let mut far = Vec::new();
        for tier in store.usable_tiers() {
            let temp = store.temp_path();
            match store.disk.link(&tier.store.root.join("hearth.json"), &temp) {
                Ok(true) => drop(store.disk.unlink(&temp)?),
                _ => far.push(tier),
            }
        }
        if far.is_empty() {
            return Ok(0);
        }
        let mut copied = BTreeMap::new();
        for object in artifacts.iter().flat_map(|artifact| artifact.stored()) {
            if let Some(digest) = store.content_of(&object.id)?
                && !store.has_itself(&digest)?
            {
                let stat = |tier: &Arc<Tier>| tier.or_nothing(store.stat_on_tier(tier, &digest));
                if far.iter().any(|tier| stat(tier).is_some()) {
                    copied.insert(digest, object.size);
                }
            }
        }
        Ok(copied.into_values().fold(more, u64::saturating_add))
    }

    /// Takes an object from the first older tier where it is what it should be.
    fn take(&self, batch: &mut Batch<'_>, digest: &Digest, size: Option<u64>) -> Result<bool> {
        let store = &self.store;
        for tier in &store.usable_tiers() {
            let stat = match store.stat_on_tier(tier, digest) {
                Ok(Some(stat)) if size.is_none_or(|size| size == stat.len) => stat,
                _ => continue,
            };
            let temp = store.temp_path();
            let from = tier.store.object_path(digest);
            batch.open()?;
            let found = match store.disk.link(&from, &temp) {
                Ok(true) => hash_file(store.disk.open(&temp, Open::Read)?.file(), |_| true)
                    .map_err(|error| StoreError::io(from.display(), &error)),
                // Another file system, or not our file.
                _ => copy(store, &from, &temp, stat.len).map(Some),
            };
            match found {
                Ok(Some(found)) if found == *digest => {
                    batch.add_ready(temp, store.object_path(digest), stat.len);
                    return Ok(true);
                }
                found => {
                    store.disk.unlink(&temp)?;
                    self.reject(tier, digest, found)?;
                }
            }
        }
        Ok(false)
    }

    /// An object of an older tier is not what it should be, or could not be taken.
    fn reject(&self, tier: &Tier, digest: &Digest, found: Result<Option<Digest>>) -> Result<()> {
        match found {
            Err(error) if error.kind() == StoreErrorKind::NoSpace => return Err(error),
            Err(error) => tracing::warn!(%digest, %error, "an object cannot be taken over"),
            Ok(_) => {
                let tier = tier.store.root.display();
                tracing::warn!(%digest, %tier, "an object is damaged: it is not taken over");
            }
        }
        self.store.distrust(tier, digest)
    }

    /// Makes a tier of it: of these references, and nothing else. Nobody may have anything of it open.
    /// Where it is to be `reproducible`, nothing of it says when it was made.
    ///
    /// # Errors
    /// [`StoreErrorKind::NotFound`] where something is missing, [`StoreErrorKind::Invalid`] where it is
    /// not what `expected` says, [`StoreErrorKind::InUse`], and what the disk says. It can be baked on.
    pub fn seal(
        mut self,
        references: &[String],
        expected: Option<&Lock>,
        reproducible: bool,
    ) -> Result<Lock> {
        let store = &self.store;
        for record in store.own_records()? {
            if !references.contains(&record.reference) {
                store.remove_forced(&record.reference)?;
            }
        }
        let lock = self.lock(references)?;
        if let Some(difference) = expected.and_then(|expected| expected.difference(&lock)) {
            let message = format!("what was baked is not what the lock says: {difference}");
            return Err(StoreError::new(StoreErrorKind::Invalid, message));
        }
        let everything = CollectOptions {
            target_bytes: Some(u64::MAX),
            dry_run: false,
        };
        store.collect(&everything)?;
        store.each_object(|digest, path, _| {
            if lock.objects.contains_key(&digest.to_string()) {
                return Ok(());
            }
            let message = format!("{} is not needed, but in use", path.display());
            Err(StoreError::new(StoreErrorKind::InUse, message))
        })?;
        if reproducible {
            for reference in references {
                store.forget_times(reference)?;
            }
            store.sort_chains()?;
        }
        self.clean()?;
        let text = lock.text();
        let text = text.map_err(|why| StoreError::new(StoreErrorKind::Invalid, why))?;
        store.write_durably(&store.lock_path(), text.as_bytes())?;
        store.open_root()?.sync_fs()?;
        let digest = Digest::of(text.as_bytes());
        let identity = Identity {
            format: FORMAT,
            id: match reproducible {
                true => digest.hex()[..32].to_owned(),
                false => store.id.clone(),
            },
            baking: false,
            lock: Some(digest.to_string()),
        };
        let mut json = layout::json(&identity)?;
        json.push(b'\n');
        store.write_durably(&store.root.join("hearth.json"), &json)?;
        store.disk.unlink(&store.bake_lock())?;
        self.made = None;
        if reproducible {
            let at = fs::FileTimes::new().set_accessed(UNIX_EPOCH);
            set_times(&store.root, at.set_modified(UNIX_EPOCH))
                .map_err(|error| StoreError::io(store.root.display(), &error))?;
        }
        Ok(lock)
    }

    /// What these references need, all of which must be here.
    fn lock(&self, references: &[String]) -> Result<Lock> {
        let store = &self.store;
        let mut artifacts = Vec::new();
        let mut objects = BTreeMap::new();
        for reference in references.iter().collect::<BTreeSet<_>>() {
            let Some((record, artifact)) = store.artifact(reference)? else {
                return Err(missing(reference, "its record"));
            };
            for object in artifact.stored() {
                let content = store.content_of(&object.id)?;
                let len = match &content {
                    Some(digest) => self.len(digest)?,
                    None => None,
                };
                match (content, len) {
                    (Some(digest), Some(len)) if len == object.size => objects.insert(digest, len),
                    _ => return Err(missing(reference, &format!("object {}", object.id))),
                };
            }
            let mut index = None;
            if let Some(image) = store.own_image(reference)? {
                for layer in &image.layers {
                    if store.own_index(&layer.blob)?.is_none() {
                        return Err(missing(reference, &format!("the index of {}", layer.blob)));
                    }
                }
                for document in image.documents() {
                    if let Some(len) = self.len(&document)? {
                        objects.insert(document, len);
                        index = index.or(image.index.filter(|index| *index == document));
                    }
                }
            }
            artifacts.push(LockedArtifact {
                reference: record.reference,
                revision: record.revision,
                index: index.map(|index| index.to_string()),
                digest: record.digest.to_string(),
                files: artifact.tree.files().len() as u64,
                bytes: artifact.size(),
            });
        }
        Ok(Lock::new(artifacts, objects))
    }

    fn len(&self, digest: &Digest) -> Result<Option<u64>> {
        let stat = self.store.disk.stat(&self.store.object_path(digest))?;
        Ok(stat.map(|stat| stat.len))
    }

    /// Removes what only a living store needs.
    fn clean(&self) -> Result<()> {
        let (store, disk) = (&self.store, &self.store.disk);
        let mut dirs: Vec<PathBuf> = store.import_dirs()?;
        let mut pins: Vec<PathBuf> = Vec::new();
        for dir in ["pins", "distrusted"] {
            let dir = store.root.join(dir);
            pins.extend(disk.list(&dir)?.into_iter().map(|name| dir.join(name)));
        }
        dirs.extend(pins.iter().cloned());
        dirs.extend(LIVING.map(|dir| store.root.join(dir)));
        for dir in dirs {
            for name in disk.list(&dir)? {
                let path = dir.join(name);
                if !pins.contains(&path) {
                    disk.unlink(&path)?;
                }
            }
        }
        for dir in pins {
            disk.remove_dir(&dir)?;
        }
        let artifacts = store.root.join("artifacts");
        for name in disk.list(&artifacts)? {
            if Path::new(&name).extension() == Some(OsStr::new("lock")) {
                disk.unlink(&artifacts.join(name))?;
            }
        }
        for name in ["images/lock", "gc.lock"] {
            disk.unlink(&store.root.join(name))?;
        }
        Ok(())
    }
}

impl Drop for Bake {
    fn drop(&mut self) {
        let root = &self.store.root;
        // Whoever uses the store may yet bring something.
        if let Some(made) = &self.made
            && Arc::strong_count(&self.store) == 1
            && let Err(error) = made.take_back(root)
        {
            tracing::warn!(%error, dir = %root.display(), "a bake that brought nothing left something behind");
        }
    }
}

impl Made {
    fn found(root: &Path, before: Vec<OsString>) -> Self {
        let missing = root
            .ancestors()
            .take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists());
        let dirs = missing.map(Path::to_owned).collect();
        Self { dirs, before }
    }

    /// Removes all that was made, where nothing else is there yet.
    fn take_back(&self, root: &Path) -> io::Result<()> {
        if !is_blank(root)? {
            return Ok(());
        }
        for entry in fs::read_dir(root)? {
            let entry = entry?;
            if self.before.contains(&entry.file_name()) {
                continue;
            }
            match entry.file_type()?.is_dir() {
                true => fs::remove_dir_all(entry.path())?,
                false => fs::remove_file(entry.path())?,
            }
        }
        self.dirs.iter().try_for_each(fs::remove_dir)
    }
}

/// Whether below `dir` there are but directories, and the files of a store that holds nothing.
fn is_blank(dir: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let blank = match entry.file_type()?.is_dir() {
            // Nobody but the system may look into it.
            true if entry.file_name() == "lost+found" => true,
            true => is_blank(&entry.path())?,
            false => FIRST.iter().any(|name| entry.file_name() == *name),
        };
        if !blank {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Store {
    pub(super) fn lock_path(&self) -> PathBuf {
        self.root.join("hearth.lock")
    }

    /// flock: held exclusively while it is baked.
    fn bake_lock(&self) -> PathBuf {
        self.root.join("bake.lock")
    }

    /// The digest of `hearth.lock`; none where there is none.
    pub(super) fn lock_digest(&self) -> Result<Option<Digest>> {
        let file = match self.disk.open(&self.lock_path(), Open::Read) {
            Ok(file) => file,
            Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        hash_file(file.file(), |_| true)
            .map_err(|error| StoreError::io(self.lock_path().display(), &error))
    }
}

/// Copies an object to a new file, but for holes; the digest of what it read.
fn copy(store: &Store, from: &Path, to: &Path, len: u64) -> Result<Digest> {
    let (from, to) = (
        store.disk.open(from, Open::Read)?,
        store.disk.open(to, Open::New)?,
    );
    let mut hasher = Sha256::new();
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < len {
        let part = &mut piece[..(len - at).min(PIECE as u64) as usize];
        from.read_at(part, at)?;
        hasher.update(&*part);
        if part.iter().any(|byte| *byte != 0) {
            to.write_at(part, at)?;
        }
        at += part.len() as u64;
    }
    to.set_len(len)?;
    Ok(Digest::from_bytes(hasher.finalize().into()))
}

/// Sets the times of everything below `dir`, and then of itself.
fn set_times(dir: &Path, times: fs::FileTimes) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => set_times(&entry.path(), times)?,
            false => fs::File::open(entry.path())?.set_times(times)?,
        }
    }
    fs::File::open(dir)?.set_times(times)
}

fn missing(reference: &str, what: &str) -> StoreError {
    let message = format!("{reference} is not whole: {what} is missing");
    StoreError::new(StoreErrorKind::NotFound, message)
}
