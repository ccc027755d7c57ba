//! What each layer of a model is: a file and its path, or a tar.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
};

use futures_util::TryStreamExt as _;
use oci_distribution::manifest::OciDescriptor;
use serde::Deserialize;

use super::{Kind, Location, Manifest, Registry, SourceError, is_image_layer, short};
use crate::{
    digest::Digest,
    source::{oci::manifest::descriptor, retry::asked},
};

/// The path of the file that a layer holds (model-spec, annotations.md); the old and the new key.
const FILEPATH: [&str; 2] = ["org.cncf.model.filepath", "org.cnai.model.filepath"];
/// Its attributes, as JSON (model-spec, annotations.md).
const METADATA: [&str; 2] = [
    "org.cncf.model.file.metadata+json",
    "org.cnai.model.file.metadata+json",
];
/// The name of what a layer holds (OCI image-spec, annotations.md).
const TITLE: &str = "org.opencontainers.image.title";
/// Whether the layer is a tar of the directory that its title names.
const UNPACK: &str = "io.deis.oras.content.unpack";
/// Most layers of a model.
const MAX_LAYERS: usize = 100_000;

/// One layer.
#[derive(Debug, Clone)]
pub(super) struct Part {
    /// Its number in the manifest, from 1.
    number: usize,
    pub(super) blob: Digest,
    /// Bytes.
    pub(super) size: u64,
    pub(super) media_type: String,
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) content: Content,
}

/// What a layer holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    /// One file as it is.
    File {
        path: String,
        /// Permission bits.
        mode: u32,
        /// Seconds since the epoch.
        mtime: i64,
    },
    /// Files with paths of their own.
    Tar(Compression),
    /// The same; only its first bytes say how it is compressed.
    Unpack,
}

