//! The snapshots in memory, and what may be done with them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::{
    Kind, Result, SnapshotError, TARGET_LABEL,
    records::{Found, Record},
};
use crate::{digest::Digest, metrics};

/// More layers than any image has; overlayfs takes 500 (fs/overlayfs, `OVL_MAX_STACK`).
const MAX_DEPTH: usize = 1000;

/// All snapshots.
#[derive(Debug)]
pub(super) struct Table {
    by_name: BTreeMap<String, Record>,
    ids: HashSet<u64>,
    /// There may be snapshots that this knows nothing of.
    has_gaps: bool,
    /// Those in the making: the parent and id of each name.
    making: HashMap<String, (String, u64)>,
    next_id: u64,
}

/// What a snapshot stands on.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// Those with content of their own, the topmost first.
    pub(super) own: Vec<u64>,
    /// The claimed one below them, which stands for all below it.
    pub(super) remote: Option<Record>,
}

impl Line {
    /// The claimed layers.
    pub(super) fn chain(&self) -> Option<Digest> {
        self.remote.as_ref().and_then(|record| record.remote)
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let snapshots = self.by_name.len() as u64;
        metrics::global().snapshotter_snapshots.sub(snapshots);
    }
}

impl Table {
    pub(super) fn new(found: Found) -> Self {
        let mut table = Self {
            by_name: BTreeMap::new(),
            has_gaps: !found.unreadable.is_empty(),
            ids: found.unreadable,
            making: HashMap::new(),
            next_id: found.next_id,
        };
        for record in found.records {
            table.insert(record);
        }
        table
    }

    /// Takes `name`, and an id that was never used, for a snapshot that is to stand upon `parent`.
    pub(super) fn reserve(&mut self, name: &str, parent: &str) -> Result<u64> {
        self.check_new(name, parent)?;
        let id = self.next_id;
        self.next_id += 1;
        self.making.insert(name.to_owned(), (parent.to_owned(), id));
        Ok(id)
    }

    /// Gives a name back that was taken, unless there is a snapshot now.
    pub(super) fn give_back(&mut self, name: &str, id: u64) {
        if self.making.get(name).is_some_and(|(_, i)| *i == id) {
            self.making.remove(name);
        }
    }

    pub(super) fn get(&self, name: &str) -> Result<&Record> {
        let record = self.by_name.get(name);
        record.ok_or_else(|| SnapshotError::NotFound(name.to_owned()))
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Record> {
        self.by_name.values()
    }

    pub(super) fn knows_id(&self, id: u64) -> bool {
        self.ids.contains(&id) || self.making.values().any(|(_, making)| *making == id)
    }

    pub(super) fn insert(&mut self, record: Record) {
        self.ids.insert(record.id);
        self.making.remove(&record.name);
        let before = self.by_name.insert(record.name.clone(), record);
        if before.is_none() {
            metrics::global().snapshotter_snapshots.add(1);
        }
        if let Some(before) = before
            && self.by_name[&before.name].id != before.id
        {
            tracing::error!(
                snapshot = before.name,
                id = before.id,
                "two snapshots of one name"
            );
        }
    }

    pub(super) fn remove(&mut self, name: &str) {
        if let Some(record) = self.by_name.remove(name) {
            metrics::global().snapshotter_snapshots.sub(1);
            self.ids.remove(&record.id);
        }
    }

    /// Whether a snapshot `name` may be made upon `parent`.
    pub(super) fn check_new(&self, name: &str, parent: &str) -> Result<()> {
        if !parent.is_empty() {
            let below = self.by_name.get(parent);
            let below = below.ok_or_else(|| SnapshotError::NoParent(parent.to_owned()))?;
            if below.kind != Kind::Committed {
                return Err(SnapshotError::Invalid(format!(
                    "parent snapshot {parent} is not committed"
                )));
            }
        }
        self.check_free(name)
    }

    fn check_free(&self, name: &str) -> Result<()> {
        match self.is_free(name) {
            true => Ok(()),
            false => Err(SnapshotError::Exists(name.to_owned())),
        }
    }

    /// Whether there is no snapshot of this name, and none in the making.
    pub(super) fn is_free(&self, name: &str) -> bool {
        !self.by_name.contains_key(name) && !self.making.contains_key(name)
    }

    /// Whether `key` may be committed as `name`; its id.
    pub(super) fn check_commit(&self, name: &str, key: &str) -> Result<u64> {
        self.check_free(name)?;
        let record = self.get(key)?;
        match record.kind {
            Kind::Active => Ok(record.id),
            _ => Err(SnapshotError::State(format!(
                "snapshot {key} is not active"
            ))),
        }
    }

    /// The snapshot `name`, which may be removed.
    pub(super) fn check_remove(&self, name: &str) -> Result<&Record> {
        let record = self.get(name)?;
        let made = self.all().find(|r| r.parent == name).map(|r| &r.name);
        let making = || self.making.iter().find(|(_, (parent, _))| parent == name);
        match made.or_else(|| making().map(|(child, _)| child)) {
            Some(child) => Err(SnapshotError::State(format!(
                "cannot remove snapshot {name}: {child} stands on it"
            ))),
            None => Ok(record),
        }
    }

    /// Whether there is a claimed snapshot for these layers upon this parent: what containerd looks
    /// for after ALREADY_EXISTS.
    pub(super) fn is_claimed(&self, target: &Digest, parent: &str) -> bool {
        self.all().any(|r| {
            r.remote == Some(*target)
                && r.parent == parent
                && r.labels.get(TARGET_LABEL) == Some(&target.to_string())
        })
    }

    /// Whether a snapshot is claimed for these layers, upon whichever parent and in whichever namespace.
    pub(super) fn claims(&self, chain: &Digest) -> bool {
        self.all().any(|record| record.remote == Some(*chain))
    }

    /// The chains that are claimed, and those whose trees snapshots stand on; `None` where that cannot be said.
    pub(super) fn chains(&self) -> Option<(BTreeSet<Digest>, BTreeSet<Digest>)> {
        if self.has_gaps {
            return None;
        }
        let claimed = self.all().filter_map(|record| record.remote).collect();
        let users = self.all().filter(|record| record.kind != Kind::Committed);
        let lines: Result<Vec<_>> = users.map(|record| self.line(record)).collect();
        let used = lines.ok()?.iter().filter_map(Line::chain).collect();
        Some((claimed, used))
    }

    /// The ids of the snapshots that stand on the trees of chains.
    pub(super) fn users(&self) -> Vec<(Digest, u64)> {
        let users = self.all().filter(|record| record.kind != Kind::Committed);
        let of = |record: &Record| Some((self.line(record).ok()?.chain()?, record.id));
        users.filter_map(of).collect()
    }

    /// What `record` stands on.
    pub(super) fn line(&self, record: &Record) -> Result<Line> {
        let mut line = Line {
            own: Vec::new(),
            remote: None,
        };
        let mut parent = &record.parent;
        while !parent.is_empty() {
            let below = self.by_name.get(parent);
            let below = below.ok_or_else(|| SnapshotError::NoParent(parent.clone()))?;
            if below.remote.is_some() {
                line.remote = Some(below.clone());
                break;
            }
            line.own.push(below.id);
            if line.own.len() > MAX_DEPTH {
                return Err(SnapshotError::Invalid(format!(
                    "snapshot {} stands on more than {MAX_DEPTH} others",
                    record.name
                )));
            }
            parent = &below.parent;
        }
        Ok(line)
    }
}
