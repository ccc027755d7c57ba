//! Many files made durable together: content first, then names.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Result, Store};
use crate::disk::{DiskFile, Open};

/// Up to this many files (or directories) are synced one by one, more of them by a sync of the
/// whole file system: its cost hardly depends on how many they are.
const FEW: usize = 8;

impl Store {
    /// The root, open. Opened before anything is written that [`DiskFile::sync_fs`] is to sync.
    pub(super) fn open_root(&self) -> Result<Arc<dyn DiskFile>> {
        Ok(self.disk.open(&self.root, Open::Dir)?)
    }

    /// Makes the content of files durable.
    pub(super) fn sync_contents(
        &self,
        fs: &dyn DiskFile,
        mut paths: impl ExactSizeIterator<Item = PathBuf>,
    ) -> Result<()> {
        if paths.len() > FEW {
            return Ok(fs.sync_fs()?);
        }
        paths.try_for_each(|path| Ok(self.disk.open(&path, Open::Read)?.sync_data()?))
    }

    /// Makes names in directories durable.
    fn sync_names(&self, fs: &dyn DiskFile, dirs: &BTreeSet<PathBuf>) -> Result<()> {
        if dirs.len() > FEW {
            return Ok(fs.sync_fs()?);
        }
        dirs.iter().try_for_each(|dir| Ok(self.disk.sync_dir(dir)?))
    }
}

/// Gives synced files their names, and remembers what is to be synced for that.
pub(super) struct Names<'s> {
    store: &'s Store,
    /// Directories whose names change; their number is bounded by that of the shards.
    dirs: BTreeSet<PathBuf>,
}

impl<'s> Names<'s> {
    /// For files that will be renamed to paths in `dirs`; makes those that are missing.
    pub(super) fn new(store: &'s Store, dirs: BTreeSet<PathBuf>) -> Result<Self> {
        let mut above = BTreeSet::new();
        for dir in &dirs {
            if store.disk.create_dir(dir)? {
                above.extend(dir.parent());
            }
        }
        // At once: others take a directory that they see for durable.
        for dir in above {
            store.disk.sync_dir(dir)?;
        }
        Ok(Self { store, dirs })
    }

    /// Gives the object at `temp` its name. One that is there already is kept, and `temp` dropped,
    /// unless it is of another length, and so damaged.
    pub(super) fn object(&self, temp: &Path, to: &Path, size: u64) -> Result<()> {
        let disk = &self.store.disk;
        if disk.rename_new(temp, to)? {
            return Ok(());
        }
        match disk.stat(to)? {
            Some(there) if there.len == size => {
                disk.unlink(temp)?;
            }
            _ => disk.rename(temp, to)?,
        }
        Ok(())
    }

    /// Makes the names durable.
    pub(super) fn sync(self, fs: &dyn DiskFile) -> Result<()> {
        self.store.sync_names(fs, &self.dirs)
    }
}

/// Small files written under temporary names, to be published together.
pub(super) struct Batch<'s> {
    store: &'s Store,
    fs: Option<Arc<dyn DiskFile>>,
    moves: Vec<Move>,
}

struct Move {
    temp: PathBuf,
    to: PathBuf,
    /// Of an object, its length; none for a record.
    object: Option<u64>,
}

impl<'s> Batch<'s> {
    pub(super) fn new(store: &'s Store) -> Self {
        Self {
            store,
            fs: None,
            moves: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.moves.is_empty()
    }

    /// Adds a complete object.
    pub(super) fn add_object(&mut self, content: &[u8], to: PathBuf) -> Result<()> {
        self.open()?;
        let temp = self.store.temp_path();
        self.store.write_object(&temp, content)?;
        let object = Some(content.len() as u64);
        self.moves.push(Move { temp, to, object });
        Ok(())
    }

    /// Adds a record.
    pub(super) fn add_record(&mut self, content: &[u8], to: PathBuf) -> Result<()> {
        self.open()?;
        let temp = self.store.write_temp(content, false)?;
        let object = None;
        self.moves.push(Move { temp, to, object });
        Ok(())
    }

    /// Adds a complete object that lies at `temp`. Written after [`Batch::open`].
    pub(super) fn add_ready(&mut self, temp: PathBuf, to: PathBuf, size: u64) {
        let object = Some(size);
        self.moves.push(Move { temp, to, object });
    }

    /// Opens the file system, to see every error of writing back.
    pub(super) fn open(&mut self) -> Result<()> {
        if self.fs.is_none() {
            self.fs = Some(self.store.open_root()?);
        }
        Ok(())
    }

    /// Syncs the contents, renames, last added first, and syncs the names.
    pub(super) fn publish(mut self) -> Result<()> {
        let Some(fs) = self.fs.take() else {
            return Ok(());
        };
        let temps = self.moves.iter().map(|m| m.temp.clone());
        self.store.sync_contents(&*fs, temps)?;
        let dirs = self.moves.iter().filter_map(|m| m.to.parent());
        let names = Names::new(self.store, dirs.map(Path::to_owned).collect())?;
        while let Some(Move { temp, to, object }) = self.moves.last() {
            match object {
                Some(size) => names.object(temp, to, *size)?,
                None => self.store.disk.rename(temp, to)?,
            }
            self.moves.pop();
        }
        names.sync(&*fs)
    }
}

impl Drop for Batch<'_> {
    /// Removes what was not published.
    fn drop(&mut self) {
        for Move { temp, .. } in &self.moves {
            // Best effort: the error that led here is the one to report.
            let _ = self.store.disk.unlink(temp);
        }
    }
}
