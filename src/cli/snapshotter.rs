use std::{path::PathBuf, process::ExitCode};

use super::Context;
use crate::daemon;

/// Serve containerd as its snapshotter
///
/// Runs until SIGTERM or SIGINT; requests under way are finished then. What was snapshotted is kept,
/// and containers that run on ordinary snapshots do not notice.
#[derive(clap::Args)]
#[command(after_long_help = "\
In containerd's configuration (/etc/containerd/config.toml):

  [proxy_plugins.hearth]
    type = \"snapshot\"
    address = \"/run/hearth/snapshotter.sock\"
  [proxy_plugins.hearth.exports]
    root = \"/var/lib/hearth/snapshots\"

  # For Kubernetes, of version 2 (containerd 1.x):
  [plugins.\"io.containerd.grpc.v1.cri\".containerd]
    snapshotter = \"hearth\"
    disable_snapshot_annotations = false   # hearth sees which image it is

  # of version 3 (containerd 2.x):
  [plugins.'io.containerd.cri.v1.images']
    snapshotter = \"hearth\"
    disable_snapshot_annotations = false

From 2.1 on the transfer service pulls images, and unpacks them with overlayfs, unless annotations are
enabled as above, or use_local_image_pull = true beside them, or it is told as well:

  [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
    platform = \"linux/amd64\"
    snapshotter = \"hearth\"

As the snapshotter of all pods it has to run before any pod can: as a service of the host, not as one of
these pods. The kubelet measures the file system of `exports.root`; containerd before 1.7.17 ignores that and
names a fixed directory, so say --root /var/lib/containerd/io.containerd.snapshotter.v1.hearth there.

Start hearth before containerd. `ctr` takes it with --snapshotter hearth. To try it:

  ctr images pull --snapshotter hearth registry.example/app:1
  ctr run --rm --snapshotter hearth registry.example/app:1 test sh")]
pub(super) struct Args {
    /// Where to listen: a unix socket, mode 0600 [default: snapshotter.address of the configuration, else
    /// /run/hearth/snapshotter.sock]
    #[arg(long, value_name = "PATH")]
    address: Option<PathBuf>,
    /// Where snapshots are kept: on a file system that overlayfs can write to
    /// [default: `snapshots` in the store]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Write what containerd unpacks to the disk before it counts: slower, but a power failure
    /// cannot leave a layer incomplete
    #[arg(long)]
    sync: bool,
    /// containerd's own socket: what is pinned here is labelled there (io.cri-containerd.pinned), so
    /// that the kubelet does not collect it. The containerd 1.6.20 of Debian 12 does not know the label
    #[arg(long, value_name = "PATH")]
    containerd: Option<PathBuf>,
    /// Have FUSE mounts in the keeper that listens here (`hearth keeper`): then containers on images that
    /// are still arriving outlive this process, too, and the next one goes on with them
    #[arg(long, value_name = "PATH")]
    keeper: Option<PathBuf>,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    let mut config = context.config.clone();
    let face = &mut config.snapshotter;
    args.address.into_iter().for_each(|a| face.address = a);
    face.root = args.root.or(face.root.take());
    face.sync |= args.sync;
    face.containerd = args.containerd.or(face.containerd.take());
    config.agent.keeper = args.keeper;
    context.serve(config, &[daemon::SNAPSHOTTER], None)
}