/// How a tar is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// What a media type says.
#[derive(Debug, PartialEq, Eq)]
enum Known {
    /// A file whose path is in an annotation.
    File,
    /// A file that is called so where no annotation says otherwise.
    Named(Name),
    /// A file with the `name` that its descriptor has, and this behind it.
    Descriptor(&'static str),
    Tar(Compression),
    /// Nothing.
    Other,
}

/// The name of a file that has no path: of several in one model, each has its number.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Name {
    /// `model.gguf`, or `model-00001-of-00002.gguf`.
    Shard(&'static str),
    /// `LICENSE`, `LICENSE-2`; a name and an extension.
    Plain(String, &'static str),
}

impl Part {
    pub(super) const fn is_compressed(&self) -> bool {
        matches!(
            self.content,
            Content::Tar(Compression::Gzip | Compression::Zstd)
        )
    }

    /// Where its bytes are.
    pub(super) fn location(&self) -> Location {
        Location {
            path: self.blob.to_string(),
            generation: None,
            offset: 0,
        }
    }

    /// What it is called in messages.
    pub(super) fn name(&self) -> String {
        let media_type = short(&self.media_type);
        format!("layer {} ({}, {media_type})", self.number, self.blob)
    }

    /// An error about it.
    pub(super) fn error(&self, what: &str, why: &str) -> SourceError {
        SourceError::new(Kind::Invalid, what, format!("{} {why}", self.name()))
    }
}

/// The layers of a model; `None` where the manifest is none of a known layout.
///
/// # Errors
/// A layer of an unknown kind beside known ones; what the registry says.
pub(super) async fn parts(
    registry: &Registry,
    what: &str,
    manifest: &Manifest,
) -> Result<Option<Vec<Part>>, SourceError> {
    let layers = &manifest.image.layers;
    let known = |layer: &OciDescriptor| known(&layer.media_type);
    let names = match layers
        .iter()
        .any(|l| matches!(known(l), Known::Descriptor(_)))
    {
        true => descriptor_names(registry, what, manifest).await?,
        false => Vec::new(),
    };
    let Some(mut parts) = plan(what, layers, &names)? else {
        return Ok(None);
    };
    for part in &mut parts {
        if part.content == Content::Unpack {
            part.content = Content::Tar(sniff(registry, part).await?);
        }
    }
    Ok(Some(parts))
}

/// What the layers are, as far as the manifest says; `names` are those of their descriptors.
fn plan(
    what: &str,
    layers: &[OciDescriptor],
    names: &[Option<String>],
) -> Result<Option<Vec<Part>>, SourceError> {
    if layers.len() > MAX_LAYERS {
        let message = format!("its manifest has more than {MAX_LAYERS} layers");
        return Err(SourceError::new(Kind::Invalid, what, message));
    }
    let known: Vec<_> = layers
        .iter()
        .map(|layer| known(&layer.media_type))
        .collect();
    let titled = |at: usize| annotation(&layers[at].annotations, &[TITLE]).is_some();
    if (0..layers.len()).all(|at| known[at] == Known::Other && !titled(at)) {
        return Ok(None);
    }
    let mut counts: HashMap<&Name, usize> = HashMap::new();
    for name in known.iter().filter_map(Known::name) {
        *counts.entry(name).or_default() += 1;
    }
    let mut seen: HashMap<&Name, usize> = HashMap::new();
    let mut parts = Vec::with_capacity(layers.len());
    for (at, (layer, known)) in layers.iter().zip(&known).enumerate() {
        let name = format!("layer {}", at + 1);
        let (blob, size) = descriptor(what, &name, &layer.digest, layer.size)?;
        let annotations = layer.annotations.clone().unwrap_or_default();
        let mut part = Part {
            number: at + 1,
            blob,
            size,
            media_type: layer.media_type.clone(),
            annotations,
            content: Content::Tar(Compression::None),
        };
        let path = annotation(&layer.annotations, &FILEPATH)
            .or_else(|| annotation(&layer.annotations, &[TITLE]));
        let unpack = annotation(&layer.annotations, &[UNPACK]) == Some("true");
        let nth = match known.name() {
            Some(name) => {
                let seen = seen.entry(name).or_default();
                *seen += 1;
                (*seen, counts[name])
            }
            None => (1, 1),
        };
        let path = match known {
            Known::Tar(compression) => {
                part.content = Content::Tar(*compression);
                parts.push(part);
                continue;
            }
            // ORAS gives this type to files too, if nobody said another one.
            Known::Other if is_image_layer(&layer.media_type) && path.is_none() => {
                part.content = Content::Tar(compression(&layer.media_type));
                parts.push(part);
                continue;
            }
            Known::Other if unpack => {
                part.content = Content::Unpack;
                parts.push(part);
                continue;
            }
            Known::Other | Known::File => path.map(str::to_owned),
            Known::Named(name) => Some(path.map_or_else(|| name.text(nth), str::to_owned)),
            Known::Descriptor(suffix) => {
                let name = names.get(at).cloned().flatten();
                name.map(|name| format!("{name}{suffix}"))
            }
        };
        let Some(path) = path.filter(|path| !plain(path).is_empty()) else {
            let error = match known {
                Known::Other => part.error(what, "has an unsupported media type and no title"),
                Known::Descriptor(_) => part.error(what, "has no name"),
                _ => part.error(what, "has no annotation that says its path"),
            };
            return Err(error);
        };
        let metadata = annotation(&layer.annotations, &METADATA);
        let metadata: Option<Metadata> = metadata.and_then(|m| serde_json::from_str(m).ok());
        let metadata = metadata.unwrap_or_default();
        part.content = Content::File {
            path: plain(&path).to_owned(),
            mode: metadata.mode,
            mtime: rfc3339(&metadata.mtime).unwrap_or(0),
        };
        parts.push(part);
    }
    Ok(Some(parts))
}

/// Bytes `range` of a layer.
pub(super) async fn read(
    registry: &Registry,
    part: &Part,
    range: Range<u64>,
) -> Result<Vec<u8>, SourceError> {
    asked(|| read_once(registry, part, range.clone())).await
}

async fn read_once(
    registry: &Registry,
    part: &Part,
    range: Range<u64>,
) -> Result<Vec<u8>, SourceError> {
    let wanted = (range.end - range.start) as usize;
    let mut bytes = Vec::with_capacity(wanted);
    let mut body = registry.read_blob(&part.blob, range).await?;
    while let Some(frame) = body.try_next().await? {
        bytes.extend_from_slice(&frame);
    }
    match bytes.len() == wanted {
        true => Ok(bytes),
        false => {
            let message = format!("a body has {} bytes, not {wanted}", bytes.len());
            Err(SourceError::new(Kind::Corrupt, part.name(), message))
        }
    }
}

/// How the tar in a layer is compressed, by its first bytes: ORAS compresses directories whatever
/// media type they have.
async fn sniff(registry: &Registry, part: &Part) -> Result<Compression, SourceError> {
    if part.size < 4 {
        return Ok(Compression::None);
    }
    let magic = read(registry, part, 0..4).await?;
    Ok(match magic[..] {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd] => Compression::Zstd,
        _ => Compression::None,
    })
}

/// The `name` of each layer: Ollama's descriptors have one, which no specification knows.
async fn descriptor_names(
    registry: &Registry,
    what: &str,
    manifest: &Manifest,
) -> Result<Vec<Option<String>>, SourceError> {
    #[derive(Deserialize)]
    struct Names {
        layers: Vec<Named>,
    }
    #[derive(Deserialize)]
    struct Named {
        name: Option<String>,
    }
    let document = registry.manifest(&manifest.digest.to_string()).await?;
    let names: Names = serde_json::from_slice(&document.bytes).map_err(|error| {
        let message = format!("its manifest is malformed: {}", short(&error.to_string()));
        SourceError::new(Kind::Invalid, what, message)
    })?;
    Ok(names.layers.into_iter().map(|layer| layer.name).collect())
}

/// The first of `keys` that is there and says something.
fn annotation<'a>(
    annotations: &'a Option<BTreeMap<String, String>>,
    keys: &[&str],
) -> Option<&'a str> {
    let annotations = annotations.as_ref()?;
    let found = keys.iter().find_map(|key| annotations.get(*key))?;
    (!found.is_empty()).then_some(found.as_str())
}

