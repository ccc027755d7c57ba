//! What a cluster installs: every manifest is of the types of Kubernetes, without a misspelt field; everything that one of
//! them names exists; every configuration file in them is one that hearth reads.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use hearth::{config::Config, kube::crd, metrics};
use k8s_openapi::{
    api::{
        admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding},
        apps::v1::{DaemonSet, Deployment},
        batch::v1::JobTemplateSpec,
        core::v1::{
            Namespace, PersistentVolumeClaim, Pod, ResourceQuota, Secret, Service, ServiceAccount,
        },
        networking::v1::NetworkPolicy,
        policy::v1::PodDisruptionBudget,
        rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
        scheduling::v1::PriorityClass,
        storage::v1::{CSIDriver, StorageClass},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::kube::schema;

mod kustomize;
mod names;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset")
}

fn files(extension: &str) -> Vec<PathBuf> {
    fn walk(dir: &Path, extension: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => walk(&path, extension, found),
                false if path.extension().is_some_and(|e| e == extension) => found.push(path),
                false => {}
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), extension, &mut found);
    found.sort();
    assert!(!found.is_empty(), "{extension}");
    found
}

fn documents(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap();
    serde_saphyr::from_multiple(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}

fn is_kustomization(document: &Value) -> bool {
    matches!(
        document["kind"].as_str(),
        Some("Kustomization" | "Component")
    )
}

/// Whether a file holds patches, of which not everything need be there.
fn is_patch(file: &Path) -> bool {
    file.parent().is_some_and(|dir| {
        let kustomization = dir.join("kustomization.yaml");
        kustomization.exists() && {
            let patches = documents(&kustomization)[0]["patches"].clone();
            let mut patches = patches.as_array().cloned().unwrap_or_default().into_iter();
            let name = file.file_name().unwrap().to_str().unwrap();
            patches.any(|patch| patch["path"] == name)
        }
    })
}

/// All manifests but kustomizations, with where they are; without the directives of patches.
fn manifests() -> Vec<(PathBuf, Value)> {
    let mut all = Vec::new();
    for file in files("yaml") {
        for document in documents(&file) {
            if !is_kustomization(&document) {
                all.push((file.clone(), document));
            }
        }
    }
    all
}

fn without_directives(value: &Value) -> Value {
    match value {
        Value::Object(fields) => (fields.iter())
            .filter(|(name, _)| *name != "$patch")
            .map(|(name, value)| (name.clone(), without_directives(value)))
            .collect::<serde_json::Map<_, _>>()
            .into(),
        Value::Array(items) => items.iter().map(without_directives).collect(),
        other => other.clone(),
    }
}

/// Every field of `given` must be in what its type makes of it, with the same value.
pub(crate) fn same(given: &Value, made: &Value, at: &str) {
    match (given, made) {
        (Value::Object(given), Value::Object(made)) => {
            for (name, value) in given {
                let at = format!("{at}.{name}");
                same(
                    value,
                    made.get(name)
                        .unwrap_or_else(|| panic!("{at}: there is no such field")),
                    &at,
                );
            }
        }
        (Value::Array(given), Value::Array(made)) => {
            assert_eq!(given.len(), made.len(), "{at}");
            for (index, (given, made)) in given.iter().zip(made).enumerate() {
                same(given, made, &format!("{at}[{index}]"));
            }
        }
        // Limits are numbers with parts in one of the types.
        (Value::Number(given), Value::Number(made)) => {
            assert_eq!(given.as_f64(), made.as_f64(), "{at}");
        }
        _ => assert_eq!(given, made, "{at}"),
    }
}

fn typed<T: DeserializeOwned + Serialize>(value: &Value, at: &str) {
    let typed: T = serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{at}: {e}"));
    same(value, &serde_json::to_value(&typed).unwrap(), at);
}

#[test]
fn every_manifest_is_of_its_type() {
    for (file, document) in manifests() {
        let (version, kind) = (
            document["apiVersion"].as_str().unwrap(),
            document["kind"].as_str().unwrap(),
        );
        let at = format!(
            "{}: {kind} {}",
            file.display(),
            document["metadata"]["name"]
        );
        let value = &without_directives(&document);
        assert!(value == &document || is_patch(&file), "{at} is no patch");
        match (version, kind) {
            ("v1", "Namespace") => typed::<Namespace>(value, &at),
            ("v1", "Pod") => typed::<Pod>(value, &at),
            ("v1", "ResourceQuota") => typed::<ResourceQuota>(value, &at),
            ("v1", "Secret") => typed::<Secret>(value, &at),
            ("v1", "Service") => typed::<Service>(value, &at),
            ("v1", "ServiceAccount") => typed::<ServiceAccount>(value, &at),
            ("v1", "PersistentVolumeClaim") => typed::<PersistentVolumeClaim>(value, &at),
            ("apps/v1", "DaemonSet") => typed::<DaemonSet>(value, &at),
            ("apps/v1", "Deployment") => typed::<Deployment>(value, &at),
            ("policy/v1", "PodDisruptionBudget") => typed::<PodDisruptionBudget>(value, &at),
            ("networking.k8s.io/v1", "NetworkPolicy") => typed::<NetworkPolicy>(value, &at),
            ("rbac.authorization.k8s.io/v1", "Role") => typed::<Role>(value, &at),
            ("rbac.authorization.k8s.io/v1", "RoleBinding") => typed::<RoleBinding>(value, &at),
            ("rbac.authorization.k8s.io/v1", "ClusterRole") => typed::<ClusterRole>(value, &at),
            ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => {
                typed::<ClusterRoleBinding>(value, &at)
            }
            ("scheduling.k8s.io/v1", "PriorityClass") => typed::<PriorityClass>(value, &at),
            ("storage.k8s.io/v1", "CSIDriver") => typed::<CSIDriver>(value, &at),
            ("storage.k8s.io/v1", "StorageClass") => typed::<StorageClass>(value, &at),
            ("apiextensions.k8s.io/v1", "CustomResourceDefinition") => {
                typed::<CustomResourceDefinition>(value, &at)
            }
            ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy") => {
                typed::<ValidatingAdmissionPolicy>(value, &at)
            }
            ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding") => {
                typed::<ValidatingAdmissionPolicyBinding>(value, &at)
            }
            (crd::API_VERSION, "Warmup") => {
                let mut wrong = Vec::new();
                schema::check(&schema::of(kind), value, "", &mut wrong);
                assert_eq!(wrong, [""; 0], "{at}");
                let warmup: crd::Warmup = serde_json::from_value(value.clone()).unwrap();
                warmup.spec.wanted().unwrap_or_else(|e| panic!("{at}: {e}"));
                warmup
                    .spec
                    .bandwidth()
                    .unwrap_or_else(|e| panic!("{at}: {e}"));
            }
            // Not of Kubernetes itself: what of them is.
            ("jobset.x-k8s.io/v1alpha2", "JobSet") => {
                for job in value["spec"]["replicatedJobs"].as_array().unwrap() {
                    typed::<JobTemplateSpec>(&job["template"], &at);
                }
            }
            ("monitoring.coreos.com/v1", "ServiceMonitor") => {
                typed::<k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector>(
                    &value["spec"]["selector"],
                    &at,
                );
                assert_eq!(keys(&value["spec"]), ["endpoints", "selector"], "{at}");
                for endpoint in value["spec"]["endpoints"].as_array().unwrap() {
                    assert_eq!(
                        keys(endpoint),
                        ["interval", "path", "port", "relabelings"],
                        "{at}"
                    );
                }
            }
            other => panic!("{at}: nobody knows {other:?}"),
        }
    }
}

