use std::process::ExitCode;

use super::{Context, output, parse_reference};
use crate::{node::Progress, reference::Reference};

/// Indexes of images: with one beside it, an image can be mounted before it is pulled
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Push(PushArgs),
}

/// Push the indexes of an image's layers beside it, as an OCI referrer
///
/// Pulls and unpacks what this node has no index of. The image stays as it is. Every node that warms,
/// mounts or starts the image from then on finds the indexes, and reads the image lazily. What a first
/// lazy start on this node has read is pushed with them: then it is fetched before it is asked for.
#[derive(clap::Args)]
struct PushArgs {
    /// The image: oci://registry/repository:tag
    #[arg(value_name = "IMAGE", value_parser = parse_reference)]
    image: Reference,
    /// Print a JSON report
    #[arg(long)]
    json: bool,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    let Command::Push(args) = args.command;
    context.with_node(|node| async move {
        let progress = Progress::default();
        let name = args.image.to_string();
        let pushed =
            output::show(&name, &progress, node.push_indexes(&args.image, &progress)).await?;
        if args.json {
            output::json(&pushed)?;
        } else {
            output::line(format!(
                "pushed: {} ({} layers, {}, {:.2} % of the image's {}, {})",
                pushed.manifest,
                pushed.layers,
                output::size(pushed.bytes),
                pushed.bytes as f64 * 100.0 / (pushed.image_bytes.max(1)) as f64,
                output::size(pushed.image_bytes),
                match pushed.profiled_reads {
                    0 => "no start recorded".into(),
                    reads => format!("{reads} reads of a start"),
                },
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    })
}
