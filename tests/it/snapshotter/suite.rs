use std::{fs, os::unix::fs::MetadataExt as _};

use super::*;

/// The directory in which an active snapshot is written.
fn upper(mounts: &[types::Mount]) -> PathBuf {
    let mount = &mounts[0];
    let of_option = mount
        .options
        .iter()
        .find_map(|o| o.strip_prefix("upperdir="));
    PathBuf::from(of_option.unwrap_or(&mount.source))
}

/// c1 <- c2 committed; a1 active and v1 view on c2; a2 active and v2 view on nothing.
async fn base(bed: &Bed) {
    bed.prepare("c1-a", "").await.unwrap();
    bed.commit("c1", "c1-a").await.unwrap();
    bed.prepare("c2-a", "c1").await.unwrap();
    bed.commit("c2", "c2-a").await.unwrap();
    bed.prepare("a1", "c2").await.unwrap();
    bed.prepare("a2", "").await.unwrap();
    bed.view("v1", "c2").await.unwrap();
    bed.view("v2", "").await.unwrap();
}

#[tokio::test]
async fn snapshots_are_prepared_committed_viewed_and_removed() {
    let bed = Bed::new().await;
    let mounts = bed.prepare("preparing", "").await.unwrap();
    let content = upper(&mounts);
    assert_eq!(
        shown(&mounts),
        format!("bind {} rw,rbind", content.display())
    );
    assert_eq!(content.metadata().unwrap().mode() & 0o7777, 0o755);
    fs::write(content.join("foo"), "foo\n").unwrap();
    let active = bed.stat("preparing").await.unwrap();
    assert_eq!((active.kind(), &*active.parent), (api::Kind::Active, ""));
    bed.commit("committed", "preparing").await.unwrap();
    assert_eq!(code(bed.stat("preparing").await), Code::NotFound);
    let committed = bed.stat("committed").await.unwrap();
    assert_eq!(committed.kind(), api::Kind::Committed);
    assert_eq!(committed.labels, labels(&[("of", "committed")]));

    let next = bed.prepare("next", "committed").await.unwrap();
    let lower = content.display();
    let dir = upper(&next).parent().unwrap().display().to_string();
    let index = match Path::new("/sys/module/overlay/parameters/index").exists() {
        true => "index=off,",
        false => "",
    };
    assert_eq!(
        shown(&next),
        format!("overlay overlay {index}workdir={dir}/work,upperdir={dir}/fs,lowerdir={lower}")
    );
    assert!(Path::new(&dir).join("work").is_dir());
    assert_eq!(bed.mounts("next").await.unwrap(), next);
    bed.commit("committed-next", "next").await.unwrap();
    let info = bed.stat("committed-next").await.unwrap();
    assert_eq!(info.parent, "committed");
    let one = bed.view("one", "committed").await.unwrap();
    assert_eq!(shown(&one), format!("bind {lower} ro,rbind"));
    let two = bed.view("two", "committed-next").await.unwrap();
    assert_eq!(
        shown(&two),
        format!("overlay overlay {index}lowerdir={dir}/fs:{lower}")
    );
    assert_eq!(
        bed.list(&[]).await.unwrap(),
        ["committed", "committed-next", "one", "two"]
    );

    for name in ["one", "two"] {
        bed.remove(name).await.unwrap();
    }
    let refused = bed.remove("committed").await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("committed-next stands on it"));
    bed.remove("committed-next").await.unwrap();
    bed.remove("committed").await.unwrap();
    assert_eq!(code(bed.remove("committed").await), Code::NotFound);
    assert!(bed.list(&[]).await.unwrap().is_empty());
    assert!(bed.dirs() > 0);
    bed.cleanup().await;
    assert_eq!(bed.dirs(), 0);
}

