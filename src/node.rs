//! What a node does with references: resolve, warm, open for a view, report.
//!
//! The one place that joins sources, store and engine. An artifact is recorded before its objects
//! are looked at, so that collection in any process leaves them alone; it is held while it is
//! warmed or viewed. What is warm needs no network: when the origin cannot be reached, the
//! recorded artifact is used; the one before it, where not all of it is here and all of that is. Called by the
//! faces and the CLI.

mod bake;
mod documents;
mod error;
mod fill;
mod hold;
mod layers;
mod meaning;
mod patient;
mod progress;
mod report;
mod slices;
mod status;
mod tenancy;
mod unpack;
mod visitors;

use std::{sync::Arc, time::Duration};

pub use self::{
    bake::Planned,
    error::NodeError,
    layers::{PushedIndexes, Start},
    meaning::Meaning,
    progress::{FileProgress, Progress, Snapshot},
    report::WarmReport,
    status::{ArtifactStatus, FileStatus, Place, Presence},
    tenancy::{OverQuota, Passing, Tenancy, TenancyConfig},
};
use self::{
    hold::MAX_REMOVALS,
    layers::{Layers, Slots},
    meaning::{Purpose, is_in_layers, meaning},
    visitors::Visitors,
};
use crate::{
    digest::Digest,
    fetch::{self, Engine, FetchErrorKind, VerifyPolicy},
    image::Memory,
    reference::{HubRepo, Locator, Reference},
    source::{Credentials, Source, SourceErrorKind, Sources, patiently},
    store::{ByteSize, Reservation, Store, StoreError, StoreErrorKind},
    telemetry::{self, span},
    tree::{Artifact, Object},
};

/// Decoded bytes of layers that are kept in memory for a while, of all images that are read.
const DECODED_CACHE: usize = 64 << 20;

/// A reference brought down to an artifact.
#[derive(Debug, Clone)]
pub struct Resolved {
    pub artifact: Arc<Artifact>,
    pub source: Arc<dyn Source>,
    /// Whether the origin said so just now; else it is what the store remembers.
    pub fresh: bool,
    /// Whether the store did not know the reference before.
    pub new: bool,
    /// Bytes of files that came with resolving it: layers had to be unpacked.
    brought: u64,
    /// Of what lies in layers.
    layers: Option<Arc<Layers>>,
}

impl Resolved {
    /// Whether nothing of what is known of it waits to be checked against the layers.
    pub fn is_verified(&self) -> bool {
        self.layers
            .as_ref()
            .is_none_or(|layers| layers.are_trusted())
    }

    /// Tells the span that this is part of.
    fn tell(&self) {
        let span = tracing::Span::current();
        if span.is_disabled() {
            return;
        }
        telemetry::text(&span, "hearth.revision", &self.artifact.revision);
        telemetry::flag(&span, "hearth.fresh", self.fresh);
        telemetry::count(&span, "hearth.objects", self.artifact.objects.len() as u64);
        telemetry::count(&span, "hearth.bytes.total", self.artifact.size());
    }

    fn plain(artifact: Arc<Artifact>, source: Arc<dyn Source>, fresh: bool) -> Self {
        Self {
            artifact,
            source,
            fresh,
            new: false,
            brought: 0,
            layers: None,
        }
    }
}

/// The node: one per process.
#[derive(Clone)]
pub struct Node {
    sources: Sources,
    engine: Engine,
    /// Of what is warmed; see [`Node::with_rank`].
    rank: i8,
    /// Nobody waits for what it brings.
    is_ahead: bool,
    tenancy: Arc<Tenancy>,
    visitors: Arc<Visitors>,
    /// For what lies in layers.
    memory: Arc<Memory>,
    slots: Arc<Slots>,
}

impl Node {
    /// A node over an engine (and its store) and sources.
    pub fn new(engine: Engine, sources: Sources) -> Self {
        Self {
            sources,
            engine,
            rank: 0,
            is_ahead: false,
            tenancy: Arc::default(),
            visitors: Arc::default(),
            memory: Memory::new(DECODED_CACHE),
            slots: Arc::default(),
        }
    }

    /// This node, opening origins with `credentials`.
    #[must_use]
    pub fn with_credentials(&self, credentials: Credentials) -> Self {
        Self {
            sources: self.sources.with_credentials(credentials),
            ..self.clone()
        }
    }

    /// This node, deciding about namespaces as `config` says.
    #[must_use]
    pub fn with_tenancy(self, config: TenancyConfig) -> Self {
        Self {
            tenancy: Arc::new(Tenancy::new(config)),
            ..self
        }
    }

