//! The driver as csi-sanity (kubernetes-csi/csi-test v5) asks it, case by case and with its defaults: SINGLE_NODE_WRITER,
//! volumes of 10 GiB, ids that nobody made, a directory for targets that the suite makes and wants to remove again, calls
//! ten times over. Its parameters (`--csi.testvolumeparameters`) name a model. Beside it, what the kubelet and the sidecars
//! ask otherwise.
//!
//! csi-sanity never says `readonly`: the cases that publish pass with `csi.refuse_writable = false`, and are refused without
//! (`who_wants_to_write_is_refused`). Not applicable, since the capability is not there (csi-sanity skips them): GetCapacity,
//! ListVolumes, snapshots, clones, ControllerPublishVolume, ControllerGetVolume, ControllerExpandVolume, ControllerModifyVolume,
//! NodeStageVolume, NodeExpandVolume, GroupController, SnapshotMetadata, SINGLE_NODE_MULTI_WRITER; and
//! `testvolumeaccesstype=block`: a volume is a file system.

use std::sync::{Arc, Mutex};

use futures_util::future::BoxFuture;
use hearth::r#gen::csi::v1::{
    self as api,
    controller_client::ControllerClient,
    identity_client::IdentityClient,
    node_client::NodeClient,
    plugin_capability,
    volume_capability::{
        AccessMode, AccessType, BlockVolume, MountVolume, access_mode::Mode as Access,
    },
};
use tonic::{Code, Status, transport::Channel};

use super::{
    csi::{Csi, connections, map},
    *,
};

const SIZE: i64 = 10 << 30;

/// What every case has.
#[derive(Clone)]
struct Sanity {
    identity: IdentityClient<Channel>,
    controller: ControllerClient<Channel>,
    node: NodeClient<Channel>,
    /// The parent of the target; made and removed for each case.
    dir: PathBuf,
    source: String,
    made: Arc<Mutex<Vec<String>>>,
}

type Case = (&'static str, fn(Sanity) -> BoxFuture<'static, ()>);

impl Sanity {
    fn target(&self) -> String {
        self.dir.join("target").to_str().unwrap().to_owned()
    }

    fn create(&self, name: &str, required: i64, limit: i64) -> api::CreateVolumeRequest {
        api::CreateVolumeRequest {
            name: name.into(),
            volume_capabilities: vec![capability(Access::SingleNodeWriter)],
            capacity_range: Some(api::CapacityRange {
                required_bytes: required,
                limit_bytes: limit,
            }),
            parameters: map(&[("source", &self.source)]),
            ..Default::default()
        }
    }

    async fn created(&self, asked: api::CreateVolumeRequest) -> Result<api::Volume, Status> {
        let made = self.controller.clone().create_volume(asked).await?;
        let volume = made.into_inner().volume.unwrap();
        assert!(!volume.volume_id.is_empty());
        self.made.lock().unwrap().push(volume.volume_id.clone());
        Ok(volume)
    }

    async fn volume(&self, name: &str) -> api::Volume {
        let volume = self.created(self.create(name, SIZE, 0)).await.unwrap();
        assert!(volume.capacity_bytes >= SIZE || volume.capacity_bytes == 0);
        volume
    }

    fn publish(&self, volume: &api::Volume) -> api::NodePublishVolumeRequest {
        api::NodePublishVolumeRequest {
            volume_id: volume.volume_id.clone(),
            target_path: self.target(),
            volume_capability: Some(capability(Access::SingleNodeWriter)),
            volume_context: volume.volume_context.clone(),
            ..Default::default()
        }
    }

    async fn published(&self, asked: api::NodePublishVolumeRequest) -> Result<(), Status> {
        let done = self.node.clone().node_publish_volume(asked).await;
        done.map(drop)
    }

    async fn unpublished(&self, volume: &str, target: &str) -> Result<(), Status> {
        let asked = api::NodeUnpublishVolumeRequest {
            volume_id: volume.into(),
            target_path: target.into(),
        };
        let done = self.node.clone().node_unpublish_volume(asked).await;
        done.map(drop)
    }

