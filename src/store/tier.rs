//! Read-only tiers: secondary disks and directories in the store's own format, below the store.
//!
//! Reads look in the store first, then in the tiers in their order. Nothing is ever written to a
//! tier, and nothing is loaded from one: it costs one small file to open, and that file is looked at
//! again from time to time, so that a disk may come and go. What is wrong with a tier is said once,
//! and then it counts as empty. Tiers are directories that are named (`path`), or found: by a glob, or
//! by the label of a disk's file system (`tier/find.rs`, `tier/label.rs`).
//!
//! An object that a verification found damaged is remembered beside the store
//! (`distrusted/<tier id>/<hex>`), for all processes, and never read from that tier again.

mod background;
mod find;
mod label;
mod listing;
mod placement;
mod whereabouts;

pub use placement::Placement;
pub use whereabouts::{Finder, Whereabouts};

use std::{
    collections::{HashMap, HashSet},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

use super::{
    ByteSize, Complete, FORMAT, ImageRecord, Result, Store, StoreError, StoreErrorKind,
    indexes::layers_of,
};
use crate::{
    digest::{Digest, ObjectId},
    disk::{Open, Span, Stat},
    metrics,
    tree::Artifact,
};

/// How long what is known of a tier is believed.
const RECHECK: Duration = Duration::from_secs(2);
/// At most one warning about reads of a tier in so long.
const WARN_EVERY: Duration = Duration::from_secs(10);
/// Longest label of a file system that a tier may have, in bytes: that of ext4.
const MAX_LABEL: usize = 16;
/// How fast tiers are verified in the background, in bytes a second, where nothing is said.
const VERIFY_RATE: u64 = 64 << 20;

/// A tier in the configuration, or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierConfig {
    /// The directory; or a glob, as in `/mnt/disks/*`: what it matches is used where it is a tier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// In place of a path: the label of the file system (ext4, xfs, erofs) of a disk. Where that is
    /// mounted nowhere, it is mounted in `<store>/run/tiers`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// How it is used.
    #[serde(default)]
    pub mode: TierMode,
    /// Whether it is read through in the background.
    #[serde(default)]
    pub verify: TierVerify,
    /// How fast, in bytes a second.
    #[serde(default = "verify_rate")]
    pub verify_rate: ByteSize,
}

/// How a tier is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TierMode {
    /// It is only read.
    #[default]
    Ro,
}

/// Whether a tier is read through in the background, and compared with its digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TierVerify {
    /// Only when somebody asks for it.
    #[default]
    Never,
    /// Once, after it was attached for the first time.
    Once,
    /// Once a day.
    Always,
}

/// A tier, as `status` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TierStatus {
    /// The directory; where nothing is found, the glob or `LABEL=…`.
    pub path: PathBuf,
    /// Its id; none where it cannot be used.
    pub id: Option<String>,
    /// Why it cannot be used, where it cannot.
    pub problem: Option<String>,
    /// When all of it was last read through on this node, in seconds since the epoch.
    pub verified_at: Option<u64>,
    /// Objects that could not be read then; they are tried again a day later.
    pub unreadable: u64,
    /// Objects that are damaged there, and never read from it.
    pub distrusted: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Health {
    Unknown,
    Ready {
        id: String,
        /// It was baked: what is recorded there is there whole.
        sealed: bool,
    },
    Unusable(String),
}

/// One tier.
#[derive(Debug)]
pub(super) struct Tier {
    /// The same format: never writable, without tiers of its own.
    pub(super) store: Store,
    path: Arc<Path>,
    config: TierConfig,
    health: RwLock<Health>,
    warned: Mutex<Option<Instant>>,
    /// The id that it had when it was last usable.
    seen: Mutex<Option<String>>,
    /// Objects that this process found damaged on the disk with that id.
    bad: Mutex<HashSet<Digest>>,
}

/// The tiers of a store, in order.
#[derive(Debug, Default)]
pub(super) struct Tiers {
    configs: Vec<TierConfig>,
    /// Those that were found when it was last looked.
    list: RwLock<Vec<Arc<Tier>>>,
    /// What was looked for in vain, and what there is to say of that.
    absent: Mutex<Vec<(PathBuf, String)>>,
    checked: Mutex<Option<Instant>>,
}

