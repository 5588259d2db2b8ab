//! The calls of this daemon that stand in line, and when to look after them; [`upkeep`](super::upkeep) does.
//!
//! Their places are in the records, where every daemon sees them; here is only whom to tell when a record says that
//! a turn has come, and three hints for looking again: a *nudge* when time alone lets the head in, a *check* now
//! and then for what other daemons did, if there can be others, and a *refresh* of the places well before they lapse.
//! A feed of others' changes is usually sooner than a check; the checks are the net under it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep_until};

use super::pace::Pace;
use super::part::{Part, Presence};
use crate::lease::{Acquisition, Key, LeaseId, Rules, Snapshot};
use crate::store::Store;

/// Longer than any timer is set for.
const FAR: Duration = Duration::from_secs(3600);

/// Calls that wait, by key.
#[derive(Debug)]
pub(super) struct Line {
    rules: Rules,
    pace: Pace,
    limit: usize,
    state: Mutex<State>,
    /// Rings when something is due earlier than before.
    sooner: Notify,
}

#[derive(Debug, Default)]
struct State {
    keys: HashMap<Key, Waiting>,
    /// When each key is to be looked after next.
    due: BTreeSet<(Instant, Key)>,
    calls: usize,
    last_number: u64,
}

/// What is known of one key's calls.
#[derive(Debug)]
struct Waiting {
    calls: HashMap<LeaseId, Calls>,
    latest: Option<Arc<Snapshot>>,
    check_at: Instant,
    refresh_at: Instant,
    nudge_at: Option<Instant>,
    /// Its entry in `State::due`.
    due: Instant,
    /// A check or refresh is under way.
    busy: bool,
}

/// The calls with one id: one, or several after a client's reconnect.
#[derive(Debug)]
struct Calls {
    acquisition: Arc<Acquisition>,
    presence: Arc<Presence>,
    calls: Vec<WaitingCall>,
}

#[derive(Debug)]
struct WaitingCall {
    number: u64,
    tell: oneshot::Sender<Arc<Snapshot>>,
}

/// One call's entry; dropping it takes the call out.
#[derive(Debug)]
pub(super) struct Entry {
    line: Arc<Line>,
    key: Key,
    id: LeaseId,
    number: u64,
    told: oneshot::Receiver<Arc<Snapshot>>,
}

impl Entry {
    /// The record that says that the call waits no more.
    pub(super) async fn told(&mut self) -> Arc<Snapshot> {
        match (&mut self.told).await {
            Ok(snapshot) => snapshot,
            // Its sender goes only with the entry itself.
            Err(_) => std::future::pending().await,
        }
    }

    /// The record as last seen.
    pub(super) fn latest(&self) -> Option<Arc<Snapshot>> {
        self.line.state().keys.get(&self.key)?.latest.clone()
    }

    /// Takes the call out, and says whether others wait on with its id, as after a client's reconnect.
    pub(super) fn leave(self) -> bool {
        self.take_out()
    }

    fn take_out(&self) -> bool {
        let mut state = self.line.state();
        let Some(waiting) = state.keys.get_mut(&self.key) else { return false };
        let Some(same) = waiting.calls.get_mut(&self.id) else { return false };
        let before = same.calls.len();
        same.calls.retain(|call| call.number != self.number);
        let gone = before - same.calls.len();
        let others = !same.calls.is_empty();
        if !others {
            waiting.calls.remove(&self.id);
        }
        state.calls -= gone;
        state.tidy(&self.key);
        others
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.take_out();
    }
}

impl Line {
    pub(super) fn new(store: &impl Store, limit: usize) -> Self {
        Self {
            rules: store.rules(),
            pace: Pace::of(store),
            limit,
            state: Mutex::default(),
            sooner: Notify::new(),
        }
    }

