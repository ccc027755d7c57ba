//! Fields that are missing, empty, wrong, oversized or hostile: each has the code that the CSI spec names.

use proptest::prelude::*;

use super::*;

type Change = Box<dyn Fn(&mut api::NodePublishVolumeRequest)>;

fn context(key: &'static str, value: impl Into<String>) -> Change {
    let value = value.into();
    Box::new(move |asked| drop(asked.volume_context.insert(key.into(), value.clone())))
}

fn secret(source: &'static str, secrets: &'static [(&'static str, &'static str)]) -> Change {
    Box::new(move |asked| {
        asked.volume_context.insert("source".into(), source.into());
        asked.secrets = map(secrets);
    })
}

fn target(path: impl Into<String>) -> Change {
    let path = path.into();
    Box::new(move |asked| asked.target_path = path.clone())
}

fn flags(flags: &'static [&'static str]) -> Change {
    Box::new(move |asked| {
        let mount_flags = flags.iter().map(|f| (*f).to_owned()).collect();
        asked.volume_capability.as_mut().unwrap().access_type =
            Some(AccessType::Mount(MountVolume {
                mount_flags,
                ..Default::default()
            }));
    })
}

/// What is wrong with a request to publish, and what the answer says.
fn wrongs(bed: &Bed) -> Vec<(Change, &'static str)> {
    let pods = bed.target("");
    let store = bed.dir.path().join("store").display().to_string();
    std::fs::write(bed.target("file"), "").unwrap();
    std::os::unix::fs::symlink("/etc", bed.target("link")).unwrap();
    vec![
        (Box::new(|a| a.volume_id.clear()), "volume_id is missing"),
        (
            Box::new(|a| a.volume_id = "x".repeat(129)),
            "volume_id is longer than 128",
        ),
        (
            Box::new(|a| a.volume_id = "x".repeat(10_000)),
            "volume_id is longer than 128",
        ),
        (
            Box::new(|a| a.volume_id = "a\nb".into()),
            "control characters",
        ),
        (target(""), "target_path is missing"),
        (target("relative/path"), "is not absolute"),
        (target("/"), "plain path"),
        (target("//"), "plain path"),
        (target(format!("{pods}a/../b")), "plain path"),
        (target(format!("{pods}./b")), "plain path"),
        (target(format!("{pods}..")), "plain path"),
        (target("/x\0y"), "control characters"),
        (target(format!("/{}", "x".repeat(5000))), "longer than 4095"),
        (target(format!("{pods}missing/mount")), "No such file"),
        (target(format!("{pods}file")), "no directory"),
        (target(format!("{pods}file/mount")), "Not a directory"),
        (target(format!("{pods}link")), "no directory"),
        (
            target(format!("{store}/run/csi/mounts/x")),
            "is inside the store",
        ),
        (
            target(format!("{pods}{}", "x".repeat(300))),
            "File name too long",
        ),
        (
            Box::new(|a| a.volume_capability = None),
            "volume_capability is missing",
        ),
        (
            Box::new(|a| a.volume_capability = Some(api::VolumeCapability::default())),
            "access_type is missing",
        ),
        (
            Box::new(|a| a.volume_capability.as_mut().unwrap().access_mode = None),
            "access_mode is missing",
        ),
        (
            Box::new(|a| a.volume_capability = Some(capability(Access::Unknown))),
            "access_mode 0 is unknown",
        ),
        (
            Box::new(|a| {
                let mode = AccessMode { mode: 99 };
                a.volume_capability.as_mut().unwrap().access_mode = Some(mode);
            }),
            "access_mode 99 is unknown",
        ),
        (
            Box::new(|a| {
                let block = AccessType::Block(BlockVolume {});
                a.volume_capability.as_mut().unwrap().access_type = Some(block);
            }),
            "not block devices",
        ),
        (Box::new(|a| a.readonly = false), "volumes are read-only"),
        (
            Box::new(|a| {
                a.readonly = false;
                a.volume_capability = Some(capability(Access::MultiNodeMultiWriter));
            }),
            "accessModes: [ReadOnlyMany]",
        ),
        (flags(&["ro", "rw"]), "volumes are read-only"),
        (flags(&["ro", "context=geheim"]), "option 2 is none of"),
        (
            Box::new(|a| {
                let mount = MountVolume {
                    mount_flags: vec!["x".repeat(5000)],
                    ..Default::default()
                };
                a.volume_capability.as_mut().unwrap().access_type = Some(AccessType::Mount(mount));
            }),
            "mount_flags are longer",
        ),
        (
            Box::new(|a| {
                let mount = MountVolume {
                    fs_type: "x".repeat(200),
                    ..Default::default()
                };
                a.volume_capability.as_mut().unwrap().access_type = Some(AccessType::Mount(mount));
            }),
            "fs_type is longer",
        ),
        (
            Box::new(|a| {
                let mount = MountVolume {
                    volume_mount_group: "1000".into(),
                    ..Default::default()
                };
                a.volume_capability.as_mut().unwrap().access_type = Some(AccessType::Mount(mount));
            }),
            "fsGroupPolicy: None",
        ),
        (Box::new(|a| a.volume_context.clear()), "source is missing"),
        (context("source", ""), "source is missing"),
        (context("source", "model"), "source: "),
        (context("source", "ftp://host/x"), "source: "),
        (context("source", "hf://"), "source: "),
        (context("source", "hf://org/../x"), "source: "),
        (
            context("source", format!("hf://org/{}", "x".repeat(5000))),
            "longer than 4096 bytes",
        ),
        (
            context("source", "https://u:geheim@host/x"),
            "holds a secret",
        ),
        (context("source", "file:///etc"), "csi.allow_files"),
        (context("sorce", "hf://org/model"), "\"sorce\" is none of"),
        (context("layout", "x"), "expected tree or hub"),
        (context("layout", ""), "expected tree or hub"),
        (context("mode", "eager"), "expected lazy or complete"),
        (context("verify", "no"), "expected complete or strict"),
        (context("include", "["), "source: "),
        (context("exclude", "/x"), "source: "),
        (
            context(
                "include",
                (0..100).map(|n| format!("a{n},")).collect::<String>(),
            ),
            "more than 64",
        ),
        (
            context("revision", "a/../b"),
            "expected a branch, tag or commit",
        ),
        (
            Box::new(|a| {
                a.volume_context
                    .insert("source".into(), "hf://o/m@a".into());
                a.volume_context.insert("revision".into(), "b".into());
            }),
            "is not the one in `source`",
        ),
        (
            Box::new(|a| {
                a.volume_context.insert("source".into(), "s3://b/x/".into());
                a.volume_context.insert("revision".into(), "b".into());
            }),
            "for hf:// only",
        ),
        (
            Box::new(|a| {
                a.volume_context.insert("source".into(), "s3://b/x/".into());
                a.volume_context.insert("layout".into(), "hub".into());
            }),
            "hub is for hf://",
        ),
        (
            secret("hf://o/m", &[("tokn", "geheim")]),
            "\"tokn\": for a hub model source it takes token",
        ),
        (
            secret("hf://o/m", &[("username", "geheim")]),
            "it takes token",
        ),
        (
            secret("s3://b/x/", &[("accessKeyId", "geheim")]),
            "one of accessKeyId and secretAccessKey",
        ),
        (
            secret("https://h/x", &[("password", "geheim")]),
            "one of username and password",
        ),
        (
            secret("gs://b/x/", &[("key", "geheim")]),
            "takes no secrets for gcs",
        ),
        (
            secret("oci://r.example/x:1", &[("password", "geheim")]),
            "for a registry source it takes .dockerconfigjson",
        ),
        (
            Box::new(|a| drop(a.secrets.insert("token".into(), "x".repeat(65_536)))),
            "secrets are longer",
        ),
        (
            Box::new(|a| drop(a.publish_context.insert("x".into(), "x".repeat(5000)))),
            "publish_context is longer",
        ),
    ]
}

