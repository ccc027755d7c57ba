//! Lets clients name a unix socket as they like.
//!
//! HTTP/2 has every request say whom it is for (`:authority`). For a unix socket clients say different things: `localhost`
//! (the kubelet, containerd), nothing, or the path of the socket, as it is or percent-encoded (the C++, Python and Java
//! libraries of gRPC, and older ones in Go), which is no authority (RFC 3986, section 3.2), and which the HTTP/2 library
//! refuses before anybody could look. So what comes from a client passes through here: `:authority` becomes `localhost`,
//! everything else stays. Header blocks have to be decoded for that, since they refer to each other (RFC 7541); they go on
//! as literals (section 6.2.2), which refer to nothing. What is wrong with them ends the connection, as it would there.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BufMut as _, BytesMut};
use loona_hpack::Decoder;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};
use tonic::transport::server::{Connected, UdsConnectInfo};

/// What a client begins with (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes before the payload of a frame (RFC 9113, section 4.1).
const FRAME_HEAD: usize = 9;
/// Longest payload that we send: every peer takes that (RFC 9113, section 4.2).
const MAX_FRAME: usize = 16 << 10;
/// Longest header block, and longest list of headers that it may stand for, in bytes.
const MAX_BLOCK: usize = 64 << 10;
const MAX_HEADERS: usize = 256 << 10;
/// Size of the table of headers that both ends begin with, in bytes (RFC 9113, section 6.5.2); ours asks for no other.
const TABLE: usize = 4096;
/// Bytes read at once.
const READ: usize = 16 << 10;

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 32;

/// A connection of a client, with authorities that everybody understands.
pub(super) struct Named {
    stream: UnixStream,
    rewriter: Rewriter,
}

impl Named {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            rewriter: Rewriter::new(),
        }
    }
}

impl AsyncRead for Named {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { stream, rewriter } = self.get_mut();
        while rewriter.out.is_empty() {
            let mut bytes = [0; READ];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut *stream).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            rewriter.feed(read.filled())?;
        }
        let len = rewriter.out.len().min(buf.remaining());
        buf.put_slice(&rewriter.out[..len]);
        rewriter.out.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Named {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

impl Connected for Named {
    type ConnectInfo = UdsConnectInfo;

    fn connect_info(&self) -> UdsConnectInfo {
        self.stream.connect_info()
    }
}

/// Where in what a client sends we are.
enum State {
    /// Within the preface: so many bytes of it are behind us.
    Preface(usize),
    /// Between frames, or within the head of one.
    Head,
    /// Within a frame that goes on as it is: so many bytes of it are left.
    Pass(usize),
    /// Within the payload of a frame that has a piece of a header block.
    Piece { flags: u8, len: usize, first: bool },
    /// It is no HTTP/2: for others to refuse.
    Other,
}

/// Frames of a client, one after the other.
struct Rewriter {
    state: State,
    /// Bytes that came and are not used: of a head, or of a piece of a header block.
    held: Vec<u8>,
    /// The header block that is under way: whose it is, the flags of its first frame, what came of it.
    block: Option<(u32, u8, Vec<u8>)>,
    stream: u32,
    decoder: Decoder<'static>,
    /// What goes on.
    out: BytesMut,
}

fn bad(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("HTTP/2: {why}"))
}

impl Rewriter {
    fn new() -> Self {
        let mut decoder = Decoder::new();
        decoder.set_max_allowed_table_size(TABLE);
        Self {
            state: State::Preface(0),
            held: Vec::new(),
            block: None,
            stream: 0,
            decoder,
            out: BytesMut::new(),
        }
    }

