//! From what an origin lists to an [`Artifact`]: the filter, the bounds, the tree.
//!
//! Every source builds its artifacts here, so that hostile listings are refused in one place:
//! paths that escape, that are there twice or are both file and directory, too many entries, sizes
//! no file can have.

use std::collections::{HashMap, HashSet, hash_map};

use super::{SourceError, SourceErrorKind};
use crate::{
    digest::ObjectId,
    reference::{Matcher, Reference},
    tree::{Artifact, Kind, Location, MAX_INODES, Meta, Object, Recipe, TreeBuilder, TreeError},
};

/// What to do about a listing with too many files. What a filter leaves out has been listed all the same.
pub(super) const TOO_MANY: &str =
    "name a smaller part of it (a longer prefix), or raise source.max_entries";

/// Largest size of a file that is believed, in bytes.
const MAX_SIZE: u64 = 1 << 60;

/// One file as its origin lists it.
#[derive(Debug, Clone)]
pub(crate) struct Listed<'a> {
    /// Relative to the reference, without leading slash.
    pub(crate) path: &'a str,
    /// Bytes.
    pub(crate) size: u64,
    pub(crate) id: ObjectId,
    pub(crate) git_sha1: Option<[u8; 20]>,
    pub(crate) location: Location,
    /// Seconds since the epoch.
    pub(crate) mtime: i64,
    /// Whether the file may be executed.
    pub(crate) executable: bool,
}

/// An object that files are cut from.
#[derive(Debug, Clone)]
pub(crate) struct Whole {
    pub(crate) id: ObjectId,
    /// Bytes.
    pub(crate) size: u64,
    pub(crate) location: Location,
}

/// Collects the files of one reference.
pub(crate) struct Listing {
    reference: String,
    revision: String,
    matcher: Matcher,
    tree: TreeBuilder,
    objects: Vec<Object>,
    by_id: HashMap<ObjectId, u32>,
    dirs: HashSet<String>,
    total: u64,
    listed: usize,
    filtered: usize,
    max_entries: usize,
}

impl Listing {
    /// An empty listing of what `reference` means at `revision`.
    ///
    /// # Errors
    /// A filter that does not compile.
    pub(crate) fn new(reference: &Reference, revision: String) -> Result<Self, SourceError> {
        let name = reference.to_string();
        let matcher = reference.filter.matcher().map_err(|e| {
            SourceError::new(SourceErrorKind::Invalid, &name, "its filter cannot be used")
                .because(e)
        })?;
        Ok(Self {
            reference: name,
            revision,
            matcher,
            tree: TreeBuilder::new(Meta::dir(0)),
            objects: Vec::new(),
            by_id: HashMap::new(),
            dirs: HashSet::new(),
            total: 0,
            listed: 0,
            filtered: 0,
            max_entries: MAX_INODES,
        })
    }

    /// With a smaller bound on how many entries are looked at, filtered ones included.
    pub(crate) fn with_max_entries(mut self, max: usize) -> Self {
        self.max_entries = max.min(MAX_INODES);
        self
    }

    /// Sets the revision, where it is known only after the files.
    pub(crate) fn set_revision(&mut self, revision: String) {
        self.revision = revision;
    }

    /// Whether the filter of the reference lets `path` pass.
    pub(crate) fn wants(&self, path: &str) -> bool {
        self.matcher.matches(path)
    }

    /// Counts a file that the filter removes, where the source need not learn more about it.
    pub(crate) fn skip(&mut self) {
        self.filtered += 1;
    }

    /// Adds a file, unless the filter removes it.
    ///
    /// # Errors
    /// A path that escapes, is too long, is there twice or is a directory too; a size that cannot
    /// be; too many entries.
    pub(crate) fn add(&mut self, file: Listed<'_>) -> Result<(), SourceError> {
        if self.admit(file.path, file.size)? {
            let recipe = Recipe::Raw(file.location.clone());
            self.add_file(&file, recipe)?;
        }
        Ok(())
    }

    /// Adds a file that is bytes `file.location.offset..` of `whole`, unless the filter removes it.
    ///
    /// # Errors
    /// As [`Listing::add`].
    pub(crate) fn add_slice(
        &mut self,
        whole: &Whole,
        file: &Listed<'_>,
    ) -> Result<(), SourceError> {
        if !self.admit(file.path, file.size)? {
            return Ok(());
        }
        let container = Object {
            id: whole.id,
            size: whole.size,
            git_sha1: None,
            recipe: Recipe::Raw(whole.location.clone()),
        };
        let object = self.object(file.path, container)?;
        let offset = file.location.offset;
        self.add_file(file, Recipe::Slice { object, offset })
    }

