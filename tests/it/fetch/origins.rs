//! Several origins of one content: dead ones, and such as lie.

use super::*;

/// An origin that claims to have a well-known digest, and gives bytes of its own but never the last: whoever
/// has the content from elsewhere sees none of that, in this process or the next, nor is kept waiting.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_origin_claims_is_not_served_to_who_asked_another() {
    let bed = Bed::new(Scripted::new(4 * MIB).at("hf://models/good/model"));
    let liar = Scripted::new(4 * MIB)
        .false_bytes()
        .at("hf://models/bad/model");
    // All but the last chunk.
    let faults = (0..100).map(|at| (at > 0).then_some(Fault::Stall));
    let liar = Arc::new(liar.script(faults));
    let object = bed.source.object();
    let theirs = bed.engine.open(&object, &liar.source()).unwrap();
    check_read(&theirs, &liar, 0..3 * MIB).await;
    // It claims another size, too.
    let longer = Object {
        size: object.size + 1,
        ..object.clone()
    };
    let other_size = bed.engine.open(&longer, &liar.source()).unwrap();
    let next = Engine::new(open(bed.dir.path()), config());
    for engine in [&bed.engine, &next] {
        let handle = engine.open(&object, &bed.source.source()).unwrap();
        for chunk in 0..4 {
            check_read(&handle, &bed.source, chunk * MIB..chunk * MIB + 1000).await;
        }
    }
    assert!(bed.source.requests().len() >= 2, "nothing was asked of it");
    drop(next);
    bed.check_whole().await;
    // Now everybody has the verified one, and nobody a share in what was false.
    check_read(&theirs, &bed.source, 0..3 * MIB).await;
    assert!(theirs.complete().is_some());
    drop(other_size);
}

/// What was brought of a verified object is everybody's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_verified_object_is_shared_between_origins() {
    let bed = Bed::new(Scripted::new(3 * MIB).at("hf://models/a/one"));
    bed.check_whole().await;
    let other = Arc::new(Scripted::new(3 * MIB).at("oci://registry/two"));
    let handle = bed.engine.open(&other.object(), &other.source()).unwrap();
    check_read(&handle, &bed.source, 0..3 * MIB).await;
    assert!(other.requests().is_empty());
}

/// One of two ways to the content is dead: however many fetches fail at once, none goes back to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_origin_is_left_for_good() {
    let bed = Bed::new(Scripted::new(40 * MIB));
    let refuse = |kind| (0..1000).map(move |_| Some(Fault::Refuse(kind)));
    for kind in [SourceErrorKind::NotFound, SourceErrorKind::Denied] {
        let object = bed.source.object();
        let dead = Arc::new(Scripted::new(40 * MIB).script(refuse(kind)));
        let dir = tempfile::tempdir().unwrap();
        let engine = Engine::new(open(dir.path()), config());
        let _good = engine.open(&object, &bed.source.source()).unwrap();
        let handle = engine.open(&object, &dead.source()).unwrap();
        let reads = (0..8u64).map(|at| {
            let handle = Arc::clone(&handle);
            async move { handle.read(at * 5 * MIB as u64, 1000).await }
        });
        for read in futures_util::future::join_all(reads).await {
            read.unwrap();
        }
        let asked = dead.requests().len();
        assert!(asked <= 16, "{asked} times");
        check_read(&handle, &bed.source, 39 * MIB..39 * MIB + 1000).await;
        handle.ensure(Class::Warm).await.unwrap();
        assert_eq!(dead.requests().len(), asked, "{kind:?}: it was asked again");
    }
}

/// What one origin gives is wrong, and another has the true content.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_content_is_fetched_again_from_another_origin() {
    for size in [1000, 3 * MIB] {
        let bed = Bed::new(Scripted::new(size));
        let wrong = Arc::new(Scripted::new(size));
        wrong.serve_wrong_bytes(true);
        let object = bed.source.object();
        let _good = bed.handle();
        let handle = bed.engine.open(&object, &wrong.source()).unwrap();
        handle.ensure(Class::Warm).await.unwrap();
        assert!(!wrong.requests().is_empty());
    }
}
