//! Volumes that come and go.

use super::*;
use crate::store::failing::FailingDisk;

#[tokio::test]
async fn a_volume_is_published_and_unpublished_as_often_as_one_likes() {
    let bed = Bed::new().await;
    let asked = bed.publish("v", "a");
    for _ in 0..3 {
        bed.published(asked.clone()).await.unwrap();
    }
    assert_eq!(bed.marks.get().len(), 1);
    assert_eq!(bed.models.state().pins.len(), 1);
    let stats = bed.stats("v", &asked.target_path).await.unwrap();
    let [bytes, inodes] = &stats.usage[..] else {
        panic!("{stats:?}")
    };
    assert_eq!((bytes.total, bytes.used, bytes.available), (1000, 10, 0));
    assert_eq!(bytes.unit(), api::volume_usage::Unit::Bytes);
    assert_eq!((inodes.total, inodes.used), (3, 3));
    assert!(!stats.volume_condition.unwrap().abnormal);

    bed.models.state().trouble = Some("the origin is down".into());
    let stats = bed.stats("v", &asked.target_path).await.unwrap();
    let condition = stats.volume_condition.unwrap();
    assert!(condition.abnormal);
    assert_eq!(condition.message, "the origin is down");
    bed.models.state().trouble = None;
    bed.marks.mounted.lock().unwrap().clear();
    let stats = bed.stats("v", &asked.target_path).await.unwrap();
    assert!(stats.volume_condition.unwrap().abnormal, "not mounted");
    // The kubelet asks again now and then (requiresRepublish): that mends it.
    bed.published(asked.clone()).await.unwrap();
    assert_eq!(bed.marks.get().len(), 1);

    for wrong in [("w", &*asked.target_path), ("v", "/other")] {
        let (code, _) = bed.stats(wrong.0, wrong.1).await.unwrap_err();
        assert_eq!(code, Code::NotFound);
        bed.unpublished(wrong.0, wrong.1).await.unwrap();
    }
    assert_eq!(bed.marks.get().len(), 1, "another volume's target");
    for _ in 0..3 {
        bed.unpublished("v", &asked.target_path).await.unwrap();
    }
    bed.assert_empty();
    let (code, _) = bed.stats("v", &asked.target_path).await.unwrap_err();
    assert_eq!(code, Code::NotFound);
}

#[tokio::test]
async fn a_target_has_one_volume_and_a_volume_one_meaning() {
    let bed = Bed::new().await;
    let asked = bed.publish("v", "a");
    bed.published(asked.clone()).await.unwrap();

    let mut other = bed.publish("w", "a");
    let (code, why) = bed.published(other.clone()).await.unwrap_err();
    assert_eq!(code, Code::AlreadyExists, "{why}");
    for (key, value) in [
        ("source", "hf://org/other"),
        ("mode", "complete"),
        ("layout", "hub"),
        ("verify", "strict"),
        ("include", "*.json"),
    ] {
        let mut changed = asked.clone();
        changed.volume_context.insert(key.into(), value.into());
        let (code, why) = bed.published(changed).await.unwrap_err();
        assert_eq!(code, Code::AlreadyExists, "{key}: {why}");
    }
    let mut noexec = asked.clone();
    noexec.volume_capability = Some(api::VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume {
            mount_flags: vec!["noexec".into()],
            ..Default::default()
        })),
        ..capability(Access::MultiNodeReaderOnly)
    });
    let (code, _) = bed.published(noexec.clone()).await.unwrap_err();
    assert_eq!(code, Code::AlreadyExists);

    // The same volume at another target, as pods of one claim have it: one model, one pin.
    noexec.target_path = bed.target("b");
    bed.published(noexec).await.unwrap();
    let mounted = bed.marks.get();
    let flags: Vec<_> = mounted.values().map(|(_, flags)| flags.noexec).collect();
    assert_eq!(flags, [false, true]);
    assert_eq!(bed.models.state().pins.len(), 1);
    assert_eq!(bed.models.state().users.len(), 1);
    bed.unpublished("v", &asked.target_path).await.unwrap();
    assert_eq!(bed.models.state().pins.len(), 1, "still needed");
    other.target_path = asked.target_path.clone();
    bed.published(other).await.unwrap();
    assert_eq!(bed.models.state().pins.len(), 2);
    bed.unpublished("w", &asked.target_path).await.unwrap();
    bed.unpublished("v", &bed.target("b")).await.unwrap();
    bed.assert_empty();
}

