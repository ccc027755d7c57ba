use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures_util::FutureExt as _;
use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;
use crate::{
    image::{Compression, Decoder, LayerEntry, samples},
    tree::Meta,
};

/// Blobs, and what was asked of them.
#[derive(Debug, Default)]
struct Blobs {
    blobs: Mutex<HashMap<String, Bytes>>,
    requests: Mutex<Vec<Range<u64>>>,
    bytes: AtomicU64,
    /// Bodies end after this many bytes, if it is not 0.
    short: AtomicU64,
    /// Bodies never end.
    stalls: AtomicBool,
}

#[async_trait::async_trait]
impl Source for Blobs {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        let what = reference.to_string();
        Err(SourceError::new(
            SourceErrorKind::NotFound,
            what,
            "not here",
        ))
    }

    fn origin(&self) -> String {
        "oci://registry/a".into()
    }

    async fn read(
        &self,
        location: &Location,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        let blob = self.blobs.lock()[&location.path].clone();
        self.requests.lock().push(range.clone());
        self.bytes
            .fetch_add(range.end - range.start, Ordering::Relaxed);
        let mut body = blob.slice(range.start as usize..range.end as usize);
        match self.short.load(Ordering::Relaxed) as usize {
            0 => {}
            most => body.truncate(most),
        }
        let frames: Vec<_> = body
            .chunks(50_000)
            .map(Bytes::copy_from_slice)
            .map(Ok)
            .collect();
        let frames = stream::iter(frames);
        Ok(match self.stalls.load(Ordering::Relaxed) {
            true => frames.take(1).chain(stream::pending()).boxed(),
            false => frames.boxed(),
        })
    }
}

impl Blobs {
    fn requests(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut *self.requests.lock())
    }
}

struct Bed {
    blobs: Arc<Blobs>,
    source: LayerSource,
    index: Arc<LayerIndex>,
    blob: Vec<u8>,
}

fn file(path: &str, size: u64, offset: u64, pieces: Vec<(u64, u64)>) -> LayerEntry {
    LayerEntry {
        path: path.as_bytes().into(),
        kind: EntryKind::File(FileContent {
            size,
            digest: Digest::of(path.as_bytes()),
            offset,
            pieces,
        }),
        meta: Meta::file(0),
    }
}

fn index_of(compression: Compression, blob: &[u8], entries: Vec<LayerEntry>) -> LayerIndex {
    let mut decoder = Decoder::new(compression, 1 << 30).unwrap();
    let fed = decoder.feed(blob, &mut |_| Ok::<_, ImageError>(()));
    fed.unwrap();
    let decoded = decoder.finish().unwrap();
    decoded.into_index(Digest::of(blob), entries)
}

impl Bed {
    fn new(
        compression: Compression,
        blob: Vec<u8>,
        entries: Vec<LayerEntry>,
        cache: usize,
    ) -> Self {
        let index = index_of(compression, &blob, entries);
        // What is used was written and read.
        let index = Arc::new(LayerIndex::decode(&index.encode().unwrap()).unwrap());
        let blobs = Arc::new(Blobs::default());
        let served = Bytes::from(blob.clone());
        blobs.blobs.lock().insert(index.blob.to_string(), served);
        let source = LayerSource::new(Arc::clone(&blobs) as Arc<dyn Source>, Memory::new(cache));
        source.add(Arc::clone(&index)).unwrap();
        Self {
            blobs,
            source,
            index,
            blob,
        }
    }

    /// What the origin has from now on.
    fn serve(&self, blob: Vec<u8>) {
        let path = self.index.blob.to_string();
        self.blobs.blobs.lock().insert(path, blob.into());
    }

    fn location(&self) -> Location {
        Location {
            path: format!("{}#{}", self.index.blob, self.index.compression.name()),
            generation: Some(self.index.generation()),
            offset: 0,
        }
    }

    async fn read(&self, location: &Location, range: Range<u64>) -> Result<Vec<u8>, SourceError> {
        let mut stream = self.source.read(location, range).await?;
        let mut out = Vec::new();
        while let Some(bytes) = stream.next().await {
            out.extend_from_slice(&bytes?);
        }
        Ok(out)
    }
}

fn content() -> Vec<u8> {
    let mut data = samples::text(3 << 20);
    data.extend(samples::noise(1 << 20, 3));
    data.extend(samples::text(2 << 20));
    data
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(future)
}

