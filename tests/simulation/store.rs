//! The store that the daemons of a simulation share: the specification (`lease::step`) over a map,
//! in simulated time. It is slow at times, and it can fail without telling whether a commit took
//! effect.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use leased::lease::{Edit, FencingToken, Key, LeaseId, Record, Rules, Snapshot, Timestamp, step};
use leased::store::{Committed, FeedEvent, FeedState, ForKey, ListQuery, Outcome, Page, Store, StoreError};
use tokio::sync::{broadcast, mpsc};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::history::{History, now};
use crate::support::ms;

/// The time of the store's clock at which a simulation begins.
const EPOCH: i64 = 1_700_000_000_000;

/// What is wrong with the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoreFault {
    None,
    /// Each commit takes up to a second.
    Slow,
    /// No call is answered, but half of the commits take effect.
    Unavailable,
}

#[derive(Clone)]
pub(crate) struct SimulatedStore {
    rules: Rules,
    /// Whether the store has a change feed.
    has_feed: bool,
    history: History,
    changes: broadcast::Sender<(Key, i64)>,
    state: Arc<Mutex<State>>,
}

struct State {
    records: BTreeMap<Key, Record>,
    fault: StoreFault,
    clock: Timestamp,
    /// The token of each acquisition that was granted.
    granted: HashMap<LeaseId, FencingToken>,
    revoked: Vec<(FencingToken, Duration)>,
    violation: Option<String>,
}

