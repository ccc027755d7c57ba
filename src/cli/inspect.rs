use std::process::ExitCode;

use serde::Serialize;

use super::{Context, PlatformArg, output, parse_reference};
use crate::{node::Meaning, reference::Reference, source::Layered, tree::Artifact};

/// Show the files of a reference, or the layers of a container image; fetches no content
#[derive(clap::Args)]
pub(super) struct Args {
    /// What to look at
    #[arg(value_name = "REF", value_parser = parse_reference)]
    reference: Reference,
    #[command(flatten)]
    platform: PlatformArg,
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

/// What is said of a container image: its files are known only once its layers are unpacked.
#[derive(Serialize)]
struct Image {
    reference: String,
    kind: &'static str,
    platform: Option<String>,
    manifest: String,
    config: String,
    bytes: u64,
    layers: Vec<Layer>,
}

#[derive(Serialize)]
struct Layer {
    digest: String,
    bytes: u64,
    media_type: String,
    diff_id: Option<String>,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    let reference = args.platform.of(args.reference)?;
    context.with_node(|node| async move {
        let artifact = match node.inspect(&reference).await? {
            Meaning::Files(artifact) => artifact,
            Meaning::Layers(layered) => {
                let image = image(layered);
                match args.json {
                    true => output::json(&image)?,
                    false => print_image(image)?,
                }
                return Ok(ExitCode::SUCCESS);
            }
        };
        let report = report(&reference, &artifact);
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

fn image(layered: Layered) -> Image {
    let layers = layered.layers.into_iter().map(|layer| Layer {
        digest: layer.blob.to_string(),
        bytes: layer.size,
        media_type: layer.media_type,
        diff_id: layer.diff_id.map(|digest| digest.to_string()),
    });
    let layers: Vec<Layer> = layers.collect();
    Image {
        reference: layered.reference,
        kind: "image",
        platform: layered.platform.map(|platform| platform.to_string()),
        manifest: layered.manifest.to_string(),
        config: layered.config.to_string(),
        bytes: layers
            .iter()
            .fold(0, |sum, layer| sum.saturating_add(layer.bytes)),
        layers,
    }
}

fn print_image(image: Image) -> std::io::Result<()> {
    output::line(format!("{} ({})", image.reference, image.kind))?;
    if let Some(platform) = &image.platform {
        output::line(format!("platform {platform}"))?;
    }
    output::line(format!("manifest {}", image.manifest))?;
    let (layers, size) = (image.layers.len(), output::size(image.bytes));
    output::line(format!("{layers} layers, {size} compressed"))?;
    let mut rows = vec![vec!["SIZE".into(), "DIGEST".into(), "MEDIA TYPE".into()]];
    for layer in image.layers {
        rows.push(vec![
            output::size(layer.bytes),
            layer.digest,
            layer.media_type,
        ]);
    }
    output::table(&rows)
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
