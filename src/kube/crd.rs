//! The custom resources of `hearth.dev/v1alpha1`: `Warmup` asks nodes to have content ahead of pods; `NodeCache` says
//! what a node has.
//!
//! Whoever makes a `Warmup` writes its spec, the controller alone its status; a node alone writes its `NodeCache`. The
//! limits of every list and string are constants here: the schema (`crd/schema.rs`), which the API server enforces, and
//! whoever fills a status, are made of the same ones.

mod schema;
mod select;

use std::collections::BTreeMap;

use k8s_openapi::{
    NamespaceResourceScope,
    api::core::v1::{NodeSelector, Toleration},
    apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta, Time},
};
use serde::{Deserialize, Serialize};

pub use self::{
    schema::{crds, yaml},
    select::NodeView,
};
use super::annotations;
use crate::{
    digest::Digest,
    reference::{Locator, Reference, redact},
};

/// The group of the resources.
pub const GROUP: &str = "hearth.dev";
/// Their version.
pub const VERSION: &str = "v1alpha1";
/// Group and version.
pub const API_VERSION: &str = "hearth.dev/v1alpha1";
/// How the label begins that a node has for a warm artifact; see [`warm_label`].
pub const WARM_LABELS: &str = "warm.hearth.dev/";
/// The taint of a node that does not have yet what it is to have.
pub const NOT_WARM_TAINT: &str = "hearth.dev/not-warm";

/// Most references, and most images, of a `Warmup`.
pub const MAX_REFERENCES: usize = 64;
/// Longest reference or image, in bytes.
pub const MAX_REFERENCE: usize = 1024;
/// Most entries of a node selector; tolerations; terms of an affinity; expressions of a term.
pub const MAX_TERMS: usize = 16;
/// Most values of an expression.
pub const MAX_VALUES: usize = 64;
/// Longest key of a label with its prefix, in bytes.
pub const MAX_LABEL_KEY: usize = 317;
/// Longest value of a label, in bytes.
pub const MAX_LABEL_VALUE: usize = 63;
/// Longest name of an object, in bytes.
pub const MAX_NAME: usize = 253;
/// Most secrets of a `Warmup`.
pub const MAX_SECRETS: usize = 8;
/// Longest message of a status, in bytes.
pub const MAX_MESSAGE: usize = 1024;
/// Most failures that the status of a `Warmup` quotes.
pub const MAX_FAILURES: usize = 10;
/// Most artifacts of a `NodeCache`.
pub const MAX_ARTIFACTS: usize = 128;
/// Most warm-ups that one node reports on; it works on none of the others.
pub const MAX_WARMUPS: usize = 128;
/// Nodes that warm at the same time where a `Warmup` says nothing.
pub const DEFAULT_PARALLEL_NODES: u32 = 100;
/// Priorities are from `-MAX_PRIORITY` to this.
pub const MAX_PRIORITY: i32 = 100;

/// Content that nodes are to have ahead of pods.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Warmup {
    pub metadata: ObjectMeta,
    pub spec: WarmupSpec,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<WarmupStatus>,
}

/// What is to be warm, where, and how.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WarmupSpec {
    /// References, as the command line takes them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub references: Vec<String>,
    /// Container images, as pods name them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<String>,
    /// Labels that a node must have.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// As that of a pod; only the required node affinity counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
    /// Taints that do not keep it off a node.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// Whether what is warm stays while the `Warmup` exists; true where nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin: Option<bool>,
    /// Seconds after its creation when it is deleted, and its pins with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<i64>,
    /// What is more important is fetched first; 0 where nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    /// Nodes that warm at the same time; 0: all. [`DEFAULT_PARALLEL_NODES`] where nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_parallel_nodes: Option<u32>,
    /// Nodes that it is for at most, of those that it selects; all where nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_nodes: Option<u32>,
    /// Bytes per second that each node fetches for it at most, as a quantity (`200Mi`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_per_node: Option<String>,
    /// Secrets with registry credentials, in the namespace of the `Warmup`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<SecretName>,
    /// The secret with credentials of the other origins, in the namespace of the `Warmup`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials: Option<SecretName>,
    /// Whether nodes keep the taint `hearth.dev/not-warm` until this is warm. Counts only in the namespace of the
    /// controller.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub startup_gate: Option<bool>,
}

/// The part of a pod's affinity that counts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Affinity {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_affinity: Option<NodeAffinity>,
}

