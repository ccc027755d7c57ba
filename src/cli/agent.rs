use std::{path::PathBuf, process::ExitCode};

use super::Context;
use crate::daemon;

/// Serve everything that this node offers, as the configuration says
///
/// One process with all faces that are enabled: the snapshotter for containerd, the CSI driver for the kubelet,
/// the registry mirror, what pods and Warmups of a cluster ask for, its controller, and the port for probes and
/// metrics. Runs until SIGTERM or SIGINT: then it takes no more requests, finishes those under way, leaves its
/// mounts to the keeper, and ends. If a face cannot start, or fails, it ends with status 1, and is to be started
/// again.
///
/// Where one runs already, the new one takes over from it: sockets and mounts change hands while clients and readers
/// go on, and the old one ends. If the new one cannot, it says why, and the old one goes on.
#[derive(clap::Args)]
#[command(after_long_help = "\
In the configuration (`hearth config` prints all of it):

  [agent]
  keeper = \"/run/hearth/keeper.sock\"   # of `hearth keeper`: mounts outlive the agent
  [snapshotter]
  enabled = true
  [csi]
  enabled = true
  [mirror]
  enabled = true
  [admin]                              # /healthz, /readyz, /metrics
  address = \"127.0.0.1:5701\"")]
pub(super) struct Args {
    /// What the cluster calls this node [default: agent.node_name of the configuration, else the name of the
    /// host]
    #[arg(long, value_name = "NAME", env = "KUBE_NODE_NAME")]
    node_name: Option<String>,
    /// The socket of the keeper [default: agent.keeper of the configuration; else there is none]
    #[arg(long, value_name = "PATH")]
    keeper: Option<PathBuf>,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    let mut config = context.config.clone();
    let agent = &mut config.agent;
    agent.node_name = args.node_name.or(agent.node_name.take());
    agent.keeper = args.keeper.or(agent.keeper.take());
    let (faces, door) = (daemon::enabled(&config), config.agent.socket.clone());
    context.serve(config, &faces, Some(door))
}
