//! The thread that writes: one transaction for all the batches that wait for it, and the file opened anew after a failure.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

#[cfg(test)]
use redb::ReadableDatabase;
use redb::{Database, ReadableTable, WriteTransaction};
use tokio::sync::oneshot;
use tokio::time::timeout;
use uuid::Uuid;

use super::clock::{Clock, Readings};
use super::disk::Unsynced;
use super::document;
use super::facts::{RECORDS, note_latest};
use super::file::{self, Known, Medium, OpenError};
use super::in_use::InUse;
use crate::lease::{Edit, Key, Record, Rules, Snapshot, Timestamp, step};
use crate::panics::contained;
use crate::store::failure::Failure;
use crate::store::{ForKey, StoreError, makes_record, vacant};

/// Orders that may await the writer. The engine has no more than a few batches in flight; those that have been given
/// up are passed over.
const ORDERS: usize = 16;
/// How long a purge or a check waits for the writer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What writer and readers share.
#[derive(Debug)]
pub(super) struct Home {
    in_use: InUse,
    medium: Box<dyn Medium>,
    rules: Rules,
    store: Uuid,
    clock: Mutex<Clock>,
    unsynced: Unsynced,
    /// The time of the latest commit that was acknowledged.
    acknowledged: AtomicI64,
    /// `None` after a failure, until it has been opened anew.
    database: Mutex<Option<Arc<Database>>>,
    /// Whether the latest write failed.
    fails: AtomicBool,
    /// How many stored records readers have looked at.
    #[cfg(test)]
    pub(super) looked_at: AtomicI64,
}

/// Gives orders to the thread, which ends with the last of these.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    // Dropped first, so that it is the thread that closes the file, which takes time.
    home: Arc<Home>,
    orders: SyncSender<Order>,
}

#[derive(Debug)]
enum Order {
    Commit(Commit),
    Forget { keys: Vec<Key>, free_for: Duration, reply: Reply<u64> },
    Check { reply: Reply<()> },
}

/// A batch, and until when it may begin, on the boot clock: after a suspension nobody waits for it any more.
#[derive(Debug)]
pub(super) struct Commit {
    pub(super) batch: Arc<Vec<(Key, Edit)>>,
    pub(super) until: Duration,
    pub(super) reply: Reply<Vec<ForKey>>,
}

pub(super) type Reply<T> = oneshot::Sender<Result<T, Failure>>;

impl From<document::Unreadable> for StoreError {
    fn from(unreadable: document::Unreadable) -> Self {
        let document::Unreadable { key, what: cause } = unreadable;
        Self::Unreadable { key, cause }
    }
}

/// Before its commit a transaction has changed nothing.
macro_rules! not_applied {
    ($($error:ty),*) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::not_applied(error)
            }
        }
    )*};
}
not_applied!(redb::TransactionError, redb::TableError, redb::StorageError);

impl From<redb::CommitError> for Failure {
    fn from(error: redb::CommitError) -> Self {
        Self::Unknown(error.to_string())
    }
}

impl Home {
    pub(super) fn open(
        medium: Box<dyn Medium>,
        rules: Rules,
        readings: Arc<dyn Readings>,
    ) -> Result<Self, OpenError> {
        medium.prepare()?;
        let unsynced = Unsynced::default();
        let (database, facts) = file::open(&*medium, &unsynced, None)?;
        let mut clock = Clock::resume(readings, facts.anchor.as_ref(), facts.latest);
        let now = clock.now();
        let fail = |error| OpenError::redb(medium.path(), error);
        let store = facts.settle(&database, clock.anchor(), now, &rules).map_err(fail)?;
        let in_use = InUse::default();
        in_use.read(&database).map_err(fail)?;
        Ok(Self {
            in_use,
            medium,
            rules,
            store,
            clock: Mutex::new(clock),
            unsynced,
            acknowledged: AtomicI64::new(facts.latest.0),
            database: Mutex::new(Some(Arc::new(database))),
            fails: AtomicBool::new(false),
            #[cfg(test)]
            looked_at: AtomicI64::default(),
        })
    }

    pub(super) fn rules(&self) -> Rules {
        self.rules
    }

    /// The identity of the store.
    pub(super) fn store(&self) -> Uuid {
        self.store
    }

