//! Files and directories of this machine (or a network file system on it).
//!
//! A file is pinned by the time of its last change, its size and its inode; every piece read is
//! checked against them before it is given out. Symlinks are followed as long as they stay within
//! the directory that was named, or, for a snapshot in a Hub cache, within its `blobs`.

use std::{
    ffi::OsStr,
    fs::{File, Metadata, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use sha2::{Digest as _, Sha256};
use tokio::task::spawn_blocking;

use super::{
    ByteStream, Config, Source, SourceError, SourceErrorKind,
    listing::{Listed, Listing},
};
use crate::{
    digest::{ObjectId, to_hex},
    reference::{Locator, Reference},
    tree::{Artifact, Location, MAX_PATH},
};

/// Bytes read at once.
const PIECE: u64 = 1 << 20;

/// A file or directory.
#[derive(Debug)]
pub(super) struct FileSource {
    root: String,
    max_entries: usize,
}

impl FileSource {
    /// The file or directory at `root`, absolute.
    pub(super) fn new(root: &str, config: &Config) -> Self {
        Self {
            root: root.to_owned(),
            max_entries: config.max_entries.get(),
        }
    }
}

#[async_trait::async_trait]
impl Source for FileSource {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        if !matches!(&reference.locator, Locator::File(path) if *path == self.root) {
            return Err(invalid(
                &self.root,
                "another file or directory was asked for",
            ));
        }
        let root = PathBuf::from(&self.root);
        let listing = Listing::new(reference, String::new())?.with_max_entries(self.max_entries);
        let walk = Walk {
            listing,
            revision: Sha256::new(),
            seen: 0,
            max_entries: self.max_entries,
        };
        blocking(&self.root, move || walk.all(&root)).await
    }

    fn origin(&self) -> String {
        format!("file://{}", self.root)
    }

    async fn read(
        &self,
        location: &Location,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        let path = location.path.clone();
        let pinned = location.generation.clone();
        let size = range.end;
        let reader = blocking(&location.path, move || {
            let reader = Reader {
                file: open(&path)?,
                path,
                pinned,
            };
            let held = reader.check()?;
            if size > held {
                let message = format!("has {held} bytes, fewer than resolved");
                return Err(SourceError::new(
                    SourceErrorKind::Changed,
                    &reader.path,
                    message,
                ));
            }
            Ok(reader)
        })
        .await?;
        let state = Some((Arc::new(reader), range));
        Ok(stream::unfold(state, next_piece).boxed())
    }
}

/// An open file and what it is pinned to.
#[derive(Debug)]
struct Reader {
    file: File,
    path: String,
    pinned: Option<String>,
}

type Rest = Option<(Arc<Reader>, Range<u64>)>;

/// The next piece of the range; an error is the last.
async fn next_piece(state: Rest) -> Option<(Result<Bytes, SourceError>, Rest)> {
    let (reader, range) = state?;
    if range.is_empty() {
        return None;
    }
    let length = PIECE.min(range.end - range.start);
    let shared = Arc::clone(&reader);
    let at = range.start;
    let piece = blocking(&reader.path, move || shared.piece(at, length as usize)).await;
    let rest = piece.is_ok().then(|| (reader, at + length..range.end));
    Some((piece, rest))
}

impl Reader {
    /// Its size.
    fn check(&self) -> Result<u64, SourceError> {
        let meta = self.file.metadata().map_err(|e| failed(&self.path, &e))?;
        if self
            .pinned
            .as_ref()
            .is_some_and(|pinned| *pinned != generation(&meta))
        {
            let message = "was changed since it was resolved";
            return Err(SourceError::new(
                SourceErrorKind::Changed,
                &self.path,
                message,
            ));
        }
        Ok(meta.len())
    }

    fn piece(&self, at: u64, length: usize) -> Result<Bytes, SourceError> {
        let mut piece = vec![0; length];
        match self.file.read_exact_at(&mut piece, at) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                self.check()?;
                let message = "ended before the end of the range";
                return Err(SourceError::new(
                    SourceErrorKind::Corrupt,
                    &self.path,
                    message,
                ));
            }
            Err(e) => return Err(failed(&self.path, &e)),
        }
        self.check()?;
        Ok(piece.into())
    }
}

