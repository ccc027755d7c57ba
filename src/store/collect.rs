//! Collection: evicts artifacts that were not used for longest, then removes what nothing leads to.
//!
//! Roots are recorded artifacts, with their images and the generations before them that are still
//! needed, trees that someone holds, and what living imports list. The index of a layer stays while
//! objects of a root are made from it. Under the exclusive records lock nobody records, finishes or
//! puts; who recorded before is seen, who records later looks later. An object that is open in any
//! process (shared flock) is left for the next time, so is an open partial.
//!
//! Where a record cannot be read, nobody knows what it leads to: nothing is taken for unreferenced then.

mod evict;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    ffi::OsStr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    Record, Result, Store, StoreError, images::ImageState, indexes::layers_of, layout::FileLock,
    space::Wanted,
};
use crate::{
    digest::{Digest, ObjectId},
    disk::{Open, Span, lock_file},
    tree::Artifact,
};

/// Temporary files older than this belong to nobody alive.
const TEMP_AGE: Duration = Duration::from_secs(3600);

/// Most bytes of what an import lists: of 32 million files.
const MAX_KEPT: u64 = 1 << 30;

/// What to collect.
#[derive(Debug, Clone, Copy, Default)]
pub struct CollectOptions {
    /// Evict until the store takes no more than this many bytes; by the watermarks where absent.
    pub target_bytes: Option<u64>,
    /// Only say what would go.
    pub dry_run: bool,
}

/// What a collection removed, or would remove.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct CollectReport {
    /// References of evicted artifacts, in the order of eviction.
    pub evicted: Vec<String>,
    /// Complete objects removed.
    pub objects: u64,
    /// Partial objects removed.
    pub partials: u64,
    /// Trees, indexes, records, lock and temporary files removed.
    pub others: u64,
    /// Bytes freed on the disk.
    pub bytes: u64,
    /// Bytes that the store takes afterwards.
    pub used: u64,
}

/// What is on the disk and what leads to it, under the exclusive records lock.
struct Sweep<'s> {
    store: &'s Store,
    dry_run: bool,
    _records: Option<FileLock>,
    /// Complete objects: bytes on the disk.
    objects: HashMap<Digest, u64>,
    /// Partial objects: paths without extension, one for each who claims to have it.
    partials: HashMap<ObjectId, BTreeSet<PathBuf>>,
    /// Artifacts, least recently used last.
    artifacts: Vec<Known>,
    /// How many artifacts lead to an id, and to a content.
    ids: HashMap<ObjectId, u32>,
    contents: HashMap<Digest, u32>,
    trees: HashSet<Digest>,
    /// Indexes of layers: bytes on the disk; and how many artifacts need a layer.
    indexes: HashMap<Digest, u64>,
    layers: HashMap<Digest, u32>,
    /// What imports left that are dead.
    dead: Vec<PathBuf>,
    /// Files that are damaged, missing or of a newer version, so that what they lead to is not known.
    unreadable: BTreeSet<PathBuf>,
    report: CollectReport,
}

/// An artifact that leads to objects.
struct Known {
    /// `None` for a tree that is only held.
    record: Option<Record>,
    leads: Leads,
    /// The generation before it, while not all of it is here.
    previous: Option<(Digest, Leads)>,
    /// Its tree cannot be read.
    unreadable: bool,
}

/// What something leads to.
#[derive(Default)]
struct Leads {
    ids: Vec<ObjectId>,
    contents: Vec<Digest>,
    layers: BTreeSet<Digest>,
}

impl Store {
    /// Removes what no recorded, held or open thing leads to; evicts artifacts above the high
    /// watermark down to the low one, or down to the target. Pinned, held or open content never
    /// goes.
    ///
    /// # Errors
    /// What the disk says; what was removed until then is gone.
    pub fn collect(&self, options: &CollectOptions) -> Result<CollectReport> {
        let mut sweep = Sweep::new(self, options.dry_run)?;
        sweep.remove_unreferenced()?;
        let before = match options.dry_run {
            true => self.usage()?.bytes().saturating_sub(sweep.report.bytes),
            false => self.usage()?.bytes(),
        };
        let target = match options.target_bytes {
            Some(target) => target,
            None => self.watermark(before)?,
        };
        let freed = sweep.report.bytes;
        let goal = freed + before.saturating_sub(target);
        sweep.evict(goal, &[])?;
        sweep.remove_small()?;
        sweep.report.used = before.saturating_sub(sweep.report.bytes - freed);
        Ok(sweep.report)
    }

