//! Native roots: a complete tree mounted with no process behind it.
//!
//! The metadata is an EROFS image (`image::erofs`) on a loop device, the data are the objects of a
//! store; overlayfs makes one tree of them (Documentation/filesystems/overlayfs.rst, "Data-only
//! lower layers"). What is opened is the object itself, so equal files of different roots share
//! their page cache. Called by whoever starts containers.
//!
//! Where the kernel can ([`Support::Direct`], Linux 6.16), the overlay of each container is itself laid
//! over metadata and objects, which costs no more than one over plain directories; elsewhere it lies on
//! an overlay of ours. Then the store cannot be on an overlay too: the kernel stacks two. The image is
//! on a loop device, since mounted as a file it would count as one more on some kernels, and its lock
//! (see below) would not be kept.
//!
//! One mount is seen, on the directory that was asked for. Of [`mount()`] that is the overlay; the
//! EROFS is attached to the same directory only until overlayfs has taken it over, and is gone
//! with the overlay. The loop device is cleared with the EROFS. So nothing is left behind, and a process
//! that dies half way leaves at most that one mount for [`unmount`].
//!
//! A root outlives the process that mounted it, and even its own unmounting while a container's
//! overlay is on top of it. All that time its objects must not be evicted. The kernel itself says so:
//! the image is locked (shared flock) before it is given to the loop device, which keeps the open
//! file, and with it the lock, exactly as long as the file system lives, for whichever process
//! and mount namespace. Whoever collects tries the exclusive lock: [`in_use`].

mod context;
mod device;

use std::{
    ffi::{CStr, OsString},
    fs::File,
    io,
    os::{
        fd::AsRawFd as _,
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
        },
    },
    path::{Path, PathBuf},
};

use self::{
    context::{Context, Detached},
    device::Loop,
};
use super::{MountError, MountErrorKind, device as mounts, table};
use crate::{
    digest::{Digest, ObjectId},
    disk::{Span, lock_file},
    image::erofs,
    tree::{Location, Meta, Object, Recipe, TreeBuilder},
};

/// What the overlay says it mounts.
const SOURCE: &str = "hearth";
/// The same, where it has several directories of objects.
const SOURCE_OF_SEVERAL: &str = "hearth-tiers";
/// Most directories of objects: their names go into one option of 255 bytes.
const MAX_OBJECTS: usize = 10;
/// What lets an overlay follow metadata to data; Linux 6.16 needs none of it where the data are in
/// a data-only layer.
const FOLLOW: [(&CStr, &str); 2] = [(c"redirect_dir", "on"), (c"metacopy", "on")];
/// The first kernel with data-only layers.
const KERNEL: (u32, u32) = (6, 5);

/// A mounted root; dropped = unmounted (detached where it is busy).
#[derive(Debug)]
#[must_use = "dropped at once, it is unmounted"]
pub struct Root {
    dir: Option<PathBuf>,
}

impl Root {
    /// Lets it stay mounted when this process ends; [`unmount`] takes it away.
    pub fn keep(mut self) -> PathBuf {
        self.dir.take().unwrap_or_default()
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        if let Some(dir) = &self.dir
            && let Err(error) = unmount(dir, true)
        {
            tracing::warn!(%error, "could not unmount");
        }
    }
}

/// How a container's overlay is laid over a root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// The container's overlay takes metadata and objects itself: [`mount_metadata`] once for an image,
    /// then [`lowerdir`] in the options of each overlay. Nothing lies between it and the files.
    Direct,
    /// It takes a whole root, [`mount()`], as its lower directory.
    Stacked,
}

/// Mounts the root of `image`, whose contents are in the directories `objects` of a store and its tiers
/// (of what several have, that of the first), on the directory `dir`, read-only. The caller holds the artifact until this returns; from then on the
/// image is [`in_use`].
///
/// # Errors
/// Where [`available`] would say so; an image that is missing or no EROFS; a directory that cannot be
/// mounted on.
pub fn mount(image: &Path, objects: &[impl AsRef<Path>], dir: &Path) -> Result<Root, MountError> {
    if objects.len() > MAX_OBJECTS {
        let message = format!("it would have {} directories of objects", objects.len());
        return Err(MountError::new(MountErrorKind::NoNative, dir, message));
    }
    let mut root = mount_metadata(image, dir)?;
    let Some(dir) = root.dir.clone() else {
        return Ok(root);
    };
    let fail = |doing: &'static str| {
        let dir = dir.clone();
        move |error: io::Error| MountError::system(&dir, doing, error)
    };
    let objects: Vec<&Path> = objects.iter().map(AsRef::as_ref).collect();
    let overlay =
        overlay(&dir, "::", &objects, &FOLLOW).map_err(fail("overlay of the native root"))?;
    // The overlay has a mount of its own of it.
    root.dir = None;
    mounts::unmount(&dir, true)?;
    overlay.attach(&dir).map_err(fail("native root"))?;
    root.dir = Some(dir);
    Ok(root)
}

