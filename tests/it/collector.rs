//! A collector of spans on the loopback: OTLP over HTTP, decoded by OpenTelemetry's own messages.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
};
use prost::Message as _;

/// What becomes of what it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Takes,
    /// Answers with this status.
    Refuses(u16),
    /// Answers nothing.
    Hangs,
}

/// A span as it came.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) trace: String,
    pub(crate) id: String,
    /// Empty where it has none.
    pub(crate) parent: String,
    /// 1 internal, 2 server.
    pub(crate) kind: i32,
    /// 0 unset, 2 error.
    pub(crate) status: i32,
    pub(crate) message: String,
    pub(crate) attributes: BTreeMap<String, String>,
    /// Names in order, with the time of each.
    pub(crate) events: Vec<(String, u64)>,
    /// Nanoseconds.
    pub(crate) began: u64,
    pub(crate) ended: u64,
    /// Of the process.
    pub(crate) resource: BTreeMap<String, String>,
}

impl Found {
    pub(crate) fn get(&self, key: &str) -> &str {
        let found = self.attributes.get(key);
        found.unwrap_or_else(|| panic!("no {key}: {self:?}"))
    }
}

#[derive(Default)]
struct State {
    mode: Option<Mode>,
    spans: Vec<Found>,
    /// Heads of requests.
    heads: Vec<String>,
}

/// The collector; its threads end with the test's process.
#[derive(Clone)]
pub(crate) struct Collector {
    pub(crate) port: u16,
    state: Arc<Mutex<State>>,
}

impl Collector {
    pub(crate) fn start(mode: Mode) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let collector = Self {
            port: listener.local_addr().unwrap().port(),
            state: Arc::default(),
        };
        collector.now(mode);
        let serving = collector.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let serving = serving.clone();
                std::thread::spawn(move || serving.serve(stream.unwrap()));
            }
        });
        collector
    }

    pub(crate) fn now(&self, mode: Mode) {
        self.state.lock().unwrap().mode = Some(mode);
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(crate) fn spans(&self) -> Vec<Found> {
        self.state.lock().unwrap().spans.clone()
    }

    /// First lines and headers of what was asked.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.state.lock().unwrap().heads.clone()
    }

    /// The first span of this name that `is` so; waits for it.
    pub(crate) fn wait(&self, name: &str, is: impl Fn(&Found) -> bool) -> Found {
        let begun = Instant::now();
        loop {
            let spans = self.spans();
            let mut named = spans.iter().filter(|span| span.name == name);
            if let Some(span) = named.find(|span| is(span)) {
                return span.clone();
            }
            assert!(
                begun.elapsed() < Duration::from_secs(120),
                "{name}: {spans:#?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn serve(&self, mut stream: TcpStream) {
        let mut bytes = Vec::new();
        let mut piece = [0; 65536];
        loop {
            let end = bytes.windows(4).position(|w| w == b"\r\n\r\n");
            if let Some(end) = end.map(|at| at + 4) {
                let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
                let mut lines = head.lines().filter_map(|line| line.split_once(": "));
                let length = lines.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
                let length: usize = length.unwrap().1.parse().unwrap();
                if bytes.len() >= end + length {
                    let body = bytes[end..end + length].to_vec();
                    bytes.drain(..end + length);
                    if !self.take(head, &body, &mut stream) {
                        return;
                    }
                    continue;
                }
            }
            match stream.read(&mut piece) {
                Ok(0) | Err(_) => return,
                Ok(count) => bytes.extend_from_slice(&piece[..count]),
            }
        }
    }

    fn take(&self, head: String, body: &[u8], stream: &mut TcpStream) -> bool {
        let mode = {
            let mut state = self.state.lock().unwrap();
            state.heads.push(head);
            if state.mode == Some(Mode::Takes) {
                let request = ExportTraceServiceRequest::decode(body).unwrap();
                state.spans.extend(found(request));
            }
            state.mode.unwrap()
        };
        let answer = match mode {
            Mode::Takes => "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_owned(),
            Mode::Refuses(status) => format!("HTTP/1.1 {status} No\r\ncontent-length: 0\r\n\r\n"),
            Mode::Hangs => {
                std::thread::sleep(Duration::from_secs(120));
                return false;
            }
        };
        stream.write_all(answer.as_bytes()).is_ok()
    }
}

fn found(request: ExportTraceServiceRequest) -> Vec<Found> {
    let mut all = Vec::new();
    for process in request.resource_spans {
        let resource = attributes(process.resource.unwrap().attributes);
        for span in process
            .scope_spans
            .into_iter()
            .flat_map(|scope| scope.spans)
        {
            let status = span.status.unwrap_or_default();
            let events = span.events.into_iter();
            all.push(Found {
                name: span.name,
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                kind: span.kind,
                status: status.code,
                message: status.message,
                attributes: attributes(span.attributes),
                events: events
                    .map(|event| (event.name, event.time_unix_nano))
                    .collect(),
                began: span.start_time_unix_nano,
                ended: span.end_time_unix_nano,
                resource: resource.clone(),
            });
        }
    }
    all
}

fn attributes(list: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |pair: KeyValue| {
        let value = match pair.value.unwrap().value.unwrap() {
            Value::StringValue(text) => text,
            Value::IntValue(number) => number.to_string(),
            Value::BoolValue(flag) => flag.to_string(),
            other => panic!("{}: {other:?}", pair.key),
        };
        (pair.key, value)
    };
    list.into_iter().map(text).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
