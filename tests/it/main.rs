//! Tests that need nothing but a temporary directory.

mod fetch;
mod http_faults;
mod layers;
mod scripted;
mod scripted_source;
//mod store;
