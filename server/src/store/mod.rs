//! Where records live: the trait that the engine stands on, and its two homes.

#[cfg(test)]
mod conformance;
pub mod embedded;
mod failure;
mod instrumented;
pub mod mongo;
mod unreadable;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use failure::{Effects, Failure};
pub(crate) use instrumented::Metered;
pub(crate) use unreadable::report;

use crate::lease::{Edit, Key, Record, Rules, Snapshot, Timestamp};

/// The pause before the first repetition of a batch; it doubles up to eight times this.
const BACK_OFF: Duration = Duration::from_millis(25);

/// Keeps records and applies the rules to them, atomically per record.
pub trait Store: Send + Sync + 'static {
    /// Applies each key's edit to its record and returns the records. Keys are distinct.
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
    ) -> impl Future<Output = Result<Committed, StoreError>> + Send;

    /// How many batches are worth having in flight at once. One leaves the store idle between two of them; with each more,
    /// batches get smaller, and most of what a small one costs is its overhead.
    fn batches(&self) -> usize;

    /// The records of those of the `keys` that have one, in any order. A record that cannot be read is returned as
    /// [`StoreError::Unreadable`], which names its key. For what the engine decides: these reads have the same share of the
    /// store as commits.
    ///
    /// # Errors
    /// [`StoreError`] if the store does not answer in time.
    fn read(&self, keys: Vec<Key>) -> impl Future<Output = Result<Vec<ForKey>, StoreError>> + Send;

    /// The key's record, if it has one, for callers who look at it. However many look, commits do not wait for them.
    ///
    /// # Errors
    /// [`StoreError`] if the store does not answer in time, or the record cannot be read.
    fn inspect(&self, key: Key) -> impl Future<Output = Result<Option<Snapshot>, StoreError>> + Send {
        async { self.read(vec![key]).await?.into_iter().next().transpose() }
    }

    /// One page of records in the order of their keys; shorter than asked if the records are large. Records that cannot
    /// be read are left out and logged. Neither commits nor [`Self::inspect`] wait for those who list.
    ///
    /// # Errors
    /// [`StoreError`] if the store does not answer in time.
    fn list(&self, query: ListQuery) -> impl Future<Output = Result<Page, StoreError>> + Send;

    /// Forgets keys that nobody has held, waited for or kept blocked for `free_for`, and returns how many. A lease counts
    /// as held until it may be taken over, a place in line until it lapses. Keeps a record of which it cannot tell
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

    /// Identifies the store: every daemon on the same records has this id, also after a restart, and any other store has
    /// another one. Callers compare the ids of their daemons, and so notice daemons of different stores.
    fn id(&self) -> Uuid;

    /// Makes this daemon known to the others on the same records. To be called before anyone is served.
    ///
    /// # Errors
    /// [`StartError::Unusable`] if it must not run beside them; [`StartError::Unreachable`] if the store does not answer.
    fn join(&self) -> impl Future<Output = Result<(), StartError>> + Send {
        async { Ok(()) }
    }

    /// Waits until this daemon must serve no more, because of other daemons or of what became of the store, and says
    /// why. Never returns while all is well.
    fn objection(&self) -> impl Future<Output = String> + Send {
        std::future::pending()
    }

    /// Ends what the store does in the background and tells the other daemons that this one is gone; bounded in time.
    /// Nothing is asked of the store afterwards.
    fn leave(&self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// The rules that commits obey.
    fn rules(&self) -> Rules;

    /// What kind of store it is, in a word.
    fn name(&self) -> &'static str;

    /// How many attempts at a batch have failed and been repeated so far.
    fn repetitions(&self) -> u64;

    /// How often the store's clock and this host's were found to have come apart.
    fn clock_steps(&self) -> u64 {
        0
    }

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

/// What became of a batch.
#[derive(Debug)]
pub struct Committed {
    /// The records, in the order of the batch, as they were right after it or later.
    pub records: Vec<ForKey>,
    /// Whether an attempt at the batch failed before the one that succeeded. It may still be under way, and take effect
    /// after this answer.
    pub is_repeated: bool,
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
/// are idempotent. Each attempt but the first brings the edits as repeated ones: an earlier attempt may still be under way. It
/// notes in `effects` what its commands may have changed.
async fn repeat<F>(
    mut batch: Arc<Vec<(Key, Edit)>>,
    deadline: Duration,
    repetitions: &AtomicU64,
    effects: &Effects,
    mut attempt: impl FnMut(Arc<Vec<(Key, Edit)>>) -> F,
) -> Result<Committed, StoreError>
where
    F: Future<Output = Result<Vec<ForKey>, Failure>>,
{
    let deadline = Instant::now() + deadline;
    let (mut pause, mut is_repeated) = (BACK_OFF, false);
    loop {
        let failure = match attempt(Arc::clone(&batch)).await {
            Ok(records) => return Ok(Committed { records, is_repeated }),
            Err(failure) => failure,
        };
        let again = Instant::now() + pause;
        if matches!(failure, Failure::Refused(_)) || again >= deadline {
            return Err(effects.conclude(failure));
        }
        tracing::debug!(cause = failure.into_cause(), "repeating a batch");
        repetitions.fetch_add(1, Ordering::Relaxed);
        is_repeated = true;
        let repeated = batch.iter().map(|(key, edit)| (key.clone(), edit.clone().repeated()));
        batch = Arc::new(repeated.collect());
        sleep_until(again).await;
        pause = (pause * 2).min(BACK_OFF * 8);
    }
}

/// An arrival makes a record, and so does what must be remembered: a release, or an id that is to be kept out; touching a key that nobody ever leased
/// leaves no trace.
fn makes_record(edit: &Edit) -> bool {
    !edit.enqueued().is_empty() || !edit.released().is_empty() || !edit.kept_out().is_empty()
}

/// The answer for a key without a record. It holds nothing that its instant could matter to.
fn vacant(key: &Key) -> Snapshot {
    Snapshot { record: Record::vacant(key.clone()), now: Timestamp(0) }
}
