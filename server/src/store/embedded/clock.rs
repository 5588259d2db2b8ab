//! The clock of the embedded store: the host's, which never goes back and never stands still.
//!
//! A host's clock may be set back, while the daemon runs or while it does not. Leases would last longer by as much,
//! and after a purge a token could be granted twice. So the clock goes on from the latest instant it has shown, at
//! the pace of the monotonic clock, until the host's clock is ahead of that again. The store keeps the latest instant
//! with every commit and hands it over at the next start.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use crate::lease::Timestamp;

/// A host's clock that is further behind was set back, or ahead before.
const NOTABLE: Duration = Duration::from_secs(1);

/// Shows instants that never go back.
#[derive(Debug)]
pub(super) struct Clock {
    /// The latest time shown, since the Unix epoch, and when it was shown.
    latest: (Duration, Instant),
    #[cfg(test)]
    set: Option<Timestamp>,
}

impl Clock {
    /// Goes on from `latest`, the last instant that an earlier clock is known to have shown.
    pub(super) fn after(latest: Timestamp) -> Self {
        let latest = Duration::from_millis(u64::try_from(latest.0).unwrap_or(0));
        let behind = latest.saturating_sub(host_time());
        if behind > NOTABLE {
            tracing::warn!(
                ?behind,
                "the host's clock is behind the latest commit; the store's clock goes on from that"
            );
        }
        Self {
            latest: (latest, Instant::now()),
            #[cfg(test)]
            set: None,
        }
    }

    /// The time now.
    pub(super) fn now(&mut self) -> Timestamp {
        #[cfg(test)]
        if let Some(set) = self.set {
            return set;
        }
        self.show(host_time(), Instant::now())
    }

    /// Stops the clock at `now`, also if that is earlier.
    #[cfg(test)]
    pub(super) fn set(&mut self, now: Timestamp) {
        self.set = Some(now);
    }

    fn show(&mut self, host: Duration, at: Instant) -> Timestamp {
        let (time, then) = self.latest;
        let time = host.max(time + (at - then));
        self.latest = (time, at);
        Timestamp(i64::try_from(time.as_millis()).unwrap_or(i64::MAX))
    }
}

/// What the host says that the time is, since the Unix epoch.
#[expect(
    clippy::disallowed_methods,
    reason = "with the embedded store the host's clock is the store's clock"
)]
fn host_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn it_follows_the_host() {
        let mut clock = Clock::after(Timestamp(0));
        let start = Instant::now();
        assert_eq!(clock.show(seconds(1000), start), Timestamp(1_000_000));
        assert_eq!(clock.show(seconds(1001), start + seconds(1)), Timestamp(1_001_000));
        assert_eq!(clock.show(seconds(5000), start + seconds(2)), Timestamp(5_000_000), "forwards at once");
    }

    #[test]
    fn it_goes_on_at_its_pace_when_the_host_is_set_back() {
        let mut clock = Clock::after(Timestamp(0));
        let start = Instant::now();
        clock.show(seconds(1000), start);
        assert_eq!(clock.show(seconds(400), start + seconds(1)), Timestamp(1_001_000));
        assert_eq!(clock.show(seconds(405), start + seconds(6)), Timestamp(1_006_000));
        assert_eq!(clock.show(seconds(1008), start + seconds(7)), Timestamp(1_008_000), "and follows again");
    }

    #[test]
    fn it_goes_on_from_where_an_earlier_one_was() {
        let mut clock = Clock::after(Timestamp(2_000_000));
        let start = clock.latest.1;
        assert_eq!(clock.show(seconds(1000), start + seconds(3)), Timestamp(2_003_000));
    }

    #[test]
    fn it_shows_the_time() {
        let shown = Clock::after(Timestamp(0)).now();
        let host = i64::try_from(host_time().as_millis()).expect("a time");
        assert!(shown.0 <= host && host - shown.0 < 60_000, "{shown:?} at {host}");
    }
}
