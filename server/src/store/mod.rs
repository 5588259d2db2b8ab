//! Where records live: the trait that the engine uses, and the two stores that implement it.

/// Wraps a store: repeats failed batches and records metrics.
mod retrying;
/// The metrics of a store.
mod metrics;
/// What is known of a failed attempt, and whether to repeat it.
mod failure;
/// The store of a single daemon, in one file.
pub mod embedded;
/// The store on MongoDB, for any number of daemons.
pub mod mongo;
/// Logs records that cannot be read.
mod unreadable;

/// Tests that compare both stores with the specification.
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
    /// Tries once, until about `deadline`; `Retrying` repeats until then. After
    /// [`StoreError::Unavailable`] the batch can be repeated, since edits are idempotent. A caller
    /// that drops the future before it completes must not use the keys of the batch again, because
    /// the batch may still be under way.
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
    /// batches. With each further one, batches get smaller, and most of the cost of a small batch
    /// is overhead.
    fn batches(&self) -> usize;

    /// Reads the records of `keys`, in any order. Keys without a record are left out. A record that
    /// cannot be read is returned as [`StoreError::Unreadable`], which names its key.
    ///
    /// For the engine's own work: these reads do not wait for listings.
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

    /// Deletes the records of keys that have been free for `free_for`, or for an hour if they were
    /// never granted. A free key is not held, waited for or blocked. A lease counts as held until
    /// it may be taken over, and a waiter until its entry lapses. Keeps records that it cannot
    /// read. Returns how many records it deleted.
    ///
    /// # Errors
    /// [`StoreError`]. Records that were deleted before the failure stay deleted.
    fn purge(&self, free_for: Duration) -> impl Future<Output = Result<u64, StoreError>> + Send;

    /// Checks that the store can commit now.
    ///
    /// # Errors
    /// [`StoreError`] if it cannot.
    fn check(&self) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// The identity of the store: the same for every daemon on these records and after restarts,
    /// and different for any other records. Clients compare the ids that their daemons report, so
    /// that they never mix two stores.
    fn id(&self) -> Uuid;

    /// Announces this daemon to its peers on the same records. Must be called before the daemon
    /// serves calls.
    ///
    /// # Errors
    /// [`StartError::Unusable`] if it must not run beside its peers; [`StartError::Unreachable`] if
    /// the store does not answer.
    fn join(&self) -> impl Future<Output = Result<(), StartError>> + Send {
        async { Ok(()) }
    }

    /// Waits until this daemon must stop serving, because an earlier peer has another grace or the
    /// records were replaced. Returns the reason.
    fn objection(&self) -> impl Future<Output = String> + Send {
        std::future::pending()
    }

    /// Ends the store's background work and removes this daemon from the list that its peers read.
    /// Bounded in time. The store must not be used afterwards.
    fn leave(&self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// The durations that the rules use.
    fn rules(&self) -> Rules;

    /// The kind of store, as one word.
    fn name(&self) -> &'static str;

    /// How many times the store's clock and this host's clock diverged by more than the grace.
    fn clock_steps(&self) -> u64 {
        0
    }

    /// Reports changes by other daemons until `draining` is cancelled or the receiver is dropped.
    /// Returns at once if no other daemon can change the records. May report this daemon's own
    /// changes too.
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
    /// The records after the batch, in the order of its keys. A record may show later edits too.
    pub records: Vec<ForKey>,
    /// Whether an earlier attempt at the batch failed. The commands of that attempt may still be
    /// under way, and take effect later.
    pub is_repeated: bool,
}

/// The record of one key among many, or why it cannot be read or written. The other keys are not
/// affected.
pub type ForKey = Result<Snapshot, StoreError>;

/// An event of the feed. A hint: it may be late or duplicated, and missed events are reported as a
/// gap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeedEvent {
    /// The holders or the queue of the key may have changed. Touches alone are not reported.
    Changed {
        /// The key of the record.
        key: Key,
        /// The revision after the change. `None` if it is not known or the record was deleted.
        rev: Option<i64>,
    },
    /// Earlier changes may have been missed. Sent before the first change, and after every failure.
    Gap,
}

/// The state of a feed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum FeedState {
    /// There is no feed, because no other daemon changes the records.
    #[default]
    Off,
    /// The feed is running, and may be behind by this much.
    Behind(Duration),
    /// Other daemons change the records, and the feed is not running.
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
    /// Whether to list free keys too: neither held, waited for nor blocked.
    pub include_free: bool,
}

/// Records in the order of their keys.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Page {
    /// The records.
    pub snapshots: Vec<Snapshot>,
    /// Whether more records follow. If so, the page is not empty, and the next page begins after
    /// its last key.
    pub more: bool,
}

/// Why a daemon cannot start on a store.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StartError {
    /// The store answers but cannot be used. The message says what to do.
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
    /// The store refused the operation and changed nothing. Trying again will not help.
    #[error("the store refused: {cause}")]
    Refused {
        /// The refusal, for logs.
        cause: String,
    },
    /// The record of this key cannot be read, or the edit cannot be applied to it. Other keys are
    /// not affected. Trying again will not help until an operator has mended or deleted the record.
    /// The edit may have taken effect, if only the read after it failed.
    #[error("the record of {key:?} cannot be read or written: {cause}")]
    Unreadable {
        /// The key of the record.
        key: Key,
        /// What is wrong with the record, for logs.
        cause: String,
    },
}

impl StoreError {
    /// Returns the error of the edits, given that an earlier command or attempt had the outcome
    /// `earlier`. Once an outcome is unknown, it stays unknown.
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
    /// Returns the result of a batch that was tried once.
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

/// Returns true if an edit makes a record where there is none: it enqueues a waiter, or names an id
/// that must be remembered as released or kept out. So a touch of a key that was never leased
/// leaves no record.
fn makes_record(edit: &Edit) -> bool {
    !edit.enqueued().is_empty() || !edit.released().is_empty() || !edit.kept_out().is_empty()
}

/// The answer for a key without a record. Its time does not matter, since nothing in the record can
/// lapse.
fn vacant(key: &Key) -> Snapshot {
    Snapshot { record: Record::vacant(key.clone()), now: Timestamp(0) }
}
