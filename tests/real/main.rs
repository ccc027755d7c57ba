//! Tests against real servers and mounts; a missing component fails.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod cli;
#[path = "../it/collector.rs"]
#[expect(dead_code, reason = "here only some of it is needed")]
mod collector;
mod compressors;
mod containerd;
#[path = "../it/digests.rs"]
mod digests;
mod http;
mod hub;
mod layers;
mod mount;
mod native;
mod oci_models;
mod proxy;
mod pushed;
mod registry;
#[path = "../it/scripted_source.rs"]
#[expect(dead_code, reason = "here only some of it is needed")]
mod scripted_source;
mod servers;
mod sources;
mod store;
