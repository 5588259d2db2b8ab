//! The keys that are in use: held, waited for or blocked. A listing reads these and skips the free
//! ones.
//!
//! The set is kept in memory, so commits write nothing for it. It is built from the records when
//! the file is opened. A key enters the set before the commit that takes it, and leaves after the
//! commit that frees it. So every key in use is in the set. Free keys may be in it too, for example
//! after a commit that failed, so a reader checks each record.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use redb::{Database, ReadableDatabase, ReadableTable};

use super::document;
use super::facts::RECORDS;
use crate::lease::{Key, Timestamp};
use crate::store::failure::Failure;

/// How many keys [`InUse::walk`] copies while it holds the lock.
const CHUNK: usize = 1000;

/// The keys in use, in ascending order.
#[derive(Debug, Default)]
pub(super) struct InUse(Mutex<BTreeSet<Key>>);

impl InUse {
    /// Builds the set from the records in `database`. A block ends by time alone, without a write,
    /// so a blocked key stays in the set until a purge or a commit removes it.
    pub(super) fn read(&self, database: &Database) -> Result<(), redb::Error> {
        let mut keys = BTreeSet::new();
        for entry in database.begin_read()?.open_table(RECORDS)?.iter()? {
            let (name, bytes) = entry?;
            let Ok(key) = Key::try_from(name.value()) else { continue };
            let record = document::decode(&key, bytes.value());
            // A record that cannot be read counts as in use, so that a listing reports it. At the
            // earliest instant no block is over, so every blocked key is in the set.
            if record.map_or(true, |record| !record.is_free(Timestamp(i64::MIN))) {
                keys.insert(key);
            }
        }
        *self.keys() = keys;
        Ok(())
    }

    pub(super) fn insert(&self, key: &Key) {
        self.keys().insert(key.clone());
    }

    pub(super) fn remove<'a>(&self, freed: impl IntoIterator<Item = &'a Key>) {
        let mut keys = self.keys();
        for key in freed {
            keys.remove(key);
        }
    }

    pub(super) fn contains(&self, key: &Key) -> bool {
        self.keys().contains(key)
    }

    /// Calls `visit` with the keys from `start` on, in ascending order, until it returns false.
    pub(super) fn walk(
        &self,
        start: &str,
        mut visit: impl FnMut(&Key) -> Result<bool, Failure>,
    ) -> Result<(), Failure> {
        let mut from = Bound::Included(start.to_owned());
        loop {
            // `visit` reads records. It runs without the lock, because every commit needs the lock.
            let chunk: Vec<Key> = {
                let from = (from.as_ref().map(String::as_str), Bound::Unbounded);
                self.keys().range::<str, _>(from).take(CHUNK).cloned().collect()
            };
            for key in &chunk {
                if !visit(key)? {
                    return Ok(());
                }
            }
            match chunk.last() {
                Some(last) => from = Bound::Excluded(last.as_str().to_owned()),
                None => return Ok(()),
            }
        }
    }

    fn keys(&self) -> MutexGuard<'_, BTreeSet<Key>> {
        // No code panics half-way through a change of the set, so a poisoned lock is harmless.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
