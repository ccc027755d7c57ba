//! kube: the face towards Kubernetes. The node's side: what pods of this node ask for by annotation is brought and
//! pinned while they live; what `Warmup`s ask of it is, too (`warmups`, `cache`). The cluster's: a `controller`, which
//! leads or waits. `crd` is what they have in common.
//!
//! `annotations` reads what is asked (pure), `watch` follows objects whatever the API server does, `client` connects.
//! Nothing in here blocks a pod: what cannot be understood, or not be had, becomes an Event.
//!
//! Called by `daemon`. Nothing is kept here that a crash could lose: pins are the store's, and are compared with the
//! pods of the node whenever these are listed.

pub mod cache;
pub mod client;
pub mod controller;
pub mod crd;
pub mod warmups;
pub mod watch;

use serde::{Deserialize, Serialize};

pub use self::client::{ApiConfig, ConnectError, connect};

/// Settings of this room: `[kube]` in the configuration file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub api: ApiConfig,
    pub warmups: warmups::Config,
    pub controller: controller::Config,
}

/// A part of one, by chance.
fn random() -> f64 {
    use std::hash::{BuildHasher as _, RandomState};
    (RandomState::new().hash_one(0u8) >> 11) as f64 / (1u64 << 53) as f64
}