    /// Takes what came; what goes on is in `out` then.
    fn feed(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match &mut self.state {
                State::Other => {
                    self.out.put_slice(bytes);
                    return Ok(());
                }
                State::Preface(seen) => {
                    let len = bytes.len().min(PREFACE.len() - *seen);
                    let (now, later) = bytes.split_at(len);
                    let is_ours = PREFACE[*seen..].starts_with(now);
                    *seen += len;
                    self.out.put_slice(now);
                    bytes = later;
                    if !is_ours {
                        self.state = State::Other;
                    } else if *seen == PREFACE.len() {
                        self.state = State::Head;
                    }
                }
                State::Head => {
                    let taken = self.hold(&mut bytes, FRAME_HEAD);
                    if taken {
                        self.head()?;
                    }
                }
                State::Pass(left) => {
                    let (now, later) = bytes.split_at(bytes.len().min(*left));
                    self.out.put_slice(now);
                    bytes = later;
                    *left -= now.len();
                    if *left == 0 {
                        self.state = State::Head;
                    }
                }
                &mut State::Piece { flags, len, first } => {
                    if self.hold(&mut bytes, len) {
                        self.piece(flags, first)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Holds bytes until there are `len`; whether there are.
    fn hold(&mut self, bytes: &mut &[u8], len: usize) -> bool {
        let (now, later) = bytes.split_at(bytes.len().min(len - self.held.len()));
        self.held.extend_from_slice(now);
        *bytes = later;
        self.held.len() == len
    }

    fn head(&mut self) -> io::Result<()> {
        let head = std::mem::take(&mut self.held);
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let (kind, flags) = (head[3], head[4]);
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let first = kind == HEADERS;
        let within = self.block.as_ref().map(|(of, ..)| *of);
        match kind {
            HEADERS if within.is_none() => {}
            CONTINUATION if within == Some(stream) => {}
            _ if within.is_some() => return Err(bad("a header block is interrupted")),
            _ => {
                self.out.put_slice(&head);
                self.state = if len == 0 {
                    State::Head
                } else {
                    State::Pass(len)
                };
                return Ok(());
            }
        }
        let so_far = self.block.as_ref().map_or(0, |(.., block)| block.len());
        if len + so_far > MAX_BLOCK {
            return Err(bad("a header block is longer than 64 KiB"));
        }
        self.stream = stream;
        self.state = State::Piece { flags, len, first };
        match len {
            0 => self.piece(flags, first),
            _ => Ok(()),
        }
    }

    /// A frame with a piece of a header block is here.
    fn piece(&mut self, flags: u8, first: bool) -> io::Result<()> {
        let held = std::mem::take(&mut self.held);
        let mut piece = &*held;
        if first && flags & PADDED != 0 {
            let (&padding, rest) = piece.split_first().ok_or_else(|| bad("no padding"))?;
            let len = rest.len().checked_sub(usize::from(padding));
            piece = &rest[..len.ok_or_else(|| bad("more padding than payload"))?];
        }
        if first && flags & PRIORITY != 0 {
            // What it says is obsolete (RFC 9113, section 5.3.2).
            piece = piece.get(5..).ok_or_else(|| bad("no priority"))?;
        }
        let (_, _, block) = self
            .block
            .get_or_insert_with(|| (self.stream, flags, Vec::new()));
        block.extend_from_slice(piece);
        self.state = State::Head;
        if flags & END_HEADERS == 0 {
            return Ok(());
        }
        match self.block.take() {
            Some((stream, flags, block)) => self.rewrite(stream, flags, &block),
            None => Ok(()),
        }
    }

    /// A header block is here.
    fn rewrite(&mut self, stream: u32, flags: u8, block: &[u8]) -> io::Result<()> {
        let mut literals = Vec::with_capacity(block.len() * 2);
        let mut size = 0usize;
        let decoded = self.decoder.decode_with_cb(block, |name, value| {
            size += name.len() + value.len();
            // Of what is too long only its length matters.
            if size <= MAX_HEADERS {
                let value = match &*name {
                    b":authority" => b"localhost",
                    _ => &*value,
                };
                literal(&mut literals, &name, value);
            }
        });
        decoded.map_err(|error| bad(&error.to_string()))?;
        if size > MAX_HEADERS {
            return Err(bad("headers are longer than 256 KiB"));
        }
        let mut pieces = literals.chunks(MAX_FRAME).peekable();
        let mut head = (HEADERS, flags & END_STREAM);
        loop {
            let piece = pieces.next().unwrap_or_default();
            let last = pieces.peek().is_none();
            let flags = head.1 | if last { END_HEADERS } else { 0 };
            self.out.put_uint(piece.len() as u64, 3);
            self.out.put_slice(&[head.0, flags]);
            self.out.put_u32(stream);
            self.out.put_slice(piece);
            if last {
                return Ok(());
            }
            head = (CONTINUATION, 0);
        }
    }
}

/// A header that is in no table, nor comes into one (RFC 7541, section 6.2.2).
fn literal(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.push(0);
    for text in [name, value] {
        // An integer in a prefix of seven bits (section 5.1); the bit before it says that it is no Huffman code.
        let mut len = text.len();
        if len < 0x7f {
            out.push(len as u8);
        } else {
            out.push(0x7f);
            len -= 0x7f;
            while len >= 0x80 {
                out.push(len as u8 | 0x80);
                len >>= 7;
            }
            out.push(len as u8);
        }
        out.extend_from_slice(text);
    }
}

#[cfg(test)]
mod tests {
    use loona_hpack::Encoder;
    use proptest::prelude::*;

    use super::*;

    type Headers = Vec<(Vec<u8>, Vec<u8>)>;
    /// Stream, whether that ends with it, and the headers.
    type List = (u32, bool, Headers);

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_uint(payload.len() as u64, 3);
        out.put_slice(&[kind, flags]);
        out.put_u32(stream);
        out.put_slice(payload);
        out
    }

    fn run(pieces: &[&[u8]]) -> io::Result<Vec<u8>> {
        let mut rewriter = Rewriter::new();
        for piece in pieces {
            rewriter.feed(piece)?;
        }
        Ok(rewriter.out.to_vec())
    }

    /// The header lists and the other frames of what goes on.
    fn read(mut out: &[u8]) -> (Vec<List>, Vec<Vec<u8>>) {
        out = out.strip_prefix(PREFACE).unwrap();
        let (mut lists, mut others) = (Vec::new(), Vec::new());
        let mut block: Option<(u32, bool, Vec<u8>)> = None;
        let mut decoder = Decoder::new();
        while !out.is_empty() {
            let len = u32::from_be_bytes([0, out[0], out[1], out[2]]) as usize;
            assert!(len <= MAX_FRAME || out[3] == 0);
            let (frame, rest) = out.split_at(FRAME_HEAD + len);
            out = rest;
            let stream = u32::from_be_bytes(frame[5..9].try_into().unwrap());
            match frame[3] {
                HEADERS => block = Some((stream, frame[4] & END_STREAM != 0, frame[9..].to_vec())),
                CONTINUATION => block.as_mut().unwrap().2.extend_from_slice(&frame[9..]),
                _ => others.push(frame.to_vec()),
            }
            if matches!(frame[3], HEADERS | CONTINUATION) && frame[4] & END_HEADERS != 0 {
                let (stream, end, block) = block.take().unwrap();
                lists.push((stream, end, decoder.decode(&block).unwrap()));
            }
        }
        (lists, others)
    }

    fn headers(authority: &str) -> Headers {
        [
            (":method", "POST"),
            (":authority", authority),
            (":path", "/csi.v1.Identity/Probe"),
            ("te", "trailers"),
        ]
        .map(|(name, value)| (name.into(), value.into()))
        .into()
    }

    #[test]
    fn sockets_are_localhost() {
        let mut encoder = Encoder::new();
        let mut sent = PREFACE.to_vec();
        sent.extend(frame(4, 0, 0, &[]));
        for (number, authority) in ["/run/a.sock", "%2Frun%2Fa.sock", "/run/a.sock", "localhost"]
            .into_iter()
            .enumerate()
        {
            let list = headers(authority);
            let block = encoder.encode(list.iter().map(|(n, v)| (&**n, &**v)));
            let stream = number as u32 * 2 + 1;
            let flags = END_HEADERS | (END_STREAM * (number % 2) as u8);
            sent.extend(match number {
                // With padding and a priority.
                1 => {
                    let mut payload = vec![3, 0, 0, 0, 0, 9];
                    payload.extend_from_slice(&block);
                    payload.extend_from_slice(&[0; 3]);
                    frame(HEADERS, flags | PADDED | PRIORITY, stream, &payload)
                }
                // In three frames.
                2 => {
                    let mut three = frame(HEADERS, flags & !END_HEADERS, stream, &block[..1]);
                    three.extend(frame(CONTINUATION, 0, stream, &block[1..2]));
                    three.extend(frame(CONTINUATION, END_HEADERS, stream, &block[2..]));
                    three
                }
                _ => frame(HEADERS, flags, stream, &block),
            });
            sent.extend(frame(0, END_STREAM, stream, &[7; 40_000]));
        }
        let (lists, others) = read(&run(&[&sent]).unwrap());
        let expected: Vec<_> = (0..4)
            .map(|n| (n * 2 + 1, n % 2 == 1, headers("localhost")))
            .collect();
        assert_eq!(lists, expected);
        assert_eq!(others.len(), 5);
        // However it is cut.
        let whole = run(&[&sent]).unwrap();
        let bytes: Vec<&[u8]> = sent.chunks(1).collect();
        assert_eq!(run(&bytes).unwrap(), whole);
        let odd: Vec<&[u8]> = sent.chunks(4097).collect();
        assert_eq!(run(&odd).unwrap(), whole);
    }

    #[test]
    fn long_headers_go_on_in_pieces_and_too_long_ones_do_not() {
        let long = vec![b'x'; 50_000];
        let mut block = Vec::new();
        literal(&mut block, b"grpc-tags-bin", &long);
        let mut sent = PREFACE.to_vec();
        for (at, piece) in block.chunks(MAX_FRAME).enumerate() {
            let kind = if at == 0 { HEADERS } else { CONTINUATION };
            let flags = END_HEADERS * u8::from(at == block.len() / MAX_FRAME);
            sent.extend(frame(kind, flags, 1, piece));
        }
        let (lists, _) = read(&run(&[&sent]).unwrap());
        assert_eq!(lists, [(1, false, vec![(b"grpc-tags-bin".to_vec(), long)])]);

        let why = |frames: Vec<u8>| run(&[PREFACE, &frames]).unwrap_err().to_string();
        assert!(why(frame(HEADERS, 0, 1, &vec![0; MAX_BLOCK + 1])).contains("longer than 64"));
        // A header that is in the table, again and again.
        let mut bomb = vec![0x40, 1, b'a', 0x7f, 0x81, 0x1e];
        bomb.extend_from_slice(&[b'b'; 0x7f + 0x01 + (0x1e << 7)]);
        bomb.extend_from_slice(&[0x80 | 62; 10_000]);
        assert!(why(frame(HEADERS, END_HEADERS, 1, &bomb)).contains("longer than 256"));
        let interrupted = [frame(HEADERS, 0, 1, &[]), frame(0, 0, 1, &[])].concat();
        assert!(why(interrupted).contains("interrupted"));
        let padding = frame(HEADERS, END_HEADERS | PADDED, 1, &[200, 0]);
        assert!(why(padding).contains("more padding"));
        assert!(why(frame(HEADERS, END_HEADERS, 1, &[0xff; 9])).contains("HTTP/2"));
    }

    #[test]
    fn what_is_no_http2_goes_on() {
        let other = b"GET / HTTP/1.1\r\n\r\n";
        assert_eq!(run(&[other]).unwrap(), other);
        let almost = b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\nwhatever";
        assert_eq!(run(&[&almost[..19], &almost[19..]]).unwrap(), almost);
    }

    proptest! {
        #[test]
        fn any_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..3000), kinds in any::<bool>()) {
            let mut sent = PREFACE.to_vec();
            match kinds {
                true => bytes.chunks(60).for_each(|c| sent.extend(frame(c[0] % 10, *c.last().unwrap(), 1, c))),
                false => sent.extend_from_slice(&bytes),
            }
            let whole = run(&[&sent]);
            let cut: Vec<&[u8]> = sent.chunks(7).collect();
            let cut = run(&cut);
            prop_assert_eq!(whole.map_err(|e| e.to_string()), cut.map_err(|e| e.to_string()));
        }
    }
}