    /// The database, if it can be used and is still where others find it. What another daemon may have begun to serve
    /// elsewhere must not be told from here.
    pub(super) fn database(&self) -> Result<Arc<Database>, Failure> {
        let open = self.slot().clone();
        let open = open.ok_or_else(|| Failure::not_applied("the file is being opened anew"))?;
        self.medium.find().map_err(Failure::not_applied)?;
        Ok(open)
    }

    pub(super) fn in_use(&self) -> &InUse {
        &self.in_use
    }

    pub(super) fn now(&self) -> Timestamp {
        self.clock().now()
    }

    /// The boot clock.
    pub(super) fn up(&self) -> Duration {
        self.clock().up()
    }

    #[cfg(test)]
    pub(super) fn set_clock(&self, now: Timestamp) {
        self.clock().set(now);
    }

    /// A stored record as it is now.
    pub(super) fn snapshot(&self, key: &Key, bytes: &[u8]) -> Result<Snapshot, document::Unreadable> {
        #[cfg(test)]
        self.looked_at.fetch_add(1, Ordering::Relaxed);
        Ok(Snapshot { record: document::decode(key, bytes)?, now: self.now() })
    }

    #[cfg(test)]
    pub(super) fn look(&self, key: &Key) -> Result<Option<Record>, Failure> {
        let records = self.database()?.begin_read()?.open_table(RECORDS)?;
        let found = records.get(key.as_str())?;
        found.map(|bytes| document::decode(key, bytes.value()).map_err(Failure::refused)).transpose()
    }

    #[cfg(test)]
    pub(super) fn damage(&self, key: &Key) {
        let damaged = self.transact(|transaction| {
            transaction.open_table(RECORDS)?.insert(key.as_str(), b"no record".as_slice())?;
            Ok(((), Changed::Something))
        });
        damaged.expect("a commit");
    }

    #[cfg(test)]
    pub(super) fn forget_unsynced(&self) {
        *self.unsynced.lock().expect("ranges") = super::disk::Ranges::default();
    }

