//! Where records live: the trait that the engine uses, and the two stores that implement it.

/// Repeats failed batches, and counts what a store does.
mod retrying;
/// The metrics of a store.
mod metrics;
/// What is known of a failed attempt, and whether to repeat it.
mod failure;
/// One file, one daemon.
pub mod embedded;
/// MongoDB, any number of daemons.
pub mod mongo;
/// Logs records that cannot be read.
mod unreadable;

/// Tests that hold both stores to the specification.
#[cfg(test)]
mod conformance;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub(crate) use retrying::Retrying;
pub(crate) use unreadable::report;

use crate::lease::{Edit, Key, Record, Rules, Snapshot, Timestamp};

/// Keeps records and applies the rules to them. Each edit of a record is atomic.
pub trait Store: Send + Sync + 'static {
    /// Applies each key's edit to its record and returns the records. The keys must be different.
    ///
    /// Tries once, for at most `deadline`. After [`StoreError::Unavailable`] the batch can be
    /// repeated, since edits are idempotent. The caller must not drop the future before its end and
    /// then use the same keys.
    ///
    /// If a record cannot be read, or its edit cannot be applied, the result for its key is
    /// [`StoreError::Unreadable`]. The other edits of the batch are applied.
    ///
    /// # Errors
    /// [`StoreError`]. Its outcome is that of all edits together.
    fn commit(
        &self,
        batch: Arc<Vec<(Key, Edit)>>,
        deadline: Duration,
    ) -> impl Future<Output = Result<Committed, StoreError>> + Send;

    /// How many batches should be in flight at once. With one, the store is idle between two
    /// batches. With each more, batches get smaller, and most of the cost of a small batch is
    /// overhead.
    fn batches(&self) -> usize;

    /// Reads the records of `keys`, in any order. Keys without a record are left out. A record that
    /// cannot be read is returned as [`StoreError::Unreadable`], which names its key.
    ///
    /// For the engine's own work: these reads do not wait for callers who read or list.
    ///
    /// # Errors
    /// [`StoreError`] if the store does not answer in time.
    fn read(&self, keys: Vec<Key>) -> impl Future<Output = Result<Vec<ForKey>, StoreError>> + Send;

    /// Reads the key's record for a caller, if there is one. Commits do not wait for these reads.
    ///
    /// # Errors
    /// [`StoreError`] if the store does not answer in time, or the record cannot be read.
    fn inspect(&self, key: Key) -> impl Future<Output = Result<Option<Snapshot>, StoreError>> + Send {
        async { self.read(vec![key]).await?.into_iter().next().transpose() }
    }

    /// Lists one page of records in the order of their keys. The page is shorter than asked for if
    /// the records are large. Records that cannot be read are left out and logged. Neither commits
    /// nor [`Self::inspect`] wait for listings.
    ///
    /// # Errors
    /// [`StoreError`] if the store does not answer in time.
    fn list(&self, query: ListQuery) -> impl Future<Output = Result<Page, StoreError>> + Send;

    /// Deletes the records of keys that have been free for `free_for`: not held, waited for or
    /// blocked. A lease counts as held until it may be taken over, and a waiter until its entry
    /// lapses. Keeps records that it cannot read. Returns how many records it deleted.
    ///
    /// # Errors
    /// [`StoreError`]. Records that were deleted before the failure stay deleted.
    fn purge(&self, free_for: Duration) -> impl Future<Output = Result<u64, StoreError>> + Send;

    /// Checks that the store can commit now.
    ///
    /// # Errors
    /// [`StoreError`] if it cannot.
    fn check(&self) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// The identity of the records: the same for every daemon on them and after restarts, and
    /// different for any other records. Clients compare the ids of their daemons, so that they
    /// never mix two stores.
    fn id(&self) -> Uuid;

    /// Announces this daemon to its peers on the same records. Must be called before anyone is
    /// served.
    ///
    /// # Errors
    /// [`StartError::Unusable`] if it must not run beside its peers; [`StartError::Unreachable`] if the store does not answer.
    fn join(&self) -> impl Future<Output = Result<(), StartError>> + Send {
        async { Ok(()) }
    }

    /// Waits until this daemon must stop serving, because of its peers or because the store is
    /// gone. Returns the reason.
    fn objection(&self) -> impl Future<Output = String> + Send {
        std::future::pending()
    }

    /// Ends the store's background work and tells the peers that this daemon is gone. Bounded in
    /// time. The store must not be used afterwards.
    fn leave(&self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// The durations that the rules use.
    fn rules(&self) -> Rules;

    /// The kind of store, as one word.
    fn name(&self) -> &'static str;

    /// How often the store's clock was set, or this host's, by more than the grace.
    fn clock_steps(&self) -> u64 {
        0
    }

    /// Sends news of changes by other daemons until `draining` is cancelled or the receiver is
    /// dropped. Returns at once if no other daemon can change the records. News of this daemon's
    /// own changes may be among them.
    fn feed(
        &self,
        events: mpsc::Sender<FeedEvent>,
        draining: CancellationToken,
    ) -> impl Future<Output = ()> + Send;

    /// The state of the feed.
    fn feed_state(&self) -> FeedState;

    /// Whether other daemons can change the records.
    fn is_shared(&self) -> bool;
}

