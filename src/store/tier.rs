//! Read-only tiers: secondary disks and directories in the store's own format, below the store.
//!
//! Reads look in the store first, then in the tiers in their order. Nothing is ever written to a
//! tier, and nothing is loaded from one: it costs one small file to open, and that file is looked at
//! again from time to time, so that a disk may come and go. What is wrong with a tier is said once,
//! and then it counts as empty.
//!
//! An object that a verification found damaged is remembered beside the store
//! (`distrusted/<tier id>/<hex>`), for all processes, and never read from that tier again.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

use super::{Complete, FORMAT, Result, Store, StoreError, StoreErrorKind};
use crate::{
    digest::{Digest, ObjectId},
    disk::Stat,
    tree::Artifact,
};

/// How long what is known of a tier is believed.
const RECHECK: Duration = Duration::from_secs(2);
/// At most one warning about reads of a tier in so long.
const WARN_EVERY: Duration = Duration::from_secs(10);

/// A tier in the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierConfig {
    /// The directory.
    pub path: PathBuf,
    /// How it is used.
    #[serde(default)]
    pub mode: TierMode,
}

/// How a tier is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TierMode {
    /// It is only read.
    #[default]
    Ro,
}

/// A tier, as `status` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TierStatus {
    /// The directory.
    pub path: PathBuf,
    /// Its id; none where it cannot be used.
    pub id: Option<String>,
    /// Why it cannot be used, where it cannot.
    pub problem: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Health {
    Unknown,
    Ready { id: String },
    Unusable(String),
}

/// One tier.
#[derive(Debug)]
pub(super) struct Tier {
    /// The same format: never writable, without tiers of its own.
    pub(super) store: Store,
    path: Arc<Path>,
    health: RwLock<Health>,
    warned: Mutex<Option<Instant>>,
    /// Objects that this process found damaged.
    bad: Mutex<HashSet<Digest>>,
}

/// The tiers of a store, in order.
#[derive(Debug, Default)]
pub(super) struct Tiers {
    list: Vec<Tier>,
    checked: Mutex<Option<Instant>>,
}

impl TierConfig {
    /// Whether it can be used wherever a process runs.
    ///
    /// # Errors
    /// [`StoreErrorKind::Invalid`], naming the path.
    pub(super) fn check(&self) -> Result<()> {
        if self.path.is_absolute() {
            return Ok(());
        }
        let message = format!("tier.path = {:?}: expected an absolute path", self.path);
        Err(StoreError::new(StoreErrorKind::Invalid, message))
    }
}

impl Tiers {
    pub(super) fn new(list: Vec<Store>) -> Self {
        let tier = |store: Store| Tier {
            path: store.root.as_path().into(),
            store,
            health: RwLock::new(Health::Unknown),
            warned: Mutex::default(),
            bad: Mutex::default(),
        };
        Self {
            list: list.into_iter().map(tier).collect(),
            checked: Mutex::default(),
        }
    }
}

impl Tier {
    /// Looks at `hearth.json`; `ids` are the stores above, by id.
    fn look(&self, ids: &HashMap<String, PathBuf>) -> Health {
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
            None => Health::Ready { id: identity.id },
        }
    }

    fn id(&self) -> Option<String> {
        match &*self.health.read() {
            Health::Ready { id } => Some(id.clone()),
            Health::Unknown | Health::Unusable(_) => None,
        }
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

impl Store {
    /// The tiers, as they are now.
    pub fn tiers(&self) -> Vec<TierStatus> {
        self.look_at_tiers(true);
        let status = |tier: &Tier| TierStatus {
            path: tier.path.to_path_buf(),
            id: tier.id(),
            problem: match &*tier.health.read() {
                Health::Unusable(why) => Some(why.clone()),
                Health::Ready { .. } | Health::Unknown => None,
            },
        };
        self.tiers.list.iter().map(status).collect()
    }

    /// Sees which tiers can be used, unless that was done just now.
    pub(super) fn look_at_tiers(&self, now: bool) {
        if self.tiers.list.is_empty() {
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
        let mut ids = HashMap::from([(self.id.clone(), self.root.clone())]);
        for tier in &self.tiers.list {
            let health = tier.look(&ids);
            let mut before = tier.health.write();
            if *before != health {
                let path = tier.path.display();
                match &health {
                    Health::Unusable(why) => {
                        tracing::warn!(tier = %path, why, "a tier cannot be used");
                    }
                    Health::Ready { id } if *before != Health::Unknown => {
                        tracing::warn!(tier = %path, id, "a tier can be used now");
                    }
                    Health::Ready { .. } | Health::Unknown => {}
                }
                *before = health;
            }
            if let Health::Ready { id } = &*before {
                ids.insert(id.clone(), tier.path.to_path_buf());
            }
        }
        *checked = Some(Instant::now());
    }

    /// The tiers that can be used.
    pub(super) fn usable_tiers(&self) -> impl Iterator<Item = &Tier> {
        self.look_at_tiers(false);
        let usable = |tier: &&Tier| matches!(*tier.health.read(), Health::Ready { .. });
        self.tiers.list.iter().filter(usable)
    }

    /// What the first tier says that has it. One that fails is passed over.
    pub(super) fn on_tiers<T>(&self, look: impl Fn(&Tier) -> Result<Option<T>>) -> Option<T> {
        self.usable_tiers()
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
        Ok(tier.store.disk.stat(&tier.store.object_path(digest))?)
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
        tier.bad.lock().insert(*digest);
        let Some(path) = self.distrusted_path(tier, digest).filter(|_| self.writable) else {
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
        let path = tier.store.object_path(digest);
        // No link out of the disk of somebody else, and no pipe that blocks.
        if path.symlink_metadata().is_ok_and(|meta| !meta.is_file()) {
            let message = format!("{} is no file: it is not used", path.display());
            return Err(StoreError::new(StoreErrorKind::Damaged, message));
        }
        Ok(true)
    }

    fn distrusted_path(&self, tier: &Tier, digest: &Digest) -> Option<PathBuf> {
        let id = tier.id()?;
        // Whoever made the tier chose it.
        let id = Digest::of(id.as_bytes()).hex();
        let dir = self.root.join("distrusted").join(&id[..32]);
        Some(dir.join(digest.hex()))
    }
}
