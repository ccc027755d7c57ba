//! What a node says of itself: a `NodeCache` of bounded size, at a bounded rate.

use std::time::{Duration, Instant};

use super::crd::{
    CachedArtifact, MAX_ARTIFACTS, MAX_MESSAGE, MAX_REFERENCE, MAX_WARMUPS, NodeCacheStatus,
    WarmupOnNode, cut,
};

/// Most bytes of the artifacts of a `NodeCache`, as JSON. Its warm-ups take one KiB each at most, so all of it stays
/// below 160 KiB.
pub const MAX_ARTIFACT_BYTES: usize = 32 << 10;
/// Least time between two reports, whatever the controller says.
const MIN_INTERVAL: Duration = Duration::from_secs(2);
/// Most.
const MAX_INTERVAL: Duration = Duration::from_secs(600);
/// Longest message of one warm-up: all of them must fit.
const MAX_SHORT_MESSAGE: usize = MAX_MESSAGE / 4;

/// What the store of a node has.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Inventory {
    /// Of the store: another one has another.
    pub store_id: String,
    pub capacity_bytes: u64,
    pub used_bytes: u64,
    pub free_bytes: u64,
    /// The last used first.
    pub artifacts: Vec<CachedArtifact>,
}

impl NodeCacheStatus {
    /// The report of an inventory and of warm-ups; artifacts in `first` (canonical references) go before the rest, what
    /// has no place is counted. Says nothing of when.
    pub fn new(
        inventory: Inventory,
        mut warmups: Vec<WarmupOnNode>,
        first: impl Fn(&str) -> bool,
    ) -> Self {
        let omitted = warmups.len().saturating_sub(MAX_WARMUPS);
        warmups.truncate(MAX_WARMUPS);
        for warmup in &mut warmups {
            warmup.message = cut(&warmup.message, MAX_SHORT_MESSAGE);
            warmup.reason = cut(&warmup.reason, 64);
        }
        let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let mut this = Self {
            reported: None,
            store_id: inventory.store_id,
            capacity_bytes: bytes(inventory.capacity_bytes),
            used_bytes: bytes(inventory.used_bytes),
            free_bytes: bytes(inventory.free_bytes),
            artifacts: Vec::new(),
            artifacts_omitted: 0,
            warmups,
            warmups_omitted: u32::try_from(omitted).unwrap_or(u32::MAX),
        };
        let mut left = MAX_ARTIFACT_BYTES;
        let (wanted, others): (Vec<_>, Vec<_>) =
            (inventory.artifacts.into_iter()).partition(|artifact| first(&artifact.reference));
        for artifact in wanted.into_iter().chain(others) {
            let needed = size(&artifact) + 1;
            let has_place = this.artifacts.len() < MAX_ARTIFACTS
                && needed <= left
                && artifact.reference.len() <= MAX_REFERENCE;
            match has_place {
                true => {
                    left -= needed;
                    this.artifacts.push(artifact);
                }
                false => this.artifacts_omitted += 1,
            }
        }
        this
    }

    /// Whether the other says nothing new: free and used bytes change all the time, and only count where they do by a
    /// hundredth of the capacity.
    pub fn says_the_same(&self, other: &Self) -> bool {
        let is_near =
            |one: i64, other: i64| one.abs_diff(other) <= self.capacity_bytes.unsigned_abs() / 100;
        let without_bytes = |status: &Self| Self {
            reported: None,
            used_bytes: 0,
            free_bytes: 0,
            ..status.clone()
        };
        is_near(self.used_bytes, other.used_bytes)
            && is_near(self.free_bytes, other.free_bytes)
            && without_bytes(self) == without_bytes(other)
    }
}

/// Bytes of a value as JSON.
fn size(value: &impl serde::Serialize) -> usize {
    serde_json::to_vec(value).map_or(usize::MAX - 1, |json| json.len())
}

/// When a node reports: not twice within the interval, and spread over it, so that nodes that all have something to say
/// at the same moment do not say it at the same moment.
#[derive(Debug)]
pub struct Pace {
    interval: Duration,
    last: Option<Instant>,
    /// Since when there is something to say, and which part of the interval it waits.
    pending: Option<(Instant, f64)>,
}

impl Pace {
    /// A pace with nothing to say.
    pub fn new(interval: Duration) -> Self {
        Self {
            interval: interval.clamp(MIN_INTERVAL, MAX_INTERVAL),
            last: None,
            pending: None,
        }
    }

