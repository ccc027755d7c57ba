//! `config.json` of Docker and `auth.json` of Podman (containers-auth.json(5)), and the helpers that
//! they name (docker-credential-helpers).

use std::{collections::HashMap, path::Path, time::Duration};

use base64::Engine as _;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::{Credential, Place, exec, provider::matches_image};
use crate::{reference::Secret, source::listing::short};

/// Longest run of a helper.
const MAX_RUN: Duration = Duration::from_secs(30);

/// What is read of the file. Not `Debug`: holds secrets.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct File {
    auths: HashMap<String, Option<Entry>>,
    cred_helpers: HashMap<String, String>,
    creds_store: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: Option<Zeroizing<String>>,
    username: Option<Zeroizing<String>>,
    password: Option<Zeroizing<String>>,
    identitytoken: Option<Zeroizing<String>>,
    registrytoken: Option<Zeroizing<String>>,
}

/// What a helper answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: Zeroizing<String>,
}

/// One way to credentials.
pub(super) enum Choice {
    Direct(Credential),
    /// Ask `docker-credential-<helper>` for `server`.
    Helper {
        helper: String,
        server: String,
    },
}

/// The ways that a file offers for `place`, the best first.
///
/// # Errors
/// What is wrong with the file; shows no value of it.
pub(super) fn choices(bytes: &[u8], place: &Place) -> Result<Vec<Choice>, String> {
    let file: File = serde_json::from_slice(bytes).map_err(|error| {
        // The error itself may quote a value.
        let (line, column) = (error.line(), error.column());
        format!("is no file with credentials (line {line}, column {column})")
    })?;
    let server = match place.registry.as_str() {
        "docker.io" => "https://index.docker.io/v1/",
        registry => registry,
    };
    let helper = |name: &String| Choice::Helper {
        helper: name.clone(),
        server: server.to_owned(),
    };
    let mut found = Vec::new();
    let keys = keys(place);
    found.extend(best(&file.cred_helpers, &keys).map(helper));
    let auth = best(&file.auths, &keys).or_else(|| best_glob(&file.auths, place));
    if let Some(Some(entry)) = auth {
        let direct = entry.credential()?;
        found.extend(direct.map(Choice::Direct));
    }
    if !file.creds_store.is_empty() {
        found.push(helper(&file.creds_store));
    }
    Ok(found)
}

/// What a file may call `place`, the most exact first: its path cut short at each slash, down to the
/// host.
fn keys(place: &Place) -> Vec<String> {
    let hosts: &[&str] = match place.registry.as_str() {
        "docker.io" => &["docker.io", "index.docker.io", "registry-1.docker.io"],
        registry => &[registry],
    };
    let mut paths = vec![place.repository.as_str()];
    while let Some((shorter, _)) = paths[paths.len() - 1].rsplit_once('/') {
        paths.push(shorter);
    }
    let mut keys = Vec::new();
    for path in paths {
        keys.extend(hosts.iter().map(|host| format!("{host}/{path}")));
    }
    keys.extend(hosts.iter().map(|host| (*host).to_owned()));
    keys
}

/// The value of the first of `keys`.
fn best<'m, T>(map: &'m HashMap<String, T>, keys: &[String]) -> Option<&'m T> {
    let at = |key: &str| keys.iter().position(|wanted| wanted == key);
    // Of several spellings of one name, the plain one.
    let ranked = map.iter().filter_map(|(key, value)| {
        let name = normal(key);
        Some(((at(&name)?, name != *key), value))
    });
    ranked.min_by_key(|(rank, _)| *rank).map(|(_, value)| value)
}

/// The value of the most exact pattern for `place`: those of the kubelet, which pull secrets may have.
fn best_glob<'m, T>(map: &'m HashMap<String, T>, place: &Place) -> Option<&'m T> {
    let name = place.name();
    let patterns = map.iter().filter_map(|(key, value)| {
        let pattern = normal(key);
        let matches = pattern.contains(['*', '?', '[']) && matches_image(&pattern, &name);
        matches.then_some((pattern, value))
    });
    // The last one, as the kubelet has it: a longer path goes before a shorter one.
    let best = patterns.max_by(|(one, _), (other, _)| one.cmp(other));
    best.map(|(_, value)| value)
}

