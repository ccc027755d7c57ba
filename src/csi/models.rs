//! What the driver needs of the node.

use std::{collections::BTreeSet, fmt, path::PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{digest::Digest, reference::Reference, source::Keys};

/// Mounts models, each of them once, however many volumes are of it.
#[async_trait]
pub trait Models: Send + Sync {
    /// Whether anything can be mounted here.
    ///
    /// # Errors
    /// Why not.
    fn ready(&self) -> Result<(), ModelError>;

    /// Has the tree of `want` mounted, and pinned by `user.owner`, for `user.id`; it stays so until [`Models::close`].
    /// Returns when the tree is known. With `generation` it is that one, whatever the reference means by now. Asked again
    /// by the same user, it brings back what is gone, and uses the keys of `want` from now on, where it has some that the
    /// origin accepts.
    ///
    /// # Errors
    /// What the origin, the store or the system says; then nothing has changed.
    async fn open(
        &self,
        want: &Want,
        generation: Option<Digest>,
        user: &User,
    ) -> Result<Model, ModelError>;

    /// Returns when everything of a model is here and verified.
    ///
    /// # Errors
    /// What waiting does not mend.
    async fn complete(&self, model: &str) -> Result<(), ModelError>;

    /// This user needs the mount no more.
    async fn close(&self, model: &str, user: &str);

    /// Removes a pin.
    async fn unpin(&self, reference: &str, owner: &str);

    /// How an open model does.
    async fn status(&self, model: &str) -> Option<(Model, Status)>;

    /// Before anything else is asked: takes away what an earlier process left and nobody uses, pins but those of
    /// `owners` and mounts but those of `models`.
    async fn sweep(&self, owners: &BTreeSet<String>, models: &BTreeSet<String>);
}

/// What a volume is to be.
#[derive(Debug, Clone)]
pub struct Want {
    /// What to mount; holds no secret.
    pub reference: Reference,
    pub layout: Layout,
    pub mode: Mode,
    /// Serve nothing of a file before the whole of it is verified, even if the node would.
    pub strict: bool,
    /// What opens the origin, where it is not what the node has.
    pub keys: Option<Keys>,
}

/// How files are laid out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// As at the origin.
    #[default]
    Tree,
    /// As in the cache of `huggingface_hub`.
    Hub,
}

/// When a volume is published.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// When its tree is known.
    #[default]
    Lazy,
    /// When everything is here and verified.
    Complete,
}

/// Who needs a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// One target of one volume.
    pub id: String,
    /// The owner of the pin: the volume.
    pub owner: String,
    /// The namespace of its pod; empty where it is not known.
    pub namespace: String,
}

/// A mounted model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// Names it from now on, in the next process as well: generation, layout, and whether it is strict.
    pub id: String,
    /// The canonical reference.
    pub reference: String,
    /// The digest of the artifact.
    pub generation: Digest,
    /// Where it is mounted.
    pub dir: PathBuf,
    /// Number of the FUSE connection.
    pub connection: u32,
}

/// How a model does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Bytes of all of it.
    pub bytes: u64,
    /// Bytes that are here.
    pub present: u64,
    /// Files, directories and links.
    pub inodes: u64,
    /// Why what is not here does not come, where it does not.
    pub trouble: Option<String>,
}

/// Why a model cannot be had. No message carries a secret.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ModelError {
    kind: ModelErrorKind,
    message: String,
}

/// What a [`ModelError`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelErrorKind {
    /// The reference, or what is asked of it, cannot be.
    Invalid,
    /// The origin does not have it.
    NotFound,
    /// The generation is not here any more, and the origin has another.
    Gone,
    /// The origin wants other credentials.
    Denied,
    /// It does not fit.
    NoSpace,
    /// It may go well later.
    Unavailable,
    /// Anything else.
    Failed,
}

impl ModelError {
    /// An error that says `message`.
    pub fn new(kind: ModelErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// What it is about.
    pub const fn kind(&self) -> ModelErrorKind {
        self.kind
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tree => "tree",
            Self::Hub => "hub",
        })
    }
}
