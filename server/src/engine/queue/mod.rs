//! The calls of this daemon that wait for a lease, by key.
//!
//! The queue itself is in the record, where every daemon sees it: each waiting call has a waiter's
//! entry there. This module only remembers which calls to wake when a record shows that their wait
//! is over, and when the daemon must act on a key:
//!
//! - A *nudge* is due when time alone admits the head of the queue, for example after a lease
//!   lapsed.
//! - A *poll* is due from time to time. It refreshes the waiters' entries well before they lapse.
//!   Between two refreshes it reads the record instead, to find what other daemons did.
//!
//! The store's feed usually reports the changes of other daemons earlier than a poll, but it may
//! miss some.

/// Keys, by the time at which they are due for a nudge or a poll.
mod schedule;
/// How often keys are polled and entries refreshed.
mod interval;
/// The background tasks that nudge keys, read records and refresh entries.
pub(crate) mod refresh;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::op::{Liveness, Op};
use crate::lease::{Acquisition, Key, LeaseId, Rules, Snapshot};
use crate::store::Store;
use interval::PollInterval;
use schedule::Schedule;

/// All waiting calls of the daemon.
#[derive(Debug)]
pub(crate) struct WaitQueue {
    rules: Rules,
    interval: PollInterval,
    /// The most calls that may wait.
    limit: usize,
    state: Mutex<State>,
    /// Each key with a [`KeyQueue::nudge_at`], at that instant. Changed only under `state`.
    nudges: Schedule,
    /// Each key at its [`KeyQueue::poll_at`]. Changed only under `state`.
    polls: Schedule,
}

#[derive(Debug, Default)]
struct State {
    keys: HashMap<Key, KeyQueue>,
    /// How many calls wait, for all keys together.
    calls: usize,
    last_number: u64,
}

/// The calls that wait for one key.
#[derive(Debug)]
struct KeyQueue {
    groups: HashMap<LeaseId, CallGroup>,
    /// The record that was seen last.
    latest: Option<Arc<Snapshot>>,
    /// When time alone admits the head of the queue.
    nudge_at: Option<Instant>,
    poll_at: Instant,
    /// A poll at this instant or later is a refresh.
    refresh_at: Instant,
}

/// The calls that wait with the same lease id. A client that reconnects repeats its call, so there
/// may be several.
#[derive(Debug)]
struct CallGroup {
    acquisition: Arc<Acquisition>,
    liveness: Arc<Liveness>,
    /// When the calls last asked for a new waiter's entry, because theirs was gone. That command
    /// may arrive late.
    rejoined_at: Option<Instant>,
    calls: Vec<WaitingCall>,
}

#[derive(Debug)]
struct WaitingCall {
    number: u64,
    ended: oneshot::Sender<Arc<Snapshot>>,
}

/// A call's entry in the [`WaitQueue`]. Dropping it removes the call.
#[derive(Debug)]
pub(crate) struct Entry {
    queue: Arc<WaitQueue>,
    key: Key,
    id: LeaseId,
    number: u64,
    ended: oneshot::Receiver<Arc<Snapshot>>,
}

impl Entry {
    /// Waits until a record ends the wait, and returns that record.
    pub(crate) async fn ended(&mut self) -> Arc<Snapshot> {
        match (&mut self.ended).await {
            Ok(snapshot) => snapshot,
            // Unreachable: an unused sender is dropped only when this entry is.
            Err(_) => std::future::pending().await,
        }
    }

    /// Returns the record of the key that was seen last.
    pub(crate) fn latest(&self) -> Option<Arc<Snapshot>> {
        self.queue.state().keys.get(&self.key)?.latest.clone()
    }

    /// Returns when the call last asked for a new waiter's entry, if it ever did.
    pub(crate) fn rejoined_at(&self) -> Option<Instant> {
        self.queue.state().keys.get(&self.key)?.groups.get(&self.id)?.rejoined_at
    }

    /// Removes the call. Returns whether other calls go on waiting with its id.
    pub(crate) fn leave(self) -> bool {
        self.remove()
    }

    fn remove(&self) -> bool {
        let mut state = self.queue.state();
        let Some(key_queue) = state.keys.get_mut(&self.key) else { return false };
        let Some(group) = key_queue.groups.get_mut(&self.id) else { return false };
        let before = group.calls.len();
        group.calls.retain(|call| call.number != self.number);
        let removed = before - group.calls.len();
        let others = !group.calls.is_empty();
        if !others {
            key_queue.groups.remove(&self.id);
        }
        state.calls -= removed;
        self.queue.remove_if_empty(&mut state, &self.key);
        others
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.remove();
    }
}

