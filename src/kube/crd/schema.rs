//! The definitions of the resources as the API server takes them: a limit for every list, map and string, so that no
//! object grows past a bound and the rules cost little.

use serde_json::{Map, Value, json};

use super::{
    DEFAULT_PARALLEL_NODES, GROUP, MAX_ARTIFACTS, MAX_FAILURES, MAX_LABEL_KEY, MAX_LABEL_VALUE,
    MAX_MESSAGE, MAX_NAME, MAX_PRIORITY, MAX_REFERENCE, MAX_REFERENCES, MAX_SECRETS, MAX_TERMS,
    MAX_VALUES, MAX_WARMUPS, VERSION,
};

/// Names of secrets and nodes.
const NAME_PATTERN: &str = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";
/// How a reference begins, and no white space in it; the node parses it for good.
const REFERENCE_PATTERN: &str = r"^(hf|oci|s3|gs|az|https?)://\S+$";
/// What a container image is named; the node parses it for good.
const IMAGE_PATTERN: &str = r"^[A-Za-z0-9][A-Za-z0-9._:/@+\-\[\]]*$";
const QUANTITY_PATTERN: &str = r"^[1-9][0-9]{0,11}(k|M|G|T|Ki|Mi|Gi|Ti)?$";

/// The definitions, in the order in which they are printed.
pub fn crds() -> [Value; 2] {
    [warmup(), node_cache()]
}

/// The definitions as YAML, one document each.
///
/// # Errors
/// None that could be reached: they are made of what YAML has.
pub fn yaml() -> Result<String, serde_saphyr::SerializeError> {
    let mut text = String::new();
    for definition in crds() {
        text += "---\n";
        text += serde_saphyr::to_string(&definition)?.trim_end();
        text += "\n";
    }
    Ok(text)
}

fn warmup() -> Value {
    let columns = json!([
        column(
            "Desired",
            "integer",
            ".status.nodes.desired",
            "Nodes it selects"
        ),
        column(
            "Warm",
            "integer",
            ".status.nodes.warm",
            "Nodes that have all of it"
        ),
        column(
            "Failed",
            "integer",
            ".status.nodes.failed",
            "Nodes that could not get it"
        ),
        column(
            "Complete",
            "string",
            ".status.conditions[?(@.type=='Complete')].status",
            "Whether all nodes have it"
        ),
        column(
            "Reason",
            "string",
            ".status.conditions[?(@.type=='Complete')].reason",
            "Why not"
        ),
        wide(
            "Warming",
            "integer",
            ".status.nodes.warming",
            "Nodes that are at it"
        ),
        wide(
            "Waiting",
            "integer",
            ".status.nodes.waiting",
            "Nodes that wait for their turn"
        ),
        wide(
            "Bytes",
            "integer",
            ".status.bytes.present",
            "Bytes that are there, on all nodes together"
        ),
        wide(
            "Priority",
            "integer",
            ".spec.priority",
            "What is more important is fetched first"
        ),
        column(
            "Age",
            "date",
            ".metadata.creationTimestamp",
            "When it was made"
        ),
    ]);
    let root = object(
        "Content that nodes are to have ahead of pods.",
        &["spec"],
        json!({ "spec": warmup_spec(), "status": warmup_status() }),
    );
    definition("Warmup", "warmups", "wu", "Namespaced", root, columns)
}

