//! The store: objects, trees and artifact records on disk. Knows no network.
//!
//! ```text
//! <root>/hearth.json                     format version and store id
//! <root>/objects/sha256/ab/<hex>         complete: verified, immutable, mode 0444; zeros may be holes
//! <root>/objects/tmp/                    files being written, renamed when they are durable
//! <root>/imports/<salt>-<n>/             an import under way: what it keeps, files without names
//! <root>/located/ab/<hex>                "sha256:<hex> <size> <checksum>": the content of a located id
//! <root>/partial/<kind>-<hex>[-<claim>].data   sparse data of an object on its way; who claims to have it
//! <root>/partial/<kind>-<hex>[-<claim>].map    its chunks that are durable: bitmap with a checksum
//! <root>/partial/<kind>-<hex>[-<claim>].live   its chunks that are here: words mapped by all processes
//! <root>/trees/<hex>                     artifacts by digest: zstd of their encoding
//! <root>/indexes/<hex>                   indexes of layers, by the layer's digest
//! <root>/images/<sha256 of reference>.json      reference -> manifest, layers of an image
//! <root>/chains/<hex>                    chain id of layers -> images that begin with them
//! <root>/roots/<hex>.erofs               metadata of native roots by digest of the artifact; flock: shared while mounted
//! <root>/artifacts/<sha256 of reference>.json   reference -> artifact; mtime = last use
//! <root>/artifacts/<sha256 of reference>.lock   flock: shared while held, exclusive to evict
//! <root>/pins/<sha256 of reference>/<owner>     what keeps it from eviction
//! <root>/gc.lock                         flock: shared to record, exclusive to collect
//! <root>/distrusted/<tier>/<hex>         objects of a tier that are damaged there
//! <root>/run/tiers/<device>/             where a tier is mounted that was found by its label
//! <root>/run/verified/<tier>.json        how far a tier was read through in the background
//! <root>/run/guarded/<sha256 of reference>      what came by the credentials of others than the node's own
//! <root>/hearth.lock                     of a baked tier: what it holds, as text
//! ```
//!
//! Invariants
//! - A file below `objects/sha256` holds exactly the bytes its name promises; it gets the name by a
//!   rename, after its data was synced and its digest verified.
//! - A chunk is in `.map` only if its data was synced before the map was written. `.live` may say
//!   more, but counts only within one boot of the kernel, whose page cache outlives any process.
//!   What is torn, missing or mismatching counts as absent.
//! - What nobody has verified yet is kept apart by who claims that it has that digest, and is shared only
//!   when it is complete.
//! - An absent chunk is written only under a [`Lease`], whose file lock dies with its process. So an
//!   object whose chunks are all present has no writer left.
//! - Record before you look: an artifact is recorded before its objects are looked for, and a
//!   collection keeps what is recorded, held, open, or listed by an import that lives. So no process loses what it has seen.
//! - Opening a store lists no directory; an object is complete if its file is there.
//! - Below the store may lie read-only tiers of the same format: reads look there last, nothing is
//!   written there, and what is wrong with one of them is as if it were not there.
//!
//! Called by `fetch` (objects) and `node` (artifacts, space), from any number of processes at once.
//! All calls block on the disk. After kill -9 nothing is lost; after a power failure what came
//! since the last [`Partial::checkpoint`] or [`Import::commit`].

mod bake;
mod batch;
mod collect;
mod config;
mod error;
mod guards;
mod images;
mod import;
mod indexes;
mod layout;
mod lease;
mod lockfile;
mod objects;
mod partial;
mod presence;
mod previous;
mod records;
mod roots;
mod space;
mod tier;
mod verify;

pub use crate::disk::AlignedBuf;
pub use bake::Bake;
pub use collect::{CollectOptions, CollectReport};
pub use config::{ByteSize, Config};
pub use error::{StoreError, StoreErrorKind};
pub use images::{ImageLayer, ImageRecord};
pub use import::{Import, ImportFile, Imported};
pub use indexes::{IndexSeal, MAX_INDEX, layers_of};
pub use lease::{Lease, WriteMode};
pub use lockfile::{Lock, LockedArtifact};
pub use objects::{Complete, hash_file};
pub use partial::{MAX_OBJECT, Partial};
pub use records::{Hold, Record};
pub use space::{Reservation, Usage};
pub use tier::{
    Finder, Placement, TierConfig, TierMode, TierStatus, TierVerify, Whereabouts, label_is_plain,
};
pub use verify::{Damage, VerifyProgress, VerifyReport, VerifyScope};