#[tokio::test]
async fn publishing_refuses_what_is_wrong() {
    let bed = Bed::new().await;
    let mut count = 0;
    for (change, expected) in wrongs(&bed) {
        let mut asked = bed.publish("v", "a");
        change(&mut asked);
        let answer = bed.published(asked).await;
        let (code, why) = answer.expect_err(expected);
        // "NodePublishVolume Errors": "Exceeds capabilities".
        let exceeds = [
            "not block devices",
            "volumes are read-only",
            "accessModes: [ReadOnlyMany]",
            "fsGroupPolicy: None",
        ];
        let wanted = match exceeds.contains(&expected) {
            true => Code::FailedPrecondition,
            false => Code::InvalidArgument,
        };
        assert_eq!(code, wanted, "{expected}: {why}");
        assert!(why.contains(expected), "{expected}: {why}");
        assert!(!why.contains("geheim"), "{why}");
        assert!(why.len() < 1000, "{why}");
        count += 1;
    }
    assert!(count > 50);
    assert!(bed.models.state().opened.is_empty());
    bed.assert_empty();
}

#[tokio::test]
async fn publishing_takes_what_is_unusual() {
    let bed = Bed::new().await;
    let fine: Vec<Change> = vec![
        Box::new(|a| {
            a.readonly = false;
            a.volume_capability = Some(capability(Access::MultiNodeReaderOnly));
        }),
        Box::new(|a| a.volume_capability = Some(capability(Access::SingleNodeMultiWriter))),
        Box::new(|a| a.volume_id = "ü".repeat(64)),
        Box::new(|a| a.target_path.push('/')),
        flags(&["ro", "nosuid", "nodev", "noatime", "relatime", "noexec"]),
        context(
            "csi.storage.k8s.io/serviceAccount.tokens",
            "x".repeat(20_000),
        ),
        context("storage.kubernetes.io/csiProvisionerIdentity", "x"),
        context("revision", "refs/pr/1"),
        context("revision", "main"),
        context("include", "*.{json,txt}, *.safetensors\n\nx/*"),
        context("layout", "hub"),
        secret(
            "s3://b/x/",
            &[("accessKeyId", "a"), ("secretAccessKey", "b")],
        ),
        secret("https://h/x", &[("username", "a"), ("password", "b")]),
        secret("hf://o/m", &[("token", "")]),
        Box::new(|a| a.staging_target_path = "whatever".into()),
    ];
    for (number, change) in fine.into_iter().enumerate() {
        let mut asked = bed.publish(&format!("v{number}"), &format!("t{number}"));
        change(&mut asked);
        let (volume, target) = (asked.volume_id.clone(), asked.target_path.clone());
        let done = bed.published(asked).await;
        done.unwrap_or_else(|e| panic!("{number}: {e:?}"));
        bed.unpublished(&volume, &target).await.unwrap();
    }
    bed.assert_empty();

    let bed = Bed::with(Config {
        allow_files: true,
        ..Config::default()
    })
    .await;
    let mut asked = bed.publish("v", "a");
    context("source", "file:///srv/model")(&mut asked);
    bed.published(asked).await.unwrap();
}

