//! gRPC: decodes, calls [`Driver`], answers with the status codes of the CSI spec. Errors are logged here, once.

use std::{collections::HashMap, sync::Arc, time::Instant};

use async_trait::async_trait;
use tonic::{Code, Request, Response, Status};

use super::{
    CsiError, CsiErrorKind, Driver, NAME, finish,
    request::{self, Create, Publish, Wanted},
};
use crate::{
    r#gen::csi::v1::{self as api, controller_server, identity_server, node_server},
    metrics,
    socket::{Listener, ServeError},
    telemetry,
};

/// What the kubelet calls the pod (`podInfoOnMount`).
const POD_NAME: &str = "csi.storage.k8s.io/pod.name";
const POD_UID: &str = "csi.storage.k8s.io/pod.uid";

type Answer<T> = std::result::Result<Response<T>, Status>;

/// Serves `driver` on `listener` until `stop`; then finishes what is under way.
///
/// # Errors
/// A transport that fails.
pub async fn serve(
    driver: Arc<Driver>,
    listener: Listener,
    stop: impl Future<Output = ()> + Send,
) -> std::result::Result<(), ServeError> {
    let service = Service(driver);
    let router = tonic::transport::Server::builder()
        .trace_fn(telemetry::rpc)
        .add_service(identity_server::IdentityServer::new(service.clone()))
        .add_service(controller_server::ControllerServer::new(service.clone()))
        .add_service(node_server::NodeServer::new(service));
    listener.serve(router, stop).await
}

#[derive(Clone)]
struct Service(Arc<Driver>);

fn answer<T>(done: Result<T, CsiError>) -> Answer<T> {
    let answer = done.map(Response::new).map_err(|error| status(&error));
    telemetry::answered(&answer);
    answer
}

/// The table of the CSI spec.
fn status(error: &CsiError) -> Status {
    let code = match error.kind() {
        CsiErrorKind::Invalid => Code::InvalidArgument,
        CsiErrorKind::NotFound => Code::NotFound,
        CsiErrorKind::AlreadyExists => Code::AlreadyExists,
        CsiErrorKind::FailedPrecondition => Code::FailedPrecondition,
        CsiErrorKind::Aborted => Code::Aborted,
        CsiErrorKind::Unauthenticated => Code::Unauthenticated,
        CsiErrorKind::Exhausted => Code::ResourceExhausted,
        CsiErrorKind::OutOfRange => Code::OutOfRange,
        CsiErrorKind::Unavailable => Code::Unavailable,
        CsiErrorKind::Internal => Code::Internal,
    };
    metrics::global().csi_failures.add(1);
    tracing::warn!(%error, ?code, "a request failed");
    Status::new(code, error.to_string())
}

