use std::{
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::Arc,
};

use anyhow::Context as _;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{
    Context,
    control::{self, ControlServer, MountStatus},
    output, parse_reference,
};
use crate::{
    config::Config,
    fs::{Fetched, View, hub},
    metrics,
    mount::Mount,
    node::{Node, Progress, Resolved, Start},
    reference::{Locator, Reference},
    store::Hold,
};

/// Mount a reference, readable at once, while its content is still arriving
///
/// Returns when it is mounted; a process in the background serves it until `hearth umount DIR`, and
/// logs where `hearth status DIR` says.
/// Reads of what has not arrived wait for it and go before everything else.
#[derive(clap::Args)]
pub(super) struct Args {
    /// What to mount
    #[arg(value_name = "REF", value_parser = parse_reference)]
    reference: Reference,
    /// Where: an existing directory
    dir: PathBuf,
    /// How files are laid out: as at the origin, or as in the cache of huggingface_hub (for
    /// HF_HUB_CACHE=DIR HF_HUB_OFFLINE=1)
    #[arg(long, value_enum, default_value = "tree")]
    layout: LayoutArg,
    /// Fetch only what is read, instead of everything in the background
    #[arg(long)]
    no_fill: bool,
    /// Serve from this process until it is unmounted or interrupted
    #[arg(long)]
    foreground: bool,
    /// Tell the parent on stdout when it is mounted
    #[arg(long, hide = true, requires = "foreground")]
    tell_parent: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum LayoutArg {
    Tree,
    Hub,
}

impl LayoutArg {
    const fn name(self) -> &'static str {
        match self {
            Self::Tree => "tree",
            Self::Hub => "hub",
        }
    }
}

/// How long the background fetch leaves the origin, and the connections that stand, to whoever opens
/// the first file.
const HEAD_START: std::time::Duration = std::time::Duration::from_millis(100);

/// What the background process tells the command that started it.
#[derive(Serialize, Deserialize)]
enum Word {
    Mounted,
    Failed(String),
}

pub(super) fn run(context: &Context, args: Args) -> anyhow::Result<ExitCode> {
    crate::mount::available()?;
    if matches!(args.layout, LayoutArg::Hub) {
        anyhow::ensure!(
            matches!(args.reference.locator, Locator::Hub(_)),
            "--layout hub is for hf:// references, {} is none",
            args.reference
        );
    }
    if !args.foreground {
        let dir = crate::mount::check(&args.dir)?;
        return start(context, &args, &dir);
    }
    if args.tell_parent {
        // The terminal's signals are not for a process in the background.
        nix::unistd::setsid().context("cannot leave the session")?;
    }
    let result = serve(context, &args);
    if !args.tell_parent {
        return result;
    }
    control::remove_empty_log(&context.root, &args.dir);
    result.or_else(|error| {
        // A parent that is gone needs no answer.
        let _ = tell(&Word::Failed(output::describe(&error)));
        Ok(ExitCode::from(1))
    })
}

/// Starts a process in the background and waits until it has mounted.
fn start(context: &Context, args: &Args, dir: &Path) -> anyhow::Result<ExitCode> {
    let writable = context.store()?.writable(); // fail here rather than there
    let log_path = control::log_path(&context.root, dir);
    let log: Stdio = match writable {
        true => crate::store::run_dir(&context.root)
            .and_then(|_| std::fs::File::create(&log_path))
            .with_context(|| format!("cannot write {}", log_path.display()))?
            .into(),
        // A store that cannot be written serves what it has, and keeps no log.
        false => Stdio::null(),
    };
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--store").arg(&context.root);
    if let Some(config) = &context.config_path {
        command.arg("--config").arg(std::path::absolute(config)?);
    }
    for _ in 0..context.verbose {
        command.arg("--verbose");
    }
    command.args([
        "mount",
        "--foreground",
        "--tell-parent",
        "--layout",
        args.layout.name(),
    ]);
    if args.no_fill {
        command.arg("--no-fill");
    }
    // With the secrets that the canonical form leaves out, but never where others can read them.
    command.arg("--").arg(args.reference.to_string()).arg(dir);
    if let Some(secret) = args.reference.secret() {
        command.env(SECRET_VARIABLE, secret);
    }
    command
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log);
    keep_no_files(&mut command);
    let mut child = command
        .spawn()
        .context("cannot start the process that serves the mount")?;
    let mut answer = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut answer)?;
    }
    match serde_json::from_str(&answer) {
        Ok(Word::Mounted) => Ok(ExitCode::SUCCESS),
        Ok(Word::Failed(text)) => {
            output::note(&text);
            Ok(ExitCode::from(1))
        }
        Err(_) => {
            let status = child.wait()?;
            let log = std::fs::read_to_string(&log_path).unwrap_or_default();
            anyhow::bail!(
                "the process that serves the mount ended with {status}\n{}",
                log.trim()
            )
        }
    }
}

