use std::{path::PathBuf, process::ExitCode, sync::Arc};

use super::{Context, output};
use crate::{
    csi::{self, Binds, Driver, Listener, Settings},
    daemon::SharedModels,
    mount::keeper::Link,
};

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
    /// Where to listen: a unix socket, mode 0600
    #[arg(
        long,
        value_name = "unix:///PATH",
        env = "CSI_ENDPOINT",
        default_value = "unix:///run/hearth/csi.sock"
    )]
    endpoint: PathBuf,
    /// What the cluster calls this node
    #[arg(long, value_name = "NAME", env = "KUBE_NODE_NAME")]
    node_id: String,
    /// Have the mounts in the keeper that listens here: then volumes outlive this process
    #[arg(long, value_name = "PATH")]
    keeper: Option<PathBuf>,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    crate::mount::available()?;
    let settings = Settings {
        store: context.root.clone(),
        node_id: args.node_id,
        config: context.config.csi.clone(),
    };
    let runtime = context.runtime()?;
    let done = runtime.block_on(async {
        // First, so that nothing is touched that another process serves.
        let listener = Listener::bind(&args.endpoint)?;
        let keeper = args.keeper.as_deref().map(Link::connect).transpose()?;
        let mount = context.config.mount.clone();
        let models = SharedModels::new(context.node()?, mount, keeper.map(Arc::new));
        let driver = Driver::open(settings, models.clone(), Arc::new(Binds)).await?;
        output::note(&format!("csi on {}", listener.path().display()));
        let mut stopped = None;
        let stop = async { stopped = Some(super::interrupted().await) };
        let served = csi::serve(driver, listener, stop).await;
        // However it ends: what the keeper has is for the next process.
        models.leave_all().await;
        served?;
        // To be told to stop is how it ends.
        match stopped {
            Some(Err(error)) => Err(error),
            _ => Ok(ExitCode::SUCCESS),
        }
    });
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    done
}