fn verify_rate() -> ByteSize {
    ByteSize(VERIFY_RATE)
}

impl TierConfig {
    /// The tier in the directory `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: Some(path.into()),
            label: None,
            mode: TierMode::Ro,
            verify: TierVerify::Never,
            verify_rate: verify_rate(),
        }
    }

    /// The tiers on file systems with this label.
    pub fn labelled(label: impl Into<String>) -> Self {
        Self {
            path: None,
            label: Some(label.into()),
            ..Self::at("/")
        }
    }

    /// Whether it can be used wherever a process runs.
    ///
    /// # Errors
    /// [`StoreErrorKind::Invalid`], naming the setting.
    pub fn check(&self) -> Result<()> {
        let wrong = match (&self.path, &self.label) {
            (Some(path), None) if !path.is_absolute() => {
                format!("tier.path = {path:?}: expected an absolute path")
            }
            (Some(path), None) => match find::check(path) {
                Ok(()) => String::new(),
                Err(why) => format!("tier.path = {path:?}: {why}"),
            },
            (None, Some(label)) if !label_is_plain(label) => format!(
                "tier.label = {label:?}: expected 1 to {MAX_LABEL} bytes without slashes and control characters"
            ),
            (None, Some(_)) => String::new(),
            _ => "tier: expected either path or label".to_owned(),
        };
        let wrong = match self.verify_rate.0 {
            0 => "tier.verify_rate = 0: expected bytes a second; verify = \"never\" is the way to have none".into(),
            _ => wrong,
        };
        match wrong.is_empty() {
            true => Ok(()),
            false => Err(StoreError::new(StoreErrorKind::Invalid, wrong)),
        }
    }
}

/// Whether a file system may have this label.
pub fn label_is_plain(label: &str) -> bool {
    (1..=MAX_LABEL).contains(&label.len()) && !label.contains(|c: char| c == '/' || c.is_control())
}

impl Tiers {
    pub(super) fn new(configs: &[TierConfig]) -> Self {
        Self {
            configs: configs.to_vec(),
            ..Self::default()
        }
    }

    fn list(&self) -> Vec<Arc<Tier>> {
        self.list.read().clone()
    }
}

impl Tier {
    fn new(store: Store, config: &TierConfig) -> Self {
        Self {
            path: store.root.as_path().into(),
            store,
            config: config.clone(),
            health: RwLock::new(Health::Unknown),
            warned: Mutex::default(),
            seen: Mutex::default(),
            bad: Mutex::default(),
        }
    }

    /// Looks at `hearth.json`; `ids` are the stores above, by id.
    fn look(&self, ids: &HashMap<String, PathBuf>) -> Health {
        if disk_is_gone(&self.path) {
            return Health::Unusable("its disk was detached while it was mounted".into());
        }
        self.forget_cached();
        let identity = match self.store.identity() {
            Ok(Some(identity)) => identity,
            Ok(None) => {
                return Health::Unusable("there is no hearth.json: is the disk attached?".into());
            }
            Err(error) => return Health::Unusable(error.to_string()),
        };
        if identity.format != FORMAT {
            let format = identity.format;
            return Health::Unusable(format!(
                "it has format {format}, this version of hearth reads tiers of format {FORMAT}"
            ));
        }
        if identity.baking {
            return Health::Unusable("it is half baked: run `hearth bake` again".into());
        }
        match ids.get(&identity.id) {
            Some(other) => Health::Unusable(format!(
                "it has the id {} of {}: the same content twice",
                identity.id,
                other.display()
            )),
            None => Health::Ready {
                id: identity.id,
                sealed: identity.lock.is_some(),
            },
        }
    }

