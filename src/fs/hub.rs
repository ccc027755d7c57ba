//! The cache layout of `huggingface_hub`, as a tree: `HF_HUB_CACHE=<mount>` finds the model in it.
//!
//! ```text
//! models--org--name/blobs/<etag>
//! models--org--name/snapshots/<commit>/<path> -> ../../blobs/<etag>
//! models--org--name/{refs,.no_exist,trees}    in memory, writable; refs/<revision> holds the commit
//! .locks  CACHEDIR.TAG  version.txt           in memory, writable
//! ```
//!
//! Names as `huggingface_hub` writes them (`file_download.py`: `repo_folder_name`,
//! `_create_symlink`, `_cache_commit_hash_for_specific_revision`): a blob is named by its etag,
//! which is the SHA-256 of an LFS file and the git blob SHA-1 of any other.

use std::collections::HashSet;

use super::Shadow;
use crate::{
    digest::{ObjectId, to_hex},
    reference::{HubKind, HubRepo},
    tree::{Artifact, Kind, Meta, Object, TreeBuilder, TreeError},
};

const TAG: &str = "Signature: 8a477f597d28d172789f06886806bc55\n\
# This file is a cache directory tag.\n\
# For information about cache directory tags, see:\n\
#\thttps://bford.info/cachedir/\n";

/// A tree in the Hub's layout over the same objects, and what is writable in it.
#[derive(Debug)]
pub struct Layout {
    pub artifact: Artifact,
    pub shadows: Vec<Shadow>,
}

/// Why an artifact has no such layout.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    #[error("{reference}: cannot be shown in the layout of the Hub's cache: {source}")]
    Tree {
        reference: String,
        source: TreeError,
    },
    #[error(
        "{reference}: cannot be shown in the layout of the Hub's cache: {what} {value:?} is no plain name"
    )]
    Name {
        reference: String,
        what: &'static str,
        value: String,
    },
}

/// The layout of `artifact`, which is directory or file `root` of `repo` (empty: all of it).
///
/// # Errors
/// Names that cannot stand in a tree.
pub fn layout(artifact: &Artifact, repo: &HubRepo, root: &str) -> Result<Layout, LayoutError> {
    let tree_error = |source| LayoutError::Tree {
        reference: artifact.reference.clone(),
        source,
    };
    let name_error = |what, value: &str| LayoutError::Name {
        reference: artifact.reference.clone(),
        what,
        value: value.to_owned(),
    };
    let commit = artifact.revision.as_str();
    if commit.is_empty() || commit.contains('/') {
        return Err(name_error("commit", commit));
    }
    let revision = repo.revision.as_deref().unwrap_or("main");
    if revision.split('/').any(|c| matches!(c, "" | "." | "..")) || revision.contains('\0') {
        return Err(name_error("revision", revision));
    }

    let folder = folder(repo);
    let mtime = artifact.tree.inodes().first().map_or(0, |i| i.meta.mtime.0);
    let dir = Meta::dir(mtime);
    let mut builder = TreeBuilder::new(dir.clone());
    let new_dir = || Kind::Dir {
        parent: 0,
        entries: Vec::new(),
    };
    let repo_dir = builder
        .add(folder.as_bytes(), new_dir(), dir.clone())
        .map_err(tree_error)?;
    let blobs = format!("{folder}/blobs");
    let snapshot = format!("{folder}/snapshots/{commit}");
    for path in [&blobs, &snapshot] {
        builder
            .add(path.as_bytes(), new_dir(), dir.clone())
            .map_err(tree_error)?;
    }
    let mut seen = HashSet::new();
    let files = artifact.tree.files();
    let mut root = root.trim_matches('/');
    if let [(name, _, object)] = &files[..]
        && let Some(object) = artifact.objects.get(*object as usize)
        && let Some(location) = object.recipe.location()
        && location.path == root
        && root.rsplit('/').next() == Some(name)
    {
        // The root is that file itself.
        root = root.rsplit_once('/').map_or("", |(dir, _)| dir);
    }
    for (path, inode, object) in files {
        let meta = artifact.tree.get(inode).map(|i| &i.meta);
        let mtime = meta.map_or(mtime, |m| m.mtime.0);
        let Some(content) = artifact.objects.get(object as usize) else {
            continue;
        };
        let blob = etag(content);
        if seen.insert(blob.clone()) {
            builder
                .add_file(
                    format!("{blobs}/{blob}").as_bytes(),
                    object,
                    Meta::file(mtime),
                )
                .map_err(tree_error)?;
        }
        let path = match root {
            "" => path,
            root => format!("{root}/{path}"),
        };
        let up = "../".repeat(2 + path.matches('/').count());
        let target = format!("{up}blobs/{blob}").into_bytes().into();
        let mut link = Meta::file(mtime);
        link.mode = 0o777;
        builder
            .add(
                format!("{snapshot}/{path}").as_bytes(),
                Kind::Symlink { target },
                link,
            )
            .map_err(tree_error)?;
    }

    let names = |names: &[&str]| names.iter().map(|n| n.as_bytes().into()).collect();
    // A full commit has no reference, as with the real cache.
    let refs = if revision == commit {
        Vec::new()
    } else {
        vec![(format!("refs/{revision}"), commit.as_bytes().to_vec())]
    };
    let shadows = vec![
        Shadow {
            dir: 0,
            names: names(&[".locks", "CACHEDIR.TAG", "version.txt"]),
            files: vec![("CACHEDIR.TAG".into(), TAG.into())],
            dirs: vec![".locks".into()],
        },
        Shadow {
            dir: repo_dir,
            names: names(&["refs", ".no_exist", "trees"]),
            files: refs,
            dirs: vec!["refs".into()],
        },
    ];
    Ok(Layout {
        artifact: Artifact {
            reference: artifact.reference.clone(),
            revision: artifact.revision.clone(),
            tree: builder.build(),
            objects: artifact.objects.clone(),
        },
        shadows,
    })
}

/// `models--org--name` and the like.
fn folder(repo: &HubRepo) -> String {
    let kind = match repo.kind {
        HubKind::Model => "models",
        HubKind::Dataset => "datasets",
        HubKind::Space => "spaces",
    };
    format!("{kind}--{}", repo.id.replace('/', "--"))
}

fn etag(object: &Object) -> String {
    match (object.git_sha1, object.id) {
        (Some(sha1), _) => to_hex(&sha1),
        (None, ObjectId::Sha256(digest) | ObjectId::Located(digest)) => digest.hex(),
    }
}
