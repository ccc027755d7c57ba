//! Access profiles of images: recorded when one is read for the first time before it is complete,
//! replayed when another node (or this one, later) reads it anew. They are kept, and pushed, beside
//! the indexes of the image's layers, under the digest of its manifest.
//!
//! An image that was pulled before its first start gets none: its root is native, and nobody sees what
//! is read of it. Nobody else does either: overlayfs reads what is below it without leaving a time or
//! telling fanotify (`OVL_OPEN_FLAGS` in the kernel's fs/overlayfs), and in the page cache is all
//! that was just unpacked. A first start by FUSE, only to record it, would cost what the pull was for.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;

use super::{Layers, blob_of};
use crate::{
    chunk::{self, CHUNK_SIZE},
    digest::{Digest, ObjectId},
    fetch::{FetchError, OnRead},
    image::profile::{AccessProfile, MAX_CHUNKS, MAX_PROFILE, MAX_READS, ProfiledRead},
    node::{Node, NodeError, Resolved, blocking},
    source::{Layer, Source, SourceError, SourceErrorKind},
    store::{Store, StoreError},
    tree::Object,
};

/// An access profile: as [`AccessProfile::encode`] makes it.
pub(super) const PROFILE_MEDIA_TYPE: &str = "application/vnd.hearth.access-profile.v1";

/// A start is over when nothing was read for the first time for so long.
const OVER: Duration = Duration::from_secs(5);
/// And at the latest after so long.
const LONGEST_START: Duration = Duration::from_secs(180);
/// Decoded bytes of a layer that are brought together: so that each span is decoded once, and the
/// registry is asked for more than a little.
const NEAR: u64 = 8 << 20;
/// Bytes of a layer between two that are needed which are rather fetched, too.
const GAP: u64 = 256 << 10;
/// Brought at the same time.
const NEIGHBOURHOODS_AT_ONCE: usize = 3;

/// What accompanies the first reads of an image: they are recorded, or foreseen. Dropped = over.
pub struct Start {
    recorder: Option<Arc<Recorder>>,
    task: tokio::task::JoinHandle<()>,
}

impl Start {
    /// To be told of what is read, where that is of use.
    pub fn on_read(&self) -> Option<OnRead> {
        let recorder = Arc::clone(self.recorder.as_ref()?);
        Some(Arc::new(move |id, bytes| recorder.note(id, &bytes)))
    }
}

impl Drop for Start {
    fn drop(&mut self) {
        self.task.abort();
        if let Some(recorder) = &self.recorder {
            recorder.save();
        }
    }
}

/// Writes down what is read.
struct Recorder {
    store: Arc<Store>,
    manifest: Digest,
    over: AtomicBool,
    seen: Mutex<Seen>,
}

struct Seen {
    reads: Vec<ProfiledRead>,
    /// The chunks noted; at most [`MAX_CHUNKS`].
    chunks: HashSet<(Digest, u64)>,
    last: Instant,
}

impl Recorder {
    fn note(&self, id: &ObjectId, bytes: &Range<u64>) {
        if self.over.load(Ordering::Relaxed) {
            return;
        }
        let ObjectId::Sha256(content) = id else {
            return;
        };
        let mut seen = self.seen.lock();
        let Seen {
            reads,
            chunks,
            last,
        } = &mut *seen;
        // Of an empty file there is a first chunk all the same.
        let wanted = chunk::covering(bytes);
        for index in wanted.start..wanted.end.max(wanted.start + 1) {
            if reads.len() >= MAX_READS || chunks.len() as u64 >= MAX_CHUNKS {
                return;
            }
            if !chunks.insert((*content, index)) {
                continue;
            }
            *last = Instant::now();
            match reads.last_mut() {
                Some(read) if read.content == *content && read.first + read.chunks == index => {
                    read.chunks += 1;
                }
                _ => reads.push(ProfiledRead {
                    content: *content,
                    first: index,
                    chunks: 1,
                }),
            }
        }
    }

    /// Returns when the start is over.
    async fn watch(&self) {
        let deadline = Instant::now() + LONGEST_START;
        while Instant::now() < deadline {
            tokio::time::sleep(OVER / 5).await;
            let seen = self.seen.lock();
            if !seen.reads.is_empty() && seen.last.elapsed() >= OVER {
                return;
            }
        }
    }

    /// Keeps what was read, once.
    fn save(&self) {
        if self.over.swap(true, Ordering::Relaxed) {
            return;
        }
        let reads = std::mem::take(&mut self.seen.lock().reads);
        if reads.is_empty() {
            return;
        }
        let saved = AccessProfile { reads }
            .encode()
            .map_err(|error| error.to_string())
            .and_then(|bytes| {
                let put = self.store.put_index(&self.manifest, &bytes);
                put.map_err(|error| error.to_string())
            });
        if let Err(error) = saved {
            tracing::debug!(manifest = %self.manifest, error, "no access profile is kept");
        }
    }
}

