//! Tests that need nothing but a temporary directory.

mod fs;