/// The part of a pod's node affinity that counts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeAffinity {
    #[serde(
        rename = "requiredDuringSchedulingIgnoredDuringExecution",
        skip_serializing_if = "Option::is_none"
    )]
    pub required: Option<NodeSelector>,
}

/// A secret, by its name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretName {
    pub name: String,
}

impl WarmupSpec {
    /// Whether what is warm is pinned.
    pub fn pins(&self) -> bool {
        self.pin.unwrap_or(true)
    }

    /// Nodes that warm at the same time; `None` for all.
    pub fn parallel(&self) -> Option<usize> {
        match self.max_parallel_nodes.unwrap_or(DEFAULT_PARALLEL_NODES) {
            0 => None,
            n => Some(n as usize),
        }
    }

    /// What is asked for, references before images, each once.
    ///
    /// # Errors
    /// The first that cannot be understood, or that no cluster object may ask for.
    pub fn wanted(&self) -> Result<Vec<Reference>, WantedError> {
        let mut wanted: Vec<Reference> = Vec::new();
        let references = self.references.iter().map(|given| {
            let parsed = given.parse::<Reference>();
            (given, parsed.map_err(|error| error.to_string()))
        });
        let images = self
            .images
            .iter()
            .map(|given| (given, annotations::image(given)));
        for (given, parsed) in references.chain(images) {
            let failed = |why: String| WantedError {
                given: cut(&redact(given), 200),
                why,
            };
            let reference = parsed.map_err(&failed)?;
            if matches!(reference.locator, Locator::File(_)) {
                return Err(failed("a Warmup cannot ask for files of the nodes".into()));
            }
            if reference.secret().is_some() {
                let why =
                    "credentials do not belong into a reference: name a Secret in credentials";
                return Err(failed(why.into()));
            }
            if !wanted.contains(&reference) {
                wanted.push(reference);
            }
        }
        match wanted.is_empty() {
            true => Err(WantedError {
                given: String::new(),
                why: "at least one of references and images is needed".into(),
            }),
            false => Ok(wanted),
        }
    }

    /// The bandwidth for it on a node, in bytes per second; `None` where there is no limit.
    ///
    /// # Errors
    /// What is no quantity.
    pub fn bandwidth(&self) -> Result<Option<u64>, WantedError> {
        let Some(given) = &self.bandwidth_per_node else {
            return Ok(None);
        };
        let digits = given.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit: u64 = match &given[digits.len()..] {
            "" => 1,
            "k" => 1000,
            "M" => 1_000_000,
            "G" => 1_000_000_000,
            "T" => 1_000_000_000_000,
            "Ki" => 1 << 10,
            "Mi" => 1 << 20,
            "Gi" => 1 << 30,
            "Ti" => 1 << 40,
            _ => 0,
        };
        match digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)) {
            None | Some(0) => Err(WantedError {
                given: cut(given, 40),
                why: "bandwidthPerNode is not a quantity such as 200Mi".into(),
            }),
            bytes => Ok(bytes),
        }
    }

    /// The required node affinity.
    pub fn required_affinity(&self) -> Option<&NodeSelector> {
        self.affinity
            .as_ref()?
            .node_affinity
            .as_ref()?
            .required
            .as_ref()
    }
}

/// Something in a `Warmup` that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?}: {why}")]
pub struct WantedError {
    given: String,
    why: String,
}

/// How far a `Warmup` is; written by the controller. What is not there is written as null: in a patch that takes away
/// what was there before.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WarmupStatus {
    /// The generation of the spec that all of this is about.
    pub observed_generation: Option<i64>,
    pub nodes: NodeCounts,
    pub bytes: ByteCounts,
    /// What it asks for, with the labels of the nodes that have it.
    pub artifacts: Vec<WarmArtifact>,
    /// Nodes that failed, a few of them.
    pub failures: Vec<Failure>,
    pub conditions: Vec<Condition>,
    /// Nodes that may start now; absent: none.
    pub window: Option<Window>,
    /// Seconds between two reports of a node, at least.
    pub report_seconds: Option<u32>,
    /// When it was first complete in this generation.
    pub completion_time: Option<Time>,
}

/// Nodes of a `Warmup`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeCounts {
    /// Nodes that it selects; the sum of the others.
    pub desired: u32,
    pub warm: u32,
    /// Nodes that are at it.
    pub warming: u32,
    /// Nodes that wait for their turn.
    pub waiting: u32,
    pub failed: u32,
    /// Nodes that are not ready, or whose agent does not report.
    pub unreachable: u32,
}

