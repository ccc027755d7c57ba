//! What a manifest is: a container image, or a model in one of the layouts of registries.
//!
//! | layout | layers |
//! |---|---|
//! | [CNCF ModelPack](https://github.com/modelpack/model-spec) | `application/vnd.cncf.model.*.v1.{raw,tar,tar+gzip,tar+zstd}`, path in `org.cncf.model.filepath` |
//! | [KitOps ModelKit](https://github.com/kitops-ml/kitops) | `application/vnd.kitops.modelkit.*.v1.tar[+gzip]` |
//! | [Docker Model Runner](https://github.com/docker/model-runner) | `application/vnd.docker.ai.*`: one file each, but for `*.tar` |
//! | Ollama | `application/vnd.ollama.image.*`: one file each, named by what it is |
//! | [ORAS](https://oras.land) | any, path in `org.opencontainers.image.title`; a tar where `io.deis.oras.content.unpack` says so |
//! | modelcar (KServe) | those of a container image; the model is in its directory `/models` |
//!
//! The same files give the same tree in every layout: paths are those at which the layout's own
//! tool unpacks them, members of tars being relative to the root; configurations of manifests are
//! no files. A file that is a layer of its own is an object named by the layer's digest. A file in
//! a plain tar is a slice of the layer, found by its header; the headers are read by range, before
//! the layer could be verified (`node` compares them once it was). Compressed tars, and those
//! with too many members or sparse ones, have to be unpacked: [`layered`] says so for the whole model,
//! and [`model_of`] makes of what was unpacked what would have been read in place.
//!
//! A modelcar is an ordinary image, which KServe also runs beside the server, so `oci://…` means
//! all of it; `?path=models` chooses the model.
//!
//! Paths, names and times come from strangers: [`Listing`] refuses what leads elsewhere.

mod layers;

use std::collections::{HashMap, HashSet};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use self::layers::{Content, Part};
use super::{
    Manifest, Registry,
    manifest::{is_image_config, is_image_layer},
    tarwalk::{Member, MemberKind, TarError, TarWalk},
};
use crate::{
    digest::ObjectId,
    reference::{OciRef, Reference},
    source::{
        Layer, LayerFile, Layered, SourceError, SourceErrorKind as Kind,
        listing::{Listed, Listing, Whole, short},
    },
    tree::{self, Artifact, Location, Recipe},
};

/// Tars looked into at a time.
const PARALLEL: usize = 4;
/// Most members of one tar.
const MAX_MEMBERS: usize = 250_000;

/// The directory that is the content, where the manifest is that of a container image (its layers
/// have to be unpacked); `None` where it is a model that [`resolve`] understands, or nothing known.
pub(super) fn image_root(manifest: &Manifest, oci: &OciRef) -> Option<String> {
    let image = &manifest.image;
    let is_image = is_image_config(&image.config.media_type)
        && image
            .layers
            .iter()
            .all(|layer| is_image_layer(&layer.media_type));
    is_image.then(|| oci.path.clone())
}

/// The layers of a model, if it has to be unpacked or `all` are asked for; `None` where it is none, or
/// nothing known.
///
/// # Errors
/// As [`resolve`].
pub(super) async fn layered(
    registry: &Registry,
    reference: &Reference,
    oci: &OciRef,
    manifest: &Manifest,
    all: bool,
) -> Result<Option<Layered>, SourceError> {
    let what = oci.to_string();
    let Some(parts) = layers::parts(registry, &what, manifest).await? else {
        return Ok(None);
    };
    if !all && !parts.iter().any(Part::is_compressed) {
        return Ok(None);
    }
    let config = &manifest.image.config;
    let (config, _) = super::descriptor(&what, "its configuration", &config.digest, config.size)?;
    let layer = |part: Part| Layer {
        blob: part.blob,
        size: part.size,
        media_type: part.media_type,
        // What ORAS says of a directory.
        diff_id: part
            .annotations
            .get("io.deis.oras.content.digest")
            .and_then(|digest| digest.parse().ok()),
        annotations: part.annotations,
        as_file: match part.content {
            Content::File { path, mode, mtime } => Some(LayerFile {
                path,
                mtime,
                executable: mode & 0o111 != 0,
            }),
            Content::Tar(_) | Content::Unpack => None,
        },
    };
    Ok(Some(Layered {
        reference: reference.to_string(),
        manifest: manifest.digest,
        index: None,
        config,
        platform: None,
        root: oci.path.clone(),
        layers: parts.into_iter().map(layer).collect(),
        is_model: true,
    }))
}

