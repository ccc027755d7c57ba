//! Watches.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::{Response, body::Frame};
use serde_json::{Value, json};
use tokio::{sync::watch, time::Instant};

use super::{
    Change, Fake,
    answer::{Body, Failure, Path, Query, json_response},
    select::Selector,
};

/// How often who wants bookmarks gets one.
const BOOKMARK: Duration = Duration::from_secs(1);

/// One who watches.
struct Follow {
    fake: Fake,
    changed: watch::Receiver<u64>,
    path: Path,
    selector: Selector,
    queue: VecDeque<Value>,
    at: u64,
    /// Nothing more comes after the queue.
    ended: bool,
    /// Events until it is cut.
    left: Option<usize>,
    bookmarks: bool,
    marked: u64,
    until: Instant,
}

impl Fake {
    pub(super) fn watch(&self, path: Path, query: &Query) -> Result<Response<Body>, Failure> {
        let get = |name: &str| query.get(name).map(String::as_str).unwrap_or_default();
        let (fields, labels) = (get("fieldSelector"), get("labelSelector"));
        let selector = Selector::parse(&path.resource, fields, labels)
            .map_err(|why| Failure::new(400, "BadRequest", why))?;
        let initial = get("sendInitialEvents") == "true";
        let seconds = get("timeoutSeconds").parse().unwrap_or(1800);
        let asked: u64 = get("resourceVersion").parse().unwrap_or(0);
        // Before anything is looked at, so that nothing is missed.
        let changed = self.changed.subscribe();
        let state = self.state.lock();
        if initial && state.faults.no_progress {
            return Err(Failure::no_progress());
        }
        if asked > state.version {
            return Err(Failure::too_large(asked, state.version));
        }
        let mut queue = VecDeque::new();
        let (mut at, mut ended) = (state.version, false);
        if asked == 0 || initial {
            for (key, object) in &state.objects {
                if path.holds(key) && selector.matches(object) {
                    queue.push_back(json!({"type": "ADDED", "object": object}));
                }
            }
            if initial {
                let mut mark = bookmark(&path, state.version);
                let end = json!({"k8s.io/initial-events-end": "true"});
                mark["object"]["metadata"]["annotations"] = end;
                queue.push_back(mark);
            }
        } else if asked < state.oldest {
            let failure = Failure::gone(asked, state.oldest);
            if state.faults.gone_by_status {
                return Err(failure);
            }
            queue.push_back(json!({"type": "ERROR", "object": failure.status()}));
            ended = true;
        } else {
            at = asked;
        }
        let follow = Follow {
            fake: self.clone(),
            changed,
            selector,
            queue,
            at,
            ended,
            left: state.faults.cut_after,
            bookmarks: get("allowWatchBookmarks") == "true" && !state.faults.no_bookmarks,
            marked: at,
            until: Instant::now() + Duration::from_secs(seconds),
            path,
        };
        drop(state);
        let frames = stream::unfold(follow, |mut follow| async move {
            let frame = follow.next().await?;
            Some((Ok(frame), follow))
        });
        Ok(json_response(200, StreamBody::new(frames).boxed_unsync()))
    }
}

impl Follow {
    async fn next(&mut self) -> Option<Frame<Bytes>> {
        loop {
            if self.left == Some(0) {
                return None;
            }
            if let Some(event) = self.queue.pop_front() {
                self.left = self.left.map(|left| left - 1);
                let mut bytes = serde_json::to_vec(&event).unwrap();
                bytes.push(b'\n');
                self.fake.state.lock().bytes_out += bytes.len() as u64;
                return Some(Frame::data(bytes.into()));
            }
            if self.ended {
                return None;
            }
            self.collect();
            if !self.queue.is_empty() || self.ended {
                continue;
            }
            tokio::select! {
                _ = self.changed.changed() => {}
                () = tokio::time::sleep_until(self.until) => return None,
                () = tokio::time::sleep(BOOKMARK), if self.bookmarks && self.marked < self.at => {
                    self.marked = self.at;
                    self.queue.push_back(bookmark(&self.path, self.at));
                }
            }
        }
    }

    /// Queues what has changed.
    fn collect(&mut self) {
        let state = self.fake.state.lock();
        if self.at < state.oldest {
            let failure = Failure::gone(self.at, state.oldest);
            let event = json!({"type": "ERROR", "object": failure.status()});
            self.queue.push_back(event);
            self.ended = true;
            return;
        }
        for change in state.log.iter().filter(|c| c.version > self.at) {
            if change.lost || !self.path.holds(&change.key) {
                continue;
            }
            let event = event(change, &self.selector);
            if state.faults.duplicate {
                self.queue.extend(event.clone());
            }
            self.queue.extend(event);
        }
        self.at = state.version;
    }
}

/// What a change is to who selects.
fn event(change: &Change, selector: &Selector) -> Option<Value> {
    let before = change.before.as_ref().filter(|o| selector.matches(o));
    let after = change.after.as_ref().filter(|o| selector.matches(o));
    let (kind, object) = match (before, after) {
        (None, Some(after)) => ("ADDED", after),
        (Some(_), Some(after)) => ("MODIFIED", after),
        (Some(before), None) => ("DELETED", change.after.as_ref().unwrap_or(before)),
        (None, None) => return None,
    };
    let mut object = object.clone();
    object["metadata"]["resourceVersion"] = json!(change.version.to_string());
    Some(json!({"type": kind, "object": object}))
}

fn bookmark(path: &Path, version: u64) -> Value {
    json!({"type": "BOOKMARK", "object": {
        "apiVersion": path.api_version(), "kind": "Bookmark",
        "metadata": {"resourceVersion": version.to_string(), "creationTimestamp": null},
    }})
}
