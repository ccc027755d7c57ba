//! Which nodes a `Warmup` selects: what the scheduler would say of a pod with the same selector, affinity and
//! tolerations. The node and the controller both ask this.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, Taint, Toleration,
};

use super::{NOT_WARM_TAINT, WarmupSpec};

/// Taints that keep no warm-up off: of a node that is starting, or is not to get new pods for a while.
const TOLERATED: [&str; 6] = [
    NOT_WARM_TAINT,
    "node.kubernetes.io/not-ready",
    "node.kubernetes.io/unreachable",
    "node.kubernetes.io/network-unavailable",
    "node.kubernetes.io/unschedulable",
    "node.cloudprovider.kubernetes.io/uninitialized",
];

/// What matters of a node.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NodeView {
    pub name: String,
    pub uid: String,
    pub resource_version: String,
    pub labels: BTreeMap<String, String>,
    pub taints: Vec<Taint>,
    /// Whether its kubelet says that it is ready.
    pub ready: bool,
}

impl From<Node> for NodeView {
    fn from(node: Node) -> Self {
        let conditions = node.status.and_then(|status| status.conditions);
        let mut conditions = conditions.into_iter().flatten();
        Self {
            name: node.metadata.name.unwrap_or_default(),
            uid: node.metadata.uid.unwrap_or_default(),
            resource_version: node.metadata.resource_version.unwrap_or_default(),
            labels: node.metadata.labels.unwrap_or_default(),
            taints: node.spec.and_then(|spec| spec.taints).unwrap_or_default(),
            ready: conditions.any(|c| c.type_ == "Ready" && c.status == "True"),
        }
    }
}

impl NodeView {
    /// Whether it has the taint of nodes that do not have yet what they are to have.
    pub fn is_held(&self) -> bool {
        self.taints.iter().any(|taint| taint.key == NOT_WARM_TAINT)
    }
}

impl WarmupSpec {
    /// Whether this node is one of those.
    pub fn selects(&self, node: &NodeView) -> bool {
        let labelled = |(key, value): (&String, &String)| node.labels.get(key) == Some(value);
        if !self.node_selector.iter().all(labelled) {
            return false;
        }
        if let Some(required) = self.required_affinity()
            && !required
                .node_selector_terms
                .iter()
                .any(|term| matches_term(term, node))
        {
            return false;
        }
        node.taints.iter().all(|taint| {
            !matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute")
                || TOLERATED.contains(&taint.key.as_str())
                || self
                    .tolerations
                    .iter()
                    .any(|toleration| tolerates(toleration, taint))
        })
    }
}

/// A term without requirements matches nothing.
fn matches_term(term: &NodeSelectorTerm, node: &NodeView) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let field = |wanted: &NodeSelectorRequirement| {
        wanted.key == "metadata.name" && meets(wanted, Some(&node.name))
    };
    let label = |wanted: &NodeSelectorRequirement| {
        meets(wanted, node.labels.get(&wanted.key).map(String::as_str))
    };
    expressions.iter().all(label) && fields.iter().all(field)
}

