//! Where and by whom a mount is made and taken away, and the layout of the Hub.

use super::*;

#[test]
fn a_busy_mount_is_refused_or_detached() {
    let mut maker = Maker::new();
    maker.file("big", &noise(2 << 20, 4), Mode::Absent);
    maker.file("open", &noise(2 << 20, 5), Mode::Present);
    let fixture = Fixture::new(maker);
    let script = "
f = open(os.path.join(root, 'open'), 'rb')
print(len(open(os.path.join(root, 'big'), 'rb').read()), len(f.read()))";
    let mut reader = fixture.start(script);
    while fixture.get().stats().waited_reads == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    let dir = fixture.dir.path();
    let busy = mount::unmount(dir, false).unwrap_err();
    assert_eq!(busy.kind(), MountErrorKind::Busy);
    let again = Mount::new(
        Arc::new(View::new(Arc::new(Maker::new().finish().0), Arc::new(Bodies(vec![]))).unwrap()),
        dir,
        &Config::default(),
        fixture.runtime.handle().clone(),
    );
    assert_eq!(again.unwrap_err().kind(), MountErrorKind::Mounted);
    assert!(
        mount::mounted()
            .unwrap()
            .iter()
            .any(|m| m.mountpoint == dir && m.fsname == "hearth")
    );
    mount::unmount(dir, true).unwrap();
    assert_eq!(
        mount::unmount(dir, true).unwrap_err().kind(),
        MountErrorKind::NotMounted
    );
    assert!(reader.is_running(), "what is open stays");
    fixture.bodies[0].mode.send_replace(Mode::Present);
    assert_eq!(reader.finish(), "2097152 2097152");
    fixture.end();
}

/// The kernel drops what the last user of a detached mount has closed, and a thread that is just taking one of these
/// requests is told something else than the others.
#[test]
fn a_detached_mount_ends_well_whenever_its_last_user_goes() {
    let names: Vec<String> = (0..200).map(|n| format!("file{n}")).collect();
    for round in 0..10 {
        let mut maker = Maker::new();
        for name in &names {
            maker.file(name, &noise(5000, round), Mode::Present);
        }
        let fixture = Fixture::new(maker);
        let script = "
import subprocess
held = [open(os.path.join(root, name)) for name in os.listdir(root)]
subprocess.run(['umount', '--lazy', root], check=True)
print(len(held), flush=True)
os._exit(0)";
        assert_eq!(fixture.run(script), "200");
        fixture.end();
    }
}

#[test]
fn a_mount_needs_a_directory() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (artifact, _) = Maker::new().finish();
    let view = Arc::new(View::new(Arc::new(artifact), Arc::new(Bodies(vec![]))).unwrap());
    let file = tempfile::NamedTempFile::new().unwrap();
    for path in [file.path(), Path::new("/nonexistent/dir")] {
        let result = Mount::new(
            view.clone(),
            path,
            &Config::default(),
            runtime.handle().clone(),
        );
        let error = result.unwrap_err();
        assert_eq!(error.kind(), MountErrorKind::Directory);
        assert!(error.hint().is_some());
    }
    let dir = tempfile::tempdir().unwrap();
    let error = mount::unmount(dir.path(), false).unwrap_err();
    assert_eq!(error.kind(), MountErrorKind::NotMounted);
}

#[test]
fn dropping_a_mount_takes_it_away() {
    let mut maker = Maker::new();
    maker.file("a", b"x", Mode::Complete);
    let mut fixture = Fixture::new(maker);
    let dir = fixture.dir.path().to_owned();
    fixture.mount = None;
    assert!(
        mount::mounted()
            .unwrap()
            .iter()
            .all(|m| m.mountpoint != dir)
    );
}

/// The served side of `without_root_files_are_read_through_the_process`.
#[test]
#[ignore = "started by another test"]
fn serve_without_root() {
    let dir = PathBuf::from(std::env::var_os("HEARTH_TEST_DIR").unwrap());
    let mut maker = Maker::new();
    maker.file("big", &noise(3 << 20, 7), Mode::Complete);
    let (artifact, bodies) = maker.finish();
    let view = View::new(Arc::new(artifact), Arc::new(Bodies(bodies))).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let handle = runtime.handle().clone();
    let mount = Mount::new(Arc::new(view), &dir, &Config::default(), handle).unwrap();
    runtime.block_on(mount.ended());
    let stats = mount.stats();
    assert!(stats.reads > 0 && stats.passthrough_opens == 0, "{stats:?}");
    mount.join().unwrap();
}

