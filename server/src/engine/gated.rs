//! An embedded store whose commits a test can hold back, fail, delay, or make panic.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::yield_now;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::{Bounds, Lessor};
use crate::lease::{Edit, Key, Rules};
use crate::metrics::registry::MetricsRegistry;
use crate::store::embedded::EmbeddedStore;
use crate::store::{Committed, FeedEvent, FeedState, ForKey, ListQuery, Outcome, Page, Store, StoreError};

const RULES: Rules = Rules { grace: Duration::ZERO, waiter_ttl: Duration::from_secs(15) };
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A batch, as it is passed to the store.
type Edits = Arc<Vec<(Key, Edit)>>;
/// The keys of a batch, with the number of leases that each edit touched.
pub(super) type Batch = Vec<(Key, usize)>;

/// An embedded store that takes one batch at a time.
#[derive(Debug, Clone)]
pub(super) struct GatedStore {
    pub(super) store: EmbeddedStore,
    /// A batch needs a permit, and a listing does too.
    gate: Arc<Semaphore>,
    /// All batches so far.
    pub(super) batches: Arc<Mutex<Vec<Batch>>>,
    /// The prefixes of all pages that were requested.
    pub(super) pages: Arc<Mutex<Vec<String>>>,
    /// How many of the next batches fail. None of them is applied unless a test delivers it later.
    pub(super) fails: Arc<AtomicUsize>,
    /// The next batch panics.
    pub(super) panics: Arc<AtomicBool>,
    /// The first attempt at the next batch is delayed, and the batch is repeated.
    pub(super) delays: Arc<AtomicBool>,
    /// The attempts that were delayed or failed. They may still be applied.
    delayed: Arc<Mutex<Vec<Edits>>>,
    _folder: Arc<TempDir>,
}

impl GatedStore {
    pub(super) async fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        Self {
            store: EmbeddedStore::open(folder.path(), RULES).await.expect("a usable folder"),
            gate: Arc::new(Semaphore::new(1)),
            batches: Arc::default(),
            pages: Arc::default(),
            fails: Arc::default(),
            panics: Arc::default(),
            delays: Arc::default(),
            delayed: Arc::default(),
            _folder: Arc::new(folder),
        }
    }

    /// Starts an engine on the store, with room for this many queued operations.
    pub(super) fn engine(&self, queued_operations: usize) -> Lessor<Self> {
        self.engine_within(Bounds { call: PATIENCE, queued_operations, ..Bounds::default() })
    }

    pub(super) fn engine_within(&self, bounds: Bounds) -> Lessor<Self> {
        let (draining, tasks) = (CancellationToken::new(), TaskTracker::new());
        Lessor::start(self.clone(), bounds, draining, &mut MetricsRegistry::default(), &tasks)
    }

    /// Closes the gate: no batch goes through until the returned permit is dropped.
    pub(super) async fn close(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.gate).acquire_owned().await.expect("a gate")
    }

    /// Returns how many batches there have been, and the numbers of the batches with this key.
    pub(super) fn batches_of(&self, key: &Key) -> (usize, Vec<usize>) {
        let batches = self.batches.lock().expect("batches");
        let with_it =
            batches.iter().enumerate().filter(|(_, keys)| keys.iter().any(|(other, _)| other == key));
        (batches.len(), with_it.map(|(number, _)| number).collect())
    }

    /// Applies an edit at once, also while the gate is closed.
    pub(super) async fn apply(&self, key: Key, edit: Edit) {
        self.store.commit(Arc::new(vec![(key, edit)]), PATIENCE).await.expect("a commit");
    }

    /// Applies the attempts that were delayed or failed.
    pub(super) async fn deliver_delayed(&self) {
        let delayed = std::mem::take(&mut *self.delayed.lock().expect("batches"));
        assert!(!delayed.is_empty(), "no attempt was delayed");
        for batch in delayed {
            self.store.commit(batch, PATIENCE).await.expect("a commit");
        }
    }
}

impl Store for GatedStore {
    async fn commit(&self, batch: Edits, deadline: Duration) -> Result<Committed, StoreError> {
        let touched = batch.iter().map(|(key, edit)| (key.clone(), edit.touched().len())).collect();
        // Noted before the gate, so that a test can wait for a batch that is under way.
        self.batches.lock().expect("batches").push(touched);
        let fails = |left: usize| left.checked_sub(1);
        let fails = self.fails.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fails).is_ok();
        let _permit = self.gate.acquire().await.expect("a gate");
        if fails {
            self.delayed.lock().expect("batches").push(batch);
            let cause = "it is to fail".to_owned();
            return Err(StoreError::Unavailable { outcome: Outcome::Unknown, cause });
        }
        assert!(!self.panics.swap(false, Ordering::SeqCst), "a batch is to panic");
        if !self.delays.swap(false, Ordering::SeqCst) {
            return self.store.commit(batch, deadline).await;
        }
        self.delayed.lock().expect("batches").push(Arc::clone(&batch));
        let repeated = batch.iter().map(|(key, edit)| (key.clone(), edit.clone().repeated()));
        let committed = self.store.commit(Arc::new(repeated.collect()), deadline).await?;
        Ok(Committed { is_repeated: true, ..committed })
    }

    fn batches(&self) -> usize {
        1
    }

    async fn read(&self, keys: Vec<Key>) -> Result<Vec<ForKey>, StoreError> {
        self.store.read(keys).await
    }

    async fn list(&self, query: ListQuery) -> Result<Page, StoreError> {
        self.pages.lock().expect("pages").push(query.prefix.clone());
        let _permit = self.gate.acquire().await.expect("a gate");
        self.store.list(query).await
    }

    async fn purge(&self, free_for: Duration) -> Result<u64, StoreError> {
        self.store.purge(free_for).await
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.store.check().await
    }

    fn id(&self) -> Uuid {
        self.store.id()
    }

    fn rules(&self) -> Rules {
        RULES
    }

    fn name(&self) -> &'static str {
        "gated"
    }

    async fn feed(&self, _: mpsc::Sender<FeedEvent>, _: CancellationToken) {}

    fn feed_state(&self) -> FeedState {
        FeedState::Off
    }

    fn is_shared(&self) -> bool {
        false
    }
}

pub(super) fn key(name: &str) -> Key {
    Key::try_from(name).expect("a key")
}

/// Waits until the condition holds.
pub(super) async fn until(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            yield_now().await;
        }
    };
    timeout(PATIENCE, wait).await.expect("it holds in time");
}
