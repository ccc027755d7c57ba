//! Whether the files cut from a tar are where the verified tar says that they are.
//!
//! A source finds them by reading headers from the middle of a layer that nobody could verify yet.
//! Once the layer is complete its headers can be trusted, and are read again.

use std::{collections::HashMap, fs::File, io, os::unix::fs::FileExt as _};

use crate::{
    source::tarwalk::{MemberKind, TarWalk},
    tree::{Artifact, MAX_INODES},
};

/// A file cut from a tar.
#[derive(Debug)]
pub(super) struct Slice {
    path: String,
    offset: u64,
    size: u64,
}

/// The files that are cut from other objects, by the index of that.
pub(super) fn by_container(artifact: &Artifact) -> HashMap<usize, Vec<Slice>> {
    let mut found: HashMap<_, Vec<Slice>> = HashMap::new();
    if artifact.stored().count() == artifact.objects.len() {
        return found;
    }
    for (path, _, object) in artifact.tree.files() {
        if let Some((stored, offset)) = artifact.place(object)
            && stored != object
        {
            let size = artifact.objects[object as usize].size;
            let slice = Slice { path, offset, size };
            found.entry(stored as usize).or_default().push(slice);
        }
    }
    found
}

/// Compares files with the headers in the `tar` of `size` bytes that they are cut from, which is
/// all of it and verified. Blocking.
///
/// # Errors
/// What is wrong, or could not be read.
pub(super) fn check(slices: &[Slice], tar: &File, size: u64) -> Result<(), String> {
    let places = places(tar, size).map_err(|why| why.to_string())?;
    for Slice { path, offset, size } in slices {
        // The reference may have named a directory: then the paths are those below it.
        let is_it = |member: &String| {
            let above = member.strip_suffix(path.as_str());
            above.is_some_and(|above| above.is_empty() || above.ends_with('/'))
        };
        let members = places.get(&(*offset, *size));
        if !members.is_some_and(|members| members.iter().any(is_it)) {
            return Err(format!("{path:?} is not where its header was said to be"));
        }
    }
    Ok(())
}

/// The paths of the files in a tar by where their content is.
fn places(tar: &File, size: u64) -> io::Result<HashMap<(u64, u64), Vec<String>>> {
    let mut walk = TarWalk::new(size, MAX_INODES);
    while let Some(range) = walk.wants().map_err(io::Error::other)? {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        tar.read_exact_at(&mut bytes, range.start)?;
        walk.take(&bytes).map_err(io::Error::other)?;
    }
    let mut places: HashMap<_, Vec<String>> = HashMap::new();
    let mut named = HashMap::new();
    for member in walk.members() {
        let place = match &member.kind {
            MemberKind::File { offset, size } => Some((*offset, *size)),
            MemberKind::Hardlink { target } => named.get(target).copied(),
            MemberKind::Dir | MemberKind::Symlink { .. } => None,
        };
        if let Some(place) = place {
            named.insert(member.path.clone(), place);
            places.entry(place).or_default().push(member.path);
        }
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn files_are_where_the_headers_say() {
        let tar = crate::source::tarwalk::tar(&[("d/a", b"hello"), ("d/b", b"")]);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&tar).unwrap();
        let check = |path: &str, offset, size| {
            let path = path.to_owned();
            let slice = Slice { path, offset, size };
            super::check(&[slice], &file, tar.len() as u64)
        };
        for path in ["d/a", "a"] {
            assert_eq!(check(path, 512, 5), Ok(()));
        }
        assert_eq!(check("d/b", 1536, 0), Ok(()));
        for (path, offset, size) in [
            ("d/a", 512, 4),
            ("d/a", 513, 5),
            ("d/b", 512, 5),
            ("/a", 512, 5),
        ] {
            let why = check(path, offset, size).unwrap_err();
            assert!(why.contains("not where"), "{why}");
        }
        let cut = super::check(&[], &file, tar.len() as u64 + 512).unwrap_err();
        assert!(cut.contains("buffer"), "{cut}");
    }
}
