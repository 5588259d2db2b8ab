//! The engine's metrics: grants, touches, losses and waits. Nothing in the engine depends on them.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;

use super::{Acquired, CallError, Touched};
use crate::lease::Reason;
use crate::metrics::registry::{GaugeGuard, Histogram, MetricsRegistry};

/// Bucket bounds in microseconds, from a coalesced touch to a short outage of the store.
const ACK_BOUNDS: [u64; 15] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 10_000_000,
];
/// Bucket bounds in microseconds, from a handoff between two holders to the longest wait.
const WAIT_BOUNDS: [u64; 13] = [
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

/// The metrics of one engine. For what each of them counts, see its help text in [`Self::new`].
#[derive(Debug)]
pub(crate) struct EngineMetrics {
    /// Grants at once, and grants after a wait.
    grants: [Counter; 2],
    takeovers: Counter,
    pub(super) releases: Counter,
    revocations: Counter,
    /// By [`Source`].
    touches: [Counter; SOURCES.len()],
    /// By reason.
    losses: [Counter; LOSSES.len()],
    pub(super) tracked: Gauge,
    pub(super) orphaned: Counter,
    pub(super) refused: Counter,
    /// By [`Source`].
    acks: [Histogram; SOURCES.len()],
    waiting: Gauge,
    /// By [`WaitEnd`].
    waits: [Counter; WAIT_ENDS.len()],
    wait_durations: Histogram,
    pub(super) gaps: Counter,
}

/// Where the answer to a touch comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The commit of this touch.
    Store,
    /// The commit of an earlier touch. This one was coalesced.
    Coalesced,
}

/// The values of the label `source`, in the order of [`Source`]. The published value `memory` means
/// a coalesced touch.
const SOURCES: [&str; 2] = ["store", "memory"];
/// The values of the label `reason`, in the order of [`Tally::lost`].
const LOSSES: [&str; 4] = ["released", "displaced", "revoked", "unknown"];

/// How the wait for a lease ends.
#[derive(Debug, Clone, Copy)]
enum WaitEnd {
    Granted,
    /// The call's `wait` was over.
    Expired,
    /// The id had ended or was in use, or the queue was full.
    Lost,
    Failed,
    Drained,
    /// The caller cancelled the call.
    Abandoned,
}

/// The values of the label `outcome`, in the order of [`WaitEnd`].
const WAIT_ENDS: [&str; 6] = ["granted", "expired", "lost", "failed", "drained", "abandoned"];

impl EngineMetrics {
    pub(super) fn new(registry: &mut MetricsRegistry) -> Self {
        let grants = ("leased_grants", "Grants reported to callers");
        let touches = ("leased_touches", "Touches acknowledged, by where the answer came from");
        let losses = ("leased_losses_told", "Losses reported to holders, by how the lease was lost");
        let waits = ("leased_waits", "Waits for a lease that are over, by how they ended");
        let acks = (
            "leased_keepalive_ack_duration_seconds",
            "Time from reading a keepalive message to handing over its answer",
        );
        Self {
            grants: registry.by_label(grants, "waited", ["false", "true"], Counter::default),
            takeovers: registry
                .counter("leased_takeovers", "Grants that displaced a holder whose lease had lapsed"),
            releases: registry.counter("leased_releases", "Releases answered as done"),
            revocations: registry.counter(
                "leased_revocations",
                "Leases that Revoke took away, and min_hold blocks that it ended",
            ),
            touches: registry.by_label(touches, "source", SOURCES, Counter::default),
            losses: registry.by_label(losses, "reason", LOSSES, Counter::default),
            tracked: registry.gauge("leased_carried_leases", "Held leases that keepalive streams track"),
            orphaned: registry.counter("leased_orphaned_leases", "Held leases whose stream ended first"),
            refused: registry
                .counter("leased_leases_refused", "Leases that streams named and the daemon had no room for"),
            acks: registry.by_label(acks, "source", SOURCES, || Histogram::of_durations(&ACK_BOUNDS)),
            waiting: registry.gauge("leased_waiting_calls", "Calls that wait for a lease"),
            waits: registry.by_label(waits, "outcome", WAIT_ENDS, Counter::default),
            wait_durations: registry.metric(
                "leased_wait_duration_seconds",
                "How long calls waited before they were granted a lease",
                Histogram::of_durations(&WAIT_BOUNDS),
            ),
            gaps: registry
                .counter("leased_feed_gaps", "Times that changes by other daemons may have been missed"),
        }
    }

    /// Counts the answer to an acquire.
    pub(super) fn answered(&self, answer: &Acquired) {
        if let Acquired::Granted(grant) = answer {
            self.grants[usize::from(grant.waited)].inc();
            self.takeovers.inc_by(grant.took_over.into());
        }
    }

    /// Counts leases and blocks that a revocation ended.
    pub(super) fn revoked(&self, leases: usize) {
        self.revocations.inc_by(leases.try_into().unwrap_or(u64::MAX));
    }

    /// Counts a call as waiting until the returned value is dropped.
    pub(super) fn begin_wait(&self) -> Wait<'_> {
        Wait {
            metrics: self,
            began_at: Instant::now(),
            end: WaitEnd::Abandoned,
            _waiting: GaugeGuard::one_more(&self.waiting),
        }
    }

    /// Counts the answer to a keepalive message.
    pub(crate) fn acked(&self, source: Source, duration: Duration) {
        self.acks[source as usize].observe_duration(duration);
    }

    /// Adds counts of answers and losses that were sent to holders.
    pub(super) fn add(&self, tally: &Tally) {
        let both = self.touches.iter().zip(tally.touches).chain(self.losses.iter().zip(tally.losses));
        // Most messages change one counter. Adding 0 to the others would also be an atomic write.
        for (counter, count) in both.filter(|(_, count)| *count > 0) {
            counter.inc_by(count);
        }
    }
}

#[cfg(test)]
impl Default for EngineMetrics {
    fn default() -> Self {
        Self::new(&mut MetricsRegistry::default())
    }
}

/// Counts of answers and losses that are sent to holders, before they are added to the metrics.
#[derive(Debug, Default)]
pub(super) struct Tally {
    touches: [u64; SOURCES.len()],
    losses: [u64; LOSSES.len()],
}

impl Tally {
    /// Returns the counts of an answer whose touches were all coalesced.
    pub(super) fn coalesced(touches: usize) -> Self {
        let mut tally = Self::default();
        tally.touches[Source::Coalesced as usize] = touches as u64;
        tally
    }

    pub(super) fn add(&mut self, touched: Touched, source: Source) {
        match touched {
            Touched::Kept(_) => self.touches[source as usize] += 1,
            Touched::Lost(reason) => self.lost(reason),
            // The store's own metrics count its failures.
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

/// A waiting call. If it is dropped without [`Self::end`], the caller has cancelled the call.
#[derive(Debug)]
pub(super) struct Wait<'a> {
    metrics: &'a EngineMetrics,
    began_at: Instant,
    end: WaitEnd,
    _waiting: GaugeGuard,
}

impl Wait<'_> {
    /// Ends the wait with the call's answer.
    pub(super) fn end(mut self, answer: &Result<Acquired, CallError>) {
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
        self.metrics.waits[self.end as usize].inc();
        if matches!(self.end, WaitEnd::Granted) {
            self.metrics.wait_durations.observe_duration(self.began_at.elapsed());
        }
    }
}
