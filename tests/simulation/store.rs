//! The store that the daemons of a simulation share: the specification over a map, at the simulation's own time. It is slow
//! now and then, and fails so that nobody knows whether it did what was asked.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use leased::lease::{Edit, FencingToken, Key, LeaseId, Record, Rules, Snapshot, Timestamp, step};
use leased::store::{Committed, FeedEvent, FeedState, ForKey, ListQuery, Outcome, Page, Store, StoreError};
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::history::{History, now};
use crate::support::ms;

/// When a simulation begins on the store's clock.
const EPOCH: i64 = 1_700_000_000_000;

/// How the store does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weather {
    Fair,
    /// Each commit takes up to a second.
    Slow,
    /// Nothing is answered; half of what is asked for happens.
    Away,
}

#[derive(Clone)]
pub(crate) struct SimulatedStore {
    rules: Rules,
    /// Whether it tells of changes.
    has_feed: bool,
    history: History,
    changes: broadcast::Sender<(Key, i64)>,
    state: Arc<Mutex<State>>,
}

struct State {
    records: BTreeMap<Key, Record>,
    weather: Weather,
    clock: Timestamp,
    /// What each acquisition was granted.
    granted: HashMap<LeaseId, FencingToken>,
    revoked: Vec<(FencingToken, Duration)>,
    wrong: Option<String>,
}

impl SimulatedStore {
    pub(crate) fn new(rules: Rules, has_feed: bool, history: History) -> Self {
        let state = State {
            records: BTreeMap::new(),
            weather: Weather::Fair,
            clock: Timestamp(EPOCH),
            granted: HashMap::new(),
            revoked: Vec::new(),
            wrong: None,
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

    pub(crate) fn set_weather(&self, weather: Weather) {
        self.state().weather = weather;
    }

    /// When the lease with this token was revoked.
    pub(crate) fn revoked_at(&self, token: i64) -> Option<Duration> {
        self.state().revoked.iter().find(|(revoked, _)| revoked.0 == token).map(|(_, at)| *at)
    }

    /// How many stand in line for `key`.
    pub(crate) fn line(&self, key: &str) -> u32 {
        let state = self.state();
        let record = state.records.iter().find(|(known, _)| known.as_str() == key);
        record.map_or(0, |(_, record)| record.waiters.len() as u32)
    }

    /// What must not happen to records, and did.
    pub(crate) fn wrong(&self) -> Option<String> {
        self.state().wrong.clone()
    }

    /// Records that somebody holds or waits for `elapsed` after the beginning, in words.
    pub(crate) fn leftovers(&self, elapsed: Duration) -> Vec<String> {
        let now = Timestamp(EPOCH) + elapsed;
        let state = self.state();
        let left = state.records.iter().filter(|(_, record)| {
            record.holders.iter().any(|holder| now < holder.expires_at + self.rules.grace)
                || record.waiters.iter().any(|waiter| now < waiter.expires_at)
        });
        left.map(|(key, record)| format!("{}: {}", key.as_str(), shown(record))).collect()
    }

    /// Whether daemons hear of what others do.
    pub(crate) fn has_feed(&self) -> bool {
        self.has_feed
    }

    fn is_away(&self) -> bool {
        self.state().weather == Weather::Away
    }

    async fn travel(&self) {
        let longest = if self.state().weather == Weather::Slow { 500 } else { 4 };
        sleep(ms(fastrand::u64(..=longest))).await;
    }

    fn apply(&self, batch: &[(Key, Edit)]) -> Vec<Snapshot> {
        let mut state = self.state();
        state.clock = state.clock.max(Timestamp(EPOCH) + now());
        let commit = |(key, edit): &(Key, Edit)| {
            let (snapshot, is_changed) = state.apply(key, edit, &self.rules);
            if is_changed {
                self.history.note(now(), format_args!("{}: {}", key.as_str(), shown(&snapshot.record)));
                // Nobody may be listening.
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
            let is_new = !before.holders.iter().any(|known| known.id == holder.id);
            if token != holder.token {
                self.wrong = Some(format!("one acquisition, two tokens: {token:?} and {holder:?}"));
            }
            if is_new && holder.token <= before.token {
                self.wrong = Some(format!("{holder:?} is no later than {:?}", before.token));
            }
        }
        self.records.insert(key.clone(), after.clone());
        let is_changed = ids(&before) != ids(&after);
        (Snapshot { record: after, now }, is_changed)
    }
}

/// The record in words.
fn shown(record: &Record) -> String {
    let holders =
        record.holders.iter().map(|holder| format!("{} until {}", holder.owner, holder.expires_at.0 - EPOCH));
    let waiters = record.waiters.iter().map(|waiter| waiter.acquisition.owner.clone());
    let (holders, waiters): (Vec<_>, Vec<_>) = (holders.collect(), waiters.collect());
    format!("held by {holders:?}, awaited by {waiters:?}")
}

/// Who is there.
fn ids(record: &Record) -> Vec<LeaseId> {
    let holders = record.holders.iter().map(|holder| holder.id);
    holders.chain(record.waiters.iter().map(|waiter| waiter.acquisition.id)).collect()
}

fn away(outcome: Outcome) -> StoreError {
    StoreError::Unavailable { outcome, cause: "simulated".to_owned() }
}

impl Store for SimulatedStore {
    async fn commit(
        &self,
        mut batch: Arc<Vec<(Key, Edit)>>,
        deadline: Duration,
    ) -> Result<Committed, StoreError> {
        let deadline = Instant::now() + deadline;
        let (mut outcome, mut is_repeated) = (Outcome::NotApplied, false);
        loop {
            self.travel().await;
            if !self.is_away() {
                let snapshots = self.apply(&batch);
                self.travel().await;
                return Ok(Committed { records: snapshots.into_iter().map(Ok).collect(), is_repeated });
            }
            if fastrand::bool() {
                self.apply(&batch);
                outcome = Outcome::Unknown;
            }
            let again = Instant::now() + ms(fastrand::u64(25..200));
            if again >= deadline {
                return Err(away(outcome));
            }
            sleep_until(again).await;
            let repeated = batch.iter().map(|(key, edit)| (key.clone(), edit.clone().repeated()));
            batch = Arc::new(repeated.collect());
            is_repeated = true;
        }
    }

    fn batches(&self) -> usize {
        2
    }

    async fn read(&self, keys: Vec<Key>) -> Result<Vec<ForKey>, StoreError> {
        self.travel().await;
        if self.is_away() {
            return Err(away(Outcome::NotApplied));
        }
        let snapshots = {
            let state = self.state();
            let now = state.clock.max(Timestamp(EPOCH) + now());
            let known = keys.iter().filter_map(|key| state.records.get(key).cloned());
            known.map(|record| Ok(Snapshot { record, now })).collect()
        };
        self.travel().await;
        Ok(snapshots)
    }

    async fn list(&self, _: ListQuery) -> Result<Page, StoreError> {
        Err(StoreError::Refused { cause: "nobody lists here".to_owned() })
    }

    async fn purge(&self, _: Duration) -> Result<u64, StoreError> {
        Ok(0)
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.travel().await;
        if self.is_away() { Err(away(Outcome::NotApplied)) } else { Ok(()) }
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

    fn repetitions(&self) -> u64 {
        0
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
