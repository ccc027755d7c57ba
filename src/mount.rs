//! mount: a [`View`] on the kernel's side of `/dev/fuse`. The only room that imports fuser.
//!
//! `device` mounts and unmounts, `table` reads the kernel's list of mounts, `adapter` decodes requests,
//! calls `fs` and answers, `opens` decides between passthrough and FUSE reads, `stale` and `pages`
//! have the kernel drop what turned out wrong, `errno` is the one
//! table from errors to errno. `session` begins with the kernel or goes on where another process
//! stopped, with what `state` remembers; `keeper` holds both while processes come and go; `retire` lets
//! go. Called by `daemon` and `cli`.
//!
//! Invariants: no thread of a session waits for the network (such requests become tasks of the
//! runtime); this process never touches a path below its own mount, not even with `stat`; every
//! answer is immutable, so the kernel may keep it for ever, except content that was served before it
//! was verified and then turned out wrong: it is told to drop that.
//!
//! What survives a crash: without a keeper nothing, the kernel answers ENOTCONN until the mount is taken
//! away. With one, everything: requests wait, and are answered by the next server, which serves the same
//! artifact, so inode numbers stand. What is open is in `state`. Only what was written to a view with an
//! upper is lost: a name in it is looked up again, an open file of it answers ESTALE.

mod adapter;
mod device;
mod errno;
pub mod keeper;
pub mod native;
mod opens;
mod pages;
mod retire;
mod server;
mod session;
mod stale;
mod state;
mod stats;
mod table;

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, RawFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Duration,
};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use tokio::{runtime::Handle, sync::watch};

use self::{
    adapter::Adapter,
    keeper::{Link, Orphan},
    retire::Haste,
    server::Server,
    session::{Agreed, Device, Id, Session},
};
pub use self::{
    state::FORMAT,
    stats::Stats,
    table::{MountInfo, mounted, shows, stack},
};
use crate::{
    fs::View,
    metrics,
    telemetry::{self, span},
};

/// How long a server may take to answer whether it lives.
const PATIENCE: Duration = Duration::from_secs(2);

/// How views are mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Threads that take requests from the kernel; as many as there are cores, 2 to 8, by default.
    pub threads: usize,
    /// Read-ahead of the kernel on the mount, in KiB; root only. It matters for files that are not
    /// complete: the others have the read-ahead of the disk below. More makes random reads of
    /// mapped files fetch more.
    pub read_ahead_kb: u32,
    /// Let the kernel read complete files itself; root only.
    pub passthrough: bool,
    /// Files up to this many bytes are fetched whole when they are opened.
    pub small_file: u64,
    /// Whether other users may look into the mount; by default only where root mounts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_other: Option<bool>,
    /// How long readers wait for a server that has died and does not come back, in seconds; then they
    /// are refused with ETIMEDOUT. What is complete and open stays readable.
    #[serde(rename = "orphan_timeout_seconds")]
    pub orphan_timeout: u64,
    /// Have the kernel send again what a server had not answered when it died (Linux 6.9). Without it,
    /// as with older kernels, those requests fail with EIO when the next server starts.
    pub resend: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8)),
            read_ahead_kb: 1024,
            passthrough: true,
            small_file: crate::chunk::CHUNK_SIZE,
            allow_other: None,
            orphan_timeout: 300,
            resend: true,
        }
    }
}

/// Why something could not be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", dir.display())]
pub struct MountError {
    kind: MountErrorKind,
    dir: PathBuf,
    message: String,
    source: Option<io::Error>,
}

/// What a [`MountError`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountErrorKind {
    /// The mount point is missing, no directory, or not readable.
    Directory,
    /// Something of hearth is mounted there already.
    Mounted,
    /// Nothing of hearth is mounted there.
    NotMounted,
    /// Files are open below the mount.
    Busy,
    /// The kernel has no FUSE, or `/dev/fuse` is not there.
    NoFuse,
    /// `fusermount3` is needed and not there.
    NoHelper,
    /// Native roots cannot be mounted here.
    NoNative,
    /// Not allowed to mount here.
    Denied,
    /// The keeper and this process do not go together.
    Keeper,
    /// Anything else the system said.
    System,
}

impl MountError {
    fn new(kind: MountErrorKind, dir: &Path, message: impl Into<String>) -> Self {
        Self {
            kind,
            dir: dir.to_owned(),
            message: message.into(),
            source: None,
        }
    }

    fn system(dir: &Path, doing: &str, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        Self {
            kind: MountErrorKind::System,
            dir: dir.to_owned(),
            message: format!("{doing}: {source}"),
            source: Some(source),
        }
    }

