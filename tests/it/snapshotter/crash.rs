//! Power failure at every operation on the disk.

use hearth::snapshotter::{Kind, SnapshotErrorKind};

use super::*;
use crate::store::sim::{Crashes, Names, SimDisk};

/// Makes every change once, and says before each what must hold until it is acknowledged.
async fn live(snapshotter: &Arc<Snapshotter>, crashes: &Crashes) {
    let none = std::collections::BTreeMap::new;
    let say = |there: &[&'static str], changing: &[&'static str]| crashes.say(there, changing);
    let make = |key: &'static str, parent: &'static str| {
        snapshotter.create(Kind::Active, key, parent, none(), None)
    };
    say(&[], &["a"]);
    make("a", "").await.unwrap();
    say(&[], &["a", "c"]);
    snapshotter.commit("c", "a", none()).await.unwrap();
    say(&["c"], &["b"]);
    make("b", "c").await.unwrap();
    say(&["c"], &["b"]);
    snapshotter.remove("b").await.unwrap();
    say(&["c"], &[]);
    snapshotter.cleanup().await.unwrap();
    say(&["c"], &["d"]);
    make("d", "c").await.unwrap();
    say(&["c", "d"], &[]);
}

#[tokio::test]
async fn what_was_acknowledged_survives_a_power_failure_at_any_point() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("live");
    std::fs::create_dir(&root).unwrap();
    let disk = Arc::new(SimDisk::new(1));
    let crashes = Crashes::of(&disk, &root, dir.path());
    let settings = |root: &Path| Settings {
        root: root.join("snapshots"),
        sync: false,
    };
    let snapshotter = Snapshotter::open_on(disk.clone(), settings(&root), Arc::new(NoRoots));
    live(&snapshotter.unwrap(), &crashes).await;
    disk.end();
    let check = async |image: &Path, names: &Names| {
        let after = Snapshotter::open(settings(image), Arc::new(NoRoots)).unwrap();
        let mut found = Vec::new();
        for name in ["a", "b", "c", "d"] {
            match after.usage(name).await {
                Ok(usage) if usage.inodes > 0 => found.push(name),
                Ok(_) => panic!("{name} has lost its directory"),
                Err(error) => assert_eq!(error.kind(), SnapshotErrorKind::NotFound, "{error}"),
            }
        }
        if names.changing == ["a", "c"] {
            assert_eq!(found.len(), 1, "{}: {found:?}", image.display());
        }
        // And it works on.
        after.cleanup().await.unwrap();
        let made = after.create(Kind::Active, "new", "", Default::default(), None);
        made.await.unwrap();
        found
    };
    crashes.check(check).await;
}
