//! The leases that keepalive streams carry: which record concerns which of them.
//!
//! A commit of this daemon comes in the order of its key's commits, so whoever was held and is not any more is lost. A
//! record of others may have been read before the lease was granted: it tells of a loss only if it is newer than a
//! commit of this daemon that showed the lease held.

/// The leases of one stream.
mod lease_set;
/// One lease on one stream.
mod stream_lease;

/// A model of streams, commits and notifications, for the properties.
#[cfg(test)]
mod model;
#[cfg(test)]
mod properties;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(crate) use lease_set::{Carrier, Full};
use stream_lease::Fate;
pub(crate) use stream_lease::{Carriage, Loss};

use super::metrics::Counts;
use super::op::Part;
use crate::boot_instant::BootInstant;
use crate::lease::{Edit, FencingToken, Key, LeaseId, Snapshot};

/// Leases on a key up to which all are asked what a record means to them; among more they are looked up by their ids.
const FEW: usize = 16;

/// Leases that enter or leave in one go: commits need the lock for that too.
const PORTION: usize = 1000;

/// Leases carried by the streams of this daemon, by key. The streams bound it: each takes out what it brought.
#[derive(Debug)]
pub(crate) struct Carried {
    pub(crate) counts: Arc<Counts>,
    /// For leases that are carried.
    room: Room,
    /// For leases that messages under way touch, and that are not carried.
    passing_room: Room,
    keys: Mutex<Keys>,
}

type Keys = HashMap<Key, OnKey>;

/// Bounds how many leases there are in memory. Each has a place until nothing refers to it any more, be it a stream, a
/// message under way or a loss that is not told yet.
#[derive(Debug)]
struct Room {
    most: usize,
    taken: Arc<AtomicUsize>,
}

/// A lease's place; dropping it makes room for another one.
#[derive(Debug)]
pub(crate) struct Place(Arc<AtomicUsize>);

impl Room {
    fn new(most: usize) -> Self {
        Self { most, taken: Arc::default() }
    }