    /// What it is about.
    pub const fn kind(&self) -> MountErrorKind {
        self.kind
    }

    /// What to try, for a person.
    pub const fn hint(&self) -> Option<&'static str> {
        match self.kind {
            MountErrorKind::Directory => Some("give an existing directory"),
            MountErrorKind::Mounted => Some("unmount it with `hearth umount` first"),
            MountErrorKind::NotMounted => Some("`hearth status` shows what is mounted"),
            MountErrorKind::Busy => Some(
                "close the files below it (`fuser -vm DIR` shows who has them), or unmount lazily",
            ),
            MountErrorKind::NoFuse => {
                Some("load the kernel module (`modprobe fuse`); in a container, give it /dev/fuse")
            }
            MountErrorKind::NoHelper => Some("install the package `fuse3`, or mount as root"),
            MountErrorKind::NoNative => Some(
                "nothing to do: FUSE serves the root instead; a native one needs root, Linux 6.5 with \
                 EROFS and loop devices, and a store on a disk",
            ),
            MountErrorKind::Denied => Some(
                "mount as root (CAP_SYS_ADMIN), or on a directory that you own, with /dev/fuse open \
                 to all (mode 0666)",
            ),
            MountErrorKind::Keeper => Some(
                "a keeper and its servers must be of versions that go together; the server that was there goes on",
            ),
            MountErrorKind::System => None,
        }
    }
}

