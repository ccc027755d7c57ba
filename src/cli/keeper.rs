use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;

use super::{Context, output};
use crate::{
    mount::keeper::{Keeper, Settings},
    socket::service,
};

/// Keep mounts while the processes that serve them come and go
///
/// A small process that mounts for others and does nothing else: a server that is killed, upgraded or out of
/// memory is replaced by the next one, and who reads waits so long. Runs until SIGTERM or SIGINT: then the
/// mounts stay, but die with their servers. `hearth mount` in the background needs none: it starts its own.
#[derive(clap::Args)]
#[command(after_long_help = "\
  hearth keeper --socket /run/hearth/keeper.sock &
  hearth mount --foreground --keeper /run/hearth/keeper.sock REF DIR

While no server is there, files that are complete and open stay readable; who waits for anything else is
refused with ETIMEDOUT after mount.orphan_timeout_seconds of the configuration.")]
pub(super) struct Args {
    /// Where to listen: a unix socket, mode 0600, for processes of this user and root
    #[arg(long, value_name = "PATH", default_value = "/run/hearth/keeper.sock")]
    socket: PathBuf,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    crate::mount::available()?;
    crate::limits::raise_open_files();
    // Who reads from its mounts would lose them with it; it is small. Nobody else may say so, nor does it matter much.
    let spared = std::fs::write("/proc/self/oom_score_adj", "-1000");
    if let Err(error) = spared {
        tracing::debug!(%error, "the kernel may kill the keeper when memory is short");
    }
    let socket = std::path::absolute(args.socket)?;
    let keeper = Keeper::new(Settings {
        socket: Some(socket.clone()),
        replace: false,
        orphan_timeout: Duration::from_secs(context.config.mount.orphan_timeout),
        server: None,
    })?;
    output::note(&format!("keeper on {}", socket.display()));
    service::notify("READY=1", &[])?;
    keeper.run().context("the keeper failed")?;
    Ok(ExitCode::SUCCESS)
}
