//! Work that many ask for at once, done once for all of them.

use std::{collections::HashMap, hash::Hash, sync::Arc, time::Instant};

use parking_lot::Mutex;

/// One piece of work at a time for each key.
pub(super) struct Together<K: Eq + Hash, V>(Mutex<HashMap<K, Turns<V>>>);

type Turns<V> = Arc<tokio::sync::Mutex<Option<Done<V>>>>;

struct Done<V> {
    begun: Instant,
    value: V,
}

/// Somebody who waits for a key, or works on it: it is known as long as there is one.
struct Waiter<'a, K: Eq + Hash, V> {
    of: &'a Together<K, V>,
    key: K,
    turns: Turns<V>,
}

impl<K: Eq + Hash, V> Drop for Waiter<'_, K, V> {
    fn drop(&mut self) {
        let mut known = self.of.0.lock();
        // The map's and this one.
        if Arc::strong_count(&self.turns) == 2 {
            known.remove(&self.key);
        }
    }
}

impl<K: Eq + Hash, V> Default for Together<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash + Clone, V: Clone> Together<K, V> {
    /// What `work` comes to. Who asks while another works on `key` waits; then one of those who wait works for all of them.
    /// So nobody gets an answer that is older than the question.
    pub(super) async fn run(&self, key: K, work: impl Future<Output = V>) -> V {
        let asked = Instant::now();
        let turns = Arc::clone(self.0.lock().entry(key.clone()).or_default());
        let waiter = Waiter {
            of: self,
            key,
            turns,
        };
        let mut last = waiter.turns.lock().await;
        if let Some(done) = last.as_ref().filter(|done| done.begun >= asked) {
            return done.value.clone();
        }
        let begun = Instant::now();
        let value = work.await;
        *last = Some(Done {
            begun,
            value: value.clone(),
        });
        value
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering::SeqCst},
        time::Duration,
    };

    use futures_util::future::join_all;

    use super::*;

    #[tokio::test]
    async fn who_waits_shares_and_nobody_gets_an_old_answer() {
        let together = Together::default();
        let begun = AtomicUsize::new(0);
        let ask = |key: &'static str| {
            together.run(key, async {
                let number = begun.fetch_add(1, SeqCst) + 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
                number
            })
        };
        let answers = join_all((0..100).map(|_| ask("a"))).await;
        // The first has begun when the others ask.
        assert_eq!(answers[0], 1);
        assert!(answers[1..].iter().all(|answer| *answer == 2));
        assert_eq!(ask("a").await, 3);
        let (a, b) = tokio::join!(ask("a"), ask("b"));
        assert_ne!(a, b);
        assert!(together.0.lock().is_empty());
    }

    #[tokio::test]
    async fn who_gives_up_holds_nobody_up() {
        let together = Together::default();
        let never = together.run((), std::future::pending::<u8>());
        let late = tokio::time::timeout(Duration::from_millis(10), never).await;
        assert!(late.is_err());
        assert!(together.0.lock().is_empty());
        assert_eq!(together.run((), async { 7 }).await, 7);
    }
}
