//! hearth keeps model weights and container images warm on every node, and serves them through a
//! lazy FUSE mount while they arrive.
//!
//! Rooms, top to bottom; a room imports only rooms below it, siblings never import each other
//! (`tests/it/layers.rs` checks it). See `ARCHITECTURE.md` for the map.

pub mod admin;
pub mod chunk;
pub mod cli;
pub mod config;
#[cfg(test)]
#[path = "../tests/it/corpus/replay.rs"]
mod corpus;
pub mod csi;
pub mod daemon;
pub mod digest;
pub mod disk;
pub mod fetch;
pub mod fs;
pub mod r#gen;
pub mod image;
pub mod kube;
pub mod limits;
pub mod metrics;
pub mod mirror;
pub mod mount;
pub mod node;
pub mod reference;
pub mod snapshotter;
pub mod socket;
pub mod source;
pub mod store;
pub mod telemetry;
pub mod tree;
