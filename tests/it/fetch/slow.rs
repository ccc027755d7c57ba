//! What is slow: origins, connections, other processes, and what is held back on purpose.

use super::*;

fn impatient() -> Config {
    Config {
        patience: Duration::from_secs(2),
        ..config()
    }
}

/// Now and then a few bytes: a tenth of what is worth waiting for.
fn trickling(size: usize) -> Scripted {
    Scripted::new(size).paced(64, Duration::from_millis(150))
}

/// Now and then a few bytes: that is given up as no bytes are, where somebody waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trickling_body_holds_no_reader_for_good() {
    let bed = Bed::with(trickling(3 * MIB), impatient());
    let handle = bed.handle();
    let read = tokio::time::timeout(Duration::from_secs(120), handle.read(900_000, 1000));
    let error = read.await.expect("it waits for good").unwrap_err();
    assert_eq!(error.kind(), FetchErrorKind::Unavailable);
    assert!(error.to_string().contains("too slowly"), "{error}");
}

/// The same of what is fetched whole, or past the disk: each attempt brings a little.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trickling_answer_holds_no_reader_for_good() {
    for size in [100 << 10, 3 * MIB] {
        let bed = Bed::with(trickling(size), impatient());
        let handle = bed.handle();
        let read = tokio::spawn({
            let handle = Arc::clone(&handle);
            async move { handle.read_past_disk(0, 100 << 10).await }
        });
        let begun = std::time::Instant::now();
        let mut troubles = Vec::new();
        while !read.is_finished() {
            assert!(
                begun.elapsed() < Duration::from_secs(120),
                "it waits for good"
            );
            troubles.extend(handle.trouble());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let error = read.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), FetchErrorKind::Unavailable);
        assert!(error.to_string().contains("too slowly"), "{error}");
        troubles.dedup_by_key(|trouble| trouble.since);
        assert_eq!(troubles.len(), 1, "it began anew: {troubles:?}");
    }
}

/// Nor those who wait for all of it, nor, after a while, a warm.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trickling_body_holds_nothing_for_good() {
    for verify in [VerifyPolicy::Strict, VerifyPolicy::Complete] {
        let bed = Bed::with(
            trickling(3 * MIB),
            Config {
                verify,
                ..impatient()
            },
        );
        let handle = bed.handle();
        let brought = async {
            match verify {
                VerifyPolicy::Strict => handle.read(0, 1000).await.map(drop),
                VerifyPolicy::Complete => handle.ensure(Class::Warm).await.map(drop),
            }
        };
        let brought = tokio::time::timeout(Duration::from_secs(120), brought);
        let error = brought.await.expect("it waits for good").unwrap_err();
        assert_eq!(error.kind(), FetchErrorKind::Unavailable);
        assert!(error.to_string().contains("too slowly"), "{error}");
        assert!(handle.trouble().is_some());
    }
}

/// What another process brings in trickles is brought by this one, once that has given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trickle_elsewhere_holds_no_warm_for_good() {
    let bed = Bed::new(Scripted::new(3 * MIB));
    let trickle = Arc::new(trickling(3 * MIB));
    let other = Engine::new(open(bed.dir.path()), impatient());
    let theirs = other.open(&trickle.object(), &trickle.source()).unwrap();
    let trickled = tokio::spawn(async move { theirs.ensure(Class::Warm).await });
    while trickle.requests().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let whole = tokio::time::timeout(Duration::from_secs(120), bed.check_whole()).await;
    assert!(whole.is_ok(), "it waits for good");
    let _ = trickled.await.unwrap();
}