    /// Whether a collection by the watermarks may have something to evict, as far as the file system alone
    /// tells. It walks nothing.
    ///
    /// # Errors
    /// What the disk says.
    pub fn may_be_full(&self) -> Result<bool> {
        let space = self.disk.space(&self.root)?;
        // The store takes no more than all that is taken.
        let most = space.total.saturating_sub(space.free);
        Ok(self.watermark(most)? < most)
    }

    /// Whether the store takes more than the watermarks let it. Walks all of it, under no lock.
    ///
    /// # Errors
    /// What the disk says.
    pub fn is_over(&self) -> Result<bool> {
        let used = self.usage()?.bytes();
        Ok(self.watermark(used)? < used)
    }

    /// What the store should take at most: `used` below the high watermark, else the low one.
    fn watermark(&self, used: u64) -> Result<u64> {
        let free = self.disk.space(&self.root)?.free;
        let by_disk = used
            .saturating_add(free)
            .saturating_sub(self.config.min_free.0);
        let limit = self
            .config
            .max_bytes
            .map_or(by_disk, |max| max.0.min(by_disk));
        let part = |of: f64| (limit as f64 * of) as u64;
        Ok(match used > part(self.config.high_watermark) {
            true => part(self.config.low_watermark),
            false => used,
        })
    }

    /// Frees `bytes` by removing what nothing leads to and evicting what is used least, but never
    /// `keep`; how many were, or would be, freed.
    pub(super) fn evict(&self, bytes: u64, keep: &[Arc<Wanted>], dry_run: bool) -> Result<u64> {
        let mut sweep = Sweep::new(self, dry_run)?;
        sweep.remove_unreferenced()?;
        sweep.evict(bytes, keep)?;
        Ok(sweep.report.bytes)
    }
}

impl<'s> Sweep<'s> {
    fn new(store: &'s Store, dry_run: bool) -> Result<Self> {
        store.need_writable()?;
        let mut sweep = Self {
            store,
            dry_run,
            _records: Some(store.lock_records(Span::Exclusive)?),
            objects: HashMap::new(),
            partials: HashMap::new(),
            artifacts: Vec::new(),
            ids: HashMap::new(),
            contents: HashMap::new(),
            trees: HashSet::new(),
            indexes: HashMap::new(),
            layers: HashMap::new(),
            dead: Vec::new(),
            unreadable: BTreeSet::new(),
            report: CollectReport::default(),
        };
        let objects = &mut sweep.objects;
        store.each_object(|digest, _, stat| {
            objects.insert(digest, stat.disk);
            Ok(())
        })?;
        for name in store.disk.list(&store.partial_dir())? {
            if let Some(id) = partial_id(&name) {
                let stem = store.partial_dir().join(&name).with_extension("");
                sweep.partials.entry(id).or_default().insert(stem);
            }
        }
        for (path, name) in sweep.files("indexes")? {
            let layer = name.to_str().and_then(|n| Digest::from_hex(n).ok());
            if let Some(layer) = layer
                && let Some(stat) = store.disk.stat(&path)?
            {
                sweep.indexes.insert(layer, stat.disk);
            }
        }
        sweep.look_at_imports()?;
        let mut records = Vec::new();
        for (path, _) in sweep.files("artifacts")? {
            if path.extension() != Some(OsStr::new("json")) {
                continue;
            }
            match store.read_record(&path)? {
                Some(record) => records.push(record),
                // Unless it was removed meanwhile.
                None if store.disk.stat(&path)?.is_some() => sweep.cannot_read(path),
                None => {}
            }
        }
        records.sort_by_key(|record| std::cmp::Reverse(record.used));
        for record in records {
            let digest = record.digest;
            sweep.add(Some(record), &digest)?;
        }
        sweep.look_at_tiers()?;
        for name in store.disk.list(&store.root.join("trees"))? {
            let digest = name.to_str().and_then(|n| Digest::from_hex(n).ok());
            if let Some(digest) = digest
                && !sweep.trees.contains(&digest)
                && store.tree_is_held(&digest)?
            {
                sweep.add(None, &digest)?;
            }
        }
        Ok(sweep)
    }