#[tokio::test]
async fn the_other_calls_refuse_what_is_wrong() {
    let bed = Bed::new().await;
    let long = "x".repeat(10_000);
    let target = bed.target("a");
    let inside = bed.dir.path().join("store/run/csi/mounts/x");
    let (code, why) = bed
        .unpublished("v", inside.to_str().unwrap())
        .await
        .unwrap_err();
    assert_eq!(code, Code::InvalidArgument, "{why}");
    for (volume, path) in [
        ("", &*target),
        (&*long, &*target),
        ("a\u{7}", &*target),
        ("v", ""),
        ("v", "relative"),
        ("v", "/"),
        ("v", "/a/../b"),
        ("v", &*format!("/{long}")),
    ] {
        let (code, why) = bed.unpublished(volume, path).await.unwrap_err();
        assert_eq!(code, Code::InvalidArgument, "{why}");
        // "Volume does not exist": at a path where none can be, either.
        let nowhere = matches!(path, "relative" | "/" | "/a/../b");
        let wanted = match nowhere {
            true => Code::NotFound,
            false => Code::InvalidArgument,
        };
        let (code, why) = bed.stats(volume, path).await.unwrap_err();
        assert_eq!(code, wanted, "{path}: {why}");
    }

    let good = api::CreateVolumeRequest {
        name: "n".into(),
        volume_capabilities: vec![capability(Access::MultiNodeReaderOnly)],
        parameters: map(&[("source", "hf://org/model")]),
        ..Default::default()
    };
    let range = |required_bytes, limit_bytes| {
        Some(api::CapacityRange {
            required_bytes,
            limit_bytes,
        })
    };
    type Change = Box<dyn Fn(&mut api::CreateVolumeRequest)>;
    let invalid = Code::InvalidArgument;
    let wrongs: Vec<(Change, Code)> = vec![
        (Box::new(|a| a.name.clear()), invalid),
        (Box::new(|a| a.name = "x".repeat(129)), invalid),
        (Box::new(|a| a.name = "a\0".into()), invalid),
        (Box::new(|a| a.volume_capabilities.clear()), invalid),
        (
            Box::new(|a| {
                a.volume_capabilities
                    .push(capability(Access::MultiNodeMultiWriter))
            }),
            invalid,
        ),
        (
            Box::new(|a| a.volume_capabilities.push(api::VolumeCapability::default())),
            invalid,
        ),
        (Box::new(|a| a.parameters.clear()), invalid),
        (
            Box::new(|a| drop(a.parameters.insert("size".into(), "1".into()))),
            invalid,
        ),
        (
            Box::new(|a| drop(a.secrets.insert("x".into(), "geheim".into()))),
            invalid,
        ),
        (
            Box::new(|a| a.volume_content_source = Some(api::VolumeContentSource::default())),
            invalid,
        ),
        (
            Box::new(|a| a.accessibility_requirements = Some(api::TopologyRequirement::default())),
            invalid,
        ),
        (
            Box::new(|a| drop(a.mutable_parameters.insert("mode".into(), "lazy".into()))),
            invalid,
        ),
        (Box::new(move |a| a.capacity_range = range(-1, 0)), invalid),
        (Box::new(move |a| a.capacity_range = range(0, -1)), invalid),
        (
            Box::new(move |a| a.capacity_range = range(2, 1)),
            Code::OutOfRange,
        ),
    ];
    let mut controller = bed.controller();
    for (number, (change, code)) in wrongs.into_iter().enumerate() {
        let mut asked = good.clone();
        change(&mut asked);
        let status = controller.create_volume(asked).await.unwrap_err();
        assert_eq!(status.code(), code, "{number}: {status:?}");
        assert!(!status.message().contains("geheim"), "{status:?}");
    }
    for volume in ["", &*long] {
        let delete = api::DeleteVolumeRequest {
            volume_id: volume.into(),
            ..Default::default()
        };
        let status = controller.delete_volume(delete).await.unwrap_err();
        assert_eq!(status.code(), invalid);
    }
    for (volume, capabilities) in [
        ("", vec![capability(Access::MultiNodeReaderOnly)]),
        ("v", vec![]),
        (&*long, vec![capability(Access::MultiNodeReaderOnly)]),
    ] {
        let asked = api::ValidateVolumeCapabilitiesRequest {
            volume_id: volume.into(),
            volume_capabilities: capabilities,
            ..Default::default()
        };
        let status = controller.validate_volume_capabilities(asked).await;
        assert_eq!(status.unwrap_err().code(), invalid);
    }
}

