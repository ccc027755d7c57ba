use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::{Context, output};
use crate::{
    config::Config,
    fetch::Engine,
    node::{Node, Progress},
    reference::Reference,
    source::{self, Sources},
    store::Store,
};

mod loader;
mod model;
mod origin;

/// Show what hearth does: eager download, cold mount and warm mount, side by side
///
/// Makes a safetensors model, serves it from an origin inside this process over a throttled link,
/// and loads it three ways. Needs FUSE (as root, or fusermount3), no network and no other program;
/// leaves nothing behind.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Size of the model, in MiB
    #[arg(long, default_value_t = 384, value_parser = clap::value_parser!(u32).range(8..=65536))]
    size: u32,
    /// Speed of the link, in Mbit/s
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    mbit: u32,
    /// Time that the origin takes to answer, in milliseconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    latency: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Loads the safetensors files below a directory and prints timings: what a pod would do
#[derive(clap::Args)]
pub(super) struct LoadArgs {
    dir: PathBuf,
}

/// Times of one way to load the model, from the moment the pod wants it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Row {
    way: String,
    first_tensor_seconds: f64,
    whole_model_seconds: f64,
}

/// What the loader, a process of its own, reports.
#[derive(Debug, Serialize, Deserialize)]
struct Loaded {
    first_tensor_seconds: f64,
    whole_model_seconds: f64,
    bytes: u64,
    checksum: u64,
}

