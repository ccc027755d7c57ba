//! Images that the kubelet is to leave alone.
//!
//! When the disk gets full the kubelet removes images that no container uses, but for those that the
//! CRI calls pinned, and containerd calls so what carries the label `io.cri-containerd.pinned`. Here
//! the images get it that are pinned on this node. A label of our own says that it was us: so it goes
//! with the pin, and what somebody else has pinned stays theirs. A pull sets the labels of an image
//! anew, and pins come and go in other processes: so this looks again and again.
//!
//! containerd 1.6.20 (Debian 12) keeps the label and does not know it. Later ones do: its pull request
//! 8720 brought it to 1.6 in June 2023, 9382 in November for images that are there already; tested
//! with 1.7.24.

use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
    time::Duration,
};

use tonic::{
    Request, Status,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};

use crate::r#gen::containerd::services::images::v1::{
    ListImagesRequest, UpdateImageRequest, images_client::ImagesClient,
};

/// What the CRI of containerd looks for, and the value that it wants.
const PINNED: (&str, &str) = ("io.cri-containerd.pinned", "pinned");
/// That it was us who set it.
const OURS: (&str, &str) = ("hearth.dev/pinned", "pinned");
/// Where the CRI keeps its images.
const NAMESPACE: &str = "k8s.io";
/// The kubelet collects every five minutes.
const INTERVAL: Duration = Duration::from_secs(5);
/// How long one request may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The list of a node's images in one message; containerd sends no more than this either.
const MAX_MESSAGE: usize = 16 << 20;

/// Sees to it that containerd, which listens on `address`, calls those images pinned that `names`
/// gives, as containerd writes them: `registry.example/app:1`. Runs until it is dropped; what fails
/// is logged, once, and tried again.
pub async fn keep_pinned<N, E>(address: PathBuf, names: N)
where
    N: AsyncFn() -> Result<BTreeSet<String>, E>,
    E: std::fmt::Display,
{
    let mut failing = false;
    loop {
        let done = match names().await {
            Ok(names) => apply(&address, &names)
                .await
                .map_err(|status| status.message().to_owned()),
            Err(error) => Err(error.to_string()),
        };
        match done {
            Err(ref error) if !failing => {
                let address = address.display();
                tracing::warn!(%address, error, "containerd cannot be told which images are pinned");
            }
            Ok(()) if failing => tracing::info!("containerd is told again which images are pinned"),
            _ => {}
        }
        failing = done.is_err();
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn apply(address: &Path, names: &BTreeSet<String>) -> Result<(), Status> {
    let mut images = connect(address).await?;
    let all = images.list(request(ListImagesRequest::default())).await?;
    for mut image in all.into_inner().images {
        let is_ours = image.labels.contains_key(OURS.0);
        let is_pinned = image.labels.contains_key(PINNED.0);
        let value = match names.contains(&image.name) {
            true if !is_pinned => PINNED.1,
            false if is_ours => "",
            _ => continue,
        };
        // A label without value is removed.
        image.labels = HashMap::from([PINNED, OURS].map(|(key, _)| (key.into(), value.into())));
        let name = image.name.clone();
        let paths = [PINNED, OURS].map(|(key, _)| format!("labels.{key}"));
        let changed = images.update(request(UpdateImageRequest {
            image: Some(image),
            update_mask: Some(prost_types::FieldMask {
                paths: paths.into(),
            }),
        }));
        match changed.await {
            // It was removed meanwhile.
            Err(status) if status.code() == tonic::Code::NotFound => {}
            changed => {
                changed?;
                tracing::info!(image = name, pinned = !value.is_empty(), "labelled");
            }
        }
    }
    Ok(())
}

async fn connect(address: &Path) -> Result<ImagesClient<Channel>, Status> {
    let path = address.display();
    let endpoint = Endpoint::try_from(format!("unix://{path}"));
    let endpoint =
        endpoint.map_err(|error| Status::invalid_argument(format!("{path}: {error}")))?;
    let channel = endpoint.timeout(TIMEOUT).connect().await;
    let channel = channel.map_err(|_| Status::unavailable(format!("{path}: nobody answers")))?;
    Ok(ImagesClient::new(channel).max_decoding_message_size(MAX_MESSAGE))
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let namespace = MetadataValue::from_static(NAMESPACE);
    request
        .metadata_mut()
        .insert("containerd-namespace", namespace);
    request
}
