use std::{net::SocketAddr, process::ExitCode};

use super::Context;
use crate::daemon;

/// Serve registries to container runtimes, through the store
///
/// A pull-through mirror, to be read only: what is in the store comes from there, also when the registry
/// is down; everything else is fetched once, verified and kept. What this node may read it serves to everybody
/// who reaches it; what came by the credentials of others, to those whose own the registry accepts. Runs until
/// SIGTERM or SIGINT.
#[derive(clap::Args)]
#[command(after_long_help = "\
For containerd, in /etc/containerd/certs.d/registry.example/hosts.toml (the directory is
`config_path` of its registry configuration):

  server = \"https://registry.example\"

  [host.\"http://127.0.0.1:5700\"]
    capabilities = [\"pull\", \"resolve\"]

When the mirror does not answer, containerd asks the registry itself. hearth reads these files, too,
and passes its own mirror by.

What is only pulled through the mirror is kept until room is needed or `hearth gc` runs: no artifact
needs it. To keep an image, warm it (`hearth warm --pin oci://...`).")]
pub(super) struct Args {
    /// Where to listen [default: mirror.address of the configuration, else 127.0.0.1:5700]
    #[arg(long, value_name = "IP:PORT")]
    address: Option<SocketAddr>,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    let mut config = context.config.clone();
    args.address
        .into_iter()
        .for_each(|a| config.mirror.address = a);
    config.agent.keeper = None;
    context.serve(config, &[daemon::MIRROR], None)
}