    /// Adds a directory, which may be there already.
    ///
    /// # Errors
    /// As [`Listing::add`].
    pub(crate) fn add_dir(&mut self, path: &str) -> Result<(), SourceError> {
        self.count()?;
        if !self.dirs.contains(path) {
            let entries = Vec::new();
            let kind = Kind::Dir { parent: 0, entries };
            let added = self.tree.add(path.as_bytes(), kind, Meta::dir(0));
            added.map_err(|error| self.refuse(error))?;
            self.dirs.insert(path.to_owned());
        }
        Ok(())
    }

    /// Adds a symbolic link, unless the filter removes it.
    ///
    /// # Errors
    /// As [`Listing::add`]; a target that no link can have.
    pub(crate) fn add_symlink(&mut self, path: &str, target: &str) -> Result<(), SourceError> {
        if self.admit(path, 0)? {
            let target = target.as_bytes().into();
            let mut meta = Meta::file(0);
            meta.mode = 0o777;
            let added = self
                .tree
                .add(path.as_bytes(), Kind::Symlink { target }, meta);
            added.map_err(|error| self.refuse(error))?;
        }
        Ok(())
    }

    /// The artifact.
    ///
    /// # Errors
    /// [`SourceErrorKind::NotFound`] where no file is left.
    pub(crate) fn finish(self) -> Result<Artifact, SourceError> {
        if self.objects.is_empty() {
            let error = |message| {
                SourceError::new(SourceErrorKind::NotFound, self.reference.clone(), message)
            };
            return Err(if self.filtered > 0 {
                error(format!("none of {} files passes its filter", self.filtered))
                    .with_hint("check the include and exclude globs of the reference")
            } else {
                error("no files there".to_owned())
            });
        }
        Ok(Artifact {
            reference: self.reference,
            revision: self.revision,
            tree: self.tree.build(),
            objects: self.objects,
        })
    }

    /// The refusal of a listing that exceeds the bound.
    pub(crate) fn too_many(&self) -> SourceError {
        self.invalid(format!("has more than {} files", self.max_entries))
            .with_hint(TOO_MANY)
    }

    fn count(&mut self) -> Result<(), SourceError> {
        self.listed += 1;
        match self.listed > self.max_entries {
            true => Err(self.too_many()),
            false => Ok(()),
        }
    }

    /// Counts a file, and says whether it is wanted.
    fn admit(&mut self, path: &str, size: u64) -> Result<bool, SourceError> {
        self.count()?;
        if !self.wants(path) {
            self.filtered += 1;
            return Ok(false);
        }
        let total = self.total.checked_add(size);
        if size > MAX_SIZE || total.is_none_or(|total| total > MAX_SIZE) {
            let path = short(path);
            return Err(self.invalid(format!("file {path:?} is said to have {size} bytes")));
        }
        self.total += size;
        Ok(true)
    }

    /// The number of an object, which may be there already.
    fn object(&mut self, path: &str, object: Object) -> Result<u32, SourceError> {
        let next = self.objects.len() as u32;
        match self.by_id.entry(object.id) {
            hash_map::Entry::Occupied(known) => {
                let known = *known.get();
                let size = self.objects[known as usize].size;
                if size != object.size {
                    return Err(self.invalid(format!(
                        "file {:?} is said to have {} bytes, and {size} elsewhere with the same id",
                        short(path),
                        object.size
                    )));
                }
                Ok(known)
            }
            hash_map::Entry::Vacant(free) => {
                free.insert(next);
                self.objects.push(object);
                Ok(next)
            }
        }
    }

    fn add_file(&mut self, file: &Listed<'_>, recipe: Recipe) -> Result<(), SourceError> {
        let object = Object {
            id: file.id,
            size: file.size,
            git_sha1: file.git_sha1,
            recipe,
        };
        let object = self.object(file.path, object)?;
        let mut meta = Meta::file(file.mtime);
        if file.executable {
            meta.mode = 0o555;
        }
        self.tree
            .add_file(file.path.as_bytes(), object, meta)
            .map_err(|error| self.refuse(error))?;
        Ok(())
    }

    fn invalid(&self, message: String) -> SourceError {
        SourceError::new(SourceErrorKind::Invalid, self.reference.clone(), message)
    }

