//! Who pulls through this node: clients of the mirror, of whom nothing is known but the credentials that they send.
//!
//! What the node itself may read is for all, unless the policy says otherwise ([`Tenancy`](super::Tenancy)); it is shown also
//! while its registry cannot be reached. For everything else the client's own credentials count: a manifest or blob is
//! shown, whoever brought it here, only where the registry said yes to them. Its "yes" is remembered for a while, in
//! memory, at most [`MAX_SHOWN`] of them, never a "no"; what a manifest names may be had by who may have the manifest,
//! as registries let in by repository. Nothing here survives a crash: registries are asked again.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use serde::Deserialize;

use super::{
    Node, NodeError, blocking, documents::document, layers::blob_of, tenancy::is_the_nodes,
};
use crate::{
    digest::{Digest, ObjectId},
    fetch::Handle,
    reference::{Filter, Locator, OciRef, Reference},
    source::{Credentials, Keys, Layer, ManifestBytes, Source, SourceErrorKind},
    store::{Reservation, StoreErrorKind},
    tree::{Artifact, Tree},
};

/// Answers of registries that are remembered: some hundred images.
const MAX_SHOWN: usize = 1 << 14;
/// Names of a manifest that are remembered.
const MAX_NAMES: usize = 1024;
/// Clients whose connections and tokens are kept, and for how long.
const MAX_SOURCES: usize = 32;
const SOURCE_LIFE: Duration = Duration::from_secs(60);

/// What is known of visitors; one per process.
#[derive(Debug, Default)]
pub(super) struct Visitors {
    /// Something of a repository, for some credentials.
    shown: Mutex<HashMap<Digest, Instant>>,
    /// By repository and credentials, the last used at the end.
    sources: Mutex<Vec<Opened>>,
}

/// A repository that was opened with the credentials of a client.
#[derive(Debug)]
struct Opened {
    key: Digest,
    used: Instant,
    source: Arc<dyn Source>,
}

/// How a registry is asked: as this node, or with the credentials of a client.
type Way = Option<Keys>;

/// What a manifest or an index names.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Named {
    config: Option<Descriptor>,
    layers: Vec<Descriptor>,
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
}

impl Visitors {
    fn knows(&self, key: &Digest, life: Duration, now: Instant) -> bool {
        let shown = self.shown.lock();
        let at = shown.get(key);
        at.is_some_and(|at| now.saturating_duration_since(*at) < life)
    }

    fn note(&self, keys: impl Iterator<Item = Digest>, life: Duration, now: Instant) {
        let mut shown = self.shown.lock();
        for key in keys {
            if shown.len() >= MAX_SHOWN && !shown.contains_key(&key) {
                shown.retain(|_, at| now.saturating_duration_since(*at) < life);
            }
            if shown.len() >= MAX_SHOWN && !shown.contains_key(&key) {
                // Half of them at once, so that it is rare.
                let mut times: Vec<_> = shown.values().copied().collect();
                let (_, middle, _) = times.select_nth_unstable(MAX_SHOWN / 2);
                let middle = *middle;
                shown.retain(|_, at| *at > middle);
            }
            shown.insert(key, now);
        }
    }
}

impl Node {
    /// The manifest or index that `oci` means, for a client that sent `visitor`: a digest from the store if it is there, a
    /// tag from the registry, or from what is recorded of it where that cannot be reached.
    ///
    /// # Errors
    /// What the source or the store says; the registry's refusal.
    pub async fn manifest(
        &self,
        oci: &OciRef,
        visitor: Option<Keys>,
    ) -> Result<ManifestBytes, NodeError> {
        let ways = self.ways(oci, visitor);
        let wanted: Option<Digest> = oci.wanted().parse().ok();
        if let Some(digest) = wanted
            && let Some(bytes) = self.stored_document(&digest).await?
            && let Some(way) = self.known_way(oci, &ways).await?
        {
            let found = document(bytes, digest);
            self.note_manifest(oci, way, &found);
            return Ok(found);
        }
        let mut refusal = None;
        for way in &ways {
            let (reference, source) = self.open_registry(oci, way)?;
            let error = match source.manifest(oci.wanted()).await {
                Ok(found) => {
                    self.keep_document(found.digest, found.bytes.to_vec().into())
                        .await?;
                    self.note_manifest(oci, way, &found);
                    return Ok(found);
                }
                Err(error) => error,
            };
            let passing = matches!(
                error.kind(),
                SourceErrorKind::Unavailable | SourceErrorKind::Throttled
            );
            if passing
                && let Some(way) = self.known_way(oci, &ways).await?
                && let Some(found) = self.recorded_manifest(&reference).await?
            {
                tracing::warn!(%error, "the registry cannot be reached: using what is recorded");
                self.note_manifest(oci, way, &found);
                return Ok(found);
            }
            let refused = is_refusal(error.kind());
            let error = NodeError::Resolve {
                reference: reference.to_string(),
                source: error,
            };
            match refused {
                true => refusal = Some(error),
                false => return Err(error),
            }
        }
        Err(refusal.unwrap_or_else(|| NodeError::Unknown(oci.wanted().to_owned())))
    }

