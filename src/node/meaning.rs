//! What a reference means: files that can be read where they are, or layers to be unpacked first.

use std::sync::Arc;

use super::{Node, NodeError, Progress};
use crate::{
    reference::Reference,
    source::{Layered, Source, SourceError, patiently},
    tree::Artifact,
};

/// What an origin says that a reference is.
#[derive(Debug)]
pub enum Meaning {
    /// Files that can be read in place.
    Files(Artifact),
    /// Layers that have to be unpacked first.
    Layers(Layered),
}

/// What something is resolved for.
#[derive(Clone, Copy)]
pub(super) enum Purpose<'p> {
    /// To read it, where nothing has to be unpacked for that.
    ReadLazily,
    /// To read it.
    Read(&'p Progress),
    /// To bring all of it.
    Bring(&'p Progress),
}

/// Asks `source` what `reference` is. `was_unpacked`: it had to be the last time, and is taken for that again
/// before it is looked into.
pub(super) async fn meaning(
    source: &Arc<dyn Source>,
    reference: &Reference,
    was_unpacked: bool,
) -> Result<Meaning, SourceError> {
    let layered = match was_unpacked {
        true => source.layers(reference).await?,
        false => source.layered(reference).await?,
    };
    if let Some(layered) = layered {
        return Ok(Meaning::Layers(layered));
    }
    match source.resolve(reference).await {
        Ok(artifact) => Ok(Meaning::Files(artifact)),
        Err(error) if error.needs_unpacking() => match source.layers(reference).await? {
            Some(layered) => Ok(Meaning::Layers(layered)),
            None => Err(error),
        },
        Err(error) => Err(error),
    }
}

/// Whether files of it are decoded from layers.
pub(super) fn is_in_layers(artifact: &Artifact) -> bool {
    artifact.objects.iter().any(|object| {
        let location = object.recipe.location();
        location.is_some_and(|location| location.path.contains('#'))
    })
}

impl Node {
    /// Asks the origin what `reference` is; keeps nothing.
    ///
    /// # Errors
    /// What the source says.
    pub async fn inspect(&self, reference: &Reference) -> Result<Meaning, NodeError> {
        let failed = |source| NodeError::Resolve {
            reference: reference.to_string(),
            source,
        };
        let source = self.sources.open(reference).map_err(failed)?;
        let meant = patiently(self.patience(), meaning(&source, reference, false)).await;
        meant.map_err(failed)
    }
}