    fn add(&mut self, record: Option<Record>, digest: &Digest) -> Result<()> {
        self.trees.insert(*digest);
        let mut known = Known {
            record,
            leads: Leads::default(),
            previous: None,
            unreadable: false,
        };
        let artifact = self.store.read_tree(digest)?;
        if let Some(artifact) = &artifact {
            known.leads = self.leads(artifact)?;
        } else {
            known.unreadable = true;
            self.cannot_read(self.store.tree_path(digest));
        }
        if let Some(record) = &known.record {
            if let Some(image) = self.store.image(&record.reference)? {
                known.leads.contents.extend(image.documents());
                let layers = image.layers.iter().map(|l| l.blob);
                known.leads.layers.extend(layers);
            } else {
                let path = self.store.image_path(&record.reference);
                if let ImageState::Damaged = self.store.read_image(&path)? {
                    self.cannot_read(path);
                }
            }
            known.previous = self.previous(record, artifact.as_ref())?;
        }
        self.count(&known.leads);
        if let Some((digest, leads)) = &known.previous {
            self.trees.insert(*digest);
            self.count(leads);
        }
        self.artifacts.push(known);
        Ok(())
    }

    fn leads(&mut self, artifact: &Artifact) -> Result<Leads> {
        let mut leads = Leads {
            ids: artifact.stored().map(|object| object.id).collect(),
            contents: Vec::new(),
            layers: layers_of(&artifact.objects),
        };
        for id in &leads.ids {
            let content = self.store.content_of(id)?;
            if let (None, ObjectId::Located(key)) = (content, id) {
                let path = self.store.located_path(key);
                if self.store.disk.stat(&path)?.is_some() {
                    self.cannot_read(path);
                }
            }
            leads.contents.extend(content);
        }
        Ok(leads)
    }

    fn count(&mut self, leads: &Leads) {
        count(&mut self.ids, &leads.ids);
        count(&mut self.contents, &leads.contents);
        count(&mut self.layers, &leads.layers);
    }

    fn cannot_read(&mut self, path: PathBuf) {
        let kept = "what nothing leads to is kept, since this may lead to it";
        tracing::warn!(path = %path.display(), "damaged, missing or of a newer version: {kept} (hearth verify --all --repair mends it)");
        self.unreadable.insert(path);
    }

