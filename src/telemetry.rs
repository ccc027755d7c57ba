//! telemetry: spans, for a collector that speaks OTLP. Imported by any room, imports only `metrics`.
//!
//! A span is one of the `tracing` crate, with the target [`TARGET`], made by `span!`: few, for what somebody waits for
//! (the start of a pod, a warm, a layer, a request of the kubelet or of containerd, a mount that is taken over), and none
//! for a read. Names of attributes are those of OpenTelemetry's semantic conventions where it has one, else `hearth.*`;
//! references are in them as in the log, without secrets. Spans are not in the log, and the log is not in them.
//!
//! Invariants: without a collector a span is a comparison; no thread runs, and nothing is kept. With one, whoever ends a
//! span never waits: it is queued, or dropped and counted. Nothing here survives a crash.

mod export;
mod settings;

use std::{error::Error, time::SystemTime};

use opentelemetry::{
    Context,
    propagation::TextMapPropagator as _,
    trace::{Status, TraceContextExt as _},
};
use opentelemetry_http::{HeaderExtractor, Request};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::{Instrument as _, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

pub use self::{
    export::Traces,
    settings::{Config, TelemetryError, TelemetryErrorKind},
};

/// The target of spans: `HEARTH_LOG` does not turn them on or off.
pub const TARGET: &str = "otlp";

/// Longest attribute, in characters.
const MAX_TEXT: usize = 1024;

/// A span, with attributes as the macros of `tracing` have them; the first word may be `parent: SPAN,`.
macro_rules! span {
    (parent: $parent:expr, $name:literal $($fields:tt)*) => {
        ::tracing::info_span!(target: $crate::telemetry::TARGET, parent: $parent, $name $($fields)*)
    };
    ($name:literal $($fields:tt)*) => {
        ::tracing::info_span!(target: $crate::telemetry::TARGET, $name $($fields)*)
    };
}
pub(crate) use span;

/// Does `work` as `span`. Its error is told there, and what it is about by `about`: one of a few words.
pub(crate) async fn within<T, E: Error>(
    span: Span,
    about: impl FnOnce(&E) -> String,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let done = work.instrument(span.clone()).await;
    if let Err(error) = &done
        && !span.is_disabled()
    {
        fail(&span, about(error), error);
    }
    done
}

/// What `span` stands for has failed.
pub(crate) fn fail(span: &Span, about: String, error: &dyn Error) {
    let mut message = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        message = format!("{message}: {cause}");
        next = cause.source();
    }
    text(span, "error.type", &about);
    span.set_status(Status::error(message));
}

/// Sets an attribute of `span`. What is longer than [`MAX_TEXT`] characters is cut off: clients say some of it.
pub(crate) fn text(span: &Span, key: &'static str, value: &str) {
    if !span.is_disabled() {
        span.set_attribute(key, value.chars().take(MAX_TEXT).collect::<String>());
    }
}

/// Sets an attribute of `span`.
pub(crate) fn flag(span: &Span, key: &'static str, value: bool) {
    span.set_attribute(key, value);
}

/// Sets an attribute of `span` to a number.
pub(crate) fn count(span: &Span, key: &'static str, number: u64) {
    span.set_attribute(key, i64::try_from(number).unwrap_or(i64::MAX));
}

/// Something happened while `span` was open.
pub(crate) fn event(span: &Span, name: &'static str, at: SystemTime) {
    span.add_event_with_timestamp(name, at, Vec::new());
}

/// Requests that have a span: those that change something. Others are asked again and again, by probes and statistics.
const TRACED: [&str; 10] = [
    "csi.v1.Controller/CreateVolume",
    "csi.v1.Controller/DeleteVolume",
    "csi.v1.Node/NodePublishVolume",
    "csi.v1.Node/NodeUnpublishVolume",
    "containerd.services.snapshots.v1.Snapshots/Prepare",
    "containerd.services.snapshots.v1.Snapshots/View",
    "containerd.services.snapshots.v1.Snapshots/Mounts",
    "containerd.services.snapshots.v1.Snapshots/Commit",
    "containerd.services.snapshots.v1.Snapshots/Remove",
    "containerd.services.snapshots.v1.Snapshots/Cleanup",
];

/// The span of a gRPC request, below that of the client where it has one (W3C Trace Context); for
/// `tonic::transport::Server::trace_fn`.
pub(crate) fn rpc(request: &Request<()>) -> Span {
    let path = request.uri().path().trim_start_matches('/');
    let Some(method) = TRACED.into_iter().find(|traced| *traced == path) else {
        return Span::none();
    };
    let span = span!(
        "rpc",
        otel.name = method,
        otel.kind = "server",
        rpc.system.name = "grpc",
        rpc.method = method
    );
    below(&span, request);
    span
}

/// Tells the span that [`rpc`] made how the request is answered. To be called where it is answered.
pub(crate) fn answered<T>(answer: &Result<T, tonic::Status>) {
    use tonic::Code;

    let span = Span::current();
    if span.metadata().is_none_or(|of| of.target() != TARGET) {
        return;
    }
    let code = answer
        .as_ref()
        .map_or_else(tonic::Status::code, |_| Code::Ok);
    let name = screaming(&format!("{code:?}"));
    // Which of them are the server's fault: semantic conventions for gRPC.
    let is_fault = matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    );
    text(&span, "rpc.response.status_code", &name);
    if let (true, Err(status)) = (is_fault, answer) {
        text(&span, "error.type", &name);
        span.set_status(Status::error(status.message().to_owned()));
    }
}

/// Tells the span of an HTTP request that it is answered with `status`.
pub(crate) fn responded(span: &Span, status: u16) {
    count(span, "http.response.status_code", status.into());
    if status >= 500 {
        text(span, "error.type", &status.to_string());
        span.set_status(Status::error(""));
    }
}

/// `NotFound` as `NOT_FOUND`.
fn screaming(name: &str) -> String {
    let mut text = String::new();
    for (at, c) in name.char_indices() {
        if at > 0 && c.is_ascii_uppercase() {
            text.push('_');
        }
        text.push(c.to_ascii_uppercase());
    }
    text
}

/// Puts `span` below that of the client, where it says one.
pub(crate) fn below<T>(span: &Span, request: &Request<T>) {
    if span.is_disabled() {
        return;
    }
    let headers = HeaderExtractor(request.headers());
    let remote = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
    if remote.span().span_context().is_valid() {
        // It has just been made: it can be put anywhere.
        let _ = span.set_parent(remote);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_named_as_elsewhere() {
        let names: Vec<String> = [tonic::Code::Ok, tonic::Code::FailedPrecondition]
            .map(|code| screaming(&format!("{code:?}")))
            .into();
        assert_eq!(names, ["OK", "FAILED_PRECONDITION"]);
    }

    #[test]
    fn without_a_collector_there_is_no_span() {
        let request = Request::builder().uri("/csi.v1.Node/NodePublishVolume");
        let span = rpc(&request.body(()).unwrap());
        assert!(span.is_disabled());
        answered(&Err::<(), _>(tonic::Status::internal("x")));
    }
}