    /// Enters a call before its first commit, so that no record that concerns it is missed. `None`: too many wait.
    pub(super) fn enter(self: &Arc<Self>, key: &Key, acquisition: &Arc<Acquisition>) -> Option<Entry> {
        let (tell, told) = oneshot::channel();
        let mut state = self.state();
        if state.calls >= self.limit {
            return None;
        }
        state.calls += 1;
        state.last_number += 1;
        let number = state.last_number;
        let calls = state.calls;
        let waiting = state.keys.entry(key.clone()).or_insert_with(|| Waiting::new(self.pace, calls));
        let same = waiting.calls.entry(acquisition.id).or_insert_with(|| Calls::new(acquisition));
        same.calls.push(WaitingCall { number, tell });
        self.rearm(&mut state, key);
        drop(state);
        Some(Entry { line: Arc::clone(self), key: key.clone(), id: acquisition.id, number, told })
    }

    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Takes note of a record that a commit of this daemon returned, and tells the calls whose wait is over.
    pub(super) fn observe(&self, snapshot: &Arc<Snapshot>) {
        let mut state = self.state();
        let key = &snapshot.record.key;
        let Some(waiting) = state.keys.get_mut(key) else { return };
        waiting.note(snapshot, &self.rules);
        let holders = snapshot.record.holders.iter().map(|holder| holder.id);
        let departed = snapshot.record.departures.iter().map(|departure| departure.id);
        let told: usize = holders.chain(departed).map(|id| waiting.tell(id, snapshot)).sum();
        state.calls -= told;
        state.tidy(key);
        self.rearm(&mut state, key);
    }

    /// Takes note of a record as others left it, and returns what to commit: a turn that came by a foreign commit
    /// is claimed first, so that the caller gets a lease with its whole TTL ahead.
    pub(super) fn observe_foreign(&self, snapshot: &Arc<Snapshot>) -> Vec<(Key, Part)> {
        let mut state = self.state();
        let key = &snapshot.record.key;
        let Some(waiting) = state.keys.get_mut(key) else { return Vec::new() };
        let version = snapshot.record.version();
        if waiting.latest.as_ref().is_some_and(|latest| latest.record.version() > version) {
            return Vec::new();
        }
        waiting.note(snapshot, &self.rules);
        let in_line: HashSet<LeaseId> =
            snapshot.record.waiters.iter().map(|waiter| waiter.acquisition.id).collect();
        let claims = waiting.rejoins().filter(|(id, _)| !in_line.contains(id));
        let claims = claims.map(|(_, part)| (key.clone(), part)).collect();
        self.rearm(&mut state, key);
        claims
    }

    /// Takes note that the key has no record, and returns what to commit: its calls join the line anew.
    pub(super) fn missing(&self, key: &Key) -> Vec<(Key, Part)> {
        let state = self.state();
        let Some(waiting) = state.keys.get(key) else { return Vec::new() };
        waiting.rejoins().map(|(_, part)| (key.clone(), part)).collect()
    }

    /// Whether calls wait for the key, and have not seen its record as of `rev`.
    pub(super) fn wants(&self, key: &Key, rev: Option<i64>) -> bool {
        let state = self.state();
        let Some(waiting) = state.keys.get(key) else { return false };
        let seen = waiting.latest.as_ref().map(|latest| latest.record.rev);
        rev.is_none() || seen < rev
    }

    /// The keys for which calls wait.
    pub(super) fn keys(&self) -> Vec<Key> {
        self.state().keys.keys().cloned().collect()
    }

    /// Tells a call that its place could not be kept.
    pub(super) fn give_up(&self, id: LeaseId, snapshot: &Arc<Snapshot>) {
        let key = &snapshot.record.key;
        let mut state = self.state();
        let Some(waiting) = state.keys.get_mut(key) else { return };
        let told = waiting.tell(id, snapshot);
        state.calls -= told;
        state.tidy(key);
    }

    /// Waits until something is due.
    pub(super) async fn due(&self) {
        loop {
            let next = self.next_due();
            if next <= Instant::now() {
                return;
            }
            tokio::select! {
                () = self.sooner.notified() => {}
                () = sleep_until(next) => return,
            }
        }
    }

    fn next_due(&self) -> Instant {
        self.state().due.first().map_or_else(|| Instant::now() + FAR, |(due, _)| *due)
    }

    /// What is to be done by `now`.
    pub(super) fn take_due(&self, now: Instant) -> Chores {
        let mut state = self.state();
        let mut chores = Chores::default();
        let calls = state.calls;
        while let Some((_, key)) = state.due.first().filter(|(due, _)| *due <= now).cloned() {
            let Some(waiting) = state.keys.get_mut(&key) else {
                state.due.pop_first();
                continue;
            };
            waiting.chores(&key, now, (self.pace, calls), &mut chores);
            state.arm(&key);
        }
        chores
    }

