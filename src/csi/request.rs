//! What is asked: fields, attributes and secrets, checked before anything is done.
//!
//! Limits are those of the CSI spec ("Size Limits"): 128 bytes for a string and 4 KiB for a map, where it says nothing
//! else. What the kubelet and its sidecars add under names of their own is left out of both; secrets may be larger.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Component, Path, PathBuf},
};

use super::{Config, CsiError, CsiErrorKind, Flags, Layout, Mode, NAME, Want};
use crate::{
    r#gen::csi::v1::{
        self as api,
        volume_capability::{AccessType, access_mode::Mode as Access},
    },
    reference::{Locator, Reference},
    source::Keys,
};

type Result<T> = std::result::Result<T, CsiError>;
type Map = HashMap<String, String>;

/// Longest string, in bytes.
const MAX_TEXT: usize = 128;
/// Longest name of a node, in bytes.
const MAX_NODE_ID: usize = 256;
/// Longest path, in bytes (`PATH_MAX`).
const MAX_PATH: usize = 4095;
/// Most bytes of a map, keys and values together; of the options of a mount.
const MAX_MAP: usize = 4096;
/// As [`MAX_MAP`], with what Kubernetes adds: tokens of service accounts.
const MAX_WHOLE_MAP: usize = 256 << 10;
/// As [`MAX_MAP`], of secrets: those of registries name many of them, with tokens of some KiB each.
const MAX_SECRETS: usize = 64 << 10;

/// What the kubelet calls the namespace of the pod, whatever the attributes of the volume say.
pub(super) const NAMESPACE: &str = "csi.storage.k8s.io/pod.namespace";

/// A volume to publish.
#[derive(Debug)]
pub(crate) struct Publish {
    pub(super) volume: String,
    pub(super) target: PathBuf,
    pub(super) want: Want,
    pub(super) flags: Flags,
    /// Of the pod; empty where the CSIDriver does not say `podInfoOnMount: true`.
    pub(super) namespace: String,
}

/// A volume to make.
#[derive(Debug)]
pub(crate) struct Create {
    pub(super) name: String,
    /// Bytes; 0 where nothing is said.
    pub(super) required: i64,
    /// Bytes; 0 where nothing is said.
    pub(super) limit: i64,
    pub(super) parameters: BTreeMap<String, String>,
}

impl Publish {
    pub(super) fn new(asked: api::NodePublishVolumeRequest, config: &Config) -> Result<Self> {
        let volume = volume_id(asked.volume_id)?;
        let target = path("target_path", &asked.target_path)?;
        check_map("publish_context", &asked.publish_context)?;
        let capability = asked
            .volume_capability
            .ok_or_else(|| missing("volume_capability"))?;
        let wanted = Wanted::Published {
            readonly: asked.readonly,
        };
        let flags = capability_flags(&capability, wanted, config)?;
        let mut want = want("volume_context", &asked.volume_context, config)?;
        want.keys = keys(&want.reference, asked.secrets)?;
        let namespace = asked.volume_context.get(NAMESPACE).cloned();
        let namespace = namespace.unwrap_or_default();
        check_text(NAMESPACE, &namespace, MAX_TEXT)?;
        Ok(Self {
            volume,
            target,
            want,
            flags,
            namespace,
        })
    }
}

impl Create {
    pub(super) fn new(asked: api::CreateVolumeRequest, config: &Config) -> Result<Self> {
        let name = text("name", asked.name, MAX_TEXT)?;
        if asked.volume_capabilities.is_empty() {
            return Err(missing("volume_capabilities"));
        }
        for capability in &asked.volume_capabilities {
            capability_flags(capability, Wanted::Made, config)?;
        }
        if asked.volume_content_source.is_some() {
            return Err(CsiError::invalid(
                "volume_content_source: volumes are made of their `source` only, not of snapshots or other volumes",
            ));
        }
        if asked.accessibility_requirements.is_some() {
            return Err(CsiError::invalid(
                "accessibility_requirements: every node can have every volume",
            ));
        }
        if !asked.mutable_parameters.is_empty() {
            return Err(CsiError::invalid(
                "mutable_parameters: volumes are immutable; use `parameters`",
            ));
        }
        let want = want("parameters", &asked.parameters, config)?;
        keys(&want.reference, asked.secrets)?;
        let (mut required, mut limit) = (0, 0);
        if let Some(range) = asked.capacity_range {
            (required, limit) = (range.required_bytes, range.limit_bytes);
            if required < 0 || limit < 0 {
                return Err(CsiError::invalid("capacity_range: a size is negative"));
            }
            if limit != 0 && limit < required {
                return Err(CsiError::new(
                    CsiErrorKind::OutOfRange,
                    format!("capacity_range: at least {required} and at most {limit} bytes"),
                ));
            }
        }
        let own = asked.parameters.into_iter();
        let parameters = own.filter(|(key, _)| !is_foreign(key)).collect();
        Ok(Self {
            name,
            required,
            limit,
            parameters,
        })
    }
}