    /// Counts what living imports list, as if it were recorded; finds the dead ones.
    fn look_at_imports(&mut self) -> Result<()> {
        let store = self.store;
        for dir in store.import_dirs()? {
            let path = dir.join("kept");
            let file = match store.disk.open(&path, Open::Read) {
                Ok(file) => file,
                Err(error) if error.errno() == Some(libc::ENOENT) => {
                    self.dead.push(dir);
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            if lock_file(file.file(), Span::Exclusive, false)
                .map_err(|error| StoreError::io(path.display(), &error))?
            {
                self.dead.push(dir);
                continue;
            }
            let Some(bytes) = store.read_small(&path, MAX_KEPT)? else {
                continue;
            };
            let kept: Vec<Digest> = bytes
                .as_chunks()
                .0
                .iter()
                .map(|digest| Digest::from_bytes(*digest))
                .collect();
            count(&mut self.contents, &kept);
            count(&mut self.layers, &kept);
            let ids: Vec<ObjectId> = kept.into_iter().map(ObjectId::Sha256).collect();
            count(&mut self.ids, &ids);
        }
        Ok(())
    }

    /// Counts what a tier should have and has not: it was fetched into the store.
    fn look_at_tiers(&mut self) -> Result<()> {
        let store = self.store;
        for record in store.tier_records() {
            if self.trees.contains(&record.digest) {
                continue;
            }
            let Some(artifact) = store.read_tree(&record.digest)? else {
                continue;
            };
            let missing = store.missing_on_tiers(&artifact)?;
            for id in &missing {
                let content = store.content_of(id)?;
                count(&mut self.contents, content.iter());
            }
            count(&mut self.ids, &missing);
        }
        Ok(())
    }

    fn remove_unreferenced(&mut self) -> Result<()> {
        for dir in std::mem::take(&mut self.dead) {
            self.remove_import(&dir)?;
        }
        if !self.unreadable.is_empty() {
            return Ok(());
        }
        let objects: Vec<Digest> = self.objects.keys().copied().collect();
        for digest in objects {
            if !self.contents.contains_key(&digest) {
                self.remove_object(&digest)?;
            }
        }
        let partials: Vec<ObjectId> = self.partials.keys().copied().collect();
        for id in partials {
            // What has become complete by another way is not needed any more.
            let content = self.store.content_of(&id)?;
            let complete = content.is_some_and(|content| self.objects.contains_key(&content));
            if complete || !self.ids.contains_key(&id) {
                self.remove_partial(&id)?;
            }
        }
        let layers: Vec<Digest> = self.indexes.keys().copied().collect();
        for layer in layers {
            if !self.layers.contains_key(&layer) {
                self.remove_index(&layer)?;
            }
        }
        Ok(())
    }

    fn remove_index(&mut self, layer: &Digest) -> Result<()> {
        let Some(bytes) = self.indexes.remove(layer) else {
            return Ok(());
        };
        if !self.dry_run {
            self.store.disk.unlink(&self.store.index_path(layer))?;
        }
        self.report.others += 1;
        self.report.bytes += bytes;
        Ok(())
    }

    /// Removes what a dead import left.
    fn remove_import(&mut self, dir: &Path) -> Result<()> {
        let disk = &self.store.disk;
        for name in disk.list(dir)? {
            let path = dir.join(name);
            let bytes = disk.stat(&path)?.map_or(0, |stat| stat.disk);
            if !self.dry_run {
                disk.unlink(&path)?;
            }
            self.report.others += 1;
            self.report.bytes += bytes;
        }
        if !self.dry_run {
            disk.remove_dir(dir)?;
        }
        Ok(())
    }

    fn remove_object(&mut self, digest: &Digest) -> Result<()> {
        let Some(&bytes) = self.objects.get(digest) else {
            return Ok(());
        };
        let path = self.store.object_path(digest);
        if self.remove_unlocked(&path)? {
            self.objects.remove(digest);
            self.report.objects += 1;
            self.report.bytes += bytes;
        }
        Ok(())
    }

    fn remove_partial(&mut self, id: &ObjectId) -> Result<()> {
        for stem in self.partials.remove(id).unwrap_or_default() {
            match self.store.remove_partial(&stem, self.dry_run)? {
                Some(freed) => {
                    self.report.partials += 1;
                    self.report.bytes += freed;
                }
                None => {
                    self.partials.entry(*id).or_default().insert(stem);
                }
            }
        }
        Ok(())
    }

    /// Removes a file that nobody has locked; whether it is gone.
    fn remove_unlocked(&self, path: &Path) -> Result<bool> {
        let disk = &self.store.disk;
        let file = match disk.open(path, Open::Read) {
            Ok(file) => file,
            Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let free = lock_file(file.file(), Span::Exclusive, false)
            .map_err(|error| StoreError::io(path.display(), &error))?;
        if free && !self.dry_run {
            disk.unlink(path)?;
        }
        Ok(free)
    }

    /// Removes trees, located records, lock files and temporary files that lead nowhere.
    fn remove_small(&mut self) -> Result<()> {
        let store = self.store;
        for (path, _) in self.files("objects/tmp")? {
            let modified = store.disk.stat(&path)?.map(|stat| stat.modified);
            let age = modified.and_then(|at| SystemTime::now().duration_since(at).ok());
            if age.is_some_and(|age| age > TEMP_AGE) && self.remove_unlocked(&path)? {
                self.report.others += 1;
            }
        }
        for (path, _) in self.files("artifacts")? {
            let record = path.with_extension("json");
            if path.extension() == Some(OsStr::new("lock"))
                && store.disk.stat(&record)?.is_none()
                && self.remove_unlocked(&path)?
            {
                self.report.others += 1;
            }
        }
        // Whoever pins waits for the records lock.
        for (path, _) in self.files("pins")? {
            if store.disk.list(&path)?.is_empty() && !self.dry_run {
                store.disk.remove_dir(&path)?;
            }
        }
        self.remove_images()?;
        if !self.unreadable.is_empty() {
            return Ok(());
        }
        for (path, name) in self.files("trees")? {
            let digest = name.to_str().and_then(|n| Digest::from_hex(n).ok());
            if digest.is_some_and(|d| !self.trees.contains(&d)) && self.remove_unlocked(&path)? {
                self.report.others += 1;
            }
        }
        for (path, name) in self.files("roots")? {
            let name = name.to_str().and_then(|name| name.split('.').next());
            let digest = name.and_then(|name| Digest::from_hex(name).ok());
            if digest.is_some_and(|d| !self.trees.contains(&d)) && self.remove_unlocked(&path)? {
                self.report.others += 1;
            }
        }
        let mut stale = Vec::new();
        store.each_sharded(&store.root.join("located"), |key, path, _| {
            let id = ObjectId::Located(key);
            let content = store.content_of(&id)?;
            if !self.ids.contains_key(&id)
                && !content.is_some_and(|c| self.objects.contains_key(&c))
            {
                stale.push(path);
            }
            Ok(())
        })?;
        for path in stale {
            if self.remove_unlocked(&path)? {
                self.report.others += 1;
            }
        }
        Ok(())
    }

    /// Removes records of images without an artifact, and what leads to them.
    fn remove_images(&mut self) -> Result<()> {
        let store = self.store;
        for path in store.image_paths()? {
            let Some(name) = path.file_name() else {
                continue;
            };
            if store
                .disk
                .stat(&store.root.join("artifacts").join(name))?
                .is_none()
            {
                if !self.dry_run {
                    store.disk.unlink(&path)?;
                }
                self.report.others += 1;
            }
        }
        let mut chains = store.images_of_chains()?;
        for (path, name) in self.files("chains")? {
            let Some(chain) = name.to_str().and_then(|n| Digest::from_hex(n).ok()) else {
                continue;
            };
            let images = chains.remove(&chain).unwrap_or_default();
            if store.prune_chain(&path, &images, self.dry_run)? {
                self.report.others += 1;
            }
        }
        Ok(())
    }

    fn files(&self, dir: &str) -> Result<Vec<(PathBuf, std::ffi::OsString)>> {
        let dir = self.store.root.join(dir);
        let names = self.store.disk.list(&dir)?;
        Ok(names.into_iter().map(|n| (dir.join(&n), n)).collect())
    }
}

impl Store {
    /// Whether someone holds this generation, or its root is mounted.
    fn tree_is_held(&self, digest: &Digest) -> Result<bool> {
        let there = self.disk.stat(&self.tree_path(digest))?.is_some();
        Ok(there
            && (self.lock_tree(digest, Span::Exclusive, false)?.is_none()
                || self.root_is_used(digest)?))
    }
}

/// Adds one reference to each.
fn count<'k, K: std::hash::Hash + Eq + Copy + 'k>(
    counts: &mut HashMap<K, u32>,
    keys: impl IntoIterator<Item = &'k K>,
) {
    for key in keys {
        *counts.entry(*key).or_default() += 1;
    }
}

/// Takes one reference away; true for the last.
fn last<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, u32>, key: &K) -> bool {
    match counts.get_mut(key) {
        Some(count) if *count > 1 => {
            *count -= 1;
            false
        }
        _ => counts.remove(key).is_some(),
    }
}

/// The id in the name of a file of a partial object.
pub(super) fn partial_id(name: &OsStr) -> Option<ObjectId> {
    let (stem, _) = name.to_str()?.rsplit_once('.')?;
    let (kind, rest) = stem.split_once('-')?;
    let hex = rest.split_once('-').map_or(rest, |(hex, _claim)| hex);
    let digest = Digest::from_hex(hex).ok()?;
    match kind {
        "sha256" => Some(ObjectId::Sha256(digest)),
        "located" => Some(ObjectId::Located(digest)),
        _ => None,
    }
}
