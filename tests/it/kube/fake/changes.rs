//! Lists and changes.

use serde_json::{Value, json};

use super::{
    State,
    answer::{Failure, Path, Query},
    apply,
    select::Selector,
};
use crate::kube::schema;

/// Resources whose status has an endpoint of its own.
const WITH_STATUS: &[&str] = &[
    "pods",
    "nodes",
    "deployments",
    "statefulsets",
    "replicasets",
    "jobs",
    "jobsets",
    "persistentvolumeclaims",
    "customresourcedefinitions",
    "warmups",
    "nodecaches",
];

type Done = Result<Value, Failure>;

fn bad(message: impl Into<String>) -> Failure {
    Failure::new(400, "BadRequest", message)
}

impl State {
    /// The scripted answer to a request.
    pub(super) fn refusal(&mut self, verb: &str, resource: &str) -> Option<Failure> {
        let fits = |r: &super::Refusal| {
            (r.verb.is_empty() || r.verb == verb)
                && (r.resource.is_empty() || r.resource == resource)
        };
        let answers = &mut self.faults.answers;
        let at = answers.iter().position(fits)?;
        let refusal = answers[at].clone();
        answers[at].times -= 1;
        if answers[at].times == 0 {
            answers.remove(at);
        }
        let mut failure = Failure::new(refusal.code, refusal.reason, refusal.message);
        failure.retry_after = refusal.retry_after;
        Some(failure)
    }

    pub(super) fn list(&self, path: &Path, query: &Query) -> Done {
        let get = |name: &str| query.get(name).map(String::as_str).unwrap_or_default();
        let (fields, labels) = (get("fieldSelector"), get("labelSelector"));
        let selector = Selector::parse(&path.resource, fields, labels).map_err(bad)?;
        let at = get("resourceVersion");
        let is_page = !get("continue").is_empty();
        if self.faults.no_progress && at.is_empty() && !is_page {
            return Err(Failure::no_progress());
        }
        let wanted: u64 = at.parse().unwrap_or(0);
        if wanted > self.version {
            return Err(Failure::too_large(wanted, self.version));
        }
        let (objects, version) = match at {
            "0" => (
                self.as_of(self.faults.stale),
                self.version - self.faults.stale,
            ),
            _ => (self.objects.clone(), self.version),
        };
        let found = objects
            .iter()
            .filter(|(key, object)| path.holds(key) && selector.matches(object));
        let mut found: Vec<Value> = found.map(|(_, object)| object.clone()).collect();
        // Items of a list do not say what they are; limits do not count at version 0.
        for item in &mut found {
            let item = item.as_object_mut().unwrap();
            item.remove("apiVersion");
            item.remove("kind");
        }
        let mut meta = json!({"resourceVersion": version.to_string()});
        let limit: usize = get("limit").parse().unwrap_or(0);
        if limit > 0 && at != "0" {
            let from: usize = get("continue").parse().unwrap_or(0);
            let rest = found.len().saturating_sub(from + limit);
            if rest > 0 {
                meta["continue"] = json!((from + limit).to_string());
                meta["remainingItemCount"] = json!(rest);
            }
            found = found.into_iter().skip(from).take(limit).collect();
        }
        Ok(json!({
            "apiVersion": path.api_version(), "kind": "List", "metadata": meta, "items": found
        }))
    }

    pub(super) fn change(
        &mut self,
        verb: &str,
        path: &Path,
        query: &Query,
        content: &str,
        body: &[u8],
    ) -> Done {
        let parse = || serde_json::from_slice::<Value>(body).map_err(|e| bad(e.to_string()));
        match verb {
            "create" => self.create(path, parse()?),
            "update" => {
                let object = parse()?;
                let before = self.existing(path)?;
                check_version(&before, &object)?;
                self.replace(path, before, object)
            }
            "patch" => self.patch(path, query, content, &parse()?),
            "delete" => {
                let options = match body {
                    [] => Value::Null,
                    _ => parse()?,
                };
                self.delete(path, &options)
            }
            _ => Err(Failure::new(405, "MethodNotAllowed", "not by this fake")),
        }
    }

