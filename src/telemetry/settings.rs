//! Where spans go, and which: the environment, as OpenTelemetry specifies it, before the configuration.
//!
//! Sources: opentelemetry.io, "OpenTelemetry Environment Variable Specification" and "OpenTelemetry Protocol Exporter".

use std::{path::PathBuf, time::Duration};

use opentelemetry_sdk::trace::Sampler;
use serde::{Deserialize, Serialize};
use url::Url;

/// Below the base of a collector's URLs.
const PATH: &str = "v1/traces";
/// How long the collector may take, unless the environment says otherwise.
const PATIENCE: Duration = Duration::from_secs(10);
/// More cannot be asked for.
const LONGEST_PATIENCE: Duration = Duration::from_secs(60);

/// Settings: `[trace]`. What the `OTEL_*` variables of the environment say goes before it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The collector (OTLP over HTTP), such as `http://127.0.0.1:4318`: the URL to which `/v1/traces` is added. Without
    /// one no spans are made. No credentials: they go in `OTEL_EXPORTER_OTLP_HEADERS`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Which part of the traces that begin here is exported, from 0 to 1.
    pub sample_ratio: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            endpoint: None,
            sample_ratio: 1.0,
        }
    }
}

impl Config {
    /// Whether it can be used.
    ///
    /// # Errors
    /// What is wrong, without quoting what may be a secret.
    pub fn check(&self) -> Result<(), TelemetryError> {
        let wrong = |message| {
            Err(TelemetryError::new(
                TelemetryErrorKind::Configuration,
                message,
            ))
        };
        if !(0.0..=1.0).contains(&self.sample_ratio) {
            return wrong("trace.sample_ratio is not between 0 and 1");
        }
        let Some(text) = &self.endpoint else {
            return Ok(());
        };
        let Some(url) = http_url(text) else {
            return wrong("trace.endpoint is no http:// or https:// URL");
        };
        let has_secret = !url.username().is_empty() || url.password().is_some();
        if has_secret || url.query().is_some() || url.fragment().is_some() {
            return wrong(
                "trace.endpoint is more than an address: credentials go in OTEL_EXPORTER_OTLP_HEADERS, in the \
                 environment",
            );
        }
        Ok(())
    }
}

/// Why no spans are exported though that is asked for. Shows no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct TelemetryError {
    kind: TelemetryErrorKind,
    message: String,
}

/// What a [`TelemetryError`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TelemetryErrorKind {
    /// The section `[trace]` of the configuration is wrong.
    Configuration,
    /// The environment asks for what cannot be.
    Environment,
    /// The system refuses what is needed for it.
    System,
}

