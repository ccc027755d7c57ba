//! Credential provider plugins of the kubelet (kubernetes.io/docs, "Configure a kubelet image
//! credential provider"): programs that are asked for one image and answer on standard output.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    time::{Duration, Instant},
};

use globset::GlobBuilder;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{Credential, Place, exec, read};
use crate::{
    reference::Secret,
    source::{OciConfig, listing::short},
};

/// Longest run of a plugin (the kubelet's own limit).
const MAX_RUN: Duration = Duration::from_secs(60);
/// Most answers remembered.
const MAX_REMEMBERED: usize = 1024;
/// Longest time an answer is remembered, whatever the plugin says.
const MAX_LIFE: Duration = Duration::from_secs(24 * 3600);
const API_GROUP: &str = "credentialprovider.kubelet.k8s.io/";

/// The plugins that a file names, and what they answered.
#[derive(Debug)]
pub(super) struct Providers {
    config: PathBuf,
    bin_dir: Option<PathBuf>,
    remembered: Mutex<HashMap<String, Remembered>>,
}

#[derive(Debug)]
struct Remembered {
    /// By the image patterns that the plugin gave.
    auth: BTreeMap<String, Credential>,
    until: Instant,
}

/// `CredentialProviderConfig` (kubelet.config.k8s.io/v1).
#[derive(Debug, Deserialize)]
struct ProviderConfig {
    providers: Vec<Provider>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Provider {
    name: String,
    #[serde(default)]
    match_images: Vec<String>,
    default_cache_duration: Option<String>,
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
}

#[derive(Debug, Deserialize)]
struct Variable {
    name: String,
    #[serde(default)]
    value: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    kind: &'a str,
    api_version: &'a str,
    image: &'a str,
}

/// Not `Debug`: holds secrets.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    cache_key_type: String,
    cache_duration: Option<String>,
    #[serde(default)]
    auth: Option<BTreeMap<String, Login>>,
}

#[derive(Deserialize)]
struct Login {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: Zeroizing<String>,
}

impl Providers {
    /// Those that `config` names.
    pub(super) fn new(config: &OciConfig) -> Option<Self> {
        Some(Self {
            config: config.credential_provider_config.clone()?,
            bin_dir: config.credential_provider_bin_dir.clone(),
            remembered: Mutex::default(),
        })
    }

    /// What to call them.
    pub(super) fn name(&self) -> String {
        format!("the plugins of {}", self.config.display())
    }

    /// What the first plugin that knows gives for `place`, and where it is from. Blocks.
    ///
    /// # Errors
    /// What is wrong with the configuration or a plugin; shows nothing it said.
    pub(super) fn find(
        &self,
        place: &Place,
        afresh: bool,
    ) -> Result<Option<(Credential, String)>, String> {
        let file = self.config.display();
        let bytes = read(&self.config)?.ok_or_else(|| format!("{file} is not there"))?;
        let config = parse(&bytes).map_err(|why| format!("{file} {why}"))?;
        let image = place.name();
        let mut problem = None;
        for provider in &config.providers {
            let wanted = |glob: &String| matches_image(glob, &image);
            if !provider.match_images.iter().any(wanted) {
                continue;
            }
            match self.ask(provider, place, afresh) {
                Ok(Some(credential)) => {
                    let origin = format!(
                        "tried the credentials that the plugin {} of {file} gave",
                        short(&provider.name)
                    );
                    return Ok(Some((credential, origin)));
                }
                Ok(None) => {}
                Err(why) => problem = Some(format!("plugin {} {why}", short(&provider.name))),
            }
        }
        problem.map_or(Ok(None), Err)
    }