    /// Has another interval from now on.
    pub fn set(&mut self, interval: Duration) {
        self.interval = interval.clamp(MIN_INTERVAL, MAX_INTERVAL);
    }

    /// There is something to say. `part` is random, from 0 to 1.
    pub fn changed(&mut self, now: Instant, part: f64) {
        self.pending.get_or_insert((now, part.clamp(0.0, 1.0)));
    }

    /// When it is to be said; `None` where there is nothing.
    pub fn due(&self) -> Option<Instant> {
        let (since, part) = self.pending?;
        let earliest = self
            .last
            .map_or(since, |last| since.max(last + self.interval));
        Some(earliest + self.interval.mul_f64(part))
    }

    /// It was said, or nobody listens: the next one waits as long.
    pub fn wrote(&mut self, now: Instant) {
        self.last = Some(now);
        self.pending = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_stays_within_its_bounds() {
        let artifact = |n: usize, length: usize| CachedArtifact {
            reference: format!("hf://org/{n:04}{}", "x".repeat(length)),
            digest: "sha256:".to_owned() + &"0".repeat(64),
            warm: true,
            ..CachedArtifact::default()
        };
        let warmup = WarmupOnNode {
            name: "n".repeat(253),
            namespace: "s".repeat(63),
            uid: "u".repeat(36),
            message: "ö\"".repeat(5000),
            ..WarmupOnNode::default()
        };
        for (artifacts, length) in [(0, 0), (1, 10), (1000, 10), (500, 900), (3, 5000)] {
            let inventory = Inventory {
                artifacts: (0..artifacts).map(|n| artifact(n, length)).collect(),
                ..Inventory::default()
            };
            let status = NodeCacheStatus::new(inventory, vec![warmup.clone(); 200], |reference| {
                reference.contains("0007")
            });
            assert!(size(&status) <= MAX_ARTIFACT_BYTES + (MAX_WARMUPS << 10));
            assert_eq!(
                status.artifacts.len() + status.artifacts_omitted as usize,
                artifacts
            );
            assert!(status.artifacts.len() <= MAX_ARTIFACTS);
            let _ = status.artifacts.first().inspect(|first| {
                assert_eq!(first.reference.contains("0007"), artifacts > 7, "{first:?}");
            });
        }
        let inventory = Inventory {
            artifacts: (0..1000).map(|n| artifact(n, 300)).collect(),
            ..Inventory::default()
        };
        let status = NodeCacheStatus::new(inventory, Vec::new(), |_| false);
        let bytes = size(&status.artifacts);
        assert!(
            (MAX_ARTIFACT_BYTES / 2..=MAX_ARTIFACT_BYTES).contains(&bytes),
            "{bytes}"
        );
    }

    #[test]
    fn small_changes_of_the_disk_are_not_news() {
        let status = |used: u64, free: u64, warm: bool| {
            let artifact = CachedArtifact {
                warm,
                ..CachedArtifact::default()
            };
            let inventory = Inventory {
                store_id: String::new(),
                capacity_bytes: 1000,
                used_bytes: used,
                free_bytes: free,
                artifacts: vec![artifact],
            };
            NodeCacheStatus::new(inventory, Vec::new(), |_| false)
        };
        let before = status(100, 500, false);
        assert!(before.says_the_same(&status(105, 495, false)));
        assert!(!before.says_the_same(&status(100, 480, false)));
        assert!(!before.says_the_same(&status(100, 500, true)));
    }

    #[test]
    fn a_pace_keeps_its_interval_and_forgets_nothing() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut pace = Pace::new(Duration::from_secs(10));
        assert_eq!(pace.due(), None);
        pace.changed(at(1), 0.5);
        pace.changed(at(3), 0.9); // it says all there is to say then
        assert_eq!(pace.due(), Some(at(6)));
        pace.wrote(at(6));
        assert_eq!(pace.due(), None);
        pace.changed(at(7), 0.0);
        assert_eq!(pace.due(), Some(at(16)));
        pace.set(Duration::from_secs(60));
        assert_eq!(pace.due(), Some(at(66)));
        pace.set(Duration::ZERO);
        assert_eq!(pace.due(), Some(at(8)));
        pace.wrote(at(8));
        pace.changed(at(500), 1.0);
        assert_eq!(pace.due(), Some(at(502)));
    }
}
