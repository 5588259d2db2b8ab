//! Where records live: the trait that the engine stands on, and its two homes.

#[cfg(test)]
mod conformance;
pub mod embedded;
mod failure;
mod metered;
pub mod mongo;
mod unreadable;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

pub(crate) use metered::Metered;
pub(crate) use unreadable::report;

use crate::lease::{Edit, Key, Record, Rules, Snapshot, Timestamp};

/// The pause before the first repetition of a batch; it doubles up to eight times this.
const BACK_OFF: Duration = Duration::from_millis(25);

/// Keeps records and applies the rules to them, atomically per record.
pub trait Store: Send + Sync + 'static {
    /// Applies each key's edit to its record and returns the records, in the order of `batch`, as they were right
    /// after or later. Keys are distinct.
    ///
    /// Repeats the batch after failures until `deadline` has passed; edits are idempotent. Must not be dropped
    /// part-way by a caller that goes on using the keys.
    ///
    /// A record that cannot be read, or an edit that cannot be applied to its record, fails the answer for its key
    /// with [`StoreError::Unreadable`]. The other edits of the batch are applied.
    ///
    /// # Errors
    /// [`StoreError`]; what it says of the outcome holds for every edit of the batch.
    fn commit(
        &self,
        batch: Arc<Vec<(Key, Edit)>>,
        deadline: Duration,
    ) -> impl Future<Output = Result<Vec<ForKey>, StoreError>> + Send;

    /// How many batches are worth having in flight at once. One leaves the store idle between two of them; with each more,
    /// batches get smaller, and most of what a small one costs is its overhead.
    fn batches(&self) -> usize;

    /// The records of those of the `keys` that have one, in any order. A record that cannot be read is returned as
    /// [`StoreError::Unreadable`], which names its key.
    ///
    /// # Errors
    /// [`StoreError`] if the store does not answer in time.
    fn read(&self, keys: Vec<Key>) -> impl Future<Output = Result<Vec<ForKey>, StoreError>> + Send;

    /// One page of records in the order of their keys; shorter than asked if the records are large. Records that cannot
    /// be read are left out and logged.
    ///
    /// # Errors
    /// [`StoreError`] if the store does not answer in time.
    fn list(&self, query: ListQuery) -> impl Future<Output = Result<Page, StoreError>> + Send;

    /// Forgets keys that have been free for `free_for` and returns how many. Keeps a record of which it cannot tell
    /// whether somebody holds its key.
    ///
    /// # Errors
    /// [`StoreError`]; what was forgotten by then stays so.
    fn purge(&self, free_for: Duration) -> impl Future<Output = Result<u64, StoreError>> + Send;

    /// Whether the store can take commits now.
    ///
    /// # Errors
    /// [`StoreError`] if it cannot.
    fn check(&self) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// The rules that commits obey.
    fn rules(&self) -> Rules;

    /// What kind of store it is, in a word.
    fn name(&self) -> &'static str;

    /// How many attempts at a batch have failed and been repeated so far.
    fn repetitions(&self) -> u64;

    /// Tells of changes that others make, until `draining` is cancelled or nobody listens any more; at once if there
    /// are no others. Changes of this daemon's own may be among them.
    fn feed(
        &self,
        events: mpsc::Sender<FeedEvent>,
        draining: CancellationToken,
    ) -> impl Future<Output = ()> + Send;

    /// How the feed stands.
    fn feed_state(&self) -> FeedState;

    /// Whether others commit here too, so that records change without this daemon's doing.
    fn is_shared(&self) -> bool;
}

/// The record of one key among many, or why there is none: one record's trouble is not that of the others.
pub type ForKey = Result<Snapshot, StoreError>;

/// What a store tells of changes. A hint: it may come late or twice, and says when it may have missed some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeedEvent {
    /// Someone came to the key, went, or was admitted; a touch alone is not told.
    Changed {
        /// Whose record it is.
        key: Key,
        /// Its revision after the change; `None` if that is not known, or the record is gone.
        rev: Option<i64>,
    },
    /// Changes may have been missed before this: it comes first of all, and after every failure.
    Gap,
}

/// How a feed stands.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum FeedState {
    /// There is none: nobody else commits here.
    #[default]
    Off,
    /// It tells what happens, and may be behind by this much.
    Behind(Duration),
    /// Others commit here, and what they do cannot be followed at present.
    Broken,
}

/// Which records a page holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListQuery {
    /// Only keys that begin like this.
    pub prefix: String,
    /// Only keys after this one.
    pub after: Option<Key>,
    /// At most so many.
    pub limit: usize,
    /// Also keys that nobody holds, waits for or keeps blocked.
    pub include_free: bool,
}

/// Records in the order of their keys.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Page {
    /// The records.
    pub snapshots: Vec<Snapshot>,
    /// Whether others follow. Then the page holds one record at least, so that the next page has a key to begin after.
    pub more: bool,
}

/// Why there is no store to begin with.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StartError {
    /// It is there and cannot be used; the sentence says what to do.
    #[error("{0}")]
    Unusable(String),
    /// It cannot be reached; trying again later may help.
    #[error("{0}")]
    Unreachable(String),
}

/// Why the store did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// It did not answer in time, or could not be reached; asking again later may help.
    #[error("the store does not answer ({outcome}): {cause}")]
    Unavailable {
        /// What is known of the edits.
        outcome: Outcome,
        /// The last failure, for logs.
        cause: String,
    },
    /// It answered that it will not do this, and asking again will not help.
    #[error("the store refused: {cause}")]
    Refused {
        /// The refusal, for logs.
        cause: String,
    },
    /// The record of this key cannot be read, or the edit cannot be applied to it. Other keys are not affected, and
    /// asking again will not help before someone has mended or deleted the record. Whether the edit took effect is not
    /// known: what cannot be read may have been written before.
    #[error("the record of {key:?} cannot be read or written: {cause}")]
    Unreadable {
        /// Whose record it is.
        key: Key,
        /// What is wrong with it, for logs.
        cause: String,
    },
}

/// What is known of edits after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// None of them took effect or will.
    NotApplied,
    /// Some or all may have taken effect, or may yet.
    Unknown,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotApplied => "nothing was changed",
            Self::Unknown => "outcome unknown",
        })
    }
}

/// Repeats an attempt at a batch while it fails in ways that may pass, until `deadline` is over, and counts that. Edits
/// are idempotent.
async fn repeat<T, F>(
    deadline: Duration,
    repetitions: &AtomicU64,
    mut attempt: impl FnMut() -> F,
) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let deadline = Instant::now() + deadline;
    let mut outcome = Outcome::NotApplied;
    let mut pause = BACK_OFF;
    loop {
        let cause = match attempt().await {
            Err(StoreError::Unavailable { outcome: latest, cause }) => {
                if latest == Outcome::Unknown {
                    outcome = latest;
                }
                cause
            }
            end => return end,
        };
        let again = Instant::now() + pause;
        if again >= deadline {
            return Err(StoreError::Unavailable { outcome, cause });
        }
        tracing::debug!(%cause, "repeating a batch");
        repetitions.fetch_add(1, Ordering::Relaxed);
        sleep_until(again).await;
        pause = (pause * 2).min(BACK_OFF * 8);
    }
}

/// Only an arrival makes a record: touching or releasing a key that nobody ever leased leaves no trace.
fn makes_record(edit: &Edit) -> bool {
    !edit.enqueued().is_empty()
}

/// The answer for a key without a record. It holds nothing that its instant could matter to.
fn vacant(key: &Key) -> Snapshot {
    Snapshot { record: Record::vacant(key.clone()), now: Timestamp(0) }
}
