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

/// How long the process that served it may take to end; what is detached may live on.
const PATIENCE: Duration = Duration::from_secs(10);
const PATIENCE_IF_LAZY: Duration = Duration::from_secs(1);

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    let found = crate::mount::find(&args.dir)?;
    let server = found.and_then(|dir| control::ask(&context.root, &dir).ok()?);
    crate::mount::unmount(&args.dir, args.lazy)?;
    // What comes next may count on the store being left alone.
    let patience = if args.lazy {
        PATIENCE_IF_LAZY
    } else {
        PATIENCE
    };
    let started = std::time::Instant::now();
    while started.elapsed() < patience && server.as_ref().is_some_and(|s| runs(s.pid)) {
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether a process runs: it is there, and no zombie that nobody waits for.
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything (proc(5)).
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}