impl Node {
    /// Accompanies the reads of an image that is not complete: where it is known what a start of it
    /// reads, that is brought in this order; else what is read now is recorded. `None` where there is
    /// nothing to do: it is no image, or all of it is here.
    ///
    /// # Errors
    /// What the store says.
    pub async fn start(&self, resolved: &Resolved) -> Result<Option<Start>, NodeError> {
        let (Some(layers), Ok(manifest)) = (&resolved.layers, resolved.artifact.revision.parse())
        else {
            return Ok(None);
        };
        if self.has_all(&resolved.artifact).await? {
            return Ok(None);
        }
        if let Some(profile) = self.profile(&manifest).await? {
            let (node, resolved, layers) = (self.clone(), resolved.clone(), Arc::clone(layers));
            let task = tokio::spawn(async move { node.replay(&resolved, &layers, &profile).await });
            return Ok(Some(Start {
                recorder: None,
                task,
            }));
        }
        let (store, name) = (
            Arc::clone(self.store()),
            resolved.artifact.reference.clone(),
        );
        let image = blocking(move || store.image(&name)).await?;
        if !self.store().writable() || image.is_none_or(|image| image.manifest != manifest) {
            return Ok(None);
        }
        let recorder = Arc::new(Recorder {
            store: Arc::clone(self.store()),
            manifest,
            over: AtomicBool::new(false),
            seen: Mutex::new(Seen {
                reads: Vec::new(),
                chunks: HashSet::new(),
                last: Instant::now(),
            }),
        });
        let watching = Arc::clone(&recorder);
        let task = tokio::spawn(async move {
            watching.watch().await;
            let saved = tokio::task::spawn_blocking(move || watching.save()).await;
            if let Err(error) = saved {
                tracing::debug!(%error, "no access profile is kept");
            }
        });
        Ok(Some(Start {
            recorder: Some(recorder),
            task,
        }))
    }

    /// The access profile of an image. A damaged one counts as absent.
    pub(super) async fn profile(
        &self,
        manifest: &Digest,
    ) -> Result<Option<AccessProfile>, StoreError> {
        let (store, manifest) = (Arc::clone(self.store()), *manifest);
        blocking(move || {
            let bytes = store.index(&manifest)?;
            Ok(bytes.and_then(|bytes| AccessProfile::decode(&bytes).ok()))
        })
        .await
    }

    /// Brings what a profile foresees. What fails is left to whoever reads it.
    async fn replay(&self, resolved: &Resolved, layers: &Layers, profile: &AccessProfile) {
        let objects = &resolved.artifact.objects;
        stream::iter(neighbourhoods(objects, profile))
            .map(|near| async move {
                // The start is not over, whatever its readers find here already.
                self.engine.touch();
                if let Err(error) = self.prefetch_blob(layers, objects, &near).await {
                    tracing::debug!(%error, "the layer is not fetched ahead of its readers");
                }
                for (place, bytes) in near {
                    let brought = match self.engine.open(&objects[place], &resolved.source) {
                        Ok(handle) => handle.prefetch(bytes).await,
                        Err(error) => Err(error),
                    };
                    if let Err(error) = brought {
                        tracing::debug!(%error, "not brought ahead of its reader");
                    }
                }
            })
            .buffered(NEIGHBOURHOODS_AT_ONCE)
            .for_each(|()| std::future::ready(()))
            .await;
    }