pub(super) fn load(args: &LoadArgs) -> anyhow::Result<ExitCode> {
    output::json(&loader::load(&args.dir)?)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    crate::mount::available().context("the demo mounts a model, which needs FUSE")?;
    let runtime = context.runtime()?;
    let done = runtime.block_on(async {
        tokio::select! {
            done = demo(&args) => done.map(Ok),
            code = super::interrupted() => code.map(Err),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(2));
    let rows = match done? {
        Ok(rows) => rows,
        Err(interrupted) => return Ok(interrupted),
    };
    if args.json {
        output::json(&rows)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line("")?;
    output::line(format!(
        "{} MiB model over {} Mbit/s, {} ms to answer; seconds from asking to",
        args.size, args.mbit, args.latency
    ))?;
    let mut table = vec![vec![
        String::new(),
        "FIRST TENSOR".into(),
        "WHOLE MODEL".into(),
    ]];
    for row in &rows {
        table.push(vec![
            row.way.clone(),
            format!("{:.3}", row.first_tensor_seconds),
            format!("{:.3}", row.whole_model_seconds),
        ]);
    }
    output::table(&table)?;
    Ok(ExitCode::SUCCESS)
}

async fn demo(args: &Args) -> anyhow::Result<Vec<Row>> {
    let home = Scratch::new()?;
    let model_dir = home.path().join("origin/model");
    std::fs::create_dir_all(&model_dir)?;
    output::note(&format!("making a model of {} MiB", args.size));
    let (dir, size) = (model_dir.clone(), u64::from(args.size) << 20);
    tokio::task::spawn_blocking(move || model::write(&dir, size)).await??;
    let origin = origin::Origin::start(
        &home.path().join("origin"),
        u64::from(args.mbit) * 125_000,
        Duration::from_millis(args.latency.into()),
    )
    .await?;
    let url = format!("http://{}/model/", origin.address());

    let eager = eager(&url, &model_dir, &home.path().join("download")).await?;
    let reference: Reference = url.parse()?;
    let (cold, warm) = mounts(&home, &reference).await?;
    anyhow::ensure!(
        eager.1.checksum == cold.1.checksum && cold.1.checksum == warm.1.checksum,
        "the three ways read different bytes"
    );
    let row = |way: &str, before: f64, loaded: &Loaded| Row {
        way: way.into(),
        first_tensor_seconds: before + loaded.first_tensor_seconds,
        whole_model_seconds: before + loaded.whole_model_seconds,
    };
    Ok(vec![
        row("eager: download, then load", eager.0, &eager.1),
        row("hearth mount, nothing here yet", cold.0, &cold.1),
        row("hearth mount, warm", warm.0, &warm.1),
    ])
}

/// Downloads every file, one connection each, then loads: what init containers do today.
async fn eager(url: &str, files: &Path, to: &Path) -> anyhow::Result<(f64, Loaded)> {
    output::note("1/3  download everything, then load it");
    std::fs::create_dir_all(to)?;
    crate::source::install_tls();
    let client = reqwest::Client::builder().no_proxy().build()?;
    let bar = output::byte_bar("downloading", directory_size(files)?);
    let started = Instant::now();
    let mut downloads = tokio::task::JoinSet::new();
    for entry in std::fs::read_dir(files)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let (client, bar) = (client.clone(), bar.clone());
        let (url, path) = (format!("{url}{name}"), to.join(&name));
        downloads.spawn(async move {
            let mut answer = client.get(url).send().await?.error_for_status()?;
            let mut file = tokio::fs::File::create(path).await?;
            while let Some(data) = answer.chunk().await? {
                tokio::io::AsyncWriteExt::write_all(&mut file, &data).await?;
                bar.inc(data.len() as u64);
            }
            tokio::io::AsyncWriteExt::flush(&mut file).await?;
            anyhow::Ok(())
        });
    }
    while let Some(done) = downloads.join_next().await {
        done??;
    }
    let seconds = started.elapsed().as_secs_f64();
    bar.finish_and_clear();
    Ok((seconds, load_in_child(to).await?))
}

type Timed = (f64, Loaded);

/// Loads through a mount of an empty store, and again once all is here.
async fn mounts(home: &Scratch, reference: &Reference) -> anyhow::Result<(Timed, Timed)> {
    // Nothing of this machine's: the demo is the same everywhere.
    let config = &Config::default();
    let source = source::Config {
        no_proxy: true,
        ..config.source.clone()
    };
    let open_node = || -> anyhow::Result<Node> {
        let store = Store::open(&home.path().join("store"), &config.store)?;
        let engine = Engine::new(store, config.fetch.clone());
        Ok(Node::new(engine, Sources::new(source.clone())))
    };
    let dir = home.path().join("mount");
    std::fs::create_dir_all(&dir)?;

    output::note("2/3  mount with hearth while nothing is here, load at once");
    let progress = Arc::new(Progress::default());
    let watched = Arc::clone(&progress);
    let node = open_node()?;
    let cold = output::show("arriving", &watched, async {
        let started = Instant::now();
        let view = super::mount::Mounted::new(&node, reference, &dir, config, progress).await?;
        let mounted = started.elapsed().as_secs_f64();
        let loaded = load_in_child(&dir).await?;
        view.close().await?;
        anyhow::Ok((mounted, loaded))
    })
    .await?;
    let complete = node.warm(reference, None, &Progress::default()).await?;
    tracing::debug!(?complete, "verified");
    drop(node);

    output::note("3/3  mount with hearth on a warm node, load");
    let node = open_node()?;
    let started = Instant::now();
    let view = super::mount::Mounted::new(&node, reference, &dir, config, Arc::default()).await?;
    let mounted = started.elapsed().as_secs_f64();
    let loaded = load_in_child(&dir).await?;
    view.close().await?;
    Ok((cold, (mounted, loaded)))
}

/// Loads in a process of its own: the server of a mount never touches it.
async fn load_in_child(dir: &Path) -> anyhow::Result<Loaded> {
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command
        .arg("demo-load")
        .arg(dir)
        .stderr(std::process::Stdio::inherit());
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    anyhow::ensure!(
        output.status.success(),
        "the loader failed: {}",
        output.status
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn directory_size(dir: &Path) -> std::io::Result<u64> {
    std::fs::read_dir(dir)?.try_fold(0, |sum, entry| Ok(sum + entry?.metadata()?.len()))
}

/// A directory that is removed at the end, whatever happens.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(format!("hearth-demo-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A mount that is left is detached first, so that nothing is removed through it.
        let _ = crate::mount::unmount(&self.0.join("mount"), true);
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, path = %self.0.display(), "could not be removed");
        }
    }
}
