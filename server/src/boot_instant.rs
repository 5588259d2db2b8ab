//! The boot clock, which keeps running while the machine is suspended.
//!
//! The monotonic clock, on which timers and `tokio::time::Instant` run, stops while a virtual
//! machine is paused or a host sleeps. Leases lapse nevertheless. So the age of a touch is measured
//! on this clock.
//!
//! On Linux and Android the difference between `CLOCK_BOOTTIME` and `CLOCK_MONOTONIC` is the time
//! spent suspended. On other systems this clock does not count suspension.

use std::ops::Sub;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

/// An instant of the boot clock. Only the difference between two of them has a meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BootInstant(Instant);

impl BootInstant {
    /// Returns the present instant.
    pub(crate) fn now() -> Self {
        // Built on tokio's clock, so that it pauses and advances with the runtime of a test.
        Self(Instant::now() + suspended())
    }
}

#[cfg(test)]
impl std::ops::Add<Duration> for BootInstant {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0 + duration)
    }
}

impl Sub for BootInstant {
    type Output = Duration;

    /// Returns the time from `earlier` to `self`, or zero if `earlier` is later.
    fn sub(self, earlier: Self) -> Duration {
        self.0.saturating_duration_since(earlier.0)
    }
}

/// Returns how long the machine has been up. Includes suspension on Linux and Android.
pub(crate) fn since_boot() -> Duration {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    const CLOCK: ClockId = ClockId::Boottime;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const CLOCK: ClockId = ClockId::Monotonic;
    read(CLOCK)
}

fn read(clock: ClockId) -> Duration {
    // Only a negative reading would fail, and these clocks start at zero.
    Duration::try_from(clock_gettime(clock)).unwrap_or_default()
}

/// Returns how long the machine has been suspended since its boot.
#[cfg(all(not(test), any(target_os = "linux", target_os = "android")))]
fn suspended() -> Duration {
    use std::sync::atomic::{AtomicU64, Ordering};

    static LONGEST: AtomicU64 = AtomicU64::new(0);
    let total = since_boot();
    // The monotonic clock is read last, so that a pause between the two reads makes the difference
    // too small and never too large. Suspension only grows, so the largest difference seen so far
    // is the most exact one. It also keeps this clock from going back.
    let seen = total.saturating_sub(read(ClockId::Monotonic));
    let seen = u64::try_from(seen.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(LONGEST.fetch_max(seen, Ordering::Relaxed).max(seen))
}

#[cfg(all(not(test), not(any(target_os = "linux", target_os = "android"))))]
fn suspended() -> Duration {
    Duration::ZERO
}

#[cfg(test)]
pub(crate) use for_tests::suspend;
#[cfg(test)]
use for_tests::suspended;

/// Simulated suspension for tests, separate for each thread.
#[cfg(test)]
mod for_tests {
    use std::cell::Cell;
    use std::time::Duration;

    thread_local! {
        static SUSPENDED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    pub(super) fn suspended() -> Duration {
        SUSPENDED.get()
    }

    /// Simulates a suspension of the machine. For tests on one thread.
    pub(crate) fn suspend(duration: Duration) {
        SUSPENDED.set(SUSPENDED.get() + duration);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_clock_counts_time_and_suspension() {
        let start = BootInstant::now();
        assert_eq!(BootInstant::now() - start, Duration::ZERO, "a paused clock stands still");
        tokio::time::advance(Duration::from_secs(2)).await;
        suspend(Duration::from_secs(30));
        assert_eq!(BootInstant::now() - start, Duration::from_secs(32));
        assert_eq!(start - BootInstant::now(), Duration::ZERO, "never below zero");
    }
}
