//! A TCP proxy before a real server, which spoils what passes when told to. It knows just enough of
//! HTTP/1.1 to tell content (requests with a range) from the rest.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// What happens to one request for content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Spoil {
    /// The connection is reset after so many bytes of the body.
    Reset(usize),
    /// Nothing more comes after so many bytes of the body, until the client hangs up.
    Stall(usize),
    /// The connection is closed in order after so many bytes of the body.
    Truncate(usize),
    /// A bit of the body is wrong, at this byte.
    Corrupt(usize),
    /// So many bytes arrive each 10 ms.
    Slow(usize),
    /// This status line and these headers, without asking the server.
    Answer(&'static str),
    /// Closed without an answer.
    Hang,
}

#[derive(Debug, Default)]
struct State {
    /// For the next requests for content, in order.
    spoils: Mutex<VecDeque<Spoil>>,
    spoiled: AtomicUsize,
    /// What is spoiled is any request, until all of them were.
    any: AtomicBool,
    /// No connection is served, and those that are open are reset.
    down: AtomicBool,
    /// How much more of what is large may pass; all of it where nothing is said.
    room: Mutex<Option<usize>>,
    /// How much of what is large has passed.
    passed: AtomicU64,
    /// Connections that are served.
    served: AtomicUsize,
    /// Everything is refused.
    denied: AtomicBool,
    /// Content is redirected to a signed place; the number of the signature that is good.
    signed: AtomicU64,
    refused: AtomicUsize,
}

/// The proxy; its threads end with the test's process.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    state: Arc<State>,
}

impl Proxy {
    /// Before a server on a port of this machine.
    pub(crate) fn before(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let own = listener.local_addr().unwrap().port();
        let state = Arc::<State>::default();
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), state) = (client, Arc::clone(&shared)) else {
                    continue;
                };
                state.served.fetch_add(1, SeqCst);
                thread::spawn(move || {
                    // Who hangs up in the middle is no news.
                    drop(serve(client, port, &state));
                    state.served.fetch_sub(1, SeqCst);
                });
            }
        });
        Self { port: own, state }
    }

    /// Spoils the next requests for content.
    pub(crate) fn spoil(&self, spoils: impl IntoIterator<Item = Spoil>) {
        self.state.spoils.lock().unwrap().extend(spoils);
    }

    /// Spoils the next requests, whatever they are for.
    pub(crate) fn spoil_any(&self, spoils: impl IntoIterator<Item = Spoil>) {
        self.state.any.store(true, SeqCst);
        self.spoil(spoils);
    }

    /// How many requests were spoiled; none is waiting to be.
    pub(crate) fn spoiled(&self) -> usize {
        assert_eq!(*self.state.spoils.lock().unwrap(), []);
        self.state.spoiled.load(SeqCst)
    }

    /// Whether nobody is there.
    pub(crate) fn set_down(&self, down: bool) {
        self.state.down.store(down, SeqCst);
    }

    /// Content of what is large, not of JSON, passes up to so many bytes from now on, then waits. A server that is
    /// merely slow (nginx sends as much as it may in a second at once) is no such thing.
    pub(crate) fn hold_after(&self, bytes: usize) {
        *self.state.room.lock().unwrap() = Some(bytes);
    }

    /// All content passes again.
    pub(crate) fn release(&self) {
        *self.state.room.lock().unwrap() = None;
    }

    /// Whether content of what is large waits.
    pub(crate) fn set_held(&self, held: bool) {
        match held {
            true => self.hold_after(0),
            false => self.release(),
        }
    }

    /// How many bytes of content of what is large were passed on.
    pub(crate) fn passed(&self) -> u64 {
        self.state.passed.load(SeqCst)
    }

    /// Waits until it serves nobody: all who have asked have hung up, as those who have ended do.
    pub(crate) fn settle(&self) {
        let begun = Instant::now();
        while self.state.served.load(SeqCst) > 0 {
            assert!(begun.elapsed() < Duration::from_secs(120), "still asked");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether credentials are taken for expired.
    pub(crate) fn set_denied(&self, denied: bool) {
        self.state.denied.store(denied, SeqCst);
    }

    /// Redirects content to signed places from now on; those signed before are no good.
    pub(crate) fn sign_anew(&self) {
        self.state.signed.fetch_add(1, SeqCst);
    }

    /// Requests that came with a signature that had expired.
    pub(crate) fn refused(&self) -> usize {
        self.state.refused.load(SeqCst)
    }
}

fn reset(stream: &TcpStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    use std::os::fd::AsRawFd as _;
    // SAFETY: the descriptor is open, and the pointer and length are those of a linger.
    unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as libc::socklen_t,
        );
    }
}

