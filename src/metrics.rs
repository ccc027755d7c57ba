//! Every metric of the process, in one table. Imported by any room, imports none.
//!
//! Names are `hearth_<room>_<what>_<unit>`, with labels where several are one family; labels are bounded by what
//! stands here. Counters only go up; gauges are marked so; histograms are of seconds. Rendered in the Prometheus
//! text format (version 0.0.4).

use std::{
    fmt::Write as _,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

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

/// Upper bounds of the buckets of a [`Histogram`], in seconds; one more has no bound.
const BOUNDS: [f64; 10] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

/// How long something took, each time.
#[derive(Debug)]
pub struct Histogram {
    /// Not cumulative.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    micros: AtomicU64,
}

impl Histogram {
    const fn new() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BOUNDS.len() + 1],
            micros: AtomicU64::new(0),
        }
    }

    /// It took so long once.
    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = BOUNDS.iter().position(|bound| seconds <= *bound);
        self.buckets[bucket.unwrap_or(BOUNDS.len())].fetch_add(1, Relaxed);
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.micros.fetch_add(micros, Relaxed);
    }

    fn render(&self, name: &str, text: &mut String) {
        let mut count = 0;
        for (at, bucket) in self.buckets.iter().enumerate() {
            count += bucket.load(Relaxed);
            let _ = match BOUNDS.get(at) {
                Some(bound) => writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {count}"),
                None => writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {count}"),
            };
        }
        let seconds = self.micros.load(Relaxed) as f64 / 1e6;
        let _ = writeln!(text, "{name}_sum {seconds}\n{name}_count {count}");
    }
}

