//! The writer thread. It commits all waiting batches in one transaction, and opens the file again
//! after a failure.

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
use super::file::{self, Expected, Medium, OpenError};
use super::in_use::InUse;
use crate::lease::{Edit, Key, Record, Rules, Snapshot, Timestamp, step};
use crate::panics::contained;
use crate::store::failure::Failure;
use crate::store::{ForKey, StoreError, makes_record, vacant};

/// How many requests may wait for the writer. The engine has only a few batches in flight, but
/// batches whose callers have given up stay in the queue until the writer reaches them.
const REQUESTS: usize = 16;
/// How long a purge or a check waits for the writer.
const PATIENCE: Duration = Duration::from_secs(5);

/// An open store: what the writer thread and the readers share.
#[derive(Debug)]
pub(super) struct OpenStore {
    in_use: InUse,
    medium: Box<dyn Medium>,
    rules: Rules,
    /// The identity of the store.
    id: Uuid,
    clock: Mutex<Clock>,
    unsynced: Unsynced,
    /// The time of the latest commit that was acknowledged.
    acknowledged: AtomicI64,
    /// `None` after a failure, until the file is opened again.
    database: Mutex<Option<Arc<Database>>>,
    /// Whether the latest write failed.
    is_failing: AtomicBool,
    /// How many stored records readers have looked at.
    #[cfg(test)]
    pub(super) looked_at: AtomicI64,
}

/// A handle to the writer thread. The thread ends when the last clone is dropped.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    // Declared first, so dropped first: then the thread drops the last reference and closes the
    // file, which takes time.
    store: Arc<OpenStore>,
    requests: SyncSender<Request>,
}

#[derive(Debug)]
enum Request {
    Commit(Commit),
    Purge { keys: Vec<Key>, free_for: Duration, reply: Reply<u64> },
    Check { reply: Reply<()> },
}

/// A batch to commit.
#[derive(Debug)]
pub(super) struct Commit {
    pub(super) batch: Arc<Vec<(Key, Edit)>>,
    /// The latest instant at which the writer may begin the batch. On the boot clock, because after
    /// a suspension no call waits for the batch any more.
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

/// These errors come before the commit of a transaction, when nothing has been changed.
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
        // A commit may fail after it has reached the disk.
        Self::Unknown(error.to_string())
    }
}

