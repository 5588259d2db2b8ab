//! Which keys are held, waited for or blocked: a listing goes by these, and not through all that are free.
//!
//! Kept in memory, and made from the records when the file is opened, so that commits write nothing for it. A key enters
//! before the commit that takes it, whatever becomes of that commit, and leaves after the commit that frees it. So there
//! may be free keys among these, and a reader looks each record up; but no key is missing that is not free.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use redb::{Database, ReadableDatabase, ReadableTable};

use super::document;
use super::facts::RECORDS;
use crate::lease::{Key, Timestamp};
use crate::store::failure::Failure;

/// Keys taken out at a time.
const CHUNK: usize = 1000;

/// The keys in use, in their order.
#[derive(Debug, Default)]
pub(super) struct InUse(Mutex<BTreeSet<Key>>);

impl InUse {
    /// Those of the records in `database`. A block ends by time alone, so a key with one counts until a purge or a commit.
    pub(super) fn read(&self, database: &Database) -> Result<(), redb::Error> {
        let mut keys = BTreeSet::new();
        for entry in database.begin_read()?.open_table(RECORDS)?.iter()? {
            let (name, bytes) = entry?;
            let Ok(key) = Key::try_from(name.value()) else { continue };
            let record = document::decode(&key, bytes.value());
            // What cannot be read is reported when it is listed.
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

    /// Hands the keys from `start` on to `take`, in their order, until it has enough.
    pub(super) fn walk(
        &self,
        start: &str,
        mut take: impl FnMut(&Key) -> Result<bool, Failure>,
    ) -> Result<(), Failure> {
        let mut from = Bound::Included(start.to_owned());
        loop {
            // Records are looked up without the lock, which every commit needs.
            let chunk: Vec<Key> = {
                let from = (from.as_ref().map(String::as_str), Bound::Unbounded);
                self.keys().range::<str, _>(from).take(CHUNK).cloned().collect()
            };
            for key in &chunk {
                if !take(key)? {
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
        // Nothing in here panics half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
