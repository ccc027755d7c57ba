//! Programs that run in a root.

use super::*;

/// Adds a file of this machine, with links followed, and the libraries it needs.
fn add_program(maker: &mut Maker, program: &str, path: &str, meta: Meta) {
    let content = fs::read(program).unwrap();
    maker.file(path, content, meta);
    let said = run(Command::new("ldd").arg(program));
    for library in said.split_whitespace().filter(|word| word.starts_with('/')) {
        let path = library.trim_start_matches('/');
        let content = fs::read(library).unwrap();
        let object = maker.objects.len() as u32;
        let meta = self::meta(0o755);
        if maker
            .tree
            .add_file(path.as_bytes(), object, meta.clone())
            .is_ok()
        {
            // Was not there yet: takes the number that `file` gives its object.
            maker.objects.push(Object {
                id: ObjectId::Sha256(Digest::of(&content)),
                size: content.len() as u64,
                git_sha1: None,
                recipe: Recipe::Raw(Location {
                    path: path.into(),
                    generation: None,
                    offset: 0,
                }),
            });
            maker.contents.push(content.into());
        }
    }
}

/// The standard library of this machine's Python, without what nothing imports.
fn add_python(maker: &mut Maker, dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        let path = entry.path();
        if path.is_dir() {
            if !matches!(
                name.to_str(),
                Some("__pycache__" | "test" | "idlelib" | "ensurepip")
            ) {
                add_python(maker, &path);
            }
        } else if path.is_file() {
            let inside = path.to_str().unwrap().trim_start_matches('/').to_owned();
            maker.file(&inside, fs::read(&path).unwrap(), meta(0o644));
        }
    }
}

#[test]
fn programs_run_in_a_container_on_a_root() {
    let mut maker = Maker::new();
    let python = fs::canonicalize(PYTHON).unwrap();
    let version = python.file_name().unwrap().to_str().unwrap().to_owned();
    let library = Path::new("/usr/lib").join(&version);
    add_program(
        &mut maker,
        python.to_str().unwrap(),
        "usr/bin/python3",
        meta(0o755),
    );
    add_python(&mut maker, &library);
    add_program(&mut maker, "/usr/bin/id", "usr/bin/id", meta(0o755));
    add_program(&mut maker, "/usr/bin/id", "usr/bin/suid", meta(0o4755));
    add_program(
        &mut maker,
        "/usr/bin/setpriv",
        "usr/bin/setpriv",
        meta(0o755),
    );
    add_program(&mut maker, "/usr/bin/cat", "usr/bin/cat", meta(0o755));
    // cap_dac_override, effective
    let capability = b"\x01\0\0\x02\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let able = Meta {
        xattrs: vec![xattr("security.capability", capability)],
        ..meta(0o755)
    };
    add_program(&mut maker, "/usr/bin/cat", "usr/bin/able", able);
    maker.file("secret", "for root\n", meta(0o400));
    maker.dir("tmp", meta(0o1777));
    let bed = maker.finish();
    let _root = bed.mount();
    let container = bed.container(&bed.path("root"), "container");
    let chroot =
        |arguments: &[&str]| run(Command::new("chroot").arg(&container.root).args(arguments));
    let python = |code: &str| chroot(&["/usr/bin/python3", "-c", code]);
    assert_eq!(python("print(1)"), "1\n");
    let mapped = "import mmap, os\nf = os.open('/usr/bin/python3', os.O_RDONLY)\nm = mmap.mmap(f, 0, prot=mmap.PROT_READ)\nprint(m[1:4].decode(), len(m) == os.fstat(f).st_size)";
    assert_eq!(python(mapped), "ELF True\n");
    let direct = "import mmap, os\nf = os.open('/usr/bin/python3', os.O_RDONLY | os.O_DIRECT)\nb = mmap.mmap(-1, 8192)\nprint(os.preadv(f, [b], 4096))\ng = open('/usr/bin/python3', 'rb')\ng.seek(4096)\nprint(g.read(8192) == b[:])";
    assert_eq!(python(direct), "8192\nTrue\n");
    let user = [
        "/usr/bin/setpriv",
        "--reuid=1000",
        "--regid=1000",
        "--clear-groups",
    ];
    let as_user = |arguments: &[&str]| chroot(&[&user, arguments].concat());
    assert_eq!(as_user(&["/usr/bin/id", "-u"]), "1000\n");
    assert_eq!(as_user(&["/usr/bin/suid", "-u"]), "0\n");
    assert_eq!(as_user(&["/usr/bin/able", "/secret"]), "for root\n");
    let mut denied = Command::new("chroot");
    let denied = denied
        .arg(&container.root)
        .args(user)
        .args(["/usr/bin/cat", "/secret"]);
    assert!(!denied.stderr(Stdio::null()).status().unwrap().success());
}