/// # Errors
/// A node id that is missing, too long, or has control characters.
pub(super) fn check_node_id(id: &str) -> Result<()> {
    text("node id", id.to_owned(), MAX_NODE_ID).map(drop)
}

pub(super) fn volume_id(id: String) -> Result<String> {
    text("volume_id", id, MAX_TEXT)
}

fn missing(field: &str) -> CsiError {
    CsiError::invalid(format!("{field} is missing"))
}

fn text(field: &str, value: String, limit: usize) -> Result<String> {
    if value.is_empty() {
        return Err(missing(field));
    }
    check_text(field, &value, limit)?;
    Ok(value)
}

fn check_text(field: &str, value: &str, limit: usize) -> Result<()> {
    if value.len() > limit {
        let message = format!("{field} is longer than {limit} bytes");
        return Err(CsiError::invalid(message));
    }
    if value.chars().any(char::is_control) {
        let message = format!("{field} has control characters");
        return Err(CsiError::invalid(message));
    }
    Ok(())
}

/// A path where a volume may be, or not: what cannot be one is only not found there.
pub(super) fn place(field: &str, value: &str) -> Result<PathBuf> {
    let value = text(field, value.to_owned(), MAX_PATH)?;
    Ok(Path::new(&value).components().collect())
}

/// An absolute path without `.` and `..`, that is not the root.
pub(super) fn path(field: &str, value: &str) -> Result<PathBuf> {
    if value.is_empty() {
        return Err(missing(field));
    }
    check_text(field, value, MAX_PATH)?;
    let given = Path::new(value);
    if !given.is_absolute() {
        let message = format!("{field} {value:?} is not absolute");
        return Err(CsiError::invalid(message));
    }
    let strange = value.split('/').any(|part| matches!(part, "." | ".."));
    let path: PathBuf = given.components().collect();
    if strange || !matches!(path.components().next_back(), Some(Component::Normal(_))) {
        let message = format!("{field} {value:?} is not the plain path of a directory");
        return Err(CsiError::invalid(message));
    }
    Ok(path)
}

/// Keys that Kubernetes adds for itself.
fn is_foreign(key: &str) -> bool {
    let domain = key.split_once('/').map(|(domain, _)| domain);
    domain.is_some_and(|d| {
        ["kubernetes.io", "k8s.io"]
            .iter()
            .any(|own| d == *own || d.strip_suffix(own).is_some_and(|rest| rest.ends_with('.')))
    })
}

fn check_map(field: &str, map: &Map) -> Result<()> {
    let size = |(key, value): (&String, &String)| key.len() + value.len();
    let whole: usize = map.iter().map(size).sum();
    let own: usize = map
        .iter()
        .filter(|(key, _)| !is_foreign(key))
        .map(size)
        .sum();
    if own > MAX_MAP || whole > MAX_WHOLE_MAP {
        let message = format!("{field} is longer than {MAX_MAP} bytes");
        return Err(CsiError::invalid(message));
    }
    Ok(())
}

/// What a volume is wanted for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Wanted {
    /// To be there, so that it can be published later.
    Made,
    Published {
        readonly: bool,
    },
}

impl Wanted {
    /// What the spec calls it when something makes sense, but is more than a volume here can do.
    const fn exceeds(self) -> CsiErrorKind {
        match self {
            Self::Made => CsiErrorKind::Invalid,
            Self::Published { .. } => CsiErrorKind::FailedPrecondition,
        }
    }
}

