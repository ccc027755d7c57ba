use std::process::ExitCode;

use super::{Context, output, parse_reference};
use crate::{
    node::NodeError,
    reference::Reference,
    store::{CollectOptions, Store},
};

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
    let mut code = ExitCode::SUCCESS;
    let mut removed = false;
    for reference in &args.references {
        let name = reference.to_string();
        match forget(&store, &name, args.force) {
            Ok(()) => {
                removed = true;
                output::line(format!("removed: {name}"))?;
            }
            Err(error) => {
                output::error(&error.into());
                code = ExitCode::from(1);
            }
        }
    }
    if removed {
        // However full the disk is: nothing is evicted that was not named.
        let options = CollectOptions {
            target_bytes: Some(u64::MAX),
            ..CollectOptions::default()
        };
        let freed = store.collect(&options).map_err(NodeError::from)?;
        output::line(format!("{} freed", output::size(freed.bytes)))?;
    }
    Ok(code)
}

fn forget(store: &Store, name: &str, force: bool) -> Result<(), NodeError> {
    let known = match force {
        true => store.remove_forced(name),
        false => store.remove(name),
    };
    match known? {
        true => Ok(()),
        false => Err(NodeError::Unknown(name.to_owned())),
    }
}
