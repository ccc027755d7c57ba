//! Buckets: S3, Google Cloud Storage and Azure Blob Storage, through `object_store`.
//!
//! Settings and credentials come from the environment, as the tools of each provider read them
//! (`environment`). Every range read carries `If-Match` where the etag is strong, and the answer's
//! etag is compared too, for servers that ignore the condition. What `object_store` retries by
//! itself is switched off.
//!
//! `object_store` strips a slash at either end of a listed key. Directory markers (`dir/`, empty)
//! therefore look like empty files and are told apart by asking for them; a key that begins with
//! `/`, or a marker with content, cannot be read and is not found.

mod environment;
mod failure;
mod transport;

use std::{collections::HashSet, fmt, ops::Range, sync::Arc};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::{
    GetOptions, GetRange, ObjectMeta, ObjectStore,
    list::{PaginatedListOptions, PaginatedListStore},
    path::Path,
};
use sha2::{Digest as _, Sha256};
use tokio::time::timeout;

use self::transport::Probe;
use super::{
    AwsKeys, ByteStream, Config, Source, SourceError, SourceErrorKind,
    listing::{Listed, Listing, short},
    retry::asked,
};
use crate::{
    digest::{ObjectId, to_hex},
    reference::{Bucket, Locator, Reference},
    tree::{Artifact, Location},
};

/// Pages without a single entry that a listing may have in a row.
const MAX_EMPTY_PAGES: usize = 1000;
/// Requests at a time that tell directory markers from empty files.
const MARKER_CHECKS: usize = 16;

/// One bucket or container.
pub(super) struct ObjectSource {
    store: Arc<dyn ObjectStore>,
    lister: Arc<dyn PaginatedListStore>,
    /// `s3://bucket`.
    name: String,
    /// Host, and path where there is one, of the service.
    endpoint: String,
    config: Config,
}

impl fmt::Debug for ObjectSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ObjectSource({} at {})", self.name, self.endpoint)
    }
}

impl ObjectSource {
    /// An S3 bucket; with `keys` instead of those of the environment.
    pub(super) fn s3(
        bucket: &str,
        config: &Config,
        keys: Option<&AwsKeys>,
    ) -> Result<Self, SourceError> {
        let (store, endpoint) = environment::s3(bucket, config, keys)?;
        Ok(Self::over(
            store,
            format!("s3://{bucket}"),
            endpoint,
            config,
        ))
    }

    /// A Google Cloud Storage bucket.
    pub(super) fn gcs(bucket: &str, config: &Config) -> Result<Self, SourceError> {
        let (store, endpoint) = environment::gcs(bucket, config)?;
        Ok(Self::over(
            store,
            format!("gs://{bucket}"),
            endpoint,
            config,
        ))
    }

    /// An Azure Blob Storage container.
    pub(super) fn azure(container: &str, config: &Config) -> Result<Self, SourceError> {
        let (store, endpoint) = environment::azure(container, config)?;
        Ok(Self::over(
            store,
            format!("az://{container}"),
            endpoint,
            config,
        ))
    }

    fn over<S>(store: S, name: String, endpoint: String, config: &Config) -> Self
    where
        S: ObjectStore + PaginatedListStore,
    {
        let store = Arc::new(store);
        Self {
            store: Arc::clone(&store) as _,
            lister: store,
            name,
            endpoint,
            config: config.clone(),
        }
    }

    /// What errors about `key` name.
    fn what(&self, key: &str) -> String {
        format!("{}/{} at {}", self.name, short(key), self.endpoint)
    }

    fn error(&self, kind: SourceErrorKind, key: &str, message: impl Into<String>) -> SourceError {
        SourceError::new(kind, self.what(key), message)
    }

    fn path(&self, key: &str) -> Result<Path, SourceError> {
        let refuse = || self.error(SourceErrorKind::Invalid, key, "this key cannot be read");
        let path = Path::parse(key).map_err(|e| refuse().because(e))?;
        if path.as_ref() == key {
            Ok(path)
        } else {
            Err(refuse())
        }
    }

