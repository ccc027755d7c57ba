//! Plain HTTP: a file, or a directory where the URL ends in `/`.
//!
//! A directory is known by its index `hearth.json`, else by the server's own listing page
//! (`autoindex`), walked down. The index is
//! `{"files": [{"path": "a/b.bin", "size": 7, "sha256": "<64 hex digits>"}]}`: paths relative to
//! the directory and not percent-encoded, sizes in bytes, the digest optional; with it the content
//! is verified and shared with equal content from elsewhere. Every file is asked for its size and
//! generation: its strong entity tag, else its `Last-Modified`, else its weak tag, else only the
//! size. Invariants: a location holds no secret (query values and user info are put back on here,
//! for URLs at or below the one they were given for); nothing above the directory or on another
//! host becomes part of an artifact. Made by [`super::Sources`].

mod autoindex;

use std::ops::Range;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use percent_encoding::{percent_decode_str, utf8_percent_encode};
use reqwest::header;
use serde::Deserialize;
use url::Url;

use self::autoindex::{Child, SEGMENT, parse_html, parse_json};
use super::{
    ByteStream, Config, Source, SourceError, SourceErrorKind as Kind,
    listing::{Listed, Listing, TOO_MANY, short},
    retry::asked,
    web::{Ask, Auth, Document, Pin, Probe, Web, accept, last_modified, text},
};
use crate::{
    digest::{Digest, ObjectId},
    reference::{HttpUrl, Locator, Reference, Secret},
    tree::{Artifact, Location},
};

/// The index of a directory.
const INDEX: &str = "hearth.json";
/// Largest page or index, in bytes.
const MAX_PAGE: u64 = 64 << 20;
/// Most directories walked through listing pages.
const MAX_DIRECTORIES: usize = 20_000;
/// Deepest directory: a link that leads back up shows itself by its depth.
const MAX_DEPTH: usize = 32;
/// What the generation begins with where the origin tells the size only.
const SIZE: &str = "size:";
/// Most requests at a time while resolving.
const PARALLEL: usize = 16;

/// One origin over plain HTTP.
#[derive(Debug)]
pub(super) struct HttpSource {
    web: Web,
    /// The URL it was made for, without secrets.
    base: Url,
    /// Its query as given, where that holds a secret.
    query: Option<Secret>,
    auth: Option<Auth>,
    max_entries: usize,
}

/// The index file.
#[derive(Debug, Deserialize)]
struct Index {
    files: Vec<IndexFile>,
}

#[derive(Debug, Deserialize)]
struct IndexFile {
    path: String,
    size: u64,
    sha256: Option<String>,
}

/// A file of a directory, before it was asked for.
#[derive(Debug)]
struct Found {
    /// Relative to the directory, decoded.
    path: String,
    /// Its URL without secrets.
    url: Url,
    size: Option<u64>,
    sha256: Option<Digest>,
}

impl HttpSource {
    pub(super) fn new(url: &HttpUrl, config: &Config) -> Result<Self, SourceError> {
        let mut full = match &url.secret {
            None => url.public.clone(),
            Some(secret) => Url::parse(secret.expose()).map_err(|error| {
                let message = format!("its full form is not a url: {error}");
                SourceError::new(Kind::Invalid, url.public.as_str(), message)
            })?,
        };
        Ok(Self {
            web: Web::new(config)?,
            base: url.public.clone(),
            auth: Auth::take_from(&mut full),
            query: full.query().filter(|_| full != url.public).map(Secret::new),
            max_entries: config.max_entries.get(),
        })
    }

    /// A request for `url` (without secrets): with those of this source where it is, or is below,
    /// the URL that came with them.
    fn ask<'a>(&'a self, what: &'a str, url: &Url) -> Result<Ask<'a>, SourceError> {
        if url.origin() != self.base.origin() {
            let message = format!("is not at {}", super::web::host_of(&self.base));
            return Err(SourceError::new(Kind::Invalid, what, message));
        }
        let base = self.base.path();
        let ours = url.path() == base || (base.ends_with('/') && url.path().starts_with(base));
        let mut asked = url.clone();
        if let Some(query) = self.query.as_ref().filter(|_| ours) {
            asked.set_query(Some(query.expose()));
        }
        Ok(Ask {
            what,
            url: asked,
            auth: self.auth.as_ref().filter(|_| ours),
            headers: None,
        })
    }

