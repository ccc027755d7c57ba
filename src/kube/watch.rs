//! Follows the objects of one kind, whatever the API server and the way to it do.
//!
//! Objects are listed at resource version 0, out of the server's own memory, and then watched. That costs etcd nothing,
//! and works where etcd cannot tell its progress ("RequestWatchProgress is disabled", "Too large resource version"). It
//! may be old: what a list lacks is not surely gone, and who must be sure asks for the object itself. `limit` is never
//! sent, since with it the server (and `kube`) leave the version out. Lists are not streamed (`sendInitialEvents`).
//!
//! A watch that ends goes on from the last version seen; one whose version is too old, or that fails repeatedly, begins
//! again with a list. From time to time everything is listed anew, so that an event that got lost is not lost for good.
//! Pauses between failures grow up to `LONGEST` and are jittered.

use std::{collections::VecDeque, time::Duration};

use futures_util::{Stream, StreamExt as _, stream, stream::BoxStream};
use kube::{
    Api, Client, Resource,
    api::{ListParams, Request, VersionMatch, WatchEvent, WatchParams},
    core::Status,
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::time::Instant;

use super::client::{REQUEST, within};
use crate::metrics;

/// Pauses after failures.
const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(30);
/// After so long without one, failures are forgotten.
const CALM: Duration = Duration::from_secs(60);
/// How long one watch lasts; a part of it is by chance.
const WATCH: Duration = Duration::from_secs(290);
/// How long a watch may say nothing at all after the server has sent a bookmark, which it does every minute.
const SILENCE: Duration = Duration::from_secs(150);
/// A watch that ends sooner has failed.
const SHORTEST: Duration = Duration::from_secs(1);
/// Failures in a row after which everything is listed.
const PATIENCE: u32 = 6;

/// What is followed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// A field selector.
    pub fields: Option<String>,
    /// A label selector.
    pub labels: Option<String>,
    /// How often everything is listed though nothing failed.
    pub relist: Option<Duration>,
}

/// What is known of the objects.
#[derive(Debug, Clone, PartialEq)]
pub enum Event<K> {
    /// A list begins.
    Listing,
    /// Is in the list.
    Found(K),
    /// The list ends. What was not in it is gone, or it was too old to have it.
    Listed,
    /// Has changed, or is new.
    Changed(K),
    /// Is gone, or not selected any more; as it was last.
    Gone(K),
}

/// Follows the objects of `api` that `selection` selects. The stream does not end, and does not fail. Objects can come
/// more than once unchanged.
pub fn follow<K>(api: Api<K>, selection: Selection) -> impl Stream<Item = Event<K>> + Send
where
    K: Resource + DeserializeOwned + Send + 'static,
{
    let follower = Follower {
        url: api.resource_url().to_owned(),
        client: api.into_client(),
        selection,
        state: State::Empty,
        failures: Failures::default(),
        relist: None,
    };
    stream::unfold(follower, |mut follower| async move {
        let event = follower.next().await;
        Some((event, follower))
    })
}

struct Follower<K> {
    client: Client,
    url: String,
    selection: Selection,
    state: State<K>,
    failures: Failures,
    relist: Option<Instant>,
}

/// Where a follower is.
enum State<K> {
    /// Nothing is known.
    Empty,
    /// In a list: what of it was not told yet, and where it goes on.
    Page {
        items: VecDeque<K>,
        more: Option<String>,
        version: String,
    },
    /// Listed; not watched.
    Known { version: String },
    /// Watched.
    Watching {
        version: String,
        stream: Watched,
        begun: Instant,
        /// Bookmarks come.
        marked: bool,
    },
}

/// What a failure means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Go on from the version.
    Resume,
    /// The version is of no use.
    Relist,
}