    async fn stats(
        &self,
        volume: &str,
        path: &str,
    ) -> Result<api::NodeGetVolumeStatsResponse, Status> {
        let asked = api::NodeGetVolumeStatsRequest {
            volume_id: volume.into(),
            volume_path: path.into(),
            ..Default::default()
        };
        let done = self.node.clone().node_get_volume_stats(asked).await;
        done.map(tonic::Response::into_inner)
    }

    async fn validated(
        &self,
        volume: &str,
        capabilities: Vec<api::VolumeCapability>,
    ) -> Result<api::ValidateVolumeCapabilitiesResponse, Status> {
        let asked = api::ValidateVolumeCapabilitiesRequest {
            volume_id: volume.into(),
            volume_capabilities: capabilities,
            ..Default::default()
        };
        let mut controller = self.controller.clone();
        let done = controller.validate_volume_capabilities(asked).await;
        done.map(tonic::Response::into_inner)
    }

    async fn deleted(&self, volume: &str) -> Result<(), Status> {
        let asked = api::DeleteVolumeRequest {
            volume_id: volume.into(),
            ..Default::default()
        };
        let done = self.controller.clone().delete_volume(asked).await;
        done.map(drop)
    }

    /// `runControllerTest`
    async fn whole(&self, times: usize) {
        let mut node = self.node.clone();
        let info = node.node_get_info(api::NodeGetInfoRequest {}).await;
        let info = info.unwrap().into_inner();
        assert!(!info.node_id.is_empty() && info.accessible_topology.is_none());
        let volume = self.volume(&format!("sanity-node-full-{times}")).await;
        for _ in 0..times {
            self.published(self.publish(&volume)).await.unwrap();
        }
        let stats = self.stats(&volume.volume_id, &self.target()).await.unwrap();
        assert!(!stats.usage.is_empty());
    }

    /// What the suite does after each case.
    async fn clean(&self) {
        let made = std::mem::take(&mut *self.made.lock().unwrap());
        for volume in made.iter().rev() {
            self.unpublished(volume, &self.target()).await.unwrap();
            self.deleted(volume).await.unwrap();
        }
        fs::remove_dir(&self.dir).expect("nothing is left in it");
    }
}

fn is<T: std::fmt::Debug>(done: Result<T, Status>, code: Code) {
    assert_eq!(done.unwrap_err().code(), code);
}

fn capability(mode: Access) -> api::VolumeCapability {
    api::VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume::default())),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

const IDENTITY: &[Case] = &[
    (
        "GetPluginCapabilities should return appropriate capabilities",
        |s| {
            Box::pin(async move {
                let asked = api::GetPluginCapabilitiesRequest {};
                let can = s.identity.clone().get_plugin_capabilities(asked).await;
                for one in can.unwrap().into_inner().capabilities {
                    let Some(plugin_capability::Type::Service(service)) = one.r#type else {
                        panic!("{one:?}")
                    };
                    let known = plugin_capability::service::Type::ControllerService;
                    assert_eq!(service.r#type(), known);
                }
            })
        },
    ),
    ("Probe should return appropriate information", |s| {
        Box::pin(async move {
            let probe = s.identity.clone().probe(api::ProbeRequest {}).await;
            assert_eq!(probe.unwrap().into_inner().ready, Some(true));
        })
    }),
    ("GetPluginInfo should return appropriate information", |s| {
        Box::pin(async move {
            let mut identity = s.identity.clone();
            let info = identity.get_plugin_info(api::GetPluginInfoRequest {});
            let name = info.await.unwrap().into_inner().name;
            // ^[a-zA-Z][A-Za-z0-9-\.\_]{0,61}[a-zA-Z]$
            assert!((2..=63).contains(&name.len()));
            let ends = [name.chars().next(), name.chars().next_back()];
            assert!(ends.iter().flatten().all(char::is_ascii_alphabetic));
            let inner = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
            assert!(name.chars().all(inner), "{name}");
        })
    }),
];

