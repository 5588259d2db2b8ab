//! The leases that keepalive streams carry: which record concerns which of them.
//!
//! A commit of this daemon comes in the order of its key's commits, so whoever was held and is not any more is lost. A
//! record of others may have been read before the lease was granted: it tells of a loss only if it is newer than a
//! commit of this daemon that showed the lease held.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::carriage::{Carriage, Fate};
use super::counts::Counts;
use super::part::Part;
use crate::boot_instant::BootInstant;
use crate::lease::{Edit, FencingToken, Key, LeaseId, Snapshot};

/// Leases on a key up to which all are asked what a record means to them; among more they are looked up by their ids.
const FEW: usize = 16;

/// Leases that enter or leave in one go: commits need the lock for that too.
const PORTION: usize = 1000;

/// Leases carried by the streams of this daemon, by key. The streams bound it: each takes out what it brought.
#[derive(Debug)]
pub(super) struct Carried {
    pub(super) counts: Arc<Counts>,
    /// How many may be carried at once.
    most: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    keys: HashMap<Key, OnKey>,
    /// How many are carried.
    leases: usize,
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

    /// Takes out this one, and returns how many that were.
    fn remove(&mut self, carriage: &Arc<Carriage>) -> usize {
        let is_other = |other: &Arc<Carriage>| !Arc::ptr_eq(other, carriage);
        match self {
            Self::Few(few) => retain(few, is_other),
            Self::Many(many) => many.retain(carriage.lease().1, is_other),
        }
    }