impl<K> Follower<K>
where
    K: DeserializeOwned + Send + 'static,
{
    async fn next(&mut self) -> Event<K> {
        loop {
            match std::mem::replace(&mut self.state, State::Empty) {
                State::Empty => match self.list(None).await {
                    Ok(page) => {
                        self.state = page;
                        metrics::global().kube_lists.add(1);
                        return Event::Listing;
                    }
                    Err(error) => drop(self.failed(&error).await),
                },
                State::Page {
                    mut items,
                    more,
                    version,
                } => match (items.pop_front(), more) {
                    (Some(item), more) => {
                        self.state = State::Page {
                            items,
                            more,
                            version,
                        };
                        return Event::Found(item);
                    }
                    (None, Some(token)) => match self.list(Some(token)).await {
                        Ok(page) => self.state = page,
                        Err(error) => drop(self.failed(&error).await),
                    },
                    (None, None) => {
                        let every = self.selection.relist;
                        self.relist = every.map(|every| Instant::now() + jitter(every));
                        self.state = State::Known { version };
                        return Event::Listed;
                    }
                },
                State::Known { version } => self.begin(version).await,
                State::Watching {
                    version,
                    stream,
                    begun,
                    marked,
                } => {
                    if let Some(event) = self.step(version, stream, begun, marked).await {
                        return event;
                    }
                }
            }
        }
    }

    /// The first page of the list, or a further one.
    async fn list(&mut self, token: Option<String>) -> kube::Result<State<K>> {
        let first = token.is_none();
        let params = ListParams {
            field_selector: self.selection.fields.clone(),
            label_selector: self.selection.labels.clone(),
            resource_version: first.then(|| "0".to_owned()),
            version_match: first.then_some(VersionMatch::NotOlderThan),
            continue_token: token,
            ..ListParams::default()
        };
        let request = Request::new(&self.url).list(&params);
        let request = request.map_err(kube::Error::BuildRequest)?;
        // There may be tens of thousands of objects.
        let listed = self.client.request::<List>(request);
        let listed = tokio::time::timeout(REQUEST * 4, listed).await;
        let list = listed.map_err(|_| kube::Error::Service("no list came in time".into()))??;
        let version = list.metadata.resource_version;
        let more = Some(list.metadata.continue_).filter(|token| !token.is_empty());
        if more.is_none() && version.is_empty() {
            let missing = "the list has no resource version";
            return Err(kube::Error::Service(missing.into()));
        }
        Ok(State::Page {
            items: list
                .items
                .into_iter()
                .filter_map(|item| self.read(item))
                .collect(),
            more,
            version,
        })
    }

    /// Begins to watch.
    async fn begin(&mut self, version: String) {
        let lasts = jitter(WATCH).as_secs().max(1);
        let params = WatchParams {
            field_selector: self.selection.fields.clone(),
            label_selector: self.selection.labels.clone(),
            timeout: u32::try_from(lasts).ok(),
            bookmarks: true,
            send_initial_events: false,
        };
        let begun = async {
            let request = Request::new(&self.url).watch(&params, &version);
            let request = request.map_err(kube::Error::BuildRequest)?;
            self.client.request_events::<Value>(request).await
        };
        match within(begun).await {
            Ok(stream) => {
                self.state = State::Watching {
                    version,
                    stream: stream.boxed(),
                    begun: Instant::now(),
                    marked: false,
                }
            }
            Err(error) => {
                if self.failed(&error).await == Verdict::Resume {
                    self.state = State::Known { version };
                }
            }
        }
    }

    /// The next event of a watch; `None` where there is none to tell.
    async fn step(
        &mut self,
        version: String,
        mut stream: Watched,
        begun: Instant,
        marked: bool,
    ) -> Option<Event<K>> {
        let silence = match marked {
            true => SILENCE,
            false => WATCH + REQUEST,
        };
        let relist = self.relist;
        let due = async {
            match relist {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let next = tokio::select! {
            next = tokio::time::timeout(silence, stream.next()) => next.unwrap_or(None),
            () = due => {
                self.relist = None;
                return None;
            }
        };
        let (event, version, marked) = match next {
            Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object))) => {
                let version = version_of(&object).unwrap_or(version);
                self.failures.worked();
                (self.read(object).map(Event::Changed), version, marked)
            }
            Some(Ok(WatchEvent::Deleted(object))) => {
                let version = version_of(&object).unwrap_or(version);
                self.failures.worked();
                (self.read(object).map(Event::Gone), version, marked)
            }
            Some(Ok(WatchEvent::Bookmark(mark))) => (None, mark.metadata.resource_version, true),
            Some(Ok(WatchEvent::Error(status))) => {
                let error = kube::Error::Api(status);
                if self.failed(&error).await == Verdict::Resume {
                    self.state = State::Known { version };
                }
                return None;
            }
            Some(Err(error)) => {
                if self.failed(&error).await == Verdict::Resume {
                    self.state = State::Known { version };
                }
                return None;
            }
            None => {
                if begun.elapsed() < SHORTEST {
                    let error = kube::Error::Service("a watch ended as soon as it began".into());
                    self.failed(&error).await;
                }
                self.state = State::Known { version };
                return None;
            }
        };
        self.state = State::Watching {
            version,
            stream,
            begun,
            marked,
        };
        event
    }

    /// The object that `value` is. One that is not understood is left out, so that the others can be followed.
    fn read(&self, value: Value) -> Option<K> {
        let name = format!(
            "{}/{}",
            value["metadata"]["namespace"].as_str().unwrap_or_default(),
            value["metadata"]["name"].as_str().unwrap_or_default()
        );
        match serde_json::from_value(value) {
            Ok(object) => Some(object),
            Err(error) => {
                tracing::warn!(url = self.url, name, %error, "an object is not understood");
                None
            }
        }
    }

    /// Notes a failure, and waits as long as that means.
    async fn failed(&mut self, error: &kube::Error) -> Verdict {
        metrics::global().kube_watch_failures.add(1);
        let (verdict, wait) = self.failures.note(error, Instant::now());
        let url = &self.url;
        match error {
            kube::Error::Api(status) if status.code == 410 => {
                tracing::debug!(url, %error, "listing again");
            }
            error => tracing::warn!(url, %error, ?wait, "the API server is asked again"),
        }
        tokio::time::sleep(wait).await;
        verdict
    }
}

