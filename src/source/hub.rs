//! The Hugging Face Hub over its HTTP API, and whatever speaks it.
//!
//! A revision resolves to a commit, the commit to a tree: `GET /api/models/ID/revision/REV` (`sha`),
//! `POST /api/models/ID/paths-info/COMMIT` where a part is meant, and the paginated
//! `GET /api/models/ID/tree/COMMIT/PATH?recursive=true`. Content comes from
//! `GET /ID/resolve/COMMIT/PATH`, which answers itself or redirects to a signed URL of another host;
//! files kept in Xet are served there too. Invariants: an LFS or Xet file is named by its SHA-256;
//! other files by endpoint, path and git blob id, independent of commit and token; every answer of
//! the Hub is checked against the pinned commit (`X-Repo-Commit`) and blob (`X-Linked-Etag`, `ETag`);
//! the token goes to the endpoint only. Made by [`super::Sources`].

mod settings;

use std::{ops::Range, sync::Arc};

use parking_lot::RwLock;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{
    StatusCode,
    header::{self, HeaderMap},
};
use serde::{Deserialize, de::DeserializeOwned};
use url::Url;

use self::settings::{Settings, process_env, token};
use super::{
    ByteStream, Config, Source, SourceError, SourceErrorKind as Kind,
    listing::{Listed, Listing, short},
    retry::asked,
    web::{Ask, Auth, Body, Pin, Web, host_of, link_next, text},
};
use crate::{
    digest::{Digest, ObjectId, from_hex},
    reference::{HubKind, HubRepo, Locator, Reference, Secret},
    tree::{Artifact, Location},
};

/// Largest answer of the API, in bytes.
const MAX_ANSWER: u64 = 64 << 20;
/// Bytes of a URL segment that are written as they are.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// One repository.
#[derive(Debug)]
pub(super) struct HubSource {
    web: Web,
    settings: Settings,
    config: Config,
    kind: HubKind,
    id: String,
    /// A token that is not of this node.
    own_token: Option<Secret>,
    auth: RwLock<Option<Arc<Auth>>>,
}

/// What is read of `GET .../revision/REV`.
#[derive(Debug, Deserialize)]
struct Revision {
    sha: String,
}

/// An entry of a tree. Fields that are not used are left out: the Hub adds some now and then.
#[derive(Debug, Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    /// The git blob id (SHA-1); of an LFS file that of its pointer.
    #[serde(default)]
    oid: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Deserialize)]
struct Lfs {
    /// SHA-256 of the content.
    oid: String,
    size: u64,
}

impl HubSource {
    pub(super) fn new(
        repo: &HubRepo,
        config: &Config,
        own_token: Option<Secret>,
    ) -> Result<Self, SourceError> {
        let source = Self {
            web: Web::new(config)?,
            settings: Settings::read(config, &process_env)?,
            config: config.clone(),
            kind: repo.kind,
            id: repo.id.clone(),
            own_token,
            auth: RwLock::default(),
        };
        source.renew_auth()?;
        Ok(source)
    }

    /// Reads the token anew.
    fn renew_auth(&self) -> Result<(), SourceError> {
        let found = match &self.own_token {
            Some(own) => Some(own.clone()).filter(|own| !own.expose().is_empty()),
            None => token(&self.config, &process_env)?,
        };
        let auth = match found {
            None => None,
            Some(token) => Some(Auth::bearer(&self.settings.endpoint, &token).ok_or_else(
                || {
                    let message = "has characters that no token has";
                    SourceError::new(Kind::Invalid, "token for the Hub", message)
                },
            )?),
        };
        *self.auth.write() = auth.map(Arc::new);
        Ok(())
    }

    /// Other credentials than these, which were refused: those that another reader has found since, or
    /// the token anew, which may have been replaced.
    fn renewed(&self, refused: Option<&Auth>) -> Option<Arc<Auth>> {
        let other = || {
            let auth = self.auth.read().clone();
            auth.filter(|auth| refused.is_none_or(|refused| !auth.is_same(refused)))
        };
        if let Some(auth) = other() {
            return Some(auth);
        }
        if let Err(error) = self.renew_auth() {
            tracing::warn!(%error, "the token for the Hub is not read anew");
        }
        other()
    }