use std::{
    collections::HashMap,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::{
    digest::{Digest, PartialId},
    disk::{Disk, RealDisk},
};

/// The format that this version writes and reads.
pub const FORMAT: u32 = 1;

pub(crate) type Result<T> = std::result::Result<T, StoreError>;

/// A store on one file system.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    config: Config,
    disk: Arc<dyn Disk>,
    /// A tier, or baked: never written, whatever the disk says.
    sealed: bool,
    /// It could be written once; a disk that fails since says so itself.
    was_writable: AtomicBool,
    boot: [u8; 16],
    id: String,
    partials: Mutex<HashMap<PartialId, Weak<Partial>>>,
    reservations: Mutex<Vec<Weak<space::Wanted>>>,
    tiers: tier::Tiers,
    /// Makes the names of temporary files differ, within and between processes.
    temp_salt: String,
    temps: AtomicU64,
}

/// `hearth.json`. Fields that a newer format adds must not hide its number.
#[derive(Debug, Serialize, Deserialize)]
struct Identity {
    format: u32,
    id: String,
    /// A bake is under way: a tier that is not whole.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    baking: bool,
    /// Of a baked tier: the digest of its `hearth.lock`. Such a store is not written any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lock: Option<String>,
}

impl Store {
    /// Opens the store at `root`, making it where there is none. Where it cannot be written, an
    /// existing store is opened to read.
    ///
    /// # Errors
    /// [`StoreErrorKind::NewerFormat`], [`StoreErrorKind::ReadOnly`] where it is not there and cannot be made,
    /// [`StoreErrorKind::Damaged`] where `hearth.json` cannot be read, and what the disk says.
    pub fn open(root: &Path, config: &Config) -> Result<Arc<Store>> {
        Self::open_on(Arc::new(RealDisk), root, config)
    }