/// A key without what older versions of Docker wrote around it: `https://index.docker.io/v1/`.
fn normal(key: &str) -> String {
    let bare = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"));
    let was_url = bare.is_some();
    let bare = bare.unwrap_or(key).trim_end_matches('/');
    let bare = match bare
        .strip_suffix("/v1")
        .or_else(|| bare.strip_suffix("/v2"))
    {
        Some(host) if was_url || !host.contains('/') => host,
        _ => bare,
    };
    match bare.split_once('/') {
        Some((host, path)) => format!("{}/{path}", host.to_ascii_lowercase()),
        None => bare.to_ascii_lowercase(),
    }
}

impl Entry {
    fn credential(&self) -> Result<Option<Credential>, String> {
        let given =
            |field: &Option<Zeroizing<String>>| field.clone().filter(|value| !value.is_empty());
        if let Some(token) = given(&self.registrytoken) {
            return Ok(Some(Credential::Token(Secret::new(token.as_str()))));
        }
        if let Some(token) = given(&self.identitytoken) {
            return Ok(Some(Credential::Identity(Secret::new(token.as_str()))));
        }
        if let Some(auth) = given(&self.auth) {
            let wrong = || "has an auth that is not base64 of user:password".to_owned();
            let engine = base64::engine::general_purpose::STANDARD;
            let text = Zeroizing::new(engine.decode(auth.trim()).map_err(|_| wrong())?);
            let text = std::str::from_utf8(&text).map_err(|_| wrong())?;
            let (user, password) = text.split_once(':').ok_or_else(wrong)?;
            return Ok(Some(Credential::Password {
                user: Secret::new(user),
                password: Secret::new(password.trim_end_matches('\0')),
            }));
        }
        Ok(given(&self.username).map(|user| Credential::Password {
            user: Secret::new(user.as_str()),
            password: Secret::new(self.password.as_ref().map_or("", |p| p.as_str())),
        }))
    }
}

