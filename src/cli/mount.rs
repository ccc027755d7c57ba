use std::{
    ffi::OsString,
    fs::File,
    io::{BufRead as _, BufReader},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::Arc,
};

use anyhow::Context as _;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{
    Context, PlatformArg,
    control::{self, ControlServer, MountStatus},
    output, parse_reference,
};
use crate::{
    config::Config,
    digest::Digest,
    disk::takes_nothing,
    fs::{Fetched, View, hub},
    metrics,
    mount::{
        Mount,
        keeper::{self, Keeper, Link, Orphan},
    },
    node::{Node, NodeError, Progress, Resolved, Start},
    reference::{Locator, Reference},
    store::Hold,
};

/// Mount a reference, readable at once, while its content is still arriving
///
/// Returns when it is mounted; a process in the background serves it until `hearth umount DIR`, and
/// logs where `hearth status DIR` says. Another one, its keeper, starts it again if it dies: then who
/// reads waits a moment, and notices nothing else.
/// Reads of what has not arrived wait for it and go before everything else.
#[derive(clap::Args)]
pub(super) struct Args {
    /// What to mount
    #[arg(value_name = "REF", value_parser = parse_reference)]
    reference: Reference,
    /// Where: an existing directory
    dir: PathBuf,
    #[command(flatten)]
    platform: PlatformArg,
    /// How files are laid out: as at the origin, or as in the cache of huggingface_hub (for
    /// HF_HUB_CACHE=DIR HF_HUB_OFFLINE=1)
    #[arg(long, value_enum, default_value = "tree")]
    layout: LayoutArg,
    /// Fetch only what is read, instead of everything in the background
    #[arg(long)]
    no_fill: bool,
    /// Serve from this process until it is unmounted or interrupted; the mount dies with it
    #[arg(long)]
    foreground: bool,
    /// Have the mount in the keeper that listens here: then it outlives this process, and goes on from
    /// where another left off, taking over from it where it still runs
    #[arg(long, value_name = "PATH", requires = "foreground")]
    keeper: Option<PathBuf>,
    /// Be the keeper: run a server, and start it again when it dies
    #[arg(long, hide = true)]
    keep: bool,
    /// Be a server of the keeper on stdin
    #[arg(long, hide = true, requires = "foreground")]
    kept: bool,
    /// Tell on stdout when it is mounted
    #[arg(long, hide = true, requires = "foreground")]
    tell_parent: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum LayoutArg {
    Tree,
    Hub,
}

impl Args {
    /// Whether this process serves it, and starts no other one that does.
    pub(super) fn serves(&self) -> bool {
        self.foreground && !self.keep
    }