const CONTROLLER: &[Case] = &[
    (
        "ControllerGetCapabilities should return appropriate capabilities",
        |s| {
            Box::pin(async move {
                let asked = api::ControllerGetCapabilitiesRequest {};
                let can = s
                    .controller
                    .clone()
                    .controller_get_capabilities(asked)
                    .await;
                use api::controller_service_capability::{Type, rpc};
                let can = can.unwrap().into_inner().capabilities;
                let [Some(Type::Rpc(only))] = can.iter().map(|c| c.r#type).collect::<Vec<_>>()[..]
                else {
                    panic!("{can:?}")
                };
                assert_eq!(only.r#type(), rpc::Type::CreateDeleteVolume);
            })
        },
    ),
    ("CreateVolume should fail when no name is provided", |s| {
        Box::pin(async move {
            is(
                s.created(s.create("", SIZE, 0)).await,
                Code::InvalidArgument,
            );
        })
    }),
    (
        "CreateVolume should fail when no volume capabilities are provided",
        |s| {
            Box::pin(async move {
                let mut asked = s.create("sanity-no-capabilities", 0, 0);
                asked.volume_capabilities.clear();
                is(s.created(asked).await, Code::InvalidArgument);
            })
        },
    ),
    (
        "CreateVolume should return appropriate values SingleNodeWriter",
        |s| {
            Box::pin(async move {
                s.volume("sanity-single").await;
                let mut without = s.create("sanity-single-no-capacity", 0, 0);
                without.capacity_range = None;
                s.created(without).await.unwrap();
            })
        },
    ),
    (
        "CreateVolume should not fail with already existing name and same capacity",
        |s| {
            Box::pin(async move {
                let (one, two) = (
                    s.volume("sanity-twice").await,
                    s.volume("sanity-twice").await,
                );
                assert_eq!(one.volume_id, two.volume_id);
            })
        },
    ),
    (
        "CreateVolume should fail with already existing name and different capacity",
        |s| {
            Box::pin(async move {
                s.created(s.create("sanity-differ", SIZE, SIZE))
                    .await
                    .unwrap();
                let other = s.create("sanity-differ", 2 * SIZE, 2 * SIZE);
                is(s.created(other).await, Code::AlreadyExists);
            })
        },
    ),
    (
        "CreateVolume should not fail with maximum-length name",
        |s| {
            Box::pin(async move {
                s.volume(&"x".repeat(128)).await;
            })
        },
    ),
    (
        "DeleteVolume should fail when no volume id is provided",
        |s| Box::pin(async move { is(s.deleted("").await, Code::InvalidArgument) }),
    ),
    (
        "DeleteVolume should succeed when an invalid volume id is used",
        |s| Box::pin(async move { s.deleted("fake-vol-id").await.unwrap() }),
    ),
    ("DeleteVolume should return appropriate values", |s| {
        Box::pin(async move {
            let volume = s.volume("sanity-delete").await;
            s.deleted(&volume.volume_id).await.unwrap();
        })
    }),
    (
        "ValidateVolumeCapabilities should fail when no volume id is provided",
        |s| Box::pin(async move { is(s.validated("", vec![]).await, Code::InvalidArgument) }),
    ),
    (
        "ValidateVolumeCapabilities should fail when no volume capabilities are provided",
        |s| {
            Box::pin(async move {
                let volume = s.volume("sanity-validate-nocaps").await;
                is(
                    s.validated(&volume.volume_id, vec![]).await,
                    Code::InvalidArgument,
                );
            })
        },
    ),
    (
        "ValidateVolumeCapabilities should return appropriate values",
        |s| {
            Box::pin(async move {
                let volume = s.volume("sanity-validate").await;
                let wanted = vec![capability(Access::SingleNodeWriter)];
                let answer = s
                    .validated(&volume.volume_id, wanted.clone())
                    .await
                    .unwrap();
                assert_eq!(answer.confirmed.unwrap().volume_capabilities, wanted);
            })
        },
    ),
    (
        "ValidateVolumeCapabilities should fail when the requested volume does not exist",
        |s| {
            Box::pin(async move {
                let wanted = vec![capability(Access::SingleNodeWriter)];
                is(
                    s.validated("fake-vol-id-0123456789", wanted).await,
                    Code::NotFound,
                );
            })
        },
    ),
    // External-provisioner: a claim with `volumeMode: Block`, and a class with `--extra-create-metadata`.
    (
        "provisioning of a block volume is refused, and that of a claim keeps what is ours",
        |s| {
            Box::pin(async move {
                let mut block = s.create("pvc-block", SIZE, 0);
                block.volume_capabilities[0].access_type = Some(AccessType::Block(BlockVolume {}));
                is(s.created(block).await, Code::InvalidArgument);
                let mut asked = s.create("pvc-1", SIZE, 0);
                let extra = ["pvc/name", "pvc/namespace", "pv/name"];
                for key in extra {
                    asked
                        .parameters
                        .insert(format!("csi.storage.k8s.io/{key}"), "x".into());
                }
                let volume = s.created(asked).await.unwrap();
                assert_eq!(
                    volume.volume_context.len(),
                    1,
                    "{:?}",
                    volume.volume_context
                );
            })
        },
    ),
];

const NODE: &[Case] = &[
    (
        "NodeGetCapabilities should return appropriate capabilities",
        |s| {
            Box::pin(async move {
                let asked = api::NodeGetCapabilitiesRequest {};
                let can = s.node.clone().node_get_capabilities(asked).await;
                use api::node_service_capability::{Type, rpc};
                for one in can.unwrap().into_inner().capabilities {
                    let Some(Type::Rpc(rpc)) = one.r#type else {
                        panic!("{one:?}")
                    };
                    let known = [rpc::Type::GetVolumeStats, rpc::Type::VolumeCondition];
                    assert!(known.contains(&rpc.r#type()));
                }
            })
        },
    ),
    ("NodeGetInfo should return appropriate values", |s| {
        Box::pin(async move {
            let info = s
                .node
                .clone()
                .node_get_info(api::NodeGetInfoRequest {})
                .await;
            let info = info.unwrap().into_inner();
            assert!(!info.node_id.is_empty() && info.max_volumes_per_node >= 0);
        })
    }),
    (
        "NodePublishVolume should fail without volume id, target path, volume capability",
        |s| {
            Box::pin(async move {
                let mut asked = api::NodePublishVolumeRequest::default();
                is(s.published(asked.clone()).await, Code::InvalidArgument);
                asked.volume_id = "fake-vol-id-0123456789".into();
                is(s.published(asked.clone()).await, Code::InvalidArgument);
                asked.target_path = s.target();
                is(s.published(asked).await, Code::InvalidArgument);
            })
        },
    ),
    (
        "NodeUnpublishVolume should fail without volume id, target path",
        |s| {
            Box::pin(async move {
                is(s.unpublished("", "").await, Code::InvalidArgument);
                is(
                    s.unpublished("fake-vol-id", "").await,
                    Code::InvalidArgument,
                );
            })
        },
    ),
    ("NodeUnpublishVolume should remove target path", |s| {
        Box::pin(async move {
            let volume = s.volume("sanity-unpublish").await;
            s.published(s.publish(&volume)).await.unwrap();
            let there = || fs::symlink_metadata(s.target()).is_ok();
            assert!(there());
            s.unpublished(&volume.volume_id, &s.target()).await.unwrap();
            assert!(!there());
            // As the kubelet does where it does not know what became of it.
            s.unpublished(&volume.volume_id, &s.target()).await.unwrap();
        })
    }),
    (
        "NodeGetVolumeStats should fail without volume id, volume path",
        |s| {
            Box::pin(async move {
                is(s.stats("", "some/path").await, Code::InvalidArgument);
                is(s.stats("fake-vol-id", "").await, Code::InvalidArgument);
            })
        },
    ),
    (
        "NodeGetVolumeStats should fail when volume is not found, or not at the path",
        |s| {
            Box::pin(async move {
                is(s.stats("fake-vol-id", "some/path").await, Code::NotFound);
                let volume = s.volume("sanity-stats").await;
                s.published(s.publish(&volume)).await.unwrap();
                is(
                    s.stats(&volume.volume_id, "some/path").await,
                    Code::NotFound,
                );
            })
        },
    ),
    ("Node Service should work", |s| {
        Box::pin(async move { s.whole(1).await })
    }),
    ("Node Service should be idempotent", |s| {
        Box::pin(async move { s.whole(10).await })
    }),
    // The kubelet, for a volume of a pod whose CSIDriver says requiresRepublish: other tokens each time.
    (
        "publishing again with other tokens is the same volume",
        |s| {
            Box::pin(async move {
                let volume = s.volume("sanity-republish").await;
                let mut asked = s.publish(&volume);
                for round in 0..3 {
                    let info = [
                        ("ephemeral", "true".to_owned()),
                        ("pod.name", "pod".to_owned()),
                        ("pod.namespace", "default".to_owned()),
                        ("pod.uid", "6e3b4c2a".to_owned()),
                        ("serviceAccount.name", "default".to_owned()),
                        (
                            "serviceAccount.tokens",
                            format!("{{\"\":{{\"token\":\"{round}\"}}}}"),
                        ),
                    ];
                    for (key, value) in info {
                        let key = format!("csi.storage.k8s.io/{key}");
                        asked.volume_context.insert(key, value);
                    }
                    s.published(asked.clone()).await.unwrap();
                }
                assert_eq!(connections(&s.target()).len(), 1);
            })
        },
    ),
];

fn csi_with(config: &str) -> Csi {
    let bed = Bed::new();
    let path = bed.path("config.toml");
    fs::write(&path, config).unwrap();
    let options = format!(
        "--config {} csi --node-id n --endpoint unix://{}",
        path.display(),
        bed.path("csi.sock").display()
    );
    Csi::by(bed, false, options)
}

fn sanity(csi: &Csi, source: &str) -> Sanity {
    let channel = csi.channel();
    Sanity {
        identity: IdentityClient::new(channel.clone()),
        controller: ControllerClient::new(channel.clone()),
        node: NodeClient::new(channel),
        dir: csi.pods.0.join("csi-mount"),
        source: source.to_owned(),
        made: Arc::default(),
    }
}

#[test]
fn the_suite_passes() {
    let web = Web::new();
    let model = web.model("m", 1, 1);
    let csi = csi_with("[csi]\nrefuse_writable = false\n");
    let sanity = sanity(&csi, &model);
    let mut failed = Vec::new();
    for (name, case) in IDENTITY.iter().chain(CONTROLLER).chain(NODE) {
        fs::create_dir(&sanity.dir).unwrap();
        let run = csi.runtime.spawn(case(sanity.clone()));
        if csi.runtime.block_on(run).is_err() {
            failed.push(*name);
        }
        csi.runtime.block_on(sanity.clean());
    }
    assert_eq!(failed, [""; 0]);
    csi.assert_empty();
}

#[test]
fn who_wants_to_write_is_refused() {
    let web = Web::new();
    let model = web.model("m", 1, 1);
    let csi = csi_with("");
    let sanity = sanity(&csi, &model);
    fs::create_dir(&sanity.dir).unwrap();
    csi.runtime.block_on(async {
        // A claim may be ReadWriteOnce, as most are, if its pods say `readOnly: true`; ReadWriteMany says that they do not.
        let volume = sanity.volume("claim").await;
        let mut many = sanity.create("many", SIZE, 0);
        many.volume_capabilities = vec![capability(Access::MultiNodeMultiWriter)];
        is(sanity.created(many).await, Code::InvalidArgument);
        let mut asked = sanity.publish(&volume);
        let refused = sanity.published(asked.clone()).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains("readOnly: true"), "{refused:?}");
        asked.readonly = true;
        sanity.published(asked).await.unwrap();
        sanity.clean().await;
    });
    csi.assert_empty();
}
