//! How often the daemon polls the keys for which its calls wait. The more calls wait, the less
//! often it polls.

use std::ops::Range;
use std::time::Duration;

use crate::store::Store;

/// The time between two polls of a key, in milliseconds. Even if the feed fails, a release that
/// another daemon committed is noticed within two seconds, with 200 ms for the store to answer.
const POLL_MILLIS: Range<u64> = 1000..1800;
/// Above this many polls a second the intervals grow with the number of calls, up to the longest
/// time between refreshes. Without that, 20,000 waiting calls loaded MongoDB so much that takeovers
/// took twice as long.
const POLLS_PER_SECOND: usize = 5000;

/// The intervals at which one daemon polls and refreshes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PollInterval {
    /// How long a waiter's entry lasts without a refresh.
    waiter_ttl: Duration,
    /// Whether other daemons change records too.
    is_shared: bool,
}

impl PollInterval {
    pub(crate) fn of(store: &impl Store) -> Self {
        Self { waiter_ttl: store.rules().waiter_ttl, is_shared: store.is_shared() }
    }

    /// The time between two refreshes of a waiter's entry while this many calls wait.
    pub(crate) fn refresh(self, calls: usize) -> Duration {
        let crowd = Duration::from_secs((calls / POLLS_PER_SECOND) as u64);
        // At most three tenths of its TTL, so that an entry outlasts two refreshes that fail.
        crowd.clamp(self.waiter_ttl / 5, self.waiter_ttl * 3 / 10)
    }

    /// The time until the next poll of a key while this many calls wait. A poll is a refresh if one
    /// is due.
    pub(crate) fn poll(self, calls: usize) -> Duration {
        let refresh = self.refresh(calls);
        // Without other daemons there is nothing to find out, so every poll is a refresh.
        if !self.is_shared {
            return refresh;
        }
        let poll = Duration::from_millis(fastrand::u64(POLL_MILLIS));
        let crowd = u32::try_from((calls / POLLS_PER_SECOND).max(1)).unwrap_or(u32::MAX);
        poll.saturating_mul(crowd).min(refresh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAITER_TTL: Duration = Duration::from_secs(15);
    const SHARED: PollInterval = PollInterval { waiter_ttl: WAITER_TTL, is_shared: true };

    #[test]
    fn few_calls_are_polled_often() {
        for calls in [1, 100, 5000] {
            assert_eq!(SHARED.refresh(calls), Duration::from_secs(3));
            assert!(SHARED.poll(calls) < Duration::from_millis(1800));
        }
    }

    #[test]
    fn many_calls_are_polled_less_often_and_keep_their_entries() {
        for calls in [25_000, 50_000, usize::MAX] {
            assert_eq!(SHARED.refresh(calls), Duration::from_millis(4500));
            assert_eq!(SHARED.poll(calls), Duration::from_millis(4500), "each poll is a refresh");
        }
    }

    #[test]
    fn a_daemon_that_is_alone_on_its_store_only_refreshes() {
        let alone = PollInterval { is_shared: false, ..SHARED };
        assert_eq!(alone.poll(1), Duration::from_secs(3));
    }
}
