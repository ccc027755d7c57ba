//! What a mounted image is read by, kept beside its generation.
//!
//! Of a layer that several images have, the store has one index: that of another image, or of another kind, takes its
//! place, also while something is mounted by it. Who serves that next would show other inodes, or nothing where the
//! registry is down. So each mount keeps what it was made of, as long as its generation is recorded or held. What
//! unpacking the layer has shown meanwhile counts all the same.

use std::sync::Arc;

use super::{
    Known, Maker,
    indexes::{read_kept, repository},
};
use crate::{
    digest::Digest,
    node::{Node, NodeError, Resolved, blocking},
    source::Layer,
    store::{ImageRecord, StoreError},
};

impl Node {
    /// Keeps what an image is read by for its generation `digest`, which the caller holds. What cannot be kept is
    /// logged: only who serves it next may miss it.
    pub async fn keep_indexes(&self, resolved: &Resolved, digest: &Digest) {
        let (Some(layers), true) = (&resolved.layers, self.store().writable()) else {
            return;
        };
        let (store, layers, digest) = (Arc::clone(self.store()), Arc::clone(layers), *digest);
        let artifact = Arc::clone(&resolved.artifact);
        let kept = blocking(move || {
            let reference = &artifact.reference;
            if !store.keep_image(&digest, reference, &artifact.revision)? {
                return Ok(());
            }
            for (layer, known) in layers.layers.iter().zip(&layers.known) {
                let mut bytes = known.mark(reference);
                if layer.as_file.is_some() || store.keep_index(&digest, &layer.blob, &bytes)? {
                    continue;
                }
                // Another has come since this one was read.
                if let Ok(encoded) = known.index.encode() {
                    bytes.extend(encoded);
                    store.put_kept_index(&digest, &layer.blob, &bytes)?;
                }
            }
            Ok(())
        });
        if let Err(error) = kept.await {
            let reference = &resolved.artifact.reference;
            tracing::warn!(reference, %error, "what it is read by is not kept for the next process");
        }
    }

    /// The image that generation `of` of a reference was, which may mean another by now.
    pub(super) async fn image_of(
        &self,
        reference: &str,
        of: &Digest,
        revision: &str,
    ) -> Result<Option<ImageRecord>, NodeError> {
        let (store, of) = (Arc::clone(self.store()), *of);
        let (reference, revision) = (reference.to_owned(), revision.to_owned());
        let found = blocking(move || {
            // Where there is none it was forgotten, perhaps since it is not true.
            let Some(now) = store.image(&reference)? else {
                return Ok(None);
            };
            if now.manifest.to_string() == revision {
                return Ok(Some(now));
            }
            let kept = store.kept_image(&of)?.filter(|kept| {
                kept.reference == reference && kept.manifest.to_string() == revision
            });
            Ok(Some(kept.unwrap_or(now)))
        });
        Ok(found.await?)
    }

    /// The index by which generation `of` of `reference` reads a layer: that which is kept for it, unless unpacking the
    /// layer has given another; else that which the store has.
    ///
    /// # Errors
    /// As [`Node::index_of`].
    pub(super) async fn index_for(
        &self,
        reference: &str,
        layer: &Layer,
        of: &Digest,
    ) -> Result<Option<Known>, NodeError> {
        let now = self.index_of(reference, layer).await?;
        let (store, this, of) = (Arc::clone(self.store()), layer.clone(), *of);
        let (strict, home) = (self.believes_none(), repository(reference));
        let kept = blocking(move || {
            let bytes = store.kept_index(&of, &this.blob)?;
            Ok::<_, StoreError>(bytes.and_then(|bytes| {
                let kept = read_kept(&bytes, &this, &home, strict);
                kept.ok().flatten()
            }))
        });
        Ok(match (kept.await?, now) {
            (Some(kept), Some(now)) => Some(kept.unless_refuted(now)),
            (kept, now) => kept.or(now),
        })
    }
}

impl Known {
    /// This, which is kept, and what `now` is known of the layer shows of it; else `now`.
    fn unless_refuted(self, now: Self) -> Self {
        if self.maker.is_checked() || !now.maker.is_checked() {
            return self;
        }
        if now.index.agrees_with(&self.index) || self.contradicts(&now) {
            return now;
        }
        let maker = match self.maker {
            // Each file that it tells of is there, and is read by its digest.
            Maker::Table => Maker::CheckedTable,
            other => other,
        };
        Self { maker, ..self }
    }
}