impl TelemetryError {
    pub(super) fn new(kind: TelemetryErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// What it is about.
    pub const fn kind(&self) -> TelemetryErrorKind {
        self.kind
    }
}

/// What is to be exported, and where. Not `Debug`: the URL may hold a secret.
pub(super) struct Plan {
    pub(super) url: Url,
    /// For one batch, with all that is tried.
    pub(super) patience: Duration,
    pub(super) sampler: Sampler,
    /// PEM: authorities that are trusted besides the system's.
    pub(super) authorities: Option<PathBuf>,
    /// What the environment says and is not understood.
    pub(super) ignored: Option<String>,
}

/// What `config` and the variables of the environment come to; `None` where nothing is to be exported.
///
/// # Errors
/// The environment asks for a way of exporting that is not here.
pub(super) fn plan(
    config: &Config,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<Plan>, TelemetryError> {
    let wrong = |message: String| TelemetryError::new(TelemetryErrorKind::Environment, message);
    // An empty one counts as none.
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let either = |what: &str| {
        let names = [
            format!("OTEL_EXPORTER_OTLP_TRACES_{what}"),
            format!("OTEL_EXPORTER_OTLP_{what}"),
        ];
        names
            .into_iter()
            .find_map(|name| Some((variable(&name)?, name)))
    };
    if variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return Ok(None);
    }
    let url = match either("ENDPOINT") {
        Some((text, name)) => {
            // Not shown: it may hold a secret.
            let url = http_url(&text);
            let url = url.ok_or_else(|| wrong(format!("{name} is no http:// or https:// URL")))?;
            match name.contains("TRACES") {
                true => url,
                false => traces_of(url),
            }
        }
        None => {
            config.check()?;
            match config.endpoint.as_deref().and_then(http_url) {
                Some(url) => traces_of(url),
                None => return Ok(None),
            }
        }
    };
    match variable("OTEL_TRACES_EXPORTER").as_deref() {
        None | Some("otlp") => {}
        Some("none") => return Ok(None),
        Some(_) => {
            return Err(wrong(
                "OTEL_TRACES_EXPORTER asks for another exporter: otlp is the only one".into(),
            ));
        }
    }
    if let Some((protocol, name)) = either("PROTOCOL")
        && protocol != "http/protobuf"
    {
        return Err(wrong(format!(
            "{name} asks for another protocol: http/protobuf is the only one, which collectors speak on port 4318"
        )));
    }
    let patience = either("TIMEOUT").and_then(|(millis, _)| millis.parse().ok());
    let patience = patience
        .filter(|millis| *millis > 0)
        .map_or(PATIENCE, Duration::from_millis);
    let named = variable("OTEL_TRACES_SAMPLER");
    let argument = variable("OTEL_TRACES_SAMPLER_ARG");
    let by_environment = named
        .as_deref()
        .map(|name| sampler(name, argument.as_deref()));
    let by_config =
        || Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.sample_ratio)));
    let (sampler, ignored) = match by_environment {
        None => (by_config(), None),
        Some(Some(sampler)) => (sampler, None),
        Some(None) => {
            let ignored = "OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG are not understood: they are ignored";
            (by_config(), Some(ignored.to_owned()))
        }
    };
    Ok(Some(Plan {
        url,
        patience: patience.min(LONGEST_PATIENCE),
        sampler,
        authorities: either("CERTIFICATE").map(|(path, _)| path.into()),
        ignored,
    }))
}

fn http_url(text: &str) -> Option<Url> {
    let url = Url::parse(text.trim()).ok()?;
    (matches!(url.scheme(), "http" | "https") && url.has_host()).then_some(url)
}

/// Where traces go at the collector whose URLs begin with `base`.
fn traces_of(mut base: Url) -> Url {
    let path = format!("{}/{PATH}", base.path().trim_end_matches('/'));
    base.set_path(&path);
    base
}

