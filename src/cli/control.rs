//! How commands ask a mount process about itself: a unix socket in `<store>/run`, named after the
//! mount point. Whoever connects is sent one JSON document. Directory and socket are private to their
//! owner, and only the owner and root are answered.

use std::{
    fs::{File, Permissions},
    io::Read as _,
    os::{
        fd::AsRawFd as _,
        unix::{
            fs::{MetadataExt as _, PermissionsExt as _},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{digest::Digest, mount::Stats, socket::is_trusted, store::run_dir};

/// After a failure to take a connection.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest wait for an answer: of a mount of a million files it takes seconds.
const LIMIT: Duration = Duration::from_secs(20);
/// Longest answer taken, in bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// What a mount process says about itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct MountStatus {
    pub mountpoint: PathBuf,
    pub reference: String,
    pub revision: String,
    pub layout: String,
    /// The process that serves it.
    pub pid: u32,
    /// The process that has the mount, and starts another server if that dies.
    #[serde(default)]
    pub keeper_pid: Option<u32>,
    /// How often that has happened.
    #[serde(default)]
    pub restarts: u32,
    /// The log of these processes, where they have one of their own.
    pub log: Option<PathBuf>,
    pub total_bytes: u64,
    pub present_bytes: u64,
    /// Whether all is here.
    pub complete: bool,
    /// Whether all of that was verified on this node, and not only by whoever baked a tier.
    #[serde(default)]
    pub verified: bool,
    /// Why the background fetch stopped or waits, where it does.
    pub error: Option<String>,
    /// Whether that is tried again by itself.
    #[serde(default)]
    pub waits: bool,
    /// Answers to the kernel.
    pub mount: Stats,
    /// Every metric of the process, by name.
    pub metrics: serde_json::Map<String, serde_json::Value>,
}

/// The name of the files of a mount in `<store>/run`, without extension.
fn name(mountpoint: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    Digest::of(mountpoint.as_os_str().as_bytes()).hex()[..16].to_owned()
}

/// The log file of the mount process for `mountpoint`.
pub(super) fn log_path(root: &Path, mountpoint: &Path) -> PathBuf {
    root.join("run").join(format!("{}.log", name(mountpoint)))
}

/// Where the keeper of the mount on `mountpoint` listens.
pub(super) fn keeper_path(root: &Path, mountpoint: &Path) -> PathBuf {
    root.join("run")
        .join(format!("{}.keeper", name(mountpoint)))
}

/// Removes the log of the mount process for `mountpoint` if it had nothing to say.
pub(super) fn remove_empty_log(root: &Path, mountpoint: &Path) {
    let path = log_path(root, mountpoint);
    if path.metadata().is_ok_and(|log| log.len() == 0) {
        // What cannot be removed does no harm.
        let _ = std::fs::remove_file(path);
    }
}

/// A socket whose path may be longer than the 108 bytes that `sun_path` has room for: it is
/// reached through the open directory.
struct SocketPath {
    _dir: File,
    path: PathBuf,
}

impl SocketPath {
    fn new(dir: &Path, mountpoint: &Path) -> std::io::Result<Self> {
        let dir = File::open(dir)?;
        let path = format!(
            "/proc/self/fd/{}/{}.sock",
            dir.as_raw_fd(),
            name(mountpoint)
        );
        Ok(Self {
            path: path.into(),
            _dir: dir,
        })
    }
}

/// Answers whoever connects; stops when dropped.
pub(super) struct ControlServer {
    socket: SocketPath,
    inode: u64,
    task: tokio::task::JoinHandle<()>,
}

impl ControlServer {
    /// Serves what `status`, which may block, says for the mount on `mountpoint`.
    ///
    /// # Errors
    /// A socket that cannot be made.
    pub(super) fn start(
        root: &Path,
        mountpoint: &Path,
        status: impl Fn() -> MountStatus + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let socket = SocketPath::new(&run_dir(root)?, mountpoint)?;
        // One that is left from a process that was killed.
        let _ = std::fs::remove_file(&socket.path);
        let listener = tokio::net::UnixListener::bind(&socket.path)?;
        std::fs::set_permissions(&socket.path, Permissions::from_mode(0o600))?;
        let inode = std::fs::symlink_metadata(&socket.path)?.ino();
        let status = Arc::new(status);
        let task = tokio::spawn(async move {
            loop {
                let mut stream = match listener.accept().await {
                    Ok((stream, _)) => stream,
                    // Out of file descriptors, perhaps: there will be some again.
                    Err(error) => {
                        tracing::warn!(%error, "a question about the mount was not taken");
                        tokio::time::sleep(PAUSE).await;
                        continue;
                    }
                };
                if !is_trusted(&stream) {
                    continue;
                }
                let status = Arc::clone(&status);
                let said = tokio::task::spawn_blocking(move || serde_json::to_vec(&status()));
                let Ok(Ok(text)) = said.await else {
                    continue;
                };
                let write = tokio::io::AsyncWriteExt::write_all(&mut stream, &text);
                // Whoever does not read is not waited for.
                let _ = tokio::time::timeout(Duration::from_secs(2), write).await;
            }
        });
        Ok(Self {
            socket,
            inode,
            task,
        })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.task.abort();
        // Not that of another mount on the same directory, from which this one was detached.
        let named = std::fs::symlink_metadata(&self.socket.path);
        if named.is_ok_and(|named| named.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.socket.path);
        }
    }
}

/// Whether a process of the store at `root` serves `mountpoint`, or did so until it was killed.
pub(super) fn is_ours(root: &Path, mountpoint: &Path) -> bool {
    let socket = format!("{}.sock", name(mountpoint));
    root.join("run").join(socket).exists() || keeper_path(root, mountpoint).exists()
}

/// Asks the process that serves `mountpoint`; `None` where there is none.
///
/// # Errors
/// A process that does not answer, or not with what is expected.
pub(super) fn ask(root: &Path, mountpoint: &Path) -> std::io::Result<Option<MountStatus>> {
    let socket = match SocketPath::new(&root.join("run"), mountpoint) {
        Ok(socket) => socket,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut stream = match UnixStream::connect(&socket.path) {
        Ok(stream) => stream,
        Err(error) => {
            return match error.kind() {
                std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => Ok(None),
                _ => Err(error),
            };
        }
    };
    stream.set_read_timeout(Some(LIMIT))?;
    let mut text = Vec::new();
    match stream.by_ref().take(MAX_ANSWER).read_to_end(&mut text) {
        // It ended as it was asked.
        Ok(0) => return Ok(None),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            let (dir, limit) = (mountpoint.display(), LIMIT.as_secs());
            let message = format!("the process that serves {dir} gave no answer in {limit} s");
            return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, message));
        }
        read => read?,
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(std::io::Error::other)
}
