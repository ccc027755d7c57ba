//! What holds a root, and what a root holds.

use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use super::*;

#[test]
fn a_root_holds_its_image_as_long_as_anything_uses_it() {
    let mut maker = Maker::new();
    maker.file("file", "content", meta(0o644));
    let bed = maker.finish();
    let dir = bed.path("root");
    assert!(!native::in_use(&bed.image()).unwrap());
    assert!(!native::in_use(&bed.path("missing")).unwrap());
    let kept = bed.mount().keep();
    assert_eq!(native::find(&dir).unwrap(), Some(kept.clone()));
    assert!(native::mounted().unwrap().contains(&kept));
    // Another process sees it too: here the locks of this one do not count.
    let locked = |wanted: i32| {
        let mut flock = Command::new("flock");
        let status = flock
            .args(["-n", "-x"])
            .arg(bed.image())
            .arg("true")
            .status();
        assert_eq!(status.unwrap().code(), Some(wanted));
    };
    locked(1);
    let twice = native::mount(&bed.image(), &[&bed.objects()], &dir).unwrap_err();
    assert_eq!(twice.kind(), MountErrorKind::Mounted);

    let file = File::open(dir.join("file")).unwrap();
    let busy = native::unmount(&dir, false).unwrap_err();
    assert_eq!(busy.kind(), MountErrorKind::Busy);
    drop(file);
    let container = bed.container(&dir, "container");
    native::unmount(&dir, false).unwrap();
    assert_eq!(native::find(&dir).unwrap(), None);
    locked(1);
    assert_eq!(fs::read(container.root.join("file")).unwrap(), b"content");
    drop(container);
    assert_freed(&bed.image());
    locked(0);
    let none = native::unmount(&dir, false).unwrap_err();
    assert_eq!(none.kind(), MountErrorKind::NotMounted);
}

#[test]
fn what_a_mounted_root_needs_is_not_evicted() {
    let mut maker = Maker::new();
    maker.file("file", "content", meta(0o644));
    let bed = maker.finish();
    let store = bed.open();
    let artifact = Artifact {
        reference: "oci://registry.test/image:1".into(),
        revision: String::new(),
        tree: bed.tree.clone(),
        objects: bed.objects.clone(),
    };
    let digest = store.record(&artifact).unwrap();
    let write = |out: &mut dyn std::io::Write| {
        let written = erofs::write(&artifact.tree, &artifact.objects, out);
        written.map(drop).map_err(std::io::Error::other)
    };
    let failed = store.write_root_image(&digest, |out| {
        out.write_all(b"half")?;
        Err(std::io::Error::other("made to fail"))
    });
    assert!(failed.unwrap_err().to_string().contains("made to fail"));
    assert!(!store.root_image(&digest).exists());
    let image = store.write_root_image(&digest, write).unwrap();
    assert_eq!(fs::read(&image).unwrap(), fs::read(bed.image()).unwrap());
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let first = inode(&image);
    // What is there stays: it may be mounted.
    assert_eq!(store.write_root_image(&digest, write).unwrap(), image);
    assert_eq!(inode(&image), first);
    // Unless it is damaged.
    let damage = || {
        let file = fs::File::options().write(true).open(&image).unwrap();
        file.write_all_at(b"?", 1500).unwrap();
    };
    damage();
    assert_eq!(store.write_root_image(&digest, write).unwrap(), image);
    assert_eq!(fs::read(&image).unwrap(), fs::read(bed.image()).unwrap());

    let dir = bed.path("root");
    let root = native::mount(&image, &[&store.objects_dir()], &dir).unwrap();
    root.keep();
    let all = CollectOptions {
        target_bytes: Some(0),
        dry_run: false,
    };
    assert_eq!(store.collect(&all).unwrap().evicted, [""; 0]);
    // Even what was removed by name, and with a container on top only.
    assert!(store.remove_forced(&artifact.reference).unwrap());
    let container = bed.container(&dir, "container");
    native::unmount(&dir, false).unwrap();
    let report = store.collect(&all).unwrap();
    assert_eq!((report.objects, report.others), (0, 0));
    assert_eq!(fs::read(container.root.join("file")).unwrap(), b"content");
    drop(container);
    assert_freed(&image);
    let report = store.collect(&all).unwrap();
    // The object; the tree and the image.
    assert_eq!((report.objects, report.others), (1, 2));
    assert!(!image.exists());
}