    fn check_online(&self, what: &str) -> Result<(), SourceError> {
        if !self.settings.offline {
            return Ok(());
        }
        let message = format!(
            "offline: HF_HUB_OFFLINE is set, so {} is not asked",
            host_of(&self.settings.endpoint)
        );
        Err(SourceError::new(Kind::Unavailable, what, message)
            .with_hint("unset HF_HUB_OFFLINE, or use what is warm already"))
    }

    /// A URL at the endpoint; `path` is encoded already.
    fn url(&self, path: &str) -> Url {
        let mut url = self.settings.endpoint.clone();
        let base = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{base}/{path}"));
        url
    }

    fn api(&self, path: &str) -> Url {
        let kind = match self.kind {
            HubKind::Model => "models",
            HubKind::Dataset => "datasets",
            HubKind::Space => "spaces",
        };
        self.url(&format!("api/{kind}/{}/{path}", self.id))
    }

    fn resolve_url(&self, commit: &str, path: &str) -> Url {
        let kind = self.kind_prefix();
        self.url(&format!(
            "{kind}{}/resolve/{commit}/{}",
            self.id,
            encode_path(path)
        ))
    }

    const fn kind_prefix(&self) -> &'static str {
        match self.kind {
            HubKind::Model => "",
            HubKind::Dataset => "datasets/",
            HubKind::Space => "spaces/",
        }
    }

    /// Asks the API; gives the next page too, where the answer is one of several.
    async fn json<T: DeserializeOwned>(
        &self,
        what: &str,
        url: Url,
        body: Option<&serde_json::Value>,
    ) -> Result<(T, Option<Url>), SourceError> {
        asked(|| self.json_once(what, &url, body)).await
    }

    async fn json_once<T: DeserializeOwned>(
        &self,
        what: &str,
        url: &Url,
        body: Option<&serde_json::Value>,
    ) -> Result<(T, Option<Url>), SourceError> {
        let auth = self.auth.read().clone();
        let ask = Ask {
            what,
            url: url.clone(),
            auth: auth.as_deref(),
            headers: None,
        };
        let inspect = |status, headers: &HeaderMap| match refusal(what, status, headers) {
            Some(error) => Err(error),
            None => Ok(None),
        };
        let document = self
            .web
            .document(&ask, body.map(Body::Json), MAX_ANSWER, &inspect)
            .await?;
        let host = host_of(&document.url);
        let value = serde_json::from_slice(&document.body).map_err(|error| {
            let message = format!("{host} answered with no JSON of the Hub's api: {error}");
            SourceError::new(Kind::Corrupt, what, message)
        })?;
        let Some(next) = text(&document.headers, header::LINK).and_then(link_next) else {
            return Ok((value, None));
        };
        let next = document.url.join(next).ok();
        match next {
            Some(next) if next.origin() == document.url.origin() && next != ask.url => {
                Ok((value, Some(next)))
            }
            _ => {
                let message = format!("the next page that {host} names is elsewhere, or the same");
                Err(SourceError::new(Kind::Invalid, what, message))
            }
        }
    }

    /// Adds the files of `commit` at or below `path`.
    async fn list(
        &self,
        what: &str,
        commit: &str,
        path: &str,
        listing: &mut Listing,
    ) -> Result<(), SourceError> {
        if !path.is_empty() {
            let body = serde_json::json!({ "paths": [path], "expand": false });
            let url = self.api(&format!("paths-info/{commit}"));
            let (found, _) = self.json::<Vec<Entry>>(what, url, Some(&body)).await?;
            match found.into_iter().find(|entry| entry.path == path) {
                Some(entry) if entry.kind == "file" => {
                    let name = path.rsplit('/').next().unwrap_or(path);
                    return self.add(what, commit, name, &entry, listing);
                }
                Some(_) => {}
                None => {
                    let message = format!("no file or directory {:?} at {commit}", short(path));
                    return Err(SourceError::new(Kind::NotFound, what, message));
                }
            }
        }
        let mut url = match path {
            "" => self.api(&format!("tree/{commit}")),
            path => self.api(&format!("tree/{commit}/{}", encode_path(path))),
        };
        url.set_query(Some("recursive=true&expand=false"));
        let prefix = match path {
            "" => String::new(),
            path => format!("{path}/"),
        };
        let mut next = Some(url);
        let mut directories = 0usize;
        while let Some(url) = next {
            let entries: Vec<Entry>;
            (entries, next) = self.json(what, url, None).await?;
            if entries.is_empty() && next.is_some() {
                let message = "a page of its tree is empty, yet more are said to follow";
                return Err(SourceError::new(Kind::Invalid, what, message));
            }
            for entry in entries {
                if entry.kind != "file" {
                    directories += 1;
                    let most = self.config.max_entries.get();
                    if directories > most {
                        let message = format!("has more than {most} directories");
                        return Err(SourceError::new(Kind::Invalid, what, message));
                    }
                    continue;
                }
                let Some(name) = entry.path.strip_prefix(&prefix) else {
                    let message = format!("its tree has {:?}, outside", short(&entry.path));
                    return Err(SourceError::new(Kind::Invalid, what, message));
                };
                self.add(what, commit, name, &entry, listing)?;
            }
        }
        Ok(())
    }

    /// Adds one file.
    fn add(
        &self,
        what: &str,
        commit: &str,
        name: &str,
        entry: &Entry,
        listing: &mut Listing,
    ) -> Result<(), SourceError> {
        let (id, git_sha1, etag, size);
        match &entry.lfs {
            Some(lfs) => {
                let hex = lfs.oid.strip_prefix("sha256:").unwrap_or(&lfs.oid);
                let digest = Digest::from_hex(hex).map_err(|error| {
                    let name = short(&entry.path);
                    let message = format!("its tree has a wrong lfs id for {name:?}: {error}");
                    SourceError::new(Kind::Invalid, what, message)
                })?;
                (id, git_sha1) = (ObjectId::Sha256(digest), None);
                (etag, size) = (hex, lfs.size);
            }
            None => {
                let (Some(sha1), Some(bytes)) = (from_hex(&entry.oid), entry.size) else {
                    let name = short(&entry.path);
                    let message = format!("its tree has no git blob id or size for {name:?}");
                    return Err(SourceError::new(Kind::Invalid, what, message));
                };
                let place = format!("{}{}/{}", self.kind_prefix(), self.id, entry.path);
                let url = self.url(&place);
                id = ObjectId::located(url.as_str(), &entry.oid, bytes);
                git_sha1 = Some(sha1);
                (etag, size) = (&entry.oid, bytes);
            }
        }
        listing.add(Listed {
            path: name,
            size,
            id,
            git_sha1,
            location: Location {
                path: entry.path.clone(),
                generation: Some(format!("{commit}:{etag}")),
                offset: 0,
            },
            mtime: 0,
            executable: false,
        })
    }
}

