mod disk;

use std::{
    collections::HashSet,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde::Serialize;

use super::{Context, output, parse_reference, warm};
use crate::{
    digest::Digest,
    fetch::Engine,
    node::{Node, NodeError, Planned, Progress},
    reference::Reference,
    source::Sources,
    store::{self, Bake, ByteSize, Lock, Store, TierConfig},
};

/// Longest list or lock read by --from, in bytes.
const MAX_FROM: u64 = 256 << 20;
/// References that are asked for, or brought, at the same time.
const AT_ONCE: usize = 4;
/// How often it is looked how far a disk image is.
const LOOK: Duration = Duration::from_millis(250);
/// How often what an older tier had damaged is fetched instead.
const TRIES: usize = 3;

/// Bake content into a directory that nodes use as a read-only tier
///
/// Resolves, fetches and verifies everything into the directory DIR, in the format of the store, with a
/// hearth.lock that says what is in it. DIR is a tier only when all of it is there; a bake that was
/// interrupted goes on where it stopped. Refuses before the first byte what cannot fit. Nodes use
/// it by `[[tier]]`, `path = "DIR"` in their configuration.
#[derive(clap::Args)]
pub(super) struct Args {
    /// What to bake
    #[arg(value_name = "REF", value_parser = parse_reference, required_unless_present = "from")]
    references: Vec<Reference>,
    /// Read more references from a file, one a line (- for standard input, # for comments), or bake
    /// the content of a hearth.lock again
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Where: a new or empty directory, or one of a bake that did not finish; with --format a file
    #[arg(long, value_name = "DIR|FILE")]
    output: PathBuf,
    /// Take over what an older tier has: unchanged objects are linked, or copied to another disk
    #[arg(long, value_name = "OLD")]
    update: Option<PathBuf>,
    /// Make a disk image, sparse and to be mounted read-only; needs room for the content twice
    #[arg(long, value_enum)]
    format: Option<disk::Format>,
    /// How large the disk image is: auto (what it needs), or a size such as 200GiB
    #[arg(long, value_name = "SIZE", default_value = "auto", requires = "format")]
    size: disk::Size,
    /// Compress the content of the disk image (erofs only). Weights hardly get smaller
    #[arg(long, value_enum, default_value = "none", requires = "format")]
    compress: disk::Compress,
    /// Label of the disk image's file system, by which nodes can find it: `[[tier]]`, `label = "LABEL"`
    #[arg(long, default_value = "hearth", requires = "format")]
    label: String,
    /// Leave out what differs between two bakes of the same content: times and ids. Disk images: erofs only
    #[arg(long, conflicts_with = "update")]
    reproducible: bool,
    /// Only say what would be baked, and how large it is
    #[arg(long)]
    dry_run: bool,
    /// Print a JSON report
    #[arg(long)]
    json: bool,
}

/// What is to be baked.
struct Wanted {
    /// At this revision, where a lock says so.
    references: Vec<(Reference, Option<String>)>,
    lock: Option<Lock>,
}

/// What becomes of a directory that is baked.
struct Kind<'i> {
    reproducible: bool,
    /// Its content is needed twice.
    image: Option<&'i disk::Image>,
}

#[derive(Serialize)]
struct Plan {
    artifacts: Vec<Planned>,
    bytes: u64,
}

