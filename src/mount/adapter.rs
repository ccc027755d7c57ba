//! The FUSE protocol: decode, call `fs`, answer.

use std::{
    cell::RefCell,
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::{errno::errno, server::Server, session::RESENT};
use crate::{
    disk::AlignedBuf,
    fs::{Attr, BLOCK, Change, FileKind, FsError, Opened, Owner, UPPER},
};

/// How long the kernel may keep names and attributes: for ever, since they never change but by its
/// own hand. (It adds this to its clock, so the largest duration would overflow.)
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const GENERATION: Generation = Generation(0);
/// Of files of the upper, which know their opens themselves.
const UPPER_HANDLE: FileHandle = FileHandle(0);
/// Requests the kernel sends ahead of any reader (read-ahead) before it holds back.
const BACKGROUND: u16 = 128;
/// Bytes of the largest request. What kernels allow unless told otherwise (fs.fuse.max_pages_limit);
/// with 4 MiB reads are slower, since they no longer fit into the processor's caches.
const REQUEST: u32 = 1 << 20;

thread_local! {
    /// Where this thread reads what it answers.
    static BUFFER: RefCell<Option<AlignedBuf>> = const { RefCell::new(None) };
}

/// The server as fuser wants it.
pub(super) struct Adapter(pub(super) Arc<Server>);

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_MAX_PAGES;
        if self.0.resend.load(Relaxed) {
            wanted |= InitFlags::FUSE_HAS_RESEND;
        }
        let agreed = self.0.agreed.is_some_and(|agreed| agreed.passthrough);
        if agreed || self.0.passthrough.load(Relaxed) {
            wanted |= InitFlags::FUSE_PASSTHROUGH;
        }
        let wanted = wanted & config.capabilities();
        if wanted.contains(InitFlags::FUSE_PASSTHROUGH) {
            // 1: the store is no stacked file system, and an overlay may be put on this mount.
            let _ = config.set_max_stack_depth(1);
        } else {
            self.0.passthrough.store(false, Relaxed);
        }
        config
            .add_capabilities(wanted)
            .map_err(|_| io::Error::from_raw_os_error(libc::EPROTO))?;
        // Bounds reads too.
        let _ = config.set_max_write(REQUEST);
        let _ = config.set_max_background(BACKGROUND);
        let _ = config.set_congestion_threshold(BACKGROUND);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _working = self.0.working(request);
        let server = &self.0;
        server.counters.lookups.add(1);
        match server.view.lookup(parent.0, name.as_bytes()) {
            Ok(attr) => reply.entry(&FOREVER, &file_attr(&attr), GENERATION),
            // Inode 0 is "no such file", and may be kept like any other answer.
            Err(FsError::NotFound) => reply.entry(&FOREVER, &NOTHING, GENERATION),
            Err(error) => reply.error(server.errno("lookup", parent.0, &error)),
        }
    }

    fn forget(&self, _: &Request, _: INodeNo, _: u64) {
        self.0.counters.forgets.add(1);
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let _working = self.0.working(request);
        let server = &self.0;
        server.counters.getattrs.add(1);
        match server.view.attr(ino.0) {
            Ok(attr) => reply.attr(&FOREVER, &file_attr(&attr)),
            Err(error) => reply.error(server.errno("getattr", ino.0, &error)),
        }
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        let _working = self.0.working(request);
        match self.0.view.readlink(ino.0) {
            Ok(target) => reply.data(target),
            Err(error) => reply.error(self.0.errno("readlink", ino.0, &error)),
        }
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let server = &self.0;
        let working = server.working(request);
        server.counters.opens.add(1);
        let ino = ino.0;
        let handle = request.unique().0 & !RESENT;
        let write = flags.0 & libc::O_ACCMODE != libc::O_RDONLY;
        let reply = match write {
            true => reply,
            false => match server.reopen(ino, handle, reply) {
                Ok(()) => return,
                Err(reply) => reply,
            },
        };
        match server.view.open(ino, write) {
            Ok(Opened::Upper) => reply.opened(UPPER_HANDLE, FopenFlags::FOPEN_KEEP_CACHE),
            Ok(Opened::Body(body)) => {
                let small = body.size() <= server.small_file;
                if small && !body.is_verified() {
                    let server = server.clone();
                    self.0.runtime.spawn(async move {
                        server.open_small(ino, handle, body, reply).await;
                        drop(working);
                    });
                } else {
                    server.answer_open(ino, handle, body, reply);
                }
            }
            Err(error) => reply.error(server.errno("open", ino, &error)),
        }
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let working = self.0.working(request);
        let server = &self.0;
        server.counters.reads.add(1);
        let ino = ino.0;
        if ino >= UPPER {
            return match server.view.read_upper(ino, offset, size as usize) {
                Ok(data) => server.answer_read(&data, reply),
                Err(error) => reply.error(server.errno("read", ino, &error)),
            };
        }
        let body = match server.body(ino) {
            Ok(body) => body,
            Err(error) => return reply.error(server.errno("read", ino, &error)),
        };
        let left = body.size().saturating_sub(offset);
        let len = usize::try_from(left).map_or(size as usize, |left| left.min(size as usize));
        if len == 0 {
            return reply.data(&[]);
        }
        BUFFER.with_borrow_mut(|buffer| {
            // Aligned, so that the store can read into it past the page cache.
            let buffer = match buffer {
                Some(buffer) if buffer.capacity() >= len => buffer,
                other => other.insert(AlignedBuf::with_capacity(len.max(REQUEST as usize))),
            };
            let data = &mut buffer.spare_mut()[..len];
            match body.try_read(offset, data) {
                Ok(true) => server.answer_read(data, reply),
                Ok(false) => {
                    let server = server.clone();
                    self.0.runtime.spawn(async move {
                        server.read_later(ino, body, (offset, len), reply).await;
                        drop(working);
                    });
                }
                Err(error) => reply.error(server.errno("read", ino, &error)),
            }
        });
    }

    fn release(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let _working = self.0.working(request);
        let server = &self.0;
        server.counters.releases.add(1);
        if ino.0 >= UPPER {
            server.view.release(ino.0);
        } else {
            server.release(ino.0, handle.0);
        }
        reply.ok();
    }

    fn opendir(&self, request: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let _working = self.0.working(request);
        // Not needed, and the kernel need not ask again; it also caches directories then.
        reply.error(Errno::ENOSYS);
    }

    fn readdir(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let _working = self.0.working(request);
        let server = &self.0;
        server.counters.readdirs.add(1);
        let result = server.view.readdir(ino.0, offset, &mut |entry| {
            let name = OsStr::from_bytes(entry.name);
            let kind = file_type(entry.attr.kind);
            !reply.add(INodeNo(entry.attr.ino), entry.next, kind, name)
        });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(server.errno("readdir", ino.0, &error)),
        }
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let _working = self.0.working(request);
        let server = &self.0;
        server.counters.readdirs.add(1);
        let result = server.view.readdir(ino.0, offset, &mut |entry| {
            let name = OsStr::from_bytes(entry.name);
            let attr = file_attr(&entry.attr);
            !reply.add(attr.ino, entry.next, name, &FOREVER, &attr, GENERATION)
        });
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(server.errno("readdirplus", ino.0, &error)),
        }
    }

    fn statfs(&self, request: &Request, _: INodeNo, reply: ReplyStatfs) {
        let _working = self.0.working(request);
        let s = self.0.view.statfs();
        reply.statfs(
            s.blocks,
            s.free_blocks,
            s.free_blocks,
            s.files,
            s.free_files,
            BLOCK,
            crate::tree::MAX_NAME as u32,
            BLOCK,
        );
    }

    fn getxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let _working = self.0.working(request);
        if !self.0.view.has_xattrs() {
            // The kernel asks no more.
            return reply.error(Errno::ENOSYS);
        }
        match self.0.view.xattr(ino.0, name.as_bytes()) {
            Ok(value) => answer_xattr(value, size, reply),
            // So common (security.capability, ACLs) that it is no error worth counting.
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let _working = self.0.working(request);
        if !self.0.view.has_xattrs() {
            return reply.error(Errno::ENOSYS);
        }
        match self.0.view.xattr_names(ino.0) {
            Ok(names) => answer_xattr(&names, size, reply),
            Err(error) => reply.error(self.0.errno("listxattr", ino.0, &error)),
        }
    }

    fn ioctl(
        &self,
        request: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        let _working = self.0.working(request);
        // Python asks of each file that it opens whether it is a terminal, and the kernel remembers no answer.
        reply.error(Errno::ENOTTY);
    }

    // From here on: what the upper of the hub layout takes.

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let _working = self.0.working(request);
        let server = &self.0;
        server.counters.opens.add(1);
        match server
            .view
            .create(parent.0, name.as_bytes(), mode as u16, owner(request))
        {
            Ok(attr) => reply.created(
                &FOREVER,
                &file_attr(&attr),
                GENERATION,
                UPPER_HANDLE,
                FopenFlags::FOPEN_KEEP_CACHE,
            ),
            Err(error) => reply.error(server.errno("create", parent.0, &error)),
        }
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        let _working = self.0.working(request);
        match self
            .0
            .view
            .mkdir(parent.0, name.as_bytes(), mode as u16, owner(request))
        {
            Ok(attr) => reply.entry(&FOREVER, &file_attr(&attr), GENERATION),
            Err(error) => reply.error(self.0.errno("mkdir", parent.0, &error)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        let _working = self.0.working(request);
        reply.error(self.0.errno("mknod", parent.0, &FsError::NotPermitted));
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _working = self.0.working(request);
        let result = self.0.view.unlink(parent.0, name.as_bytes());
        self.answer_empty("unlink", parent, result, reply);
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _working = self.0.working(request);
        let result = self.0.view.rmdir(parent.0, name.as_bytes());
        self.answer_empty("rmdir", parent, result, reply);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        to_parent: INodeNo,
        to_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let _working = self.0.working(request);
        let keep = flags == RenameFlags::RENAME_NOREPLACE;
        let result = if keep || flags.is_empty() {
            let to = (to_parent.0, to_name.as_bytes());
            self.0.view.rename((parent.0, name.as_bytes()), to, keep)
        } else {
            Err(FsError::Invalid)
        };
        self.answer_empty("rename", parent, result, reply);
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _working = self.0.working(request);
        match self.0.view.write(ino.0, offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(self.0.errno("write", ino.0, &error)),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let _working = self.0.working(request);
        let mtime = mtime.map(|time| match time {
            TimeOrNow::SpecificTime(time) => time,
            TimeOrNow::Now => SystemTime::now(),
        });
        let change = Change {
            mode: mode.map(|m| m as u16),
            uid,
            gid,
            size,
            mtime: mtime.map(|time| {
                let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
                (since.as_secs() as i64, since.subsec_nanos())
            }),
        };
        match self.0.view.setattr(ino.0, &change) {
            Ok(attr) => reply.attr(&FOREVER, &file_attr(&attr)),
            Err(error) => reply.error(self.0.errno("setattr", ino.0, &error)),
        }
    }

    fn flush(&self, request: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        let _working = self.0.working(request);
        // Nothing is kept back, here and in the two below; the kernel asks no more.
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, request: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let _working = self.0.working(request);
        reply.error(Errno::ENOSYS);
    }

    fn fsyncdir(&self, request: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let _working = self.0.working(request);
        reply.error(Errno::ENOSYS);
    }
}

impl Adapter {
    fn answer_empty(
        &self,
        op: &'static str,
        ino: INodeNo,
        result: Result<(), FsError>,
        reply: ReplyEmpty,
    ) {
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(self.0.errno(op, ino.0, &error)),
        }
    }
}

