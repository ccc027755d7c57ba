//! Work ahead of time: the pod templates of workloads become `Warmup`s, which their workloads own.
//!
//! A template costs one `Warmup` of a bounded number of nodes ([`Template::nodes`]), whatever becomes of it. It goes with
//! its workload (by the cluster's garbage collection), and when the template does not ask for anything any more. The number
//! of nodes is only raised: what is smaller again costs nothing. Only what was made here is changed here: it has the label
//! [`MADE`]. What the API server does not take, since it is more than a `Warmup` can hold, is told in an Event on the
//! workload, and not tried again before that asks for something else.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures_util::{Stream, StreamExt as _, stream, stream::BoxStream};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, ListParams},
    core::GroupVersionKind,
};
use serde_json::{Value, json};

use super::{
    super::{
        client::within,
        crd::{API_VERSION, MAX_REFERENCE, MAX_SECRETS, MAX_TERMS, Warmup},
        events::{Notice, Subject},
        templates::{self, KINDS, Template},
        watch::{Event, Selection, follow_as},
    },
    RELIST,
    plan::{Action, Key},
};
use crate::digest::Digest;

/// The label of what was made here.
pub(super) const MADE: &str = "hearth.dev/made-of-template";
/// Where the digest of what was asked for stands.
const ASKED: &str = "hearth.dev/asked";
/// Longest part of a name that is made of others, in bytes.
const MAX_NAME: usize = 200;
/// Pauses before it is seen whether the cluster knows a kind by now.
const FIRST_PROBE: Duration = Duration::from_secs(5);
const LONGEST_PROBE: Duration = Duration::from_secs(300);

/// A workload: kind, namespace, name.
pub(super) type Workload = (String, String, String);

/// What was seen of workloads of a kind.
pub(super) enum Seen {
    Listing(String),
    Listed(String),
    /// What it asks for, by the key of each `Warmup`.
    Asks(Workload, BTreeMap<Key, Value>),
}

/// What all workloads ask for.
#[derive(Default)]
pub(super) struct Ahead {
    wanted: BTreeMap<Workload, BTreeMap<Key, Value>>,
    listing: BTreeMap<String, BTreeSet<Workload>>,
    /// Kinds that were listed once.
    known: BTreeSet<String>,
    /// What the API server did not take.
    refused: BTreeMap<Key, Value>,
}

impl Ahead {
    pub(super) fn see(&mut self, seen: Seen) {
        match seen {
            Seen::Listing(kind) => drop(self.listing.insert(kind, BTreeSet::new())),
            Seen::Listed(kind) => {
                let found = self.listing.remove(&kind).unwrap_or_default();
                self.wanted
                    .retain(|workload, _| workload.0 != kind || found.contains(workload));
                self.known.insert(kind);
            }
            Seen::Asks(workload, wanted) => {
                if let Some(listing) = self.listing.get_mut(&workload.0) {
                    listing.insert(workload.clone());
                }
                match wanted.is_empty() {
                    true => drop(self.wanted.remove(&workload)),
                    false => drop(self.wanted.insert(workload, wanted)),
                }
            }
        }
    }

    /// The API server does not take what is wanted by this key: what is to be told of it.
    pub(super) fn refused(&mut self, key: Key, wanted: Value, why: &str) -> Notice {
        let owner = &wanted["metadata"]["ownerReferences"][0];
        let text = |field: &str| owner[field].as_str().unwrap_or_default().to_owned();
        let notice = Notice {
            about: Subject {
                api_version: text("apiVersion"),
                kind: text("kind"),
                namespace: key.0.clone(),
                name: text("name"),
                uid: text("uid"),
            },
            warning: true,
            reason: "WarmupRefused",
            action: "Warmup",
            note: format!("nothing is warmed ahead of its pods: {why}"),
        };
        self.refused.insert(key, wanted);
        notice
    }