    fn existing(&self, path: &Path) -> Done {
        let found = self.objects.get(&path.key()).cloned();
        found.ok_or_else(|| Failure::not_found(path))
    }

    fn create(&mut self, path: &Path, mut object: Value) -> Done {
        if !path.name.is_empty() {
            return Err(bad(format!("nothing is created in {}", path.name)));
        }
        let mut key = path.key();
        let meta = &mut object["metadata"];
        key.name = match (meta["name"].as_str(), meta["generateName"].as_str()) {
            (Some(name), _) if !name.is_empty() => name.to_owned(),
            (_, Some(prefix)) => format!("{prefix}{:05x}", self.version),
            _ => return Err(Failure::new(422, "Invalid", "metadata.name is required")),
        };
        meta["name"] = json!(key.name);
        if !path.namespace.is_empty() {
            if meta["namespace"]
                .as_str()
                .is_some_and(|n| n != path.namespace)
            {
                return Err(bad(
                    "the namespace of the object is not that of the request",
                ));
            }
            meta["namespace"] = json!(path.namespace);
        }
        if self.objects.contains_key(&key) {
            let message = format!("{} {:?} already exists", path.resource, key.name);
            return Err(Failure::new(409, "AlreadyExists", message));
        }
        if WITH_STATUS.contains(&path.resource.as_str())
            && let Some(object) = object.as_object_mut()
        {
            object.remove("status");
        }
        if object["apiVersion"].is_null() {
            object["apiVersion"] = json!(path.api_version());
        }
        admit(path, &object)?;
        self.birth(&mut object);
        Ok(self.store(key, Some(object)).unwrap_or_default())
    }

    /// Puts what a client wants in the place of what was there, but for what it cannot change.
    fn replace(&mut self, path: &Path, before: Value, mut after: Value) -> Done {
        let mut object = match (path.subresource.as_str(), &mut after) {
            ("status", after) => {
                let mut object = before.clone();
                object["status"] = after["status"].take();
                object["metadata"]["annotations"] = after["metadata"]["annotations"].take();
                object
            }
            ("", after) => {
                if WITH_STATUS.contains(&path.resource.as_str()) {
                    after["status"] = before["status"].clone();
                }
                after.clone()
            }
            (other, _) => return Err(bad(format!("subresource {other} is not in this fake"))),
        };
        for field in [
            "uid",
            "creationTimestamp",
            "generation",
            "deletionTimestamp",
        ] {
            object["metadata"][field] = before["metadata"][field].clone();
        }
        prune(&mut object);
        admit(path, &object)?;
        let managed = self.managed.entry(path.key()).or_default();
        apply::take_over(&before, &object, managed);
        let ends = !object["metadata"]["deletionTimestamp"].is_null()
            && object["metadata"]["finalizers"]
                .as_array()
                .is_none_or(Vec::is_empty);
        if ends {
            self.store(path.key(), None);
            return Ok(object);
        }
        Ok(self.store(path.key(), Some(object)).unwrap_or_default())
    }

    fn patch(&mut self, path: &Path, query: &Query, content: &str, patch: &Value) -> Done {
        if content.starts_with("application/apply-patch+yaml") {
            return self.apply(path, query, patch);
        }
        let before = self.existing(path)?;
        let mut after = before.clone();
        match content {
            "application/merge-patch+json" | "application/strategic-merge-patch+json" => {
                check_version(&before, patch)?;
                apply::merge(&mut after, patch);
            }
            "application/json-patch+json" => apply::json_patch(&mut after, patch)
                .map_err(|why| Failure::new(422, "Invalid", why))?,
            other => {
                let message = format!("the body of the request was in an unknown format: {other}");
                return Err(Failure::new(415, "UnsupportedMediaType", message));
            }
        }
        self.replace(path, before, after)
    }

