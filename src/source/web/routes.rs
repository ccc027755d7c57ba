//! Remembered redirects: where another host serves an object, until the signed URL expires.
//! In memory only, bounded; holds no credentials of ours.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use tokio::sync::{Mutex as Turnstile, MutexGuard as Turn};
use url::Url;

/// Most redirects remembered.
const MAX_ROUTES: usize = 4096;
/// Objects whose first readers may ask for their redirect at the same time.
const TURNSTILES: usize = 64;
/// How long a redirect is used that does not say when it expires.
const DEFAULT_LIFE: Duration = Duration::from_secs(5 * 60);
/// Longest use of a redirect.
const MAX_LIFE: Duration = Duration::from_secs(3600);

/// Where an object really is.
#[derive(Debug, Clone)]
pub(super) struct Route {
    pub(super) url: Url,
    /// The size of the whole object, where the origin said it.
    pub(super) size: Option<u64>,
    until: Instant,
}

impl Route {
    /// A route that lives as long as the query of `url` says.
    pub(super) fn new(url: Url, size: Option<u64>) -> Self {
        let until = Instant::now() + life_of(&url, SystemTime::now());
        Self { url, size, until }
    }
}

/// The routes by URL asked for.
#[derive(Debug)]
pub(super) struct Routes {
    known: Mutex<HashMap<String, Route>>,
    turnstiles: Vec<Turnstile<()>>,
    hasher: RandomState,
}

impl Default for Routes {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            turnstiles: (0..TURNSTILES).map(|_| Turnstile::new(())).collect(),
            hasher: RandomState::new(),
        }
    }
}

impl Routes {
    /// The route that is still good.
    pub(super) fn get(&self, key: &str) -> Option<Route> {
        let known = self.known.lock();
        let route = known.get(key)?;
        (route.until > Instant::now()).then(|| route.clone())
    }

    pub(super) fn put(&self, key: String, route: Route) {
        let mut known = self.known.lock();
        if known.len() >= MAX_ROUTES && !known.contains_key(&key) {
            let now = Instant::now();
            known.retain(|_, route| route.until > now);
            if known.len() >= MAX_ROUTES {
                let first = known.iter().min_by_key(|(_, route)| route.until);
                if let Some(first) = first.map(|(key, _)| key.clone()) {
                    known.remove(&first);
                }
            }
        }
        known.insert(key, route);
    }

    /// Forgets the route, unless it leads elsewhere by now.
    pub(super) fn forget(&self, key: &str, url: &Url) {
        let mut known = self.known.lock();
        if known.get(key).is_some_and(|route| route.url == *url) {
            known.remove(key);
        }
    }

    /// Waits until nobody else asks for the route of `key` (or one of a few others).
    pub(super) async fn turn(&self, key: &str) -> Turn<'_, ()> {
        let at = self.hasher.hash_one(key) as usize % TURNSTILES;
        self.turnstiles[at].lock().await
    }
}

/// How long `url` may be used from `now`: what its signature says less a margin, so that a request
/// never starts with a dying URL.
fn life_of(url: &Url, now: SystemTime) -> Duration {
    let mut life = None;
    for (name, value) in url.query_pairs() {
        let Ok(number) = value.parse::<u64>() else {
            continue;
        };
        // SigV4 of S3 and GCS count from the moment of signing, which was just now; CloudFront,
        // S3 v2 and GCS v2 name the moment itself.
        let found = match &*name {
            "X-Amz-Expires" | "X-Goog-Expires" => Duration::from_secs(number),
            "Expires" => {
                let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
                Duration::from_secs(number).saturating_sub(now)
            }
            _ => continue,
        };
        life = Some(life.map_or(found, |life: Duration| life.min(found)));
    }
    let life = life.unwrap_or(DEFAULT_LIFE).min(MAX_LIFE);
    life - (life / 10).min(Duration::from_secs(30))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn signatures_say_how_long_they_live() {
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        let life = |text| life_of(&url(text), now).as_secs();
        assert_eq!(life("https://h/x"), 270);
        assert_eq!(life("https://h/x?X-Amz-Expires=100"), 90);
        assert_eq!(life("https://h/x?X-Amz-Expires=99999999"), 3570);
        assert_eq!(life("https://h/x?Expires=1100&X-Amz-Expires=900"), 90);
        assert_eq!(life("https://h/x?Expires=900"), 0);
        assert_eq!(life("https://h/x?Expires=soon"), 270);
    }

    #[test]
    fn routes_are_bounded_and_forgotten() {
        let routes = Routes::default();
        for i in 0..MAX_ROUTES + 10 {
            routes.put(i.to_string(), Route::new(url("https://h/x"), None));
        }
        assert_eq!(routes.known.lock().len(), MAX_ROUTES);
        let last = (MAX_ROUTES + 9).to_string();
        routes.forget(&last, &url("https://h/other"));
        assert!(routes.get(&last).is_some());
        routes.forget(&last, &url("https://h/x"));
        assert!(routes.get(&last).is_none());
        routes.put(last.clone(), Route::new(url("https://h/x?Expires=1"), None));
        assert!(routes.get(&last).is_none(), "an expired route is no route");
    }
}
