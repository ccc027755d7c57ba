//! Messages between a keeper and servers, each a packet (`socket::packet`).
//!
//! A server begins with [`Request::Hello`]. Every request has one answer, in order; [`Answer::Leave`] comes
//! by itself. A peer that sends what is too long, or not understood, is dropped.

use std::{
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path, PathBuf},
};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use serde::{Deserialize, Serialize};

use super::super::{MountError, MountErrorKind, session::Id};

/// Of the messages below. A keeper speaks with servers of exactly this.
pub const PROTOCOL: u32 = 1;

/// What a server, or a command, asks.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    Hello {
        protocol: u32,
        version: String,
    },
    /// Mount on `dir`. Answered with a session, which the asking server is to serve.
    Open {
        dir: Dir,
        read_only: bool,
        allow_other: bool,
        about: String,
    },
    /// Name the first session whose mount point comes behind this.
    Next {
        after: Option<Dir>,
    },
    /// Show the session on `dir`, whoever serves it.
    Show {
        dir: Dir,
    },
    /// Let this server serve the session on `dir`; whoever does so now is asked to leave first.
    Take {
        dir: Dir,
    },
    /// These descriptors are to stay open as long as the session on `dir`: locks on what it needs.
    Hold {
        dir: Dir,
    },
    /// This server serves the session on `dir` no more; another will.
    Left {
        dir: Dir,
        #[serde(flatten)]
        which: Which,
    },
    /// The mount on `dir` is gone, and nobody is to serve it again.
    End {
        dir: Dir,
        #[serde(flatten)]
        which: Which,
    },
    /// This server serves the session on `dir`, and the keeper that had it is gone: have it from now on. With the fds of the
    /// connection and of the state. Only to a keeper that [`Answer::Welcome`] says it of.
    Give {
        dir: Dir,
        connection: u32,
    },
    /// Take the mount on `dir` away, whatever its server does.
    Abort {
        dir: Dir,
    },
    /// Have the kernel drop its pages of these inodes, and say so by the descriptor that comes along
    /// (`pages`). Only of a keeper that [`Answer::Welcome`] says it of.
    Drop {
        dir: Dir,
        #[serde(flatten)]
        which: Which,
        first: u64,
        last: u64,
    },
}

/// Which session of a mount point is meant, as far as the server says it: there may be one that was mounted since, with the
/// number of the connection before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Which {
    /// The earliest versions do not say it. They mean what is seen there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) connection: Option<u32>,
    /// Earlier versions do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) memory: Option<u64>,
}

impl Which {
    /// Whether it may be this session.
    pub(super) fn fits(self, id: Id) -> bool {
        self.connection
            .is_none_or(|connection| connection == id.connection)
            && self.memory.is_none_or(|memory| memory == id.memory)
    }
}

impl From<Id> for Which {
    fn from(id: Id) -> Self {
        Self {
            connection: Some(id.connection),
            memory: Some(id.memory),
        }
    }
}

/// What a keeper answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Welcome {
        /// Process id.
        keeper: u32,
        version: String,
        /// Whether it knows [`Request::Give`], which earlier versions do not.
        #[serde(default)]
        takes: bool,
        /// Whether it knows [`Request::Drop`], which earlier versions do not.
        #[serde(default)]
        drops: bool,
    },
    Next(Option<Kept>),
    /// With the fds of the connection and of the state.
    Session {
        connection: u32,
    },
    Done,
    Failed {
        kind: MountErrorKind,
        dir: Dir,
        message: String,
    },
    /// A successor wants the session on `dir`: answer what is in hand and let go.
    Leave {
        dir: Dir,
    },
}

/// A session that a keeper has.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    dir: Dir,
    /// The process that serves it, where there is one.
    pub server: Option<u32>,
    /// How many servers it has had.
    pub servers: u32,
}

impl Kept {
    pub(super) fn new(dir: &Path, server: Option<u32>, servers: u32) -> Self {
        let dir = Dir(dir.to_owned());
        Self {
            dir,
            server,
            servers,
        }
    }

