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
use crate::lease::{FencingToken, Key, LeaseId, Snapshot};

/// Leases carried by the streams of this daemon, by key. The streams bound it: each takes out what it brought.
#[derive(Debug)]
#[cfg_attr(test, derive(Default))]
pub(super) struct Carried {
    pub(super) counts: Arc<Counts>,
    keys: Mutex<HashMap<Key, OnKey>>,
}

#[derive(Debug, Default)]
struct OnKey {
    carriages: Vec<Arc<Carriage>>,
    /// The newest record that was seen.
    seen: Option<(FencingToken, i64)>,
    /// A record of others that is newer than what the last commit of this daemon returned. The next commit to return
    /// may still be older than it.
    ahead: Option<Arc<Snapshot>>,
}

impl Carried {
    pub(super) fn new(counts: &Arc<Counts>) -> Self {
        Self { counts: Arc::clone(counts), keys: Mutex::default() }
    }

    /// Takes note of a record that a commit of this daemon returned, which renewed `touched` and was sent after `sent_at`.
    pub(super) fn own(&self, snapshot: &Arc<Snapshot>, touched: &[LeaseId], sent_at: BootInstant) {
        let mut keys = self.state();
        let key = &snapshot.record.key;
        let Some(on_key) = keys.get_mut(key) else { return };
        on_key.carriages.retain(|carriage| carriage.own(snapshot, touched, sent_at) == Fate::Carried);
        on_key.ahead.take_if(|ahead| ahead.record.version() <= snapshot.record.version());
        if let Some(ahead) = &on_key.ahead {
            on_key.carriages.retain(|carriage| carriage.foreign(ahead) == Fate::Carried);
        }
        on_key.seen = Some(on_key.ahead.as_ref().unwrap_or(snapshot).record.version());
        if on_key.carriages.is_empty() {
            keys.remove(key);
        }
    }

    /// Takes note of a record as others may have left it.
    pub(super) fn foreign(&self, snapshot: &Arc<Snapshot>) {
        let mut keys = self.state();
        let key = &snapshot.record.key;
        let Some(on_key) = keys.get_mut(key) else { return };
        let version = snapshot.record.version();
        if on_key.seen >= Some(version) {
            return;
        }
        on_key.seen = Some(version);
        on_key.ahead = Some(Arc::clone(snapshot));
        on_key.carriages.retain(|carriage| carriage.foreign(snapshot) == Fate::Carried);
        if on_key.carriages.is_empty() {
            keys.remove(key);
        }
    }

    /// Takes note that the key has no record, or had none yet, and returns what to commit: the answer to a touch says
    /// which it was.
    pub(super) fn missing(&self, key: &Key) -> Vec<(Key, Part)> {
        let keys = self.state();
        let Some(on_key) = keys.get(key) else { return Vec::new() };
        let held = on_key.carriages.iter().filter(|carriage| carriage.doubt());
        let ids: HashSet<LeaseId> = held.map(|carriage| carriage.lease().1).collect();
        ids.into_iter().map(|id| (key.clone(), Part::Touch(id))).collect()
    }

    /// Whether a stream carries a lease on this key and does not know the record as of `rev`.
    pub(super) fn wants(&self, key: &Key, rev: Option<i64>) -> bool {
        let keys = self.state();
        let Some(on_key) = keys.get(key) else { return false };
        rev.is_none() || on_key.seen.map(|(_, seen)| seen) < rev
    }

    /// The keys on which streams carry leases.
    pub(super) fn keys(&self) -> Vec<Key> {
        self.state().keys().cloned().collect()
    }

    /// Lets these hear of records from here on.
    pub(super) fn enter(&self, carriages: &[Arc<Carriage>]) {
        let mut keys = self.state();
        for carriage in carriages {
            keys.entry(carriage.lease().0.clone()).or_default().carriages.push(Arc::clone(carriage));
        }
    }

    /// Takes out all that is over on these keys.
    pub(super) fn sweep<'a>(&self, swept: impl IntoIterator<Item = &'a Key>) {
        // A key at a time and once: there may be as many leases on one key as a stream carries.
        let swept: HashSet<&Key> = swept.into_iter().collect();
        let mut keys = self.state();
        for key in swept {
            let Some(on_key) = keys.get_mut(key) else { continue };
            on_key.carriages.retain(|carriage| !carriage.is_over());
            if on_key.carriages.is_empty() {
                keys.remove(key);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, HashMap<Key, OnKey>> {
        // Nothing in here panics half-way through a change.
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::super::{Carrier, Touched};
    use super::*;
    use crate::lease::{Acquisition, Edit, Mode, Record, Rules, Timestamp, Ttl, step};

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
        carried.own(&held(id), &[id], BootInstant::now());
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
        carried.own(&held(id), &[id], BootInstant::now());
        assert!(lease.is_fresh(BootInstant::now()));
        assert!(matches!(carried.missing(&key())[..], [(_, Part::Touch(touched))] if touched == id));
        assert!(!lease.is_fresh(BootInstant::now()), "memory does for it no more");
        carrier.settle(vec![(lease, None)]);

        let vacant = Arc::new(Snapshot { record: Record::vacant(key()), now: Timestamp(2000) });
        carried.own(&vacant, &[id], BootInstant::now());
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
        carried.own(&held(two), &[two], BootInstant::now());
        let vacant = Arc::new(Snapshot { record: Record::vacant(key()), now: Timestamp(2000) });
        carried.own(&vacant, &[], BootInstant::now());
        let settled = carrier.settle(vec![(first, None), (again, None), (second, None)]);
        assert!(matches!(settled[2].1, Touched::Lost(_)), "{settled:?}");
        drop(carrier.naming(2).name((key(), two)).expect("what is lost makes room"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_loss_that_nobody_waited_for_yet_is_found_later() {
        let (carried, id) = (Arc::new(Carried::default()), LeaseId::random());
        let mut carrier = Carrier::new(&carried);
        let lease = carrier.naming(1).name((key(), id)).expect("room");
        carried.own(&held(id), &[id], BootInstant::now());
        carrier.settle(vec![(lease, None)]);
        assert!(
            tokio::time::timeout(Duration::from_secs(1), carrier.lost()).await.is_err(),
            "nothing is lost"
        );
        let mut after = Snapshot::clone(&held(id));
        after.record = step(after.record, &Edit::default().release(id), after.now, &RULES);
        carried.own(&Arc::new(after), &[], BootInstant::now());
        // A wait that is given up takes nothing with it.
        assert_eq!(carrier.lost().await.len(), 1);
    }
}
