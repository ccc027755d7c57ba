//! Where the Hub is and what opens it: the settings of `huggingface_hub`, read from an environment
//! that the caller gives.

use std::path::PathBuf;

use url::Url;
use zeroize::Zeroizing;

use crate::{
    reference::Secret,
    source::{Config, SourceError, SourceErrorKind as Kind},
};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// The settings.
#[derive(Debug)]
pub(super) struct Settings {
    /// Without a slash at its end; may have a path.
    pub(super) endpoint: Url,
    /// Whether no request may be made.
    pub(super) offline: bool,
}

/// An environment: a variable's value, `None` where it is unset or empty.
pub(super) type Env<'a> = &'a (dyn Fn(&str) -> Option<String> + Send + Sync);

/// The environment of this process.
pub(super) fn process_env(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

impl Settings {
    /// `config`, else `HF_ENDPOINT` and `HF_HUB_OFFLINE` (or `TRANSFORMERS_OFFLINE`).
    ///
    /// # Errors
    /// An endpoint that is no URL, or holds credentials.
    pub(super) fn read(config: &Config, env: Env<'_>) -> Result<Self, SourceError> {
        let (name, text) = match (&config.hub_endpoint, env("HF_ENDPOINT")) {
            (Some(text), _) => ("source.hub_endpoint", text.clone()),
            (None, Some(text)) => ("HF_ENDPOINT", text),
            (None, None) => ("default", DEFAULT_ENDPOINT.to_owned()),
        };
        // The text is not shown: it may hold what it should not.
        let invalid = |why| SourceError::new(Kind::Invalid, name, why);
        let expected = "expected the url of a Hub, such as https://huggingface.co";
        let endpoint =
            Url::parse(text.trim().trim_end_matches('/')).map_err(|_| invalid(expected))?;
        if !matches!(endpoint.scheme(), "http" | "https") || endpoint.query().is_some() {
            return Err(invalid(expected));
        }
        if !endpoint.username().is_empty() || endpoint.password().is_some() {
            let error = invalid("must not hold a user name or password");
            return Err(error.with_hint("put the token into HF_TOKEN"));
        }
        let offline = is_on(env, "HF_HUB_OFFLINE") || is_on(env, "TRANSFORMERS_OFFLINE");
        Ok(Self { endpoint, offline })
    }
}

/// The token: of the file that `config` names, else of `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN`, the
/// file `HF_TOKEN_PATH`, or `$HF_HOME/token`; none where `HF_HUB_DISABLE_IMPLICIT_TOKEN` is set and
/// `config` names no file. Read anew at each call, since files are rotated.
///
/// # Errors
/// A file that `config` names and that cannot be read.
pub(super) fn token(config: &Config, env: Env<'_>) -> Result<Option<Secret>, SourceError> {
    let clean = |text: String| {
        let text = Zeroizing::new(text);
        let text: String = text.chars().filter(|c| !matches!(c, '\r' | '\n')).collect();
        let text = text.trim();
        (!text.is_empty()).then(|| Secret::new(text))
    };
    if let Some(path) = &config.hub_token_file {
        let text = std::fs::read_to_string(path).map_err(|error| {
            let what = format!("source.hub_token_file {}", path.display());
            SourceError::new(Kind::Invalid, what, error.to_string())
        })?;
        return Ok(clean(text));
    }
    if is_on(env, "HF_HUB_DISABLE_IMPLICIT_TOKEN") {
        return Ok(None);
    }
    let of_env = env("HF_TOKEN").or_else(|| env("HUGGING_FACE_HUB_TOKEN"));
    if let Some(token) = of_env.and_then(clean) {
        return Ok(Some(token));
    }
    let path = env("HF_TOKEN_PATH")
        .map(|path| expand(&path, env))
        .or_else(|| {
            let home = env("HF_HOME").map(|path| expand(&path, env)).or_else(|| {
                let cache = env("XDG_CACHE_HOME").map(PathBuf::from);
                let cache = cache.or_else(|| Some(PathBuf::from(env("HOME")?).join(".cache")));
                Some(cache?.join("huggingface"))
            });
            Some(home?.join("token"))
        });
    // Nobody need have logged in: a file that is not there is no error.
    Ok(path
        .and_then(|path| std::fs::read_to_string(path).ok())
        .and_then(clean))
}

fn expand(path: &str, env: Env<'_>) -> PathBuf {
    match (path.strip_prefix("~/"), env("HOME")) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => PathBuf::from(path),
    }
}