    /// What is to be done, where these are there.
    pub(super) fn changes(&mut self, warmups: &BTreeMap<Key, Warmup>) -> Vec<Action> {
        let mut changes = Vec::new();
        let wanted = &self.wanted;
        self.refused
            .retain(|key, refused| wanted.values().any(|w| w.get(key) == Some(refused)));
        for (key, wanted) in self.wanted.values().flatten() {
            if self.refused.contains_key(key) {
                continue;
            }
            let is_there = warmups.get(key).is_some_and(|there| {
                let asked = there
                    .metadata
                    .annotations
                    .as_ref()
                    .and_then(|a| a.get(ASKED));
                let is_asked =
                    asked.map(String::as_str) == wanted["metadata"]["annotations"][ASKED].as_str();
                let nodes = wanted["spec"]["maxNodes"].as_u64().unwrap_or_default();
                let is_enough = (there.spec.max_nodes).is_none_or(|n| u64::from(n) >= nodes);
                // One of the same name that somebody else made is left alone.
                (is_asked && is_enough) || !is_ours(there)
            });
            if !is_there {
                let (key, warmup) = (key.clone(), wanted.clone());
                changes.push(Action::Make { key, warmup });
            }
        }
        let wanted: BTreeSet<&Key> = self.wanted.values().flat_map(BTreeMap::keys).collect();
        for (key, warmup) in warmups.iter().filter(|(_, warmup)| is_ours(warmup)) {
            let mut owners = warmup.metadata.owner_references.iter().flatten();
            if let Some(owner) = owners.find(|owner| self.known.contains(&owner.kind))
                && !wanted.contains(key)
                && warmup.metadata.deletion_timestamp.is_none()
            {
                let uid = warmup.metadata.uid.clone().unwrap_or_default();
                // The list that lacked the owner may have been old.
                let (key, owner) = (key.clone(), Some(owner.clone()));
                changes.push(Action::Delete { key, uid, owner });
            }
        }
        changes
    }
}

fn is_ours(warmup: &Warmup) -> bool {
    let labels = warmup.metadata.labels.as_ref();
    labels.is_some_and(|labels| labels.contains_key(MADE))
}

/// What `owner` asks for now, if that is a `Warmup` by this key.
pub(super) async fn ask(
    client: &Client,
    key: &Key,
    owner: &OwnerReference,
) -> kube::Result<Option<Seen>> {
    let kind = KINDS.iter().find(|(_, kind, _)| *kind == owner.kind);
    let Some((group, kind, plural)) = kind else {
        return Ok(None);
    };
    let version = owner.api_version.rsplit('/').next().unwrap_or_default();
    let resource = GroupVersionKind::gvk(group, version, kind);
    let resource = ApiResource::from_gvk_with_plural(&resource, plural);
    let api = Api::<DynamicObject>::namespaced_with(client.clone(), &key.0, &resource);
    let Some(object) = within(api.get_opt(&owner.name)).await? else {
        return Ok(None);
    };
    let is_it = object.metadata.uid.as_ref() == Some(&owner.uid);
    let object = serde_json::to_value(object).map_err(kube::Error::SerdeError)?;
    let asking = Asking::read(kind, &owner.api_version, object).map_err(kube::Error::SerdeError)?;
    let asks = is_it && asking.wanted.contains_key(key);
    Ok(asks.then_some(Seen::Asks(asking.workload, asking.wanted)))
}

/// What all workloads ask for, as it changes.
pub(super) fn follow_all(client: &Client) -> impl Stream<Item = Seen> + Unpin + use<> {
    let streams = KINDS.iter().map(|kind| {
        let client = client.clone();
        stream::once(follow_kind(client, kind)).flatten().boxed()
    });
    stream::select_all(streams)
}

