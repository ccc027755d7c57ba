//! Small objects are made durable in batches: one sync for all that are ready.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::{
    digest::ObjectId,
    metrics,
    store::{Complete, Store, StoreError},
};

/// Objects in a batch.
const BATCH: usize = 256;

/// The error is absent where the engine is gone.
type Answer = Result<Arc<Complete>, Option<Arc<StoreError>>>;

struct Put {
    id: ObjectId,
    data: Bytes,
    answer: oneshot::Sender<Answer>,
}

/// Collects small objects and stores them together.
#[derive(Clone)]
pub(super) struct SmallObjects {
    queue: mpsc::Sender<Put>,
}

impl SmallObjects {
    pub(super) fn new(store: Arc<Store>, runtime: &tokio::runtime::Handle) -> Self {
        let (queue, mut waiting) = mpsc::channel::<Put>(BATCH);
        let blocking = runtime.clone();
        runtime.spawn(async move {
            while let Some(first) = waiting.recv().await {
                let mut batch = vec![first];
                while batch.len() < BATCH
                    && let Ok(next) = waiting.try_recv()
                {
                    batch.push(next);
                }
                let store = Arc::clone(&store);
                let stored = blocking.spawn_blocking(move || put(&store, batch));
                if stored.await.is_err() {
                    return;
                }
            }
        });
        Self { queue }
    }

    /// Stores one object; it is durable on return.
    pub(super) async fn put(&self, id: ObjectId, data: Bytes) -> Answer {
        let (answer, stored) = oneshot::channel();
        self.queue
            .send(Put { id, data, answer })
            .await
            .map_err(|_| None)?;
        stored.await.map_err(|_| None)?
    }
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
        Err(error) => {
            let error = Arc::new(error);
            for put in batch {
                let _ = put.answer.send(Err(Some(Arc::clone(&error))));
            }
        }
    }
}
