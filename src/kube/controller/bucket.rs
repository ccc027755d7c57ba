//! A rate that is kept.

use std::time::{Duration, Instant};

/// So many a second, and so many at once.
#[derive(Debug)]
pub(super) struct Bucket {
    per_second: f64,
    tokens: f64,
    filled: Option<Instant>,
}

impl Bucket {
    pub(super) fn new(per_second: u32) -> Self {
        Self {
            per_second: per_second.into(),
            tokens: per_second.into(),
            filled: None,
        }
    }

    pub(super) fn take(&mut self, now: Instant) -> bool {
        let since = self
            .filled
            .map_or(Duration::ZERO, |filled| now.duration_since(filled));
        self.tokens = (self.tokens + since.as_secs_f64() * self.per_second).min(self.per_second);
        self.filled = Some(now);
        let may = self.tokens >= 1.0;
        if may {
            self.tokens -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_keeps_its_rate() {
        let mut bucket = Bucket::new(20);
        let start = Instant::now();
        let taken = (0..1000)
            .filter(|ms| bucket.take(start + Duration::from_millis(*ms)))
            .count();
        assert!((38..=41).contains(&taken), "{taken}");
    }
}
