//! The calls of this daemon that stand in line, and when to look after them; [`refresh`] does.
//!
//! Their places are in the records, where every daemon sees them; here is only whom to tell when a record says that
//! a turn has come, and when to act for a key: a *nudge* when time alone lets the head in, and a *look* now and then,
//! which refreshes the places well before they lapse, or else checks what other daemons did, if there can be others.
//! A feed of others' changes is usually sooner than a check; the checks are the net under it.

/// When keys are due: each at most once.
mod schedule;
/// How often waiting calls are looked after.
mod interval;
/// Nudges, checks and refreshes places when they are due.
pub(crate) mod refresh;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::op::{Part, Presence};
use crate::lease::{Acquisition, Key, LeaseId, Rules, Snapshot};
use crate::store::Store;
use interval::Pace;
use schedule::Agenda;

/// Calls that wait, by key.
#[derive(Debug)]
pub(crate) struct Line {
    rules: Rules,
    pace: Pace,
    limit: usize,
    state: Mutex<State>,
    /// By `Waiting::nudge_at`. Changed only under `state`, as is the other.
    nudges: Agenda,
    /// By `Waiting::look_at`.
    looks: Agenda,
}

#[derive(Debug, Default)]
struct State {
    keys: HashMap<Key, Waiting>,
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
    /// When the place was taken anew, by a command that may have been delayed.
    rejoined_at: Option<Instant>,
    calls: Vec<WaitingCall>,
}

#[derive(Debug)]
struct WaitingCall {
    number: u64,
    tell: oneshot::Sender<Arc<Snapshot>>,
}

/// One call's entry; dropping it takes the call out.
#[derive(Debug)]
pub(crate) struct Entry {
    line: Arc<Line>,
    key: Key,
    id: LeaseId,
    number: u64,
    told: oneshot::Receiver<Arc<Snapshot>>,
}

impl Entry {
    /// The record that says that the call waits no more.
    pub(crate) async fn told(&mut self) -> Arc<Snapshot> {
        match (&mut self.told).await {
            Ok(snapshot) => snapshot,
            // Its sender goes only with the entry itself.
            Err(_) => std::future::pending().await,
        }
    }

    /// The record as last seen.
    pub(crate) fn latest(&self) -> Option<Arc<Snapshot>> {
        self.line.state().keys.get(&self.key)?.latest.clone()
    }

    /// When the call's place was taken anew, if it was lost.
    pub(crate) fn rejoined_at(&self) -> Option<Instant> {
        self.line.state().keys.get(&self.key)?.calls.get(&self.id)?.rejoined_at
    }

    /// Takes the call out, and says whether others wait on with its id, as after a client's reconnect.
    pub(crate) fn leave(self) -> bool {
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
        self.line.tidy(&mut state, &self.key);
        others
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.take_out();
    }
}

impl Line {
    pub(crate) fn new(store: &impl Store, limit: usize) -> Self {
        Self {
            rules: store.rules(),
            pace: Pace::of(store),
            limit,
            state: Mutex::default(),
            nudges: Agenda::default(),
            looks: Agenda::default(),
        }
    }

