use serde_json::{Value, json};

use super::*;

fn node() -> NodeView {
    NodeView {
        name: "n1".into(),
        ready: true,
        ..NodeView::default()
    }
}

fn warmup(uid: &str, generation: i64, spec: Value, status: Value) -> Arc<Warmup> {
    let warmup = json!({
        "metadata": { "name": uid, "namespace": "d", "uid": uid, "generation": generation },
        "spec": spec,
        "status": status,
    });
    Arc::new(serde_json::from_value(warmup).unwrap())
}

fn simple(reference: &str) -> Value {
    json!({ "references": [reference], "maxParallelNodes": 0 })
}

fn state(board: &Board) -> Vec<WarmState> {
    board.entries().iter().map(|entry| entry.state).collect()
}

fn failed() -> WarmError {
    WarmError {
        reason: "Denied",
        message: "no".into(),
    }
}

#[test]
fn it_is_warmed_edited_and_let_go() {
    let (mut board, now) = (Board::default(), Instant::now());
    let first = warmup("u", 1, simple("hf://o/a"), Value::Null);
    let steps = board.sync(&node(), [&first].into_iter(), &[], now);
    assert!(matches!(&steps[..], [Step::Start(work)] if work.references.len() == 1));
    assert_eq!(state(&board), [WarmState::Warming]);
    assert!(
        board
            .sync(&node(), [&first].into_iter(), &[], now)
            .is_empty()
    );
    // Edited under way: what it did before counts no more.
    let second = warmup("u", 2, simple("hf://o/b"), Value::Null);
    let steps = board.sync(&node(), [&second].into_iter(), &[], now);
    let keep = vec!["hf://o/b".parse().unwrap()];
    assert!(
        matches!(&steps[..], [Step::Cancel(_), Step::Release { keep: k, .. }, Step::Start(_)] if *k == keep)
    );
    board.finished("u", 1, Ok(()), now);
    assert_eq!(state(&board), [WarmState::Warming]);
    board.finished("u", 2, Ok(()), now);
    assert_eq!(state(&board), [WarmState::Warm]);
    // What is gone from the store is brought again.
    board.compare(&[]);
    assert_eq!(state(&board), [WarmState::Waiting]);
    let steps = board.sync(&node(), [].into_iter(), &[], now);
    assert_eq!(
        steps,
        [Step::Release {
            uid: "u".into(),
            keep: vec![]
        }]
    );
    assert!(board.entries().is_empty());
}

#[test]
fn it_waits_for_its_turn_and_for_the_word_of_this_generation() {
    let (mut board, now) = (Board::default(), Instant::now());
    let spec = json!({ "references": ["hf://o/a"] });
    let at = place("u", "n1");
    let mut see = |generation: i64, first: &str, last: &str| {
        let status =
            json!({ "observedGeneration": generation, "window": { "first": first, "last": last } });
        let warmup = warmup("u", 2, spec.clone(), status);
        board.sync(&node(), [&warmup].into_iter(), &[], now)
    };
    assert!(see(1, "0000000000000000", "ffffffffffffffff").is_empty());
    assert!(see(2, "0000000000000000", "0000000000000000").is_empty());
    assert!(matches!(&see(2, &at, &at)[..], [Step::Start(_)]));
    // Once it has started, the window may be elsewhere.
    assert!(see(2, "0000000000000000", "0000000000000000").is_empty());
    assert_eq!(state(&board), [WarmState::Warming]);
}

#[test]
fn a_new_process_goes_on_where_the_old_one_was() {
    let now = Instant::now();
    let waiting = warmup("u", 1, json!({ "references": ["hf://o/a"] }), Value::Null);
    let once = warmup(
        "u",
        1,
        json!({ "references": ["hf://o/a"], "pin": false }),
        Value::Null,
    );
    let was = |state| WarmupOnNode {
        uid: "u".into(),
        generation: 1,
        state,
        ..WarmupOnNode::default()
    };
    let mut board = Board::default();
    let steps = board.sync(
        &node(),
        [&waiting].into_iter(),
        &[was(WarmState::Warming)],
        now,
    );
    assert!(matches!(&steps[..], [Step::Start(_)]));
    let mut board = Board::default();
    let steps = board.sync(
        &node(),
        [&waiting].into_iter(),
        &[was(WarmState::Warm)],
        now,
    );
    assert!(matches!(&steps[..], [Step::Check(_)]));
    board.checked("u", 1, false);
    assert_eq!(state(&board), [WarmState::Waiting]);
    let mut board = Board::default();
    assert!(
        board
            .sync(&node(), [&once].into_iter(), &[was(WarmState::Warm)], now)
            .is_empty()
    );
    assert_eq!(state(&board), [WarmState::Warm]);
    let mut board = Board::default();
    assert!(
        board
            .sync(
                &node(),
                [&waiting].into_iter(),
                &[was(WarmState::Failed)],
                now
            )
            .is_empty()
    );
}

