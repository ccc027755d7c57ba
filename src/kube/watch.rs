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

use std::{borrow::Cow, collections::VecDeque, fmt, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt as _, stream, stream::BoxStream};
use kube::{
    Api, Client, Resource,
    api::{ListParams, Request, VersionMatch, WatchEvent, WatchParams},
    core::Status,
};
use serde::{
    Deserialize, Deserializer,
    de::{
        DeserializeOwned, DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
    },
};
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
    follow_as(api, selection, serde_json::from_value::<K>)
}

/// As [`follow`], of what `read` makes of each object: of tens of thousands no more than that is kept at a time.
pub fn follow_as<K, T>(
    api: Api<K>,
    selection: Selection,
    read: impl Fn(Value) -> serde_json::Result<T> + Send + Sync + 'static,
) -> impl Stream<Item = Event<T>> + Send
where
    K: Resource,
    T: Send + 'static,
{
    let follower = Follower {
        url: api.resource_url().into(),
        client: api.into_client(),
        selection,
        read: Arc::new(read),
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
    url: Arc<str>,
    selection: Selection,
    read: Read<K>,
    state: State<K>,
    failures: Failures,
    relist: Option<Instant>,
}

/// What makes something of an object.
type Read<K> = Arc<dyn Fn(Value) -> serde_json::Result<K> + Send + Sync>;

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

impl<K: Send + 'static> Follower<K> {
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
        let request = Request::new(&*self.url).list(&params);
        let request = request.map_err(kube::Error::BuildRequest)?;
        // There may be tens of thousands of objects.
        let listed = self.client.request_text(request);
        let listed = tokio::time::timeout(REQUEST * 4, listed).await;
        let text = listed.map_err(|_| kube::Error::Service("no list came in time".into()))??;
        let (url, read) = (Arc::clone(&self.url), Arc::clone(&self.read));
        let reading = tokio::task::spawn_blocking(move || {
            let items = Items {
                url: &url,
                read: &*read,
            };
            List { items }.deserialize(&mut serde_json::Deserializer::from_str(&text))
        });
        let read = reading.await.map_err(|e| kube::Error::Service(e.into()))?;
        let (metadata, items) = read.map_err(kube::Error::SerdeError)?;
        let version = metadata.resource_version;
        let more = Some(metadata.continue_).filter(|token| !token.is_empty());
        if more.is_none() && version.is_empty() {
            let missing = "the list has no resource version";
            return Err(kube::Error::Service(missing.into()));
        }
        Ok(State::Page {
            items,
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
            let request = Request::new(&*self.url).watch(&params, &version);
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
                    if self.failed(&error).await == Verdict::Relist {
                        return None;
                    }
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

    fn read(&self, value: Value) -> Option<K> {
        read_one(&self.url, &*self.read, value)
    }

    /// Notes a failure, and waits as long as that means.
    async fn failed(&mut self, error: &kube::Error) -> Verdict {
        metrics::global().kube_watch_failures.add(1);
        let (verdict, wait) = self.failures.note(error, Instant::now());
        let url = &*self.url;
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

/// What `read` makes of `value`. An object that is not understood is left out, so that the others can be followed.
fn read_one<K>(
    url: &str,
    read: &dyn Fn(Value) -> serde_json::Result<K>,
    value: Value,
) -> Option<K> {
    let name = format!(
        "{}/{}",
        value["metadata"]["namespace"].as_str().unwrap_or_default(),
        value["metadata"]["name"].as_str().unwrap_or_default()
    );
    match read(value) {
        Ok(object) => Some(object),
        Err(error) => {
            tracing::warn!(url, name, %error, "an object is not understood");
            None
        }
    }
}

/// Reads a list, one object at a time: they are much larger than what is made of them.
struct List<'a, K> {
    items: Items<'a, K>,
}

struct Items<'a, K> {
    url: &'a str,
    read: &'a dyn Fn(Value) -> serde_json::Result<K>,
}

impl<'de, K> DeserializeSeed<'de> for List<'_, K> {
    type Value = (ListMeta, VecDeque<K>);

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de, K> Visitor<'de> for List<'_, K> {
    type Value = (ListMeta, VecDeque<K>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut metadata, mut items) = (None, None);
        while let Some(name) = map.next_key::<Cow<'de, str>>()? {
            match &*name {
                "metadata" => metadata = Some(map.next_value()?),
                "items" => {
                    let Items { url, read } = self.items;
                    items = Some(map.next_value_seed(Items { url, read })?);
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        let metadata = metadata.ok_or_else(|| A::Error::missing_field("metadata"))?;
        let items = items.ok_or_else(|| A::Error::missing_field("items"))?;
        Ok((metadata, items))
    }
}

impl<'de, K> DeserializeSeed<'de> for Items<'_, K> {
    type Value = VecDeque<K>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de, K> Visitor<'de> for Items<'_, K> {
    type Value = VecDeque<K>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Self::Value, A::Error> {
        let mut items = VecDeque::new();
        while let Some(value) = from.next_element()? {
            items.extend(read_one(self.url, self.read, value));
        }
        Ok(items)
    }
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
    fn of_a_list_no_object_is_kept_whole() {
        use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
        let read_so_far = AtomicUsize::new(0);
        let read = |value: Value| {
            read_so_far.fetch_add(1, SeqCst);
            serde_json::from_value::<u32>(value["n"].clone())
        };
        // It is cut off: what came before was made something of as it came.
        let text = r#"{"kind": "L", "items": [{"n": 1}, {"n": "x"}, {"n": 3}, {"#;
        let parse = |text: &str| {
            let items = Items {
                url: "u",
                read: &read,
            };
            List { items }.deserialize(&mut serde_json::Deserializer::from_str(text))
        };
        parse(text).map(drop).unwrap_err();
        assert_eq!(read_so_far.load(SeqCst), 3);
        let whole = r#"{"items": [{"n": 1}, {"n": "x"}], "metadata": {"resourceVersion": "7", "continue": "c"}}"#;
        let (metadata, items) = parse(whole).unwrap();
        assert_eq!(
            (metadata.resource_version.as_str(), &*metadata.continue_),
            ("7", "c")
        );
        assert_eq!(items, [1]);
        for wrong in ["{}", "[]", r#"{"items": []}"#, r#"{"metadata": {}}"#] {
            parse(wrong).map(drop).unwrap_err();
        }
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
