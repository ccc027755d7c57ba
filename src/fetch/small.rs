//! Small objects are made durable in batches: one sync for all that are ready.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{Instant, sleep_until},
};

use crate::{
    digest::ObjectId,
    metrics,
    store::{Complete, Store, StoreError, StoreErrorKind},
};

/// Objects in a batch.
const BATCH: usize = 256;
/// How long a batch for which nobody waits is added to: a sync disturbs whoever uses the disk.
const LINGER: Duration = Duration::from_millis(250);
/// How often whoever waits for all of them asks for a sync.
const SETTLE: Duration = Duration::from_millis(50);
/// Bytes that may be served before they are stored.
const HELD: usize = 32 << 20;

/// Whether somebody waits for an object to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    Waiting,
    Patient,
}

/// The error is absent where the engine is gone.
type Answer = Result<Arc<Complete>, Option<Arc<StoreError>>>;

struct Put {
    id: ObjectId,
    data: Bytes,
    urgency: Urgency,
    answer: oneshot::Sender<Answer>,
}

/// Collects small objects and stores them together.
#[derive(Clone)]
pub(super) struct SmallObjects {
    queue: mpsc::Sender<Put>,
    /// Bytes that may still be held in memory.
    room: Arc<Semaphore>,
    /// Somebody has begun to wait for what was put patiently.
    hurry: Arc<Notify>,
}

impl SmallObjects {
    pub(super) fn new(store: Arc<Store>, runtime: &tokio::runtime::Handle) -> Self {
        let (queue, mut waiting) = mpsc::channel::<Put>(BATCH);
        let blocking = runtime.clone();
        let hurry = Arc::new(Notify::new());
        let hurried = Arc::clone(&hurry);
        runtime.spawn(async move {
            while let Some(first) = waiting.recv().await {
                let mut batch = vec![first];
                let until = Instant::now() + LINGER;
                while batch.len() < BATCH {
                    let next = match waiting.try_recv() {
                        Ok(next) => Some(next),
                        Err(_) if batch.iter().any(|put| put.urgency == Urgency::Waiting) => None,
                        Err(_) => tokio::select! {
                            next = waiting.recv() => next,
                            () = hurried.notified() => None,
                            () = sleep_until(until) => None,
                        },
                    };
                    match next {
                        Some(next) => batch.push(next),
                        None => break,
                    }
                }
                let store = Arc::clone(&store);
                let stored = blocking.spawn_blocking(move || put(&store, batch));
                if stored.await.is_err() {
                    return;
                }
            }
        });
        Self {
            queue,
            room: Arc::new(Semaphore::new(HELD)),
            hurry,
        }
    }

    /// What was put is waited for now.
    pub(super) fn hurry(&self) {
        self.hurry.notify_one();
    }

    /// Waits until nothing is held any more, at most until `deadline`.
    pub(super) async fn settle(&self, deadline: Instant) {
        while Instant::now() < deadline {
            self.hurry();
            let all = self.room.acquire_many(HELD as u32);
            if tokio::time::timeout(SETTLE, all).await.is_ok() {
                return;
            }
        }
    }

    /// Room to hold `len` bytes in memory until they are stored; `None` where much is held already.
    pub(super) fn room(&self, len: usize) -> Option<OwnedSemaphorePermit> {
        // An object of no bytes takes memory, too.
        let len = u32::try_from(len.max(512)).ok()?;
        Arc::clone(&self.room).try_acquire_many_owned(len).ok()
    }

    /// Stores one object; it is durable on return.
    pub(super) async fn put(&self, id: ObjectId, data: Bytes, urgency: Urgency) -> Answer {
        let (answer, stored) = oneshot::channel();
        self.queue
            .send(Put {
                id,
                data,
                urgency,
                answer,
            })
            .await
            .map_err(|_| None)?;
        stored.await.map_err(|_| None)?
    }
}

/// Whether an error may be about one object alone, rather than about the disk.
fn is_of_one(kind: StoreErrorKind) -> bool {
    !matches!(kind, StoreErrorKind::NoSpace | StoreErrorKind::ReadOnly)
}

fn put(store: &Store, batch: Vec<Put>) {
    let objects: Vec<_> = batch.iter().map(|p| (p.id, p.data.clone())).collect();
    match store.put(&objects) {
        Ok(complete) => {
            let bytes: usize = objects.iter().map(|(_, data)| data.len()).sum();
            metrics::global().store_written_bytes.add(bytes as u64);
            metrics::global()
                .store_objects_completed
                .add(batch.len() as u64);
            for (put, complete) in batch.into_iter().zip(complete) {
                let _ = put.answer.send(Ok(complete));
            }
        }
        // What is wrong with one is no reason to keep none.
        Err(error) if batch.len() > 1 && is_of_one(error.kind()) => {
            batch.into_iter().for_each(|one| put(store, vec![one]));
        }
        Err(error) => {
            let error = Arc::new(error);
            for put in batch {
                let _ = put.answer.send(Err(Some(Arc::clone(&error))));
            }
        }
    }
}
