//! Which directories are tiers now: those that are named, and what globs and labels lead to.

use std::{
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use globset::{GlobBuilder, GlobMatcher};

use super::{Tier, TierConfig, label};
use crate::store::Store;

/// Directories that a glob may lead to; more is a mistake in it.
const MAX_FOUND: usize = 64;
/// Names that are looked at in one directory.
const MAX_NAMES: usize = 4096;

/// Whether a path is a glob, or a part of one.
fn is_glob(text: &str) -> bool {
    text.contains(['*', '?', '[', '{'])
}

fn matcher(part: &str) -> Result<GlobMatcher, String> {
    let glob = GlobBuilder::new(part).literal_separator(true).build();
    Ok(glob.map_err(|error| error.to_string())?.compile_matcher())
}

/// Whether a path can be looked for.
///
/// # Errors
/// A glob that is none.
pub(super) fn check(path: &Path) -> Result<(), String> {
    for part in path.components().filter_map(text) {
        if is_glob(part) {
            matcher(part)?;
        }
    }
    Ok(())
}

fn text(part: Component<'_>) -> Option<&str> {
    match part {
        Component::Normal(name) => name.to_str(),
        _ => None,
    }
}

impl Store {
    /// The tiers in their order, those of `before` among them that are still there; and what was looked
    /// for in vain.
    pub(super) fn find_tiers(
        &self,
        before: &[Arc<Tier>],
    ) -> (Vec<Arc<Tier>>, Vec<(PathBuf, String)>) {
        let mut found: Vec<Arc<Tier>> = Vec::new();
        let mut absent = Vec::new();
        for config in &self.tiers.configs {
            let (name, places) = self.places(config);
            match places {
                Ok(places) if places.is_empty() => {
                    absent.push((name, "no disk with a tier is attached".to_owned()));
                }
                Ok(places) => {
                    for place in places {
                        // What two lead to belongs to the first.
                        if found.iter().all(|tier| *tier.path != *place) {
                            let known = (before.iter())
                                .find(|tier| *tier.path == *place && tier.config == *config);
                            found.push(known.cloned().unwrap_or_else(|| {
                                Arc::new(Tier::new(self.tier_store(&place), config))
                            }));
                        }
                    }
                }
                Err(why) => absent.push((name, why)),
            }
        }
        (found, absent)
    }

    /// What it is called, and the directories that it means now.
    fn places(&self, config: &TierConfig) -> (PathBuf, Result<Vec<PathBuf>, String>) {
        match (&config.path, &config.label) {
            // What is there under this very name is no glob.
            (Some(path), _)
                if is_glob(&path.to_string_lossy())
                    && !matches!(self.disk.stat(path), Ok(Some(_))) =>
            {
                (path.clone(), self.expand(path))
            }
            (Some(path), _) => (path.clone(), Ok(vec![path.clone()])),
            (None, Some(label)) => {
                let may_mount = self.writable().then_some(&*self.root);
                let found = label::mounted(label, may_mount);
                (format!("LABEL={label}").into(), found)
            }
            (None, None) => (PathBuf::new(), Ok(Vec::new())),
        }
    }

    /// The directories that a glob matches in which there is a tier, or something that looks like one.
    fn expand(&self, pattern: &Path) -> Result<Vec<PathBuf>, String> {
        let mut found = vec![PathBuf::from("/")];
        for part in pattern.components() {
            let Some(glob) = text(part).filter(|part| is_glob(part)) else {
                found.iter_mut().for_each(|dir| dir.push(part));
                continue;
            };
            let matcher = matcher(glob)?;
            let mut next = Vec::new();
            for dir in found {
                // What is no directory has nothing in it.
                let Ok(mut names) = self.disk.list(&dir) else {
                    continue;
                };
                names.sort();
                names.truncate(MAX_NAMES);
                let fits = |name: &std::ffi::OsString| {
                    let hidden = name.to_string_lossy().starts_with('.') && !glob.starts_with('.');
                    !hidden && matcher.is_match(name)
                };
                next.extend(names.into_iter().filter(fits).map(|name| dir.join(name)));
            }
            found = next;
        }
        // One that cannot be read is kept: it has something to say.
        found.retain(|dir| {
            let identity = self.disk.stat(&dir.join("hearth.json"));
            identity.map_or_else(
                |error| error.errno() != Some(libc::ENOTDIR),
                |stat| stat.is_some(),
            )
        });
        match found.len() {
            0..=MAX_FOUND => Ok(found),
            many => Err(format!(
                "it leads to {many} directories, more than {MAX_FOUND}: none is used"
            )),
        }
    }
}