fn owner(request: &Request) -> Owner {
    Owner {
        uid: request.uid(),
        gid: request.gid(),
    }
}

fn answer_xattr(value: &[u8], size: u32, reply: ReplyXattr) {
    match (u32::try_from(value.len()), size) {
        (Ok(len), 0) => reply.size(len),
        (Ok(len), size) if len <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}

fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Dir => FileType::Directory,
        FileKind::File => FileType::RegularFile,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Char => FileType::CharDevice,
        FileKind::Block => FileType::BlockDevice,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
    }
}

const NOTHING: FileAttr = FileAttr {
    ino: INodeNo(0),
    size: 0,
    blocks: 0,
    atime: UNIX_EPOCH,
    mtime: UNIX_EPOCH,
    ctime: UNIX_EPOCH,
    crtime: UNIX_EPOCH,
    kind: FileType::RegularFile,
    perm: 0,
    nlink: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
    flags: 0,
    blksize: BLOCK,
};

fn file_attr(attr: &Attr) -> FileAttr {
    let (seconds, nanos) = attr.mtime;
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let mtime = if seconds >= 0 {
        UNIX_EPOCH.checked_add(whole)
    } else {
        UNIX_EPOCH.checked_sub(whole)
    };
    let mtime = mtime
        .and_then(|t| t.checked_add(Duration::from_nanos(nanos.into())))
        .unwrap_or(UNIX_EPOCH);
    let (major, minor) = attr.device;
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.size.div_ceil(512),
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: mtime,
        kind: file_type(attr.kind),
        perm: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        // The kernel's new_decode_dev (include/linux/kdev_t.h).
        rdev: (major & 0xfff) << 8 | minor & 0xff | (minor & 0xf_ff00) << 12,
        ..NOTHING
    }
}
