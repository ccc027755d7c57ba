//! How far a warm is: counters that whoever shows them polls.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;

use crate::{
    fetch::{Handle, Tally, Trouble},
    tree::Artifact,
};

/// Progress of one warm; made by whoever shows it, filled by the node.
#[derive(Default)]
pub struct Progress {
    state: Mutex<State>,
    done_bytes: AtomicU64,
    done_files: AtomicUsize,
}

#[derive(Default)]
struct State {
    artifact: Option<Arc<Artifact>>,
    names: Vec<String>,
    active: BTreeMap<usize, Weak<Handle>>,
    tally: Tally,
}

/// Progress at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub total_bytes: u64,
    pub present_bytes: u64,
    pub total_files: usize,
    pub done_files: usize,
    /// Files of which a part is here, in path order.
    pub active: Vec<FileProgress>,
    /// Why nothing arrives of the file that waits longest, where the origin fails.
    pub trouble: Option<Trouble>,
}

/// One file under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileProgress {
    pub name: String,
    pub size: u64,
    pub present: u64,
}

impl Progress {
    /// Starts (again) with an artifact.
    pub(super) fn begin(&self, artifact: &Arc<Artifact>) {
        let mut names = vec![String::new(); artifact.objects.len()];
        // What slices are cut from is called after the largest of them.
        let mut largest = vec![0; names.len()];
        for (path, _, object) in artifact.tree.files() {
            if let Some((stored, _)) = artifact.place(object) {
                let (stored, size) = (stored as usize, artifact.objects[object as usize].size);
                if names[stored].is_empty() || size > largest[stored] {
                    (names[stored], largest[stored]) = (path, size);
                }
            }
        }
        self.begin_named(artifact, names);
    }

    /// As [`Progress::begin`], with the names of the objects.
    pub(super) fn begin_named(&self, artifact: &Arc<Artifact>, names: Vec<String>) {
        self.done_bytes.store(0, Relaxed);
        self.done_files.store(0, Relaxed);
        *self.state.lock() = State {
            artifact: Some(Arc::clone(artifact)),
            names,
            active: BTreeMap::new(),
            tally: Tally::default(),
        };
    }

    /// Shows objects of so many bytes as complete.
    pub(super) fn here(&self, objects: usize, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Relaxed);
        self.done_files.fetch_add(objects, Relaxed);
    }

    /// Shows an object as under way until the guard is dropped.
    pub(super) fn watch(&self, object: usize, handle: &Arc<Handle>) -> Watched<'_> {
        self.state
            .lock()
            .active
            .insert(object, Arc::downgrade(handle));
        Watched(self, object)
    }

    /// What came of the objects that are complete, and who read them meanwhile.
    pub fn tally(&self) -> Tally {
        self.state.lock().tally
    }

    /// Progress now; `None` until the reference is resolved.
    pub fn snapshot(&self) -> Option<Snapshot> {
        let state = self.state.lock();
        let artifact = state.artifact.as_ref()?;
        let mut snapshot = Snapshot {
            total_bytes: artifact.size(),
            present_bytes: self.done_bytes.load(Relaxed),
            total_files: artifact.stored().count(),
            done_files: self.done_files.load(Relaxed),
            active: Vec::new(),
            trouble: None,
        };
        for (&object, handle) in &state.active {
            let Some(handle) = handle.upgrade() else {
                continue;
            };
            let earlier = |t: &Trouble| snapshot.trouble.as_ref().is_none_or(|o| t.since < o.since);
            if let Some(trouble) = handle.trouble().filter(earlier) {
                snapshot.trouble = Some(trouble);
            }
            let present = handle.present_bytes();
            snapshot.present_bytes += present;
            if present > 0 {
                snapshot.active.push(FileProgress {
                    name: state.names[object].clone(),
                    size: handle.size(),
                    present,
                });
            }
        }
        snapshot.present_bytes = snapshot.present_bytes.min(snapshot.total_bytes);
        Some(snapshot)
    }
}

/// An object that is shown as under way.
pub(super) struct Watched<'a>(&'a Progress, usize);

impl Watched<'_> {
    /// The object is complete.
    pub(super) fn finished(self) {
        let mut state = self.0.state.lock();
        let object = state.artifact.as_ref().and_then(|a| a.objects.get(self.1));
        let size = object.map_or(0, |o| o.size);
        let handle = state.active.remove(&self.1).and_then(|h| h.upgrade());
        if let Some(handle) = handle {
            state.tally.add(&handle.tally());
        }
        self.0.here(1, size);
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.0.state.lock().active.remove(&self.1);
    }
}
