//! Loop devices (loop(4)): a file as a block device.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd as _,
    path::PathBuf,
};

use nix::errno::Errno;

const CONTROL: &str = "/dev/loop-control";
/// How often another process may take the device that was free.
const ATTEMPTS: u32 = 100;

// include/uapi/linux/loop.h
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
const DIRECT_IO: u32 = 16;

#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
pub(super) struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

nix::ioctl_none_bad!(get_free, 0x4C82);
nix::ioctl_write_ptr_bad!(configure, 0x4C0A, LoopConfig);

/// A loop device, read-only, that is cleared when nothing uses it any more: this or a file system
/// that is mounted from it.
pub(super) struct Loop {
    pub(super) path: PathBuf,
    _device: File,
}

impl Loop {
    /// A free device over `file`. The kernel keeps the open file itself, with the locks on it, until
    /// the device is cleared.
    pub(super) fn new(file: &File) -> io::Result<Self> {
        let naming = |path: &str| {
            let path = path.to_owned();
            move |error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"))
        };
        let read_write = || {
            let mut options = OpenOptions::new();
            options.read(true).write(true);
            options
        };
        let control = read_write().open(CONTROL).map_err(naming(CONTROL))?;
        // SAFETY: an integer for which zero is valid, and arrays of such.
        let mut config: LoopConfig = unsafe { std::mem::zeroed() };
        config.fd = file.as_raw_fd() as u32;
        config.info.flags = READ_ONLY | AUTOCLEAR | DIRECT_IO;
        for _ in 0..ATTEMPTS {
            // SAFETY: takes no pointer.
            let number = unsafe { get_free(control.as_raw_fd()) }?;
            let path = format!("/dev/loop{number}");
            let device = OpenOptions::new()
                .read(true)
                .open(&path)
                .map_err(naming(&path))?;
            // SAFETY: the struct is laid out as the kernel's and lives until the call is over.
            match unsafe { configure(device.as_raw_fd(), &raw const config) } {
                Ok(_) => {
                    return Ok(Self {
                        path: path.into(),
                        _device: device,
                    });
                }
                Err(Errno::EBUSY | Errno::EINTR) => {}
                Err(error) => return Err(naming(&path)(error.into())),
            }
        }
        Err(io::Error::from(Errno::EBUSY))
    }
}
