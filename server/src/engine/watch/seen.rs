//! What was seen last of the keys that are watched, and when their holders' time is over.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::lease::{Key, Snapshot, State};

/// Free keys that are remembered, so that what departed from them is not told again.
const FREE_KEYS: usize = 16_384;
/// Until a key is looked at again whose look has failed, or whose holders' time is over: another daemon may have had
/// it touched back to life, of which nobody tells. That pause doubles with each look, up to sixty-four times this.
const AGAIN: Duration = Duration::from_secs(1);

/// Keys that are held or waited for, and some that were until lately.
#[derive(Debug, Default)]
pub(crate) struct Known {
    keys: BTreeMap<Key, Seen>,
    /// When each held key is to be looked at: when it lapses, unless it is touched.
    due: BTreeSet<(Instant, Key)>,
    /// Keys that are free; the longest free first.
    free: BTreeMap<u64, Key>,
    last_number: u64,
    /// The latest departure, by the store's clock, from a key that has been forgotten.
    forgotten: i64,
}

/// A key as it was seen last.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) seen_at: Instant,
    /// Its holders' time is over.
    pub(crate) has_lapsed: bool,
    /// How often it has been seen so in a row.
    lapsed_looks: u32,
    due: Option<Instant>,
    /// Its place among the free.
    free: Option<u64>,
}

impl Known {
    pub(crate) fn get(&self, key: &Key) -> Option<&Seen> {
        self.keys.get(key)
    }

    /// Of a key that is not known, what departed up to this instant may have been told.
    pub(crate) fn forgotten(&self) -> i64 {
        self.forgotten
    }

    /// Remembers a record.
    pub(crate) fn note(&mut self, snapshot: &Arc<Snapshot>) {
        let (record, now) = (&snapshot.record, Instant::now());
        let key = record.key.clone();
        let lapsed_looks = self.forget(&key).map_or(0, |seen| seen.lapsed_looks);
        let (due, lapsed_looks) = match snapshot.state() {
            State::Free => (None, 0),
            State::Held => (record.holders.iter().map(|holder| snapshot.remaining(holder)).max(), 0),
            State::Lapsed => (Some(AGAIN * 2_u32.pow(lapsed_looks.min(6))), lapsed_looks + 1),
        };
        let due = due.map(|pause| now + pause);
        let is_free = record.holders.is_empty() && record.waiters.is_empty();
        let free = is_free.then(|| {
            self.last_number += 1;
            self.free.insert(self.last_number, key.clone());
            self.last_number
        });
        self.due.extend(due.map(|due| (due, key.clone())));
        let (snapshot, has_lapsed) = (Arc::clone(snapshot), lapsed_looks > 0);
        self.keys.insert(key, Seen { snapshot, seen_at: now, has_lapsed, lapsed_looks, due, free });
        self.bound();
    }

    /// The earliest lapse.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }

    /// Keys whose time is over by `now`, if they were not touched meanwhile; each once, and again a while later.
    pub(crate) fn take_due(&mut self, now: Instant) -> Vec<Key> {
        let mut keys = Vec::new();
        while self.due.first().is_some_and(|(due, _)| *due <= now) {
            let Some((_, key)) = self.due.pop_first() else { break };
            if let Some(seen) = self.keys.get_mut(&key) {
                seen.due = Some(now + AGAIN);
                self.due.insert((now + AGAIN, key.clone()));
            }
            keys.push(key);
        }
        keys
    }

    /// The keys that are held or waited for.
    pub(crate) fn taken(&self) -> Vec<Key> {
        let taken = self.keys.iter().filter(|(_, seen)| seen.free.is_none());
        taken.map(|(key, _)| key.clone()).collect()
    }

    /// Of the next `count` keys with this prefix after `after`, forgets those that are not wanted any more. Returns the
    /// last of them, if there may be more.
    pub(crate) fn tidy(
        &mut self,
        prefix: &str,
        after: Option<&Key>,
        count: usize,
        wanted: impl Fn(&Key) -> bool,
    ) -> Option<Key> {
        let start = after.map_or(Bound::Included(prefix), |after| Bound::Excluded(after.as_str()));
        let rest = self.keys.range::<str, _>((start, Bound::Unbounded)).map(|(key, _)| key);
        let keys: Vec<Key> =
            rest.take_while(|key| key.as_str().starts_with(prefix)).take(count).cloned().collect();
        for key in keys.iter().filter(|key| !wanted(key)) {
            self.forget(key);
        }
        if keys.len() == count { keys.into_iter().next_back() } else { None }
    }

    /// How many keys are known.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.keys.len()
    }

    fn forget(&mut self, key: &Key) -> Option<Seen> {
        let seen = self.keys.remove(key)?;
        if let Some(due) = seen.due {
            self.due.remove(&(due, key.clone()));
        }
        if let Some(free) = seen.free {
            self.free.remove(&free);
        }
        Some(seen)
    }

    /// Forgets the longest free when there are too many.
    fn bound(&mut self) {
        while self.free.len() > FREE_KEYS {
            let Some((_, key)) = self.free.pop_first() else { return };
            let Some(seen) = self.forget(&key) else { continue };
            let departed = seen.snapshot.record.departures.iter().map(|departure| departure.at.0);
            self.forgotten = departed.fold(self.forgotten, i64::max);
        }
    }
}
