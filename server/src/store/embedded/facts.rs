//! The tables of the file, and the facts that it keeps about itself: its format, its identity and
//! its clock.

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
/// Facts that are numbers.
const FACTS: TableDefinition<'_, &str, i64> = TableDefinition::new("leased");
/// Facts that are text. A file of an earlier version lacks this table until this version opens it.
pub(super) const NAMES: TableDefinition<'_, &str, &str> = TableDefinition::new("names");

/// The number of the format. A file of a later format is refused.
const FORMAT: &str = "format";
/// The only format there is so far.
const THIS_FORMAT: i64 = 1;
/// The store's time at the latest commit.
const LATEST: &str = "latest";
/// The clock's anchor: its reading of the boot clock.
const ANCHOR_UP: &str = "anchor_up";
/// The clock's anchor: the store's time at that reading.
const ANCHOR_TIME: &str = "anchor_time";
/// The clock's anchor: the boot that it is valid for.
const ANCHOR_BOOT: &str = "anchor_boot";
/// The identity of the store.
const STORE: &str = "store";
/// How many records are read before the renewed ones are written. Bounds the memory of a renewal.
const CHUNK: usize = 1000;

/// What a file says about itself.
#[derive(Debug)]
pub(super) struct Facts {
    /// The identity of the store. `None` in a file of an earlier version.
    pub(super) store: Option<Uuid>,
    /// The store's time at the latest commit.
    pub(super) latest: Timestamp,
    /// The clock's anchor. `None` in a file of an earlier version.
    pub(super) anchor: Option<Anchor>,
}

/// Why the facts of a database cannot be used.
#[derive(Debug)]
pub(super) enum FactsError {
    /// Another program made the database.
    Foreign(&'static str),
    /// A later version of this program made the database.
    Newer,
    /// The database is ours, and a fact is invalid.
    Damaged(&'static str),
    Failed(redb::Error),
}

impl<E: Into<redb::Error>> From<E> for FactsError {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl Facts {
    /// Reads the facts of a database that any program may have made.
    pub(super) fn read(database: &Database) -> Result<Self, FactsError> {
        const FOREIGN: FactsError = FactsError::Foreign("a redb database of another program");
        let reading = database.begin_read()?;
        if reading.list_tables()?.next().is_none() {
            return Err(FactsError::Foreign("a redb database without tables"));
        }
        let facts = match reading.open_table(FACTS) {
            Ok(facts) => facts,
            Err(TableError::Storage(error)) => return Err(error.into()),
            Err(_) => return Err(FOREIGN),
        };
        let fact = |name| facts.get(name).map(|found| found.map(|found| found.value()));
        match fact(FORMAT)? {
            Some(THIS_FORMAT) => {}
            Some(format) if format > THIS_FORMAT => return Err(FactsError::Newer),
            _ => return Err(FOREIGN),
        }
        let anchor = match (fact(ANCHOR_UP)?, fact(ANCHOR_TIME)?, name(&reading, ANCHOR_BOOT)?) {
            (Some(up), Some(time), Some(boot)) => Some(Anchor { boot, up, time: Timestamp(time) }),
            _ => None,
        };
        let store = name(&reading, STORE)?.map(|store| store.parse());
        Ok(Self {
            store: store.transpose().map_err(|_| FactsError::Damaged("its identity is no UUID"))?,
            latest: Timestamp(fact(LATEST)?.unwrap_or(0)),
            anchor,
        })
    }

    /// Writes the identity and the clock's anchor to the file, unless it has them already. Returns
    /// the identity.
    ///
    /// If the anchor is new, the holders are renewed. A new anchor comes from the wall clock, which
    /// may have been set forward since the latest commit. A clock that was set must not end a lease
    /// on which its holder still relies.
    pub(super) fn persist(
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

/// Writes the time of a commit into its transaction.
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

/// Returns the bytes of a complete database without leases.
pub(super) fn empty_database() -> Vec<u8> {
    let memory: Arc<dyn StorageBackend> = Arc::new(InMemoryBackend::new());
    fill(&memory).expect("memory has room for an empty database");
    let length = memory.len().expect("memory has a length");
    let mut bytes = vec![0; usize::try_from(length).expect("an empty database is small")];
    memory.read(0, &mut bytes).expect("memory can be read");
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

/// Extends the leases of all holders and the entries of all waiters, except those that had lapsed
/// by the latest commit. No holder relies on a lapsed lease, and a lease that lapsed long ago must
/// not take its key again. Each `min_hold` keeps the time that was left of it at the latest commit.
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
            // A record that cannot be read stays as it is. Calls for its key report it.
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

/// Renews one record, as [`renew`] says. Returns whether the record changed.
fn renew_record(record: &mut Record, latest: Timestamp, now: Timestamp, rules: &Rules) -> bool {
    let holders = record.holders.iter_mut().map(|holder| (&mut holder.expires_at, holder.ttl.get()));
    let waiters = record.waiters.iter_mut().map(|waiter| (&mut waiter.expires_at, rules.waiter_ttl));
    let mut changed = false;
    for (expires_at, extension) in holders.chain(waiters) {
        if *expires_at > latest && *expires_at < now + extension {
            *expires_at = now + extension;
            changed = true;
        }
    }
    // How long the machine was off is unknown, because the wall clock may have been set. So none of
    // the time since the latest commit counts. A file of an earlier version may lack the time of
    // its latest commit.
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
