//! Streaming inflate that can stop at block boundaries and start at one: a safe face for
//! `libz-rs-sys`, the only `unsafe` code of this room.
//!
//! Invariants: a stream lives in one box from init to end, since its state may point back at it;
//! no pointer into a caller's slice outlives the call that got it.

use std::{ffi::CStr, ptr};

use libz_rs_sys as z;

use super::ImageError;

/// How far back deflate refers (RFC 1951, 3.2.5).
pub(super) const WINDOW: usize = 32 << 10;

/// `windowBits` of a gzip member, header and trailer checked; of deflate without either.
const GZIP: i32 = 15 + 16;
const RAW: i32 = -15;

/// The state of one stream.
pub(super) struct Inflate(Box<z::z_stream>);

// SAFETY: the stream owns its state, which nothing else refers to; the pointers into input and
// output are not used between calls.
unsafe impl Send for Inflate {}

/// What one call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    /// Bytes taken from the input.
    pub(super) read: usize,
    /// Bytes written to the output.
    pub(super) written: usize,
    pub(super) stop: Stop,
}

/// Why a call returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The input is used up or the output is full.
    More,
    /// Between two blocks; this many bits of the last byte read belong to the next one.
    Block { bits: u8 },
    /// At the end of the member, whose trailer was right; of raw deflate: after its last block.
    End,
}

impl Inflate {
    /// A stream that expects the header of a gzip member (RFC 1952).
    pub(super) fn gzip() -> Result<Self, ImageError> {
        let mut stream = Box::new(z::z_stream::default());
        // SAFETY: `stream` is a valid stream with the default allocator; version and size are
        // those of the library itself.
        let code = unsafe {
            z::inflateInit2_(
                &mut *stream,
                GZIP,
                z::zlibVersion(),
                size_of::<z::z_stream>() as i32,
            )
        };
        let inflate = Self(stream);
        inflate.check(code)?;
        Ok(inflate)
    }

    /// Forgets all, and expects the header of a gzip member.
    pub(super) fn reset_to_gzip(&mut self) -> Result<(), ImageError> {
        self.reset(GZIP)
    }

    /// Forgets all, and goes on inside a member: `window` is what came before, `bits` (0 to 7) of
    /// `byte`, its upper ones, belong to the next block. The end of the member is [`Stop::End`]
    /// then, before its trailer.
    pub(super) fn reset_to_block(
        &mut self,
        window: &[u8],
        bits: u8,
        byte: u8,
    ) -> Result<(), ImageError> {
        self.reset(RAW)?;
        if bits > 7 || window.len() > WINDOW {
            return Err(ImageError::invalid("no block of deflate can start there"));
        }
        if bits > 0 {
            // SAFETY: the stream was initialized; no pointers are passed.
            let code = unsafe {
                z::inflatePrime(&mut *self.0, bits.into(), i32::from(byte >> (8 - bits)))
            };
            self.check(code)?;
        }
        // SAFETY: the stream was initialized; `window` is readable for its length, and is copied.
        let code =
            unsafe { z::inflateSetDictionary(&mut *self.0, window.as_ptr(), window.len() as u32) };
        self.check(code)
    }

    fn reset(&mut self, window_bits: i32) -> Result<(), ImageError> {
        // SAFETY: the stream was initialized.
        let code = unsafe { z::inflateReset2(&mut *self.0, window_bits) };
        self.check(code)
    }

    /// Decodes until the input is used up, the output is full, the stream ends, or, if
    /// `stop_at_block`, a block ends.
    ///
    /// # Errors
    /// A stream that is no gzip or broken.
    pub(super) fn run(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        stop_at_block: bool,
    ) -> Result<Step, ImageError> {
        const MOST: usize = 1 << 30;
        let (available_in, available_out) = (input.len().min(MOST), output.len().min(MOST));
        let stream = &mut *self.0;
        (stream.next_in, stream.avail_in) = (input.as_ptr(), available_in as u32);
        (stream.next_out, stream.avail_out) = (output.as_mut_ptr(), available_out as u32);
        let flush = if stop_at_block {
            z::Z_BLOCK
        } else {
            z::Z_NO_FLUSH
        };
        // SAFETY: the stream was initialized; input and output are valid for the lengths given, do
        // not overlap, and are not touched otherwise during the call.
        let code = unsafe { z::inflate(stream, flush) };
        let step = Step {
            read: available_in - stream.avail_in as usize,
            written: available_out - stream.avail_out as usize,
            stop: match code {
                z::Z_STREAM_END => Stop::End,
                _ => Stop::of(stream.data_type),
            },
        };
        (stream.next_in, stream.avail_in) = (ptr::null(), 0);
        (stream.next_out, stream.avail_out) = (ptr::null_mut(), 0);
        match code {
            // That nothing could be done is no error: the caller sees that nothing was.
            z::Z_STREAM_END | z::Z_BUF_ERROR => {}
            code => self.check(code)?,
        }
        Ok(step)
    }