/// Asks `docker-credential-<helper>`; `None` where it has nothing.
///
/// # Errors
/// A helper that cannot be run or does not answer as it should; shows nothing it said.
pub(super) fn ask(helper: &str, server: &str) -> Result<Option<Credential>, String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if helper.is_empty() || helper.len() > 128 || !helper.bytes().all(allowed) {
        return Err(format!(
            "{:?} is no name of a credential helper",
            short(helper)
        ));
    }
    let program = format!("docker-credential-{helper}");
    let input = format!("{server}\n");
    let output = exec::run(
        Path::new(&program),
        &["get"],
        &[],
        input.as_bytes(),
        MAX_RUN,
    )
    .map_err(|why| format!("{program} {why}"))?;
    if !output.success {
        // The words of all helpers where there is nothing (docker-credential-helpers, errors.go).
        let said = String::from_utf8_lossy(&output.stdout);
        return match said.contains("credentials not found") {
            true => Ok(None),
            false => Err(format!("{program} failed; run it by hand to see why")),
        };
    }
    let answer: Answer = serde_json::from_slice(&output.stdout)
        .map_err(|_| format!("{program} did not answer with credentials"))?;
    let secret = Secret::new(answer.secret.as_str());
    Ok(Some(match answer.username.as_str() {
        "<token>" => Credential::Identity(secret),
        user => Credential::Password {
            user: Secret::new(user),
            password: secret,
        },
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn place(registry: &str, repository: &str) -> Place {
        Place {
            registry: registry.into(),
            repository: repository.into(),
        }
    }

    /// The ways as text: user:password, or helper@server.
    fn ways(text: &str, registry: &str, repository: &str) -> Vec<String> {
        let found = choices(text.as_bytes(), &place(registry, repository)).unwrap();
        let shown = found.into_iter().map(|choice| match choice {
            Choice::Direct(Credential::Password { user, password }) => {
                format!("{}:{}", user.expose(), password.expose())
            }
            Choice::Direct(Credential::Identity(token)) => format!("identity {}", token.expose()),
            Choice::Direct(Credential::Token(token)) => format!("token {}", token.expose()),
            Choice::Helper { helper, server } => format!("{helper}@{server}"),
        });
        shown.collect()
    }

    #[test]
    fn the_corpus() {
        crate::corpus::replay("corpus/docker-config", |input| {
            let _ = choices(input, &place("r.io", "a/b"));
        });
    }

    #[test]
    fn patterns_of_pull_secrets_match_as_the_kubelet_has_it() {
        let text = r#"{"auths": {
            "*.azurecr.io": {"username": "az", "password": "p"},
            "https://*.azurecr.io/team": {"username": "team", "password": "p"},
            "*.dkr.ecr.*.amazonaws.com": {"username": "aws", "password": "p"},
            "exact.azurecr.io": {"username": "exact", "password": "p"},
            "*.r.io:5000": {"username": "port", "password": "p"}
        }}"#;
        for (registry, repository, found) in [
            ("mine.azurecr.io", "a/b", "az:p"),
            ("mine.azurecr.io", "team/b", "team:p"),
            ("exact.azurecr.io", "team/b", "exact:p"),
            ("1234.dkr.ecr.eu-west-1.amazonaws.com", "x", "aws:p"),
            ("a.r.io:5000", "x", "port:p"),
        ] {
            assert_eq!(ways(text, registry, repository), [found], "{registry}");
        }
        for registry in ["azurecr.io", "a.b.azurecr.io", "a.r.io", "evil.io"] {
            assert!(
                ways(text, registry, "a.azurecr.io/b").is_empty(),
                "{registry}"
            );
        }
    }

    #[test]
    fn the_longest_prefix_wins() {
        let text = r#"{"auths": {
            "r.io": {"auth": "aG9zdDpw"},
            "r.io/team": {"username": "team", "password": "p"},
            "r.io/team/app": {"username": "app", "password": "p:q"},
            "r.io:5000": {"username": "port", "password": "p"}
        }, "HttpHeaders": {"a": "b"}}"#;
        assert_eq!(ways(text, "r.io", "x"), ["host:p"]);
        assert_eq!(ways(text, "r.io", "team/x"), ["team:p"]);
        assert_eq!(ways(text, "r.io", "team/app/x"), ["app:p:q"]);
        assert_eq!(ways(text, "r.io", "team/apple"), ["team:p"]);
        assert_eq!(ways(text, "r.io", "teams"), ["host:p"]);
        assert_eq!(ways(text, "r.io:5000", "team/x"), ["port:p"]);
        assert!(ways(text, "io", "x").is_empty());
    }

    #[test]
    fn docker_hub_has_many_names() {
        for key in [
            "https://index.docker.io/v1/",
            "index.docker.io",
            "docker.io",
            "registry-1.docker.io",
        ] {
            let text = format!(r#"{{"auths": {{"{key}": {{"auth": "dTpw"}}}}}}"#);
            assert_eq!(ways(&text, "docker.io", "library/x"), ["u:p"], "{key}");
        }
        let text = r#"{"auths": {"https://R.io/v2/": {"auth": "dTpwAAA="}}}"#;
        assert_eq!(ways(text, "r.io", "x"), ["u:p"]);
    }

    #[test]
    fn helpers_and_tokens() {
        let text = r#"{"credsStore": "secretservice", "credHelpers": {"gcr.io": "gcloud"},
            "auths": {"gcr.io": {}, "r.io": null, "i.io": {"auth": "dTo=", "identitytoken": "t"},
                      "t.io": {"registrytoken": "t"}}}"#;
        assert_eq!(
            ways(text, "gcr.io", "x"),
            ["gcloud@gcr.io", "secretservice@gcr.io"]
        );
        assert_eq!(ways(text, "r.io", "x"), ["secretservice@r.io"]);
        assert_eq!(
            ways(text, "docker.io", "library/x"),
            ["secretservice@https://index.docker.io/v1/"]
        );
        assert_eq!(ways(text, "i.io", "x")[0], "identity t");
        assert_eq!(ways(text, "t.io", "x")[0], "token t");
    }

    #[test]
    fn bad_files_and_helpers_are_refused() {
        for text in [
            "",
            "3",
            r#"{"auths": 1}"#,
            r#"{"auths": {"r.io": {"auth": "%"}}}"#,
            r#"{"auths": {"r.io": {"auth": "dXA="}}}"#,
        ] {
            assert!(
                choices(text.as_bytes(), &place("r.io", "x")).is_err(),
                "{text}"
            );
        }
        for helper in ["", "../x", "a/b", "a b", "$(x)", &"x".repeat(200)] {
            assert!(
                ask(helper, "r.io").err().unwrap().contains("no name"),
                "{helper}"
            );
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(
            text in r#"[{}\[\]",:]{0,6}("auths"|"credsStore"|"auth"|"r.io"|[{}\[\]",: ]|"[a-z:/]{0,9}"){0,12}"#,
            key in ".{0,20}",
        ) {
            let _ = choices(text.as_bytes(), &place("r.io", "a/b"));
            normal(&key);
        }
    }
}
