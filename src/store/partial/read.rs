//! Reads of present chunks, through the page cache or past it.

use std::{cell::RefCell, sync::atomic::Ordering};

use super::Partial;
use crate::{
    chunk::CHUNK_SIZE,
    disk::{AlignedBuf, DIRECT_ALIGN, DiskFile},
    store::Result,
};

const ALIGN: u64 = DIRECT_ALIGN as u64;

thread_local! {
    /// For readers whose memory is not aligned.
    static BOUNCE: RefCell<Option<AlignedBuf>> = const { RefCell::new(None) };
}

impl Partial {
    /// Reads from present chunks; the caller has checked [`Partial::present`].
    ///
    /// # Errors
    /// What the disk says.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        Ok(self.data.read_at(buf, offset)?)
    }

    /// As [`Partial::read_at`], past the page cache where the file system can: for what was written
    /// so and is read once.
    ///
    /// # Errors
    /// What the disk says.
    pub fn read_past_cache(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        // The last block of the file may be shorter than a direct read can be.
        let whole_blocks = self.size() / ALIGN * ALIGN;
        let end = (offset + buf.len() as u64).min(whole_blocks);
        let direct = end.saturating_sub(offset) as usize;
        let (head, tail) = buf.split_at_mut(direct.min(buf.len()));
        if !head.is_empty() && !self.read_direct(head, offset)? {
            self.data.read_at(head, offset)?;
        }
        if !tail.is_empty() {
            self.data.read_at(tail, offset + head.len() as u64)?;
        }
        Ok(())
    }

    /// Reads whole blocks past the page cache; false where that does not work here.
    fn read_direct(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        let Some(direct) = &self.direct else {
            return Ok(false);
        };
        if !self.direct_works.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let aligned = |n: usize| n.is_multiple_of(DIRECT_ALIGN);
        let read =
            if aligned(buf.as_ptr().addr()) && aligned(buf.len()) && offset.is_multiple_of(ALIGN) {
                direct.read_at(buf, offset)
            } else {
                read_bounced(direct.as_ref(), buf, offset)
            };
        match read {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Some(libc::EINVAL) => {
                self.direct_works.store(false, Ordering::Relaxed);
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn read_bounced(direct: &dyn DiskFile, buf: &mut [u8], offset: u64) -> crate::disk::Result<()> {
    BOUNCE.with_borrow_mut(|bounce| {
        let bounce = bounce
            .get_or_insert_with(|| AlignedBuf::with_capacity(CHUNK_SIZE as usize + DIRECT_ALIGN));
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let from = at / ALIGN * ALIGN;
            let skip = (at - from) as usize;
            let take = (buf.len() - done).min(CHUNK_SIZE as usize - skip);
            let blocks = (skip + take).next_multiple_of(DIRECT_ALIGN);
            bounce.truncate(0);
            direct.read_at(&mut bounce.spare_mut()[..blocks], from)?;
            buf[done..done + take].copy_from_slice(&bounce.spare_mut()[skip..skip + take]);
            done += take;
        }
        Ok(())
    })
}