    /// Decides about namespaces.
    pub fn tenancy(&self) -> &Tenancy {
        &self.tenancy
    }

    /// This node, to warm what is needed later: its background work goes before that of a lower rank, and what it unpacks
    /// leaves turns to those who wait.
    #[must_use]
    pub fn with_rank(&self, rank: i8) -> Self {
        Self {
            rank,
            is_ahead: true,
            ..self.clone()
        }
    }

    /// This node with another policy of what may be served before the whole is verified. Both share the store.
    #[must_use]
    pub fn with_verify(&self, verify: VerifyPolicy) -> Self {
        self.with_config(fetch::Config {
            verify,
            ..self.engine.config().clone()
        })
    }

    /// This node with at most so many bytes per second for background work, and little memory. Both share the store.
    #[must_use]
    pub fn with_bandwidth(&self, per_second: u64) -> Self {
        const MEMORY: u64 = 16 << 20;
        let config = self.engine.config().clone();
        self.with_config(fetch::Config {
            warm_bandwidth: Some(ByteSize(per_second)),
            memory: ByteSize(MEMORY.min(config.memory.0)),
            ..config
        })
    }

    fn with_config(&self, config: fetch::Config) -> Self {
        Self {
            engine: self.engine.beside(config),
            ..self.clone()
        }
    }

