//! Values compared with the schemas of our own custom resources, as the API server would; but unknown fields are
//! mistakes, and not dropped.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::Value;

/// What is wrong with `value`.
pub(crate) fn check(schema: &Value, value: &Value, at: &str, wrong: &mut Vec<String>) {
    let fits = match schema["type"].as_str().unwrap() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_i64(),
        "boolean" => value.is_boolean(),
        other => panic!("{at}: type {other}"),
    };
    if !fits {
        wrong.push(format!("{at}: {value} is no {}", schema["type"]));
        return;
    }
    if let Some(choices) = schema["enum"].as_array()
        && !choices.contains(value)
    {
        wrong.push(format!("{at}: {value} is none of {choices:?}"));
    }
    let limit = |name: &str| schema[name].as_u64().unwrap_or(u64::MAX) as usize;
    if let Some(text) = value.as_str() {
        let length = text.chars().count();
        if length > limit("maxLength")
            || length < schema["minLength"].as_u64().unwrap_or(0) as usize
        {
            wrong.push(format!("{at}: {length} characters"));
        }
        if let Some(pattern) = schema["pattern"].as_str()
            && !Regex::new(pattern).unwrap().is_match(text)
        {
            wrong.push(format!("{at}: {text:?} is not like {pattern}"));
        }
    }
    if let Some(number) = value.as_i64() {
        let (least, most) = (schema["minimum"].as_i64(), schema["maximum"].as_i64());
        if least.is_some_and(|least| number < least) || most.is_some_and(|most| number > most) {
            wrong.push(format!("{at}: {number} is out of range"));
        }
    }
    if let Some(items) = value.as_array() {
        let least = schema["minItems"].as_u64().unwrap_or(0) as usize;
        let identity = |item: &Value| match schema["x-kubernetes-list-type"].as_str() {
            Some("set") => Some(item.to_string()),
            Some("map") => {
                let keys = schema["x-kubernetes-list-map-keys"].as_array().unwrap();
                let keys = keys.iter().map(|key| &item[key.as_str().unwrap()]);
                Some(format!("{:?}", keys.collect::<Vec<_>>()))
            }
            _ => None,
        };
        let mut seen = std::collections::BTreeSet::new();
        for twice in items.iter().filter_map(identity) {
            if !seen.insert(twice.clone()) {
                wrong.push(format!("{at}: {twice} more than once"));
            }
        }
        if items.len() > limit("maxItems") || items.len() < least {
            wrong.push(format!("{at}: {} items", items.len()));
        }
        for (index, item) in items.iter().enumerate() {
            check(&schema["items"], item, &format!("{at}[{index}]"), wrong);
        }
    }
    let Some(fields) = value.as_object() else {
        return;
    };
    if fields.len() > limit("maxProperties") {
        wrong.push(format!("{at}: {} entries", fields.len()));
    }
    for required in schema["required"].as_array().into_iter().flatten() {
        if !fields.contains_key(required.as_str().unwrap()) {
            wrong.push(format!("{at}: {required} is missing"));
        }
    }
    for (name, value) in fields {
        let at = format!("{at}.{name}");
        match (&schema["properties"][name], &schema["additionalProperties"]) {
            // The API server's own.
            (known, _) if known["type"] == "object" && known.as_object().unwrap().len() == 1 => {}
            (Value::Null, Value::Null) => wrong.push(format!("{at}: unknown")),
            (Value::Null, values) => check(values, value, &at, wrong),
            (known, _) => check(known, value, &at, wrong),
        }
    }
}

/// The schema of a kind.
pub(crate) fn of(kind: &str) -> Value {
    let definition = hearth::kube::crd::crds()
        .into_iter()
        .find(|definition| definition["spec"]["names"]["kind"] == kind)
        .unwrap();
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone()
}

/// What the API server would say of an object that a client writes.
pub(crate) fn admit(resource: &str, object: &Value) -> Result<(), String> {
    static SCHEMAS: LazyLock<[(&str, Value); 2]> =
        LazyLock::new(|| [("warmups", of("Warmup")), ("nodecaches", of("NodeCache"))]);
    let known = SCHEMAS.iter().find(|(known, _)| *known == resource);
    let mut wrong = Vec::new();
    if let Some((_, schema)) = known {
        check(schema, &without_nulls(object.clone()), "", &mut wrong);
    }
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(wrong.join(", ")),
    }
}

pub(crate) fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields = fields.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(
                fields
                    .map(|(name, value)| (name, without_nulls(value)))
                    .collect(),
            )
        }
        other => other,
    }
}
