//! Tests against real servers and mounts; a missing component fails.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod http;
mod hub;
mod mount;
mod servers;
mod sources;
mod store;
