//! Where records live: the trait that the engine stands on, and its home.

pub mod mongo;

use std::future::Future;
use std::time::Duration;

use crate::lease::{Edit, Key, Rules, Snapshot};

/// Keeps records and applies the rules to them, atomically per record.
pub trait Store: Send + Sync + 'static {
    /// Applies each key's edit to its record and returns the records, in the order of `batch`, as they were right
    /// after or later. Keys are distinct.
    ///
    /// Repeats the batch after failures until `deadline` has passed; edits are idempotent. Must not be dropped
    /// part-way by a caller that goes on using the keys.
    ///
    /// # Errors
    /// [`StoreError`]; what it says of the outcome holds for every edit of the batch.
    fn commit(
        &self,
        batch: Vec<(Key, Edit)>,
        deadline: Duration,
    ) -> impl Future<Output = Result<Vec<Snapshot>, StoreError>> + Send;

    /// The records of those of the `keys` that have one, in any order.
    ///
    /// # Errors
    /// [`StoreError`] if the store does not answer in time.
    fn read(&self, keys: Vec<Key>) -> impl Future<Output = Result<Vec<Snapshot>, StoreError>> + Send;

    /// One page of records in the order of their keys; shorter than asked if the records are large.
    ///
    /// # Errors
    /// [`StoreError`] if the store does not answer in time.
    fn list(&self, query: ListQuery) -> impl Future<Output = Result<Page, StoreError>> + Send;

    /// Forgets keys that have been free for `free_for` and returns how many.
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
    /// Whether others follow.
    pub more: bool,
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