fn keys(value: &Value) -> Vec<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

fn pod_spec(document: &Value) -> Option<&Value> {
    let spec = match document["kind"].as_str()? {
        "Pod" => &document["spec"],
        "DaemonSet" | "Deployment" => &document["spec"]["template"]["spec"],
        _ => return None,
    };
    Some(spec)
}

fn containers(pod: &Value) -> Vec<Value> {
    let of = |field: &str| pod[field].as_array().cloned().unwrap_or_default();
    of("initContainers")
        .into_iter()
        .chain(of("containers"))
        .collect()
}

/// What is installed by `daemonset/base`.
/// What `kubectl apply -k` makes of the base.
pub(crate) fn base() -> Vec<Value> {
    let dir = root().join("base");
    kustomize::base_of(&dir, &documents(&dir.join("kustomization.yaml"))[0])
}

#[test]
fn a_rolling_update_drops_no_mount() {
    let base = base();
    let find = |name: &str| {
        base.iter()
            .find(|d| d["kind"] == "DaemonSet" && d["metadata"]["name"] == name)
            .unwrap()
    };
    let (keeper, agent) = (find("hearth-keeper"), find("hearth-agent"));
    assert_eq!(keeper["spec"]["updateStrategy"]["type"], "OnDelete");
    assert_eq!(agent["spec"]["updateStrategy"]["type"], "RollingUpdate");
    let keeper_pod = pod_spec(keeper).unwrap();
    assert!(
        keeper_pod["containers"][0]["resources"]["limits"].is_null(),
        "nothing is to kill it"
    );
    assert!(keeper_pod["containers"][0]["livenessProbe"].is_null());
    for pod in [keeper_pod, pod_spec(agent).unwrap()] {
        assert_eq!(pod["priorityClassName"], "system-node-critical");
    }
    let config = Config::read(&root().join("base/config/agent.toml")).unwrap();
    let socket = config.agent.keeper.unwrap();
    let arguments = keeper_pod["containers"][0]["args"].as_array().unwrap();
    assert!(arguments.contains(&json!(format!("--socket={}", socket.display()))));
    let patience = pod_spec(agent).unwrap()["terminationGracePeriodSeconds"]
        .as_u64()
        .unwrap();
    assert!(patience > config.agent.drain);
}