#[derive(Serialize)]
struct Report {
    path: PathBuf,
    artifacts: usize,
    objects: usize,
    bytes: u64,
    seconds: f64,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    let image = args.format.map(|format| disk::Image {
        format,
        size: args.size,
        compress: args.compress,
        label: args.label,
        reproducible: args.reproducible,
    });
    if let Some(image) = &image {
        image.check()?;
    }
    let wanted = wanted(args.references, args.from.as_deref())?;
    if args.dry_run {
        return dry_run(context, &wanted, args.json);
    }
    let started = std::time::Instant::now();
    let output = std::path::absolute(&args.output)?;
    let mut older = Vec::new();
    if let Some(path) = args.update {
        if path.is_file() {
            return Err(output::hinted(
                format!("--update {}: it is a file", path.display()),
                "mount the older disk image (mount -o loop,ro), and name the directory",
            ));
        }
        older.push(TierConfig::at(std::path::absolute(path)?));
    }
    let kind = Kind {
        reproducible: args.reproducible,
        image: image.as_ref(),
    };
    if image.is_none() && output.exists() && !output.is_dir() {
        return Err(output::hinted(
            format!("{} is there already, and is no directory", output.display()),
            "a disk image is made with --format, where nothing is yet",
        ));
    }
    let lock = match &image {
        None => bake(context, &output, &older, &wanted, &kind)?,
        Some(image) => {
            anyhow::ensure!(!output.exists(), "{} is there already", output.display());
            let staging = disk::staging(&output);
            let lock = match sealed(&staging, &wanted, args.reproducible)? {
                None => bake(context, &staging, &older, &wanted, &kind)?,
                Some(before) if wanted.lock.is_none() => {
                    still_so(context, &staging, &wanted, before)?
                }
                Some(before) => Ok(before),
            };
            match lock {
                Ok(lock) => make(context, image, staging, &output)?.map(|()| lock),
                interrupted => interrupted,
            }
        }
    };
    let lock = match lock {
        Ok(lock) => lock,
        Err(interrupted) => return Ok(interrupted),
    };
    let report = Report {
        path: output,
        artifacts: lock.artifacts.len(),
        objects: lock.objects.len(),
        bytes: lock.objects.values().sum(),
        seconds: started.elapsed().as_secs_f64(),
    };
    if args.json {
        output::json(&report)?;
    } else {
        output::line(format!(
            "baked: {} ({} references, {} objects, {}; {:.1} s)",
            report.path.display(),
            report.artifacts,
            report.objects,
            output::size(report.bytes),
            report.seconds,
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Bakes to a directory. The exit status where it was interrupted.
fn bake(
    context: &Context,
    root: &Path,
    older: &[TierConfig],
    wanted: &Wanted,
    kind: &Kind<'_>,
) -> anyhow::Result<Result<Lock, ExitCode>> {
    let config = store::Config {
        max_bytes: None,
        min_free: ByteSize(0),
        ..context.config.store.clone()
    };
    let bake = Bake::begin(root, &config, older).map_err(NodeError::from)?;
    let runtime = context.runtime()?;
    let brought = runtime.block_on(async {
        let engine = Engine::new(Arc::clone(bake.store()), context.config.fetch.clone());
        let node = Node::new(engine, Sources::new(context.config.source.clone()));
        tokio::select! {
            done = bring(&node, &bake, wanted, kind) => done.map(Ok),
            code = super::interrupted() => {
                output::note("interrupted: what has arrived is kept; run it again to go on");
                code.map(Err)
            }
        }
    });
    // Nobody has anything open any more when it is sealed.
    runtime.shutdown_timeout(Duration::from_secs(5));
    if let Err(interrupted) = brought? {
        return Ok(Err(interrupted));
    }
    let sealed = bake.seal(&wanted.names(), wanted.lock.as_ref(), kind.reproducible);
    Ok(Ok(sealed.map_err(NodeError::from)?))
}

/// Makes the disk image of a directory. The exit status where it was interrupted.
fn make(
    context: &Context,
    image: &disk::Image,
    staging: PathBuf,
    output: &Path,
) -> anyhow::Result<Result<(), ExitCode>> {
    output::note(&format!("making the disk image {}", output.display()));
    let bar = output::byte_bar("making", image.needs(&staging)?);
    let partial = disk::partial(output);
    let running = disk::Running::default();
    let (image, output, tool) = (image.clone(), output.to_owned(), running.clone());
    context.runtime()?.block_on(async {
        let mut making = tokio::task::spawn_blocking(move || image.make(&staging, &output, &tool));
        let mut interrupted = std::pin::pin!(super::interrupted());
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                made = &mut making => {
                    bar.finish_and_clear();
                    return made?.map(Ok);
                }
                code = &mut interrupted => {
                    running.stop();
                    bar.finish_and_clear();
                    // It takes away what is not whole; perhaps it was just done.
                    if making.await?.is_ok() {
                        return Ok(Ok(()));
                    }
                    output::note("interrupted: what has arrived is kept; run it again to go on");
                    return code.map(Err);
                }
                _ = look.tick() => {
                    let written = partial.metadata().map_or(0, |meta| meta.blocks() * 512);
                    bar.set_position(written);
                }
            }
        }
    })
}

/// The lock of a directory that was baked before, to become a disk image.
fn sealed(staging: &Path, wanted: &Wanted, reproducible: bool) -> anyhow::Result<Option<Lock>> {
    if !Bake::is_sealed(staging).map_err(NodeError::from)? {
        return Ok(None);
    }
    let text = warm::read_text(&staging.join("hearth.lock"), MAX_FROM)?;
    let lock = Lock::parse(&text).map_err(anyhow::Error::msg)?;
    let mut names = wanted.names();
    names.sort();
    let is_it = (lock.artifacts.iter().map(|a| &a.reference)).eq(&names)
        && wanted.lock.as_ref().is_none_or(|wanted| *wanted == lock);
    anyhow::ensure!(
        is_it,
        "{} holds something else: remove it",
        staging.display()
    );
    // Then its id is made of the lock.
    let identity = warm::read_text(&staging.join("hearth.json"), MAX_FROM)?;
    let id = &Digest::of(text.as_bytes()).hex()[..32];
    anyhow::ensure!(
        !reproducible || identity.contains(&format!("\"id\":\"{id}\"")),
        "{} was baked without --reproducible: remove it",
        staging.display()
    );
    Ok(Some(lock))
}

/// Fails where what was baked to become a disk image is something else at its origin by now. The exit status
/// where it was interrupted.
fn still_so(
    context: &Context,
    staging: &Path,
    wanted: &Wanted,
    lock: Lock,
) -> anyhow::Result<Result<Lock, ExitCode>> {
    let staging = staging.display();
    let mut now = None;
    let (asking, _scratch) = scratch(context)?;
    let answer = &mut now;
    let code = asking.with_node(|node| async move {
        *answer = Some(plan(&node, wanted).await);
        Ok(ExitCode::SUCCESS)
    })?;
    let now = match now {
        None => return Ok(Err(code)),
        Some(Ok(now)) => now,
        Some(Err(error)) => {
            output::note(&format!(
                "whether {staging} is what its references mean by now cannot be said: {error:#}"
            ));
            return Ok(Ok(lock));
        }
    };
    for planned in now {
        let before = (lock.artifacts.iter()).find(|locked| locked.reference == planned.reference);
        if let Some(before) = before
            && before.revision != planned.revision
        {
            let (reference, then, now) = (&before.reference, &before.revision, &planned.revision);
            return Err(output::hinted(
                format!("{staging} was baked when {reference} was {then:?}; it is {now:?} now"),
                format!(
                    "remove it to bake what it is now, or say --from {staging}/hearth.lock for what it was"
                ),
            ));
        }
    }
    Ok(Ok(lock))
}

impl Wanted {
    /// What a lock says of the index of an image.
    fn index(&self, reference: &Reference) -> Option<Digest> {
        let (lock, name) = (self.lock.as_ref()?, reference.to_string());
        let locked = lock.artifacts.iter().find(|a| a.reference == name)?;
        locked.index.as_ref()?.parse().ok()
    }

    fn names(&self) -> Vec<String> {
        let names = self.references.iter();
        names.map(|(reference, _)| reference.to_string()).collect()
    }
}

/// What the arguments ask for, each reference once.
fn wanted(references: Vec<Reference>, from: Option<&Path>) -> anyhow::Result<Wanted> {
    let given = !references.is_empty();
    let mut wanted = Wanted {
        references: references.into_iter().map(|r| (r, None)).collect(),
        lock: None,
    };
    if let Some(file) = from {
        let name = file.display().to_string();
        let text = warm::read_text(file, MAX_FROM)?;
        if Lock::is_lock(&text) {
            anyhow::ensure!(
                !given,
                "{name} says all that is baked: give no REF beside it"
            );
            let lock = Lock::parse(&text)
                .map_err(anyhow::Error::msg)
                .with_context(|| format!("{name} is no lock that can be used"))?;
            for artifact in &lock.artifacts {
                let reference = parse_reference(&artifact.reference)
                    .map_err(|why| anyhow::anyhow!("{name}: {why}"))?;
                let revision = Some(artifact.revision.clone());
                wanted.references.push((reference, revision));
            }
            wanted.lock = Some(lock);
        } else {
            let list = warm::parse_list(&name, &text)?;
            wanted
                .references
                .extend(list.into_iter().map(|r| (r, None)));
        }
    }
    let mut seen = HashSet::new();
    (wanted.references).retain(|(reference, _)| seen.insert(reference.to_string()));
    anyhow::ensure!(!wanted.references.is_empty(), "there is nothing to bake");
    Ok(wanted)
}

async fn plan(node: &Node, wanted: &Wanted) -> anyhow::Result<Vec<Planned>> {
    let asked = stream::iter(&wanted.references)
        .map(|(reference, revision)| node.plan(reference, revision.as_deref()))
        .buffered(AT_ONCE);
    Ok(asked.try_collect().await?)
}

/// A directory that is removed with all that is in it.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Self> {
        let dir = nix::unistd::mkdtemp(&std::env::temp_dir().join("hearth-bake-XXXXXX"));
        Ok(Self(dir.context("cannot make a temporary directory")?))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, dir = %self.0.display(), "could not remove a directory");
        }
    }
}

