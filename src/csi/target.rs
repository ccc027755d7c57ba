//! Where volumes are published: bind mounts, read-only.

use std::{fs, io, os::unix::fs::DirBuilderExt as _, path::Path};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};
use serde::{Deserialize, Serialize};

use super::{CsiError, CsiErrorKind, Model};
use crate::mount::{shows, stack};

/// What a mount may be told beyond that it is read-only, `nosuid` and `nodev`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Flags {
    pub noexec: bool,
}

/// Mounts models where they are wanted.
pub trait Targets: Send + Sync {
    /// Whether something can be mounted on `target`: it, or the directory that it is to be made in, is there.
    ///
    /// # Errors
    /// Why not.
    fn check(&self, target: &Path) -> Result<(), CsiError>;

    /// Mounts `model` on `target`, which is made where it is not there. Fine where it is; what is there of hearth
    /// otherwise goes.
    ///
    /// # Errors
    /// Something else is mounted there; what the system says.
    fn attach(&self, model: &Model, target: &Path, flags: Flags) -> Result<(), CsiError>;

    /// Whether `model` is mounted on `target`.
    fn is_attached(&self, model: &Model, target: &Path) -> bool;

    /// Whether hearth has anything mounted on `target`; true where that cannot be known.
    fn is_mounted(&self, target: &Path) -> bool;

    /// Whether even the directory that `target` is made in is gone: whoever wanted it does not want it any more.
    fn is_gone(&self, target: &Path) -> bool;

    /// Takes away what hearth mounted on `target`; and `target` itself, where there was something or it is `ours`.
    ///
    /// # Errors
    /// What the system says.
    fn detach(&self, target: &Path, ours: bool) -> Result<(), CsiError>;
}

/// Bind mounts in the mount namespace of this process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Binds;

impl Targets for Binds {
    fn check(&self, target: &Path) -> Result<(), CsiError> {
        let invalid =
            |why: String| CsiError::invalid(format!("target_path {}: {why}", target.display()));
        // By name first: a look at a mount whose server died fails, at one that is stuck hangs.
        if !here(target)?.is_empty() {
            return Ok(());
        }
        match fs::symlink_metadata(target) {
            Ok(meta) if meta.is_dir() => return Ok(()),
            Ok(_) => return Err(invalid("is there, and is no directory".into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(invalid(error.to_string())),
        }
        let parent = target.parent().unwrap_or(Path::new("/"));
        match fs::metadata(parent) {
            Ok(meta) if meta.is_dir() => Ok(()),
            Ok(_) => Err(invalid(format!("{} is no directory", parent.display()))),
            Err(error) => Err(invalid(format!("{}: {error}", parent.display()))),
        }
    }

    fn attach(&self, model: &Model, target: &Path, flags: Flags) -> Result<(), CsiError> {
        if shows(target, model.connection) {
            return protect(target, flags);
        }
        // What a process before this one served, and is dead.
        clear(target, &here(target)?, false)?;
        match fs::DirBuilder::new().mode(0o750).create(target) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("make", target, &error));
            }
            _ => {}
        }
        let is_dir = fs::symlink_metadata(target).is_ok_and(|meta| meta.is_dir());
        if !is_dir {
            let message = format!("target_path {} is no directory", target.display());
            return Err(CsiError::invalid(message));
        }
        let none = None::<&str>;
        mount(Some(&model.dir), target, none, MsFlags::MS_BIND, none)
            .map_err(|e| failed("mount on", target, &e.into()))?;
        // What the model was mounted on may have lost it just now, and is a directory like any other.
        let bound = match shows(target, model.connection) {
            true => protect(target, flags),
            false => Err(CsiError::new(
                CsiErrorKind::Unavailable,
                format!(
                    "model {} was unmounted meanwhile: ask again",
                    model.reference
                ),
            )),
        };
        bound.inspect_err(|_| {
            let _ = umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        })
    }

    fn is_attached(&self, model: &Model, target: &Path) -> bool {
        shows(target, model.connection)
    }

    fn is_mounted(&self, target: &Path) -> bool {
        here(target).map_or(true, |mounts| !mounts.is_empty())
    }

    fn is_gone(&self, target: &Path) -> bool {
        let parent = target.parent().unwrap_or(Path::new("/"));
        fs::symlink_metadata(parent).is_err_and(|e| e.kind() == io::ErrorKind::NotFound)
    }

    fn detach(&self, target: &Path, ours: bool) -> Result<(), CsiError> {
        clear(target, &here(target)?, ours)
    }
}

/// Takes `mounts`, which are [`here`], away; as [`Targets::detach`].
fn clear(target: &Path, mounts: &[u32], ours: bool) -> Result<(), CsiError> {
    for _ in mounts {
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Somebody has a file open: it stays until that is closed, but not here.
            Err(Errno::EBUSY) => {
                umount2(target, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)
                    .map_err(|e| failed("unmount", target, &e.into()))?;
            }
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(error) => return Err(failed("unmount", target, &error.into())),
        }
    }
    if mounts.is_empty() && !ours {
        return Ok(());
    }
    match fs::remove_dir(target) {
        Ok(()) => Ok(()),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Ok(()),
            // Of somebody else, who has mounted or put something there.
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy => Ok(()),
            _ => Err(failed("remove", target, &error)),
        },
    }
}

/// The FUSE connections that hearth has mounted on exactly `target`, the topmost last.
fn here(target: &Path) -> Result<Vec<u32>, CsiError> {
    stack(target).map_err(|e| failed("look for", target, &e))
}

/// Has nobody write through this mount, whoever that is.
fn protect(target: &Path, flags: Flags) -> Result<(), CsiError> {
    let mut how = MsFlags::MS_BIND
        | MsFlags::MS_REMOUNT
        | MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV;
    how.set(MsFlags::MS_NOEXEC, flags.noexec);
    let none = None::<&str>;
    mount(none, target, none, how, none)
        .map_err(|e| failed("make read-only what is on", target, &e.into()))
}

fn failed(what: &str, target: &Path, error: &io::Error) -> CsiError {
    let message = format!("cannot {what} {}: {error}", target.display());
    CsiError::new(CsiErrorKind::Internal, message)
}
