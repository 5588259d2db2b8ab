//! Limits the rate of a keepalive stream, and lets it burst: the generic cell rate algorithm (ITU-T
//! I.371), as a delay.

use std::time::Duration;

use tokio::time::Instant;

/// How many seconds' worth of messages a stream may send at once before some of them share a
/// commit.
pub(super) const BURST: u32 = 4;

/// The rate limit of one stream.
#[derive(Debug)]
pub(super) struct RateLimiter {
    /// The time that one message takes at the exact rate.
    interval: Duration,
    /// When the last message so far would be due, if all came at the exact rate.
    due: Instant,
}

impl RateLimiter {
    /// `rate`: messages a second, at least one.
    pub(super) fn new(rate: u32) -> Self {
        Self { interval: Duration::from_secs(1) / rate, due: Instant::now() }
    }

    /// When the next message, or group of messages, may be committed.
    pub(super) fn ready_at(&self) -> Instant {
        self.due.checked_sub(Duration::from_secs(BURST.into())).unwrap_or(self.due)
    }

    /// Counts a message or group that is committed now.
    pub(super) fn spend(&mut self) {
        // Not before now, so that an idle stream saves up no more than one burst.
        self.due = self.due.max(Instant::now()) + self.interval;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep_until;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stream_may_burst_and_is_then_held_to_its_rate() {
        let mut rate_limiter = RateLimiter::new(50);
        let start = Instant::now();
        for _ in 0..=200 {
            assert!(rate_limiter.ready_at() <= start, "a burst");
            rate_limiter.spend();
        }
        for _ in 0..100 {
            sleep_until(rate_limiter.ready_at()).await;
            rate_limiter.spend();
        }
        let passed = start.elapsed();
        assert!((Duration::from_millis(1990)..Duration::from_millis(2200)).contains(&passed), "{passed:?}");
    }
}