#[test]
fn any_range_is_that_of_the_decoded_layer() {
    let data = content();
    let members = data.chunks(700_001).map(|part| samples::gzip(part, 6));
    let frames = data
        .chunks(700_001)
        .map(|part| zstd::encode_all(part, 1).unwrap());
    let blobs = [
        (Compression::Gzip, samples::gzip(&data, 6)),
        (Compression::Gzip, members.collect::<Vec<_>>().concat()),
        (Compression::Zstd, frames.collect::<Vec<_>>().concat()),
        (Compression::None, data.clone()),
    ];
    block_on(async {
        for (compression, blob) in blobs {
            // With a cache that holds two spans or so, each range is fetched by itself.
            let bed = Bed::new(compression, blob, Vec::new(), 3 << 20);
            let location = bed.location();
            let all = bed.read(&location, 0..data.len() as u64).await.unwrap();
            assert!(all == data);
            // Adjacent spans were asked for together.
            let asked = bed.blobs.requests().len();
            assert!(asked <= 3, "{asked} requests");
            assert!(bed.blobs.bytes.load(Ordering::Relaxed) <= bed.blob.len() as u64 + 3);
            let mut seed = 1u64;
            for _ in 0..60 {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                let start = (seed >> 8) as usize % data.len();
                let longest = [10, 5000, 3 << 20][(seed % 3) as usize];
                let end = data.len().min(start + 1 + (seed >> 20) as usize % longest);
                bed.blobs.bytes.store(0, Ordering::Relaxed);
                let range = start as u64..end as u64;
                let found = bed.read(&location, range.clone()).await.unwrap();
                assert!(found == data[start..end], "{compression:?} {range:?}");
                // Nothing but the spans that hold the range was fetched.
                let spans = (0..bed.index.spans.len()).filter(|at| {
                    let bytes = bed.index.span_bytes(*at);
                    bytes.start < range.end && range.start < bytes.end
                });
                let needed: u64 = spans
                    .map(|at| {
                        let bytes = bed.index.span_blob_bytes(at);
                        bytes.end - bytes.start
                    })
                    .sum();
                assert!(bed.blobs.bytes.load(Ordering::Relaxed) <= needed);
            }
        }
    });
}

#[test]
fn a_span_is_fetched_once_and_kept() {
    block_on(async {
        let data = content();
        let entries = vec![
            file("a", 1000, 512, vec![]),
            file("b", 5000, 2048, vec![]),
            file("empty", 0, 7168, vec![]),
            file("large", 4 << 20, 8192, vec![]),
            file("sparse", 9 << 30, 3 << 20, vec![(5, 7), (8 << 30, 2 << 20)]),
        ];
        let bed = Bed::new(
            Compression::Gzip,
            samples::gzip(&data, 6),
            entries,
            32 << 20,
        );
        bed.source.add(Arc::clone(&bed.index)).unwrap();
        let location = bed.location();
        let reads = (0..20).map(|at| bed.read(&location, 100 * at..100 * at + 5000));
        let reads = futures_util::future::join_all(reads).await;
        for (at, read) in reads.into_iter().enumerate() {
            assert!(read.unwrap() == data[100 * at..100 * at + 5000]);
        }
        assert_eq!(bed.blobs.requests(), [bed.index.span_blob_bytes(0)]);
        // The holes of a sparse file cost nothing.
        let EntryKind::File(sparse) = &bed.index.entries[4].kind else {
            unreachable!()
        };
        let location = bed.index.location(4, sparse);
        let holes = bed.read(&location, 1 << 20..2 << 20).await.unwrap();
        assert!(holes == vec![0; 1 << 20]);
        assert!(bed.blobs.requests().is_empty());
        let start = bed.read(&location, 3..20).await.unwrap();
        let at = 3 << 20;
        assert_eq!(start[..2], [0; 2]);
        assert_eq!(start[2..9], data[at..at + 7]);
        assert_eq!(start[9..], [0; 8]);
        let far = (8u64 << 30) - 10..(8 << 30) + (2 << 20) + 10;
        let far = bed.read(&location, far).await.unwrap();
        assert!(far[10..far.len() - 10] == data[at + 7..at + 7 + (2 << 20)]);
        assert_eq!(far.len(), (2 << 20) + 20);
    });
}

#[test]
fn what_is_wrong_is_never_given() {
    let data = content();
    let bed = Bed::new(Compression::Gzip, samples::gzip(&data, 6), Vec::new(), 0);
    let location = bed.location();
    let mut seed = 99u64;
    block_on(async {
        for _ in 0..80 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let mut blob = bed.blob.clone();
            let at = (seed >> 8) as usize % blob.len();
            blob[at] ^= 1 << (seed & 7);
            bed.serve(blob);
            let span = (0..bed.index.spans.len())
                .find(|span| bed.index.span_blob_bytes(*span).end > at as u64)
                .unwrap();
            let range = bed.index.span_bytes(span);
            let within = range.start as usize..range.end as usize;
            match bed.read(&location, range).await {
                // Bits of headers and of trailers that no content depends on.
                Ok(found) => assert!(found == data[within]),
                Err(error) => {
                    assert_eq!(error.kind(), SourceErrorKind::Corrupt);
                    assert!(
                        error.to_string().contains(&bed.index.blob.to_string()),
                        "{error}"
                    );
                }
            }
        }
        bed.serve(bed.blob.clone());
        bed.blobs.short.store(1000, Ordering::Relaxed);
        let error = bed.read(&location, 0..10).await.unwrap_err();
        assert!(error.to_string().contains("ended before"), "{error}");
        bed.blobs.short.store(0, Ordering::Relaxed);
        assert!(bed.read(&location, 0..10).await.is_ok());
    });
}

