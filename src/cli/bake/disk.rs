//! Disk images of a baked directory, made by the distribution's own tools.

use std::{
    fmt, fs, io,
    os::unix::{fs::FileExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use parking_lot::Mutex;

use crate::{
    cli::output,
    digest::Digest,
    disk::{Span, lock_file},
    store::{ByteSize, label_is_plain},
};

/// Size of a block of ext4 and xfs, in bytes.
const BLOCK: u64 = 4096;
/// Of ext4 besides what is counted, in bytes: group descriptors, bitmaps, what a resize needs.
const EXT4_SLACK: u64 = 32 << 20;
/// Of xfs besides what is counted, in bytes: its log and its groups; it takes no less than 300 MiB.
const XFS_SLACK: u64 = 384 << 20;

/// File systems of disk images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// By mke2fs (e2fsprogs); can be grown
    Ext4,
    /// By mkfs.xfs (xfsprogs), as root, since it is filled through a mount; can be grown
    Xfs,
    /// By mkfs.erofs (erofs-utils): the smallest, but it cannot be grown
    Erofs,
}

/// How the content of a disk image is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Compress {
    /// Not
    None,
    /// By zstd, in erofs, with erofs-utils 1.8; nodes need Linux 6.10 to read it
    Zstd,
}

/// How large a disk image is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    /// As large as its content needs.
    Auto,
    Bytes(ByteSize),
}

impl FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            text => match text.parse()? {
                ByteSize(bytes) if bytes % BLOCK != 0 => {
                    Err(format!("expected a multiple of {BLOCK} bytes"))
                }
                bytes => Ok(Self::Bytes(bytes)),
            },
        }
    }
}

/// How often a tool is looked at that has said all.
const LOOK: Duration = Duration::from_millis(20);

/// What runs to make an image. Clones are of the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Running(Arc<Mutex<State>>);

#[derive(Debug, Default)]
enum State {
    #[default]
    Idle,
    /// A tool, and what it has started: a process group.
    Tool(Pid),
    Stopped,
}

impl Running {
    /// Ends the tool that runs, and lets no other begin.
    pub(super) fn stop(&self) {
        let mut state = self.0.lock();
        if let State::Tool(group) = *state {
            // It is gone already where that fails.
            let _ = killpg(group, Signal::SIGKILL);
        }
        *state = State::Stopped;
    }

    fn begin(&self, command: &mut Command) -> io::Result<Child> {
        let mut state = self.0.lock();
        if matches!(*state, State::Stopped) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let child = command
            .process_group(0)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        *state = State::Tool(Pid::from_raw(child.id() as i32));
        Ok(child)
    }

    /// Runs a tool to its end; what it says on standard error.
    fn run(&self, command: &mut Command) -> io::Result<(ExitStatus, String)> {
        use io::Read as _;
        let mut child = self.begin(command)?;
        let mut said = Vec::new();
        let read = match &mut child.stderr {
            Some(stderr) => stderr.read_to_end(&mut said).map(drop),
            None => Ok(()),
        };
        let status = loop {
            let mut state = self.0.lock();
            // Nobody else gets its number before that is seen here, while it cannot be stopped.
            if let Some(status) = child.try_wait()? {
                if matches!(*state, State::Tool(_)) {
                    *state = State::Idle;
                }
                break status;
            }
            drop(state);
            std::thread::sleep(LOOK);
        };
        read?;
        Ok((status, String::from_utf8_lossy(&said).trim().to_owned()))
    }
}

/// A disk image to be made.
#[derive(Debug, Clone)]
pub(super) struct Image {
    pub(super) format: Format,
    pub(super) size: Size,
    pub(super) compress: Compress,
    pub(super) label: String,
    pub(super) reproducible: bool,
}

/// What a directory needs.
#[derive(Debug, Clone, Copy, Default)]
struct Needs {
    /// Of blocks, in bytes.
    bytes: u64,
    inodes: u64,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Erofs => "erofs",
        })
    }
}