/// The result of a batch.
#[derive(Debug)]
pub struct Committed {
    /// The records after the batch, in its order. A record may show later edits too.
    pub records: Vec<ForKey>,
    /// Whether an earlier attempt at the batch failed. Its commands may still be on their way, and
    /// take effect later.
    pub is_repeated: bool,
}

/// The record of one key among many, or why it cannot be had. The other records are not affected.
pub type ForKey = Result<Snapshot, StoreError>;

/// News of changes. A hint: it may be late or doubled, and a gap is announced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeedEvent {
    /// Somebody entered the key, left it or was admitted. A touch alone is no news.
    Changed {
        /// The key of the record.
        key: Key,
        /// The revision after the change; `None` if it is not known or the record is gone.
        rev: Option<i64>,
    },
    /// Earlier news may have been missed. Sent first of all, and after every failure.
    Gap,
}

/// The state of a feed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum FeedState {
    /// There is no feed: no other daemon changes the records.
    #[default]
    Off,
    /// The feed runs, and may be behind by this much.
    Behind(Duration),
    /// Other daemons change the records, and the feed does not run at present.
    Broken,
}

/// Which records a page holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListQuery {
    /// Only keys with this prefix.
    pub prefix: String,
    /// Only keys after this one.
    pub after: Option<Key>,
    /// The most records on the page.
    pub limit: usize,
    /// Also keys that nobody holds, waits for or keeps blocked.
    pub include_free: bool,
}

/// Records in the order of their keys.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Page {
    /// The records.
    pub snapshots: Vec<Snapshot>,
    /// Whether more records follow. Then the page has at least one record, whose key the next page
    /// begins after.
    pub more: bool,
}

/// Why a daemon cannot start on a store.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StartError {
    /// The store answers and cannot be used. The sentence says what to do.
    #[error("{0}")]
    Unusable(String),
    /// The store cannot be reached. Trying again later may help.
    #[error("{0}")]
    Unreachable(String),
}

/// Why the store failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The store did not answer in time, or could not be reached. Trying again later may help.
    #[error("the store does not answer ({outcome}): {cause}")]
    Unavailable {
        /// What is known of the edits.
        outcome: Outcome,
        /// The last failure, for logs.
        cause: String,
    },
    /// The store answered that it will not do this, and changed nothing. Trying again will not
    /// help.
    #[error("the store refused: {cause}")]
    Refused {
        /// The refusal, for logs.
        cause: String,
    },
    /// The record of this key cannot be read, or the edit cannot be applied to it. Other keys are
    /// not affected. Trying again will not help until somebody has mended or deleted the record.
    /// The edit may have taken effect: a record that cannot be read may have been written before.
    #[error("the record of {key:?} cannot be read or written: {cause}")]
    Unreadable {
        /// The key of the record.
        key: Key,
        /// What is wrong with the record, for logs.
        cause: String,
    },
}

impl StoreError {
    /// The error of edits that failed with this error after a command or an attempt with the outcome
    /// `earlier`.
    fn after(self, earlier: Outcome) -> Self {
        match (earlier, self) {
            (Outcome::Unknown, Self::Unavailable { cause, .. } | Self::Refused { cause }) => {
                Self::Unavailable { outcome: Outcome::Unknown, cause }
            }
            (_, error) => error,
        }
    }
}

/// What is known of edits after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// No edit took effect, and none will.
    NotApplied,
    /// Any of the edits may have taken effect, or may still do so.
    Unknown,
}

impl Committed {
    /// The records after a batch that was tried once.
    pub fn at_once(records: Vec<ForKey>) -> Self {
        Self { records, is_repeated: false }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotApplied => "nothing was changed",
            Self::Unknown => "outcome unknown",
        })
    }
}

/// Whether an edit makes a record where there is none: a new waiter does, and an id that must be
/// remembered as released or kept out. Touching a key that nobody ever leased leaves no trace.
fn makes_record(edit: &Edit) -> bool {
    !edit.enqueued().is_empty() || !edit.released().is_empty() || !edit.kept_out().is_empty()
}

/// The answer for a key without a record. Its instant does not matter, since nothing in it can run
/// out.
fn vacant(key: &Key) -> Snapshot {
    Snapshot { record: Record::vacant(key.clone()), now: Timestamp(0) }
}
