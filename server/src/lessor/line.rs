//! The calls of this daemon that stand in line, and when to look after them; [`upkeep`](super::upkeep) does.
//!
//! Their places are in the records, where every daemon sees them; here is only whom to tell when a record says that
//! a turn has come, and when to act for a key: a *nudge* when time alone lets the head in, and a *look* now and then,
//! which refreshes the places well before they lapse, or else checks what other daemons did, if there can be others.
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
/// Keys that are acted for in one go.
const LOT: usize = 1000;

/// Calls that wait, by key.
#[derive(Debug)]
pub(super) struct Line {
    rules: Rules,
    pace: Pace,
    limit: usize,
    state: Mutex<State>,
    /// Rings when a nudge is due earlier than any before.
    nudge_sooner: Notify,
    /// The same for looks.
    look_sooner: Notify,
}

#[derive(Debug, Default)]
struct State {
    keys: HashMap<Key, Waiting>,
    /// By `Waiting::nudge_at`.
    nudges: BTreeSet<(Instant, Key)>,
    /// By `Waiting::look_at`.
    looks: BTreeSet<(Instant, Key)>,
    calls: usize,
    last_number: u64,
}

/// What is known of one key's calls.
#[derive(Debug)]
struct Waiting {
    calls: HashMap<LeaseId, Calls>,
    latest: Option<Arc<Snapshot>>,
    nudge_at: Option<Instant>,
    look_at: Instant,
    /// A look from then on is a refresh.
    refresh_at: Instant,
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
            nudge_sooner: Notify::new(),
            look_sooner: Notify::new(),
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
        let State { keys, looks, calls, .. } = &mut *state;
        let waiting = keys.entry(key.clone()).or_insert_with(|| {
            let waiting = Waiting::new(self.pace, *calls);
            looks.insert((waiting.look_at, key.clone()));
            waiting
        });
        let same = waiting.calls.entry(acquisition.id).or_insert_with(|| Calls::new(acquisition));
        same.calls.push(WaitingCall { number, tell });
        if state.looks.first().is_some_and(|(_, first)| first == key) {
            self.look_sooner.notify_one();
        }
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
        let Some(waiting) = self.note(&mut state, snapshot) else { return };
        let holders = snapshot.record.holders.iter().map(|holder| holder.id);
        let departed = snapshot.record.departures.iter().map(|departure| departure.id);
        let told: usize = holders.chain(departed).map(|id| waiting.tell(id, snapshot)).sum();
        state.calls -= told;
        state.tidy(key);
    }

    /// Takes note of a record as others left it, and returns what to commit: a turn that came by a foreign commit
    /// is claimed first, so that the caller gets a lease with its whole TTL ahead.
    pub(super) fn observe_foreign(&self, snapshot: &Arc<Snapshot>) -> Vec<(Key, Part)> {
        let mut state = self.state();
        let key = &snapshot.record.key;
        let latest = state.keys.get(key).and_then(|waiting| waiting.latest.as_ref());
        if latest.is_some_and(|latest| latest.record.version() > snapshot.record.version()) {
            return Vec::new();
        }
        let Some(waiting) = self.note(&mut state, snapshot) else { return Vec::new() };
        let record = &snapshot.record;
        let in_line: HashSet<LeaseId> = record.waiters.iter().map(|waiter| waiter.acquisition.id).collect();
        let out_of_line = waiting.calls.iter().filter(|(id, _)| !in_line.contains(id));
        let claim = |(id, same): (&LeaseId, &Calls)| {
            let holds = record.holders.iter().any(|holder| holder.id == *id);
            (key.clone(), if holds { same.claim(*id) } else { same.rejoin() })
        };
        out_of_line.map(claim).collect()
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

    /// Waits until a nudge is due.
    pub(super) async fn nudge_due(&self) {
        reached(&self.nudge_sooner, || self.state().nudges.first().map(|(due, _)| *due)).await;
    }

    /// Waits until a look is due.
    pub(super) async fn look_due(&self) {
        reached(&self.look_sooner, || self.state().looks.first().map(|(due, _)| *due)).await;
    }

    /// Keys to nudge by `now`, as many as a [`LOT`].
    pub(super) fn take_nudges(&self, now: Instant) -> Vec<Key> {
        let mut state = self.state();
        let State { keys, nudges, .. } = &mut *state;
        let lot = due_by(nudges, now);
        for key in &lot {
            if let Some(waiting) = keys.get_mut(key) {
                waiting.nudge_at = None;
            }
        }
        lot
    }

    /// What to look after by `now`, for as many keys as a [`LOT`].
    pub(super) fn take_looks(&self, now: Instant) -> Looks {
        let mut state = self.state();
        let mut lot = Looks::default();
        let State { keys, looks, calls, .. } = &mut *state;
        for key in due_by(looks, now) {
            let Some(waiting) = keys.get_mut(&key) else { continue };
            waiting.look_at = now + self.pace.look(*calls);
            looks.insert((waiting.look_at, key.clone()));
            if waiting.refresh_at <= now {
                waiting.refresh_at = now + self.pace.refresh(*calls);
                lot.refreshes.extend(waiting.rejoins().map(|(id, part)| (id, (key.clone(), part))));
            } else {
                lot.checks.push(key);
            }
        }
        lot
    }

    /// Takes note of a record, if calls wait for its key.
    fn note<'a>(&self, state: &'a mut State, snapshot: &Arc<Snapshot>) -> Option<&'a mut Waiting> {
        let State { keys, nudges, .. } = state;
        let key = &snapshot.record.key;
        let waiting = keys.get_mut(key)?;
        let nudge_at = snapshot.next_admission(&self.rules).map(|time| Instant::now() + time);
        if let Some(before) = waiting.nudge_at {
            nudges.remove(&(before, key.clone()));
        }
        if let Some(nudge_at) = nudge_at {
            nudges.insert((nudge_at, key.clone()));
            if nudges.first().is_some_and(|(_, first)| first == key) {
                self.nudge_sooner.notify_one();
            }
        }
        waiting.nudge_at = nudge_at;
        waiting.latest = Some(Arc::clone(snapshot));
        Some(waiting)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Forgets a key for which no call waits.
    fn tidy(&mut self, key: &Key) {
        if !self.keys.get(key).is_some_and(|waiting| waiting.calls.is_empty()) {
            return;
        }
        let Some((key, Waiting { nudge_at, look_at, .. })) = self.keys.remove_entry(key) else { return };
        if let Some(nudge_at) = nudge_at {
            self.nudges.remove(&(nudge_at, key.clone()));
        }
        self.looks.remove(&(look_at, key));
    }
}