    fn apply(&mut self, path: &Path, query: &Query, applied: &Value) -> Done {
        let manager = query.get("fieldManager").filter(|m| !m.is_empty());
        let manager = manager.ok_or_else(|| bad("fieldManager is required for apply patch"))?;
        let force = query.get("force").is_some_and(|f| f == "true");
        if applied["kind"].is_null() || applied["apiVersion"].is_null() {
            return Err(bad("apiVersion and kind are required for apply patch"));
        }
        let before = self.objects.get(&path.key()).cloned();
        if before.is_none() && !path.subresource.is_empty() {
            return Err(Failure::not_found(path));
        }
        if let Some(before) = &before {
            check_version(before, applied)?;
        }
        let identity = json!({
            "apiVersion": applied["apiVersion"], "kind": applied["kind"],
            "metadata": {"name": path.name},
        });
        let mut after = before.clone().unwrap_or(identity);
        if !path.namespace.is_empty() {
            after["metadata"]["namespace"] = json!(path.namespace);
        }
        // Of each endpoint separately, as in the real server.
        let manager = match path.subresource.as_str() {
            "" => manager.clone(),
            sub => format!("{manager}/{sub}"),
        };
        let mut managed = self.managed.get(&path.key()).cloned().unwrap_or_default();
        let done = apply::apply(&mut after, applied, &manager, force, &mut managed);
        if let Err(conflicts) = done {
            let n = conflicts.len();
            let mut failure = Failure::new(
                409,
                "Conflict",
                format!("Apply failed with {n} conflict(s)"),
            );
            let cause = |(manager, field): (String, String)| {
                json!({
                    "reason": "FieldManagerConflict",
                    "message": format!("conflict with {manager:?}"), "field": field,
                })
            };
            failure.causes = conflicts.into_iter().map(cause).collect();
            return Err(failure);
        }
        let stored = match before {
            Some(before) => self.replace(path, before, after)?,
            None => {
                if WITH_STATUS.contains(&path.resource.as_str())
                    && let Some(after) = after.as_object_mut()
                {
                    after.remove("status");
                }
                admit(path, &after)?;
                self.birth(&mut after);
                self.store(path.key(), Some(after)).unwrap_or_default()
            }
        };
        self.managed.insert(path.key(), managed);
        Ok(stored)
    }

    fn delete(&mut self, path: &Path, options: &Value) -> Done {
        let before = self.existing(path)?;
        let wanted = &options["preconditions"];
        for field in ["uid", "resourceVersion"] {
            if !wanted[field].is_null() && wanted[field] != before["metadata"][field] {
                let message = format!("the {field} in the precondition is another");
                return Err(Failure::new(409, "Conflict", message));
            }
        }
        let finalizers = before["metadata"]["finalizers"].as_array();
        if finalizers.is_some_and(|f| !f.is_empty()) {
            let mut object = before;
            if object["metadata"]["deletionTimestamp"].is_null() {
                object["metadata"]["deletionTimestamp"] = json!(self.now());
            }
            return Ok(self.store(path.key(), Some(object)).unwrap_or_default());
        }
        self.store(path.key(), None);
        Ok(before)
    }
}

/// What is of a resource of ours is as its definition says.
fn admit(path: &Path, object: &Value) -> Result<(), Failure> {
    let invalid = |why| Failure::new(422, "Invalid", why);
    schema::admit(&path.resource, object).map_err(invalid)
}

/// Who names a version means that one.
fn check_version(before: &Value, object: &Value) -> Result<(), Failure> {
    let wanted = object["metadata"]["resourceVersion"].as_str();
    let differs =
        wanted.is_some_and(|w| !w.is_empty() && before["metadata"]["resourceVersion"] != w);
    if differs {
        let message = "the object has been modified; please apply your changes to the latest version and try again";
        return Err(Failure::new(409, "Conflict", message));
    }
    Ok(())
}

/// Takes out the nulls that indexing leaves.
fn prune(object: &mut Value) {
    if let Some(map) = object.as_object_mut() {
        map.retain(|_, value| !value.is_null());
    }
    if let Some(map) = object["metadata"].as_object_mut() {
        map.retain(|_, value| !value.is_null());
    }
}
