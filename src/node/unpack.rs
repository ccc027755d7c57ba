//! One layer from its compressed bytes to files in the store and an index.

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::{
    digest::Digest,
    image::{Compression, Decoder, ImageError, LayerIndex, Limits, Sink, Unpacker},
    source::Layer,
    store::{Import, ImportFile, StoreError},
};

/// After this many bytes of files, what has come is made durable and readable.
const COMMIT_EVERY: u64 = 512 << 20;

/// Why a layer could not be unpacked.
#[derive(Debug)]
pub(super) enum UnpackError {
    /// The layer is wrong, or what came of it.
    Image(ImageError),
    /// Its files cannot be kept.
    Store(StoreError),
}

impl From<ImageError> for UnpackError {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl From<StoreError> for UnpackError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// Unpacks a layer whose compressed bytes come in order: its files go into `import`, committed on
/// return; `came` is told what became readable. Blocks.
pub(super) fn unpack(
    layer: &Layer,
    import: &Import,
    mut pieces: mpsc::Receiver<Bytes>,
    came: &mut dyn FnMut(&[Digest]),
) -> Result<LayerIndex, UnpackError> {
    let named = |error: UnpackError| match error {
        UnpackError::Image(error) => UnpackError::Image(error.in_layer(layer.blob)),
        other => other,
    };
    let in_layer = |error: ImageError| UnpackError::Image(error.in_layer(layer.blob));
    let limits = Limits::default();
    let mut files = Files {
        import,
        current: None,
        digests: Vec::new(),
        told: 0,
        uncommitted: 0,
        came,
    };
    let mut unpacker = Unpacker::new(layer.blob, limits);
    let first = pieces.blocking_recv().unwrap_or_default();
    let mut decoder = Decoder::new(Compression::of(&first), limits.bytes).map_err(in_layer)?;
    let mut next = Some(first);
    while let Some(piece) = next {
        let mut out =
            |decoded: Bytes| -> Result<(), UnpackError> { unpacker.feed(&decoded, &mut files) };
        decoder.feed(&piece, &mut out).map_err(named)?;
        next = pieces.blocking_recv();
    }
    let decoded = decoder.finish().map_err(in_layer)?;
    if decoded.blob_size != layer.size {
        // Whoever fed it has failed, and knows why.
        return Err(in_layer(ImageError::invalid("not all of it came")));
    }
    if let Some(diff_id) = layer.diff_id
        && diff_id != decoded.diff_id
    {
        let found = decoded.diff_id;
        let why = format!("it unpacks to {found}, the image's configuration says {diff_id}");
        return Err(in_layer(ImageError::corrupt(why)));
    }
    let entries = unpacker.finish(&mut files)?;
    files.commit()?;
    Ok(decoded.into_index(layer.blob, entries))
}

/// Takes the files of a layer into the store.
struct Files<'i> {
    import: &'i Import,
    current: Option<ImportFile>,
    digests: Vec<Digest>,
    /// Of these, how many `came` was told.
    told: usize,
    uncommitted: u64,
    came: &'i mut dyn FnMut(&[Digest]),
}

impl Files<'_> {
    fn commit(&mut self) -> Result<(), StoreError> {
        self.import.commit()?;
        (self.came)(&self.digests[self.told..]);
        self.told = self.digests.len();
        self.uncommitted = 0;
        Ok(())
    }
}

impl Sink for Files<'_> {
    type Error = UnpackError;

    fn begin(&mut self, size: u64) -> Result<(), UnpackError> {
        self.current = Some(self.import.begin(size)?);
        Ok(())
    }

    fn data(&mut self, data: &[u8]) -> Result<(), UnpackError> {
        match &mut self.current {
            Some(file) => Ok(file.write(data)?),
            None => Ok(()),
        }
    }

    fn hole(&mut self, len: u64) -> Result<(), UnpackError> {
        match &mut self.current {
            Some(file) => Ok(file.hole(len)?),
            None => Ok(()),
        }
    }

    fn end(&mut self) -> Result<(), UnpackError> {
        if let Some(file) = self.current.take() {
            let (digest, size) = file.finish()?;
            self.digests.push(digest);
            self.uncommitted += size;
            if self.uncommitted >= COMMIT_EVERY {
                self.commit()?;
            }
        }
        Ok(())
    }

    fn digests(&mut self) -> Result<Vec<Digest>, UnpackError> {
        Ok(self.digests.clone())
    }
}