type Watched = BoxStream<'static, kube::Result<WatchEvent<Value>>>;

/// A list, whatever its objects are.
#[derive(Deserialize)]
struct List {
    metadata: ListMeta,
    items: Vec<Value>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ListMeta {
    resource_version: String,
    #[serde(rename = "continue")]
    continue_: String,
}

fn version_of(object: &Value) -> Option<String> {
    let version = object["metadata"]["resourceVersion"].as_str();
    version.filter(|v| !v.is_empty()).map(str::to_owned)
}

/// Failures in a row.
#[derive(Debug, Default)]
struct Failures {
    count: u32,
    last: Option<Instant>,
}

impl Failures {
    /// Something new came: that is no loop.
    fn worked(&mut self) {
        self.count = 0;
    }

    fn note(&mut self, error: &kube::Error, now: Instant) -> (Verdict, Duration) {
        let is_calm = |last| now.saturating_duration_since(last) > CALM;
        if self.last.is_some_and(is_calm) {
            self.count = 0;
        }
        let pause = FIRST.saturating_mul(1 << self.count.min(16)).min(LONGEST);
        self.count += 1;
        let mut wait = jitter(pause);
        let mut verdict = Verdict::Resume;
        if let kube::Error::Api(status) = error {
            verdict = judge(status);
            if let Some(seconds) = retry_after(status) {
                wait = wait.max(jitter(seconds));
            }
        }
        if self.count.is_multiple_of(PATIENCE) {
            verdict = Verdict::Relist;
        }
        self.last = Some(now + wait);
        (verdict, wait)
    }
}

/// What the answer of a server means for the version that was asked for.
fn judge(status: &Status) -> Verdict {
    match status.code {
        // Too busy, or not allowed, whatever the version.
        401 | 403 | 429 | 500 | 502 | 503 => Verdict::Resume,
        _ => Verdict::Relist,
    }
}

/// How long the server wants to be left alone.
fn retry_after(status: &Status) -> Option<Duration> {
    let seconds = status.details.as_ref()?.retry_after_seconds;
    (seconds > 0).then(|| Duration::from_secs(u64::from(seconds)).min(LONGEST * 2))
}

/// Between three quarters of it and all of it.
fn jitter(time: Duration) -> Duration {
    use std::hash::{BuildHasher as _, RandomState};
    let random = RandomState::new().hash_one(0u8) % 1024;
    time.mul_f64(0.75 + random as f64 / 4096.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api(code: u16, seconds: u32) -> kube::Error {
        let mut status = Status::failure("m", "r").with_code(code);
        let details = serde_json::json!({ "retryAfterSeconds": seconds });
        status = status.with_details(serde_json::from_value(details).unwrap());
        kube::Error::Api(status.boxed())
    }

    #[test]
    fn pauses_grow_to_a_bound_and_are_forgotten() {
        let mut failures = Failures::default();
        let mut now = Instant::now();
        let mut before = Duration::ZERO;
        for turn in 0..100 {
            let (_, wait) = failures.note(&api(500, 0), now);
            assert!(wait <= LONGEST);
            assert!(wait > before || wait > LONGEST / 2, "{turn}: {wait:?}");
            before = wait;
            now += wait;
        }
        let (_, wait) = failures.note(&api(500, 0), now + CALM * 2);
        assert!(wait <= FIRST);
    }

    #[test]
    fn a_server_may_say_how_long_and_a_version_is_given_up() {
        let mut failures = Failures::default();
        let now = Instant::now();
        let (verdict, wait) = failures.note(&api(429, 7), now);
        assert_eq!(verdict, Verdict::Resume);
        assert!(wait >= Duration::from_secs(5), "{wait:?}");
        let (_, wait) = failures.note(&api(429, u32::MAX), now);
        assert!(wait <= LONGEST * 2);
        for code in [410, 504, 400, 404] {
            let (verdict, _) = Failures::default().note(&api(code, 0), now);
            assert_eq!(verdict, Verdict::Relist, "{code}");
        }
        // Whatever it is, it is not tried for ever with the same version.
        let mut failures = Failures::default();
        let verdicts = (0..PATIENCE).map(|_| failures.note(&api(500, 0), now).0);
        assert!(verdicts.into_iter().any(|v| v == Verdict::Relist));
    }
}