/// Mounts only the metadata of `image` on the directory `dir`, for overlays with [`lowerdir`]; files have
/// their size here, and zeros in it. Otherwise like [`mount()`].
///
/// # Errors
/// As [`mount()`].
pub fn mount_metadata(image: &Path, dir: &Path) -> Result<Root, MountError> {
    let dir = super::mount_point(dir)?;
    if find(&dir)?.is_some() {
        let message = "a native root is mounted here already";
        return Err(MountError::new(MountErrorKind::Mounted, &dir, message));
    }
    let fail = |error| MountError::system(&dir, "metadata of the native root", error);
    let metadata = image_file_system(image).map_err(fail)?;
    metadata.attach(&dir).map_err(fail)?;
    Ok(Root { dir: Some(dir) })
}

/// The value of the option `lowerdir` of a container's overlay over the metadata mounted on
/// `metadata` and the objects of the store; no other option is needed, with or without an upper
/// directory. Only where [`Support::Direct`].
///
/// Files that the container has not changed have another `st_dev` than directories, as ever when
/// layers are on several file systems. The option `xino=on` makes it one, for inode numbers of 64 bits.
pub fn lowerdir(metadata: &Path, objects: &Path) -> OsString {
    let mut list = Vec::new();
    for (dir, separator) in [(metadata, &b"::"[..]), (objects, b"")] {
        for &byte in dir.as_os_str().as_bytes() {
            // Comma for mount(2), the others for overlayfs.
            if matches!(byte, b':' | b',' | b'\\') {
                list.push(b'\\');
            }
            list.push(byte);
        }
        list.extend(separator);
    }
    OsString::from_vec(list)
}

/// Unmounts the root on `dir`, whichever process mounted it; `lazy` even if files in it are open.
/// An overlay on top of it goes on, and keeps what it needs.
///
/// # Errors
/// [`MountErrorKind::NotMounted`], [`MountErrorKind::Busy`].
pub fn unmount(dir: &Path, lazy: bool) -> Result<(), MountError> {
    let found = find(dir)?.ok_or_else(|| {
        let message = "no native root is mounted here";
        MountError::new(MountErrorKind::NotMounted, dir, message)
    })?;
    mounts::unmount(&found, lazy)
}

/// The directory on which a native root is mounted that `dir` means, as the kernel names it.
///
/// # Errors
/// The list of mounts cannot be read.
pub fn find(dir: &Path) -> Result<Option<PathBuf>, MountError> {
    let fail = |error| MountError::system(dir, "mountinfo", error);
    // Nobody serves it who could be stuck: it may be looked at.
    let dir = dir
        .canonicalize()
        .or_else(|_| std::path::absolute(dir))
        .map_err(fail)?;
    let found = table::find(&dir).map_err(fail)?;
    Ok(found.filter(is_root).map(|info| info.mountpoint))
}

/// Whether what is mounted on `dir` is metadata only, by [`mount_metadata`].
///
/// # Errors
/// The list of mounts cannot be read.
pub fn is_metadata(dir: &Path) -> io::Result<bool> {
    Ok(table::find(dir)?.is_some_and(|info| info.fstype() == "erofs"))
}

/// Whether what is mounted on `dir`, by [`mount()`], has several directories of objects.
///
/// # Errors
/// The list of mounts cannot be read.
pub fn is_of_several(dir: &Path) -> io::Result<bool> {
    Ok(table::find(dir)?.is_some_and(|info| info.fsname == SOURCE_OF_SEVERAL))
}

/// All directories on which native roots are mounted, in the mount namespace of this process.
///
/// # Errors
/// `/proc` that cannot be read.
pub fn mounted() -> io::Result<Vec<PathBuf>> {
    let list = table::all()?.into_iter();
    Ok(list.filter(is_root).map(|info| info.mountpoint).collect())
}

/// An overlay of ours, or the metadata of one that was never finished.
fn is_root(info: &table::MountInfo) -> bool {
    match info.fstype() {
        "overlay" => [SOURCE, SOURCE_OF_SEVERAL].contains(&info.fsname.as_str()),
        "erofs" => info.fsname.starts_with("/dev/loop"),
        _ => false,
    }
}