impl Waiting {
    fn new(pace: Pace, calls: usize) -> Self {
        let now = Instant::now();
        Self {
            calls: HashMap::new(),
            latest: None,
            nudge_at: None,
            look_at: now + pace.look(calls),
            refresh_at: now + pace.refresh(calls),
        }
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

    /// What keeps the places of all calls.
    fn rejoins(&self) -> impl Iterator<Item = (LeaseId, Part)> {
        self.calls.iter().map(|(id, same)| (*id, same.rejoin()))
    }
}

impl Calls {
    fn new(acquisition: &Arc<Acquisition>) -> Self {
        Self { acquisition: Arc::clone(acquisition), presence: Arc::new(Presence), calls: Vec::new() }
    }

    fn claim(&self, id: LeaseId) -> Part {
        Part::Claim(id, Arc::downgrade(&self.presence))
    }

    fn rejoin(&self) -> Part {
        Part::Rejoin(Arc::clone(&self.acquisition), Arc::downgrade(&self.presence))
    }
}

/// What to look after.
#[derive(Debug, Default)]
pub(super) struct Looks {
    pub(super) checks: Vec<Key>,
    pub(super) refreshes: Vec<(LeaseId, (Key, Part))>,
}

/// Waits until the instant that `next` names, or an earlier one that it names once `sooner` has rung.
async fn reached(sooner: &Notify, next: impl Fn() -> Option<Instant>) {
    loop {
        let next = next().unwrap_or_else(|| Instant::now() + FAR);
        if next <= Instant::now() {
            return;
        }
        tokio::select! {
            () = sooner.notified() => {}
            () = sleep_until(next) => {}
        }
    }
}

/// Takes the keys that are due by `now`, as many as a [`LOT`].
fn due_by(agenda: &mut BTreeSet<(Instant, Key)>, now: Instant) -> Vec<Key> {
    let mut lot = Vec::new();
    while lot.len() < LOT && agenda.first().is_some_and(|(due, _)| *due <= now) {
        lot.extend(agenda.pop_first().map(|(_, key)| key));
    }
    lot
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use futures_util::FutureExt;

    use super::*;
    use crate::lease::{Edit, Mode, Record, Timestamp, Ttl, step};
    use crate::store::embedded::EmbeddedStore;

    fn acquisition() -> Arc<Acquisition> {
        Arc::new(Acquisition {
            id: LeaseId::random(),
            owner: String::new(),
            metadata: BTreeMap::new(),
            mode: Mode::Exclusive,
            shared_limit: 1,
            ttl: Ttl::new(Duration::from_secs(1)).expect("a second"),
            min_hold: Duration::ZERO,
            wait: true,
        })
    }

    /// A key that one holds and the other waits for.
    fn snapshot(key: Key, holder: Arc<Acquisition>, waiter: Arc<Acquisition>, rules: &Rules) -> Snapshot {
        let edit = Edit::default().enqueue(holder).enqueue(waiter);
        let now = Timestamp(1_000_000);
        Snapshot { record: step(Record::vacant(key), &edit, now, rules), now }
    }

    #[tokio::test]
    async fn a_crowd_is_looked_after_in_lots_and_each_key_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let rules = Rules { grace: Duration::ZERO, place: Duration::from_secs(15) };
        let store = EmbeddedStore::open(folder.path(), rules).await.expect("a usable folder");
        let line = Arc::new(Line::new(&store, usize::MAX));
        let enter = |number| {
            let key = Key::try_from(format!("key/{number}").as_str()).expect("a key");
            let waiter = acquisition();
            let entry = line.enter(&key, &waiter).expect("room");
            line.observe(&Arc::new(snapshot(key, acquisition(), waiter, &rules)));
            entry
        };
        let crowd: Vec<Entry> = (0..=2 * LOT).map(enter).collect();

        let later = Instant::now() + rules.place;
        let lots = |take: &dyn Fn() -> usize| {
            std::iter::repeat_with(take).take_while(|keys| *keys > 0).collect::<Vec<_>>()
        };
        assert_eq!(lots(&|| line.take_looks(later).refreshes.len()), [LOT, LOT, 1]);
        assert_eq!(lots(&|| line.take_nudges(later).len()), [LOT, LOT, 1]);
        assert!(line.look_due().now_or_never().is_none(), "looked after anew only later");
        assert!(line.nudge_due().now_or_never().is_none());

        crowd.iter().for_each(|entry| assert!(entry.latest().is_some()));
        drop(crowd);
        let state = line.state();
        assert!(state.keys.is_empty() && state.calls == 0);
        assert!(state.looks.is_empty() && state.nudges.is_empty());
    }
}
