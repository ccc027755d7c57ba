//! Work ahead of time: the pod templates of workloads become `Warmup`s, which their workloads own.
//!
//! A template costs one `Warmup` of a bounded number of nodes ([`Template::nodes`]), whatever becomes of it. It goes with
//! its workload (by the cluster's garbage collection), and when the template does not ask for anything any more. Only
//! what was made here is changed here: it has the label [`MADE`].

use std::collections::{BTreeMap, BTreeSet};

use futures_util::{Stream, StreamExt as _, stream, stream::BoxStream};
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
        templates::{self, KINDS, Template},
        watch::{Event, Selection, follow_as},
    },
    RELIST,
    plan::Key,
};
use crate::digest::Digest;

/// The label of what was made here.
pub(super) const MADE: &str = "hearth.dev/made-of-template";
/// Where the digest of what was asked for stands.
const ASKED: &str = "hearth.dev/asked";
/// Longest name that is made, in bytes.
const MAX_NAME: usize = 200;

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
}

/// What is to be done for a workload.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Change {
    Make(Key, Value),
    /// With its uid.
    Delete(Key, String),
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

    /// What is to be done, where these are there.
    pub(super) fn changes(&self, warmups: &BTreeMap<Key, Warmup>) -> Vec<Change> {
        let mut changes = Vec::new();
        for (key, wanted) in self.wanted.values().flatten() {
            let is_there = warmups.get(key).is_some_and(|there| {
                let asked = there
                    .metadata
                    .annotations
                    .as_ref()
                    .and_then(|a| a.get(ASKED));
                // One of the same name that somebody else made is left alone.
                asked.map(String::as_str) == wanted["metadata"]["annotations"][ASKED].as_str()
                    || !is_ours(there)
            });
            if !is_there {
                changes.push(Change::Make(key.clone(), wanted.clone()));
            }
        }
        let wanted: BTreeSet<&Key> = self.wanted.values().flat_map(BTreeMap::keys).collect();
        for (key, warmup) in warmups.iter().filter(|(_, warmup)| is_ours(warmup)) {
            let owners = warmup.metadata.owner_references.iter().flatten();
            let is_known = owners
                .into_iter()
                .any(|owner| self.known.contains(&owner.kind));
            if is_known && !wanted.contains(key) && warmup.metadata.deletion_timestamp.is_none() {
                let uid = warmup.metadata.uid.clone().unwrap_or_default();
                changes.push(Change::Delete(key.clone(), uid));
            }
        }
        changes
    }
}

fn is_ours(warmup: &Warmup) -> bool {
    let labels = warmup.metadata.labels.as_ref();
    labels.is_some_and(|labels| labels.contains_key(MADE))
}

/// What all workloads ask for, as it changes. Kinds that the cluster does not have are left out.
pub(super) async fn follow_all(client: &Client) -> impl Stream<Item = Seen> + Unpin + use<> {
    let mut streams: Vec<BoxStream<'static, Seen>> = Vec::new();
    for (group, kind, plural) in KINDS {
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
            let (kind, version) = (kind.kind.clone(), kind.api_version());
            let (named, version) = (kind.clone(), version);
            let read = move |object| Asking::read(&named, &version, object);
            let seen = follow_as(api, selection, read).map(move |event| seen(&kind, event));
            streams.push(seen.boxed());
            break;
        }
    }
    stream::select_all(streams)
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
    let references: Vec<String> = (template.asked.references.iter().chain(&template.images))
        .map(ToString::to_string)
        .filter(|reference| reference.len() <= MAX_REFERENCE)
        .take(super::super::crd::MAX_REFERENCES)
        .collect();
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
    // Names of workloads of several kinds may be equal, and long.
    let full = format!("{kind}/{name}/{}", template.part);
    let mut own = format!("{}-{name}", kind.to_ascii_lowercase());
    if !template.part.is_empty() {
        own = format!("{own}-{}", template.part);
    }
    if own.len() > MAX_NAME {
        own = format!(
            "{}-{}",
            own[..MAX_NAME].trim_end_matches(['-', '.']),
            &Digest::of(full.as_bytes()).hex()[..8]
        );
    }
    let asked = Digest::of(spec.to_string().as_bytes()).hex()[..16].to_owned();
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