fn known(media_type: &str) -> Known {
    let plain = |name: &str, extension| Known::Named(Name::Plain(name.to_owned(), extension));
    if let Some(rest) = strip_any(media_type, &CNCF)
        && let Some((_, encoding)) = rest.rsplit_once(".v1.")
    {
        return match encoding {
            "tar" | "tar+gzip" | "tar+zstd" => Known::Tar(compression(encoding)),
            // The last two are what Docker's tools write.
            "raw" | "gguf" | "safetensors" => Known::File,
            _ => Known::Other,
        };
    }
    if let Some(rest) = media_type.strip_prefix("application/vnd.kitops.modelkit.")
        && let Some((_, encoding)) = rest.split_once(".v1.")
    {
        return match encoding {
            "tar" | "tar+gzip" | "tar+zstd" => Known::Tar(compression(encoding)),
            _ => Known::Other,
        };
    }
    if let Some(rest) = media_type.strip_prefix("application/vnd.docker.ai.") {
        // Names as Docker Model Runner unpacks them (pkg/distribution/internal/bundle/unpack.go).
        return match rest {
            "gguf.v3" => Known::Named(Name::Shard("gguf")),
            "safetensors" => Known::Named(Name::Shard("safetensors")),
            "dduf" => plain("model", ".dduf"),
            "gguf.v3.lora" => plain("adapter", ".gguf"),
            "mmproj" | "gguf.v3.mmproj" => plain("model", ".mmproj"),
            "chat.template.jinja" => plain("template", ".jinja"),
            "license" => plain("LICENSE", ""),
            "model.file" => Known::File,
            "vllm.config.tar" | "dir.tar" => Known::Tar(Compression::None),
            _ => Known::Other,
        };
    }
    if let Some(rest) = media_type.strip_prefix("application/vnd.ollama.image.") {
        return match rest {
            "model" => Known::Named(Name::Shard("gguf")),
            "projector" | "adapter" => plain(rest, ".gguf"),
            "params" | "messages" => plain(rest, ".json"),
            "json" => Known::Descriptor(""),
            "tensor" => Known::Descriptor(".safetensors"),
            // template, system, license and what is yet to come.
            _ if rest.bytes().all(|b| b.is_ascii_alphanumeric()) => plain(rest, ""),
            _ => Known::Other,
        };
    }
    Known::Other
}

const CNCF: [&str; 2] = ["application/vnd.cncf.model.", "application/vnd.cnai.model."];

fn strip_any<'t>(text: &'t str, prefixes: &[&str]) -> Option<&'t str> {
    prefixes.iter().find_map(|prefix| text.strip_prefix(prefix))
}

/// How a media type of a tar ends.
fn compression(media_type: &str) -> Compression {
    if media_type.ends_with("gzip") {
        Compression::Gzip
    } else if media_type.ends_with("zstd") {
        Compression::Zstd
    } else {
        Compression::None
    }
}