#[test]
fn locations_of_something_else_are_refused() {
    block_on(async {
        let data = samples::text(10_000);
        let bed = Bed::new(
            Compression::Gzip,
            samples::gzip(&data, 6),
            Vec::new(),
            1 << 20,
        );
        let good = bed.location();
        let read = |change: fn(&mut Location)| {
            let mut location = good.clone();
            change(&mut location);
            let bed = &bed;
            async move {
                bed.read(&location, 0..10)
                    .await
                    .map_err(|error| error.kind())
            }
        };
        assert_eq!(read(|_| {}).await, Ok(data[..10].to_vec()));
        let invalid = Err(SourceErrorKind::Invalid);
        assert_eq!(
            read(|l| l.path = l.path.replace("gzip", "zstd")).await,
            invalid
        );
        assert_eq!(read(|l| l.path.push_str("@0")).await, invalid);
        assert_eq!(read(|l| l.path.insert(8, '0')).await, invalid);
        let other = |l: &mut Location| l.path = format!("{}#gzip", Digest::of(b"other"));
        assert_eq!(read(other).await, invalid);
        let changed = Err(SourceErrorKind::Changed);
        assert_eq!(read(|l| l.generation = None).await, changed);
        assert_eq!(read(|l| l.generation = Some("1".into())).await, changed);
        let beyond = bed.read(&good, 9_999..10_001).await.unwrap_err();
        assert_eq!(beyond.kind(), SourceErrorKind::Invalid);
        // Everything else is for the inner source.
        let blob = Location {
            path: bed.index.blob.to_string(),
            generation: None,
            offset: 0,
        };
        let raw = bed.read(&blob, 0..10).await.unwrap();
        assert_eq!(raw, bed.blob[..10]);
    });
}

#[test]
fn a_layer_that_cannot_be_entered_is_refused() {
    let data = vec![7; (crate::image::MAX_SPAN + 1) as usize];
    let blob = zstd::encode_all(&data[..], 1).unwrap();
    let index = index_of(Compression::Zstd, &blob, Vec::new());
    assert!(!index.is_seekable());
    let source = LayerSource::new(Arc::<Blobs>::default(), Memory::new(0));
    let error = source.add(Arc::new(index)).unwrap_err();
    assert_eq!(error.kind(), crate::image::ImageErrorKind::Unsupported);
}

#[test]
fn a_reader_that_goes_away_stops_the_fetch() {
    block_on(async {
        let data = samples::noise(6 << 20, 5);
        let bed = Bed::new(Compression::None, data.clone(), Vec::new(), 32 << 20);
        let location = bed.location();
        let mut stream = bed
            .source
            .read(&location, 0..data.len() as u64)
            .await
            .unwrap();
        assert!(stream.next().await.unwrap().is_ok());
        drop(stream);
        // And leaves nothing behind that others would wait for.
        for _ in 0..50 {
            match bed.read(&location, 0..data.len() as u64).await {
                Ok(found) => {
                    assert!(found == data);
                    return;
                }
                Err(error) => assert_eq!(error.kind(), SourceErrorKind::Unavailable),
            }
        }
        panic!("nothing came");
    });
}

#[test]
fn a_large_span_that_nobody_waits_for_any_more_keeps_no_memory() {
    block_on(async {
        let blob = zstd::encode_all(&samples::noise(5 << 20, 7)[..], 1).unwrap();
        let bed = Bed::new(Compression::Zstd, blob, Vec::new(), 0);
        assert_eq!(bed.index.spans.len(), 1);
        bed.blobs.stalls.store(true, Ordering::Relaxed);
        let location = bed.location();
        let mut read = Box::pin(bed.read(&location, 0..10));
        let all = || bed.source.shared.memory.large_span(u64::MAX);
        while all().now_or_never().is_some() {
            assert!(futures_util::poll!(&mut read).is_pending());
            tokio::task::yield_now().await;
        }
        drop(read);
        let free = tokio::time::timeout(std::time::Duration::from_secs(60), all());
        assert!(free.await.is_ok());
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn layers_of_any_shape(
        parts in prop::collection::vec((0..1_500_000usize, any::<bool>(), 0..=9i32), 1..6),
        ranges in prop::collection::vec((any::<prop::sample::Index>(), 1..400_000usize), 1..6),
    ) {
        let mut data = Vec::new();
        let mut blob = Vec::new();
        for (len, text, level) in parts {
            let part = match text {
                true => samples::text(len),
                false => samples::noise(len, len as u64),
            };
            blob.extend(samples::gzip(&part, level));
            data.extend(part);
        }
        let bed = Bed::new(Compression::Gzip, blob, Vec::new(), 1 << 20);
        block_on(async {
            for (start, len) in ranges.iter().filter(|_| !data.is_empty()) {
                let start = start.index(data.len());
                let end = data.len().min(start + len);
                let found = bed.read(&bed.location(), start as u64..end as u64).await.unwrap();
                assert!(found == data[start..end]);
            }
        });
    }
}