    fn ask(
        &self,
        provider: &Provider,
        place: &Place,
        afresh: bool,
    ) -> Result<Option<Credential>, String> {
        let name = &provider.name;
        let image = place.name();
        let key = |kind: &str| match kind {
            "Global" => format!("{name}\n"),
            "Registry" => format!("{name}\n{}", place.registry),
            _ => format!("{name}\n{image}"),
        };
        let keys = ["Image", "Registry", "Global"].map(key);
        {
            let mut remembered = self.remembered.lock();
            if afresh {
                keys.iter().for_each(|key| drop(remembered.remove(key)));
            }
            let now = Instant::now();
            remembered.retain(|_, known| known.until > now);
            if let Some(known) = keys.iter().find_map(|key| remembered.get(key)) {
                return Ok(best(&known.auth, &image));
            }
        }
        let is_plain = !name.is_empty() && !name.contains('/') && name != "." && name != "..";
        if !is_plain {
            return Err("has no plain file name".into());
        }
        let Some(bin_dir) = &self.bin_dir else {
            return Err("cannot be found: set source.oci.credential_provider_bin_dir".into());
        };
        let version = match provider.api_version.as_str() {
            "" => "credentialprovider.kubelet.k8s.io/v1",
            version if version.starts_with(API_GROUP) => version,
            other => return Err(format!("has the unsupported apiVersion {:?}", short(other))),
        };
        let request = Request {
            kind: "CredentialProviderRequest",
            api_version: version,
            image: &image,
        };
        let request = serde_json::to_vec(&request).map_err(|error| error.to_string())?;
        let arguments: Vec<&str> = provider.args.iter().flatten().map(String::as_str).collect();
        let variables = provider.env.iter().flatten();
        let variables: Vec<_> = variables
            .map(|v| (v.name.clone(), v.value.clone()))
            .collect();
        let unset = |v: &(String, String)| {
            v.0.is_empty() || v.0.contains(['=', '\0']) || v.1.contains('\0')
        };
        if variables.iter().any(unset) || arguments.iter().any(|a| a.contains('\0')) {
            return Err("has an argument or variable that no program can have".into());
        }
        let program = bin_dir.join(name);
        let output = exec::run(&program, &arguments, &variables, &request, MAX_RUN)
            .map_err(|why| format!("({}) {why}", program.display()))?;
        if !output.success {
            return Err(format!(
                "({}) failed; run it by hand to see why",
                program.display()
            ));
        }
        let answer: Response = serde_json::from_slice(&output.stdout)
            .map_err(|_| "did not answer with a CredentialProviderResponse".to_owned())?;
        if answer.kind != "CredentialProviderResponse" {
            return Err("did not answer with a CredentialProviderResponse".into());
        }
        let default = provider.default_cache_duration.as_deref();
        let life = answer.cache_duration.as_deref().or(default);
        let life = life.map_or(Some(Duration::ZERO), duration);
        let life = life.ok_or("says a cache duration that is none (such as 10m or 1h30m)")?;
        let logins = answer.auth.unwrap_or_default().into_iter();
        let auth: BTreeMap<_, _> = logins
            .map(|(glob, login)| {
                let credential = Credential::Password {
                    user: Secret::new(login.username),
                    password: Secret::new(login.password.as_str()),
                };
                (glob, credential)
            })
            .collect();
        let found = best(&auth, &image);
        if !life.is_zero() {
            let mut remembered = self.remembered.lock();
            if remembered.len() >= MAX_REMEMBERED {
                remembered.clear();
            }
            let until = Instant::now() + life.min(MAX_LIFE);
            remembered.insert(key(&answer.cache_key_type), Remembered { auth, until });
        }
        Ok(found)
    }
}

/// Reads the configuration: YAML, of which JSON is a part.
fn parse(bytes: &[u8]) -> Result<ProviderConfig, String> {
    serde_saphyr::from_slice(bytes).map_err(|error| {
        // The error may quote a line, and a plugin's variables may be secret.
        let at = error
            .location()
            .map_or(String::new(), |at| format!(" (line {})", at.line()));
        format!("is no CredentialProviderConfig{at}")
    })
}

/// The login of the most exact pattern that matches.
fn best(auth: &BTreeMap<String, Credential>, image: &str) -> Option<Credential> {
    // In reverse order, as the kubelet has it: a longer path goes before a shorter one.
    let mut matching = auth
        .iter()
        .rev()
        .filter(|(glob, _)| matches_image(glob, image));
    matching.next().map(|(_, credential)| credential.clone())
}