impl SimulatedStore {
    pub(crate) fn new(rules: Rules, has_feed: bool, history: History) -> Self {
        let state = State {
            records: BTreeMap::new(),
            fault: StoreFault::None,
            clock: Timestamp(EPOCH),
            granted: HashMap::new(),
            revoked: Vec::new(),
            violation: None,
        };
        Self {
            rules,
            has_feed,
            history,
            changes: broadcast::channel(64).0,
            state: Arc::new(Mutex::new(state)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn set_fault(&self, fault: StoreFault) {
        self.state().fault = fault;
    }

    /// Returns when the lease with this token was revoked.
    pub(crate) fn revoked_at(&self, token: i64) -> Option<Duration> {
        self.state().revoked.iter().find(|(revoked, _)| revoked.0 == token).map(|(_, at)| *at)
    }

    /// Returns how many waiters `key` has.
    pub(crate) fn queue_length(&self, key: &str) -> u32 {
        let state = self.state();
        let record = state.records.iter().find(|(stored, _)| stored.as_str() == key);
        record.map_or(0, |(_, record)| record.waiters.len() as u32)
    }

    /// Returns the last forbidden change of a record, if there was one.
    pub(crate) fn violation(&self) -> Option<String> {
        self.state().violation.clone()
    }

    /// Describes all records that have a holder or a waiter at the time `elapsed`.
    pub(crate) fn leftovers(&self, elapsed: Duration) -> Vec<String> {
        let now = Timestamp(EPOCH) + elapsed;
        let state = self.state();
        let left = state.records.iter().filter(|(_, record)| {
            record.holders.iter().any(|holder| now < holder.expires_at + self.rules.grace)
                || record.waiters.iter().any(|waiter| now < waiter.expires_at)
        });
        left.map(|(key, record)| format!("{}: {}", key.as_str(), shown(record))).collect()
    }

    /// Returns whether daemons learn from a change feed what the others do.
    pub(crate) fn has_feed(&self) -> bool {
        self.has_feed
    }

    fn is_unavailable(&self) -> bool {
        self.state().fault == StoreFault::Unavailable
    }

    /// Waits as long as a message to or from the store takes.
    async fn travel(&self) {
        let longest = if self.state().fault == StoreFault::Slow { 500 } else { 4 };
        sleep(ms(fastrand::u64(..=longest))).await;
    }

    fn apply(&self, batch: &[(Key, Edit)]) -> Vec<Snapshot> {
        let mut state = self.state();
        state.clock = state.clock.max(Timestamp(EPOCH) + now());
        let commit = |(key, edit): &(Key, Edit)| {
            let (snapshot, is_changed) = state.apply(key, edit, &self.rules);
            if is_changed {
                self.history.note(now(), format_args!("{}: {}", key.as_str(), shown(&snapshot.record)));
                // Sending fails if no daemon follows the feed.
                let _ = self.changes.send((key.clone(), snapshot.record.rev));
            }
            snapshot
        };
        batch.iter().map(commit).collect()
    }
}

impl State {
    fn apply(&mut self, key: &Key, edit: &Edit, rules: &Rules) -> (Snapshot, bool) {
        let now = self.clock;
        let before = match self.records.remove(key) {
            Some(before) => before,
            None if edit.enqueued().is_empty() && edit.released().is_empty() => {
                return (Snapshot { record: Record::vacant(key.clone()), now }, false);
            }
            None => Record::vacant(key.clone()),
        };
        let revoked = before.holders.iter().filter(|holder| edit.revoked().contains(&holder.id));
        self.revoked.extend(revoked.map(|holder| (holder.token, self::now())));
        let after = step(before.clone(), edit, now, rules);
        for holder in &after.holders {
            let token = *self.granted.entry(holder.id).or_insert(holder.token);
            let is_new = !before.holders.iter().any(|earlier| earlier.id == holder.id);
            if token != holder.token {
                self.violation = Some(format!("one acquisition, two tokens: {token:?} and {holder:?}"));
            }
            if is_new && holder.token <= before.token {
                self.violation = Some(format!("the token of {holder:?} is not above {:?}", before.token));
            }
        }
        self.records.insert(key.clone(), after.clone());
        let is_changed = ids(&before) != ids(&after);
        (Snapshot { record: after, now }, is_changed)
    }
}

/// Describes a record: its holders, their expiry, and its waiters.
fn shown(record: &Record) -> String {
    let holders =
        record.holders.iter().map(|holder| format!("{} until {}", holder.owner, holder.expires_at.0 - EPOCH));
    let waiters = record.waiters.iter().map(|waiter| waiter.acquisition.owner.clone());
    let (holders, waiters): (Vec<_>, Vec<_>) = (holders.collect(), waiters.collect());
    format!("held by {holders:?}, awaited by {waiters:?}")
}

/// Returns the ids of all holders and waiters.
fn ids(record: &Record) -> Vec<LeaseId> {
    let holders = record.holders.iter().map(|holder| holder.id);
    holders.chain(record.waiters.iter().map(|waiter| waiter.acquisition.id)).collect()
}

fn unavailable(outcome: Outcome) -> StoreError {
    StoreError::Unavailable { outcome, cause: "simulated".to_owned() }
}

impl Store for SimulatedStore {
    async fn commit(&self, batch: Arc<Vec<(Key, Edit)>>, _: Duration) -> Result<Committed, StoreError> {
        self.travel().await;
        if self.is_unavailable() {
            let is_applied = fastrand::bool();
            if is_applied {
                self.apply(&batch);
            }
            return Err(unavailable(if is_applied { Outcome::Unknown } else { Outcome::NotApplied }));
        }
        let snapshots = self.apply(&batch);
        self.travel().await;
        Ok(Committed::at_once(snapshots.into_iter().map(Ok).collect()))
    }

    fn batches(&self) -> usize {
        2
    }

    async fn read(&self, keys: Vec<Key>) -> Result<Vec<ForKey>, StoreError> {
        self.travel().await;
        if self.is_unavailable() {
            return Err(unavailable(Outcome::NotApplied));
        }
        let snapshots = {
            let state = self.state();
            let now = state.clock.max(Timestamp(EPOCH) + now());
            let found = keys.iter().filter_map(|key| state.records.get(key).cloned());
            found.map(|record| Ok(Snapshot { record, now })).collect()
        };
        self.travel().await;
        Ok(snapshots)
    }

    async fn list(&self, _: ListQuery) -> Result<Page, StoreError> {
        Err(StoreError::Refused { cause: "the simulation has no listing".to_owned() })
    }

    async fn purge(&self, _: Duration) -> Result<u64, StoreError> {
        Ok(0)
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.travel().await;
        if self.is_unavailable() { Err(unavailable(Outcome::NotApplied)) } else { Ok(()) }
    }

    fn id(&self) -> Uuid {
        Uuid::nil()
    }

    fn rules(&self) -> Rules {
        self.rules
    }

    fn name(&self) -> &'static str {
        "simulated"
    }

    async fn feed(&self, events: mpsc::Sender<FeedEvent>, draining: CancellationToken) {
        let mut changes = self.changes.subscribe();
        let follow = async {
            let mut event = FeedEvent::Gap;
            while self.has_feed && events.send(event).await.is_ok() {
                event = match changes.recv().await {
                    Ok((key, rev)) => FeedEvent::Changed { key, rev: Some(rev) },
                    Err(_) => FeedEvent::Gap,
                };
                self.travel().await;
            }
            std::future::pending::<()>().await;
        };
        draining.run_until_cancelled(follow).await;
    }

    fn feed_state(&self) -> FeedState {
        if self.has_feed { FeedState::Behind(Duration::ZERO) } else { FeedState::Broken }
    }

    fn is_shared(&self) -> bool {
        true
    }
}
