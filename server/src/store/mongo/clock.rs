//! Estimates the database's clock, to limit how late a command may act and to notice when a clock
//! was set.
//!
//! A stalled connection may deliver a command minutes late, when the lease that it asks for was
//! already granted and released. A late command must change nothing. So each command contains a
//! limit on the database's clock. A rough estimate suffices: if it is far behind, the database
//! refuses the command, and the daemon reads the clock again.
//!
//! A time that the database reports was true at some instant between the sending of the command and
//! the receipt of the reply, on this host's boot clock. Each such reading bounds the difference
//! between the two clocks. If drift cannot explain the difference between two readings, one of the
//! clocks was set, or a node with another clock has become the primary.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mongodb::bson::{DateTime, Document, doc};
use tokio::time::Instant;

use crate::boot_instant::BootInstant;
use crate::lease::{Timestamp, millis};

/// A command that reaches the database later than this after it was sent changes nothing.
const LATE_AFTER: Duration = Duration::from_secs(10);
/// Clocks may drift apart by one part in this many: 500 ppm, the most that `ntpd` corrects.
const DRIFT: u32 = 2000;
/// The least time between two log lines about steps.
const QUIET: Duration = Duration::from_secs(60);

/// Bounds on the database's time at an instant of the boot clock, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Estimate {
    at: BootInstant,
    earliest: i64,
    latest: i64,
}

impl Estimate {
    /// The estimate from a reading: the clock showed `time` between `sent` and `received`.
    fn of(time: Timestamp, sent: BootInstant, received: BootInstant) -> Self {
        let travelled = received - sent;
        // The database reports whole milliseconds, rounded down.
        Self {
            at: received,
            earliest: time.0,
            latest: time.0.saturating_add(millis(travelled)).saturating_add(1),
        }
    }

    /// Moves the estimate forward to `at`, with the drift since then. An earlier `at` changes
    /// nothing.
    fn advanced(self, at: BootInstant) -> Self {
        let passed = at - self.at;
        let drift = if passed.is_zero() { 0 } else { millis(passed / DRIFT) + 1 };
        Self {
            at: self.at.max(at),
            earliest: self.earliest.saturating_add(millis(passed) - drift),
            latest: self.latest.saturating_add(millis(passed)).saturating_add(drift),
        }
    }

    /// Combines the estimate with a reading. If the two overlap, returns zero and their overlap.
    /// Otherwise returns the gap between them, and the reading alone.
    fn with(self, reading: Self) -> (Duration, Self) {
        let at = self.at.max(reading.at);
        let (known, read) = (self.advanced(at), reading.advanced(at));
        let apart = (read.earliest - known.latest).max(known.earliest - read.latest);
        let both =
            Self { at, earliest: known.earliest.max(read.earliest), latest: known.latest.min(read.latest) };
        match u64::try_from(apart) {
            Ok(apart @ 1..) => (Duration::from_millis(apart), read),
            _ => (Duration::ZERO, both),
        }
    }
}

/// The database's clock, as this daemon estimates it.
#[derive(Debug, Default)]
pub(super) struct StoreClock {
    estimate: Mutex<Option<Estimate>>,
    steps: AtomicU64,
    warned_at: Mutex<Option<Instant>>,
}

impl StoreClock {
    /// Notes that the database's clock showed `time` between `sent` and `received`. Counts a step
    /// if the clocks have moved apart by more than `grace` since the latest reading.
    pub(super) fn observe(&self, time: Timestamp, sent: BootInstant, received: BootInstant, grace: Duration) {
        let reading = Estimate::of(time, sent, received);
        let apart = {
            let mut estimate = self.estimate();
            let (apart, known) = estimate.map_or((Duration::ZERO, reading), |known| known.with(reading));
            *estimate = Some(known);
            apart
        };
        if apart > grace {
            self.steps.fetch_add(1, Ordering::Relaxed);
            self.warn(apart);
        }
    }

