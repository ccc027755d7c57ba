//! What manifests name is there.

use super::*;

#[test]
fn what_has_a_namespace_says_so() {
    let everywhere = [
        "Namespace",
        "PriorityClass",
        "CSIDriver",
        "ClusterRole",
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    ];
    for document in base() {
        let kind = document["kind"].as_str().unwrap();
        let namespace = document["metadata"]["namespace"].as_str();
        let wanted = (!everywhere.contains(&kind)).then_some("hearth-system");
        assert_eq!(namespace, wanted, "{kind} {}", document["metadata"]["name"]);
    }
}

#[test]
fn what_manifests_name_exists() {
    let base = base();
    let generated: BTreeSet<String> =
        documents(&root().join("base/kustomization.yaml"))[0]["configMapGenerator"]
            .as_array()
            .unwrap()
            .iter()
            .map(|g| g["name"].as_str().unwrap().to_owned())
            .collect();
    let is_there = |kind: &str, name: &Value| {
        base.iter()
            .any(|d| d["kind"] == kind && d["metadata"]["name"] == *name)
    };
    for (file, document) in manifests() {
        let at = format!("{}: {}", file.display(), document["metadata"]["name"]);
        if document["kind"]
            .as_str()
            .is_some_and(|kind| kind.ends_with("RoleBinding"))
        {
            assert!(
                is_there(
                    document["roleRef"]["kind"].as_str().unwrap(),
                    &document["roleRef"]["name"]
                ),
                "{at}"
            );
            for subject in document["subjects"].as_array().unwrap() {
                if subject["kind"] == "Group" {
                    assert_eq!(subject["name"], "system:nodes", "{at}");
                    continue;
                }
                assert!(is_there("ServiceAccount", &subject["name"]), "{at}");
                assert_eq!(subject["namespace"], "hearth-system", "{at}");
            }
        }
        let Some(pod) = pod_spec(&document).filter(|_| !is_patch(&file)) else {
            continue;
        };
        let is_own = file.starts_with(root().join("base"));
        if is_own {
            let labels = document["spec"]["selector"]["matchLabels"]
                .as_object()
                .unwrap();
            for (name, value) in labels {
                assert_eq!(
                    document["spec"]["template"]["metadata"]["labels"][name], *value,
                    "{at}"
                );
            }
            if !pod["serviceAccountName"].is_null() {
                assert!(
                    is_there("ServiceAccount", &pod["serviceAccountName"]),
                    "{at}"
                );
            } else {
                assert_eq!(
                    pod["automountServiceAccountToken"], false,
                    "{at} has a token that it does not need"
                );
            }
            let class = &pod["priorityClassName"];
            let is_known = class == "system-node-critical" || is_there("PriorityClass", class);
            assert!(is_known || class.is_null(), "{at}: {class}");
        }
        let volumes: BTreeMap<&str, &Value> = (pod["volumes"].as_array().into_iter().flatten())
            .map(|volume| (volume["name"].as_str().unwrap(), volume))
            .collect();
        let mut used = BTreeSet::new();
        for container in containers(pod) {
            let at = format!("{at}/{}", container["name"]);
            for mount in container["volumeMounts"].as_array().into_iter().flatten() {
                let name = mount["name"].as_str().unwrap();
                let volume = volumes
                    .get(name)
                    .unwrap_or_else(|| panic!("{at}: volume {name}"));
                used.insert(name.to_owned());
                if mount["mountPropagation"] == "Bidirectional" {
                    assert_eq!(
                        container["securityContext"]["privileged"], true,
                        "{at}: {name}"
                    );
                    // What is mounted has the same path for all: containerd and the kubelet are told it.
                    assert_eq!(
                        mount["mountPath"], volume["hostPath"]["path"],
                        "{at}: {name}"
                    );
                }
            }
            if is_own {
                assert!(
                    container["resources"]["requests"]["memory"].is_string(),
                    "{at}: requests"
                );
                let security = &container["securityContext"];
                // Where SELinux enforces, only such ones reach what privileged ones made on the host.
                let is_of_host = |mount: &Value| {
                    let volume = volumes.get(mount["name"].as_str().unwrap());
                    volume.is_some_and(|volume| !volume["hostPath"].is_null())
                };
                let mut mounts = container["volumeMounts"].as_array().into_iter().flatten();
                assert!(
                    !mounts.any(is_of_host)
                        || security["privileged"] == true
                        || security["seLinuxOptions"]["type"] == "spc_t",
                    "{at}"
                );
                assert_eq!(security["readOnlyRootFilesystem"], true, "{at}");
                assert!(
                    security["privileged"] == true || security["allowPrivilegeEscalation"] == false,
                    "{at}"
                );
            }
            let ports: Vec<&Value> = (container["ports"].as_array().into_iter().flatten())
                .map(|p| &p["name"])
                .collect();
            for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
                let port = &container[probe]["httpGet"]["port"];
                assert!(!port.is_string() || ports.contains(&port), "{at}: {probe}");
            }
        }
        for (name, volume) in volumes {
            assert!(used.contains(name), "{at}: nobody mounts {name}");
            let map = &volume["configMap"]["name"];
            assert!(
                map.is_null() || generated.contains(map.as_str().unwrap()),
                "{at}: {map}"
            );
        }
    }
}

/// What README says is what one types.
#[test]
fn every_namespace_of_an_example_exists() {
    let of = |documents: &[Value]| -> BTreeSet<String> {
        let namespaces = documents.iter().filter(|d| d["kind"] == "Namespace");
        namespaces
            .map(|d| d["metadata"]["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let missing = |documents: &[Value], known: &BTreeSet<String>| -> Vec<Value> {
        let named = documents.iter().map(|d| d["metadata"]["namespace"].clone());
        named
            .filter(|name| name.as_str().is_some_and(|name| !known.contains(name)))
            .collect()
    };
    let installed = of(&base());
    let examples: Vec<Value> = (fs::read_dir(root().join("examples")).unwrap())
        .flat_map(|entry| documents(&entry.unwrap().path()))
        .collect();
    let mut known = of(&examples);
    known.extend(installed.clone());
    assert_eq!(missing(&examples, &known), [""; 0]);
    let readme = fs::read_to_string(root().parent().unwrap().join("README.md")).unwrap();
    let mut lines = 0;
    for line in readme.lines().filter(|l| l.starts_with("kubectl apply -f")) {
        let line = line.split('#').next().unwrap();
        let files = line.split_whitespace().filter(|w| w.ends_with(".yaml"));
        let applied: Vec<Value> = files
            .flat_map(|file| documents(&root().parent().unwrap().join(file)))
            .collect();
        let mut known = of(&applied);
        known.extend(installed.clone());
        assert_eq!(missing(&applied, &known), [""; 0], "{line}");
        lines += 1;
    }
    assert!(lines > 0);
}
