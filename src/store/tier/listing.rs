//! Which of many objects a store has, by the names in its directories: asking for tens of thousands one by
//! one reads an inode of each, which a cold disk gives slowly.

use std::collections::{HashMap, HashSet};

use crate::{
    digest::Digest,
    store::{Result, Store},
};

/// The objects of a store, listed directory by directory as they are asked for.
pub(super) struct Listing<'s> {
    store: &'s Store,
    shards: HashMap<String, HashSet<String>>,
}

impl<'s> Listing<'s> {
    pub(super) fn new(store: &'s Store) -> Self {
        Self {
            store,
            shards: HashMap::new(),
        }
    }

    /// Whether the store itself has an object of this name.
    ///
    /// # Errors
    /// What the disk says.
    pub(super) fn has(&mut self, digest: &Digest) -> Result<bool> {
        let name = digest.hex();
        let shard = &name[..2];
        if let Some(names) = self.shards.get(shard) {
            return Ok(names.contains(&name));
        }
        let dir = self.store.objects_dir().join("sha256").join(shard);
        let names = self.store.disk.list(&dir)?.into_iter();
        let names: HashSet<String> = names.filter_map(|name| name.into_string().ok()).collect();
        let has = names.contains(&name);
        self.shards.insert(shard.to_owned(), names);
        Ok(has)
    }
}
