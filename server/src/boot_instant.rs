//! A clock that goes on while the machine is suspended.
//!
//! A virtual machine that is paused, or a host that sleeps, stops the monotonic clock that timers and
//! `tokio::time::Instant` run on. Leases run out all the same, so how old a touch is has to be read off this clock. On
//! Linux and Android the difference between `CLOCK_BOOTTIME` and `CLOCK_MONOTONIC` is the time spent suspended.
//! Elsewhere suspension counts as nothing.

use std::ops::Sub;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

/// A point in time on the boot clock. Only the difference of two means anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BootInstant(Instant);

impl BootInstant {
    /// Built on tokio's clock, so that it pauses and advances with the runtime of a test.
    pub(crate) fn now() -> Self {
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

    /// Zero if `earlier` is not earlier.
    fn sub(self, earlier: Self) -> Duration {
        self.0.saturating_duration_since(earlier.0)
    }
}

/// How long the machine has been up, with the time that it was suspended where the system tells.
pub(crate) fn since_boot() -> Duration {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    const CLOCK: ClockId = ClockId::Boottime;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const CLOCK: ClockId = ClockId::Monotonic;
    read(CLOCK)
}

fn read(clock: ClockId) -> Duration {
    Duration::try_from(clock_gettime(clock)).unwrap_or_default()
}

/// How long the machine has been suspended since it was started.
#[cfg(all(not(test), any(target_os = "linux", target_os = "android")))]
fn suspended() -> Duration {
    use std::sync::atomic::{AtomicU64, Ordering};

    static LONGEST: AtomicU64 = AtomicU64::new(0);
    let total = since_boot();
    // Read last: a pause between the two reads makes the difference too small and never too large. Suspension only adds
    // up, so the largest difference seen is the best one, and this clock never goes back.
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

/// Suspension as tests have it: only what they ask for, each thread for itself.
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

    /// Lets the boot clock run ahead of tokio's, as a suspension of the machine does. For tests on one thread.
    pub(crate) fn suspend(duration: Duration) {
        SUSPENDED.set(SUSPENDED.get() + duration);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_clock_counts_what_passes_and_what_is_slept_through() {
        let start = BootInstant::now();
        assert_eq!(BootInstant::now() - start, Duration::ZERO, "a paused clock stands still");
        tokio::time::advance(Duration::from_secs(2)).await;
        suspend(Duration::from_secs(30));
        assert_eq!(BootInstant::now() - start, Duration::from_secs(32));
        assert_eq!(start - BootInstant::now(), Duration::ZERO, "never below nothing");
    }
}