/// A sampler as OpenTelemetry names it; `None` where that is none.
fn sampler(name: &str, argument: Option<&str>) -> Option<Sampler> {
    let ratio = || {
        let ratio = argument.map_or(Some(1.0), |ratio| ratio.trim().parse().ok())?;
        (0.0..=1.0)
            .contains(&ratio)
            .then_some(Sampler::TraceIdRatioBased(ratio))
    };
    let below = |root| Some(Sampler::ParentBased(Box::new(root)));
    match name {
        "always_on" => Some(Sampler::AlwaysOn),
        "always_off" => Some(Sampler::AlwaysOff),
        "traceidratio" => ratio(),
        "parentbased_always_on" => below(Sampler::AlwaysOn),
        "parentbased_always_off" => below(Sampler::AlwaysOff),
        "parentbased_traceidratio" => below(ratio()?),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        toml::from_str(text).unwrap()
    }

    fn planned(
        config: &Config,
        environment: &[(&str, &str)],
    ) -> Result<Option<Plan>, TelemetryError> {
        plan(config, |name| {
            let found = environment.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    /// The URL and the sampler.
    fn found(config: &Config, environment: &[(&str, &str)]) -> (String, String) {
        let plan = planned(config, environment).unwrap().unwrap();
        (plan.url.to_string(), format!("{:?}", plan.sampler))
    }

    const BASE: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://b:4318/x/");
    const TRACES: (&str, &str) = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://t/all");

    #[test]
    fn the_environment_goes_before_the_configuration() {
        let none = Config::default();
        assert!(planned(&none, &[]).unwrap().is_none());
        let set = config("endpoint = 'http://c:4318'\nsample_ratio = 0.5");
        let half = "ParentBased(TraceIdRatioBased(0.5))";
        let of = |url: &str, sampler: &str| (url.to_owned(), sampler.to_owned());
        assert_eq!(found(&set, &[]), of("http://c:4318/v1/traces", half));
        assert_eq!(found(&set, &[BASE]), of("http://b:4318/x/v1/traces", half));
        assert_eq!(found(&set, &[BASE, TRACES]).0, "https://t/all");
        assert_eq!(found(&none, &[TRACES]).0, "https://t/all");
        let sampler = |name, argument| {
            found(
                &set,
                &[
                    ("OTEL_TRACES_SAMPLER", name),
                    ("OTEL_TRACES_SAMPLER_ARG", argument),
                ],
            )
            .1
        };
        assert_eq!(sampler("always_off", ""), "AlwaysOff");
        assert_eq!(sampler("traceidratio", "0.25"), "TraceIdRatioBased(0.25)");
        assert_eq!(
            sampler("parentbased_traceidratio", ""),
            "ParentBased(TraceIdRatioBased(1.0))"
        );
        for (name, argument) in [("xray", ""), ("traceidratio", "7"), ("traceidratio", "x")] {
            assert_eq!(sampler(name, argument), half, "{name} {argument}");
            let environment = [
                ("OTEL_TRACES_SAMPLER", name),
                ("OTEL_TRACES_SAMPLER_ARG", argument),
            ];
            assert!(
                planned(&set, &environment)
                    .unwrap()
                    .unwrap()
                    .ignored
                    .is_some()
            );
        }
        let patience = |millis| {
            let plan = planned(&set, &[("OTEL_EXPORTER_OTLP_TIMEOUT", millis)]);
            plan.unwrap().unwrap().patience.as_millis()
        };
        assert_eq!(
            (patience("250"), patience("x"), patience("0")),
            (250, 10_000, 10_000)
        );
        assert_eq!(patience("99999999"), 60_000);
    }

    #[test]
    fn it_can_be_turned_off_and_what_cannot_be_is_said() {
        for off in [
            ("OTEL_SDK_DISABLED", "True"),
            ("OTEL_TRACES_EXPORTER", "none"),
        ] {
            assert!(
                planned(&Config::default(), &[BASE, off]).unwrap().is_none(),
                "{off:?}"
            );
        }
        for wrong in [
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            (
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
                "hunter2@collector:4318",
            ),
        ] {
            let Err(error) = planned(&Config::default(), &[BASE, wrong]) else {
                panic!("{wrong:?}");
            };
            assert_eq!(error.kind(), TelemetryErrorKind::Environment);
            let text = error.to_string();
            assert!(
                text.contains(wrong.0) && !text.contains("hunter2"),
                "{text}"
            );
        }
        assert!(
            found(&Config::default(), &[BASE, ("OTEL_SDK_DISABLED", "no")])
                .0
                .starts_with("http://b")
        );
    }

    #[test]
    fn mistakes_of_the_configuration_are_errors_and_show_no_secret() {
        for wrong in [
            "endpoint = 'collector:4318'",
            "endpoint = 'grpc://collector:4317'",
            "endpoint = 'http://u:hunter2@collector:4318'",
            "endpoint = 'http://collector:4318/?key=hunter2'",
            "sample_ratio = 1.5",
            "sample_ratio = nan",
        ] {
            let error = config(wrong).check().unwrap_err().to_string();
            assert!(
                error.starts_with("trace.") && !error.contains("hunter2"),
                "{error}"
            );
        }
        assert!(toml::from_str::<Config>("headers = 'x'").is_err());
        assert_eq!(config("sample_ratio = 1"), Config::default());
        assert_eq!(config("").check(), Ok(()));
    }
}
