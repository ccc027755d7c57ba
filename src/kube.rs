//! kube: the face towards Kubernetes. The node's side: what pods of this node ask for by annotation is brought and
//! pinned while they live.
//!
//! `annotations` reads what is asked (pure), `watch` follows objects whatever the API server does, `client` connects.
//! Nothing in here blocks a pod: what cannot be understood, or not be had, becomes an Event.
//!
//! Called by `daemon`. Nothing is kept here that a crash could lose: pins are the store's, and are compared with the
//! pods of the node whenever these are listed.

pub mod client;
pub mod watch;

pub use self::client::{ApiConfig, ConnectError, connect};
