//! Text to [`Reference`] and back.

use std::{borrow::Cow, fmt, str::FromStr};

use percent_encoding::{
    AsciiSet, CONTROLS, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode,
};
use url::Url;

use super::{
    Bucket, Filter, HttpUrl, HubKind, HubRepo, Locator, MAX_REFERENCE, OciRef, Platform, Reference,
    Secret,
};

/// Bytes of a path that are written as they are.
const PATH: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~')
    .remove(b'+')
    .remove(b'=')
    .remove(b',')
    .remove(b'@');
/// Bytes of a revision that are written as they are: as [`PATH`], without `/` and `@`.
const REVISION: &AsciiSet = &PATH.add(b'/').add(b'@');
/// Bytes that cannot stand in a glob of a query as they are.
const GLOB: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'&')
    .add(b'\'')
    .add(b'+')
    .add(b'<')
    .add(b'>');

const SCHEMES: &str = "hf://org/name, oci://registry/repository:tag, s3://bucket/prefix/, \
                       gs://bucket/prefix/, az://container/prefix/, https://host/path or \
                       file:///path";

/// Text that is not a reference. Shows no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?}: {problem}")]
pub struct ParseReferenceError {
    text: String,
    problem: Cow<'static, str>,
}

impl ParseReferenceError {
    /// `text` is shortened; the caller has taken care that it holds no secret.
    pub(super) fn new(text: &str, problem: impl Into<Cow<'static, str>>) -> Self {
        Self {
            text: shorten(text),
            problem: problem.into(),
        }
    }
}

/// What is wrong, before the text is known.
type Problem = Cow<'static, str>;

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = |problem: Problem| ParseReferenceError::new(&redact(text), problem);
        if text.len() > MAX_REFERENCE {
            return Err(fail(format!("longer than {MAX_REFERENCE} bytes").into()));
        }
        if text.chars().any(char::is_control) {
            return Err(fail("has a control character".into()));
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(fail(format!("expected {SCHEMES}").into()));
        };
        let scheme = scheme.to_ascii_lowercase();
        let (locator, filter) = match scheme.as_str() {
            "http" | "https" => http(text, rest),
            "oci" => oci(rest),
            _ => {
                let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
                let locator = match scheme.as_str() {
                    "s3" => bucket(path).map(Locator::S3),
                    "gs" | "gcs" => bucket(path).map(Locator::Gcs),
                    "az" => bucket(path).map(Locator::Azure),
                    "file" => file(path).map(Locator::File),
                    "hf" => hub(path).map(Locator::Hub),
                    _ => Err(format!("unknown scheme; expected {SCHEMES}").into()),
                };
                locator.and_then(|locator| Ok((locator, only_filter(query)?)))
            }
        }
        .map_err(fail)?;
        // The error of a glob names the glob, not the reference.
        filter.matcher()?;
        let reference = Self { locator, filter };
        if reference.to_string().len() > MAX_REFERENCE {
            return Err(fail(
                format!("longer than {MAX_REFERENCE} bytes once encoded").into(),
            ));
        }
        Ok(reference)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.locator.fmt(f)?;
        let mut separator = match &self.locator {
            Locator::Http(url) if url.public.query().is_some() => '&',
            Locator::Oci(OciRef { platform, path, .. }) => {
                let mut separator = '?';
                if let Some(platform) = platform {
                    write!(f, "?platform={platform}")?;
                    separator = '&';
                }
                if !path.is_empty() {
                    write!(f, "{separator}path={}", utf8_percent_encode(path, PATH))?;
                    separator = '&';
                }
                separator
            }
            _ => '?',
        };
        let named = |name, globs| std::iter::repeat(name).zip(globs);
        for (name, glob) in
            named("include", &self.filter.include).chain(named("exclude", &self.filter.exclude))
        {
            write!(f, "{separator}{name}={}", utf8_percent_encode(glob, GLOB))?;
            separator = '&';
        }
        Ok(())
    }
}