/// Checks that a volume of ours can be used like that, and says how it is to be mounted.
pub(super) fn capability_flags(
    capability: &api::VolumeCapability,
    wanted: Wanted,
    config: &Config,
) -> Result<Flags> {
    let exceeds = wanted.exceeds();
    let mount = match &capability.access_type {
        Some(AccessType::Mount(mount)) => mount,
        Some(AccessType::Block(_)) => {
            return Err(CsiError::new(
                exceeds,
                "volume_capability: volumes are file systems, not block devices (volumeMode: Filesystem)",
            ));
        }
        None => return Err(missing("volume_capability.access_type")),
    };
    let mode = capability.access_mode.as_ref();
    let mode = mode.ok_or_else(|| missing("volume_capability.access_mode"))?;
    let writes = match (Access::try_from(mode.mode), wanted) {
        (Ok(Access::Unknown) | Err(_), _) => {
            let message = format!("volume_capability.access_mode {} is unknown", mode.mode);
            return Err(CsiError::invalid(message));
        }
        (Ok(Access::SingleNodeReaderOnly | Access::MultiNodeReaderOnly), _) => false,
        // Of one node it is what Kubernetes says of every volume of a pod, and of a claim that says nothing else: whether
        // such a one writes is said when it is published.
        (
            Ok(
                Access::SingleNodeWriter
                | Access::SingleNodeSingleWriter
                | Access::SingleNodeMultiWriter,
            ),
            Wanted::Made,
        ) => false,
        (Ok(Access::MultiNodeSingleWriter | Access::MultiNodeMultiWriter), Wanted::Made) => true,
        (Ok(_), Wanted::Published { readonly }) => !readonly,
    };
    let writable = || {
        CsiError::new(
            exceeds,
            "volumes are read-only: say `readOnly: true` for a volume of a pod, and \
             `accessModes: [ReadOnlyMany]` for a claim",
        )
    };
    if writes && config.refuse_writable {
        return Err(writable());
    }
    check_text("fs_type", &mount.fs_type, MAX_TEXT)?;
    if !mount.volume_mount_group.is_empty() {
        return Err(CsiError::new(
            exceeds,
            "volume_mount_group: a model is shared by all its pods, and keeps its owners and modes; say \
             `fsGroupPolicy: None` in the CSIDriver",
        ));
    }
    if mount.mount_flags.iter().map(String::len).sum::<usize>() > MAX_MAP {
        let message = format!("mount_flags are longer than {MAX_MAP} bytes");
        return Err(CsiError::invalid(message));
    }
    let mut flags = Flags::default();
    for (number, flag) in mount.mount_flags.iter().enumerate() {
        match flag.as_str() {
            "ro" | "nosuid" | "nodev" | "noatime" | "relatime" => {}
            "noexec" => flags.noexec = true,
            "rw" if config.refuse_writable => return Err(writable()),
            "rw" => {}
            // Not shown: it may be a secret.
            _ => {
                return Err(CsiError::invalid(format!(
                    "mount_flags: option {} is none of ro, noexec, nosuid, nodev, noatime, relatime",
                    number + 1
                )));
            }
        }
    }
    Ok(flags)
}

