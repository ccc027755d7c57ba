use std::{
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{
    Context,
    control::{self, MountStatus},
    output,
};
use crate::{
    daemon,
    kube::coldstart::ColdStart,
    mount::keeper::Link,
    node::{ArtifactStatus, FileStatus},
    reference::Reference,
    store::TierStatus,
};

/// How long to wait for a server that is being started again.
const PATIENCE: Duration = Duration::from_secs(5);

/// Show the store, or what of a reference is here, or how a mount does
#[derive(clap::Args)]
pub(super) struct Args {
    /// A reference that was warmed or mounted, or the directory of a mount
    #[arg(value_name = "REF|DIR")]
    what: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct StoreStatus {
    root: String,
    used_bytes: u64,
    free_bytes: u64,
    artifacts: usize,
    tiers: Vec<TierStatus>,
    mounts: Vec<String>,
    /// Of pods, the newest last.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    starts: Vec<ColdStart>,
}

#[derive(Serialize)]
struct ReferenceStatus {
    #[serde(flatten)]
    artifact: ArtifactStatus,
    #[serde(rename = "file")]
    files: Vec<FileStatus>,
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    match args.what {
        None => store(context, args.json),
        Some(text) if text.contains("://") => {
            let reference = super::parse_reference(&text).map_err(anyhow::Error::msg)?;
            artifact(context, &reference, args.json)
        }
        Some(dir) => mount(context, &dir, args.json),
    }
}

fn store(context: &Context, json: bool) -> anyhow::Result<ExitCode> {
    let store = context.store()?;
    let usage = store.usage().map_err(crate::node::NodeError::from)?;
    let status = StoreStatus {
        root: store.root().display().to_string(),
        used_bytes: usage.bytes(),
        free_bytes: store.free_bytes().map_err(crate::node::NodeError::from)?,
        artifacts: store.records().map_err(crate::node::NodeError::from)?.len(),
        tiers: store.tiers(),
        mounts: crate::mount::mounted()?
            .into_iter()
            .filter(|m| control::is_ours(&context.root, &m.mountpoint))
            .map(|m| m.mountpoint.display().to_string())
            .collect(),
        starts: daemon::starts(&context.root),
    };
    if json {
        output::json(&status)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(format!(
        "store {}: {} used, {} free, {} artifacts",
        status.root,
        output::size(status.used_bytes),
        output::size(status.free_bytes),
        status.artifacts
    ))?;
    for tier in status.tiers {
        output::line(match tier.problem {
            None => format!(
                "tier {}: in use{}{}",
                tier.path.display(),
                match (tier.verified_at, tier.unreadable) {
                    (Some(_), _) => ", verified".to_owned(),
                    (None, 0) => String::new(),
                    (None, some) => format!(", {some} objects could not be read"),
                },
                match tier.distrusted {
                    0 => String::new(),
                    damaged => format!(", {damaged} damaged objects are not read there"),
                }
            ),
            Some(why) => format!("tier {}: not used: {why}", tier.path.display()),
        })?;
    }
    for mount in status.mounts {
        output::line(format!("mounted on {mount}"))?;
    }
    for start in status.starts {
        output::line(format!("pod {}/{}: {start}", start.namespace, start.pod))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn artifact(context: &Context, reference: &Reference, json: bool) -> anyhow::Result<ExitCode> {
    let name = reference.to_string();
    context.with_node(|node| async move {
        let (artifact, files) = tokio::task::spawn_blocking(move || node.status(&name)).await??;
        if json {
            output::json(&ReferenceStatus { artifact, files })?;
            return Ok(ExitCode::SUCCESS);
        }
        output::line(&artifact.reference)?;
        output::line(format!(
            "{} of {} ({} %), {}",
            output::size(artifact.present_bytes),
            output::size(artifact.bytes),
            output::percent(artifact.present_bytes, artifact.bytes),
            state(
                artifact.complete,
                artifact.verified,
                artifact.present_bytes == artifact.bytes
            ),
        ))?;
        output::line(format!("artifact {}", artifact.digest))?;
        if !artifact.revision.is_empty() {
            output::line(format!("revision {}", artifact.revision))?;
        }
        // That everything is in the store goes without saying.
        let on_tiers = artifact.places.iter().any(|place| place.tier);
        for place in artifact.places.iter().filter(|_| on_tiers) {
            let kind = if place.tier { "tier" } else { "store" };
            let path = place.path.display();
            output::line(format!("{} in {kind} {path}", output::size(place.bytes)))?;
        }
        if !artifact.pins.is_empty() {
            output::line(format!("pinned by {}", artifact.pins.join(", ")))?;
        }
        let mut rows = vec![
            ["HERE", "SIZE", "OBJECT", "PATH"]
                .map(String::from)
                .to_vec(),
        ];
        for file in files {
            let here = match file.complete {
                true => "yes".into(),
                false => format!(
                    "{} %",
                    output::percent(file.present_bytes, file.bytes).min(99)
                ),
            };
            rows.push(vec![here, output::size(file.bytes), file.object, file.path]);
        }
        output::table(&rows)?;
        Ok(ExitCode::SUCCESS)
    })
}

const fn state(complete: bool, verified: bool, is_all_here: bool) -> &'static str {
    match (complete, verified) {
        (true, true) => "complete and verified",
        (true, false) => "complete, on a tier that this node has not verified",
        (false, _) if is_all_here => "not verified yet",
        (false, _) => "not complete",
    }
}

fn mount(context: &Context, dir: &str, json: bool) -> anyhow::Result<ExitCode> {
    let Some(path) = crate::mount::find(Path::new(dir))? else {
        return Err(output::hinted(
            format!("nothing of hearth is mounted on {dir}"),
            "a reference has ://; `hearth status` shows what is mounted",
        ));
    };
    let status = ask(context, dir, &path)?;
    if json {
        output::json(&status)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(format!(
        "{} on {} ({} layout, process {})",
        status.reference,
        status.mountpoint.display(),
        status.layout,
        status.pid
    ))?;
    match (status.keeper_pid, status.restarts) {
        (None, _) => {}
        (Some(keeper), 0) => output::line(format!("kept by process {keeper}"))?,
        (Some(keeper), times) => output::line(format!(
            "kept by process {keeper}, which has started its server again ({times})"
        ))?,
    }
    output::line(format!(
        "{} of {} here ({} %), {}",
        output::size(status.present_bytes),
        output::size(status.total_bytes),
        output::percent(status.present_bytes, status.total_bytes),
        state(
            status.complete,
            status.verified,
            status.present_bytes == status.total_bytes
        ),
    ))?;
    output::line(format!(
        "{} opens, {} of them without FUSE on the read path; {} reads answered ({})",
        status.mount.opens,
        status.mount.passthrough_opens,
        status.mount.reads,
        output::size(status.mount.read_bytes),
    ))?;
    if let Some(log) = status.log {
        output::line(format!("log: {}", log.display()))?;
    }
    if let Some(error) = status.error {
        let does = if status.waits { "waits" } else { "stopped" };
        output::line(format!("the background fetch {does}: {error}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks the process that serves a mount; waits for it where it is being started again.
fn ask(context: &Context, dir: &str, path: &Path) -> anyhow::Result<MountStatus> {
    let begun = Instant::now();
    let keeper = control::keeper_path(&context.root, path);
    loop {
        if let Some(status) = control::ask(&context.root, path)? {
            return Ok(status);
        }
        let kept = Link::connect(&keeper);
        match kept {
            Ok(_) if begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(50)),
            Ok(kept) => {
                let log = control::log_path(&context.root, path);
                return Err(output::hinted(
                    format!(
                        "{dir} is mounted, but its server does not come back; process {} goes on starting it",
                        kept.keeper().unwrap_or_default()
                    ),
                    format!(
                        "{} says why; `hearth umount --force DIR` gives it up",
                        log.display()
                    ),
                ));
            }
            Err(_) => {
                return Err(output::hinted(
                    format!(
                        "{dir} is mounted, but no process of the store {} serves it",
                        context.root.display()
                    ),
                    "`hearth umount DIR` removes it if that process was killed; for another store say --store",
                ));
            }
        }
    }
}
