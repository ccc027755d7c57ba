//! Where the parts of the agent are put together: the node behind the faces.
//!
//! Called by the command line, which runs the faces one by one. What survives a crash is the store's
//! and the snapshotter's; native roots stay mounted, and are found again.

mod models;
mod roots;

pub use models::SharedModels;
pub use roots::{ImageRoots, pinned_images};