impl WaitQueue {
    /// Creates the queue of a daemon in which at most `limit` calls may wait.
    pub(crate) fn new(store: &impl Store, limit: usize) -> Self {
        Self {
            rules: store.rules(),
            interval: PollInterval::of(store),
            limit,
            state: Mutex::default(),
            nudges: Schedule::default(),
            polls: Schedule::default(),
        }
    }

    /// Enters a call. Returns `None` if too many calls wait.
    ///
    /// To be called before the call's first commit: a record that ends the wait may follow right
    /// after that commit.
    pub(crate) fn enter(self: &Arc<Self>, key: &Key, acquisition: &Arc<Acquisition>) -> Option<Entry> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.state();
        if state.calls >= self.limit {
            return None;
        }
        state.calls += 1;
        state.last_number += 1;
        let number = state.last_number;
        let State { keys, calls, .. } = &mut *state;
        let key_queue = keys.entry(key.clone()).or_insert_with(|| {
            let key_queue = KeyQueue::new(self.interval, *calls);
            self.polls.shift(key, None, Some(key_queue.poll_at));
            key_queue
        });
        let group = key_queue.groups.entry(acquisition.id).or_insert_with(|| CallGroup::new(acquisition));
        group.calls.push(WaitingCall { number, ended: sender });
        drop(state);
        Some(Entry { queue: Arc::clone(self), key: key.clone(), id: acquisition.id, number, ended: receiver })
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Notes the record after a commit of this daemon, and ends the waits that it shows to be over.
    pub(crate) fn local_commit(&self, snapshot: &Arc<Snapshot>) {
        let mut state = self.state();
        let key = &snapshot.record.key;
        let Some(key_queue) = self.note(&mut state, snapshot) else { return };
        let holders = snapshot.record.holders.iter().map(|holder| holder.id);
        let departed = snapshot.record.departures.iter().map(|departure| departure.id);
        let ended: usize = holders.chain(departed).map(|id| key_queue.end(id, snapshot)).sum();
        state.calls -= ended;
        self.remove_if_empty(&mut state, key);
    }

    /// Notes a record that another daemon may have written, and returns what to commit.
    ///
    /// A lease that another daemon granted to a waiting call is claimed before the call is
    /// answered, so that its whole TTL is left. A call whose waiter's entry is gone asks for a new
    /// one.
    pub(crate) fn remote_read(&self, snapshot: &Arc<Snapshot>) -> Vec<(Key, Op)> {
        let mut state = self.state();
        let key = &snapshot.record.key;
        let latest = state.keys.get(key).and_then(|key_queue| key_queue.latest.as_ref());
        // A newer record has been seen since this one was read.
        if latest.is_some_and(|latest| latest.record.version() > snapshot.record.version()) {
            return Vec::new();
        }
        let Some(key_queue) = self.note(&mut state, snapshot) else { return Vec::new() };
        let record = &snapshot.record;
        // A departed id is not granted again, so these waits end without another commit.
        let ended: usize =
            record.departures.iter().map(|departure| key_queue.end(departure.id, snapshot)).sum();
        let waiters: HashSet<LeaseId> = record.waiters.iter().map(|waiter| waiter.acquisition.id).collect();
        let not_waiting = key_queue.groups.iter_mut().filter(|(id, _)| !waiters.contains(id));
        let claim_or_rejoin = |(id, group): (&LeaseId, &mut CallGroup)| {
            let holds = record.holders.iter().any(|holder| holder.id == *id);
            (key.clone(), if holds { group.claim(*id) } else { group.rejoin() })
        };
        let ops = not_waiting.map(claim_or_rejoin).collect();
        state.calls -= ended;
        self.remove_if_empty(&mut state, key);
        ops
    }

    /// Notes that a read found no record of the key, and returns what to commit: the key's calls
    /// ask for new waiters' entries.
    pub(crate) fn remote_missing(&self, key: &Key) -> Vec<(Key, Op)> {
        let mut state = self.state();
        let Some(key_queue) = state.keys.get_mut(key) else { return Vec::new() };
        key_queue.groups.values_mut().map(|group| (key.clone(), group.rejoin())).collect()
    }

    /// Returns the operation that asks for a new waiter's entry, if calls still wait with this id.
    pub(crate) fn rejoin(&self, key: &Key, id: LeaseId) -> Option<Op> {
        Some(self.state().keys.get_mut(key)?.groups.get_mut(&id)?.rejoin())
    }

    /// Returns true if calls wait for the key and revision `rev` of its record has not been seen.
    /// Without `rev`: if calls wait for the key.
    pub(crate) fn needs_read(&self, key: &Key, rev: Option<i64>) -> bool {
        let state = self.state();
        let Some(key_queue) = state.keys.get(key) else { return false };
        let seen = key_queue.latest.as_ref().map(|latest| latest.record.rev);
        rev.is_none() || seen < rev
    }