/// Bytes of a `Warmup`, on all nodes together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ByteCounts {
    /// Of the nodes that know already how much it is.
    pub total: i64,
    pub present: i64,
}

/// An artifact that a `Warmup` asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WarmArtifact {
    pub reference: String,
    /// The label that a node has while the artifact is warm there.
    pub label: String,
}

/// Why a node failed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Failure {
    pub node: String,
    pub reason: String,
    pub message: String,
}

/// The places of the nodes that may start, first and last; see [`place`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    pub first: String,
    pub last: String,
}

impl Window {
    /// All nodes.
    pub fn all() -> Self {
        Self {
            first: "0".repeat(16),
            last: "f".repeat(16),
        }
    }

    /// Whether the node at this place may start.
    pub fn admits(&self, place: &str) -> bool {
        self.first.as_str() <= place && place <= self.last.as_str()
    }
}

/// What a node has; named like it, written by it alone.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeCache {
    pub metadata: ObjectMeta,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<NodeCacheStatus>,
}

/// What a node has, and how far it is with what it is asked for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeCacheStatus {
    /// When the node wrote this, by its own clock.
    pub reported: Option<Time>,
    /// The id of the store: one that was made anew has another.
    pub store_id: String,
    /// Of the file system of the store.
    pub capacity_bytes: i64,
    /// That the store takes.
    pub used_bytes: i64,
    /// On the file system of the store.
    pub free_bytes: i64,
    /// What is warm or arriving; the last used first.
    pub artifacts: Vec<CachedArtifact>,
    /// Artifacts for which there was no place here.
    pub artifacts_omitted: u32,
    /// What holds the node back first, then what there is to do.
    pub warmups: Vec<WarmupOnNode>,
    /// `Warmup`s that select it for which there was no place here; what of them is not warm waits.
    pub warmups_omitted: u32,
}

/// An artifact on a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CachedArtifact {
    pub reference: String,
    /// Of its tree.
    pub digest: String,
    pub bytes: i64,
    pub present_bytes: i64,
    /// Complete and verified.
    pub warm: bool,
    pub pinned: bool,
}

/// How far a node is with a `Warmup`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WarmupOnNode {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// The generation of the `Warmup` that this is about.
    pub generation: i64,
    pub state: WarmState,
    pub bytes: i64,
    pub present_bytes: i64,
    /// Why it failed, as one word.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// States of a `Warmup` on a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum WarmState {
    /// For its turn.
    #[default]
    Waiting,
    Warming,
    Warm,
    /// It tries again later.
    Failed,
}

macro_rules! resource {
    ($type:ident, $plural:literal, $scope:ty) => {
        impl k8s_openapi::Resource for $type {
            const API_VERSION: &'static str = API_VERSION;
            const GROUP: &'static str = GROUP;
            const KIND: &'static str = stringify!($type);
            const VERSION: &'static str = VERSION;
            const URL_PATH_SEGMENT: &'static str = $plural;
            type Scope = $scope;
        }

        impl k8s_openapi::Metadata for $type {
            type Ty = ObjectMeta;

            fn metadata(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn metadata_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}
resource!(Warmup, "warmups", NamespaceResourceScope);
resource!(NodeCache, "nodecaches", k8s_openapi::ClusterResourceScope);

/// The label of nodes that have `reference` (canonical) warm: 16 hexadecimal digits of its SHA-256.
pub fn warm_label(reference: &str) -> String {
    let hex = Digest::of(reference.as_bytes()).hex();
    format!("{WARM_LABELS}{}", &hex[..16])
}

/// Where a node stands in the order of a `Warmup`: 16 hexadecimal digits, spread evenly, another order for each.
pub fn place(uid: &str, node: &str) -> String {
    let hex = Digest::of(format!("{uid}/{node}").as_bytes()).hex();
    hex[..16].to_owned()
}

/// A text of one line, of at most `limit` bytes.
pub fn cut(text: &str, limit: usize) -> String {
    let text = text.replace(char::is_control, " ");
    if text.len() <= limit {
        return text;
    }
    let ellipsis = '…';
    let mut end = limit.saturating_sub(ellipsis.len_utf8());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{ellipsis}", &text[..end])
}
