//! Counters of one mount; what matters of them is counted for all mounts, too.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::metrics::{self, Metric};

/// Counts up.
#[derive(Debug)]
pub(super) struct Counter {
    own: AtomicU64,
    all: Option<&'static Metric>,
}

impl Counter {
    fn new(all: Option<&'static Metric>) -> Self {
        let own = AtomicU64::new(0);
        Self { own, all }
    }

    pub(super) fn add(&self, n: u64) {
        self.own.fetch_add(n, Relaxed);
        if let Some(all) = self.all {
            all.add(n);
        }
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident $(=> $all:ident)?),* $(,)?) => {
        /// What a mount has served since it was made.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub struct Stats { $($(#[$doc])* pub $name: u64),* }

        #[derive(Debug)]
        pub(super) struct Counters { $(pub(super) $name: Counter),* }

        impl Default for Counters {
            fn default() -> Self {
                Self { $($name: Counter::new(None $(.or(Some(&metrics::global().$all)))?)),* }
            }
        }

        impl Counters {
            pub(super) fn snapshot(&self) -> Stats {
                Stats { $($name: self.$name.own.load(Relaxed)),* }
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
    opens => mount_opens,
    /// Files opened for the kernel to read by itself.
    passthrough_opens => mount_passthrough_opens,
    /// Opens that fetched a small file whole.
    small_fetches => mount_small_fetches,
    /// READ requests.
    reads => mount_reads,
    /// Bytes answered to READ requests.
    read_bytes => mount_read_bytes,
    /// READ requests that had to wait for content.
    waited_reads => mount_waited_reads,
    /// Requests answered with EIO, ESTALE or EACCES.
    errors => mount_errors,
    /// Times the kernel dropped what it held of a file, since it had turned out wrong.
    invalidations => mount_invalidations,
    /// Files let go.
    releases,
    /// Inodes forgotten by the kernel.
    forgets,
}