/// A mounted view; dropped = unmounted (detached where it is busy), or where a keeper has it, left to the next server.
#[derive(Debug)]
pub struct Mount {
    dir: PathBuf,
    id: Id,
    server: Arc<Server>,
    keeper: Option<Arc<Link>>,
    device: Weak<Device>,
    /// The fd number on which fuser serves, and how many threads do.
    channel: (RawFd, usize),
    /// Let go of: it is not for this process to say that it has ended, or to unmount it.
    left: Arc<AtomicBool>,
    ended: watch::Receiver<bool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Mount {
    /// Mounts `view` on directory `dir` and serves it from threads of its own; waiting for content
    /// happens on `runtime`. It dies with this process.
    ///
    /// # Errors
    /// A directory that cannot be mounted on, a system without FUSE, no right to mount.
    pub fn new(
        view: Arc<View>,
        dir: &Path,
        config: &Config,
        runtime: Handle,
    ) -> Result<Self, MountError> {
        let session = Session::mount(&mount_point(dir)?, options(&view, config), b"")?;
        Self::begin(session, view, config, runtime, None)
    }

    /// As [`Mount::new`], but the mount outlives this process: `keeper` has it, and `about`, from which
    /// another process makes the same view for [`Mount::adopt`].
    ///
    /// # Errors
    /// As [`Mount::new`]; what the keeper says.
    pub fn kept(
        view: Arc<View>,
        dir: &Path,
        config: &Config,
        runtime: Handle,
        keeper: &Arc<Link>,
        about: &str,
    ) -> Result<Self, MountError> {
        let session = keeper.open(&mount_point(dir)?, options(&view, config), about)?;
        Self::begin(session, view, config, runtime, Some(keeper.clone()))
    }

    /// Goes on serving a mount of a process that has died, or that lets go of it now. `view` must be of
    /// the artifact that it was made of.
    ///
    /// # Errors
    /// What was agreed on with the kernel is more than this version knows; the other does not let go.
    /// Then it waits for a server as before.
    pub fn adopt(
        view: Arc<View>,
        orphan: Orphan,
        config: &Config,
        runtime: Handle,
        keeper: &Arc<Link>,
    ) -> Result<Self, MountError> {
        let keeper = Some(keeper.clone());
        let dir = orphan.session.dir.display();
        let span = span!("adopt mount", hearth.mount.dir = %dir, hearth.reference = view.artifact().reference);
        let served = span.in_scope(|| Self::serve(orphan.session, view, config, runtime, keeper));
        if let Err(error) = &served {
            telemetry::fail(&span, format!("{:?}", error.kind()), error);
        }
        served
    }

    /// Serves what was just mounted; takes it away again where that fails.
    fn begin(
        session: Session,
        view: Arc<View>,
        config: &Config,
        runtime: Handle,
        keeper: Option<Arc<Link>>,
    ) -> Result<Self, MountError> {
        let (dir, id) = (session.dir.clone(), session.id());
        Self::serve(session, view, config, runtime, keeper.clone()).inspect_err(|_| {
            if let Err(error) = device::unmount(&dir, true) {
                tracing::warn!(%error, "could not unmount");
            }
            if let Some(Err(error)) = keeper.map(|keeper| keeper.end(&dir, id)) {
                tracing::warn!(%error, "the keeper keeps what is gone");
            }
        })
    }

    fn serve(
        session: Session,
        view: Arc<View>,
        config: &Config,
        runtime: Handle,
        keeper: Option<Arc<Link>>,
    ) -> Result<Self, MountError> {
        let dir = session.dir.clone();
        let failed = |e| MountError::system(&dir, "FUSE handshake", e);
        let resumed = session.resumed().map_err(failed)?;
        let agreed = match resumed {
            true => Some(Agreed::of(&session.state.answer().map_err(failed)?)),
            false => None,
        };
        let server = Server::new(view, &session, agreed, config, runtime, keeper.clone());
        let server = Arc::new(server);
        let mut settings = fuser::Config::default();
        let threads = config.threads.clamp(1, 64);
        settings.n_threads = Some(threads);
        // With it, most requests in flight are lost when a successor takes the session over.
        settings.clone_fd = false;
        let adapter = Adapter(server.clone());
        // Who may come in is decided by the kernel (allow_other, default_permissions).
        let acl = fuser::SessionACL::All;
        let (fuse, answer) = session::greet(&session.state, |socket| {
            fuser::Session::from_fd(adapter, socket, acl, settings)
        })
        .map_err(failed)?;
        let resend = Agreed::of(&answer).resend;
        server.resend.store(resend, Relaxed);
        if let Some(keeper) = &keeper {
            keeper.take(&session)?;
        }
        let taken = Taken(resumed.then_some((&session, keeper.as_deref())));
        let distrusted = server.succeed(&session.device);
        session::connect(&fuse, &session.device, &session.state, &answer, resumed)
            .map_err(failed)?;
        server.notify_by(Some(fuse.notifier()));
        raise_read_ahead(session.connection, config.read_ahead_kb);

        if resumed {
            metrics::global().keeper_adopted.add(1);
        }
        let (tell, ended) = watch::channel(false);
        let left = Arc::new(AtomicBool::new(false));
        let serving = (server.clone(), keeper.clone(), dir.clone(), left.clone());
        let id = session.id();
        let device = session.device.clone();
        let channel = fuse.as_fd().as_raw_fd();
        let thread = std::thread::Builder::new()
            .name("hearth-mount".into())
            .spawn(move || {
                let (server, keeper, dir, left) = serving;
                metrics::global().mount_mounts.add(1);
                let result = over(fuse.run());
                metrics::global().mount_mounts.sub(1);
                server.notify_by(None);
                drop(device);
                if !left.load(Relaxed) {
                    // Before anybody is told: what it held may be collected then.
                    server.opens.end();
                    if let Some(Err(error)) = keeper.map(|keeper| keeper.end(&dir, id)) {
                        tracing::debug!(%error, "the keeper was not told of the end");
                    }
                }
                tell.send_replace(true);
                result
            })
            .map_err(|e| MountError::system(&dir, "thread", e))?;
        taken.served();
        // Needs threads that serve: the kernel waits for what is being read.
        distrusted.into_iter().for_each(|ino| server.distrust(ino));
        Ok(Self {
            dir,
            id,
            server,
            keeper,
            device: Arc::downgrade(&session.device),
            channel: (channel, threads),
            left,
            ended,
            thread: Some(thread),
        })
    }

    /// Gives the next server of a kept mount what nobody else is to know: see [`Orphan::secret`]. It is in memory only, that of
    /// the session, and goes with it.
    ///
    /// # Errors
    /// It is too long; then the next server has none.
    pub fn remember(&self, secret: &[u8]) -> Result<(), MountError> {
        let kept = match &self.keeper {
            Some(_) => self.server.state.set_secret(secret),
            None => Ok(()),
        };
        kept.map_err(|e| MountError::system(&self.dir, "session", e))
    }

    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Number of the FUSE connection (`/sys/fs/fuse/connections/<n>`).
    pub fn connection(&self) -> u32 {
        self.id.connection
    }

    /// What has been served so far.
    pub fn stats(&self) -> Stats {
        self.server.stats()
    }

    /// What is mounted turned out not to be what it was said to be: whatever is asked of it fails
    /// from now on, and the kernel drops what it holds of it.
    pub fn refuse(&self, why: String) {
        self.server.refuse(why);
    }

    /// Whether [`Mount::refuse`] was called.
    pub fn is_refused(&self) -> bool {
        self.server.view.check().is_err()
    }

    /// Returns once it is unmounted, by anybody.
    pub async fn ended(&self) {
        // An error means the sender is gone, which is an end too.
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }

    /// Whether it is unmounted.
    pub fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Whether its directory shows it: not where somebody has detached it, or mounted something over it.
    pub fn is_mounted(&self) -> bool {
        !self.has_ended() && table::shows(&self.dir, self.id.connection)
    }

    /// Unmounts; fine where it is unmounted already. `lazy` detaches it at once, and what is open
    /// below stays readable until it is closed, as long as this process lives.
    ///
    /// # Errors
    /// [`MountErrorKind::Busy`] where files are open and `lazy` is not set.
    pub fn unmount(&self, lazy: bool) -> Result<(), MountError> {
        match table::shows(&self.dir, self.id.connection) {
            // The number may be of another mount by now, unless it is as dead as this one.
            true if self.has_ended() => clean(&self.dir),
            true => device::unmount(&self.dir, lazy),
            false => Ok(()),
        }
    }

    /// Lets a kept mount go without unmounting it: answers what is in hand, and tells the keeper. Blocks
    /// this thread for some seconds at most.
    ///
    /// # Errors
    /// What the system or the keeper says; then it is as if this process had died.
    pub fn leave(&self) -> Result<(), MountError> {
        self.let_go(Haste::None)
    }

    fn let_go(&self, haste: Haste) -> Result<(), MountError> {
        self.left.store(true, Relaxed);
        metrics::global().keeper_left.add(1);
        let failed = |e| MountError::system(&self.dir, "leave", e);
        if let Some(device) = self.device.upgrade() {
            let left = retire::retire(&self.server, &device, self.channel, &self.ended, haste);
            left.map_err(failed)?;
        }
        match &self.keeper {
            Some(keeper) => keeper.left(&self.dir, self.id),
            None => Ok(()),
        }
    }

    /// Waits, blocking this thread, until it is unmounted and all threads of the session are gone.
    ///
    /// # Errors
    /// What the session ended with.
    pub fn join(mut self) -> Result<(), MountError> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        match thread.join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(MountError::system(&self.dir, "FUSE session", error)),
            Err(_) => Err(MountError::new(
                MountErrorKind::System,
                &self.dir,
                "the FUSE session panicked",
            )),
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // The next server goes on.
        if self.left.load(Relaxed) || self.keeper.is_some() && std::thread::panicking() {
            return;
        }
        if self.keeper.is_some() {
            // Others have it mounted elsewhere, perhaps, and it is not over because this process ends. What is
            // detached has no next server: it is served as long as this process lives.
            if self.is_mounted()
                && let Err(error) = self.let_go(Haste::Great)
            {
                tracing::warn!(%error, "a mount was not left in order");
            }
            return;
        }
        if let Err(error) = self.unmount(false).or_else(|_| self.unmount(true)) {
            tracing::warn!(%error, "could not unmount");
        }
    }
}

