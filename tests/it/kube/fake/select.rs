//! Selectors.

use serde_json::Value;

/// Fields that the real server can select by, besides name and namespace.
const FIELDS: &[(&str, &[&str])] = &[
    (
        "pods",
        &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
        ],
    ),
    ("nodes", &["spec.unschedulable"]),
    ("secrets", &["type"]),
    (
        "events",
        &[
            "involvedObject.kind",
            "involvedObject.name",
            "involvedObject.uid",
            "regarding.kind",
            "regarding.name",
            "regarding.uid",
            "reason",
            "type",
        ],
    ),
];

/// What is selected: by fields and by labels.
#[derive(Debug, Clone, Default)]
pub(super) struct Selector {
    fields: Vec<(String, bool, String)>,
    labels: Vec<(String, Test)>,
}

#[derive(Debug, Clone)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Missing,
}

impl Selector {
    pub(super) fn parse(resource: &str, fields: &str, labels: &str) -> Result<Self, String> {
        let mut this = Self::default();
        for term in fields.split(',').filter(|t| !t.is_empty()) {
            let split = |at: &str| term.split_once(at);
            let (path, is, value) = match (split("!="), split("=="), split("=")) {
                (Some((path, value)), ..) => (path, false, value),
                (_, Some((path, value)), _) | (_, _, Some((path, value))) => (path, true, value),
                _ => return Err(format!("invalid selector: '{term}'")),
            };
            let known = matches!(path, "metadata.name" | "metadata.namespace")
                || FIELDS
                    .iter()
                    .any(|(of, fields)| *of == resource && fields.contains(&path));
            if !known {
                return Err(format!("field label not supported: {path}"));
            }
            this.fields.push((path.to_owned(), is, value.to_owned()));
        }
        for term in split_labels(labels) {
            let term = term.trim();
            let set = |text: &str| -> Vec<String> {
                let inner = text.trim().trim_start_matches('(').trim_end_matches(')');
                inner.split(',').map(|v| v.trim().to_owned()).collect()
            };
            let one = |value: &str| vec![value.to_owned()];
            let (key, test) = if let Some((key, values)) = term.split_once(" notin ") {
                (key, Test::NotIn(set(values)))
            } else if let Some((key, values)) = term.split_once(" in ") {
                (key, Test::In(set(values)))
            } else if let Some((key, value)) = term.split_once("!=") {
                (key, Test::NotIn(one(value)))
            } else if let Some((key, value)) = term.split_once("==") {
                (key, Test::In(one(value)))
            } else if let Some((key, value)) = term.split_once('=') {
                (key, Test::In(one(value)))
            } else if let Some(key) = term.strip_prefix('!') {
                (key, Test::Missing)
            } else {
                (term, Test::Exists)
            };
            this.labels.push((key.trim().to_owned(), test));
        }
        Ok(this)
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        let field = |path: &str| {
            let at = path.split('.').fold(object, |at, part| &at[part]);
            match at {
                Value::String(text) => text.clone(),
                Value::Null => String::new(),
                other => other.to_string(),
            }
        };
        self.fields
            .iter()
            .all(|(path, is, value)| (field(path) == *value) == *is)
            && self.labels.iter().all(|(key, test)| {
                let label = object["metadata"]["labels"][key].as_str();
                match test {
                    Test::In(values) => label.is_some_and(|l| values.iter().any(|v| v == l)),
                    Test::NotIn(values) => label.is_none_or(|l| values.iter().all(|v| v != l)),
                    Test::Exists => label.is_some(),
                    Test::Missing => label.is_none(),
                }
            })
    }
}

/// Terms are separated by commas, but not those in parentheses.
fn split_labels(text: &str) -> Vec<&str> {
    let mut depth = 0;
    let parts = text.split(move |c| {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        depth == 0 && c == ','
    });
    parts.filter(|part| !part.trim().is_empty()).collect()
}