impl fmt::Display for Locator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::S3(b) => write!(f, "s3://{}/{}", b.bucket, b.prefix),
            Self::Gcs(b) => write!(f, "gs://{}/{}", b.bucket, b.prefix),
            Self::Azure(b) => write!(f, "az://{}/{}", b.bucket, b.prefix),
            Self::Http(url) => url.public.fmt(f),
            Self::File(path) => write!(f, "file://{}", utf8_percent_encode(path, PATH)),
            Self::Oci(oci) => oci.fmt(f),
            Self::Hub(repo) => {
                let kind = match repo.kind {
                    HubKind::Model => "",
                    HubKind::Dataset => "datasets/",
                    HubKind::Space => "spaces/",
                };
                write!(f, "hf://{kind}{}", repo.id)?;
                if let Some(revision) = &repo.revision {
                    write!(f, "@{}", utf8_percent_encode(revision, REVISION))?;
                }
                if !repo.path.is_empty() {
                    write!(f, "/{}", repo.path)?;
                }
                Ok(())
            }
        }
    }
}

/// `bucket[/prefix]`. Keys are taken as they are, as the tools for buckets do: no percent coding.
fn bucket(text: &str) -> Result<Bucket, Problem> {
    let (bucket, prefix) = text.split_once('/').unwrap_or((text, ""));
    if bucket.is_empty() {
        return Err("expected the name of a bucket or container after ://".into());
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || ".-_$".contains(c);
    if bucket.len() > 255 || bucket.contains("..") || !bucket.chars().all(allowed) {
        return Err("expected a bucket name of letters, digits, '.', '-' and '_' after ://".into());
    }
    components(prefix.strip_suffix('/').unwrap_or(prefix))?;
    Ok(Bucket {
        bucket: bucket.to_owned(),
        prefix: prefix.to_owned(),
    })
}

/// `[localhost]/path`, percent-encoded (RFC 8089).
fn file(text: &str) -> Result<String, Problem> {
    let path = text.strip_prefix("localhost").unwrap_or(text);
    if !path.starts_with('/') {
        return Err("expected an absolute path: file:///path".into());
    }
    let path = decode(path)?;
    let mut clean = String::with_capacity(path.len());
    for part in path.split('/').filter(|part| !part.is_empty()) {
        component(part)?;
        clean.push('/');
        clean.push_str(part);
    }
    if clean.is_empty() {
        clean.push('/');
    }
    Ok(clean)
}

/// `[datasets/|spaces/]org/name[@revision][/path]`, as `HfFileSystem` of huggingface_hub reads it.
fn hub(text: &str) -> Result<HubRepo, Problem> {
    let (kind, text) = if let Some(rest) = text.strip_prefix("datasets/") {
        (HubKind::Dataset, rest)
    } else if let Some(rest) = text.strip_prefix("spaces/") {
        (HubKind::Space, rest)
    } else {
        (HubKind::Model, text)
    };
    let missing = "expected hf://[datasets/|spaces/]org/name[@revision][/path]";
    let (org, rest) = text.split_once('/').ok_or(missing)?;
    let (name, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (name, revision) = match name.split_once('@') {
        Some((name, revision)) => (name, Some(decode(revision)?)),
        None => (name, None),
    };
    for part in [org, name] {
        hub_name(part)?;
    }
    let (revision, path) = match revision {
        Some(first) if first == "refs" => {
            pull_request_or_convert(path).unwrap_or_else(|| (first.into_owned(), path))
        }
        Some(revision) => (revision.into_owned(), path),
        None => ("main".to_owned(), path),
    };
    check_revision(&revision)?;
    let path = path.strip_suffix('/').unwrap_or(path);
    components(path)?;
    Ok(HubRepo {
        kind,
        id: format!("{org}/{name}"),
        revision: (revision != "main").then_some(revision),
        path: path.to_owned(),
    })
}

/// `registry/repository[:tag][@digest][?platform=os/arch[/variant]&path=dir&include=...]`.
fn oci(text: &str) -> Result<(Locator, Filter), Problem> {
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    let mut oci = OciRef::parse(path)?;
    let (own, globs): (Vec<_>, Vec<_>) =
        pairs(query).partition(|(name, _)| matches!(&**name, "platform" | "path"));
    for (name, pair) in own {
        let value = decode(pair.split_once('=').map_or("", |(_, value)| value))?;
        if name == "platform" {
            if oci.platform.is_some() {
                return Err("names a platform twice".into());
            }
            oci.platform = Some(Platform::parse(&value)?);
        } else {
            if !oci.path.is_empty() {
                return Err("names a path twice".into());
            }
            let path = value.trim_matches('/');
            components(path)?;
            oci.path = path.to_owned();
        }
    }
    Ok((Locator::Oci(oci), globs_only(globs)?))
}

/// What follows `@refs/`: `pr/N` and `convert/NAME` belong to the revision without encoding.
fn pull_request_or_convert(path: &str) -> Option<(String, &str)> {
    let (group, rest) = path.split_once('/')?;
    let (name, rest) = rest.split_once('/').unwrap_or((rest, ""));
    let fits = match group {
        "pr" => name.bytes().all(|c| c.is_ascii_digit()),
        "convert" => name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_'),
        _ => false,
    };
    (fits && !name.is_empty()).then(|| (format!("refs/{group}/{name}"), rest))
}

/// The Hub's rule for each half of `org/name` (`validate_repo_id` of huggingface_hub).
fn hub_name(name: &str) -> Result<(), Problem> {
    let edge = |c: Option<char>| c.is_none_or(|c| c == '-' || c == '.');
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.len() > 96
        || !name.chars().all(allowed)
        || edge(name.chars().next())
        || edge(name.chars().last())
        || name.contains("--")
        || name.contains("..")
        || name.ends_with(".git")
    {
        return Err(
            "expected hf://org/name, each of letters, digits, '-', '_' and '.' \
                    (no '--' or '..', none of '-' and '.' at an end)"
                .into(),
        );
    }
    Ok(())
}

/// The rules of `git check-ref-format` that matter for a URL.
fn check_revision(revision: &str) -> Result<(), Problem> {
    if revision.is_empty() {
        return Err("expected a branch, tag or commit after @".into());
    }
    let forbidden = |c: char| c.is_control() || c == ' ' || "~^:?*[\\".contains(c);
    if revision.len() > 255
        || revision.contains(forbidden)
        || revision.contains("@{")
        || revision.starts_with('-')
        || revision
            .split('/')
            .any(|part| part.is_empty() || part == "." || part.contains(".."))
    {
        return Err("expected a branch, tag or commit after @".into());
    }
    Ok(())
}

/// A whole http(s) reference; `rest` is what follows `://`.
fn http(text: &str, rest: &str) -> Result<(Locator, Filter), Problem> {
    let path = rest.split(['?', '#']).next().unwrap_or_default();
    for part in path.split(['/', '\\']).skip(1) {
        // `Url` would quietly resolve these.
        if decode(part).is_ok_and(|part| part == "..") {
            return Err("has a \"..\" component".into());
        }
    }
    let mut full =
        Url::parse(text).map_err(|e| Problem::from(format!("expected https://host/path: {e}")))?;
    full.set_fragment(None);
    let query = full.query().unwrap_or_default().to_owned();
    let (ours, theirs): (Vec<_>, Vec<_>) =
        pairs(&query).partition(|(name, _)| matches!(name.as_ref(), "include" | "exclude"));
    let filter = filter(ours)?;
    set_query(&mut full, theirs.iter().map(|(_, pair)| *pair));
    let mut public = full.clone();
    let names: Vec<String> = theirs
        .iter()
        .map(|(name, _)| name.to_ascii_lowercase())
        .collect();
    let signed = names
        .iter()
        .any(|name| matches!(name.as_str(), "sig" | "signature"));
    let kept = theirs
        .iter()
        .zip(&names)
        .filter(|(_, name)| !is_secret(name, signed))
        .map(|((_, pair), _)| *pair);
    set_query(&mut public, kept);
    let cannot = |()| Problem::from("expected https://host/path");
    public.set_username("").map_err(cannot)?;
    public.set_password(None).map_err(cannot)?;
    let secret = (public != full).then(|| Secret::new(full.as_str()));
    Ok((Locator::Http(HttpUrl { public, secret }), filter))
}

/// The pieces of a query with their decoded names; empty pieces are left out.
fn pairs(query: &str) -> impl Iterator<Item = (Cow<'_, str>, &str)> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let name = pair.split_once('=').map_or(pair, |(name, _)| name);
            (percent_decode_str(name).decode_utf8_lossy(), pair)
        })
}

