//! The face towards Kubernetes, against an API server that misbehaves on request.

mod agent;
mod crds;
#[expect(
    dead_code,
    reason = "not all that it can do is needed by all who share it"
)]
pub(crate) mod fake;
mod pods;
pub(crate) mod schema;
mod tenancy;
mod warmups;
mod watch;