/// What is asked for by workloads of a kind, from when the cluster knows it.
async fn follow_kind(
    client: Client,
    (group, kind, plural): &'static (&'static str, &'static str, &'static str),
) -> BoxStream<'static, Seen> {
    let mut pause = FIRST_PROBE;
    loop {
        for version in versions(group) {
            let kind = GroupVersionKind::gvk(group, version, kind);
            let resource = ApiResource::from_gvk_with_plural(&kind, plural);
            let api = Api::<DynamicObject>::all_with(client.clone(), &resource);
            let one = ListParams::default().limit(1);
            match within(api.list(&one)).await {
                Err(kube::Error::Api(answer)) if answer.code == 404 => continue,
                // Whatever it is, the follower waits until it is over.
                Ok(_) | Err(_) => {}
            }
            let selection = Selection {
                relist: Some(RELIST),
                ..Selection::default()
            };
            let version = kind.api_version();
            let (kind, of) = (kind.kind.clone(), kind.kind);
            let read = move |object| Asking::read(&of, &version, object);
            let seen = follow_as(api, selection, read).map(move |event| seen(&kind, event));
            return seen.boxed();
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PROBE);
    }
}

/// The versions of a group that are understood, the best first.
fn versions(group: &str) -> &'static [&'static str] {
    match group {
        "jobset.x-k8s.io" => &["v1", "v1alpha2"],
        _ => &["v1"],
    }
}

/// What matters of a workload.
struct Asking {
    workload: Workload,
    wanted: BTreeMap<Key, Value>,
}

impl Asking {
    fn read(kind: &str, version: &str, mut object: Value) -> serde_json::Result<Self> {
        if !object.is_object() {
            return Err(serde::de::Error::custom("it is no object"));
        }
        // Items of lists do not say what they are.
        object["apiVersion"] = json!(version);
        object["kind"] = json!(kind);
        let metadata = &object["metadata"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (namespace, name) = (text(&metadata["namespace"]), text(&metadata["name"]));
        Ok(Self {
            workload: (kind.to_owned(), namespace, name),
            wanted: match metadata["deletionTimestamp"].is_null() {
                true => warmups(&object),
                false => BTreeMap::new(),
            },
        })
    }
}

fn seen(kind: &str, event: Event<Asking>) -> Seen {
    match event {
        Event::Listing => Seen::Listing(kind.to_owned()),
        Event::Listed => Seen::Listed(kind.to_owned()),
        Event::Gone(gone) => Seen::Asks(gone.workload, BTreeMap::new()),
        Event::Found(Asking { workload, wanted }) | Event::Changed(Asking { workload, wanted }) => {
            Seen::Asks(workload, wanted)
        }
    }
}

/// The name of the `Warmup` of a template. What it is made of may be long, and be equal when it is put together: `a` of
/// `b-c` and `a-b` of `c`.
fn name_of(kind: &str, name: &str, part: &str) -> String {
    let full = Digest::of(format!("{kind}/{name}/{part}").as_bytes()).hex();
    let mut own = format!("{}-{name}", kind.to_ascii_lowercase());
    if !part.is_empty() {
        own = format!("{own}-{part}");
    }
    let mut end = own.len().min(MAX_NAME);
    while !own.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}-{}", own[..end].trim_end_matches(['-', '.']), &full[..8])
}

/// The `Warmup`s of a workload.
fn warmups(object: &Value) -> BTreeMap<Key, Value> {
    let templates = templates::read(object);
    templates
        .iter()
        .filter_map(|template| warmup(object, template))
        .collect()
}