/// As `huggingface_hub` reads switches.
fn is_on(env: Env<'_>, name: &str) -> bool {
    let value = env(name).unwrap_or_default().to_ascii_uppercase();
    matches!(value.as_str(), "1" | "ON" | "YES" | "TRUE")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> + Send + Sync + use<> {
        let pairs: Vec<(String, String)> = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        move |name| {
            pairs
                .iter()
                .find(|(k, _)| k == name)
                .map(|(_, v)| v.clone())
        }
    }

    fn endpoint(pairs: &[(&str, &str)]) -> Result<String, String> {
        Settings::read(&Config::default(), &env(pairs))
            .map(|s| s.endpoint.to_string())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn endpoints() {
        assert_eq!(endpoint(&[]).unwrap(), "https://huggingface.co/");
        let mirror = [("HF_ENDPOINT", "https://mirror/api/hf/")];
        assert_eq!(endpoint(&mirror).unwrap(), "https://mirror/api/hf");
        for bad in [
            "mirror",
            "ftp://x",
            "https://u:geheim@h",
            "https://h?token=geheim",
        ] {
            let error = endpoint(&[("HF_ENDPOINT", bad)]).unwrap_err();
            assert!(error.starts_with("HF_ENDPOINT: "), "{error}");
            assert!(!error.contains("geheim"), "{error}");
        }
        let offline = |value| {
            let env = env(&[("HF_HUB_OFFLINE", value)]);
            Settings::read(&Config::default(), &env).unwrap().offline
        };
        assert!(offline("1") && offline("true") && !offline("0"));
    }

    #[test]
    fn tokens() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        let hf = dir.path().join(".cache/huggingface");
        std::fs::create_dir_all(&hf).unwrap();
        std::fs::write(hf.join("token"), "from-home\n").unwrap();
        std::fs::write(dir.path().join("t"), " from-path \r\n").unwrap();
        std::fs::write(dir.path().join("empty"), "\n").unwrap();
        let path = format!("{home}/t");
        let get = |pairs: &[(&str, &str)]| {
            token(&Config::default(), &env(pairs))
                .unwrap()
                .map(|t| t.expose().to_owned())
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(get(&[]), None);
        assert_eq!(get(&[("HOME", home)]), some("from-home"));
        assert_eq!(
            get(&[("HOME", home), ("HF_TOKEN_PATH", &path)]),
            some("from-path")
        );
        assert_eq!(
            get(&[("HOME", home), ("HF_TOKEN_PATH", "~/t")]),
            some("from-path")
        );
        assert_eq!(get(&[("HF_HOME", home)]), None);
        assert_eq!(get(&[("HUGGING_FACE_HUB_TOKEN", "old")]), some("old"));
        let both = [("HF_TOKEN", "new\n"), ("HUGGING_FACE_HUB_TOKEN", "old")];
        assert_eq!(get(&both), some("new"));
        let disabled = [("HF_TOKEN", "x"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")];
        assert_eq!(get(&disabled), None);
        let named = |name: &str| {
            let config = Config {
                hub_token_file: Some(dir.path().join(name)),
                ..Config::default()
            };
            token(&config, &env(&disabled)).map(|t| t.map(|t| t.expose().to_owned()))
        };
        assert_eq!(named("t").unwrap(), some("from-path"));
        assert_eq!(named("empty").unwrap(), None);
        assert!(
            named("none")
                .unwrap_err()
                .to_string()
                .contains("hub_token_file")
        );
    }
}
