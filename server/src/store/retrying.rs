//! The store as the daemon uses it: with repetition of failed batches, and with metrics.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::metrics::{Operation, StoreMetrics};
use super::{
    Committed, FeedEvent, FeedState, ForKey, ListQuery, Outcome, Page, StartError, Store, StoreError,
};
use crate::lease::{Edit, Key, Rules, Snapshot};
use crate::metrics::registry::{GaugeGuard, MetricsRegistry};

/// The pause before the first repetition of a batch. It doubles with each repetition, up to 200 ms.
const BACK_OFF: Duration = Duration::from_millis(25);

/// Wraps a store: repeats failed batches and records metrics.
#[derive(Debug)]
pub(crate) struct Retrying<S> {
    store: S,
    metrics: StoreMetrics,
}

impl<S: Store> Retrying<S> {
    /// Wraps `store` and registers its metrics.
    pub(crate) fn new(store: S, registry: &mut MetricsRegistry) -> Self {
        let metrics = StoreMetrics::new(store.name(), registry);
        Self { store, metrics }
    }
}

impl<S: Store> Store for Retrying<S> {
    async fn commit(
        &self,
        batch: Arc<Vec<(Key, Edit)>>,
        deadline: Duration,
    ) -> Result<Committed, StoreError> {
        self.metrics.keys.observe_count(batch.len());
        let _in_flight = GaugeGuard::one_more(&self.metrics.batches);
        let sent_at = Instant::now();
        let attempt = |batch, time| self.store.commit(batch, time);
        let answer = repeat(batch, deadline, &self.metrics.repetitions, attempt).await;
        self.metrics.durations.observe_duration(sent_at.elapsed());
        let committed = self.metrics.note(Operation::Commit, answer)?;
        self.metrics.note_each(Operation::Commit, &committed.records);
        Ok(committed)
    }

    fn batches(&self) -> usize {
        self.store.batches()
    }

    async fn read(&self, keys: Vec<Key>) -> Result<Vec<ForKey>, StoreError> {
        let records = self.metrics.note(Operation::Read, self.store.read(keys).await)?;
        self.metrics.note_each(Operation::Read, &records);
        Ok(records)
    }

    async fn inspect(&self, key: Key) -> Result<Option<Snapshot>, StoreError> {
        self.metrics.note(Operation::Read, self.store.inspect(key).await)
    }

    async fn list(&self, query: ListQuery) -> Result<Page, StoreError> {
        self.metrics.note(Operation::List, self.store.list(query).await)
    }

    async fn purge(&self, free_for: Duration) -> Result<u64, StoreError> {
        let purged = self.metrics.note(Operation::Purge, self.store.purge(free_for).await)?;
        self.metrics.purged.inc_by(purged);
        Ok(purged)
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.metrics.note(Operation::Check, self.store.check().await)
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

/// Repeats `attempt` until it succeeds, is refused, or `deadline` has passed, and counts the
/// repetitions. Each attempt receives the time that is left until the deadline.
///
/// From the second attempt on the edits are marked as repeated, because the commands of an earlier
/// attempt may still be under way. For this reason the outcome of the batch is unknown as soon as
/// the outcome of one attempt is.
pub(super) async fn repeat<F>(
    mut batch: Arc<Vec<(Key, Edit)>>,
    deadline: Duration,
    repetitions: &Counter,
    mut attempt: impl FnMut(Arc<Vec<(Key, Edit)>>, Duration) -> F,
) -> Result<Committed, StoreError>
where
    F: Future<Output = Result<Committed, StoreError>>,
{
    let until = Instant::now() + deadline;
    let (mut pause, mut is_repeated, mut earlier) = (BACK_OFF, false, Outcome::NotApplied);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let failed = match attempt(Arc::clone(&batch), left).await {
            Ok(committed) => return Ok(Committed { is_repeated, ..committed }),
            Err(error) => error,
        };
        let again = Instant::now() + pause;
        // Repeating does not help after a refusal. An attempt at the deadline would have no time.
        let is_final = !matches!(failed, StoreError::Unavailable { .. }) || again >= until;
        let error = failed.after(earlier);
        if is_final {
            return Err(error);
        }
        if let StoreError::Unavailable { outcome, .. } = error {
            earlier = outcome;
        }
        tracing::debug!(%error, "repeating a batch");
        repetitions.inc();
        is_repeated = true;
        let repeated = batch.iter().map(|(key, edit)| (key.clone(), edit.clone().repeated()));
        batch = Arc::new(repeated.collect());
        sleep_until(again).await;
        pause = (pause * 2).min(BACK_OFF * 8);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Mutex;

    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};

    use super::*;
    use crate::store::failure::{Effects, Failure};

    /// The reply to one command.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Reply {
        Changed,
        MatchedNone,
        NotApplied,
        Late,
        Refused,
        Unknown,
        Record,
    }

