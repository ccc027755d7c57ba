use std::{
    io::Read as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use futures_util::{StreamExt as _, stream};

use super::{Context, PlatformArg, output, parse_reference};
use crate::{
    node::{Node, Progress, WarmReport},
    reference::Reference,
};

/// References warmed at the same time; their objects share one engine.
const AT_ONCE: usize = 4;
/// Longest list read by --from, in bytes.
const MAX_LIST: u64 = 16 << 20;

/// Bring content onto this node, verified, ahead of whoever needs it
///
/// Goes on where an earlier run stopped. Refuses before the first byte what cannot fit.
#[derive(clap::Args)]
pub(super) struct Args {
    /// What to warm
    #[arg(value_name = "REF", value_parser = parse_reference, required_unless_present = "from")]
    references: Vec<Reference>,
    /// Read more references from a file, one a line; - for standard input, # for comments
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    #[command(flatten)]
    platform: PlatformArg,
    /// Keep it from eviction until `hearth unpin`
    #[arg(long)]
    pin: bool,
    /// Print a JSON report
    #[arg(long)]
    json: bool,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    let mut references = args.references;
    if let Some(file) = &args.from {
        references.extend(read_list(file)?);
    }
    let references = references.into_iter().map(|r| args.platform.of(r));
    let references = references.collect::<anyhow::Result<Vec<_>>>()?;
    let pin = args.pin.then_some(super::pin::OWNER);
    context.with_node(|node| async move {
        let node = &node;
        let mut results: Vec<_> = stream::iter(references.into_iter().enumerate())
            .map(|(index, reference)| async move {
                (index, warm(node, &reference, pin, args.json).await)
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        results.sort_by_key(|(index, _)| *index);
        let mut reports = Vec::new();
        let mut failed = false;
        for (_, result) in results {
            match result {
                Ok(report) => reports.push(report),
                Err(error) => {
                    output::error(&error);
                    failed = true;
                }
            }
        }
        if args.json {
            output::json(&reports)?;
        }
        Ok(if failed {
            ExitCode::from(1)
        } else {
            ExitCode::SUCCESS
        })
    })
}

async fn warm(
    node: &Node,
    reference: &Reference,
    pin: Option<&str>,
    quiet: bool,
) -> anyhow::Result<WarmReport> {
    let progress = Progress::default();
    let name = reference.to_string();
    let report = output::show(&name, &progress, node.warm(reference, pin, &progress)).await?;
    if !quiet {
        let new = report.bytes.saturating_sub(report.bytes_before);
        let rate = (new as f64 / report.seconds.max(0.001)) as u64;
        output::line(format!(
            "warm: {} ({} files, {}; {} new in {:.1} s, {}/s)",
            report.reference,
            report.files,
            output::size(report.bytes),
            output::size(new),
            report.seconds,
            output::size(rate),
        ))?;
    }
    Ok(report)
}

fn read_list(file: &Path) -> anyhow::Result<Vec<Reference>> {
    parse_list(&file.display().to_string(), &read_text(file, MAX_LIST)?)
}

/// Reads a text of up to `limit` bytes; `-` is standard input.
pub(super) fn read_text(file: &Path, limit: u64) -> anyhow::Result<String> {
    let name = file.display();
    let mut input: Box<dyn std::io::Read> = if file == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(std::fs::File::open(file).with_context(|| format!("cannot read {name}"))?)
    };
    let mut text = String::new();
    input
        .by_ref()
        .take(limit + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {name}"))?;
    anyhow::ensure!(
        text.len() as u64 <= limit,
        "{name} is longer than {}",
        output::size(limit)
    );
    Ok(text)
}

/// The references of a list, one a line.
pub(super) fn parse_list(name: &str, text: &str) -> anyhow::Result<Vec<Reference>> {
    let mut references = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let reference =
            parse_reference(line).map_err(|e| anyhow::anyhow!("{name}:{}: {e}", number + 1))?;
        references.push(reference);
    }
    Ok(references)
}