fn warmup(object: &Value, template: &Template) -> Option<(Key, Value)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (kind, metadata) = (text(&object["kind"]), &object["metadata"]);
    let (namespace, name) = (text(&metadata["namespace"]), text(&metadata["name"]));
    let mut references: Vec<String> = Vec::new();
    for reference in template.asked.references.iter().chain(&template.images) {
        let reference = reference.to_string();
        // Its own images may be among what it names.
        if reference.len() <= MAX_REFERENCE && !references.contains(&reference) {
            references.push(reference);
        }
    }
    references.truncate(super::super::crd::MAX_REFERENCES);
    if references.is_empty() || template.nodes() == 0 {
        return None;
    }
    let required =
        &template.affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
    let mut spec = json!({
        "references": references,
        "priority": template.asked.priority.unwrap_or_default(),
        "maxNodes": template.nodes(),
        // It is for the time until the pods come, which pin it themselves.
        "pin": false,
    });
    let mut set = |field: &str, value: Value| {
        if !matches!(&value, Value::Null) {
            spec[field] = value;
        }
    };
    if !template.node_selector.is_empty() {
        set("nodeSelector", json!(template.node_selector));
    }
    if !required.is_null() {
        set(
            "affinity",
            json!({ "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": required } }),
        );
    }
    if let Some(tolerations) = template.tolerations.as_array() {
        set(
            "tolerations",
            tolerations.iter().take(MAX_TERMS).cloned().collect(),
        );
    }
    let secrets = template.pull_secrets.iter().take(MAX_SECRETS);
    let secrets: BTreeMap<&String, Value> = secrets
        .map(|name| (name, json!({ "name": name })))
        .collect();
    if !secrets.is_empty() {
        set("imagePullSecrets", secrets.into_values().collect());
    }
    if let Some(name) = &template.asked.credentials {
        set("credentials", json!({ "name": name }));
    }
    let own = name_of(&kind, &name, &template.part);
    let mut asked = spec.clone();
    asked["maxNodes"].take();
    let asked = Digest::of(asked.to_string().as_bytes()).hex()[..16].to_owned();
    let warmup = json!({
        "apiVersion": API_VERSION,
        "kind": "Warmup",
        "metadata": {
            "name": own,
            "namespace": namespace,
            "labels": { MADE: "true" },
            "annotations": { ASKED: asked },
            "ownerReferences": [{
                "apiVersion": object["apiVersion"],
                "kind": kind,
                "name": name,
                "uid": metadata["uid"],
                "controller": true,
            }],
        },
        "spec": spec,
    });
    Some(((namespace, own), warmup))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment(replicas: u32, reference: &str) -> BTreeMap<Key, Value> {
        warmups(&json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": { "name": "serve", "namespace": "d", "uid": "u" },
            "spec": { "replicas": replicas, "template": {
                "metadata": { "annotations": { "hearth.dev/prefetch": reference } },
                "spec": { "containers": [] },
            } },
        }))
    }

    #[test]
    fn names_are_of_one_template_each() {
        let names = [
            name_of("JobSet", "a-b", "c"),
            name_of("JobSet", "a", "b-c"),
            name_of("JobSet", "a-b-c", ""),
            name_of("Job", "ä".repeat(200).as_str(), "x"),
            name_of("Job", "ä".repeat(200).as_str(), "y"),
            name_of("Job", &"n".repeat(253), ""),
        ];
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
        assert!(names.iter().all(|name| name.len() <= MAX_NAME + 9));
        assert!(names[0].starts_with("jobset-a-b-c-"));
    }

    #[test]
    fn a_step_of_a_scale_edits_nothing_unless_it_needs_more_nodes() {
        let mut ahead = Ahead::default();
        let workload: Workload = ("Deployment".into(), "d".into(), "serve".into());
        let mut there: BTreeMap<Key, Warmup> = BTreeMap::new();
        let mut edits = Vec::new();
        for (replicas, reference) in [
            (2, "hf://o/a"),
            (3, "hf://o/a"),
            (9, "hf://o/a"),
            (3, "hf://o/a"),
            (15, "hf://o/a"),
            (15, "hf://o/b"),
            (1, "hf://o/b"),
        ] {
            ahead.see(Seen::Asks(
                workload.clone(),
                deployment(replicas, reference),
            ));
            for change in ahead.changes(&there) {
                let Action::Make { key, warmup } = change else {
                    panic!("{change:?}");
                };
                edits.push((replicas, warmup["spec"]["maxNodes"].as_u64().unwrap()));
                there.insert(key, serde_json::from_value(warmup).unwrap());
            }
        }
        assert_eq!(edits, [(2, 4), (9, 16), (15, 16)]);
    }
}
