//! A scripted HTTP/1.1 server on loopback: answers whatever a closure says, byte by byte, and
//! remembers what it was asked.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        let found = headers.find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    pub(crate) fn path(&self) -> &str {
        self.target.split('?').next().unwrap()
    }

    /// The range asked for, its end excluded.
    pub(crate) fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self
            .header("range")?
            .strip_prefix("bytes=")?
            .split_once('-')?;
        Some((first.parse().ok()?, last.parse::<usize>().ok()? + 1))
    }
}

/// What happens once the bytes of a reply are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// The connection lives on.
    Next,
    /// It is closed in order.
    Close,
    /// It is torn down with a TCP reset.
    Reset,
    /// Nothing more comes, nor is it closed.
    Stall,
    /// The last bytes again and again.
    Repeat,
}

/// The bytes of an answer.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    head: Vec<u8>,
    body: Vec<u8>,
    then: Then,
}

impl Reply {
    /// `head` lines without the status line's version, joined by newlines; no length is added.
    pub(crate) fn raw(head: &str, body: impl Into<Vec<u8>>) -> Self {
        let head = format!("HTTP/1.1 {}\r\n\r\n", head.trim().replace('\n', "\r\n"));
        Self {
            head: head.into_bytes(),
            body: body.into(),
            then: Then::Next,
        }
    }

    /// As `raw`, with the length of `body`.
    pub(crate) fn new(head: &str, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self::raw(&format!("{head}\ncontent-length: {}", body.len()), body)
    }

    /// `data` under `etag`, as a good server gives it: HEAD, ranges, `If-Match`.
    pub(crate) fn good(seen: &Seen, data: &[u8], etag: &str) -> Self {
        let size = data.len();
        let common = format!(
            "etag: {etag}\nlast-modified: Sat, 21 Nov 2026 10:00:00 GMT\naccept-ranges: bytes"
        );
        if seen.header("if-match").is_some_and(|wanted| wanted != etag) {
            return Self::new("412 Precondition Failed", "");
        }
        if seen.method == "HEAD" {
            return Self::raw(&format!("200 OK\n{common}\ncontent-length: {size}"), "");
        }
        match seen.range() {
            None => Self::new(&format!("200 OK\n{common}"), data),
            Some((start, _)) if start >= size => Self::new(
                &format!("416 Range Not Satisfiable\ncontent-range: bytes */{size}"),
                "",
            ),
            Some((start, end)) => {
                let end = end.min(size);
                let range = format!("content-range: bytes {start}-{}/{size}", end - 1);
                let head = format!("206 Partial Content\n{common}\n{range}");
                Self::new(&head, &data[start..end])
            }
        }
    }

    /// No byte at all, and no end.
    pub(crate) fn silence() -> Self {
        Self {
            head: Vec::new(),
            body: Vec::new(),
            then: Then::Stall,
        }
    }

    /// These bytes, then the end.
    pub(crate) fn bytes(bytes: &[u8]) -> Self {
        Self {
            head: bytes.to_vec(),
            body: Vec::new(),
            then: Then::Close,
        }
    }

    pub(crate) fn then(mut self, then: Then) -> Self {
        self.then = then;
        self
    }
}

type Script = dyn Fn(&Seen) -> Reply + Send + Sync;

/// The server; it ends with the test's runtime.
#[derive(Clone)]
pub(crate) struct Scripted {
    pub(crate) address: SocketAddr,
    script: Arc<Mutex<Arc<Script>>>,
    log: Arc<Mutex<Vec<Seen>>>,
}

impl Scripted {
    pub(crate) async fn start(script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            script: Arc::new(Mutex::new(Arc::new(script))),
            log: Arc::default(),
        };
        let accepting = server.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let server = accepting.clone();
                tokio::spawn(async move { server.serve(stream).await });
            }
        });
        server
    }

    /// Changes what is answered from now on.
    pub(crate) fn now(&self, script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) {
        *self.script.lock().unwrap() = Arc::new(script);
    }

    /// What was asked since the last call.
    pub(crate) fn take_log(&self) -> Vec<Seen> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    pub(crate) fn url(&self, target: &str) -> String {
        format!("http://{}{target}", self.address)
    }

    async fn serve(&self, mut stream: TcpStream) {
        stream.set_nodelay(true).unwrap();
        let mut buffer = Vec::new();
        while let Some(seen) = request(&mut stream, &mut buffer).await {
            let script = Arc::clone(&self.script.lock().unwrap());
            let reply = script(&seen);
            self.log.lock().unwrap().push(seen);
            let sent = async {
                stream.write_all(&reply.head).await?;
                stream.write_all(&reply.body).await?;
                stream.flush().await
            };
            if sent.await.is_err() {
                return;
            }
            match reply.then {
                Then::Next => {}
                Then::Close => return,
                Then::Reset => {
                    // Lets the client read what came before; the reset would discard it.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    stream.set_zero_linger().unwrap();
                    return;
                }
                Then::Stall => {
                    tokio::time::sleep(Duration::from_secs(60)).await;
                    return;
                }
                Then::Repeat => while stream.write_all(&reply.body).await.is_ok() {},
            }
        }
    }
}

async fn request(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<Seen> {
    let end = loop {
        if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head: Vec<u8> = buffer.drain(..end).collect();
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.trim_end().split("\r\n");
    let mut first = lines.next()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect();
    let mut seen = Seen {
        method,
        target,
        headers,
        body: Vec::new(),
    };
    let length = seen
        .header("content-length")
        .map_or(0, |n| n.parse().unwrap());
    while buffer.len() < length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    seen.body = buffer.drain(..length).collect();
    Some(seen)
}
