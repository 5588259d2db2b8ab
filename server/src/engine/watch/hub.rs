//! Those who watch keys by prefix: what is known of the keys, and what each watcher has still to be told.
//!
//! A watcher has a queue, filled from the records that pass and emptied by its own stream. One that does not keep up
//! loses its queue and begins anew with a snapshot, so memory stays bounded and the watcher learns that it lost changes.
//! What is known of a key is shared by all who watch it.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

use super::diff::{Before, ChangeKind, changes};
use super::seen::Known;
use crate::lease::{Departure, Key, Record, Snapshot};

/// Changes that a queue holds.
const QUEUE: usize = 4096;
/// Bytes of the records in a queue, as [`size`] counts.
const QUEUE_BYTES: usize = 4 * 1024 * 1024;

/// Keys that are gone through in one go after a watch has ended.
const TIDIED: usize = 256;

/// The watchers of this daemon.
#[derive(Debug)]
pub(crate) struct Watchers {
    limit: usize,
    /// How many there are; none, most of the time, and then nobody need take the lock.
    count: AtomicUsize,
    state: Mutex<State>,
    /// Rings when there is something to look at earlier than was thought.
    sooner: Notify,
}

#[derive(Debug, Default)]
struct State {
    watchers: BTreeMap<u64, Watcher>,
    last_number: u64,
    known: Known,
    /// What ended watches leave to be forgotten.
    ended: VecDeque<Ended>,
    /// Changes may have been missed.
    is_stale: bool,
}

/// A watch that has ended: the keys with its prefix that nobody else watches are forgotten, a few at a time.
#[derive(Debug)]
struct Ended {
    prefix: String,
    /// How far that has come.
    after: Option<Key>,
}

#[derive(Debug)]
struct Watcher {
    prefix: String,
    started: Instant,
    queue: VecDeque<(ChangeKind, Arc<Snapshot>)>,
    bytes: usize,
    /// It has lost its queue.
    is_behind: bool,
    wake: Arc<Notify>,
}

/// A watcher's own side; dropping it ends the watch.
#[derive(Debug)]
pub(crate) struct Watching {
    watchers: Arc<Watchers>,
    number: u64,
    wake: Arc<Notify>,
}

/// What a watcher is told next.
#[derive(Debug)]
pub(crate) enum Told {
    Change(ChangeKind, Arc<Snapshot>),
    /// It was too slow, and begins anew with a snapshot.
    FellBehind,
}