#[test]
fn without_root_files_are_read_through_the_process() {
    // As udev has it wherever it runs.
    std::fs::set_permissions("/dev/fuse", Permissions::from_mode(0o666)).unwrap();
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), Permissions::from_mode(0o777)).unwrap();
    let program = home.path().join("tests");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let as_nobody = |program: &Path| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.arg(program);
        command.env("TMPDIR", home.path()).current_dir("/");
        command
    };
    let dir = home.path().join("mnt");
    let mut make = as_nobody(Path::new("mkdir"));
    assert!(make.arg(&dir).status().unwrap().success());
    let mut serve = as_nobody(&program);
    serve
        .args(["--exact", "mount::places::serve_without_root", "--ignored"])
        .env("HEARTH_TEST_DIR", &dir);
    let mut server = Child::start(serve, 0);
    let connection = loop {
        let list = mount::mounted().unwrap();
        match list.iter().find(|m| m.mountpoint == dir) {
            Some(info) => break info.connection,
            None if server.is_running() => std::thread::sleep(Duration::from_millis(5)),
            None => panic!("{}", server.finish()),
        }
    };
    server.connection = connection;
    let script =
        "import sys, hashlib; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())";
    let mut read = as_nobody(Path::new(PYTHON));
    read.args(["-c", script]).arg(dir.join("big"));
    assert_eq!(
        Child::start(read, connection).finish(),
        sha256(&noise(3 << 20, 7))
    );
    // As the owner would: by the helper.
    let mut unmount = as_nobody(Path::new("fusermount3"));
    unmount.arg("-u").arg(&dir);
    Child::start(unmount, connection).finish();
    server.finish();
}

/// Python of the environment that `tests/run` makes.
fn venv_python() -> PathBuf {
    let home = std::env::var_os("HOME").unwrap();
    let python = Path::new(&home).join(".cache/hearth-test/venv/bin/python");
    assert!(
        python.exists(),
        "{} is missing: run tests/run",
        python.display()
    );
    python
}

#[test]
fn the_hub_layout_is_what_huggingface_hub_expects() {
    let weights = noise(2 << 20, 8);
    let mut maker = Maker::new();
    maker.file("config.json", b"{\"a\": 1}", Mode::Absent);
    maker.file("sub/dir/model.bin", &weights, Mode::Present);
    maker.file("again.json", b"{\"a\": 1}", Mode::Absent);
    let fixture = Fixture::hub(maker);
    for body in &fixture.bodies {
        body.mode.send_replace(Mode::Present);
    }
    let script = r"
import os, sys, hashlib, fcntl, json, errno
root = sys.argv[1]
os.environ.update(HF_HUB_CACHE=root, HF_HUB_OFFLINE='1', HF_HOME=sys.argv[2])
from huggingface_hub import snapshot_download, hf_hub_download, scan_cache_dir, try_to_load_from_cache
from huggingface_hub import file_download as fd
commit = '5' * 40
path = snapshot_download('org/name', local_files_only=True)
assert path == f'{root}/models--org--name/snapshots/{commit}', path
assert json.load(open(path + '/config.json')) == {'a': 1}
weights = hf_hub_download('org/name', 'sub/dir/model.bin')
assert os.readlink(weights).startswith('../../../../blobs/'), os.readlink(weights)
info = scan_cache_dir()
assert not info.warnings, info.warnings
(repo,) = info.repos
assert repo.repo_id == 'org/name' and repo.repo_type == 'model' and repo.nb_files == 2, repo
(revision,) = repo.revisions
assert revision.commit_hash == commit and revision.refs == {'main'} and len(revision.files) == 3
assert len(os.listdir(f'{root}/models--org--name/blobs')) == 2
# What online calls write.
folder = f'{root}/models--org--name'
fd._cache_commit_hash_for_specific_revision(folder, 'refs/pr/1', commit)
assert open(f'{folder}/refs/refs/pr/1').read() == commit
fd._cache_commit_hash_for_specific_revision(folder, 'main', '6' * 40)
assert open(f'{folder}/refs/main').read() == '6' * 40
fd._cache_commit_hash_for_specific_revision(folder, 'main', commit)
none = f'{folder}/.no_exist/{commit}/added_tokens.json'
assert not os.path.exists(none)
os.makedirs(os.path.dirname(none)); open(none, 'w').close()
assert try_to_load_from_cache('org/name', 'added_tokens.json') is fd._CACHED_NO_EXIST
from huggingface_hub.utils import WeakFileLock
lock = f'{root}/.locks/models--org--name/abc.lock'
os.makedirs(os.path.dirname(lock))
with WeakFileLock(lock):
    f = open(lock)
    try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB); assert False
    except BlockingIOError: pass
    pid = os.fork()
    if pid == 0:
        g = open(lock, 'r+')
        try: fcntl.lockf(g, fcntl.LOCK_EX | fcntl.LOCK_NB); os._exit(0)
        except OSError: os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