#[async_trait::async_trait]
impl Source for HubSource {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        let what = reference.to_string();
        let repo = match &reference.locator {
            Locator::Hub(repo) if repo.kind == self.kind && repo.id == self.id => repo,
            _ => {
                let message = format!("is not in {}", self.id);
                return Err(SourceError::new(Kind::Invalid, what, message));
            }
        };
        self.check_online(&what)?;
        self.renew_auth()?;
        let wanted = repo.revision.as_deref().unwrap_or("main");
        let wanted = utf8_percent_encode(wanted, SEGMENT);
        let url = self.api(&format!("revision/{wanted}"));
        let (revision, _) = self.json::<Revision>(&what, url, None).await?;
        let commit = revision.sha;
        if from_hex::<20>(&commit).is_none() {
            let message = format!(
                "{} names no commit for it",
                host_of(&self.settings.endpoint)
            );
            return Err(SourceError::new(Kind::Corrupt, what, message));
        }
        let mut listing = Listing::new(reference, commit.clone())?
            .with_max_entries(self.config.max_entries.get());
        self.list(&what, &commit, &repo.path, &mut listing).await?;
        listing.finish()
    }

    fn origin(&self) -> String {
        format!("hf://{}/{}", self.kind.plural(), self.id)
    }

    async fn read(
        &self,
        location: &Location,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        let path = &location.path;
        let (commit, etag) = match location.generation.as_deref() {
            Some(generation) => match generation.split_once(':') {
                Some((commit, etag)) => (commit, Some(etag)),
                None => (generation, None),
            },
            None => ("", None),
        };
        let shown: String = commit.chars().take(8).collect();
        let what = format!(
            "hf://{}{}@{shown}/{}",
            self.kind_prefix(),
            self.id,
            short(path)
        );
        if from_hex::<20>(commit).is_none() {
            return Err(SourceError::new(
                Kind::Invalid,
                what,
                "is pinned to no commit",
            ));
        }
        self.check_online(&what)?;
        let inspect = |status, headers: &HeaderMap| inspect(&what, commit, etag, status, headers);
        // Large files are read in parallel ranges and redirect: one request finds out where to.
        let is_large = etag.is_some_and(|etag| etag.len() == 64);
        let read = async |auth: Option<&Auth>| {
            let ask = Ask {
                what: &what,
                url: self.resolve_url(commit, path),
                auth,
                headers: None,
            };
            self.web
                .read_range(&ask, Pin::Free, range.clone(), is_large, &inspect)
                .await
        };
        let auth = self.auth.read().clone();
        match read(auth.as_deref()).await {
            Err(error) if error.kind() == Kind::Denied => match self.renewed(auth.as_deref()) {
                Some(auth) => read(Some(&auth)).await,
                None => Err(error),
            },
            other => other,
        }
    }
}

