//! Tests that need nothing but a temporary directory.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod fetch;
mod fs;
mod http_faults;
mod layers;
mod scripted;
mod scripted_source;
mod snapshotter;
mod store;
