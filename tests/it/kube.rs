//! The face towards Kubernetes, against an API server that misbehaves on request.

mod agent;
mod crds;
#[expect(
    dead_code,
    reason = "not all that it can do is needed by all who share it"
)]
pub(crate) mod fake;
mod pods;
pub(crate) mod schema;
mod tenancy;
mod warmups;
mod watch;

/// The objects of a file of `daemonset/examples`, as the server has them.
fn example(file: &str) -> Vec<serde_json::Value> {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset/examples");
    let text = std::fs::read_to_string(dir.join(file)).unwrap();
    let mut objects: Vec<serde_json::Value> = serde_saphyr::from_multiple(&text).unwrap();
    for object in &mut objects {
        let plain = object["stringData"].take();
        for (name, value) in plain.as_object().into_iter().flatten() {
            let value = k8s_openapi::ByteString(value.as_str().unwrap().into());
            object["data"][name] = serde_json::to_value(value).unwrap();
        }
    }
    objects
}

/// The Secret of `examples/secrets.yaml`.
fn example_secret() -> serde_json::Value {
    let mut objects = example("secrets.yaml").into_iter();
    objects.find(|object| object["kind"] == "Secret").unwrap()
}
