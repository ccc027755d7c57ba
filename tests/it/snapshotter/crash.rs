//! Power failure at every operation on the disk.

use std::sync::Mutex;

use hearth::snapshotter::{Kind, SnapshotErrorKind};

use super::*;
use crate::store::sim::{Left, SimDisk};

/// Which names must be there, and which may or may not, since they are being made or removed. Any
/// other must not be there.
#[derive(Debug, Clone, Default)]
struct Expected {
    there: Vec<&'static str>,
    changing: Vec<&'static str>,
}

/// Makes every change once, and says before each what must hold until it is acknowledged.
async fn live(snapshotter: &Arc<Snapshotter>, now: &Mutex<Expected>) {
    let none = std::collections::BTreeMap::new;
    let say = |there: &[&'static str], changing: &[&'static str]| {
        *now.lock().unwrap() = Expected {
            there: there.into(),
            changing: changing.into(),
        };
    };
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
    let disk = SimDisk::new(1);
    let expected = Arc::new(Mutex::new(Expected::default()));
    let images = Arc::new(Mutex::new(Vec::new()));
    disk.before_each({
        let (root, dir) = (root.clone(), dir.path().to_owned());
        let (expected, images) = (Arc::clone(&expected), Arc::clone(&images));
        move |image, what| {
            let mut images = images.lock().unwrap();
            for left in [Left::Nothing, Left::All, Left::Some(images.len() as u64)] {
                let to = dir.join(format!("image-{}", images.len()));
                image.build(&root, &to, left, left);
                images.push((to, expected.lock().unwrap().clone(), what.to_owned()));
            }
        }
    });
    let settings = |root: &Path| Settings {
        root: root.join("snapshots"),
        sync: false,
    };
    let disk = Arc::new(disk);
    let snapshotter = Snapshotter::open_on(disk.clone(), settings(&root), Arc::new(NoRoots));
    live(&snapshotter.unwrap(), &expected).await;
    disk.end();
    let images = std::mem::take(&mut *images.lock().unwrap());
    assert!(images.len() > 60, "{}", images.len());
    for (image, expected, what) in images {
        let after = Snapshotter::open(settings(&image), Arc::new(NoRoots)).unwrap();
        let mut found = Vec::new();
        for name in ["a", "b", "c", "d"] {
            match after.usage(name).await {
                Ok(usage) if usage.inodes > 0 => found.push(name),
                Ok(_) => panic!("{name} has lost its directory"),
                Err(error) => assert_eq!(error.kind(), SnapshotErrorKind::NotFound, "{error}"),
            }
        }
        let at = format!(
            "{found:?} after power failed before {what} in {}: {expected:?}",
            image.display()
        );
        assert!(expected.there.iter().all(|n| found.contains(n)), "{at}");
        let may = |n: &&str| expected.there.contains(n) || expected.changing.contains(n);
        assert!(found.iter().all(may), "{at}");
        if expected.changing == ["a", "c"] {
            assert_eq!(found.len(), 1, "{at}");
        }
        // And it works on.
        after.cleanup().await.unwrap();
        let made = after.create(Kind::Active, "new", "", Default::default(), None);
        made.await.unwrap();
    }
}
