//! Disk images of a baked directory, made by the distribution's own tools.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::Context as _;

use crate::cli::output;

/// Size of a block of ext4, in bytes.
const BLOCK: u64 = 4096;
/// Of ext4 besides what is counted, in bytes: group descriptors, bitmaps, what a resize needs.
const SLACK: u64 = 32 << 20;
/// Label of an ext4 image.
const LABEL: &str = "hearth";

/// File systems of disk images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// By mke2fs (e2fsprogs), labelled "hearth"
    Ext4,
    /// By mkfs.erofs (erofs-utils), not compressed
    Erofs,
}

/// Where an image is baked to, before it is an image.
pub(super) fn staging(image: &Path) -> PathBuf {
    beside(image, ".baking")
}

fn beside(image: &Path, end: &str) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(end);
    name.into()
}

/// Makes the image of a directory, which is removed then. The image is there whole or not at all.
///
/// # Errors
/// The tool is missing, or says why not; what the disk says. The directory stays.
pub(super) fn make(format: Format, dir: &Path, image: &Path) -> anyhow::Result<()> {
    let partial = beside(image, ".partial");
    let mut command = match format {
        Format::Ext4 => {
            let (bytes, inodes) = count(dir)?;
            let mut command = Command::new("mke2fs");
            command
                .args(["-q", "-F", "-t", "ext4", "-m", "0", "-I", "256"])
                .args(["-O", "^has_journal", "-b", &BLOCK.to_string()])
                .args(["-E", "lazy_itable_init=1,nodiscard", "-L", LABEL])
                .args(["-N", &inodes.to_string(), "-d"])
                .arg(dir)
                .arg(&partial)
                .arg(format!("{}k", (bytes + bytes / 32 + SLACK).div_ceil(1024)));
            command
        }
        Format::Erofs => {
            let mut command = Command::new("mkfs.erofs");
            command.arg("--quiet").arg(&partial).arg(dir);
            command
        }
    };
    match fs::remove_file(&partial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let name = command.get_program().to_string_lossy().into_owned();
    // The directories of administrators are not in everybody's path.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let done = command
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            let package = match format {
                Format::Ext4 => "e2fsprogs",
                Format::Erofs => "erofs-utils",
            };
            let hint = format!("install {package}, and run the command again: it goes on here");
            output::hinted(format!("cannot run {name}: {error}"), hint)
        })?;
    if !done.status.success() {
        let _ = fs::remove_file(&partial);
        let said = String::from_utf8_lossy(&done.stderr);
        anyhow::bail!("{name} failed ({}): {}", done.status, said.trim());
    }
    let named = fs::File::open(&partial)
        .and_then(|file| file.sync_all())
        .and_then(|()| fs::rename(&partial, image))
        .and_then(|()| fs::File::open(image.parent().unwrap_or(image))?.sync_all());
    named.with_context(|| format!("cannot write {}", image.display()))?;
    fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
}

/// What ext4 needs for a directory: bytes of blocks and tables, and inodes.
fn count(dir: &Path) -> io::Result<(u64, u64)> {
    // Its own first inodes, and some to spare.
    let (mut bytes, mut inodes) = (0u64, 64u64);
    let mut left = vec![dir.to_owned()];
    while let Some(dir) = left.pop() {
        let mut names = 0u64;
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            let meta = entry.metadata()?;
            // In blocks of a directory that may be half full.
            names += 2 * (entry.file_name().len() as u64 + 8);
            inodes += 1;
            match meta.is_dir() {
                true => left.push(entry.path()),
                false => bytes += meta.len().next_multiple_of(BLOCK),
            }
        }
        bytes += names.next_multiple_of(BLOCK) + BLOCK;
    }
    Ok((bytes + inodes * 256, inodes))
}
