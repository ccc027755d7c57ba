//! One layer from its compressed bytes to files in the store and an index.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::{
    digest::Digest,
    image::{
        Compression, Decoded, Decoder, ImageError, LayerIndex, Limits, Memory, Sink, Unpacker,
    },
    source::Layer,
    store::{Import, ImportFile, StoreError},
};

/// After this many bytes of files, what has come is made durable and readable.
const COMMIT_EVERY: u64 = 512 << 20;

/// Events between decoding and writing; each holds a block of at most 256 KiB.
const EVENTS_AHEAD: usize = 32;

/// Why a layer could not be unpacked.
#[derive(Debug)]
pub(super) enum UnpackError {
    /// The layer is wrong, or what came of it.
    Image(ImageError),
    /// Its files cannot be kept.
    Store(StoreError),
    /// It unpacks to this, and not to what the image says of it.
    DiffId(Digest),
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
/// return; `came` is told what became readable, and what comes with `memory` is called before it is waited for
/// that. Blocks. Decoding goes on in this thread, hashing and writing of the files in another.
pub(super) fn unpack(
    layer: &Layer,
    import: &Import,
    pieces: mpsc::Receiver<Bytes>,
    memory: (&Arc<Memory>, impl FnMut() + Send + 'static),
    came: &mut (dyn FnMut(&[Digest]) + Send),
) -> Result<LayerIndex, UnpackError> {
    let (send, events) = std::sync::mpsc::sync_channel(EVENTS_AHEAD);
    std::thread::scope(|scope| {
        let writer = std::thread::Builder::new().name("hearth-write".into());
        let mut files = Files {
            import,
            current: None,
            digests: Vec::new(),
            told: 0,
            uncommitted: 0,
            came,
        };
        let writing = writer
            .spawn_scoped(scope, move || files.take(&events))
            .map_err(|error| StoreError::io("the files of a layer", &error))?;
        let mut sink = Sender {
            events: send,
            block: Bytes::new(),
        };
        let decoded = decode(layer, pieces, memory, &mut sink);
        // The writer ends when there is nothing more to come; what it says goes first.
        drop(sink);
        let digests = match writing.join() {
            Ok(written) => written?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let (decoded, unpacker) = decoded?;
        let entries = unpacker.finish(&mut Written(digests))?;
        Ok(decoded.into_index(layer.blob, entries))
    })
}

/// Decodes a layer to its end, and checks that it is the one that was meant.
fn decode(
    layer: &Layer,
    mut pieces: mpsc::Receiver<Bytes>,
    (memory, waits): (&Arc<Memory>, impl FnMut() + Send + 'static),
    sink: &mut Sender,
) -> Result<(Decoded, Unpacker), UnpackError> {
    let named = |error: UnpackError| match error {
        UnpackError::Image(error) => UnpackError::Image(error.in_layer(layer.blob)),
        other => other,
    };
    let in_layer = |error: ImageError| named(UnpackError::Image(error));
    let limits = Limits::default();
    let mut unpacker = Unpacker::new(layer.blob, limits);
    let first = pieces.blocking_recv().unwrap_or_default();
    let decoder = Decoder::new(Compression::of(&first), limits.bytes).map_err(in_layer)?;
    let mut decoder = decoder.within(memory, waits);
    // What comes is not verified yet. Where nobody says what it unpacks to, its own digest has to tell.
    if layer.diff_id.is_none() {
        decoder = decoder.hashing_blob();
    }
    let mut next = Some(first);
    while let Some(piece) = next {
        let mut out = |block: Bytes| -> Result<(), UnpackError> {
            sink.block = block.clone();
            unpacker.feed(&block, sink)
        };
        decoder.feed(&piece, &mut out).map_err(named)?;
        next = pieces.blocking_recv();
    }
    sink.block = Bytes::new();
    let decoded = decoder.finish().map_err(in_layer)?;
    if decoded.blob_size != layer.size {
        // Whoever fed it has failed, and knows why.
        return Err(in_layer(ImageError::invalid("not all of it came")));
    }
    if let Some(found) = decoded.blob.filter(|found| *found != layer.blob) {
        let why = format!("what came of it has the digest {found}");
        return Err(in_layer(ImageError::corrupt(why)));
    }
    if let Some(diff_id) = layer.diff_id
        && diff_id != decoded.diff_id
    {
        return Err(UnpackError::DiffId(decoded.diff_id));
    }
    sink.send(Event::Done)?;
    Ok((decoded, unpacker))
}

/// What happens to the files of a layer, in order.
enum Event {
    Begin(u64),
    Data(Bytes),
    Hole(u64),
    End,
    Whole(Bytes),
    /// The layer is what it should be: its files count.
    Done,
}

/// Passes what the unpacker finds to the thread that writes.
struct Sender {
    events: std::sync::mpsc::SyncSender<Event>,
    /// What is being unpacked.
    block: Bytes,
}

impl Sender {
    fn send(&self, event: Event) -> Result<(), UnpackError> {
        self.events.send(event).map_err(|_| {
            // The writer has failed, and says why.
            UnpackError::Image(ImageError::invalid("its files could not be written"))
        })
    }
}

impl Sink for Sender {
    type Error = UnpackError;

    fn begin(&mut self, size: u64) -> Result<(), UnpackError> {
        self.send(Event::Begin(size))
    }

    fn data(&mut self, data: &[u8]) -> Result<(), UnpackError> {
        self.send(Event::Data(self.block.slice_ref(data)))
    }

    fn hole(&mut self, len: u64) -> Result<(), UnpackError> {
        self.send(Event::Hole(len))
    }

    fn end(&mut self) -> Result<(), UnpackError> {
        self.send(Event::End)
    }

    fn whole(&mut self, content: &[u8]) -> Result<(), UnpackError> {
        self.send(Event::Whole(match content.is_empty() {
            true => Bytes::new(),
            false => self.block.slice_ref(content),
        }))
    }

    fn digests(&mut self) -> Result<Vec<Digest>, UnpackError> {
        Ok(Vec::new())
    }
}

/// Knows the digests of what was written.
struct Written(Vec<Digest>);

impl Sink for Written {
    type Error = UnpackError;

    fn begin(&mut self, _: u64) -> Result<(), UnpackError> {
        Ok(())
    }

    fn data(&mut self, _: &[u8]) -> Result<(), UnpackError> {
        Ok(())
    }

    fn hole(&mut self, _: u64) -> Result<(), UnpackError> {
        Ok(())
    }

    fn end(&mut self) -> Result<(), UnpackError> {
        Ok(())
    }

    fn digests(&mut self) -> Result<Vec<Digest>, UnpackError> {
        Ok(std::mem::take(&mut self.0))
    }
}

/// Takes the files of a layer into the store.
struct Files<'i> {
    import: &'i Import,
    current: Option<ImportFile>,
    digests: Vec<Digest>,
    /// Of these, how many `came` was told.
    told: usize,
    uncommitted: u64,
    came: &'i mut (dyn FnMut(&[Digest]) + Send),
}

impl Files<'_> {
    /// Until the end of the layer; the digests of its files, which are committed then.
    fn take(
        &mut self,
        events: &std::sync::mpsc::Receiver<Event>,
    ) -> Result<Vec<Digest>, StoreError> {
        for event in events {
            match (event, &mut self.current) {
                (Event::Begin(size), current) => *current = Some(self.import.begin(size)?),
                (Event::Data(data), Some(file)) => file.write(&data)?,
                (Event::Hole(len), Some(file)) => file.hole(len)?,
                (Event::End, current) => {
                    if let Some(file) = current.take() {
                        self.end(file)?;
                    }
                }
                (Event::Whole(content), _) => {
                    let mut file = self.import.begin(content.len() as u64)?;
                    file.write(&content)?;
                    self.end(file)?;
                }
                (Event::Done, _) => self.commit()?,
                (Event::Data(_) | Event::Hole(_), None) => {}
            }
        }
        Ok(std::mem::take(&mut self.digests))
    }

    fn end(&mut self, file: ImportFile) -> Result<(), StoreError> {
        let (digest, size) = file.finish()?;
        self.digests.push(digest);
        self.uncommitted += size;
        match self.uncommitted >= COMMIT_EVERY {
            true => self.commit(),
            false => Ok(()),
        }
    }

    fn commit(&mut self) -> Result<(), StoreError> {
        self.import.commit()?;
        (self.came)(&self.digests[self.told..]);
        self.told = self.digests.len();
        self.uncommitted = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    fn unpacked(layer: &Layer, bytes: &[u8]) -> Result<LayerIndex, UnpackError> {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &Default::default()).unwrap();
        let import = store.import().unwrap();
        let (send, pieces) = mpsc::channel(1);
        send.try_send(Bytes::copy_from_slice(bytes)).unwrap();
        drop(send);
        let memory = (&Memory::new(0), || ());
        unpack(layer, &import, pieces, memory, &mut |_| {})
    }

    /// What comes while it is fetched may be wrong and yet an archive.
    #[test]
    fn wrong_bytes_are_no_layer() {
        let right = [0; 2048];
        let mut wrong = right;
        wrong[1500] = 1;
        let mut layer = Layer {
            blob: Digest::of(&right),
            size: right.len() as u64,
            media_type: String::new(),
            diff_id: None,
            annotations: Default::default(),
            as_file: None,
        };
        unpacked(&layer, &right).unwrap();
        let refused = unpacked(&layer, &wrong).unwrap_err();
        let UnpackError::Image(error) = refused else {
            panic!("{refused:?}");
        };
        let found = Digest::of(&wrong).to_string();
        assert!(error.to_string().contains(&found), "{error}");

        layer.diff_id = Some(Digest::of(&right));
        unpacked(&layer, &right).unwrap();
        let refused = unpacked(&layer, &wrong);
        assert!(matches!(refused, Err(UnpackError::DiffId(found)) if found == Digest::of(&wrong)));
    }
}