    /// Asks each lease what `snapshot` means to it, takes out those that are lost, and returns how many. Among many, those
    /// are not asked that the record does not know and that were not held before: it means nothing to them.
    fn hear(&mut self, snapshot: &Snapshot, mut hear: impl FnMut(&Arc<Carriage>) -> Fate) -> usize {
        match self {
            Self::Few(few) => retain(few, |carriage| hear(carriage) == Fate::Carried),
            Self::Many(many) => {
                let holders = snapshot.record.holders.iter().map(|holder| holder.id);
                let ids: HashSet<LeaseId> = holders.chain(many.held.iter().copied()).collect();
                let hear = |id| many.retain(id, |carriage| hear(carriage) == Fate::Carried);
                ids.into_iter().map(hear).sum()
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

    /// Keeps those with this id that are to stay, and returns how many go.
    fn retain(&mut self, id: LeaseId, stays: impl FnMut(&Arc<Carriage>) -> bool) -> usize {
        let Some(same) = self.ids.get_mut(&id) else { return 0 };
        let gone = retain(same, stays);
        if same.iter().any(|carriage| carriage.is_held()) {
            self.held.insert(id);
        } else {
            self.held.remove(&id);
        }
        if same.is_empty() {
            self.ids.remove(&id);
        }
        gone
    }
}

fn retain(carriages: &mut Vec<Arc<Carriage>>, stays: impl FnMut(&Arc<Carriage>) -> bool) -> usize {
    let before = carriages.len();
    carriages.retain(stays);
    before - carriages.len()
}

impl State {
    /// Changes what is carried on the key, if anything is. `change` returns how many leases it took out.
    fn on_key(&mut self, key: &Key, change: impl FnOnce(&mut OnKey) -> usize) {
        let Some(on_key) = self.keys.get_mut(key) else { return };
        self.leases -= change(on_key);
        if on_key.carriages.is_empty() {
            self.keys.remove(key);
        }
    }
}

impl Carried {
    /// `most`: how many leases may be carried at once.
    pub(super) fn new(counts: &Arc<Counts>, most: usize) -> Self {
        Self { counts: Arc::clone(counts), most, state: Mutex::default() }
    }

    /// Takes note of a record that a commit of this daemon returned, which applied `edit` and was sent after `sent_at`.
    pub(super) fn own(&self, snapshot: &Arc<Snapshot>, edit: &Edit, sent_at: BootInstant) {
        self.state().on_key(&snapshot.record.key, |on_key| {
            let mut gone = on_key.carriages.hear(snapshot, |carriage| carriage.own(snapshot, edit, sent_at));
            on_key.ahead.take_if(|ahead| ahead.record.version() <= snapshot.record.version());
            if let Some(ahead) = &on_key.ahead {
                gone += on_key.carriages.hear(ahead, |carriage| carriage.foreign(ahead));
            }
            on_key.seen = Some(on_key.ahead.as_ref().unwrap_or(snapshot).record.version());
            gone
        });
    }

    /// Takes note of a record as others may have left it.
    pub(super) fn foreign(&self, snapshot: &Arc<Snapshot>) {
        self.state().on_key(&snapshot.record.key, |on_key| {
            let version = snapshot.record.version();
            if on_key.seen >= Some(version) {
                return 0;
            }
            on_key.seen = Some(version);
            on_key.ahead = Some(Arc::clone(snapshot));
            on_key.carriages.hear(snapshot, |carriage| carriage.foreign(snapshot))
        });
    }

    /// Takes note that the key has no record, or had none yet, and returns what to commit: the answer to a touch says
    /// which it was.
    pub(super) fn missing(&self, key: &Key) -> Vec<(Key, Part)> {
        let state = self.state();
        let Some(on_key) = state.keys.get(key) else { return Vec::new() };
        let held = on_key.carriages.held().into_iter().filter(|carriage| carriage.doubt());
        let ids: HashSet<LeaseId> = held.map(|carriage| carriage.lease().1).collect();
        ids.into_iter().map(|id| (key.clone(), Part::Touch(id))).collect()
    }

    /// Whether a stream carries a lease on this key and does not know the record as of `rev`.
    pub(super) fn wants(&self, key: &Key, rev: Option<i64>) -> bool {
        let state = self.state();
        let Some(on_key) = state.keys.get(key) else { return false };
        rev.is_none() || on_key.seen.map(|(_, seen)| seen) < rev
    }

    /// The keys on which streams carry leases.
    pub(super) fn keys(&self) -> Vec<Key> {
        self.state().keys.keys().cloned().collect()
    }

    /// Lets these hear of records from here on; the first so many, which it returns, if there is no room for all.
    pub(super) fn enter(&self, carriages: &[Arc<Carriage>]) -> usize {
        let mut entered = 0;
        for some in carriages.chunks(PORTION) {
            let mut state = self.state();
            let room = self.most.saturating_sub(state.leases).min(some.len());
            state.leases += room;
            for carriage in &some[..room] {
                let key = carriage.lease().0.clone();
                state.keys.entry(key).or_default().carriages.add(Arc::clone(carriage));
            }
            entered += room;
            if room < some.len() {
                break;
            }
        }
        entered
    }

    /// Takes these out.
    pub(super) fn leave<'a>(&self, carriages: impl IntoIterator<Item = &'a Arc<Carriage>>) {
        let mut carriages = carriages.into_iter().peekable();
        while carriages.peek().is_some() {
            let mut state = self.state();
            for carriage in carriages.by_ref().take(PORTION) {
                state.on_key(&carriage.lease().0, |on_key| on_key.carriages.remove(carriage));
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::super::{Carrier, Touched};
    use super::*;
    use crate::lease::{Acquisition, Mode, Record, Rules, Timestamp, Ttl, step};

    const RULES: Rules = Rules { grace: Duration::ZERO, place: Duration::from_secs(15) };

    fn key() -> Key {
        Key::try_from("key").expect("a key")
    }

    /// The record of a key that `id` has just acquired and touched.
    fn held(id: LeaseId) -> Arc<Snapshot> {
        let acquisition = Acquisition {
            id,
            owner: String::new(),
            metadata: BTreeMap::new(),
            mode: Mode::Exclusive,
            shared_limit: 1,
            ttl: Ttl::new(Duration::from_secs(10)).expect("ten seconds"),
            min_hold: Duration::ZERO,
            wait: false,
            repeated: false,
        };
        let (edit, now) = (Edit::default().enqueue(Arc::new(acquisition)), Timestamp(1000));
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
        assert!(naming.name((key(), three)).is_none());
        assert!(naming.name((key(), two)).is_some(), "what is carried may be named");
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
        assert!(matches!(carried.state().keys[&key()].carriages, Carriages::Many(_)));
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
        drop(carriers);
        assert!(carried.keys().is_empty());
        assert_eq!(carried.state().leases, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_carried_is_bounded_and_what_leaves_makes_room() {
        let carried = Arc::new(Carried::new(&Arc::default(), 3));
        let leases = |count| (0..count).map(|_| (key(), LeaseId::random()));
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
        assert_eq!((other.leases().count(), carried.state().leases), (3, 3));
    }
}