/// Reads up to the end of a head; what follows stays in `buffer`.
fn head(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<Option<String>> {
    loop {
        if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            let rest = buffer.split_off(at + 4);
            let head = std::mem::replace(buffer, rest);
            return Ok(Some(String::from_utf8(head).unwrap()));
        }
        let mut more = [0; 16 << 10];
        match stream.read(&mut more)? {
            0 => return Ok(None),
            n => buffer.extend_from_slice(&more[..n]),
        }
    }
}

fn header<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    let mut lines = head.lines().filter_map(|line| line.split_once(':'));
    let found = lines.find(|(key, _)| key.eq_ignore_ascii_case(name));
    found.map(|(_, value)| value.trim())
}

fn serve(mut client: TcpStream, port: u16, state: &State) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut asked = Vec::new();
    let mut server: Option<TcpStream> = None;
    loop {
        if state.down.load(SeqCst) {
            reset(&client);
            return Ok(());
        }
        let Some(mut request) = head(&mut client, &mut asked)? else {
            return Ok(());
        };
        if state.down.load(SeqCst) {
            reset(&client);
            return Ok(());
        }
        if state.denied.load(SeqCst) {
            answer(&mut client, "403 Forbidden")?;
            continue;
        }
        let content = request.starts_with("GET ") && header(&request, "range").is_some();
        let path = request.split([' ', '?']).nth(1).unwrap_or_default();
        let large = content && !path.ends_with(".json");
        let mut spoil = None;
        if content {
            let good = state.signed.load(SeqCst);
            let target = request.split(' ').nth(1).unwrap().to_owned();
            match target.split_once("?signed=") {
                None if good > 0 => {
                    // Another origin, as the places are that registries and hubs sign.
                    let own = client.local_addr()?.port();
                    let location = format!("http://localhost:{own}{target}?signed={good}");
                    answer(&mut client, &format!("302 Found\nlocation: {location}"))?;
                    continue;
                }
                Some((plain, signature)) => {
                    if signature != good.to_string() {
                        state.refused.fetch_add(1, SeqCst);
                        answer(&mut client, "403 Forbidden")?;
                        continue;
                    }
                    request = request.replacen(&target, plain, 1);
                }
                None => {}
            }
        }
        if content || state.any.load(SeqCst) {
            let mut spoils = state.spoils.lock().unwrap();
            spoil = spoils.pop_front();
            state
                .spoiled
                .fetch_add(usize::from(spoil.is_some()), SeqCst);
            if spoils.is_empty() {
                state.any.store(false, SeqCst);
            }
        }
        if !content {
            // Then the end of a body without a length is the end of the connection.
            request.truncate(request.len() - 2);
            request += "Connection: close\r\n\r\n";
        }
        match &spoil {
            Some(Spoil::Answer(text)) => {
                answer(&mut client, text)?;
                continue;
            }
            Some(Spoil::Hang) => return Ok(()),
            _ => {}
        }
        let upstream = match &mut server {
            Some(server) => server,
            none => {
                let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
                none.insert(TcpStream::connect(address)?)
            }
        };
        upstream.write_all(request.as_bytes())?;
        let body = header(&request, "content-length").map_or(0, |n| n.parse().unwrap());
        copy(
            &mut client,
            &mut asked,
            upstream,
            body,
            state,
            (None, false),
        )?;
        let mut answered = Vec::new();
        let Some(reply) = head(upstream, &mut answered)? else {
            return Ok(());
        };
        client.write_all(reply.as_bytes())?;
        let none =
            request.starts_with("HEAD ") || reply.contains(" 304 ") || reply.contains(" 204 ");
        let length = match header(&reply, "content-length") {
            _ if none => Some(0),
            length => length.map(|n| n.parse::<usize>().unwrap()),
        };
        let whole = copy(
            upstream,
            &mut answered,
            &mut client,
            length.unwrap_or(usize::MAX),
            state,
            (spoil, large),
        )?;
        if !whole || !content {
            let _ = client.shutdown(Shutdown::Both);
            return Ok(());
        }
    }
}

