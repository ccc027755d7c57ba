//! Patches.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

/// The fields that each manager has applied.
pub(super) type Managed = BTreeMap<String, BTreeSet<Vec<String>>>;

/// RFC 7386.
pub(super) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let target = target.as_object_mut().unwrap();
    for (key, value) in patch {
        match value {
            Value::Null => {
                target.remove(key);
            }
            value => merge(target.entry(key.clone()).or_insert(Value::Null), value),
        }
    }
}

/// The parts of RFC 6902 that are used: add, replace, remove, test.
pub(super) fn json_patch(target: &mut Value, patch: &Value) -> Result<(), String> {
    for step in patch.as_array().ok_or("a JSON patch is a list")? {
        let path = step["path"].as_str().ok_or("a step has no path")?;
        let (parent, last) = path.rsplit_once('/').ok_or("a path begins with /")?;
        let last = last.replace("~1", "/").replace("~0", "~");
        let at = target
            .pointer_mut(parent)
            .ok_or_else(|| format!("{parent} is not there"))?;
        match (step["op"].as_str(), at) {
            (Some("test"), Value::Object(map)) => {
                if map.get(&last) != Some(&step["value"]) {
                    return Err(format!("testing {path} failed"));
                }
            }
            (Some("add" | "replace"), Value::Object(map)) => {
                map.insert(last, step["value"].clone());
            }
            (Some("remove"), Value::Object(map)) => {
                map.remove(&last).ok_or(format!("{path} is not there"))?;
            }
            (Some("add"), Value::Array(list)) if last == "-" => list.push(step["value"].clone()),
            (Some(op), Value::Array(list)) => {
                let index: usize = last.parse().map_err(|_| format!("{path} is no index"))?;
                if index >= list.len() {
                    return Err(format!("{path} is not there"));
                }
                match op {
                    "remove" => drop(list.remove(index)),
                    "replace" => list[index] = step["value"].clone(),
                    "add" => list.insert(index, step["value"].clone()),
                    "test" if list[index] == step["value"] => {}
                    _ => return Err(format!("{op} of {path} failed")),
                }
            }
            _ => return Err(format!("{path} cannot be changed so")),
        }
    }
    Ok(())
}

/// Fields of an applied configuration: a list is one field.
fn fields(value: &Value, at: &mut Vec<String>, found: &mut BTreeSet<Vec<String>>) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, value) in map {
                at.push(key.clone());
                fields(value, at, found);
                at.pop();
            }
        }
        _ => {
            found.insert(at.clone());
        }
    }
}

fn get<'a>(value: &'a Value, path: &[String]) -> &'a Value {
    path.iter().fold(value, |at, part| &at[part])
}

fn remove(value: &mut Value, path: &[String]) {
    let Some((last, parents)) = path.split_last() else {
        return;
    };
    let mut at = value;
    for part in parents {
        let Some(next) = at.get_mut(part) else { return };
        at = next;
    }
    if let Some(map) = at.as_object_mut() {
        map.remove(last);
    }
}

/// Server-side apply onto `target`. The error is what is in conflict: manager and field.
pub(super) fn apply(
    target: &mut Value,
    applied: &Value,
    manager: &str,
    force: bool,
    managed: &mut Managed,
) -> Result<(), Vec<(String, String)>> {
    const IDENTITY: &[&str] = &[
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "managedFields",
    ];
    let mut new = BTreeSet::new();
    fields(applied, &mut Vec::new(), &mut new);
    new.retain(|path| {
        let names = path.get(1).is_some_and(|p| IDENTITY.contains(&p.as_str()));
        !(matches!(path[0].as_str(), "apiVersion" | "kind") || path[0] == "metadata" && names)
    });
    let mut conflicts = Vec::new();
    for (other, theirs) in managed.iter().filter(|(other, _)| *other != manager) {
        for path in new.intersection(theirs) {
            if get(target, path) != get(applied, path) {
                conflicts.push((other.clone(), format!(".{}", path.join("."))));
            }
        }
    }
    if !conflicts.is_empty() && !force {
        return Err(conflicts);
    }
    let before = managed.insert(manager.to_owned(), new.clone());
    for path in before.unwrap_or_default().difference(&new) {
        let others = managed.iter().filter(|(other, _)| *other != manager);
        if !others.into_iter().any(|(_, theirs)| theirs.contains(path)) {
            remove(target, path);
        }
    }
    for path in &new {
        for (other, theirs) in managed.iter_mut() {
            if other != manager && get(target, path) != get(applied, path) {
                theirs.remove(path);
            }
        }
        let mut patch = get(applied, path).clone();
        for part in path.iter().rev() {
            patch = Value::Object(Map::from_iter([(part.clone(), patch)]));
        }
        merge(target, &patch);
    }
    Ok(())
}

/// Who changes fields by other means takes them from those who applied them.
pub(super) fn take_over(before: &Value, after: &Value, managed: &mut Managed) {
    for theirs in managed.values_mut() {
        theirs.retain(|path| get(before, path) == get(after, path));
    }
}
