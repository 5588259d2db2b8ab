//! The tables of the file, and what it says of itself: its format, its identity, and its clock.

use std::sync::Arc;
use std::time::Duration;

use redb::backends::InMemoryBackend;
use redb::{
    Database, ReadTransaction, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition, TableError,
    WriteTransaction,
};
use uuid::Uuid;

use super::clock::Anchor;
use super::disk::{Disk, Unsynced};
use super::document;
use crate::lease::{Key, Record, Rules, Timestamp};

/// Records by key.
pub(super) const RECORDS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("records");
/// Numbers about the whole.
const FACTS: TableDefinition<'_, &str, i64> = TableDefinition::new("leased");
/// Names of the whole. Absent from files that an earlier version laid out, until this one opens them.
pub(super) const NAMES: TableDefinition<'_, &str, &str> = TableDefinition::new("names");

/// The number that says how the rest is to be read.
const FORMAT: &str = "format";
/// The only format there is so far.
const THIS_FORMAT: i64 = 1;
/// What the clock showed at the latest commit.
const LATEST: &str = "latest";
/// The two times of the clock's anchor.
const ANCHOR_UP: &str = "anchor_up";
const ANCHOR_TIME: &str = "anchor_time";
/// The boot of the clock's anchor.
const ANCHOR_BOOT: &str = "anchor_boot";
/// The identity of the store.
const STORE: &str = "store";
/// Records looked through at a time when holders are renewed.
const CHUNK: usize = 1000;

/// What a file says of itself.
#[derive(Debug)]
pub(super) struct Facts {
    /// `None` in a file that an earlier version laid out.
    pub(super) store: Option<Uuid>,
    pub(super) latest: Timestamp,
    pub(super) anchor: Option<Anchor>,
}