#[tokio::test]
async fn wrong_requests_get_the_codes_that_containerd_knows() {
    let bed = Bed::new().await;
    base(&bed).await;
    // Two of one key.
    assert_eq!(code(bed.prepare("a1", "c2").await), Code::AlreadyExists);
    assert_eq!(code(bed.view("a1", "c2").await), Code::AlreadyExists);
    assert_eq!(code(bed.prepare("v1", "").await), Code::AlreadyExists);
    assert_eq!(code(bed.view("c1", "").await), Code::AlreadyExists);
    // Parents that are not there, or not committed.
    assert_eq!(code(bed.prepare("x", "none").await), Code::NotFound);
    assert_eq!(code(bed.prepare("x", "a1").await), Code::InvalidArgument);
    assert_eq!(code(bed.view("x", "v1").await), Code::InvalidArgument);
    assert_eq!(code(bed.prepare("", "").await), Code::InvalidArgument);
    // Mounts are for what is not committed.
    assert_eq!(code(bed.mounts("none").await), Code::NotFound);
    assert_eq!(code(bed.mounts("c1").await), Code::FailedPrecondition);
    // Only what is active can be committed, and not under a name that is taken.
    assert_eq!(code(bed.commit("c3", "none").await), Code::NotFound);
    assert_eq!(code(bed.commit("c3", "v1").await), Code::FailedPrecondition);
    assert_eq!(code(bed.commit("c3", "c1").await), Code::FailedPrecondition);
    assert_eq!(code(bed.commit("c1", "a1").await), Code::AlreadyExists);
    assert_eq!(code(bed.commit("a1", "a1").await), Code::AlreadyExists);
    assert_eq!(code(bed.commit("", "a1").await), Code::InvalidArgument);
    for key in ["c1", "c2"] {
        assert_eq!(code(bed.remove(key).await), Code::FailedPrecondition);
    }
    assert_eq!(code(bed.stat("none").await), Code::NotFound);
    assert_eq!(code(bed.usage("none").await), Code::NotFound);
    assert_eq!(code(bed.list(&["=x"]).await), Code::InvalidArgument);
    let none = api::Info {
        name: "none".into(),
        ..Default::default()
    };
    assert_eq!(code(bed.update(none, &[]).await), Code::NotFound);
    let long = bed.prepare_with("x", "", &[("k", &"v".repeat(4096))]).await;
    assert_eq!(code(long), Code::InvalidArgument);
    assert_eq!(
        bed.list(&[]).await.unwrap(),
        ["a1", "a2", "c1", "c2", "v1", "v2"]
    );
}

#[tokio::test]
async fn labels_are_updated_by_path() {
    let mut bed = Bed::new().await;
    base(&bed).await;
    for (name, kind, parent) in [
        ("c1", api::Kind::Committed, ""),
        ("c2", api::Kind::Committed, "c1"),
        ("a1", api::Kind::Active, "c2"),
        ("a2", api::Kind::Active, ""),
        ("v1", api::Kind::View, "c2"),
        ("v2", api::Kind::View, ""),
    ] {
        let before = bed.stat(name).await.unwrap();
        assert_eq!(before.created_at, before.updated_at);
        let set = |info: &api::Info, with: &[(&str, &str)]| api::Info {
            labels: labels(with),
            parent: "doesnotexist".into(),
            ..info.clone()
        };
        let all = [("l1", "v1"), ("l2", "v2"), ("l3", "v3")];
        let info = bed.update(set(&before, &all), &[]).await.unwrap();
        assert_eq!(
            (&*info.name, &*info.parent, info.kind()),
            (name, parent, kind)
        );
        assert_eq!(info.created_at, before.created_at);
        assert_ne!(info.updated_at, before.updated_at);
        assert_eq!(info.labels, labels(&all));

        let some = set(&info, &[("l1", "updated"), ("l4", "v4")]);
        let info = bed.update(some, &["labels.l1", "labels.l2"]).await.unwrap();
        assert_eq!(info.labels, labels(&[("l1", "updated"), ("l3", "v3")]));

        let info = bed.update(set(&info, &[("l4", "v4")]), &["labels"]).await;
        let info = info.unwrap();
        assert_eq!(info.labels, labels(&[("l4", "v4")]));
        let wrong = bed.update(set(&info, &[]), &["labels.l4", "parent"]).await;
        assert_eq!(code(wrong), Code::InvalidArgument);
        assert_eq!(bed.stat(name).await.unwrap(), info, "all or nothing");
    }
    let mut before = Vec::new();
    for name in bed.list(&[]).await.unwrap() {
        before.push(bed.stat(&name).await.unwrap());
    }
    bed.restart(Arc::new(NoRoots)).await;
    for info in before {
        assert_eq!(bed.stat(&info.name).await.unwrap(), info);
    }
    assert_eq!(bed.list(&["kind==view"]).await.unwrap(), ["v1", "v2"]);
    let both = bed.list(&["parent==c2,labels.l4", "name==a2"]).await;
    assert_eq!(both.unwrap(), ["a1", "a2", "v1"]);
}

