//! The mounts that make a snapshot out of its layers: those that containerd's own overlay
//! snapshotter gives. containerd itself shortens options that do not fit into a page, which works
//! where the paths of the layers begin alike.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{Kind, SnapshotError};
use crate::disk::DiskError;

/// What to give to mount(2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `bind` or `overlay`.
    pub fs_type: &'static str,
    /// The directory of a bind mount.
    pub source: String,
    /// As in fstab(5).
    pub options: Vec<String>,
}

/// The directories of a snapshot.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    pub(super) kind: Kind,
    pub(super) content: &'a Path,
    pub(super) work: &'a Path,
    /// Of the layers below, the topmost first.
    pub(super) layers: &'a [PathBuf],
    /// Where the contents of files are of which the lowest layer has only what else there is.
    pub(super) contents: &'a [PathBuf],
    /// Whether overlayfs takes the option `index`.
    pub(super) has_index: bool,
}

/// The mounts of a snapshot.
///
/// # Errors
/// Paths that cannot stand in mount options.
pub(super) fn mounts(parts: &Parts<'_>) -> Result<Vec<Mount>, SnapshotError> {
    let is_view = parts.kind != Kind::Active;
    let bind = |dir: &Path, how: &str| -> Result<Vec<Mount>, SnapshotError> {
        Ok(vec![Mount {
            fs_type: "bind",
            source: text(dir)?.to_owned(),
            options: vec![how.to_owned(), "rbind".to_owned()],
        }])
    };
    match parts.layers {
        [] => return bind(parts.content, if is_view { "ro" } else { "rw" }),
        [layer] if is_view && parts.contents.is_empty() => return bind(layer, "ro"),
        _ => {}
    }
    let mut options = Vec::new();
    if parts.has_index {
        // Several containers share lower directories, and some of these are mounts of hearth.
        options.push("index=off".to_owned());
    }
    if !is_view {
        options.push(format!("workdir={}", text(parts.work)?));
        options.push(format!("upperdir={}", text(parts.content)?));
    }
    let layers: Vec<&str> = parts
        .layers
        .iter()
        .map(|l| text(l))
        .collect::<Result<_, _>>()?;
    let mut lowerdir = format!("lowerdir={}", layers.join(":"));
    for contents in parts.contents {
        lowerdir.push_str("::");
        lowerdir.push_str(text(contents)?);
    }
    options.push(lowerdir);
    Ok(vec![Mount {
        fs_type: "overlay",
        source: "overlay".to_owned(),
        options,
    }])
}

/// A path that can stand in mount options as it is: overlayfs would take some characters for
/// separators.
///
/// # Errors
/// One that cannot.
pub(super) fn text(path: &Path) -> Result<&str, SnapshotError> {
    let fits = |text: &&str| !text.contains([':', ',', '\\', '"']);
    path.to_str().filter(fits).ok_or_else(|| {
        SnapshotError::Invalid(format!(
            "the path {} cannot stand in mount options: choose one without colon, comma, quote \
             and backslash",
            path.display()
        ))
    })
}

/// Tries whether overlayfs can write to the file system of the directory `root`.
///
/// # Errors
/// It cannot: that is an overlay or has no `d_type` or extended attributes, say; or this process may
/// not mount.
pub fn check_overlay(root: &Path) -> Result<(), SnapshotError> {
    let dir = root.join("check");
    let fail = |what| {
        let dir = dir.clone();
        move |error: std::io::Error| SnapshotError::from(DiskError::new(what, dir, error))
    };
    let path = |name: &str| dir.join(name);
    for name in ["lower", "upper", "work", "merged"] {
        std::fs::create_dir_all(path(name)).map_err(fail("make"))?;
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        text(&path("lower"))?,
        text(&path("upper"))?,
        text(&path("work"))?
    );
    let merged = path("merged");
    let mounted = mount(
        Some("overlay"),
        &merged,
        Some("overlay"),
        MsFlags::empty(),
        Some(&*options),
    );
    let tried = mounted
        .map_err(std::io::Error::from)
        // Without an upper directory that it can use, overlayfs mounts read-only.
        .and_then(|()| {
            std::fs::write(merged.join("file"), "")
                .and(umount2(&merged, MntFlags::MNT_DETACH).map_err(Into::into))
        });
    if tried.is_err() {
        // Where it was not mounted there is nothing to take away.
        let _ = umount2(&merged, MntFlags::MNT_DETACH);
    }
    std::fs::remove_dir_all(&dir).map_err(fail("remove"))?;
    tried.map_err(|source| SnapshotError::Overlay {
        dir: root.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: Kind, layers: &[&str]) -> (&'static str, String, String) {
        with_contents(kind, layers, &[])
    }

    fn with_contents(
        kind: Kind,
        layers: &[&str],
        contents: &[PathBuf],
    ) -> (&'static str, String, String) {
        let layers: Vec<PathBuf> = layers.iter().map(PathBuf::from).collect();
        let mounts = mounts(&Parts {
            kind,
            content: Path::new("/r/s/9/fs"),
            work: Path::new("/r/s/9/work"),
            layers: &layers,
            contents,
            has_index: true,
        });
        let [mount] = mounts.unwrap().try_into().unwrap();
        (mount.fs_type, mount.source, mount.options.join(","))
    }

    #[test]
    fn mounts_are_those_of_containerd() {
        let bind = |dir: &str, options: &str| ("bind", dir.to_owned(), options.to_owned());
        assert_eq!(of(Kind::Active, &[]), bind("/r/s/9/fs", "rw,rbind"));
        assert_eq!(of(Kind::View, &[]), bind("/r/s/9/fs", "ro,rbind"));
        assert_eq!(of(Kind::View, &["/a"]), bind("/a", "ro,rbind"));
        let overlay = |options: &str| ("overlay", "overlay".to_owned(), options.to_owned());
        assert_eq!(
            of(Kind::View, &["/b", "/a"]),
            overlay("index=off,lowerdir=/b:/a")
        );
        assert_eq!(
            of(Kind::Active, &["/b", "/a"]),
            overlay("index=off,workdir=/r/s/9/work,upperdir=/r/s/9/fs,lowerdir=/b:/a")
        );
        assert_eq!(
            of(Kind::Active, &["/a"]).2,
            "index=off,workdir=/r/s/9/work,upperdir=/r/s/9/fs,lowerdir=/a"
        );
        let contents = ["/o".into(), "/p".into()];
        assert_eq!(
            with_contents(Kind::View, &["/a"], &contents[..1]),
            overlay("index=off,lowerdir=/a::/o")
        );
        assert_eq!(
            with_contents(Kind::Active, &["/b", "/a"], &contents).2,
            "index=off,workdir=/r/s/9/work,upperdir=/r/s/9/fs,lowerdir=/b:/a::/o::/p"
        );
        assert!(text(Path::new("/a:b")).is_err() && text(Path::new("/a,b")).is_err());
    }
}