impl OpenStore {
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
        let id = facts.persist(&database, clock.anchor(), now, &rules).map_err(fail)?;
        let in_use = InUse::default();
        in_use.read(&database).map_err(fail)?;
        Ok(Self {
            in_use,
            medium,
            rules,
            id,
            clock: Mutex::new(clock),
            unsynced,
            acknowledged: AtomicI64::new(facts.latest.0),
            database: Mutex::new(Some(Arc::new(database))),
            is_failing: AtomicBool::new(false),
            #[cfg(test)]
            looked_at: AtomicI64::default(),
        })
    }

    pub(super) fn rules(&self) -> Rules {
        self.rules
    }

    /// The identity of the store.
    pub(super) fn id(&self) -> Uuid {
        self.id
    }

    /// Returns the database if it is open and its path still leads to it. If the file was moved
    /// away or replaced, another daemon may be serving what is at the path, so this one must not
    /// answer from its own file.
    pub(super) fn database(&self) -> Result<Arc<Database>, Failure> {
        let open = self.slot().clone();
        let open = open.ok_or_else(|| Failure::not_applied("the file is being opened again"))?;
        self.medium.check_path().map_err(Failure::not_applied)?;
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

    /// Decodes a stored record and adds the store's time.
    pub(super) fn snapshot(&self, key: &Key, bytes: &[u8]) -> Result<Snapshot, document::Unreadable> {
        #[cfg(test)]
        self.looked_at.fetch_add(1, Ordering::Relaxed);
        Ok(Snapshot { record: document::decode(key, bytes)?, now: self.now() })
    }

    #[cfg(test)]
    pub(super) fn read(&self, key: &Key) -> Result<Option<Record>, Failure> {
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

    /// Returns the database. Opens it again if a failure has closed it or if its path leads
    /// elsewhere.
    fn reopened(&self) -> Result<Arc<Database>, Failure> {
        match self.database() {
            Ok(database) => return Ok(database),
            Err(failure) if self.slot().is_some() => self.close(&failure),
            Err(_) => {}
        }
        let expected =
            Expected { store: self.id, latest: Timestamp(self.acknowledged.load(Ordering::Relaxed)) };
        let (database, facts) =
            file::open(&*self.medium, &self.unsynced, Some(expected)).map_err(Failure::not_applied)?;
        let (anchor, now) = {
            let mut clock = self.clock();
            // Another daemon may have committed to the file meanwhile.
            clock.advance_to(facts.latest);
            (clock.anchor().clone(), clock.now())
        };
        // No edit has been applied yet, so a failure here is never of unknown outcome.
        facts.persist(&database, &anchor, now, &self.rules).map_err(Failure::not_applied)?;
        self.in_use.read(&database).map_err(Failure::not_applied)?;
        Ok(Arc::clone(self.slot().insert(Arc::new(database))))
    }

    /// Runs `write` in a transaction and commits it, unless `write` changed nothing. Closes the
    /// file after any failure, because redb then refuses further writes: its state in memory may be
    /// wrong.
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
                // A commit to a file that was removed is synced like any other, and is lost all the
                // same.
                self.medium.check_path().map_err(Failure::unknown)?;
                self.acknowledged.store(now.0, Ordering::Relaxed);
            }
            Ok(value)
        };
        let done = transact();
        // Before `close`, which then drops the writer's last reference.
        drop(database);
        match &done {
            Err(failure) => self.close(failure),
            Ok(_) if self.is_failing.swap(false, Ordering::Relaxed) => {
                tracing::info!("the file can be written again")
            }
            Ok(_) => {}
        }
        done
    }

    /// Closes the file after a failure. The next write opens it again.
    fn close(&self, failure: &Failure) {
        let database = self.slot().take();
        // A database in which a write panicked may panic again as it closes.
        let _ = contained(|| drop(database));
        if !self.is_failing.swap(true, Ordering::Relaxed) {
            tracing::error!(?failure, "the file cannot be written; trying again with every commit");
        }
    }

    /// Applies all edits at one instant, in one transaction. An edit whose record cannot be read
    /// fails alone.
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
                let mut stored = records.get_mut(key.as_str())?;
                let current = match &stored {
                    Some(stored) => document::decode(key, stored.value()).map(Some),
                    None => Ok(makes_record(edit).then(|| Record::vacant(key.clone()))),
                };
                let record = match current {
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
                        // Before the commit, so that no listing misses a key in use.
                        self.in_use.insert(key);
                        // An earlier edit of this transaction may have freed the key. One key has
                        // two edits here only if the caller of the first has given up.
                        freed.retain(|freed| *freed != key);
                    }
                    _ => {}
                }
                bytes.clear();
                document::encode(&record, &mut bytes);
                // Overwriting in place saves a second search of the tree. A record of another size
                // may not fit its page.
                match stored.as_mut().filter(|stored| stored.value().len() == bytes.len()) {
                    Some(stored) => stored.insert(bytes.as_slice())?,
                    None => {
                        drop(stored);
                        records.insert(key.as_str(), bytes.as_slice())?;
                    }
                }
                changed = Changed::Something;
                snapshots.push(Ok(Snapshot { record, now }));
            }
            Ok(((snapshots, freed), changed))
        })?;
        // After the commit, because a commit that failed may have freed no key.
        self.in_use.remove(freed);
        Ok(snapshots)
    }

    /// Purges the keys that have been free for `free_for`, and removes free keys from the keys in
    /// use.
    fn purge(&self, keys: &[Key], free_for: Duration) -> Result<u64, Failure> {
        let (purged, freed) = self.transact(|transaction| {
            let mut records = transaction.open_table(RECORDS)?;
            let now = self.now();
            let mut purged = 0;
            let mut freed = Vec::new();
            let mut changed = Changed::Nothing;
            for key in keys {
                let Some(bytes) = records.get(key.as_str())? else { continue };
                let record = document::decode(key, bytes.value());
                drop(bytes);
                let Ok(record) = record else { continue };
                let is_purgeable = record.is_purgeable(now, free_for, self.rules.grace);
                if is_purgeable {
                    records.remove(key.as_str())?;
                    purged += 1;
                    changed = Changed::Something;
                }
                if is_purgeable || record.is_free(now) {
                    freed.push(key);
                }
            }
            Ok(((purged, freed), changed))
        })?;
        self.in_use.remove(freed);
        Ok(purged)
    }

    /// Runs `work` and turns a panic into a failure. redb panics on some kinds of damage.
    fn guarded<T>(&self, work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
        contained(work).unwrap_or_else(|_| {
            let failure = Failure::Unknown("the store panicked".to_owned());
            self.close(&failure);
            Err(failure)
        })
    }

    /// Returns an error unless the store can commit now. Writes only if the file is closed, to open
    /// it again.
    pub(super) fn check(&self) -> Result<(), Failure> {
        if self.database().is_ok() {
            return Ok(());
        }
        // A commit proves that the file can be written again.
        self.transact(|_| Ok(((), Changed::Something)))
    }
}