    /// The last bytes decoded of this member, at most [`WINDOW`].
    pub(super) fn window(&self) -> Result<Vec<u8>, ImageError> {
        let mut window = vec![0; WINDOW];
        let mut len = 0;
        // SAFETY: the stream was initialized; 32 KiB are always enough.
        let code = unsafe { z::inflateGetDictionary(&*self.0, window.as_mut_ptr(), &mut len) };
        self.check(code)?;
        window.truncate(len as usize);
        Ok(window)
    }

    fn check(&self, code: i32) -> Result<(), ImageError> {
        match code {
            z::Z_OK => Ok(()),
            z::Z_MEM_ERROR => Err(ImageError::too_large("there is no memory to decode it")),
            _ if self.0.msg.is_null() => Err(ImageError::invalid("its gzip stream is broken")),
            _ => {
                // SAFETY: a message that is set is a static text that ends with NUL.
                let why = unsafe { CStr::from_ptr(self.0.msg) }.to_string_lossy();
                Err(ImageError::invalid(format!(
                    "its gzip stream is broken: {why}"
                )))
            }
        }
    }
}

impl Stop {
    /// From `data_type` after a call (zlib.h, `inflate`): unused bits of the last byte, 64 in the
    /// last block, 128 right after a block.
    fn of(data_type: i32) -> Self {
        match (data_type & 0b1100_0000, data_type & 0b11_1111) {
            (128, bits @ 0..=7) => Self::Block { bits: bits as u8 },
            _ => Self::More,
        }
    }
}

impl Drop for Inflate {
    fn drop(&mut self) {
        // SAFETY: the stream was initialized, or its state is null, which is refused.
        unsafe { z::inflateEnd(&mut *self.0) };
    }
}

/// One gzip member, for tests.
#[cfg(test)]
pub(crate) fn gzip(data: &[u8], level: i32) -> Vec<u8> {
    let mut stream = z::z_stream::default();
    let mut out = vec![0; data.len() + data.len() / 7 + 1000];
    // SAFETY: stream, input and output are valid for the whole of each call.
    unsafe {
        let size = size_of::<z::z_stream>() as i32;
        let code = z::deflateInit2_(&mut stream, level, 8, 31, 8, 0, z::zlibVersion(), size);
        assert_eq!(code, z::Z_OK);
        (stream.next_in, stream.avail_in) = (data.as_ptr(), data.len() as u32);
        (stream.next_out, stream.avail_out) = (out.as_mut_ptr(), out.len() as u32);
        assert_eq!(z::deflate(&mut stream, z::Z_FINISH), z::Z_STREAM_END);
        z::deflateEnd(&mut stream);
    }
    out.truncate(out.len() - stream.avail_out as usize);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::samples;

    #[test]
    fn starts_again_at_every_block() {
        let data = samples::text(300_000);
        let gzip = samples::gzip(&data, 6);
        let mut first = Inflate::gzip().unwrap();
        let mut out = vec![0; data.len() + 1];
        let (mut read, mut written, mut points) = (0, 0, Vec::new());
        loop {
            let step = first.run(&gzip[read..], &mut out[written..], true).unwrap();
            (read, written) = (read + step.read, written + step.written);
            match step.stop {
                Stop::Block { bits } if written > 0 => {
                    points.push((read, written, bits, first.window().unwrap()));
                }
                Stop::End => break,
                _ => {}
            }
        }
        assert_eq!(&out[..written], data);
        assert_eq!(read, gzip.len());
        assert!(points.len() > 3);
        assert!(points.iter().any(|point| point.2 > 0));
        let mut again = Inflate::gzip().unwrap();
        for (read, written, bits, window) in points {
            assert_eq!(window, data[written.saturating_sub(WINDOW)..written]);
            let byte = gzip[read - 1];
            again.reset_to_block(&window, bits, byte).unwrap();
            let mut out = vec![0; data.len() - written + 1];
            let step = again.run(&gzip[read..], &mut out, false).unwrap();
            assert_eq!(step.stop, Stop::End);
            assert_eq!(&out[..step.written], &data[written..]);
            assert_eq!(read + step.read, gzip.len() - 8);
        }
    }

    #[test]
    fn what_is_broken_says_so() {
        let mut inflate = Inflate::gzip().unwrap();
        let error = inflate.run(b"no gzip at all", &mut [0; 10], false);
        assert!(error.unwrap_err().to_string().contains("incorrect header"));
        let mut gzip = samples::gzip(b"abc", 6);
        let crc = gzip.len() - 8;
        gzip[crc] ^= 1;
        inflate.reset_to_gzip().unwrap();
        let error = inflate.run(&gzip, &mut [0; 10], false);
        assert!(error.unwrap_err().to_string().contains("data check"));
        assert!(inflate.reset_to_block(&[], 8, 0).is_err());
        let nothing = inflate.run(&[], &mut [0; 10], false).unwrap();
        assert_eq!((nothing.read, nothing.written), (0, 0));
    }
}
