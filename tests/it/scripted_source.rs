//! A source that does what the test says: errors, short and wrong bodies, stalls, other generations.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use hearth::{
    digest::{Digest, ObjectId, PartialId},
    reference::Reference,
    source::{ByteStream, Source, SourceError, SourceErrorKind},
    tree::{Artifact, Location, Object, Recipe},
};
use tokio::sync::watch;

/// What happens to one request.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// The request is refused.
    Refuse(SourceErrorKind),
    /// The body breaks off with an error after this many bytes.
    Break(u64),
    /// The body just ends after this many bytes.
    Short(u64),
    /// After this many bytes nothing comes any more.
    Hold(u64),
    /// The body goes on for longer than asked.
    Long,
    /// The first byte of the body is wrong.
    Flip,
    /// This bit of the body is wrong, counted round and round.
    FlipBit(usize),
    /// Nothing is ever answered.
    Stall,
    /// Each frame of the body comes after this pause.
    Slow(Duration),
}

/// Content and what happens to the requests for it.
#[derive(Debug)]
pub(crate) struct Scripted {
    pub(crate) data: Bytes,
    faults: Mutex<VecDeque<Option<Fault>>>,
    log: Mutex<Vec<Range<u64>>>,
    /// Bytes in a frame, and the pause before each.
    frame: usize,
    pace: Duration,
    /// Bytes from here on are not sent yet.
    held_from: watch::Sender<u64>,
    always_wrong: AtomicBool,
    origin: &'static str,
}

impl Scripted {
    pub(crate) fn new(size: usize) -> Self {
        Self {
            data: content(size),
            faults: Mutex::default(),
            log: Mutex::default(),
            frame: 64 << 10,
            pace: Duration::ZERO,
            held_from: watch::Sender::new(u64::MAX),
            always_wrong: AtomicBool::new(false),
            origin: "hf://models/a/a",
        }
    }

    /// Frames of `frame` bytes with a pause before each.
    pub(crate) fn paced(mut self, frame: usize, pace: Duration) -> Self {
        (self.frame, self.pace) = (frame, pace);
        self
    }

    /// Frames that reach beyond this offset wait for [`Self::let_go`].
    pub(crate) fn held_from(self, offset: u64) -> Self {
        self.held_from.send_replace(offset);
        self
    }

    pub(crate) fn let_go(&self) {
        self.held_from.send_replace(u64::MAX);
    }

    /// Its content is nowhere what others have.
    pub(crate) fn false_bytes(mut self) -> Self {
        self.data = self.data.iter().map(|byte| !byte).collect();
        self
    }

    /// It is at another origin.
    pub(crate) fn at(mut self, origin: &'static str) -> Self {
        self.origin = origin;
        self
    }

    /// The next requests meet these faults, in order.
    pub(crate) fn script(self, faults: impl IntoIterator<Item = Option<Fault>>) -> Self {
        self.faults.lock().unwrap().extend(faults);
        self
    }

    pub(crate) fn serve_wrong_bytes(&self, wrong: bool) {
        self.always_wrong.store(wrong, Ordering::Relaxed);
    }

    /// The ranges asked for so far.
    pub(crate) fn requests(&self) -> Vec<Range<u64>> {
        self.log.lock().unwrap().clone()
    }

    /// An object with the content, named by its digest.
    pub(crate) fn object(&self) -> Object {
        self.object_as(ObjectId::Sha256(Digest::of(&self.data)))
    }

    /// What the object is called in the store until it is verified.
    pub(crate) fn part(&self) -> PartialId {
        self.object().partial_id(self.origin)
    }

    pub(crate) fn object_as(&self, id: ObjectId) -> Object {
        Object {
            id,
            size: self.data.len() as u64,
            git_sha1: None,
            recipe: Recipe::Raw(Location {
                path: "weights.bin".into(),
                generation: Some("1".into()),
                offset: 0,
            }),
        }
    }

    pub(crate) fn source(self: &Arc<Self>) -> Arc<dyn Source> {
        Arc::clone(self) as Arc<dyn Source>
    }
}

/// Bytes that differ everywhere, so that a misplaced range shows.
pub(crate) fn content(size: usize) -> Bytes {
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut data = Vec::with_capacity(size + 8);
    while data.len() < size {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        data.extend_from_slice(&x.to_le_bytes());
    }
    data.truncate(size);
    data.into()
}

#[async_trait::async_trait]
impl Source for Scripted {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        Err(SourceError::new(
            SourceErrorKind::NotFound,
            reference.to_string(),
            "not scripted",
        ))
    }

    fn origin(&self) -> String {
        self.origin.into()
    }

    async fn read(
        &self,
        location: &Location,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        assert!(!range.is_empty());
        self.log.lock().unwrap().push(range.clone());
        let fault = self.faults.lock().unwrap().pop_front().flatten();
        let what = format!("{} at scripted", location.path);
        let mut body = self
            .data
            .slice(range.start as usize..range.end as usize)
            .to_vec();
        let (mut broken, mut held) = (false, false);
        let mut pace = self.pace;
        match fault {
            None => {}
            Some(Fault::Refuse(kind)) => return Err(SourceError::new(kind, what, "scripted")),
            Some(Fault::Stall) => std::future::pending().await,
            Some(Fault::Break(at)) => {
                body.truncate(at as usize);
                broken = true;
            }
            Some(Fault::Short(at)) => body.truncate(at as usize),
            Some(Fault::Hold(at)) => {
                body.truncate(at as usize);
                held = true;
            }
            Some(Fault::Slow(each)) => pace = each,
            Some(Fault::Long) => body.push(0),
            Some(Fault::Flip) => body[0] ^= 1,
            Some(Fault::FlipBit(bit)) => {
                let len = body.len();
                body[bit / 8 % len] ^= 1 << (bit % 8);
            }
        }
        if self.always_wrong.load(Ordering::Relaxed) {
            body[0] ^= 1;
        }
        let mut end_of_frame = range.start;
        let frames: Vec<_> = body
            .chunks(self.frame)
            .map(|frame| {
                end_of_frame += frame.len() as u64;
                (end_of_frame, Ok(Bytes::copy_from_slice(frame)))
            })
            .collect();
        let end = broken.then(|| {
            let error = SourceError::new(
                SourceErrorKind::Unavailable,
                what,
                "the connection was reset",
            );
            (0, Err(error))
        });
        let held_from = self.held_from.subscribe();
        let frames = stream::iter(frames.into_iter().chain(end)).then(move |(end, frame)| {
            let mut held_from = held_from.clone();
            async move {
                if !pace.is_zero() {
                    tokio::time::sleep(pace).await;
                }
                // The source may be gone before its streams.
                let _ = held_from.wait_for(|&from| end <= from).await;
                frame
            }
        });
        Ok(match held {
            true => frames.chain(stream::pending()).boxed(),
            false => frames.boxed(),
        })
    }
}
