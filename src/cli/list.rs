use std::process::ExitCode;

use super::{Context, output};
use crate::node::Place;

/// List what the store knows, and how much of it is here
///
/// Looks at each object of the store itself. A tier that was baked is believed to have what it was sealed with, as long
/// as the largest object of an artifact is there and none was found damaged: what somebody has removed from there since,
/// `hearth status REF` and `hearth verify` find.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Show where it lies: in the store, on tiers
    #[arg(long)]
    tiers: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    context.with_node(|node| async move {
        let all = tokio::task::spawn_blocking(move || node.list()).await??;
        if args.json {
            output::json(&all)?;
            return Ok(ExitCode::SUCCESS);
        }
        let headings = ["HERE", "SIZE", "FILES", "PINNED", "REFERENCE"];
        let mut rows = vec![headings.map(String::from).to_vec()];
        if args.tiers {
            rows[0].insert(4, "WHERE".into());
        }
        for artifact in all {
            let here = match artifact.complete {
                true => "warm".into(),
                false => format!(
                    "{} %",
                    output::percent(artifact.present_bytes, artifact.bytes)
                ),
            };
            let mut row = vec![
                here,
                output::size(artifact.bytes),
                artifact.files.to_string(),
                if artifact.pins.is_empty() {
                    "no"
                } else {
                    "yes"
                }
                .into(),
                artifact.reference,
            ];
            if args.tiers {
                row.insert(4, places(&artifact.places));
            }
            rows.push(row);
        }
        output::table(&rows)?;
        Ok(ExitCode::SUCCESS)
    })
}

/// The store, and the directories of tiers.
fn places(places: &[Place]) -> String {
    let name = |place: &Place| match place.tier {
        true => place.path.display().to_string(),
        false => "store".to_owned(),
    };
    match places {
        [] => "-".to_owned(),
        places => places.iter().map(name).collect::<Vec<_>>().join(" "),
    }
}
