//! The leases that keepalive streams keep alive, and which record concerns which of them.
//!
//! The records that this daemon commits arrive in the order of the commits of their key. So a lease
//! is lost if it was held and the record of a later commit does not show it. A record that another
//! daemon wrote may have been read before the lease was granted. That record shows a loss only if
//! it is newer than a commit of this daemon that showed the lease held.

/// The leases of one stream.
mod lease_set;
/// One lease on one stream.
mod stream_lease;
/// Touches that are answered without writing them.
mod coalesce;

/// A model of a store, commits and streams, for the properties.
#[cfg(test)]
mod model;
#[cfg(test)]
mod properties;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(crate) use lease_set::{Full, LeaseSet};
use stream_lease::Fate;
pub(crate) use stream_lease::{Loss, StreamLease};

use super::metrics::EngineMetrics;
use super::op::Op;
use crate::boot_instant::BootInstant;
use crate::lease::{Edit, FencingToken, Key, LeaseId, Snapshot};

/// The most leases on one key that are kept in a plain list. Every record of the key is shown to
/// each of them. Past this number, leases are looked up by id.
const FEW: usize = 16;

/// How many leases enter or leave under one lock. Every commit needs the lock too.
const CHUNK: usize = 1000;

/// The leases of all streams of this daemon, by key. A stream that ends removes its leases.
#[derive(Debug)]
pub(crate) struct StreamIndex {
    pub(crate) metrics: Arc<EngineMetrics>,
    /// Bounds the leases that streams track.
    capacity: Capacity,
    /// Bounds the leases that a message touches and no stream tracks.
    untracked_capacity: Capacity,
    keys: Mutex<Keys>,
}

type Keys = HashMap<Key, OnKey>;

/// Bounds how many leases are in memory. Each lease has a slot until the last reference to it is
/// dropped. A stream, an unanswered message or an unreported loss may have a reference.
#[derive(Debug)]
struct Capacity {
    most: usize,
    taken: Arc<AtomicUsize>,
}

/// Room for one lease. Dropping it makes room for another one.
#[derive(Debug)]
pub(crate) struct Slot(Arc<AtomicUsize>);

impl Capacity {
    fn new(most: usize) -> Self {
        Self { most, taken: Arc::default() }
    }