fn warmup_spec() -> Value {
    let properties = json!({
        "references": set(
            "What is to be warm: hf://, oci://, s3://, gs://, az:// and http(s):// references, as `hearth warm` takes them.",
            MAX_REFERENCES,
            matching("A reference.", MAX_REFERENCE, REFERENCE_PATTERN),
        ),
        "images": set(
            "Container images that are to be warm, as pods name them.",
            MAX_REFERENCES,
            matching("An image.", MAX_REFERENCE, IMAGE_PATTERN),
        ),
        "nodeSelector": with_rule(
            map(
                "Labels that a node must have. Without this and an affinity: all nodes.",
                MAX_TERMS,
                text("The value.", MAX_LABEL_VALUE),
            ),
            &format!("self.all(key, size(key) <= {MAX_LABEL_KEY})"),
            "the keys of nodeSelector are keys of labels: at most 317 characters",
        ),
        "affinity": object(
            "As that of a pod; the required node affinity is what counts.",
            &[],
            json!({ "nodeAffinity": object(
                "Of nodes.",
                &[],
                json!({ "requiredDuringSchedulingIgnoredDuringExecution": node_selector() }),
            ) }),
        ),
        "tolerations": list(
            "As those of a pod: taints (NoSchedule, NoExecute) that do not keep it off a node.",
            MAX_TERMS,
            toleration(),
        ),
        "pin": described(
            json!({ "type": "boolean", "default": true }),
            "Keep what is warm from eviction while this object exists. Else it is fetched once, and may be evicted.",
        ),
        "ttlSeconds": integer(
            "Seconds after its creation when this object is deleted, and its pins with it.",
            60,
            3_155_760_000,
            "int64",
        ),
        "priority": with_default(
            integer("What is more important is fetched first.", i64::from(-MAX_PRIORITY), i64::from(MAX_PRIORITY), "int32"),
            json!(0),
        ),
        "maxParallelNodes": with_default(
            integer("Nodes that warm at the same time; 0: all.", 0, 100_000, "int32"),
            json!(DEFAULT_PARALLEL_NODES),
        ),
        "maxNodes": integer(
            "Nodes that it is for at most, of those that match. All where nothing is said.",
            1,
            100_000,
            "int32",
        ),
        "bandwidthPerNode": matching(
            "Bytes per second that each node fetches for this at most, such as 200Mi.",
            16,
            QUANTITY_PATTERN,
        ),
        "imagePullSecrets": keyed(
            "Secrets with credentials of registries, in the namespace of this object.",
            MAX_SECRETS,
            "name",
            secret_name(),
        ),
        "credentials": described(
            secret_name(),
            "The secret with credentials of the other origins, in the namespace of this object: token; accessKeyId, \
             secretAccessKey, sessionToken; username, password.",
        ),
        "startupGate": described(
            json!({ "type": "boolean", "default": false }),
            "Nodes keep the taint hearth.dev/not-warm until they have this. Counts only in the namespace of the \
             controller.",
        ),
    });
    let spec = object("What is to be warm, where, and how.", &[], properties);
    let mut spec = with_rule(
        spec,
        "(has(self.references) && size(self.references) > 0) || (has(self.images) && size(self.images) > 0)",
        "at least one of references and images is needed",
    );
    let gate = json!({
        "rule": "!(has(self.startupGate) && self.startupGate && has(self.maxNodes))",
        "message": "startupGate is for every node that matches: it cannot have maxNodes",
    });
    if let Some(rules) = spec["x-kubernetes-validations"].as_array_mut() {
        rules.push(gate);
    }
    spec
}

