use std::{path::PathBuf, process::ExitCode};

use super::Context;
use crate::daemon;

/// Serve models to Kubernetes as volumes
///
/// The CSI driver csi.hearth.dev, for the kubelet and the CSI sidecars: a volume is a model, readable as soon as its
/// tree is known, and shared by all pods of the node. Runs until SIGTERM or SIGINT; requests under way are finished
/// then. Without a keeper the volumes of running pods end with it.
#[derive(clap::Args)]
#[command(after_long_help = "\
As a volume of a pod:

  volumes:
  - name: model
    csi:
      driver: csi.hearth.dev
      readOnly: true
      volumeAttributes:
        source: hf://org/model
        # revision: main      include: \"*.safetensors,*.json\"     exclude: \"*.bin\"
        # layout: tree|hub    mode: lazy|complete    verify: complete|strict
      # nodePublishSecretRef: {name: hf}     # token; accessKeyId, secretAccessKey, sessionToken; username, password

The same attributes are those of a PersistentVolume, and the parameters of a StorageClass. The CSIDriver says
attachRequired: false, podInfoOnMount: true, fsGroupPolicy: None, and both volumeLifecycleModes. The directory of the
kubelet and the store are mounted into the agent's own container with mountPropagation: Bidirectional.")]
pub(super) struct Args {
    /// Where to listen: a unix socket, mode 0600 [default: csi.endpoint of the configuration, else
    /// unix:///run/hearth/csi.sock]
    #[arg(long, value_name = "unix:///PATH", env = "CSI_ENDPOINT")]
    endpoint: Option<PathBuf>,
    /// What the cluster calls this node [default: agent.node_name of the configuration, else the name of the
    /// host]
    #[arg(long, value_name = "NAME", env = "KUBE_NODE_NAME")]
    node_id: Option<String>,
    /// Have the mounts in the keeper that listens here: then volumes outlive this process
    #[arg(long, value_name = "PATH")]
    keeper: Option<PathBuf>,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    let mut config = context.config.clone();
    args.endpoint
        .into_iter()
        .for_each(|e| config.csi.endpoint = e);
    config.agent.node_name = args.node_id.or(config.agent.node_name);
    config.agent.keeper = args.keeper;
    context.serve(config, &[daemon::CSI], None)
}
