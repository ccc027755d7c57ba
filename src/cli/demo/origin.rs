//! The origin of the demo: an HTTP server with byte ranges over a throttled link.

use std::{
    convert::Infallible,
    net::SocketAddr,
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Frame, Incoming},
    header,
    service::service_fn,
};
use parking_lot::Mutex;
use tokio::net::TcpListener;

use crate::mirror::parse_range;

/// Bytes sent at once.
const PIECE: u64 = 64 << 10;

type Body = BoxBody<Bytes, std::io::Error>;

/// A running origin; stops when dropped.
pub(super) struct Origin {
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

struct Link {
    root: PathBuf,
    bytes_per_second: u64,
    latency: Duration,
    /// When the link has sent all that was put on it.
    busy_until: Mutex<Instant>,
}

impl Origin {
    /// Serves the files below `root` on a free loopback port; all connections share the link.
    pub(super) async fn start(
        root: &Path,
        bytes_per_second: u64,
        latency: Duration,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let link = Arc::new(Link {
            root: root.to_owned(),
            bytes_per_second: bytes_per_second.max(1),
            latency,
            busy_until: Mutex::new(Instant::now()),
        });
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let link = Arc::clone(&link);
                connections.spawn(async move {
                    let service = service_fn(move |request| answer(Arc::clone(&link), request));
                    let io = hyper_util::rt::TokioIo::new(stream);
                    // A client that goes away is no error here.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(io, service)
                        .await;
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self { address, task })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(link: Arc<Link>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    tokio::time::sleep(link.latency).await;
    let done = respond(&link, &request);
    Ok(done.unwrap_or_else(|_| {
        let mut response = Response::new(empty());
        *response.status_mut() = StatusCode::NOT_FOUND;
        response
    }))
}

fn respond(link: &Arc<Link>, request: &Request<Incoming>) -> std::io::Result<Response<Body>> {
    let name = request.uri().path().trim_start_matches('/');
    let relative = Path::new(name);
    if !relative
        .components()
        .all(|c| matches!(c, Component::Normal(_)))
    {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    let path = link.root.join(relative);
    if name.ends_with('/') {
        let mut page = String::new();
        for entry in std::fs::read_dir(path)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            page.push_str(&format!("<a href=\"{name}\">{name}</a>\n"));
        }
        let mut response = Response::new(Full::from(page).map_err(|e| match e {}).boxed());
        set(&mut response, header::CONTENT_TYPE, "text/html");
        return Ok(response);
    }
    let file = std::fs::File::open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    let size = meta.len();
    let asked = request
        .headers()
        .get(header::RANGE)
        .and_then(|r| parse_range(r.to_str().ok()?, size).ok()?);
    let range = asked.clone().unwrap_or(0..size);
    let body = if request.method() == Method::HEAD {
        empty()
    } else {
        throttled(Arc::clone(link), Arc::new(file), range.clone())
    };
    let mut response = Response::new(body);
    if asked.is_some() {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let text = format!("bytes {}-{}/{size}", range.start, range.end - 1);
        set(&mut response, header::CONTENT_RANGE, &text);
    }
    set(
        &mut response,
        header::CONTENT_LENGTH,
        &(range.end - range.start).to_string(),
    );
    set(&mut response, header::ACCEPT_RANGES, "bytes");
    set(&mut response, header::ETAG, &format!("\"{size:x}\""));
    Ok(response)
}

fn throttled(link: Arc<Link>, file: Arc<std::fs::File>, range: std::ops::Range<u64>) -> Body {
    let pieces = stream::try_unfold(range.start, move |at| {
        let (link, file, end) = (Arc::clone(&link), Arc::clone(&file), range.end);
        async move {
            if at >= end {
                return Ok(None);
            }
            let length = PIECE.min(end - at);
            link.send(length).await;
            let read = tokio::task::spawn_blocking(move || {
                use std::os::unix::fs::FileExt as _;
                let mut data = vec![0; length as usize];
                file.read_exact_at(&mut data, at).map(|()| data)
            });
            let data = read.await.map_err(std::io::Error::other)??;
            Ok(Some((Frame::data(Bytes::from(data)), at + length)))
        }
    });
    StreamBody::new(pieces).boxed()
}

impl Link {
    /// Waits for a place on the link.
    async fn send(&self, bytes: u64) {
        let until = {
            let mut busy = self.busy_until.lock();
            let time = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
            *busy = (*busy).max(Instant::now()) + time;
            *busy
        };
        tokio::time::sleep_until(until.into()).await;
    }
}

fn empty() -> Body {
    Full::default().map_err(|e| match e {}).boxed()
}

fn set(response: &mut Response<Body>, name: header::HeaderName, value: &str) {
    if let Ok(value) = value.parse() {
        response.headers_mut().insert(name, value);
    }
}