    /// The files of the directory at `dir`, by its index or its listing pages.
    async fn walk(&self, dir: &Url, listing: &mut Listing) -> Result<Vec<Found>, SourceError> {
        // Both at once: there is hardly ever an index, and a round trip may be long.
        let first = self.page(dir);
        tokio::pin!(first);
        let mut early = None;
        let index = {
            let index = self.index(dir, listing);
            tokio::pin!(index);
            loop {
                tokio::select! {
                    biased;
                    index = &mut index => break index?,
                    page = &mut first, if early.is_none() => early = Some(page),
                }
            }
        };
        if let Some(found) = index {
            return Ok(found);
        }
        let mut early = Some(match early {
            Some(page) => page?,
            None => first.await?,
        });
        let mut found = Vec::new();
        let mut seen = 0usize;
        let mut directories = 0usize;
        let mut level = vec![(String::new(), dir.clone())];
        for depth in 0.. {
            if level.is_empty() {
                break;
            }
            directories += level.len();
            if depth == MAX_DEPTH || directories > MAX_DIRECTORIES {
                let message = match depth == MAX_DEPTH {
                    true => format!("is deeper than {MAX_DEPTH} directories"),
                    false => format!("has more than {MAX_DIRECTORIES} directories"),
                };
                return Err(SourceError::new(Kind::Invalid, dir.as_str(), message)
                    .with_hint("name a smaller part, or put a hearth.json there"));
            }
            let known = early.take();
            let mut pages = stream::iter(level)
                .map(async |(path, url): (String, Url)| {
                    let children = match &known {
                        Some(children) => children.clone(),
                        None => self.page(&url).await?,
                    };
                    Ok::<_, SourceError>((path, url, children))
                })
                .buffered(PARALLEL);
            let mut next = Vec::new();
            while let Some((path, url, children)) = pages.try_next().await? {
                for child in children {
                    seen += 1;
                    if seen > self.max_entries {
                        let message = format!("has more than {} entries", self.max_entries);
                        return Err(SourceError::new(Kind::Invalid, dir.as_str(), message)
                            .with_hint(TOO_MANY));
                    }
                    let path = format!("{path}{}", child.name);
                    if child.is_dir {
                        next.push((format!("{path}/"), below(&url, &child.segment, true)));
                    } else if listing.wants(&path) {
                        found.push(Found {
                            path,
                            url: below(&url, &child.segment, false),
                            size: None,
                            sha256: None,
                        });
                    } else {
                        listing.skip();
                    }
                }
            }
            level = next;
        }
        Ok(found)
    }

    /// The files that the index of `dir` names; `None` where there is no index.
    async fn index(
        &self,
        dir: &Url,
        listing: &mut Listing,
    ) -> Result<Option<Vec<Found>>, SourceError> {
        let url = below(dir, INDEX, false);
        let what = url.to_string();
        let ask = self.ask(&what, &url)?;
        let document = match asked(|| self.web.document(&ask, None, MAX_PAGE, &accept)).await {
            Ok(document) => document,
            // Buckets that may not be listed answer 403 for what is not there.
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Denied) => return Ok(None),
            Err(error) => return Err(error),
        };
        // A site may answer every path with the same page.
        if is_html(&document) {
            return Ok(None);
        }
        let invalid = |message: String| SourceError::new(Kind::Invalid, what.as_str(), message);
        let index: Index = serde_json::from_slice(&document.body).map_err(|error| {
            invalid(format!("is no index: {error}")).with_hint(
                r#"expected {"files": [{"path": "a/b.bin", "size": 7, "sha256": "..."}]}"#,
            )
        })?;
        if index.files.len() > self.max_entries {
            return Err(invalid(format!("has more than {} files", self.max_entries)));
        }
        let mut found = Vec::with_capacity(index.files.len());
        for file in index.files {
            let name = short(&file.path);
            let bad = |part: &str| matches!(part, "" | "." | "..") || part.contains('\0');
            if file.path.split('/').any(bad) {
                return Err(invalid(format!(
                    "has the path {name:?}, which leads elsewhere"
                )));
            }
            let sha256 = match file.sha256 {
                None => None,
                Some(hex) => Some(Digest::from_hex(&hex.to_ascii_lowercase()).map_err(
                    |error| invalid(format!("has a wrong sha256 for {name:?}: {error}")),
                )?),
            };
            if !listing.wants(&file.path) {
                listing.skip();
                continue;
            }
            let mut url = dir.clone();
            let encoded: Vec<_> = file
                .path
                .split('/')
                .map(|part| utf8_percent_encode(part, SEGMENT).to_string())
                .collect();
            url.set_path(&format!("{}{}", dir.path(), encoded.join("/")));
            found.push(Found {
                path: file.path,
                url,
                size: Some(file.size),
                sha256,
            });
        }
        Ok(Some(found))
    }

    /// The children that the listing page at `url` names.
    async fn page(&self, url: &Url) -> Result<Vec<Child>, SourceError> {
        let ask = self.ask(url.as_str(), url)?;
        let document = asked(|| self.web.document(&ask, None, MAX_PAGE, &accept)).await?;
        let mut base = document.url.clone();
        base.set_query(None);
        let children = match is_json(&document) {
            true => parse_json(&document.body),
            false => parse_html(&base, &document.body),
        };
        children.map_err(|error| SourceError::new(Kind::Invalid, url.as_str(), error.to_string()))
    }

    /// Adds `found` as `probe` found it to be.
    fn add(
        listing: &mut Listing,
        found: &Found,
        probe: &Probe,
        generation: String,
    ) -> Result<(), SourceError> {
        let url = found.url.as_str();
        if probe.url.path().ends_with('/') {
            let message = "is a directory, though its url does not end in /";
            return Err(SourceError::new(Kind::Invalid, url, message)
                .with_hint("write the url of a directory with a / at its end"));
        }
        if let Some(size) = found.size.filter(|&size| size != probe.size) {
            let message = format!("has {} bytes, but {INDEX} says {size}", probe.size);
            return Err(SourceError::new(Kind::Invalid, url, message));
        }
        let id = match found.sha256 {
            Some(digest) => ObjectId::Sha256(digest),
            None => ObjectId::located(url, &generation, probe.size),
        };
        listing.add(Listed {
            path: &found.path,
            size: probe.size,
            id,
            git_sha1: None,
            location: Location {
                path: url.to_owned(),
                generation: Some(generation),
                offset: 0,
            },
            mtime: last_modified(&probe.headers),
            executable: false,
        })
    }
}