/// What was taken over from another server, until it is served: dropped before that, it waits for the next one.
struct Taken<'a>(Option<(&'a Session, Option<&'a Link>)>);

impl Taken<'_> {
    fn served(mut self) {
        self.0 = None;
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let Some((session, keeper)) = self.0 else {
            return;
        };
        session.device.leave();
        if let Some(Err(error)) = keeper.map(|keeper| keeper.left(&session.dir, session.id())) {
            tracing::warn!(%error, "the keeper does not know that nobody serves a mount");
        }
    }
}

/// What a session ended with. A thread that has just taken a request when the last user of a detached mount goes is
/// told ECONNABORTED instead of ENODEV (`fuse_dev_do_read` in `fs/fuse/dev.c`): over is over. For any other reason it
/// is only told so who asked for `FUSE_ABORT_ERROR`, and nobody here does.
fn over(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => Ok(()),
        result => result,
    }
}

/// Checks that this machine and this user can mount at all.
///
/// # Errors
/// [`MountErrorKind::NoFuse`], [`MountErrorKind::NoHelper`].
pub fn available() -> Result<(), MountError> {
    device::available()
}

/// Checks that `dir` can be mounted on, before anything else is done for it.
///
/// Returns it as the kernel will name it.
///
/// # Errors
/// [`MountErrorKind::Directory`], [`MountErrorKind::Mounted`].
pub fn check(dir: &Path) -> Result<PathBuf, MountError> {
    mount_point(dir)
}