    /// The mount point.
    pub fn dir(&self) -> &Path {
        &self.dir.0
    }
}

/// A path, whatever its bytes; what is not plain is written as `%xx`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub(super) struct Dir(pub(super) PathBuf);

/// What stands for itself.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'_')
    .remove(b'.');

impl From<String> for Dir {
    fn from(text: String) -> Self {
        let bytes = percent_decode_str(&text).collect();
        Self(std::ffi::OsString::from_vec(bytes).into())
    }
}

impl From<Dir> for String {
    fn from(dir: Dir) -> Self {
        percent_encode(dir.0.as_os_str().as_bytes(), PLAIN).to_string()
    }
}

impl From<MountError> for Answer {
    fn from(error: MountError) -> Self {
        Self::Failed {
            kind: error.kind,
            dir: Dir(error.dir),
            message: error.message,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd as _, OwnedFd};

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::{super::super::state::MAX_ABOUT, *};
    use crate::socket::packet::{MAX_PACKET, MsgFlags, receive, send};

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC;
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
    }

    #[test]
    fn messages_and_descriptors_arrive() {
        let (one, other) = pair();
        let odd = std::ffi::OsString::from_vec(b"/mnt/a b%\xff\n".to_vec());
        let request = Request::Hold {
            dir: Dir(PathBuf::from(&odd)),
        };
        let file = tempfile::tempfile().unwrap();
        send(one.as_fd(), &request, &[file.as_fd()], MsgFlags::empty()).unwrap();
        let received = receive::<Request>(other.as_fd(), MsgFlags::empty());
        let (received, fds) = received.unwrap().unwrap();
        assert!(matches!(received, Request::Hold { dir } if *dir.0 == *odd));
        assert_eq!(fds.len(), 1);
        drop(one);
        let gone = receive::<Request>(other.as_fd(), MsgFlags::empty());
        assert!(gone.unwrap().is_none());
    }

    #[test]
    fn sessions_are_told_apart_as_far_as_a_server_says() {
        let id = |connection, memory| Id { connection, memory };
        let says = |text: &str| match serde_json::from_str(text).unwrap() {
            Request::Left { which, .. } => which,
            other => panic!("{other:?}"),
        };
        let first = says(r#"{"Left":{"dir":"/a"}}"#);
        assert!(first.fits(id(5, 1)) && first == Which::default());
        let before = says(r#"{"Left":{"dir":"/a","connection":5}}"#);
        assert!(before.fits(id(5, 1)) && before.fits(id(5, 2)) && !before.fits(id(6, 1)));
        let left = Request::Left {
            dir: Dir("/a".into()),
            which: id(5, u64::MAX).into(),
        };
        let text = serde_json::to_string(&left).unwrap();
        assert!(text.contains(r#""connection":5,"#), "{text}");
        let now = says(&text);
        assert!(now.fits(id(5, u64::MAX)) && !now.fits(id(5, 1)) && !now.fits(id(6, u64::MAX)));
    }

    #[test]
    fn what_is_long_or_foreign_is_refused() {
        let (one, other) = pair();
        for bad in [&b"{"[..], b"{\"Nothing\":1}", &vec![b'1'; MAX_PACKET + 1]] {
            nix::unistd::write(&one, bad).unwrap();
            receive::<Request>(other.as_fd(), MsgFlags::empty()).unwrap_err();
        }
        let long = Request::Open {
            dir: Dir("/".into()),
            read_only: true,
            allow_other: true,
            about: "x".repeat(MAX_PACKET),
        };
        send(one.as_fd(), &long, &[], MsgFlags::empty()).unwrap_err();
        // The longest that is allowed fits into the socket.
        let long = Request::Open {
            dir: Dir("/".into()),
            read_only: true,
            allow_other: true,
            about: "\"".repeat(MAX_ABOUT),
        };
        send(one.as_fd(), &long, &[], MsgFlags::MSG_DONTWAIT).unwrap();
    }
}