impl Format {
    /// The program, and the package that has it.
    const fn tool(self) -> (&'static str, &'static str) {
        match self {
            Self::Ext4 => ("mke2fs", "e2fsprogs"),
            Self::Xfs => ("mkfs.xfs", "xfsprogs"),
            Self::Erofs => ("mkfs.erofs", "erofs-utils"),
        }
    }

    /// Longest label, in bytes.
    const fn longest_label(self) -> usize {
        match self {
            Self::Ext4 => 16,
            Self::Xfs => 12,
            Self::Erofs => 15,
        }
    }

    /// Bytes that a file system takes for this.
    const fn takes(self, needs: Needs) -> u64 {
        let Needs { bytes, inodes } = needs;
        // Of bytes, of an inode, and of all.
        let (more, inode, slack) = match self {
            Self::Ext4 => (bytes / 32, 256, EXT4_SLACK),
            Self::Xfs => (bytes / 16, 1024, XFS_SLACK),
            Self::Erofs => (0, 128, 0),
        };
        let inodes = inodes.saturating_mul(inode);
        bytes
            .saturating_add(more)
            .saturating_add(inodes)
            .saturating_add(slack)
    }
}

/// Where an image is baked to, before it is an image.
pub(super) fn staging(image: &Path) -> PathBuf {
    beside(image, ".baking")
}

/// An image in the making.
pub(super) fn partial(image: &Path) -> PathBuf {
    beside(image, ".partial")
}

fn beside(image: &Path, end: &str) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(end);
    name.into()
}

impl Image {
    /// Whether it can be made on this machine, before anything is fetched for it.
    ///
    /// # Errors
    /// What the format cannot do, or the tool is missing.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let Self { format, label, .. } = self;
        anyhow::ensure!(
            label_is_plain(label) && label.len() <= format.longest_label(),
            "--label {label:?}: {format} takes 1 to {} bytes without slashes and control characters",
            format.longest_label()
        );
        if self.compress == Compress::Zstd && *format != Format::Erofs {
            return Err(output::hinted(
                format!("--compress zstd: {format} does not compress"),
                "say --format erofs",
            ));
        }
        if self.reproducible && *format != Format::Erofs {
            return Err(output::hinted(
                format!(
                    "--reproducible: {format} images have random ids, and files in the order of the directory they came from"
                ),
                "say --format erofs, or bake a directory",
            ));
        }
        if *format == Format::Xfs && !nix::unistd::geteuid().is_root() {
            return Err(output::hinted(
                "xfs images are filled through a mount, which only root can do",
                "--format ext4 and --format erofs need no root",
            ));
        }
        let (name, _) = format.tool();
        let asked = match format {
            Format::Erofs => "--help",
            Format::Ext4 | Format::Xfs => "-V",
        };
        let done = tool(name).arg(asked).output();
        let done = done.map_err(|error| self.no_tool(name, &error))?;
        let said = [done.stdout, done.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        if self.compress == Compress::Zstd && !said.contains("zstd") {
            return Err(output::hinted(
                "--compress zstd: the mkfs.erofs of this machine was built without it",
                "erofs-utils 1.8 has it (Debian 13), 1.5 (Debian 12) knows only lz4, with which safetensors \
                 hardly get smaller; bake where it is, or say --compress none",
            ));
        }
        Ok(())
    }

    /// Refuses what cannot fit.
    ///
    /// # Errors
    /// The arithmetic.
    pub(super) fn admit(&self, content: u64) -> anyhow::Result<()> {
        let needs = Needs {
            bytes: content,
            inodes: 0,
        };
        // How well it is compressed shows only then.
        let wanted = match self.compress {
            Compress::Zstd => 0,
            Compress::None => self.format.takes(needs),
        };
        self.fits(wanted)
    }

    fn fits(&self, wanted: u64) -> anyhow::Result<()> {
        match self.size {
            Size::Bytes(size) if size.0 < wanted => {
                let (wanted, format) = (ByteSize(wanted), self.format);
                anyhow::bail!("it does not fit: {format} needs {wanted}, --size says {size}")
            }
            Size::Auto | Size::Bytes(_) => Ok(()),
        }
    }

