//! [`LayerSource`]: reads ranges of decoded layers, from spans that are fetched, decoded and
//! verified one by one.
//!
//! A read is cut into spans. What is not decoded yet is fetched, adjacent spans in one request,
//! decoded on the blocking pool, at most as many at once as there are processors, and kept for a
//! while in the [`Memory`] of the process, since the small files of a layer lie many in one span. A
//! span that is on its way is fetched once, whoever wants it; it is given up when nobody does any more.
//!
//! Invariants: no byte is given of a span whose digest was not verified; besides [`Memory`] a reader
//! holds a few spans of usual size, or what it reads of a large one. Nothing here survives a crash or
//! needs to. Called by `fetch`, as any [`Source`].

mod cache;

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    ops::Range,
    sync::Arc,
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};
use parking_lot::RwLock;

pub(super) use self::cache::Cache;
use self::cache::{Flight, Landing};
use super::{EntryKind, FileContent, ImageError, LayerIndex, Memory};
use crate::{
    digest::Digest,
    metrics,
    reference::Reference,
    source::{ByteStream, Layered, Source, SourceError, SourceErrorKind},
    tree::{Artifact, Location},
};

/// Decoded bytes that are asked for in one request.
const BATCH: u64 = 8 << 20;
/// Of a span that is larger, a reader keeps what it reads, and not all.
const KEPT_WHOLE: usize = 4 << 20;
/// What holes are read from.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A source of ranges of decoded layers, over a source of their blobs; everything else it leaves
/// to that one.
pub struct LayerSource {
    shared: Arc<Shared>,
    layers: RwLock<HashMap<Digest, Arc<Layer>>>,
}

struct Shared {
    inner: Arc<dyn Source>,
    memory: Arc<Memory>,
}

struct Layer {
    index: Arc<LayerIndex>,
    /// Tells the spans of this index from those of an earlier one of the same layer.
    number: u64,
}

/// Part of a read.
enum Part {
    Zeros(u64),
    /// Of the decoded layer.
    Data(Range<u64>),
}

