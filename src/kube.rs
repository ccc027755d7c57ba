//! kube: the face towards Kubernetes.

pub mod cache;
pub mod client;
pub mod controller;
pub mod crd;
pub mod warmups;
pub mod watch;

/// A part of one, by chance.
fn random() -> f64 {
    use std::hash::{BuildHasher as _, RandomState};
    (RandomState::new().hash_one(0u8) >> 11) as f64 / (1u64 << 53) as f64
}
