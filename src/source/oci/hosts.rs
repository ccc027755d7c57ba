//! Where a registry is asked: containerd's `hosts.toml` (containerd, docs/hosts.md).
//!
//! `<path>/<host>_<port>_/`, `<path>/<host>:<port>/` or `<path>/_default/`: the first directory that
//! is there counts. In it `hosts.toml` names mirrors, which are tried in their order, and how each
//! is trusted; the registry itself is tried last. Without `hosts.toml` the directory is read as
//! Docker's `certs.d`: `*.crt` are authorities, `*.cert` and `*.key` the client's. Plain HTTP is
//! spoken where a URL there says so, and else only to this machine.

use std::{
    collections::BTreeMap,
    io::Read as _,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use toml::Spanned;
use url::Url;

use crate::source::{
    SourceError, SourceErrorKind as Kind,
    listing::short,
    web::{Tls, host_of},
};

/// Where containerd's own configuration is.
pub(super) const DEFAULT_PATH: &str = "/etc/containerd/certs.d";
/// Largest file read, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Most mirrors of one registry.
const MAX_MIRRORS: usize = 32;

/// One place to ask. Not `Debug`: headers may hold secrets.
#[derive(Clone)]
pub(super) struct Endpoint {
    /// Up to where the repository follows, without slash.
    pub(super) base: Url,
    /// Whether blobs and manifests by digest may be had here.
    pub(super) pull: bool,
    /// Whether tags may be resolved here.
    pub(super) resolve: bool,
    /// Whether it may be pushed to.
    pub(super) push: bool,
    pub(super) tls: Tls,
    /// Sent with every request.
    pub(super) headers: HeaderMap,
    /// Whether it stands for another registry, which it is told by `ns=`.
    pub(super) is_mirror: bool,
}

/// `hosts.toml`. What is not known is ignored: the file is containerd's.
#[derive(Deserialize)]
struct File {
    server: Option<String>,
    #[serde(flatten)]
    itself: Settings,
    #[serde(default)]
    host: BTreeMap<String, Spanned<Settings>>,
}

#[derive(Deserialize, Default)]
struct Settings {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMore<String>>,
    client: Option<OneOrMore<OneOrMore<String>>>,
    skip_verify: Option<bool>,
    override_path: Option<bool>,
    header: Option<BTreeMap<String, OneOrMore<String>>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore<T> {
    One(T),
    More(Vec<T>),
}

impl<T> OneOrMore<T> {
    fn as_slice(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::More(more) => more,
        }
    }
}

/// Where `registry` is asked, in order; the registry itself is last.
///
/// # Errors
/// Files that cannot be read or used.
pub(super) fn endpoints(path: &Path, registry: &str) -> Result<Vec<Endpoint>, SourceError> {
    let Some(dir) = directories(path, registry)
        .into_iter()
        .find(|dir| dir.is_dir())
    else {
        return Ok(vec![upstream(registry, Tls::default())?]);
    };
    let file = dir.join("hosts.toml");
    match read(&file)? {
        Some(text) => parse(&file, &text, registry),
        None => Ok(vec![upstream(registry, docker_certificates(&dir)?)?]),
    }
}

/// As [`endpoints`], without the mirror at `own`: that is this node. The registry itself where there is
/// no other.
///
/// # Errors
/// As [`endpoints`].
pub(super) fn endpoints_but(
    own: Option<SocketAddr>,
    path: &Path,
    registry: &str,
) -> Result<Vec<Endpoint>, SourceError> {
    let mut endpoints = endpoints(path, registry)?;
    if let Some(own) = own {
        endpoints.retain(|endpoint| !endpoint.is_mirror || !is_at(&endpoint.base, own));
        if endpoints.is_empty() {
            endpoints.push(upstream(registry, Tls::default())?);
        }
    }
    Ok(endpoints)
}

/// Whether a URL leads to what listens on `address` of this machine.
fn is_at(url: &Url, address: SocketAddr) -> bool {
    let ip = match url.host() {
        Some(url::Host::Ipv4(ip)) => Some(IpAddr::V4(ip)),
        Some(url::Host::Ipv6(ip)) => Some(IpAddr::V6(ip)),
        _ => None,
    };
    let is_near = url.host_str().is_some_and(super::is_loopback);
    url.port_or_known_default() == Some(address.port())
        && (ip == Some(address.ip())
            || is_near
                && (address.ip().is_unspecified() || ip.is_none() && address.ip().is_loopback()))
}

/// The directories that may speak of `registry`, the best first.
fn directories(path: &Path, registry: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    if let Some((host, port)) = registry.rsplit_once(':').filter(|(_, p)| !p.contains(']')) {
        found.push(path.join(format!("{host}_{port}_")));
    }
    found.push(path.join(registry));
    found.push(path.join("_default"));
    found
}

/// The registry itself, as it is where nothing is set.
fn upstream(registry: &str, tls: Tls) -> Result<Endpoint, SourceError> {
    let host = match registry {
        "docker.io" => "registry-1.docker.io",
        host => host,
    };
    let is_trusted = !tls.roots.is_empty() || tls.identity.is_some();
    let scheme = match super::is_loopback(host) && !is_trusted {
        true => "http",
        false => "https",
    };
    let base = Url::parse(&format!("{scheme}://{host}/v2")).map_err(|error| {
        SourceError::new(Kind::Invalid, registry, format!("is no registry: {error}"))
    })?;
    Ok(Endpoint {
        base,
        pull: true,
        resolve: true,
        push: true,
        tls,
        headers: HeaderMap::new(),
        is_mirror: false,
    })
}

/// Reads `hosts.toml`; loads what it names.
fn parse(file: &Path, text: &str, registry: &str) -> Result<Vec<Endpoint>, SourceError> {
    let what = file.display().to_string();
    let invalid = |message: String| SourceError::new(Kind::Invalid, &what, message);
    // The message of the parser shows the line, in which a header may hold a secret.
    let parsed: File = toml::from_str(text).map_err(|error| {
        let line = error
            .span()
            .map(|span| text[..span.start].lines().count().max(1));
        let line = line.map_or(String::new(), |line| format!("line {line}: "));
        invalid(format!("{line}{}", short(error.message())))
    })?;
    if parsed.host.len() > MAX_MIRRORS {
        return Err(invalid(format!("names more than {MAX_MIRRORS} hosts")));
    }
    // Tables have no order of their own, but the order in the file is the order of the mirrors.
    let mut mirrors: Vec<_> = parsed.host.into_iter().collect();
    mirrors.sort_by_key(|(_, settings)| settings.span().start);
    let mut endpoints = Vec::new();
    for (url, settings) in mirrors {
        endpoints.push(endpoint(file, &url, settings.into_inner(), registry)?);
    }
    let itself = match parsed.server.filter(|server| !server.is_empty()) {
        Some(server) => endpoint(file, &server, parsed.itself, registry)?,
        None => {
            let mut itself = upstream(registry, Tls::default())?;
            let set = endpoint(file, itself.base.as_str(), parsed.itself, registry)?;
            if !set.tls.roots.is_empty() || set.tls.identity.is_some() {
                itself.base = upstream(registry, set.tls.clone())?.base;
            }
            Endpoint {
                base: itself.base,
                ..set
            }
        }
    };
    endpoints.push(itself);
    Ok(endpoints)
}

fn endpoint(
    file: &Path,
    url: &str,
    settings: Settings,
    registry: &str,
) -> Result<Endpoint, SourceError> {
    let what = file.display().to_string();
    let invalid = |message: String| SourceError::new(Kind::Invalid, &what, message);
    let given = match url.contains("://") {
        true => Url::parse(url),
        false => Url::parse(&format!("https://{url}")),
    };
    let mut base = match given {
        Ok(base) if matches!(base.scheme(), "http" | "https") => base,
        _ => {
            let url = short(&crate::reference::redact(url));
            return Err(invalid(format!(
                "expected the url of a host, found {url:?}"
            )));
        }
    };
    if !base.username().is_empty() || base.password().is_some() || base.query().is_some() {
        let host = host_of(&base);
        return Err(invalid(format!(
            "the url of {host} has a user name, password or query"
        )));
    }
    let path = base.path().trim_end_matches('/').to_owned();
    let is_whole = settings.override_path.unwrap_or(false) || path.ends_with("/v2");
    base.set_path(&if is_whole { path } else { format!("{path}/v2") });
    base.set_fragment(None);
    // As containerd has it, an empty list says as much as none.
    let named = settings.capabilities.as_deref().unwrap_or_default();
    let can = |name: &str| named.is_empty() || named.iter().any(|n| n.eq_ignore_ascii_case(name));
    let (pull, resolve, push) = (can("pull"), can("resolve"), can("push"));
    let near = |name: &String| file.parent().unwrap_or(Path::new("/")).join(name);
    let mut tls = Tls {
        skip_verify: settings.skip_verify.unwrap_or(false),
        ..Tls::default()
    };
    for name in settings.ca.iter().flat_map(OneOrMore::as_slice) {
        tls.trust(authorities(&near(name))?);
    }
    if let Some(client) = settings.client.as_ref().and_then(|c| c.as_slice().first()) {
        tls.identity = match client.as_slice() {
            [both] => Some(identity(&[near(both)])?),
            [certificate, key] if key.is_empty() => Some(identity(&[near(certificate)])?),
            [certificate, key] => Some(identity(&[near(certificate), near(key)])?),
            _ => {
                return Err(invalid(
                    "expected client = [[\"CERTIFICATE\", \"KEY\"]]".into(),
                ));
            }
        };
    }
    let mut headers = HeaderMap::new();
    for (name, values) in settings.header.iter().flatten() {
        for value in values.as_slice() {
            let parsed = (name.parse::<HeaderName>(), HeaderValue::from_str(value));
            let (Ok(name), Ok(mut value)) = parsed else {
                return Err(invalid(format!(
                    "the header {:?} is not valid",
                    short(name)
                )));
            };
            value.set_sensitive(true);
            headers.append(name, value);
        }
    }
    let itself = upstream(registry, Tls::default())?.base;
    let port = Url::port_or_known_default;
    let is_itself = base.host_str() == itself.host_str()
        // The default port differs between http and https, not the registry.
        && (port(&base) == port(&itself) || (base.port().is_none() && itself.port().is_none()));
    Ok(Endpoint {
        base,
        pull,
        resolve,
        push,
        tls,
        headers,
        is_mirror: !is_itself,
    })
}

/// What Docker reads of `certs.d/<host>`.
fn docker_certificates(dir: &Path) -> Result<Tls, SourceError> {
    let mut tls = Tls::default();
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Ok(tls);
    };
    let mut files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    files.sort();
    for file in files {
        match file.extension().and_then(|e| e.to_str()) {
            Some("crt") => tls.trust(authorities(&file)?),
            Some("cert") if tls.identity.is_none() => {
                let key = file.with_extension("key");
                tls.identity = Some(identity(&[file, key])?);
            }
            _ => {}
        }
    }
    Ok(tls)
}