impl fmt::Debug for LayerSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layers = self.layers.read();
        f.debug_struct("LayerSource")
            .field("inner", &self.shared.inner)
            .field("layers", &layers.keys().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl LayerSource {
    /// Reads the blobs of layers from `inner`, at locations whose path is their digest; decodes them in `memory`.
    pub fn new(inner: Arc<dyn Source>, memory: Arc<Memory>) -> Self {
        Self {
            shared: Arc::new(Shared { inner, memory }),
            layers: RwLock::default(),
        }
    }

    /// Makes the locations of `index` readable, instead of those of another index of the layer.
    ///
    /// # Errors
    /// [`super::ImageErrorKind::Unsupported`] for a layer that can only be decoded from its start,
    /// Invalid for an index that can be of no layer.
    pub fn add(&self, index: Arc<LayerIndex>) -> Result<(), ImageError> {
        index.check()?;
        if !index.is_seekable() {
            let why = "parts of it are too large to be decoded by themselves";
            return Err(ImageError::unsupported(why).in_layer(index.blob));
        }
        let layer = Layer {
            number: self.shared.memory.cache.number(),
            index,
        };
        let blob = layer.index.blob;
        self.layers.write().insert(blob, Arc::new(layer));
        Ok(())
    }

    /// The index of a layer that was added.
    pub fn index(&self, blob: &Digest) -> Option<Arc<LayerIndex>> {
        let layers = self.layers.read();
        layers.get(blob).map(|layer| Arc::clone(&layer.index))
    }

    /// The layer of a location, and the parts of a range there.
    fn parts(
        &self,
        location: &Location,
        blob: &str,
        rest: &str,
        range: Range<u64>,
    ) -> Result<(Arc<Layer>, VecDeque<Part>), SourceError> {
        let error = |kind, why: &str| SourceError::new(kind, format!("layer {blob}"), why);
        let invalid = |why: &str| error(SourceErrorKind::Invalid, why);
        let digest = blob.parse::<Digest>();
        let digest = digest.map_err(|_| invalid("its location has no digest"))?;
        let layer = self.layers.read().get(&digest).cloned();
        let layer = layer.ok_or_else(|| invalid("no index of it was added"))?;
        let index = &layer.index;
        if location.generation != Some(index.generation()) {
            let why = "its index is not the one that this location is of";
            return Err(error(SourceErrorKind::Changed, why));
        }
        let (compression, entry) = match rest.split_once('@') {
            Some((compression, entry)) => (compression, Some(entry)),
            None => (rest, None),
        };
        if compression != index.compression.name() {
            return Err(invalid("it is compressed otherwise than its location says"));
        }
        let parts = match entry {
            None if range.end > index.size => {
                return Err(invalid("the range goes beyond its end"));
            }
            None if range.is_empty() => VecDeque::new(),
            None => VecDeque::from([Part::Data(range)]),
            Some(entry) => {
                let entry = entry.parse::<usize>().ok();
                let entry = entry.and_then(|at| index.entries.get(at));
                match entry.map(|entry| &entry.kind) {
                    Some(EntryKind::File(content)) if range.end <= content.size => {
                        sparse_parts(content, range)
                    }
                    _ => return Err(invalid("its location names no file with such a range")),
                }
            }
        };
        Ok((layer, parts))
    }
}

/// What a range of a sparse file is made of.
fn sparse_parts(content: &FileContent, range: Range<u64>) -> VecDeque<Part> {
    let mut parts = VecDeque::new();
    let mut next = range.start;
    let mut offset = content.offset;
    for &(start, len) in &content.pieces {
        let data = start.max(range.start)..(start + len).min(range.end);
        if data.start < data.end {
            if data.start > next {
                parts.push_back(Part::Zeros(data.start - next));
            }
            let at = offset + (data.start - start);
            parts.push_back(Part::Data(at..at + (data.end - data.start)));
            next = data.end;
        }
        offset += len;
    }
    if next < range.end {
        parts.push_back(Part::Zeros(range.end - next));
    }
    parts
}

#[async_trait::async_trait]
impl Source for LayerSource {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        self.shared.inner.resolve(reference).await
    }

    fn origin(&self) -> String {
        self.shared.inner.origin()
    }

    fn waits_for_objects(&self) -> bool {
        self.shared.inner.waits_for_objects()
    }

    async fn layered(&self, reference: &Reference) -> Result<Option<Layered>, SourceError> {
        self.shared.inner.layered(reference).await
    }

    async fn read(
        &self,
        location: &Location,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        let Some((blob, rest)) = location.path.split_once('#') else {
            return self.shared.inner.read(location, range).await;
        };
        if !blob.starts_with("sha256:") {
            return self.shared.inner.read(location, range).await;
        }
        let (layer, parts) = self.parts(location, blob, rest, range)?;
        let reader = Reader {
            shared: Arc::clone(&self.shared),
            layer,
            parts,
            ahead: VecDeque::new(),
            current: None,
        };
        let stream = stream::try_unfold(reader, |mut reader| async move {
            let next = reader.next().await?;
            Ok(next.map(|bytes| (bytes, reader)))
        });
        Ok(stream.boxed())
    }
}

/// A read under way.
struct Reader {
    shared: Arc<Shared>,
    layer: Arc<Layer>,
    /// What is left of it.
    parts: VecDeque<Part>,
    /// Spans that were asked for, in order.
    ahead: VecDeque<(usize, Flight)>,
    /// The span that is being read.
    current: Option<(usize, Bytes)>,
}

