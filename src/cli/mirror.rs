use std::{net::SocketAddr, process::ExitCode};

use anyhow::Context as _;

use super::{Context, output};
use crate::mirror::{Config, Mirror};

/// Serve registries to container runtimes, through the store
///
/// A pull-through mirror, to be read only: what is in the store comes from there, also when the registry
/// is down; everything else is fetched once, verified and kept. It asks nobody for credentials and serves
/// what this node may read: let nobody else reach it. Runs until SIGTERM or SIGINT.
#[derive(clap::Args)]
#[command(after_long_help = "\
For containerd, in /etc/containerd/certs.d/registry.example/hosts.toml (the directory is `config_path` of
its registry configuration):

  server = \"https://registry.example\"

  [host.\"http://127.0.0.1:5700\"]
    capabilities = [\"pull\", \"resolve\"]

When the mirror does not answer, containerd asks the registry itself.")]
pub(super) struct Args {
    /// Where to listen [default: mirror.address of the configuration, else 127.0.0.1:5700]
    #[arg(long, value_name = "IP:PORT")]
    address: Option<SocketAddr>,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    let mut config: Config = context.config.mirror.clone();
    if let Some(address) = args.address {
        config.address = address;
    }
    let runtime = context.runtime()?;
    let done = runtime.block_on(async {
        let mirror = Mirror::start(context.node()?, &config)
            .await
            .with_context(|| format!("cannot listen on {}", config.address))?;
        output::note(&format!("mirror on http://{}", mirror.address()));
        // To be told to stop is how it ends.
        super::interrupted().await.map(|_| ExitCode::SUCCESS)
    });
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    done
}