    /// So that it is the disk that answers, not the memory of what it said.
    fn forget_cached(&self) {
        let path = self.store.root.join("hearth.json");
        if let Ok(file) = self.store.disk.open(&path, Open::Read) {
            // Advice: what stays cached is believed a little longer.
            let _ = posix_fadvise(file.file(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
    }

    /// Why it cannot be used, where it cannot.
    pub(super) fn problem(&self) -> Option<String> {
        match &*self.health.read() {
            Health::Unusable(why) => Some(why.clone()),
            Health::Ready { .. } | Health::Unknown => None,
        }
    }

    fn is_ready(&self) -> bool {
        matches!(*self.health.read(), Health::Ready { .. })
    }

    fn is_sealed(&self) -> bool {
        matches!(*self.health.read(), Health::Ready { sealed: true, .. })
    }

    pub(super) fn id(&self) -> Option<String> {
        match &*self.health.read() {
            Health::Ready { id, .. } => Some(id.clone()),
            Health::Unknown | Health::Unusable(_) => None,
        }
    }

    /// What it is called in the store above. Whoever made the tier chose its id.
    fn key(&self) -> Option<String> {
        let id = self.id()?;
        Some(Digest::of(id.as_bytes()).hex()[..32].to_owned())
    }

    /// What was read, or nothing, with a warning, where that failed.
    pub(super) fn or_nothing<T: Default>(&self, read: Result<T>) -> T {
        read.inspect_err(|error| self.failed(error))
            .unwrap_or_default()
    }

    /// A read failed: what was looked for counts as absent here.
    pub(super) fn failed(&self, error: &StoreError) {
        let mut warned = self.warned.lock();
        let path = self.path.display();
        match warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            true => {
                *warned = Some(Instant::now());
                tracing::warn!(tier = %path, %error, "a tier cannot be read: what it has counts as absent");
            }
            false => tracing::debug!(tier = %path, %error, "a tier cannot be read"),
        }
    }
}

/// Whether what is mounted here has lost its disk: the kernel goes on answering from its caches.
fn disk_is_gone(path: &Path) -> bool {
    let known = Path::new("/sys/dev/block");
    path.metadata().is_ok_and(|meta| {
        let (major, minor) = (libc::major(meta.dev()), libc::minor(meta.dev()));
        // Without a number of its own: no single disk is behind it.
        major != 0 && known.exists() && !known.join(format!("{major}:{minor}")).exists()
    })
}

impl Store {
    /// The tiers, as they are now.
    pub fn tiers(&self) -> Vec<TierStatus> {
        self.look_at_tiers(true);
        let status = |tier: &Arc<Tier>| {
            let (verified_at, unreadable) = self.verified_at(tier);
            TierStatus {
                path: tier.path.to_path_buf(),
                id: tier.id(),
                problem: tier.problem(),
                verified_at,
                unreadable,
                distrusted: self.distrusted(tier),
            }
        };
        let absent = self.tiers.absent.lock().clone();
        let absent = absent.into_iter().map(|(path, why)| TierStatus {
            path,
            id: None,
            problem: Some(why),
            verified_at: None,
            unreadable: 0,
            distrusted: 0,
        });
        self.tiers.list().iter().map(status).chain(absent).collect()
    }

    /// Sees which tiers there are and can be used, unless that was done just now.
    pub(super) fn look_at_tiers(&self, now: bool) {
        if self.tiers.configs.is_empty() {
            return;
        }
        let mut checked = match (self.tiers.checked.try_lock(), now) {
            (Some(checked), _) => checked,
            (None, true) => self.tiers.checked.lock(),
            // Somebody looks just now, perhaps at a disk that does not answer.
            (None, false) => return,
        };
        if !now && checked.is_some_and(|at| at.elapsed() < RECHECK) {
            return;
        }
        let before = self.tiers.list();
        let (found, absent) = self.find_tiers(&before);
        let mut ids = HashMap::from([(self.id.clone(), self.root.clone())]);
        for tier in &found {
            let health = tier.look(&ids);
            let mut known = tier.health.write();
            if *known != health {
                let path = tier.path.display();
                match &health {
                    Health::Unusable(why) => {
                        tracing::warn!(tier = %path, why, "a tier cannot be used");
                    }
                    Health::Ready { id, .. } if checked.is_some() => {
                        tracing::warn!(tier = %path, id, "a tier can be used now");
                    }
                    Health::Ready { .. } | Health::Unknown => {}
                }
                *known = health;
            }
            if let Health::Ready { id, .. } = &*known {
                ids.insert(id.clone(), tier.path.to_path_buf());
                let before = tier.seen.lock().replace(id.clone());
                // What is damaged on one disk says nothing of the next one at its place.
                if before.is_some_and(|before| before != *id) {
                    tier.bad.lock().clear();
                }
            }
        }
        for gone in before {
            if found.iter().all(|tier| !Arc::ptr_eq(tier, &gone)) {
                let path = gone.path.display();
                tracing::warn!(tier = %path, "a tier is gone: what only it has is fetched from now on");
                *gone.health.write() = Health::Unusable("it is gone".into());
            }
        }
        *self.tiers.list.write() = found;
        *self.tiers.absent.lock() = absent;
        *checked = Some(Instant::now());
    }

    /// The tiers that can be used.
    pub(super) fn usable_tiers(&self) -> Vec<Arc<Tier>> {
        if self.tiers.configs.is_empty() {
            return Vec::new();
        }
        self.look_at_tiers(false);
        let mut tiers = self.tiers.list();
        tiers.retain(|tier| tier.is_ready());
        tiers
    }

    /// What the first tier says that has it. One that fails is passed over.
    pub(super) fn on_tiers<T>(&self, look: impl Fn(&Tier) -> Result<Option<T>>) -> Option<T> {
        (self.usable_tiers().iter())
            .find_map(|tier| look(tier).inspect_err(|e| tier.failed(e)).ok().flatten())
    }

    /// The object on a tier; of this length, where one is asked for.
    pub(super) fn open_on_tiers(
        &self,
        digest: &Digest,
        size: Option<u64>,
    ) -> Option<Arc<Complete>> {
        self.on_tiers(|tier| {
            if !self.trusts(tier, digest)? {
                return Ok(None);
            }
            let Some(mut found) = tier.store.open_own(digest)? else {
                return Ok(None);
            };
            if let Some(size) = size.filter(|size| *size != found.size) {
                let message = format!(
                    "object {digest} is {} bytes long, not {size}: it is not used",
                    found.size
                );
                return Err(StoreError::new(StoreErrorKind::Damaged, message));
            }
            found.tier = Some(Arc::clone(&tier.path));
            Ok(Some(Arc::new(found)))
        })
    }

    /// What an object on a tier is.
    pub(super) fn stat_on_tiers(&self, digest: &Digest) -> Option<Stat> {
        self.on_tiers(|tier| self.stat_on_tier(tier, digest))
    }

    /// What an object on this tier is.
    pub(super) fn stat_on_tier(&self, tier: &Tier, digest: &Digest) -> Result<Option<Stat>> {
        if !self.trusts(tier, digest)? {
            return Ok(None);
        }
        let path = tier.store.object_path(digest);
        let stat = tier.store.disk.stat(&path)?;
        // No link out of the disk of somebody else, and no pipe that blocks: who opens it is refused as well.
        if stat.is_some_and(|stat| !stat.plain) {
            let message = format!("{} is no file: it is not used", path.display());
            return Err(StoreError::new(StoreErrorKind::Damaged, message));
        }
        Ok(stat)
    }

    /// Whether every object of an artifact is on a tier.
    pub(super) fn tiers_have(&self, artifact: &Artifact) -> Result<bool> {
        Ok(self.missing_on_tiers(artifact)?.is_empty())
    }

    /// The objects of an artifact that are on no tier.
    pub(super) fn missing_on_tiers(&self, artifact: &Artifact) -> Result<Vec<ObjectId>> {
        let mut missing = Vec::new();
        for object in artifact.stored() {
            let content = self.content_of(&object.id)?;
            let found = content.and_then(|digest| self.stat_on_tiers(&digest));
            if found.is_none_or(|stat| stat.len != object.size) {
                missing.push(object.id);
            }
        }
        Ok(missing)
    }

    /// Never reads an object from a tier again. In this process only where the store cannot be
    /// written.
    ///
    /// # Errors
    /// What the disk says.
    pub(super) fn distrust(&self, tier: &Tier, digest: &Digest) -> Result<()> {
        if tier.bad.lock().insert(*digest) {
            metrics::global().store_tier_damaged.add(1);
        }
        let Some(path) = self
            .distrusted_path(tier, digest)
            .filter(|_| self.writable())
        else {
            return Ok(());
        };
        if let Some(dir) = path.parent().and_then(Path::parent) {
            self.make_dir(dir)?;
        }
        self.make_parent(&path)?;
        self.write_durably(&path, b"")
    }

    /// Whether an object may be read from a tier, if it is there.
    fn trusts(&self, tier: &Tier, digest: &Digest) -> Result<bool> {
        if tier.bad.lock().contains(digest) {
            return Ok(false);
        }
        if let Some(path) = self.distrusted_path(tier, digest)
            && self.disk.stat(&path)?.is_some()
        {
            return Ok(false);
        }
        Ok(true)
    }

    fn distrusted_path(&self, tier: &Tier, digest: &Digest) -> Option<PathBuf> {
        Some(self.distrusted_dir(tier)?.join(digest.hex()))
    }

    fn distrusted_dir(&self, tier: &Tier) -> Option<PathBuf> {
        Some(self.root.join("distrusted").join(tier.key()?))
    }

    /// The objects of a tier that are not read from it.
    fn damaged_on(&self, tier: &Tier) -> Result<HashSet<Digest>> {
        let mut damaged = tier.bad.lock().clone();
        if let Some(dir) = self.distrusted_dir(tier) {
            let names = self.disk.list(&dir)?.into_iter();
            damaged.extend(names.filter_map(|name| Digest::from_hex(name.to_str()?).ok()));
        }
        Ok(damaged)
    }

    /// How many objects of a tier are not read from it.
    fn distrusted(&self, tier: &Tier) -> u64 {
        let names = self
            .distrusted_dir(tier)
            .and_then(|dir| self.disk.list(&dir).ok());
        let bad = tier.bad.lock().len();
        names.map_or(bad, |names| names.len().max(bad)) as u64
    }

    /// Whether the image of a reference is known to the store itself: see [`Store::adopt`].
    ///
    /// # Errors
    /// What the disk says.
    pub fn has_adopted(&self, reference: &str) -> Result<bool> {
        Ok(self.own_image(reference)?.is_some())
    }

    /// As [`Store::adopt`], where only a tier knows the reference.
    ///
    /// # Errors
    /// As [`Store::adopt`].
    pub fn adopt_from_below(&self, reference: &str) -> Result<()> {
        match self.is_only_below(reference)? {
            true => self.adopt(reference).map(drop),
            false => Ok(()),
        }
    }

    /// Makes what only a tier knows known to the store itself, so that it stays known when the tier is
    /// gone: the record, tree, image and indexes of a reference, but not its objects.
    ///
    /// # Errors
    /// [`StoreErrorKind::NotFound`] where it is not recorded, [`StoreErrorKind::ReadOnly`], and what
    /// the disk says.
    pub fn adopt(&self, reference: &str) -> Result<(Artifact, Option<ImageRecord>)> {
        self.need_writable()?;
        let Some((record, artifact)) = self.artifact(reference)? else {
            let message = format!("{reference} is not in store {}", self.root.display());
            return Err(StoreError::new(StoreErrorKind::NotFound, message));
        };
        // No collection may come between what is written.
        let records = self.lock_records(Span::Shared)?;
        if self.own_tree(&record.digest)?.is_none() {
            self.write_tree(&record.digest, &artifact.encode())?;
        }
        if self.disk.stat(&self.record_path(reference))?.is_none() {
            self.adopt_record(reference)?;
        }
        drop(records);
        let mut layers = layers_of(&artifact.objects);
        let image = self.image(reference)?;
        if let Some(image) = &image {
            layers.extend(image.layers.iter().map(|layer| layer.blob));
            // Its access profile.
            layers.insert(image.manifest);
        }
        for layer in layers {
            if self.own_index(&layer)?.is_none()
                && let Some(index) = self.index(&layer)?
            {
                self.put_index(&layer, &index)?;
            }
        }
        // Last: it says that the rest is here, too.
        if let Some(image) = &image
            && self.own_image(reference)?.is_none()
        {
            self.record_image(image)?;
        }
        Ok((artifact, image))
    }
}