/// Any text, as likely as not one that means something.
fn texts() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        any::<String>(),
        "[a-z./:@?=&,{}*\\[\\]-]{0,60}",
        Just("hf://org/model".to_owned()),
        Just("s3://bucket/x/".to_owned()),
        Just("hub".to_owned()),
        Just("complete".to_owned()),
        (1usize..9000).prop_map(|n| "x".repeat(n)),
    ]
}

fn maps() -> impl Strategy<Value = HashMap<String, String>> {
    let keys = prop_oneof![
        Just("source".to_owned()),
        Just("include".to_owned()),
        Just("revision".to_owned()),
        Just("layout".to_owned()),
        Just("token".to_owned()),
        texts(),
    ];
    proptest::collection::hash_map(keys, texts(), 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever comes, the answer is one of those that the spec has for it, and what was taken can be given back.
    #[test]
    fn any_request_is_answered(
        volume in texts(),
        path in texts(),
        below in any::<bool>(),
        context in maps(),
        source in any::<bool>(),
        secrets in maps(),
        mode in -1i32..9,
        readonly in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let bed = Bed::new().await;
            bed.models.state().complete = Some(Ok(()));
            let mut asked = bed.publish("v", "a");
            asked.volume_id = volume.clone();
            asked.target_path = match below {
                true => format!("{}{path}", bed.target("")),
                false => format!("/nowhere/{path}"),
            };
            asked.readonly = readonly;
            asked.volume_capability.as_mut().unwrap().access_mode = Some(AccessMode { mode });
            asked.secrets = secrets;
            asked.volume_context = context;
            if source {
                asked.volume_context.insert("source".into(), "hf://org/model".into());
            }
            let target = asked.target_path.clone();
            match bed.published(asked).await {
                Ok(()) => {
                    bed.stats(&volume, &target).await.unwrap();
                    bed.unpublished(&volume, &target).await.unwrap();
                }
                Err((code, why)) => {
                    let exceeds = why.starts_with("volumes are read-only");
                    let wanted = if exceeds { Code::FailedPrecondition } else { Code::InvalidArgument };
                    assert_eq!(code, wanted, "{why}");
                }
            }
            match bed.unpublished(&volume, &target).await {
                Ok(()) => {}
                Err((code, why)) => assert_eq!(code, Code::InvalidArgument, "{why}"),
            }
            bed.assert_empty();
        });
    }
}