fn node_selector() -> Value {
    let expressions = |of: &str, limit: usize| {
        let properties = json!({
            "key": sized("The key.", 1, MAX_LABEL_KEY),
            "operator": choice("How it compares.", &["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]),
            "values": list("What it is compared with.", MAX_VALUES, text("A value.", MAX_NAME)),
        });
        let expression = with_rule(
            object("One of its requirements.", &["key", "operator"], properties),
            "self.operator in ['In', 'NotIn'] ? has(self.values) && size(self.values) > 0 \
             : self.operator in ['Gt', 'Lt'] ? has(self.values) && size(self.values) == 1 \
             : !has(self.values) || size(self.values) == 0",
            "In and NotIn need values, Gt and Lt one, Exists and DoesNotExist none",
        );
        list(of, limit, expression)
    };
    let term = object(
        "All of its requirements must hold.",
        &[],
        json!({
            "matchExpressions": expressions("Of labels.", MAX_TERMS),
            "matchFields": expressions("Of fields: metadata.name.", 1),
        }),
    );
    let mut terms = list("Any of these must hold.", MAX_TERMS, term);
    terms["minItems"] = json!(1);
    object(
        "Which nodes.",
        &["nodeSelectorTerms"],
        json!({ "nodeSelectorTerms": terms }),
    )
}

fn toleration() -> Value {
    let properties = json!({
        "key": text("The key of the taint; empty: all.", MAX_LABEL_KEY),
        "operator": choice("Equal where nothing is said.", &["Equal", "Exists"]),
        "value": text("The value of the taint.", MAX_LABEL_VALUE),
        "effect": choice("The effect of the taint; all where nothing is said.", &["NoSchedule", "PreferNoSchedule", "NoExecute"]),
        "tolerationSeconds": described(json!({ "type": "integer", "format": "int64" }), "Of no meaning here."),
    });
    object("As that of a pod.", &[], properties)
}

fn secret_name() -> Value {
    let name = matching("Its name.", MAX_NAME, NAME_PATTERN);
    object("A secret.", &["name"], json!({ "name": name }))
}

fn warmup_status() -> Value {
    let place = || matching("Sixteen hexadecimal digits.", 16, "^[0-9a-f]{16}$");
    let properties = json!({
        "observedGeneration": count64("The generation of the spec that all of this is about."),
        "nodes": object("Nodes that it selects.", &[], json!({
            "desired": count("Nodes that it selects; the sum of the others."),
            "warm": count("Nodes that have all of it."),
            "warming": count("Nodes that are at it."),
            "waiting": count("Nodes that wait for their turn."),
            "failed": count("Nodes that could not get it, and try again later."),
            "unreachable": count("Nodes that are not ready, or whose agent does not report."),
        })),
        "bytes": object("Bytes, on all nodes together.", &[], json!({
            "total": count64("Of the nodes that know already how much it is."),
            "present": count64("That are there."),
        })),
        "artifacts": list("What it asks for.", 2 * MAX_REFERENCES, object("An artifact.", &[], json!({
            "reference": text("In its canonical form.", MAX_REFERENCE),
            "label": text("The label that a node has while it is warm there.", MAX_LABEL_KEY),
        }))),
        "failures": list("Nodes that failed, a few of them.", MAX_FAILURES, object("A node that failed.", &[], json!({
            "node": text("Its name.", MAX_NAME),
            "reason": text("In a word.", 64),
            "message": text("Why.", MAX_MESSAGE),
        }))),
        "conditions": keyed("Complete, Accepted, Degraded.", 8, "type", condition()),
        "window": object("The places of the nodes that may start now.", &["first", "last"], json!({
            "first": place(), "last": place(),
        })),
        "reportSeconds": count("Seconds between two reports of a node, at least."),
        "completionTime": time("When all nodes had it first, in this generation."),
    });
    object("How far it is; written by the controller.", &[], properties)
}

fn condition() -> Value {
    let properties = json!({
        "type": sized("Of what.", 1, 64),
        "status": choice("Whether it holds.", &["True", "False", "Unknown"]),
        "reason": sized("Why, in a word.", 1, 64),
        "message": text("Why.", MAX_MESSAGE),
        "lastTransitionTime": time("Since when."),
        "observedGeneration": count64("The generation that it is about."),
    });
    let required = &["type", "status", "reason", "message", "lastTransitionTime"];
    object("A condition.", required, properties)
}

fn node_cache() -> Value {
    let columns = json!([
        column(
            "Used",
            "integer",
            ".status.usedBytes",
            "Bytes that the store takes"
        ),
        column(
            "Free",
            "integer",
            ".status.freeBytes",
            "Bytes that are free on its file system"
        ),
        column(
            "Reported",
            "date",
            ".status.reported",
            "When the node wrote this"
        ),
        column(
            "Age",
            "date",
            ".metadata.creationTimestamp",
            "When it was made"
        ),
    ]);
    let artifact = json!({
        "reference": text("In its canonical form.", MAX_REFERENCE),
        "digest": text("Of its tree.", 80),
        "bytes": count64("Of all its files."),
        "presentBytes": count64("That are there."),
        "warm": described(json!({ "type": "boolean" }), "Complete and verified."),
        "pinned": described(json!({ "type": "boolean" }), "It is not evicted."),
    });
    let warmup = json!({
        "namespace": text("Of the Warmup.", MAX_LABEL_VALUE),
        "name": text("Of the Warmup.", MAX_NAME),
        "uid": text("Of the Warmup.", 64),
        "generation": count64("Of the Warmup, that this is about."),
        "state": choice("How far it is.", &["Waiting", "Warming", "Warm", "Failed"]),
        "bytes": count64("Of all it asks for, as far as that is known."),
        "presentBytes": count64("That are there."),
        "reason": text("Why it failed, in a word.", 64),
        "message": text("Why it failed.", MAX_MESSAGE),
    });
    let status = json!({
        "reported": time("When the node wrote this, by its clock."),
        "storeId": text("Of the store: one that was made anew has another.", 64),
        "capacityBytes": count64("Of the file system of the store."),
        "usedBytes": count64("That the store takes."),
        "freeBytes": count64("On the file system of the store."),
        "artifacts": list("What is warm or arriving; what a Warmup asks for first, then the last used.", MAX_ARTIFACTS, object("An artifact.", &[], artifact)),
        "artifactsOmitted": count("Artifacts for which there was no place here."),
        "warmups": list("How far it is with each Warmup that selects it.", MAX_WARMUPS, object("A Warmup.", &[], warmup)),
        "warmupsOmitted": count("Warmups that select it for which there was no place here; what of them is not warm waits."),
    });
    let root = object(
        "What a node has; named like it, and written by it alone.",
        &[],
        json!({ "status": object("What it has.", &[], status) }),
    );
    definition(
        "NodeCache",
        "nodecaches",
        "ncache",
        "Cluster",
        root,
        columns,
    )
}

fn definition(
    kind: &str,
    plural: &str,
    short: &str,
    scope: &str,
    mut root: Value,
    columns: Value,
) -> Value {
    // The API server knows them; with a description they are what `kubectl explain` shows.
    for (name, kind) in [
        ("apiVersion", "string"),
        ("kind", "string"),
        ("metadata", "object"),
    ] {
        root["properties"][name] = json!({ "type": kind });
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{plural}.{GROUP}"),
            "labels": { "app.kubernetes.io/name": "hearth", "app.kubernetes.io/part-of": "hearth" },
        },
        "spec": {
            "group": GROUP,
            "scope": scope,
            "names": {
                "kind": kind,
                "listKind": format!("{kind}List"),
                "plural": plural,
                "singular": kind.to_ascii_lowercase(),
                "shortNames": [short],
                "categories": ["hearth"],
            },
            "versions": [{
                "name": VERSION,
                "served": true,
                "storage": true,
                "subresources": { "status": {} },
                "additionalPrinterColumns": columns,
                "schema": { "openAPIV3Schema": root },
            }],
        },
    })
}