    /// Whether a call with this id waits for the key.
    pub(crate) fn has(&self, key: &Key, id: LeaseId) -> bool {
        self.state().keys.get(key).is_some_and(|key_queue| key_queue.groups.contains_key(&id))
    }

    /// Returns the keys for which calls wait.
    pub(crate) fn keys(&self) -> Vec<Key> {
        self.state().keys.keys().cloned().collect()
    }

    /// Ends the wait of the calls with this id, because the record has no room for their waiter's
    /// entry.
    pub(crate) fn give_up(&self, id: LeaseId, snapshot: &Arc<Snapshot>) {
        let key = &snapshot.record.key;
        let mut state = self.state();
        let Some(key_queue) = state.keys.get_mut(key) else { return };
        let ended = key_queue.end(id, snapshot);
        state.calls -= ended;
        self.remove_if_empty(&mut state, key);
    }

    /// Waits until a nudge is due.
    pub(crate) async fn nudge_due(&self) {
        self.nudges.reached().await;
    }

    /// Waits until a poll is due.
    pub(crate) async fn poll_due(&self) {
        self.polls.reached().await;
    }

    /// Takes the keys to nudge by `now`, at most a chunk of them.
    pub(crate) fn take_nudges(&self, now: Instant) -> Vec<Key> {
        let mut state = self.state();
        let keys = self.nudges.take(now);
        for key in &keys {
            if let Some(key_queue) = state.keys.get_mut(key) {
                key_queue.nudge_at = None;
            }
        }
        keys
    }

    /// Takes the polls that are due by `now`, of at most a chunk of keys, and schedules the next
    /// poll of each key.
    pub(crate) fn take_polls(&self, now: Instant) -> DuePolls {
        let mut state = self.state();
        let mut polls = DuePolls::default();
        let calls = state.calls;
        for key in self.polls.take(now) {
            let Some(key_queue) = state.keys.get_mut(&key) else { continue };
            key_queue.poll_at = now + self.interval.poll(calls);
            self.polls.shift(&key, None, Some(key_queue.poll_at));
            if key_queue.refresh_at <= now {
                key_queue.refresh_at = now + self.interval.refresh(calls);
                polls.refreshes.extend(key_queue.refreshes().map(|(id, op)| (id, (key.clone(), op))));
            } else {
                polls.reads.push(key);
            }
        }
        polls
    }