/// Opens a regular file; never waits for the other end of a pipe.
fn open(path: &str) -> Result<File, SourceError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|e| failed(path, &e))?;
    let meta = file.metadata().map_err(|e| failed(path, &e))?;
    if meta.is_file() {
        Ok(file)
    } else {
        Err(SourceError::new(
            SourceErrorKind::Changed,
            path,
            "is no regular file any more",
        ))
    }
}

fn generation(meta: &Metadata) -> String {
    let mtime = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
    format!("{mtime}:{}:{}", meta.len(), meta.ino())
}

/// Lists what is below a directory, in the order of names.
struct Walk {
    listing: Listing,
    revision: Sha256,
    /// Names looked at, of every kind.
    seen: usize,
    max_entries: usize,
}

/// A directory to list.
struct Directory {
    /// Where it is, without symlinks.
    real: PathBuf,
    /// Its path in the artifact; empty for the root.
    path: String,
    /// The real directories it was reached through: what a cycle of symlinks would repeat.
    above: Option<Arc<Directory>>,
}

impl Walk {
    fn all(mut self, named: &Path) -> Result<Artifact, SourceError> {
        let root = named
            .canonicalize()
            .map_err(|e| failed(&named.to_string_lossy(), &e))?;
        let meta = root
            .metadata()
            .map_err(|e| failed(&root.to_string_lossy(), &e))?;
        if meta.is_file() {
            // The name that was asked for, not that of a blob it links to.
            let name = named.file_name().unwrap_or_else(|| OsStr::new("file"));
            let name = text(Path::new(name))?;
            self.add(&name, &root, &meta)?;
        } else if meta.is_dir() {
            self.below(&root)?;
        } else {
            return Err(invalid(
                &root.to_string_lossy(),
                "is neither file nor directory",
            ));
        }
        let revision: [u8; 32] = self.revision.finalize().into();
        self.listing.set_revision(to_hex(&revision));
        self.listing.finish()
    }

    fn below(&mut self, root: &Path) -> Result<(), SourceError> {
        let mut within = vec![root.to_path_buf()];
        within.extend(hub_blobs(root));
        let mut stack = vec![Directory {
            real: root.to_path_buf(),
            path: String::new(),
            above: None,
        }];
        while let Some(directory) = stack.pop() {
            let directory = Arc::new(directory);
            let names = self.names(&directory.real)?;
            // The stack gives back the last first.
            let mut inner = Vec::new();
            for name in names {
                let path = match directory.path.as_str() {
                    "" => name.clone(),
                    parent => format!("{parent}/{name}"),
                };
                if path.len() > MAX_PATH {
                    let shown = directory.real.to_string_lossy();
                    return Err(invalid(&shown, "has paths longer than 4096 bytes"));
                }
                if let Some(real) = self.entry(&directory, &name, &path, &within)? {
                    inner.push(Directory {
                        real,
                        path,
                        above: Some(Arc::clone(&directory)),
                    });
                }
            }
            stack.extend(inner.into_iter().rev());
        }
        Ok(())
    }

    /// Adds the file `name` of `directory`, or gives the real path of a directory of that name.
    fn entry(
        &mut self,
        directory: &Arc<Directory>,
        name: &str,
        path: &str,
        within: &[PathBuf],
    ) -> Result<Option<PathBuf>, SourceError> {
        let place = directory.real.join(name);
        let shown = place.to_string_lossy();
        let meta = place.symlink_metadata().map_err(|e| failed(&shown, &e))?;
        let (real, meta) = if meta.is_symlink() {
            let target = place.canonicalize().and_then(|to| Ok((to.metadata()?, to)));
            let (meta, to) = match target {
                Ok(target) => target,
                // Left out by the filter: not worth an error.
                Err(_) if !self.listing.wants(path) => return Ok(None),
                Err(e) => return Err(failed(&shown, &e).because("a symlink that leads nowhere")),
            };
            if !meta.is_dir() && !self.listing.wants(path) {
                return Ok(None);
            }
            if !within.iter().any(|root| to.starts_with(root)) {
                return Err(invalid(&shown, "a symlink that leaves the directory")
                    .with_hint("name a directory that holds both ends, or ?exclude= the link"));
            }
            if meta.is_dir() && repeats(directory, &to) {
                return Err(invalid(&shown, "a symlink to a directory that contains it"));
            }
            (to, meta)
        } else {
            (place.clone(), meta)
        };
        if meta.is_dir() {
            return Ok(Some(real));
        }
        // Devices, pipes and sockets hold no content.
        if meta.is_file() {
            self.add(path, &real, &meta)?;
        }
        Ok(None)
    }

