//! Images that containerd is to keep, by the names that it gives them.

use std::collections::BTreeSet;

use super::CLAIMED;
use crate::{
    reference::{Locator, Reference},
    store::{Store, StoreError},
};

/// The images that somebody has pinned, as containerd calls them; a claim is no wish to keep them.
///
/// # Errors
/// What the disk says.
pub fn pinned_images(store: &Store) -> Result<BTreeSet<String>, StoreError> {
    let records = store.records()?.into_iter();
    let pinned = records.filter(|r| r.pins.iter().any(|pin| !pin.starts_with(CLAIMED)));
    Ok(pinned
        .filter_map(|record| image_name(&record.reference))
        .collect())
}

/// `registry/repository:tag`, or with the digest in place of the tag.
fn image_name(reference: &str) -> Option<String> {
    let Ok(Reference {
        locator: Locator::Oci(oci),
        ..
    }) = reference.parse()
    else {
        return None;
    };
    // A directory of an image is no image.
    if !oci.path.is_empty() {
        return None;
    }
    let separator = if oci.digest.is_some() { '@' } else { ':' };
    let (registry, repository) = (&oci.registry, &oci.repository);
    Some(format!(
        "{registry}/{repository}{separator}{}",
        oci.wanted()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    #[test]
    fn images_have_the_names_that_containerd_gives_them() {
        let digest = Digest::of(b"manifest");
        for (reference, name) in [
            ("oci://127.0.0.1:5000/app:1", "127.0.0.1:5000/app:1"),
            ("oci://docker.io/nginx", "docker.io/library/nginx:latest"),
            (
                "oci://r.example/a/b:1?platform=linux/arm64",
                "r.example/a/b:1",
            ),
        ] {
            let canonical = reference.parse::<Reference>().unwrap().to_string();
            assert_eq!(image_name(&canonical).as_deref(), Some(name));
        }
        let pinned = format!("oci://r.example/a:1@{digest}");
        let name = format!("r.example/a@{digest}");
        assert_eq!(image_name(&pinned), Some(name));
        assert_eq!(image_name("https://r.example/a:1"), None);
    }
}
