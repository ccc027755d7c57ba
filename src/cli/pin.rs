use std::process::ExitCode;

use super::{Context, output, parse_reference};
use crate::{node::NodeError, reference::Reference};

/// Who pins in the name of the person at the command line.
pub(super) const OWNER: &str = "user";

/// Keep an artifact from eviction until `hearth unpin`
#[derive(clap::Args)]
pub(super) struct PinArgs {
    /// What to pin; it must be in the store (see `hearth warm --pin`)
    #[arg(value_name = "REF", value_parser = parse_reference, required = true)]
    references: Vec<Reference>,
}

/// Let an artifact be evicted again
#[derive(clap::Args)]
pub(super) struct UnpinArgs {
    /// What to unpin
    #[arg(value_name = "REF", value_parser = parse_reference, required = true)]
    references: Vec<Reference>,
}

pub(super) fn pin(context: &Context, args: PinArgs) -> anyhow::Result<ExitCode> {
    let store = context.store()?;
    for reference in args.references {
        let name = reference.to_string();
        if store.artifact(&name).map_err(NodeError::from)?.is_none() {
            return Err(NodeError::Unknown(name).into());
        }
        store.pin(&name, OWNER).map_err(NodeError::from)?;
        output::line(format!("pinned: {name}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn unpin(context: &Context, args: UnpinArgs) -> anyhow::Result<ExitCode> {
    let store = context.store()?;
    for reference in args.references {
        let name = reference.to_string();
        let was = store.unpin(&name, OWNER).map_err(NodeError::from)?;
        output::line(format!(
            "{}: {name}",
            if was { "unpinned" } else { "was not pinned" }
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