#[tokio::test]
async fn names_can_be_used_again() {
    let bed = Bed::new().await;
    bed.prepare("committed-a", "").await.unwrap();
    bed.commit("committed-1", "committed-a").await.unwrap();
    bed.prepare("reuse-1", "committed-1").await.unwrap();
    bed.remove("reuse-1").await.unwrap();
    bed.view("reuse-1", "committed-1").await.unwrap();
    bed.remove("reuse-1").await.unwrap();
    bed.prepare("reuse-1", "").await.unwrap();
    bed.remove("committed-1").await.unwrap();
    bed.commit("committed-1", "reuse-1").await.unwrap();
    bed.cleanup().await;
    assert_eq!(bed.dirs(), 1);
}

#[tokio::test]
async fn usage_counts_what_a_snapshot_adds() {
    let mut bed = Bed::new().await;
    let content = upper(&bed.prepare("a", "").await.unwrap());
    let (empty, inodes) = bed.usage("a").await.unwrap();
    assert_eq!(inodes, 1);
    fs::write(content.join("big"), vec![7; 1 << 20]).unwrap();
    fs::hard_link(content.join("big"), content.join("again")).unwrap();
    let (size, inodes) = bed.usage("a").await.unwrap();
    assert_eq!((size - empty, inodes), (1 << 20, 2));
    bed.commit("c", "a").await.unwrap();
    assert_eq!(bed.usage("c").await.unwrap(), (size, inodes));
    bed.prepare("b", "c").await.unwrap();
    assert_eq!(bed.usage("b").await.unwrap().1, 1, "without what is below");
    bed.restart(Arc::new(NoRoots)).await;
    assert_eq!(bed.usage("c").await.unwrap(), (size, inodes));
}

/// Images may have a root directory of another owner; what is written goes on top of it.
#[tokio::test]
async fn the_owner_of_the_root_is_that_of_the_layer_below() {
    let bed = Bed::new().await;
    let content = upper(&bed.prepare("a", "").await.unwrap());
    if !nix::unistd::geteuid().is_root() {
        return; // only root can give files away
    }
    std::os::unix::fs::chown(&content, Some(1000), Some(1001)).unwrap();
    bed.commit("c", "a").await.unwrap();
    let meta = upper(&bed.prepare("b", "c").await.unwrap()).metadata();
    let meta = meta.unwrap();
    assert_eq!((meta.uid(), meta.gid()), (1000, 1001));
}

#[tokio::test]
async fn a_list_of_many_comes_in_parts_and_a_directory_has_one_server() {
    let bed = Bed::new().await;
    let making = (0..250).map(|n| {
        let bed = &bed;
        async move { bed.prepare(&format!("key-{n:03}"), "").await.unwrap() }
    });
    futures_util::future::join_all(making).await;
    let names = bed.list(&[]).await.unwrap();
    assert_eq!(names.len(), 250);
    assert_eq!(names[249], "key-249");
    let ours = Settings {
        root: bed.root(),
        sync: false,
    };
    let second = Snapshotter::open(ours, Arc::new(NoRoots)).err().unwrap();
    assert!(second.to_string().contains("served by another process"));
    let colon = Settings {
        root: bed.dir.path().join("a:b"),
        sync: false,
    };
    let refused = Snapshotter::open(colon, Arc::new(NoRoots)).err().unwrap();
    assert!(refused.to_string().contains("mount options"), "{refused}");
}
