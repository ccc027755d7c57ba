//! What a process before this one left: mounts to go on with, and what nobody needs any more.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use super::About;
use crate::{
    digest::Digest,
    mount::{
        self,
        keeper::{Link, Orphan},
        native,
    },
    store::Store,
    tree::Artifact,
};

/// What is kept of a mount on `dir` that could not be taken over before, if it is of the same; another goes, but for those
/// who have it.
pub(super) fn before(
    keeper: &Link,
    dir: &Path,
    about: &About,
    store: &Store,
    artifact: &Artifact,
) -> anyhow::Result<Option<Orphan>> {
    let Some(orphan) = keeper.find(dir)? else {
        return Ok(None);
    };
    let before = serde_json::from_slice::<About>(orphan.about()).ok();
    if before.as_ref() == Some(about) {
        return Ok(Some(orphan));
    }
    if let Some(before) = before.filter(|before| before.chain == about.chain)
        && let Ok(served) = before.digest.parse()
        && let Some(served) = store.generation(&served)?
        && served.shows_the_same(artifact)
    {
        return Ok(Some(orphan));
    }
    mount::unmount(dir, true)?;
    Ok(None)
}

/// Unmounts what is mounted below `dir`, but in the directories `used`.
pub(super) fn unmount(dir: &Path, used: &BTreeSet<PathBuf>) -> anyhow::Result<()> {
    let is_left = |mounted: &Path| {
        let chain = mounted.parent().filter(|chain| chain.starts_with(dir));
        chain.is_some_and(|chain| !used.contains(chain))
    };
    for root in native::mounted()? {
        if is_left(&root) {
            native::unmount(&root, true)?;
            remove(&root);
        }
    }
    for info in mount::mounted()? {
        if is_left(&info.mountpoint) {
            mount::unmount_forced(&info.mountpoint)?;
            remove(&info.mountpoint);
        }
    }
    Ok(())
}

/// Removes the pins of claimed chains, but those of `owners`.
pub(super) fn unpin(store: &Store, owners: &BTreeSet<String>) -> anyhow::Result<()> {
    for record in store.records()? {
        for pin in record.pins {
            if is_of_claim(&pin) && !owners.contains(&pin) {
                store.unpin(&record.reference, &pin)?;
            }
        }
    }
    Ok(())
}

/// How the owners of the pins of claimed chains begin.
pub(super) const CLAIMED: &str = "containerd-";

/// The owner of the pin of a claimed chain.
pub(super) fn owner(chain: &Digest) -> String {
    format!("{CLAIMED}{}", &chain.hex()[..32])
}

/// Whether it is what [`owner`] makes.
fn is_of_claim(pin: &str) -> bool {
    let chain = pin.strip_prefix(CLAIMED).unwrap_or_default();
    chain.len() == 32 && chain.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Removes the directory of a mount that is gone, and that of its chain where there is nothing else in it.
fn remove(mounted: &Path) {
    let _ = fs::remove_dir(mounted);
    let _ = mounted.parent().map(fs::remove_dir);
}
