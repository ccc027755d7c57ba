//! Past the disk: reads of what it has no room for, or does not give back, go to the origin.

use std::{
    ops::Range,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{Handle, LONGEST_READ, State};
use crate::{
    chunk::CHUNK_SIZE,
    fetch::{Class, FetchError, FetchErrorKind},
    metrics,
    store::Partial,
};

/// After the disk was full or failed, reads go to the origin for this long before it is tried again.
const AVOID_DISK: Duration = Duration::from_secs(5);

impl Handle {
    /// What was `read`; from the origin where the disk is full, or fails.
    pub(super) async fn or_through(
        &self,
        read: Result<Bytes, FetchError>,
        bytes: Range<u64>,
    ) -> Result<Bytes, FetchError> {
        match read {
            Err(error) if error.kind() == FetchErrorKind::NoSpace => {
                self.avoid_disk(&error);
                self.read_through(bytes).await
            }
            // Else it is the disk that has to be mended.
            Err(error) if error.kind() == FetchErrorKind::Disk && !self.strict() => {
                self.avoid_disk(&error);
                self.read_through(bytes).await
            }
            other => other,
        }
    }

    /// Reads go to the origin for a while.
    pub(in crate::fetch) fn avoid_disk(&self, error: &FetchError) {
        if self.avoids_disk() {
            return;
        }
        if self.engine.upgrade().is_some_and(|e| e.store.writable()) {
            tracing::warn!(object = %self.id(), path = %self.name, %error, "reads go to the origin, past the disk");
        }
        *self.no_disk.lock() = Some((Instant::now(), error.clone()));
    }

    pub(super) fn avoids_disk(&self) -> bool {
        let no_disk = self.no_disk.lock();
        no_disk
            .as_ref()
            .is_some_and(|(since, _)| since.elapsed() < AVOID_DISK)
    }

    /// What the disk said last.
    pub(super) fn why_not_kept(&self) -> FetchError {
        let no_disk = self.no_disk.lock();
        let said = no_disk.as_ref().map(|(_, error)| error.clone());
        said.unwrap_or_else(|| {
            let why = "the store could not keep it";
            FetchError::new(self, FetchErrorKind::Disk, &why)
        })
    }

    /// A place in the store for what had none.
    pub(super) async fn find_place(self: &Arc<Self>) -> Option<Arc<Partial>> {
        let handle = Arc::clone(self);
        let looking = self.engine().ok()?.runtime.spawn_blocking(move || {
            let failed = |e| FetchError::store(&handle, &e);
            let store = Arc::clone(&handle.engine()?.store);
            let partial = store.partial(handle.part, handle.size()).map_err(failed)?;
            {
                let mut state = handle.state.write();
                if matches!(*state, State::Streamed) {
                    *state = State::Partial(Arc::clone(&partial));
                }
            }
            // Another process may have completed it.
            handle.look()?;
            Ok::<_, FetchError>(partial)
        });
        match looking.await.ok()? {
            Ok(partial) => Some(partial),
            Err(error) => {
                self.avoid_disk(&error);
                None
            }
        }
    }

    /// As [`Handle::read`], but what is not here is not stored: there is no room for it.
    ///
    /// # Errors
    /// As [`Handle::read`].
    pub async fn read_past_disk(&self, offset: u64, len: usize) -> Result<Bytes, FetchError> {
        let left = usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut here = vec![0; len.min(left).min(LONGEST_READ)];
        if here.is_empty() || self.try_read(offset, &mut here)? {
            return Ok(here.into());
        }
        self.read_through(offset..offset + here.len() as u64).await
    }

    /// Reads without storing: the disk is full, or fails.
    pub(super) async fn read_through(&self, bytes: Range<u64>) -> Result<Bytes, FetchError> {
        // A small one is verified before any of it is served.
        if self.size() <= CHUNK_SIZE {
            let whole = self.receive_verified().await?;
            let data = whole.slice(bytes.start as usize..bytes.end as usize);
            let streamed = &metrics::global().fetch_streamed_bytes;
            streamed.add(data.len() as u64);
            return Ok(data);
        }
        if self.strict() {
            let why =
                "the disk is full, and nothing may be served before it is stored and verified";
            return Err(FetchError::new(self, FetchErrorKind::NoSpace, &why));
        }
        self.streamed.store(true, Ordering::Relaxed);
        let data = self.receive(bytes.clone(), Class::Demand).await?;
        // Complete since: who made it so may not have known of this reader.
        if self.complete().is_some()
            && let Ok(read) = self.read_complete(bytes.start, data.len())
        {
            return Ok(read);
        }
        metrics::global()
            .fetch_streamed_bytes
            .add(data.len() as u64);
        Ok(data)
    }
}
