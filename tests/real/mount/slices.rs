//! Files that are parts of a larger object, read through the kernel.

use super::*;

const MIB: u64 = 1 << 20;
/// Path, where it starts in the container, bytes.
const FILES: [(&str, u64, u64); 4] = [
    ("config.json", 512, 700),
    ("model/weights.safetensors", 3 * MIB + 512, 2 * MIB + 77),
    ("model/more.bin", 16 * MIB + 1024, 3 * MIB),
    ("empty", 24 * MIB, 0),
];

/// A mount of [`FILES`], cut from the content of `source`.
fn cut(source: Scripted) -> Served {
    let source = Arc::new(source);
    let mut tree = TreeBuilder::new(Meta::dir(0));
    let mut objects = vec![source.object()];
    for (path, offset, size) in FILES {
        let object = objects.len() as u32;
        tree.add_file(path.as_bytes(), object, Meta::file(0))
            .unwrap();
        objects.push(Object {
            id: ObjectId::located("slice", path, size),
            size,
            git_sha1: None,
            recipe: Recipe::Slice { object: 0, offset },
        });
    }
    let artifact = Artifact {
        reference: "oci://127.0.0.1:1/m:1".into(),
        revision: String::new(),
        tree: tree.build(),
        objects,
    };
    Served::new(source, artifact)
}

fn part(source: &Scripted, (_, offset, size): (&str, u64, u64)) -> Bytes {
    source.data.slice(offset as usize..(offset + size) as usize)
}

/// Prints digests of all files: read, and mapped.
const READ_ALL: &str = r#"
import hashlib
for path in ["config.json", "model/weights.safetensors", "model/more.bin", "empty"]:
    with open(os.path.join(root, path), "rb") as f:
        size = os.fstat(f.fileno()).st_size
        mapped = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[:] if size else b""
        data = f.read()
        assert len(data) == size, (len(data), size)
        tail = os.pread(f.fileno(), 100, max(size - 10, 0))
        assert tail == data[-10:], path
        print(hashlib.sha256(data).hexdigest(), hashlib.sha256(mapped).hexdigest())
"#;

fn expected(source: &Scripted) -> String {
    let lines: Vec<_> = FILES
        .iter()
        .map(|&file| sha256(&part(source, file)))
        .map(|digest| format!("{digest} {digest}"))
        .collect();
    lines.join("\n")
}

#[test]
fn parts_are_read_while_the_whole_arrives_and_when_it_is_here() {
    let size = 64 * MIB;
    let bed = cut(Scripted::new(size as usize).paced(256 << 10, Duration::from_millis(1)));
    let (fixture, source) = (&bed.fixture, &bed.source);
    assert_eq!(fixture.run(READ_ALL), expected(source));
    let asked: u64 = source.requests().iter().map(|r| r.end - r.start).sum();
    assert!(asked < size / 2, "{asked} bytes for a few files");
    assert_eq!(fixture.get().stats().passthrough_opens, 0);

    let handle = bed.engine.open(&source.object(), &source.source()).unwrap();
    fixture
        .runtime
        .block_on(handle.ensure(Class::Warm))
        .unwrap();
    drop(handle);
    let requests = source.requests().len();
    let small = fixture.get().stats().small_fetches;
    // What the kernel holds of them was unverified, and is dropped or was watched.
    assert_eq!(fixture.run(READ_ALL), expected(source));
    assert_eq!(fixture.run(READ_ALL), expected(source));
    assert_eq!(source.requests().len(), requests, "all is here");
    let stats = fixture.get().stats();
    assert_eq!(stats.passthrough_opens, 0, "no file has them alone");
    assert_eq!(stats.small_fetches, small, "nothing is left to fetch");
    assert_eq!(stats.errors, 0);
    bed.fixture.end();
}

#[test]
fn parts_of_what_was_wrong_are_repaired_in_open_files() {
    // The wrong byte is read before all is here and the engine looks at it.
    let source = Scripted::new(24 << 20).held_from((24 << 20) - 1);
    let bed = cut(source.script([Some(Fault::Flip)]));
    let told = tempfile::NamedTempFile::new().unwrap();
    let script = format!(
        r#"
import hashlib, time
config = open(os.path.join(root, "config.json"), "rb")
first = open(os.path.join(root, "model/weights.safetensors"), "rb")
weights = mmap.mmap(first.fileno(), 0, prot=mmap.PROT_READ)
sha = lambda data: hashlib.sha256(data).hexdigest()
sha(weights[:]), os.pread(config.fileno(), 700, 0)
told = {told:?}
os.unlink(told)
while not os.path.exists(told): time.sleep(0.01)
print(sha(os.pread(config.fileno(), 700, 0)), sha(weights[:]))
"#,
        told = told.path().to_str().unwrap()
    );
    let reader = bed.fixture.start(&script);
    wait_until("the first read", || !told.path().exists());
    bed.source.let_go();
    let handle = bed
        .engine
        .open(&bed.source.object(), &bed.source.source())
        .unwrap();
    let ensured = bed.fixture.runtime.block_on(handle.ensure(Class::Warm));
    ensured.unwrap();
    bed.fixture.wait_invalidated(2);
    std::fs::write(told.path(), "").unwrap();
    let right = FILES.map(|file| sha256(&part(&bed.source, file)));
    assert_eq!(reader.finish(), format!("{} {}", right[0], right[1]));
    assert_eq!(bed.fixture.get().stats().errors, 0);
    bed.fixture.end();
}