/// Lets the child inherit nothing but its standard streams: a lock or a pipe that some script has
/// open must not stay so for as long as the mount.
fn keep_no_files(command: &mut Command) {
    // SAFETY: close_range is one system call, allowed between fork and exec; it touches no memory.
    // CLOSE_RANGE_CLOEXEC leaves the fds of the standard library alone until the exec. A kernel
    // without it (before 5.11) lets them be inherited.
    unsafe {
        command.pre_exec(|| {
            libc::syscall(
                libc::SYS_close_range,
                3,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            );
            Ok(())
        });
    }
}

/// Carries the URL of a reference that holds a secret to the background process: unlike the
/// command line, the environment of a process is private to its owner.
const SECRET_VARIABLE: &str = "HEARTH_REFERENCE_URL";

/// # Errors
/// The parent is gone.
fn tell(word: &Word) -> std::io::Result<()> {
    if let Ok(text) = serde_json::to_string(word) {
        output::line(text)?;
    }
    Ok(())
}

fn serve(context: &Context, args: &Args) -> anyhow::Result<ExitCode> {
    let mut reference = args.reference.clone();
    if let Ok(url) = std::env::var(SECRET_VARIABLE) {
        reference = reference.with_secret(&url)?;
    }
    let hub_layout = matches!(args.layout, LayoutArg::Hub);
    let runtime = context.runtime()?;
    let done = runtime.block_on(async {
        let node = context.node()?;
        let options = Options {
            fill: !args.no_fill,
            hub_layout,
        };
        let mounting = Mounted::with_options(
            &node,
            &reference,
            &args.dir,
            &context.config,
            Arc::default(),
            options,
        );
        let mounted = tokio::select! {
            mounted = mounting => mounted?,
            code = super::interrupted() => return code,
        };
        let mut status = mounted.status.clone();
        if args.tell_parent {
            let log = control::log_path(&context.root, mounted.mount.dir());
            status.log = Some(log).filter(|log| log.exists());
        }
        let control =
            ControlServer::start(&context.root, mounted.mount.dir(), move || status.get());
        let _control = match control {
            Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem => {
                tracing::warn!(%error, "`hearth status` cannot ask this mount");
                None
            }
            control => Some(control.context("cannot make the control socket")?),
        };
        if args.tell_parent {
            if tell(&Word::Mounted).is_err() {
                // Whoever asked for it has been interrupted, and does not want it any more.
                mounted.close().await?;
                return Ok(ExitCode::from(1));
            }
        } else {
            output::note(&format!(
                "mounted {reference} on {}",
                mounted.mount.dir().display()
            ));
        }
        tokio::select! {
            () = mounted.mount.ended() => {}
            _ = super::interrupted() => {}
        }
        mounted.close().await?;
        Ok(ExitCode::SUCCESS)
    });
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    done
}

/// How a reference is mounted.
#[derive(Clone, Copy)]
pub(super) struct Options {
    fill: bool,
    hub_layout: bool,
}

/// A mounted reference and what belongs to it.
pub(super) struct Mounted {
    mount: Arc<Mount>,
    status: Status,
    fill: Option<tokio::task::JoinHandle<()>>,
    _start: Option<Start>,
    _hold: Hold,
}

/// Says how a mount does.
#[derive(Clone)]
struct Status {
    mount: std::sync::Weak<Mount>,
    node: Node,
    resolved: Resolved,
    hub_layout: bool,
    log: Option<PathBuf>,
    error: Arc<Mutex<Option<String>>>,
}

impl Mounted {
    /// Mounts the tree of `reference` and fetches all of it in the background.
    pub(super) async fn new(
        node: &Node,
        reference: &Reference,
        dir: &Path,
        config: &Config,
        progress: Arc<Progress>,
    ) -> anyhow::Result<Self> {
        let options = Options {
            fill: true,
            hub_layout: false,
        };
        Self::with_options(node, reference, dir, config, progress, options).await
    }

