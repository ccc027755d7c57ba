//! Who leads: a Lease, as client-go's leader election holds it, as a function of what was seen and when.
//!
//! Clocks of others are not believed: a lease is over when it has not changed, *as seen from here*, for as long as it
//! says that it lasts. A leader that could not renew for two thirds of that stops before anybody else may begin,
//! counted from when it *began* to write. So two never lead at the same time, however far their clocks are apart; only
//! that they run equally fast is assumed, to within a third.

use std::time::{Duration, Instant};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};

/// How a lease is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    /// Who holds it: no two processes have the same.
    pub identity: String,
    /// How long it lasts without being renewed.
    pub duration: Duration,
}

impl Terms {
    /// How long the holder may act after it began to renew.
    pub fn deadline(&self) -> Duration {
        self.duration * 2 / 3
    }

    /// Pause between two looks at it.
    pub fn period(&self) -> Duration {
        self.duration / 6
    }
}

/// What is known of the lease.
#[derive(Debug)]
pub struct Elector {
    terms: Terms,
    seen: Option<Seen>,
    /// Until when this one leads.
    until: Option<Instant>,
}

/// A lease as it was seen first.
#[derive(Debug)]
struct Seen {
    lease: Lease,
    at: Instant,
}

/// What to do about the lease.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// There is none: make this one.
    Create(Box<Lease>),
    /// It is free, or one's own: put this in its place. The version in it must be the server's still.
    Replace(Box<Lease>),
    /// Another one leads.
    Wait,
}

impl Elector {
    /// Nothing was seen yet.
    pub fn new(terms: Terms) -> Self {
        Self {
            terms,
            seen: None,
            until: None,
        }
    }