#[test]
fn the_keeper_has_the_configuration_that_it_reads() {
    let base = base();
    let keeper = base
        .iter()
        .find(|d| d["kind"] == "DaemonSet" && d["metadata"]["name"] == "hearth-keeper");
    let pod = pod_spec(keeper.unwrap()).unwrap();
    let arguments = pod["containers"][0]["args"].as_array().unwrap();
    assert!(arguments.contains(&json!("--config=/etc/hearth/config.toml")));
    // It is never replaced: what it names must not go with the next configuration.
    let kustomization = &documents(&root().join("base/kustomization.yaml"))[0];
    let generated = kustomization["configMapGenerator"].as_array().unwrap();
    let own = generated.iter().find(|g| g["name"] == "hearth-keeper");
    assert_eq!(own.unwrap()["options"]["disableNameSuffixHash"], true);
    let config = Config::read(&root().join("base/config/keeper.toml")).unwrap();
    assert_eq!(config.mount, Default::default());
}

/// What the API server lets nodes do (system:node, and the node authorizer), of what an agent asks for.
#[test]
fn an_agent_with_the_credentials_of_the_kubelet_may_do_what_the_others_may() {
    let base = base();
    let overlay = root().join("overlays/systemd");
    let bound = |documents: &[Value], subject: &str| -> BTreeSet<String> {
        let bindings = documents.iter().filter(|d| {
            let mut subjects = d["subjects"].as_array().into_iter().flatten();
            d["kind"] == "ClusterRoleBinding" && subjects.any(|s| s["name"] == subject)
        });
        bindings
            .map(|d| d["roleRef"]["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let by_kubernetes = ["hearth-nodes", "hearth-pods"].map(str::to_owned);
    let mut of_nodes = bound(&documents(&overlay.join("nodes.yaml")), "system:nodes");
    of_nodes.extend(by_kubernetes);
    assert_eq!(of_nodes, bound(&base, "hearth-agent"));
    // Of what Kubernetes gives them nothing is in a role that they are given here.
    let known = ["pods", "nodes", "secrets"];
    for role in base.iter().filter(|d| d["kind"] == "ClusterRole") {
        let name = role["metadata"]["name"].as_str().unwrap();
        let rules = role["rules"].as_array().unwrap();
        let is_known = |rule: &Value| known.iter().any(|known| rule["resources"][0] == *known);
        if ["hearth-warmups", "hearth-events"].contains(&name) {
            assert!(!rules.iter().any(is_known), "{name}");
        }
    }
}

#[test]
fn the_provisioner_may_see_the_node_of_a_claim() {
    let base = base();
    let role = base
        .iter()
        .find(|d| d["kind"] == "ClusterRole" && d["metadata"]["name"] == "hearth-provisioner");
    let rules = role.unwrap()["rules"].as_array().unwrap();
    let nodes = rules
        .iter()
        .find(|rule| rule["resources"] == json!(["nodes"]));
    assert_eq!(nodes.unwrap()["verbs"], json!(["get", "list", "watch"]));
}

#[test]
fn configurations_are_valid_and_fit_the_manifests() {
    for file in files("toml") {
        Config::read(&file).unwrap_or_else(|e| panic!("{e}"));
    }
    // And so is what one only has to uncomment.
    let text = fs::read_to_string(root().join("systemd/config.toml")).unwrap();
    let lines = text.lines().map(|line| match line.strip_prefix("# ") {
        Some(said) if said.starts_with('[') || said.contains(" = \"") || said.ends_with("true") => {
            said
        }
        _ => line,
    });
    let text = lines.collect::<Vec<_>>().join("\n");
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    let config = Config::read(file.path()).unwrap();
    assert_eq!(config.agent.node_name(), "node-1");
    assert!(config.kube.enabled && config.kube.warmups.enabled);
    let read = |name: &str| Config::read(&root().join("base/config").join(name)).unwrap();
    let (agent, controller, provisioner) = (
        read("agent.toml"),
        read("controller.toml"),
        read("provisioner.toml"),
    );
    assert!(
        controller.kube.controller.enabled && !controller.csi.enabled && !controller.mirror.enabled
    );
    assert!(provisioner.csi.enabled && !provisioner.csi.node && !provisioner.mirror.enabled);
    assert!(
        agent.csi.enabled
            && agent.csi.node
            && agent.kube.warmups.enabled
            && !agent.kube.controller.enabled
    );
    let text = serde_json::to_string(&base()).unwrap();
    for endpoint in [&agent.csi.endpoint, &provisioner.csi.endpoint] {
        let path = endpoint.to_str().unwrap().trim_start_matches("unix://");
        assert!(text.contains(path), "{path}");
    }
    for config in [&agent, &controller, &provisioner] {
        assert_eq!(config.admin.address.port(), 5701);
    }
    // The name of the lease is in the role.
    let lease = format!(
        "\"resourceNames\":[\"{}\"]",
        controller.kube.controller.lease
    );
    assert!(text.contains(&lease));
}

#[test]
fn the_csi_driver_is_what_the_driver_does() {
    let base = base();
    let driver = base.iter().find(|d| d["kind"] == "CSIDriver").unwrap();
    assert_eq!(driver["metadata"]["name"], "csi.hearth.dev");
    for (field, value) in [
        ("attachRequired", json!(false)),
        ("podInfoOnMount", json!(true)),
        ("fsGroupPolicy", json!("None")),
        ("requiresRepublish", json!(true)),
        ("volumeLifecycleModes", json!(["Persistent", "Ephemeral"])),
    ] {
        assert_eq!(driver["spec"][field], value);
    }
    let known = [
        "source", "revision", "include", "exclude", "layout", "mode", "verify",
    ];
    for (file, document) in manifests() {
        let volumes = pod_spec(&document)
            .map(|pod| pod["volumes"].clone())
            .unwrap_or_default();
        let inline = volumes
            .as_array()
            .cloned()
            .unwrap_or_default()
            .into_iter()
            .map(|v| v["csi"]["volumeAttributes"].clone());
        let class = (document["kind"] == "StorageClass").then(|| document["parameters"].clone());
        for attributes in inline
            .chain(class)
            .filter(|attributes| !attributes.is_null())
        {
            for key in keys(&attributes) {
                assert!(known.contains(&key), "{}: {key}", file.display());
            }
            attributes["source"]
                .as_str()
                .unwrap()
                .parse::<hearth::reference::Reference>()
                .unwrap();
        }
    }
}

#[test]
fn the_example_prefers_nodes_that_have_the_model() {
    let deployment = &documents(&root().join("examples/vllm.yaml"))[0];
    let template = &deployment["spec"]["template"];
    let reference: hearth::reference::Reference =
        template["metadata"]["annotations"]["hearth.dev/prefetch"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap();
    let preferred = &template["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"];
    let label = preferred[0]["preference"]["matchExpressions"][0]["key"]
        .as_str()
        .unwrap();
    assert_eq!(label, crd::warm_label(&reference.to_string()));
    let warmup = &documents(&root().join("examples/warmup.yaml"))[0];
    let asked = warmup["spec"]["references"][0].as_str().unwrap();
    assert_eq!(
        asked.parse::<hearth::reference::Reference>().unwrap(),
        reference
    );
}

#[test]
fn annotations_of_the_examples_are_right() {
    fn walk(value: &Value, found: &mut Vec<BTreeMap<String, String>>) {
        match value {
            Value::Object(fields) => {
                if let Ok(annotations) = serde_json::from_value(value["annotations"].clone()) {
                    found.push(annotations);
                }
                fields.values().for_each(|value| walk(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| walk(value, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    for (_, document) in manifests() {
        walk(&document, &mut found);
    }
    assert!(found.len() >= 2);
    for annotations in found {
        let (asked, mistakes) = hearth::kube::annotations::read(&annotations);
        assert!(mistakes.is_empty() && !asked.is_empty(), "{mistakes:?}");
    }
}

#[test]
fn the_dashboard_shows_metrics_that_there_are() {
    let text = fs::read_to_string(root().join("components/monitoring/dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().len() >= 6);
    let rendered = metrics::render();
    let mut found = 0;
    for part in text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')) {
        if part.starts_with("hearth_") {
            found += 1;
            assert!(rendered.contains(&format!("# TYPE {part} ")), "{part}");
        }
    }
    assert!(found >= 6);
}
