//! Who wants to lead: holds the lease, or waits for it, and says until when.

use std::time::Instant;

use k8s_openapi::{
    api::coordination::v1::Lease, apimachinery::pkg::apis::meta::v1::ObjectMeta, jiff::Timestamp,
};
use kube::{Api, api::PostParams};
use tokio::sync::{oneshot, watch};

use super::{
    super::{client::within, random},
    lease::{Elector, Step, Terms},
};

pub(super) fn is_ahead(until: Option<Instant>) -> bool {
    until.is_some_and(|until| Instant::now() < until)
}

/// Returns when this process leads no more.
pub(super) async fn lost(mut leads: watch::Receiver<Option<Instant>>) {
    loop {
        let until = *leads.borrow_and_update();
        let Some(until) = until.filter(|until| Instant::now() < *until) else {
            return;
        };
        tokio::select! {
            () = tokio::time::sleep_until(until.into()) => {}
            changed = leads.changed() => if changed.is_err() { return },
        }
    }
}

/// Who wants to lead.
pub(super) struct Candidate {
    pub(super) leases: Api<Lease>,
    pub(super) name: String,
    pub(super) terms: Terms,
    /// Until when this process leads.
    pub(super) tell: watch::Sender<Option<Instant>>,
}

impl Candidate {
    /// Holds the lease, or waits for it; gives it back when `told` to end, or nobody is there to tell.
    pub(super) async fn run(self, told: oneshot::Receiver<()>) {
        let mut elector = Elector::new(self.terms.clone());
        tokio::select! {
            () = self.hold(&mut elector) => {}
            _ = told => {}
        }
        if let Some(lease) = elector.release(Timestamp::now()) {
            let params = PostParams::default();
            let given = within(self.leases.replace(&self.name, &params, &lease)).await;
            if let Err(error) = given {
                tracing::warn!(%error, "the lease was not given back: the next waits until it is over");
            }
        }
    }

    /// Does not end.
    async fn hold(&self, elector: &mut Elector) {
        loop {
            let began = Instant::now();
            if let Err(error) = turn(&self.leases, &self.name, elector).await {
                tracing::warn!(%error, "the lease cannot be had");
            }
            let until = elector.until().filter(|_| elector.leads(Instant::now()));
            self.tell.send_replace(until);
            // Others do not knock at the same moment.
            let pause = self.terms.period().mul_f64(0.75 + 0.5 * random());
            tokio::time::sleep_until((began + pause).into()).await;
        }
    }
}

async fn turn(leases: &Api<Lease>, name: &str, elector: &mut Elector) -> kube::Result<()> {
    let lease = within(leases.get_opt(name)).await?;
    // Sent later than this.
    let began = Instant::now();
    let params = PostParams::default();
    let written = match elector.see(lease, began, Timestamp::now()) {
        Step::Wait => return Ok(()),
        Step::Create(mut lease) => {
            lease.metadata = ObjectMeta {
                name: Some(name.to_owned()),
                ..ObjectMeta::default()
            };
            within(leases.create(&params, &lease)).await
        }
        Step::Replace(lease) => within(leases.replace(name, &params, &lease)).await,
    };
    match written {
        Ok(lease) => elector.wrote(lease, began),
        // Another was faster.
        Err(kube::Error::Api(answer)) if answer.code == 409 => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Something that no other process says.
pub(super) fn nonce() -> String {
    use std::hash::{BuildHasher as _, RandomState};
    format!("{:016x}", RandomState::new().hash_one(std::process::id()))
}
