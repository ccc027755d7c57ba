use std::{path::PathBuf, process::ExitCode, time::Duration};

use super::{Context, control, output};
use crate::mount::keeper::Link;

/// Unmount what `hearth mount` mounted
#[derive(clap::Args)]
pub(super) struct Args {
    /// The mount point
    dir: PathBuf,
    /// Detach it even if files below it are open
    #[arg(long)]
    lazy: bool,
    /// Take it away whatever its server does, even if that hangs: who reads below it gets an error
    #[arg(long, conflicts_with = "lazy")]
    force: bool,
}

/// How long the process that served it may take to end; what is detached may live on.
const PATIENCE: Duration = Duration::from_secs(10);
const PATIENCE_IF_LAZY: Duration = Duration::from_secs(1);

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    let found = crate::mount::find(&args.dir)?;
    let keeper = found.as_ref().and_then(|dir| {
        let path = control::keeper_path(&context.root, dir);
        Link::connect(&path).ok()
    });
    let mut processes: Vec<u32> = keeper.iter().filter_map(Link::keeper).collect();
    if args.force {
        let served = keeper.as_ref().and_then(|keeper| keeper.sessions().ok());
        processes.extend(served.into_iter().flatten().filter_map(|kept| kept.server));
        crate::mount::unmount_forced(&args.dir)?;
        if let (Some(keeper), Some(dir)) = (&keeper, &found)
            && let Err(error) = keeper.abort(dir)
        {
            tracing::debug!(%error, "the keeper has noticed by itself");
        }
    } else {
        let server = found.and_then(|dir| control::ask(&context.root, &dir).ok()?);
        processes.extend(server.map(|server| server.pid));
        crate::mount::unmount(&args.dir, args.lazy)?;
    }
    drop(keeper);
    // What comes next may count on the store being left alone.
    let patience = if args.lazy {
        PATIENCE_IF_LAZY
    } else {
        PATIENCE
    };
    let started = std::time::Instant::now();
    while let Some(process) = processes.iter().find(|&&process| runs(process)) {
        if started.elapsed() > patience {
            if !args.lazy {
                output::note(&format!(
                    "unmounted; process {process} is not done with the store yet"
                ));
            }
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether a process runs: a thread of it is there, and no zombie that nobody waits for. The first
/// thread may be one while others still end, and with them the process's files and locks.
fn runs(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
    threads.into_iter().flatten().flatten().any(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // The name in parentheses may hold anything (proc(5)).
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
    })
}
