//! What the pod templates of workloads ask for, before there is a pod. Pure.
//!
//! No node is told by a template. The controller makes of each [`Template`] a warm-up of as many of the nodes that
//! match as there can be pods, and some to spare; [`Template::nodes`] bounds that. The nodes that were chosen carry the
//! label of what is warm, and the scheduler may prefer them; a pod that comes to another node is served by the
//! annotation that it has itself. So a template costs one warm-up, whatever becomes of it.

use std::collections::BTreeMap;

use serde_json::Value;

use super::annotations::{self, Asked, Mistake};
use crate::reference::Reference;

/// Most nodes that one template warms ahead of its pods.
pub const MAX_NODES: u32 = 64;
/// Most templates of one workload (replicated jobs).
const MAX_TEMPLATES: usize = 32;
/// Most images of one template.
const MAX_IMAGES: usize = 32;

/// The kinds whose templates are read: group, kind, plural.
pub const KINDS: &[(&str, &str, &str)] = &[
    ("apps", "Deployment", "deployments"),
    ("apps", "StatefulSet", "statefulsets"),
    ("apps", "ReplicaSet", "replicasets"),
    ("batch", "Job", "jobs"),
    ("batch", "CronJob", "cronjobs"),
    ("jobset.x-k8s.io", "JobSet", "jobsets"),
    (
        "leaderworkerset.x-k8s.io",
        "LeaderWorkerSet",
        "leaderworkersets",
    ),
];

/// What one template asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Template {
    /// Which of its templates, where there are several: the name of a replicated job, `leader`, `worker`.
    pub part: String,
    pub asked: Asked,
    /// The images of its containers, where these are asked for.
    pub images: Vec<Reference>,
    /// Secrets of its namespace that open the images.
    pub pull_secrets: Vec<String>,
    /// How many pods there can be at a time.
    pub pods: u32,
    /// `nodeSelector`, `affinity` and `tolerations` of the pod, as they are.
    pub node_selector: BTreeMap<String, String>,
    pub affinity: Value,
    pub tolerations: Value,
    pub mistakes: Vec<Mistake>,
}

impl Template {
    /// How many nodes are warmed ahead: a power of two, so that not every step of an autoscaler changes it.
    pub fn nodes(&self) -> u32 {
        match self.pods {
            0 => 0,
            // One to spare.
            pods => (pods.min(MAX_NODES - 1) + 1).next_power_of_two(),
        }
    }
}

