//! Secrets of the namespace of a pod: read one by one, by name, when they are needed. Nothing of them is kept, shown or
//! written.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Secret as ApiSecret;
use kube::{Api, Client};
use serde_json::Value;

use super::client::within;
use crate::{
    reference::{Locator, Reference, Secret},
    source::Keys,
};

const DOCKER_CONFIG: &str = ".dockerconfigjson";
/// The older form: what is under `auths` of the newer one.
const DOCKER_OLD: &str = ".dockercfg";

/// What opens the references of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Names {
    /// By annotation; everything, but for images that it has nothing for.
    pub(super) named: Option<String>,
    /// What the kubelet uses; registries only.
    pub(super) pull: Vec<String>,
}

/// Why there are no keys. Shows no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(super) struct SecretError {
    message: String,
    /// It may go well later without that anybody does anything.
    pub(super) passes: bool,
}

/// The keys for `reference`; `None` where no secret is named that has some.
///
/// # Errors
/// A Secret that was named and cannot be read, or does not open a model that it was named for. One that only the kubelet
/// uses may be missing, as for the kubelet.
pub(super) async fn keys(
    client: &Client,
    namespace: &str,
    names: &Names,
    reference: &Reference,
) -> Result<Option<Keys>, SecretError> {
    let api = Api::<ApiSecret>::namespaced(client.clone(), namespace);
    if let Some(name) = &names.named {
        let mut data = read(&api, namespace, name).await?;
        modernize(&mut data);
        let of = |why: String| SecretError {
            message: format!("Secret {namespace}/{name}: {why}"),
            passes: false,
        };
        return match Keys::take(reference, &mut data).map_err(&of)? {
            (Some(keys), _) => Ok(Some(keys)),
            // Such sources are opened by the node's identity only.
            (None, "") => Ok(None),
            // It is for the models: images have pull secrets, or need none.
            (None, _) if matches!(reference.locator, Locator::Oci(_)) => {
                pull_keys(&api, namespace, names, reference).await
            }
            (None, wanted) => Err(of(format!("has none of {wanted}, which open {reference}"))),
        };
    }
    pull_keys(&api, namespace, names, reference).await
}

async fn pull_keys(
    api: &Api<ApiSecret>,
    namespace: &str,
    names: &Names,
    reference: &Reference,
) -> Result<Option<Keys>, SecretError> {
    if !matches!(reference.locator, Locator::Oci(_)) {
        return Ok(None);
    }
    let mut registries = Vec::new();
    for name in &names.pull {
        let mut data = match read(api, namespace, name).await {
            Ok(data) => data,
            Err(error) if error.passes => return Err(error),
            Err(error) => {
                tracing::debug!(namespace, name, %error, "an image pull secret is left out");
                continue;
            }
        };
        modernize(&mut data);
        let Some(Ok(Value::Object(mut config))) = data
            .remove(DOCKER_CONFIG)
            .map(|text| serde_json::from_str(&text))
        else {
            tracing::warn!(
                namespace,
                name,
                "an image pull secret holds no credentials for registries"
            );
            continue;
        };
        if let Some(auths @ Value::Object(_)) = config.remove("auths") {
            let config = serde_json::json!({ "auths": auths }).to_string();
            registries.push(Secret::new(config));
        }
    }
    Ok((!registries.is_empty()).then(|| Keys {
        registries,
        ..Keys::default()
    }))
}

async fn read(
    api: &Api<ApiSecret>,
    namespace: &str,
    name: &str,
) -> Result<BTreeMap<String, String>, SecretError> {
    let fail = |why: String, passes| SecretError {
        message: format!("Secret {namespace}/{name}: {why}"),
        passes,
    };
    let found = within(api.get(name)).await.map_err(|error| match &error {
        kube::Error::Api(status) if status.is_not_found() => fail("does not exist".into(), false),
        kube::Error::Api(status) if status.is_forbidden() => fail(
            "may not be read by hearth: bind the ClusterRole hearth-secrets to its service account in this \
             namespace"
                .into(),
            false,
        ),
        // What a server answers may hold nothing of the Secret: there was none in it.
        error => fail(format!("cannot be read: {error}"), true),
    })?;
    let data = found.data.unwrap_or_default().into_iter();
    let text = data.filter_map(|(key, value)| Some((key, String::from_utf8(value.0).ok()?)));
    Ok(text.collect())
}

/// Brings the older form of registry credentials into the newer one.
fn modernize(data: &mut BTreeMap<String, String>) {
    if data.contains_key(DOCKER_CONFIG) {
        return;
    }
    if let Some(old) = data.remove(DOCKER_OLD)
        && let Ok(auths) = serde_json::from_str::<Value>(&old)
    {
        let config = serde_json::json!({ "auths": auths }).to_string();
        data.insert(DOCKER_CONFIG.to_owned(), config);
    }
}