/// With a store of its own, as long as that is not dropped: who builds an image wants none in it.
fn scratch(context: &Context) -> anyhow::Result<(Context, Scratch)> {
    let scratch = Scratch::new()?;
    let mut config = context.config.clone();
    config.tiers.clear();
    let context = Context {
        root: std::path::absolute(&scratch.0)?,
        config,
        config_path: None,
        verbose: context.verbose,
    };
    Ok((context, scratch))
}

fn dry_run(context: &Context, wanted: &Wanted, json: bool) -> anyhow::Result<ExitCode> {
    let (context, _scratch) = scratch(context)?;
    context.with_node(|node| async move {
        let artifacts = plan(&node, wanted).await?;
        let bytes = artifacts.iter().map(|planned| planned.bytes).sum();
        let plan = Plan { artifacts, bytes };
        if json {
            output::json(&plan)?;
            return Ok(ExitCode::SUCCESS);
        }
        let headings = ["SIZE", "FILES", "REVISION", "REFERENCE"];
        let mut rows = vec![headings.map(String::from).to_vec()];
        for planned in plan.artifacts {
            let files = planned.files.map(|files| files.to_string());
            rows.push(vec![
                output::size(planned.bytes),
                files.unwrap_or_else(|| "in layers".into()),
                planned.revision,
                planned.reference,
            ]);
        }
        output::table(&rows)?;
        output::line(format!(
            "{} in all; layers take about three times as much unpacked",
            output::size(plan.bytes)
        ))?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Brings everything into the store of the bake.
async fn bring(node: &Node, bake: &Bake, wanted: &Wanted, kind: &Kind<'_>) -> anyhow::Result<()> {
    let planned = plan(node, wanted).await?;
    let mut room = tokio::task::block_in_place(|| node.reserve(&planned))?;
    let reserve = |what: &str, bytes| {
        let reserved = bake.store().admit_bytes(what, bytes);
        reserved.map_err(NodeError::from)
    };
    let copied = tokio::task::block_in_place(|| copied(bake, &planned))?;
    if copied > 0 {
        room.push(reserve("what is copied from the older tier", copied)?);
    }
    if let Some(image) = kind.image {
        image.admit(Planned::at_least(&planned))?;
        room.push(reserve("the disk image", Planned::space(&planned))?);
    }
    // It all fits. Each of them reserves for itself now.
    drop(room);
    stream::iter(Planned::related(&planned))
        .map(|related| async move {
            for at in related {
                let (reference, revision) = &wanted.references[at];
                bring_one(node, bake.store(), bake, reference, revision.as_deref()).await?;
                if let Some(index) = wanted.index(reference) {
                    node.note_index(reference, index).await?;
                }
            }
            Ok(())
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

/// Bytes that are to be copied from older tiers, since they lie on another disk: at most, usually.
fn copied(bake: &Bake, planned: &[Planned]) -> Result<u64, NodeError> {
    let mut artifacts = Vec::new();
    let mut layers = 0u64;
    let mut seen = HashSet::new();
    for planned in planned {
        if let Some(artifact) = planned.recorded(bake.store())? {
            artifacts.push(artifact);
        } else {
            let known = planned.unpacked(bake.store(), true, &mut seen)?;
            layers = layers.saturating_add(known);
        }
    }
    Ok(bake.copies(&artifacts, layers)?)
}

async fn bring_one(
    node: &Node,
    store: &Arc<Store>,
    bake: &Bake,
    reference: &Reference,
    revision: Option<&str>,
) -> anyhow::Result<()> {
    let name = reference.to_string();
    let progress = Progress::default();
    for _ in 0..TRIES {
        // What is baked is not evicted for what follows.
        let warm = node.warm_at(reference, revision, Some(store.id()), &progress);
        output::show(&name, &progress, warm).await?;
        let taken = tokio::task::block_in_place(|| bake.take_over(&name));
        if taken.map_err(NodeError::from)? {
            return Ok(());
        }
    }
    anyhow::bail!("{name} could not be taken over from the older tier, nor fetched")
}
