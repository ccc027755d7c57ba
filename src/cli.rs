//! The command line: one file per command; its doc comment is the help text.
//!
//! Results go to stdout, progress and messages to stderr. Exit status: 0 done, 1 failed, 2 wrong
//! usage, 130 and 143 interrupted by SIGINT and SIGTERM.

mod agent;
mod bake;
mod completions;
mod config;
mod control;
mod crds;
mod csi;
mod demo;
mod gc;
mod index;
mod inspect;
mod keeper;
mod list;
mod mirror;
mod mount;
mod output;
mod pin;
mod rm;
mod snapshotter;
mod status;
mod umount;
mod verify;
mod warm;

use std::{
    borrow::Cow,
    ffi::OsString,
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};
use tracing_subscriber::{
    EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use crate::{
    config::Config,
    daemon::{self, Face, Parts},
    fetch::Engine,
    limits,
    node::{Node, NodeError},
    reference::{Locator, Platform, Reference, redact},
    source::{self, Asker, Sources},
    store::Store,
    telemetry::{self, Traces},
};

/// Keeps model weights warm on this node, and serves them before they have arrived.
///
/// REF is one of s3://bucket/prefix/, gs://bucket/prefix/, az://container/prefix/,
/// http(s)://host/path, file:///dir, hf://org/name[@revision][/subdir],
/// oci://registry/repository[:tag][@digest]; each may end in ?include=GLOB&exclude=GLOB, oci:// also
/// in ?platform=os/arch. Credentials are taken from where the usual tools look for them (AWS_*,
/// GOOGLE_*, AZURE_*, HF_TOKEN, docker login).
#[derive(Parser)]
#[command(name = "hearth", version = VERSION, max_term_width = 100)]
struct Cli {
    /// Where content is kept [default: /var/lib/hearth as root, else $XDG_CACHE_HOME/hearth]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "HEARTH_STORE",
        hide_env_values = true
    )]
    store: Option<PathBuf>,
    /// Configuration file [default: /etc/hearth/config.toml as root, else
    /// $XDG_CONFIG_HOME/hearth/config.toml, where it exists]
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "HEARTH_CONFIG",
        hide_env_values = true
    )]
    config: Option<PathBuf>,
    /// Say more on stderr; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

/// The version with the commit it was built from (`build.rs`).
const VERSION: &str = env!("HEARTH_VERSION");

#[derive(Subcommand)]
enum Command {
    Inspect(inspect::Args),
    Warm(warm::Args),
    Bake(bake::Args),
    Mount(mount::Args),
    Umount(umount::Args),
    List(list::Args),
    Status(status::Args),
    Pin(pin::PinArgs),
    Unpin(pin::UnpinArgs),
    Rm(rm::Args),
    Gc(gc::Args),
    Verify(verify::Args),
    Index(index::Args),
    Agent(agent::Args),
    Snapshotter(snapshotter::Args),
    Csi(csi::Args),
    Mirror(mirror::Args),
    Keeper(keeper::Args),
    Config(config::Args),
    Crds(crds::Args),
    Completions(completions::Args),
    Demo(demo::Args),
    #[command(hide = true)]
    DemoLoad(demo::LoadArgs),
}

impl Command {
    /// What serves for long has spans: its name where they are collected.
    fn serves(&self) -> Option<&'static str> {
        match self {
            Self::Agent(_) => Some("agent"),
            Self::Snapshotter(_) => Some("snapshotter"),
            Self::Csi(_) => Some("csi"),
            Self::Mirror(_) => Some("mirror"),
            Self::Mount(args) if args.serves() => Some("mount"),
            _ => None,
        }
    }
}

/// What every command gets.
struct Context {
    config: Config,
    root: PathBuf,
    config_path: Option<PathBuf>,
    verbose: u8,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    if std::env::args_os().len() <= 1 {
        // Not clap's `arg_required_else_help`: a variable of the environment counts there.
        let _ = write!(std::io::stderr(), "{}", Cli::command().render_help());
        return ExitCode::from(2);
    }
    bound_allocator();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return wrong_usage(&error),
    };
    let command = cli.command;
    let made = Context::new(cli.store, cli.config, cli.verbose);
    let traces = match (&made, command.serves()) {
        (Ok(context), Some(name)) => context.traces(name),
        _ => (None, Vec::new()),
    };
    let traces = init_tracing(cli.verbose, traces);
    // Whatever becomes of this process.
    crate::mount::keeper::refuse_overdue();
    let done = made.and_then(|context| match command {
        Command::Inspect(args) => inspect::run(&context, args),
        Command::Warm(args) => warm::run(&context, args),
        Command::Bake(args) => bake::run(&context, args),
        Command::Mount(args) => mount::run(&context, args),
        Command::Umount(args) => umount::run(&context, args),
        Command::List(args) => list::run(&context, args),
        Command::Status(args) => status::run(&context, args),
        Command::Pin(args) => pin::pin(&context, args),
        Command::Unpin(args) => pin::unpin(&context, args),
        Command::Rm(args) => rm::run(&context, args),
        Command::Gc(args) => gc::run(&context, args),
        Command::Verify(args) => verify::run(&context, args),
        Command::Index(args) => index::run(&context, args),
        Command::Agent(args) => agent::run(&context, args),
        Command::Csi(args) => csi::run(&context, args),
        Command::Mirror(args) => mirror::run(&context, args),
        Command::Keeper(args) => keeper::run(&context, args),
        Command::Snapshotter(args) => snapshotter::run(&context, args),
        Command::Config(args) => config::run(&context, args),
        Command::Crds(args) => crds::run(&args),
        Command::Completions(args) => completions::run(args),
        Command::Demo(args) => demo::run(&context, args),
        Command::DemoLoad(args) => demo::load(&args),
    });
    let code = match done {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::error(&error);
            ExitCode::from(1)
        }
    };
    if let Some(traces) = traces {
        traces.end();
    }
    code
}