    /// Allows the next check of these keys.
    pub(super) fn rest(&self, keys: &[Key]) {
        let mut state = self.state();
        for key in keys {
            if let Some(waiting) = state.keys.get_mut(key) {
                waiting.busy = false;
            }
            state.arm(key);
        }
        self.sooner.notify_one();
    }

    /// Arms the key's timer anew, and wakes the keeper if that is the earliest.
    fn rearm(&self, state: &mut State, key: &Key) {
        state.arm(key);
        if state.due.first().is_some_and(|(_, first)| first == key) {
            self.sooner.notify_one();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Enters the key's next due time.
    fn arm(&mut self, key: &Key) {
        let Some(waiting) = self.keys.get_mut(key) else { return };
        self.due.remove(&(waiting.due, key.clone()));
        waiting.due = waiting.next_due();
        self.due.insert((waiting.due, key.clone()));
    }

    /// Forgets a key for which no call waits.
    fn tidy(&mut self, key: &Key) {
        if let Some(waiting) = self.keys.get(key).filter(|waiting| waiting.calls.is_empty()) {
            self.due.remove(&(waiting.due, key.clone()));
            self.keys.remove(key);
        }
    }
}

impl Waiting {
    fn new(pace: Pace, calls: usize) -> Self {
        let now = Instant::now();
        let check_at = now + pace.look(calls);
        Self {
            calls: HashMap::new(),
            latest: None,
            check_at,
            refresh_at: now + pace.refresh(calls),
            nudge_at: None,
            due: check_at,
            busy: false,
        }
    }

    fn note(&mut self, snapshot: &Arc<Snapshot>, rules: &Rules) {
        self.nudge_at = snapshot.next_admission(rules).map(|time| Instant::now() + time);
        self.latest = Some(Arc::clone(snapshot));
    }

    /// Tells all calls with this id and returns how many there were.
    fn tell(&mut self, id: LeaseId, snapshot: &Arc<Snapshot>) -> usize {
        let calls = self.calls.remove(&id).map(|same| same.calls).unwrap_or_default();
        let count = calls.len();
        for call in calls {
            drop(call.tell.send(Arc::clone(snapshot)));
        }
        count
    }

    /// What keeps the places of all calls, and claims the leases of those whose turn has come.
    fn rejoins(&self) -> impl Iterator<Item = (LeaseId, Part)> {
        self.calls.iter().map(|(id, same)| (*id, same.rejoin()))
    }

    fn next_due(&self) -> Instant {
        let look = if self.busy { Instant::now() + FAR } else { self.check_at };
        self.nudge_at.map_or(look, |nudge| nudge.min(look))
    }

    /// Adds what is due for this key to `chores`, while so many calls wait in all.
    fn chores(&mut self, key: &Key, now: Instant, (pace, calls): (Pace, usize), chores: &mut Chores) {
        if self.nudge_at.is_some_and(|nudge| nudge <= now) {
            self.nudge_at = None;
            chores.nudges.push(key.clone());
        }
        if self.busy || self.check_at > now {
            return;
        }
        self.busy = true;
        self.check_at = now + pace.look(calls);
        if self.refresh_at <= now {
            self.refresh_at = now + pace.refresh(calls);
            chores.refreshes.extend(self.rejoins().map(|(id, part)| (id, (key.clone(), part))));
            chores.refreshed.push(key.clone());
        } else {
            chores.checks.push(key.clone());
        }
    }
}

impl Calls {
    fn new(acquisition: &Arc<Acquisition>) -> Self {
        Self { acquisition: Arc::clone(acquisition), presence: Arc::new(Presence), calls: Vec::new() }
    }

    fn rejoin(&self) -> Part {
        Part::Rejoin(Arc::clone(&self.acquisition), Arc::downgrade(&self.presence))
    }
}

/// What is due.
#[derive(Debug, Default)]
pub(super) struct Chores {
    pub(super) nudges: Vec<Key>,
    pub(super) checks: Vec<Key>,
    pub(super) refreshes: Vec<(LeaseId, (Key, Part))>,
    pub(super) refreshed: Vec<Key>,
}
