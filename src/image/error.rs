//! Why a layer, or what was said of it, could not be used.

use std::{borrow::Cow, fmt};

use crate::digest::Digest;

/// What an image error means for whoever asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageErrorKind {
    /// It is malformed: a broken archive, stream, index or path.
    Invalid,
    /// It is beyond a limit: of bytes, of entries, of the size of a header.
    TooLarge,
    /// It may be right, but nothing here reads it.
    Unsupported,
    /// Its bytes are not what a digest promises.
    Corrupt,
}

/// A layer that could not be used; names the layer and the entry where they are known:
/// `layer sha256:…: entry "usr/bin/x": why`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ImageError {
    kind: ImageErrorKind,
    layer: Option<Digest>,
    entry: Option<String>,
    why: Cow<'static, str>,
}

impl ImageError {
    /// An error of `kind`; `why` is lower case, without a full stop.
    pub fn new(kind: ImageErrorKind, why: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            layer: None,
            entry: None,
            why: why.into(),
        }
    }

    /// It is malformed.
    pub fn invalid(why: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ImageErrorKind::Invalid, why)
    }

    /// It is beyond a limit.
    pub fn too_large(why: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ImageErrorKind::TooLarge, why)
    }

    /// Nothing here reads it.
    pub fn unsupported(why: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ImageErrorKind::Unsupported, why)
    }

    /// Its bytes are not what a digest promises.
    pub fn corrupt(why: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ImageErrorKind::Corrupt, why)
    }

    /// The same error, of this layer (the digest of the blob), unless it names one already.
    #[must_use]
    pub fn in_layer(mut self, layer: Digest) -> Self {
        self.layer.get_or_insert(layer);
        self
    }

    /// The same error, of the entry at this path, unless it names one already.
    #[must_use]
    pub fn in_entry(mut self, path: &[u8]) -> Self {
        self.entry.get_or_insert_with(|| shorten(path));
        self
    }

    /// What it means.
    pub const fn kind(&self) -> ImageErrorKind {
        self.kind
    }

    /// The layer it is about, where that is known.
    pub const fn layer(&self) -> Option<Digest> {
        self.layer
    }
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(layer) = &self.layer {
            write!(f, "layer {layer}: ")?;
        }
        if let Some(entry) = &self.entry {
            write!(f, "entry {entry:?}: ")?;
        }
        f.write_str(&self.why)
    }
}

fn shorten(path: &[u8]) -> String {
    const MOST: usize = 200;
    let mut text: String = String::from_utf8_lossy(&path[..path.len().min(MOST)]).into();
    if path.len() > MOST {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_layer_and_entry() {
        let layer = Digest::of(b"");
        let error = ImageError::invalid("its path leads out of the image").in_entry(b"../x");
        assert_eq!(
            error.to_string(),
            "entry \"../x\": its path leads out of the image"
        );
        let error = error.in_entry(b"other").in_layer(layer);
        assert_eq!(
            error.to_string(),
            format!("layer {layer}: entry \"../x\": its path leads out of the image")
        );
        assert_eq!(error.kind(), ImageErrorKind::Invalid);
        assert_eq!(error.layer(), Some(layer));
        let long = ImageError::invalid("x").in_entry(&[0xff; 5000]).to_string();
        assert!(long.len() < 1000);
    }
}
