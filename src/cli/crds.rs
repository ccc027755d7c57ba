use std::process::ExitCode;

use super::output;

/// Print the Kubernetes custom resource definitions, as YAML
///
/// Warmup and NodeCache of hearth.dev/v1alpha1: hearth crds | kubectl apply -f -
#[derive(clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_args: &Args) -> anyhow::Result<ExitCode> {
    output::text(crate::kube::crd::yaml()?.trim_end())?;
    Ok(ExitCode::SUCCESS)
}