    fn clock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self) -> MutexGuard<'_, Option<Arc<Database>>> {
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The database, opened anew if an earlier failure has closed it, or if the file is not where it was.
    fn reopened(&self) -> Result<Arc<Database>, Failure> {
        match self.database() {
            Ok(database) => return Ok(database),
            Err(failure) if self.slot().is_some() => self.close(&failure),
            Err(_) => {}
        }
        let known = Known { store: self.store, latest: Timestamp(self.acknowledged.load(Ordering::Relaxed)) };
        let (database, facts) =
            file::open(&*self.medium, &self.unsynced, Some(known)).map_err(Failure::not_applied)?;
        let (anchor, now) = {
            let mut clock = self.clock();
            // Another daemon may have had the file meanwhile.
            clock.reach(facts.latest);
            (clock.anchor().clone(), clock.now())
        };
        // Neither applies an edit.
        facts.settle(&database, &anchor, now, &self.rules).map_err(Failure::not_applied)?;
        self.in_use.read(&database).map_err(Failure::not_applied)?;
        Ok(Arc::clone(self.slot().insert(Arc::new(database))))
    }

    /// Runs `write` in a transaction and commits it, unless it changed nothing. After any failure the file is closed:
    /// redb takes no more writes then, and says that what it has in memory cannot be trusted.
    fn transact<T>(
        &self,
        write: impl FnOnce(&WriteTransaction) -> Result<(T, Changed), Failure>,
    ) -> Result<T, Failure> {
        let database = self.reopened()?;
        let transact = || {
            let transaction = database.begin_write()?;
            let (value, changed) = write(&transaction)?;
            if changed == Changed::Something {
                let now = self.now();
                note_latest(&transaction, now).map_err(Failure::not_applied)?;
                transaction.commit()?;
                // A file that was removed meanwhile has taken the commit with it.
                self.medium.find().map_err(Failure::unknown)?;
                self.acknowledged.store(now.0, Ordering::Relaxed);
            }
            Ok(value)
        };
        let done = transact();
        drop(database);
        match &done {
            Err(failure) => self.close(failure),
            Ok(_) if self.fails.swap(false, Ordering::Relaxed) => {
                tracing::info!("the file takes writes again")
            }
            Ok(_) => {}
        }
        done
    }

    /// Closes the file after a failure; the next write opens it anew.
    fn close(&self, failure: &Failure) {
        let database = self.slot().take();
        // A database that a panic left half way may panic again as it closes.
        let _ = contained(|| drop(database));
        if !self.fails.swap(true, Ordering::Relaxed) {
            tracing::error!(?failure, "the file takes no writes; trying again with every commit");
        }
    }

    /// Applies every edit at one instant, but for those of records that cannot be read.
    pub(super) fn commit<'a>(
        &self,
        edits: impl IntoIterator<Item = &'a (Key, Edit)>,
    ) -> Result<Vec<ForKey>, Failure> {
        let (snapshots, freed) = self.transact(|transaction| {
            let mut records = transaction.open_table(RECORDS)?;
            let mut changed = Changed::Nothing;
            let now = self.now();
            let mut freed = Vec::new();
            let mut snapshots = Vec::new();
            let mut bytes = Vec::new();
            for (key, edit) in edits {
                let mut place = records.get_mut(key.as_str())?;
                let known = match &place {
                    Some(place) => document::decode(key, place.value()).map(Some),
                    None => Ok(makes_record(edit).then(|| Record::vacant(key.clone()))),
                };
                let record = match known {
                    Ok(Some(record)) => record,
                    Ok(None) => {
                        snapshots.push(Ok(vacant(key)));
                        continue;
                    }
                    Err(unreadable) => {
                        snapshots.push(Err(unreadable.into()));
                        continue;
                    }
                };
                let (is_taken, is_blocked) = (record.is_taken(), record.blocked_until.is_some());
                let record = step(record, edit, now, &self.rules);
                match record.is_free(now) {
                    true if is_taken || is_blocked => freed.push(key),
                    false if !is_taken => {
                        self.in_use.insert(key);
                        // Freed a moment ago, by an edit whose caller has given up.
                        freed.retain(|freed| *freed != key);
                    }
                    _ => {}
                }
                bytes.clear();
                document::encode(&record, &mut bytes);
                // What has grown may belong on another page, and is looked for anew.
                match place.as_mut().filter(|place| place.value().len() == bytes.len()) {
                    Some(place) => place.insert(bytes.as_slice())?,
                    None => {
                        drop(place);
                        records.insert(key.as_str(), bytes.as_slice())?;
                    }
                }
                changed = Changed::Something;
                snapshots.push(Ok(Snapshot { record, now }));
            }
            Ok(((snapshots, freed), changed))
        })?;
        self.in_use.remove(freed);
        Ok(snapshots)
    }

    /// Forgets those of the keys that nobody has used for long, and takes those that are free from the keys in use.
    fn forget(&self, keys: &[Key], free_for: Duration) -> Result<u64, Failure> {
        let (forgotten, freed) = self.transact(|transaction| {
            let mut records = transaction.open_table(RECORDS)?;
            let now = self.now();
            let mut forgotten = 0;
            let mut freed = Vec::new();
            let mut changed = Changed::Nothing;
            for key in keys {
                let Some(bytes) = records.get(key.as_str())? else { continue };
                let record = document::decode(key, bytes.value());
                drop(bytes);
                let Ok(record) = record else { continue };
                let is_forgettable = record.is_forgettable(now, free_for, self.rules.grace);
                if is_forgettable {
                    records.remove(key.as_str())?;
                    forgotten += 1;
                    changed = Changed::Something;
                }
                if is_forgettable || record.is_free(now) {
                    freed.push(key);
                }
            }
            Ok(((forgotten, freed), changed))
        })?;
        self.in_use.remove(freed);
        Ok(forgotten)
    }

    /// Turns a panic, of which redb has some for damage that it meets on the way, into a failure.
    fn guarded<T>(&self, work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
        contained(work).unwrap_or_else(|_| {
            let failure = Failure::Unknown("the store panicked".to_owned());
            self.close(&failure);
            Err(failure)
        })
    }

    /// Whether a commit would do now. Writes only after a failure.
    pub(super) fn check(&self) -> Result<(), Failure> {
        if self.database().is_ok() {
            return Ok(());
        }
        self.transact(|_| Ok(((), Changed::Something)))
    }
}

/// Why there is no writer.
#[derive(Debug)]
pub(super) enum Unstarted {
    Thread(std::io::Error),
    Store(OpenError),
    Panicked,
}

