use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use super::{Context, output};
use crate::{
    daemon::{self, ImageRoots},
    mount::keeper::Link,
    snapshotter::{self, Listener, Settings, Snapshotter},
};

/// Serve containerd as its snapshotter
///
/// Runs until SIGTERM or SIGINT; requests under way are finished then. What was snapshotted is kept,
/// and containers that run on ordinary snapshots do not notice.
#[derive(clap::Args)]
#[command(after_long_help = "\
In containerd's configuration (/etc/containerd/config.toml, version 2):

  [proxy_plugins.hearth]
    type = \"snapshot\"
    address = \"/run/hearth/snapshotter.sock\"
  [proxy_plugins.hearth.exports]
    root = \"/var/lib/hearth/snapshots\"

  [plugins.\"io.containerd.grpc.v1.cri\".containerd]   # for Kubernetes
    snapshotter = \"hearth\"

The kubelet measures the file system of `exports.root`; containerd before 1.7.17 ignores that and
names a fixed directory, so say --root /var/lib/containerd/io.containerd.snapshotter.v1.hearth there.

Start hearth before containerd. `ctr` takes it with --snapshotter hearth. To try it:

  ctr images pull --snapshotter hearth registry.example/app:1
  ctr run --rm --snapshotter hearth registry.example/app:1 test sh")]
pub(super) struct Args {
    /// Where to listen: a unix socket, mode 0600
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/run/hearth/snapshotter.sock"
    )]
    address: PathBuf,
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
    let root = args.root.unwrap_or_else(|| context.root.join("snapshots"));
    let settings = Settings {
        root: std::path::absolute(root)?,
        sync: args.sync,
    };
    let runtime = context.runtime()?;
    runtime.block_on(async {
        let node = context.node()?;
        let mount = context.config.mount.clone();
        let store = Arc::clone(node.store());
        // It mounts something to see whether that works.
        let keeper = args.keeper.as_deref().map(Link::connect).transpose()?;
        let keeper = keeper.map(Arc::new);
        let roots = move || ImageRoots::new(node, mount, keeper);
        let roots = Arc::new(tokio::task::spawn_blocking(roots).await?);
        // Before anything else: containers may be waiting.
        roots.adopt().await;
        // Ends with the runtime.
        if let Some(containerd) = args.containerd {
            let pinned = async move || {
                let store = Arc::clone(&store);
                let found = tokio::task::spawn_blocking(move || daemon::pinned_images(&store));
                anyhow::Ok(found.await??)
            };
            tokio::spawn(snapshotter::keep_pinned(containerd, pinned));
        }
        let mut stopped = None;
        let stop = async { stopped = Some(super::interrupted().await) };
        let served = serve(settings, roots.clone(), &args.address, stop).await;
        // However it ends: what the keeper has is for the next process.
        roots.leave().await;
        served?;
        // To be told to stop is how it ends.
        match stopped {
            Some(Err(error)) => Err(error),
            _ => Ok(ExitCode::SUCCESS),
        }
    })
}

async fn serve(
    settings: Settings,
    roots: Arc<ImageRoots>,
    address: &Path,
    stop: impl Future<Output = ()> + Send,
) -> anyhow::Result<()> {
    let root = settings.root.clone();
    let snapshotter = Snapshotter::open(settings, roots)?;
    snapshotter::check_overlay(&root)?;
    let listener = Listener::bind(address)?;
    output::note(&format!(
        "snapshotter on {}, snapshots in {}",
        listener.path().display(),
        root.display()
    ));
    snapshotter::serve(snapshotter, listener, stop).await?;
    Ok(())
}
