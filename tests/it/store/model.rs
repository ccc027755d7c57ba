//! Random operations on one object against a model, through two opens of the store.

use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use hearth::store::{CollectOptions, Lease};

const CHUNKS: u64 = 6;
const LEN: usize = 5 * MIB + 17;

static KNOWN: LazyLock<(Vec<u8>, Artifact)> = LazyLock::new(|| {
    let bytes = content(21, LEN);
    let known = artifact("model", &[&bytes], false);
    (bytes, known)
});

#[derive(Debug, Clone)]
enum Op {
    Claim {
        who: usize,
        from: u64,
        to: u64,
    },
    Commit {
        lease: usize,
        chunk: u64,
        direct: bool,
    },
    Release {
        lease: usize,
    },
    Checkpoint {
        who: usize,
    },
    Reopen {
        who: usize,
    },
    Discard {
        who: usize,
    },
    Finish {
        who: usize,
    },
    Collect {
        who: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let who = 0..2usize;
    prop_oneof![
        4 => (who.clone(), 0..CHUNKS, 0..=CHUNKS).prop_map(|(who, from, to)| Op::Claim { who, from, to }),
        6 => (any::<usize>(), any::<u64>(), any::<bool>()).prop_map(|(lease, chunk, direct)| Op::Commit { lease, chunk, direct }),
        1 => any::<usize>().prop_map(|lease| Op::Release { lease }),
        1 => who.clone().prop_map(|who| Op::Checkpoint { who }),
        1 => who.clone().prop_map(|who| Op::Reopen { who }),
        1 => who.clone().prop_map(|who| Op::Discard { who }),
        2 => who.clone().prop_map(|who| Op::Finish { who }),
        1 => who.prop_map(|who| Op::Collect { who }),
    ]
}

#[derive(Default)]
struct Model {
    present: [bool; CHUNKS as usize],
    claimed: [bool; CHUNKS as usize],
    /// By the lease that claims it.
    written: [bool; CHUNKS as usize],
    complete: bool,
}

impl Model {
    fn release(&mut self, lease: &Lease) {
        for index in lease.chunks() {
            self.claimed[index as usize] = false;
            self.written[index as usize] = false;
        }
    }

    /// What a claim must give: the first run of absent and unclaimed chunks.
    fn claim(&self, from: u64, to: u64) -> Option<std::ops::Range<u64>> {
        let free = |&index: &u64| !self.present[index as usize] && !self.claimed[index as usize];
        let start = (from..to).find(free)?;
        let end = (start..to).find(|index| !free(index)).unwrap_or(to);
        Some(start..end)
    }
}

fn run(ops: Vec<Op>) {
    let dir = tempfile::tempdir().unwrap();
    let (bytes, known) = &*KNOWN;
    let id = known.objects[0].id;
    let digest = id.sha256().unwrap();
    let mut stores = [open(dir.path()), open(dir.path())];
    stores[0].record(known).unwrap();
    let mut partials = [0, 1].map(|who| stores[who].partial(&id, LEN as u64).unwrap());
    let mut leases: Vec<(usize, Lease)> = Vec::new();
    let mut model = Model::default();
    let mut read = [false; CHUNKS as usize];
    for op in ops {
        match op {
            Op::Claim { who, from, to } => {
                let got = partials[who].claim(from..to).unwrap();
                let expected = match model.complete {
                    true => None,
                    false => model.claim(from, to),
                };
                assert_eq!(got.as_ref().map(Lease::chunks), expected);
                if let Some(lease) = got {
                    lease
                        .chunks()
                        .for_each(|at| model.claimed[at as usize] = true);
                    leases.push((who, lease));
                }
            }
            Op::Commit {
                lease,
                chunk,
                direct,
            } if !leases.is_empty() => {
                let lease = &leases[lease % leases.len()].1;
                let run = lease.chunks();
                let index = run.start + chunk % (run.end - run.start);
                let mode = match direct {
                    true => WriteMode::Direct,
                    false => WriteMode::Cached,
                };
                let done = lease.commit(index, chunk_of(bytes, index), mode);
                // Once per lease, even where it was discarded since.
                assert_eq!(done.is_ok(), !model.written[index as usize]);
                if done.is_ok() {
                    model.present[index as usize] = true;
                    model.written[index as usize] = true;
                }
            }
            Op::Release { lease } if !leases.is_empty() => {
                let (_, lease) = leases.swap_remove(lease % leases.len());
                model.release(&lease);
            }
            Op::Commit { .. } | Op::Release { .. } => {}
            Op::Checkpoint { who } => partials[who].checkpoint().unwrap(),
            Op::Reopen { who } => {
                for (_, lease) in leases.extract_if(.., |(owner, _)| *owner == who) {
                    model.release(&lease);
                }
                if !model.complete {
                    stores[who] = open(dir.path());
                    partials[who] = stores[who].partial(&id, LEN as u64).unwrap();
                }
            }
            Op::Discard { who } => {
                let discarded = partials[who].discard(partials[who].generation());
                assert_eq!(discarded.is_ok(), !model.complete);
                if !model.complete {
                    model.present = [false; CHUNKS as usize];
                }
            }
            Op::Finish { who } => {
                let finished = partials[who].finish(digest, partials[who].generation());
                let all = model.present.iter().all(|present| *present);
                assert_eq!(finished.is_ok(), all || model.complete, "{finished:?}");
                model.complete |= all;
            }
            Op::Collect { who } => {
                stores[who].collect(&CollectOptions::default()).unwrap();
            }
        }
        let fresh: Vec<bool> = model
            .present
            .iter()
            .zip(read)
            .map(|(p, r)| *p && !r)
            .collect();
        read = model.present;
        for (store, partial) in stores.iter().zip(&partials) {
            assert_eq!(store.complete(&id).unwrap().is_some(), model.complete);
            assert_eq!(partial.completed().unwrap().is_some(), model.complete);
            for index in 0..CHUNKS {
                assert_eq!(partial.present(index), model.present[index as usize]);
                if fresh[index as usize] {
                    let mut found = vec![0; chunk_of(bytes, index).len()];
                    partial.read_at(&mut found, index * CHUNK_SIZE).unwrap();
                    assert!(found == chunk_of(bytes, index), "wrong chunk {index}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn an_object_behaves_as_its_model(ops in prop::collection::vec(op(), 1..40)) {
        run(ops);
    }
}

#[test]
fn a_lease_survives_a_discard() {
    run(vec![
        Op::Claim {
            who: 0,
            from: 0,
            to: 3,
        },
        Op::Commit {
            lease: 0,
            chunk: 0,
            direct: false,
        },
        Op::Discard { who: 1 },
        Op::Claim {
            who: 1,
            from: 0,
            to: CHUNKS,
        },
        Op::Commit {
            lease: 0,
            chunk: 0,
            direct: true,
        },
    ]);
}
