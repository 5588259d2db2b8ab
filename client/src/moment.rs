//! The holder's clock: tokio's, plus the time for which the machine was suspended.
//!
//! A laptop that sleeps, or a virtual machine that is frozen and thawed by its own kernel, stops the monotonic clock that
//! timers run on; its leases run out all the same. On Linux and Android the difference between `CLOCK_BOOTTIME` and
//! `CLOCK_MONOTONIC` says for how long. Elsewhere it counts as nothing.

use std::ops::{Add, Sub};
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Timers stand still while the machine is suspended, so none is longer than this: the rest of it is then all that may
/// be slept too much.
const NAP: Duration = Duration::from_secs(1);

/// A point in the holder's time. Only the difference of two means anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(Instant);

impl Moment {
    pub(crate) fn now() -> Self {
        Self(Instant::now() + suspended())
    }

    /// How long until then; nothing if it is past.
    pub(crate) fn remaining(self) -> Duration {
        self - Self::now()
    }

    /// Sleeps until then.
    pub(crate) async fn reached(self) {
        loop {
            let remaining = self.remaining();
            if remaining.is_zero() {
                return;
            }
            sleep(remaining.min(NAP)).await;
        }
    }
}

impl Add<Duration> for Moment {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0 + duration)
    }
}

impl Sub for Moment {
    type Output = Duration;

    /// Nothing if `earlier` is not earlier.
    fn sub(self, earlier: Self) -> Duration {
        self.0.saturating_duration_since(earlier.0)
    }
}

/// For how long the machine has been suspended since it was started.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn suspended() -> Duration {
    use rustix::time::{ClockId, clock_gettime};
    let read = |clock| Duration::try_from(clock_gettime(clock)).unwrap_or_default();
    let total = read(ClockId::Boottime);
    // Read last: on a machine that was never suspended the difference is then nothing at all, and never a little more.
    total.saturating_sub(read(ClockId::Monotonic))
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn suspended() -> Duration {
    Duration::ZERO
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_moment_is_reached_when_its_time_has_come() {
        let start = Instant::now();
        (Moment::now() + Duration::from_millis(3500)).reached().await;
        let passed = start.elapsed();
        assert!((Duration::from_millis(3500)..Duration::from_millis(3600)).contains(&passed), "{passed:?}");
    }

    #[test]
    fn what_is_past_does_not_count_below_nothing() {
        let earlier = Moment::now();
        assert_eq!(earlier - (earlier + Duration::from_secs(1)), Duration::ZERO);
    }
}
