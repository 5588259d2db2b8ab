//! The holder's clock: tokio's, plus the time for which the machine was suspended.
//!
//! A laptop that sleeps, or a virtual machine that is frozen and thawed by its own kernel, stops the monotonic clock that
//! timers run on; its leases run out all the same. On Linux and Android the difference between `CLOCK_BOOTTIME` and
//! `CLOCK_MONOTONIC` says for how long. Elsewhere it counts as nothing.
//!
//! Tests pause tokio's clock. The suspended time is read from the machine, so it is left out of such tests: otherwise a thread
//! that is preempted between the two readings would let real time into a clock that stands still.

use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Timers stand still while the machine is suspended, so none is longer than this: the rest of it is then all that may
/// be slept too much.
const NAP: Duration = Duration::from_secs(1);
/// Instants further away than this are all the same. An `Instant` panics when a sum does not fit, and so may a daemon's answer
/// or a caller's `Duration::MAX` make none.
const FAR: Duration = Duration::from_secs(60 * 60 * 24 * 365 * 30);
/// Differences of the two clocks below this are how long the readings took. No suspension is so short.
const READING: Duration = Duration::from_millis(1);

/// Whether suspended time counts. The unit tests of this crate run on a paused clock.
static COUNTS_SUSPENSION: AtomicBool = AtomicBool::new(!cfg!(test));
/// How long the machine has been suspended as far as is known, in nanoseconds. Only grows.
static SUSPENDED: AtomicU64 = AtomicU64::new(0);

/// Leaves suspended time out, in this process and for good: for tests in simulated time.
#[doc(hidden)]
pub fn run_on_timers_alone() {
    COUNTS_SUSPENSION.store(false, Ordering::Relaxed);
}

/// `duration` after `instant`, or a time that never comes.
pub(crate) fn after(instant: Instant, duration: Duration) -> Instant {
    instant.checked_add(duration.min(FAR)).unwrap_or(instant)
}

/// A point in the holder's time. Only the difference of two means anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(Instant);

impl Moment {
    pub(crate) fn now() -> Self {
        Self(after(Instant::now(), suspended()))
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
        Self(after(self.0, duration))
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
fn suspended() -> Duration {
    if !COUNTS_SUSPENSION.load(Ordering::Relaxed) {
        return Duration::ZERO;
    }
    let known = Duration::from_nanos(SUSPENDED.load(Ordering::Relaxed));
    let read = read_suspended();
    if read <= known + READING {
        return known;
    }
    SUSPENDED.fetch_max(read.as_nanos().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    read
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn read_suspended() -> Duration {
    use rustix::time::{ClockId, clock_gettime};
    let read = |clock| Duration::try_from(clock_gettime(clock)).unwrap_or_default();
    let total = read(ClockId::Boottime);
    // Read last, so a preemption between the two makes the result smaller and never larger than the truth.
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

    #[tokio::test(start_paused = true)]
    async fn a_paused_clock_stands_still_however_long_the_test_is_kept_from_running() {
        let start = Moment::now();
        for _ in 0..200 {
            // Real time passes, and threads are preempted.
            std::thread::yield_now();
            assert_eq!(Moment::now(), start);
        }
    }

    #[test]
    fn no_sum_overflows() {
        let now = Moment::now();
        assert!(now + Duration::MAX > now + Duration::from_secs(60 * 60 * 24 * 365));
        assert!(now + Duration::MAX + Duration::MAX + Duration::from_nanos(1) > now);
    }
}
