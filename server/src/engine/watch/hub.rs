//! The watches of this daemon, and the changes that each of them has yet to report.
//!
//! Each watch has a queue of changes. The records that this daemon sees fill the queue, and the
//! watch's stream empties it. A watch that is too slow loses its queue and begins again with a
//! snapshot. So memory is bounded, and the client learns that it missed changes. All watches of a
//! key share the record seen last.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

use super::diff::{ChangeKind, Previous, changes};
use super::seen::SeenRecords;
use crate::lease::{Departure, Key, Record, Snapshot};

/// The most changes in a queue.
const QUEUE: usize = 4096;
/// The most bytes that the records in a queue take, as [`size`] counts them.
const QUEUE_BYTES: usize = 4 * 1024 * 1024;

/// How many keys are gone through under one lock after a watch has ended.
const FORGET_CHUNK: usize = 256;

/// All watches of this daemon.
#[derive(Debug)]
pub(crate) struct WatchHub {
    /// The most watches.
    limit: usize,
    /// How many watches there are. Outside of the lock, because every commit reads the number, and
    /// most of the time there are none.
    count: AtomicUsize,
    state: Mutex<State>,
    /// Notified when the background task has work earlier than it expects.
    earlier: Notify,
}

#[derive(Debug, Default)]
struct State {
    watchers: BTreeMap<u64, Watcher>,
    last_number: u64,
    seen: SeenRecords,
    /// Watches that have ended, and whose keys are still to be forgotten.
    ended: VecDeque<EndedWatch>,
    /// Changes may have been missed, so all watched keys are to be read.
    is_stale: bool,
}

/// A watch that has ended. The keys that no other watch covers are forgotten, a few at a time.
#[derive(Debug)]
struct EndedWatch {
    prefix: String,
    /// The last key that was gone through.
    after: Option<Key>,
}

/// One watch, as the hub keeps it.
#[derive(Debug)]
struct Watcher {
    prefix: String,
    started: Instant,
    queue: VecDeque<(ChangeKind, Arc<Snapshot>)>,
    /// The size of the records in the queue.
    bytes: usize,
    /// The watch was too slow and has lost its queue.
    is_behind: bool,
    wake: Arc<Notify>,
}

/// One watch, as its stream keeps it. Dropping it ends the watch.
#[derive(Debug)]
pub(crate) struct Subscription {
    hub: Arc<WatchHub>,
    number: u64,
    wake: Arc<Notify>,
}

/// What a watch is to do next.
#[derive(Debug)]
pub(crate) enum WatcherEvent {
    /// Report this change.
    Change(ChangeKind, Arc<Snapshot>),
    /// Begin again with a snapshot, because changes were lost.
    FellBehind,
}

