//! Power failure at every operation on the disk.

use super::*;
use crate::store::sim::{Crashes, SimDisk};

/// Makes every change once, and says before each what must hold until it is acknowledged.
async fn live(bed: &mut Bed, crashes: &Crashes) {
    let say = |there: &[&'static str], changing: &[&'static str]| crashes.say(there, changing);
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
    let disk = Arc::new(SimDisk::new(1));
    let mut bed = Bed::on(disk.clone());
    let crashes = Crashes::of(&disk, bed.dir.path(), dir.path());
    live(&mut bed, &crashes).await;
    disk.end();
    let owner = |volume: &str| format!("csi-{}", &Digest::of(volume.as_bytes()).hex()[..32]);
    let check = async |image: &Path, _: &_| {
        let (models, store) = (Arc::new(Made::default()), image.join("store"));
        let settings = Settings {
            store: store.clone(),
            ..bed.settings()
        };
        let marks = Arc::<Marks>::default();
        let driver = Driver::open(settings, models.clone(), marks).await;
        drop(driver.unwrap());
        let (owners, _) = models.state().swept.clone().unwrap();
        let mut found: Vec<_> = ["v", "w"]
            .into_iter()
            .filter(|volume| owners.contains(&owner(volume)))
            .collect();
        assert_eq!(owners.len(), found.len());
        let created = store.join(format!("run/csi/created/{}.json", made()));
        found.extend(created.exists().then_some("made"));
        found
    };
    crashes.check(check).await;
}