    fn names(&mut self, directory: &Path) -> Result<Vec<String>, SourceError> {
        let shown = directory.to_string_lossy();
        let mut names = Vec::new();
        for entry in directory.read_dir().map_err(|e| failed(&shown, &e))? {
            let entry = entry.map_err(|e| failed(&shown, &e))?;
            self.seen += 1;
            if self.seen > self.max_entries {
                return Err(self.listing.too_many());
            }
            let name = entry.file_name();
            let name = name.to_str().ok_or_else(|| {
                invalid(
                    &entry.path().to_string_lossy(),
                    "has a name that is not UTF-8",
                )
            })?;
            names.push(name.to_owned());
        }
        names.sort_unstable();
        Ok(names)
    }

    fn add(&mut self, path: &str, real: &Path, meta: &Metadata) -> Result<(), SourceError> {
        let generation = generation(meta);
        let real = text(real)?;
        if self.listing.wants(path) {
            for part in [path, &generation] {
                self.revision.update((part.len() as u64).to_le_bytes());
                self.revision.update(part.as_bytes());
            }
        }
        self.listing.add(Listed {
            path,
            size: meta.len(),
            id: ObjectId::located(&format!("file://{real}"), &generation, meta.len()),
            git_sha1: None,
            location: Location {
                path: real,
                generation: Some(generation),
                offset: 0,
            },
            mtime: meta.mtime(),
            executable: meta.mode() & 0o111 != 0,
        })
    }
}

fn repeats(directory: &Arc<Directory>, real: &Path) -> bool {
    let mut next = Some(directory);
    while let Some(directory) = next {
        if directory.real == real {
            return true;
        }
        next = directory.above.as_ref();
    }
    false
}

/// `models--org--name/blobs`, where `root` is (in) a snapshot of it: its files link there.
fn hub_blobs(root: &Path) -> Option<PathBuf> {
    let snapshots = root
        .ancestors()
        .find(|p| p.file_name() == Some(OsStr::new("snapshots")))?;
    let repository = snapshots.parent()?;
    let name = repository.file_name()?.to_str()?;
    let known = ["models--", "datasets--", "spaces--"]
        .iter()
        .any(|k| name.starts_with(k));
    let blobs = repository.join("blobs");
    (known && blobs.is_dir())
        .then(|| blobs.canonicalize().ok())
        .flatten()
}

fn text(path: &Path) -> Result<String, SourceError> {
    match path.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(invalid(
            &path.to_string_lossy(),
            "has a name that is not UTF-8",
        )),
    }
}

fn invalid(what: &str, message: &str) -> SourceError {
    SourceError::new(SourceErrorKind::Invalid, what, message)
}

fn failed(what: &str, error: &io::Error) -> SourceError {
    let kind = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => SourceErrorKind::NotFound,
        io::ErrorKind::PermissionDenied => SourceErrorKind::Denied,
        io::ErrorKind::StaleNetworkFileHandle => SourceErrorKind::Changed,
        io::ErrorKind::InvalidFilename => SourceErrorKind::Invalid,
        _ if error.raw_os_error() == Some(libc::ELOOP) => SourceErrorKind::Invalid,
        _ => SourceErrorKind::Unavailable,
    };
    SourceError::new(kind, what, error.to_string())
}