    /// Makes the image of a directory, which is removed then. The image is there whole or not at all.
    ///
    /// # Errors
    /// The tool is missing, or says why not; what the disk says; `running` was stopped. The directory
    /// stays.
    pub(super) fn make(&self, dir: &Path, image: &Path, running: &Running) -> anyhow::Result<()> {
        let _lock = claim(dir)?;
        anyhow::ensure!(!image.exists(), "{} is there already", image.display());
        let partial = partial(image);
        match fs::remove_file(&partial) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        if let Err(error) = self.write(dir, &partial, running) {
            let _ = fs::remove_file(&partial);
            return Err(error);
        }
        let named = fs::File::open(&partial)
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::rename(&partial, image))
            .and_then(|()| fs::File::open(image.parent().unwrap_or(image))?.sync_all());
        named.with_context(|| format!("cannot write {}", image.display()))?;
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
    }

    /// Bytes that the image of a directory takes on the disk, at most.
    ///
    /// # Errors
    /// What the disk says.
    pub(super) fn needs(&self, dir: &Path) -> anyhow::Result<u64> {
        let needs = count(dir).with_context(|| format!("cannot read {}", dir.display()))?;
        Ok(self.format.takes(needs))
    }

    fn write(&self, dir: &Path, image: &Path, running: &Running) -> anyhow::Result<()> {
        let needs = count(dir).with_context(|| format!("cannot read {}", dir.display()))?;
        if self.format != Format::Erofs {
            self.fits(self.format.takes(needs))?;
        }
        let size = match self.size {
            Size::Auto => self.format.takes(needs).next_multiple_of(1 << 20),
            Size::Bytes(size) => size.0,
        };
        let (name, _) = self.format.tool();
        let mut make = tool(name);
        match self.format {
            Format::Ext4 => {
                make.args(["-q", "-F", "-t", "ext4", "-m", "0", "-I", "256"])
                    .args(["-O", "^has_journal", "-b", &BLOCK.to_string()])
                    .args(["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"])
                    .args(["-L", &self.label, "-N", &needs.inodes.to_string(), "-d"])
                    .arg(dir)
                    .arg(image)
                    .arg(format!("{}k", size / 1024));
                self.run_well(&mut make, running)
            }
            Format::Xfs => {
                fs::File::create_new(image)?.set_len(size)?;
                make.args(["-q", "-f", "-L", &self.label]).arg(image);
                self.run_well(&mut make, running)?;
                fill(self, dir, image, running)
            }
            Format::Erofs => {
                make.args(["--quiet", "--all-root"]);
                if self.compress == Compress::Zstd {
                    make.args(["-zzstd", "-C65536"]);
                }
                if self.reproducible {
                    let lock = fs::read(dir.join("hearth.lock"))?;
                    make.args(["-T0", "-U", &uuid(&Digest::of(&lock))]);
                }
                self.run_well(make.arg(image).arg(dir), running)?;
                let file = fs::File::options().read(true).write(true).open(image)?;
                label_erofs(&file, &self.label)
                    .with_context(|| format!("cannot label {}", image.display()))?;
                let made = file.metadata()?.len();
                self.fits(made)?;
                if let Size::Bytes(size) = self.size {
                    file.set_len(size.0)?;
                }
                Ok(())
            }
        }
    }

    fn no_tool(&self, name: &str, error: &io::Error) -> anyhow::Error {
        let (tool, package) = self.format.tool();
        let package = if name == tool { package } else { "util-linux" };
        let hint = format!("install {package}, and run the command again");
        output::hinted(format!("cannot run {name}: {error}"), hint)
    }

    fn run_well(&self, command: &mut Command, running: &Running) -> anyhow::Result<()> {
        let done = running.run(command);
        let name = command.get_program().to_string_lossy();
        let (status, said) = done.map_err(|error| self.no_tool(&name, &error))?;
        anyhow::ensure!(status.success(), "{name} failed ({status}): {said}");
        Ok(())
    }
}

fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    // The directories of administrators are not in everybody's path.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    command
        .env("PATH", path)
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    command
}