fn set_query<'a>(url: &mut Url, pairs: impl Iterator<Item = &'a str>) {
    let query = pairs.collect::<Vec<_>>().join("&");
    url.set_query((!query.is_empty()).then_some(&query));
}

/// Whether the query parameter `name` (lower case) is, or belongs to, a credential. `signed` URLs
/// have more of them; leaving all out gives a URL one name however often it is signed anew.
fn is_secret(name: &str, signed: bool) -> bool {
    const WORDS: [&str; 16] = [
        "token",
        "secret",
        "password",
        "passwd",
        "signature",
        "credential",
        "credentials",
        "apikey",
        "api_key",
        "api-key",
        "access_key",
        "access-key",
        "private_key",
        "authorization",
        "jwt",
        "accesskeyid",
    ];
    const NAMES: [&str; 11] = [
        "sig",
        "key",
        "auth",
        "pwd",
        "pass",
        "session",
        "sessionid",
        "googleaccessid",
        "key-pair-id",
        "hdnts",
        "hdnea",
    ];
    // Azure shared access signatures; CloudFront and the older signatures of S3 and GCS.
    const SIGNED: [&str; 17] = [
        "sv", "ss", "srt", "st", "se", "sr", "sp", "spr", "sip", "skoid", "sktid", "skt", "ske",
        "sks", "skv", "expires", "policy",
    ];
    name.starts_with("x-amz-")
        || name.starts_with("x-goog-")
        || WORDS.iter().any(|word| name.ends_with(word))
        || NAMES.contains(&name)
        || (signed && SIGNED.contains(&name))
}

