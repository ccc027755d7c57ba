//! Power failure at every operation on the disk.

use super::*;
use crate::store::sim::{Left, SimDisk};

/// Volumes whose records must be there, and those that may or may not, since they are being made or removed. Any other
/// must not be there.
#[derive(Debug, Clone, Default)]
struct Expected {
    there: Vec<&'static str>,
    changing: Vec<&'static str>,
}

/// Makes every change once, and says before each what must hold until it is acknowledged.
async fn live(bed: &mut Bed, now: &Mutex<Expected>) {
    let say = |there: &[&'static str], changing: &[&'static str]| {
        *now.lock().unwrap() = Expected {
            there: there.into(),
            changing: changing.into(),
        };
    };
    bed.start().await;
    say(&[], &["v"]);
    let one = bed.publish("v", "a");
    bed.published(one.clone()).await.unwrap();
    say(&["v"], &["w"]);
    bed.published(bed.publish("w", "b")).await.unwrap();
    say(&["v", "w"], &["made"]);
    let asked = api::CreateVolumeRequest {
        name: "made".into(),
        volume_capabilities: vec![capability(Access::MultiNodeReaderOnly)],
        parameters: map(&[("source", "hf://org/model")]),
        ..Default::default()
    };
    bed.controller().create_volume(asked).await.unwrap();
    say(&["v", "w", "made"], &[]);
    bed.restart().await;
    say(&["w", "made"], &["v"]);
    bed.unpublished("v", &one.target_path).await.unwrap();
    say(&["w", "made"], &[]);
    bed.published(bed.publish("w", "b")).await.unwrap();
    say(&["w"], &["made"]);
    let gone = api::DeleteVolumeRequest {
        volume_id: made(),
        ..Default::default()
    };
    bed.controller().delete_volume(gone).await.unwrap();
    say(&["w"], &[]);
    bed.published(bed.publish("w", "b")).await.unwrap();
}

/// The id of the volume that is called so.
fn made() -> String {
    format!("hearth-{}", &Digest::of(b"made").hex()[..32])
}

#[tokio::test]
async fn what_was_acknowledged_survives_a_power_failure_at_any_point() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SimDisk::new(1);
    let expected = Arc::new(Mutex::new(Expected::default()));
    let images = Arc::new(Mutex::new(Vec::new()));
    let disk = Arc::new(disk);
    let mut bed = Bed::on(disk.clone());
    disk.before_each({
        let (root, dir) = (bed.dir.path().to_owned(), dir.path().to_owned());
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
    live(&mut bed, &expected).await;
    disk.end();
    let images = std::mem::take(&mut *images.lock().unwrap());
    assert!(images.len() > 60, "{}", images.len());
    for (image, expected, what) in images {
        let (models, store) = (Arc::new(Made::default()), image.join("store"));
        let settings = Settings {
            store: store.clone(),
            ..bed.settings()
        };
        let marks = Arc::<Marks>::default();
        let driver = Driver::open(settings, models.clone(), marks).await;
        drop(driver.unwrap());
        let (owners, _) = models.state().swept.clone().unwrap();
        let owner = |volume: &str| format!("csi-{}", &Digest::of(volume.as_bytes()).hex()[..32]);
        let created = store.join(format!("run/csi/created/{}.json", made()));
        let mut found: Vec<_> = ["v", "w"]
            .into_iter()
            .filter(|volume| owners.contains(&owner(volume)))
            .collect();
        assert_eq!(owners.len(), found.len());
        found.extend(created.exists().then_some("made"));
        let at = format!(
            "{found:?} after power failed before {what} in {}: {expected:?}",
            image.display()
        );
        assert!(expected.there.iter().all(|n| found.contains(n)), "{at}");
        let may = |n: &&str| expected.there.contains(n) || expected.changing.contains(n);
        assert!(found.iter().all(may), "{at}");
    }
}
