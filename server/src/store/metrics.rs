//! The metrics of a store: the size and duration of batches, and failures.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

use super::{ForKey, Outcome, StoreError, report};
use crate::metrics::registry::{Histogram, MetricsRegistry};

/// Bucket bounds up to the largest number of keys in a batch.
const KEYS: [u64; 10] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000];
/// Bucket bounds in microseconds, from a sync of a fast disk to the deadline of a batch.
const DURATIONS: [u64; 14] = [
    250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    5_000_000,
];

/// The metrics of one store.
#[derive(Debug)]
pub(super) struct StoreMetrics {
    pub(super) batches: Gauge,
    pub(super) keys: Histogram,
    pub(super) durations: Histogram,
    pub(super) repetitions: Counter,
    pub(super) purged: Counter,
    /// Failures by operation and kind.
    errors: [[Counter; KINDS.len()]; OPERATIONS.len()],
}

/// A method of a store, as a label.
#[derive(Debug, Clone, Copy)]
pub(super) enum Operation {
    Commit,
    Read,
    List,
    Purge,
    Check,
}

const OPERATIONS: [&str; 5] = ["commit", "read", "list", "purge", "check"];
const KINDS: [&str; 4] = ["not_applied", "unknown", "refused", "unreadable"];

impl StoreMetrics {
    /// Registers the metrics of the store called `name`.
    pub(super) fn new(name: &'static str, registry: &mut MetricsRegistry) -> Self {
        let in_flight = ("leased_batches_in_flight", "Batches that the store has not answered yet");
        let [batches] = registry.by_label(in_flight, "store", [name], Gauge::default);
        let keys = ("leased_batch_keys", "Keys in a batch");
        let [keys] = registry.by_label(keys, "store", [name], || Histogram::of_counts(&KEYS));
        let durations =
            ("leased_batch_duration_seconds", "How long the store took for a batch, repetitions included");
        let [durations] =
            registry.by_label(durations, "store", [name], || Histogram::of_durations(&DURATIONS));
        let repetitions = ("leased_batch_repetitions", "Attempts at batches that failed and were repeated");
        let [repetitions] = registry.by_label(repetitions, "store", [name], Counter::default);
        let purged = ("leased_keys_purged", "Keys purged because they had long been free or lapsed");
        let [purged] = registry.by_label(purged, "store", [name], Counter::default);
        let labels = OPERATIONS
            .map(|operation| KINDS.map(|kind| [("store", name), ("operation", operation), ("kind", kind)]));
        let errors =
            ("leased_store_errors", "Failed operations of the store, by what is known of the outcome");
        let errors = registry.by_labels(errors, labels, Counter::default);
        Self { batches, keys, durations, repetitions, purged, errors }
    }

    /// Counts the failure of a whole operation, if it failed.
    pub(super) fn note<T>(
        &self,
        operation: Operation,
        answer: Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        answer.inspect_err(|error| self.count(operation, error))
    }

    /// Counts the failures of single keys.
    pub(super) fn note_each(&self, operation: Operation, records: &[ForKey]) {
        for error in records.iter().filter_map(|record| record.as_ref().err()) {
            self.count(operation, error);
        }
    }

    /// Counts a failure. Logs a failure of a single record, at a limited rate.
    fn count(&self, operation: Operation, error: &StoreError) {
        // A position in `KINDS`.
        let kind = match error {
            StoreError::Unavailable { outcome: Outcome::NotApplied, .. } => 0,
            StoreError::Unavailable { outcome: Outcome::Unknown, .. } => 1,
            StoreError::Refused { .. } => 2,
            StoreError::Unreadable { .. } => {
                report(error);
                3
            }
        };
        self.errors[operation as usize][kind].inc();
    }
}
