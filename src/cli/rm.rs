use std::process::ExitCode;

use super::{Context, output, parse_reference};
use crate::{node::NodeError, reference::Reference, store::CollectOptions};

/// Forget references, and free what nothing else needs
#[derive(clap::Args)]
pub(super) struct Args {
    /// What to forget
    #[arg(value_name = "REF", value_parser = parse_reference, required = true)]
    references: Vec<Reference>,
    /// Also what is pinned
    #[arg(long)]
    force: bool,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    let store = context.store()?;
    for reference in args.references {
        let name = reference.to_string();
        let removed = match args.force {
            true => store.remove_forced(&name),
            false => store.remove(&name),
        };
        if !removed.map_err(NodeError::from)? {
            return Err(NodeError::Unknown(name).into());
        }
        output::line(format!("removed: {name}"))?;
    }
    let freed = store
        .collect(&CollectOptions::default())
        .map_err(NodeError::from)?;
    output::line(format!("{} freed", output::size(freed.bytes)))?;
    Ok(ExitCode::SUCCESS)
}
