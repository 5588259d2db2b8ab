//! Instants of the store's clock and the time to live, in whole milliseconds: what a BSON date can hold.

use std::ops::{Add, Sub};
use std::time::Duration;

/// An instant on the store's clock: milliseconds since the Unix epoch. Never compared with another clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(millis(duration)))
    }
}

impl Sub for Timestamp {
    type Output = Duration;

    /// The time from `earlier` to `self`, zero if it lies the other way round.
    fn sub(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

/// How long a touch lasts: at least one millisecond, in whole milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ttl(Duration);

impl Ttl {
    /// Rounds `duration` down to whole milliseconds; `None` if nothing is left.
    #[must_use]
    pub const fn new(duration: Duration) -> Option<Self> {
        let whole = duration.as_millis();
        if whole == 0 || whole > i64::MAX as u128 {
            None
        } else {
            Some(Self(Duration::from_millis(whole as u64)))
        }
    }

    /// The duration.
    #[must_use]
    pub const fn get(self) -> Duration {
        self.0
    }
}

/// Whole milliseconds of a duration; saturates.
pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