/// The certificates of a file, and its text.
fn authorities(file: &Path) -> Result<(Vec<reqwest::Certificate>, String), SourceError> {
    let invalid = |why: &str| SourceError::new(Kind::Invalid, file.display().to_string(), why);
    let pem = read(file)?.ok_or_else(|| invalid("is not there"))?;
    let found = reqwest::Certificate::from_pem_bundle(pem.as_bytes());
    match found {
        Ok(found) if !found.is_empty() => Ok((found, pem)),
        _ => Err(invalid("holds no PEM certificate")),
    }
}

/// A certificate and its key, in one file or two.
fn identity(files: &[PathBuf]) -> Result<reqwest::Identity, SourceError> {
    let names: Vec<_> = files.iter().map(|f| f.display().to_string()).collect();
    let invalid = |why: &str| SourceError::new(Kind::Invalid, names.join(" and "), why);
    let mut pem = String::new();
    for file in files {
        pem.push_str(&read(file)?.ok_or_else(|| invalid("is not there"))?);
        pem.push('\n');
    }
    reqwest::Identity::from_pem(pem.as_bytes())
        .map_err(|_| invalid("holds no PEM certificate with its key"))
}

/// The text of a file; `None` where there is none.
fn read(file: &Path) -> Result<Option<String>, SourceError> {
    let fail = |why: String| SourceError::new(Kind::Invalid, file.display().to_string(), why);
    let open = match std::fs::File::open(file) {
        Ok(open) => open,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(format!("cannot be read: {error}"))),
    };
    let mut text = String::new();
    open.take(MAX_FILE + 1)
        .read_to_string(&mut text)
        .map_err(|error| fail(format!("cannot be read: {error}")))?;
    if text.len() as u64 > MAX_FILE {
        return Err(fail("is longer than 1 MiB".into()));
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str, registry: &str) -> Result<Vec<Endpoint>, SourceError> {
        parse(Path::new("/etc/x/hosts.toml"), text, registry)
    }

    fn urls(text: &str, registry: &str) -> Vec<String> {
        let endpoints = parsed(text, registry).unwrap();
        endpoints.iter().map(|e| e.base.to_string()).collect()
    }

    #[test]
    fn the_corpus() {
        crate::corpus::replay("corpus/hosts", |input| {
            let _ = parsed(&String::from_utf8_lossy(input), "r.io");
        });
    }

    #[test]
    fn mirrors_keep_their_order_and_the_registry_comes_last() {
        let text = r#"
            server = "https://registry-1.docker.io"
            [host."https://z.example"]
              capabilities = ["pull", "resolve"]
              [host."https://z.example".header]
                x-a = "1"
                x-b = ["2", "3"]
            [host."http://a.example:5000"]
              capabilities = ["pull"]
              skip_verify = true
              something_new = 3
            [host."https://h.example/v2/proxy"]
              override_path = true
              capabilities = []
            [host."b.example/sub/"]
        "#;
        assert_eq!(
            urls(text, "docker.io"),
            [
                "https://z.example/v2",
                "http://a.example:5000/v2",
                "https://h.example/v2/proxy",
                "https://b.example/sub/v2",
                "https://registry-1.docker.io/v2",
            ]
        );
        let all = parsed(text, "docker.io").unwrap();
        let can: Vec<_> = all.iter().map(|e| (e.pull, e.resolve, e.push)).collect();
        assert_eq!(
            can[..3],
            [
                (true, true, false),
                (true, false, false),
                (true, true, true)
            ]
        );
        let mirrors: Vec<_> = all.iter().map(|e| e.is_mirror).collect();
        assert_eq!(mirrors, [true, true, true, true, false]);
        assert_eq!(all[0].headers.get_all("x-b").iter().count(), 2);
        assert!(all[1].tls.skip_verify && !all[0].tls.skip_verify);
    }

    #[test]
    fn the_registry_itself_is_asked_where_nothing_is_said() {
        assert_eq!(urls("", "docker.io"), ["https://registry-1.docker.io/v2"]);
        assert_eq!(urls("", "ghcr.io"), ["https://ghcr.io/v2"]);
        assert_eq!(urls("", "127.0.0.1:5000"), ["http://127.0.0.1:5000/v2"]);
        assert_eq!(urls("", "localhost"), ["http://localhost/v2"]);
        assert_eq!(urls("", "[::1]:5000"), ["http://[::1]:5000/v2"]);
        let same = r#"server = "http://reg.lan:5000""#;
        assert!(!parsed(same, "reg.lan:5000").unwrap()[0].is_mirror);
        assert!(parsed(same, "other.lan:5000").unwrap()[0].is_mirror);
        assert!(!parsed(r#"server = "http://reg.lan""#, "reg.lan").unwrap()[0].is_mirror);
    }

    #[test]
    fn directories_are_those_of_containerd() {
        let found = directories(Path::new("/c"), "h.io:5000");
        let found: Vec<_> = found.iter().map(|p| p.to_str().unwrap()).collect();
        assert_eq!(found, ["/c/h.io_5000_", "/c/h.io:5000", "/c/_default"]);
        assert_eq!(directories(Path::new("/c"), "h.io").len(), 2);
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str, text: &str| {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("hosts.toml"), text).unwrap();
        };
        let first = |registry: &str| endpoints(dir.path(), registry).unwrap()[0].base.to_string();
        assert_eq!(first("r.io:5"), "https://r.io:5/v2");
        at("_default", "[host.\"https://d\"]");
        assert_eq!(first("r.io:5"), "https://d/v2");
        at("r.io:5", "[host.\"https://e\"]");
        assert_eq!(first("r.io:5"), "https://e/v2");
        at("r.io_5_", "[host.\"https://f\"]");
        assert_eq!(first("r.io:5"), "https://f/v2");
        assert_eq!(first("r.io"), "https://d/v2");
    }

    #[test]
    fn what_cannot_be_used_is_named_without_secrets() {
        for (text, word) in [
            ("server = 3", "line 1"),
            (
                "\n[host.\"https://a\"]\nca = \"none.pem\"",
                "/etc/x/none.pem",
            ),
            (
                "[host.\"https://a\"]\nclient = [[\"a\",\"b\",\"c\"]]",
                "client",
            ),
            ("[host.\"ftp://a\"]", "expected the url"),
            ("[host.\"https://me:hunter2@a\"]", "user name"),
            ("[host.\"https://me:hunter2@a b\"]", "expected the url"),
            (
                "[host.\"https://a\".header]\n\"a b\" = \"hunter2\"",
                "header",
            ),
            ("[host.\"https://a\".header]\na = [\"hunter2\", 1]", "line"),
            (
                "[host.\"https://a\".header]\nauthorization = \"hunter2\" x",
                "line",
            ),
        ] {
            let error = parsed(text, "r.io")
                .err()
                .unwrap_or_else(|| panic!("{text}"))
                .to_string();
            assert!(
                error.contains(word) && error.contains("/etc/x"),
                "{text}: {error}"
            );
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(
            text in r#"((server|\[host\."[a-z:/.]{0,12}"\]|ca|client|header|capabilities)( = ("[a-z:/@]{0,8}"|\[("a",?){0,2}\]|true))?\n){0,6}"#,
            registry in r"[a-z0-9.:\[\]-]{1,12}",
        ) {
            let _ = parsed(&text, &registry);
        }
    }
}
