//! What the engine counts: grants, touches, losses, waits. It decides nothing.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;

use super::{Acquired, CallError, Touched};
use crate::lease::Reason;
use crate::metrics::registry::{Histogram, Meter, Present};

/// From an answer out of memory to a store that is away for a while, in microseconds.
const ACKS: [u64; 15] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 10_000_000,
];
/// From a handoff to the longest wait, in microseconds.
const WAITS: [u64; 13] = [
    1_000,
    10_000,
    50_000,
    100_000,
    500_000,
    1_000_000,
    5_000_000,
    10_000_000,
    30_000_000,
    60_000_000,
    300_000_000,
    900_000_000,
    3_600_000_000,
];

/// The counters of an engine.
#[derive(Debug)]
pub(crate) struct Counts {
    /// At once, and after a wait.
    grants: [Counter; 2],
    takeovers: Counter,
    pub(super) releases: Counter,
    revocations: Counter,
    /// By source.
    touches: [Counter; SOURCES.len()],
    losses: [Counter; LOSSES.len()],
    pub(super) carried: Gauge,
    pub(super) orphaned: Counter,
    /// Leases that streams named and that the daemon had no room for.
    pub(super) refused: Counter,
    /// By source.
    acks: [Histogram; SOURCES.len()],
    waiting: Gauge,
    waits: [Counter; WAIT_ENDS.len()],
    wait_durations: Histogram,
    pub(super) gaps: Counter,
}

/// Where the answer to a touch comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A commit.
    Store,
    /// A commit a moment ago.
    Memory,
}

const SOURCES: [&str; 2] = ["store", "memory"];
const LOSSES: [&str; 4] = ["released", "displaced", "revoked", "unknown"];

/// How a wait in line ends.
#[derive(Debug, Clone, Copy)]
enum WaitEnd {
    Granted,
    Expired,
    Lost,
    Failed,
    Drained,
    Abandoned,
}

const WAIT_ENDS: [&str; 6] = ["granted", "expired", "lost", "failed", "drained", "abandoned"];

impl Counts {
    pub(super) fn new(meter: &mut Meter) -> Self {
        let grants = ("leased_grants", "Leases granted, as told to callers");
        let touches = ("leased_touches", "Touches acknowledged, by what the answer was taken from");
        let losses = ("leased_losses_told", "Losses told to holders, by how the lease went");
        let waits = ("leased_waits", "Waits in line that are over, by how they ended");
        let acks = (
            "leased_keepalive_ack_duration_seconds",
            "From when a keepalive message was read until its answer was handed over",
        );
        Self {
            grants: meter.by(grants, "waited", ["false", "true"], Counter::default),
            takeovers: meter
                .counter("leased_takeovers", "Grants that displaced a holder whose time was over"),
            releases: meter.counter("leased_releases", "Leases given back"),
            revocations: meter.counter(
                "leased_revocations",
                "Leases taken away, and min_hold blocks ended, by an operator",
            ),
            touches: meter.by(touches, "source", SOURCES, Counter::default),
            losses: meter.by(losses, "reason", LOSSES, Counter::default),
            carried: meter.gauge("leased_carried_leases", "Held leases that streams carry"),
            orphaned: meter.counter("leased_orphaned_leases", "Held leases whose stream ended before them"),
            refused: meter.counter(
                "leased_leases_refused",
                "Leases of keepalive messages that were refused for want of room in the daemon",
            ),
            acks: meter.by(acks, "source", SOURCES, || Histogram::of_durations(&ACKS)),
            waiting: meter.gauge("leased_waiting_calls", "Calls that stand in line"),
            waits: meter.by(waits, "outcome", WAIT_ENDS, Counter::default),
            wait_durations: meter.metric(
                "leased_wait_duration_seconds",
                "How long those stood in line who were granted a lease",
                Histogram::of_durations(&WAITS),
            ),
            gaps: meter.counter("leased_feed_gaps", "Times that changes by others may have been missed"),
        }
    }

    /// A call has its answer.
    pub(super) fn answered(&self, answer: &Acquired) {
        if let Acquired::Granted(grant) = answer {
            self.grants[usize::from(grant.waited)].inc();
            self.takeovers.inc_by(grant.took_over.into());
        }
    }

    /// An operator has taken so many leases away.
    pub(super) fn revoked(&self, leases: usize) {
        self.revocations.inc_by(leases.try_into().unwrap_or(u64::MAX));
    }

    /// A call begins to stand in line.
    pub(super) fn wait(&self) -> Wait<'_> {
        Wait {
            counts: self,
            began_at: Instant::now(),
            end: WaitEnd::Abandoned,
            _standing: Present::of(&self.waiting),
        }
    }

    /// A keepalive message has been answered.
    pub(crate) fn acked(&self, source: Source, took: Duration) {
        self.acks[source as usize].took(took);
    }

    /// Holders have been told.
    pub(super) fn told(&self, tally: &Tally) {
        let both = self.touches.iter().zip(tally.touches).chain(self.losses.iter().zip(tally.losses));
        // Most messages are about one of these, and leave the others alone.
        for (counter, count) in both.filter(|(_, count)| *count > 0) {
            counter.inc_by(count);
        }
    }
}

#[cfg(test)]
impl Default for Counts {
    fn default() -> Self {
        Self::new(&mut Meter::default())
    }
}

/// What holders are told in one go.
#[derive(Debug, Default)]
pub(super) struct Tally {
    touches: [u64; SOURCES.len()],
    losses: [u64; LOSSES.len()],
}

impl Tally {
    pub(super) fn add(&mut self, touched: Touched, source: Source) {
        match touched {
            Touched::Kept(_) => self.touches[source as usize] += 1,
            Touched::Lost(reason) => self.lost(reason),
            // The store's failures are counted where it is asked.
            Touched::Unreadable => {}
        }
    }

    pub(super) fn lost(&mut self, reason: Option<Reason>) {
        let position = match reason {
            Some(Reason::Released | Reason::Withdrawn | Reason::Settled) => 0,
            Some(Reason::Displaced) => 1,
            Some(Reason::Revoked) => 2,
            None => 3,
        };
        self.losses[position] += 1;
    }
}

/// A call that stands in line. If it is dropped before it has an answer the caller has gone.
#[derive(Debug)]
pub(super) struct Wait<'a> {
    counts: &'a Counts,
    began_at: Instant,
    end: WaitEnd,
    _standing: Present,
}

impl Wait<'_> {
    pub(super) fn over(mut self, answer: &Result<Acquired, CallError>) {
        self.end = match answer {
            Ok(Acquired::Granted(_)) => WaitEnd::Granted,
            Ok(Acquired::Held(_)) => WaitEnd::Expired,
            Ok(Acquired::QueueFull | Acquired::Lost(_) | Acquired::IdReused) => WaitEnd::Lost,
            Err(CallError::ShuttingDown) => WaitEnd::Drained,
            Err(_) => WaitEnd::Failed,
        };
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.counts.waits[self.end as usize].inc();
        if matches!(self.end, WaitEnd::Granted) {
            self.counts.wait_durations.took(self.began_at.elapsed());
        }
    }
}