    /// Brings what reads near each other need of their layer, in few requests.
    async fn prefetch_blob(
        &self,
        layers: &Layers,
        objects: &[Object],
        near: &[Wanted],
    ) -> Result<(), FetchError> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut of = None;
        for (place, bytes) in near {
            let Some(location) = objects[*place].recipe.location() else {
                continue;
            };
            let blob = location.path.split_once('#').map(|(blob, _)| blob);
            let found = of.take().or_else(|| {
                let all = layers.layers.iter().zip(&layers.known);
                let mut all = all.filter(|(layer, _)| layer.as_file.is_none());
                all.find(|(layer, _)| Some(&*layer.blob.to_string()) == blob)
            });
            let Some((layer, known)) = found else {
                return Ok(());
            };
            let end = bytes.end.min(objects[*place].size);
            let decoded = location.offset + bytes.start.min(end)..location.offset + end;
            of = Some((layer, known));
            // What is in pieces has no place of its own.
            if location.path.contains('@') || decoded.is_empty() {
                continue;
            }
            let needed = known.index.blob_bytes(&decoded);
            match runs.last_mut() {
                Some(run) if needed.start <= run.end + GAP => run.end = run.end.max(needed.end),
                _ => runs.push(needed),
            }
        }
        let Some((layer, _)) = of else {
            return Ok(());
        };
        let blob = self.engine.open(&blob_of(layer), &layers.origin)?;
        for run in runs {
            blob.prefetch(run).await?;
        }
        Ok(())
    }

    /// Takes the profile that was found beside an image, unless there is one.
    pub(super) async fn keep_found_profile(
        &self,
        manifest: &Digest,
        beside: &[Layer],
        origin: &Arc<dyn Source>,
    ) -> Result<(), NodeError> {
        let found = beside.iter().find(|b| b.media_type == PROFILE_MEDIA_TYPE);
        let Some(found) = found else {
            return Ok(());
        };
        if !self.store().writable() || self.profile(manifest).await?.is_some() {
            return Ok(());
        }
        let bytes = match read_profile(found, origin).await {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::warn!(%error, "the access profile beside the image cannot be used");
                return Ok(());
            }
        };
        let (store, manifest) = (Arc::clone(self.store()), *manifest);
        if let Err(error) = blocking(move || store.put_index(&manifest, &bytes)).await {
            tracing::warn!(%error, "the access profile of an image could not be kept");
        }
        Ok(())
    }
}

async fn read_profile(found: &Layer, origin: &Arc<dyn Source>) -> Result<Vec<u8>, SourceError> {
    let bytes = origin.small_blob(&found.blob, MAX_PROFILE).await?;
    match AccessProfile::decode(&bytes) {
        Ok(_) => Ok(bytes.to_vec()),
        Err(error) => Err(SourceError::new(
            SourceErrorKind::Invalid,
            format!("access profile {}", found.blob),
            error.to_string(),
        )),
    }
}

/// An object, and which bytes of it.
type Wanted = (usize, Range<u64>);

/// The reads of a profile, those near each other in a layer together, in the order of the first of
/// each.
fn neighbourhoods(objects: &[Object], profile: &AccessProfile) -> Vec<Vec<Wanted>> {
    let places: HashMap<ObjectId, usize> = (objects.iter().enumerate())
        .map(|(place, object)| (object.id, place))
        .collect();
    let mut numbers: HashMap<(&str, u64), usize> = HashMap::new();
    let mut all: Vec<Vec<Wanted>> = Vec::new();
    // A profile may come from a stranger. Its chunks are bounded; they may repeat.
    let mut seen = HashSet::new();
    for read in &profile.reads {
        let Some(&place) = places.get(&ObjectId::Sha256(read.content)) else {
            continue;
        };
        let Some(location) = objects[place].recipe.location() else {
            continue;
        };
        let chunks = chunk::count(objects[place].size).max(1);
        let end = read.first.saturating_add(read.chunks).min(chunks);
        for index in read.first..end {
            if !seen.insert((place, index)) {
                continue;
            }
            let bytes = index * CHUNK_SIZE..(index + 1) * CHUNK_SIZE;
            let key = (&*location.path, (location.offset + bytes.start) / NEAR);
            let number = *numbers.entry(key).or_insert_with(|| {
                all.push(Vec::new());
                all.len() - 1
            });
            all[number].push((place, bytes));
        }
    }
    let at = |(place, bytes): &Wanted| {
        let location = objects[*place].recipe.location();
        location.map_or(0, |location| location.offset) + bytes.start
    };
    for near in &mut all {
        near.sort_by_key(at);
        // Runs of one file in one go.
        near.dedup_by(|next, before| {
            let follows = next.0 == before.0 && next.1.start == before.1.end;
            if follows {
                before.1.end = next.1.end;
            }
            follows
        });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Location, Recipe};

    #[test]
    fn what_repeats_in_a_profile_is_brought_once() {
        let content = Digest::of(b"file");
        let objects = [Object {
            id: ObjectId::Sha256(content),
            size: 3 * CHUNK_SIZE,
            git_sha1: None,
            recipe: Recipe::Raw(Location {
                path: "layer#gzip".into(),
                generation: None,
                offset: 512,
            }),
        }];
        let read = |first, chunks| ProfiledRead {
            content,
            first,
            chunks,
        };
        let reads = vec![read(1, 1), read(0, 2), read(1, 1), read(0, 900)];
        let near = neighbourhoods(&objects, &AccessProfile { reads });
        assert_eq!(near, [[(0, 0..3 * CHUNK_SIZE)]]);
    }
}