    /// How to mount, for another process.
    fn options(&self) -> Vec<OsString> {
        let layout = match self.layout {
            LayoutArg::Tree => "tree",
            LayoutArg::Hub => "hub",
        };
        let mut options = vec!["--layout".into(), layout.into()];
        if self.no_fill {
            options.push("--no-fill".into());
        }
        options
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

pub(super) fn run(context: &Context, mut args: Args) -> anyhow::Result<ExitCode> {
    crate::mount::available()?;
    args.reference = args.platform.of(args.reference)?;
    if matches!(args.layout, LayoutArg::Hub) {
        anyhow::ensure!(
            matches!(args.reference.locator, Locator::Hub(_)),
            "--layout hub is for hf:// references, {} is none",
            args.reference
        );
    }
    if args.keep || args.foreground {
        crate::limits::raise_open_files();
    }
    if args.keep {
        return keep(context, &args);
    }
    if !args.foreground {
        crate::mount::clean(&args.dir)?;
        let dir = crate::mount::check(&args.dir)?;
        return start(context, &args, &dir);
    }
    let result = serve(context, &args);
    match args.tell_parent {
        true => result.or_else(|error| {
            // A parent that is gone needs no answer.
            let _ = tell(&Word::Failed(output::describe(&error)));
            Ok(ExitCode::from(1))
        }),
        false => result,
    }
}

/// Keeps a mount and runs the server of it.
fn keep(context: &Context, args: &Args) -> anyhow::Result<ExitCode> {
    // The terminal's signals are not for a process in the background.
    nix::unistd::setsid().context("cannot leave the session")?;
    let output = std::io::stdout().as_fd().try_clone_to_owned()?;
    nix::unistd::dup2_stdout(File::open("/dev/null")?)?;
    let mut first_output = Some(output);
    let mut arguments = context.arguments()?;
    arguments.extend(["mount", "--foreground", "--kept"].map(OsString::from));
    arguments.extend(args.options());
    let what = [
        OsString::from(args.reference.to_string()),
        args.dir.clone().into(),
    ];
    let server = move || {
        // The program of this process, even if another has taken its name.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("hearth").args(&arguments);
        match first_output.take() {
            // Whoever waits for a word must hear it if the server dies without one.
            Some(output) => command.args(["--tell-parent", "--"]).stdout(output),
            None => command.arg("--").stdout(Stdio::null()),
        };
        command.args(&what);
        command
    };
    let socket = control::keeper_path(&context.root, &args.dir);
    // What was mounted here is only for those who have it open: nobody asks its keeper by the name of this directory.
    let detached = |link: Link| link.show(&args.dir).is_ok_and(|one| !one.is_mounted());
    let settings = keeper::Settings {
        replace: Link::connect(&socket).is_ok_and(detached),
        // A store that cannot be written has no place for it.
        socket: socket
            .parent()
            .filter(|run| run.exists())
            .map(|_| socket.clone()),
        orphan_timeout: std::time::Duration::from_secs(context.config.mount.orphan_timeout),
        server: Some(Box::new(server)),
    };
    let kept = Keeper::new(settings)?.run();
    control::remove_empty_log(&context.root, &args.dir);
    kept.context("the keeper failed")?;
    Ok(ExitCode::SUCCESS)
}

/// Starts a process in the background and waits until it has mounted.
fn start(context: &Context, args: &Args, dir: &Path) -> anyhow::Result<ExitCode> {
    let writable = context.store()?.writable(); // fail here rather than there
    let log_path = control::log_path(&context.root, dir);
    let log: Stdio = match writable {
        true => {
            let created = crate::store::run_dir(&context.root);
            match created.and_then(|_| std::fs::File::create(&log_path)) {
                Ok(log) => log.into(),
                Err(error) if takes_nothing(&error) => Stdio::null(),
                Err(error) => {
                    let what = format!("cannot write {}", log_path.display());
                    return Err(anyhow::Error::from(error).context(what));
                }
            }
        }
        // A store that cannot be written serves what it has, and keeps no log.
        false => Stdio::null(),
    };
    let mut command = Command::new(std::env::current_exe()?);
    command.args(context.arguments()?).args(["mount", "--keep"]);
    command.args(args.options());
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
            // It leaves nothing behind.
            child.wait()?;
            output::note(&text);
            Ok(ExitCode::from(1))
        }
        Err(_) => {
            let status = loop {
                if let Some(status) = child.try_wait()? {
                    break status;
                }
                // The first server died before it could say that it had mounted; the next one serves.
                let asked = control::ask(&context.root, dir);
                if asked.is_ok_and(|said| said.is_some_and(|it| it.keeper_pid == Some(child.id())))
                {
                    return Ok(ExitCode::SUCCESS);
                }
                std::thread::sleep(std::time::Duration::from_millis(50));
            };
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
        output::text(text)?;
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
        let keeper = match (&args.keeper, args.kept) {
            (Some(path), _) => Some(Arc::new(Link::connect(path)?)),
            (None, true) => Some(Arc::new(Link::inherited()?)),
            (None, false) => None,
        };
        let place = Place::find(&args.dir, keeper.as_ref(), args.kept)?;
        if args.kept && place.orphan.is_none() && std::env::var_os(keeper::SUCCESSOR).is_some() {
            // Unmounted since the one before died.
            return Ok(ExitCode::SUCCESS);
        }
        let restarts = place.restarts;
        // It serves nothing else.
        let mut leaves = keeper.as_ref().map(|k| k.leaves_below(Path::new("/")));
        let mounting = Mounted::with_options(
            &node,
            &reference,
            place,
            &context.config,
            Arc::default(),
            options,
        );
        let mounted = tokio::select! {
            mounted = mounting => mounted?,
            code = super::interrupted() => return code,
        };
        let mut status = mounted.status.clone();
        if args.kept {
            let log = control::log_path(&context.root, mounted.mount.dir());
            status.log = Some(log).filter(|log| log.exists());
        }
        if let Some(keeper) = &keeper {
            status.keeper = keeper.keeper();
            status.restarts = restarts;
        }
        let control =
            ControlServer::start(&context.root, mounted.mount.dir(), move || status.get());
        let control = match control {
            Err(error) if takes_nothing(&error) => {
                tracing::warn!(%error, "`hearth status` cannot ask this mount");
                None
            }
            Ok(control) => Some(control),
            Err(error) => {
                mounted.close().await?;
                return Err(anyhow::Error::new(error).context("cannot make the control socket"));
            }
        };
        if args.tell_parent {
            if tell(&Word::Mounted).is_err() {
                // Whoever asked for it has been interrupted, and does not want it any more.
                mounted.close().await?;
                return Ok(ExitCode::from(1));
            }
        } else if !args.kept {
            output::note(&format!(
                "mounted {reference} on {}",
                mounted.mount.dir().display()
            ));
        }
        let asked_to_leave = async {
            // Without a keeper it goes on being served.
            if let Some(leaves) = &mut leaves
                && leaves.recv().await.is_some()
            {
                return;
            }
            std::future::pending().await
        };
        let leave = tokio::select! {
            () = mounted.mount.ended() => false,
            _ = super::interrupted() => args.keeper.is_some(),
            () = asked_to_leave => true,
        };
        if leave {
            // Its name is for the next one.
            drop(control);
            mounted.leave().await?;
        } else {
            mounted.close().await?;
        }
        node.engine().settle().await;
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

/// Where it is mounted, and what is there already.
struct Place<'a> {
    dir: PathBuf,
    keeper: Option<&'a Arc<Link>>,
    /// The mount of a server before this one, and the artifact that it served.
    orphan: Option<(Orphan, Digest)>,
    restarts: u32,
}

impl<'a> Place<'a> {
    /// What is mounted is found without being looked at: it may have no server.
    /// A keeper of our `own` has nothing else: that is gone on with also where it was detached.
    fn find(dir: &Path, keeper: Option<&'a Arc<Link>>, own: bool) -> anyhow::Result<Self> {
        let mut place = Self {
            dir: crate::mount::find(dir)?.unwrap_or_else(|| dir.to_owned()),
            keeper,
            orphan: None,
            restarts: 0,
        };
        let mut sessions = match keeper {
            Some(keeper) => keeper.sessions()?.into_iter(),
            None => Vec::new().into_iter(),
        };
        let found = match (sessions.find(|kept| kept.dir() == place.dir), keeper) {
            (Some(kept), Some(keeper)) => Some((kept, keeper.show(&place.dir)?)),
            _ => None,
        };
        if let Some((kept, orphan)) = found.filter(|(_, orphan)| own || orphan.is_mounted()) {
            let about: Option<About> = serde_json::from_slice(orphan.about()).ok();
            let digest = about.and_then(|about| about.digest.parse().ok()).context(
                "what is mounted was described in a way that this version does not know",
            )?;
            place.orphan = Some((orphan, digest));
            place.restarts = kept.servers;
        } else {
            crate::mount::clean(dir)?;
        }
        Ok(place)
    }
}

/// What the keeper remembers of what is served.
#[derive(Serialize, Deserialize)]
struct About {
    /// Of the artifact: it fixes all inode numbers.
    digest: String,
}

/// A mounted reference and what belongs to it.
pub(super) struct Mounted {
    mount: Arc<Mount>,
    status: Status,
    fill: Option<tokio::task::JoinHandle<()>>,
    _start: Option<Start>,
    _holds: Vec<Hold>,
}

/// Says how a mount does.
#[derive(Clone)]
struct Status {
    mount: std::sync::Weak<Mount>,
    node: Node,
    resolved: Resolved,
    hub_layout: bool,
    log: Option<PathBuf>,
    keeper: Option<u32>,
    restarts: u32,
    halt: Arc<Mutex<Option<Halt>>>,
}

/// Why nothing is fetched in the background.
#[derive(Clone)]
struct Halt {
    error: String,
    /// Whether it is tried again.
    waits: bool,
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
        let place = Place::find(dir, None, false)?;
        Self::with_options(node, reference, place, config, progress, options).await
    }

    async fn with_options(
        node: &Node,
        reference: &Reference,
        place: Place<'_>,
        config: &Config,
        progress: Arc<Progress>,
        options: Options,
    ) -> anyhow::Result<Self> {
        let mut holds = Vec::new();
        let resolved = match &place.orphan {
            Some((_, digest)) => {
                let resolved = node.resume(reference, digest).await?;
                match node.hold(&resolved.artifact.reference).await {
                    Ok(hold) => holds.push(hold),
                    // It was forgotten while it was mounted.
                    Err(error) => tracing::debug!(%error, "only the generation is held"),
                }
                resolved
            }
            None => {
                let (resolved, hold) = node.resolve_held(reference).await?;
                holds.push(hold);
                resolved
            }
        };
        let artifact = &resolved.artifact;
        if let Some((_, digest)) = &place.orphan {
            holds.push(node.hold_generation(digest).await?);
        }
        node.keep_indexes(&resolved, &artifact.digest()).await;
        let halt = Arc::new(Mutex::new(None));
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
        let (view, dir, config) = (Arc::new(view), &*place.dir, &config.mount);
        let new = place.orphan.is_none();
        let mount = match (place.orphan, place.keeper) {
            (Some((orphan, _)), Some(keeper)) => {
                Mount::adopt(view, orphan, config, runtime, keeper)?
            }
            (_, Some(keeper)) => {
                let digest = artifact.digest().to_string();
                let about = serde_json::to_string(&About { digest })?;
                Mount::kept(view, dir, config, runtime, keeper, &about)?
            }
            (_, None) => Mount::new(view, dir, config, runtime)?,
        };
        if let Some(keeper) = place.keeper {
            // While no server is there, it must not be collected either.
            let files: Vec<_> = holds
                .iter()
                .flat_map(Hold::files)
                .map(|f| f.as_fd())
                .collect();
            if let Err(error) = keeper.hold(mount.dir(), &files) {
                if new {
                    let _ = mount.unmount(true);
                }
                return Err(error.into());
            }
        }
        let mount = Arc::new(mount);
        let fill = options.fill.then(|| {
            let (node, resolved) = (node.clone(), resolved.clone());
            let halt = Arc::clone(&halt);
            let mount = Arc::downgrade(&mount);
            tokio::spawn(async move {
                tokio::time::sleep(HEAD_START).await;
                let waits = |failed: Option<&NodeError>| {
                    *halt.lock() = failed.map(|failed| Halt {
                        error: output::chain(failed),
                        waits: true,
                    });
                };
                let filled = node.fill(&resolved, &progress, waits).await;
                if let Err(failed) = filled {
                    if failed.is_cancelled() {
                        return; // it is being unmounted
                    }
                    let refuted = failed.is_refuted();
                    let text = format!("{:#}", anyhow::Error::from(failed));
                    tracing::warn!(error = text, "only what is read is fetched");
                    if let Some(mount) = mount.upgrade().filter(|_| refuted) {
                        mount.refuse(text.clone());
                    }
                    *halt.lock() = Some(Halt {
                        error: text,
                        waits: false,
                    });
                }
            })
        });
        let status = Status {
            mount: Arc::downgrade(&mount),
            node: node.clone(),
            hub_layout: options.hub_layout,
            log: None,
            keeper: None,
            restarts: 0,
            halt,
            resolved,
        };
        Ok(Self {
            mount,
            status,
            fill,
            _start: start,
            _holds: holds,
        })
    }

    /// Leaves it mounted, for another process to serve.
    async fn leave(self) -> anyhow::Result<()> {
        let mount = self.mount;
        let left = tokio::task::spawn_blocking(move || mount.leave()).await?;
        // Not before: who reads what it fetches would be told that it was given up.
        if let Some(fill) = &self.fill {
            fill.abort();
        }
        Ok(left?)
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
    /// Blocking: every object is looked at.
    fn get(&self) -> MountStatus {
        let artifact = &self.resolved.artifact;
        let presence = self.node.presence(artifact);
        let halt = self.halt.lock().clone();
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
            keeper_pid: self.keeper,
            restarts: self.restarts,
            log: self.log.clone(),
            total_bytes: artifact.size(),
            present_bytes: presence.bytes,
            complete: presence.complete,
            verified: presence.verified,
            waits: halt.as_ref().is_some_and(|halt| halt.waits),
            error: halt.map(|halt| halt.error),
            mount: mount.map(|m| m.stats()).unwrap_or_default(),
            metrics: metrics::global()
                .all()
                .into_iter()
                .map(|(name, _, _, value)| (name.to_owned(), value.into()))
                .collect(),
        }
    }
}
