//! The fetch engine over a scripted source: every fault, and no wrong byte.

use std::{ops::Range, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use hearth::{
    digest::{Digest, ObjectId},
    fetch::{Class, Config, Engine, FetchErrorKind, Handle, VerifyPolicy},
    reference::Reference,
    source::{ByteStream, Source, SourceError, SourceErrorKind},
    store::{self, Store},
    tree::{Artifact, Location, Object, Recipe},
};

use crate::scripted_source::{Fault, Scripted};

mod origins;
mod slow;

const MIB: usize = 1 << 20;

struct Bed {
    dir: tempfile::TempDir,
    engine: Engine,
    source: Arc<Scripted>,
}

fn config() -> Config {
    Config {
        patience: Duration::from_secs(5),
        stall_timeout: Duration::from_millis(400),
        ..Config::default()
    }
}

impl Bed {
    fn new(source: Scripted) -> Self {
        Self::with(source, config())
    }

    fn with(source: Scripted, config: Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let engine = Engine::new(open(dir.path()), config);
        Self {
            dir,
            engine,
            source: Arc::new(source),
        }
    }

    fn handle(&self) -> Arc<Handle> {
        self.engine
            .open(&self.source.object(), &self.source.source())
            .unwrap()
    }

    fn asked(&self) -> u64 {
        self.source.requests().iter().map(|r| r.end - r.start).sum()
    }

    async fn check_whole(&self) {
        let complete = self.handle().ensure(Class::Warm).await.unwrap();
        assert_eq!(complete.digest, Digest::of(&self.source.data));
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut complete.file(), &mut content).unwrap();
        assert!(
            content == self.source.data,
            "the stored bytes are the origin's"
        );
    }
}

fn open(dir: &std::path::Path) -> Arc<Store> {
    Store::open(
        dir,
        &store::Config {
            min_free: store::ByteSize(0),
            ..Default::default()
        },
    )
    .unwrap()
}