/// A query that may hold nothing but globs.
fn only_filter(query: &str) -> Result<Filter, Problem> {
    globs_only(pairs(query).collect())
}

fn globs_only(pairs: Vec<(Cow<'_, str>, &str)>) -> Result<Filter, Problem> {
    if let Some((name, _)) = pairs
        .iter()
        .find(|(name, _)| !matches!(name.as_ref(), "include" | "exclude"))
    {
        return Err(format!(
            "unknown parameter {:?}; expected ?include=GLOB or &exclude=GLOB \
             (a name that has a '?' is reached by its prefix and a glob)",
            shorten(name)
        )
        .into());
    }
    filter(pairs)
}

fn filter(pairs: Vec<(Cow<'_, str>, &str)>) -> Result<Filter, Problem> {
    let mut filter = Filter::default();
    for (name, pair) in pairs {
        let glob = decode(pair.split_once('=').map_or("", |(_, value)| value))?.into_owned();
        match name.as_ref() {
            "include" => filter.include.push(glob),
            _ => filter.exclude.push(glob),
        }
    }
    // Order and repetition mean nothing: one canonical form.
    for globs in [&mut filter.include, &mut filter.exclude] {
        globs.sort();
        globs.dedup();
    }
    Ok(filter)
}

fn decode(text: &str) -> Result<Cow<'_, str>, Problem> {
    let decoded = percent_decode_str(text).decode_utf8();
    match decoded {
        Ok(text) if text.chars().any(char::is_control) => Err("has a control character".into()),
        Ok(text) => Ok(text),
        Err(_) => Err("has a percent sequence that is not UTF-8".into()),
    }
}

/// Checks the components of a relative path; the empty path has none.
fn components(path: &str) -> Result<(), Problem> {
    if path.is_empty() {
        return Ok(());
    }
    path.split('/').try_for_each(component)
}

fn component(part: &str) -> Result<(), Problem> {
    match part {
        "" => Err("has an empty component (\"//\")".into()),
        "." | ".." => Err(format!("has a {part:?} component").into()),
        _ => Ok(()),
    }
}

/// `text` without what may be a secret: queries, user info, and all where it is hard to tell.
pub fn redact(text: &str) -> Cow<'_, str> {
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    if let Some((before, after)) = rest.rsplit_once('@')
        && !(scheme.eq_ignore_ascii_case("oci") && is_digest_of(before, after))
    {
        let web = scheme.to_ascii_lowercase().starts_with("http");
        if web || before.contains(':') || !before.contains('/') {
            return if scheme.is_empty() {
                "***".into()
            } else {
                format!("{scheme}://***").into()
            };
        }
    }
    match text.find(['?', '#']) {
        Some(at) => format!("{}...", &text[..at]).into(),
        None => text.into(),
    }
}

/// Whether `after` is the digest in `before@after`, and nothing in `before` can be user info.
fn is_digest_of(before: &str, after: &str) -> bool {
    before.contains('/') && !before.contains('@') && after.starts_with("sha256:")
}

fn shorten(text: &str) -> String {
    const MAX: usize = 120;
    let mut short: String = text.chars().take(MAX).collect();
    if short.len() < text.len() {
        short.push_str("...");
    }
    short
}

#[cfg(test)]
mod tests;
