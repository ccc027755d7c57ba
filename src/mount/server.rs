//! What serves one mount: the view, what is open in it, and how answers are made.

use std::{
    fs::File,
    ops::RangeInclusive,
    path::PathBuf,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

use fuser::{Errno, FileHandle, FopenFlags, Notifier, ReplyData, ReplyOpen};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::{
    Config,
    errno::errno,
    keeper::Link,
    opens::{Answer, Opens, Registered as _, STAY},
    pages::{Place, drop_pages},
    session::{Agreed, Backing, Device, Id, Session},
    stale::Stale,
    state::{Kind, State, Working},
    stats::{Counters, Stats},
};
use crate::{
    fetch::FetchErrorKind,
    fs::{Body, FsError, Opened, View},
    metrics,
};

/// What serves one mount; shared by its threads and tasks.
pub(super) struct Server {
    pub(super) view: Arc<View>,
    pub(super) runtime: Handle,
    pub(super) opens: Opens<Backing>,
    pub(super) state: Arc<State>,
    /// While the session runs.
    pub(super) device: Weak<Device>,
    id: Id,
    dir: PathBuf,
    keeper: Option<Arc<Link>>,
    pub(super) counters: Counters,
    pub(super) small_file: u64,
    /// Off once the kernel has refused, for want of privilege or of a suitable store.
    pub(super) passthrough: AtomicBool,
    /// What a predecessor agreed on with the kernel.
    pub(super) agreed: Option<Agreed>,
    /// Whether the kernel is to send again what this process leaves unanswered, and after the
    /// handshake whether it can.
    pub(super) resend: AtomicBool,
    /// While the session runs: it holds the number of the fd that the session uses.
    pub(super) notifier: Mutex<Option<Notifier>>,
    pub(super) stale: Stale,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

impl Server {
    pub(super) fn new(
        view: Arc<View>,
        session: &Session,
        agreed: Option<Agreed>,
        config: &Config,
        runtime: Handle,
        keeper: Option<Arc<Link>>,
    ) -> Self {
        Self {
            view,
            runtime,
            id: session.id(),
            dir: session.dir.clone(),
            keeper,
            opens: Opens::new(session.state.clone(), agreed.is_none()),
            state: session.state.clone(),
            device: Arc::downgrade(&session.device),
            agreed,
            resend: AtomicBool::new(agreed.map_or(config.resend, |agreed| agreed.resend)),
            counters: Counters::default(),
            small_file: config.small_file,
            passthrough: AtomicBool::new(config.passthrough),
            notifier: Mutex::new(None),
            stale: Stale::default(),
        }
    }

    /// Takes over what predecessors have noted as open, if there were any. Returns the inodes whose pages
    /// are to be dropped: the predecessor may have served them bytes that nobody has verified, and
    /// that this process would take for those that it serves itself.
    pub(super) fn succeed(self: &Arc<Self>, device: &Arc<Device>) -> Vec<u64> {
        let before = self.state.next_server();
        if before == 0 {
            return Vec::new();
        }
        self.view.succeed(before);
        self.state.reload();
        let mut cached: Vec<u64> = Vec::new();
        for (slot, entry) in self.state.entries() {
            match entry.kind {
                Kind::Working => continue,
                Kind::Closing(id) => {
                    drop(device.backing(id));
                    self.state.remove(slot);
                    continue;
                }
                Kind::Cached | Kind::Passthrough(_) => {}
            }
            let ino = entry.ino;
            if entry.kind == Kind::Cached {
                cached.push(ino);
            }
            let body = || match self.view.open(ino, false) {
                Ok(Opened::Body(body)) => Some(body),
                Ok(Opened::Upper) => None,
                Err(error) => {
                    tracing::warn!(ino, %error, "what is open cannot be opened again yet");
                    None
                }
            };
            let watch = |body: &dyn Body| self.watch(ino, body);
            let wrap = |id| device.backing(id);
            self.opens.restore(slot, entry, body, wrap, watch);
        }
        cached.sort_unstable();
        cached.dedup();
        cached
    }

    /// Notes that a request is in hand, where it would be lost with this process.
    pub(super) fn working(&self, request: &fuser::Request) -> Working {
        match self.resend.load(Relaxed) {
            true => Working::UNNOTED,
            false => Working::on(&self.state, request.unique().0),
        }
    }

    /// The session begins, or ends.
    pub(super) fn notify_by(&self, notifier: Option<Notifier>) {
        *self.notifier.lock() = notifier;
    }

    pub(super) fn stats(&self) -> Stats {
        self.counters.snapshot()
    }

    /// The errno of an error that is about to be answered; logged here and nowhere else.
    pub(super) fn errno(&self, op: &'static str, ino: u64, error: &FsError) -> Errno {
        match error {
            FsError::Content { .. } | FsError::Damaged(_) | FsError::Stale => {
                self.counters.errors.add(1);
                tracing::warn!(op, ino, %error, "answered with an error");
            }
            _ => tracing::debug!(op, ino, %error, "answered with an error"),
        }
        errno(error)
    }

    /// The kernel is to drop what it holds of `ino` once `body` turns out wrong.
    pub(super) fn watch(self: &Arc<Self>, ino: u64, body: &dyn Body) {
        let server = Arc::downgrade(self);
        body.on_wrong(Box::new(move || {
            if let Some(server) = server.upgrade() {
                server.distrust(ino);
            }
        }));
    }

    /// What the kernel holds of `ino` is wrong. Returns at once.
    pub(super) fn distrust(self: &Arc<Self>, ino: u64) {
        if !self.stale.add(ino) {
            return;
        }
        let server = self.clone();
        let thread = std::thread::Builder::new().name("hearth-stale".into());
        let started = thread.spawn(move || server.stale.drain(|ino| server.invalidate(ino..=ino)));
        if let Err(error) = started {
            self.stale.no_thread();
            tracing::error!(ino, %error, "the kernel keeps wrong bytes of open files: no thread");
        }
    }

    /// Lets the kernel drop its pages of these inodes; waits for those that are being read.
    pub(super) fn invalidate(&self, inodes: RangeInclusive<u64>) {
        let Some(device) = self.device.upgrade() else {
            return;
        };
        let place = Place {
            device: &device,
            id: self.id,
            dir: &self.dir,
            keeper: self.keeper.as_deref(),
        };
        match drop_pages(place, inodes.clone()) {
            Ok(done) => self.counters.invalidations.add(done.into()),
            Err(error) => tracing::error!(?inodes, %error, "the kernel keeps wrong bytes"),
        }
    }

    /// Nothing of the view is shown any more, and the kernel drops what it holds. What is open by
    /// passthrough, or mapped so, is beyond reach until it is closed. Returns at once.
    pub(super) fn refuse(self: &Arc<Self>, why: String) {
        self.view.refuse(why);
        let server = self.clone();
        let thread = std::thread::Builder::new().name("hearth-stale".into());
        let started = thread.spawn(move || {
            let inodes = server.view.artifact().tree.inodes().len() as u64;
            server.invalidate(1..=inodes);
        });
        if let Err(error) = started {
            tracing::error!(%error, "the kernel keeps what was refused: no thread");
        }
    }

    /// Answers an open by what is open already; gives the reply back where that cannot be.
    pub(super) fn reopen(&self, ino: u64, handle: u64, reply: ReplyOpen) -> Result<(), ReplyOpen> {
        let open = match self.view.check() {
            Ok(()) => self.opens.reopen(ino, handle),
            Err(_) => None,
        };
        let Some(backing) = open else {
            return Err(reply);
        };
        self.view.touch();
        self.answer_passthrough(handle, &backing, reply);
        Ok(())
    }

    fn answer_passthrough(&self, handle: u64, backing: &Backing, reply: ReplyOpen) {
        self.counters.passthrough_opens.add(1);
        // SAFETY: the id is open as long as `backing`, and only that closes it: what wraps it here
        // is taken apart again.
        let wrapped = unsafe { reply.wrap_backing(backing.id()) };
        reply.opened_passthrough(FileHandle(handle), FopenFlags::FOPEN_NOFLUSH, &wrapped);
        wrapped.into_raw();
    }

    pub(super) fn release(self: &Arc<Self>, ino: u64, handle: u64) {
        if !self.opens.release(ino, handle) {
            return;
        }
        let server = Arc::downgrade(self);
        self.runtime.spawn(async move {
            loop {
                tokio::time::sleep(STAY / 2).await;
                let Some(server) = server.upgrade() else {
                    return;
                };
                let sweep = move || server.opens.sweep(Instant::now());
                // The last close of a file that was removed may take its time.
                if !matches!(tokio::task::spawn_blocking(sweep).await, Ok(true)) {
                    return;
                }
            }
        });
    }

    pub(super) fn answer_open(
        self: &Arc<Self>,
        ino: u64,
        handle: u64,
        body: Arc<dyn Body>,
        reply: ReplyOpen,
    ) {
        let register = |file: &File| {
            if !self.passthrough.load(Relaxed) {
                return None;
            }
            self.device
                .upgrade()?
                .open_backing(file)
                .inspect_err(|error| {
                    if self.passthrough.swap(false, Relaxed) {
                        tracing::info!(%error, "no passthrough: files are read through this process");
                    }
                })
                .ok()
        };
        let watch = |body: &dyn Body| self.watch(ino, body);
        let answer = self.opens.open((ino, handle), body, register, watch);
        let file = FileHandle(handle);
        match answer {
            Some(Answer::Passthrough(backing)) => self.answer_passthrough(handle, &backing, reply),
            // Contents never change: what the kernel holds of a file stays good between opens,
            // unless it was wrong.
            Some(Answer::Cached { keep }) if keep && !self.stale.has(ino) => reply.opened(
                file,
                FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
            ),
            Some(Answer::Cached { .. }) => reply.opened(file, FopenFlags::FOPEN_NOFLUSH),
            None => {
                tracing::warn!(ino, "too many files are open in this mount");
                reply.error(Errno::ENFILE);
            }
        }
    }

    /// Fetches a small file before its open is answered: then it can be passthrough, and an error
    /// shows where programs expect one.
    pub(super) async fn open_small(
        self: Arc<Self>,
        ino: u64,
        handle: u64,
        body: Arc<dyn Body>,
        reply: ReplyOpen,
    ) {
        self.counters.small_fetches.add(1);
        match body.clone().whole().await {
            // The disk is full or broken: reads may still be answered from the origin.
            Ok(_)
            | Err(FsError::Content {
                kind: FetchErrorKind::NoSpace | FetchErrorKind::Disk,
                ..
            }) => self.answer_open(ino, handle, body, reply),
            Err(error) => reply.error(self.errno("open", ino, &error)),
        }
    }

    pub(super) fn body(&self, ino: u64) -> Result<Arc<dyn Body>, FsError> {
        self.view.check()?;
        if let Some(body) = self.opens.body(ino) {
            return Ok(body);
        }
        // Opened before this process took the session over, or by passthrough that was lost.
        match self.view.open(ino, false)? {
            Opened::Body(body) => {
                self.opens.distrust(ino);
                Ok(body)
            }
            Opened::Upper => Err(FsError::Stale),
        }
    }

    pub(super) async fn read_later(
        &self,
        ino: u64,
        body: Arc<dyn Body>,
        at: (u64, usize),
        reply: ReplyData,
    ) {
        self.counters.waited_reads.add(1);
        let begun = Instant::now();
        let read = body.read(at.0, at.1).await;
        metrics::global().mount_wait.observe(begun.elapsed());
        match self.view.check().and(read) {
            // Fewer bytes would be shown to the reader as zeros.
            Ok(bytes) if bytes.len() == at.1 => self.answer_read(&bytes, reply),
            Ok(_) => reply.error(self.errno("read", ino, &FsError::Damaged("a read was short"))),
            Err(error) => reply.error(self.errno("read", ino, &error)),
        }
    }

    pub(super) fn answer_read(&self, bytes: &[u8], reply: ReplyData) {
        self.counters.read_bytes.add(bytes.len() as u64);
        reply.data(bytes);
    }
}
