//! The leases that keepalive streams carry: which record concerns which of them.
//!
//! A commit of this daemon comes in the order of its key's commits, so whoever was held and is not any more is lost. A
//! record of others may have been read before the lease was granted: it tells of a loss only if it is newer than a
//! commit of this daemon that showed the lease held.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::carriage::{Carriage, Fate};
use super::part::Part;
use crate::lease::{FencingToken, Key, LeaseId, Record, Snapshot};

/// Orders the states of a key's record: tokens rise from one life of it to the next, where revisions begin anew.
pub(super) type Version = (FencingToken, i64);

/// Which state of its key a record is.
pub(super) fn version(record: &Record) -> Version {
    (record.token, record.rev)
}

/// Leases carried by the streams of this daemon, by key. The streams bound it: each takes out what it brought.
#[derive(Debug, Default)]
pub(super) struct Carried {
    keys: Mutex<HashMap<Key, OnKey>>,
}

#[derive(Debug, Default)]
struct OnKey {
    carriages: Vec<Arc<Carriage>>,
    /// The newest record that was seen.
    seen: Option<Version>,
    /// A record of others that is newer than what the last commit of this daemon returned. The next commit to return
    /// may still be older than it.
    ahead: Option<Arc<Snapshot>>,
}

impl Carried {
    /// Takes note of a record that a commit of this daemon returned, which renewed `touched` and was sent after `sent_at`.
    pub(super) fn own(&self, snapshot: &Arc<Snapshot>, touched: &[LeaseId], sent_at: Instant) {
        let mut keys = self.state();
        let key = &snapshot.record.key;
        let Some(on_key) = keys.get_mut(key) else { return };
        on_key.carriages.retain(|carriage| carriage.own(snapshot, touched, sent_at) == Fate::Carried);
        on_key.ahead.take_if(|ahead| version(&ahead.record) <= version(&snapshot.record));
        if let Some(ahead) = &on_key.ahead {
            on_key.carriages.retain(|carriage| carriage.foreign(ahead) == Fate::Carried);
        }
        on_key.seen = Some(version(&on_key.ahead.as_ref().unwrap_or(snapshot).record));
        if on_key.carriages.is_empty() {
            keys.remove(key);
        }
    }

    /// Takes note of a record as others may have left it.
    pub(super) fn foreign(&self, snapshot: &Arc<Snapshot>) {
        let mut keys = self.state();
        let key = &snapshot.record.key;
        let Some(on_key) = keys.get_mut(key) else { return };
        let version = version(&snapshot.record);
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