    /// The store.
    pub fn store(&self) -> &Arc<Store> {
        self.engine.store()
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// How long an origin that puts requests off is asked.
    fn patience(&self) -> Duration {
        self.engine.config().patience
    }

    /// Resolves `reference` and records the artifact. A commit that is recorded needs no network;
    /// when the origin cannot be reached, what is recorded is used.
    ///
    /// # Errors
    /// What the source or the store says.
    pub async fn resolve(&self, reference: &Reference) -> Result<Resolved, NodeError> {
        let progress = Progress::default();
        self.resolve_for(reference, Purpose::Read(&progress)).await
    }

    /// As [`Node::resolve`], for who brings all of it; shows the progress of layers that have to be unpacked for it.
    ///
    /// # Errors
    /// As [`Node::resolve`]; where an image does not fit in the place of what is recorded, which stays then.
    pub async fn resolve_showing(
        &self,
        reference: &Reference,
        progress: &Progress,
    ) -> Result<Resolved, NodeError> {
        self.resolve_for(reference, Purpose::Bring(progress)).await
    }

    async fn resolve_for(
        &self,
        reference: &Reference,
        purpose: Purpose<'_>,
    ) -> Result<Resolved, NodeError> {
        let span = span!("resolve", hearth.reference = %reference);
        let resolving = async {
            let resolved = self.resolve_now(reference, purpose).await;
            resolved.inspect(Resolved::tell)
        };
        telemetry::within(span, NodeError::about, resolving).await
    }

    async fn resolve_now(
        &self,
        reference: &Reference,
        purpose: Purpose<'_>,
    ) -> Result<Resolved, NodeError> {
        let name = reference.to_string();
        let failed = |source| NodeError::Resolve {
            reference: name.clone(),
            source,
        };
        let source = self.sources.open(reference).map_err(failed)?;
        let recorded = self.recorded(&name).await?;
        if let Some(artifact) = &recorded
            && is_immutable(&reference.locator)
            && let Some(resolved) = self.as_recorded(reference, artifact, &source).await?
        {
            return Ok(resolved);
        }
        let asked = std::time::Instant::now();
        let fallback = match &recorded {
            Some(recorded) => Some(Arc::clone(recorded)),
            None => self.recorded_for_here(reference).await?,
        };
        // What is recorded will do: nobody has to wait.
        let patience = match fallback {
            Some(_) => Duration::ZERO,
            None => self.patience(),
        };
        let was_unpacked = recorded.as_ref().is_some_and(|a| is_in_layers(a));
        let mut meant = patiently(patience, meaning(&source, reference, was_unpacked)).await;
        if let Err(error) = &meant
            && let Some(recorded) = self.last_whole(&name).await?.or(fallback)
        {
            let is_passing = is_passing(error.kind());
            // It gave some of it before: credentials have expired.
            let is_expired = error.kind() == SourceErrorKind::Denied;
            if (is_passing || is_expired && self.has_some(&recorded).await?)
                && let Some(resolved) = self.as_recorded(reference, &recorded, &source).await?
            {
                let revision = &recorded.revision;
                tracing::warn!(%error, revision, "the origin cannot be reached: using what is recorded");
                return Ok(resolved);
            }
            if is_passing {
                // That will not do: now somebody has to wait.
                let again = meaning(&source, reference, was_unpacked);
                meant = patiently(self.patience(), again).await;
            }
        }
        match meant {
            Ok(Meaning::Layers(layered)) => {
                if let Some(artifact) = &recorded
                    && artifact.revision == layered.manifest.to_string()
                    && let Some(mut resolved) = self.recorded_layers(artifact, &source).await?
                {
                    resolved.fresh = true;
                    return Ok(resolved);
                }
                let resolved = self
                    .resolve_layered(reference, layered, &source, purpose)
                    .await?;
                let mut resolved = resolved.ok_or(NodeError::Unknown(name))?;
                resolved.new = recorded.is_none();
                Ok(resolved)
            }
            Ok(Meaning::Files(artifact)) => {
                let artifact = Arc::new(artifact);
                tracing::info!(
                    reference = name,
                    revision = artifact.revision,
                    objects = artifact.objects.len(),
                    bytes = artifact.size(),
                    took = ?asked.elapsed(),
                    "resolved"
                );
                // A store that cannot be written still serves what it has; so does a full one.
                if self.store().writable() {
                    let known = recorded.as_ref() == Some(&artifact);
                    match self.record(&artifact).await {
                        Err(NodeError::Store(error)) if known && is_of_disk(error.kind()) => {
                            tracing::warn!(reference = name, %error, "recorded before, and not anew");
                        }
                        other => other?,
                    }
                }
                let mut resolved = Resolved::plain(artifact, source, true);
                resolved.new = recorded.is_none();
                Ok(resolved)
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// As [`Node::resolve`] for an image, but unpacks nothing: `None` where the image cannot be read
    /// before it is pulled, or `reference` is no image.
    ///
    /// # Errors
    /// As [`Node::resolve`].
    pub async fn resolve_lazily(
        &self,
        reference: &Reference,
    ) -> Result<Option<Resolved>, NodeError> {
        let failed = |source| NodeError::Resolve {
            reference: reference.to_string(),
            source,
        };
        let span = span!("resolve", hearth.reference = %reference, hearth.lazy = true);
        let resolving = async {
            let source = self.sources.open(reference).map_err(failed)?;
            let asked = patiently(self.patience(), source.layered(reference));
            let Some(layered) = asked.await.map_err(failed)? else {
                return Ok(None);
            };
            let resolved = self.resolve_layered(reference, layered, &source, Purpose::ReadLazily);
            Ok(resolved.await?.inspect(Resolved::tell))
        };
        telemetry::within(span, NodeError::about, resolving).await
    }

    /// The generation `digest` of `reference`, as a process before this one served it, whatever the
    /// reference means by now; what is read at other places of its layers since may have another digest.
    /// Needs no network where the store has it.
    ///
    /// # Errors
    /// It is not here, and the origin has another.
    pub async fn resume(
        &self,
        reference: &Reference,
        digest: &Digest,
    ) -> Result<Resolved, NodeError> {
        let failed = |source| NodeError::Resolve {
            reference: reference.to_string(),
            source,
        };
        let source = self.sources.open(reference).map_err(failed)?;
        let (store, wanted) = (Arc::clone(self.store()), *digest);
        let served = blocking(move || store.generation(&wanted)).await?;
        let served = served.map(Arc::new);
        if let Some(artifact) = &served
            && let Some(resolved) = self.as_recorded(reference, artifact, &source).await?
        {
            return Ok(resolved);
        }
        // A store that cannot be written has no record of it.
        let resolved = self.resolve(reference).await?;
        let is_it = |served: &Arc<Artifact>| served.shows_the_same(&resolved.artifact);
        match resolved.artifact.digest() == *digest || served.as_ref().is_some_and(is_it) {
            true => Ok(resolved),
            false => Err(NodeError::Unknown(format!("{reference} as {digest}"))),
        }
    }

    /// Whether every object of the artifact is complete.
    async fn has_all(&self, artifact: &Arc<Artifact>) -> Result<bool, NodeError> {
        let (store, artifact) = (Arc::clone(self.store()), Arc::clone(artifact));
        let all = blocking(move || {
            let finder = store.finder()?;
            for object in artifact.stored() {
                if finder.find(object)?.is_none() {
                    return Ok(false);
                }
            }
            Ok(true)
        });
        Ok(all.await?)
    }

    /// Whether some content of the artifact is here.
    async fn has_some(&self, artifact: &Arc<Artifact>) -> Result<bool, NodeError> {
        let (store, artifact) = (Arc::clone(self.store()), Arc::clone(artifact));
        let some = blocking(move || {
            let origin = artifact.origin();
            for object in artifact.stored().filter(|object| object.size > 0) {
                if store.present_bytes(object.partial_id(&origin), object.size) > 0
                    || store.complete(&object.id)?.is_some()
                {
                    return Ok(true);
                }
            }
            Ok(false)
        });
        Ok(some.await?)
    }

    /// What is recorded of `reference`; `None` where that does not suffice to read it.
    async fn as_recorded(
        &self,
        reference: &Reference,
        artifact: &Arc<Artifact>,
        source: &Arc<dyn Source>,
    ) -> Result<Option<Resolved>, NodeError> {
        // The origin has given some of it: whatever it says now, it is asked again.
        let source = &match self.has_some(artifact).await? {
            true => patient::Patient::of(source),
            false => Arc::clone(source),
        };
        match matches!(reference.locator, Locator::Oci(_)) && is_in_layers(artifact) {
            true => self.recorded_layers(artifact, source).await,
            false => {
                let (artifact, source) = (Arc::clone(artifact), Arc::clone(source));
                Ok(Some(Resolved::plain(artifact, source, false)))
            }
        }
    }

    /// Brings all of `reference` onto this node, verified, and records a pin where one is asked
    /// for. Goes on where an earlier one stopped.
    ///
    /// # Errors
    /// What the source, the store or the verification says; before the first byte where it cannot
    /// fit.
    pub async fn warm(
        &self,
        reference: &Reference,
        pin: Option<&str>,
        progress: &Progress,
    ) -> Result<WarmReport, NodeError> {
        self.warm_at(reference, None, pin, progress).await
    }

    /// As [`Node::warm`], of `reference` as it was at `revision`, where one is given.
    ///
    /// # Errors
    /// As [`Node::warm`]; where the origin does not have that revision any more.
    pub async fn warm_at(
        &self,
        reference: &Reference,
        revision: Option<&str>,
        pin: Option<&str>,
        progress: &Progress,
    ) -> Result<WarmReport, NodeError> {
        let span = span!("warm", hearth.reference = %reference);
        let warming = self.warm_now(reference, revision, pin, progress);
        telemetry::within(span, NodeError::about, warming).await
    }

    async fn warm_now(
        &self,
        reference: &Reference,
        revision: Option<&str>,
        pin: Option<&str>,
        progress: &Progress,
    ) -> Result<WarmReport, NodeError> {
        let started = std::time::Instant::now();
        let mut tried_again = false;
        let mut removals = 0;
        loop {
            let resolved = match revision {
                Some(revision) => {
                    let purpose = Purpose::Bring(progress);
                    self.resolve_at(reference, revision, purpose).await?
                }
                None => self.resolve_showing(reference, progress).await?,
            };
            match self.warm_resolved(&resolved, pin, progress).await {
                Err(NodeError::Fetch { source, .. })
                    if source.kind() == FetchErrorKind::Changed && !tried_again =>
                {
                    tracing::warn!(%reference, "changed at the origin: resolving again");
                    tried_again = true;
                }
                // All of its layers are here, with true indexes.
                Err(error @ NodeError::Misled { .. })
                    if resolved.layers.is_some() && !tried_again =>
                {
                    tracing::warn!(%error, "resolving again");
                    tried_again = true;
                }
                Err(error) if self.was_removed(&error) && removals < MAX_REMOVALS => {
                    tracing::warn!(%reference, "removed meanwhile: resolving again");
                    removals += 1;
                }
                Err(error) => return Err(error),
                Ok(before) => return Ok(WarmReport::new(&resolved, before, started)),
            }
        }
    }

    /// As [`Node::warm`], of what was resolved; if it has changed since, that is an error.
    ///
    /// # Errors
    /// As [`Node::warm`].
    pub async fn warm_known(
        &self,
        resolved: &Resolved,
        pin: Option<&str>,
        progress: &Progress,
    ) -> Result<WarmReport, NodeError> {
        let started = std::time::Instant::now();
        let span = span!("warm", hearth.reference = resolved.artifact.reference);
        let warming = async {
            let before = self.warm_resolved(resolved, pin, progress).await?;
            Ok(WarmReport::new(resolved, before, started))
        };
        telemetry::within(span, NodeError::about, warming).await
    }

    async fn warm_resolved(
        &self,
        resolved: &Resolved,
        pin: Option<&str>,
        progress: &Progress,
    ) -> Result<u64, NodeError> {
        let artifact = &resolved.artifact;
        let hold = self.hold_resolved(resolved).await?;
        let coming = match self.make_room(resolved).await {
            Ok(coming) => coming,
            Err(error) => {
                drop(hold);
                match resolved.new {
                    true => self.forget(&artifact.reference).await,
                    false => self.take_back(artifact).await,
                }
                return Err(error);
            }
        };
        if let Some(owner) = pin {
            let (store, owner) = (Arc::clone(self.store()), owner.to_owned());
            let name = artifact.reference.clone();
            blocking(move || store.pin(&name, &owner)).await?;
        }
        let before = self.present_bytes(artifact).await?;
        progress.begin(artifact);
        self.bring(resolved, coming, progress, None).await?;
        Ok(before.saturating_sub(resolved.brought))
    }

    /// The bytes of an artifact that are here.
    async fn present_bytes(&self, artifact: &Arc<Artifact>) -> Result<u64, NodeError> {
        let (store, artifact) = (Arc::clone(self.store()), Arc::clone(artifact));
        let counted = blocking(move || {
            let (finder, origin) = (store.finder()?, artifact.origin());
            let of = |object: &Object| match finder.find(object) {
                Ok(Some(_)) => object.size,
                _ => store.present_bytes(object.partial_id(&origin), object.size),
            };
            Ok(artifact.stored().map(of).sum())
        });
        Ok(counted.await?)
    }

    /// Makes sure that an artifact fits, evicting where that helps.
    ///
    /// # Errors
    /// Does not fit: the arithmetic is in the error.
    pub async fn admit(&self, artifact: &Arc<Artifact>) -> Result<Reservation, NodeError> {
        let (store, artifact) = (Arc::clone(self.store()), Arc::clone(artifact));
        Ok(blocking(move || store.admit(&artifact)).await?)
    }

    /// Takes back the record of an artifact that was refused, so that it is not listed as one that
    /// is on its way. Not where it is pinned, or another process uses it.
    async fn forget(&self, reference: &str) {
        let (store, name) = (Arc::clone(self.store()), reference.to_owned());
        if let Err(error) = blocking(move || store.remove(&name)).await {
            tracing::debug!(reference, %error, "the record of what was refused stays");
        }
    }

    /// Has the reference mean again what it meant before this generation, which was refused, was recorded.
    async fn take_back(&self, artifact: &Arc<Artifact>) {
        let (store, artifact) = (Arc::clone(self.store()), Arc::clone(artifact));
        let reference = artifact.reference.clone();
        let taken = blocking(move || store.take_back(&artifact.reference, &artifact.digest()));
        if let Err(error) = taken.await {
            tracing::debug!(reference, %error, "the record of what was refused stays");
        }
    }

    /// What the reference meant before it was recorded last, where only that is all here.
    async fn last_whole(&self, reference: &str) -> Result<Option<Arc<Artifact>>, NodeError> {
        let (store, reference) = (Arc::clone(self.store()), reference.to_owned());
        let whole = blocking(move || store.last_whole(&reference)).await?;
        Ok(whole.map(Arc::new))
    }

    async fn recorded(&self, reference: &str) -> Result<Option<Arc<Artifact>>, NodeError> {
        let (store, reference) = (Arc::clone(self.store()), reference.to_owned());
        let found = blocking(move || store.artifact(&reference)).await?;
        Ok(found.map(|(_, artifact)| Arc::new(artifact)))
    }

    async fn record(&self, artifact: &Arc<Artifact>) -> Result<(), NodeError> {
        let (store, artifact) = (Arc::clone(self.store()), Arc::clone(artifact));
        match blocking(move || store.record(&artifact)).await {
            Ok(_) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Runs store work that may touch the disk off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    joined(tokio::task::spawn_blocking(work)).await
}

/// What a task that blocks came to.
async fn joined<T>(task: tokio::task::JoinHandle<T>) -> T {
    match task.await {
        Ok(done) => done,
        Err(failed) => match failed.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going down, and so is whoever waits here.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Whether an origin that failed so may answer when it is asked again.
const fn is_passing(kind: SourceErrorKind) -> bool {
    matches!(
        kind,
        SourceErrorKind::Unavailable | SourceErrorKind::Throttled | SourceErrorKind::Corrupt
    )
}

/// Whether it is the disk that refuses.
const fn is_of_disk(kind: StoreErrorKind) -> bool {
    matches!(
        kind,
        StoreErrorKind::NoSpace | StoreErrorKind::ReadOnly | StoreErrorKind::Io
    )
}

/// Whether the reference can never mean anything else: a full commit hash or a digest.
fn is_immutable(locator: &Locator) -> bool {
    match locator {
        Locator::Hub(HubRepo { revision, .. }) => revision.as_ref().is_some_and(|revision| {
            revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
        }),
        Locator::Oci(oci) => oci.digest.is_some(),
        _ => false,
    }
}
