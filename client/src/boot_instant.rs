//! The holder's clock: tokio's, plus the time for which the machine was suspended.
//!
//! A laptop that sleeps, or a virtual machine that its own kernel suspends, stops the monotonic
//! clock that timers run on. Its leases lapse all the same. On Linux and Android the difference
//! between `CLOCK_BOOTTIME` and `CLOCK_MONOTONIC` is the time spent suspended. On other systems
//! suspended time is not counted.
//!
//! Tests that pause tokio's clock leave suspended time out, because it is read from the real
//! machine. Otherwise a thread that is preempted between the readings of the two clocks would let
//! real time into a paused clock.

use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// The longest timer. Timers stop while the machine is suspended, so a sleep lasts at most this
/// much too long.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// The longest duration that is added to an instant. Adding to an `Instant` panics on overflow, and
/// neither a daemon's answer nor a caller's `Duration::MAX` may cause that.
const FAR: Duration = Duration::from_secs(60 * 60 * 24 * 365 * 30);
/// The two clocks are not read at the same instant, so the suspended time may seem to grow, by less
/// than this. No suspension is that short.
const READING: Duration = Duration::from_millis(1);

/// Whether suspended time counts. The unit tests of this crate run on a paused clock.
static COUNTS_SUSPENSION: AtomicBool = AtomicBool::new(!cfg!(test));
/// The longest suspended time read so far, in nanoseconds.
static SUSPENDED: AtomicU64 = AtomicU64::new(0);

/// Leaves suspended time out from now on, in this process: for tests in simulated time.
#[doc(hidden)]
pub fn run_on_timers_alone() {
    COUNTS_SUSPENSION.store(false, Ordering::Relaxed);
}

/// Returns `instant` plus `duration`, of which no more than [`FAR`] counts.
pub(crate) fn after(instant: Instant, duration: Duration) -> Instant {
    instant.checked_add(duration.min(FAR)).unwrap_or(instant)
}

/// A point in time on the holder's clock. Only the difference of two means anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BootInstant(Instant);

impl BootInstant {
    pub(crate) fn now() -> Self {
        Self(after(Instant::now(), suspended()))
    }

    /// The time until this instant; zero if it is past.
    pub(crate) fn remaining(self) -> Duration {
        self - Self::now()
    }

    /// Sleeps until this instant.
    pub(crate) async fn reached(self) {
        loop {
            let remaining = self.remaining();
            if remaining.is_zero() {
                return;
            }
            sleep(remaining.min(LONGEST_SLEEP)).await;
        }
    }
}

impl Add<Duration> for BootInstant {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(after(self.0, duration))
    }
}

impl Sub for BootInstant {
    type Output = Duration;

    /// Zero if `earlier` is not earlier.
    fn sub(self, earlier: Self) -> Duration {
        self.0.saturating_duration_since(earlier.0)
    }
}

/// How long the machine has been suspended since it was started.
fn suspended() -> Duration {
    if !COUNTS_SUSPENSION.load(Ordering::Relaxed) {
        return Duration::ZERO;
    }
    let longest = Duration::from_nanos(SUSPENDED.load(Ordering::Relaxed));
    let read = read_suspended();
    if read <= longest + READING {
        return longest;
    }
    SUSPENDED.fetch_max(read.as_nanos().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    read
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn read_suspended() -> Duration {
    use rustix::time::{ClockId, clock_gettime};
    let read = |clock| Duration::try_from(clock_gettime(clock)).unwrap_or_default();
    let total = read(ClockId::Boottime);
    // The monotonic clock is read last: a preemption between the two readings makes the result too
    // small and never too large.
    total.saturating_sub(read(ClockId::Monotonic))
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn read_suspended() -> Duration {
    Duration::ZERO
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_instant_is_reached_when_its_time_has_come() {
        let start = Instant::now();
        (BootInstant::now() + Duration::from_millis(3500)).reached().await;
        let passed = start.elapsed();
        assert!((Duration::from_millis(3500)..Duration::from_millis(3600)).contains(&passed), "{passed:?}");
    }

    #[test]
    fn the_time_since_a_later_instant_is_zero() {
        let earlier = BootInstant::now();
        assert_eq!(earlier - (earlier + Duration::from_secs(1)), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_paused_clock_does_not_move_however_long_the_test_is_kept_from_running() {
        let start = BootInstant::now();
        for _ in 0..200 {
            // Real time passes, and threads are preempted.
            std::thread::yield_now();
            assert_eq!(BootInstant::now(), start);
        }
    }

    #[test]
    fn no_sum_overflows() {
        let now = BootInstant::now();
        assert!(now + Duration::MAX > now + Duration::from_secs(60 * 60 * 24 * 365));
        assert!(now + Duration::MAX + Duration::MAX + Duration::from_nanos(1) > now);
    }
}