/// Whether the root of `image` is mounted anywhere: its objects must stay.
///
/// # Errors
/// The image cannot be opened; a missing one is not in use.
pub fn in_use(image: &Path) -> io::Result<bool> {
    match File::open(image) {
        Ok(file) => Ok(!lock_file(&file, Span::Exclusive, false)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Checks that roots over the store in `store` can be mounted, with a container's overlay on top,
/// by doing it once in its directory `run`. Otherwise FUSE serves them.
///
/// # Errors
/// What is missing.
pub fn available(store: &Path) -> Result<Support, MountError> {
    let release = nix::sys::utsname::uname().map_err(|e| MountError::system(store, "uname", e))?;
    let release = release.release().to_string_lossy();
    if kernel(&release).is_some_and(|found| found < KERNEL) {
        let (major, minor) = KERNEL;
        let message = format!(
            "native roots need Linux {major}.{minor} (data-only layers of overlayfs): this is {release}"
        );
        return Err(MountError::new(MountErrorKind::NoNative, store, message));
    }
    try_out(store).map_err(|error| {
        let message = format!("native roots cannot be mounted: {error}");
        MountError::new(MountErrorKind::NoNative, store, message)
    })
}

/// The first two numbers of a release: `6.18.44-1-amd64`.
fn kernel(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Mounts a root with one file, reads it through the overlay of a container, and cleans up.
fn try_out(store: &Path) -> Result<Support, TryError> {
    const CONTENT: &[u8] = b"hearth\n";
    let run = store.join("run");
    let mut builder = std::fs::DirBuilder::new();
    builder.mode(0o700).recursive(true).create(&run)?;
    let unique = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos());
    let place = Place(run.join(format!("native-{}-{unique:x}", std::process::id())));
    let [objects, dir, other] = ["objects", "root", "other"].map(|name| place.0.join(name));
    let digest = Digest::of(CONTENT);
    let shard = objects.join("sha256").join(&digest.hex()[..2]);
    for dir in [&shard, &dir, &other] {
        builder.create(dir)?;
    }
    std::fs::write(shard.join(digest.hex()), CONTENT)?;

    let mut tree = TreeBuilder::new(Meta::dir(0));
    tree.add_file(b"file", 0, Meta::file(0))?;
    let object = Object {
        id: ObjectId::Sha256(digest),
        size: CONTENT.len() as u64,
        git_sha1: None,
        recipe: Recipe::Raw(Location {
            path: String::new(),
            generation: None,
            offset: 0,
        }),
    };
    let image = place.0.join("image");
    erofs::write(&tree.build(), &[object], File::create(&image)?)?;
    let reads = |dir: &Path| std::fs::read(dir.join("file")).is_ok_and(|read| read == CONTENT);

    let root = mount_metadata(&image, &dir)?;
    if let Ok(container) = overlay(&dir, "::", &[&objects], &[])
        && container.attach(&other).is_ok()
    {
        let read = reads(&other);
        mounts::unmount(&other, true)?;
        if read {
            return Ok(Support::Direct);
        }
    }
    drop(root);
    let root = mount(&image, &[&objects], &dir)?;
    if !reads(&dir) {
        return Err(TryError::Content);
    }
    // Any second layer will do: whether a container can have an upper one is decided elsewhere.
    overlay(&dir, ":", &[&other], &[]).map_err(TryError::Container)?;
    drop(root);
    Ok(Support::Stacked)
}

/// Why trying out did not work.
#[derive(Debug, thiserror::Error)]
enum TryError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Image(#[from] erofs::ErofsError),
    #[error(transparent)]
    Tree(#[from] crate::tree::TreeError),
    #[error(
        "the overlay of a container does not go on top of it, as if the store were on an overlay: {0}"
    )]
    Container(io::Error),
    #[error("a file had other content than its object")]
    Content,
}

/// A directory that is removed with all that is in it.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, dir = %self.0.display(), "could not remove a directory");
        }
    }
}

/// The metadata, mounted nowhere.
fn image_file_system(image: &Path) -> io::Result<Detached> {
    let file = File::open(image)?;
    lock_file(&file, Span::Shared, true)?;
    if file.metadata()?.nlink() == 0 {
        return Err(io::ErrorKind::NotFound.into());
    }
    let device = Loop::new(&file)?;
    let context = Context::new(c"erofs")?;
    context.set(c"source", &device.path.to_string_lossy())?;
    context.create()
}

/// An overlay with several lower directories, mounted nowhere.
fn overlay(
    first: &Path,
    separator: &str,
    others: &[&Path],
    options: &[(&CStr, &str)],
) -> io::Result<Detached> {
    let first = handle(first)?;
    let others: Vec<File> = others
        .iter()
        .map(|dir| handle(dir))
        .collect::<Result<_, _>>()?;
    let context = Context::new(c"overlay")?;
    let source = match others.len() {
        0 | 1 => SOURCE,
        _ => SOURCE_OF_SEVERAL,
    };
    context.set(c"source", source)?;
    // These paths are short and need no escaping, whatever the directories are called.
    let mut layers = proc_path(&first);
    for dir in &others {
        layers = layers + separator + &proc_path(dir);
    }
    context.set(c"lowerdir", &layers)?;
    for (key, value) in options {
        context.set(key, value)?;
    }
    context.create()
}

fn handle(dir: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true);
    options.custom_flags(libc::O_PATH | libc::O_DIRECTORY);
    options.open(dir)
}

fn proc_path(dir: &File) -> String {
    format!("/proc/self/fd/{}", dir.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_options_are_escaped() {
        let found = lowerdir(Path::new("/a:b,c\\d"), Path::new("/store/objects"));
        assert_eq!(found, "/a\\:b\\,c\\\\d::/store/objects");
    }

    #[test]
    fn releases_are_compared_by_number() {
        assert_eq!(kernel("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(kernel("5.4.0-1103-aws"), Some((5, 4)));
        assert_eq!(kernel("6.5-rc1"), Some((6, 5)));
        assert_eq!(kernel("what"), None);
        assert!((6, 18) > KERNEL && (6, 4) < KERNEL && (5, 15) < KERNEL);
    }
}
