//! A byte buffer whose address suits `O_DIRECT`.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    fmt,
    ops::Deref,
    ptr::NonNull,
    slice,
};

use super::DIRECT_ALIGN;

/// A buffer of fixed capacity that starts at a multiple of [`DIRECT_ALIGN`]; reads as the bytes
/// appended to it. Its memory is taken from the system only as it is filled.
pub struct AlignedBuf {
    // All `capacity` bytes are initialised (zeroed at first).
    start: NonNull<u8>,
    capacity: usize,
    len: usize,
}

// SAFETY: it owns its memory alone, like a `Vec<u8>`.
unsafe impl Send for AlignedBuf {}
// SAFETY: `&AlignedBuf` only reads.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// An empty buffer with room for `capacity` bytes (rounded up to the alignment).
    pub fn with_capacity(capacity: usize) -> Self {
        let capacity = capacity.max(1).next_multiple_of(DIRECT_ALIGN);
        let layout = Self::layout(capacity);
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        Self {
            start,
            capacity,
            len: 0,
        }
    }

    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, DIRECT_ALIGN).expect("capacity is far below isize::MAX")
    }

    /// Most bytes it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes that still fit.
    pub fn room(&self) -> usize {
        self.capacity - self.len
    }

    /// Appends as much of `data` as fits and says how much that was.
    #[must_use = "what did not fit is not in the buffer"]
    pub fn append(&mut self, data: &[u8]) -> usize {
        let taken = data.len().min(self.room());
        self.spare_mut()[..taken].copy_from_slice(&data[..taken]);
        self.len += taken;
        taken
    }

    /// The bytes behind the content, to be filled before [`AlignedBuf::advance`].
    pub fn spare_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        // SAFETY: `start` owns `capacity` initialised bytes, borrowed mutably through `self`.
        let all = unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.capacity) };
        &mut all[len..]
    }

    /// Takes the next `count` bytes of [`AlignedBuf::spare_mut`] into the content; no more than there are.
    pub fn advance(&mut self, count: usize) {
        self.len += count.min(self.room());
    }

    /// The content.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `spare_mut`, and `len <= capacity`.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// Drops content beyond `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        self.len = 0;
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `start` owns `capacity >= len` initialised bytes, borrowed through `self`.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `with_capacity` with this same layout.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.capacity)) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} of {} bytes)", self.len, self.capacity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_up_to_its_capacity() {
        let mut buf = AlignedBuf::with_capacity(5000);
        assert_eq!(buf.capacity(), 8192);
        assert_eq!(buf.as_ptr().addr() % DIRECT_ALIGN, 0);
        assert_eq!(buf.append(&[1; 8000]), 8000);
        assert_eq!(buf.append(&[2; 8000]), 192);
        assert_eq!((buf[7999], buf[8000], buf.len()), (1, 2, 8192));
        buf.truncate(10);
        buf.spare_mut()[0] = 9;
        buf.advance(1);
        assert_eq!((buf.len(), buf[10]), (11, 9));
        buf.as_mut_slice()[0] = 7;
        assert_eq!(buf[0], 7);
        buf.clear();
        assert!(buf.is_empty());
    }
}
