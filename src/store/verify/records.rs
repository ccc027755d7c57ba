//! Checks the records of artifacts and images, and what they lead to.

use std::{
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::{Users, VerifyReport, VerifyScope};
use crate::{
    digest::Digest,
    store::{Result, Store, images::ImageState, indexes::layers_of},
    tree::Artifact,
};

impl Store {
    /// Checks records and trees, and gathers which references need which objects.
    pub(super) fn verify_records(
        &self,
        scope: VerifyScope<'_>,
        repair: bool,
        report: &mut VerifyReport,
        users: &mut Users,
        layers: &mut Users,
    ) -> Result<()> {
        let dir = self.root.join("artifacts");
        let paths: Vec<PathBuf> = match scope {
            VerifyScope::References(references) => {
                references.iter().map(|r| self.record_path(r)).collect()
            }
            VerifyScope::All => {
                let names = self.disk.list(&dir)?.into_iter();
                let paths = names.map(|name| dir.join(name));
                paths
                    .filter(|p| p.extension().is_some_and(|e| e == "json"))
                    .collect()
            }
        };
        for (at, path) in paths.iter().enumerate() {
            let known = match (self.read_record(path)?, scope) {
                (None, VerifyScope::References(references)) => {
                    let below = self.on_tiers(|tier| tier.store.artifact(&references[at]));
                    below.map(|(record, _)| record)
                }
                (own, _) => own,
            };
            let Some(record) = known else {
                if self.disk.stat(path)?.is_some() {
                    let generations = self.recorded_at(path)?;
                    let reference = generations.first().map(|a| a.reference.clone());
                    let (what, references) = ("its checksum does not fit", reference.into_iter());
                    let references = references.collect();
                    if generations.is_empty() {
                        self.damaged(path.clone(), what, references, repair, report)?;
                    } else {
                        // In its place: without one, what it leads to is anybody's to collect.
                        for artifact in generations.iter().filter(|_| repair) {
                            self.record(artifact)?;
                        }
                        report.add(path.clone(), what, references, repair);
                    }
                }
                if let VerifyScope::References(references) = scope {
                    report.missing.push(references[at].clone());
                }
                continue;
            };
            let own = self.own_tree(&record.digest)?;
            let path = self.tree_path(&record.digest);
            if own.is_none() && self.disk.stat(&path)?.is_some() {
                self.damaged(
                    path,
                    "its digest does not fit",
                    vec![record.reference.clone()],
                    repair,
                    report,
                )?;
            }
            let artifact = match own {
                None => self.on_tiers(|tier| tier.store.own_tree(&record.digest)),
                own => own,
            };
            let Some(artifact) = artifact else {
                report.missing.push(record.reference);
                continue;
            };
            for layer in layers_of(&artifact.objects) {
                let references = layers.entry(layer).or_default();
                references.insert(record.reference.clone());
            }
            let mut whole = true;
            for object in artifact.stored() {
                let content = self.content_of(&object.id)?;
                let stat = match &content {
                    Some(digest) => self.stat_content(digest)?,
                    None => None,
                };
                whole &= stat.is_some();
                if let Some(digest) = content {
                    users
                        .entry(digest)
                        .or_default()
                        .insert(record.reference.clone());
                }
            }
            if !whole && matches!(scope, VerifyScope::References(_)) {
                report.missing.push(record.reference);
            }
        }
        Ok(())
    }

    /// What the damaged record at `path` has led to, as far as trees with that reference say it: of what all is here, the
    /// newest, then the newest of all. Recorded in this order, the first stays until the second is here.
    fn recorded_at(&self, path: &Path) -> Result<Vec<Artifact>> {
        let dir = self.root.join("trees");
        let mut found: Vec<(SystemTime, Artifact)> = Vec::new();
        for name in self.disk.list(&dir)? {
            let Some(digest) = name.to_str().and_then(|n| Digest::from_hex(n).ok()) else {
                continue;
            };
            let modified = self.disk.stat(&dir.join(&name))?.map(|stat| stat.modified);
            if let Some(artifact) = self.own_tree(&digest)?
                && let Some(modified) = modified
                && self.record_path(&artifact.reference) == path
            {
                found.push((modified, artifact));
            }
        }
        found.sort_by_key(|(modified, _)| std::cmp::Reverse(*modified));
        // Of an image it is known which.
        if let Some((_, newest)) = found.first()
            && let Some(image) = self.own_image(&newest.reference)?
        {
            let revision = image.manifest.to_string();
            let is_it = |(_, artifact): &(_, Artifact)| artifact.revision == revision;
            if found.iter().any(is_it) {
                found.retain(is_it);
            }
        }
        let mut generations = Vec::new();
        for (at, (_, artifact)) in found.into_iter().enumerate() {
            let is_whole = self.has_all(&artifact)?;
            if at == 0 || is_whole {
                generations.insert(0, artifact);
            }
            if is_whole {
                break;
            }
        }
        Ok(generations)
    }

    /// Checks the records of all images, and gathers all layers.
    pub(super) fn verify_images(
        &self,
        repair: bool,
        report: &mut VerifyReport,
        layers: &mut Users,
    ) -> Result<()> {
        for path in self.image_paths()? {
            self.verify_image(path, repair, report, layers)?;
        }
        for name in self.disk.list(&self.root.join("indexes"))? {
            let layer = name.to_str().and_then(|n| Digest::from_hex(n).ok());
            if let Some(layer) = layer {
                layers.entry(layer).or_default();
            }
        }
        Ok(())
    }

    /// Checks the record of an image, if there is one, and gathers its layers.
    pub(super) fn verify_image(
        &self,
        path: PathBuf,
        repair: bool,
        report: &mut VerifyReport,
        layers: &mut Users,
    ) -> Result<()> {
        if self.disk.stat(&path)?.is_none() {
            return Ok(());
        }
        match self.read_image(&path)? {
            ImageState::Damaged => {
                let what = "its checksum does not fit";
                self.damaged(path, what, Vec::new(), repair, report)
            }
            ImageState::Absent => Ok(()),
            ImageState::Here(image) => {
                for layer in image.layers {
                    let references = layers.entry(layer.blob).or_default();
                    references.insert(image.reference.clone());
                }
                Ok(())
            }
        }
    }
}