/// Locks a directory as long as this process lives, and every tool that it has started.
fn claim(dir: &Path) -> anyhow::Result<fs::File> {
    let file = fs::File::open(dir).with_context(|| format!("cannot open {}", dir.display()))?;
    anyhow::ensure!(
        lock_file(&file, Span::Exclusive, false)?,
        "another process makes an image of {}",
        dir.display()
    );
    fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(file)
}

/// Copies a directory into an empty file system, which is mounted for nobody else to see: however this
/// ends, nothing stays mounted.
fn fill(image: &Image, dir: &Path, file: &Path, running: &Running) -> anyhow::Result<()> {
    const SCRIPT: &str = r#"mount -o loop,nosuid,nodev -- "$1" "$2"
cp -R --preserve=mode,timestamps --sparse=always -- "$3"/. "$2"
umount "$2""#;
    let place = beside(file, ".mount");
    fs::create_dir_all(&place)?;
    let mut filling = tool("unshare");
    filling
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-euc",
            SCRIPT,
            "sh",
        ])
        .args([file, &place, dir]);
    let filled = image.run_well(&mut filling, running);
    let removed = fs::remove_dir(&place);
    filled?;
    removed.with_context(|| format!("cannot remove {}", place.display()))
}

/// Writes the label of an erofs image (erofs_fs.h of Linux): older versions of its tool cannot.
fn label_erofs(file: &fs::File, label: &str) -> anyhow::Result<()> {
    /// Where the superblock is.
    const AT: u64 = 1024;
    const CHECKSUMMED: u8 = 1;
    let mut head = vec![0; 128];
    file.read_exact_at(&mut head, AT)?;
    anyhow::ensure!(head[..4] == [0xe2, 0xe1, 0xf5, 0xe0], "it is no erofs");
    let bits = head[12];
    anyhow::ensure!((12..=16).contains(&bits), "it has blocks of 2^{bits} bytes");
    // Its block is what the checksum is of.
    head.resize((1 << bits) - AT as usize, 0);
    file.read_exact_at(&mut head, AT)?;
    head[64..80].fill(0);
    head[64..64 + label.len()].copy_from_slice(label.as_bytes());
    if head[8] & CHECKSUMMED != 0 {
        head[4..8].fill(0);
        let checksum = crc32c(&head);
        head[4..8].copy_from_slice(&checksum.to_le_bytes());
    }
    Ok(file.write_all_at(&head, AT)?)
}

/// CRC-32C as the kernel has it: not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())
        })
    })
}

/// A UUID of version 8 (RFC 9562) that is the same for the same content.
fn uuid(digest: &Digest) -> String {
    let hex = digest.hex();
    format!(
        "{}-{}-8{}-8{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..15],
        &hex[15..18],
        &hex[18..30]
    )
}

/// What a directory needs on a file system of blocks.
fn count(dir: &Path) -> io::Result<Needs> {
    // Its own first inodes, and some to spare.
    let mut needs = Needs {
        bytes: 0,
        inodes: 64,
    };
    let mut left = vec![dir.to_owned()];
    while let Some(dir) = left.pop() {
        let mut names = 0u64;
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            let meta = entry.metadata()?;
            // In blocks of a directory that may be half full.
            names += 2 * (entry.file_name().len() as u64 + 8);
            needs.inodes += 1;
            match meta.is_dir() {
                true => left.push(entry.path()),
                false => needs.bytes += meta.len().next_multiple_of(BLOCK),
            }
        }
        needs.bytes += names.next_multiple_of(BLOCK) + BLOCK;
    }
    Ok(needs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_auto_or_blocks() {
        assert_eq!("auto".parse(), Ok(Size::Auto));
        assert_eq!("1GiB".parse(), Ok(Size::Bytes(ByteSize(1 << 30))));
        for wrong in ["", "Auto", "4097", "-1", "1e9"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn checksums_and_ids_are_those_of_their_definitions() {
        // RFC 3720, appendix B.4, before the last inversion.
        assert_eq!(!crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(!crc32c(&[0xff; 32]), 0x62a8_ab43);
        let uuid = uuid(&Digest::of(b""));
        assert_eq!(uuid, "e3b0c442-98fc-81c1-849a-fbf4c8996fb9");
    }
}
