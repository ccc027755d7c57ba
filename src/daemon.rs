//! Where the parts of the agent are put together: the node, and the faces before it.
//!
//! Called by the command line, which runs all faces as the agent, or one alone. What survives a crash is the
//! store's, the keeper's and the faces'; native roots stay mounted, and are found again.

mod agent;
mod faces;
mod handover;
mod kube;
mod models;
mod roots;
mod tidy;
mod warmups;

use std::path::PathBuf;

pub use agent::{Face, Life, Parts, Running, run};
pub use faces::{ADMIN, CONTROLLER, CSI, KUBE, MIRROR, SNAPSHOTTER, WARMUPS, enabled};
pub use kube::{PodContent, starts};
pub use models::SharedModels;
pub use roots::{ImageRoots, pinned_images};
pub use warmups::NodeWarmer;

use crate::node::Node;

/// Where mounts are, named as the kernel names them: the store may be reached through a link.
fn run_dir(node: &Node) -> PathBuf {
    let root = node.store().root();
    let real = root.canonicalize();
    real.unwrap_or_else(|_| root.to_owned()).join("run")
}

/// An error with its causes.
fn describe(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        message = format!("{message}: {cause}");
        next = cause.source();
    }
    message
}