/// Whether a transaction is worth a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Changed {
    Nothing,
    Something,
}

impl Writer {
    /// Starts the thread and waits until it has opened the store. Opening blocks for as long as the disk takes.
    pub(super) async fn start(
        open: impl FnOnce() -> Result<Home, OpenError> + Send + 'static,
    ) -> Result<Self, Unstarted> {
        let (sender, orders) = sync_channel(ORDERS);
        let (reply, opened) = oneshot::channel();
        let run = move || match open().map(Arc::new) {
            Ok(home) => {
                if reply.send(Ok(Arc::clone(&home))).is_ok() {
                    work(&home, &orders);
                }
            }
            Err(error) => drop(reply.send(Err(error))),
        };
        thread::Builder::new().name("store".to_owned()).spawn(run).map_err(Unstarted::Thread)?;
        let home = opened.await.map_err(|_| Unstarted::Panicked)?.map_err(Unstarted::Store)?;
        Ok(Self { home, orders: sender })
    }

    pub(super) fn home(&self) -> &Arc<Home> {
        &self.home
    }

    /// Applies a batch, if the thread comes to it within `patience`.
    pub(super) async fn commit(
        &self,
        batch: &Arc<Vec<(Key, Edit)>>,
        patience: Duration,
    ) -> Result<Vec<ForKey>, Failure> {
        let (batch, until) = (Arc::clone(batch), self.home.up() + patience);
        self.order(patience, |reply| Order::Commit(Commit { batch, until, reply })).await
    }

    /// Forgets those of the keys that have been free for `free_for`, and returns how many.
    pub(super) async fn forget(&self, keys: Vec<Key>, free_for: Duration) -> Result<u64, Failure> {
        self.order(PATIENCE, |reply| Order::Forget { keys, free_for, reply }).await
    }

    /// Whether the file takes writes.
    pub(super) async fn check(&self) -> Result<(), Failure> {
        self.order(PATIENCE, |reply| Order::Check { reply }).await
    }

    async fn order<T>(
        &self,
        patience: Duration,
        order: impl FnOnce(Reply<T>) -> Order,
    ) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        self.orders.try_send(order(reply)).map_err(|error| match error {
            TrySendError::Full(_) => {
                Failure::not_applied("the disk is slow and the writer has too much to do")
            }
            TrySendError::Disconnected(_) => Failure::not_applied("the writer has ended"),
        })?;
        match timeout(patience, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Failure::Unknown("the writer has ended".to_owned())),
            Err(_) => Err(Failure::Unknown(format!("the disk took longer than {patience:?}"))),
        }
    }
}

fn work(home: &Home, orders: &Receiver<Order>) {
    let mut next = None;
    // Whoever has given up hears nothing.
    while let Some(order) = next.take().or_else(|| orders.recv().ok()) {
        match order {
            Order::Commit(commit) => {
                let mut group = vec![commit];
                for order in orders.try_iter() {
                    match order {
                        Order::Commit(commit) => group.push(commit),
                        other => {
                            next = Some(other);
                            break;
                        }
                    }
                }
                together(home, group);
            }
            Order::Forget { keys, free_for, reply } => {
                drop(reply.send(home.guarded(|| home.forget(&keys, free_for))));
            }
            Order::Check { reply } => drop(reply.send(home.guarded(|| home.check()))),
        }
    }
}

/// Commits batches in one transaction: one sync, and each page written once, for all of them.
pub(super) fn together(home: &Home, mut group: Vec<Commit>) {
    let now = home.up();
    for late in group.extract_if(.., |commit| commit.until < now) {
        drop(late.reply.send(Err(Failure::not_applied("the writer came to it too late"))));
    }
    if group.is_empty() {
        return;
    }
    let edits = || group.iter().flat_map(|commit| commit.batch.iter());
    match home.guarded(|| home.commit(edits())) {
        Ok(snapshots) => {
            let mut snapshots = snapshots.into_iter();
            for Commit { batch, reply, .. } in group {
                drop(reply.send(Ok(snapshots.by_ref().take(batch.len()).collect())));
            }
        }
        Err(failure) => {
            for Commit { reply, .. } in group {
                drop(reply.send(Err(failure.clone())));
            }
        }
    }
}