async fn check_read(handle: &Arc<Handle>, source: &Scripted, range: Range<usize>) {
    let data = handle.read(range.start as u64, range.len()).await.unwrap();
    let end = range.end.min(source.data.len());
    assert!(
        data == source.data.slice(range.start.min(end)..end),
        "bytes {range:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_object_is_fetched_once_and_verified() {
    for size in [0, 1, 4096, MIB, MIB + 1, 5 * MIB + 7, 40 * MIB] {
        let bed = Bed::new(Scripted::new(size));
        bed.check_whole().await;
        assert_eq!(bed.asked(), size as u64, "nothing twice");
        // Complete for every later engine, without a request.
        let engine = Engine::new(open(bed.dir.path()), config());
        let handle = engine
            .open(&bed.source.object(), &bed.source.source())
            .unwrap();
        assert!(handle.complete().is_some());
        check_read(&handle, &bed.source, 0..size.min(3 * MIB)).await;
        assert_eq!(bed.asked(), size as u64);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_digest_is_found_out() {
    let bed = Bed::new(Scripted::new(3 * MIB));
    let id = ObjectId::located("x", "1", 3 * MIB as u64);
    let handle = bed
        .engine
        .open(&bed.source.object_as(id), &bed.source.source())
        .unwrap();
    let complete = handle.ensure(Class::Warm).await.unwrap();
    assert_eq!(complete.digest, Digest::of(&bed.source.data));
    // Equal content under another name is there already.
    assert!(
        bed.engine
            .store()
            .complete(&bed.source.object().id)
            .unwrap()
            .is_some()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_readers_of_one_chunk_make_one_request() {
    let bed = Bed::new(Scripted::new(8 * MIB).paced(64 << 10, Duration::from_millis(2)));
    let handle = bed.handle();
    let mut readers = tokio::task::JoinSet::new();
    for i in 0..50 {
        let (handle, source) = (Arc::clone(&handle), Arc::clone(&bed.source));
        readers.spawn(async move { check_read(&handle, &source, i * 4096..i * 4096 + 4096).await });
    }
    while let Some(done) = readers.join_next().await {
        done.unwrap();
    }
    let of_first: Vec<_> = bed
        .source
        .requests()
        .into_iter()
        .filter(|r| r.start == 0)
        .collect();
    assert_eq!(of_first.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_are_served_as_they_arrive() {
    // The rest of the chunk comes much later.
    let config = Config {
        stall_timeout: Duration::from_secs(60),
        ..config()
    };
    let source = Scripted::new(4 * MIB).script([Some(Fault::Hold(64 << 10))]);
    let bed = Bed::with(source, config);
    let handle = bed.handle();
    check_read(&handle, &bed.source, 100..5000).await;
    assert_eq!(handle.present_bytes(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_are_ridden_out() {
    use SourceErrorKind::{Corrupt, Throttled, Unavailable};
    let bed = Bed::new(Scripted::new(6 * MIB).script([
        Some(Fault::Refuse(Unavailable)),
        Some(Fault::Refuse(Throttled)),
        Some(Fault::Break(1_500_000)),
        Some(Fault::Short(10)),
        None,
        Some(Fault::Refuse(Corrupt)),
        Some(Fault::Long),
        Some(Fault::Break(0)),
        Some(Fault::Stall),
    ]));
    bed.check_whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_body_goes_on_from_its_last_byte() {
    let bed = Bed::new(Scripted::new(3 * MIB).script([Some(Fault::Break(1_500_000))]));
    bed.check_whole().await;
    let requests = bed.source.requests();
    assert!(
        requests.iter().any(|r| r.start == 1_500_000),
        "{requests:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn final_errors_are_final() {
    use FetchErrorKind as Kind;
    for (fault, expected) in [
        (SourceErrorKind::NotFound, Kind::NotFound),
        (SourceErrorKind::Denied, Kind::Denied),
        (SourceErrorKind::Changed, Kind::Changed),
    ] {
        for size in [1000, 3 * MIB] {
            let bed = Bed::new(Scripted::new(size).script(vec![Some(Fault::Refuse(fault)); 9]));
            let handle = bed.handle();
            assert_eq!(handle.read(0, 100).await.unwrap_err().kind(), expected);
            let before = bed.source.requests().len();
            assert!(before <= 3, "{fault:?}: no retries, {before} requests");
            assert_eq!(
                handle.ensure(Class::Warm).await.unwrap_err().kind(),
                expected
            );
            // It is not remembered for ever: once the origin is well again, so are reads.
            let bed = Bed::new(Scripted::new(size).script([Some(Fault::Refuse(fault))]));
            let handle = bed.handle();
            assert_eq!(handle.read(0, 100).await.unwrap_err().kind(), expected);
            check_read(&handle, &bed.source, 0..100).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_that_is_down_is_given_up_after_the_patience() {
    let config = Config {
        patience: Duration::from_millis(500),
        ..config()
    };
    let down = vec![Some(Fault::Refuse(SourceErrorKind::Unavailable)); 1000];
    let bed = Bed::with(Scripted::new(3 * MIB).script(down), config);
    let error = bed.handle().read(0, 10).await.unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Unavailable);
    assert!(error.to_string().contains("weights.bin"), "{error}");
    assert!(bed.source.requests().len() < 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trouble_shows_while_it_lasts() {
    for size in [1000, 3 * MIB] {
        let down = vec![Some(Fault::Refuse(SourceErrorKind::Unavailable)); 5];
        let bed = Bed::new(Scripted::new(size).script(down));
        let handle = bed.handle();
        assert_eq!(handle.trouble(), None);
        let bringing = tokio::spawn({
            let handle = Arc::clone(&handle);
            async move { handle.ensure(Class::Warm).await }
        });
        let trouble = loop {
            if let Some(trouble) = handle.trouble() {
                break trouble;
            }
            assert!(!bringing.is_finished());
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        assert!(trouble.error.contains("weights.bin"), "{trouble:?}");
        assert!(trouble.until > trouble.since);
        bringing.await.unwrap().unwrap();
        assert_eq!(handle.trouble(), None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_content_never_becomes_complete() {
    for size in [1000, 3 * MIB] {
        let bed = Bed::new(Scripted::new(size));
        bed.source.serve_wrong_bytes(true);
        let handle = bed.handle();
        let error = handle.ensure(Class::Warm).await.unwrap_err();
        assert_eq!(error.kind(), FetchErrorKind::Corrupt);
        assert!(error.to_string().contains("sha256:"), "{error}");
        assert!(
            bed.engine
                .store()
                .complete(&bed.source.object().id)
                .unwrap()
                .is_none()
        );
        assert_eq!(
            handle.read(0, 10).await.unwrap_err().kind(),
            FetchErrorKind::Corrupt
        );
        // The origin is repaired; for a moment it is not asked again.
        bed.source.serve_wrong_bytes(false);
        tokio::time::sleep(Duration::from_millis(2100)).await;
        bed.check_whole().await;
        check_read(&handle, &bed.source, 0..size).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn content_that_is_wrong_once_is_fetched_again() {
    let bed = Bed::new(Scripted::new(3 * MIB).script([Some(Fault::Flip)]));
    bed.check_whole().await;
    assert_eq!(bed.asked(), 6 * MIB as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strict_serves_nothing_unverified() {
    let config = Config {
        verify: VerifyPolicy::Strict,
        ..config()
    };
    let bed = Bed::with(Scripted::new(3 * MIB), config);
    bed.source.serve_wrong_bytes(true);
    let handle = bed.handle();
    assert_eq!(
        handle.read(2 * MIB as u64, 10).await.unwrap_err().kind(),
        FetchErrorKind::Corrupt
    );
    bed.source.serve_wrong_bytes(false);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    check_read(&handle, &bed.source, 2 * MIB..2 * MIB + 10).await;
    assert!(handle.complete().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_git_blob_is_verified() {
    let bed = Bed::new(Scripted::new(6));
    let mut object = bed.source.object_as(ObjectId::located("x", "1", 6));
    object.git_sha1 = Some([7; 20]);
    let handle = bed.engine.open(&object, &bed.source.source()).unwrap();
    assert_eq!(
        handle.ensure(Class::Warm).await.unwrap_err().kind(),
        FetchErrorKind::Corrupt
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_random_reader_fetches_little() {
    let bed = Bed::new(Scripted::new(64 * MIB));
    let handle = bed.handle();
    let mut touched = std::collections::BTreeSet::new();
    let mut x = 77u64;
    for _ in 0..40 {
        x = x
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let at = ((x >> 33) as usize % (64 * MIB - 4096)) & !4095;
        check_read(&handle, &bed.source, at..at + 4096).await;
        touched.insert(at / MIB);
    }
    assert!(
        bed.asked() <= 2 * (touched.len() * MIB) as u64,
        "{} asked",
        bed.asked()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequential_reader_is_read_ahead_of() {
    let bed = Bed::new(Scripted::new(64 * MIB));
    let handle = bed.handle();
    for at in (0..64 * MIB).step_by(128 << 10) {
        check_read(&handle, &bed.source, at..at + (128 << 10)).await;
    }
    let requests = bed.source.requests().len();
    assert!(requests <= 40, "{requests} requests for 64 chunks");
    assert_eq!(bed.asked(), 64 * MIB as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn demand_does_not_wait_for_background_work() {
    // 64 KiB in 20 ms on each connection: the whole would take more than 5 s.
    let bed = Bed::new(Scripted::new(64 * MIB).paced(64 << 10, Duration::from_millis(20)));
    let handle = bed.handle();
    let background = tokio::spawn({
        let handle = Arc::clone(&handle);
        async move { handle.ensure(Class::Warm).await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    for chunk in [60, 3, 31] {
        check_read(&handle, &bed.source, chunk * MIB..chunk * MIB + 1000).await;
        assert!(
            handle.present_bytes() < 60 * MIB as u64,
            "it comes out of turn"
        );
        assert!(!background.is_finished());
    }
    background.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_warm_goes_on_where_it_stopped() {
    let bed = Bed::new(Scripted::new(32 * MIB).paced(16 << 10, Duration::from_millis(3)));
    let object = bed.source.object();
    {
        let handle = bed.handle();
        let ensure = handle.ensure(Class::Warm);
        assert!(
            tokio::time::timeout(Duration::from_millis(200), ensure)
                .await
                .is_err()
        );
    }
    // What was in flight lands.
    let store = open(bed.dir.path());
    let mut present = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let before = std::mem::replace(
            &mut present,
            store.present_bytes(bed.source.part(), object.size),
        );
        if before == present && hearth::metrics::global().fetch_connections.get() == 0 {
            break;
        }
    }
    assert!(present > 0 && present < object.size, "{present}");
    let before = bed.asked();
    let engine = Engine::new(store, config());
    let handle = engine.open(&object, &bed.source.source()).unwrap();
    handle.ensure(Class::Warm).await.unwrap();
    assert_eq!(bed.asked() - before, object.size - present);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_stays_within_the_budget() {
    let config = Config {
        memory: store::ByteSize(16 << 20),
        ..config()
    };
    let bed = Bed::with(Scripted::new(64 * MIB), config);
    let watch = tokio::spawn(async {
        while hearth::metrics::global().fetch_buffers.get() <= 16 << 20 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    bed.check_whole().await;
    assert!(!watch.is_finished(), "more than 16 MiB of buffers");
    watch.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_engines_on_one_store_share_the_work() {
    let bed = Bed::new(Scripted::new(32 * MIB).paced(64 << 10, Duration::from_micros(500)));
    let other = Engine::new(open(bed.dir.path()), config());
    let mine = bed.handle();
    let theirs = other
        .open(&bed.source.object(), &bed.source.source())
        .unwrap();
    let (a, b) = tokio::join!(mine.ensure(Class::Warm), theirs.ensure(Class::Warm));
    assert_eq!(a.unwrap().digest, b.unwrap().digest);
    assert!(bed.asked() <= 36 * MIB as u64, "{} asked", bed.asked());
}

/// The chunk to be hashed next is another process's, which dies when much of what follows is here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_that_nobody_fills_any_more_is_filled() {
    let bed = Bed::new(Scripted::new(170 * MIB));
    let (other, object) = (open(bed.dir.path()), bed.source.object());
    let partial = other.partial(bed.source.part(), object.size).unwrap();
    let lease = partial.claim(1..2).unwrap().unwrap();
    let handle = bed.handle();
    let warm = tokio::spawn({
        let handle = Arc::clone(&handle);
        async move { handle.ensure(Class::Warm).await }
    });
    while handle.present_bytes() < 130 * MIB as u64 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop((lease, partial));
    warm.await.unwrap().unwrap();
    assert_eq!(bed.asked(), object.size);
}

/// Chunks stay in memory for whoever reads on; not once another process has found them wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_process_discards_is_not_served_from_memory() {
    let bed = Bed::new(Scripted::new(8 * MIB));
    let handle = bed.handle();
    bed.source.serve_wrong_bytes(true);
    handle.prefetch(0..3 * MIB as u64).await.unwrap();
    let read = handle.read(0, 1000).await.unwrap();
    assert!(read != bed.source.data.slice(0..1000), "not verified yet");
    let (other, object) = (open(bed.dir.path()), bed.source.object());
    let partial = other.partial(bed.source.part(), object.size).unwrap();
    partial.discard(partial.generation()).unwrap();
    bed.source.serve_wrong_bytes(false);
    for chunk in 0..3 {
        check_read(&handle, &bed.source, chunk * MIB..chunk * MIB + 1000).await;
    }
    bed.check_whole().await;
}

/// The first part of a chunk was served, then its body broke for good; it comes from another one.
/// Nobody has verified that part, so whoever keeps it is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_served_of_a_broken_body_is_not_vouched_for() {
    for broken in [true, false] {
        let config = Config {
            stall_timeout: Duration::from_secs(2),
            ..config()
        };
        let refused = Fault::Refuse(SourceErrorKind::NotFound);
        let faults = [Fault::Hold(100_000), refused, refused].map(|fault| broken.then_some(fault));
        let bed = Bed::with(Scripted::new(3 * MIB).script(faults), config);
        bed.source.serve_wrong_bytes(broken);
        let handle = bed.handle();
        let told = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        handle.on_wrong({
            let told = Arc::clone(&told);
            move || {
                told.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        });
        let first = handle.read(0, 1000).await.unwrap();
        assert_eq!(first != bed.source.data.slice(0..1000), broken);
        assert_eq!(handle.read(900_000, 1000).await.is_err(), broken);
        bed.source.serve_wrong_bytes(false);
        while handle.read(2 * MIB as u64, 10).await.is_err() {}
        bed.check_whole().await;
        let told = told.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(told > 0, broken);
    }
}

mod model {
    use proptest::prelude::*;

    use super::*;

    fn fault() -> impl Strategy<Value = Option<Fault>> {
        prop_oneof![
            4 => Just(None),
            1 => (0u64..3 << 20).prop_map(|n| Some(Fault::Break(n))),
            1 => (0u64..3 << 20).prop_map(|n| Some(Fault::Short(n))),
            1 => Just(Some(Fault::Refuse(SourceErrorKind::Unavailable))),
            1 => Just(Some(Fault::Long)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn any_reads_under_any_faults_give_the_right_bytes(
            size in 1usize..6 * MIB,
            faults in prop::collection::vec(fault(), 0..8),
            reads in prop::collection::vec((0usize..6 * MIB, 1usize..2 * MIB), 1..12),
            warm: bool,
        ) {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let bed = Bed::new(Scripted::new(size).script(faults));
                let handle = bed.handle();
                let background = warm.then(|| {
                    let handle = Arc::clone(&handle);
                    tokio::spawn(async move { handle.ensure(Class::Warm).await.unwrap() })
                });
                let mut readers = tokio::task::JoinSet::new();
                for (at, len) in reads {
                    let (handle, source) = (Arc::clone(&handle), Arc::clone(&bed.source));
                    readers.spawn(async move { check_read(&handle, &source, at..at + len).await });
                }
                while let Some(done) = readers.join_next().await {
                    done.unwrap();
                }
                if let Some(background) = background {
                    background.await.unwrap();
                }
                bed.check_whole().await;
            });
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_follows_gets_every_byte_in_order() {
    for size in [1, MIB, 9 * MIB + 5] {
        let source = Scripted::new(size).paced(64 << 10, Duration::from_millis(1));
        let bed = Bed::new(source);
        let handle = bed.handle();
        let follow = async {
            let mut seen = Vec::new();
            loop {
                let data = handle.follow(seen.len() as u64).await.unwrap();
                if data.is_empty() {
                    return seen;
                }
                seen.extend_from_slice(&data);
            }
        };
        let (whole, seen) = tokio::join!(handle.ensure(Class::Warm), follow);
        whole.unwrap();
        assert!(seen == bed.source.data);
        assert_eq!(bed.asked(), size as u64, "who follows asks for nothing");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_by_another_way_is_not_fetched() {
    for size in [1000, 5 * MIB] {
        let bed = Bed::new(Scripted::new(size));
        let handle = bed.handle();
        if size > MIB {
            check_read(&handle, &bed.source, 0..10).await;
        }
        let id = bed.source.object().id;
        let data = bed.source.data.clone();
        bed.engine.store().put(&[(id, data)]).unwrap();
        bed.engine.came(&id);
        assert!(handle.complete().is_some());
        let asked = bed.asked();
        check_read(&handle, &bed.source, 0..size).await;
        bed.check_whole().await;
        assert_eq!(bed.asked(), asked);
    }
}

/// Reads through the engine, as files in a layer do.
#[derive(Debug)]
struct InLayer {
    blob: Arc<Handle>,
}

#[async_trait::async_trait]
impl Source for InLayer {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        let what = reference.to_string();
        Err(SourceError::new(SourceErrorKind::NotFound, what, "is none"))
    }

    fn origin(&self) -> String {
        "oci://registry/layers".into()
    }

    fn waits_for_objects(&self) -> bool {
        true
    }

    async fn read(&self, _: &Location, range: Range<u64>) -> Result<ByteStream, SourceError> {
        let blob = Arc::clone(&self.blob);
        let pieces = stream::try_unfold(range.start, move |at| {
            let (blob, end) = (Arc::clone(&blob), range.end);
            async move {
                let len = (end - at).min(100_000) as usize;
                let piece = blob.read(at, len).await.map_err(|e| e.as_source())?;
                let next = at + piece.len() as u64;
                Ok((!piece.is_empty()).then_some((piece, next)))
            }
        });
        Ok(pieces.boxed())
    }
}

/// More cold readers of files in a layer than there are buffers: what a file holds is not what its layer
/// needs to arrive.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_files_in_a_layer_do_not_wait_for_each_other() {
    const FILE: usize = 3 * MIB;
    let config = Config {
        memory: store::ByteSize(8 << 20),
        ..config()
    };
    let bed = Bed::with(
        Scripted::new(13 * FILE).paced(64 << 10, Duration::from_millis(1)),
        config,
    );
    let layer: Arc<dyn Source> = Arc::new(InLayer { blob: bed.handle() });
    let reads = (0..12).map(|at| {
        let start = at * FILE + MIB / 2;
        let data = bed.source.data.slice(start..start + FILE);
        let object = Object {
            id: ObjectId::Sha256(Digest::of(&data)),
            size: FILE as u64,
            git_sha1: None,
            recipe: Recipe::Raw(Location {
                path: format!("file {at}"),
                generation: None,
                offset: start as u64,
            }),
        };
        let handle = bed.engine.open(&object, &layer).unwrap();
        async move {
            for chunk in 0..3 {
                let read = handle.read((chunk * MIB) as u64, MIB).await.unwrap();
                assert!(read == data.slice(chunk * MIB..(chunk + 1) * MIB));
            }
        }
    });
    let all = futures_util::future::join_all(reads);
    let done = tokio::time::timeout(Duration::from_secs(60), all).await;
    assert!(done.is_ok(), "they wait for each other");
}