#[test]
fn what_an_earlier_process_said_is_believed_once() {
    let (mut board, now) = (Board::default(), Instant::now());
    let spec = json!({ "references": ["hf://o/a"], "pin": false, "maxParallelNodes": 0 });
    let once = warmup("u", 1, spec, Value::Null);
    let was = [WarmupOnNode {
        uid: "u".into(),
        generation: 1,
        state: WarmState::Warm,
        ..WarmupOnNode::default()
    }];
    assert_eq!(board.sync(&node(), [&once].into_iter(), &was, now), []);
    assert_eq!(state(&board), [WarmState::Warm]);
    // The node was not selected for a while, and what was there may be gone.
    board.sync(&node(), [].into_iter(), &was, now);
    let steps = board.sync(&node(), [&once].into_iter(), &was, now);
    assert!(matches!(&steps[..], [Step::Start(_)]));
}

#[test]
fn failures_are_tried_again_later_and_mistakes_are_not() {
    let (mut board, now) = (Board::default(), Instant::now());
    let right = warmup("u", 1, simple("hf://o/a"), Value::Null);
    let wrong = warmup("w", 1, simple("file:///etc"), Value::Null);
    let sync = |board: &mut Board, now| board.sync(&node(), [&right, &wrong].into_iter(), &[], now);
    assert_eq!(sync(&mut board, now).len(), 1);
    assert_eq!(state(&board), [WarmState::Warming, WarmState::Failed]);
    assert_eq!(board.entries()[1].reason, "InvalidReference");
    board.finished("u", 1, Err(failed()), now);
    assert_eq!(board.next_try(), Some(now + FIRST_PAUSE));
    assert!(sync(&mut board, now).is_empty());
    assert_eq!(sync(&mut board, now + FIRST_PAUSE).len(), 1);
    for _ in 0..40 {
        board.finished("u", 1, Err(failed()), now);
        sync(&mut board, now + LONGEST_PAUSE);
    }
    board.finished("u", 1, Err(failed()), now);
    assert_eq!(board.next_try(), Some(now + LONGEST_PAUSE));
    assert_eq!(board.next_try().is_some(), !board.is_busy());
}

#[test]
fn the_most_important_go_first_and_few_at_once() {
    let (mut board, now) = (Board::default(), Instant::now());
    let count = MAX_WARMUPS + 72;
    let mut many: Vec<_> = (0..count)
        .map(|n| {
            let mut spec = simple("hf://o/a");
            spec["priority"] = json!(n);
            warmup(&format!("u{n:03}"), 1, spec, Value::Null)
        })
        .collect();
    let started = |steps: &[Step]| -> Vec<String> {
        let started = steps.iter().filter_map(|step| match step {
            Step::Start(work) => Some(work.uid.clone()),
            Step::Check(_) => None,
            step => panic!("{step:?}: nobody has let go of anything"),
        });
        started.collect()
    };
    let mut steps = board.sync(&node(), many.iter(), &[], now);
    assert_eq!(started(&steps), ["u199", "u198", "u197", "u196"]);
    assert_eq!(board.entries().len(), count);
    // Old ones that are warm are in nobody's way, however many they are, and keep their pins.
    let mut done = 0;
    loop {
        let begun = started(&steps);
        if begun.is_empty() {
            break;
        }
        for uid in begun {
            board.finished(&uid, 1, Ok(()), now);
            done += 1;
        }
        steps = board.sync(&node(), many.iter(), &[], now);
    }
    assert_eq!(done, count);
    let mut spec = simple("hf://o/new");
    spec["priority"] = json!(-100);
    many.push(warmup("new", 1, spec, Value::Null));
    assert_eq!(
        started(&board.sync(&node(), many.iter(), &[], now)),
        ["new"]
    );
    assert_eq!(board.entries()[0].uid, "new");
    // What holds the node back is reported whatever there is to do.
    let gate = json!({ "references": ["hf://o/g"], "maxParallelNodes": 0, "startupGate": true, "priority": -100 });
    many.push(warmup("gate", 1, gate, Value::Null));
    assert_eq!(
        started(&board.sync(&node(), many.iter(), &[], now)),
        ["gate"]
    );
    board.finished("gate", 1, Ok(()), now);
    assert_eq!(board.entries()[0].uid, "gate");
}

#[test]
fn how_many_nodes_it_is_for_is_not_the_nodes_business() {
    let (mut board, now) = (Board::default(), Instant::now());
    let with = |generation, nodes: u32| {
        let spec =
            json!({ "references": ["hf://o/a"], "maxNodes": nodes, "maxParallelNodes": nodes });
        let status =
            json!({ "observedGeneration": generation, "window": crate::kube::crd::Window::all() });
        warmup("u", generation, spec, status)
    };
    let sync = |board: &mut Board, warmup: &Arc<Warmup>| {
        board.sync(&node(), [warmup].into_iter(), &[], now)
    };
    assert!(matches!(
        &sync(&mut board, &with(1, 2))[..],
        [Step::Start(_)]
    ));
    assert_eq!(sync(&mut board, &with(2, 4)), []);
    assert_eq!(
        (board.entries()[0].generation, state(&board)),
        (2, vec![WarmState::Warming])
    );
    // What was begun for the first one is what the second one asks for.
    board.finished("u", 1, Ok(()), now);
    assert_eq!(sync(&mut board, &with(3, 8)), []);
    assert_eq!(
        (board.entries()[0].generation, state(&board)),
        (3, vec![WarmState::Warm])
    );
}
