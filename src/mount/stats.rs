//! Counters of one mount.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counts up.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What a mount has served since it was made.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub struct Stats { $($(#[$doc])* pub $name: u64),* }

        #[derive(Debug, Default)]
        pub(super) struct Counters { $(pub(super) $name: Counter),* }

        impl Counters {
            pub(super) fn snapshot(&self) -> Stats {
                Stats { $($name: self.$name.0.load(Relaxed)),* }
            }
        }
    };
}

counters! {
    /// Lookups of names.
    lookups,
    /// Requests for attributes.
    getattrs,
    /// Parts of directories read.
    readdirs,
    /// Files opened.
    opens,
    /// Files opened for the kernel to read by itself.
    passthrough_opens,
    /// Opens that fetched a small file whole.
    small_fetches,
    /// READ requests.
    reads,
    /// Bytes answered to READ requests.
    read_bytes,
    /// READ requests that had to wait for content.
    waited_reads,
    /// Requests answered with EIO, ESTALE or EACCES.
    errors,
    /// Times the kernel dropped what it held of a file, since it had turned out wrong.
    invalidations,
    /// Files let go.
    releases,
    /// Inodes forgotten by the kernel.
    forgets,
}