/// Checks an answer of the Hub itself to a request for content; gives the size it claims.
fn inspect(
    what: &str,
    commit: &str,
    etag: Option<&str>,
    status: StatusCode,
    headers: &HeaderMap,
) -> Result<Option<u64>, SourceError> {
    if let Some(error) = refusal(what, status, headers) {
        return Err(error);
    }
    let changed = |name: &str, found: &str, wanted: &str| {
        let found = short(found);
        let message = format!("the Hub answered with {name} {found}, not {wanted}");
        Err(SourceError::new(Kind::Changed, what, message))
    };
    if let Some(found) = text(headers, "x-repo-commit").filter(|&found| found != commit) {
        return changed("commit", found, commit);
    }
    if let Some(wanted) = etag {
        let linked = text(headers, "x-linked-etag").map(opaque);
        // A cache before the Hub may have tags of its own; only one of the same kind tells.
        let plain = text(headers, header::ETAG)
            .map(opaque)
            .filter(|found| status.is_success() && found.len() == wanted.len());
        if let Some(found) = linked.or(plain).filter(|&found| found != wanted) {
            return changed("etag", found, wanted);
        }
    }
    Ok(text(headers, "x-linked-size").and_then(|size| size.parse().ok()))
}

/// An entity tag without its mark and quotes.
fn opaque(tag: &str) -> &str {
    tag.strip_prefix("W/").unwrap_or(tag).trim_matches('"')
}

/// The error that the Hub explains itself (`X-Error-Code`), if the answer is one.
fn refusal(what: &str, status: StatusCode, headers: &HeaderMap) -> Option<SourceError> {
    if !status.is_client_error() {
        return None;
    }
    let error = |kind, message: &str| SourceError::new(kind, what, message);
    let code = text(headers, "x-error-code");
    Some(match (code, status.as_u16()) {
        // Without a token, or with one that has expired, a private repository looks like none.
        (Some("RepoNotFound"), 401) => error(
            Kind::Denied,
            "the repository does not exist or is private (401)",
        )
        .with_hint(
            "check the name; for a private repository set HF_TOKEN to a token that is valid",
        ),
        (Some("RepoNotFound"), _) => error(
            Kind::NotFound,
            "the repository does not exist or is private",
        )
        .with_hint("check the name; for a private repository set HF_TOKEN"),
        (Some("RevisionNotFound"), _) => {
            error(Kind::NotFound, "the repository has no such revision")
                .with_hint("check the branch, tag or commit after @")
        }
        (Some("EntryNotFound"), _) => error(Kind::NotFound, "the revision has no such file"),
        (Some("GatedRepo"), _) => error(
            Kind::Denied,
            "the repository is gated, and this access was not granted",
        )
        .with_hint("accept its terms on its page at the Hub, then set HF_TOKEN to your token"),
        (Some("DisabledRepo"), _) => error(Kind::Denied, "the repository is disabled"),
        (_, 401) => error(Kind::Denied, "the Hub wants a valid token (401)")
            .with_hint("set HF_TOKEN, or run hf auth login"),
        _ => return None,
    })
}