impl Known {
    const fn name(&self) -> Option<&Name> {
        match self {
            Self::Named(name) => Some(name),
            _ => None,
        }
    }
}

impl Name {
    /// The name of number `nth` (from 1) of `count`.
    fn text(&self, (nth, count): (usize, usize)) -> String {
        match self {
            Self::Shard(extension) if count == 1 => format!("model.{extension}"),
            Self::Shard(extension) => format!("model-{nth:05}-of-{count:05}.{extension}"),
            Self::Plain(name, extension) if nth == 1 => format!("{name}{extension}"),
            Self::Plain(name, extension) => format!("{name}-{nth}{extension}"),
        }
    }
}

/// A path without leading `./`.
fn plain(path: &str) -> &str {
    path.strip_prefix("./").unwrap_or(path)
}

/// What is used of a file's attributes.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Metadata {
    mode: u32,
    mtime: String,
}

/// Seconds since the epoch of a time like `2026-11-22T02:21:17.5+01:00` (RFC 3339).
fn rfc3339(text: &str) -> Option<i64> {
    let (date, rest) = text.split_once(['T', 't', ' '])?;
    let number = |text: &str| text.parse::<u16>().ok().map(i64::from);
    let mut date = date.splitn(3, '-').map(number);
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let zone_at = rest.find(['Z', 'z', '+', '-'])?;
    let (time, zone) = rest.split_at(zone_at);
    let mut time = time.split(['.', ':']).take(3).map(number);
    let (hour, minute, second) = (time.next()??, time.next()??, time.next()??);
    let offset = match zone.split_at(1) {
        ("Z" | "z", "") => 0,
        (sign, zone) => {
            let (hours, minutes) = zone.split_once(':')?;
            let minutes = number(hours)? * 60 + number(minutes)?;
            if sign == "-" { -minutes } else { minutes }
        }
    };
    let fits = (0..=9999).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && (0..24).contains(&hour)
        && (0..60).contains(&minute)
        && (0..=60).contains(&second)
        && offset.abs() < 24 * 60;
    // Days since the epoch in the proleptic Gregorian calendar, years starting in March.
    let (y, m) = match month {
        1 | 2 => (year - 1, month + 9),
        _ => (year, month - 3),
    };
    let days =
        y * 365 + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (m * 153 + 2) / 5 + day
            - 1
            - 719_468;
    fits.then_some(days * 86_400 + hour * 3600 + (minute - offset) * 60 + second)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_corpus() {
        crate::corpus::replay("corpus/manifest", |input| {
            if let Ok(manifest) =
                serde_json::from_slice::<oci_distribution::manifest::OciImageManifest>(input)
            {
                let names = vec![None; manifest.layers.len()];
                let _ = plan("oci://r.io/m:1", &manifest.layers, &names);
            }
        });
    }

    #[test]
    fn media_types_say_what_layers_are() {
        use Compression::{Gzip, None, Zstd};
        for base in ["weight", "weight.config", "doc", "code", "dataset"] {
            let of =
                |encoding: &str| known(&format!("application/vnd.cncf.model.{base}.v1.{encoding}"));
            assert_eq!(of("raw"), Known::File);
            assert_eq!(of("tar"), Known::Tar(None));
            assert_eq!(of("tar+gzip"), Known::Tar(Gzip));
            assert_eq!(of("tar+zstd"), Known::Tar(Zstd));
            assert_eq!(of("tar+lz4"), Known::Other);
        }
        for base in ["model", "modelpart", "dataset", "code", "docs"] {
            let of = |encoding: &str| {
                known(&format!(
                    "application/vnd.kitops.modelkit.{base}.v1.{encoding}"
                ))
            };
            assert_eq!(of("tar"), Known::Tar(None));
            assert_eq!(of("tar+gzip"), Known::Tar(Gzip));
            assert_eq!(of("raw"), Known::Other);
        }
        let named = |media_type: &str, nth, count| match known(media_type) {
            Known::Named(name) => name.text((nth, count)),
            other => panic!("{media_type}: {other:?}"),
        };
        for (media_type, first, second) in [
            (
                "docker.ai.gguf.v3",
                "model-00001-of-00002.gguf",
                "model-00002-of-00002.gguf",
            ),
            ("docker.ai.gguf.v3.lora", "adapter.gguf", "adapter-2.gguf"),
            ("docker.ai.license", "LICENSE", "LICENSE-2"),
            ("ollama.image.params", "params.json", "params-2.json"),
            ("ollama.image.template", "template", "template-2"),
            ("ollama.image.license", "license", "license-2"),
        ] {
            let media_type = format!("application/vnd.{media_type}");
            assert_eq!(named(&media_type, 1, 2), first);
            assert_eq!(named(&media_type, 2, 2), second);
        }
        assert_eq!(
            named("application/vnd.ollama.image.model", 1, 1),
            "model.gguf"
        );
        assert_eq!(known("application/vnd.docker.ai.dir.tar"), Known::Tar(None));
        for other in [
            "application/octet-stream",
            "application/vnd.docker.ai.gguf.v3+gzip",
            "application/vnd.ollama.image.../x",
            "application/vnd.cncf.model.config.v1+json",
        ] {
            assert_eq!(known(other), Known::Other, "{other}");
        }
    }

    #[test]
    fn times_are_read() {
        for (text, seconds) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2026-11-22T02:21:17.123456789Z", 1_795_314_077),
            ("2026-11-22T03:21:17+01:00", 1_795_314_077),
            ("2024-02-29T23:59:59-00:30", 1_709_252_999),
            ("0001-01-01T00:00:00Z", -62_135_596_800),
        ] {
            assert_eq!(rfc3339(text), Some(seconds), "{text}");
        }
        for bad in [
            "",
            "2026",
            "2026-11-22",
            "2026-13-01T00:00:00Z",
            "2026-11-22T02:21:17",
            "x-y-zTa:b:cZ",
        ] {
            assert_eq!(rfc3339(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn layers_have_paths_or_an_error_that_names_them(
            layers in prop::collection::vec(
                (
                    prop::sample::select(vec![
                        "application/vnd.cncf.model.weight.v1.raw",
                        "application/vnd.cncf.model.doc.v1.tar",
                        "application/vnd.kitops.modelkit.code.v1.tar+gzip",
                        "application/vnd.docker.ai.gguf.v3",
                        "application/vnd.docker.ai.license",
                        "application/vnd.ollama.image.model",
                        "application/vnd.ollama.image.json",
                        "application/vnd.oci.image.layer.v1.tar",
                        "application/octet-stream",
                    ]),
                    prop::collection::btree_map(
                        prop::sample::select(vec![FILEPATH[0], FILEPATH[1], TITLE, UNPACK, METADATA[0]]),
                        "[a-z./{}:\"0-9]{0,12}|true",
                        0..4,
                    ),
                    prop::option::of("[a-z/.]{0,9}"),
                    -1i64..1 << 62,
                ),
                0..6,
            ),
        ) {
            let (mut descriptors, mut names) = (Vec::new(), Vec::new());
            for (media_type, annotations, name, size) in layers {
                names.push(name);
                descriptors.push(OciDescriptor {
                    media_type: media_type.to_owned(),
                    digest: Digest::of(media_type.as_bytes()).to_string(),
                    size,
                    annotations: Some(annotations.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()),
                    ..OciDescriptor::default()
                });
            }
            match plan("oci://r.io/m:1", &descriptors, &names) {
                Ok(Some(parts)) => {
                    prop_assert_eq!(parts.len(), descriptors.len());
                    for part in parts {
                        let unnamed = matches!(&part.content, Content::File { path, .. } if path.is_empty());
                        prop_assert!(!unnamed);
                    }
                }
                Ok(None) => prop_assert!(descriptors.iter().all(|d| known(&d.media_type) == Known::Other)),
                Err(error) => prop_assert!(error.to_string().contains("layer "), "{}", error),
            }
        }

        #[test]
        fn a_name_is_never_empty(name in "[./]{0,3}") {
            let layer = OciDescriptor {
                media_type: "application/vnd.ollama.image.json".to_owned(),
                digest: Digest::of(b"x").to_string(),
                size: 1,
                ..OciDescriptor::default()
            };
            if let Ok(Some(parts)) = plan("oci://r.io/m:1", &[layer], &[Some(name)]) {
                let named = matches!(&parts[0].content, Content::File { path, .. } if !path.is_empty());
                prop_assert!(named);
            }
        }

        #[test]
        fn times_do_not_panic(text in "[0-9TZ:+. -]{0,30}|.{0,30}") {
            let _ = rfc3339(&text);
        }

        #[test]
        fn media_types_do_not_panic(text in ".{0,60}") {
            let _ = known(&text);
        }
    }
}
