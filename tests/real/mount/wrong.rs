//! Content that turns out wrong after it was served.

use super::*;

/// A script that prints what it reads of the first `first` bytes of `big`, says so by removing `told`, waits until
/// `told` is there again, and prints what it reads by the same descriptor, the same mapping and a new open.
fn read_twice(told: &Path, first: usize) -> String {
    format!(
        "{READ_ALL}
import time
h = lambda data: hashlib.sha256(data).hexdigest()
f = os.open(os.path.join(root, 'big'), os.O_RDONLY)
m = mmap.mmap(f, 0, prot=mmap.PROT_READ)
os.pread(f, 1, 0)
print(h(os.pread(f, {first}, 0)), h(m[:{first}]))
os.unlink('{0}')
while not os.path.exists('{0}'): time.sleep(0.01)
print(h(os.pread(f, len(m), 0)), h(m), sha('big'))",
        told.display()
    )
}

#[test]
fn wrong_bytes_are_dropped_by_the_kernel() {
    let right = noise((8 << 20) + 77, 31);
    let wrong = noise(right.len(), 33);
    let mut maker = Maker::new();
    maker.file("big", &right, Mode::Present);
    let fixture = Fixture::new(maker);
    let body = &fixture.bodies[0];
    assert!(right != wrong);
    body.write(&wrong);
    let told = tempfile::NamedTempFile::new().unwrap();
    let reader = fixture.start(&read_twice(told.path(), right.len()));
    wait_until("the first read", || !told.path().exists());
    body.write(&right);
    assert_eq!(body.tell_wrong(), 1);
    fixture.wait_invalidated(1);
    std::fs::write(told.path(), "").unwrap();
    let (right, wrong) = (sha256(&right), sha256(&wrong));
    assert_eq!(
        reader.finish(),
        format!("{wrong} {wrong}\n{right} {right} {right}")
    );
    // Watched once, however often it is opened, and kept again.
    let again = format!("{READ_ALL}\nprint(sha('big'))");
    assert_cached(
        || assert_eq!(fixture.run(&again), right),
        || fixture.get().stats().reads,
    );
    assert_eq!(body.tell_wrong(), 1);
    fixture.wait_invalidated(2);
    let body = body.clone();
    fixture.end();
    assert_eq!(body.tell_wrong(), 1, "fine after the mount is gone");
}

#[test]
fn dropping_wrong_bytes_waits_for_reads_and_holds_nobody_up() {
    let right = noise(16 << 20, 35);
    let wrong = noise(right.len(), 37);
    let mut maker = Maker::new();
    maker.file("big", &right, Mode::Present);
    maker.file("other", b"here", Mode::Present);
    let fixture = Fixture::new(maker);
    let body = &fixture.bodies[0];
    assert!(right != wrong);
    body.write(&wrong);
    let told = tempfile::NamedTempFile::new().unwrap();
    let mut first = fixture.start(&format!(
        "{READ_ALL}
import time
f = open(os.path.join(root, 'big'), 'rb', buffering=0)
f.read(4096)
os.unlink('{0}')
while not os.path.exists('{0}'): time.sleep(0.01)
f.seek(0)
print(hashlib.sha256(f.read(4096)).hexdigest())",
        told.path().display()
    ));
    wait_until("the first read", || !told.path().exists());
    // Found wrong: whoever reads what is not in the kernel waits.
    body.mode.send_replace(Mode::Absent);
    let before = fixture.get().stats().waited_reads;
    let mut waiting =
        fixture.start("os.pread(os.open(os.path.join(root, 'big'), os.O_RDONLY), 9, 15 << 20)");
    wait_until("a read that waits", || {
        fixture.get().stats().waited_reads > before
    });
    for _ in 0..100 {
        assert_eq!(body.tell_wrong(), 1);
    }
    // A new open may not see what is not dropped yet.
    let mut new = fixture.start(&format!("{READ_ALL}\nprint(sha('big'))"));
    let other = fixture.run("print(open(os.path.join(root, 'other')).read())");
    assert_eq!(other, "here");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(fixture.get().stats().invalidations, 0);
    assert!(waiting.is_running() && new.is_running() && first.is_running());
    body.write(&right);
    body.mode.send_replace(Mode::Present);
    waiting.finish();
    assert_eq!(new.finish(), sha256(&right));
    fixture.wait_invalidated(1);
    std::fs::write(told.path(), "").unwrap();
    assert_eq!(first.finish(), sha256(&right[..4096]));
    assert!(
        fixture.get().stats().invalidations <= 2,
        "those not begun are one"
    );
    fixture.end();
}

#[test]
fn what_an_origin_sent_wrong_is_repaired_in_open_files() {
    // The wrong byte is read before all is here and the engine looks at it.
    let (size, first) = (8 << 20, 1 << 20);
    let source = Scripted::new(size).held_from(size as u64 - 1);
    let source = Arc::new(source.script([Some(Fault::Flip)]));
    let object = source.object();
    let mut tree = TreeBuilder::new(Meta::dir(0));
    tree.add_file(b"big", 0, Meta::file(0)).unwrap();
    let artifact = Artifact {
        reference: "hf://org/name@main".into(),
        revision: "5".repeat(40),
        tree: tree.build(),
        objects: vec![object.clone()],
    };
    let served = Served::new(source, artifact);
    let (source, engine, fixture) = (&served.source, &served.engine, &served.fixture);
    let told = tempfile::NamedTempFile::new().unwrap();
    let reader = fixture.start(&read_twice(told.path(), first));
    wait_until("the first read", || !told.path().exists());
    source.let_go();
    let handle = engine.open(&object, &source.source()).unwrap();
    served.runtime.block_on(handle.ensure(Class::Warm)).unwrap();
    fixture.wait_invalidated(1);
    std::fs::write(told.path(), "").unwrap();
    let out = reader.finish();
    let right = sha256(&source.data);
    let mut wrong = source.data[..first].to_vec();
    wrong[0] ^= 1;
    let wrong = sha256(&wrong);
    assert_eq!(out, format!("{wrong} {wrong}\n{right} {right} {right}"));
    assert_eq!(fixture.get().stats().errors, 0);
    served.fixture.end();
}