#[async_trait::async_trait]
impl Source for HttpSource {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        let Locator::Http(HttpUrl { public: url, .. }) = &reference.locator else {
            return Err(SourceError::new(
                Kind::Invalid,
                reference.to_string(),
                "is no http reference",
            ));
        };
        let mut listing =
            Listing::new(reference, String::new())?.with_max_entries(self.max_entries);
        let found = match url.path().ends_with('/') {
            true => self.walk(url, &mut listing).await?,
            false => vec![Found {
                path: file_name(url)?,
                url: url.clone(),
                size: None,
                sha256: None,
            }],
        };
        let is_file = !url.path().ends_with('/');
        let mut unpinned = 0usize;
        let mut probes = stream::iter(found)
            .map(async |found: Found| {
                let ask = self.ask(found.url.as_str(), &found.url)?;
                let probe = asked(|| self.web.probe(&ask, &accept)).await?;
                Ok::<_, SourceError>((found, probe))
            })
            .buffered(PARALLEL);
        while let Some((found, probe)) = probes.try_next().await? {
            let generation = generation(&probe);
            unpinned += usize::from(generation.starts_with(SIZE));
            if is_file {
                listing.set_revision(generation.clone());
            }
            Self::add(&mut listing, &found, &probe, generation)?;
        }
        drop(probes);
        if unpinned > 0 {
            tracing::warn!(
                "{unpinned} files of {url} have no etag and no date: only a change of size is noticed"
            );
        }
        listing.finish().map_err(|error| match error.hint() {
            Some(_) => error,
            None => error.with_hint(
                "a directory needs a listing page of the server, or an index file hearth.json",
            ),
        })
    }

    fn origin(&self) -> String {
        self.base.origin().ascii_serialization()
    }

    async fn read(
        &self,
        location: &Location,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        let invalid =
            |why: &str| SourceError::new(Kind::Invalid, short(&location.path), format!("is {why}"));
        let url = Url::parse(&location.path).map_err(|_| invalid("no url"))?;
        let pin = match location.generation.as_deref() {
            None => Pin::Free,
            Some(tag) if tag.starts_with('"') || tag.starts_with("W/\"") => Pin::Etag(tag),
            Some(other) => match other.strip_prefix(SIZE) {
                Some(size) => Pin::Size(
                    size.parse()
                        .map_err(|_| invalid("pinned to nothing known"))?,
                ),
                None => Pin::Modified(other),
            },
        };
        let ask = self.ask(&location.path, &url)?;
        self.web.read_range(&ask, pin, range, false, &accept).await
    }
}

/// What the origin calls this generation.
fn generation(probe: &Probe) -> String {
    let tag = text(&probe.headers, header::ETAG);
    let strong = tag.filter(|tag| tag.len() > 2 && tag.starts_with('"') && tag.ends_with('"'));
    let weak = tag.filter(|tag| tag.len() > 4 && tag.starts_with("W/\"") && tag.ends_with('"'));
    let date = text(&probe.headers, header::LAST_MODIFIED)
        .filter(|date| httpdate::parse_http_date(date).is_ok());
    match strong.or(date).or(weak) {
        Some(generation) => generation.to_owned(),
        None => format!("{SIZE}{}", probe.size),
    }
}

/// The child of the directory `dir` that is called `segment` in URLs.
fn below(dir: &Url, segment: &str, is_dir: bool) -> Url {
    let mut url = dir.clone();
    let slash = if is_dir { "/" } else { "" };
    url.set_path(&format!("{}{segment}{slash}", dir.path()));
    url
}

/// The last component of the path, decoded.
fn file_name(url: &Url) -> Result<String, SourceError> {
    let segment = url.path().rsplit('/').next().unwrap_or_default();
    let name = percent_decode_str(segment).decode_utf8();
    match name {
        Ok(name) if !name.contains('/') => Ok(name.into_owned()),
        _ => {
            let message = "its last component is no file name";
            Err(SourceError::new(Kind::Invalid, url.as_str(), message))
        }
    }
}

fn is_json(document: &Document) -> bool {
    content_type(document).is_some_and(|found| found.starts_with("application/json"))
}

fn is_html(document: &Document) -> bool {
    content_type(document).is_some_and(|found| found.starts_with("text/html"))
        || document.body.trim_ascii_start().starts_with(b"<")
}

fn content_type(document: &Document) -> Option<String> {
    let found = text(&document.headers, header::CONTENT_TYPE)?;
    Some(found.to_ascii_lowercase())
}
