//! Requests and their answers.

use std::{collections::BTreeMap, convert::Infallible};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::{Method, Request, Response, body::Incoming, header::HeaderValue};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};

use super::{Asked, Fake, Key};

pub(super) type Body = UnsyncBoxBody<Bytes, std::io::Error>;
pub(super) type Query = BTreeMap<String, String>;

/// An answer that is no success.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) code: u16,
    reason: &'static str,
    message: String,
    pub(super) causes: Vec<Value>,
    pub(super) retry_after: Option<u32>,
}

impl Failure {
    pub(super) fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            causes: Vec::new(),
            retry_after: None,
        }
    }

    pub(super) fn not_found(path: &Path) -> Self {
        let resource = match path.group.as_str() {
            "" => path.resource.clone(),
            group => format!("{}.{group}", path.resource),
        };
        let message = format!("{resource} {:?} not found", path.name);
        Self::new(404, "NotFound", message)
    }

    pub(super) fn gone(version: u64, oldest: u64) -> Self {
        let message = format!("too old resource version: {version} ({oldest})");
        Self::new(410, "Expired", message)
    }

    pub(super) fn too_large(version: u64, current: u64) -> Self {
        let message =
            format!("Timeout: Too large resource version: {version}, current: {current}");
        let cause = json!({
            "reason": "ResourceVersionTooLarge", "message": "Too large resource version"
        });
        Self {
            causes: vec![cause],
            retry_after: Some(1),
            ..Self::new(504, "Timeout", message)
        }
    }

    pub(super) fn no_progress() -> Self {
        let message = "Internal error occurred: RequestWatchProgress is disabled";
        Self::new(500, "InternalError", message)
    }

    pub(super) fn status(&self) -> Value {
        let mut details = json!({});
        if !self.causes.is_empty() {
            details["causes"] = json!(self.causes);
        }
        if let Some(seconds) = self.retry_after {
            details["retryAfterSeconds"] = json!(seconds);
        }
        json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "details": details, "code": self.code,
        })
    }

    pub(super) fn response(&self) -> Response<Body> {
        let mut response = answer(self.code, &self.status());
        if let Some(seconds) = self.retry_after {
            let seconds = HeaderValue::from(seconds);
            response.headers_mut().insert("retry-after", seconds);
        }
        response
    }
}

/// What a URL means.
pub(super) struct Path {
    pub(super) group: String,
    version: String,
    pub(super) namespace: String,
    pub(super) resource: String,
    pub(super) name: String,
    pub(super) subresource: String,
}

impl Path {
    fn parse(path: &str) -> Option<Self> {
        let decode = |part: &str| {
            let decoded = percent_encoding::percent_decode_str(part).decode_utf8();
            decoded.unwrap().into_owned()
        };
        let parts = path.split('/').filter(|p| !p.is_empty()).map(decode);
        let parts: Vec<String> = parts.collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let (group, version, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return None,
        };
        let (namespace, rest) = match rest {
            // `namespaces/x` is an object itself.
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
            rest => ("", rest),
        };
        let part = |at: usize| rest.get(at).copied().unwrap_or_default().to_owned();
        (1..=3).contains(&rest.len()).then(|| Self {
            group: group.to_owned(),
            version: version.to_owned(),
            namespace: namespace.to_owned(),
            resource: part(0),
            name: part(1),
            subresource: part(2),
        })
    }

    pub(super) fn key(&self) -> Key {
        Key::new(&self.group, &self.resource, &self.namespace, &self.name)
    }

    pub(super) fn api_version(&self) -> String {
        match self.group.as_str() {
            "" => self.version.clone(),
            group => format!("{group}/{}", self.version),
        }
    }

    pub(super) fn holds(&self, key: &Key) -> bool {
        key.resource.0 == self.group
            && key.resource.1 == self.resource
            && (self.namespace.is_empty() || key.namespace == self.namespace)
    }
}

fn answer(code: u16, value: &Value) -> Response<Body> {
    let body = Full::new(Bytes::from(serde_json::to_vec(value).unwrap()));
    json_response(code, body.map_err(|never| match never {}).boxed_unsync())
}

pub(super) fn json_response(code: u16, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = hyper::StatusCode::from_u16(code).unwrap();
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert("content-type", json);
    response
}

impl Fake {
    pub(super) fn connection(&self, stream: tokio::net::TcpStream) {
        let fake = self.clone();
        let mut cut = self.cut.subscribe();
        stream.set_nodelay(true).unwrap();
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request| {
                let fake = fake.clone();
                async move { Ok::<_, Infallible>(fake.answer(request).await) }
            });
            let serve = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = serve => {}
                _ = cut.changed() => {}
            }
        });
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let Ok(body) = body.collect().await else {
            return Failure::new(400, "BadRequest", "the body was broken off").response();
        };
        let body = body.to_bytes();
        let Some(path) = Path::parse(head.uri.path()) else {
            let version = json!({"major": "1", "minor": "33", "gitVersion": "v1.33.0"});
            return answer(200, &version);
        };
        let query = head.uri.query().unwrap_or_default();
        let query: Query = url::form_urlencoded::parse(query.as_bytes())
            .into_owned()
            .collect();
        let is_watch = query.get("watch").is_some_and(|w| w == "true" || w == "1");
        let verb = match (&head.method, path.name.is_empty()) {
            (&Method::GET, true) if is_watch => "watch",
            (&Method::GET, true) => "list",
            (&Method::GET, false) => "get",
            (&Method::POST, _) => "create",
            (&Method::PUT, _) => "update",
            (&Method::PATCH, _) => "patch",
            (&Method::DELETE, true) => "deletecollection",
            (&Method::DELETE, false) => "delete",
            _ => return Failure::new(405, "MethodNotAllowed", "no such method").response(),
        };
        let resource = match path.subresource.as_str() {
            "" => path.resource.clone(),
            sub => format!("{}/{sub}", path.resource),
        };
        let (latency, refusal) = {
            let mut state = self.state.lock();
            state.bytes_in += body.len() as u64;
            let refusal = state.refusal(verb, &resource);
            state.asked.push(Asked {
                verb,
                group: path.group.clone(),
                resource,
                namespace: path.namespace.clone(),
                name: path.name.clone(),
                query: query.clone(),
            });
            (state.faults.latency, refusal)
        };
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
        if let Some(failure) = refusal {
            return failure.response();
        }
        let content = head.headers.get("content-type");
        let content = content.and_then(|v| v.to_str().ok()).unwrap_or_default();
        let done = match verb {
            "watch" => match self.watch(path, &query) {
                Ok(response) => return response,
                Err(failure) => Err(failure),
            },
            "list" => self.state.lock().list(&path, &query),
            "get" => {
                let found = self.get(&path.key());
                found.ok_or_else(|| Failure::not_found(&path))
            }
            _ => {
                let mut state = self.state.lock();
                let done = state.change(verb, &path, &query, content, &body);
                self.tell(&state);
                done
            }
        };
        let response = match done {
            Ok(value) if verb == "create" => answer(201, &value),
            Ok(value) => answer(200, &value),
            Err(failure) => failure.response(),
        };
        let size = hyper::body::Body::size_hint(response.body()).exact();
        self.state.lock().bytes_out += size.unwrap_or_default();
        response
    }
}