fn column(name: &str, kind: &str, path: &str, about: &str) -> Value {
    json!({ "name": name, "type": kind, "jsonPath": path, "description": about })
}

fn wide(name: &str, kind: &str, path: &str, about: &str) -> Value {
    let mut column = column(name, kind, path, about);
    column["priority"] = json!(1);
    column
}

fn described(mut schema: Value, about: &str) -> Value {
    schema["description"] = json!(about);
    schema
}

fn with_default(mut schema: Value, default: Value) -> Value {
    schema["default"] = default;
    schema
}

fn with_rule(mut schema: Value, rule: &str, message: &str) -> Value {
    schema["x-kubernetes-validations"] = json!([{ "rule": rule, "message": message }]);
    schema
}

fn object(about: &str, required: &[&str], properties: Value) -> Value {
    let mut schema = Map::new();
    schema.insert("type".into(), json!("object"));
    schema.insert("description".into(), json!(about));
    if !required.is_empty() {
        schema.insert("required".into(), json!(required));
    }
    schema.insert("properties".into(), properties);
    Value::Object(schema)
}

fn map(about: &str, limit: usize, values: Value) -> Value {
    json!({ "type": "object", "description": about, "maxProperties": limit, "additionalProperties": values })
}

fn list(about: &str, limit: usize, items: Value) -> Value {
    json!({ "type": "array", "description": about, "maxItems": limit, "items": items, "x-kubernetes-list-type": "atomic" })
}

fn set(about: &str, limit: usize, items: Value) -> Value {
    let mut list = list(about, limit, items);
    list["x-kubernetes-list-type"] = json!("set");
    list
}

fn keyed(about: &str, limit: usize, key: &str, items: Value) -> Value {
    let mut list = list(about, limit, items);
    list["x-kubernetes-list-type"] = json!("map");
    list["x-kubernetes-list-map-keys"] = json!([key]);
    list
}

fn text(about: &str, limit: usize) -> Value {
    json!({ "type": "string", "description": about, "maxLength": limit })
}

fn sized(about: &str, least: usize, limit: usize) -> Value {
    let mut schema = text(about, limit);
    schema["minLength"] = json!(least);
    schema
}

fn matching(about: &str, limit: usize, pattern: &str) -> Value {
    let mut schema = sized(about, 1, limit);
    schema["pattern"] = json!(pattern);
    schema
}

fn choice(about: &str, of: &[&str]) -> Value {
    json!({ "type": "string", "description": about, "enum": of })
}

fn integer(about: &str, least: i64, most: i64, format: &str) -> Value {
    json!({ "type": "integer", "format": format, "description": about, "minimum": least, "maximum": most })
}

fn count(about: &str) -> Value {
    json!({ "type": "integer", "format": "int32", "description": about, "minimum": 0 })
}

fn count64(about: &str) -> Value {
    json!({ "type": "integer", "format": "int64", "description": about, "minimum": 0 })
}

fn time(about: &str) -> Value {
    json!({ "type": "string", "format": "date-time", "description": about, "maxLength": 64 })
}