/// Runs `work` where it may wait for a disk.
async fn blocking<T, F>(what: &str, work: F) -> Result<T, SourceError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, SourceError> + Send + 'static,
{
    spawn_blocking(work).await.unwrap_or_else(|_| {
        Err(SourceError::new(
            SourceErrorKind::Unavailable,
            what,
            "the read was given up",
        ))
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn source(path: &Path, query: &str) -> (FileSource, Reference) {
        let path = path.to_str().unwrap();
        let reference = format!("file://{path}{query}").parse().unwrap();
        (FileSource::new(path, &Config::default()), reference)
    }

    async fn paths(path: &Path, query: &str) -> Result<Vec<String>, SourceError> {
        let (source, reference) = source(path, query);
        let artifact = source.resolve(&reference).await?;
        Ok(artifact
            .tree
            .files()
            .into_iter()
            .map(|(path, ..)| path)
            .collect())
    }

    #[tokio::test]
    async fn symlinks_within_the_root_are_followed_and_others_refused() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("root");
        fs::create_dir_all(root.join("blobs")).unwrap();
        fs::create_dir_all(root.join("snapshots/r1")).unwrap();
        fs::write(root.join("blobs/abc"), "weights").unwrap();
        symlink("../../blobs/abc", root.join("snapshots/r1/model.bin")).unwrap();
        symlink("r1", root.join("snapshots/latest")).unwrap();
        assert_eq!(
            paths(&root, "").await.unwrap(),
            [
                "blobs/abc",
                "snapshots/latest/model.bin",
                "snapshots/r1/model.bin"
            ]
        );
        let (files, reference) = source(&root, "");
        assert_eq!(files.resolve(&reference).await.unwrap().objects.len(), 1);

        let snapshot = root.join("snapshots/r1");
        let error = paths(&snapshot, "").await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::Invalid);
        assert!(error.to_string().contains("model.bin"), "{error}");

        let hub = temp.path().join("models--org--name");
        fs::rename(&root, &hub).unwrap();
        assert_eq!(
            paths(&hub.join("snapshots/r1"), "").await.unwrap(),
            ["model.bin"]
        );
        let one = hub.join("snapshots/r1/model.bin");
        assert_eq!(paths(&one, "").await.unwrap(), ["model.bin"]);
    }

    #[tokio::test]
    async fn cycles_dangling_links_and_special_files_do_no_harm() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("a")).unwrap();
        fs::create_dir_all(root.join("b")).unwrap();
        fs::write(root.join("a/file"), "x").unwrap();
        nix::unistd::mkfifo(&root.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(paths(&root, "").await.unwrap(), ["a/file"]);

        symlink("../b", root.join("a/to-b")).unwrap();
        symlink("../a", root.join("b/to-a")).unwrap();
        let error = paths(&root, "").await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::Invalid);
        assert!(error.to_string().contains("contains it"), "{error}");
        fs::remove_file(root.join("b/to-a")).unwrap();

        symlink("nowhere", root.join("b/dangling")).unwrap();
        let error = paths(&root, "").await.unwrap_err();
        assert!(error.to_string().contains("dangling"), "{error}");
        assert_eq!(paths(&root, "?exclude=dangling").await.unwrap(), ["a/file"]);
    }

    #[tokio::test]
    async fn a_change_while_reading_is_noticed() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("big");
        fs::write(&path, vec![1; 3 << 20]).unwrap();
        let (source, reference) = source(&path, "");
        let artifact = source.resolve(&reference).await.unwrap();
        let location = artifact.objects[0].recipe.location().unwrap();
        let mut body = source.read(location, 0..3 << 20).await.unwrap();
        assert_eq!(body.next().await.unwrap().unwrap().len(), 1 << 20);
        fs::write(&path, vec![2; 3 << 20]).unwrap();
        let error = body.next().await.unwrap().unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::Changed);
        assert!(body.next().await.is_none());
    }

    #[tokio::test]
    async fn too_many_names_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        for n in 0..4 {
            fs::create_dir(temp.path().join(n.to_string())).unwrap();
        }
        let config = toml::from_str("max_entries = 3").unwrap();
        let (_, reference) = source(temp.path(), "");
        let source = FileSource::new(temp.path().to_str().unwrap(), &config);
        let error = source.resolve(&reference).await.unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::Invalid);
    }
}