    /// Whether this one leads.
    pub fn leads(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// Until when this one leads, if it does not renew.
    pub fn until(&self) -> Option<Instant> {
        self.until
    }

    /// The server has this lease, and what to do about that. `wall` is only written down, for people.
    pub fn see(&mut self, lease: Option<Lease>, now: Instant, wall: Timestamp) -> Step {
        let Some(lease) = lease else {
            self.seen = None;
            return Step::Create(Box::new(self.held(None, wall)));
        };
        let is_known = |seen: &Seen| {
            seen.lease.metadata.resource_version == lease.metadata.resource_version
                && seen.lease.metadata.uid == lease.metadata.uid
        };
        if !self.seen.as_ref().is_some_and(is_known) {
            self.seen = Some(Seen {
                lease: lease.clone(),
                at: now,
            });
        }
        let seen_at = self.seen.as_ref().map_or(now, |seen| seen.at);
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if holder == self.terms.identity {
            return Step::Replace(Box::new(self.held(Some(lease), wall)));
        }
        // Whatever was believed: the server says who it is.
        self.until = None;
        let seconds = spec.lease_duration_seconds.unwrap_or_default().max(1);
        let lasts = Duration::from_secs(seconds.unsigned_abs().into());
        match holder.is_empty() || now.duration_since(seen_at) >= lasts {
            true => Step::Replace(Box::new(self.held(Some(lease), wall))),
            false => Step::Wait,
        }
    }

    /// The server took what [`Elector::see`] said; it was sent at `began`.
    pub fn wrote(&mut self, lease: Lease, began: Instant) {
        self.until = Some(began + self.terms.deadline());
        self.seen = Some(Seen { lease, at: began });
    }

    /// Leads no more; what to put in place of the lease, so that the next need not wait. `None` where it is not one's
    /// own.
    pub fn release(&mut self, wall: Timestamp) -> Option<Lease> {
        self.until = None;
        let mut lease = self.seen.take()?.lease;
        let spec = lease.spec.as_mut()?;
        if spec.holder_identity.as_deref() != Some(&self.terms.identity) {
            return None;
        }
        spec.holder_identity = Some(String::new());
        spec.lease_duration_seconds = Some(1);
        spec.renew_time = Some(MicroTime(wall));
        Some(lease)
    }

    /// `lease` as it is when this one holds it.
    fn held(&self, lease: Option<Lease>, wall: Timestamp) -> Lease {
        let (metadata, spec) = match lease {
            Some(lease) => (lease.metadata, lease.spec.unwrap_or_default()),
            None => (ObjectMeta::default(), LeaseSpec::default()),
        };
        let is_own = spec.holder_identity.as_deref() == Some(&self.terms.identity);
        let transitions = spec.lease_transitions.unwrap_or_default();
        let seconds = i32::try_from(self.terms.duration.as_secs()).unwrap_or(i32::MAX);
        Lease {
            metadata,
            spec: Some(LeaseSpec {
                acquire_time: spec
                    .acquire_time
                    .filter(|_| is_own)
                    .or(Some(MicroTime(wall))),
                holder_identity: Some(self.terms.identity.clone()),
                lease_duration_seconds: Some(seconds),
                lease_transitions: Some(match is_own {
                    true => transitions,
                    false => transitions.saturating_add(1),
                }),
                renew_time: Some(MicroTime(wall)),
                ..LeaseSpec::default()
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DURATION: Duration = Duration::from_secs(15);

    fn elector(identity: &str) -> Elector {
        Elector::new(Terms {
            identity: identity.to_owned(),
            duration: DURATION,
        })
    }

    /// A server with one lease, which takes a write only of the version that it has.
    #[derive(Default)]
    struct Server {
        lease: Option<Lease>,
        version: u64,
    }

    impl Server {
        fn put(&mut self, mut lease: Lease) -> Result<Lease, ()> {
            let current = self
                .lease
                .as_ref()
                .and_then(|l| l.metadata.resource_version.clone());
            if lease.metadata.resource_version != current {
                return Err(());
            }
            self.version += 1;
            lease.metadata.resource_version = Some(self.version.to_string());
            self.lease = Some(lease.clone());
            Ok(lease)
        }

        fn turn(&mut self, elector: &mut Elector, now: Instant, wall: Timestamp) {
            match elector.see(self.lease.clone(), now, wall) {
                Step::Wait => {}
                Step::Create(lease) | Step::Replace(lease) => {
                    if let Ok(lease) = self.put(*lease) {
                        elector.wrote(lease, now);
                    }
                }
            }
        }
    }

    #[test]
    fn one_leads_and_the_other_follows_when_it_is_silent_or_leaves() {
        let (mut server, mut a, mut b) = (Server::default(), elector("a"), elector("b"));
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        // The clock of b is a year ahead: that is nothing to go by.
        let wall = Timestamp::from_second(1_800_000_000).unwrap();
        let ahead = Timestamp::from_second(1_831_536_000).unwrap();
        server.turn(&mut a, at(0), wall);
        assert!(a.leads(at(0)) && !a.leads(at(10)));
        server.turn(&mut b, at(1), ahead);
        assert!(!b.leads(at(1)));
        server.turn(&mut a, at(5), wall);
        assert!(a.leads(at(14)));
        server.turn(&mut b, at(6), ahead);
        server.turn(&mut b, at(20), ahead);
        assert!(!b.leads(at(20)), "it changed at 6 as seen from b");
        server.turn(&mut b, at(21), ahead);
        assert!(b.leads(at(21)) && !a.leads(at(21)));
        let spec = server.lease.clone().unwrap().spec.unwrap();
        assert_eq!(
            (spec.holder_identity.as_deref(), spec.lease_transitions),
            (Some("b"), Some(2))
        );
        server.turn(&mut a, at(22), wall);
        assert!(!a.leads(at(22)));
        let free = b.release(ahead).unwrap();
        assert!(!b.leads(at(23)) && server.put(free).is_ok());
        server.turn(&mut a, at(23), wall);
        assert!(a.leads(at(23)), "without waiting");
        assert!(b.release(ahead).is_none());
    }

    proptest! {
        #[test]
        fn two_never_lead_at_once(turns in proptest::collection::vec(
            (0usize..3, 0u64..20_000, any::<bool>(), any::<bool>(), -100_000_000i64..100_000_000), 1..200)) {
            let mut server = Server::default();
            let mut electors = ["a", "b", "c"].map(elector);
            let mut now = Instant::now();
            for (who, pause, lost, leaves, skew) in turns {
                now += Duration::from_millis(pause);
                let wall = Timestamp::from_second(1_800_000_000 + skew).unwrap();
                let elector = &mut electors[who];
                match leaves {
                    true => {
                        if let Some(lease) = elector.release(wall) && !lost {
                            let _ = server.put(lease);
                        }
                    }
                    // The answer is lost, though the server took it.
                    false if lost => {
                        if let Step::Create(lease) | Step::Replace(lease) =
                            elector.see(server.lease.clone(), now, wall)
                        {
                            let _ = server.put(*lease);
                        }
                    }
                    false => server.turn(elector, now, wall),
                }
                let leaders = electors.iter().filter(|e| e.leads(now)).count();
                prop_assert!(leaders <= 1);
            }
        }
    }
}
