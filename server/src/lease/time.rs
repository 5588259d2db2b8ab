//! Instants of the store's clock, and the TTL. Both are whole milliseconds, because a BSON date is.

use std::ops::{Add, Sub};
use std::time::Duration;

/// An instant of the store's clock, in milliseconds since the Unix epoch. Not comparable with any
/// other clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        // With a huge duration the result is the last instant, not one in the past.
        Self(self.0.saturating_add(millis(duration)))
    }
}

impl Sub for Timestamp {
    type Output = Duration;

    /// Returns the time from `earlier` to `self`, or zero if `earlier` is later.
    fn sub(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

/// How long a touch renews a lease for: whole milliseconds, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ttl(Duration);

impl Ttl {
    /// Rounds `duration` down to whole milliseconds. `None` if that is zero.
    #[must_use]
    pub const fn new(duration: Duration) -> Option<Self> {
        let whole = duration.as_millis();
        if whole == 0 || whole > i64::MAX as u128 {
            None
        } else {
            Some(Self(Duration::from_millis(whole as u64)))
        }
    }

    /// Returns the TTL as a duration.
    #[must_use]
    pub const fn get(self) -> Duration {
        self.0
    }
}

/// Returns the whole milliseconds of a duration, at most [`i64::MAX`].
pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