/// Has the allocator keep little: glibc gives each thread an arena of its own, and what is freed in one, which is most of
/// what bodies leave behind, does not go back to the system and serves no other. Large pieces are mapped, always: once one
/// was freed, glibc would take the next from an arena and fill it with zeros, as the 16 MiB that `fuser` has for the
/// longest write of each session, of which a few KiB are ever used. Must come before the first thread.
fn bound_allocator() {
    #[cfg(target_env = "gnu")]
    {
        const MAPPED: libc::c_int = 4 << 20;
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        // SAFETY: mallopt(3) has no preconditions; M_ARENA_MAX only bounds what is made later. The first threshold that is
        // set ends that both change by themselves.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, cores.clamp(2, 8) as libc::c_int);
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
            libc::mallopt(libc::M_TRIM_THRESHOLD, 2 * MAPPED);
        }
    }
}

/// What clap says, but for secrets: it repeats the arguments that it does not like.
fn wrong_usage(error: &clap::Error) -> ExitCode {
    let mut text = error.render().to_string();
    let mut secret = false;
    for arg in std::env::args_os().skip(1) {
        let arg = arg.to_string_lossy();
        if let Cow::Owned(public) = redact(&arg)
            && text.contains(&*arg)
        {
            text = text.replace(&*arg, &public);
            secret = true;
        }
    }
    // The terminal's colours are for what is printed as it is.
    let _ = match secret {
        true => write!(std::io::stderr(), "{text}"),
        false => error.print(),
    };
    ExitCode::from(error.exit_code() as u8)
}

