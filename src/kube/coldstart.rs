//! What a pod's start was made of. Pure: who follows pods says what happens, and when.
//!
//! Times are this node's, from the moment at which it saw the pod bound; what the API server's clock says is not
//! compared with them.

use std::{
    fmt,
    time::{Duration, Instant, SystemTime},
};

use serde::{Deserialize, Serialize};
use tracing::Span;

use crate::telemetry;

/// How long after everything is here a pod may take to be ready before its start is told without.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// What was fetched for a pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fetched {
    /// Bytes of all of it.
    pub total: u64,
    /// What was on the node before.
    pub before: u64,
    /// What came since because somebody read it and waited.
    pub demanded: u64,
    /// What came since ahead of that.
    pub prefetched: u64,
    /// Of what came, from other nodes; the rest is from the origin.
    pub from_peers: u64,
    /// When it was first read while it arrived.
    #[serde(skip)]
    pub first_read: Option<Instant>,
}

impl Fetched {
    /// What came from the origin.
    pub const fn from_origin(&self) -> u64 {
        (self.demanded + self.prefetched).saturating_sub(self.from_peers)
    }

    /// Tells `span` of it.
    pub(super) fn tell(&self, span: &Span) {
        for (key, bytes) in [
            ("hearth.bytes.total", self.total),
            ("hearth.bytes.before", self.before),
            ("hearth.bytes.demanded", self.demanded),
            ("hearth.bytes.prefetched", self.prefetched),
            ("hearth.bytes.from_peers", self.from_peers),
            ("hearth.bytes.from_origin", self.from_origin()),
        ] {
            telemetry::count(span, key, bytes);
        }
    }

    /// Adds another artifact.
    pub fn add(&mut self, other: &Self) {
        self.total += other.total;
        self.before += other.before;
        self.demanded += other.demanded;
        self.prefetched += other.prefetched;
        self.from_peers += other.from_peers;
        let both = self.first_read.into_iter().chain(other.first_read);
        self.first_read = both.min();
    }
}

/// The start of one pod: times since it was bound.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ColdStart {
    pub namespace: String,
    pub pod: String,
    pub uid: String,
    /// It was bound before this process began: the times are from then.
    pub late: bool,
    /// The prefetch began.
    #[serde(rename = "started_seconds", with = "seconds")]
    pub started: Option<Duration>,
    /// Somebody read something of it, while it arrived.
    #[serde(rename = "first_byte_seconds", with = "seconds")]
    pub first_byte: Option<Duration>,
    /// The pod was ready.
    #[serde(rename = "ready_seconds", with = "seconds")]
    pub ready: Option<Duration>,
    /// Everything was here.
    #[serde(rename = "complete_seconds", with = "seconds")]
    pub complete: Option<Duration>,
    /// How many of what was asked for could not be had, so far.
    pub failed: usize,
    #[serde(flatten)]
    pub fetched: Fetched,
}

impl ColdStart {
    /// Tells `span` of it, which began when the pod was bound, at `since`.
    pub(super) fn tell(&self, span: &Span, since: SystemTime) {
        if span.is_disabled() {
            return;
        }
        for (name, at) in [
            ("prefetch started", self.started),
            ("first byte read", self.first_byte),
            ("ready", self.ready),
            ("complete", self.complete),
        ] {
            if let Some(at) = at.and_then(|at| since.checked_add(at)) {
                telemetry::event(span, name, at);
            }
        }
        telemetry::count(span, "hearth.failed", self.failed as u64);
        self.fetched.tell(span);
    }
}

/// As numbers, for other programs.
mod seconds {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(
        time: &Option<Duration>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        match time {
            Some(time) => s.serialize_some(&time.as_secs_f64()),
            None => s.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Option<Duration>, D::Error> {
        let seconds = Option::<f64>::deserialize(d)?;
        Ok(seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()))
    }
}

impl fmt::Display for ColdStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = if self.late { "seen" } else { "bound" };
        let time = |f: &mut fmt::Formatter<'_>, what: &str, at: Option<Duration>| match at {
            Some(at) => write!(f, ", {what} +{:.3}s", at.as_secs_f64()),
            None => Ok(()),
        };
        f.write_str(since)?;
        time(f, "prefetch started", self.started)?;
        time(f, "first byte read", self.first_byte)?;
        time(f, "ready", self.ready)?;
        time(f, "complete", self.complete)?;
        let Fetched {
            total,
            before,
            demanded,
            prefetched,
            from_peers,
            ..
        } = self.fetched;
        write!(
            f,
            "; {total} bytes, {before} were here, {demanded} demanded, {prefetched} prefetched, \
             {from_peers} from peers, {} from the origin",
            self.fetched.from_origin()
        )?;
        match self.failed {
            0 => Ok(()),
            failed => write!(f, "; {failed} could not be had"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_happened() {
        let mut start = ColdStart {
            started: Some(Duration::from_millis(3)),
            complete: Some(Duration::from_secs(2)),
            ..ColdStart::default()
        };
        start.fetched.add(&Fetched {
            total: 10,
            before: 4,
            demanded: 1,
            prefetched: 5,
            from_peers: 2,
            first_read: None,
        });
        let json = serde_json::to_value(&start).unwrap();
        assert_eq!(
            (&json["started_seconds"], &json["total"]),
            (&0.003.into(), &10.into())
        );
        assert_eq!(serde_json::from_value::<ColdStart>(json).unwrap(), start);
        assert_eq!(
            start.to_string(),
            "bound, prefetch started +0.003s, complete +2.000s; 10 bytes, 4 were here, 1 demanded, 5 prefetched, \
             2 from peers, 4 from the origin"
        );
    }
}
