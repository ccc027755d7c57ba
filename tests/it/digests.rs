//! A sink that knows the digests of the files it was given. Included by `tests/real`, too.

use hearth::{
    digest::Digest,
    image::{ImageError, Sink},
};
use sha2::{Digest as _, Sha256};

#[derive(Default)]
pub(crate) struct Digests {
    hasher: Sha256,
    done: Vec<Digest>,
}

impl Sink for Digests {
    type Error = ImageError;

    fn begin(&mut self, _: u64) -> Result<(), ImageError> {
        Ok(())
    }

    fn data(&mut self, data: &[u8]) -> Result<(), ImageError> {
        self.hasher.update(data);
        Ok(())
    }

    fn hole(&mut self, len: u64) -> Result<(), ImageError> {
        self.hasher.update(vec![0; len as usize]);
        Ok(())
    }

    fn end(&mut self) -> Result<(), ImageError> {
        let digest = self.hasher.finalize_reset();
        self.done.push(Digest::from_bytes(digest.into()));
        Ok(())
    }

    fn digests(&mut self) -> Result<Vec<Digest>, ImageError> {
        Ok(std::mem::take(&mut self.done))
    }
}