    /// A blob, to be read as it arrives, for a client that sent `visitor`.
    ///
    /// # Errors
    /// What the source or the store says; the registry's refusal.
    pub async fn blob(
        &self,
        oci: &OciRef,
        digest: &Digest,
        visitor: Option<Keys>,
    ) -> Result<Arc<Handle>, NodeError> {
        let ways = self.ways(oci, visitor);
        let (store, id) = (Arc::clone(self.store()), ObjectId::Sha256(*digest));
        let complete = blocking(move || store.complete(&id)).await?;
        let complete = complete.map(|complete| complete.size);
        if let Some(size) = complete
            && let Some(way) = self.known_way(oci, &ways).await?
        {
            // Else each request for a range looks through all images.
            self.note(oci, way, std::iter::once(digest.to_string()));
            return self.open_blob(oci, digest, size, way);
        }
        let mut refusal = None;
        for way in &ways {
            let (reference, source) = self.open_registry(oci, way)?;
            let error = match source.blob_size(digest).await {
                Ok(size) => {
                    self.note(oci, way, std::iter::once(digest.to_string()));
                    return self.open_blob(oci, digest, complete.unwrap_or(size), way);
                }
                Err(error) => error,
            };
            let refused = is_refusal(error.kind());
            let error = NodeError::Resolve {
                reference: format!("blob {digest} of {reference}"),
                source: error,
            };
            match refused {
                true => refusal = Some(error),
                false => return Err(error),
            }
        }
        Err(refusal.unwrap_or_else(|| NodeError::Unknown(digest.to_string())))
    }

