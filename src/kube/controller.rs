//! The controller: one of several processes leads; it says in each `Warmup` how far it is, labels nodes for what they
//! have, and lets nodes in that have what they are to have.

pub mod lease;
pub mod plan;