/// Why the writer did not start.
#[derive(Debug)]
pub(super) enum Unstarted {
    Thread(std::io::Error),
    Store(OpenError),
    Panicked,
}

/// Whether a transaction changed something, so that it must be committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Changed {
    Nothing,
    Something,
}

impl Writer {
    /// Starts the thread and waits until it has opened the store. The thread opens it, because
    /// opening blocks for as long as the disk takes.
    pub(super) async fn start(
        open: impl FnOnce() -> Result<OpenStore, OpenError> + Send + 'static,
    ) -> Result<Self, Unstarted> {
        let (sender, requests) = sync_channel(REQUESTS);
        let (reply, opened) = oneshot::channel();
        let run = move || match open().map(Arc::new) {
            Ok(store) => {
                if reply.send(Ok(Arc::clone(&store))).is_ok() {
                    work(&store, &requests);
                }
            }
            Err(error) => {
                let _ = reply.send(Err(error));
            }
        };
        thread::Builder::new().name("store".to_owned()).spawn(run).map_err(Unstarted::Thread)?;
        let store = opened.await.map_err(|_| Unstarted::Panicked)?.map_err(Unstarted::Store)?;
        Ok(Self { store, requests: sender })
    }

    pub(super) fn store(&self) -> &Arc<OpenStore> {
        &self.store
    }

    /// Commits a batch. The batch is not applied if the thread does not begin it within `patience`.
    pub(super) async fn commit(
        &self,
        batch: Arc<Vec<(Key, Edit)>>,
        patience: Duration,
    ) -> Result<Vec<ForKey>, Failure> {
        let until = self.store.up() + patience;
        self.request(patience, |reply| Request::Commit(Commit { batch, until, reply })).await
    }

    /// Purges the keys that have been free for `free_for`, and returns how many.
    pub(super) async fn purge(&self, keys: Vec<Key>, free_for: Duration) -> Result<u64, Failure> {
        self.request(PATIENCE, |reply| Request::Purge { keys, free_for, reply }).await
    }

    /// Returns an error unless the store can commit now.
    pub(super) async fn check(&self) -> Result<(), Failure> {
        self.request(PATIENCE, |reply| Request::Check { reply }).await
    }

    async fn request<T>(
        &self,
        patience: Duration,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        // `send` would block a thread of the runtime.
        self.requests.try_send(request(reply)).map_err(|error| match error {
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

fn work(store: &OpenStore, requests: &Receiver<Request>) {
    let mut next = None;
    // A reply fails to send if its caller has given up. That is no error.
    while let Some(request) = next.take().or_else(|| requests.recv().ok()) {
        match request {
            Request::Commit(commit) => {
                let mut group = vec![commit];
                for request in requests.try_iter() {
                    match request {
                        Request::Commit(commit) => group.push(commit),
                        other => {
                            next = Some(other);
                            break;
                        }
                    }
                }
                commit_group(store, group);
            }
            Request::Purge { keys, free_for, reply } => {
                let _ = reply.send(store.guarded(|| store.purge(&keys, free_for)));
            }
            Request::Check { reply } => {
                let _ = reply.send(store.guarded(|| store.check()));
            }
        }
    }
}

/// Commits batches in one transaction, so that all of them share one sync and each page is written
/// once.
pub(super) fn commit_group(store: &OpenStore, mut group: Vec<Commit>) {
    let now = store.up();
    for late in group.extract_if(.., |commit| commit.until < now) {
        let _ = late.reply.send(Err(Failure::not_applied("the writer reached the batch too late")));
    }
    if group.is_empty() {
        return;
    }
    let edits = || group.iter().flat_map(|commit| commit.batch.iter());
    match store.guarded(|| store.commit(edits())) {
        Ok(snapshots) => {
            let mut snapshots = snapshots.into_iter();
            for Commit { batch, reply, .. } in group {
                let _ = reply.send(Ok(snapshots.by_ref().take(batch.len()).collect()));
            }
        }
        Err(failure) => {
            for Commit { reply, .. } in group {
                let _ = reply.send(Err(failure.clone()));
            }
        }
    }
}
