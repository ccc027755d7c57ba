//! The definitions of our custom resources: as committed, structural, bounded, and what the code reads and writes.

use std::{collections::BTreeSet, fs, path::Path};

use hearth::kube::crd::{self, NodeCache, Warmup, WarmupStatus};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Map, Value, json};

use super::schema;

/// What may be in a schema (structural schemas of Kubernetes, as far as we need them).
const KEYWORDS: [&str; 19] = [
    "additionalProperties",
    "default",
    "description",
    "enum",
    "format",
    "items",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "pattern",
    "properties",
    "required",
    "type",
    "x-kubernetes-validations",
    "x-kubernetes-list-type",
];

#[test]
fn what_is_committed_is_what_is_printed() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset/base/crds.yaml");
    let printed = crd::yaml().unwrap();
    let committed = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        committed == printed,
        "run: hearth crds > daemonset/base/crds.yaml"
    );
    let read: Vec<Value> = serde_saphyr::from_multiple(&committed).unwrap();
    assert_eq!(read, crd::crds(), "YAML says the same as JSON");
}

#[test]
fn definitions_are_what_the_api_server_takes() {
    for definition in crd::crds() {
        let typed: CustomResourceDefinition = serde_json::from_value(definition.clone()).unwrap();
        crate::manifests::same(&definition, &serde_json::to_value(&typed).unwrap(), "");
        let version = &definition["spec"]["versions"][0];
        let names = &definition["spec"]["names"];
        let full = format!("{}.{}", names["plural"].as_str().unwrap(), crd::GROUP);
        assert_eq!(definition["metadata"]["name"], full.as_str());
        assert_eq!(version["subresources"], json!({ "status": {} }));
        let root = &version["schema"]["openAPIV3Schema"];
        structural(root, "");
        for column in version["additionalPrinterColumns"].as_array().unwrap() {
            assert_path(root, column);
        }
    }
}

fn structural(schema: &Value, at: &str) {
    let fields = schema.as_object().unwrap();
    for keyword in fields.keys() {
        assert!(
            KEYWORDS.contains(&keyword.as_str()) || keyword == "x-kubernetes-list-map-keys",
            "{at}: {keyword}"
        );
    }
    // Their contents are the API server's.
    if matches!(at, ".apiVersion" | ".kind" | ".metadata") {
        return;
    }
    assert!(schema["description"].is_string(), "{at} has no description");
    match schema["type"].as_str().unwrap() {
        "object" => match (&schema["properties"], &schema["additionalProperties"]) {
            (Value::Object(properties), Value::Null) => {
                for required in schema["required"].as_array().into_iter().flatten() {
                    assert!(
                        properties.contains_key(required.as_str().unwrap()),
                        "{at}: {required}"
                    );
                }
                for (name, property) in properties {
                    structural(property, &format!("{at}.{name}"));
                }
            }
            (Value::Null, values) => {
                assert!(schema["maxProperties"].is_u64(), "{at} has no bound");
                structural(values, &format!("{at}.*"));
            }
            _ => panic!("{at}: properties and additionalProperties exclude each other"),
        },
        "array" => {
            assert!(
                schema["maxItems"].as_u64().is_some_and(|n| n <= 256),
                "{at} has no bound"
            );
            let items = &schema["items"];
            structural(items, &format!("{at}[]"));
            match schema["x-kubernetes-list-type"].as_str().unwrap() {
                "atomic" => {}
                "set" => assert_eq!(items["type"], "string", "{at}"),
                "map" => {
                    for key in schema["x-kubernetes-list-map-keys"].as_array().unwrap() {
                        assert!(
                            items["required"].as_array().unwrap().contains(key),
                            "{at}: {key}"
                        );
                    }
                }
                other => panic!("{at}: {other}"),
            }
        }
        "string" => {
            let is_bounded = schema["maxLength"].is_u64() || schema["enum"].is_array();
            assert!(is_bounded, "{at} has no bound");
            if let Some(pattern) = schema["pattern"].as_str() {
                regex::Regex::new(pattern).unwrap();
            }
        }
        "integer" => assert!(
            matches!(schema["format"].as_str(), Some("int32" | "int64")),
            "{at}"
        ),
        "boolean" => {}
        other => panic!("{at}: type {other}"),
    }
    for rule in schema["x-kubernetes-validations"]
        .as_array()
        .into_iter()
        .flatten()
    {
        assert!(rule["message"].is_string(), "{at}: a rule without message");
        // The fields that a rule names exist.
        let text = rule["rule"].as_str().unwrap();
        for (start, _) in text.match_indices("self.") {
            let name: String = text[start + 5..]
                .chars()
                .take_while(|c| c.is_ascii_alphanumeric())
                .collect();
            assert!(
                name == "all" || schema["properties"][&name].is_object(),
                "{at}: {name} in {text}"
            );
        }
    }
}

