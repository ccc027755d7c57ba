//! How an agent that starts takes the place of one that runs, while clients and readers go on.
//!
//! The new one connects to the socket of the old one. Each says what it is; the new one looks at what it would
//! have to take over, and asks for it. The old one takes no more requests, finishes those under way, and gives
//! its listening sockets away: who connects meanwhile waits there. Its mounts it goes on serving until the
//! keeper asks for them, one by one, on behalf of the new one; once that serves everything, the old one ends.
//! Where the new one fails before it has said so, it is as if it had never been: the old one begins again.
//!
//! Messages are packets (`socket::packet`), each in its turn.

use std::{
    collections::BTreeMap,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::unix::AsyncFd;

use crate::{
    csi, mount, snapshotter,
    socket::{
        Passed, Sockets,
        packet::{self, Listener, MsgFlags},
    },
    store,
};

/// Of the messages below. Agents hand over to those of exactly this.
const PROTOCOL: u32 = 1;
/// How long the other may take to say what it is.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the old one may take to finish what is under way, and the new one to serve.
const LONG_PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    Hello {
        protocol: u32,
        version: String,
        /// The id of the store.
        store: String,
    },
    /// Give me what you listen on, and let your mounts be taken.
    HandOver,
    /// I serve all of it.
    Serving,
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Welcome {
        version: String,
        process: u32,
        /// The formats of what it leaves to the next.
        states: BTreeMap<String, u32>,
        /// Its mounts outlive it, or it has none.
        kept: bool,
        /// Its network namespace.
        network: u64,
    },
    /// (face, address) of each socket, with the sockets.
    Yours(Vec<(String, String)>),
    Refused(String),
}

/// What the next process has to understand.
fn states() -> BTreeMap<String, u32> {
    let states = [
        ("store", store::FORMAT),
        ("session", mount::FORMAT),
        ("volumes", csi::FORMAT),
        ("snapshots", snapshotter::FORMAT),
    ];
    let named = states.map(|(name, format)| (name.to_owned(), format));
    named.into()
}

/// The network namespace of this process; sockets of another are of no use to it.
fn network() -> u64 {
    std::fs::metadata("/proc/self/ns/net").map_or(0, |meta| meta.ino())
}

/// A connection to the other agent.
#[derive(Debug)]
struct Talk(AsyncFd<OwnedFd>);

impl Talk {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        // SAFETY: what is registered owns its descriptor, and always says the same.
        Ok(Self(unsafe { AsyncFd::register(socket) }?))
    }

    /// Both sides speak in turn, so there is always room for a message.
    fn say(&self, message: &impl Serialize, fds: &[OwnedFd]) -> io::Result<()> {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        packet::send(self.0.as_fd(), message, &fds, MsgFlags::MSG_DONTWAIT)
    }

    /// What the other says; an error where it is gone.
    async fn hear<T: DeserializeOwned>(&self, patience: Duration) -> io::Result<(T, Vec<OwnedFd>)> {
        let heard = async {
            loop {
                let mut ready = self.0.readable().await?;
                let received =
                    ready.try_io(|socket| packet::receive(socket.as_fd(), MsgFlags::MSG_DONTWAIT));
                if let Ok(received) = received {
                    return received?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into());
                }
            }
        };
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        tokio::time::timeout(patience, heard).await.map_err(late)?
    }
}

/// Where the next agent asks.
pub(super) struct Door {
    listener: AsyncFd<Listener>,
    store: String,
    kept: bool,
}

/// An agent that wants to take over.
pub(super) struct Successor {
    talk: Talk,
    pub(super) process: u32,
    pub(super) version: String,
}

impl Door {
    /// Opens it, in place of that of an agent before this one. Must be called within a runtime. `kept`: what
    /// is mounted outlives this process.
    pub(super) fn open(path: &Path, store: &str, kept: bool) -> io::Result<Self> {
        let listener = Listener::replace(path)?;
        listener.set_nonblocking()?;
        // SAFETY: what is registered owns its descriptor, and always says the same.
        let listener = unsafe { AsyncFd::register(listener) }?;
        Ok(Self {
            listener,
            store: store.to_owned(),
            kept,
        })
    }

    /// Waits for an agent that wants to take over, and may.
    pub(super) async fn successor(&self) -> Successor {
        loop {
            let accepted = async {
                loop {
                    let mut ready = self.listener.readable().await?;
                    if let Ok(accepted) = ready.try_io(|listener| listener.get_ref().accept()) {
                        return accepted;
                    }
                }
            };
            let asked = match accepted.await {
                Ok(socket) => self.hear(socket).await,
                Err(error) => Err(error),
            };
            match asked {
                Ok(Some(successor)) => return successor,
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%error, "who asked this agent to hand over was not heard out");
                    // Out of file descriptors, perhaps.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    async fn hear(&self, socket: OwnedFd) -> io::Result<Option<Successor>> {
        let process = packet::peer(&socket)?;
        let talk = Talk::new(socket)?;
        let (
            Request::Hello {
                protocol,
                version,
                store,
            },
            _,
        ) = talk.hear(PATIENCE).await?
        else {
            talk.say(&Answer::Refused("speak up first: hello".into()), &[])?;
            return Ok(None);
        };
        let ours = env!("HEARTH_VERSION");
        let refused = if protocol != PROTOCOL {
            format!(
                "hearth {version} speaks protocol {protocol} and the agent that runs, hearth {ours}, {PROTOCOL}"
            )
        } else if store != self.store {
            format!(
                "the agent that runs, process {}, has another store",
                std::process::id()
            )
        } else {
            String::new()
        };
        if !refused.is_empty() {
            tracing::warn!(process, version, refused, "another agent cannot take over");
            talk.say(&Answer::Refused(refused), &[])?;
            return Ok(None);
        }
        let welcome = Answer::Welcome {
            version: ours.into(),
            process: std::process::id(),
            states: states(),
            kept: self.kept,
            network: network(),
        };
        talk.say(&welcome, &[])?;
        match talk.hear(PATIENCE).await {
            Ok((Request::HandOver, _)) => Ok(Some(Successor {
                talk,
                process,
                version,
            })),
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            // It says itself why.
            Err(_) => {
                tracing::warn!(process, version, "another agent does not take over");
                Ok(None)
            }
        }
    }
}

impl Successor {
    /// Gives it what this process listens on.
    pub(super) fn give(&self, sockets: &Sockets) -> io::Result<()> {
        let mut names = Vec::new();
        let mut fds = Vec::new();
        for passed in sockets.pass()? {
            names.push((passed.face, passed.address));
            fds.push(passed.socket);
        }
        self.talk.say(&Answer::Yours(names), &fds)
    }