/// The kubelet's `URLsMatchStr`: equal ports, as many parts of the host, each matching as a glob,
/// and the path of the pattern a prefix of that of the image.
pub(super) fn matches_image(glob: &str, image: &str) -> bool {
    fn split(text: &str) -> (&str, Option<&str>, &str) {
        let text = text
            .strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"))
            .unwrap_or(text);
        let (host, path) = text.find('/').map_or((text, ""), |at| text.split_at(at));
        match host.rsplit_once(':') {
            Some((host, port)) => (host, Some(port), path),
            None => (host, None, path),
        }
    }
    let ((host, port, path), (image_host, image_port, image_path)) = (split(glob), split(image));
    let (parts, image_parts) = (host.split('.'), image_host.split('.'));
    port == image_port
        && image_path.starts_with(path)
        && parts.clone().count() == image_parts.clone().count()
        && parts.zip(image_parts).all(|(glob, part)| {
            let glob = GlobBuilder::new(glob).literal_separator(true).build();
            glob.is_ok_and(|glob| glob.compile_matcher().is_match(part))
        })
}

/// A duration as Go writes it: `1h30m`, `90s`, `1.5h`, `0`.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    if rest.is_empty() || rest.len() > 64 {
        return None;
    }
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(end);
        let number: f64 = number.parse().ok()?;
        let end = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let unit = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        seconds += number * unit;
        rest = after;
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, path::Path};

    use proptest::prelude::*;

    use super::*;

    fn plugin(dir: &Path, name: &str, script: &str) {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    const CONFIG: &str = r#"
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: of-test
    matchImages: ["*.dkr.ecr.*.amazonaws.com", "r.io/team"]
    defaultCacheDuration: "12h"
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args: [get, credentials]
    env:
      - name: EXTRA
        value: x
"#;

    fn place(registry: &str, repository: &str) -> Place {
        Place {
            registry: registry.into(),
            repository: repository.into(),
        }
    }

    fn providers(dir: &Path, config: &str) -> Providers {
        let file = dir.join("config.yaml");
        std::fs::write(&file, config).unwrap();
        Providers::new(&OciConfig {
            credential_provider_config: Some(file),
            credential_provider_bin_dir: Some(dir.to_owned()),
            ..OciConfig::default()
        })
        .unwrap()
    }

    fn login(found: Result<Option<(Credential, String)>, String>) -> Option<String> {
        match found.unwrap()?.0 {
            Credential::Password { user, password } => {
                Some(format!("{}:{}", user.expose(), password.expose()))
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_corpus() {
        crate::corpus::replay("corpus/provider", |input| {
            if let Ok(config) = parse(input) {
                for provider in config.providers {
                    for glob in provider.match_images {
                        matches_image(&glob, "r.io/a/b");
                    }
                    provider.default_cache_duration.as_deref().map(duration);
                }
            }
            if let Ok(answer) = serde_json::from_slice::<Response>(input) {
                answer.cache_duration.as_deref().map(duration);
                for glob in answer.auth.unwrap_or_default().keys() {
                    matches_image(glob, "r.io/a/b");
                }
            }
        });
    }

    #[test]
    fn a_plugin_is_asked_and_remembered_as_it_says() {
        let dir = tempfile::tempdir().unwrap();
        let providers = providers(dir.path(), CONFIG);
        let log = dir.path().join("log");
        plugin(
            dir.path(),
            "of-test",
            &format!(
                r#"echo "$@ $EXTRA $(cat)" >> {log}
echo '{{"kind": "CredentialProviderResponse", "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
"cacheKeyType": "Registry", "cacheDuration": "1h", "auth": {{
"r.io": {{"username": "all", "password": "p"}},
"r.io/team/app": {{"username": "app", "password": "hunter2"}}}}}}'"#,
                log = log.display()
            ),
        );
        let find = |registry: &str, repository: &str, afresh| {
            login(providers.find(&place(registry, repository), afresh))
        };
        assert_eq!(find("r.io", "other", false), None);
        assert_eq!(find("r.io", "team/x", false).unwrap(), "all:p");
        assert_eq!(find("r.io", "team/app", false).unwrap(), "app:hunter2");
        let asked = || std::fs::read_to_string(&log).unwrap();
        assert_eq!(
            asked(),
            "get credentials x {\"kind\":\"CredentialProviderRequest\",\"apiVersion\":\
             \"credentialprovider.kubelet.k8s.io/v1\",\"image\":\"r.io/team/x\"}\n"
        );
        assert_eq!(find("r.io", "team/x", true).unwrap(), "all:p");
        assert_eq!(
            asked().lines().count(),
            2,
            "what was refused is asked for anew"
        );
        assert!(!format!("{providers:?}").contains("hunter2"));
    }

    #[test]
    fn what_a_plugin_does_wrong_is_said_without_its_words() {
        let dir = tempfile::tempdir().unwrap();
        let providers = providers(dir.path(), CONFIG);
        let find = || {
            providers
                .find(&place("r.io", "team/x"), false)
                .err()
                .unwrap()
        };
        assert!(find().contains("is not there"));
        for (script, word) in [
            ("echo hunter2; exit 1", "failed"),
            ("echo hunter2", "CredentialProviderResponse"),
            (
                r#"echo '{"kind": "hunter2", "auth": {}}'"#,
                "CredentialProviderResponse",
            ),
            (
                r#"echo '{"kind": "CredentialProviderResponse", "cacheDuration": "soon"}'"#,
                "duration",
            ),
        ] {
            plugin(dir.path(), "of-test", script);
            let error = find();
            assert!(error.contains(word) && error.contains("of-test"), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        plugin(
            dir.path(),
            "of-test",
            r#"echo '{"kind": "CredentialProviderResponse", "auth": null}'"#,
        );
        assert!(
            providers
                .find(&place("r.io", "team/x"), false)
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn configurations() {
        let json = r#"{"apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig",
            "providers": [{"name": "a", "matchImages": ["*.x.io"], "defaultCacheDuration": "0s",
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1beta1", "args": null}]}"#;
        assert_eq!(parse(json.as_bytes()).unwrap().providers[0].name, "a");
        assert_eq!(
            parse(CONFIG.as_bytes()).unwrap().providers[0]
                .match_images
                .len(),
            2
        );
        for bad in [
            "",
            "providers: 3",
            "providers:\n  - nam: hunter2",
            "{",
            "a: &a [*a]",
        ] {
            let error = parse(bad.as_bytes()).unwrap_err();
            assert!(error.contains("CredentialProviderConfig") && !error.contains("hunter2"));
        }
        let dir = tempfile::tempdir().unwrap();
        for name in ["../x", "a/b", "", ".."] {
            let config = format!("providers: [{{name: '{name}', matchImages: [r.io]}}]");
            let providers = providers(dir.path(), &config);
            let error = providers.find(&place("r.io", "x"), false).unwrap_err();
            assert!(error.contains("plain file name"), "{error}");
        }
    }

    #[test]
    fn images_match_as_for_the_kubelet() {
        for (glob, image, fits) in [
            (
                "*.dkr.ecr.*.amazonaws.com",
                "1.dkr.ecr.eu-1.amazonaws.com/a/b",
                true,
            ),
            (
                "*.dkr.ecr.*.amazonaws.com",
                "1.dkr.ecr.amazonaws.com/a",
                false,
            ),
            ("*.io", "r.io/a", true),
            ("*.io", "a.r.io/a", false),
            ("r.io", "r.io:5000/a", false),
            ("r.io:5000", "r.io:5000/a", true),
            ("r.io/team", "r.io/team/a", true),
            ("r.io/team", "r.io/other", false),
            ("https://r.io", "r.io/a", true),
            ("sub*.r.io", "sub1.r.io/a", true),
            ("[", "r/a", false),
        ] {
            assert_eq!(matches_image(glob, image), fits, "{glob} {image}");
        }
    }

    #[test]
    fn durations_as_go_writes_them() {
        for (text, seconds) in [
            ("0", Some(0.0)),
            ("0s", Some(0.0)),
            ("12h", Some(43_200.0)),
            ("1h30m", Some(5400.0)),
            ("1.5m", Some(90.0)),
            ("250ms", Some(0.25)),
            ("", None),
            ("3", None),
            ("-1s", None),
            ("1d", None),
            ("s", None),
            ("1.2.3s", None),
        ] {
            assert_eq!(duration(text).map(|d| d.as_secs_f64()), seconds, "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in r"[-+0-9.hmsnuµ]{0,12}", glob in r"[a-z*.?\[\]:/{}]{0,16}", image in r"[a-z.:/]{0,16}") {
            duration(&text);
            matches_image(&glob, &image);
            let _ = parse(text.as_bytes());
        }
    }
}
