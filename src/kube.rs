//! kube: the face towards Kubernetes. The node's side: what pods of this node ask for by annotation is brought, and
//! pinned while they live; what `Warmup`s ask of it is, too (`warmups`, `cache`). The cluster's: a `controller`, which leads
//! or waits. `crd` is what these have in common.
//!
//! `annotations` and `templates` read what is asked (pure), `pods` follows the pods of the node and sees to it, `watch`
//! follows objects whatever the API server does, `events` tells, `secrets` reads credentials, `client` connects. Nothing
//! in here blocks a pod: what cannot be understood, or not be had, becomes an Event.
//!
//! Called by `daemon`, which gives it [`Content`]. Nothing is kept here that a crash could lose: pins are the store's, and
//! are compared with the pods of the node whenever these are listed.

pub mod annotations;
pub mod cache;
pub mod client;
pub mod coldstart;
pub mod controller;
pub mod crd;
pub mod events;
mod pods;
mod secrets;
pub mod templates;
pub mod warmups;
pub mod watch;

use serde::{Deserialize, Serialize};

pub use self::{
    client::{ApiConfig, ConnectError, connect},
    pods::{Content, ContentError, ContentErrorKind, PINS, Pods, Wish, owner},
};

/// Settings of this room (`[kube]`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Whether the agent has this face.
    pub enabled: bool,
    /// How long a pod may be missing from what the API server says before its content is unpinned, in seconds: lists may
    /// be old.
    pub grace_seconds: u64,
    /// Where the API server is.
    pub api: ApiConfig,
    /// What `Warmup`s ask of this node.
    pub warmups: warmups::Config,
    /// The controller of the cluster's `Warmup`s.
    pub controller: controller::Config,
}

/// A part of one, by chance.
fn random() -> f64 {
    use std::hash::{BuildHasher as _, RandomState};
    (RandomState::new().hash_one(0u8) >> 11) as f64 / (1u64 << 53) as f64
}

impl Default for Config {
    fn default() -> Self {
        Self {
            enabled: false,
            grace_seconds: 60,
            api: ApiConfig::default(),
            warmups: warmups::Config::default(),
            controller: controller::Config::default(),
        }
    }
}