    fn refuse(&self, error: TreeError) -> SourceError {
        let hint = matches!(error, TreeError::Path { .. })
            .then_some("leave that file out with ?exclude=, or name a smaller part");
        let refused = self.invalid(format!("cannot be a directory tree: {error}"));
        match hint {
            Some(hint) => refused.with_hint(hint),
            None => refused,
        }
    }
}

/// `path`, shortened for a message.
pub(crate) fn short(path: &str) -> String {
    path.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(reference: &str) -> Listing {
        Listing::new(&reference.parse().unwrap(), "r1".into()).unwrap()
    }

    fn file(path: &str, size: u64) -> Listed<'_> {
        Listed {
            path,
            size,
            id: ObjectId::located(path, "g", size),
            git_sha1: None,
            location: Location {
                path: path.into(),
                generation: Some("g".into()),
                offset: 0,
            },
            mtime: 7,
            executable: path.ends_with(".sh"),
        }
    }

    #[test]
    fn files_become_a_tree_and_equal_ids_one_object() {
        let mut list = listing("s3://b/p/?exclude=*.bin");
        list.add(file("a/b/c", 3)).unwrap();
        list.add(file("run.sh", 4)).unwrap();
        list.add(file("a/x.bin", 9)).unwrap();
        list.add(Listed {
            path: "a/copy",
            ..file("a/b/c", 3)
        })
        .unwrap();
        let artifact = list.finish().unwrap();
        assert_eq!(artifact.reference, "s3://b/p/?exclude=*.bin");
        assert_eq!(artifact.revision, "r1");
        assert_eq!(artifact.size(), 7);
        let files = artifact.tree.files();
        let paths: Vec<_> = files.iter().map(|(path, ..)| path.as_str()).collect();
        assert_eq!(paths, ["a/b/c", "a/copy", "run.sh"]);
        assert_eq!(files[0].2, files[1].2);
        let mode = |at: usize| artifact.tree.get(files[at].1).unwrap().meta.mode;
        assert_eq!((mode(0), mode(2)), (0o444, 0o555));
    }

    #[test]
    fn hostile_paths_are_refused_by_name() {
        let long = "n".repeat(256);
        let deep = "d/".repeat(3000) + "f";
        for path in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a/..",
            ".",
            "a/./b",
            "a//b",
            "a/",
            "a\0b",
            &long,
            &deep,
        ] {
            let error = listing("s3://b/p/").add(file(path, 1)).unwrap_err();
            assert_eq!(error.kind(), SourceErrorKind::Invalid, "{path:?}");
            let text = error.to_string();
            assert!(
                text.starts_with("s3://b/p/: ") && text.len() < 600,
                "{text}"
            );
        }
    }

    #[test]
    fn clashes_are_refused() {
        for (first, second) in [("a", "a"), ("a", "a/b"), ("a/b", "a")] {
            let mut list = listing("s3://b/p/");
            list.add(file(first, 1)).unwrap();
            let error = list.add(file(second, 1)).unwrap_err();
            assert_eq!(error.kind(), SourceErrorKind::Invalid);
            assert!(error.hint().is_some());
        }
        let mut list = listing("s3://b/p/");
        list.add(file("a", 1)).unwrap();
        let other_size = Listed {
            path: "b",
            size: 2,
            ..file("a", 1)
        };
        assert!(list.add(other_size).is_err());
    }

    #[test]
    fn counts_and_sizes_are_bounded() {
        let mut list = listing("s3://b/p/?include=x").with_max_entries(2);
        list.add(file("a", 1)).unwrap();
        list.add(file("x", 1)).unwrap();
        let error = list.add(file("b", 1)).unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::Invalid);
        assert!(error.to_string().contains("more than 2 files"), "{error}");
        assert!(error.hint().unwrap().contains("source.max_entries"));

        let mut list = listing("s3://b/p/");
        assert!(list.add(file("a", u64::MAX)).is_err());
        list.add(file("b", MAX_SIZE)).unwrap();
        assert!(list.add(file("c", 1)).is_err());
    }

    #[test]
    fn nothing_left_says_why() {
        let error = listing("s3://b/p/").finish().unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::NotFound);
        assert!(error.hint().is_none());
        let mut list = listing("s3://b/p/?include=nope");
        list.add(file("a", 1)).unwrap();
        let error = list.finish().unwrap_err();
        assert_eq!(error.kind(), SourceErrorKind::NotFound);
        assert!(error.to_string().contains("none of 1 files"), "{error}");
        assert!(error.hint().unwrap().contains("globs"));
    }
}