#[tokio::test]
async fn a_volume_keeps_its_generation() {
    let mut bed = Bed::new().await;
    let asked = bed.publish("v", "a");
    bed.published(asked.clone()).await.unwrap();
    let first = bed.marks.get();
    bed.models.state().generation = 1;
    bed.published(asked.clone()).await.unwrap();
    assert_eq!(bed.marks.get(), first);
    bed.restart().await;
    bed.published(asked.clone()).await.unwrap();
    assert_eq!(bed.marks.get(), first);
    bed.published(bed.publish("new", "b")).await.unwrap();
    assert_eq!(bed.models.state().users.len(), 2);

    // Unless nobody has it any more.
    let model = first.values().next().unwrap().0.clone();
    let digest: Digest = format!("sha256:{}", &model[..64]).parse().unwrap();
    bed.models.state().gone.insert(digest);
    bed.published(asked.clone()).await.unwrap();
    assert_eq!(bed.models.state().users.len(), 1);
    bed.restart().await;
    bed.unpublished("v", &asked.target_path).await.unwrap();
    bed.unpublished("new", &bed.target("b")).await.unwrap();
    bed.assert_empty();
}

#[tokio::test]
async fn what_fails_leaves_nothing_and_has_its_code() {
    let bed = Bed::new().await;
    let asked = bed.publish("v", "a");
    for (kind, code) in [
        (ModelErrorKind::Invalid, Code::InvalidArgument),
        (ModelErrorKind::NotFound, Code::NotFound),
        (ModelErrorKind::Denied, Code::Unauthenticated),
        (ModelErrorKind::NoSpace, Code::ResourceExhausted),
        (ModelErrorKind::Unavailable, Code::Unavailable),
        (ModelErrorKind::Failed, Code::Internal),
    ] {
        bed.models.state().fails = Some(kind);
        let (found, why) = bed.published(asked.clone()).await.unwrap_err();
        assert_eq!(found, code, "{why}");
        assert!(why.contains("volume v"), "{why}");
    }
    bed.models.state().fails = None;
    bed.assert_empty();
    *bed.marks.fails.lock().unwrap() = true;
    let (code, _) = bed.published(asked.clone()).await.unwrap_err();
    assert_eq!(code, Code::Internal);
    bed.assert_empty();

    // What runs is not taken away because it could not be mended.
    *bed.marks.fails.lock().unwrap() = false;
    bed.published(asked.clone()).await.unwrap();
    *bed.marks.fails.lock().unwrap() = true;
    bed.published(asked.clone()).await.unwrap_err();
    assert_eq!(bed.marks.get().len(), 1);
}

#[tokio::test]
async fn complete_volumes_are_published_when_they_are() {
    let bed = Bed::new().await;
    let mut asked = bed.publish("v", "a");
    let context = &mut asked.volume_context;
    context.insert("mode".into(), "complete".into());
    // The kubelet gives up after two minutes and asks again: what was begun goes on.
    let mut node = bed.node();
    let mut waiting = Box::pin(node.node_publish_volume(asked.clone()));
    while bed.models.state().users.is_empty() {
        let early = tokio::time::timeout(Duration::from_millis(5), &mut waiting).await;
        assert!(early.is_err());
    }
    let late = tokio::time::timeout(Duration::from_millis(300), waiting).await;
    assert!(late.is_err());
    assert_eq!(bed.marks.get().len(), 0);
    assert_eq!(bed.models.state().users.len(), 1);
    // Or not.
    bed.unpublished("v", &asked.target_path).await.unwrap();
    bed.assert_empty();

    let again = tokio::spawn({
        let (mut node, asked) = (bed.node(), asked.clone());
        async move { node.node_publish_volume(asked).await }
    });
    while bed.models.state().users.is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bed.models.state().complete = Some(Ok(()));
    bed.models.complete.notify_waiters();
    again.await.unwrap().unwrap();
    assert_eq!(bed.marks.get().len(), 1);
    bed.unpublished("v", &asked.target_path).await.unwrap();

    bed.models.state().complete = Some(Err(ModelErrorKind::NoSpace));
    let (code, _) = bed.published(asked.clone()).await.unwrap_err();
    assert_eq!(code, Code::ResourceExhausted);
    bed.assert_empty();
    bed.models.state().complete = Some(Err(ModelErrorKind::Unavailable));
    let (code, _) = bed.published(asked.clone()).await.unwrap_err();
    assert_eq!(code, Code::Unavailable);
    assert_eq!(bed.models.state().users.len(), 1, "it goes on");
    bed.unpublished("v", &asked.target_path).await.unwrap();
    bed.assert_empty();
}