/// The field that a printer column shows exists.
fn assert_path(root: &Value, column: &Value) {
    let path = column["jsonPath"].as_str().unwrap();
    let plain = regex::Regex::new(r"\[\?\([^)]*\)\]")
        .unwrap()
        .replace_all(path, "[]")
        .into_owned();
    let mut schema = root;
    for part in plain.trim_start_matches('.').split('.') {
        let name = part.trim_end_matches("[]");
        if schema["properties"][name]["properties"].is_null() && name == "metadata" {
            return;
        }
        schema = &schema["properties"][name];
        assert!(schema.is_object(), "{path}: {name}");
        if part.ends_with("[]") {
            schema = &schema["items"];
        }
    }
    assert_eq!(
        schema["type"],
        match column["type"].as_str().unwrap() {
            "date" => "string",
            other => other,
        }
    );
}

/// A value that has everything that a schema knows.
fn sample(schema: &Value, name: &str) -> Value {
    match schema["type"].as_str().unwrap() {
        "object" if schema["properties"].is_object() => {
            let properties = schema["properties"].as_object().unwrap();
            let fields = properties
                .iter()
                .map(|(name, schema)| (name.clone(), sample(schema, name)));
            Value::Object(fields.collect::<Map<_, _>>())
        }
        "object" if schema["additionalProperties"].is_object() => {
            json!({ "zone": sample(&schema["additionalProperties"], name) })
        }
        "object" => json!({ "name": "n" }),
        "array" => json!([sample(&schema["items"], name)]),
        "integer" => json!(schema["minimum"].as_i64().unwrap_or(0).max(60)),
        "boolean" => json!(true),
        _ if schema["enum"].is_array() => schema["enum"][0].clone(),
        _ if schema["format"] == "date-time" => json!("2026-11-22T08:00:00Z"),
        _ if name == "references" => json!("hf://org/model"),
        _ if name == "bandwidthPerNode" => json!("200Mi"),
        _ if matches!(name, "first" | "last") => json!("0123456789abcdef"),
        _ => json!("a"),
    }
}

#[test]
fn the_code_knows_every_field_and_no_other() {
    for kind in ["Warmup", "NodeCache"] {
        let schema = schema::of(kind);
        let mut sample = sample(&schema, "");
        let mut wrong = Vec::new();
        schema::check(&schema, &sample, "", &mut wrong);
        assert_eq!(wrong, [""; 0]);
        let again = match kind {
            "Warmup" => {
                serde_json::to_value(serde_json::from_value::<Warmup>(sample.clone()).unwrap())
            }
            _ => serde_json::to_value(serde_json::from_value::<NodeCache>(sample.clone()).unwrap()),
        };
        // Of no interest to the code.
        for field in ["apiVersion", "kind"] {
            sample.as_object_mut().unwrap().remove(field);
        }
        assert_eq!(again.unwrap(), sample);
    }
    // A patch of a status takes away what is not there any more.
    let status = serde_json::to_value(WarmupStatus::default()).unwrap();
    let fields = schema::of("Warmup")["properties"]["status"]["properties"].clone();
    let names = |value: &Value| -> BTreeSet<String> {
        value.as_object().unwrap().keys().cloned().collect()
    };
    assert_eq!(names(&status), names(&fields));
}

#[test]
fn limits_are_those_of_the_schema() {
    let root = schema::of("Warmup");
    let fits = |spec: Value| {
        let mut wrong = Vec::new();
        schema::check(&root, &json!({ "spec": spec }), "", &mut wrong);
        wrong
    };
    assert!(fits(json!({ "references": ["hf://o/m", "s3://b/p/", "https://h/x"], "images": ["nginx", "r.io:5/a/b@sha256:0"] })).is_empty());
    for wrong in [
        json!({ "references": ["file:///etc/shadow"] }),
        json!({ "references": ["hf://o/m n"] }),
        json!({ "references": [format!("hf://o/{}", "m".repeat(1024))] }),
        json!({ "references": vec!["hf://o/m"; 65] }),
        json!({ "images": ["--privileged"] }),
        json!({ "bandwidthPerNode": "0" }),
        json!({ "bandwidthPerNode": "fast" }),
        json!({ "priority": 101 }),
        json!({ "maxParallelNodes": -1 }),
        json!({ "ttlSeconds": 1 }),
        json!({ "pins": true }),
        json!({ "credentials": { "name": "../x" } }),
    ] {
        assert!(!fits(wrong.clone()).is_empty(), "{wrong}");
    }
}
