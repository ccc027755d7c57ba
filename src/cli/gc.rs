use std::process::ExitCode;

use super::{Context, output};
use crate::{
    node::NodeError,
    store::{ByteSize, CollectOptions},
};

/// Free what nothing needs, and evict what was not used for longest until the store fits
///
/// What is pinned or in use is never evicted. Without --target-bytes the watermarks of the
/// configuration decide.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Evict until the store takes at most this much (200GiB, 4096)
    #[arg(long, value_name = "N")]
    target_bytes: Option<ByteSize>,
    /// Only say what would be freed
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    let options = CollectOptions {
        target_bytes: args.target_bytes.map(|b| b.0),
        dry_run: args.dry_run,
    };
    let report = context
        .store()?
        .collect(&options)
        .map_err(NodeError::from)?;
    if args.json {
        output::json(&report)?;
        return Ok(ExitCode::SUCCESS);
    }
    let what = if args.dry_run {
        "would evict"
    } else {
        "evicted"
    };
    for reference in &report.evicted {
        output::line(format!("{what}: {reference}"))?;
    }
    let what = if args.dry_run { "would free" } else { "freed" };
    output::line(format!("{what} {}", output::size(report.bytes)))?;
    Ok(ExitCode::SUCCESS)
}