/// Begins the log, and spans where they are collected; says there what is wrong with them.
fn init_tracing(verbose: u8, (traces, wrong): (Option<Traces>, Vec<String>)) -> Option<Traces> {
    let level = match verbose {
        0 => "warn",
        1 => "hearth=info,warn",
        _ => "hearth=debug,info",
    };
    let mut filter =
        EnvFilter::try_from_env("HEARTH_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    // Spans are for the collector.
    if let Ok(off) = format!("{}=off", telemetry::TARGET).parse() {
        filter = filter.add_directive(off);
    }
    let format = tracing_subscriber::fmt::layer()
        .with_writer(output::LogWriter)
        .with_ansi(false)
        .with_target(false)
        .compact();
    // A person knows what time it is.
    let log = match verbose == 0 && std::io::stderr().is_terminal() {
        true => format.without_time().boxed(),
        false => format.boxed(),
    };
    let log = tracing_subscriber::registry().with(log.with_filter(filter));
    match &traces {
        Some(traces) => log.with(traces.layer()).init(),
        None => log.init(),
    }
    for why in wrong {
        tracing::warn!("{why}");
    }
    traces
}

/// Whether whoever read our output has gone away: `hearth list | head`.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

impl Context {
    fn new(
        store: Option<PathBuf>,
        config_path: Option<PathBuf>,
        verbose: u8,
    ) -> anyhow::Result<Self> {
        let config_path = match config_path {
            Some(path) => Some(path),
            None => Config::default_path().filter(|path| path.exists()),
        };
        let config = match &config_path {
            Some(path) => Config::read(path)?,
            None => Config::default(),
        };
        let root = store
            .or_else(|| config.root.clone())
            .or_else(Config::default_root)
            .context("no place for the store: HOME is not set; say --store DIR")?;
        Ok(Self {
            root: std::path::absolute(root)?,
            config,
            config_path,
            verbose,
        })
    }

    /// Spans of the command `name`, where they are collected; and what is wrong with that.
    fn traces(&self, name: &str) -> (Option<Traces>, Vec<String>) {
        let mut wrong = Vec::new();
        let agent = &self.config.agent;
        let mut about = vec![
            ("hearth.command", name.to_owned()),
            ("host.name", agent.node_name()),
        ];
        if agent.node_name.is_some() || std::env::var_os("KUBE_NODE_NAME").is_some() {
            about.push(("k8s.node.name", agent.node_name()));
        }
        let traces = Traces::start(&self.config.trace, &about, |why| wrong.push(why));
        let traces = traces.unwrap_or_else(|error| {
            wrong.push(format!("no spans are exported: {error}"));
            None
        });
        (traces, wrong)
    }

    /// What another process of this program needs to have the same context.
    fn arguments(&self) -> anyhow::Result<Vec<OsString>> {
        let mut arguments = vec!["--store".into(), self.root.clone().into()];
        if let Some(config) = &self.config_path {
            arguments.extend(["--config".into(), std::path::absolute(config)?.into()]);
        }
        arguments.extend((0..self.verbose).map(|_| "--verbose".into()));
        Ok(arguments)
    }

    fn store(&self) -> anyhow::Result<Arc<Store>> {
        Store::open_with_tiers(&self.root, &self.config.store, &self.config.tiers)
            .map_err(|e| NodeError::from(e).into())
    }

    /// The node; must be called within the runtime.
    fn node(&self) -> anyhow::Result<Node> {
        let engine = Engine::new(self.store()?, self.config.fetch.clone());
        let mirror = &self.config.mirror;
        let sources = Sources::new(source::Config {
            asker: Some(Asker {
                store: engine.store().id().to_owned(),
                mirror: mirror.enabled.then_some(mirror.address),
            }),
            ..self.config.source.clone()
        });
        Ok(Node::new(engine, sources).with_tenancy(self.config.tenancy.clone()))
    }

    fn runtime(&self) -> anyhow::Result<tokio::runtime::Runtime> {
        Ok(tokio::runtime::Builder::new_multi_thread()
            .thread_name("hearth")
            .enable_all()
            .build()?)
    }

    /// Serves `faces` until a signal arrives; to be told to end is how it ends. `door`: where the next
    /// process asks this one to hand over.
    fn serve(
        &self,
        config: Config,
        faces: &[Face],
        door: Option<PathBuf>,
    ) -> anyhow::Result<ExitCode> {
        limits::raise_open_files();
        let runtime = self.runtime()?;
        let done = runtime.block_on(async {
            let mut parts = Parts::new(self.node()?, config, output::note)?;
            parts.door = door;
            let stop = async { interrupted().await.map(drop) };
            daemon::run(parts, faces, stop).await
        });
        runtime.shutdown_timeout(std::time::Duration::from_secs(5));
        done.map(|()| ExitCode::SUCCESS)
    }

    /// Runs `work` with a node on a new runtime, until it is done or a signal arrives.
    fn with_node<F: Future<Output = anyhow::Result<ExitCode>>>(
        &self,
        work: impl FnOnce(Node) -> F,
    ) -> anyhow::Result<ExitCode> {
        let runtime = self.runtime()?;
        let done = runtime.block_on(async {
            let node = self.node()?;
            tokio::select! {
                done = work(node) => done,
                code = interrupted() => {
                    output::note("interrupted: what has arrived is kept; run it again to go on");
                    code
                }
            }
        });
        // Writes under way are finished; nothing is waited for that may take long.
        runtime.shutdown_timeout(std::time::Duration::from_secs(5));
        done
    }
}

/// Waits for SIGINT or SIGTERM and gives the exit status that shells expect.
async fn interrupted() -> anyhow::Result<ExitCode> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(tokio::select! {
        done = tokio::signal::ctrl_c() => done.map(|()| ExitCode::from(130))?,
        _ = terminate.recv() => ExitCode::from(143),
    })
}

/// The platform of what lies in registries.
#[derive(clap::Args)]
struct PlatformArg {
    /// Of images for several platforms the one for this, such as linux/arm64; also ?platform= in REF
    #[arg(long, value_name = "OS/ARCH", value_parser = Platform::parse)]
    platform: Option<Platform>,
}

impl PlatformArg {
    /// `reference` for the platform, where one is given.
    fn of(&self, mut reference: Reference) -> anyhow::Result<Reference> {
        let Some(platform) = &self.platform else {
            return Ok(reference);
        };
        let Locator::Oci(oci) = &mut reference.locator else {
            anyhow::bail!("--platform is for oci:// references, {reference} is none");
        };
        let said = oci.platform.get_or_insert_with(|| platform.clone());
        anyhow::ensure!(
            said == platform,
            "{reference} and --platform {platform} contradict each other"
        );
        Ok(reference)
    }
}

/// Parses a reference of the command line.
fn parse_reference(text: &str) -> Result<Reference, String> {
    text.parse()
        .map_err(|e: crate::reference::ParseReferenceError| e.to_string())
}
