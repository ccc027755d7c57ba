//! gRPC: decodes, calls [`Snapshotter`], answers. Errors are logged here, once.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use tonic::{Code, Request, Response, Status};
use tracing::Instrument as _;

use super::{
    Kind, Mount, Result, SnapshotError, SnapshotErrorKind, Snapshotter,
    filter::Filters,
    records::{Record, Time},
};
use crate::{
    r#gen::containerd::{
        services::snapshots::v1::{self as api, snapshots_server},
        types,
    },
    metrics,
    socket::{Listener, ServeError},
    telemetry,
};

/// Snapshots in one message of a list, as containerd's own service does it.
const LIST_BATCH: usize = 100;

/// Serves `snapshotter` on `listener` until `stop`; then finishes what is under way.
///
/// # Errors
/// A transport that fails.
pub async fn serve(
    snapshotter: Arc<Snapshotter>,
    listener: Listener,
    stop: impl Future<Output = ()> + Send,
) -> std::result::Result<(), ServeError> {
    let service = snapshots_server::SnapshotsServer::new(Service(snapshotter));
    let router = tonic::transport::Server::builder()
        .trace_fn(telemetry::rpc)
        .add_service(service);
    listener.serve(router, stop).await
}

struct Service(Arc<Snapshotter>);

/// Tells the span of this request which snapshot it is about.
fn about(key: &str, parent: &str) {
    let span = tracing::Span::current();
    telemetry::text(&span, "hearth.snapshot.key", key);
    if !parent.is_empty() {
        telemetry::text(&span, "hearth.snapshot.parent", parent);
    }
}

/// Runs `work` to its end, even if the client goes away meanwhile.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> std::result::Result<Response<T>, Status> {
    let answer = match tokio::spawn(work.in_current_span()).await {
        Ok(Ok(answer)) => Ok(Response::new(answer)),
        Ok(Err(error)) => Err(status(&error)),
        Err(failed) => {
            tracing::error!(error = %failed, "a request failed");
            Err(Status::internal(failed.to_string()))
        }
    };
    telemetry::answered(&answer);
    answer
}

fn status(error: &SnapshotError) -> Status {
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if !message.ends_with(&text) {
            message = format!("{message}: {text}");
        }
        cause = error.source();
    }
    let code = match error.kind() {
        SnapshotErrorKind::NotFound => Code::NotFound,
        SnapshotErrorKind::AlreadyExists => Code::AlreadyExists,
        SnapshotErrorKind::FailedPrecondition => Code::FailedPrecondition,
        SnapshotErrorKind::InvalidArgument => Code::InvalidArgument,
        SnapshotErrorKind::Unavailable => Code::Unavailable,
        SnapshotErrorKind::Internal => Code::Internal,
    };
    // The others are answers like any other: containerd asks to find out.
    if matches!(error, SnapshotError::Roots { .. }) || code == Code::Internal {
        metrics::global().snapshotter_failures.add(1);
        tracing::warn!(error = message, "a request failed");
    } else {
        tracing::debug!(answer = message, ?code);
    }
    Status::new(code, message)
}

/// containerd's namespace: a header (its package `namespaces`).
fn namespace<T>(request: &Request<T>) -> Option<String> {
    let value = request.metadata().get("containerd-namespace")?;
    value.to_str().ok().map(str::to_owned)
}

#[async_trait]
impl snapshots_server::Snapshots for Service {
    async fn prepare(
        &self,
        request: Request<api::PrepareSnapshotRequest>,
    ) -> std::result::Result<Response<api::PrepareSnapshotResponse>, Status> {
        let (this, namespace) = (Arc::clone(&self.0), namespace(&request));
        let asked = request.into_inner();
        about(&asked.key, &asked.parent);
        finish(async move {
            let labels = asked.labels.into_iter().collect();
            let (key, parent, namespace) = (&asked.key, &asked.parent, namespace.as_deref());
            let made = this.create(Kind::Active, key, parent, labels, namespace);
            let mounts = made.await?.into_iter().map(mount).collect();
            Ok(api::PrepareSnapshotResponse { mounts })
        })
        .await
    }

    async fn view(
        &self,
        request: Request<api::ViewSnapshotRequest>,
    ) -> std::result::Result<Response<api::ViewSnapshotResponse>, Status> {
        let (this, namespace) = (Arc::clone(&self.0), namespace(&request));
        let asked = request.into_inner();
        about(&asked.key, &asked.parent);
        finish(async move {
            let labels = asked.labels.into_iter().collect();
            let (key, parent, namespace) = (&asked.key, &asked.parent, namespace.as_deref());
            let made = this.create(Kind::View, key, parent, labels, namespace);
            let mounts = made.await?.into_iter().map(mount).collect();
            Ok(api::ViewSnapshotResponse { mounts })
        })
        .await
    }

