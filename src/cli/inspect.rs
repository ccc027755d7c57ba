use std::process::ExitCode;

use serde::Serialize;

use super::{Context, output, parse_reference};
use crate::{reference::Reference, tree::Artifact};

/// Show the files of a reference, their sizes and digests; fetches no content
#[derive(clap::Args)]
pub(super) struct Args {
    /// What to look at
    #[arg(value_name = "REF", value_parser = parse_reference)]
    reference: Reference,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    reference: String,
    kind: &'static str,
    revision: String,
    digest: String,
    bytes: u64,
    files: Vec<File>,
}

#[derive(Serialize)]
struct File {
    path: String,
    bytes: u64,
    /// Content digest, where the origin names it.
    digest: Option<String>,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    context.with_node(|node| async move {
        let artifact = node.inspect(&args.reference).await?;
        let report = report(&args.reference, &artifact);
        if args.json {
            output::json(&report)?;
            return Ok(ExitCode::SUCCESS);
        }
        output::line(format!("{} ({})", report.reference, report.kind))?;
        if !report.revision.is_empty() {
            output::line(format!("revision {}", report.revision))?;
        }
        output::line(format!(
            "{} files, {}",
            report.files.len(),
            output::size(report.bytes)
        ))?;
        let mut rows = vec![vec!["SIZE".into(), "DIGEST".into(), "PATH".into()]];
        for file in report.files {
            let digest = file.digest.unwrap_or_else(|| "-".into());
            rows.push(vec![output::size(file.bytes), digest, file.path]);
        }
        output::table(&rows)?;
        Ok(ExitCode::SUCCESS)
    })
}

fn report(reference: &Reference, artifact: &Artifact) -> Report {
    let files = artifact
        .tree
        .files()
        .into_iter()
        .map(|(path, _, object)| {
            let object = &artifact.objects[object as usize];
            let git = object
                .git_sha1
                .map(|h| format!("git:{}", crate::digest::to_hex(&h)));
            File {
                path,
                bytes: object.size,
                digest: object.id.sha256().map(|d| d.to_string()).or(git),
            }
        })
        .collect();
    Report {
        reference: artifact.reference.clone(),
        kind: reference.locator.kind(),
        revision: artifact.revision.clone(),
        digest: artifact.digest().to_string(),
        bytes: artifact.size(),
        files,
    }
}
