//! References that came by the credentials of others than the node's own, `run/guarded/<sha256 of reference>`: who may see them
//! is for `node` to decide. A guard is durable before anything that it guards comes, and is whole or not there.

use std::path::PathBuf;

use super::{Result, Store};
use crate::{digest::Digest, disk::make_all};

/// Most bytes of a guard: it holds a digest.
const MAX_GUARD: u64 = 4096;

impl Store {
    /// Durably guards `reference`, with the note that `note` makes. One that is guarded keeps its own.
    ///
    /// # Errors
    /// What the disk and `note` say, and [`super::StoreErrorKind::ReadOnly`].
    pub fn guard(&self, reference: &str, note: impl FnOnce() -> Result<String>) -> Result<()> {
        self.need_writable()?;
        let path = self.guard_path(reference);
        let dir = path.parent().unwrap_or(&self.root);
        if self.guarded(reference)?.is_none() {
            make_all(&*self.disk, dir)?;
            let temp = self.write_temp(note()?.as_bytes(), true)?;
            // Never in place of another's: what that notes was so before anything came that is guarded.
            let renamed = self.disk.rename_new(&temp, &path);
            if !matches!(renamed, Ok(true)) {
                let _ = self.disk.unlink(&temp);
            }
            renamed?;
        }
        // Its directories may be of a process that was killed before it could do this.
        for dir in dir.ancestors().take(3) {
            self.disk.sync_dir(dir)?;
        }
        Ok(())
    }

    /// The note of a reference that is guarded; `None` for one that is not.
    ///
    /// # Errors
    /// What the disk says: a guard that cannot be seen is not one that is not there.
    pub fn guarded(&self, reference: &str) -> Result<Option<String>> {
        let note = self.read_small(&self.guard_path(reference), MAX_GUARD)?;
        Ok(note.map(|note| String::from_utf8_lossy(&note).into_owned()))
    }

    /// Guards `reference` no more.
    ///
    /// # Errors
    /// What the disk says; then it stays guarded.
    pub fn unguard(&self, reference: &str) -> Result<()> {
        self.disk.unlink(&self.guard_path(reference))?;
        Ok(())
    }

    fn guard_path(&self, reference: &str) -> PathBuf {
        let name = Digest::of(reference.as_bytes()).hex();
        self.root.join("run/guarded").join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_note_stays_and_a_guard_that_cannot_be_seen_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &Default::default()).unwrap();
        assert_eq!(store.guarded("a").unwrap(), None);
        store.guard("a", || Ok("own".into())).unwrap();
        store.guard("a", || unreachable!()).unwrap();
        assert_eq!(store.guarded("a").unwrap().as_deref(), Some("own"));
        // Another process is first.
        store
            .guard("b", || {
                store.guard("b", || Ok("first".into()))?;
                Ok("second".into())
            })
            .unwrap();
        assert_eq!(store.guarded("b").unwrap().as_deref(), Some("first"));
        store.unguard("a").unwrap();
        assert_eq!(store.guarded("a").unwrap(), None);
        // As good as any error: root may read everything.
        let guards = dir.path().join("run/guarded");
        std::fs::remove_dir_all(&guards).unwrap();
        std::os::unix::fs::symlink("guarded", &guards).unwrap();
        assert!(store.guarded("b").is_err());
        assert!(store.guard("b", || Ok(String::new())).is_err());
    }
}
