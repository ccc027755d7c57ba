//! What a pod's start was made of. Pure: who follows pods says what happens, and when.
//!
//! Times are this node's, from the moment at which it saw the pod bound; what the API server's clock says is not
//! compared with them.

use std::{fmt, time::Duration};

use serde::Serialize;

/// How long after everything is here a pod may take to be ready before its start is told without.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// What was fetched for a pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
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
}

impl Fetched {
    /// What came from the origin.
    pub const fn from_origin(&self) -> u64 {
        (self.demanded + self.prefetched).saturating_sub(self.from_peers)
    }

    /// Adds another artifact.
    pub const fn add(&mut self, other: &Self) {
        self.total += other.total;
        self.before += other.before;
        self.demanded += other.demanded;
        self.prefetched += other.prefetched;
        self.from_peers += other.from_peers;
    }
}

/// The start of one pod: times since it was bound.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ColdStart {
    pub namespace: String,
    pub pod: String,
    pub uid: String,
    /// It was bound before this process began: the times are from then.
    pub late: bool,
    /// The prefetch began.
    pub started: Option<Duration>,
    /// Somebody read something of it.
    pub first_byte: Option<Duration>,
    /// The pod was ready.
    pub ready: Option<Duration>,
    /// Everything was here.
    pub complete: Option<Duration>,
    /// How many of what was asked for could not be had, so far.
    pub failed: usize,
    #[serde(flatten)]
    pub fetched: Fetched,
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
        });
        assert_eq!(
            start.to_string(),
            "bound, prefetch started +0.003s, complete +2.000s; 10 bytes, 4 were here, 1 demanded, 5 prefetched, \
             2 from peers, 4 from the origin"
        );
    }
}
