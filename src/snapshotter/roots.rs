//! What the snapshotter needs of the node.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use async_trait::async_trait;

use crate::digest::Digest;

/// Where the images are that need no unpacking. A chain id names the layers up to and with one of
/// an image (OCI image-spec, config.md, "Layer ChainID").
#[async_trait]
pub trait Roots: Send + Sync {
    /// Whether the layers up to this chain id can be served: then containerd neither fetches nor
    /// unpacks the topmost of them. Said for good: the snapshot stands until containerd removes it.
    ///
    /// # Errors
    /// Whatever keeps it from knowing; containerd then does it the ordinary way.
    async fn knows(&self, chain_id: &Digest, hints: &Hints) -> Result<bool, RootsError>;

    /// The merged tree of the layers up to this chain id, mounted read-only; it stays so until
    /// [`Roots::release`]. Asked again for one that is mounted, it gives the same directory;
    /// asked again for one that has gone away, it brings it back.
    ///
    /// # Errors
    /// Layers that are not known any more, an origin that cannot be reached, a failed mount.
    async fn root(&self, chain_id: &Digest, hints: &Hints) -> Result<Root, RootsError>;

    /// Nobody needs the directory of this chain id any more, should it be mounted.
    async fn release(&self, chain_id: &Digest);

    /// containerd has removed the last snapshot of this chain id that [`Roots::knows`] was asked for.
    async fn forget(&self, chain_id: &Digest);

    /// Before anything else is asked: takes away what an earlier process left, claims but those of `claimed`, and mounts
    /// but those of `used`.
    async fn sweep(&self, claimed: &BTreeSet<Digest>, used: &BTreeSet<Digest>);

    /// What the topmost layer of this chain takes on the disk, without those below it.
    ///
    /// # Errors
    /// Layers that are not known any more.
    async fn usage(&self, chain_id: &Digest) -> Result<Usage, RootsError>;
}

/// A mounted tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    /// The directory. Without `:`, `,`, `"` and backslashes, since it becomes a mount option.
    pub dir: PathBuf,
    /// Where the contents of its files are, if it has only what else there is of them: data-only
    /// layers of overlayfs (Documentation/filesystems/overlayfs.rst). Paths as above.
    pub contents: Vec<PathBuf>,
    /// The owner of the root directory of the tree.
    pub uid: u32,
    /// The group of the root directory of the tree.
    pub gid: u32,
}

/// What something takes on the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    /// Bytes of the blocks.
    pub bytes: u64,
    /// Files, directories and all else, each hard-linked file once.
    pub inodes: u64,
}

/// What containerd said of a layer besides its chain id. All may be missing: the labels of the CRI
/// come only where `disable_snapshot_annotations = false` is configured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hints {
    /// containerd's namespace.
    pub namespace: Option<String>,
    /// The image as it was asked for (`containerd.io/snapshot/cri.image-ref`).
    pub image: Option<String>,
    /// The digest of the image's manifest (`containerd.io/snapshot/cri.manifest-digest`).
    pub manifest: Option<Digest>,
    /// The digest of the layer's blob (`containerd.io/snapshot/cri.layer-digest`).
    pub layer: Option<Digest>,
    /// The digests of this layer and those above it, as many as fit into a label
    /// (`containerd.io/snapshot/cri.image-layers`).
    pub layers: Vec<Digest>,
}

impl Hints {
    /// What the labels of a snapshot say. Digests that are not SHA-256 are left out.
    pub fn new(namespace: Option<&str>, labels: &BTreeMap<String, String>) -> Self {
        let label = |name: &str| labels.get(&format!("containerd.io/snapshot/cri.{name}"));
        let digest = |name: &str| label(name).and_then(|text| text.parse().ok());
        Self {
            namespace: namespace.map(str::to_owned),
            image: label("image-ref").cloned(),
            manifest: digest("manifest-digest"),
            layer: digest("layer-digest"),
            layers: label("image-layers")
                .into_iter()
                .flat_map(|list| list.split(','))
                .filter_map(|text| text.parse().ok())
                .collect(),
        }
    }
}

/// Why layers cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct RootsError {
    kind: RootsErrorKind,
    message: String,
}

/// What a [`RootsError`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootsErrorKind {
    /// The layers are not known here (any more).
    Unknown,
    /// Something that may go well later: an origin that cannot be reached.
    Unavailable,
    /// Anything else.
    Failed,
}

impl RootsError {
    /// An error that says `message`.
    pub fn new(kind: RootsErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// What it is about.
    pub const fn kind(&self) -> RootsErrorKind {
        self.kind
    }
}

/// Knows no image: with it the snapshotter is an ordinary overlay snapshotter.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoRoots;

#[async_trait]
impl Roots for NoRoots {
    async fn knows(&self, _: &Digest, _: &Hints) -> Result<bool, RootsError> {
        Ok(false)
    }

    async fn root(&self, chain_id: &Digest, _: &Hints) -> Result<Root, RootsError> {
        Err(unknown(chain_id))
    }

    async fn release(&self, _: &Digest) {}

    async fn forget(&self, _: &Digest) {}

    async fn sweep(&self, _: &BTreeSet<Digest>, _: &BTreeSet<Digest>) {}

    async fn usage(&self, chain_id: &Digest) -> Result<Usage, RootsError> {
        Err(unknown(chain_id))
    }
}

fn unknown(chain_id: &Digest) -> RootsError {
    RootsError::new(
        RootsErrorKind::Unknown,
        format!("hearth does not know the layers of chain id {chain_id}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_the_cri_become_hints() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let labels = [
            ("cri.image-ref", "registry.example/app:1".to_owned()),
            ("cri.manifest-digest", a.to_string()),
            ("cri.layer-digest", b.to_string()),
            ("cri.image-layers", format!("{b},sha512:00,{a}")),
        ]
        .map(|(name, value)| (format!("containerd.io/snapshot/{name}"), value));
        let hints = Hints::new(Some("k8s.io"), &labels.into());
        assert_eq!(hints.namespace.as_deref(), Some("k8s.io"));
        assert_eq!(hints.image.as_deref(), Some("registry.example/app:1"));
        assert_eq!((hints.manifest, hints.layer), (Some(a), Some(b)));
        assert_eq!(hints.layers, [b, a]);
        assert_eq!(Hints::new(None, &BTreeMap::new()), Hints::default());
    }
}