    async fn mounts(
        &self,
        request: Request<api::MountsRequest>,
    ) -> std::result::Result<Response<api::MountsResponse>, Status> {
        let (this, asked) = (Arc::clone(&self.0), request.into_inner());
        about(&asked.key, "");
        finish(async move {
            let mounts = this.mounts(&asked.key).await?;
            let mounts = mounts.into_iter().map(mount).collect();
            Ok(api::MountsResponse { mounts })
        })
        .await
    }

    async fn commit(
        &self,
        request: Request<api::CommitSnapshotRequest>,
    ) -> std::result::Result<Response<()>, Status> {
        let (this, asked) = (Arc::clone(&self.0), request.into_inner());
        about(&asked.key, "");
        finish(async move {
            let labels = asked.labels.into_iter().collect();
            this.commit(&asked.name, &asked.key, labels).await
        })
        .await
    }

    async fn remove(
        &self,
        request: Request<api::RemoveSnapshotRequest>,
    ) -> std::result::Result<Response<()>, Status> {
        let (this, asked) = (Arc::clone(&self.0), request.into_inner());
        about(&asked.key, "");
        finish(async move { this.remove(&asked.key).await }).await
    }

    async fn stat(
        &self,
        request: Request<api::StatSnapshotRequest>,
    ) -> std::result::Result<Response<api::StatSnapshotResponse>, Status> {
        let found = self.0.stat(&request.into_inner().key);
        let info = Some(info(found.map_err(|e| status(&e))?));
        Ok(Response::new(api::StatSnapshotResponse { info }))
    }

    async fn update(
        &self,
        request: Request<api::UpdateSnapshotRequest>,
    ) -> std::result::Result<Response<api::UpdateSnapshotResponse>, Status> {
        let (this, asked) = (Arc::clone(&self.0), request.into_inner());
        finish(async move {
            let missing = || SnapshotError::Invalid("the request names no snapshot".into());
            let wanted = asked.info.ok_or_else(missing)?;
            let paths = asked.update_mask.map(|m| m.paths).unwrap_or_default();
            let labels = wanted.labels.into_iter().collect();
            let updated = this.update(&wanted.name, labels, paths).await?;
            let info = Some(info(updated));
            Ok(api::UpdateSnapshotResponse { info })
        })
        .await
    }

    type ListStream = tokio_stream::Iter<
        std::vec::IntoIter<std::result::Result<api::ListSnapshotsResponse, Status>>,
    >;

    async fn list(
        &self,
        request: Request<api::ListSnapshotsRequest>,
    ) -> std::result::Result<Response<Self::ListStream>, Status> {
        let filters = Filters::parse(&request.into_inner().filters)
            .map_err(|error| status(&SnapshotError::Invalid(error)))?;
        let mut infos = self.0.list(&filters).into_iter().map(info).peekable();
        let mut batches = Vec::new();
        while infos.peek().is_some() {
            let info = infos.by_ref().take(LIST_BATCH).collect();
            batches.push(Ok(api::ListSnapshotsResponse { info }));
        }
        Ok(Response::new(tokio_stream::iter(batches)))
    }

    async fn usage(
        &self,
        request: Request<api::UsageRequest>,
    ) -> std::result::Result<Response<api::UsageResponse>, Status> {
        let (this, asked) = (Arc::clone(&self.0), request.into_inner());
        finish(async move {
            let usage = this.usage(&asked.key).await?;
            let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
            Ok(api::UsageResponse {
                size: signed(usage.bytes),
                inodes: signed(usage.inodes),
            })
        })
        .await
    }

    async fn cleanup(
        &self,
        _: Request<api::CleanupRequest>,
    ) -> std::result::Result<Response<()>, Status> {
        let this = Arc::clone(&self.0);
        finish(async move { this.cleanup().await }).await
    }
}

fn mount(mount: Mount) -> types::Mount {
    types::Mount {
        r#type: mount.fs_type.to_owned(),
        source: mount.source,
        target: String::new(),
        options: mount.options,
    }
}

fn info(record: Record) -> api::Info {
    let kind = match record.kind {
        Kind::Active => api::Kind::Active,
        Kind::View => api::Kind::View,
        Kind::Committed => api::Kind::Committed,
    };
    let time = |Time(seconds, nanos): Time| prost_types::Timestamp {
        seconds: i64::try_from(seconds).unwrap_or(i64::MAX),
        nanos: i32::try_from(nanos).unwrap_or(0),
    };
    api::Info {
        name: record.name,
        parent: record.parent,
        kind: kind.into(),
        created_at: Some(time(record.created)),
        updated_at: Some(time(record.updated)),
        labels: record.labels.into_iter().collect::<HashMap<_, _>>(),
    }
}
