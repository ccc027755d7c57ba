//! Kustomizations: what they name, and what they patch.

use super::*;

#[test]
fn kustomizations_name_what_there_is() {
    let known = [
        "apiVersion",
        "kind",
        "namespace",
        "labels",
        "resources",
        "components",
        "configMapGenerator",
        "images",
        "patches",
    ];
    for file in files("yaml") {
        for kustomization in documents(&file).into_iter().filter(is_kustomization) {
            let dir = file.parent().unwrap();
            let at = file.display();
            for key in keys(&kustomization) {
                assert!(known.contains(&key), "{at}: {key}");
            }
            let list = |field: &str| kustomization[field].as_array().cloned().unwrap_or_default();
            for path in list("resources").iter().chain(&list("components")) {
                let path = dir.join(path.as_str().unwrap());
                let is_there = path.is_file() || path.join("kustomization.yaml").is_file();
                assert!(is_there, "{at}: {}", path.display());
            }
            // Nothing is forgotten.
            let named: BTreeSet<String> = (list("resources").into_iter())
                .chain(
                    list("patches")
                        .into_iter()
                        .map(|patch| patch["path"].clone()),
                )
                .filter_map(|name| name.as_str().map(str::to_owned))
                .collect();
            for entry in fs::read_dir(dir).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let is_named = named.contains(&name) || name == "kustomization.yaml";
                assert!(
                    is_named || !name.ends_with(".yaml"),
                    "{at} leaves {name} out"
                );
            }
            for generated in list("configMapGenerator") {
                for entry in generated["files"].as_array().unwrap() {
                    let entry = entry.as_str().unwrap();
                    let path = entry.split_once('=').map_or(entry, |(_, path)| path);
                    assert!(dir.join(path).is_file(), "{at}: {path}");
                }
            }
            let below = base_of(dir, &kustomization);
            for patch in list("patches") {
                let body = documents(&dir.join(patch["path"].as_str().unwrap()));
                for body in body {
                    let target = match &patch["target"] {
                        Value::Null => {
                            json!({ "kind": body["kind"], "name": body["metadata"]["name"] })
                        }
                        target => target.clone(),
                    };
                    let patched = below.iter().find(|d| {
                        d["kind"] == target["kind"] && d["metadata"]["name"] == target["name"]
                    });
                    let patched = patched.unwrap_or_else(|| panic!("{at}: no target {target}"));
                    check_patch(patched, &body, &format!("{at}"));
                }
            }
            for image in list("images") {
                let used = below.iter().any(|d| {
                    pod_spec(d).is_some_and(|pod| {
                        containers(pod).iter().any(|c| c["image"] == image["name"])
                    })
                });
                assert!(used, "{at}: {image}");
            }
        }
    }
}

/// The manifests that a kustomization is made of.
pub(super) fn base_of(dir: &Path, kustomization: &Value) -> Vec<Value> {
    let mut all = Vec::new();
    for path in kustomization["resources"].as_array().into_iter().flatten() {
        let path = dir.join(path.as_str().unwrap());
        match path.is_file() {
            true => all.extend(documents(&path)),
            false => {
                let inner = documents(&path.join("kustomization.yaml")).remove(0);
                all.extend(base_of(&path, &inner));
            }
        }
    }
    all
}

/// What a patch deletes is there to be deleted: elements of lists, by name.
fn check_patch(patched: &Value, patch: &Value, at: &str) {
    match patch {
        Value::Object(fields) => {
            for (name, value) in fields {
                check_patch(&patched[name], value, &format!("{at}.{name}"));
            }
        }
        Value::Array(items) => {
            for item in items.iter().filter(|item| item["$patch"] == "delete") {
                // What elements of this list are told apart by.
                let key = if item["name"].is_null() {
                    "mountPath"
                } else {
                    "name"
                };
                let is_it = |other: &Value| other[key] == item[key];
                assert!(
                    patched
                        .as_array()
                        .is_some_and(|there| there.iter().any(is_it)),
                    "{at}: {item}"
                );
            }
            // Elements that are changed: inside of them.
            for item in items.iter().filter(|item| item["$patch"].is_null()) {
                let there = patched.as_array().into_iter().flatten();
                let other = there
                    .into_iter()
                    .find(|other| other["name"] == item["name"]);
                check_patch(
                    other.unwrap_or(&Value::Null),
                    item,
                    &format!("{at}.{}", item["name"]),
                );
            }
        }
        _ => {}
    }
}