impl Watchers {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, count: AtomicUsize::new(0), state: Mutex::default(), sooner: Notify::new() }
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Begins a watch; what happens from here on is queued. `None`: too many watch.
    pub(crate) fn begin(self: &Arc<Self>, prefix: String) -> Option<Watching> {
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
        Some(Watching { watchers: Arc::clone(self), number, wake })
    }

    /// Takes note of a record, unless a later one is known.
    pub(crate) fn observe(&self, snapshot: &Arc<Snapshot>) {
        if self.count.load(Ordering::SeqCst) > 0 {
            self.change(|state| state.observe(snapshot));
        }
    }

    /// Takes note that a read that began at `asked_at` found no record of the key.
    pub(crate) fn missing(&self, key: &Key, asked_at: Instant) {
        self.change(|state| {
            let Some(before) = state.known.get(key).filter(|known| known.seen_at < asked_at) else { return };
            let vacant = Snapshot { record: Record::vacant(key.clone()), now: before.snapshot.now };
            state.learn(&Arc::new(vacant));
        });
    }

    /// Whether anyone watches the key, and has not seen its record as of `rev`.
    pub(crate) fn wants(&self, key: &Key, rev: Option<i64>) -> bool {
        if self.count.load(Ordering::SeqCst) == 0 {
            return false;
        }
        let state = self.state();
        let seen = state.known.get(key).map(|known| known.snapshot.record.rev);
        state.is_watched(key) && (rev.is_none() || seen < rev)
    }

    /// Has every watched key looked at anew.
    pub(crate) fn rebuild(&self) {
        let mut state = self.state();
        state.is_stale = !state.watchers.is_empty();
        self.sooner.notify_one();
    }

    /// When a key is to be looked at next, if any is.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let state = self.state();
        if state.is_stale { Some(Instant::now()) } else { state.known.next_due() }
    }

    /// Forgets some of the keys that nobody watches any more, and returns whether there may be others.
    pub(crate) fn tidy(&self) -> bool {
        let mut state = self.state();
        let State { watchers, known, ended, .. } = &mut *state;
        let Some(Ended { prefix, after }) = ended.front_mut() else { return false };
        let is_watched = |key: &Key| watchers.values().any(|watcher| watcher.watches(key));
        *after = known.tidy(prefix, after.as_ref(), TIDIED, is_watched);
        if after.is_none() {
            ended.pop_front();
        }
        !ended.is_empty()
    }

    /// Returns when there may be something to look at earlier than was thought.
    pub(crate) async fn sooner(&self) {
        self.sooner.notified().await;
    }

    /// Held keys whose time is over by `now`, as far as is known.
    pub(crate) fn take_due(&self, now: Instant) -> Vec<Key> {
        self.state().known.take_due(now)
    }

    /// If changes may have been missed: all prefixes to list, and the keys to look at for those that are in no listing
    /// any more. A lease that came and went meanwhile on a key that was free before is found by neither.
    pub(crate) fn take_stale(&self) -> Option<(Vec<String>, Vec<Key>)> {
        let mut state = self.state();
        std::mem::take(&mut state.is_stale).then(|| {
            let mut prefixes: Vec<String> = Vec::new();
            let all: BTreeSet<&String> = state.watchers.values().map(|watcher| &watcher.prefix).collect();
            // In this order a prefix comes right before those that it covers.
            for prefix in all {
                if prefixes.last().is_none_or(|last| !prefix.starts_with(last)) {
                    prefixes.push(prefix.clone());
                }
            }
            (prefixes, state.known.taken())
        })
    }

    /// Changes the state, and wakes who looks at keys if one is due earlier than before.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        let before = state.known.next_due();
        change(&mut state);
        let after = state.known.next_due();
        if after.is_some() && (before.is_none() || after < before) {
            self.sooner.notify_one();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_watched(&self, key: &Key) -> bool {
        self.watchers.values().any(|watcher| watcher.watches(key))
    }

    fn observe(&mut self, snapshot: &Arc<Snapshot>) {
        let record = &snapshot.record;
        let is_news = match self.known.get(&record.key).map(|known| &known.snapshot) {
            Some(known) => (record.version(), snapshot.now) >= (known.record.version(), known.now),
            // Without a revision there is no record.
            None => record.rev > 0,
        };
        if is_news && self.is_watched(&record.key) {
            self.learn(snapshot);
        }
    }

    /// Tells what is new, and remembers it.
    fn learn(&mut self, snapshot: &Arc<Snapshot>) {
        let key = &snapshot.record.key;
        let before = self.known.get(key);
        let news = changes(
            before.map(|known| Before { record: &known.snapshot.record, has_lapsed: known.has_lapsed }),
            snapshot,
        );
        let seen_at = before.map(|known| known.seen_at);
        let forgotten = self.known.forgotten();
        for watcher in self.watchers.values_mut().filter(|watcher| watcher.watches(key)) {
            // What happened before the watch may be among the news, if the key was not known, or was seen last for a watch
            // before this one.
            let begun = || snapshot.now.0.saturating_sub(elapsed(watcher.started));
            let since = match seen_at {
                None => Some(forgotten.max(begun())),
                Some(seen_at) if seen_at < watcher.started => Some(begun()),
                Some(_) => None,
            };
            for (kind, at) in &news {
                if since.is_none_or(|since| at.0 > since) {
                    watcher.push(*kind, snapshot);
                }
            }
        }
        self.known.note(snapshot);
    }
}

/// Milliseconds since then, and a little more: both clocks are read in whole ones.
fn elapsed(instant: Instant) -> i64 {
    i64::try_from(instant.elapsed().as_millis()).unwrap_or(i64::MAX).saturating_add(2)
}