/// Encodes a path segment by segment.
fn encode_path(path: &str) -> String {
    let segments: Vec<_> = path
        .split('/')
        .map(|part| utf8_percent_encode(part, SEGMENT).to_string())
        .collect();
    segments.join("/")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| {
            let name = header::HeaderName::from_static(name);
            (name, header::HeaderValue::from_str(value).unwrap())
        });
        pairs.collect()
    }

    #[test]
    fn the_corpus() {
        let reference: Reference = "hf://o/n".parse().unwrap();
        let Locator::Hub(repo) = &reference.locator else {
            unreachable!()
        };
        let source = HubSource::new(repo, &Config::default(), None).unwrap();
        crate::corpus::replay("corpus/hub", |input| {
            let _ = serde_json::from_slice::<Revision>(input);
            let mut listing = Listing::new(&reference, "r".into()).unwrap();
            for entry in serde_json::from_slice::<Vec<Entry>>(input)
                .into_iter()
                .flatten()
            {
                let _ = source.add("hf://o/n", "c", &entry.path, &entry, &mut listing);
            }
        });
    }

    #[test]
    fn answers_are_checked_against_the_pin() {
        let sha1 = "a".repeat(40);
        let sha256 = "b".repeat(64);
        let check = |etag: &str, status: u16, pairs: &[(&'static str, &str)]| {
            let status = StatusCode::from_u16(status).unwrap();
            inspect("f", "c1", Some(etag), status, &headers(pairs)).map_err(|e| e.kind())
        };
        let quoted = format!("\"{sha256}\"");
        let good = [
            ("x-repo-commit", "c1"),
            ("x-linked-etag", quoted.as_str()),
            ("x-linked-size", "7"),
            ("etag", "\"else\""),
        ];
        assert_eq!(check(&sha256, 302, &good), Ok(Some(7)));
        assert_eq!(check(&sha1, 302, &good), Err(Kind::Changed));
        assert_eq!(
            check(&sha1, 206, &[("x-repo-commit", "c2")]),
            Err(Kind::Changed)
        );
        let weak = format!("W/\"{sha1}\"");
        assert_eq!(check(&sha1, 200, &[("etag", &weak)]), Ok(None));
        let other = "c".repeat(40);
        assert_eq!(check(&sha1, 200, &[("etag", &other)]), Err(Kind::Changed));
        assert_eq!(check(&sha1, 200, &[("etag", "\"md5\"")]), Ok(None));
    }

    #[test]
    fn refusals_say_what_to_do() {
        for (code, status, kind, word) in [
            (
                "RepoNotFound",
                401,
                Kind::Denied,
                "does not exist or is private",
            ),
            (
                "RepoNotFound",
                404,
                Kind::NotFound,
                "does not exist or is private",
            ),
            ("RevisionNotFound", 404, Kind::NotFound, "revision"),
            ("EntryNotFound", 404, Kind::NotFound, "no such file"),
            ("GatedRepo", 403, Kind::Denied, "gated"),
            ("", 401, Kind::Denied, "token"),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            let error = refusal("hf://o/n", status, &headers(&[("x-error-code", code)])).unwrap();
            assert_eq!(error.kind(), kind, "{code}");
            assert!(error.to_string().contains(word), "{error}");
            assert!(code == "EntryNotFound" || error.hint().is_some());
        }
        assert!(refusal("x", StatusCode::NOT_FOUND, &headers(&[])).is_none());
        assert!(
            refusal(
                "x",
                StatusCode::OK,
                &headers(&[("x-error-code", "GatedRepo")])
            )
            .is_none()
        );
    }

    #[test]
    fn paths_are_encoded_by_segment() {
        assert_eq!(encode_path("a b/c#?%.txt"), "a%20b/c%23%3F%25.txt");
        assert_eq!(encode_path("é/x"), "%C3%A9/x");
    }

    proptest! {
        #[test]
        fn no_tree_panics(text in r#"(\[|\]|\{|\}|"type"|"file"|"path"|"oid"|"lfs"|:|,|"a"|null|-1|1e9){0,30}"#) {
            let _ = serde_json::from_str::<Vec<Entry>>(&text);
        }

        #[test]
        fn no_entry_panics(
            path in ".{0,40}", oid in "[0-9a-f]{0,3}|[0-9a-f]{40}",
            size in any::<Option<u64>>(), lfs in proptest::option::of(("[0-9a-fsh:]{0,5}|[0-9a-f]{64}", any::<u64>())),
        ) {
            let reference: Reference = "hf://o/n".parse().unwrap();
            let Locator::Hub(repo) = &reference.locator else { unreachable!() };
            static SOURCE: std::sync::OnceLock<HubSource> = std::sync::OnceLock::new();
            let source = SOURCE.get_or_init(|| HubSource::new(repo, &Config::default(), None).unwrap());
            let mut listing = Listing::new(&reference, "r".into()).unwrap();
            let lfs = lfs.map(|(oid, size)| Lfs { oid, size });
            let entry = Entry { kind: "file".into(), path: path.clone(), oid, size, lfs };
            let _ = source.add("hf://o/n", "c", &path, &entry, &mut listing);
        }
    }
}