/// The kubelet forgets a volume that it never had after every error but those that may pass: nobody unpublishes it.
#[tokio::test]
async fn what_failed_for_good_is_left_by_nobody() {
    let bed = Bed::new().await;
    let mut asked = bed.publish("v", "a");
    let context = &mut asked.volume_context;
    context.insert("mode".into(), "complete".into());
    bed.models.state().complete = Some(Err(ModelErrorKind::Failed));
    let (code, _) = bed.published(asked.clone()).await.unwrap_err();
    assert_eq!(code, Code::Internal);
    bed.assert_empty();
    // It was begun, and may still come when the second call finds out that it will not.
    for (fails, completes) in [
        (None, ModelErrorKind::Failed),
        (None, ModelErrorKind::NotFound),
        (Some(ModelErrorKind::Denied), ModelErrorKind::Unavailable),
        (Some(ModelErrorKind::Failed), ModelErrorKind::Unavailable),
    ] {
        bed.models.state().complete = Some(Err(ModelErrorKind::Unavailable));
        let (code, _) = bed.published(asked.clone()).await.unwrap_err();
        assert_eq!(code, Code::Unavailable);
        assert_eq!(bed.models.state().users.len(), 1, "it goes on");
        bed.models.state().fails = fails;
        bed.models.state().complete = Some(Err(completes));
        bed.published(asked.clone()).await.unwrap_err();
        bed.assert_empty();
        bed.models.state().fails = None;
    }
    // What a pod has stays, whatever a call about it says.
    bed.models.state().complete = Some(Ok(()));
    bed.published(asked.clone()).await.unwrap();
    bed.models.state().fails = Some(ModelErrorKind::Denied);
    bed.published(asked.clone()).await.unwrap_err();
    let mut other = asked.clone();
    other
        .volume_context
        .insert("verify".into(), "strict".into());
    bed.published(other).await.unwrap_err();
    assert_eq!(
        (bed.marks.get().len(), bed.models.state().pins.len()),
        (1, 1)
    );
}