/// What the attributes of a volume say.
pub(super) fn want(field: &str, attributes: &Map, config: &Config) -> Result<Want> {
    check_map(field, attributes)?;
    let wrong = |key: &str, why: String| CsiError::invalid(format!("{field}: {key}: {why}"));
    let mut source = None;
    let mut revision = None;
    let (mut include, mut exclude) = (Vec::new(), Vec::new());
    let (mut layout, mut mode, mut strict) = (Layout::Tree, Mode::Lazy, false);
    for (key, value) in attributes {
        match (key.as_str(), value.as_str()) {
            ("source", text) if !text.is_empty() => source = Some(text),
            ("revision", text) => revision = Some(text).filter(|text| !text.is_empty()),
            ("include", text) => include = globs(text),
            ("exclude", text) => exclude = globs(text),
            ("layout", "tree") => layout = Layout::Tree,
            ("layout", "hub") => layout = Layout::Hub,
            ("mode", "lazy") => mode = Mode::Lazy,
            ("mode", "complete") => mode = Mode::Complete,
            ("verify", "complete") => strict = false,
            ("verify", "strict") => strict = true,
            ("layout", _) => return Err(wrong(key, "expected tree or hub".into())),
            ("mode", _) => return Err(wrong(key, "expected lazy or complete".into())),
            ("verify", _) => return Err(wrong(key, "expected complete or strict".into())),
            ("source", _) => {}
            (key, _) if is_foreign(key) => {}
            (key, _) => {
                let key: String = key.chars().take(MAX_TEXT).collect();
                return Err(CsiError::invalid(format!(
                    "{field}: {key:?} is none of source, revision, include, exclude, layout, mode, verify"
                )));
            }
        }
    }
    let source = source.ok_or_else(|| {
        let message = format!("{field}: source is missing: what to mount, such as hf://org/model");
        CsiError::invalid(message)
    })?;
    let mut reference: Reference = source
        .parse()
        .map_err(|e: crate::reference::ParseReferenceError| wrong("source", e.to_string()))?;
    if reference.secret().is_some() {
        return Err(wrong(
            "source",
            "holds a secret, and attributes are for all to see: put `username` and `password` into the secret".into(),
        ));
    }
    if matches!(reference.locator, Locator::File(_)) && !config.allow_files {
        return Err(wrong(
            "source",
            "directories of the node are not for pods (csi.allow_files)".into(),
        ));
    }
    if let Some(revision) = revision {
        let Locator::Hub(repo) = &mut reference.locator else {
            let why = "is for hf:// only: other sources have it in `source`".into();
            return Err(wrong("revision", why));
        };
        if repo.revision.as_deref().is_some_and(|r| r != revision) {
            return Err(wrong("revision", "is not the one in `source`".into()));
        }
        repo.revision = (revision != "main").then(|| revision.to_owned());
    }
    reference.filter.include.append(&mut include);
    reference.filter.exclude.append(&mut exclude);
    // What it says as a whole must mean that, too: then it is what a record of it means.
    let locator = reference.locator.clone();
    let reference: Reference = reference
        .to_string()
        .parse()
        .map_err(|e: crate::reference::ParseReferenceError| wrong("source", e.to_string()))?;
    if reference.locator != locator {
        return Err(wrong("revision", "is no revision".into()));
    }
    if layout == Layout::Hub && !matches!(reference.locator, Locator::Hub(_)) {
        return Err(wrong("layout", "hub is for hf:// sources".into()));
    }
    Ok(Want {
        reference,
        layout,
        mode,
        strict,
        keys: None,
    })
}

/// Globs are separated by commas (but not those in braces) and line ends.
fn globs(text: &str) -> Vec<String> {
    let mut depth = 0usize;
    let parts = text.split(|c| {
        match c {
            '{' | '[' => depth += 1,
            '}' | ']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0 && c == ',' || c == '\n'
    });
    let parts = parts.map(str::trim).filter(|part| !part.is_empty());
    parts.map(str::to_owned).collect()
}

/// What the secrets of a request open.
fn keys(reference: &Reference, secrets: Map) -> Result<Option<Keys>> {
    let size: usize = secrets
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    if size > MAX_SECRETS {
        let message = format!("secrets are longer than {MAX_SECRETS} bytes");
        return Err(CsiError::invalid(message));
    }
    let kind = reference.locator.kind();
    let mut given: BTreeMap<_, _> = secrets.into_iter().collect();
    let taken = Keys::take(reference, &mut given);
    let (keys, names) = taken.map_err(|why| CsiError::invalid(format!("secrets: {why}")))?;
    match given.into_keys().next() {
        None => Ok(keys),
        Some(name) => {
            let name: String = name.chars().take(MAX_TEXT).collect();
            let expected = match names {
                "" => {
                    format!("{NAME} takes no secrets for {kind} sources: the node's own are used")
                }
                names => format!("for a {kind} source it takes {names}"),
            };
            Err(CsiError::invalid(format!("secrets: {name:?}: {expected}")))
        }
    }
}