#[async_trait]
impl identity_server::Identity for Service {
    async fn get_plugin_info(
        &self,
        _: Request<api::GetPluginInfoRequest>,
    ) -> Answer<api::GetPluginInfoResponse> {
        Ok(Response::new(api::GetPluginInfoResponse {
            name: NAME.to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: HashMap::new(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<api::GetPluginCapabilitiesRequest>,
    ) -> Answer<api::GetPluginCapabilitiesResponse> {
        use api::plugin_capability::{Service, Type, service};
        let service = Service {
            r#type: service::Type::ControllerService.into(),
        };
        Ok(Response::new(api::GetPluginCapabilitiesResponse {
            capabilities: vec![api::PluginCapability {
                r#type: Some(Type::Service(service)),
            }],
        }))
    }

    async fn probe(&self, _: Request<api::ProbeRequest>) -> Answer<api::ProbeResponse> {
        let ready = self.0.ready();
        answer(ready.map(|()| api::ProbeResponse { ready: Some(true) }))
    }
}

#[async_trait]
impl controller_server::Controller for Service {
    async fn create_volume(
        &self,
        request: Request<api::CreateVolumeRequest>,
    ) -> Answer<api::CreateVolumeResponse> {
        let config = &self.0.settings().config;
        let made = async {
            let asked = Create::new(request.into_inner(), config)?;
            let driver = Arc::clone(&self.0);
            let made = finish(async move { driver.create(asked).await }).await?;
            Ok(api::CreateVolumeResponse {
                volume: Some(api::Volume {
                    capacity_bytes: made.capacity,
                    volume_id: made.volume(),
                    volume_context: made.parameters.into_iter().collect(),
                    ..Default::default()
                }),
            })
        };
        answer(made.await)
    }

    async fn delete_volume(
        &self,
        request: Request<api::DeleteVolumeRequest>,
    ) -> Answer<api::DeleteVolumeResponse> {
        let deleted = async {
            let volume = request::volume_id(request.into_inner().volume_id)?;
            let driver = Arc::clone(&self.0);
            finish(async move { driver.delete(&volume).await }).await?;
            Ok(api::DeleteVolumeResponse {})
        };
        answer(deleted.await)
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<api::ValidateVolumeCapabilitiesRequest>,
    ) -> Answer<api::ValidateVolumeCapabilitiesResponse> {
        answer(self.validate(request.into_inner()))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<api::ControllerGetCapabilitiesRequest>,
    ) -> Answer<api::ControllerGetCapabilitiesResponse> {
        use api::controller_service_capability::{Rpc, Type, rpc};
        let rpc = Rpc {
            r#type: rpc::Type::CreateDeleteVolume.into(),
        };
        Ok(Response::new(api::ControllerGetCapabilitiesResponse {
            capabilities: vec![api::ControllerServiceCapability {
                r#type: Some(Type::Rpc(rpc)),
            }],
        }))
    }
}

impl Service {
    fn validate(
        &self,
        asked: api::ValidateVolumeCapabilitiesRequest,
    ) -> Result<api::ValidateVolumeCapabilitiesResponse, CsiError> {
        let volume = request::volume_id(asked.volume_id)?;
        if asked.volume_capabilities.is_empty() {
            return Err(CsiError::invalid("volume_capabilities are missing"));
        }
        let config = &self.0.settings().config;
        // A volume is what its attributes say, whoever made it; without them it must be one of ours.
        if !asked.volume_context.is_empty() {
            request::want("volume_context", &asked.volume_context, config)?;
        } else if self.0.created(&volume).is_none() {
            let message = format!("volume {volume} does not exist");
            return Err(CsiError::new(CsiErrorKind::NotFound, message));
        }
        if !asked.parameters.is_empty() {
            request::want("parameters", &asked.parameters, config)?;
        }
        for capability in &asked.volume_capabilities {
            if let Err(error) = request::capability_flags(capability, Wanted::Made, config) {
                let is_asked = capability.access_type.is_some() && capability.access_mode.is_some();
                if !is_asked {
                    return Err(error);
                }
                return Ok(api::ValidateVolumeCapabilitiesResponse {
                    confirmed: None,
                    message: error.to_string(),
                });
            }
        }
        Ok(api::ValidateVolumeCapabilitiesResponse {
            confirmed: Some(api::validate_volume_capabilities_response::Confirmed {
                volume_context: asked.volume_context,
                volume_capabilities: asked.volume_capabilities,
                parameters: asked.parameters,
                mutable_parameters: HashMap::new(),
            }),
            message: String::new(),
        })
    }
}

#[async_trait]
impl node_server::Node for Service {
    async fn node_publish_volume(
        &self,
        request: Request<api::NodePublishVolumeRequest>,
    ) -> Answer<api::NodePublishVolumeResponse> {
        let config = &self.0.settings().config;
        let begun = Instant::now();
        let published = async {
            let asked = request.into_inner();
            let said = |what| asked.volume_context.get(what).map(String::as_str);
            let span = tracing::Span::current();
            telemetry::text(&span, "hearth.volume.id", &asked.volume_id);
            for (key, value) in [
                ("k8s.namespace.name", said(request::NAMESPACE)),
                ("k8s.pod.name", said(POD_NAME)),
                ("k8s.pod.uid", said(POD_UID)),
            ] {
                telemetry::text(&span, key, value.unwrap_or_default());
            }
            let asked = Publish::new(asked, config)?;
            telemetry::text(&span, "hearth.reference", &asked.want.reference.to_string());
            self.0.publish(asked).await?;
            Ok(api::NodePublishVolumeResponse {})
        };
        let published = published.await;
        metrics::global().csi_publish.observe(begun.elapsed());
        answer(published)
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<api::NodeUnpublishVolumeRequest>,
    ) -> Answer<api::NodeUnpublishVolumeResponse> {
        let asked = request.into_inner();
        let gone = async {
            telemetry::text(
                &tracing::Span::current(),
                "hearth.volume.id",
                &asked.volume_id,
            );
            let volume = request::volume_id(asked.volume_id)?;
            let target = request::path("target_path", &asked.target_path)?;
            let driver = Arc::clone(&self.0);
            finish(async move { driver.unpublish(&volume, &target).await }).await?;
            Ok(api::NodeUnpublishVolumeResponse {})
        };
        answer(gone.await)
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<api::NodeGetVolumeStatsRequest>,
    ) -> Answer<api::NodeGetVolumeStatsResponse> {
        let asked = request.into_inner();
        let stats = async {
            let volume = request::volume_id(asked.volume_id)?;
            let path = request::place("volume_path", &asked.volume_path)?;
            let status = self.0.stats(&volume, &path).await?;
            let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
            let usage = |total, used, unit: api::volume_usage::Unit| api::VolumeUsage {
                // Nothing can be written.
                available: 0,
                total: signed(total),
                used: signed(used),
                unit: unit.into(),
            };
            let message = match &status.trouble {
                Some(trouble) => trouble.clone(),
                None => format!("{} of {} bytes are here", status.present, status.bytes),
            };
            Ok(api::NodeGetVolumeStatsResponse {
                usage: vec![
                    usage(status.bytes, status.present, api::volume_usage::Unit::Bytes),
                    usage(
                        status.inodes,
                        status.inodes,
                        api::volume_usage::Unit::Inodes,
                    ),
                ],
                volume_condition: Some(api::VolumeCondition {
                    abnormal: status.trouble.is_some(),
                    message,
                }),
            })
        };
        answer(stats.await)
    }

    async fn node_get_capabilities(
        &self,
        _: Request<api::NodeGetCapabilitiesRequest>,
    ) -> Answer<api::NodeGetCapabilitiesResponse> {
        use api::node_service_capability::{Rpc, Type, rpc};
        let all = [rpc::Type::GetVolumeStats, rpc::Type::VolumeCondition];
        let capabilities = all.map(|one| api::NodeServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: one.into() })),
        });
        Ok(Response::new(api::NodeGetCapabilitiesResponse {
            capabilities: capabilities.into(),
        }))
    }

    async fn node_get_info(
        &self,
        _: Request<api::NodeGetInfoRequest>,
    ) -> Answer<api::NodeGetInfoResponse> {
        Ok(Response::new(api::NodeGetInfoResponse {
            node_id: self.0.settings().node_id.clone(),
            ..Default::default()
        }))
    }
}
