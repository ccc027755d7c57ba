//! The native roots of complete images: what makes and mounts them.

use std::{fs, path::PathBuf, sync::Arc};

use super::{Chain, ImageRoots, Native, of_node, owner_of};
use crate::{
    digest::Digest,
    image::erofs,
    mount::native::{self, Support},
    node::Resolved,
    snapshotter::{Root, RootsError, RootsErrorKind},
    store::{self, Hold, Placement, Store},
    tree::Artifact,
};

impl ImageRoots {
    /// Has an image mounted natively that is complete; `None` where it is not. `digest` is that of its artifact, where it
    /// is known.
    pub(super) async fn make_native(
        &self,
        id: &Digest,
        chain: &mut Chain,
        resolved: &Resolved,
        digest: Option<Digest>,
        support: Support,
    ) -> Result<Option<Root>, RootsError> {
        let Some(placement) = self.placement(resolved).await else {
            return Ok(None);
        };
        let _hold = self.hold(resolved).await?;
        let mounted = self.mount_native(id, (resolved, digest), support, &placement);
        let (dir, contents) = mounted.await?;
        self.check(resolved, &placement);
        let (uid, gid) = owner_of(resolved.artifact.tree.inodes());
        let root = Root {
            dir,
            contents,
            uid,
            gid,
        };
        chain.native = Some(Native {
            reference: resolved.artifact.reference.clone(),
            root: root.clone(),
            placement,
        });
        chain.parked = None;
        Ok(Some(root))
    }

    async fn hold(&self, resolved: &Resolved) -> Result<Hold, RootsError> {
        let held = self.node.hold(&resolved.artifact.reference).await;
        held.map_err(|error| of_node(&error))
    }

    /// Mounts a complete image so that it needs nobody; where, and where the contents of its files
    /// are if not there.
    async fn mount_native(
        &self,
        id: &Digest,
        (resolved, digest): (&Resolved, Option<Digest>),
        support: Support,
        placement: &Placement,
    ) -> Result<(PathBuf, Vec<PathBuf>), RootsError> {
        let dir = self.dir(id, "native");
        let store = Arc::clone(self.node.store());
        let artifact = Arc::clone(&resolved.artifact);
        let (objects, in_store) = (placement.dirs().to_vec(), placement.is_in_store());
        let mounted = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
            let contents = |is_metadata| match is_metadata {
                true => objects.clone(),
                false => Vec::new(),
            };
            // Made by an earlier process, perhaps otherwise than this one would.
            let found = match dir.exists() {
                true => native::find(&dir)?,
                false => None,
            };
            if let Some(found) = found {
                let is_metadata = native::is_metadata(&found)?;
                if is_metadata || (in_store && !native::is_of_several(&found)?) {
                    return Ok((found, contents(is_metadata)));
                }
                // Its objects may lie elsewhere by now. Who runs on it keeps it.
                native::unmount(&found, true)?;
            }
            store::run_dir(store.root())?;
            fs::create_dir_all(&dir)?;
            let image = write_metadata(&store, &artifact, digest)?;
            let root = match support {
                Support::Direct => native::mount_metadata(&image, &dir)?,
                Support::Stacked => native::mount(&image, &objects, &dir)?,
            };
            Ok((root.keep(), contents(support == Support::Direct)))
        });
        of_blocking(mounted.await)
    }
}

fn write_metadata(
    store: &Store,
    artifact: &Artifact,
    digest: Option<Digest>,
) -> anyhow::Result<PathBuf> {
    let digest = digest.unwrap_or_else(|| artifact.digest());
    let recorded = match store.recorded_digest(&artifact.reference)? {
        // On a tier.
        None => store.artifact(&artifact.reference)?.map(|(r, _)| r.digest),
        own => own,
    };
    anyhow::ensure!(
        recorded == Some(digest),
        "only whole images have native roots"
    );
    let image = store.write_root_image(&digest, |out| {
        erofs::write(&artifact.tree, &artifact.objects, out)
            .map(drop)
            .map_err(std::io::Error::other)
    });
    Ok(image?)
}

fn of_blocking<T>(
    done: Result<anyhow::Result<T>, tokio::task::JoinError>,
) -> Result<T, RootsError> {
    let why = match done {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) => format!("{error:#}"),
        Err(error) => error.to_string(),
    };
    Err(RootsError::new(RootsErrorKind::Failed, why))
}