    fn reserve(&self) -> Option<Slot> {
        let one_more = |taken| (taken < self.most).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        Some(Slot(Arc::clone(&self.taken)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct OnKey {
    leases: KeyLeases,
    /// The version of the newest record that the leases have seen.
    seen: Option<(FencingToken, i64)>,
    /// A record of another daemon that is newer than the latest commit of this daemon. A commit
    /// that is under way may return an older record.
    ahead: Option<Arc<Snapshot>>,
}

/// The leases on one key.
#[derive(Debug)]
enum KeyLeases {
    Few(Vec<Arc<StreamLease>>),
    Many(Box<Many>),
}

/// Leases by their ids. A record has at most 1,024 holders, but streams may name any number of
/// unknown ids on the key.
#[derive(Debug, Default)]
struct Many {
    ids: HashMap<LeaseId, Vec<Arc<StreamLease>>>,
    /// The ids of leases that are held.
    held: HashSet<LeaseId>,
}

impl Default for KeyLeases {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

impl KeyLeases {
    fn add(&mut self, lease: Arc<StreamLease>) {
        match self {
            Self::Few(few) if few.len() < FEW => few.push(lease),
            Self::Few(few) => {
                let mut many = Many::default();
                few.drain(..).chain([lease]).for_each(|lease| many.add(lease));
                *self = Self::Many(Box::new(many));
            }
            Self::Many(many) => many.add(lease),
        }
    }

    fn remove(&mut self, lease: &Arc<StreamLease>) {
        let is_other = |other: &Arc<StreamLease>| !Arc::ptr_eq(other, lease);
        match self {
            Self::Few(few) => few.retain(is_other),
            Self::Many(many) => many.retain(lease.name().id, is_other),
        }
    }

    /// Shows `snapshot` to the leases that it may concern, and removes the lost ones. If there are
    /// many leases, it concerns only the holders in the record and the leases that were held.
    fn show(&mut self, snapshot: &Snapshot, mut show: impl FnMut(&Arc<StreamLease>) -> Fate) {
        match self {
            Self::Few(few) => few.retain(|lease| show(lease) == Fate::Kept),
            Self::Many(many) => {
                let holders = snapshot.record.holders.iter().map(|holder| holder.id);
                let ids: HashSet<LeaseId> = holders.chain(many.held.iter().copied()).collect();
                for id in ids {
                    many.retain(id, |lease| show(lease) == Fate::Kept);
                }
            }
        }
    }

    /// Returns all leases that are held, and possibly others.
    fn held(&self) -> Vec<&Arc<StreamLease>> {
        match self {
            Self::Few(few) => few.iter().collect(),
            Self::Many(many) => many.held.iter().filter_map(|id| many.ids.get(id)).flatten().collect(),
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Few(few) => few.is_empty(),
            Self::Many(many) => many.ids.is_empty(),
        }
    }
}

impl Many {
    fn add(&mut self, lease: Arc<StreamLease>) {
        let id = lease.name().id;
        if lease.is_held() {
            self.held.insert(id);
        }
        self.ids.entry(id).or_default().push(lease);
    }

    /// Keeps the leases with this id for which `stays` returns true.
    fn retain(&mut self, id: LeaseId, stays: impl FnMut(&Arc<StreamLease>) -> bool) {
        let Some(same) = self.ids.get_mut(&id) else { return };
        same.retain(stays);
        if same.iter().any(|lease| lease.is_held()) {
            self.held.insert(id);
        } else {
            self.held.remove(&id);
        }
        if same.is_empty() {
            self.ids.remove(&id);
        }
    }
}

/// Changes the entry of a key, if streams have leases on it, and removes the entry with its last
/// lease.
fn on_key(keys: &mut Keys, key: &Key, change: impl FnOnce(&mut OnKey)) {
    let Some(on_key) = keys.get_mut(key) else { return };
    change(on_key);
    if on_key.leases.is_empty() {
        keys.remove(key);
    }
}

/// Returns how many leases may be touched at a time without being tracked, if `most` may be
/// tracked: a tenth as many, but at least about as many as one message can name.
fn most_untracked(most: usize) -> usize {
    (most / 10).max(10_000)
}

impl StreamIndex {
    /// `most`: how many leases streams may track at a time.
    pub(crate) fn new(metrics: &Arc<EngineMetrics>, most: usize) -> Self {
        let (capacity, untracked_capacity) = (Capacity::new(most), Capacity::new(most_untracked(most)));
        Self { metrics: Arc::clone(metrics), capacity, untracked_capacity, keys: Mutex::default() }
    }

    /// Reserves a slot for a lease that a stream is to track.
    pub(crate) fn reserve(&self) -> Option<Slot> {
        self.capacity.reserve()
    }

    /// Reserves a slot for a lease that is to be touched and not tracked.
    pub(crate) fn reserve_untracked(&self) -> Option<Slot> {
        self.untracked_capacity.reserve()
    }

    /// Notes the record after a commit of this daemon, which was sent at `sent_at` and applied
    /// `edit`.
    pub(crate) fn local_commit(&self, snapshot: &Arc<Snapshot>, edit: &Edit, sent_at: BootInstant) {
        on_key(&mut self.by_key(), &snapshot.record.key, |on_key| {
            on_key.leases.show(snapshot, |lease| lease.local_commit(snapshot, edit, sent_at));
            on_key.ahead.take_if(|ahead| ahead.record.version() <= snapshot.record.version());
            if let Some(ahead) = &on_key.ahead {
                on_key.leases.show(ahead, |lease| lease.remote_read(ahead));
            }
            on_key.seen = Some(on_key.ahead.as_ref().unwrap_or(snapshot).record.version());
        });
    }

    /// Notes a record that another daemon may have written.
    pub(crate) fn remote_read(&self, snapshot: &Arc<Snapshot>) {
        on_key(&mut self.by_key(), &snapshot.record.key, |on_key| {
            let version = snapshot.record.version();
            if on_key.seen >= Some(version) {
                return;
            }
            on_key.seen = Some(version);
            on_key.ahead = Some(Arc::clone(snapshot));
            on_key.leases.show(snapshot, |lease| lease.remote_read(snapshot));
        });
    }

    /// Notes that a read found no record of the key, and returns touches to commit. Only the
    /// commits of these touches can tell whether the leases are lost, or were granted after the
    /// read.
    pub(crate) fn remote_missing(&self, key: &Key) -> Vec<(Key, Op)> {
        let keys = self.by_key();
        let Some(on_key) = keys.get(key) else { return Vec::new() };
        let held = on_key.leases.held().into_iter().filter(|lease| lease.stop_coalescing());
        let ids: HashSet<LeaseId> = held.map(|lease| lease.name().id).collect();
        ids.into_iter().map(|id| (key.clone(), Op::Touch(id))).collect()
    }

    /// Returns true if a stream has a lease on this key and revision `rev` of its record has not
    /// been seen. Without `rev`: if a stream has a lease on this key.
    pub(crate) fn needs_read(&self, key: &Key, rev: Option<i64>) -> bool {
        let keys = self.by_key();
        let Some(on_key) = keys.get(key) else { return false };
        rev.is_none() || on_key.seen.map(|(_, seen)| seen) < rev
    }

    /// Returns the keys on which streams have leases.
    pub(crate) fn keys(&self) -> Vec<Key> {
        self.by_key().keys().cloned().collect()
    }

    /// Adds leases to the index: records are shown to them from now on.
    pub(crate) fn enter(&self, leases: &[Arc<StreamLease>]) {
        for chunk in leases.chunks(CHUNK) {
            let mut keys = self.by_key();
            for lease in chunk {
                let key = lease.name().key.clone();
                keys.entry(key).or_default().leases.add(Arc::clone(lease));
            }
        }
    }

    /// Removes leases from the index.
    pub(crate) fn leave<'a>(&self, leases: impl IntoIterator<Item = &'a Arc<StreamLease>>) {
        let mut leases = leases.into_iter().peekable();
        while leases.peek().is_some() {
            let mut keys = self.by_key();
            for lease in leases.by_ref().take(CHUNK) {
                on_key(&mut keys, &lease.name().key, |on_key| on_key.leases.remove(lease));
            }
        }
    }

    fn by_key(&self) -> MutexGuard<'_, Keys> {
        // No code panics half-way through a change under this lock.
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An index with room for any number of leases.
#[cfg(test)]
impl Default for StreamIndex {
    fn default() -> Self {
        Self::new(&Arc::default(), usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Touched;
    use super::*;
    use crate::lease::{Acquisition, LeaseName, Mode, Record, Rules, Timestamp, step};

    const RULES: Rules = Rules { grace: Duration::ZERO, waiter_ttl: Duration::from_secs(15) };

    fn named(id: LeaseId) -> LeaseName {
        LeaseName { key: key(), id }
    }

    fn key() -> Key {
        Key::try_from("key").expect("a key")
    }

    /// Returns the record of a key that `id` has just acquired.
    fn held(id: LeaseId) -> Arc<Snapshot> {
        let edit = Edit::default().enqueue(Arc::new(Acquisition::waiting(id)));
        let now = Timestamp(1000);
        let record = step(Record::vacant(key()), &edit, now, &RULES);
        Arc::new(Snapshot { record, now })
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_is_read_while_a_stream_has_a_lease_on_its_key_and_has_not_seen_it() {
        let (index, id) = (Arc::new(StreamIndex::default()), LeaseId::random());
        assert!(!index.needs_read(&key(), None));
        let mut lease_set = LeaseSet::new(&index);
        lease_set.begin_message(1).add(named(id)).expect("room");
        assert_eq!(index.keys(), [key()]);
        assert!(index.needs_read(&key(), Some(1)), "nothing has been seen yet");
        index.local_commit(&held(id), &Edit::default().touch(id), BootInstant::now());
        assert!(!index.needs_read(&key(), Some(1)));
        assert!(index.needs_read(&key(), Some(2)));
        assert!(index.needs_read(&key(), None), "the record may be gone");
        drop(lease_set);
        assert!(!index.needs_read(&key(), Some(2)));
        assert!(index.keys().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_missing_record_makes_no_loss_but_a_touch() {
        let (index, id) = (Arc::new(StreamIndex::default()), LeaseId::random());
        let mut lease_set = LeaseSet::new(&index);
        let lease = lease_set.begin_message(1).add(named(id)).expect("room");
        assert!(index.remote_missing(&key()).is_empty(), "nothing says that it was ever held");
        index.local_commit(&held(id), &Edit::default().touch(id), BootInstant::now());
        assert!(lease.coalesce(BootInstant::now()).is_some());
        assert!(matches!(index.remote_missing(&key())[..], [(_, Op::Touch(touched))] if touched == id));
        assert!(lease.coalesce(BootInstant::now()).is_none(), "its touches are written");
        let settled = lease_set.settle(vec![(lease, None)]);
        let is_left = |touched| matches!(touched, Touched::Kept(remaining) if remaining > Duration::ZERO);
        assert!(is_left(settled[0].1), "a touch that was coalesced before keeps its answer: {settled:?}");

        let vacant = Arc::new(Snapshot { record: Record::vacant(key()), now: Timestamp(2000) });
        index.local_commit(&vacant, &Edit::default().touch(id), BootInstant::now());
        let lost = lease_set.lost().await;
        assert_eq!(
            lost.iter().map(|(lease, loss)| (lease.name().id, loss.0)).collect::<Vec<_>>(),
            [(id, None)]
        );
        assert!(lease_set.begin_message_for_all().is_empty(), "it is not tracked any more");
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_stream_refuses_a_new_lease_and_keeps_its_own() {
        let (index, [one, two, three]) =
            (Arc::new(StreamIndex::default()), [(); 3].map(|()| LeaseId::random()));
        let mut lease_set = LeaseSet::new(&index);
        let mut message = lease_set.begin_message(2);
        let [first, again, second] = [one, one, two].map(|id| message.add(named(id)).expect("room"));
        assert!(Arc::ptr_eq(&first, &again), "named twice it is tracked once");
        assert!(matches!(message.add(named(three)), Err(Full::Stream)));
        assert!(message.add(named(two)).is_ok(), "a tracked lease may be named");
        drop(message);
        assert_eq!(lease_set.begin_message_for_all().len(), 2);

        // A lost lease makes room.
        index.local_commit(&held(two), &Edit::default().touch(two), BootInstant::now());
        let vacant = Arc::new(Snapshot { record: Record::vacant(key()), now: Timestamp(2000) });
        index.local_commit(&vacant, &Edit::default(), BootInstant::now());
        let settled = lease_set.settle(vec![(first, None), (again, None), (second, None)]);
        assert!(matches!(settled[2].1, Touched::Lost(_)), "{settled:?}");
        drop(lease_set.begin_message(2).add(named(two)).expect("a lost lease makes room"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_loss_that_no_call_waited_for_is_returned_by_the_next_one() {
        let (index, id) = (Arc::new(StreamIndex::default()), LeaseId::random());
        let mut lease_set = LeaseSet::new(&index);
        let lease = lease_set.begin_message(1).add(named(id)).expect("room");
        index.local_commit(&held(id), &Edit::default().touch(id), BootInstant::now());
        lease_set.settle(vec![(lease, None)]);
        assert!(
            tokio::time::timeout(Duration::from_secs(1), lease_set.lost()).await.is_err(),
            "nothing is lost"
        );
        let mut after = Snapshot::clone(&held(id));
        after.record = step(after.record, &Edit::default().release(id), after.now, &RULES);
        index.local_commit(&Arc::new(after), &Edit::default(), BootInstant::now());
        // The wait that timed out has not taken the loss with it.
        assert_eq!(lease_set.lost().await.len(), 1);
    }

    /// Names these leases in one message.
    fn name(lease_set: &mut LeaseSet, leases: impl Iterator<Item = LeaseName>) -> Vec<Arc<StreamLease>> {
        let mut message = lease_set.begin_message(usize::MAX);
        leases.map(|lease| message.add(lease).expect("room on the stream")).collect()
    }

    /// Returns the record of a key that these ids have acquired and touched in one edit, and the
    /// edit.
    fn held_by(ids: &[LeaseId]) -> (Arc<Snapshot>, Edit) {
        let acquisition = |id: &LeaseId| {
            Arc::new(Acquisition { mode: Mode::Shared, shared_limit: 1000, ..Acquisition::waiting(*id) })
        };
        let edit = ids.iter().fold(Edit::default(), |edit, id| edit.touch(*id).enqueue(acquisition(id)));
        let (now, rules) = (Timestamp(1000), RULES);
        (Arc::new(Snapshot { record: step(Record::vacant(key()), &edit, now, &rules), now }), edit)
    }

    #[tokio::test(start_paused = true)]
    async fn among_many_leases_on_a_key_each_is_shown_the_records_that_concern_it() {
        let (index, ids) = (Arc::new(StreamIndex::default()), [(); 50].map(|()| LeaseId::random()));
        let mut lease_sets = [(); 2].map(|()| LeaseSet::new(&index));
        let strangers: Vec<_> = (0..500).map(|_| named(LeaseId::random())).collect();
        let mut held_leases = Vec::new();
        for lease_set in &mut lease_sets {
            let message = name(lease_set, ids.iter().map(|id| named(*id)).chain(strangers.clone()));
            held_leases.extend(message.iter().take(ids.len()).cloned());
            lease_set.settle(
                message.into_iter().map(|lease| (lease, Some(Touched::Kept(Duration::ZERO)))).collect(),
            );
        }
        assert!(matches!(index.by_key()[&key()].leases, KeyLeases::Many(_)));
        let (snapshot, edit) = held_by(&ids);
        index.local_commit(&snapshot, &edit, BootInstant::now());
        assert!(held_leases.iter().all(|lease| lease.coalesce(BootInstant::now()).is_some()));
        assert_eq!(index.remote_missing(&key()).len(), ids.len(), "the held ones");

        // A commit of this daemon releases half of them, and another daemon releases a quarter.
        let release = |ids: &[LeaseId]| ids.iter().fold(Edit::default(), |edit, id| edit.release(*id));
        let after = |before: &Snapshot, edit: &Edit| {
            let record = step(before.record.clone(), edit, before.now, &RULES);
            Arc::new(Snapshot { record, now: before.now })
        };
        let ours = after(&snapshot, &release(&ids[..25]));
        index.local_commit(&ours, &release(&ids[..25]), BootInstant::now());
        index.remote_read(&after(&ours, &release(&ids[25..37])));
        for lease_set in &mut lease_sets {
            let mut lost: Vec<LeaseId> =
                lease_set.lost().await.iter().map(|(lease, _)| lease.name().id).collect();
            lost.sort_unstable();
            let mut expected = ids[..37].to_vec();
            expected.sort_unstable();
            assert_eq!(lost, expected);
        }
        assert_eq!(index.remote_missing(&key()).len(), 13);
        drop((lease_sets, held_leases));
        assert!(index.keys().is_empty());
        assert_eq!(index.capacity.taken.load(Ordering::Relaxed), 0);
    }

    fn leases(count: usize) -> impl Iterator<Item = LeaseName> {
        (0..count).map(|_| named(LeaseId::random()))
    }

    #[tokio::test(start_paused = true)]
    async fn tracked_leases_are_bounded_and_a_dropped_stream_makes_room() {
        let index = Arc::new(StreamIndex::new(&Arc::default(), 3));
        let [mut one, mut other] = [(); 2].map(|()| LeaseSet::new(&index));
        assert_eq!(name(&mut one, leases(2)).len(), 2);
        let named = name(&mut other, leases(2));
        assert_eq!((named.len(), other.names().count()), (2, 1));
        // A lease past the limit is answered like a tracked one.
        let answer = named.into_iter().map(|lease| (lease, Some(Touched::Kept(Duration::from_secs(1)))));
        let answered = other.settle(answer.collect());
        assert!(answered.iter().all(|(_, touched)| *touched == Touched::Kept(Duration::from_secs(1))));
        drop(one);
        name(&mut other, leases(3));
        assert_eq!(other.names().count(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn leases_that_are_touched_and_not_tracked_are_bounded_until_they_are_answered() {
        let index = Arc::new(StreamIndex::new(&Arc::default(), 1));
        let [mut one, mut other] = [(); 2].map(|()| LeaseSet::new(&index));
        let known = leases(1).next().expect("a lease");
        drop(name(&mut one, [known.clone()].into_iter()));
        let mut under_way: Vec<_> = (0..4).map(|_| name(&mut one, leases(most_untracked(1) / 4))).collect();
        assert_eq!(one.names().count(), 1);

        // No stream can touch one more, except for tracked leases.
        for lease_set in [&mut one, &mut other] {
            let mut message = lease_set.begin_message(usize::MAX);
            let refused = leases(1).map(|lease| message.add(lease)).next().expect("an answer");
            assert!(matches!(refused, Err(Full::Daemon)), "{refused:?}");
        }
        assert_eq!(index.metrics.refused.get(), 2);
        assert_eq!(name(&mut one, [known].into_iter()).len(), 1);
        assert_eq!(other.names().count(), 0);

        let message = under_way.pop().expect("a message");
        let answer = message.into_iter().map(|lease| (lease, Some(Touched::Lost(None)))).collect();
        drop(one.settle(answer));
        assert_eq!(name(&mut other, leases(most_untracked(1) / 4)).len(), most_untracked(1) / 4);
    }
}