    impl Reply {
        fn may_have_changed(self) -> bool {
            matches!(self, Self::Changed | Self::Unknown | Self::Record)
        }

        fn result(self) -> Result<bool, Failure> {
            match self {
                Self::Changed => Ok(true),
                Self::MatchedNone => Ok(false),
                Self::NotApplied => Err(Failure::not_applied("not applied")),
                Self::Late => Err(Failure::Late("late".to_owned())),
                Self::Refused => Err(Failure::refused("refused")),
                Self::Unknown => Err(Failure::unknown("unknown")),
                Self::Record => Err(Failure::Record("a record".to_owned())),
            }
        }
    }

    /// Generates attempts, each with the replies to its commands. An attempt ends with the first
    /// failure.
    fn attempts() -> impl Strategy<Value = Vec<Vec<Reply>>> {
        let reply = prop::sample::select(vec![
            Reply::Changed,
            Reply::MatchedNone,
            Reply::NotApplied,
            Reply::Late,
            Reply::Refused,
            Reply::Unknown,
            Reply::Record,
        ]);
        prop::collection::vec(prop::collection::vec(reply, 1..4), 1..5)
    }

    /// Commits a batch with these attempts, after which no command reaches the store. Returns
    /// whether the batch was repeated, and the replies to its commands.
    async fn commit(attempts: Vec<Vec<Reply>>, is_noted: bool) -> (Result<bool, StoreError>, Vec<Reply>) {
        let state = Mutex::new((VecDeque::from(attempts), Vec::new()));
        let attempt = async |_, _| {
            let effects = Effects::default();
            let mut state = state.lock().expect("one at a time");
            let (attempts, seen) = &mut *state;
            for reply in attempts.pop_front().unwrap_or_else(|| vec![Reply::NotApplied]) {
                seen.push(reply);
                let result = reply.result();
                let noted = if is_noted { effects.note(result, |is_change| *is_change) } else { result };
                noted.map_err(|failure| effects.conclude(failure))?;
            }
            Ok(Committed::at_once(Vec::new()))
        };
        let repetitions = Counter::default();
        let answer = repeat(Arc::default(), Duration::from_secs(5), &repetitions, attempt).await;
        let (_, seen) = state.into_inner().expect("one at a time");
        (answer.map(|committed| committed.is_repeated), seen)
    }

    fn search(is_noted: bool) -> Result<(), String> {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().start_paused(true).build().expect("a runtime");
        let config = Config { cases: 2000, failure_persistence: None, ..Config::default() };
        let search = TestRunner::new(config).run(&attempts(), |attempts| {
            let (answer, seen) = runtime.block_on(commit(attempts, is_noted));
            let is_possible = seen.iter().any(|reply| reply.may_have_changed());
            match answer {
                Ok(is_repeated) => {
                    prop_assert_eq!(is_repeated, seen.iter().any(|reply| reply.result().is_err()))
                }
                Err(StoreError::Unavailable { outcome: Outcome::Unknown, .. }) => prop_assert!(is_possible),
                Err(error) => prop_assert!(!is_possible, "{error} after {seen:?}"),
            }
            Ok(())
        });
        search.map_err(|error| error.to_string())
    }

    #[test]
    fn a_batch_is_reported_as_not_applied_only_if_every_reply_proves_it() {
        search(true).expect("a proof");
        search(false).expect_err("it is noticed when the replies are not noted");
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_has_the_time_that_is_left_and_a_refusal_ends_the_batch() {
        const DEADLINE: Duration = Duration::from_secs(5);
        let until = Instant::now() + DEADLINE;
        let repetitions = Counter::default();
        let attempt = async |_, left| {
            assert_eq!(Instant::now() + left, until);
            // The attempts before this one may have changed something, so the refusal of this one
            // does not prove that nothing was changed.
            Err(match repetitions.get() {
                3 => StoreError::Refused { cause: "no".to_owned() },
                _ => StoreError::Unavailable { outcome: Outcome::Unknown, cause: "lost".to_owned() },
            })
        };
        let error = repeat(Arc::default(), DEADLINE, &repetitions, attempt).await.expect_err("a refusal");
        assert!(matches!(error, StoreError::Unavailable { outcome: Outcome::Unknown, .. }), "{error}");
        assert_eq!(repetitions.get(), 3, "a refused batch is not repeated");
    }
}
