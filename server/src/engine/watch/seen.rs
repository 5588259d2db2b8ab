//! The latest record that was seen of each watched key, and when its holders' leases run out.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::lease::{Key, Snapshot, State};

/// The most free keys that are kept. While a key is kept, its departures are not reported twice.
const FREE_KEYS: usize = 16_384;
/// The pause before a key is polled again, after a read that failed or found the key lapsed. For a
/// key that stays lapsed the pause doubles with each poll, up to 64 times this.
const POLL_PAUSE: Duration = Duration::from_secs(1);

/// The records of keys that are held or waited for, and of some keys that have become free.
#[derive(Debug, Default)]
pub(crate) struct SeenRecords {
    keys: BTreeMap<Key, SeenRecord>,
    /// When to poll each held or lapsed key. A held key is polled when it lapses, unless it is
    /// touched.
    due: BTreeSet<(Instant, Key)>,
    /// The free keys. The key that has been free longest has the lowest number.
    free: BTreeMap<u64, Key>,
    last_number: u64,
    /// The time of the latest departure from a key that has been forgotten, by the store's clock.
    forgotten_until: i64,
}

/// The record that was seen last of a key.
#[derive(Debug)]
pub(crate) struct SeenRecord {
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) seen_at: Instant,
    /// The leases of all holders had run out.
    pub(crate) has_lapsed: bool,
    /// How many times in a row the key was seen lapsed.
    lapsed_polls: u32,
    due: Option<Instant>,
    /// The key's number in [`SeenRecords::free`].
    free: Option<u64>,
}

impl SeenRecords {
    pub(crate) fn get(&self, key: &Key) -> Option<&SeenRecord> {
        self.keys.get(key)
    }

    /// Returns the instant up to which departures from a key that is not in here may have been
    /// reported already.
    pub(crate) fn forgotten_until(&self) -> i64 {
        self.forgotten_until
    }

    /// Keeps a record in place of the one that was seen before.
    pub(crate) fn note(&mut self, snapshot: &Arc<Snapshot>) {
        let (record, now) = (&snapshot.record, Instant::now());
        let key = record.key.clone();
        let lapsed_polls = self.forget(&key).map_or(0, |seen| seen.lapsed_polls);
        let (due, lapsed_polls) = match snapshot.state() {
            State::Free => (None, 0),
            State::Held => (record.holders.iter().map(|holder| snapshot.remaining(holder)).max(), 0),
            // Polled although it has lapsed: another daemon's touch may make it live again, and the
            // feed reports no touches.
            State::Lapsed => (Some(POLL_PAUSE * 2_u32.pow(lapsed_polls.min(6))), lapsed_polls + 1),
        };
        let due = due.map(|pause| now + pause);
        let is_free = record.holders.is_empty() && record.waiters.is_empty();
        let free = is_free.then(|| {
            self.last_number += 1;
            self.free.insert(self.last_number, key.clone());
            self.last_number
        });
        self.due.extend(due.map(|due| (due, key.clone())));
        let (snapshot, has_lapsed) = (Arc::clone(snapshot), lapsed_polls > 0);
        self.keys.insert(key, SeenRecord { snapshot, seen_at: now, has_lapsed, lapsed_polls, due, free });
        self.limit_free();
    }

    /// Returns when the next poll is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }

    /// Takes the keys to poll by `now`. They are due again after [`POLL_PAUSE`], in case the read
    /// fails.
    pub(crate) fn take_due(&mut self, now: Instant) -> Vec<Key> {
        let mut keys = Vec::new();
        while self.due.first().is_some_and(|(due, _)| *due <= now) {
            let Some((_, key)) = self.due.pop_first() else { break };
            if let Some(seen) = self.keys.get_mut(&key) {
                seen.due = Some(now + POLL_PAUSE);
                self.due.insert((now + POLL_PAUSE, key.clone()));
            }
            keys.push(key);
        }
        keys
    }

    /// Returns the keys that are held or waited for.
    pub(crate) fn occupied(&self) -> Vec<Key> {
        let occupied = self.keys.iter().filter(|(_, seen)| seen.free.is_none());
        occupied.map(|(key, _)| key.clone()).collect()
    }

    /// Goes through the next `count` keys with this prefix after `after`, and forgets the ones that
    /// are not watched. Returns the last key that it went through, if there may be more.
    pub(crate) fn forget_unwatched(
        &mut self,
        prefix: &str,
        after: Option<&Key>,
        count: usize,
        is_watched: impl Fn(&Key) -> bool,
    ) -> Option<Key> {
        let start = after.map_or(Bound::Included(prefix), |after| Bound::Excluded(after.as_str()));
        let rest = self.keys.range::<str, _>((start, Bound::Unbounded)).map(|(key, _)| key);
        let keys: Vec<Key> =
            rest.take_while(|key| key.as_str().starts_with(prefix)).take(count).cloned().collect();
        for key in keys.iter().filter(|key| !is_watched(key)) {
            self.forget(key);
        }
        if keys.len() == count { keys.into_iter().next_back() } else { None }
    }

    /// How many keys are in here.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.keys.len()
    }

    fn forget(&mut self, key: &Key) -> Option<SeenRecord> {
        let seen = self.keys.remove(key)?;
        if let Some(due) = seen.due {
            self.due.remove(&(due, key.clone()));
        }
        if let Some(free) = seen.free {
            self.free.remove(&free);
        }
        Some(seen)
    }

    /// Forgets the keys that have been free longest, if there are too many free keys.
    fn limit_free(&mut self) {
        while self.free.len() > FREE_KEYS {
            let Some((_, key)) = self.free.pop_first() else { return };
            let Some(seen) = self.forget(&key) else { continue };
            let departed = seen.snapshot.record.departures.iter().map(|departure| departure.at.0);
            self.forgotten_until = departed.fold(self.forgotten_until, i64::max);
        }
    }
}