    /// Notes a record and schedules the key's nudge. Returns the key's queue, if calls wait for the
    /// key.
    fn note<'a>(&self, state: &'a mut State, snapshot: &Arc<Snapshot>) -> Option<&'a mut KeyQueue> {
        let key = &snapshot.record.key;
        let key_queue = state.keys.get_mut(key)?;
        let nudge_at = snapshot.next_admission(&self.rules).map(|time| Instant::now() + time);
        self.nudges.shift(key, key_queue.nudge_at, nudge_at);
        key_queue.nudge_at = nudge_at;
        key_queue.latest = Some(Arc::clone(snapshot));
        Some(key_queue)
    }

    /// Removes a key for which no call waits.
    fn remove_if_empty(&self, state: &mut State, key: &Key) {
        if state.keys.get(key).is_some_and(|key_queue| key_queue.groups.is_empty())
            && let Some(KeyQueue { nudge_at, poll_at, .. }) = state.keys.remove(key)
        {
            self.nudges.shift(key, nudge_at, None);
            self.polls.shift(key, Some(poll_at), None);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics half-way through a change under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeyQueue {
    fn new(interval: PollInterval, calls: usize) -> Self {
        let now = Instant::now();
        Self {
            groups: HashMap::new(),
            latest: None,
            nudge_at: None,
            poll_at: now + interval.poll(calls),
            refresh_at: now + interval.refresh(calls),
        }
    }

    /// Ends the wait of all calls with this id, and returns how many there were.
    fn end(&mut self, id: LeaseId, snapshot: &Arc<Snapshot>) -> usize {
        let calls = self.groups.remove(&id).map(|group| group.calls).unwrap_or_default();
        let count = calls.len();
        for call in calls {
            // The call may just have been dropped.
            let _ = call.ended.send(Arc::clone(snapshot));
        }
        count
    }

    /// Returns the operations that keep the waiters' entries of all calls.
    fn refreshes(&self) -> impl Iterator<Item = (LeaseId, Op)> {
        self.groups.iter().map(|(id, group)| (*id, Op::Refresh(*id, Arc::downgrade(&group.liveness))))
    }
}

impl CallGroup {
    fn new(acquisition: &Arc<Acquisition>) -> Self {
        let acquisition = Arc::clone(acquisition);
        Self { acquisition, liveness: Arc::new(Liveness), rejoined_at: None, calls: Vec::new() }
    }

    /// Returns the operation that claims a lease which another daemon granted.
    fn claim(&mut self, id: LeaseId) -> Op {
        // Calls that have rejoined ask again instead, so that the record shows a repeated
        // acquisition. Otherwise a delayed command could be granted another lease after this one is
        // over.
        if self.rejoined_at.is_some() { self.rejoin() } else { Op::Claim(id, Arc::downgrade(&self.liveness)) }
    }

    /// Returns the operation that asks for a new waiter's entry.
    fn rejoin(&mut self) -> Op {
        self.rejoined_at = Some(Instant::now());
        Op::Rejoin(Arc::clone(&self.acquisition), Arc::downgrade(&self.liveness))
    }
}

/// The polls that are due.
#[derive(Debug, Default)]
pub(crate) struct DuePolls {
    /// The keys whose records to read.
    pub(crate) reads: Vec<Key>,
    /// The waiters' entries to refresh, with the operations for it.
    pub(crate) refreshes: Vec<(LeaseId, (Key, Op))>,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt;

    use super::schedule::CHUNK;
    use super::*;
    use crate::lease::{Edit, Record, Timestamp, step};
    use crate::store::embedded::EmbeddedStore;

    /// A key that `holder` holds and `waiter` waits for.
    fn snapshot(key: Key, holder: Acquisition, waiter: Arc<Acquisition>, rules: &Rules) -> Snapshot {
        let edit = Edit::default().enqueue(Arc::new(holder)).enqueue(waiter);
        let now = Timestamp(1_000_000);
        Snapshot { record: step(Record::vacant(key), &edit, now, rules), now }
    }

    #[tokio::test]
    async fn many_keys_are_polled_in_chunks_and_each_key_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let rules = Rules { grace: Duration::ZERO, waiter_ttl: Duration::from_secs(15) };
        let store = EmbeddedStore::open(folder.path(), rules).await.expect("a usable folder");
        let queue = Arc::new(WaitQueue::new(&store, usize::MAX));
        let enter = |number| {
            let key = Key::try_from(format!("key/{number}").as_str()).expect("a key");
            let waiter = Arc::new(Acquisition::waiting(LeaseId::random()));
            let entry = queue.enter(&key, &waiter).expect("room");
            let holder = Acquisition::waiting(LeaseId::random());
            queue.local_commit(&Arc::new(snapshot(key, holder, waiter, &rules)));
            entry
        };
        let entries: Vec<Entry> = (0..=2 * CHUNK).map(enter).collect();

        let later = Instant::now() + rules.waiter_ttl;
        let chunks = |take: &dyn Fn() -> usize| {
            std::iter::repeat_with(take).take_while(|keys| *keys > 0).collect::<Vec<_>>()
        };
        assert_eq!(chunks(&|| queue.take_polls(later).refreshes.len()), [CHUNK, CHUNK, 1]);
        assert_eq!(chunks(&|| queue.take_nudges(later).len()), [CHUNK, CHUNK, 1]);
        assert!(queue.poll_due().now_or_never().is_none(), "the next polls are due later");
        assert!(queue.nudge_due().now_or_never().is_none());

        entries.iter().for_each(|entry| assert!(entry.latest().is_some()));
        drop(entries);
        let state = queue.state();
        assert!(state.keys.is_empty() && state.calls == 0);
        assert!(queue.polls.is_empty() && queue.nudges.is_empty());
    }

    #[tokio::test]
    async fn a_grant_by_another_daemon_is_claimed_with_a_touch_while_its_call_waits() {
        let folder = tempfile::tempdir().expect("a folder");
        let rules = Rules { grace: Duration::ZERO, waiter_ttl: Duration::from_secs(15) };
        let store = EmbeddedStore::open(folder.path(), rules).await.expect("a usable folder");
        let queue = Arc::new(WaitQueue::new(&store, usize::MAX));
        let key = Key::try_from("key").expect("a key");
        let [mine, next] = [(); 2].map(|()| Acquisition::waiting(LeaseId::random()));
        let mut entry = queue.enter(&key, &Arc::new(mine.clone())).expect("room");
        let granted = Arc::new(snapshot(key.clone(), mine.clone(), Arc::new(next), &rules));

        let claims = queue.remote_read(&granted);
        assert!(matches!(&claims[..], [(_, Op::Claim(id, _))] if *id == mine.id), "{claims:?}");
        assert!(!claims[0].1.is_obsolete());
        assert!(entry.ended().now_or_never().is_none(), "the wait ends only once the lease is claimed");
        drop(entry);
        assert!(claims[0].1.is_obsolete(), "the call has ended");
        assert!(queue.remote_read(&granted).is_empty());
    }
}
