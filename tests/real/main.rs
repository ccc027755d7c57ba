//! Tests against real servers and mounts; a missing component fails.

mod mount;