impl WatchHub {
    /// Creates the hub of a daemon that may have `limit` watches.
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, count: AtomicUsize::new(0), state: Mutex::default(), earlier: Notify::new() }
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Begins a watch, and queues all changes for it from now on. Returns `None` if there are too
    /// many watches.
    pub(crate) fn begin(self: &Arc<Self>, prefix: String) -> Option<Subscription> {
        let mut state = self.state();
        if state.watchers.len() >= self.limit {
            return None;
        }
        state.last_number += 1;
        let number = state.last_number;
        let wake = Arc::new(Notify::new());
        let (queue, started) = (VecDeque::new(), Instant::now());
        let watcher = Watcher { prefix, started, queue, bytes: 0, is_behind: false, wake: Arc::clone(&wake) };
        state.watchers.insert(number, watcher);
        self.count.store(state.watchers.len(), Ordering::SeqCst);
        Some(Subscription { hub: Arc::clone(self), number, wake })
    }

    /// Notes a record, unless a later one has been seen.
    pub(crate) fn observe(&self, snapshot: &Arc<Snapshot>) {
        if self.count.load(Ordering::SeqCst) > 0 {
            self.update(|state| state.observe(snapshot));
        }
    }

    /// Notes that a read which began at `asked_at` found no record of the key.
    pub(crate) fn remote_missing(&self, key: &Key, asked_at: Instant) {
        self.update(|state| {
            // A record that was seen during the read may be newer than its answer.
            let Some(before) = state.seen.get(key).filter(|seen| seen.seen_at < asked_at) else { return };
            let vacant = Snapshot { record: Record::vacant(key.clone()), now: before.snapshot.now };
            state.report(&Arc::new(vacant));
        });
    }

    /// Returns true if the key is watched and revision `rev` of its record has not been seen.
    /// Without `rev`: if the key is watched.
    pub(crate) fn needs_read(&self, key: &Key, rev: Option<i64>) -> bool {
        if self.count.load(Ordering::SeqCst) == 0 {
            return false;
        }
        let state = self.state();
        let seen = state.seen.get(key).map(|seen| seen.snapshot.record.rev);
        state.is_watched(key) && (rev.is_none() || seen < rev)
    }

    /// Marks all watched keys to be read again, because changes may have been missed.
    pub(crate) fn rebuild(&self) {
        let mut state = self.state();
        state.is_stale = !state.watchers.is_empty();
        self.earlier.notify_one();
    }

    /// Returns when the next read is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let state = self.state();
        if state.is_stale { Some(Instant::now()) } else { state.seen.next_due() }
    }

    /// Forgets some of the keys that are not watched any more. Returns whether there may be others.
    pub(crate) fn forget_unwatched(&self) -> bool {
        let mut state = self.state();
        let State { watchers, seen, ended, .. } = &mut *state;
        let Some(EndedWatch { prefix, after }) = ended.front_mut() else { return false };
        let is_watched = |key: &Key| watchers.values().any(|watcher| watcher.watches(key));
        *after = seen.forget_unwatched(prefix, after.as_ref(), FORGET_CHUNK, is_watched);
        if after.is_none() {
            ended.pop_front();
        }
        !ended.is_empty()
    }

    /// Waits until the background task has work earlier than it expects.
    pub(crate) async fn earlier(&self) {
        self.earlier.notified().await;
    }

    /// Takes the keys to poll by `now`: as far as this daemon knows, the leases of their holders
    /// have run out.
    pub(crate) fn take_due(&self, now: Instant) -> Vec<Key> {
        self.state().seen.take_due(now)
    }

    /// If changes may have been missed, returns the prefixes to list and the keys to read. The keys
    /// may be free by now, and then no listing contains them.
    ///
    /// Neither the listing nor the read finds a lease that was granted and ended meanwhile on a key
    /// that was free before.
    pub(crate) fn take_stale(&self) -> Option<(Vec<String>, Vec<Key>)> {
        let mut state = self.state();
        std::mem::take(&mut state.is_stale).then(|| {
            let mut prefixes: Vec<String> = Vec::new();
            let all: BTreeSet<&String> = state.watchers.values().map(|watcher| &watcher.prefix).collect();
            // Skips prefixes that another prefix covers. In this order they follow that prefix.
            for prefix in all {
                if prefixes.last().is_none_or(|last| !prefix.starts_with(last)) {
                    prefixes.push(prefix.clone());
                }
            }
            (prefixes, state.seen.occupied())
        })
    }

    /// Changes the state, and wakes the background task if a key is due earlier than before.
    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        let before = state.seen.next_due();
        change(&mut state);
        let after = state.seen.next_due();
        if after.is_some() && (before.is_none() || after < before) {
            self.earlier.notify_one();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics half-way through a change under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_watched(&self, key: &Key) -> bool {
        self.watchers.values().any(|watcher| watcher.watches(key))
    }

    fn observe(&mut self, snapshot: &Arc<Snapshot>) {
        let record = &snapshot.record;
        let is_new = match self.seen.get(&record.key).map(|seen| &seen.snapshot) {
            Some(seen) => (record.version(), snapshot.now) >= (seen.record.version(), seen.now),
            // A key without a record has revision 0.
            None => record.rev > 0,
        };
        if is_new && self.is_watched(&record.key) {
            self.report(snapshot);
        }
    }

    /// Queues the changes that a record shows, and keeps the record.
    fn report(&mut self, snapshot: &Arc<Snapshot>) {
        let key = &snapshot.record.key;
        let before = self.seen.get(key);
        let changes = changes(
            before.map(|seen| Previous { record: &seen.snapshot.record, has_lapsed: seen.has_lapsed }),
            snapshot,
        );
        let seen_at = before.map(|seen| seen.seen_at);
        let forgotten_until = self.seen.forgotten_until();
        for watcher in self.watchers.values_mut().filter(|watcher| watcher.watches(key)) {
            // If the key was not seen before, or was seen last for an earlier watch, some changes
            // may be older than this watch. It does not report them.
            let begun = || snapshot.now.0.saturating_sub(millis_since(watcher.started));
            let since = match seen_at {
                None => Some(forgotten_until.max(begun())),
                Some(seen_at) if seen_at < watcher.started => Some(begun()),
                Some(_) => None,
            };
            for (kind, at) in &changes {
                if since.is_none_or(|since| at.0 > since) {
                    watcher.push(*kind, snapshot);
                }
            }
        }
        self.seen.note(snapshot);
    }
}

