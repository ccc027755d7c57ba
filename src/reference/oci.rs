//! References to what is in a registry: `oci://registry/repository[:tag][@digest]`.

use std::{borrow::Cow, fmt};

/// Longest repository, in bytes (OCI distribution-spec, "Pulling manifests", and Docker's own rule).
const MAX_REPOSITORY: usize = 255;
/// Longest tag, in bytes.
const MAX_TAG: usize = 128;
/// Longest part of a platform, in bytes.
const MAX_PLATFORM_PART: usize = 32;
const EXPECTED: &str = "expected oci://registry/repository[:tag][@sha256:digest]";

/// What is in a registry, by tag or digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OciRef {
    /// `host` or `host:port`, lower case; Docker Hub is `docker.io`.
    pub registry: String,
    /// The repository's whole path, such as `library/nginx`.
    pub repository: String,
    /// `None` only where there is a digest.
    pub tag: Option<String>,
    /// `sha256:<64 hex digits>`; goes before the tag, which then only says what is meant.
    pub digest: Option<String>,
    /// Which manifest of a multi-platform index; `None` is that of this machine.
    pub platform: Option<Platform>,
    /// The directory of the content that is meant, without slashes at its ends; empty for all.
    pub path: String,
}

/// What an image runs on, in the words of Go (OCI image-spec, image-index.md), normalized.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Platform {
    pub os: String,
    pub arch: String,
    pub variant: Option<String>,
}

impl OciRef {
    /// Parses what follows `://`, without query.
    pub(super) fn parse(text: &str) -> Result<Self, Cow<'static, str>> {
        let (registry, rest) = text.split_once('/').ok_or(EXPECTED)?;
        if registry.contains('@') {
            return Err("credentials do not belong into a reference: run docker login".into());
        }
        let registry = registry.to_ascii_lowercase();
        check_registry(&registry)?;
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => (rest, Some(check_digest(digest)?)),
            None => (rest, None),
        };
        let (repository, tag) = match rest.split_once(':') {
            Some((repository, tag)) => (repository, Some(check_tag(tag)?)),
            None => (rest, None),
        };
        check_repository(repository)?;
        // One name for Docker Hub and for its official images.
        let (registry, repository) = match registry.as_str() {
            "docker.io" | "index.docker.io" | "registry-1.docker.io" => (
                "docker.io".to_owned(),
                match repository.contains('/') {
                    true => repository.to_owned(),
                    false => format!("library/{repository}"),
                },
            ),
            _ => (registry, repository.to_owned()),
        };
        let tag = match (tag, &digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Self {
            registry,
            repository,
            tag,
            digest: digest.map(str::to_owned),
            platform: None,
            path: String::new(),
        })
    }

    /// Whether `text` could be a tag.
    pub fn is_tag(text: &str) -> bool {
        check_tag(text).is_ok()
    }

    /// The digest, else the tag: what to ask the registry for.
    pub fn wanted(&self) -> &str {
        let wanted = self.digest.as_deref().or(self.tag.as_deref());
        wanted.unwrap_or("latest")
    }
}

impl fmt::Display for OciRef {
    /// Without the platform and the path.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "oci://{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl Platform {
    /// Parses `os/arch[/variant]`.
    ///
    /// # Errors
    /// Anything else.
    pub fn parse(text: &str) -> Result<Self, String> {
        let fits = |part: &&str| {
            let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
            !part.is_empty() && part.len() <= MAX_PLATFORM_PART && part.bytes().all(allowed)
        };
        let parts: Vec<&str> = text.split('/').collect();
        match parts[..] {
            [os, arch] if parts.iter().all(fits) => Ok(Self::new(os, arch, None)),
            [os, arch, variant] if parts.iter().all(fits) => Ok(Self::new(os, arch, Some(variant))),
            _ => {
                Err("expected a platform of the form os/arch[/variant], such as linux/arm64".into())
            }
        }
    }

    /// A platform under its normal names, as containerd's `platforms.Normalize` has them.
    pub fn new(os: &str, arch: &str, variant: Option<&str>) -> Self {
        let os = match os.to_ascii_lowercase() {
            os if os == "macos" => "darwin".to_owned(),
            os => os,
        };
        let variant = variant
            .map(str::to_ascii_lowercase)
            .filter(|v| !v.is_empty());
        let arch = arch.to_ascii_lowercase();
        let (arch, variant) = match (arch.as_str(), variant.as_deref()) {
            ("x86_64" | "x86-64" | "amd64", Some("v1")) => ("amd64", None),
            ("x86_64" | "x86-64", _) => ("amd64", variant),
            ("i386", _) => ("386", None),
            ("aarch64" | "arm64", Some("8" | "v8")) => ("arm64", None),
            ("aarch64", _) => ("arm64", variant),
            ("armhf", _) | ("arm", None | Some("7")) => ("arm", Some("v7".to_owned())),
            ("armel", _) | ("arm", Some("6")) => ("arm", Some("v6".to_owned())),
            ("arm", Some("5")) => ("arm", Some("v5".to_owned())),
            ("arm", Some("8")) => ("arm", Some("v8".to_owned())),
            (arch, _) => (arch, variant),
        };
        Self {
            os,
            arch: arch.to_owned(),
            variant,
        }
    }

