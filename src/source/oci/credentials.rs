//! Credentials for registries, from where other tools keep them.
//!
//! In order: the files of `source.oci.auth_files`; `$DOCKER_CONFIG/config.json` (else
//! `~/.docker/config.json`); `$REGISTRY_AUTH_FILE`; `$XDG_RUNTIME_DIR/containers/auth.json`; the
//! kubelet's credential provider plugins. Read anew each time they are needed, since they are
//! rotated; what a plugin gives is kept as long as it says. Invariants: no value of a file or
//! helper is shown, only where it is from; helpers run without a shell, for a bounded time, and
//! their output is bounded.

mod docker;
mod exec;
mod provider;

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use zeroize::Zeroizing;

use self::{
    docker::{Choice, choices},
    provider::Providers,
};
use crate::{
    reference::Secret,
    source::{Config, Keys, listing::short},
};

/// Largest file with credentials, in bytes.
const MAX_FILE: u64 = 4 << 20;

/// What opens a registry.
#[derive(Debug, Clone)]
pub(super) enum Credential {
    Password {
        user: Secret,
        password: Secret,
    },
    /// To be exchanged for a token (`identitytoken`).
    Identity(Secret),
    /// A token for the registry itself (`registrytoken`).
    Token(Secret),
}

/// What credentials are for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// `host` or `host:port`; Docker Hub is `docker.io`.
    pub(super) registry: String,
    pub(super) repository: String,
}

/// The result of a search.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) credential: Option<Credential>,
    /// Where it is from, or where it was looked for.
    pub(super) origin: String,
    /// Whether there is another to try where this one is refused.
    pub(super) more: bool,
}

/// All places where credentials may be. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Keychain(Arc<Places>);

#[derive(Debug)]
struct Places {
    /// Before all files.
    own: Vec<Secret>,
    files: Vec<PathBuf>,
    providers: Option<Arc<Providers>>,
}

impl Place {
    /// `registry/repository`.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }
}

impl Keychain {
    /// The places that `config` and the environment name.
    pub(crate) fn new(config: &Config) -> Self {
        let env = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        Self(Arc::new(Places {
            own: Vec::new(),
            files: files(config, &env),
            providers: Providers::new(&config.oci).map(Arc::new),
        }))
    }

    /// These places, and before them what `keys` hold; nothing else where they are alone.
    pub(crate) fn with(&self, keys: &Keys) -> Self {
        if keys.registries.is_empty() && !keys.alone {
            return self.clone();
        }
        let (files, providers) = match keys.alone {
            true => (Vec::new(), None),
            false => (self.0.files.clone(), self.0.providers.clone()),
        };
        Self(Arc::new(Places {
            own: keys.registries.clone(),
            files,
            providers,
        }))
    }

    /// Looks for credentials, the first of them but for `tried`. `afresh`: those that are remembered have
    /// been refused. Does not fail: what cannot be read may not be needed; `origin` tells of it.
    pub(super) async fn find(&self, place: &Place, afresh: bool, tried: usize) -> Found {
        let (places, wanted) = (Arc::clone(&self.0), place.clone());
        // Reads files, runs programs.
        let found = tokio::task::spawn_blocking(move || places.find(&wanted, afresh, tried)).await;
        found.unwrap_or_else(|_| Found {
            credential: None,
            origin: "the search for credentials was broken off".to_owned(),
            more: false,
        })
    }

    /// Where credentials would be looked for.
    pub(super) fn places(&self) -> String {
        let places: Vec<_> = self
            .0
            .files
            .iter()
            .map(|f| f.display().to_string())
            .collect();
        format!(
            "no credentials were asked for; they would be in {}",
            places.join(" or ")
        )
    }
}

impl Places {
    fn find(&self, place: &Place, afresh: bool, tried: usize) -> Found {
        const OWN: &str = "the credentials that came with the request";
        let mut looked = Vec::new();
        let mut direct = Vec::new();
        for own in &self.own {
            match choices(own.expose().as_bytes(), place) {
                Ok(found) => {
                    let found = found.into_iter().find_map(|choice| match choice {
                        Choice::Direct(credential) => Some(credential),
                        Choice::Helper { .. } => None,
                    });
                    match found {
                        Some(found) => direct.push(found),
                        None => looked.push(OWN.to_owned()),
                    }
                }
                Err(problem) => looked.push(format!("{OWN}: it {problem}")),
            }
        }
        if !direct.is_empty() {
            // Fewer than before, perhaps.
            let at = tried.min(direct.len() - 1);
            return Found {
                more: at + 1 < direct.len(),
                credential: Some(direct.swap_remove(at)),
                origin: format!("tried {OWN}"),
            };
        }
        let found = |(credential, origin)| Found {
            credential: Some(credential),
            origin,
            more: false,
        };
        for file in &self.files {
            match from_file(file, place) {
                Ok(Some(known)) => return found(known),
                Ok(None) => looked.push(file.display().to_string()),
                Err(problem) => {
                    tracing::warn!("credentials: {problem}");
                    looked.push(problem);
                }
            }
        }
        if let Some(providers) = &self.providers {
            match providers.find(place, afresh) {
                Ok(Some(known)) => return found(known),
                Ok(None) => looked.push(providers.name()),
                Err(problem) => {
                    tracing::warn!("credentials: {problem}");
                    looked.push(problem);
                }
            }
        }
        Found {
            credential: None,
            origin: format!(
                "no credentials for {} in {}",
                place.registry,
                looked.join(", ")
            ),
            more: false,
        }
    }
}

