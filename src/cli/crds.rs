use std::process::ExitCode;

use super::output;

/// Print the Kubernetes custom resource definitions, as YAML
///
/// Warmup and NodeCache of hearth.dev/v1alpha1: hearth crds | kubectl apply -f -
#[derive(clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_args: &Args) -> anyhow::Result<ExitCode> {
    for definition in crate::kube::crd::crds() {
        output::line("---")?;
        output::line(serde_saphyr::to_string(&definition)?.trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}
