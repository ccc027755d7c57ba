//! Tests that need nothing but a temporary directory.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod bad_bytes;
mod collector;
mod corpus;
mod csi;
mod decode;
mod digests;
mod disk_faults;
mod erofs;
mod fetch;
mod fs;
mod http_faults;
mod kube;
mod layers;
mod manifests;
mod otlp;
mod registry;
mod scripted;
#[expect(dead_code, reason = "tests of mounts need all of it")]
mod scripted_source;
mod slices;
mod snapshotter;
mod store;
mod tar;
mod updates;
