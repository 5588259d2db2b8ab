//! What the database's clock shows, as far as this daemon can tell without asking: the bound for commands that arrive
//! late, and how a step of that clock is noticed.
//!
//! A command that a stalled connection delivers minutes later must change nothing: the lease that it asks for may have
//! come and gone meanwhile. So each command carries a limit on the database's clock. The limit needs no more than a
//! rough estimate: one that is wrong makes the database refuse the command, and the daemon looks at the clock again.
//!
//! Whatever the database says of its time was true at some instant between sending the command and receiving the reply,
//! on this host's boot clock. Each such reading bounds the difference between the two clocks. Readings that no drift can
//! reconcile mean that one of the clocks has been set, or that another node with another clock is the primary now.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mongodb::bson::{DateTime, Document, doc};
use tokio::time::Instant;

use crate::boot_instant::BootInstant;
use crate::lease::{Timestamp, millis};

/// A command does nothing when it reaches the database later than this after it was sent.
const LATE_AFTER: Duration = Duration::from_secs(10);
/// Clocks may run apart by one part in so many: 500 ppm, which is more than `ntpd` lets a clock drift.
const DRIFT: u32 = 2000;
/// Between two log lines about steps.
const QUIET: Duration = Duration::from_secs(60);

/// What the database's clock shows at an instant of the boot clock, between two bounds in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Estimate {
    at: BootInstant,
    earliest: i64,
    latest: i64,
}

impl Estimate {
    /// `time` was shown after `sent` and before `received`.
    fn of(time: Timestamp, sent: BootInstant, received: BootInstant) -> Self {
        let travelled = received - sent;
        // What is shown is cut to whole milliseconds.
        Self {
            at: received,
            earliest: time.0,
            latest: time.0.saturating_add(millis(travelled)).saturating_add(1),
        }
    }

    /// What it comes to at `at`, if that is later.
    fn advanced(self, at: BootInstant) -> Self {
        let passed = at - self.at;
        let drift = if passed.is_zero() { 0 } else { millis(passed / DRIFT) + 1 };
        Self {
            at: self.at.max(at),
            earliest: self.earliest.saturating_add(millis(passed) - drift),
            latest: self.latest.saturating_add(millis(passed)).saturating_add(drift),
        }
    }

    /// By how much no instant fits both, and what fits both or else the later of them alone.
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

/// The database's clock, seen from here.
#[derive(Debug, Default)]
pub(super) struct StoreClock {
    estimate: Mutex<Option<Estimate>>,
    steps: AtomicU64,
    warned_at: Mutex<Option<Instant>>,
}

impl StoreClock {
    /// Learns that the database's clock showed `time` at an instant between `sent` and `received`. Clocks that have come
    /// apart by more than `grace` since the last reading count as a step.
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
                "the clock of MongoDB's primary was set, or that of this host, by more than --grace: leases may have \
                 ended early or late; keep the clocks of all nodes in step"
            );
        }
    }

    /// How many steps there were.
    pub(super) fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// The instant after which a command that is sent now is to change nothing; `None` before the first reading.
    pub(super) fn limit(&self) -> Option<Limit> {
        let estimate = (*self.estimate())?.advanced(BootInstant::now());
        Some(Limit(Timestamp(estimate.latest) + LATE_AFTER))
    }

    /// Believes that the clock is ahead by `by` of what it was thought to show, or behind.
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
    /// The stage that has the server refuse the command, whole, when it is late. The server reads its clock once for a
    /// command, so the first document that would be changed decides for all.
    ///
    /// The number that it fails to read is made of the record's key: of a constant the server would see as it parses the
    /// stage that it is none. In time, the stage comes to nothing before the first record is read.
    ///
    /// On a sharded cluster the router reads its clock for the shards. So the limit bounds how late a command reaches the
    /// router; from there on the cluster's own time limits do (`maxTimeMS`).
    pub(super) fn stage(self) -> Document {
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

    /// Readings of a clock: what it showed, when it was asked and when it had answered.
    fn steps(readings: &[(i64, u64, u64)]) -> u64 {
        let (clock, start) = (StoreClock::default(), BootInstant::now());
        for (time, sent, received) in readings {
            let [sent, received] = [sent, received].map(|millis| start + Duration::from_millis(*millis));
            clock.observe(Timestamp(START + time), sent, received, GRACE);
        }
        clock.steps()
    }

    #[test]
    fn a_clock_that_keeps_its_pace_makes_no_step() {
        assert_eq!(steps(&[(0, 0, 2), (1000, 1000, 1003), (61_000, 61_000, 61_001)]), 0);
        // A day without a reading, at 400 ppm.
        assert_eq!(steps(&[(0, 0, 2), (86_400_000 + 34_560, 86_400_000, 86_400_001)]), 0);
        // An answer that took minutes says little.
        assert_eq!(steps(&[(0, 0, 2), (1000, 1000, 300_000), (300_500, 300_400, 300_500)]), 0);
        // Answers that overtake each other.
        assert_eq!(steps(&[(5000, 5000, 5002), (1000, 1000, 1200), (5010, 5009, 5012)]), 0);
    }

    #[test]
    fn a_step_either_way_counts_once_and_less_than_the_grace_does_not() {
        assert_eq!(steps(&[(0, 0, 2), (61_000, 1000, 1002), (62_000, 2000, 2002)]), 1);
        assert_eq!(steps(&[(0, 0, 2), (-59_000, 1000, 1002), (-58_000, 2000, 2002)]), 1);
        assert_eq!(steps(&[(0, 0, 2), (1900, 1000, 1002), (2900, 2000, 2002)]), 0);
    }

    #[test]
    fn a_limit_lies_ten_seconds_ahead_of_the_latest_that_it_may_be() {
        let clock = StoreClock::default();
        assert!(clock.limit().is_none());
        let now = BootInstant::now();
        clock.observe(Timestamp(START), now, now, GRACE);
        let limit = clock.limit().expect("a reading").0.0 - START;
        assert!((10_000..60_000).contains(&limit), "{limit}");
    }
}
