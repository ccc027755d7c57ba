use std::process::ExitCode;

use super::{Context, output};

/// List what the store knows, and how much of it is here
#[derive(clap::Args)]
pub(super) struct Args {
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
        for artifact in all {
            let here = match artifact.complete {
                true => "warm".into(),
                false => format!(
                    "{} %",
                    output::percent(artifact.present_bytes, artifact.bytes)
                ),
            };
            rows.push(vec![
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
            ]);
        }
        output::table(&rows)?;
        Ok(ExitCode::SUCCESS)
    })
}
