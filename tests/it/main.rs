//! Tests that need nothing but a temporary directory.

mod fetch;
mod layers;
mod scripted_source;
mod store;