    /// That of this machine.
    pub fn here() -> Self {
        let arch = match std::env::consts::ARCH {
            "x86" => "386",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "loongarch64" => "loong64",
            arch => arch,
        };
        Self::new(std::env::consts::OS, arch, None)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.arch)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// Docker's rule for what is a host and what belongs to the repository: a dot, a port, or localhost.
fn check_registry(registry: &str) -> Result<(), Cow<'static, str>> {
    let (host, port) = match registry.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, port.strip_prefix(':').or(Some(""))),
            None => (registry, Some("")),
        },
        None => match registry.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (registry, None),
        },
    };
    let is_v6 = registry.starts_with('[');
    let host_fits = match is_v6 {
        true => host.parse::<std::net::Ipv6Addr>().is_ok(),
        false => {
            let label = |label: &str| {
                let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
                !label.is_empty()
                    && label.len() <= 63
                    && label.bytes().all(allowed)
                    && !label.starts_with('-')
                    && !label.ends_with('-')
            };
            host.len() <= 253 && host.split('.').all(label)
        }
    };
    let port_fits = port.is_none_or(|port| {
        let digits = !port.starts_with('0') && port.bytes().all(|b| b.is_ascii_digit());
        digits && port.parse::<u16>().is_ok()
    });
    if !host_fits || !port_fits {
        return Err(EXPECTED.into());
    }
    if !(is_v6 || port.is_some() || host.contains('.') || host == "localhost") {
        return Err(format!(
            "{host:?} is no registry host (it has no dot and no port); \
             for Docker Hub write oci://docker.io/library/NAME or oci://docker.io/ORG/NAME"
        )
        .into());
    }
    Ok(())
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*` between slashes.
fn check_repository(repository: &str) -> Result<(), Cow<'static, str>> {
    let component = |part: &str| {
        let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let separators = part.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        edge(part.bytes().next())
            && edge(part.bytes().last())
            && separators
                .into_iter()
                .all(|s| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
    };
    if repository.len() > MAX_REPOSITORY || !repository.split('/').all(component) {
        return Err(
            "expected a repository of lower-case letters and digits, with single '.', '_' or \
             '-' between them and '/' between its parts"
                .into(),
        );
    }
    Ok(())
}

fn check_tag(tag: &str) -> Result<&str, Cow<'static, str>> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if tag.is_empty()
        || tag.len() > MAX_TAG
        || tag.starts_with(['.', '-'])
        || !tag.bytes().all(allowed)
    {
        return Err("expected a tag of letters, digits, '_', '.' and '-' after ':'".into());
    }
    Ok(tag)
}

fn check_digest(digest: &str) -> Result<&str, Cow<'static, str>> {
    let hex = digest.strip_prefix("sha256:").unwrap_or_default();
    let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    match hex.len() == 64 && hex.bytes().all(lower) {
        true => Ok(digest),
        false => Err("expected sha256:<64 lower-case hex digits> after @".into()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::reference::{Locator, Reference};

    const HEX: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn parse(text: &str) -> (OciRef, Reference) {
        let reference: Reference = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
        match &reference.locator {
            Locator::Oci(oci) => (oci.clone(), reference),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn references_have_one_form() {
        for (text, canonical) in [
            ("oci://ghcr.io/o/n", "oci://ghcr.io/o/n:latest"),
            ("OCI://GHCR.io/o/n:v1.0_x-Y", "oci://ghcr.io/o/n:v1.0_x-Y"),
            ("oci://localhost/n:1", "oci://localhost/n:1"),
            (
                "oci://host:5000/a/b--c/d__e.f:1",
                "oci://host:5000/a/b--c/d__e.f:1",
            ),
            ("oci://[::1]:5000/n:1", "oci://[::1]:5000/n:1"),
            (
                "oci://docker.io/nginx",
                "oci://docker.io/library/nginx:latest",
            ),
            ("oci://index.docker.io/o/n:1", "oci://docker.io/o/n:1"),
            (
                "oci://r.io/n:1?platform=Linux/x86_64",
                "oci://r.io/n:1?platform=linux/amd64",
            ),
            (
                "oci://r.io/n:1?include=*.json&platform=linux/arm/v6&exclude=x",
                "oci://r.io/n:1?platform=linux/arm/v6&include=*.json&exclude=x",
            ),
            ("oci://r.io/n:1?include=a/*", "oci://r.io/n:1?include=a/*"),
        ] {
            let (_, reference) = parse(text);
            assert_eq!(reference.to_string(), canonical, "{text}");
            assert_eq!(parse(canonical).1, reference);
        }
        let (oci, _) = parse(&format!("oci://r.io:1/a/b:t@{HEX}"));
        assert_eq!((&*oci.registry, &*oci.repository), ("r.io:1", "a/b"));
        assert_eq!(
            (oci.tag.as_deref(), oci.digest.as_deref()),
            (Some("t"), Some(HEX))
        );
        assert_eq!(oci.wanted(), HEX);
        let (oci, reference) = parse(&format!("oci://r.io/a@{HEX}"));
        assert_eq!(oci.tag, None);
        assert_eq!(reference.to_string(), format!("oci://r.io/a@{HEX}"));
    }

    #[test]
    fn what_is_no_reference_says_why() {
        let long = format!("oci://r.io/{}", "a/".repeat(200));
        for (text, word) in [
            ("oci://nginx", "expected oci://registry/repository"),
            ("oci://library/nginx", "docker.io"),
            ("oci:///a", "expected oci://"),
            ("oci://r.io/", "repository"),
            ("oci://r.io/A", "lower-case"),
            ("oci://r.io/a//b", "repository"),
            ("oci://r.io/../b", "repository"),
            ("oci://r.io/a/", "repository"),
            ("oci://r.io/a___b", "repository"),
            (&long, "repository"),
            ("oci://r.io/a:", "tag"),
            ("oci://r.io/a:.x", "tag"),
            ("oci://r.io/a:b/c", "tag"),
            ("oci://r.io/a@sha256:12", "sha256:<64"),
            ("oci://r.io/a@sha512:12", "sha256:<64"),
            ("oci://r.io:0/a", "expected oci://"),
            ("oci://r.io:99999/a", "expected oci://"),
            ("oci://r..io/a", "expected oci://"),
            ("oci://[::g]/a", "expected oci://"),
            ("oci://[::1/a", "expected oci://"),
            ("oci://r.io/a?platform=linux", "os/arch"),
            (
                "oci://r.io/a?platform=linux/arm64&platform=linux/amd64",
                "twice",
            ),
            ("oci://r.io/a?tag=x", "unknown parameter"),
        ] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        let error = "oci://me:hunter2@r.io/a"
            .parse::<Reference>()
            .unwrap_err()
            .to_string();
        assert!(
            !error.contains("hunter2") && error.contains("login"),
            "{error}"
        );
        let shown = format!("oci://r.io/A@{HEX}")
            .parse::<Reference>()
            .unwrap_err();
        assert!(shown.to_string().contains("r.io/A"), "{shown}");
    }

    #[test]
    fn platforms_have_one_name() {
        for (text, canonical) in [
            ("linux/x86_64", "linux/amd64"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armel", "linux/arm/v6"),
            ("Linux/AMD64/v3", "linux/amd64/v3"),
            ("windows/amd64", "windows/amd64"),
        ] {
            assert_eq!(Platform::parse(text).unwrap().to_string(), canonical);
        }
        for bad in ["", "linux", "linux/", "/amd64", "a/b/c/d", "a b/c", "a/é"] {
            assert!(Platform::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(Platform::here().os, "linux");
    }

    proptest! {
        #[test]
        fn what_parses_round_trips(
            host in r"([a-z0-9.-]{1,8}|\[[:0-9a-f]{0,6}\])(:[0-9]{0,6})?",
            path in r"[a-zA-Z0-9._/-]{0,20}", tag in r"(:[a-zA-Z0-9._:-]{0,8})?",
            query in r"(\?(platform|include|exclude|x)=[a-z0-9/*%-]{0,12}){0,2}",
        ) {
            let text = format!("oci://{host}/{path}{tag}{query}");
            if let Ok(reference) = text.parse::<Reference>() {
                let shown = reference.to_string();
                prop_assert_eq!(shown.parse::<Reference>().unwrap(), reference);
            }
        }

        #[test]
        fn nothing_panics(text in r"oci://.{0,60}") {
            let _ = text.parse::<Reference>();
        }
    }
}