    /// Opens a store with read-only tiers below it. A tier that cannot be used is warned of.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with_tiers(
        root: &Path,
        config: &Config,
        tiers: &[TierConfig],
    ) -> Result<Arc<Store>> {
        Self::open_tiered_on(Arc::new(RealDisk), root, config, tiers)
    }

    /// Opens a store on any [`Disk`].
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_on(disk: Arc<dyn Disk>, root: &Path, config: &Config) -> Result<Arc<Store>> {
        Self::open_tiered_on(disk, root, config, &[])
    }

    /// Opens a store with tiers on any [`Disk`].
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_tiered_on(
        disk: Arc<dyn Disk>,
        root: &Path,
        config: &Config,
        tiers: &[TierConfig],
    ) -> Result<Arc<Store>> {
        config.check()?;
        tiers.iter().try_for_each(TierConfig::check)?;
        let mut store = Store::unopened(disk, root, config, tiers)?;
        let identity = match store.identity()? {
            Some(identity) => identity,
            None => store.make(false)?,
        };
        store.begin(identity);
        let store = Arc::new(store);
        store.watch_tiers();
        Ok(store)
    }

    /// A store whose identity is not known yet.
    fn unopened(
        disk: Arc<dyn Disk>,
        root: &Path,
        config: &Config,
        tiers: &[TierConfig],
    ) -> Result<Store> {
        let boot = disk.boot_id()?;
        Ok(Store {
            root: root.to_owned(),
            config: config.clone(),
            disk,
            sealed: false,
            was_writable: AtomicBool::new(true),
            boot,
            id: String::new(),
            partials: Mutex::default(),
            reservations: Mutex::default(),
            tiers: tier::Tiers::new(tiers),
            temp_salt: layout::temp_salt(),
            temps: AtomicU64::new(0),
        })
    }

    /// A store below this one, at `root`: only read.
    fn tier_store(&self, root: &Path) -> Store {
        Store {
            root: root.to_owned(),
            config: self.config.clone(),
            disk: Arc::clone(&self.disk),
            sealed: true,
            was_writable: AtomicBool::new(false),
            boot: self.boot,
            id: String::new(),
            partials: Mutex::default(),
            reservations: Mutex::default(),
            tiers: tier::Tiers::default(),
            temp_salt: layout::temp_salt(),
            temps: AtomicU64::new(0),
        }
    }

    /// Takes its identity, and looks at its tiers.
    fn begin(&mut self, identity: Identity) {
        self.sealed = identity.lock.is_some();
        self.was_writable = AtomicBool::new(false);
        self.id = identity.id;
        self.look_at_tiers(true);
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its id, made once with the store.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether it can be written. One that was opened on a disk which only is read can be as soon as that is mended.
    pub fn writable(&self) -> bool {
        if self.sealed || self.was_writable.load(Ordering::Relaxed) {
            return !self.sealed;
        }
        let writable = self.disk.writable(&self.root);
        self.was_writable.store(writable, Ordering::Relaxed);
        writable
    }

    /// Whether it is never written, whatever the disk says.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    fn identity(&self) -> Result<Option<Identity>> {
        let path = self.root.join("hearth.json");
        let Some(bytes) = self.read_small(&path, 1 << 16)? else {
            return Ok(None);
        };
        let damaged = |why: &dyn std::fmt::Display| {
            let advice = match self.writable() {
                true => {
                    "; unless a newer version of hearth wrote it, remove that file: it is made anew, \
                     and the content of the store stays"
                }
                false => "",
            };
            let message = format!("{} cannot be read: {why}{advice}", path.display());
            StoreError::new(StoreErrorKind::Damaged, message)
        };
        let identity: Identity = serde_json::from_slice(&bytes).map_err(|e| damaged(&e))?;
        if identity.format > FORMAT {
            let message = format!(
                "store {} has format {}, this version of hearth knows up to {FORMAT}",
                self.root.display(),
                identity.format
            );
            return Err(StoreError::new(StoreErrorKind::NewerFormat, message));
        }
        let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if identity.format == 0 || identity.id.len() != 32 || !identity.id.bytes().all(is_hex) {
            return Err(damaged(&format!(
                "it has format {} and id {:?}, which no store has",
                identity.format, identity.id
            )));
        }
        Ok(Some(identity))
    }

    /// Makes the directories, then `hearth.json`: its presence says that the rest is there.
    fn make(&self, baking: bool) -> Result<Identity> {
        let mut above: Vec<&Path> = self.root.ancestors().collect();
        above.reverse();
        for dir in above {
            if !dir.as_os_str().is_empty() && self.disk.stat(dir)?.is_none() {
                self.make_dir(dir)?;
            }
        }
        for dir in layout::DIRECTORIES {
            self.make_dir(&self.root.join(dir))?;
        }
        let made = layout::temp_salt() + &self.temp_salt + &self.root.to_string_lossy();
        let identity = Identity {
            format: FORMAT,
            id: Digest::of(made.as_bytes()).hex()[..32].to_owned(),
            baking,
            lock: None,
        };
        let mut text = layout::json(&identity)?;
        text.push(b'\n');
        // Link, not rename: of two processes that make the store, one wins and both see it.
        let path = self.root.join("hearth.json");
        let temp = self.write_temp(&text, true)?;
        let linked = self.disk.link(&temp, &path);
        self.disk.unlink(&temp)?;
        linked?;
        self.disk.sync_dir(&self.root)?;
        self.identity()?.ok_or_else(|| {
            let message = format!("{} vanished while it was made", path.display());
            StoreError::new(StoreErrorKind::Io, message)
        })
    }
}

/// `<root>/run`, made where it is not there: sockets and logs of mount processes, and native roots,
/// whose programs are nothing for other users of this machine. Private to its owner, also where an
/// older version made it otherwise.
///
/// # Errors
/// What the disk says.
pub fn run_dir(root: &Path) -> std::io::Result<PathBuf> {
    let dir = root.join("run");
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(&dir)?;
    let meta = dir.metadata()?;
    if meta.mode() & 0o077 != 0 && meta.uid() == nix::unistd::geteuid().as_raw() {
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700))?;
    }
    Ok(dir)
}