    async fn head(&self, key: &str) -> Result<ObjectMeta, SourceError> {
        let path = self.path(key)?;
        asked(|| self.head_once(key, &path)).await
    }

    async fn head_once(&self, key: &str, path: &Path) -> Result<ObjectMeta, SourceError> {
        let probe = Probe::new();
        let options = GetOptions {
            head: true,
            extensions: probe.extensions(),
            ..GetOptions::default()
        };
        match timeout(
            self.config.request_timeout(),
            self.store.get_opts(path, options),
        )
        .await
        {
            Ok(Ok(result)) => Ok(result.meta),
            Ok(Err(error)) => Err(failure::explain(self.what(key), &error, &probe, true)),
            Err(_) => Err(failure::slow(self.what(key), self.config.request_timeout())),
        }
    }

    /// Whether `path`, listed with size 0, is a file and not the marker of an empty directory.
    async fn is_empty_file(&self, path: &str) -> Result<bool, SourceError> {
        match self.head(path).await {
            Ok(meta) => Ok(meta.size == 0),
            Err(error) if error.kind() == SourceErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Adds all keys below `prefix` (ends in `/` or is empty).
    async fn list(&self, prefix: &str, found: &mut Found) -> Result<(), SourceError> {
        let mut empty = Vec::new();
        let mut directories = HashSet::new();
        let mut token: Option<String> = None;
        let mut empty_pages = 0;
        let mut seen = 0;
        loop {
            let page = asked(|| self.page(prefix, token.clone())).await?;
            if page.result.objects.is_empty() {
                empty_pages += 1;
            } else {
                empty_pages = 0;
            }
            seen += page.result.objects.len();
            if seen > self.config.max_entries.get() {
                return Err(found.listing.too_many());
            }
            for meta in page.result.objects {
                let key = meta.location.as_ref();
                let Some(path) = key.strip_prefix(prefix) else {
                    // A marker for the prefix itself has lost its slash.
                    if prefix.strip_suffix('/') == Some(key) {
                        continue;
                    }
                    let message = format!("lists {:?}, which is not below it", short(key));
                    return Err(self.error(SourceErrorKind::Corrupt, prefix, message));
                };
                let mut above = path;
                while let Some((directory, _)) = above.rsplit_once('/')
                    && !directories.contains(directory)
                {
                    directories.insert(directory.to_owned());
                    above = directory;
                }
                if meta.size > 0 {
                    found.add(self, path, &meta)?;
                } else if found.listing.wants(path) {
                    empty.push(meta);
                }
            }
            match page.page_token {
                None => break,
                Some(next) if empty_pages > MAX_EMPTY_PAGES || token.as_ref() == Some(&next) => {
                    return Err(self.error(
                        SourceErrorKind::Corrupt,
                        prefix,
                        "its listing does not come to an end",
                    ));
                }
                Some(next) => token = Some(next),
            }
        }
        empty.dedup_by(|a, b| a.location == b.location);
        let below = |meta: &ObjectMeta| meta.location.as_ref()[prefix.len()..].to_owned();
        empty.retain(|meta| !directories.contains(&below(meta)));
        let mut checked = stream::iter(empty)
            .map(
                |meta| async move { Ok((self.is_empty_file(meta.location.as_ref()).await?, meta)) },
            )
            .buffered(MARKER_CHECKS);
        while let Some((is_file, meta)) = checked.try_next().await? {
            if is_file {
                found.add(self, &below(&meta), &meta)?;
            }
        }
        Ok(())
    }

    async fn page(
        &self,
        prefix: &str,
        token: Option<String>,
    ) -> Result<object_store::list::PaginatedListResult, SourceError> {
        let probe = Probe::new();
        let options = PaginatedListOptions {
            page_token: token,
            extensions: probe.extensions(),
            ..PaginatedListOptions::default()
        };
        let prefix_given = (!prefix.is_empty()).then_some(prefix);
        let request = self.lister.list_paginated(prefix_given, options);
        match timeout(self.config.request_timeout(), request).await {
            Ok(Ok(page)) => Ok(page),
            Ok(Err(error)) => Err(failure::explain(self.what(prefix), &error, &probe, true)),
            Err(_) => Err(failure::slow(
                self.what(prefix),
                self.config.request_timeout(),
            )),
        }
    }
}

/// The files found so far, and the digest of their generations.
struct Found {
    listing: Listing,
    revision: Sha256,
}

impl Found {
    fn new(reference: &Reference, config: &Config) -> Result<Self, SourceError> {
        let listing = Listing::new(reference, String::new())?;
        Ok(Self {
            listing: listing.with_max_entries(config.max_entries.get()),
            revision: Sha256::new(),
        })
    }

    fn add(
        &mut self,
        source: &ObjectSource,
        path: &str,
        meta: &ObjectMeta,
    ) -> Result<(), SourceError> {
        let generation = generation(meta);
        if self.listing.wants(path) {
            for part in [path, &generation] {
                self.revision.update((part.len() as u64).to_le_bytes());
                self.revision.update(part.as_bytes());
            }
            self.revision.update(meta.size.to_le_bytes());
        }
        let key = meta.location.as_ref();
        let (scheme, bucket) = source.name.split_once("://").unwrap_or_default();
        let place = format!("{scheme}://{}/{bucket}/{key}", source.endpoint);
        self.listing.add(Listed {
            path,
            size: meta.size,
            id: ObjectId::located(&place, &generation, meta.size),
            git_sha1: None,
            location: Location {
                path: key.to_owned(),
                generation: Some(generation),
                offset: 0,
            },
            mtime: meta.last_modified.timestamp(),
            executable: false,
        })
    }

    fn finish(mut self) -> Result<Artifact, SourceError> {
        let revision: [u8; 32] = self.revision.finalize().into();
        self.listing.set_revision(to_hex(&revision));
        self.listing.finish()
    }
}

#[async_trait::async_trait]
impl Source for ObjectSource {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        let (Locator::S3(Bucket { prefix, .. })
        | Locator::Gcs(Bucket { prefix, .. })
        | Locator::Azure(Bucket { prefix, .. })) = &reference.locator
        else {
            let what = reference.to_string();
            return Err(SourceError::new(
                SourceErrorKind::Invalid,
                what,
                "is not in a bucket",
            ));
        };
        let mut found = Found::new(reference, &self.config)?;
        if prefix.is_empty() || prefix.ends_with('/') {
            self.list(prefix, &mut found).await?;
            return found.finish();
        }
        match self.head(prefix).await {
            Ok(meta) => {
                let name = prefix.rsplit('/').next().unwrap_or(prefix);
                found.add(self, name, &meta)?;
            }
            Err(error) if error.kind() == SourceErrorKind::NotFound => {
                self.list(&format!("{prefix}/"), &mut found).await?;
            }
            Err(error) => return Err(error),
        }
        found.finish()
    }

    fn origin(&self) -> String {
        self.name.clone()
    }

    async fn read(
        &self,
        location: &Location,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        let key = location.path.as_str();
        let path = self.path(key)?;
        let pinned = location.generation.as_deref().map(Generation::parse);
        let probe = Probe::new();
        let options = GetOptions {
            range: Some(GetRange::Bounded(range.clone())),
            if_match: pinned.and_then(Generation::if_match),
            extensions: probe.extensions(),
            ..GetOptions::default()
        };
        tracing::debug!(what = self.what(key), ?range, "asking");
        let answer = timeout(
            self.config.request_timeout(),
            self.store.get_opts(&path, options),
        );
        let result = match answer.await {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => {
                let error = failure::explain(self.what(key), &error, &probe, false);
                // Azure says "condition not met" of a blob that is gone, too.
                if error.kind() == SourceErrorKind::Changed
                    && let Err(gone) = self.head(key).await
                    && gone.kind() == SourceErrorKind::NotFound
                {
                    return Err(gone);
                }
                return Err(error);
            }
            Err(_) => return Err(failure::slow(self.what(key), self.config.request_timeout())),
        };
        if pinned.is_some_and(|pinned| !pinned.is(&result.meta)) {
            let message = "holds another generation than the one resolved";
            return Err(self.error(SourceErrorKind::Changed, key, message));
        }
        if result.range.start != range.start || result.range.end > range.end {
            let message = format!("answered bytes {:?} for {range:?}", result.range);
            return Err(self.error(SourceErrorKind::Corrupt, key, message));
        }
        if result.range.end < range.end {
            let message = format!("has {} bytes, fewer than resolved", result.meta.size);
            return Err(self.error(SourceErrorKind::Changed, key, message));
        }
        let body = Body {
            what: self.what(key),
            left: range.end - range.start,
            probe,
            body: result.into_stream(),
            done: false,
        };
        Ok(stream::unfold(body, Body::next).boxed())
    }
}

/// A body that must have exactly the bytes asked for.
struct Body {
    what: String,
    left: u64,
    probe: Probe,
    body: stream::BoxStream<'static, object_store::Result<Bytes>>,
    done: bool,
}

impl Body {
    async fn next(mut self) -> Option<(Result<Bytes, SourceError>, Self)> {
        if self.done {
            return None;
        }
        let corrupt =
            |what: &str, message| Err(SourceError::new(SourceErrorKind::Corrupt, what, message));
        let item = match self.body.next().await {
            Some(Ok(bytes)) => match self.left.checked_sub(bytes.len() as u64) {
                Some(left) => {
                    self.left = left;
                    Ok(bytes)
                }
                None => corrupt(&self.what, "sent more bytes than asked for".to_owned()),
            },
            Some(Err(error)) => Err(failure::explain(
                self.what.clone(),
                &error,
                &self.probe,
                false,
            )),
            None if self.left > 0 => corrupt(
                &self.what,
                format!("ended {} bytes before the end of the range", self.left),
            ),
            None => return None,
        };
        self.done = item.is_err();
        Some((item, self))
    }
}

/// What a location is pinned to: the etag, or the time of the last change where there is none.
#[derive(Clone, Copy)]
enum Generation<'a> {
    Etag(&'a str),
    Modified(&'a str),
}

const MODIFIED: &str = "modified:";

fn generation(meta: &ObjectMeta) -> String {
    match &meta.e_tag {
        Some(etag) if !etag.is_empty() => etag.clone(),
        _ => format!("{MODIFIED}{}", meta.last_modified.timestamp()),
    }
}

impl<'a> Generation<'a> {
    fn parse(text: &'a str) -> Self {
        match text.strip_prefix(MODIFIED) {
            Some(time) => Self::Modified(time),
            None => Self::Etag(text),
        }
    }

    /// The condition to send: weak etags never match (RFC 9110, 13.1.1), and Azure lists etags
    /// without their quotes.
    fn if_match(self) -> Option<String> {
        match self {
            Self::Etag(etag) if etag.starts_with("W/") => None,
            Self::Etag(etag) => Some(format!("\"{}\"", bare(etag))),
            Self::Modified(_) => None,
        }
    }

    /// Whether an answer with `meta` is of this generation. An answer without an etag has been
    /// held to the condition by the server alone.
    fn is(self, meta: &ObjectMeta) -> bool {
        match (self, &meta.e_tag) {
            (Self::Etag(pinned), Some(now)) => bare(pinned) == bare(now),
            (Self::Etag(_), None) => true,
            (Self::Modified(pinned), _) => pinned == meta.last_modified.timestamp().to_string(),
        }
    }
}

/// An etag without its quotes and without the mark of weak ones.
fn bare(etag: &str) -> &str {
    etag.trim_start_matches("W/").trim_matches('"')
}

#[cfg(test)]
mod tests;