/// Returns the milliseconds since `instant`, and two more: this clock and the store's are both read
/// in whole milliseconds.
fn millis_since(instant: Instant) -> i64 {
    i64::try_from(instant.elapsed().as_millis()).unwrap_or(i64::MAX).saturating_add(2)
}

/// Returns the memory that a record takes, in bytes.
fn size(snapshot: &Snapshot) -> usize {
    let record = &snapshot.record;
    // `Record::size` leaves departures out. They may be most of a record: there may be over a
    // thousand.
    let departures = record.departures.capacity() * size_of::<Departure>();
    size_of::<Snapshot>() + record.key.as_str().len() + record.size() + departures
}

impl Watcher {
    fn watches(&self, key: &Key) -> bool {
        key.as_str().starts_with(&self.prefix)
    }

    fn push(&mut self, kind: ChangeKind, snapshot: &Arc<Snapshot>) {
        if self.is_behind {
            return;
        }
        self.bytes += size(snapshot);
        self.queue.push_back((kind, Arc::clone(snapshot)));
        if self.queue.len() > QUEUE || self.bytes > QUEUE_BYTES {
            self.clear();
            self.is_behind = true;
        }
        self.wake.notify_one();
    }

    fn clear(&mut self) {
        self.queue = VecDeque::new();
        self.bytes = 0;
    }
}

impl Subscription {
    /// Notes the records of a page. Returns the records to show for the page: the ones that were
    /// seen last, without free keys.
    pub(crate) fn page(&self, page: Vec<Snapshot>) -> Vec<Arc<Snapshot>> {
        let mut shown = Vec::with_capacity(page.len());
        self.hub.update(|state| {
            for snapshot in page {
                let snapshot = Arc::new(snapshot);
                state.observe(&snapshot);
                let seen = state.seen.get(&snapshot.record.key);
                shown.push(seen.map_or(snapshot, |seen| Arc::clone(&seen.snapshot)));
            }
            if let Some(watcher) = state.watchers.get_mut(&self.number) {
                // The queued changes of these keys are older than the records shown, so they are
                // dropped.
                let keys: HashSet<&Key> = shown.iter().map(|snapshot| &snapshot.record.key).collect();
                watcher.queue.retain(|(_, snapshot)| !keys.contains(&snapshot.record.key));
                watcher.bytes = watcher.queue.iter().map(|(_, snapshot)| size(snapshot)).sum();
            }
        });
        shown.retain(|snapshot| !snapshot.record.is_free(snapshot.now));
        shown
    }

    /// Drops the queue: the watch begins with the next change.
    pub(crate) fn begin_here(&self) {
        if let Some(watcher) = self.hub.state().watchers.get_mut(&self.number) {
            watcher.clear();
            watcher.is_behind = false;
            watcher.started = Instant::now();
        }
    }

    /// Waits for the next event.
    pub(crate) async fn next(&self) -> WatcherEvent {
        loop {
            if let Some(event) = self.try_next() {
                return event;
            }
            self.wake.notified().await;
        }
    }