    async fn with_options(
        node: &Node,
        reference: &Reference,
        dir: &Path,
        config: &Config,
        progress: Arc<Progress>,
        options: Options,
    ) -> anyhow::Result<Self> {
        let resolved = node.resolve(reference).await?;
        let artifact = &resolved.artifact;
        let hold = node.hold(&artifact.reference).await?;
        let error = Arc::new(Mutex::new(None));
        let start = node.start(&resolved).await?;
        let contents = |artifact| {
            let source = Arc::clone(&resolved.source);
            let fetched = Fetched::new(node.engine().clone(), source, artifact);
            Arc::new(fetched.on_read(start.as_ref().and_then(Start::on_read)))
        };
        let view = match &reference.locator {
            Locator::Hub(repo) if options.hub_layout => {
                let layout = hub::layout(artifact, repo, &repo.path)?;
                let artifact = Arc::new(layout.artifact);
                let contents = contents(Arc::clone(&artifact));
                View::with_upper(artifact, contents, &layout.shadows, Default::default())?
            }
            _ => View::new(Arc::clone(artifact), contents(Arc::clone(artifact)))?,
        };
        let runtime = tokio::runtime::Handle::current();
        let mount = Arc::new(Mount::new(Arc::new(view), dir, &config.mount, runtime)?);
        let fill = options.fill.then(|| {
            let (node, resolved) = (node.clone(), resolved.clone());
            let error = Arc::clone(&error);
            let mount = Arc::downgrade(&mount);
            tokio::spawn(async move {
                tokio::time::sleep(HEAD_START).await;
                if let Err(failed) = node.fill(&resolved, &progress).await {
                    if failed.is_cancelled() {
                        return; // it is being unmounted
                    }
                    let refuted = failed.is_refuted();
                    let text = format!("{:#}", anyhow::Error::from(failed));
                    tracing::warn!(error = text, "only what is read is fetched");
                    if let Some(mount) = mount.upgrade().filter(|_| refuted) {
                        mount.refuse(text.clone());
                    }
                    *error.lock() = Some(text);
                }
            })
        });
        let status = Status {
            mount: Arc::downgrade(&mount),
            node: node.clone(),
            hub_layout: options.hub_layout,
            log: None,
            error,
            resolved,
        };
        Ok(Self {
            mount,
            status,
            fill,
            _start: start,
            _hold: hold,
        })
    }

    /// Unmounts, if that is not done, and waits for the session's threads.
    pub(super) async fn close(self) -> anyhow::Result<()> {
        if let Some(fill) = &self.fill {
            fill.abort();
        }
        let mount = self.mount;
        tokio::task::spawn_blocking(move || {
            if mount.unmount(false).is_err() {
                mount.unmount(true)?;
            }
            match Arc::try_unwrap(mount) {
                Ok(mount) => mount.join(),
                Err(_) => Ok(()),
            }
        })
        .await??;
        Ok(())
    }
}

impl Status {
    fn get(&self) -> MountStatus {
        let artifact = &self.resolved.artifact;
        let store = self.node.store();
        let is_complete =
            |o: &crate::tree::Object| matches!(store.complete_sized(&o.id, o.size), Ok(Some(_)));
        let here = |o: &crate::tree::Object| match is_complete(o) {
            true => o.size,
            false => store.present_bytes(&o.id, o.size),
        };
        let mount = self.mount.upgrade();
        MountStatus {
            mountpoint: mount
                .as_ref()
                .map(|m| m.dir().to_owned())
                .unwrap_or_default(),
            reference: artifact.reference.clone(),
            revision: artifact.revision.clone(),
            layout: if self.hub_layout { "hub" } else { "tree" }.into(),
            pid: std::process::id(),
            log: self.log.clone(),
            total_bytes: artifact.size(),
            present_bytes: artifact.stored().map(here).sum(),
            complete: self.node.is_complete(artifact).unwrap_or(false),
            error: self.error.lock().clone(),
            mount: mount.map(|m| m.stats()).unwrap_or_default(),
            metrics: metrics::global()
                .all()
                .into_iter()
                .map(|(name, _, _, value)| (name.to_owned(), value.into()))
                .collect(),
        }
    }
}