    fn place(&self) -> Option<Place> {
        let one_more = |taken| (taken < self.most).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        Some(Place(Arc::clone(&self.taken)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct OnKey {
    carriages: Carriages,
    /// The newest record that was seen.
    seen: Option<(FencingToken, i64)>,
    /// A record of others that is newer than what the last commit of this daemon returned. The next commit to return
    /// may still be older than it.
    ahead: Option<Arc<Snapshot>>,
}

/// The leases on one key.
#[derive(Debug)]
enum Carriages {
    Few(Vec<Arc<Carriage>>),
    Many(Box<Many>),
}

/// Leases by their ids: a record has at most a thousand holders, and streams may name any number of ids that it does not
/// know.
#[derive(Debug, Default)]
struct Many {
    ids: HashMap<LeaseId, Vec<Arc<Carriage>>>,
    /// Ids of which one was shown held, and is not known to be lost.
    held: HashSet<LeaseId>,
}

impl Default for Carriages {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

impl Carriages {
    fn add(&mut self, carriage: Arc<Carriage>) {
        match self {
            Self::Few(few) if few.len() < FEW => few.push(carriage),
            Self::Few(few) => {
                let mut many = Many::default();
                few.drain(..).chain([carriage]).for_each(|carriage| many.add(carriage));
                *self = Self::Many(Box::new(many));
            }
            Self::Many(many) => many.add(carriage),
        }
    }

    fn remove(&mut self, carriage: &Arc<Carriage>) {
        let is_other = |other: &Arc<Carriage>| !Arc::ptr_eq(other, carriage);
        match self {
            Self::Few(few) => few.retain(is_other),
            Self::Many(many) => many.retain(carriage.lease().1, is_other),
        }
    }

    /// Asks each lease what `snapshot` means to it, and takes out those that are lost. Among many, those are not asked that
    /// the record does not know and that were not held before: it means nothing to them.
    fn hear(&mut self, snapshot: &Snapshot, mut hear: impl FnMut(&Arc<Carriage>) -> Fate) {
        match self {
            Self::Few(few) => few.retain(|carriage| hear(carriage) == Fate::Carried),
            Self::Many(many) => {
                let holders = snapshot.record.holders.iter().map(|holder| holder.id);
                let ids: HashSet<LeaseId> = holders.chain(many.held.iter().copied()).collect();
                for id in ids {
                    many.retain(id, |carriage| hear(carriage) == Fate::Carried);
                }
            }
        }
    }

    /// Those that were held when they were heard of last, and maybe others.
    fn held(&self) -> Vec<&Arc<Carriage>> {
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
    fn add(&mut self, carriage: Arc<Carriage>) {
        let id = carriage.lease().1;
        if carriage.is_held() {
            self.held.insert(id);
        }
        self.ids.entry(id).or_default().push(carriage);
    }

    /// Keeps those with this id that are to stay.
    fn retain(&mut self, id: LeaseId, stays: impl FnMut(&Arc<Carriage>) -> bool) {
        let Some(same) = self.ids.get_mut(&id) else { return };
        same.retain(stays);
        if same.iter().any(|carriage| carriage.is_held()) {
            self.held.insert(id);
        } else {
            self.held.remove(&id);
        }
        if same.is_empty() {
            self.ids.remove(&id);
        }
    }
}

/// Changes what is carried on the key, if anything is.
fn on_key(keys: &mut Keys, key: &Key, change: impl FnOnce(&mut OnKey)) {
    let Some(on_key) = keys.get_mut(key) else { return };
    change(on_key);
    if on_key.carriages.is_empty() {
        keys.remove(key);
    }
}

/// How many leases may be touched at once without being carried, where `most` may be carried: a tenth as many, but about
/// what one message can name in any case.
fn passing(most: usize) -> usize {
    (most / 10).max(10_000)
}

impl Carried {
    /// `most`: how many leases may be carried at once.
    pub(crate) fn new(counts: &Arc<Counts>, most: usize) -> Self {
        let (room, passing_room) = (Room::new(most), Room::new(passing(most)));
        Self { counts: Arc::clone(counts), room, passing_room, keys: Mutex::default() }
    }

    /// A place for a lease that is to be carried.
    pub(crate) fn place(&self) -> Option<Place> {
        self.room.place()
    }

    /// A place for a lease that is to be touched and not carried.
    pub(crate) fn passing_place(&self) -> Option<Place> {
        self.passing_room.place()
    }

    /// Takes note of a record that a commit of this daemon returned, which applied `edit` and was sent after `sent_at`.
    pub(crate) fn own(&self, snapshot: &Arc<Snapshot>, edit: &Edit, sent_at: BootInstant) {
        on_key(&mut self.by_key(), &snapshot.record.key, |on_key| {
            on_key.carriages.hear(snapshot, |carriage| carriage.own(snapshot, edit, sent_at));
            on_key.ahead.take_if(|ahead| ahead.record.version() <= snapshot.record.version());
            if let Some(ahead) = &on_key.ahead {
                on_key.carriages.hear(ahead, |carriage| carriage.foreign(ahead));
            }
            on_key.seen = Some(on_key.ahead.as_ref().unwrap_or(snapshot).record.version());
        });
    }

    /// Takes note of a record as others may have left it.
    pub(crate) fn foreign(&self, snapshot: &Arc<Snapshot>) {
        on_key(&mut self.by_key(), &snapshot.record.key, |on_key| {
            let version = snapshot.record.version();
            if on_key.seen >= Some(version) {
                return;
            }
            on_key.seen = Some(version);
            on_key.ahead = Some(Arc::clone(snapshot));
            on_key.carriages.hear(snapshot, |carriage| carriage.foreign(snapshot));
        });
    }

    /// Takes note that the key has no record, or had none yet, and returns what to commit: the answer to a touch says
    /// which it was.
    pub(crate) fn missing(&self, key: &Key) -> Vec<(Key, Part)> {
        let keys = self.by_key();
        let Some(on_key) = keys.get(key) else { return Vec::new() };
        let held = on_key.carriages.held().into_iter().filter(|carriage| carriage.doubt());
        let ids: HashSet<LeaseId> = held.map(|carriage| carriage.lease().1).collect();
        ids.into_iter().map(|id| (key.clone(), Part::Touch(id))).collect()
    }

    /// Whether a stream carries a lease on this key and does not know the record as of `rev`.
    pub(crate) fn wants(&self, key: &Key, rev: Option<i64>) -> bool {
        let keys = self.by_key();
        let Some(on_key) = keys.get(key) else { return false };
        rev.is_none() || on_key.seen.map(|(_, seen)| seen) < rev
    }

    /// The keys on which streams carry leases.
    pub(crate) fn keys(&self) -> Vec<Key> {
        self.by_key().keys().cloned().collect()
    }

    /// Lets these hear of records from here on.
    pub(crate) fn enter(&self, carriages: &[Arc<Carriage>]) {
        for some in carriages.chunks(PORTION) {
            let mut keys = self.by_key();
            for carriage in some {
                let key = carriage.lease().0.clone();
                keys.entry(key).or_default().carriages.add(Arc::clone(carriage));
            }
        }
    }

    /// Takes these out.
    pub(crate) fn leave<'a>(&self, carriages: impl IntoIterator<Item = &'a Arc<Carriage>>) {
        let mut carriages = carriages.into_iter().peekable();
        while carriages.peek().is_some() {
            let mut keys = self.by_key();
            for carriage in carriages.by_ref().take(PORTION) {
                on_key(&mut keys, &carriage.lease().0, |on_key| on_key.carriages.remove(carriage));
            }
        }
    }

    fn by_key(&self) -> MutexGuard<'_, Keys> {
        // Nothing in here panics half-way through a change.
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Room for any number.
#[cfg(test)]
impl Default for Carried {
    fn default() -> Self {
        Self::new(&Arc::default(), usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Carrier, Full, Touched};
    use super::*;
    use crate::lease::{Acquisition, Mode, Record, Rules, Timestamp, step};

    const RULES: Rules = Rules { grace: Duration::ZERO, place: Duration::from_secs(15) };

    fn key() -> Key {
        Key::try_from("key").expect("a key")
    }

    /// The record of a key that `id` has just acquired and touched.
    fn held(id: LeaseId) -> Arc<Snapshot> {
        let edit = Edit::default().enqueue(Arc::new(Acquisition::waiting(id)));
        let now = Timestamp(1000);
        let record = step(Record::vacant(key()), &edit, now, &RULES);
        Arc::new(Snapshot { record, now })
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_is_wanted_while_a_stream_carries_a_lease_and_has_not_seen_it() {
        let (carried, id) = (Arc::new(Carried::default()), LeaseId::random());
        assert!(!carried.wants(&key(), None));
        let mut carrier = Carrier::new(&carried);
        carrier.naming(1).name((key(), id)).expect("room");
        assert_eq!(carried.keys(), [key()]);
        assert!(carried.wants(&key(), Some(1)), "nothing has been seen yet");
        carried.own(&held(id), &Edit::default().touch(id), BootInstant::now());
        assert!(!carried.wants(&key(), Some(1)));
        assert!(carried.wants(&key(), Some(2)));
        assert!(carried.wants(&key(), None), "the record may be gone");
        drop(carrier);
        assert!(!carried.wants(&key(), Some(2)));
        assert!(carried.keys().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_missing_record_makes_no_loss_but_a_touch() {
        let (carried, id) = (Arc::new(Carried::default()), LeaseId::random());
        let mut carrier = Carrier::new(&carried);
        let lease = carrier.naming(1).name((key(), id)).expect("room");
        assert!(carried.missing(&key()).is_empty(), "nothing says that it was ever held");
        carried.own(&held(id), &Edit::default().touch(id), BootInstant::now());
        assert!(lease.is_fresh(BootInstant::now()));
        assert!(matches!(carried.missing(&key())[..], [(_, Part::Touch(touched))] if touched == id));
        assert!(!lease.is_fresh(BootInstant::now()), "memory does for it no more");
        carrier.settle(vec![(lease, None)]);

        let vacant = Arc::new(Snapshot { record: Record::vacant(key()), now: Timestamp(2000) });
        carried.own(&vacant, &Edit::default().touch(id), BootInstant::now());
        let lost = carrier.lost().await;
        assert_eq!(
            lost.iter().map(|(lease, loss)| (lease.lease().1, loss.0)).collect::<Vec<_>>(),
            [(id, None)]
        );
        assert!(carrier.all().is_empty(), "it is not carried any more");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_is_full_takes_no_new_lease_and_keeps_those_that_it_has() {
        let (carried, [one, two, three]) =
            (Arc::new(Carried::default()), [(); 3].map(|()| LeaseId::random()));
        let mut carrier = Carrier::new(&carried);
        let mut naming = carrier.naming(2);
        let [first, again, second] = [one, one, two].map(|id| naming.name((key(), id)).expect("room"));
        assert!(Arc::ptr_eq(&first, &again), "named twice it is carried once");
        assert!(matches!(naming.name((key(), three)), Err(Full::Stream)));
        assert!(naming.name((key(), two)).is_ok(), "what is carried may be named");
        drop(naming);
        assert_eq!(carrier.all().len(), 2);

        // What is lost makes room.
        carried.own(&held(two), &Edit::default().touch(two), BootInstant::now());
        let vacant = Arc::new(Snapshot { record: Record::vacant(key()), now: Timestamp(2000) });
        carried.own(&vacant, &Edit::default(), BootInstant::now());
        let settled = carrier.settle(vec![(first, None), (again, None), (second, None)]);
        assert!(matches!(settled[2].1, Touched::Lost(_)), "{settled:?}");
        drop(carrier.naming(2).name((key(), two)).expect("what is lost makes room"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_loss_that_nobody_waited_for_yet_is_found_later() {
        let (carried, id) = (Arc::new(Carried::default()), LeaseId::random());
        let mut carrier = Carrier::new(&carried);
        let lease = carrier.naming(1).name((key(), id)).expect("room");
        carried.own(&held(id), &Edit::default().touch(id), BootInstant::now());
        carrier.settle(vec![(lease, None)]);
        assert!(
            tokio::time::timeout(Duration::from_secs(1), carrier.lost()).await.is_err(),
            "nothing is lost"
        );
        let mut after = Snapshot::clone(&held(id));
        after.record = step(after.record, &Edit::default().release(id), after.now, &RULES);
        carried.own(&Arc::new(after), &Edit::default(), BootInstant::now());
        // A wait that is given up takes nothing with it.
        assert_eq!(carrier.lost().await.len(), 1);
    }

    /// Names these in one message.
    fn name(carrier: &mut Carrier, leases: impl Iterator<Item = (Key, LeaseId)>) -> Vec<Arc<Carriage>> {
        let mut naming = carrier.naming(usize::MAX);
        leases.map(|lease| naming.name(lease).expect("room on the stream")).collect()
    }

    /// A record that these have acquired and touched in one edit.
    fn held_by(ids: &[LeaseId]) -> (Arc<Snapshot>, Edit) {
        let acquisition = |id: &LeaseId| {
            Arc::new(Acquisition { mode: Mode::Shared, shared_limit: 1000, ..Acquisition::waiting(*id) })
        };
        let edit = ids.iter().fold(Edit::default(), |edit, id| edit.touch(*id).enqueue(acquisition(id)));
        let (now, rules) = (Timestamp(1000), RULES);
        (Arc::new(Snapshot { record: step(Record::vacant(key()), &edit, now, &rules), now }), edit)
    }

    #[tokio::test(start_paused = true)]
    async fn among_many_leases_on_a_key_each_hears_what_concerns_it() {
        let (carried, ids) = (Arc::new(Carried::default()), [(); 50].map(|()| LeaseId::random()));
        let mut carriers = [(); 2].map(|()| Carrier::new(&carried));
        let strangers: Vec<_> = (0..500).map(|_| (key(), LeaseId::random())).collect();
        let mut named = Vec::new();
        for carrier in &mut carriers {
            let message = name(carrier, ids.iter().map(|id| (key(), *id)).chain(strangers.clone()));
            named.extend(message.iter().take(ids.len()).cloned());
            carrier.settle(
                message.into_iter().map(|lease| (lease, Some(Touched::Kept(Duration::ZERO)))).collect(),
            );
        }
        assert!(matches!(carried.by_key()[&key()].carriages, Carriages::Many(_)));
        let (snapshot, edit) = held_by(&ids);
        carried.own(&snapshot, &edit, BootInstant::now());
        assert!(named.iter().all(|lease| lease.is_fresh(BootInstant::now())));
        assert_eq!(carried.missing(&key()).len(), ids.len(), "those that were held");

        // Half of them go by a commit of ours, and a quarter by somebody else's.
        let release = |ids: &[LeaseId]| ids.iter().fold(Edit::default(), |edit, id| edit.release(*id));
        let after = |before: &Snapshot, edit: &Edit| {
            let record = step(before.record.clone(), edit, before.now, &RULES);
            Arc::new(Snapshot { record, now: before.now })
        };
        let ours = after(&snapshot, &release(&ids[..25]));
        carried.own(&ours, &release(&ids[..25]), BootInstant::now());
        carried.foreign(&after(&ours, &release(&ids[25..37])));
        for carrier in &mut carriers {
            let mut lost: Vec<LeaseId> =
                carrier.lost().await.iter().map(|(lease, _)| lease.lease().1).collect();
            lost.sort_unstable();
            let mut expected = ids[..37].to_vec();
            expected.sort_unstable();
            assert_eq!(lost, expected);
        }
        assert_eq!(carried.missing(&key()).len(), 13);
        drop((carriers, named));
        assert!(carried.keys().is_empty());
        assert_eq!(carried.room.taken.load(Ordering::Relaxed), 0);
    }

    fn leases(count: usize) -> impl Iterator<Item = (Key, LeaseId)> {
        (0..count).map(|_| (key(), LeaseId::random()))
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_carried_is_bounded_and_what_leaves_makes_room() {
        let carried = Arc::new(Carried::new(&Arc::default(), 3));
        let [mut one, mut other] = [(); 2].map(|()| Carrier::new(&carried));
        assert_eq!(name(&mut one, leases(2)).len(), 2);
        let named = name(&mut other, leases(2));
        assert_eq!((named.len(), other.leases().count()), (2, 1));
        // Those past the limit are answered like the others.
        let answer = named.into_iter().map(|lease| (lease, Some(Touched::Kept(Duration::from_secs(1)))));
        let answered = other.settle(answer.collect());
        assert!(answered.iter().all(|(_, touched)| *touched == Touched::Kept(Duration::from_secs(1))));
        drop(one);
        name(&mut other, leases(3));
        assert_eq!(other.leases().count(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_touched_without_being_carried_is_bounded_until_it_is_answered() {
        let carried = Arc::new(Carried::new(&Arc::default(), 1));
        let [mut one, mut other] = [(); 2].map(|()| Carrier::new(&carried));
        let known = leases(1).next().expect("a lease");
        drop(name(&mut one, [known.clone()].into_iter()));
        let mut under_way: Vec<_> = (0..4).map(|_| name(&mut one, leases(passing(1) / 4))).collect();
        assert_eq!(one.leases().count(), 1);

        // Nobody touches one more, on whatever stream, but those that are carried.
        for carrier in [&mut one, &mut other] {
            let mut naming = carrier.naming(usize::MAX);
            let refused = leases(1).map(|lease| naming.name(lease)).next().expect("an answer");
            assert!(matches!(refused, Err(Full::Daemon)), "{refused:?}");
        }
        assert_eq!(carried.counts.refused.get(), 2);
        assert_eq!(name(&mut one, [known].into_iter()).len(), 1);
        assert_eq!(other.leases().count(), 0);

        let message = under_way.pop().expect("a message");
        let answer = message.into_iter().map(|lease| (lease, Some(Touched::Lost(None)))).collect();
        drop(one.settle(answer));
        assert_eq!(name(&mut other, leases(passing(1) / 4)).len(), passing(1) / 4);
    }
}