    fn warn(&self, apart: Duration) {
        let mut warned_at = self.warned_at.lock().unwrap_or_else(PoisonError::into_inner);
        if warned_at.is_none_or(|at| at.elapsed() >= QUIET) {
            *warned_at = Some(Instant::now());
            tracing::warn!(
                ?apart,
                "the clock of MongoDB's primary or of this host was set by more than --grace: leases may have ended early \
                 or late; keep the clocks of all nodes in step"
            );
        }
    }

    /// The number of steps so far.
    pub(super) fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// The limit for a command that is sent now. `None` before the first reading.
    pub(super) fn limit(&self) -> Option<Limit> {
        let estimate = (*self.estimate())?.advanced(BootInstant::now());
        Some(Limit(Timestamp(estimate.latest) + LATE_AFTER))
    }

    /// Shifts the estimate by `by` milliseconds.
    #[cfg(test)]
    pub(super) fn shift(&self, by: i64) {
        if let Some(estimate) = &mut *self.estimate() {
            estimate.earliest += by;
            estimate.latest += by;
        }
    }

    fn estimate(&self) -> MutexGuard<'_, Option<Estimate>> {
        self.estimate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An instant of the database's clock after which a command changes nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit(Timestamp);

impl Limit {
    /// The first stage of a command. After the limit it makes the server refuse the whole command,
    /// by converting text to a number. Before the limit the stage costs nothing: the server
    /// optimizes it away before it reads the first record. The server reads its clock once for a
    /// command, so all records have the same outcome.
    ///
    /// On a sharded cluster the router's clock counts. So the limit bounds how late a command
    /// reaches the router. From there on `maxTimeMS` bounds it.
    pub(super) fn stage(self) -> Document {
        // The text contains the record's key. The server would try to convert a constant while it
        // parses the stage, and always fail.
        let late = doc! { "$gt": ["$$NOW", DateTime::from_millis(self.0.0)] };
        let refuse = doc! { "$toInt": { "$concat": ["the command came too late for ", "$_id"] } };
        doc! { "$set": { "late": { "$cond": [late, refuse, "$$REMOVE"] } } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(1);
    const START: i64 = 1_700_000_000_000;

    /// Counts the steps in readings of a clock: what it showed, when it was asked and when the
    /// answer came.
    fn steps(readings: &[(i64, u64, u64)]) -> u64 {
        let (clock, start) = (StoreClock::default(), BootInstant::now());
        for (time, sent, received) in readings {
            let [sent, received] = [sent, received].map(|millis| start + Duration::from_millis(*millis));
            clock.observe(Timestamp(START + time), sent, received, GRACE);
        }
        clock.steps()
    }

    #[test]
    fn drift_and_slow_answers_count_as_no_step() {
        assert_eq!(steps(&[(0, 0, 2), (1000, 1000, 1003), (61_000, 61_000, 61_001)]), 0);
        // A day without a reading, at 400 ppm.
        assert_eq!(steps(&[(0, 0, 2), (86_400_000 + 34_560, 86_400_000, 86_400_001)]), 0);
        // An answer that took minutes bounds the clock only loosely.
        assert_eq!(steps(&[(0, 0, 2), (1000, 1000, 300_000), (300_500, 300_400, 300_500)]), 0);
        // Answers that overtake each other.
        assert_eq!(steps(&[(5000, 5000, 5002), (1000, 1000, 1200), (5010, 5009, 5012)]), 0);
    }

    #[test]
    fn a_step_in_either_direction_counts_once_if_it_exceeds_the_grace() {
        assert_eq!(steps(&[(0, 0, 2), (61_000, 1000, 1002), (62_000, 2000, 2002)]), 1);
        assert_eq!(steps(&[(0, 0, 2), (-59_000, 1000, 1002), (-58_000, 2000, 2002)]), 1);
        assert_eq!(steps(&[(0, 0, 2), (1900, 1000, 1002), (2900, 2000, 2002)]), 0);
    }

    #[test]
    fn a_limit_lies_ten_seconds_after_the_upper_bound_of_the_estimate() {
        let clock = StoreClock::default();
        assert!(clock.limit().is_none());
        let now = BootInstant::now();
        clock.observe(Timestamp(START), now, now, GRACE);
        let limit = clock.limit().expect("a reading").0.0 - START;
        assert!((10_000..60_000).contains(&limit), "{limit}");
    }
}
