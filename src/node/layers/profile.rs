//! Access profiles of images: recorded when one is read for the first time before it is complete,
//! replayed when another node (or this one, later) reads it anew. They are kept, and pushed, beside
//! the indexes of the image's layers, under the digest of its manifest.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;

use crate::{
    chunk,
    digest::{Digest, ObjectId},
    fetch::OnRead,
    image::profile::{AccessProfile, MAX_PROFILE, MAX_READS, ProfiledRead},
    node::{Node, NodeError, Resolved, blocking},
    source::{Layer, Source, SourceError, SourceErrorKind},
    store::{Store, StoreError},
};

/// An access profile: as [`AccessProfile::encode`] makes it.
pub(super) const PROFILE_MEDIA_TYPE: &str = "application/vnd.hearth.access-profile.v1";

/// A start is over when nothing was read for the first time for so long.
const OVER: Duration = Duration::from_secs(5);
/// And at the latest after so long.
const LONGEST_START: Duration = Duration::from_secs(180);

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
    /// The chunks noted of each content, in words of bits; bounded by [`MAX_READS`] and the size
    /// of the largest file.
    chunks: HashMap<Digest, Vec<u64>>,
    last: Instant,
}

impl Recorder {
    fn note(&self, id: &ObjectId, bytes: &std::ops::Range<u64>) {
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
        if reads.len() >= MAX_READS {
            return;
        }
        let bits = chunks.entry(*content).or_default();
        // Of an empty file there is a first chunk all the same.
        let wanted = chunk::covering(bytes);
        for index in wanted.start..wanted.end.max(wanted.start + 1) {
            let (word, bit) = ((index / 64) as usize, 1u64 << (index % 64));
            if bits.len() <= word {
                bits.resize(word + 1, 0);
            }
            if bits[word] & bit != 0 {
                continue;
            }
            bits[word] |= bit;
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
        let (Some(_), Ok(manifest)) = (&resolved.layers, resolved.artifact.revision.parse()) else {
            return Ok(None);
        };
        if self.has_all(&resolved.artifact).await? {
            return Ok(None);
        }
        if let Some(profile) = self.profile(&manifest).await? {
            let (node, resolved) = (self.clone(), resolved.clone());
            let task = tokio::spawn(async move { node.replay(&resolved, &profile).await });
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
                chunks: HashMap::new(),
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
    async fn replay(&self, resolved: &Resolved, profile: &AccessProfile) {
        let objects = &resolved.artifact.objects;
        let places: HashMap<ObjectId, usize> = (objects.iter().enumerate())
            .map(|(place, object)| (object.id, place))
            .collect();
        let at_once = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 16));
        let mut wanted = Vec::with_capacity(profile.reads.len());
        for read in &profile.reads {
            let start = read.first.checked_mul(chunk::CHUNK_SIZE);
            let end = read.first.checked_add(read.chunks);
            let end = end.and_then(|end| end.checked_mul(chunk::CHUNK_SIZE));
            if let Some(&place) = places.get(&ObjectId::Sha256(read.content))
                && let (Some(start), Some(end)) = (start, end)
            {
                wanted.push((place, start..end));
            }
        }
        drop(places);
        stream::iter(wanted)
            .map(|(place, bytes)| async move {
                let brought = match self.engine.open(&objects[place], &resolved.source) {
                    Ok(handle) => handle.prefetch(bytes).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = brought {
                    tracing::debug!(%error, "not brought ahead of its reader");
                }
            })
            .buffered(at_once)
            .for_each(|()| std::future::ready(()))
            .await;
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