/// The templates of a workload that ask for something, or are wrong; none of what is no workload, or belongs to one
/// whose own template is read (a ReplicaSet of a Deployment, a Job of a CronJob or a JobSet).
pub fn read(object: &Value) -> Vec<Template> {
    let kind = object["kind"].as_str().unwrap_or_default();
    let owners = object["metadata"]["ownerReferences"].as_array();
    let is_owned = owners.into_iter().flatten().any(|owner| {
        owner["controller"] == true && KINDS.iter().any(|(_, kind, _)| owner["kind"] == *kind)
    });
    if is_owned {
        return Vec::new();
    }
    let spec = &object["spec"];
    let count = |value: &Value, default: u32| {
        let count = value.as_u64().unwrap_or(u64::from(default));
        u32::try_from(count).unwrap_or(u32::MAX)
    };
    // There will be no more pods of it.
    let is_over = |ends: [&str; 2]| {
        let conditions = object["status"]["conditions"].as_array();
        (conditions.into_iter().flatten())
            .any(|c| c["status"] == "True" && ends.iter().any(|end| c["type"] == *end))
    };
    let job = |spec: &Value| match spec["suspend"] == true {
        true => 0,
        false => count(&spec["parallelism"], 1),
    };
    let mut parts = Vec::new();
    match kind {
        "Deployment" | "StatefulSet" | "ReplicaSet" => {
            parts.push((
                String::new(),
                &spec["template"],
                count(&spec["replicas"], 1),
            ));
        }
        "Job" if !is_over(["Complete", "Failed"]) => {
            parts.push((String::new(), &spec["template"], job(spec)));
        }
        "CronJob" if spec["suspend"] != true => {
            let spec = &spec["jobTemplate"]["spec"];
            parts.push((String::new(), &spec["template"], job(spec)));
        }
        "JobSet" if spec["suspend"] != true && !is_over(["Completed", "Failed"]) => {
            let jobs = spec["replicatedJobs"].as_array();
            for one in jobs.into_iter().flatten().take(MAX_TEMPLATES) {
                let name = one["name"].as_str().unwrap_or_default().to_owned();
                let spec = &one["template"]["spec"];
                let pods =
                    count(&one["replicas"], 1).saturating_mul(count(&spec["parallelism"], 1));
                parts.push((name, &spec["template"], pods));
            }
        }
        "LeaderWorkerSet" => {
            let groups = count(&spec["replicas"], 1);
            let all = &spec["leaderWorkerTemplate"];
            let workers = count(&all["size"], 1).saturating_sub(1);
            let (leader, worker) = (&all["leaderTemplate"], &all["workerTemplate"]);
            let leader = if leader.is_null() { worker } else { leader };
            parts.push(("leader".to_owned(), leader, groups));
            parts.push(("worker".to_owned(), worker, groups.saturating_mul(workers)));
        }
        _ => {}
    }
    let read = |(part, template, pods): (String, &Value, u32)| template_of(part, template, pods);
    parts.into_iter().filter_map(read).collect()
}

