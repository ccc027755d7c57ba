use std::{process::ExitCode, sync::Arc};

use super::{Context, output, parse_reference};
use crate::{
    node::{NodeError, Progress},
    reference::Reference,
    store::{Damage, VerifyScope},
};

/// Read everything again and compare it with its digests
///
/// Exit status 1 where something was damaged and is not repaired.
#[derive(clap::Args)]
pub(super) struct Args {
    /// What to verify
    #[arg(value_name = "REF", value_parser = parse_reference, required_unless_present = "all")]
    references: Vec<Reference>,
    /// Everything in the store
    #[arg(long, conflicts_with = "references")]
    all: bool,
    /// Remove what is damaged and fetch it again
    #[arg(long)]
    repair: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    context.with_node(|node| async move {
        let names: Vec<String> = args.references.iter().map(ToString::to_string).collect();
        let store = Arc::clone(node.store());
        for name in &names {
            if !store.has_record(name).map_err(NodeError::from)? {
                return Err(NodeError::Unknown(name.clone()).into());
            }
        }
        let bar = output::byte_bar("verifying", 0);
        let shown = bar.clone();
        let repair = args.repair;
        let report = tokio::task::spawn_blocking(move || {
            let scope = match args.all {
                true => VerifyScope::All,
                false => VerifyScope::References(&names),
            };
            store.verify(scope, repair, |progress| {
                shown.set_length(progress.total);
                shown.inc(progress.bytes);
                true
            })
        })
        .await?
        .map_err(NodeError::from)?;
        bar.finish_and_clear();
        let mut good = report.damaged.is_empty() && report.missing.is_empty();
        if repair && !good {
            // What was damaged is gone now: fetch it as any other missing content.
            good = report.damaged.iter().all(Damage::is_mended);
            let references: std::collections::BTreeSet<_> = report
                .damaged
                .iter()
                .flat_map(|d| &d.references)
                .chain(&report.missing)
                .collect();
            for reference in references {
                // As it was given: its name does not have its secret.
                let given = args.references.iter().find(|r| r.to_string() == *reference);
                let reference: Reference = match given {
                    Some(given) => given.clone(),
                    None => reference.parse()?,
                };
                let progress = Progress::default();
                let name = reference.to_string();
                let warm = node.warm(&reference, None, &progress);
                if let Err(error) = output::show(&name, &progress, warm).await {
                    output::error(&error.into());
                    good = false;
                }
            }
        }
        if args.json {
            output::json(&report)?;
        } else {
            for damage in &report.damaged {
                let note = match (damage.tier, damage.distrusted) {
                    (true, true) => "; it is on a tier, and not used any more",
                    (true, false) => "; it is on a tier",
                    (false, _) => "",
                };
                output::line(format!(
                    "damaged: {} ({}{note})",
                    damage.path.display(),
                    damage.what
                ))?;
                for reference in &damage.references {
                    output::line(format!("  part of {reference}"))?;
                }
            }
            for reference in &report.missing {
                output::line(format!("not all here: {reference}"))?;
            }
            output::line(format!(
                "{} objects, {} read; {} damaged{}",
                report.objects,
                output::size(report.bytes),
                report.damaged.len(),
                if repair && good && !report.damaged.is_empty() {
                    ", repaired"
                } else {
                    ""
                },
            ))?;
        }
        Ok(if good {
            ExitCode::SUCCESS
        } else {
            ExitCode::from(1)
        })
    })
}
