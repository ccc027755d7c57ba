//! mount: a [`View`] on the kernel's side of `/dev/fuse`. The only room that imports fuser.
//!
//! `device` mounts and unmounts, `table` reads the kernel's list of mounts, `adapter` decodes requests,
//! calls `fs` and answers, `opens` decides between passthrough and FUSE reads, `stale`
//! has the kernel drop what turned out wrong, `errno` is the one
//! table from errors to errno. Called by `daemon` and `cli`.
//!
//! Invariants: no thread of a session waits for the network (such requests become tasks of the
//! runtime); this process never touches a path below its own mount, not even with `stat`; every
//! answer is immutable, so the kernel may keep it for ever, except content that was served before it
//! was verified and then turned out wrong: it is told to drop that. File handles carry no state: what is
//! open is known by inode, so a successor can take the session over (mounting is apart from serving).
//! Nothing here survives a crash: the kernel answers ENOTCONN until the mount is taken away.

mod adapter;
mod device;
mod errno;
pub mod native;
mod opens;
mod server;
mod stale;
mod stats;
mod table;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
};

use serde::{Deserialize, Serialize};
use tokio::{runtime::Handle, sync::watch};

use self::{adapter::Adapter, server::Server};
pub use self::{
    stats::Stats,
    table::{MountInfo, mounted},
};
use crate::fs::View;

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
}

impl Default for Config {
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8)),
            read_ahead_kb: 1024,
            passthrough: true,
            small_file: crate::chunk::CHUNK_SIZE,
            allow_other: None,
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
            MountErrorKind::System => None,
        }
    }
}

/// A mounted view; dropped = unmounted (detached where it is busy).
#[derive(Debug)]
pub struct Mount {
    dir: PathBuf,
    connection: u32,
    server: Arc<Server>,
    ended: watch::Receiver<bool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Mount {
    /// Mounts `view` on directory `dir` and serves it from threads of its own; waiting for content
    /// happens on `runtime`.
    ///
    /// # Errors
    /// A directory that cannot be mounted on, a system without FUSE, no right to mount.
    pub fn new(
        view: Arc<View>,
        dir: &Path,
        config: &Config,
        runtime: Handle,
    ) -> Result<Self, MountError> {
        let dir = mount_point(dir)?;
        let options = device::Options {
            read_only: !view.writable(),
            allow_other: config
                .allow_other
                .unwrap_or_else(|| nix::unistd::geteuid().is_root()),
        };
        let fd = device::mount(&dir, options)?;
        // From here on an early return has to take the mount away.
        let mut undo = Undo(Some(dir.clone()));
        let found = table::find(&dir).map_err(|e| MountError::system(&dir, "mountinfo", e))?;
        let connection = found
            .ok_or_else(|| MountError::new(MountErrorKind::System, &dir, "is not in mountinfo"))?
            .connection;

        let server = Arc::new(Server::new(view, config, runtime));
        let mut settings = fuser::Config::default();
        settings.n_threads = Some(config.threads.clamp(1, 64));
        // With it, most requests in flight are lost when a successor takes the session over.
        settings.clone_fd = false;
        // Who may come in is decided by the kernel (allow_other, default_permissions).
        let session = fuser::Session::from_fd(
            Adapter(server.clone()),
            fd,
            fuser::SessionACL::All,
            settings,
        )
        .map_err(|e| MountError::system(&dir, "FUSE handshake", e))?;
        server.notify_by(Some(session.notifier()));
        raise_read_ahead(connection, config.read_ahead_kb);

        let (tell, ended) = watch::channel(false);
        let serving = server.clone();
        let thread = std::thread::Builder::new()
            .name("hearth-mount".into())
            .spawn(move || {
                let result = session.run();
                serving.notify_by(None);
                tell.send_replace(true);
                result
            })
            .map_err(|e| MountError::system(&dir, "thread", e))?;
        undo.0 = None;
        Ok(Self {
            dir,
            connection,
            server,
            ended,
            thread: Some(thread),
        })
    }

    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Number of the FUSE connection (`/sys/fs/fuse/connections/<n>`).
    pub fn connection(&self) -> u32 {
        self.connection
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

    /// Unmounts; fine where it is unmounted already. `lazy` detaches it at once, and what is open
    /// below stays readable until it is closed, as long as this process lives.
    ///
    /// # Errors
    /// [`MountErrorKind::Busy`] where files are open and `lazy` is not set.
    pub fn unmount(&self, lazy: bool) -> Result<(), MountError> {
        let there = table::find(&self.dir)
            .map_err(|e| MountError::system(&self.dir, "mountinfo", e))?
            .is_some_and(|m| m.connection == self.connection);
        if *self.ended.borrow() || !there {
            return Ok(());
        }
        device::unmount(&self.dir, lazy)
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
        if let Err(error) = self.unmount(false).or_else(|_| self.unmount(true)) {
            tracing::warn!(%error, "could not unmount");
        }
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
    let is_mounted = |dir: &Path| list.iter().any(|m| m.mountpoint == dir);
    // What is mounted there may be dead or stuck: look at the directory itself last.
    let plain = std::path::absolute(dir).map_err(|e| MountError::system(dir, "path", e))?;
    let mut found = Some(plain.clone()).filter(|p| is_mounted(p));
    if found.is_none()
        && let (Some(parent), Some(name)) = (plain.parent(), plain.file_name())
        && let Ok(parent) = parent.canonicalize()
    {
        found = Some(parent.join(name)).filter(|p| is_mounted(p));
    }
    if found.is_none() {
        found = plain.canonicalize().ok().filter(|p| is_mounted(p));
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

/// Raises the read-ahead of the mount; only root may, and nothing depends on it but speed.
fn raise_read_ahead(connection: u32, kb: u32) {
    let path = format!("/sys/class/bdi/0:{connection}/read_ahead_kb");
    if let Err(error) = std::fs::write(&path, kb.to_string()) {
        tracing::debug!(%error, path, "read-ahead stays as it is");
    }
}

struct Undo(Option<PathBuf>);

impl Drop for Undo {
    fn drop(&mut self) {
        if let Some(dir) = &self.0
            && let Err(error) = device::unmount(dir, true)
        {
            tracing::warn!(%error, "could not unmount");
        }
    }
}