    /// Enters a call before its first commit, so that no record that concerns it is missed. `None`: too many wait.
    pub(crate) fn enter(self: &Arc<Self>, key: &Key, acquisition: &Arc<Acquisition>) -> Option<Entry> {
        let (tell, told) = oneshot::channel();
        let mut state = self.state();
        if state.calls >= self.limit {
            return None;
        }
        state.calls += 1;
        state.last_number += 1;
        let number = state.last_number;
        let State { keys, calls, .. } = &mut *state;
        let waiting = keys.entry(key.clone()).or_insert_with(|| {
            let waiting = Waiting::new(self.pace, *calls);
            self.looks.shift(key, None, Some(waiting.look_at));
            waiting
        });
        let same = waiting.calls.entry(acquisition.id).or_insert_with(|| Calls::new(acquisition));
        same.calls.push(WaitingCall { number, tell });
        drop(state);
        Some(Entry { line: Arc::clone(self), key: key.clone(), id: acquisition.id, number, told })
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Takes note of a record that a commit of this daemon returned, and tells the calls whose wait is over.
    pub(crate) fn observe(&self, snapshot: &Arc<Snapshot>) {
        let mut state = self.state();
        let key = &snapshot.record.key;
        let Some(waiting) = self.note(&mut state, snapshot) else { return };
        let holders = snapshot.record.holders.iter().map(|holder| holder.id);
        let departed = snapshot.record.departures.iter().map(|departure| departure.id);
        let told: usize = holders.chain(departed).map(|id| waiting.tell(id, snapshot)).sum();
        state.calls -= told;
        self.tidy(&mut state, key);
    }

    /// Takes note of a record as others left it, and returns what to commit: a turn that came by a foreign commit
    /// is claimed first, so that the caller gets a lease with its whole TTL ahead.
    pub(crate) fn observe_foreign(&self, snapshot: &Arc<Snapshot>) -> Vec<(Key, Part)> {
        let mut state = self.state();
        let key = &snapshot.record.key;
        let latest = state.keys.get(key).and_then(|waiting| waiting.latest.as_ref());
        if latest.is_some_and(|latest| latest.record.version() > snapshot.record.version()) {
            return Vec::new();
        }
        let Some(waiting) = self.note(&mut state, snapshot) else { return Vec::new() };
        let record = &snapshot.record;
        // Over for good, whoever says so.
        let told: usize =
            record.departures.iter().map(|departure| waiting.tell(departure.id, snapshot)).sum();
        let in_line: HashSet<LeaseId> = record.waiters.iter().map(|waiter| waiter.acquisition.id).collect();
        let out_of_line = waiting.calls.iter_mut().filter(|(id, _)| !in_line.contains(id));
        let claim = |(id, same): (&LeaseId, &mut Calls)| {
            let holds = record.holders.iter().any(|holder| holder.id == *id);
            (key.clone(), if holds { same.claim(*id) } else { same.rejoin() })
        };
        let parts = out_of_line.map(claim).collect();
        state.calls -= told;
        self.tidy(&mut state, key);
        parts
    }

    /// Takes note that the key has no record, and returns what to commit: its calls join the line anew.
    pub(crate) fn missing(&self, key: &Key) -> Vec<(Key, Part)> {
        let mut state = self.state();
        let Some(waiting) = state.keys.get_mut(key) else { return Vec::new() };
        waiting.calls.values_mut().map(|same| (key.clone(), same.rejoin())).collect()
    }

    /// What to commit for a call whose place is gone, if it still waits.
    pub(crate) fn rejoin(&self, key: &Key, id: LeaseId) -> Option<Part> {
        Some(self.state().keys.get_mut(key)?.calls.get_mut(&id)?.rejoin())
    }

    /// Whether calls wait for the key, and have not seen its record as of `rev`.
    pub(crate) fn wants(&self, key: &Key, rev: Option<i64>) -> bool {
        let state = self.state();
        let Some(waiting) = state.keys.get(key) else { return false };
        let seen = waiting.latest.as_ref().map(|latest| latest.record.rev);
        rev.is_none() || seen < rev
    }

    /// Whether a call with this id stands in line for the key.
    pub(crate) fn has(&self, key: &Key, id: LeaseId) -> bool {
        self.state().keys.get(key).is_some_and(|waiting| waiting.calls.contains_key(&id))
    }

    /// The keys for which calls wait.
    pub(crate) fn keys(&self) -> Vec<Key> {
        self.state().keys.keys().cloned().collect()
    }

    /// Tells a call that its place could not be kept.
    pub(crate) fn give_up(&self, id: LeaseId, snapshot: &Arc<Snapshot>) {
        let key = &snapshot.record.key;
        let mut state = self.state();
        let Some(waiting) = state.keys.get_mut(key) else { return };
        let told = waiting.tell(id, snapshot);
        state.calls -= told;
        self.tidy(&mut state, key);
    }

    /// Waits until a nudge is due.
    pub(crate) async fn nudge_due(&self) {
        self.nudges.reached().await;
    }

    /// Waits until a look is due.
    pub(crate) async fn look_due(&self) {
        self.looks.reached().await;
    }

    /// Keys to nudge by `now`; a lot, if there are more.
    pub(crate) fn take_nudges(&self, now: Instant) -> Vec<Key> {
        let mut state = self.state();
        let lot = self.nudges.take(now);
        for key in &lot {
            if let Some(waiting) = state.keys.get_mut(key) {
                waiting.nudge_at = None;
            }
        }
        lot
    }

    /// What to look after by `now`; for a lot of keys, if there are more.
    pub(crate) fn take_looks(&self, now: Instant) -> Looks {
        let mut state = self.state();
        let mut lot = Looks::default();
        let calls = state.calls;
        for key in self.looks.take(now) {
            let Some(waiting) = state.keys.get_mut(&key) else { continue };
            waiting.look_at = now + self.pace.look(calls);
            self.looks.shift(&key, None, Some(waiting.look_at));
            if waiting.refresh_at <= now {
                waiting.refresh_at = now + self.pace.refresh(calls);
                lot.refreshes.extend(waiting.refreshes().map(|(id, part)| (id, (key.clone(), part))));
            } else {
                lot.checks.push(key);
            }
        }
        lot
    }

    /// Takes note of a record, if calls wait for its key.
    fn note<'a>(&self, state: &'a mut State, snapshot: &Arc<Snapshot>) -> Option<&'a mut Waiting> {
        let key = &snapshot.record.key;
        let waiting = state.keys.get_mut(key)?;
        let nudge_at = snapshot.next_admission(&self.rules).map(|time| Instant::now() + time);
        self.nudges.shift(key, waiting.nudge_at, nudge_at);
        waiting.nudge_at = nudge_at;
        waiting.latest = Some(Arc::clone(snapshot));
        Some(waiting)
    }

    /// Forgets a key for which no call waits.
    fn tidy(&self, state: &mut State, key: &Key) {
        if state.keys.get(key).is_some_and(|waiting| waiting.calls.is_empty())
            && let Some(Waiting { nudge_at, look_at, .. }) = state.keys.remove(key)
        {
            self.nudges.shift(key, nudge_at, None);
            self.looks.shift(key, Some(look_at), None);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn refreshes(&self) -> impl Iterator<Item = (LeaseId, Part)> {
        self.calls.iter().map(|(id, same)| (*id, Part::Refresh(*id, Arc::downgrade(&same.presence))))
    }
}

impl Calls {
    fn new(acquisition: &Arc<Acquisition>) -> Self {
        let acquisition = Arc::clone(acquisition);
        Self { acquisition, presence: Arc::new(Presence), rejoined_at: None, calls: Vec::new() }
    }

    /// A call that rejoined claims its lease by asking for it again, which notes in the record that it was asked for more
    /// than once: the command that was delayed must not get another lease when this one is over.
    fn claim(&mut self, id: LeaseId) -> Part {
        if self.rejoined_at.is_some() {
            self.rejoin()
        } else {
            Part::Claim(id, Arc::downgrade(&self.presence))
        }
    }

    fn rejoin(&mut self) -> Part {
        self.rejoined_at = Some(Instant::now());
        Part::Rejoin(Arc::clone(&self.acquisition), Arc::downgrade(&self.presence))
    }
}

/// What to look after.
#[derive(Debug, Default)]
pub(crate) struct Looks {
    pub(crate) checks: Vec<Key>,
    pub(crate) refreshes: Vec<(LeaseId, (Key, Part))>,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt;

    use super::schedule::LOT;
    use super::*;
    use crate::lease::{Edit, Record, Timestamp, step};
    use crate::store::embedded::EmbeddedStore;

    /// A key that one holds and the other waits for.
    fn snapshot(key: Key, holder: Acquisition, waiter: Arc<Acquisition>, rules: &Rules) -> Snapshot {
        let edit = Edit::default().enqueue(Arc::new(holder)).enqueue(waiter);
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
            let waiter = Arc::new(Acquisition::waiting(LeaseId::random()));
            let entry = line.enter(&key, &waiter).expect("room");
            line.observe(&Arc::new(snapshot(key, Acquisition::waiting(LeaseId::random()), waiter, &rules)));
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
        assert!(line.looks.is_empty() && line.nudges.is_empty());
    }

    #[tokio::test]
    async fn a_grant_by_another_daemon_is_claimed_with_a_touch_while_its_call_waits() {
        let folder = tempfile::tempdir().expect("a folder");
        let rules = Rules { grace: Duration::ZERO, place: Duration::from_secs(15) };
        let store = EmbeddedStore::open(folder.path(), rules).await.expect("a usable folder");
        let line = Arc::new(Line::new(&store, usize::MAX));
        let key = Key::try_from("key").expect("a key");
        let [mine, next] = [(); 2].map(|()| Acquisition::waiting(LeaseId::random()));
        let mut entry = line.enter(&key, &Arc::new(mine.clone())).expect("room");
        let granted = Arc::new(snapshot(key.clone(), mine.clone(), Arc::new(next), &rules));

        let claims = line.observe_foreign(&granted);
        assert!(matches!(&claims[..], [(_, Part::Claim(id, _))] if *id == mine.id), "{claims:?}");
        assert!(!claims[0].1.is_moot());
        assert!(entry.told().now_or_never().is_none(), "told only once it is claimed");
        drop(entry);
        assert!(claims[0].1.is_moot(), "nobody is there to hold it");
        assert!(line.observe_foreign(&granted).is_empty());
    }
}