    fn try_next(&self) -> Option<WatcherEvent> {
        let mut state = self.hub.state();
        let watcher = state.watchers.get_mut(&self.number)?;
        if std::mem::take(&mut watcher.is_behind) {
            return Some(WatcherEvent::FellBehind);
        }
        let (kind, snapshot) = watcher.queue.pop_front()?;
        watcher.bytes -= size(&snapshot);
        Some(WatcherEvent::Change(kind, snapshot))
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // Commits need this lock. So keys are forgotten later, and the records that the last watch
        // leaves are freed after unlocking.
        let seen = {
            let mut state = self.hub.state();
            let Some(watcher) = state.watchers.remove(&self.number) else { return };
            self.hub.count.store(state.watchers.len(), Ordering::SeqCst);
            if state.watchers.is_empty() {
                state.ended.clear();
                std::mem::take(&mut state.seen)
            } else {
                // Watches may end faster than their keys are forgotten. Past the limit one entry
                // with an empty prefix stands for all of them: it goes through all keys.
                let prefix = if state.ended.len() < self.hub.limit {
                    watcher.prefix
                } else {
                    state.ended.clear();
                    String::new()
                };
                state.ended.push_back(EndedWatch { prefix, after: None });
                self.hub.earlier.notify_one();
                SeenRecords::default()
            }
        };
        drop(seen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Acquisition, Edit, LeaseId, Reason, Rules, Timestamp, step};

    fn held(key: &str) -> Arc<Snapshot> {
        let rules =
            Rules { grace: std::time::Duration::ZERO, waiter_ttl: std::time::Duration::from_secs(15) };
        let edit = Edit::default().enqueue(Arc::new(Acquisition::waiting(LeaseId::random())));
        let (key, now) = (Key::try_from(key).expect("a key"), Timestamp(1_000_000));
        Arc::new(Snapshot { record: step(Record::vacant(key), &edit, now, &rules), now })
    }

    #[tokio::test(start_paused = true)]
    async fn keys_that_are_not_watched_any_more_are_forgotten_a_few_at_a_time() {
        let hub = Arc::new(WatchHub::new(10));
        let all = hub.begin("job/".to_owned()).expect("room");
        let some = hub.begin("job/7".to_owned()).expect("room");
        (0..1000).for_each(|number| hub.observe(&held(&format!("job/{number}"))));
        drop(all);
        assert_eq!(hub.state().seen.len(), 1000, "a watch that ends goes through no keys itself");
        let mut before = 1000;
        while hub.forget_unwatched() {
            let left = hub.state().seen.len();
            assert!(before - left <= FORGET_CHUNK, "{before} and then {left}");
            before = left;
        }
        assert_eq!(hub.state().seen.len(), 111, "the keys that another watch covers");
        drop(some);
        assert_eq!(hub.state().seen.len(), 0);
    }

    #[tokio::test]
    async fn a_queue_is_bounded_by_the_memory_that_its_records_take() {
        let hub = Arc::new(WatchHub::new(1));
        let subscription = hub.begin(String::new()).expect("room");
        let at = Timestamp(1_000_000);
        let departure = || Departure { id: LeaseId::random(), reason: Reason::Released, at, lasting: true };
        let mut pushed = 0;
        // Records of free keys, each with as many departures as a record may have.
        while !matches!(subscription.try_next(), Some(WatcherEvent::FellBehind)) {
            let mut state = hub.state();
            let watcher = state.watchers.values_mut().next().expect("a watch");
            while !watcher.is_behind {
                let departures = (0..1024).map(|_| departure()).collect();
                let record = Record { departures, ..Record::vacant(Key::try_from("job").expect("a key")) };
                watcher.push(ChangeKind::Released, &Arc::new(Snapshot { record, now: at }));
                pushed += 1;
            }
        }
        assert!(pushed * 1024 * size_of::<Departure>() <= QUEUE_BYTES + 64 * 1024, "{pushed} records");
    }

    #[tokio::test(start_paused = true)]
    async fn watches_that_have_ended_are_bounded_by_the_limit_on_watches() {
        let hub = Arc::new(WatchHub::new(3));
        let _stays = hub.begin("other".to_owned()).expect("room");
        for number in 0..20 {
            drop(hub.begin(number.to_string()).expect("room"));
            assert!(hub.state().ended.len() <= 3);
        }
        while hub.forget_unwatched() {}
        assert!(hub.state().ended.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_watch_reports_no_change_from_between_an_earlier_watch_and_its_own_beginning() {
        let hub = Arc::new(WatchHub::new(3));
        let _other = hub.begin("other".to_owned()).expect("room");
        let earlier = hub.begin("job".to_owned()).expect("room");
        let first = held("job");
        hub.observe(&first);
        drop(earlier);
        tokio::time::advance(std::time::Duration::from_secs(5)).await;
        let subscription = hub.begin("job".to_owned()).expect("room");
        let mut record = first.record.clone();
        let rules =
            Rules { grace: std::time::Duration::ZERO, waiter_ttl: std::time::Duration::from_secs(15) };
        // Released before the new watch began, and acquired again afterwards.
        record = step(
            record.clone(),
            &Edit::default().release(record.holders[0].id),
            Timestamp(1_004_000),
            &rules,
        );
        let edit = Edit::default().enqueue(Arc::new(Acquisition::waiting(LeaseId::random())));
        tokio::time::advance(std::time::Duration::from_secs(1)).await;
        let now = Timestamp(1_006_000);
        hub.observe(&Arc::new(Snapshot { record: step(record, &edit, now, &rules), now }));
        assert!(matches!(subscription.try_next(), Some(WatcherEvent::Change(ChangeKind::Granted, _))));
        assert!(subscription.try_next().is_none());
    }
}
