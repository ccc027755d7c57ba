//! The way of spans to the collector: a bounded queue, a thread that sends batches, and what is said when that fails.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{AcqRel, Relaxed},
        },
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use opentelemetry::{KeyValue, trace::TracerProvider as _};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response, ResponseBodyTooLarge};
use opentelemetry_otlp::{WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    resource::{EnvResourceDetector, TelemetryResourceDetector},
    trace::{
        BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider, Span, SpanData, SpanExporter,
        SpanProcessor,
    },
};
use parking_lot::Mutex;
use tracing_subscriber::{Layer, filter::Targets, registry::LookupSpan};

use super::{
    TARGET,
    settings::{Config, Plan, TelemetryError, TelemetryErrorKind, plan},
};
use crate::metrics;

/// Spans that wait for the thread; more are dropped.
const QUEUE: usize = 2048;
/// How long the last spans may take at the end of the process.
const FAREWELL: Duration = Duration::from_secs(2);
/// What is read of an answer, in bytes.
const MAX_ANSWER: usize = 64 << 10;
/// That spans are lost is said at most so often.
const WARN_EVERY: Duration = Duration::from_secs(3600);

/// Exports spans as long as the process lives.
pub struct Traces {
    provider: SdkTracerProvider,
    collector: Arc<Collector>,
}

/// The collector, as it does.
#[derive(Debug)]
struct Collector {
    /// Host and port.
    host: String,
    /// Spans in the queue.
    waiting: AtomicUsize,
    /// Whether it did not take what it was sent last.
    fails: AtomicBool,
    warned: Mutex<Option<Instant>>,
    /// Why it could not be reached.
    why: Mutex<Option<String>>,
}

impl Traces {
    /// Begins, where the environment or `config` says so; `about` is what the collector is told of this process. What
    /// is wrong and can be ignored is for `note`.
    ///
    /// # Errors
    /// It is asked for in a way that is not here, or the system refuses a thread; there are no spans then.
    pub fn start(
        config: &Config,
        about: &[(&'static str, String)],
        mut note: impl FnMut(String),
    ) -> Result<Option<Self>, TelemetryError> {
        let Some(plan) = plan(config, |name| std::env::var(name).ok())? else {
            return Ok(None);
        };
        plan.ignored.iter().cloned().for_each(&mut note);
        let refused = |why: String| TelemetryError::new(TelemetryErrorKind::System, why);
        let collector = Arc::new(Collector {
            host: host_of(&plan.url),
            waiting: AtomicUsize::new(0),
            fails: AtomicBool::new(false),
            warned: Mutex::default(),
            why: Mutex::default(),
        });
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .with_http_client(Client::new(&plan, Arc::clone(&collector))?)
            .with_endpoint(plan.url.as_str())
            .with_timeout(plan.patience)
            .build()
            // It may quote the URL.
            .map_err(|_| refused("the exporter does not take this address".into()))?;
        let exporter = Exporter {
            inner: exporter,
            collector: Arc::clone(&collector),
        };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE)
            .build();
        let batches = BatchSpanProcessor::builder(exporter).with_batch_config(batches);
        let provider = SdkTracerProvider::builder()
            .with_sampler(plan.sampler)
            .with_resource(resource(about))
            .with_span_processor(Queue {
                inner: batches.build(),
                collector: Arc::clone(&collector),
            })
            .build();
        Ok(Some(Self {
            provider,
            collector,
        }))
    }

    /// What makes spans of those of `tracing`.
    pub fn layer<S>(&self) -> impl Layer<S> + Send + Sync + use<S>
    where
        S: tracing::Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer("hearth"))
            .with_context_activation(false)
            .with_tracked_inactivity(false)
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_filter(Targets::new().with_target(TARGET, tracing::Level::INFO))
    }

    /// Sends what waits, within bounds. What ends after it is lost.
    pub fn end(self) {
        if self.provider.shutdown_with_timeout(FAREWELL).is_err() {
            let collector = &self.collector.host;
            tracing::warn!(collector, "the last spans were not taken in time");
        }
    }
}