/// The artifact that a model's manifest means; `None` where it is no model of a known layout.
///
/// # Errors
/// Malformed metadata; a layer of an unknown kind; what the registry says; a model that has to be
/// unpacked first.
pub(super) async fn resolve(
    registry: &Registry,
    reference: &Reference,
    oci: &OciRef,
    manifest: &Manifest,
    max_entries: usize,
) -> Result<Option<Artifact>, SourceError> {
    let what = oci.to_string();
    let Some(parts) = layers::parts(registry, &what, manifest).await? else {
        return Ok(None);
    };
    if let Some(part) = parts.iter().find(|part| part.is_compressed()) {
        let error = part.error(&what, "is compressed: it has to be unpacked first");
        return Err(error.in_layers());
    }
    let mut files = Files {
        what: &what,
        root: &oci.path,
        filtered: !reference.filter.is_empty() || !oci.path.is_empty(),
        listing: Listing::new(reference, manifest.digest.to_string())?
            .with_max_entries(max_entries),
    };
    let most = max_entries.min(MAX_MEMBERS);
    let mut walked = stream::iter(parts)
        .map(async |part| {
            let members = match &part.content {
                Content::File { .. } => Vec::new(),
                Content::Tar(_) | Content::Unpack => walk(registry, &what, &part, most).await?,
            };
            Ok::<_, SourceError>((part, members))
        })
        .buffered(PARALLEL);
    while let Some((part, members)) = walked.try_next().await? {
        match &part.content {
            Content::File { path, mode, mtime } => files.add_layer(&part, path, *mode, *mtime)?,
            Content::Tar(_) | Content::Unpack => files.add_members(&part, &members)?,
        }
    }
    drop(walked);
    files.listing.finish().map(Some)
}

/// The members of a layer that is a plain tar.
async fn walk(
    registry: &Registry,
    what: &str,
    part: &Part,
    most: usize,
) -> Result<Vec<Member>, SourceError> {
    let mut walk = TarWalk::new(part.size, most);
    let failed = |error: TarError| {
        let failed = part
            .error(what, &error.to_string())
            .with_hint("push the model again, its files as layers of their own");
        match error {
            TarError::TooMany(most) if most < MAX_MEMBERS => {
                failed.with_hint("raise source.max_entries")
            }
            _ if error.is_of_place() => failed.in_layers(),
            _ => failed,
        }
    };
    while let Some(range) = walk.wants().map_err(failed)? {
        let bytes = layers::read(registry, part, range).await?;
        walk.take(&bytes).map_err(failed)?;
    }
    Ok(walk.members())
}

/// The files of a model in the making.
struct Files<'r> {
    what: &'r str,
    /// The directory that is the content.
    root: &'r str,
    /// Not all of the model is wanted.
    filtered: bool,
    listing: Listing,
}

impl Files<'_> {
    /// Adds a layer that is a file.
    fn add_layer(
        &mut self,
        part: &Part,
        path: &str,
        mode: u32,
        mtime: i64,
    ) -> Result<(), SourceError> {
        let Some(path) = below(self.root, path) else {
            self.listing.skip();
            return Ok(());
        };
        let added = self.listing.add(Listed {
            path,
            size: part.size,
            id: ObjectId::Sha256(part.blob),
            git_sha1: None,
            location: part.location(),
            mtime,
            executable: mode & 0o111 != 0,
        });
        added.map_err(|error| error.because(part.name()))
    }

    /// Adds the members of a layer that is a tar.
    fn add_members(&mut self, part: &Part, members: &[Member]) -> Result<(), SourceError> {
        let whole = Whole {
            id: ObjectId::Sha256(part.blob),
            size: part.size,
            location: part.location(),
        };
        let mut places = HashMap::new();
        for member in members {
            let place = match &member.kind {
                MemberKind::File { offset, size } => Some((*offset, *size)),
                MemberKind::Hardlink { target } => places.get(target.as_str()).copied(),
                MemberKind::Dir | MemberKind::Symlink { .. } => None,
            };
            if let Some(place) = place {
                // Also of what is not wanted: a link may lead there.
                places.insert(member.path.as_str(), place);
            }
            let Some(path) = below(self.root, &member.path) else {
                self.listing.skip();
                continue;
            };
            match &member.kind {
                MemberKind::File { .. } => {}
                MemberKind::Hardlink { target } => {
                    if place.is_none() {
                        let (link, target) = (short(path), short(target));
                        let why =
                            format!("{link:?} is a link to {target:?}, which is not before it");
                        return Err(part.error(self.what, &why));
                    }
                }
                MemberKind::Dir => {
                    if !path.is_empty() && !self.filtered {
                        let added = self.listing.add_dir(path);
                        added.map_err(|error| error.because(part.name()))?;
                    }
                }
                MemberKind::Symlink { target } => {
                    check_symlink(self.what, &member.path, target)
                        .map_err(|error| error.because(part.name()))?;
                    let added = self.listing.add_symlink(path, target);
                    added.map_err(|error| error.because(part.name()))?;
                }
            }
            let Some((offset, size)) = place else {
                continue;
            };
            let listed = Listed {
                path,
                size,
                id: ObjectId::located(&format!("{}@{offset}", part.blob), "tar", size),
                git_sha1: None,
                location: Location {
                    offset,
                    ..part.location()
                },
                mtime: member.mtime,
                executable: member.mode & 0o111 != 0,
            };
            let added = self.listing.add_slice(&whole, &listed);
            added.map_err(|error| error.because(part.name()))?;
        }
        Ok(())
    }
}

