//! Manifests, indexes and image configurations: bytes in, checked values out. No I/O.
//!
//! Everything here comes from strangers: digests and sizes are checked as they are read, and a
//! document that could be taken for two things is refused (CVE-2021-41190).

use oci_distribution::manifest::{
    IMAGE_CONFIG_MEDIA_TYPE, IMAGE_DOCKER_CONFIG_MEDIA_TYPE, IMAGE_MANIFEST_LIST_MEDIA_TYPE,
    IMAGE_MANIFEST_MEDIA_TYPE, ImageIndexEntry, OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE,
    OciDescriptor, OciImageIndex, OciImageManifest,
};
use serde::Deserialize;

use super::ManifestBytes;
use crate::{
    digest::Digest,
    reference::Platform,
    source::{Layer, SourceError, SourceErrorKind as Kind, listing::short},
};

/// What is accepted where a manifest is asked for.
pub(super) const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, \
     application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, */*;q=0.1";
/// Largest size of a blob that is believed, in bytes.
const MAX_SIZE: u64 = 1 << 60;
/// Most platforms named in an error.
const MAX_SHOWN: usize = 12;

/// What a manifest turned out to be.
#[derive(Debug)]
pub(super) enum Document {
    Index(OciImageIndex),
    Image(Box<OciImageManifest>),
}

/// What is looked at before the document is read as what it claims to be.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    schema_version: Option<u64>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    fs_layers: Option<serde::de::IgnoredAny>,
    blobs: Option<serde::de::IgnoredAny>,
}

/// What is read of an image's configuration.
#[derive(Debug, Deserialize)]
pub(super) struct ImageConfig {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    variant: Option<String>,
    rootfs: Option<RootFs>,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// Whether a manifest with this configuration is that of a container image.
pub(super) fn is_image_config(media_type: &str) -> bool {
    matches!(
        media_type,
        IMAGE_CONFIG_MEDIA_TYPE | IMAGE_DOCKER_CONFIG_MEDIA_TYPE
    )
}

/// Whether this is a layer of a container image: a tar, however compressed.
pub(super) fn is_image_layer(media_type: &str) -> bool {
    let rest = [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    ]
    .iter()
    .find_map(|known| media_type.strip_prefix(known));
    matches!(rest, Some("" | "+gzip" | "+zstd" | ".gzip" | ".zstd"))
}

/// Reads a manifest or an index.
pub(super) fn parse(what: &str, found: &ManifestBytes) -> Result<Document, SourceError> {
    let invalid = |message: String| SourceError::new(Kind::Invalid, what, message);
    let shape: Shape = serde_json::from_slice(&found.bytes).map_err(|error| {
        invalid(format!(
            "its manifest is malformed: {}",
            short(&error.to_string())
        ))
    })?;
    let media_type = match shape.media_type.as_deref() {
        Some(inner) => inner,
        // The header of an answer may carry parameters.
        None => found.media_type.split(';').next().unwrap_or("").trim(),
    };
    if shape.schema_version == Some(1)
        || shape.fs_layers.is_some()
        || media_type.starts_with("application/vnd.docker.distribution.manifest.v1+")
    {
        let error =
            invalid("its manifest has Docker's old schema 1, which is not supported".into());
        return Err(error.with_hint("push the image again with a current tool"));
    }
    if shape.schema_version != Some(2) {
        return Err(invalid("its manifest has no schemaVersion 2".into()));
    }
    let is_index = shape.manifests.is_some();
    let is_image = shape.layers.is_some() || shape.config.is_some();
    let index_type = matches!(
        media_type,
        OCI_IMAGE_INDEX_MEDIA_TYPE | IMAGE_MANIFEST_LIST_MEDIA_TYPE
    );
    let image_type = matches!(media_type, OCI_IMAGE_MEDIA_TYPE | IMAGE_MANIFEST_MEDIA_TYPE);
    match (is_index, is_image) {
        (true, true) => Err(invalid(
            "its manifest could be an index as well as an image".into(),
        )),
        (true, false) if !image_type => {
            let index = serde_json::from_slice(&found.bytes);
            Ok(Document::Index(index.map_err(|error| {
                invalid(format!(
                    "its index is malformed: {}",
                    short(&error.to_string())
                ))
            })?))
        }
        (false, true) if !index_type => {
            let image = serde_json::from_slice(&found.bytes);
            Ok(Document::Image(image.map_err(|error| {
                invalid(format!(
                    "its manifest is malformed: {}",
                    short(&error.to_string())
                ))
            })?))
        }
        (false, false) if shape.blobs.is_some() => Err(invalid(format!(
            "its manifest has the unsupported media type {:?}",
            short(media_type)
        ))),
        _ => Err(invalid(format!(
            "its manifest is not what its media type says ({:?})",
            short(media_type)
        ))),
    }
}

/// Digest and size of a descriptor; `name` says what it describes.
pub(super) fn descriptor(
    what: &str,
    name: &str,
    digest: &str,
    size: i64,
) -> Result<(Digest, u64), SourceError> {
    let invalid = |message: String| Err(SourceError::new(Kind::Invalid, what, message));
    let Ok(parsed) = digest.parse() else {
        let digest = short(digest);
        return invalid(format!(
            "its manifest names {name} by {digest:?}, which is no sha256 digest"
        ));
    };
    match u64::try_from(size) {
        Ok(size) if size <= MAX_SIZE => Ok((parsed, size)),
        _ => invalid(format!("its manifest says that {name} has {size} bytes")),
    }
}

/// The entry for `wanted`, or for this machine.
pub(super) fn choose<'a>(
    what: &str,
    index: &'a OciImageIndex,
    wanted: Option<&Platform>,
) -> Result<&'a ImageIndexEntry, SourceError> {
    let platform = wanted.cloned().unwrap_or_else(Platform::here);
    let of = |entry: &ImageIndexEntry| {
        let found = entry.platform.as_ref()?;
        let (os, arch) = (found.os.to_string(), found.architecture.to_string());
        Some(Platform::new(&os, &arch, found.variant.as_deref()))
    };
    // What build tools add beside the images, and what is attached to one.
    let is_image = |entry: &&ImageIndexEntry| {
        let unknown = of(entry).is_some_and(|p| p.os == "unknown" || p.arch == "unknown");
        let attached = entry.annotations.as_ref();
        !unknown && !attached.is_some_and(|a| a.contains_key("vnd.docker.reference.type"))
    };
    let entries: Vec<_> = index.manifests.iter().filter(is_image).collect();
    let best = entries
        .iter()
        .filter_map(|entry| Some((fit(&of(entry)?, &platform)?, *entry)))
        .min_by_key(|(fit, _)| *fit);
    if let Some((_, entry)) = best {
        return Ok(entry);
    }
    let fail = |message: String| SourceError::new(Kind::NotFound, what, message);
    let mut unnamed = entries.iter().filter(|entry| entry.platform.is_none());
    match (unnamed.next(), unnamed.next()) {
        (Some(only), None) => return Ok(only),
        (Some(_), Some(_)) => {
            let error = fail("its index names several manifests without their platforms".into());
            return Err(error.with_hint("name one of them by its digest: oci://...@sha256:..."));
        }
        (None, _) => {}
    }
    let mut shown: Vec<_> = entries
        .iter()
        .filter_map(|e| Some(of(e)?.to_string()))
        .collect();
    shown.dedup();
    let more = shown.len().saturating_sub(MAX_SHOWN);
    shown.truncate(MAX_SHOWN);
    let mut shown: Vec<_> = shown.iter().map(|p| short(p)).collect();
    if more > 0 {
        shown.push(format!("{more} more"));
    }
    let message = match shown.is_empty() {
        true => "its index names no image".to_owned(),
        false => format!("has no image for {platform}, only for {}", shown.join(", ")),
    };
    Err(fail(message).with_hint("choose one with ?platform=os/arch"))
}

/// How well `found` does where `wanted` is asked for: 0 is best; `None` does not do.
fn fit(found: &Platform, wanted: &Platform) -> Option<u32> {
    if found.os != wanted.os || found.arch != wanted.arch {
        return None;
    }
    let number = |variant: &Option<String>| -> Option<u32> {
        variant.as_deref()?.strip_prefix('v')?.parse().ok()
    };
    match (&found.variant, &wanted.variant) {
        (found, wanted) if found == wanted => Some(0),
        (None, Some(_)) => Some(100),
        // A newer machine runs what was built for an older one.
        (found, wanted @ Some(_)) => match (number(found), number(wanted)) {
            (Some(found), Some(wanted)) if found < wanted => Some(wanted - found),
            _ => None,
        },
        (found, None) => Some(200 + number(found).unwrap_or(0).min(100)),
    }
}

/// The layers of an image, its configuration being `config`.
pub(super) fn layers(
    what: &str,
    layers: &[OciDescriptor],
    config: &ImageConfig,
) -> Result<Vec<Layer>, SourceError> {
    let invalid = |message: String| SourceError::new(Kind::Invalid, what, message);
    let diff_ids = config
        .rootfs
        .as_ref()
        .map_or(&[][..], |rootfs| &rootfs.diff_ids);
    if diff_ids.len() != layers.len() {
        return Err(invalid(format!(
            "its manifest has {} layers, but its configuration {} diff ids",
            layers.len(),
            diff_ids.len()
        )));
    }
    let both = layers.iter().zip(diff_ids).enumerate();
    both.map(|(number, (layer, diff_id))| {
        let name = format!("layer {}", number + 1);
        let (blob, size) = descriptor(what, &name, &layer.digest, layer.size)?;
        if !is_image_layer(&layer.media_type) {
            let found = short(&layer.media_type);
            return Err(invalid(format!(
                "{name} has the unsupported media type {found:?}"
            )));
        }
        let diff_id = diff_id.parse().map_err(|_| {
            let found = short(diff_id);
            invalid(format!(
                "the diff id {found:?} of {name} is no sha256 digest"
            ))
        })?;
        Ok(Layer {
            blob,
            size,
            media_type: layer.media_type.clone(),
            diff_id: Some(diff_id),
            annotations: layer.annotations.clone().unwrap_or_default(),
            as_file: None,
        })
    })
    .collect()
}

impl ImageConfig {
    pub(super) fn parse(what: &str, bytes: &[u8]) -> Result<Self, SourceError> {
        serde_json::from_slice(bytes).map_err(|error| {
            let message = format!(
                "its configuration is malformed: {}",
                short(&error.to_string())
            );
            SourceError::new(Kind::Invalid, what, message)
        })
    }

    /// The platform, where it says one.
    pub(super) fn platform(&self) -> Option<Platform> {
        let said = !self.os.is_empty() && !self.architecture.is_empty();
        said.then(|| Platform::new(&self.os, &self.architecture, self.variant.as_deref()))
    }
}

/// Whether an image, which no index had to say it of, is for the platform asked for.
pub(super) fn check_platform(
    what: &str,
    wanted: Option<&Platform>,
    found: Option<&Platform>,
) -> Result<(), SourceError> {
    match (wanted, found) {
        (Some(wanted), Some(found)) if fit(found, wanted).is_none() => {
            let message = format!("has no image for {wanted}, only for {found}");
            Err(SourceError::new(Kind::NotFound, what, message)
                .with_hint("choose one with ?platform=os/arch"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn bytes(text: &[u8]) -> ManifestBytes {
        ManifestBytes {
            bytes: text.into(),
            digest: Digest::of(text),
            media_type: OCI_IMAGE_MEDIA_TYPE.to_owned(),
        }
    }

    /// All that is made of a document.
    fn through(text: &[u8], config: &[u8]) -> Option<Vec<Layer>> {
        match parse("x", &bytes(text)).ok()? {
            Document::Index(index) => {
                let entry = choose("x", &index, None).ok()?;
                descriptor("x", "y", &entry.digest, entry.size).ok()?;
                None
            }
            Document::Image(image) => {
                let config = ImageConfig::parse("x", config).ok()?;
                let platform = config.platform();
                check_platform("x", Some(&Platform::here()), platform.as_ref()).ok();
                layers("x", &image.layers, &config).ok()
            }
        }
    }

    fn document(count: usize) -> (Value, Value) {
        let digest = Digest::of(b"x").to_string();
        let media_type = "application/vnd.docker.image.rootfs.diff.tar.gzip";
        let layer = json!({ "mediaType": media_type, "digest": digest, "size": 7 });
        let config =
            json!({ "mediaType": IMAGE_DOCKER_CONFIG_MEDIA_TYPE, "digest": digest, "size": 7 });
        let manifest = json!({
            "schemaVersion": 2, "mediaType": IMAGE_MANIFEST_MEDIA_TYPE,
            "config": config, "layers": vec![layer; count],
        });
        let config = json!({ "os": "linux", "architecture": "amd64", "rootfs": { "diff_ids": vec![digest; count] } });
        (manifest, config)
    }

    #[test]
    fn the_corpus() {
        crate::corpus::replay("corpus/manifest", |input| {
            through(input, input);
        });
    }

    #[test]
    fn an_image_of_docker_is_one_too() {
        let (manifest, config) = document(3);
        let found = through(
            manifest.to_string().as_bytes(),
            config.to_string().as_bytes(),
        );
        assert_eq!(found.unwrap().len(), 3);
        let (manifest, config) = document(0);
        let found = through(
            manifest.to_string().as_bytes(),
            config.to_string().as_bytes(),
        );
        assert!(found.unwrap().is_empty());
    }

    #[test]
    fn layers_are_known_by_their_media_type() {
        for yes in [
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.oci.image.layer.v1.tar+gzip",
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        ] {
            assert!(is_image_layer(yes), "{yes}");
        }
        for no in [
            "application/vnd.oci.image.layer.v1.tar+encrypted",
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "application/vnd.ollama.image.model",
            "",
        ] {
            assert!(!is_image_layer(no), "{no}");
        }
    }

    proptest! {
        #[test]
        fn no_damage_panics(
            count in 0..4_usize, at in 0..2000_usize, byte in any::<u8>(), cut in 0..2000_usize,
            in_config in any::<bool>(),
        ) {
            let (manifest, config) = document(count);
            let mut texts = [manifest.to_string().into_bytes(), config.to_string().into_bytes()];
            let text = &mut texts[usize::from(in_config)];
            if let Some(place) = text.get_mut(at) {
                *place = byte;
            }
            text.truncate(cut.max(1));
            through(&texts[0], &texts[1]);
        }

        #[test]
        fn no_document_panics(
            text in r#"\{("(schemaVersion|manifests|layers|config|mediaType|digest|size|platform|os|architecture)":([0-9-]{1,20}|"[a-z:/.+]{0,8}"|\[\{?|null|\{)[,\]}]{0,3}){0,8}\}?"#,
        ) {
            through(text.as_bytes(), text.as_bytes());
        }

        #[test]
        fn no_index_panics(
            entries in proptest::collection::vec(
                ("(sha256:)?[0-9a-f]{0,64}", any::<i64>(), proptest::option::of(("[a-z]{0,6}|linux", "[a-z0-9]{0,6}|amd64|arm", proptest::option::of("v?[0-9]{0,12}")))), 0..5),
        ) {
            let entries: Vec<_> = entries.into_iter().map(|(digest, size, platform)| {
                let platform = platform.map(|(os, architecture, variant)| json!({
                    "os": os, "architecture": architecture, "variant": variant,
                }));
                json!({ "mediaType": OCI_IMAGE_MEDIA_TYPE, "digest": digest, "size": size, "platform": platform })
            }).collect();
            let index = json!({ "schemaVersion": 2, "mediaType": OCI_IMAGE_INDEX_MEDIA_TYPE, "manifests": entries });
            through(index.to_string().as_bytes(), b"{}");
        }
    }
}