/// What the collector is told of this process; the environment goes before it.
fn resource(about: &[(&'static str, String)]) -> Resource {
    let about = about.iter();
    let about = about.map(|(key, value)| KeyValue::new(*key, value.clone()));
    let resource = Resource::builder_empty()
        .with_service_name("hearth")
        .with_attribute(KeyValue::new("service.version", env!("HEARTH_VERSION")))
        .with_attribute(KeyValue::new("process.pid", i64::from(std::process::id())))
        .with_attributes(about)
        .with_detectors(&[
            Box::new(TelemetryResourceDetector),
            Box::new(EnvResourceDetector::new()),
        ]);
    match std::env::var("OTEL_SERVICE_NAME") {
        Ok(name) if !name.is_empty() => resource.with_service_name(name).build(),
        _ => resource.build(),
    }
}

fn host_of(url: &url::Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let port = url.port_or_known_default();
    port.map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// Takes what is ended, as long as there is room. The queue of what is behind it has as much room, and drops nothing
/// without a word.
#[derive(Debug)]
struct Queue {
    inner: BatchSpanProcessor,
    collector: Arc<Collector>,
}

impl SpanProcessor for Queue {
    fn on_start(&self, span: &mut Span, context: &opentelemetry::Context) {
        self.inner.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        let waiting = &self.collector.waiting;
        if waiting.fetch_add(1, AcqRel) < QUEUE {
            return self.inner.on_end(span);
        }
        waiting.fetch_sub(1, AcqRel);
        metrics::global().telemetry_dropped_full.add(1);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// Sends batches, and counts what became of them.
#[derive(Debug)]
struct Exporter {
    inner: opentelemetry_otlp::SpanExporter,
    collector: Arc<Collector>,
}

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        self.collector.waiting.fetch_sub(spans, AcqRel);
        let done = self.inner.export(batch).await;
        match &done {
            Ok(()) => {
                metrics::global().telemetry_exported.add(spans as u64);
                self.collector.takes();
            }
            Err(error) => {
                metrics::global()
                    .telemetry_dropped_refused
                    .add(spans as u64);
                self.collector.refuses(&error.to_string());
            }
        }
        done
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl Collector {
    fn takes(&self) {
        if self.fails.swap(false, Relaxed) {
            tracing::info!(collector = self.host, "spans are taken again");
        }
    }

    fn refuses(&self, error: &str) {
        let why = self.why.lock().take();
        let error = why.as_deref().unwrap_or(error);
        if self.fails.swap(true, Relaxed) {
            return;
        }
        let mut warned = self.warned.lock();
        if warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            *warned = Some(Instant::now());
            let collector = &self.host;
            tracing::warn!(
                collector,
                error,
                "spans are not taken: they are dropped until they are"
            );
        }
    }
}

/// Asks the collector, on the thread of the batches: a client that waits with nobody else.
struct Client {
    client: reqwest::Client,
    /// `None` once it is dropped.
    runtime: Option<tokio::runtime::Runtime>,
    collector: Arc<Collector>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

impl Client {
    fn new(plan: &Plan, collector: Arc<Collector>) -> Result<Self, TelemetryError> {
        let refused = |why: String| TelemetryError::new(TelemetryErrorKind::System, why);
        // An error means that the process has chosen one already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = reqwest::Client::builder()
            .http1_only()
            // What is sent may be for this host alone.
            .redirect(reqwest::redirect::Policy::none())
            .timeout(plan.patience)
            // Its thread serves no connection between batches.
            .pool_max_idle_per_host(0);
        if let Some(path) = &plan.authorities {
            let what = format!("the certificates of the collector, {},", path.display());
            let wrong = |why: String| {
                let message = format!("{what} cannot be used: {why}");
                TelemetryError::new(TelemetryErrorKind::Environment, message)
            };
            let pem = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
            let found = reqwest::Certificate::from_pem_bundle(&pem);
            let found = found.map_err(|error| wrong(root_cause(&error)))?;
            if found.is_empty() {
                return Err(wrong("no PEM certificate is in there".into()));
            }
            builder = builder.tls_certs_merge(found);
        } else if plan.url.scheme() == "http" {
            // To read the system's takes longer than to send a batch. A proxy that is asked over TLS is not for this.
            builder = builder.tls_certs_only([]);
        }
        let client = builder.build();
        let client = client.map_err(|error| refused(root_cause(&error.without_url())))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        Ok(Self {
            client,
            runtime: Some(runtime.map_err(|error| refused(error.to_string()))?),
            collector,
        })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // A name may still be looked up, which cannot be broken off.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, mut request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let headers = request.headers_mut().values_mut();
        headers.for_each(|value| value.set_sensitive(true));
        let Some(runtime) = &self.runtime else {
            return Err("it has ended".into());
        };
        let answer = runtime.block_on(async {
            let mut answer = self.client.execute(request.try_into()?).await?;
            let mut body = Vec::new();
            while let Some(piece) = answer.chunk().await? {
                body.extend_from_slice(&piece);
                if body.len() > MAX_ANSWER {
                    return Ok(None);
                }
            }
            let mut whole = Response::new(Bytes::from(body));
            *whole.status_mut() = answer.status();
            *whole.headers_mut() = std::mem::take(answer.headers_mut());
            Ok::<_, reqwest::Error>(Some(whole))
        });
        match answer {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(ResponseBodyTooLarge::new().into()),
            Err(error) => {
                let error = error.without_url();
                *self.collector.why.lock() = Some(root_cause(&error));
                Err(error.into())
            }
        }
    }
}

/// What an error comes from.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
