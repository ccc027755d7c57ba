//! The snapshotter as containerd sees it: gRPC over its socket, with and without claimed layers.
//! The cases of the first file are those of containerd's own suite (its `snapshots/testsuite`),
//! without the mounting: `tests/real` does that.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use hearth::{
    r#gen::containerd::{
        services::snapshots::v1::{self as api, snapshots_client::SnapshotsClient},
        types,
    },
    snapshotter::{Listener, NoRoots, Roots, Settings, Snapshotter, serve},
};
use tempfile::TempDir;
use tonic::{Code, Status, transport::Channel};

mod claims;
mod crash;
mod suite;

/// A snapshotter that is served, and a client of it.
struct Bed {
    dir: TempDir,
    client: SnapshotsClient<Channel>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    serving: Option<tokio::task::JoinHandle<()>>,
}

impl Bed {
    async fn new() -> Self {
        Self::with(Arc::new(NoRoots)).await
    }

    async fn with(roots: Arc<dyn Roots>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (client, stop, serving) = start(dir.path(), roots).await;
        Self {
            dir,
            client,
            stop: Some(stop),
            serving: Some(serving),
        }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("snapshots")
    }

    async fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        self.serving.take().unwrap().await.unwrap();
    }

    async fn restart(&mut self, roots: Arc<dyn Roots>) {
        self.stop().await;
        let (client, stop, serving) = start(self.dir.path(), roots).await;
        self.client = client;
        self.stop = Some(stop);
        self.serving = Some(serving);
    }

    async fn prepare(&self, key: &str, parent: &str) -> Result<Vec<types::Mount>, Status> {
        self.prepare_with(key, parent, &[]).await
    }

    async fn prepare_with(
        &self,
        key: &str,
        parent: &str,
        with: &[(&str, &str)],
    ) -> Result<Vec<types::Mount>, Status> {
        let mut request = tonic::Request::new(api::PrepareSnapshotRequest {
            snapshotter: "hearth".into(),
            key: key.into(),
            parent: parent.into(),
            labels: labels(with),
        });
        let namespace = "testsuite".parse().unwrap();
        request
            .metadata_mut()
            .insert("containerd-namespace", namespace);
        let answer = self.client.clone().prepare(request).await?;
        Ok(answer.into_inner().mounts)
    }

    async fn view(&self, key: &str, parent: &str) -> Result<Vec<types::Mount>, Status> {
        let request = api::ViewSnapshotRequest {
            key: key.into(),
            parent: parent.into(),
            ..Default::default()
        };
        let answer = self.client.clone().view(request).await?;
        Ok(answer.into_inner().mounts)
    }

    async fn mounts(&self, key: &str) -> Result<Vec<types::Mount>, Status> {
        let request = api::MountsRequest {
            key: key.into(),
            ..Default::default()
        };
        let answer = self.client.clone().mounts(request).await?;
        Ok(answer.into_inner().mounts)
    }

    async fn commit(&self, name: &str, key: &str) -> Result<(), Status> {
        let request = api::CommitSnapshotRequest {
            name: name.into(),
            key: key.into(),
            labels: labels(&[("of", name)]),
            ..Default::default()
        };
        self.client.clone().commit(request).await?;
        Ok(())
    }

    async fn remove(&self, key: &str) -> Result<(), Status> {
        let request = api::RemoveSnapshotRequest {
            key: key.into(),
            ..Default::default()
        };
        self.client.clone().remove(request).await?;
        Ok(())
    }

    async fn stat(&self, key: &str) -> Result<api::Info, Status> {
        let request = api::StatSnapshotRequest {
            key: key.into(),
            ..Default::default()
        };
        let answer = self.client.clone().stat(request).await?;
        Ok(answer.into_inner().info.unwrap())
    }

    async fn update(&self, info: api::Info, paths: &[&str]) -> Result<api::Info, Status> {
        let request = api::UpdateSnapshotRequest {
            info: Some(info),
            update_mask: Some(prost_types::FieldMask {
                paths: paths.iter().map(|p| (*p).to_owned()).collect(),
            }),
            ..Default::default()
        };
        let answer = self.client.clone().update(request).await?;
        Ok(answer.into_inner().info.unwrap())
    }

    /// The names of what matches any of `filters`, in order.
    async fn list(&self, filters: &[&str]) -> Result<Vec<String>, Status> {
        let request = api::ListSnapshotsRequest {
            filters: filters.iter().map(|f| (*f).to_owned()).collect(),
            ..Default::default()
        };
        let mut stream = self.client.clone().list(request).await?.into_inner();
        let mut names = Vec::new();
        while let Some(batch) = stream.message().await? {
            assert!(batch.info.len() <= 100);
            names.extend(batch.info.into_iter().map(|info| info.name));
        }
        Ok(names)
    }

    async fn usage(&self, key: &str) -> Result<(i64, i64), Status> {
        let request = api::UsageRequest {
            key: key.into(),
            ..Default::default()
        };
        let usage = self.client.clone().usage(request).await?.into_inner();
        Ok((usage.size, usage.inodes))
    }

    async fn cleanup(&self) {
        let request = api::CleanupRequest::default();
        self.client.clone().cleanup(request).await.unwrap();
    }

    /// How many directories of snapshots there are.
    fn dirs(&self) -> usize {
        std::fs::read_dir(self.root().join("s")).unwrap().count()
    }
}

async fn start(
    dir: &Path,
    roots: Arc<dyn Roots>,
) -> (
    SnapshotsClient<Channel>,
    tokio::sync::oneshot::Sender<()>,
    tokio::task::JoinHandle<()>,
) {
    let settings = Settings {
        root: dir.join("snapshots"),
        sync: false,
    };
    let snapshotter = Snapshotter::open(settings, roots).unwrap();
    snapshotter.sweep().await;
    let address = dir.join("run/s.sock");
    let listener = Listener::bind(&address).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let serving = tokio::spawn(async move {
        let stop = async {
            let _ = stopped.await;
        };
        serve(snapshotter, listener, stop).await.unwrap();
    });
    let channel = tonic::transport::Endpoint::try_from(format!("unix://{}", address.display()));
    let channel = channel.unwrap().connect().await.unwrap();
    (SnapshotsClient::new(channel), stop, serving)
}

fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let owned = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
    pairs.iter().map(owned).collect()
}

/// The code of a failure.
fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> Code {
    result.unwrap_err().code()
}

/// `type source options` of the only mount.
fn shown(mounts: &[types::Mount]) -> String {
    let [mount] = mounts else {
        panic!("{mounts:?}");
    };
    assert_eq!(mount.target, "");
    format!(
        "{} {} {}",
        mount.r#type,
        mount.source,
        mount.options.join(",")
    )
}