/// What a record takes in memory, in bytes. [`Record::size`] leaves out what the rules do not measure, and that may be most of it:
/// a record remembers more than a thousand departures.
fn size(snapshot: &Snapshot) -> usize {
    let record = &snapshot.record;
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

impl Watching {
    /// Takes a page of a listing, and returns what to tell of it: the records as they are known now. What is queued of
    /// these keys is older than that, and dropped.
    pub(crate) fn page(&self, page: Vec<Snapshot>) -> Vec<Arc<Snapshot>> {
        let mut shown = Vec::with_capacity(page.len());
        self.watchers.change(|state| {
            for snapshot in page {
                let snapshot = Arc::new(snapshot);
                state.observe(&snapshot);
                let known = state.known.get(&snapshot.record.key);
                shown.push(known.map_or(snapshot, |known| Arc::clone(&known.snapshot)));
            }
            if let Some(watcher) = state.watchers.get_mut(&self.number) {
                let keys: HashSet<&Key> = shown.iter().map(|snapshot| &snapshot.record.key).collect();
                watcher.queue.retain(|(_, snapshot)| !keys.contains(&snapshot.record.key));
                watcher.bytes = watcher.queue.iter().map(|(_, snapshot)| size(snapshot)).sum();
            }
        });
        shown.retain(|snapshot| !snapshot.record.is_free(snapshot.now));
        shown
    }

    /// Forgets what is queued: the watch begins here.
    pub(crate) fn begin_here(&self) {
        if let Some(watcher) = self.watchers.state().watchers.get_mut(&self.number) {
            watcher.clear();
            watcher.is_behind = false;
            watcher.started = Instant::now();
        }
    }

    /// Waits for what comes next.
    pub(crate) async fn next(&self) -> Told {
        loop {
            if let Some(told) = self.take() {
                return told;
            }
            self.wake.notified().await;
        }
    }

    fn take(&self) -> Option<Told> {
        let mut state = self.watchers.state();
        let watcher = state.watchers.get_mut(&self.number)?;
        if std::mem::take(&mut watcher.is_behind) {
            return Some(Told::FellBehind);
        }
        let (kind, snapshot) = watcher.queue.pop_front()?;
        watcher.bytes -= size(&snapshot);
        Some(Told::Change(kind, snapshot))
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        // Commits need the lock that is taken here, so what is known is not gone through in here.
        let forgotten = {
            let mut state = self.watchers.state();
            let Some(watcher) = state.watchers.remove(&self.number) else { return };
            self.watchers.count.store(state.watchers.len(), Ordering::SeqCst);
            if state.watchers.is_empty() {
                state.ended.clear();
                std::mem::take(&mut state.known)
            } else {
                // Watches that come and go leave no more than those that there may be: then all keys are gone through.
                let prefix = if state.ended.len() < self.watchers.limit {
                    watcher.prefix
                } else {
                    state.ended.clear();
                    String::new()
                };
                state.ended.push_back(Ended { prefix, after: None });
                self.watchers.sooner.notify_one();
                Known::default()
            }
        };
        drop(forgotten);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Acquisition, Edit, LeaseId, Reason, Rules, Timestamp, step};

    fn held(key: &str) -> Arc<Snapshot> {
        let rules = Rules { grace: std::time::Duration::ZERO, place: std::time::Duration::from_secs(15) };
        let edit = Edit::default().enqueue(Arc::new(Acquisition::waiting(LeaseId::random())));
        let (key, now) = (Key::try_from(key).expect("a key"), Timestamp(1_000_000));
        Arc::new(Snapshot { record: step(Record::vacant(key), &edit, now, &rules), now })
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_watches_any_more_is_forgotten_a_few_keys_at_a_time() {
        let watchers = Arc::new(Watchers::new(10));
        let all = watchers.begin("job/".to_owned()).expect("room");
        let some = watchers.begin("job/7".to_owned()).expect("room");
        (0..1000).for_each(|number| watchers.observe(&held(&format!("job/{number}"))));
        drop(all);
        assert_eq!(watchers.state().known.len(), 1000, "the end of a watch goes through no keys");
        let mut before = 1000;
        while watchers.tidy() {
            let left = watchers.state().known.len();
            assert!(before - left <= TIDIED, "{before} and then {left}");
            before = left;
        }
        assert_eq!(watchers.state().known.len(), 111, "those that another one watches");
        drop(some);
        assert_eq!(watchers.state().known.len(), 0);
    }

    #[tokio::test]
    async fn a_queue_is_bounded_by_all_that_its_records_take() {
        let watchers = Arc::new(Watchers::new(1));
        let watching = watchers.begin(String::new()).expect("room");
        let at = Timestamp(1_000_000);
        let departure = || Departure { id: LeaseId::random(), reason: Reason::Released, at, lasting: true };
        let mut pushed = 0;
        // Free records, of which each remembers as many departures as it may.
        while !matches!(watching.take(), Some(Told::FellBehind)) {
            let mut state = watchers.state();
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
    async fn watches_that_come_and_go_leave_no_more_than_there_may_be() {
        let watchers = Arc::new(Watchers::new(3));
        let _stays = watchers.begin("other".to_owned()).expect("room");
        for number in 0..20 {
            drop(watchers.begin(number.to_string()).expect("room"));
            assert!(watchers.state().ended.len() <= 3);
        }
        while watchers.tidy() {}
        assert!(watchers.state().ended.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_watch_is_not_told_what_happened_between_an_earlier_one_and_itself() {
        let watchers = Arc::new(Watchers::new(3));
        let _other = watchers.begin("other".to_owned()).expect("room");
        let earlier = watchers.begin("job".to_owned()).expect("room");
        let first = held("job");
        watchers.observe(&first);
        drop(earlier);
        tokio::time::advance(std::time::Duration::from_secs(5)).await;
        let watching = watchers.begin("job".to_owned()).expect("room");
        let mut record = first.record.clone();
        let rules = Rules { grace: std::time::Duration::ZERO, place: std::time::Duration::from_secs(15) };
        // Released before the new watch, and acquired anew after it began.
        record = step(
            record.clone(),
            &Edit::default().release(record.holders[0].id),
            Timestamp(1_004_000),
            &rules,
        );
        let edit = Edit::default().enqueue(Arc::new(Acquisition::waiting(LeaseId::random())));
        tokio::time::advance(std::time::Duration::from_secs(1)).await;
        let now = Timestamp(1_006_000);
        watchers.observe(&Arc::new(Snapshot { record: step(record, &edit, now, &rules), now }));
        assert!(matches!(watching.take(), Some(Told::Change(ChangeKind::Granted, _))));
        assert!(watching.take().is_none());
    }
}
