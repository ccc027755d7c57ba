//! Counters of one mount, and the same summed over the process in [`metrics`].

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::metrics::{self, Metric};

/// A counter, and the metric it adds to.
#[derive(Debug)]
pub(super) struct Counter {
    here: AtomicU64,
    process: Option<&'static Metric>,
}

impl Counter {
    pub(super) fn add(&self, n: u64) {
        self.here.fetch_add(n, Relaxed);
        if let Some(metric) = self.process {
            metric.add(n);
        }
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident $(=> $metric:ident)?),* $(,)?) => {
        /// What a mount has served since it was made.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
        pub struct Stats { $($(#[$doc])* pub $name: u64),* }

        #[derive(Debug)]
        pub(super) struct Counters { $(pub(super) $name: Counter),* }

        impl Counters {
            pub(super) fn new() -> Self {
                Self {
                    $($name: Counter {
                        here: AtomicU64::new(0),
                        process: counters!(@metric $($metric)?),
                    }),*
                }
            }

            pub(super) fn snapshot(&self) -> Stats {
                Stats { $($name: self.$name.here.load(Relaxed)),* }
            }
        }
    };
    (@metric) => { None };
    (@metric $metric:ident) => { Some(&metrics::global().$metric) };
}

counters! {
    /// Lookups of names.
    lookups => mount_lookups,
    /// Requests for attributes.
    getattrs => mount_getattrs,
    /// Parts of directories read.
    readdirs => mount_readdirs,
    /// Files opened.
    opens => mount_opens,
    /// Files opened for the kernel to read by itself.
    passthrough_opens => mount_passthrough_opens,
    /// Opens that fetched a small file whole.
    small_fetches,
    /// READ requests.
    reads => mount_reads,
    /// Bytes answered to READ requests.
    read_bytes => mount_read_bytes,
    /// READ requests that had to wait for content.
    waited_reads,
    /// Requests answered with EIO, ESTALE or EACCES.
    errors => mount_errors,
    /// Files let go.
    releases,
    /// Inodes forgotten by the kernel.
    forgets,
}