/// The files that may hold credentials, the first to be looked at first.
fn files(config: &Config, env: &dyn Fn(&str) -> Option<std::ffi::OsString>) -> Vec<PathBuf> {
    let mut files = config.oci.auth_files.clone();
    let docker = env("DOCKER_CONFIG").map(PathBuf::from);
    let docker = docker.or_else(|| Some(PathBuf::from(env("HOME")?).join(".docker")));
    files.extend(docker.map(|dir| dir.join("config.json")));
    files.extend(env("REGISTRY_AUTH_FILE").map(PathBuf::from));
    let runtime = env("XDG_RUNTIME_DIR").map(PathBuf::from);
    files.extend(runtime.map(|dir| dir.join("containers/auth.json")));
    files
}

/// What `file` has for `place`, and where it is from.
///
/// # Errors
/// What is wrong with the file or the helper it names; shows no value.
fn from_file(file: &Path, place: &Place) -> Result<Option<(Credential, String)>, String> {
    let name = file.display();
    let Some(bytes) = read(file)? else {
        return Ok(None);
    };
    let choices = choices(&bytes, place).map_err(|why| format!("{name} {why}"))?;
    let mut problem = None;
    for choice in choices {
        match choice {
            Choice::Direct(credential) => {
                return Ok(Some((
                    credential,
                    format!("tried the credentials of {name}"),
                )));
            }
            Choice::Helper { helper, server } => match docker::ask(&helper, &server) {
                Ok(Some(credential)) => {
                    let helper = short(&helper);
                    let origin = format!(
                        "tried the credentials that docker-credential-{helper} gave, which {name} names"
                    );
                    return Ok(Some((credential, origin)));
                }
                Ok(None) => {}
                Err(why) => problem = Some(format!("{name}: {why}")),
            },
        }
    }
    problem.map_or(Ok(None), Err)
}

/// The bytes of a file; `None` where there is none.
fn read(file: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, String> {
    let name = file.display();
    let open = match std::fs::File::open(file) {
        Ok(open) => open,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{name} cannot be read ({error})")),
    };
    let mut bytes = Zeroizing::new(Vec::with_capacity(64 << 10));
    open.take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("{name} cannot be read ({error})"))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!("{name} is longer than 4 MiB"));
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_in_order() {
        let list = |pairs: &[(&str, &str)]| {
            let env = |name: &str| {
                let found = pairs.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| (*value).into())
            };
            let mut config = Config::default();
            config.oci.auth_files = vec!["/own".into()];
            let files = files(&config, &env);
            let files: Vec<_> = files
                .iter()
                .map(|f| f.to_str().unwrap().to_owned())
                .collect();
            files.join(" ")
        };
        assert_eq!(list(&[]), "/own");
        assert_eq!(list(&[("HOME", "/h")]), "/own /h/.docker/config.json");
        assert_eq!(
            list(&[
                ("HOME", "/h"),
                ("DOCKER_CONFIG", "/d"),
                ("XDG_RUNTIME_DIR", "/run/u"),
                ("REGISTRY_AUTH_FILE", "/a.json"),
            ]),
            "/own /d/config.json /a.json /run/u/containers/auth.json"
        );
    }

    #[test]
    fn the_first_file_that_knows_counts_and_problems_are_named_without_values() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let place = Place {
            registry: "r.io".into(),
            repository: "a/b".into(),
        };
        let find = |files: Vec<PathBuf>| {
            let places = Places {
                own: Vec::new(),
                files,
                providers: None,
            };
            places.find(&place, false, 0)
        };
        let broken = write(
            "broken",
            r#"{"auths": {"r.io": {"password": ["hunter2"]}}}"#,
        );
        let other = write(
            "other",
            r#"{"auths": {"other.io": {"username": "u", "password": "p"}}}"#,
        );
        let good = write(
            "good",
            r#"{"auths": {"r.io": {"username": "u", "password": "hunter2"}}}"#,
        );
        let none = dir.path().join("none");
        let found = find(vec![none.clone(), other.clone(), good.clone()]);
        assert!(matches!(
            found.credential,
            Some(Credential::Password { .. })
        ));
        assert!(found.origin.contains("good"), "{}", found.origin);
        let found = find(vec![none, broken, other]);
        assert!(found.credential.is_none());
        for word in ["r.io", "none", "broken", "other", "line 1"] {
            assert!(found.origin.contains(word), "{}", found.origin);
        }
        assert!(!found.origin.contains("hunter2"));
        let missing = write(
            "helper",
            r#"{"credHelpers": {"r.io": "of-hearth-that-is-not-there"}}"#,
        );
        let found = find(vec![missing]);
        assert!(
            found.origin.contains("docker-credential-of-hearth"),
            "{}",
            found.origin
        );
        let debug = format!("{:?}", find(vec![good]));
        assert!(!debug.contains("hunter2"), "{debug}");
    }
}