#[tokio::test]
async fn a_volume_whose_pod_is_gone_does_not_come_back() {
    let mut bed = Bed::new().await;
    let pod = PathBuf::from(bed.target("gone"));
    std::fs::create_dir(&pod).unwrap();
    bed.published(bed.publish("v", "gone/mount")).await.unwrap();
    bed.published(bed.publish("w", "here")).await.unwrap();
    // The node was made anew, but for the disk of the store.
    bed.marks.mounted.lock().unwrap().clear();
    std::fs::remove_dir(&pod).unwrap();
    bed.restart().await;
    for _ in 0..6000 {
        if bed.models.state().pins.len() == 1 && bed.marks.get().len() == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(bed.marks.get().contains_key(Path::new(&bed.target("here"))));
    bed.unpublished("w", &bed.target("here")).await.unwrap();
    bed.assert_empty();
}

#[tokio::test]
async fn an_unpublished_volume_does_not_come_back() {
    let bed = Bed::new().await;
    let mut asked = bed.publish("v", "a");
    let context = &mut asked.volume_context;
    context.insert("mode".into(), "complete".into());
    let publishing = tokio::spawn({
        let (mut node, asked) = (bed.node(), asked.clone());
        async move { node.node_publish_volume(asked).await }
    });
    while bed.models.state().users.is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bed.unpublished("v", &asked.target_path).await.unwrap();
    bed.models.state().complete = Some(Ok(()));
    bed.models.complete.notify_waiters();
    let status = publishing.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    bed.assert_empty();
}

#[tokio::test]
async fn calls_at_once_do_what_one_does() {
    let bed = Bed::new().await;
    let gate = bed.models.gate.write().await;
    let calls: Vec<_> = (0..20)
        .map(|n| {
            let asked = bed.publish(&format!("v{}", n % 4), &format!("t{}", n % 4));
            let mut node = bed.node();
            tokio::spawn(async move { node.node_publish_volume(asked).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(gate);
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(bed.marks.get().len(), 4);
    assert_eq!(bed.models.state().pins.len(), 4);
    assert_eq!(bed.models.state().users.len(), 1, "one model");
    let calls: Vec<_> = (0..4)
        .flat_map(|n| [n, n])
        .map(|n| {
            let asked = api::NodeUnpublishVolumeRequest {
                volume_id: format!("v{n}"),
                target_path: bed.target(&format!("t{n}")),
            };
            let mut node = bed.node();
            tokio::spawn(async move { node.node_unpublish_volume(asked).await })
        })
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    bed.assert_empty();
}

#[tokio::test]
async fn targets_of_a_volume_do_not_wait_for_each_other() {
    let bed = Bed::new().await;
    // The origin does not answer the first pod of a claim.
    let hang = async || {
        let hold = Arc::new(tokio::sync::Notify::new());
        *bed.models.hold.lock().unwrap() = Some(Arc::clone(&hold));
        let (mut node, asked) = (bed.node(), bed.publish("v", "late"));
        let late = tokio::spawn(async move { node.node_publish_volume(asked).await });
        while bed.models.hold.lock().unwrap().is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        (hold, late)
    };
    let come_and_go = async || {
        for n in 0..20 {
            let asked = bed.publish("v", &format!("t{n}"));
            bed.published(asked).await.unwrap();
        }
        assert_eq!(
            (bed.marks.get().len(), bed.models.state().pins.len()),
            (20, 1)
        );
        for n in 0..20 {
            let target = bed.target(&format!("t{n}"));
            bed.unpublished("v", &target).await.unwrap();
        }
    };
    let (hold, late) = hang().await;
    come_and_go().await;
    hold.notify_one();
    late.await.unwrap().unwrap();
    assert_eq!(bed.models.state().pins.len(), 1, "the late one needs it");
    bed.unpublished("v", &bed.target("late")).await.unwrap();
    bed.assert_empty();
    // Nobody keeps the pin where the late one comes to nothing.
    let (hold, late) = hang().await;
    come_and_go().await;
    bed.models.state().fails = Some(ModelErrorKind::Denied);
    hold.notify_one();
    late.await.unwrap().unwrap_err();
    bed.assert_empty();
}

#[tokio::test]
async fn two_volumes_do_not_fight_for_a_target() {
    let bed = Bed::new().await;
    let gate = bed.models.gate.write().await;
    let calls: Vec<_> = (0..8)
        .map(|n| {
            let asked = bed.publish(&format!("v{n}"), "a");
            let mut node = bed.node();
            tokio::spawn(async move { node.node_publish_volume(asked).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(gate);
    let mut winners = 0;
    for call in calls {
        match call.await.unwrap() {
            Ok(_) => winners += 1,
            Err(status) => assert_eq!(status.code(), Code::AlreadyExists, "{status:?}"),
        }
    }
    assert_eq!((winners, bed.models.state().pins.len()), (1, 1));
    for n in 0..8 {
        bed.unpublished(&format!("v{n}"), &bed.target("a"))
            .await
            .unwrap();
    }
    bed.assert_empty();
}

#[tokio::test]
async fn the_next_process_goes_on() {
    let mut bed = Bed::new().await;
    bed.published(bed.publish("v", "a")).await.unwrap();
    bed.published(bed.publish("w", "b")).await.unwrap();
    let before = bed.marks.get();
    // Its mounts are gone with it, and it was killed while it wrote.
    bed.models.state().users.clear();
    bed.marks.mounted.lock().unwrap().clear();
    let records = bed.records();
    std::fs::write(records.join("x.new"), "{").unwrap();
    bed.restart().await;
    let settings = bed.settings();
    let second = Driver::open(settings, bed.models.clone(), bed.marks.clone()).await;
    let second = second.err().unwrap().to_string();
    assert!(second.contains("another process"), "{second}");
    let (owners, models) = bed.models.state().swept.clone().unwrap();
    assert_eq!((owners.len(), models.len()), (2, 1));
    bed.wait_for(|bed| bed.marks.get() == before).await;
    bed.unpublished("v", &bed.target("a")).await.unwrap();
    bed.unpublished("w", &bed.target("b")).await.unwrap();
    bed.assert_empty();
}

/// What the volume of a record that cannot be read has stays, until it is published or unpublished again.
#[tokio::test]
async fn a_record_that_cannot_be_read_ends_nothing() {
    let disk = FailingDisk::new();
    let mut bed = Bed::on(Arc::new(disk.clone()));
    bed.start().await;
    for (volume, target) in [("v", "a"), ("w", "b")] {
        let published = bed.published(bed.publish(volume, target)).await;
        published.unwrap();
    }
    let record = bed.record_of("v", "a");
    let good = std::fs::read(&record).unwrap();
    let flipped = |at: usize| {
        let mut bad = good.clone();
        bad[at] ^= 1;
        bad
    };
    // Where it is still the record of something; where it is none; as good as another's; and as nothing at all.
    let generation = String::from_utf8_lossy(&good).find("sha256:").unwrap() + 9;
    let other = std::fs::read(bed.record_of("w", "b")).unwrap();
    for bad in [
        flipped(generation),
        flipped(0),
        other,
        Vec::new(),
        good.clone(),
    ] {
        std::fs::write(&record, &bad).unwrap();
        if bad == good {
            disk.bad_file(&record);
        }
        bed.models.state().swept = None;
        bed.restart().await;
        assert_eq!(bed.models.state().swept, None);
        let stats = bed.stats("v", &bed.target("a")).await.unwrap();
        let condition = stats.volume_condition.unwrap();
        assert!(condition.abnormal);
        assert!(condition.message.contains("damaged"), "{condition:?}");
        bed.stats("w", &bed.target("b")).await.unwrap();
        assert_eq!(bed.marks.get().len(), 2);
    }
    // The kubelet asks for it again.
    bed.published(bed.publish("v", "a")).await.unwrap();
    bed.restart().await;
    let swept = bed.models.state().swept.clone();
    assert_eq!(swept.unwrap().0.len(), 2);
    std::fs::write(&record, "{").unwrap();
    bed.restart().await;
    bed.unpublished("v", &bed.target("a")).await.unwrap();
    assert_eq!(bed.marks.get().len(), 1);
    assert!(!record.exists());
}

/// A volume that cannot be brought back is tried again, as long as it is published.
#[tokio::test]
async fn what_could_not_be_brought_back_is_tried_again() {
    let mut bed = Bed::new().await;
    bed.published(bed.publish("v", "a")).await.unwrap();
    let before = bed.marks.get();
    bed.models.state().users.clear();
    bed.marks.mounted.lock().unwrap().clear();
    bed.models.state().fails = Some(ModelErrorKind::Failed);
    bed.models.state().failed = 0;
    bed.restart().await;
    bed.wait_for(|bed| bed.models.state().failed > 1).await;
    bed.models.state().fails = None;
    bed.wait_for(|bed| bed.marks.get() == before).await;
    bed.unpublished("v", &bed.target("a")).await.unwrap();
    bed.assert_empty();
}

#[tokio::test]
async fn classes_make_volumes() {
    let mut bed = Bed::new().await;
    let asked = api::CreateVolumeRequest {
        name: "pvc-1".into(),
        volume_capabilities: vec![capability(Access::MultiNodeReaderOnly)],
        parameters: map(&[
            ("source", "oci://registry.example/model:1"),
            ("csi.storage.k8s.io/pvc/name", "claim"),
        ]),
        capacity_range: Some(api::CapacityRange {
            required_bytes: 1000,
            limit_bytes: 0,
        }),
        ..Default::default()
    };
    let mut controller = bed.controller();
    let made = controller.create_volume(asked.clone()).await.unwrap();
    let volume = made.into_inner().volume.unwrap();
    assert_eq!(volume.capacity_bytes, 1000);
    assert_eq!(volume.volume_context.len(), 1);
    assert!(volume.volume_id.len() <= 128);
    bed.restart().await;
    let mut controller = bed.controller();
    let again = controller.create_volume(asked.clone()).await.unwrap();
    assert_eq!(again.into_inner().volume.as_ref(), Some(&volume));
    let mut larger = asked.clone();
    larger.capacity_range.as_mut().unwrap().required_bytes = 2000;
    let mut other = asked.clone();
    other.parameters.insert("mode".into(), "complete".into());
    for taken in [larger, other] {
        let status = controller.create_volume(taken).await.unwrap_err();
        assert_eq!(status.code(), Code::AlreadyExists, "{status:?}");
    }

    let validate = |id: &str, mode, context| api::ValidateVolumeCapabilitiesRequest {
        volume_id: id.into(),
        volume_capabilities: vec![capability(mode)],
        volume_context: context,
        ..Default::default()
    };
    let id = &*volume.volume_id;
    let (reader, none) = (Access::MultiNodeReaderOnly, HashMap::new());
    let asked_for = validate(id, reader, none.clone());
    let found = controller
        .validate_volume_capabilities(asked_for.clone())
        .await;
    let confirmed = found.unwrap().into_inner().confirmed.unwrap();
    assert_eq!(confirmed.volume_capabilities, asked_for.volume_capabilities);
    let writer = validate(id, Access::MultiNodeMultiWriter, none.clone());
    let found = controller
        .validate_volume_capabilities(writer)
        .await
        .unwrap();
    let found = found.into_inner();
    assert!(found.confirmed.is_none() && found.message.contains("read-only"));
    let unknown = validate("nobody", reader, none.clone());
    let status = controller.validate_volume_capabilities(unknown).await;
    assert_eq!(status.unwrap_err().code(), Code::NotFound);
    // A volume that an administrator wrote down.
    let fixed = validate("fixed", reader, volume.volume_context.clone());
    let found = controller
        .validate_volume_capabilities(fixed)
        .await
        .unwrap();
    assert!(found.into_inner().confirmed.is_some());

    // It is published as any other.
    let mut publish = bed.publish(id, "a");
    publish.volume_context = volume.volume_context.clone();
    publish.volume_capability = Some(capability(reader));
    publish.readonly = false;
    bed.published(publish).await.unwrap();
    bed.unpublished(id, &bed.target("a")).await.unwrap();

    let delete = api::DeleteVolumeRequest {
        volume_id: id.into(),
        ..Default::default()
    };
    for _ in 0..2 {
        controller.delete_volume(delete.clone()).await.unwrap();
    }
    let status = controller
        .validate_volume_capabilities(validate(id, reader, none))
        .await;
    assert_eq!(status.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn secrets_are_used_and_never_written() {
    let bed = Bed::new().await;
    let mut asked = bed.publish("v", "a");
    // Tokens can be long, and files of registries hold many.
    let long = format!("hf_{}", "x".repeat(20_000));
    asked.secrets = map(&[("token", &long)]);
    bed.published(asked.clone()).await.unwrap();
    assert_eq!(bed.models.state().token.as_deref(), Some(&*long));
    asked.secrets = map(&[("token", "hf_geheim\n")]);
    bed.published(asked.clone()).await.unwrap();
    assert_eq!(bed.models.state().token.as_deref(), Some("hf_geheim"));
    asked.secrets = map(&[("token", "hf_neu")]);
    bed.published(asked).await.unwrap();
    assert_eq!(bed.models.state().token.as_deref(), Some("hf_neu"));
    for entry in std::fs::read_dir(bed.dir.path().join("store/run/csi/published")).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        assert!(!text.contains("hf_"), "{text}");
    }
}
