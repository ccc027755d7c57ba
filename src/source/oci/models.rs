//! What a manifest is: a container image, or a model in one of the layouts of registries.

use super::{
    Manifest, Registry,
    manifest::{is_image_config, is_image_layer},
};
use crate::{reference::Reference, source::SourceError, tree::Artifact};

/// The directory that is the content, where the manifest is that of a container image (its layers
/// have to be unpacked); `None` where it is a model that [`resolve`] understands, or nothing known.
pub(super) fn image_root(manifest: &Manifest) -> Option<String> {
    let image = &manifest.image;
    let is_image = is_image_config(&image.config.media_type)
        && image
            .layers
            .iter()
            .all(|layer| is_image_layer(&layer.media_type));
    is_image.then(String::new)
}

/// The artifact that a model's manifest means; `None` where it is no model of a known layout.
///
/// # Errors
/// Malformed metadata; what the registry says.
#[expect(clippy::unused_async, reason = "layouts read small documents")]
pub(super) async fn resolve(
    _registry: &Registry,
    _reference: &Reference,
    _manifest: &Manifest,
    _max_entries: usize,
) -> Result<Option<Artifact>, SourceError> {
    Ok(None)
}