/// Why a database is not one of ours.
#[derive(Debug)]
pub(super) enum Stranger {
    Foreign(&'static str),
    Newer,
    Damaged(&'static str),
    Failed(redb::Error),
}

impl<E: Into<redb::Error>> From<E> for Stranger {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl Facts {
    /// Reads the facts of a database that may be anybody's.
    pub(super) fn read(database: &Database) -> Result<Self, Stranger> {
        const FOREIGN: Stranger = Stranger::Foreign("a redb database of another program");
        let reading = database.begin_read()?;
        if reading.list_tables()?.next().is_none() {
            return Err(Stranger::Foreign("a redb database without tables"));
        }
        let facts = match reading.open_table(FACTS) {
            Ok(facts) => facts,
            Err(TableError::Storage(error)) => return Err(error.into()),
            Err(_) => return Err(FOREIGN),
        };
        let fact = |name| facts.get(name).map(|found| found.map(|found| found.value()));
        match fact(FORMAT)? {
            Some(THIS_FORMAT) => {}
            Some(format) if format > THIS_FORMAT => return Err(Stranger::Newer),
            _ => return Err(FOREIGN),
        }
        let anchor = match (fact(ANCHOR_UP)?, fact(ANCHOR_TIME)?, name(&reading, ANCHOR_BOOT)?) {
            (Some(up), Some(time), Some(boot)) => Some(Anchor { boot, up, time: Timestamp(time) }),
            _ => None,
        };
        let store = name(&reading, STORE)?.map(|store| store.parse());
        Ok(Self {
            store: store.transpose().map_err(|_| Stranger::Damaged("its identity is no UUID"))?,
            latest: Timestamp(fact(LATEST)?.unwrap_or(0)),
            anchor,
        })
    }

    /// Makes the identity and the clock's anchor durable, unless the file has them already, and returns the identity.
    ///
    /// With a new anchor the holders are renewed: the wall clock, which set it, may have been set ahead since the
    /// latest commit, and must not end the lease of a holder that still believes in it.
    pub(super) fn settle(
        &self,
        database: &Database,
        anchor: &Anchor,
        now: Timestamp,
        rules: &Rules,
    ) -> Result<Uuid, redb::Error> {
        let store = self.store.unwrap_or_else(Uuid::new_v4);
        let is_anchored = self.anchor.as_ref() == Some(anchor);
        if self.store.is_some() && is_anchored {
            return Ok(store);
        }
        let transaction = database.begin_write()?;
        if !is_anchored {
            renew(&transaction, self.latest, now, rules)?;
        }
        {
            let mut facts = transaction.open_table(FACTS)?;
            facts.insert(ANCHOR_UP, anchor.up)?;
            facts.insert(ANCHOR_TIME, anchor.time.0)?;
            let mut names = transaction.open_table(NAMES)?;
            names.insert(ANCHOR_BOOT, anchor.boot.as_str())?;
            names.insert(STORE, store.to_string().as_str())?;
        }
        note_latest(&transaction, now)?;
        transaction.commit()?;
        Ok(store)
    }
}

/// Notes in a transaction what the clock shows at its commit.
pub(super) fn note_latest(transaction: &WriteTransaction, now: Timestamp) -> Result<(), redb::Error> {
    transaction.open_table(FACTS)?.insert(LATEST, now.0)?;
    Ok(())
}

fn name(reading: &ReadTransaction, name: &str) -> Result<Option<String>, redb::Error> {
    match reading.open_table(NAMES) {
        Ok(names) => Ok(names.get(name)?.map(|found| found.value().to_owned())),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The bytes of a whole database that holds no leases.
pub(super) fn blank() -> Vec<u8> {
    let memory: Arc<dyn StorageBackend> = Arc::new(InMemoryBackend::new());
    fill(&memory).expect("memory takes an empty database");
    let length = memory.len().expect("memory has a length");
    let mut bytes = vec![0; usize::try_from(length).expect("an empty database is small")];
    memory.read(0, &mut bytes).expect("memory shows what is in it");
    bytes
}

fn fill(memory: &Arc<dyn StorageBackend>) -> Result<(), redb::Error> {
    let disk = Disk::new(Arc::clone(memory), &Unsynced::default())?;
    disk.accept()?;
    let database = Database::builder().create_with_backend(disk)?;
    let writing = database.begin_write()?;
    writing.open_table(RECORDS)?;
    writing.open_table(FACTS)?.insert(FORMAT, THIS_FORMAT)?;
    writing.open_table(NAMES)?.insert(STORE, Uuid::new_v4().to_string().as_str())?;
    writing.commit()?;
    Ok(database.close()?)
}

/// Touches every holder and refreshes every place, except those that had lapsed by the latest commit already: nobody
/// believes in these, and a lease that ended long ago must not take its key again. What a `min_hold` had left then it has
/// left again.
fn renew(
    transaction: &WriteTransaction,
    latest: Timestamp,
    now: Timestamp,
    rules: &Rules,
) -> Result<(), redb::Error> {
    let mut records = transaction.open_table(RECORDS)?;
    let mut from = String::new();
    loop {
        let mut renewed = Vec::new();
        let mut next = None;
        for (number, entry) in records.range(from.as_str()..)?.enumerate() {
            let (name, bytes) = entry?;
            if number == CHUNK {
                next = Some(name.value().to_owned());
                break;
            }
            // What cannot be read stays as it is; the calls for its key say so.
            let Ok(key) = Key::try_from(name.value()) else { continue };
            let Ok(mut record) = document::decode(&key, bytes.value()) else { continue };
            if renew_record(&mut record, latest, now, rules) {
                let mut bytes = Vec::new();
                document::encode(&record, &mut bytes);
                renewed.push((key, bytes));
            }
        }
        for (key, bytes) in renewed {
            records.insert(key.as_str(), bytes.as_slice())?;
        }
        let Some(next) = next else { return Ok(()) };
        from = next;
    }
}

/// Returns whether the record changed.
fn renew_record(record: &mut Record, latest: Timestamp, now: Timestamp, rules: &Rules) -> bool {
    let holders = record.holders.iter_mut().map(|holder| (&mut holder.expires_at, holder.ttl.get()));
    let waiters = record.waiters.iter_mut().map(|waiter| (&mut waiter.expires_at, rules.place));
    let mut changed = false;
    for (expires_at, lasts) in holders.chain(waiters) {
        if *expires_at > latest && *expires_at < now + lasts {
            *expires_at = now + lasts;
            changed = true;
        }
    }
    // How long the machine was off is not known: the wall clock may be what jumped. So none of that time counts. A file of
    // an earlier version may not say when its latest commit was.
    let jumped = if latest > Timestamp(0) { now - latest } else { Duration::ZERO };
    for holder in &mut record.holders {
        if !holder.min_hold.is_zero() && holder.acquired_at + holder.min_hold > latest {
            holder.min_hold += jumped;
            changed = true;
        }
    }
    if let Some(until) = record.blocked_until.as_mut().filter(|until| **until > latest) {
        *until = *until + jumped;
        changed = true;
    }
    record.rev += i64::from(changed);
    changed
}