/// The artifact of a model of whose layers `merged` came: what [`resolve`] would have made of it, had it
/// been readable in place. Owners, other attributes and other bits of modes than that for executing are not
/// kept, nor that files are hard links.
///
/// # Errors
/// What no model has, as in [`resolve`]: devices, pipes, symlinks out of it, names that are not UTF-8.
pub(crate) fn model_of(
    reference: &Reference,
    layered: &Layered,
    merged: &Artifact,
) -> Result<Artifact, SourceError> {
    let what = &layered.reference;
    let invalid = |why: String| SourceError::new(Kind::Invalid, what, why);
    let filtered = !reference.filter.is_empty() || !layered.root.is_empty();
    // Which are no slices of a tar.
    let files: HashSet<String> = (layered.layers.iter())
        .filter(|layer| layer.as_file.is_some())
        .map(|layer| layer.blob.to_string())
        .collect();
    let mut listing = Listing::new(reference, layered.manifest.to_string())?;
    let mut dirs = vec![(0, String::new())];
    while let Some((dir, above)) = dirs.pop() {
        for entry in merged.tree.entries(dir).unwrap_or_default() {
            let name = std::str::from_utf8(&entry.name)
                .map_err(|_| invalid(format!("{above:?} has a name that is not UTF-8")))?;
            let full = match above.as_str() {
                "" => name.to_owned(),
                above => format!("{above}/{name}"),
            };
            let Some(inode) = merged.tree.get(entry.inode) else {
                continue;
            };
            if let tree::Kind::Dir { .. } = inode.kind {
                dirs.push((entry.inode, full.clone()));
            }
            let Some(path) = below(&layered.root, &full) else {
                continue;
            };
            match &inode.kind {
                tree::Kind::Dir { .. } if filtered => {}
                tree::Kind::Dir { .. } => listing.add_dir(path)?,
                tree::Kind::File { object } => {
                    let Some(object) = merged.objects.get(*object as usize) else {
                        continue;
                    };
                    let Recipe::Raw(mut location) = object.recipe.clone() else {
                        continue;
                    };
                    if let Some((blob, _)) = location.path.split_once('#')
                        && files.contains(blob)
                    {
                        location.path = blob.to_owned();
                        location.generation = None;
                    }
                    listing.add(Listed {
                        path,
                        size: object.size,
                        id: object.id,
                        git_sha1: None,
                        location,
                        mtime: inode.meta.mtime.0,
                        executable: inode.meta.mode & 0o111 != 0,
                    })?;
                }
                tree::Kind::Symlink { target } => {
                    let target = std::str::from_utf8(target).map_err(|_| {
                        let link = short(&full);
                        invalid(format!("{link:?} is a link to a name that is not UTF-8"))
                    })?;
                    check_symlink(what, &full, target)?;
                    listing.add_symlink(path, target)?;
                }
                _ => {
                    let path = short(&full);
                    let why = format!("{path:?} is a device or pipe, which no model has");
                    return Err(invalid(why));
                }
            }
        }
    }
    listing.finish()
}

/// Refuses a symlink that leads out of the model.
fn check_symlink(what: &str, path: &str, target: &str) -> Result<(), SourceError> {
    if stays_inside(path, target) {
        return Ok(());
    }
    let (link, target) = (short(path), short(target));
    let why = format!("{link:?} is a symlink to {target:?}, out of the model");
    Err(SourceError::new(Kind::Invalid, what, why))
}

/// `path` as it is in directory `root`; `None` where it is not in there.
fn below<'p>(root: &str, path: &'p str) -> Option<&'p str> {
    match root {
        "" => Some(path),
        root => path.strip_prefix(root)?.strip_prefix('/'),
    }
}

/// Whether a symlink at `path` to `target` leads to a place in the same tree, whatever is there.
fn stays_inside(path: &str, target: &str) -> bool {
    let mut depth = path.matches('/').count();
    !target.starts_with('/')
        && target.split('/').all(|part| match part {
            "" | "." => true,
            ".." => {
                let up = depth.checked_sub(1);
                depth = up.unwrap_or(0);
                up.is_some()
            }
            _ => {
                depth += 1;
                true
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symlinks_stay_inside() {
        for (path, target) in [
            ("a", "b"),
            ("a", "./b/../c"),
            ("d/a", "../b"),
            ("d/e/a", "../../b"),
            ("snapshots/1/a", "../../blobs/x"),
        ] {
            assert!(stays_inside(path, target), "{path} -> {target}");
        }
        for (path, target) in [
            ("a", "/b"),
            ("a", ".."),
            ("d/a", "../../b"),
            ("d/a", "x/../../../b"),
            ("d/a", "../../d/b"),
        ] {
            assert!(!stays_inside(path, target), "{path} -> {target}");
        }
    }

    #[test]
    fn directories_are_chosen_by_whole_names() {
        assert_eq!(below("", "a/b"), Some("a/b"));
        assert_eq!(below("a", "a/b"), Some("b"));
        assert_eq!(below("a/b", "a/b/c/d"), Some("c/d"));
        for path in ["a", "ab/c", "b/a", ""] {
            assert_eq!(below("a", path), None, "{path}");
        }
    }
}