/// Takes what is left of a mount away whose server died without a keeper, if that is what is on `dir`.
///
/// # Errors
/// It cannot be unmounted.
pub fn clean(dir: &Path) -> Result<(), MountError> {
    let Some(found) = find(dir)? else {
        return Ok(());
    };
    // Asked of the server; from a thread, since one that is stuck does not answer.
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let asked = found.clone();
    std::thread::Builder::new()
        .name("hearth-statfs".into())
        .spawn(move || tell.send(nix::sys::statfs::statfs(&asked).err()))
        .map_err(|e| MountError::system(dir, "thread", e))?;
    match told.recv_timeout(PATIENCE) {
        Ok(Some(Errno::ENOTCONN | Errno::ECONNABORTED)) => {
            tracing::warn!(dir = %found.display(), "its server had died: it is unmounted");
            device::unmount(&found, true)
        }
        _ => Ok(()),
    }
}

/// Takes the mount on `dir` away, whatever its server does: who waits for it gets an error.
///
/// # Errors
/// [`MountErrorKind::NotMounted`]; no right to.
pub fn unmount_forced(dir: &Path) -> Result<(), MountError> {
    let list = mounted().map_err(|e| MountError::system(dir, "mountinfo", e))?;
    if let Some(found) = find(dir)?
        && let Some(info) = list.iter().rfind(|info| info.mountpoint == found)
    {
        return device::end(&found, info.connection);
    }
    unmount(dir, true)
}

/// Unmounts what hearth mounted on `dir`, in whichever process. `lazy` detaches it even if busy.
///
/// # Errors
/// [`MountErrorKind::NotMounted`], [`MountErrorKind::Busy`].
pub fn unmount(dir: &Path, lazy: bool) -> Result<(), MountError> {
    match find(dir)? {
        Some(found) => device::unmount(&found, lazy),
        None => Err(MountError::new(
            MountErrorKind::NotMounted,
            dir,
            "nothing of hearth is mounted here",
        )),
    }
}

/// The mount point of hearth that `dir` means, as the kernel names it; relative paths and links
/// are followed.
///
/// # Errors
/// The list of mounts cannot be read.
pub fn find(dir: &Path) -> Result<Option<PathBuf>, MountError> {
    let list = mounted().map_err(|e| MountError::system(dir, "mountinfo", e))?;
    // As it is listed: other names for it may end in a slash.
    let mounted = |dir: PathBuf| {
        let found = list.iter().find(|m| m.mountpoint == dir);
        found.map(|m| m.mountpoint.clone())
    };
    // What is mounted there may be dead or stuck: look at the directory itself last.
    let plain = std::path::absolute(dir).map_err(|e| MountError::system(dir, "path", e))?;
    let mut found = mounted(plain.clone());
    if found.is_none()
        && let (Some(parent), Some(name)) = (plain.parent(), plain.file_name())
        && let Ok(parent) = parent.canonicalize()
    {
        found = mounted(parent.join(name));
    }
    if found.is_none() {
        found = plain.canonicalize().ok().and_then(mounted);
    }
    Ok(found)
}

/// `dir` as the kernel will name it, checked to be a directory with no mount of hearth on it.
fn mount_point(dir: &Path) -> Result<PathBuf, MountError> {
    let taken = |path: &Path| match table::find(path) {
        Ok(Some(info)) if info.is_hearth() => Err(MountError::new(
            MountErrorKind::Mounted,
            dir,
            "hearth is mounted here already",
        )),
        Ok(_) => Ok(()),
        Err(error) => Err(MountError::system(dir, "mountinfo", error)),
    };
    // First by name: a look at a dead mount fails, at a stuck one hangs.
    taken(&std::path::absolute(dir).map_err(|e| MountError::system(dir, "path", e))?)?;
    let directory_error = |error: io::Error| MountError {
        kind: MountErrorKind::Directory,
        dir: dir.to_owned(),
        message: format!("cannot mount here: {error}"),
        source: Some(error),
    };
    let real = dir.canonicalize().map_err(directory_error)?;
    taken(&real)?;
    if !real.metadata().map_err(directory_error)?.is_dir() {
        return Err(MountError::new(
            MountErrorKind::Directory,
            dir,
            "cannot mount here: not a directory",
        ));
    }
    Ok(real)
}

fn options(view: &View, config: &Config) -> device::Options {
    device::Options {
        read_only: !view.writable(),
        allow_other: config
            .allow_other
            .unwrap_or_else(|| nix::unistd::geteuid().is_root()),
    }
}

/// Raises the read-ahead of the mount; only root may, and nothing depends on it but speed.
fn raise_read_ahead(connection: u32, kb: u32) {
    let path = format!("/sys/class/bdi/0:{connection}/read_ahead_kb");
    if let Err(error) = std::fs::write(&path, kb.to_string()) {
        tracing::debug!(%error, path, "read-ahead stays as it is");
    }
}