macro_rules! metrics {
    (
        $($kind:ident $field:ident $name:literal $help:literal;)*
        --
        $(histogram $long:ident $long_name:literal $long_help:literal;)*
    ) => {
        /// The table.
        #[derive(Debug)]
        pub struct Metrics {
            $(#[doc = $help] pub $field: Metric,)*
            $(#[doc = $long_help] pub $long: Histogram,)*
        }

        static GLOBAL: Metrics = Metrics {
            $($field: Metric::new(),)*
            $($long: Histogram::new(),)*
        };

        impl Metrics {
            fn histograms(&self) -> Vec<(&'static str, &'static str, &Histogram)> {
                vec![$(($long_name, $long_help, &self.$long),)*]
            }
        }

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
    counter fetch_retries "hearth_fetch_retries_total" "Requests to origins sent again after an error";
    counter fetch_failed_unavailable "hearth_fetch_failed_unavailable_total" "Requests that failed since the origin, or the way to it, was down, slow or broken";
    counter fetch_failed_throttled "hearth_fetch_failed_throttled_total" "Requests that the origin put off: asked too often";
    counter fetch_failed_denied "hearth_fetch_failed_denied_total" "Requests that the origin refused: credentials";
    counter fetch_failed_other "hearth_fetch_failed_other_total" "Requests whose answer was of no use: another generation, not found, against the protocol";
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
    counter snapshotter_failures "hearth_snapshotter_failed_requests_total" "Requests of containerd that were answered with an error of this node, or of an origin";
    gauge snapshotter_snapshots "hearth_snapshotter_snapshots" "Snapshots that there are";
    counter mirror_ok "hearth_mirror_answers_total{class=\"2xx\"}" "Answers of the registry mirror";
    counter mirror_refused "hearth_mirror_answers_total{class=\"4xx\"}" "Answers of the registry mirror";
    counter mirror_failed "hearth_mirror_answers_total{class=\"5xx\"}" "Answers of the registry mirror";
    gauge mount_mounts "hearth_mount_mounts" "FUSE mounts that this process serves";
    counter mount_opens "hearth_mount_opens_total" "Files opened";
    counter mount_passthrough_opens "hearth_mount_passthrough_opens_total" "Files opened for the kernel to read by itself";
    counter mount_small_fetches "hearth_mount_small_fetches_total" "Opens that fetched a small file whole";
    counter mount_reads "hearth_mount_reads_total" "Reads answered by this process";
    counter mount_read_bytes "hearth_mount_read_bytes_total" "Bytes of those reads";
    counter mount_waited_reads "hearth_mount_waited_reads_total" "Reads that had to wait for content";
    counter mount_errors "hearth_mount_errors_total" "Requests of the kernel answered with EIO, ESTALE or EACCES";
    counter mount_invalidations "hearth_mount_invalidations_total" "Times the kernel dropped what it held of a file, since it had turned out wrong";
    counter keeper_adopted "hearth_keeper_adopted_mounts_total" "Mounts taken over from a server before this one";
    counter keeper_left "hearth_keeper_left_mounts_total" "Mounts let go for the next server";
    counter keeper_failures "hearth_keeper_failed_requests_total" "Requests to the keeper that it refused, or did not answer";
    counter telemetry_exported "hearth_telemetry_exported_spans_total" "Spans that the collector took";
    counter telemetry_dropped_full "hearth_telemetry_dropped_spans_total{reason=\"queue\"}" "Spans that were dropped: too many waited, or the collector did not take them";
    counter telemetry_dropped_refused "hearth_telemetry_dropped_spans_total{reason=\"collector\"}" "Spans that were dropped: too many waited, or the collector did not take them";
    --
    histogram csi_publish "hearth_csi_publish_seconds" "How long it took to publish a volume, or to fail to";
    histogram mount_wait "hearth_mount_wait_seconds" "How long reads waited for content";
    histogram mirror_answer "hearth_mirror_answer_seconds" "How long the registry mirror took until it began to answer";
}

/// The metrics of this process.
pub fn global() -> &'static Metrics {
    &GLOBAL
}

/// The media type of what [`render`] gives.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The Prometheus text exposition of all metrics.
pub fn render() -> String {
    let mut text = String::new();
    head(
        &mut text,
        "hearth_build_info",
        "gauge",
        "Which hearth this is",
    );
    let version = escape(env!("HEARTH_VERSION"), true);
    let _ = writeln!(text, "hearth_build_info{{version=\"{version}\"}} 1");
    let mut family = "";
    for (name, kind, help, value) in GLOBAL.all() {
        let own = name.split('{').next().unwrap_or(name);
        if own != family {
            head(&mut text, own, kind, help);
            family = own;
        }
        let _ = writeln!(text, "{name} {value}");
    }
    for (name, help, histogram) in GLOBAL.histograms() {
        head(&mut text, name, "histogram", help);
        histogram.render(name, &mut text);
    }
    text
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let help = escape(help, false);
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// As the format wants it: of label values quotes, too.
fn escape(text: &str, is_label: bool) -> String {
    let text = text.replace('\\', "\\\\").replace('\n', "\\n");
    match is_label {
        true => text.replace('"', "\\\""),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_family_is_described_once_and_stands_together() {
        let text = render();
        let mut seen = BTreeSet::new();
        let mut family = String::new();
        let mut samples = 0;
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
                assert!(seen.insert(name.to_owned()), "{name} twice");
                family = name.to_owned();
            } else if !line.starts_with("# HELP ") {
                let (name, value) = line.rsplit_once(' ').unwrap();
                let own = name.split('{').next().unwrap();
                assert!(
                    own.starts_with("hearth_") && own.starts_with(&*family),
                    "{line}"
                );
                value.parse::<f64>().unwrap();
                samples += 1;
            }
        }
        assert!(samples > GLOBAL.all().len());
        assert_eq!(escape("a\\b\n\"", true), "a\\\\b\\n\\\"");
    }

    #[test]
    fn buckets_are_cumulative() {
        let histogram = Histogram::new();
        for millis in [1, 20, 70, 100_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut text = String::new();
        histogram.render("x", &mut text);
        for line in [
            "x_bucket{le=\"0.005\"} 1",
            "x_bucket{le=\"0.025\"} 2",
            "x_bucket{le=\"0.1\"} 3",
            "x_bucket{le=\"30\"} 3",
            "x_bucket{le=\"+Inf\"} 4",
            "x_sum 100.091",
            "x_count 4",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
    }
}