fn answer(client: &mut TcpStream, text: &str) -> io::Result<()> {
    let text = text.replace('\n', "\r\n");
    client.write_all(format!("HTTP/1.1 {text}\r\ncontent-length: 0\r\n\r\n").as_bytes())
}

/// Takes some of what may pass, at most `most` bytes, and waits until there is some; none where the client hangs up,
/// or nobody is to be there any more.
fn take_room(state: &State, most: usize, client: &TcpStream) -> io::Result<usize> {
    use std::os::fd::AsFd as _;
    let hangs_up = PollFlags::from_bits_retain(libc::POLLRDHUP);
    loop {
        match &mut *state.room.lock().unwrap() {
            None => return Ok(most),
            Some(room) if *room > 0 => {
                let n = most.min(*room);
                *room -= n;
                return Ok(n);
            }
            Some(_) => {}
        }
        let mut gone = [PollFd::new(client.as_fd(), hangs_up)];
        if poll(&mut gone, PollTimeout::from(5_u8))? > 0 || state.down.load(SeqCst) {
            return Ok(0);
        }
    }
}

/// Gives back what was not needed.
fn give_room(state: &State, bytes: usize) {
    if let Some(room) = &mut *state.room.lock().unwrap() {
        *room += bytes;
    }
}

/// Passes `length` bytes on, of which `ready` were read already; false where that is the end. They are spoiled, and
/// they are of something large.
fn copy(
    from: &mut TcpStream,
    ready: &mut Vec<u8>,
    to: &mut TcpStream,
    length: usize,
    state: &State,
    (spoil, large): (Option<Spoil>, bool),
) -> io::Result<bool> {
    let mut passed = 0;
    let cut = match spoil {
        Some(Spoil::Reset(n) | Spoil::Stall(n) | Spoil::Truncate(n)) => n.min(length),
        _ => length,
    };
    let mut buffer = vec![0; 64 << 10];
    while passed < cut {
        let piece = match spoil {
            Some(Spoil::Slow(n)) => n,
            _ => buffer.len(),
        };
        let mut want = piece.min(cut - passed);
        if large {
            want = take_room(state, want, to)?;
        }
        let n = if want == 0 {
            0
        } else if ready.is_empty() {
            from.read(&mut buffer[..want])?
        } else {
            let n = want.min(ready.len());
            buffer[..n].copy_from_slice(&ready[..n]);
            ready.drain(..n);
            n
        };
        if large && n < want {
            give_room(state, want - n);
        }
        if n == 0 {
            if state.down.load(SeqCst) {
                reset(to);
            }
            return Ok(false);
        }
        if let Some(Spoil::Corrupt(at)) = spoil
            && (passed..passed + n).contains(&at)
        {
            buffer[at - passed] ^= 1;
        }
        if state.down.load(SeqCst) {
            reset(to);
            return Ok(false);
        }
        to.write_all(&buffer[..n])?;
        passed += n;
        if large {
            state.passed.fetch_add(n as u64, SeqCst);
        }
        if let Some(Spoil::Slow(_)) = spoil {
            thread::sleep(Duration::from_millis(10));
        }
    }
    match spoil {
        Some(Spoil::Reset(_)) => {
            // Lets the client read what came before; the reset would discard it.
            thread::sleep(Duration::from_millis(50));
            reset(to);
            Ok(false)
        }
        Some(Spoil::Stall(_)) => {
            let _ = to.set_read_timeout(Some(Duration::from_secs(120)));
            let _ = to.read(&mut [0]);
            Ok(false)
        }
        Some(Spoil::Truncate(_)) => Ok(false),
        _ => Ok(true),
    }
}