    /// Makes room for a blob that is about to be brought. `None`: there is none, and it is to be read
    /// past the disk.
    ///
    /// # Errors
    /// What the store says.
    pub async fn room_for(
        &self,
        oci: &OciRef,
        blob: &Handle,
    ) -> Result<Option<Reservation>, NodeError> {
        let reference = Reference {
            locator: Locator::Oci(oci.clone()),
            filter: Filter::default(),
        };
        let wanted = Artifact {
            reference: reference.to_string(),
            revision: String::new(),
            tree: Tree::empty(),
            objects: vec![blob.object().clone()],
        };
        match self.admit(&Arc::new(wanted)).await {
            Ok(room) => Ok(Some(room)),
            Err(NodeError::Store(error))
                if matches!(
                    error.kind(),
                    StoreErrorKind::NoSpace | StoreErrorKind::ReadOnly
                ) =>
            {
                tracing::warn!(%error, "a blob is passed on, and not kept");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn open_blob(
        &self,
        oci: &OciRef,
        digest: &Digest,
        size: u64,
        way: &Way,
    ) -> Result<Arc<Handle>, NodeError> {
        let (reference, source) = self.open_registry(oci, way)?;
        let blob = Layer {
            blob: *digest,
            size,
            media_type: String::new(),
            diff_id: None,
            annotations: Default::default(),
            as_file: None,
        };
        self.engine
            .open(&blob_of(&blob), &source)
            .map_err(|source| NodeError::Fetch {
                reference: reference.to_string(),
                source,
            })
    }

    /// How a registry may be asked for a client, that which it said yes to first.
    fn ways(&self, oci: &OciRef, visitor: Option<Keys>) -> Vec<Way> {
        let mut ways: Vec<Way> = match self.tenancy().node_is_for_all() {
            true => [None].into_iter().chain(visitor.map(Some)).collect(),
            false => vec![Some(visitor.unwrap_or_default().alone())],
        };
        ways.sort_by_key(|way| !self.knows(oci, way));
        ways
    }

    /// The way by which `oci` may be shown without asking its registry.
    async fn known_way<'w>(
        &self,
        oci: &OciRef,
        ways: &'w [Way],
    ) -> Result<Option<&'w Way>, NodeError> {
        if let Some(way) = ways.iter().find(|way| self.knows(oci, way)) {
            return Ok(Some(way));
        }
        let Some(own) = ways.iter().find(|way| way.is_none()) else {
            return Ok(None);
        };
        // An image that the node brought by itself.
        let (store, oci) = (Arc::clone(self.store()), oci.clone());
        let is_own = blocking(move || {
            let wanted: Option<Digest> = oci.wanted().parse().ok();
            for image in store.images()? {
                let Ok(reference) = image.reference.parse::<Reference>() else {
                    continue;
                };
                let Locator::Oci(of) = &reference.locator else {
                    continue;
                };
                let has = match wanted {
                    Some(wanted) => {
                        image.documents().any(|document| document == wanted)
                            || image.layers.iter().any(|layer| layer.blob == wanted)
                    }
                    None => of.wanted() == oci.wanted(),
                };
                if has
                    && (&of.registry, &of.repository) == (&oci.registry, &oci.repository)
                    && is_the_nodes(&store, &image.reference)?
                {
                    return Ok(true);
                }
            }
            Ok(false)
        });
        Ok(is_own.await?.then_some(own))
    }

    fn knows(&self, oci: &OciRef, way: &Way) -> bool {
        let key = shown(oci, way, oci.wanted());
        let life = match way {
            // Needs no registry any more.
            None => Duration::MAX,
            Some(_) => self.tenancy().life(),
        };
        self.visitors.knows(&key, life, Instant::now())
    }

    fn note(&self, oci: &OciRef, way: &Way, names: impl Iterator<Item = String>) {
        let keys = names.map(|name| shown(oci, way, &name));
        self.visitors
            .note(keys, self.tenancy().life(), Instant::now());
    }

    fn note_manifest(&self, oci: &OciRef, way: &Way, found: &ManifestBytes) {
        let named: Named = serde_json::from_slice(&found.bytes).unwrap_or_default();
        let below = named
            .config
            .into_iter()
            .chain(named.layers)
            .chain(named.manifests)
            .map(|descriptor| descriptor.digest);
        let itself = [oci.wanted().to_owned(), found.digest.to_string()].into_iter();
        self.note(oci, way, itself.chain(below.take(MAX_NAMES)));
    }

    /// The repository of `oci`, opened this way.
    fn open_registry(
        &self,
        oci: &OciRef,
        way: &Way,
    ) -> Result<(Reference, Arc<dyn Source>), NodeError> {
        let reference = Reference {
            locator: Locator::Oci(oci.clone()),
            filter: Filter::default(),
        };
        let failed = |source| NodeError::Resolve {
            reference: reference.to_string(),
            source,
        };
        let source = match way {
            None => self.sources.open(&reference).map_err(failed)?,
            Some(keys) => {
                let key = shown(oci, way, "");
                let now = Instant::now();
                let mut known = self.visitors.sources.lock();
                known.retain(|one| now.saturating_duration_since(one.used) < SOURCE_LIFE);
                let at = known.iter().position(|one| one.key == key);
                let source = match at {
                    Some(at) => known.remove(at).source,
                    None => {
                        let credentials = Credentials::new(keys.clone());
                        let sources = self.sources.with_credentials(credentials);
                        sources.open(&reference).map_err(failed)?
                    }
                };
                if known.len() >= MAX_SOURCES {
                    known.remove(0);
                }
                known.push(Opened {
                    key,
                    used: now,
                    source: Arc::clone(&source),
                });
                source
            }
        };
        Ok((reference, source))
    }
}

/// Names `wanted` of the repository of `oci`, for those who come this way.
fn shown(oci: &OciRef, way: &Way, wanted: &str) -> Digest {
    let who = way.as_ref().map(|keys| keys.fingerprint().to_string());
    let who = who.as_deref().unwrap_or("");
    Digest::of(format!("{}\n{}\n{wanted}\n{who}", oci.registry, oci.repository).as_bytes())
}

/// Whether other credentials could do better.
const fn is_refusal(kind: SourceErrorKind) -> bool {
    matches!(kind, SourceErrorKind::Denied | SourceErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_is_bounded_and_expires() {
        let (visitors, now) = (Visitors::default(), Instant::now());
        let life = Duration::from_secs(60);
        let key = |n: usize| Digest::of(&n.to_le_bytes());
        let at = |n: usize| now + Duration::from_micros(n as u64);
        for n in 0..2 * MAX_SHOWN {
            visitors.note(std::iter::once(key(n)), life, at(n));
            assert!(visitors.knows(&key(n), life, at(n)));
        }
        assert!(visitors.shown.lock().len() <= MAX_SHOWN);
        let last = key(2 * MAX_SHOWN - 1);
        assert!(!visitors.knows(&last, life, now + 2 * life));
        assert!(visitors.knows(&last, Duration::MAX, now + 2 * life));
        assert!(!visitors.knows(&key(0), life, now));
    }

    #[test]
    fn names_are_of_one_repository_and_one_client() {
        let oci = |text: &str| match format!("oci://{text}")
            .parse::<Reference>()
            .unwrap()
            .locator
        {
            Locator::Oci(oci) => oci,
            other => panic!("{other:?}"),
        };
        let bearer = |token: &str| Keys::of_header("r.io", &format!("Bearer {token}"));
        let all = [
            shown(&oci("r.io/a:1"), &None, "1"),
            shown(&oci("r.io/a:1"), &None, "2"),
            shown(&oci("r.io/b:1"), &None, "1"),
            shown(&oci("s.io/a:1"), &None, "1"),
            shown(&oci("r.io/a:1"), &bearer("x"), "1"),
            shown(&oci("r.io/a:1"), &bearer("y"), "1"),
        ];
        let distinct: std::collections::BTreeSet<_> = all.iter().map(Digest::hex).collect();
        assert_eq!(distinct.len(), all.len());
    }
}