    /// It cannot have anything now.
    pub(super) fn refuse(&self, why: &str) {
        let _ = self.talk.say(&Answer::Refused(why.to_owned()), &[]);
    }

    /// Whether it serves everything; it had failed else.
    pub(super) async fn serves(&self) -> bool {
        matches!(
            self.talk.hear(LONG_PATIENCE).await,
            Ok((Request::Serving, _))
        )
    }
}

/// The agent whose place this process takes.
pub(super) struct Predecessor {
    talk: Talk,
    path: PathBuf,
    pub(super) version: String,
    pub(super) process: u32,
    network: u64,
}

impl Predecessor {
    /// Looks whether an agent of this store runs.
    ///
    /// # Errors
    /// One does, and cannot hand over to this one: it goes on.
    pub(super) async fn find(path: &Path, store: &str, kept: bool) -> anyhow::Result<Option<Self>> {
        let failed = || {
            format!(
                "the agent that listens on {} does not answer",
                path.display()
            )
        };
        let hello = Request::Hello {
            protocol: PROTOCOL,
            version: env!("HEARTH_VERSION").into(),
            store: store.to_owned(),
        };
        let begun = std::time::Instant::now();
        let (talk, welcome) = loop {
            let socket = match packet::dial(path) {
                Ok(socket) => socket,
                Err(error) => {
                    return match error.kind() {
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
                        _ => Err(error).with_context(|| format!("cannot ask {}", path.display())),
                    };
                }
            };
            let talk = Talk::new(socket)?;
            let said = match talk.say(&hello, &[]) {
                Ok(()) => talk.hear(LONG_PATIENCE).await,
                Err(error) => Err(error),
            };
            match said {
                Ok((welcome, _)) => break (talk, welcome),
                // It ended just now; another may have taken its place.
                Err(error)
                    if begun.elapsed() < PATIENCE
                        && matches!(
                            error.kind(),
                            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe
                        ) =>
                {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => return Err(error).with_context(failed),
            }
        };
        let Answer::Welcome {
            version,
            process,
            states: theirs,
            kept: theirs_kept,
            network,
        } = welcome
        else {
            return Err(refused(welcome));
        };
        let known = states();
        for (name, format) in &theirs {
            let ours = known.get(name);
            anyhow::ensure!(
                ours == Some(format),
                "the agent that runs, hearth {version}, has state ({name}) of format {format}, this version knows {}: \
                 it goes on; end it before this one is started",
                ours.map_or_else(|| "none of that kind".into(), u32::to_string)
            );
        }
        anyhow::ensure!(
            kept && theirs_kept,
            "the agent that runs, process {process}, goes on: mounts outlive an agent only where both have \
             a keeper (agent.keeper)"
        );
        Ok(Some(Self {
            talk,
            path: path.to_owned(),
            version,
            process,
            network,
        }))
    }

    /// Has it hand over: what it listened on.
    ///
    /// # Errors
    /// It does not; then it goes on.
    pub(super) async fn hand_over(&self) -> anyhow::Result<Vec<Passed>> {
        let failed = || format!("the agent on {} did not hand over", self.path.display());
        self.talk
            .say(&Request::HandOver, &[])
            .with_context(failed)?;
        let (answer, sockets) = self.talk.hear(LONG_PATIENCE).await.with_context(failed)?;
        let Answer::Yours(names) = answer else {
            return Err(refused(answer));
        };
        anyhow::ensure!(names.len() == sockets.len(), failed());
        let passed = names
            .into_iter()
            .zip(sockets)
            .map(|((face, address), socket)| Passed {
                face,
                address,
                socket,
            });
        let is_ours = |passed: &Passed| {
            self.network == network() || passed.address.parse::<std::net::SocketAddr>().is_err()
        };
        Ok(passed.filter(is_ours).collect())
    }

    /// Tells it that everything is served: it may end.
    pub(super) fn release(self) {
        if let Err(error) = self.talk.say(&Request::Serving, &[]) {
            tracing::debug!(%error, "the agent before this one ended by itself");
        }
    }
}

fn refused(answer: Answer) -> anyhow::Error {
    match answer {
        Answer::Refused(why) => anyhow::anyhow!("{why}: it goes on"),
        other => anyhow::anyhow!("the agent that runs is not understood: {other:?}"),
    }
}
