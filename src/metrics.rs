//! Every metric of the process, in one table. Imported by any room, imports none.
//!
//! Names are `hearth_<room>_<what>_<unit>`; labels are bounded by what stands here. Counters only
//! go up; gauges are marked so. Rendered in the Prometheus text format (version 0.0.4).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// One counter or gauge.
#[derive(Debug, Default)]
pub struct Metric(AtomicU64);

impl Metric {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// Takes `n` off a gauge.
    pub fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! metrics {
    ($($kind:ident $field:ident $name:literal $help:literal;)*) => {
        /// The table.
        #[derive(Debug)]
        pub struct Metrics { $(#[doc = $help] pub $field: Metric,)* }

        static GLOBAL: Metrics = Metrics { $($field: Metric::new(),)* };

        impl Metrics {
            /// (name, kind, help, value) of each.
            pub fn all(&self) -> Vec<(&'static str, &'static str, &'static str, u64)> {
                vec![$(($name, stringify!($kind), $help, self.$field.get()),)*]
            }
        }
    };
}

metrics! {
    counter fetch_demand_bytes "hearth_fetch_demand_bytes_total" "Bytes received from origins because a reader waits for them";
    counter fetch_readahead_bytes "hearth_fetch_readahead_bytes_total" "Bytes received from origins ahead of a sequential reader";
    counter fetch_warm_bytes "hearth_fetch_warm_bytes_total" "Bytes received from origins in the background";
    counter fetch_requests "hearth_fetch_requests_total" "Range requests sent to origins";
    counter fetch_retries "hearth_fetch_retries_total" "Range requests sent again after an error";
    counter fetch_failed_unavailable "hearth_fetch_failed_unavailable_total" "Range requests that failed since the origin, or the way to it, was down, slow or broken";
    counter fetch_failed_throttled "hearth_fetch_failed_throttled_total" "Range requests that the origin put off: asked too often";
    counter fetch_failed_denied "hearth_fetch_failed_denied_total" "Range requests that the origin refused: credentials";
    counter fetch_failed_other "hearth_fetch_failed_other_total" "Range requests whose answer was of no use: another generation, not found, against the protocol";
    counter fetch_hedges "hearth_fetch_hedges_total" "Second requests sent because the first was slow";
    counter fetch_corrupt_objects "hearth_fetch_corrupt_objects_total" "Objects whose content did not match its digest";
    counter fetch_streamed_bytes "hearth_fetch_streamed_bytes_total" "Bytes served without being stored, since the disk was full or failed";
    gauge fetch_buffers "hearth_fetch_buffers_bytes" "Memory held by bytes in flight";
    gauge fetch_connections "hearth_fetch_connections" "Range requests under way";
    counter image_spans_decoded "hearth_image_spans_decoded_total" "Spans of compressed layers decoded by themselves";
    counter image_span_bytes "hearth_image_span_bytes_total" "Bytes that those spans decoded to";
    counter store_written_bytes "hearth_store_written_bytes_total" "Content bytes written to the store";
    counter store_objects_completed "hearth_store_objects_completed_total" "Objects completed and verified";
    counter store_tier_damaged "hearth_store_tier_damaged_objects_total" "Objects found damaged on read-only tiers, and never read from there again";
    counter snapshotter_claimed "hearth_snapshotter_claimed_layers_total" "Layers that containerd neither fetched nor unpacked, since hearth serves them";
    counter snapshotter_unclaimed "hearth_snapshotter_unclaimed_layers_total" "Layers that containerd was left to fetch and unpack itself";
    counter kube_lists "hearth_kube_lists_total" "Times that objects of the cluster were listed as a whole";
    counter kube_events_dropped "hearth_kube_events_dropped_total" "Events on pods that were not told: too many, or refused by the API server";
    counter kube_wrong_annotations "hearth_kube_wrong_annotations_total" "Annotations of pods that were not understood";
    counter kube_prefetch_failures "hearth_kube_prefetch_failures_total" "Times that something a pod asked for could not be had, and was put off";
    counter kube_watch_failures "hearth_kube_watch_failures_total" "Watches and lists of the cluster that failed and were begun again";
    counter kube_reports "hearth_kube_reports_total" "Reports that this node wrote to its NodeCache";
    counter kube_warmups_done "hearth_kube_warmups_done_total" "Warmups that this node brought, each generation counted";
    counter kube_warmups_failed "hearth_kube_warmups_failed_total" "Attempts at Warmups that failed on this node";
    gauge kube_leads "hearth_kube_leads" "Whether this process leads the controllers";
    counter kube_statuses "hearth_kube_statuses_total" "Statuses of Warmups that the controller wrote";
    counter kube_node_changes "hearth_kube_node_changes_total" "Changes of the labels and taints of nodes that the controller made";
    gauge csi_volumes "hearth_csi_volumes" "Volumes that are published, each target counted";
    counter csi_failures "hearth_csi_failed_requests_total" "Requests of the CSI that were answered with an error";
}

/// The metrics of this process.
pub fn global() -> &'static Metrics {
    &GLOBAL
}

/// The media type of what [`render`] gives.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The Prometheus text exposition of all metrics.
pub fn render() -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for (name, kind, help, value) in GLOBAL.all() {
        let _ = writeln!(
            text,
            "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}"
        );
    }
    text
}