impl Reader {
    async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        match self.parts.front_mut() {
            None => Ok(None),
            Some(Part::Zeros(left)) => {
                let len = (*left).min(ZEROS.len() as u64);
                *left -= len;
                if *left == 0 {
                    self.parts.pop_front();
                }
                Ok(Some(Bytes::from_static(&ZEROS[..len as usize])))
            }
            Some(Part::Data(range)) => {
                let start = range.start;
                let (bytes, span) = self.span_at(start).await?;
                let Some(Part::Data(range)) = self.parts.front_mut() else {
                    return Ok(None);
                };
                let end = range.end.min(bytes.end);
                range.start = end;
                if range.is_empty() {
                    self.parts.pop_front();
                }
                let within = (start - bytes.start) as usize..(end - bytes.start) as usize;
                let goes_on = self.parts.iter().find_map(|part| match part {
                    Part::Data(range) => Some(range.start < bytes.end),
                    Part::Zeros(_) => None,
                });
                if goes_on != Some(true) {
                    self.current = None;
                }
                Ok(Some(match span.len() > KEPT_WHOLE {
                    true => Bytes::copy_from_slice(&span[within]),
                    false => span.slice(within),
                }))
            }
        }
    }

    /// The span with the byte `offset`, and which bytes it has.
    async fn span_at(&mut self, offset: u64) -> Result<(Range<u64>, Bytes), SourceError> {
        let at = self.layer.span_of(offset);
        let bytes = self.layer.index.span_bytes(at);
        if let Some((current, span)) = &self.current
            && *current == at
        {
            return Ok((bytes, span.clone()));
        }
        self.current = None;
        self.ask(at);
        let flight = self.ahead.pop_front().filter(|(ahead, _)| *ahead == at);
        let Some((_, flight)) = flight else {
            let why = "its spans are not in order";
            let what = format!("layer {}", self.layer.index.blob);
            return Err(SourceError::new(SourceErrorKind::Invalid, what, why));
        };
        let span = flight.land().await?;
        self.current = Some((at, span.clone()));
        Ok((bytes, span))
    }

    /// Asks for what is needed from span `at` on, if little of it is on its way.
    fn ask(&mut self, at: usize) {
        let index = Arc::clone(&self.layer.index);
        let first = self.ahead.back().map_or(at, |(last, _)| last + 1);
        let asked = index.span_bytes(at).start..index.spans[first.min(index.spans.len() - 1)].start;
        if !self.ahead.is_empty() && asked.end - asked.start > BATCH / 2 {
            return;
        }
        // Those that follow each other and hold what this read is of.
        let mut end = first;
        let mut bytes = 0;
        'parts: for part in &self.parts {
            let Part::Data(range) = part else { continue };
            let from = self.layer.span_of(range.start).max(end);
            for span in from..=self.layer.span_of(range.end - 1) {
                if span > end || bytes >= BATCH {
                    break 'parts;
                }
                let within = index.span_bytes(span);
                bytes += within.end - within.start;
                end = span + 1;
            }
        }
        if end > first {
            let flights = self.shared.start(&self.layer, first..end);
            self.ahead.extend((first..end).zip(flights));
        }
    }
}

impl Layer {
    /// The span with the byte `offset`, which is in the layer.
    fn span_of(&self, offset: u64) -> usize {
        let spans = &self.index.spans;
        spans.partition_point(|span| span.start <= offset) - 1
    }
}

impl Shared {
    /// Sees to it that these spans come.
    fn start(self: &Arc<Self>, layer: &Arc<Layer>, spans: Range<usize>) -> VecDeque<Flight> {
        let (flights, missing) = self.memory.cache.start(layer.number, spans);
        let mut run: Vec<Landing> = Vec::new();
        for landing in missing {
            if run
                .last()
                .is_some_and(|last| last.span() + 1 != landing.span())
            {
                self.fetch(layer, std::mem::take(&mut run));
            }
            run.push(landing);
        }
        if !run.is_empty() {
            self.fetch(layer, run);
        }
        flights
    }