fn meets(wanted: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = wanted.values.as_deref().unwrap_or_default();
    let is_one_of = value.is_some_and(|value| values.iter().any(|v| v == value));
    let compare = |holds: fn(i64, i64) -> bool| {
        let [limit] = values else { return false };
        match (value.map(str::parse), limit.parse()) {
            (Some(Ok(value)), Ok(limit)) => holds(value, limit),
            _ => false,
        }
    };
    match wanted.operator.as_str() {
        "In" => is_one_of,
        "NotIn" => !is_one_of,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(|value, limit| value > limit),
        "Lt" => compare(|value, limit| value < limit),
        // Of a newer version: nobody knows what it means.
        _ => false,
    }
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let (key, effect) = (text(&toleration.key), text(&toleration.effect));
    if !effect.is_empty() && effect != taint.effect {
        return false;
    }
    if !key.is_empty() && key != taint.key {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or("Equal") {
        "Exists" => true,
        // An empty key is for Exists alone.
        "" | "Equal" => !key.is_empty() && text(&toleration.value) == text(&taint.value),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(labels: Value, taints: Value) -> NodeView {
        let node = json!({
            "metadata": { "name": "n1", "labels": labels },
            "spec": { "taints": taints },
            "status": { "conditions": [{ "type": "Ready", "status": "True" }] },
        });
        NodeView::from(serde_json::from_value::<Node>(node).unwrap())
    }

    fn spec(spec: Value) -> WarmupSpec {
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn a_selector_wants_every_label() {
        let gpu = node(json!({ "gpu": "h100", "zone": "a" }), json!([]));
        assert!(gpu.ready);
        assert!(spec(json!({})).selects(&gpu));
        assert!(spec(json!({ "nodeSelector": { "gpu": "h100" } })).selects(&gpu));
        assert!(!spec(json!({ "nodeSelector": { "gpu": "h100", "zone": "b" } })).selects(&gpu));
        assert!(!spec(json!({ "nodeSelector": { "disk": "" } })).selects(&gpu));
    }

    #[test]
    fn terms_are_alternatives_of_requirements_that_all_hold() {
        let gpu = node(json!({ "gpu": "h100", "cards": "8" }), json!([]));
        let with = |terms: Value| {
            spec(json!({ "affinity": { "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": terms } } } }))
            .selects(&gpu)
        };
        let expression = |key: &str, operator: &str, values: &[&str]| json!({ "matchExpressions": [{ "key": key, "operator": operator, "values": values }] });
        for (term, holds) in [
            (expression("gpu", "In", &["a100", "h100"]), true),
            (expression("gpu", "In", &["a100"]), false),
            (expression("gpu", "NotIn", &["a100"]), true),
            (expression("none", "NotIn", &["a100"]), true),
            (expression("gpu", "NotIn", &["h100"]), false),
            (expression("gpu", "Exists", &[]), true),
            (expression("none", "Exists", &[]), false),
            (expression("none", "DoesNotExist", &[]), true),
            (expression("cards", "Gt", &["7"]), true),
            (expression("cards", "Gt", &["8"]), false),
            (expression("cards", "Lt", &["9"]), true),
            (expression("gpu", "Lt", &["9"]), false),
            (expression("none", "Lt", &["9"]), false),
            (expression("gpu", "Like", &["h*"]), false),
            (json!({}), false),
            (
                json!({ "matchFields": [{ "key": "metadata.name", "operator": "In", "values": ["n1"] }] }),
                true,
            ),
            (
                json!({ "matchFields": [{ "key": "metadata.name", "operator": "In", "values": ["n2"] }] }),
                false,
            ),
        ] {
            assert_eq!(with(json!([term])), holds, "{term}");
        }
        let (yes, no) = (
            expression("gpu", "Exists", &[]),
            expression("none", "Exists", &[]),
        );
        assert!(with(json!([no, yes])));
        assert!(!with(json!([{ "matchExpressions": [
            { "key": "gpu", "operator": "Exists" }, { "key": "none", "operator": "Exists" }] }])));
    }

    #[test]
    fn taints_keep_it_off_unless_tolerated() {
        let taint = |effect: &str| json!([{ "key": "nvidia.com/gpu", "value": "present", "effect": effect }]);
        let tolerating = |toleration: Value| spec(json!({ "tolerations": [toleration] }));
        let tainted = node(json!({}), taint("NoSchedule"));
        assert!(!spec(json!({})).selects(&tainted));
        assert!(spec(json!({})).selects(&node(json!({}), taint("PreferNoSchedule"))));
        for (toleration, holds) in [
            (
                json!({ "key": "nvidia.com/gpu", "operator": "Exists" }),
                true,
            ),
            (json!({ "operator": "Exists" }), true),
            (json!({ "key": "nvidia.com/gpu", "value": "present" }), true),
            (json!({ "key": "nvidia.com/gpu", "value": "absent" }), false),
            (
                json!({ "key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute" }),
                false,
            ),
            (json!({ "value": "present" }), false),
        ] {
            assert_eq!(
                tolerating(toleration.clone()).selects(&tainted),
                holds,
                "{toleration}"
            );
        }
        let starting = node(
            json!({}),
            json!([
                { "key": NOT_WARM_TAINT, "effect": "NoSchedule" },
                { "key": "node.kubernetes.io/not-ready", "effect": "NoExecute" },
            ]),
        );
        assert!(starting.is_held() && spec(json!({})).selects(&starting));
    }
}
