//! Metrics around any store: the size and duration of batches, and failures.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    Committed, FeedEvent, FeedState, ForKey, ListQuery, Outcome, Page, StartError, Store, StoreError, report,
};
use crate::lease::{Edit, Key, Rules, Snapshot};
use crate::metrics::registry::{GaugeGuard, Histogram, MetricsRegistry};

/// Bucket bounds up to the most keys of a batch.
const KEYS: [u64; 10] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000];
/// Bucket bounds in microseconds, from a sync of a fast disk to the deadline of a batch.
const DURATIONS: [u64; 14] = [
    250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    5_000_000,
];

/// A store that counts what the store inside does.
#[derive(Debug)]
pub(crate) struct Instrumented<S> {
    store: S,
    batches: Gauge,
    keys: Histogram,
    durations: Histogram,
    purged: Counter,
    /// By operation and kind.
    errors: [[Counter; KINDS.len()]; OPERATIONS.len()],
}

/// A method of a store, as a label.
#[derive(Debug, Clone, Copy)]
enum Operation {
    Commit,
    Read,
    List,
    Purge,
    Check,
}

const OPERATIONS: [&str; 5] = ["commit", "read", "list", "purge", "check"];
const KINDS: [&str; 4] = ["not_applied", "unknown", "refused", "unreadable"];

impl<S: Store> Instrumented<S> {
    /// Wraps `store` and registers its metrics.
    pub(crate) fn new(store: S, registry: &mut MetricsRegistry) -> Self {
        let name = store.name();
        let in_flight = ("leased_batches_in_flight", "Batches that the store has not answered yet");
        let [batches] = registry.by(in_flight, "store", [name], Gauge::default);
        let keys = ("leased_batch_keys", "Keys in a batch");
        let [keys] = registry.by(keys, "store", [name], || Histogram::of_counts(&KEYS));
        let durations =
            ("leased_batch_duration_seconds", "How long the store took for a batch, repetitions included");
        let [durations] = registry.by(durations, "store", [name], || Histogram::of_durations(&DURATIONS));
        let purged = ("leased_keys_purged", "Keys forgotten because they had long been free or lapsed");
        let [purged] = registry.by(purged, "store", [name], Counter::default);
        let labels = OPERATIONS
            .map(|operation| KINDS.map(|kind| [("store", name), ("operation", operation), ("kind", kind)]));
        let errors = ("leased_store_errors", "What the store did not do, by what is known of the outcome");
        let errors = registry.table(errors, labels, Counter::default);
        Self { store, batches, keys, durations, purged, errors }
    }

    fn note<T>(&self, operation: Operation, answer: Result<T, StoreError>) -> Result<T, StoreError> {
        answer.inspect_err(|error| self.count(operation, error))
    }

    /// Counts the failures of single keys.
    fn note_each(&self, operation: Operation, records: &[ForKey]) {
        for error in records.iter().filter_map(|record| record.as_ref().err()) {
            self.count(operation, error);
        }
    }

    /// Counts a failure. Logs those about single records, up to a rate.
    fn count(&self, operation: Operation, error: &StoreError) {
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

impl<S: Store> Store for Instrumented<S> {
    async fn commit(
        &self,
        batch: Arc<Vec<(Key, Edit)>>,
        deadline: Duration,
    ) -> Result<Committed, StoreError> {
        self.keys.observe_count(batch.len());
        let _in_flight = GaugeGuard::one_more(&self.batches);
        let sent_at = Instant::now();
        let answer = self.store.commit(batch, deadline).await;
        self.durations.observe_duration(sent_at.elapsed());
        let committed = self.note(Operation::Commit, answer)?;
        self.note_each(Operation::Commit, &committed.records);
        Ok(committed)
    }

    fn batches(&self) -> usize {
        self.store.batches()
    }

    async fn read(&self, keys: Vec<Key>) -> Result<Vec<ForKey>, StoreError> {
        let records = self.note(Operation::Read, self.store.read(keys).await)?;
        self.note_each(Operation::Read, &records);
        Ok(records)
    }

    async fn inspect(&self, key: Key) -> Result<Option<Snapshot>, StoreError> {
        self.note(Operation::Read, self.store.inspect(key).await)
    }

    async fn list(&self, query: ListQuery) -> Result<Page, StoreError> {
        self.note(Operation::List, self.store.list(query).await)
    }

    async fn purge(&self, free_for: Duration) -> Result<u64, StoreError> {
        let purged = self.note(Operation::Purge, self.store.purge(free_for).await)?;
        self.purged.inc_by(purged);
        Ok(purged)
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.note(Operation::Check, self.store.check().await)
    }

    fn id(&self) -> Uuid {
        self.store.id()
    }

    async fn join(&self) -> Result<(), StartError> {
        self.store.join().await
    }

    async fn objection(&self) -> String {
        self.store.objection().await
    }

    async fn leave(&self) {
        self.store.leave().await;
    }

    fn rules(&self) -> Rules {
        self.store.rules()
    }

    fn name(&self) -> &'static str {
        self.store.name()
    }

    fn repetitions(&self) -> u64 {
        self.store.repetitions()
    }

    fn clock_steps(&self) -> u64 {
        self.store.clock_steps()
    }

    async fn feed(&self, events: mpsc::Sender<FeedEvent>, draining: CancellationToken) {
        self.store.feed(events, draining).await;
    }

    fn feed_state(&self) -> FeedState {
        self.store.feed_state()
    }

    fn is_shared(&self) -> bool {
        self.store.is_shared()
    }
}