/// One connection of several is slow: those that have nothing left to do take a part of what it has to bring, and
/// what is arriving is asked for again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slowest_body_is_relieved() {
    let config = Config {
        stall_timeout: Duration::from_secs(10),
        max_connections: 4,
        ..config()
    };
    // A chunk in 16 ms, but of the third request in 5 s.
    let slow = Some(Fault::Slow(Duration::from_millis(300)));
    let source = Scripted::new(40 * MIB)
        .paced(64 << 10, Duration::from_millis(1))
        .script([None, None, slow]);
    let bed = Bed::with(source, config);
    bed.check_whole().await;
    let requests = bed.source.requests();
    let within = |r: &Range<u64>, slow: &Range<u64>| r.start > slow.start && r.end <= slow.end;
    let is_slow = |slow: &&Range<u64>| requests.iter().any(|r| within(r, slow));
    let slow = requests.iter().find(is_slow).expect("nobody helps");
    let again: Vec<_> = requests.iter().filter(|r| within(r, slow)).collect();
    let whole = again.iter().filter(|r| r.start % MIB as u64 == 0).count();
    assert!(whole > 0 && again.len() == whole + 1, "{requests:?}");
    let hedges = hearth::metrics::global().fetch_hedges.get();
    assert_eq!(hedges, again.len() as u64);
    // Nothing but that was asked for twice.
    let twice: u64 = again.iter().map(|r| r.end - r.start).sum();
    assert_eq!(bed.asked(), 40 * MIB as u64 + twice);
}

/// Background work is limited, what a reader waits for is not, be it what background work has begun.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cap_holds_background_work_alone() {
    let config = Config {
        // A minute for the first frame.
        warm_bandwidth: Some(store::ByteSize(1 << 10)),
        ..config()
    };
    let bed = Bed::with(Scripted::new(32 * MIB), config);
    let handle = bed.handle();
    let warm = tokio::spawn({
        let handle = Arc::clone(&handle);
        async move { handle.ensure(Class::Warm).await }
    });
    while handle.tally().ahead == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let reads = async {
        for chunk in [30, 21, 27] {
            let at = chunk * MIB + MIB / 2;
            check_read(&handle, &bed.source, at..at + 1000).await;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        let ahead = handle.tally().ahead;
        assert!(ahead <= 16 * (64 << 10), "{ahead} beside the readers");
        check_read(&handle, &bed.source, MIB / 2..MIB / 2 + 1000).await;
    };
    let all = tokio::time::timeout(Duration::from_secs(120), reads).await;
    assert!(all.is_ok(), "readers are held up by the cap");
    assert!(!warm.is_finished());
    warm.abort();
}

/// Another process has claimed all that a reader wants and brings none of it: he waits for it once, not for
/// each piece.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_process_is_waited_for_once() {
    let reads = async |bed: &Bed| {
        let handle = bed.handle();
        let begun = std::time::Instant::now();
        for chunk in 0..60 {
            check_read(&handle, &bed.source, chunk * MIB..chunk * MIB + 1000).await;
        }
        begun.elapsed()
    };
    // How long it takes here and now where nobody has to be waited for.
    let usual = reads(&Bed::new(Scripted::new(60 * MIB))).await;
    let bed = Bed::new(Scripted::new(60 * MIB));
    let other = open(bed.dir.path());
    let partial = other.partial(bed.source.part(), 60 * MIB as u64).unwrap();
    let _lease = partial.claim(0..60).unwrap().unwrap();
    // Each for itself would take 12 s more.
    let limit = usual + Duration::from_secs(6);
    let all = tokio::time::timeout(limit, reads(&bed)).await;
    assert!(all.is_ok(), "each piece was waited for");
}

/// Others fetch what is first in the queue, slowly; what comes after it does not stand still for that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_others_fetch_does_not_hold_up_the_queue() {
    let bed = Bed::new(Scripted::new(3 * MIB));
    let other = open(bed.dir.path());
    let mut held = Vec::new();
    for size in 10..16 {
        let source = Arc::new(Scripted::new(size * MIB));
        let partial = other.partial(source.part(), (size * MIB) as u64).unwrap();
        let lease = partial.claim(0..size as u64).unwrap().unwrap();
        let handle = bed.engine.open(&source.object(), &source.source()).unwrap();
        let warm = tokio::spawn(async move { handle.ensure(Class::Warm).await });
        held.push((lease, warm));
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let whole = tokio::time::timeout(Duration::from_secs(120), bed.check_whole()).await;
    assert!(whole.is_ok(), "it waits for the others");
    for (_, warm) in held {
        warm.abort();
    }
}