#[test]
fn what_cannot_be_mounted_leaves_nothing_behind() {
    let mut maker = Maker::new();
    maker.file("file", "content", meta(0o644));
    let bed = maker.finish();
    let before = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let try_mount = |image: &Path, objects: &Path, dir: &str| {
        native::mount(image, &[objects], &bed.path(dir)).unwrap_err()
    };
    let error = try_mount(&bed.path("missing"), &bed.objects(), "root");
    assert!(error.to_string().contains("o such file"), "{error}");
    let garbage = bed.path("garbage");
    fs::write(&garbage, vec![7; 1 << 16]).unwrap();
    try_mount(&garbage, &bed.objects(), "root");
    assert_freed(&garbage);
    try_mount(&bed.image(), &bed.path("missing"), "root");
    assert_freed(&bed.image());
    let error = try_mount(&bed.image(), &bed.objects(), "missing");
    assert_eq!(error.kind(), MountErrorKind::Directory);
    let ours = |text: &str| {
        let lines = text.lines();
        lines
            .filter(|l| l.contains(bed.dir.path().to_str().unwrap()))
            .count()
    };
    let after = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert_eq!(ours(&after), ours(&before));

    native::available(&bed.path("store")).unwrap();
    let run = fs::read_dir(bed.path("store/run")).unwrap();
    assert_eq!(run.count(), 0, "trying it out leaves nothing");
    let error = native::available(Path::new("/proc")).unwrap_err();
    assert_eq!(error.kind(), MountErrorKind::NoNative);
    assert!(error.hint().is_some());
}

#[test]
fn of_what_several_directories_have_the_first_is_read() {
    let mut maker = Maker::new();
    for name in ["store", "tier", "both"] {
        maker.file(name, name, meta(0o644));
    }
    let bed = maker.finish();
    let object = |root: &Path, content: &str| {
        let hex = Digest::of(content.as_bytes()).hex();
        root.join("sha256").join(&hex[..2]).join(&hex)
    };
    let (objects, tier) = (bed.objects(), bed.path("tier"));
    for name in ["tier", "both"] {
        let path = object(&tier, name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, name).unwrap();
    }
    fs::remove_file(object(&objects, "tier")).unwrap();
    fs::write(object(&tier, "both"), "beth").unwrap();
    let dir = bed.path("root");
    let root = native::mount(&bed.image(), &[&objects, &tier], &dir).unwrap();
    assert!(native::is_of_several(&dir).unwrap());
    for name in ["store", "tier", "both"] {
        assert_eq!(fs::read_to_string(dir.join(name)).unwrap(), name);
    }
    drop(root);
    let root = bed.mount();
    assert!(!native::is_of_several(&dir).unwrap());
    assert!(fs::read(dir.join("tier")).is_err());
    drop(root);
    let many = vec![objects; 11];
    let error = native::mount(&bed.image(), &many, &dir).unwrap_err();
    assert!(error.to_string().contains("11 directories"), "{error}");
}

#[test]
fn an_object_that_is_missing_fails_its_file_only() {
    let mut maker = Maker::new();
    maker.file("gone", "gone", meta(0o644));
    maker.file("here", "here", meta(0o644));
    let bed = maker.finish();
    let hex = Digest::of(b"gone").hex();
    fs::remove_file(bed.objects().join("sha256").join(&hex[..2]).join(&hex)).unwrap();
    let _root = bed.mount();
    assert!(fs::read(bed.path("root/gone")).is_err());
    assert_eq!(fs::read(bed.path("root/here")).unwrap(), b"here");
}

#[test]
fn equal_files_of_two_roots_share_their_pages() {
    let content: Bytes = (0..4_000_000u32)
        .map(|n| (n * 37 / 11) as u8)
        .collect::<Vec<_>>()
        .into();
    let mut maker = Maker::new();
    maker.file("a/file", content.clone(), meta(0o644));
    let first = maker.finish();
    let mut maker = Maker::new();
    maker.file("other", content.clone(), meta(0o755));
    maker.file("more", "more", meta(0o644));
    let tree = maker.tree.build();
    let image = first.path("second.erofs");
    erofs::write(&tree, &maker.objects, File::create(&image).unwrap()).unwrap();
    fs::create_dir(first.path("second")).unwrap();
    let _first = first.mount();
    let _second = native::mount(&image, &[&first.objects()], &first.path("second")).unwrap();
    let hex = Digest::of(&content).hex();
    let object = first.objects().join("sha256").join(&hex[..2]).join(&hex);
    let resident = |path: &Path| {
        let said = run(Command::new("fincore")
            .args(["-n", "-b", "-o", "RES"])
            .arg(path));
        said.trim().parse::<u64>().unwrap()
    };
    let forget = "import os, sys\nf = os.open(sys.argv[1], os.O_RDONLY)\nos.fsync(f)\nos.posix_fadvise(f, 0, 0, os.POSIX_FADV_DONTNEED)";
    run(Command::new(PYTHON).args(["-c", forget]).arg(&object));
    assert_eq!(resident(&object), 0);
    assert_eq!(fs::read(first.path("root/a/file")).unwrap(), content);
    // What was read through one root is there for the other, and is the object itself.
    for path in [
        &object,
        &first.path("second/other"),
        &first.path("root/a/file"),
    ] {
        assert!(resident(path) >= content.len() as u64, "{}", path.display());
    }
}
