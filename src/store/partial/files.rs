//! The files that say which chunks are here.

use std::path::{Path, PathBuf};

use crate::{
    chunk,
    digest::ObjectId,
    disk::{Open, SharedMap},
    store::{
        Result, Store, StoreError, StoreErrorKind,
        presence::{Bits, Live, Scope, map_len},
    },
};

/// The files of a partial object.
#[derive(Debug)]
pub(in crate::store) struct Paths {
    pub(in crate::store) data: PathBuf,
    pub(in crate::store) map: PathBuf,
    pub(in crate::store) live: PathBuf,
}

impl Paths {
    pub(in crate::store) fn of(stem: &Path) -> Self {
        Self {
            data: stem.with_extension("data"),
            map: stem.with_extension("map"),
            live: stem.with_extension("live"),
        }
    }
}

impl Store {
    /// Removes what says which chunks are here; durable before it returns.
    pub(super) fn forget_presence(&self, paths: &Paths) -> Result<()> {
        self.disk.unlink(&paths.live)?;
        if self.disk.unlink(&paths.map)? {
            self.disk.sync_dir(&self.partial_dir())?;
        }
        Ok(())
    }
}

/// The chunks in a map file; none where it is missing or damaged.
pub(super) fn read_map(store: &Store, path: &Path, id: &ObjectId, size: u64) -> Result<Bits> {
    let bytes = match store.read_small(path, map_len(id, size)) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Ok(Bits::new(chunk::count(size))),
        Err(error) if error.kind() == StoreErrorKind::Damaged => Vec::new(),
        Err(error) => return Err(error),
    };
    Ok(Bits::from_map_file(&bytes, id, size).unwrap_or_else(|| {
        tracing::warn!(path = %path.display(), "damaged chunk map: its chunks count as absent");
        Bits::new(chunk::count(size))
    }))
}

/// Maps the live words, if they belong to this object in this boot.
pub(super) fn open_live(store: &Store, paths: &Paths, scope: &Scope) -> Result<Option<Live>> {
    let file = match store.disk.open(&paths.live, Open::Write) {
        Ok(file) => file,
        Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if file.stat()?.len != scope.live_len() {
        return Ok(None);
    }
    // A page of a mapping that the disk does not give is a SIGBUS; here it is an error.
    let mut piece = vec![0; scope.live_len().min(1 << 20) as usize];
    let mut at = 0;
    while at < scope.live_len() {
        let len = (scope.live_len() - at).min(1 << 20);
        file.read_at(&mut piece[..len as usize], at)?;
        at += len;
    }
    let map = SharedMap::new(file.file(), scope.live_len())
        .map_err(|e| StoreError::io(paths.live.display(), &e))?;
    Ok(Live::new(map, scope))
}

/// Makes the live words anew from the durable map. Written in full, since a store to a mapped hole
/// on a full disk is a SIGBUS.
pub(super) fn rebuild_live(store: &Store, paths: &Paths, scope: &Scope) -> Result<Live> {
    let bits = read_map(store, &paths.map, &scope.id, scope.size)?;
    let temp = store.write_temp(&scope.live_file(&bits), false)?;
    if let Err(error) = store.disk.rename(&temp, &paths.live) {
        // The error of the rename says what is wrong.
        let _ = store.disk.unlink(&temp);
        return Err(error.into());
    }
    open_live(store, paths, scope)?.ok_or_else(|| {
        let message = format!(
            "{} does not hold what was written to it",
            paths.live.display()
        );
        StoreError::new(StoreErrorKind::Io, message)
    })
}