fn template_of(part: String, template: &Value, pods: u32) -> Option<Template> {
    let strings = |map: &Value| -> BTreeMap<String, String> {
        let map = map.as_object().into_iter().flatten();
        map.filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())))
            .collect()
    };
    let (mut asked, mut mistakes) =
        annotations::read(&strings(&template["metadata"]["annotations"]));
    let spec = &template["spec"];
    let mut images: Vec<Reference> = Vec::new();
    if asked.images {
        for list in ["initContainers", "containers"] {
            let containers = spec[list].as_array().into_iter().flatten();
            for name in containers.filter_map(|c| c["image"].as_str()) {
                match annotations::image(name) {
                    Ok(image) if images.contains(&image) || images.len() >= MAX_IMAGES => {}
                    Ok(image) => images.push(image),
                    Err(message) => mistakes.push(Mistake {
                        annotation: annotations::IMAGES.to_owned(),
                        message,
                    }),
                }
            }
        }
    }
    if asked.is_empty() && mistakes.is_empty() {
        return None;
    }
    if asked.priority.is_none() {
        let priority = spec["priority"]
            .as_i64()
            .and_then(|p| i32::try_from(p).ok());
        asked.priority = Some(annotations::default_priority(priority));
    }
    let secrets = spec["imagePullSecrets"].as_array().into_iter().flatten();
    let secrets = secrets.filter_map(|s| s["name"].as_str().map(str::to_owned));
    Some(Template {
        part,
        asked,
        images,
        pull_secrets: secrets.take(MAX_IMAGES).collect(),
        pods,
        node_selector: strings(&spec["nodeSelector"]),
        affinity: spec["affinity"].clone(),
        tolerations: spec["tolerations"].clone(),
        mistakes,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Value {
        json!({
            "metadata": {"annotations": {
                "hearth.dev/prefetch": "hf://o/m", "hearth.dev/prefetch-images": "true",
            }},
            "spec": {
                "containers": [{"image": "r.example/a:1"}, {"image": "r.example/a:1"}],
                "initContainers": [{"image": "b"}],
                "nodeSelector": {"gpu": "yes"}, "imagePullSecrets": [{"name": "s"}],
                "priority": 2_000_000, "tolerations": [{"operator": "Exists"}],
            },
        })
    }

    #[test]
    fn every_kind_of_workload() {
        let job = json!({"parallelism": 4, "template": pod()});
        for (object, wanted) in [
            (
                json!({"kind": "Deployment", "spec": {"template": pod()}}),
                vec![("", 1)],
            ),
            (
                json!({"kind": "StatefulSet", "spec": {"replicas": 3, "template": pod()}}),
                vec![("", 3)],
            ),
            (
                json!({"kind": "ReplicaSet", "spec": {"replicas": 0, "template": pod()}}),
                vec![("", 0)],
            ),
            (json!({"kind": "Job", "spec": job}), vec![("", 4)]),
            (
                json!({"kind": "CronJob", "spec": {"jobTemplate": {"spec": job}}}),
                vec![("", 4)],
            ),
            (
                json!({"kind": "CronJob", "spec": {"suspend": true, "jobTemplate": {"spec": job}}}),
                vec![],
            ),
            (
                json!({"kind": "JobSet", "spec": {"replicatedJobs": [
                    {"name": "x", "replicas": 2, "template": {"spec": job}},
                    {"name": "y", "template": {"spec": {"template": {"spec": {}}}}},
                ]}}),
                vec![("x", 8)],
            ),
            (
                json!({"kind": "LeaderWorkerSet", "spec": {
                    "replicas": 2, "leaderWorkerTemplate": {"size": 4, "workerTemplate": pod()},
                }}),
                vec![("leader", 2), ("worker", 6)],
            ),
            (json!({"kind": "Pod", "spec": pod()["spec"]}), vec![]),
            (json!({"kind": "Deployment", "spec": 3}), vec![]),
        ] {
            let found = read(&object);
            let parts: Vec<_> = found.iter().map(|t| (t.part.as_str(), t.pods)).collect();
            assert_eq!(parts, wanted, "{object}");
            for template in found {
                assert_eq!(template.asked.references.len(), 1);
                assert_eq!(template.images.len(), 2);
                assert_eq!(template.pull_secrets, ["s"]);
                assert_eq!(template.asked.priority, Some(50));
                assert_eq!(template.node_selector["gpu"], "yes");
                assert!(
                    template.nodes() <= MAX_NODES && (template.nodes() > 0) == (template.pods > 0)
                );
            }
        }
    }

    #[test]
    fn what_is_over_asks_for_nothing() {
        let job = json!({"template": pod()});
        for (kind, ends, spec) in [
            ("Job", ["Complete", "Failed"], job.clone()),
            (
                "JobSet",
                ["Completed", "Failed"],
                json!({"replicatedJobs": [{"name": "x", "template": {"spec": job}}]}),
            ),
        ] {
            let mut object = json!({"kind": kind, "spec": spec});
            for end in ends {
                for (status, count) in [("False", 1), ("True", 0)] {
                    object["status"]["conditions"] = json!([{"type": "Suspended", "status": "True"}, {"type": end, "status": status}]);
                    assert_eq!(read(&object).len(), count, "{object}");
                }
            }
        }
    }

    #[test]
    fn few_steps_of_a_scale_are_steps_of_a_warmup() {
        let nodes = |replicas: u32| {
            let object =
                json!({"kind": "Deployment", "spec": {"replicas": replicas, "template": pod()}});
            read(&object)[0].nodes()
        };
        for (replicas, wanted) in [
            (0, 0),
            (1, 2),
            (2, 4),
            (3, 4),
            (4, 8),
            (7, 8),
            (31, 32),
            (32, 64),
            (5000, 64),
        ] {
            assert_eq!(nodes(replicas), wanted, "{replicas}");
        }
    }

    #[test]
    fn what_belongs_to_a_workload_is_left_to_it() {
        let mut set = json!({"kind": "ReplicaSet", "spec": {"template": pod()}});
        assert_eq!(read(&set).len(), 1);
        set["metadata"]["ownerReferences"] = json!([{"kind": "Deployment", "controller": true}]);
        assert_eq!(read(&set), []);
    }
}