open(f'{root}/version.txt', 'w').write('1')
assert open(f'{root}/version.txt').read() == '1'
assert open(f'{root}/CACHEDIR.TAG').read().startswith('Signature: 8a477f597d28d172789f06886806bc55')
# A file of the upper is a file.
p = f'{folder}/.no_exist/data'
with open(p, 'w+b') as f:
    f.write(b'hello'); f.flush(); os.fsync(f.fileno())
    f.seek(2); f.truncate(); assert os.fstat(f.fileno()).st_size == 2
    f.seek(6); f.write(b'end'); f.flush(); f.seek(0)
    assert f.read() == b'he\0\0\0\0end', f.read()
    os.unlink(p); f.seek(0); assert f.read(2) == b'he' and os.fstat(f.fileno()).st_nlink == 0
assert not os.path.exists(p)
os.mkdir(f'{folder}/.no_exist/d1'); os.rename(f'{folder}/.no_exist/d1', f'{folder}/refs/d2')
assert sorted(os.listdir(f'{folder}/refs')) == ['d2', 'main', 'refs'], os.listdir(f'{folder}/refs')
os.rmdir(f'{folder}/refs/d2')
assert sorted(os.listdir(root)) == ['.locks', 'CACHEDIR.TAG', 'models--org--name', 'version.txt'], os.listdir(root)
def fails(number, op):
    try: op(); assert False
    except OSError as e: assert e.errno == number, e
fails(errno.EROFS, lambda: open(f'{root}/other', 'w'))
fails(errno.EROFS, lambda: os.mkdir(f'{root}/models--x--y'))
fails(errno.EROFS, lambda: open(f'{folder}/blobs/x', 'w'))
fails(errno.EROFS, lambda: os.unlink(path + '/config.json'))
fails(errno.EROFS, lambda: os.rename(f'{folder}/refs/main', f'{folder}/snapshots/x'))
fails(errno.EROFS, lambda: open(os.path.realpath(weights), 'r+b'))
fails(errno.ENOTEMPTY, lambda: os.rmdir(f'{folder}/refs'))
def fill():
    with open(f'{folder}/.no_exist/full', 'wb', buffering=0) as f:
        for i in range(100): f.write(b'x' * 65536)
fails(errno.ENOSPC, fill)
os.unlink(f'{folder}/.no_exist/full')
fails(errno.ENOSPC, lambda: [open(f'{folder}/.no_exist/{i}', 'w').close() for i in range(200)])
for i in os.listdir(f'{folder}/.no_exist'):
    if len(i) < 9: os.unlink(f'{folder}/.no_exist/{i}')
print(hashlib.sha256(open(weights, 'rb').read()).hexdigest())
";
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(venv_python());
    command
        .args(["-c", script])
        .arg(fixture.dir.path())
        .arg(home.path());
    let got = Child::start(command, fixture.get().connection()).finish();
    assert_eq!(got, sha256(&weights));
    // Another user may take locks too.
    let mut other = Command::new("setpriv");
    other
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            PYTHON,
            "-c",
        ])
        .arg(
            "import sys, os\nd = sys.argv[1] + '/.locks/other'\nos.mkdir(d)\nos.rmdir(d)\n\
             assert os.access(sys.argv[1], os.R_OK)\n\
             try: os.rmdir(sys.argv[1] + '/models--org--name')\nexcept OSError: pass",
        )
        .arg(fixture.dir.path())
        .current_dir("/");
    assert_eq!(fixture.get().stats().errors, 0);
    Child::start(other, fixture.get().connection()).finish();
    fixture.end();
}
