use std::{path::PathBuf, process::ExitCode, time::Duration};

use super::{Context, control};

/// Unmount what `hearth mount` mounted
#[derive(clap::Args)]
pub(super) struct Args {
    /// The mount point
    dir: PathBuf,
    /// Detach it even if files below it are open
    #[arg(long)]
    lazy: bool,
}

/// How long the process that served it may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    let dir = std::path::absolute(&args.dir)?;
    crate::mount::unmount(&dir, args.lazy)?;
    // What comes next may count on the store being left alone.
    let started = std::time::Instant::now();
    while started.elapsed() < PATIENCE
        && control::ask(&context.root, &dir).is_ok_and(|s| s.is_some())
    {
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(ExitCode::SUCCESS)
}