    /// Fetches a run of adjacent spans.
    fn fetch(self: &Arc<Self>, layer: &Arc<Layer>, run: Vec<Landing>) {
        let (shared, layer) = (Arc::clone(self), Arc::clone(layer));
        tokio::spawn(async move {
            let mut run = VecDeque::from(run);
            if let Err(error) = shared.fetch_run(&layer, &mut run).await {
                for landing in run {
                    landing.fail(&error);
                }
            }
        });
    }

    /// Takes each span out of `run` for which it got all bytes.
    async fn fetch_run(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        run: &mut VecDeque<Landing>,
    ) -> Result<(), SourceError> {
        let (Some(first), Some(last)) = (run.front(), run.back()) else {
            return Ok(());
        };
        let index = &layer.index;
        let start = index.span_blob_bytes(first.span()).start;
        let range = start..index.span_blob_bytes(last.span()).end;
        let blob = Location {
            path: index.blob.to_string(),
            generation: None,
            offset: 0,
        };
        let mut body = self.inner.read(&blob, range).await?;
        let mut buffer = BytesMut::new();
        // Where the buffer starts in the blob.
        let mut base = start;
        while let Some(landing) = run.front() {
            let at = landing.span();
            let needed = index.span_blob_bytes(at);
            let decoded = index.span_bytes(at);
            // That of zstd, once more, is its window.
            let takes = needed.end - needed.start + 2 * (decoded.end - decoded.start);
            let Some(large) = while_awaited(run, self.memory.large_span(takes)).await else {
                run.clear();
                return Ok(());
            };
            while base + (buffer.len() as u64) < needed.end {
                match while_awaited(run, body.next()).await {
                    Some(Some(bytes)) => buffer.extend_from_slice(&bytes?),
                    Some(None) => return Err(short(&index.blob)),
                    None => {
                        run.clear();
                        return Ok(());
                    }
                }
            }
            let mut compressed = buffer.split_to((needed.end - base) as usize);
            // The next one may begin within the last byte of this one.
            let last = compressed.last().copied();
            compressed.advance((needed.start - base) as usize);
            base = needed.end;
            if let Some(last) = last {
                let mut rest = BytesMut::with_capacity(buffer.len() + 1);
                rest.put_u8(last);
                rest.extend_from_slice(&buffer);
                (buffer, base) = (rest, base - 1);
            }
            let permit = match large {
                None => self.memory.span(takes).await,
                large => large,
            };
            let Some(landing) = run.pop_front() else {
                break;
            };
            let layer = Arc::clone(layer);
            tokio::task::spawn_blocking(move || {
                landing.land(layer.decode(at, &compressed));
                drop((compressed, permit));
            });
        }
        Ok(())
    }
}

/// What `work` gives; `None` once nobody waits for any of `run`: then it must not keep memory that others wait for.
async fn while_awaited<T>(run: &VecDeque<Landing>, work: impl Future<Output = T>) -> Option<T> {
    let mut work = std::pin::pin!(work);
    while run.iter().any(Landing::is_awaited) {
        let given_up = async {
            for landing in run {
                landing.given_up().await;
            }
        };
        tokio::select! {
            biased;
            done = &mut work => return Some(done),
            () = given_up => {}
        }
    }
    None
}

impl Layer {
    fn decode(&self, span: usize, compressed: &[u8]) -> Result<Bytes, SourceError> {
        match self.index.decode_span(span, compressed) {
            Ok(decoded) => {
                let metrics = metrics::global();
                metrics.image_spans_decoded.add(1);
                metrics.image_span_bytes.add(decoded.len() as u64);
                Ok(decoded.into())
            }
            Err(error) => {
                let what = format!("layer {}", self.index.blob);
                Err(
                    SourceError::new(SourceErrorKind::Corrupt, what, "a span of it is wrong")
                        .because(error),
                )
            }
        }
    }
}

fn short(blob: &Digest) -> SourceError {
    let why = "the body ended before the range that was asked for";
    SourceError::new(SourceErrorKind::Corrupt, format!("layer {blob}"), why)
}

#[cfg(test)]
mod tests;
